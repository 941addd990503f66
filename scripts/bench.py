"""bench.py -- our training step and the plain implementation of tests/plain_gpt.py, side by side in one process.

    python scripts/bench.py                                     a CPU: small sizes, one thread, process CPU time
    python scripts/bench.py --device cuda --out experiments/gpu one GPU: the 124M configuration, CUDA events
    python scripts/bench.py --only step,gates --input_bin 'data/fineweb10B/fineweb_train_*.bin'

Our side is train_gpt.train() itself, logging included, on a thread that is let through one step at a time; the plain
side has its batches given, unlogged. Sides take turns, A B A B, from the same weights on the same tokens.

Parts    step     step time, tokens/s, MFU, Muon's share, loss RMS between the two, memory above model and moments
         gates    headwise, elementwise and const against our own ungated step
         loader   how long the loop waits for its batches
         compile  time to the end of the first step, with an empty and with a filled compiler cache
         scaling  1 -> 2 processes at the same batch: T1 / (2 T2)
         levers   head, Newton-Schulz and prefetch, each alone
         sdpa     attention kernels: torch's own order against cuDNN first (default on CUDA only)
Prints   median [quartiles] of n; a ratio is that of the medians, with the quartiles of the turns' own ratios
Raises   UserError: a bad flag, no CUDA GPU where one is asked for, no C++ compiler, a bad shard
"""

import contextlib
import dataclasses
import faulthandler
import gc
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # before torch is imported: no progress bar, a quiet profiler
    os.environ |= dict(TQDM_DISABLE="1", KINETO_LOG_LEVEL="99", TORCH_CPP_LOG_LEVEL="ERROR")
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]
import plain_gpt  # noqa: E402
import support  # noqa: E402

import plumbing  # noqa: E402
import train_gpt  # noqa: E402
from plumbing import UserError, World, knob  # noqa: E402

PARTS = ("step", "gates", "loader", "compile", "scaling", "levers", "sdpa")
SIZES = {  # of --device
    "cpu": dict(
        n_layer=4, n_head=2, n_embd=256, sequence_length=256, device_batch_size=4, batch_size=8
    )
    | dict(steps=20, warmup=3),
    "cuda": {},
}
LR = 0.0036


@dataclass(frozen=True)
class Bench:
    device: str = knob(
        "cpu", "where; the sizes below default to small ones on cpu", choices=("cpu", "cuda")
    )
    compile: bool = knob(True, "torch.compile, on both sides")
    only: str = knob("", f"parts to run, with commas: {', '.join(PARTS)}")
    out: str = knob("", "folder that gets one JSON file per part")
    input_bin: str = knob(
        "", "token shards; default: tokens drawn from a skewed distribution, seed 0"
    )
    steps: int = knob(50, "measured steps per side", low=1)
    warmup: int = knob(10, "steps before those", low=1)
    threads: int = knob(1, "of torch, on a CPU", low=1)
    n_layer: int = knob(12, "transformer blocks", low=1)
    n_head: int = knob(6, "attention heads", low=1)
    n_embd: int = knob(768, "model width", low=2)
    vocab_size: int = knob(50304, "token ids", low=2, high=65536)
    sequence_length: int = knob(1024, "tokens per sequence", low=1)
    device_batch_size: int = knob(64, "sequences per micro-batch", low=1)
    batch_size: int = knob(512, "sequences per step", low=1)
    child: str = knob(
        "", "internal: time this side alone and print JSON", choices=("", "plain", "ours")
    )

    def __post_init__(self):
        if unknown := set(self.parts) - set(PARTS):
            raise ValueError(
                f"--only={self.only}: no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}"
            )

    @property
    def parts(self) -> list[str]:
        usual = [p for p in PARTS if p != "sdpa" or self.device == "cuda"]
        return [p.strip() for p in self.only.split(",")] if self.only else usual

    def flags(self, **changes: object) -> list[str]:
        values = {f: getattr(self, f.name) for f in dataclasses.fields(self)}
        return [f"--{f.name}={plumbing.show(f, changes.get(f.name, v))}" for f, v in values.items()]


