"""lib_arith.py -- what the programs that make arithmetic records share: the original's order of
draws, files, and what the drawn operands cost whoever has to guess them. It needs no torch, so that
these programs start at once."""

import argparse
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

from lib.program import write_whole

from arithmetic import (
    BUCKET_OF,
    BUCKETS,
    Language,
    depth_labels,
    evaluate_expr,
    exprs_of,
    hash_expr,
    shares,
    templates,
)
from plumbing.knobs import ROOT, UserError
from plumbing.problems import Problems

OPERATORS = "+-*"
# The original's depth-3 templates. Two of three operands have a bracket too few; they are drawn,
# fail and are replaced.
DEPTH3 = {
    2: ["(((NoN)))"],
    3: ["(((NoN)oN))", "((No(NoN)))", "(((NoN))oN", "No(((NoN)))", "(((NoN))o(N)", "(N)o(((NoN)))"],
    4: ["(((NoN)oN)oN)", "((No(NoN))oN)", "(((NoN))o(NoN))", "(No((NoN)oN))"],
}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The flags that both generators have."""
    p.add_argument("--operators", default=OPERATORS, help="operators to draw from; default +-*")
    p.add_argument("--operand-min", type=int, default=1, metavar="N", help="default 1")
    p.add_argument("--operand-max", type=int, default=99, metavar="N", help="default 99")
    p.add_argument("--seed", type=int, default=42, metavar="N", help="default 42")
    p.add_argument("--dedup", action="store_true", help="every expression once, over all files")
    p.add_argument(
        "--balance", action="store_true", help="all (depth, operand count) cells equally large"
    )
    held = "tests (and val) from expressions that TRAIN_PATH=generate never draws"
    p.add_argument("--held-out", action="store_true", help=held)
    p.add_argument("--prefix", default="pilot", help="what file names start with; default pilot")
    p.add_argument(
        "--output-dir", type=Path, default=ROOT / "data", metavar="DIR", help="default data/"
    )


def check_arguments(a: argparse.Namespace) -> None:
    """Raises UserError for flags that describe no expression."""
    if not a.operators or set(a.operators) - set(OPERATORS):
        raise UserError(f"--operators {a.operators!r}: expected some of + - *, such as +-")
    if not 0 <= a.operand_min <= a.operand_max:
        raise UserError(
            f"--operand-min {a.operand_min} --operand-max {a.operand_max}: expected 0 <= min <= max"
        )


def fill(template: str, numbers: Sequence[str], ops: Sequence[str]) -> str:
    numbers, ops = iter(numbers), iter(ops)
    return "".join(next(numbers) if c == "N" else next(ops) if c == "o" else c for c in template)


class Draws:
    """Expressions from one random stream, and what has become of them. With --held-out splits take
    their own part of the hash buckets: tests from one, validation from another, training from the
    rest."""

    def __init__(self, a: argparse.Namespace):
        self.a, self.rng, self.seen, self.rejected = a, random.Random(a.seed), set(), 0

    def number(self) -> str:
        return str(self.rng.randint(self.a.operand_min, self.a.operand_max))

    def operator(self) -> str:
        return self.rng.choice(self.a.operators)

    def expression(self, cell: Sequence[str], n: int, flat: bool) -> str:
        """One of n operands from the templates of a cell, in the original's order of draws: flat
        ones, and those of two operands, number, operator, number ...; others the template, then
        all numbers, then all operators."""
        if not flat and n > 2:
            template = cell[self.rng.randint(0, len(cell) - 1)]
            numbers = [self.number() for _ in range(n)]
            return fill(template, numbers, [self.operator() for _ in range(n - 1)])
        template = cell[self.rng.randint(0, len(cell) - 1)] if len(cell) > 1 else cell[0]
        numbers, ops = [self.number()], []
        for _ in range(n - 1):
            ops.append(self.operator())
            numbers.append(self.number())
        return fill(template, numbers, ops)

    def record(self, expr: str, split: str) -> dict | None:
        """The original's record; None where the value is no 64-bit integer, or the flags leave the
        expression out."""
        try:
            value = evaluate_expr(expr)
        except ValueError:
            self.rejected += 1
            return None
        if self.a.held_out:
            split_of = {bucket: name for name, bucket in BUCKET_OF.items()}
            if split != split_of.get(hash_expr(expr) % BUCKETS, "train"):
                return None
        if self.a.dedup:
            if expr in self.seen:
                return None
            self.seen.add(expr)
        return dict(expr=expr, result=value, depth=depth_labels(expr))


def same_length(n: int, depths: range, grammar: str) -> dict[int, list[str]]:
    """Templates of n operands and these depths by their number of brackets: one list gives texts
    of one length."""
    found: dict[int, list[str]] = {}
    for depth in depths:
        for template in templates(n, depth, grammar):
            found.setdefault(template.count("("), []).append(template)
    return found


def write_records(path: Path, records: Sequence[dict]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_whole(path, text)
    lengths = [len(r["expr"]) for r in records]
    depths = sorted({max(r["depth"]) for r in records})
    different, parens = len({r["expr"] for r in records}), sum("(" in r["expr"] for r in records)
    print(
        f"{path}: {len(records):,} records, {different:,} different, {parens:,} with brackets, "
        f"depth {depths[0]} to "
        f"{depths[-1]}, {min(lengths)}-{max(lengths)} characters"
    )


def entropy_floor(problems: Problems, language: Language) -> float:
    """The lowest mean loss, in nats per token, of whoever does not know the expressions: the
    generator's own -log probability of operands, operators and brackets, with separator, answer and
    end for nothing. nan where the language cannot make an expression."""
    chances = shares(language, language.operands_max)
    operand_nats = math.log(language.operand_max - language.operand_min + 1)
    total = 0.0
    for expr in exprs_of(problems, language):
        numbers = [int(text) for text in re.findall(r"[0-9]+", expr)]
        template = re.sub(r"[-+*]", "o", re.sub(r"[0-9]+", "N", expr))
        in_range = language.operand_min <= min(numbers) <= max(numbers) <= language.operand_max
        if template not in chances or not in_range:
            return math.nan
        operator_nats = (len(numbers) - 1) * math.log(len(language.operators))
        total += len(numbers) * operand_nats + operator_nats - math.log(chances[template])
    return total / float((problems.lengths_N - 1).sum())
