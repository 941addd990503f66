"""How many seeds it takes: power, smallest differences, power.py."""

import numpy as np
import power
import pytest
from lib.power import Design, power_of, seeds_needed, smallest_difference
from lib.stats import shift
from scipy import stats as theirs


@pytest.mark.parametrize(
    "delta, rho, n",
    [
        *[(0.001, None, 22), (0.001, 0.5, 12), (0.001, 0.9, 4)],
        *[(0.002, None, 7), (0.002, 0.5, 5), (0.002, 0.9, 3)],
        *[(0.005, None, 3), (0.005, 0.5, 3)],
    ],
)
def test_seeds_needed_are_those_of_the_fact_sheet(delta, rho, n):
    assert seeds_needed(delta, 0.0013, Design(sides=1, rho=rho)) == n


@pytest.mark.parametrize("df, sides", [(1, 2), (2.3, 2), (8, 1), (30, 2)])
def test_power_agrees_with_the_noncentral_t_of_scipy_stats(df, sides):

    limit = theirs.t.ppf(1 - 0.05 / sides, df)
    expected = theirs.nct.sf(limit, df, 3.1) + (
        np.nan_to_num(theirs.nct.cdf(-limit, df, 3.1)) if sides == 2 else 0
    )
    assert power_of(3.1, df, sides=sides) == pytest.approx(expected, rel=1e-6)
    assert power_of(shift(df, sides=sides), df, sides=sides) == pytest.approx(0.8, abs=1e-5)


@pytest.mark.parametrize("rho", [None, 0.0, 0.5])
def test_one_seed_less_than_needed_has_too_little_power(rho):
    n = seeds_needed(0.002, 0.0013, Design(rho=rho))
    least = [smallest_difference(m, 0.0013, Design(rho=rho)) for m in (n - 1, n)]
    assert least[1] <= 0.002 < least[0]


def test_power_prints_seeds_for_paired_and_unpaired_arms(capsys):
    power.main(["--sd", "0.0013", "--delta", "0.002"])
    lines = {line[:18].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["unpaired"][1] == "8" and lines["paired, rho 0.5"][3] == "6"
