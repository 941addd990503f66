"""eval_ood_depth3.py -- the original's depth-3 table, baseline against L2-H2 zeroed, beside one
that scores answers.

    python scripts/arith/eval_ood_depth3.py --checkpoint runs/pilot --data data/pilot
        # the original's model and records
    python scripts/arith/eval_ood_depth3.py --checkpoint runs/honest --sets depth3 depth3_control

The original's accuracy asks whether the end is predicted after the whole gold answer was read
(eos_after_gold); exact match asks for the answer. Both stand over what needs no model: always
saying "end", a calculator that reads no brackets, and the training data's most frequent answer.

Writes   ood.csv, ood.json and a figure: per set, metric and kind of ablation the baseline, the
         ablated score, the drop with its paired bootstrap interval, units lost and gained, and
         McNemar's p (of one head: nothing to adjust)
Gate     below an exact match of 50% the table says that a drop shows nothing about arithmetic
Raises   UserError: no such checkpoint, data set, layer or head
"""

import argparse
import re
from collections.abc import Sequence

import lib_ablation as ablation
import lib_heads as heads
import lib_tables as tables
import numpy as np
from lib_ablation import KINDS, Place
from lib_heads import LABELS, METRICS, Subject, TestSet

from arithmetic import evaluate_expr
from plumbing import UserError


def without_a_model(s: Subject, t: TestSet, common: int) -> dict[str, dict[str, float | None]]:
    """The scores of three answers that need no model. Only the first has a legacy score, which
    asks for no answer."""
    values, blind = (
        t.problems.values_N,
        [evaluate_expr(re.sub(r"[()]", "", expr)) for expr in t.exprs],
    )
    right = dict(
        always_end=np.zeros(len(values)),
        paren_blind=blind == values,
        most_frequent=values == common,
    )
    exact = {
        n: heads.units(np.stack([x] * 3, 1).astype(float), t.pairs)[:, 0].mean()
        for n, x in right.items()
    }
    return {
        name: dict(exact=float(x), eos=1.0 if name == "always_end" else None)
        for name, x in exact.items()
    }


def rows_of(s: Subject, t: TestSet, place: Place, seed: int) -> list[dict]:
    """A row per metric and kind of ablation."""
    items = heads.measure(s, t.problems)
    base, bank, rows = heads.units(items, t.pairs), ablation.Bank(s, t.problems, seed), []
    fit = bool(items[:, 0].mean() >= heads.GATE)
    for kind in KINDS:
        after = heads.units(heads.measure(s, t.problems, bank.hooks(place, kind)), t.pairs)
        low, high = tables.intervals(base - after)
        for m, metric in enumerate(METRICS):
            row = dict(
                model=s.name, set=t.name, units=t.n, place=str(place), kind=kind, metric=metric
            )
            row |= dict(
                competent=int(fit),
                baseline=float(base[:, m].mean()),
                ablated=float(after[:, m].mean()),
            )
            row |= dict(
                drop=float((base - after)[:, m].mean()), low=float(low[m]), high=float(high[m])
            )
            if metric != "logprob":
                lost, gained, p = tables.mcnemar(base[:, m], after[:, m])
                ends = tables.wilson(base[:, m].sum(), len(base))
                row |= dict(
                    base_low=ends[0], base_high=ends[1], lost=lost, gained=gained, mcnemar_p=p
                )
            rows.append(row)
    return rows


def tell(t: TestSet, rows: Sequence[dict], known: dict[str, dict], place: Place) -> None:
    """The original's table in its own numbers, then the honest one."""
    one = {row["metric"]: row for row in rows if row["kind"] == "zero"}
    eos = one["eos"]
    print(
        f"\n{t.name}: {t.n} {'minimal pairs' if t.pairs else 'items'}\n{'':32}baseline  {place} "
        f"zeroed    drop"
    )
    print(
        f"{'eos_after_gold (legacy), %':30}{100 * eos['baseline']:10.1f}"
        f"{100 * eos['ablated']:14.1f}"
        f"{100 * eos['drop']:8.1f}   McNemar p={eos['mcnemar_p']:.2g}"
    )
    print(f"{'  always end (no model), %':30}{100.0:10.1f}")
    exact = one["exact"]
    print(
        f"{'exact match, %':30}{100 * exact['baseline']:10.1f}{100 * exact['ablated']:14.1f}"
        f"{100 * exact['drop']:8.1f}   McNemar p={exact['mcnemar_p']:.2g}, 95% of the baseline "
        f"[{100 * exact['base_low']:.1f}, {100 * exact['base_high']:.1f}]"
    )
    for name, words in (
        ("always_end", "always end"),
        ("paren_blind", "brackets ignored"),
        ("most_frequent", "most frequent"),
    ):
        print(f"{f'  {words} (no model), %':30}{100 * known[name]['exact']:10.1f}")
    for kind in KINDS:
        log = next(row for row in rows if row["kind"] == kind and row["metric"] == "logprob")
        print(
            f"{f'log-prob per token, {kind}':30}{log['baseline']:10.3f}{log['ablated']:14.3f}"
            f"{log['drop']:8.3f}   "
            f"[{log['low']:.3f}, {log['high']:.3f}]"
        )
    if not exact["competent"]:
        print(
            f"  below the competence gate ({heads.GATE:.0%} exact match): a drop here shows "
            f"nothing about arithmetic"
        )


