"""train_arith.py -- a compact transformer that reads an arithmetic expression and writes its value.

    python train_arith.py --config configs/pilot.yaml --output-dir runs/pilot --seed 42
    python train_arith.py --config configs/honest.yaml --set training.optimizer.lr=1e-3
    python train_arith.py --help                  every knob; --dry_run shows the plan and stops

A flag beats the environment, the environment beats --set KEY=VALUE, --set beats the file of
--config, and the file beats the defaults, which are those of configs/pilot.yaml. The examples are
records of a .jsonl file, in shuffled epochs, or drawn on the fly (TRAIN_PATH=generate); then no
expression of a test or validation set is ever drawn.

Expect   configs/pilot.yaml: val_loss about 1.52 after 50 epochs, above an entropy floor of 1.076;
         an exact match of about 0, because 2,000 examples do not teach arithmetic
Shapes   B sequences, T tokens, C model width, H heads, D head width, V vocabulary, N problems
Units    losses in nats per scored token; BATCH_SIZE in examples over all ranks
Raises   UserError (one line, exit code 2) for a bad knob, key, file or checkpoint; RuntimeError
         (exit code 1) where --gpu-only or --fp16 cannot be kept
Sources  github.com/Nishal14/Step-free-arithmetic-transformers; rotary: Su et al., arXiv 2104.09864;
         Muon: kellerjordan.github.io/posts/muon, scaled as in Liu et al., arXiv 2502.16982
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import arithmetic
import arithmetic_data
from arithmetic import VOCABULARY, Language, Problems
from arithmetic_data import IGNORE, Data, DataKnobs, inputs_and_labels
from plumbing import (
    ROOT,
    Prefetch,
    Session,
    StepStats,
    UserError,
    World,
    flat_gradients,
    join_world,
    knob,
    launch,
    read_knobs,
    save_weights,
    show_plan,
    write_whole,
)
from plumbing.config import read_assignments, read_yaml
from plumbing.knobs import spellings
from plumbing.trackers import TRACKERS

# ----------------------------------------------------------------------------
# Knobs

PRESETS = {"pilot": {}}
RESUME_MAY_DIFFER = (
    "preset config output_dir gpu_only eval_interval val_every save_interval save_every keep device "
    "cuda_graph log_interval tracker tracker_project run_id stage logs_folder results_file dry_run "
    "model_name train_path val_path test_path"
).split()


@dataclass(frozen=True)
class Knobs(DataKnobs):
    preset: str = knob("pilot", "named set of defaults", group="Run", choices=tuple(PRESETS))
    config: str = knob("", "YAML file of knobs")
    output_dir: str = knob("", "folder of the run, whose last part is its id")
    run_id: str = knob("", "id of the run; that of an unfinished one resumes it; empty: a new one")
    device: str = knob("cpu", "where to train; cuda falls back", choices=("cpu", "cuda"))
    fp16: bool = knob(False, "train in half precision with loss scaling; needs CUDA")
    bf16: bool = knob(False, "train in bfloat16")
    gpu_only: bool = knob(False, "abort where training would not run on a GPU")
    cuda_graph: bool = knob(False, "launch forward and backward pass as one CUDA graph")
    stage: str = knob("", "stage of a study, copied into the results row")
    logs_folder: str = knob(str(ROOT / "logs"), "folder of the runs that have no OUTPUT_DIR")
    results_file: str = knob(str(ROOT / "experiments/results_arith.csv"), "gets one row per run")
    log_interval: int = knob(25, "steps between printed steps", low=1)
    tracker: str = knob("off", "where figures are also sent", choices=TRACKERS)
    tracker_project: str = knob("math-compact-pilot", "its project", alias=("wandb_project",))
    dry_run: bool = knob(False, "show knobs, sizes and data, and stop")

    model_name: str = knob("pilot-arithmetic", "name that checkpoints carry", group="Model")
    n_layer: int = knob(4, "number of transformer blocks", low=1)
    n_head: int = knob(4, "attention heads per block", low=1)
    n_embd: int = knob(128, "width of the model", low=2)
    d_ff: int = knob(384, "width inside the MLP", low=1)
    ffn_type: str = knob("gelu", "kind of the MLP", choices=("gelu", "geglu", "swiglu"))
    dropout: float = knob(0.1, "probability of dropout", low=0, high=0.99)
    use_rope: bool = knob(True, "rotary positions; 0: a learned table of positions")
    tie_weights: bool = knob(True, "use the embedding as the head, too")

    schedule: str = knob(
        "linear", "shape of the decay", group="Training", choices=("linear", "trapezoid")
    )
    warmup_iters: int = knob(100, "steps of linear warm-up from 0", low=0)
    warmdown_frac: float = knob(0.4, "last part of a trapezoid, falling to 0", above=0, high=1)
    optimizer: str = knob("adamw", "muon: for the matrices of blocks", choices=("adamw", "muon"))
    lr: float = knob(0.0003, "highest learning rate of AdamW", low=0)
    muon_lr: float = knob(0.004, "highest learning rate of Muon, on AdamW's scale", low=0)
    weight_decay: float = knob(0.01, "decoupled weight decay of every parameter", low=0)
    betas: str = knob("0.9,0.95", "AdamW's two decay rates")
    grad_clip: float = knob(1.0, "largest norm of the whole gradient; 0: off", low=0)

    eval_interval: int = knob(5, "epochs between validations", group="Evaluation", low=1)
    val_every: int | None = knob(None, "steps between validations", low=0, none="auto")
    save_interval: int = knob(10, "epochs between saved models", low=1)
    save_every: int | None = knob(None, "steps between checkpoints", low=0, none="auto")
    keep: int = knob(2, "checkpoints kept for a resume", low=1)

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"N_EMBD={self.n_embd} must be N_HEAD={self.n_head} times an even head width"
            )
        if not re.fullmatch(r"0?\.\d+,0?\.\d+", self.betas):
            what = "expected two numbers in (0, 1), such as 0.9,0.95"
            raise ValueError(f"BETAS={self.betas!r}: {what}")
        if self.fp16 and self.bf16:
            raise ValueError("FP16=1 and BF16=1 exclude each other; set one of them")
        name = Path(self.output_dir).resolve().name
        if self.output_dir and self.run_id not in ("", name):
            names = f"OUTPUT_DIR={self.output_dir} names the run, RUN_ID={self.run_id} differs"
            raise ValueError(f"{names}; leave one out")

    @property
    def amp_dtype(self) -> torch.dtype:
        if self.fp16:
            return torch.float16
        return torch.bfloat16 if self.bf16 else torch.float32


# The sections of a YAML file. Its keys are the knobs, most in the original's spelling.
SECTIONS = {
    "model": "d_model num_layers num_heads d_ff max_seq_len dropout use_rope tie_weights ffn_type",
    "data": "train_path val_path test_path max_seq_len train_examples val_examples "
    "curriculum_exact " + " ".join(f.name for f in fields(Language)),
    "training": "num_epochs num_iterations batch_size schedule warmdown_frac answer_only_loss "
    "grad_clip eval_interval val_every save_interval save_every",
    "training.optimizer": "lr muon_lr weight_decay warmup_steps betas",
    "logging": "log_interval use_wandb wandb_project tracker",
}
SECTIONS = {section: words.split() for section, words in SECTIONS.items()}
YAML = {f"{section}.{key}": key for section, keys in SECTIONS.items() for key in keys}
YAML |= {"model.name": "model_name", "training.optimizer.name": "optimizer"}
KNOB_OF = {"d_model": "n_embd", "num_layers": "n_layer", "num_heads": "n_head"}
KNOB_OF |= {"max_seq_len": "sequence_length", "learning_rate": "lr"}
FIXED = {
    "model.vocab_size": (35, "the tokenizer has 35 ids"),
    "data.use_steps": (False, "there are no steps in the text"),
    "data.step_masking_mode": ("none", "there are no steps in the text; see ANSWER_ONLY_LOSS"),
}


def settle_device(device: str, fp16: bool, gpu_only: bool, say: Callable = print) -> str:
    """The device to train on. Raises RuntimeError, in the original's words and order, where
    GPU-only mode or fp16 cannot be kept; without GPU-only mode the way to the CPU is one line."""
    if gpu_only and device != "cuda":
        raise RuntimeError(
            "GPU-only mode requires --device cuda. Aborting to prevent accidental CPU training."
        )
    if gpu_only and not torch.cuda.is_available():
        raise RuntimeError(
            "CUDA requested but not available. GPU-only mode cannot fall back to CPU. Aborting."
        )
    if gpu_only:
        rule = "=" * 60
        say(f"{rule}\nGPU-ONLY MODE ENABLED")
        say(f"CPU training is disabled. Will abort if GPU unavailable.\n{rule}")
    if device == "cuda" and not torch.cuda.is_available():
        say("CUDA not available, using CPU")
        device = "cpu"
    if fp16 and device != "cuda":
        raise RuntimeError("FP16 mixed precision requires CUDA device")
    return device


def read_settings(argv: Sequence[str], env: dict[str, str]) -> Knobs:
    """Knobs from all sources; the device is settled before any file is opened."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--set", action="append", default=[])
    early.add_argument("--config", default=env.get("CONFIG", ""))
    early.add_argument("--device", default=env.get("DEVICE", "cpu"))
    for names in (["--fp16"], ["--gpu_only", "--gpu-only"]):
        default = env.get(names[0][2:].upper(), "0")
        early.add_argument(*names, nargs="?", const="1", default=default)
    found, rest = early.parse_known_args(argv)
    if found.device not in ("cpu", "cuda"):
        raise UserError(f"DEVICE={found.device!r}: expected one of cpu, cuda")
    say = print if env.get("RANK", "0") == "0" else lambda line: None
    device = settle_device(found.device, found.fp16 == "1", found.gpu_only == "1", say)
    rest += [f"--device={device}", f"--fp16={found.fp16}", f"--gpu_only={found.gpu_only}"]
    return read_all([*rest, f"--config={found.config}"], env, found.config, found.set)


