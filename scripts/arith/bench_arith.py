"""bench_arith.py -- how long train_arith.py takes: a training step, the drawing of examples, and a
greedy evaluation.

    python scripts/arith/bench_arith.py                                    this CPU, one thread
    python scripts/arith/bench_arith.py --parts step --steps 200
    python scripts/arith/bench_arith.py --device cuda --out experiments/gpu --deadline_s 80

Parts    step  a step of 8 examples at 0.66M (configs/honest.yaml) and 10.65M parameters
               (configs/honest_10m.yaml), as the trainer itself takes it: launched one operation at
               a time, on a GPU also as CUDA graphs, and with compiled blocks
         data  examples of configs/honest.yaml drawn, written down and padded, on one core
         eval  1,000 held-out expressions answered by an untrained model of both sizes: scored in
               one pass, as the trainer validates, and written token by token
Units    process CPU time on a CPU, and for `data`; seconds by the wall clock on a GPU
Writes   with --out: arith_PART_DEVICE.json, which grows as its rows are measured; what the deadline
         left out is listed in it
Raises   UserError: no such part, no GPU
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import lib_heads as heads
import numpy as np
import torch
from lib_heads import Subject
from lib_hooks import hooked

import arithmetic
import train_arith
from plumbing import ROOT, UserError, World, join_world, write_whole
from plumbing.problem_batches import ProblemBatches
from plumbing.problem_config import read_problem_knobs
from plumbing.problems import inputs_and_labels

CONFIGS = {"0.66M": "configs/honest.yaml", "10.65M": "configs/honest_10m.yaml"}
MODES = {"eager": ["--no_cuda_graph"], "CUDA graph": [], "compiled": ["--compile"]}
FRESH = ["--set=test_path=", "--val_examples=16", "--val_every=0", "--save_every=0"]
Row = Callable[[], Mapping[str, float]]  # measures one row of a part


def step_row(config: str, flags: Sequence[str], a: argparse.Namespace) -> dict[str, float]:
    """Run the trainer; the mean time of a step behind the warm-up. The clock is read where every
    step clips its gradients. On a GPU the host is at most two steps ahead there."""
    clock = time.perf_counter if a.device == "cuda" else time.process_time
    times: list[float] = []
    clip_gradients = train_arith.clip_gradients

    def timed(*arguments: object) -> None:
        times.append(clock())
        clip_gradients(*arguments)

    before = sys.argv
    train_arith.clip_gradients = timed
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            sys.argv = ["train_arith.py", f"--config={ROOT / config}", *FRESH, *flags]
            sys.argv += [f"--output-dir={folder}/run", f"--results_file={folder}/results.csv"]
            sys.argv += [f"--num_iterations={a.warmup + a.steps}", f"--device={a.device}"]
            sys.argv += [f"--batch_size={a.batch_size}"]
            train_arith.main()
    finally:
        train_arith.clip_gradients = clip_gradients
        sys.argv = before
    spent_s = times[-1] - times[a.warmup - 1]
    return {"ms_per_step": 1000 * spent_s / a.steps, "steps": a.steps}


def part_step(a: argparse.Namespace, world: World) -> Iterator[tuple[str, Row]]:
    for mode, flags in MODES.items():
        if mode == "CUDA graph" and a.device == "cpu":
            continue
        for size, config in CONFIGS.items():
            yield f"{size} {mode}", lambda c=config, f=flags: step_row(c, f, a)


def read_knobs(config: str) -> train_arith.Knobs:
    flags = [f"--config={ROOT / config}", *FRESH]
    return read_problem_knobs(train_arith.Knobs, train_arith.PRESETS, "", flags, {})


def data_row(a: argparse.Namespace) -> dict[str, float]:
    """All operand counts are drawn, as at the end of the curriculum."""
    cfg = read_knobs(CONFIGS["0.66M"])
    data = ProblemBatches(arithmetic.DataSets(cfg), cfg, World(0, 1, torch.device("cpu")))
    switches = range(cfg.operands_max - cfg.operands_min)
    steps = max(1, a.examples // cfg.batch_size)
    started = time.process_time()
    for step in range(steps):
        problems = data.problems(step + len(switches), switches)
        inputs_and_labels(problems, cfg.answer_only_loss, cfg.batch_size)
    spent_s = time.process_time() - started
    return {"examples_per_s": steps * cfg.batch_size / spent_s, "examples": steps * cfg.batch_size}


def part_data(a: argparse.Namespace, world: World) -> Iterator[tuple[str, Row]]:
    yield "drawn on one core", lambda: data_row(a)


def eval_row(config: str, a: argparse.Namespace, world: World) -> dict[str, float]:
    """Both ways of one evaluation: they agree about what is right."""
    cfg = read_knobs(config)
    language = heads.language_of(cfg, arithmetic.DataSets(cfg).language.digits)
    problems = arithmetic.draw_split(language, np.random.default_rng(0), a.items, "test")
    model = hooked(heads.untrained(cfg, 1, world.device))
    subject = Subject("untrained", Path(), model.eval(), cfg, language, world)
    ways = {
        "scored": lambda: train_arith.score(model, problems, cfg, world),
        "written": lambda: heads.greedy_exact(subject, problems),
    }
    found: dict[str, float] = {"items": a.items}
    clock = time.perf_counter if a.device == "cuda" else time.process_time
    for way, run in ways.items():
        if a.device == "cuda":
            run()  # the first call loads kernels
        world.synchronize()
        started = clock()
        run()
        world.synchronize()
        found[f"{way}_s"] = clock() - started
    return found


def part_eval(a: argparse.Namespace, world: World) -> Iterator[tuple[str, Row]]:
    for size, config in CONFIGS.items():
        yield size, lambda c=config: eval_row(c, a, world)


PARTS = {"step": part_step, "data": part_data, "eval": part_eval}


def facts_of(world: World) -> dict[str, object]:
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}",
        "device": world.device_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "command": sys.argv,
    }


def run_part(part: str, a: argparse.Namespace, world: World, facts: dict, stop_at: float) -> None:
    content = {"part": part, **facts, "rows": [], "left_out": []}
    for name, measure in PARTS[part](a, world):
        if time.monotonic() > stop_at:
            content["left_out"].append(name)
            print(f"{part}: {name}: left out, the deadline is over", flush=True)
        else:
            row = {"name": name, **measure()}
            content["rows"].append(row)
            figures = "; ".join(f"{k} {v:,.4g}" for k, v in row.items() if k != "name")
            print(f"{part}: {name}: {figures}", flush=True)
        if a.out:
            path = a.out / f"arith_{part}_{a.device}.json"
            write_whole(path, f"{json.dumps(content, indent=1)}\n".encode())


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    number = dict(type=int, metavar="N")
    p.add_argument("--parts", nargs="*", default=list(PARTS), metavar="PART", help="default: all")
    p.add_argument("--steps", default=100, help="timed steps of a run; default 100", **number)
    p.add_argument("--warmup", default=20, help="steps before them; default 20", **number)
    p.add_argument("--batch_size", default=8, help="examples of a step; default 8", **number)
    p.add_argument("--examples", default=131072, help="examples drawn; default 131072", **number)
    p.add_argument("--items", default=1000, help="expressions evaluated; default 1000", **number)
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of JSON files")
    p.add_argument(
        "--deadline_s", type=float, default=600, metavar="S", help="start nothing behind it; 600"
    )
    a = p.parse_args(argv)
    for part in a.parts:
        if part not in PARTS:
            raise UserError(f"--parts {part}: no such part; there are {', '.join(PARTS)}")
    if min(a.steps, a.warmup, a.batch_size, a.examples, a.items) < 1:
        raise UserError("--steps, --warmup, --batch_size, --examples, --items: expected at least 1")
    return a


def main(argv: Sequence[str] | None = None) -> int:
    a = arguments(argv)
    stop_at = time.monotonic() + a.deadline_s
    if a.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; use --device cpu")
    with join_world(a.device) as world:
        facts = facts_of(world)
    alone = World(0, 1, world.device)
    if a.device == "cpu":
        torch.set_num_threads(1)
    print(f"{facts['device']}, torch {facts['torch']}", flush=True)
    for part in a.parts:
        run_part(part, a, alone, facts, stop_at)
    return 0


if __name__ == "__main__":
    heads.launch(main)
