"""scripts/fault_matrix.py: its short form, and that its checks see what they are for."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from faults import checks, inject, small_runs
from faults.catalogue import FAULTS
from support import ROOT, environment

from plumbing import list_checkpoints, read_checkpoint


@pytest.mark.timeout(1200)  # a busy machine is no failure, and the program itself ends what hangs
def test_every_fault_leaves_a_run_that_ends_as_an_undisturbed_one():
    command = [sys.executable, str(ROOT / "scripts/fault_matrix.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as undisturbed") == len(FAULTS)


def test_every_test_that_the_docs_name_is_there():
    named = re.findall(r"`(test_\w+?)(_?\.\.\.)?`", (ROOT / "docs/reliability.md").read_text())
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    there = re.findall(r"def (test_\w+)\(", sources)
    missing = [name for name, _ in named if not any(test.startswith(name) for test in there)]
    assert len(named) > 40 and missing == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    small_runs.write_data(folder)
    words = [inject.__file__, "train_gpt", *small_runs.flags("train_gpt", folder, folder)]
    done = forked.run(words, folder, environment())
    assert done.returncode == 0, done.stderr
    return folder


def lose_a_step(run: Path) -> None:
    path = run / "logs/run/metrics.csv"
    lines = path.read_text().split("\n")
    path.write_text("\n".join(line for line in lines if not line.startswith("5,")))


def change_a_figure(run: Path) -> None:
    path = run / "logs/run/metrics.csv"
    step, loss, *rest = path.read_text().split("\n")[-2].split(",")
    with open(path, "a") as file:
        file.write(",".join([step, loss + "1", *rest]) + "\n")


def tear_a_row(run: Path) -> None:
    path = run / "results.csv"
    path.write_text(path.read_text() + "run,2026\n")


def double_the_row(run: Path) -> None:
    path = run / "results.csv"
    path.write_text(path.read_text() + path.read_text().split("\n")[1] + "\n")


def lose_the_row(run: Path) -> None:
    path = run / "results.csv"
    path.write_text(path.read_text().split("\n")[0] + "\n")


def forget_the_end(run: Path) -> None:
    (run / "logs/run/status.json").write_text('{"status": "running"}')


def leave_litter(run: Path) -> None:
    (run / "logs/run/step_000008.part").mkdir()


def change_a_weight(run: Path) -> None:
    from plumbing import save_checkpoint
    from plumbing.world import World

    step, path = list_checkpoints(run / "logs/run")[-1]
    state = read_checkpoint(path)
    state["model"]["wte"][0, 0] *= 1 + 2**-20
    save_checkpoint(run / "logs/run", step, state, World(0, 1, torch.device("cpu")), keep=2)


DAMAGE = {
    lose_a_step: "lacks steps 5",
    change_a_figure: "train_loss is",
    tear_a_row: "a torn results row",
    double_the_row: "results rows say",
    lose_the_row: "results rows say",
    forget_the_end: "status running",
    leave_litter: "was left",
    change_a_weight: "is not that of an undisturbed run",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_the_checks_see_what_was_lost_doubled_torn_or_changed(tmp_path, undisturbed, damage):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    assert checks.end_problems(run, undisturbed) == []
    damage(run)
    problems = checks.end_problems(run, undisturbed)
    assert len(problems) == 1 and DAMAGE[damage] in problems[0]
