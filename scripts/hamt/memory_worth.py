"""memory_worth.py -- what a memory is worth, against how much text stands before a token.

    python scripts/run_study.py experiments/studies/hamt.toml --stage hamt_worth_1024
    python scripts/hamt/memory_worth.py --run HAMT_ID ... --against LOCAL_ID ...

Scores pairs of runs of train_gpu.py on the same windows of a text: HAMT, and its control with
MEMORY=local, whose layers read only what the same token wrote. Both predict every token of a
window, and the first token of a window has no text before it. So the difference of their losses by
a token's place in its window is what the memory brings from so many tokens.

Prints   for places 0, 1, 2-3, 4-7, ...: the loss of both, and how much lower that of the first is.
         With one pair of runs the interval is 95% over windows, with more from smallest to largest
Writes   OUT/memory_worth.csv, memory_worth.json and a figure as PNG and SVG
Units    losses and differences in nats per token, places in tokens
Raises   UserError: no such run, runs of different windows or texts, a text of less than two windows
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import numpy as np
import torch
import torch.nn.functional as F
from comparison_flags import one_number
from comparison_tables import csv_of, facts, markdown, save_figure, show
from lib import plots, program, runs
from slots import paired_change
from subjects import Ours

from plumbing import UserError, World
from plumbing.text_runs import open_text
from plumbing.text_scores import window_batches, window_starts
from plumbing.world import launch

COLUMNS = {
    "place": "tokens before",
    "loss": "loss",
    "against": "loss of the control",
    "worth": "difference",
    "low": "from",
    "high": "to",
    "runs": "n",
}


def load(name: str, logs: Path) -> Ours:
    folder = Path(name) if Path(name).is_dir() else runs.find_run(logs, name)
    return Ours({"path": str(runs.find_checkpoint(folder))}, torch.device("cpu"))


@torch.inference_mode()
def losses_by_place(ours: Ours, split: str, T: int, limit: int | None) -> np.ndarray:
    """(windows, T) nats of whole windows of the split, which do not overlap."""
    shards = open_text(ours.cfg, World(0, 1, ours.device))[1][split].shards
    starts = window_starts(shards, T, min(limit or shards.total, (shards.total - 1) // T))
    if len(starts) < 2:
        raise UserError(
            f"DATA={ours.cfg.data}: its {split} part has {shards.total} tokens, two windows of {T} "
            f"are needed; lower --window"
        )
    found = []
    for x_BT, y_BT in window_batches(shards, starts, T, num_rows=1):
        logits = ours.logits(x_BT)
        found.append(F.cross_entropy(logits[0].float(), y_BT[0], reduction="none").numpy())
    return np.stack(found)


def worth_of(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict]:
    """A row for each span of places, from the losses (windows, T) of both sides of each pair."""
    T = pairs[0][0].shape[1]
    edges = [0, *(2**i for i in range(T.bit_length()) if 2**i < T), T]
    rows = []
    for low, high in itertools.pairwise(edges):
        means = [[side[:, low:high].mean(1) for side in pair] for pair in pairs]
        changes = [paired_change(against, own) for own, against in means]
        worths = [change["loss_change"] for change in changes]
        worth = float(np.mean(worths))
        span = min(worths), max(worths)
        if len(pairs) == 1:
            span = worth - changes[0]["half"], worth + changes[0]["half"]
        row = {"place": str(low) if high == low + 1 else f"{low}-{high - 1}", "first": low}
        row["loss"] = float(np.mean([own.mean() for own, _ in means]))
        row["against"] = float(np.mean([against.mean() for _, against in means]))
        row |= {"worth": worth, "low": span[0], "high": span[1], "runs": len(pairs)}
        rows.append(row)
    return rows


def figure_of(rows: Sequence[dict], caption: str) -> object:
    figure, (axes,) = plots.new_figure(3.4)
    style = plots.style_of(0)
    x = [max(row["first"], 0.5) for row in rows]  # the first place is 0, the axis logarithmic
    axes.plot(x, [row["worth"] for row in rows], label="worth of the memory", **style)
    low, high = [row["low"] for row in rows], [row["high"] for row in rows]
    axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.axhline(0, color="0.4", linewidth=1, linestyle=":", label="none")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens before the one that is predicted", fontsize=10)
    axes.set_ylabel("nats per token", fontsize=10)
    plots.finish(figure, [axes], "what the memory is worth", caption)
    plots.add_legend(axes, axes, 2)
    return figure


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", nargs="+", required=True, metavar="ID", help="runs with the memory")
    add("--against", nargs="+", required=True, metavar="ID", help="as many runs without it")
    add("--split", choices=("val", "test"), default="test", help="part of the text (test)")
    add("--window", type=one_number, metavar="T", help="tokens; default: SEQUENCE_LENGTH")
    add("--windows", type=one_number, metavar="N", help="windows at most (all)")
    program.add_logs_option(parser)
    add("--out", default=str(program.ROOT / "experiments/memory_worth"), help="results folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    a = arguments(argv)
    if len(a.run) != len(a.against):
        raise UserError(
            f"{len(a.run)} runs and {len(a.against)} to compare with: give equally many"
        )
    program.need("matplotlib.figure", "a figure")  # said before anything is measured
    T, text, pairs = a.window, None, []
    for names in zip(a.run, a.against, strict=True):
        sides = []
        for name in names:
            ours = load(name, Path(a.logs_folder))
            T = T or ours.cfg.sequence_length
            text = text or (ours.cfg.data, ours.cfg.encoding)
            if (ours.cfg.data, ours.cfg.encoding) != text:
                raise UserError(f"{name}: trained on {ours.cfg.data}, the first run on {text[0]}")
            sides.append(losses_by_place(ours, a.split, T, a.windows))
        pairs.append(tuple(sides))
    rows = worth_of(pairs)
    whole = np.mean([(against - own).mean() for own, against in pairs])
    line = f"{len(pairs)} pair(s) of runs, {len(pairs[0][0])} windows of {T} tokens of {text[0]}"
    show(f"{line}, {a.split}: over all places {whole:.4f} nats\n\n{markdown(rows, COLUMNS)}")
    out = Path(a.out)
    program.write_whole(out / "memory_worth.csv", csv_of(rows))
    a.device, a.precision = "cpu", "fp32"
    found = facts(a) | {"run": a.run, "against": a.against, "rows": rows, "worth": float(whole)}
    program.write_whole(out / "memory_worth.json", json.dumps(found, indent=1) + "\n")
    save_figure(out, "memory_worth", figure_of(rows, line))


if __name__ == "__main__":
    launch(main)
