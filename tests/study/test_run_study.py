"""Studies: what a file may say, which runs are missing, their order, and launchers that are killed, stopped or two.

Most of it with a trainer that only pretends: a program without torch that starts in no time and does as its knobs say.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import run_study
from lib.board import Board
from lib.program import UserError
from lib.progress import Progress
from lib.study import read_study
from support import ROOT, SMALL, environment, losses, rows, run_here, write_data

PRETENDER = """
import json, os, signal, sys, time
from pathlib import Path
from filelock import FileLock

if __name__ != "__main__":
    from dataclasses import dataclass
    from plumbing import knob

    PRESETS, FREE = {"usual": {}}, "preset seconds fault runpod_instance_type run_id stage logs_folder results_file"

    class Knobs:
        preset: str = knob("usual", "", choices=tuple(PRESETS))
        gate: str = knob("none", "", choices=("none", "some", "more"))
        lr: float = knob(0.1, "", low=0, alias=("learning_rate",))
        num_iterations: int = knob(10, "", low=1)
        warmup_iters: int = knob(0, "", low=0)
        fast: bool = knob(False, "")
        seed: int = knob(1, "", low=0)
        seconds: float = knob(0.0, "")
        fault: str = knob("none", "")
        runpod_instance_type: str = knob("unknown", "")
        run_id: str = knob("", "")
        stage: str = knob("", "")
        logs_folder: str = knob("@/logs", "")
        results_file: str = knob("@/results.csv", "")

        def __post_init__(self):
            if self.warmup_iters > self.num_iterations:
                raise ValueError(f"WARMUP_ITERS={self.warmup_iters} does not fit into {self.num_iterations}")

    Knobs = dataclass(frozen=True)(Knobs)

else:
    e = os.environ
    folder, run, gate = Path(e["LOGS_FOLDER"], e["RUN_ID"]), e["RUN_ID"], e.get("GATE", "none")
    folder.mkdir(parents=True, exist_ok=True)

    def say(name, line):
        with open(folder.parent / name, "a") as f:
            f.write(line + "\\n")

    def status(word, step):
        text = json.dumps(dict(run_id=run, status=word, step=step, num_iterations=10, train_loss=2.0, val_loss=2.5))
        (folder / "status.tmp").write_text(text)
        os.replace(folder / "status.tmp", folder / "status.json")

    def hear(number, frame):
        say("heard.txt", f"{run} {number}")
        if e.get("FAULT") != "deaf":
            status("preempted", 5)
            sys.exit(128 + number)

    signal.signal(signal.SIGTERM, hear)
    signal.signal(signal.SIGINT, hear)
    say("started.txt", f"{run} {e.get('LR')} {e.get('RUNPOD_INSTANCE_TYPE')}")
    status("running", 1)
    time.sleep(float(e.get("SECONDS", 0)))
    first = (folder / "second").exists() is False
    (folder / "second").touch()
    if e.get("FAULT") == gate or e.get("FAULT") == "once" and first:
        raise RuntimeError(f"{gate} breaks")
    if e.get("FAULT") == "nan":
        status("nan", 3)
        sys.exit(1)
    if e.get("FAULT") == "refused":
        print("pretender.py: error: LR=1: no such thing", file=sys.stderr)
        sys.exit(2)
    path = Path(e["RESULTS_FILE"])
    with FileLock(f"{path}.lock"):
        text = "" if path.exists() else "run_id,seed,stage,final_val_loss,status,steps_done\\n"
        with open(path, "a") as f:
            f.write(f"{text}{run},{e['SEED']},{e['STAGE']},2.5,finished,10\\n")
    status("finished", 10)
"""


@pytest.fixture
def pretend(tmp_path) -> Callable[..., Path]:
    """Write the pretending trainer and a study of it; returns the study's path."""
    trainer = tmp_path / "pretender.py"
    trainer.write_text(PRETENDER.replace("@", str(tmp_path)))

    def study(stages: str, knobs: str = "") -> Path:
        path = tmp_path / "study.toml"
        path.write_text(f'title = "T"\ntrainer = "{trainer}"\n[knobs]\n{knobs}\n{stages}')
        return path

    return study


TWO_BY_TWO = (
    '[stage.a]\nseeds = [1, 2]\nbaseline = { gate = "none" }\ngrid = { gate = ["some", "none"] }\n'
)


def go(path: Path, *options: str) -> int:
    return run_study.main([str(path), *options])


