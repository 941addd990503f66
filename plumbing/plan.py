"""plan.py -- what a run would do, shown before it does it (--dry_run).

Promises: a plan makes every check of the run but for the GPU's, needs no GPU, and exits with 2 when
the run would be refused.
"""

import os
from collections.abc import Callable, Mapping

import torch

from plumbing.knobs import UserError, knobs_json
from plumbing.world import World


def planned_world() -> World:
    """Rank 0 of as many ranks as WORLD_SIZE says, on a CPU and without a process group."""
    return World(0, int(os.environ.get("WORLD_SIZE", 1)), torch.device("cpu"))


def show_plan(cfg: object, plan: Callable[..., Mapping[str, object]]) -> int:
    """Print the knobs and what plan(cfg, world) returns; the exit code of a dry run."""
    print(knobs_json(cfg))
    if cfg.device == "cuda" and not torch.cuda.is_available():
        print("device:          cuda, which this machine does not have; the run needs one")
    try:
        for name, value in plan(cfg, planned_world()).items():
            print(f"{name + ':':16} {value}")
    except UserError as error:
        print(f"problem:         {error}")
        return 2
    return 0
