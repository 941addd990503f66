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


def number(value: object, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}" if isinstance(value, float) else str(value)


def show_slots(heads: Sequence[dict]) -> None:
    show(
        "layer head slots  rank(entropy) rank(participation)  |cosine| (unrelated)  matter   loss change when zeroed"
    )
    for r in heads:
        change = f"{r['loss_change']:+.4f} +- {r['half']:.4f}"
        if r["head"] is None:
            show(
                f"{'all layers' if r['layer'] is None else r['layer']!s:10s} all slots zeroed: {change}"
            )
            continue
        show(
            f"{r['layer']:5d} {r['head']:4d} {r['slots']:5d}  {r['rank_entropy']:13.2f} "
            f"{r['rank_participation']:19.2f}  "
            f"{r['slot_cosine']:8.3f} ({r['cosine_if_unrelated']:.3f})       {r['slots_that_matter']:6d}   "
            f"{change} (its largest)"
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


AXES = dict(
    pairs=("pairs in the sequence", "eval_pairs"),
    length=("length of the sequence (tokens)", "eval_length"),
)


def figures(
    b: Bench, means: Sequence[dict], models: Sequence[Trained], rates: dict[str, float]
) -> Iterator[tuple]:
    """(name, figure): accuracy against pairs, length, and distance at each length; and the
    learning curves."""
    mixers, n = list(dict.fromkeys(r["mixer"] for r in means)), b.seeds
    budget = f"{b.steps} steps of {b.batch_size} sequences; trained with {b.pairs} pairs at length {b.length}"
    band = (
        f"n={n} seeds, band: smallest to largest"
        if n > 1
        else "n=1, band: 95% interval over sequences"
    )

    def drawn(
        lines: dict[str, list[tuple[float, float, float, float]]], label: str, what: str, log: bool
    ) -> object:
        figure, (axes,) = plots.new_figure(3.8)
        for i, (mixer, points) in enumerate(lines.items()):
            x, y, low, high = zip(*sorted(points), strict=True)
            style = plots.style_of(i)
            axes.plot(
                x,
                y,
                label=f"{mixer} ({next(m.n_params for m in models if m.mixer == mixer):,} parameters)",
                **style,
            )
            axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.axhline(
            tasks.chance(b.alphabet), color="0.4", linewidth=1, linestyle=":", label="chance"
        )
        if log:
            axes.set_xscale("log", base=2)
            ticks = sorted({p[0] for points in lines.values() for p in points})
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("accuracy (share of answers)", fontsize=10)
        axes.set_xlabel(label, fontsize=10)
        plots.finish(figure, [axes], f"{b.task}: {what}", f"{budget}; {band}")
        plots.add_legend(axes, axes, len(lines) + 1)
        return figure

    def points(**place: object) -> dict[str, list]:
        at = lambda r: (
            r[AXES[r["against"]][1]]
            if r["against"] in AXES
            else (r["distance_low"] + r["distance_high"]) / 2
        )
        here = [r for r in means if all(r[name] == value for name, value in place.items())]
        return {
            m: [(at(r), r["mean"], r["low"], r["high"]) for r in here if r["mixer"] == m]
            for m in mixers
        }

    for against, (label, _) in AXES.items():
        yield (
            f"{b.task}_{against}",
            drawn(points(against=against), label, f"accuracy against {against}", True),
        )
    for T in dict.fromkeys(r["eval_length"] for r in means if r["against"] == "distance"):
        lines, what = (
            points(against="distance", eval_length=T),
            f"accuracy against distance at length {T}",
        )
        yield (
            f"{b.task}_distance_{T}",
            drawn(lines, "distance from answer to query (tokens)", what, False),
        )
    curves = {}
    for mixer in mixers:
        each = [
            [a for _, a in m.curve] for m in models if (m.mixer, m.rate) == (mixer, rates[mixer])
        ]
        steps = [step for step, _ in next(m.curve for m in models if m.mixer == mixer)]
        curves[mixer] = [
            (s, float(np.mean(v)), min(v), max(v)) for s, *v in zip(steps, *each, strict=True)
        ]
    yield f"{b.task}_learning", drawn(curves, "optimizer steps", "accuracy while training", False)
