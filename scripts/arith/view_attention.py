"""view_attention.py -- where every head looks while the model reads one expression and writes its
value.

    python scripts/arith/view_attention.py --checkpoint runs/honest --expr '(12-7)+30'
    python scripts/arith/view_attention.py --checkpoint runs/honest --expr '12-(7+30)' --gold

A panel per head: rows look, columns are looked at; the text is the prompt and the model's own
greedy answer (--gold: the right one). A row's colours are its attention probabilities; they sum to
1. What a head looks at is not what it does: for that see eval_ablation.py and patch_heads.py.

Writes   attention.png, attention.svg and attention.json (tokens, answer, and the patterns as
         layer, head, row, column)
Raises   UserError: no such checkpoint or layer, no expression
"""

import argparse
import re
from collections.abc import Sequence

import lib_heads as heads
import lib_tables as tables
import numpy as np
import torch
from lib_heads import Subject

import arithmetic
from arithmetic import BOS, EOS
from plumbing import UserError

NAMES = {
    BOS: "^",
    EOS: "$",
    arithmetic.IDS[" "]: "_",
}  # what a token without a visible character is called


def read_and_answer(s: Subject, expr: str, gold: bool) -> tuple[list[int], str, int]:
    """The tokens to look at, the model's answer and the value. Raises UserError for what is no
    expression."""
    try:
        value = arithmetic.evaluate_expr(expr)
    except ValueError as error:
        raise UserError(f"--expr {expr!r}: {error}") from None
    problems = heads.as_read(s, [expr], [value], "--expr")
    start, text = int(problems.starts_N[0]), problems.tokens_NT[0, : problems.lengths_N[0]].tolist()
    (own,) = heads.generate(s, [text[:start]], len(text) - start + 2)
    return (text if gold else text[:start] + own), arithmetic.decode(own), value


def read_answer(text: str, answer_format: str) -> int | None:
    """The value that `text` writes; None where it writes none."""
    if answer_format == "plain":
        return int(text) if re.fullmatch(r"-?[0-9]+", text) else None
    if answer_format == "complement_bare" and text:
        text += "-" if text[-1] >= "5" else "+"
    if not re.fullmatch(r"[0-9]+[+-]", text):
        return None
    body = int(text[-2::-1])
    if text[-1] == "+":
        return body
    return -body if answer_format == "reversed" else body - 10 ** (len(text) - 1)


@torch.no_grad()
def patterns(s: Subject, tokens: Sequence[int]) -> np.ndarray:
    """(L, H, T, T) attention probabilities."""
    ids = torch.tensor([tokens], device=s.world.device)
    _, cache = s.model.run_with_cache(ids, lambda name: name.endswith("hook_pattern"))
    return torch.stack([cache["pattern", l][0] for l in range(s.cfg.n_layer)]).float().cpu().numpy()


def figure_of(
    s: Subject, x_LHTT: np.ndarray, layers: Sequence[int], names: Sequence[str], title: str
):
    H, T = x_LHTT.shape[1:3]
    side = max(1.7, 0.13 * T)
    figure, axes = tables.new_figure(0.6 + side * H, 0.8 + side * len(layers), len(layers), H)
    for row, layer in zip(axes, layers, strict=True):
        for head, panel in enumerate(row):
            image = panel.imshow(x_LHTT[layer, head], cmap="Blues", vmin=0, vmax=1)
            panel.set_title(f"L{layer}-H{head}", fontsize=8, pad=2)
            for set_ticks in (panel.set_xticks, panel.set_yticks):
                set_ticks(range(T), names, fontsize=5.5, family="monospace")
            panel.tick_params(length=1, pad=1)
    figure.colorbar(image, ax=axes, shrink=0.5).set_label("attention", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.supxlabel("looked at; rows look; ^ start, $ end, _ space", fontsize=8, color="0.3")
    return figure


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = heads.parser(__doc__, data=False)
    p.add_argument("--expr", required=True, metavar="TEXT", help="an expression without spaces")
    p.add_argument("--layer", type=int, metavar="N", help="this layer only; default: all")
    p.add_argument(
        "--gold", action="store_true", help="show the right answer's tokens, not the model's"
    )
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    a = arguments(argv)
    heads.need("matplotlib")
    s = heads.load(a.checkpoint, a.device)
    layers = range(s.cfg.n_layer) if a.layer is None else [a.layer]
    if a.layer is not None and not 0 <= a.layer < s.cfg.n_layer:
        raise UserError(
            f"--layer {a.layer}: {s.name} has layers 0 to {s.cfg.n_layer - 1}; choose one"
        )
    tokens, answer, value = read_and_answer(s, a.expr, a.gold)
    found = read_answer(answer, s.cfg.answer_format)
    says = f"{answer!r}" if found is None else str(found)
    verdict = "right" if found == value else "wrong"
    title = f"{s.name}: {a.expr} = {value}; the model says {says}, {verdict}"
    x_LHTT, names = patterns(s, tokens), [NAMES.get(i, arithmetic.decode([i])) for i in tokens]
    out = tables.out_folder(a, "attention", [s])
    content = tables.provenance([s], []) | dict(
        expr=a.expr, value=value, answer=answer, answer_value=found, tokens=names
    )
    tables.write_json(
        out / "attention.json", content | dict(patterns=np.round(x_LHTT.astype(float), 4).tolist())
    )
    tables.write_figure(out / "attention.png", figure_of(s, x_LHTT, layers, names, title))
    print(title)
    return 0


if __name__ == "__main__":
    heads.launch(main)
