"""Study files: all that is wrong in one is said before anything runs."""

import re
import sys

import pytest
from lib.program import UserError
from pretender import TWO_BY_TWO, end_of, go, launcher, problems


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("", "has no stage"),
        (
            TWO_BY_TWO + "knobs = { gat = 1 }",
            r"\[stage.a\] knobs: gat is no knob of pretender.py; did you mean gate\?",
        ),
        (TWO_BY_TWO + "sedes = [1]", "sedes is no word of a study file; did you mean seeds"),
        (TWO_BY_TWO + "knobs = { lr = -1 }", "LR='-1': expected a number >= 0"),
        (
            TWO_BY_TWO + "knobs = { lr = [1, 2] }",
            r"lr = \[1, 2\]: expected one value \(lists are for grid\)",
        ),
        (TWO_BY_TWO.replace('"none" }', '"more" }'), "no cell is the baseline gate=more"),
        (
            TWO_BY_TWO.replace('"none" }', '"moar" }'),
            "baseline: GATE='moar': expected one of .* did you mean more",
        ),
        (TWO_BY_TWO.replace('baseline = { gate = "none" }', ""), "has no baseline"),
        (TWO_BY_TWO.replace('["some", "none"]', "[]"), "an empty list makes an empty grid"),
        (TWO_BY_TWO.replace('{ gate = ["some", "none"] }', "{}"), "grid is empty"),
        (
            TWO_BY_TWO + 'cells = [{ gate = "some" }]',
            "cells 'gate=some' and 'gate=some' are the same training",
        ),
        (
            TWO_BY_TWO + 'cells = [{ gate = "some", lr = 0.10 }]',
            "cells 'gate=some' and 'gate=some lr=0.1' are the same",
        ),
        (TWO_BY_TWO + "cells = [3]", "expected a table of knobs"),
        (TWO_BY_TWO + "knobs = { lr = 1, learning_rate = 1 }", "learning_rate is given twice"),
        (
            TWO_BY_TWO + "knobs = { seed = 1 }",
            "seed is not for a study's knobs: it is one of the stage's seeds",
        ),
        (
            TWO_BY_TWO + 'knobs = { run_id = "x" }',
            "run_id is not for a study's knobs: it is made of the run's content",
        ),
        (TWO_BY_TWO + 'knobs = { logs_folder = "x" }', "it is given with --logs_folder"),
        (TWO_BY_TWO + 'knobs = { stage = "x" }', "it is the name of the stage's table"),
        (TWO_BY_TWO + "target_loss = true", "expected a number of nats"),
        (TWO_BY_TWO.replace("[1, 2]", "[1, 1]"), "one occurs twice"),
        (TWO_BY_TWO.replace("[1, 2]", "[]"), "expected a list of whole numbers"),
        (TWO_BY_TWO.replace("seeds = [1, 2]", ""), "expected a list of whole numbers"),
        (TWO_BY_TWO + "[stage.a.b", "study.toml: "),
        (
            TWO_BY_TWO + "knobs = { num_iterations = 5, warmup_iters = 6 }",
            r"\[stage.a\] cell gate=some \(and 1 more\): WARMUP_ITERS=6 does not fit into 5",
        ),
        (
            TWO_BY_TWO.replace('["some", "none"]', '["none", "smoe"]'),
            r"\[stage.a\] cell gate=smoe: GATE='smoe': expected one of none, some, more; "
            r"did you mean some\?",
        ),
    ],
    ids=lambda text: "" if "[stage." in text else text[:40],
)
def test_what_is_wrong_with_a_study_is_said_before_anything_runs(pretend, stages, words):
    assert re.search(words, problems(pretend(stages)))


def test_all_that_is_wrong_is_said_at_once(pretend):
    text = problems(
        pretend(TWO_BY_TWO + "knobs = { gat = 1, lr = -1 }\n[stage.b]\nseeds = 3\n", "fats = 1")
    )
    assert ": 4 problems:\n" in text
    assert all(
        w in text
        for w in ("[knobs]: fats", "gat is no", "(and 1 more): LR='-1'", "[stage.b]: seeds = 3")
    )


def test_a_trainer_or_file_that_is_not_there_is_named(pretend, tmp_path, monkeypatch):
    study = pretend(TWO_BY_TWO)
    text = study.read_text()
    study.write_text(text.replace("pretender.py", "trane_gpt.py"))
    assert "no such program" in problems(study)
    (tmp_path / "trane_gpt.py").write_text("x = 1")
    assert "defines no Knobs, PRESETS, RESUME_MAY_DIFFER" in problems(study)
    study.write_text("title = 'x'")
    assert "names no trainer" in problems(study)
    assert "No such file" in problems(tmp_path / "none.toml")
    monkeypatch.setitem(sys.modules, "tomllib", None)
    assert "needs Python 3.11 or later (tomllib)" in problems(study)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--stage", "b"), "--stage b: .* has a"),
        (("--nodes", "2"), "--nodes goes with --slurm DIR"),
        (("--nproc", "0"), "--nproc 0: expected a whole number >= 1"),
        (("--retries", "-1"), "--retries -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(pretend, options, words):
    with pytest.raises(UserError, match=words):
        go(pretend(TWO_BY_TWO), *options)


def test_a_bad_study_is_one_line_and_exit_code_2(pretend):
    p = launcher(pretend(TWO_BY_TWO + "knobs = { lr = -1 }"))
    code, out = end_of(p)
    assert code == 2 and out.count("\n") == 1 and out.startswith("run_study.py: error: "), out
