"""Statistics: against scipy, by hand, and over simulated studies with known truth."""

import math
import sys

import numpy as np
import pytest
from lib.comparisons import compare
from lib.power import Design, smallest_difference
from lib.program import UserError
from lib.stats import holm, paired, ratio, welch
from scipy import stats
from study_support import STUDIES, A, B, arms, cell, compared, lines_of, row, split, table


def test_welch_agrees_with_scipy():

    found, theirs = welch(A, B[:2]), stats.ttest_ind(A, B[:2], equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert (found.t, found.df, found.p) == pytest.approx(
        (theirs.statistic, theirs.df, theirs.pvalue), rel=1e-9
    )
    assert (found.lo, found.hi) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_paired_agrees_with_scipy():

    found, theirs = paired(A, B), stats.ttest_rel(A, B)
    interval = theirs.confidence_interval(0.95)
    assert (found.t, found.df, found.p) == pytest.approx(
        (theirs.statistic, theirs.df, theirs.pvalue), rel=1e-9
    )
    assert (found.lo, found.hi) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_paired_interval_agrees_with_a_hand_computed_one():
    # differences 1, 2, 3: mean 2, sd 1, standard error 1/sqrt(3); t(0.975, 2 df) = 4.302653 from a
    # printed table
    found = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.lo, found.hi) == pytest.approx(
        (2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6
    )


def test_holm_agrees_with_a_hand_computed_example():
    # 0.01*4, 0.02*3, 0.03*2 -> not below the one before: 0.06, and 0.5*1
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_counts_all_comparisons_of_a_stage():
    rows = arms(A, B) + [
        row(i + 1, v, attn_gate="headwise") for i, v in enumerate([3.29, 3.2935, 3.2912])
    ]
    found = {line.cell.key["attn_gate"]: line.comparison for line in table(rows).lines}
    smaller, larger = sorted((found["elementwise"], found["headwise"]), key=lambda c: c.chosen.p)
    assert smaller.p_holm == pytest.approx(2 * smaller.chosen.p)
    assert larger.p_holm == pytest.approx(max(larger.chosen.p, 2 * smaller.chosen.p))


def test_equal_seeds_are_paired_in_whatever_order_they_ran():
    found = compared(arms(A, B[::-1], seeds_b=[3, 2, 1]))
    assert found.test == "paired"
    assert found.per_seed == pytest.approx([a - b for a, b in zip(A, B, strict=True)])


def test_other_seeds_are_compared_by_welch():
    found = compared(arms(A, B, seeds_b=[1, 2, 4]))
    assert found.test == "Welch" and found.chosen == welch(A, B)


def test_shared_seeds_are_paired_beside_welch_even_when_welch_is_reported():
    found = compared(arms(A, B, seeds_b=[1, 2, 4]))
    assert found.paired == paired(A[:2], B[:2])


def test_one_seed_gives_n_1_and_no_interval(tmp_path, capsys):
    out = split(tmp_path, arms([3.5], [3.6]))
    (line,) = [o for o in lines_of(out / "tables/stage1.csv") if o["attn_gate"] == "elementwise"]
    assert float(line["diff"]) == pytest.approx(-0.1) and line["test"] == "n=1"
    assert [line[c] for c in ("sd", "ci_lo", "ci_hi", "p", "p_holm")] == [""] * 5
    assert capsys.readouterr().out.count("n=1") == 3  # sd of either arm, and the interval


def test_one_seed_in_one_arm_gives_n_1_and_no_interval():
    found = compared(arms([3.5], B))
    assert found.test == "n=1" and found.chosen is None and math.isnan(found.p_holm)


def test_runs_without_any_spread_have_a_difference_and_no_test(tmp_path):
    out = split(tmp_path, arms([3.1, 3.1], [3.2, 3.2]))
    (line,) = [o for o in lines_of(out / "tables/stage1.csv") if o["attn_gate"] == "elementwise"]
    assert (line["test"], line["p"]) == ("no spread", "")
    assert float(line["diff"]) == pytest.approx(-0.1)
    assert compared(arms([3.1, 3.1], [3.2, 3.2], seeds_b=[8, 9])).test == "no spread"


def test_differences_that_are_rounding_are_no_spread():
    assert compared(arms([0.1 + 0.2, 1.3], [0.3, 1.3])).test == "no spread"


def test_overhead_is_the_ratio_of_mean_step_times():
    rows = arms([3.5, 3.5], [3.6, 3.6])
    for r, ms in zip(rows, ("420", "430", "400", "400"), strict=True):
        r["ms_per_step"] = ms
    assert compared(rows).overhead_pct == pytest.approx(6.25)


def test_a_row_without_step_time_leaves_the_overhead_open():
    assert math.isnan(compared(arms([3.5], [3.6], ms_per_step="")).overhead_pct)


def test_without_scipy_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UserError, match="needs scipy: pip install scipy matplotlib"):
        welch(A, B)


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("test", ["paired", "Welch"])
def test_the_95_percent_interval_covers_the_truth_in_93_to_97_percent_of_2000_studies(n, test):
    rng, truth, covered = np.random.default_rng(n), -0.004, 0
    shared = rng.normal(0, 0.001, (STUDIES, n, 1)) * (
        test == "paired"
    )  # what a seed does to both arms
    losses = 3.28 + shared + rng.normal(0, [0.0013, 0.0016], (STUDIES, n, 2)) + [truth, 0]
    for study in losses:
        found = compare(
            cell(study[:, 0]), cell(study[:, 1], first_seed=1 if test == "paired" else 50)
        )
        assert found.test == test
        covered += found.chosen.lo <= truth <= found.chosen.hi
    assert 0.93 <= covered / STUDIES <= 0.97


