"""results.py -- one row per run in a CSV that all runs share.

Promises: a row is written completely or not at all, also when many runs end at once or the disk
is full. A file with other columns, or one that a spreadsheet has rewritten, is refused before
training. A last line that somebody's crash tore is closed, never continued. A run that was killed
just behind its row does not get a second one.
"""

import codecs
import csv
import dataclasses
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock

from plumbing.csv_files import NEEDED, csv_fields, csv_lines, header_fields, header_line
from plumbing.family import KNOB_OF
from plumbing.knobs import UserError, describe
from plumbing.run_knobs import RUN_KNOBS
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
            with open(path, "ab+") as file:
                if path.is_file():  # a device may be endless
                    file.seek(0)
                    problem = _header_problem(path, columns, file.read())
                else:
                    problem = f"{path}: is not a file; set RESULTS_FILE to another"
        except OSError as error:
            problem = f"{path}: cannot be written ({error.strerror}); set RESULTS_FILE to another"
    world.agree(problem)


def _header_problem(path: Path, columns: Sequence[str], data: bytes) -> str | None:
    """What is wrong with a results file that a row of these columns is to be appended to."""
    try:
        lines = csv_lines(path, data)
        header = header_line(lines)
        if not header:
            return None
        found = header_fields(path, header, columns[:1])
        for number, line in enumerate(lines, start=1):
            if csv_fields(line)[:1] == ["run_id"]:  # of a file that was put behind another
                header_fields(path, line, [name for name in NEEDED if name in columns], number)
    except UserError as error:
        return f"{error}; or set RESULTS_FILE to another"
    if found == list(columns):
        return None
    wrong = sorted(set(found) ^ set(columns)) or "their order"
    return (
        f"{path}: other columns than ours ({wrong}); move it away, or set RESULTS_FILE to another"
    )


def append_result(
    path: Path,
    columns: Sequence[str],
    row: Mapping[str, object],
    world: World,
    may_be_there: bool = False,
) -> None:
    """Append one row under a file lock, completely or not at all. The header comes first in a new
    file, and a last line that somebody's crash tore is closed, never continued. `may_be_there`: an
    earlier start of the run may have been killed just behind its row, which is not to be doubled.

    Raises UserError on every rank when the row cannot be written.
    """
    problem = None
    if world.is_main:
        try:
            with FileLock(f"{path}.lock"):
                if not (may_be_there and _has_row(path, row)):
                    _append_row(path, columns, row)
        except OSError as error:
            problem = (
                f"{path}: the results row could not be written ({error}); free space and start the "
                f"same run again, which only writes its row"
            )
    world.agree(problem)


def _has_row(path: Path, row: Mapping[str, object]) -> bool:
    """Whether the file has a row of this run with this status."""
    if not path.exists():
        return False
    lines = csv_lines(path, path.read_bytes())
    names = csv_fields(header_line(lines))
    for line in lines:
        found = dict(zip(names, csv_fields(line), strict=False))
        if all(found.get(name) == row[name] for name in ("run_id", "status")):
            return True
    return False


def _append_row(path: Path, columns: Sequence[str], row: Mapping[str, object]) -> None:
    known = {name: "" if value != value else value for name, value in row.items()}  # nan: unknown
    with open(path, "ab+") as file:
        size = file.tell()
        file.seek(0)
        before = file.read()
        text = io.StringIO()
        if before and not before.endswith(b"\n"):
            text.write("\n")
        if not before.removeprefix(codecs.BOM_UTF8).strip():
            text.write(",".join(columns) + "\n")
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
    name, or that which `column_knobs` gives, or another spelling of the knob in all trainers.
    """
    fields = {field.name: field for field in dataclasses.fields(cfg)}
    row = {}
    used = set()
    for column in columns:
        name = column_knobs.get(column, KNOB_OF.get(column, column))
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


def trains_on_bytes(session: "Session") -> bool:
    """Whether a token is a byte, so that losses are per byte: where the trainer or its tokenizer
    says so, or the vocabulary has the 256 ids of bytes.
    """
    cfg = session.cfg
    by_knobs = getattr(cfg, "tokenizer", "") == "bytes" or getattr(cfg, "vocab_size", 0) == 256
    return session.unit == "bytes" or by_knobs


def results_row(session: "Session") -> dict[str, object]:
    """A run's row: its knobs, what was measured, and what the trainer adds in `session.row`."""
    columns = session.columns
    row, knobs_in_columns = knob_columns(session.cfg, columns, session.column_knobs)
    row |= measured_columns(session)
    words = changed_knobs(session.cfg, session.presets, {*knobs_in_columns, *RUN_KNOBS})
    words.append(f"data_sha256={session.data_sha256}")
    if trains_on_bytes(session):
        words.append("unit=bytes")
    if session.progress.reached:
        words.append(session.progress.reached)
    row["notes"] = " ".join([*words, *session.notes])
    row |= session.row
    return {column: row.get(column, "") for column in columns}


def changed_knobs(cfg: object, presets: Mapping[str, Mapping], hidden: Iterable[str]) -> list[str]:
    """NAME=value of the knobs that are not as their preset has them. The hidden ones, which have a
    column of their own or change no loss, are left out; the preset is not."""
    usual = dataclasses.asdict(type(cfg)(**presets[cfg.preset]))
    usual["preset"] = next(iter(presets))
    changed = []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in hidden and field.name != "preset":
            continue
        if value != usual[field.name]:
            changed.append(f"{field.name.upper()}={describe(field, value)}")
    return changed