def launcher(path: Path, *options: str) -> subprocess.Popen:
    """run_study.py in a process group of its own, its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/run_study.py"), str(path), *options],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(what: Callable[[], object], seconds: float = 60) -> object:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def started(tmp_path: Path) -> list[str]:
    """The runs' labels in the order of their starts: 'a-none-s1'."""
    return [line.split()[0].rsplit("-", 2)[0] for line in lines(tmp_path / "logs/started.txt")]


# ----------------------------------------------------------------------------
# The file


def problems(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_study(path, {})
    return str(error.value)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("", "has no stage"),
        (
            TWO_BY_TWO + "knobs = { gat = 1 }",
            r"\[stage.a\] knobs: gat is no knob of pretender.py; did you mean gate\?",
        ),
        (TWO_BY_TWO + "sedes = [1]", "sedes is no word of a study file; did you mean seeds"),
        (TWO_BY_TWO + "knobs = { lr = -1 }", "LR='-1': expected a number >= 0"),
        (
            TWO_BY_TWO + "knobs = { lr = [1, 2] }",
            r"lr = \[1, 2\]: expected one value \(lists are for grid\)",
        ),
        (TWO_BY_TWO.replace('"none" }', '"more" }'), "no cell is the baseline gate=more"),
        (
            TWO_BY_TWO.replace('"none" }', '"moar" }'),
            "baseline: GATE='moar': expected one of .* did you mean more",
        ),
        (TWO_BY_TWO.replace('baseline = { gate = "none" }', ""), "has no baseline"),
        (TWO_BY_TWO.replace('["some", "none"]', "[]"), "an empty list makes an empty grid"),
        (TWO_BY_TWO.replace('{ gate = ["some", "none"] }', "{}"), "grid is empty"),
        (
            TWO_BY_TWO + 'cells = [{ gate = "some" }]',
            "cells 'gate=some' and 'gate=some' are the same training",
        ),
        (
            TWO_BY_TWO + 'cells = [{ gate = "some", lr = 0.10 }]',
            "cells 'gate=some' and 'gate=some lr=0.1' are the same",
        ),
        (TWO_BY_TWO + "cells = [3]", "expected a table of knobs"),
        (TWO_BY_TWO + "knobs = { lr = 1, learning_rate = 1 }", "learning_rate is given twice"),
        (
            TWO_BY_TWO + "knobs = { seed = 1 }",
            "seed is not for a study's knobs: it is one of the stage's seeds",
        ),
        (
            TWO_BY_TWO + 'knobs = { run_id = "x" }',
            "run_id is not for a study's knobs: it is made of the run's content",
        ),
        (TWO_BY_TWO + 'knobs = { logs_folder = "x" }', "it is given with --logs_folder"),
        (TWO_BY_TWO + 'knobs = { stage = "x" }', "it is the name of the stage's table"),
        (TWO_BY_TWO + "target_loss = true", "expected a number of nats"),
        (TWO_BY_TWO.replace("[1, 2]", "[1, 1]"), "one occurs twice"),
        (TWO_BY_TWO.replace("[1, 2]", "[]"), "expected a list of whole numbers"),
        (TWO_BY_TWO.replace("seeds = [1, 2]", ""), "expected a list of whole numbers"),
        (TWO_BY_TWO + "[stage.a.b", "study.toml: "),
        (
            TWO_BY_TWO + "knobs = { num_iterations = 5, warmup_iters = 6 }",
            r"\[stage.a\] cell gate=some \(and 1 more\): WARMUP_ITERS=6 does not fit into 5",
        ),
        (
            TWO_BY_TWO.replace('["some", "none"]', '["none", "smoe"]'),
            r"\[stage.a\] cell gate=smoe: GATE='smoe': expected one of none, some, more; did you mean some\?",
        ),
    ],
    ids=lambda text: "" if "[stage." in text else text[:40],
)
def test_what_is_wrong_with_a_study_is_said_before_anything_runs(pretend, stages, words):
    assert re.search(words, problems(pretend(stages)))


def test_all_that_is_wrong_is_said_at_once(pretend):
    text = problems(
        pretend(TWO_BY_TWO + "knobs = { gat = 1, lr = -1 }\n[stage.b]\nseeds = 3\n", "fats = 1")
    )
    assert ": 4 problems:\n" in text
    assert all(
        w in text
        for w in ("[knobs]: fats", "gat is no", "(and 1 more): LR='-1'", "[stage.b]: seeds = 3")
    )


