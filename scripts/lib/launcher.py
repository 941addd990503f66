"""Runs what is missing of a study: locks, processes, signals, retries."""

import argparse
import ctypes
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from lib.board import Board
from lib.deciding import ENDED, decision_lines, is_due, spare
from lib.fork_stage import checkpoint_path
from lib.planning import Pace, affordable, by_width, is_next_within_budget
from lib.program import ROOT, UserError, count
from lib.progress import Progress, Records, write_stages
from lib.study import Study
from lib.trainers import code_sha256
from lib.words import duration, fit

FORWARDED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class Signals:
    """Passes the first signal on to the run that is going on, once; a second Ctrl-C kills it and
    all below it."""

    def __init__(self):
        self.number, self.child, self.forwarded, self.before = 0, None, False, {}
        for name in FORWARDED:
            number = getattr(signal, name)
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
                self.before[number] = signal.signal(number, self.hear)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def watch(self, child: subprocess.Popen | None) -> None:
        self.child, self.forwarded = child, False
        self.forward()  # one that came while the process was being made

    def hear(self, number: int, frame: object) -> None:
        again, self.number = bool(self.number), self.number or number
        if again and number == signal.SIGINT and self.child is not None:
            kill_tree(self.child.pid)
        self.forward()

    def forward(self) -> None:
        if self.number and self.child is not None and not self.forwarded:
            self.forwarded = True
            # SIGHUP says nothing to a trainer, and torchrun does not pass SIGUSR1 on unless told
            # to.
            number = signal.SIGINT if self.number == signal.SIGINT else signal.SIGTERM
            try:
                os.killpg(self.child.pid, number)
            except ProcessLookupError:
                pass


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all below it: torchrun's workers are in sessions of their own."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    todo = [pid]
    while todo:
        one = todo.pop()
        todo += parents.get(one, [])
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _die_with_launcher() -> None:
    """Runs in the child before exec: a launcher that is killed takes its run along, by SIGTERM,
    so it saves. Without this, the run would go on unseen, on the GPUs that the next launcher
    wants."""
    _PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def command(trainer: Path, nproc: int) -> list[str]:
    if nproc == 1:
        return [sys.executable, str(trainer)]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={nproc}",
    ]
    return [*torchrun, str(trainer)]


def run_env(p: Progress, logs: Path, results: Path) -> dict[str, str]:
    env = {**p.run.env, "RUN_ID": p.run_id}
    if p.trunk:
        env["FORK_FROM"] = str(checkpoint_path(logs, p.trunk.run_id, p.run.first_step))
    return {**env, "LOGS_FOLDER": str(logs), "RESULTS_FILE": str(results)}


