"""Comparisons beyond the final loss: equal time, equal steps, a target, memory, step time."""

import math

import numpy as np
import pytest
from lib.curves import read_metrics
from lib.power import Design, smallest_difference
from lib.render import table_text
from study_support import arms, compared, lines_of, logged, split, table, timed


def test_equal_time_reads_the_slower_arm_where_the_faster_ends(tmp_path):
    rows = timed([3.2, 3.3], [3.4, 3.5])
    found = compared(rows, curves=logged(tmp_path, rows)).equal_time
    points = read_metrics(tmp_path / "logs" / rows[0]["run_id"] / "metrics.csv")[0]
    then = np.interp(40.0, points.seconds, points.loss)
    assert found.judged.per_seed[0] == pytest.approx(then - 3.4)
    assert found.how == "interpolated, un-annealed" and found.judged.test == "paired"


def test_real_runs_of_equal_time_are_preferred_to_interpolation(tmp_path):
    rows = timed([3.2, 3.3], [3.4, 3.5], notes="") + timed(
        [3.35, 3.41], [3.38, 3.5], notes="TIME_BUDGET_S=40"
    )
    found = {
        line.cell.label: line.comparison
        for line in table(rows, curves=logged(tmp_path, rows)).lines
        if line.comparison
    }
    assert len(found) == 2
    for one in found.values():
        assert one.equal_time.how == "runs of TIME_BUDGET_S=40"
        assert one.equal_time.judged.diff == pytest.approx(3.38 - 3.44)


def test_runs_of_other_lengths_are_compared_at_equal_steps_and_labelled(tmp_path):
    rows = timed([3.2, 3.3], [3.4, 3.5])
    for r in rows[:2]:
        r["steps_done"] = "95"
    found = compared(rows, curves=logged(tmp_path, rows)).equal_steps
    assert found.how == "interpolated at step 95, un-annealed"
    assert compared(timed([3.2], [3.4])).equal_steps.how == "final losses"


def test_without_a_target_the_notes_of_the_runs_say_when_they_reached_theirs():
    rows = timed([3.2, 3.3], [3.4, 3.5])
    for r, (step, ms) in zip(
        rows, [(80, 35200), (84, 36960), (90, 36000), (94, 37600)], strict=True
    ):
        r["notes"] = f"PRESET=demo reached_step={step} reached_ms={ms}"
    found = table(rows)
    none, gate = found.lines
    assert none.numbers["steps_to_target"] == 92 and gate.numbers[
        "seconds_to_target"
    ] == pytest.approx(36.08)
    assert gate.comparison.steps_to.pct == pytest.approx(100 * (82 / 92 - 1))
    assert "the first validation there" in table_text(found)


def test_a_target_that_some_runs_never_reach_is_counted(tmp_path):
    rows = timed([3.2, 3.45], [3.4, 3.5])
    found = table(rows, curves=logged(tmp_path, rows), target=3.42)
    assert [line.numbers["reached"] for line in found.lines] == [1, 1]
    assert "1 of 2" in table_text(found)


def test_memory_is_compared_where_it_was_recorded():
    rows = arms([3.5, 3.5], [3.6, 3.6])
    for r, mib in zip(rows, (33340, 33340, 30556, 30556), strict=True):
        r["peak_memory_mib"] = str(mib)
    found = compared(rows)
    assert found.memory_mib == 2784 and found.memory_pct == pytest.approx(9.1, abs=0.02)
    assert math.isnan(compared(arms([3.5], [3.6])).memory_mib)


def test_the_overhead_of_the_step_has_an_interval_and_with_one_run_none():
    rows = arms([3.5, 3.5, 3.6], [3.6, 3.6, 3.5])
    for r, ms in zip(rows, (424, 425, 426, 399, 400, 402), strict=True):
        r["ms_per_step"] = str(ms)
    found = compared(rows).step_time
    assert found.lo < found.pct < found.hi and found.pct == pytest.approx(100 * (1275 / 1201 - 1))
    assert math.isnan(compared(arms([3.5], [3.6])).step_time.lo)


def test_the_smallest_difference_is_that_of_the_test_used():
    found = compared(arms([3.271, 3.272, 3.2735], [3.292, 3.294, 3.2921]))
    assert found.least == pytest.approx(
        smallest_difference(3, found.sd_diff / math.sqrt(2), Design(rho=0))
    )
    assert math.isnan(compared(arms([3.5], [3.6])).least)


@pytest.mark.parametrize(
    "epochs, flag",
    [(("0.88", "0.88"), ""), (("0.88", "1.76"), "epochs repeats"), (("0.5", "0.8"), "epochs")],
)
def test_other_numbers_of_epochs_in_one_comparison_are_flagged(epochs, flag):
    rows = arms([3.5], [3.6])
    for r, e in zip(rows, epochs, strict=True):
        r["epochs"] = e
    (line,) = [line for line in table(rows).lines if line.comparison]
    assert " ".join(line.flags) == flag
    assert not flag or any("epochs" in remark for remark in table(rows).remarks)


def test_a_shorter_run_over_the_same_data_is_no_mixture_of_epochs():
    rows = timed([3.5], [3.6])
    rows[0] |= dict(epochs="0.47", steps_done="94")
    rows[1] |= dict(epochs="0.5")
    assert not [line for line in table(rows).lines if line.flags]


@pytest.mark.parametrize(
    "column, flag", [("gpu_name", "gpu"), ("torch", "torch"), ("code_sha256", "code")]
)
def test_mixtures_stand_in_the_line_of_the_table_that_they_spoil(tmp_path, capsys, column, flag):
    rows = arms([3.5, 3.4], [3.6, 3.7])
    rows[0][column] = "another"
    out = split(tmp_path, rows, "--logs_folder", str(tmp_path))
    (line,) = [o for o in lines_of(out / "tables/stage1.csv") if o["attn_gate"] == "elementwise"]
    assert line["flags"] == flag
    shown = capsys.readouterr().out
    assert f"  {flag}\n" in shown and f"mixed {column}" in shown
