"""Studies with a real trainer: too few shards, killed twice, the files that come along."""

import json
import os
import signal
import time
from pathlib import Path

import forked
import pytest
import run_study
from lib.board import Board
from lib.planning import Pace
from lib.program import UserError
from lib.progress import Progress
from lib.study import read_study
from pretender import end_of, go, launcher, lines, wait_for
from support import ROOT, SMALL, losses, rows, run_here, write_data

from plumbing import byte_runs


def test_too_few_shards_are_noticed_before_the_first_run(tmp_path):
    data = write_data(tmp_path)
    knobs = (SMALL | data | dict(num_iterations=40)).items()
    study = tmp_path / "study.toml"
    text = "\n".join(f"{k} = {json.dumps(v)}" for k, v in knobs)
    study.write_text(
        f'title = "T"\ntrainer = "train_gpt.py"\n[knobs]\n{text}\n[stage.a]\nseeds = [1, 2]'
    )
    options = (
        "--logs_folder",
        str(tmp_path / "logs"),
        "--results_file",
        str(tmp_path / "results.csv"),
    )
    with pytest.raises(
        UserError,
        match=r"\[stage.a\] all: 2 shard\(s\) .* feed 33 steps, NUM_ITERATIONS=40; download",
    ):
        go(study, *options)
    assert not (tmp_path / "logs").exists()


