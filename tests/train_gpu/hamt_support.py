"""What the tests of train_gpu.py share: a small text, a small run, the memory written as a loop."""

import csv
import json
import math
import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train_gpu
from plumbing import World, list_checkpoints, read_checkpoint
from train_gpu import Knobs, Model, State

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ONE = World(0, 1, torch.device("cpu"))
# A model and a run that take a second: every size is small, nothing is switched off.
MODEL = dict(n_embd=16, hcm_dim=24, n_layer=2, num_slots=5, n_head=2, vocab_size=256, dropout=0.0)
MODEL |= dict(device="cpu", precision="fp32", chunk_length=8, data="embedded")
RUN = dict(device="cpu", precision="fp32", n_embd=32, hcm_dim=32, n_layer=2, num_slots=4)
RUN |= dict(n_head=2, chunk_length=8, tokenizer="bytes", sequence_length=32, batch_size=8)
RUN |= dict(device_batch_size=4, keep=9, num_iterations=12, warmup_iters=2, lr=0.01, val_every=4)
RUN |= dict(save_every=4, save_epochs=0, dropout=0.0, final_test=0, num_workers=2)

MEMORIES = {
    "plain": {},
    "bare": dict(conv=False, use_gating=False),
    "one slot": dict(num_slots=1, n_head=3),
}
MODELS = MEMORIES | {
    "attention": dict(mixer="attention"),
    "attention with convolution": dict(mixer="attention", conv=True),
    "memory off": dict(memory="off"),
    "memory local": dict(memory="local"),
}


def knobs(**values: object) -> Knobs:
    return Knobs(**(MODEL | values))


def lively(seed: int = 1, double: bool = True, **values: object) -> Model:
    """A model in which everything contributes: no weight is near its start."""
    model = Model(knobs(seed=seed, **values))
    train_gpu.init_weights(model, model.cfg)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            p.add_(noise, alpha=0.3)
    return model.double() if double else model


