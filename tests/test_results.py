"""What split_results.py, plot.py and lib_results.py promise about results.csv and what is made of it.

Files are written into a temporary folder; the tests on the original study's files need ../shared and are skipped
without it. The curves are read from the figure object.
"""

import csv
import io
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "scripts"))
import lib_results as lib  # noqa: E402
import plot  # noqa: E402
import split_results  # noqa: E402

REFERENCE = Path(__file__).resolve().parents[2] / "shared/reference/gating"
ORIGINAL = REFERENCE / "original_experiments"
STAGES = REPO / "experiments/stages_original.toml"
needs_original = pytest.mark.skipif(
    not ORIGINAL.exists(), reason=f"the original's files are not in {ORIGINAL}"
)

USUAL = dict(
    attn_gate="none",
    gate_pos="sdpa",
    gate_act="sigmoid",
    learning_rate="0.0036",
    batch_size="512",
    sequence_length="1024",
    num_iterations="1500",
    warmup_iters="0",
    warmdown_iters="1450",
    train_time_ms="600000.0",
    ms_per_step="400.0",
    gpu_name="NVIDIA H200",
    n_gpus="1",
    torch="2.13.0",
    code_sha256="ab" * 32,
    status="finished",
)


def row(seed: int = 1, loss: float | str = 3.5, **given: object) -> dict[str, str]:
    """One row as a trainer writes it; each has an id of its own unless one is given."""
    row.made += 1
    told = {name: str(value) for name, value in given.items()}
    return {
        "run_id": f"run{row.made}",
        "seed": str(seed),
        "final_val_loss": str(loss),
        **USUAL,
        **told,
    }


row.made = 0


def text_of(
    rows: Sequence[Mapping[str, str]], columns: Sequence[str] = lib.HEADER, end: str = "\n"
) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator=end, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def arms(
    a: Sequence[float], b: Sequence[float], seeds_b: Sequence[int] | None = None, **given
) -> list[dict]:
    """Rows of elementwise with losses a and of none with losses b; seeds 1, 2, ... unless given."""
    gated = [row(i + 1, v, attn_gate="elementwise", **given) for i, v in enumerate(a)]
    return gated + [
        row(s, v, **given) for s, v in zip(seeds_b or range(1, len(b) + 1), b, strict=True)
    ]


def write(folder: Path, rows: Sequence[Mapping[str, str]] | str, name: str = "results.csv") -> Path:
    path = folder / name
    path.write_bytes((rows if isinstance(rows, str) else text_of(rows)).encode())
    return path


def split(folder: Path, rows: Sequence[Mapping[str, str]] | str, *options: str) -> Path:
    """Run split_results on these rows; returns the output folder."""
    source = write(folder, rows)
    split_results.main(["--source", str(source), "--out-dir", str(folder / "out"), *options])
    return folder / "out"


def lines_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def table(rows: Sequence[Mapping[str, str]], stage: lib.Stage | None = None) -> lib.Table:
    made = [lib.Row(r, "", f"results.csv:{i}") for i, r in enumerate(rows, start=2)]
    return lib.make_table(made, stage or lib.Stage("stage1"))


def gated(rows: Sequence[Mapping[str, str]]) -> lib.Comparison:
    """The only comparison in a table of these rows."""
    (found,) = [line.comparison for line in table(rows).lines if line.comparison]
    return found


# ----------------------------------------------------------------------------
# The original study


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The tables of the original's files, made the way docs/experiments.md says."""
    if not ORIGINAL.exists():
        pytest.skip(f"the original's files are not in {ORIGINAL}")
    folder = tmp_path_factory.mktemp("original")
    for path in [*ORIGINAL.glob("results_stage*.csv"), ORIGINAL / "baseline.csv"]:
        (folder / path.name).write_bytes(path.read_bytes())
    sources = [str(path) for path in sorted(folder.glob("results_stage*.csv"))]
    split_results.main(
        ["--source", *sources, "--stages", str(STAGES), "--out-dir", str(folder / "out")]
    )
    return folder / "out"


