"""lib_results.py -- shared by the programs that read results: files, stages, statistics, tables, plots.

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
import importlib
import io
import math
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import NoReturn

REPO = Path(__file__).resolve().parents[1]
NAN = float("nan")


class UserError(ValueError):
    """What a user can cause and mend; the message is all that is shown."""


def launch(main: Callable[[], None]) -> NoReturn:
    """Run main(); a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
        sys.exit(0)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def need(module: str, what: str) -> ModuleType:
    """Import an optional library. Raises UserError saying what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"{what} needs {module.split('.')[0]}: pip install scipy matplotlib (or -r requirements-dev.txt)"
        ) from None


def write_whole(path: Path, data: str | bytes) -> None:
    """Replace `path` in one rename, LF line ends. Raises UserError when it cannot be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None


# ----------------------------------------------------------------------------
# Reading


NEEDED = ("run_id", "seed", "final_val_loss")  # what a row is useless without; all else may be missing
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
        raise UserError(f"{path}: {error.strerror}; a trainer writes it when a run ends, or name the file") from None
    header: list[str] = []
    rows, problems = [], []
    for number, line in enumerate(data.decode("utf-8-sig", errors="replace").split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            fields = next(csv.reader([line], strict=True))
        except csv.Error:
            fields = []
        if not header or fields[:1] == ["run_id"]:
            if missing := [name for name in NEEDED if name not in fields]:
                raise UserError(f"{path}: line {number} is not a header of results, it has no {', '.join(missing)}")
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
    return "".join(f"{csv_line(line)}\n" for line in [columns, *([row[c] for c in columns] for row in rows)])


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


def read_metrics(path: Path) -> tuple[Points, int]:
    """The validations in a run's metrics.csv, in the order of steps, and how many rows were torn. A step that
    occurs twice (the run was resumed) counts as it was the last time.
    Raises UserError when the file is missing or has no step, val_loss or train_time_s column."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    header: list[str] = []
    points: dict[int, tuple[float, float]] = {}
    torn = 0
    for line in text.split("\n"):
        fields = line.rstrip("\r").split(",")
        if fields == [""]:
            continue
        if not header or fields == header:
            header = fields
            if missing := [c for c in ("step", "val_loss", "train_time_s") if c not in header]:
                raise UserError(f"{path}: has no column {', '.join(missing)}")
            continue
        values = dict(zip(header, fields, strict=False))
        try:
            step = int(values["step"])
            if len(fields) != len(header):
                raise ValueError
            if values["val_loss"]:
                seconds = values["train_time_s"] if step else 0  # at step 0 there is no time yet, and none is written
                points[step] = (float(seconds), float(values["val_loss"]))
        except ValueError:
            torn += 1
    good = sorted((step, t, loss) for step, (t, loss) in points.items() if math.isfinite(t + loss))
    return Points([p[0] for p in good], [p[1] for p in good], [p[2] for p in good]), torn


# ----------------------------------------------------------------------------
# Stages


@dataclass(frozen=True)
class Stage:
    """Which rows belong together, when their own stage column does not say so, and how they are compared."""

    name: str
    match: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)  # column: values, as canon()
    keys: tuple[str, ...] = ()  # columns the table has even if they do not vary
    baseline: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"attn_gate": "none"})
    extra_csv: tuple[str, ...] = ()  # files with further rows, relative to the first source's folder


def canon(value: object) -> str:
    """A value as text, one text per number: 1500, 1500.0 and 1.5e3 are the same iterations."""
    text = str(value).strip()
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
            raise UserError(f"--{name}-iters {text}: {wrong[0]!r} is no number of iterations, such as 1500")
        stages.append(Stage(name, {"num_iterations": frozenset(map(canon, values))} if values else {}))
    return stages


def read_stages(path: Path) -> list[Stage]:
    """The stages of a TOML file, one table [stage.NAME] each: conditions COLUMN = value or [values], all of which
    a row must meet, and the words keys, baseline and extra_csv, which are no columns.
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
        raise UserError(f"{path}: expected tables [stage.NAME] and nothing else, found {sorted(tables)}")
    return [_read_stage(f"{path}: [stage.{name}]", name, table) for name, table in tables["stage"].items()]


def _read_stage(where: str, name: str, table: object) -> Stage:
    if not isinstance(table, dict) or not _file_name(name):
        raise UserError(f"{where}: expected a table named in letters, digits, '_', '.', '-'; it names the files")

    def column(word: str) -> str:
        if word not in HEADER:
            near = get_close_matches(word, [*HEADER, "keys", "baseline", "extra_csv"], n=1)
            raise UserError(f"{where}: {word} is no column" + (f"; did you mean {near[0]}?" if near else ""))
        return word

    def listed(word: str, value: object) -> list:
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, str | int | float) for v in values):
            raise UserError(f"{where}: {word} = {value!r}: expected a value or a list of values")
        return values

    words = dict(table)
    keys = tuple(column(str(v)) for v in listed("keys", words.pop("keys", "attn_gate")))
    extra = tuple(str(v) for v in listed("extra_csv", words.pop("extra_csv"))) if "extra_csv" in words else ()
    baseline = words.pop("baseline", {"attn_gate": "none"})
    if not isinstance(baseline, dict) or not baseline or any(isinstance(v, list) for v in baseline.values()):
        raise UserError(f'{where}: baseline = {baseline!r}: expected one value per column: {{attn_gate = "none"}}')
    match = {column(word): frozenset(canon(v) for v in listed(word, value)) for word, value in words.items()}
    return Stage(name, match, keys, {column(w): canon(v) for w, v in baseline.items()}, extra)


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
OF_THE_GATE = ("gate_pos", "gate_act")  # recorded for attn_gate=none too, and mean nothing there
GATE_KNOBS = ("GATEOPT", "MLP_MATCH")  # likewise, in the notes


