"""train_scaled.py -- a 133M byte-level language model: attention windows and decaying memories.

    PRESET=demo python train_scaled.py     a laptop, no download
    nohup python3 -u train_scaled.py > training_scaled_50k.log 2>&1 &    one GPU, 50,000 steps
    DATA=my.txt python train_scaled.py     your own text
    DATA=texts/ PRESET=phase8 python train_scaled.py    the original, in exact mathematics

After a crash start the same command with RUN_ID=NAME, the run's folder in logs/, and with >> for >:
it goes on from the last checkpoint.

Text is cut into patches of 4 bytes. Blocks of window attention beside a decaying memory pass over
the patches, and a small recurrent decoder writes the bytes of the next patch. The memory is
Hebbian; a second one, by bytes, remembers what followed the last few, wherever patches begin.

Size     133,505,646 parameters; PRESET=phase8: 129,302,416. Figures: docs/scaled.md
Shapes   B rows, T bytes, N = T / 4 patches, D model width, H heads, E = D / H head width, F width
         of a memory's values, C patches of a chunk, M chunks, G histories; x_BND is (B, N, D)
Units    SLIDING_WINDOW and half-lives in patches; losses in nats per byte
Raises   UserError (one line, exit code 2) where a user can help
Sources  AGIFORMER phase 8 (inkbytefo/agi-former, a393cb5), from its description
Shared   plumbing/ keeps the run alive. What affects a loss: byte_batches.py (text order),
         splits.py (held-out text), row_states.py (carried states), device.py (PRECISION=auto)
Marks    "differs": how it departs from train_gpt.py
"""

import hashlib
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.checkpoint import checkpoint

from histories import AGES, BYTES, FOLLOWERS, HISTORIES, LONGEST, HistoryTables, SuffixHash, Tables
from plumbing import ROOT, Session, knob, read_knobs, show_plan
from plumbing.byte_batches import ByteBatches, ScoredBytes
from plumbing.byte_knobs import BYTE_RUN_KNOBS, ByteRunKnobs
from plumbing.byte_records import export_saved, record_validation
from plumbing.byte_runs import (
    compile_model,
    describe_run,
    open_bytes,
    plan_bytes,
    results_columns,
    session_options,
)
from plumbing.byte_scores import evaluate, probe_backward
from plumbing.data import Prefetch
from plumbing.device import CudaGraph, check_machine, choose_precision, choose_rows
from plumbing.exports import check_run_fits, load_model_weights
from plumbing.rollback import roll_back
from plumbing.row_states import RowStates, State, row_states
from plumbing.world import World, flat_gradients, join_world, launch

# ---------------- Knobs

PATCH = 4  # bytes
CHUNK = 64  # patches that the blocks' memory treats at once
PAST = 2 * PATCH  # bytes before a patch that the decoder is given
NGRAMS = (3, 4, 5, 6)  # bytes; lengths of the decoder's n-grams
NGRAM_WIDTH = 64  # channels of a row of their tables
AHEAD_WEIGHT = 0.3  # of the latent's own loss; 1 was tried, n=1 each
HALF_LIVES = (5, 16)  # log2 of patches; of the first and the last head with MEM_INIT=log
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("scaled", "original")

# fmt: off
ORIGINAL = dict(
    blocks="original", decoder="original", mem_rows=0, dropout=0.1, carry_state=False,
    batch_size=8, sequence_length=1024, schedule="constant", lr=2e-4, beta2=0.999,
    weight_decay=0.01, decay_on="all")
PRESETS = {
    "scaled": {},
    "phase8": ORIGINAL | dict(sliding_window=256, mem_range=0.995, mem_init=8.0),
    "phase7": ORIGINAL | dict(
        n_embd=512, n_layer=6, n_head=8, sliding_window=128, mem_range=0.99, mem_init=0.0,
        num_iterations=20000, warmup_iters=100, lr=3e-4, batch_size=4, device_batch_size=4),
    "demo": dict(
        device="cpu", compile=False, n_embd=128, n_layer=2, n_head=2, sliding_window=16,
        thinking_steps=1, mem_rows=8192, sequence_length=512, batch_size=8, device_batch_size=8,
        num_iterations=300, warmup_iters=20, lr=3e-3, val_every=100, val_bytes=65536,
        save_every=100),
}
# fmt: on
# Knobs of a model's shape and mathematics: weights fit only where all are the same.
MODEL_KNOBS = "blocks decoder n_embd n_layer n_head sliding_window memory mem_range".split()
MODEL_KNOBS += "mem_init mem_rows ngram_rows delta_rule thinking_steps".split()
# These may differ on resuming: they move no loss but by rounding. With DROPOUT > 0, another number
# of ranks, DEVICE_BATCH_SIZE or COMPILE draws other masks.
RESUME_MAY_DIFFER = [*BYTE_RUN_KNOBS, "preset"]