def test_the_studies_that_come_along_hold_the_runs_they_should(capsys, tmp_path):
    study = read_study(ROOT / "experiments/studies/gating.toml", {})
    count = {stage: sum(c.stage == stage for c in study.runs) for stage in study.stages}
    assert count == dict(stage1=10, stage2=16, stage2_5=4, stage3=6, stage4=24)
    of = {stage: [c for c in study.runs if c.stage == stage] for stage in study.stages}
    facts = lambda c: (
        c.knobs.num_iterations,
        c.knobs.warmup_iters,
        c.knobs.warmdown_iters,
        c.knobs.lr,
    )
    assert {facts(c) for c in of["stage1"]} == {(1500, 0, 1450, 0.0036)}
    assert {(c.knobs.attngate, c.knobs.gateact) for c in of["stage1"]} == {
        ("none", "sigmoid"), ("headwise", "sigmoid"), ("headwise", "ns_sigmoid"),
        ("elementwise", "sigmoid"), ("const", "sigmoid"),
    }  # fmt: skip
    assert {facts(c) for c in of["stage2"]} == {
        (800, 150, 232, 0.0036 * m / 10) for m in (10, 11, 12, 13)
    }
    assert {facts(c) for c in of["stage2_5"]} == {(1500, 0, 1450, 0.00468)}
    assert {facts(c) for c in of["stage3"]} == {(5100, 0, 1450, 0.00468)}
    seeds = {stage: list(dict.fromkeys(c.seed for c in cells)) for stage, cells in of.items()}
    assert seeds["stage1"] == [1337, 1338] and seeds["stage2"] == seeds["stage2_5"] == [1337, 2337]
    assert seeds["stage3"] == [1337, 2337, 3337]
    controls = {
        (c.knobs.mlp_match, c.knobs.gateopt, c.knobs.gatepos, c.knobs.gateact) for c in of["stage4"]
    }
    assert {(True, "muon", "sdpa", "sigmoid"), (False, "adam", "sdpa", "sigmoid")} <= controls
    assert {(False, "muon", "value", "sigmoid"), (False, "muon", "sdpa", "ns_sigmoid")} <= controls
    assert sum(c.knobs.time_budget_s is not None for c in of["stage4"]) == 6, (
        "equal time: both arms, three seeds"
    )
    assert len({c.key for c in study.runs}) == 60

    mini = str(ROOT / "experiments/studies/mini.toml")
    assert (
        run_study.main(
            [mini, "--dry_run", "--logs_folder", str(tmp_path), "--results_file", f"{tmp_path}/r"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "12 runs, 0 done, 12 to do" in out and "1,843,200" in out
    assert not list(tmp_path.iterdir())


def test_a_study_is_listed_without_a_pass_through_any_model(monkeypatch, capsys, tmp_path):
    study = ROOT / "experiments/studies/scaled.toml"

    def measured(*_: object) -> None:
        raise AssertionError("memory and FLOPs are not in the list")

    monkeypatch.setattr(byte_runs, "probe_backward", measured)
    options = ["--logs_folder", str(tmp_path), "--results_file", f"{tmp_path}/r"]
    assert run_study.main([str(study), "--stage", "scaled_lr", "--dry_run", *options]) == 0
    assert "5,481,070" in capsys.readouterr().out, "parameters"


def test_the_table_fits_on_the_screen_and_shows_what_is_going_on(tmp_path):
    study = read_study(ROOT / "experiments/studies/gating.toml", {})
    cells = [Progress(c, c.default_id) for c in study.runs]
    for p in cells[:40]:
        p.state, p.step, p.loss = "done", p.run.steps, 3.2927
    running = cells[40]
    running.state, running.step, running.loss, running.tokens_per_s = (
        "running",
        250,
        4.1234,
        1_310_000.0,
    )
    running.began, running.wall_s = time.monotonic() - 100, 110.0
    (tmp_path / ".locks").mkdir()
    pace = Pace(tmp_path)
    pace.add(cells[0].run_id, 600.0, cells[0].run.steps)
    board = Board(study, cells, pace)
    for width, height in ((79, 24), (119, 50), (60, 10)):
        table = board.table(width, height, colour=False)
        assert len(table) < height and max(map(len, table)) <= width
        row = next(line for line in table if "running" in line and "250/1500" in line)
        assert "4.1234" in row and "1.3M" in row and "8m20s" in row
    table = board.table(79, 10**6, colour=False)
    assert table[0].startswith("Gated attention, 124M: 40 of 60 done, 1 running, 19 waiting, ETA")
    assert len(table) == 60 + 5 + 1


def three_cells(folder: Path) -> tuple[Path, dict]:
    """A study of three cells, and its runs' knobs."""
    size = dict(num_iterations=120, warmdown_iters=60, val_every=40, save_every=5)
    size |= dict(device_batch_size=16, epochs_ok=1)
    common = {k: v for k, v in (SMALL | size).items() if k != "compile"} | write_data(folder)
    knobs = "\n".join(f"{k} = {json.dumps(v)}" for k, v in common.items()) + "\ncompile = false\n"
    stage = '[stage.a]\nseeds = [1]\nbaseline = { attngate = "none" }\n'
    stage += 'grid = { attngate = ["none", "headwise", "elementwise"] }\n'
    study = folder / "study.toml"
    study.write_text(f'title = "T"\ntrainer = "train_gpt.py"\n[knobs]\n{knobs}{stage}')
    return study, {k: common[k] for k in (*size, "input_bin", "input_val_bin")}


def kill_at_the_first_checkpoint(p: forked.Program, run: Path) -> None:
    """The machine is gone: trainer and launcher at once."""
    wait_for(lambda: list(run.glob("step_??????")))
    status = json.loads((run / "status.json").read_text())
    os.killpg(status["pid"], signal.SIGKILL)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    assert json.loads((run / "status.json").read_text())["status"] == "running"


def stop_at_the_first_checkpoint(p: forked.Program, run: Path) -> str:
    """As a queue does it; what was printed."""
    wait_for(lambda: list(run.glob("step_??????")))
    p.send_signal(signal.SIGTERM)
    code, out = end_of(p)
    assert code == 128 + signal.SIGTERM and f"stopped: {run.name} at step" in out, out
    return out


def test_a_study_killed_twice_ends_with_one_row_per_cell_and_the_losses_of_an_undisturbed_one(
    monkeypatch, tmp_path
):
    study, common = three_cells(tmp_path)
    logs = tmp_path / "logs"
    options = ("--logs_folder", str(logs), "--results_file", str(tmp_path / "results.csv"))
    cells = read_study(study, {}).runs
    names = [cell.default_id for cell in cells]

    kill_at_the_first_checkpoint(launcher(study, *options), logs / names[0])
    assert not lines(tmp_path / "results.csv")

    out = stop_at_the_first_checkpoint(launcher(study, *options), logs / names[1])
    assert f"resume: {names[0]} at step" in out
    found = [(r["run_id"], r["status"]) for r in rows(tmp_path)]
    assert found == [(names[0], "finished"), (names[1], "preempted")]

    code, out = end_of(launcher(study, *options))
    assert code == 0 and "T: 3 of 3 done" in out, out
    finished = [r for r in rows(tmp_path) if r["status"] == "finished"]
    assert [r["run_id"] for r in finished] == names
    stages = tmp_path / "tables/study.toml"
    assert f"--stages {os.path.relpath(stages)}" in out
    assert 'baseline = { attn_gate = "none" }' in stages.read_text()

    straight = tmp_path / "straight"
    straight.mkdir()
    for cell, row in zip(cells, finished, strict=True):
        own = dict(seed=cell.seed, attngate=cell.knobs.attngate, run_id=cell.default_id)
        assert run_here(monkeypatch, straight, **common, **own)[0] == 0
        assert losses(straight, cell.default_id) == losses(tmp_path, cell.default_id)
        assert rows(straight)[-1]["final_val_loss"] == row["final_val_loss"]
        assert row["code_sha256"][:6] == cell.code
