"""probe_depth.py -- what a linear probe reads of nesting depth in every head and layer, beside
what needs no training.

    python scripts/arith/probe_depth.py --checkpoint runs/honest
        # fitted on data/study_test_paren, carried deeper
    python scripts/arith/probe_depth.py --checkpoint runs/pilot --original --data data/pilot
        # the original's set-up

Per character of an expression, two questions: is the depth above 0, and which depth. Probes are
logistic regressions on head outputs (hook_z) and on the residual stream behind each block. In the
same table:
  majority         the most frequent label
  character, position, previous character and sums of them   the same regression on one-hot
  features, no network
  untrained        the same network before its first step, 5 seeds: causal attention and token
  identity alone
  random labels    the same probe on labels drawn at random per (previous character, character,
                   position), as frequent as the real ones; selectivity is the balanced accuracy
                   minus that (Hewitt & Liang, arXiv 1909.03368)
Expressions of depth up to 2 are split by operands and operators into fit, dev and test (60/20/20):
no text, and no other grouping of it, is on two sides. Layer and head are chosen on dev, for every
network by itself, and reported on test.

Writes   probe.csv, a row per task, network and site: accuracy, balanced accuracy (chance is 1 /
         labels), balanced accuracy on what is no bracket, Spearman correlation with depth (ridge
         regression), and the same on each deeper set, where balanced accuracy is over the depths
         that were fitted; probe.json: sizes, majority, what was chosen; figures by layer, with the
         untrained networks as bands, and over depth
Depth    '(' counts itself, ')' does not: as in the records
Units    accuracies are fractions; Shapes: N characters, D features; x_ND has shape (N, D)
Raises   UserError: no such checkpoint or data set, no expression with brackets, no scikit-learn
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lib_heads as heads
import lib_probe as probes
import lib_tables as tables
import numpy as np
from lib_heads import Subject

import arithmetic
from plumbing import ROOT, UserError

DOCUMENTED = {
    "L2-H2": (0.8932, 0.8916),
    "L3-resid": (0.9993, 0.9991),
}  # the original's report: train, test accuracy
UNTRAINED = 5


# ----------------------------------------------------------------------------
# Figures


def by_layer(rows: Sequence[dict], task: str, network: str, kind: str, key: str) -> np.ndarray:
    """(networks, L): of a layer's heads the best on dev, or in the original's set-up (no dev)
    their mean."""
    mine = [
        r
        for r in rows
        if r["task"] == task and r["kind"] == kind and r["network"].startswith(network)
    ]
    names, layers = sorted({r["network"] for r in mine}), sorted({r["layer"] for r in mine})

    def value(name: str, layer: int) -> float:
        here = [r for r in mine if r["network"] == name and r["layer"] == layer]
        if kind == "resid" or "dev_balanced" in here[0]:
            return max(here, key=lambda r: r.get("dev_balanced", 0))[key]
        return float(np.mean([r[key] for r in here]))

    return np.array([[value(name, layer) for layer in layers] for name in names])


def draw_task(panel, task: str, rows: Sequence[dict], s: Subject, original: bool) -> None:
    """One task by layer."""
    key = "test_accuracy" if original else "test_balanced"
    layers = range(s.cfg.n_layer)
    for kind, colour, dash, words in (
        ("resid", tables.COLOURS[0], "-", "residual stream"),
        ("head", tables.COLOURS[1], "--", "heads"),
    ):
        what = words if kind == "resid" else f"{words}, {'mean' if original else 'best on dev'}"
        panel.plot(
            layers,
            by_layer(rows, task, "trained", kind, key)[0],
            dash,
            color=colour,
            marker="o",
            label=what,
        )
        band = by_layer(rows, task, "untrained", kind, key)
        panel.fill_between(layers, band.min(0), band.max(0), color=colour, alpha=0.2, linewidth=0)
        panel.plot(
            layers,
            band.mean(0),
            dash,
            color=colour,
            linewidth=0.8,
            label=f"{what}, untrained (n={len(band)})",
        )
    if not original:
        known = by_layer(rows, task, "trained", "resid", "random_labels_balanced")[0]
        panel.plot(
            layers, known, ":", color=tables.COLOURS[0], label="residual stream, random labels"
        )
    first, last = probes.FEATURES[0], probes.FEATURES[-1]
    without = {"majority": "majority", first: first, last: "+ position + previous"}
    for i, (site, words) in enumerate(without.items()):
        y = next(r[key] for r in rows if r["task"] == task and r["site"] == site)
        panel.axhline(
            y,
            color="0.35",
            linewidth=1,
            linestyle=("-", "-.", ":")[i],
            label=f"{words} (no network)",
        )
    mine = [r for r in rows if (r["network"], r["kind"], r["task"]) == ("trained", "head", task)]
    panel.plot([r["layer"] for r in mine], [r[key] for r in mine], ".", color=tables.COLOURS[1])
    panel.set_title(task, fontsize=9)
    panel.set_xticks(list(layers), [f"L{l}" for l in layers])
    panel.spines[["top", "right"]].set_visible(False)


def layer_figure(rows: Sequence[dict], s: Subject, original: bool):
    """Accuracy by layer: this network's line over the untrained networks' band, and lines for what
    needs no network."""
    tasks = probes.TASKS[:1] if original else probes.TASKS
    figure, axes = tables.new_figure(3.7 * len(tasks) + 1.2, 4.2, 1, len(tasks))
    for panel, task in zip(axes[0], tasks, strict=True):
        draw_task(panel, task, rows, s, original)
    axes[0, 0].set_ylabel("test accuracy" if original else "test balanced accuracy", fontsize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        fontsize=7,
        frameon=False,
        loc="outside lower center",
        ncols=2,
    )
    figure.suptitle(
        f"{s.name}: depth probes by layer; bands: untrained networks, smallest to largest",
        fontsize=9,
    )
    return figure


def transfer_figure(rows: Sequence[dict], s: Subject, deeper: Sequence[str]):
    """Fitted on depth up to 2: test, then deeper sets, at the site that dev chose."""
    names, panels = (
        ["test", *deeper],
        [
            ("depth>0", "balanced", "balanced accuracy, depth > 0"),
            ("depth", "spearman", "Spearman, depth"),
        ],
    )
    figure, axes = tables.new_figure(8.6, 4.0, 1, 2)
    for panel, (task, key, label) in zip(axes[0], panels, strict=True):
        get = lambda r: [r[f"{name}_{key}"] for name in names]  # noqa: B023  used at once
        for kind, colour in zip(probes.SITES, tables.COLOURS, strict=False):
            mine = [r for r in rows if r["task"] == task and r["kind"] == kind and r.get("chosen")]
            own = next(r for r in mine if r["network"] == "trained")
            band = np.array([get(r) for r in mine if r["network"] != "trained"])
            panel.plot(range(len(names)), get(own), "o-", color=colour, label=f"{own['site']}")
            panel.fill_between(
                range(len(names)),
                band.min(0),
                band.max(0),
                color=colour,
                alpha=0.2,
                linewidth=0,
                label=f"{kind}, untrained (n={len(band)})",
            )
        none = next(r for r in rows if r["task"] == task and r["site"] == probes.FEATURES[-1])
        panel.plot(range(len(names)), get(none), "x:", color="0.35", label=probes.FEATURES[-1])
        panel.set_xticks(range(len(names)), names, fontsize=8)
        panel.set_title(label, fontsize=9)
        panel.legend(fontsize=6.5, frameon=False, loc="best")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{s.name}: probes fitted on depth up to 2, carried deeper", fontsize=9)
    return figure


# ----------------------------------------------------------------------------


def records(s: Subject, prefix: Path, name: str, limit: int) -> list[str]:
    """The expressions with brackets of PREFIX_NAME.jsonl."""
    path = Path(f"{prefix}_{name}.jsonl")
    if not path.exists() and not (ROOT / path).exists():
        make = heads.how_to_make(prefix, name.removeprefix("test_"), s.cfg)
        raise UserError(f"{path}: no such data set; make it with: {make}")
    found = [e for e in arithmetic.read_records(str(path))[0] if "(" in e][: limit or None]
    if not found:
        raise UserError(
            f"{path}: no expression has brackets, so there is no depth to probe; give another set"
        )
    return found


def make_split(s: Subject, a: argparse.Namespace) -> probes.Split:
    """The original's: pilot_train against pilot_test_paren; ours: one set in three parts, and
    deeper ones."""
    if a.original:
        return probes.Split(
            probes.chars_of(records(s, a.data, "train", a.limit)),
            None,
            probes.chars_of(records(s, a.data, "test_paren", 0)),
        )
    exprs = [e for name in a.sets for e in records(s, a.data, f"test_{name}", a.limit)]
    exprs = [e for e in dict.fromkeys(exprs) if max(arithmetic.depth_labels(e)) <= 2]
    parts = probes.split_by_expression(exprs, a.seed)
    if not all(parts):
        raise UserError(
            f"--sets {' '.join(a.sets)}: {len(exprs)} expressions do not make a fit, dev and "
            f"test part; give more"
        )
    taken = {arithmetic.hash_expr(e) for e in exprs}
    deep = {
        n: [
            e
            for e in records(s, a.data, f"test_{n}", a.limit)
            if arithmetic.hash_expr(e) not in taken
        ]
        for n in a.deeper
    }
    return replace(
        probes.Split(*map(probes.chars_of, parts)),
        deeper={name: probes.chars_of(found) for name, found in deep.items()},
    )


def tell(rows: Sequence[dict], original: bool) -> None:
    """The table in short: what needs no network, untrained networks, this one."""
    key = "test_accuracy" if original else "test_balanced"
    for task in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == task]
        print(f"\n{task}: {key.replace('_', ' ')}")
        for r in (r for r in mine if r["network"] == "none"):
            print(f"  {r['site']:46}{r[key]:.4f}")
        for kind in probes.SITES:
            of_kind = [r for r in mine if r["kind"] == kind]
            sites = [
                r for r in of_kind if r["network"] == "trained" and (original or r.get("chosen"))
            ]
            for r in sites:
                others = [x for x in of_kind if x["network"] != "trained"]
                others = (
                    [x for x in others if x["site"] == r["site"]]
                    if original
                    else [x for x in others if x.get("chosen")]
                )
                values = [x[key] for x in others]
                words = (
                    f"  untrained {np.mean(values):.4f} [{min(values):.4f}, {max(values):.4f}]"
                    if values
                    else ""
                )
                words += f"  selectivity {r['selectivity']:.4f}" if "selectivity" in r else ""
                if original and r["site"] in DOCUMENTED:
                    words += "  documented train {:.4f} test {:.4f}".format(*DOCUMENTED[r["site"]])
                print(f"  {r['site']:10}fit {r['fit_accuracy']:.4f} test {r[key]:.4f}{words}")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = heads.parser(__doc__)
    p.add_argument(
        "--sets",
        nargs="+",
        default=["paren"],
        metavar="NAME",
        help="fit, dev and test; default paren",
    )
    deeper = ["depth3", "depth4", "depth5"]
    p.add_argument(
        "--deeper", nargs="*", default=deeper, metavar="NAME", help=f"default {' '.join(deeper)}"
    )
    what = "fit on PREFIX_train, test on PREFIX_test_paren, depth > 0 only, features not scaled"
    p.add_argument("--original", action="store_true", help=what)
    p.add_argument(
        "--untrained", type=int, default=UNTRAINED, metavar="N", help=f"seeds; default {UNTRAINED}"
    )
    p.add_argument(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="the first N expressions of a set; default: all",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the split; default 0")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    a, t0 = arguments(argv), time.process_time()
    heads.need("sklearn", "scipy", "matplotlib")
    if a.untrained < 1:
        raise UserError(
            f"--untrained {a.untrained}: without an untrained network a probe's number says "
            f"nothing; give 1 or more"
        )
    s = heads.load(a.checkpoint, a.device)
    split = make_split(s, a)
    sizes = {
        name: [len(c.exprs), len(c.char_N), int((c.depth_N > 0).sum())]
        for name, c in split.parts.items()
    }
    for name, (exprs, n, above) in sizes.items():
        print(
            f"{name}: {exprs:,} expressions, {n:,} characters, {n - above:,} at depth 0 and "
            f"{above:,} above"
        )
    width, rows = int(split.fit.position_N.max()) + 1, probes.majority_rows(split, a.original)
    for name in probes.FEATURES:
        x = {part: probes.one_hot(c, name, width) for part, c in split.parts.items()}
        known = dict(network="none", site=name, kind="features")
        rows += probes.probe_rows(x, split, a.original, known, control=True)
    rows += probes.network_rows(s.model, s, split, a.original, "trained", control=True)
    for seed in range(a.untrained):
        model = heads.untrained(s.cfg, 1000 + seed, s.world.device)
        rows += probes.network_rows(model, s, split, a.original, f"untrained {seed}", control=False)
        print(f"untrained {seed}: {time.process_time() - t0:.0f} s CPU so far", flush=True)
    out = tables.out_folder(a, "probe_original" if a.original else "probe", [s])
    tables.write_csv(out / "probe.csv", rows)
    content = tables.provenance([s], []) | dict(
        original=a.original, cpu_s=round(time.process_time() - t0, 1)
    )
    content |= dict(
        sizes={
            name: dict(zip(("expressions", "characters", "above_0"), v, strict=True))
            for name, v in sizes.items()
        }
    )
    content |= dict(
        chosen=[r for r in rows if r.get("chosen")],
        majority=[r for r in rows if r["site"] == "majority"],
    )
    tables.write_json(out / "probe.json", content)
    tables.write_figure(out / "layers.png", layer_figure(rows, s, a.original))
    if split.deeper:
        tables.write_figure(out / "transfer.png", transfer_figure(rows, s, list(split.deeper)))
    tell(rows, a.original)
    return 0


if __name__ == "__main__":
    heads.launch(main)
