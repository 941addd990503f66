"""train_scaled.py -- a 129M byte-level language model: attention windows and decaying memories.

    PRESET=demo python train_scaled.py                       a laptop, a minute, no download
    nohup python3 -u train_scaled.py > training_scaled_50k.log 2>&1 &      one GPU, 50,000 steps
    DATA=wikipedia:tr torchrun --standalone --nproc_per_node=2 train_scaled.py
    DATA=texts/ PRESET=phase8 python train_scaled.py         the original, in exact mathematics
    python train_scaled.py --help                            every knob; --dry_run shows the plan

Text is cut into patches of 4 bytes. Blocks of window attention beside a decaying memory pass over
the patches, and a small recurrent decoder writes the bytes of the next patch. A second memory, by
bytes, remembers what followed the last few bytes, wherever patches begin.

Expect   docs/scaled.md has what was measured: recall, bits per byte, speed, with the commands
Shapes   B rows, T bytes, N = T / 4 patches, D model width, H heads, E = D / H head width, F width
         of a memory's values, C patches of a chunk, M chunks, G histories; x_BND is (B, N, D)
Units    WINDOW and half-lives in patches; losses in nats per byte, bpc in bits per byte
Raises   UserError (one line, exit code 2) for a bad knob, text, checkpoint or results file
Sources  AGIFORMER phase 8 (inkbytefo/agi-former, a393cb5), rewritten from its description
Shared   plumbing/ keeps the run alive and accounted for. What can change a loss is in this file.
"""

import contextlib
import hashlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plumbing.checkpoints import check_disk
from plumbing.data import Prefetch, TokenShards
from plumbing.device import check_compiler, choose_precision, choose_rows
from plumbing.exports import export_weights, read_model_weights, write_metrics_json
from plumbing.knobs import ROOT, UserError, knob, read_knobs
from plumbing.plan import plan_facts, show_plan
from plumbing.run_knobs import RUN_KNOBS, RunKnobs
from plumbing.session import Session
from plumbing.splits import NotFetched, open_byte_files
from plumbing.world import World, flat_gradients, join_world, launch

# ----------------------------------------------------------------------------
# Knobs

PATCH = 4  # bytes
BYTES = 256  # values of a byte; also the width of the byte decoder
CHUNK = 64  # patches that the blocks' memory treats at once
PAST = 8  # bytes before a predicted one that the decoder may look at
READS = 4  # of these, the ones that its recurrent part reads before a patch
NGRAMS = (3, 4, 5, 6)  # bytes; lengths of the decoder's n-grams
NGRAM_WIDTH = 64  # channels of a row of their tables
HISTORIES = (3, 5, 8, 12, 24)  # bytes; lengths of what the memory by bytes looks up
LONGEST = max(HISTORIES)
HALF_LIVES = (32.0, 65536.0)  # patches; of the first and the last head with MEM_INIT=log
MANY_EPOCHS = 20  # a run that reads its text more often than that is warned
STAGES = ((0.0, 0.10), (0.15, 0.50), (0.40, 0.99))  # CURRICULUM: from this share of the steps on

ORIGINAL = dict(blocks="original", decoder="original", mem_rows=0, dropout=0.1, carry_state=False)
ORIGINAL |= dict(batch_size=8, sequence_length=1024, schedule="constant", lr=2e-4, beta2=0.999)
ORIGINAL |= dict(weight_decay=0.01, decay_on="all")
PHASE7 = dict(n_embd=512, n_layer=6, n_head=8, window=128, mem_range=0.99, mem_init=0.0)
PHASE7 |= dict(num_iterations=20000, warmup_iters=100, lr=3e-4, batch_size=4, device_batch_size=4)
DEMO = dict(device="cpu", compile=False, n_embd=128, n_layer=2, n_head=2, window=16)
DEMO |= dict(thinking_steps=1, mem_rows=8192, sequence_length=512, batch_size=8)
DEMO |= dict(device_batch_size=8, num_iterations=300, warmup_iters=20, lr=3e-3)
DEMO |= dict(val_every=100, val_bytes=65536, save_every=100)
PRESETS = {
    "scaled": {},
    "phase8": ORIGINAL | dict(window=256, mem_range=0.995, mem_init=8.0),
    "phase7": ORIGINAL | PHASE7,
    "demo": DEMO,  # Python's own documentation on a CPU
}
# What decides a model's shape and mathematics: weights fit where these are the same.
MODEL_KNOBS = (
    "blocks decoder n_embd n_layer n_head window memory mem_range mem_init mem_rows".split()
)
MODEL_KNOBS += "ngram_rows delta_rule thinking_steps".split()
# These move no loss, so a resumed run may have others.
RESUME_MAY_DIFFER = [*RUN_KNOBS, "preset", "device_batch_size", "log_every", "on_nan"]
RESUME_MAY_DIFFER += ["fla", "flex", "recompute"]
KINDS = ("scaled", "original")


@dataclass(frozen=True)
class Knobs(RunKnobs):
    preset: str = knob("scaled", "named set of defaults", choices=tuple(PRESETS), group="Preset")

    blocks: str = knob("scaled", "which blocks", choices=KINDS, group="Model")
    decoder: str = knob("scaled", "which byte decoder", choices=KINDS)
    n_layer: int = knob(12, "number of blocks", low=1)
    n_head: int = knob(12, "heads of attention, and heads of the memory", low=1)
    n_embd: int = knob(768, "model width in channels", low=8)
    window: int | None = knob(64, "patches that a query sees; off: all of a row", low=1, none="off")
    memory: str = knob(
        "on", "zero: memories say nothing; off: there are none", choices=("on", "zero", "off")
    )
    mem_range: float = knob(0.0, "lowest retention of the blocks' memory", low=0, high=0.9999)
    mem_init: float | None = knob(
        None, "first logit of the retention; log: half-lives of 32 to 65,536 patches", none="log"
    )
    delta_rule: bool = knob(False, "a write replaces what its key held, by a learned share")
    mem_rows: int = knob(65536, "rows of each table of the memory by bytes; 0: none", low=0)
    ngram_rows: int = knob(12288, "rows of each n-gram table of DECODER=scaled; 0: none", low=0)
    thinking_steps: int = knob(3, "passes of the weight-tied MLP behind the blocks", low=0)
    dropout: float = knob(0.0, "dropout of input, memory and MLPs", low=0, high=0.9)

    batch_size: int = knob(2, "rows of a step, over all ranks", low=1, group="Batch")
    device_batch_size: int = knob(2, "rows of a rank's micro-batch", low=1)
    sequence_length: int = knob(4096, "bytes of a row", low=8)
    carry_state: bool = knob(True, "a row goes on where it ended; 0: windows at random places")

    num_iterations: int = knob(50000, "optimizer steps", low=0, group="Schedule")
    warmup_iters: int = knob(500, "steps of linear warm-up", low=0)
    schedule: str = knob(
        "linear", "learning rate behind the warm-up", choices=("constant", "linear", "cosine")
    )
    curriculum: bool = knob(False, "plasticity 0.10, from 15% of the steps 0.50, from 40% 0.99")

    lr: float = knob(6e-4, "peak learning rate of AdamW", low=0, group="Optimizer")
    beta2: float = knob(0.95, "second beta of AdamW", low=0, high=0.99999)
    weight_decay: float = knob(0.1, "weight decay of AdamW", low=0)
    decay_on: str = knob("matrices", "what decays", choices=("matrices", "all"))
    grad_clip: float = knob(0.5, "largest norm of the gradient", above=0)
    seed: int = knob(1337, "seed of initial weights, random windows and dropout", low=0)

    data: str = knob(
        "embedded", "text file, folder or pattern; wikipedia:tr; embedded", group="Data"
    )
    init_from: str = knob("", "weights file (.pth) to start from; empty: new weights")

    val_every: int = knob(2000, "steps between validations; 0: only the last", low=0)
    val_bytes: int | None = knob(None, "bytes of a validation", low=8, none="all")
    save_every: int = knob(2000, "steps between checkpoints; 0: only at the end", low=0)
    log_every: int = knob(10, "steps between log lines", low=1)
    on_nan: str = knob(
        "stop", "rollback: go back once, on at half the lr", choices=("stop", "rollback")
    )

    precision: str = knob("auto", "of products", choices=("auto", "fp32", "bf16", "fp16"))
    fla: bool = knob(False, "memory kernels of flash-linear-attention (package fla-core)")
    flex: bool = knob(False, "FlexAttention for the windows, on CUDA with COMPILE=1")
    recompute: bool = knob(False, "keep only the blocks' inputs for the backward pass")
    results_file: str = knob(str(ROOT / "experiments/results_scaled.csv"), "gets one row per run")

    def __post_init__(self):
        shortest = math.log(0.5) / math.log(self.mem_range or 1e-9)
        problem = ""
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            problem = f"N_EMBD={self.n_embd} must be N_HEAD={self.n_head} times an even width"
        elif self.sequence_length % PATCH:
            problem = f"SEQUENCE_LENGTH={self.sequence_length} must be a multiple of {PATCH} bytes"
        elif self.window_patches > self.sequence_length // PATCH:
            problem = (
                f"WINDOW={self.window} patches do not fit SEQUENCE_LENGTH={self.sequence_length} "
                f"bytes = {self.sequence_length // PATCH} patches; lower it, or set WINDOW=off"
            )
        elif self.warmup_iters > self.num_iterations > 0:
            problem = (
                f"WARMUP_ITERS={self.warmup_iters} exceeds NUM_ITERATIONS={self.num_iterations}"
            )
        elif self.blocks == "original" and (self.fla or self.delta_rule):
            problem = "BLOCKS=original divides by a sum of keys: set FLA=0 and DELTA_RULE=0"
        elif self.mem_init is None and shortest >= HALF_LIVES[0]:
            problem = (
                f"MEM_INIT=log starts at a half-life of {HALF_LIVES[0]:.0f} patches, MEM_RANGE="
                f"{self.mem_range} allows none below {shortest:.0f}; set MEM_RANGE=0 or MEM_INIT"
            )
        if problem:
            raise ValueError(problem)

    @property
    def window_patches(self) -> int:
        return self.window or self.sequence_length // PATCH


