"""bench_arith.py: it measures the real trainer, and stops where it is told to."""

import json

import bench_arith
import pytest

from plumbing import UserError

TINY = ["--steps=2", "--warmup=12", "--batch_size=2", "--examples=256", "--items=4"]


@pytest.fixture
def small(monkeypatch):
    """Both sizes are one small model."""
    monkeypatch.setattr(bench_arith, "CONFIGS", {"0.66M": "configs/honest.yaml"})
    monkeypatch.setattr(bench_arith, "MODES", {"eager": []})
    monkeypatch.setattr(bench_arith, "FRESH", [*bench_arith.FRESH, "--n_embd=16", "--n_layer=1"])


def test_every_part_leaves_a_file_with_its_figures(small, tmp_path):
    assert bench_arith.main([*TINY, f"--out={tmp_path}"]) == 0
    parts = {part: tmp_path / f"arith_{part}_cpu.json" for part in ("step", "data", "eval")}
    found = {part: json.loads(path.read_text()) for part, path in parts.items()}
    assert all(content["device"] and content["torch"] for content in found.values())
    (step,), (data,), (evaluated,) = (content["rows"] for content in found.values())
    assert step["name"] == "0.66M eager" and 0 < step["ms_per_step"] < 10_000
    assert data["examples"] == 256 and data["examples_per_s"] > 100
    assert evaluated["items"] == 4 and min(evaluated["scored_s"], evaluated["written_s"]) > 0


def test_behind_the_deadline_nothing_is_measured_and_what_is_left_out_is_named(small, tmp_path):
    assert bench_arith.main([*TINY, f"--out={tmp_path}", "--deadline_s=0"]) == 0
    content = json.loads((tmp_path / "arith_step_cpu.json").read_text())
    assert content["rows"] == [] and content["left_out"] == ["0.66M eager"]


def test_a_part_that_there_is_not_is_refused_by_name():
    with pytest.raises(UserError, match="--parts steps: no such part; there are step, data, eval"):
        bench_arith.main(["--parts", "steps"])
