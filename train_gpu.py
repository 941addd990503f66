"""train_gpu.py -- HAMT: a language model whose layers keep a holographic associative memory, in one file.

    python train_gpu.py --hidden_dim 512 --hcm_dim 2048 --num_layers 8 --num_slots 16 --dataset wikitext-103 \\
        --max_seq_length 1024 --batch_size 128 --mixed_precision bf16 --compile_model
    torchrun --standalone --nproc_per_node=8 train_gpu.py --preset 124m --dataset wikitext-103
    python train_gpu.py --preset 100m --mixer attention          the same-size rotary transformer beside it
    python train_gpu.py --preset demo                            a CPU, a minute, no download

A layer writes items v_t, bound to keys k_t of unit modulus, into S slots, and reads them back with the conjugate of a
query key: M_t = decay_t * M_{t-1} + w_t (k_t v_t), r_t = conj(q_t) (a_t M_t), the output is W_o(norm(r_t) silu(g_t)).
The state M is all that it keeps of the past: S * D numbers per layer, however long the text.

Expect   PRESET=demo: val_loss falls from 5.5 to 1.64 nats per byte (n=1, 45 s on two cores); docs/hamt.md has more
Shapes   B sequences, T tokens, C model width, D memory width (reals: D/2 complex bins, re|im), H heads, E = D / H,
         K = E / 2 bins of a head, S slots of a head, L tokens of a chunk, N chunks (in the loss: rows), V vocabulary
Units    losses in nats per token unless the name says otherwise; batch_size in sequences over all ranks; phases in
         radians; times in seconds or ms, as the name says
Raises   UserError (one line, exit code 2) for a bad knob, text, checkpoint or results file, before training starts
Sources  holographic reduced representations, Plate 1995; unit-modulus keys, Ganesan et al., arXiv 2109.02157; chunk
         form and decay, Yang et al., GLA, arXiv 2312.06635; delta rule, Schlag et al., arXiv 2102.11174, and its chunk
         form, Yang et al., arXiv 2406.06484; conv before keys and values, Gu and Dao, Mamba, arXiv 2312.00752
Shared   plumbing.py keeps the run alive and accounted for. Everything that can change the loss is in this file.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
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

BYTES = dict(dataset="embedded", tokenizer="bytes")
# Sizes are those of the name within 3%, with the GPT-2 vocabulary and for both mixers.
PRESETS = {
    "seed": {},
    "33m": dict(hidden_dim=384, hcm_dim=384, num_layers=8, num_slots=8, num_attention_heads=6),
    "50m": dict(hidden_dim=512, hcm_dim=512, num_layers=8, num_slots=8, num_attention_heads=4),
    "100m": dict(hidden_dim=640, hcm_dim=1536, num_layers=10, num_slots=16, num_attention_heads=4),
    "124m": dict(hidden_dim=768, hcm_dim=768, num_layers=12, num_slots=16, num_attention_heads=4),
    "200m": dict(hidden_dim=896, hcm_dim=2048, num_layers=12, num_slots=16, num_attention_heads=4),
    # bytes of Python's own documentation, on a CPU
    "demo": dict(
        device="cpu",
        mixed_precision="none",
        hidden_dim=128,
        hcm_dim=128,
        num_layers=2,
        num_slots=16,
    )
    | dict(
        num_attention_heads=4,
        max_seq_length=128,
        batch_size=16,
        device_batch_size=16,
        num_iterations=400,
    )
    | dict(
        learning_rate=3e-3, dropout=0.0, val_every=50, save_every=100, max_val_samples=256, **BYTES
    ),
}
# What may differ when a run is resumed: nothing here moves the loss curve.
FREE = "preset device_batch_size chunk_length gradient_checkpointing val_every max_val_samples final_test num_workers "
FREE += "early_stop_patience early_stop_min_delta target_loss save_every save_epochs keep device compile use_wandb "
FREE += "tracker wandb_project run_id stage data_folder logs_folder results_file dry_run"
MIXERS, BINDINGS = ("hamt", "attention"), ("phasor", "elementwise", "circular_conv")
MEMORIES = ("on", "local", "off")
PRECISIONS = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIKITEXT = ("wikitext-2", "wikitext-103")
VOCABULARY = {"gpt2": 50304, "bytes": 256}  # GPT-2's 50257 ids, padded to a multiple of 64


@dataclass(frozen=True)
class Knobs:
    preset: str = knob("seed", "named set of defaults", choices=tuple(PRESETS))
    # model
    mixer: str = knob(
        "hamt", "holographic memory, or the rotary transformer to compare with", choices=MIXERS
    )
    hidden_dim: int = knob(512, "model width, channels", low=2)
    hcm_dim: int = knob(2048, "memory width D, real numbers: D/2 complex bins", low=2)
    num_layers: int = knob(8, "blocks", low=1)
    num_slots: int = knob(16, "slots of a head's memory", low=1)
    num_attention_heads: int = knob(8, "heads, each with addresses and phases of its own", low=1)
    intermediate_dim: int | None = knob(
        None, "FFN width; auto is 4 times the model width", low=1, none="auto"
    )
    match_params: bool = knob(
        True, "attention: widen the FFN to HAMT's parameter count at these knobs"
    )
    vocab_size: int | None = knob(
        None, "token ids; auto is the tokenizer's", low=2, high=65536, none="auto"
    )
    binding: str = knob(
        "phasor", "keys: content and position phases, fixed +-1, fixed phases", choices=BINDINGS
    )
    tie_keys: bool = knob(
        True, "one projection for write and read keys and addresses, convolved apart"
    )
    position_share: float = knob(
        0.5, "share of the bins whose phases also turn with position", low=0, high=1
    )
    decay: bool = knob(True, "forgetting, per slot, head and token, learned")
    slowest_decay: float = knob(
        2**-7, "of the slots' initial rates per token; the fastest is 1/4", above=0, high=0.25
    )
    delta_rule: bool = knob(False, "erase what the write address holds before writing")
    use_gating: bool = knob(True, "SiLU gate on the read")
    conv: bool = knob(True, "causal convolution of 4 tokens before items, keys and addresses")
    memory: str = knob(
        "on", "controls: local reads a token's own write only, off reads zero", choices=MEMORIES
    )
    window_every: int = knob(
        0, "every n-th layer is sliding-window attention (a hybrid); 0: none", low=0
    )
    attention_window: int = knob(256, "tokens that such a layer sees", low=1)
    chunk_length: int = knob(
        64, "tokens of a chunk of the parallel form; changes speed only", low=1, high=128
    )
    dropout: float = knob(0.1, "of embeddings, mixer and FFN outputs", low=0, high=0.95)
    use_auxiliary_loss: bool = knob(
        False, "also train recall of earlier items; never part of a reported loss"
    )
    aux_loss_weight: float = knob(0.1, "weight of the auxiliary loss", low=0)
    # data
    dataset: str = knob(
        "wikitext-2", "wikitext-2, wikitext-103, embedded (or bytes), or a text file or folder"
    )
    tokenizer: str = knob(
        "auto", "auto: bytes for embedded, else gpt2", choices=("auto", *VOCABULARY)
    )
    max_train_samples: int | None = knob(None, "sequences of an epoch at most", low=1, none="all")
    max_val_samples: int | None = knob(None, "sequences of a validation at most", low=1, none="all")
    num_workers: int = knob(4, "batches made ahead of use", low=1)
    # batch, in sequences
    max_seq_length: int = knob(1024, "tokens per sequence", low=1, alias=("sequence_length",))
    batch_size: int = knob(16, "sequences per step, over all ranks", low=1)
    device_batch_size: int | None = knob(
        None, "sequences per micro-batch of a rank", low=1, none="auto"
    )
    carry_state: bool = knob(
        False, "a step goes on where the last one stopped, with its state (truncated BPTT)"
    )
    # schedule
    num_epochs: int = knob(10, "passes over the data, where num_iterations is auto", low=1)
    num_iterations: int | None = knob(
        None, "optimizer steps", low=0, none="auto", alias=("max_steps",)
    )
    max_seconds: float | None = knob(
        None, "training seconds; the schedule runs on time", above=0, none="off"
    )
    use_scheduler: bool = knob(True, "cosine from the peak rate to a tenth of it")
    warmup_iters: int | None = knob(
        None, "steps of linear warm-up; auto: 2%, at most 1000", low=0, none="auto"
    )
    # optimizer
    learning_rate: float = knob(3e-4, "peak rate of AdamW", low=0, alias=("lr",))
    weight_decay: float = knob(0.01, "of matrices only", low=0)
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0: no clipping", low=0)
    mixed_precision: str = knob(
        "fp16", "of products; state, phases and decay stay fp32", choices=tuple(PRECISIONS)
    )
    gradient_checkpointing: bool = knob(
        False, "keep a block's input only, and compute the block again"
    )
    seed: int = knob(1337, "initial weights, order of the data, dropout", low=0)
    # evaluation, stopping, saving
    val_every: int | None = knob(
        None, "steps between validations; 0: the last only", low=0, none="epoch"
    )
    final_test: bool = knob(True, "at the end: test split and streaming evaluation")
    early_stop_patience: int = knob(
        0, "validations without improvement until it stops; 0: never", low=0
    )
    early_stop_min_delta: float = knob(
        0.0, "nats by which a validation must improve to count", low=0
    )
    target_loss: float | None = knob(
        None, "log when validation first reaches this, in nats", none="off"
    )
    save_every: int = knob(
        1000, "steps between checkpoints; 0: the end only", low=0, alias=("save_steps",)
    )
    save_epochs: bool = knob(True, "a checkpoint also at the end of each epoch")
    keep: int = knob(2, "checkpoints kept", low=1)
    # the run
    device: str = knob(
        "cuda", "where to train; nothing falls back by itself", choices=("cuda", "cpu")
    )
    compile: bool = knob(False, "torch.compile", alias=("compile_model",))
    use_wandb: bool = knob(False, "short for TRACKER=wandb")
    tracker: str = knob(
        "none", "also send steps and validations there", choices=("none", "wandb", "trackio")
    )
    wandb_project: str = knob("hamt-competitive-llm", "project name for the tracker")
    run_id: str = knob(
        "", "an unfinished run's id resumes it; empty: made once per launch", alias=("run_name",)
    )
    stage: str = knob("", "stage of a study, copied into the results row")
    data_folder: str = knob(
        str(HERE / "data"), "folder of downloaded texts and of token shards made from texts"
    )
    logs_folder: str = knob(
        str(HERE / "logs"), "folder of log, metrics and checkpoints", alias=("output_dir",)
    )
    results_file: str = knob(
        str(HERE / "experiments/results_hamt.csv"), "file that gets one row per run"
    )
    dry_run: bool = knob(False, "show knobs, sizes and data, and stop")

    def __post_init__(self):
        heads, C, D = self.num_attention_heads, self.hidden_dim, self.hcm_dim
        if D % (2 * heads):
            raise ValueError(
                f"HCM_DIM={D} must be NUM_ATTENTION_HEADS={heads} times an even number (bins are pairs)"
            )
        if (self.mixer == "attention" or self.window_every) and C % (2 * heads):
            raise ValueError(
                f"HIDDEN_DIM={C} must be NUM_ATTENTION_HEADS={heads} times an even width (rotary)"
            )
        if self.mixer == "attention" and (
            self.use_auxiliary_loss or self.memory != "on" or self.window_every
        ):
            raise ValueError(
                "MIXER=attention has no memory: USE_AUXILIARY_LOSS, MEMORY=local, MEMORY=off and WINDOW_EVERY are for "
                "MIXER=hamt"
            )
        if self.mixer == "attention" and self.carry_state:
            raise ValueError(
                "CARRY_STATE=1 carries a constant state, which MIXER=attention does not have"
            )
        if self.mixed_precision == "fp16" and self.device == "cpu":
            raise ValueError(
                "MIXED_PRECISION=fp16 needs a GPU; with DEVICE=cpu set it to none (or bf16)"
            )
        if self.use_wandb and self.tracker == "trackio":
            raise ValueError("USE_WANDB=1 and TRACKER=trackio: choose one tracker")
        if (
            self.dataset in WIKITEXT
            and self.tokenizer == "bytes"
            and self.vocab_size not in (None, 256)
        ):
            raise ValueError(
                f"TOKENIZER=bytes has 256 ids, VOCAB_SIZE={self.vocab_size}; leave VOCAB_SIZE at auto"
            )

    @property
    def tokens(self) -> str:
        """The tokenizer's name."""
        return self.tokenizer if self.tokenizer != "auto" else "bytes" if self.embedded else "gpt2"

    @property
    def embedded(self) -> bool:
        return self.dataset in ("embedded", "bytes")

    @property
    def vocabulary(self) -> int:
        return self.vocab_size or VOCABULARY[self.tokens]

    @property
    def label(self) -> str:
        """The mixer as tables name it: one with attention layers in it is a hybrid."""
        return "hybrid" if self.window_every else self.mixer

    def is_memory(self, layer: int) -> bool:
        windowed = self.window_every and (layer + 1) % self.window_every == 0
        return self.mixer == "hamt" and not windowed

    def ffn_width(self, layer: int) -> int:
        """4 times the model width; behind an attention layer of MIXER=attention as much more as a memory layer has
        parameters beyond attention's 4 C^2."""
        width = self.intermediate_dim or 4 * self.hidden_dim
        if self.mixer == "attention" and self.match_params:
            extra = sum(math.prod(s) for s in Memory.shapes(self).values()) - 4 * self.hidden_dim**2
            width += round(extra / (2 * self.hidden_dim))
        return max(width, 1)


