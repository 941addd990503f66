"""Which runs are missing, their order, and launchers that are killed, stopped or two.

All of it with a trainer that only pretends (pretender.py).
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from lib.program import UserError
from lib.study import read_study
from pretender import TWO_BY_TWO, end_of, go, launcher, lines, started, wait_for
from study_support import ROOT, rows


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
    unused, told = out.split("; ")
    assert unused == "not used, the study decides: GATE=more, LR=9"
    assert told == "from the environment: RUNPOD_INSTANCE_TYPE=box"
    assert {line.split(" ", 1)[1] for line in lines(tmp_path / "logs/started.txt")} == {"None box"}
    monkeypatch.setenv("SEEDS", "3")
    with pytest.raises(UserError, match="SEEDS is set, but it is not a knob; did you mean SEED"):
        go(study)


def test_two_launchers_side_by_side_run_each_cell_once(pretend, tmp_path):
    """The first run ends when a second one has started beside it, however late that is."""
    study = pretend(TWO_BY_TWO.replace("[1, 2]", "[1, 2, 3]"), 'fault = "alone"')
    both = [launcher(study) for _ in range(2)]
    codes, outs = zip(*map(end_of, both), strict=True)
    assert codes == (0, 0), outs
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
    assert p.process.is_alive() and len(lines(heard)) == 1, "it waits for the run to save"
    p.send_signal(signal.SIGINT)
    code, out = end_of(p)
    assert (
        code == 128 + signal.SIGINT
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
    p.send_signal(signal.SIGKILL)
    p.wait()
    wait_for(
        lambda: (
            not Path(f"/proc/{child}").exists()
            or "zombie" in Path(f"/proc/{child}/status").read_text()
        )
    )
    status = next((tmp_path / "logs").glob("a-none-s1-*/status.json"))
    assert json.loads(status.read_text())["status"] == "preempted"


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
        os.environ | dict(LOGS_FOLDER=str(tmp_path / "l o"), LAUNCH_WAIT_S="1"),
    )
    launch = lambda *words: subprocess.run(
        [script, *words], env=env, capture_output=True, text=True, timeout=200
    )
    refused = launch()
    assert refused.returncode == 2 and refused.stderr.startswith("launch.sh: error: no command")
    assert "no such command" in launch("nonesuch").stderr and not (tmp_path / "l o").exists()

    done = launch("python3", "-c", "import time; print('hello'); time.sleep(600)")
    assert done.returncode == 0, done.stderr
    pid = int(re.search(r"started, pid (\d+)", done.stdout)[1])
    log, pid_file = sorted((tmp_path / "l o").iterdir())
    assert re.fullmatch(
        r"launch-\d{8}-\d{6}\.log", log.name
    ) and pid_file.read_text().strip() == str(pid)
    wait_for(lambda: "hello" in log.read_text())
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
        )
    )
