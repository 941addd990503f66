"""one_block.py -- a block of train_gpu.py on its own, whose operations or kernels are counted."""

import argparse

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import torch
from torch import nn

import train_gpu
from plumbing import read_knobs


def block_flags(doc: str) -> argparse.ArgumentParser:
    """The flags that both counting programs have; doc is the program's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    presets = tuple(train_gpu.PRESETS)
    parser.add_argument("--preset", choices=presets, default="100m", help="of train_gpu.py (100m)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(bf16)")
    return parser


def block_knobs(flags: argparse.Namespace, mixer: str) -> train_gpu.Knobs:
    """Without dropout, since masks are drawn outside of the block."""
    given = dict(preset=flags.preset, mixer=mixer, precision=flags.precision, dropout=0.0)
    words = [f"--{name}={value}" for name, value in given.items()]
    return read_knobs(train_gpu.Knobs, train_gpu.PRESETS, words, {})


def make_block(cfg: train_gpu.Knobs, B: int, T: int) -> tuple[nn.Module, tuple]:
    """A block, and what it is called with for B rows of T tokens."""
    block = train_gpu.Model(cfg).blocks[0]
    x_BTC = torch.empty(B, T, cfg.n_embd, requires_grad=True)
    zero = torch.zeros((), dtype=torch.long)
    angles = train_gpu.angles_at(cfg, zero, T, torch.float32)
    seed_B = torch.zeros(B, dtype=torch.long)
    return block, (x_BTC, block.mixer.empty_state(B), angles, seed_B, (None, None))
