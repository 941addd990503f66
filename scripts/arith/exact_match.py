"""exact_match.py -- how exact match falls with more operands, more digits, and deeper nesting than
in training.

    python scripts/arith/exact_match.py --checkpoint runs/honest_s1
    python scripts/arith/exact_match.py --checkpoint runs/honest_s1 runs/honest_s2 --sets depth3

Generated here, from the expressions that training with TRAIN_PATH=generate never draws:
  operands   2, 3, ... each, the training's depths and operand sizes
  digits     operands of 1, 2, 3 digits only, as many operands as the training's most
  cells      every operand count with every depth it allows, operands of the training's size
and read from PREFIX_test_NAME.jsonl, where depth3, depth4 and depth5 stand beside controls of the
same operands, operators and length, nested at most 2 deep. What a fixed number of answer digits
cannot write is left out and counted.

Writes   exact_match.csv, a row per model and cell: exact match with its 95% Wilson interval,
         digits right given the gold ones before, answers that end, and what needs no model:
         brackets ignored, the most frequent answer; exact_match.json, the same with what it came
         from; a figure with each model's points and their mean
Units    fractions of items; an item is one expression, answered greedily
Raises   UserError: no such checkpoint or data set, ranges with too few expressions
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import lib_heads as heads
import lib_tables as tables
import numpy as np
from lib_heads import Subject

import arithmetic
import train_arith
from arithmetic import EOS
from plumbing import UserError
from plumbing.problem_scores import SCORES, summary
from plumbing.problems import Problems

SETS = "flat paren depth3 depth3_control depth4 depth4_control depth5 depth5_control".split()


def flags_of(changes: Mapping[str, int]) -> str:
    """A cell in the words of the command line."""
    if "depth_min" in changes:
        return f"the cell of {changes['operands_min']} operands, depth {changes['depth_min']}"
    if "operand_min" in changes:
        return f"--digits {len(str(changes['operand_max']))}"
    return f"--operands {changes['operands_min']}"


def drawn(s: Subject, items: int, **changes: int) -> tuple[Problems, int]:
    """Held-out problems, the same for every model, and how many more were left out because the
    model's answers have too few digits for their values. Raises UserError where there are not
    enough."""
    try:
        language = replace(s.language, operands_weights="", **changes)
    except ValueError as error:
        what = f"leave it out, or take another model ({error})"
        raise UserError(f"{flags_of(changes)}: {what}") from None
    try:
        found = arithmetic.draw_split(language, np.random.default_rng(0), items, "test")
    except UserError as error:
        raise UserError(f"--items {items} at {flags_of(changes)}: {error}") from None
    fits = heads.writable(s, found.values_N)
    return found.rows(np.flatnonzero(fits)), int((~fits).sum())


def generated(s: Subject, operands: Sequence[int], digits: Sequence[int], items: int):
    """(sweep, cell, problems, left out) of everything that is drawn here."""
    for n in operands:
        yield "operands", str(n), *drawn(s, items, operands_min=n, operands_max=n)
    most = s.cfg.operands_max
    for d in digits:
        span = dict(operand_min=10 ** (d - 1) if d > 1 else 1, operand_max=10**d - 1)
        yield "digits", str(d), *drawn(s, items, operands_min=most, operands_max=most, **span)
    for n in range(s.cfg.operands_min, most + 1):
        for depth in range(s.cfg.depth_min, s.cfg.depth_max + 1):
            if arithmetic.templates(n, depth, s.cfg.grammar):
                shape = dict(operands_min=n, operands_max=n, depth_min=depth, depth_max=depth)
                yield "cells", f"{n} operands, depth {depth}", *drawn(s, items, **shape)


def row_of(
    s: Subject, sweep: str, cell: str, problems: Problems, left_out: int, common: int
) -> dict:
    if not len(problems):
        raise UserError(
            f"{sweep} {cell}: {s.name} writes {s.digits} digits, too few for any; leave it out"
        )
    table = train_arith.score(s.model, problems, s.cfg, s.world)
    mean, n = summary(table), len(problems)
    low, high = tables.wilson(table[:, SCORES.index("exact")].sum(), n)
    without = [
        arithmetic.evaluate_expr(re.sub(r"[()]", "", e))
        for e in arithmetic.exprs_of(problems, s.language)
    ] == problems.values_N
    row = dict(model=s.name, seed=s.cfg.seed, sweep=sweep, cell=cell, items=n, left_out=left_out)
    row |= dict(
        exact=mean["exact_match"],
        low=low,
        high=high,
        digits_right=mean["digit_accuracy"],
        ended=float(np.mean([text[-1] == EOS for text in heads.answers(s, problems)])),
    )
    return row | dict(
        paren_blind=float(without.mean()), most_frequent=float((problems.values_N == common).mean())
    )


def draw_sweep(panel, sweep: str, rows: Sequence[dict], trained: dict[str, Sequence[str]]) -> None:
    """The models of one sweep, their mean, and what needs no model."""
    cells = list(dict.fromkeys(r["cell"] for r in rows if r["sweep"] == sweep))
    values = [[r["exact"] for r in rows if (r["sweep"], r["cell"]) == (sweep, c)] for c in cells]
    blind = [
        float(np.mean([r["paren_blind"] for r in rows if (r["sweep"], r["cell"]) == (sweep, c)]))
        for c in cells
    ]
    for i, cell in enumerate(cells):
        if cell in trained[sweep]:
            panel.axvspan(i - 0.5, i + 0.5, color="0.93", zorder=0, linewidth=0)
        panel.plot(
            [i] * len(values[i]),
            values[i],
            "o",
            color=tables.COLOURS[0],
            markersize=4,
            alpha=0.6,
            clip_on=False,
        )
    n, joined = len(values[0]), sweep != "sets"
    panel.plot(
        range(len(cells)),
        [float(np.mean(v)) for v in values],
        "-" if joined else "_",
        color=tables.COLOURS[0],
        markersize=14,
        label=f"mean of {n} model{'s' * (n > 1)}",
    )
    panel.plot(
        range(len(cells)),
        blind,
        ":" if joined else "_",
        color="0.3",
        markersize=14,
        label="brackets ignored",
    )
    panel.set_xticks(range(len(cells)), [c.replace("_", "\n") for c in cells], fontsize=8)
    panel.set_xlabel(
        dict(operands="operands", digits="digits of each operand", sets="test set")[sweep],
        fontsize=9,
    )
    panel.set_ylim(0, 1.03)
    panel.spines[["top", "right"]].set_visible(False)


def figure_of(rows: Sequence[dict], trained: dict[str, Sequence[str]]):
    """A panel per sweep but `cells`: points are models, the line is their mean; grey is what was
    trained on."""
    sweeps = [
        name for name in ("operands", "digits", "sets") if any(r["sweep"] == name for r in rows)
    ]
    widths = [
        max(2.2, 0.62 * len({r["cell"] for r in rows if r["sweep"] == name})) for name in sweeps
    ]
    figure, axes = tables.new_figure(
        1.0 + sum(widths), 3.6, 1, len(sweeps), sharey=True, width_ratios=widths
    )
    for panel, sweep in zip(axes[0], sweeps, strict=True):
        draw_sweep(panel, sweep, rows, trained)
    axes[0, 0].set_ylabel("exact match", fontsize=9)
    axes[0, 0].legend(fontsize=7, frameon=False, loc="lower left")
    figure.suptitle("Held-out exact match; grey: as in training", fontsize=10)
    return figure


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = heads.parser(__doc__, several=True)
    p.add_argument(
        "--sets", nargs="*", default=SETS, metavar="NAME", help=f"default {' '.join(SETS)}"
    )
    p.add_argument(
        "--operands",
        nargs="*",
        type=int,
        default=[2, 3, 4, 5, 6],
        metavar="N",
        help="default 2 to 6",
    )
    p.add_argument(
        "--digits", nargs="*", type=int, default=[1, 2, 3], metavar="N", help="default 1 to 3"
    )
    p.add_argument(
        "--items", type=int, default=500, metavar="N", help="of each generated cell; default 500"
    )
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    a = arguments(argv)
    if a.items < 1 or min([2, *a.operands]) < 2 or min([1, *a.digits]) < 1:
        raise UserError("--items, --operands and --digits: expected at least 1, 2 and 1")
    heads.need("scipy", "matplotlib")
    subjects, rows, files = heads.load_all(a.checkpoint, a.device), [], {}
    sets = {
        (s, name): heads.read_set(s, a.data, name)
        for s in subjects
        for name in dict.fromkeys(a.sets)
    }
    for s in subjects:
        common, mine = heads.most_frequent(s), len(rows)
        for name in dict.fromkeys(a.sets):
            t = sets[s, name]
            files[t.path] = t
            rows.append(row_of(s, "sets", name, t.problems, t.left_out, common))
        for sweep, cell, problems, left_out in generated(s, a.operands, a.digits, a.items):
            rows.append(row_of(s, sweep, cell, problems, left_out, common))
        for r in rows[mine:]:
            words = f"{r['exact']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
            words += f", brackets ignored {r['paren_blind']:.3f}"
            print(
                f"{s.name} {r['sweep']} {r['cell']}: n:{r['items']} exact match {words}"
                + (f", {r['left_out']} left out" if r["left_out"] else ""),
                flush=True,
            )
    out, cfg = tables.out_folder(a, "exact_match", subjects), subjects[0].cfg
    tables.write_csv(out / "exact_match.csv", rows)
    tables.write_json(
        out / "exact_match.json", tables.provenance(subjects, list(files)) | dict(rows=rows)
    )
    trained = dict(
        operands=[str(n) for n in range(cfg.operands_min, cfg.operands_max + 1)],
        sets=["flat", "paren"],
    )
    trained["digits"] = [
        str(d) for d in range(len(str(cfg.operand_min)), len(str(cfg.operand_max)) + 1)
    ]
    tables.write_figure(out / "exact_match.png", figure_of(rows, trained))
    return 0


if __name__ == "__main__":
    heads.launch(main)
