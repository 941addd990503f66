"""scripts/scaled/compare_ppmd.py: a model's figure is its run's, PPMd's is that of the whole text."""

import math
import re

import compare_ppmd
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scaled_support import fresh, repeats, run_here, write_text
from support import rows

from plumbing.exports import read_model_weights
from plumbing.splits import open_byte_files


def test_the_bits_of_a_run_are_those_that_it_recorded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare_ppmd, "ppmd_bits", lambda seen, text, order: len(seen) + len(text))
    run_here(monkeypatch, tmp_path, run_id="a", val_bytes="all", val_every=0)
    write_text(tmp_path)
    text, logs = str(tmp_path / "train.txt"), str(tmp_path / "logs")
    compare_ppmd.main(["--data", text, "--runs", "a", "--logs_folder", logs])
    out = capsys.readouterr().out
    bits = float(rows(tmp_path)[0]["final_val_bpc"])
    assert f"a, from empty memories: {bits:.4f} bits per byte" in out
    cfg = read_model_weights(tmp_path / "logs/a/best_model_scaled.pth", "train_scaled.py", [])[
        "knobs"
    ]
    seen = cfg["num_iterations"] * cfg["batch_size"] * cfg["sequence_length"]
    size = seen + (tmp_path / "val.txt").stat().st_size
    assert f"PPMd, contexts of 8 bytes: {size:.4f} bits per byte" in out


def test_another_held_out_text_is_scored_as_far_as_it_is_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare_ppmd, "ppmd_bits", lambda seen, text, order: len(text))
    run_here(monkeypatch, tmp_path, run_id="a", val_bytes=100, val_every=0)
    write_text(tmp_path)
    other = tmp_path / "other.txt"
    other.write_bytes(bytes(range(32, 127)) * 4)
    words = ["--data", str(tmp_path / "train.txt"), "--runs", "a", "--held_out", str(other)]
    words += ["--logs_folder", str(tmp_path / "logs"), "--val_bytes"]

    def bits(num_bytes):
        compare_ppmd.main([*words, str(num_bytes)])
        out = capsys.readouterr().out
        assert f"PPMd, contexts of 8 bytes: {num_bytes:.4f} bits per byte" in out
        return re.findall(r"a, (.*): (.*) bits per byte", out)

    short, whole = bits(100), bits(380)
    assert [how for how, _ in short] == ["from empty memories", "behind the training text"]
    assert all(s != w for (_, s), (_, w) in zip(short, whole, strict=True))
    recorded = float(rows(tmp_path)[0]["final_val_bpc"])  # of 100 bytes of the validation text
    assert abs(float(short[0][1]) - recorded) > 1e-3


def test_behind_a_training_text_a_model_scores_the_held_out_text_as_one_forward_pass_does(
    monkeypatch,
):
    model = fresh(mem_rows=64, sequence_length=32)
    whole = repeats(1, 103)
    with torch.no_grad():
        nll_BT, _ = model(F.pad(whole, (0, 1)), F.pad(whole[:, 4:], (0, 5), value=-1))
    for num_seen, window in ((0, 4096), (40, 4096), (41, 16), (3, 16)):
        monkeypatch.setattr(compare_ppmd, "WINDOW", window)
        seen, text = whole[0, :num_seen].numpy(), whole[0, num_seen:].numpy()
        found = compare_ppmd.bits_behind(model, seen, text, torch.device("cpu"))
        scored = nll_BT[0, max(num_seen - 4, 0) : 99]
        assert found == pytest.approx(scored.mean().item() / math.log(2), rel=1e-5)


def test_the_text_of_a_run_is_that_of_its_steps_row_by_row(tmp_path):
    write_text(tmp_path)
    text, _, _ = open_byte_files(str(tmp_path / "train.txt"), tmp_path, 4)
    model = fresh(batch_size=2, sequence_length=64, num_iterations=3, carry_state=True)
    rows_of_text = [text.read(at, 3 * 64) for at in (0, (text.total - 4) // 2)]
    assert (compare_ppmd.text_of_run(model, text) == np.concatenate(rows_of_text)).all()


def test_ppmd_counts_what_the_held_out_text_adds():
    pytest.importorskip("pyppmd")
    seen = bytes(range(256)) * 20
    assert compare_ppmd.ppmd_bits(seen, seen[:1000], 8) < 0.5
    assert compare_ppmd.ppmd_bits(b"a" * 100, seen[:256], 8) > 6
