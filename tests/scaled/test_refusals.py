"""What is refused before training, and what --dry_run says."""

import dataclasses
import sys

import pytest
import torch
from scaled_support import fresh, interrupt, run_here, small, write_text
from support import losses, rows

import train_scaled
from plumbing import UserError
from train_scaled import ByteLM, ByteMemory


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(n_head=5), "D_MODEL=32 must be N_HEAD=5 times an even head width"),
        (dict(window=17), "WINDOW=17 patches do not fit SEQUENCE_LENGTH=64 bytes = 16 patches"),
        (dict(sequence_length=66), "SEQUENCE_LENGTH=66 must be a multiple of 4"),
        (dict(window=None), "WINDOW=off keeps every key"),
        (dict(warmup_iters=13), "WARMUP_ITERS=13 exceeds NUM_ITERATIONS=12"),
        (dict(delta_rule=True, mem_feature="elu"), "DELTA_RULE=1 needs keys of length 1"),
        (
            dict(mem_range=0.99),
            "MEM_INIT=log starts at a half-life of 32 patches, MEM_RANGE=0.99 allows no shorter one than 69",
        ),
    ],
)
def test_knobs_that_do_not_fit_together_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        small(**values)


def test_bad_text_and_bad_sizes_are_one_clear_error_before_training(monkeypatch, tmp_path):
    write_text(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/train.txt").touch()
    (tmp_path / "short.txt").write_bytes(b"x" * 200)
    for values, words in (
        (dict(data=tmp_path / "empty"), r"train.txt: an empty file"),
        (dict(data=tmp_path / "nothing.txt"), "no such file"),
        (dict(data=tmp_path / "short.txt"), "200 bytes|bytes of training text|validation part has"),
        (dict(sequence_length=4096, batch_size=4), "6,000 bytes of training text.*needs 16,388"),
        (dict(batch_size=4, device_batch_size=3), "DEVICE_BATCH_SIZE=3 does not divide a rank's 4"),
        (dict(init_from=tmp_path / "train.txt"), "train.txt: not weights of train_scaled.py"),
        (dict(init_from=tmp_path / "gone.pth"), "gone.pth: no such file"),
        (dict(fla=1), "FLA=1 needs the package fla-core"),
    ):
        with pytest.raises(UserError, match=words):
            run_here(monkeypatch, tmp_path, **values)
    assert not (tmp_path / "results.csv").exists() or not rows(tmp_path)


def test_the_rows_histories_are_on_the_bill_of_disk_and_memory():
    k, none = small(mem_rows=4096, memory="on", keep=3), small(mem_rows=0, keep=3)
    size = sum(t[:, :, :-1].nbytes for t in ByteMemory(4096).state(1).values())
    assert train_scaled.history_bytes(k) == size and train_scaled.history_bytes(none) == 0
    assert (
        train_scaled.disk_need(1000, k) - train_scaled.disk_need(1000, none)
        == 4 * k.batch_size * size
    )
    assert train_scaled.disk_need(
        1000, dataclasses.replace(k, carry_state=False)
    ) == train_scaled.disk_need(1000, none)
    assert train_scaled.memory_mib(1000, 64, k) > train_scaled.memory_mib(1000, 64, none)


def test_a_disk_too_small_for_the_checkpoints_is_refused(monkeypatch, tmp_path):
    usage = train_scaled.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(train_scaled.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(
        UserError, match=r"1 MiB free, KEEP=2 checkpoints need \d+ MiB; free space, lower KEEP"
    ):
        run_here(monkeypatch, tmp_path)


def test_weights_of_another_model_are_refused_and_those_of_this_one_are_taken(
    monkeypatch, tmp_path
):
    run_here(monkeypatch, tmp_path, run_id="a", num_iterations=4)
    path = tmp_path / "logs/a/best_model_scaled.pth"
    with pytest.raises(
        UserError, match=r"weights of another model \(PRESET=scaled: MEM_CONV=1, not MEM_CONV=0\)"
    ):
        run_here(monkeypatch, tmp_path, run_id="b", init_from=path, mem_conv=0)
    found = torch.load(path)
    del found["knobs"]["decoder_reads"]
    torch.save(found, tmp_path / "old.pth")
    with pytest.raises(UserError, match=r"weights of another version .*, without DECODER_READS"):
        train_scaled.loan_embd(tmp_path / "old.pth")
    run_here(monkeypatch, tmp_path, run_id="c", init_from=path, num_iterations=0, warmup_iters=0)
    assert losses(tmp_path, "c")[-1][1] == losses(tmp_path, "a")[-1][1]
    with pytest.raises(UserError, match="run d was started with MEM_CONV=1, not"):
        interrupt(monkeypatch, tmp_path, run_id="d")
        run_here(monkeypatch, tmp_path, run_id="d", mem_conv=0)


def test_dry_run_shows_sizes_and_trains_nothing(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["train_scaled.py", "--dry_run", "--preset", "phase8", "--data", "nothing.txt"]
    )
    assert train_scaled.main() == 0
    out = capsys.readouterr().out
    assert "parameters:      129,302,416" in out and "tokens per step: 8,192 bytes" in out
    assert "training tokens: 409,600,000 in 50000 steps" in out and "no such file" in out
    flops = float(out.split("compute:")[1].split()[0])
    assert abs(flops / 8.7e16 - 1) < 0.05, "the fact sheet's count"


def test_rows_that_are_looked_up_cost_no_flops_and_bytes_that_are_read_do():
    flops = lambda **values: train_scaled.flops_per_byte(fresh(**values), small(**values))
    assert flops(ngram_rows=64) == flops(ngram_rows=4096) > flops(ngram_rows=0)
    more = 4 * 6 * 3 * 256 * 256 / 4  # four more steps of the GRU for each patch of four bytes
    assert flops(decoder_reads=8) - flops(decoder_reads=4) == pytest.approx(more)
