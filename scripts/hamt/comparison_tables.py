"""comparison_tables.py -- tables and figures of comparisons, and the facts that go with them."""

import argparse
import csv
import io
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from lib import plots, program


def show(line: str = "") -> None:
    print(line, flush=True)


def cell(value: object) -> str:
    """A number as a table shows it."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def markdown(rows: Sequence[dict], columns: Mapping[str, str]) -> str:
    """A table of these columns, headed as the mapping says; numbers to the right. Columns that
    no row has are out."""
    columns = {
        name: head
        for name, head in columns.items()
        if any(row.get(name) is not None for row in rows)
    }
    numeric = {name for name in columns if not any(isinstance(row.get(name), str) for row in rows)}
    lines = ["| " + " | ".join(columns.values()) + " |"]
    lines.append("|" + "|".join("---:" if name in numeric else "---" for name in columns) + "|")
    return (
        "\n".join(
            lines
            + ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows]
        )
        + "\n"
    )


def csv_of(rows: Sequence[dict]) -> str:
    """CSV with the columns of all rows, in the order in which they first occur."""
    out = io.StringIO()
    writer = csv.DictWriter(
        out, list(dict.fromkeys(n for row in rows for n in row)), restval="", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(
        {name: "" if value is None else value for name, value in row.items()} for row in rows
    )
    return out.getvalue()


def lines_figure(
    rows: Sequence[dict], panels: Mapping[str, str], x: str, label: str, title: str, caption: str
):
    """A panel per column, one above the other, over a shared logarithmic x: a line for each
    model."""
    figure, all_axes = plots.new_figure(0.9 + 2.1 * len(panels), len(panels), sharex=True)
    names = list(dict.fromkeys(row["model"] for row in rows))
    for axes, (column, text) in zip(all_axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            points = sorted(
                (row[x], row[column])
                for row in rows
                if row["model"] == name and row.get(column) is not None
            )
            if points:
                axes.plot(*zip(*points, strict=True), label=plots.plain(name), **plots.style_of(i))
        axes.set_ylabel(text, fontsize=9)
        axes.set_ylim(bottom=0)
    ticks = sorted({row[x] for row in rows})
    all_axes[-1].set_xscale("log", base=2)
    all_axes[-1].set_xticks(
        ticks, [f"{t // 1024}k" if t % 1024 == 0 and t > 1024 else str(t) for t in ticks]
    )
    all_axes[-1].minorticks_off()
    all_axes[-1].set_xlabel(label, fontsize=10)
    plots.finish(figure, all_axes, title, caption)
    plots.add_legend(all_axes[0], all_axes[-1], len(names))
    return figure


def quality_figure(rows: Sequence[dict], title: str):
    """Bits per byte of each model, a line of text with its size for each, from top to bottom."""
    figure, (axes,) = plots.new_figure(1.4 + 0.45 * len(rows))
    for i, row in enumerate(rows):
        axes.plot(row["bits_per_byte"], i, **plots.style_of(i) | dict(linestyle="", markersize=7))
        axes.annotate(
            f"{row['bits_per_byte']:.3f}",
            (row["bits_per_byte"], i),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    names = [
        f"{plots.plain(row['model'])}\n{row['parameters'] / 1e6:.1f} million parameters"
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.margins(x=0.1)
    axes.set_xlabel("bits per byte (lower is better; the axis does not begin at zero)", fontsize=10)
    how = (
        f"window {rows[0]['window']} tokens, stride {rows[0]['stride']}; published models are "
        f"zero-shot"
    )
    plots.finish(figure, [axes], title, how)
    return figure


def save_figure(out: Path, name: str, figure) -> None:
    for kind in ("png", "svg"):
        program.write_whole(out / f"{name}.{kind}", plots.figure_bytes(figure, kind))


def facts(a: argparse.Namespace) -> dict:
    """With what, where and when."""
    device = torch.cuda.get_device_name() if a.device == "cuda" else f"CPU ({os.cpu_count()} cores)"
    commit = subprocess.run(
        ["git", "-C", str(program.ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    found = dict(command=shlex.join(sys.orig_argv), git_commit=commit.stdout.strip() or "unknown")
    found |= dict(
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}",
        device=device,
        torch=torch.__version__,
    )
    return found | dict(
        threads=torch.get_num_threads(), load=os.getloadavg()[0], precision=a.precision
    )


def machine_line(found: Mapping[str, object]) -> str:
    clock = "process CPU time" if str(found["device"]).startswith("CPU") else "synchronised seconds"
    threads = f"{found['threads']} thread(s), " if clock == "process CPU time" else ""
    return (
        f"{found['device']}, {threads}torch {found['torch']}, {clock}, precision "
        f"{found['precision']}"
    )
