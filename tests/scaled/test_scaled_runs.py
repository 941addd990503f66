"""Whole runs: their files, kills and resumes, ranks, losses that are not finite."""

import json
import math
import signal
from pathlib import Path

import byte_models
import forked
import numpy as np
import pytest
import torch
from faults import inject
from scaled_support import flags, interrupt, run_here, small, spoil_steps, tensors_equal
from support import ONE, ROOT, environment, losses, metrics, newest_state, rows

import train_scaled
from plumbing.byte_batches import ScoredBytes
from plumbing.byte_scores import evaluate
from plumbing.splits import open_byte_files


def test_a_run_learns_and_leaves_its_files(monkeypatch, tmp_path):
    code, out = run_here(
        monkeypatch, tmp_path, run_id="a", num_iterations=24, val_bytes="all", curriculum=1
    )
    folder, row = tmp_path / "logs/a", rows(tmp_path)[0]
    found = json.loads((folder / "metrics_scaled.json").read_text())
    assert code == 0 and list(found) == ["train_bpc", "val_bpc", "steps", "lr", "val_steps"]
    assert found["steps"] == list(range(2, 25, 2)) and found["val_steps"] == list(range(4, 25, 4))
    assert len(found["train_bpc"]) == len(found["lr"]) == 12 and len(found["val_bpc"]) == 6
    steps = metrics(tmp_path, "a")
    mean = np.mean([float(steps[s]["train_loss"]) for s in (11, 12)]) / math.log(2)
    assert abs(found["train_bpc"][5] - mean) < 1e-5 and found["lr"][0] == 0.01
    assert found["val_bpc"][-1] < found["val_bpc"][0] - 0.5, "it learns"
    names = sorted(p.name for p in folder.glob("*.pth"))
    assert names == [
        "best_model_scaled.pth",
        *(f"checkpoint_step_{s:04d}.pth" for s in (20, 24)),
        "last_model_scaled.pth",
    ]
    assert [steps[s]["plasticity"] for s in (1, 4, 5, 10, 11)] == [
        "0.1",
        "0.1",
        "0.5",
        "0.5",
        "0.99",
    ]
    model = byte_models.load(folder / "last_model_scaled.pth", torch.device("cpu"))
    assert model.plasticity == torch.tensor(0.99) and not model.training and model.cfg.n_embd == 32
    val = ScoredBytes(open_byte_files(str(tmp_path / "train.txt"), tmp_path)[1], 4, None)
    loss, share = evaluate(model, val, 2, ONE), val.characters_per_byte
    assert abs(loss - float(row["final_val_loss"])) < 1e-6 and share < 1
    assert abs(float(row["val_bits_per_char"]) - loss / math.log(2) / share) < 1e-4
    for words in (
        "precision: torch.float32",
        "disk: up to",
        "half_life_patches: min:",
        "val_bits_per_char:",
    ):
        assert words in out


def start_and_kill(folder: Path, run_id: str, at: int, **knobs) -> None:
    """A run of its own process that is killed with SIGKILL in step `at`."""
    words = [inject.__file__, "train_scaled", *flags(folder, run_id=run_id, **knobs)]
    done = forked.run(words, folder, environment(FAULT=f"kill:{at}"))
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("carry", [True, False])
def test_a_killed_run_resumes_bitwise(monkeypatch, tmp_path, carry):
    # Rows of 128 bytes start over at step 11, behind the kill.
    values = dict(num_iterations=16, carry_state=carry, dropout=0.1, sequence_length=128)
    run_here(monkeypatch, tmp_path, run_id="whole", **values)
    start_and_kill(tmp_path, "cut", 10, **values)
    assert run_here(monkeypatch, tmp_path, run_id="cut", **values)[0] == 0
    assert losses(tmp_path, "cut") == losses(tmp_path, "whole")
    a, b = (newest_state(tmp_path, r) for r in ("cut", "whole"))
    for part in ("model", "adam", "scaler", "carried", "state", "step"):
        assert tensors_equal(a[part], b[part]), part
    assert bool(a["carried"]) == carry and a["step"] == 16
    found = [
        json.loads((tmp_path / f"logs/{r}/metrics_scaled.json").read_text())
        for r in ("cut", "whole")
    ]
    assert found[0] == found[1]


