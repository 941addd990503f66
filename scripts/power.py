"""power.py -- how many seeds per arm it takes to see a difference.

    python scripts/power.py --sd 0.0013 --delta 0.002
    python scripts/power.py --sd 0.0013 --delta 0.001 --one-sided --rho 0.9
    python scripts/power.py --sd 0.0013 --delta 0.002 --alpha 0.0125      four comparisons: Holm's hardest step

sd is that of the final loss between seeds of one configuration (the tables' sd column), delta the true difference
to be found, both in nats per token; rho is how much the losses of the two arms go together over shared seeds.
Exact (noncentral t) for normal noise: unpaired is the t test for equal variances. Welch's, which the tables use,
asks for about one seed more below n=5. docs/experiments.md has what simulation says.
Raises   UserError for numbers without an answer
"""

import argparse
from collections.abc import Sequence

from lib.power import seeds_needed, smallest_difference
from lib.program import launch
from lib.stats import ALPHA, POWER


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--sd", type=float, required=True, metavar="NATS", help="standard deviation between seeds"
    )
    p.add_argument(
        "--delta", type=float, required=True, metavar="NATS", help="true difference to be found"
    )
    p.add_argument("--power", type=float, default=POWER, help="chance to find it (default 0.8)")
    p.add_argument("--alpha", type=float, default=ALPHA, help="level of the test (default 0.05)")
    p.add_argument(
        "--one-sided", action="store_true", help="only better counts (default: two-sided)"
    )
    p.add_argument(
        "--rho", type=float, default=0.5, help="correlation between paired arms (default 0.5)"
    )
    a = p.parse_args(argv)
    sides = 1 if a.one_sided else 2
    cases = [("unpaired", None)] + [(f"paired, rho {r:g}", r) for r in sorted({0.0, a.rho})]
    needed = [seeds_needed(a.delta, a.sd, a.power, a.alpha, sides, rho) for _, rho in cases]
    print(
        f"a difference of {a.delta:g} nats, sd {a.sd:g} between seeds, power {a.power:g}, "
        f"{'one' if a.one_sided else 'two'}-sided alpha {a.alpha:g}"
    )
    print(f"{'':18}  seeds per arm  so many see")
    for (name, rho), n in zip(cases, needed, strict=True):
        least = smallest_difference(n, a.sd, a.power, a.alpha, sides, rho)
        print(f"{name:18}  {n:>13}  {least:.2g} nats or more")
    print("Measured rho of four studies of gates: 0.2 to 0.65. Decide n before the first run.")


if __name__ == "__main__":
    launch(main)
