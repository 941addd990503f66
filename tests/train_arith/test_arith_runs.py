"""Runs from start to end: files, resuming, ranks, what stops a run, and the configurations."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from arith_support import (
    ONE,
    ROOT,
    command,
    curve,
    environment,
    flags,
    make,
    newest_state,
    run,
    run_here,
    same_tensors,
)
from lib_heads import load_model

import train_arith
from arithmetic import DataSets
from plumbing import UserError, checkpoints
from plumbing.problem_scores import summary

SAVING = dict(num_epochs=5, eval_interval=3, save_interval=2)
SAVED = "checkpoint_epoch_2.pt checkpoint_epoch_4.pt checkpoint_latest.pt checkpoint_best.pt"
SAID = ["Vocabulary size: 35", "Train dataset size: 70", "Epoch 5/5", "TRAINING SUMMARY"]
SAID += ["Training complete!", "eos_after_gold"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, str]:
    """A run's folder beside its results.csv, and what it said."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        code, text = run_here(patch, folder, output_dir=folder / "here", **SAVING)
    assert code == 0, text
    return folder / "here", text


def test_models_are_saved_every_interval_and_best_whenever_it_is_best(saved):
    out, _ = saved
    assert {path.name for path in out.glob("checkpoint_*.pt")} == set(SAVED.split())
    kept = json.loads((out / "metrics/training_metrics_seed42.json").read_text())
    assert [m["epoch"] for m in kept["metrics"]] == [3, 5] and kept["best_val_epoch"] in (3, 5)
    model, cfg, state = load_model(out / "checkpoint_best.pt")
    assert state["epoch"] == kept["best_val_epoch"]
    assert cfg.n_embd == 16 and state["model_config"]["d_ff"] == 24
    found = summary(train_arith.score(model, DataSets(cfg).val, cfg, ONE))
    assert found["loss"] == pytest.approx(kept["best_val_loss"], rel=1e-6)


def test_a_run_says_and_records_what_the_originals_did_and_its_row(saved):
    out, text = saved
    assert [line for line in SAID if line not in text] == []
    sets = json.loads((out / "evaluation.json").read_text())["sets"]
    assert sets[str(out.parent / "test.jsonl")]["n"] == 9
    with open(out.parent / "results.csv") as f:
        (row,) = csv.DictReader(f)
    assert (row["status"], row["steps_done"]) == ("finished", "25")
    assert float(row["best_val_loss"]) > 0


def test_a_finished_run_is_not_run_again(saved, monkeypatch):
    out, _ = saved
    with pytest.raises(UserError, match=r"complete .*choose another OUTPUT_DIR"):
        run_here(monkeypatch, out.parent, output_dir=out, **SAVING)


def test_answer_only_complement_with_muon_learns_one_digit_sums(monkeypatch, tmp_path):
    honest = dict(train_path="generate", val_path="generate", test_path="", num_iterations=250)
    honest |= dict(operators="+", operand_min=1, operand_max=9, operands_max=2, depth_max=0)
    honest |= dict(spaces=0, answer_only_loss=1, dropout=0, answer_format="complement")
    honest |= dict(optimizer="muon", lr=0.01, muon_lr=0.02, schedule="trapezoid", batch_size=64)
    rare = dict(run_id="sums", val_every=0, save_every=0, val_examples=2)
    code, text = run_here(monkeypatch, tmp_path, **rare, **honest)
    assert code == 0
    assert float(re.search(r"step:250/250 train_loss:([\d.]+)", text)[1]) < 0.35, "from ln 35 = 3.6"


def kill_at(step: int, folder: Path, **knobs) -> None:
    """A run in a process of its own, killed once it says that it has taken this step."""
    line = [*command(1), *flags(folder, **knobs)]
    process = subprocess.Popen(
        line, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True
    )
    for text in process.stdout:
        if text.startswith(f"step:{step}/"):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL


def test_a_killed_run_resumes_to_the_same_bits(monkeypatch, tmp_path):
    """Fresh examples, a curriculum that depends on what was learnt, both optimizers, dropout."""
    knobs = dict(train_path="generate", val_path="generate", val_examples=1, num_iterations=90)
    knobs |= dict(operators="+", operand_max=2, answer_only_loss=1, curriculum_exact=0.3)
    knobs |= dict(answer_format="complement", dropout=0.1, optimizer="muon", muon_lr=0.02)
    knobs |= dict(save_every=10, val_every=25, test_path="", batch_size=32)
    code, text = run_here(monkeypatch, tmp_path, run_id="whole", **knobs)
    assert code == 0, text
    switched = int(re.search(r"curriculum: 3 operands from step (\d+)", text)[1])
    # The switch is in the checkpoint, or comes after the resume.
    kill_at(max(25, min(switched + 3, 80)), tmp_path, run_id="cut", **knobs)
    code, text = run_here(monkeypatch, tmp_path, run_id="cut", **knobs)
    assert code == 0 and re.search(r"resumed step:[1-9]0 ", text), text
    assert curve(tmp_path, "whole") == curve(tmp_path, "cut")
    one, two = (newest_state(tmp_path, run_id) for run_id in ("whole", "cut"))
    assert one["state"]["switches"] == two["state"]["switches"]
    assert one["state"]["switches"][0] == switched
    assert same_tensors(one["model"], two["model"])
    assert same_tensors(one["optimizers"], two["optimizers"])
    assert one["record"]["history"] == two["record"]["history"]


def test_two_ranks_with_uneven_shares_train_as_one_does(monkeypatch, tmp_path):
    knobs = dict(num_epochs=2, dropout=0.2, batch_size=15)
    assert run_here(monkeypatch, tmp_path, run_id="n1", **knobs)[0] == 0
    done = run(2, tmp_path, run_id="n2", **knobs)
    assert done.returncode == 0, done.stderr
    one, two = (np.array([float(row[0]) for row in curve(tmp_path, f"n{n}")]) for n in (1, 2))
    assert len(one) == 10 and np.abs(one - two).max() < 2e-5
    vals = [[float(row[1]) for row in curve(tmp_path, f"n{n}") if row[1]] for n in (1, 2)]
    assert vals[0] == pytest.approx(vals[1], abs=2e-5) and len(vals[0]) == 2


def test_a_loss_that_is_not_finite_stops_the_run_before_its_update(monkeypatch, tmp_path):
    code, text = run_here(monkeypatch, tmp_path, run_id="bad", lr=1e30, warmup_iters=0)
    assert code == 1 and "not finite" in text
    assert json.loads((tmp_path / "logs/bad/status.json").read_text())["status"] == "nan"


def test_a_run_is_not_resumed_with_other_records_or_knobs(monkeypatch, tmp_path):
    stop = dict(run_id="r", num_epochs=4)
    real = train_arith.evaluate

    def stop_at_once(model, session, *others):
        session.world.signals.append(signal.SIGTERM)
        return real(model, session, *others)

    monkeypatch.setattr(train_arith, "evaluate", stop_at_once)
    assert run_here(monkeypatch, tmp_path, **stop)[0] == 128 + signal.SIGTERM
    monkeypatch.setattr(train_arith, "evaluate", real)
    with pytest.raises(UserError, match=re.escape("was started with LR=0.01, not 0.02")):
        run_here(monkeypatch, tmp_path, **stop, lr=0.02)
    monkeypatch.setattr(sys, "argv", ["train_arith.py", *flags(tmp_path, **stop)])
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(reversed(lines)))
    with (
        pytest.raises(UserError, match=r"other training data .*another RUN_ID"),
        redirect_stdout(StringIO()),
    ):
        train_arith.main()


def test_a_drawn_run_is_resumed_with_the_same_test_set_by_any_name_and_with_no_other(
    monkeypatch, tmp_path
):
    knobs = dict(run_id="r", train_path="generate", val_path="generate", val_examples=9)
    knobs |= dict(num_iterations=20, save_every=5, val_every=0)
    assert run_here(monkeypatch, tmp_path, **knobs, stop_after=5)[0] == 0
    other = str(tmp_path / "val.jsonl")
    with pytest.raises(UserError, match=r"other training data .*excluded expressions was 9"):
        run_here(monkeypatch, tmp_path, **knobs, test_path=other)
    renamed = shutil.copy(tmp_path / "test.jsonl", tmp_path / "renamed.jsonl")
    code, text = run_here(monkeypatch, tmp_path, **knobs, test_path=str(renamed))
    assert code == 0 and "resumed step:5 " in text


