"""How many seeds it takes to see a difference, for a number of seeds fixed before the first run.

Raises   UserError for numbers without an answer
"""

import math
from dataclasses import dataclass

from lib.program import UserError
from lib.stats import ALPHA, POWER, shift, special


def power_of(distance: float, df: float, alpha: float = ALPHA, sides: int = 2) -> float:
    """The chance that a t test finds a true difference of `distance` standard errors: exact,
    noncentral t."""
    limit = special().stdtrit(df, 1 - alpha / sides)
    right = 1 - float(special().nctdtr(df, distance, limit))
    wrong = float(special().nctdtr(df, distance, -limit)) if sides == 2 else 0.0
    return right + (wrong if wrong > 0 else 0.0)  # scipy gives nan where it is too small to count


@dataclass(frozen=True)
class Design:
    """How the arms are compared: paired with correlation `rho` between them, or unpaired (equal
    variances) without it."""

    power: float = POWER
    alpha: float = ALPHA
    sides: int = 2
    rho: float | None = None


USUAL = Design()


def smallest_difference(n: int, noise: float, design: Design = USUAL) -> float:
    """The smallest true difference that n seeds per arm find with the design's power; `noise` is
    the standard deviation between seeds."""
    error, df = _error_and_df(n, noise, design.rho)
    return shift(df, design.power, design.alpha, design.sides) * error


def seeds_needed(delta: float, noise: float, design: Design = USUAL) -> int:
    """The fewest seeds per arm, at least 2, that find a true difference of `delta`. Raises
    UserError for numbers without an answer, and beyond a million seeds."""
    power, alpha, rho = design.power, design.alpha, design.rho
    if not (0 < abs(delta) < math.inf and 0 < noise < math.inf):
        raise UserError(
            f"delta={delta:g}, sd={noise:g}: need finite numbers, sd above 0 and delta not 0"
        )
    if not 0 < alpha < power < 1:
        raise UserError(
            f"alpha={alpha}, power={power}: need 0 < alpha < power < 1, such as 0.05 and 0.8"
        )
    if rho is not None and not -1 < rho < 1:
        raise UserError(f"rho={rho} must lie between -1 and 1, ends excluded")

    def enough(n: int) -> bool:
        error, df = _error_and_df(n, noise, rho)
        return power_of(abs(delta) / error, df, alpha, design.sides) >= power

    low, high = 1, 2  # low is too few
    while not enough(high):
        low, high = high, 2 * high
        if high > 2**20:
            raise UserError(
                f"more than a million seeds: delta={delta:g} is too small for sd={noise:g}"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _error_and_df(n: int, noise: float, rho: float | None) -> tuple[float, int]:
    return noise * math.sqrt(2 * (1 - (rho or 0)) / n), n - 1 if rho is not None else 2 * n - 2
