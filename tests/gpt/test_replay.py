"""replay.py: the program that comes out of a log is the one that ran, and runs again."""

import json
import shlex
import subprocess
import sys

import pytest
import replay
import torch
from run_support import ID
from support import ROOT, losses, rows

from plumbing import UserError
from plumbing.records import sources_sha256


def test_the_program_comes_out_of_the_log_byte_for_byte_and_runs_again_to_the_same_losses(
    monkeypatch, home, tmp_path, capfd
):
    assert replay.main([str(home / f"logs/{ID}.txt"), str(tmp_path / "out")]) == 0
    command, said = capfd.readouterr()
    plumbing = sorted(path.name for path in (ROOT / "plumbing").glob("*.py"))
    assert sorted(path.name for path in (tmp_path / "out/plumbing").iterdir()) == plumbing
    for name in ("train_gpt.py", *(f"plumbing/{name}" for name in plumbing)):
        assert (tmp_path / "out" / name).read_bytes() == (ROOT / name).read_bytes()
    assert "start 1 of 2" in said and "code_sha256: matches" in said and "warning" not in said
    assert f"torch: {torch.__version__}" in said
    state = torch.load(home / "logs" / ID / "step_000007/state.pt", weights_only=True)
    assert json.loads((tmp_path / "out/knobs.json").read_text()) == state["knobs"]
    assert "--lr=0.011" in command and "--early_stop_patience" not in command, (
        "what is usual is left out"
    )

    done = subprocess.run(
        ["sh", "-c", command], cwd="/", capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out", f"replay-{ID}") == losses(home, ID)
    assert [row["status"] for row in rows(tmp_path / "out")] == ["finished"]
    log = (tmp_path / f"out/logs/replay-{ID}.txt").read_text()
    assert f"command: {shlex.quote(sys.executable)} {tmp_path}/out/train_gpt.py" in log, (
        "the program taken out ran"
    )


def test_every_start_of_a_resumed_run_can_be_taken_out(home, tmp_path):
    first, second = replay.read_starts(home / f"logs/{ID}.txt")
    assert (first.knobs["keep"], second.knobs["keep"]) == (2, 3)
    assert first.matches and second.matches
    with pytest.raises(
        UserError, match=r"--start 3: .* holds 2 start\(s\) of the run; choose 1 to 2"
    ):
        replay.main([str(home / f"logs/{ID}.txt"), str(tmp_path), "--start=3"])


def test_ranks_settings_of_this_environment_and_another_torch_are_minded(
    monkeypatch, home, tmp_path, capfd
):
    text = (home / f"logs/{ID}.txt").read_text()
    text = text.replace("device: 1 x ", "device: 2 x ").replace(
        "Running pytorch ", "Running pytorch 0."
    )
    (tmp_path / "log.txt").write_text(text)
    monkeypatch.setenv("NUM_ITER", "999")
    monkeypatch.setenv("SEED", "5")
    replay.main([str(tmp_path / "log.txt"), str(tmp_path / "out"), "--start=2"])
    command, said = capfd.readouterr()
    words = shlex.split(command)
    assert words[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert {"--num_iterations=12", "--seed=1337", "--keep=3", f"--run_id=replay-{ID}"} <= set(words)
    assert f"warning: {torch.__version__} is installed" in said


def test_a_log_that_was_edited_does_not_match_and_is_exit_code_1(
    monkeypatch, home, tmp_path, capfd
):
    text = (home / f"logs/{ID}.txt").read_text().replace("relu().square()", "relu()", 1)
    (tmp_path / "log.txt").write_text(text)
    monkeypatch.setattr(replay, "rerun_command", lambda *_: ["true"])
    assert replay.main([str(tmp_path / "log.txt"), str(tmp_path / "out")]) == 1
    assert "the text is NOT what the log's code_sha256 was made of" in capfd.readouterr().err


@pytest.mark.parametrize("ends", ["", "\n", "\n\n"])
def test_line_ends_that_the_log_leaves_out_are_put_back(ends):
    whole = {"train_x.py": f"a\nb{ends}", "plumbing/x.py": "c\n", "plumbing/empty.py": ""}
    logged = {name: text.rstrip("\n") for name, text in whole.items()}
    assert replay.with_line_ends(logged, sources_sha256(whole)) == whole


@pytest.mark.parametrize(
    "last_words", ["git_commit: ", "hyperparameters:\n{", "Running pytorch ", "device: "]
)
def test_a_start_that_a_crash_cut_short_is_left_out(home, tmp_path, last_words):
    text = (home / f"logs/{ID}.txt").read_text()
    (tmp_path / "log.txt").write_text(text[: text.rindex(last_words) + 3])
    assert len(replay.read_starts(tmp_path / "log.txt")) == 1


def test_what_is_no_log_and_what_is_in_the_way_is_refused(home, tmp_path):
    with pytest.raises(UserError, match="holds no program in sections between lines of 100 '='"):
        replay.main(
            [
                str(ROOT / "README.md" if (ROOT / "README.md").exists() else ROOT / "LICENSE"),
                str(tmp_path),
            ]
        )
    with pytest.raises(UserError, match="No such file"):
        replay.main([str(tmp_path / "none.txt"), str(tmp_path)])
    (tmp_path / "train_gpt.py").write_text("mine")
    with pytest.raises(UserError, match=r"already has train_gpt.py; choose another folder"):
        replay.main([str(home / f"logs/{ID}.txt"), str(tmp_path)])
    assert (tmp_path / "train_gpt.py").read_text() == "mine"


@pytest.mark.parametrize("name", ["../train_gpt.py", "/tmp/train_gpt.py", "train_gpt.sh"])
def test_a_log_cannot_write_outside_of_the_folder(home, tmp_path, name):
    text = (home / f"logs/{ID}.txt").read_text().replace("source: plumbing/", f"source: {name}/", 1)
    text = text.replace(f"source: {name}/__init__.py", f"source: {name}")
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(UserError, match="cannot be the name of a run's source"):
        replay.main([str(tmp_path / "log.txt"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