# ----------------------------------------------------------------------------
# Model: windows

State = dict  # what the text so far leaves behind: nested dicts and lists of tensors, rows first


def split_heads(x_BND: Tensor, n_head: int) -> Tensor:
    return x_BND.unflatten(2, (n_head, -1)).transpose(1, 2)


def merge_heads(x_BHNE: Tensor) -> Tensor:
    return x_BHNE.transpose(1, 2).flatten(2)


def rotary_tables(first_B: Tensor, N: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, N, width / 2) of N positions (Su et al., arXiv 2104.09864). In fp64: a week
    of carried state reaches positions whose fp32 angle would be off by whole turns."""
    channel = torch.arange(0, width, 2, device=first_B.device, dtype=torch.float64)
    position = first_B[:, None] + torch.arange(N, device=first_B.device)
    angle = position[..., None] * 10000.0 ** (-channel / width)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split layout with the original's sign: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def window_mask(N: int, w: int, known: Tensor) -> Tensor:
    """Which keys each of N queries sees, when `known` of the w - 1 patches before them exist.

    (N, w - 1 + N) for at most w queries. More are cut into blocks of w queries, each of which
    sees keys of its own block and of the one before: (1, blocks, w, 2w), linear in N.
    """
    i = torch.arange(min(N, w), device=known.device)[:, None]
    j = torch.arange(w - 1 + N if N <= w else 2 * w, device=known.device)
    if N <= w:
        return (j >= i) & (j < i + w) & (j >= w - 1 - known)
    seen = ((j > i) & (j <= i + w)).repeat(-(-N // w), 1, 1)
    seen[0] &= j >= w - known
    return seen[None]


def window_attention(q: Tensor, k: Tensor, v: Tensor, w: int, mask: object) -> Tensor:
    """Attention of q (B, H, N, E) to the last w keys, itself included. Keys and values begin with
    the w - 1 patches before, unless mask is None: then the row begins here and fits the window.
    """
    N, blocks = q.size(2), -(-q.size(2) // w)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if not isinstance(mask, Tensor):  # a block mask
        from torch.nn.attention.flex_attention import flex_attention  # costs a second to import

        return flex_attention(q, k, v, block_mask=mask)
    if N <= w:
        return F.scaled_dot_product_attention(q, k, v, mask)
    rest = blocks * w - N
    q = F.pad(q, (0, 0, 0, rest)).unflatten(2, (blocks, w))
    k, v = (F.pad(t, (0, 0, 1, rest)).unflatten(2, (blocks + 1, w)) for t in (k, v))
    k, v = (torch.cat([t[:, :, :-1], t[:, :, 1:]], 3).flatten(0, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q.flatten(0, 1), k, v, mask)
    return y.view(q.shape).flatten(2, 3)[:, :, :N]


def join_past(k: Tensor, v: Tensor, past: State, w: int, fresh: bool) -> tuple:
    """Keys and values behind those of the last w - 1 patches, and the state for the next."""
    if not fresh:
        k = torch.cat([past["keys"].type_as(k), k], 2)
        v = torch.cat([past["values"].type_as(v), v], 2)
    cut = (0, 0, w - 1 - k.size(2), 0)  # zeros stand in front where there are fewer
    return k, v, dict(keys=F.pad(k, cut), values=F.pad(v, cut))


# ----------------------------------------------------------------------------
# Model: the blocks' memory


def exp_lower(exponent: Tensor) -> Tensor:
    """exp on and below the diagonal; 0 above it, where an exponent may be large."""
    keep = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=exponent.device).tril()
    return exponent.masked_fill(~keep, -math.inf).exp()


def chunk_states(keep: Tensor, added: Tensor, first: Tensor) -> Tensor:
    """S_{n+1} = keep_n S_n + added_n: the M + 1 states (B, H, M + 1, E, F) from S_0 = first on.

    A round joins runs of twice the length: log2(M) of them, and no loop over chunks.
    """
    states = torch.cat([first[:, :, None], added], 2)
    keep = F.pad(keep, (0, 0, 0, 0, 1, 0))
    for level in range((added.size(2)).bit_length()):
        before = (0, 0, 0, 0, 2**level, -(2**level))
        states = states + keep @ F.pad(states, before)
        keep = keep @ F.pad(keep, before)
    return states


def decaying_memory(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, delta_rule: bool = False
) -> tuple[Tensor, Tensor]:
    """S_t = e^log_decay_t S_{t-1} + k_t u_t^T and o_t = S_t^T q_t: o (B, H, N, F) and the last S.
    u_t is v_t, or with the delta rule v_t less what k_t reads of the decayed S_{t-1}.

    q and k (B, H, N, E), v (B, H, N, F), log_decay <= 0 (B or 1, H, N), S (B, H, E, F), in fp32.
    All chunks at once, and exact for any decay and length: no exponent is positive. Yang et al.,
    Gated Linear Attention, arXiv 2312.06635; Gated DeltaNet, arXiv 2412.06464.
    """
    N = q.size(2)
    if N == 1:
        state = log_decay[..., None].exp() * state
        state = state + k.mT @ (v - k @ state if delta_rule else v)
        return q @ state, state
    C = min(CHUNK, N)
    q, k, v = (F.pad(t, (0, 0, 0, -N % C)).unflatten(2, (-1, C)) for t in (q, k, v))
    decay = F.pad(log_decay, (0, -N % C)).unflatten(2, (-1, C)).cumsum(3)[..., None]
    whole = decay[..., -1:, :]
    within = exp_lower(decay - decay.mT)  # (B, H, M, C, C): from patch j to patch i of a chunk
    k_to_end = (k * (whole - decay).exp()).mT
    if delta_rule:
        # The WY form: the writes u = fresh - read S of a chunk, solved for at once. The solver
        # takes what lies below the diagonal, and the diagonal to be 1.
        right = torch.cat([v, k * decay.exp()], -1)
        fresh, read = torch.linalg.solve_triangular(
            within * (k @ k.mT), right, upper=False, unitriangular=True
        ).split([v.size(-1), k.size(-1)], -1)
        keep = whole.exp() * torch.eye(k.size(-1), device=k.device) - k_to_end @ read
        states = chunk_states(keep, k_to_end @ fresh, state)
        v = fresh - read @ states[:, :, :-1]
    else:
        # Row n of `across` makes the state before chunk n of the first state and what the chunks
        # before have added. Its exponents are differences of long sums, hence the fp64.
        edges = F.pad(whole[..., 0, 0].double().cumsum(2), (1, 0))[..., None]
        across = exp_lower(edges - edges.mT).float()  # (B, H, M + 1, M + 1)
        states = torch.cat([state[:, :, None], k_to_end @ v], 2)
        states = (across @ states.flatten(3)).view_as(states)
    output = (q @ k.mT * within) @ v + (q * decay.exp()) @ states[:, :, :-1]
    return output.flatten(2, 3)[:, :, :N], states[:, :, -1].contiguous()


def decaying_memory_fla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, delta_rule: bool = False
) -> tuple[Tensor, Tensor]:
    """The same by the kernels of fla-core, which take (B, N, H, E) in bf16."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = (t.transpose(1, 2).bfloat16() for t in (q, k, v))
    g = log_decay.mT.contiguous()
    rest = dict(g=g, scale=1.0, initial_state=state, output_final_state=True)
    if delta_rule:
        output, state = chunk_gated_delta_rule(q, k, v, beta=torch.ones_like(g), **rest)
    else:
        output, state = chunk_simple_gla(q, k, v, **rest)
    return output.transpose(1, 2).float(), state.float()


