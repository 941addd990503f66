"""Where the tests of train_gpu.py find it."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
torch.set_num_threads(1)  # threads that wait for each other on a busy machine are slower than one
