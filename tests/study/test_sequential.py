"""Sequential stages: what they claim in simulated studies, and which runs they start."""

import math

import numpy as np
import pytest
import split_results
from lib.power import Design, seeds_needed
from lib.sequential import (
    BETTER,
    NOT_BETTER,
    UNDECIDED,
    WORSE,
    Rule,
    critical,
    decide,
    first_decisions,
    interval,
    log_ratio,
    simulate,
)
from pretender import TWO_BY_TWO, go, problems, started
from scipy import stats
from study_support import arms, lines_of, write

STUDIES = 2000
# delta over the sd of a difference; the seeds of the fixed design are 34, 10 and 5
RATIOS = [0.5, 1.0, 2.0]


def rule_for(ratio: float, **more) -> tuple[Rule, int]:
    fixed = seeds_needed(ratio, 1 / math.sqrt(2), Design(rho=0.0))
    return Rule(**dict(delta=ratio, max_seeds=3 * fixed, sd=1.0) | more), fixed


@pytest.mark.parametrize("n, effect, mean", [(2, 0.7, 0.4), (5, 1.0, -0.3), (30, 0.5, 0.6)])
def test_the_likelihood_ratio_is_that_of_the_t_statistic(n, effect, mean):
    values = np.random.default_rng(n).normal(mean, 1, n)
    t = values.mean() / values.std(ddof=1) * math.sqrt(n)
    theirs = stats.nct.logpdf(t, n - 1, effect * math.sqrt(n)) - stats.t.logpdf(t, n - 1)
    r = np.array(values.sum() / math.sqrt((values**2).sum()))
    assert float(log_ratio(n, r, effect)) == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("ratio", RATIOS)
def test_without_an_effect_false_claims_stay_below_alpha_and_seeds_below_0_6_of_the_fixed_design(
    ratio,
):
    rule, fixed = rule_for(ratio)
    found = simulate(0, 1, rule, STUDIES)
    better, worse, *_ = found.shares
    assert better + worse <= rule.alpha and found.mean_seeds <= 0.6 * fixed


@pytest.mark.parametrize("ratio", RATIOS)
def test_an_effect_of_delta_is_found_with_a_power_of_0_8(ratio):
    rule, _ = rule_for(ratio)
    better, worse, not_better, _ = simulate(ratio, 1, rule, STUDIES).shares
    assert better >= 0.8 and worse <= rule.alpha and not_better <= 1 - rule.power


@pytest.mark.parametrize("guess", [0.5, 2.0, math.nan])
def test_a_wrong_guess_of_the_spread_costs_seeds_and_no_false_claims(guess):
    rule, _ = rule_for(1.0, sd=guess)
    better, worse, *_ = simulate(0, 1, rule, STUDIES).shares
    found = simulate(1.0, 1, rule, STUDIES).shares
    assert better + worse <= rule.alpha and found[2] <= 1 - rule.power


def test_a_variant_that_is_worse_is_called_worse_or_not_better():
    rule, _ = rule_for(1.0)
    better, worse, not_better, _ = simulate(-2.0, 1, rule, STUDIES).shares
    assert better <= rule.alpha / 2 and worse + not_better > 0.99


def test_the_interval_holds_the_truth_after_every_one_of_100_seeds_in_95_percent_of_studies():
    rule, rng, held = Rule(1.0, 100, sd=1.0), np.random.default_rng(3), 0
    limits = [critical(n, rule.effects, rule.threshold, 2) for n in range(2, 101)]
    studies = rng.normal(-0.7, 1.3, (STUDIES, 100)) + 0.7  # the truth is moved to 0
    for n, limit in enumerate(limits, start=2):
        r = studies[:, :n].sum(1) / np.sqrt((studies[:, :n] ** 2).sum(1))
        held = held | (np.abs(r) > limit)
    assert held.mean() <= 0.05
    low, high = interval(list(studies[0, :30] - 0.7), rule)
    r = (studies[0, :30] - 0.7 - high).sum() / math.sqrt(
        ((studies[0, :30] - 0.7 - high) ** 2).sum()
    )
    assert abs(r) == pytest.approx(limits[28]) and low < -0.7 < high


def test_what_is_decided_stays_decided_whatever_seeds_follow():
    rule = Rule(0.1, 20, sd=0.05)
    first = decide([-0.2, -0.21, -0.19, -0.2, -0.2], rule)
    assert first.word == BETTER and first.n < 5
    later = decide([-0.2, -0.21, -0.19, -0.2, -0.2, *[0.5] * 10], rule)
    assert later == first


