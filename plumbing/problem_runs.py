"""problem_runs.py -- a run that trains on problems: what its session is told, its plan and columns.

Promises: the head of the log and --dry_run say the same of model and data. A results row has the
columns that it has always had, in their order.
"""

from torch import nn

from plumbing.epochs import intervals
from plumbing.plan import flops_per_token
from plumbing.problem_batches import ProblemBatches
from plumbing.problem_knobs import ProblemKnobs
from plumbing.problem_records import PROBLEM_METRICS, gpu_facts
from plumbing.world import World

RESULTS = (
    "run_id date git_commit seed d_model num_layers num_heads d_ff answer_format train_path "
    "train_examples grammar operators operands_max depth_max optimizer learning_rate muon_lr "
    "batch_size sequence_length num_iterations final_val_loss best_val_loss exact_match "
    "eos_after_gold train_time_ms ms_per_step gpu_name n_gpus notes stage status "
    "steps_done n_params tokens_seen epochs peak_memory_mib torch world_size code_sha256 dirty"
).split()


def session_options(cfg: ProblemKnobs, data: ProblemBatches) -> dict[str, object]:
    """What a Session is told of a run on problems. Epochs decide when to validate and to save
    unless VAL_EVERY and SAVE_EVERY do."""
    val_every, save_every = intervals(cfg, data.epoch_steps, data.total_steps)
    return {
        "total_steps": data.total_steps,
        "tokens_per_step": data.step_tokens,
        "data": {"training": data.content},
        "columns": RESULTS,
        "steps_per_epoch": data.epoch_steps or None,
        "val_every": val_every,
        "save_every": save_every,
        "validate_at_start": False,
        "log_every": cfg.log_interval,
        "metrics": PROBLEM_METRICS,
        "named_by": "OUTPUT_DIR" if cfg.output_dir else "RUN_ID",
        "out_of_memory": "lower BATCH_SIZE",
    }


def facts_of(model: nn.Module, world: World, data: ProblemBatches) -> dict[str, object]:
    """What the head of the log says beside the knobs."""
    num_params = sum(p.numel() for p in model.parameters())
    return {
        "Configuration": model.cfg.config or "none",
        **gpu_facts(world, model.cfg.fp16),
        "Vocabulary size": model.embed.num_embeddings,
        "Model parameters": f"{num_params / 1e6:.2f}M",
        **data.facts,
    }


def plan_problems(model: nn.Module, world: World, data: ProblemBatches) -> dict[str, object]:
    """What --dry_run shows of a model, which may be on the meta device, and of its training."""
    tokens = data.step_tokens * data.total_steps
    return {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "training tokens": f"{tokens:,} in {data.total_steps} steps",
        "compute": f"{flops_per_token(model) * tokens:.3g} FLOPs",
        **facts_of(model, world, data),
    }