@dataclass(frozen=True)
class Knobs(ByteRunKnobs):
    preset: str = knob("scaled", "named set of defaults", choices=tuple(PRESETS), group="knobs")
    blocks: str = knob("scaled", "scaled: ours; original: phase 8's", choices=KINDS, group="model")
    decoder: str = knob("scaled", "scaled: ours; original: phase 8's", choices=KINDS)
    n_layer: int = knob(12, "number of blocks", low=1)
    n_head: int = knob(12, "number of heads, of attention and of the memory", low=1)
    n_embd: int = knob(768, "model width, in channels", low=8)
    sliding_window: int | None = knob(
        64, "patches a query sees; off: a whole row", low=1, none="off"
    )
    memory: str = knob("on", "zero: read, but not used; off: none", choices=("on", "zero", "off"))
    mem_range: float = knob(0.0, "lowest retention of the blocks' memory", low=0, high=0.9999)
    mem_init: float | None = knob(
        None, "initial logit of all retentions; log: half-lives 32 to 65536", none="log"
    )
    delta_rule: bool = knob(False, "a write replaces what its key held, by a learned share")
    mem_rows: int = knob(65536, "rows of each table of the memory by bytes; 0: none", low=0)
    ngram_rows: int = knob(12288, "rows of each n-gram table of DECODER=scaled; 0: none", low=0)
    thinking_steps: int = knob(3, "passes of the weight-tied MLP after the blocks", low=0)
    dropout: float = knob(0.0, "dropout of input, memory and blocks' MLPs", low=0, high=0.9)
    warmup_iters: int = knob(500, "steps of linear warm-up", low=0, group="schedule")
    schedule: str = knob("linear", "lr after the warm-up", choices=("constant", "linear"))
    curriculum: bool = knob(False, "retention times 0.10; 0.50 from 15% of steps; 0.99 from 40%")
    lr: float = knob(6e-4, "peak learning rate of AdamW", low=0)
    beta2: float = knob(0.95, "second beta of AdamW", low=0, high=0.99999)
    weight_decay: float = knob(0.1, "weight decay of AdamW", low=0)
    decay_on: str = knob("matrices", "what weight decay acts on", choices=("matrices", "all"))
    grad_clip: float = knob(0.5, "largest norm of the gradient", above=0)
    precision: str = knob(
        "auto", "number format of products", choices=("auto", *DTYPES), group="machine"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"N_EMBD={self.n_embd} must be N_HEAD={self.n_head} times an even width"
            )
        row_patches = self.sequence_length // PATCH
        if self.window_patches > row_patches:
            raise ValueError(
                f"SLIDING_WINDOW={self.sliding_window} patches do not fit SEQUENCE_LENGTH="
                f"{self.sequence_length} bytes = {row_patches} patches; lower it, or set it to off"
            )
        if self.warmup_iters > self.num_iterations > 0:
            raise ValueError(
                f"WARMUP_ITERS={self.warmup_iters} exceeds NUM_ITERATIONS={self.num_iterations}"
            )
        if self.blocks == "original" and self.delta_rule:
            raise ValueError("BLOCKS=original divides by a sum of keys: set DELTA_RULE=0")
        lowest = 0.5 ** (1 / 2 ** HALF_LIVES[0])
        if self.mem_init is None and self.mem_range >= lowest:
            raise ValueError(
                f"MEM_INIT=log starts with a retention of {lowest:.3f}, below MEM_RANGE="
                f"{self.mem_range}; set MEM_RANGE=0, or a number as MEM_INIT"
            )

    @property
    def window_patches(self) -> int:
        return self.sliding_window or self.sequence_length // PATCH


# ---------------- Model: windows

Past = tuple[Tensor, ...]  # a block keeps keys, values, then its memory's state
Rotary = tuple[Tensor, Tensor]  # cos and sin of positions
rms_norm = partial(nn.RMSNorm, eps=1e-6)


