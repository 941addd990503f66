"""bench_scaled.py -- train_scaled.py's operators beside plain references, and its time per byte by
length of row.

    python scripts/scaled/bench_scaled.py  one thread of this CPU, 10 minutes
    python scripts/scaled/bench_scaled.py --parts length,step --repeats 9
    python scripts/scaled/bench_scaled.py --parts step --malloc glibc  without plumbing's setting,
    as plain scripts run
    python scripts/scaled/bench_scaled.py --device cuda --out experiments/gpu  the default size,
    bf16, compiled

Parts    memory  the memory operator, forward and backward, and the original's cumulative sum
                 (tests/scaled/plain_scaled.py)
         window  window attention, forward and backward, and the dense mask
         step    a whole training step at 1,024 bytes and width 256, PRESET=phase8's mathematics:
                 ours, and the plain
                 model with its cumulative sums and dense masks; the same AdamW on both sides
         blocks  a whole training step of each model of the study's stage scaled_blocks, at its
                 size, by turns
         length  the model forward and backward, per byte, on rows of 1 KB to 64 KB; peak memory, on
                 a CPU that of the
                 process up to then, earlier parts included
Units    process CPU time on a CPU, synchronised seconds on a GPU; both sides by turns in one
         process; medians, and the
         ratio of medians with the quartiles of the ratios turn by turn; memory in MiB: resident, or
         allocated on a GPU
Writes   with --out: scaled_PART_DEVICE.json with command, commit, hardware and torch version
Raises   UserError: no such part, no GPU, --malloc glibc with one
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests/scaled")]
import plain_scaled as plain  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import train_scaled  # noqa: E402
from plumbing import UserError, World, join_world, launch  # noqa: E402
from train_scaled import PATCH, ByteLM, Knobs  # noqa: E402

PARTS = ("memory", "window", "step", "blocks", "length")
STEP = dict(
    preset="phase8", n_embd=256, n_layer=4, n_head=4, window=64, dropout=0.0, sequence_length=1024
)
LENGTH = dict(
    n_embd=256, n_layer=4, n_head=4, window=64, thinking_steps=1
)  # on a CPU; a GPU runs the default size
STUDY = dict(
    n_embd=128,
    n_layer=4,
    n_head=4,
    thinking_steps=1,
    dropout=0.0,
    sequence_length=1024,
    batch_size=2,
)
DECODER = dict(preset="phase8", decoder="scaled")
BLOCKS = {
    "phase 8, 5 layers": dict(preset="phase8", n_layer=5),
    "phase 8's blocks, scaled's decoder": DECODER,
}
BLOCKS |= {"the same, 5 layers": DECODER | dict(n_layer=5)}
BLOCKS |= {
    "scaled without its memory by bytes": dict(window=32, mem_rows=0),
    "scaled": dict(window=32),
}
LENGTHS = [2**n for n in range(10, 17)]


def seconds(f: Callable[[], object], w: World) -> float:
    """One call, after what was queued before it."""
    clock = time.perf_counter if w.device.type == "cuda" else time.process_time
    w.synchronize()
    t0 = clock()
    f()
    w.synchronize()
    return clock() - t0


def by_turns(
    sides: dict[str, Callable[[], object]], repeats: int, w: World
) -> dict[str, list[float]]:
    """Seconds of each side, A B A B; the first call of each is not counted."""
    for f in sides.values():
        f()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, f in sides.items():
            found[name].append(seconds(f, w))
    return found


def compared(found: dict[str, list[float]]) -> dict:
    """Medians in ms, how many times longer the plain side takes, and the quartiles of that."""
    ours, other = found["ours"], found["plain"]
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    ms = {f"{name}_ms": 1000 * statistics.median(times) for name, times in found.items()}
    return ms | dict(
        ratio=statistics.median(other) / statistics.median(ours), low=low, high=high, n=len(ours)
    )


def operands(N: int, w: World) -> list[torch.Tensor]:
    """q, k, v of 2 rows, 4 heads of width 64, N patches."""
    g = torch.Generator().manual_seed(N)
    return [torch.randn(2, 4, N, 64, generator=g).to(w.device).requires_grad_() for _ in range(3)]


def memory_at(N: int, a: argparse.Namespace, w: World) -> dict:
    q, k, v = operands(N, w)
    log_decay, state = (
        torch.full((1, 4, N), -0.001, device=w.device),
        torch.zeros(2, 4, 64, 64, device=w.device),
    )
    features = lambda: (F.elu(q) + 1, F.elu(k) + 1, v, log_decay)  # the original's
    ours = lambda: train_scaled.decaying_memory(*features(), state)[0].sum().backward()
    other = lambda: plain.cumsum_memory(*features()[:3], log_decay[0, :, 0]).sum().backward()
    return dict(patches=N) | compared(by_turns(dict(ours=ours, plain=other), a.repeats, w))


def part_memory(a: argparse.Namespace, w: World) -> list[dict]:
    return [memory_at(N, a, w) for N in (256, 1024, 4096)]


def window_at(N: int, a: argparse.Namespace, w: World) -> dict:
    q, k, v = operands(N, w)
    past = torch.zeros(2, 4, 63, 64, device=w.device)
    mask = train_scaled.window_mask(N, 64, torch.zeros((), device=w.device))
    keys, values = (torch.cat([past, t], 2) for t in (k, v))
    attend = lambda: train_scaled.window_attention(q, keys, values, 64, mask)
    ours = lambda: attend().sum().backward(retain_graph=True)
    other = lambda: plain.dense_window(q, k, v, 64).sum().backward()
    return dict(patches=N) | compared(by_turns(dict(ours=ours, plain=other), a.repeats, w))


def part_window(a: argparse.Namespace, w: World) -> list[dict]:
    return [window_at(N, a, w) for N in (1024, 4096)]


def knobs(w: World, **more: object) -> Knobs:
    return Knobs(
        **dict(device=w.device.type, compile=w.device.type == "cuda")
        | train_scaled.PRESETS["scaled"]
        | more
    )


def text(T: int, rows: int, w: World) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randint(0, 256, (rows, T + PATCH), generator=torch.Generator().manual_seed(T)).to(
        w.device
    )
    return x[:, :-PATCH], x[:, PATCH:]


def passes(model: ByteLM, cfg: Knobs, w: World, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward on rows of SEQUENCE_LENGTH bytes, with state if they carry it."""
    x, y = text(cfg.sequence_length, cfg.device_batch_size, w)
    states = [None]
    precision = torch.autocast(w.device.type, dtype, enabled=dtype != torch.float32)
    if cfg.compile:
        problem = train_scaled.compile_model(model, cfg, w, precision)
        if problem:
            raise UserError(f"it cannot be compiled: {problem}")

    def run() -> None:
        with precision:
            nll, state = model(x, y, states[0])
        nll.mean().backward()
        if cfg.carry_state:
            states[0] = train_scaled.map_state(torch.Tensor.detach, state)

    return run


