"""Checkpoints, by doing the bad thing to them: cut, flip, kill, fill the disk, hide a program."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from support import ONE, environment, run_here, same_tensors, write_data

import plumbing
from plumbing import UserError, checkpoints, load_checkpoint, save_checkpoint

STATE = {
    "step": 1,
    "w": torch.arange(1000.0),
    "nested": {"list": [torch.ones(3), 2, "x"], "none": None},
}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    save_checkpoint(tmp_path, 1, STATE, ONE, keep=2)
    found = load_checkpoint(tmp_path, ONE)
    assert found["nested"]["list"][1:] == [2, "x"] and torch.equal(found["w"], STATE["w"])


def test_a_checkpoint_appears_by_one_rename_when_all_of_it_is_there(monkeypatch, tmp_path):
    rename, seen = Path.rename, []

    def watched(self, target):
        problem = checkpoints.checkpoint_problem(self)
        seen.append((problem, Path(target).name, Path(target).exists()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    save_checkpoint(tmp_path, 1, STATE, ONE, keep=2)
    assert seen == [(None, "step_000001", False)]


def damage(path: Path, how: str) -> None:
    state, manifest = path / "state.pt", path / "manifest.json"
    data = bytearray(state.read_bytes())
    if how == "no manifest":
        manifest.unlink()
    elif how == "no state":
        state.unlink()
    elif how == "flipped byte":
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif how == "empty":
        state.write_bytes(b"")
    elif how == "truncated":
        state.write_bytes(data[:-100])
    else:  # a manifest of another kind
        manifest.write_text(how)


HOWS = ["truncated", "flipped byte", "empty", "no manifest", "no state", '{"files": {}}', "[]"]
HOWS += ["null", "3", '{"files": 3}', '{"files": {"state.pt": null}}', "[" * 100_000, "{"]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: how[:20])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, how):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {**STATE, "step": step}, ONE, keep=2)
    damage(tmp_path / "step_000002", how)
    said = []
    assert load_checkpoint(tmp_path, ONE, said.append)["step"] == 1
    assert len(said) == 1 and "step_000002 cannot be used" in said[0] and "skipped" in said[0]


def test_checkpoints_beyond_step_999999_are_the_newest_and_the_oldest_go(tmp_path):
    for step in (999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, step, {**STATE, "step": step}, ONE, keep=2)
    assert [step for step, _ in plumbing.list_checkpoints(tmp_path)] == [1_000_000, 1_000_001]
    assert load_checkpoint(tmp_path, ONE)["step"] == 1_000_001


def test_only_the_newest_are_kept_and_leftovers_of_a_crash_go(tmp_path):
    (tmp_path / "step_000001.part").mkdir()
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, STATE, ONE, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000004", "step_000005"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("failed")])
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(monkeypatch, tmp_path, error):
    save_checkpoint(tmp_path, 1, STATE, ONE, keep=2)

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"could not be written .*earlier ones are whole"):
        save_checkpoint(tmp_path, 2, STATE, ONE, keep=2)
    assert load_checkpoint(tmp_path, ONE)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_hostile_checkpoint_is_one_line_and_never_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path, 1, STATE, ONE, keep=2)
    save_checkpoint(tmp_path, 2, {"step": 2, "bomb": Bomb()}, ONE, keep=2)
    said = []
    assert load_checkpoint(tmp_path, ONE, said.append)["step"] == 1
    assert "nothing in it was run" in said[0] and "\n" not in said[0]
    assert not Path("exploded").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"hello", torch.ones(3), {"other": 1}])
def test_weights_that_are_not_ours_are_one_line(tmp_path, content):
    path = tmp_path / "model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"model.pth: .*train new ones") as caught:
        plumbing.read_weights(path, ["model", "knobs"], "train new ones")
    assert "\n" not in str(caught.value)


def test_weights_are_written_whole_and_under_all_their_names(monkeypatch, tmp_path):
    path = tmp_path / "step_4.pth"
    plumbing.save_weights(path, {"model": {"w": torch.ones(2)}}, ONE, links=["last.pth"])
    for name in ("step_4.pth", "last.pth"):
        found = plumbing.read_weights(tmp_path / name, ["model"], "")
        assert torch.equal(found["model"]["w"], torch.ones(2))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        plumbing.save_weights(path, {"model": {}}, ONE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pth", "step_4.pth"]


SAVER = """
import sys, torch
from pathlib import Path
from plumbing import World, save_checkpoint
world = World(0, 1, torch.device("cpu"))
state = torch.full((2_000_000,), 0.0)
print("ready", flush=True)
for step in range(int(sys.argv[2]), 10**6):
    save_checkpoint(Path(sys.argv[1]), step, dict(step=step, w=state.fill_(step)), world, keep=2)
    print(step, flush=True)
