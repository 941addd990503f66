"""train_gpt.py -- the 124M GPT of the 2024-10 speedrun records, with gated attention, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py        8 GPUs, the speedrun baseline
    ATTNGATE=elementwise LR=0.00468 torchrun --standalone --nproc_per_node=8 train_gpt.py
    PRESET=demo python train_gpt.py                              a laptop, no download

Expect   val_loss 3.2927 +- 0.0011 (no gate) and 3.2723 +- 0.0011 (elementwise) in the original
         study: 5100 steps at LR 0.00468, n=3 seeds each, 8x RTX PRO 6000 (docs/results.md)
Shapes   B sequences, T tokens, C model width, H heads, D head width, R gate rows, V vocabulary,
         N = B * T; S matrices of K rows and L columns; x_BTC has shape (B, T, C)
Raises   UserError (one line, exit code 2) where a user can help
Sources  modded-nanogpt records of 2024-10 (K. Jordan et al.): architecture, Muon, token order;
         gates: Qiu et al., Gated Attention for LLMs, arXiv 2505.06708
Shared   plumbing/ keeps the run alive; what of it moves a loss is batches.py, the token order
"""

import hashlib
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing import ROOT, RUN_KNOBS, RunKnobs, Session, knob, read_knobs, show_plan
from plumbing.batches import VIRTUAL_RANKS, TokenBatches, padded_batches
from plumbing.data import Prefetch, TokenShards
from plumbing.device import check_compiler, choose_precision, choose_rows
from plumbing.leaks import check_disjoint
from plumbing.plan import plan_facts
from plumbing.texts import embedded_corpus
from plumbing.world import World, flat_gradients, join_world, launch

# ---------------- Knobs

FINEWEB = ROOT / "data/fineweb10B/fineweb"
# fmt: off
PRESETS = {
    "speedrun": {},
    # bytes of Python's own documentation: below 2 nats a byte within a minute on two cores
    "demo": dict(
        device="cpu", precision="fp32", compile=False, input_bin="embedded",
        input_val_bin="embedded", vocab_size=256, n_layer=3, n_head=2, n_embd=128,
        sequence_length=128, batch_size=32, device_batch_size=16, num_iterations=400,
        warmdown_iters=200, lr=0.01, val_every=50, val_tokens=65536, save_every=50),
    # GPT-2 tokens on a CPU at the record's width: one layer, short sequences, small batches
    "tiny": dict(
        device="cpu", precision="fp32", compile=False, n_layer=1, sequence_length=128,
        batch_size=16, device_batch_size=8, num_iterations=200, warmup_iters=10,
        warmdown_iters=150, lr=0.003, data_order="stream", val_every=25, val_tokens=16384,
        save_every=50),
}
# fmt: on
# These move no loss, so a resumed run may have others. Of shards, contents are compared.
RESUME_MAY_DIFFER = [*RUN_KNOBS, "preset", "device_batch_size", "epochs_ok", "runpod_instance_type"]
RESUME_MAY_DIFFER += ["input_bin", "input_val_bin"]

