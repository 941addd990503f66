"""inject.py -- a trainer with a fault put in.

    FAULT=kill:7 python scripts/faults/inject.py train_gpt --num_iterations=12 ...

FAULT is WHAT:STEP[:RANK[:WHERE]]. WHAT is kill (SIGKILL, as a power cut has it), raise, full (the
disk), nan, or a signal that asks for a stop: term, int, hup or usr1. RANK is 0, and WHERE is
`step`, unless they are given; PLACES lists the others. The fault strikes in the first start only:
workers that torchrun starts again find nothing wrong. Without FAULT nothing is put in.
"""

import errno
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from plumbing import Prefetch, checkpoints, results  # noqa: E402
from plumbing.exchange import StepExchange  # noqa: E402
from plumbing.records import RunLog  # noqa: E402
from plumbing.world import launch  # noqa: E402

SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "hup": signal.SIGHUP,
    "usr1": signal.SIGUSR1,
}
Strike = Callable[[], None]


def strike_with(what: str, step: int) -> Strike:
    """The function that does the bad thing."""

    def strike() -> None:
        if what == "raise":
            raise RuntimeError(f"injected at step {step}")
        if what == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        os.kill(os.getpid(), SIGNALS[what])

    return strike


# ----------------------------------------------------------------------------
# Places: each function changes plumbing so that the fault strikes there


def in_step(strike: Strike, step: int) -> None:
    """When the figures of the step are sent, before its update."""
    send = StepExchange.send

    def faulty_send(self: StepExchange, at: int, loss: torch.Tensor, *rest) -> torch.Tensor:
        if at == step:
            strike()
        return send(self, at, loss, *rest)

    StepExchange.send = faulty_send


def not_finite(step: int) -> None:
    """The loss and the gradients of the step are nan."""
    send = StepExchange.send

    def faulty_send(self: StepExchange, at: int, loss: torch.Tensor, lr, norms, *rest):
        factor = float("nan") if at == step else 1.0
        return send(self, at, loss * factor, lr, norms * factor, *rest)

    StepExchange.send = faulty_send


class _HalfWritten:
    """A file that takes the first half of what is written; then the fault strikes."""

    def __init__(self, file: io.TextIOBase, strike: Strike):
        self.file, self.strike, self.name = file, strike, file.name

    def write(self, text: str) -> None:
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        self.strike()

    def flush(self) -> None:
        self.file.flush()


def in_log(strike: Strike, step: int) -> None:
    """Half of the first line that follows the step's figures is in the log."""
    record, write, reached = RunLog.step, RunLog._write, []

    def faulty_record(self: RunLog, stats, *rest) -> None:
        if stats.step >= step:
            reached.append(stats.step)
        record(self, stats, *rest)

    def faulty_write(self: RunLog, file: io.TextIOBase, text: str) -> None:
        if reached and file is self.log:
            file = _HalfWritten(file, strike)
        write(self, file, text)

    RunLog.step, RunLog._write = faulty_record, faulty_write


def in_metrics(strike: Strike, step: int) -> None:
    """Half of the step's row is in metrics.csv."""
    write = RunLog._write

    def faulty_write(self: RunLog, file: io.TextIOBase, text: str) -> None:
        if file is self.csv and text.startswith(f"{step},"):
            file = _HalfWritten(file, strike)
        write(self, file, text)

    RunLog._write = faulty_write


def in_validation(strike: Strike, step: int) -> None:
    """The validation is computed and not yet recorded."""
    validation = RunLog.validation

    def faulty_validation(self: RunLog, at: int, *rest) -> None:
        if at == step:
            strike()
        validation(self, at, *rest)

    RunLog.validation = faulty_validation


