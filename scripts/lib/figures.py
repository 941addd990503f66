"""Figures of a table: final losses, differences with intervals, learning rates, step time."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lib.cells import Cell
from lib.claims import seeds_of
from lib.groups import MOST_LINES, labels_of
from lib.plots import add_legend, finish, new_figure, plain, style_of
from lib.program import count, need
from lib.results import Row
from lib.stats import mean, sd
from lib.tables import Line, Table

MOST_CELLS = 60  # of a figure with a line of text per cell


@dataclass(frozen=True)
class Spread:
    """A cell's final losses: one per seed, their mean, and half the 95% interval of the mean
    (nan at n=1)."""

    values: list[float]
    mean: float
    half: float


def spread_of(cell: Cell) -> Spread:
    values = list(cell.values("final_val_loss").values())
    n = len(values)
    half = math.nan
    if n > 1:
        half = (
            float(need("scipy.stats", "a confidence interval").t.ppf(0.975, n - 1))
            * sd(values)
            / n**0.5
        )
    return Spread(values, mean(values), half)


def _ladder(table: Table, lines: Sequence[Line], words: Callable[[Line], str]):
    """A figure with a line of text per cell, from top to bottom."""
    labels = dict(
        zip(map(id, table.lines), labels_of([line.cell for line in table.lines]), strict=True)
    )
    texts = [f"{textwrap.fill(labels[id(line)], 40)}\n{words(line)}" for line in lines]
    figure, (axes,) = new_figure(1.5 + sum(0.14 + 0.16 * (1 + t.count("\n")) for t in texts))
    axes.set_yticks(range(len(lines)), [plain(t) for t in texts])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=7)
    return figure, axes


def _cut(lines: Sequence[Line]) -> tuple[list[Line], str]:
    more = len(lines) - MOST_CELLS
    return list(lines[:MOST_CELLS]), f"; {count(more, 'more cell')} not drawn" if more > 0 else ""


def _dot(axes, x: float, y: int, style: dict[str, object], size: int, is_filled: bool) -> None:
    """A cell's mean or difference; open where a single seed says nothing about its spread."""
    filled = dict(color=style["color"])
    if not is_filled:
        filled["facecolor"] = "white"
    axes.scatter([x], [y], marker=style["marker"], s=size, zorder=3, **filled)


def final_figure(table: Table, title: str):
    """Final loss per cell: a dot per seed, the mean, its 95% interval."""
    lines, more = _cut(table.lines)
    if not lines:
        return None
    spreads = [spread_of(line.cell) for line in lines]
    count = dict(zip(map(id, lines), (len(s.values) for s in spreads), strict=True))
    figure, axes = _ladder(
        table, lines, lambda line: f"n={count[id(line)]}" + ", baseline" * line.is_baseline
    )
    for i, s in enumerate(spreads):
        style = style_of(i)
        if math.isfinite(s.half):
            axes.errorbar(
                s.mean, i, xerr=s.half, color=style["color"], capsize=4, elinewidth=1.8, zorder=2
            )
        _dot(axes, s.mean, i, style, 60, len(s.values) > 1)
        if len(s.values) > 1:
            places = [i + 0.22] * len(s.values)
            axes.scatter(
                s.values, places, marker="o", s=14, facecolor="white", edgecolor="0.15", zorder=4
            )
    axes.margins(x=0.08)
    label = f"final validation loss ({table.loss_unit}); the axis does not start at zero"
    axes.set_xlabel(label, fontsize=10)
    one = "; n=1 (open marker): no interval" if 1 in count.values() else ""
    caption = f"large: mean over n seeds, bar: its 95% interval (t); small dots: seeds{one}{more}"
    finish(figure, [axes], title, caption)
    return figure


def _tested(line: Line) -> str:
    """How a difference was tested, beside its bar."""
    c = line.comparison
    if not c.chosen:
        return f"{seeds_of(line)}: {c.test}, no interval"
    if c.decision:  # a sequential stage has no p
        return f"{c.test}: {c.decision}"
    return f"{seeds_of(line)}, {c.test}, Holm p={c.p_holm:.2g}"


def forest_figure(table: Table, title: str):
    """Difference to the baseline per cell, with the interval and the test of the table."""
    lines, more = _cut([line for line in table.lines if line.comparison])
    if not lines:
        return None
    figure, axes = _ladder(table, lines, _tested)
    places = {id(line): i for i, line in enumerate(table.lines)}
    for i, line in enumerate(lines):
        c, style = line.comparison, style_of(places[id(line)])
        if c.chosen:
            ends = [c.chosen.lo, c.chosen.hi]
            axes.plot(ends, [i, i], color=style["color"], linewidth=1.8, marker="|", zorder=2)
        _dot(axes, c.diff, i, style, 50, c.chosen is not None)
    axes.axvline(0, color="0.4", linewidth=1)
    axes.margins(x=0.08)
    label = f"difference to the baseline ({table.loss_unit}); left of 0 is better"
    axes.set_xlabel(label, fontsize=10)
    caption = "bar: 95% confidence interval of one difference; p is adjusted for all (Holm)"
    if table.stage.sequential:
        caption = "bar: interval that holds after every seed, for all differences of the stage"
    finish(figure, [axes], title, caption + more)
    return figure


