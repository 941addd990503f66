"""Where the tests of scripts/hamt find the programs, and what the tests of train_gpu.py share."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("scripts/hamt", "scripts", "tests/train_gpu", "")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]
torch.set_num_threads(1)
