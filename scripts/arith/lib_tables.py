"""lib_tables.py -- statistics over units, and the files that the programs about heads write.

Shapes   N units, M columns, Y rows and X columns of a map
Source   McNemar 1947 (exact, binomial); Wilson 1927
"""

import argparse
import csv
import hashlib
import io
import json
import shlex
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/: lib adds the checkout

from lib import plots, stats
from lib.cells import key_value, keys_of
from lib.plots import COLOURS, style_of
from lib.program import write_whole
from lib.results import Row, read_results
from lib.stats import holm

from plumbing import ROOT

OUT = ROOT / "experiments/arith"
__all__ = ["COLOURS", "Row", "holm", "key_value", "keys_of", "read_results", "style_of"]


# ----------------------------------------------------------------------------
# Statistics


def mcnemar(before_N: np.ndarray, after_N: np.ndarray) -> tuple[int, int, float]:
    """Units lost (right before, wrong after) and gained, and the exact two-sided p that both are
    equally likely."""
    lost, gained = (
        int(((before_N == 1) & (after_N == 0)).sum()),
        int(((before_N == 0) & (after_N == 1)).sum()),
    )
    below = stats.special().bdtr(min(lost, gained), lost + gained, 0.5)
    return lost, gained, min(1.0, 2 * float(below))


@lru_cache(maxsize=8)
def resamplings(n: int, seed: int = 0, draws: int = 2000) -> np.ndarray:
    """(draws, n) weights of a bootstrap over n units: the same for everything that is measured on
    them, so that differences are paired."""
    rng = np.random.default_rng([seed, n])
    return rng.multinomial(n, np.full(n, 1 / n), draws) / n


def intervals(values_NM: np.ndarray, seed: int = 0) -> np.ndarray:
    """(2, M) ends of the 95% percentile bootstrap intervals of the columns' means."""
    return np.quantile(resamplings(len(values_NM), seed) @ values_NM, [0.025, 0.975], axis=0)


def wilson(right: float, n: int) -> tuple[float, float]:
    """95% interval of a fraction, `right` of n."""
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, float((middle - half) / (1 + z * z / n))), min(
        1.0, float((middle + half) / (1 + z * z / n))
    )


# ----------------------------------------------------------------------------
# Files and figures


def out_folder(a: argparse.Namespace, program: str, subjects: Sequence) -> Path:
    return a.out or OUT / program / "+".join(s.name for s in subjects)[:100]


def provenance(subjects: Sequence, files: Sequence[Path]) -> dict:
    """What a result came from: the command, the models and data by SHA-256."""

    def digest(path: Path) -> str:
        return hashlib.sha256((path if path.exists() else ROOT / path).read_bytes()).hexdigest()

    models = {
        s.name: dict(path=str(s.path), sha256=digest(s.path), seed=s.cfg.seed) for s in subjects
    }
    data = {str(path): digest(path) for path in files}
    return dict(command=shlex.join(sys.argv), models=models, data=data, torch=torch.__version__)


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """A column for every key, in the order of their first appearance; floats to 6 significant
    digits."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    show = lambda v: f"{v:.6g}" if isinstance(v, float) else "" if v is None else v
    writer.writerows({key: show(value) for key, value in row.items()} for row in rows)
    write_whole(path, text.getvalue())


def write_json(path: Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_figure(path: Path, figure) -> None:
    """PNG and SVG beside each other."""
    for kind in ("png", "svg"):
        write_whole(path.with_suffix(f".{kind}"), plots.figure_bytes(figure, kind))
    print(path.with_suffix(".png"))


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure without pyplot, and its axes as an array (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def heat(
    axes,
    values_YX: np.ndarray,
    limit: float,
    text: str | None = "{:.2f}",
    marked_YX: np.ndarray | None = None,
):
    """A map with 0 white; beyond +-limit the colour stays. Marked cells have a frame and bold
    text. The image."""
    from matplotlib.patches import Rectangle

    image = axes.imshow(values_YX, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for (y, x), value in np.ndenumerate(values_YX):
        bold = marked_YX is not None and marked_YX[y, x]
        if text and np.isfinite(value):
            colour = "white" if abs(value) > 0.6 * limit else "0.1"
            words = text.format(value).replace("-0.00", "0.00")
            weight = "bold" if bold else "normal"
            axes.text(
                x, y, words, ha="center", va="center", fontsize=7, color=colour, weight=weight
            )
        if bold:
            frame = dict(fill=False, edgecolor="black", linewidth=1.4)
            axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, **frame))
    axes.tick_params(labelsize=8)
    return image
