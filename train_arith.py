"""train_arith.py -- a compact transformer that reads an arithmetic expression and writes its value.

    python train_arith.py --config configs/pilot.yaml --output-dir runs/pilot --seed 42
    python train_arith.py --config configs/honest.yaml --set training.optimizer.lr=1e-3
    python train_arith.py --config configs/honest.yaml --answer_format reversed --test_path ""
    python train_arith.py --help                  every knob; --dry_run shows the plan and stops

A flag beats the environment, the environment beats --set KEY=VALUE, --set beats the file of
--config, and the file beats the defaults, which are those of configs/pilot.yaml. The examples are
records of a .jsonl file, in shuffled epochs, or drawn on the fly (TRAIN_PATH=generate); then no
expression of a test or validation set is ever drawn.

Expect   configs/pilot.yaml: val_loss about 1.52 after 50 epochs. No model can be below 1.076, the
         entropy floor: the operands are random, and they are scored, too. An exact match of about
         0, because 2,000 examples do not teach arithmetic
Shapes   B sequences, T tokens, C model width, H heads, D head width, V vocabulary, N problems
Units    losses in nats per scored token; BATCH_SIZE in examples over all ranks
Raises   UserError (one line, exit code 2) for a bad knob, key, file or checkpoint; RuntimeError
         (exit code 1) where GPU_ONLY=1 or FP16=1 cannot be kept
Sources  github.com/Nishal14/Step-free-arithmetic-transformers; rotary: Su et al., arXiv 2104.09864;
         Muon: kellerjordan.github.io/posts/muon, scaled as in Liu et al., arXiv 2502.16982
Shared   arithmetic.py is the language, and draws the examples. plumbing/ keeps the run alive; what
         of it moves a loss is problem_batches.py: the order of the examples and the curriculum
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler

import arithmetic
from arithmetic import VOCABULARY, DataKnobs, DataSets
from plumbing import RunKnobs, Session, flops_per_token, knob, show_plan
from plumbing.data import Prefetch
from plumbing.device import CudaGraph, check_compiler
from plumbing.epochs import EpochRecord
from plumbing.problem_batches import Curriculum, ProblemBatches
from plumbing.problem_config import read_problem_knobs
from plumbing.problem_knobs import PROBLEM_RUN_KNOBS
from plumbing.problem_records import record_evaluation, record_validation, save_models
from plumbing.problem_runs import RESULTS, facts_of, plan_problems, session_options
from plumbing.problem_scores import SCORES, summary
from plumbing.problems import IGNORE, Problems, inputs_and_labels
from plumbing.world import World, flat_gradients, join_world, launch

# ---------------- Knobs

PRESETS = {"pilot": {}}
# These move no loss but by rounding, so a resumed run may have others. With DROPOUT > 0, another
# CUDA_GRAPH or COMPILE draws other masks.
RESUME_MAY_DIFFER = [*PROBLEM_RUN_KNOBS, "model_name", "cuda_graph"]


@dataclass(frozen=True)
class Knobs(DataKnobs, RunKnobs):
    preset: str = knob("pilot", "named set of defaults", group="machine", choices=tuple(PRESETS))
    fp16: bool = knob(False, "train in half precision with loss scaling; needs CUDA")
    bf16: bool = knob(False, "train in bfloat16")
    cuda_graph: bool | None = knob(
        None, "launch a step's passes as one; auto: on a GPU", none="auto"
    )
    model_name: str = knob("pilot-arithmetic", "name that checkpoints carry", group="model")
    n_layer: int = knob(4, "number of transformer blocks", low=1)
    n_head: int = knob(4, "attention heads per block", low=1)
    n_embd: int = knob(128, "width of the model", low=2)
    d_ff: int = knob(384, "width inside the MLP", low=1)
    ffn_type: str = knob("gelu", "kind of the MLP", choices=("gelu", "geglu", "swiglu"))
    dropout: float = knob(0.1, "probability of dropout", low=0, high=0.99)
    use_rope: bool = knob(True, "rotary positions; 0: a learned table of positions")
    tie_weights: bool = knob(True, "use the embedding as the head, too")
    schedule: str = knob(
        "linear", "shape of the decay", choices=("linear", "trapezoid"), group="training"
    )
    warmdown_frac: float = knob(0.4, "last part of a trapezoid, falling to 0", above=0, high=1)
    grad_clip: float = knob(1.0, "largest norm of the whole gradient; 0: off", low=0)
    optimizer: str = knob(
        "adamw", "adamw for all; muon: for the blocks' matrices, adamw for the rest",
        group="training.optimizer", choices=("adamw", "muon"),
    )  # fmt: skip
    warmup_iters: int = knob(100, "steps of linear warm-up from 0", low=0)
    lr: float = knob(0.0003, "highest learning rate of AdamW", low=0)
    muon_lr: float = knob(0.004, "highest learning rate of Muon, on AdamW's scale", low=0)
    weight_decay: float = knob(0.01, "decoupled weight decay of every parameter", low=0)
    betas: str = knob("0.9,0.95", "AdamW's two decay rates")

    @property
    def uses_cuda_graph(self) -> bool:
        return self.device == "cuda" if self.cuda_graph is None else self.cuda_graph

    def __post_init__(self):
        super().__post_init__()
        if self.cuda_graph and self.device == "cpu":
            raise ValueError("CUDA_GRAPH=1 needs a GPU; with DEVICE=cpu leave it out")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"N_EMBD={self.n_embd} must be N_HEAD={self.n_head} times an even head width"
            )
        if not re.fullmatch(r"0?\.\d+,0?\.\d+", self.betas):
            what = "expected two numbers in (0, 1), such as 0.9,0.95"
            raise ValueError(f"BETAS={self.betas!r}: {what}")
        if self.fp16 and self.bf16:
            raise ValueError("FP16=1 and BF16=1 exclude each other; set one of them")
        self.check_run()


# ---------------- Model


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
    angle = torch.outer(torch.arange(T).float(), frequency.repeat(2))
    return angle.cos(), angle.sin()


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_BHTD.chunk(2, dim=-1)
    return (x_BHTD * cos + torch.cat([-b, a], dim=-1) * sin).type_as(x_BHTD)


class Attention(nn.Module):
    """Causal attention without biases. One matrix gives all heads' queries, then keys, then values.
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
        if self.training and self.drop.p > 0:  # SDPA's own dropout would differ between ranks
            scores = (q * q.size(-1) ** -0.5) @ k.mT
            future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
            pattern = scores.masked_fill(future, -torch.inf).softmax(dim=-1).type_as(v)
            z = self.drop(pattern) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers with biases. gelu: an exact GELU between them. geglu, swiglu: a projection, times
    the activation (GELU or SiLU) of another one (Shazeer, arXiv 2002.05202)."""

    def __init__(self, cfg: Knobs, drop: SharedDropout):
        super().__init__()
        self.cfg, self.drop = cfg, drop
        self.fc1 = nn.Linear(cfg.n_embd, cfg.d_ff)
        if cfg.ffn_type != "gelu":
            self.value = nn.Linear(cfg.n_embd, cfg.d_ff)
        self.fc2 = nn.Linear(cfg.d_ff, cfg.n_embd)

    def forward(self, x_BTC: Tensor) -> Tensor:
        activate = F.silu if self.cfg.ffn_type == "swiglu" else F.gelu
        hidden = activate(self.fc1(x_BTC))
        if self.cfg.ffn_type != "gelu":
            hidden = hidden * self.value(x_BTC)
        return self.fc2(self.drop(hidden))


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
        longest = max(128, 4 * cfg.sequence_length)  # programs score longer texts with the model
        cos, sin = rotary_tables(longest, cfg.n_embd // cfg.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Matrices: normal, standard deviation 0.02; biases: 0; norms' weights: 1. Each matrix has
        its own generator, of seed and name, so that another MLP or depth moves no other tensor."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                p.copy_(torch.empty(p.shape).normal_(0, 0.02, generator=generator))
            else:  # a bias, or the weight of a norm
                p.fill_(1.0 if name.endswith("weight") else 0.0)

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


# ---------------- Optimizers and schedule


def orthogonalize(g_SRK: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix of each of S matrices, of R rows and K columns, by
    Jordan's Newton-Schulz iteration: in bf16 on a GPU, and in fp32 on a CPU."""
    x = g_SRK.bfloat16() if g_SRK.is_cuda else g_SRK
    is_tall = x.size(1) > x.size(2)
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if is_tall else x


