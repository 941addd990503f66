"""scripts/lib/runs.py: which checkpoint of a run a program reads, and which it refuses."""

import json
import shutil

import pytest
from lib import runs
from run_support import ID, make_run, spoil
from support import ONE, knobs

import plumbing
from plumbing import UserError


def test_an_unknown_run_is_answered_with_those_there_are(home):
    with pytest.raises(UserError, match=rf"no run 'nope' in .*; it has {ID}"):
        runs.find_run(home / "logs", "nope")
    with pytest.raises(UserError, match=r"it has none; --logs_folder"):
        runs.find_run(home / "nowhere", "nope")


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / "logs/young").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint yet"):
        runs.find_checkpoint(runs.find_run(tmp_path / "logs", "young"))


def test_the_newest_good_checkpoint_is_taken_and_bad_ones_are_named(home, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(home / "logs" / ID, folder)
    newest = ["step_000012", "step_000008", "step_000007"]
    assert runs.find_checkpoint(folder).name == newest[0] and not capfd.readouterr().err
    spoil(folder / newest[0] / "state.pt")
    assert runs.find_checkpoint(folder).name == newest[1]
    assert "step_000012 is skipped: state.pt does not have the SHA-256" in capfd.readouterr().err
    assert runs.find_checkpoint(folder, "step_000007").name == "step_000007"
    with pytest.raises(UserError, match="step_000012 is bad"):
        runs.find_checkpoint(folder, "step_000012")
    with pytest.raises(
        UserError, match="no checkpoint 'step_000009'; it has step_000007, step_000008, step_000012"
    ):
        runs.find_checkpoint(folder, "step_000009")
    (folder / newest[1] / "manifest.json").unlink()
    spoil(folder / newest[2] / "state.pt")
    with pytest.raises(UserError, match="no good checkpoint, 3 bad"):
        runs.find_checkpoint(folder)


def test_a_checkpoint_of_another_program_is_refused_with_the_way_to_its_own(tmp_path):
    cfg = json.loads(plumbing.knobs_json(knobs()))
    state = dict(model={}, knobs=cfg | dict(num_slots=4), trainer="train_gpt")
    plumbing.save_checkpoint(tmp_path / "logs/made", 3, state, ONE, keep=2)
    with pytest.raises(
        UserError, match=r"another program than this train_gpt.py .*num_slots.*replay.py"
    ):
        runs.load(tmp_path / "logs/made/step_000003")


def test_a_checkpoint_of_a_program_that_is_not_ours_is_refused(tmp_path):
    state = dict(model={}, knobs={}, trainer="train_mine")
    plumbing.save_checkpoint(tmp_path, 3, state, ONE, keep=2)
    with pytest.raises(UserError, match="was written by train_mine; this program reads those of"):
        runs.load(tmp_path / "step_000003")


def test_a_step_above_999999_is_newer_than_one_below(tmp_path):
    for step in (999_999, 1_000_000):
        make_run(tmp_path, step=step)
    assert runs.find_checkpoint(tmp_path / "logs/made").name == "step_1000000"
    found = runs.find_checkpoint(tmp_path / "logs/made", "step_1000000")
    assert runs.load(found)[1]["step"] == 1_000_000
