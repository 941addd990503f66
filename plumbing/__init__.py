"""plumbing -- what keeps a run alive and accounted for, and cannot change a loss.

    knobs, run_knobs, text_knobs, config, family    a dataclass -> environment, flags, YAML, --help
    world, device, plan                   process group, signals, collectives; the device; --dry_run
    data, batches, text_batches           token shards, the tokens of a step, prefetching
    byte_knobs, byte_batches, byte_records    the same of bytes; what a byte model records
    byte_runs, byte_scores                a run on bytes; the loss of a byte model
    problems, problem_batches             problems with answers, and which of them a step trains on
    problem_knobs, problem_config, problem_records    knobs, YAML keys and records of such a run
    row_states, exports, rollback         carried states; weights files; back after a bad loss
    texts, splits, leaks, hub             text files, tokenizers, the embedded corpus, downloads
    text_runs, text_scores                a run on one text; its loss in windows and as one stream
    plain_text, csv_files                 text is UTF-8; the CSV files of runs, for tables too
    session, epochs                       one run from start to end: what a loop talks to
    exchange, clock, records, run_ids, results, trackers, checkpoints, forks    parts of a session

Of all this, only the batches decide something that a loss depends on: the order of the tokens, and
of problems the curriculum.
Importing the package does nothing. `from plumbing import Session` imports the module of that name
when it is asked for, so that programs which need knobs only do not wait for torch.
"""

import importlib

MODULES = {
    "batches": "TokenBatches padded_batches read_rows",
    "checkpoints": (
        "check_disk list_checkpoints load_checkpoint read_checkpoint read_weights save_checkpoint "
        "save_json save_weights write_whole"
    ),
    "data": "Prefetch TokenShards read_bytes read_shard write_shard",
    "device": "check_compiler choose_precision choose_rows estimate_mib settle_device",
    "exchange": "StepStats",
    "knobs": "ROOT UserError describe knob knobs_json read_knobs spellings",
    "leaks": "check_disjoint",
    "plan": "flops_per_token plan_facts planned_world show_plan",
    "run_ids": "new_run_id",
    "results": "append_result changed_knobs check_results",
    "run_knobs": "RUN_KNOBS RunKnobs",
    "session": "Session",
    "texts": "embedded_corpus",
    "world": "World flat_gradients join_world launch",
}
HOMES = {name: module for module, names in MODULES.items() for name in names.split()}
__all__ = sorted(HOMES)


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'plumbing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"plumbing.{HOMES[name]}"), name)