def training_step(model: ByteLM, cfg: Knobs, w: World) -> Callable[[], None]:
    """The same in fp32, and AdamW."""
    run = passes(model, cfg, w, torch.float32)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        run()
        adam.step()
        adam.zero_grad()

    return step


def part_step(a: argparse.Namespace, w: World) -> list[dict]:
    """Two rows of 1,024 bytes; nothing is compiled on either side."""
    k = Knobs(
        **train_scaled.PRESETS["phase8"]
        | STEP
        | dict(device=w.device.type, compile=False, device_batch_size=2)
    )
    model = ByteLM(k)
    model.init_weights(k.seed)
    other = plain.PlainPhase8(
        k.n_embd, k.n_layer, k.n_head, k.window, 0.995, k.thinking_steps, form="cumsum"
    )
    plain.copy_phase8(model, other)
    model.to(w.device), other.to(w.device)
    x, y = text(k.sequence_length, 2, w)
    adam = torch.optim.AdamW(other.parameters(), lr=1e-4, fused=True)

    def theirs() -> None:
        F.cross_entropy(other(x.long(), y.long()).flatten(0, 1), y.long().flatten()).backward()
        adam.step()
        adam.zero_grad()

    found = compared(by_turns(dict(ours=training_step(model, k, w), plain=theirs), a.repeats, w))
    rate = {
        f"{name}_bytes_per_s": x.numel() / found[f"{name}_ms"] * 1000 for name in ("ours", "plain")
    }
    return [dict(bytes=x.numel()) | found | rate]


