"""What scripts/gpt/bench.py promises, on a toy size and eager; no timings."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench as program
import forked
import pytest
import torch
from lib import benching
from support import ONE, ROOT, environment, losses, run_here, write_data

from plumbing import UserError

TOY = dict(compile=0, steps=2, warmup=2, n_layer=2, n_head=2, n_embd=32, vocab_size=64)
TOY |= dict(sequence_length=16, device_batch_size=4, batch_size=16)


def words_of(**flags: object) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def bench(**flags: object) -> subprocess.CompletedProcess:
    words = [str(ROOT / "scripts/gpt/bench.py"), *words_of(**flags)]
    return forked.run(words, Path.cwd(), environment())


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[str, dict[str, dict]]:
    """The table of all parts, and their JSON files by part."""
    folder: Path = tmp_path_factory.mktemp("bench")
    shards = write_data(folder)["input_bin"]
    done = bench(**TOY, out=folder / "out", input_bin=shards)
    assert done.returncode == 0, done.stderr
    return done.stdout, {p.stem: json.loads(p.read_text()) for p in (folder / "out").iterdir()}


ROWS = """
step plain, ms, n=2|step ours, ms, n=2|tokens/s|RMS of the losses|matrix products|attention
optimizers|cross-entropy head|gate none|gate headwise|gate elementwise
first step, empty|first step, filled|memory plain|memory ours|Newton-Schulz plain
Newton-Schulz ours|head of a micro-batch plain|head of a micro-batch ours|waiting for batches
"""


@pytest.mark.parametrize("row", ROWS.strip().replace("\n", "|").split("|"))
def test_the_table_has_a_row_for(toy, row):
    assert sum(line.startswith(row) for line in toy[0].splitlines()) == 1, toy[0]


def test_each_part_writes_what_was_measured_with_what_where_and_when(toy):
    assert set(toy[1]) == {f"gpt_{part}_cpu" for part in program.PARTS}
    for name, found in toy[1].items():
        assert name == f"gpt_{found['part']}_cpu"
        assert "scripts/gpt/bench.py" in found["command"] and "--n_embd=32" in found["command"]
        assert found["torch"] == torch.__version__
        assert found["git_commit"] and isinstance(found["dirty"], bool)
        assert "cores" in found["device"] and found["date"].startswith("20")
        assert found["n"] == 2 and found["flags"]["batch_size"] == 16


def test_every_turn_of_both_sides_is_kept_raw(toy):
    ms = toy[1]["gpt_step_cpu"]["ms"]
    assert set(ms) == {"plain", "ours"}
    assert all(len(values) == 2 and min(values) > 0 for values in ms.values())
    assert set(toy[1]["gpt_gates_cpu"]["ms"]) == {"none", "headwise", "elementwise"}


def test_both_sides_train_on_the_same_tokens_to_the_same_losses(toy):
    found = toy[1]["gpt_step_cpu"]
    assert found["loss_n"] == 4 and found["loss_rms"] < 1e-3
    first, *_, last = found["losses"]["plain"]
    assert abs(first - math.log(64)) < 1 and last < first  # it does train


def test_our_side_takes_the_steps_of_the_trainer_bit_by_bit(monkeypatch, tmp_path):
    values = dict(data_order="stream", epochs_ok=1, warmup_iters=0, warmdown_iters=0)
    values |= dict(attngate="headwise", num_iterations=6, lr=0.0036)
    run_here(monkeypatch, tmp_path, run_id="trainer", **values)
    shards = str(tmp_path / "t_*.bin")
    toy = program.Bench(**{**TOY, "compile": False, "precision": "fp32", "input_bin": shards})
    lab = program.Lab(toy, ONE, tmp_path)
    for _ in range(6):
        lab.step("headwise")
    ours = [f"{loss.item():.6f}" for loss in lab.losses["headwise"]]
    assert ours == [train_loss for train_loss, _ in losses(tmp_path, "trainer") if train_loss]


def test_sides_take_turns_and_the_warm_up_does_not_count():
    order = []
    meter = benching.Meter(ONE, steps=2, warmup=1)
    ms = meter.take_turns({name: lambda n=name: order.append(n) or len(order) for name in "AB"})
    assert order == ["A", "B"] * 3
    assert ms == {"A": [3, 5], "B": [4, 6]}


def test_memory_counts_what_is_kept_between_steps(toy):
    found = toy[1]["gpt_memory_cpu"]["bytes"]
    blocks, wte = 2 * 12 * 32 * 32, 64 * 32
    # weights, AdamW's two moments of the tied matrix and Muon's momentum; ours keeps gradients too
    plain = 4 * (2 * blocks + 3 * wte)
    ours = plain + 4 * (blocks + wte)
    steps = 4  # AdamW counts its steps in a tensor
    assert found["plain"]["kept_between_steps"] == plain + steps
    assert found["ours"]["kept_between_steps"] == ours + steps
    assert found["plain"]["more_in_a_step"] > 4 * (blocks + wte)  # its gradients


def test_a_profile_puts_each_operator_into_one_kind(toy):
    found = toy[1]["gpt_profile_cpu"]
    kinds = {"matrix products", "attention", "optimizers", "cross-entropy head", "copies"}
    assert kinds < set(found["ms_per_step"])
    assert found["calls_per_step"]["attention"] >= 2 * 2 * 4  # layers, directions, micro-batches
    assert benching.kind_of("nvjet_tst_128x256", ["Optimizer.step#Muon.step"]) == "optimizers"
    assert benching.kind_of("sm90_xmma_gemm_bf16", ["aten::mm"]) == "matrix products"
    assert benching.kind_of("cudnn_sdpa_sm90_flash_fprop_wgmma", ["x"]) == "attention"
    assert benching.kind_of("triton_red_fused_3", ["LinearCrossEntropy"]) == "cross-entropy head"
    assert benching.kind_of("triton_poi_fused_mul_2", ["x"]) == "pointwise and reductions"


# ----------------------------------------------------------------------------
# Stopping


# Its first part is done at once. The second would take a day, and begins half a second before the
# deadline, if there is one.
LONG_BENCH = f"""
import signal, sys
sys.path.insert(0, {str(ROOT / "scripts/gpt")!r})
import bench
bench.part_muon = lambda lab: dict(ratio=1.0)
part_step = bench.part_step
def near_the_deadline(lab):
    if signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
    return part_step(lab)
