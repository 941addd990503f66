"""Stages whose cells start from the checkpoint of another cell."""

import shutil
from pathlib import Path

import fork_gain
import pytest
from lib.cells import make_cells
from lib.comparisons import compare
from lib.program import UserError
from lib.results import read_results
from lib.stages import Stage
from lib.stats import variance_ratio
from pretender import TWO_BY_TWO, go, lines, problems, started
from study_support import result, write_results

FORKED = """
[stage.b]
seeds = [1, 2]
fork = { from = "none", step = 5 }
baseline = { lr = 0.1 }
grid = { lr = [0.1, 0.2] }
"""


def checkpoints(tmp_path) -> dict[str, str]:
    """Where each fork started: run and checkpoint of the trunk, by the fork's label."""
    found = {}
    for line in lines(tmp_path / "logs/forked.txt"):
        run, there, path = line.split()
        assert there == "True"
        found[run.rsplit("-", 2)[0]] = "/".join(Path(path).parts[-2:]).rsplit("-", 1)[0]
    return found


def test_all_cells_of_a_seed_start_from_one_checkpoint_which_is_made_once(pretend, tmp_path):
    assert go(pretend(TWO_BY_TWO + FORKED)) == 0
    made = [run for run in started(tmp_path) if "trunk" in run]
    assert made == ["b-trunk-of-none-s1", "b-trunk-of-none-s2"]
    start = checkpoints(tmp_path)
    assert start["b-lr0.1-s1"] == start["b-lr0.2-s1"] != start["b-lr0.1-s2"]
    assert go(pretend(TWO_BY_TWO + FORKED)) == 0 and len(started(tmp_path)) == 10


def test_stages_share_the_trunk_of_one_cell_seed_and_step(pretend, tmp_path):
    other = FORKED.replace("stage.b", "stage.c").replace("0.2", "0.3")
    later = FORKED.replace("stage.b", "stage.d").replace("step = 5", "step = 6")
    assert go(pretend(TWO_BY_TWO + FORKED + other + later)) == 0
    start = checkpoints(tmp_path)
    assert start["b-lr0.2-s1"] == start["c-lr0.3-s1"] != start["d-lr0.2-s1"]
    assert sum("trunk" in run for run in started(tmp_path)) == 4


def test_a_stage_alone_takes_its_trunks_along(pretend, tmp_path):
    assert go(pretend(TWO_BY_TWO + FORKED), "--stage", "b") == 0
    assert len(started(tmp_path)) == 6 and not any("a-" in run[:2] for run in started(tmp_path))


def test_a_checkpoint_that_was_removed_is_made_again_only_if_it_is_needed(pretend, tmp_path):
    assert go(pretend(TWO_BY_TWO + FORKED)) == 0
    for checkpoint in (tmp_path / "logs").glob("b-trunk*/step_*"):
        shutil.rmtree(checkpoint)
    assert go(pretend(TWO_BY_TWO + FORKED)) == 0 and len(started(tmp_path)) == 10
    assert go(pretend(TWO_BY_TWO + FORKED.replace("0.2]", "0.2, 0.3]"))) == 0
    assert started(tmp_path)[10:] == [
        "b-trunk-of-none-s1",
        "b-lr0.3-s1",
        "b-trunk-of-none-s2",
        "b-lr0.3-s2",
    ]


def test_forks_of_another_step_or_cell_are_other_runs(pretend, tmp_path):
    assert go(pretend(TWO_BY_TWO + FORKED)) == 0
    assert go(pretend(TWO_BY_TWO + FORKED.replace("step = 5", "step = 6"))) == 0
    assert go(pretend(TWO_BY_TWO + FORKED.replace('"none"', '"a/some"'))) == 0
    assert len(started(tmp_path)) == 10 + 6 + 6


def test_a_failing_trunk_leaves_its_forks_alone(pretend, tmp_path, capsys):
    assert go(pretend(TWO_BY_TWO + FORKED, 'fault = "none"'), "--stage", "b") == 1
    assert {run for run in started(tmp_path)} == {"b-trunk-of-none-s1", "b-trunk-of-none-s2"}
    assert "2 failed, 4 waiting" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fork", "words"),
    [
        ('{ from = "nane", step = 5 }', "no cell 'nane'; there are a/none, a/some, b/lr=0.1"),
        ('{ from = "none", step = 10 }', "step = 10, but none has only 10 steps"),
        ('{ from = "none" }', "expected { from = \"CELL\", step = N }"),
        ('{ from = "none", steps = 5 }', "steps is no word of a study file; did you mean step?"),
        ("5", "expected a table, found 5"),
    ],
)  # fmt: skip
def test_a_fork_that_cannot_be_is_refused(pretend, fork, words):
    stage = FORKED.replace('{ from = "none", step = 5 }', fork)
    assert words in problems(pretend(TWO_BY_TWO + stage))


