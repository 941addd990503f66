"""train_gpu.py -- HAMT: a language model whose layers keep a holographic associative memory.

    python train_gpu.py --preset demo                      a CPU, minutes, no download
    python train_gpu.py --preset 100m --mixer attention    the rotary transformer of the same size
    torchrun --standalone --nproc_per_node=8 train_gpu.py --preset 124m --precision bf16 --compile

A layer writes each token's item v, bound to a key k of unit modulus, into S slots by address w, and
reads by address a and key q: M_t = decay_t * M_{t-1} + w_t (k_t v_t), r_t = conj(q_t) (a_t M_t).
The output is W_o(norm(r_t) silu(g_t)). However long the past is, a layer keeps M and, for its short
convolution, its 3 newest inputs, and the model keeps the position.

Expect   --preset demo: val_loss falls from 5.5 to 1.64 nats per byte (n=1); see docs/hamt.md
Shapes   B sequences, T tokens, C model width, D memory width (D/2 complex bins), H heads, E = D / H
         values of a head, K = E / 2 bins of a head, S slots of a head, L tokens of a chunk,
         J chunks, N tokens of a micro-batch, V vocabulary, P parameter tensors, X any width
Units    losses in nats per token; phases in radians
Raises   UserError (one line, exit code 2) where a user can help
Sources  holographic reduced representations: Plate 1995; keys of unit modulus: Ganesan et al.,
         arXiv 2109.02157; chunks and decay: GLA, arXiv 2312.06635; convolution: Mamba, 2312.00752
Shared   plumbing/ keeps the run alive. Of it, beside the data, only text_batches.py (order of
         tokens, random bits by seed, step and row) and row_states.py (CARRY_STATE) move a loss
"""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plumbing import Session, flops_per_token, knob, read_knobs, show_plan
from plumbing.data import Prefetch
from plumbing.device import check_machine, choose_rows
from plumbing.kernels import fla_attention
from plumbing.row_states import State, row_states
from plumbing.splits import Split
from plumbing.text_batches import TextBatches, dropout_mask, micro_batches, random_bits
from plumbing.text_knobs import TEXT_RUN_KNOBS, TextRunKnobs
from plumbing.text_runs import open_text, plan_text, results_columns, session_options
from plumbing.text_scores import evaluate, log_final, log_validation, probe_backward
from plumbing.world import World, flat_gradients, join_world, launch

# ---------------- Knobs

