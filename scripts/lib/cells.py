"""Cells: the rows of a stage by configuration, and which cell is whose baseline.

A cell is one configuration, run with one or more seeds.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from lib.results import HEADER, Row, canon
from lib.stages import USUAL, Stage
from lib.stats import NAN, mean

KEYS = (
    "attn_gate gate_pos gate_act learning_rate num_iterations warmup_iters warmdown_iters "
    "batch_size "
    "sequence_length notes"
).split()


NOT_A_KEY = (
    "run_id",
    "date",
    "git_commit",
    "seed",
    "device_batch_size",
)  # though they stand before the outcome


OF_THE_GATE = ("gate_pos", "gate_act")  # recorded for attn_gate=none too, and mean nothing there


GATE_KNOBS = ("GATEOPT", "MLP_MATCH")  # likewise, in the notes


def keys_of(rows: Sequence[Row]) -> list[str]:
    """The columns that tell configurations apart: KEYS, behind what another trainer's file has
    of its own between seed and final_val_loss. A trainer's further outcomes stand behind
    final_val_loss."""
    own: dict[str, None] = {}
    for columns in dict.fromkeys(row.columns for row in rows):
        known = columns[: columns.index("final_val_loss")] if "final_val_loss" in columns else ()
        own |= dict.fromkeys(c for c in known if c not in HEADER and c not in NOT_A_KEY)
    return [*own, *KEYS]


def fitted(stage: Stage, rows: Sequence[Row]) -> Stage:
    """The stage as it goes with these rows: without the usual baseline where they have no such
    column."""
    if stage.baseline == USUAL and rows and not any("attn_gate" in row.columns for row in rows):
        return dataclasses.replace(stage, baseline={})
    return stage


def knobs_in(notes: str) -> list[str]:
    """NAME=value of the notes. Names in small letters are outcomes (reached_step=...), which are
    no configuration."""
    return [word for word in notes.split() if not re.match(r"[a-z_]+=", word)]


def key_value(row: Row, key: str) -> str:
    """What tells cells apart: '-' for a gate's knob where there is no gate, '' where the file
    does not say."""
    ungated = row["attn_gate"] == "none"
    if key in OF_THE_GATE and ungated:
        return "-"
    return _configuration(row["notes"], ungated) if key == "notes" else canon(row[key])


@lru_cache(maxsize=100_000)
def _configuration(notes: str, ungated: bool) -> str:
    return " ".join(w for w in knobs_in(notes) if not (ungated and w.split("=")[0] in GATE_KNOBS))


def pair_of(row: Row) -> str:
    """What runs of two cells share that belong together: the seed, and the checkpoint that both
    were forked from."""
    fork = re.search(r"(?:^| )fork_run=(\S+)", row["notes"])
    return f"{canon(row['seed'])} from {fork[1]}" if fork else canon(row["seed"])


@dataclass(frozen=True)
class Cell:
    """The finished rows of one configuration."""

    key: Mapping[str, str]
    rows: tuple[Row, ...]

    @cached_property
    def by_seed(self) -> dict[str, list[Row]]:
        seeds: dict[str, list[Row]] = {}
        for row in self.rows:
            seeds.setdefault(pair_of(row), []).append(row)
        return seeds

    def values(self, column: str) -> dict[str, float]:
        """One value per seed; see per_seed."""
        if column not in self._values:
            self._values[column] = self.per_seed(lambda row: row.number(column))
        return self._values[column]

    def per_seed(self, value: Callable[[Row], float]) -> dict[str, float]:
        """One value per seed. A seed with several finished rows counts once, with their mean: to
        choose one of them would be a way to choose the result. Rows without a finite value do
        not count."""
        found = {
            seed: [v for row in rows if math.isfinite(v := value(row))]
            for seed, rows in self.by_seed.items()
        }
        return {seed: mean(values) for seed, values in found.items() if values}

    @cached_property
    def _values(self) -> dict[str, dict[str, float]]:
        return {}

    @cached_property
    def reaches(self) -> dict[float, object]:
        """What reach() has found, by target."""
        return {}

    @cached_property
    def steps(self) -> frozenset[float]:
        return frozenset(steps_of(row) for row in self.rows)

    @cached_property
    def label(self) -> str:
        return " ".join(
            f"{k}={v}" if k != "notes" else v for k, v in self.key.items() if v not in ("", "-")
        )


def make_cells(rows: Sequence[Row], stage: Stage) -> list[Cell]:
    """Finished rows by configuration: attn_gate, the stage's own keys, and every key that
    varies; baseline cells first. What is not known (an empty field, except notes) does not make
    a key vary."""
    stage, known = fitted(stage, rows), keys_of(rows)
    usual = USUAL if not rows or any("attn_gate" in row.columns for row in rows) else {}
    always = {*usual, *stage.keys, *stage.baseline}
    found = {
        key: {key_value(row, key) for row in rows} - ({"-"} if key == "notes" else {"-", ""})
        for key in known
    }
    keys = [key for key in known if key in always or len(found[key]) > 1] + sorted(
        always - set(known)
    )
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(key_value(row, key) for key in keys), []).append(row)
    cells = [Cell(dict(zip(keys, key, strict=True)), tuple(group)) for key, group in groups.items()]
    return sorted(
        cells, key=lambda c: (not is_baseline(c, stage), [_natural(v) for v in c.key.values()])
    )


def _natural(text: str) -> tuple[bool, float, str]:
    """Sorts numbers as numbers, before words."""
    number = _number(text)
    return (True, 0.0, text) if math.isnan(number) else (False, number, "")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return NAN


def is_baseline(cell: Cell, stage: Stage) -> bool:
    return bool(stage.baseline) and all(
        cell.key[column] == value for column, value in stage.baseline.items()
    )


def find_baseline(cell: Cell, cells: Sequence[Cell], stage: Stage) -> Cell | None:
    """The baseline cell that agrees with `cell` in every key that neither defines the baseline
    nor belongs to the gate alone; None if there is none."""
    return find_baselines([cell], cells, stage)[0]


def find_baselines(cells: Sequence[Cell], among: Sequence[Cell], stage: Stage) -> list[Cell | None]:
    """find_baseline for each of `cells`."""

    def rest(c: Cell, ungated: bool) -> tuple:
        ignored = {*stage.baseline, *(OF_THE_GATE if ungated else ())}
        key = {k: v for k, v in c.key.items() if k not in ignored}
        if "notes" in key:
            key["notes"] = _configuration(key["notes"], ungated)
        return ungated, *key.items()

    known: dict[tuple, Cell] = {}
    for b in among:
        if is_baseline(b, stage):
            for ungated in (True, False):
                known.setdefault(rest(b, ungated), b)
    return [
        known.get(rest(c, "none" in (stage.baseline.get("attn_gate"), c.key.get("attn_gate"))))
        for c in cells
    ]


def steps_of(row: Row) -> float:
    """Optimizer steps done; those planned where the file does not say."""
    return row.number("steps_done" if row["steps_done"] else "num_iterations")
