"""lib_ablation.py -- what is put in the place of a head or an MLP: zero, its mean, another item's
output.

Words    a place is a head (its output before the projection, hook_z) or the MLP of a layer
Shapes   N items, B items of a batch, T tokens, D head width, C model width, R positions relative to
         the answer's first token
Source   Zhang & Nanda, arXiv 2309.16042
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from lib_heads import Subject
from lib_hooks import Point
from torch import Tensor

import train_arith
from plumbing import UserError
from plumbing.problems import Problems, inputs_and_labels

KINDS = ("zero", "mean", "resample")


def add_sample_options(p: argparse.ArgumentParser) -> None:
    """How much of each set is looked at, and what a resampled activation is drawn with."""
    p.add_argument(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="the first N units of each set; default: all",
    )
    p.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the items to resample from; default 0"
    )


@dataclass(frozen=True)
class Place:
    layer: int
    head: int | None  # None: the MLP

    def __str__(self) -> str:
        return f"L{self.layer}-{'MLP' if self.head is None else f'H{self.head}'}"

    @property
    def hook(self) -> str:
        return f"blocks.{self.layer}." + ("hook_mlp_out" if self.head is None else "attn.hook_z")


def places(s: Subject) -> list[Place]:
    """All heads, then all MLPs."""
    layers, heads = (range(n) for n in s.shape)
    return [Place(l, h) for l in layers for h in heads] + [Place(l, None) for l in layers]


def draw_donors(starts_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each item another one with a prompt of the same length; where no other has that length,
    the nearest in length. Raises UserError for a single item."""
    N = len(starts_N)
    if N < 2:
        raise UserError(
            "resample ablation takes from other items, but there is one item only; give more"
        )
    order = rng.permutation(N)
    order = order[np.argsort(starts_N[order], kind="stable")]
    donor = np.empty(N, int)
    for at, i in enumerate(order):  # an item of equal length, if there is one, stands beside it
        near = [order[j] for j in (at - 1, at + 1) if 0 <= j < N]
        donor[i] = min(near, key=lambda j: abs(starts_N[j] - starts_N[i]))
    return donor


class Bank:
    """What every head and MLP of one layer puts out on the items of a set, unablated."""

    def __init__(self, s: Subject, problems: Problems, seed: int, batch: int = 256):
        self.s, self.problems, self.batch = s, problems, batch
        self.donor_N = draw_donors(problems.starts_N, np.random.default_rng(seed))
        self.layer = lru_cache(maxsize=1)(self._layer)
        self.means = lru_cache(maxsize=2)(self._means)

    @torch.no_grad()
    def _layer(self, layer: int) -> dict[str, Tensor]:
        """(N, T, ...) by hook name; rows are meaningless behind an item's last input token."""
        names = [Place(layer, 0).hook, Place(layer, None).hook]
        ids = torch.from_numpy(inputs_and_labels(self.problems, False, len(self.problems))[0])
        parts = []
        for rows in ids.split(self.batch):
            with train_arith.autocast(self.s.cfg, self.s.world.device):
                parts.append(
                    self.s.model.run_with_cache(
                        rows.to(self.s.world.device), lambda name: name in names
                    )[1]
                )
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def _means(self, place: Place) -> tuple[Tensor, int]:
        """(R, D) mean over items by position relative to the answer's first token, and what to add
        to find a row."""
        x = self.of(place)
        p, offset = self.problems, int(self.problems.starts_N.max())
        at = torch.arange(x.size(1)) - torch.from_numpy(p.starts_N)[:, None] + offset
        real = (torch.arange(x.size(1)) < torch.from_numpy(p.lengths_N)[:, None] - 1).to(x.device)
        at, real_x = at.to(x.device)[real], x[real].double()
        size = int(at.max()) + 1
        total = torch.zeros(size, x.size(-1), dtype=torch.float64, device=x.device).index_add_(
            0, at, real_x
        )
        count = torch.bincount(at, minlength=size).clamp(min=1)[:, None]
        return (total / count).to(x.dtype), offset

    def of(self, place: Place) -> Tensor:
        x = self.layer(place.layer)[place.hook]
        return x if place.head is None else x[:, :, place.head]

    def replacement(self, place: Place, kind: str, rows: np.ndarray, T: int) -> Tensor:
        """(B, T, D) of a head, (B, T, C) of an MLP: what to put there for these items."""
        x, p = self.of(place), self.problems
        if kind == "zero":
            return torch.zeros(len(rows), T, x.size(-1), dtype=x.dtype, device=x.device)
        at = np.arange(T) - p.starts_N[rows, None]  # relative to the answer
        if kind == "mean":
            mean, offset = self.means(place)
            return mean[torch.from_numpy((at + offset).clip(0, len(mean) - 1)).to(x.device)]
        donor = self.donor_N[rows]
        at = (at + p.starts_N[donor, None]).clip(0, p.lengths_N[donor, None] - 2)
        return x[torch.from_numpy(donor)[:, None].to(x.device), torch.from_numpy(at).to(x.device)]

    def hooks(self, place: Place, kind: str) -> Callable:
        """For measure(): the hook functions of a batch that put `kind` in `place`, at all
        positions."""

        def of_batch(rows: np.ndarray, T: int) -> list:
            new = self.replacement(place, kind, rows, T)

            def put(x: Tensor, point: Point) -> None:
                (x if place.head is None else x[:, :, place.head])[:] = new

            return [(place.hook, put)]

        return of_batch
