"""bench.py -- train_gpt.py's step beside the plain implementation of tests/plain_gpt.py.

    python scripts/gpt/bench.py                                     a CPU: small sizes, eager
    python scripts/gpt/bench.py --device cuda --out experiments/gpu one GPU: 124M, compiled
    python scripts/gpt/bench.py --only step,gates --deadline_s 120

Both sides start from the same weights, train on the same tokens and take turns, A B A B, in one
process, timed by CPU time on a CPU and by CUDA events on a GPU. The parts, in their order:
  step     time of a step, tokens/s, MFU, and how far the two losses are apart (RMS)
  profile  where the milliseconds of our step go, by torch.profiler over three steps
  gates    headwise and elementwise gates against our own ungated step
  cold     process start to the end of the first step of train_gpt.py itself, wall time
  memory   bytes kept between steps, and the most that a step has beside them
  muon     Newton-Schulz in stacks against one matrix at a time
  head     cross-entropy of the tied head in chunks against all logits at once
  loader   how long a loop waits for its batches
With --out, each part is a JSON file as soon as it is done. Ctrl-C, SIGTERM and --deadline_s stop at
once; the parts that are done are kept.
Raises   UserError: a bad flag, no CUDA GPU where one is asked for, no C++ compiler, a bad shard
"""

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: a quiet profiler
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]
import plain_gpt  # noqa: E402
from lib import benching  # noqa: E402
from lib.benching import print_row, print_times  # noqa: E402
from support import copy_to_plain  # noqa: E402

import train_gpt  # noqa: E402
from plumbing import UserError, World, describe, join_world, knob, launch, read_knobs  # noqa: E402
from plumbing.batches import TokenBatches  # noqa: E402
from plumbing.data import Prefetch, TokenShards, write_shard  # noqa: E402
from plumbing.device import check_compiler  # noqa: E402
from plumbing.exchange import StepExchange  # noqa: E402
from plumbing.world import flat_gradients  # noqa: E402

PARTS = ("step", "profile", "gates", "cold", "memory", "muon", "head", "loader")
CPU_SIZES = dict(compile=False, precision="fp32", steps=5, warmup=1, n_layer=4, n_head=2)
CPU_SIZES |= dict(n_embd=256, vocab_size=8192, sequence_length=256, device_batch_size=2)
CPU_SIZES |= dict(batch_size=4)


@dataclass(frozen=True)
class Bench:
    device: str = knob("cpu", "where; on a CPU the sizes below are small", choices=("cpu", "cuda"))
    only: str = knob("", f"parts to run, with commas: {', '.join(PARTS)}")
    out: str = knob("", "folder that gets one JSON file per part")
    deadline_s: float | None = knob(None, "stop after this time", above=0, none="off")
    input_bin: str = knob("", "token shards; empty: tokens drawn from a skewed distribution")
    steps: int = knob(20, "measured turns of each side", low=1)
    warmup: int = knob(5, "turns before those", low=1)
    threads: int = knob(1, "threads of torch on a CPU", low=1)
    compile: bool = knob(True, "torch.compile, on both sides", group="sizes")
    precision: str = knob("bf16", "of matrix products", choices=("bf16", "fp32"))
    n_layer: int = knob(12, "transformer blocks", low=1)
    n_head: int = knob(6, "attention heads", low=1)
    n_embd: int = knob(768, "model width", low=2)
    vocab_size: int = knob(50304, "token ids", low=2, high=65536)
    sequence_length: int = knob(1024, "tokens per sequence", low=1)
    device_batch_size: int = knob(64, "sequences per micro-batch", low=1)
    batch_size: int = knob(512, "sequences per step", low=1)

    def __post_init__(self):
        for part in self.parts:
            if part not in PARTS:
                known = ", ".join(PARTS)
                raise ValueError(f"--only={self.only}: no part {part!r}; there are {known}")

    @property
    def parts(self) -> list[str]:
        return [part.strip() for part in self.only.split(",")] if self.only else list(PARTS)


def trainer_knobs(bench: Bench, **changes: object) -> train_gpt.Knobs:
    """Knobs of a run of train_gpt.py that validates nothing and stays at its peak rate."""
    if bench.batch_size % bench.device_batch_size:
        raise UserError(
            f"BATCH_SIZE={bench.batch_size} must be a multiple of "
            f"DEVICE_BATCH_SIZE={bench.device_batch_size}, for the plain side"
        )
    names = "device compile n_layer n_head n_embd vocab_size sequence_length device_batch_size"
    names += " batch_size input_bin precision"
    values = {name: getattr(bench, name) for name in names.split()}
    values |= dict(input_val_bin=bench.input_bin, data_order="stream", epochs_ok=True)
    values |= dict(warmdown_iters=0, val_every=0, save_every=0, val_tokens=bench.sequence_length)
    try:
        return train_gpt.Knobs(**{**values, **changes})
    except ValueError as error:
        raise UserError(error) from None


