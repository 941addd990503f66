"""compare_ppmd.py -- PPMd beside a model of train_scaled.py, on the same training and held-out
text.

    python scripts/scaled/compare_ppmd.py --data ../shared/data/turkish --train_bytes 2460000
    python scripts/scaled/compare_ppmd.py --data FOLDER --runs ID,ID,ID      models of three seeds
    python scripts/scaled/compare_ppmd.py --data FOLDER --held_out FOLDER/test.txt --runs ID

PPMd reads a training text, then the held-out text; what the second adds to the compressed size is
its bits per byte. It goes on learning from the held-out text, as the model's memories do. With RUNS
the training text is what the first run was trained on, one of its rows after another; else it is
the front of the text, TRAIN_BYTES long. A model is scored twice: as train_scaled.py validates it,
with empty memories, and as PPMd, where its memories read the same training text first. The held-out
text is the validation text, or another.
Prints   bits per byte of PPMd with contexts of 3 to 16 bytes, and of the runs; of several the mean
         and the standard deviation
Raises   UserError: no text, no such run; without the package pyppmd a line says how to get it
"""

import argparse
import math
import statistics
from collections.abc import Sequence

import byte_models as lib
import numpy as np
import torch
import torch.nn.functional as F
from byte_models import PATCH, ByteLM, UserError

from plumbing import ROOT, TokenShards, World, launch
from plumbing.byte_batches import ByteBatches, ScoredBytes
from plumbing.byte_scores import evaluate
from plumbing.data import read_bytes
from plumbing.splits import open_byte_files
from plumbing.texts import text_files

ORDERS = (3, 4, 5, 8, 12, 16)  # bytes of PPMd's longest context
WINDOW = 16384  # bytes that a model reads at once


def ppmd_bits(seen: bytes, text: bytes, order: int) -> float:
    """Bits per byte of `text` behind `seen`."""
    import pyppmd  # optional

    size = lambda data: len(pyppmd.compress(data, max_order=order, mem_size=1 << 30))
    return 8 * (size(seen + text) - size(seen)) / len(text)


def text_of_run(model: ByteLM, text: TokenShards) -> np.ndarray:
    """The bytes that a run was trained on: all of its first row, then all of the second, ..."""
    cfg = model.cfg
    batches = ByteBatches(text, cfg, World(0, 1, torch.device("cpu")), PATCH)
    steps = [batches.make(step)[0].numpy() for step in range(cfg.num_iterations)]
    return np.concatenate(steps, axis=1).flatten()


def validation_bits(
    model: ByteLM, text: TokenShards, num_bytes: int, device: torch.device
) -> float:
    """Bits per byte of the first `num_bytes` of the held-out text, as a run validates."""
    rows = model.cfg.device_batch_size or 1
    scored = ScoredBytes(text, PATCH, num_bytes)
    loss = evaluate(model, scored, rows, World(0, 1, device))
    return loss / math.log(2)


@torch.no_grad()
def bits_behind(model: ByteLM, seen: np.ndarray, text: np.ndarray, device: torch.device) -> float:
    """Bits per byte of `text`, one strip, where the memories have read `seen` before."""
    whole = torch.from_numpy(np.concatenate([seen, text]).astype(np.int64)).to(device)
    state, nll_sum = None, 0.0
    for at in range(0, len(whole) - PATCH, WINDOW):
        x, y = whole[at : at + WINDOW], whole[at + PATCH : at + PATCH + WINDOW]
        y = F.pad(y, (0, len(x) - len(y)), value=-1)
        missing = -len(x) % PATCH
        x, y = F.pad(x, (0, missing)), F.pad(y, (0, missing), value=-1)
        nll_BT, state = model(x[None], y[None], state)
        scored = nll_BT[0, max(len(seen) - PATCH - at, 0) :]
        nll_sum += scored.double().sum().item()
    return nll_sum / min(len(text), len(whole) - PATCH) / math.log(2)


def show_ppmd(seen: bytes, held_out: bytes) -> None:
    try:
        for order in ORDERS:
            bits = ppmd_bits(seen, held_out, order)
            print(f"PPMd, contexts of {order} bytes: {bits:.4f} bits per byte", flush=True)
    except ImportError:
        print("PPMd: not here; pip install pyppmd to have it")


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--data", default="embedded", metavar="PATH", help="as DATA of train_scaled.py")
    p.add_argument(
        "--train_bytes", type=int, metavar="N", help="training text (the run's; without, all of it)"
    )
    p.add_argument("--held_out", metavar="FILE", help="the held-out text (DATA's validation text)")
    p.add_argument("--val_bytes", type=int, metavar="N", help="bytes of it that count (all)")
    p.add_argument("--runs", default="", metavar="ID,..", help="runs of train_scaled.py")
    p.add_argument(
        "--mem_rows", type=int, metavar="N", help="rows of its tables behind the training text"
    )
    lib.add_logs_option(p)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    a = p.parse_args(argv)
    device = lib.check_device(a.device)
    train, val, _ = open_byte_files(a.data, ROOT / "data", PATCH)
    if a.held_out:
        val = TokenShards(text_files(a.held_out), open_file=read_bytes)
    num_held_out = min(a.val_bytes or val.total, val.total)
    num_seen = min(a.train_bytes or train.total, train.total)
    if min(num_seen, num_held_out) < 1:
        raise UserError("--train_bytes and --val_bytes: expected 1 or more")
    held_out = val.read(0, num_held_out).astype("uint8")
    seen = train.read(0, num_seen).astype("uint8")
    runs = [run for run in a.runs.split(",") if run]
    paths = [lib.weights_path(a.logs_folder, run, None) for run in runs]
    models = [lib.load(path, device) for path in paths]
    if models and not a.train_bytes:
        seen = text_of_run(models[0], train)
    print(f"{len(seen):,} bytes of training text, {num_held_out:,} held out")
    show_ppmd(seen.tobytes(), held_out.tobytes())
    found: dict[str, list[float]] = {"from empty memories": [], "behind the training text": []}
    for run, model in zip(runs, models, strict=True):
        scores = [validation_bits(model, val, num_held_out, device)]
        if a.mem_rows and model.byte_memory is not None:
            model.byte_memory.tables.rows = a.mem_rows
        scores.append(bits_behind(model, seen, held_out, device))
        for (how, so_far), bits in zip(found.items(), scores, strict=True):
            so_far.append(bits)
            print(f"{run}, {how}: {bits:.4f} bits per byte", flush=True)
    if len(runs) > 1:
        for how, bits in found.items():
            mean, sd = statistics.mean(bits), statistics.stdev(bits)
            print(f"mean of {len(runs)} runs, {how}: {mean:.4f} (sd {sd:.4f}) bits per byte")


if __name__ == "__main__":
    launch(main)