class Muon:
    """Momentum, orthogonalized and scaled to the size of an AdamW update, with weight decay; every
    rank does all of it. Nothing moves where all_finite is False."""

    def __init__(self, params: Sequence[nn.Parameter], cfg: Knobs):
        self.peak_lr, self.weight_decay = cfg.muon_lr, cfg.weight_decay
        self.param_groups = [{"params": params}]  # what torch's GradScaler reads
        self.stacks: dict[str, list[nn.Parameter]] = {}
        for p in params:
            self.stacks.setdefault(f"{len(p)}x{p.size(1)}", []).append(p)
        self.momenta = {name: torch.zeros_like(torch.stack(s)) for name, s in self.stacks.items()}

    @torch.no_grad()
    def step(self, lr: float | Tensor, all_finite: Tensor) -> None:
        for name, params in self.stacks.items():
            gradient = torch.stack([p.grad for p in params])
            gradient = torch.where(all_finite, gradient, 0.0)
            moved = self.momenta[name].lerp(gradient, 0.05)
            self.momenta[name].copy_(torch.where(all_finite, moved, self.momenta[name]))
            nesterov = gradient.lerp(moved, 0.95)
            updates = orthogonalize(nesterov).float()
            scale = 0.2 * max(updates.shape[1:]) ** 0.5
            for p, update in zip(params, updates, strict=True):
                p.sub_((self.weight_decay * p + scale * update) * (lr * all_finite))

    def state_dict(self) -> dict[str, Tensor]:
        return self.momenta

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, momentum in self.momenta.items():
            momentum.copy_(state[name])


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose step is left out where the device flag `all_finite` is down. The
    schedule scales `peak_lr`."""

    def __init__(self, params: Iterable[nn.Parameter], cfg: Knobs):
        self.peak_lr = cfg.lr
        betas = tuple(float(text) for text in cfg.betas.split(","))
        super().__init__(params, cfg.lr, betas, weight_decay=cfg.weight_decay, fused=True)

    def step(self, lr: float, all_finite: Tensor) -> None:
        self.param_groups[0]["lr"] = lr
        self.found_inf = (~all_finite).float()  # how torch's GradScaler tells the fused kernel
        super().step()


def make_optimizers(model: CompactTransformer, cfg: Knobs) -> list[AdamW | Muon]:
    """AdamW, with decay on everything as the original has it; with OPTIMIZER=muon, Muon for the
    matrices of blocks and AdamW for the rest."""
    if cfg.optimizer == "adamw":
        return [AdamW(model.parameters(), cfg)]
    for_muon = [p for p in model.blocks.parameters() if p.dim() == 2]
    ids = {id(p) for p in for_muon}
    for_adam = [p for p in model.parameters() if id(p) not in ids]
    muon = Muon(for_muon, cfg)
    if cfg.uses_cuda_graph:
        muon.step = CudaGraph(muon.step, for_muon[0].device)
    return [AdamW(for_adam, cfg), muon]


def clip_gradients(gradients: Tensor, norms_P: Tensor, limit: float) -> None:
    """Scale the gradients in place to a joint norm of at most `limit`; 0 leaves them."""
    if limit:
        gradients *= (limit / (norms_P.norm() + 1e-6)).clamp(max=1.0)


def lr_scale(update: int, cfg: Knobs, total: int) -> float:
    """Factor of the rates for update number `update`, from 0. Warm-up starts at 0; therefore the
    first update of a warm-up moves nothing. linear: then straight to 0 at `total`. trapezoid: 1,
    and to 0 over the last WARMDOWN_FRAC."""
    if update < cfg.warmup_iters:
        return update / cfg.warmup_iters
    decay_steps = total - cfg.warmup_iters
    if cfg.schedule == "trapezoid":
        decay_steps = cfg.warmdown_frac * total
    return min(1.0, max(0.0, (total - update) / max(1, decay_steps)))


# ---------------- Evaluation


def autocast(cfg: Knobs, device: torch.device) -> torch.autocast:
    """FP16 or BF16 products."""
    dtype = torch.float16 if cfg.fp16 else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=cfg.fp16 or cfg.bf16)


@torch.no_grad()
def teacher_forced(model: nn.Module, problems: Problems, cfg: Knobs, world: World) -> Tensor:
    """(B, SCORES) float64, from one pass over the gold text: how the model predicts each token from
    the gold ones before it.

    `exact` is that of greedy decoding, which writes the gold answer if and only if each of its
    tokens, and the end, is the likeliest one after the gold tokens before it."""
    x, y = inputs_and_labels(problems, False, len(problems))
    device = world.device
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
    columns = [nll * scored, scored, nll * answer, answer, right & answer, right & end, exact]
    return torch.stack([column.double().sum(dim=1) for column in columns], dim=1)


def score(model: nn.Module, problems: Problems, cfg: Knobs, world: World) -> np.ndarray:
    """(N, SCORES) on every rank: losses in nats, counts, and per problem whether it is right. The
    ranks share the problems; no dropout."""
    table = torch.zeros(len(problems), len(SCORES), dtype=torch.float64, device=world.device)
    was_training = model.training
    model.eval()
    share = world.share(len(problems))
    for start in range(share.start, share.stop, 512):
        rows = slice(start, min(start + 512, share.stop))
        table[rows] = teacher_forced(model, problems.rows(rows), cfg, world)
    model.train(was_training)
    return world.all_reduce(table).cpu().numpy()


def evaluate(model: nn.Module, session: Session, data: ProblemBatches, record: EpochRecord) -> bool:
    """Score the validation set; whether its loss is the best so far."""
    figures = summary(score(model, data.sets.val, session.cfg, session.world))
    record_validation(session, figures)
    return record.validated(session.step_now, session, figures)


def score_test_sets(model: nn.Module, session: Session, data: ProblemBatches) -> None:
    """Score the validation set and the test sets, for evaluation.json."""
    cfg, world = session.cfg, session.world
    sets = {cfg.val_path: data.sets.val, **data.sets.tests}
    record_evaluation(session, {name: score(model, sets[name], cfg, world) for name in sets})


# ---------------- Plan


def plan(cfg: Knobs, world: World) -> dict[str, object]:
    """What --dry_run shows. Raises UserError for what the run would refuse."""
    check_compiler(cfg.compile, cfg.device)
    with torch.device("meta"):
        model = CompactTransformer(cfg)
    return plan_problems(model, world, ProblemBatches(DataSets(cfg), cfg, world))


# ---------------- Training


@dataclass
class TrainState(Curriculum):
    """With the model, the optimizers and the loss scale, all that the next step depends on."""

    step: int = 0
    skipped: int = 0  # updates that fp16 left out; the schedule stands back by so many


def seed_dropout(cfg: Knobs, step: int) -> None:
    """Masks are a function of seed and step, so that a resume needs no generator's state."""
    if cfg.dropout:
        words = np.random.SeedSequence([cfg.seed, step]).generate_state(1, np.uint32)
        torch.manual_seed(int(words[0]))


