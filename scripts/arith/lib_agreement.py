"""lib_agreement.py -- how far models of different seeds agree about what their heads are worth.

Shapes   S models, L layers, H heads, N units, M metrics
Source   Kendall's W, with correction for ties
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import lib_ablation as ablation
import numpy as np
from lib_ablation import Place
from lib_heads import METRICS, Subject, TestSet


@dataclass(frozen=True)
class Result:
    """One model on one set. Rows of the tables are units, in the set's order."""

    s: Subject
    set: TestSet
    base_NM: np.ndarray
    ablated: dict[tuple[str, Place], np.ndarray]  # by kind and place; empty below the gate
    competent: bool

    def drops(self, kind: str, place: Place) -> np.ndarray:
        return self.base_NM - self.ablated[kind, place]

    def mean_drop(self, kind: str, place: Place, metric: int) -> float:
        return float(self.drops(kind, place)[:, metric].mean())


def concordance(ranks_SH: np.ndarray) -> np.ndarray:
    """Kendall's W of S rankings of H heads (..., S, H), ties corrected for: 0 unrelated, 1 the
    same. nan where each ranking is all ties."""
    S, H = ranks_SH.shape[-2:]
    one = ranks_SH.reshape(-1, S, H)[0]  # the others are shuffles of it: as many ties
    ties = sum((c**3 - c).sum() for c in (np.unique(row, return_counts=True)[1] for row in one))
    spread = ((ranks_SH.sum(-2) - S * (H + 1) / 2) ** 2).sum(-1)
    most = S**2 * (H**3 - H) - S * ties
    return 12 * spread / most if most else np.full(spread.shape, math.nan)


def ranked(effects_SLH: np.ndarray) -> np.ndarray:
    """(S, L, H) ranks over a model's heads, ties at their mean rank."""
    from scipy.stats import rankdata

    flat = effects_SLH.reshape(len(effects_SLH), -1)
    return rankdata(flat, axis=1).reshape(effects_SLH.shape)


def shuffled_p(ranks_SLH: np.ndarray, within: bool, draws: int = 2000) -> float:
    """The chance of a W as large when a head's number means nothing: shuffled over the model, or
    within layers."""
    S, L, H = ranks_SLH.shape
    groups = ranks_SLH if within else ranks_SLH.reshape(S, 1, L * H)
    many = np.random.default_rng(0).permuted(
        np.broadcast_to(groups, (draws, *groups.shape)), axis=-1
    )
    hits = (
        concordance(many.reshape(draws, S, L * H))
        >= concordance(ranks_SLH.reshape(S, L * H)) - 1e-12
    )
    return float((1 + hits.sum()) / (1 + draws))


def agreement(found: Sequence[Result], kinds: Sequence[str]) -> list[dict]:
    """Per set, kind and metric over models that were ablated there: mean Kendall and Spearman
    correlation of the heads' effects over pairs of seeds, W, and its p under both shuffles. Seeds
    can agree about layers; a head's number within its layer means nothing before training, so
    agreement there would be a surprise."""
    from scipy.stats import kendalltau, spearmanr

    out = []
    for name in dict.fromkeys(r.set.name for r in found):
        here = [r for r in found if r.set.name == name and r.ablated]
        for kind in kinds if len(here) > 1 else ():
            for m, metric in enumerate(METRICS):
                mean = lambda r, p: float(r.drops(kind, p)[:, m].mean())  # noqa: B023  used at once
                (L, H), mine = (
                    here[0].s.shape,
                    [p for p in ablation.places(here[0].s) if p.head is not None],
                )
                x = np.array([[mean(r, p) for p in mine] for r in here])
                both = [
                    (a, b)
                    for i, a in enumerate(x)
                    for b in x[i + 1 :]
                    if np.ptp(a) > 0 and np.ptp(b) > 0
                ]
                row = dict(set=name, kind=kind, metric=metric, seeds=len(here), pairs=len(both))
                row |= dict(competent=int(all(r.competent for r in here)))
                for label, f in (("kendall_tau", kendalltau), ("spearman_rho", spearmanr)):
                    row[label] = (
                        float(np.mean([f(a, b).statistic for a, b in both])) if both else None
                    )
                ranks = ranked(x.reshape(len(here), L, H))
                row["kendall_w"] = (
                    None if math.isnan(w := float(concordance(ranks.reshape(len(here), -1)))) else w
                )
                row["p_over_model"], row["p_within_layers"] = (
                    shuffled_p(ranks, False),
                    shuffled_p(ranks, True),
                )
                row["top_head"] = " ".join(str(mine[int(i)]) for i in x.argmax(1))
                out.append(row)
    return out


def seed_rows(found: Sequence[Result], kinds: Sequence[str], mlps: bool) -> list[dict]:
    """By layer, which has a meaning across seeds: the strongest head's drop, the heads' mean drop
    and the MLP's, each as mean and standard deviation over models."""
    out = []
    for name in dict.fromkeys(r.set.name for r in found):
        here = [r for r in found if r.set.name == name and r.ablated]
        for kind in kinds if here else ():
            for layer in range(here[0].s.cfg.n_layer):
                row = dict(set=name, kind=kind, layer=layer, models=len(here))
                row |= dict(competent=sum(r.competent for r in here))
                for m, metric in enumerate(METRICS):
                    of = lambda r, h: r.mean_drop(kind, Place(layer, h), m)  # noqa: B023
                    each = [[of(r, h) for h in range(r.s.cfg.n_head)] for r in here]
                    columns = dict(
                        top_head=[max(x) for x in each], mean_head=[float(np.mean(x)) for x in each]
                    )
                    columns |= dict(mlp=[of(r, None) for r in here]) if mlps else {}
                    for label, values in columns.items():
                        row[f"{metric}_{label}"] = float(np.mean(values))
                        row[f"{metric}_{label}_sd"] = (
                            float(np.std(values, ddof=1)) if len(values) > 1 else None
                        )
                out.append(row)
    return out
