"""fault_matrix.py -- every trainer, alone and as two ranks, against every fault.

    python scripts/fault_matrix.py                       short: each fault once, about a minute
    python scripts/fault_matrix.py --long --out FILE     each fault with each trainer and both
                                                         numbers of ranks, and kills at random times
    python scripts/fault_matrix.py --long --trainer train_gpt --fault SIGTERM

A cell is a small run that meets a fault, is started again with the same command, and must then end
as an undisturbed run does: nothing lost, doubled or torn, and the weights bitwise the same
(scripts/faults/checks.py). Ranks are forked, which is fast; --torchrun starts two of them as users
do. Exit code 1 when something does not hold; --keep DIR keeps the folders of the runs.
"""

import argparse
import importlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two threads that wait for each other are slow
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from faults import checks, small_runs, starts  # noqa: E402
from faults.catalogue import FAULTS, Fault  # noqa: E402

RANDOM_KILLS = 4  # at the most, one behind another, of one run of the long form


@dataclass(frozen=True)
class Cell:
    """What one run met, and what was wrong afterwards."""

    trainer: str
    ranks: int
    fault: str
    starts: int
    kills: int
    seconds: float
    problems: list[str]


class Matrix:
    """The cells of one trainer and number of ranks share their data and an undisturbed run."""

    def __init__(self, home: Path, by_torchrun: bool):
        self.home, self.by_torchrun = home, by_torchrun
        self.data = home / "data"
        self.data.mkdir(parents=True)
        small_runs.write_data(self.data)
        self.references: dict[tuple[str, int], tuple[Path, float]] = {}
        # Once, for all the processes that are forked; torch imports its compiler late.
        for module in (*small_runs.TRAINERS, "torch._dynamo"):
            importlib.import_module(module)

    def start(self, trainer: str, ranks: int, folder: Path, fault: str = "", **more) -> int:
        flags = small_runs.flags(trainer, self.data, folder)
        start = starts.by_torchrun if self.by_torchrun and ranks > 1 else starts.by_fork
        return start(trainer, ranks, flags, fault, folder / "output.txt", **more)

    def reference(self, trainer: str, ranks: int) -> tuple[Path, float]:
        """The folder of an undisturbed run, and how long it took."""
        if (trainer, ranks) not in self.references:
            folder = self.folder(trainer, ranks, "undisturbed")
            started = time.monotonic()
            code = self.start(trainer, ranks, folder)
            if code != 0:
                output = (folder / "output.txt").read_text()
                raise SystemExit(f"{trainer} on {ranks} rank(s) does not run at all:\n{output}")
            self.references[trainer, ranks] = folder, time.monotonic() - started
        return self.references[trainer, ranks]

    def folder(self, trainer: str, ranks: int, name: str) -> Path:
        folder = self.home / f"{trainer}-{ranks}-{name.replace(' ', '_').replace(',', '')}"
        folder.mkdir()
        return folder

    def run_fault(self, trainer: str, ranks: int, fault: Fault) -> Cell:
        """One cell: the run meets the fault, and is started again."""
        reference, _ = self.reference(trainer, ranks)
        folder = self.folder(trainer, ranks, fault.name)
        began = time.monotonic()
        problems = []
        code = self.start(trainer, ranks, folder, fault.text(ranks))
        status = checks.first_status(folder)
        # A rank that lost another one fails; one that its launcher stopped in time is preempted.
        may_be = {fault.status, "failed", "preempted"} if ranks > 1 else {fault.status}
        if code == starts.HANGS or status not in may_be or (code == 0) == bool(fault.resumes):
            problems.append(f"the first start ended with exit code {code} and status {status}")
        num_starts = 1
        if fault.resumes:
            if fault.damage is not None:
                fault.damage(folder)
            problems += self.go_on(trainer, ranks, folder, fault.resumes)
            num_starts += 1
        problems += checks.end_problems(folder, reference, fault.tears)
        seconds = time.monotonic() - began
        kills = int(fault.is_kill)
        return Cell(trainer, ranks, fault.name, num_starts, kills, seconds, problems)

    def go_on(self, trainer: str, ranks: int, folder: Path, steps: tuple[int, ...]) -> list[str]:
        """Start the run again; it must go on from one of the steps, and end."""
        output = folder / "output.txt"
        before = output.stat().st_size
        problems = []
        code = self.start(trainer, ranks, folder)
        step = checks.resumed_from(output.read_text(errors="replace")[before:])
        if code != 0:
            problems.append(f"the second start ended with exit code {code}")
        if step not in steps:
            problems.append(f"it went on from step {step}, not {steps}")
        return problems

    def run_random_kills(self, trainer: str, ranks: int, seed: int) -> Cell:
        """A run that is killed at random times, until it ends in between."""
        reference, usual_s = self.reference(trainer, ranks)
        folder = self.folder(trainer, ranks, f"random {seed}")
        rng = random.Random(f"{trainer} {ranks} {seed}")
        began = time.monotonic()
        kills, code = 0, 1
        while code != 0 and kills < RANDOM_KILLS:
            after_s = rng.uniform(0.3, 1.0) * usual_s
            code = self.start(trainer, ranks, folder, kill_after_s=after_s)
            kills += int(code != 0)
            if checks.first_status(folder) == "finished":  # killed when all was done
                code = 0
        if code != 0:
            code = self.start(trainer, ranks, folder)
        problems = [] if code == 0 else [f"the last start ended with exit code {code}"]
        problems += checks.end_problems(folder, reference)
        seconds = time.monotonic() - began
        return Cell(trainer, ranks, "killed at random", kills + 1, kills, seconds, problems)