def test_a_fork_of_a_fork_is_refused(pretend):
    stage = FORKED.replace("stage.b", "stage.c").replace('"none"', '"b/lr=0.2"')
    assert "is itself forked" in problems(pretend(TWO_BY_TWO + FORKED + stage))


def test_a_knob_that_adds_parameters_is_refused_with_the_reason(pretend):
    stage = FORKED.replace("{ lr = [0.1, 0.2] }", '{ lr = [0.1], gate = ["none", "more"] }')
    with pytest.raises(UserError, match=r"b\] lr=0.1 more: has 9 parameters, the cell .* has 7; a"):
        go(pretend(TWO_BY_TWO + stage.replace("{ lr = 0.1 }", '{ gate = "none" }')))


# ----------------------------------------------------------------------------
# Tables


def forked(run: str, seed: int, loss: float, rate: float, fork: str, trunk: str) -> dict:
    notes = f"FORK={fork} fork_run={trunk}/step_000005"
    return result(run, seed, loss, notes=notes, learning_rate=rate, stage="b")


def cells(tmp_path, rows: list[dict]):
    found, _ = read_results(write_results(tmp_path / "results.csv", rows))
    return make_cells(found, Stage("b", baseline={"learning_rate": "0.1"}))


def test_tables_pair_by_seed_and_fork(tmp_path):
    rows = []
    for seed, noise in enumerate([0.1, 0.2, 0.3]):
        for rate in (0.1, 0.2):
            loss = 3 + noise - rate / 10
            rows.append(forked(f"{rate}-{seed}", seed, loss, rate, "step5-ab", f"trunk{seed}"))
    base, other = cells(tmp_path, rows)
    found = compare(other, base)
    assert found.test == "no spread" or found.paired is None or found.paired.p < 1e-6
    assert len(found.per_seed) == 3 and found.diff == pytest.approx(-0.01)
    rows[-1]["notes"] = "FORK=step5-ab fork_run=elsewhere/step_000005"
    base, other = cells(tmp_path, rows)
    found = compare(other, base)
    assert len(found.per_seed) == 2 and found.test == "Welch", "one seed, but another checkpoint"


def test_forks_of_other_steps_are_other_cells(tmp_path):
    rows = [forked(f"r{step}", 1, 3.0, 0.1, f"step{step}-ab", "t") for step in (5, 6)]
    assert len(cells(tmp_path, rows)) == 2


def test_the_ratio_of_variances_covers_the_truth_when_seeds_are_shared():
    import numpy as np

    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        shared = rng.normal(size=8)
        whole = shared + rng.normal(size=8)
        found = variance_ratio(list(0.3 * shared), list(whole))
        covered += found.lo <= 0.09 / 2 <= found.hi
    assert 930 <= covered <= 970


def test_fork_gain_prints_the_ratio_and_the_false_claims(tmp_path, capsys):
    import numpy as np

    rng, rows = np.random.default_rng(1), []
    for seed in range(8):
        for rate in (0.1, 0.2):
            loss = 3 + rng.normal() * 0.1
            more = dict(learning_rate=rate, stage="whole")
            rows.append(result(f"w{rate}-{seed}", seed, loss, **more))
            loss = 3 + rng.normal() * 0.01
            rows.append(forked(f"f{rate}-{seed}", seed, loss, rate, "step5-ab", f"t{seed}"))
        for order in range(4):
            loss, notes = 3 + rng.normal(), f"DATA_SEED={order} FORK=x fork_run=t{seed}/step_5"
            rows.append(result(f"s{order}-{seed}", seed, loss, notes=notes, stage="same"))
    source = write_results(tmp_path / "results.csv", rows)
    stages = tmp_path / "stages.toml"
    text = "".join(f"[stage.{s}]\nbaseline = {{ learning_rate = 0.1 }}\n" for s in ("whole", "b"))
    stages.write_text(text + '[stage.same]\nbaseline = { notes = "DATA_SEED=0 FORK=x" }\n')
    options = ["--results_file", str(source), "--stages", str(stages), "--forked", "b"]
    fork_gain.main(options)
    out = capsys.readouterr().out
    ratio = float(out.split("from step 0: ")[1].split(",")[0])
    assert 0.001 < ratio < 0.1 and "n=8 seeds" in out
    assert " of 6 pairs; such a claim is of the two orders" in out
    share = float(out.split("n=8 seeds): ")[1].split("%")[0])
    assert 3 < share < 7
