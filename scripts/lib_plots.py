"""lib_plots.py -- shared by plot.py and report.py: a run's log as curves, and every kind of figure.

Words    a group is a cell with the logs of its runs; validations are the rows of metrics.csv that have a val_loss,
         the trace is all rows, thinned by taking the mean over neighbouring steps
Units    losses in nats per token, times in s, tokens over all ranks
Style    Okabe and Ito's colours; dash and marker differ too, so that a grey print can be read
Raises   UserError without matplotlib or scipy, or when a log cannot be read
"""

import bisect
import io
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lib_results as lib
from lib_results import Cell, Line, Points, Row, Table, UserError

MARKERS = ("o", "s", "^", "D", "v", "X")
DASHES = ("-", "--", "-.", ":")
MOST_LINES = 12  # of a figure of curves; more cannot be told apart
MOST_CELLS = 60  # of a figure with a line of text per cell
WIDTH = 7.2  # inches: two columns of a paper
BARE = ("attn_gate", "gate_pos", "gate_act")  # their values say which key it is
SHORT = {"learning_rate": "lr", "num_iterations": "iterations"}
TRACES = ("train_loss", "lr", "tokens_per_s", "grad_norm")
X_AXES = ("steps", "time", "tokens")


# ----------------------------------------------------------------------------
# Logs


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


