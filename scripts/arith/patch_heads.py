"""patch_heads.py -- activation patching on minimal pairs: what carries the grouping from the
brackets to the answer.

    python scripts/arith/patch_heads.py --checkpoint runs/honest
        # pairs of data/study_test_pairs.jsonl
    python scripts/arith/patch_heads.py --checkpoint runs/honest --pair 17
        # the map by position of one pair

A pair is two expressions of the same operands, operators and length that differ in grouping and
value; each is once the clean and once the corrupt one. Both are followed by the answer tokens that
the two values share; the logit difference is that of the clean answer's next token over the
corrupt one's. The corrupt text is run with one activation taken from the clean run at the same
position: recovery is (patched - corrupt) / (clean - corrupt), a ratio of means over pairs; 0 is no
effect, 1 all of it.

Writes   patch.csv: per site (the residual stream before each block and after the last, what
         attention and MLP add, every head's hook_z) and place in the text the recovery with its
         bootstrap interval over pairs; positions.csv: the map by position over the largest group
         of pairs with the same brackets and operand widths; patch.json; figures
Places   all; before, span, after: the tokens up to the first that differs, up to the last that
         differs, and the rest of the prompt; read: where the answer token is read off; answer
         tokens before it are in all only
Gate     only pairs whose two answers the model gets right are used. Below an exact match of 50% on
         the items nothing is patched unless --allow-incompetent, which then takes all pairs. Exit
         code 1 when it stops there
Shapes   P texts (both directions of a pair follow each other), T tokens; x_PT has shape (P, T)
Raises   UserError: no such checkpoint, data set or pair, no pair left
Source   denoising with the logit difference: Zhang & Nanda, arXiv 2309.16042
"""

import argparse
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import lib_heads as heads
import lib_patch_figures as figures
import lib_tables as tables
import numpy as np
import torch
from lib_heads import Subject, TestSet
from lib_hooks import Point
from torch import Tensor

from plumbing import UserError
from train_arith import autocast


@dataclass(frozen=True)
class Pairs:
    """P texts in both versions, padded on the right. Row 2i + 1 is row 2i with clean and corrupt
    exchanged."""

    clean_PT: Tensor
    corrupt_PT: Tensor
    read_P: Tensor  # position whose logits are read
    right_P: Tensor  # the clean answer's next token
    wrong_P: Tensor
    prompt_P: np.ndarray  # length of the prompt, with BOS

    def __len__(self) -> int:
        return len(self.read_P)

    def rows(self, index) -> "Pairs":
        at = torch.as_tensor(index, device=self.read_P.device)
        return Pairs(
            *(
                getattr(self, f)[at]
                for f in ("clean_PT", "corrupt_PT", "read_P", "right_P", "wrong_P")
            ),
            self.prompt_P[index],
        )


def make_pairs(t: TestSet, which: Sequence[int], device: torch.device) -> Pairs:
    """Both directions of the pairs `which`."""
    p = t.problems
    clean, corrupt, read, right, wrong, prompt = [], [], [], [], [], []
    for i in which:
        texts = [p.tokens_NT[j, : p.lengths_N[j]].tolist() for j in (2 * i, 2 * i + 1)]
        start = int(p.starts_N[2 * i])
        if start != p.starts_N[2 * i + 1] or p.values_N[2 * i] == p.values_N[2 * i + 1]:
            raise UserError(
                f"{t.path}: pair {i}: two texts of one length and different value were expected"
            )
        shared = next(
            n for n, (a, b) in enumerate(zip(*(x[start:] for x in texts), strict=False)) if a != b
        )
        for one, two in (texts, texts[::-1]):
            clean.append(one[: start + shared])
            corrupt.append(two[:start] + one[start : start + shared])
            read.append(start + shared - 1)
            right.append(one[start + shared])
            wrong.append(two[start + shared])
            prompt.append(start)
    width = max(map(len, clean))
    pad = lambda rows: torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    read, right, wrong = (torch.tensor(x, device=device) for x in (read, right, wrong))
    return Pairs(pad(clean), pad(corrupt), read, right, wrong, np.array(prompt))