def read_all(argv: Sequence[str], env: dict[str, str], config: str, sets: Sequence[str]) -> Knobs:
    """Flags over environment over --set over YAML over defaults."""
    knob_of = spellings(Knobs)
    names = YAML | {spelling.lower(): spelling.lower() for spelling in knob_of}
    assigned = read_assignments(sets, names, FIXED)
    overridden = [knob_of[name.upper()] for name in assigned]
    texts = read_yaml(config, YAML, FIXED) if config else {}
    texts = {name: text for name, text in texts.items() if knob_of[name.upper()] not in overridden}
    cfg = read_knobs(Knobs, PRESETS, argv, env, __doc__, config=texts | assigned)
    if not cfg.output_dir:
        return cfg
    folder = Path(cfg.output_dir).resolve()
    return replace(cfg, logs_folder=str(folder.parent), run_id=folder.name)


# ----------------------------------------------------------------------------
# Model


class SharedDropout(nn.Module):
    """Dropout with the masks of the whole batch, of which a rank takes its own rows, so that the
    masks are the same for every number of ranks."""

    def __init__(self, cfg: Knobs, first_row: int):
        super().__init__()
        self.p, self.batch_size, self.first_row = cfg.dropout, cfg.batch_size, first_row

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        mask = torch.empty(self.batch_size, *x.shape[1:], dtype=x.dtype, device=x.device)
        mask.bernoulli_(1 - self.p)
        return x * mask[self.first_row : self.first_row + len(x)] / (1 - self.p)


