"""exact_match.py, view_attention.py, and what a user gets wrong."""

import importlib
import json
import re
import sys
from pathlib import Path

import exact_match
import generate_depth3_dataset
import generate_pilot_dataset
import lib_heads as heads
import numpy as np
import pytest
import view_attention
from heads_support import SMALL, TEXTS, is_figure, problems, save, subject, table, write

import arithmetic
import train_arith
from plumbing import UserError

pytest.importorskip("scipy")


def test_the_attention_viewer_shows_rows_that_sum_to_one_and_never_look_ahead(
    tmp_path, trained, capsys
):
    run, out = save(trained, tmp_path / "runs/s"), tmp_path / "out"
    assert view_attention.main(["--checkpoint", run, "--expr", TEXTS[0], "--out", str(out)]) == 0
    found = json.loads((out / "attention.json").read_text())
    patterns = np.array(found["patterns"])
    T = len(found["tokens"])
    assert (
        patterns.shape == (2, 2, T, T)
        and found["tokens"][:3] == ["^", "3", "0"]
        and found["tokens"][-1] == "$"
    )
    np.testing.assert_allclose(patterns.sum(-1), 1, atol=2e-3)
    assert np.triu(patterns, 1).max() == 0
    assert "the model says 28, right" in capsys.readouterr().out and is_figure(
        out / "attention.png"
    )


PILOT, DEPTH3 = (
    f"make it with: python scripts/arith/generate_{name}_dataset.py --prefix study"
    for name in ("pilot", "depth3")
)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["view_attention", "--expr", "12 + 3"], "--expr '12 \\+ 3': not an arithmetic expression"),
        (["view_attention", "--expr", "1+2", "--layer", "9"], "--layer 9: s has layers 0 to 1"),
        (["view_attention", "--expr", "99999+1"], "answers up to 100,000, but s writes 3 digits"),
        (["eval_ablation"], PILOT),
        (["eval_ood_depth3", "--layer", "1", "--head", "1"], DEPTH3),
        (["patch_heads"], PILOT),
        (["probe_depth"], PILOT),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_with_the_way_out(tmp_path, argv, words):
    run, program = save(subject(), tmp_path / "runs/s"), importlib.import_module(argv[0])
    more = [] if argv[0] == "view_attention" else ["--data", str(tmp_path / "study")]
    with pytest.raises(UserError, match=words):
        program.main(["--checkpoint", run, *more, *argv[1:]])
    with pytest.raises(UserError, match="no such checkpoint"):
        program.main(["--checkpoint", str(tmp_path / "nothing"), *more, *argv[1:]])


def test_the_commands_that_errors_name_are_ones_the_generators_take(tmp_path, monkeypatch):
    k = train_arith.Knobs(**SMALL)
    for prefix, name in (
        ("study", "pairs"),
        ("study", "depth4_control"),
        ("pilot", "flat"),
        ("pilot", "depth3"),
    ):
        words = heads.how_to_make(tmp_path / prefix, name, k).replace("'", "").split()
        monkeypatch.setattr(sys, "argv", words[1:])
        program = generate_depth3_dataset if "depth3" in words[1] else generate_pilot_dataset
        assert words[1] == f"scripts/arith/{program.__name__}.py"
        a = program.arguments()
        assert a.prefix == prefix and a.output_dir == tmp_path
        assert prefix == "pilot" or (a.operators == "+-" and a.held_out)


def test_exact_match_counts_what_the_model_gets_right_and_names_the_baselines(
    trained, data, tmp_path, capsys
):
    line = [
        "--checkpoint",
        save(trained, tmp_path / "runs/one"),
        "--data",
        data,
        "--sets",
        "paren",
        "depth3",
    ]
    assert (
        exact_match.main(
            [
                *line,
                "--operands",
                "3",
                "--digits",
                "1",
                "--items",
                "40",
                "--out",
                str(tmp_path / "o"),
            ]
        )
        == 0
    )
    rows = {(r["sweep"], r["cell"]): r for r in table(tmp_path / "o/exact_match.csv")}
    known = rows["sets", "paren"]
    assert (
        float(known["exact"])
        == heads.measure(trained, problems(trained.language, TEXTS))[:, 0].mean()
        > 0.9
    )
    assert float(known["paren_blind"]) == 0.5, (
        "of each pair, (a-b)-c is what a-b-c is without its brackets"
    )
    assert (
        float(rows["operands", "3"]["exact"]) < 0.5 < float(known["low"]) <= float(known["exact"])
    )
    assert {cell for sweep, cell in rows if sweep == "cells"} >= {
        "2 operands, depth 0",
        "4 operands, depth 2",
    }
    assert (
        is_figure(tmp_path / "o/exact_match.png")
        and "one sets paren: n:48" in capsys.readouterr().out
    )


def test_exact_match_draws_the_same_held_out_expressions_for_every_model():
    seen = [
        arithmetic.exprs_of(exact_match.drawn(s, 30, operands_min=3, operands_max=3)[0], s.language)
        for s in (subject(), subject(seed=9, operands_weights="1,2,3"))
    ]
    assert seen[0] == seen[1] and {
        arithmetic.hash_expr(e) % arithmetic.BUCKETS for e in seen[0]
    } == {arithmetic.BUCKET_OF["test"]}


def test_values_that_the_answer_format_cannot_write_are_left_out_and_counted(
    data, tmp_path, capsys
):
    s = subject(answer_format="complement_bare")
    found, left_out = exact_match.drawn(
        s, 60, operands_min=4, operands_max=4, operand_min=100, operand_max=999
    )
    assert len(found) + left_out == 60 and 0 < left_out < 60 and abs(found.values_N).max() < 500
    write(Path(f"{data}_test_flat.jsonl"), ["250+250", "99+400", "1-2"])
    kept = heads.read_set(s, Path(data), "flat")
    assert kept.exprs == ["99+400", "1-2"] and kept.left_out == 1
    assert "1 of 3 records left out: tiny writes 3 digits" in capsys.readouterr().out
    write(Path(f"{data}_test_pairs.jsonl"), ["250+(251-1)", "(250+251)-1", "9-(8-7)", "(9-8)-7"])
    assert heads.read_set(s, Path(data), "pairs").exprs == ["9-(8-7)", "(9-8)-7"], (
        "a pair goes as a whole"
    )


def test_exact_match_names_the_flag_that_asks_for_more_than_the_models_grammar_has():
    what = "--operands 5: leave it out, or take another model (GRAMMAR=pilot ends at 4 operands"
    with pytest.raises(UserError, match=re.escape(what)):
        exact_match.drawn(subject(), 9, operands_min=5, operands_max=5)


def test_exact_match_refuses_a_cell_with_too_few_expressions(trained, data, tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "ROUND", 2048)  # it gives up sooner
    line = ["--checkpoint", save(trained, tmp_path / "runs/one"), "--data", data, "--sets", "paren"]
    with pytest.raises(
        UserError, match=r"--items 2000 at --operands 2: only \d+ of 2000 different test expr"
    ):
        exact_match.main(
            [*line, "--operands", "2", "--items", "2000", "--out", str(tmp_path / "o")]
        )
