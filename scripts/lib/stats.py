"""The statistics of a comparison: means, t tests, Holm's correction, ratios.

Knows nothing of files. Everything takes plain numbers and is exact for normal noise, except Welch's
degrees of freedom, which are an approximation (tests/study/test_stats.py measures how good).

Units    differences and standard errors in those of the values (nats per token, for losses);
         ratios in %
Raises   UserError when scipy is missing
Source   Welch 1947; Holm 1979; Pitman 1939 and Morgan 1939; noncentral t as in any book on power,
         here scipy.special's
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

from lib.program import need

NAN = float("nan")


ALPHA = 0.05  # two-sided level of every interval and test in the tables
POWER = 0.8  # of "the smallest difference"


def special() -> ModuleType:
    """scipy.special: the t distributions without scipy.stats, which takes a second to import."""
    return need("scipy.special", "a confidence interval")


def mean(values: Sequence[float]) -> float:
    """Exactly rounded sum over n: the same whatever the order of the rows; nan of nothing."""
    return math.fsum(values) / len(values) if values else NAN


def sd(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1); nan below two values."""
    if len(values) < 2:
        return NAN
    m = mean(values)
    return math.sqrt(math.fsum((v - m) ** 2 for v in values) / (len(values) - 1))


@lru_cache(maxsize=100_000)
def shift(df: float, power: float = POWER, alpha: float = ALPHA, sides: int = 2) -> float:
    """The distance, in standard errors, that a t test finds with this power: the inverse of
    power_of. The wrong side of a two-sided test is left out: at a power of 0.5 or more it is
    below 1e-3 of it. nan for df of nan."""
    return float(special().nctdtrinc(df, 1 - power, special().stdtrit(df, 1 - alpha / sides)))


@dataclass(frozen=True)
class TTest:
    """A two-sided t test of a difference of means, with its 95% confidence interval."""

    t: float
    df: float
    p: float
    lo: float
    hi: float
    error: float = NAN  # standard error of the difference

    @property
    def least(self) -> float:
        """The smallest true difference that this test, with the spread it saw, finds four times
        in five."""
        return shift(self.df) * self.error


def t_test(difference: float, error: float, df: float, scale: float) -> TTest | None:
    """From the difference and its standard error. None where there is no spread to judge by:
    values of size `scale` that differ in their last bits only have a standard error that is
    rounding, not noise."""
    if not error > 1e-13 * abs(scale):
        return None
    half = float(special().stdtrit(df, 1 - ALPHA / 2)) * error
    p = float(2 * special().stdtr(df, -abs(difference) / error))
    return TTest(difference / error, df, p, difference - half, difference + half, error)


def welch(a: Sequence[float], b: Sequence[float]) -> TTest | None:
    """mean(a) - mean(b), variances not assumed equal (Welch 1947); None below two values in an
    arm, or no spread."""
    if min(len(a), len(b)) < 2:
        return None
    va, vb = sd(a) ** 2 / len(a), sd(b) ** 2 / len(b)
    spread = va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)
    df = (va + vb) ** 2 / spread if spread > 0 else NAN
    return t_test(mean(a) - mean(b), math.sqrt(va + vb), df, mean(b))


