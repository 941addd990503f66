"""Validation curves: from a run's metrics.csv or from one file of many runs, and their means.

Units    losses in nats per token, time in seconds of training
"""

import math
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.cells import Cell
from lib.program import UserError, count, listing
from lib.stats import NAN, mean


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
        """Step and seconds at which the straight lines between validations first meet `target`;
        None if never."""
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
    """The validations in a run's metrics.csv, in the order of steps, and how many rows were
    torn. A step that occurs twice (the run was resumed) counts as it was the last time. Raises
    UserError when the file is missing or has no step, val_loss or train_time_s column."""
    runs, torn = _read_points(path)
    return runs.get("", Points([], [], [])), torn


def read_curves(path: Path) -> tuple[dict[str, Points], int]:
    """The validations of many runs, by run id, from one file with a run_id column, and how many
    rows were torn. Raises UserError when the file is missing or has no such column."""
    runs, torn = _read_points(path)
    if "" in runs:
        raise UserError(
            f"{path}: has no column run_id; --curves takes one file with the validations of all "
            "runs"
        )
    return runs, torn


def _read_points(path: Path) -> tuple[dict[str, Points], int]:
    """Validations by run id ('' in a file without the column); train_time_s in s, or
    train_time_ms in ms."""
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
                    f"{what}: {count(len(own), 'run')}, "
                    f"{listing(own)}" + where * (what == "no curve")
                )
        return out


@dataclass(frozen=True)
class Curve:
    """One line of a plot: the mean of one or more runs at the steps they share, and the range
    they span."""

    label: str
    num_runs: int
    step: list[int]
    seconds: list[float]  # mean over the runs
    loss: list[float]
    low: list[float]
    high: list[float]


def make_curve(label: str, runs: Sequence[Points]) -> Curve:
    """The mean over runs. Only steps that all have: a mean over other runs at every step would
    jump."""
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
    """The range of losses worth looking at, in nats per token: from the last three quarters of
    training, in which step 0 (16, or ln V) never is. None if nothing was validated after step 0."""
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