GATES = ("none", "headwise", "elementwise", "const")
POSITIONS = ("sdpa", "value", "key", "query", "output")
ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "ns_sigmoid": lambda z: 0.5 + 0.5 * torch.sigmoid(z),  # non-sparse: between a half and one
    "silu": F.silu,
    "identity": lambda z: z,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Knobs(RunKnobs):
    preset: str = knob("speedrun", "named set of defaults", choices=tuple(PRESETS))
    n_layer: int = knob(12, "transformer blocks", low=1, group="model")
    n_head: int = knob(6, "attention heads", low=1)
    n_embd: int = knob(768, "model width, in channels", low=2)
    vocab_size: int = knob(50304, "token ids, padded", low=2, high=65536)
    attngate: str = knob("none", "kind of attention gate", choices=GATES)
    gatepos: str = knob("sdpa", "what the gate multiplies", choices=POSITIONS)
    gateact: str = knob("sigmoid", "activation of the gate", choices=tuple(ACTIVATIONS))
    gateopt: str = knob("muon", "optimizer of the gate's weights", choices=("muon", "adam"))
    mlp_match: bool = knob(False, "shrink the MLP to the ungated parameter count")
    batch_size: int = knob(512, "sequences per step, over all ranks", low=1, group="batch")
    device_batch_size: int | None = knob(64, "sequences per micro-batch", low=1, none="auto")
    sequence_length: int = knob(1024, "tokens per sequence", low=1)
    num_iterations: int = knob(5100, "optimizer steps", low=0, group="schedule")
    warmup_iters: int = knob(0, "steps of linear warm-up", low=0)
    warmdown_iters: int = knob(1450, "steps of linear decay to zero", low=0)
    time_budget_s: float | None = knob(None, "stretch the schedule over this", above=0, none="off")
    lr: float = knob(0.0036, "peak rate of AdamW; Muon takes a tenth of it", low=0)
    seed: int = knob(1337, "seed of initial weights", low=0)
    input_bin: str = knob(f"{FINEWEB}_train_*.bin", "training shards, or embedded", group="data")
    input_val_bin: str = knob(f"{FINEWEB}_val_*.bin", "validation shards, or embedded")
    data_order: str = knob("record", "order of the tokens", choices=("record", "stream"))
    data_seed: int | None = knob(None, "shuffle the order of the batches", low=0, none="off")
    epochs_ok: bool = knob(False, "start over when the shards run out")
    val_tokens: int = knob(10485760, "tokens of a validation, from the first on", low=1)
    precision: str = knob("bf16", "of matrix products", choices=("auto", *DTYPES), group="machine")
    runpod_instance_type: str = knob("unknown", "kind of machine, for the results row")

    def __post_init__(self):
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"N_EMBD={self.n_embd} must be N_HEAD={self.n_head} times an even head width"
            )
        scheduled = self.warmup_iters + self.warmdown_iters
        if self.num_iterations > 0 and scheduled > self.num_iterations:
            raise ValueError(
                f"WARMUP_ITERS={self.warmup_iters} + WARMDOWN_ITERS={self.warmdown_iters} do not "
                f"fit into NUM_ITERATIONS={self.num_iterations}; lower them, or train longer"
            )
        if self.data_order == "record" and self.batch_size % VIRTUAL_RANKS:
            raise ValueError(
                f"BATCH_SIZE={self.batch_size} must divide by {VIRTUAL_RANKS} in "
                f"DATA_ORDER=record; choose a multiple, or DATA_ORDER=stream"
            )
        if self.val_tokens % self.sequence_length:
            raise ValueError(f"VAL_TOKENS must be a multiple of {self.sequence_length}, a sequence")
        is_embedded = self.input_bin == "embedded"
        if is_embedded != (self.input_val_bin == "embedded"):
            raise ValueError("INPUT_BIN=embedded and INPUT_VAL_BIN=embedded go together")
        if is_embedded and self.vocab_size < 256:
            raise ValueError("INPUT_BIN=embedded is made of bytes; set VOCAB_SIZE=256")

    @property
    def gate_rows(self) -> int:
        """Rows of the gate's matrix: one per head, or one per channel."""
        return {"headwise": self.n_head, "elementwise": self.n_embd}.get(self.attngate, 0)

    @property
    def gate_words(self) -> str:
        if self.attngate == "none":
            return "none; GATEPOS, GATEACT and GATEOPT are not used"
        return f"{self.attngate} {self.gateact} at {self.gatepos}, trained by {self.gateopt}"

    @property
    def mlp_width(self) -> int:
        gate_params = self.n_embd if self.attngate == "const" else self.gate_rows * self.n_embd
        removed = math.ceil(gate_params / (2 * self.n_embd)) if self.mlp_match else 0
        return 4 * self.n_embd - removed