def log_retention(logit: Tensor, low: float) -> Tensor:
    """log(low + (1 - low) sigmoid(logit)), exact where it is nearly 0."""
    if low == 0:
        return F.logsigmoid(logit)
    return torch.log1p(-(1 - low) * torch.sigmoid(-logit))


@torch.no_grad()
def init_retention(retention_H: Tensor, cfg: Knobs) -> None:
    """Logits as MEM_INIT says: all the same, or for half-lives spaced by their logarithm."""
    low, high = (math.log10(h) for h in HALF_LIVES)
    log_kept = math.log(0.5) / torch.logspace(low, high, cfg.n_head, dtype=torch.float64)
    logit = ((log_kept.exp() - cfg.mem_range) / -torch.expm1(log_kept)).log()
    retention_H.copy_(logit if cfg.mem_init is None else torch.full_like(logit, cfg.mem_init))


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Products in fp32 whatever the rest is in. The meta device of a plan has no autocast."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class OriginalMemory(nn.Module):
    """Phase 8's memory: keys and queries are ELU + 1, what is read is divided by the sum of its
    weights, and each head has one retention. The last column of the values makes that sum."""

    def __init__(self, cfg: Knobs):
        super().__init__()
        D = cfg.n_embd
        self.cfg, self.value_width = cfg, D // cfg.n_head + 1
        self.qkv, self.proj, self.norm = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.LayerNorm(D)
        self.retention = nn.Parameter(torch.empty(cfg.n_head))  # logits
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_retention(self.retention, self.cfg)

    def forward(self, h_BND: Tensor, past: State, plasticity: Tensor) -> tuple[Tensor, State]:
        """What is read, (B, N, D), and the state behind the N patches."""
        cfg = self.cfg
        qkv = self.qkv(h_BND)
        with full_precision(h_BND.device):
            q, k, v = (split_heads(t, cfg.n_head).float() for t in qkv.chunk(3, -1))
            q, k = (F.elu(q) + 1) * q.size(-1) ** -0.5, F.elu(k) + 1
            v = F.pad(v, (0, 1), value=1.0)
            log_decay = log_retention(self.retention, cfg.mem_range) + plasticity.log()
            log_decay = log_decay[None, :, None].expand(1, -1, q.size(2))
            read, matrix = decaying_memory(q, k, v, log_decay, past["matrix"])
            read = read[..., :-1] / (read[..., -1:] + 1e-6)
        read = self.norm(self.proj(merge_heads(read)))
        return F.dropout(read, cfg.dropout, self.training), dict(matrix=matrix)


class ScaledMemory(nn.Module):
    """Our memory: a short convolution, keys and queries of length 1, a retention that the input
    moves, a norm per head in place of the division, and a gate on what is read."""

    def __init__(self, cfg: Knobs):
        super().__init__()
        D, H = cfg.n_embd, cfg.n_head
        self.cfg, self.value_width, self.operator = cfg, D // H, decaying_memory
        self.qkv, self.gate = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.conv_kernel = nn.Parameter(torch.empty(4, 3 * D))  # three patches before, and this one
        self.conv_bias = nn.Parameter(torch.empty(3 * D))
        self.retention = nn.Parameter(torch.empty(H))  # logits, where `decay` adds nothing
        self.decay = nn.Linear(D, H, bias=False)
        self.head_norm = nn.RMSNorm(D // H, eps=1e-6)
        self.beta = nn.Linear(D, H) if cfg.delta_rule else None  # share that a write replaces
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A key starts as the query of the patch before, so that what followed a patch is found
        by that patch from the first step on. Without it, recall is hardly learned."""
        D = self.cfg.n_embd
        init_retention(self.retention, self.cfg)
        self.decay.weight.zero_()
        self.qkv.weight[D : 2 * D] = self.qkv.weight[:D]
        self.qkv.bias[D : 2 * D] = self.qkv.bias[:D]
        for parameter in (self.conv_bias, self.conv_kernel):
            parameter.zero_()
        self.conv_kernel[3, :D] = self.conv_kernel[2, D : 2 * D] = self.conv_kernel[3, 2 * D :] = 1

    def convolve(self, qkv: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Depthwise and causal, as four shifted products: one kernel when compiled."""
        N = qkv.size(1)
        whole = torch.cat([past.type_as(qkv), qkv], 1)
        kernel = self.conv_kernel.type_as(qkv)
        mixed = sum(whole[:, i : i + N] * kernel[i] for i in range(4))
        return F.silu(mixed + self.conv_bias.type_as(qkv)), whole[:, N:].contiguous()

    def forward(self, h_BND: Tensor, past: State, plasticity: Tensor) -> tuple[Tensor, State]:
        """What is read, (B, N, D), and the state behind the N patches."""
        cfg = self.cfg
        qkv, conv = self.convolve(self.qkv(h_BND), past["conv"])
        logit = self.retention[:, None] + self.decay(h_BND).mT
        with full_precision(h_BND.device):
            log_decay = log_retention(logit.float(), cfg.mem_range) + plasticity.log()
            q, k, v = (split_heads(t, cfg.n_head).float() for t in qkv.chunk(3, -1))
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            if self.beta is not None:  # a write is k v^T: the root of its share on each of the two
                root = (0.5 * F.logsigmoid(self.beta(h_BND).float())).exp().mT[..., None]
                k, v = k * root, v * root
            read, matrix = self.operator(q, k, v, log_decay, past["matrix"], cfg.delta_rule)
            read = self.head_norm(read)
        read = merge_heads(read) * F.silu(self.gate(h_BND))
        return F.dropout(read, cfg.dropout, self.training), dict(matrix=matrix, conv=conv)


# ----------------------------------------------------------------------------
# Model: blocks


def make_mlp(D: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))


class OriginalBlock(nn.Module):
    """Phase 8's block: attention without positions and memory, each projected, then summed."""

    def __init__(self, cfg: Knobs):
        super().__init__()
        D = cfg.n_embd
        self.cfg = cfg
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(D), nn.LayerNorm(D), make_mlp(D)
        self.qkv, self.proj, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, D)
        self.memory = OriginalMemory(cfg) if cfg.memory != "off" else None

    def forward(
        self, x_BND: Tensor, past: State, rotary: tuple, mask: object, plasticity: Tensor
    ) -> tuple[Tensor, State]:
        """The N patches behind this block, and the state for the patches after them."""
        cfg, w = self.cfg, self.cfg.window_patches
        h = self.norm1(x_BND)
        q, k, v = (split_heads(t, cfg.n_head) for t in self.qkv(h).chunk(3, -1))
        k, v, new = join_past(k, v, past, w, mask is None)
        mixed = self.proj(merge_heads(window_attention(q, k, v, w, mask)))
        if self.memory is not None:
            read, kept = self.memory(h, past, plasticity)
            mixed = mixed if cfg.memory == "zero" else mixed + read
            new |= kept
        x_BND = x_BND + self.out(mixed)
        return x_BND + F.dropout(self.mlp(self.norm2(x_BND)), cfg.dropout, self.training), new


class ScaledBlock(nn.Module):
    """Our block: rotary window attention and memory side by side, joined by one projection."""

    def __init__(self, cfg: Knobs):
        super().__init__()
        D = cfg.n_embd
        self.cfg = cfg
        self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.qkv, self.mlp = nn.Linear(D, 3 * D), make_mlp(D)
        self.memory = ScaledMemory(cfg) if cfg.memory != "off" else None
        self.out = nn.Linear(D if self.memory is None else 2 * D, D)

    def forward(
        self, x_BND: Tensor, past: State, rotary: tuple, mask: object, plasticity: Tensor
    ) -> tuple[Tensor, State]:
        """The N patches behind this block, and the state for the patches after them."""
        cfg, w, N = self.cfg, self.cfg.window_patches, x_BND.size(1)
        h = self.norm1(x_BND)
        q, k, v = (split_heads(t, cfg.n_head) for t in self.qkv(h).chunk(3, -1))
        # Keys are kept without their rotation, so that positions start at 0 in every call.
        k, v, new = join_past(k, v, past, w, mask is None)
        cos, sin = (table[:, -k.size(2) :] for table in rotary)
        q, k = rotate(q, cos[:, -N:], sin[:, -N:]), rotate(k, cos, sin)
        mixed = merge_heads(window_attention(q, k, v, w, mask))
        if self.memory is not None:
            read, kept = self.memory(h, past, plasticity)
            read = torch.zeros_like(read) if cfg.memory == "zero" else read
            mixed = torch.cat([mixed, read.type_as(mixed)], -1)
            new |= kept
        x_BND = x_BND + self.out(mixed)
        return x_BND + F.dropout(self.mlp(self.norm2(x_BND)), cfg.dropout, self.training), new