def rotary_tables(T: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, D) each; both halves of the width turn by the same angles."""
    frequency = 1.0 / 10000 ** (torch.arange(0, D, 2).float() / D)
    angle = torch.outer(torch.arange(T).float(), frequency)
    angle = torch.cat([angle, angle], dim=1)
    return angle.cos(), angle.sin()


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_BHTD.chunk(2, dim=-1)
    return (x_BHTD * cos + torch.cat([-b, a], dim=-1) * sin).type_as(x_BHTD)


class Attention(nn.Module):
    """Causal attention without biases; query, key and value come from one matrix, head by head.
    Padding stands to the right of all that is scored, so that the causal mask hides it."""

    def __init__(self, cfg: Knobs, drop: SharedDropout):
        super().__init__()
        self.cfg, self.drop = cfg, drop
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        parts = self.qkv(x_BTC).view(B, T, 3, self.cfg.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        if self.cfg.use_rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.training and self.drop.p > 0:  # dropout of the pattern, which SDPA would not share
            scores = (q * q.size(-1) ** -0.5) @ k.mT
            future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
            pattern = scores.masked_fill(future, -torch.inf).softmax(dim=-1).type_as(v)
            z = self.drop(pattern) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """With biases; exact GELU, or a second projection gated by an activated one (Shazeer, arXiv
    2002.05202)."""

    def __init__(self, cfg: Knobs, drop: SharedDropout):
        super().__init__()
        self.cfg, self.drop = cfg, drop
        self.fc1 = nn.Linear(cfg.n_embd, cfg.d_ff)
        if cfg.ffn_type != "gelu":
            self.value = nn.Linear(cfg.n_embd, cfg.d_ff)
        self.fc2 = nn.Linear(cfg.d_ff, cfg.n_embd)

    def activate(self, pre: Tensor, x_BTC: Tensor) -> Tensor:
        if self.cfg.ffn_type == "gelu":
            return F.gelu(pre)
        activated = F.silu(pre) if self.cfg.ffn_type == "swiglu" else F.gelu(pre)
        return activated * self.value(x_BTC)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.fc2(self.drop(self.activate(self.fc1(x_BTC), x_BTC)))


class Block(nn.Module):
    def __init__(self, cfg: Knobs, drop: SharedDropout):
        super().__init__()
        self.ln1 = nn.LayerNorm(cfg.n_embd)
        self.attn = Attention(cfg, drop)
        self.ln2 = nn.LayerNorm(cfg.n_embd)
        self.mlp = MLP(cfg, drop)
        self.drop = drop

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.ln1(x), cos, sin))
        return x + self.drop(self.mlp(self.ln2(x)))


class CompactTransformer(nn.Module):
    """Pre-norm decoder with LayerNorm, rotary attention and a tied embedding."""

    def __init__(self, cfg: Knobs, first_row: int = 0):
        super().__init__()
        self.cfg, self.drop = cfg, SharedDropout(cfg, first_row)
        self.embed = nn.Embedding(len(VOCABULARY), cfg.n_embd)
        if not cfg.use_rope:
            self.position = nn.Embedding(cfg.sequence_length, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg, self.drop) for _ in range(cfg.n_layer))
        self.ln_final = nn.LayerNorm(cfg.n_embd)
        if not cfg.tie_weights:
            self.head = nn.Linear(cfg.n_embd, len(VOCABULARY), bias=False)
        cos, sin = rotary_tables(max(128, 4 * cfg.sequence_length), cfg.n_embd // cfg.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """N(0, 0.02) for every matrix, biases 0, norms 1 and 0. Each matrix has its own generator,
        made of seed and name, so that another MLP or depth moves no other tensor."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                p.copy_(torch.empty(p.shape).normal_(0, 0.02, generator=generator))
            else:
                p.fill_(float(".ln" in f".{name}" and name.endswith("weight")))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits, (B, T, V)."""
        T = ids_BT.size(1)
        x = self.embed(ids_BT)
        if not self.cfg.use_rope:
            x = x + self.position.weight[:T]
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        head = self.embed if self.cfg.tie_weights else self.head
        return F.linear(self.ln_final(x), head.weight)


# ----------------------------------------------------------------------------
# Optimizers and schedule


def orthogonalize(g_SMN: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack, roughly, by Jordan's Newton-Schulz iteration.
    differs from train_gpt.py: small matrices, in fp32 on a CPU."""
    x = g_SMN.to(dtype)
    is_tall = x.size(1) > x.size(2)
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if is_tall else x


