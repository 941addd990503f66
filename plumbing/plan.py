"""plan.py -- what a run would do, shown before it does it (--dry_run).

Promises: a plan makes every check of the run but for the GPU's, needs no GPU, and exits with 2 when
the run would be refused.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from plumbing.device import estimate_mib
from plumbing.knobs import UserError, knobs_json
from plumbing.world import World


def planned_world() -> World:
    """Rank 0 of as many ranks as WORLD_SIZE says, on a CPU and without a process group."""
    return World(0, int(os.environ.get("WORLD_SIZE", 1)), torch.device("cpu"))


def plan_facts(
    cfg: object, world: World, model: nn.Module, run_step: Callable[[nn.Module, int], None]
) -> dict[str, object]:
    """What can be said of a model on the meta device: its size, and the memory of a rank, counted
    by one run_step(model, 1) of it.
    """
    num_params = sum(p.numel() for p in model.parameters())
    rows = cfg.device_batch_size or 1
    memory = estimate_mib(num_params, rows, partial(run_step, model))
    return {
        "parameters": f"{num_params:,}",
        "batch": f"{cfg.batch_size} sequences on {world.size} rank(s)",
        "memory": f"at most about {memory:,} MiB per rank with {rows} of them at a time",
    }


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