def plan(a: argparse.Namespace) -> Iterator[tuple[str, int, Fault | int]]:
    """Trainer, ranks and fault of each cell; a number stands for kills at random times."""
    pairs = [(trainer, ranks) for trainer in a.trainer for ranks in a.ranks]
    faults = [f for f in FAULTS if not a.fault or any(word in f.name for word in a.fault)]
    for i, fault in enumerate(faults):
        fitting = [pair for pair in pairs if not fault.only or pair[0] in fault.only]
        chosen = fitting if a.long else fitting[i % len(fitting) :][:1]
        for trainer, ranks in chosen:
            yield trainer, ranks, fault
    if a.long and not a.fault:
        for seed in range(a.random):
            for trainer, ranks in pairs:
                yield trainer, ranks, seed


def run_all(a: argparse.Namespace, home: Path, say: Callable[[str], None]) -> list[Cell]:
    matrix = Matrix(home, a.torchrun)
    end = time.monotonic() + 60 * a.minutes
    cells = []
    for trainer, ranks, fault in plan(a):
        if time.monotonic() > end:
            say(f"{a.minutes:g} minutes are over: the rest is left out")
            break
        if isinstance(fault, Fault):
            cell = matrix.run_fault(trainer, ranks, fault)
        else:
            cell = matrix.run_random_kills(trainer, ranks, fault)
        cells.append(cell)
        verdict = "; ".join(cell.problems) or "as undisturbed"
        say(f"{cell.seconds:5.1f} s  {trainer} x {ranks}  {cell.fault}: {verdict}")
    return cells


def summary(cells: list[Cell], seconds: float) -> dict[str, object]:
    return {
        "cells": len(cells),
        "bad": sum(bool(cell.problems) for cell in cells),
        "starts": sum(cell.starts for cell in cells),
        "kills": sum(cell.kills for cell in cells),
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
    }


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--long", action="store_true", help="every fault with every trainer")
    p.add_argument("--torchrun", action="store_true", help="start two ranks by torchrun")
    p.add_argument("--trainer", nargs="+", default=small_runs.TRAINERS, help="only these")
    p.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="only these numbers")
    p.add_argument("--fault", nargs="+", metavar="WORDS", help="only faults with these words")
    p.add_argument("--random", type=int, default=2, help="runs with random kills, per pair (2)")
    p.add_argument("--minutes", type=float, default=60, help="start no cell after this (60)")
    p.add_argument("--out", type=Path, metavar="JSON", help="where to write all cells")
    p.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs here")
    a = p.parse_args()
    # A background job, or one under nohup, ignores these, and the runs would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    began = time.monotonic()
    home = a.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        cells = run_all(a, home, lambda line: print(line, flush=True))
    finally:
        if a.keep is None:
            shutil.rmtree(home, ignore_errors=True)
    facts = summary(cells, time.monotonic() - began)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if a.out:
        content = {**facts, "all": [asdict(cell) for cell in cells]}
        a.out.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(cell.problems for cell in cells) or not cells)


if __name__ == "__main__":
    sys.exit(main())
