"""lib_results.py -- shared by the programs that read results: files, stages, comparisons, tables, plots.

Reading is forgiving about files (CRLF, older columns, torn rows: named, then skipped) and strict about sums:
every row ends up in a table or is named below it. No pandas: a number is written as it was read.

Words    a row is one line of results.csv; a cell is a configuration, run with one or more seeds; a stage is
         a set of cells that are compared with each other
Units    losses in nats per token, times of results.csv in ms, of metrics.csv in s
Raises   UserError for whatever a user can cause, as one line that says what to do
Needs    scipy for a comparison, matplotlib for a figure; both are imported where they are used. Not plumbing:
         it imports torch, and tables are also made on machines that have none.
"""

import csv
import dataclasses
import io
import math
import os
import re
import sys
import textwrap
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path

from lib_stats import (  # noqa: F401  offered to the programs from here
    NAN,
    Judged,
    Ratio,
    TTest,
    UserError,
    holm,
    judge,
    launch,
    mean,
    need,
    paired,
    pooled,
    pooled_sd,
    ratio,
    sd,
    t_test,
    welch,
)

REPO = Path(__file__).resolve().parents[1]


def write_whole(path: Path, data: str | bytes) -> None:
    """Replace `path` in one rename, LF line ends. Raises UserError when it cannot be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(part, path)
    except OSError as error:
        if path.parent.is_dir():
            part.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose another folder"
        ) from None


# ----------------------------------------------------------------------------
# Reading


NEEDED = (
    "run_id",
    "seed",
    "final_val_loss",
)  # what a row is useless without; all else may be missing
HEADER = (  # the original's 21 columns, then ours
    "run_id date git_commit seed attn_gate gate_pos gate_act learning_rate batch_size device_batch_size "
    "sequence_length num_iterations warmdown_iters final_val_loss best_val_loss train_time_ms ms_per_step "
    "gpu_name n_gpus runpod_instance notes stage status steps_done warmup_iters n_params tokens_seen epochs "
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
        """How the run ended. The original's files have no such column: they got a row only when they finished."""
        return self["status"] or "finished"

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.values)