def masks(x: Pairs) -> dict[str, Tensor]:
    """(P, T) by the name of a place in the text."""
    differs = x.clean_PT != x.corrupt_PT
    T = differs.size(1)
    at = torch.arange(T, device=differs.device)[None]
    first = differs.int().argmax(1, keepdim=True)
    last = T - 1 - differs.flip(1).int().argmax(1, keepdim=True)
    prompt, read = torch.from_numpy(x.prompt_P)[:, None].to(at.device), x.read_P[:, None]
    inside = (at < prompt) & (at != read)
    found = dict(
        all=at <= read, before=inside & (at < first), span=inside & (at >= first) & (at <= last)
    )
    return found | dict(after=inside & (at > last), read=at == read)


# ----------------------------------------------------------------------------
# Patching


@dataclass(frozen=True)
class Site:
    hook: str
    head: int | None = None

    def __str__(self) -> str:
        short = self.hook.removeprefix("blocks.").replace("hook_", "")
        return f"L{short.split('.')[0]}-H{self.head}" if self.head is not None else f"L{short}"

    @property
    def kind(self) -> str:
        return "head" if self.head is not None else re.sub(r".*hook_|_pre|_post", "", self.hook)


def sites(s: Subject) -> list[Site]:
    """The residual stream, what attention and MLP add to it, then the heads."""
    L, H = s.shape
    found = [Site(f"blocks.{l}.hook_resid_pre") for l in range(L)] + [
        Site(f"blocks.{L - 1}.hook_resid_post")
    ]
    found += [Site(f"blocks.{l}.hook_{leaf}") for leaf in ("attn_out", "mlp_out") for l in range(L)]
    return found + [Site(f"blocks.{l}.attn.hook_z", h) for l in range(L) for h in range(H)]


@torch.no_grad()
def logit_difference(
    s: Subject, ids_PT: Tensor, x: Pairs, fwd_hooks: Sequence[tuple] = ()
) -> np.ndarray:
    """(P,) logit of the clean answer's token minus that of the corrupt one's, at the position that
    is read."""
    with (
        s.model.hooks([*heads.nothing(x.prompt_P, 0), *fwd_hooks]),
        autocast(s.cfg, s.world.device),
    ):
        logits = s.model(ids_PT)
    at = torch.arange(len(x), device=ids_PT.device)
    logits = logits[at, x.read_P].double()
    return (logits[at, x.right_P] - logits[at, x.wrong_P]).cpu().numpy()


@torch.no_grad()
def clean_run(s: Subject, x: Pairs) -> dict[str, Tensor]:
    """The clean texts' activations at all sites."""
    names = {site.hook for site in sites(s)}
    with autocast(s.cfg, s.world.device):
        return s.model.run_with_cache(x.clean_PT, lambda name: name in names)[1]


def patched(
    s: Subject, x: Pairs, clean: dict[str, Tensor], site: Site, mask_PT: Tensor
) -> np.ndarray:
    """(P,) logit differences of the corrupt texts with the clean activation at `site` where the
    mask is set."""

    def put(act: Tensor, point: Point) -> None:
        of_site = (lambda a: a) if site.head is None else (lambda a: a[:, :, site.head])
        of_site(act)[mask_PT] = of_site(clean[site.hook])[mask_PT]

    return logit_difference(s, x.corrupt_PT, x, [(site.hook, put)])


