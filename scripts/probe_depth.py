"""probe_depth.py -- what a linear probe reads of nesting depth in every head and layer, beside what needs no training.

    python scripts/probe_depth.py --checkpoint runs/honest           fitted on data/study_test_paren, carried deeper
    python scripts/probe_depth.py --checkpoint runs/pilot --original --data data/pilot        the original's set-up

Per character of an expression, two questions: is the depth above 0, and which depth. Probes are logistic regressions on
head outputs (hook_z) and on the residual stream behind each block. In the same table:
  majority         the most frequent label
  character, position, previous character and sums of them   the same regression on one-hot features, no network
  untrained        the same network before its first step, 5 seeds: causal attention and token identity alone
  random labels    the same probe on labels drawn at random per (previous character, character, position), as frequent
                   as the real ones; selectivity is the balanced accuracy minus that (Hewitt & Liang, arXiv 1909.03368)
Expressions of depth up to 2 are split by operands and operators into fit, dev and test (60/20/20): no text, and no
other grouping of it, is on two sides. Layer and head are chosen on dev, for every network by itself, and reported on
test.

Writes   probe.csv, a row per task, network and site: accuracy, balanced accuracy (chance is 1 / labels), balanced
         accuracy on what is no bracket, Spearman correlation with depth (ridge regression), and the same on each deeper
         set, where balanced accuracy is over the depths that were fitted; probe.json: sizes, majority, what was chosen;
         figures by layer, with the untrained networks as bands, and over depth
Depth    '(' counts itself, ')' does not: as in the records
Units    accuracies are fractions; Shapes: N characters, D features; x_ND has shape (N, D)
Raises   UserError: no such checkpoint or data set, no expression with brackets, no scikit-learn
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import lib_heads as heads
import numpy as np
import torch
from lib.plots import COLOURS
from lib_heads import Subject

import train_arith as arith
from plumbing import HERE, UserError
from train_arith import CompactTransformer

TASKS = ("depth>0", "depth")
FEATURES = (
    "character",
    "position",
    "previous character",
    "character+position",
    "character+position+previous character",
)
DOCUMENTED = {
    "L2-H2": (0.8932, 0.8916),
    "L3-resid": (0.9993, 0.9991),
}  # the original's report: train, test accuracy
UNTRAINED = 5
SITES = ("resid", "head")


@dataclass(frozen=True)
class Chars:
    """The characters of a list of expressions, one after the other."""

    exprs: list[str]
    char_N: np.ndarray
    previous_N: np.ndarray
    position_N: np.ndarray
    depth_N: np.ndarray

    @property
    def plain_N(self) -> np.ndarray:
        """Whether a character is no bracket."""
        return ~np.isin(self.char_N, [arith.IDS["("], arith.IDS[")"]])

    def labels(self, task: str) -> np.ndarray:
        return self.depth_N if task == "depth" else (self.depth_N > 0).astype(int)


def chars_of(exprs: Sequence[str]) -> Chars:
    ids = [arith.encode(expr, special=False) for expr in exprs]
    flat = lambda rows: np.array([x for row in rows for x in row])
    previous = flat([arith.BOS, *row[:-1]] for row in ids)
    depth = flat(arith.depth_labels(expr) for expr in exprs)
    return Chars(list(exprs), flat(ids), previous, flat(range(len(row)) for row in ids), depth)


@dataclass(frozen=True)
class Split:
    """Characters by use: fit, dev (none in the original's set-up), test, and the deeper sets by their names."""

    fit: Chars
    dev: Chars | None
    test: Chars
    deeper: dict[str, Chars] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Chars]:
        return (
            dict(fit=self.fit)
            | (dict(dev=self.dev) if self.dev else {})
            | dict(test=self.test)
            | self.deeper
        )


def split_by_expression(exprs: Sequence[str], seed: int) -> tuple[list[str], list[str], list[str]]:
    """60, 20 and 20%, by what an expression is without its brackets."""
    keys = np.array([arith.hash_expr(expr) for expr in exprs], np.uint64)
    groups = np.random.default_rng(seed).permutation(np.unique(keys))
    place = dict(zip(groups.tolist(), (np.arange(len(groups)) / len(groups)).tolist(), strict=True))
    parts: tuple[list[str], ...] = ([], [], [])
    for expr, key in zip(exprs, keys.tolist(), strict=True):
        parts[(place[key] >= 0.6) + (place[key] >= 0.8)].append(expr)
    return parts


# ----------------------------------------------------------------------------
# Features