def read_results(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a results file, and what was wrong with the lines that are not among them.

    One line is one row: a torn row cannot swallow the next. A second header (files put one behind another)
    holds for the rows below it. An empty file has no rows.
    Raises UserError when the file is missing, unreadable, or is not a results file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; a trainer writes it when a run ends, or name the file"
        ) from None
    header: list[str] = []
    rows, problems = [], []
    for number, line in enumerate(data.decode("utf-8-sig", errors="replace").split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            fields = next(csv.reader([line], strict=True)) if '"' in line else line.split(",")
        except csv.Error:
            fields = []
        if not header or fields[:1] == ["run_id"]:
            if missing := [name for name in NEEDED if name not in fields]:
                raise UserError(
                    f"{path}: line {number} is not a header of results, it has no {', '.join(missing)}"
                )
            if twice := [name for name, n in Counter(fields).items() if n > 1]:
                raise UserError(f"{path}: line {number} names {', '.join(twice)} twice")
            header = fields
        elif len(fields) != len(header):
            found = f"{len(fields)} fields" if fields else "an open quote"
            problems.append(f"{where}: {found} where the header has {len(header)} (torn?), skipped")
        elif "\0" in line or "\ufffd" in line:
            problems.append(f"{where}: bytes that are no text (torn?), skipped")
        else:
            rows.append(Row(dict(zip(header, fields, strict=True)), line, where))
    return rows, problems


def results_text(rows: Sequence[Row]) -> str:
    """The rows as a CSV file, LF. Rows of one schema are copied as they stand; where schemas are mixed, the
    columns are their union and each field keeps its text."""
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


@dataclass(frozen=True)
class Points:
    """The validations of one run: step, seconds of training, nats per token."""

    step: list[int]
    seconds: list[float]
    loss: list[float]
    bad: int = (
        0  # validations whose loss or time is no finite number; they are not among the points
    )

    def at_seconds(self, seconds: float) -> float:
        """The loss then, on straight lines between validations; nan outside of them."""
        return _between(self.seconds, self.loss, seconds)

    def at_step(self, step: float) -> float:
        return _between(self.step, self.loss, step)

    def reaches(self, target: float) -> tuple[float, float] | None:
        """Step and seconds at which the straight lines between validations first meet `target`; None if never."""
        for i, loss in enumerate(self.loss):
            if loss <= target:
                last = self.loss[i - 1] if i else loss
                share = (last - target) / (last - loss) if last > loss else 1.0
                there = lambda x, i=i, share=share: (
                    x[i - 1] + share * (x[i] - x[i - 1]) if i else float(x[0])
                )
                return there(self.step), there(self.seconds)
        return None


def _between(x: Sequence[float], y: Sequence[float], at: float) -> float:
    if not x or not x[0] <= at <= x[-1]:
        return NAN
    i = max(1, bisect_left(x, at))
    if x[0] == at or x[i] == x[i - 1]:
        return y[0] if x[0] == at else y[i]
    return y[i - 1] + (y[i] - y[i - 1]) * (at - x[i - 1]) / (x[i] - x[i - 1])


def read_metrics(path: Path) -> tuple[Points, int]:
    """The validations in a run's metrics.csv, in the order of steps, and how many rows were torn. A step that
    occurs twice (the run was resumed) counts as it was the last time.
    Raises UserError when the file is missing or has no step, val_loss or train_time_s column."""
    runs, torn = _read_points(path)
    return runs.get("", Points([], [], [])), torn


def read_curves(path: Path) -> tuple[dict[str, Points], int]:
    """The validations of many runs, by run id, from one file with a run_id column, and how many rows were torn.
    Raises UserError when the file is missing or has no such column."""
    runs, torn = _read_points(path)
    if "" in runs:
        raise UserError(
            f"{path}: has no column run_id; --curves takes one file with the validations of all runs"
        )
    return runs, torn


def _read_points(path: Path) -> tuple[dict[str, Points], int]:
    """Validations by run id ('' in a file without the column); train_time_s in s, or train_time_ms in ms."""
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    lines = [line for raw in text.split("\n") if (line := raw.rstrip("\r"))]
    header = lines[0].split(",") if lines else []
    clock, unit = ("train_time_ms", 1000.0) if "train_time_ms" in header else ("train_time_s", 1.0)
    if missing := [c for c in ("step", "val_loss", clock) if header and c not in header]:
        raise UserError(f"{path}: has no column {', '.join(missing)}")
    at_step, at_loss, at_time = (
        header.index(c) if header else 0 for c in ("step", "val_loss", clock)
    )
    at_run = header.index("run_id") if "run_id" in header else None
    runs: dict[str, dict[int, tuple[float, float]]] = {}
    torn = 0
    for line in lines[1:]:
        fields = line.split(",")
        if fields == header:
            continue
        try:
            if len(fields) != len(header):
                raise ValueError
            step, loss = int(fields[at_step]), fields[at_loss]
            if loss:
                seconds = (
                    fields[at_time] if step else 0
                )  # at step 0 there is no time yet, and none is written
                run = "" if at_run is None else fields[at_run]
                runs.setdefault(run, {})[step] = (float(seconds) / unit, float(loss))
        except ValueError:
            torn += 1
    return {run: _points(found) for run, found in runs.items()}, torn


def _points(found: Mapping[int, tuple[float, float]]) -> Points:
    good = sorted((step, t, loss) for step, (t, loss) in found.items() if math.isfinite(t + loss))
    return Points(
        [g[0] for g in good], [g[1] for g in good], [g[2] for g in good], len(found) - len(good)
    )


class Curves:
    """The validations of runs, read when they are first asked for: from the files given, else from
    <logs>/<run_id>/metrics.csv. What was wrong with which run stands in `problems`."""

    def __init__(self, logs: Path | None, files: Sequence[Path] = ()):
        self.known: dict[str, Points | None] = {}
        self.problems: dict[str, list[str]] = {}  # what: run ids
        self.torn: list[str] = []
        for path in files:
            runs, torn = read_curves(path)
            self.known |= runs
            self.torn += [f"{path}: {count(torn, 'torn row')} skipped"] * bool(torn)
        self.logs = logs
        try:  # one look at the folder, not one at each of 100,000 runs
            self.there = set(os.listdir(logs)) if logs else set()
        except OSError:
            self.there = set()

    def __call__(self, run_id: str) -> Points | None:
        """None where there are no validations."""
        if run_id not in self.known:
            self.known[run_id] = self._read(run_id)
        return self.known[run_id]

    def _read(self, run_id: str) -> Points | None:
        if run_id not in self.there:
            return self._problem("no curve", run_id)
        try:
            points, torn = read_metrics(self.logs / run_id / "metrics.csv")
        except UserError as error:
            return self._problem(str(error).removeprefix(f"{self.logs}/{run_id}/"), run_id)
        if torn:
            self._problem("torn rows in metrics.csv, skipped", run_id)
        if points.bad:
            self._problem("validations that are no finite number, left out of the curve", run_id)
        return points if points.step else self._problem("no validation in metrics.csv", run_id)

    def _problem(self, what: str, run_id: str) -> None:
        self.problems.setdefault(what, []).append(run_id)

    def remarks_of(self, cells: Sequence["Cell"]) -> list[str]:
        """What was wrong with the curves of these cells, and with the files."""
        wanted = {row["run_id"] for cell in cells for row in cell.rows}
        where = f" (looked in {self.logs})" if self.logs else ""
        out = list(self.torn)
        for what, runs in self.problems.items():
            if own := [run for run in runs if run in wanted]:
                out.append(
                    f"{what}: {count(len(own), 'run')}, {listing(own)}{where * (what == 'no curve')}"
                )
        return out


# ----------------------------------------------------------------------------
# Stages


USUAL = {"attn_gate": "none"}  # the baseline where none is named: train_gpt.py's


@dataclass(frozen=True)
class Stage:
    """Which rows belong together, when their own stage column does not say so, and how they are compared."""

    name: str
    match: Mapping[str, frozenset[str]] = dataclasses.field(
        default_factory=dict
    )  # column: values, as canon()
    keys: tuple[str, ...] = ()  # columns the table has even if they do not vary
    baseline: Mapping[str, str] = dataclasses.field(default_factory=lambda: USUAL)
    extra_csv: tuple[
        str, ...
    ] = ()  # files with further rows, relative to the first source's folder
    train_tokens: float = (
        NAN  # of one pass over the training shards, where rows have no column epochs
    )
    target_loss: float = NAN  # nats per token; steps and seconds to it are reported


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


def stages_by_iters(stage1: str, stage2: str) -> list[Stage]:
    """The original's rule: num_iterations alone decides. Comma lists. Raises UserError for what is no number."""
    stages = []
    for name, text in (("stage1", stage1), ("stage2", stage2)):
        values = [part.strip() for part in text.split(",") if part.strip()]
        if wrong := [v for v in values if not v.isdecimal()]:
            raise UserError(
                f"--{name}-iters {text}: {wrong[0]!r} is no number of iterations, such as 1500"
            )
        stages.append(
            Stage(name, {"num_iterations": frozenset(map(canon, values))} if values else {})
        )
    return stages


def read_stages(path: Path, rows: Sequence[Row] = ()) -> list[Stage]:
    """The stages of a TOML file, one table [stage.NAME] each: conditions COLUMN = value or [values], all of which
    a row must meet, and the words keys, baseline, extra_csv, train_tokens and target_loss, which are no columns.
    Columns are those of train_gpt.py and of `rows`.
    Raises UserError naming stage and word for whatever does not fit, and on Python 3.10, which has no tomllib."""
    try:
        import tomllib
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        raise UserError(
            f"--stages {path} needs Python 3.11 or later (tomllib), this is {version}; "
            f"without it, --stage1-iters and --stage2-iters sort the rows"
        ) from None
    try:
        tables = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not TOML, or not text
        raise UserError(f"{path}: {error}") from None
    if tables.keys() != {"stage"} or not isinstance(tables["stage"], dict) or not tables["stage"]:
        raise UserError(
            f"{path}: expected tables [stage.NAME] and nothing else, found {sorted(tables)}"
        )
    columns = list(
        dict.fromkeys(
            [*HEADER, *(c for own in dict.fromkeys(r.columns for r in rows) for c in own)]
        )
    )
    return [
        _read_stage(f"{path}: [stage.{name}]", name, table, columns)
        for name, table in tables["stage"].items()
    ]


def _read_stage(where: str, name: str, table: object, columns: Sequence[str]) -> Stage:
    if not isinstance(table, dict) or not _file_name(name):
        raise UserError(
            f"{where}: expected a table named in letters, digits, '_', '.', '-'; it names the files"
        )

    def column(word: str) -> str:
        if word not in columns:
            words = ("keys", "baseline", "extra_csv", "train_tokens", "target_loss")
            near = get_close_matches(word, [*columns, *words], n=1)
            raise UserError(
                f"{where}: {word} is no column" + (f"; did you mean {near[0]}?" if near else "")
            )
        return word

    def listed(word: str, value: object) -> list:
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, str | int | float) for v in values):
            raise UserError(f"{where}: {word} = {value!r}: expected a value or a list of values")
        return values

    def positive(word: str) -> float:
        value = words.pop(word, NAN)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{where}: {word} = {value!r}: expected a number above 0")
        return float(value)

    words = dict(table)
    numbers = [positive(word) for word in ("train_tokens", "target_loss")]
    keys = (
        tuple(column(str(v)) for v in listed("keys", words.pop("keys"))) if "keys" in words else ()
    )
    extra = (
        tuple(str(v) for v in listed("extra_csv", words.pop("extra_csv")))
        if "extra_csv" in words
        else ()
    )
    baseline = words.pop("baseline", USUAL)
    if (
        not isinstance(baseline, dict)
        or not baseline
        or any(isinstance(v, list) for v in baseline.values())
    ):
        raise UserError(
            f'{where}: baseline = {baseline!r}: expected one value per column: {{attn_gate = "none"}}'
        )
    match = {
        column(word): frozenset(canon(v) for v in listed(word, value))
        for word, value in words.items()
    }
    return Stage(
        name, match, keys, {column(w): canon(v) for w, v in baseline.items()}, extra, *numbers
    )


