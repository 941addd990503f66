"""Learning and scaling curves."""

import csv
import json
from pathlib import Path

import plot_arith
import pytest
from heads_support import is_figure, table

from plumbing import UserError
from plumbing.problem_runs import RESULTS

pytest.importorskip("scipy")


def run_folder(tmp_path: Path, name: str, exact: float, seed: int = 1, **row: str) -> None:
    """A finished run with validations after 10 and 20 steps, and its line in results.csv."""
    folder, results = tmp_path / "logs" / name, tmp_path / "results.csv"
    folder.mkdir(parents=True)
    lines = [
        "step,val_loss,train_time_s,exact_match,train_exact",
        "10,1.0,1,0.1,0.2",
        "20,0.5,2,,0.9",
    ]
    (folder / "metrics.csv").write_text("\n".join([*lines, f"20,0.5,2,{exact},", ""]))
    (folder / "evaluation.json").write_text(json.dumps(dict(sets=dict(generate=dict(n=100)))))
    fields = (
        dict(run_id=name, seed=str(seed), answer_format="plain", train_examples="0", batch_size="8")
        | row
    )
    fields |= dict(status="finished", stage="s", final_val_loss="0.5", exact_match=str(exact))
    with open(results, "a", newline="") as f:
        writer = csv.DictWriter(f, RESULTS, restval="")
        if f.tell() == 0:
            writer.writeheader()
        writer.writerow(fields)


def test_curves_show_a_runs_last_exact_match_with_its_interval_and_examples_seen(tmp_path, capsys):
    run_folder(tmp_path, "a", 0.5)
    run_folder(tmp_path, "b", 0.75, answer_format="reversed")
    line = [
        "--results",
        str(tmp_path / "results.csv"),
        "--logs-folder",
        str(tmp_path / "logs"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert plot_arith.main(["--stage", "s", *line]) == 0
    a, b = table(tmp_path / "o/runs.csv")
    assert (a["configuration"], b["configuration"]) == (
        "answer format plain",
        "answer format reversed",
    )
    assert (float(a["exact_match"]), float(b["exact_match"])) == (0.5, 0.75) and a[
        "examples_seen"
    ] == "160"
    assert [round(float(a[key]), 3) for key in ("low", "high")] == [0.404, 0.596]
    assert is_figure(tmp_path / "o/learning.png") and not (tmp_path / "o/examples.png").exists()
    assert (
        "answer format reversed, seed 1: exact match 0.750 [0.657, 0.825] of 100 after 160 examples"
        in capsys.readouterr().out
    )


def test_runs_that_differ_in_training_examples_alone_make_a_scaling_curve(tmp_path):
    for name, n, exact in (("a", "1000", 0.1), ("b", "0", 0.9), ("c", "10000", 0.5)):
        run_folder(tmp_path, name, exact, train_examples=n)
    run_folder(tmp_path, "other", 0.3, train_examples="10", answer_format="reversed")
    rows = plot_arith.rows_wanted(
        plot_arith.arguments(["--stage", "s", "--results", str(tmp_path / "results.csv")])
    )
    runs = [
        plot_arith.read_run(r, l, tmp_path / "logs")
        for r, l in zip(rows, plot_arith.labels_of(rows), strict=True)
    ]
    (group,) = plot_arith.by_examples(runs)
    assert [run.row["run_id"] for run in group] == ["a", "c", "b"] and [
        run.exact[-1] for run in group
    ] == [0.1, 0.5, 0.9]


def test_curves_of_no_such_run_are_refused_with_what_there_is(tmp_path):
    run_folder(tmp_path, "a", 0.5)
    with pytest.raises(UserError, match="no finished run with run_id zz; it has a"):
        plot_arith.main(["--run", "zz", "--results", str(tmp_path / "results.csv")])
