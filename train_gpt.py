"""train_gpt.py -- the 124M-parameter GPT of the 2024-10 speedrun records, with gated attention, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py        8 GPUs, the speedrun baseline
    ATTNGATE=elementwise LR=0.00468 torchrun --standalone --nproc_per_node=8 train_gpt.py
    PRESET=demo python train_gpt.py                              a laptop, a minute, no download
    python train_gpt.py --help                                   every knob; --dry_run shows the plan and stops

Expect   the original study reports val_loss 3.2927 +- 0.0011 (no gate) and 3.2723 +- 0.0011 (elementwise) after 5100
         steps at LR 0.00468, n=3 seeds each, 8x RTX PRO 6000, on 9 shards (2.98 epochs); see docs/experiments.md
Shapes   B sequences, T tokens, C model width, H heads, D head width, F MLP width, V vocabulary, N = B * T tokens,
         S matrices of one shape, R rows; x_BTC has shape (B, T, C)
Units    losses in nats per token; BATCH_SIZE in sequences over all ranks; times in seconds or ms, as the name says
Raises   UserError (one line, exit code 2) for a bad knob, shard, checkpoint or results file, before training starts
Sources  modded-nanogpt records of 2024-10 (K. Jordan et al.): architecture, Muon, token order. Gates: Qiu et al.,
         Gated Attention for LLMs, arXiv 2505.06708. Newton-Schulz: kellerjordan.github.io/posts/muon
Shared   plumbing.py keeps the run alive and accounted for. Everything that can change the loss is in this file.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

VIRTUAL_RANKS = 8  # of DATA_ORDER=record
FINEWEB = HERE / "data/fineweb10B/fineweb"
PRESETS = {
    "speedrun": {},
    # bytes of Python's own documentation: trains to below 2 nats a byte within a minute on two cores
    "demo": dict(
        device="cpu", compile=False, input_bin="embedded", input_val_bin="embedded", vocab_size=256
    )
    | dict(
        n_layer=3, n_head=2, n_embd=128, sequence_length=128, batch_size=32, device_batch_size=16
    )
    | dict(
        num_iterations=400,
        warmdown_iters=200,
        val_every=50,
        val_tokens=65536,
        save_every=50,
        lr=0.01,
    ),
    # GPT-2 tokens on a CPU, at the record's width: one layer, short sequences, small batches
    "tiny": dict(
        device="cpu",
        compile=False,
        n_layer=1,
        sequence_length=128,
        batch_size=16,
        device_batch_size=8,
    )
    | dict(num_iterations=200, warmup_iters=10, warmdown_iters=150, lr=0.003, data_order="stream")
    | dict(val_every=25, val_tokens=16384, save_every=50),
}
# What may differ when a run is resumed: nothing here moves the loss curve.
FREE = "preset device_batch_size epochs_ok val_every early_stop_patience early_stop_min_delta target_loss save_every keep "
FREE += "device compile run_id stage runpod_instance_type logs_folder results_file dry_run"
GATES, POSITIONS = (
    ("none", "headwise", "elementwise", "const"),
    ("sdpa", "value", "key", "query", "output"),
)
ACTIVATIONS, OPTIMIZERS = ("sigmoid", "ns_sigmoid", "silu", "identity"), ("muon", "adam")


@dataclass(frozen=True)
class Knobs:
    preset: str = knob("speedrun", "named set of defaults", choices=tuple(PRESETS))
    # model
    n_layer: int = knob(12, "transformer blocks", low=1)
    n_head: int = knob(6, "attention heads", low=1)
    n_embd: int = knob(768, "model width, channels", low=2)
    vocab_size: int = knob(50304, "token ids, padded", low=2, high=65536)
    attngate: str = knob("none", "gate of the attention", choices=GATES)
    gatepos: str = knob("sdpa", "what the gate multiplies", choices=POSITIONS)
    gateact: str = knob("sigmoid", "the gate's activation", choices=ACTIVATIONS)
    gateopt: str = knob("muon", "optimizer of the gate's weights", choices=OPTIMIZERS)
    mlp_match: bool = knob(
        False, "shrink the MLP until the gated model has the ungated parameter count"
    )
    # batch, in sequences
    batch_size: int = knob(512, "sequences per step, over all ranks", low=1)
    device_batch_size: int | None = knob(
        64, "sequences per micro-batch of a rank", low=1, none="auto"
    )
    sequence_length: int = knob(1024, "tokens per sequence", low=1)
    # schedule, in optimizer steps
    num_iterations: int = knob(5100, "optimizer steps", low=0, alias=("num_iter",))
    warmup_iters: int = knob(0, "steps of linear warm-up", low=0)
    warmdown_iters: int = knob(1450, "steps of linear decay to zero at the end", low=0)
    time_budget_s: float | None = knob(
        None, "training seconds; the schedule runs on time", above=0, none="off"
    )
    # optimizers
    lr: float = knob(
        0.0036, "peak rate of AdamW; Muon's is 0.1 of it", low=0, alias=("learning_rate",)
    )
    seed: int = knob(1337, "initial weights", low=0)
    # data
    input_bin: str = knob(f"{FINEWEB}_train_*.bin", "training shards, or 'embedded'")
    input_val_bin: str = knob(f"{FINEWEB}_val_*.bin", "validation shards, or 'embedded'")
    data_order: str = knob(
        "record", "tokens as the 8-GPU record, or one clean pass", choices=("record", "stream")
    )
    data_seed: int | None = knob(
        None, "shuffles the order of the steps' batches", low=0, none="off"
    )
    epochs_ok: bool = knob(False, "start over when the shards run out")
    # evaluation, stopping, saving
    val_every: int = knob(
        125, "steps between validations, also at step 0 and the last; 0: the last only", low=0
    )
    val_tokens: int = knob(
        10485760, "tokens of a validation, from the first of the shards on", low=1
    )
    early_stop_patience: int = knob(
        0, "validations without improvement until it stops; 0: never", low=0
    )
    early_stop_min_delta: float = knob(
        0.0, "nats by which a validation must improve to count", low=0
    )
    target_loss: float | None = knob(
        None, "log when validation first reaches this, in nats", none="off"
    )
    save_every: int = knob(500, "steps between checkpoints, also at the end; 0: only there", low=0)
    keep: int = knob(2, "checkpoints kept", low=1)
    # the run
    device: str = knob(
        "cuda", "where to train; nothing falls back by itself", choices=("cuda", "cpu")
    )
    compile: bool = knob(True, "torch.compile")
    run_id: str = knob("", "an unfinished run's id resumes it; empty: made once per launch")
    stage: str = knob("", "stage of a study, copied into the results row")
    runpod_instance_type: str = knob("unknown", "copied into the results row")
    logs_folder: str = knob(str(HERE / "logs"), "folder of the run's log, metrics and checkpoints")
    results_file: str = knob(
        str(HERE / "experiments/results.csv"), "file that gets one row per run"
    )
    dry_run: bool = knob(False, "show knobs, sizes and data, and stop")

    def __post_init__(self):
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise ValueError(
                f"N_EMBD={self.n_embd} must be N_HEAD={self.n_head} times an even head width (rotary)"
            )
        if self.warmup_iters + self.warmdown_iters > self.num_iterations > 0:
            raise ValueError(
                f"WARMUP_ITERS={self.warmup_iters} + WARMDOWN_ITERS={self.warmdown_iters} do not fit into "
                f"NUM_ITERATIONS={self.num_iterations}; lower them, or train longer"
            )
        if self.data_order == "record" and self.batch_size % VIRTUAL_RANKS:
            raise ValueError(
                f"BATCH_SIZE={self.batch_size} must divide by 8 in DATA_ORDER=record, which has 8 virtual ranks; "
                f"choose a multiple of 8, or DATA_ORDER=stream"
            )
        if self.val_tokens % self.sequence_length:
            raise ValueError(
                f"VAL_TOKENS={self.val_tokens} must be a multiple of SEQUENCE_LENGTH={self.sequence_length}"
            )
        if (self.input_bin == "embedded") != (self.input_val_bin == "embedded"):
            raise ValueError(
                "INPUT_BIN=embedded and INPUT_VAL_BIN=embedded go together; set both or neither"
            )

    @property
    def gate_rows(self) -> int:
        """Rows of the gate's weight matrix (R, C); 0 where the gate is none or input-independent."""
        return {"headwise": self.n_head, "elementwise": self.n_embd}.get(self.attngate, 0)

    @property
    def gate_stacked(self) -> bool:
        """Whether the gate's rows live in the stacked QKV matrix. A gate for AdamW cannot: its owner differs."""
        return self.gate_rows > 0 and self.gateopt == "muon"

    @property
    def mlp_width(self) -> int:
        gate = self.n_embd if self.attngate == "const" else self.gate_rows * self.n_embd
        return 4 * self.n_embd - (math.ceil(gate / (2 * self.n_embd)) if self.mlp_match else 0)


