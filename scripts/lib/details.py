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
    order = sorted(
        range(len(rows)),
        key=lambda i: (rows[i]["run_id"] in findings.logs, rows[i]["date"], i),
        reverse=True,
    )
    picked = [rows[i] for i in order[: max(0, most - len(extra))]]
    entries = [(r["run_id"], {k: v for k, v in r.values.items() if v}) for r in picked]
    entries += [(run_id, {}) for run_id in extra]
    lines, result, knobs, env = [], [], [], []
    for run_id, values in entries:
        status = findings.status.get(run_id, {})
        state = (
            values.get("status", "finished")
            if values
            else str(status.get("status", "no status.json"))
        )
        loss = values.get("final_val_loss") or str(status.get("val_loss", ""))
        gate = " ".join(values.get(k, "") for k in ("attn_gate", "mixer", "learning_rate")).strip()
        seed = f"seed {values['seed']}" if values.get("seed") else ""
        words = [
            run_id,
            state,
            gate,
            seed,
            f"loss {float(loss):.4f}" if is_number(loss) else "",
            values.get("notes", ""),
        ]
        lines.append(" | ".join(w for w in words if w))
        result.append(
            values
            | {
                f"status.json {k}": str(v)
                for k, v in status.items()
                if k not in ("run_id", "problem")
            }
        )
        found = (
            cache.read(a.logs_folder / f"{run_id}.txt", read_text_log)
            if run_id in findings.status
            else ({}, {})
        )
        knobs.append(found[0])
        env.append(found[1])
    parts = {
        name: factor(dicts) for name, dicts in (("row", result), ("knobs", knobs), ("env", env))
    }
    pooled = lambda d: {k: pool.put(v) for k, v in d.items()}
    details = [
        dict(n=i, line=line, **{name: pooled(rest[i]) for name, (_, rest) in parts.items()})
        for i, line in enumerate(lines)
    ]
    left = len(rows) + len(extra) - len(entries)
    note = (
        f"{len(entries):,} of {len(entries) + left:,} rows are listed: those with a log, newest "
        "first."
        if left
        else ""
    )
    common = {name: pooled(common) for name, (common, _) in parts.items()}
    return dict(details=details, common=common, runs_note=note)
