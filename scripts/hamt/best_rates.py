"""best_rates.py -- each side of a comparison at its own best learning rate.

    python scripts/run_study.py experiments/studies/hamt.toml --stage hamt_rates
    python scripts/hamt/best_rates.py --stage hamt_rates

A side is a mixer with or without the convolution. Its rate is the one whose mean validation loss
over the seeds is lowest; what is compared is the loss of the test split, which chose nothing. A
side with fewer than three rates, or whose best rate is the smallest or the largest that was tried,
is named below the table: it may have done better.

Prints   a row for each side: its rates with their validation losses, the chosen rate, the test loss
         (sd, n), and its difference to the first side with Welch's 95% interval
Units    losses in nats per token
Raises   UserError: no results file, or no finished run of the stage with a test loss
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import beside  # noqa: F401  (finds scripts/lib and the trainers)
from comparison_tables import markdown, show
from lib import program, results, stats

from plumbing import UserError
from plumbing.world import launch

COLUMNS = {
    "side": "mixer",
    "rates": "validation loss by rate",
    "rate": "best rate",
    "loss": "test loss",
    "sd": "sd",
    "n": "n",
    "difference": "difference",
    "low": "95% from",
    "high": "to",
}


@dataclass
class Side:
    name: str
    runs: dict[float, list[dict[str, str]]]  # rows of the results file by learning rate

    def validation(self, rate: float) -> float:
        return stats.mean([float(row["final_val_loss"]) for row in self.runs[rate]])

    @property
    def best_rate(self) -> float:
        return min(self.runs, key=self.validation)

    @property
    def test_losses(self) -> list[float]:
        rows = self.runs[self.best_rate]
        return [float(row["test_loss"]) for row in rows if row["test_loss"]]

    @property
    def problem(self) -> str:
        if len(self.runs) < 3:
            return f"{self.name}: only {len(self.runs)} rate(s) were tried"
        if self.best_rate in (min(self.runs), max(self.runs)):
            return f"{self.name}: its best rate is the {self.best_rate:g} at the end of those tried"
        return ""


def sides_of(rows: Sequence[dict[str, str]], stage: str) -> list[Side]:
    """Sides in the order in which they first occur; of a run that was made twice the last row."""
    finished = {}
    for row in rows:
        is_done = row.get("status") in ("finished", "early_stop")
        if row.get("stage") == stage and is_done and row.get("final_val_loss"):
            finished[row["run_id"]] = row
    sides: dict[str, Side] = {}
    for row in finished.values():
        name = row["mixer"]
        if row["mixer"] == "attention" and row["conv"] == "1":
            name = "attention with convolution"
        side = sides.setdefault(name, Side(name, {}))
        side.runs.setdefault(float(row["learning_rate"]), []).append(row)
    return list(sides.values())


def rows_of(sides: Sequence[Side]) -> list[dict]:
    found = []
    first = sides[0].test_losses
    for side in sides:
        losses = side.test_losses
        rates = [f"{rate:g}: {side.validation(rate):.4f}" for rate in sorted(side.runs)]
        row = {"side": side.name, "rates": ", ".join(rates), "rate": side.best_rate}
        row |= {"loss": stats.mean(losses), "sd": stats.sd(losses), "n": len(losses)}
        if side is not sides[0]:
            row["difference"] = row["loss"] - stats.mean(first)
            test = stats.welch(losses, first)
            row["low"] = test.lo if test else math.nan
            row["high"] = test.hi if test else math.nan
        found.append(row)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    program.add_results_option(parser, file="experiments/results_hamt.csv")
    parser.add_argument("--stage", default="hamt_rates", help="stage of a study (hamt_rates)")
    a = parser.parse_args(argv)
    rows, _ = results.read_results(Path(a.results_file))
    found = sides_of([row.values for row in rows], a.stage)
    sides = [side for side in found if side.test_losses]
    if not sides:
        raise UserError(
            f"{a.results_file}: no finished run of stage {a.stage} with a test loss at the best "
            f"rate; run the study with FINAL_TEST=1"
        )
    show(markdown(rows_of(sides), COLUMNS))
    for side in sides:
        if side.problem:
            show(side.problem)


if __name__ == "__main__":
    launch(main)