# ----------------------------------------------------------------------------
# Model


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(T: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, D/2), rounded to bf16 as the record's are. Su et al., arXiv 2104.09864; half-split layout."""
    angle = torch.outer(torch.arange(T).float(), 1.0 / 10000 ** (torch.arange(0, D, 2).float() / D))
    return angle.cos().bfloat16()[:, None], angle.sin().bfloat16()[:, None]


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_BTHD.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x_BTHD)


def activate(z: Tensor, name: str) -> Tensor:
    if name == "sigmoid":
        return torch.sigmoid(z)
    if name == "ns_sigmoid":  # "non-sparse": between a half and one
        return 0.5 + 0.5 * torch.sigmoid(z)
    return F.silu(z) if name == "silu" else z


class Attention(nn.Module):
    """Causal attention; Q, K, V and the gate's logits come from one matrix, `qkvg` (3C + R, C), and one GEMM.

    The gate reads the same normalised block input as Q, K and V, and multiplies the attention output per head (sdpa, G1
    of arXiv 2505.06708), V (G2), K (G3), Q (G4) or the projected output (output, G5). K and Q are gated after their
    RMSNorm, which would undo a headwise gate.
    """

    def __init__(self, k: Knobs):
        super().__init__()
        self.k, C = k, k.n_embd
        self.qkvg = nn.Parameter(torch.empty(3 * C + k.gate_stacked * k.gate_rows, C))
        self.proj = nn.Parameter(torch.empty(C, C))
        if k.attngate == "const":
            self.gate = nn.Parameter(torch.empty(k.n_head, C // k.n_head))
        elif k.gate_rows and not k.gate_stacked:
            self.gate = nn.Parameter(torch.empty(k.gate_rows, C))

    def gate_BTHD(self, x_BTC: Tensor, z_BTR: Tensor) -> Tensor:
        """The gate, broadcastable to (B, T, H, D); z_BTR are the stacked matrix's rows beyond Q, K and V."""
        B, T, _ = x_BTC.shape
        if self.k.attngate == "const":
            z = self.gate
        else:
            z = z_BTR if self.k.gate_stacked else F.linear(x_BTC, self.gate)
            z = z.view(B, T, self.k.n_head, -1)
        return activate(z, self.k.gateact)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor, cache: list | None = None) -> Tensor:
        B, T, C = x_BTC.shape
        w, heads = self.qkvg, (B, T, self.k.n_head, -1)
        rows = len(w)
        if rows % 8:  # tensor cores want 16-byte rows of output; six gate rows are padded to eight
            w = F.pad(w, (0, 0, 0, -rows % 8))
        qkv, z_BTR = F.linear(x_BTC, w)[..., :rows].split([3 * C, rows - 3 * C], dim=-1)
        q, k, v = (t.view(heads) for t in qkv.split(C, dim=-1))
        q, k = rms_norm(rotate(q, cos, sin)), rms_norm(rotate(k, cos, sin))
        at = self.k.gatepos if self.k.attngate != "none" else ""
        gate = self.gate_BTHD(x_BTC, z_BTR).type_as(v) if at else None
        q, k, v = (
            t * gate if at == name else t for t, name in ((q, "query"), (k, "key"), (v, "value"))
        )
        if (
            cache is not None
        ):  # generation: keys and values of the tokens before, and then one token at a time
            assert not cache or T == 1, "several tokens behind a cache would need a mask"
            k, v = (
                (torch.cat([past, new], 1) for past, new in zip(cache, (k, v), strict=True))
                if cache
                else (k, v)
            )
            cache[:] = k, v
        y = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=T == k.size(1)
        )
        y = y.transpose(1, 2)
        y = F.linear((y * gate if at == "sdpa" else y).reshape(B, T, C), self.proj)
        return (y.view(heads) * gate.type_as(y)).view(B, T, C) if at == "output" else y


