"""Figures of curves, and the style that all figures share.

Okabe and Ito's colours; dash and marker differ too, so that a grey print can be read.
Raises   UserError without matplotlib
"""

import io
import math
import textwrap
from collections.abc import Sequence

from lib.curves import Curve, loss_limits, make_curve
from lib.groups import Group, Mean, choose, difference_line, mean_line
from lib.program import count, need
from lib.stats import mean

# Okabe and Ito's eight without yellow, which vanishes on white; then the same with other dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


DASHES = ("-", "--", ":", "-.")


def side_by_side_figure(
    curves: Sequence[Curve], title: str, loss_unit: str
):  # -> matplotlib.figure.Figure, which may not be installed
    """Validation loss against steps and against training time. Raises UserError without
    matplotlib."""
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
    by_step.set_ylabel(f"validation loss ({loss_unit})")
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


MARKERS = ("o", "s", "^", "D", "v", "X")


DASHES = ("-", "--", "-.", ":")


WIDTH = 7.2  # inches: two columns of a paper


X_AXES = ("steps", "time", "tokens")


def style_of(i: int) -> dict[str, object]:
    return dict(
        color=COLOURS[i % 7],
        linestyle=DASHES[i % 4],
        marker=MARKERS[i % 6],
        markersize=4.5,
        linewidth=1.5,
    )


def restyle(figure) -> None:
    """Give the lines of loss_figure a dash and a marker each, so that a grey print
    can be read."""
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
    """A figure without pyplot: it needs no display and keeps no list of open windows. And its
    axes."""
    figure = need("matplotlib.figure", "a figure").Figure(
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
    """Inside for a few lines of `axes`, below the lowest axes (its x label and ticks take half
    an inch) for many."""
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


def loss_figure(groups: Sequence[Group], axis: str, title: str, loss_unit: str):
    """Validation loss against steps, time or tokens, and below it the difference to the
    baseline, where there is one: lines that nearly coincide above come apart there. None if no
    log says where on the axis it is."""
    groups, left_out = choose([g for g in groups if mean_line(g.runs, axis).x])
    if not groups:
        return None
    compared = [g for g in groups if g.baseline and difference_line(g, axis).x]
    ratios = dict(height_ratios=[3, 2]) if compared else {}
    figure, panels = new_figure(
        5.6 if compared else 4.2, 2 if compared else 1, sharex=True, gridspec_kw=ratios
    )
    label, by = axis_of(axis, max(mean_line(g.runs, axis).x[-1] for g in groups))
    for g in groups:
        _draw_mean(panels[0], g, mean_line(g.runs, axis), by)
    if limits := loss_limits([make_curve(g.label, [r.val for r in g.runs]) for g in groups]):
        panels[0].set_ylim(*limits)
    panels[0].set_ylabel(f"validation loss\n({loss_unit})", fontsize=10)
    if compared:
        _draw_differences(panels[1], compared, axis, by)
    panels[-1].set_xlabel(label, fontsize=10)
    panels[-1].set_xlim(left=0)
    words = [n_words([len(g.runs) for g in groups]), "step 0 lies above the view"]
    if compared:
        words.append("lower panel: below 0 is better than the baseline" + _interpolated(axis))
    if left_out:
        words.append(f"{count(left_out, 'more cell')} not drawn (baselines and lowest losses are)")
    finish(figure, panels, title, "; ".join(words))
    add_legend(panels[0], panels[-1], len(groups))
    return figure


def _draw_mean(axes, group: Group, line: Mean, by: float) -> None:
    """A mean line, its x divided by `by`, and the band from smallest to largest of its runs."""
    x = [v / by for v in line.x]
    style = style_of(group.style)
    places = _every(group.style, len(x))
    axes.plot(x, line.y, label=plain(group.title), markevery=places, **style)
    if len(group.runs) > 1:
        axes.fill_between(x, line.low, line.high, color=style["color"], alpha=0.18, linewidth=0)


def _draw_differences(axes, groups: Sequence[Group], axis: str, by: float) -> None:
    """Each group minus its baseline. The view holds the last three quarters of every line: early
    differences are much larger."""
    late = [0.0]
    for group in groups:
        line = difference_line(group, axis)
        _draw_mean(axes, group, line, by)
        for x, low, high in zip(line.x, line.low, line.high, strict=True):
            if x >= line.x[-1] / 4:
                late += [low, high]
    axes.axhline(0, color="0.4", linewidth=1)
    low, high = min(late), max(late)
    pad = 0.08 * (high - low) or 0.01
    axes.set_ylim(low - pad, high + pad)
    axes.set_ylabel("difference to\nbaseline (nats)", fontsize=10)


def _interpolated(axis: str) -> str:
    return ", which is interpolated to equal time" if axis == "time" else ""


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
            y = [mean(v) for v in values]
            axes.plot(x, y, label=plain(g.title), markevery=_every(g.style, len(x)), **style)
            if len(g.runs) > 1:
                low, high = [min(v) for v in values], [max(v) for v in values]
                axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.set_ylabel(label, fontsize=10)
        if name == "lr":
            axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("optimizer steps", fontsize=10)
    panels[-1].set_xlim(left=0)
    rest = f"; {count(left_out, 'more cell')} not drawn" if left_out else ""
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
    # the layout is made before ticks get their final words; once more, it fits
    figure.draw_without_rendering()
    with need("matplotlib", "a figure").rc_context(
        {"svg.hashsalt": "flatrun", "svg.fonttype": "path"}
    ):
        figure.savefig(
            out, format=kind, dpi=300, metadata={"Date": None} if kind == "svg" else None
        )
    return out.getvalue()
