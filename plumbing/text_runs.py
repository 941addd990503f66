"""text_runs.py -- a run that trains on one text, in epochs: its data, its plan, its columns.

Promises: a text that is not there, too short or of another vocabulary is refused before training. A
plan fetches nothing, and a text that a run would fetch is no reason not to start one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from plumbing.device import check_machine
from plumbing.plan import flops_per_token, plan_facts
from plumbing.splits import NotFetched, Split, open_splits
from plumbing.text_batches import TextBatches
from plumbing.text_knobs import TextRunKnobs
from plumbing.text_scores import probe_backward
from plumbing.world import World


def open_text(
    cfg: TextRunKnobs, world: World, download: bool = True
) -> tuple[TextBatches, dict[str, Split]]:
    """Training batches and the splits. Raises UserError for all that is wrong with them."""
    splits = open_splits(cfg.data, cfg.encoding, Path(cfg.data_folder), download)
    for split in splits.values():
        split.shards.check_ids(cfg.vocabulary, world)
    return TextBatches(splits["train"].shards, cfg, world), splits


def session_options(
    cfg: TextRunKnobs, batches: TextBatches, splits: dict[str, Split], metrics: Sequence[str]
) -> dict[str, object]:
    """What a Session is told of a text; `metrics` are columns of the trainer's own. Epochs decide
    when to validate unless VAL_EVERY does, and with SAVE_EPOCHS a checkpoint is also due at the end
    of each.
    """
    epoch_steps = batches.epoch_steps
    return {
        "total_steps": batches.total_steps,
        "tokens_per_step": batches.batch_tokens,
        "data": {part: split.shards.content for part, split in splits.items()},
        "steps_per_epoch": epoch_steps,
        "val_every": epoch_steps if cfg.val_every is None else cfg.val_every,
        "save_every": [cfg.save_every, epoch_steps if cfg.save_epochs else 0],
        "metrics": [*metrics, "val_bits_per_byte"],
        "out_of_memory": "lower DEVICE_BATCH_SIZE or set GRADIENT_CHECKPOINTING=1",
    }


def results_columns(model: str) -> list[str]:
    """The columns of a results row, those of the model among them. text_scores.py fills in the
    perplexities, the bits and the losses of the test split and of the streams.
    """
    text = "dataset tokenizer learning_rate batch_size device_batch_size sequence_length"
    scores = (
        "num_iterations final_val_loss best_val_loss val_ppl val_bits_per_byte test_loss test_ppl "
        "test_word_ppl test_bits_per_byte val_stream_loss test_stream_loss"
    )
    measured = (
        "train_time_ms ms_per_step gpu_name n_gpus notes stage status steps_done warmup_iters "
        "n_params tokens_seen epochs tokens_per_s peak_memory_mib torch world_size code_sha256 "
        "dirty"
    )
    return f"run_id date git_commit seed {model} {text} {scores} {measured}".split()


def plan_text(
    cfg: TextRunKnobs,
    world: World,
    make_model: Callable[[TextRunKnobs], nn.Module],
    has_attention: bool,
) -> dict[str, object]:
    """What --dry_run shows of a model, which it makes without memory, of a text and of training on
    it. Raises UserError for a text, a compiler or a precision that the run would refuse.
    """
    check_machine(cfg, world.device)
    with torch.device("meta"):
        model = make_model(cfg)
        facts = plan_facts(cfg, world, model, probe_backward)
    step_tokens = cfg.batch_size * cfg.sequence_length
    step_flops = flops_per_token(model, has_attention) * step_tokens
    try:
        batches, _ = open_text(cfg, world, download=False)
    except NotFetched as error:
        return facts | {"compute": f"{step_flops:.3g} FLOPs a step", "data": error}
    flops = step_flops * batches.total_steps
    compute = f"{flops:.3g} FLOPs in {batches.total_steps} steps"
    return facts | {"compute": compute, "data": batches.summary}
