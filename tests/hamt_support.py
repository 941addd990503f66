"""hamt_support.py -- what tests of train_gpu.py share: a small text, a small run, the memory written out as a loop."""

import math
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from support import ROOT, environment

import train_gpu
from train_gpu import Knobs, Model

# A model and a run that take a second: every size is small, nothing is switched off.
MODEL = dict(
    hidden_dim=16,
    hcm_dim=24,
    num_layers=2,
    num_slots=5,
    num_attention_heads=2,
    vocab_size=256,
    dropout=0.0,
)
MODEL |= dict(device="cpu", mixed_precision="none", chunk_length=8, dataset="embedded")
RUN = dict(
    device="cpu",
    mixed_precision="none",
    hidden_dim=32,
    hcm_dim=32,
    num_layers=2,
    num_slots=4,
    chunk_length=8,
)
RUN |= dict(
    num_attention_heads=2,
    tokenizer="bytes",
    max_seq_length=32,
    batch_size=8,
    device_batch_size=4,
    keep=9,
)
RUN |= dict(
    num_iterations=12, warmup_iters=2, learning_rate=0.01, val_every=4, save_every=4, save_epochs=0
)
RUN |= dict(dropout=0.0, final_test=0, num_workers=2)


def knobs(**values) -> Knobs:
    return Knobs(**(MODEL | values))


def lively(seed: int = 1, double: bool = True, **values) -> Model:
    """A model in which everything contributes: no weight is near its start."""
    model = Model(knobs(**values))
    model.init_weights(seed)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.3)
    return model.double() if double else model