class Muon:
    """Momentum, orthogonalized and scaled to the size of an AdamW update. Nothing moves where
    all_finite is False. differs from train_gpt.py: weight decay, and every rank does all of it."""

    def __init__(self, params: Sequence[nn.Parameter], cfg: Knobs):
        self.peak_lr, self.weight_decay = cfg.muon_lr, cfg.weight_decay
        self.stacks: dict[str, list[nn.Parameter]] = {}
        for p in params:
            self.stacks.setdefault(f"{len(p)}x{p.size(1)}", []).append(p)
        self.momenta = {name: torch.zeros_like(torch.stack(s)) for name, s in self.stacks.items()}

    @torch.no_grad()
    def step(self, lr: float, all_finite: Tensor) -> None:
        for name, params in self.stacks.items():
            gradient = torch.stack([p.grad for p in params])
            gradient = torch.where(all_finite, gradient, 0.0)
            moved = self.momenta[name].lerp(gradient, 0.05)
            self.momenta[name] = torch.where(all_finite, moved, self.momenta[name])
            nesterov = gradient.lerp(moved, 0.95)
            dtype = torch.bfloat16 if nesterov.is_cuda else torch.float32
            updates = orthogonalize(nesterov, dtype).float()
            scale = 0.2 * max(updates.shape[1:]) ** 0.5
            for p, update in zip(params, updates, strict=True):
                p.sub_((self.weight_decay * p + scale * update) * (lr * all_finite))

    def state_dict(self) -> dict[str, Tensor]:
        return self.momenta

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, momentum in self.momenta.items():
            momentum.copy_(state[name])


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose step is left out where the device flag `all_finite` is down.
    differs from train_gpt.py: it knows its highest rate."""

    def __init__(self, params: Sequence[nn.Parameter], cfg: Knobs):
        self.peak_lr = cfg.lr
        betas = tuple(float(text) for text in cfg.betas.split(","))
        super().__init__(params, cfg.lr, betas, weight_decay=cfg.weight_decay, fused=True)

    def step(self, lr: float, all_finite: Tensor) -> None:
        self.param_groups[0]["lr"] = lr
        self.found_inf = (~all_finite).float()  # how torch's GradScaler tells the fused kernel
        super().step()


class LossScale(nn.Module):
    """Keeps small fp16 gradients representable (Micikevicius et al., arXiv 1710.03740); 1 for other
    dtypes."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.is_fp16 = dtype == torch.float16
        self.register_buffer("scale", torch.tensor(2.0**16 if self.is_fp16 else 1.0))
        self.register_buffer("good_steps", torch.tensor(0))

    def update(self, grad_norms_P: Tensor) -> Tensor:
        """Halve after an overflow, double after 1,000 steps without; returns whether fp16 has
        overflowed."""
        overflow = ~grad_norms_P.isfinite().all() & self.is_fp16
        self.good_steps.copy_(torch.where(overflow, 0, self.good_steps + self.is_fp16))
        growth = torch.where(self.good_steps % 1000 == 999, 2.0, 1.0)
        self.scale *= torch.where(overflow, 0.5, growth)
        return overflow


def make_optimizers(model: CompactTransformer, cfg: Knobs) -> list[AdamW | Muon]:
    """AdamW, with decay on everything as the original has it; with OPTIMIZER=muon, Muon for the
    matrices of blocks and AdamW for the rest."""
    for_muon = []
    if cfg.optimizer == "muon":
        for_muon = [p for p in model.blocks.parameters() if p.dim() == 2]
    ids = {id(p) for p in for_muon}
    for_adam = [p for p in model.parameters() if id(p) not in ids]
    optimizers: list[AdamW | Muon] = [AdamW(for_adam, cfg)]
    if for_muon:
        optimizers.append(Muon(for_muon, cfg))
    return optimizers


