"""compare.py: naming two sets of runs, and what is said of them."""

import subprocess
import sys
from pathlib import Path

import compare
import pytest
from lib.program import UserError
from study_support import ROOT, arms, row, write


def run_compare(folder: Path, rows, *args: str) -> None:
    compare.main(
        [*args, "--results_file", str(write(folder, rows)), "--logs_folder", str(folder / "logs")]
    )


def test_arms_are_named_by_columns_notes_ids_beginnings_and_patterns(tmp_path, capsys):
    rows = arms([3.5, 3.51], [3.6, 3.62])
    rows += [
        row(i, 3.4 + i / 100, attn_gate="elementwise", notes="GATEOPT=adam", run_id=f"adam-{i}")
        for i in (1, 2)
    ]
    ids = [r["run_id"] for r in rows]
    pairs = [
        ("attn_gate=none", "GATEOPT=adam"),
        (",".join(ids[2:4]), "adam-"),
        (ids[2] + "," + ids[3], "adam-?"),
    ]
    for a, b in [
        *pairs,
        ("attn_gate=none,seed=1", "adam-1"),
        ("attn_gate=none", "attn_gate=elementwise,GATEOPT="),
    ]:
        run_compare(tmp_path, rows, a, b)
        assert "they differ in attn_gate: none -> elementwise" in capsys.readouterr().out


def test_one_run_against_another_says_n_1_and_has_no_interval(tmp_path, capsys):
    run_compare(tmp_path, arms([3.5], [3.6]), "attn_gate=none", "attn_gate=elementwise")
    shown = capsys.readouterr().out
    assert shown.count("n=1") >= 3 and "95% CI" not in shown and "-0.1000 (-2.78%)" in shown


@pytest.mark.parametrize(
    "a, b, message",
    [
        ("nobody", "attn_gate=none", "no run id is or begins with 'nobody'"),
        ("attn_gat=none", "attn_gate=const", "did you mean attn_gate?"),
        ("attn_gate=never", "attn_gate=none", "its values here: const, elementwise, none"),
        (
            "attn_gate=elementwise",
            "attn_gate=none",
            "matches 2 configurations, which differ in learning_rate: 0.0036, 0.01",
        ),
        ("attn_gate=none", "learning_rate=0.0036", "in both A and B"),
        ("run_id=cut", "attn_gate=none", "none finished with a loss: cut (preempted)"),
        ("", "attn_gate=none", "A is empty"),
    ],
)
def test_nothing_or_more_than_one_configuration_is_one_error(tmp_path, a, b, message):
    rows = [*arms([3.5], [3.6]), row(1, 3.5, attn_gate="elementwise", learning_rate="0.01")]
    rows += [row(1, 3.5, status="preempted", run_id="cut", attn_gate="const")]
    with pytest.raises(UserError) as error:
        run_compare(tmp_path, rows, a, b)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "program, args, message",
    [
        ("compare.py", ["a", "b", "--results_file", "nowhere.csv"], "nowhere.csv: No such file"),
        ("compare.py", ["a", "b", "--results_file", "empty.csv"], "no rows yet"),
        ("power.py", ["--sd", "0", "--delta", "1"], "sd above 0"),
        ("power.py", ["--sd", "1", "--delta", "1", "--rho", "1"], "rho=1.0 must lie between"),
        (
            "split_results.py",
            ["--results_file", "empty.csv", "--curves", "empty.csv", "--target", "-1"],
            "above 0",
        ),
        (
            "split_results.py",
            ["--results_file", "empty.csv", "--curves", "none.csv"],
            "none.csv: No such file",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, program, args, message):
    (tmp_path / "empty.csv").touch()
    command = [sys.executable, str(ROOT / "scripts" / program), *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().split("\n")
    assert line.startswith(f"{program}: error: ") and message in line


def test_results_of_a_trainer_without_a_gate_are_compared_too(tmp_path, capsys):
    path = tmp_path / "results.csv"
    path.write_text(
        "run_id,date,seed,mixer,final_val_loss,status,num_iterations,steps_done\n"
        "h1,2026-11-27,1,hamt,1.70,finished,9,9\nh2,2026-11-27,2,hamt,1.68,finished,9,9\n"
        "a1,2026-11-27,1,attention,1.90,finished,9,9\na2,2026-11-27,2,attention,1.85,finished,9,9\n"
    )
    compare.main(["mixer=hamt", "mixer=attention", "--results_file", str(path)])
    assert "+0.1850" in capsys.readouterr().out
