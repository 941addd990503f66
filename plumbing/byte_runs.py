"""byte_runs.py -- a run that trains on bytes: what its session is told, its plan and its columns.

Promises: a plan fetches nothing; what it says of disk and data is what the run checks.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from plumbing.byte_batches import ByteBatches, ScoredBytes, text_facts
from plumbing.byte_knobs import ByteRunKnobs
from plumbing.byte_records import BYTE_METRICS
from plumbing.byte_scores import flops_per_byte, probe_backward
from plumbing.device import check_machine, compile_parts
from plumbing.exports import run_bytes
from plumbing.knobs import ROOT
from plumbing.plan import WhenShown, plan_facts
from plumbing.row_states import row_states
from plumbing.session import Session
from plumbing.splits import open_byte_files
from plumbing.world import World


def results_columns(model: str) -> list[str]:
    """The columns of a results row, those of the model among them. bpc is bits per byte."""
    text = "carry_state data learning_rate batch_size device_batch_size sequence_length"
    measured = (
        "num_iterations final_val_loss best_val_loss final_val_bpc val_bits_per_char "
        "train_time_ms ms_per_step gpu_name n_gpus notes stage status steps_done n_params "
        "tokens_seen epochs peak_memory_mib torch world_size code_sha256 dirty"
    )
    return f"run_id date git_commit seed {model} {text} {measured}".split()


def open_bytes(cfg: ByteRunKnobs, world: World, ahead: int) -> tuple[ByteBatches, ScoredBytes]:
    """Training batches, and what a validation scores; targets stand `ahead` bytes behind inputs.
    Raises UserError for all that is wrong with the text.
    """
    text, val, _ = open_byte_files(cfg.data, ROOT / "data", ahead)
    return ByteBatches(text, cfg, world, ahead), ScoredBytes(val, ahead, cfg.val_bytes)


def session_options(
    cfg: ByteRunKnobs, batches: ByteBatches, val: ScoredBytes, metrics: Sequence[str]
) -> dict[str, object]:
    """What a Session is told of a run on bytes; `metrics` are columns of the trainer's own."""
    step_bytes = cfg.batch_size * cfg.sequence_length
    return {
        "total_steps": cfg.num_iterations,
        "tokens_per_step": step_bytes,
        "data": {"training": batches.text.content, "validation": val.text.content},
        "steps_per_epoch": batches.text.total / step_bytes,
        "validate_at_start": False,
        "log_every": cfg.log_every,
        "metrics": [*BYTE_METRICS, *metrics],
        "unit": "bytes",
    }


def plan_bytes(
    cfg: ByteRunKnobs, world: World, make_model: Callable[[ByteRunKnobs], nn.Module], ahead: int
) -> dict[str, object]:
    """What --dry_run and the log show of a model, its disk, its compute and its text. Raises
    UserError for a text, a compiler or a precision that the run would refuse.
    """
    check_machine(cfg, world.device)
    with torch.device("meta"):
        model = make_model(cfg)
        facts = plan_facts(cfg, world, model, probe_backward)
        needed_mib = run_bytes(model, row_states(model, world), cfg.keep) / 2**20
    trained_bytes = cfg.batch_size * cfg.sequence_length * cfg.num_iterations
    facts["compute"] = WhenShown(
        lambda: f"{flops_per_byte(make_model, cfg) * trained_bytes:.3g} FLOPs"
    )
    facts["disk"] = f"up to {needed_mib:,.0f} MiB at KEEP={cfg.keep}"
    return facts | text_facts(cfg, world, ahead)


def describe_run(session: Session, model: nn.Module, ahead: int) -> None:
    """Write the head of the log."""
    cfg, make_model = session.cfg, type(model)
    facts = plan_bytes(cfg, session.world, make_model, ahead)
    facts["precision"] = f"{model.dtype}; the memories without autocast"
    session.describe(model, flops_per_byte(make_model, cfg), facts)


def parts_to_compile(model: nn.Module) -> list[nn.Module | None]:
    """What the compiler gets, each by itself; None is a part that the model does not have."""
    return [*model.blocks, model.decoder, model.thinking, model.byte_memory]


def compile_model(session: Session, model: nn.Module, rows: int) -> None:
    """Compile the model's parts, and try them. A compiler that fails does not end the run."""
    run_step = partial(probe_backward, model, rows)
    problem = compile_parts(parts_to_compile(model), run_step, session.world)
    if problem:
        session.say(f"compile: failed, training goes on without it ({problem})")
