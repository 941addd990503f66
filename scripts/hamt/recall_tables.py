"""recall_tables.py -- tables and figures of recall_bench.py, and its choice of a learning rate."""

import csv
import dataclasses
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone

import beside  # finds scripts/lib and the trainers
import numpy as np
import recall_tasks as tasks
import torch
from lib import plots
from recall_knobs import Bench
from recall_training import Trained

from plumbing import World


def show(line: str = "") -> None:
    print(line, flush=True)


def show_slots(heads: Sequence[dict]) -> None:
    show(
        "layer head slots  rank(entropy) rank(participation)  |cosine| (unrelated)  matter   loss "
        "change when zeroed"
    )
    for r in heads:
        change = f"{r['loss_change']:+.4f} +- {r['half']:.4f}"
        if r["head"] is None:
            layer = "all layers" if r["layer"] is None else str(r["layer"])
            show(f"{layer:10s} all slots zeroed: {change}")
            continue
        show(
            f"{r['layer']:5d} {r['head']:4d} {r['slots']:5d}  {r['rank_entropy']:13.2f} "
            f"{r['rank_participation']:19.2f}  "
            f"{r['slot_cosine']:8.3f} ({r['cosine_if_unrelated']:.3f})       "
            f"{r['slots_that_matter']:6d}   {change} (its largest)"
        )


def chosen(models: Sequence[Trained]) -> dict[str, float]:
    """The rate of each mixer with the best mean accuracy at the end of its curves; the first of
    equals."""
    best: dict[str, tuple[float, float]] = {}
    for mixer, rate in dict.fromkeys((m.mixer, m.rate) for m in models):
        mean = float(
            np.mean([m.curve[-1][1] for m in models if (m.mixer, m.rate) == (mixer, rate)])
        )
        if mixer not in best or mean > best[mixer][1]:
            best[mixer] = rate, mean
    return {mixer: rate for mixer, (rate, _) in best.items()}


PLACES = "against eval_pairs eval_length distance_low distance_high".split()


def over_seeds(rows: Sequence[dict]) -> list[dict]:
    """One row per mixer and place: mean, smallest and largest accuracy of the seeds, at the
    chosen rate. With one seed
    the interval is that of its own sequences."""
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        if r["chosen"]:
            groups.setdefault((r["mixer"], *(r.get(name) for name in PLACES)), []).append(r)
    out = []
    for (mixer, *place), found in groups.items():
        values = [r["accuracy"] for r in found]
        low, high = (
            (found[0]["low"], found[0]["high"]) if len(found) == 1 else (min(values), max(values))
        )
        mean = dict(
            n=len(found),
            mean=float(np.mean(values)),
            low=low,
            high=high,
            queries=sum(r["queries"] for r in found),
        )
        out.append(dict(mixer=mixer) | dict(zip(PLACES, place, strict=True)) | mean)
    return out


def show_accuracy(b: Bench, means: Sequence[dict], seeds: int) -> None:
    spread = "smallest to largest over seeds" if seeds > 1 else "95% interval over sequences"
    show(f"\naccuracy, mean over n={seeds} seeds ({spread}); chance {tasks.chance(b.alphabet):.4f}")
    mixers = list(dict.fromkeys(r["mixer"] for r in means))
    show(f"{'':30s}" + "".join(f"{m:>26s}" for m in mixers))
    for place in dict.fromkeys(tuple(r[name] for name in PLACES) for r in means):
        against, pairs, length, low, high = place
        name = dict(
            pairs=f"{pairs} pairs, length {length}", length=f"length {length}, {pairs} pairs"
        )
        name |= dict(distance=f"  distance {low}" + f" to {high}" * (high != low))
        cells = {r["mixer"]: r for r in means if tuple(r[n] for n in PLACES) == place}
        text = [
            f"{c['mean']:.3f} ({c['low']:.3f} to {c['high']:.3f})" if (c := cells.get(m)) else "-"
            for m in mixers
        ]
        show(f"{name[against]:30s}" + "".join(f"{t:>26s}" for t in text))