def split_heads(qkv_BNX: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """q, k and v (B, H, N, E) of their joint projection."""
    return qkv_BNX.unflatten(2, (3, n_head, -1)).transpose(1, 3).unbind(2)


def merge_heads(x_BHNE: Tensor) -> Tensor:
    return x_BHNE.transpose(1, 2).flatten(2)


def rotary_tables(position_N: Tensor, width: int) -> Rotary:
    """cos and sin (N, width / 2) of positions (Su et al., arXiv 2104.09864). Angles are fp64, as
    positions of BLOCKS=original grow: at 50 million, fp32 would be off by up to 2 radians.
    """
    channel = torch.arange(0, width, 2, device=position_N.device, dtype=torch.float64)
    angle = position_N[:, None] * 10000.0 ** (-channel / width)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels, one of each half, with phase 8's sign."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def window_mask(N: int, w: int, position: Tensor) -> Tensor:
    """Which keys each of N queries sees, the first of which has `position` patches before it.

    (1, blocks, L, w + L) for blocks of L = min(N, w) queries, each of which sees keys from w before
    its block on: linear in N.
    """
    L = min(N, w)
    i = torch.arange(L, device=position.device)[:, None]
    j = torch.arange(w + L, device=position.device)
    seen = ((j > i) & (j <= i + w)).repeat(-(-N // L), 1, 1)
    seen[0] &= j >= w - position
    return seen[None]


def window_attention(q: Tensor, k: Tensor, v: Tensor, w: int, mask: Tensor | None) -> Tensor:
    """Attention of q (B, H, N, E) to the last w keys, itself included. Keys and values begin with
    the w - 1 patches before, unless mask is None: then the row begins here and fits the window.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    N, L = q.size(2), mask.size(2)

    def blocks_of_keys(k: Tensor) -> Tensor:
        """(B * H, blocks, w + L, E): w keys before each block of L queries, and its own."""
        k = F.pad(k, (0, 0, 1, -N % L))
        if N <= w:
            return k.flatten(0, 1)[:, None]
        k = k.unflatten(2, (-1, w))
        return torch.cat([k[:, :, :-1], k[:, :, 1:]], 3).flatten(0, 1)

    q = F.pad(q, (0, 0, 0, -N % L)).unflatten(2, (-1, L))
    y = F.scaled_dot_product_attention(q.flatten(0, 1), blocks_of_keys(k), blocks_of_keys(v), mask)
    return y.view(q.shape).flatten(2, 3)[:, :, :N]


def join_past(k: Tensor, v: Tensor, past: Past, no_past: bool) -> tuple[Tensor, Tensor, Past]:
    """Keys and values after those of the w - 1 patches before, and the last w - 1 of them all."""
    old_keys, old_values = past[:2]
    if not no_past:
        k = torch.cat([old_keys.type_as(k), k], 2)
        v = torch.cat([old_values.type_as(v), v], 2)
    cut = (0, 0, old_keys.size(2) - k.size(2), 0)  # zeros stand in front where there are fewer
    return k, v, (F.pad(k, cut), F.pad(v, cut))


# ---------------- Model: the blocks' memory


def exp_lower(exponent: Tensor) -> Tensor:
    """exp on and below the diagonal; 0 above it, where an exponent may be large."""
    keep = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=exponent.device).tril()
    return exponent.masked_fill(~keep, -math.inf).exp()


def chunk_states(keep: Tensor, added: Tensor, first: Tensor) -> Tensor:
    """S_{n+1} = keep_n S_n + added_n: the M + 1 states (B, H, M + 1, E, F) from S_0 = first on.

    Each round doubles the chunks that a state covers.
    """
    states = torch.cat([first[:, :, None], added], 2)
    keep = F.pad(keep, (0, 0, 0, 0, 1, 0))
    for level in range(added.size(2).bit_length()):
        shift = (0, 0, 0, 0, 2**level, -(2**level))
        states = states + keep @ F.pad(states, shift)
        keep = keep @ F.pad(keep, shift)
    return states


def decaying_memory(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, delta_rule: bool = False
) -> tuple[Tensor, Tensor]:
    """S_t = e^log_decay_t S_{t-1} + k_t u_t^T and o_t = S_t^T q_t: o (B, H, N, F) and the last S.
    u_t is v_t, or with the delta rule v_t less what k_t reads of the decayed S_{t-1}.

    q and k (B, H, N, E), v (B, H, N, F), log_decay <= 0 (B or 1, H, N), S (B, H, E, F), all fp32
    tensors without autocast. All chunks at once, exact but for rounding at any decay and length: no
    exponent is positive. Yang et al., Gated Linear Attention, arXiv 2312.06635; Gated DeltaNet,
    2412.06464.
    """
    N = q.size(2)
    C = min(CHUNK, N)
    # Zeros fill the last chunk.
    q, k, v = (F.pad(t, (0, 0, 0, -N % C)).unflatten(2, (-1, C)) for t in (q, k, v))
    log_since_start = F.pad(log_decay, (0, -N % C)).unflatten(2, (-1, C)).cumsum(3)[..., None]
    total = log_since_start[..., -1:, :]
    within = exp_lower(log_since_start - log_since_start.mT)  # (B, H, M, C, C), of patch j at i
    k_to_end = (k * (total - log_since_start).exp()).mT
    if delta_rule:
        # A write u depends on those before it in the chunk, and linearly on the state S before it:
        # u = solved_v - solved_k S, for all patches at once (the papers' WY form). The solver reads
        # only what lies below the diagonal, and takes the diagonal to be 1.
        right = torch.cat([v, k * log_since_start.exp()], -1)
        lower = within * (k @ k.mT)
        solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
        solved_v, solved_k = solved.split([v.size(-1), k.size(-1)], -1)
        keep = total.exp() * torch.eye(k.size(-1), device=k.device) - k_to_end @ solved_k
        states = chunk_states(keep, k_to_end @ solved_v, state)
        v = solved_v - solved_k @ states[:, :, :-1]
    else:
        # The state before chunk n sums what is left of the first state and of what each chunk
        # before n has added: row n of `across`, in fp64 as its exponents subtract long sums.
        edges = F.pad(total[..., 0, 0].double().cumsum(2), (1, 0))[..., None]
        across = exp_lower(edges - edges.mT).float()  # (B, H, M + 1, M + 1)
        states = torch.cat([state[:, :, None], k_to_end @ v], 2)
        states = (across @ states.flatten(3)).view_as(states)
    output = (q @ k.mT * within) @ v + (q * log_since_start.exp()) @ states[:, :, :-1]
    return output.flatten(2, 3)[:, :, :N], states[:, :, -1].contiguous()


def log_retention(logit: Tensor, low: float, plasticity: Tensor) -> Tensor:
    """log(plasticity (low + (1 - low) sigmoid(logit))), accurate where nearly all is kept."""
    if low == 0:
        return F.logsigmoid(logit) + plasticity.log()
    return torch.log1p(-(1 - low) * torch.sigmoid(-logit)) + plasticity.log()


def initial_retention(cfg: Knobs) -> Tensor:
    """Logits (H,) as MEM_INIT says: all the same, or for half-lives evenly spaced in logarithms."""
    if cfg.mem_init is not None:
        return torch.full((cfg.n_head,), cfg.mem_init)
    half_life_H = torch.logspace(*HALF_LIVES, cfg.n_head, base=2, dtype=torch.float64)
    kept_H = 0.5 ** (1 / half_life_H)
    return ((kept_H - cfg.mem_range) / (1 - kept_H)).log().float()


def unit_length(x: Tensor) -> Tensor:
    """x over its length. A text's first key starts as zero, where a smaller constant than this has
    gradients that overflow in fp16.
    """
    return x * (x.square().sum(-1, keepdim=True) + 1e-3).rsqrt()


def products_in(dtype: torch.dtype, x: Tensor) -> torch.autocast:
    """Products with x in dtype; fp32 ends an autocast around it."""
    kind = "cuda" if x.is_cuda else "cpu"
    return torch.autocast(kind, dtype, enabled=dtype != torch.float32)


class OriginalMemory(nn.Module):
    """Phase 8's memory: keys and queries are ELU + 1, what is read is divided by the sum of its
    weights, and each head has one retention. The last column of the values makes that sum.
    """

    def __init__(self, cfg: Knobs):
        super().__init__()
        D = cfg.n_embd
        self.cfg = cfg
        self.qkv, self.proj, self.norm = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.LayerNorm(D)
        self.retention = nn.Parameter(initial_retention(cfg))

    def state_shapes(self, B: int) -> list[tuple[int, ...]]:
        E = self.cfg.n_embd // self.cfg.n_head
        return [(B, self.cfg.n_head, E, E + 1)]

    def forward(self, h_BND: Tensor, past: Past, plasticity: Tensor) -> tuple[Tensor, Past]:
        """What is read, (B, N, D), and the state after the N patches."""
        cfg = self.cfg
        qkv = self.qkv(h_BND)
        with products_in(torch.float32, h_BND):
            q, k, v = split_heads(qkv.float(), cfg.n_head)
            q = (F.elu(q) + 1) * q.size(-1) ** -0.5
            k = F.elu(k) + 1
            v = F.pad(v, (0, 1), value=1.0)
            log_decay = log_retention(self.retention, cfg.mem_range, plasticity)
            log_decay = log_decay[None, :, None].expand(1, -1, q.size(2))
            read, matrix = decaying_memory(q, k, v, log_decay, past[0])
            read = read[..., :-1] / (read[..., -1:] + 1e-6)
        read = self.norm(self.proj(merge_heads(read)))
        return F.dropout(read, cfg.dropout, self.training), (matrix,)


class ScaledMemory(nn.Module):
    """Our memory: a short convolution, keys and queries of length 1, a retention that the input
    moves, a norm per head in place of the division, and a gate on what is read.
    """

    def __init__(self, cfg: Knobs):
        super().__init__()
        D, H = cfg.n_embd, cfg.n_head
        self.cfg = cfg
        self.qkv, self.gate = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.conv_kernel = nn.Parameter(torch.zeros(4, 3 * D))  # three patches before, then this
        self.conv_bias = nn.Parameter(torch.zeros(3 * D))
        self.retention = nn.Parameter(initial_retention(cfg))
        self.retention_shift = nn.Linear(D, H, bias=False)  # what the input adds to them
        self.head_norm = rms_norm(D // H)
        self.beta = nn.Linear(D, H) if cfg.delta_rule else None  # share that a write replaces
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A key starts as the query of the patch before, so that what followed a patch is found
        by that patch from the first step on. Without it, recall is hardly learned.
        """
        D = self.cfg.n_embd
        self.retention_shift.weight.zero_()
        self.qkv.weight[D : 2 * D] = self.qkv.weight[:D]
        self.qkv.bias[D : 2 * D] = self.qkv.bias[:D]
        self.conv_kernel[3, :D] = 1
        self.conv_kernel[2, D : 2 * D] = 1
        self.conv_kernel[3, 2 * D :] = 1

    def state_shapes(self, B: int) -> list[tuple[int, ...]]:
        D, H = self.cfg.n_embd, self.cfg.n_head
        return [(B, H, D // H, D // H), (B, 3, 3 * D)]

    def convolve(self, qkv: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Depthwise and causal, as four shifted products: one kernel when compiled."""
        N = qkv.size(1)
        whole = torch.cat([past.type_as(qkv), qkv], 1)
        kernel = self.conv_kernel.type_as(qkv)
        mixed = sum(whole[:, i : i + N] * kernel[i] for i in range(4))
        return F.silu(mixed + self.conv_bias.type_as(qkv)), whole[:, N:].contiguous()

    def forward(self, h_BND: Tensor, past: Past, plasticity: Tensor) -> tuple[Tensor, Past]:
        """As OriginalMemory.forward."""
        cfg = self.cfg
        matrix, conv = past
        qkv, conv = self.convolve(self.qkv(h_BND), conv)
        logit = self.retention[:, None] + self.retention_shift(h_BND).mT
        with products_in(torch.float32, h_BND):
            log_decay = log_retention(logit.float(), cfg.mem_range, plasticity)
            q, k, v = split_heads(qkv.float(), cfg.n_head)
            q, k = unit_length(q), unit_length(k)
            if self.beta is not None:  # roots on k and v make a write beta k u^T
                root = (0.5 * F.logsigmoid(self.beta(h_BND.float()))).exp().mT[..., None]
                k, v = k * root, v * root
            read, matrix = decaying_memory(q, k, v, log_decay, matrix, cfg.delta_rule)
            read = self.head_norm(read)
        read = merge_heads(read) * F.silu(self.gate(h_BND))
        return F.dropout(read, cfg.dropout, self.training), (matrix, conv)


# ---------------- Model: blocks


def make_mlp(D: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))


class OriginalBlock(nn.Module):
    """Phase 8's block: attention (without positions) and a memory, each projected, then summed."""

    def __init__(self, cfg: Knobs):
        super().__init__()
        D = cfg.n_embd
        self.cfg = cfg
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(D), nn.LayerNorm(D), make_mlp(D)
        self.qkv, self.proj, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, D)
        self.memory = None if cfg.memory == "off" else OriginalMemory(cfg)

    def forward(
        self, x_BND: Tensor, past: Past, rotary: Rotary, mask: Tensor | None, plasticity: Tensor
    ) -> tuple[Tensor, Past]:
        """The N patches after this block, and the state after them."""
        cfg = self.cfg
        h = self.norm1(x_BND)
        q, k, v = split_heads(self.qkv(h), cfg.n_head)
        k, v, new = join_past(k, v, past, mask is None)
        mixed = self.proj(merge_heads(window_attention(q, k, v, cfg.window_patches, mask)))
        if self.memory is not None:
            read, kept = self.memory(h, past[2:], plasticity)
            new += kept
            if cfg.memory == "on":
                mixed = mixed + read
        x_BND = x_BND + self.out(mixed)
        return x_BND + F.dropout(self.mlp(self.norm2(x_BND)), cfg.dropout, self.training), new


class ScaledBlock(nn.Module):
    """Our block: rotary window attention beside a memory, joined by one projection."""

    def __init__(self, cfg: Knobs):
        super().__init__()
        D = cfg.n_embd
        self.cfg = cfg
        self.norm1, self.norm2 = rms_norm(D), rms_norm(D)
        self.qkv, self.mlp = nn.Linear(D, 3 * D), make_mlp(D)
        self.memory = None if cfg.memory == "off" else ScaledMemory(cfg)
        self.out = nn.Linear(D if self.memory is None else 2 * D, D)

    def forward(
        self, x_BND: Tensor, past: Past, rotary: Rotary, mask: Tensor | None, plasticity: Tensor
    ) -> tuple[Tensor, Past]:
        cfg, N = self.cfg, x_BND.size(1)
        h = self.norm1(x_BND)
        q, k, v = split_heads(self.qkv(h), cfg.n_head)
        # Keys are kept unrotated: each call rotates them, as only distances matter.
        k, v, new = join_past(k, v, past, mask is None)
        cos, sin = (table[-k.size(2) :] for table in rotary)
        q, k = rotate(q, cos[-N:], sin[-N:]), rotate(k, cos, sin)
        mixed = merge_heads(window_attention(q, k, v, cfg.window_patches, mask))
        if self.memory is not None:
            read, kept = self.memory(h, past[2:], plasticity)
            new += kept
            if cfg.memory == "zero":
                read = torch.zeros_like(read)
            mixed = torch.cat([mixed, read.type_as(mixed)], -1)
        x_BND = x_BND + self.out(mixed)
        return x_BND + F.dropout(self.mlp(self.norm2(x_BND)), cfg.dropout, self.training), new


class PatchRefiner(nn.Module):
    """A gated MLP, applied several times to each patch by itself."""

    def __init__(self, cfg: Knobs, norm: type[nn.Module]):
        super().__init__()
        D = cfg.n_embd
        self.steps = cfg.thinking_steps
        self.norm, self.gate, self.mlp = norm(D), nn.Linear(D, D), make_mlp(D)

    def forward(self, z_BND: Tensor) -> Tensor:
        for _ in range(self.steps):
            h = self.norm(z_BND)
            z_BND = z_BND + torch.sigmoid(self.gate(h)) * self.mlp(h)
        return z_BND


# ---------------- Model: bytes


class NGramTables(nn.Module):
    """Learned vectors for the last 3, 4, 5 and 6 bytes.

    A hash of the bytes names a row in the table of each length. The four rows, side by side, are
    projected and added to the decoder's hidden state: common histories, which the GRU would learn
    slowly, are looked up. Rows begin at zero.
    Hashed n-gram embeddings: Pagnoni et al., Byte Latent Transformer, arXiv 2412.09871.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows
        self.table = nn.Parameter(torch.zeros(len(NGRAMS) * rows, NGRAM_WIDTH))
        self.hash = SuffixHash(NGRAMS, PAST)
        self.out = nn.Linear(len(NGRAMS) * NGRAM_WIDTH, BYTES, bias=False)
        self.register_buffer("first", torch.arange(len(NGRAMS)) * rows, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(.., 256) for the bytes (.., 8) before the predicted one."""
        rows = self.hash(x) % self.rows + self.first
        return self.out(F.embedding(rows, self.table).flatten(-2))


class OriginalDecoder(nn.Module):
    """The bytes of the next patch, one after another, by a GRU that reads the byte before and the
    latent of the patches before. In each patch it starts from a zero state and a byte 0.
    """

    def __init__(self, cfg: Knobs):
        super().__init__()
        self.latent, self.embed = nn.Linear(cfg.n_embd, BYTES), nn.Embedding(BYTES, BYTES)
        self.gru, self.out = nn.GRUCell(2 * BYTES, BYTES), nn.Linear(BYTES, BYTES)
        self.grams = self.ahead = None

    def step(self, hidden: Tensor, given: Tensor) -> Tensor:
        """The GRU's cell: the next hidden state from the last and the input's product."""
        of_hidden = F.linear(hidden, self.gru.weight_hh, self.gru.bias_hh)
        gates, candidate = given.split([2 * BYTES, BYTES], -1)
        hidden_gates, hidden_candidate = of_hidden.split([2 * BYTES, BYTES], -1)
        reset, keep = torch.sigmoid(gates + hidden_gates).chunk(2, -1)
        new = torch.tanh(candidate + reset * hidden_candidate)
        return (1 - keep) * new + keep * hidden

    def bytes_read(self, x: Tensor, own: Tensor) -> Tensor:
        """The bytes that the GRU reads in a patch: a byte 0, and the patch's own but the last."""
        return F.pad(own, (1, 0))

    def byte_inputs(self) -> Tensor:
        """The GRU's product with each byte, (256, 3 * 256)."""
        return F.linear(self.embed.weight, self.gru.weight_ih[:, :BYTES])

    def forward(
        self, z_BND: Tensor, x: Tensor, y: Tensor, of_byte: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits, fp32, of the bytes y (B, N, 4) of patches, and the GRU's hidden states, both
        (B, N, 4, 256), given the latent before each patch, the 8 bytes x (B, N, 8) before it, and
        the bytes before them in their own patch. of_byte: byte_inputs(), where they are known.
        """
        of_byte = self.byte_inputs() if of_byte is None else of_byte
        weight = self.gru.weight_ih[:, BYTES:]
        of_latent = F.linear(self.latent(z_BND), weight, self.gru.bias_ih)
        own = y[..., :-1]
        hidden, states = torch.zeros_like(of_latent[..., :BYTES]), []
        for byte in F.embedding(self.bytes_read(x, own), of_byte).unbind(2):
            hidden = self.step(hidden, of_latent + byte)
            states.append(hidden)
        hidden = torch.stack(states[-PATCH:], 2)  # before, it read the last patch
        decoded = hidden
        if self.grams is not None:
            decoded = hidden + self.grams(torch.cat([x, own], -1).unfold(-1, PAST, 1))
        return self.out(decoded).float(), hidden


class ScaledDecoder(OriginalDecoder):
    """The same GRU, which first reads the patch before, so that its weights learn short histories
    from every byte; and beside it tables of n-grams.

    Both soon predict so well that the latent, noise at first, is ignored and never taught. So
    training also has the next patch predicted from the latent alone, by a layer of its own. Several
    bytes from one latent: Gloeckle et al., Multi-token Prediction, arXiv 2404.19737.
    """

    def __init__(self, cfg: Knobs):
        super().__init__(cfg)
        self.grams = NGramTables(cfg.ngram_rows) if cfg.ngram_rows else None
        self.ahead = nn.Linear(cfg.n_embd, PATCH * BYTES)

    def look_ahead(self, z_BND: Tensor) -> Tensor:
        """Logits (B, N, 4, 256), fp32, of the bytes of the next patch, from the latent alone."""
        return self.ahead(z_BND).unflatten(-1, (PATCH, BYTES)).float()

    def bytes_read(self, x: Tensor, own: Tensor) -> Tensor:
        return torch.cat([x[..., -PATCH:], own], -1)


class ByteMemory(nn.Module):
    """Predicts the bytes that followed the last few (HISTORIES) earlier in the text, wherever
    patches begin. histories.py has its tables.

    It mixes as PPM does (Cleary and Witten, 1984). From the shortest history to the longest, what
    followed it goes into the model's distribution p, and a part e escapes to p as it was:

        p <- (1 - e) * followers + e * p

    `followers` are the history's last eight, weighted by rank as learned. The logit of e sums, for
    each length, learned terms of the counts of followers and of different bytes, the age of the
    newest, and the hidden state; with no follower e is 1. Caches beside a model: Grave et al.,
    arXiv 1612.04426. What followed the same history: Akyurek et al., arXiv 2401.12973.
    """

    def __init__(self, rows: int):
        super().__init__()
        G = len(HISTORIES)
        self.tables = HistoryTables(rows)
        # Escapes start as PPM's method C has them: q different bytes among n followers, q to n.
        n = torch.arange(FOLLOWERS + 1).clamp(min=1)
        log_odds = (n[None, :] / n[:, None]).log()
        # Vectors, each a table laid flat, so that DECAY_ON=matrices spares them.
        self.escape_by_count = nn.Parameter(log_odds.repeat(G, 1).flatten())
        self.escape_by_age = nn.Parameter(torch.zeros(G * AGES))
        self.escape_by_state = nn.Linear(BYTES, G)
        self.log_rank_weight = nn.Parameter(torch.zeros(G * FOLLOWERS))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.escape_by_state.weight)
        nn.init.zeros_(self.escape_by_state.bias)

    def mix(self, logits: Tensor, hidden: Tensor, followers: Tensor, age: Tensor) -> Tensor:
        """log p (.., 256), fp32, from the decoder's logits and hidden states (.., 256), and from
        the tables: followers (.., G, 8), and the age in bytes of each length's newest (.., G).
        """
        G, counts = len(HISTORIES), FOLLOWERS + 1
        found, different = self.tables.count(followers)
        length = torch.arange(G, device=logits.device)
        by_count = self.escape_by_count.view(G, counts, counts)
        escape = by_count[length, found, different] + self.escape_by_state(hidden).float()
        escape = escape + self.escape_by_age.view(G, AGES)[length, self.tables.age_class(age)]
        # log_left[g] is what lengths g, g + 1, ... leave; [0] is the model's share. A product of
        # escapes, as a sum of logarithms: the gradient of cumprod would wait for the device.
        log_escape = torch.where(found > 0, F.logsigmoid(escape), 0.0)
        log_left = F.pad(log_escape.flip(-1).cumsum(-1).flip(-1), (0, 1))
        log_taken = F.logsigmoid(-escape) + log_left[..., 1:]

        weight = (followers > 0) * self.log_rank_weight.view(G, FOLLOWERS).exp()
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)
        weight = weight * log_taken.exp()[..., None]
        byte = (followers.long() - 1).clamp(min=0)  # stored as byte + 1, 0 for none
        p = log_left[..., :1].exp() * logits.softmax(-1)
        return p.scatter_add(-1, byte.flatten(-2), weight.flatten(-2)).clamp(min=1e-30).log()

    def forward(
        self, logits: Tensor, hidden: Tensor, text: Tensor, first: Tensor, tables: Tables
    ) -> tuple[Tensor, Tables]:
        """log p (B, T, 256) of the last T bytes of `text`, and the tables after them."""
        followers, age, writes = self.tables.read(text, first, tables)
        tables = tuple(table.clone() for table in tables)
        self.tables.write(tables, writes)
        return self.mix(logits, hidden, followers, age), tables


# ---------------- Model


class ByteLM(nn.Module):
    """Bytes to patches, through the blocks, to the bytes of the next patch.

    Patch n has seen bytes 0 .. 4n + 3 and its latent predicts bytes 4n + 4 .. 4n + 7: with
    x = s[i : i + T] the targets are y = s[i + 4 : i + 4 + T]. Products have `dtype`; parameters,
    the residual stream and the memories are fp32 tensors.
    """

    def __init__(self, cfg: Knobs, dtype: torch.dtype = torch.float32):
        super().__init__()
        D = cfg.n_embd
        self.cfg, self.dtype = cfg, dtype
        norm, block = rms_norm, ScaledBlock
        if cfg.blocks == "original":
            norm, block = nn.LayerNorm, OriginalBlock
        decoder = OriginalDecoder if cfg.decoder == "original" else ScaledDecoder
        self.embed, self.patch = nn.Embedding(BYTES, D), nn.Conv1d(D, D, PATCH, stride=PATCH)
        self.norm_in, self.norm_out = norm(D), norm(D)
        self.blocks = nn.ModuleList(block(cfg) for _ in range(cfg.n_layer))
        self.thinking = PatchRefiner(cfg, norm) if cfg.thinking_steps else nn.Identity()
        self.decoder = decoder(cfg)
        self.byte_memory = None
        if cfg.mem_rows and cfg.memory != "off":
            self.byte_memory = ByteMemory(cfg.mem_rows)
        # Multiplies every retention of the blocks' memory. Saved, so that it is applied as trained.
        self.register_buffer("plasticity", torch.ones(()))

    def init_weights(self, seed: int) -> None:
        """PyTorch's initialisation. Each module draws from a seed of its own, made of SEED
        and its name: a part more or less changes no other part's weights.
        """
        with torch.random.fork_rng(devices=[]):
            for name, module in reversed(list(self.named_modules())):  # parts before their whole
                if hasattr(module, "reset_parameters"):
                    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                    torch.manual_seed(int.from_bytes(digest[:7], "big"))
                    module.reset_parameters()

    def empty_state(self, B: int) -> State:
        """The state of B rows before their first patch, as large as any later one. The rows share
        one position, in patches; the layers are a Past for each block, the last bytes, and the
        tables of the memory by bytes.
        """
        cfg, new = self.cfg, self.plasticity.new_zeros
        keys = (B, cfg.n_head, cfg.window_patches - 1, cfg.n_embd // cfg.n_head)
        layers = []
        for block in self.blocks:
            of_memory = [] if block.memory is None else block.memory.state_shapes(B)
            layers.append(tuple(new(shape) for shape in (keys, keys, *of_memory)))
        layers.append((new((B, LONGEST - PATCH), dtype=torch.long),))
        layers.append(() if self.byte_memory is None else self.byte_memory.tables.empty(B))
        return State(new((), dtype=torch.long), layers)

    def trunk(self, x_BT: Tensor, state: State, at_start: bool = False) -> tuple[Tensor, State]:
        """Latents (B, N, D) of the patches of x, which continue `state`, and the state after them,
        but for the tables of the memory by bytes, which logits() moves on. at_start: no row has
        seen a patch.
        """
        cfg, w, N = self.cfg, self.cfg.window_patches, x_BT.size(1) // PATCH
        mask = None
        if not at_start or N > w:
            mask = window_mask(N, w, state.position)
        z = self.embed(x_BT).unflatten(1, (N, PATCH)).flatten(2)
        z = F.linear(z, self.patch.weight.mT.flatten(1), self.patch.bias)  # faster than conv1d
        patch = torch.arange(w - 1 + N, device=x_BT.device)
        rotary = rotary_tables(patch, cfg.n_embd // cfg.n_head)
        if cfg.blocks == "original":
            z = rotate(z, *rotary_tables(state.position + patch[:N], cfg.n_embd))
        z = F.dropout(self.norm_in(z.float()), cfg.dropout, self.training)
        *of_blocks, (seen,), tables = state.layers
        layers = []
        for block, past in zip(self.blocks, of_blocks, strict=True):
            if cfg.recompute and self.training:
                block = partial(checkpoint, block, use_reentrant=False)
            z, new = block(z, past, rotary, mask, self.plasticity)
            layers.append(new)
        z = self.thinking(self.norm_out(z))
        seen = torch.cat([seen, x_BT], 1)[:, PATCH - LONGEST :]
        return z, State(state.position + N, [*layers, (seen,), tables])

    def logits(
        self, x_BT: Tensor, y_BT: Tensor, past: State | None = None
    ) -> tuple[Tensor, State, list[tuple[float, Tensor]]]:
        """Logits (B, T, 256), fp32, of the targets y, each given all bytes before it; the state
        after x (of the tables: after y); and pairs (weight, logits) whose losses on y add
        their gradients only. past: the state before x, None at the beginning of a text.
        """
        old = self.empty_state(len(x_BT)) if past is None else past
        *_, (seen,), tables = old.layers
        z_BND, state = self.trunk(x_BT, old, at_start=past is None)
        before = torch.cat([seen[:, -PATCH:], x_BT], 1).unfold(1, PAST, PATCH)
        logits, hidden = self.decoder(z_BND, before, y_BT.unflatten(1, (-1, PATCH)))
        logits, hidden = logits.flatten(1, 2), hidden.flatten(1, 2)
        extra = []
        if self.training and self.decoder.ahead is not None:
            extra.append((AHEAD_WEIGHT, self.decoder.look_ahead(z_BND).flatten(1, 2)))
        if self.byte_memory is None:
            return logits, state, extra
        text = torch.cat([seen, x_BT[:, :PATCH], y_BT], 1)
        first = PATCH * old.position + 1  # the first target has time 1
        # Detached: a decoder that learned from the mix would lean on the memory, and do worse while
        # that is young.
        given = logits.detach(), hidden.detach()
        mixed, state.layers[-1] = self.byte_memory(*given, text, first, tables)
        if self.cfg.memory == "zero":
            return logits, state, extra
        return mixed, state, [*extra, (1.0, logits)]

    def forward(
        self, x_BT: Tensor, y_BT: Tensor, past: State | None = None
    ) -> tuple[Tensor, State]:
        """-log p of each target byte, (B, T), in nats, and the state after x. A target of -1
        scores 0; its byte is that of x, or 0 behind x.
        """
        known = torch.where(y_BT < 0, F.pad(x_BT[:, PATCH:], (0, PATCH)), y_BT)
        with products_in(self.dtype, x_BT):
            logits, state, extra = self.logits(x_BT, known, past)

        def nll(logits: Tensor) -> Tensor:
            rows = logits.flatten(0, 1), y_BT.flatten()
            return F.cross_entropy(*rows, ignore_index=-1, reduction="none").view_as(y_BT)

        loss = nll(logits)
        if self.training:
            for weight, other in extra:
                own = weight * nll(other)
                loss = loss + (own - own.detach())  # adds its gradient but no value
        return loss, state


# ---------------- Optimizer


# differs: matrices decay, vectors as DECAY_ON says
class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, which skips a step where the device flag `all_finite` is down."""

    def __init__(self, model: ByteLM, cfg: Knobs):
        least_dim = 1 if cfg.decay_on == "all" else 2
        decayed = [p for p in model.parameters() if p.dim() >= least_dim]
        spared = [p for p in model.parameters() if p.dim() < least_dim]
        groups = [dict(params=decayed), dict(params=spared, weight_decay=0.0)]
        decay = cfg.weight_decay
        super().__init__(groups, cfg.lr, (0.9, cfg.beta2), weight_decay=decay, fused=True)

    def step(self, lr: float, all_finite: Tensor) -> None:
        for group in self.param_groups:
            group["lr"] = lr
        self.found_inf = (~all_finite).float()  # how torch's GradScaler tells the fused kernel
        super().step()


# ---------------- Schedule


# differs: constant or down to zero after the warm-up
def lr_scale(step: int, cfg: Knobs) -> float:
    """Up to 1 over the first WARMUP_ITERS updates, then 1, or down to 0 at NUM_ITERATIONS."""
    if step < cfg.warmup_iters:
        return (step + 1) / cfg.warmup_iters
    if cfg.schedule == "constant":
        return 1.0
    return 1 - (step - cfg.warmup_iters) / (cfg.num_iterations - cfg.warmup_iters)


def plasticity(step: int, cfg: Knobs) -> float:
    """What multiplies every retention of the blocks' memory in update `step`. CURRICULUM caps
    half-lives at 0.3, 1 and 69 patches, one after another.
    """
    if not cfg.curriculum:
        return 1.0
    if step < 0.15 * cfg.num_iterations:
        return 0.10
    if step < 0.40 * cfg.num_iterations:
        return 0.50
    return 0.99


def seed_dropout(cfg: Knobs, step: int, rank: int) -> None:
    """Masks are a function of seed, step and rank, so that a resume needs no generator's state."""
    if cfg.dropout:
        words = np.random.SeedSequence([cfg.seed, step, rank]).generate_state(1, np.uint32)
        torch.manual_seed(int(words[0]))


# ---------------- Training

RESULTS = results_columns(
    "preset blocks decoder n_embd n_layer n_head sliding_window memory delta_rule"
)
plan = partial(plan_bytes, make_model=ByteLM, ahead=PATCH)  # (cfg, world): what --dry_run shows


# differs: it counts rollbacks
@dataclass
class TrainState:
    """What a step depends on besides model, optimizer, scaler and carried states."""

    step: int = 0
    rolled_back: int = 0


def build_model(cfg: Knobs, world: World) -> ByteLM:
    dtype = DTYPES[choose_precision(cfg.precision, world.device)]
    model = ByteLM(cfg, dtype)
    model.init_weights(cfg.seed)
    if cfg.init_from:
        load_model_weights(model, cfg.init_from, "train_scaled.py", MODEL_KNOBS)
    if world.device.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")  # the memories' fp32 products in TF32
    return model.to(world.device)


def run_backward_pass(
    model: ByteLM, carried: RowStates, scaler: GradScaler, rows: int, x_BT: Tensor, y_BT: Tensor
) -> Tensor:
    """Adds up the gradients of this rank's part of a step, some rows at a time, and moves their
    states on. Returns its part of the step's mean loss per byte, in nats.
    """
    cfg = model.cfg
    train_loss = torch.zeros((), device=x_BT.device)
    for first in range(0, len(x_BT), rows):
        part = slice(first, first + rows)
        nll_BT, past = model(x_BT[part].long(), y_BT[part].long(), carried.take(part))
        loss = nll_BT.sum() / (cfg.batch_size * cfg.sequence_length)
        scaler.scale(loss).backward()
        train_loss += loss.detach()
        carried.put(part, past)
    return train_loss


# differs: states are carried, gradients clipped; one optimizer
def train(cfg: Knobs, session: Session, batches: ByteBatches, val: ScoredBytes) -> None:
    world = session.world
    model = build_model(cfg, world)
    gradients = flat_gradients(model)
    adam = AdamW(model, cfg)
    scaler = GradScaler(world.device.type, enabled=model.dtype == torch.float16)
    carried, state = row_states(model, world), TrainState()
    saved = dict(model=model, adam=adam, scaler=scaler, carried=carried, state=state)
    describe_run(session, model, PATCH)
    check_run_fits(session, model, carried)
    session.restore(**saved)
    rows = choose_rows(cfg, world, model, probe_backward)
    if cfg.compile:
        compile_model(session, model, rows)  # block by block
    backward_pass = partial(run_backward_pass, model, carried, scaler, rows)
    if cfg.uses_cuda_graph:  # see its limits there
        backward_pass = CudaGraph(backward_pass, world.device)
    prefetch = Prefetch(batches.make, state.step, world.device)

    while True:
        # -------- clock stopped: evaluate, save, leave --------
        session.between_steps(state.step, finished=state.step >= cfg.num_iterations)
        if roll_back(session, saved):
            prefetch.close()
            prefetch = Prefetch(batches.make, state.step, world.device)
        if session.should_validate:
            loss = evaluate(model, val, rows, world)
            record_validation(session, model, loss, val)
        if session.should_save:
            export_saved(session, model)  # first: if killed in between, a resume exports again
            session.save(state.step, **saved)
        if session.stopping:
            break

        # -------- clock running: one optimizer step --------
        session.start_clock()
        x_BT, y_BT = prefetch.get(state.step)
        carried.start_step(batches.starts_over(state.step))
        model.plasticity.fill_(plasticity(state.step, cfg))  # equal on all ranks, logged as a sum
        seed_dropout(cfg, state.step, world.rank)
        gradients.zero_()
        train_loss = backward_pass(x_BT, y_BT)
        world.all_reduce(gradients)  # a sum: each rank divided its loss by the whole batch
        scaler.unscale_(adam)
        grad_norms = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()]))
        overflow = ~grad_norms.isfinite().all() & scaler.is_enabled()  # fp16: skipped, no fault
        lr = cfg.lr * lr_scale(state.step, cfg) * 0.5**state.rolled_back
        state.step += 1
        figures = state.step, train_loss, lr, grad_norms, overflow
        all_finite = session.step(*figures, plasticity=model.plasticity / world.size)
        gradients *= (cfg.grad_clip / grad_norms.norm()).clamp(max=1.0)
        adam.step(lr, all_finite)
        scaler.update()
    prefetch.close()
    session.notes += ["rolled_back=1"] * state.rolled_back


# differs: bytes of text
def main() -> int:
    cfg = read_knobs(Knobs, PRESETS, doc=__doc__)
    if cfg.dry_run:
        return show_plan(cfg, plan, RESULTS)
    with join_world(cfg.device, "set DEVICE=cpu; PRESET=demo is a size for that") as world:
        check_machine(cfg, world.device)
        batches, val = open_bytes(cfg, world, PATCH)
        session = Session(
            cfg,
            world,
            **session_options(cfg, batches, val, ["plasticity"]),
            columns=RESULTS,
            presets=PRESETS,
            resume_may_differ=RESUME_MAY_DIFFER,
            sources=[__file__, ROOT / "histories.py"],
            out_of_memory="lower DEVICE_BATCH_SIZE, or set RECOMPUTE=1",
        )
        with session:
            train(cfg, session, batches, val)
    return session.exit_code


if __name__ == "__main__":
    launch(main)