def _file_name(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,80}", name, re.ASCII) is not None


def meets(row: Row, stage: Stage) -> bool:
    return all(canon(row[column]) in values for column, values in stage.match.items())


def sort_into_stages(
    rows: Sequence[Row], stages: Sequence[Stage]
) -> tuple[dict[str, tuple[Stage, list[Row]]], list[Row]]:
    """The rows of each stage, and those of none. A row's own stage column decides; where it is empty, every stage
    whose conditions the row meets gets it (as in the original). Stages without conditions get rows by name only."""
    sorted_rows = {stage.name: (stage, []) for stage in stages}
    homeless = []
    for row in rows:
        if row["stage"]:
            names = [row["stage"]] if _file_name(row["stage"]) else []
        else:
            names = [stage.name for stage in stages if stage.match and meets(row, stage)]
        for name in names:
            sorted_rows.setdefault(name, (Stage(name), []))[1].append(row)
        if not names:
            homeless.append(row)
    return sorted_rows, homeless


# ----------------------------------------------------------------------------
# Cells


KEYS = (
    "attn_gate gate_pos gate_act learning_rate num_iterations warmup_iters warmdown_iters batch_size "
    "sequence_length notes"
).split()
NOT_A_KEY = (
    "run_id",
    "date",
    "git_commit",
    "seed",
    "device_batch_size",
)  # though they stand before the outcome
OF_THE_GATE = ("gate_pos", "gate_act")  # recorded for attn_gate=none too, and mean nothing there
GATE_KNOBS = ("GATEOPT", "MLP_MATCH")  # likewise, in the notes


def keys_of(rows: Sequence[Row]) -> list[str]:
    """The columns that tell configurations apart: KEYS, behind what another trainer's file has of its own between seed
    and final_val_loss. A trainer's further outcomes stand behind final_val_loss."""
    own: dict[str, None] = {}
    for columns in dict.fromkeys(row.columns for row in rows):
        known = columns[: columns.index("final_val_loss")] if "final_val_loss" in columns else ()
        own |= dict.fromkeys(c for c in known if c not in HEADER and c not in NOT_A_KEY)
    return [*own, *KEYS]


def fitted(stage: Stage, rows: Sequence[Row]) -> Stage:
    """The stage as it goes with these rows: without the usual baseline where they have no such column."""
    if stage.baseline == USUAL and rows and not any("attn_gate" in row.columns for row in rows):
        return dataclasses.replace(stage, baseline={})
    return stage


def knobs_in(notes: str) -> list[str]:
    """NAME=value of the notes. Names in small letters are outcomes (reached_step=...), which are no configuration."""
    return [word for word in notes.split() if not re.match(r"[a-z_]+=", word)]


def key_value(row: Row, key: str) -> str:
    """What tells cells apart: '-' for a gate's knob where there is no gate, '' where the file does not say."""
    ungated = row["attn_gate"] == "none"
    if key in OF_THE_GATE and ungated:
        return "-"
    return _configuration(row["notes"], ungated) if key == "notes" else canon(row[key])


@lru_cache(maxsize=100_000)
def _configuration(notes: str, ungated: bool) -> str:
    return " ".join(w for w in knobs_in(notes) if not (ungated and w.split("=")[0] in GATE_KNOBS))


@dataclass(frozen=True)
class Cell:
    """The finished rows of one configuration."""

    key: Mapping[str, str]
    rows: tuple[Row, ...]

    @cached_property
    def by_seed(self) -> dict[str, list[Row]]:
        seeds: dict[str, list[Row]] = {}
        for row in self.rows:
            seeds.setdefault(canon(row["seed"]), []).append(row)
        return seeds

    def values(self, column: str) -> dict[str, float]:
        """One value per seed; see per_seed."""
        if column not in self._values:
            self._values[column] = self.per_seed(lambda row: row.number(column))
        return self._values[column]

    def per_seed(self, value: Callable[[Row], float]) -> dict[str, float]:
        """One value per seed. A seed with several finished rows counts once, with their mean: to choose one of
        them would be a way to choose the result. Rows without a finite value do not count."""
        found = {
            seed: [v for row in rows if math.isfinite(v := value(row))]
            for seed, rows in self.by_seed.items()
        }
        return {seed: mean(values) for seed, values in found.items() if values}

    @cached_property
    def _values(self) -> dict[str, dict[str, float]]:
        return {}

    @cached_property
    def reaches(self) -> dict[float, "Reach"]:
        """What reach() has found, by target."""
        return {}

    @cached_property
    def steps(self) -> frozenset[float]:
        return frozenset(steps_of(row) for row in self.rows)

    @cached_property
    def label(self) -> str:
        return " ".join(
            f"{k}={v}" if k != "notes" else v for k, v in self.key.items() if v not in ("", "-")
        )


def make_cells(rows: Sequence[Row], stage: Stage) -> list[Cell]:
    """Finished rows by configuration: attn_gate, the stage's own keys, and every key that varies; baseline cells
    first. What is not known (an empty field, except notes) does not make a key vary."""
    stage, known = fitted(stage, rows), keys_of(rows)
    usual = USUAL if not rows or any("attn_gate" in row.columns for row in rows) else {}
    always = {*usual, *stage.keys, *stage.baseline}
    found = {
        key: {key_value(row, key) for row in rows} - ({"-"} if key == "notes" else {"-", ""})
        for key in known
    }
    keys = [key for key in known if key in always or len(found[key]) > 1] + sorted(
        always - set(known)
    )
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(key_value(row, key) for key in keys), []).append(row)
    cells = [Cell(dict(zip(keys, key, strict=True)), tuple(group)) for key, group in groups.items()]
    return sorted(
        cells, key=lambda c: (not is_baseline(c, stage), [_natural(v) for v in c.key.values()])
    )


def _natural(text: str) -> tuple[bool, float, str]:
    """Sorts numbers as numbers, before words."""
    number = _number(text)
    return (True, 0.0, text) if math.isnan(number) else (False, number, "")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return NAN


def is_baseline(cell: Cell, stage: Stage) -> bool:
    return bool(stage.baseline) and all(
        cell.key[column] == value for column, value in stage.baseline.items()
    )


def find_baseline(cell: Cell, cells: Sequence[Cell], stage: Stage) -> Cell | None:
    """The baseline cell that agrees with `cell` in every key that neither defines the baseline nor belongs to the
    gate alone; None if there is none."""
    return find_baselines([cell], cells, stage)[0]


def find_baselines(cells: Sequence[Cell], among: Sequence[Cell], stage: Stage) -> list[Cell | None]:
    """find_baseline for each of `cells`."""

    def rest(c: Cell, ungated: bool) -> tuple:
        ignored = {*stage.baseline, *(OF_THE_GATE if ungated else ())}
        key = {k: v for k, v in c.key.items() if k not in ignored}
        if "notes" in key:
            key["notes"] = _configuration(key["notes"], ungated)
        return ungated, *key.items()

    known: dict[tuple, Cell] = {}
    for b in among:
        if is_baseline(b, stage):
            for ungated in (True, False):
                known.setdefault(rest(b, ungated), b)
    return [
        known.get(rest(c, "none" in (stage.baseline.get("attn_gate"), c.key.get("attn_gate"))))
        for c in cells
    ]