def paired(a: Sequence[float], b: Sequence[float]) -> TTest | None:
    """mean(a - b) of values that belong together one by one; None below two pairs, or no spread."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        return None
    error = sd(differences) / math.sqrt(len(differences))
    return t_test(mean(differences), error, len(differences) - 1, mean(b))


def pooled_sd(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """One standard deviation within all groups, taken to be the same in each, and its degrees of
    freedom."""
    df = sum(len(g) - 1 for g in groups if g)
    squares = math.fsum(sd(g) ** 2 * (len(g) - 1) for g in groups if len(g) > 1)
    return (math.sqrt(squares / df) if df else NAN), df


def pooled(a: Sequence[float], b: Sequence[float], sd_within: float, df: int) -> TTest | None:
    """mean(a) - mean(b), judged by a standard deviation that is known better than from these two
    arms alone."""
    if not a or not b or not df:
        return None
    return t_test(mean(a) - mean(b), sd_within * math.sqrt(1 / len(a) + 1 / len(b)), df, mean(b))


def p_below(values: Sequence[float], limit: float) -> float:
    """One-sided t test that the mean is below `limit`: small p, it is. nan below two values or
    without spread."""
    error = sd(values) / math.sqrt(len(values)) if values else NAN
    test = t_test(mean(values) - limit, error, len(values) - 1, limit)
    return float(special().stdtr(test.df, test.t)) if test else NAN


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): controls the chance of any false claim among these,
    nothing assumed about their dependence. In the given order."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Ratio:
    """mean(a) / mean(b) - 1 in %, with its 95% interval; nan where there is none."""

    pct: float = NAN
    lo: float = NAN
    hi: float = NAN


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """The ratio of means; the interval is Welch's t interval of the difference of logarithms: it
    is bounded, unlike Fieller's, and for spreads of a few percent the same. Not paired: a seed
    says nothing about a machine's speed. All nan unless both means are above 0."""
    if not (a and b and min(*a, *b) > 0):
        return Ratio()
    logs = welch([math.log(v) for v in a], [math.log(v) for v in b])
    ends = (
        (100 * math.expm1(logs.lo), 100 * math.expm1(logs.hi))
        if logs and logs.hi < 700
        else (NAN, NAN)
    )
    return Ratio(100 * (mean(a) / mean(b) - 1), *ends)


@dataclass(frozen=True)
class VarianceRatio:
    """variance(a) / variance(b), with its 95% interval."""

    value: float
    lo: float
    hi: float


def variance_ratio(a: Sequence[float], b: Sequence[float]) -> VarianceRatio:
    """Of values that belong together one by one, so that the two spreads are not independent:
    the interval that the test of Pitman (1939) and Morgan (1939) does not reject. nan below three
    pairs, or without spread."""
    n, ratio = len(a), (sd(a) / sd(b)) ** 2 if sd(b) > 0 else NAN
    if n < 3 or not ratio > 0:
        return VarianceRatio(ratio, NAN, NAN)
    covariance = math.fsum((x - mean(a)) * (y - mean(b)) for x, y in zip(a, b, strict=True))
    r = covariance / (n - 1) / sd(a) / sd(b)
    t = float(special().stdtrit(n - 2, 1 - ALPHA / 2))
    k = 1 + 2 * max(0.0, 1 - r**2) * t**2 / (n - 2)
    root = math.sqrt(k**2 - 1)
    return VarianceRatio(ratio, ratio * (k - root), ratio * (k + root))


@dataclass(frozen=True)
class Judged:
    """The difference of two arms, a minus b, and how sure it is."""

    diff: float = NAN
    per_seed: tuple[float, ...] = ()  # over shared seeds
    sd_diff: float = NAN  # of those
    welch: TTest | None = None
    paired: TTest | None = None
    # The one that is reported: paired, Welch, "n=1", "no spread", or what a sequential stage says;
    # "" where there is nothing.
    test: str = ""
    anytime: TTest | None = None  # an always-valid interval, which has no p; see lib/sequential.py

    @property
    def chosen(self) -> TTest | None:
        return self.anytime or {"paired": self.paired, "Welch": self.welch}.get(self.test)


def judge(a: dict[str, float], b: dict[str, float]) -> Judged:
    """From one value per seed. Paired where both arms ran the very same seeds, Welch otherwise:
    to pair what is shared and drop the rest would let the choice of seeds choose the result. The
    other test is kept beside it."""
    if not a or not b:
        return Judged()
    shared = [seed for seed in a if seed in b]
    both = (
        welch(list(a.values()), list(b.values())),
        paired([a[s] for s in shared], [b[s] for s in shared]),
    )
    test = "paired" if a.keys() == b.keys() else "Welch"
    test = "n=1" if min(len(a), len(b)) < 2 else test if both[test == "paired"] else "no spread"
    differences = [a[s] - b[s] for s in shared]
    diff = mean(list(a.values())) - mean(list(b.values()))
    return Judged(diff, tuple(differences), sd(differences), *both, test)