# ---------------- Model


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def apply_rotary(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout (Su et al., arXiv 2104.09864)."""
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    rotated = torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)
    return rotated.type_as(x_BTHD)


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate.type_as(x)


class Attention(nn.Module):
    """Causal attention with an optional gate (arXiv 2505.06708), which reads the normalised input.

    It multiplies the attention output per head (GATEPOS=sdpa, G1 in the paper), V (G2), K (G3),
    Q (G4) or the projection (G5). K and Q are gated behind their norm, which undoes a headwise one.
    """

    def __init__(self, cfg: Knobs):
        super().__init__()
        self.cfg = cfg
        C, H = cfg.n_embd, cfg.n_head
        self.in_proj = nn.Parameter(torch.empty(3 * C, C))  # Q, K, V
        self.out_proj = nn.Parameter(torch.empty(C, C))
        if cfg.attngate == "const":
            self.gate = nn.Parameter(torch.empty(H, C // H))  # the same for every token
        elif cfg.attngate != "none":
            self.gate = nn.Parameter(torch.empty(cfg.gate_rows, C))

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        R, heads = self.cfg.gate_rows, (B, T, self.cfg.n_head, -1)
        weight = self.in_proj
        padding = -R % 8  # tensor cores want rows in eights
        if R > 0:  # the gate comes from the same product
            weight = F.pad(torch.cat([weight, self.gate]), (0, 0, 0, padding))
        q, k, v, z_BTR, _ = F.linear(x_BTC, weight).split([C, C, C, R, padding], dim=-1)
        gates = {}  # the gate, by its position; it is popped where it is applied
        if self.cfg.attngate != "none":
            z = self.gate if self.cfg.attngate == "const" else z_BTR.view(heads)
            gates[self.cfg.gatepos] = ACTIVATIONS[self.cfg.gateact](z)
        q = gated(rms_norm(apply_rotary(q.view(heads), cos, sin)), gates.pop("query", None))
        k = gated(rms_norm(apply_rotary(k.view(heads), cos, sin)), gates.pop("key", None))
        v = gated(v.view(heads), gates.pop("value", None))
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y = gated(y.transpose(1, 2), gates.pop("sdpa", None))
        y = F.linear(y.reshape(B, T, C), self.out_proj)
        y = gated(y.view(heads), gates.pop("output", None))
        assert not gates, f"GATEPOS={self.cfg.gatepos} is nowhere applied"
        return y.view(B, T, C)

    def attend(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        """scripts/sample.py puts one with a cache in its place."""
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)


class Block(nn.Module):
    """Pre-norm residual block with a squared-ReLU MLP (So et al., Primer, arXiv 2109.08668)."""

    def __init__(self, cfg: Knobs):
        super().__init__()
        self.attn = Attention(cfg)
        self.up_proj = nn.Parameter(torch.empty(cfg.mlp_width, cfg.n_embd))
        self.down_proj = nn.Parameter(torch.empty(cfg.n_embd, cfg.mlp_width))

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn(rms_norm(x_BTC), cos, sin)
        hidden = F.linear(rms_norm(x_BTC), self.up_proj).relu().square()
        return x_BTC + F.linear(hidden, self.down_proj)


class GPT(nn.Module):
    """Decoder-only transformer. One matrix, `wte`, is embedding and head; no biases or norms are
    learned. Matrix products have `dtype`, parameters and the residual stream are fp32.
    """

    def __init__(self, cfg: Knobs, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.cfg, self.dtype, self.uses_autocast = cfg, dtype, dtype != torch.float32
        self.chunk_loss = chunk_loss_and_gradient
        self.wte = nn.Parameter(torch.empty(cfg.vocab_size, cfg.n_embd))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        D = cfg.n_embd // cfg.n_head
        frequency = 1.0 / 10000 ** (torch.arange(0, D, 2).float() / D)
        angle = torch.outer(torch.arange(cfg.sequence_length).float(), frequency)[:, None]
        # bf16, as the record's tables are
        self.register_buffer("cos", angle.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angle.sin().bfloat16(), persistent=False)

    def trunk(self, x_BT: Tensor, start: int = 0) -> Tensor:
        """What the head reads, (B, T, C), of tokens at positions start, start + 1, ..."""
        positions = slice(start, start + x_BT.size(1))
        x_BTC = F.embedding(x_BT, self.wte)
        for block in self.blocks:
            x_BTC = block(x_BTC, self.cos[positions], self.sin[positions])
        return rms_norm(x_BTC)

    def forward(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        """Summed cross-entropy, in nats, of the targets that are not -1."""
        mixed = (
            torch.autocast(x_BT.device.type, self.dtype) if self.uses_autocast else nullcontext()
        )
        with mixed:
            hidden_NC = self.trunk(x_BT).flatten(0, 1).to(self.dtype)
        with_gradient = torch.is_grad_enabled()  # evaluation needs none
        arguments = (hidden_NC, self.wte, y_BT.flatten(), self.chunk_loss, with_gradient)
        return LinearCrossEntropy.apply(*arguments)

    def logits(self, x_BT: Tensor, start: int = 0) -> Tensor:
        """(B, T, V) in fp32, for generation and tests; training never forms all of them."""
        return F.linear(self.trunk(x_BT, start), self.wte).float()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """nn.Linear's bounds; zeros for output projections and the constant gate. Each matrix has a
        generator of its own, made of seed and name, so that a gate moves no other tensor.
        """
        for name, p in self.named_parameters():
            is_const_gate = name.endswith("gate") and self.cfg.attngate == "const"
            if is_const_gate or name.endswith(("out_proj", "down_proj")):
                p.zero_()
                continue
            roles = ["q", "k", "v"] if name.endswith("in_proj") else [""]
            for role, weight in zip(roles, matrices(name, p), strict=True):
                # published numbers were drawn by these names
                seed_name = name.replace("in_proj", role).replace("up_proj", "up")
                digest = hashlib.sha256(f"{seed} {seed_name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                bound = weight.size(1) ** -0.5
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))


def matrices(name: str, p: Tensor) -> tuple[Tensor, ...]:
    """The matrices that a parameter stacks, as views: Muon treats each by itself."""
    return p.chunk(3) if name.endswith("in_proj") else (p,)


# ---------------- Loss


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


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear head, a chunk of rows at a time: of the (N, V) logits, 13 GB
    in fp32 at full size, only a chunk exists.

    Gradients are formed in the forward pass, while a chunk's logits are there, and scaled in the
    backward pass. Products have the dtype of `hidden`; sums are fp32.
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


# ---------------- Optimizers


def orthogonalize(x_SKL: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices of a stack, roughly: Newton-Schulz with Jordan's
    coefficients (kellerjordan.github.io/posts/muon), for K <= L. bf16 is precise enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x_SKL / (x_SKL.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def nesterov(momentum: Tensor, gradient: Tensor, all_finite: Tensor) -> Tensor:
    """The step's direction; updates `momentum`, in which a bad gradient leaves no trace."""
    decay = 0.95
    momentum.copy_(torch.where(all_finite, decay * momentum + gradient, momentum))
    return gradient + decay * momentum


def wide(matrix: Tensor) -> Tensor:
    """The matrix, transposed if it is tall, so that matrices of one shape can be stacked."""
    return matrix.T if matrix.size(0) > matrix.size(1) else matrix


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalized by Newton-Schulz (K. Jordan et al. 2024), for matrices.

    Gradients and momentum are the same on every rank. Only the orthogonalization is shared out:
    matrices of one shape form a stack, of which each rank takes its part, and an all-gather brings
    the updates together. Views of the gradients are kept, so these must stay where they are.
    """

    def __init__(self, params: dict[str, nn.Parameter], world: World, dtype: torch.dtype):
        super().__init__(params.values(), {})
        self.world, self.dtype = world, dtype
        self.orthogonalize, self.nesterov = orthogonalize, nesterov
        self.stacks: dict[str, list[tuple[Tensor, Tensor]]] = {}  # weights and their gradients
        self.momentum: dict[str, Tensor] = {}  # (S, K, L)
        for name, p in params.items():
            for weight, gradient in zip(matrices(name, p), matrices(name, p.grad), strict=True):
                pair = wide(weight.detach()), wide(gradient)
                self.stacks.setdefault(str(tuple(pair[0].shape)), []).append(pair)
        for shape, stack in self.stacks.items():
            self.momentum[shape] = torch.zeros_like(torch.stack([grad for _, grad in stack]))

    @torch.no_grad()
    def step(self, lr: float, all_finite: Tensor) -> None:
        for shape, stack in self.stacks.items():
            gradient_SKL = torch.stack([gradient for _, gradient in stack])
            direction_SKL = self.nesterov(self.momentum[shape], gradient_SKL, all_finite)
            update_SKL = self.orthogonalize_shared(direction_SKL).masked_fill_(~all_finite, 0.0)
            alpha = -lr * max(direction_SKL.shape[1:]) ** 0.5
            for (weight, _), update in zip(stack, update_SKL, strict=True):
                weight.add_(update, alpha=alpha)

    def orthogonalize_shared(self, x_SKL: Tensor) -> Tensor:
        per_rank = math.ceil(len(x_SKL) / self.world.size)
        padding = per_rank * self.world.size - len(x_SKL)
        padded = F.pad(x_SKL.to(self.dtype), (0, 0, 0, 0, 0, padding))
        first = self.world.rank * per_rank
        mine = self.orthogonalize(padded[first : first + per_rank])
        return self.world.all_gather(mine).flatten(0, 1)[: len(x_SKL)]

    def state_dict(self) -> dict[str, Tensor]:
        return self.momentum

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for shape, momentum in self.momentum.items():
            momentum.copy_(state[shape])


class AdamW(torch.optim.AdamW):
    """torch's, fused; as in Muon, nothing moves where the device flag `all_finite` is down."""

    def step(self, lr: float, all_finite: Tensor) -> None:
        self.param_groups[0]["lr"] = lr
        self.found_inf = (~all_finite).float()  # how torch's GradScaler tells the fused kernel
        super().step()


def make_optimizers(model: GPT, cfg: Knobs, world: World) -> tuple[AdamW, Muon]:
    """AdamW for the tied matrix, and for the gate with GATEOPT=adam; Muon for the rest."""
    for_adam = ("wte", "gate") if cfg.gateopt == "adam" else ("wte",)
    adam_params = [p for name, p in model.named_parameters() if name.endswith(for_adam)]
    muon_params = {n: p for n, p in model.named_parameters() if not n.endswith(for_adam)}
    adam = AdamW(adam_params, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return adam, Muon(muon_params, world, model.dtype)


# ---------------- Schedule


def schedule_position(step: int, spent_s: float, cfg: Knobs) -> float:
    """Where the schedule stands, in steps; with TIME_BUDGET_S, by the time that is spent."""
    if cfg.time_budget_s is None:
        return step
    return cfg.num_iterations * spent_s / cfg.time_budget_s


def lr_scale(position: float, cfg: Knobs) -> float:
    """Trapezoid: up to 1 over WARMUP_ITERS, constant, down to 0 over the last WARMDOWN_ITERS."""
    scale = 1.0
    if cfg.warmup_iters > 0:
        scale = min(scale, (position + 1) / cfg.warmup_iters)
    if cfg.warmdown_iters > 0:
        scale = min(scale, (cfg.num_iterations - position) / cfg.warmdown_iters)
    return max(scale, 0.0)


# ---------------- Batches


def open_data(cfg: Knobs, world: World) -> tuple[TokenBatches, TokenShards]:
    """Training batches and validation shards. Raises UserError for all that is wrong with them."""
    train_pattern, val_pattern = cfg.input_bin, cfg.input_val_bin
    if cfg.input_bin == "embedded":
        train_pattern, val_pattern, _ = embedded_corpus(ROOT / "data")
    train, val = TokenShards(train_pattern), TokenShards(val_pattern)
    check_disjoint(train, val)
    batches = TokenBatches(train, cfg, world)
    batches.check(cfg.vocab_size)
    val.check_length(cfg.val_tokens + 1, "VAL_TOKENS")
    val.check_ids(cfg.vocab_size, world, cfg.val_tokens + 1)
    return batches, val


# ---------------- Evaluation


@torch.no_grad()
def evaluate(model: GPT, val: TokenShards, rows: int, cfg: Knobs, world: World) -> float:
    """Mean loss of the first VAL_TOKENS validation tokens, for any number of ranks."""
    T = cfg.sequence_length
    share = world.share(cfg.val_tokens // T)
    loss_sum = torch.zeros((), device=world.device, dtype=torch.float64)
    for x_BT, y_BT in padded_batches(val, share, T, rows):
        loss_sum += model(x_BT.to(world.device), y_BT.to(world.device))
    return world.all_reduce(loss_sum).item() / cfg.val_tokens


# ---------------- Records and plan

HINT = "set DEVICE=cpu; PRESET=demo and PRESET=tiny are sizes for that"
RESULTS = (  # the original study's columns, in its order, then ours
    "run_id date git_commit seed attn_gate gate_pos gate_act learning_rate batch_size "
    "device_batch_size sequence_length num_iterations warmdown_iters final_val_loss best_val_loss "
    "train_time_ms ms_per_step gpu_name n_gpus runpod_instance notes stage status steps_done "
    "warmup_iters n_params tokens_seen epochs peak_memory_mib torch world_size code_sha256 dirty"
).split()
COLUMN_KNOBS = {"attn_gate": "attngate", "gate_pos": "gatepos", "gate_act": "gateact"}
COLUMN_KNOBS |= {"runpod_instance": "runpod_instance_type"}


def flops_per_token(cfg: Knobs) -> int:
    """Model FLOPs of forward and backward: 6 per weight of a matrix product (the tied matrix counts
    once, as the head), and attention counted causal.
    """
    C = cfg.n_embd
    block_weights = 4 * C * C + cfg.gate_rows * C + 2 * C * cfg.mlp_width
    weights = cfg.vocab_size * C + cfg.n_layer * block_weights
    return 6 * weights + 6 * cfg.n_layer * cfg.sequence_length * C


def probe_backward(model: GPT, rows: int) -> None:
    """Forward and backward pass of a micro-batch of zeros, for its memory."""
    x = torch.zeros(rows, model.cfg.sequence_length, dtype=torch.long, device=model.wte.device)
    model(x, x).backward()


def plan(cfg: Knobs, world: World) -> dict[str, object]:
    """What --dry_run shows; raises UserError where the run would."""
    check_compiler(cfg.compile, cfg.device)
    batches, _ = open_data(cfg, world)
    with torch.device("meta"):
        facts = plan_facts(cfg, world, GPT(cfg, torch.float32), probe_backward)
    flops = flops_per_token(cfg) * batches.batch_tokens * cfg.num_iterations
    facts["compute"] = f"{flops:.3g} FLOPs in {cfg.num_iterations} steps"
    facts["data"] = batches.summary
    return facts


# ---------------- Training


@dataclass
class TrainState:
    """With model, optimizers, scaler and session.spent_s all that the next step depends on."""

    step: int = 0


def compile_model(model: GPT, muon: Muon) -> None:
    """One compiled block serves all of them; loops over chunks and stacks stay outside."""
    for block in model.blocks:
        block.compile(dynamic=False)
    model.chunk_loss = torch.compile(chunk_loss_and_gradient, dynamic=False)
    muon.orthogonalize = torch.compile(orthogonalize, dynamic=False)
    muon.nesterov = torch.compile(nesterov, dynamic=False)


def train(cfg: Knobs, session: Session, batches: TokenBatches, val: TokenShards) -> None:
    world = session.world
    dtype = DTYPES[choose_precision(cfg.precision, world.device)]
    model = GPT(cfg, dtype)
    model.init_weights(cfg.seed)
    model.to(world.device)
    gradients = flat_gradients(model)
    adam, muon = make_optimizers(model, cfg, world)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    if cfg.compile:
        compile_model(model, muon)
    rows = choose_rows(cfg, world, model, probe_backward)  # sequences of a micro-batch
    gradients.zero_()  # of the probe
    state = TrainState()
    session.row["device_batch_size"] = rows
    facts = {"gate": cfg.gate_words, "rows": rows, "dtype": dtype, "data": batches.summary}
    session.describe(model, flops_per_token(cfg), facts)
    session.restore(model=model, adam=adam, muon=muon, scaler=scaler, state=state)
    prefetch = Prefetch(batches.make, state.step, world.device)

    while True:
        # -------- clock stopped: evaluate, save, leave --------
        position = schedule_position(state.step, session.spent_s, cfg)
        finished = position >= cfg.num_iterations
        session.between_steps(state.step, finished, out_of_data=batches.used_up(state.step))
        if session.should_validate:
            session.log_validation(state.step, evaluate(model, val, rows, cfg, world))
        if session.should_save:
            session.save(state.step, model=model, adam=adam, muon=muon, scaler=scaler, state=state)
        if session.stopping:  # finished, early stop, a signal, no more data, or not finite
            break

        # -------- clock running: one optimizer step --------
        session.start_clock()
        x_BT, y_BT = prefetch.get(state.step)
        train_loss = torch.zeros((), device=world.device)
        for x, y in zip(x_BT.split(rows), y_BT.split(rows), strict=True):
            loss = model(x.long(), y.long()) / batches.batch_tokens
            scaler.scale(loss).backward()
            train_loss += loss.detach()
        world.all_reduce(gradients)  # a sum: each rank divided its loss by the whole batch
        scaler.unscale_(adam)
        scaler.unscale_(muon)
        grad_norms = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()]))
        overflow = ~grad_norms.isfinite().all() & scaler.is_enabled()  # fp16: skipped, no fault
        lr = cfg.lr * lr_scale(position, cfg)
        state.step += 1
        all_finite = session.step(state.step, train_loss, lr, grad_norms, overflow)
        adam.step(lr, all_finite)
        muon.step(0.1 * lr, all_finite)
        scaler.update()
        gradients.zero_()
    prefetch.close()


def main() -> int:
    cfg = read_knobs(Knobs, PRESETS, doc=__doc__)
    if cfg.dry_run:
        return show_plan(cfg, plan, RESULTS)
    with join_world(cfg.device, HINT) as world:
        check_compiler(cfg.compile, cfg.device)
        batches, val = open_data(cfg, world)
        session = Session(
            cfg,
            world,
            total_steps=cfg.num_iterations,
            tokens_per_step=batches.batch_tokens,
            data={"training": batches.shards.content, "validation": val.content},
            columns=RESULTS,
            column_knobs=COLUMN_KNOBS,
            presets=PRESETS,
            resume_may_differ=RESUME_MAY_DIFFER,
            sources=[__file__],
            steps_per_epoch=batches.epoch_steps,
        )
        with session:
            train(cfg, session, batches, val)
    return session.exit_code


if __name__ == "__main__":
    launch(main)