# ----------------------------------------------------------------------------
# Comparisons


NO_TEST, NO_RATIO = Judged(), Ratio()


@dataclass(frozen=True)
class Effect:
    """A difference in loss at equal steps or at equal time, and where its losses come from."""

    judged: Judged = NO_TEST
    how: str = ""


NO_EFFECT = Effect()


@dataclass(frozen=True)
class Reach:
    """Optimizer steps and seconds of training to the target loss, by seed; runs that never reach it have none."""

    steps: Mapping[str, float]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Comparison(Judged):
    """A cell against its baseline. Differences are cell minus baseline: losses in nats per token, below 0 is better;
    a ratio is in % of the baseline's mean."""

    rel_pct: float = NAN  # of the baseline's mean loss
    step_time: Ratio = NO_RATIO
    memory_mib: float = NAN  # peak of one rank
    memory_pct: float = NAN
    equal_steps: Effect = NO_EFFECT
    equal_time: Effect = NO_EFFECT
    steps_to: Ratio = NO_RATIO  # the target; over the runs that reach it
    seconds_to: Ratio = NO_RATIO
    p_holm: float = NAN

    @property
    def overhead_pct(self) -> float:
        return self.step_time.pct

    @property
    def least(self) -> float:
        """The smallest difference that so many seeds, spread as these are, show at 80% power; nan without a test."""
        return self.chosen.least if self.chosen else NAN


def compare(
    cell: Cell,
    baseline: Cell,
    curves: Curves | None = None,
    target: float = NAN,
    timed: tuple[str, Cell, Cell] | None = None,
) -> Comparison:
    """`cell` minus `baseline`. `timed`: how long, and both again in runs of that training time (TIME_BUDGET_S)."""
    loss = judge(cell.values("final_val_loss"), baseline.values("final_val_loss"))
    values = lambda column: [list(c.values(column).values()) for c in (cell, baseline)]
    base = mean(values("final_val_loss")[1])
    memory, base_memory = map(mean, values("peak_memory_mib"))
    reached = [reach(c, curves, target) for c in (cell, baseline)]
    return Comparison(
        **vars(loss),
        rel_pct=100 * loss.diff / base if base else NAN,
        step_time=ratio(*values("ms_per_step")),
        memory_mib=memory - base_memory,
        memory_pct=100 * (memory / base_memory - 1) if base_memory > 0 else NAN,
        equal_steps=equal_steps(cell, baseline, curves),
        equal_time=equal_time(cell, baseline, curves, timed),
        steps_to=ratio(*(list(r.steps.values()) for r in reached)),
        seconds_to=ratio(*(list(r.seconds.values()) for r in reached)),
    )


def steps_of(row: Row) -> float:
    """Optimizer steps done; those planned where the file does not say."""
    return row.number("steps_done" if row["steps_done"] else "num_iterations")


def equal_steps(cell: Cell, baseline: Cell, curves: Curves | None) -> Effect:
    """The difference after as many steps as the shortest run did; from curves where the runs differ in steps."""
    steps = cell.steps | baseline.steps
    fewest = min(steps)
    if len(steps) == 1 or not curves:
        both = (cell.values("final_val_loss"), baseline.values("final_val_loss"))
        return Effect(judge(*both), "final losses") if len(steps) == 1 else Effect()

    def loss(row: Row) -> float:
        if steps_of(row) == fewest:
            return row.number("final_val_loss")
        return points.at_step(fewest) if (points := curves(row["run_id"])) else NAN

    found = judge(cell.per_seed(loss), baseline.per_seed(loss))
    return Effect(found, f"interpolated at step {fewest:.0f}, un-annealed" if found.test else "")


def equal_time(
    cell: Cell, baseline: Cell, curves: Curves | None, timed: tuple[str, Cell, Cell] | None = None
) -> Effect:
    """The difference after equal training time: real runs of equal time where there are any; else the slower arm's
    curves at the time at which the faster arm ends, on average. The latter's rate has not come down yet there, so it
    makes the slower arm look worse than a schedule of its own would."""
    budgets = {time_budget(c) for c in (cell, baseline)}
    if len(budgets) == 1 and "" not in budgets:
        timed = (*budgets, cell, baseline)
    if timed:
        both = [c.values("final_val_loss") for c in timed[1:]]
        return Effect(judge(*both), f"runs of TIME_BUDGET_S={timed[0]}")
    times = [mean(list(c.values("train_time_ms").values())) / 1000 for c in (cell, baseline)]
    if not curves or not math.isfinite(sum(times)):
        return Effect()
    end, slower = min(times), cell if times[0] > times[1] else baseline

    def loss(row: Row) -> float:
        if not (points := curves(row["run_id"])):
            return NAN
        if points.seconds[-1] < end and points.step[-1] >= steps_of(row):
            return row.number("final_val_loss")  # this run ended before: by the noise of a clock
        return points.at_seconds(end)

    then, final = (
        slower.per_seed(loss),
        (baseline if slower is cell else cell).values("final_val_loss"),
    )
    found = judge(then, final) if slower is cell else judge(final, then)
    missing = len(slower.by_seed) - len(then)
    part = f" from {len(then)} of {len(slower.by_seed)} seeds" if missing else ""
    return Effect(found, f"interpolated{part}, un-annealed" if found.test else "")


def time_budget(cell: Cell) -> str:
    """The training seconds of its TIME_BUDGET_S, '' without one. In what no key tells apart, the rows agree."""
    return next(
        (
            w.split("=", 1)[1]
            for w in knobs_in(cell.rows[0]["notes"])
            if w.startswith("TIME_BUDGET_S=")
        ),
        "",
    )


def timed_pairs(
    cells: Sequence[Cell], pairs: Sequence[tuple[Cell, Cell | None]]
) -> list[tuple[str, Cell, Cell] | None]:
    """For each cell and baseline without a time budget: the two that differ from them in nothing but a common one,
    the budget nearest to the faster arm's own training time; None if there are none."""

    known_keys = keys_of([c.rows[0] for c in cells])

    def rest(c: Cell) -> tuple:
        values = [key_value(c.rows[0], key) for key in known_keys if key != "notes"]
        notes = key_value(c.rows[0], "notes").split()
        return *values, *(w for w in notes if not w.startswith("TIME_BUDGET_S="))

    known: dict[tuple, dict[str, Cell]] = {}
    for c in cells:
        if budget := time_budget(c):
            known.setdefault(rest(c), {})[budget] = c
    out: list[tuple[str, Cell, Cell] | None] = []
    for cell, base in pairs:
        both = [
            known.get(rest(c), {}) if known and not time_budget(c) else {}
            for c in (cell, base)
            if c
        ]
        common = sorted(set(both[0]) & set(both[-1])) if len(both) == 2 else []
        if not common:
            out.append(None)
            continue
        own = min(mean(list(c.values("train_time_ms").values())) / 1000 for c in (cell, base))
        budget = min(common, key=lambda b: abs(_number(b) - own))
        out.append((budget, both[0][budget], both[1][budget]))
    return out


