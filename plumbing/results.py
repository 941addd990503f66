"""results.py -- one row per run in a CSV that all runs share.

Promises: a row is written completely or not at all, also when many runs end at once or the disk is
full. A file with other columns is refused before training. A last line that somebody's crash tore
is closed, never continued.
"""

import csv
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock

from plumbing.knobs import describe
from plumbing.world import World

if TYPE_CHECKING:
    from plumbing.session import Session


def check_results(path: Path, columns: Sequence[str], world: World) -> None:
    """Raise UserError, before training, when `path` has other columns than ours or cannot be
    written.
    """
    problem = None
    if world.is_main:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a+", newline="", encoding="utf-8") as file:
                file.seek(0)
                found = file.readline().strip().split(",")
            if found not in ([""], list(columns)):
                wrong = sorted(set(found) ^ set(columns)) or "their order"
                problem = (
                    f"{path}: other columns than ours ({wrong}); move it away, or set RESULTS_FILE "
                    f"to another"
                )
        except UnicodeDecodeError:
            problem = f"{path}: is not UTF-8 text; move it away, or set RESULTS_FILE to another"
        except OSError as error:
            problem = f"{path}: cannot be written ({error.strerror}); set RESULTS_FILE to another"
    world.agree(problem)


def append_result(
    path: Path, columns: Sequence[str], row: Mapping[str, object], world: World
) -> None:
    """Append one row under a file lock, completely or not at all. The header comes first in a new
    file, and a last line that somebody's crash tore is closed, never continued.

    Raises UserError on every rank when the row cannot be written.
    """
    problem = None
    if world.is_main:
        try:
            with FileLock(f"{path}.lock"):
                _append_row(path, columns, row)
        except OSError as error:
            problem = (
                f"{path}: the results row could not be written ({error}); free space and start the "
                f"same run again, which only writes its row"
            )
    world.agree(problem)


def _append_row(path: Path, columns: Sequence[str], row: Mapping[str, object]) -> None:
    known = {name: "" if value != value else value for name, value in row.items()}  # nan: unknown
    with open(path, "ab+") as file:
        size = file.tell()
        text = io.StringIO()
        if size == 0:
            text.write(",".join(columns) + "\n")
        else:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                text.write("\n")
        csv.DictWriter(text, columns, lineterminator="\n").writerow(known)
        rest = memoryview(text.getvalue().encode(errors="backslashreplace"))
        try:
            while rest:  # a disk that fills up writes less than it was asked to
                rest = rest[os.write(file.fileno(), rest) :]
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def knob_columns(
    cfg: object, columns: Sequence[str], column_knobs: Mapping[str, str]
) -> tuple[dict[str, str], set[str]]:
    """The columns that hold a knob's value, and the names of these knobs. A column has its knob's
    name, or that which `column_knobs` gives.
    """
    fields = {field.name: field for field in dataclasses.fields(cfg)}
    row = {}
    used = set()
    for column in columns:
        name = column_knobs.get(column, column)
        if name in fields:
            row[column] = describe(fields[name], getattr(cfg, name))
            used.add(name)
    return row, used


def measured_columns(session: "Session") -> dict[str, object]:
    """What a session knows of its run, under the names of the results columns."""
    world, clock, step = session.world, session.clock, session.step_now
    columns = {
        "run_id": session.run_id,
        "date": session.log.started,
        "git_commit": session.log.git_commit,
        "num_iterations": session.total_steps,
        "final_val_loss": session.progress.val_loss,
        "best_val_loss": session.progress.best_loss,
        "train_time_ms": 1000 * clock.train_s(step),
        "ms_per_step": 1000 * clock.step_avg_s,
        "tokens_per_s": session.tokens_per_step / clock.step_avg_s,
        "gpu_name": world.device_name(),
        "n_gpus": world.size if world.device.type == "cuda" else 0,
        "status": session.status,
        "steps_done": step,
        "n_params": session.num_params,
        "tokens_seen": session.log.tokens(step),
        "peak_memory_mib": world.peak_memory_mib(),
        "torch": torch.__version__,
        "world_size": world.size,
        "code_sha256": session.log.code_sha256,
        "dirty": int(session.log.dirty),
    }
    if session.steps_per_epoch:
        columns["epochs"] = round(step / session.steps_per_epoch, 4)
    return columns
