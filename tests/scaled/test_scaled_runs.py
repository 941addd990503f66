"""Whole runs: their files, kills and resumes, ranks, losses that are not finite."""

import json
import math
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scaled_support import flags, interrupt, run_here, small, spoil_steps, tensors_equal
from support import ONE, command, environment, losses, metrics, newest_state, rows

import train_scaled
from plumbing import ROOT
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
    model = train_scaled.loan_embd(folder / "last_model_scaled.pth")
    assert model.plasticity == torch.tensor(0.99) and not model.training and model.cfg.n_embd == 32
    val = open_data(model.cfg)[1]
    step = train_scaled.MicroStep(model, model.cfg, ONE, torch.float32, print)
    loss, share = train_scaled.evaluate(step, val, 2, model.cfg, ONE)
    assert abs(loss - float(row["final_val_loss"])) < 1e-6 and share < 1
    assert abs(float(row["val_bits_per_char"]) - loss / math.log(2) / share) < 1e-4
    for words in (
        "precision: fp32 (auto, CPU)",
        "disk: up to",
        "half_life_patches: min:",
        "half_life_bytes_by_history:3:",
        "eta_h:",
        "val_bits_per_char:",
    ):
        assert words in out


def start_and_kill(folder: Path, run_id: str, at: int, **knobs) -> None:
    """A run of its own process, killed with SIGKILL when its log has reached step `at`."""
    p = subprocess.Popen([*command(1, "train_scaled.py"), *flags(folder, run_id=run_id, **knobs)], cwd=folder,
                         env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    end, log = time.monotonic() + 100, folder / f"logs/{run_id}.txt"
    while (
        time.monotonic() < end
        and p.poll() is None
        and not (log.exists() and f"\nstep:{at}/" in log.read_text())
    ):
        time.sleep(0.005)
    p.kill()
    assert p.wait() == -signal.SIGKILL, p.stderr.read()


@pytest.mark.parametrize("carry", [True, False])
def test_a_killed_run_resumes_bitwise(monkeypatch, tmp_path, carry):
    values = dict(num_iterations=24, carry_state=carry, dropout=0.1, sequence_length=128)
    run_here(monkeypatch, tmp_path, run_id="whole", **values)
    start_and_kill(tmp_path, "cut", 10, **values)
    assert run_here(monkeypatch, tmp_path, run_id="cut", **values)[0] == 0
    assert losses(tmp_path, "cut") == losses(tmp_path, "whole")
    a, b = (newest_state(tmp_path, r) for r in ("cut", "whole"))
    assert all(
        same_tensors(a[key], b[key])
        for key in ("model", "adam", "metrics", "best_loss", "interval")
    )
    assert (a["states"] is not None) == carry and a["step"] == 24
    same = []
    map_state(lambda s, t: same.append(torch.equal(s, t)) or s, a["states"] or {}, b["states"] or {})
    assert all(same) and bool(same) == carry


def test_a_window_of_one_patch_carries_no_keys_and_is_saved_and_resumed(monkeypatch, tmp_path):
    values = dict(run_id="a", window=1, memory="off")
    interrupt(monkeypatch, tmp_path, **values)
    assert run_here(monkeypatch, tmp_path, **values)[0] == 0
    assert newest_state(tmp_path, "a")["step"] == 12


def test_two_ranks_train_as_one(monkeypatch, tmp_path):
    values = dict(num_iterations=12, batch_size=4, device_batch_size=1, log_every=1)
    run_here(monkeypatch, tmp_path, run_id="one", **values)
    p = subprocess.run([*command(2, "train_scaled.py"), *flags(tmp_path, run_id="two", **values)], cwd=tmp_path,
                       env=environment(), capture_output=True, text=True, timeout=200)  # fmt: skip
    assert p.returncode == 0, p.stderr
    for i in range(2):
        a, b = (
            np.array([float(r[i] or 0) for r in losses(tmp_path, run)]) for run in ("one", "two")
        )
        assert len(a) == len(b) == 12 and np.sqrt(np.mean((a - b) ** 2)) <= 1e-3
    a, b = (newest_state(tmp_path, r)["states"] for r in ("one", "two"))
    close = []
    map_state(lambda s, t: close.append(torch.allclose(s.float(), t.float(), atol=1e-2)) or s, a, b)
    assert all(close), "rows' states come back in the rows' order"


def bad_loss(monkeypatch, steps: tuple[int, ...]) -> None:
    send, left = Pulse.send, list(steps)

    def sent(self, step, values_n, clock):
        if step in left:
            left.remove(step)
            values_n = values_n * float("nan")
        return send(self, step, values_n, clock)

    monkeypatch.setattr(Pulse, "send", sent)


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
