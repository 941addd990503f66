"""Probes for nesting depth and their controls."""

import sys

import generate_pilot_dataset
import lib_probe as probes
import numpy as np
import probe_depth
import pytest
import torch
from arith_support import ONE
from heads_support import TEXTS, is_figure, save, subject, table

import arithmetic

pytest.importorskip("scipy")


def need_sklearn() -> None:
    pytest.importorskip("sklearn")


def test_a_probe_finds_a_planted_direction_and_nothing_in_noise():
    need_sklearn()
    rng = np.random.default_rng(0)
    y, direction = rng.integers(0, 3, 3000), rng.normal(size=16)
    x = rng.normal(0, 0.1, (3000, 16)) + y[:, None] * direction
    for scale in (True, False):
        probe = probes.Probe(x[:2000], y[:2000], scale)
        assert probes.balanced_accuracy(probe(x[2000:]), y[2000:]) == 1 and probe.converged
    drawn = rng.integers(0, 3, 3000)
    probe = probes.Probe(x[:2000], drawn[:2000], True)
    assert probes.balanced_accuracy(probe(x[2000:]), drawn[2000:]) == pytest.approx(1 / 3, abs=0.04)
    assert probes.rank_correlation(x[:2000], y[:2000], x[2000:], y[2000:]) > 0.9


def test_balanced_accuracy_is_the_mean_over_labels_whatever_their_number():
    label = np.array([0] * 90 + [1] * 10)
    assert probes.balanced_accuracy(np.zeros(100), label) == 0.5
    assert probes.balanced_accuracy(np.r_[np.zeros(90), np.ones(5), np.zeros(5)], label) == 0.75


def test_no_expression_and_no_other_grouping_of_it_is_on_two_sides():
    exprs = [f"({a}-{b})-{c}" for a in range(1, 12) for b in range(1, 6) for c in (1, 2)]
    exprs += [f"{a}-({b}-{c})" for a in range(1, 12) for b in range(1, 6) for c in (1, 2)]
    parts = probes.split_by_expression(exprs, 0)
    keys = [{e.replace("(", "").replace(")", "") for e in part} for part in parts]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert sum(map(len, parts)) == len(exprs)
    assert [len(part) / len(exprs) for part in parts] == pytest.approx([0.6, 0.2, 0.2], abs=0.01)


def test_random_labels_are_a_function_of_the_kind_of_character_and_as_frequent_as_asked():
    c = probes.chars_of(TEXTS * 3)
    labels = probes.random_labels(c, np.array([0.2, 0.5, 0.3]), 1)
    kinds: dict[tuple, set] = {}
    for kind, label in zip(
        zip(c.previous_N, c.char_N, c.position_N, strict=True), labels, strict=True
    ):
        kinds.setdefault(kind, set()).add(int(label))
    assert all(len(found) == 1 for found in kinds.values())
    other = probes.chars_of(TEXTS[5:9])  # the same kinds in another split have the same labels
    for kind, label in zip(
        zip(other.previous_N, other.char_N, other.position_N, strict=True),
        probes.random_labels(other, np.array([0.2, 0.5, 0.3]), 1),
        strict=True,
    ):
        assert kinds[kind] == {int(label)}
    many = probes.Chars(
        [],
        np.arange(30000) % 35,
        np.arange(30000) // 35 % 35,
        np.arange(30000) // 1225,
        np.zeros(1),
    )
    shares = np.bincount(probes.random_labels(many, np.array([0.2, 0.5, 0.3]), 1)) / 30000
    assert shares == pytest.approx([0.2, 0.5, 0.3], abs=0.02)


def test_features_of_a_character_are_its_own_position_in_its_own_text():
    s, exprs = subject(), ["(12-3)+4", "5-(6-7)", "8-9"]
    x = probes.activations(s.model, s.cfg, exprs, ONE.device, batch=2)
    assert len(x) == 2 + 4
    for site, values in x.items():
        kind, layer, head = site
        assert len(values) == sum(map(len, exprs))
        ids = torch.tensor([arithmetic.encode(exprs[1])])
        cache = s.model.run_with_cache(ids)[1]
        want = (
            cache["resid_post", layer][0] if kind == "resid" else cache["z", layer][0, :, head]
        ).detach()
        at = len(exprs[0])
        np.testing.assert_allclose(values[at : at + 7], want[1:8].numpy(), atol=1e-5)
    c = probes.chars_of(exprs)
    assert c.depth_N[:8].tolist() == [1, 1, 1, 1, 1, 0, 0, 0] and c.previous_N[8] == arithmetic.BOS
    wide = probes.one_hot(c, "character+position+previous character", 5)
    assert wide.shape == (18, 35 + 5 + 35) and set(wide.sum(1)) == {
        2.0,
        3.0,
    }  # a position from 5 on has no column


def test_the_originals_set_up_has_its_sizes_majority_and_table_without_a_network(
    tmp_path, monkeypatch
):
    need_sklearn()
    monkeypatch.setattr(sys, "argv", ["generate_pilot_dataset.py", "--output-dir", str(tmp_path)])
    assert generate_pilot_dataset.main() == 0
    a = probe_depth.arguments(
        ["--checkpoint", "x", "--original", "--data", str(tmp_path / "pilot")]
    )
    split = probe_depth.make_split(subject(), a)
    assert (len(split.fit.char_N), len(split.test.char_N)) == (15147, 1125)
    row = probes.majority_rows(split, True)[0]
    assert (row["fit_accuracy"], row["test_accuracy"]) == pytest.approx((0.7887, 0.7716), abs=1e-4)
    x = {name: probes.one_hot(c, probes.FEATURES[-1], 17) for name, c in split.parts.items()}
    (row,) = probes.probe_rows(x, split, True, {}, False)
    assert row["test_accuracy"] == pytest.approx(
        0.896, abs=1e-3
    )  # no network at all: above the original's head, 0.8916


def test_probing_writes_controls_and_the_choice_of_dev_in_one_table_and_figures(
    tmp_path, data, trained, capsys
):
    need_sklearn()
    run, out = save(trained, tmp_path / "runs/s"), tmp_path / "out"
    argv = ["--checkpoint", run, "--data", data, "--untrained", "2", "--out", str(out)]
    assert probe_depth.main(argv) == 0
    rows = table(out / "probe.csv")
    assert {row["network"] for row in rows} == {"none", "trained", "untrained 0", "untrained 1"}
    mine = [
        row
        for row in rows
        if row["task"] == "depth>0" and row["network"] == "trained" and row["kind"] == "head"
    ]
    (best,) = [row for row in mine if row["chosen"] == "1"]
    assert float(best["dev_balanced"]) == max(float(row["dev_balanced"]) for row in mine)
    for row in mine:
        assert float(row["selectivity"]) == pytest.approx(
            float(row["test_balanced"]) - float(row["random_labels_balanced"]), abs=1e-5
        )
    assert {"depth3_balanced", "depth5_spearman", "depth4_no_brackets_balanced"} <= set(
        rows[0]
    ) | set(rows[-1])
    assert is_figure(out / "layers.png") and is_figure(out / "transfer.png")
    assert "untrained" in capsys.readouterr().out