def batch_metrics(logits_BTV: Tensor, y_BT: Tensor, cfg: Knobs) -> dict[str, Tensor]:
    """This rank's number of labels, and its right answers over BATCH_SIZE; the rows that the last
    batch of an epoch may lack count as wrong."""
    is_label = y_BT != IGNORE
    metrics = {"scored_tokens": is_label.sum()}
    if cfg.answer_only_loss:
        is_right = ((logits_BTV.argmax(dim=-1) == y_BT) | ~is_label).all(dim=1)
        metrics["train_exact"] = (is_right & is_label.any(dim=1)).sum() / cfg.batch_size
    return metrics


def run_backward_pass(
    model: CompactTransformer, scaler: GradScaler, x_BT: Tensor, y_BT: Tensor, num_labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds the gradients of this rank's rows; their share of the mean loss, and their metrics."""
    with autocast(model.cfg, x_BT.device):
        logits = model(x_BT).float()
    flat, labels = logits.flatten(0, 1), y_BT.flatten()
    loss_sum = F.cross_entropy(flat, labels, ignore_index=IGNORE, reduction="sum")
    loss = loss_sum / num_labels
    scaler.scale(loss).backward()
    return loss.detach(), batch_metrics(logits.detach(), y_BT, model.cfg)


def train(cfg: Knobs, world: World, session: Session, data: ProblemBatches) -> None:
    model = CompactTransformer(cfg, first_row=world.share(cfg.batch_size).start)
    model.init_weights(cfg.seed)
    model.to(world.device).train()
    if cfg.compile:
        for block in model.blocks:  # they are alike: one compilation serves all of them
            block.compile(dynamic=True)
    gradients = flat_gradients(model)
    optimizers = make_optimizers(model, cfg)
    scaler = GradScaler(world.device.type, enabled=cfg.fp16)
    backward_pass = partial(run_backward_pass, model, scaler)
    if cfg.uses_cuda_graph:  # see there what the model may not do then
        backward_pass = CudaGraph(backward_pass, world.device)
    state = TrainState()
    record = EpochRecord()
    session.describe(model, flops_per_token(model), facts_of(model, world, data))
    saved = dict(model=model, optimizers=optimizers, scaler=scaler, state=state, record=record)
    session.restore(**saved)
    prefetch = Prefetch(lambda step: data.make(step, state.switches), state.step, world.device)

    while True:
        # -------- clock stopped: evaluate, save, leave --------
        for stats in session.between_steps(state.step, finished=state.step >= data.total_steps):
            state.skipped += stats.skipped
            state.hear(stats, cfg, session.say)
            record.hear(stats, session, stats.metrics["scored_tokens"])
        if session.should_validate and evaluate(model, session, data, record):
            save_models(["checkpoint_best.pt"], model, [], session, state, data)
        if session.should_save:
            # Models first: a run killed in between resumes before this step and writes them again.
            names = record.model_names(state.step, session)
            save_models(names, model, optimizers, session, state, data)
            session.save(state.step, **saved)
        if session.stopping:
            break

        # -------- clock running: one optimizer step --------
        session.start_clock()
        x_BT, y_BT, num_labels = prefetch.get(state.step)
        seed_dropout(cfg, state.step)
        loss, metrics = backward_pass(x_BT, y_BT, num_labels)
        world.all_reduce(gradients)  # each rank has added its share of the mean over all labels
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norms = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()]))
        clip_gradients(gradients, norms, cfg.grad_clip)
        overflow = ~norms.isfinite().all() & cfg.fp16
        scale = lr_scale(state.step - state.skipped, cfg, data.total_steps)
        state.step += 1
        # Exchanges the figures. On the device: whether the update may be applied.
        all_finite = session.step(state.step, loss, cfg.lr * scale, norms, overflow, **metrics)
        for optimizer in optimizers:
            optimizer.step(optimizer.peak_lr * scale, all_finite)
        scaler.update()
        gradients.zero_()
    prefetch.close()
    if session.status == "finished":
        score_test_sets(model, session, data)
        record.summarize(session)


def main() -> int:
    cfg = read_problem_knobs(Knobs, PRESETS, __doc__)
    if cfg.dry_run:
        return show_plan(cfg, plan, RESULTS)
    with join_world(cfg.device) as world:
        check_compiler(cfg.compile, cfg.device)
        data = ProblemBatches(DataSets(cfg), cfg, world)
        session = Session(
            cfg,
            world,
            **session_options(cfg, data),
            presets=PRESETS,
            resume_may_differ=RESUME_MAY_DIFFER,
            sources=[__file__, arithmetic.__file__],
        )
        with session:
            train(cfg, world, session, data)
    return session.exit_code


if __name__ == "__main__":
    launch(main)
