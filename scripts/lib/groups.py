"""Groups: the cells of a figure with the logs of their runs, their mean lines and labels."""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lib.cells import Cell
from lib.logs import RunLog
from lib.stats import mean
from lib.tables import Table

MOST_LINES = 12  # of a figure of curves; more cannot be told apart


BARE = ("attn_gate", "gate_pos", "gate_act")  # their values say which key it is


SHORT = {"learning_rate": "lr", "num_iterations": "iterations"}


@dataclass(frozen=True)
class Group:
    """A cell, or a run that no results row knows, and its logs. `style` is its place in the
    table."""

    label: str
    style: int
    runs: tuple[RunLog, ...]
    baseline: "Group | None" = None

    @property
    def title(self) -> str:
        return f"{self.label} (n={len(self.runs)})"


def label_of(cell: Cell, shared: set[str]) -> str:
    """A cell in a legend: its gate, its rate, and whatever else tells it from the others. What is
    in `shared`, words of the notes and values that say which key they are of, is left out."""
    words = []
    for key, value in cell.key.items():
        if key == "notes":
            words += [w for w in value.split() if w not in shared]
        elif key in BARE:
            words += [value] if value not in ("", "-", *shared) else []
        elif value not in ("", "-"):
            words.append(f"{SHORT.get(key, key)} {value}")
    return " ".join(words)


def labels_of(cells: Sequence[Cell]) -> list[str]:
    """The cells' labels, without what all of them share."""
    shared = set()
    if len(cells) > 1:
        words = [{c.key[k] for k in BARE if k in c.key} | set(c.key.get("notes", "").split())
                 for c in cells]  # fmt: skip
        shared = set.intersection(*words)
    return [label_of(cell, shared) or f"cell {i}" for i, cell in enumerate(cells, start=1)]


def make_groups(table: Table, logs: Mapping[str, RunLog]) -> list[Group]:
    """The table's cells in its order, with those of their runs that have a log with validations."""
    labels = labels_of([line.cell for line in table.lines])
    groups: dict[int, Group] = {}  # by cell; baselines exist first
    for i, line in sorted(enumerate(table.lines), key=lambda pair: not pair[1].is_baseline):
        runs = {
            row["run_id"]: logs[row["run_id"]] for row in line.cell.rows if row["run_id"] in logs
        }
        drawn = tuple(r for r in runs.values() if r.val.step)
        base = groups.get(id(line.baseline))
        groups[id(line.cell)] = Group(labels[i], i, drawn, base if base and base.runs else None)
    return sorted((g for g in groups.values() if g.runs), key=lambda g: g.style)


@dataclass(frozen=True)
class Mean:
    """A line over several runs: x, mean, smallest and largest."""

    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


def mean_line(runs: Sequence[RunLog], axis: str) -> Mean:
    """Mean validation loss at the steps that all runs have; x is their mean time or tokens
    there."""
    at = [dict(zip(r.val.step, zip(r.x(axis), r.val.loss, strict=True), strict=True)) for r in runs]
    steps = sorted(set.intersection(*map(set, at))) if at else []
    here = [[run[s] for run in at] for s in steps]
    good = [values for values in here if all(math.isfinite(x) for x, _ in values)]
    losses = [[loss for _, loss in values] for values in good]
    return Mean(
        [mean([x for x, _ in v]) for v in good],
        [mean(v) for v in losses],
        [min(v) for v in losses],
        [max(v) for v in losses],
    )


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear between the points; nan outside."""
    if not xs or not xs[0] <= x <= xs[-1]:
        return math.nan
    i = max(1, bisect.bisect_left(xs, x))
    if len(xs) == 1 or xs[min(i, len(xs) - 1)] == x:
        return ys[min(i, len(xs) - 1)] if len(xs) > 1 else ys[0]
    part = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + part * (ys[i] - ys[i - 1])


def difference_line(group: Group, axis: str) -> Mean:
    """Loss minus the baseline's at equal steps, time or tokens (the baseline interpolated
    linearly where it was not validated at that very place); low and high over the seeds that
    both ran, equal to the mean where there are none. Step 0 is left out: nothing has been
    learned."""
    base = group.baseline
    if base is None:
        return Mean([], [], [], [])
    ours, theirs = mean_line(group.runs, axis), mean_line(base.runs, axis)
    by_seed = {r.seed: r for r in base.runs if r.seed}
    pairs = [(r, by_seed[r.seed]) for r in group.runs if r.seed in by_seed]
    out = Mean([], [], [], [])
    for x, y in zip(ours.x, ours.y, strict=True):
        value = y - interpolate(x, theirs.x, theirs.y)
        if not x > 0 or not math.isfinite(value):
            continue
        each = [
            interpolate(x, a.x(axis), a.val.loss) - interpolate(x, b.x(axis), b.val.loss)
            for a, b in pairs
        ]
        each = [d for d in each if math.isfinite(d)] or [value]
        for values, v in (
            (out.x, x),
            (out.y, value),
            (out.low, min(*each, value)),
            (out.high, max(*each, value)),
        ):
            values.append(v)
    return out


def choose(groups: Sequence[Group], most: int = MOST_LINES) -> tuple[list[Group], int]:
    """As many groups as can be told apart: baselines, then the lowest final losses; and how many
    are left out."""
    bases = {id(g.baseline) for g in groups if g.baseline}
    rank = lambda g: (id(g) not in bases, mean([r.val.loss[-1] for r in g.runs]))
    kept = sorted(sorted(groups, key=rank)[:most], key=lambda g: g.style)
    return kept, len(groups) - len(kept)