def test_the_17_published_rows_come_out_exactly(original):
    compared = 0
    for published in sorted(ORIGINAL.glob("tables/*.csv")):
        ours = lines_of(original / "tables" / published.name)
        theirs = lines_of(published)
        assert len(ours) == len(theirs)
        for line in theirs:
            keys = [k for k in line if k not in ("seeds", "final_loss", "train_time")]
            # a gate's activation means nothing where there is no gate; the original printed what was recorded
            key = {
                k: "-" if k == "gate_act" and line["attn_gate"] == "none" else line[k] for k in keys
            }
            (own,) = [o for o in ours if all(o[k] == key[k] for k in keys)]
            assert float(own["final_loss"]) == float(line["final_loss"]), line
            assert own["train_time"] == line["train_time"], line
            assert own["seeds"] == line.get("seeds", "2"), line
            compared += 1
    assert compared == 17 + 1  # and the hand-made row, none at 0.0036 in stage 3


def test_every_figure_of_the_published_statistics_comes_out_at_its_printed_precision(original):
    published = lines_of(REFERENCE / "gate_vs_none_stats.csv")
    assert len(published) == 10
    fixed = {
        "mean_diff": ("diff", "+.5f"),
        "sd_diff": ("sd_diff", ".5f"),
        "rel_pct": ("rel_pct", "+.3f"),
        "time_overhead_pct": ("overhead_pct", ".2f"),
        "welch_t": ("welch_t", ".2f"),
        "welch_df": ("welch_df", ".2f"),
        "welch_p": ("welch_p", ".3g"),
        "welch_ci_lo": ("welch_ci_lo", "+.4f"),
        "welch_ci_hi": ("welch_ci_hi", "+.4f"),
        "paired_t": ("paired_t", ".2f"),
        "paired_p": ("paired_p", ".3g"),
        "paired_ci_lo": ("paired_ci_lo", "+.4f"),
        "paired_ci_hi": ("paired_ci_hi", "+.4f"),
    }
    for line in published:
        ours = lines_of(original / f"tables/stage{line['stage'].replace('.', '_')}.csv")
        keys = ("attn_gate", "gate_act", "learning_rate")
        (own,) = [o for o in ours if all(o.get(k, line[k]) == line[k] for k in keys)]
        for theirs, (name, form) in fixed.items():
            assert format(float(own[name]), form) == line[theirs], (
                line["stage"],
                line["attn_gate"],
                name,
            )
        assert (
            " ".join(f"{float(d):+.5f}" for d in own["per_seed_diff"].split())
            == line["per_seed_diff"]
        )
        assert own["seeds"] == own["baseline_seeds"] == line["n"]


def test_stage_files_of_the_original_keep_its_rows_byte_for_byte_but_for_crlf(original):
    for name, source in dict(
        stage1="stage1", stage2="stage2", stage2_5="stage2_5", stage3="stage_3"
    ).items():
        theirs = (ORIGINAL / f"results_{source}.csv").read_bytes()
        assert (original / f"results_{name}.csv").read_bytes() == theirs.replace(b"\r\n", b"\n")


def test_the_originals_rule_alone_puts_both_lots_of_1500_iterations_into_stage1(tmp_path, capsys):
    if not ORIGINAL.exists():
        pytest.skip(f"the original's files are not in {ORIGINAL}")
    sources = [str(path) for path in sorted(ORIGINAL.glob("results_stage*.csv"))]
    split_results.main(["--source", *sources, "--out-dir", str(tmp_path)])
    assert len(lines_of(tmp_path / "results_stage1.csv")) == 10 + 4
    assert "6 rows in no stage: cadd9fa4" in capsys.readouterr().out


def test_a_schedule_whose_ends_overlap_is_flagged_as_in_the_originals_stage_2(original):
    assert (
        "schedule does not fit: warmdown 1450 > 800 iterations"
        in (original / "tables/stage2.md").read_text()
    )
    assert "does not fit" not in (original / "tables/stage1.md").read_text()
    remarks = " ".join(table(arms([3.5], [3.4], warmup_iters=150, num_iterations=1599)).remarks)
    assert "schedule does not fit: warmup 150 + warmdown 1450 > 1599 iterations" in remarks
    assert "does not fit" not in " ".join(
        table(arms([3.5], [3.4], warmup_iters=150, num_iterations=1600)).remarks
    )


# ----------------------------------------------------------------------------
# Statistics

