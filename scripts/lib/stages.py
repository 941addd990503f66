"""Stages: which rows are compared with each other, by rule or by a TOML file.

Raises   UserError naming file, stage and word for whatever does not fit
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from lib.program import UserError, read_toml
from lib.results import HEADER, Row, canon
from lib.sequential import Rule
from lib.stats import NAN

USUAL = {"attn_gate": "none"}  # the baseline where none is named: train_gpt.py's


@dataclass(frozen=True)
class Stage:
    """Which rows belong together, when their own stage column does not say so, and how they are
    compared."""

    name: str
    match: Mapping[str, frozenset[str]] = dataclasses.field(
        default_factory=dict
    )  # column: values, as canon()
    keys: tuple[str, ...] = ()  # columns the table has even if they do not vary
    baseline: Mapping[str, str] = dataclasses.field(default_factory=lambda: USUAL)
    extra_csv: tuple[
        str, ...
    ] = ()  # files with further rows, relative to the first source's folder
    train_tokens: float = (
        NAN  # of one pass over the training shards, where rows have no column epochs
    )
    target_loss: float = NAN  # nats per token; steps and seconds to it are reported
    sequential: Rule | None = None  # how its seeds were stopped, if not by a fixed number


def stages_by_iters(stage1: str, stage2: str) -> list[Stage]:
    """The original's rule: num_iterations alone decides. Comma lists. Raises UserError for what
    is no number."""
    stages = []
    for name, text in (("stage1", stage1), ("stage2", stage2)):
        values = [part.strip() for part in text.split(",") if part.strip()]
        if wrong := [v for v in values if not v.isdecimal()]:
            raise UserError(
                f"--{name}-iters {text}: {wrong[0]!r} is no number of iterations, such as 1500"
            )
        stages.append(
            Stage(name, {"num_iterations": frozenset(map(canon, values))} if values else {})
        )
    return stages


def read_stages(path: Path, rows: Sequence[Row] = ()) -> list[Stage]:
    """The stages of a TOML file, one table [stage.NAME] each: conditions COLUMN = value or
    [values], all of which a row must meet, and the words keys, baseline, extra_csv, train_tokens
    and target_loss, which are no columns. Columns are those of train_gpt.py and of `rows`.
    Raises UserError naming stage and word for whatever does not fit, and on Python 3.10, which
    has no tomllib."""
    tables = read_toml(path, "--stage1-iters and --stage2-iters sort the rows without a file")
    if tables.keys() != {"stage"} or not isinstance(tables["stage"], dict) or not tables["stage"]:
        raise UserError(
            f"{path}: expected tables [stage.NAME] and nothing else, found {sorted(tables)}"
        )
    columns = list(
        dict.fromkeys(
            [*HEADER, *(c for own in dict.fromkeys(r.columns for r in rows) for c in own)]
        )
    )
    return [
        _read_stage(f"{path}: [stage.{name}]", name, table, columns)
        for name, table in tables["stage"].items()
    ]


def _read_stage(where: str, name: str, table: object, columns: Sequence[str]) -> Stage:
    if not isinstance(table, dict) or not _file_name(name):
        raise UserError(
            f"{where}: expected a table named in letters, digits, '_', '.', '-'; it names the files"
        )
    words = dict(table)  # those left at the end are conditions
    numbers = {word: _positive(where, words, word) for word in ("train_tokens", "target_loss")}
    keys = _listed(where, "keys", words.pop("keys")) if "keys" in words else []
    keys = tuple(_column(where, str(v), columns) for v in keys)
    extra = _listed(where, "extra_csv", words.pop("extra_csv")) if "extra_csv" in words else []
    rule = rule_in(where, words.pop("sequential", None))
    baseline = words.pop("baseline", USUAL)
    if (
        not isinstance(baseline, dict)
        or not baseline
        or any(isinstance(v, list) for v in baseline.values())
    ):
        raise UserError(
            f"{where}: baseline = {baseline!r}: expected one value per column: "
            f'{{attn_gate = "none"}}'
        )
    match = {
        _column(where, word, columns): frozenset(canon(v) for v in _listed(where, word, value))
        for word, value in words.items()
    }
    baseline = {_column(where, word, columns): canon(v) for word, v in baseline.items()}
    return Stage(name, match, keys, baseline, tuple(map(str, extra)), sequential=rule, **numbers)


def _column(where: str, word: str, columns: Sequence[str]) -> str:
    if word not in columns:
        words = ("keys", "baseline", "extra_csv", "train_tokens", "target_loss", "sequential")
        near = get_close_matches(word, [*columns, *words], n=1)
        raise UserError(
            f"{where}: {word} is no column" + (f"; did you mean {near[0]}?" if near else "")
        )
    return word


def _listed(where: str, word: str, value: object) -> list:
    """The values of a word that takes one or several."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str | int | float) for v in values):
        raise UserError(f"{where}: {word} = {value!r}: expected a value or a list of values")
    return values


def _positive(where: str, words: dict[str, object], word: str) -> float:
    """Take `word`, a number above 0, out of the words; nan where it is not there."""
    value = words.pop(word, NAN)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"{where}: {word} = {value!r}: expected a number above 0")
    return float(value)


def rule_in(where: str, table: object) -> Rule | None:
    """The rule that stopped the seeds of a stage, as run_study.py wrote it; None without one."""
    if table is None:
        return None
    try:
        return Rule(**table)
    except (TypeError, UserError) as error:
        raise UserError(f"{where}: sequential = {table!r}: {error}") from None


def _file_name(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,80}", name, re.ASCII) is not None


def meets(row: Row, stage: Stage) -> bool:
    return all(canon(row[column]) in values for column, values in stage.match.items())


def sort_into_stages(
    rows: Sequence[Row], stages: Sequence[Stage]
) -> tuple[dict[str, tuple[Stage, list[Row]]], list[Row]]:
    """The rows of each stage, and those of none. A row's own stage column decides; where it is
    empty, every stage whose conditions the row meets gets it (as in the original). Stages
    without conditions get rows by name only."""
    sorted_rows = {stage.name: (stage, []) for stage in stages}
    homeless = []
    for row in rows:
        if row["stage"]:
            names = [row["stage"]] if _file_name(row["stage"]) else []
        else:
            names = [stage.name for stage in stages if stage.match and meets(row, stage)]
        for name in names:
            sorted_rows.setdefault(name, (Stage(name), []))[1].append(row)
        if not names:
            homeless.append(row)
    return sorted_rows, homeless