def tokens(B: int = 2, T: int = 29, V: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def stream(model: Model, x_BT: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
    """Logits of tokens that follow those of `state`, and the state after them."""
    h_BTC, state, _ = model.hidden(x_BT, state)
    return model.head(h_BTC), state


def write_text(folder: Path, paragraphs: int = 400) -> Path:
    """Sentences of few words, in paragraphs: learnable, and long enough for three splits."""
    rng, words = np.random.default_rng(3), "the a red old cat dog saw met fed one two big".split()
    lengths = [int(rng.integers(8, 20)) for _ in range(paragraphs)]
    text = "\n\n".join(" ".join(rng.choice(words, size=n)) + "." for n in lengths)
    path = folder / "text.txt"
    if not path.exists():
        path.write_text(text)
    return path


def flags(folder: Path, **values: object) -> list[str]:
    """A small run's command line, reading and writing under `folder`."""
    own = dict(data=write_text(folder), data_folder=folder / "data", logs_folder=folder / "logs")
    own |= RUN | dict(results_file=folder / "results.csv") | values
    return [f"--{name}={int(v) if isinstance(v, bool) else v}" for name, v in own.items()]


def run_here(monkeypatch, folder: Path, **values: object) -> tuple[int, str]:
    """train_gpu.main() in this process: exit code and stdout."""
    monkeypatch.setattr(sys, "argv", ["train_gpu.py", *flags(folder, **values)])
    with redirect_stdout(StringIO()) as out:
        code = train_gpu.main()
    return code, out.getvalue()


def environment(**extra: str) -> dict[str, str]:
    return os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | extra


def run_forked(folder: Path, runs: list[tuple[int, str, dict]]) -> list[int]:
    """Small runs in processes of their own, of so many ranks and with a fault each; their exit
    codes.
    """
    file = folder / "runs.json"
    file.write_text(json.dumps([[n, fault, flags(folder, **knobs)] for n, fault, knobs in runs]))
    command = [sys.executable, str(HERE / "forked_runs.py"), str(file)]
    done = run_process(command, timeout_s=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_process(
    command: list[str], timeout_s: float = 200, **extra: str
) -> subprocess.CompletedProcess:
    """A command with further variables in its environment."""
    options = dict(cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    return subprocess.run(command, env=environment(**extra), **options)


def metrics(folder: Path, run_id: str) -> dict[int, dict[str, str]]:
    """metrics.csv by step; of a step done twice, the later row."""
    with open(folder / "logs" / run_id / "metrics.csv") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def losses(folder: Path, run_id: str) -> list[tuple[str, str]]:
    return [(r["train_loss"], r["val_loss"]) for _, r in sorted(metrics(folder, run_id).items())]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


def newest_state(folder: Path, run_id: str) -> dict:
    return read_checkpoint(list_checkpoints(folder / "logs" / run_id)[-1][1])


def flat(nested: object) -> list:
    """The tensors and numbers of nested dicts and lists."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, list | tuple):
        return [leaf for part in nested for leaf in flat(part)]
    return [nested]


def same(a: object, b: object) -> bool:
    """Whether two nested states hold bitwise the same."""
    pairs = list(zip(flat(a), flat(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def loop(memory: train_gpu.Memory, x_BTC: torch.Tensor) -> torch.Tensor:
    """The layer's definition, token by token, in complex numbers."""
    cfg, (B, T, _) = memory.cfg, x_BTC.shape
    H, S, E = cfg.n_head, cfg.num_slots, cfg.hcm_dim // cfg.n_head
    parts = (x_BTC @ memory.in_proj.T).split(memory.widths, dim=-1)
    made = dict(zip(("item", "key", "address", "decay", "gate"), parts, strict=True))
    mixed = dict(item=made["item"], key=made["key"], query=made["key"])
    mixed |= dict(write=made["address"], read=made["address"])
    if cfg.has_conv:
        at = 0
        for name, part in mixed.items():
            kernel = memory.conv_kernel[:, at : at + part.size(-1)]
            shifted = [F.pad(part, (0, 0, lag, 0))[:, :T] for lag in range(4)]
            mixed[name] = sum(kernel[3 - lag] * shifted[lag] for lag in range(4))
            at += part.size(-1)
    heads = {name: part.reshape(B, T, H, -1) for name, part in mixed.items()}
    write, read = heads["write"].softmax(-1), heads["read"].softmax(-1)
    K = E // 2
    omega = 1e4 ** -(torch.arange(K, dtype=torch.float64) / max(round(K / 2), 1))
    omega[round(K / 2) :] = 0
    out, M = [], torch.zeros(B, H, S, E, dtype=x_BTC.dtype)
    for t in range(T):
        key = torch.exp(1j * (heads["key"][:, t] + omega * t))
        query = torch.exp(1j * (heads["query"][:, t] + omega * t))
        bound = torch.complex(*heads["item"][:, t].chunk(2, dim=-1)) * key
        bound = torch.cat([bound.real, bound.imag], dim=-1)
        rate = torch.sigmoid(made["decay"].reshape(B, T, H, S)[:, t] + memory.decay_bias)
        M = M * torch.exp(-train_gpu.MAX_DECAY * rate)[..., None]
        w = write[:, t, :, :, None]  # (B, H, S, 1)
        M = M + w * bound[:, :, None]
        y = (read[:, t, :, None] @ M)[:, :, 0]
        r = torch.complex(*y.chunk(2, dim=-1)) * query.conj()
        r = torch.cat([r.real, r.imag], dim=-1)
        r = r / (r.square().mean(-1, keepdim=True) + torch.finfo(r.dtype).eps).sqrt()
        out.append(r.flatten(1) * memory.norm)
    r = torch.stack(out, dim=1)
    if cfg.use_gating:
        r = r * made["gate"] * torch.sigmoid(made["gate"])
    return r @ memory.out_proj.T


def plain_attention(attention: train_gpu.Attention, x_BTC: torch.Tensor) -> torch.Tensor:
    """Rotary attention by a softmax over all pairs; a head's halves are complex numbers turned by
    the position.
    """
    (B, T, C), H = x_BTC.shape, attention.cfg.n_head
    made = x_BTC @ attention.in_proj.T
    if attention.cfg.has_conv:
        shifted = [F.pad(made, (0, 0, lag, 0))[:, :T] for lag in range(4)]
        made = sum(attention.conv_kernel[3 - lag] * shifted[lag] for lag in range(4))
    q, k, v = (part.view(B, T, H, -1).transpose(1, 2) for part in made.split(C, dim=-1))
    D = C // H
    angle = torch.arange(T)[:, None] * 1e4 ** (-torch.arange(0, D, 2).double() / D)
    spin = lambda z: torch.complex(*z.chunk(2, dim=-1)) * torch.exp(-1j * angle)
    score = (spin(q)[:, :, :, None] * spin(k)[:, :, None].conj()).real.sum(-1) / math.sqrt(D)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    y = score.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return y.transpose(1, 2).reshape(B, T, C) @ attention.out_proj.T