def reach(cell: Cell, curves: Curves | None, target: float) -> Reach:
    """From the curves; without a target, from the notes: the first validation at or below the TARGET_LOSS that the
    run itself had."""

    if target in cell.reaches:
        return cell.reaches[target]

    def found(row: Row) -> tuple[float, float]:
        if math.isfinite(target):
            points = curves(row["run_id"]) if curves else None
            return (points.reaches(target) if points else None) or (NAN, NAN)
        told = re.search(r"\breached_step=(\d+) reached_ms=(\d+)\b", row["notes"])
        return (float(told[1]), float(told[2]) / 1000) if told else (NAN, NAN)

    if math.isnan(target) and not any("reached_step=" in row["notes"] for row in cell.rows):
        cell.reaches[target] = Reach({}, {})
    else:
        both = {id(row): found(row) for row in cell.rows}
        steps, seconds = (cell.per_seed(lambda row, i=i: both[id(row)][i]) for i in (0, 1))
        cell.reaches[target] = Reach(steps, seconds)
    return cell.reaches[target]


def epochs_of(row: Row, stage: Stage) -> float:
    """Passes over the training shards: the row's own, else from the stage's train_tokens; nan if neither says."""
    if row["epochs"] or not math.isfinite(stage.train_tokens):
        return row.number("epochs")
    tokens = steps_of(row) * row.number("batch_size") * row.number("sequence_length")
    return (row.number("tokens_seen") if row["tokens_seen"] else tokens) / stage.train_tokens


MIXED = {  # column: its flag, why it matters
    "gpu_name": ("gpu", "times do not compare"),
    "n_gpus": ("gpus", "times do not compare"),
    "torch": ("torch", "a difference may come from it"),
    "code_sha256": ("code", "a difference may come from it"),
}


FACTS = (*MIXED, "epochs", "pass", "schedule")


def facts_of(cell: Cell, stage: Stage) -> tuple[frozenset, ...]:
    """What should be the same in all rows of a comparison, and what should not be at all; of one cell. What a file
    does not say is not held against it. One set of values for each name of FACTS."""
    found: dict[str, set] = {name: set() for name in FACTS}
    for row in cell.rows:
        for column in MIXED:
            found[column].add(row[column][:40])
        if math.isfinite(epochs := epochs_of(row, stage)):
            found["epochs"].add(round(epochs, 2))
            found["pass"].add(steps_of(row) / epochs if epochs else NAN)
        warmup, warmdown = (
            (row.number(c) if row[c] else 0.0) for c in ("warmup_iters", "warmdown_iters")
        )
        if warmup + warmdown > row.number("num_iterations"):
            warm = f"warmup {canon(warmup)} + " if row["warmup_iters"] else ""
            found["schedule"].add(
                f"{warm}warmdown {canon(warmdown)} > {canon(row['num_iterations'])} iterations"
            )
    return tuple(frozenset(values - {""}) for values in found.values())


@lru_cache(maxsize=4096)  # most cells of a stage have the same facts
def problems_of(*facts: tuple[frozenset, ...]) -> Mapping[str, str]:
    """What is wrong with a cell alone, or with a cell and its baseline together: flag, sentence."""
    every = {
        name: sorted(frozenset().union(*values))
        for name, *values in zip(FACTS, *facts, strict=True)
    }
    found = {}
    for column, (flag, why) in MIXED.items():
        if len(values := every[column]) > 1:
            short = [v[:12] if column == "code_sha256" else v for v in values]
            found[flag] = f"mixed {column}, {why}: {listing(short)}"
    if passes := every["epochs"]:
        # runs of other lengths read the same data as far as they go, as long as none starts over
        same = passes[-1] <= 1 and every["pass"][-1] <= 1.05 * every["pass"][0]
        if len(passes) > 1 and not same:
            found["epochs"] = (
                f"mixed epochs, the data differ: {listing([f'{e:.2f}' for e in passes])}"
            )
        if passes[-1] > 1:
            found["repeats"] = f"training data read more than once: {passes[-1]:.2f} epochs"
    if every["schedule"]:
        found["schedule"] = (
            f"schedule does not fit: {listing(every['schedule'], '; ')}; the learning rate never stayed at its peak"
        )
    return found


# ----------------------------------------------------------------------------
# Tables


@dataclass(frozen=True)
class Line:
    """One line of a table: a cell, its baseline if it has one, and how they compare."""

    cell: Cell
    baseline: Cell | None
    comparison: Comparison | None
    is_baseline: bool
    flags: tuple[str, ...] = ()  # what is wrong with the two, in a word each; the remarks say more
    reach: Reach = Reach({}, {})
    target: float = NAN

    @cached_property
    def numbers(self) -> dict[str, object]:
        return numbers_of(self)


@dataclass(frozen=True)
class Table:
    """One stage: its lines, and what a reader has to know about them."""

    stage: Stage
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]
    num_rows: int
    num_finished: int

    @property
    def keys(self) -> list[str]:
        return list(self.lines[0].cell.key) if self.lines else []


def make_table(
    rows: Sequence[Row], stage: Stage, curves: Curves | None = None, target: float | None = None
) -> Table:
    """Cells, comparisons and remarks of a stage's rows. Only finished rows with a finite loss count; the remarks
    name all others. `target` in nats per token, else the stage's."""
    counted = [
        r for r in rows if r.status == "finished" and math.isfinite(r.number("final_val_loss"))
    ]
    stage = fitted(stage, rows)
    cells = make_cells(counted, stage)
    bases = [
        None if is_baseline(c, stage) else b
        for c, b in zip(cells, find_baselines(cells, cells, stage), strict=True)
    ]
    table = table_of(rows, list(zip(cells, bases, strict=True)), cells, stage, curves, target)
    if not stage.baseline and len(cells) > 1:
        remark = "nothing is compared: no baseline is named; --stages FILE names one, and run_study.py writes such a FILE"
        return dataclasses.replace(table, remarks=(*table.remarks, remark))
    if orphans := [
        line.cell.label for line in table.lines if not line.is_baseline and not line.baseline
    ]:
        remark = f"no baseline (a cell that differs in nothing else) for: {listing(orphans, '; ')}"
        table = dataclasses.replace(table, remarks=(*table.remarks, remark))
    return table


def table_of(
    rows: Sequence[Row],
    pairs: Sequence[tuple[Cell, Cell | None]],
    cells: Sequence[Cell],
    stage: Stage,
    curves: Curves | None,
    target: float | None,
) -> Table:
    """The table of these cells, each beside its baseline. `rows`: all there are, counted or not; `cells`: where runs
    of equal time may be found."""
    target = stage.target_loss if target is None else target
    counted = [row for cell, _ in pairs for row in cell.rows]
    timed = timed_pairs(cells, pairs)
    compared = [
        compare(c, b, curves, target, t) if b else None
        for (c, b), t in zip(pairs, timed, strict=True)
    ]
    tested = [i for i, c in enumerate(compared) if c and c.chosen]
    for i, p in zip(tested, holm([compared[i].chosen.p for i in tested]), strict=True):
        compared[i] = dataclasses.replace(compared[i], p_holm=p)
    facts = {
        i: facts_of(c, stage) for i, c in {id(c): c for both in pairs for c in both if c}.items()
    }
    lines = []
    for (cell, base), found in zip(pairs, compared, strict=True):
        wrong = problems_of(*(facts[id(c)] for c in (cell, base) if c))
        reached = reach(cell, curves, target)
        lines.append(
            Line(cell, base, found, is_baseline(cell, stage), tuple(wrong), reached, target)
        )
    remarks = [*_remarks(rows, counted, lines), *_problems(lines, facts)]
    remarks += curves.remarks_of([cell for cell, _ in pairs]) if curves else []
    return Table(stage, tuple(lines), tuple(remarks), len(rows), len(counted))


