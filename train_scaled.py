"""train_scaled.py -- a 129M byte-level LM: sliding-window attention beside a decaying Hebbian memory, in one file.

    nohup python3 -u train_scaled.py > training_scaled_50k.log 2>&1 &    one GPU, 50,000 steps
    torchrun --standalone --nproc_per_node=2 train_scaled.py             two
    DATA=wikipedia:tr PRESET=phase8 python train_scaled.py               the original model, in exact mathematics
    PRESET=demo python train_scaled.py                                   a laptop, a minute, no download
    python train_scaled.py --help                                        every knob; --dry_run shows the plan and stops

Expect   docs/scaled.md has what was measured: the memory's recall, bits per byte, speed, each with its command
Shapes   B rows, T bytes, N = T / 4 patches, D model width, H heads, E = D / H, F = value width (E, or E + 1 with the
         denominator's column), P patches of past keys, C chunk, M chunks; x_BND has shape (B, N, D)
Units    WINDOW and half-lives in patches; losses in nats per byte, bpc in bits per byte; BATCH_SIZE in rows over ranks
Raises   UserError (one line, exit code 2) for a bad knob, text, checkpoint or results file, before training starts
Sources  model: AGIFORMER phase 8 (inkbytefo/agi-former, a393cb5), rewritten from its description. Chunkwise memory:
         Yang et al., Gated Linear Attention, arXiv 2312.06635; delta rule: Gated DeltaNet, arXiv 2412.06464
Shared   plumbing.py keeps the run alive and accounted for. Everything that can change the loss is in this file.
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import plumbing
from plumbing import (
    HERE,
    Clock,
    Prefetch,
    Pulse,
    RunLog,
    TokenShards,
    UserError,
    World,
    knob,
    knobs_json,
    launch,
)

# ----------------------------------------------------------------------------
# Knobs

PATCH, BYTES = 4, 256  # bytes of a patch; values of a byte
GRAMS, GRAM_WIDTH = (
    (3, 4, 5, 6),
    64,
)  # bytes of the n-grams that NGRAM_ROWS makes tables for; width of their rows
PAST = 2 * PATCH  # bytes that the decoder may look at, from the predicted one back
HISTORIES = 3, 5, 8, 12, 24  # bytes of the histories that MEM_ROWS makes tables for
FURTHEST = max(HISTORIES) - PATCH  # bytes before its first patch that a window needs
HISTORY_HALF_LIVES = 128.0, 131072.0  # bytes; what the shortest and the longest history begin with
CHUNK, GROUP = 64, 16  # patches of a memory chunk; chunks whose states are made in one product
HALF_LIVES = (
    32.0,
    65536.0,
)  # patches; of the first and the last head with MEM_INIT=log, the others between them
STAGES = (
    (0.0, 0.10),
    (0.15, 0.50),
    (0.40, 0.99),
)  # CURRICULUM: share of the steps at which a plasticity begins

SEED_BLOCK = dict(
    rope="input",
    norm="layernorm",
    fusion="sum",
    dropout=0.1,
    decoder_reads=0,
    ngram_rows=0,
    mem_rows=0,
)
SEED_BLOCK |= dict(
    mem_conv=False,
    mem_align=False,
    mem_feature="elu",
    mem_norm="denominator",
    mem_gate=False,
    mem_decay="static",
)
SEED_BLOCK |= dict(
    delta_rule=False, carry_state=False, batch_size=8, device_batch_size=2, sequence_length=1024
)
SEED_BLOCK |= dict(schedule="constant", lr=2e-4, beta2=0.999, weight_decay=0.01, decay_on="all")
PRESETS = {
    "scaled": {},
    "phase8": SEED_BLOCK | dict(window=256, mem_range=0.995, mem_init=8.0),
    "phase7": SEED_BLOCK
    | dict(d_model=512, n_layer=6, n_head=8, window=128, mem_range=0.99, mem_init=0.0)
    | dict(num_iterations=20000, warmup_iters=100, lr=3e-4, batch_size=4, device_batch_size=4),
    # Python's own documentation on a CPU, about a minute
    "demo": dict(
        device="cpu", compile=False, d_model=128, n_layer=2, n_head=2, window=16, thinking_steps=1
    )
    | dict(
        mem_rows=8192, sequence_length=512, batch_size=8, device_batch_size=8, num_iterations=300
    )
    | dict(warmup_iters=20, lr=3e-3, val_every=100, val_bytes=65536, save_every=100),
}
# What may differ when a run is resumed: nothing here moves the loss curve.
FREE = "preset device_batch_size val_every save_every keep log_every on_nan device compile fla recompute tracker run_id "
FREE += "stage logs_folder results_file dry_run"
MODEL = (
    "d_model n_layer n_head window rope norm fusion memory mem_conv mem_align mem_feature mem_norm mem_gate mem_decay "
    "mem_range "
)
MODEL += "mem_init mem_delay delta_rule thinking_steps decoder_reads ngram_rows mem_rows"  # what weights are for


@dataclass(frozen=True)
class Knobs:
    preset: str = knob("scaled", "named set of defaults", choices=tuple(PRESETS))
    # model
    d_model: int = knob(768, "model width, channels", low=8)
    n_layer: int = knob(12, "hybrid blocks", low=1)
    n_head: int = knob(12, "heads of attention and of memory", low=1)
    window: int | None = knob(
        64, "patches a query sees, itself included; off: full attention", low=1, none="off"
    )
    rope: str = knob(
        "window", "rotate the input once, or attention's q and k", choices=("input", "window")
    )
    norm: str = knob("rmsnorm", "normalisation of the blocks", choices=("layernorm", "rmsnorm"))
    fusion: str = knob(
        "concat",
        "attention and memory: projected and summed, or one map",
        choices=("sum", "concat"),
    )
    memory: str = knob(
        "on", "zero: its output is zero; off: it is not built", choices=("on", "zero", "off")
    )
    mem_conv: bool = knob(
        True, "causal depthwise convolution over 4 patches, SiLU, on the memory's q, k, v"
    )
    mem_feature: str = knob("l2", "q and k of length 1, or ELU + 1", choices=("elu", "l2"))
    mem_norm: str = knob(
        "rmsnorm", "of what is read: by a sum, or per head", choices=("denominator", "rmsnorm")
    )
    mem_align: bool = knob(
        True, "with MEM_CONV: q and k start equal, and a key as that of the patch before"
    )
    mem_gate: bool = knob(True, "SiLU gate on what is read")
    mem_decay: str = knob(
        "data", "retention: of the head, or moved by the input", choices=("static", "data")
    )
    mem_range: float = knob(
        0.0, "lowest retention; it is RANGE + (1 - RANGE) * sigmoid(logit)", low=0, high=0.9999
    )
    mem_init: float | None = knob(
        None, "initial retention logit; log: half-lives of 32 to 65,536 patches", none="log"
    )
    mem_rows: int = knob(
        65536, "rows of each table of the memory by the last 3 to 24 bytes; 0: none", low=0
    )
    mem_delay: bool = knob(
        False, "the blocks' memory is written only when a patch has left the window"
    )
    delta_rule: bool = knob(False, "a write replaces what its key held, by a learned share")
    thinking_steps: int = knob(3, "passes of the weight-tied MLP behind the blocks; 0: none", low=0)
    decoder_reads: int = knob(
        4, "bytes before a patch that its decoder reads first; 0: none", low=0, high=PAST
    )
    ngram_rows: int = knob(
        12288, "rows of each of the decoder's tables, of 3- to 6-grams; 0: no tables", low=0
    )
    dropout: float = knob(0.0, "of input, memory and MLP", low=0, high=0.9)
    # batch
    batch_size: int = knob(2, "rows per step, over all ranks", low=1)
    device_batch_size: int = knob(2, "rows per micro-batch of a rank", low=1)
    sequence_length: int = knob(4096, "bytes per row", low=8)
    carry_state: bool = knob(True, "rows go on where they were, state and all; 0: random windows")
    # schedule, in optimizer steps
    num_iterations: int = knob(50000, "optimizer steps", low=0, alias=("num_iter",))
    warmup_iters: int = knob(500, "steps of linear warm-up", low=0)
    schedule: str = knob(
        "linear", "of the rate; two of them end at zero", choices=("constant", "linear", "cosine")
    )
    curriculum: bool = knob(False, "plasticity 0.10, from 15% of the steps 0.50, from 40% 0.99")
    # optimizer
    lr: float = knob(6e-4, "peak rate of AdamW", low=0, alias=("learning_rate",))
    beta2: float = knob(0.95, "AdamW's second beta", low=0, high=0.99999)
    weight_decay: float = knob(0.1, "AdamW's", low=0)
    decay_on: str = knob("matrices", "what weight decay applies to", choices=("matrices", "all"))
    clip: float = knob(0.5, "largest norm of the gradient", above=0)
    seed: int = knob(1337, "initial weights, random windows, dropout", low=0)
    # data
    data: str = knob(
        "embedded", "a text file, folder or glob; wikipedia:tr (any language code); embedded"
    )
    init_from: str = knob("", "weights (.pth) to start from; empty: new ones")
    # evaluation and saving
    val_every: int = knob(
        2000, "steps between validations, also at the last; 0: the last only", low=0
    )
    val_bytes: int | None = knob(
        None, "bytes of a validation, from the first on", low=8, none="all"
    )
    save_every: int = knob(2000, "steps between checkpoints, also at the end; 0: only there", low=0)
    keep: int = knob(2, "checkpoints kept", low=1)
    log_every: int = knob(10, "steps between log lines", low=1)
    on_nan: str = knob("stop", "rollback: once, at half the rate", choices=("stop", "rollback"))
    # the run
    device: str = knob(
        "cuda", "where to train; nothing falls back by itself", choices=("cuda", "cpu")
    )
    precision: str = knob(
        "auto", "of matrix products; auto asks the device", choices=("auto", "fp32", "bf16", "fp16")
    )
    compile: bool = knob(True, "torch.compile")
    fla: bool = knob(
        False, "memory kernels of the package fla-core, on CUDA with compute capability 8 and up"
    )
    recompute: bool = knob(
        False, "keep only the blocks' inputs for the backward pass: less memory, more time"
    )
    tracker: str = knob("off", "also send metrics there", choices=("off", "wandb", "trackio"))
    run_id: str = knob("", "an unfinished run's id resumes it; empty: made once per launch")
    stage: str = knob("", "stage of a study, copied into the results row")
    logs_folder: str = knob(str(HERE / "logs"), "folder of the run's log, metrics and checkpoints")
    results_file: str = knob(
        str(HERE / "experiments/results_scaled.csv"), "file that gets one row per run"
    )
    dry_run: bool = knob(False, "show knobs, sizes and data, and stop")

    def __post_init__(self):
        patches, retention = self.sequence_length // PATCH, 0.5 ** (1 / HALF_LIVES[0])
        checks = {
            f"D_MODEL={self.d_model} must be N_HEAD={self.n_head} times an even head width (rotary)": (
                self.d_model % self.n_head or self.d_model // self.n_head % 2
            ),
            f"SEQUENCE_LENGTH={self.sequence_length} must be a multiple of {PATCH} bytes": self.sequence_length
            % PATCH,
            f"WINDOW={self.window} patches do not fit SEQUENCE_LENGTH={self.sequence_length} bytes = {patches} "
            f"patches; lower it, or set WINDOW=off": self.window is not None
            and self.window > patches,
            "WINDOW=off keeps every key: it goes with CARRY_STATE=0 and MEM_DELAY=0": (
                self.window is None and (self.carry_state or self.mem_delay)
            ),
            f"WARMUP_ITERS={self.warmup_iters} exceeds NUM_ITERATIONS={self.num_iterations}; train longer": (
                self.warmup_iters > self.num_iterations > 0
            ),
            "DELTA_RULE=1 needs keys of length 1 and has no denominator: set MEM_FEATURE=l2 and MEM_NORM=rmsnorm": (
                self.delta_rule and (self.mem_feature, self.mem_norm) != ("l2", "rmsnorm")
            ),
            "MEM_NORM=denominator divides by a sum, which MEM_FEATURE=l2 can make zero; set MEM_FEATURE=elu": (
                self.mem_norm == "denominator" and self.mem_feature == "l2"
            ),
            f"MEM_INIT=log starts at a half-life of {HALF_LIVES[0]:.0f} patches, MEM_RANGE={self.mem_range} allows no "
            f"shorter one than {-math.log(2) / math.log(self.mem_range or 0.5):.0f}; set MEM_RANGE=0, or MEM_INIT to a "
            f"logit": self.mem_init is None and self.mem_range >= retention,
            "FLA=1: its kernels have no denominator; set MEM_NORM=rmsnorm, or FLA=0": (
                self.fla and self.mem_norm == "denominator"
            ),
        }
        for words, wrong in checks.items():
            if wrong:
                raise ValueError(words)


# ----------------------------------------------------------------------------
# Model

State = dict[
    str, Tensor | list[dict[str, Tensor]]
]  # what the patches so far leave behind, rows first


def rotary_tables(first_B: Tensor, N: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, N, D/2) of positions first .. first + N - 1. Su et al., arXiv 2104.09864. In fp64 until the
    end: a week of carried state reaches positions whose fp32 angle would be off by whole turns."""
    rate = 10000.0 ** -(torch.arange(0, D, 2, device=first_B.device, dtype=torch.float64) / D)
    angle = (first_B[:, None] + torch.arange(N, device=first_B.device))[..., None] * rate
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split, and the sign of the original: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def window_attention(q: Tensor, k: Tensor, v: Tensor, w: int | None, mask: object = None) -> Tensor:
    """Causal attention of q (B, H, N, E) to its last w keys, itself included; None: to all.

    k and v (B, H, P + N, E) begin with the P <= w - 1 patches before. Chunked: blocks of w queries against their own
    and the block before, so that cost is linear in N. mask: FlexAttention's block mask for this N and P, on CUDA.
    """
    N, P = q.size(2), k.size(2) - q.size(2)
    if mask is not None:
        from torch.nn.attention.flex_attention import (
            flex_attention,
        )  # imported where it is used: it costs a second

        return flex_attention(q, k, v, block_mask=mask)
    if N == 1:
        return F.scaled_dot_product_attention(q, k, v)
    if P == 0 and (w is None or N <= w):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if w is None:
        return F.scaled_dot_product_attention(
            q, k, v, torch.ones(N, P + N, dtype=torch.bool, device=q.device).tril(P)
        )
    blocks, i = -(-N // w), torch.arange(w, device=q.device)[:, None]
    front, j = w - P, torch.arange(2 * w, device=q.device)
    own = [F.pad(t, (0, 0, front, blocks * w - N)).unflatten(2, (blocks + 1, w)) for t in (k, v)]
    k, v = (torch.cat([t[:, :, :-1], t[:, :, 1:]], 3).flatten(0, 1) for t in own)
    seen = ((j > i) & (j <= i + w)).repeat(blocks, 1, 1)
    seen[0] &= j >= front
    q = F.pad(q, (0, 0, 0, blocks * w - N)).unflatten(2, (blocks, w))
    y = F.scaled_dot_product_attention(q.flatten(0, 1), k, v, seen[None])
    return y.view(q.shape).flatten(2, 3)[:, :, :N]


def lower_exp(log: Tensor) -> Tensor:
    """exp on and below the diagonal, 0 above. Masked before the exponential: above the diagonal the exponent is
    positive, and infinity times zero would reach the gradient."""
    keep = torch.ones(log.shape[-2:], dtype=torch.bool, device=log.device).tril()
    return log.masked_fill(~keep, -math.inf).exp()


def decays(a: Tensor, M: int, C: int) -> tuple[Tensor, ...]:
    """Of M chunks of C patches: decay from patch j to i (.., C, C), from a chunk's start to patch i and from patch i to
    its end (.., C, 1), and from chunk edge m to n (.., M + 1, M + 1). Static decay (H,) is distance times a: a
    difference of two sums would round, and its gradient even more."""
    if a.dim() == 1:
        i = torch.arange(max(M, C) + 1, device=a.device, dtype=a.dtype)
        far = (i[:, None] - i) * a[:, None, None]
        since, left = (
            (a[:, None, None] * i[1 : C + 1]).mT.exp(),
            (a[:, None, None] * i[:C].flip(0)).mT.exp(),
        )
        return (
            lower_exp(far[:, :C, :C])[:, None],
            since[:, None],
            left[:, None],
            lower_exp(far[:, : M + 1, : M + 1] * C),
        )
    g = a.unflatten(-1, (M, C)).cumsum(-1)[..., None]
    edges = F.pad(g[..., -1, :].cumsum(-2), (0, 0, 1, 0))
    return lower_exp(g - g.mT), g.exp(), (g[..., -1:, :] - g).exp(), lower_exp(edges - edges.mT)


def memory_group(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, S: Tensor, delta: bool, M: int
) -> tuple[Tensor, Tensor]:
    """`memory` over M equal chunks: what is read, (B, H, M * C, F), and the state behind them."""
    q, k, v = (t.unflatten(2, (M, -1)) for t in (q, k, v))
    within, since, left, across = decays(a, M, q.size(3))
    kept = (k * left).mT
    if not delta:
        # Row n: the state before chunk n, from the carried one and the chunks between; the last row leaves the group.
        states = (across @ torch.cat([S[:, :, None], kept @ v], 2).flatten(3)).unflatten(
            3, S.shape[2:]
        )
    else:  # the WY form: writes u = fresh - read S of a chunk, solved for all of its patches at once
        # Reads what lies below the diagonal, and takes the diagonal to be 1.
        right = torch.cat([v, since * k], -1)
        solved = torch.linalg.solve_triangular(
            within * (k @ k.mT), right, upper=False, unitriangular=True
        )
        fresh, read = solved.split([v.size(-1), k.size(-1)], -1)
        added, gone, states = kept @ fresh, kept @ read, [S]
        through = since[..., -1:, :].expand(*S.shape[:2], M, 1, 1)
        for n in range(M):
            states.append(
                through[:, :, n] * states[-1] - gone[:, :, n] @ states[-1] + added[:, :, n]
            )
        states = torch.stack(states, 2)
        v = fresh - read @ states[:, :, :-1]
    o = (q @ k.mT * within) @ v + (q * since) @ states[:, :, :-1]
    return o.flatten(2, 3), states[:, :, -1]


def memory(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, S: Tensor, delta: bool = False
) -> tuple[Tensor, Tensor]:
    """S_t = e^a_t S_{t-1} + k_t u_t^T and o_t = S_t^T q_t over N patches, where u_t = v_t, or with the delta rule
    u_t = v_t - (e^a_t S_{t-1})^T k_t. Returns o (B, H, N, F) and the last state.

    q, k (B, H, N, E), v (B, H, N, F), log-decay a <= 0 (H,) or (B, H, N), S (B, H, E, F), all fp32.
    Chunkwise-parallel, exact for any decay and length: every exponent is <= 0. Groups of chunks run one after another,
    which keeps their tensors in the cache and the cost per patch the same at any length. One patch is the recurrence.
    """
    N, out = q.size(2), []
    if N == 1:
        S = S * (a[:, None, None] if a.dim() == 1 else a[..., None]).exp()
        S = S + k.mT @ (v - k @ S if delta else v)
        return q @ S, S
    whole = N // CHUNK * CHUNK  # the last chunk may be short
    sizes = [min(CHUNK * GROUP, whole - i) for i in range(0, whole, CHUNK * GROUP)] + [
        N - whole
    ] * (N > whole)
    # split, not slices: the gradient of a slice is as long as the whole, which would make the cost quadratic
    parts = [t.split(sizes, 2) for t in ((q, k, v) if a.dim() == 1 else (q, k, v, a))]
    for n, part in zip(sizes, zip(*parts, strict=True), strict=True):
        o, S = memory_group(*part[:3], a if a.dim() == 1 else part[3], S, delta, max(n // CHUNK, 1))
        out.append(o)
    return (out[0] if len(out) == 1 else torch.cat(out, 2)), S


def memory_fla(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, S: Tensor, delta: bool = False
) -> tuple[Tensor, Tensor]:
    """`memory` by the kernels of fla-core, which take (B, N, H, E) in bf16. Static decay goes in as per-patch `g`:
    their per-head `g_gamma` has no gradient."""
    g = a.expand(q.size(0), q.size(2), -1) if a.dim() == 1 else a.mT
    q, k, v = (t.transpose(1, 2).bfloat16() for t in (q, k, v))
    rest = dict(g=g.float().contiguous(), scale=1.0, initial_state=S, output_final_state=True)
    if delta:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        o, S = chunk_gated_delta_rule(q, k, v, beta=torch.ones_like(rest["g"]), **rest)
    else:
        from fla.ops.simple_gla import chunk_simple_gla

        o, S = chunk_simple_gla(q, k, v, **rest)
    return o.transpose(1, 2).float(), S.float()


def log_retention(z: Tensor, low: float) -> Tensor:
    """log(low + (1 - low) sigmoid(z)), exact where it is nearly 0."""
    return F.logsigmoid(z) if low == 0 else torch.log1p(-(1 - low) * torch.sigmoid(-z))


def make_norm(k: Knobs, width: int) -> nn.Module:
    return nn.LayerNorm(width) if k.norm == "layernorm" else nn.RMSNorm(width, eps=1e-6)


def make_mlp(D: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))


class Memory(nn.Module):
    """Decaying Hebbian memory, one E x F matrix per head in fp32 whatever the precision of the rest."""

    def __init__(self, k: Knobs):
        super().__init__()
        self.k, D, H = k, k.d_model, k.n_head
        self.qkv = nn.Linear(D, 3 * D)
        self.retention = nn.Parameter(torch.empty(H))  # logits
        self.conv = nn.Conv1d(3 * D, 3 * D, 4, groups=3 * D) if k.mem_conv else None
        self.decay = nn.Linear(D, H, bias=False) if k.mem_decay == "data" else None
        self.beta = nn.Linear(D, H) if k.delta_rule else None
        self.gate = nn.Linear(D, D) if k.mem_gate else None
        self.head_norm = nn.RMSNorm(D // H, eps=1e-6) if k.mem_norm == "rmsnorm" else None
        self.proj = nn.Linear(D, D) if k.fusion == "sum" else None
        self.norm = make_norm(k, D) if k.fusion == "sum" and k.mem_norm == "denominator" else None
        self.operator = memory

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Runs behind the submodules' own: retention as MEM_INIT says, the same for every input at first."""
        if self.k.mem_init is None:
            half = torch.logspace(
                *(math.log10(h) for h in HALF_LIVES), self.k.n_head, dtype=torch.float64
            )
            kept = 0.5 ** (1 / half)
            self.retention.copy_(
                ((kept - self.k.mem_range) / -torch.expm1(math.log(0.5) / half)).log()
            )
        else:
            self.retention.fill_(self.k.mem_init)
        if self.decay is not None:
            self.decay.weight.zero_()
        if (
            self.conv is not None and self.k.mem_align
        ):  # what follows a patch is found by that patch, from the start on
            D = self.k.d_model
            self.qkv.weight[D : 2 * D], self.qkv.bias[D : 2 * D] = (
                self.qkv.weight[:D],
                self.qkv.bias[:D],
            )
            self.conv.weight.zero_()
            self.conv.bias.zero_()
            self.conv.weight[D : 2 * D, 0, -2] += 1
            self.conv.weight[:D, 0, -1] += 1
            self.conv.weight[2 * D :, 0, -1] += 1

    def half_lives(self, plasticity: float) -> Tensor:
        """(H,) patches, fp64, of an input that does not move them."""
        return math.log(0.5) / (
            log_retention(self.retention.detach().double(), self.k.mem_range) + math.log(plasticity)
        )

    def state(self, B: int) -> dict[str, Tensor]:
        k, D, H = self.k, self.k.d_model, self.k.n_head
        E, new = D // H, partial(torch.zeros, device=self.retention.device)
        F_ = E + (k.mem_norm == "denominator")
        state = dict(S=new(B, H, E, F_))
        if self.conv is not None:
            state["conv"] = new(B, 3, 3 * D)
        if k.mem_delay:
            state |= dict(late_k=new(B, H, k.window, E), late_v=new(B, H, k.window, F_))
        return state

    def convolve(self, qkv: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Depthwise over the patch and the three before it, as four shifted products: faster than conv1d on a CPU,
        and one kernel when compiled."""
        N, seq = qkv.size(1), torch.cat([past.type_as(qkv), qkv], 1)
        taps = self.conv.weight[:, 0].type_as(qkv)
        y = sum(seq[:, i : i + N] * taps[:, i] for i in range(4)) + self.conv.bias.type_as(qkv)
        return F.silu(y), seq[:, N:]

    def forward(
        self, x_BND: Tensor, state: dict[str, Tensor], plasticity: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is read, (B, N, D), and the state behind the N patches."""
        k, new, qkv = self.k, {}, self.qkv(x_BND)
        if self.conv is not None:
            qkv, new["conv"] = self.convolve(qkv, state["conv"])
        z = self.retention if self.decay is None else self.retention[:, None] + self.decay(x_BND).mT
        with torch.autocast(x_BND.device.type, enabled=False):
            a = log_retention(z.float(), k.mem_range) + plasticity.log()
            q, key, v = (
                t.unflatten(2, (k.n_head, -1)).transpose(1, 2).float() for t in qkv.chunk(3, -1)
            )
            if k.mem_feature == "elu":
                q, key = (F.elu(q) + 1) * q.size(-1) ** -0.5, F.elu(key) + 1
            else:
                q, key = F.normalize(q, dim=-1), F.normalize(key, dim=-1)
            if k.mem_norm == "denominator":
                v = F.pad(v, (0, 1), value=1.0)
            if (
                self.beta is not None
            ):  # a share beta of the write: the root of it on the key, and on the value
                root = (0.5 * F.logsigmoid(self.beta(x_BND).float())).exp().mT[..., None]
                key, v = key * root, v * root
            if k.mem_delay:
                key, v = torch.cat([state["late_k"], key], 2), torch.cat([state["late_v"], v], 2)
                new["late_k"], new["late_v"] = key[:, :, -k.window :], v[:, :, -k.window :]
                key, v = key[:, :, : -k.window], v[:, :, : -k.window]
            o, new["S"] = self.operator(q, key, v, a, state["S"], k.delta_rule)
            if k.mem_norm == "denominator":
                o = o[..., :-1] / (o[..., -1:] + 1e-6)
            else:
                o = self.head_norm(o)
        o = o.transpose(1, 2).flatten(2)
        if self.gate is not None:
            o = o * F.silu(self.gate(x_BND))
        o = o if self.proj is None else self.proj(o)
        o = o if self.norm is None else self.norm(o)
        return F.dropout(o, k.dropout, self.training), new


class Block(nn.Module):
    """Pre-norm residual block: window attention and memory side by side, then an MLP."""

    def __init__(self, k: Knobs):
        super().__init__()
        self.k, D = k, k.d_model
        self.norm1, self.norm2, self.mlp = make_norm(k, D), make_norm(k, D), make_mlp(D)
        self.qkv = nn.Linear(D, 3 * D)
        self.memory = Memory(k) if k.memory != "off" else None
        self.proj = nn.Linear(D, D) if k.fusion == "sum" else None
        self.out = nn.Linear(2 * D if k.fusion == "concat" and self.memory else D, D)

    def attend(
        self, h_BND: Tensor, state: dict, tables: tuple | None, mask: object
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Window attention (B, N, D), and the keys and values that the next patches may still see. Keys are kept as
        they are before the rotation, so that positions start at 0 in every call."""
        w, N = self.k.window, h_BND.size(1)
        q, key, v = (
            t.unflatten(2, (self.k.n_head, -1)).transpose(1, 2)
            for t in self.qkv(h_BND).chunk(3, -1)
        )
        key, v = (
            torch.cat([past.type_as(t), t], 2) for past, t in ((state["k"], key), (state["v"], v))
        )
        new = dict(k=key if w is None else key[:, :, max(key.size(2) - w + 1, 0) :])
        new["v"] = v if w is None else v[:, :, max(v.size(2) - w + 1, 0) :]
        if tables is not None:
            cos, sin = (t[:, None] for t in tables)
            q, key = rotate(q, cos[:, :, -N:], sin[:, :, -N:]), rotate(key, cos, sin)
        return window_attention(q, key, v, w, mask).transpose(1, 2).flatten(2), new

    def forward(
        self, x_BND: Tensor, state: dict, tables: tuple | None, mask: object, plasticity: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        h = self.norm1(x_BND)
        y, new = self.attend(h, state, tables, mask)
        y = y if self.proj is None else self.proj(y)
        if self.memory is not None:
            read, kept = self.memory(h, state, plasticity)
            read, new = (torch.zeros_like(read) if self.k.memory == "zero" else read), new | kept
            y = y + read if self.k.fusion == "sum" else torch.cat([y, read.type_as(y)], -1)
        x_BND = x_BND + self.out(y)
        return x_BND + F.dropout(self.mlp(self.norm2(x_BND)), self.k.dropout, self.training), new


class Thinking(nn.Module):
    """The same gated MLP, applied several times to each patch by itself."""

    def __init__(self, k: Knobs):
        super().__init__()
        self.steps, self.norm, self.gate = (
            k.thinking_steps,
            make_norm(k, k.d_model),
            nn.Linear(k.d_model, k.d_model),
        )
        self.mlp = make_mlp(k.d_model)

    def forward(self, z_BND: Tensor) -> Tensor:
        for _ in range(self.steps):
            h = self.norm(z_BND)
            z_BND = z_BND + torch.sigmoid(self.gate(h)) * self.mlp(h)
        return z_BND


class Hashes(nn.Module):
    """31-bit hashes (.., O) of the last bytes of x (.., P), as many as each of the O lengths says."""

    PRIME = 2**31 - 1

    def __init__(self, lengths: tuple[int, ...], P: int):
        super().__init__()
        self.lengths = lengths
        powers = [
            pow(1_000_003, P - i, self.PRIME) for i in range(P)
        ]  # sums of products stay below 2^45
        self.register_buffer("powers", torch.tensor(powers), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weighted = (x + 1) * self.powers
        return torch.stack([weighted[..., -n:].sum(-1) % self.PRIME for n in self.lengths], -1)


class NGrams(nn.Module):
    """A learned vector for the last 3, 4, 5 and 6 bytes: the row that their hash names, in a table for each length.
    What short histories say is looked up, where a GRU would learn it slowly. Hashed n-grams: Pagnoni et al., Byte
    Latent Transformer, arXiv 2412.09871. Rows begin at zero, so that an unseen one says nothing."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.table = rows, nn.Parameter(torch.empty(len(GRAMS) * rows, GRAM_WIDTH))
        self.hash, self.out = (
            Hashes(GRAMS, PAST),
            nn.Linear(len(GRAMS) * GRAM_WIDTH, BYTES, bias=False),
        )
        self.register_buffer("first", torch.arange(len(GRAMS)) * rows, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.table)

    def forward(self, x: Tensor) -> Tensor:
        """(.., 256) of bytes (.., 8)."""
        return self.out(F.embedding(self.hash(x) % self.rows + self.first, self.table).flatten(-2))


class ByteMemory(nn.Module):
    """A decaying associative memory from histories of bytes to what followed them, wherever patches begin: for each
    length of HISTORIES a table whose row, named by a hash, holds one history and the last two bytes behind it. Another
    history that falls into the row replaces it.

    A read weighs the two by a learned factor and by 2^(-age / half-life), learned too, and mixes them into the model's
    distribution as PPM does: p <- (sum w + d p) / (w + d), from the shortest history to the longest. d is learned for
    a history met once, for two equal bytes and for two different ones, and moved by the decoder's state. What followed
    the same history: n-gram heads, Akyurek et al., arXiv 2401.12973; a cache beside a model: Grave et al., arXiv
    1612.04426; mixing: Cleary and Witten, Data Compression Using Adaptive Coding and Partial String Matching, 1984.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.hash = rows, Hashes(HISTORIES, max(HISTORIES))
        self.how = nn.Parameter(
            torch.empty(6 * len(HISTORIES))
        )  # a vector, which weight decay leaves alone
        self.doubt = nn.Linear(BYTES, len(HISTORIES))  # what the decoder's state adds to log d
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Logarithms: weight of the last byte and of the one before, d for one byte, two equal and two different ones,
        decay per byte."""
        half = torch.logspace(*(math.log10(h) for h in HISTORY_HALF_LIVES), len(HISTORIES))
        start = torch.tensor([0.0, -1.0, 1.0, 0.5, 1.5, 0.0]).repeat(len(HISTORIES), 1)
        start[:, 5] = (math.log(2) / half).log()
        self.how.copy_(start.flatten())
        self.doubt.weight.zero_()
        self.doubt.bias.zero_()

    def half_lives(self) -> Tensor:
        """(O,) bytes."""
        return math.log(2) / self.how.detach().view(-1, 6)[:, 5].exp()

    def state(self, B: int) -> dict[str, Tensor]:
        """Empty tables. The row behind the last takes writes that a later one of the same window replaces."""
        shape, device = (B, len(HISTORIES), self.rows + 1), self.how.device
        return dict(
            key=torch.zeros(shape, dtype=torch.long, device=device),
            byte=torch.zeros(*shape, 2, dtype=torch.uint8, device=device),
            time=torch.full(
                (*shape, 2), -1, device=device
            ),  # of the byte, counted from the strip's first; -1: none
        )

    def read(
        self, text: Tensor, first_B: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, tuple]:
        """For each of the T bytes of text (B, 24 + T) behind the first 24, the first of them at `first` of its row: the
        bytes (B, T, O, 2) that followed its histories, newest first, and how long ago, -1 for none; and what to write.

        All at once and exactly as one by one: sorted by row, then by time, what is above in the same row came before.
        """
        P, T = max(HISTORIES), text.size(1) - max(HISTORIES)
        h = self.hash(text[:, :-1].unfold(1, P, 1)).mT  # (B, O, T)
        row, order = torch.sort(h % self.rows, stable=True)
        i, of = (
            torch.arange(T, device=text.device),
            lambda t_BT: t_BT[:, None].expand_as(h).gather(2, order),
        )
        h, byte, time = h.gather(2, order), of(text[:, P:]), of(first_B[:, None] + i)
        starts = lambda t: (t != t.roll(1, -1)) | (i == 0)
        row_start, run_start = (torch.where(starts(t), i, 0).cummax(-1).values for t in (row, h))
        met = (
            i - run_start
        )  # how often the window has met this history since another one was in its row
        known = (state["key"].gather(2, row) == h) & (run_start == row_start)
        at = row[..., None].expand(*row.shape, 2)
        old = state["byte"].gather(2, at).long() * known[..., None]
        old = old, state["time"].gather(2, at).masked_fill(~known[..., None], -1)
        last, before = [], []
        for new, (a, b) in zip((byte, time), (t.unbind(-1) for t in old), strict=True):
            last.append(torch.where(met > 0, new.roll(1, -1), a))
            before.append(torch.where(met > 1, new.roll(2, -1), torch.where(met > 0, a, b)))
        place = torch.where(
            (row != row.roll(-1, -1)) | (i == T - 1), row, self.rows
        )  # what comes last in a row stays
        writes = place, h, torch.stack([byte, last[0]], -1), torch.stack([time, last[1]], -1)
        back = order.argsort(-1)[..., None].expand(*h.shape, 2)
        found, when = (
            torch.stack(pair, -1).gather(2, back).transpose(1, 2)
            for pair in zip(last, before, strict=True)
        )
        age = (first_B[:, None] + i)[..., None, None] - when
        return found, age.masked_fill(when < 0, -1), writes

    def write(self, state: dict[str, Tensor], writes: tuple) -> None:
        """Into the state itself."""
        place, h, byte, time = writes
        at = place[..., None].expand_as(byte)
        state["key"].scatter_(2, place, h)
        state["byte"].scatter_(2, at, byte.to(torch.uint8))
        state["time"].scatter_(2, at, time)
        for name, empty in dict(key=0, byte=0, time=-1).items():
            state[name][:, :, -1] = empty

    def forward(self, logits: Tensor, h: Tensor, byte: Tensor, age: Tensor) -> Tensor:
        """log p (.., 256), fp32, of the decoder's logits and states (.., 256) and what was read, (.., O, 2) each."""
        one, two, alone, same, other, decay = self.how.view(-1, 6).unbind(-1)
        some = age >= 0
        w = some * (torch.stack([one, two], -1) - decay.exp()[:, None] * age).exp()
        d = torch.where(some[..., 1], torch.where(byte[..., 0] == byte[..., 1], same, other), alone)
        d = (d + self.doubt(h).float()).exp()
        whole = w.sum(-1) + d
        longer = F.pad(
            (d / whole).flip(-1).cumprod(-1).flip(-1), (0, 1), value=1.0
        )  # what longer histories leave
        p = longer[..., :1] * logits.softmax(-1)
        w = w / whole[..., None] * longer[..., 1:, None]
        return p.scatter_add(-1, byte.flatten(-2), w.flatten(-2)).clamp(min=1e-30).log()


class ByteDecoder(nn.Module):
    """The bytes of the next patch, one after another: a GRU of width 256 that reads the byte before beside the patch's
    latent. It starts at zero in each patch, and reads the last R bytes before it first (with none a byte 0, which
    stands for none): its weights then learn short histories from every byte, wherever patches begin."""

    def __init__(self, k: Knobs):
        super().__init__()
        self.reads, self.latent, self.embed = (
            k.decoder_reads,
            nn.Linear(k.d_model, BYTES),
            nn.Embedding(BYTES, BYTES),
        )
        self.gru, self.out = nn.GRU(2 * BYTES, BYTES, batch_first=True), nn.Linear(BYTES, BYTES)
        self.grams = NGrams(k.ngram_rows) if k.ngram_rows else None

    def inputs(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """nn.GRU's input product in two parts: of each byte value, (256, 3 * 256), and of the latents, (.., 3 * 256),
        which are the same for all bytes of a patch."""
        of_byte, of_latent = self.gru.weight_ih_l0.split(BYTES, dim=1)
        return F.linear(self.embed.weight, of_byte), F.linear(
            self.latent(z), of_latent, self.gru.bias_ih_l0
        )

    def step(self, h: Tensor | None, given: Tensor) -> Tensor:
        """nn.GRU's cell: the next hidden state from the last one (None: zero) and the input product."""
        r, z, n = given.chunk(3, -1)
        of_h = (
            self.gru.bias_hh_l0
            if h is None
            else F.linear(h, self.gru.weight_hh_l0, self.gru.bias_hh_l0)
        )
        hr, hz, hn = of_h.chunk(3, -1)
        z = torch.sigmoid(z + hz)
        new = (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn)
        return new if h is None else new + z * h

    def begin(self, x: Tensor, of_byte: Tensor, of_latent: Tensor) -> Tensor:
        """The hidden state (.., 256) that predicts a patch's first byte, from the 8 bytes before it, (.., 8)."""
        h = None
        for byte in (
            x[..., PAST - self.reads :] if self.reads else torch.zeros_like(x[..., :1])
        ).unbind(-1):
            h = self.step(h, of_latent + F.embedding(byte, of_byte))
        return h

    def logits(self, h: Tensor, x: Tensor) -> Tensor:
        """(.., 256), fp32, of the next byte, from the hidden state and the 8 bytes before it."""
        return self.out(h if self.grams is None else h + self.grams(x)).float()

    def forward(self, z_BND: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the bytes y (B, N, 4) of patches, given the latent before each, the 8 bytes x (B, N, 8) before it,
        and the bytes before them in their own patch; and the hidden states behind these. (B, N, 4, 256) both."""
        of_byte, of_latent = self.inputs(z_BND)
        states = [self.begin(x, of_byte, of_latent)]
        for given in F.embedding(y[..., :-1], of_byte).unbind(2):
            states.append(self.step(states[-1], of_latent + given))
        h = torch.stack(states, 2)
        return self.logits(h, torch.cat([x, y[..., :-1]], -1).unfold(-1, PAST, 1)), h


class ByteLM(nn.Module):
    """Bytes to 4-byte patches, through the blocks, to the next 4 bytes. Patch n has seen bytes 0 .. 4n + 3 and its
    latent predicts bytes 4n + 4 .. 4n + 7: with x = s[i : i + T] the targets are y = s[i + 4 : i + 4 + T]."""

    def __init__(self, k: Knobs):
        super().__init__()
        self.k, D = k, k.d_model
        self.embed, self.patch = nn.Embedding(BYTES, D), nn.Conv1d(D, D, PATCH, stride=PATCH)
        self.norm_in, self.norm_out = make_norm(k, D), make_norm(k, D)
        self.blocks = nn.ModuleList(Block(k) for _ in range(k.n_layer))
        self.thinking = Thinking(k) if k.thinking_steps else None
        self.decoder = ByteDecoder(k)
        self.byte_memory = ByteMemory(k.mem_rows) if k.mem_rows and k.memory != "off" else None
        self.register_buffer(
            "plasticity", torch.ones(())
        )  # multiplies every retention; saved, so applied as trained
        self.masks: dict[
            tuple[int, int], object
        ] = {}  # FlexAttention's block masks by (N, P); empty: chunked SDPA

    def init_weights(self, seed: int) -> None:
        """PyTorch's default initialisation. Each module draws from a generator of its own, made of seed and name: a
        part more, or another one, moves no other part's weights."""
        with torch.random.fork_rng(devices=[]):
            for name, module in self.named_modules():
                if hasattr(module, "reset_parameters"):
                    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                    torch.manual_seed(int.from_bytes(digest[:7], "big"))
                    module.reset_parameters()
        for memory in (*(block.memory for block in self.blocks), self.byte_memory):
            if (
                memory is not None
            ):  # it comes before its own parts in the walk, which would undo what it sets
                memory.reset_parameters()

    def state(self, B: int) -> State:
        """The state of B rows before their first patch; constant in size from the first full window on."""
        k, device = self.k, self.plasticity.device
        keys = torch.zeros(B, k.n_head, 0, k.d_model // k.n_head, device=device)
        layers = [
            dict(k=keys, v=keys) | (b.memory.state(B) if b.memory else {}) for b in self.blocks
        ]
        whole = dict(dtype=torch.long, device=device)
        state = dict(
            position=torch.zeros(B, **whole), bytes=torch.zeros(B, FURTHEST, **whole), layers=layers
        )
        return state | (dict(histories=self.byte_memory.state(B)) if self.byte_memory else {})

    def trunk(self, x_BT: Tensor, state: State) -> tuple[Tensor, State]:
        """Latents (B, N, D) of the patches of x, which continue `state`, and the state behind them."""
        k, N = self.k, x_BT.size(1) // PATCH
        first, P = state["position"], state["layers"][0]["k"].size(2)
        z = (
            self.embed(x_BT).unflatten(1, (N, PATCH)).flatten(2)
        )  # one product; conv1d would move channels to and fro
        z = F.linear(z, self.patch.weight.mT.flatten(1), self.patch.bias)
        tables = None
        if k.rope == "input":
            z = rotate(z, *rotary_tables(first, N, k.d_model))
        else:
            tables = rotary_tables(torch.zeros_like(first[:1]), P + N, k.d_model // k.n_head)
        z, layers = F.dropout(self.norm_in(z), k.dropout, self.training), []
        for block, old in zip(self.blocks, state["layers"], strict=True):
            run = (
                partial(checkpoint, block, use_reentrant=False)
                if k.recompute and self.training
                else block
            )
            z, new = run(z, old, tables, self.masks.get((N, P)), self.plasticity)
            layers.append(new)
        z = self.norm_out(z)
        past = torch.cat([state["bytes"], x_BT], 1)[:, -FURTHEST:]
        state = state | dict(position=first + N, bytes=past, layers=layers)
        return (z if self.thinking is None else self.thinking(z)), state

    def logits(
        self, x_BT: Tensor, y_BT: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Logits (B, T, 256), fp32, of the targets y, each given all bytes before it; and the state behind x."""
        old = self.state(len(x_BT)) if state is None else state
        z_BND, state = self.trunk(x_BT, old)
        x = torch.cat([old["bytes"][:, -PATCH:], x_BT], 1).unfold(1, PAST, PATCH)
        logits, h = (
            t.flatten(1, 2) for t in self.decoder(z_BND, x, y_BT.unflatten(1, (-1, PATCH)))
        )
        if self.byte_memory is not None:
            byte, age, writes = self.read_histories(x_BT, y_BT, old)
            state["histories"] = each(Tensor.clone, state["histories"])
            self.byte_memory.write(state["histories"], writes)
            logits = logits if self.k.memory == "zero" else self.byte_memory(logits, h, byte, age)
        return logits, state

    def read_histories(
        self, x_BT: Tensor, y_BT: Tensor, state: State
    ) -> tuple[Tensor, Tensor, tuple]:
        """ByteMemory.read at each of the targets y."""
        text = torch.cat([state["bytes"], x_BT[:, :PATCH], y_BT], 1)
        return self.byte_memory.read(text, state["position"] * PATCH, state["histories"])

    def nll(self, x_BT: Tensor, y_BT: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """-log p of each target byte, (B, T), in nats; 0 where y is -1: what such a byte is, x says."""
        logits, state = self.logits(
            x_BT, torch.where(y_BT < 0, F.pad(x_BT[:, PATCH:], (0, PATCH)), y_BT), state
        )
        nll = F.cross_entropy(
            logits.flatten(0, 1), y_BT.flatten(), ignore_index=-1, reduction="none"
        )
        return nll.view_as(y_BT), state

    def half_lives(self) -> Tensor | None:
        """(L, H) patches, of an input that does not move them; None without memory."""
        memories = [b.memory for b in self.blocks if b.memory is not None]
        return (
            torch.stack([m.half_lives(self.plasticity.item()) for m in memories]).cpu()
            if memories
            else None
        )


class Stream:
    """A growing text of B rows in constant memory: bytes go in one by one or many at a time, in any number, and
    `logits` is what comes next. Exactly the full forward, whatever the cuts."""

    def __init__(self, model: ByteLM, B: int = 1, prefill: int = 4096):
        self.model, self.state, self.prefill = (
            model,
            model.state(B),
            prefill,
        )  # prefill: bytes a forward takes
        device = model.plasticity.device
        self.held = torch.zeros(B, 0, dtype=torch.long, device=device)  # of the unfinished patch
        self.past = torch.zeros(
            B, max(HISTORIES), dtype=torch.long, device=device
        )  # the last bytes of all
        self.of_byte = self.of_latent = self.h = None

    def next_byte(self) -> Tensor:
        """(B,) place of the next byte in its row, counted from the first predicted one."""
        return self.state["position"] * PATCH + self.held.size(1) - PATCH

    @torch.no_grad()
    def feed(self, x_BT: Tensor, remember: bool = True) -> None:
        """Bytes (B, T), any T. Those that are not remembered are no part of the memory by bytes: a sampled text that
        remembers itself soon repeats itself."""
        x_BT, done = x_BT.to(self.held), self.held.size(1)
        seen = torch.cat([self.past, x_BT], 1)
        if self.model.byte_memory is not None and remember:
            memory, old = self.model.byte_memory, self.state["histories"]
            # Bytes of the first patch have a time below 0, which is none: no window predicts them.
            memory.write(old, memory.read(seen, self.next_byte(), old)[-1])
        x_BT = torch.cat([self.held, x_BT], 1)
        while x_BT.size(1) >= PATCH:
            n = min(x_BT.size(1), self.prefill) // PATCH * PATCH
            z_BND, self.state = self.model.trunk(x_BT[:, :n], self.state)
            x_BT, done = x_BT[:, n:], 0
            self.of_byte, self.of_latent = self.model.decoder.inputs(z_BND[:, -1])
            before = seen[:, : seen.size(1) - x_BT.size(1)][:, -PAST:]
            self.h = self.model.decoder.begin(before, self.of_byte, self.of_latent)
        self.held, self.past = x_BT, seen[:, -max(HISTORIES) :]
        if self.h is not None:
            for byte_B in x_BT[:, done:].unbind(1):
                self.h = self.model.decoder.step(
                    self.h, self.of_latent + F.embedding(byte_B, self.of_byte)
                )

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(B, 256), fp32, of the next byte. All equal before the first patch is whole: no window scores its own."""
        if self.h is None:
            return torch.zeros(len(self.held), BYTES, device=self.held.device)
        logits = self.model.decoder.logits(self.h, self.past[:, -PAST:])
        if self.model.byte_memory is None or self.model.k.memory == "zero":
            return logits
        text = F.pad(self.past, (0, 1))  # a place for the byte that is not there yet
        byte, age, _ = self.model.byte_memory.read(text, self.next_byte(), self.state["histories"])
        return self.model.byte_memory(logits, self.h, byte[:, 0], age[:, 0])

    def state_bytes(self) -> int:
        """Memory that the text so far takes, whatever its length."""
        tensors = [self.held, self.past]
        each(tensors.append, self.state)
        return sum(t.numel() * t.element_size() for t in tensors)


def each(f: Callable[..., Tensor], *states: State) -> State:
    """f of the corresponding tensors of states."""
    if isinstance(states[0], dict):
        return {key: each(f, *(s[key] for s in states)) for key in states[0]}
    if isinstance(states[0], list):
        return [each(f, *parts) for parts in zip(*states, strict=True)]
    return f(*states)


# ----------------------------------------------------------------------------
# Optimizers


class LossScale:
    """torch.amp.GradScaler's rule without its wait for the device: fp16 gradients carry a factor, halved when they
    overflow (that update is skipped) and doubled after 2,000 steps that do not. Constantly 1 in other precisions."""

    def __init__(self, on: bool, device: torch.device):
        self.on = on
        self.scale = torch.tensor(2.0**16 if on else 1.0, device=device)
        self.good = torch.zeros((), device=device)  # steps since the last change

    def skip(self, norm: Tensor) -> Tensor:
        """Whether this step overflowed, as a device bool. At a factor of 1 it is no overflow, but a real failure."""
        return (
            ~norm.isfinite() & (self.scale > 1)
            if self.on
            else torch.zeros_like(norm, dtype=torch.bool)
        )

    def update(self, skipped: Tensor) -> None:
        if self.on:
            grown = ~skipped & (self.good >= 1999)
            self.scale = torch.where(
                skipped, self.scale / 2, torch.where(grown, self.scale * 2, self.scale)
            )
            self.good = torch.where(skipped | grown, 0.0, self.good + 1)


class AdamW:
    """torch's fused AdamW on this rank's row of a table (W, part) that holds all parameters end to end: gradients are
    summed there over micro-batches without talking to other ranks, then reduce-scattered once; the updated rows are
    all-gathered; the moments are held once over all ranks. Unlike train_gpt.py's: weight decay, on the parameters at
    the front of the table, and the norm of the whole gradient."""

    def __init__(self, model: ByteLM, k: Knobs, w: World):
        named = dict(model.named_parameters())
        decayed = [n for n, p in named.items() if k.decay_on == "all" or p.dim() > 1]
        self.params, self.w = (
            {n: named[n] for n in [*decayed, *(n for n in named if n not in set(decayed))]},
            w,
        )
        part = -(-sum(p.numel() for p in named.values()) // w.size)
        self.data, self.grads = (torch.zeros(w.size, part, device=w.device) for _ in range(2))
        for name, p in self.params.items():
            p.data = self.views(self.data)[name].copy_(p.data)
            p.grad = self.views(self.grads)[name]
        cut = min(max(sum(named[n].numel() for n in decayed) - w.rank * part, 0), part)
        self.mine = [nn.Parameter(piece) for piece in self.data[w.rank].split([cut, part - cut])]
        for piece, grad in zip(self.mine, self.grads[w.rank].split([cut, part - cut]), strict=True):
            piece.grad = grad
        groups = [
            dict(params=[p], weight_decay=d)
            for p, d in zip(self.mine, (k.weight_decay, 0.0), strict=True)
        ]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, k.beta2), eps=1e-8, fused=True)

    def views(self, table: Tensor) -> dict[str, Tensor]:
        """The parameters' places in a (W, part) table, in their shapes."""
        sizes = [p.numel() for p in self.params.values()]
        parts = table.view(-1)[: sum(sizes)].split(sizes)
        return {
            name: part.view_as(p)
            for part, (name, p) in zip(parts, self.params.items(), strict=True)
        }

    def norms(self) -> Tensor:
        """Of each parameter's gradient on this rank, before the ranks' are averaged."""
        return torch.stack(torch._foreach_norm(list(self.views(self.grads).values())))

    def reduce(self) -> Tensor:
        """Mean over ranks; returns the norm of the whole gradient, the same on every rank."""
        self.w.mean_scatter(self.grads)
        return self.w.sum(self.grads[self.w.rank].square().sum()).sqrt()

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, ok: Tensor) -> None:
        """One update with the gradient times `factor`; nothing moves when the device flag `ok` is down."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.grads[self.w.rank].mul_(factor)
        self.adam.found_inf = (~ok).float()
        self.adam.step()
        self.w.all_rows(self.data)
        self.grads.zero_()

    def state_dict(self) -> dict:
        """Moments of all parameters, by name, and the number of updates."""
        states, out = [self.adam.state.get(p, {}) for p in self.mine], {}
        for key in ("exp_avg", "exp_avg_sq"):
            row = torch.cat(
                [
                    s.get(key, torch.zeros_like(p)).detach()
                    for s, p in zip(states, self.mine, strict=True)
                ]
            )
            rows = self.w.all_rows(row.repeat(self.w.size, 1))
            out[key] = {name: view.cpu().clone() for name, view in self.views(rows).items()}
        return out | dict(step=float(states[0].get("step", 0.0)))

    def load_state_dict(self, state: dict) -> None:
        for p in self.mine:
            self.adam.state[p] = dict(step=torch.tensor(state["step"], device=self.w.device))
        for key in ("exp_avg", "exp_avg_sq"):
            rows = torch.zeros_like(self.data)
            for name, view in self.views(rows).items():
                view.copy_(state[key][name])
            row = rows[self.w.rank].clone()
            for p, piece in zip(self.mine, row.split([p.numel() for p in self.mine]), strict=True):
                self.adam.state[p][key] = piece


# ----------------------------------------------------------------------------
# Schedules


def lr_scale(step: int, k: Knobs) -> float:
    """Up to 1 over the first WARMUP_ITERS updates, then 1, or down to 0 at NUM_ITERATIONS; updates count from 0."""
    if step < k.warmup_iters:
        return (step + 1) / k.warmup_iters
    left = 1 - (step - k.warmup_iters) / max(k.num_iterations - k.warmup_iters, 1)
    return {
        "constant": 1.0,
        "linear": max(left, 0.0),
        "cosine": 0.5 - 0.5 * math.cos(math.pi * max(left, 0.0)),
    }[k.schedule]


def plasticity(step: int, k: Knobs) -> float:
    """What multiplies every retention in update `step`: 1, or with CURRICULUM that of the stage it is in."""
    return (
        next(p for at, p in reversed(STAGES) if step >= at * k.num_iterations)
        if k.curriculum
        else 1.0
    )


# ----------------------------------------------------------------------------
# Batches


class Batches:
    """Which bytes each step trains on: a pure function of the step, whatever the number of ranks.

    CARRY_STATE=1: row r reads its own strip of the text, one of BATCH_SIZE equal ones, window after window, and starts
    over at its end. CARRY_STATE=0: windows at random places, drawn from a hash of seed and step.
    """

    def __init__(self, shards: TokenShards, k: Knobs, w: World):
        self.shards, self.k, self.w, T = shards, k, w, k.sequence_length
        strips = k.batch_size if k.carry_state else 1
        if shards.total < strips * T + PATCH:
            rows = f"BATCH_SIZE={strips} strips of " if strips > 1 else ""
            raise UserError(
                f"{shards.pattern}: {shards.total:,} bytes of training text, {rows}SEQUENCE_LENGTH={T} needs "
                f"{strips * T + PATCH:,}; use more text or shorter rows"
            )
        if k.batch_size % w.size:
            raise UserError(
                f"BATCH_SIZE={k.batch_size} does not divide among {w.size} ranks; change one of the two"
            )
        self.local = k.batch_size // w.size
        self.windows = (shards.total - PATCH) // strips // T  # per strip

    def starts(self, step: int) -> list[int]:
        """Stream positions of the rows' windows."""
        k, T = self.k, self.k.sequence_length
        if k.carry_state:
            strip = (self.shards.total - PATCH) // k.batch_size
            return [row * strip + step % self.windows * T for row in range(k.batch_size)]
        draw = np.random.default_rng([k.seed, step])
        return draw.integers(0, self.shards.total - T - PATCH + 1, k.batch_size).tolist()

    def fresh(self, step: int) -> bool:
        """Whether this step's rows start without the state of the step before."""
        return not self.k.carry_state or step % self.windows == 0

    def make(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the step, (B_local, T) uint8; targets are the bytes 4 further on."""
        rows = self.starts(step)[self.w.rank * self.local : (self.w.rank + 1) * self.local]
        text = [
            self.shards.read(at, self.k.sequence_length + PATCH).astype(np.uint8) for at in rows
        ]
        text = torch.from_numpy(np.stack(text))
        return text[:, :-PATCH].contiguous(), text[:, PATCH:].contiguous()


# ----------------------------------------------------------------------------
# Data

WIKIPEDIA, DUMP = "wikimedia/wikipedia", "20231101"
SHORTEST = 1000  # characters of a Wikipedia article, as in the original


def clean_article(text: str) -> str:
    """One article in NFC: bracketed references and tags deleted, spaces joined within paragraphs, which are kept (the
    original joined them too)."""
    text = re.sub(r"<[^<>]*>", "", re.sub(r"\[[^\[\]]*\]", "", unicodedata.normalize("NFC", text)))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def write_split(
    folder: Path, pieces: Iterator[bytes], shares: dict[str, float], separator: bytes
) -> None:
    """Write each piece to the file of the share that its hash falls into: `train.txt`, `val.txt`, ..."""
    ends = np.cumsum(list(shares.values()))
    files = [open(folder / f"{name}.txt", "wb") for name in shares]
    try:
        for piece in pieces:
            at = int.from_bytes(hashlib.sha256(piece).digest()[:4], "big") / 2**32
            files[min(int(np.searchsorted(ends, at, "right")), len(files) - 1)].write(
                piece + separator
            )
    finally:
        for f in files:
            f.close()


def wikipedia(language: str) -> Path:
    """Folder with train.txt, val.txt and test.txt of the language's Wikipedia, split by article hash, made once. The
    dump's parquet files are downloaded (resumably), read and kept."""
    if not re.fullmatch(r"[a-z][a-z_-]{1,15}", language):
        raise UserError(
            f"DATA=wikipedia:{language}: expected a language code, such as wikipedia:tr"
        )
    if (home := HERE / f"data/wikipedia-{DUMP}.{language}").exists():
        return home
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "DATA=wikipedia needs pyarrow to read the dump; pip install pyarrow, or set DATA to a text file"
        )
    prefix = f"{DUMP}.{language}/"
    names = [n for n in plumbing.hub_list(WIKIPEDIA, prefix) if n.endswith(".parquet")]

    def articles(paths: list[Path]) -> Iterator[bytes]:
        import pyarrow.parquet as parquet  # optional: only this needs it

        for path in paths:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000, columns=["text"]):
                for text in map(clean_article, batch.column("text").to_pylist()):
                    if len(text) >= SHORTEST:
                        yield text.encode("utf-8", "replace")

    def make(folder: Path) -> None:
        paths = [HERE / "data/parquet" / n for n in names]
        for name, path in zip(names, paths, strict=True):
            if not path.exists():
                print(f"downloading {name}", flush=True)
                plumbing.hub_fetch(WIKIPEDIA, name, path)
        write_split(folder, articles(paths), dict(train=0.99, val=0.005, test=0.005), b"\n\n")

    return plumbing.build_once(home, make)


def paragraphs(paths: list[str]) -> Iterator[bytes]:
    """The files' paragraphs, blank line included; text without blank lines in pieces of lines, 4 KiB or a bit more."""
    for path in paths:
        lines, size = [], 0
        with open(path, "rb") as f:
            while line := f.readline(1 << 16):
                lines.append(line)
                size += len(line)
                if not line.strip() or size >= 4096:
                    yield b"".join(lines)
                    lines, size = [], 0
        if lines:
            yield b"".join(lines)


def named(path: str, words: str) -> bool:
    return re.search(rf"(^|[._-])({words})([._-]|$)", Path(path).name.lower()) is not None


def split_files(data: str) -> tuple[list[str], list[str]]:
    """Training and validation files of DATA=PATH. A file named val, valid, validation or dev, among them or beside a
    single one, is the validation text, and test files are left alone; else 5% of the paragraphs, by hash, in a copy."""
    files = plumbing.text_files(data)
    if empty := next((p for p in files if os.path.getsize(p) == 0), None):
        raise UserError(f"{empty}: an empty file; expected text")
    beside = (
        plumbing.text_files(Path(files[0]).parent)
        if len(files) == 1 and named(files[0], "train")
        else files
    )
    val = [p for p in beside if named(p, "val|valid|validation|dev")]
    train = [p for p in files if not named(p, "val|valid|validation|dev|test")]
    if val and train:
        return train, val
    content = json.dumps(
        [[os.path.abspath(p), os.path.getsize(p), os.stat(p).st_mtime_ns] for p in files]
    )
    home = HERE / f"data/split-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    make = lambda folder: write_split(folder, paragraphs(files), dict(train=0.95, val=0.05), b"")
    plumbing.build_once(home, make)
    return [str(home / "train.txt")], [str(home / "val.txt")]


def open_data(k: Knobs) -> tuple[TokenShards, TokenShards, str]:
    """Training text, validation text, and the SHA-256 of the embedded corpus ('' for other data). Any bytes will do."""
    if k.data == "embedded":
        train, val, sha = plumbing.embedded_corpus(HERE / "data")
        return TokenShards(train), TokenShards(val), sha
    train, val = split_files(
        str(wikipedia(k.data[10:])) if k.data.startswith("wikipedia:") else k.data
    )
    if os.path.getsize(val[0]) <= PATCH:
        raise UserError(
            f"{k.data}: its validation part has {os.path.getsize(val[0])} bytes; use more text, or put a file val.txt "
            f"beside it"
        )
    hint = "set DATA to a text file, a folder, a pattern, wikipedia:tr or embedded"
    return *(TokenShards(paths, hint, open_file=plumbing.read_bytes) for paths in (train, val)), ""


# ----------------------------------------------------------------------------
# Evaluation

STRIPS = 8  # parts of the validation text that are read side by side, whatever the number of ranks


def evaluate(
    step: "MicroStep", val: TokenShards, micro: int, k: Knobs, w: World
) -> tuple[float, float]:
    """Mean loss per byte, nats, and characters per byte of the whole validation text (VAL_BYTES of it), in windows that
    do not overlap; each byte behind the first 4 counts once. With CARRY_STATE a strip's windows carry their state. The
    same windows for every world size and micro-batch, whose rows are filled up with targets of -1."""
    T, total = k.sequence_length, min(val.total, (k.val_bytes or val.total) + PATCH) - PATCH
    strip = -(-total // (STRIPS * PATCH)) * PATCH
    lo, hi = STRIPS * w.rank // w.size, STRIPS * (w.rank + 1) // w.size
    sums = torch.zeros(2, device=w.device, dtype=torch.float64)
    for row in range(lo, hi, micro):
        state = None
        for at in range(0, strip, T):
            x, y = np.zeros((micro, T), np.int64), np.full((micro, T), -1)
            for i in range(min(micro, hi - row)):
                start = (row + i) * strip + at
                if (n := min(T, strip - at, total - start)) > 0:
                    text, whole = val.read(start, n + PATCH), -(-n // PATCH) * PATCH
                    x[i, :whole], y[i, :n] = text[:whole], text[PATCH:]
            loss, new = step.loss_sum(
                torch.from_numpy(x).to(w.device), torch.from_numpy(y).to(w.device), state
            )
            state, sums[0] = new if k.carry_state else None, sums[0] + loss
            sums[1] += int(((y >= 0) & (y & 0xC0 != 0x80)).sum())  # bytes that begin a character
    sums = w.sum(sums)
    return sums[0].item() / total, sums[1].item() / total


# ----------------------------------------------------------------------------
# Build

HINT = "set DEVICE=cpu; PRESET=demo is a size that makes that sensible"
RESULTS = (
    "run_id date git_commit seed preset d_model n_layer n_head window memory mem_decay delta_rule carry_state data "
    "learning_rate batch_size device_batch_size sequence_length num_iterations final_val_loss best_val_loss "
    "final_val_bpc val_bits_per_char train_time_ms ms_per_step gpu_name n_gpus notes stage status steps_done n_params "
    "tokens_seen epochs peak_memory_mib torch world_size code_sha256 dirty"
).split()
IN_COLUMNS = (
    "seed d_model n_layer n_head window memory mem_decay delta_rule carry_state data lr batch_size "
)
IN_COLUMNS += "device_batch_size sequence_length num_iterations"
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


def choose_precision(
    wanted: str, device: str, capability: tuple[int, int] | None
) -> tuple[str, str]:
    """fp32, bf16 or fp16, and why. auto: fp32 on a CPU, bf16 from compute capability 8 on, fp16 below (there bf16 would
    be emulated, which torch.cuda.is_bf16_supported() calls support)."""
    where = "CPU" if device == "cpu" else "compute capability {}.{}".format(*capability)
    if wanted == "auto":
        return (
            "fp32" if device == "cpu" else "bf16" if capability >= (8, 0) else "fp16"
        ), f"auto, {where}"
    if wanted == "bf16" and device == "cuda" and capability < (8, 0):
        raise UserError(
            f"PRECISION=bf16: this GPU has {where} and would emulate it; use PRECISION=fp16 or auto"
        )
    return wanted, f"as asked, {where}"


def flops_per_byte(model: ByteLM, k: Knobs) -> float:
    """Model FLOPs of forward and backward, for MFU: 6 per weight of a matrix product each time it is used, attention
    counted causal within its window, and the memory's chunkwise products."""
    uses = dict(embed=0, thinking=k.thinking_steps)
    used, steps = (
        0,
        PATCH - 2 + max(k.decoder_reads, 1),
    )  # of the GRU that multiply a state; the first has none
    per_byte = {
        "decoder.gru.weight_hh_l0": steps,
        "decoder.out.weight": PATCH,
        "decoder.grams.out.weight": PATCH,
    }
    per_byte |= {"decoder.grams.table": 0, "byte_memory.doubt.weight": PATCH}
    for name, p in model.named_parameters():
        often = per_byte.get(name, uses.get(name.split(".")[0], 1))
        used += p.numel() * (0 if "embed" in name else often) * (p.dim() > 1)
    N = k.sequence_length // PATCH
    keys = min(k.window or N, N / 2) if not k.carry_state else k.window
    memory = (2 * CHUNK + 4 * k.d_model // k.n_head) * k.d_model if k.memory != "off" else 0
    return (6 * used + 12 * k.n_layer * keys * k.d_model + 3 * k.n_layer * memory) / PATCH


def memory_mib(n_params: int, rows: int, k: Knobs) -> int:
    """Rough peak of a rank: weights, gradients, two moments, and what a micro-batch keeps for its backward pass."""
    blocks = k.d_model if k.recompute else 70 * k.d_model + 3 * CHUNK * k.n_head
    decoder = 25 * (PATCH - 1 + max(k.decoder_reads, 1)) * BYTES
    floats = rows * k.sequence_length // PATCH * (k.n_layer * blocks + decoder)
    return (16 * n_params + 4 * floats + 2 * rows * history_bytes(k)) // 2**20


def history_bytes(k: Knobs) -> int:
    """Of the tables of one row's memory by bytes: a hash, two bytes and two times each."""
    return 26 * len(HISTORIES) * k.mem_rows * (k.memory != "off")


def disk_need(n_params: int, k: Knobs) -> int:
    """Bytes of a run's weights and checkpoints at the most: KEEP numbered weights, the best, one being written; and
    KEEP resumable checkpoints (weights, two moments, the rows' histories), one being written."""
    states = k.batch_size * history_bytes(k) * k.carry_state
    return 4 * n_params * (k.keep + 2) + (12 * n_params + states) * (k.keep + 1)


def check_disk(folder: Path, n_params: int, k: Knobs, w: World) -> None:
    problem = None
    if w.main:
        free, there = (
            shutil.disk_usage(folder).free,
            sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        )
        if free + there < disk_need(n_params, k):
            problem = (
                f"{folder}: {free / 2**20:,.0f} MiB free, KEEP={k.keep} checkpoints need "
                f"{disk_need(n_params, k) / 2**20:,.0f} MiB; free space, lower KEEP, or set LOGS_FOLDER elsewhere"
            )
    w.agree(problem)


def read_weights(path: str | Path) -> dict:
    """A .pth of a run: model, knobs, step, val_loss. Raises UserError when it is not one."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        found["model"], found["knobs"]["d_model"]
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; a run's weights are logs/RUN_ID/best_model_scaled.pth"
        ) from None
    except Exception as error:  # torch.load has many ways to fail
        raise UserError(
            f"{path}: not weights of train_scaled.py ({type(error).__name__})"
        ) from None
    if missing := [name.upper() for name in MODEL.split() if name not in found["knobs"]]:
        names = ", ".join(missing)
        raise UserError(
            f"{path}: weights of another version of train_scaled.py, without {names}; train new ones"
        )
    return found


def load_model(path: str | Path, device: str = "cpu", **changes: object) -> ByteLM:
    """The model of a .pth in evaluation mode, for scripts; `changes` are knobs, such as memory="zero"."""
    found = read_weights(path)
    known = {f.name for f in dataclasses.fields(Knobs)}
    k = Knobs(**({name: v for name, v in found["knobs"].items() if name in known} | changes))
    model = ByteLM(k)
    model.load_state_dict(found["model"])
    return model.to(device).eval()


def check_weights(path: str, k: Knobs) -> dict:
    """The weights at INIT_FROM; raises UserError when they are of another model."""
    found, fields = read_weights(path), {f.name: f for f in dataclasses.fields(k)}
    other = [n for n in MODEL.split() if found["knobs"].get(n) != getattr(k, n)]
    if other:
        show = lambda name, v: f"{name.upper()}={plumbing.show(fields[name], v)}"
        words = ", ".join(
            f"{show(n, found['knobs'].get(n))}, not {show(n, getattr(k, n))}" for n in other
        )
        preset = found["knobs"].get("preset")
        raise UserError(
            f"{path}: weights of another model (PRESET={preset}: {words}); set these knobs as they were"
        )
    return found["model"]


class MicroStep:
    """Loss and gradients of a micro-batch, compiled if COMPILE says so and the compiler can."""

    def __init__(
        self, model: ByteLM, k: Knobs, w: World, dtype: torch.dtype, say: Callable[[str], None]
    ):
        self.model, self.k, self.w, self.dtype, self.nll = model, k, w, dtype, model.nll
        if k.compile:
            self.compile(say)

    def compile(self, say: Callable[[str], None]) -> None:
        """Compile, and train one micro-batch of zeros to see that it works; if not, one line, and on without."""
        problem, N = None, self.k.sequence_length // PATCH
        try:
            if self.w.device.type == "cuda" and torch.cuda.get_device_capability(self.w.device) >= (
                8,
                0,
            ):
                self.plan_flex(N)
            self.nll = torch.compile(self.model.nll, dynamic=False)
            zeros = torch.zeros(
                min(self.k.device_batch_size, self.k.batch_size), N * PATCH, dtype=torch.long
            )
            self.backward(
                zeros.to(self.w.device),
                zeros.to(self.w.device),
                None,
                torch.ones((), device=self.w.device),
            )
        except torch.OutOfMemoryError:
            raise
        except (
            Exception
        ) as error:  # a compiler fails in any way it likes; training does not depend on it
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if problems := [p for p in self.w.gather(problem) if p]:
            self.nll, self.model.masks = self.model.nll, {}
            say(f"compile: failed, training goes on without it ({problems[0]})")

    def plan_flex(self, N: int) -> None:
        """FlexAttention's block masks for the first window of a strip and for those behind it."""
        from torch.nn.attention.flex_attention import create_block_mask

        w = self.k.window
        for P in {0, w - 1 if self.k.carry_state else 0} if w and w < N else ():
            seen = lambda b, h, i, j, P=P: (j <= i + P) & (j > i + P - w)
            self.model.masks[N, P] = create_block_mask(
                seen, None, None, N, P + N, device=self.w.device
            )

    def run(self, x_BT: Tensor, y_BT: Tensor, state: State | None) -> tuple[Tensor, State]:
        with torch.autocast(
            self.w.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        ):
            return self.nll(
                x_BT.long(), y_BT.long(), self.model.state(len(x_BT)) if state is None else state
            )

    def backward(
        self, x_BT: Tensor, y_BT: Tensor, state: State | None, factor: Tensor
    ) -> tuple[Tensor, State]:
        """Mean loss in nats; adds `factor` times its gradient to every parameter's. The state carries no gradient."""
        nll_BT, state = self.run(x_BT, y_BT, state)
        loss = nll_BT.mean()
        (loss * factor).backward()
        return loss.detach(), each(Tensor.detach, state)

    @torch.no_grad()
    def loss_sum(self, x_BT: Tensor, y_BT: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Summed loss over the targets that are not -1, in nats, and the state behind them."""
        nll_BT, state = self.run(x_BT, y_BT, state)
        return nll_BT.double().sum(), state


def show_plan(k: Knobs) -> int:
    """--dry_run: what would be trained, on what. Needs neither GPU nor data."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    with torch.device("meta"):
        model = ByteLM(k)
    n_params, size = sum(p.numel() for p in model.parameters()), k.batch_size * k.sequence_length
    micro = min(k.device_batch_size, max(k.batch_size // ranks, 1))
    print(knobs_json(k))
    print(f"parameters:      {n_params:,}")
    print(
        f"tokens per step: {size:,} bytes ({ranks} rank(s), micro-batch {micro} x {k.sequence_length})"
    )
    print(f"training tokens: {size * k.num_iterations:,} in {k.num_iterations} steps")
    print(f"compute:         {flops_per_byte(model, k) * size * k.num_iterations:.3g} FLOPs")
    print(
        f"memory:          about {memory_mib(n_params, micro, k):,} MiB per rank at micro-batch {micro}"
    )
    print(
        f"disk:            up to {disk_need(n_params, k) / 2**20:,.0f} MiB of checkpoints at KEEP={k.keep}"
    )
    reach = "all patches" if k.window is None else f"{k.n_layer * (k.window - 1) * PATCH:,} bytes"
    print(f"window reach:    {reach} through {k.n_layer} blocks; a row has {k.sequence_length:,}")
    if (
        k.data.startswith("wikipedia:")
        and not (HERE / f"data/wikipedia-{DUMP}.{k.data[10:]}").exists()
    ):
        print(f"data:            {k.data} is not here yet; a run downloads it")
        return 0
    try:
        train, val, sha = open_data(k)
        batches = Batches(train, k, World(0, ranks, torch.device("cpu")))
        print(
            f"data:            {train.total:,} bytes, {val.total:,} to validate; {batches.windows} windows per strip"
        )
        print(f"epochs:          {size * k.num_iterations / train.total:.2f}")
        print(
            f"data_sha256:     {sha}"
            if sha
            else f"files:           {train.pattern} | {val.pattern}"
        )
    except UserError as error:
        print(f"problem:         {error}")
    return 0


class Run:
    """One run: everything checked and built, restored from its newest checkpoint if there is one, and its records."""

    EXTRA = "val_bpc val_bits_per_char half_life_min half_life_median half_life_max plasticity skipped".split()

    def __init__(self, k: Knobs, w: World):
        self.k, self.w, self.bytes = k, w, k.batch_size * k.sequence_length
        plumbing.check_compiler(k.compile, k.device)
        capability = torch.cuda.get_device_capability(w.device) if k.device == "cuda" else None
        self.precision, self.why = choose_precision(k.precision, k.device, capability)
        self.train, self.val, self.data_sha = open_data(k)
        self.batches = Batches(self.train, k, w)
        self.micro = min(k.device_batch_size, self.batches.local)
        if self.batches.local % self.micro:
            raise UserError(
                f"DEVICE_BATCH_SIZE={self.micro} does not divide a rank's {self.batches.local} of "
                f"BATCH_SIZE={k.batch_size} rows; use a divisor"
            )
        initial = check_weights(k.init_from, k) if k.init_from else None
        plumbing.check_results(Path(k.results_file), RESULTS, w)
        run_id = k.run_id or plumbing.new_run_id(w)
        self.log = RunLog(
            Path(k.logs_folder), run_id, w, k.num_iterations, extra=self.EXTRA, unit="bytes"
        )
        self.build(capability, initial)
        self.step, self.clock, self.lrs, self.rate_s = 0, Clock(w), [], math.nan
        self.val_loss = self.best_loss = self.train_loss = self.val_bits_per_char = math.nan
        self.validated_at, self.signal, self.rolled_back, self.skipped, self.told = -1, 0, 0, 0, 0.0
        self.interval = [0.0, 0]  # summed loss and number of steps since the last log line
        self.metrics = {key: [] for key in ("train_bpc", "val_bpc", "steps", "lr", "val_steps")}
        self.states: list[State | None] = [None] * (
            self.batches.local // self.micro
        )  # of each micro-batch's rows
        self.log.header(k, (__file__, plumbing.__file__), self.facts())
        self.log.rates(self.bytes, flops_per_byte(self.model, k))
        self.log.track("" if k.tracker == "off" else k.tracker, "train_scaled", run_id, k)
        self.restore()
        self.log.say(self.half_lives()[0])
        self.micro_step = MicroStep(self.model, k, w, DTYPES[self.precision], self.log.say)
        self.adam.grads.zero_()
        self.saved_at = self.step

    def build(self, capability: tuple[int, int] | None, initial: dict | None) -> None:
        k, w = self.k, self.w
        self.model = ByteLM(k)
        self.n_params = sum(p.numel() for p in self.model.parameters())
        check_disk(self.log.folder, self.n_params, k, w)
        self.model.init_weights(k.seed)
        if initial is not None:
            self.model.load_state_dict(initial)
        self.model.to(w.device)
        self.operator = "chunkwise, fp32 state" if k.memory != "off" else "none"
        if k.fla and k.memory != "off":
            if capability is None or capability < (8, 0) or importlib.util.find_spec("fla") is None:
                raise UserError(
                    f"FLA=1 needs the package fla-core and a GPU of compute capability 8 or more, here {capability}; "
                    f"pip install fla-core, or set FLA=0"
                )
            for block in self.model.blocks:
                block.memory.operator = memory_fla
            self.operator = "fla-core, bf16 products"
        if k.device == "cuda" and self.precision != "fp32":
            torch.set_float32_matmul_precision(
                "high"
            )  # the memory's fp32 products on TF32 cores; its sums stay fp32
        self.adam = AdamW(self.model, k, w)
        self.scaler = LossScale(self.precision == "fp16", w.device)
        self.names = ["loss", *self.adam.params, "gradient norm", "skipped"]

    def facts(self) -> dict[str, object]:
        k, w, local = self.k, self.w, self.batches.local
        split = f"{w.size} rank(s) x {local // self.micro} micro-batch(es) x {self.micro} x {k.sequence_length} bytes"
        scaling = " with loss scaling" if self.scaler.on else ""
        return dict(
            run_id=self.log.id,
            parameters=f"{self.n_params:,}",
            bytes_per_step=f"{self.bytes:,} = {split}",
            precision=f"{self.precision}{scaling} ({self.why}); memory state and decay fp32",
            memory_operator=self.operator,
            data=f"{self.train.total:,} bytes, {self.bytes * k.num_iterations / self.train.total:.2f} epochs, "
            f"validation on {min(self.val.total, k.val_bytes or self.val.total):,}",
            disk=f"up to {disk_need(self.n_params, k) / 2**20:,.0f} MiB of weights and checkpoints at KEEP={k.keep}",
            **({"data_sha256": self.data_sha} if self.data_sha else {}),
        )

    def half_lives(self) -> tuple[str, dict[str, float]]:
        found = self.model.half_lives()
        if found is None:
            return "half_life_patches: no memory", {}
        low, middle, high = found.min().item(), found.median().item(), found.max().item()
        line = (
            f"half_life_patches: min:{low:.4g} median:{middle:.4g} max:{high:.4g} median_by_layer:"
        )
        values = dict(half_life_min=low, half_life_median=middle, half_life_max=high)
        line += ",".join(f"{h:.4g}" for h in found.median(1).values.tolist())
        if (byte_memory := self.model.byte_memory) is not None:
            found = zip(HISTORIES, byte_memory.half_lives().tolist(), strict=True)
            line += " half_life_bytes_by_history:" + ",".join(f"{n}:{h:.0f}" for n, h in found)
        return line, values

    # Restored and saved as they are; with model, optimizer, scaler, states and clock all that the next step depends on.
    KEPT = "step val_loss best_loss train_loss val_bits_per_char validated_at rolled_back skipped interval".split()
    KEPT += ["metrics"]

    def restore(self) -> bool:
        state = plumbing.load_checkpoint(self.log.folder, self.w, self.log.say)
        if state is None:
            return False
        plumbing.check_resume(state, self.k, FREE.split(), self.train, self.log)
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        self.scaler.scale, self.scaler.good = (t.to(self.w.device) for t in state["scaler"])
        if state["states"] is not None:
            local = self.batches.local
            mine = each(
                lambda t: t[self.w.rank * local :][:local].to(self.w.device), state["states"]
            )
            self.states = [
                each(lambda t, at=at: t[at : at + self.micro].clone(), mine)
                for at in range(0, local, self.micro)
            ]
        self.clock = Clock(self.w, *state["clock"])
        for name in self.KEPT:
            setattr(self, name, state[name])
        return True

    def carried(self) -> State | None:
        """The rows' states, of all ranks, in the rows' order; any number of ranks can load them."""
        if self.states[0] is None:
            return None

        def gather(*parts: Tensor) -> Tensor:
            own = torch.cat(parts)
            table = self.w.all_rows(own.flatten().repeat(self.w.size, 1))
            return table.view(self.w.size * len(own), *own.shape[1:]).cpu()

        return each(gather, *self.states)

    def save(self) -> None:
        model = {name: p.detach().cpu().clone() for name, p in self.model.state_dict().items()}
        state = dict(
            model=model,
            adam=self.adam.state_dict(),
            scaler=[self.scaler.scale.cpu(), self.scaler.good.cpu()],
            states=self.carried(),
            clock=[self.clock.timed_s, self.clock.timed_steps],
            tokens=self.step * self.bytes,
            **{name: getattr(self, name) for name in self.KEPT},
            **plumbing.resume_facts(self.k, self.train, self.log),
        )
        self.log.sync()  # a row is on disk before the checkpoint that follows it
        plumbing.save_checkpoint(self.log.folder, self.step, state, self.w, self.k.keep)
        name = f"checkpoint_step_{self.step:04d}.pth"
        self.write_weights(name, ("last_model_scaled.pth",))
        if self.w.main:
            number = lambda p: int(p.stem.rsplit("_", 1)[1])
            for old in sorted(self.log.folder.glob("checkpoint_step_*.pth"), key=number)[
                : -self.k.keep
            ]:
                old.unlink()
        self.saved_at = self.step

    def write_weights(self, name: str, links: tuple[str, ...] = ()) -> None:
        """Weights and knobs as `name` in the run's folder, and under further names: written aside, then renamed."""
        problem, folder = None, self.log.folder
        if self.w.main:
            aside = folder / f".{name}.part"
            try:
                knobs = dataclasses.asdict(self.k)
                weights = {n: p.detach().cpu() for n, p in self.model.state_dict().items()}
                torch.save(
                    dict(model=weights, knobs=knobs, step=self.step, val_loss=self.val_loss), aside
                )
                os.replace(aside, folder / name)
                for link in links:
                    aside.unlink(missing_ok=True)
                    try:
                        os.link(folder / name, aside)
                    except OSError:  # a file system without hard links
                        shutil.copyfile(folder / name, aside)
                    os.replace(aside, folder / link)
            except (
                OSError,
                RuntimeError,
            ) as error:  # torch.save turns a full disk into a RuntimeError
                aside.unlink(missing_ok=True)
                problem = f"{folder / name} could not be written ({error}); free space and resume"
        self.w.agree(problem)

    def write_metrics(self) -> None:
        if self.w.main:
            path, self.told = self.log.folder / "metrics_scaled.json", time.monotonic()
            aside = path.with_suffix(".part")
            aside.write_text(json.dumps(self.metrics, indent=2) + "\n")
            os.replace(aside, path)

    def roll_back(self) -> bool:
        """After a step that was not finite: back to the last checkpoint, once, and on at half the rate."""
        if self.k.on_nan != "rollback" or self.rolled_back:
            return False
        self.lrs, self.states = [], [None] * len(self.states)
        if not self.restore():
            self.log.say("ON_NAN=rollback: there is no checkpoint to go back to")
            return False
        self.rolled_back, self.saved_at = 1, -1
        self.adam.grads.zero_()
        self.log.say(
            f"rolled back to step:{self.step}; the rate is half of the schedule's from here on"
        )
        self.save()  # so that a resume from here on knows of it
        return True

    def hear(self, beat: plumbing.Beat) -> str:
        """Record one finished step; returns the status with which to stop, or ''."""
        if not beat.finite:
            self.log.say(
                f"step:{beat.step} not finite: {beat.culprit(self.names)}; its update was not applied"
            )
            return "nan"
        k, step, lr = self.k, beat.step, self.lrs.pop(0)
        self.train_loss, self.signal = float(beat.values[:, 0].mean()), beat.signal
        norm, skipped = (float(v) for v in beat.values[0, -2:])
        self.skipped += int(skipped)
        self.interval = [self.interval[0] + self.train_loss, self.interval[1] + 1]
        self.rate_s = (
            self.clock.step_s
            if math.isnan(self.rate_s)
            else 0.95 * self.rate_s + 0.05 * self.clock.step_s
        )
        line = ""
        if step % k.log_every == 0 or step == k.num_iterations:
            loss, self.interval = self.interval[0] / self.interval[1], [0.0, 0]
            bpc, eta_h = loss / math.log(2), (k.num_iterations - step) * self.rate_s / 3600
            line = f"step:{step}/{k.num_iterations} loss:{loss:.4f} bpc:{bpc:.4f} lr:{lr:.2e} "
            line += f"bytes_per_s:{self.bytes / self.rate_s:.0f} eta_h:{eta_h:.2f}"
            line += f" overflows_skipped:{self.skipped}" * bool(self.skipped)
            for key, value in zip(("train_bpc", "steps", "lr"), (bpc, step, lr), strict=True):
                self.metrics[key].append(value)
            if time.monotonic() - self.told > 5:
                self.write_metrics()
        own = dict(plasticity=plasticity(step - 1, k)) if k.curriculum else {}
        own |= dict(skipped=self.skipped) if self.scaler.on else {}
        self.log.step(step, self.train_loss, lr, norm, self.clock, line, **own)
        return "preempted" if beat.signal else ""

    def validate(self) -> None:
        k = self.k
        self.model.eval()
        self.val_loss, share = evaluate(self.micro_step, self.val, self.micro, k, self.w)
        self.model.train()
        self.validated_at, bpc = self.step, self.val_loss / math.log(2)
        self.val_bits_per_char = bpc / share if share else math.nan
        line, values = self.half_lives()
        mark = f" val_bpc:{bpc:.4f} val_bits_per_char:{self.val_bits_per_char:.4f}"
        mark += f" data_sha256:{self.data_sha[:12]}" * bool(self.data_sha)
        values |= dict(val_bpc=bpc, val_bits_per_char=self.val_bits_per_char)
        self.log.validation(self.step, self.val_loss, self.clock, mark, **values)
        self.log.say(line)
        self.metrics["val_bpc"].append(bpc)
        self.metrics["val_steps"].append(self.step)
        self.write_metrics()
        if not self.val_loss >= self.best_loss:  # also the first, when best is nan
            self.best_loss = self.val_loss
            self.write_weights("best_model_scaled.pth")

    def close(self, status: str) -> None:
        """Write the status and the results row, whatever way the run ended."""
        k, w, log, clock = self.k, self.w, self.log, self.clock
        self.write_metrics()
        notes = plumbing.notes(k, PRESETS, [*FREE.split(), *IN_COLUMNS.split()])
        notes += [f"data_sha256={self.data_sha[:12]}"] * bool(self.data_sha) + [
            "rolled_back=1"
        ] * self.rolled_back
        row = {name: getattr(k, name) for name in RESULTS if hasattr(k, name)}
        row |= dict(
            run_id=log.id, date=log.started, git_commit=log.commit, window=k.window or "off"
        )
        row |= dict(learning_rate=k.lr, device_batch_size=self.micro, delta_rule=int(k.delta_rule))
        row |= dict(
            carry_state=int(k.carry_state),
            final_val_loss=self.val_loss,
            best_val_loss=self.best_loss,
        )
        row |= dict(
            final_val_bpc=self.val_loss / math.log(2), val_bits_per_char=self.val_bits_per_char
        )
        row |= dict(
            train_time_ms=1000 * clock.train_s(self.step), ms_per_step=1000 * clock.step_avg_s
        )
        row |= dict(
            gpu_name=w.name(),
            n_gpus=w.size * (k.device == "cuda"),
            notes=" ".join(notes),
            status=status,
        )
        row |= dict(
            steps_done=self.step, n_params=self.n_params, tokens_seen=self.step * self.bytes
        )
        row |= dict(
            epochs=round(self.step * self.bytes / self.train.total, 4),
            peak_memory_mib=w.peak_memory_mib(),
        )
        row |= dict(
            torch=torch.__version__,
            world_size=w.size,
            code_sha256=log.code_sha256,
            dirty=int(log.dirty),
        )
        plumbing.append_result(Path(k.results_file), RESULTS, row, w)
        log.close(status, self.step)


# ----------------------------------------------------------------------------
# Training


def update(run: Run, x: Tensor, y: Tensor, pulse: Pulse) -> None:
    """One optimizer step on this rank's rows."""
    k, w, adam, micros = run.k, run.w, run.adam, len(run.states)
    if run.batches.fresh(run.step):
        run.states = [None] * micros
    run.model.plasticity.fill_(plasticity(run.step, k))
    loss, factor = torch.zeros((), device=w.device), run.scaler.scale / micros
    for i, (x_BT, y_BT) in enumerate(zip(x.split(run.micro), y.split(run.micro), strict=True)):
        if (
            k.dropout
        ):  # of the step, the rank and the micro-batch alone: a resume needs no generator's state
            seeds = np.random.SeedSequence([k.seed, run.step, w.rank, i])
            torch.manual_seed(int(seeds.generate_state(1, np.uint32)[0]))
        part, state = run.micro_step.backward(x_BT, y_BT, run.states[i], factor)
        loss, run.states[i] = loss + part / micros, state if k.carry_state else None
    norms, norm = adam.norms() / run.scaler.scale, adam.reduce() / run.scaler.scale
    skipped = run.scaler.skip(norm)
    norms, known = (
        norms.masked_fill(skipped, 0),
        norm.masked_fill(skipped, 0),
    )  # an overflow is no failure
    ok = pulse.send(
        run.step + 1,
        torch.stack([loss, *norms, known, skipped.float()]),
        run.clock.train_s(run.step),
    )
    rate = k.lr * lr_scale(run.step, k) * (0.5 if run.rolled_back else 1.0)
    run.lrs.append(rate)
    adam.step(rate, (k.clip / norm).clamp(max=1.0) / run.scaler.scale, ok & ~skipped)
    run.scaler.update(skipped)


def train(run: Run, k: Knobs, w: World) -> str:
    """The loop. Returns finished, nan or preempted."""
    batches, pulse, status = Prefetch(run.batches.make, run.step, w.device), Pulse(w), ""
    run.clock.start()
    while True:
        # -------- clock stopped: hear of the last step, evaluate, save, leave --------
        status = status or ("finished" if run.step >= k.num_iterations else "")
        due = (
            every and run.step and run.step % every == 0 for every in (k.val_every, k.save_every)
        )
        validate, save = (bool(status or d) for d in due)
        validate = validate and run.validated_at != run.step and status in ("", "finished")
        save = save and run.saved_at != run.step
        if validate or save or status:
            run.clock.stop()
            for beat in pulse.read(keep=0) if status != "nan" else ():
                status = run.hear(beat) or status
            if status == "nan" and run.roll_back():
                batches.close()
                batches, pulse, status = (
                    Prefetch(run.batches.make, run.step, w.device),
                    Pulse(w),
                    "",
                )
                run.clock.start()
                continue
            if validate and status != "nan":
                run.validate()
            if (save or status) and status != "nan" and run.saved_at != run.step:
                run.save()
            if status:
                batches.close()
                return status
            run.clock.start()

        # -------- one optimizer step --------
        update(run, *batches.get(run.step), pulse)
        run.step += 1
        run.clock.tick()
        for (
            beat
        ) in pulse.read():  # of the step before: the host never waits for the one just queued
            status = run.hear(beat) or status


def main() -> int:
    k = plumbing.read_knobs(Knobs, PRESETS, doc=__doc__)
    if k.dry_run:
        return show_plan(k)
    with plumbing.world(k.device, HINT) as w:
        run, status = Run(k, w), "failed"
        try:
            status = train(run, k, w)
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of GPU memory at DEVICE_BATCH_SIZE={run.micro}; lower it, or set RECOMPUTE=1"
            ) from None
        finally:
            run.close(status)
    return {"finished": 0, "nan": 1}.get(status, 128 + run.signal if run.signal else 1)


if __name__ == "__main__":
    launch(main)
