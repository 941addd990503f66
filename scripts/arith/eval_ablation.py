"""eval_ablation.py -- what every head and MLP is worth: each replaced by zero, its mean, or
another item's output.

    python scripts/arith/eval_ablation.py --checkpoint runs/honest   sets data/study_test_*.jsonl
    python scripts/arith/eval_ablation.py --checkpoint runs/honest_s1 runs/honest_s2
        # seeds, and how far heads agree
    python scripts/arith/eval_ablation.py --checkpoint runs/pilot --data data/pilot \\
        --sets flat paren depth3 --kinds zero --allow-incompetent      the original's scan

Writes   ablation.csv: per model, set, kind and place the drop of exact match, answer
         log-probability and the legacy metric with paired bootstrap intervals, units lost and
         gained, McNemar's p and Holm's over the heads of one kind and set (MLPs by themselves);
         impact.csv: the original's (drop on paren) - (drop on flat); seeds.csv: by layer over
         models; ablation.json: baselines, gate, who was named, agreement; a heat map per model and
         metric
Words    zero takes a model off its distribution; mean (over the set's items, by position relative
         to the answer) and resample (another item's output, the same position) do so less: read
         the three together
Gate     heads of a model are named on a set only where it does the task, exact match 50% or more;
         below, nothing is ablated unless --allow-incompetent, and all that is written says so.
         Exit code 1 when no set is left
Raises   UserError: no such checkpoint or data set, models of different shape
"""

import argparse
import time
from collections.abc import Sequence

import lib_ablation as ablation
import lib_heads as heads
import lib_tables as tables
import numpy as np
from lib_ablation import KINDS
from lib_agreement import Result, agreement, seed_rows
from lib_heads import LABELS, METRICS, Subject, TestSet

SETS = "flat paren pairs depth3 depth4 depth5".split()


def ablate(
    s: Subject, t: TestSet, kinds: Sequence[str], mlps: bool, allow: bool, seed: int
) -> Result:
    """Score the model as it is and, where it passes the gate, with every place replaced in every
    way."""
    t0, items = time.process_time(), heads.measure(s, t.problems)
    base = heads.units(items, t.pairs)
    if odd := int((heads.greedy_exact(s, t.problems) != items[:, 0]).sum()):
        print(
            f"{s.name} {t.name}: {odd} items where generating and scoring the gold text differ: "
            f"near ties"
        )
    if met := heads.could_have_trained_on(s, t.exprs):
        print(
            f"{s.name} {t.name}: {met} of {len(t.exprs)} expressions are not held out from its "
            f"training data"
        )
    exact = float(items[:, 0].mean())
    fit = heads.competent(exact, allow, s, t.name)
    ablated, bank = {}, ablation.Bank(s, t.problems, seed)
    if fit or allow:
        for place in sorted(
            ablation.places(s), key=lambda p: p.layer
        ):  # the bank holds one layer at a time
            for kind in kinds if mlps or place.head is not None else ():
                table = heads.measure(s, t.problems, bank.hooks(place, kind))
                ablated[kind, place] = heads.units(table, t.pairs)
    spent = time.process_time() - t0
    means = " ".join(
        f"{name}:{value:.4f}" for name, value in zip(METRICS, base.mean(0), strict=True)
    )
    print(
        f"{s.name} {t.name}: units:{t.n} {means} | {len(ablated)} ablations, {spent:.0f} s CPU",
        flush=True,
    )
    return Result(s, t, base, ablated, fit)


# ----------------------------------------------------------------------------
# Tables


def rows_of(r: Result, kinds: Sequence[str]) -> list[dict]:
    """A row per kind and place, heads and MLPs each with Holm's p over their own family."""
    rows = []
    for kind in kinds:
        for is_head in (True, False):
            family = [
                p
                for p in ablation.places(r.s)
                if (p.head is not None) == is_head and (kind, p) in r.ablated
            ]
            tests = [tables.mcnemar(r.base_NM[:, 0], r.ablated[kind, p][:, 0]) for p in family]
            adjusted = tables.holm([p for _, _, p in tests])
            for place, (lost, gained, p), p_holm in zip(family, tests, adjusted, strict=True):
                row = dict(
                    model=r.s.name,
                    seed=r.s.cfg.seed,
                    set=r.set.name,
                    units=r.set.n,
                    kind=kind,
                    place=str(place),
                )
                row |= dict(layer=place.layer, head="MLP" if place.head is None else place.head)
                row |= dict(
                    competent=int(r.competent), lost=lost, gained=gained, mcnemar_p=p, holm_p=p_holm
                )
                drop = r.drops(kind, place)
                low, high = tables.intervals(drop)
                for m, name in enumerate(METRICS):
                    row |= {f"{name}_base": float(r.base_NM[:, m].mean())}
                    row |= {f"{name}_drop": float(drop[:, m].mean())}
                    row |= {f"{name}_low": float(low[m]), f"{name}_high": float(high[m])}
                rows.append(row)
    return rows


