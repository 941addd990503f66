"""What scripts/bench.py promises, on a toy size and without a compiler. No timings: those are what it is for."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, environment, write_data

sys.path.insert(0, str(ROOT / "scripts"))
import bench as program

from plumbing import UserError

TOY = dict(compile=0, steps=2, warmup=4, n_layer=2, n_head=2, n_embd=32, vocab_size=64)
TOY |= dict(sequence_length=16, device_batch_size=4, batch_size=16)


def bench(*args: str, **flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/bench.py"), *args]
    command += [f"--{name}={value}" for name, value in flags.items()]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[str, dict[str, dict]]:
    """The table, and the JSON files by part."""
    folder: Path = tmp_path_factory.mktemp("bench")
    shards = write_data(folder)["input_bin"]
    done = bench(**TOY, only="step,gates,loader,levers,sdpa", out=folder / "out", input_bin=shards)
    assert done.returncode == 0, done.stderr
    return done.stdout, {p.stem: json.loads(p.read_text()) for p in (folder / "out").iterdir()}


ROWS = """
step, ms, n=2|tokens/s|MFU|Muon's share|memory above the model|loss after|gate none|gate headwise|gate elementwise
gate const|waiting for batches|head of a micro-batch|Newton-Schulz, gram|Newton-Schulz, batched|making a batch
attention, cuDNN first
"""


@pytest.mark.parametrize("row", ROWS.strip().replace("\n", "|").split("|"))
def test_the_table_has_a_row_for(toy, row):
    assert sum(line.startswith(row) for line in toy[0].splitlines()) == 1, toy[0]


def test_each_part_writes_what_was_measured_with_what_where_and_when(toy):
    assert set(toy[1]) == {f"{part}_cpu" for part in ("step", "gates", "loader", "levers", "sdpa")}
    for found in toy[1].values():
        assert "scripts/bench.py" in found["command"] and "--n_embd=32" in found["command"]
        assert (
            found["torch"] == torch.__version__
            and found["git_commit"]
            and isinstance(found["dirty"], bool)
        )
        assert "cores" in found["device"] and found["date"].startswith("20") and found["n"] == 2
        assert found["flags"]["batch_size"] == 16


def test_every_step_of_both_sides_is_kept_raw(toy):
    ms = toy[1]["step_cpu"]["ms"]
    assert set(ms) == {"plain", "ours"} and all(len(v) == 2 and min(v) > 0 for v in ms.values())
    assert set(toy[1]["gates_cpu"]["ms"]) == {"none", "headwise", "elementwise", "const"}


def test_both_sides_train_on_the_same_tokens_to_the_same_losses(toy):
    found = toy[1]["step_cpu"]
    assert found["loss_n"] == 5 and found["loss_rms"] < 1e-3
    first, *_, last = found["losses"]["plain"]
    assert abs(first - math.log(64)) < 1 and last < first  # it does train


def test_memory_counts_gradients_that_are_kept(toy):
    found = toy[1]["step_cpu"]
    kept = found["memory_bytes"]["ours"]["alive_at_step_start"] - found["state_bytes"]
    blocks, wte = 2 * 12 * 32 * 32, 64 * 32
    assert (
        kept >= 4 * (blocks + wte) + 2 * (blocks + wte) + 2 * 2 * 256 * 64
    )  # gradients, bf16, rows of logits
    assert (
        abs(found["memory_bytes"]["plain"]["alive_at_step_start"] - found["state_bytes"]) < 20_000
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--warm_up", "3"], "--warm_up is not a flag; did you mean --warmup?"),
        (["--only=step,spet"], "no part 'spet'; there are step, gates"),
        (["--steps=0"], "STEPS='0': expected a whole number >= 1"),
        (["--batch_size=12"], "BATCH_SIZE=12 must divide by 8"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(monkeypatch, flags, words):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--compile=0", *flags])
    with pytest.raises(UserError) as error:
        program.main()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_without_a_gpu_is_refused_before_anything_else(tmp_path):
    done = bench("--device=cuda", out=tmp_path / "out")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert "sees no CUDA GPU; use --device cpu" in line
