"""generate_pilot_dataset.py -- the original's records: train, val, test_flat and test_paren, byte
for byte by default.

    python scripts/arith/generate_pilot_dataset.py
        # data/pilot_train.jsonl, _val, _test_flat, _test_paren
    python scripts/arith/generate_pilot_dataset.py --prefix study --num-train 0 --num-val 0 \\
        --num-test 1000 --operators +- --held-out --dedup --minimal-pairs 1000
        # tests for a model that is trained with TRAIN_PATH=generate

One random stream makes one file after the other, so a file depends on the sizes of those before
it. The entropy floor that is printed for the validation file is the lowest mean loss that any model
can have on it, because nothing tells a model which operands come next. A minimal pair is two lines
of the same operands, operators and length that differ only in grouping, and in value.
"""

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/: lib adds the checkout

import lib_arith as lib
from lib.program import launch

from arithmetic import Language, evaluate_expr, problems_of, templates
from plumbing.knobs import UserError


class Splits(lib.Draws):
    def drawn(self, parens: bool) -> tuple[str, tuple[int, int]]:
        """An expression and its cell (depth, operand count)."""
        a, n = self.a, self.rng.randint(2, 4)
        depth = self.rng.randint(a.min_depth, a.max_depth) if parens else 0
        cell = templates(n, depth, a.grammar)
        return (self.expression(cell, n, depth == 0) if cell else ""), (depth, n)

    def split(
        self, name: str, size: int, parens: bool = True, only_parens: bool = False
    ) -> list[dict]:
        """`size` records. Raises UserError when the flags do not leave that many."""
        a, found, cells = self.a, [], Counter()
        depths = range(a.min_depth, a.max_depth + 1) if parens else [0]
        least = 3 if only_parens and a.sensitive else 2  # brackets around two operands never matter
        filled = [
            (d, n)
            for d in depths
            for n in range(least, 5)
            if templates(n, d, a.grammar) and (d or not only_parens)
        ]
        share = -(-size // len(filled)) if a.balance and filled else size
        for _ in range(3000 * size):
            if len(found) == size:
                break
            expr, cell = self.drawn(parens)
            wanted = expr and ("(" in expr or not only_parens) and cells[cell] < share
            if wanted and only_parens and a.sensitive:
                wanted = evaluate_expr(expr) != evaluate_expr(
                    expr.replace("(", "").replace(")", "")
                )
            if wanted and (record := self.record(expr, name)):
                cells[cell] += 1
                found.append(record)
        if len(found) < size:
            raise UserError(
                f"only {len(found)} of {size} {name} records were found; widen a range, or drop "
                f"--dedup"
            )
        return found

    def pairs(self, count: int) -> list[dict]:
        """`count` minimal pairs, each line with its pair's number."""
        a, found = self.a, []
        for _ in range(3000 * count):
            if len(found) == 2 * count:
                break
            n, depth = self.rng.randint(3, 4), self.rng.randint(max(1, a.min_depth), a.max_depth)
            groups = [
                g
                for g in lib.same_length(n, range(depth, depth + 1), a.grammar).values()
                if len(g) > 1
            ]
            if not groups:
                continue
            both = self.rng.sample(self.rng.choice(groups), 2)
            numbers, ops = (
                [self.number() for _ in range(n)],
                [self.operator() for _ in range(n - 1)],
            )
            one, two = (lib.fill(template, numbers, ops) for template in both)
            if evaluate_expr(one) == evaluate_expr(two):
                continue
            first = self.record(one, "test")
            second = self.record(two, "test") if first else None
            if first and second:
                found += [record | dict(pair=len(found) // 2) for record in (first, second)]
        if len(found) < 2 * count:
            raise UserError(
                f"only {len(found) // 2} of {count} minimal pairs were found; widen the ranges"
            )
        return found


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, size in (("train", 2000), ("val", 200), ("test", 100)):
        what = "each of the two test files" if name == "test" else name
        text = f"records of {what}; default {size}; 0: no file"
        p.add_argument(f"--num-{name}", type=int, default=size, metavar="N", help=text)
    p.add_argument(
        "--minimal-pairs",
        type=int,
        default=0,
        metavar="N",
        help="also N pairs, PREFIX_test_pairs.jsonl",
    )
    p.add_argument(
        "--min-depth", type=int, default=0, choices=range(3), help="nesting, from; default 0"
    )
    p.add_argument(
        "--max-depth", type=int, default=2, choices=range(3), help="nesting, to; default 2"
    )
    p.add_argument(
        "--grammar", default="pilot", choices=("pilot", "redundant"), help="as in train_arith.py"
    )
    p.add_argument(
        "--sensitive",
        action="store_true",
        help="test_paren: only where the brackets change the value",
    )
    lib.add_arguments(p)
    a = p.parse_args()
    lib.check_arguments(a)
    if a.min_depth > a.max_depth:
        raise UserError(f"--min-depth {a.min_depth} is above --max-depth {a.max_depth}; swap them")
    if a.minimal_pairs and not a.max_depth:
        raise UserError("--minimal-pairs needs brackets: set --max-depth to 1 or 2")
    return a


def main() -> int:
    a = arguments()
    draws = Splits(a)
    files = dict(train=draws.split("train", a.num_train), val=draws.split("val", a.num_val))
    files["test_flat"] = draws.split("test", a.num_test, parens=False)
    files["test_paren"] = draws.split("test", a.num_test if a.max_depth else 0, only_parens=True)
    files["test_pairs"] = draws.pairs(a.minimal_pairs)
    for name, records in files.items():
        if records:
            lib.write_records(a.output_dir / f"{a.prefix}_{name}.jsonl", records)
    if files["val"] and not a.balance:  # which draws with other probabilities
        language = Language(a.grammar, a.operators, a.operand_min, a.operand_max)
        language = replace(language, depth_min=a.min_depth, depth_max=a.max_depth)
        exprs, values = zip(*((r["expr"], r["result"]) for r in files["val"]), strict=True)
        floor = lib.entropy_floor(problems_of(exprs, values, language), language)
        print(f"entropy floor of {a.prefix}_val: {floor:.4f} nats per token, all tokens scored")
    print(f"rejected: {draws.rejected}")
    return 0


if __name__ == "__main__":
    launch(main)