def test_a_window_of_one_patch_carries_no_keys_and_is_saved_and_resumed(monkeypatch, tmp_path):
    values = dict(run_id="a", sliding_window=1, memory="off")
    interrupt(monkeypatch, tmp_path, **values)
    assert run_here(monkeypatch, tmp_path, **values)[0] == 0
    assert newest_state(tmp_path, "a")["step"] == 12


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_train_as_one_and_one_goes_on_from_them(monkeypatch, tmp_path, ranks):
    """Three ranks have shares of one and two rows."""
    values = dict(num_iterations=8, batch_size=4, device_batch_size=1, log_every=1)
    run_here(monkeypatch, tmp_path, run_id="one", **values)
    words = [str(ROOT / "train_scaled.py"), *flags(tmp_path, run_id="more", **values)]
    done = forked.run(words, tmp_path, environment(), ranks)
    assert done.returncode == 0, done.stderr
    for i in range(2):
        a, b = (
            np.array([float(r[i] or 0) for r in losses(tmp_path, run)]) for run in ("one", "more")
        )
        assert len(a) == len(b) == 8 and np.sqrt(np.mean((a - b) ** 2)) <= 1e-3
    a, b = (newest_state(tmp_path, run) for run in ("one", "more"))
    assert tensors_equal(a["carried"], b["carried"], 1e-2), "states come back in the rows' order"
    (tmp_path / "logs/more/step_000008").rename(tmp_path / "away")
    (tmp_path / "logs/more/status.json").unlink()  # as if it had been killed behind step 4
    assert run_here(monkeypatch, tmp_path, run_id="more", **values)[0] == 0
    b = newest_state(tmp_path, "more")
    assert tensors_equal(a["carried"], b["carried"], 1e-2) and b["step"] == 8


def bad_loss(monkeypatch, steps: tuple[int, ...]) -> None:
    left = list(steps)

    def spoil(exchange, step, loss):
        if step not in left:
            return loss
        left.remove(step)
        return loss * float("nan")

    spoil_steps(monkeypatch, spoil)


def test_a_loss_that_is_not_finite_stops_or_rolls_back_once(monkeypatch, tmp_path):
    with monkeypatch.context() as m:
        bad_loss(m, (7,))
        code, out = run_here(m, tmp_path, run_id="stop")
    assert code == 1 and "step:7 not finite" in out and max(metrics(tmp_path, "stop")) == 6
    with monkeypatch.context() as m:
        bad_loss(m, (7,))
        code, out = run_here(m, tmp_path, run_id="back", on_nan="rollback")
    assert (
        code == 0
        and "rolled back to step:4" in out
        and "rolled_back=1" in rows(tmp_path)[1]["notes"]
    )
    rates = {s: float(r["lr"]) for s, r in metrics(tmp_path, "back").items()}
    k = small()
    assert all(
        math.isclose(
            rates[s], (1 if s <= 4 else 0.5) * k.lr * train_scaled.lr_scale(s - 1, k), rel_tol=1e-4
        )
        for s in rates
    )
    found = json.loads((tmp_path / "logs/back/metrics_scaled.json").read_text())
    assert found["steps"] == [2, 4, 6, 8, 10, 12], "what was undone is not counted twice"
    with monkeypatch.context() as m:
        bad_loss(m, (7, 9))
        assert run_here(m, tmp_path, run_id="twice", on_nan="rollback")[0] == 1


def test_an_fp16_overflow_skips_the_update_and_halves_the_scale(monkeypatch, tmp_path):
    """On a CPU the same code runs in fp16; the first factor, 65,536, overflows."""
    monkeypatch.setattr(train_scaled, "choose_precision", lambda *given: "fp16")
    # fp16 is slow on a CPU, so the rows are short.
    size = dict(num_iterations=6, log_every=1, sequence_length=16, val_bytes=64)
    code, out = run_here(monkeypatch, tmp_path, run_id="a", **size)
    scale = newest_state(tmp_path, "a")["scaler"]["scale"]
    skipped = out.count("skipped: fp16 overflow")
    assert code == 0 and scale == 2.0 ** (16 - skipped) and skipped > 0