def _remarks(rows: Sequence[Row], counted: Sequence[Row], lines: Sequence[Line]) -> Iterable[str]:
    finished = {row["run_id"] for row in counted}
    rest: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "finished":
            later = " (finished later)" if row["run_id"] in finished else ""
            rest.setdefault(row.status, []).append(row["run_id"] + later)
        elif not math.isfinite(row.number("final_val_loss")):
            rest.setdefault("finished without a loss", []).append(row["run_id"])
    for status, runs in sorted(rest.items()):
        yield f"not counted: {len(runs)} {status}: {listing(runs)}"
    twice = []
    for line in lines:
        for seed, same in line.cell.by_seed.items():
            if len(same) > 1:
                runs = listing([r["run_id"] for r in same])
                times = f"seed {seed} finished {len(same)} times ({runs})"
                twice.append(f"* {line.cell.label}: {times}; it counts once, with the mean")
    yield from twice[:20]
    if len(twice) > 20:
        yield f"* and {len(twice) - 20} more seeds that finished more than once"


def _problems(lines: Sequence[Line], facts: Mapping[int, tuple[frozenset, ...]]) -> Iterable[str]:
    """What the flags mean: mixtures of a comparison, and what is wrong with a cell itself; which cells share it."""
    found: dict[str, list[str]] = {}
    for line in lines:
        own = problems_of(facts[id(line.cell)])
        both = problems_of(*(facts[id(c)] for c in (line.cell, line.baseline) if c))
        for flag, what in both.items():
            if what.startswith("mixed") or flag in own:
                found.setdefault(what if what.startswith("mixed") else own[flag], []).append(
                    line.cell.label
                )
    for what, labels in found.items():
        whose = "all cells" if len(labels) == len(lines) > 1 else f"in {listing(labels, '; ')}"
        yield f"{what} ({whose})"


def hardware_changes(tables: Sequence[Table]) -> list[Table]:
    """The tables, each with a remark where its GPUs are not those of the one before: times do not compare then."""
    out: list[Table] = []
    for table in tables:
        names = lambda t: sorted(
            {row["gpu_name"] for line in t.lines for row in line.cell.rows} - {""}
        )
        before = next((t for t in reversed(out) if names(t)), None)
        if before and names(table) and names(table) != names(before):
            what = f"{listing(names(before))} in {before.stage.name}, {listing(names(table))} here"
            remark = f"hardware changes between stages: {what}; times of the two do not compare"
            table = dataclasses.replace(table, remarks=(*table.remarks, remark))
        out.append(table)
    return out


def listing(names: Sequence[str], separator: str = ", ", most: int = 6) -> str:
    """The first few names, and how many more."""
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def show_ms(ms: float) -> str:
    """Training time as `10m 9.1s`: whole minutes, then seconds with one decimal; hours are minutes too, as in
    the original. 'NA' for nan. Seconds that round to 60.0 carry into the minute."""
    if not math.isfinite(ms):
        return "NA"
    minutes, tenths = divmod(round(ms / 100), 600)
    return f"{minutes}m {tenths // 10}.{tenths % 10}s"


def numbers_of(line: Line) -> dict[str, object]:
    """All a table knows about a line, at full precision; nan is ''."""
    values = lambda column: list(line.cell.values(column).values())
    losses = values("final_val_loss")
    out: dict[str, object] = dict(seeds=len(losses), final_loss=mean(losses), sd=sd(losses))
    ms = mean(values("train_time_ms"))
    out |= dict(train_time=show_ms(ms), train_time_ms=ms, ms_per_step=mean(values("ms_per_step")))
    base = (
        "is the baseline"
        if line.is_baseline
        else line.baseline.label
        if line.baseline
        else "no baseline"
    )
    out |= dict(
        baseline=base,
        baseline_seeds=len(line.baseline.values("final_val_loss")) if line.baseline else "",
    )
    c = line.comparison or Comparison()
    interval = lambda name, t: {
        f"{name}ci_lo": t.lo if t else NAN,
        f"{name}ci_hi": t.hi if t else NAN,
    }
    p_of = lambda judged: judged.chosen.p if judged.chosen else NAN
    out |= dict(diff=c.diff, rel_pct=c.rel_pct) | interval("", c.chosen)
    out |= dict(p=p_of(c), p_holm=c.p_holm, test=c.test, least_diff=c.least)
    for name, r in dict(
        overhead=c.step_time, steps_to_target=c.steps_to, seconds_to_target=c.seconds_to
    ).items():
        out |= {f"{name}_pct": r.pct, f"{name}_ci_lo": r.lo, f"{name}_ci_hi": r.hi}
    out |= dict(per_seed_diff=" ".join(map(repr, c.per_seed)), sd_diff=c.sd_diff)
    for name in ("welch", "paired"):
        for part, suffix in dict(t="t", df="df", p="p", lo="ci_lo", hi="ci_hi").items():
            out[f"{name}_{suffix}"] = getattr(getattr(c, name), part, NAN)
    for name, effect in dict(equal_steps=c.equal_steps, equal_time=c.equal_time).items():
        j = effect.judged
        out |= {f"{name}_diff": j.diff} | interval(f"{name}_", j.chosen)
        out |= {f"{name}_p": p_of(j), f"{name}_test": j.test, f"{name}_how": effect.how}
    reached = [list(v.values()) for v in (line.reach.steps, line.reach.seconds)]
    out |= dict(target_loss=line.target, reached=len(reached[0]))
    out |= dict(steps_to_target=mean(reached[0]), seconds_to_target=mean(reached[1]))
    out |= dict(
        peak_memory_mib=mean(values("peak_memory_mib")),
        memory_mib=c.memory_mib,
        memory_pct=c.memory_pct,
    )
    out |= dict(
        duplicate_rows=len(line.cell.rows) - len(line.cell.by_seed), flags=" ".join(line.flags)
    )
    return {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in out.items()}


def table_csv(table: Table) -> str:
    """The table for programs: one line per cell, numbers at full precision, both tests. A header even without
    lines, so that a reader finds its columns."""
    lines = [{**line.cell.key, **line.numbers} for line in table.lines]
    columns = list(lines[0]) if lines else ["attn_gate", "seeds", "final_loss", "train_time"]
    return "".join(
        f"{csv_line(row)}\n" for row in [columns, *([line[c] for c in columns] for line in lines)]
    )


