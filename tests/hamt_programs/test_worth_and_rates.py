"""What best_rates.py and memory_worth.py promise: the test split chooses nothing, and the worth of
a memory is told by how much text stands before a token.
"""

import csv
import json
import math
from pathlib import Path

import best_rates
import count_kernels
import count_layer
import memory_worth
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hamt_support import ONE
from torch._subclasses.fake_tensor import FakeTensorMode

import plumbing
import train_gpu
from plumbing import UserError, flops_per_token

NAMES = "run_id date git_commit seed stage status mixer conv learning_rate final_val_loss test_loss"


def results_file(folder: Path, runs: list[tuple]) -> Path:
    """Of (mixer, conv, rate, seed, validation loss, test loss)."""
    path = folder / "results.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*NAMES.split(), *(c for c in train_gpu.RESULTS if c not in NAMES.split())])
        rest = [""] * (len(train_gpu.RESULTS) - len(NAMES.split()))
        for i, (mixer, conv, rate, seed, val, test) in enumerate(runs):
            own = [f"r{i}", "2026-01-01", "x", seed, "rates", "finished", mixer, conv, rate]
            writer.writerow([*own, val, test, *rest])
    return path


def shown(monkeypatch, module, *flags: str) -> str:
    lines = []
    monkeypatch.setattr(module, "show", lambda line="": lines.append(line))
    module.main([*flags])
    return "\n".join(lines)


def test_a_rate_is_chosen_by_validation_and_the_test_split_scores_it(monkeypatch, tmp_path):
    """Validation prefers 0.003; on the test split 0.01 would have been better."""
    runs = []
    for seed in (1, 2, 3):
        for rate, val, test in ((0.001, 2.2, 2.0), (0.003, 2.0, 2.1), (0.01, 2.3, 1.0)):
            runs.append(("attention", 1, rate, seed, val, test + seed / 100))
        runs.append(("hamt", 1, 0.003, seed, 1.9, 1.8 + seed / 1000))
        runs.append(("hamt", 1, 0.01, seed, 1.7, 1.9 + seed / 1000))
    path = results_file(tmp_path, runs)
    text = shown(monkeypatch, best_rates, f"--results_file={path}", "--stage=rates")
    rows = best_rates.rows_of(
        best_rates.sides_of(
            [dict(zip(csv_head(path), r, strict=True)) for r in csv_rows(path)], "rates"
        )
    )
    assert [row["rate"] for row in rows] == [0.003, 0.01]
    assert rows[0]["loss"] == pytest.approx(2.12) and rows[0]["n"] == 3
    assert rows[1]["difference"] == pytest.approx(1.902 - 2.12)
    assert rows[1]["low"] < rows[1]["difference"] < rows[1]["high"] < 0
    assert "attention with convolution" in text and "hamt: only 2 rate(s)" in text
    with pytest.raises(UserError, match="no finished run of stage other"):
        shown(monkeypatch, best_rates, f"--results_file={path}", "--stage=other")


def test_a_best_rate_at_the_end_of_those_tried_is_named(monkeypatch, tmp_path):
    rates = ((0.001, 1.9), (0.003, 2.0), (0.01, 2.3))
    path = results_file(tmp_path, [("hamt", 1, rate, 1, val, val) for rate, val in rates])
    text = shown(monkeypatch, best_rates, f"--results_file={path}", "--stage=rates")
    assert "best rate is the 0.001 at the end of those tried" in text


def csv_head(path: Path) -> list[str]:
    return next(csv.reader(open(path)))


def csv_rows(path: Path) -> list[list[str]]:
    return list(csv.reader(open(path)))[1:]


def test_worth_is_by_places_and_its_interval_is_of_the_windows():
    rng = np.random.default_rng(0)
    own = rng.normal(size=(50, 16))
    against = own + np.arange(16) / 10 + rng.normal(size=(50, 16)) / 100
    rows = memory_worth.worth_of([(own, against)])
    assert [row["place"] for row in rows] == ["0", "1", "2-3", "4-7", "8-15"]
    assert [row["worth"] for row in rows] == pytest.approx([0, 0.1, 0.25, 0.55, 1.15], abs=0.01)
    assert all(row["low"] < row["worth"] < row["high"] and row["runs"] == 1 for row in rows)
    assert all(row["high"] - row["low"] < 0.01 for row in rows)
    two = memory_worth.worth_of([(own, against), (own, against + 1)])
    assert two[0]["high"] - two[0]["low"] == pytest.approx(1) and two[0]["runs"] == 2