A, B = [3.271, 3.272, 3.2735], [3.292, 3.294, 3.2921]  # written out, near stage 3's


def test_welch_agrees_with_scipy():
    from scipy import stats

    found, theirs = lib.welch(A, B[:2]), stats.ttest_ind(A, B[:2], equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert (found.t, found.df, found.p) == pytest.approx(
        (theirs.statistic, theirs.df, theirs.pvalue), rel=1e-9
    )
    assert (found.lo, found.hi) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_paired_agrees_with_scipy():
    from scipy import stats

    found, theirs = lib.paired(A, B), stats.ttest_rel(A, B)
    interval = theirs.confidence_interval(0.95)
    assert (found.t, found.df, found.p) == pytest.approx(
        (theirs.statistic, theirs.df, theirs.pvalue), rel=1e-9
    )
    assert (found.lo, found.hi) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_paired_interval_agrees_with_a_hand_computed_one():
    # differences 1, 2, 3: mean 2, sd 1, standard error 1/sqrt(3); t(0.975, 2 df) = 4.302653 from a printed table
    found = lib.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.lo, found.hi) == pytest.approx(
        (2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6
    )


def test_holm_agrees_with_a_hand_computed_example():
    # 0.01*4, 0.02*3, 0.03*2 -> not below the one before: 0.06, and 0.5*1
    assert lib.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert lib.holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert lib.holm([0.6, 0.9]) == [1.0, 1.0]
    assert lib.holm([]) == []


def test_holm_counts_all_comparisons_of_a_stage():
    rows = arms(A, B) + [
        row(i + 1, v, attn_gate="headwise") for i, v in enumerate([3.29, 3.2935, 3.2912])
    ]
    found = {line.cell.key["attn_gate"]: line.comparison for line in table(rows).lines}
    smaller, larger = sorted((found["elementwise"], found["headwise"]), key=lambda c: c.chosen.p)
    assert smaller.p_holm == pytest.approx(2 * smaller.chosen.p)
    assert larger.p_holm == pytest.approx(max(larger.chosen.p, 2 * smaller.chosen.p))


def test_equal_seeds_are_paired_in_whatever_order_they_ran():
    found = gated(arms(A, B[::-1], seeds_b=[3, 2, 1]))
    assert found.test == "paired"
    assert found.per_seed == pytest.approx([a - b for a, b in zip(A, B, strict=True)])


def test_other_seeds_are_compared_by_welch():
    found = gated(arms(A, B, seeds_b=[1, 2, 4]))
    assert found.test == "Welch" and found.chosen == lib.welch(A, B)


def test_shared_seeds_are_paired_beside_welch_even_when_welch_is_reported():
    found = gated(arms(A, B, seeds_b=[1, 2, 4]))
    assert found.paired == lib.paired(A[:2], B[:2])


def test_one_seed_gives_n_1_and_no_interval(tmp_path, capsys):
    out = split(tmp_path, arms([3.5], [3.6]))
    (line,) = [o for o in lines_of(out / "tables/stage1.csv") if o["attn_gate"] == "elementwise"]
    assert float(line["diff"]) == pytest.approx(-0.1) and line["test"] == "n=1"
    assert [line[c] for c in ("sd", "ci_lo", "ci_hi", "p", "p_holm")] == [""] * 5
    assert capsys.readouterr().out.count("n=1") == 3  # sd of either arm, and the interval


def test_one_seed_in_one_arm_gives_n_1_and_no_interval():
    found = gated(arms([3.5], B))
    assert found.test == "n=1" and found.chosen is None and math.isnan(found.p_holm)


def test_runs_without_any_spread_have_a_difference_and_no_test(tmp_path):
    out = split(tmp_path, arms([3.1, 3.1], [3.2, 3.2]))
    (line,) = [o for o in lines_of(out / "tables/stage1.csv") if o["attn_gate"] == "elementwise"]
    assert (line["test"], line["p"]) == ("no spread", "")
    assert float(line["diff"]) == pytest.approx(-0.1)
    assert gated(arms([3.1, 3.1], [3.2, 3.2], seeds_b=[8, 9])).test == "no spread"


def test_differences_that_are_rounding_are_no_spread():
    assert gated(arms([0.1 + 0.2, 1.3], [0.3, 1.3])).test == "no spread"


def test_overhead_is_the_ratio_of_mean_step_times():
    rows = arms([3.5, 3.5], [3.6, 3.6])
    for r, ms in zip(rows, ("420", "430", "400", "400"), strict=True):
        r["ms_per_step"] = ms
    assert gated(rows).overhead_pct == pytest.approx(6.25)


def test_a_row_without_step_time_leaves_the_overhead_open():
    assert math.isnan(gated(arms([3.5], [3.6], ms_per_step="")).overhead_pct)


def test_without_scipy_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(lib.UserError, match="needs scipy: pip install scipy matplotlib"):
        lib.welch(A, B)


# ----------------------------------------------------------------------------
# What counts


def test_only_finished_rows_count(tmp_path, capsys):
    rows = arms([3.5, 3.6], [3.6, 3.7])
    rows += [row(7, 9.0, status=s) for s in ("early_stop", "nan", "preempted", "failed")]
    out = split(tmp_path, rows)
    (none,) = [o for o in lines_of(out / "tables/stage1.csv") if o["attn_gate"] == "none"]
    assert none["seeds"] == "2" and float(none["final_loss"]) == pytest.approx(3.65)
    shown = capsys.readouterr().out
    for r in rows[4:]:
        assert f"not counted: 1 {r['status']}: {r['run_id']}" in shown


def test_a_preempted_run_that_finished_later_counts_once():
    rows = [
        *arms([3.5], [3.6]),
        row(1, 5.0, status="preempted", run_id="twice"),
        row(2, 3.7, run_id="twice"),
    ]
    found = table(rows)
    assert "not counted: 1 preempted: twice (finished later)" in found.remarks
    assert [line.cell.values("final_val_loss") for line in found.lines if line.is_baseline] == [
        {"1": 3.6, "2": 3.7}
    ]


def test_a_finished_row_without_a_loss_is_named_and_not_counted():
    found = table([row(1, 3.5), row(2, "nan", run_id="bad")])
    assert found.num_finished == 1 and found.remarks == (
        "not counted: 1 finished without a loss: bad",
    )


def test_a_seed_that_finished_twice_counts_once_with_its_mean_and_is_flagged(tmp_path, capsys):
    rows = [*arms([3.5, 3.6], [3.6, 3.7]), row(2, 3.9, run_id="again")]
    out = split(tmp_path, rows)
    (none,) = [o for o in lines_of(out / "tables/stage1.csv") if o["attn_gate"] == "none"]
    assert (none["seeds"], none["duplicate_rows"]) == ("2", "1")
    assert float(none["final_loss"]) == pytest.approx((3.6 + (3.7 + 3.9) / 2) / 2)
    shown = capsys.readouterr().out
    assert " 2*  " in shown and "seed 2 finished 2 times" in shown and "again" in shown


def test_ungated_runs_are_one_cell_whatever_gate_knobs_they_recorded():
    rows = [row(1, 3.5), row(2, 3.6, gate_pos="value", gate_act="silu", notes="MLP_MATCH=True")]
    assert len(table(rows).lines) == 1
    gates = [row(1, 3.5, attn_gate="headwise"), row(2, 3.6, attn_gate="headwise", gate_act="silu")]
    assert len(table(gates).lines) == 2


def test_knobs_in_the_notes_tell_cells_apart_and_outcomes_there_do_not():
    rows = [
        row(1, 3.5, notes="reached_step=10 reached_ms=5"),
        row(2, 3.6, notes="reached_step=20 reached_ms=7"),
    ]
    assert len(table(rows).lines) == 1
    assert len(table([*rows, row(1, 3.5, notes="N_LAYER=3")]).lines) == 2


def test_numbers_written_differently_are_one_cell():
    assert (
        len(
            table(
                [row(1, 3.5), row(2, 3.6, learning_rate="3.60e-3", num_iterations="1500.0")]
            ).lines
        )
        == 1
    )


def test_a_cell_is_compared_with_the_baseline_that_agrees_in_all_else():
    rows = arms([3.5, 3.6], [3.6, 3.7]) + arms([3.1, 3.2], [3.0, 3.1], learning_rate="0.01")
    found = {(x.cell.key["attn_gate"], x.cell.key["learning_rate"]): x for x in table(rows).lines}
    assert found["elementwise", "0.01"].comparison.diff == pytest.approx(0.1)
    assert found["elementwise", "0.0036"].comparison.diff == pytest.approx(-0.1)


def test_gate_knobs_in_the_notes_do_not_hide_the_baseline():
    assert gated([*arms([3.5], []), row(1, 3.6)]).diff == pytest.approx(-0.1)
    assert gated(
        [*arms([3.5], [], notes="MLP_MATCH=True GATEOPT=adam"), row(1, 3.6)]
    ).diff == pytest.approx(-0.1)


def test_a_cell_without_a_baseline_says_so(tmp_path, capsys):
    out = split(tmp_path, [row(1, 3.5, attn_gate="const", learning_rate="0.01"), row(1, 3.6)])
    (line,) = [o for o in lines_of(out / "tables/stage1.csv") if o["attn_gate"] == "const"]
    assert (line["baseline"], line["diff"]) == ("no baseline", "")
    shown = capsys.readouterr().out
    assert "no baseline (a cell that differs in nothing else) for: attn_gate=const" in shown


@pytest.mark.parametrize(
    "column, other", [("gpu_name", "Tesla T4"), ("torch", "2.9.0"), ("code_sha256", "cd" * 32)]
)
def test_machines_or_programs_mixed_in_one_comparison_are_flagged(column, other):
    rows = arms([3.5], [3.6])
    assert not table(rows).remarks
    rows[1][column] = other
    (remark,) = table(rows).remarks
    assert remark.startswith(f"mixed {column}") and other[:12] in remark and "elementwise" in remark


def test_what_an_old_file_does_not_say_is_no_mixture():
    rows = arms([3.5], [3.6])
    rows[1]["torch"] = rows[1]["code_sha256"] = ""
    assert not table(rows).remarks


# ----------------------------------------------------------------------------
# Files


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
    for text in ("", "\n", ",".join(lib.HEADER) + "\n"):
        split(tmp_path, text)
        assert "no rows yet" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_crlf_and_the_originals_21_columns_are_read(tmp_path):
    text = text_of(arms([3.5, 3.6], [3.6, 3.7]), columns=lib.HEADER[:21], end="\r\n")
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
    text = text_of([new]) + text_of([old], columns=lib.HEADER[:21], end="\r\n")
    one, two = lines_of(split(tmp_path, text) / "results_stage1.csv")
    assert {k: v for k, v in one.items() if v} == new
    assert {k: v for k, v in two.items() if v} == {
        k: v for k, v in old.items() if k in lib.HEADER[:21]
    }


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
        '[stage.high]\nlearning_rate = 0.01\nnum_iterations = [1500]\nbaseline = {attn_gate = "const"}\n'
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
    with pytest.raises(lib.UserError, match=message):
        lib.read_stages(path)


def test_a_stages_file_on_python_3_10_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    with pytest.raises(lib.UserError, match=r"needs Python 3\.11 or later"):
        lib.read_stages(STAGES)


def test_a_stage_file_with_rows_no_source_has_is_not_replaced(tmp_path):
    out = split(tmp_path, [row(1, 3.5, run_id="only_here")])
    before = (out / "results_stage1.csv").read_bytes()
    with pytest.raises(lib.UserError, match=r"holds 1 row that no source has .*only_here"):
        split(tmp_path, [row(2, 3.6)])
    assert (out / "results_stage1.csv").read_bytes() == before


def test_a_source_is_never_replaced_by_its_own_rows(tmp_path):
    source = write(tmp_path, [row(1, 3.5), row(1, 3.5, num_iterations=800)], "results_stage1.csv")
    with pytest.raises(lib.UserError, match="is a source"):
        split_results.main(["--source", str(source), "--out-dir", str(tmp_path)])


def test_running_it_twice_changes_nothing(tmp_path):
    rows = arms(A, B)
    out = split(tmp_path, rows)
    before = {p: p.read_bytes() for p in out.rglob("*.*")}
    split(tmp_path, rows)
    assert {p: p.read_bytes() for p in out.rglob("*.*")} == before and len(before) == 3


@pytest.mark.parametrize(
    "program, args, message",
    [
        ("split_results.py", ["--source", "nowhere.csv"], "nowhere.csv: No such file"),
        ("split_results.py", ["--source", __file__], "line 1 is not a header of results"),
        ("split_results.py", ["--stage1-iters", "many"], "'many' is no number of iterations"),
        ("split_results.py", ["--stages", "x", "--stage1-iters", "1"], "give one of them"),
        ("plot.py", [], "give run ids, or --stage NAME"),
        ("plot.py", ["nobody", "--logs", "nowhere", "--results", "none.csv"], "nothing to draw"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, program, args, message):
    command = [sys.executable, str(REPO / "scripts" / program), *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    last = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 2 and last.startswith(f"{program}: error: ") and message in last
    assert "Traceback" not in done.stderr and done.stdout == ""


# ----------------------------------------------------------------------------
# How it looks


@pytest.mark.parametrize(
    "ms, shown",
    [
        (609112.3, "10m 9.1s"),
        (59_960, "1m 0.0s"),
        (59_940, "0m 59.9s"),
        (3_599_999, "60m 0.0s"),
        (4_382_000, "73m 2.0s"),
        (0, "0m 0.0s"),
        (float("nan"), "NA"),
    ],
)
def test_train_time_is_whole_minutes_and_tenths_of_seconds(ms, shown):
    assert lib.show_ms(ms) == shown


@given(st.floats(0, 1e10))
def test_train_time_reads_back_within_half_a_tenth_and_never_shows_sixty_seconds(ms):
    minutes, seconds = lib.show_ms(ms).removesuffix("s").split("m ")
    assert 0 <= float(seconds) < 60 and len(seconds.split(".")[1]) == 1
    assert abs(60 * int(minutes) + float(seconds) - ms / 1000) <= 0.05 + 1e-6


@pytest.mark.parametrize("varied", [0, 1, 4])
def test_tables_fit_110_columns_of_a_terminal(varied):
    notes = "PRESET=demo DATA_ORDER=stream MLP_MATCH=True N_LAYER=3 INPUT_BIN=/a/folder/far/away/of/a_long_name_*.bin"
    rows = [
        row(
            seed,
            3.5 + seed**2 / 100,
            attn_gate=gate,
            gate_act=act,
            learning_rate=lr,
            notes=f"{notes} DATA_SEED={lr}",
        )
        for gate, act in (
            ("none", "sigmoid"),
            ("elementwise", "sigmoid"),
            ("headwise", "ns_sigmoid"),
        )
        for lr in (0.0036, 0.00468)[: 1 + varied]
        for seed in (1, 2, 3)
    ]
    more = dict(
        num_iterations="99999", warmup_iters="12345", batch_size="4096", sequence_length="65536"
    )
    rows += [row(1, 3.5, notes=notes, **dict(list(more.items())[:n])) for n in range(1, varied)]
    text = lib.table_text(table(rows))
    assert max(map(len, text.split("\n"))) <= 110
    assert ("cell 2: " in text) == (varied > 1)  # keys too wide to stand in every line


def test_knobs_that_all_cells_share_are_said_once():
    rows = [row(1, 3.5, notes="PRESET=demo"), row(1, 3.6, notes="PRESET=demo DATA_SEED=3")]
    text = lib.table_text(table(rows))
    assert text.count("PRESET=demo") == 1 and "all cells: PRESET=demo" in text


def test_markdown_table_has_the_same_number_of_cells_in_every_line(tmp_path):
    out = split(tmp_path, arms([3.5, 3.6], [3.6, 3.7]))
    lines = [
        line for line in (out / "tables/stage1.md").read_text().split("\n") if line.startswith("|")
    ]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


# ----------------------------------------------------------------------------
# Plots

METRICS = (
    "step,train_loss,val_loss,lr,train_time_s,tokens,tokens_per_s,mfu,grad_norm,peak_memory_mib"
)


def metrics_line(step: int, loss: float | str, seconds: float) -> str:
    """A row as train_gpt.py writes it: before the first step there is no training loss, rate or time."""
    return f"{step},3.5,{loss},0.001,{seconds},1000,10,,1.0,5" if step else f"0,,{loss},,,0,,,,"


def log_run(folder: Path, run_id: str, final: float, speed: float = 1.0) -> None:
    """A run of 100 steps, validated every 10, from 16 nats down to `final`."""
    losses = {
        step: final + (16 - final) * (1 - step / 100) ** 2 if step else 16.0
        for step in range(0, 101, 10)
    }
    lines = [metrics_line(step, losses.get(step, ""), speed * step) for step in range(101)]
    (folder / run_id).mkdir(parents=True)
    (folder / run_id / "metrics.csv").write_text("\n".join([METRICS, *lines]) + "\n")


def drawn(monkeypatch, argv: Sequence[str]):
    """The figure that plot.py makes with these arguments."""
    figures = []
    make = lib.loss_figure
    monkeypatch.setattr(lib, "loss_figure", lambda *a: figures.append(make(*a)) or figures[-1])
    plot.main(argv)
    return figures[0]


@pytest.fixture
def study(tmp_path) -> list[str]:
    """Options for plot.py on two cells of two finished seeds, and one run that was preempted."""
    rows = [*arms([3.2, 3.3], [3.4, 3.5]), row(3, 9.0, status="preempted", run_id="cut")]
    for r in rows:
        log_run(tmp_path / "logs", r["run_id"], float(r["final_val_loss"]))
    options = ["--logs", str(tmp_path / "logs"), "--results", str(write(tmp_path, rows))]
    return [*options, "--out", str(tmp_path / "figures")]


def test_plot_writes_png_and_svg_and_prints_their_paths(tmp_path, study, capsys):
    plot.main(["--stage", "stage1", *study])
    png, svg = (tmp_path / "figures" / f"val_loss_stage1.{kind}" for kind in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG") and b"<svg" in svg.read_bytes()
    assert capsys.readouterr().out.split() == [str(png), str(svg)]


def test_plot_draws_one_mean_line_and_one_band_per_cell(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", *study])
    assert [(len(axes.lines), len(axes.collections)) for axes in figure.axes] == [(2, 2), (2, 2)]
    by_label = {line.get_label(): line.get_ydata()[-1] for line in figure.axes[0].lines}
    assert by_label == pytest.approx({"none (n=2)": 3.45, "elementwise (n=2)": 3.25})
    assert "n=2" in figure.get_supxlabel()


def test_plot_with_each_draws_one_line_per_run(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", "--each", *study])
    assert [len(axes.lines) for axes in figure.axes] == [4, 4]
    assert figure.get_supxlabel().startswith("n=1")


def test_plot_leaves_step_0_out_of_view(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", *study])
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert axes.lines[0].get_ydata()[0] == 16.0  # it is drawn, and outside
    assert low < 3.2 and 3.5 < high < 12


def test_plot_names_units_on_every_axis(monkeypatch, study):
    steps, time = drawn(monkeypatch, ["--stage", "stage1", *study]).axes
    assert (
        "nats per token" in steps.get_ylabel()
        and "steps" in steps.get_xlabel()
        and "(s;" in time.get_xlabel()
    )


def test_plot_takes_runs_that_results_does_not_know_and_names_missing_ones(
    monkeypatch, tmp_path, study, capsys
):
    log_run(tmp_path / "logs", "running", 3.9)
    figure = drawn(monkeypatch, ["running", "cut", "nobody", *study])
    assert sorted(line.get_label() for line in figure.axes[0].lines) == [
        "none (n=1)",
        "running (n=1)",
    ]
    assert "nobody is left out" in capsys.readouterr().err


def test_a_mean_curve_uses_only_steps_that_all_its_runs_have():
    curve = lib.make_curve(
        "x", [lib.Points([0, 5, 10], [0, 1, 2], [9, 4, 2]), lib.Points([0, 10], [0, 4], [9, 4])]
    )
    assert (curve.step, curve.seconds, curve.loss) == ([0, 10], [0, 3], [9, 3])
    assert (curve.low, curve.high) == ([9, 2], [9, 4])


def test_more_cells_than_colours_stay_distinguishable():
    curves = [lib.make_curve(str(i), [lib.Points([0, 10], [0, 1], [9, i])]) for i in range(20)]
    lines = lib.loss_figure(curves, "many").axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20


def test_metrics_skip_torn_rows_and_the_last_of_a_repeated_step_wins(tmp_path):
    path = tmp_path / "metrics.csv"
    lines = [
        metrics_line(0, 9.0, 0),
        metrics_line(10, 5.0, 1),
        metrics_line(20, 4.0, 2),
        metrics_line(10, 6.0, 7),
    ]
    path.write_text("\n".join([METRICS, *lines[:3], "30,3.5,3.0,0.0", *lines[3:], "4"]))
    points, torn = lib.read_metrics(path)
    assert (points.step, points.seconds, points.loss) == ([0, 10, 20], [0, 7, 2], [9, 6, 4])
    assert torn == 2


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(lib.UserError, match="needs matplotlib: pip install scipy matplotlib"):
        lib.loss_figure([], "x")


# ----------------------------------------------------------------------------
# Rows of another trainer

OTHER = "run_id seed mixer num_slots learning_rate num_iterations final_val_loss test_ppl train_time_ms notes".split()


def other(**values: object) -> dict[str, str]:
    given = dict(
        mixer="hamt",
        num_slots=16,
        learning_rate=0.003,
        num_iterations=100,
        train_time_ms=1000,
        notes="",
    )
    given |= dict(run_id=f"r{values}", test_ppl=f"{values['final_val_loss']}1")
    return {k: str((given | values)[k]) for k in [*OTHER, "stage"] if k in given | values}


def test_own_columns_before_the_loss_tell_cells_apart_and_those_behind_it_do_not():
    made = [
        other(seed=s, mixer=m, final_val_loss=3 + 0.01 * s + (m == "hamt"))
        for s in (1, 2)
        for m in ("a", "hamt")
    ]
    found = table(made, lib.Stage("s", baseline={"mixer": "a"}))
    assert [(line.cell.key, line.numbers["seeds"]) for line in found.lines] == [
        ({"mixer": "a"}, 2),
        ({"mixer": "hamt"}, 2),
    ]
    assert found.lines[1].comparison.diff == pytest.approx(1)


def test_without_a_named_baseline_another_trainers_cells_are_listed_and_the_way_to_compare_is_said(
    tmp_path, capsys
):
    made = [other(seed=1, num_slots=n, final_val_loss=3) for n in (8, 64)]
    split(tmp_path, text_of(made, OTHER), "--stage1-iters", "100")
    assert [r["num_slots"] for r in lines_of(tmp_path / "out/tables/stage1.csv")] == ["8", "64"]
    assert "no baseline is named; --stages FILE names one" in capsys.readouterr().out


def test_a_stages_file_may_name_another_trainers_columns(tmp_path):
    made = [other(seed=s, num_slots=n, notes=w, final_val_loss=3 + n / 100 + s / 1000, stage="x")
            for s in (1, 2, 3) for n, w in ((8, ""), (64, ""), (8, "DECAY=0"))]  # fmt: skip
    (tmp_path / "stages.toml").write_text('[stage.x]\nbaseline = { num_slots = "8", notes = "" }\n')
    split(tmp_path, text_of(made, [*OTHER, "stage"]), "--stages", str(tmp_path / "stages.toml"))
    lines = lines_of(tmp_path / "out/tables/x.csv")
    assert [(r["num_slots"], r["notes"], r["baseline"][:2]) for r in lines] == [
        ("8", "", "is"), ("8", "DECAY=0", "nu"), ("64", "", "nu"),
    ]  # fmt: skip
    with pytest.raises(lib.UserError, match="num_slot is no column; did you mean num_slots"):
        (tmp_path / "stages.toml").write_text('[stage.x]\nbaseline = { num_slot = "8" }\n')
        split(tmp_path, text_of(made, [*OTHER, "stage"]), "--stages", str(tmp_path / "stages.toml"))


def test_a_knob_named_as_a_figure_of_the_table_keeps_its_value():
    columns = ["run_id", "seed", "memory", "final_val_loss", "peak_memory_mib"]
    made = [dict(run_id=f"{m}{s}", seed=str(s), memory=m, final_val_loss=str(3 + s / 9), peak_memory_mib="7")
            for s in (1, 2) for m in ("on", "zero")]  # fmt: skip
    shown = lib.table_text(
        table([{c: r[c] for c in columns} for r in made], lib.Stage("s", baseline={"memory": "on"}))
    )
    costs = shown.split("time and memory")[1].splitlines()
    assert "peak memory" in costs[1] and costs[3].startswith("zero")
