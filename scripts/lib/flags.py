"""What spoils a comparison: mixed machines, programs or data, and schedules that do not fit."""

import math
from collections.abc import Mapping
from functools import lru_cache

from lib.cells import Cell, steps_of
from lib.program import listing
from lib.results import Row, canon
from lib.stages import Stage
from lib.stats import NAN


def epochs_of(row: Row, stage: Stage) -> float:
    """Passes over the training shards: the row's own, else from the stage's train_tokens; nan if
    neither says."""
    if row["epochs"] or not math.isfinite(stage.train_tokens):
        return row.number("epochs")
    tokens = steps_of(row) * row.number("batch_size") * row.number("sequence_length")
    return (row.number("tokens_seen") if row["tokens_seen"] else tokens) / stage.train_tokens


MIXED = {  # column: its flag, why it matters
    "gpu_name": ("gpu", "times do not compare"),
    "n_gpus": ("gpus", "times do not compare"),
    "torch": ("torch", "a difference may come from it"),
    "code_sha256": ("code", "a difference may come from it"),
}


FACTS = (*MIXED, "epochs", "pass", "schedule")


def facts_of(cell: Cell, stage: Stage) -> tuple[frozenset, ...]:
    """What should be the same in all rows of a comparison, and what should not be at all; of one
    cell. What a file does not say is not held against it. One set of values for each name of
    FACTS."""
    found: dict[str, set] = {name: set() for name in FACTS}
    for row in cell.rows:
        for column in MIXED:
            found[column].add(row[column][:40])
        if math.isfinite(epochs := epochs_of(row, stage)):
            found["epochs"].add(round(epochs, 2))
            found["pass"].add(steps_of(row) / epochs if epochs else NAN)
        warmup, warmdown = (
            (row.number(c) if row[c] else 0.0) for c in ("warmup_iters", "warmdown_iters")
        )
        if warmup + warmdown > row.number("num_iterations"):
            warm = f"warmup {canon(warmup)} + " if row["warmup_iters"] else ""
            found["schedule"].add(
                f"{warm}warmdown {canon(warmdown)} > {canon(row['num_iterations'])} iterations"
            )
    return tuple(frozenset(values - {""}) for values in found.values())


@lru_cache(maxsize=4096)  # most cells of a stage have the same facts
def problems_of(*facts: tuple[frozenset, ...]) -> Mapping[str, str]:
    """What is wrong with a cell alone, or with a cell and its baseline together: flag, sentence."""
    every = {
        name: sorted(frozenset().union(*values))
        for name, *values in zip(FACTS, *facts, strict=True)
    }
    found = {}
    for column, (flag, why) in MIXED.items():
        if len(values := every[column]) > 1:
            short = [v[:12] if column == "code_sha256" else v for v in values]
            found[flag] = f"mixed {column}, {why}: {listing(short)}"
    if passes := every["epochs"]:
        # runs of other lengths read the same data as far as they go, as long as none starts over
        same = passes[-1] <= 1 and every["pass"][-1] <= 1.05 * every["pass"][0]
        if len(passes) > 1 and not same:
            found["epochs"] = (
                f"mixed epochs, the data differ: {listing([f'{e:.2f}' for e in passes])}"
            )
        if passes[-1] > 1:
            found["repeats"] = f"training data read more than once: {passes[-1]:.2f} epochs"
    if every["schedule"]:
        found["schedule"] = (
            f"schedule does not fit: {listing(every['schedule'], '; ')}; the learning rate never "
            "stayed at its peak"
        )
    return found
