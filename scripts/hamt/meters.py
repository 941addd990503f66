"""meters.py -- time and memory of a model, each measurement in a process of its own.

A CPU's times are CPU time of the process, a GPU's are synchronised seconds; memory in MiB.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import numpy as np
import torch
from comparison_tables import show
from quality import FEED, autocast
from subjects import Ours, open_subject

import train_gpu
from plumbing import World
from plumbing.world import flat_gradients


def now(device: torch.device) -> float:
    """Seconds: CPU time of this process, which a busy machine does not stretch; a GPU's end of
    work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def status_mib(name: str) -> float | None:
    """VmRSS or VmHWM of this process from the kernel; ru_maxrss would also count what the parent
    had at the fork."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{name}:")), None
    )


class Peak:
    """Peak memory from here on, and what was held at the start, MiB."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.base = torch.cuda.memory_allocated(device) / 2**20
            return
        with contextlib.suppress(OSError):  # elsewhere than on Linux the peak includes loading
            Path("/proc/self/clear_refs").write_text("5")
        self.base = status_mib("VmRSS")

    def row(self) -> dict[str, float | None]:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            peak = status_mib("VmHWM") or World(0, 1, self.device).peak_memory_mib()
        return dict(
            peak_mib=peak,
            base_mib=self.base,
            above_mib=None if self.base is None else peak - self.base,
        )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


@torch.inference_mode()
def child_inference(spec: Mapping[str, object], device: torch.device) -> dict:
    """A context of T tokens, alone in this process: prefill of all but the last `decode`, then
    those, one by one."""
    subject, T, n = open_subject(spec["subject"], device), spec["context"], spec["decode"]
    x_BT = torch.from_numpy(
        np.random.default_rng(0).integers(0, min(subject.vocabulary, 50257), (1, T))
    ).to(device)
    with autocast(subject, spec["precision"]):
        subject.decode(
            x_BT[:, -1:], subject.prefill(x_BT[:, : min(T - n, 32)])[1]
        )  # first uses of kernels
        peak, prefills, decodes = Peak(device), [], []
        for _ in range(spec["repeats"]):
            state, t0 = None, now(device)
            _, state = subject.prefill(x_BT[:, : T - n])
            prefills.append(now(device) - t0)
            for i in range(T - n, T):
                t0 = now(device)
                _, state = subject.decode(x_BT[:, i : i + 1], state)
                decodes.append(now(device) - t0)
    low, middle, high = quartiles(decodes)
    row = dict(
        context=T, prefill_tokens=T - n, prefill_tokens_per_s=(T - n) / float(np.median(prefills))
    )
    row |= dict(
        decode_ms=1000 * middle,
        decode_ms_low=1000 * low,
        decode_ms_high=1000 * high,
        n=len(decodes),
    )
    return (
        row
        | dict(decode_tokens_per_s=1 / middle, state_bytes=subject.state_bytes(state))
        | peak.row()
    )


def grown(ours: Ours, state: train_gpu.State, T: int) -> train_gpu.State:
    """A state as it is after T tokens: attention's keys and values are filled up with drawn
    numbers, which cost as much to read as real ones; a memory's has its size from the first token.
    """
    layers = state.layers
    if ours.cfg.mixer == "attention":
        layers = []
        for k, _, past in state.layers:
            drawn = torch.randn(2, 1, T, *k.shape[2:], device=k.device, dtype=k.dtype)
            layers.append((drawn[0], drawn[1], past))
    return train_gpu.State(torch.full_like(state.position, T), layers)