bench.part_step = near_the_deadline
bench.launch(bench.main)
"""


def long_bench(folder: Path, **flags: object) -> forked.Program:
    values = TOY | dict(only="muon,step", steps=2_000_000, out=folder / "work/out", **flags)
    values["warmup"] = 1
    (folder / "long.py").write_text(LONG_BENCH)
    (folder / "work").mkdir()
    env = environment(TMPDIR=str(folder / "work"))
    return forked.Program([folder / "long.py", *words_of(**values)], folder, env)


def wait_for(path: Path) -> None:
    for _ in range(4000):
        if path.exists():
            return
        time.sleep(0.05)
    raise TimeoutError(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_and_keeps_the_parts_that_are_done(tmp_path, number):
    run, work = long_bench(tmp_path), tmp_path / "work"
    wait_for(work / "out/gpt_muon_cpu.json")
    run.send_signal(number)
    assert run.wait() == 128 + number
    said = run.stderr
    assert said.endswith(f"stopped by {number.name}; done: muon\n") and "Traceback" not in said
    assert [path.name for path in (work / "out").iterdir()] == ["gpt_muon_cpu.json"]
    assert [path.name for path in work.iterdir()] == ["out"], "its temporary folder is gone"


def test_at_its_deadline_it_ends_well_with_the_parts_that_are_done(tmp_path):
    run = long_bench(tmp_path, deadline_s=3600)
    assert run.wait() == 0
    assert run.stderr.endswith("stopped by the deadline; done: muon\n")
    assert json.loads((tmp_path / "work/out/gpt_muon_cpu.json").read_text())["ratio"] == 1.0


# ----------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--warm_up", "3"], "--warm_up is not a flag; did you mean --warmup?"),
        (["--only=step,spet"], "no part 'spet'; there are step, profile"),
        (["--steps=0"], "STEPS='0': expected a whole number >= 1"),
        (["--batch_size=3"], "BATCH_SIZE=3 must be a multiple of DEVICE_BATCH_SIZE=2"),
        (["--n_head=3"], "N_EMBD=256 must be N_HEAD=3 times an even head width"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(monkeypatch, flags, words):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    with pytest.raises(UserError) as error:
        program.main()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_without_a_gpu_is_refused_before_anything_else(tmp_path):
    done = bench(device="cuda", out=tmp_path / "out")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert "sees no CUDA GPU; use --device cpu" in line