def impact_rows(found: Sequence[Result], kinds: Sequence[str]) -> list[dict]:
    """The original's impact of each place, (drop on paren) - (drop on flat); the sets are
    resampled independently."""
    rows, by_set = [], {(r.s.name, r.set.name): r for r in found if r.ablated}
    for s in dict.fromkeys(r.s for r in found):
        paren, flat = by_set.get((s.name, "paren")), by_set.get((s.name, "flat"))
        if not paren or not flat:
            continue
        for kind, place in paren.ablated:
            drops = [r.drops(kind, place) for r in (paren, flat)]
            boot = [tables.resamplings(len(d), seed) @ d for seed, d in enumerate(drops)]
            low, high = np.quantile(boot[0] - boot[1], [0.025, 0.975], axis=0)
            row = dict(
                model=s.name,
                kind=kind,
                place=str(place),
                competent=int(paren.competent and flat.competent),
            )
            for m, name in enumerate(METRICS):
                impact = drops[0][:, m].mean() - drops[1][:, m].mean()
                row |= {
                    f"{name}_impact": float(impact),
                    f"{name}_low": float(low[m]),
                    f"{name}_high": float(high[m]),
                }
            rows.append(row)
    return rows


def named(rows: Sequence[dict]) -> list[dict]:
    """Heads that are claimed to matter: exact match falls, its interval excludes 0, and so does
    Holm's test at 5%."""
    keep = [r for r in rows if r["head"] != "MLP" and r["exact_low"] > 0 and r["holm_p"] < 0.05]
    keys = (
        "model",
        "set",
        "kind",
        "place",
        "competent",
        "exact_drop",
        "exact_low",
        "exact_high",
        "holm_p",
    )
    return [{key: r[key] for key in keys} for r in sorted(keep, key=lambda r: -r["exact_drop"])]


# ----------------------------------------------------------------------------
# Figure


def figure_of(
    s: Subject,
    found: Sequence[Result],
    rows: Sequence[dict],
    kinds: Sequence[str],
    metric: str,
    mlps: bool,
):
    """Head by layer, a panel per kind and set; MLPs in a column of their own."""
    (L, H), sets = s.shape, [r for r in found if r.s is s and r.ablated]
    W = H + mlps
    figure, axes = tables.new_figure(
        1.2 + (0.5 * W + 0.3) * len(sets),
        1.3 + (0.42 * L + 0.6) * len(kinds),
        len(kinds),
        len(sets),
    )
    mine = [r for r in rows if r["model"] == s.name]
    limit = max([abs(r[f"{metric}_drop"]) for r in mine if r["head"] != "MLP"] + [1e-3])
    for i, kind in enumerate(kinds):
        for j, r in enumerate(sets):
            values, marked = np.full((L, W), np.nan), np.zeros((L, W), bool)
            for row in mine:
                if row["kind"] == kind and row["set"] == r.set.name:
                    at = row["layer"], H if row["head"] == "MLP" else row["head"]
                    values[at] = row[f"{metric}_drop"]
                    marked[at] = row[f"{metric}_low"] > 0 or row[f"{metric}_high"] < 0
            image = tables.heat(axes[i, j], values, limit, marked_YX=marked)
            axes[i, j].set_xticks(range(W), [*(f"H{h}" for h in range(H)), *["MLP"] * mlps])
            axes[i, j].set_yticks(range(L), [f"L{l}" for l in range(L)])
            base, below = (
                r.base_NM[:, METRICS.index(metric)].mean(),
                "" if r.competent else "\nBELOW THE GATE",
            )
            axes[i, j].set_title(
                f"{r.set.name}, {kind}: {base:.2f} before (n={r.set.n}){below}", fontsize=7
            )
    figure.colorbar(image, ax=axes, shrink=0.6).set_label(f"drop of {LABELS[metric]}", fontsize=8)
    figure.suptitle(f"{s.name}: one place ablated", fontsize=11)
    words = "framed, bold: the 95% paired bootstrap\ninterval excludes 0; "
    words += "colours end at the strongest head"
    figure.supxlabel(words, fontsize=8, color="0.3")
    return figure