def last_lines(path: Path, start: int, n: int = 5) -> list[str]:
    """The last lines of an attempt's output that say something: without torchrun's own report,
    which ends it. Where ranks left tracebacks, the last line of each, the first to fail first:
    the others only miss its company."""
    with open(path, "rb") as f:
        f.seek(start)
        text = f.read()[-100_000:].decode("utf-8", "replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if not re.match(r"[EWI]\d{4} |-{20}|={20}|\[rank\d+\]:\[", line)]
    for i, line in enumerate(ours):
        if line.startswith("Traceback") and any(
            "torch/distributed/run.py" in x for x in ours[i + 1 : i + 8]
        ):
            ours = ours[:i]
            break
    ends: dict[str, str] = {}
    for line in ours:
        if rank := re.match(r"\[rank\d+\]: ", line):
            ends[rank[0]] = line
    if ends:
        return list(ends.values())[:n]
    return (ours or lines)[-n:]


class Runner:
    def __init__(
        self, study: Study, runs: Sequence[Progress], records: Records, a: argparse.Namespace
    ):
        self.study, self.runs, self.records, self.a = study, runs, records, a
        self.nproc = a.nproc or study.nproc
        self.pace = Pace(a.logs_folder)
        self.signals, self.board = Signals(), Board(study, runs, self.pace)
        self.unaffordable: list[Progress] = []
        self.errors: dict[str, tuple[Path, list[str]]] = {}
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        self.base_env = {n: v for n, v in os.environ.items() if n not in study.trainer.known}
        self.base_env.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.nproc)))

    def run(self) -> int:
        """Run what is missing; returns the exit code."""
        try:
            self.run_all()
        finally:
            self.board.close()
            self.signals.restore()
        return self.report()

    def run_all(self) -> None:
        waits = False
        while not self.signals.number:
            took = self.take_one()
            busy = [p for p in self.runs if p.state == "elsewhere"]
            if took:
                waits = False
            elif not busy:
                break
            else:
                if not waits:
                    self.board.event(
                        f"waiting for {count(len(busy), 'run')} that other launchers have taken "
                        f"(Ctrl-C leaves them alone)",
                        quiet=True,
                    )
                    self.board.doing = "waiting for other launchers' runs; Ctrl-C leaves them alone"
                waits = True
                for _ in range(4):
                    self.board.tick()
                    if not self.signals.number:
                        time.sleep(0.5)

    def take_one(self) -> bool:
        """Run the first missing run that nobody else has; whether there was one."""
        self.take_stock()
        self.unaffordable = []
        for p in by_width(self.study, self.runs) if self.study.budget_s else self.runs:
            if p.state in ENDED or not self.may_start(p):
                continue
            lock = FileLock(self.a.logs_folder / ".locks" / f"{p.run.key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                p.state = "elsewhere"
                self.records.follow(p)
                continue
            try:
                # Finished while we waited, by another launcher? Only now, under its lock, can we
                # know.
                if self.records.look(p, self.a.ignore_code):
                    self.board.event(f"done elsewhere: {p.run_id}", quiet=True)
                elif self.records.is_trained_elsewhere(p.run_id):
                    p.state = "elsewhere"
                    continue
                else:
                    self.run_one(p)
                return True
            finally:
                lock.release()
        return False

    def may_start(self, p: Progress) -> bool:
        """Whether it is this run's turn, and the budget has room for it."""
        if self.study.budget_s and not p.run.stop_after:
            has_start = p.trunk is None or p.trunk.state == "done"
            is_its_turn = has_start and is_next_within_budget(self.runs, p)
        else:
            is_its_turn = is_due(self.study, self.runs, p)
        if is_its_turn and not affordable(self.study, self.runs, p, self.pace):
            self.unaffordable.append(p)
            return False
        return is_its_turn

    def take_stock(self) -> None:
        """Which runs of sequential stages are needed, now that others may have finished some."""
        for p in self.runs:
            if p.state == "elsewhere" and p.run.stage in self.study.rules:
                self.records.look(p, self.a.ignore_code)
        spare(self.study, self.runs)

    def run_one(self, p: Progress) -> None:
        """Train one run, again if it fails, until it is done, given up or we are told to stop."""
        out = self.a.logs_folder / f"{p.run_id}.out"
        p.log = out
        for attempt in range(1 + self.a.retries):
            if code_sha256(self.study.trainer.module) != self.study.trainer.code:
                raise UserError(
                    f"{self.study.trainer.path.name} or plumbing was changed while the study "
                    "ran; what is finished "
                    "counts for the code as it was (--ignore-code accepts it), the rest was not "
                    "started"
                )
            verb = "start" if not (p.step or attempt) else "resume" if p.step else "again"
            self.board.event(
                f"{verb}: {p.run_id}{f' at step {p.step}' if p.step else ''}", quiet=True
            )
            first, began_at = max(p.step, p.run.first_step), time.monotonic()
            code, start = self.attempt(p, out)
            is_done = self.records.look(p, ignore_code=False)
            self.pace.add(p.run_id, time.monotonic() - began_at, p.step - first)
            if is_done:
                took = f" in {duration(p.wall_s)}" if p.wall_s else ""
                loss = f", loss {p.loss:.4f}" if math.isfinite(p.loss) else ""
                self.board.event(f"done: {p.run_id}{loss}{took}", quiet=True)
                return
            status = self.records.status(p.run_id).get("status", "")
            p.state = "half-done" if p.step else "waiting"
            if self.signals.number:
                self.board.event(f"stopped: {p.run_id} at step {p.step}/{p.run.steps}", quiet=True)
                return
            tail = last_lines(out, start)
            refused = code == 2 or any(
                re.match(rf"{re.escape(self.study.trainer.path.name)}: error: ", x) for x in tail
            )
            reason = "refused" if refused else status if status == "nan" else f"exit code {code}"
            if (
                refused or status == "nan" or attempt == self.a.retries
            ):  # neither would go another way next time
                p.state, p.note = "failed", "nan" if status == "nan" else ""
                self.errors[p.run_id] = out, tail
                self.board.event(f"failed ({reason}): {p.run_id}, see {out}", quiet=True)
                return
            self.board.event(f"failed ({reason}), trying again: {p.run_id}", quiet=True)

    def attempt(self, p: Progress, out: Path) -> tuple[int, int]:
        """One process (or one torchrun) on a run; its exit code, and where in `out` its words
        begin."""
        line = command(self.study.trainer.path, self.nproc)
        env = self.base_env | run_env(p, self.a.logs_folder, self.a.results_file)
        with open(out, "ab") as f:
            said = " ".join(
                f"{k}={shlex.quote(v)}" for k, v in env.items() if k in self.study.trainer.known
            )
            f.write(f"# {datetime.now():%Y-%m-%d %H:%M:%S} {said} {shlex.join(line)}\n".encode())
            f.flush()
            start = f.tell()
            t0, before, p.state = time.monotonic(), p.wall_s, "running"
            p.began, p.began_step = math.nan, p.step
            # A session of its own: the terminal's Ctrl-C reaches the launcher alone, which passes
            # it on once.
            child = subprocess.Popen(
                line, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                start_new_session=True,
                preexec_fn=_die_with_launcher if _PRCTL else None,
            )  # fmt: skip
        self.signals.watch(child)
        asked, first, since = time.monotonic(), p.step, time.time()
        while True:
            try:
                code = child.wait(timeout=0.25)
                break
            except subprocess.TimeoutExpired:
                pass
            p.wall_s = before + time.monotonic() - t0
            if self.signals.number:
                self.board.doing = (
                    "saves and stops; Ctrl-C again kills it (what was saved before stays)"
                )
            if time.monotonic() - asked >= 0.5:
                asked = time.monotonic()
                self.records.follow(p, since)
                if math.isnan(p.began) and p.step > first:
                    p.began, p.began_step = time.monotonic(), p.step
                for other in self.runs:
                    if other.state == "elsewhere" and not self.records.look(
                        other, self.a.ignore_code
                    ):
                        self.records.follow(other)
            self.board.tick()
        self.signals.watch(None)
        return code, start

    def report(self) -> int:
        """What happened; the exit code."""
        failed = [p for p in self.runs if p.state == "failed"]
        for p in failed:
            path, tail = self.errors[p.run_id]
            print(f"\nfailed: {p.run_id}{f' ({p.note})' * bool(p.note)}; {path} ends in")
            for line in tail:
                print(f"    {fit(line, 300)}")
        for p in self.runs:
            if p.note == "no row":
                print(
                    f"{p.run_id} is finished, but {self.a.results_file} has no row of it; to run "
                    "it again, move "
                    f"{self.records.logs / p.run_id} away"
                )
        other = [p for p in self.runs if p.note.startswith("code ")]
        if other:
            print(
                f"{count(len(other), 'run')} of other code accepted (--ignore-code): their rows "
                "say which"
            )
        for line in decision_lines(self.study, self.runs):
            print(line)
        if self.unaffordable:
            spent = self.pace.spent_s(self.runs)
            print(
                f"budget_s = {self.study.budget_s:g}: {spent:.0f} s are spent, which leaves no "
                f"room for {self.unaffordable[0].run_id}; raise it to go on"
            )
        print(f"{self.study.title}: {self.board.summary().split(', ETA')[0]}")
        if stages := write_stages(self.study, self.runs, self.records):
            source = os.path.relpath(self.a.results_file)
            print(
                f"tables: python scripts/split_results.py --results_file {source} --stages "
                f"{os.path.relpath(stages)}"
            )
        if number := self.signals.number:
            print(
                f"stopped by {signal.Signals(number).name}; the same command goes on from here",
                flush=True,
            )
            return 128 + number
        return 1 if failed else 0
