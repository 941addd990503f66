"""lib_patch_figures.py -- maps of what patching recovers, by position and by place in the text.

Shapes   P texts, T tokens
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import lib_tables as tables
import numpy as np
from lib_heads import Subject
from torch import Tensor

from arithmetic import BOS, EOS, decode

if TYPE_CHECKING:
    from patch_heads import Pairs, Site

PLACES = ("all", "before", "span", "after", "read")


def letter(ids_P: Tensor) -> str:
    """One position's character: a digit that is not the same in all texts is d."""
    found = {int(i) for i in ids_P}
    if len(found) > 1:
        return "d"
    return {BOS: "^", EOS: "$"}.get(i := found.pop(), decode([i]))


def position_figure(
    s: Subject, x: "Pairs", grid: np.ndarray, all_sites: Sequence["Site"], title: str
):
    """Sites over positions; below, the clean text, and the corrupt one."""
    shown = [
        ("resid", "residual stream"),
        ("head", "heads (hook_z)"),
        ("attn_out", "attention"),
        ("mlp_out", "MLP"),
    ]
    T, counts = grid.shape[1], [sum(site.kind == kind for site in all_sites) for kind, _ in shown]
    figure, axes = tables.new_figure(
        1.6 + 0.36 * T,
        1.6 + 0.2 * sum(counts) + 0.7 * len(shown),
        len(shown),
        1,
        gridspec_kw=dict(height_ratios=counts),
    )
    ticks = [f"{letter(x.clean_PT[:, at])}\n{letter(x.corrupt_PT[:, at])}" for at in range(T)]
    for panel, (kind, label) in zip(axes[:, 0], shown, strict=True):
        rows = [i for i, site in enumerate(all_sites) if site.kind == kind]
        image = tables.heat(panel, grid[rows], 1.0, None)
        panel.set_yticks(range(len(rows)), [str(all_sites[i]) for i in rows], fontsize=6)
        panel.set_xticks(
            range(T), ticks if panel is axes[-1, 0] else [], fontsize=9, family="monospace"
        )
        panel.set_title(label, fontsize=8)
    axes[-1, 0].set_xlabel(
        "clean text above, corrupt below; the last position is where the answer is read", fontsize=8
    )
    figure.colorbar(image, ax=axes, shrink=0.5).set_label(
        "recovery of the logit difference", fontsize=8
    )
    figure.suptitle(title, fontsize=9)
    return figure


def place_figure(s: Subject, rows: Sequence[dict], title: str):
    """Sites over places in the text, all pairs; framed where the interval excludes 0."""
    names = list(dict.fromkeys(row["site"] for row in rows))
    value = {(row["site"], row["place"]): row for row in rows}
    get = lambda key: np.array([[value[n, p][key] for p in PLACES] for n in names])
    figure, axes = tables.new_figure(5.2, 1.3 + 0.22 * len(names))
    image = tables.heat(
        axes[0, 0], get("recovery"), 1.0, marked_YX=(get("low") > 0) | (get("high") < 0)
    )
    axes[0, 0].set_xticks(range(len(PLACES)), PLACES)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=6)
    figure.colorbar(image, ax=axes, shrink=0.4).set_label(
        "recovery of the logit difference", fontsize=8
    )
    figure.suptitle(title, fontsize=9)
    figure.supxlabel(
        "framed, bold: the 95% bootstrap interval over pairs excludes 0", fontsize=8, color="0.3"
    )
    return figure