def save(folder: Path, run_id: str, **more: object) -> train_gpu.Model:
    """A run with one checkpoint of random weights, on a text of its own."""
    (folder / "text.txt").write_text("\n\n".join(f"a line of text, {i}" for i in range(900)))
    values = dict(n_embd=16, hcm_dim=16, n_layer=1, num_slots=4, n_head=2, tokenizer="bytes")
    values |= dict(precision="fp32", device="cpu", dropout=0.0, sequence_length=16)
    values |= dict(data=str(folder / "text.txt"), data_folder=str(folder / "data"))
    model = train_gpu.Model(train_gpu.Knobs(**values | more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) / 2)
    state = dict(model=model.state_dict(), knobs=json.loads(plumbing.knobs_json(model.cfg)))
    state |= dict(step=1, progress={}, trainer="train_gpu", world_size=1, code_sha256="")
    (folder / "logs" / run_id).mkdir(parents=True)
    plumbing.save_checkpoint(folder / "logs" / run_id, 1, state, ONE, keep=1)
    return model


def test_a_memory_of_equal_weights_is_worth_nothing_at_the_first_token(monkeypatch, tmp_path):
    with_memory = save(tmp_path, "on")
    save(tmp_path, "local", memory="local")
    flags = ["--run=on", "--against=local", f"--logs_folder={tmp_path / 'logs'}", "--windows=3"]
    text = shown(monkeypatch, memory_worth, *flags, "--window=32", f"--out={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out/memory_worth.json").read_text())
    assert "3 windows of 32 tokens" in text and abs(found["rows"][0]["worth"]) < 1e-5
    assert any(abs(row["worth"]) > 1e-3 for row in found["rows"][1:])
    names = {"memory_worth.csv", "memory_worth.json", "memory_worth.png", "memory_worth.svg"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    losses = memory_worth.losses_by_place(memory_worth.load("on", tmp_path / "logs"), "test", 32, 3)
    shards = train_gpu.open_text(with_memory.cfg, ONE)[1]["test"].shards
    text_T = torch.from_numpy(shards.read(32, 33).astype(np.int64))
    expected = F.cross_entropy(
        with_memory.logits(text_T[None, :-1])[0], text_T[1:], reduction="none"
    )
    assert np.allclose(losses[1], expected.detach().numpy(), atol=1e-5)
    assert not math.isnan(found["worth"])


def test_runs_of_other_texts_or_too_few_are_refused(monkeypatch, tmp_path):
    save(tmp_path, "on")
    logs = f"--logs_folder={tmp_path / 'logs'}"
    with pytest.raises(UserError, match="give equally many"):
        memory_worth.main(["--run", "on", "on", "--against", "on", logs])
    with pytest.raises(UserError, match="two windows of 100000"):
        memory_worth.main(["--run=on", "--against=on", logs, "--window=100000"])


@pytest.mark.parametrize("mixer", ["hamt", "attention"])
def test_counted_flops_are_those_that_the_trainer_states(mixer):
    values = dict(n_embd=128, hcm_dim=128, n_layer=1, num_slots=8, n_head=2, dropout=0.0)
    values |= dict(precision="fp32", device="cpu", data="embedded", sequence_length=1024)
    cfg = train_gpu.Knobs(**values, mixer=mixer)
    with torch.device("meta"):
        stated = flops_per_token(train_gpu.Model(cfg), mixer == "attention")
    block = stated - 6 * cfg.vocabulary * cfg.n_embd
    with FakeTensorMode():
        found = count_layer.count(cfg, 1024)
    # stated without a memory's products, and attention's backward pass as two forwards
    assert 1.0 <= found["flops"] * 1e6 / block < (1.1 if mixer == "attention" else 1.2)
    assert found["moved"] > 2 * found["kept"] and found["kept"] > found["compiled"] > 0


def test_in_bf16_less_is_kept_than_in_fp32():
    """On tensors of the meta device autocast leaves products in fp32."""
    kept = []
    for precision in ("bf16", "fp32"):
        values = dict(n_embd=64, hcm_dim=64, n_layer=1, num_slots=4, n_head=2, dropout=0.0)
        cfg = train_gpu.Knobs(**values, precision=precision, device="cpu", data="embedded")
        with FakeTensorMode():
            kept.append(count_layer.kept_per_token(cfg, 256, compiled=True))
    assert kept[0] < 0.75 * kept[1]


def test_operations_that_a_compiler_joins_are_one_kernel_that_reads_and_writes_once():
    fused, x = count_kernels.FusedKernels(), torch.randn(64, 1024)
    torch._dynamo.reset()
    torch.compile(lambda x: (2 * x + 1).relu(), backend=fused)(x)
    assert (fused.kernels, fused.bytes) == (1, 2 * 4 * x.numel())


def test_a_compiled_block_moves_less_than_an_eager_one_in_fewer_kernels():
    values = dict(n_embd=64, hcm_dim=64, n_layer=1, num_slots=4, n_head=2, dropout=0.0)
    cfg = train_gpu.Knobs(**values, precision="bf16", device="cpu", data="embedded")
    fused = count_kernels.count_pass(cfg, 1, 64)
    with FakeTensorMode():
        eager, _ = count_layer.count_pass(cfg, 1, 64)
    assert 0 < fused.bytes < eager.bytes / 2
    assert 0 < fused.kernels < eager.operations / 2