def read_log(path: Path, run_id: str, seed: str = "", most: int = 200) -> RunLog:
    """A run's validations, and a trace of at most about `most` points. A step that occurs twice (the run was
    resumed) counts as it was the last time. Raises UserError when the file is missing or lacks a column."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    lines = text.split("\n")
    header = lines[0].rstrip("\r").split(",")
    if lines == [""]:
        raise UserError(f"{path}: is empty")
    if missing := [c for c in ("step", "val_loss", "train_time_s") if c not in header]:
        raise UserError(f"{path}: has no column {', '.join(missing)}")
    at = {name: i for i, name in enumerate(header)}
    i_step, i_loss, i_time, width = at["step"], at["val_loss"], at["train_time_s"], len(header)
    rows: dict[int, list[str]] = {}
    torn, last, in_order = 0, -1, True
    for line in lines[1:]:
        fields = line.split(",")
        try:
            if len(fields) != width:
                raise ValueError
            step = int(fields[i_step])
        except ValueError:
            torn += line.strip() != "" and line.rstrip("\r") != lines[0].rstrip("\r")
            continue
        in_order = in_order and step > last
        last = step
        rows[step] = fields
    if not in_order:
        rows = dict(sorted(rows.items()))
    problems = [f"{lib.count(torn, 'torn row')} skipped"] if torn else []

    val, tokens, num_nan = Points([], [], []), [], 0
    i_tokens = at.get("tokens")
    for step, f in rows.items():
        if f[i_loss].strip():
            loss = _float(f[i_loss])
            seconds = (
                _float(f[i_time]) if step else 0.0
            )  # at step 0 there is no time yet, and none is written
            if not math.isfinite(loss + seconds):
                num_nan += 1
                continue
            val.step.append(step)
            val.seconds.append(seconds)
            val.loss.append(loss)
            tokens.append(_float(f[i_tokens]) if i_tokens is not None else math.nan)
    if num_nan:
        problems.append(
            f"{lib.count(num_nan, 'validation')} without a finite loss and time, left out"
        )
    if not val.step:
        problems.append("no validation yet")
    trace, nan_at = _trace(list(rows.items()), at, most)
    if nan_at:
        problems.append(
            f"train_loss is not finite at {lib.count(len(nan_at), 'step')}, first at {nan_at[0]}"
        )
    return RunLog(run_id, seed, val, tokens, trace, tuple(problems))


def _trace(
    rows: Sequence[tuple[int, list[str]]], at: Mapping[str, int], most: int
) -> tuple[dict[str, list[float]], list[int]]:
    """All rows from step 1, thinned: losses and norms are means over neighbouring steps, throughput their median
    (a pause is one step), rate, time and tokens those of the last. And the steps whose loss is not finite."""
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
            ("train_loss", lib.mean),
            ("grad_norm", lib.mean),
            ("tokens_per_s", statistics.median),
        ):
            values = numbers(chunk, name)
            out[name].append(middle(values) if values else math.nan)
    return out, nan_at


# ----------------------------------------------------------------------------
# Groups and their lines


@dataclass(frozen=True)
class Group:
    """A cell, or a run that no results row knows, and its logs. `style` is its place in the table."""

    label: str
    style: int
    runs: tuple[RunLog, ...]
    baseline: "Group | None" = None

    @property
    def title(self) -> str:
        return f"{self.label} (n={len(self.runs)})"


def label_of(cell: Cell, shared: set[str]) -> str:
    """A cell in a legend: its gate, its rate, and whatever else tells it from the others."""
    words = []
    for key, value in cell.key.items():
        if key == "notes":
            words += [w for w in value.split() if w not in shared]
        elif value not in ("", "-"):
            words.append(value if key in BARE else f"{SHORT.get(key, key)} {value}")
    return " ".join(words)


def labels_of(cells: Sequence[Cell]) -> list[str]:
    """The cells' labels, without the notes that all share."""
    shared = (
        set.intersection(*(set(c.key.get("notes", "").split()) for c in cells))
        if len(cells) > 1
        else set()
    )
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
    """Mean validation loss at the steps that all runs have; x is their mean time or tokens there."""
    at = [dict(zip(r.val.step, zip(r.x(axis), r.val.loss, strict=True), strict=True)) for r in runs]
    steps = sorted(set.intersection(*map(set, at))) if at else []
    here = [[run[s] for run in at] for s in steps]
    good = [values for values in here if all(math.isfinite(x) for x, _ in values)]
    losses = [[loss for _, loss in values] for values in good]
    return Mean(
        [lib.mean([x for x, _ in v]) for v in good],
        [lib.mean(v) for v in losses],
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
    """Loss minus the baseline's at equal steps, time or tokens (the baseline interpolated linearly where it was not
    validated at that very place); low and high over the seeds that both ran, equal to the mean where there are
    none. Step 0 is left out: nothing has been learned."""
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
    """As many groups as can be told apart: baselines, then the lowest final losses; and how many are left out."""
    bases = {id(g.baseline) for g in groups if g.baseline}
    rank = lambda g: (id(g) not in bases, lib.mean([r.val.loss[-1] for r in g.runs]))
    kept = sorted(sorted(groups, key=rank)[:most], key=lambda g: g.style)
    return kept, len(groups) - len(kept)


# ----------------------------------------------------------------------------
# Figures


def style_of(i: int) -> dict[str, object]:
    return dict(
        color=lib.COLOURS[i % 7],
        linestyle=DASHES[i % 4],
        marker=MARKERS[i % 6],
        markersize=4.5,
        linewidth=1.5,
    )


def restyle(figure) -> None:
    """Give the lines of lib_results.loss_figure a dash and a marker each, so that a grey print can be read."""
    for axes in figure.axes:
        for i, line in enumerate(axes.lines):
            places = _every(i, len(line.get_xdata()))
            line.set(linestyle=DASHES[i % 4], marker=MARKERS[i % 6], markersize=4, markevery=places)
        if legend := axes.get_legend():
            axes.legend(
                frameon=False, fontsize=legend.get_texts()[0].get_fontsize(), loc="upper right"
            )


def _every(i: int, n: int) -> tuple[int, int]:
    """Which points get a marker: about ten, at other places for each line."""
    step = max(1, n // 10)
    return (i * max(1, step // 3)) % step, step


def plain(text: str) -> str:
    """Text as matplotlib shows it as it stands: no formulas."""
    return text.replace("$", r"\$")


def new_figure(height: float, rows: int = 1, **options):
    """A figure without pyplot: it needs no display and keeps no list of open windows. And its axes."""
    figure = lib.need("matplotlib.figure", "a figure").Figure(
        figsize=(WIDTH, height), layout="constrained"
    )
    return figure, figure.subplots(rows, 1, squeeze=False, **options)[:, 0]


def finish(figure, axes: Sequence, title: str, caption: str) -> None:
    for a in axes:
        a.grid(True, color="0.9", linewidth=0.8)
        a.set_axisbelow(True)
        a.spines[["top", "right"]].set_visible(False)
        a.tick_params(labelsize=9)
    figure.align_ylabels(axes)
    figure.suptitle(plain(title), fontsize=11)
    figure.supxlabel(plain(textwrap.fill(caption, 112)), fontsize=8, color="0.3")


def add_legend(axes, below, num: int, handles: tuple[list, list] | None = None) -> None:
    """Inside for a few lines of `axes`, below the lowest axes (its x label and ticks take half an inch) for many."""
    lines, labels = handles or axes.get_legend_handles_labels()
    if num <= 5 and all(len(label) < 45 for label in labels):
        axes.legend(lines, labels, frameon=False, fontsize=8.5, loc="best", handlelength=3)
        return
    height = below.get_position().height * below.figure.get_figheight()
    columns = 2 if max(map(len, labels)) < 52 else 1
    place = dict(loc="upper center", bbox_to_anchor=(0.45, -0.55 / height), borderaxespad=0)
    below.legend(lines, labels, frameon=False, fontsize=8, ncols=columns, handlelength=3, **place)


def axis_of(axis: str, largest: float) -> tuple[str, float]:
    """Label with its unit, and what to divide by."""
    if axis == "steps":
        return "optimizer steps", 1
    if axis == "tokens":
        unit, by = next(
            ((u, s) for u, s in (("billions", 1e9), ("millions", 1e6)) if largest >= s),
            ("count", 1),
        )
        return f"training tokens ({unit}, all ranks)", by
    unit, by = next(((u, s) for u, s in (("h", 3600), ("min", 60)) if largest > 5 * s), ("s", 1))
    return f"training time ({unit}; validation and saving not counted)", by


def n_words(ns: Sequence[int]) -> str:
    """How many runs a line is made of, for a caption."""
    found = sorted(set(ns))
    if found == [1]:
        return "n=1: each line is one run, no spread is known"
    n = f"n={found[0]} seeds" if len(found) == 1 else "n seeds as labelled"
    return (
        f"mean over {n}"
        + (", n=1 without a band" if found[0] == 1 else "")
        + "; band: smallest to largest"
    )


def loss_figure(groups: Sequence[Group], axis: str, title: str):
    """Validation loss against steps, time or tokens, and below it the difference to the baseline, where there is
    one: lines that nearly coincide above come apart there. None if no log says where on the axis it is."""
    groups, left_out = choose([g for g in groups if mean_line(g.runs, axis).x])
    if not groups:
        return None
    compared = [g for g in groups if g.baseline and difference_line(g, axis).x]
    ratios = dict(height_ratios=[3, 2]) if compared else {}
    figure, panels = new_figure(
        5.6 if compared else 4.2, 2 if compared else 1, sharex=True, gridspec_kw=ratios
    )
    label, by = axis_of(axis, max(mean_line(g.runs, axis).x[-1] for g in groups))

    def draw(axes, group: Group, line: Mean) -> None:
        x = [v / by for v in line.x]
        style = style_of(group.style)
        axes.plot(
            x, line.y, label=plain(group.title), markevery=_every(group.style, len(x)), **style
        )
        if len(group.runs) > 1:
            axes.fill_between(x, line.low, line.high, color=style["color"], alpha=0.18, linewidth=0)

    for g in groups:
        draw(panels[0], g, mean_line(g.runs, axis))
    if limits := lib.loss_limits(
        [lib.make_curve(g.label, [r.val for r in g.runs]) for g in groups]
    ):
        panels[0].set_ylim(*limits)
    panels[0].set_ylabel("validation loss\n(nats per token)", fontsize=10)
    if compared:
        late = []
        for g in compared:
            line = difference_line(g, axis)
            draw(panels[1], g, line)
            late += [v for x, lo, hi in zip(line.x, line.low, line.high, strict=True) for v in (lo, hi)
                     if x >= line.x[-1] / 4]  # fmt: skip
        panels[1].axhline(0, color="0.4", linewidth=1)
        low, high = min(*late, 0), max(*late, 0)
        pad = 0.08 * (high - low) or 0.01
        panels[1].set_ylim(low - pad, high + pad)
        panels[1].set_ylabel("difference to\nbaseline (nats)", fontsize=10)
    panels[-1].set_xlabel(label, fontsize=10)
    panels[-1].set_xlim(left=0)
    words = [n_words([len(g.runs) for g in groups]), "step 0 lies above the view"]
    if compared:
        words.append("lower panel: below 0 is better than the baseline" + _interpolated(axis))
    if left_out:
        words.append(
            f"{lib.count(left_out, 'more cell')} not drawn (baselines and lowest losses are)"
        )
    finish(figure, panels, title, "; ".join(words))
    add_legend(panels[0], panels[-1], len(groups))
    return figure


def _interpolated(axis: str) -> str:
    return ", which is interpolated to equal time" if axis == "time" else ""


@dataclass(frozen=True)
class Spread:
    """A cell's final losses: one per seed, their mean, and half the 95% interval of the mean (nan at n=1)."""

    values: list[float]
    mean: float
    half: float


def spread_of(cell: Cell) -> Spread:
    values = list(cell.values("final_val_loss").values())
    n = len(values)
    half = math.nan
    if n > 1:
        half = (
            float(lib.need("scipy.stats", "a confidence interval").t.ppf(0.975, n - 1))
            * lib.sd(values)
            / n**0.5
        )
    return Spread(values, lib.mean(values), half)


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
    return list(
        lines[:MOST_CELLS]
    ), f"; {lib.count(more, 'more cell')} not drawn" if more > 0 else ""


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
        filled = (
            dict(color=style["color"])
            if len(s.values) > 1
            else dict(facecolor="white", color=style["color"])
        )
        axes.scatter([s.mean], [i], marker=style["marker"], s=60, zorder=3, **filled)
        if len(s.values) > 1:
            places = [i + 0.22] * len(s.values)
            axes.scatter(
                s.values, places, marker="o", s=14, facecolor="white", edgecolor="0.15", zorder=4
            )
    axes.margins(x=0.08)
    axes.set_xlabel(
        "final validation loss (nats per token); the axis does not start at zero", fontsize=10
    )
    one = "; n=1 (open marker): no interval" if 1 in count.values() else ""
    finish(
        figure,
        [axes],
        title,
        f"large: mean over n seeds, bar: its 95% interval (t); small dots: seeds{one}{more}",
    )
    return figure


def forest_figure(table: Table, title: str):
    """Difference to the baseline per cell, with the interval and the test of the table."""
    lines, more = _cut([line for line in table.lines if line.comparison])
    if not lines:
        return None

    def words(line: Line) -> str:
        c, n = (
            line.comparison,
            [len(x.values("final_val_loss")) for x in (line.cell, line.baseline)],
        )
        ns = f"n={n[0]}" if n[0] == n[1] else f"n={n[0]} against {n[1]}"
        return (
            f"{ns}, {c.test}, Holm p={c.p_holm:.2g}" if c.chosen else f"{ns}: {c.test}, no interval"
        )

    figure, axes = _ladder(table, lines, words)
    places = {id(line): i for i, line in enumerate(table.lines)}
    for i, line in enumerate(lines):
        c, style = line.comparison, style_of(places[id(line)])
        if c.chosen:
            axes.plot(
                [c.chosen.lo, c.chosen.hi],
                [i, i],
                color=style["color"],
                linewidth=1.8,
                marker="|",
                zorder=2,
            )
        filled = (
            dict(color=style["color"])
            if c.chosen
            else dict(facecolor="white", color=style["color"])
        )
        axes.scatter([c.diff], [i], marker=style["marker"], s=50, zorder=3, **filled)
    axes.axvline(0, color="0.4", linewidth=1)
    axes.margins(x=0.08)
    axes.set_xlabel("difference to the baseline (nats per token); left of 0 is better", fontsize=10)
    finish(
        figure,
        [axes],
        title,
        f"bar: 95% confidence interval of one difference; p is adjusted for all (Holm){more}",
    )
    return figure


def rate_figure(table: Table, title: str):
    """Final loss against the learning rate, a line per configuration. None where the rate does not vary."""
    series: dict[tuple[str, ...], list[tuple[float, Line]]] = {}
    for line in table.lines:
        if (rate := lib.Row(line.cell.key, "", "").number("learning_rate")) > 0:
            rest = tuple(v for k, v in line.cell.key.items() if k != "learning_rate")
            series.setdefault(rest, []).append((rate, line))
    rates = sorted({rate for points in series.values() for rate, _ in points})
    if len(rates) < 2:
        return None
    figure, (axes,) = new_figure(4.2)
    ns = set()
    for i, (rest, points) in enumerate(series.items()):
        points.sort(key=lambda p: p[0])
        spreads = [spread_of(line.cell) for _, line in points]
        style, x = style_of(i), [rate for rate, _ in points]
        mine = sorted({len(s.values) for s in spreads})
        ns |= set(mine)
        n = f"n={mine[0]}" if len(mine) == 1 else f"n={mine[0]} to {mine[-1]}"
        label = " ".join(w for w in rest if w not in ("", "-"))
        axes.plot(x, [s.mean for s in spreads], label=plain(f"{label} ({n} per rate)"), **style)
        known = [(a, s) for a, s in zip(x, spreads, strict=True) if math.isfinite(s.half)]
        if known:
            a, y, half = zip(*((a, s.mean, s.half) for a, s in known), strict=True)
            axes.errorbar(
                a, y, yerr=half, color=style["color"], linestyle="none", capsize=4, elinewidth=1
            )
        for a, s in zip(x, spreads, strict=True):
            if len(s.values) > 1:
                beside = a + 0.012 * (1 + i % 3) * (rates[-1] - rates[0])
                axes.scatter(
                    [beside] * len(s.values),
                    s.values,
                    s=12,
                    facecolor="white",
                    edgecolor="0.15",
                    zorder=4,
                )
    if rates[-1] / rates[0] >= 4:
        axes.set_xscale("log")
    if len(rates) <= 8:
        axes.set_xticks(rates, [f"{r:g}" for r in rates])
        axes.set_xticks([], minor=True)
    axes.set_xlabel(
        "peak learning rate (AdamW" + ("; log scale)" if axes.get_xscale() == "log" else ")"),
        fontsize=10,
    )
    axes.set_ylabel("final validation loss\n(nats per token)", fontsize=10)
    add_legend(axes, axes, len(series))
    words = "line: mean over seeds; bar: its 95% interval (t); small dots beside: seeds; n in the legend"
    finish(figure, [axes], title, words + ("; n=1 has no interval" if 1 in ns else ""))
    return figure


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
    axes.set_ylabel("difference in final loss\n(nats per token); down is better", fontsize=10)
    one = "; open marker, n=1: no interval" if any(not x.comparison.chosen for x in lines) else ""
    rest = f"; {lib.count(more, 'more cell')} not drawn" if more > 0 else ""
    finish(figure, [axes], title, f"bars: 95% confidence intervals, n seeds per cell{one}{rest}")
    add_legend(axes, axes, len(lines))
    return figure


def trace_figure(groups: Sequence[Group], title: str):
    """Learning rate and throughput against steps. None where no log has them."""
    names = (
        ("lr", "learning rate\n(AdamW)"),
        ("tokens_per_s", "throughput\n(1000 tokens/s, all ranks)"),
    )
    has = lambda g, name: any(
        map(math.isfinite, (v for r in g.runs for v in r.trace.get(name, [])))
    )
    names = [(name, label) for name, label in names if any(has(g, name) for g in groups)]
    groups, left_out = choose([g for g in groups if any(has(g, name) for name, _ in names)])
    if not groups:
        return None
    figure, panels = new_figure(2.4 * len(names) + 0.8, len(names), sharex=True)
    for axes, (name, label) in zip(panels, names, strict=True):
        for g in groups:
            at = [
                dict(zip(r.trace["step"], r.trace[name], strict=True))
                for r in g.runs
                if r.trace["step"]
            ]
            steps = sorted(set.intersection(*map(set, at))) if at else []
            scale = 1e-3 if name == "tokens_per_s" else 1
            values = [[run[s] * scale for run in at if math.isfinite(run[s])] for s in steps]
            x = [s for s, v in zip(steps, values, strict=True) if v]
            values = [v for v in values if v]
            style = style_of(g.style)
            mean = [lib.mean(v) for v in values]
            axes.plot(x, mean, label=plain(g.title), markevery=_every(g.style, len(x)), **style)
            if len(g.runs) > 1:
                low, high = [min(v) for v in values], [max(v) for v in values]
                axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.set_ylabel(label, fontsize=10)
        if name == "lr":
            axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("optimizer steps", fontsize=10)
    panels[-1].set_xlim(left=0)
    rest = f"; {lib.count(left_out, 'more cell')} not drawn" if left_out else ""
    words = n_words([len(g.runs) for g in groups])
    finish(
        figure,
        panels,
        title,
        f"{words}; throughput: median over neighbouring steps, axis not from zero{rest}",
    )
    add_legend(panels[0], panels[-1], 99)
    return figure


def figure_bytes(figure, kind: str) -> bytes:
    """The figure as PNG (300 dpi) or SVG; the same figure gives the same bytes."""
    out = io.BytesIO()
    figure.draw_without_rendering()  # the layout is made before ticks get their final words; once more, it fits
    with lib.need("matplotlib", "a figure").rc_context(
        {"svg.hashsalt": "flatrun", "svg.fonttype": "path"}
    ):
        figure.savefig(
            out, format=kind, dpi=300, metadata={"Date": None} if kind == "svg" else None
        )
    return out.getvalue()


def from_curves(paths: Sequence[Path], rows: Sequence[Row]) -> tuple[dict[str, RunLog], list[str]]:
    """Validations of runs whose logs are elsewhere, from files with a run_id column (as of split_results.py), and
    what was wrong. Tokens are steps times the batch of the run's row."""
    by_id = {row["run_id"]: row for row in rows}
    logs, problems = {}, []
    for path in paths:
        runs, torn = lib.read_curves(path)
        problems += [f"{path}: {lib.count(torn, 'torn row')} skipped"] * bool(torn)
        for run_id, val in runs.items():
            row = by_id.get(run_id)
            batch = row.number("batch_size") * row.number("sequence_length") if row else math.nan
            trace: dict[str, list[float]] = {
                name: [] for name in ("step", "seconds", "tokens", *TRACES)
            }
            seed = lib.canon(row["seed"]) if row else ""
            logs[run_id] = RunLog(run_id, seed, val, [s * batch for s in val.step], trace)
    return logs, problems


def read_logs(
    rows: Sequence[Row], others: Sequence[str], folder: Path
) -> tuple[dict[str, RunLog], list[str]]:
    """The logs of these runs, and what was wrong, one line each."""
    logs, problems = {}, []
    for run_id, seed in {
        **{r["run_id"]: lib.canon(r["seed"]) for r in rows},
        **dict.fromkeys(others, ""),
    }.items():
        path = folder / run_id / "metrics.csv"
        try:
            log = read_log(path, run_id, seed)
        except UserError as error:
            problems.append(f"{error}; {run_id} is left out")
            continue
        problems += [f"{path}: {what}" for what in log.problems if what != "no validation yet"]
        if log.val.step:
            logs[run_id] = log
        else:
            problems.append(f"{path}: no validation yet; {run_id} is left out")
    return logs, problems