@torch.no_grad()
def activations(
    model: CompactTransformer,
    k: arith.Knobs,
    exprs: Sequence[str],
    device: torch.device,
    batch: int = 256,
):
    """(N, D) float64 by site, (kind, layer, head or None): every head's hook_z and the stream behind every block."""
    keep = lambda name: name.endswith(("attn.hook_z", "hook_resid_post"))
    found: dict[tuple, list] = {}
    for at in range(0, len(exprs), batch):
        rows = [[arith.BOS, *arith.encode(e, special=False)] for e in exprs[at : at + batch]]
        T = max(map(len, rows))
        ids = torch.tensor([row + [arith.PAD] * (T - len(row)) for row in rows], device=device)
        real = torch.tensor([[0 < t < len(row) for t in range(T)] for row in rows], device=device)
        _, cache = model.run_with_cache(ids, keep)
        for layer in range(k.num_layers):
            found.setdefault(("resid", layer, None), []).append(
                cache["resid_post", layer][real].cpu()
            )
            for head, z in enumerate(cache["z", layer].unbind(2)):
                found.setdefault(("head", layer, head), []).append(z[real].cpu())
    return {site: torch.cat(parts).double().numpy() for site, parts in found.items()}


def one_hot(c: Chars, name: str, width: int) -> np.ndarray:
    """(N, D) of the named sum of features; a position beyond `width` is in none of the columns."""
    V = len(arith.VOCABULARY)
    columns = dict(character=(c.char_N, V), position=(c.position_N, width))
    columns["previous character"] = (c.previous_N, V)
    return (
        np.concatenate(
            [values[:, None] == np.arange(n) for values, n in map(columns.get, name.split("+"))], 1
        )
        * 1.0
    )


def random_labels(c: Chars, share_K: np.ndarray, seed: int) -> np.ndarray:
    """(N,) labels drawn per (previous character, character, position), the same wherever that occurs, on whatever side
    of a split; as frequent as `share_K`."""
    code = (c.previous_N * len(arith.VOCABULARY) + c.char_N) * 1000 + c.position_N
    kinds, which = np.unique(code, return_inverse=True)
    drawn = np.array([np.random.default_rng([seed, kind]).random() for kind in kinds])
    return np.searchsorted(share_K.cumsum()[:-1], drawn, "right")[which]


# ----------------------------------------------------------------------------
# Probes


def balanced_accuracy(predicted_N: np.ndarray, label_N: np.ndarray) -> float:
    """Mean over the labels that occur of the fraction found."""
    return float(np.mean([(predicted_N[label_N == y] == y).mean() for y in np.unique(label_N)]))


class Probe:
    """Logistic regression. Features are standardised by the fitted set's mean and spread, except in the original's
    set-up, which takes them as they are."""

    def __init__(self, x_ND: np.ndarray, label_N: np.ndarray, scale: bool):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        self.mean_D = x_ND.mean(0) if scale else 0.0
        self.spread_D = np.where(x_ND.std(0) > 1e-9, x_ND.std(0), 1.0) if scale else 1.0
        self.model = LogisticRegression(max_iter=1000, random_state=42)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
            self.model.fit(self.scaled(x_ND), label_N)
        self.converged = int(max(self.model.n_iter_) < 1000)

    def scaled(self, x_ND: np.ndarray) -> np.ndarray:
        return (x_ND - self.mean_D) / self.spread_D

    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        return self.model.predict(self.scaled(x_ND))