MEANS = ("n", "final_loss", "sd", "train_time", "ms/step", "MiB")
VERSUS = ("diff", "rel", "95% CI", "p", "Holm p", "test", "can see", "flags")
COSTS = ("step time", "peak memory", "equal steps", "equal time", "equal time by")
TARGET = ("reached", "steps", "time", "steps vs", "time vs")
PIECES = {
    "": MEANS,
    "against the baseline": VERSUS,
    "time and memory": COSTS,
    "to the target loss": TARGET,
}


def cells_of(table: Table, most: int | None = None) -> list[dict[str, str]]:
    """The table for eyes: one dict per line (at `most` so many), rounded. The knobs that all cells share are left
    out of the notes."""
    common = shared_notes(table)
    shown = []
    for line in table.lines[:most]:
        key = {k: v or ("?" if k != "notes" else "-") for k, v in line.cell.key.items()}
        if key.get("notes"):
            key["notes"] = " ".join(w for w in key["notes"].split() if w not in common) or "-"
        n, c = line.numbers, line.comparison
        no_diff = "baseline" if line.is_baseline else "no baseline"
        span = lambda name, form, n=n: (
            "[" + ", ".join(form.format(n[f"{name}ci_{end}"]) for end in ("lo", "hi")) + "]"
        )
        percent = lambda name, n=n, span=span: (
            rounded(n, f"{name}_pct", "{:+.1f}%")
            + (" " + span(f"{name}_", "{:+.1f}") if n[f"{name}_ci_lo"] != "" else "")
        )
        effect = lambda name, n=n, span=span: (
            rounded(n, f"{name}_diff", "{:+.4f}")
            + (" " + span(f"{name}_", "{:+.4f}") if n[f"{name}_ci_lo"] != "" else "")
        )
        out = {**key, "n": f"{n['seeds']}{'*' * (n['duplicate_rows'] > 0)}"}
        out |= {"final_loss": rounded(n, "final_loss", "{:.4f}")}
        out |= {"sd": rounded(n, "sd", "{:.5f}") if n["seeds"] > 1 else "n=1"}
        out |= {"train_time": str(n["train_time"]), "ms/step": rounded(n, "ms_per_step", "{:.2f}")}
        out |= {"MiB": rounded(n, "peak_memory_mib", "{:.0f}")}
        out |= {
            "diff": rounded(n, "diff", "{:+.4f}") if c else no_diff,
            "rel": rounded(n, "rel_pct", "{:+.2f}%"),
        }
        out |= {"95% CI": span("", "{:+.4f}") if c and c.chosen else c.test if c else "-"}
        out |= {"p": rounded(n, "p", "{:.2g}"), "Holm p": rounded(n, "p_holm", "{:.2g}")}
        out |= {
            "test": c.test if c and c.chosen else "-",
            "can see": rounded(n, "least_diff", "{:.4f}"),
        }
        out |= {"flags": str(n["flags"]) or "-", "step time": percent("overhead")}
        out |= {"peak memory": rounded(n, "memory_pct", "{:+.1f}%")}
        # after as many steps as both have, the final losses are the answer, and stand under diff
        out |= {
            "equal steps": effect("equal_steps")
            if c and c.equal_steps.how != "final losses"
            else "-"
        }
        out |= {
            "equal time": effect("equal_time"),
            "equal time by": str(n["equal_time_how"]) or "-",
        }
        told = math.isfinite(line.target) or n["reached"]
        out |= {"reached": f"{n['reached']} of {n['seeds']}" if told else "-"}
        out |= {
            "steps": rounded(n, "steps_to_target", "{:.0f}"),
            "time": rounded(n, "seconds_to_target", "{:.1f} s"),
        }
        out |= {"steps vs": percent("steps_to_target"), "time vs": percent("seconds_to_target")}
        shown.append(out)
    return shown


def rounded(numbers: Mapping[str, object], name: str, form: str) -> str:
    return "-" if numbers[name] == "" else form.format(numbers[name])


def shared_notes(table: Table) -> list[str]:
    notes = [line.cell.key.get("notes", "").split() for line in table.lines]
    return [w for w in notes[0] if all(w in other for other in notes)] if len(notes) > 1 else []


def pieces_of(
    shown: Sequence[Mapping[str, str]], table: Table
) -> list[tuple[str, list[str], list[Mapping[str, str]]]]:
    """Title, columns and lines of each piece of the table. What no line knows is left out."""
    out = []
    num_tested = sum(1 for line in table.lines if line.comparison and line.comparison.chosen)
    always = {"p", "test", "sd", "ms/step", *(["Holm p"] if num_tested > 1 else [])}
    for title, columns in PIECES.items():
        rows = [
            row
            for row, x in zip(shown, table.lines, strict=False)
            if x.comparison or columns in (MEANS, TARGET)
        ]
        known = {c for c in columns if c != "Holm p" and any(row[c] != "-" for row in rows)}
        if known and rows:
            out.append((title, [c for c in columns if c in known | always], rows))
    return out


def legend_of(table: Table) -> list[str]:
    """What the columns mean, the remarks, and the knobs left out."""
    compared = [line.comparison for line in table.lines if line.comparison]
    num_tested = sum(1 for c in compared if c.chosen)
    out = []
    if compared:
        out.append(
            "final_loss in nats per token, mean over n seeds; diff, rel, CI and p: against the baseline, below 0 is "
            "better; paired t where both ran the same seeds, Welch's t otherwise"
            + (f"; Holm over {num_tested} comparisons" if num_tested > 1 else "")
            + (
                "; can see: the smallest difference that this n and spread show 4 times in 5"
                if num_tested
                else ""
            )
        )
        out.append(
            "step time, and steps and time to a target: ratios of means, [95% CI] by Welch's t on logarithms"
        )
    if any(c.equal_time.how.startswith("interpolated") for c in compared):
        out.append(
            "equal time, interpolated, un-annealed: the slower arm's curve where the faster arm ends, its rate not yet "
            "down; only runs with TIME_BUDGET_S show who wins"
        )
    if any(line.numbers["reached"] for line in table.lines):
        targets = {line.target for line in table.lines}
        by = (
            "on straight lines between validations"
            if math.isfinite(min(targets))
            else "the first validation there"
        )
        out.append(
            f"target loss {', '.join(canon(t) for t in targets)}: {by}".replace(
                "loss nan", "loss of each run"
            )
        )
    if common := shared_notes(table):
        out.append(f"all cells: {' '.join(common)}")
    return out + list(table.remarks)


def grid(
    rows: Sequence[Mapping[str, str]], columns: Sequence[str], most: int, numbers: bool = False
) -> list[str]:
    """Aligned plain text; numbers to the right, words to the left. Words longer than `most` characters are folded,
    and so are intervals where `numbers` says so."""
    right = {
        c: all(re.match(r"[-+\[]?[\d.]|-$|n=1$|no spread$|(no )?baseline$", row[c]) for row in rows)
        for c in columns
    }

    def fold(text: str, c: str) -> list[str]:
        if len(text) <= most or (right[c] and not numbers):
            return [text]
        return textwrap.wrap(text, most, break_on_hyphens=False)

    folded = [{c: fold(row[c], c) for c in columns} for row in rows]
    width = {c: max([len(c), *(len(part) for row in folded for part in row[c])]) for c in columns}
    place = lambda text, c: text.rjust(width[c]) if right[c] else text.ljust(width[c])
    out = [
        "  ".join(place(c, c) for c in columns).rstrip(),
        "  ".join("-" * width[c] for c in columns),
    ]
    for row in folded:
        for i in range(max(len(parts) for parts in row.values())):
            out.append(
                "  ".join(place((row[c][i : i + 1] or [""])[0], c) for c in columns).rstrip()
            )
    return out


