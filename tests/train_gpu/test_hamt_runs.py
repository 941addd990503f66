"""Whole runs of train_gpu.py: records, resuming, ranks, stopping, faults."""

import math
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hamt_support import losses, metrics, newest_state, rows, run_forked, run_here, same

import train_gpu
from plumbing import Session, UserError, list_checkpoints


def test_a_run_learns_and_its_record_holds_the_conventions(monkeypatch, tmp_path):
    values = dict(run_id="a", num_iterations=40, val_every=20, final_test=1)
    code, out = run_here(monkeypatch, tmp_path, **values)
    row, m = rows(tmp_path)[0], metrics(tmp_path, "a")
    assert code == 0 and float(m[40]["val_loss"]) < float(m[0]["val_loss"]) - 1.5
    assert re.search(
        r"step:40/40 val_loss:\S+ .* ppl:\S+ bits_per_byte:\S+ window:32 stride:32", out
    )
    assert re.search(r"test_loss:\S+ nats:\S+ tokens:\d+ ppl:\S+ word_ppl:\S+ bits_per_byte:", out)
    assert "val_stream_loss" in out and "parameters: " in out
    assert list(row) == train_gpu.RESULTS and row["mixer"] == "hamt" and row["status"] == "finished"
    assert (row["hidden_dim"], row["conv"], row["tokenizer"]) == ("32", "1", "bytes")
    assert float(row["val_ppl"]) == pytest.approx(math.exp(float(row["final_val_loss"])))
    bits = float(row["val_bits_per_byte"]) * math.log(2)
    assert bits == pytest.approx(float(row["final_val_loss"]), rel=1e-3), "a token is a byte"
    assert abs(float(row["test_stream_loss"]) - float(row["test_loss"])) < 0.5


def test_the_mixer_of_a_run_is_in_its_record(monkeypatch, tmp_path):
    for conv in (0, 1):
        values = dict(run_id=f"r{conv}", num_iterations=1, mixer="attention", conv=conv)
        _, out = run_here(monkeypatch, tmp_path, **values)
        assert "tokens of a vocabulary of 256" in out
    assert [(r["mixer"], r["conv"]) for r in rows(tmp_path)] == [
        ("attention", "0"),
        ("attention", "1"),
    ]


KINDS = {
    "recalling": dict(dropout=0.2, use_auxiliary_loss=1),
    "carrying": dict(carry_state=1, dropout=0.2),
    "attention": dict(mixer="attention"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A straight run of each kind; and in processes of their own, one of each that is killed in
    step 7, and one on 2 and one on 3 ranks that carry their states. 3 do not divide the batch of 8.
    """
    folder = tmp_path_factory.mktemp("runs")
    runs = [(1, "kill:7", dict(run_id=f"killed_{name}", **KINDS[name])) for name in KINDS]
    runs += [(n, "", dict(run_id=f"ranks_{n}", **KINDS["carrying"])) for n in (2, 3)]
    assert run_forked(folder, runs) == [-signal.SIGKILL] * 3 + [0, 0]
    with pytest.MonkeyPatch.context() as patch:
        for name, knobs in KINDS.items():
            run_here(patch, folder, run_id=name, **knobs)
    return folder


def figures(folder: Path, run_id: str) -> np.ndarray:
    """Losses of training and validation, by step."""
    return np.array([[float(v or 0) for v in pair] for pair in losses(folder, run_id)])


def copy_checkpoint(folder: Path, run_id: str, step: int, to: str) -> None:
    """Make a run called `to`, of which nothing but a checkpoint of another run is there."""
    path = dict(list_checkpoints(folder / "logs" / run_id))[step]
    shutil.copytree(path, folder / "logs" / to / path.name, dirs_exist_ok=True)


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_run_resumes_and_ends_bitwise_as_the_straight_one(monkeypatch, folder, name):
    _, out = run_here(monkeypatch, folder, run_id=f"killed_{name}", **KINDS[name])
    assert "resumed step:4" in out
    a, b = newest_state(folder, name), newest_state(folder, f"killed_{name}")
    assert losses(folder, name) == losses(folder, f"killed_{name}")
    assert all(same(a[key], b[key]) for key in ("model", "adam", "scaler", "states", "state"))
    assert bool(a["states"]) == (name == "carrying")


def test_one_two_and_three_ranks_agree_within_rounding(folder):
    one = figures(folder, "carrying")
    rows_of = lambda run_id: newest_state(folder, run_id)["states"]["rows"]
    for other in ("ranks_2", "ranks_3"):
        found = figures(folder, other)
        assert one.shape == found.shape and np.abs(one - found).max() < 1e-4
        for x, y in zip(rows_of("carrying"), rows_of(other), strict=True):
            assert x.shape == y.shape and torch.allclose(x, y, atol=1e-3)


def test_one_rank_goes_on_where_three_stopped(monkeypatch, folder):
    """The carried rows of three ranks' checkpoint are dealt out to one."""
    copy_checkpoint(folder, "ranks_3", 8, "again")
    _, out = run_here(monkeypatch, folder, run_id="again", **KINDS["carrying"])
    assert "resumed step:8 from a checkpoint written by 3 rank(s)" in out
    again, three = metrics(folder, "again"), metrics(folder, "ranks_3")
    for step in (9, 10, 11, 12):
        assert abs(float(again[step]["train_loss"]) - float(three[step]["train_loss"])) < 1e-4


@pytest.mark.parametrize("name", ["carrying", "recalling"])
def test_a_micro_batch_changes_memory_not_training(monkeypatch, folder, name):
    """3 rows at a time, which do not divide the batch, or 4."""
    run_here(monkeypatch, folder, run_id=f"{name}_by_3", device_batch_size=3, **KINDS[name])
    assert np.abs(figures(folder, name) - figures(folder, f"{name}_by_3")).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("attention", dict(mixer="hamt"), "started with MIXER=attention, not hamt"),
        ("carrying", dict(vocab_size=300), "VOCAB_SIZE=auto, not 300"),
        ("carrying", dict(num_slots=8), "NUM_SLOTS=4, not 8"),
    ],
)
def test_a_run_is_not_resumed_as_another_model(monkeypatch, folder, name, values, words):
    other = f"other_{name}"
    copy_checkpoint(folder, name, 4, other)
    with pytest.raises(UserError, match=words):
        run_here(monkeypatch, folder, run_id=other, **KINDS[name] | values)