def knobs_in(notes: str) -> list[str]:
    """NAME=value of the notes. Names in small letters are outcomes (reached_step=...), which are no configuration."""
    return [word for word in notes.split() if not re.match(r"[a-z_]+=", word)]


def key_value(row: Row, key: str) -> str:
    """What tells cells apart: '-' for a gate's knob where there is no gate, '' where the file does not say."""
    ungated = row["attn_gate"] == "none"
    if key in OF_THE_GATE and ungated:
        return "-"
    if key == "notes":
        return " ".join(w for w in knobs_in(row["notes"]) if not (ungated and w.split("=")[0] in GATE_KNOBS))
    return canon(row[key])


@dataclass(frozen=True)
class Cell:
    """The finished rows of one configuration."""

    key: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def by_seed(self) -> dict[str, list[Row]]:
        seeds: dict[str, list[Row]] = {}
        for row in self.rows:
            seeds.setdefault(canon(row["seed"]), []).append(row)
        return seeds

    def values(self, column: str) -> dict[str, float]:
        """One value per seed. A seed with several finished rows counts once, with their mean: to choose one of
        them would be a way to choose the result. Rows without a finite value do not count."""
        found = {seed: [row.number(column) for row in rows] for seed, rows in self.by_seed.items()}
        finite = {seed: [v for v in values if math.isfinite(v)] for seed, values in found.items()}
        return {seed: mean(values) for seed, values in finite.items() if values}

    @property
    def label(self) -> str:
        return " ".join(f"{k}={v}" if k != "notes" else v for k, v in self.key.items() if v not in ("", "-"))


def make_cells(rows: Sequence[Row], stage: Stage) -> list[Cell]:
    """Finished rows by configuration: attn_gate, the stage's own keys, and every key that varies; baseline cells
    first. What is not known (an empty field, except notes) does not make a key vary."""
    always = {"attn_gate", *stage.keys, *stage.baseline}
    found = {key: {key_value(row, key) for row in rows} - ({"-"} if key == "notes" else {"-", ""}) for key in KEYS}
    keys = [key for key in KEYS if key in always or len(found[key]) > 1] + sorted(always - set(KEYS))
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(key_value(row, key) for key in keys), []).append(row)
    cells = [Cell(dict(zip(keys, key, strict=True)), tuple(group)) for key, group in groups.items()]
    return sorted(cells, key=lambda c: (not is_baseline(c, stage), [_natural(v) for v in c.key.values()]))


def _natural(text: str) -> tuple[bool, float, str]:
    """Sorts numbers as numbers, before words."""
    try:
        return False, float(text), ""
    except ValueError:
        return True, 0.0, text


def is_baseline(cell: Cell, stage: Stage) -> bool:
    return all(cell.key[column] == value for column, value in stage.baseline.items())


