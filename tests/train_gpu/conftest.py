"""Where the tests of train_gpu.py find it."""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
torch.set_num_threads(1)  # threads that wait for each other on a busy machine are slower than one