"""


def test_sigkill_during_a_save_never_loses_the_last_good_checkpoint(tmp_path):
    rng, step = np.random.default_rng(0), 0
    saver, folder = tmp_path / "saver.py", tmp_path / "run"
    saver.write_text(SAVER)
    for _ in range(12):
        program = forked.Program([saver, folder, step + 1], tmp_path, environment())
        program.wait_for("ready")
        time.sleep(rng.uniform(0.05, 0.25))
        program.send_signal(signal.SIGKILL)
        assert program.wait() == -signal.SIGKILL
        told = program.stdout.split()[1:]
        state = load_checkpoint(folder, ONE, lambda line: pytest.fail(line))
        assert state is not None or not told, "a reported checkpoint is gone"
        step = state["step"] if state else 0
        assert step >= int(told[-1] if told else 0), "a checkpoint that was reported is gone"
        assert state is None or torch.equal(state["w"], torch.full((2_000_000,), float(step)))
    assert step > 0


def unfinish(folder: Path, last: str) -> None:
    """As if the run had been killed before its last checkpoint."""
    shutil.rmtree(folder / last)
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "status": "running"}))


def test_resuming_with_other_knobs_or_data_is_refused(monkeypatch, tmp_path):
    base = {"run_id": "a", "num_iterations": 8}
    run_here(monkeypatch, tmp_path, **base)
    unfinish(tmp_path / "logs/a", "step_000008")
    with pytest.raises(UserError, match=r"started with LR=0.01, not 0.02; resume it with the same"):
        run_here(monkeypatch, tmp_path, **base, lr=0.02)
    for part in ("t_000001.bin", "v_000000.bin"):
        tokens = plumbing.read_shard(tmp_path / part).copy()
        plumbing.write_shard(tmp_path / part, np.roll(tokens, 1))  # the same name and length
        with pytest.raises(UserError, match=f"other (training|validation) data .*{part} was"):
            run_here(monkeypatch, tmp_path, **base)
        plumbing.write_shard(tmp_path / part, tokens)
    code, out = run_here(monkeypatch, tmp_path, **base, val_every=2, device_batch_size=8)
    assert code == 0 and "resumed step:4 from a checkpoint written by 1 rank(s)" in out


def test_a_run_goes_on_where_its_folder_and_its_data_were_moved_to(monkeypatch, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    base = {"run_id": "a", "num_iterations": 8}
    run_here(monkeypatch, first, **base)
    unfinish(first / "logs/a", "step_000008")
    shutil.copytree(first, second)
    shutil.rmtree(first)
    code, out = run_here(monkeypatch, second, **base)
    assert code == 0 and "resumed step:4" in out


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\udcff"])
def test_an_unreadable_status_does_not_keep_a_run_from_going_on(monkeypatch, tmp_path, content):
    base = {"run_id": "a", "num_iterations": 8}
    run_here(monkeypatch, tmp_path, **base)
    unfinish(tmp_path / "logs/a", "step_000008")
    data = content.encode("utf-8", "surrogateescape")
    (tmp_path / "logs/a/status.json").write_bytes(data)
    assert run_here(monkeypatch, tmp_path, **base)[0] == 0


def test_same_tensors_sees_one_flipped_bit():
    a = {"w": torch.zeros(3)}
    b = {"w": torch.tensor([0.0, 0.0, 1e-45])}
    assert same_tensors(a, a) and not same_tensors(a, b)


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    write_data(tmp_path)
    with pytest.raises(TypeError):
        plumbing.write_whole(tmp_path / "x.json", b"fine", 3)
    assert not [p for p in tmp_path.iterdir() if "x.json" in p.name]


def test_weights_of_another_model_are_refused_by_the_name_of_a_tensor():
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, bias=False)
    for saved in (other.state_dict(), torch.nn.Linear(4, 2).state_dict()):
        with pytest.raises(
            UserError, match=r"of another model: 1 of its .* such as (bias|weight);"
        ):
            checkpoints.load_into(model, saved)
    checkpoints.load_into(model, torch.nn.Linear(3, 2).state_dict())
