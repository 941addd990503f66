"""compare_ppmd.py -- PPMd beside a model of train_scaled.py, on the same training and held-out
text.

    python scripts/scaled/compare_ppmd.py --data ../shared/data/turkish --train_bytes 2460000
    python scripts/scaled/compare_ppmd.py --data FOLDER --runs ID,ID,ID      models of three seeds

PPMd reads TRAIN_BYTES of the training text, then the held-out text; what the second adds to the
compressed size is its bits per byte, so that it has learned from as much text as the model. It
goes on learning from the held-out text, as the model's memories do. A model reads the held-out
text as train_scaled.py validates it, and of several the mean and the standard deviation are shown.
Prints   bits per byte of PPMd with contexts of 3 to 16 bytes, and of the runs
Raises   UserError: no text, no such run; without the package pyppmd a line says how to get it
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import byte_models as lib
import torch
from byte_models import PATCH, UserError

import train_scaled
from plumbing import ROOT, TokenShards, World, launch
from plumbing.byte_batches import ScoredBytes
from plumbing.splits import open_byte_files

ORDERS = (3, 4, 5, 8, 12, 16)  # bytes of PPMd's longest context


def ppmd_bits(seen: bytes, text: bytes, order: int) -> float:
    """Bits per byte of `text` behind `seen`."""
    import pyppmd  # optional

    size = lambda data: len(pyppmd.compress(data, max_order=order, mem_size=1 << 30))
    return 8 * (size(seen + text) - size(seen)) / len(text)


def model_bits(path: Path, val: TokenShards, device: torch.device) -> float:
    """Bits per byte of the whole held-out text, as the run itself validates."""
    model = lib.load(path, device)
    rows = model.cfg.device_batch_size or 1
    scored = ScoredBytes(val, PATCH, model.cfg.val_bytes)
    loss = train_scaled.evaluate(model, scored, rows, model.cfg, World(0, 1, device))
    return loss / math.log(2)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--data", default="embedded", metavar="PATH", help="as DATA of train_scaled.py")
    p.add_argument("--train_bytes", type=int, metavar="N", help="PPMd's training text (all of it)")
    p.add_argument("--val_bytes", type=int, metavar="N", help="held-out text (all of it)")
    p.add_argument("--runs", default="", metavar="ID,..", help="runs of train_scaled.py")
    lib.add_logs_option(p)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    a = p.parse_args(argv)
    device = lib.check_device(a.device)
    train, val, _ = open_byte_files(a.data, ROOT / "data", PATCH)
    num_seen = min(a.train_bytes or train.total, train.total)
    num_held_out = min(a.val_bytes or val.total, val.total)
    if min(num_seen, num_held_out) < 1:
        raise UserError("--train_bytes and --val_bytes: expected 1 or more")
    seen = bytes(train.read(0, num_seen).astype("uint8"))
    held_out = bytes(val.read(0, num_held_out).astype("uint8"))
    print(f"{num_seen:,} bytes of training text, {num_held_out:,} held out")
    try:
        for order in ORDERS:
            bits = ppmd_bits(seen, held_out, order)
            print(f"PPMd, contexts of {order} bytes: {bits:.4f} bits per byte", flush=True)
    except ImportError:
        print("PPMd: not here; pip install pyppmd to have it")
    found = []
    for run in filter(None, a.runs.split(",")):
        path = lib.weights_path(a.logs_folder, run, None)
        found.append(model_bits(path, val, device))
        print(f"{run}: {found[-1]:.4f} bits per byte", flush=True)
    if len(found) > 1:
        mean, sd = statistics.mean(found), statistics.stdev(found)
        print(f"mean of {len(found)} runs: {mean:.4f} (sd {sd:.4f}) bits per byte")


if __name__ == "__main__":
    launch(main)
