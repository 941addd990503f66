"""position_curve.py -- bits per byte against position in long texts: what the memory adds.

    python scripts/scaled/position_curve.py --run ID --window_run ID2
    python scripts/scaled/position_curve.py --weights best_model_scaled.pth --text held_out.txt
    python scripts/scaled/position_curve.py --run ID --full_attention_run ID3

The text is cut into documents of LENGTH bytes (or at --separator), each read from an empty state to
its end, in constant memory. Every byte counts once; the first four of a document, which no model
scores, count 8 bits each. Means over bins of position, with intervals by bootstrap over documents;
differences are of the same documents.

Models   full; memory zeroed: the same weights with the memory silent; latent zeroed: with nothing
         of the blocks in the decoder; window only: trained without a memory; full attention: in
         pieces of its own SEQUENCE_LENGTH, behind which it was never trained
Prints   bits per byte and per character of the whole text, beside xz -9e, bz2 -9, zstd -22 and PPMd
         on the same bytes. These compressors have seen no training text
Files    OUT.csv a line per model and bin, OUT.json, OUT.png if matplotlib is there
Raises   UserError: a bad flag, no weights, no text, a text shorter than a patch, no GPU
"""

import argparse
import bz2
import itertools
import lzma
import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import byte_models as lib
import numpy as np
import torch
from byte_models import PATCH, ByteLM, UserError

from plumbing import launch

FIRST_BIN = 64  # bytes; each later bin is twice as wide
UNSCORED = 8.0  # bits of a byte that nobody predicts
PIECE = 4096  # bytes of a forward
DRAWS = 2000  # of the bootstrap


# ----------------------------------------------------------------------------
# Bits


def documents(text: bytes, length: int, separator: bytes | None) -> list[bytes]:
    """Pieces of the text that hold all of its bytes: of `length`, the last one shorter, or cut
    behind `separator`.
    """
    if separator is None:
        return [text[at : at + length] for at in range(0, len(text), length)]
    pieces = text.split(separator)
    return [
        piece + separator * (i + 1 < len(pieces))
        for i, piece in enumerate(pieces)
        if piece or i + 1 < len(pieces)
    ]


