"""Files of results: torn, old, mixed, large; sorted into stages and never lost."""

import subprocess
import sys

import pytest
import split_results
from lib.curves import Curves
from lib.program import UserError
from lib.results import HEADER
from lib.stages import read_stages
from study_support import (
    METRICS,
    ROOT,
    STAGES,
    A,
    B,
    arms,
    lines_of,
    logged,
    row,
    split,
    text_of,
    timed,
    write,
)


def test_a_torn_row_is_named_and_costs_only_itself(tmp_path, capsys):
    rows = arms([3.5, 3.6], [3.6, 3.7])
    lines = text_of(rows).splitlines()
    zeros = lines[1].replace("3.5", "3.\0", 1)
    torn = [*lines[:3], lines[3][:40], lines[4], 'run9,"an open quote', zeros, lines[1][:20]]
    split(tmp_path, "\n".join(torn))
    shown = capsys.readouterr().out
    for number in (4, 6, 7, 8):
        assert f"results.csv:{number}: " in shown
    assert "results.csv:5: " not in shown and "3 rows, 3 counted" in shown


def test_an_empty_file_is_no_error(tmp_path, capsys):
    for text in ("", "\n", ",".join(HEADER) + "\n"):
        split(tmp_path, text)
        assert "no rows yet" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_crlf_and_the_originals_21_columns_are_read(tmp_path):
    text = text_of(arms([3.5, 3.6], [3.6, 3.7]), columns=HEADER[:21], end="\r\n")
    out = split(tmp_path, text)
    assert [o["seeds"] for o in lines_of(out / "tables/stage1.csv")] == ["2", "2"]
    assert (out / "results_stage1.csv").read_bytes() == text.replace("\r\n", "\n").encode()


def test_rows_are_kept_verbatim(tmp_path):
    rows = [
        row(
            1,
            "3.50000000000000001",
            learning_rate="3.60e-3",
            train_time_ms="1e5",
            notes='A="x, y" B=2',
        ),
        row(2, "3.2938"),
    ]
    text = text_of(rows).replace("3.2938", '"3.2938"')
    assert (split(tmp_path, text) / "results_stage1.csv").read_bytes() == text.encode()


def test_files_of_two_schemas_go_into_one_with_every_field_as_it_was(tmp_path):
    new, old = row(1, "3.50"), row(2, "3.60")
    text = text_of([new]) + text_of([old], columns=HEADER[:21], end="\r\n")
    one, two = lines_of(split(tmp_path, text) / "results_stage1.csv")
    assert {k: v for k, v in one.items() if v} == new
    assert {k: v for k, v in two.items() if v} == {k: v for k, v in old.items() if k in HEADER[:21]}


def test_the_stage_column_beats_the_iterations_rule(tmp_path):
    rows = [
        row(1, 3.5, stage="mine"),
        row(2, 3.6),
        row(3, 3.7, num_iterations=800),
        row(4, 3.8, stage="stage2"),
    ]
    out = split(tmp_path, rows)
    ids = lambda name: [r["run_id"] for r in lines_of(out / f"results_{name}.csv")]
    assert ids("mine") == [rows[0]["run_id"]]
    assert ids("stage1") == [rows[1]["run_id"]]
    assert ids("stage2") == [rows[2]["run_id"], rows[3]["run_id"]]


def test_iterations_of_the_stages_can_be_given_as_lists(tmp_path):
    rows = [row(1, 3.5, num_iterations=n) for n in (10, 20, 30)]
    out = split(tmp_path, rows, "--stage1-iters", "10,20", "--stage2-iters", "30")
    assert [len(lines_of(out / f"results_stage{i}.csv")) for i in (1, 2)] == [2, 1]


def test_rows_in_no_stage_are_counted_and_named(tmp_path, capsys):
    rows = [row(1, 3.5), row(1, 3.5, num_iterations=77), row(1, 3.5, stage="../up")]
    split(tmp_path, rows)
    shown = capsys.readouterr().out
    assert (
        "2 rows in no stage: " in shown
        and rows[1]["run_id"] in shown
        and rows[2]["run_id"] in shown
    )


