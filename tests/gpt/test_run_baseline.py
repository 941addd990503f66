"""run_baseline.sh: the runs it starts, skips and refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, SMALL, rows, run_here, write_data

BASELINE = ROOT / "scripts/run_baseline.sh"


def baseline(folder: Path, *flags: str, **env: str | int) -> subprocess.CompletedProcess:
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("INPUT_BIN", "DEVICE", "PRESET")
    }
    clean |= dict(OMP_NUM_THREADS="1", PYTHON=sys.executable) | {
        key: str(value) for key, value in env.items()
    }
    return subprocess.run(
        ["bash", BASELINE, *flags],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        timeout=200,
    )


def pretend(folder: Path, gpus: int, code: int = 0, **plan) -> dict[str, str]:
    """An interpreter that has a plan and GPUs and writes down how it was called; the settings to
    use it.
    """
    plan = (
        dict(
            device="cuda",
            lr=0.0036,
            input_bin=f"{folder}/t_*.bin",
            input_val_bin=f"{folder}/v_*.bin",
        )
        | plan
    )
    (folder / "plan.json").write_text(
        json.dumps(plan | dict(logs_folder=f"{folder}/logs"), indent=2) + "\nparameters: 1\n"
    )
    stub = f"""#!/bin/sh
    case "$*" in
        *device_count*) echo {gpus} ;;
        *"--dry_run 1"*) cat "{folder}/plan.json" ;;
        *) echo "$@" >> "{folder}/calls"; exit {code} ;;
    esac"""
    (folder / "python").write_text(stub)
    (folder / "python").chmod(0o755)
    return dict(PYTHON=str(folder / "python"))


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def test_baselines_on_a_cpu_train_without_a_gate_and_skip_what_is_complete(monkeypatch, tmp_path):
    run_here(monkeypatch, tmp_path, run_id="baseline-1337", stage="stage0")
    env = {name.upper(): value for name, value in SMALL.items()} | dict(
        SCRIPT="train_gpt.py", ATTNGATE="headwise"
    )
    env |= {name.upper(): value for name, value in write_data(tmp_path).items()}
    env |= dict(
        LOGS_FOLDER=tmp_path / "logs",
        RESULTS_FILE=tmp_path / "results.csv",
        STAGE="stage0",
        COUNT=2,
    )
    done = baseline(tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert "baseline-1337 is complete (finished, val_loss " in done.stdout
    assert "all 2 run(s) are complete" in done.stdout
    found = [
        (r["run_id"], r["seed"], r["attn_gate"], r["stage"], r["learning_rate"])
        for r in rows(tmp_path)
    ]
    assert found == [
        (f"baseline-{seed}", str(seed), "none", "stage0", "0.01") for seed in (1337, 1338)
    ]


@pytest.mark.parametrize(("gpus", "asked", "launched"), [(8, None, 8), (8, 2, 2), (1, None, 1)])
def test_baselines_use_every_gpu_unless_nproc_says_otherwise(tmp_path, gpus, asked, launched):
    write_data(tmp_path)
    env = pretend(tmp_path, gpus) | (dict(NPROC=asked) if asked else {})
    done = baseline(tmp_path, "--lr", "0.1", **env, BASE_SEED=7)
    assert done.returncode == 0, done.stderr
    torchrun = (
        f"-m torch.distributed.run --standalone --nproc_per_node={launched} "
        if launched > 1
        else ""
    )
    own = "--attngate none --seed {0} --run_id baseline-{0} --dry_run 0"
    assert calls(tmp_path) == [
        f"{torchrun}{ROOT}/train_gpt.py --lr 0.1 {own.format(seed)}" for seed in (7, 8, 9)
    ]


@pytest.mark.parametrize(
    ("gpus", "env", "words"),
    [
        (0, dict(), "PyTorch sees no CUDA GPU; DEVICE=cpu trains without"),
        (2, dict(NPROC=3), r"NPROC=3, but this machine has 2 GPU\(s\)"),
        (2, dict(NPROC=0), "NPROC='0': expected a whole number >= 1"),
        (2, dict(NPROC=""), "NPROC='': expected a whole number >= 1"),
        (2, dict(COUNT="three"), "COUNT='three': expected a whole number >= 1"),
        (2, dict(BASE_SEED="-1"), "BASE_SEED='-1': expected a whole number >= 0"),
        (2, dict(SCRIPT="none.py"), "none.py: no such file"),
        (
            2,
            dict(),
            "no token shards match .*t_.*bin; python cached_fineweb10B.py 27 downloads them, or set "
            "INPUT_BIN",
        ),
    ],
)
def test_baselines_are_refused_in_one_line_before_anything_starts(tmp_path, gpus, env, words):
    done = baseline(tmp_path, **pretend(tmp_path, gpus), **env)
    assert done.returncode == 2
    assert re.fullmatch(f"run_baseline.sh: error: .*{words}.*\n", done.stderr), done.stderr
    assert not calls(tmp_path)


def test_baselines_stop_at_the_first_run_that_fails(tmp_path):
    write_data(tmp_path)
    done = baseline(tmp_path, **pretend(tmp_path, 2, code=3))
    assert done.returncode == 3 and len(calls(tmp_path)) == 1
    assert "baseline-1337 ended with exit code 3 (status none)" in done.stderr


def test_a_complete_baseline_of_other_knobs_is_not_taken_for_the_one_asked_for(tmp_path):
    write_data(tmp_path)
    env = pretend(tmp_path, 2)
    (tmp_path / "logs/baseline-1337").mkdir(parents=True)
    (tmp_path / "logs/baseline-1337/status.json").write_text(
        json.dumps(dict(status="finished", val_loss=3.5), indent=1)
    )
    plan = (tmp_path / "plan.json").read_text().split("\nparam")[0]
    log = tmp_path / "logs/baseline-1337.txt"
    log.write_text(f"hyperparameters:\n{plan}\n" * 2)
    assert (
        "baseline-1337 is complete (finished, val_loss 3.5), skipped"
        in baseline(tmp_path, **env).stdout
    )
    assert len(calls(tmp_path)) == 2
    log.write_text(log.read_text().replace("0.0036", "0.005"))
    done = baseline(tmp_path, **env)
    assert done.returncode == 2 and len(calls(tmp_path)) == 2
    assert 'it had   "lr": 0.005' in done.stderr and 'now      "lr": 0.0036' in done.stderr
    assert "run baseline-1337 is complete, with other knobs; set RUN_PREFIX" in done.stderr