def test_two_pairs_without_any_spread_and_one_pair_alone_decide_nothing_false():
    assert decide([], Rule(0.1, 5)).word == UNDECIDED
    assert decide([-9.0], Rule(0.1, 5, sd=0.01)).word == UNDECIDED
    words = first_decisions(np.zeros((1, 6)), Rule(0.1, 6, sd=0.05))
    assert set(words[0]) <= {UNDECIDED, NOT_BETTER} and WORSE not in words


# ----------------------------------------------------------------------------
# Tables

STAGE = """
[stage.mini]
baseline = {attn_gate = "none"}

[stage.mini.sequential]
delta = 0.05
alpha = 0.05
power = 0.8
max_seeds = 12
sd = 0.01
num_comparisons = 1
"""


def test_a_sequential_table_names_where_it_stopped_and_shows_no_plain_p(tmp_path, capsys):
    better = [3.40, 3.41, 3.39, 3.40, 3.41, 3.38]
    rows = arms(better, [3.50, 3.515, 3.49, 3.505, 3.50, 3.49], stage="mini")
    (tmp_path / "stages.toml").write_text(STAGE)
    source, stages = str(write(tmp_path, rows)), str(tmp_path / "stages.toml")
    split_results.main(
        ["--results_file", source, "--stages", stages, "--out-dir", str(tmp_path / "out")]
    )
    text = " ".join(capsys.readouterr().out.split())
    (line,) = [x for x in lines_of(tmp_path / "out/tables/mini.csv") if x["decision"]]
    assert line["decision"] == "better" and line["test"].startswith("sequential, stopped after ")
    assert float(line["ci_hi"]) < 0 and "valid after every seed" in text
    assert not any(
        value for name, value in line.items() if name == "p" or name.endswith(("_p", "p_holm"))
    )
    assert "sequential, stopped after" in (tmp_path / "out/tables/mini.md").read_text()


# ----------------------------------------------------------------------------
# Runs

DECIDED = TWO_BY_TWO.replace(
    "seeds = [1, 2]", 'seeds = [1]\nstop = "decided"\ndelta = 0.05\nsd = 0.01\nmax_seeds = 9'
)


def test_seeds_are_added_until_a_better_cell_is_decided_and_no_further(pretend, tmp_path, capsys):
    assert go(pretend(DECIDED, "wobble = 0.003")) == 0
    out = capsys.readouterr().out
    n = int(out.split("stopped after ")[1].split(":")[0])
    assert 2 <= n < 9 and "a, some: better (delta 0.05)" in out
    assert started(tmp_path) == [f"a-{g}-s{s}" for s in range(1, n + 1) for g in ("none", "some")]
    toml = (tmp_path / "tables/study.toml").read_text() if (tmp_path / "tables").exists() else ""
    assert "sequential = { delta = 0.05" in toml or "tables" not in out
    assert go(pretend(DECIDED, "wobble = 0.003")) == 0 and len(started(tmp_path)) == 2 * n


def test_a_cell_without_an_effect_is_decided_and_spared_while_the_others_go_on(
    pretend, tmp_path, capsys
):
    stage = DECIDED.replace('["some", "none"]', '["some", "none", "more"]')
    assert go(pretend(stage, "wobble = 0.003")) == 0
    out = capsys.readouterr().out
    assert "a, some: better" in out and "a, more: not better by delta" in out
    counts = [
        sum(f"a-{gate}-" in run for run in started(tmp_path)) for gate in ("none", "some", "more")
    ]
    assert counts[0] == max(counts) and max(counts) < 9


def test_out_of_seeds_is_said_as_undecided(pretend, tmp_path, capsys):
    stage = DECIDED.replace("max_seeds = 9", "max_seeds = 2").replace(
        "delta = 0.05", "delta = 0.02"
    )
    assert go(pretend(stage, "wobble = 0.04")) == 0
    assert "a, some: undecided" in capsys.readouterr().out and len(started(tmp_path)) == 4


@pytest.mark.parametrize(
    "words, message",
    [
        ("delta = 0.05\nmax_seeds = 3", "delta goes with stop"),
        ('stop = "soon"', "expected \"decided\""),
        ('stop = "decided"', "needs delta and max_seeds"),
        ('stop = "decided"\ndelta = -1\nmax_seeds = 3', "expected nats above 0"),
        ('stop = "decided"\ndelta = 0.1\nmax_seeds = 1', "but 2 seeds are listed"),
        ('stop = "decided"\ndelta = "x"\nmax_seeds = 3', "delta = 'x': expected a number"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_hold_is_refused(pretend, words, message):
    found = problems(pretend(TWO_BY_TWO.replace("seeds", f"{words}\nseeds")))
    assert message in found
