"""A run's metrics.csv as curves: its validations, and a thinned trace of everything else.

Raises   UserError when a log is missing or lacks a column
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib.curves import Points, read_curves
from lib.program import UserError, count
from lib.results import Row, canon
from lib.stats import mean

NO_VALIDATION = "no validation yet"  # what is wrong with a log that has none
MOST_POINTS = 200  # of a curve
TRACES = ("train_loss", "lr", "tokens_per_s", "grad_norm")


@dataclass(frozen=True)
class RunLog:
    """What a run's metrics.csv holds."""

    run_id: str
    seed: str
    val: Points  # step, seconds, loss of the validations, finite ones only
    tokens: list[float]  # at the validations; nan where the log does not say
    trace: Mapping[str, list[float]] = field(
        default_factory=dict
    )  # step, seconds, tokens and TRACES; nan: unknown
    problems: tuple[str, ...] = ()

    def x(self, axis: str) -> list[float]:
        return {"steps": self.val.step, "time": self.val.seconds, "tokens": self.tokens}[axis]


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_log(path: Path, run_id: str, seed: str = "", most: int = MOST_POINTS) -> RunLog:
    """A run's validations, and a trace of at most about `most` points. A step that occurs twice
    (the run was resumed) counts as it was the last time. Raises UserError when the file is
    missing or lacks a column."""
    at, rows, num_torn = _read_steps(path)
    val, tokens, num_nan = _validations(rows, at)
    trace, nan_at = _trace(list(rows.items()), at, most)
    problems = []
    if num_torn:
        problems.append(f"{count(num_torn, 'torn row')} skipped")
    if num_nan:
        problems.append(f"{count(num_nan, 'validation')} without a finite loss and time, left out")
    if not val.step:
        problems.append(NO_VALIDATION)
    if nan_at:
        problems.append(
            f"train_loss is not finite at {count(len(nan_at), 'step')}, first at {nan_at[0]}"
        )
    return RunLog(run_id, seed, val, tokens, trace, tuple(problems))


def _read_steps(path: Path) -> tuple[dict[str, int], dict[int, list[str]], int]:
    """Where each column is, the fields of each step in the order of steps, and how many lines
    are torn."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    lines = text.split("\n")
    if lines == [""]:
        raise UserError(f"{path}: is empty")
    header = lines[0].rstrip("\r").split(",")
    if missing := [c for c in ("step", "val_loss", "train_time_s") if c not in header]:
        raise UserError(f"{path}: has no column {', '.join(missing)}")
    at = {name: i for i, name in enumerate(header)}
    i_step, width = at["step"], len(header)
    rows: dict[int, list[str]] = {}
    num_torn, last, in_order = 0, -1, True
    for line in lines[1:]:
        fields = line.split(",")
        try:
            if len(fields) != width:
                raise ValueError
            step = int(fields[i_step])
        except ValueError:
            num_torn += line.strip() != "" and line.rstrip("\r") != lines[0].rstrip("\r")
            continue
        in_order = in_order and step > last
        last = step
        rows[step] = fields
    return at, rows if in_order else dict(sorted(rows.items())), num_torn


def _validations(
    rows: Mapping[int, list[str]], at: Mapping[str, int]
) -> tuple[Points, list[float], int]:
    """The finite validations, the tokens at each, and how many are not finite."""
    val, tokens, num_nan = Points([], [], []), [], 0
    i_loss, i_time, i_tokens = at["val_loss"], at["train_time_s"], at.get("tokens")
    for step, fields in rows.items():
        if not fields[i_loss].strip():
            continue
        loss = _float(fields[i_loss])
        # at step 0 there is no time yet, and none is written
        seconds = _float(fields[i_time]) if step else 0.0
        if not math.isfinite(loss + seconds):
            num_nan += 1
            continue
        val.step.append(step)
        val.seconds.append(seconds)
        val.loss.append(loss)
        tokens.append(_float(fields[i_tokens]) if i_tokens is not None else math.nan)
    return val, tokens, num_nan


def _trace(
    rows: Sequence[tuple[int, list[str]]], at: Mapping[str, int], most: int
) -> tuple[dict[str, list[float]], list[int]]:
    """All rows from step 1, thinned: losses and norms are means over neighbouring steps,
    throughput their median (a pause is one step), rate, time and tokens those of the last. And
    the steps whose loss is not finite."""
    rows = [r for r in rows if r[0] > 0]
    size = max(1, math.ceil(len(rows) / most))
    out: dict[str, list[float]] = {name: [] for name in ("step", "seconds", "tokens", *TRACES)}
    nan_at: list[int] = []

    def numbers(chunk: Sequence[tuple[int, list[str]]], name: str) -> list[float]:
        i = at.get(name)
        if i is None:
            return []
        found = [_float(f[i]) for _, f in chunk if f[i]]
        if name == "train_loss" and not all(map(math.isfinite, found)):
            nan_at.extend(step for step, f in chunk if f[i] and not math.isfinite(_float(f[i])))
        return [v for v in found if math.isfinite(v)]

    for i in range(0, len(rows), size):
        chunk = rows[i : i + size]
        out["step"].append(chunk[-1][0])
        out["seconds"].append((numbers(chunk[-1:], "train_time_s") or [math.nan])[0])
        out["tokens"].append((numbers(chunk[-1:], "tokens") or [math.nan])[0])
        out["lr"].append((numbers(chunk[-1:], "lr") or [math.nan])[0])
        for name, middle in (
            ("train_loss", mean),
            ("grad_norm", mean),
            ("tokens_per_s", statistics.median),
        ):
            values = numbers(chunk, name)
            out[name].append(middle(values) if values else math.nan)
    return out, nan_at


def from_curves(paths: Sequence[Path], rows: Sequence[Row]) -> tuple[dict[str, RunLog], list[str]]:
    """Validations of runs whose logs are elsewhere, from files with a run_id column (as of
    split_results.py), and what was wrong. Tokens are steps times the batch of the run's row."""
    by_id = {row["run_id"]: row for row in rows}
    logs, problems = {}, []
    for path in paths:
        runs, torn = read_curves(path)
        problems += [f"{path}: {count(torn, 'torn row')} skipped"] * bool(torn)
        for run_id, val in runs.items():
            row = by_id.get(run_id)
            batch = row.number("batch_size") * row.number("sequence_length") if row else math.nan
            trace: dict[str, list[float]] = {
                name: [] for name in ("step", "seconds", "tokens", *TRACES)
            }
            seed = canon(row["seed"]) if row else ""
            logs[run_id] = RunLog(run_id, seed, val, [s * batch for s in val.step], trace)
    return logs, problems


def read_logs(
    rows: Sequence[Row], others: Sequence[str], folder: Path
) -> tuple[dict[str, RunLog], list[str]]:
    """The logs of these runs, and what was wrong, one line each."""
    logs, problems = {}, []
    for run_id, seed in {
        **{r["run_id"]: canon(r["seed"]) for r in rows},
        **dict.fromkeys(others, ""),
    }.items():
        path = folder / run_id / "metrics.csv"
        try:
            log = read_log(path, run_id, seed)
        except UserError as error:
            problems.append(f"{error}; {run_id} is left out")
            continue
        problems += [f"{path}: {what}" for what in log.problems if what != NO_VALIDATION]
        if log.val.step:
            logs[run_id] = log
        else:
            problems.append(f"{path}: {NO_VALIDATION}; {run_id} is left out")
    return logs, problems