def knobs(b: Bench, folder: Path, **changes: object) -> train_gpt.Knobs:
    """Knobs of a run of ours that is never at its end: no validation, no checkpoint, the peak rate throughout."""
    names = "device compile n_layer n_head n_embd vocab_size sequence_length device_batch_size batch_size input_bin"
    values = {name: getattr(b, name) for name in names.split()} | dict(
        input_val_bin=b.input_bin, epochs_ok=True
    )
    values |= dict(val_tokens=b.sequence_length, val_every=0, save_every=0, warmdown_iters=0, lr=LR)
    values |= dict(num_iterations=b.warmup + b.steps + 100, logs_folder=str(folder / "logs"))
    values |= dict(results_file=str(folder / "results.csv")) | changes
    try:
        return train_gpt.Knobs(**values)
    except ValueError as error:
        raise UserError(error) from None


# ----------------------------------------------------------------------------
# Meters


class Watch:
    """Times what it is entered around, again and again, in ms: CPU time of the process, or CUDA events."""

    def __init__(self, w: World):
        self.cuda, self.marks = w.device.type == "cuda", []

    def mark(self, *_) -> None:
        now = torch.cuda.Event(enable_timing=True) if self.cuda else 1000 * time.process_time()
        if self.cuda:
            now.record()
        self.marks.append(now)

    __enter__ = __exit__ = mark

    def ms(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return [a.elapsed_time(b) if self.cuda else b - a for a, b in pairs]

    def around(self, f: Callable) -> Callable:
        def timed(*args: object) -> object:
            with self:
                return f(*args)

        return timed


@contextlib.contextmanager
def peak_bytes(w: World, found: list[int]) -> Iterator[None]:
    """Appends the most bytes of tensors that were alive at once, beyond those alive before."""
    if w.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    with torch.profiler.profile(profile_memory=True) as p:
        yield
    events = sorted(
        (e.start_ns(), e.nbytes())
        for e in p.profiler.kineto_results.events()
        if e.name() == "[memory]"
    )
    found.append(int(max(np.cumsum([n for _, n in events]), default=0)))


def live_bytes(w: World) -> int:
    """Bytes of tensors that are alive now."""
    gc.collect()
    if w.device.type == "cuda":
        return torch.cuda.memory_allocated()
    tensors = [
        o
        for o in gc.get_objects()
        if type(o) in (torch.Tensor, torch.nn.Parameter) and o.device == w.device
    ]
    storages = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


# ----------------------------------------------------------------------------
# Sides


class Side:
    """A training loop on a thread of its own, which step() lets through one step. The loop calls wait, start, end."""

    def __init__(self, loop: Callable[["Side"], None], w: World):
        self.w, self.turn, self.over = w, threading.Semaphore(0), threading.Semaphore(0)
        self.error, self.closing, self.losses, self.meter = None, False, [], nullcontext()
        self.muon, self.run, threads = Watch(w), None, torch.get_num_threads()

        def body() -> None:
            try:
                torch.set_num_threads(threads)  # this and the GPU in use are a thread's own
                if w.device.type == "cuda":
                    torch.cuda.set_device(w.device)
                loop(self)
            except BaseException as error:  # raised again by step()
                self.error = error
            self.over.release()

        self.thread = threading.Thread(target=body, daemon=True)
        self.thread.start()
        self._wait_over()  # built

    def _wait_over(self) -> None:
        self.over.acquire()
        if self.error is not None:
            raise self.error

    def step(self, meter: AbstractContextManager | None = None) -> None:
        self.meter = meter or nullcontext()
        self.turn.release()
        self._wait_over()

    def close(self) -> None:
        self.closing = True
        self.turn.release()
        self.thread.join()

    def wait(self) -> None:
        self.over.release()
        self.turn.acquire()
        if self.closing:
            raise SystemExit

    def start(self) -> None:
        self.w.sync()
        self.meter.__enter__()

    def end(self) -> None:
        self.meter.__exit__(None, None, None)
        self.w.sync()


def ours(k: train_gpt.Knobs, w: World, side: Side) -> None:
    """train_gpt.train(); the tick of its clock, the end of a step, is where other sides get their turn."""
    side.run = run = train_gpt.Run(k, w)
    hear, tick = run.hear, run.clock.tick

    def heard(beat: plumbing.Beat) -> str:
        side.losses.append(float(beat.values[:, 0].mean()))
        return hear(beat)

    def ticked() -> None:
        tick()
        side.end()
        side.wait()
        side.start()

    run.hear, run.clock.tick, run.muon.step = heard, ticked, side.muon.around(run.muon.step)
    side.wait()
    side.start()
    try:
        train_gpt.train(run, k, w)
    finally:
        run.batches.loader.close()


def prefetch(make: Callable, *args: object) -> plumbing.Prefetch:
    """train_gpt's Prefetch, within reach of who holds the Batches."""
    make.__self__.loader = loader = plumbing.Prefetch(make, *args)
    return loader


def plain(k: train_gpt.Knobs, w: World, side: Side) -> None:
    """The plain implementation, compiled if ours is, from our weights on our batches; making them is not timed."""
    if k.compile and k.device == "cuda":
        torch._inductor.config.coordinate_descent_tuning = (
            True  # as ours; the setting is a thread's own
        )
    model = train_gpt.GPT(k)
    model.init_weights(k.seed)
    gpt = plain_gpt.PlainGPT(k.vocab_size, k.n_layer, k.n_head, k.n_embd)
    support.copy_to_plain(model, gpt)
    del model
    optimizers = plain_gpt.plain_optimizers(gpt.to(w.device), k.lr, compiled=k.compile)
    step = torch.compile(gpt) if k.compile else gpt
    optimizers[1].step = side.muon.around(optimizers[1].step)
    batches = train_gpt.Batches(plumbing.TokenShards(k.input_bin), k, w)
    for i in range(k.num_iterations):
        side.wait()
        x, y = (t.to(w.device).long() for t in batches.make(i))
        side.start()
        loss = plain_gpt.train_step(step, optimizers, x, y, k.device_batch_size)
        side.end()
        side.losses.append(float(loss))


def take_turns(
    turns: dict[str, Callable[[Watch], None]], n: int, w: World
) -> dict[str, list[float]]:
    """n rounds, A B A B; ms of each side."""
    watches = {name: Watch(w) for name in turns}
    for i in range(n):
        for name in sorted(turns, reverse=i % 2 > 0) if len(turns) > 2 else turns:
            turns[name](watches[name])
    return {name: watch.ms() for name, watch in watches.items()}


def compare(functions: dict[str, Callable[[], None]], b: Bench, w: World) -> dict[str, list[float]]:
    """Small functions against each other, ms per call; on CUDA ten calls a turn, which hides the launches."""
    inner = 10 if w.device.type == "cuda" else 1

    def turn(f: Callable[[], None], watch: Watch) -> None:
        w.sync()
        with watch:
            for _ in range(inner):
                f()

    turns = {name: partial(turn, f) for name, f in functions.items()}
    take_turns(turns, 3, w)
    return {name: [t / inner for t in ms] for name, ms in take_turns(turns, b.steps, w).items()}


# ----------------------------------------------------------------------------
# The table


def spread(values: list[float], form: str = ".1f") -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:{form}} [{low:{form}} {high:{form}}]"