def clip_gradients(gradients: Tensor, norms_P: Tensor, limit: float) -> None:
    """Scale the gradients in place to a joint norm of at most `limit`; 0 leaves them."""
    if limit:
        gradients *= (limit / (norms_P.norm() + 1e-6)).clamp(max=1.0)


def lr_scale(update: int, cfg: Knobs, total: int) -> float:
    """Factor of the rates for update number `update`, from 0. Warm-up starts at 0, so that the
    first update of a warm-up moves nothing. linear: then straight to 0 at `total`. trapezoid: 1,
    and to 0 over the last WARMDOWN_FRAC."""
    if update < cfg.warmup_iters:
        return update / cfg.warmup_iters
    decay_steps = total - cfg.warmup_iters
    if cfg.schedule == "trapezoid":
        decay_steps = cfg.warmdown_frac * total
    return min(1.0, max(0.0, (total - update) / max(1, decay_steps)))


# ----------------------------------------------------------------------------
# Batches


def make_batch(step: int, data: Data, cfg: Knobs, world: World, state: "TrainState") -> tuple:
    """This rank's inputs and labels of the step, and the number of labels over all ranks. Every
    rank makes the whole batch, BATCH_SIZE rows as long as its longest example, so that all ranks
    see one shape. A CUDA graph needs the same shape at every step."""
    problems = data.batch(step, state.switches)
    length = cfg.sequence_length if cfg.cuda_graph else 0
    x, y = inputs_and_labels(problems, cfg.answer_only_loss, cfg.batch_size, length)
    num_labels = torch.tensor(float((y != IGNORE).sum()))
    rows = world.share(cfg.batch_size)
    return torch.from_numpy(x[rows]), torch.from_numpy(y[rows]), num_labels


# ----------------------------------------------------------------------------
# Evaluation

SCORES = "loss tokens answer_loss answer_tokens end_loss end_ok first_ok digits_ok exact".split()


def autocast(cfg: Knobs, device: torch.device) -> torch.autocast:
    enabled = cfg.amp_dtype != torch.float32
    return torch.autocast(device.type, dtype=cfg.amp_dtype if enabled else None, enabled=enabled)


@torch.no_grad()
def teacher_forced(
    model: nn.Module, problems: Problems, cfg: Knobs, device: torch.device
) -> Tensor:
    """(B, SCORES) float64: what the model says of the gold text, one token at a time.

    `exact` is that of greedy decoding, which writes the gold answer if and only if each of its
    tokens, and the end, is the likeliest one after the gold tokens before it."""
    x, y = inputs_and_labels(problems, False, len(problems))
    x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    with autocast(cfg, device):
        logits = model(x).float()
    flat = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE, reduction="none")
    nll, right = flat.view_as(y).double(), logits.argmax(dim=-1) == y
    at = torch.arange(1, x.size(1) + 1, device=device)  # position of each label in the text
    start = torch.from_numpy(problems.starts_N).to(device)[:, None]
    last = torch.from_numpy(problems.lengths_N).to(device)[:, None] - 1
    answer, end = (at >= start) & (at < last), at == last
    scored = answer | end if cfg.answer_only_loss else at <= last
    exact = (right | ~(answer | end)).all(dim=1, keepdim=True)
    columns = [nll * scored, scored, nll * answer, answer, nll * end, right & end]
    columns += [right & (at == start), right & answer, exact]
    return torch.stack([column.double().sum(dim=1) for column in columns], dim=1)


def score(
    model: nn.Module, problems: Problems, cfg: Knobs, world: World, batch: int = 512
) -> np.ndarray:
    """(N, SCORES) on every rank: losses in nats, counts, and per problem whether it is right. The
    ranks share the problems; no dropout."""
    table = torch.zeros(len(problems), len(SCORES), dtype=torch.float64, device=world.device)
    was_training = model.training
    model.eval()
    share = world.share(len(problems))
    for start in range(share.start, share.stop, batch):
        rows = slice(start, min(start + batch, share.stop))
        table[rows] = teacher_forced(model, problems.rows(rows), cfg, world.device)
    model.train(was_training)
    return world.all_reduce(table).cpu().numpy()


def summary(table: np.ndarray) -> dict[str, float]:
    """Means over a score table. eos_after_gold is the original's "accuracy": whether the end is
    predicted after the whole gold answer was read. A model that always says "end" has 1."""
    s = dict(zip(SCORES, table.sum(0).tolist(), strict=True))
    n, loss = len(table), s["loss"] / s["tokens"]
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "exact_match": s["exact"] / n,
        "eos_after_gold": s["end_ok"] / n,
        "digit_accuracy": s["digits_ok"] / s["answer_tokens"],
        "first_token_accuracy": s["first_ok"] / n,
        "answer_loss": s["answer_loss"] / s["answer_tokens"],
        "end_loss": s["end_loss"] / n,
    }


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


# ----------------------------------------------------------------------------
# Training


