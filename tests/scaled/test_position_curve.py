"""scripts/scaled/position_curve.py: bits by position, intervals, compressors. Tiny models."""

import lzma
import math

import byte_models
import numpy as np
import position_curve
import pytest
import torch
from programs_support import TEXT, tiny

from train_scaled import PATCH


def test_bits_by_position_add_up_to_the_whole_texts_and_count_each_byte_once():
    model, text = tiny(), TEXT[:3001]
    docs = position_curve.documents(text, 1024, None)
    assert b"".join(docs) == text and len(docs) == 3
    bits = position_curve.read_bits(model, docs, 2, None)
    at = position_curve.edges(1024)
    sums, counts = position_curve.by_bin(bits, at)
    assert counts.sum() == len(text) and counts[:, 0].sum() == 3 * 64
    expected = 0.0
    for doc in docs:
        whole = torch.tensor([list(doc)])
        size = whole.size(1) - PATCH
        pad = torch.nn.functional.pad(whole, (0, -size % PATCH))
        y = torch.nn.functional.pad(whole[:, PATCH:], (0, -size % PATCH), value=-1)
        with torch.no_grad():
            expected += 8 * PATCH + model(pad[:, : y.size(1)], y)[
                0
            ].double().sum().item() / math.log(2)
    assert sums.sum() == pytest.approx(expected, rel=1e-5)
    worse = [doc + 0.5 for doc in bits]
    total, above, *_ = position_curve.totals(dict(full=bits, worse=worse), text, 1, 0)
    assert total["bits_per_byte"] == pytest.approx(expected / len(text), rel=1e-5)
    assert total["above_full"] == 0
    for key in ("above_full", "above_full_low", "above_full_high"):
        assert above[key] == pytest.approx(0.5)


def test_bits_do_not_depend_on_who_is_read_beside_whom_or_in_what_pieces(monkeypatch):
    model, docs = tiny(), position_curve.documents(TEXT[:2500], 1000, None)
    one = position_curve.read_bits(model, docs, 1, None)
    monkeypatch.setattr(position_curve, "PIECE", 64)
    for a, b in zip(one, position_curve.read_bits(model, docs, 3, None), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_full_attention_is_read_in_pieces_of_its_own_length():
    model = tiny(memory="off", sliding_window=None)
    (bits,) = position_curve.read_bits(model, [TEXT[:200]], 1, 64)
    (piece,) = position_curve.read_bits(model, [TEXT[64:128]], 1, None)
    np.testing.assert_allclose(bits[64:128], piece, atol=1e-4)
    assert (bits[[0, 64, 128, 192]] == 8).all() and len(bits) == 200


def test_without_its_latent_a_model_sees_the_last_bytes_alone():
    model = tiny(mem_rows=0)
    other = b"#" * 100 + TEXT[100:200]

    def bits_differ(model) -> np.ndarray:
        a, b = (position_curve.read_bits(model, [t], 1, None)[0] for t in (TEXT[:200], other))
        return np.abs(a - b)[112:]  # what the decoder reads has no byte of the first 100

    assert bits_differ(model).max() > 1e-4
    assert bits_differ(byte_models.without_latent(model)).max() == 0


def test_documents_cut_at_a_separator_hold_every_byte():
    text = b"a\n\nbb\n\n\n\nccc"
    docs = position_curve.documents(text, 4, b"\n\n")
    assert b"".join(docs) == text and docs[0] == b"a\n\n" and docs[-1] == b"ccc"


def test_the_xz_line_is_lzma_of_the_file_and_a_missing_compressor_says_so(monkeypatch):
    monkeypatch.setattr(position_curve.shutil, "which", lambda name: None)
    rng = np.random.default_rng(0)  # words: repeated text would come out the same at every level
    text = b" ".join(b"%d" % n for n in rng.zipf(1.2, 60_000))
    found, size = (
        position_curve.compressed(text),
        len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    )
    assert found["xz -9e"][0] == size != len(lzma.compress(text, preset=6))
    assert found["zstd -22"] == (None, "no program zstd here")


def test_the_bootstrap_covers_the_mean_and_one_document_has_no_interval():
    rng = np.random.default_rng(0)
    sums, counts = rng.normal(2, 0.1, (30, 1)) * 10, np.full((30, 1), 10.0)
    mean, low, high = position_curve.bootstrap(sums, counts, 0)
    half = 1.96 * sums.std() / 10 / 30**0.5
    assert low < mean < high and (high - low) / 2 == pytest.approx(half, rel=0.2)
    assert np.isnan(position_curve.bootstrap(sums[:1], counts[:1], 0)[1]).all()
