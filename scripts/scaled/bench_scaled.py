"""bench_scaled.py -- speed of train_scaled.py: step, operators, time per byte by length.

    python scripts/scaled/bench_scaled.py                  one thread of this CPU, 10 minutes
    python scripts/scaled/bench_scaled.py --parts length,step --repeats 9
    python scripts/scaled/bench_scaled.py --parts step --malloc glibc
    python scripts/scaled/bench_scaled.py --device cuda --out experiments/gpu --deadline_s 120

Parts    train   PRESET=scaled's training step: the first one, which compiles; the later ones;
                 peak memory; and how often a step starts a kernel, by kind. On a GPU at the default
                 size, in bf16 and compiled
         length  the model forward and backward, per byte, on rows of 1 KB to 64 KB; peak memory, on
                 a CPU that of the process up to then, earlier parts included
         memory  the memory operator, forward and backward, and the original's cumulative sum
                 (tests/scaled/plain_scaled.py)
         window  window attention, forward and backward, and the dense mask
         step    a whole training step at 1,024 bytes and width 256, PRESET=phase8's mathematics:
                 ours, and the plain model with its cumulative sums and dense masks; the same AdamW
                 on both sides
         blocks  a whole training step of each model of the study's stage scaled_blocks, at its
                 size, by turns
Units    process CPU time on a CPU, time between CUDA events on a GPU; both sides by turns in one
         process; medians, and the ratio of medians with the quartiles of the ratios turn by turn;
         memory in MiB: resident, or allocated on a GPU
Writes   with --out: scaled_PART_DEVICE.json as soon as the part is done, with command, commit,
         machine and versions. --deadline_s, Ctrl-C and SIGTERM stop at once
Raises   UserError: no such part, no GPU, --malloc glibc with one
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "scripts"), str(REPO / "tests/scaled")]
import plain_scaled as plain  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from lib import benching  # noqa: E402

import train_scaled  # noqa: E402
from plumbing.byte_runs import parts_to_compile  # noqa: E402
from plumbing.device import CudaGraph, compile_parts  # noqa: E402
from plumbing.knobs import UserError  # noqa: E402
from plumbing.row_states import RowStates  # noqa: E402
from plumbing.world import World, flat_gradients, join_world, launch  # noqa: E402
from train_scaled import PATCH, ByteLM, Knobs  # noqa: E402

# The most valuable first: a deadline may leave no time for the last ones.
PARTS = ("train", "length", "memory", "window", "step", "blocks")
# fmt: off
STEP = dict(
    preset="phase8", n_embd=256, n_layer=4, n_head=4, sliding_window=64, dropout=0.0,
    sequence_length=1024)
# On a CPU; a GPU runs the default size.
SMALLER = dict(n_embd=256, n_layer=4, n_head=4, sliding_window=64, thinking_steps=1)
STUDY = dict(
    n_embd=128, n_layer=4, n_head=4, thinking_steps=1, dropout=0.0, sequence_length=1024,
    batch_size=2)
DECODER = dict(preset="phase8", decoder="scaled")
BLOCKS = {
    "phase 8, 5 layers": dict(preset="phase8", n_layer=5),
    "phase 8's blocks, scaled's decoder": DECODER,
    "the same, 5 layers": DECODER | dict(n_layer=5),
    "scaled without its memory by bytes": dict(sliding_window=32, mem_rows=0),
    "scaled": dict(sliding_window=32),
}
# fmt: on
LENGTHS = [2**n for n in range(10, 17)]


def by_turns(
    sides: dict[str, Callable[[], object]], repeats: int, world: World
) -> dict[str, list[float]]:
    """Milliseconds of each side, A B A B, when each has compiled and recorded what it will."""
    warmup = CudaGraph.WARMUP + 1 if world.device.type == "cuda" else 1
    return benching.Meter(world, repeats, warmup).compare(sides)


def compared(found: dict[str, list[float]]) -> dict:
    """Medians in ms, how many times longer the plain side takes, and the quartiles of that."""
    ours, other = found["ours"], found["plain"]
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    row = {f"{name}_ms": statistics.median(times) for name, times in found.items()}
    row["ratio"] = statistics.median(other) / statistics.median(ours)
    return row | dict(low=low, high=high, n=len(ours))


def operands(N: int, world: World) -> list[torch.Tensor]:
    """q, k, v of 2 rows, 4 heads of width 64, N patches."""
    g = torch.Generator().manual_seed(N)
    drawn = [torch.randn(2, 4, N, 64, generator=g) for _ in range(3)]
    return [t.to(world.device).requires_grad_() for t in drawn]


def memory_at(N: int, repeats: int, world: World) -> dict:
    q, k, v = operands(N, world)
    log_decay = torch.full((1, 4, N), -0.001, device=world.device)
    state = torch.zeros(2, 4, 64, 64, device=world.device)
    features = lambda: (F.elu(q) + 1, F.elu(k) + 1, v)  # the original's
    ours = lambda: train_scaled.decaying_memory(*features(), log_decay, state)[0].sum().backward()
    other = lambda: plain.cumsum_memory(*features(), log_decay[0, :, 0]).sum().backward()
    return dict(patches=N) | compared(by_turns(dict(ours=ours, plain=other), repeats, world))


def part_memory(a: argparse.Namespace, world: World) -> list[dict]:
    return [memory_at(N, a.repeats, world) for N in (256, 1024, 4096)]


def window_at(N: int, repeats: int, world: World) -> dict:
    q, k, v = operands(N, world)
    past = torch.zeros(2, 4, 63, 64, device=world.device)
    mask = train_scaled.window_mask(N, 64, torch.zeros((), device=world.device))
    keys, values = torch.cat([past, k], 2), torch.cat([past, v], 2)
    attend = lambda: train_scaled.window_attention(q, keys, values, 64, mask)
    ours = lambda: attend().sum().backward(retain_graph=True)
    other = lambda: plain.dense_window(q, k, v, 64).sum().backward()
    return dict(patches=N) | compared(by_turns(dict(ours=ours, plain=other), repeats, world))


def part_window(a: argparse.Namespace, world: World) -> list[dict]:
    return [window_at(N, a.repeats, world) for N in (1024, 4096)]


def make_model(cfg: Knobs, world: World, dtype: torch.dtype = torch.float32) -> ByteLM:
    model = ByteLM(cfg, dtype)
    model.init_weights(cfg.seed)
    return model.to(world.device)


def default_model(world: World, **more: object) -> ByteLM:
    """PRESET=scaled: on a GPU at its own size, in bf16 and compiled; smaller on a CPU."""
    on_gpu = world.device.type == "cuda"
    values = {} if on_gpu else SMALLER
    cfg = Knobs(**values | more | dict(device=world.device.type, compile=on_gpu))
    return make_model(cfg, world, torch.bfloat16 if on_gpu else torch.float32)


def text(T: int, rows: int, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(T)
    x = torch.randint(0, 256, (rows, T + PATCH), generator=g).to(world.device)
    return x[:, :-PATCH], x[:, PATCH:]


def passes(model: ByteLM, world: World) -> Callable[[], None]:
    """Forward and backward on rows of SEQUENCE_LENGTH bytes, with state if they carry it."""
    cfg = model.cfg
    rows = cfg.device_batch_size
    x, y = text(cfg.sequence_length, rows, world)
    carried = RowStates(model.empty_state if cfg.carry_state else None, rows, world)

    flat_gradients(model)  # which a CUDA graph adds to
    scaler = torch.amp.GradScaler(world.device.type, enabled=False)
    backward_pass = partial(train_scaled.run_backward_pass, model, carried, scaler, rows)
    recorded = CudaGraph(backward_pass, world.device) if cfg.uses_cuda_graph else backward_pass

    def run(take_pass: Callable[..., torch.Tensor] = recorded) -> None:
        carried.start_step(is_new_epoch=False)
        take_pass(x, y)

    if cfg.compile:
        problem = compile_parts(parts_to_compile(model), partial(run, backward_pass), world)
        if problem:
            raise UserError(f"it cannot be compiled: {problem}")
    return run


def training_step(model: ByteLM, world: World) -> Callable[[], None]:
    """The same, and AdamW."""
    run = passes(model, world)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        run()
        adam.step()
        adam.zero_grad(set_to_none=False)

    return step


def part_train(a: argparse.Namespace, world: World) -> list[dict]:
    """The default's two rows of 4,096 bytes."""
    started = time.perf_counter()
    model = default_model(world)
    step = training_step(model, world)
    step()
    world.synchronize()
    cold_start_s = time.perf_counter() - started
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = statistics.median(by_turns(dict(ours=step), a.repeats, world)["ours"])
    peak_mib = world.peak_memory_mib()
    meter = benching.Meter(world, steps=1, warmup=0)
    calls = benching.profile_steps(lambda: meter.time_ms(step), 1, world)["calls_per_step"]
    num_bytes = model.cfg.device_batch_size * model.cfg.sequence_length
    row = dict(bytes=num_bytes, ms=ms, bytes_per_s=num_bytes / ms * 1000, n=a.repeats)
    row |= dict(cold_start_s=cold_start_s, peak_mib=peak_mib, calls=sum(calls.values()))
    return [row | {f"calls of {kind}": number for kind, number in calls.items()}]