# ----------------------------------------------------------------------------
# Sides


class Ours:
    """The second half of the loop of train_gpt.train, without the log. tests/gpt/test_bench.py
    holds the two together: their losses are equal, bit by bit.
    """

    def __init__(self, cfg: train_gpt.Knobs, world: World):
        self.cfg, self.world = cfg, world
        self.model = train_gpt.GPT(cfg, train_gpt.DTYPES[cfg.precision])
        self.model.init_weights(cfg.seed)
        self.model.to(world.device)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.gradients = flat_gradients(self.model)
        self.adam, self.muon = train_gpt.make_optimizers(self.model, cfg, world)
        if cfg.compile:
            train_gpt.compile_model(self.model, self.muon)
        self.exchange = StepExchange(world)
        self.num_steps = 0

    def step(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        """Returns the batch's mean loss, on the device."""
        rows, lr = self.cfg.device_batch_size, self.cfg.lr
        train_loss = torch.zeros((), device=self.world.device)
        for x, y in zip(x_BT.split(rows), y_BT.split(rows), strict=True):
            loss = self.model(x.long(), y.long()) / x_BT.numel()
            loss.backward()
            train_loss += loss.detach()
        grad_norms = torch.stack(torch._foreach_norm([p.grad for p in self.model.parameters()]))
        self.num_steps += 1
        figures = (self.num_steps, train_loss, lr, grad_norms)
        all_finite = self.exchange.send(*figures, overflow=None, metrics={}, spent_s=0.0)
        self.adam.step(lr, all_finite)
        self.muon.step(0.1 * lr, all_finite)
        self.gradients.zero_()
        self.exchange.read(self.names, keep=1)
        return train_loss

    def kept_tensors(self) -> list[Tensor]:
        moments = [t for state in self.adam.state.values() for t in state.values()]
        return [*self.model.parameters(), self.gradients, *moments, *self.muon.momentum.values()]


class Plain:
    """The plain implementation from the same weights; compiled as a whole, if ours is by block."""

    def __init__(self, cfg: train_gpt.Knobs, world: World):
        self.cfg, self.dtype = cfg, train_gpt.DTYPES[cfg.precision]
        ours = train_gpt.GPT(cfg)
        ours.init_weights(cfg.seed)
        self.model = plain_gpt.PlainGPT(cfg.vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd)
        copy_to_plain(ours, self.model)
        self.model.to(world.device)
        self.optimizers = plain_gpt.plain_optimizers(self.model, cfg.lr, cfg.compile, self.dtype)
        self.forward = torch.compile(self.model) if cfg.compile else self.model

    def step(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        batch, rows = (x_BT.long(), y_BT.long()), self.cfg.device_batch_size
        return plain_gpt.train_step(self.forward, self.optimizers, *batch, rows, self.dtype)

    def kept_tensors(self) -> list[Tensor]:
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return [*self.model.parameters(), *(t for state in states for t in state.values())]


@dataclass
class Lab:
    """What the parts share: the sides that were built so far, and the batches that all train on."""

    bench: Bench
    world: World
    folder: Path  # temporary
    sides: dict[str, Ours | Plain] = field(default_factory=dict)
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    children: list[subprocess.Popen] = field(default_factory=list)

    def __post_init__(self):
        self.meter = benching.Meter(self.world, self.bench.steps, self.bench.warmup)
        cfg = trainer_knobs(self.bench)
        self.batches = TokenBatches(TokenShards(self.bench.input_bin), cfg, self.world)
        self.batches.check(cfg.vocab_size)

    def step(self, name: str) -> float:
        """One step of "plain", or of ours with the gate `name`; its time in ms."""
        if name not in self.sides:
            build, gate = (Plain, "none") if name == "plain" else (Ours, name)
            self.sides[name] = build(trainer_knobs(self.bench, attngate=gate), self.world)
            self.losses[name] = []
        side, losses = self.sides[name], self.losses[name]
        batch = [tokens.to(self.world.device) for tokens in self.batches.make(len(losses))]
        return self.meter.time_ms(lambda: losses.append(side.step(*batch)))

    def take_turns(self, *names: str) -> dict[str, list[float]]:
        return self.meter.take_turns({n: lambda n=n: self.step(n) for n in names})


# ----------------------------------------------------------------------------
# Parts: each prints its rows and returns what its JSON file is to hold


def part_step(lab: Lab) -> dict:
    ms = lab.take_turns("plain", "none")
    losses = {name: torch.stack(lab.losses[name]).tolist() for name in ms}
    ms["ours"], losses["ours"] = ms.pop("none"), losses.pop("none")
    ratios = print_times("step", ms)
    n = min(20, len(losses["ours"]), len(losses["plain"]))
    rms = math.dist(losses["plain"][:n], losses["ours"][:n]) / math.sqrt(n)
    tokens_per_s = {name: 1000 * lab.batches.batch_tokens / np.median(t) for name, t in ms.items()}
    print_row("tokens/s: plain, ours", *(f"{speed:,.0f}" for speed in tokens_per_s.values()))
    flops, peak = train_gpt.flops_per_token(lab.sides["none"].cfg), lab.world.peak_flops()
    mfu = {}
    if peak:  # MFU is not claimed where the peak is not known
        mfu = {name: speed * flops / peak for name, speed in tokens_per_s.items()}
        print_row("MFU: plain, ours", *(f"{value:.1%}" for value in mfu.values()))
    print_row(f"RMS of the losses' difference, n={n}", f"{rms:.1e}")
    found = dict(ms=ms, ratio=ratios["ours"], tokens_per_s=tokens_per_s, mfu=mfu)
    return found | dict(losses=losses, loss_rms=rms, loss_n=n, flops_per_token=flops)


def part_profile(lab: Lab) -> dict:
    for _ in range(lab.bench.warmup):
        lab.step("none")
    return benching.profile_steps(lambda: lab.step("none"), 3, lab.world)


def part_gates(lab: Lab) -> dict:
    ms = lab.take_turns("none", "headwise", "elementwise")
    return dict(ms=ms, ratios=print_times("gate", ms))


def part_cold(lab: Lab) -> dict:
    """One step of train_gpt.py in a process of its own, with an empty compiler cache and then with
    the one that it has filled.
    """
    val_bin = lab.folder / "val_000000.bin"
    write_shard(val_bin, np.zeros(lab.bench.sequence_length + 1, np.uint16))
    cfg = trainer_knobs(lab.bench, num_iterations=1, input_val_bin=str(val_bin))
    places = dict(logs_folder=str(lab.folder / "logs"), results_file=str(lab.folder / "rows.csv"))
    cfg = replace(cfg, **places)
    flags = [f"--{knob.name}={describe(knob, getattr(cfg, knob.name))}" for knob in fields(cfg)]
    environment = dict(os.environ, TQDM_DISABLE="1", OMP_NUM_THREADS=str(lab.bench.threads))
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(lab.folder / "inductor")
    environment["TRITON_CACHE_DIR"] = str(lab.folder / "triton")
    if lab.world.device.type == "cuda":
        torch.cuda.empty_cache()  # the other process needs the memory
    found = {}
    for cache in ("empty", "filled"):
        started = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, str(ROOT / "train_gpt.py"), *flags],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        lab.children.append(child)
        said = []
        for line in child.stdout:
            said.append(line)
            if line.startswith("step:1/1 train_loss"):
                found[cache] = time.perf_counter() - started
        if child.wait() != 0 or cache not in found:
            raise RuntimeError(f"train_gpt.py failed:\n{''.join(said[-40:])}")
        print_row(f"first step, {cache} compiler cache, s", f"{found[cache]:.1f}")
    return dict(first_step_s=found)


def part_memory(lab: Lab) -> dict:
    found = {}
    for name in ("plain", "none"):
        lab.step(name)  # compiles, and makes the state of the optimizers
        peak = benching.peak_bytes(lambda name=name: lab.step(name), lab.world)
        kept = sum(t.numel() * t.element_size() for t in lab.sides[name].kept_tensors())
        title = "ours" if name == "none" else name
        found[title] = dict(kept_between_steps=kept, more_in_a_step=peak)
        print_row(f"memory {title}, MB: kept, more", f"{kept / 1e6:,.0f}", f"{peak / 1e6:,.0f}")
    return dict(bytes=found)


def part_muon(lab: Lab) -> dict:
    C, device = lab.bench.n_embd, lab.world.device
    shapes = ((4 * lab.bench.n_layer, C, C), (2 * lab.bench.n_layer, C, 4 * C))
    dtype = train_gpt.DTYPES[lab.bench.precision]
    stacks = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    one, stacked = plain_gpt.newton_schulz, train_gpt.orthogonalize
    if lab.bench.compile:
        one, stacked = torch.compile(one), torch.compile(stacked, dynamic=False)
    plain = lambda: [one(matrix, dtype) for stack in stacks for matrix in stack]
    ours = lambda: [stacked(stack) for stack in stacks]
    ms = lab.meter.compare(dict(plain=plain, ours=ours))
    return dict(ms=ms, ratio=print_times("Newton-Schulz", ms)["ours"])


def part_head(lab: Lab) -> dict:
    bench, device = lab.bench, lab.world.device
    N, C, V = bench.device_batch_size * bench.sequence_length, bench.n_embd, bench.vocab_size
    dtype = train_gpt.DTYPES[bench.precision]
    hidden_NC = torch.randn(N, C, device=device, dtype=dtype, requires_grad=True)
    weight_VC = torch.randn(V, C, device=device, requires_grad=True)
    target_N = torch.randint(V, (N,), device=device)

    def all_at_once(hidden_NC: Tensor, weight_VC: Tensor) -> Tensor:
        logits_NV = F.linear(hidden_NC, weight_VC.to(dtype)).float()
        return F.cross_entropy(logits_NV, target_N, reduction="sum")

    chunk_loss = train_gpt.chunk_loss_and_gradient
    if bench.compile:
        all_at_once = torch.compile(all_at_once)
        chunk_loss = torch.compile(chunk_loss, dynamic=False)

    def in_chunks(hidden_NC: Tensor, weight_VC: Tensor) -> Tensor:
        head = train_gpt.LinearCrossEntropy
        return head.apply(hidden_NC, weight_VC, target_N, chunk_loss, True)

    def gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        torch.autograd.grad(loss(hidden_NC, weight_VC), [hidden_NC, weight_VC])

    sides = dict(plain=lambda: gradients(all_at_once), ours=lambda: gradients(in_chunks))
    ms = lab.meter.compare(sides)
    return dict(ms=ms, ratio=print_times("head of a micro-batch", ms)["ours"])


def part_loader(lab: Lab) -> dict:
    lab.step("none")
    prefetch = Prefetch(lab.batches.make, 0, lab.world.device)
    waited_s = 0.0
    started = time.perf_counter()
    for step in range(lab.bench.steps):
        before = time.perf_counter()
        batch = prefetch.get(step)
        waited_s += time.perf_counter() - before
        lab.sides["none"].step(*batch)
    lab.world.synchronize()
    total_s = time.perf_counter() - started
    prefetch.close()
    print_row(f"waiting for batches, n={lab.bench.steps}", f"{waited_s / total_s:.4%}")
    return dict(waited_s=waited_s, total_s=total_s)


# ----------------------------------------------------------------------------
# Program


def draw_tokens(bench: Bench, folder: Path) -> str:
    """A shard of tokens, few of them frequent; returns its pattern."""
    uniform = np.random.default_rng(0).random(8 * bench.batch_size * bench.sequence_length + 1)
    tokens = (bench.vocab_size * uniform**4).astype(np.uint16)
    write_shard(folder / "drawn_000000.bin", tokens)
    return str(folder / "drawn_*.bin")


def run_parts(lab: Lab, facts: dict, done: list[str]) -> None:
    mode = "compiled" if lab.bench.compile else "eager"
    print_row(f"{facts['device']}, torch {facts['torch']}, {facts['clock']}, {mode}")
    for part in lab.bench.parts:
        started = time.perf_counter()
        found = globals()[f"part_{part}"](lab)
        found["wall_s"] = time.perf_counter() - started
        if lab.bench.out:
            path = Path(lab.bench.out) / f"gpt_{part}_{lab.bench.device}.json"
            benching.write_part(path, {"part": part, **facts, **found})
        done.append(part)


def main() -> int:
    device = read_knobs(Bench, env={}, doc=__doc__).device
    bench = read_knobs(Bench, {"": CPU_SIZES} if device == "cpu" else None, env={})
    trainer_knobs(bench)  # refuses sizes that do not fit together
    with join_world(device, "use --device cpu") as world, tempfile.TemporaryDirectory() as name:
        folder, done = Path(name), []
        check_compiler(bench.compile, device)
        torch.set_num_threads(bench.threads)
        facts = benching.machine_facts(world) | dict(n=bench.steps, flags=asdict(bench))
        if not bench.input_bin:
            bench = replace(bench, input_bin=draw_tokens(bench, folder))
        lab = Lab(bench, world, folder)
        benching.stop_at_once(folder, lab.children, done, bench.deadline_s)
        run_parts(lab, facts, done)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 0


if __name__ == "__main__":
    launch(main)
