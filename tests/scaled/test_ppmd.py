"""scripts/scaled/compare_ppmd.py: a model's figure is its run's, PPMd's is that of the whole text."""

import compare_ppmd
import pytest
from scaled_support import run_here, write_text
from support import rows


def test_the_bits_of_a_run_are_those_that_it_recorded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare_ppmd, "ppmd_bits", lambda seen, text, order: len(seen) + len(text))
    run_here(monkeypatch, tmp_path, run_id="a", val_bytes="all", val_every=0)
    write_text(tmp_path)
    text, logs = str(tmp_path / "train.txt"), str(tmp_path / "logs")
    compare_ppmd.main(["--data", text, "--runs", "a", "--logs_folder", logs])
    out = capsys.readouterr().out
    assert f"a: {float(rows(tmp_path)[0]['final_val_bpc']):.4f} bits per byte" in out
    sizes = [(tmp_path / name).stat().st_size for name in ("train.txt", "val.txt")]
    assert f"PPMd, contexts of 8 bytes: {sum(sizes):.4f} bits per byte" in out


def test_ppmd_counts_what_the_held_out_text_adds():
    pytest.importorskip("pyppmd")
    seen = bytes(range(256)) * 20
    assert compare_ppmd.ppmd_bits(seen, seen[:1000], 8) < 0.5
    assert compare_ppmd.ppmd_bits(b"a" * 100, seen[:256], 8) > 6