def table(rows: Sequence[dict]) -> str:
    """CSV with the columns of all rows, in the order in which they first occur."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: "" if value is None else value for name, value in row.items()} for row in rows
    )
    return out.getvalue()


def facts(b: Bench, w: World) -> dict:
    """With what, where and when."""
    found = dict(command=shlex.join(sys.orig_argv), git_commit=beside.git_commit())
    found |= dict(
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}",
        device=w.device_name(),
        torch=torch.__version__,
    )
    return found | dict(
        threads=torch.get_num_threads(), load=os.getloadavg()[0], flags=dataclasses.asdict(b)
    )


AXES = {
    "pairs": ("pairs in the sequence", "eval_pairs"),
    "length": ("length of the sequence (tokens)", "eval_length"),
}
Points = dict[str, list[tuple[float, float, float, float]]]  # x, mean, low, high by mixer


def points_of(means: Sequence[dict], **place: object) -> Points:
    """The rows at a place of the tables, as points over what they are measured against."""
    points: Points = {}
    for r in means:
        if any(r[name] != value for name, value in place.items()):
            continue
        if r["against"] in AXES:
            x = r[AXES[r["against"]][1]]
        else:
            x = (r["distance_low"] + r["distance_high"]) / 2
        points.setdefault(r["mixer"], []).append((x, r["mean"], r["low"], r["high"]))
    return points


def learning_curves(models: Sequence[Trained], rates: dict[str, float]) -> Points:
    """Accuracy on the sequences for selection while training, at each mixer's chosen rate."""
    curves: Points = {}
    for mixer, rate in rates.items():
        own = [m.curve for m in models if (m.mixer, m.rate) == (mixer, rate)]
        for at in zip(*own, strict=True):
            found = [accuracy for _, accuracy in at]
            point = at[0][0], float(np.mean(found)), min(found), max(found)
            curves.setdefault(mixer, []).append(point)
    return curves


def accuracy_figure(
    b: Bench, lines: Points, names: dict[str, str], label: str, what: str, is_log: bool = False
) -> object:
    """A line with a band for each mixer, and chance."""
    figure, (axes,) = plots.new_figure(3.8)
    for i, (mixer, points) in enumerate(lines.items()):
        x, y, low, high = zip(*sorted(points), strict=True)
        style = plots.style_of(i)
        axes.plot(x, y, label=names[mixer], **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    chance = tasks.chance(b.alphabet)
    axes.axhline(chance, color="0.4", linewidth=1, linestyle=":", label="chance")
    if is_log:
        axes.set_xscale("log", base=2)
        ticks = sorted({p[0] for points in lines.values() for p in points})
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("accuracy (share of answers)", fontsize=10)
    axes.set_xlabel(label, fontsize=10)
    band = "n=1, band: 95% interval over sequences"
    if b.seeds > 1:
        band = f"n={b.seeds} seeds, band: smallest to largest"
    caption = (
        f"{b.steps} steps of {b.batch_size} sequences; trained with {b.pairs} pairs at length "
        f"{b.length}; {band}"
    )
    plots.finish(figure, [axes], f"{b.task}: {what}", caption)
    plots.add_legend(axes, axes, len(lines) + 1)
    return figure


def figures(
    b: Bench, means: Sequence[dict], models: Sequence[Trained], rates: dict[str, float]
) -> Iterator[tuple[str, object]]:
    """(name, figure): accuracy against pairs, length, and distance at each length; and the
    learning curves.
    """
    names = {m.mixer: f"{m.mixer} ({m.n_params:,} parameters)" for m in models}
    for against, (label, _) in AXES.items():
        lines = points_of(means, against=against)
        what = f"accuracy against {against}"
        yield f"{b.task}_{against}", accuracy_figure(b, lines, names, label, what, is_log=True)
    lengths = dict.fromkeys(r["eval_length"] for r in means if r["against"] == "distance")
    label = "distance from answer to query (tokens)"
    for T in lengths:
        lines = points_of(means, against="distance", eval_length=T)
        what = f"accuracy against distance at length {T}"
        yield f"{b.task}_distance_{T}", accuracy_figure(b, lines, names, label, what)
    curves = learning_curves(models, rates)
    what = "accuracy while training"
    yield f"{b.task}_learning", accuracy_figure(b, curves, names, "optimizer steps", what)
