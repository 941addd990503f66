"""Writes the large study that docs/report.md was measured with.

python tests/study/big_study.py FOLDER
"""

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[2] / "scripts")]  # when run by hand

from study_support import ROOT, result, write_log, write_results  # noqa: E402


def big_study(
    folder: Path, num_rows: int = 100_000, num_logs: int = 5_000, steps: int = 1_500
) -> None:
    """10 stages of 20 cells; runs with logs as train_gpt.py writes them, its own source in
    front."""
    source = "".join((ROOT / name).read_text() for name in ("train_gpt.py", "plumbing/session.py"))
    draws, rows = random.Random(1), []
    for i in range(num_rows):
        cell, seed = divmod(i % 200, 20)[1], i // 200
        gate, rate = ("none", "elementwise", "headwise", "const")[cell % 4], 0.001 * (1 + cell // 4)
        loss = 3.5 - 0.01 * (cell % 4) + 0.02 * (cell // 4) + draws.gauss(0, 0.0013)
        ms, stage = 400 + 10 * (cell % 4) + draws.gauss(0, 1), f"s{i % 200 // 20}"
        more = dict(learning_rate=rate, warmdown_iters=400, ms_per_step=ms, stage=stage, epochs=0.3)
        rows.append(result(f"run{i:06d}", seed, loss, gate, **more))
        if i % (num_rows // num_logs) == 0:
            run = rows[-1]["run_id"]
            write_log(folder / "logs", run, loss, ms, steps, every=125)
            status = dict(run_id=run, status="finished", step=steps, updated=1.0)
            (folder / "logs" / run / "status.json").write_text(json.dumps(status))
            knobs = json.dumps(
                dict(attngate=gate, lr=rate, seed=seed, **{f"knob{k}": k for k in range(30)}),
                indent=2,
            )
            text = f"{source}\ncommand: train_gpt.py --seed {seed}\n"
            text += f"hyperparameters:\n{knobs}\nRunning pytorch 2.13.0\n"
            text += f"nvidia-smi:\n{'GPU ' * 500}\n{'=' * 100}\ndevice: 8 x NVIDIA H200\n"
            (folder / f"logs/{run}.txt").write_text(
                text + "step:1/1500 train_loss:3.5 train_time:1ms\n" * steps
            )
    write_results(folder / "results.csv", rows)


if __name__ == "__main__":
    big_study(Path(sys.argv[1]))