def test_a_stages_file_sorts_by_any_column_and_sets_keys_baseline_and_extra_rows(tmp_path, capsys):
    stages = tmp_path / "stages.toml"
    stages.write_text(
        '[stage.low]\nlearning_rate = [0.0036]\nkeys = ["num_iterations"]\nextra_csv = "more.csv"\n'
        "[stage.high]\nlearning_rate = 0.01\nnum_iterations = [1500]\n"
        'baseline = {attn_gate = "const"}\n'
    )
    write(
        tmp_path,
        text_of([row(9, 3.0)], columns=("run_id", "seed", "final_val_loss", "attn_gate")),
        "more.csv",
    )
    high = [
        *arms([3.5, 3.6], [], learning_rate="1e-2"),
        row(1, 3.0, attn_gate="const", learning_rate="0.01"),
    ]
    out = split(tmp_path, [row(1, 3.5), *high], "--stages", str(stages))
    assert "1 row of these from more.csv" in capsys.readouterr().out
    low = lines_of(out / "tables/low.csv")
    assert {line["num_iterations"] for line in low} == {"1500", ""}
    assert sorted(float(line["final_loss"]) for line in low) == [3.0, 3.5]
    assert [r["seed"] for r in lines_of(out / "results_low.csv")] == ["1"]
    by_gate = {line["attn_gate"]: line for line in lines_of(out / "tables/high.csv")}
    assert by_gate["const"]["baseline"] == "is the baseline"
    assert float(by_gate["elementwise"]["diff"]) == pytest.approx(0.55)


@pytest.mark.parametrize(
    "toml, message",
    [
        ("[stage.a]\nlerning_rate = 1", "did you mean learning_rate"),
        ("[stages.a]\nseed = 1", r"expected tables \[stage.NAME\]"),
        ("[stage.a", "stages.toml: "),
        ("[stage.a]\nseed = {x = 1}", "expected a value or a list"),
        ('[stage.a]\nbaseline = {attn_gate = ["x", "y"]}', "one value per column"),
        ('[stage."../a"]\nseed = 1', "it names the files"),
        ('[stage.a]\nkeys = ["gate"]', "gate is no column"),
    ],
)
def test_a_wrong_stages_file_is_refused_with_the_reason(tmp_path, toml, message):
    path = tmp_path / "stages.toml"
    path.write_text(toml)
    with pytest.raises(UserError, match=message):
        read_stages(path)


def test_a_stages_file_on_python_3_10_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    with pytest.raises(UserError, match=r"needs Python 3\.11 or later"):
        read_stages(STAGES)


def test_a_stage_file_with_rows_no_source_has_is_not_replaced(tmp_path):
    out = split(tmp_path, [row(1, 3.5, run_id="only_here")])
    before = (out / "results_stage1.csv").read_bytes()
    with pytest.raises(UserError, match=r"holds 1 row that no source has .*only_here"):
        split(tmp_path, [row(2, 3.6)])
    assert (out / "results_stage1.csv").read_bytes() == before


def test_a_source_is_never_replaced_by_its_own_rows(tmp_path):
    source = write(tmp_path, [row(1, 3.5), row(1, 3.5, num_iterations=800)], "results_stage1.csv")
    with pytest.raises(UserError, match="is a source"):
        split_results.main(["--results_file", str(source), "--out-dir", str(tmp_path)])


def test_running_it_twice_changes_nothing(tmp_path):
    rows = arms(A, B)
    out = split(tmp_path, rows)
    before = {p: p.read_bytes() for p in out.rglob("*.*")}
    split(tmp_path, rows)
    assert {p: p.read_bytes() for p in out.rglob("*.*")} == before and len(before) == 3


