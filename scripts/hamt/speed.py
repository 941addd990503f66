"""speed.py -- training speed, memory and decoding of untrained models of a preset."""

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import numpy as np
import torch
from comparison_tables import (
    cell,
    csv_of,
    facts,
    lines_figure,
    machine_line,
    markdown,
    save_figure,
    show,
)
from lib import benching, program, stats
from meters import RUNNING, Trainer, measure_apart, quartiles
from quality import FEED

import train_gpu
from plumbing import UserError, read_knobs


def preset_knobs(a: argparse.Namespace, mixer: str, T: int) -> train_gpu.Knobs:
    """train_gpu.py's knobs of a preset, with --knobs over them."""
    given = [f"--{part}" for part in a.knobs.split()]
    if wrong := [part for part in given if "=" not in part]:
        raise UserError(f"--knobs {a.knobs!r}: {wrong[0][2:]!r} is not of the form name=value")
    values = dict(preset=a.preset, mixer=mixer, device=a.device, sequence_length=T, dropout=0.0)
    values |= dict(precision=a.precision, use_auxiliary_loss=0)
    argv = [f"--{name}={value}" for name, value in values.items()] + given
    return read_knobs(train_gpu.Knobs, train_gpu.PRESETS, argv, {})


def training_speed(
    a: argparse.Namespace,
    mixers: Sequence[str],
    device: torch.device,
    keep: Callable[[list[dict]], None],
) -> list[dict]:
    """Training tokens/s at each length with the same tokens per step, the mixers taking turns: A B
    A B, then B A B A. With two, the ratio of the first to the second, and its 95% interval over the
    paired turns. keep(rows) is called after each length.
    """
    trainers = {mixer: Trainer(preset_knobs(a, mixer, max(a.lengths)), device) for mixer in mixers}
    rows = []
    for T in a.lengths:
        B, times = max(1, a.tokens_per_step // T), {mixer: [] for mixer in mixers}
        for turn in range(a.repeats + 1):
            for mixer in mixers if turn % 2 else mixers[::-1]:
                spent = trainers[mixer].step(B, T)
                if turn > 0:  # the first is a warm-up
                    times[mixer].append(spent)
        for mixer in mixers:
            row = speed_row(mixer, T, B, times)
            rows.append(row)
            first = next(r for r in rows if r["model"] == mixer)  # at the shortest length
            row["time_per_token"] = first["tokens_per_s"] / row["tokens_per_s"]
        keep(rows)
    return rows


def speed_row(mixer: str, T: int, B: int, times: dict[str, list[float]]) -> dict:
    """Of one mixer, from the seconds of all mixers' steps; the first one's has the ratio."""
    low, middle, high = quartiles([B * T / t for t in times[mixer]])
    row = dict(model=mixer, length=T, batch=B, tokens_per_s=middle, low=low, high=high)
    row["n"] = len(times[mixer])
    line = f"{mixer}, T={T}, B={B}: {middle:,.0f} tokens/s"
    if len(times) == 2 and mixer == next(iter(times)):
        other = list(times)[1]
        row |= ratio_of(times[other], times[mixer])
        span = f"({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        line += f", {row['ratio']:.3f} {span} of {other}"
    show(line)
    return row


def ratio_of(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Ratio of paired times, with its 95% interval: Student's, of the mean difference of
    logarithms."""
    test = stats.paired([math.log(t) for t in above], [math.log(t) for t in below])
    mean = float(np.mean(np.log(above) - np.log(below)))
    low, high = (math.exp(test.lo), math.exp(test.hi)) if test else (math.nan, math.nan)
    return dict(ratio=math.exp(mean), ratio_low=low, ratio_high=high)


def training_memory(a: argparse.Namespace, mixers: Sequence[str]) -> list[dict]:
    rows = []
    for mixer in mixers:
        for kept in (False, True):
            for T in a.lengths:
                k = dataclasses.replace(preset_knobs(a, mixer, T), gradient_checkpointing=kept)
                spec = dict(knobs=dataclasses.asdict(k), context=T, batch=a.memory_batch)
                name = f"{k.mixer}, {'with' if kept else 'no'} checkpointing"
                if found := measure_apart("training_memory", spec, a.device):
                    rows.append(dict(model=name, mixer=mixer, checkpointing=int(kept)) | found)
                    above = cell(found["above_mib"])
                    show(
                        f"{name}, T={T}: peak {found['peak_mib']:,.0f} MiB, {above} above weights "
                        f"and moments"
                    )
    return rows


def decoding(a: argparse.Namespace, mixers: Sequence[str]) -> list[dict]:
    rows = []
    for mixer in mixers:
        k = preset_knobs(a, mixer, FEED)
        subject = dict(knobs=dataclasses.asdict(k), label=k.mixer)
        spec = dict(
            subject=subject,
            contexts=a.decode_contexts,
            decode=a.decode,
            fed=a.fed,
            precision=a.precision,
        )
        for row in measure_apart("decoding", spec, a.device) or []:
            rows.append(dict(model=k.mixer) | row)
            show(
                f"{k.mixer}, {row['context']} tokens ({row['read']}): {row['decode_ms']:.2f} ms "
                f"per token, state {row['state_bytes']:,} bytes"
            )
    return rows


TRAINING = dict(
    model="mixer", length="length, tokens", batch="sequences", tokens_per_s="training, tokens/s"
)
TRAINING |= dict(
    low="quartile", high="quartile", n="n", ratio="ratio", ratio_low="95% from", ratio_high="to"
)
TRAINING |= dict(time_per_token="time per token, shortest = 1")
MEMORY = dict(
    model="mixer",
    context="length, tokens",
    batch="sequences",
    peak_mib="peak, MiB",
    base_mib="before it, MiB",
)
MEMORY |= dict(above_mib="above that, MiB")
DECODING = dict(
    model="mixer", context="context, tokens", read="context is", decode_ms="decode, ms per token"
)
DECODING |= dict(
    decode_ms_low="quartile", decode_ms_high="quartile", n="n", state_bytes="state, bytes"
)
DECODING |= dict(peak_mib="peak, MiB")
# By part: the table's columns, the figure's x and its label, the figure's panels.
LENGTH = "sequence length (tokens)"
TABLES = dict(training=(TRAINING, "length", LENGTH, dict(tokens_per_s="training\n(tokens/s)")))
PEAKS = dict(peak_mib="peak (MiB)", above_mib="above weights and\nmoments (MiB)")
TABLES |= dict(training_memory=(MEMORY, "context", LENGTH, PEAKS))
STEPS = dict(decode_ms="decode\n(ms per token)", state_mib="state\n(MiB)")
TABLES |= dict(decoding=(DECODING, "context", "tokens so far", STEPS))


def write_part_of(
    out: Path, part: str, rows: list[dict], title: str, start: dict[str, object]
) -> str:
    """The files of a part, as soon as it is done; its table."""
    columns, x, label, panels = TABLES[part]
    program.write_whole(out / f"{part}.csv", csv_of(rows))
    benching.write_part(out / f"speed_{part}.json", start | {"rows": rows})
    drawn = rows
    if part == "decoding":
        drawn = [row | dict(state_mib=row["state_bytes"] / 2**20) for row in rows]
    save_figure(out, part, lines_figure(drawn, panels, x, label, title, machine_line(start)))
    return f"\n{markdown(rows, columns)}"


def speed_only(a: argparse.Namespace, out: Path) -> None:
    mixers = ("hamt", "attention") if a.mixer == "both" else (a.mixer,)
    device, start, done = torch.device(a.device), facts(a), []
    with tempfile.TemporaryDirectory() as folder:
        # --deadline_s, Ctrl-C and SIGTERM end this process and those that measure for it
        benching.stop_at_once(Path(folder), RUNNING, done, a.deadline_s)
        sizes = {}
        for mixer in mixers:
            with torch.device("meta"):
                model = train_gpu.Model(preset_knobs(a, mixer, FEED))
            sizes[mixer] = sum(p.numel() for p in model.parameters())
        words = [f"{mixer} {size:,} parameters" for mixer, size in sizes.items()]
        title = f"{f'{a.preset} {a.knobs}'.strip()}: {', '.join(words)}"
        show(f"{title}\n{machine_line(start)}")
        page = f"{title}, untrained. {machine_line(start)}.\n"
        for part in a.parts:
            if part == "training":
                path = out / "speed_training.json"
                keep = lambda rows, path=path: benching.write_part(
                    path, start | {"sizes": sizes, "rows": rows}
                )
                rows = training_speed(a, mixers, device, keep)
            elif part == "training_memory":
                rows = training_memory(a, mixers)
            else:
                rows = decoding(a, mixers)
            if rows:
                page += write_part_of(out, part, rows, title, start | {"sizes": sizes})
                program.write_whole(out / "speed.md", page)
                done.append(part)
        show(f"\n{page}")