def rate_figure(table: Table, title: str):
    """Final loss against the learning rate, a line per configuration. None where the rate does
    not vary."""
    lines = rate_lines(table)
    rates = sorted({rate for points in lines.values() for rate, _ in points})
    if len(rates) < 2:
        return None
    series = {
        key: [(rate, spread_of(line.cell)) for rate, line in points]
        for key, points in lines.items()
    }
    figure, (axes,) = new_figure(4.2)
    for i, (key, points) in enumerate(series.items()):
        _draw_rates(axes, i, key, points, rates[-1] - rates[0])
    scale = ""
    if rates[-1] / rates[0] >= 4:
        axes.set_xscale("log")
        scale = "; log scale"
    if len(rates) <= 8:
        axes.set_xticks(rates, [f"{r:g}" for r in rates])
        axes.set_xticks([], minor=True)
    axes.set_xlabel(f"peak learning rate (AdamW{scale})", fontsize=10)
    axes.set_ylabel(f"final validation loss\n({table.loss_unit})", fontsize=10)
    add_legend(axes, axes, len(series))
    words = "line: mean over seeds; bar: its 95% interval (t); small dots beside: seeds; n in the "
    words += "legend"
    if any(len(s.values) == 1 for points in series.values() for _, s in points):
        words += "; n=1 has no interval"
    finish(figure, [axes], title, words)
    return figure


def rate_lines(table: Table) -> dict[tuple[str, ...], list[tuple[float, Line]]]:
    """The table's lines by learning rate, lowest first, of each configuration, which is named by
    its key without the rate."""
    found: dict[tuple[str, ...], list[tuple[float, Line]]] = {}
    for line in table.lines:
        if (rate := Row(line.cell.key, "", "").number("learning_rate")) > 0:
            rest = tuple(v for k, v in line.cell.key.items() if k != "learning_rate")
            found.setdefault(rest, []).append((rate, line))
    for points in found.values():
        points.sort(key=lambda point: point[0])
    return found


def _draw_rates(
    axes, i: int, key: tuple[str, ...], points: Sequence[tuple[float, Spread]], width: float
) -> None:
    """The line of one configuration, its intervals, and its seeds beside it. `width` is that of
    all rates."""
    style = style_of(i)
    ns = sorted({len(s.values) for _, s in points})
    n = f"n={ns[0]}" if len(ns) == 1 else f"n={ns[0]} to {ns[-1]}"
    label = " ".join(w for w in key if w not in ("", "-"))
    x, y = [rate for rate, _ in points], [s.mean for _, s in points]
    axes.plot(x, y, label=plain(f"{label} ({n} per rate)"), **style)
    known = [(rate, s.mean, s.half) for rate, s in points if math.isfinite(s.half)]
    if known:
        x, y, half = zip(*known, strict=True)
        bar = dict(color=style["color"], linestyle="none", capsize=4, elinewidth=1)
        axes.errorbar(x, y, yerr=half, **bar)
    dot = dict(s=12, facecolor="white", edgecolor="0.15", zorder=4)
    for rate, s in points:
        if len(s.values) > 1:
            beside = rate + 0.012 * (1 + i % 3) * width
            axes.scatter([beside] * len(s.values), s.values, **dot)


def overhead_figure(table: Table, title: str):
    """What a change costs per step against what it gains."""
    lines = [
        x
        for x in table.lines
        if x.comparison and math.isfinite(x.comparison.overhead_pct + x.comparison.diff)
    ]
    more = len(lines) - MOST_LINES
    lines = sorted(lines, key=lambda x: x.comparison.diff)[:MOST_LINES]
    if not lines:
        return None
    labels = labels_of([line.cell for line in table.lines])
    places = {id(line): i for i, line in enumerate(table.lines)}
    figure, (axes,) = new_figure(4.2 if len(lines) < 6 else 5.0)
    for line in lines:
        c, i = line.comparison, places[id(line)]
        style = style_of(i) | dict(linestyle="none", markersize=7)
        if not c.chosen:
            style["markerfacecolor"] = "white"
        n = len(line.cell.values("final_val_loss"))
        axes.plot([c.overhead_pct], [c.diff], label=plain(f"{labels[i]} (n={n})"), **style)
        if c.chosen:
            axes.plot(
                [c.overhead_pct] * 2,
                [c.chosen.lo, c.chosen.hi],
                color=style["color"],
                linewidth=1.4,
                marker="_",
            )
        if math.isfinite(c.step_time.lo + c.step_time.hi):
            axes.plot(
                [c.step_time.lo, c.step_time.hi],
                [c.diff] * 2,
                color=style["color"],
                linewidth=1.4,
                marker="|",
            )
    for zero in (axes.axhline, axes.axvline):
        zero(0, color="0.4", linewidth=1)
    axes.margins(0.1)
    axes.set_xlabel("step time above the baseline's (%); left is faster", fontsize=10)
    label = f"difference in final loss\n({table.loss_unit}); down is better"
    axes.set_ylabel(label, fontsize=10)
    one = "; open marker, n=1: no interval" if any(not x.comparison.chosen for x in lines) else ""
    rest = f"; {count(more, 'more cell')} not drawn" if more > 0 else ""
    finish(figure, [axes], title, f"bars: 95% confidence intervals, n seeds per cell{one}{rest}")
    add_legend(axes, axes, len(lines))
    return figure
