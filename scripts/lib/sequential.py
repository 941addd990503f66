"""Decisions that stay valid when one looks after every seed, for paired differences.

A test that was planned for n seeds may be read once. Here the difference of a variant and its
baseline is read after every seed, and seeds stop when enough is known. What is computed is an
e-process: it starts at 1, and where its hypothesis holds it ever reaches 1/alpha with a chance of
at most alpha, whatever rule stops the seeds (Ville's inequality). The variance is unknown: the
likelihood ratio is that of a t test, with the right Haar prior on the standard deviation in both
hypotheses, mixed over a few effects in standard deviations. It is a martingale of the differences
known up to their scale.

Claims   better, worse: the difference is not 0; wrong in at most alpha of the comparisons
         not better by delta: wrong in at most 1 - power of those that are better by delta
Interval all differences that the two-sided test does not reject after this seed; with a chance of
         1 - alpha at least it holds the truth after every seed
Units    nats per token; a difference is variant minus baseline, below 0 is better
Source   H. Wang, A. Ramdas: Anytime-valid t-tests and confidence sequences for Gaussian means with
         unknown variance (arXiv 2310.03722), the e-process in the scale-invariant filtration; they
         mix over a Gaussian, we over a few effects near the one that matters
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lib.program import UserError
from lib.stats import ALPHA, NAN, POWER, mean, special

# The mixture: multiples of the effect that is expected, and their weights. Narrow, since delta and
# the spread of a difference are roughly known; a spread of half or double still works.
FACTORS = np.array([0.5, 0.75, 1.0, 1.5, 2.0])
WEIGHTS = np.array([0.1, 0.2, 0.4, 0.2, 0.1])
UNDECIDED, BETTER, WORSE, NOT_BETTER = "undecided", "better", "worse", "not better by delta"


@dataclass(frozen=True)
class Rule:
    """When the seeds of a stage stop."""

    delta: float  # the smallest difference that matters, above 0
    max_seeds: int  # of a cell, whatever is decided by then
    alpha: float = ALPHA  # of all claims of the stage together
    power: float = POWER  # the chance to find a difference of delta, but for running out of seeds
    sd: float = NAN  # expected, of a paired difference; makes decisions fast, never wrong
    num_comparisons: int = 1  # in the stage; each has its part of alpha

    def __post_init__(self):
        if not 0 < self.delta < math.inf:
            raise UserError(f"delta = {self.delta}: expected nats above 0")
        if not 0 < self.alpha < self.power < 1:
            raise UserError(
                f"alpha = {self.alpha}, power = {self.power}: need 0 < alpha < power < 1, "
                f"such as 0.05 and 0.8"
            )
        if not (math.isnan(self.sd) or 0 < self.sd < math.inf):
            raise UserError(f"sd = {self.sd}: expected nats above 0, of a paired difference")
        if self.max_seeds < 2:
            raise UserError(f"max_seeds = {self.max_seeds}: expected 2 or more")

    @property
    def effects(self) -> tuple[float, ...]:
        """The mixture's effects, in standard deviations of a difference."""
        expected = 1.0 if math.isnan(self.sd) else min(self.delta / self.sd, 3.0)
        return tuple(expected * FACTORS)

    @property
    def threshold(self) -> float:
        """What a claim's e-process must reach."""
        return self.num_comparisons / self.alpha


@dataclass(frozen=True)
class Decision:
    """What the seeds so far say of one comparison."""

    word: str  # UNDECIDED, BETTER, WORSE or NOT_BETTER
    n: int  # pairs of seeds
    diff: float
    lo: float  # of the always-valid interval
    hi: float