# ----------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = heads.parser(__doc__, several=True)
    p.add_argument(
        "--sets", nargs="+", default=SETS, metavar="NAME", help=f"default {' '.join(SETS)}"
    )
    p.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="default: all")
    p.add_argument("--no-mlps", action="store_true", help="heads only")
    ablation.add_sample_options(p)
    p.add_argument(
        "--allow-incompetent", action="store_true", help="ablate below the competence gate too"
    )
    return p.parse_args(argv)


def tell(found: Sequence[Result], rows: Sequence[dict], kinds: Sequence[str]) -> None:
    """The strongest heads of each model and set, on the console."""
    for r in found:
        for kind in kinds if r.ablated else ():
            mine = [
                x
                for x in rows
                if x["model"] == r.s.name and x["set"] == r.set.name and x["kind"] == kind
            ]
            mine = sorted((x for x in mine if x["head"] != "MLP"), key=lambda x: -x["exact_drop"])[
                :3
            ]
            words = [
                f"{x['place']} {x['exact_drop']:+.3f} [{x['exact_low']:+.3f}, "
                f"{x['exact_high']:+.3f}] Holm "
                f"p={x['holm_p']:.2g}"
                for x in mine
            ]
            mark = "" if r.competent else " BELOW THE COMPETENCE GATE:"
            print(f"{r.s.name} {r.set.name} {kind}:{mark} drop of exact match " + "; ".join(words))


def baselines_of(found: Sequence[Result]) -> list[dict]:
    """Each model on each set, as it is."""
    rows = []
    for r in found:
        base = dict(
            model=r.s.name,
            set=r.set.name,
            units=r.set.n,
            competent=r.competent,
            ablated=bool(r.ablated),
        )
        rows.append(base | dict(zip(METRICS, r.base_NM.mean(0).tolist(), strict=True)))
    return rows


def tell_agreement(rows: Sequence[dict]) -> None:
    for row in rows:
        if row["metric"] != "eos" and row["pairs"]:
            print(
                f"seeds {row['set']} {row['kind']} {row['metric']}: tau "
                f"{row['kendall_tau']:.2f}, W "
                f"{row['kendall_w']:.2f}, p {row['p_over_model']:.3f}, within layers "
                f"{row['p_within_layers']:.3f}; "
                f"top {row['top_head']}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    a = arguments(argv)
    heads.need("scipy", "matplotlib")
    subjects = heads.load_all(a.checkpoint, a.device)
    sets = {
        (s, name): heads.read_set(s, a.data, name, a.limit)
        for s in subjects
        for name in dict.fromkeys(a.sets)
    }
    mlps, kinds = not a.no_mlps, [kind for kind in KINDS if kind in a.kinds]
    found = [ablate(s, t, kinds, mlps, a.allow_incompetent, a.seed) for (s, _), t in sets.items()]
    rows = [row for r in found for row in rows_of(r, kinds)]
    out = tables.out_folder(a, "ablation", subjects)
    content = tables.provenance(subjects, [t.path for t in sets.values()])
    content |= dict(gate=heads.GATE, allow_incompetent=a.allow_incompetent, named=named(rows))
    content["baselines"] = baselines_of(found)
    content["agreement"] = agreement(found, kinds)
    tables.write_json(out / "ablation.json", content)
    if not rows:
        print(
            f"{out}/ablation.json: baselines only; no model passes the gate on any set, so no "
            f"head is named"
        )
        return 1
    tables.write_csv(out / "ablation.csv", rows)
    for name, table in dict(
        impact=impact_rows(found, kinds), seeds=seed_rows(found, kinds, mlps)
    ).items():
        if table:
            tables.write_csv(out / f"{name}.csv", table)
    tell(found, rows, kinds)
    tell_agreement(content["agreement"])
    for s in subjects:
        if any(r.ablated for r in found if r.s is s):
            for metric in METRICS:
                figure = figure_of(s, found, rows, kinds, metric, mlps)
                tables.write_figure(out / f"heads_{s.name}_{metric}.png", figure)
    return 0


if __name__ == "__main__":
    heads.launch(main)