def test_the_auxiliary_loss_is_never_in_a_reported_loss_but_trains(monkeypatch, tmp_path):
    for name, on in (("with", 1), ("without", 0)):
        values = dict(run_id=name, use_auxiliary_loss=on, aux_loss_weight=5.0, num_iterations=2)
        run_here(monkeypatch, tmp_path, **values)
    a, b = metrics(tmp_path, "with"), metrics(tmp_path, "without")
    assert a[1]["train_loss"] == b[1]["train_loss"] and a[0]["val_loss"] == b[0]["val_loss"]
    assert a[2]["train_loss"] != b[2]["train_loss"]
    assert 0.1 < float(a[1]["aux_loss"]) < 2 and b[1]["aux_loss"] == ""


def test_early_stop_time_budget_and_preemption_leave_their_status(monkeypatch, tmp_path):
    values = dict(run_id="a", early_stop_patience=1, lr=0, val_every=1)
    code, _ = run_here(monkeypatch, tmp_path, **values)
    assert code == 0 and rows(tmp_path)[-1]["status"] == "early_stop"
    assert rows(tmp_path)[-1]["steps_done"] == "1"
    values = dict(run_id="b", time_budget_s=0.4, num_iterations=9999, val_every=0)
    code, _ = run_here(monkeypatch, tmp_path, **values)
    assert code == 0 and rows(tmp_path)[-1]["status"] == "finished"
    assert int(rows(tmp_path)[-1]["steps_done"]) < 900
    step = Session.step

    def stopped(self, number, *args, **more):
        if number == 3:
            self.world.signals.append(signal.SIGTERM)
        return step(self, number, *args, **more)

    monkeypatch.setattr(Session, "step", stopped)
    code, _ = run_here(monkeypatch, tmp_path, run_id="c")
    assert code == 128 + signal.SIGTERM and rows(tmp_path)[-1]["status"] == "preempted"


def test_a_loss_that_is_not_finite_stops_before_its_update(monkeypatch, tmp_path):
    step, weights = train_gpu.AdamW.step, []
    forward, calls = train_gpu.Model.forward, []

    def bad(self, *args):
        loss, *more = forward(self, *args)
        calls.append(torch.is_grad_enabled())
        return loss * (float("nan") if sum(calls) == 9 and calls[-1] else 1.0), *more

    def watched(self, *args):
        weights.append(self.param_groups[0]["params"][0].detach().clone())
        return step(self, *args)

    monkeypatch.setattr(train_gpu.Model, "forward", bad)
    monkeypatch.setattr(train_gpu.AdamW, "step", watched)
    code, out = run_here(monkeypatch, tmp_path)
    assert code == 1 and "step:5 not finite" in out and rows(tmp_path)[0]["status"] == "nan"
    assert torch.equal(weights[4], weights[-1]) and not torch.equal(weights[3], weights[4])


def test_running_out_of_memory_says_what_to_lower(monkeypatch, tmp_path):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_gpu.AdamW, "step", full)
    with pytest.raises(UserError, match="lower DEVICE_BATCH_SIZE or set GRADIENT_CHECKPOINTING=1"):
        run_here(monkeypatch, tmp_path)
    assert rows(tmp_path)[0]["status"] == "failed"


def test_fifty_overflows_of_fp16_in_a_row_end_the_run(monkeypatch, tmp_path):
    step = Session.step

    def overflowed(self, *args):
        return step(self, *args[:4], torch.tensor(True))

    monkeypatch.setattr(Session, "step", overflowed)
    code, out = run_here(monkeypatch, tmp_path, num_iterations=90, val_every=0, save_every=0)
    assert code == 1 and "50 steps in a row overflowed fp16" in out
    assert 50 <= int(rows(tmp_path)[0]["steps_done"]) <= 52