def tokens(B: int = 2, T: int = 29, V: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def write_text(folder: Path, paragraphs: int = 400) -> Path:
    """Sentences of few words, in paragraphs: learnable, and long enough for three splits."""
    rng, words = np.random.default_rng(3), "the a red old cat dog saw met fed one two big".split()
    text = "\n\n".join(
        " ".join(rng.choice(words, size=int(rng.integers(8, 20)))) + "." for _ in range(paragraphs)
    )
    path = folder / "text.txt"
    if not path.exists():
        path.write_text(text)
    return path


def flags(folder: Path, **values) -> list[str]:
    """A small run's command line, reading and writing under `folder`."""
    own = dict(dataset=write_text(folder), data_folder=folder / "data", logs_folder=folder / "logs")
    own |= RUN | dict(results_file=folder / "results.csv") | values
    return [f"--{name}={int(v) if isinstance(v, bool) else v}" for name, v in own.items()]


def run_here(monkeypatch, folder: Path, **values) -> tuple[int, str]:
    """train_gpu.main() in this process: exit code and stdout."""
    monkeypatch.setattr(sys, "argv", ["train_gpu.py", *flags(folder, **values)])
    with redirect_stdout(StringIO()) as out:
        code = train_gpu.main()
    return code, out.getvalue()


def run(command: list[str], folder: Path, **values) -> subprocess.CompletedProcess:
    """A small run in processes of its own."""
    return subprocess.run(
        [*command, *flags(folder, **values)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )


KILLED = """
import os, signal, train_gpu
from plumbing import Pulse, launch
send = Pulse.send
def deadly(self, step, values, clock):
    if step == {step}: os.kill(os.getpid(), signal.SIGKILL)
    return send(self, step, values, clock)
Pulse.send = deadly
launch(train_gpu.main)
"""


def loop(memory: train_gpu.Memory, x_BTC: torch.Tensor) -> torch.Tensor:
    """6.2 of the fact sheet, token by token, head by head, in complex numbers where keys are phases."""
    k, (B, T, _) = memory.k, x_BTC.shape
    H, S, E = memory.H, memory.S, memory.D // memory.H
    widths = memory.widths(k)
    parts = dict(
        zip(widths, (x_BTC @ memory.inp.T).split(list(widths.values()), dim=-1), strict=True)
    )
    if k.tie_keys:  # one projection, two convolutions
        parts |= dict(query=parts["key"], read=parts["write"])
    if k.conv:
        taps, at = memory.taps, 0
        for name in ("item", "key", "query", "write", "read"):
            own = taps[:, at : at + parts[name].size(-1)]
            shifted = [F.pad(parts[name], (0, 0, lag, 0))[:, :T] for lag in range(4)]
            parts[name] = sum(own[3 - lag] * shifted[lag] for lag in range(4))
            at += own.size(1)
    heads = {n: p.reshape(B, T, H, -1) for n, p in parts.items() if n != "gate" and p.numel()}
    write = heads["write"].softmax(-1)
    read = heads["read"].softmax(-1)
    if k.delta_rule:
        write = write / write.square().sum(-1, keepdim=True).sqrt()
    packed = lambda z: torch.cat([z.real, z.imag], dim=-1)
    out = []
    M = torch.zeros(B, H, S, E, dtype=x_BTC.dtype)
    for t in range(T):
        item = heads["item"][:, t]  # (B, H, E)
        if k.binding == "phasor":
            phase = memory.omega.double() * t
            key = torch.exp(1j * (heads["key"][:, t] + phase))
            query = torch.exp(1j * (heads["query"][:, t] + phase))
        elif k.binding == "circular_conv":
            table = torch.complex(*memory.table.chunk(2, dim=-1))
            key = table[t]
            query = torch.stack([table[(t - h - 1) % len(table), h] for h in range(H)])
        if k.binding == "elementwise":
            signs = memory.table.double()
            bound = item * signs[t]
        else:
            bound = packed(torch.complex(*item.chunk(2, dim=-1)) * key)
        if k.decay:
            rate = torch.sigmoid(heads["decay"][:, t] + memory.decay)
            M = M * torch.exp(-train_gpu.MAX_DECAY * rate)[..., None]
        w = write[:, t, :, :, None]  # (B, H, S, 1)
        if k.delta_rule:
            beta = torch.sigmoid(heads["beta"][:, t])[..., None]
            M = M - beta * w @ (w.mT @ M) + beta * w * bound[:, :, None]
        else:
            M = M + w * bound[:, :, None]
        y = (read[:, t, :, None] @ M)[:, :, 0]
        if k.binding == "elementwise":
            r = y * torch.stack([signs[(t - h - 1) % len(signs), h] for h in range(H)])
        else:
            r = packed(torch.complex(*y.chunk(2, dim=-1)) * query.conj())
        r = r / (r.square().mean(-1, keepdim=True) + torch.finfo(r.dtype).eps).sqrt()
        out.append(r.flatten(1) * memory.norm)
    r = torch.stack(out, dim=1)
    if k.use_gating:
        r = r * parts["gate"] * torch.sigmoid(parts["gate"])
    return r @ memory.out.T


def plain_attention(attention: train_gpu.Attention, x_BTC: torch.Tensor) -> torch.Tensor:
    """Rotary attention by a softmax over all pairs; a head's halves are the parts of complex numbers turned by t."""
    (B, T, C), H = x_BTC.shape, attention.H
    q, k, v = (
        t.view(B, T, H, -1).transpose(1, 2) for t in (x_BTC @ attention.inp.T).split(C, dim=-1)
    )
    D = C // H
    angle = torch.arange(T)[:, None] * 1e4 ** (-torch.arange(0, D, 2).double() / D)
    spin = lambda z: torch.complex(*z.chunk(2, dim=-1)) * torch.exp(-1j * angle)
    score = (spin(q)[:, :, :, None] * spin(k)[:, :, None].conj()).real.sum(-1) / math.sqrt(D)
    behind = torch.arange(T)[:, None] - torch.arange(T)
    seen = (behind >= 0) & (behind < (attention.window or T))
    y = score.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return y.transpose(1, 2).reshape(B, T, C) @ attention.out.T
