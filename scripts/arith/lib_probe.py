"""lib_probe.py -- characters, their features inside and outside of a network, and probes on them.

Shapes   N characters, D features, K labels; x_ND has shape (N, D)
Source   selectivity: Hewitt & Liang, arXiv 1909.03368
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from lib_heads import Subject
from lib_hooks import HookedTransformer

import arithmetic
from train_arith import Knobs

TASKS = ("depth>0", "depth")
FEATURES = (
    "character",
    "position",
    "previous character",
    "character+position",
    "character+position+previous character",
)
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
        return ~np.isin(self.char_N, [arithmetic.IDS["("], arithmetic.IDS[")"]])

    def labels(self, task: str) -> np.ndarray:
        return self.depth_N if task == "depth" else (self.depth_N > 0).astype(int)


def chars_of(exprs: Sequence[str]) -> Chars:
    ids = [arithmetic.encode(expr, special=False) for expr in exprs]
    flat = lambda rows: np.array([x for row in rows for x in row])
    previous = flat([arithmetic.BOS, *row[:-1]] for row in ids)
    depth = flat(arithmetic.depth_labels(expr) for expr in exprs)
    return Chars(list(exprs), flat(ids), previous, flat(range(len(row)) for row in ids), depth)


@dataclass(frozen=True)
class Split:
    """Characters by use: fit, dev (none in the original's set-up), test, and the deeper sets by
    their names."""

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
    keys = np.array([arithmetic.hash_expr(expr) for expr in exprs], np.uint64)
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
    model: HookedTransformer,
    cfg: Knobs,
    exprs: Sequence[str],
    device: torch.device,
    batch: int = 256,
):
    """(N, D) float64 by site, (kind, layer, head or None): every head's hook_z and the stream
    behind every block."""
    keep = lambda name: name.endswith(("attn.hook_z", "hook_resid_post"))
    found: dict[tuple, list] = {}
    for at in range(0, len(exprs), batch):
        rows = [
            [arithmetic.BOS, *arithmetic.encode(e, special=False)] for e in exprs[at : at + batch]
        ]
        T = max(map(len, rows))
        ids = torch.tensor([row + [arithmetic.PAD] * (T - len(row)) for row in rows], device=device)
        real = torch.tensor([[0 < t < len(row) for t in range(T)] for row in rows], device=device)
        _, cache = model.run_with_cache(ids, keep)
        for layer in range(cfg.n_layer):
            found.setdefault(("resid", layer, None), []).append(
                cache["resid_post", layer][real].cpu()
            )
            for head, z in enumerate(cache["z", layer].unbind(2)):
                found.setdefault(("head", layer, head), []).append(z[real].cpu())
    return {site: torch.cat(parts).double().numpy() for site, parts in found.items()}


def one_hot(c: Chars, name: str, width: int) -> np.ndarray:
    """(N, D) of the named sum of features; a position beyond `width` is in none of the columns."""
    V = len(arithmetic.VOCABULARY)
    columns = dict(character=(c.char_N, V), position=(c.position_N, width))
    columns["previous character"] = (c.previous_N, V)
    return (
        np.concatenate(
            [values[:, None] == np.arange(n) for values, n in map(columns.get, name.split("+"))], 1
        )
        * 1.0
    )


def random_labels(c: Chars, share_K: np.ndarray, seed: int) -> np.ndarray:
    """(N,) labels drawn per (previous character, character, position), the same wherever that
    occurs, on whatever side of a split; as frequent as `share_K`."""
    code = (c.previous_N * len(arithmetic.VOCABULARY) + c.char_N) * 1000 + c.position_N
    kinds, which = np.unique(code, return_inverse=True)
    drawn = np.array([np.random.default_rng([seed, kind]).random() for kind in kinds])
    return np.searchsorted(share_K.cumsum()[:-1], drawn, "right")[which]


# ----------------------------------------------------------------------------
# Probes


def balanced_accuracy(predicted_N: np.ndarray, label_N: np.ndarray) -> float:
    """Mean over the labels that occur of the fraction found."""
    return float(np.mean([(predicted_N[label_N == y] == y).mean() for y in np.unique(label_N)]))


class Probe:
    """Logistic regression. Features are standardised by the fitted set's mean and spread, except
    in the original's set-up, which takes them as they are."""

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
    """Spearman's, of a ridge regression's depth with the real one: also of depths that were not
    fitted."""
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
    model: HookedTransformer, s: Subject, split: Split, original: bool, name: str, control: bool
):
    """All sites of one network, and in each task which of its layers and heads is best on dev."""
    x = {
        part: activations(model, s.cfg, c.exprs, s.world.device) for part, c in split.parts.items()
    }
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
