"""compare_baselines.py -- train_gpu.py's models beside attention and published models: quality,
speed, memory, state.

    python scripts/hamt/compare_baselines.py --run HAMT_ID ATTENTION_ID                  with
    gpt2 and distilgpt2
    python scripts/hamt/compare_baselines.py --hamt_checkpoint logs/ID/step_001000 --baselines
    gpt2 pythia-160m --device cuda
    python scripts/hamt/compare_baselines.py --run ID --baselines none --dataset
    ../shared/data/wikitext2 --max_samples 200
    python scripts/hamt/compare_baselines.py --speed_only --preset 33m --mixer both     training,
    memory, decoding, untrained

All models read the same text in the same windows; each is scored on all of its own tokens but
the first, and the summed
loss is then divided by tokens, words and bytes: only the last two compare models with different
tokenizers. Published
models are looked for on this machine first, then on the hub; one that cannot be had is one line,
and left out.

Writes   OUTPUT_DIR/quality.csv, inference.csv, comparison.md, comparison.json and figures as PNG
and SVG;
         --speed_only: training.csv, training_memory.csv, decoding.csv, speed.md, speed.json and
         figures
Shapes   B sequences, T tokens, V vocabulary
Units    losses in nats; a CPU's times are CPU time of the process, a GPU's are synchronised
seconds; memory in MiB is
         the process's peak resident memory, or max_memory_allocated on a GPU, each in a process
         of its own
Raises   UserError: no such run, another program's, a text that is not there, a bad flag
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import torch
from comparison_tables import (
    csv_of,
    facts,
    lines_figure,
    machine_line,
    markdown,
    quality_figure,
    save_figure,
    show,
)
from lib import program
from lib import runs as lib
from meters import CHILDREN, measure_apart
from quality import PRECISIONS, quality, raw_text
from speed import speed_only
from subjects import Ours, Subject, n_params, open_subject

import train_gpu
from plumbing import UserError
from plumbing.world import launch

NOTE = (
    "Note: GPT-2's published 29.41 is WikiText-2 and 37.50 is WikiText-103, both zero-shot, per word, on de-tokenised "
    "text; published models are zero-shot here too, on the text as it stands."
)


def find_path(name: str, logs: Path) -> Path:
    """The checkpoint that a run id, a run's folder or a checkpoint's folder names."""
    path = Path(name)
    if path.name.startswith("step_") and path.is_dir():
        return lib.find_checkpoint(path.parent, path.name)
    return lib.find_checkpoint(path if path.is_dir() else lib.find_run(logs, name))


def specs_of(a: argparse.Namespace) -> list[dict]:
    """All models asked for, ours first. An untrained attention model stands beside ours where
    none is given."""
    paths = [
        find_path(name, Path(a.logs_folder))
        for name in [*(a.run or []), *(a.hamt_checkpoint or [])]
    ]
    specs = [dict(path=str(path)) for path in dict.fromkeys(paths)]
    knobs = [Ours(spec, torch.device("cpu")).cfg for spec in specs]
    for spec, k in zip(specs, knobs, strict=True):
        spec["label"] = f"{Path(spec['path']).parent.name} ({k.mixer})"
    if knobs and not any(k.mixer == "attention" for k in knobs):
        try:
            k = attention_beside(knobs[0])
            specs.append(
                dict(
                    knobs=dataclasses.asdict(k),
                    label="attention of the same size (untrained: speed only)",
                )
            )
        except ValueError as error:
            show(f"attention of the same size: left out, {error}")
    names = [name for name in dict.fromkeys(a.baselines) if name != "none"]
    return specs + [
        dict(name=name, offline=a.offline, label=f"{name} (zero-shot)") for name in names
    ]


def attention_beside(k: train_gpu.Knobs) -> train_gpu.Knobs:
    return dataclasses.replace(
        k, mixer="attention", memory="on", use_auxiliary_loss=False, conv=None
    )


def opened(specs: Sequence[dict], device: torch.device) -> Iterator[tuple[dict, Subject]]:
    """One model after the other, none kept; those that cannot be had are a line each."""
    for spec in specs:
        try:
            subject = open_subject(spec, device)
        except UserError as error:
            if "name" not in spec:
                raise
            show(f"{spec['name']}: left out, {error}")
            continue
        yield spec, subject


def window_of(a: argparse.Namespace, subjects: Sequence[tuple[dict, dict]]) -> tuple[int, int]:
    """Window and stride for all: by default the shortest context among the models, without
    overlap."""
    window = a.window or min(facts["context"] for _, facts in subjects)
    stride = a.stride or window
    if stride > window:
        raise UserError(
            f"--stride {stride} is more than --window {window}: tokens would be left out; use up to {window}"
        )
    for spec, found in subjects:
        if found["limit"] and window > found["limit"]:
            raise UserError(
                f"--window {window}: {spec['label']} takes {found['limit']} tokens at most"
            )
    return window, stride


QUALITY = dict(
    model="model", mixer="mixer", parameters="parameters", tokens="tokens", nats="summed loss, nats"
)
QUALITY |= dict(ppl="ppl per token", word_ppl="ppl per word", bits_per_byte="bits per byte")
QUALITY |= dict(stream_ppl="streamed: ppl per token", stream_word_ppl="ppl per word")
QUALITY |= dict(stream_bits_per_byte="bits per byte")
INFERENCE = dict(model="model", context="context, tokens", prefill_tokens_per_s="prefill, tokens/s")
INFERENCE |= dict(
    decode_ms="decode, ms per token", state_bytes="state, bytes", peak_mib="peak, MiB"
)
INFERENCE |= dict(base_mib="before it, with weights, MiB", above_mib="above that, MiB")


def compare(a: argparse.Namespace, out: Path) -> None:
    device, specs = torch.device(a.device), specs_of(a)
    found = []  # what can be had, and its size
    for spec, s in opened(specs, device):
        found.append(
            (spec, dict(limit=s.limit, context=s.context, mixer=s.mixer, parameters=n_params(s)))
        )
        del s
    trained = [(spec, f) for spec, f in found if "knobs" not in spec]
    if not trained:
        raise UserError(
            "no model to compare: give --run ID, or --baselines whose weights are at hand"
        )
    window, stride = window_of(a, trained)
    k = next(
        (Ours(s, torch.device("cpu")).cfg for s in specs if "path" in s),
        train_gpu.Knobs(data="wikitext-2"),
    )
    changes = dict(data=a.dataset, data_folder=a.data_folder)
    changes = {name: value for name, value in changes.items() if value}
    a.dataset = changes.get("data", k.data)
    text, words = raw_text(dataclasses.replace(k, **changes), a.split, a.max_samples)
    show(
        f"{a.dataset}, {a.split}: {words:,} words, {len(text.encode()):,} bytes; window {window}, stride {stride}"
    )

    rows, speeds = [], []
    for spec, f in found:
        row = dict(model=spec["label"], mixer=f["mixer"], parameters=f["parameters"])
        if "knobs" not in spec:
            row |= quality(open_subject(spec, device), text, words, a, window, stride)
            show(f"{row['model']}: {row['ppl']:.3f} per token, {row['word_ppl']:.3f} per word, "
                 f"{row['bits_per_byte']:.4f} bits per byte")  # fmt: skip
        rows.append(row)
        for T in a.contexts if not a.quality_only else []:
            if f["limit"] and f["limit"] < T:
                show(
                    f"  {spec['label']}: context {T} left out, it takes {f['limit']} tokens at most"
                )
                continue
            more = dict(
                subject=spec, context=T, decode=a.decode, repeats=a.repeats, precision=a.precision
            )
            if speed := measure_apart("inference", more, a.device):
                speeds.append(dict(model=spec["label"]) | speed)
    write_comparison(a, out, rows, speeds, words, len(text.encode()))


def write_comparison(
    a: argparse.Namespace, out: Path, rows: list[dict], speeds: list[dict], words: int, n_bytes: int
) -> None:
    start = facts(a)
    scored_rows = [row for row in rows if "nats" in row]
    window, stride = scored_rows[0]["window"], scored_rows[0]["stride"]
    text = f"{a.dataset}, {a.split} split: {words:,} words with line ends, {n_bytes:,} bytes"
    page = f"{text}. Window {window} tokens, stride {stride}, all tokens but the first.\n\n{markdown(rows, QUALITY)}"
    page += f"\n{NOTE}\n"
    if speeds:
        page += f"\nOne sequence, {machine_line(start)}; memory is each process's own.\n\n{markdown(speeds, INFERENCE)}"
    show(f"\n{page}")
    program.write_whole(out / "comparison.md", page)
    program.write_whole(out / "quality.csv", csv_of(rows))
    everything = start | dict(text=text, quality=rows, inference=speeds, note=NOTE)
    program.write_whole(out / "comparison.json", json.dumps(everything, indent=1) + "\n")
    save_figure(
        out, "quality", quality_figure(scored_rows, f"{Path(a.dataset).name}, {a.split} split")
    )
    if speeds:
        program.write_whole(out / "inference.csv", csv_of(speeds))
        panels = dict(
            prefill_tokens_per_s="prefill\n(tokens/s)", decode_ms="decode\n(ms per token)"
        )
        panels |= dict(peak_mib="peak memory\n(MiB)", state_mib="decode state\n(MiB)")
        drawn = [row | dict(state_mib=row["state_bytes"] / 2**20) for row in speeds]
        figure = lines_figure(
            drawn, panels, "context", "context (tokens)", "one sequence", machine_line(start)
        )
        save_figure(out, "inference", figure)


def numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers above 0, with commas")
    return found


def one_number(text: str) -> int:
    if len(found := numbers(text)) != 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one whole number above 0")
    return found[0]


PARTS = ("training", "training_memory", "decoding")


def some_parts(text: str) -> list[str]:
    if wrong := [part for part in text.split(",") if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {wrong[0]!r}; there are {', '.join(PARTS)}")
    return text.split(",")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    both = lambda name: dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    add = lambda name, **more: p.add_argument(*both(name), **more)
    add("run", nargs="+", metavar="ID", help="runs of train_gpu.py, HAMT and attention alike")
    add(
        "hamt_checkpoint",
        nargs="+",
        metavar="PATH",
        help="the same by the folder of a run or of a checkpoint",
    )
    add("baselines", nargs="+", default=["distilgpt2", "gpt2"], metavar="NAME",
        help="gpt2, gpt2-medium, distilgpt2, pythia-160m, ..., a folder with weights, or none")  # fmt: skip
    add("offline", action="store_true", help="published models from this machine only")
    add(
        "dataset",
        metavar="X",
        help="as of train_gpu.py; default: that of the first run, else wikitext-2",
    )
    add(
        "data_folder",
        metavar="DIR",
        help="downloaded texts and token shards; default: that of the first run",
    )
    add("split", choices=("val", "test"), default="test")
    add(
        "max_samples",
        type=one_number,
        metavar="N",
        help="lines of text at most that are not empty (all)",
    )
    add(
        "window",
        type=one_number,
        metavar="T",
        help="tokens of a window; default: the shortest context",
    )
    add(
        "stride",
        type=one_number,
        metavar="T",
        help="tokens that a later window scores; default: the window",
    )
    add("batch_size", type=one_number, default=1, metavar="N", help="windows at a time (1)")
    add("precision", choices=tuple(PRECISIONS), default="fp32", help="autocast")
    add("device", choices=("cpu", "cuda"), default="cpu")
    add(
        "contexts",
        type=numbers,
        default=[256, 512, 1024],
        metavar="T,...",
        help="for speed and memory (256,512,1024)",
    )
    add(
        "decode",
        type=one_number,
        default=16,
        metavar="N",
        help="tokens decoded at each context (16)",
    )
    add("repeats", type=one_number, default=5, metavar="N", help="measurements of each time (5)")
    add("quality_only", action="store_true", help="no speed, no memory")
    add("logs_folder", default=str(program.default_logs()), metavar="DIR")
    add("output_dir", metavar="DIR", help="default: experiments/comparison/<date and time>")
    add("speed_only", action="store_true", help="measure untrained models of a preset instead")
    add("preset", choices=tuple(train_gpu.PRESETS), default="33m", help="of train_gpu.py (33m)")
    add("mixer", choices=("both", "hamt", "attention"), default="both")
    add("knobs", default="", metavar='"NAME=VALUE ..."', help="more of train_gpu.py's knobs")
    add(
        "parts",
        type=some_parts,
        default=list(PARTS),
        metavar="X,...",
        help=f"some of {', '.join(PARTS)}",
    )
    add(
        "lengths",
        type=numbers,
        default=[128, 256, 512, 1024, 2048, 4096],
        metavar="T,...",
        help="of training",
    )
    add(
        "tokens_per_step",
        type=one_number,
        default=4096,
        metavar="N",
        help="the same at every length (4096)",
    )
    add(
        "memory_batch",
        type=one_number,
        default=1,
        metavar="N",
        help="sequences where memory is measured (1)",
    )
    add(
        "decode_contexts",
        type=numbers,
        default=[2**i * 1024 for i in range(7)],
        metavar="T,...",
        help="1k to 64k",
    )
    add(
        "fed",
        type=one_number,
        default=4096,
        metavar="T",
        help="longer caches of full attention are drawn (4096)",
    )
    add("child", help=argparse.SUPPRESS)
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    a = arguments(argv)
    if a.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device cuda, but torch {torch.__version__} sees no CUDA GPU; leave it out to use the CPU"
        )
    if a.child:
        what, spec = json.loads(a.child)
        print(json.dumps(CHILDREN[what](spec, torch.device(a.device))))
        return
    if not a.speed_only and min(a.contexts) <= a.decode:
        raise UserError(f"--contexts {min(a.contexts)} must be longer than --decode {a.decode}")
    default = program.ROOT / f"experiments/comparison/{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    out = Path(a.output_dir or default)
    try:
        program.need("matplotlib.figure", "a figure")  # said before anything is measured
        (speed_only if a.speed_only else compare)(a, out)
    except program.UserError as error:
        raise UserError(error) from None
    show(f"\n{out}")


if __name__ == "__main__":
    launch(main)
