"""plumbing -- what keeps a run alive and accounted for, and cannot change a loss.

    knobs, config, family     one dataclass -> environment, flags, presets, YAML, --help
    world, device, plan       process group, signals, collectives; what the device can do; --dry_run
    data, batches             token shards, rows of tokens, prefetching
    texts, splits, hub        text files, tokenizers, the embedded corpus, downloads
    session                   one run from start to end: what a training loop talks to
    exchange, clock, records, results, trackers, checkpoints      what a session is made of

A line that could move a loss curve belongs into a trainer. Importing this package does nothing.
"""

from plumbing.batches import padded_batches, read_rows
from plumbing.checkpoints import (
    check_disk,
    list_checkpoints,
    load_checkpoint,
    read_checkpoint,
    read_weights,
    save_checkpoint,
    save_weights,
    write_whole,
)
from plumbing.data import Prefetch, TokenShards, check_disjoint, read_bytes, read_shard, write_shard
from plumbing.device import check_compiler, choose_precision, choose_rows, estimate_mib
from plumbing.exchange import StepStats
from plumbing.knobs import ROOT, UserError, describe, knob, knobs_json, read_knobs
from plumbing.plan import planned_world, show_plan
from plumbing.records import new_run_id
from plumbing.results import append_result, check_results
from plumbing.run_knobs import RUN_KNOBS, RunKnobs
from plumbing.session import Session
from plumbing.texts import embedded_corpus
from plumbing.world import World, flat_gradients, join_world, launch

__all__ = [
    "ROOT",
    "RUN_KNOBS",
    "Prefetch",
    "RunKnobs",
    "Session",
    "StepStats",
    "TokenShards",
    "UserError",
    "World",
    "append_result",
    "check_compiler",
    "check_disjoint",
    "check_disk",
    "check_results",
    "choose_precision",
    "choose_rows",
    "describe",
    "embedded_corpus",
    "estimate_mib",
    "flat_gradients",
    "join_world",
    "knob",
    "knobs_json",
    "launch",
    "list_checkpoints",
    "load_checkpoint",
    "new_run_id",
    "padded_batches",
    "planned_world",
    "read_bytes",
    "read_checkpoint",
    "read_knobs",
    "read_rows",
    "read_shard",
    "read_weights",
    "save_checkpoint",
    "save_weights",
    "show_plan",
    "write_shard",
    "write_whole",
]