def part_step(a: argparse.Namespace, world: World) -> list[dict]:
    """Two rows of 1,024 bytes; nothing is compiled on either side."""
    own = dict(device=world.device.type, compile=False, cuda_graph=False, device_batch_size=2)
    cfg = Knobs(**train_scaled.PRESETS["phase8"] | STEP | own)
    model = make_model(cfg, world)
    sizes = (cfg.n_embd, cfg.n_layer, cfg.n_head, cfg.sliding_window, 0.995, cfg.thinking_steps)
    other = plain.PlainPhase8(*sizes, form="cumsum").to(world.device)
    plain.copy_phase8(model, other)
    x, y = text(cfg.sequence_length, 2, world)
    adam = torch.optim.AdamW(other.parameters(), lr=1e-4, fused=True)

    def theirs() -> None:
        F.cross_entropy(other(x, y).flatten(0, 1), y.flatten()).backward()
        adam.step()
        adam.zero_grad()

    sides = dict(ours=training_step(model, world), plain=theirs)
    found = compared(by_turns(sides, a.repeats, world))
    for name in sides:
        found[f"{name}_bytes_per_s"] = x.numel() / found[f"{name}_ms"] * 1000
    return [dict(bytes=x.numel()) | found]


def part_blocks(a: argparse.Namespace, world: World) -> list[dict]:
    """The last is what the others' ratios are of."""
    sides, rows = {}, []
    for name, own in BLOCKS.items():
        values = train_scaled.PRESETS[own.get("preset", "scaled")] | STUDY | own
        values |= dict(device=world.device.type, compile=False, cuda_graph=False)
        values |= dict(device_batch_size=2)
        sides[name] = training_step(make_model(Knobs(**values), world), world)
    found = by_turns(sides, a.repeats, world)
    for name, times in found.items():
        both = compared(dict(ours=found["scaled"], plain=times))
        row = dict(model=name, ms=both["plain_ms"])
        rows.append(row | {key: both[key] for key in ("ratio", "low", "high", "n")})
    return rows


