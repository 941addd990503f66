"""generate_pilot_dataset.py -- the original's records: train, val, test_flat and test_paren, byte for byte by default.

    python scripts/generate_pilot_dataset.py                              data/pilot_{train,val,test_flat,test_paren}.jsonl
    python scripts/generate_pilot_dataset.py --num-train 100000 --dedup --operators +- --output-dir data/big

One random stream makes the splits one after the other, so a split depends on the sizes of those before it. --dedup drops an
expression that any split has had already; --balance makes all (depth, operand count) cells equally large.
"""

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lib_arith as lib

from plumbing import HERE, UserError, launch


class Draws:
    """Expressions from one random stream, with the rules of the flags."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rng, self.seen, self.rejected = args, random.Random(args.seed), set(), 0

    def expression(self, parens: bool) -> tuple[str, tuple[int, int]]:
        """An expression and its cell (depth, operand count), in the original's order of draws."""
        a, rng = self.args, self.rng
        n = rng.randint(2, 4)
        depth = rng.randint(a.min_depth, a.max_depth) if parens else 0
        cell = lib.pilot_cell(depth, n)
        return lib.draw(rng, cell, n, depth == 0, a.operand_min, a.operand_max, a.operators), (depth, n)

    def split(self, size: int, parens: bool = True, only_parens: bool = False) -> list[dict]:
        """`size` records. Raises UserError when the ranges do not hold that many different ones."""
        a, found, cells = self.args, [], Counter()
        depths = range(a.min_depth, a.max_depth + 1) if parens else [0]
        share = -(-size // (3 * sum(1 for d in depths if d or not only_parens) or 1)) if a.balance else size
        for _ in range(1000 * size + 1000):
            if len(found) == size:
                return found
            expr, cell = self.expression(parens)
            if only_parens and "(" not in expr:
                continue
            record = lib.record(expr)
            if record is None or (a.dedup and expr in self.seen) or cells[cell] >= share:
                self.rejected += record is None
                continue
            self.seen.add(expr)
            cells[cell] += 1
            found.append(record)
        raise UserError(f"only {len(found)} of {size} records were found; widen the operand range, or leave --dedup out")


def statistics(name: str, records: list[dict]) -> str:
    exprs = [r["expr"] for r in records]
    parens, lengths = sum("(" in e for e in exprs), [len(e) for e in exprs] or [0]
    depths = dict(sorted(Counter(max(r["depth"]) for r in records).items()))
    return (
        f"{name:12} {len(exprs):7,} records, {len(set(exprs)):7,} different, {parens:7,} with brackets, depth {depths}, "
        f"{min(lengths)}-{max(lengths)} characters"
    )


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("train", 2000), ("val", 200), ("test", 100)):
        text = f"records of {'each of the two test splits' if name == 'test' else name}; default {size}"
        p.add_argument(f"--num-{name}", type=int, default=size, metavar="N", help=text)
    p.add_argument("--min-depth", type=int, default=0, choices=range(3), help="nesting, from; default 0")
    p.add_argument("--max-depth", type=int, default=2, choices=range(3), help="nesting, to; default 2")
    p.add_argument("--operators", default="+-*", help="operators to draw from; default +-*")
    p.add_argument("--operand-min", type=int, default=1, metavar="N", help="default 1")
    p.add_argument("--operand-max", type=int, default=99, metavar="N", help="default 99")
    p.add_argument("--seed", type=int, default=42, metavar="N", help="default 42")
    p.add_argument("--dedup", action="store_true", help="every expression once, over all splits")
    p.add_argument("--balance", action="store_true", help="all (depth, operand count) cells equally large")
    p.add_argument("--output-dir", type=Path, default=HERE / "data", metavar="DIR", help="default data/")
    a = p.parse_args()
    lib.check_ranges(a.operators, a.operand_min, a.operand_max)
    if a.min_depth > a.max_depth:
        raise UserError(f"--min-depth {a.min_depth} is above --max-depth {a.max_depth}; swap them")
    return a


def main() -> int:
    a = arguments()
    draws = Draws(a)
    splits = dict(train=draws.split(a.num_train), val=draws.split(a.num_val))
    splits["test_flat"] = draws.split(a.num_test, parens=False)
    if a.max_depth:
        splits["test_paren"] = draws.split(a.num_test, only_parens=True)
    for name, records in splits.items():
        lib.write_records(a.output_dir / f"pilot_{name}.jsonl", records)
    for name, records in splits.items():
        print(statistics(name, records))
    print(f"rejected: {draws.rejected}")
    return 0


if __name__ == "__main__":
    launch(main)