def in_state(strike: Strike, step: int) -> None:
    """Half of the checkpoint's tensors are on disk."""
    save = checkpoints._torch_save

    def faulty_save(content: dict, path: Path) -> None:
        if path.parent.name == f"step_{step:06d}.part":
            whole = io.BytesIO()
            torch.save(content, whole)
            path.write_bytes(whole.getvalue()[: whole.tell() // 2])
            strike()
        save(content, path)

    checkpoints._torch_save = faulty_save


def _before_replace(strike: Strike, is_it: Callable[[Path, Path], bool]) -> None:
    """A file is written, and has not yet got its name."""
    replace = os.replace

    def faulty_replace(source: str | Path, target: str | Path) -> None:
        if is_it(Path(source), Path(target)):
            strike()
        replace(source, target)

    os.replace = faulty_replace


def in_manifest(strike: Strike, step: int) -> None:
    _before_replace(
        strike,
        lambda _, target: target.name == "manifest.json" and f"{step:06d}" in target.parent.name,
    )


def in_status(strike: Strike, step: int) -> None:
    _before_replace(
        strike,
        lambda source, target: (
            target.name == "status.json" and json.loads(source.read_text())["step"] >= step
        ),
    )


def in_weights(strike: Strike, step: int) -> None:
    """The weights files that a trainer writes beside its checkpoints."""
    _before_replace(strike, lambda _, target: target.suffix in (".pt", ".pth"))


def _at_rename(strike: Strike, is_it: Callable[[str, str], bool], before: bool) -> None:
    rename = Path.rename

    def faulty_rename(self: Path, target: str | Path) -> Path:
        found = is_it(self.name, Path(target).name)
        if found and before:
            strike()
        renamed = rename(self, target)
        if found and not before:
            strike()
        return renamed

    Path.rename = faulty_rename


def before_rename(strike: Strike, step: int) -> None:
    """The checkpoint is whole and has not yet got its name."""
    _at_rename(strike, lambda source, target: target == f"step_{step:06d}", before=True)


def after_rename(strike: Strike, step: int) -> None:
    """The checkpoint has its name, and older ones are still there."""
    _at_rename(strike, lambda source, target: target == f"step_{step:06d}", before=False)


def in_pruning(strike: Strike, step: int) -> None:
    """The step's checkpoint is there, and an old one is about to be removed."""
    rename = Path.rename

    def faulty_rename(self: Path, target: str | Path) -> Path:
        renamed = rename(self, target)
        is_there = (self.parent / f"step_{step:06d}").exists()
        if is_there and Path(target).name.endswith(".old.part"):
            strike()
        return renamed

    Path.rename = faulty_rename


def in_row(strike: Strike, step: int) -> None:
    """Half of the results row is on disk."""
    append, write = results._append_row, os.write

    def faulty_write(descriptor: int, data: memoryview) -> int:
        write(descriptor, bytes(data[: len(data) // 2]))
        strike()
        return len(data)

    def faulty_append(*args) -> None:
        os.write = faulty_write
        try:
            append(*args)
        finally:
            os.write = write

    results._append_row = faulty_append


def after_row(strike: Strike, step: int) -> None:
    """The results row is on disk, and the status does not yet say so."""
    append = results._append_row

    def faulty_append(*args) -> None:
        append(*args)
        strike()

    results._append_row = faulty_append


def behind_loop(strike: Strike, step: int) -> None:
    """Training is done, and what comes behind the loop is not."""
    close = Prefetch.close

    def faulty_close(self: Prefetch) -> None:
        close(self)
        strike()

    Prefetch.close = faulty_close


PLACES = {
    "step": in_step,
    "log": in_log,
    "metrics": in_metrics,
    "validation": in_validation,
    "state": in_state,
    "manifest": in_manifest,
    "status": in_status,
    "weights": in_weights,
    "before_rename": before_rename,
    "after_rename": after_rename,
    "pruning": in_pruning,
    "row": in_row,
    "after_row": after_row,
    "behind_loop": behind_loop,
}


def put_in(fault: str) -> None:
    """Let the fault strike in this process, if it is the one and the start is the first."""
    what, step, *rest = fault.split(":")
    rank, where = (rest + ["0", "step"][len(rest) :])[:2]
    if os.environ.get("RANK", "0") != rank:
        return
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if what == "nan":
        not_finite(int(step))
    else:
        PLACES[where](strike_with(what, int(step)), int(step))


def run(trainer: str, fault: str) -> NoReturn:
    """Run a trainer's main(), with the fault put in unless it is empty."""
    module = importlib.import_module(trainer)
    if fault:
        put_in(fault)
    launch(module.main)


if __name__ == "__main__":
    trainer = sys.argv.pop(1)
    sys.argv[0] = f"{trainer}.py"
    run(trainer, os.environ.get("FAULT", ""))
