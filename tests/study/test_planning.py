"""What a study will take, what it runs next, and its budget."""

from pathlib import Path

import pytest
from lib.board import Board
from lib.planning import Pace, by_width, forecast_lines, left_s
from lib.progress import Progress
from lib.study import Study, read_study
from pretender import TWO_BY_TWO, go, problems, started

WIDE = """
[stage.s]
seeds = [1]
stop = "decided"
delta = 0.05
sd = 0.02
max_seeds = 12
baseline = { lr = 0.1 }
grid = { lr = [0.1, 0.2, 0.3] }
"""


def planned(pretend, tmp_path, stages: str) -> tuple[Study, list[Progress], Pace]:
    study = read_study(pretend(stages), {})
    (tmp_path / "logs/.locks").mkdir(parents=True, exist_ok=True)
    return study, [Progress(run, run.default_id) for run in study.runs], Pace(tmp_path / "logs")


def finish(runs: list[Progress], pace: Pace, losses: dict[tuple[str, int], float]) -> None:
    """End these runs, by label and seed, after 20 seconds each."""
    for p in runs:
        if (p.run.label, p.run.seed) in losses:
            p.state, p.loss, p.step = "done", losses[p.run.label, p.run.seed], p.run.steps
            pace.add(p.run_id, 20.0, p.run.steps)


# seed by seed: lr=0.2 differs from the baseline by much the same, lr=0.3 by anything
LOSSES = {("lr=0.1", s): 2.0 for s in range(1, 9)}
LOSSES |= {("lr=0.2", s): 2.0 + d for s, d in zip(range(1, 9), [0, 0.02] * 4, strict=True)}
LOSSES |= {("lr=0.3", s): 2.0 + d for s, d in zip(range(1, 9), [-0.3, 0.2] * 4, strict=True)}


def test_time_left_goes_by_runs_that_have_ended_and_by_expected_seeds(pretend, tmp_path):
    study, runs, pace = planned(pretend, tmp_path, WIDE)
    assert not left_s(study, runs, pace) >= 0, "nothing is known before a run has ended"
    finish(runs, pace, {key: LOSSES[key] for key in LOSSES if key[1] == 1})
    left = left_s(study, runs, pace)
    assert 3 * 20 * 2 < left < 3 * 20 * 11, "not the time of all twelve seeds"
    board = Board(study, runs, pace)
    assert board.eta_s() == pytest.approx(left)


def test_a_stage_of_fixed_seeds_takes_what_is_left_of_it(pretend, tmp_path):
    study, runs, pace = planned(pretend, tmp_path, TWO_BY_TWO)
    finish(runs, pace, {("none", 1): 2.0})
    assert left_s(study, runs, pace) == pytest.approx(60)
    runs[1].state, runs[1].step = "running", 5
    assert left_s(study, runs, pace) == pytest.approx(50)


def test_the_widest_undecided_comparison_is_next(pretend, tmp_path):
    study, runs, pace = planned(pretend, tmp_path, WIDE)
    finish(runs, pace, LOSSES)
    order = [p.run.label for p in by_width(study, runs) if p.state == "waiting"]
    assert order[:4] == ["lr=0.1", "lr=0.3", "lr=0.1", "lr=0.3"], "with its baseline"
    assert order[-1] == "lr=0.2"


def test_a_forecast_uses_the_pilots_spread_once_there_are_three_pairs(pretend, tmp_path):
    study, runs, pace = planned(pretend, tmp_path, WIDE)
    text = "\n".join(forecast_lines(study, runs, pace))
    assert "s, lr=0.3: sd of a difference 0.02, as the file guesses" in text
    assert "s: not known yet with no effect" in text
    finish(runs, pace, {key: LOSSES[key] for key in LOSSES if key[1] <= 3})
    text = "\n".join(forecast_lines(study, runs, pace))
    assert "s, lr=0.3: sd of a difference 0.29, of 3 pairs so far" in text
    assert "with an effect of delta = 0.05: " in text and "min with no effect" in text


def test_a_dry_run_says_what_a_sequential_study_will_take(pretend, capsys):
    assert go(pretend(WIDE), "--dry_run") == 0
    out = capsys.readouterr().out
    assert "further seeds, and the chance to decide" in out
    assert "time left, by the pace of the runs that have ended: not known yet" in out


def budgeted(path: Path, seconds: float) -> Path:
    text = path.read_text()
    path.write_text(text.replace('title = "T"', f'title = "T"\nbudget_s = {seconds}'))
    return path


def test_a_budget_ends_a_study_and_a_larger_one_goes_on(pretend, tmp_path, capsys):
    stages = TWO_BY_TWO.replace("[1, 2]", "[1, 2, 3, 4]")
    assert go(budgeted(pretend(stages, "seconds = 0.5"), 1.5)) == 0
    done = len(started(tmp_path))
    out = capsys.readouterr().out
    assert 1 <= done <= 3 and "budget_s = 1.5: " in out and "raise it to go on" in out
    spent = float(out.split("budget_s = 1.5: ")[1].split(" s are")[0])
    assert spent <= 2
    assert go(pretend(stages, "seconds = 0.5")) == 0 and len(started(tmp_path)) == 8


def test_with_a_budget_an_undecided_cell_does_not_wait_for_the_others(pretend, tmp_path):
    assert go(budgeted(pretend(WIDE, "wobble = 0.003"), 600)) == 0
    assert all(f"s-lr{rate}-s2" in started(tmp_path) for rate in (0.1, 0.2, 0.3))


def test_a_budget_that_is_no_number_is_refused(pretend):
    path = pretend(TWO_BY_TWO)
    path.write_text('budget_s = "a day"\n' + path.read_text())
    assert "budget_s = 'a day': expected seconds, above 0" in problems(path)