@dataclass
class TrainState:
    """With the model, the optimizers and the loss scale, all that the next step depends on."""

    step: int = 0
    skipped: int = 0  # updates that fp16 left out: the schedule waits for them
    switches: list[int] = field(default_factory=list)  # steps from which one more operand is drawn
    exact: float = 0.0  # running exact match of the training batches, since the last switch
    epoch_loss: float = 0.0  # sums over the epoch's scored tokens
    epoch_tokens: float = 0.0
    best_at: int = 0  # epoch, or step, of the best validation
    history: list[dict] = field(default_factory=list)  # validations

    SWITCH_DELAY = 8  # steps; more than are in preparation when a step is heard of

    def hear(self, stats: StepStats, cfg: Knobs, data: Data, say: Callable[[str], None]) -> None:
        """Take one finished step into account."""
        self.skipped += stats.skipped
        tokens = stats.metrics["scored_tokens"]
        self.epoch_loss += stats.loss * tokens
        self.epoch_tokens += tokens
        if data.epoch_steps and stats.step % data.epoch_steps == 0:
            loss = self.epoch_loss / self.epoch_tokens
            num_epochs = -(-data.total_steps // data.epoch_steps)
            say(f"Epoch {stats.step // data.epoch_steps}/{num_epochs}")
            say(f"Train Loss: {loss:.4f} | Train Perplexity: {perplexity(loss):.2f}")
            self.epoch_loss = self.epoch_tokens = 0.0
        if not cfg.curriculum_exact:
            return
        self.exact = 0.9 * self.exact + 0.1 * stats.metrics["train_exact"]
        operands = cfg.operands_min + len(self.switches) + 1
        if self.exact > cfg.curriculum_exact and operands <= cfg.operands_max:
            self.switches.append(stats.step + self.SWITCH_DELAY)
            self.exact = 0.0
            what = f"{operands} operands from step {self.switches[-1]} on"
            say(f"step:{stats.step} curriculum: {what}")


class GraphedStep:
    """A forward and backward pass as one launch: a CUDA graph over fixed buffers. Small steps are
    bound by the launches of their hundreds of kernels."""

    def __init__(self, run: Callable, *inputs: Tensor):
        self.inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at the first use must not be captured
            for _ in range(3):
                run(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = run(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for buffer, tensor in zip(self.inputs, inputs, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.outputs


def forward_backward(
    model: CompactTransformer, loss_scale: LossScale, cfg: Knobs, x: Tensor, y: Tensor, n: Tensor
) -> tuple[Tensor, Tensor]:
    """Add this rank's part of the gradient of the mean over all labels; returns its share of the
    loss and of the fraction of examples that are right."""
    with autocast(cfg, x.device):
        logits = model(x)
    flat = logits.float().flatten(0, 1)
    loss = F.cross_entropy(flat, y.flatten(), ignore_index=IGNORE, reduction="sum") / n
    (loss * loss_scale.scale).backward()
    is_right = ((logits.detach().argmax(dim=-1) == y) | (y == IGNORE)).all(dim=1)
    is_example = (y != IGNORE).any(dim=1)
    return loss.detach(), (is_right & is_example).sum() / cfg.batch_size


def seed_dropout(cfg: Knobs, step: int) -> None:
    """Masks are a function of seed and step, so that a resume needs no generator's state."""
    if cfg.dropout:
        words = np.random.SeedSequence([cfg.seed, step]).generate_state(1, np.uint32)
        torch.manual_seed(int(words[0]))


def train(cfg: Knobs, world: World, session: Session, data: Data) -> None:
    model = CompactTransformer(cfg, first_row=world.share(cfg.batch_size).start)
    model.init_weights(cfg.seed)
    model.to(world.device).train()
    gradients = flat_gradients(model)
    optimizers = make_optimizers(model, cfg)
    loss_scale = LossScale(cfg.amp_dtype).to(world.device)
    state = TrainState()
    session.describe(model, flops_per_token(cfg), **facts_of(cfg, world, data))
    saved = dict(model=model, optimizers=optimizers, loss_scale=loss_scale, state=state)
    session.restore(**saved)
    run_step = partial(forward_backward, model, loss_scale, cfg)
    make = lambda step: make_batch(step, data, cfg, world, state)
    prefetch = Prefetch(make, state.step, world.device)

    while True:
        # -------- clock stopped: evaluate, save, leave --------
        for stats in session.between_steps(state.step, finished=state.step >= data.total_steps):
            state.hear(stats, cfg, data, session.say)
        if session.should_validate:
            validate(model, session, data, state)
        if session.should_save:
            session.save(state.step, **saved)
            save_models(model, optimizers, session, data, state)
        if session.stopping:
            break

        # -------- clock running: one optimizer step --------
        session.start_clock()
        batch = prefetch.get(state.step)
        seed_dropout(cfg, state.step)
        if cfg.cuda_graph and not isinstance(run_step, GraphedStep):
            run_step = GraphedStep(run_step, *batch)
            gradients.zero_()  # the warm-up of the graph has added to them
        loss, train_exact = run_step(*batch)
        world.all_reduce(gradients)
        gradients /= loss_scale.scale
        norms = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()]))
        clip_gradients(gradients, norms, cfg.grad_clip)
        overflow = loss_scale.update(norms)
        scale = lr_scale(state.step - state.skipped, cfg, data.total_steps)
        metrics = {"scored_tokens": (batch[1] != IGNORE).sum()}
        if cfg.answer_only_loss:
            metrics["train_exact"] = train_exact
        step_figures = dict(lr=cfg.lr * scale, grad_norms=norms, overflow=overflow, **metrics)
        all_finite = session.step(state.step + 1, loss, **step_figures)
        for optimizer in optimizers:
            optimizer.step(optimizer.peak_lr * scale, all_finite)
        gradients.zero_()
        state.step += 1
    prefetch.close()
    if session.status == "finished":
        score_test_sets(model, session, data, state)


# ----------------------------------------------------------------------------
# Records

RESULTS = (
    "run_id date git_commit seed d_model num_layers num_heads d_ff answer_format train_path "
    "train_examples grammar operators operands_max depth_max optimizer learning_rate muon_lr "
    "batch_size sequence_length num_iterations final_val_loss best_val_loss exact_match "
    "eos_after_gold entropy_floor train_time_ms ms_per_step gpu_name n_gpus notes stage status "
    "steps_done n_params tokens_seen epochs peak_memory_mib torch world_size code_sha256 dirty"
).split()
METRICS = ("exact_match", "eos_after_gold", "digit_accuracy", "train_exact", "scored_tokens")


def validate(model: nn.Module, session: Session, data: Data, state: TrainState) -> None:
    """Score the validation set, and save the model where its loss is the best so far."""
    cfg, progress = session.cfg, session.progress
    s = summary(score(model, data.val, cfg, session.world))
    own = {name: s[name] for name in METRICS[:3]}
    note = "".join(f" {name}:{value:.4f}" for name, value in own.items())
    is_best = not s["loss"] >= progress.best_loss  # also the first, where best is nan
    session.log_validation(state.step, s["loss"], f"{note} entropy_floor:{data.floor:.4f}", **own)
    session.say(f"Val Loss: {s['loss']:.4f} | Val Perplexity: {s['perplexity']:.2f}")
    session.row |= {"entropy_floor": data.floor} | {name: s[name] for name in METRICS[:2]}
    epoch = state.step // data.epoch_steps if data.epoch_steps else 0
    entry = {"epoch": epoch, "step": state.step, "train_loss": progress.train_loss}
    state.history.append(entry | {f"val_{name}": value for name, value in s.items()})
    if is_best:
        state.best_at = epoch or state.step
        session.say("New best model!")
        save_model("checkpoint_best.pt", model, [], session, data, state)
    best = {"best_val_loss": progress.best_loss, "best_val_epoch": state.best_at}
    best["best_val_perplexity"] = perplexity(progress.best_loss)
    best["entropy_floor"] = None if math.isnan(data.floor) else data.floor
    content = {"config": asdict(cfg), "seed": cfg.seed, "metrics": state.history, **best}
    write_json(session, f"metrics/training_metrics_seed{cfg.seed}.json", content)


def write_json(session: Session, name: str, content: dict) -> None:
    """A file in the run's folder. Raises UserError on every rank when it cannot be written."""
    problem = None
    if session.world.is_main:
        try:
            text = json.dumps(content, indent=1) + "\n"
            write_whole(session.folder / name, text.encode())
        except OSError as error:
            path = session.folder / name
            problem = f"{path} could not be written ({error.strerror}); free space and run it again"
    session.world.agree(problem)


def save_models(model, optimizers, session: Session, data: Data, state: TrainState) -> None:
    """checkpoint_latest.pt, and at every SAVE_INTERVAL epochs a model that is kept."""
    if data.epoch_steps and state.step % (session.cfg.save_interval * data.epoch_steps) == 0:
        name = f"checkpoint_epoch_{state.step // data.epoch_steps}.pt"
        save_model(name, model, optimizers, session, data, state)
    save_model("checkpoint_latest.pt", model, optimizers, session, data, state)


def save_model(
    name: str, model: nn.Module, optimizers: list, session: Session, data: Data, state: TrainState
) -> None:
    """A file with the original's keys."""
    config = asdict(session.cfg)
    model_config = {key: config[KNOB_OF.get(key, key)] for key in SECTIONS["model"]}
    content = {
        "epoch": state.step // data.epoch_steps if data.epoch_steps else 0,
        "step": state.step,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": [optimizer.state_dict() for optimizer in optimizers],
        "scheduler_state_dict": {"updates": state.step - state.skipped, "total": data.total_steps},
        "model_config": model_config | {"vocab_size": len(VOCABULARY)},
        "train_config": config,
        "answer_digits": data.language.digits,
        "val_loss": session.progress.val_loss,
        "git_commit": session.log.git_commit,
        "code_sha256": session.log.code_sha256,
    }
    save_weights(session.folder / name, content, session.world)
    session.say(f"Saved checkpoint to {session.folder / name}")


def score_test_sets(model: nn.Module, session: Session, data: Data, state: TrainState) -> None:
    """The validation and test sets beside what needs no model, and the original's closing words."""
    cfg, say = session.cfg, session.say
    values, counts = np.unique(data.sample.values_N, return_counts=True)
    common = int(values[counts.argmax()])
    report = {}
    for name, problems in {cfg.val_path: data.val, **data.tests}.items():
        table = score(model, problems, cfg, session.world)
        s, exact_N = summary(table), table[:, SCORES.index("exact")]
        groups = arithmetic_data.breakdown(problems, exact_N, data.language)
        base = arithmetic_data.baselines(problems, data.language, common)
        report[name] = {**s, "n": len(problems), **groups, "baselines": base}
        say(
            f"{name}: n:{len(problems)} exact_match:{s['exact_match']:.4f} "
            f"digits:{s['digit_accuracy']:.4f} eos_after_gold(legacy):{s['eos_after_gold']:.4f} | "
            f"baselines: paren_blind:{base['paren_blind']:.4f} "
            f"most_frequent:{base['most_frequent']:.4f} always_end(legacy):1.0000"
        )
    content = {"step": state.step, "most_frequent": common, "sets": report}
    write_json(session, "evaluation.json", content)
    rule, best = "=" * 50, session.progress.best_loss
    say(f"{rule}\nTRAINING SUMMARY\n{rule}")
    if state.history:
        say(f"Best validation loss:        {best:.4f}")
        say(f"Best validation perplexity:  {perplexity(best):.2f}")
        say(
            f"{'Achieved at epoch:' if data.epoch_steps else 'Achieved at step:':29}{state.best_at}"
        )
    else:
        say("No validation metrics available")
    if session.world.device.type == "cuda":
        say(f"Peak VRAM:                   {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    say("Training complete!")


def facts_of(cfg: Knobs, world: World, data: Data) -> dict[str, object]:
    """What the head of the log says beside the knobs."""
    facts: dict[str, object] = {"Configuration": cfg.config or "none"}
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
        facts |= {"GPU Name": world.device_name(), "GPU Memory": f"{memory / 1e9:.2f} GB"}
        facts["FP16 Mixed Precision"] = "ENABLED" if cfg.fp16 else "DISABLED"
    return facts | {
        "Vocabulary size": len(VOCABULARY),
        "Model parameters": f"{count_parameters(cfg) / 1e6:.2f}M",
        "Train dataset size": len(data.train) if data.train else "fresh at every step",
        "Validation dataset size": len(data.val),
        "train data": cfg.train_path,
        "validation data": cfg.val_path,
        "answer": f"{cfg.answer_format}, up to {data.language.digits} digits",
        "tokens_per_step": f"{data.step_tokens:,}, mean of {cfg.batch_size} examples",
        "entropy_floor": f"{data.floor:.4f} nats per scored token, which no model can beat",
    }


def count_parameters(cfg: Knobs) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in CompactTransformer(cfg).parameters())


def flops_per_token(cfg: Knobs) -> int:
    """Forward and backward pass: 6 per weight, and causal attention."""
    return 6 * count_parameters(cfg) + 6 * cfg.n_layer * cfg.sequence_length * cfg.n_embd


def plan(cfg: Knobs, world: World) -> dict[str, object]:
    """What --dry_run shows. Raises UserError for what the run would refuse."""
    data = Data(cfg)
    tokens = data.step_tokens * data.total_steps
    return {
        "parameters": f"{count_parameters(cfg):,}",
        "training tokens": f"{tokens:,} in {data.total_steps} steps",
        "compute": f"{flops_per_token(cfg) * tokens:.3g} FLOPs",
        **facts_of(cfg, world, data),
    }


def main() -> int:
    cfg = read_settings(sys.argv[1:], dict(os.environ))
    if cfg.dry_run:
        return show_plan(cfg, plan)
    with join_world(cfg.device) as world:
        data = Data(cfg)
        tenth = max(1, data.total_steps // 10)
        val_every, save_every = cfg.val_every, cfg.save_every
        if val_every is None:
            val_every = cfg.eval_interval * data.epoch_steps or tenth
        if save_every is None:
            save_every = cfg.save_interval * data.epoch_steps or tenth
        session = Session(
            cfg,
            world,
            total_steps=data.total_steps,
            tokens_per_step=data.step_tokens,
            data={"training": data.content},
            columns=RESULTS,
            column_knobs=KNOB_OF,
            presets=PRESETS,
            resume_may_differ=RESUME_MAY_DIFFER,
            sources=[__file__, arithmetic.__file__, arithmetic_data.__file__],
            steps_per_epoch=data.epoch_steps or None,
            val_every=val_every,
            save_every=[save_every, cfg.save_interval * data.epoch_steps],
            validate_at_start=False,
            log_every=cfg.log_interval,
            metrics=METRICS,
            named_by="OUTPUT_DIR" if cfg.output_dir else "RUN_ID",
            out_of_memory="lower BATCH_SIZE",
        )
        with session:
            train(cfg, world, session, data)
    return session.exit_code


if __name__ == "__main__":
    launch(main)