def table_text(table: Table, width: int = 110, most: int = 500) -> str:
    """The table for a terminal of `width` characters, in pieces: means, comparisons, costs, the target loss. Cells
    whose keys do not fit are numbered, with a list of what they are. No more than `most` cells."""
    heading = f"{table.stage.name}: {count(table.num_rows, 'row')}, {table.num_finished} counted, "
    out = [heading + count(len(table.lines), "cell")]
    numbered = [{"cell": str(i), **row} for i, row in enumerate(cells_of(table, most), start=1)]
    pieces = pieces_of(numbered, table)

    def fitting(keys: Sequence[str]) -> list[str] | None:
        """All pieces, each folded no more than it must be; None where one does not fit."""
        lines: list[str] = []
        for title, columns, rows in pieces:
            most = (
                ((36, False), (16, False), (24, True), (10, True))
                if keys == ["cell"]
                else ((36, False), (24, False))
            )
            tries = (grid(rows, [*keys, *columns], *how) for how in most)
            if not (found := next((t for t in tries if max(map(len, t)) <= width), None)):
                return None
            lines += ["", title] * bool(title) + found
        return lines

    if numbered:
        lines = fitting(table.keys)
        if lines is None:
            out += [
                line
                for i, row in enumerate(numbered, start=1)
                for line in _legend(i, row, table.keys, width)
            ]
            lines = fitting(["cell"])
        out += lines or []
    if len(table.lines) > most:
        out.append(
            f"  {count(len(table.lines) - most, 'further cell')}: in the table's .csv and .md"
        )
    for note in legend_of(table):
        out += textwrap.wrap(
            note, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
    return "\n".join(out)


def _legend(number: int, row: Mapping[str, str], keys: Sequence[str], width: int) -> list[str]:
    text = f"cell {number}: " + " ".join(row[k] if k == "notes" else f"{k}={row[k]}" for k in keys)
    return textwrap.wrap(text, width, subsequent_indent="    ", break_on_hyphens=False)


def table_md(table: Table, sources: Sequence[str]) -> str:
    """The table as Markdown, in one piece."""
    rows = cells_of(table)
    columns = table.keys + [c for _, shown, _ in pieces_of(rows, table) for c in shown]
    words = {*table.keys, "test", "flags", "equal time by"}
    out = [f"# {table.stage.name}", ""]
    counts = f"{count(table.num_rows, 'row')}, {table.num_finished} counted, {count(len(table.lines), 'cell')}"
    out += [f"Made by `scripts/split_results.py` from {', '.join(sources)}: {counts}.", ""]
    if rows:
        out.append("| " + " | ".join(columns) + " |")
        out.append("| " + " | ".join("---" if c in words else "---:" for c in columns) + " |")
        out += [
            "| " + " | ".join(row[c].replace("|", "\\|") for c in columns) + " |" for row in rows
        ]
        out.append("")
    out += [f"- {note.replace('*', chr(92) + '*')}" for note in legend_of(table)]
    return "\n".join(out).rstrip() + "\n"


def count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


# ----------------------------------------------------------------------------
# Plots


# Okabe and Ito's eight without yellow, which vanishes on white; then the same with other dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """One line of a plot: the mean of one or more runs at the steps they share, and the range they span."""

    label: str
    num_runs: int
    step: list[int]
    seconds: list[float]  # mean over the runs
    loss: list[float]
    low: list[float]
    high: list[float]


def make_curve(label: str, runs: Sequence[Points]) -> Curve:
    """The mean over runs. Only steps that all have: a mean over other runs at every step would jump."""
    at = [{s: (t, v) for s, t, v in zip(r.step, r.seconds, r.loss, strict=True)} for r in runs]
    steps = sorted(set.intersection(*(set(run) for run in at)))
    losses = [[run[s][1] for run in at] for s in steps]
    return Curve(
        label=label,
        num_runs=len(runs),
        step=steps,
        seconds=[mean([run[s][0] for run in at]) for s in steps],
        loss=[mean(v) for v in losses],
        low=[min(v) for v in losses],
        high=[max(v) for v in losses],
    )


def loss_limits(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """The range of losses worth looking at, in nats per token: from the last three quarters of training, in
    which step 0 (16, or ln V) never is. None if nothing was validated after step 0."""
    end = max((c.step[-1] for c in curves if c.step), default=0)
    for start in (end / 4, 1):  # a curve may have no validation in the late part
        shown = [
            (lo, hi)
            for c in curves
            for s, lo, hi in zip(c.step, c.low, c.high, strict=True)
            if s >= start > 0
        ]
        if shown:
            low, high = min(lo for lo, _ in shown), max(hi for _, hi in shown)
            pad = 0.05 * (high - low) or 0.01 * abs(high) or 1.0
            return low - pad, high + pad
    return None


def loss_figure(
    curves: Sequence[Curve], title: str
):  # -> matplotlib.figure.Figure, which may not be installed
    """Validation loss against steps and against training time. Raises UserError without matplotlib."""
    # Figure itself, not pyplot: it needs no display and keeps no list of open windows
    figure = need("matplotlib.figure", "a figure").Figure(figsize=(11, 4.8), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    longest = max((c.seconds[-1] for c in curves if c.seconds), default=0.0)
    unit, seconds = next(
        ((u, s) for u, s in (("h", 3600), ("min", 60)) if longest > 5 * s), ("s", 1)
    )
    for i, c in enumerate(curves):
        style = dict(
            color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i // len(COLOURS) % len(DASHES)]
        )
        for axes, x in ((by_step, c.step), (by_time, [t / seconds for t in c.seconds])):
            n = f" (n={c.num_runs})"
            axes.plot(
                x, c.loss, label=c.label + n, linewidth=1.6, marker=".", markersize=4, **style
            )
            if c.num_runs > 1:
                axes.fill_between(x, c.low, c.high, color=style["color"], alpha=0.2, linewidth=0)
    if limits := loss_limits(curves):
        by_step.set_ylim(*limits)
    by_step.set_ylabel("validation loss (nats per token)")
    by_step.set_xlabel("optimizer steps")
    by_time.set_xlabel(f"training time ({unit}; validation and saving not counted)")
    for axes in (by_step, by_time):
        axes.set_xlim(left=0)
        axes.grid(True, color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    if curves:
        by_time.legend(frameon=False, fontsize=9, loc="upper right")
    figure.suptitle(title)
    figure.supxlabel(caption(curves), fontsize=9, color="0.3")
    return figure


def caption(curves: Sequence[Curve]) -> str:
    """What a line is, and of how many runs."""
    ns = sorted({c.num_runs for c in curves})
    if ns == [1]:
        return "n=1: each line is one run; no spread is known"
    n = f"n={ns[0]}" if len(ns) == 1 else "n as in the legend"
    return f"line: mean over {n} seeds; band: smallest to largest; step 0 is above the view"