@pytest.mark.parametrize("test", ["paired", "Welch"])
def test_holm_keeps_any_false_claim_among_four_comparisons_below_6_percent(test):
    """Five cells that are all the same, four compared with the fifth: 2000 stages through
    make_table."""
    rng, gates = np.random.default_rng(4), ("none", "const", "headwise", "elementwise", "other")
    any_claim = np.zeros(2)
    for study in 3.28 + rng.normal(0, 0.0013, (STUDIES, 5, 3)):
        seed = lambda gate, i: str(i + 10 * (test == "Welch") * gates.index(gate))
        rows = [
            {"run_id": "r", "attn_gate": g, "seed": seed(g, i), "final_val_loss": repr(float(v))}
            for g, own in zip(gates, study, strict=True)
            for i, v in enumerate(own)
        ]
        found = [line.comparison for line in table(rows).lines if line.comparison]
        assert len(found) == 4 and found[0].test == test
        any_claim += [min(c.p_holm for c in found) < 0.05, min(c.chosen.p for c in found) < 0.05]
    corrected, bare = any_claim / STUDIES
    assert corrected <= 0.06
    assert bare > 0.08  # so there was something to correct


def test_the_interval_of_a_ratio_covers_the_truth_in_93_to_97_percent_of_2000_studies():
    rng, covered = np.random.default_rng(7), 0
    for a, b in zip(
        rng.normal(424, 4, (STUDIES, 4)), rng.normal(400, 2, (STUDIES, 4)), strict=True
    ):
        found = ratio(list(a), list(b))
        covered += found.lo <= 6.0 <= found.hi
    assert 0.93 <= covered / STUDIES <= 0.97


def test_the_smallest_difference_is_found_in_four_of_five_studies():
    rng, n = np.random.default_rng(1), 4
    least = smallest_difference(n, 0.0013, Design(rho=0))
    found = 0
    for a, b in zip(
        rng.normal(least, 0.0013, (STUDIES, n)), rng.normal(0, 0.0013, (STUDIES, n)), strict=True
    ):
        found += paired(list(a), list(b)).p < 0.05
    assert found / STUDIES == pytest.approx(0.8, abs=0.03)
