"""Tests, intervals and agreement over seeds."""

import lib_agreement as agreement
import lib_tables as tables
import numpy as np
import pytest

pytest.importorskip("scipy")


def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_units():
    from scipy.stats import binomtest

    before, after = np.ones(100), np.ones(100)
    after[:4] = 0
    assert tables.mcnemar(before, after) == (
        4,
        0,
        0.125,
    )  # the original's best head: 93 to 89 of 100
    assert tables.mcnemar(before, before) == (0, 0, 1.0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        before, after = rng.integers(0, 2, (2, 60))
        lost, gained, p = tables.mcnemar(before, after)
        assert p == pytest.approx(binomtest(lost, lost + gained).pvalue)


def test_bootstrap_intervals_are_paired_and_agree_with_scipy():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(1)
    base, noise = rng.normal(0, 5, 200), rng.normal(1, 0.5, 200)
    low, high = tables.intervals((base - (base - noise))[:, None])[:, 0]
    want = bootstrap(
        (noise,), np.mean, method="percentile", n_resamples=4000, random_state=0
    ).confidence_interval
    assert (low, high) == pytest.approx((want.low, want.high), abs=0.006)
    assert high - low < 0.2  # 1.96 * 2 * 0.5 / sqrt(200), however much the items themselves vary
    assert np.ptp(tables.intervals(np.ones((50, 1)))) == pytest.approx(0, abs=1e-12)


def test_wilson_intervals_of_no_and_of_one_in_a_hundred():
    assert tables.wilson(0, 100) == pytest.approx((0, 0.037), abs=5e-4)
    assert tables.wilson(1, 100) == pytest.approx((0.002, 0.054), abs=5e-4)


def test_concordance_is_one_for_equal_rankings_and_friedmans_otherwise():
    from scipy.stats import friedmanchisquare

    w = lambda x: float(agreement.concordance(agreement.ranked(x[:, None])[:, 0]))
    assert w(np.array([[1.0, 5, 2, 9], [10, 50, 20, 90], [-4, 0, -1, 3]])) == pytest.approx(1)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, (5, 8)).astype(float)  # with ties
    assert w(x) == pytest.approx(friedmanchisquare(*x.T).statistic / (5 * 7))


def test_seeds_that_agree_about_layers_only_are_told_from_ones_that_agree_about_heads():
    rng = np.random.default_rng(0)
    layers = np.array([5.0, 3, 1])[None, :, None] + rng.normal(0, 0.3, (5, 3, 4))
    both = layers + np.array([0, 0.5, 1, 1.5]) * 2
    p = lambda x, within: agreement.shuffled_p(agreement.ranked(x), within, draws=500)
    assert p(layers, False) < 0.02 and p(layers, True) > 0.05
    assert p(both, True) < 0.02
