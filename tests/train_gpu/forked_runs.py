"""forked_runs.py -- runs of train_gpu.py one after another, in processes forked from this one, so
that all of them import torch once.

    python forked_runs.py RUNS.json    a list of [ranks, fault, flags]; prints their exit codes

A fault is one of scripts/faults/inject.py, such as kill:7; none is "".
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "scripts")]

from faults import starts  # noqa: E402

import train_gpu  # noqa: E402, F401  (what the forked processes run)

if __name__ == "__main__":
    path = Path(sys.argv[1])
    output = path.with_suffix(".txt")
    codes = []
    for ranks, fault, flags in json.loads(path.read_text()):
        codes.append(starts.by_fork("train_gpu", ranks, flags, fault, output))
    print(json.dumps(codes))
