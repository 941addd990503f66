"""What the tests of the study pipeline share: rows, logs, small studies."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import split_results
from lib.cells import Cell
from lib.comparisons import Comparison
from lib.curves import Curves
from lib.results import HEADER, Row
from lib.stages import Stage
from lib.tables import Table, make_table

ROOT = Path(__file__).resolve().parents[2]


REFERENCE = ROOT.parent / "shared/reference/gating"


ORIGINAL = REFERENCE / "original_experiments"


STAGES = ROOT / "experiments/stages_original.toml"


needs_original = pytest.mark.skipif(
    not ORIGINAL.exists(), reason=f"the original's files are not in {ORIGINAL}"
)


USUAL = dict(
    attn_gate="none",
    gate_pos="sdpa",
    gate_act="sigmoid",
    learning_rate="0.0036",
    batch_size="512",
    sequence_length="1024",
    num_iterations="1500",
    warmup_iters="0",
    warmdown_iters="1450",
    train_time_ms="600000.0",
    ms_per_step="400.0",
    gpu_name="NVIDIA H200",
    n_gpus="1",
    torch="2.13.0",
    code_sha256="ab" * 32,
    status="finished",
)


def row(seed: int = 1, loss: float | str = 3.5, **given: object) -> dict[str, str]:
    """One row as a trainer writes it; each has an id of its own unless one is given."""
    row.made += 1
    told = {name: str(value) for name, value in given.items()}
    return {
        "run_id": f"run{row.made}",
        "seed": str(seed),
        "final_val_loss": str(loss),
        **USUAL,
        **told,
    }


row.made = 0


def text_of(
    rows: Sequence[Mapping[str, str]], columns: Sequence[str] = HEADER, end: str = "\n"
) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator=end, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def arms(
    a: Sequence[float], b: Sequence[float], seeds_b: Sequence[int] | None = None, **given
) -> list[dict]:
    """Rows of elementwise with losses a and of none with losses b; seeds 1, 2, ... unless given."""
    gated = [row(i + 1, v, attn_gate="elementwise", **given) for i, v in enumerate(a)]
    return gated + [
        row(s, v, **given) for s, v in zip(seeds_b or range(1, len(b) + 1), b, strict=True)
    ]


def write(folder: Path, rows: Sequence[Mapping[str, str]] | str, name: str = "results.csv") -> Path:
    path = folder / name
    path.write_bytes((rows if isinstance(rows, str) else text_of(rows)).encode())
    return path


def split(folder: Path, rows: Sequence[Mapping[str, str]] | str, *options: str) -> Path:
    """Run split_results on these rows; returns the output folder."""
    source = write(folder, rows)
    split_results.main(["--results_file", str(source), "--out-dir", str(folder / "out"), *options])
    return folder / "out"


def lines_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


CURVES = REFERENCE / "val_curves.csv"


STUDIES = 2000


def cell(losses: Sequence[float], first_seed: int = 1) -> Cell:
    values = [
        {"seed": str(i), "final_val_loss": repr(float(v))}
        for i, v in enumerate(losses, start=first_seed)
    ]
    return Cell({"attn_gate": "x"}, tuple(Row(v, "", "") for v in values))


def table(rows, stage: Stage | None = None, **more) -> Table:
    return make_table([Row(r, "", "here") for r in rows], stage or Stage("stage1"), **more)


def compared(rows, stage: Stage | None = None, **more) -> Comparison:
    (found,) = [line.comparison for line in table(rows, stage, **more).lines if line.comparison]
    return found


METRICS = (
    "step,train_loss,val_loss,lr,train_time_s,tokens,tokens_per_s,mfu,grad_norm,peak_memory_mib"
)


def metrics_line(step: int, loss: float | str, seconds: float) -> str:
    """A row as train_gpt.py writes it: before the first step there is no training loss, rate or
    time."""
    return f"{step},3.5,{loss},0.001,{seconds},1000,10,,1.0,5" if step else f"0,,{loss},,,0,,,,"


def log_run(folder: Path, run_id: str, final: float, speed: float = 1.0) -> None:
    """A run of 100 steps, validated every 10, from 16 nats down to `final`."""
    losses = {
        step: final + (16 - final) * (1 - step / 100) ** 2 if step else 16.0
        for step in range(0, 101, 10)
    }
    lines = [metrics_line(step, losses.get(step, ""), speed * step) for step in range(101)]
    (folder / run_id).mkdir(parents=True)
    (folder / run_id / "metrics.csv").write_text("\n".join([METRICS, *lines]) + "\n")


A, B = [3.271, 3.272, 3.2735], [3.292, 3.294, 3.2921]  # written out, near stage 3's


def logged(folder: Path, rows) -> Curves:
    for r in rows:
        log_run(
            folder / "logs", r["run_id"], float(r["final_val_loss"]), float(r["ms_per_step"]) / 1000
        )
    return Curves(folder / "logs")


def timed(a: Sequence[float], b: Sequence[float], ms: float = 440.0, **more) -> list[dict]:
    """elementwise of ms per step against none of 400 ms, 100 steps."""
    rows = arms(a, b, num_iterations=100, steps_done=100, warmdown_iters=50, **more)
    for r in rows:
        own = ms if r["attn_gate"] != "none" else 400.0
        r |= dict(ms_per_step=str(own), train_time_ms=str(100 * own))
    return rows


COLUMNS = (
    "step,train_loss,val_loss,lr,train_time_s,tokens,tokens_per_s,mfu,grad_norm,peak_memory_mib"
)


MS = {"none": 400.0, "elementwise": 440.0}


def result(
    run_id: str, seed: int, loss: float | str, gate: str = "none", **given: object
) -> dict[str, str]:
    """A row of results.csv."""
    row = dict(
        run_id=run_id, date="2026-01-01 00:00:00", seed=seed, final_val_loss=loss, attn_gate=gate
    )
    row |= dict(
        gate_pos="sdpa",
        gate_act="sigmoid",
        learning_rate=0.0036,
        batch_size=512,
        sequence_length=1024,
    )
    row |= dict(
        num_iterations=1500,
        warmup_iters=0,
        warmdown_iters=1450,
        status="finished",
        gpu_name="NVIDIA H200",
    )
    row |= dict(train_time_ms=600000, ms_per_step=MS.get(gate, 420.0), torch="2.13.0", n_gpus=1)
    return {name: str(value) for name, value in (row | given).items()}


def write_log(
    folder: Path, run_id: str, final: float, ms: float = 400.0, steps: int = 100, every: int = 10
) -> None:
    """metrics.csv of a run: from 16 nats at step 0 down to `final`."""
    lines = [COLUMNS, "0,,16.0,,,0,,,,"]
    for s in range(1, steps + 1):
        val = f"{final + 2 * (1 - s / steps):.6f}" if s % every == 0 else ""
        loss, lr = final + 2.1 - 2 * s / steps, 0.0036 * (1 - s / steps)
        line = f"{s},{loss:.4f},{val},{lr:.6g},{s * ms / 1000:.3f},"
        lines.append(line + f"{s * 524288},{524288000 / ms:.0f},0.4,1.0,5")
    (folder / run_id).mkdir(parents=True, exist_ok=True)
    (folder / run_id / "metrics.csv").write_text("\n".join(lines) + "\n")


def write_results(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())
    return path


TWO_BY_TWO = [("a1", 1, 3.30, "none"), ("a2", 2, 3.32, "none"), ("b1", 1, 3.25, "elementwise"),
              ("b2", 2, 3.28, "elementwise")]  # fmt: skip


def make_study(folder: Path, runs: Sequence[tuple] = TWO_BY_TWO, **given: object) -> list[str]:
    """The options that name it."""
    for run_id, _, loss, gate in runs:
        write_log(folder / "logs", run_id, loss, MS.get(gate, 420.0))
    path = write_results(folder / "results.csv", [result(*run, **given) for run in runs])
    return ["--results_file", str(path), "--logs_folder", str(folder / "logs")]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | extra


def rows(folder: Path) -> list[dict[str, str]]:
    return lines_of(folder / "results.csv")