LINES = dict(
    always_end=("always end", ":"),
    paren_blind=("brackets ignored", "--"),
    most_frequent=("most frequent", "-."),
)


def draw_panel(
    panel,
    metric: str,
    place: Place,
    sets: Sequence[TestSet],
    rows: Sequence[dict],
    known: dict[str, dict],
) -> None:
    """The bars and lines of one metric."""
    for i, t in enumerate(sets):
        row = next(
            r for r in rows if (r["set"], r["metric"], r["kind"]) == (t.name, metric, "zero")
        )
        for j, key in enumerate(("baseline", "ablated")):
            value = row[key]
            ends = tables.wilson(value * t.n, t.n)
            error = [[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]]
            label = ("as trained", f"{place} zeroed")[j] if i == 0 else None
            panel.bar(
                i + 0.38 * j - 0.19,
                value,
                0.36,
                yerr=error,
                capsize=3,
                color=tables.COLOURS[j],
                label=label,
            )
        for name, (label, dash) in LINES.items():
            if (y := known[t.name][name][metric]) is not None:
                panel.plot(
                    [i - 0.42, i + 0.42],
                    [y, y],
                    dash,
                    color="black",
                    label=None if i else f"{label}: no model",
                )
    panel.set_xticks(range(len(sets)), [f"{t.name}\nn={t.n}" for t in sets], fontsize=8)
    panel.set_title(LABELS[metric], fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)


def figure_of(
    s: Subject, place: Place, sets: Sequence[TestSet], rows: Sequence[dict], known: dict[str, dict]
):
    """Baseline and zeroed side by side per set, with the answers that need no model as lines."""
    figure, axes = tables.new_figure(7.2, 3.4, 1, 2, sharey=True)
    for panel, metric in zip(axes[0], ("eos", "exact"), strict=True):
        draw_panel(panel, metric, place, sets, rows, known)
    legend = axes[0, 1].get_legend_handles_labels()  # the right panel has all of them
    figure.legend(*legend, fontsize=7, frameon=False, loc="outside lower center", ncols=5)
    axes[0, 0].set_ylim(0, 1.05)
    axes[0, 0].set_ylabel("fraction, 95% Wilson interval", fontsize=9)
    below = [
        r["set"]
        for r in rows
        if r["metric"] == "exact" and r["kind"] == "zero" and not r["competent"]
    ]
    figure.suptitle(
        f"{s.name}" + (f"; below the competence gate: {', '.join(below)}" if below else ""),
        fontsize=10,
    )
    return figure


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = heads.parser(__doc__)
    p.add_argument("--sets", nargs="+", default=["depth3"], metavar="NAME", help="default depth3")
    p.add_argument(
        "--layer", type=int, default=2, metavar="N", help="of the head; default 2, the original's"
    )
    p.add_argument("--head", type=int, default=2, metavar="N", help="default 2, the original's")
    ablation.add_sample_options(p)
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    a = arguments(argv)
    heads.need("scipy", "matplotlib")
    s, place = heads.load(a.checkpoint, a.device), Place(a.layer, a.head)
    if place not in ablation.places(s):
        raise UserError(
            f"{place}: {s.name} has layers 0 to {s.shape[0] - 1} and heads 0 to "
            f"{s.shape[1] - 1}; choose one"
        )
    sets = [heads.read_set(s, a.data, name, a.limit) for name in dict.fromkeys(a.sets)]
    common = heads.most_frequent(s)
    rows, known = [], {t.name: without_a_model(s, t, common) for t in sets}
    for t in sets:
        rows += (mine := rows_of(s, t, place, a.seed))
        tell(t, mine, known[t.name], place)
    out = tables.out_folder(a, "ood", [s])
    tables.write_csv(out / "ood.csv", rows)
    content = tables.provenance([s], [t.path for t in sets]) | dict(
        gate=heads.GATE, most_frequent_answer=common
    )
    tables.write_json(out / "ood.json", content | dict(without_a_model=known, rows=rows))
    tables.write_figure(out / "ood.png", figure_of(s, place, sets, rows, known))
    return 0


if __name__ == "__main__":
    heads.launch(main)
