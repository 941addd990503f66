"""What is refused before training, and what --dry_run says."""

import dataclasses
import shutil
import sys

import byte_models
import pytest
import torch
from scaled_support import interrupt, run_here, small, write_text
from support import losses, rows

import train_scaled
from plumbing import UserError
from plumbing.byte_scores import flops_per_byte
from plumbing.exports import run_bytes
from plumbing.row_states import row_states
from plumbing.world import World
from train_scaled import ByteLM, ByteMemory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(n_head=5), "N_EMBD=32 must be N_HEAD=5 times an even width"),
        (
            dict(sliding_window=17),
            "SLIDING_WINDOW=17 patches do not fit SEQUENCE_LENGTH=64 bytes = 16 patches",
        ),
        (dict(warmup_iters=13), "WARMUP_ITERS=13 exceeds NUM_ITERATIONS=12"),
        (dict(delta_rule=True, blocks="original"), "divides by a sum of keys.*DELTA_RULE=0"),
        (dict(cuda_graph=True), "CUDA_GRAPH=1 needs DEVICE=cuda and RECOMPUTE=0"),
        (dict(mem_range=0.99), "starts with a retention of 0.979, below MEM_RANGE=0.99"),
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
        (dict(data=tmp_path / "nothing.txt"), "no text there"),
        (dict(data=tmp_path / "short.txt"), "200 bytes|bytes of training text|validation part has"),
        (dict(sequence_length=4096, batch_size=4), "bytes of training text.*need 16,388"),
        (dict(sequence_length=66), "SEQUENCE_LENGTH=66 must be a multiple of 4 bytes"),
        (dict(init_from=tmp_path / "train.txt"), "train.txt: not a file of tensors"),
        (dict(init_from=tmp_path / "gone.pth"), "gone.pth: there is no such file"),
    ):
        with pytest.raises(UserError, match=words):
            run_here(monkeypatch, tmp_path, **values)
    assert not (tmp_path / "results.csv").exists() or not rows(tmp_path)


def test_the_rows_histories_are_on_the_bill_of_the_disk():
    cfg, none = small(mem_rows=4096, keep=3), small(mem_rows=0, keep=3)
    tables = ByteMemory(4096).tables.empty(1)
    size = sum(table.nbytes for table in tables)
    model, other = ByteLM(cfg), ByteLM(none)
    need = lambda m, rows_of: run_bytes(m, row_states(rows_of, World(1, 2, CPU)), 3)
    more = need(other, model) - need(other, other)
    assert more == 4 * cfg.batch_size * size, (
        "of all ranks' rows, in three checkpoints and a new one"
    )
    fresh_rows = ByteLM(dataclasses.replace(cfg, carry_state=False))
    assert need(other, fresh_rows) < need(other, other)


def test_a_disk_too_small_for_the_checkpoints_is_refused(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(
        UserError, match=r"1 MiB free, the run's files need \d+ MiB; free space, lower KEEP"
    ):
        run_here(monkeypatch, tmp_path)


def test_weights_of_another_model_are_refused_and_those_of_this_one_are_taken(
    monkeypatch, tmp_path
):
    run_here(monkeypatch, tmp_path, run_id="a", num_iterations=4)
    path = tmp_path / "logs/a/best_model_scaled.pth"
    with pytest.raises(
        UserError, match=r"another model \(PRESET=scaled: NGRAM_ROWS=64, not NGRAM_ROWS=32\)"
    ):
        run_here(monkeypatch, tmp_path, run_id="b", init_from=path, ngram_rows=32)
    found = torch.load(path)
    del found["knobs"]["decoder"]
    torch.save(found, tmp_path / "old.pth")
    with pytest.raises(UserError, match=r"weights of another version .*, without DECODER"):
        byte_models.load(tmp_path / "old.pth", CPU)
    run_here(monkeypatch, tmp_path, run_id="c", init_from=path, num_iterations=0, warmup_iters=0)
    assert losses(tmp_path, "c")[-1][1] == losses(tmp_path, "a")[-1][1]
    with pytest.raises(UserError, match="run d was started with NGRAM_ROWS=64, not"):
        interrupt(monkeypatch, tmp_path, run_id="d")
        run_here(monkeypatch, tmp_path, run_id="d", ngram_rows=32)


def dry_run(monkeypatch, capsys, *flags: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["train_scaled.py", "--dry_run", "--compile=0", *flags])
    return train_scaled.main(), capsys.readouterr().out


def test_dry_run_shows_sizes_and_trains_nothing(monkeypatch, capsys, tmp_path):
    data = str(write_text(tmp_path, train=20000))
    code, out = dry_run(monkeypatch, capsys, "--preset", "phase8", "--data", data)
    assert code == 0
    assert "parameters:      129,302,416" in out and "step:            8,192 bytes" in out
    assert "training tokens: 409,600,000 in 50000 steps" in out
    flops = float(out.split("compute:")[1].split()[0])
    assert abs(flops / 8.7e16 - 1) < 0.05, "the fact sheet's count"
    assert list(tmp_path.iterdir()) == [tmp_path / "train.txt", tmp_path / "val.txt"]


def test_dry_run_exits_with_2_where_the_run_would_be_refused(monkeypatch, capsys):
    code, out = dry_run(monkeypatch, capsys, "--data", "nothing.txt")
    assert code == 2 and "problem:         nothing.txt: no text there" in out


def test_a_run_that_reads_its_text_too_often_is_warned_and_told_what_to_give(
    monkeypatch, capsys, tmp_path
):
    """As the nohup command with the default data would: 1.9 MB, 217 times."""
    shape = ("--n_layer=1", "--n_embd=96", "--mem_rows=64", "--ngram_rows=64")
    code, out = dry_run(monkeypatch, capsys, *shape)
    warning = "would read 1.9 MB of text 217 times; name more text with DATA=wikipedia:tr"
    assert code == 0 and warning in out
    write_text(tmp_path, train=268)
    code, out = run_here(monkeypatch, tmp_path, run_id="a", num_iterations=24, val_every=0)
    assert code == 0 and "warning: this run would read 0.0 MB of text 23 times" in out
    code, out = run_here(monkeypatch, tmp_path, run_id="b")
    assert code == 0 and "would read" not in out


def test_rows_that_are_looked_up_cost_no_flops_and_bytes_that_are_read_or_taught_do():
    flops = lambda **values: flops_per_byte(ByteLM, small(**values))
    assert flops(recompute=True) == flops()
    assert flops(ngram_rows=64) == flops(ngram_rows=4096) > flops(ngram_rows=0)
    # For each patch of four bytes: three more steps of the GRU, and what the latent predicts.
    more = 3 * 2 * (3 * 3 * 256 * 256 + small().n_embd * 4 * 256) / 4
    extra = flops(ngram_rows=0) - flops(ngram_rows=0, decoder="original")
    assert extra == pytest.approx(more)
