"""fork_gain.py -- what forks save: the noise of a comparison, forked and from step 0.

    python scripts/run_study.py experiments/studies/forks.toml
    python scripts/fork_gain.py --stages experiments/tables/forks.toml

Prints the standard deviation of the paired difference (variant minus baseline, by seed) of two
stages that compare the same cells, `whole` and `forked`, and the ratio of the variances: a ratio of
1/4 means that a quarter of the seeds decides as much. Its interval is that of Pitman and Morgan for
two spreads measured on the same seeds. A third stage, `same`, holds forks that differ in nothing
but the order of their data. Where each seed has orders of its own, whatever is claimed of them is a
false claim, which is to happen in 5%.

Raises   UserError for stages that are not there or cannot be compared
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from lib.cells import Cell, find_baseline, make_cells
from lib.program import UserError, add_data_options, launch
from lib.results import read_results
from lib.stages import read_stages, sort_into_stages
from lib.stats import ALPHA, mean, paired, sd, special, variance_ratio

DRAWS = 10_000


def by_seed(cell: Cell) -> dict[str, float]:
    """The final loss of each seed; a fork's key names its checkpoint behind the seed."""
    return {key.split()[0]: loss for key, loss in cell.values("final_val_loss").items()}


def cells_by_stage(a: argparse.Namespace) -> dict[str, list[tuple[Cell, Cell | None]]]:
    """The cells of each stage of the file, each with its baseline."""
    rows, _ = read_results(a.results_file)
    stages, _ = sort_into_stages(rows, read_stages(a.stages, rows))
    found = {}
    for name, (stage, own) in stages.items():
        cells = make_cells([row for row in own if row.is_finished], stage)
        found[name] = [(cell, find_baseline(cell, cells, stage)) for cell in cells]
    return found


def differences(pairs: Sequence[tuple[Cell, Cell | None]], stage: str) -> dict[str, float]:
    """The paired differences of the one comparison of a stage, by seed."""
    compared = [(c, b) for c, b in pairs if b is not None and b is not c]
    if len(compared) != 1:
        raise UserError(f"stage {stage}: expected two cells to compare, found {len(pairs)}")
    ours, theirs = map(by_seed, compared[0])
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def show_ratio(whole: Mapping[str, float], forked: Mapping[str, float]) -> None:
    """The spread of the differences, both ways, and the ratio of the variances."""
    seeds = [seed for seed in whole if seed in forked]
    both = [[values[seed] for seed in seeds] for values in (whole, forked)]
    print(f"paired differences in nats per token, n={len(seeds)} seeds")
    for name, values in zip(("from step 0", "forked"), both, strict=True):
        print(f"  {name:12}  mean {mean(values):+.4f}  standard deviation {sd(values):.4f}")
    found = variance_ratio(both[1], both[0])
    print(
        f"variance forked over from step 0: {found.value:.3f}, 95% interval "
        f"[{found.lo:.3f}, {found.hi:.3f}] (Pitman-Morgan)"
    )


def show_false_claims(cells: Sequence[Cell]) -> None:
    """How often a paired t test claims a difference between cells that are the same."""
    losses = [by_seed(cell) for cell in cells]
    seeds = [seed for seed in losses[0] if all(seed in values for values in losses)]
    table = np.array([[values[seed] for seed in seeds] for values in losses])  # cells, seeds
    pairs = list(itertools.combinations(range(len(cells)), 2))
    tests = [paired(list(table[i]), list(table[j])) for i, j in pairs]
    claims = sum(test is not None and test.p < ALPHA for test in tests)
    print(
        f"forks of the same knobs, each seed with two orders of the data drawn anew "
        f"({DRAWS:,} studies, n={len(seeds)} seeds): {100 * drawn_claims(table):.1f}% claim a "
        f"difference at 5%"
    )
    print(
        f"the same, all seeds with the same two orders: {claims} of {len(pairs)} pairs; such a "
        f"claim is of the two orders, since no seed averages over them"
    )


def drawn_claims(table: np.ndarray) -> float:
    """The share of false claims in studies that draw two of the cells for each seed: which fork
    has which order of the data is arbitrary, so every draw is a study as good as the first."""
    rng = np.random.default_rng(0)
    num_cells, num_seeds = table.shape
    order = rng.random((DRAWS, num_seeds, num_cells)).argsort(axis=2)[:, :, :2]
    columns = np.arange(num_seeds)
    d = table[order[:, :, 0], columns] - table[order[:, :, 1], columns]
    t = d.mean(axis=1) / d.std(axis=1, ddof=1) * num_seeds**0.5
    return float((abs(t) > special().stdtrit(num_seeds - 1, 1 - ALPHA / 2)).mean())


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_data_options(p)
    p.add_argument("--stages", type=Path, required=True, metavar="TOML",
                   help="the stages, as run_study.py wrote them")  # fmt: skip
    p.add_argument("--whole", default="whole", metavar="STAGE", help="runs from step 0")
    p.add_argument("--forked", default="forked", metavar="STAGE", help="the same cells, forked")
    p.add_argument("--same", default="same", metavar="STAGE", help="forks of equal knobs")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    a = arguments(argv)
    stages = cells_by_stage(a)
    for name in (a.whole, a.forked):
        if name not in stages:
            raise UserError(f"{a.results_file}: no rows of stage {name}")
    show_ratio(differences(stages[a.whole], a.whole), differences(stages[a.forked], a.forked))
    if a.same in stages:
        show_false_claims([cell for cell, _ in stages[a.same]])


if __name__ == "__main__":
    launch(main)