# fmt: off
PRESETS = {  # sizes: parameters of either mixer, within 3%, with GPT-2's vocabulary
    "original": {},
    "33m": dict(n_embd=384, hcm_dim=384, n_layer=8, num_slots=8, n_head=6),
    "50m": dict(n_embd=512, hcm_dim=512, n_layer=8, num_slots=8, n_head=4),
    "100m": dict(n_embd=640, hcm_dim=1536, n_layer=10, num_slots=16, n_head=4),
    "124m": dict(n_embd=768, hcm_dim=768, n_layer=12, num_slots=16, n_head=4),
    "200m": dict(n_embd=896, hcm_dim=2048, n_layer=12, num_slots=16, n_head=4),
    "demo": dict(
        device="cpu", precision="fp32", data="embedded", tokenizer="bytes",
        n_embd=128, hcm_dim=128, n_layer=2, num_slots=16, n_head=4, dropout=0.0,
        sequence_length=128, batch_size=16, device_batch_size=16, num_iterations=400, lr=3e-3,
        val_every=50, save_every=100, max_val_samples=256),
}
# fmt: on
# These change rounding only (with TIME_BUDGET_S, also the steps that it has time for).
RESUME_MAY_DIFFER = [*TEXT_RUN_KNOBS, "preset", "chunk_length"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Knobs(TextRunKnobs):
    preset: str = knob("original", "named set of defaults", choices=tuple(PRESETS), group="model")
    mixer: str = knob("hamt", "what mixes tokens", choices=("hamt", "attention"))
    n_embd: int = knob(512, "model width, in channels", low=2)
    hcm_dim: int = knob(2048, "memory width in real numbers, two for a complex bin", low=2)
    n_layer: int = knob(8, "blocks", low=1)
    n_head: int = knob(8, "heads, each with addresses and phases of its own", low=1)
    num_slots: int = knob(16, "slots of a head's memory", low=1)
    conv: bool | None = knob(None, "causal convolution of 4 tokens; auto: on for hamt", none="auto")
    use_gating: bool = knob(True, "gate the memory's read with SiLU")
    slowest_decay: float = knob(
        2**-7, "share that the slowest slot forgets a token", above=0, high=0.25
    )
    memory: str = knob(
        "on",
        "reads find all tokens (on), their own (local) or none",
        choices=("on", "local", "off"),
    )
    chunk_length: int = knob(64, "tokens of a chunk, for speed only", low=1, high=128)
    dropout: float = knob(0.1, "rate for embeddings and layer outputs", low=0, high=0.95)
    use_auxiliary_loss: bool = knob(False, "also train recall of earlier items")
    aux_loss_weight: float = knob(0.1, "weight of that loss; train_loss omits it", low=0)
    use_scheduler: bool = knob(True, "cosine to a tenth of LR", group="optimizer and schedule")
    time_budget_s: float | None = knob(None, "seconds for the schedule", above=0, none="off")
    warmup_iters: int | None = knob(None, "auto: 2% of the steps, at most 1000", low=0, none="auto")
    lr: float = knob(3e-4, "peak learning rate of AdamW", low=0)
    weight_decay: float = knob(0.01, "weight decay of embedding and projections", low=0)
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0: no clipping", low=0)
    precision: str = knob(
        "fp16", "number format of products", choices=tuple(DTYPES), group="machine"
    )

    def __post_init__(self):
        super().__post_init__()
        wants = f"N_HEAD={self.n_head} times an even number"
        if self.hcm_dim % (2 * self.n_head):
            raise ValueError(f"HCM_DIM={self.hcm_dim} must be {wants}")
        if self.mixer == "attention" and self.n_embd % (2 * self.n_head):
            raise ValueError(f"N_EMBD={self.n_embd} must be {wants}")
        uses_memory = self.use_auxiliary_loss or self.memory != "on" or self.carry_state
        if self.mixer == "attention" and uses_memory:
            raise ValueError("USE_AUXILIARY_LOSS, MEMORY and CARRY_STATE are for MIXER=hamt only")

    @property
    def has_conv(self) -> bool:
        return self.mixer == "hamt" if self.conv is None else self.conv

    @property
    def ffn_width(self) -> int:
        """4 times the model width; with attention, what gives both mixers' models one size."""
        width = 4 * self.n_embd
        if self.mixer == "attention":
            with torch.device("meta"):
                mixers = Memory(replace(self, mixer="hamt")), Attention(self)
            memory, attention = (sum(p.numel() for p in m.parameters()) for m in mixers)
            width += round((memory - attention) / (2 * self.n_embd))
        return width


# ---------------- Model: keys, convolution, dropout

CONV_LENGTH = 4  # tokens
INIT_STD = 0.02
MAX_DECAY = 1.0  # limit of -log(decay): exponents of 128 tokens stay within +-64

Tensors = tuple[Tensor, ...]
Mixed = tuple[Tensor, Tensors, Tensor | None]  # a layer's output, state and auxiliary loss


def autocast(x: Tensor, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in dtype; fp32 ends an outer autocast. A meta tensor counts as a CPU's."""
    device_type = "cuda" if x.is_cuda else "cpu"
    return torch.autocast(device_type, dtype, enabled=dtype != torch.float32)


def key_of(phase: Tensor, dtype: torch.dtype) -> Tensors:
    """Real and imaginary part of a key of unit modulus."""
    return phase.cos().to(dtype), phase.sin().to(dtype)


def bind(item: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    """Real and imaginary part of an item times a key, which key_of() has made. The item (.., E) has
    its real parts before its imaginary ones. The product of two spectra is the spectrum of the
    vectors' circular convolution.
    """
    real, imaginary = item.chunk(2, dim=-1)
    return real * cos - imaginary * sin, imaginary * cos + real * sin


def unbind(bound: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    """Multiply by the conjugate key, which undoes bind."""
    return bind(bound, cos, -sin)


def angles_at(cfg: Knobs, position: Tensor, T: int, dtype: torch.dtype) -> Tensor | Tensors:
    """Phases (T, 1, bins of a head) of tokens from `position` on, by which keys turn; for attention
    their key_of(). All bins of attention turn, and half of a memory's, so that it reads by
    content and by distance. Products are fp64, reduced to one turn: position 10^6 is as precise as
    position 1.
    """
    bins = turning = cfg.n_embd // cfg.n_head // 2
    if cfg.mixer == "hamt":
        bins = cfg.hcm_dim // cfg.n_head // 2
        turning = round(bins / 2)
    index = torch.arange(bins, dtype=torch.float64, device=position.device)
    frequency = torch.where(index < turning, 1e4 ** -(index / max(turning, 1)), 0.0)
    positions = position + torch.arange(T, device=position.device)
    phases = torch.outer(positions.double(), frequency)[:, None] % (2 * math.pi)
    phases = phases.to(dtype)
    return key_of(phases, dtype) if cfg.mixer == "attention" else phases


def join_past(past: Tensor, x: Tensor) -> Tensors:
    """Inputs (B, T, C) of a layer behind the `past` that its convolution needs; and the next past,
    a copy, as a view would keep all of them alive.
    """
    joined = torch.cat([past.type_as(x), x], dim=1)
    return joined, joined[:, x.size(1) :].to(past.dtype, copy=True)


def causal_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise convolution of CONV_LENGTH - 1 + T tokens (B, .., X), which gives T tokens, with a
    kernel (CONV_LENGTH, X). The compiler joins such shifted products with the rest.
    """
    T = x.size(1) + 1 - CONV_LENGTH
    y = x[:, :T] * kernel[0]
    for i in range(1, CONV_LENGTH):
        y = torch.addcmul(y, x[:, i : i + T], kernel[i])
    return y.type_as(x)


def dropout(x: Tensor, kept: Tensor | None, p: float) -> Tensor:
    return x if kept is None else torch.where(kept, x / (1 - p), 0.0)


# ---------------- Model: gated linear attention


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, L: int
) -> Tensors:
    """Reads (B, H, T, E) and the state (B, H, S, E) after the last token.

    state_t = exp(log_decay_t) * state_{t-1} + k_t v_t^T and read_t = q_t state_t, per head, for
    q, k and log_decay (B, H, T, S) and v (B, H, T, E). Here q and k are the header's addresses a
    and w, and v its bound item. Every chunk length L gives the same up to rounding. Products with v
    have its type; the rest, and all for a single token, has the type of the state.
    """
    T = v.size(2)
    if T == 1:
        return recurrent_step(q, k, v, log_decay, state)
    L = min(L, T)
    group = 1 if T <= 256 * L else 32  # chunks of a second-level group
    missing = -T % (L * group)
    inputs = q, k, v, log_decay
    if missing > 0:  # filled up with tokens that write and forget nothing
        inputs = [F.pad(x, (0, 0, 0, missing)) for x in inputs]
    q, k, v, log_decay = (x.unflatten(2, (-1, L)) for x in inputs)  # each (B, H, J, L, X)
    since_start = log_decay.cumsum(3)
    # Exponents count from a constant in the middle of their range. A middle taken from the decays
    # themselves would let a later token move an earlier one by a rounding error.
    middle = -MAX_DECAY * L / 2
    centred = since_start - middle
    falling = centred.exp()
    q_falling = q * falling
    k_rising = k * (-centred).exp()  # 1 / falling would square in its gradient
    k_at_end = k_rising * falling[:, :, :, -1:]
    scores = (q_falling @ k_rising.mT).tril()
    added = (k_at_end.type_as(v).mT @ v).type_as(state)
    states, state = states_between(added, since_start[:, :, :, -1], state, group)
    q_at_start = q_falling * math.exp(middle)
    read = scores.type_as(v) @ v + q_at_start.type_as(v) @ states.type_as(v)
    return read.flatten(2, 3)[:, :, :T], state


def recurrent_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensors:
    """gated_linear_attention of one token, by its definition."""
    q, k, v, log_decay = (x.type_as(state) for x in (q, k, v, log_decay))
    state = state * log_decay.exp().mT + k.mT @ v
    return q @ state, state


def states_between(added: Tensor, log_decay: Tensor, state: Tensor, group: int) -> Tensors:
    """(B, H, J, S, E) states before each of J chunks, and the one after the last.

    A state after a chunk is exp(log_decay) * the state before it + added. The work of decayed_sums
    grows with J squared, so that many chunks are summed in groups first.
    """
    if group == 1:
        added = torch.cat([state[:, :, None], added], dim=2)  # added to an empty state
        after = decayed_sums(added, F.pad(log_decay, (0, 0, 1, 0)))
        return after[:, :, :-1], after[:, :, -1]
    added, log_decay = added.unflatten(2, (-1, group)), log_decay.unflatten(2, (-1, group))
    inner, since_start = decayed_sums(added, log_decay), log_decay.cumsum(-2)
    outer, state = states_between(inner[:, :, :, -1], since_start[:, :, :, -1], state, 1)
    after = inner + since_start.exp()[..., None] * outer[:, :, :, None]
    return torch.cat([outer[:, :, :, None], after[:, :, :, :-1]], dim=3).flatten(2, 3), state


def decayed_sums(added: Tensor, log_decay: Tensor) -> Tensor:
    """(..., J, S, E): after each of J chunks, what is left of all that was added so far.

    weight[s, i, j] is exp of the sum of log_decay (..., J, S) from j + 1 to i, summed anew for each
    pair: a difference of two long sums would lose the small terms.
    """
    steps = log_decay.mT[..., None].expand(*log_decay.mT.shape, log_decay.size(-2))
    weight_SJJ = steps.tril(-1).cumsum(-2).exp().tril()
    return torch.einsum("...sij,...jse->...ise", weight_SJJ, added)


# ---------------- Model: layers


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


class Memory(nn.Module):
    """The holographic layer: bind, gated linear attention over slots, unbind.

    Keys of writing and of reading come from the same rows of in_proj, and so do both addresses;
    only the convolution makes them differ. So recall is learned far sooner (docs/hamt.md).
    """

    def __init__(self, cfg: Knobs):
        super().__init__()
        self.cfg = cfg
        C, D, bins, slots = cfg.n_embd, cfg.hcm_dim, cfg.hcm_dim // 2, cfg.n_head * cfg.num_slots
        # Rows of in_proj make item, phase of the key, address, forget logit and gate.
        self.widths = [D, bins, slots, slots, D if cfg.use_gating else 0]
        # Convolved: item, write and read phase, write and read address; lags in tokens.
        self.conv_widths, self.conv_lags = [D, bins, bins, slots, slots], (0, 1, 0, 1, 0)
        self.in_proj = parameter(sum(self.widths), C)
        self.out_proj = parameter(C, D)
        self.norm = parameter(D)
        if cfg.has_conv:
            self.conv_kernel = parameter(CONV_LENGTH, sum(self.conv_widths))
        self.decay_bias = parameter(cfg.n_head, cfg.num_slots)

    def empty_state(self, B: int) -> Tensors:
        """M (B, H, S, E), and the newest inputs (B, CONV_LENGTH - 1, C) for the convolution."""
        cfg, new_zeros = self.cfg, self.in_proj.new_zeros
        memory = new_zeros(B, cfg.n_head, cfg.num_slots, cfg.hcm_dim // cfg.n_head)
        return memory, new_zeros(B, CONV_LENGTH - 1 if cfg.has_conv else 0, cfg.n_embd)

    def forward(self, x_BTC: Tensor, state: Tensors, phase_T1K: Tensor, seed_B: Tensor) -> Mixed:
        """The output (B, T, C), the state after the last token, and the auxiliary loss."""
        cfg, T = self.cfg, x_BTC.size(1)
        memory, past = state
        *widths, gated = self.widths
        of_rest, of_gate = self.in_proj.split([sum(widths), gated])
        gate = F.linear(x_BTC, of_gate)
        dtype = gate.dtype  # of products
        x, past = join_past(past, x_BTC.to(dtype))
        parts = F.linear(x, of_rest).split(widths, dim=-1)
        item, phase, address, forget_logit = [x.unflatten(-1, (cfg.n_head, -1)) for x in parts]
        with autocast(x_BTC, torch.float32):  # for phases, decays and the state
            item, write_phase, read_phase, write, read = self.convolve(item, phase, address)
            write_key = key_of(write_phase + phase_T1K, dtype)
            read_key = key_of(read_phase + phase_T1K, dtype)
            write = write.softmax(-1, memory.dtype).transpose(1, 2)
            read = read.softmax(-1, memory.dtype).transpose(1, 2)
            log_decay = -MAX_DECAY * (forget_logit[:, -T:] + self.decay_bias).sigmoid()
            bound = torch.cat([part.transpose(1, 2) for part in bind(item, *write_key)], dim=-1)
            written = write, bound, log_decay.transpose(1, 2), memory
            found, memory = self.recall(read, *written)
            aux = None
            if self.training and cfg.use_auxiliary_loss:
                aux = self.delayed_recall(item, write_key, written, seed_B)
            read_BTD = self.unbind_and_gate(found.transpose(1, 2), read_key, gate)
        # Only the elementwise gate follows the norm, so its weight may scale out_proj's columns.
        y = F.linear(read_BTD.to(dtype), self.out_proj * self.norm)
        return y, (memory, past), aux

    def unbind_and_gate(self, found: Tensor, key: Tensors, gate: Tensor) -> Tensor:
        """norm(unbind(found)) silu(gate), (B, T, D), of what was found (B, T, H, E).

        The norm is taken before unbinding, which keeps lengths, and joining halves comes last: so
        the compiler neither rolls nor copies them.
        """
        normed = F.rms_norm(found, found.shape[-1:], eps=torch.finfo(self.norm.dtype).eps)
        parts = unbind(normed, *key)
        if self.cfg.use_gating:
            gates = gate.unflatten(-1, (self.cfg.n_head, 2, -1)).unbind(-2)
            parts = [part * F.silu(half) for part, half in zip(parts, gates, strict=True)]
        return torch.stack(parts, dim=-2).flatten(2)

    def convolve(self, item: Tensor, phase: Tensor, address: Tensor) -> Tensors:
        """Item, write and read phase, write and read address of each token, all (B, T, H, ..)."""
        if not self.cfg.has_conv:
            return item, phase, phase, address, address
        H = self.cfg.n_head
        D, bins, slots = self.widths[:3]
        of_item, of_phases, of_addresses = self.conv_kernel.split([D, 2 * bins, 2 * slots], dim=1)
        item = causal_conv(item, of_item.unflatten(1, (H, -1)))
        phases = causal_conv(phase[:, :, None], of_phases.unflatten(1, (2, H, -1)))
        addresses = causal_conv(address[:, :, None], of_addresses.unflatten(1, (2, H, -1)))
        return item, *phases.unbind(2), *addresses.unbind(2)

    def recall(
        self, read: Tensor, write: Tensor, bound: Tensor, log_decay: Tensor, memory: Tensor
    ) -> Tensors:
        """What the read addresses find, still bound, and the memory after the last token. Shapes
        are those of gated_linear_attention.
        """
        if self.cfg.memory == "on":
            attend = fla_attention if self.cfg.kernel == "fla" else gated_linear_attention
            return attend(read, write, bound, log_decay, memory, self.cfg.chunk_length)
        if self.cfg.memory == "local":  # a control: what each token finds of its own write
            return (read * write).sum(-1, keepdim=True) * bound, memory
        return torch.zeros_like(bound), memory

    def delayed_recall(
        self, item: Tensor, key: Tensors, written: Tensors, seed_B: Tensor
    ) -> Tensor:
        """1 - cosine between an item and what its own key and address still find of it; each token
        but the first draws one earlier item. The loss is blind to scale, so that nothing is gained
        by making items small. `written`: recall's arguments after the read addresses.
        """
        B, T = item.shape[:2]
        row_B1 = torch.arange(B, device=item.device)[:, None]
        num_earlier_T = torch.arange(T, device=item.device).clamp(min=1)
        drawn = row_B1, random_bits(seed_B, T) % num_earlier_T
        write = written[0].transpose(1, 2)
        found, _ = self.recall(write[drawn].transpose(1, 2), *written)
        cos, sin = key
        found = torch.cat(unbind(found.transpose(1, 2), cos[drawn], sin[drawn]), dim=-1)
        wanted = item[drawn].detach().type_as(write)
        return 1 - F.cosine_similarity(found.type_as(write), wanted, dim=-1)[:, 1:].mean()


class Attention(nn.Module):
    """Causal rotary attention. Its state: all keys and values, and the newest inputs."""

    def __init__(self, cfg: Knobs):
        super().__init__()
        self.cfg = cfg
        C = cfg.n_embd
        self.conv_widths, self.conv_lags = [C, C, C], (0, 1, 0)  # Q, K, V
        self.in_proj = parameter(3 * C, C)
        self.out_proj = parameter(C, C)
        if cfg.has_conv:
            self.conv_kernel = parameter(CONV_LENGTH, 3 * C)

    def empty_state(self, B: int) -> Tensors:
        cfg, new_zeros = self.cfg, self.in_proj.new_zeros
        none = new_zeros(B, 0, cfg.n_head, cfg.n_embd // cfg.n_head)
        return none, none, new_zeros(B, CONV_LENGTH - 1 if cfg.has_conv else 0, cfg.n_embd)

    def forward(self, x_BTC: Tensor, state: Tensors, rotary: Tensors, seed_B: Tensor) -> Mixed:
        """As Memory.forward, without an auxiliary loss."""
        B, T, C = x_BTC.shape
        old_k, old_v, past = state
        if self.cfg.has_conv:
            x_BTC, past = join_past(past, x_BTC)
        made = F.linear(x_BTC, self.in_proj)
        if self.cfg.has_conv:
            made = causal_conv(made, self.conv_kernel)
        q, k, v = (part.view(B, T, self.cfg.n_head, -1) for part in made.split(C, dim=-1))
        q = torch.cat([half.type_as(v) for half in unbind(q, *rotary)], dim=-1)
        k = torch.cat([half.type_as(v) for half in unbind(k, *rotary)], dim=-1)
        mask = None
        if old_k.size(1) > 0:
            k = torch.cat([old_k.type_as(k), k], dim=1)
            v = torch.cat([old_v.type_as(v), v], dim=1)
            mask = torch.ones(T, k.size(1), dtype=torch.bool, device=k.device).tril(old_k.size(1))
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=mask is None)
        y = F.linear(y.transpose(1, 2).reshape(B, T, C), self.out_proj)
        return y, (k, v, past), None


class Block(nn.Module):
    """Pre-norm residual block: a mixer over time, then a GELU FFN.

    A mixer has empty_state(B), and forward(x, state, angles, seed_B), which returns y, the state
    and an auxiliary loss or None; with CONV, conv_kernel, conv_widths and conv_lags. Names that end
    in _proj have weight decay. What asks for cfg.mixer knows the mixers by name.
    """

    def __init__(self, cfg: Knobs):
        super().__init__()
        self.p = cfg.dropout
        self.mixer = Memory(cfg) if cfg.mixer == "hamt" else Attention(cfg)
        self.norm1, self.norm2 = nn.RMSNorm(cfg.n_embd), nn.RMSNorm(cfg.n_embd)
        self.up_proj = parameter(cfg.ffn_width, cfg.n_embd)
        self.down_proj = parameter(cfg.n_embd, cfg.ffn_width)

    def forward(
        self, x_BTC: Tensor, state: Tensors, angles: Tensor | Tensors, seed_B: Tensor, kept: tuple
    ) -> Mixed:
        """`kept`: what dropout keeps of the mixer's output and of the FFN's."""
        y, state, aux = self.mixer(self.norm1(x_BTC), state, angles, seed_B)
        x_BTC = x_BTC + dropout(y, kept[0], self.p)
        hidden = F.gelu(F.linear(self.norm2(x_BTC), self.up_proj))
        y = F.linear(hidden, self.down_proj)
        return x_BTC + dropout(y, kept[1], self.p), state, aux


class Model(nn.Module):
    """Embedding, blocks, RMSNorm; one matrix, `wte`, is embedding and head."""

    def __init__(self, cfg: Knobs):
        super().__init__()
        self.cfg, self.dtype = cfg, DTYPES[cfg.precision]
        self.chunk_loss, self.dropout_mask = chunk_loss_and_gradient, dropout_mask
        self.wte = parameter(cfg.vocabulary, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd)

    def empty_state(self, B: int) -> State:
        position = torch.zeros((), dtype=torch.long, device=self.wte.device)
        return State(position, [block.mixer.empty_state(B) for block in self.blocks])

    def kept(self, seed_B: Tensor, x_BTC: Tensor) -> Tensor | None:
        """What dropout keeps; drawn outside of the compiled block, to keep that small."""
        if not self.training or self.cfg.dropout == 0:
            return None
        return self.dropout_mask(seed_B, x_BTC.shape[1:], self.cfg.dropout)

    def run_block(
        self, block: Block, x_BTC: Tensor, state: Tensors, angles: Tensor | Tensors, seed_B: Tensor
    ) -> Mixed:
        kept = self.kept(seed_B + 1, x_BTC), self.kept(seed_B + 2, x_BTC)
        return block(x_BTC, state, angles, seed_B, kept)

    def hidden(
        self, x_BT: Tensor, state: State | None = None, seed_B: Tensor | None = None
    ) -> tuple[Tensor, State, Tensor]:
        """What the head reads (B, T, C), the state after the last token, the auxiliary loss.
        seed_B, int64, decides what is drawn at random in training.
        """
        cfg, (B, T) = self.cfg, x_BT.shape
        state = self.empty_state(B) if state is None else state
        seed_B = x_BT.new_zeros(B) if seed_B is None else seed_B
        angles = angles_at(cfg, state.position, T, self.wte.dtype)
        run_block = self.run_block
        if cfg.gradient_checkpointing and torch.is_grad_enabled():
            options = dict(use_reentrant=False, preserve_rng_state=False)
            run_block = partial(checkpoint, run_block, **options)
        layers, aux_sum = [], torch.zeros((), device=x_BT.device)
        with autocast(x_BT, self.dtype):
            x_BTC = F.embedding(x_BT, self.wte)
            x_BTC = dropout(x_BTC, self.kept(seed_B, x_BTC), cfg.dropout)
            for i, (block, layer) in enumerate(zip(self.blocks, state.layers, strict=True)):
                x_BTC, layer, aux = run_block(block, x_BTC, layer, angles, seed_B + 3 * i)
                layers.append(layer)
                if aux is not None:
                    aux_sum = aux_sum + aux / cfg.n_layer
            x_BTC = self.norm(x_BTC)
        return x_BTC, State(state.position + T, layers), aux_sum

    def forward(
        self, x_BT: Tensor, y_BT: Tensor, state: State | None = None, seed_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Summed cross-entropy in nats over the targets that are not -1, the auxiliary loss, and
        the state after the last token.
        """
        h_BTC, state, aux = self.hidden(x_BT, state, seed_B)
        h_NC = h_BTC.flatten(0, 1).to(self.dtype)
        arguments = (h_NC, self.wte, y_BT.flatten(), self.chunk_loss, torch.is_grad_enabled())
        return LinearCrossEntropy.apply(*arguments), aux, state

    def head(self, h: Tensor) -> Tensor:
        """Logits (..., V), of which training never forms all."""
        return F.linear(h, self.wte).type_as(self.wte)

    def logits(self, x_BT: Tensor) -> Tensor:
        return self.head(self.hidden(x_BT)[0])


@torch.no_grad()
def init_weights(model: Model, cfg: Knobs) -> None:
    """N(0, INIT_STD), divided by sqrt(2 layers) for what adds to the residual stream. Each tensor
    has its own generator, made of seed and name, so that leaving one out changes no other.
    """
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(1.0)
        elif name.endswith("decay_bias"):
            # from 1/4 to SLOWEST_DECAY, evenly on a log scale; a single slot has 1/4
            spread = torch.linspace(2, -math.log2(cfg.slowest_decay), p.size(1))
            rate = -torch.log1p(-(2.0**-spread)) / MAX_DECAY
            p.copy_(rate.logit().expand_as(p))
        else:
            is_output = name.endswith(("out_proj", "down_proj"))
            std = INIT_STD / math.sqrt(2 * cfg.n_layer) if is_output else INIT_STD
            # published numbers were drawn by these names
            seed_name = name.replace("in_proj", "inp").replace("conv_kernel", "taps")
            seed_name = seed_name.replace("_proj", "")
            digest = hashlib.sha256(f"{cfg.seed} {seed_name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            p.normal_(std=std, generator=generator)
    for block in model.blocks:
        prepare_recall(block.mixer, cfg)


def prepare_recall(mixer: nn.Module, cfg: Knobs) -> None:
    """Gives the weights what recall needs at the start (measured: docs/hamt.md). Phases and
    addresses have std 2: they fill the circle, and slots differ. Convolutions start as copies,
    those of write phases and addresses one token late: token t + 1 is stored under token t, and
    found by it.
    """
    if cfg.mixer == "hamt":
        for part in mixer.in_proj.split(mixer.widths)[1:3]:  # phase and address
            part.mul_(2.0 / (INIT_STD * cfg.n_embd**0.5))
    if cfg.has_conv:
        parts = mixer.conv_kernel.split(mixer.conv_widths, dim=1)
        for part, tokens_late in zip(parts, mixer.conv_lags, strict=True):
            part[CONV_LENGTH - 1 - tokens_late] += 1.0


# ---------------- Loss


# same as train_gpt.py
def chunk_loss_and_gradient(logits_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of some rows, and its gradient with respect to their logits. Rows whose
    target is -1 do not count.
    """
    is_scored_N = target_N >= 0
    index_N1 = target_N.clamp(min=0)[:, None]
    log_probs = F.log_softmax(logits_NV.float(), dim=-1)
    loss = -log_probs.gather(1, index_N1)[:, 0].where(is_scored_N, 0.0).sum()
    gradient = log_probs.exp()
    gradient = gradient.scatter_add(1, index_N1, gradient.new_full(index_N1.shape, -1.0))
    return loss, gradient.where(is_scored_N[:, None], 0.0).to(logits_NV.dtype)


# same as train_gpt.py
class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear head, a chunk of rows at a time: never all (N, V) logits.
    Gradients are formed beside them, in the forward pass. Products have the dtype of `hidden`; sums
    are fp32.
    """

    CHUNK_ROWS = 8192

    @staticmethod
    def forward(ctx, hidden_NC, weight_VC, target_N, chunk_loss, with_gradient) -> Tensor:
        weight = weight_VC.to(hidden_NC.dtype)
        loss_sum = torch.zeros((), device=hidden_NC.device)
        if with_gradient:
            grad_hidden = torch.empty_like(hidden_NC)
            grad_weight = torch.zeros_like(weight_VC)
            ctx.save_for_backward(grad_hidden, grad_weight)
        chunk_rows = LinearCrossEntropy.CHUNK_ROWS
        if not hidden_NC.is_cuda:  # where more rows are no faster
            chunk_rows = min(chunk_rows, 2**26 // len(weight))
        for start in range(0, len(hidden_NC), chunk_rows):
            rows = slice(start, start + chunk_rows)
            loss, grad_logits = chunk_loss(hidden_NC[rows] @ weight.T, target_N[rows])
            loss_sum += loss
            if with_gradient:
                grad_hidden[rows] = grad_logits @ weight
                grad_weight += grad_logits.T @ hidden_NC[rows]
        return loss_sum

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None


# ---------------- Optimizer and schedule


# differs from train_gpt.py: matrices decay and the rest does not, and the gradient is clipped
class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose step is left out where the device flag `all_finite` is down."""

    def __init__(self, model: Model, cfg: Knobs):
        self.grad_clip = cfg.grad_clip
        named = list(model.named_parameters())
        matrices = [p for name, p in named if name.endswith(("wte", "_proj"))]
        others = [p for name, p in named if not name.endswith(("wte", "_proj"))]
        groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=others)]
        super().__init__(groups, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, lr: float, grad_norms_P: Tensor, all_finite: Tensor) -> None:
        for group in self.param_groups:
            group["lr"] = lr
        # As torch's GradScaler tells the fused kernel: what to divide by, and whether to step.
        if self.grad_clip > 0:
            self.grad_scale = (grad_norms_P.norm() / self.grad_clip).clamp(min=1.0)
        self.found_inf = (~all_finite).float()
        super().step()


# differs: total_steps is given, as epochs can decide it
def schedule_position(step: int, spent_s: float, total_steps: int, cfg: Knobs) -> float:
    """Where the schedule stands, in steps; with TIME_BUDGET_S, by the time that is spent."""
    if cfg.time_budget_s is None:
        return step
    return total_steps * spent_s / cfg.time_budget_s


def warmup_steps(total_steps: int, cfg: Knobs) -> int:
    return min(1000, total_steps // 50) if cfg.warmup_iters is None else cfg.warmup_iters


# differs: half a cosine instead of a trapezoid
def lr_scale(position: float, total_steps: int, cfg: Knobs) -> float:
    """Linear up to 1 over the warm-up, then down to a tenth at the end."""
    warmup = warmup_steps(total_steps, cfg)
    if position < warmup:
        return min(1.0, (position + 1) / warmup)  # a budget of time has fractions of steps
    if not cfg.use_scheduler:
        return 1.0
    done = min(1.0, (position - warmup) / max(total_steps - warmup, 1))
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


# ---------------- Records and plan

RESULTS = results_columns(
    "mixer hidden_dim hcm_dim num_layers num_slots num_attention_heads conv memory "
    "use_auxiliary_loss"
)


# differs: a text may have to be fetched
def plan(cfg: Knobs, world: World) -> dict[str, object]:
    """What --dry_run shows; raises UserError where the run would."""
    return plan_text(cfg, world, Model, cfg.mixer == "attention")


# ---------------- Training


# same as train_gpt.py
@dataclass
class TrainState:
    """All a step depends on, with model, optimizer, scaler, row states and session.spent_s."""

    step: int = 0


# differs: what dropout keeps is drawn by a function of its own
def compile_model(model: Model) -> None:
    """Blocks are alike: one compilation serves all of them."""
    for block in model.blocks:
        block.compile(dynamic=False)
    model.chunk_loss = torch.compile(chunk_loss_and_gradient, dynamic=False)  # without its loop
    model.dropout_mask = torch.compile(dropout_mask, dynamic=False)


# differs: states are carried, and there is one optimizer
def train(cfg: Knobs, session: Session, batches: TextBatches, splits: dict[str, Split]) -> None:
    world, total_steps, T = session.world, batches.total_steps, cfg.sequence_length
    model = Model(cfg)
    init_weights(model, cfg)
    model.to(world.device)
    gradients = flat_gradients(model)
    adam = AdamW(model, cfg)
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.precision == "fp16")
    if cfg.compile:
        compile_model(model)
    rows = choose_rows(cfg, world, model, probe_backward)
    gradients.zero_()  # what the probe left
    carried, state = row_states(model, world), TrainState()
    saved = dict(model=model, adam=adam, scaler=scaler, states=carried, state=state)
    session.row.update(device_batch_size=rows, tokenizer=cfg.encoding, conv=int(cfg.has_conv))
    session.row["warmup_iters"] = warmup_steps(total_steps, cfg)
    facts = {"rows": rows, "data": batches.summary}
    session.describe(model, flops_per_token(model, cfg.mixer == "attention"), facts)
    session.restore(**saved)
    prefetch = Prefetch(batches.make, state.step, world.device, cfg.num_workers)
    while True:
        # -------- clock stopped: evaluate, save, leave --------
        position = schedule_position(state.step, session.spent_s, total_steps, cfg)
        session.between_steps(state.step, finished=position >= total_steps)
        if session.should_validate:
            score = evaluate(model, splits["val"], T, rows, world, cfg.max_val_samples)
            log_validation(session, score)
        if session.should_save:
            session.save(state.step, **saved)
        if session.stopping:
            break

        # -------- clock running: one optimizer step --------
        session.start_clock()
        carried.start_step(is_new_epoch=state.step % batches.epoch_steps == 0)
        train_loss, aux_loss = torch.zeros(2, device=world.device)
        for part, (x_BT, y_BT, seed_B) in micro_batches(prefetch.get(state.step), rows):
            loss, aux, new_states = model(x_BT, y_BT, carried.take(part), seed_B)
            carried.put(part, new_states)
            loss = loss / batches.batch_tokens
            aux = aux * len(x_BT) / cfg.batch_size
            scaler.scale(loss + cfg.aux_loss_weight * aux).backward()
            train_loss += loss.detach()
            aux_loss += aux.detach()
        world.all_reduce(gradients)  # each rank has its share of the batch's mean
        scaler.unscale_(adam)
        grad_norms = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()]))
        overflow = ~grad_norms.isfinite().all() & scaler.is_enabled()  # fp16 skips such a step
        lr = cfg.lr * lr_scale(position, total_steps, cfg)
        state.step += 1
        metrics = {"aux_loss": aux_loss} if cfg.use_auxiliary_loss else {}
        all_finite = session.step(state.step, train_loss, lr, grad_norms, overflow, **metrics)
        adam.step(lr, grad_norms, all_finite)
        scaler.update()
        gradients.zero_()
    prefetch.close()
    log_final(session, model, splits, rows, has_constant_state=cfg.mixer == "hamt")


# differs: its data are a text
def main() -> int:
    cfg = read_knobs(Knobs, PRESETS, doc=__doc__)
    if cfg.dry_run:
        return show_plan(cfg, plan, RESULTS)
    with join_world(cfg.device, "set DEVICE=cpu; PRESET=demo is a size for that") as world:
        check_machine(cfg, world.device)
        batches, splits = open_text(cfg, world)
        session = Session(
            cfg,
            world,
            **session_options(cfg, batches, splits, metrics=["aux_loss"]),
            columns=RESULTS,
            presets=PRESETS,
            resume_may_differ=RESUME_MAY_DIFFER,
            sources=[__file__],
        )
        with session:
            train(cfg, session, batches, splits)
    return session.exit_code


if __name__ == "__main__":
    launch(main)
