"""The results file: one line per run, read as it stands and written as it stood.

Reading is forgiving about files (CRLF, older columns, torn rows: named, then skipped); no row is
lost in silence. No pandas: a number is written as it was read.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lib.program import UserError
from lib.stats import NAN
from plumbing.csv_files import NEEDED, csv_fields, csv_lines, header_fields

HEADER = (  # the original's 21 columns, then ours
    "run_id date git_commit seed attn_gate gate_pos gate_act learning_rate batch_size "
    "device_batch_size "
    "sequence_length num_iterations warmdown_iters final_val_loss best_val_loss train_time_ms "
    "ms_per_step "
    "gpu_name n_gpus runpod_instance notes stage status steps_done warmup_iters n_params "
    "tokens_seen epochs "
    "peak_memory_mib torch world_size code_sha256 dirty"
).split()


@dataclass(frozen=True)
class Row:
    """One run's line of a results file; a column that the file does not have reads as ''."""

    values: Mapping[str, str]
    line: str  # as it stood in the file, without its line end
    where: str  # file:line, for messages

    def __getitem__(self, column: str) -> str:
        return self.values.get(column, "")

    def number(self, column: str) -> float:
        """The column as a number; nan where it is missing or none."""
        try:
            return float(self[column])
        except ValueError:
            return NAN

    @property
    def status(self) -> str:
        """How the run ended. The original's files have no such column: they got a row only when
        they finished."""
        return self["status"] or "finished"

    @property
    def is_finished(self) -> bool:
        """Whether its loss counts: it ran to its end, here or where its log was imported from."""
        return self.status in ("finished", "imported")

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.values)


def loss_unit(rows: Iterable[Row]) -> str:
    """What the losses of these runs are in: per byte only where every run trained on bytes."""
    found = {"unit=bytes" in row["notes"].split() for row in rows}
    if found == {True}:
        return "nats per byte"
    if found == {True, False}:
        return "nats per token or byte"
    return "nats per token"


def read_results(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a results file, and what was wrong with the lines that are not among them.

    One line is one row: a torn row cannot swallow the next. A second header (files put one behind
    another) holds for the rows below it. An empty file has no rows. Raises UserError when the file
    is missing, unreadable, or is not a results file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; a trainer writes it when a run ends, or name the file"
        ) from None
    header: list[str] = []
    rows, problems = [], []
    for number, line in enumerate(csv_lines(path, data), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        fields = csv_fields(line)
        if not header or fields[:1] == ["run_id"]:
            header = header_fields(path, line, NEEDED, number)
        elif len(fields) != len(header):
            found = f"{len(fields)} fields" if fields else "an open quote"
            problems.append(f"{where}: {found} where the header has {len(header)} (torn?), skipped")
        elif "\0" in line or "\ufffd" in line:
            problems.append(f"{where}: bytes that are no text (torn?), skipped")
        else:
            rows.append(Row(dict(zip(header, fields, strict=True)), line, where))
    return rows, problems


def results_text(rows: Sequence[Row]) -> str:
    """The rows as a CSV file, LF. Rows of one schema are copied as they stand; where schemas are
    mixed, the columns are their union and each field keeps its text."""
    columns = list(dict.fromkeys(name for row in rows for name in row.columns)) or HEADER
    if all(name in HEADER for name in columns):  # in the known order, whichever schema came first
        columns.sort(key=HEADER.index)
    if len({row.columns for row in rows}) <= 1:
        columns = list(rows[0].columns) if rows else columns
        return "".join(f"{line}\n" for line in [csv_line(columns), *(row.line for row in rows)])
    return "".join(
        f"{csv_line(line)}\n" for line in [columns, *([row[c] for c in columns] for row in rows)]
    )


def csv_line(fields: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(fields)
    return text.getvalue()


def canon(value: object) -> str:
    """A value as text, one text per number: 1500, 1500.0 and 1.5e3 are the same iterations."""
    return _canon(str(value))


@lru_cache(maxsize=100_000)
def _canon(text: str) -> str:
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        return text
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