def recovery(
    after_P: np.ndarray, clean_P: np.ndarray, corrupt_P: np.ndarray
) -> tuple[float, float, float]:
    """Ratio of means, and the ends of its 95% bootstrap interval; both directions of a pair are
    drawn together."""
    by_pair = lambda v: v.reshape(-1, 2).mean(1)
    gained, whole = by_pair(after_P - corrupt_P), by_pair(clean_P - corrupt_P)
    w = tables.resamplings(len(gained))
    low, high = np.quantile((w @ gained) / (w @ whole), [0.025, 0.975])
    return float(gained.mean() / whole.mean()), float(low), float(high)


def by_place(s: Subject, x: Pairs, batch: int = 256) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """A row per site and place in the text, over all pairs; and the clean and corrupt logit
    differences."""
    after: dict[tuple[Site, str], list] = {
        (site, place): [] for site in sites(s) for place in figures.PLACES
    }
    ends: list[list] = [[], []]
    for at in range(0, len(x), batch):
        part = x.rows(np.arange(at, min(at + batch, len(x))))
        clean, where = clean_run(s, part), masks(part)
        for into, ids in zip(ends, (part.clean_PT, part.corrupt_PT), strict=True):
            into.append(logit_difference(s, ids, part))
        for (site, place), into in after.items():
            into.append(patched(s, part, clean, site, where[place]))
    clean_P, corrupt_P = (np.concatenate(e) for e in ends)
    rows = []
    for (site, place), parts in after.items():
        value, low, high = recovery(np.concatenate(parts), clean_P, corrupt_P)
        rows.append(
            dict(
                model=s.name,
                site=str(site),
                kind=site.kind,
                hook=site.hook,
                head=site.head,
                place=place,
                pairs=len(x) // 2,
                recovery=value,
                low=low,
                high=high,
            )
        )
    return rows, clean_P, corrupt_P


# ----------------------------------------------------------------------------
# The map by position


def largest_group(t: TestSet, which: Sequence[int], x: Pairs) -> list[int]:
    """Indices into `which` of the pairs that share brackets, operand widths and the token that is
    read."""
    form = lambda i: tuple(re.sub(r"\d", "d", t.exprs[j]) for j in (2 * i, 2 * i + 1))
    keys = [(frozenset(form(i)), int(x.read_P[2 * n])) for n, i in enumerate(which)]
    best, _ = Counter(keys).most_common(1)[0]
    return [n for n, key in enumerate(keys) if key == best]


def oriented(t: TestSet, which: Sequence[int], group: Sequence[int]) -> list[int]:
    """Rows of the pairs in the direction in which all of the group have the same clean brackets."""
    form = lambda text: re.sub(r"\d", "d", text)
    want = form(t.exprs[2 * which[group[0]]])
    return [2 * n + (form(t.exprs[2 * which[n]]) != want) for n in group]


def by_position(s: Subject, x: Pairs) -> tuple[list[dict], np.ndarray, list[Site]]:
    """Rows, and recovery (sites, positions); every text of x has the same length."""
    clean, T = clean_run(s, x), int(x.read_P[0]) + 1
    ends = [logit_difference(s, ids, x) for ids in (x.clean_PT, x.corrupt_PT)]
    whole, all_sites, rows = (ends[0] - ends[1]).mean(), sites(s), []
    grid = np.empty((len(all_sites), T))
    for i, site in enumerate(all_sites):
        for at in range(T):
            mask = torch.zeros_like(x.clean_PT, dtype=torch.bool)
            mask[:, at] = True
            grid[i, at] = (patched(s, x, clean, site, mask) - ends[1]).mean() / whole
            rows.append(
                dict(
                    model=s.name,
                    site=str(site),
                    kind=site.kind,
                    position=at,
                    texts=len(x),
                    clean_token=figures.letter(x.clean_PT[:, at]),
                    corrupt_token=figures.letter(x.corrupt_PT[:, at]),
                    recovery=float(grid[i, at]),
                )
            )
    return rows, grid, all_sites