def part_blocks(a: argparse.Namespace, w: World) -> list[dict]:
    """The last is what the others' ratios are of."""
    sides = {}
    for name, own in BLOCKS.items():
        values = train_scaled.PRESETS[own.get("preset", "scaled")] | STUDY | own
        k = Knobs(**values | dict(device=w.device.type, compile=False, device_batch_size=2))
        model = ByteLM(k)
        model.init_weights(k.seed)
        sides[name] = training_step(model.to(w.device), k, w)
    found, rows = by_turns(sides, a.repeats, w), []
    for name, times in found.items():
        both = compared(dict(ours=found["scaled"], plain=times))
        rows.append(
            dict(model=name, ms=both["plain_ms"])
            | {key: both[key] for key in ("ratio", "low", "high", "n")}
        )
    return rows


def length_at(T: int, a: argparse.Namespace, w: World) -> dict:
    cuda = w.device.type == "cuda"
    k = knobs(w, sequence_length=T, batch_size=1, device_batch_size=1, **({} if cuda else LENGTH))
    model = ByteLM(k)
    model.init_weights(k.seed)
    model.to(w.device)
    run = passes(model, k, w, torch.bfloat16 if cuda else torch.float32)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ms = [1000 * t for t in by_turns(dict(ours=run), a.repeats, w)["ours"]]
    return dict(
        bytes=T,
        us_per_byte=1000 * statistics.median(ms) / T,
        n=len(ms),
        peak_mib=w.peak_memory_mib(),
    )


def part_length(a: argparse.Namespace, w: World) -> list[dict]:
    """A row at a time, the shortest first."""
    rows = [length_at(T, a, w) for T in LENGTHS]
    return [row | dict(of_the_shortest=row["us_per_byte"] / rows[0]["us_per_byte"]) for row in rows]


def facts(w: World) -> dict:
    git = lambda *words: subprocess.run(
        ["git", *words], cwd=REPO, capture_output=True, text=True
    ).stdout.strip()
    found = dict(
        command=shlex.join(sys.orig_argv), git_commit=git("rev-parse", "HEAD") or "unknown"
    )
    found |= dict(
        dirty=bool(git("status", "--porcelain")),
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}",
    )
    return found | dict(
        device=w.device_name(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        load=os.getloadavg(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--parts", default=",".join(PARTS), metavar="X,...", help=f"default {','.join(PARTS)}"
    )
    p.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="calls of each side; default 5"
    )
    p.add_argument("--threads", type=int, default=1, metavar="N", help="of a CPU; default 1")
    p.add_argument(
        "--malloc", default="kept", choices=("kept", "glibc"), help="freed memory on a CPU (kept)"
    )
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of JSON files")
    a = p.parse_args(argv)
    parts = [part.strip() for part in a.parts.split(",") if part.strip()]
    if wrong := [part for part in parts if part not in PARTS]:
        raise UserError(f"--parts {a.parts}: no part {wrong[0]!r}; there are {', '.join(PARTS)}")
    if min(a.repeats, a.threads) < 1:
        raise UserError("--repeats and --threads: expected 1 or more")
    alone = (
        contextlib.nullcontext(World(0, 1, torch.device("cpu"))) if a.malloc == "glibc" else None
    )
    if alone and a.device == "cuda":
        raise UserError("--malloc glibc is about CPU memory; leave out --device cuda")
    with alone or join_world(a.device, "use --device cpu") as w:
        torch.set_num_threads(a.threads)
        start = facts(w)
        print(
            f"{start['device']}, torch {start['torch']}, {a.threads} thread(s), n={a.repeats} "
            f"calls a side",
            flush=True,
        )
        for part in parts:
            rows = globals()[f"part_{part}"](a, w)
            for row in rows:
                forms = {float: "{:.4g}", int: "{:,}", str: "{}"}
                shown = (f"{key} {forms[type(value)].format(value)}" for key, value in row.items())
                print(f"{part}: {'; '.join(shown)}", flush=True)
            if a.out:
                a.out.mkdir(parents=True, exist_ok=True)
                path = a.out / f"scaled_{part}_{a.device}{'_glibc' if alone else ''}.json"
                path.write_text(
                    json.dumps(dict(part=part) | start | dict(rows=rows), indent=1) + "\n"
                )
    return 0


if __name__ == "__main__":
    launch(main)
