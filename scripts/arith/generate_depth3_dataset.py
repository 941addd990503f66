"""generate_depth3_dataset.py -- expressions nested deeper than the training's: the original's
depth-3 file by default.

    python scripts/arith/generate_depth3_dataset.py
        # data/pilot_test_depth3.jsonl, byte for byte the original's
    python scripts/arith/generate_depth3_dataset.py --prefix study --depths 3 4 5 --size 1000 \\
        --operators +- --dedup --held-out --controls
        # data/study_test_depth3.jsonl, _depth3_control, _depth4 ...

With --controls a depth's templates are all nestings of the fewest operands (four or more) for
which there is a control: another nesting, at most 2 deep, of as many brackets. Line i of the
control file has the operands, operators and length of line i of the depth's own file; only the
grouping differs, and so does the depth.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/: lib adds the checkout

import lib_arith as lib
from lib.program import launch

from arithmetic import depth_labels
from plumbing.knobs import UserError

MOST = 6  # operands of a controlled expression


class Deep(lib.Draws):
    def original(self, size: int) -> list[dict]:
        """The original's templates of depth 3."""
        found, cells, share = [], Counter(), -(-size // 3) if self.a.balance else size
        for _ in range(3000 * size):
            if len(found) == size:
                return found
            n = self.rng.randint(2, 4)
            expr = self.expression(lib.DEPTH3[n], n, False)
            record = self.record(expr, "test") if cells[n] < share else None
            if record:
                cells[n] += 1
                found.append(record)
        raise UserError(
            f"only {len(found)} of {size} records of depth 3 were found; widen the ranges, or "
            f"drop --dedup"
        )

    def controlled(self, depth: int, size: int) -> tuple[list[dict], list[dict]]:
        """`size` records of exactly this depth, and their controls."""
        deep, controls, n = [], [], 3
        while not deep:
            n += 1
            if n > MOST:
                raise UserError(
                    f"--depths {depth}: no control of at most {MOST} operands; with --controls "
                    f"go up to 5"
                )
            flat = lib.same_length(n, range(3), "redundant")
            deep = [t for t in lib.templates(n, depth, "redundant") if t.count("(") in flat]
        found: list[dict] = []
        for _ in range(3000 * size):
            if len(found) == size:
                return found, controls
            template = self.rng.choice(deep)
            other = self.rng.choice(flat[template.count("(")])
            numbers, ops = (
                [self.number() for _ in range(n)],
                [self.operator() for _ in range(n - 1)],
            )
            one = self.record(lib.fill(template, numbers, ops), "test")
            two = self.record(lib.fill(other, numbers, ops), "test") if one else None
            if one and two:
                found.append(one)
                controls.append(two)
        raise UserError(
            f"only {len(found)} of {size} records of depth {depth} were found; widen the ranges"
        )


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--size", type=int, default=100, metavar="N", help="records of each depth; default 100"
    )
    p.add_argument("--depths", type=int, nargs="+", default=[3], metavar="D", help="default 3")
    p.add_argument(
        "--controls", action="store_true", help="all nestings, each with a control at most 2 deep"
    )
    lib.add_arguments(p)
    a = p.parse_args()
    lib.check_arguments(a)
    if bad := [d for d in a.depths if d < 3]:
        raise UserError(
            f"--depths {bad[0]}: 3 and deeper are made here; "
            f"scripts/arith/generate_pilot_dataset.py makes 0 to 2"
        )
    if not a.controls and a.depths != [3]:
        raise UserError(
            "--depths: the original's templates end at 3; add --controls for other depths"
        )
    if a.size < 1:
        raise UserError(f"--size {a.size}: expected at least 1")
    return a


def main() -> int:
    a = arguments()
    draws = Deep(a)
    for depth in a.depths:
        records, controls = (
            draws.controlled(depth, a.size) if a.controls else (draws.original(a.size), [])
        )
        assert all(max(depth_labels(r["expr"])) == depth for r in records)
        lib.write_records(a.output_dir / f"{a.prefix}_test_depth{depth}.jsonl", records)
        if controls:
            lib.write_records(
                a.output_dir / f"{a.prefix}_test_depth{depth}_control.jsonl", controls
            )
    print(f"rejected: {draws.rejected}")
    return 0


if __name__ == "__main__":
    launch(main)