def train_here(monkeypatch, folder: Path, *line: str) -> str:
    """`python train_arith.py LINE`, typed in this folder on a machine without a GPU; its stdout."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train_arith.py", *line])
    with redirect_stdout(StringIO()) as out:
        assert train_arith.main() == 0, out.getvalue()
    return out.getvalue()


def test_the_pilot_configuration_starts_to_learn_within_seconds(monkeypatch, tmp_path):
    make("generate_pilot_dataset.py", tmp_path / "data")
    line = f"--config {ROOT}/configs/pilot.yaml --output-dir runs/pilot --seed 42 --device cuda"
    line += f" --set training.num_iterations=12 --results_file {tmp_path}/results.csv"
    line += " --set training.optimizer.warmup_steps=4 --set data.test_path="
    t0 = time.process_time()
    said = train_here(monkeypatch, tmp_path, *line.split())
    assert said.startswith("CUDA not available, using CPU\n") and "parameters: 664,192" in said
    loss = float(re.search(r"step:12/12 val_loss:([\d.]+)", said)[1])
    assert loss < 3.2 < math.log(35) and time.process_time() - t0 < 60
    assert (tmp_path / "runs/pilot/checkpoint_best.pt").exists()
    assert (tmp_path / "runs/pilot.txt").exists()


def test_the_honest_configuration_trains_on_fresh_examples_and_scores_its_three_test_sets(
    monkeypatch, tmp_path
):
    sizes = "--num-train 0 --num-val 0 --num-test 20 --minimal-pairs 10 --held-out --dedup"
    language = ["--prefix", "study", "--operators", "+-"]
    make("generate_pilot_dataset.py", tmp_path / "data", *language, *sizes.split())
    line = f"--config {ROOT}/configs/honest.yaml --output-dir runs/honest"
    line += f" --set num_iterations=8 --set val_examples=40 --results_file {tmp_path}/results.csv"
    said = train_here(monkeypatch, tmp_path, *line.split())
    assert "parameters: 664,192" in said and "answer: complement_bare, up to 3 digits" in said
    sets = json.loads((tmp_path / "runs/honest/evaluation.json").read_text())["sets"]
    assert {Path(name).stem: found["n"] for name, found in sets.items()} == {
        "generate": 40, "study_test_flat": 20, "study_test_paren": 20, "study_test_pairs": 20
    }  # fmt: skip
    assert all(found["exact_match"] < 0.2 for found in sets.values())
    losses = [float(x) for x in re.findall(r"train_loss:([\d.]+)", said)]
    assert losses and losses[-1] < math.log(35)


def test_a_final_evaluation_that_fails_leaves_the_run_to_be_started_again(monkeypatch, tmp_path):
    real = train_arith.score_test_sets

    def fails(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(train_arith, "score_test_sets", fails)
    with pytest.raises(RuntimeError, match="broken"):
        run_here(monkeypatch, tmp_path, run_id="r", num_epochs=1)
    status = tmp_path / "logs/r/status.json"
    assert json.loads(status.read_text())["status"] == "failed"
    monkeypatch.setattr(train_arith, "score_test_sets", real)
    code, text = run_here(monkeypatch, tmp_path, run_id="r", num_epochs=1)
    assert code == 0 and "resumed step:5 " in text and "Training complete!" in text
    assert json.loads(status.read_text())["status"] == "finished"
    assert (tmp_path / "logs/r/evaluation.json").exists()


def test_a_full_disk_is_one_line_with_the_files_name(monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_whole", full)
    what = r"training_metrics_seed42\.json could not be written \(No space left on device\)"
    with pytest.raises(UserError, match=what):
        run_here(monkeypatch, tmp_path, run_id="r", num_epochs=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("half", [dict(), dict(bf16=1), dict(fp16=1)])
def test_a_cuda_graph_trains_as_single_launches_do(monkeypatch, tmp_path, half):
    losses = []
    for graph in (0, 1):
        knobs = dict(device="cuda", cuda_graph=graph, dropout=0, num_epochs=2, **half)
        assert run_here(monkeypatch, tmp_path, run_id=f"g{graph}", **knobs)[0] == 0
        losses.append([float(row[0]) for row in curve(tmp_path, f"g{graph}")])
    assert losses[0] == pytest.approx(losses[1], abs=2e-3 if half else 1e-4)
