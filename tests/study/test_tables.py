"""Tables: which rows count, what a line says, and how it looks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lib.program import UserError
from lib.render import table_text
from lib.stages import Stage
from lib.tables import show_ms
from study_support import arms, compared, lines_of, row, split, table, text_of


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
    assert compared([*arms([3.5], []), row(1, 3.6)]).diff == pytest.approx(-0.1)
    assert compared(
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
    assert show_ms(ms) == shown


@given(st.floats(0, 1e10))
def test_train_time_reads_back_within_half_a_tenth_and_never_shows_sixty_seconds(ms):
    minutes, seconds = show_ms(ms).removesuffix("s").split("m ")
    assert 0 <= float(seconds) < 60 and len(seconds.split(".")[1]) == 1
    assert abs(60 * int(minutes) + float(seconds) - ms / 1000) <= 0.05 + 1e-6


@pytest.mark.parametrize("varied", [0, 1, 4])
@pytest.mark.parametrize("width", [80, 100, 110])
def test_tables_fit_the_columns_of_a_terminal(varied, width):
    notes = "PRESET=demo DATA_ORDER=stream MLP_MATCH=True N_LAYER=3 "
    notes += "INPUT_BIN=/a/folder/far/away/of/a_long_name_*.bin"
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
    text = table_text(table(rows), width)
    assert max(map(len, text.split("\n"))) <= width
    if varied == 4 and width == 80:  # keys too wide to stand in every line
        assert "cell 2: " in text


def test_knobs_that_all_cells_share_are_said_once():
    rows = [row(1, 3.5, notes="PRESET=demo"), row(1, 3.6, notes="PRESET=demo DATA_SEED=3")]
    text = table_text(table(rows))
    assert text.count("PRESET=demo") == 1 and "all cells: PRESET=demo" in text


def test_markdown_table_has_the_same_number_of_cells_in_every_line(tmp_path):
    out = split(tmp_path, arms([3.5, 3.6], [3.6, 3.7]))
    lines = [
        line for line in (out / "tables/stage1.md").read_text().split("\n") if line.startswith("|")
    ]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


OTHER = "run_id seed mixer num_slots learning_rate num_iterations final_val_loss test_ppl".split()
OTHER += ["train_time_ms", "notes"]


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
    found = table(made, Stage("s", baseline={"mixer": "a"}))
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
    with pytest.raises(UserError, match="num_slot is no column; did you mean num_slots"):
        (tmp_path / "stages.toml").write_text('[stage.x]\nbaseline = { num_slot = "8" }\n')
        split(tmp_path, text_of(made, [*OTHER, "stage"]), "--stages", str(tmp_path / "stages.toml"))


def test_a_knob_named_as_a_figure_of_the_table_keeps_its_value():
    columns = ["run_id", "seed", "memory", "final_val_loss", "peak_memory_mib"]
    shared = dict(peak_memory_mib="7")
    made = [
        dict(run_id=f"{m}{s}", seed=str(s), memory=m, final_val_loss=str(3 + s / 9)) | shared
        for s in (1, 2)
        for m in ("on", "zero")
    ]
    shown = table_text(
        table([{c: r[c] for c in columns} for r in made], Stage("s", baseline={"memory": "on"}))
    )
    costs = shown.split("time and memory")[1].splitlines()
    assert "peak memory" in costs[1] and costs[3].startswith("zero")


@pytest.mark.parametrize(("notes", "unit"), [("unit=bytes", "byte"), ("", "token")])
def test_losses_are_per_byte_where_the_runs_trained_on_bytes(tmp_path, capsys, notes, unit):
    split(tmp_path, arms([3.5, 3.6], [3.6, 3.7], notes=notes))
    assert f"final_loss in nats per {unit}," in capsys.readouterr().out
