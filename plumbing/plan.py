"""plan.py -- what a run would do, shown before it does it (--dry_run).

Promises: a plan makes every check of the run but for the GPU's, needs no GPU, and exits with 2 when
the run would be refused.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from plumbing.device import estimate_mib
from plumbing.knobs import UserError, knobs_json
from plumbing.results import check_results
from plumbing.run_ids import check_run_id, lock_run
from plumbing.world import World

# On the meta device autocast does nothing.
HOW_COUNTED = "counted in fp32 and without a compiler"


def planned_world() -> World:
    """Rank 0 of as many ranks as WORLD_SIZE says, on a CPU and without a process group."""
    return World(0, int(os.environ.get("WORLD_SIZE", 1)), torch.device("cpu"))


class WhenShown:
    """A fact of a plan that takes a while to find out: `find` is called when the text is asked for.
    A study plans many runs, and shows few facts of each.
    """

    def __init__(self, find: Callable[[], str]):
        self.find = find

    def __str__(self) -> str:
        return self.find()


def plan_facts(
    cfg: object, world: World, model: nn.Module, run_step: Callable[[nn.Module, int], None]
) -> dict[str, object]:
    """What can be said of a model on the meta device: its size, and the memory of a rank, counted
    by one run_step(model, 1) of it.
    """
    num_params = sum(p.numel() for p in model.parameters())
    rows = cfg.device_batch_size or 1

    def memory() -> str:
        with torch.device("meta"):
            most = estimate_mib(num_params, rows, partial(run_step, model))
        return f"at most about {most:,} MiB per rank with {rows} of them at a time, {HOW_COUNTED}"

    return {
        "parameters": f"{num_params:,}",
        "batch": f"{cfg.batch_size} sequences on {world.size} rank(s)",
        "memory": WhenShown(memory),
    }


def flops_per_token(model: nn.Module, has_attention: bool = True) -> int:
    """FLOPs of forward and backward, for MFU: 6 per parameter, and with attention its products,
    which are causal.
    """
    cfg = model.cfg
    flops = 6 * sum(p.numel() for p in model.parameters())
    if has_attention:
        flops += 6 * cfg.n_layer * cfg.sequence_length * cfg.n_embd
    return flops


def count_flops(run_step: Callable[[], None]) -> int:
    """FLOPs of the matrix products of run_step(), as torch counts them: of attention all that is
    computed, the masked part included.
    """
    with FlopCounterMode(display=False) as counter:
        run_step()
    return counter.get_total_flops()


def check_records(cfg: object, columns: Sequence[str]) -> None:
    """Raise UserError where the run's name or files would be refused; makes none of them."""
    results = Path(cfg.results_file)
    if results.exists():
        check_results(results, columns, planned_world())
    if cfg.run_id:
        folder = Path(cfg.logs_folder) / cfg.run_id
        check_run_id(folder, cfg.run_id, "RUN_ID")
        if (folder / ".lock").exists():
            lock_run(folder, cfg.run_id, "RUN_ID").release()
    for folder in (Path(cfg.logs_folder), results.parent):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise UserError(f"{folder}: cannot be written; set LOGS_FOLDER or RESULTS_FILE")


def show_plan(
    cfg: object, plan: Callable[..., Mapping[str, object]], columns: Sequence[str]
) -> int:
    """Print the knobs and what plan(cfg, world) returns; the exit code of a dry run. `columns` are
    those of the trainer's results rows.
    """
    lines, code = [knobs_json(cfg)], 0
    if cfg.device == "cuda" and not torch.cuda.is_available():
        lines.append("device:          cuda, which this machine does not have; the run needs one")
    try:
        check_records(cfg, columns)
        lines += [f"{name + ':':16} {x}" for name, x in plan(cfg, planned_world()).items()]
    except UserError as error:
        lines.append(f"problem:         {error}")
        code = 2
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader has left, as `head` does when it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
    return code