# ----------------------------------------------------------------------------
# Model

TAPS = 4  # of the convolution
INIT_STD = 0.02  # of weights, before init_parts()
CONVOLVED = "item key query write read".split()
MAX_DECAY = 1.0  # nats per token: bounds what the chunk form exponentiates by chunk_length / 2
KEY_PERIOD = 4096  # positions after which fixed keys repeat


# same as train_gpt.py
def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


# same as train_gpt.py
def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_BTHD.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x_BTHD)


def turn(x: Tensor, key: tuple[Tensor, ...]) -> Tensor:
    """Bind: multiply by a key, (cos, sin) of phases over packed re|im, or (signs,) over reals. Equal to circular
    convolution of what these are the spectra of (Plate 1995)."""
    if len(key) == 1:
        return x * key[0]
    (re, im), (cos, sin) = x.chunk(2, dim=-1), key
    return torch.cat([re * cos - im * sin, re * sin + im * cos], dim=-1)


def conj(key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The key that undoes `key`: the conjugate phasor; a sign undoes itself."""
    return key if len(key) == 1 else (key[0], -key[1])


def phasor(phase: Tensor) -> tuple[Tensor, Tensor]:
    return phase.cos(), phase.sin()


@lru_cache(maxsize=4)
def fixed_phases(D: int) -> Tensor:
    """(KEY_PERIOD, D/2) of circular_conv, whose signs of cos|sin are the keys of elementwise: the same in each run."""
    generator = torch.Generator().manual_seed(20260611)
    return torch.rand(KEY_PERIOD, D // 2, generator=generator, dtype=torch.float64) * 2 * math.pi


def convolve(x_BTX: Tensor, taps_4X: Tensor, tail_B3X: Tensor) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution behind the last inputs of the text so far, `tail`, and the new tail."""
    x_BTX = torch.cat([tail_B3X.type_as(x_BTX), x_BTX], dim=1)
    y_BXT = F.conv1d(x_BTX.transpose(1, 2), taps_4X.type_as(x_BTX).T[:, None], groups=x_BTX.size(2))
    return y_BXT.transpose(1, 2), x_BTX[:, 1 - len(taps_4X) :].type_as(tail_B3X)


def decay_factors(log_decay: Tensor) -> tuple[Tensor, ...]:
    """Of log_decay (..., L, S) of a chunk, with inclusive sums c: exp(c - m), exp(m - c), exp(c_L - m) (..., 1, S) and
    exp(m) with m = -MAX_DECAY * L / 2, so that exp(c_t - c_j) is the first at t times the second at j.

    c falls from 0 by MAX_DECAY a token at most: no exponent is beyond MAX_DECAY * L / 2 = 64 in size, and no factor can
    overflow, as exp(-c_j) would. m is a constant: a middle taken from c itself would let later tokens of the chunk move
    earlier ones by a rounding error."""
    c, m = log_decay.cumsum(-2), -MAX_DECAY * log_decay.size(-2) / 2
    return (c - m).exp(), (m - c).exp(), (c[..., -1:, :] - m).exp(), math.exp(m)


class Memory(nn.Module):
    """The holographic layer. One matrix `inp` makes items, key phases, addresses, decays and the gate."""

    def __init__(self, k: Knobs):
        super().__init__()
        self.k, self.H, self.S, self.D = k, k.num_attention_heads, k.num_slots, k.hcm_dim
        for name, shape in self.shapes(k).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        K = self.D // 2 // self.H
        if (
            k.binding == "phasor"
        ):  # position is powers of a base phasor: what is read depends on distances only
            turning = round(K * k.position_share)
            omega = 1e4 ** -(torch.arange(K, dtype=torch.float64) / max(turning, 1))
            omega[turning:] = 0
            self.register_buffer("omega", omega.float(), persistent=False)
        else:
            phases = fixed_phases(self.D).view(KEY_PERIOD, self.H, K)
            table = torch.cat([phases.cos(), phases.sin()], dim=-1).float()
            self.register_buffer(
                "table", table.sign() if k.binding == "elementwise" else table, persistent=False
            )

    @staticmethod
    def widths(k: Knobs) -> dict[str, int]:
        """Rows of `inp`, by what they make; of tied ones, one set makes both of the pair. Those up to `read` pass the
        convolution."""
        D, HS = k.hcm_dim, k.num_attention_heads * k.num_slots
        phases, two = (D // 2 if k.binding == "phasor" else 0), 0 if k.tie_keys else 1
        widths = dict(item=D, key=phases, query=phases * two, write=HS, read=HS * two)
        return widths | dict(
            decay=HS * k.decay, beta=k.num_attention_heads * k.delta_rule, gate=D * k.use_gating
        )

    @classmethod
    def taps_of(cls, k: Knobs) -> dict[str, int]:
        """Channels of the convolution: the keys and addresses of writing and of reading have taps of their own, so that
        a write may take its key from the token before and a read from its own."""
        rows = cls.widths(k)
        return dict(
            item=rows["item"],
            key=rows["key"],
            query=rows["key"],
            write=rows["write"],
            read=rows["write"],
        )

    @torch.no_grad()
    def init_parts(self) -> None:
        """What recall needs at the start (measured: docs/hamt.md). Phases of the tokens spread over the circle, and
        addresses differ; a write is addressed by the token before it (a shift), a read by its own token."""
        for part, name in zip(
            self.inp.split(list(self.widths(self.k).values())), self.widths(self.k), strict=True
        ):
            if name in ("key", "query", "write", "read"):
                part.mul_(2.0 / (INIT_STD * part.size(1) ** 0.5))
        if self.k.conv:
            for part, name in zip(
                self.taps.split(list(self.taps_of(self.k).values()), 1), CONVOLVED, strict=True
            ):
                part[-2 if name in ("key", "write") else -1] += 1.0

    @classmethod
    def shapes(cls, k: Knobs) -> dict[str, tuple[int, ...]]:
        rows = cls.widths(k)
        shapes = dict(
            inp=(sum(rows.values()), k.hidden_dim), out=(k.hidden_dim, k.hcm_dim), norm=(k.hcm_dim,)
        )
        if k.conv:
            shapes |= dict(taps=(TAPS, sum(cls.taps_of(k).values())))
        if k.decay:
            shapes |= dict(decay=(k.num_attention_heads, k.num_slots))
        return shapes

    def empty_state(self, B: int) -> tuple[Tensor, Tensor]:
        rows = self.taps.size(1) if self.k.conv else 0
        zeros = partial(torch.zeros, device=self.inp.device, dtype=self.inp.dtype)
        return zeros(B, self.H, self.S, self.D // self.H), zeros(B, TAPS - 1, rows)

    def key(
        self, phase: Tensor | None, place: Tensor, local: Tensor, read: bool
    ) -> tuple[Tensor, ...]:
        """Keys of tokens with (..., H, K) content phases. Phasors turn by omega a token, counted as `local` (...).
        Fixed keys belong to a place (...) in the text; head h reads with the key of h + 1 tokens before."""
        if self.k.binding == "phasor":
            return phasor(phase + local[..., None, None] * self.omega)
        heads = torch.arange(self.H, device=place.device)
        found = self.table[(place[..., None] - read * (heads + 1)) % KEY_PERIOD, heads]
        return (found,) if self.k.binding == "elementwise" else found.chunk(2, dim=-1)

    def forward(
        self, x_BTC: Tensor, state: tuple[Tensor, Tensor], position: Tensor
    ) -> tuple[Tensor, tuple, Tensor]:
        """The read (B, T, C), the state behind the last token, and the auxiliary loss."""
        (M_BHSE, tail), rows, channels = state, self.widths(self.k), self.taps_of(self.k)
        made = dict(
            zip(rows, F.linear(x_BTC, self.inp).split(list(rows.values()), dim=-1), strict=True)
        )
        if self.k.tie_keys:
            made |= dict(query=made["key"], read=made["write"])
        if self.k.conv:
            x, tail = convolve(
                torch.cat([made[name] for name in CONVOLVED], dim=-1), self.taps, tail
            )
            made |= dict(zip(CONVOLVED, x.split(list(channels.values()), dim=-1), strict=True))
        with torch.autocast(
            x_BTC.device.type, enabled=False
        ):  # phases, decays and the state are fp32
            gate = made.pop("gate").to(M_BHSE.dtype)
            parts = {
                n: p.to(M_BHSE.dtype).unflatten(-1, (self.H, -1))
                for n, p in made.items()
                if p.size(-1)
            }
            parts |= dict(write=parts["write"].softmax(-1), read=parts["read"].softmax(-1))
            if self.k.delta_rule:  # a unit vector: it erases what it is about to write to
                parts["write"] = F.normalize(parts["write"], dim=-1)
            if self.k.memory == "on":
                r, M_BHSE, aux = self.recall(parts, M_BHSE, position)
            else:
                aux = M_BHSE.new_zeros(())
                r = (
                    self.own(parts, position)
                    if self.k.memory == "local"
                    else torch.zeros_like(parts["item"])
                )
            r = rms_norm(r).flatten(2) * self.norm
            if self.k.use_gating:
                r = r * F.silu(gate)
        return F.linear(r.type_as(x_BTC), self.out), (M_BHSE, tail), aux

    def recall(
        self, parts: dict[str, Tensor], M: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The chunk form: products within chunks of L tokens, the state from chunk to chunk. Exact for every L, and
        with one token the recurrent form. In each chunk phases count from 0, and the state turns back by omega * L, so
        that no phase grows with the text. Returns the reads (B, T, H, E), the state and the auxiliary loss."""
        k, T = self.k, parts["item"].size(1)
        L = min(k.chunk_length, T)
        N = -(-T // L)
        split = lambda t: (
            F.pad(t, (0, 0, 0, 0, 0, N * L - T)).unflatten(1, (N, L)).permute(0, 3, 1, 2, 4)
        )
        at = torch.arange(T, device=M.device)
        b = split(
            turn(parts["item"], self.key(parts.get("key"), position + at, at % L, read=False))
        )
        w, a = (
            split(parts["write"]),
            split(parts["read"]),
        )  # (B, H, N, L, S); a padded token writes nothing
        w_fall, w_rise, end, middle = w, w, w.new_ones(1, self.S), 1.0
        if k.decay:  # and forgets nothing
            fall, rise, end, middle = decay_factors(
                split(-MAX_DECAY * (parts["decay"] + self.decay).sigmoid())
            )
            w_fall, w_rise, a = w * fall, w * rise, a * fall
        keep, into = (end * middle).mT.expand(*M.shape[:2], N, -1, 1), (w_rise * end).mT
        if k.delta_rule:
            beta = split(parts["beta"].sigmoid())
            overlap = beta * (w_fall @ w_rise.mT).tril(-1)
            both = torch.linalg.solve_triangular(
                overlap,
                beta * torch.cat([b, w_fall * middle], dim=-1),
                upper=False,
                unitriangular=True,
            )
            b, seen = both.split([b.size(-1), self.S], dim=-1)
        added = into @ b
        states, back = [], self.key_shift(L)
        for n in range(N):
            states.append(M)
            new = (
                added[:, :, n] - into[:, :, n] @ (seen[:, :, n] @ M)
                if k.delta_rule
                else added[:, :, n]
            )
            M = turn(keep[:, :, n] * M + new, back)
        before = torch.stack(states, dim=2)
        if k.delta_rule:
            b = b - seen @ before
        y = (a @ w_rise.mT).tril() @ b + (a * middle) @ before
        y = y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T]
        r = turn(y, conj(self.key(parts.get("query"), position + at, at % L, read=True)))
        aux = M.new_zeros(())
        if self.training and k.use_auxiliary_loss:
            aux = self.delayed_recall(parts, before, position, L)
        return r, turn(M, self.key_shift(T - N * L)) if N * L > T else M, aux

    def own(self, parts: dict[str, Tensor], position: Tensor) -> Tensor:
        """What each token reads of its own write, (B, T, H, E): the layer without a past."""
        at = torch.arange(parts["item"].size(1), device=position.device)
        b = turn(parts["item"], self.key(parts.get("key"), position + at, at * 0, read=False))
        y = (parts["read"] * parts["write"]).sum(-1, keepdim=True) * b
        return turn(y, conj(self.key(parts.get("query"), position + at, at * 0, read=True)))

    def key_shift(self, tokens: int) -> tuple[Tensor, ...]:
        """What takes a state to the frame of `tokens` later."""
        return (
            phasor(-tokens * self.omega) if self.k.binding == "phasor" else (self.norm.new_ones(1),)
        )

    def delayed_recall(
        self, parts: dict[str, Tensor], before: Tensor, position: Tensor, L: int
    ) -> Tensor:
        """1 - cosine between an item and what its own key and write address still find of it in the state before a
        later chunk: the mean over one item drawn for each chunk and row. Blind to scale: shrinking gains nothing."""
        B, N = before.size(0), before.size(2)
        if N == 1:
            return before.new_zeros(())
        start = torch.arange(1, N, device=before.device) * L
        at = (torch.rand(B, N - 1, device=before.device) * start).long()
        take = lambda t: t.gather(1, at[..., None, None].expand(-1, -1, *t.shape[2:]))
        drawn = {name: take(parts[name]) for name in ("item", "key", "write") if name in parts}
        found = torch.einsum("bnhs,bhnse->bnhe", drawn["write"], before[:, :, 1:])
        key = self.key(drawn.get("key"), position + at, at - start, read=False)
        return (
            1 - F.cosine_similarity(turn(found, conj(key)), drawn["item"].detach(), dim=-1).mean()
        )


class Attention(nn.Module):
    """Causal rotary attention, over all tokens or the last `window`. Its state is keys and values, not yet rotated: the
    angles count from the oldest token that is kept."""

    def __init__(self, k: Knobs, window: int | None):
        super().__init__()
        self.window, self.H, C = window, k.num_attention_heads, k.hidden_dim
        self.inp = nn.Parameter(torch.empty(3 * C, C))
        self.out = nn.Parameter(torch.empty(C, C))
        D = C // self.H
        self.register_buffer("omega", 1e4 ** (-torch.arange(0, D, 2).float() / D), persistent=False)

    def empty_state(self, B: int) -> tuple[Tensor, Tensor]:
        none = self.inp.new_zeros(B, 0, self.H, self.inp.size(1) // self.H)
        return none, none

    def forward(
        self, x_BTC: Tensor, state: tuple[Tensor, Tensor], position: Tensor
    ) -> tuple[Tensor, tuple, Tensor]:
        B, T, C = x_BTC.shape
        q, k, v = (t.view(B, T, self.H, -1) for t in F.linear(x_BTC, self.inp).split(C, dim=-1))
        past = state[0].size(1)
        if past:
            k, v = (
                torch.cat([state[0].type_as(k), k], dim=1),
                torch.cat([state[1].type_as(v), v], dim=1),
            )
        kept = past + T if self.window is None else min(past + T, self.window - 1)
        state = tuple(t[:, past + T - kept :].to(state[0].dtype) for t in (k, v))
        at = torch.arange(past + T, device=x_BTC.device)
        cos, sin = phasor(at[:, None, None] * self.omega)
        q, k = rotate(q, cos[past:], sin[past:]), rotate(k, cos, sin)
        full = past == 0 and (self.window is None or T <= self.window)
        mask = None
        if not full:
            mask = at <= at[past:, None]
            if self.window is not None:
                mask &= at > at[past:, None] - self.window
        y = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, is_causal=full
        )
        return (
            F.linear(y.transpose(1, 2).reshape(B, T, C), self.out),
            state,
            x_BTC.new_zeros((), dtype=torch.float32),
        )


class Block(nn.Module):
    """Pre-norm residual block: a mixer over time, then a GELU FFN."""

    def __init__(self, k: Knobs, layer: int):
        super().__init__()
        C, width, self.dropout = k.hidden_dim, k.ffn_width(layer), k.dropout
        window = k.attention_window if k.window_every else None
        self.mixer = Memory(k) if k.is_memory(layer) else Attention(k, window)
        self.norm1, self.norm2 = nn.Parameter(torch.ones(C)), nn.Parameter(torch.ones(C))
        self.up, self.down = (
            nn.Parameter(torch.empty(width, C)),
            nn.Parameter(torch.empty(C, width)),
        )

    def forward(
        self, x_BTC: Tensor, state: tuple[Tensor, ...], position: Tensor
    ) -> tuple[Tensor, tuple, Tensor]:
        drop = partial(F.dropout, p=self.dropout, training=self.training)
        y, state, aux = self.mixer(rms_norm(x_BTC) * self.norm1, state, position)
        x_BTC = x_BTC + drop(y)
        h = F.gelu(F.linear(rms_norm(x_BTC) * self.norm2, self.up))
        return x_BTC + drop(F.linear(h, self.down)), state, aux


State = list  # [tokens so far (int64 scalar), then one tuple of tensors per layer]


class Model(nn.Module):
    """Embedding, blocks, RMSNorm; one matrix, `wte`, for embedding and head.

    A state is [tokens so far, then per layer (M, last inputs of the convolution) or (keys, values)]."""

    def __init__(self, k: Knobs):
        super().__init__()
        self.k = k
        self.wte = nn.Parameter(torch.empty(k.vocabulary, k.hidden_dim))
        self.blocks = nn.ModuleList(Block(k, i) for i in range(k.num_layers))
        self.norm = nn.Parameter(torch.ones(k.hidden_dim))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """N(0, INIT_STD), less by sqrt(2 layers) for what adds to the residual stream, each tensor from a generator of
        seed and name: what is switched off moves no tensor of another name. Then what init_parts() adds."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
                continue
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            if name.endswith("decay"):  # slot by slot, evenly on a logarithmic scale
                spread = torch.linspace(2, -math.log2(self.k.slowest_decay), p.size(1))
                rate = -torch.log1p(-(2.0**-spread)) / MAX_DECAY
                p.copy_((rate / (1 - rate)).log().expand_as(p))
            else:
                std = INIT_STD / (
                    math.sqrt(2 * self.k.num_layers) if name.endswith(("out", "down")) else 1
                )
                p.copy_(torch.empty(p.shape).normal_(std=std, generator=generator))
        for block in self.blocks:
            if isinstance(block.mixer, Memory):
                block.mixer.init_parts()

    def empty_state(self, B: int) -> State:
        zero = torch.zeros((), dtype=torch.long, device=self.wte.device)
        return [zero, *(block.mixer.empty_state(B) for block in self.blocks)]

    def forward(self, x_BTC: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """The trunk: embedded tokens to what the head reads (B, T, C); the mean auxiliary loss; the new state."""
        position, *layers = state
        after, total = [position + x_BTC.size(1)], 0.0
        x_BTC = F.dropout(x_BTC, self.k.dropout, self.training)
        for block, layer in zip(self.blocks, layers, strict=True):
            if self.k.gradient_checkpointing and torch.is_grad_enabled():
                x_BTC, layer, aux = checkpoint(block, x_BTC, layer, position, use_reentrant=False)
            else:
                x_BTC, layer, aux = block(x_BTC, layer, position)
            after.append(layer)
            total = total + aux
        return rms_norm(x_BTC) * self.norm, total / len(self.blocks), after

    def stream(self, x_BT: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (B, T, V) of tokens that follow those of `state`, in fp32 at least, and the state behind them."""
        h_BTC, _, state = self(F.embedding(x_BT, self.wte), state)
        logits = F.linear(h_BTC, self.wte)
        return logits if logits.dtype == torch.float64 else logits.float(), state

    def logits(self, x_BT: Tensor, state: State | None = None) -> Tensor:
        """(B, T, V), for generation and tests; training never forms all of them."""
        return self.stream(x_BT, self.empty_state(x_BT.size(0)) if state is None else state)[0]


def detach(state: State) -> State:
    return [state[0], *(tuple(t.detach() for t in layer) for layer in state[1:])]


def state_bytes(state: State) -> int:
    """Bytes of what a model carries from token to token."""
    return sum(t.numel() * t.element_size() for layer in state[1:] for t in layer)


# Rows of logits at a time. On a CPU, logits of 256 rows stay in the cache's reach; a GPU wants enough to fill it.
LOSS_ROWS = {"cpu": 256, "cuda": 8192}


# same as train_gpt.py
def softmax_rows(logits_NV: Tensor, y_N: Tensor, e_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fills e = exp(l - max); of each row: its loss, s = sum(e), and s * d loss / d l_y, which is exact where e_y is
    nearly s. One exp per logit: whoever needs the probabilities divides by s on the narrow side of a product."""
    top = logits_NV.amax(-1, keepdim=True).float()
    e = (logits_NV.float() - top).exp()
    s = e.sum(-1, keepdim=True)
    target = logits_NV.gather(-1, y_N[:, None]).float() - top
    e_NV.copy_(e)
    return s.log() - target, s, target.exp() - s


# same as train_gpt.py
def softmax_blocks(logits_NV: Tensor, y_N: Tensor, e_NV: Tensor) -> tuple[Tensor, ...]:
    """softmax_rows without a compiler, in blocks whose fp32 copies a CPU's allocator keeps instead of mapping anew."""
    blocks = zip(logits_NV.split(64), y_N.split(64), e_NV.split(64), strict=True)
    return tuple(map(torch.cat, zip(*(softmax_rows(*block) for block in blocks), strict=True)))


# same as train_gpt.py
def add_to(total: Tensor, part: Tensor) -> None:
    total.add_(part)  # compiled: eager would first make an fp32 copy of a bf16 part


class MicroStep:
    """Loss and gradients of a micro-batch. The trunk may be compiled as one graph; the tied matrix is handled around
    it by hand, as in train_gpt.py: cross-entropy in row chunks, gradients formed while a chunk's logits exist and
    summed in fp32 right in `wte.grad`. The (N, V) logits never exist. `scale` is the loss scale of fp16."""

    def __init__(self, model: Model, k: Knobs, w: World):
        self.model, self.k, self.w, self.dtype = model, k, w, PRECISIONS[k.mixed_precision]
        wrap = partial(torch.compile, dynamic=False) if k.compile else lambda f: f
        self.trunk, self.add_to = wrap(model), wrap(add_to)
        self.softmax_rows = (
            wrap(softmax_rows) if k.compile or k.device == "cuda" else softmax_blocks
        )
        self.rows = max(
            LOSS_ROWS[w.device.type], k.hidden_dim
        )  # of logits, so that their buffer also holds a chunk's dW
        self.wte = torch.empty_like(model.wte, dtype=self.dtype)
        self.buffers = torch.empty(2, self.rows, k.vocabulary, dtype=self.dtype, device=w.device)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """The tied matrix has changed: cast it, once per optimizer step."""
        self.wte.copy_(self.model.wte)

    def hidden(self, x_BT: Tensor, state: State | None) -> tuple[Tensor, Tensor, Tensor, State]:
        x_BTC = F.embedding(x_BT, self.model.wte.detach()).requires_grad_(torch.is_grad_enabled())
        with torch.autocast(
            self.w.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        ):
            h_BTC, aux, state = self.trunk(
                x_BTC, self.model.empty_state(x_BT.size(0)) if state is None else state
            )
        return x_BTC, h_BTC.flatten(0, 1).to(self.dtype), aux, detach(state)

    def chunks(self, h_NC: Tensor, y_N: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Of each chunk of rows: their slice, e, loss, s and s * d loss / d l_y."""
        for start in range(0, len(h_NC), self.rows):
            part = slice(start, min(start + self.rows, len(h_NC)))
            logits, e = self.buffers[:, : part.stop - start]
            torch.mm(h_NC[part], self.wte.T, out=logits)
            yield part, e, *self.softmax_rows(logits, y_N[part], e)

    def backward(
        self, x_BT: Tensor, y_BT: Tensor, share: float, scale: Tensor, state: State | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Mean loss in nats and auxiliary loss, fp32, and the state behind the last tokens; adds `share * scale` times
        the gradient of loss + AUX_LOSS_WEIGHT * auxiliary loss to every parameter's."""
        x_BTC, h_NC, aux, state = self.hidden(x_BT, state)
        h, y_N, losses = h_NC.detach(), y_BT.flatten(), []
        dh = torch.empty_like(h)
        for part, e, loss, s, d_target in self.chunks(h, y_N):
            e[torch.arange(len(e), device=e.device), y_N[part]] = d_target[:, 0].to(e.dtype)
            factor = share * scale / (s * len(h))
            torch.mul(e @ self.wte, factor, out=dh[part])
            dw = (
                self.buffers[0].flatten()[: self.wte.numel()].view_as(self.wte)
            )  # this chunk's logits are done with
            self.add_to(self.model.wte.grad, torch.mm(e.T, (h[part] * factor).to(e.dtype), out=dw))
            losses.append(loss)
        if self.k.use_auxiliary_loss:
            torch.autograd.backward(
                [h_NC, aux], [dh, self.k.aux_loss_weight * share * scale.to(aux.dtype)]
            )
        else:
            h_NC.backward(dh)
        self.model.wte.grad.index_add_(0, x_BT.flatten(), x_BTC.grad.flatten(0, 1))
        return torch.cat(losses).mean(), aux.detach().float(), state

    @torch.no_grad()
    def loss_sum(
        self, x_BT: Tensor, y_BT: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Summed loss over the targets that are not -1, in nats, without dropout or gradients; and the state."""
        training = self.model.training
        self.model.eval()
        _, h_NC, _, state = self.hidden(x_BT, state)
        self.model.train(training)
        y_N = y_BT.flatten()
        losses = torch.cat([loss[:, 0] for _, _, loss, *_ in self.chunks(h_NC, y_N.clamp(min=0))])
        return losses.where(y_N >= 0, 0).double().sum(), state


# ----------------------------------------------------------------------------
# Optimizers


class AdamW:
    """torch's fused AdamW on two flat tensors that hold all parameters end to end: the matrices, whose weights decay,
    and the rest. Their gradients are one buffer, all-reduced at once. Clipping, the loss scale of fp16 and the gate
    `ok` go through the kernel's own inputs, so that no pass over the gradients is spent on them."""

    def __init__(self, model: Model, k: Knobs, w: World):
        self.k, self.w, self.params = k, w, dict(model.named_parameters())
        names = sorted(
            self.params, key=lambda n: self.params[n].dim() == 1 or n.endswith(("taps", "decay"))
        )
        sizes = [
            -(-self.params[n].numel() // 16) * 16 for n in names
        ]  # each starts on its own cache line
        matrices = sum(s for n, s in zip(names, sizes, strict=True) if self.decays(n))
        data, self.grads = (torch.zeros(sum(sizes), device=w.device) for _ in range(2))
        self.names, self.views, start = names, [], 0
        for name, size in zip(names, sizes, strict=True):
            p, place = self.params[name], slice(start, start + self.params[name].numel())
            p.data = data[place].view_as(p).copy_(p.data)
            p.grad = self.grads[place].view_as(p)
            self.views.append(p.grad)
            start += size
        self.flat = [nn.Parameter(part) for part in data.split([matrices, len(data) - matrices])]
        for part, grad in zip(
            self.flat, self.grads.split([matrices, len(data) - matrices]), strict=True
        ):
            part.grad = grad
        groups = [
            dict(params=[p], weight_decay=d)
            for p, d in zip(self.flat, (k.weight_decay, 0.0), strict=True)
        ]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def decays(self, name: str) -> bool:
        return self.params[name].dim() > 1 and not name.endswith(("taps", "decay"))

    def reduce(self, scale: Tensor) -> Tensor:
        """Gradients become their mean over ranks; returns the norms of all parameters', in the order of `names`, with
        the loss scale taken out."""
        self.w.sum(self.grads)
        return torch.stack(torch._foreach_norm(self.views)) / (scale * self.w.size)

    @torch.no_grad()
    def step(self, lr: float, norm: Tensor, scale: Tensor, ok: Tensor) -> None:
        """One update, clipped; nothing moves, nor does Adam's count of steps, when the device flag `ok` is down."""
        clip = (
            (norm / self.k.grad_clip).clamp(min=1.0) if self.k.grad_clip else torch.ones_like(norm)
        )
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.grad_scale, self.adam.found_inf = clip * scale * self.w.size, (~ok).float()
        self.adam.step()

    def state_dict(self) -> dict:
        return {key: [t.cpu() for t in parts] for key, parts in self.moments().items()}

    def moments(self) -> dict[str, list[Tensor]]:
        """Moments and step counts of the two flat tensors, the optimizer's own."""
        for p in self.flat:
            state = self.adam.state[p]
            if not state:
                step = torch.zeros((), device=self.w.device)
                state.update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        return {
            key: [self.adam.state[p][key] for p in self.flat]
            for key in ("step", "exp_avg", "exp_avg_sq")
        }

    def load_state_dict(self, saved: dict) -> None:
        for key, parts in self.moments().items():
            for part, value in zip(parts, saved[key], strict=True):
                part.copy_(value)


class LossScale:
    """fp16: halved by a step whose gradients are not finite, which is then skipped, and doubled after 2000 good ones
    (Micikevicius et al., arXiv 1710.03740). All on the device, so that nothing waits; 1 without fp16."""

    def __init__(self, k: Knobs, w: World):
        self.on = k.mixed_precision == "fp16"
        self.scale = torch.tensor(65536.0 if self.on else 1.0, device=w.device)
        self.good = torch.zeros((), device=w.device)

    def update(self, finite: Tensor) -> None:
        """After a step; `finite` is a device flag."""
        if self.on:
            self.good = torch.where(finite, self.good + 1, 0.0)
            grown = torch.where(self.good >= 2000, self.scale * 2, self.scale)
            self.scale = torch.where(finite, grown, self.scale / 2)
            self.good = torch.where(self.good >= 2000, 0.0, self.good)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(scale=self.scale.cpu(), good=self.good.cpu())

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        self.scale, self.good = (saved[key].to(self.scale.device) for key in ("scale", "good"))


# ----------------------------------------------------------------------------
# Schedules


def lr_scale(step: float, k: Knobs, total: int) -> float:
    """Linear up to 1 over the warm-up, then half a cosine down to a tenth at step `total`; update `step` counts from 0.
    A function of the data seen: a step that fp16 skips is one update less, and moves no later rate."""
    warmup = min(1000, total // 50) if k.warmup_iters is None else k.warmup_iters
    if step < warmup:
        return (step + 1) / warmup
    if not k.use_scheduler:
        return 1.0
    done = min(1.0, (step - warmup) / max(total - warmup, 1))
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


# ----------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class Split:
    """One part of a text: its tokens, and how many words (with line ends, as WikiText's tables count them) and bytes
    they stand for."""

    shards: TokenShards
    words: int
    bytes: int


def read_text(path: str) -> str:
    """A text file, or the rows of a parquet file of WikiText, whose empty rows stand for the line ' '."""
    if not path.endswith(".parquet"):
        return Path(path).read_bytes().decode("utf-8", "replace")
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs the package pyarrow; pip install pyarrow"
        ) from None
    rows = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    return "".join(row or " \n" for row in rows)


def named_splits(folder: Path) -> dict[str, list[str]]:
    """Files of a WikiText folder by split, as published (wiki.train.raw, .tokens) or as on the hub (parquet); {} for
    another folder."""
    for pattern in ("wiki.{}*.raw", "wiki.{}*.tokens", "{}*-*.parquet"):
        names = dict(train="train", val="valid", test="test")
        found = {
            part: sorted(map(str, folder.glob(pattern.format(name))))
            for part, name in names.items()
        }
        if all(found.values()):
            return found
    return {}


class NotFetched(UserError):
    """A text that is not here, but that a run would fetch: no reason not to start one."""


def fetch_wikitext(name: str, data: Path, download: bool) -> dict[str, list[str]]:
    """Files of wikitext-2 or wikitext-103 (raw) by split, downloaded unless they are there. Raises UserError where they
    would have to be and must not."""
    folder, repo = data / f"{name}-raw-v1", "Salesforce/wikitext"
    if not download and not folder.exists():
        raise NotFetched(f"{folder} is not there yet; a run downloads it from the hub ({repo})")

    def fetch(aside: Path) -> None:
        for file in plumbing.hub_list(repo, f"{name}-raw-v1/"):
            plumbing.hub_fetch(repo, file, aside / Path(file).name)

    if not (found := named_splits(plumbing.build_once(folder, fetch))):
        raise UserError(
            f"{folder}: no files of train, valid and test among {sorted(os.listdir(folder))}; delete it"
        )
    return found


def by_paragraph(texts: list[str]) -> dict[str, str]:
    """Train, validation and test text; about 5% of the paragraphs, chosen by their hash, are of each of the latter."""
    parts: dict[str, list[str]] = dict(train=[], val=[], test=[])
    for text in texts:
        for paragraph in re.split(r"\n[ \t]*\n+", text.replace("\r\n", "\n")):
            if paragraph.strip():
                pick = hashlib.sha256(paragraph.encode()).digest()[0]
                parts["val" if pick < 13 else "test" if pick < 26 else "train"].append(paragraph)
    return {name: "\n\n".join(found) + "\n" for name, found in parts.items()}


def encoder(tokenizer: str) -> Callable[[str], np.ndarray]:
    """Text to uint16 tokens. GPT-2's BPE works on pieces that begin with the space before a word, where a token of the
    whole text begins too, so that cutting changes nothing."""
    if tokenizer == "bytes":
        return lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
    try:
        import tiktoken

        encode = tiktoken.get_encoding("gpt2").encode_ordinary
    except (
        ImportError,
        OSError,
        ValueError,
    ) as error:  # OSError: no network; ValueError: a broken file
        raise UserError(
            f"the gpt2 tokenizer is not here ({type(error).__name__}: {' '.join(str(error).split())[:200]}); tiktoken "
            f"downloads its two files once, into the folder that TIKTOKEN_CACHE_DIR names; or set TOKENIZER=bytes"
        ) from None

    def pieces(text: str) -> Iterator[str]:
        start = 0
        while start < len(text):
            cut = re.compile(r"(?<=\S) (?=[A-Za-z])").search(text, start + 2**20)
            end = cut.start() if cut else len(text)
            yield text[start:end]
            start = end

    return lambda text: np.concatenate(
        [np.array(encode(p), np.uint16) for p in pieces(text)] or [np.zeros(0, np.uint16)]
    )


def open_text(k: Knobs, download: bool = True) -> dict[str, Split]:
    """The splits of DATASET as token shards, made once per text and tokenizer under data/. Raises UserError for a text
    that is not there or too short."""
    files: dict[str, list[str]] = {}
    if k.embedded:
        train, val, _ = plumbing.embedded_corpus(Path(k.data_folder))
        files = dict(train=TokenShards(train).paths, val=TokenShards(val).paths)
    elif k.dataset in WIKITEXT:
        files = fetch_wikitext(k.dataset, Path(k.data_folder), download)
    elif (
        not Path(k.dataset).exists()
        and "/" not in k.dataset
        and "*" not in k.dataset
        and "." not in k.dataset
    ):
        raise UserError(
            f"DATASET={k.dataset}: neither {', '.join(WIKITEXT)}, embedded nor bytes, nor a file or folder"
        )
    else:
        files = named_splits(Path(k.dataset)) or dict(all=plumbing.text_files(k.dataset))
    facts = [
        [p, os.path.getsize(p), os.stat(p).st_mtime_ns] for paths in files.values() for p in paths
    ]
    key = hashlib.sha256(json.dumps(["recipe 1", k.tokens, facts]).encode()).hexdigest()[:12]

    def make(aside: Path) -> None:
        encode, counts = encoder(k.tokens), {}
        for name, text in read_splits(files, k).items():
            tokens = encode(text)
            counts[name] = dict(
                words=len(text.split()) + text.count("\n"), bytes=len(text.encode())
            )
            plumbing.write_shard(aside / f"{name}_000000.bin", tokens)
        (aside / "counts.json").write_text(json.dumps(counts))

    folder = plumbing.build_once(Path(k.data_folder) / f"text-{k.tokens}-{key}", make)
    counts = json.loads((folder / "counts.json").read_text())
    return {
        name: Split(TokenShards([str(folder / f"{name}_000000.bin")]), **c)
        for name, c in counts.items()
    }


def read_splits(files: dict[str, list[str]], k: Knobs) -> dict[str, str]:
    """Texts of train, val and test. Raises UserError where one is empty."""
    if k.embedded:
        text = {part: TokenShards(paths) for part, paths in files.items()}
        text = {
            part: bytes(t.read(0, t.total).astype(np.uint8)).decode("utf-8", "replace")
            for part, t in text.items()
        }
        middle = text["val"].index(
            "\0", len(text["val"]) // 2
        )  # the corpus has two parts: half of one is the test
        texts = dict(text, val=text["val"][:middle], test=text["val"][middle:])
    elif "all" in files:
        texts = by_paragraph([read_text(p) for p in files["all"]])
    else:
        texts = {part: "".join(read_text(p) for p in paths) for part, paths in files.items()}
    if short := [part for part, text in texts.items() if len(text) < 2]:
        raise UserError(
            f"DATASET={k.dataset}: nothing is left for {', '.join(short)}; use a longer text"
        )
    return texts


# ----------------------------------------------------------------------------
# Batches


class Batches:
    """Which tokens each step trains on: a pure function of the step, whatever the number of ranks. The stream is cut
    into sequences, shuffled anew in each epoch; an epoch is as many whole batches as there are. With CARRY_STATE, row b
    of all batches reads the b-th part of the stream from front to back instead."""

    def __init__(self, shards: TokenShards, k: Knobs, w: World):
        self.shards, self.k, self.w = shards, k, w
        self.sequences = min(
            (shards.total - 1) // k.max_seq_length, k.max_train_samples or shards.total
        )
        self.epoch_steps = self.sequences // k.batch_size
        if self.epoch_steps < 1:
            raise UserError(
                f"{shards.pattern}: {self.sequences} sequences of {k.max_seq_length} tokens, BATCH_SIZE={k.batch_size} "
                f"needs as many; lower one of the two, raise MAX_TRAIN_SAMPLES, or use a longer text"
            )
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.k.seed, epoch]).permutation(self.sequences)

    def starts(self, step: int) -> list[int]:
        """Stream positions at which this rank's sequences begin."""
        epoch, i = divmod(step, self.epoch_steps)
        B = self.k.batch_size
        rows = range(B * self.w.rank // self.w.size, B * (self.w.rank + 1) // self.w.size)
        if self.k.carry_state:
            return [(row * self.epoch_steps + i) * self.k.max_seq_length for row in rows]
        return [int(self.order(epoch)[i * B + row]) * self.k.max_seq_length for row in rows]

    def make(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the step, (B_local, T) int32."""
        T = self.k.max_seq_length
        tokens = np.stack([self.shards.read(start, T + 1) for start in self.starts(step)]).astype(
            np.int32
        )
        return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())


# ----------------------------------------------------------------------------
# Evaluation


@dataclass(frozen=True)
class Score:
    """Summed loss of a text in nats, over `tokens` scored targets that stand for so many words and bytes."""

    nats: float
    tokens: int
    words: float
    bytes: float

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def ppl(self) -> float:
        return math.exp(min(self.loss, 700))

    @property
    def word_ppl(self) -> float:
        return math.exp(min(self.nats / self.words, 700))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def score(split: Split, nats: float, tokens: int) -> Score:
    """Words and bytes in proportion to the share of the split's tokens that is scored: all but the first, usually."""
    share = tokens / split.shards.total
    return Score(nats, tokens, split.words * share, split.bytes * share)


def windows(total: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, inputs, scored) of the windows that score each of `total - 1` targets once: the first window all of its
    targets, each later one its last `stride`, behind `window - stride` tokens of context."""
    found, end = [], 0
    while end < total - 1:
        step = min(window if end == 0 else stride, total - 1 - end)
        start = max(0, end - (window - stride))
        found.append((start, end + step - start, step))
        end += step
    return found


def perplexity(
    step: MicroStep,
    split: Split,
    micro: int,
    w: World,
    window: int,
    stride: int,
    limit: int | None = None,
) -> Score:
    """Loss over the whole packed split, or its first `limit` windows: the same for every world size and micro-batch.
    Short windows are filled up behind with targets of -1, which do not count, so that the model meets one shape."""
    plan = windows(split.shards.total, window, stride)[:limit]
    total = torch.zeros((), device=w.device, dtype=torch.float64)
    mine = plan[len(plan) * w.rank // w.size : len(plan) * (w.rank + 1) // w.size]
    for at in range(0, len(mine), micro):
        x, y = np.zeros((micro, window), np.int64), np.full((micro, window), -1, np.int64)
        for row, (start, inputs, scored) in enumerate(mine[at : at + micro]):
            tokens = split.shards.read(start, inputs + 1)
            x[row, :inputs] = tokens[:-1]
            y[row, inputs - scored : inputs] = tokens[inputs - scored + 1 :]
        total += step.loss_sum(torch.from_numpy(x).to(w.device), torch.from_numpy(y).to(w.device))[
            0
        ]
    return score(split, w.sum(total).item(), sum(scored for *_, scored in plan))


def streaming(step: MicroStep, split: Split, w: World, chunk: int) -> Score:
    """Loss over the whole split read once from front to back, the state carried from `chunk` to `chunk` tokens: every
    token is predicted from all before it, in memory that does not grow. Rank 0 reads; everybody hears."""
    total, n, state = (
        torch.zeros((), device=w.device, dtype=torch.float64),
        split.shards.total - 1,
        None,
    )
    for at in range(0, n if w.main else 0, chunk):
        take = min(chunk, n - at)
        tokens = torch.from_numpy(split.shards.read(at, take + 1).astype(np.int64)).to(w.device)[
            None
        ]
        pad = lambda t, fill: F.pad(t, (0, chunk - take), value=fill)  # noqa: B023
        nats, state = step.loss_sum(pad(tokens[:, :-1], 0), pad(tokens[:, 1:], -1), state)
        total += nats
    return score(split, w.sum(total).item(), n)


# ----------------------------------------------------------------------------
# Build

HINT = "set DEVICE=cpu; PRESET=demo is a size that makes that sensible"
RESULTS = (
    "run_id date git_commit seed mixer hidden_dim hcm_dim num_layers num_slots num_attention_heads binding decay "
    "delta_rule tie_keys conv memory use_auxiliary_loss dataset tokenizer learning_rate batch_size device_batch_size "
    "sequence_length num_iterations final_val_loss best_val_loss val_ppl val_bits_per_byte test_loss test_ppl "
    "test_word_ppl test_bits_per_byte val_stream_loss test_stream_loss train_time_ms ms_per_step gpu_name n_gpus notes "
    "stage status steps_done warmup_iters n_params tokens_seen epochs tokens_per_s peak_memory_mib torch world_size "
    "code_sha256 dirty"
).split()
AS_KNOBS = (
    "seed hidden_dim hcm_dim num_layers num_slots num_attention_heads binding memory dataset learning_rate batch_size"
).split()
AS_SWITCHES = "decay delta_rule tie_keys conv use_auxiliary_loss".split()
IN_COLUMNS = [
    *AS_KNOBS,
    *AS_SWITCHES,
    "mixer",
    "tokenizer",
    "max_seq_length",
    "num_iterations",
    "warmup_iters",
]


def flops_per_token(model: Model, k: Knobs) -> int:
    """Model FLOPs of forward and backward, for MFU: 6 per weight of a matrix product (the tied matrix counts once, as
    the head), attention counted causal, and a memory's reads, writes and products within its chunks."""
    flops = 6 * sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() > 1 and not name.endswith("taps")
    )
    for layer in range(k.num_layers):
        if k.is_memory(layer):
            L, HS = min(k.chunk_length, k.max_seq_length), k.num_attention_heads * k.num_slots
            flops += 6 * (L * HS + L * k.hcm_dim + 2 * k.num_slots * k.hcm_dim) * (k.memory == "on")
        else:
            window = min(
                k.max_seq_length, 2 * k.attention_window if k.window_every else k.max_seq_length
            )
            flops += 6 * window * k.hidden_dim
    return flops


def memory_mib(n_params: int, sequences: int, k: Knobs) -> int:
    """Rough peak of a rank: weights, gradients, moments, activations of a micro-batch, chunks of logits."""
    size = PRECISIONS[k.mixed_precision].itemsize
    fixed = n_params * 16 + k.vocabulary * (
        k.hidden_dim * size + 2 * max(LOSS_ROWS[k.device], k.hidden_dim) * size
    )
    C, D, tokens = k.hidden_dim, k.hcm_dim, sequences * k.max_seq_length
    wide = sum(Memory.widths(k).values())
    mixer = (
        2 * wide * (size + 4)
        + 24 * D * 4
        + 6 * k.num_slots * D * 4 // min(k.chunk_length, k.max_seq_length)
    )
    blocks = [
        (mixer if k.is_memory(i) else 8 * C * size) + 5 * C * 4 + 3 * k.ffn_width(i) * size
        for i in range(k.num_layers)
    ]
    saved = k.num_layers * C * 4 + max(blocks) if k.gradient_checkpointing else sum(blocks)
    return (fixed + tokens * (saved + 4 * C * 4)) // 2**20


def micro_batch(step: MicroStep, k: Knobs, w: World) -> int:
    """DEVICE_BATCH_SIZE as it will be used: a divisor of the rank's part of the batch. 'auto' is the largest whose step
    fits. Raises UserError when the batch does not divide."""
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
        tokens = torch.zeros(micro, k.max_seq_length, dtype=torch.long, device=w.device)
        step.backward(tokens, tokens, 1.0, torch.ones((), device=w.device))

    n_params = sum(p.numel() for p in step.model.parameters())
    return plumbing.largest_that_fits(
        local, attempt, lambda micro: memory_mib(n_params, micro, k), w
    )


def total_steps(k: Knobs, batches: Batches) -> int:
    return batches.epoch_steps * k.num_epochs if k.num_iterations is None else k.num_iterations


def show_plan(k: Knobs) -> int:
    """--dry_run: what would be trained, on what. Needs neither GPU nor data."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    with torch.device("meta"):
        model = Model(k)
    n_params, tokens = sum(p.numel() for p in model.parameters()), k.batch_size * k.max_seq_length
    micro, steps, problem, batches = (
        min(k.device_batch_size or 1, k.batch_size // ranks),
        k.num_iterations,
        "",
        None,
    )
    try:
        batches = Batches(
            open_text(k, download=False)["train"].shards, k, World(0, ranks, torch.device("cpu"))
        )
        steps = total_steps(k, batches)
    except UserError as error:
        problem = (
            f"{'data:           ' if isinstance(error, NotFetched) else 'problem:        '} {error}"
        )
    flops = flops_per_token(model, k) * tokens
    print(knobs_json(k))
    print(
        f"mixer:           {k.label}, vocabulary {k.vocabulary:,} ({k.tokens}), FFN width {k.ffn_width(0)}"
    )
    print(f"parameters:      {n_params:,}")
    print(f"embedding:       {model.wte.numel():,} of them")
    print(
        f"tokens per step: {tokens:,} ({ranks} rank(s), micro-batch {k.device_batch_size or 'auto'})"
    )
    if steps is None:
        print(f"training tokens: not known before the data are there (NUM_EPOCHS={k.num_epochs})")
        print(f"compute:         {flops:.3g} FLOPs per step")
    else:
        print(f"training tokens: {tokens * steps:,} in {steps} steps")
        print(f"compute:         {flops * steps:.3g} FLOPs")
    print(
        f"memory:          about {memory_mib(n_params, micro, k):,} MiB per rank at micro-batch {micro}"
    )
    if batches:
        print(
            f"data:            {batches.shards.total:,} tokens, {batches.epoch_steps} steps an epoch"
        )
        print(f"epochs:          {steps / batches.epoch_steps:.2f}")
    else:
        print(problem)
    return 0


class Run:
    """One run: everything checked and built, restored from its newest checkpoint if there is one, and its records."""

    def __init__(self, k: Knobs, w: World):
        self.k, self.w, self.tokens = k, w, k.batch_size * k.max_seq_length
        plumbing.check_compiler(k.compile, k.device)
        self.splits = open_text(k)
        self.batches = Batches(self.splits["train"].shards, k, w)
        self.total = total_steps(k, self.batches)
        plumbing.check_results(Path(k.results_file), RESULTS, w)
        self.log = RunLog(
            Path(k.logs_folder),
            k.run_id or plumbing.new_run_id(w),
            w,
            self.total,
            ("aux_loss", "val_bits_per_byte"),
        )
        for split in self.splits.values():
            split.shards.check_ids(k.vocabulary, w)
        if k.device == "cuda":
            torch.set_float32_matmul_precision("high")  # the memory's fp32 products run as TF32

        self.model = Model(k)
        self.model.init_weights(k.seed)
        self.model.to(w.device)
        self.n_params = sum(p.numel() for p in self.model.parameters())
        self.adam, self.scale = AdamW(self.model, k, w), LossScale(k, w)
        self.micro_step = MicroStep(self.model, k, w)
        self.micro = micro_batch(self.micro_step, k, w)
        self.adam.grads.zero_()
        self.states: list[State | None] = [None] * (k.batch_size // w.size // self.micro)

        self.step, self.clock, self.spent_s, self.lrs = 0, Clock(w), 0.0, []
        self.val_loss = self.best_loss = self.train_loss = math.nan
        self.validated_at, self.misses, self.reached, self.signal, self.skips = -1, 0, "", 0, 0
        self.val_score, self.found = None, {}
        self.log.header(k, (__file__, plumbing.__file__), self.facts())
        self.log.rates(self.tokens, flops_per_token(self.model, k))
        self.log.track(self.tracker(), k.wandb_project, self.log.id, k)
        self.restore()
        self.saved_at = self.step

    def tracker(self) -> str:
        return "wandb" if self.k.use_wandb else "" if self.k.tracker == "none" else self.k.tracker

    def facts(self) -> dict[str, object]:
        k, w, text = self.k, self.w, self.splits["train"]
        split = f"{w.size} rank(s) x {len(self.states)} micro-batch(es) x {self.micro} x {k.max_seq_length}"
        facts = dict(run_id=self.log.id, mixer=f"{k.label}, FFN width {k.ffn_width(0)}")
        facts |= dict(parameters=f"{self.n_params:,}")
        facts |= dict(tokens_per_step=f"{self.tokens:,} = {split}")
        facts |= dict(
            state=f"{state_bytes(self.model.empty_state(1)):,} bytes per sequence, before any token"
        )
        epochs = f"{self.total / self.batches.epoch_steps:.2f} epochs of {self.batches.epoch_steps} steps"
        counts = (
            f"{text.shards.total:,} {k.tokens} tokens, {text.words:,} words, {text.bytes:,} bytes"
        )
        return facts | dict(data=f"{k.dataset}: {counts}, {epochs}")

    # Restored and saved as they are; with model, optimizer, states and clock all that the next step depends on.
    KEPT = "step val_loss best_loss train_loss validated_at misses reached spent_s skips".split()

    def restore(self) -> None:
        state = plumbing.load_checkpoint(self.log.folder, self.w, self.log.say)
        if state is None:
            return
        plumbing.check_resume(state, self.k, FREE.split(), self.splits["train"].shards, self.log)
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        self.scale.load_state_dict(state["scale"])
        if state["rows"]:
            position, *layers = ([t.to(self.w.device) for t in layer] for layer in state["rows"])
            local = self.k.batch_size // self.w.size
            for i in range(len(self.states)):
                rows = slice(
                    self.w.rank * local + i * self.micro, self.w.rank * local + (i + 1) * self.micro
                )
                self.states[i] = [
                    position[0],
                    *(tuple(t[rows].clone() for t in layer) for layer in layers),
                ]
        self.micro_step.refresh()
        self.clock = Clock(self.w, *state["clock"])
        for name in self.KEPT:
            setattr(self, name, state[name])

    def rows(self) -> list[list[Tensor]]:
        """The carried state of all rows of the batch, gathered from all ranks; [] where none is carried."""
        if not self.k.carry_state or self.states[0] is None:
            return []
        layers = []
        for parts in zip(*(state[1:] for state in self.states), strict=True):
            layer = []
            for tensors in zip(*parts, strict=True):
                own = torch.cat(tensors)
                table_WN = self.w.all_rows(own.flatten().repeat(self.w.size, 1))
                layer.append(table_WN.view(-1, *own.shape[1:]).cpu())
            layers.append(layer)
        return [[self.states[0][0].cpu()], *layers]

    def save(self) -> None:
        state = dict(
            model={name: p.detach().cpu().clone() for name, p in self.model.state_dict().items()},
            adam=self.adam.state_dict(),
            scale=self.scale.state_dict(),
            rows=self.rows(),
            clock=[self.clock.timed_s, self.clock.timed_steps],
            tokens=self.step * self.tokens,
            **{name: getattr(self, name) for name in self.KEPT},
            **plumbing.resume_facts(self.k, self.splits["train"].shards, self.log),
        )
        self.log.sync()  # a row is on disk before the checkpoint that follows it
        plumbing.save_checkpoint(self.log.folder, self.step, state, self.w, self.k.keep)
        self.saved_at = self.step

    def hear(self, beat: plumbing.Beat) -> str:
        """Record one finished step; returns the status with which to stop, or ''."""
        k, log = self.k, self.log
        if not beat.finite:
            names = ["loss", "aux_loss", "skipped", *self.adam.names]
            log.say(
                f"step:{beat.step} not finite: {beat.culprit(names)}; its update was not applied"
            )
            return "nan"
        loss, aux, skipped = (float(x) for x in beat.values[:, :3].mean(0))
        self.train_loss, self.spent_s, self.signal = loss, beat.clock, beat.signal
        norm = math.sqrt(np.square(beat.values[0, 3:].astype(np.float64)).sum())
        speed = self.tokens / self.clock.step_s
        line = f"step:{beat.step}/{self.total} train_loss:{loss:.4f}"
        line += f" aux_loss:{aux:.4f}" * k.use_auxiliary_loss
        line += f" {self.clock.times(beat.step)} tokens_per_s:{speed:.0f}"
        if self.w.main and log.peak:
            line += f" mfu:{speed * log.flops / log.peak / self.w.size:.3f}"
        line += f" memory:{self.w.peak_memory_mib()}MiB" + " skipped: fp16 overflow" * bool(skipped)
        extra = dict(aux_loss=aux) if k.use_auxiliary_loss else {}
        log.step(beat.step, loss, self.lrs.pop(0), norm, self.clock, line, **extra)
        self.skips = self.skips + 1 if skipped else 0
        if self.skips >= 50:
            log.say(
                f"step:{beat.step} 50 steps in a row overflowed fp16; use MIXED_PRECISION=bf16 or a lower LEARNING_RATE"
            )
            return "nan"
        return "preempted" if beat.signal else ""

    def validate(self) -> str:
        """Evaluate and record; returns 'early_stop' when patience has run out, or ''. Every rank decides alike, because
        the loss is the same all-reduced number on each."""
        k, T = self.k, self.k.max_seq_length
        found = perplexity(
            self.micro_step, self.splits["val"], self.micro, self.w, T, T, k.max_val_samples
        )
        self.val_loss, self.validated_at, self.val_score = found.loss, self.step, found
        mark = f" ppl:{found.ppl:.2f} bits_per_byte:{found.bits_per_byte:.4f} window:{T} stride:{T}"
        self.log.validation(
            self.step, self.val_loss, self.clock, mark, val_bits_per_byte=found.bits_per_byte
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

    def report(self) -> None:
        """The last figures: the test split in windows and, where the state is constant, both splits as one stream."""
        T, say = self.k.max_seq_length, self.log.say
        ways = [("test", "", lambda s: perplexity(self.micro_step, s, self.micro, self.w, T, T))]
        if self.k.mixer == "hamt":
            ways += [
                (part, "_stream", lambda s: streaming(self.micro_step, s, self.w, T))
                for part in ("val", "test")
            ]
        for part, way, measure in ways:
            found = measure(self.splits[part])
            self.found[f"{part}{way}"] = found
            how = f"one stream, state carried every {T}" if way else f"window:{T} stride:{T}"
            say(
                f"{part}{way}_loss:{found.loss:.4f} nats:{found.nats:.1f} tokens:{found.tokens} ppl:{found.ppl:.3f} "
                f"word_ppl:{found.word_ppl:.3f} bits_per_byte:{found.bits_per_byte:.4f} {how}"
            )

    def position(self, step: int) -> float:
        """Where update `step` stands in the schedule, in steps: itself, or the spent share of the time budget."""
        return self.total * self.spent_s / self.k.max_seconds if self.k.max_seconds else step

    def close(self, status: str) -> None:
        """Write the status and the results row, whatever way the run ended."""
        k, w, log, clock = self.k, self.w, self.log, self.clock
        notes = plumbing.notes(k, PRESETS, [*FREE.split(), *IN_COLUMNS]) + [self.reached] * bool(
            self.reached
        )
        row = dict(
            run_id=log.id,
            date=log.started,
            git_commit=log.commit,
            mixer=k.label,
            tokenizer=k.tokens,
        )
        row |= {name: getattr(k, name) for name in AS_KNOBS} | {
            name: int(getattr(k, name)) for name in AS_SWITCHES
        }
        row |= dict(
            device_batch_size=self.micro,
            sequence_length=k.max_seq_length,
            num_iterations=self.total,
        )
        row |= dict(final_val_loss=self.val_loss, best_val_loss=self.best_loss)
        if found := self.val_score:
            row |= dict(val_ppl=found.ppl, val_bits_per_byte=found.bits_per_byte)
        if found := self.found.get("test"):
            row |= dict(test_loss=found.loss, test_ppl=found.ppl, test_word_ppl=found.word_ppl)
            row |= dict(test_bits_per_byte=found.bits_per_byte)
        row |= {
            f"{name}_loss": found.loss
            for name, found in self.found.items()
            if name.endswith("stream")
        }
        row |= dict(
            train_time_ms=1000 * clock.train_s(self.step), ms_per_step=1000 * clock.step_avg_s
        )
        row |= dict(
            gpu_name=w.name(),
            n_gpus=w.size * (k.device == "cuda"),
            notes=" ".join(notes),
            stage=k.stage,
        )
        row |= dict(
            status=status,
            steps_done=self.step,
            n_params=self.n_params,
            tokens_seen=self.step * self.tokens,
        )
        row |= dict(
            warmup_iters=min(1000, self.total // 50) if k.warmup_iters is None else k.warmup_iters
        )
        row |= dict(
            epochs=round(self.step / self.batches.epoch_steps, 4),
            tokens_per_s=self.tokens / clock.step_avg_s,
        )
        row |= dict(peak_memory_mib=w.peak_memory_mib(), torch=torch.__version__, world_size=w.size)
        row |= dict(code_sha256=log.code_sha256, dirty=int(log.dirty))
        plumbing.append_result(Path(k.results_file), RESULTS, row, w)
        log.close(status, self.step)


# ----------------------------------------------------------------------------
# Training


def gradients(run: Run, x_BT: Tensor, y_BT: Tensor, k: Knobs) -> tuple[Tensor, Tensor]:
    """Loss and auxiliary loss of this rank's part of the batch; adds up their gradients, micro-batch by micro-batch.
    What is drawn at random (dropout, recalled items) is a function of seed, step and row."""
    if run.step % run.batches.epoch_steps == 0:
        run.states = [None] * len(
            run.states
        )  # the rows start over, at the front of their parts of the text
    loss, aux, first = *torch.zeros(2, device=run.w.device).unbind(), run.w.rank * len(x_BT)
    for i, (x, y) in enumerate(zip(x_BT.split(run.micro), y_BT.split(run.micro), strict=True)):
        if k.dropout or k.use_auxiliary_loss:
            torch.manual_seed((k.seed * 1_000_003 + run.step) * 65_537 + first + i * run.micro)
        own, own_aux, state = run.micro_step.backward(
            x.long(), y.long(), 1 / len(run.states), run.scale.scale, run.states[i]
        )
        run.states[i] = state if k.carry_state else None
        loss, aux = loss + own / len(run.states), aux + own_aux / len(run.states)
    return loss, aux


def train(run: Run, k: Knobs, w: World) -> str:
    """The loop. Returns finished, early_stop, nan or preempted."""
    batches, pulse, status = (
        Prefetch(run.batches.make, run.step, w.device, k.num_workers),
        Pulse(w),
        "",
    )
    epoch = run.batches.epoch_steps
    run.model.train()
    run.clock.start()
    while True:
        # -------- clock stopped: hear of the last step, evaluate, save, leave --------
        status = status or ("finished" if run.position(run.step) >= run.total else "")
        due = lambda every: every and run.step % every == 0
        validate = status or due(epoch if k.val_every is None else k.val_every)
        save = status or due(k.save_every) or (k.save_epochs and run.step and due(epoch))
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
        x_BT, y_BT = batches.get(run.step)
        loss, aux = gradients(run, x_BT, y_BT, k)
        scale = run.scale.scale
        norms = run.adam.reduce(scale)
        finite = norms.isfinite().all()
        if (
            run.scale.on
        ):  # an overflow of fp16 is no fault: the step is skipped and the loss scale halved
            norms = torch.where(finite, norms, 0.0)
        beat = torch.cat([torch.stack([loss, aux, (~finite).float()]), norms])
        ok = pulse.send(run.step + 1, beat, run.clock.train_s(run.step)) & finite
        rate = k.learning_rate * lr_scale(run.position(run.step), k, run.total)
        run.lrs.append(rate)
        run.adam.step(rate, norms.square().sum().sqrt(), scale, ok)
        run.scale.update(finite)
        run.micro_step.refresh()
        run.adam.grads.zero_()
        run.step += 1
        run.clock.tick()
        for (
            beat
        ) in pulse.read():  # of the step before: the host never waits for the one just queued
            status = run.hear(beat) or status


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def main() -> int:
    k = plumbing.read_knobs(Knobs, PRESETS, doc=__doc__)
    if k.dry_run:
        return show_plan(k)
    with plumbing.world(k.device, HINT) as w:
        run, status = None, "failed"
        try:
            run = Run(k, w)
            status = train(run, k, w)
            if k.final_test and status in ("finished", "early_stop"):
                run.report()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(
                f"out of memory at DEVICE_BATCH_SIZE={run.micro if run else 'auto'}; lower it, set "
                f"GRADIENT_CHECKPOINTING=1, or lower MAX_SEQ_LENGTH"
            ) from None
        finally:
            if run:
                run.close(status)
    return {"finished": 0, "early_stop": 0, "nan": 1}.get(
        status, 128 + run.signal if run.signal else 1
    )


if __name__ == "__main__":
    launch(main)