def find_baseline(cell: Cell, cells: Sequence[Cell], stage: Stage) -> Cell | None:
    """The baseline cell that agrees with `cell` in every key that neither defines the baseline nor belongs to the
    gate alone; None if there is none."""
    ungated = "none" in (stage.baseline.get("attn_gate"), cell.key["attn_gate"])

    def rest(c: Cell) -> dict[str, str]:
        ignored = {*stage.baseline, *(OF_THE_GATE if ungated else ())}
        key = {k: v for k, v in c.key.items() if k not in ignored}
        if ungated and "notes" in key:
            key["notes"] = " ".join(w for w in key["notes"].split() if w.split("=")[0] not in GATE_KNOBS)
        return key

    return next((b for b in cells if is_baseline(b, stage) and rest(b) == rest(cell)), None)


# ----------------------------------------------------------------------------
# Statistics


def mean(values: Sequence[float]) -> float:
    """Exactly rounded sum over n: the same whatever the order of the rows; nan of nothing."""
    return math.fsum(values) / len(values) if values else NAN


def sd(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1); nan below two values."""
    if len(values) < 2:
        return NAN
    m = mean(values)
    return math.sqrt(math.fsum((v - m) ** 2 for v in values) / (len(values) - 1))


@dataclass(frozen=True)
class TTest:
    """A two-sided t test of a difference of means, with its 95% confidence interval."""

    t: float
    df: float
    p: float
    lo: float
    hi: float


def t_test(difference: float, error: float, df: float, scale: float) -> TTest | None:
    """From the difference and its standard error. None where there is no spread to judge by: values of size
    `scale` that differ in their last bits only have a standard error that is rounding, not noise."""
    if not error > 1e-13 * abs(scale):
        return None
    t = need("scipy.stats", "a confidence interval").t
    half = float(t.ppf(0.975, df)) * error
    p = float(2 * t.sf(abs(difference) / error, df))
    return TTest(difference / error, df, p, difference - half, difference + half)


def welch(a: Sequence[float], b: Sequence[float]) -> TTest | None:
    """mean(a) - mean(b), variances not assumed equal (Welch 1947); None below two values in an arm, or no spread."""
    if min(len(a), len(b)) < 2:
        return None
    va, vb = sd(a) ** 2 / len(a), sd(b) ** 2 / len(b)
    spread = va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)
    df = (va + vb) ** 2 / spread if spread > 0 else NAN
    return t_test(mean(a) - mean(b), math.sqrt(va + vb), df, mean(b))


def paired(a: Sequence[float], b: Sequence[float]) -> TTest | None:
    """mean(a - b) of values that belong together one by one; None below two pairs, or no spread."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        return None
    error = sd(differences) / math.sqrt(len(differences))
    return t_test(mean(differences), error, len(differences) - 1, mean(b))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): controls the chance of any false claim among these, nothing assumed
    about their dependence. In the given order."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """A cell against its baseline. Differences are cell minus baseline, in nats per token: below 0 is better."""

    diff: float
    rel_pct: float  # of the baseline's mean loss
    overhead_pct: float  # of the baseline's mean ms per step
    per_seed: tuple[float, ...]  # over shared seeds
    sd_diff: float  # of those
    welch: TTest | None
    paired: TTest | None
    test: str  # the one that is reported: paired, Welch, "n=1" or "no spread"
    p_holm: float = NAN

    @property
    def chosen(self) -> TTest | None:
        return {"paired": self.paired, "Welch": self.welch}.get(self.test)


def compare(cell: Cell, baseline: Cell) -> Comparison:
    """Paired where both arms ran the very same seeds, Welch otherwise: to pair what is shared and drop the rest
    would let the choice of seeds choose the result. The other test is kept beside it."""
    a, b = cell.values("final_val_loss"), baseline.values("final_val_loss")
    shared = [seed for seed in a if seed in b]
    both = welch(list(a.values()), list(b.values())), paired([a[s] for s in shared], [b[s] for s in shared])
    if min(len(a), len(b)) < 2:
        test = "n=1"
    else:
        test = "paired" if a.keys() == b.keys() else "Welch"
        test = test if both[test == "paired"] else "no spread"
    ms, base_ms = (mean(list(c.values("ms_per_step").values())) for c in (cell, baseline))
    differences = [a[s] - b[s] for s in shared]
    base = mean(list(b.values()))
    diff = mean(list(a.values())) - base
    return Comparison(
        diff=diff,
        rel_pct=100 * diff / base if base else NAN,
        overhead_pct=100 * (ms / base_ms - 1) if base_ms > 0 else NAN,
        per_seed=tuple(differences),
        sd_diff=sd(differences),
        welch=both[0],
        paired=both[1],
        test=test,
    )


# ----------------------------------------------------------------------------
# Tables


@dataclass(frozen=True)
class Line:
    """One line of a table: a cell, its baseline if it has one, and how they compare."""

    cell: Cell
    baseline: Cell | None
    comparison: Comparison | None
    is_baseline: bool


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


def make_table(rows: Sequence[Row], stage: Stage) -> Table:
    """Cells, comparisons and remarks of a stage's rows. Only finished rows with a finite loss count; the remarks
    name all others."""
    counted = [r for r in rows if r.status == "finished" and math.isfinite(r.number("final_val_loss"))]
    cells = make_cells(counted, stage)
    pairs = [(c, None if is_baseline(c, stage) else find_baseline(c, cells, stage)) for c in cells]
    compared = [compare(cell, base) if base else None for cell, base in pairs]
    tested = [i for i, c in enumerate(compared) if c and c.chosen]
    for i, p in zip(tested, holm([compared[i].chosen.p for i in tested]), strict=True):
        compared[i] = dataclasses.replace(compared[i], p_holm=p)
    lines = tuple(Line(c, base, found, is_baseline(c, stage)) for (c, base), found in zip(pairs, compared, strict=True))
    return Table(stage, lines, tuple(_remarks(rows, counted, lines)), len(rows), len(counted))


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
    for line in lines:
        for seed, same in line.cell.by_seed.items():
            if len(same) > 1:
                runs = listing([r["run_id"] for r in same])
                times = f"seed {seed} finished {len(same)} times ({runs})"
                yield f"* {line.cell.label}: {times}; it counts once, with the mean"
    yield from _misfits(lines)
    yield from _mixtures(lines)
    if orphans := [line.cell.label for line in lines if not line.is_baseline and not line.baseline]:
        yield f"no baseline (a cell that differs in nothing else) for: {listing(orphans, '; ')}"


def _misfits(lines: Sequence[Line]) -> Iterable[str]:
    """Schedules whose ends overlap: the rate never was what the table says."""
    found: dict[str, list[str]] = {}
    for line in lines:
        for row in line.cell.rows:
            warmup, warmdown = ((row.number(c) if row[c] else 0.0) for c in ("warmup_iters", "warmdown_iters"))
            if warmup + warmdown > row.number("num_iterations"):
                warm = f"warmup {canon(warmup)} + " if row["warmup_iters"] else ""
                what = f"{warm}warmdown {canon(warmdown)} > {canon(row['num_iterations'])} iterations"
                found.setdefault(what, []).append(line.cell.label)
    for what, labels in found.items():
        cells = list(dict.fromkeys(labels))
        whose = "all cells" if len(cells) == len(lines) else listing(cells, "; ")
        yield f"schedule does not fit: {what}; the learning rate never stayed at its peak ({whose})"


MIXED = {
    "gpu_name": "times do not compare",
    "n_gpus": "times do not compare",
    "torch": "a difference may come from it",
    "code_sha256": "a difference may come from it",
}


def _mixtures(lines: Sequence[Line]) -> Iterable[str]:
    """What differs inside one comparison besides its keys; what a file does not say is not held against it."""
    found: dict[str, list[str]] = {}
    for line in lines:
        rows = [*line.cell.rows, *(line.baseline.rows if line.baseline else ())]
        for column, why in MIXED.items():
            values = sorted({row[column][:40] for row in rows} - {""})
            if len(values) > 1:
                short = [v[:12] if column == "code_sha256" else v for v in values]
                found.setdefault(f"mixed {column}, {why}: {listing(short)}", []).append(line.cell.label)
    for what, labels in found.items():
        yield f"{what} (in {listing(labels, '; ')})"


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
    base = "is the baseline" if line.is_baseline else line.baseline.label if line.baseline else "no baseline"
    out |= dict(baseline=base, baseline_seeds=len(line.baseline.values("final_val_loss")) if line.baseline else "")
    c = line.comparison
    chosen = c.chosen if c else None
    out |= dict(diff=c.diff if c else NAN, rel_pct=c.rel_pct if c else NAN)
    out |= dict(ci_lo=chosen.lo if chosen else NAN, ci_hi=chosen.hi if chosen else NAN)
    out |= dict(p=chosen.p if chosen else NAN, p_holm=c.p_holm if c else NAN, test=c.test if c else "")
    out |= dict(overhead_pct=c.overhead_pct if c else NAN)
    out |= dict(per_seed_diff=" ".join(map(repr, c.per_seed)) if c else "", sd_diff=c.sd_diff if c else NAN)
    for name in ("welch", "paired"):
        test = getattr(c, name, None)
        for part, suffix in dict(t="t", df="df", p="p", lo="ci_lo", hi="ci_hi").items():
            out[f"{name}_{suffix}"] = getattr(test, part, NAN)
    out["duplicate_rows"] = len(line.cell.rows) - len(line.cell.by_seed)
    return {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in out.items()}


def table_csv(table: Table) -> str:
    """The table for programs: one line per cell, numbers at full precision, both tests. A header even without
    lines, so that a reader finds its columns."""
    lines = [{**line.cell.key, **numbers_of(line)} for line in table.lines]
    columns = list(lines[0]) if lines else ["attn_gate", "seeds", "final_loss", "train_time"]
    return "".join(f"{csv_line(row)}\n" for row in [columns, *([line[c] for c in columns] for line in lines)])


MEANS = ("n", "final_loss", "sd", "train_time", "ms/step")
VERSUS = ("diff", "rel", "95% CI", "p", "Holm p", "test", "step time")


def cells_of(table: Table) -> list[dict[str, str]]:
    """The table for eyes: one dict per line, rounded. The knobs that all cells share are left out of the notes."""
    common = shared_notes(table)
    shown = []
    for line in table.lines:
        key = {k: v or ("?" if k != "notes" else "-") for k, v in line.cell.key.items()}
        if key.get("notes"):
            key["notes"] = " ".join(w for w in key["notes"].split() if w not in common) or "-"
        n = numbers_of(line)
        c = line.comparison
        out = {**key, "n": f"{n['seeds']}{'*' * (n['duplicate_rows'] > 0)}"}
        out |= {"final_loss": rounded(n, "final_loss", "{:.4f}")}
        out |= {"sd": rounded(n, "sd", "{:.5f}") if n["seeds"] > 1 else "n=1"}
        out |= {"train_time": str(n["train_time"]), "ms/step": rounded(n, "ms_per_step", "{:.2f}")}
        out |= {"diff": rounded(n, "diff", "{:+.4f}") if c else str("baseline" if line.is_baseline else "no baseline")}
        out |= {"rel": rounded(n, "rel_pct", "{:+.2f}%")}
        out |= {"95% CI": f"[{n['ci_lo']:+.4f}, {n['ci_hi']:+.4f}]" if c and c.chosen else c.test if c else "-"}
        out |= {"p": rounded(n, "p", "{:.2g}"), "Holm p": rounded(n, "p_holm", "{:.2g}")}
        out |= {"test": str(n["test"]) if c and c.chosen else "-"}
        out |= {"step time": rounded(n, "overhead_pct", "{:+.2f}%")}
        shown.append(out)
    return shown


def rounded(numbers: Mapping[str, object], name: str, form: str) -> str:
    return "-" if numbers[name] == "" else form.format(numbers[name])


def shared_notes(table: Table) -> list[str]:
    notes = [line.cell.key.get("notes", "").split() for line in table.lines]
    return [w for w in notes[0] if all(w in other for other in notes)] if len(notes) > 1 else []


def legend_of(table: Table) -> list[str]:
    """What the columns mean, the remarks, and the knobs left out."""
    num_tested = sum(1 for line in table.lines if line.comparison and line.comparison.chosen)
    out = []
    if any(line.comparison for line in table.lines):
        out.append(
            "final_loss in nats per token, mean over n seeds; diff, rel, CI, p and step time: against the baseline, "
            "below 0 is better; paired t where both ran the same seeds, Welch's t otherwise"
            + (f"; Holm over {num_tested} comparisons" if num_tested > 1 else "")
        )
    if common := shared_notes(table):
        out.append(f"all cells: {' '.join(common)}")
    return out + list(table.remarks)


def grid(rows: Sequence[Mapping[str, str]], columns: Sequence[str], most: int) -> list[str]:
    """Aligned plain text; numbers to the right, words to the left, long words folded at `most` characters."""
    folded = [{c: textwrap.wrap(row[c], most, break_on_hyphens=False) or [""] for c in columns} for row in rows]
    width = {c: max([len(c), *(len(part) for row in folded for part in row[c])]) for c in columns}
    right = {
        c: all(re.match(r"[-+\[]?[\d.]|-$|n=1$|no spread$|(no )?baseline$", row[c]) for row in rows) for c in columns
    }
    place = lambda text, c: text.rjust(width[c]) if right[c] else text.ljust(width[c])
    out = ["  ".join(place(c, c) for c in columns).rstrip(), "  ".join("-" * width[c] for c in columns)]
    for row in folded:
        for i in range(max(len(parts) for parts in row.values())):
            out.append("  ".join(place((row[c][i : i + 1] or [""])[0], c) for c in columns).rstrip())
    return out


def table_text(table: Table, width: int = 110) -> str:
    """The table for a terminal of `width` characters: in one piece where that fits, else means first and
    comparisons below, else cells by number, with a list of what they are."""
    heading = f"{table.stage.name}: {count(table.num_rows, 'row')}, {table.num_finished} counted, "
    out = [heading + count(len(table.lines), "cell")]
    numbered = [{"cell": str(i), **row} for i, row in enumerate(cells_of(table), start=1)]
    against = [row for row, line in zip(numbered, table.lines, strict=True) if not line.is_baseline]
    versus = VERSUS if any(line.comparison for line in table.lines) else ()

    def pieces(keys: Sequence[str], most: int) -> Iterable[list[str]]:
        yield grid(numbered, [*keys, *MEANS, *versus], most)
        means = grid(numbered, [*keys, *MEANS], most)
        yield means + ["", "against the baseline", *grid(against, [*keys, *versus], most)] * bool(versus)

    if numbered:
        tries = [lines for most in (36, 24, 16) for lines in pieces(table.keys, most)]
        fitting = [lines for lines in tries if max(map(len, lines)) <= width]
        if not fitting:
            out += [line for i, row in enumerate(numbered, start=1) for line in _legend(i, row, table.keys, width)]
            fitting = list(pieces(["cell"], 36))[1:]
        out += fitting[0]
    for note in legend_of(table):
        out += textwrap.wrap(note, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(out)


def _legend(number: int, row: Mapping[str, str], keys: Sequence[str], width: int) -> list[str]:
    text = f"cell {number}: " + " ".join(row[k] if k == "notes" else f"{k}={row[k]}" for k in keys)
    return textwrap.wrap(text, width, subsequent_indent="    ", break_on_hyphens=False)


def table_md(table: Table, sources: Sequence[str]) -> str:
    """The table as Markdown."""
    rows = cells_of(table)
    versus = VERSUS if any(line.comparison for line in table.lines) else ()
    columns = [*table.keys, *MEANS, *versus]
    words = {*table.keys, "test"}
    out = [f"# {table.stage.name}", ""]
    counts = f"{count(table.num_rows, 'row')}, {table.num_finished} counted, {count(len(table.lines), 'cell')}"
    out += [f"Made by `scripts/split_results.py` from {', '.join(sources)}: {counts}.", ""]
    if rows:
        out.append("| " + " | ".join(columns) + " |")
        out.append("| " + " | ".join("---" if c in words else "---:" for c in columns) + " |")
        out += ["| " + " | ".join(row[c].replace("|", "\\|") for c in columns) + " |" for row in rows]
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
        shown = [(lo, hi) for c in curves for s, lo, hi in zip(c.step, c.low, c.high, strict=True) if s >= start > 0]
        if shown:
            low, high = min(lo for lo, _ in shown), max(hi for _, hi in shown)
            pad = 0.05 * (high - low) or 0.01 * abs(high) or 1.0
            return low - pad, high + pad
    return None


def loss_figure(curves: Sequence[Curve], title: str):  # -> matplotlib.figure.Figure, which may not be installed
    """Validation loss against steps and against training time. Raises UserError without matplotlib."""
    # Figure itself, not pyplot: it needs no display and keeps no list of open windows
    figure = need("matplotlib.figure", "a figure").Figure(figsize=(11, 4.8), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    longest = max((c.seconds[-1] for c in curves if c.seconds), default=0.0)
    unit, seconds = next(((u, s) for u, s in (("h", 3600), ("min", 60)) if longest > 5 * s), ("s", 1))
    for i, c in enumerate(curves):
        style = dict(color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i // len(COLOURS) % len(DASHES)])
        for axes, x in ((by_step, c.step), (by_time, [t / seconds for t in c.seconds])):
            n = f" (n={c.num_runs})"
            axes.plot(x, c.loss, label=c.label + n, linewidth=1.6, marker=".", markersize=4, **style)
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


def figure_bytes(figure, kind: str) -> bytes:
    """The figure as PNG or SVG; the same figure gives the same bytes."""
    out = io.BytesIO()
    with need("matplotlib", "a figure").rc_context({"svg.hashsalt": "flatrun", "svg.fonttype": "path"}):
        figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()