@torch.no_grad()
def read_bits(
    model: ByteLM, docs: Sequence[bytes], rows: int, restart: int | None
) -> list[np.ndarray]:
    """Bits of every byte of each document, fp64. `restart`: bytes after which the model's state is
    emptied.
    """
    device, out = model.plasticity.device, [np.full(len(doc), UNSCORED) for doc in docs]
    order = sorted(
        range(len(docs)), key=lambda i: len(docs[i])
    )  # documents of about one length side by side
    for lo in range(0, len(docs), rows):
        some = order[lo : lo + rows]
        longest = max(len(docs[i]) for i in some)
        size = restart or -(-longest // PATCH) * PATCH
        for start in range(0, longest, size):
            state = model.empty_state(len(some))
            for at in range(start, min(start + size, longest), PIECE):
                stop = min(at + PIECE, start + size, -(-longest // PATCH) * PATCH)
                x, y = (
                    np.zeros((len(some), stop - at), np.int64),
                    np.full((len(some), stop - at), -1),
                )
                for row, i in enumerate(some):
                    doc = np.frombuffer(docs[i], np.uint8)
                    seen, due = (
                        doc[at:stop],
                        doc[at + PATCH : min(stop, start + size - PATCH) + PATCH],
                    )
                    x[row, : len(seen)], y[row, : len(due)] = seen, due
                nll, state = model(
                    torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), state
                )
                bits = nll.double().cpu().numpy() / math.log(2)
                for row, i in enumerate(some):
                    n = int((y[row] >= 0).sum())
                    out[i][at + PATCH : at + PATCH + n] = bits[row, :n]
    return out


def edges(longest: int) -> list[int]:
    """0, 64, 128, 256, .., longest."""
    out = [0, FIRST_BIN]
    while out[-1] < longest:
        out.append(out[-1] * 2)
    return [*(e for e in out if e < longest), longest]


def by_bin(bits: Sequence[np.ndarray], at: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Summed bits and number of bytes, (documents, bins)."""
    sums, counts = np.zeros((len(bits), len(at) - 1)), np.zeros((len(bits), len(at) - 1))
    for i, doc in enumerate(bits):
        for j, (lo, hi) in enumerate(itertools.pairwise(at)):
            sums[i, j], counts[i, j] = doc[lo:hi].sum(), len(doc[lo:hi])
    return sums, counts


def bootstrap(
    sums_DJ: np.ndarray, counts_DJ: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of the columns, and the ends of their 95% intervals over documents (percentiles; nan
    with one document).
    """
    means = sums_DJ.sum(0) / np.maximum(counts_DJ.sum(0), 1)
    if len(sums_DJ) < 2:
        return means, np.full_like(means, np.nan), np.full_like(means, np.nan)
    rng, draws = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        weight = np.bincount(rng.integers(len(sums_DJ), size=len(sums_DJ)), minlength=len(sums_DJ))
        n = weight @ counts_DJ
        draws.append(np.where(n > 0, weight @ sums_DJ / np.maximum(n, 1), np.nan))
    low, high = np.nanpercentile(np.stack(draws), [2.5, 97.5], axis=0)
    return means, low, high


# ----------------------------------------------------------------------------
# Compressors


def compressed(text: bytes) -> dict[str, tuple[int | None, str]]:
    """Bytes that each compressor makes of the text, and which program it was; None where there is
    none.
    """
    found = {"xz -9e": (len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)), "Python's lzma")}
    found["bz2 -9"] = len(bz2.compress(text, 9)), "Python's bz2"
    if zstd := shutil.which("zstd"):
        done = subprocess.run(
            [zstd, "--ultra", "-22", "-c"], input=text, capture_output=True, check=True
        )
        found["zstd -22"] = len(done.stdout), "the program zstd"
    else:
        found["zstd -22"] = None, "no program zstd here"
    try:
        import pyppmd  # optional: the best of these on text

        found["PPMd"] = (
            len(pyppmd.compress(text, max_order=16, mem_size=256 << 20)),
            "pyppmd, variant H, order 16",
        )
    except ImportError:
        found["PPMd"] = None, "pip install pyppmd to have it"
    return found


# ----------------------------------------------------------------------------
# Program


def curves(bits: dict[str, list[np.ndarray]], at: list[int], seed: int) -> list[dict[str, object]]:
    """A row per model and bin: its bits per byte, and full minus it on the same documents."""
    rows, cells = [], {name: by_bin(found, at) for name, found in bits.items()}
    for name, (sums, counts) in cells.items():
        mean, low, high = bootstrap(sums, counts, seed)
        lead, lead_low, lead_high = bootstrap(sums - cells["full"][0], counts, seed)
        for j, (lo, hi) in enumerate(itertools.pairwise(at)):
            row = dict(
                model=name,
                position_from=lo,
                position_to=hi,
                documents=int((counts[:, j] > 0).sum()),
            )
            row |= dict(
                bytes=int(counts[:, j].sum()), bits_per_byte=mean[j], low=low[j], high=high[j]
            )
            row |= dict(
                above_full=lead[j], above_full_low=lead_low[j], above_full_high=lead_high[j]
            )
            rows.append(row)
    return rows


def totals(
    bits: dict[str, list[np.ndarray]], text: bytes, characters: int, seed: int
) -> list[dict[str, object]]:
    """Bits per byte and per character of the whole text: models, and what each needs more than the
    full one; then compressors.
    """
    rows = []
    sums = {name: np.array([[doc.sum()] for doc in found]) for name, found in bits.items()}
    counts = np.array([[len(doc)] for doc in bits["full"]], float)
    for name in bits:
        mean, low, high = (float(v[0]) for v in bootstrap(sums[name], counts, seed))
        row = dict(name=name, bits_per_byte=mean, low=low, high=high)
        more = bootstrap(sums[name] - sums["full"], counts, seed)
        row["above_full"], row["above_full_low"], row["above_full_high"] = (
            float(v[0]) for v in more
        )
        rows.append(row | dict(bits_per_char=mean * len(text) / characters))
    for name, (size, program) in compressed(text).items():
        bpb = math.nan if size is None else 8 * size / len(text)
        rows.append(
            dict(
                name=name,
                bits_per_byte=bpb,
                bits_per_char=bpb * len(text) / characters,
                program=program,
            )
        )
    return rows


def draw(path: Path, rows: list[dict[str, object]], reach: int | None, source: str) -> None:
    """Two panels: bits per byte, and what each control needs more."""
    from lib import plots

    figure, (top, bottom) = plots.new_figure(5.4, 2, sharex=True)
    for i, name in enumerate(dict.fromkeys(r["model"] for r in rows)):
        own = [r for r in rows if r["model"] == name and r["bytes"]]
        x, style = (
            [math.sqrt(max(r["position_from"], 16) * r["position_to"]) for r in own],
            plots.style_of(i),
        )
        for axes, keys in (
            (top, "bits_per_byte low high"),
            (bottom, "above_full above_full_low above_full_high"),
        ):
            if axes is bottom and name == "full":
                continue
            y, low, high = ([r[key] for r in own] for key in keys.split())
            axes.plot(x, y, label=name, **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    bottom.axhline(0, color="0.4", linewidth=1)
    for axes in (top, bottom):
        if reach:
            axes.axvline(reach, color="0.5", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
    top.set_ylabel("bits per byte", fontsize=10)
    bottom.set_ylabel("more than the full\nmodel (bits per byte)", fontsize=10)
    bottom.set_xlabel("position in the document (bytes)", fontsize=10)
    n = max(r["documents"] for r in rows)
    words = (
        f"{n} documents of {Path(source).name}; band: 95%, bootstrap over documents; dotted: reach "
        f"of the windows"
    )
    plots.finish(figure, [top, bottom], "Bits per byte by position", words)
    plots.add_legend(top, bottom, len(top.lines))
    path.write_bytes(plots.figure_bytes(figure, "png"))


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    lib.add_model_options(p)
    p.add_argument(
        "--full_attention_run",
        metavar="ID",
        help="a run with SLIDING_WINDOW=off, a row of the table",
    )
    p.add_argument("--full_attention_weights", metavar="FILE", help="or a .pth itself")
    p.add_argument(
        "--text",
        metavar="PATH",
        help="held-out text; default: the Turkish one, else the embedded corpus'",
    )
    p.add_argument(
        "--length", type=int, default=65536, metavar="N", help="bytes of a document (65536)"
    )
    p.add_argument(
        "--separator",
        metavar="TEXT",
        help="cut documents behind this text instead, such as '\\n\\n'",
    )
    p.add_argument(
        "--rows", type=int, default=8, metavar="B", help="documents read side by side (8)"
    )
    p.add_argument("--no_figure", action="store_true", help="tables only")
    a = lib.finish_options(p, argv, "position_curve")
    if a.length < PATCH or a.length % PATCH or a.rows < 1:
        raise UserError(
            f"--length {a.length} --rows {a.rows}: expected a multiple of {PATCH} bytes, and 1 row "
            f"or more"
        )
    if not (a.run or a.weights):
        raise UserError("no model: name one with --run ID or --weights FILE")
    return a


def read_models(a: argparse.Namespace, device: torch.device) -> dict[str, ByteLM]:
    models = {}
    for name, kind in (
        ("full", ""),
        ("window only", "window_"),
        ("full attention", "full_attention_"),
    ):
        run, weights = (getattr(a, kind + word) for word in ("run", "weights"))
        if run or weights:
            models[name] = lib.load(lib.weights_path(a.logs_folder, run, weights), device)
    if models["full"].cfg.memory == "on":
        models["memory zeroed"] = lib.other_memory(models["full"], "zero")
    models["latent zeroed"] = lib.without_latent(models["full"])
    if "window only" in models and models["window only"].cfg.memory == "on":
        raise UserError(
            "--window_run/--window_weights: a model with MEMORY=on is no window-only control"
        )
    if "full attention" in models and models["full attention"].cfg.sliding_window is not None:
        raise UserError(
            "--full_attention_run: that model has a window; name a run with SLIDING_WINDOW=off"
        )
    return models


def read_all(
    models: dict[str, ByteLM], docs: Sequence[bytes], rows: int, device: torch.device
) -> tuple[dict[str, list[np.ndarray]], dict[str, float]]:
    """Each model's bits of every byte, and the seconds that it took."""
    bits, seconds = {}, {}
    for name, model in models.items():
        started = lib.clock(device)
        restart = model.cfg.sequence_length if model.cfg.sliding_window is None else None
        bits[name] = read_bits(model, docs, rows, restart)
        seconds[name] = lib.clock(device) - started
    return bits, seconds


def interval(row: dict[str, object], key: str, ends: str) -> str:
    return f"{row[key]:.4f} [{row[ends + 'low']:.4f}, {row[ends + 'high']:.4f}]"


def show(rows: list[dict[str, object]], total: list[dict[str, object]]) -> None:
    """The table by position, and that of the whole text."""
    shown = [("model", "position", "n", "bits per byte [95%]", "above full [95%]")]
    for row in rows:
        lead = "" if row["model"] == "full" else interval(row, "above_full", "above_full_")
        place = f"{row['position_from']}-{row['position_to']}"
        bits = interval(row, "bits_per_byte", "")
        shown.append((row["model"], place, row["documents"], bits, lead))
    lib.show_table(shown)
    shown = [("whole text", "bits per byte", "bits per character", "above full [95%]")]
    for row in total:
        by_byte, by_char = f"{row['bits_per_byte']:.4f}", f"{row['bits_per_char']:.4f}"
        if "program" in row:
            last = row["program"]
        else:
            last = "" if row["name"] == "full" else interval(row, "above_full", "above_full_")
        shown.append((row["name"], by_byte, by_char, last))
    lib.show_table(shown)


def main(argv: Sequence[str] | None = None) -> None:
    a = read_options(argv)
    device = lib.check_device(a.device)
    text, source = lib.read_text(a.text)
    if len(text) <= PATCH:
        raise UserError(f"{source}: {len(text)} bytes; expected more than a patch of {PATCH}")
    separator = None
    if a.separator:
        separator = a.separator.encode().decode("unicode_escape").encode("latin-1")
    docs = documents(text, a.length, separator)
    models = read_models(a, device)
    bits, seconds = read_all(models, docs, a.rows, device)
    characters = sum(b & 0xC0 != 0x80 for b in text)
    rows = curves(bits, edges(max(map(len, docs))), a.seed)
    total = totals(bits, text, characters, a.seed)
    far = lib.reach(models["full"].cfg)
    reach = "everything" if far is None else f"{PATCH * far:,} bytes"
    print(f"{source}: {len(text):,} bytes, {characters:,} characters, {len(docs)} documents")
    print(f"windows reach {reach}; n: documents in the bin")
    show(rows, total)
    found = dict(text=source, bytes=len(text), characters=characters, documents=len(docs))
    num_params = {name: lib.n_params(model) for name, model in models.items()}
    found |= dict(seconds=seconds, n_params=num_params, reach_patches=far, totals=total)
    lib.write_results(a.out, rows, lib.facts(a, **found))
    if not a.no_figure:
        draw(a.out.with_suffix(".png"), rows, far and PATCH * far, source)


if __name__ == "__main__":
    launch(main)
