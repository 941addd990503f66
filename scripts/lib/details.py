"""The runs of a stage for the page: result row, knobs and environment, each text stored once."""

import argparse
from collections.abc import Mapping, Sequence

from lib.findings import Cache, Findings, is_number, read_text_log
from lib.results import Row


class Pool:
    """Long texts that many runs share (nvidia-smi, commands), stored once; a number stands for
    one."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def put(self, text: str) -> str | int:
        return self.texts.setdefault(text, len(self.texts)) if len(text) > 60 else text


def factor(dicts: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What all have in common, and what is left of each."""
    common = dict(set.intersection(*(set(d.items()) for d in dicts))) if len(dicts) > 1 else {}
    common = {k: v for k, v in (dicts[0].items() if dicts else ()) if k in common}
    return common, [{k: v for k, v in d.items() if k not in common} for d in dicts]


def details_of(
    rows: Sequence[Row],
    extra: Sequence[str],
    findings: Findings,
    a: argparse.Namespace,
    cache: Cache,
    pool: Pool,
    most: int,
) -> dict:
    """The newest `most` runs of a stage, those with a log first: result row, knobs, environment."""
    entries = newest(rows, extra, findings, most)
    lines, result, knobs, env = [], [], [], []
    for run_id, values in entries:
        status = findings.status.get(run_id, {})
        lines.append(line_of(run_id, values, status))
        told = {k: v for k, v in status.items() if k not in ("run_id", "problem")}
        result.append(values | {f"status.json {k}": str(v) for k, v in told.items()})
        own_knobs, own_env = {}, {}
        if run_id in findings.status:
            own_knobs, own_env = cache.read(a.logs_folder / f"{run_id}.txt", read_text_log)
        knobs.append(own_knobs)
        env.append(own_env)
    parts = dict(row=factor(result), knobs=factor(knobs), env=factor(env))
    pooled = lambda d: {k: pool.put(v) for k, v in d.items()}
    details = [
        dict(n=i, line=line, **{name: pooled(rest[i]) for name, (_, rest) in parts.items()})
        for i, line in enumerate(lines)
    ]
    common = {name: pooled(common) for name, (common, _) in parts.items()}
    num_runs = len(rows) + len(extra)
    note = ""
    if num_runs > len(entries):
        note = f"{len(entries):,} of {num_runs:,} rows are listed: those with a log, newest first."
    return dict(details=details, common=common, runs_note=note)


def newest(
    rows: Sequence[Row], extra: Sequence[str], findings: Findings, most: int
) -> list[tuple[str, dict[str, str]]]:
    """Run id and result row, without empty columns, of those that are listed. Runs without a row
    are all listed."""
    order = sorted(
        range(len(rows)),
        key=lambda i: (rows[i]["run_id"] in findings.logs, rows[i]["date"], i),
        reverse=True,
    )
    picked = [rows[i] for i in order[: max(0, most - len(extra))]]
    entries = [(row["run_id"], {k: v for k, v in row.values.items() if v}) for row in picked]
    return entries + [(run_id, {}) for run_id in extra]


def line_of(run_id: str, values: Mapping[str, str], status: Mapping[str, object]) -> str:
    """A run in one line: id, state, configuration, seed, loss and notes."""
    if values:
        state = values.get("status", "finished")
    else:
        state = str(status.get("status", "no status.json"))
    loss = values.get("final_val_loss") or str(status.get("val_loss", ""))
    words = [
        run_id,
        state,
        " ".join(values.get(k, "") for k in ("attn_gate", "mixer", "learning_rate")).strip(),
        f"seed {values['seed']}" if values.get("seed") else "",
        f"loss {float(loss):.4f}" if is_number(loss) else "",
        values.get("notes", ""),
    ]
    return " | ".join(word for word in words if word)