def test_a_trainer_or_file_that_is_not_there_is_named(pretend, tmp_path, monkeypatch):
    study = pretend(TWO_BY_TWO)
    text = study.read_text()
    study.write_text(text.replace("pretender.py", "trane_gpt.py"))
    assert "no such program" in problems(study)
    (tmp_path / "trane_gpt.py").write_text("x = 1")
    assert "defines no Knobs, PRESETS, FREE" in problems(study)
    study.write_text("title = 'x'")
    assert "names no trainer" in problems(study)
    assert "No such file" in problems(tmp_path / "none.toml")
    monkeypatch.setitem(sys.modules, "tomllib", None)
    assert "needs Python 3.11 or later (tomllib)" in problems(study)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--stage", "b"), "--stage b: .* has a"),
        (("--nodes", "2"), "--nodes goes with --slurm DIR"),
        (("--nproc", "0"), "--nproc 0: expected a whole number >= 1"),
        (("--retries", "-1"), "--retries -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(pretend, options, words):
    with pytest.raises(UserError, match=words):
        go(pretend(TWO_BY_TWO), *options)


def test_a_bad_study_is_one_line_and_exit_code_2(pretend):
    p = launcher(pretend(TWO_BY_TWO + "knobs = { lr = -1 }"))
    out = p.communicate(timeout=60)[0]
    assert p.returncode == 2 and out.count("\n") == 1 and out.startswith("run_study.py: error: "), (
        out
    )


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
        ("none", "sigmoid"), ("headwise", "sigmoid"), ("headwise", "ns_sigmoid"), ("elementwise", "sigmoid"),
        ("const", "sigmoid"),
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
    assert "4 runs, 0 done, 4 to do" in out and "622,592" in out and not list(tmp_path.iterdir())


def test_the_table_fits_on_the_screen_and_shows_what_is_going_on():
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
    board = Board(study, cells)
    for width, height in ((79, 24), (119, 50), (60, 10)):
        table = board.table(width, height, colour=False)
        assert len(table) < height and max(map(len, table)) <= width
        row = next(line for line in table if "running" in line and "250/1500" in line)
        assert "4.1234" in row and "1.3M" in row and "8m20s" in row
    table = board.table(79, 10**6, colour=False)
    assert table[0].startswith("Gated attention, 124M: 40 of 60 done, 1 running, 19 waiting, ETA")
    assert len(table) == 60 + 5 + 1


# ----------------------------------------------------------------------------
# What runs


def test_the_first_seed_of_every_cell_comes_first_and_the_baseline_before_the_others(
    pretend, tmp_path
):
    cells = 'cells = [{ gate = "more", lr = 7 }]\n'
    assert go(pretend(TWO_BY_TWO + cells)) == 0
    one = ["a-none", "a-some", "a-more-lr7"]
    assert started(tmp_path) == [f"{cell}-s{seed}" for seed in (1, 2) for cell in one]


def test_each_gate_of_a_sweep_runs_beside_the_baseline_of_its_own_rate(pretend):
    study = read_study(
        pretend(
            TWO_BY_TWO.replace("[1, 2]", "[1]").replace("grid = {", "grid = { lr = [0.1, 0.2],")
        ),
        {},
    )
    assert [c.label for c in study.runs] == [
        "lr=0.1 none",
        "lr=0.1 some",
        "lr=0.2 none",
        "lr=0.2 some",
    ]


def test_finished_runs_are_skipped_until_knobs_or_code_change(pretend, tmp_path, capsys):
    study, log = pretend(TWO_BY_TWO), tmp_path / "logs/started.txt"
    assert go(study) == 0 and len(lines(log)) == 4
    assert go(study) == 0 and len(lines(log)) == 4, "all are known by their content"

    pretend(TWO_BY_TWO, 'runpod_instance_type = "new"')
    assert go(study) == 0 and len(lines(log)) == 4, "a knob that moves no loss"
    pretend(TWO_BY_TWO, "lr = 0.2")
    assert go(study) == 0 and len(lines(log)) == 8, "one that does"
    pretend(TWO_BY_TWO.replace('"none"]', '"none", "more"]'), "lr = 0.2")
    assert go(study) == 0 and len(lines(log)) == 10, "only what was added"

    trainer = tmp_path / "pretender.py"
    trainer.write_text(trainer.read_text() + "# changed\n")
    capsys.readouterr()
    assert go(study, "--ignore-code", "--dry_run") == 0
    out = capsys.readouterr().out
    old = lines(log)[-1].split()[0][-6:]
    assert out.count(f"done code {old}") == 6 and "6 runs, 6 done, 0 to do" in out
    assert go(study, "--ignore-code") == 0 and len(lines(log)) == 10
    assert "6 runs of other code accepted" in capsys.readouterr().out
    assert go(study) == 0 and len(lines(log)) == 16, "the code is part of the content"
    assert len({r["run_id"] for r in rows(tmp_path)}) == 16


def test_a_row_or_a_status_alone_is_enough_to_know_a_finished_run(pretend, tmp_path, capsys):
    study, log = pretend(TWO_BY_TWO), tmp_path / "logs/started.txt"
    assert go(study) == 0
    status = next((tmp_path / "logs").glob("a-none-s1-*/status.json"))
    status.write_text('{"status": "running", "step": 10}')  # killed between its row and its status
    results = tmp_path / "results.csv"
    kept = [line for line in lines(results) if "a-some-s2" not in line]
    results.write_text("\n".join(kept) + "\na-some-s1,tor")
    capsys.readouterr()
    assert go(study) == 0 and len(lines(log)) == 4
    assert re.search(r"a-some-s2\S+ is finished, but \S+ has no row of it", capsys.readouterr().out)


def test_a_failing_cell_is_tried_again_and_listed_and_the_others_run(pretend, tmp_path, capsys):
    study = pretend(TWO_BY_TWO, 'fault = "some"')
    assert go(study) == 1
    assert started(tmp_path) == [
        "a-none-s1",
        "a-some-s1",
        "a-some-s1",
        "a-none-s2",
        "a-some-s2",
        "a-some-s2",
    ]
    out = capsys.readouterr().out
    assert re.search(r"failed: a-some-s1-\S+; \S+/logs/a-some-s1-\S+\.out ends in\n", out)
    assert out.count("    RuntimeError: some breaks") == 2 and "2 of 4 done, 2 failed" in out

    pretend(TWO_BY_TWO)
    assert go(study) == 0, "started again, without the fault"
    assert started(tmp_path)[6:] == ["a-some-s1", "a-some-s2"]


def test_an_accident_is_retried_but_neither_nan_nor_a_refusal(pretend, tmp_path, capsys):
    one = TWO_BY_TWO.replace("[1, 2]", "[1]")
    assert go(pretend(one, 'fault = "once"')) == 0
    assert started(tmp_path) == ["a-none-s1", "a-none-s1", "a-some-s1", "a-some-s1"]
    for fault, lr, said in (
        ("nan", 1, "(nan)"),
        ("refused", 2, "pretender.py: error: LR=1: no such thing"),
    ):
        capsys.readouterr()
        assert go(pretend(one, f'fault = "{fault}"\nlr = {lr}')) == 1
        assert capsys.readouterr().out.count(said) >= 2
    assert len(started(tmp_path)) == 8, "once each"


def test_only_the_study_decides_the_knobs(pretend, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LR", "9")
    monkeypatch.setenv("GATE", "more")
    monkeypatch.setenv("RUNPOD_INSTANCE_TYPE", "box")
    study = pretend(TWO_BY_TWO)
    assert go(study) == 0
    out = capsys.readouterr().out.splitlines()[0]
    assert (
        out
        == "not used, the study decides: GATE=more, LR=9; from the environment: RUNPOD_INSTANCE_TYPE=box"
    )
    assert {line.split(" ", 1)[1] for line in lines(tmp_path / "logs/started.txt")} == {"None box"}
    monkeypatch.setenv("SEEDS", "3")
    with pytest.raises(UserError, match="SEEDS is set, but it is not a knob; did you mean SEED"):
        go(study)


# ----------------------------------------------------------------------------
# Launchers that share, are stopped, are killed


def test_two_launchers_side_by_side_run_each_cell_once(pretend, tmp_path):
    study = pretend(TWO_BY_TWO.replace("[1, 2]", "[1, 2, 3]"), "seconds = 0.7")
    both = [launcher(study) for _ in range(2)]
    outs = [p.communicate(timeout=60)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert len(started(tmp_path)) == 6 == len(set(started(tmp_path))) == len(rows(tmp_path))
    assert all(re.search("^start: ", out, re.M) and "T: 6 of 6 done" in out for out in outs), (
        "both had a share"
    )


def test_ctrl_c_is_passed_on_once_and_a_second_one_kills(pretend, tmp_path):
    study = pretend(TWO_BY_TWO, 'seconds = 60\nfault = "deaf"')
    p = launcher(study)
    wait_for(lambda: started(tmp_path))
    child = int(wait_for(lambda: children(p.pid))[0])
    p.send_signal(signal.SIGINT)
    heard = tmp_path / "logs/heard.txt"
    wait_for(lambda: lines(heard))
    p.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert p.poll() is None and len(lines(heard)) == 1, "it waits for the run to save"
    p.send_signal(signal.SIGINT)
    out = p.communicate(timeout=20)[0]
    assert (
        p.returncode == 128 + signal.SIGINT
        and "stopped by SIGINT" in out
        and not Path(f"/proc/{child}").exists()
    )
    assert len(started(tmp_path)) == 1 == len(lines(heard))


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_launcher_that_is_killed_takes_its_run_along(pretend, tmp_path):
    p = launcher(pretend(TWO_BY_TWO, "seconds = 60"))
    wait_for(lambda: started(tmp_path))
    child = wait_for(lambda: children(p.pid))[0]
    p.kill()
    p.wait(timeout=20)
    wait_for(
        lambda: (
            not Path(f"/proc/{child}").exists()
            or "zombie" in Path(f"/proc/{child}/status").read_text()
        ),
        20,
    )
    status = next((tmp_path / "logs").glob("a-none-s1-*/status.json"))
    assert json.loads(status.read_text())["status"] == "preempted"


def test_a_study_killed_twice_ends_with_one_row_per_cell_and_the_losses_of_an_undisturbed_one(
    monkeypatch, tmp_path
):
    size = dict(
        num_iterations=60,
        warmdown_iters=30,
        val_every=20,
        save_every=5,
        device_batch_size=16,
        epochs_ok=1,
    )
    common = {k: v for k, v in (SMALL | size).items() if k != "compile"} | write_data(tmp_path)
    knobs = "\n".join(f"{k} = {json.dumps(v)}" for k, v in common.items()) + "\ncompile = false\n"
    stage = '[stage.a]\nseeds = [1, 2]\nbaseline = { attngate = "none" }\ngrid = { attngate = ["none", "headwise"] }\n'
    study = tmp_path / "study.toml"
    study.write_text(f'title = "T"\ntrainer = "train_gpt.py"\n[knobs]\n{knobs}{stage}')
    options = (
        "--logs_folder",
        str(tmp_path / "logs"),
        "--results_file",
        str(tmp_path / "results.csv"),
    )
    cells = read_study(study, {}).runs

    def saved(cell) -> bool:
        return bool(list((tmp_path / "logs" / cell.default_id).glob("step_??????")))

    def status(cell) -> dict:
        return json.loads((tmp_path / "logs" / cell.default_id / "status.json").read_text())

    p = launcher(study, *options)
    wait_for(lambda: saved(cells[0]))
    os.killpg(
        status(cells[0])["pid"], signal.SIGKILL
    )  # the machine is gone: trainer and launcher at once
    os.killpg(p.pid, signal.SIGKILL)
    p.communicate(timeout=20)
    assert status(cells[0])["status"] == "running" and not lines(tmp_path / "results.csv")

    p = launcher(study, *options)
    wait_for(lambda: saved(cells[1]))
    p.send_signal(signal.SIGTERM)
    out = p.communicate(timeout=60)[0]
    assert (
        p.returncode == 128 + signal.SIGTERM and f"stopped: {cells[1].default_id} at step" in out
    ), out
    assert f"resume: {cells[0].default_id} at step" in out
    assert [(r["run_id"], r["status"]) for r in rows(tmp_path)] == [
        (cells[0].default_id, "finished"), (cells[1].default_id, "preempted"),
    ]  # fmt: skip

    p = launcher(study, *options)
    out = p.communicate(timeout=120)[0]
    assert p.returncode == 0 and "T: 4 of 4 done" in out, out
    finished = [r for r in rows(tmp_path) if r["status"] == "finished"]
    assert [r["run_id"] for r in finished] == [c.default_id for c in cells]
    stages = tmp_path / "tables/study.toml"
    assert f"--stages {os.path.relpath(stages)}" in out
    assert 'baseline = { attn_gate = "none" }' in stages.read_text()

    straight = tmp_path / "straight"
    straight.mkdir()
    for cell, row in zip(cells, finished, strict=True):
        knobs = size | dict(seed=cell.seed, attngate=cell.knobs.attngate, run_id=cell.default_id)
        data = dict(input_bin=common["input_bin"], input_val_bin=common["input_val_bin"])
        assert run_here(monkeypatch, straight, **knobs, **data)[0] == 0
        assert losses(straight, cell.default_id) == losses(tmp_path, cell.default_id)
        assert rows(straight)[-1]["final_val_loss"] == row["final_val_loss"]
        assert row["code_sha256"][:6] == cell.code


# ----------------------------------------------------------------------------
# Job files, launch.sh


def test_slurm_files_are_bash_and_hold_the_run(pretend, tmp_path, capsys):
    study = pretend(TWO_BY_TWO, 'lr = 0.25\nrunpod_instance_type = "it\'s $HOME"')
    assert go(study, "--slurm", str(tmp_path / "jobs"), "--nodes", "2", "--nproc", "8") == 0
    assert "wrote 4 jobs" in capsys.readouterr().out and not started(tmp_path)
    files = sorted((tmp_path / "jobs").iterdir())
    assert len(files) == 5
    for path in files:
        assert subprocess.run(["bash", "-n", path]).returncode == 0
    job = next(p for p in files if p.name.startswith("a-none-s1"))
    text = job.read_text()
    assert all(
        w in text for w in ("#SBATCH --signal=USR1@90", "#SBATCH --requeue", "#SBATCH --nodes=2")
    )

    # The job itself, with Slurm's commands replaced by ones that only say what they were asked.
    tools = tmp_path / "tools"
    tools.mkdir()
    say = (
        '#!/bin/sh\necho "$(basename $0) $*; $RUN_ID $STAGE $SEED $LR $GATE $RUNPOD_INSTANCE_TYPE '
    )
    say += '${LEARNING_RATE-unset}"\n'
    for name in ("srun", "scontrol"):
        (tools / name).write_text(say + ("exit 3\n" if name == "srun" else ""))
        (tools / name).chmod(0o755)
    folder = tmp_path / "logs" / job.stem
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps(dict(status="preempted"), indent=1))
    env = os.environ | dict(
        PATH=f"{tools}:{os.environ['PATH']}", SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_ID="77"
    )
    env |= dict(GATE="more", LEARNING_RATE="9")
    done = subprocess.run(["bash", job], env=env, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert f"{job.stem} a 1 0.25 none it's $HOME unset" in done.stdout, (
        "what the submitter's shell says is not taken"
    )
    assert "--nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d" in done.stdout
    assert "scontrol requeue 77;" in done.stdout, "out of time, saved: it queues itself again"


def test_launch_starts_a_command_that_its_own_words_follow_and_stop(tmp_path):
    script, env = (
        str(ROOT / "scripts/launch.sh"),
        os.environ | dict(LOGS_FOLDER=str(tmp_path / "l o")),
    )
    launch = lambda *words: subprocess.run(
        [script, *words], env=env, capture_output=True, text=True, timeout=20
    )
    refused = launch()
    assert refused.returncode == 2 and refused.stderr.startswith("launch.sh: error: no command")
    assert "no such command" in launch("nonesuch").stderr and not (tmp_path / "l o").exists()

    done = launch("python3", "-c", "import time; print('hello'); time.sleep(60)")
    assert done.returncode == 0, done.stderr
    pid = int(re.search(r"started, pid (\d+)", done.stdout)[1])
    log, pid_file = sorted((tmp_path / "l o").iterdir())
    assert re.fullmatch(
        r"launch-\d{8}-\d{6}\.log", log.name
    ) and pid_file.read_text().strip() == str(pid)
    wait_for(lambda: "hello" in log.read_text(), 10)
    assert os.getsid(pid) == pid, "closing the terminal does not reach it"
    command = dict(line.split(None, 1) for line in done.stdout.splitlines()[1:])
    assert (
        "hello"
        in subprocess.run(
            command["follow"].replace("tail -f", "tail"), shell=True, capture_output=True, text=True
        ).stdout
    )
    assert subprocess.run(command["check"], shell=True, capture_output=True).returncode == 0
    assert subprocess.run(command["stop"], shell=True).returncode == 0
    wait_for(
        lambda: (
            not Path(f"/proc/{pid}").exists() or "zombie" in Path(f"/proc/{pid}/status").read_text()
        ),
        10,
    )