@pytest.mark.parametrize(
    "program, args, message",
    [
        ("split_results.py", ["--results_file", "nowhere.csv"], "nowhere.csv: No such file"),
        ("split_results.py", ["--results_file", __file__], "line 1 is not a header of results"),
        ("split_results.py", ["--stage1-iters", "many"], "'many' is no number of iterations"),
        ("split_results.py", ["--stages", "x", "--stage1-iters", "1"], "give one of them"),
        ("plot.py", [], "give run ids, or --stage NAME"),
        (
            "plot.py",
            ["nobody", "--logs_folder", "nowhere", "--results_file", "none.csv"],
            "nothing to draw",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, program, args, message):
    command = [sys.executable, str(ROOT / "scripts" / program), *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    last = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 2 and last.startswith(f"{program}: error: ") and message in last
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_missing_torn_and_nan_curves_are_named_and_the_table_is_complete(tmp_path, capsys):
    rows = timed([3.2, 3.3, 3.25, 3.22, 3.24], [3.4, 3.5, 3.45, 3.44, 3.46])
    ids = [r["run_id"] for r in rows]
    logged(tmp_path, rows)
    metrics = [tmp_path / "logs" / run / "metrics.csv" for run in ids]
    metrics[0].unlink()
    metrics[1].write_text(metrics[1].read_text() + "101,3.5,3.")
    metrics[2].write_text(f"{METRICS}\n10,3.5,nan,0.001,1.0,1000,10,,1.0,5\n")
    metrics[3].write_text("")
    out = split(
        tmp_path, [dict(r, stage="s") for r in rows], "--logs_folder", str(tmp_path / "logs")
    )
    (gate,) = [o for o in lines_of(out / "tables/s.csv") if o["attn_gate"] == "elementwise"]
    assert gate["seeds"] == "5" and float(gate["diff"]) == pytest.approx(-0.208)
    shown = capsys.readouterr().out.replace("\n    ", " ")
    for run, what in [
        (ids[0], "metrics.csv: No such file"),
        (ids[1], "torn rows"),
        (ids[2], "no finite number"),
    ]:
        assert any(what in line and run in line for line in shown.splitlines()), (what, shown)
    assert f"no validation in metrics.csv: 2 runs, {ids[2]}, {ids[3]}" in shown
    assert gate["equal_time_how"] == "interpolated from 2 of 5 seeds, un-annealed"


def test_a_stage_of_one_run_is_a_table_without_a_comparison(tmp_path, capsys):
    out = split(tmp_path, [row(1, 3.5, stage="alone")], "--logs_folder", str(tmp_path))
    assert len(lines_of(out / "tables/alone.csv")) == 1
    assert "n=1" in capsys.readouterr().out


def test_curves_of_a_file_without_run_ids_are_refused(tmp_path):
    path = tmp_path / "curves.csv"
    path.write_text("step,val_loss,train_time_ms\n1,3.0,10\n")
    with pytest.raises(UserError, match="has no column run_id"):
        Curves(None, [path])


@pytest.mark.parametrize("seeds", [4, 2500])
def test_20000_rows_are_split(tmp_path, capsys, seeds):
    """Many small cells, and few large ones; docs/experiments.md has the time for 100,000."""
    gates = ("none", "elementwise")
    rate = lambda i: repr(1e-3 + i // 2 // seeds * 1e-7)
    one = lambda i: dict(attn_gate=gates[i % 2], seed=i // 2 % seeds, learning_rate=rate(i))
    rows = [row(loss=3.5 + (i * 37 % 11) / 1000, stage="big", **one(i)) for i in range(20_000)]
    lines = lines_of(split(tmp_path, rows, "--logs_folder", str(tmp_path)) / "tables/big.csv")
    assert len(lines) == 20_000 // seeds and sum(int(line["seeds"]) for line in lines) == 20_000
    assert sum(line["test"] == "paired" for line in lines) == len(lines) // 2
    assert f"20000 rows, 20000 counted, {len(lines)} cells" in capsys.readouterr().out