def rank_correlation(fit_x: np.ndarray, fit_y: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, of a ridge regression's depth with the real one: also of depths that were not fitted."""
    from scipy.stats import spearmanr
    from sklearn.linear_model import Ridge

    predicted = Ridge(alpha=1.0).fit(fit_x, fit_y).predict(x)
    return float(spearmanr(predicted, y).statistic) if np.ptp(predicted) > 0 else 0.0


def probe_rows(
    x: dict[str, np.ndarray], split: Split, original: bool, known: dict, control: bool
) -> list[dict]:
    """A row per task for one set of features, (N, D) by part; `control` adds the random labels."""
    rows = []
    for task in TASKS[:1] if original else TASKS:
        y = {name: c.labels(task) for name, c in split.parts.items()}
        probe, labels = Probe(x["fit"], y["fit"], not original), np.unique(y["fit"])
        row = dict(task=task, **known, features=x["fit"].shape[1], converged=probe.converged)
        for name, c in split.parts.items():
            seen = np.isin(y[name], labels)
            found, want = probe(x[name])[seen], y[name][seen]
            row |= {
                f"{name}_accuracy": float((found == want).mean()),
                f"{name}_balanced": balanced_accuracy(found, want),
            }
            if name not in ("fit", "dev"):
                plain = c.plain_N[seen]
                row[f"{name}_no_brackets_balanced"] = balanced_accuracy(found[plain], want[plain])
                if task == "depth":
                    row[f"{name}_spearman"] = rank_correlation(x["fit"], y["fit"], x[name], y[name])
        if control:
            share = np.array([(y["fit"] == label).mean() for label in labels])
            drawn = {name: random_labels(split.parts[name], share, 1) for name in ("fit", "test")}
            again = Probe(x["fit"], drawn["fit"], not original)
            row["random_labels_balanced"] = balanced_accuracy(again(x["test"]), drawn["test"])
            row["selectivity"] = row["test_balanced"] - row["random_labels_balanced"]
        rows.append(row)
    return rows


def majority_rows(split: Split, original: bool) -> list[dict]:
    rows = []
    for task in TASKS[:1] if original else TASKS:
        labels, counts = np.unique(split.fit.labels(task), return_counts=True)
        row = dict(task=task, network="none", site="majority", kind="majority", features=0)
        for name, c in split.parts.items():
            y = c.labels(task)
            y = y[np.isin(y, labels)]
            row[f"{name}_accuracy"] = float((y == labels[counts.argmax()]).mean())
            row[f"{name}_balanced"] = 1 / len(np.unique(y))
        rows.append(row)
    return rows


def network_rows(
    model: CompactTransformer, s: Subject, split: Split, original: bool, name: str, control: bool
):
    """All sites of one network, and in each task which of its layers and heads is best on dev."""
    x = {part: activations(model, s.k, c.exprs, s.w.device) for part, c in split.parts.items()}
    rows = []
    for site in x["fit"]:
        kind, layer, head = site
        label = f"L{layer}-resid" if head is None else f"L{layer}-H{head}"
        known = dict(network=name, site=label, kind=kind, layer=layer, head=head)
        rows += probe_rows(
            {part: of[site] for part, of in x.items()}, split, original, known, control
        )
    for task in TASKS if split.dev else ():
        for kind in SITES:
            best = max(
                (r for r in rows if r["task"] == task and r["kind"] == kind),
                key=lambda r: r["dev_balanced"],
            )
            best["chosen"] = 1
    return rows


# ----------------------------------------------------------------------------
# Figures


def by_layer(rows: Sequence[dict], task: str, network: str, kind: str, key: str) -> np.ndarray:
    """(networks, L): of a layer's heads the best on dev, or in the original's set-up (no dev) their mean."""
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


def layer_figure(rows: Sequence[dict], s: Subject, original: bool):
    """Accuracy by layer: this network's line over the untrained networks' band, and lines for what needs no network."""
    tasks, key = TASKS[:1] if original else TASKS, "test_accuracy" if original else "test_balanced"
    figure, axes = heads.new_figure(3.7 * len(tasks) + 1.2, 4.2, 1, len(tasks))
    layers = range(s.k.num_layers)
    for panel, task in zip(axes[0], tasks, strict=True):
        for kind, colour, dash, words in (
            ("resid", COLOURS[0], "-", "residual stream"),
            ("head", COLOURS[1], "--", "heads"),
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
            panel.fill_between(
                layers, band.min(0), band.max(0), color=colour, alpha=0.2, linewidth=0
            )
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
            panel.plot(layers, known, ":", color=COLOURS[0], label="residual stream, random labels")
        for i, (site, words) in enumerate(
            {
                "majority": "majority",
                FEATURES[0]: FEATURES[0],
                FEATURES[-1]: "+ position + previous",
            }.items()
        ):
            y = next(r[key] for r in rows if r["task"] == task and r["site"] == site)
            panel.axhline(
                y,
                color="0.35",
                linewidth=1,
                linestyle=("-", "-.", ":")[i],
                label=f"{words} (no network)",
            )
        for r in rows:
            if r["network"] == "trained" and r["kind"] == "head" and r["task"] == task:
                panel.plot(r["layer"], r[key], ".", color=COLOURS[1], markersize=4)
        panel.set_title(task, fontsize=9)
        panel.set_xticks(list(layers), [f"L{l}" for l in layers])
        panel.spines[["top", "right"]].set_visible(False)
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
    figure, axes = heads.new_figure(8.6, 4.0, 1, 2)
    for panel, (task, key, label) in zip(axes[0], panels, strict=True):
        get = lambda r: [r[f"{name}_{key}"] for name in names]  # noqa: B023  used at once
        for kind, colour in zip(SITES, COLOURS, strict=False):
            mine = [r for r in rows if r["task"] == task and r["kind"] == kind and r.get("chosen")]
            own = next(r for r in mine if r["network"] == "trained")
            band = np.array([get(r) for r in mine if r["network"] != "trained"])
            panel.plot(range(len(names)), get(own), "o-", color=colour, label=f"{own['site']}")
            panel.fill_between(range(len(names)), band.min(0), band.max(0), color=colour, alpha=0.2, linewidth=0,
                               label=f"{kind}, untrained (n={len(band)})")  # fmt: skip
        none = next(r for r in rows if r["task"] == task and r["site"] == FEATURES[-1])
        panel.plot(range(len(names)), get(none), "x:", color="0.35", label=FEATURES[-1])
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
    if not path.exists() and not (HERE / path).exists():
        make = heads.how_to_make(prefix, name.removeprefix("test_"), s.k)
        raise UserError(f"{path}: no such data set; make it with: {make}")
    found = [e for e in arith.read_records(str(path))[0] if "(" in e][: limit or None]
    if not found:
        raise UserError(
            f"{path}: no expression has brackets, so there is no depth to probe; give another set"
        )
    return found


def make_split(s: Subject, a: argparse.Namespace) -> Split:
    """The original's: pilot_train against pilot_test_paren; ours: one set in three parts, and deeper ones."""
    if a.original:
        return Split(
            chars_of(records(s, a.data, "train", a.limit)),
            None,
            chars_of(records(s, a.data, "test_paren", 0)),
        )
    exprs = [e for name in a.sets for e in records(s, a.data, f"test_{name}", a.limit)]
    exprs = [e for e in dict.fromkeys(exprs) if max(arith.depth_labels(e)) <= 2]
    parts = split_by_expression(exprs, a.seed)
    if not all(parts):
        raise UserError(
            f"--sets {' '.join(a.sets)}: {len(exprs)} expressions do not make a fit, dev and test part; give more"
        )
    taken = {arith.hash_expr(e) for e in exprs}
    deep = {
        n: [e for e in records(s, a.data, f"test_{n}", a.limit) if arith.hash_expr(e) not in taken]
        for n in a.deeper
    }
    return replace(
        Split(*map(chars_of, parts)), deeper={name: chars_of(found) for name, found in deep.items()}
    )


def tell(rows: Sequence[dict], original: bool) -> None:
    """The table in short: what needs no network, untrained networks, this one."""
    key = "test_accuracy" if original else "test_balanced"
    for task in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == task]
        print(f"\n{task}: {key.replace('_', ' ')}")
        for r in (r for r in mine if r["network"] == "none"):
            print(f"  {r['site']:46}{r[key]:.4f}")
        for kind in SITES:
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
            f"--untrained {a.untrained}: without an untrained network a probe's number says nothing; give 1 or more"
        )
    s = heads.load(a.checkpoint, a.device)
    split = make_split(s, a)
    sizes = {
        name: [len(c.exprs), len(c.char_N), int((c.depth_N > 0).sum())]
        for name, c in split.parts.items()
    }
    for name, (exprs, n, above) in sizes.items():
        print(
            f"{name}: {exprs:,} expressions, {n:,} characters, {n - above:,} at depth 0 and {above:,} above"
        )
    width, rows = int(split.fit.position_N.max()) + 1, majority_rows(split, a.original)
    for name in FEATURES:
        x = {part: one_hot(c, name, width) for part, c in split.parts.items()}
        known = dict(network="none", site=name, kind="features")
        rows += probe_rows(x, split, a.original, known, control=True)
    rows += network_rows(s.model, s, split, a.original, "trained", control=True)
    for seed in range(a.untrained):
        model = heads.untrained(s.k, 1000 + seed, s.w.device)
        rows += network_rows(model, s, split, a.original, f"untrained {seed}", control=False)
        print(f"untrained {seed}: {time.process_time() - t0:.0f} s CPU so far", flush=True)
    out = heads.out_folder(a, "probe_original" if a.original else "probe", [s])
    heads.write_csv(out / "probe.csv", rows)
    content = heads.provenance([s], []) | dict(
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
    heads.write_json(out / "probe.json", content)
    heads.write_figure(out / "layers.png", layer_figure(rows, s, a.original))
    if split.deeper:
        heads.write_figure(out / "transfer.png", transfer_figure(rows, s, list(split.deeper)))
    tell(rows, a.original)
    return 0


if __name__ == "__main__":
    heads.launch(main)