@lru_cache(maxsize=1000)
def _chi_nodes(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and logarithms of weights at which the chi distribution of n is integrated."""
    centre = math.sqrt(max(n - 1, 0))
    low, high = max(0.0, centre - 9), centre + 14
    x, weight = np.polynomial.legendre.leggauss(200)
    w = low + (high - low) * (x + 1) / 2
    log_density = (n - 1) * np.log(w) - w**2 / 2 + np.log(weight)
    return w, log_density - special().logsumexp(log_density)


def log_ratio(n: int, r: np.ndarray, effect: float | np.ndarray) -> np.ndarray:
    """Logarithm of the likelihood ratio of n differences: a mean of `effect` standard deviations
    against a mean of 0. r: the sum of the differences over the root of the sum of their squares.

    It is exp(-n effect^2 / 2) E[exp(effect r w)], w distributed as chi with n degrees of freedom.
    """
    w, log_weight = _chi_nodes(n)
    exponents = (effect * r)[..., None] * w + log_weight
    return special().logsumexp(exponents, axis=-1) - n * effect**2 / 2


def log_e_value(n: int, r: np.ndarray, effects: Sequence[float]) -> np.ndarray:
    """Logarithm of the one-sided e-process, a mean above 0 against a mean of 0."""
    ratios = log_ratio(n, r[..., None], np.array(effects))  # one column per effect
    return special().logsumexp(ratios, axis=-1, b=WEIGHTS)


def log_e_two_sided(n: int, r: np.ndarray, effects: Sequence[float]) -> np.ndarray:
    """The same against a mean above or below 0: half of the stake on each side."""
    return np.logaddexp(log_e_value(n, r, effects), log_e_value(n, -r, effects)) - math.log(2)


def invariant(total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """All that the test sees: the sum over the root of the sum of squares; 0 where all are 0."""
    return np.divide(total, np.sqrt(squares), out=np.zeros_like(total), where=squares > 0)


@lru_cache(maxsize=10_000)
def critical(n: int, effects: tuple[float, ...], threshold: float, sides: int) -> float:
    """The r at which the e-process reaches the threshold after n differences; inf where none
    does. It grows with r, or with |r| if two-sided."""
    e_process = log_e_two_sided if sides == 2 else log_e_value
    reached = lambda r: float(e_process(n, np.array(r), effects)) >= math.log(threshold)
    low, high = -math.sqrt(n) if sides == 1 else 0.0, math.sqrt(n)
    if not reached(high):
        return math.inf
    for _ in range(50):
        middle = (low + high) / 2
        if reached(middle):
            high = middle
        else:
            low = middle
    return high


def interval(differences: Sequence[float], rule: Rule) -> tuple[float, float]:
    """The always-valid interval of the mean difference; infinite while n is too small."""
    n, centre = len(differences), mean(differences)
    limit = critical(n, rule.effects, rule.threshold, 2) if n > 1 else math.inf
    if limit >= math.sqrt(n):
        return -math.inf, math.inf
    spread = math.sqrt(math.fsum((d - centre) ** 2 for d in differences) / n)
    half = spread * limit / math.sqrt(n - limit**2)
    return centre - half, centre + half


def decide(differences: Sequence[float], rule: Rule) -> Decision:
    """What these differences, in the order of their seeds, say. Once decided it stays decided:
    later seeds, run by an impatient hand, do not turn it."""
    d = np.array(differences, dtype=float)
    words = first_decisions(d[None, :], rule)[0] if len(d) else []
    word, n = next(((w, i) for i, w in enumerate(words, 1) if w != UNDECIDED), (UNDECIDED, len(d)))
    used = [float(x) for x in d[:n]]
    return Decision(word, n, mean(used), *interval(used, rule))


def first_decisions(d: np.ndarray, rule: Rule) -> np.ndarray:
    """The word after each seed, for studies in rows and seeds in columns. One pair never decides:
    it has no spread."""
    words = np.full(d.shape, UNDECIDED, dtype=object)
    for n in range(2, d.shape[1] + 1):
        seen = d[:, :n]
        r = invariant(-seen.sum(1), (seen**2).sum(1))
        limit = critical(n, rule.effects, rule.threshold, 2)
        above = seen + rule.delta  # has a mean of 0 where the variant is better by delta
        r_delta = invariant(above.sum(1), (above**2).sum(1))
        futile = r_delta >= critical(n, rule.effects, 1 / (1 - rule.power), 1)
        cases = [r >= limit, r <= -limit, futile]
        words[:, n - 1] = np.select(cases, [BETTER, WORSE, NOT_BETTER], UNDECIDED)
    return words


@dataclass(frozen=True)
class Simulated:
    """What simulated studies of one comparison came to."""

    mean_seeds: float
    seeds_90: float  # nine in ten took no more
    shares: tuple[float, float, float, float]  # better, worse, not better by delta, undecided


def simulate(
    effect: float,
    sd_difference: float,
    rule: Rule,
    studies: int,
    seed: int = 0,
    seen: Sequence[float] = (),
) -> Simulated:
    """Studies of a variant that is better by `effect`, with normal differences. `seen`: the first
    differences of each of them, known already."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(-effect, sd_difference, (studies, rule.max_seeds))
    differences[:, : len(seen)] = seen[: rule.max_seeds]
    words = first_decisions(differences, rule)
    decided = words != UNDECIDED
    last = np.where(decided.any(1), decided.argmax(1), rule.max_seeds - 1)
    final = words[np.arange(studies), last]
    shares = tuple(float((final == w).mean()) for w in (BETTER, WORSE, NOT_BETTER, UNDECIDED))
    return Simulated(float(last.mean() + 1), float(np.quantile(last + 1, 0.9)), shares)