class PatchRefiner(nn.Module):
    """The same gated MLP, applied several times to each patch by itself."""

    def __init__(self, cfg: Knobs, norm: Callable[[int], nn.Module]):
        super().__init__()
        D = cfg.n_embd
        self.steps = cfg.thinking_steps
        self.norm, self.gate, self.mlp = norm(D), nn.Linear(D, D), make_mlp(D)

    def forward(self, z_BND: Tensor) -> Tensor:
        for _ in range(self.steps):
            h = self.norm(z_BND)
            z_BND = z_BND + torch.sigmoid(self.gate(h)) * self.mlp(h)
        return z_BND


# ----------------------------------------------------------------------------
# Model: bytes


class SuffixHash(nn.Module):
    """31-bit hashes (.., G) of the last n bytes of x (.., P), for each of G lengths n <= P."""

    PRIME = 2**31 - 1

    def __init__(self, lengths: tuple[int, ...], P: int):
        super().__init__()
        self.lengths = lengths
        powers = [pow(1_000_003, P - i, self.PRIME) for i in range(P)]  # sums stay below 2^45
        self.register_buffer("powers", torch.tensor(powers), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weighted = (x + 1) * self.powers
        return torch.stack([weighted[..., -n:].sum(-1) % self.PRIME for n in self.lengths], -1)


class NGramTables(nn.Module):
    """What the last 3, 4, 5 and 6 bytes say about the next one, learned by heart.

    For each length there is a table of vectors, and a hash of the bytes names the row. The four
    rows, side by side, are projected onto the decoder's state: common short histories are looked
    up, where the recurrent decoder would learn them slowly. Tables are small, so that different
    histories may share a row. Rows begin at zero, and one that training has not met says nothing.
    Hashed n-gram embeddings: Pagnoni et al., Byte Latent Transformer, arXiv 2412.09871.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows
        self.table = nn.Parameter(torch.empty(len(NGRAMS) * rows, NGRAM_WIDTH))
        self.hash = SuffixHash(NGRAMS, PAST)
        self.out = nn.Linear(len(NGRAMS) * NGRAM_WIDTH, BYTES, bias=False)
        self.register_buffer("first", torch.arange(len(NGRAMS)) * rows, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.table)

    def forward(self, x: Tensor) -> Tensor:
        """(.., 256) for the bytes (.., 8) before the predicted one."""
        rows = self.hash(x) % self.rows + self.first
        return self.out(F.embedding(rows, self.table).flatten(-2))


class OriginalDecoder(nn.Module):
    """The bytes of the next patch, one after another: a GRU that reads the byte before beside the
    latent of the patches before. It starts at zero in each patch, with a byte 0 for none."""

    def __init__(self, cfg: Knobs):
        super().__init__()
        self.latent, self.embed = nn.Linear(cfg.n_embd, BYTES), nn.Embedding(BYTES, BYTES)
        self.gru, self.out = nn.GRUCell(2 * BYTES, BYTES), nn.Linear(BYTES, BYTES)

    def inputs(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The GRU's input product in two parts: of each byte value (256, 768), and of the latents
        (.., 768), which are the same for all bytes of a patch."""
        of_byte, of_latent = self.gru.weight_ih.split(BYTES, dim=1)
        of_byte = F.linear(self.embed.weight, of_byte)
        return of_byte, F.linear(self.latent(z), of_latent, self.gru.bias_ih)

    def step(self, hidden: Tensor | None, given: Tensor) -> Tensor:
        """The GRU's cell: the next hidden state from the last one (None: zero) and the input."""
        of_hidden = self.gru.bias_hh
        if hidden is not None:
            of_hidden = F.linear(hidden, self.gru.weight_hh, of_hidden)
        gates, candidate = given.split([2 * BYTES, BYTES], -1)
        hidden_gates, hidden_candidate = of_hidden.split([2 * BYTES, BYTES], -1)
        reset, keep = torch.sigmoid(gates + hidden_gates).chunk(2, -1)
        new = (1 - keep) * torch.tanh(candidate + reset * hidden_candidate)
        return new if hidden is None else new + keep * hidden

    def begin(self, x: Tensor, of_byte: Tensor, of_latent: Tensor) -> Tensor:
        """The hidden state (.., 256) that predicts a patch's first byte."""
        return self.step(None, of_latent + of_byte[0])

    def logits(self, hidden: Tensor, x: Tensor) -> Tensor:
        """(.., 256), fp32, of the next byte, behind the hidden state and the 8 bytes before."""
        return self.out(hidden).float()

    def forward(self, z_BND: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the bytes y (B, N, 4) of patches, and the hidden states behind them, both
        (B, N, 4, 256), given the latent before each patch, the 8 bytes x (B, N, 8) before it, and
        the bytes before them in their own patch."""
        of_byte, of_latent = self.inputs(z_BND)
        states = [self.begin(x, of_byte, of_latent)]
        for given in F.embedding(y[..., :-1], of_byte).unbind(2):
            states.append(self.step(states[-1], of_latent + given))
        hidden = torch.stack(states, 2)
        return self.logits(hidden, torch.cat([x, y[..., :-1]], -1).unfold(-1, PAST, 1)), hidden


class ScaledDecoder(OriginalDecoder):
    """The same GRU, which first reads the four bytes before the patch, so that its weights learn
    short histories from every byte; and beside it tables of n-grams."""

    def __init__(self, cfg: Knobs):
        super().__init__(cfg)
        self.grams = NGramTables(cfg.ngram_rows) if cfg.ngram_rows else None

    def begin(self, x: Tensor, of_byte: Tensor, of_latent: Tensor) -> Tensor:
        hidden = None
        for byte in x[..., PAST - READS :].unbind(-1):
            hidden = self.step(hidden, of_latent + F.embedding(byte, of_byte))
        return hidden

    def logits(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.out(hidden if self.grams is None else hidden + self.grams(x)).float()


class ByteMemory(nn.Module):
    """Remembers which bytes followed the last 3, 5, 8, 12 and 24 bytes, and says so when these
    come again, wherever patches begin.

    For each length there is a table of constant size. A hash of the last n bytes names its row,
    which holds one history and the two bytes that followed it last, with their times; another
    history that falls into the row replaces it. What is found is weighed by a learned factor and
    fades with its age, by a learned half-life. It is mixed into the model's distribution as PPM
    mixes its contexts (Cleary and Witten, 1984), from the shortest history to the longest:

        p <- (found + doubt * p) / (sum of found + doubt)

    where the doubt is learned for a history met once, for two equal and for two different bytes,
    and moved by the decoder's hidden state. Caches beside a model: Grave et al., arXiv 1612.04426.
    What followed the same history: n-gram heads, Akyurek et al., arXiv 2401.12973.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows
        self.hash = SuffixHash(HISTORIES, LONGEST)
        self.doubt = nn.Linear(BYTES, len(HISTORIES))
        # Logarithms for each length: weight of the last byte and of the one before; doubt of one
        # byte, two equal and two different ones; decay per byte. Flat: a vector has no decay.
        self.how = nn.Parameter(torch.empty(6 * len(HISTORIES)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Half-lives from 128 bytes for the shortest history to 131,072 for the longest."""
        half_life = torch.logspace(math.log10(128), math.log10(131072), len(HISTORIES))
        start = torch.tensor([0.0, -1.0, 1.0, 0.5, 1.5, 0.0]).repeat(len(HISTORIES), 1)
        start[:, 5] = (math.log(2) / half_life).log()
        self.how.copy_(start.flatten())
        self.doubt.weight.zero_()
        self.doubt.bias.zero_()

    def half_lives(self) -> Tensor:
        """(G,) bytes."""
        return math.log(2) / self.how.detach().view(-1, 6)[:, 5].exp()

    def empty_state(self, B: int) -> State:
        """Empty tables. An entry is 256 times its time plus the byte, -1 for none. The last row
        takes the writes that do not last."""
        shape, device = (B, len(HISTORIES), self.rows + 1), self.how.device
        history = torch.zeros(shape, dtype=torch.long, device=device)
        return dict(history=history, entries=torch.full((*shape, 2), -1, device=device))

    def read(self, text: Tensor, first_B: Tensor, state: State) -> tuple[Tensor, tuple]:
        """For each of the T bytes of text (B, 24 + T) behind its first 24, which are at times
        first, first + 1, ..: the last two entries (B, T, G, 2) of its histories; and what to write.

        All at once, and exactly as byte by byte: sorted by row, then by time, what stands before
        in the same row came before.
        """
        T = text.size(1) - LONGEST
        i = torch.arange(T, device=text.device)
        history = self.hash(text[:, :-1].unfold(1, LONGEST, 1)).mT  # (B, G, T)
        row, order = torch.sort(history % self.rows, stable=True)
        history = history.gather(2, order)
        entry = ((first_B[:, None] + i) * BYTES + text[:, LONGEST:])[:, None]
        entry = entry.expand_as(order).gather(2, order)

        # A row is one stretch of the sorted bytes, and within it each history one or more runs.
        row_start = torch.where((row != row.roll(1, -1)) | (i == 0), i, 0).cummax(-1).values
        new_run = (history != history.roll(1, -1)) | (i == row_start)
        run_start = torch.where(new_run, i, 0).cummax(-1).values
        at = row[..., None].expand(*row.shape, 2)
        known = (state["history"].gather(2, row) == history) & (run_start == row_start)
        old = torch.where(known[..., None], state["entries"].gather(2, at), -1)
        met = (i - run_start)[..., None]  # how often the history came before in this run
        recent = torch.stack([entry.roll(1, -1), entry.roll(2, -1)], -1)
        once = torch.stack([recent[..., 0], old[..., 0]], -1)
        found = torch.where(met == 0, old, torch.where(met == 1, once, recent))

        lasts = (row != row.roll(-1, -1)) | (i == T - 1)  # only a row's last entry stays
        writes = (
            torch.where(lasts, row, self.rows),
            history,
            torch.stack([entry, found[..., 0]], -1),
        )
        back = order.argsort(-1)[..., None].expand_as(at)
        return found.gather(2, back).transpose(1, 2), writes

    def write(self, state: State, writes: tuple) -> None:
        """Into the state itself."""
        place, history, entries = writes
        state["history"].scatter_(2, place, history)[:, :, -1] = 0
        at = place[..., None].expand_as(entries)
        state["entries"].scatter_(2, at, entries)[:, :, -1] = -1

    def mix(self, logits: Tensor, hidden: Tensor, entries: Tensor, now: Tensor) -> Tensor:
        """log p (.., 256), fp32, from the decoder's logits and hidden states (.., 256) and what was
        read, (.., G, 2), at the times `now` (..)."""
        one, two, alone, equal, different, decay = self.how.view(-1, 6).unbind(-1)
        found, byte = entries >= 0, entries % BYTES
        age = torch.where(found, now[..., None, None] - entries // BYTES, 0)
        weight = found * (torch.stack([one, two], -1) - decay.exp()[:, None] * age).exp()
        pair = torch.where(byte[..., 0] == byte[..., 1], equal, different)
        doubt = torch.where(found[..., 1], pair, alone)
        doubt = (doubt + self.doubt(hidden).float()).exp()
        whole = weight.sum(-1) + doubt
        # What the longer histories leave to each length, and in front to the model.
        left = F.pad((doubt / whole).flip(-1).cumprod(-1).flip(-1), (0, 1), value=1.0)
        p = left[..., :1] * logits.softmax(-1)
        weight = weight / whole[..., None] * left[..., 1:, None]
        return p.scatter_add(-1, byte.flatten(-2), weight.flatten(-2)).clamp(min=1e-30).log()

    def forward(
        self, logits: Tensor, hidden: Tensor, text: Tensor, first_B: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """log p (B, T, 256) of the bytes of `text`, and new tables behind them."""
        entries, writes = self.read(text, first_B, state)
        now = first_B[:, None] + torch.arange(logits.size(1), device=text.device)
        state = {name: table.clone() for name, table in state.items()}
        self.write(state, writes)
        return self.mix(logits, hidden, entries, now), state


class ByteLM(nn.Module):
    """Bytes to patches, through the blocks, to the bytes of the next patch.

    Patch n has seen bytes 0 .. 4n + 3 and its latent predicts bytes 4n + 4 .. 4n + 7: with
    x = s[i : i + T] the targets are y = s[i + 4 : i + 4 + T].
    """

    def __init__(self, cfg: Knobs):
        super().__init__()
        D, original = cfg.n_embd, cfg.blocks == "original"
        self.cfg = cfg
        norm = nn.LayerNorm if original else partial(nn.RMSNorm, eps=1e-6)
        block = OriginalBlock if original else ScaledBlock
        decoder = OriginalDecoder if cfg.decoder == "original" else ScaledDecoder
        self.embed, self.patch = nn.Embedding(BYTES, D), nn.Conv1d(D, D, PATCH, stride=PATCH)
        self.norm_in, self.norm_out = norm(D), norm(D)
        self.blocks = nn.ModuleList(block(cfg) for _ in range(cfg.n_layer))
        self.thinking = PatchRefiner(cfg, norm) if cfg.thinking_steps else None
        self.decoder = decoder(cfg)
        by_bytes = cfg.mem_rows > 0 and cfg.memory != "off"
        self.byte_memory = ByteMemory(cfg.mem_rows) if by_bytes else None
        # Multiplies every retention of the blocks' memory. Saved, so that it is applied as trained.
        self.register_buffer("plasticity", torch.ones(()))
        self.flex_masks: dict[bool, object] = {}  # FlexAttention's, of fresh rows and of others

    def init_weights(self, seed: int) -> None:
        """PyTorch's default initialisation. Each module draws from a generator of its own, made of
        seed and name, so that another part moves no other part's weights."""
        with torch.random.fork_rng(devices=[]):
            for name, module in reversed(list(self.named_modules())):  # parts before their whole
                if hasattr(module, "reset_parameters"):
                    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                    torch.manual_seed(int.from_bytes(digest[:7], "big"))
                    module.reset_parameters()

    def empty_state(self, B: int) -> State:
        """The state of B rows before their first patch, as large as any later one."""
        cfg, new = self.cfg, partial(torch.zeros, device=self.plasticity.device)
        H, E = cfg.n_head, cfg.n_embd // cfg.n_head
        layers = []
        for block in self.blocks:
            past = (B, H, cfg.window_patches - 1, E)
            layers.append(dict(keys=new(past), values=new(past)))
            if block.memory is not None:
                layers[-1]["matrix"] = new(B, H, E, block.memory.value_width)
                layers[-1]["conv"] = new(B, 3, 3 * cfg.n_embd)
        state = dict(layers=layers, position=new(B, dtype=torch.long))  # in patches
        state["bytes"] = new(B, LONGEST - PATCH, dtype=torch.long)
        if self.byte_memory is not None:
            state["histories"] = self.byte_memory.empty_state(B)
        return state

    def trunk(self, x_BT: Tensor, state: State, fresh: bool = False) -> tuple[Tensor, State]:
        """Latents (B, N, D) of the patches of x, which continue `state`, and the state behind
        them. Its rows have all seen as many patches; fresh: they have seen none."""
        cfg, w, N = self.cfg, self.cfg.window_patches, x_BT.size(1) // PATCH
        first_B = state["position"]
        if fresh and N <= w:
            mask = None
        elif self.flex_masks and N == cfg.sequence_length // PATCH:
            mask = self.flex_masks[fresh]
        else:
            mask = window_mask(N, w, first_B[0].clamp(max=w - 1))
        z = self.embed(x_BT).unflatten(1, (N, PATCH)).flatten(2)
        z = F.linear(z, self.patch.weight.mT.flatten(1), self.patch.bias)  # faster than conv1d
        rotary = ()
        if cfg.blocks == "original":
            z = rotate(z, *rotary_tables(first_B, N, cfg.n_embd))
        else:
            zero = torch.zeros_like(first_B[:1])
            rotary = rotary_tables(zero, w - 1 + N, cfg.n_embd // cfg.n_head)
        z = F.dropout(self.norm_in(z), cfg.dropout, self.training)
        layers = []
        for block, past in zip(self.blocks, state["layers"], strict=True):
            if cfg.recompute and self.training:
                block = partial(checkpoint, block, use_reentrant=False)
            z, new = block(z, past, rotary, mask, self.plasticity)
            layers.append(new)
        z = self.norm_out(z)
        z = z if self.thinking is None else self.thinking(z)
        seen = torch.cat([state["bytes"], x_BT], 1)[:, -(LONGEST - PATCH) :]
        return z, state | dict(layers=layers, position=first_B + N, bytes=seen)

    def logits(self, x_BT: Tensor, y_BT: Tensor, past: State | None = None) -> tuple:
        """Logits (B, T, 256), fp32, of the targets y, each given all bytes before it; and the
        state behind x. past: the state in front of it, None at the beginning of a text."""
        old = self.empty_state(len(x_BT)) if past is None else past
        z_BND, state = self.trunk(x_BT, old, fresh=past is None)
        before = torch.cat([old["bytes"][:, -PATCH:], x_BT], 1).unfold(1, PAST, PATCH)
        logits, hidden = self.decoder(z_BND, before, y_BT.unflatten(1, (-1, PATCH)))
        logits, hidden = logits.flatten(1, 2), hidden.flatten(1, 2)
        if self.byte_memory is not None:
            text = torch.cat([old["bytes"], x_BT[:, :PATCH], y_BT], 1)
            first_B = old["position"] * PATCH
            log_p, tables = self.byte_memory(logits, hidden, text, first_B, old["histories"])
            state["histories"] = tables
            logits = logits if self.cfg.memory == "zero" else log_p
        return logits, state

    def forward(self, x_BT: Tensor, y_BT: Tensor, past: State | None = None) -> tuple:
        """-log p of each target byte, (B, T), in nats, and the state behind x. 0 where a target is
        -1; what such a byte is, x says."""
        known = torch.where(y_BT < 0, F.pad(x_BT[:, PATCH:], (0, PATCH)), y_BT)
        logits, state = self.logits(x_BT, known, past)
        nll_BT = F.cross_entropy(logits.mT, y_BT, ignore_index=-1, reduction="none")
        return nll_BT, state

    def half_lives(self) -> Tensor:
        """(L, H) patches, fp64, for an input that does not move them; empty without memory."""
        memories = [block.memory for block in self.blocks if block.memory is not None]
        logits = [memory.retention.detach().double().cpu() for memory in memories]
        kept = log_retention(torch.stack(logits), self.cfg.mem_range) if logits else torch.empty(0)
        return math.log(0.5) / (kept + math.log(self.plasticity.item()))


def load_model(path: str | Path, device: str = "cpu", **changes: object) -> ByteLM:
    """The model of a weights file in evaluation mode, for scripts; `changes` are knobs, such as
    memory="zero"."""
    found = read_model_weights(path, __name__, MODEL_KNOBS)
    known = Knobs.__dataclass_fields__.keys() & found["knobs"].keys()
    model = ByteLM(Knobs(**({name: found["knobs"][name] for name in known} | changes)))
    model.load_state_dict(found["model"])
    return model.to(device).eval()


def use_fla(model: ByteLM, world: World) -> None:
    capable = world.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if not capable or importlib.util.find_spec("fla") is None:
        raise UserError(
            "FLA=1 needs the package fla-core and a GPU of compute capability 8 or more; "
            "pip install fla-core, or set FLA=0"
        )
    for block in model.blocks:
        if block.memory is not None:
            block.memory.operator = decaying_memory_fla


# ----------------------------------------------------------------------------
# Optimizer and schedule


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose step is left out where the device flag `all_finite` is down."""

    # differs from train_gpt.py: matrices decay, vectors as DECAY_ON says; one rate for both
    def __init__(self, model: ByteLM, cfg: Knobs):
        decayed, rest = [], []
        for p in model.parameters():
            (decayed if p.dim() > 1 or cfg.decay_on == "all" else rest).append(p)
        groups = [dict(params=decayed), dict(params=rest, weight_decay=0.0)]
        betas = (0.9, cfg.beta2)
        super().__init__(groups, cfg.lr, betas, weight_decay=cfg.weight_decay, fused=True)

    def step(self, lr: float, all_finite: Tensor) -> None:
        for group in self.param_groups:
            group["lr"] = lr
        self.found_inf = (~all_finite).float()  # how torch's GradScaler tells the fused kernel
        super().step()


class LossScale(nn.Module):
    """torch.amp.GradScaler's rule without its wait for the device: fp16 gradients carry a factor,
    halved when they overflow and doubled after 2,000 steps that do not. 1 for other dtypes."""

    # differs from train_gpt.py: at a factor of 1 an overflow is a real failure; 2,000 steps
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.is_fp16 = dtype == torch.float16
        self.register_buffer("scale", torch.tensor(2.0**16 if self.is_fp16 else 1.0))
        self.register_buffer("good_steps", torch.tensor(0))

    def update(self, grad_norms_P: Tensor) -> Tensor:
        """Whether this step has overflowed."""
        overflow = ~grad_norms_P.isfinite().all() & self.is_fp16 & (self.scale > 1)
        good_steps = torch.where(overflow, 0, self.good_steps + self.is_fp16)
        self.scale *= torch.where(overflow, 0.5, torch.where(good_steps == 2000, 2.0, 1.0))
        self.good_steps.copy_(good_steps % 2000)
        return overflow


def lr_scale(step: int, cfg: Knobs) -> float:
    """Up to 1 over the first WARMUP_ITERS updates, then 1, or down to 0 at NUM_ITERATIONS."""
    if step < cfg.warmup_iters:
        return (step + 1) / cfg.warmup_iters
    if cfg.schedule == "constant":
        return 1.0
    left = 1 - (step - cfg.warmup_iters) / max(cfg.num_iterations - cfg.warmup_iters, 1)
    left = max(left, 0.0)
    return left if cfg.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def plasticity(step: int, cfg: Knobs) -> float:
    """What multiplies every retention in update `step`: 1, or with CURRICULUM its stage's."""
    if not cfg.curriculum:
        return 1.0
    return [alpha for share, alpha in STAGES if step >= share * cfg.num_iterations][-1]


def seed_dropout(cfg: Knobs, step: int, rank: int, micro_batch: int) -> None:
    """Dropout of the step, the rank and the micro-batch alone, so that resuming is exact."""
    if cfg.dropout:
        seeds = np.random.SeedSequence([cfg.seed, step, rank, micro_batch])
        torch.manual_seed(int(seeds.generate_state(1, np.uint32)[0]))


# ----------------------------------------------------------------------------
# Batches and evaluation


class Batches:
    """Which bytes each step trains on: a function of the step, whatever the number of ranks.

    CARRY_STATE=1: row r reads its own strip of the text, one of BATCH_SIZE equal ones, window
    after window, and starts over at its end. CARRY_STATE=0: windows at random places.
    """

    def __init__(self, text: TokenShards, cfg: Knobs, world: World):
        self.text, self.cfg, self.rows = text, cfg, world.share(cfg.batch_size)
        T, strips = cfg.sequence_length, cfg.batch_size if cfg.carry_state else 1
        if cfg.batch_size < world.size:
            raise UserError(
                f"BATCH_SIZE={cfg.batch_size} leaves some of {world.size} ranks without a row; "
                f"set BATCH_SIZE={world.size} or more, or use fewer ranks"
            )
        if text.total < strips * T + PATCH:
            raise UserError(
                f"{text.pattern}: {text.total:,} bytes of training text, {strips} row(s) of "
                f"SEQUENCE_LENGTH={T} need {strips * T + PATCH:,}; use more text or shorter rows"
            )
        self.strip = (text.total - PATCH) // strips
        self.num_windows = self.strip // T  # of a strip

    def starts(self, step: int) -> list[int]:
        """Positions in the text of all rows' windows."""
        cfg, T = self.cfg, self.cfg.sequence_length
        if cfg.carry_state:
            return [r * self.strip + step % self.num_windows * T for r in range(cfg.batch_size)]
        draw = np.random.default_rng([cfg.seed, step])
        return draw.integers(0, self.text.total - T - PATCH + 1, cfg.batch_size).tolist()

    def starts_over(self, step: int) -> bool:
        return not self.cfg.carry_state or step % self.num_windows == 0

    def make(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets, (rows, T) uint8: targets are the bytes 4 further on."""
        n = self.cfg.sequence_length + PATCH
        rows = [self.text.read(at, n).astype(np.uint8) for at in self.starts(step)[self.rows]]
        text = torch.from_numpy(np.stack(rows))
        return text[:, :-PATCH].contiguous(), text[:, PATCH:].contiguous()


class CarriedState:
    """What the rows of this rank's micro-batches have left behind, None at their beginning. Saved
    as one state of all rows of all ranks, so that any number of ranks can go on from it."""

    def __init__(self, cfg: Knobs, world: World):
        self.cfg, self.world = cfg, world
        self.rows = range(cfg.batch_size)[world.share(cfg.batch_size)]
        self.reset()

    def reset(self) -> None:
        self.states = [None] * -(-len(self.rows) // self.cfg.device_batch_size)

    def keep(self, i: int, state: State) -> None:
        if self.cfg.carry_state:
            self.states[i] = map_state(Tensor.detach, state)

    def state_dict(self) -> dict:
        """Every rank must call it. Rows are padded, since the ranks' shares may differ by one."""
        if self.states[0] is None:
            return {}
        world, B = self.world, self.cfg.batch_size
        sizes = [len(range(B)[replace(world, rank=r).share(B)]) for r in range(world.size)]

        def gather(*parts: Tensor) -> Tensor:
            own = torch.cat(parts)
            padding = own[:1].expand(max(sizes) - len(own), *own.shape[1:])
            table = world.all_gather(torch.cat([own, padding])).cpu()
            return torch.cat([rows[:size] for rows, size in zip(table, sizes, strict=True)])

        return map_state(gather, *self.states)

    def load_state_dict(self, saved: dict) -> None:
        self.reset()
        for i in range(len(self.states) if saved else 0):
            mine = list(self.rows)[i * self.cfg.device_batch_size :][: self.cfg.device_batch_size]
            self.states[i] = map_state(lambda t, mine=mine: t[mine].to(self.world.device), saved)


def map_state(f: Callable[..., Tensor], *states: State) -> State:
    """f of the corresponding tensors of states."""
    if isinstance(states[0], dict):
        return {name: map_state(f, *(s[name] for s in states)) for name in states[0]}
    if isinstance(states[0], list):
        return [map_state(f, *parts) for parts in zip(*states, strict=True)]
    return f(*states)


@torch.no_grad()
def evaluate(
    model: ByteLM, val: TokenShards, precision: torch.autocast, cfg: Knobs, world: World
) -> tuple[float, float]:
    """Mean loss per byte of the validation text, in nats, and its characters per byte.

    The text is cut into 8 strips, read side by side in windows that do not overlap and, with
    CARRY_STATE, carry their state; each byte behind the first 4 counts once. The same windows for
    any number of ranks and micro-batch, whose rows are filled up with targets of -1.
    """
    strips, T, micro = 8, cfg.sequence_length, min(cfg.device_batch_size, cfg.batch_size)
    total = min(val.total, (cfg.val_bytes or val.total) + PATCH) - PATCH
    length = -(-total // (strips * PATCH)) * PATCH
    sums = torch.zeros(2, device=world.device, dtype=torch.float64)
    rows = range(strips)[world.share(strips)]
    model.eval()
    for first in range(0, len(rows), micro):
        state = None
        for at in range(0, length, T):
            x, y = np.zeros((micro, T), np.int64), np.full((micro, T), -1)
            for i, row in enumerate(rows[first : first + micro]):
                n = min(T, length - at, total - row * length - at)
                if n > 0:
                    text, whole = val.read(row * length + at, n + PATCH), -(-n // PATCH) * PATCH
                    x[i, :whole], y[i, :n] = text[:whole], text[PATCH:]
            x, y = (torch.from_numpy(t).to(world.device) for t in (x, y))
            with precision:
                nll, state = model(x, y, state if cfg.carry_state else None)
            begins_character = (y >= 0) & (y & 0xC0 != 0x80)
            sums += torch.stack([nll.double().sum(), begins_character.sum()])
    model.train()
    loss, characters = (world.all_reduce(sums) / total).tolist()
    return loss, characters


# ----------------------------------------------------------------------------
# Plan

HINT = "set DEVICE=cpu; PRESET=demo is a size that makes that sensible"
RESULTS = (
    "run_id date git_commit seed preset blocks decoder n_embd n_layer n_head window memory "
    "delta_rule carry_state data learning_rate batch_size device_batch_size sequence_length "
    "num_iterations final_val_loss best_val_loss final_val_bpc val_bits_per_char train_time_ms "
    "ms_per_step gpu_name n_gpus notes stage status steps_done n_params tokens_seen epochs "
    "peak_memory_mib torch world_size code_sha256 dirty"
).split()
METRICS = (
    "val_bpc val_bits_per_char half_life_min half_life_median half_life_max plasticity".split()
)
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


def flops_per_byte(model: ByteLM, cfg: Knobs) -> float:
    """Model FLOPs of forward and backward, for MFU: 6 for each use of a matrix's weight, attention
    counted causal within its window, and the chunks of the blocks' memory."""
    decoder_steps = PATCH - 2 + (READS if cfg.decoder == "scaled" else 1)  # the first has no state
    uses = {"decoder.gru.weight_hh": decoder_steps, "decoder.out.weight": PATCH}
    uses |= {"decoder.grams.out.weight": PATCH, "byte_memory.doubt.weight": PATCH}
    uses |= {"decoder.grams.table": 0, "embed.weight": 0, "decoder.embed.weight": 0}
    products = 0
    for name, p in model.named_parameters():
        often = cfg.thinking_steps if name.startswith("thinking") else 1
        products += p.numel() * uses.get(name, often) * (p.dim() > 1)
    N = cfg.sequence_length // PATCH
    keys = cfg.window_patches if cfg.carry_state else min(cfg.window_patches, N / 2)
    memory = (2 * CHUNK + 4 * cfg.n_embd // cfg.n_head) * cfg.n_embd * (cfg.memory != "off")
    return (6 * products + cfg.n_layer * (12 * keys * cfg.n_embd + 3 * memory)) / PATCH


def disk_bytes(model: ByteLM, cfg: Knobs) -> int:
    """Of a run's files at the most: KEEP weights, the best, one being written; KEEP checkpoints of
    weights, two moments and the rows' tables of the memory by bytes, and one being written."""
    n_params = sum(p.numel() for p in model.parameters())
    tables = 24 * len(HISTORIES) * cfg.mem_rows * (cfg.memory != "off")
    carried = cfg.batch_size * tables * cfg.carry_state
    return 4 * n_params * (cfg.keep + 2) + (12 * n_params + carried) * (cfg.keep + 1)


def run_step(model: ByteLM, rows: int, cfg: Knobs) -> None:
    """A micro-batch of zeros, forward and backward."""
    zeros = torch.zeros(rows, cfg.sequence_length, dtype=torch.long, device=model.plasticity.device)
    model(zeros, zeros)[0].mean().backward()


def plan(cfg: Knobs, world: World) -> dict[str, object]:
    """What --dry_run and the log show. Raises UserError for what the run would refuse."""
    check_compiler(cfg.compile, cfg.device)
    with torch.device("meta"):
        model = ByteLM(cfg)
        facts = plan_facts(cfg, world, model, partial(run_step, cfg=cfg))
    step_bytes = cfg.batch_size * cfg.sequence_length
    total_bytes = step_bytes * cfg.num_iterations
    facts |= {
        "tokens per step": f"{step_bytes:,} bytes",
        "training tokens": f"{total_bytes:,} in {cfg.num_iterations} steps",
        "compute": f"{flops_per_byte(model, cfg) * total_bytes:.3g} FLOPs",
        "disk": f"up to {disk_bytes(model, cfg) / 2**20:,.0f} MiB at KEEP={cfg.keep}",
        "window reach": f"{cfg.n_layer * (cfg.window_patches - 1) * PATCH:,} bytes",
    }
    try:
        train, val, sha = open_byte_files(cfg.data, ROOT / "data", PATCH, download=False)
    except NotFetched as error:
        return facts | {"data": error}
    epochs = total_bytes / train.total
    facts["data"] = f"{train.total:,} bytes, {val.total:,} to validate{sha and ', sha256 '}{sha}"
    facts["epochs"] = f"{epochs:.2f} in {Batches(train, cfg, world).num_windows} windows a strip"
    if epochs > MANY_EPOCHS:
        facts["warning"] = (
            f"this run would read {train.total / 1e6:.1f} MB of text {epochs:.0f} times; name more "
            f"text with DATA=wikipedia:tr or DATA=FOLDER, or lower NUM_ITERATIONS"
        )
    return facts


# ----------------------------------------------------------------------------
# Training


@dataclass
class TrainState:
    """With model, optimizer, loss scale and carried state, all that the next step depends on."""

    step: int = 0
    rolled_back: int = 0
    val_bits_per_char: float = math.nan


def compile_model(model: ByteLM, cfg: Knobs, world: World, precision: torch.autocast) -> str:
    """Compile the parts that repeat, and train a micro-batch of zeros. Returns what went wrong on
    any rank, after which nothing is compiled, or ''."""
    parts = [*model.blocks, model.decoder, model.thinking, model.byte_memory]
    parts = [part for part in parts if part is not None]
    problem = ""
    try:
        if cfg.flex and world.device.type == "cuda":
            model.flex_masks = flex_masks(cfg, world.device)
        for part in parts:
            part.forward = torch.compile(part.forward, dynamic=False)
        with precision:
            run_step(model, choose_rows(cfg, world, model, run_step), cfg)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler fails in any way; training does not depend on it
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    problems = [p for p in world.gather(problem) if p]
    if problems:
        model.flex_masks = {}
        for part in parts:
            vars(part).pop("forward", None)  # the class's own again
    return problems[0] if problems else ""


def flex_masks(cfg: Knobs, device: torch.device) -> dict[bool, object]:
    """FlexAttention's masks of a row: of a fresh one, which has no keys before it, and others."""
    from torch.nn.attention.flex_attention import create_block_mask

    N, w = cfg.sequence_length // PATCH, cfg.window_patches
    masks = {}
    for fresh in (True, False):
        first = w - 1 if fresh else 0
        sees = lambda b, h, i, j, first=first: (j >= i) & (j < i + w) & (j >= first)
        masks[fresh] = create_block_mask(sees, None, None, N, w - 1 + N, device=device)
    return masks


def half_lives(model: ByteLM) -> tuple[str, dict[str, float]]:
    """Half-lives of both memories: a log line, and columns of metrics.csv."""
    line, columns, found = "half_life_patches:", {}, model.half_lives()
    if found.numel():
        for name in ("min", "median", "max"):
            columns[f"half_life_{name}"] = getattr(found, name)().item()
            line += f" {name}:{columns[f'half_life_{name}']:.4g}"
    if model.byte_memory is not None:
        by_length = zip(HISTORIES, model.byte_memory.half_lives().tolist(), strict=True)
        line += " half_life_bytes_by_history:" + ",".join(f"{n}:{h:.0f}" for n, h in by_length)
    return line, columns


def log_validation(
    session: Session, model: ByteLM, state: TrainState, loss: float, share: float
) -> None:
    """Record a validation; share: characters per byte."""
    bpc = loss / math.log(2)
    state.val_bits_per_char = bpc / share if share else math.nan
    words, columns = half_lives(model)
    columns |= dict(val_bpc=bpc, val_bits_per_char=state.val_bits_per_char)
    note = f" val_bpc:{bpc:.4f} val_bits_per_char:{state.val_bits_per_char:.4f}"
    session.log_validation(state.step, loss, note, **columns)
    session.say(words)
    session.row.update(final_val_bpc=bpc, val_bits_per_char=state.val_bits_per_char)
    if session.progress.best_loss == loss:
        export_weights(session, model, "best_model_scaled.pth")
    write_metrics_json(session.folder, session.cfg.log_every, session.world)


def save(session: Session, saved: dict) -> None:
    """A checkpoint to resume from, and the same weights for other programs."""
    session.save(saved["state"].step, **saved)
    name = f"checkpoint_step_{saved['state'].step:04d}.pth"
    export_weights(session, saved["model"], name, "last_model_scaled.pth", keep=session.cfg.keep)


def roll_back(session: Session, saved: dict) -> bool:
    """After a step that was not finite: to the last checkpoint, once, and on at half the rate."""
    state = saved["state"]
    if session.cfg.on_nan != "rollback" or state.rolled_back:
        return False
    session.reset()
    if session.restore(**saved) is None:
        session.stop("nan", "ON_NAN=rollback: there is no checkpoint to go back to")
        return False
    state.rolled_back = 1
    session.say(f"rolled back to step:{state.step}; from here on at half the learning rate")
    save(session, saved)  # so that a resume knows of it
    return True


def build_model(cfg: Knobs, world: World, dtype: torch.dtype) -> ByteLM:
    model = ByteLM(cfg)
    model.init_weights(cfg.seed)
    if cfg.init_from:
        found = read_model_weights(cfg.init_from, "train_scaled.py", MODEL_KNOBS, cfg)
        model.load_state_dict(found["model"])
    if cfg.fla:
        use_fla(model, world)
    if world.device.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")  # the memory's fp32 products on TF32 cores
    return model.to(world.device)


def train(cfg: Knobs, world: World, session: Session, batches: Batches, val: TokenShards) -> None:
    dtype = DTYPES[choose_precision(cfg.precision, world.device)]
    precision = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    model = build_model(cfg, world, dtype)
    gradients = flat_gradients(model)
    adam, loss_scale = AdamW(model, cfg), LossScale(dtype).to(world.device)
    carried, state = CarriedState(cfg, world), TrainState()
    saved = dict(model=model, adam=adam, loss_scale=loss_scale, carried=carried, state=state)
    facts = plan(cfg, world) | dict(precision=f"{dtype}; state and decay of the memory in fp32")
    session.describe(model, flops_per_byte(model, cfg), facts)
    check_disk(
        session.folder, disk_bytes(model, cfg), world, "lower KEEP, or set LOGS_FOLDER elsewhere"
    )
    session.restore(**saved)
    session.say(half_lives(model)[0])
    if cfg.compile and (problem := compile_model(model, cfg, world, precision)):
        session.say(f"compile: failed, training goes on without it ({problem})")
    gradients.zero_()
    prefetch = Prefetch(batches.make, state.step, world.device)

    while True:
        # -------- clock stopped: evaluate, save, leave --------
        session.between_steps(state.step, finished=state.step >= cfg.num_iterations)
        if session.status == "nan" and roll_back(session, saved):
            prefetch.close()
            prefetch = Prefetch(batches.make, state.step, world.device)
        if session.should_validate:
            loss, share = evaluate(model, val, precision, cfg, world)
            log_validation(session, model, state, loss, share)
        if session.should_save:
            save(session, saved)
        if session.stopping:
            break

        # -------- clock running: one optimizer step --------
        session.start_clock()
        x_BT, y_BT = prefetch.get(state.step)
        if batches.starts_over(state.step):
            carried.reset()
        model.plasticity.fill_(plasticity(state.step, cfg))
        train_loss = torch.zeros((), device=world.device)
        micro_batches = zip(
            x_BT.split(cfg.device_batch_size), y_BT.split(cfg.device_batch_size), strict=True
        )
        for i, (x, y) in enumerate(micro_batches):
            seed_dropout(cfg, state.step, world.rank, i)
            with precision:
                nll_BT, past = model(x.long(), y.long(), carried.states[i])
            loss = nll_BT.sum() / (cfg.batch_size * cfg.sequence_length)
            (loss * loss_scale.scale).backward()
            train_loss += loss.detach()
            carried.keep(i, past)
        world.all_reduce(gradients)  # each rank has added its share of the batch's mean
        gradients /= loss_scale.scale
        grad_norms = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()]))
        overflow = loss_scale.update(grad_norms)
        lr = cfg.lr * lr_scale(state.step, cfg) * (0.5 if state.rolled_back else 1.0)
        all_finite = session.step(
            state.step + 1,
            train_loss,
            lr=lr,
            grad_norms=grad_norms,
            overflow=overflow,
            plasticity=model.plasticity / world.size,
        )
        gradients *= (cfg.grad_clip / grad_norms.norm()).clamp(max=1.0)
        adam.step(lr, all_finite)
        gradients.zero_()
        state.step += 1
    prefetch.close()
    session.notes += ["rolled_back=1"] * state.rolled_back


def main() -> int:
    cfg = read_knobs(Knobs, PRESETS, doc=__doc__)
    if cfg.dry_run:
        return show_plan(cfg, plan, RESULTS)
    with join_world(cfg.device, HINT) as world:
        check_compiler(cfg.compile, cfg.device)
        text, val, _ = open_byte_files(cfg.data, ROOT / "data", PATCH)
        batches = Batches(text, cfg, world)
        session = Session(
            cfg,
            world,
            total_steps=cfg.num_iterations,
            tokens_per_step=cfg.batch_size * cfg.sequence_length,
            data={"training": text.content, "validation": val.content},
            columns=RESULTS,
            column_knobs={"learning_rate": "lr"},
            presets=PRESETS,
            resume_may_differ=RESUME_MAY_DIFFER,
            sources=[__file__],
            steps_per_epoch=text.total / (cfg.batch_size * cfg.sequence_length),
            validate_at_start=False,
            log_every=cfg.log_every,
            metrics=METRICS,
            unit="bytes",
            out_of_memory="lower DEVICE_BATCH_SIZE, or set RECOMPUTE=1",
        )
        with session:
            train(cfg, world, session, batches, val)
    return session.exit_code


if __name__ == "__main__":
    launch(main)
