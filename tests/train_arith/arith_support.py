"""arith_support.py -- what several tests of the arithmetic study need: models, records and runs."""

import csv
import importlib
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch

import train_arith
from arithmetic import DataSets, Language, draw, encode, exprs_of
from plumbing import World, list_checkpoints, read_checkpoint
from plumbing.problem_batches import ProblemBatches
from plumbing.problem_config import read_problem_knobs
from train_arith import PRESETS, CompactTransformer, Knobs

ROOT = Path(__file__).resolve().parents[2]
torch.set_num_threads(1)  # two threads that wait for each other are slower than one
ONE = World(0, 1, torch.device("cpu"))
TINY = dict(n_embd=16, n_layer=2, n_head=2, d_ff=24, batch_size=16, num_epochs=4, eval_interval=1)
TINY |= dict(warmup_iters=3, save_interval=2, lr=0.01, device="cpu", log_interval=1)
EXPRS = ["1+2", "(12-34)*5", "9*(8+7)", "((6-50))", "77-8+9*10", "3*3*3", "(4+4)*(11-2)", "60-1"]


def model_of(seed: int = 1, kind: type = CompactTransformer, **knobs) -> CompactTransformer:
    small = dict(n_embd=16, n_layer=3, n_head=2, d_ff=24, dropout=0.0)
    model = kind(Knobs(**(small | knobs)))
    model.init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():  # larger than the init, so that attention and norms matter
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
    return model.eval()


def settings(*flags: str | Path, env: dict[str, str] | None = None) -> Knobs:
    """The knobs as train_arith.py reads them."""
    return read_problem_knobs(Knobs, PRESETS, train_arith.__doc__, list(map(str, flags)), env or {})


def batches_of(cfg: Knobs, world: World = ONE) -> ProblemBatches:
    return ProblemBatches(DataSets(cfg), cfg, world)


def ids_of(exprs=tuple(EXPRS)) -> torch.Tensor:
    rows = [torch.tensor(encode(f"{e} = 7")) for e in exprs]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def make(program: str, folder: Path, *flags: str) -> str:
    """Run a generator in this process; what it prints."""
    argv, sys.argv = sys.argv, [program, "--output-dir", str(folder), *flags]
    try:
        with redirect_stdout(StringIO()) as out:
            assert importlib.import_module(program.removesuffix(".py")).main() == 0
    finally:
        sys.argv = argv
    return out.getvalue()


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_records(folder: Path) -> dict[str, str]:
    rng, paths = np.random.default_rng(1), {}
    for name, count in (("train", 70), ("val", 12), ("test", 9)):
        problems, _ = draw(Language(operators="+-"), rng, count)
        rows = zip(exprs_of(problems, Language()), problems.values_N.tolist(), strict=True)
        lines = [json.dumps(dict(expr=e, result=v)) + "\n" for e, v in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        paths[f"{name}_path"] = str(folder / f"{name}.jsonl")
    return paths


def flags(folder: Path, **knobs) -> list[str]:
    files = write_records(folder)
    files |= dict(results_file=str(folder / "results.csv"), logs_folder=str(folder / "logs"))
    return [f"--{name}={value}" for name, value in (TINY | files | knobs).items()]


def run_here(monkeypatch, folder: Path, *extra: str, **knobs) -> tuple[int, str]:
    """train_arith.main() in this process: exit code and stdout."""
    monkeypatch.setattr(sys, "argv", ["train_arith.py", *flags(folder, **knobs), *extra])
    with redirect_stdout(StringIO()) as out:
        code = train_arith.main()
    return code, out.getvalue()


def command(nproc: int) -> list[str]:
    if nproc == 1:
        return [sys.executable, str(ROOT / "train_arith.py")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={nproc}", str(ROOT / "train_arith.py")]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | extra


def run(nproc: int, folder: Path, **knobs) -> subprocess.CompletedProcess:
    """A small run in processes of its own."""
    line = [*command(nproc), *flags(folder, **knobs)]
    options = dict(cwd=folder, env=environment(), capture_output=True, text=True, timeout=200)
    return subprocess.run(line, **options)


def curve(folder: Path, run_id: str) -> list[tuple[str, ...]]:
    """train_loss, val_loss, lr and exact_match by step; of a step done twice, the later row."""
    with open(folder / "logs" / run_id / "metrics.csv") as f:
        found = {int(row["step"]): row for row in csv.DictReader(f)}
    columns = ("train_loss", "val_loss", "lr", "exact_match")
    return [tuple(row[c] for c in columns) for _, row in sorted(found.items())]


def newest_state(folder: Path, run_id: str) -> dict:
    return read_checkpoint(list_checkpoints(folder / "logs" / run_id)[-1][1])


def same_tensors(a, b) -> bool:
    """Whether two nested states hold bitwise the same tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same_tensors(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)
