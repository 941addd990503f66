"""support.py -- what several tests need: small shards, a small run here or under torchrun, weights
for plain_gpt.
"""

import csv
import dataclasses
import importlib
import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

torch.set_num_threads(
    1
)  # two threads that wait for each other on a busy machine are slower than one

import forked  # noqa: E402

import plumbing  # noqa: E402
import train_gpt  # noqa: E402
from plumbing import World  # noqa: E402

ONE = World(0, 1, torch.device("cpu"))
# A model and a run that take a second: every size is small, nothing is switched off.
SMALL = dict(
    n_layer=2,
    n_head=2,
    n_embd=32,
    vocab_size=64,
    sequence_length=16,
    batch_size=16,
    device_batch_size=4,
)
SMALL |= dict(
    num_iterations=12,
    warmup_iters=2,
    warmdown_iters=4,
    val_every=4,
    val_tokens=512,
    save_every=4,
    lr=0.01,
)
SMALL |= dict(device="cpu", precision="fp32", compile=0)


def write_data(
    folder: Path, train: tuple[int, ...] = (5000, 4000), val: int = 1000, vocab: int = 64
) -> dict[str, str]:
    """Learnable shards (a noisy chain over the vocabulary) and the knobs that point at them."""
    rng = np.random.default_rng(5)
    for name, n in [
        *((f"t_{i:06d}.bin", n) for i, n in enumerate(train, 1)),
        ("v_000000.bin", val),
    ]:
        tokens = np.cumsum(rng.choice([1, 3, 5], size=n, p=[0.7, 0.2, 0.1])) % vocab
        plumbing.write_shard(folder / name, tokens.astype(np.uint16))
    return dict(input_bin=str(folder / "t_*.bin"), input_val_bin=str(folder / "v_*.bin"))


def flags(folder: Path, **knobs) -> list[str]:
    """A small run's command line, writing under `folder`."""
    data = (
        write_data(folder)
        if not list(folder.glob("t_*.bin"))
        else dict(input_bin=str(folder / "t_*.bin"), input_val_bin=str(folder / "v_*.bin"))
    )
    values = (
        SMALL
        | data
        | dict(logs_folder=str(folder / "logs"), results_file=str(folder / "results.csv"))
        | knobs
    )
    return [f"--{name}={value}" for name, value in values.items()]


def run_here(monkeypatch, folder: Path, **knobs) -> tuple[int, str]:
    """train_gpt.main() in this process, as a world of one: exit code and stdout."""
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *flags(folder, **knobs)])
    with redirect_stdout(StringIO()) as out:
        code = train_gpt.main()
    return code, out.getvalue()


def command(nproc: int, script: str | Path = "train_gpt.py", *torchrun_flags: str) -> list[str]:
    """`python script` for one process; torchrun for more, or when it is given flags of its own."""
    if nproc == 1 and not torchrun_flags:
        return [sys.executable, str(ROOT / script)]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={nproc}",
    ]
    return [*torchrun, *torchrun_flags, str(ROOT / script)]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | extra


def run(
    nproc: int, folder: Path, script: str | Path = "train_gpt.py", **knobs
) -> subprocess.CompletedProcess:
    """A small run in processes of its own."""
    words = [str(ROOT / script), *flags(folder, **knobs)]
    return forked.run(words, folder, environment(), nproc)


def metrics(folder: Path, run_id: str) -> dict[int, dict[str, str]]:
    """metrics.csv by step; of a step done twice, the later row."""
    with open(folder / "logs" / run_id / "metrics.csv") as f:
        return {int(row["step"]): row for row in csv.DictReader(f)}


def losses(folder: Path, run_id: str) -> list[tuple[str, str]]:
    return [(r["train_loss"], r["val_loss"]) for _, r in sorted(metrics(folder, run_id).items())]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv") as f:
        return list(csv.DictReader(f))


def newest_state(folder: Path, run_id: str) -> dict:
    _, path = plumbing.list_checkpoints(folder / "logs" / run_id)[-1]
    return plumbing.read_checkpoint(path)


def same_tensors(a, b) -> bool:
    """Whether two nested states hold bitwise the same tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    return a == b or (a != a and b != b)


def knobs(**values) -> train_gpt.Knobs:
    """Knobs of the small run, with changes."""
    small = {k: v for k, v in SMALL.items() if k != "compile"}
    return train_gpt.Knobs(**(small | dict(compile=False) | values))


def copy_to_plain(model: train_gpt.GPT, plain: torch.nn.Module) -> None:
    """Give the plain model the weights of ours: unstack Q, K and V."""
    with torch.no_grad():
        plain.wte.copy_(model.wte)
        for block, ours in zip(plain.blocks, model.blocks, strict=True):
            for name, weight in zip("qkv", ours.attn.in_proj.chunk(3), strict=True):
                getattr(block, name).copy_(weight)
            block.o.copy_(ours.attn.out_proj)
            block.up.copy_(ours.up_proj)
            block.down.copy_(ours.down_proj)
            if model.cfg.attngate != "none":
                block.gate.copy_(ours.attn.gate)


def random_sibling(trainer: str, sequence_length: int = 64) -> torch.nn.Module:
    """A small model of train_gpu.py or train_scaled.py, all its weights random."""
    module = importlib.import_module(trainer)
    values = dict(n_layer=1, n_embd=32, n_head=2, device="cpu", precision="fp32", compile=False)
    values |= dict(hcm_dim=64, num_slots=4, tokenizer="bytes", sliding_window=8)
    values["sequence_length"] = sequence_length
    fields = {field.name for field in dataclasses.fields(module.Knobs)}
    cfg = module.Knobs(**{name: value for name, value in values.items() if name in fields})
    torch.manual_seed(0)
    model = getattr(module, {"train_gpu": "Model", "train_scaled": "ByteLM"}[trainer])(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / 4)
    return model


def save_sibling(model: torch.nn.Module, folder: Path) -> None:
    """The checkpoint of a run `made` in the folder of logs, as its trainer would write it."""
    trainer = type(model).__module__
    state = dict(model=model.state_dict(), knobs=dataclasses.asdict(model.cfg), trainer=trainer)
    state |= dict(step=3, progress=dict(val_loss=1.0), code_sha256="0" * 64)
    plumbing.save_checkpoint(folder / "logs/made", 3, state, ONE, keep=2)
