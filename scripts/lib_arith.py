"""lib_arith.py -- what the programs that make and read arithmetic records share: the original's random draws, files."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from train_arith import PILOT, depth_labels, evaluate_expr
from plumbing import UserError

OPERATORS = ("+", "-", "*")
# The original's depth-3 templates. Two of three operands have a bracket too few; they are drawn, fail and are replaced.
DEPTH3 = {
    2: ["(((NoN)))"],
    3: ["(((NoN)oN))", "((No(NoN)))", "(((NoN))oN", "No(((NoN)))", "(((NoN))o(N)", "(N)o(((NoN)))"],
    4: ["(((NoN)oN)oN)", "((No(NoN))oN)", "(((NoN))o(NoN))", "(No((NoN)oN))"],
}


def fill(template: str, numbers: Sequence[str], ops: Sequence[str]) -> str:
    numbers, ops = iter(numbers), iter(ops)
    return "".join(next(numbers) if c == "N" else next(ops) if c == "o" else c for c in template)


def draw(
    rng: random.Random, cell: Sequence[str], n: int, flat: bool, low: int, high: int, operators: Sequence[str]
) -> str:
    """One expression of n operands from the templates of a cell, with the original's order of draws: a flat one, and any
    of two operands, number, operator, number ...; others the template, all numbers, all operators."""
    number, op = lambda: str(rng.randint(low, high)), lambda: rng.choice(operators)
    if flat or n == 2:
        text = number()
        numbers, ops = [text], []
        for _ in range(n - 1):
            ops.append(op())
            numbers.append(number())
        return fill(cell[0] if len(cell) == 1 else rng.choice(cell), numbers, ops)
    template = cell[rng.randint(0, len(cell) - 1)]
    numbers = [number() for _ in range(n)]
    return fill(template, numbers, [op() for _ in range(n - 1)])


def pilot_cell(depth: int, n: int) -> list[str]:
    return PILOT[depth, n].split()


def record(expr: str) -> dict | None:
    """The original's record; None where the expression has no 64-bit integer value."""
    try:
        return dict(expr=expr, result=evaluate_expr(expr), depth=depth_labels(expr))
    except ValueError:
        return None


def write_records(path: Path, records: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    print(f"{path}: {len(records)} records")


def check_ranges(operators: str, low: int, high: int) -> None:
    """Raises UserError for flags that describe no expression."""
    if not operators or set(operators) - set(OPERATORS):
        raise UserError(f"--operators {operators!r}: expected some of + - *, such as +-")
    if not 0 <= low <= high:
        raise UserError(f"--operand-min {low} --operand-max {high}: expected 0 <= min <= max")