def ratio(a: list[float], b: list[float]) -> str:
    """Ratio of the medians of b and a, then the quartiles of the rounds' own ratios."""
    low, high = np.quantile(np.divide(b, a), [0.25, 0.75])
    return f"{np.median(b) / np.median(a):.3f} [{low:.3f} {high:.3f}]"


def row(name: str, *cells: str) -> None:
    show(f"{name:34s}" + "".join(f"{cell:>24s}" for cell in cells).rstrip())


def show(line: str) -> None:
    print(line, file=sys.__stdout__, flush=True)  # sys.stdout is where our side's log lines go


# ----------------------------------------------------------------------------
# Parts: each prints its rows and returns its raw numbers


def part_step(b: Bench, w: World, folder: Path) -> dict:
    k, sides, memory = knobs(b, folder), {}, {}
    for name, loop in (("plain", plain), ("ours", ours)):
        before, peak = live_bytes(w), []
        sides[name] = side = Side(partial(loop, k, w), w)
        for _ in range(b.warmup):
            side.step()
        kept = live_bytes(w) - before
        side.step(peak_bytes(w, peak))
        memory[name] = dict(alive_at_step_start=kept, peak_in_step=peak[0])
        side.muon.marks.clear()
    ms = take_turns({name: side.step for name, side in sides.items()}, b.steps, w)
    run, tokens = sides["ours"].run, b.batch_size * b.sequence_length
    adam = sum(p.numel() for p in run.adam.params.values())
    state = 4 * (
        3 * adam + 2 * (run.n_params - adam)
    )  # weights, AdamW's two moments, Muon's momentum
    muon = {
        name: [m / t for m, t in zip(side.muon.ms(), ms[name], strict=True)]
        for name, side in sides.items()
    }
    losses = {name: side.losses[:20] for name, side in sides.items()}
    n = min(map(len, losses.values()))
    rms = math.sqrt(np.mean(np.subtract(losses["plain"][:n], losses["ours"][:n]) ** 2))
    flops, peak = train_gpt.flops_per_token(run.model, k), plumbing.peak_flops(w)
    for side in sides.values():
        side.close()

    p, o = ms["plain"], ms["ours"]
    row(f"step, ms, n={b.steps}", spread(p), spread(o), ratio(p, o))
    row(
        "tokens/s",
        *(f"{1000 * tokens / np.median(t):,.0f}" for t in (p, o)),
        f"{np.median(p) / np.median(o):.3f}",
    )
    mfu = {
        name: 1000 * tokens * flops / (np.median(t) * peak) if peak else None
        for name, t in ms.items()
    }
    row(
        "MFU (dense bf16, causal attention)",
        *(f"{v:.1%}" if peak else "n/a" for v in mfu.values()),
        "",
    )
    row("Muon's share of the step", *(f"{np.median(v):.1%}" for v in muon.values()), "")
    above = {
        name: m["alive_at_step_start"] - state + m["peak_in_step"] for name, m in memory.items()
    }
    cells = [f"{v / 1e6:.1f}" for v in above.values()]
    row("memory above the model, MB", *cells, f"{above['ours'] / above['plain']:.3f}")
    row(
        "  of it kept between steps, MB",
        *(f"{(m['alive_at_step_start'] - state) / 1e6:.1f}" for m in memory.values()),
    )
    row(f"loss after {n} steps; RMS", *(f"{v[n - 1]:.4f}" for v in losses.values()), f"{rms:.1e}")
    facts = dict(
        ms=ms,
        muon_share=muon,
        memory_bytes=memory,
        state_bytes=state,
        memory_above_model_bytes=above,
    )
    return facts | dict(
        tokens_per_step=tokens,
        flops_per_token=flops,
        mfu=mfu,
        losses=losses,
        loss_rms=rms,
        loss_n=n,
    )