def length_at(T: int, repeats: int, world: World) -> dict:
    model = default_model(world, sequence_length=T, batch_size=1, device_batch_size=1)
    run = passes(model, world)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = by_turns(dict(ours=run), repeats, world)["ours"]
    us_per_byte = 1000 * statistics.median(ms) / T
    return dict(bytes=T, us_per_byte=us_per_byte, n=len(ms), peak_mib=world.peak_memory_mib())


def part_length(a: argparse.Namespace, world: World) -> list[dict]:
    """A row at a time, the shortest first."""
    rows = [length_at(T, a.repeats, world) for T in LENGTHS]
    return [row | dict(of_the_shortest=row["us_per_byte"] / rows[0]["us_per_byte"]) for row in rows]


# ----------------------------------------------------------------------------
# Program


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, parts = p.add_argument, ",".join(PARTS)
    add("--parts", default=parts, metavar="X,...", help=f"default {parts}")
    add("--repeats", type=int, default=5, metavar="N", help="calls of each side (5)")
    add("--threads", type=int, default=1, metavar="N", help="of a CPU (1)")
    words = "freed memory on a CPU: kept as runs keep it, or as plain scripts run"
    add("--malloc", default="kept", choices=("kept", "glibc"), help=f"{words} (kept)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="(cpu)")
    add("--out", type=Path, metavar="DIR", help="folder of JSON files")
    add("--deadline_s", type=float, metavar="SECONDS", help="stop after this time")
    a = p.parse_args(argv)
    a.parts = [part.strip() for part in a.parts.split(",") if part.strip()]
    if wrong := [part for part in a.parts if part not in PARTS]:
        raise UserError(f"--parts: no part {wrong[0]!r}; there are {', '.join(PARTS)}")
    if min(a.repeats, a.threads) < 1:
        raise UserError("--repeats and --threads: expected 1 or more")
    if a.deadline_s is not None and a.deadline_s <= 0:
        raise UserError("--deadline_s: expected more than 0 seconds")
    if a.malloc == "glibc" and a.device == "cuda":
        raise UserError("--malloc glibc is about CPU memory; leave out --device cuda")
    return a


def show(part: str, row: dict) -> None:
    forms = {float: "{:.4g}", int: "{:,}", str: "{}"}
    cells = [f"{key} {forms[type(value)].format(value)}" for key, value in row.items()]
    print(f"{part}: {'; '.join(cells)}", flush=True)


def run_parts(a: argparse.Namespace, world: World, done: list[str]) -> None:
    facts = benching.machine_facts(world) | dict(threads=torch.get_num_threads(), n=a.repeats)
    print(f"{facts['device']}, torch {facts['torch']}, n={a.repeats} calls a side", flush=True)
    ending = "_glibc" if a.malloc == "glibc" else ""
    for part in a.parts:
        rows = globals()[f"part_{part}"](a, world)
        for row in rows:
            show(part, row)
        if a.out:
            path = a.out / f"scaled_{part}_{a.device}{ending}.json"
            benching.write_part(path, dict(part=part) | facts | dict(rows=rows))
        done.append(part)


def main(argv: Sequence[str] | None = None) -> int:
    a = read_options(argv)
    if a.malloc == "glibc":  # joining would keep freed memory
        joined = contextlib.nullcontext(World(0, 1, torch.device("cpu")))
    else:
        joined = join_world(a.device, "use --device cpu")
    with joined as world, tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(a.threads)
        done: list[str] = []
        if a.deadline_s is not None:
            benching.stop_at_once(Path(folder), [], done, a.deadline_s)
        run_parts(a, world, done)
    return 0


if __name__ == "__main__":
    launch(main)