class Block(nn.Module):
    """Pre-norm residual block with a relu^2 MLP (So et al., Primer, arXiv 2109.08668)."""

    def __init__(self, k: Knobs):
        super().__init__()
        self.attn = Attention(k)
        self.up = nn.Parameter(torch.empty(k.mlp_width, k.n_embd))
        self.down = nn.Parameter(torch.empty(k.n_embd, k.mlp_width))

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor, cache: list | None = None) -> Tensor:
        x_BTC = x_BTC + self.attn(rms_norm(x_BTC), cos, sin, cache)
        return x_BTC + F.linear(F.linear(rms_norm(x_BTC), self.up).relu().square(), self.down)


class GPT(nn.Module):
    """Decoder-only transformer with one matrix, `wte`, for embedding and head; no biases, no learned norms."""

    def __init__(self, k: Knobs):
        super().__init__()
        self.k = k
        self.wte = nn.Parameter(torch.empty(k.vocab_size, k.n_embd))
        self.blocks = nn.ModuleList(Block(k) for _ in range(k.n_layer))
        cos, sin = rotary_tables(k.sequence_length, k.n_embd // k.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """nn.Linear's default bounds, zeros for the output projections and the constant gate. Each matrix has its own
        generator, made of seed and name: a gate, or another MLP width, moves no other tensor."""
        for name, p in self.named_parameters():
            if name.endswith(("proj", "down")) or (
                self.k.attngate == "const" and name.endswith("gate")
            ):
                p.zero_()
                continue
            names = [name.replace("qkvg", part) for part in ("q", "k", "v", "gate")]
            for own, weight in zip(names, matrices(name, p, self.k), strict=False):
                digest = hashlib.sha256(f"{seed} {own}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                bound = weight.size(1) ** -0.5
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, x_BTC: Tensor, cache: list[list] | None = None) -> Tensor:
        """The trunk: embedded tokens to what the head reads, (B, T, C). With a cache (one list per block, empty at
        first), x continues what it holds."""
        t0 = cache[0][0].size(1) if cache and cache[0] else 0
        cos, sin = self.cos[t0 : t0 + x_BTC.size(1)], self.sin[t0 : t0 + x_BTC.size(1)]
        for i, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, cos, sin, None if cache is None else cache[i])
        return rms_norm(x_BTC)

    def logits(self, x_BT: Tensor, cache: list[list] | None = None) -> Tensor:
        """(B, T, V) in fp32, for generation and tests; training never forms all of them."""
        return F.linear(self(F.embedding(x_BT, self.wte), cache), self.wte).float()


def matrices(name: str, p: Tensor, k: Knobs) -> tuple[Tensor, ...]:
    """The matrices that a parameter stacks, as views: Muon orthogonalises each by itself."""
    return p.split(k.n_embd) if name.endswith("qkvg") else (p,)


# Rows of logits at a time. On a CPU, bf16 logits of 256 rows stay in the cache's reach; a GPU wants enough to fill it.
LOSS_ROWS = {"cpu": 256, "cuda": 8192}


def softmax_rows(logits_NV: Tensor, y_N: Tensor, e_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fills e = exp(l - max); of each row: its loss, s = sum(e), and s * d loss / d l_y, which is exact where e_y is
    nearly s. One exp per logit: whoever needs the probabilities divides by s on the narrow side of a product."""
    top = logits_NV.amax(-1, keepdim=True).float()
    e = (logits_NV.float() - top).exp()
    s = e.sum(-1, keepdim=True)
    target = logits_NV.gather(-1, y_N[:, None]).float() - top
    e_NV.copy_(e)
    return s.log() - target, s, target.exp() - s


def softmax_blocks(logits_NV: Tensor, y_N: Tensor, e_NV: Tensor) -> tuple[Tensor, ...]:
    """softmax_rows without a compiler, in blocks whose fp32 copies a CPU's allocator keeps instead of mapping anew."""
    blocks = zip(logits_NV.split(64), y_N.split(64), e_NV.split(64), strict=True)
    return tuple(map(torch.cat, zip(*(softmax_rows(*block) for block in blocks), strict=True)))


def add_to(total: Tensor, part: Tensor) -> None:
    total.add_(part)  # compiled: eager would first make an fp32 copy of a bf16 part


class MicroStep:
    """Loss and gradients of a micro-batch. The trunk is compiled as one graph; the tied matrix, a third of the FLOPs,
    is handled around it by hand: cross-entropy in row chunks, gradients formed while a chunk's logits exist, summed in
    fp32 right in `wte.grad`, in buffers that are kept. The (N, V) logits, 13 GB at full size, never exist, and a CPU
    saves the page faults of allocating them."""

    def __init__(self, model: GPT, k: Knobs, w: World, dtype: torch.dtype = torch.bfloat16):
        self.model, self.w, self.dtype = model, w, dtype
        wrap = partial(torch.compile, dynamic=False) if k.compile else lambda f: f
        self.trunk, self.add_to = wrap(model), wrap(add_to)
        self.softmax_rows = (
            wrap(softmax_rows) if k.compile or k.device == "cuda" else softmax_blocks
        )
        self.rows = max(
            LOSS_ROWS[w.device.type], k.n_embd
        )  # of logits, so that their buffer also holds a chunk's dW
        self.wte = torch.empty_like(model.wte, dtype=self.dtype)
        self.buffers = torch.empty(2, self.rows, k.vocab_size, dtype=self.dtype, device=w.device)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """The tied matrix has changed: cast it, once per optimizer step."""
        self.wte.copy_(self.model.wte)

    def hidden(self, x_BT: Tensor) -> tuple[Tensor, Tensor]:
        x_BTC = F.embedding(x_BT, self.model.wte.detach()).requires_grad_(torch.is_grad_enabled())
        with torch.autocast(
            self.w.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        ):
            return x_BTC, self.trunk(x_BTC).flatten(0, 1).to(self.dtype)

    def chunks(self, h_NC: Tensor, y_N: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Of each chunk of rows: their slice, e, loss, s and s * d loss / d l_y."""
        for start in range(0, len(h_NC), self.rows):
            part = slice(start, min(start + self.rows, len(h_NC)))
            logits, e = self.buffers[:, : part.stop - start]
            torch.mm(h_NC[part], self.wte.T, out=logits)
            yield part, e, *self.softmax_rows(logits, y_N[part], e)

    def backward(self, x_BT: Tensor, y_BT: Tensor, share: float) -> Tensor:
        """Mean loss in nats, fp32; adds `share` times its gradient to every parameter's."""
        x_BTC, h_NC = self.hidden(x_BT)
        h, y_N, losses = h_NC.detach(), y_BT.flatten(), []
        dh = torch.empty_like(h)
        for part, e, loss, s, d_target in self.chunks(h, y_N):
            e[torch.arange(len(e), device=e.device), y_N[part]] = d_target[:, 0].to(e.dtype)
            scale = share / (s * len(h))
            torch.mul(e @ self.wte, scale, out=dh[part])
            dw = (
                self.buffers[0].flatten()[: self.wte.numel()].view_as(self.wte)
            )  # this chunk's logits are done with
            self.add_to(self.model.wte.grad, torch.mm(e.T, (h[part] * scale).to(e.dtype), out=dw))
            losses.append(loss)
        h_NC.backward(dh)
        self.model.wte.grad.index_add_(0, x_BT.flatten(), x_BTC.grad.flatten(0, 1))
        return torch.cat(losses).mean()

    @torch.no_grad()
    def loss_sum(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        """Summed loss over the targets that are not -1, in nats; no gradients."""
        _, h_NC = self.hidden(x_BT)
        y_N = y_BT.flatten()
        losses = torch.cat([loss[:, 0] for _, _, loss, *_ in self.chunks(h_NC, y_N.clamp(min=0))])
        return losses.where(y_N >= 0, 0).double().sum()


# ----------------------------------------------------------------------------
# Optimizers


def newton_schulz(g_SMN: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly, of S matrices at once, in bf16. The quintic iteration with Jordan's
    coefficients in gram form: X <- aX + (bA + cA^2)X with A = XX^T, a sixth fewer FLOPs than the record's order."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g_SMN.bfloat16()
    if tall := x.size(1) > x.size(2):
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """MomentUm Orthogonalized by Newton-schulz (K. Jordan et al. 2024), sharded over ranks.

    Every rank owns whole parameters, shared out by the cost of their Newton-Schulz. Gradients live in one buffer
    (W, row), row r holding rank r's parameters, so that one reduce-scatter brings each owner its mean gradients; the
    owner keeps their momentum and makes their updates, and one bf16 all-gather brings those to everybody.
    """

    def __init__(self, params: dict[str, nn.Parameter], k: Knobs, w: World, momentum: float = 0.95):
        self.params, self.k, self.w, self.momentum = params, k, w, momentum
        loads, ends, self.places = [0] * w.size, [0] * w.size, {}
        for name in sorted(params, key=self.cost, reverse=True):
            rank = loads.index(min(loads))
            loads[rank] += self.cost(name)
            self.places[name] = (rank, ends[rank])
            ends[rank] += (
                -(-params[name].numel() // 64) * 64
            )  # every parameter starts on its own cache line
        self.grads = torch.zeros(w.size, max(ends), device=w.device)
        self.updates = torch.zeros(w.size, max(ends), device=w.device, dtype=torch.bfloat16)
        self.buffer = torch.zeros(max(ends), device=w.device)
        for name, p in params.items():
            p.grad = self.cut(self.grads, name)
        self.own = [name for name in params if self.places[name][0] == w.rank]

    def cost(self, name: str) -> int:
        """FLOPs of a Newton-Schulz step of parameter `name`, halved."""
        shapes = [sorted(m.shape) for m in matrices(name, self.params[name], self.k)]
        return sum(m * m * (2 * n + m) for m, n in shapes)

    def cut(self, table: Tensor, name: str) -> Tensor:
        """The place of parameter `name` in a (W, row) table or, of a parameter of this rank's, in its row."""
        rank, start = self.places[name]
        row = table if table.dim() == 1 else table[rank]
        return row[start : start + self.params[name].numel()].view_as(self.params[name])

    def reduce(self) -> dict[str, Tensor]:
        """Mean over ranks of the owned gradients; returns their norms, by name."""
        self.w.mean_scatter(self.grads)
        owned = [self.cut(self.grads, name) for name in self.own]
        return dict(zip(self.own, torch._foreach_norm(owned) if owned else [], strict=True))

    @torch.no_grad()
    def step(self, lr: float, ok: Tensor) -> None:
        """One update; nothing moves when the device flag `ok` is down."""
        grad = self.grads[self.w.rank]
        self.buffer.mul_(self.momentum).add_(grad)
        nesterov = grad.add_(self.buffer, alpha=self.momentum)
        by_shape: dict[tuple, list] = {}
        for name in self.own:
            ins, outs = (
                matrices(name, self.cut(t, name), self.k) for t in (nesterov, self.updates)
            )
            for d, out in zip(ins, outs, strict=True):
                if d.size(0) > d.size(1):  # tall ones join their wide siblings' batch
                    d, out = d.mT, out.mT
                by_shape.setdefault(tuple(d.shape), []).append((d, out))
        for pairs in by_shape.values():
            found = newton_schulz(torch.stack([d.bfloat16() for d, _ in pairs])).masked_fill_(
                ~ok, 0
            )
            torch._foreach_copy_([out for _, out in pairs], list(found.unbind()))
        self.w.all_rows(self.updates)
        for name, p in self.params.items():
            scale = max(matrices(name, p, self.k)[0].shape) ** 0.5
            p.add_(self.cut(self.updates, name), alpha=-lr * scale)

    def state_dict(self) -> dict[str, Tensor]:
        """Momentum of all parameters, by name, gathered from their owners: any number of ranks can load it."""
        table = self.w.all_rows(self.buffer.repeat(self.w.size, 1))
        return {name: self.cut(table, name).cpu().clone() for name in self.params}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in self.own:
            self.cut(self.buffer, name).copy_(state[name])


class AdamW:
    """torch's fused AdamW on this rank's row of a table (W, part) that holds its parameters end to end: gradients are
    reduce-scattered, the updated rows all-gathered, and the moments are held once over all ranks."""

    def __init__(self, params: dict[str, nn.Parameter], w: World):
        self.params, self.w = params, w
        part = -(-sum(p.numel() for p in params.values()) // w.size)
        self.data, self.grads = (torch.zeros(w.size, part, device=w.device) for _ in range(2))
        for name, p in params.items():
            p.data = self.views(self.data)[name].copy_(p.data)
            p.grad = self.views(self.grads)[name]
        self.mine = nn.Parameter(self.data[w.rank])
        self.mine.grad = self.grads[w.rank]
        self.adam = torch.optim.AdamW(
            [self.mine], lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def views(self, table: Tensor) -> dict[str, Tensor]:
        """The parameters' places in a (W, part) table, in their shapes."""
        sizes = [p.numel() for p in self.params.values()]
        parts = table.view(-1)[: sum(sizes)].split(sizes)
        return {
            name: part.view_as(p)
            for part, (name, p) in zip(parts, self.params.items(), strict=True)
        }

    def reduce(self) -> dict[str, Tensor]:
        """Mean over ranks of this rank's part of the gradients; returns its norm under the first name."""
        self.w.mean_scatter(self.grads)
        return {next(iter(self.params)): self.mine.grad.norm()}

    @torch.no_grad()
    def step(self, lr: float, ok: Tensor) -> None:
        """One update; nothing moves when the device flag `ok` is down."""
        self.adam.param_groups[0]["lr"] = lr
        self.adam.found_inf = (~ok).float()
        self.adam.step()
        self.w.all_rows(self.data)

    def state_dict(self) -> dict:
        """Moments of all parameters, by name, and the number of updates."""
        state, out = self.adam.state.get(self.mine, {}), {}
        for key in ("exp_avg", "exp_avg_sq"):
            rows = self.w.all_rows(
                state.get(key, torch.zeros_like(self.mine)).detach().repeat(self.w.size, 1)
            )
            out[key] = {name: view.cpu().clone() for name, view in self.views(rows).items()}
        return out | dict(step=float(state.get("step", 0.0)))

    def load_state_dict(self, state: dict) -> None:
        moments = dict(step=torch.tensor(state["step"], device=self.w.device))
        for key in ("exp_avg", "exp_avg_sq"):
            rows = torch.zeros_like(self.data)
            for name, view in self.views(rows).items():
                view.copy_(state[key][name])
            moments[key] = rows[self.w.rank].clone()
        self.adam.state[self.mine] = moments


def make_optimizers(model: GPT, k: Knobs, w: World) -> tuple[AdamW, Muon]:
    """AdamW for the tied matrix (and the gate, with GATEOPT=adam), Muon for every other matrix of the blocks."""
    params = dict(model.named_parameters())
    adam = [n for n in params if n == "wte" or (k.gateopt == "adam" and n.endswith("gate"))]
    return AdamW({n: params[n] for n in adam}, w), Muon(
        {n: p for n, p in params.items() if n not in adam}, k, w
    )


# ----------------------------------------------------------------------------
# Schedules


def lr_scale(step: float, k: Knobs) -> float:
    """Trapezoid: up to 1 over the first WARMUP_ITERS updates, 1, then down over the last WARMDOWN_ITERS; update `step`
    counts from 0. A fractional step comes from TIME_BUDGET_S. With a warmdown, 0 at and after NUM_ITERATIONS."""
    up = (step + 1) / k.warmup_iters if k.warmup_iters else 1.0
    down = (k.num_iterations - step) / k.warmdown_iters if k.warmdown_iters else 1.0
    return max(0.0, min(up, 1.0, down))


# ----------------------------------------------------------------------------
# Batches


class Batches:
    """Which tokens each step trains on: a pure function of the step, whatever the number of ranks.

    stream: one clean pass over the shards, end to end. record: what the 8-GPU record of 2024-10 trains on, quirks
    included: each of 8 virtual ranks strides through a shard by itself and leaves it when less than a whole batch is
    left after its own position (so ranks 6 and 7 leave FineWeb's shards one batch early), and the first batch is used
    twice. With DATA_SEED the order of the batches is shuffled, anew in each epoch.
    """

    def __init__(self, shards: TokenShards, k: Knobs, w: World):
        self.shards, self.k, self.w = shards, k, w
        self.order = lru_cache(maxsize=2)(self._order)
        tokens = k.batch_size * k.sequence_length
        if k.data_order == "stream":
            self.counts = None
            self.epoch_steps = (shards.total - 1) // tokens
        else:
            span = tokens // VIRTUAL_RANKS
            short = next(
                (p for p, n in zip(shards.paths, shards.lengths, strict=True) if n < tokens + 1),
                None,
            )
            if short:
                raise UserError(
                    f"{short}: {min(shards.lengths):,} tokens, a batch in record order takes {tokens + 1:,}; "
                    f"use larger shards, a smaller BATCH_SIZE, or DATA_ORDER=stream"
                )
            # batches that virtual rank v takes from each shard, summed up: (8, shards + 1)
            counts = [
                [max(1, (n - 1 - tokens - v * span) // tokens + 1) for n in shards.lengths]
                for v in range(VIRTUAL_RANKS)
            ]
            self.counts = np.cumsum(np.pad(counts, ((0, 0), (1, 0))), axis=1)
            self.epoch_steps = int(self.counts[:, -1].min())
        # Steps fed without starting over; the record's first batch counts twice.
        self.steps = self.epoch_steps + (k.data_order == "record")

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.k.data_seed, epoch]).permutation(self.epoch_steps)

    def starts(self, step: int) -> list[int]:
        """Stream positions at which the batch's equal spans of sequences begin: 8 spans in record order, else 1."""
        tokens = self.k.batch_size * self.k.sequence_length
        i = max(0, step - 1) if self.counts is not None else step
        if self.k.data_seed is not None:
            i = int(self.order(i // self.epoch_steps)[i % self.epoch_steps])
        if self.counts is None:
            return [i % self.epoch_steps * tokens]
        found = []
        for v, ends in enumerate(self.counts):
            own = i % int(ends[-1])
            shard = int(np.searchsorted(ends, own, "right")) - 1
            found.append(
                self.shards.starts[shard]
                + (own - int(ends[shard])) * tokens
                + v * tokens // VIRTUAL_RANKS
            )
        return found

    def make(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the step, (B_local, T) int32."""
        starts, T = self.starts(step), self.k.sequence_length
        local, per_span = self.k.batch_size // self.w.size, self.k.batch_size // len(starts)
        at, end, x, y = self.w.rank * local, (self.w.rank + 1) * local, [], []
        while at < end:
            span, offset = divmod(at, per_span)
            n = min(per_span - offset, end - at)
            tokens = self.shards.read(starts[span] + offset * T, n * T + 1).astype(np.int32)
            x.append(tokens[:-1].reshape(n, T))
            y.append(tokens[1:].reshape(n, T))
            at += n
        return torch.from_numpy(np.concatenate(x)), torch.from_numpy(np.concatenate(y))

    def last_token(self, steps: int) -> int | None:
        """Stream position after the last token that `steps` steps read; None for all of them."""
        if self.k.data_seed is not None or steps > self.steps:
            return None
        return max(self.starts(max(steps - 1, 0))) + self.k.batch_size * self.k.sequence_length + 1


# ----------------------------------------------------------------------------
# Evaluation


def evaluate(step: MicroStep, val: TokenShards, micro: int, k: Knobs, w: World) -> float:
    """Mean loss of the first VAL_TOKENS validation tokens: the same tokens for every world size and micro-batch. The
    last micro-batch is filled up with targets of -1, which do not count, so that the model meets one shape only."""
    T, total = k.sequence_length, k.val_tokens // k.sequence_length
    lo, hi = total * w.rank // w.size, total * (w.rank + 1) // w.size
    loss = torch.zeros((), device=w.device, dtype=torch.float64)
    for at in range(lo, hi, micro):
        n = min(micro, hi - at)
        tokens = torch.from_numpy(val.read(at * T, n * T + 1).astype(np.int64)).to(w.device)
        pad = lambda t, fill: F.pad(t.view(n, T), (0, 0, 0, micro - n), value=fill)  # noqa: B023
        loss += step.loss_sum(pad(tokens[:-1], 0), pad(tokens[1:], -1))
    return w.sum(loss).item() / (total * T)


# ----------------------------------------------------------------------------
# Build

HINT = "set DEVICE=cpu; PRESET=demo and PRESET=tiny are sizes that make that sensible"
RESULTS = (  # the original study's columns, in its order, then ours
    "run_id date git_commit seed attn_gate gate_pos gate_act learning_rate batch_size device_batch_size "
    "sequence_length num_iterations warmdown_iters final_val_loss best_val_loss train_time_ms ms_per_step gpu_name "
    "n_gpus runpod_instance notes stage status steps_done warmup_iters n_params tokens_seen epochs peak_memory_mib "
    "torch world_size code_sha256 dirty"
).split()
IN_COLUMNS = "seed attngate gatepos gateact lr batch_size sequence_length num_iterations warmup_iters warmdown_iters"


def flops_per_token(model: GPT, k: Knobs) -> int:
    """Model FLOPs of forward and backward, for MFU: 6 per weight of a matrix product (the tied matrix counts once, as
    the head), and attention counted causal: 6 * n_layer * T * C."""
    weights = sum(
        p.numel()
        for name, p in model.named_parameters()
        if not (k.attngate == "const" and name.endswith("gate"))
    )
    return 6 * weights + 6 * k.n_layer * k.sequence_length * k.n_embd


def memory_mib(n_params: int, sequences: int, k: Knobs) -> int:
    """Rough peak of a rank: weights, gradients, moments, updates, activations of a micro-batch, chunks of logits."""
    state = n_params * (4 + 4 + 4 + 2) + k.vocab_size * (k.n_embd * 6 + LOSS_ROWS[k.device] * 4)
    saved = sequences * k.sequence_length * k.n_layer * (30 * k.n_embd + 6 * k.mlp_width)
    return (state + saved) // 2**20


def micro_batch(step: MicroStep, k: Knobs, w: World) -> int:
    """DEVICE_BATCH_SIZE as it will be used: a divisor of the rank's part of the batch. 'auto' is the largest whose
    step fits; it changes memory and speed, not the training. Raises UserError when the batch does not divide."""
    local = k.batch_size // w.size
    if k.batch_size % w.size:
        raise UserError(
            f"BATCH_SIZE={k.batch_size} does not divide among {w.size} ranks; change one of the two"
        )
    if k.device_batch_size is not None:
        micro = min(k.device_batch_size, local)
        if local % micro:
            raise UserError(
                f"DEVICE_BATCH_SIZE={micro} does not divide a rank's {local} of BATCH_SIZE={k.batch_size} sequences; "
                f"use a divisor, or auto"
            )
        return micro

    def attempt(micro: int) -> None:
        tokens = torch.zeros(micro, k.sequence_length, dtype=torch.long, device=w.device)
        step.backward(tokens, tokens, 1.0)

    n_params = sum(p.numel() for p in step.model.parameters())
    return plumbing.largest_that_fits(
        local, attempt, lambda micro: memory_mib(n_params, micro, k), w
    )


def open_data(k: Knobs) -> tuple[TokenShards, TokenShards, str]:
    """Training shards, validation shards, and the SHA-256 of the embedded corpus ('' for other data)."""
    train, val, sha = k.input_bin, k.input_val_bin, ""
    if k.input_bin == "embedded":
        if k.vocab_size < 256:
            raise UserError(
                f"INPUT_BIN=embedded is made of bytes; VOCAB_SIZE={k.vocab_size} must be at least 256"
            )
        train, val, sha = plumbing.embedded_corpus(HERE / "data")
    found = TokenShards(train), TokenShards(val)
    if found[1].total < k.val_tokens + 1:
        raise UserError(
            f"{val}: {found[1].total:,} tokens, VAL_TOKENS={k.val_tokens:,} needs one more; lower it, or get more"
        )
    return *found, sha


def check_steps(batches: Batches, k: Knobs) -> None:
    if batches.epoch_steps < 1 or (k.num_iterations > batches.steps and not k.epochs_ok):
        raise UserError(
            f"{len(batches.shards.paths)} shard(s) match {batches.shards.pattern}; their "
            f"{batches.shards.total:,} tokens feed {batches.steps} steps, NUM_ITERATIONS={k.num_iterations}; download "
            f"more, lower NUM_ITERATIONS, or set EPOCHS_OK=1 to start over when they run out"
        )


def show_plan(k: Knobs) -> int:
    """--dry_run: what would be trained, on what. Needs neither GPU nor data."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    with torch.device("meta"):
        model = GPT(k)
    n_params, tokens = sum(p.numel() for p in model.parameters()), k.batch_size * k.sequence_length
    micro = min(k.device_batch_size or 1, k.batch_size // ranks)
    print(knobs_json(k))
    print(f"parameters:      {n_params:,}")
    print(
        f"tokens per step: {tokens:,} ({ranks} rank(s), micro-batch {k.device_batch_size or 'auto'})"
    )
    print(f"training tokens: {tokens * k.num_iterations:,} in {k.num_iterations} steps")
    print(f"compute:         {flops_per_token(model, k) * tokens * k.num_iterations:.3g} FLOPs")
    print(
        f"memory:          about {memory_mib(n_params, micro, k):,} MiB per rank at micro-batch {micro}"
    )
    try:
        train, _, sha = open_data(k)
        batches = Batches(train, k, World(0, ranks, torch.device("cpu")))
        epochs = k.num_iterations / max(batches.epoch_steps, 1)
        print(
            f"data:            {train.total:,} tokens in {len(train.paths)} shard(s) feed {batches.steps} steps"
        )
        print(f"epochs:          {epochs:.2f}")
        print(f"data_sha256:     {sha}" if sha else f"shard gaps:      {train.gaps() or 'none'}")
        check_steps(batches, k)
    except UserError as error:
        print(f"problem:         {error}")
    return 0


class Run:
    """One run: everything checked and built, restored from its newest checkpoint if there is one, and its records."""

    def __init__(self, k: Knobs, w: World):
        self.k, self.w, self.tokens = k, w, k.batch_size * k.sequence_length
        plumbing.check_compiler(k.compile, k.device)
        self.train, self.val, self.data_sha = open_data(k)
        self.batches = Batches(self.train, k, w)
        check_steps(self.batches, k)
        plumbing.check_results(Path(k.results_file), RESULTS, w)
        self.log = RunLog(
            Path(k.logs_folder), k.run_id or plumbing.new_run_id(w), w, k.num_iterations
        )
        self.train.check_ids(k.vocab_size, w, self.batches.last_token(k.num_iterations))
        self.val.check_ids(k.vocab_size, w, k.val_tokens + 1)

        self.model = GPT(k)
        self.model.init_weights(k.seed)
        self.model.to(w.device)
        self.n_params = sum(p.numel() for p in self.model.parameters())
        self.adam, self.muon = make_optimizers(self.model, k, w)
        self.names = [*self.adam.params, *self.muon.params]
        if k.compile and k.device == "cuda":
            from torch._inductor import config  # imported where it is used: it costs a second

            config.coordinate_descent_tuning = True  # the record's only compiler setting
        self.micro_step = MicroStep(self.model, k, w)
        self.micro = micro_batch(self.micro_step, k, w)
        self.zero_grad()

        self.step, self.clock, self.spent_s, self.lrs = 0, Clock(w), 0.0, []
        self.val_loss = self.best_loss = self.train_loss = math.nan
        self.validated_at, self.misses, self.reached, self.signal = -1, 0, "", 0
        self.log.header(k, (__file__, plumbing.__file__), self.facts())
        self.log.rates(self.tokens, flops_per_token(self.model, k))
        self.restore()
        self.saved_at = self.step

    def facts(self) -> dict[str, object]:
        k, w, local = self.k, self.w, self.k.batch_size // self.w.size
        split = f"{w.size} rank(s) x {local // self.micro} micro-batch(es) x {self.micro} x {k.sequence_length}"
        set_but_unused = (k.gatepos, k.gateact) != ("sdpa", "sigmoid")
        epochs = f"{k.num_iterations / self.batches.epoch_steps:.2f} epochs"
        return dict(
            run_id=self.log.id,
            parameters=f"{self.n_params:,}",
            tokens_per_step=f"{self.tokens:,} = {split}",
            data=f"{self.train.total:,} tokens, {len(self.train.paths)} shard(s), {epochs}, {k.data_order} order",
            **({"data_sha256": self.data_sha} if self.data_sha else {}),
            **(
                {"ignored": "GATEPOS and GATEACT, because ATTNGATE=none"}
                if k.attngate == "none" and set_but_unused
                else {}
            ),
            **(
                {"shard_gaps": f"missing from the numbering: {gaps}"}
                if (gaps := self.train.gaps())
                else {}
            ),
        )

    def zero_grad(self) -> None:
        self.adam.grads.zero_()
        self.muon.grads.zero_()

    # Restored and saved as they are; with model, optimizers and clock they are all that the next step depends on.
    KEPT = "step val_loss best_loss train_loss validated_at misses reached spent_s".split()

    def restore(self) -> None:
        state = plumbing.load_checkpoint(self.log.folder, self.w, self.log.say)
        if state is None:
            return
        plumbing.check_resume(state, self.k, FREE.split(), self.train, self.log)
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        self.muon.load_state_dict(state["muon"])
        torch.set_rng_state(state["rng"])
        self.micro_step.refresh()
        self.clock = Clock(self.w, *state["clock"])
        for name in self.KEPT:
            setattr(self, name, state[name])

    def save(self) -> None:
        state = dict(
            model={name: p.detach().cpu().clone() for name, p in self.model.state_dict().items()}
            if self.w.main
            else None,
            adam=self.adam.state_dict(),
            muon=self.muon.state_dict(),
            rng=torch.get_rng_state(),
            clock=[self.clock.timed_s, self.clock.timed_steps],
            tokens=self.step * self.tokens,
            **{name: getattr(self, name) for name in self.KEPT},
            **plumbing.resume_facts(self.k, self.train, self.log),
        )
        self.log.sync()  # a row is on disk before the checkpoint that follows it
        plumbing.save_checkpoint(self.log.folder, self.step, state, self.w, self.k.keep)
        self.saved_at = self.step

    def hear(self, beat: plumbing.Beat) -> str:
        """Record one finished step; returns the status with which to stop, or ''."""
        if not beat.finite:
            self.log.say(
                f"step:{beat.step} not finite: {beat.culprit(['loss', *self.names])}; its update was not applied"
            )
            return "nan"
        self.train_loss, self.spent_s, self.signal = (
            float(beat.values[:, 0].mean()),
            beat.clock,
            beat.signal,
        )
        norm = math.sqrt(np.square(beat.values[:, 1:].astype(np.float64)).sum())
        self.log.step(beat.step, self.train_loss, self.lrs.pop(0), norm, self.clock)
        return "preempted" if beat.signal else ""

    def validate(self) -> str:
        """Evaluate and record; returns 'early_stop' when patience has run out, or ''. Every rank decides alike,
        because the loss is the same all-reduced number on each."""
        k = self.k
        self.val_loss, self.validated_at = (
            evaluate(self.micro_step, self.val, self.micro, k, self.w),
            self.step,
        )
        self.log.validation(
            self.step,
            self.val_loss,
            self.clock,
            f" data_sha256:{self.data_sha[:12]}" * bool(self.data_sha),
        )
        if k.target_loss is not None and not self.reached and self.val_loss <= k.target_loss:
            self.reached = (
                f"reached_step={self.step} reached_ms={1000 * self.clock.train_s(self.step):.0f}"
            )
            self.log.say(f"target_loss:{k.target_loss} {self.reached}")
        better = (
            not self.val_loss >= self.best_loss - k.early_stop_min_delta
        )  # also the first, when best is nan
        self.best_loss, self.misses = (
            (self.val_loss, 0) if better else (self.best_loss, self.misses + 1)
        )
        return "early_stop" if 0 < k.early_stop_patience <= self.misses else ""

    def position(self, step: int) -> float:
        """Where update `step` stands in the schedule, in steps: itself, or the spent share of the time budget."""
        return (
            self.k.num_iterations * self.spent_s / self.k.time_budget_s
            if self.k.time_budget_s
            else step
        )

    def close(self, status: str) -> None:
        """Write the status and the results row, whatever way the run ended."""
        k, w, log, clock = self.k, self.w, self.log, self.clock
        notes = plumbing.notes(k, PRESETS, [*FREE.split(), *IN_COLUMNS.split()]) + [
            self.reached
        ] * bool(self.reached)
        notes += [f"data_sha256={self.data_sha[:12]}"] * bool(self.data_sha)
        row = dict(
            run_id=log.id,
            date=log.started,
            git_commit=log.commit,
            seed=k.seed,
            attn_gate=k.attngate,
        )
        row |= dict(
            gate_pos=k.gatepos, gate_act=k.gateact, learning_rate=k.lr, batch_size=k.batch_size
        )
        row |= dict(
            device_batch_size=self.micro,
            sequence_length=k.sequence_length,
            num_iterations=k.num_iterations,
        )
        row |= dict(
            warmdown_iters=k.warmdown_iters,
            final_val_loss=self.val_loss,
            best_val_loss=self.best_loss,
        )
        row |= dict(
            train_time_ms=1000 * clock.train_s(self.step), ms_per_step=1000 * clock.step_avg_s
        )
        row |= dict(
            gpu_name=w.name(),
            n_gpus=w.size * (k.device == "cuda"),
            runpod_instance=k.runpod_instance_type,
        )
        row |= dict(notes=" ".join(notes), stage=k.stage, status=status, steps_done=self.step)
        row |= dict(
            warmup_iters=k.warmup_iters, n_params=self.n_params, tokens_seen=self.step * self.tokens
        )
        row |= dict(
            epochs=round(self.step / self.batches.epoch_steps, 4),
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


def train(run: Run, k: Knobs, w: World) -> str:
    """The loop. Returns finished, early_stop, nan or preempted."""
    micros = k.batch_size // w.size // run.micro
    batches, pulse, status = Prefetch(run.batches.make, run.step, w.device), Pulse(w), ""
    run.clock.start()
    while True:
        # -------- clock stopped: hear of the last step, evaluate, save, leave --------
        status = status or ("finished" if run.position(run.step) >= k.num_iterations else "")
        if (
            not status and run.step >= run.batches.steps and not k.epochs_ok
        ):  # only TIME_BUDGET_S gets here
            run.log.say(
                f"step:{run.step} the shards are used up: get more, or set EPOCHS_OK=1, and start this run again"
            )
            status = "preempted"
        validate, save = (
            status or (every and run.step % every == 0) for every in (k.val_every, k.save_every)
        )
        validate = validate and run.validated_at != run.step and status in ("", "finished")
        save = save and run.saved_at != run.step
        if validate or save or status:
            run.clock.stop()
            for beat in pulse.read(keep=0):
                status = run.hear(beat) or status
            if validate and status != "nan":
                status = run.validate() or status
            if (save or status) and status != "nan" and run.saved_at != run.step:
                run.save()
            if status:
                batches.close()
                return status
            run.clock.start()

        # -------- one optimizer step --------
        x, y = batches.get(run.step)
        loss = torch.zeros((), device=w.device)
        for x_BT, y_BT in zip(x.split(run.micro), y.split(run.micro), strict=True):
            loss += run.micro_step.backward(x_BT.long(), y_BT.long(), 1 / micros) / micros
        norms = run.adam.reduce() | run.muon.reduce()  # of what this rank owns
        zero = torch.zeros((), device=w.device)
        beat = torch.stack([loss, *(norms.get(name, zero) for name in run.names)])
        ok = pulse.send(run.step + 1, beat, run.clock.train_s(run.step))
        rate = k.lr * lr_scale(run.position(run.step), k)
        run.lrs.append(rate)
        run.adam.step(rate, ok)
        run.muon.step(0.1 * rate, ok)
        run.micro_step.refresh()
        run.zero_grad()
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
                f"out of GPU memory at DEVICE_BATCH_SIZE={run.micro}; lower it, or set DEVICE_BATCH_SIZE=auto"
            ) from None
        finally:
            run.close(status)
    return {"finished": 0, "early_stop": 0, "nan": 1}.get(
        status, 128 + run.signal if run.signal else 1
    )


if __name__ == "__main__":
    launch(main)