# ----------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = heads.parser(__doc__)
    p.add_argument(
        "--limit", type=int, default=0, metavar="N", help="the first N pairs; default: all"
    )
    p.add_argument(
        "--pair", type=int, metavar="I", help="draw the map by position of this pair alone"
    )
    p.add_argument(
        "--allow-incompetent", action="store_true", help="patch below the gate, with all pairs"
    )
    return p.parse_args(argv)


def usable(s: Subject, t: TestSet, a: argparse.Namespace) -> tuple[list[int], bool]:
    """The pairs to patch, none below the gate, and whether the model passes it. Raises UserError
    when none is left."""
    exact = heads.measure(s, t.problems)[:, 0].reshape(-1, 2)
    fit = heads.competent(float(exact.mean()), a.allow_incompetent, s, t.name)
    if not fit and not a.allow_incompetent:
        return [], fit
    which = [int(i) for i in (np.flatnonzero(exact.min(1) == 1) if fit else np.arange(len(exact)))]
    print(
        f"{s.name}: {len(which)} of {t.n} pairs are used"
        + (", both answers right" if fit else ", right or wrong")
    )
    if len(which) < 2:
        raise UserError(
            f"{t.path}: {len(which)} pairs that {s.name} gets right; give more with --minimal-pairs"
        )
    if a.pair is not None and a.pair not in which:
        raise UserError(
            f"--pair {a.pair}: not one of the {len(which)} pairs in use, such as {which[:5]}; "
            f"choose one"
        )
    return which, fit


def tell(rows: Sequence[dict], mark: str) -> None:
    """The strongest heads, on the console."""
    of_heads = [r for r in rows if r["kind"] == "head" and r["place"] == "all"]
    for row in sorted(of_heads, key=lambda r: -r["recovery"])[:5]:
        print(
            f"{row['site']}: recovery {row['recovery']:+.3f} [{row['low']:+.3f}, "
            f"{row['high']:+.3f}]{mark}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    a, t0 = arguments(argv), time.process_time()
    heads.need("scipy", "matplotlib")
    s = heads.load(a.checkpoint, a.device)
    t, out = heads.read_set(s, a.data, "pairs", a.limit), tables.out_folder(a, "patch", [s])
    which, fit = usable(s, t, a)
    content = tables.provenance([s], [t.path]) | dict(
        gate=heads.GATE, competent=fit, pairs=len(which), of=t.n
    )
    if not which:
        tables.write_json(out / "patch.json", content)
        return 1
    x = make_pairs(t, which, s.world.device)
    rows, clean, corrupt = by_place(s, x)
    group = [which.index(a.pair)] if a.pair is not None else largest_group(t, which, x)
    part = x.rows(np.array(oriented(t, which, group)))
    positions, grid, all_sites = by_position(s, part)
    content |= dict(
        clean_logit_difference=float(clean.mean()), corrupt_logit_difference=float(corrupt.mean())
    )
    content |= dict(
        map_pairs=[which[n] for n in group],
        map_example=[t.exprs[2 * which[group[0]] + j] for j in (0, 1)],
    )
    tables.write_json(out / "patch.json", content)
    tables.write_csv(out / "patch.csv", rows)
    tables.write_csv(out / "positions.csv", positions)
    mark = "" if fit else "; BELOW THE COMPETENCE GATE"
    title = (
        f"{len(group)} pairs of one form"
        if len(group) > 1
        else " against ".join(content["map_example"])
    )
    tables.write_figure(
        out / "positions.png",
        figures.position_figure(s, part, grid, all_sites, f"{s.name}: {title}{mark}"),
    )
    tables.write_figure(
        out / "places.png",
        figures.place_figure(s, rows, f"{s.name}: {len(which)} pairs, both ways{mark}"),
    )
    spent = time.process_time() - t0
    print(
        f"logit difference: clean {clean.mean():.2f}, corrupt {corrupt.mean():.2f}; {spent:.0f} "
        f"s CPU"
    )
    tell(rows, mark)
    return 0


if __name__ == "__main__":
    heads.launch(main)
