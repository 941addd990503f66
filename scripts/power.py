"""power.py -- how many seeds per arm it takes to see a difference.

    python scripts/power.py --sd 0.0013 --delta 0.002
    python scripts/power.py --sd 0.0013 --delta 0.001 --one-sided --rho 0.9
    python scripts/power.py --sd 0.0013 --delta 0.002 --alpha 0.0125   Holm's hardest of four
    python scripts/power.py --sd 0.0013 --delta 0.002 --sequential     seeds added until decided

sd is that of the final loss between seeds of one configuration (the tables' sd column), delta the
true difference to be found, both in nats per token; rho is how much the losses of the two arms go
together over shared seeds. Exact (noncentral t) for normal noise: unpaired is the t test for equal
variances. Welch's, which the tables use, asks for about one seed more below n=5.

--sequential simulates studies of a stage with stop = "decided" (docs/studies.md) and prints, for a
true effect of 0, delta and 2 delta, how many seeds they take and what they claim, beside the seeds
of the fixed design.
Raises   UserError for numbers without an answer
"""

import argparse
import math
from collections.abc import Sequence

from lib.power import Design, seeds_needed, smallest_difference
from lib.program import launch
from lib.sequential import Rule, simulate
from lib.stats import ALPHA, POWER


def show_sequential(a: argparse.Namespace) -> None:
    """Seeds and claims of simulated sequential stages, beside the fixed design."""
    sd_difference = a.sd * math.sqrt(2 * (1 - a.rho))
    fixed = seeds_needed(a.delta, a.sd, Design(a.power, a.alpha, 2, a.rho))
    max_seeds = a.max_seeds or max(4, 3 * fixed)
    guess = sd_difference if a.sd_guess is None else a.sd_guess
    rule = Rule(abs(a.delta), max_seeds, a.alpha, a.power, guess)
    print(
        f"sequential, paired, rho {a.rho:g}: sd {sd_difference:.2g} of a difference, delta "
        f"{a.delta:g}, alpha {a.alpha:g}, at most {max_seeds} seeds; {a.studies} simulated studies"
    )
    print(f"the fixed design, two-sided, power {a.power:g}: {fixed} seeds\n")
    print("true effect  seeds, mean  90% within  better  worse  not better  undecided")
    for effect in (0.0, 1.0, 2.0):
        found = simulate(effect * rule.delta, sd_difference, rule, a.studies)
        shares = [f"{100 * share:.1f}%" for share in found.shares]
        name = f"{effect:g} delta" if effect else "0"
        print(
            f"{name:11}  {found.mean_seeds:11.1f}  {found.seeds_90:10.0f}  {shares[0]:>6}  "
            f"{shares[1]:>5}  {shares[2]:>10}  {shares[3]:>9}"
        )
        if not effect:
            ratio = found.mean_seeds / fixed
    print(f"\nWithout an effect it takes {ratio:.2f} of the fixed design's seeds.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--sd", type=float, required=True, metavar="NATS", help="standard deviation between seeds")
    add("--delta", type=float, required=True, metavar="NATS", help="true difference to be found")
    add("--power", type=float, default=POWER, help="chance to find it (default 0.8)")
    add("--alpha", type=float, default=ALPHA, help="level of the test (default 0.05)")
    add("--one-sided", action="store_true", help="only better counts (default: two-sided)")
    add("--rho", type=float, default=0.5, help="correlation between paired arms (default 0.5)")
    add("--sequential", action="store_true", help="simulate a stage that stops when decided")
    add("--max-seeds", "--max_seeds", type=int, metavar="N",
        help="of --sequential: default 3 times the fixed design's")  # fmt: skip
    add("--sd-guess", "--sd_guess", type=float, metavar="NATS", help="of --sequential: the sd of a "
        "difference that the stage expects, where it is not the true one")  # fmt: skip
    add("--studies", type=int, default=2000, metavar="N", help="of --sequential (default 2000)")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    a = arguments(argv)
    sides = 1 if a.one_sided else 2
    cases = [("unpaired", None)] + [(f"paired, rho {r:g}", r) for r in sorted({0.0, a.rho})]
    designs = [Design(a.power, a.alpha, sides, rho) for _, rho in cases]
    needed = [seeds_needed(a.delta, a.sd, design) for design in designs]
    if a.sequential:
        return show_sequential(a)
    print(
        f"a difference of {a.delta:g} nats, sd {a.sd:g} between seeds, power {a.power:g}, "
        f"{'one' if a.one_sided else 'two'}-sided alpha {a.alpha:g}"
    )
    print(f"{'':18}  seeds per arm  so many see")
    for (name, _), design, n in zip(cases, designs, needed, strict=True):
        least = smallest_difference(n, a.sd, design)
        print(f"{name:18}  {n:>13}  {least:.2g} nats or more")
    print("Measured rho of four studies of gates: 0.2 to 0.65. Decide n before the first run, or")
    print('let a stage with stop = "decided" add seeds (--sequential).')


if __name__ == "__main__":
    launch(main)
