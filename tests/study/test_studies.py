"""The study files that come along, and the commands of docs/colab.md, are what they say."""

import csv
import re
import shlex
import subprocess
import sys

import pytest
from lib.study import read_study
from lib.trainers import load_trainer, plan_of
from support import ROOT, environment

import plumbing
import train_gpu

STUDIES = sorted((ROOT / "experiments/studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_file_is_free_of_problems(path):
    study = read_study(path, {})
    assert {c.stage for c in study.runs} == set(study.stages)
    assert all(
        any(c.is_baseline for c in study.runs if c.stage == s) or not study.baselines[s]
        for s in study.stages
    )


def test_the_mini_hamt_study_runs_and_compares_each_mixer_with_attention(tmp_path):
    study, logs, results = (
        ROOT / "experiments/studies/hamt_mini.toml",
        tmp_path / "logs",
        tmp_path / "results.csv",
    )
    command = [
        sys.executable,
        ROOT / "scripts/run_study.py",
        study,
        "--logs_folder",
        logs,
        "--results_file",
        results,
    ]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "3 of 3 done" in done.stdout, done.stdout + done.stderr
    command = re.search(r"^tables: python (.*)$", done.stdout, re.M)[1].split()
    split = [
        sys.executable,
        str(ROOT / command[0]),
        *command[1:],
        "--out-dir",
        str(tmp_path / "out"),
    ]
    made = subprocess.run(
        split, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert made.returncode == 0, made.stderr
    with open(tmp_path / "out/tables/hamt_mini.csv") as f:
        lines = {(r["mixer"], r["memory"]): r["baseline"] for r in csv.DictReader(f)}
    assert lines[("attention", "on")] == "is the baseline" and len(lines) == 3
    assert all("mixer=attention" in baseline for key, baseline in lines.items() if key[0] == "hamt")


GENERATED = dict(train_path="generate", val_path="generate", test_path="", num_iterations=1)


@pytest.mark.parametrize(
    ("trainer", "bad", "fine"),
    [
        ("train_arith.py", GENERATED | dict(val_path="nowhere.jsonl"), GENERATED),
        ("train_gpu.py", dict(data="./nowhere"), dict(data="wikitext-2")),
        ("train_scaled.py", dict(data="nowhere.txt"), dict(data="wikipedia:xx")),
    ],
)
def test_a_study_hears_of_missing_data_and_not_of_data_that_a_run_would_fetch(
    trainer, bad, fine, tmp_path
):
    t = load_trainer(trainer)
    place = dict(device="cpu", compile=False)
    if trainer == "train_gpu.py":
        place |= dict(data_folder=str(tmp_path), precision="fp32")
    assert "nowhere" in plan_of(t.module.Knobs(**bad, **place), t).problem
    assert plan_of(t.module.Knobs(**fine, **place), t).problem == ""


COLAB = [
    line.strip()
    for line in (ROOT / "docs/colab.md").read_text().splitlines()
    if line.startswith("    python train")
]


@pytest.mark.parametrize("line", COLAB, ids=lambda line: re.search(r"--run_id (\S+)", line)[1])
def test_the_commands_of_the_colab_page_are_accepted_and_have_the_sizes_they_name(
    line, capsys, tmp_path
):
    argv = [*shlex.split(line)[2:], "--data_folder", str(tmp_path), "--dry_run"]
    k = plumbing.read_knobs(train_gpu.Knobs, train_gpu.PRESETS, argv, {})
    assert plumbing.show_plan(k, train_gpu.plan, train_gpu.RESULTS) == 0
    size = int(
        re.search(r"^parameters: +([\d,]+)$", capsys.readouterr().out, re.M)[1].replace(",", "")
    )
    assert abs(size / (int(k.preset.removesuffix("m")) * 1e6) - 1) < 0.03


def test_there_are_commands_to_check():
    assert len(COLAB) >= 3 and {p.stem for p in STUDIES} >= {"mini", "gating", "hamt", "scaled"}