@torch.inference_mode()
def child_decoding(spec: Mapping[str, object], device: torch.device) -> list[dict]:
    """Time per token and state at each context. Contexts are really read, 1024 tokens at a time;
    where full attention
    would take too long, from `fed` tokens on, its cache is drawn instead."""
    ours, rows, at = open_subject(spec["subject"], device), [], 0
    full = ours.cfg.mixer == "attention"
    state, rng = ours.model.empty_state(1), np.random.default_rng(0)
    draw = lambda n: torch.from_numpy(rng.integers(0, min(ours.vocabulary, 50257), (1, n))).to(
        device
    )
    with autocast(ours, spec["precision"]):
        for T in sorted(spec["contexts"]):
            fed = not (full and T > spec["fed"])
            while fed and at < T:
                step = min(FEED, T - at)
                (_, state), at = ours.decode(draw(step), state), at + step
            here, times = state if fed else grown(ours, state, T), []
            size, peak = ours.state_bytes(here), Peak(device)
            for i in range(5 + spec["decode"]):  # the first five warm the caches up
                x_BT, t0 = draw(1), now(device)
                _, here = ours.decode(x_BT, here)
                times += [now(device) - t0] * (i >= 5)
            low, middle, high = (1000 * t for t in quartiles(times))
            row = dict(
                context=T, read="fed" if fed else "drawn", decode_ms=middle, decode_ms_low=low
            )
            rows.append(
                row | dict(decode_ms_high=high, n=len(times), state_bytes=size) | peak.row()
            )
    return rows


class Trainer:
    """A training step of train_gpu.py on drawn tokens: loss, gradients, AdamW, nothing else."""

    def __init__(self, cfg: train_gpu.Knobs, device: torch.device):
        self.cfg, self.device, self.rng = cfg, device, np.random.default_rng(0)
        self.model = train_gpu.Model(cfg)
        train_gpu.init_weights(self.model, cfg)
        self.model.to(device)
        if cfg.compile:
            train_gpu.compile_model(self.model)
        self.gradients = flat_gradients(self.model)
        self.adam = train_gpu.AdamW(self.model, cfg)
        norms = torch.zeros(1, device=device)  # moments are there from the start, as in most steps
        self.adam.step(0.0, norms, torch.tensor(True, device=device))

    def step(self, B: int, T: int) -> float:
        """Seconds of a step on (B, T) tokens."""
        limit = min(self.cfg.vocabulary, 50257)
        tokens = torch.from_numpy(self.rng.integers(0, limit, (B, T + 1))).to(self.device)
        x_BT, y_BT = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.model.train()
        started = now(self.device)
        (self.model(x_BT, y_BT)[0] / (B * T)).backward()
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.model.parameters()]))
        self.adam.step(self.cfg.lr, norms, norms.isfinite().all())
        self.gradients.zero_()
        return now(self.device) - started


def child_training_memory(spec: Mapping[str, object], device: torch.device) -> dict:
    """Peak of one training step on (B, T); weights, gradients and moments are there before it."""
    trainer = Trainer(train_gpu.Knobs(**spec["knobs"]), device)
    trainer.step(
        1, min(16, spec["context"])
    )  # what libraries allocate at first use is not the step's
    peak = Peak(device)
    trainer.step(spec["batch"], spec["context"])
    return dict(context=spec["context"], batch=spec["batch"]) | peak.row()


# Processes that measure now, each the leader of a group of its own: a deadline ends them.
RUNNING: list[subprocess.Popen] = []
CHILDREN = dict(
    inference=child_inference, decoding=child_decoding, training_memory=child_training_memory
)


def measure_apart(what: str, spec: Mapping[str, object], device: str) -> object | None:
    """What CHILDREN[what] finds in a process of its own; None, and a line, where it does not get
    through."""
    if device == "cuda":
        torch.cuda.empty_cache()  # what quality needed here, the child may need
    command = [
        sys.executable,
        str(Path(__file__).with_name("compare_baselines.py")),
        "--device",
        device,
        "--child",
        json.dumps([what, spec]),
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    RUNNING.append(process)
    stdout, stderr = process.communicate()
    RUNNING.remove(process)
    code = process.returncode
    if code == 0:
        return json.loads(stdout.splitlines()[-1])
    last = f"exit code {code}"
    for line in stderr.splitlines():
        if line.strip():
            last = line
    why = "out of memory" if code == -9 or "emory" in last else last[:200]
    where = {name: value for name, value in spec.items() if name in ("context", "batch")}
    show(f"  {what} {where or ''}: left out, {why}")
    return None