def part_gates(b: Bench, w: World, folder: Path) -> dict:
    gates = ("none", "headwise", "elementwise", "const")
    sides = {g: Side(partial(ours, knobs(b, folder, attngate=g), w), w) for g in gates}
    take_turns({g: side.step for g, side in sides.items()}, b.warmup, w)
    ms = take_turns({g: side.step for g, side in sides.items()}, b.steps, w)
    for g, side in sides.items():
        side.close()
        row(
            f"gate {g}, ms, n={b.steps}",
            spread(ms["none"]),
            spread(ms[g]),
            ratio(ms["none"], ms[g]),
        )
    return dict(ms=ms)


def part_loader(b: Bench, w: World, folder: Path) -> dict:
    side = Side(partial(ours, knobs(b, folder), w), w)
    for _ in range(b.warmup):
        side.step()
    loader = side.run.batches.loader
    w.sync()
    waited, t0 = loader.wait_s, time.perf_counter()
    for _ in range(b.steps):
        side.step()
    w.sync()
    waited, total = loader.wait_s - waited, time.perf_counter() - t0
    side.close()
    row(f"waiting for batches, n={b.steps}", "", f"{waited / total:.4%}", "")
    return dict(waited_s=waited, total_s=total)


def child(b: Bench, side: str, cache: str, nproc: int = 1, **changes: object) -> dict:
    """This program in processes of its own: one side alone."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        if nproc > 1
        else []
    )
    environment = os.environ | dict(TORCHINDUCTOR_CACHE_DIR=cache, OMP_NUM_THREADS=str(b.threads))
    command = [
        sys.executable,
        *torchrun,
        __file__,
        *b.flags(child=side, only="", out="", **changes),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def alone(b: Bench, w: World, folder: Path) -> dict:
    """What a child does."""
    watch, started = Watch(w), time.perf_counter()
    side = Side(partial(dict(plain=plain, ours=ours)[b.child], knobs(b, folder), w), w)
    built = time.perf_counter()
    side.step()
    first_s = time.perf_counter() - built
    for i in range(1, b.warmup + b.steps):
        side.step(watch if i >= b.warmup else None)
    side.close()
    ms = w.gather(watch.ms())
    return dict(build_s=built - started, first_step_s=first_s, ms=ms)


def part_compile(b: Bench, w: World, folder: Path) -> dict:
    found = {}
    for cache in ("cold", "warm"):
        for side in ("plain", "ours"):
            found[f"{side}_{cache}"] = child(
                b, side, str(folder / f"cache_{side}"), steps=1, warmup=1
            )
        first = [found[f"{side}_{cache}"]["first_step_s"] for side in ("plain", "ours")]
        row(
            f"first step, {cache} cache, wall s, n=1",
            *(f"{s:.1f}" for s in first),
            f"{first[1] / first[0]:.3f}",
        )
    return found


def part_scaling(b: Bench, w: World, folder: Path) -> dict:
    if w.device.type == "cuda" and torch.cuda.device_count() < 2:
        row("1 -> 2 processes", "needs two GPUs")
        return dict(skipped="one GPU")
    found = {1: [], 2: []}
    for nproc in (1, 2, 1, 2):  # the first of each fills the compiler's cache
        found[nproc].append(child(b, "ours", str(folder / "cache_ours"), nproc)["ms"])
    one, two = (np.array(found[n]).swapaxes(0, 1).reshape(n, -1).mean(0) for n in (1, 2))
    name = f"1 -> 2 processes, ms, n={len(one)}"
    row(
        name,
        spread(list(one)),
        spread(list(two)),
        f"T1/(2 T2) = {np.median(one) / np.median(two) / 2:.3f}",
    )
    return dict(ms={str(n): runs for n, runs in found.items()})


def part_levers(b: Bench, w: World, folder: Path) -> dict:
    wrap = torch.compile if b.compile else lambda f: f
    k = knobs(b, folder, n_layer=0)  # embedding, norm, head: a model without blocks
    model, plain_model = train_gpt.GPT(k), plain_gpt.PlainGPT(k.vocab_size, 0, k.n_head, k.n_embd)
    model.init_weights(0)
    plain_model.load_state_dict(dict(wte=model.wte.detach().clone()))
    model.to(w.device).wte.grad = torch.zeros_like(model.wte)
    head, plain_head = train_gpt.MicroStep(model, k, w), wrap(plain_model.to(w.device))
    x = torch.randint(k.vocab_size, (k.device_batch_size, k.sequence_length), device=w.device)

    def run_plain_head() -> None:
        with torch.autocast(w.device.type, dtype=torch.bfloat16):
            loss = plain_head(x, x)
        loss.backward()

    heads = compare(dict(plain=run_plain_head, ours=lambda: head.backward(x, x, 1.0)), b, w)
    row(
        f"head of a micro-batch, ms, n={b.steps}",
        *map(spread, heads.values()),
        ratio(*heads.values()),
    )

    c, gram, loop = b.n_embd, train_gpt.newton_schulz, wrap(plain_gpt.newton_schulz)
    stacks = [
        torch.randn(b.n_layer * n, *shape, device=w.device)
        for n, shape in ((4, (c, c)), (2, (c, 4 * c)))
    ]
    turns = dict(plain=lambda: [loop(m) for stack in stacks for m in stack])
    turns |= dict(gram=lambda: [gram(m[None]) for stack in stacks for m in stack])
    ns = compare(turns | dict(batched=lambda: [gram(stack) for stack in stacks]), b, w)
    for name in ("gram", "batched"):
        cells = spread(ns["plain"]), spread(ns[name]), ratio(ns["plain"], ns[name])
        row(f"Newton-Schulz, {name}, ms, n={b.steps}", *cells)

    batches = train_gpt.Batches(plumbing.TokenShards(b.input_bin), knobs(b, folder), w)
    made = []  # wall time: what a loop without a thread for it would wait for
    for i in range(b.steps):
        t0 = time.perf_counter()
        for t in batches.make(i):
            t.to(w.device)
        w.sync()
        made.append(1000 * (time.perf_counter() - t0))
    row(f"making a batch in the loop, ms, n={b.steps}", spread(made, ".3f"), "(on a thread)", "")
    return dict(head_ms=heads, newton_schulz_ms=ns, batch_ms=made)


def part_sdpa(b: Bench, w: World, folder: Path) -> dict:
    shape = (b.device_batch_size, b.sequence_length, 3, b.n_head, b.n_embd // b.n_head)
    qkv = torch.randn(shape, device=w.device, dtype=torch.bfloat16, requires_grad=True)
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]

    def attend(context: Callable[[], AbstractContextManager]) -> None:
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        with context():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, qkv, y.detach())

    cudnn = partial(sdpa_kernel, order, set_priority=True)
    ms = compare(
        {"torch's order": partial(attend, nullcontext), "cuDNN first": partial(attend, cudnn)}, b, w
    )
    row(f"attention, cuDNN first, ms, n={b.steps}", *map(spread, ms.values()), ratio(*ms.values()))
    return dict(ms=ms)


# ----------------------------------------------------------------------------
# Program


def draw_tokens(b: Bench, folder: Path) -> str:
    """A shard of tokens, few of them frequent; returns its pattern."""
    uniform = np.random.default_rng(0).random(8 * b.batch_size * b.sequence_length + 1)
    plumbing.write_shard(folder / "drawn_000001.bin", (b.vocab_size * uniform**4).astype(np.uint16))
    return str(folder / "drawn_*.bin")


def git(*args: str) -> str:
    return subprocess.run(
        ["git", "-C", str(REPO), *args], capture_output=True, text=True
    ).stdout.strip()


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU"
    )
    return f"{name}, {os.cpu_count()} cores"


def facts(b: Bench, w: World, data: str) -> dict:
    """What every JSON file begins with."""
    found = dict(
        command=shlex.join(sys.orig_argv), git_commit=git("rev-parse", "HEAD") or "unknown"
    )
    found |= dict(
        dirty=bool(git("status", "--porcelain")),
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}",
    )
    found |= dict(device=w.name() if b.device == "cuda" else cpu_name(), torch=torch.__version__)
    found |= dict(
        cuda=torch.version.cuda, load=os.getloadavg(), python=sys.version.split()[0], data=data
    )
    clock = "CUDA events" if b.device == "cuda" else "process CPU time"
    return found | dict(clock=clock, flags=dataclasses.asdict(b), n=b.steps)


def report(b: Bench, w: World, folder: Path, data: str) -> None:
    """Run the parts; a part's file is written as soon as it is done."""
    train_gpt.Prefetch = prefetch
    if b.child:
        found = alone(b, w, folder)
        if w.main:
            show(json.dumps(found))
        return
    start = facts(b, w, data)
    show(
        f"{start['device']}, torch {start['torch']}, {start['clock']}, compile={int(b.compile)}, data: {data}"
    )
    row("", "plain", "ours", "ratio")
    for part in b.parts:
        t0 = time.perf_counter()
        gc.collect()
        torch.cuda.empty_cache()  # processes of their own need the memory; nothing on a CPU
        torch._dynamo.reset()  # or the parts' models would share the few recompilations that a function is allowed
        found = dict(part=part) | start | globals()[f"part_{part}"](b, w, folder)
        if b.out:
            Path(b.out).mkdir(parents=True, exist_ok=True)
            found |= dict(wall_s=time.perf_counter() - t0)
            lines = ",\n".join(
                f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()
            )
            (Path(b.out) / f"{part}_{b.device}.json").write_text(f"{{\n{lines}\n}}\n")


def main() -> int:
    read = partial(plumbing.read_knobs, Bench, env={}, doc=__doc__)
    b = read({"": SIZES[read().device]})
    with (
        plumbing.world(b.device, "use --device cpu") as w,
        tempfile.TemporaryDirectory() as temporary,
    ):
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # nothing here is worth saving first
        plumbing.check_compiler(b.compile, b.device)
        folder = Path(temporary)
        torch.set_num_threads(b.threads)
        if b.compile and b.device == "cuda":
            torch._inductor.config.coordinate_descent_tuning = (
                True  # as train_gpt; per thread, and this is one more
            )
        knobs(b, folder)  # refuses sizes that do not fit together
        data = b.input_bin or "drawn, seed 0"
        with torch.profiler.profile():  # its first use has to be on this thread
            pass
        b = dataclasses.replace(b, input_bin=b.input_bin or draw_tokens(b, folder))
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            report(b, w, folder, data)
        faulthandler.cancel_dump_traceback_later()  # set by our side
    return 0


if __name__ == "__main__":
    plumbing.launch(main)
