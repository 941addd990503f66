"""status.py: a run's line says what is the case, also when the run cannot say it any more."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import status
from run_support import ID
from support import ROOT, environment

from plumbing import UserError


def dead_pid() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def write(logs: Path, run_id: str, **facts) -> None:
    known = dict(status="running", step=30, num_iterations=120, train_loss=2.5, val_loss=None)
    known |= dict(tokens_per_s=1234567.0, eta_s=3700.0, pid=os.getpid())
    known |= dict(host=socket.gethostname(), updated=time.time())
    (logs / run_id).mkdir(parents=True)
    (logs / run_id / "status.json").write_text(json.dumps(known | facts))


def lines_of(logs: Path, width: int = 100) -> dict[str, list[str]]:
    lines, _ = status.report(logs, None, width)
    assert all(len(line) <= width for line in lines[1:]), lines
    return {line.split()[0]: line.split() for line in lines[2:]}


def test_a_running_run_shows_step_loss_speed_and_what_is_left(tmp_path):
    write(tmp_path, "one", val_loss=2.625)
    assert lines_of(tmp_path)["one"][1:7] == [
        "running",
        "30/120",
        "25%",
        "2.5000",
        "2.6250",
        "1.2M",
    ]
    assert lines_of(tmp_path)["one"][7:] == ["1h01m", "0s", "ago"]


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        (dict(pid=dead_pid()), "died"),
        (dict(host="elsewhere", pid=1), "running"),
        (dict(host="elsewhere", updated=time.time() - 700), "died"),
        (dict(status="finished", pid=dead_pid()), "finished"),
        (dict(status="preempted", pid=dead_pid()), "preempted"),
        (dict(status="nan", pid=dead_pid()), "nan"),
    ],
)
def test_a_run_whose_process_is_gone_is_not_called_running(tmp_path, facts, state):
    write(tmp_path, "one", **facts)
    assert lines_of(tmp_path)["one"][1] == state
    code = status.main([f"--logs_folder={tmp_path}"])
    assert code == int(state in ("died", "nan"))


def test_running_runs_come_first_and_the_newest_next(tmp_path, capsys):
    now = time.time()
    for i in range(25):
        write(tmp_path, f"old{i:02d}", status="finished", updated=now - 1000 + i)
    write(tmp_path, "live", updated=now - 5000)
    assert status.main([f"--logs_folder={tmp_path}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[2:5]] == ["live", "old24", "old23"]
    assert len(said) == 2 + 20 + 1 and said[-1] == "... and 6 older; --all shows them"


def test_a_torn_or_odd_status_file_is_counted_and_hurts_nothing(tmp_path):
    write(tmp_path, "one")
    for i, text in enumerate(["", "{", "[]", '{"status": "running", "step": "many"}']):
        (tmp_path / f"bad{i}").mkdir()
        (tmp_path / f"bad{i}/status.json").write_text(text)
    lines, _ = status.report(tmp_path, None, 100)
    assert lines[-1] == "4 status files could not be read" and "one" in lines[2]


def test_long_names_are_cut_to_the_width_of_the_terminal(tmp_path):
    write(tmp_path, "x" * 120)
    lines, _ = status.report(tmp_path, None, 90)
    assert all(len(line) <= 90 for line in lines[1:])


def test_a_real_run_is_shown_as_it_ended(home):
    assert lines_of(home / "logs")[ID][1:3] == ["finished", "12/12"]


def test_no_run_and_no_folder_are_said(tmp_path, capsys):
    assert status.main([f"--logs_folder={tmp_path}"]) == 0
    assert "no run in" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such folder"):
        status.main([f"--logs_folder={tmp_path / 'none'}"])


def test_watch_shows_it_again_until_ctrl_c_without_importing_torch(tmp_path):
    write(tmp_path, "one")
    leader, terminal = pty.openpty()
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts/status.py"), "--watch=0.1"]
    child = subprocess.Popen(
        [*command, f"--logs_folder={tmp_path}"],
        stdout=terminal, stderr=subprocess.PIPE, env=environment(), text=True,
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    while seen.count(b"30/120") < 3:
        seen += os.read(leader, 4096)
    child.send_signal(signal.SIGINT)
    _, imports = child.communicate(timeout=200)
    assert child.returncode == 0
    assert " torch" not in imports and "Traceback" not in imports


def test_the_first_lines_can_be_taken_by_head(tmp_path):
    for i in range(9):
        write(tmp_path, f"run{i}")
    program = f"{sys.executable} {ROOT / 'scripts/status.py'} --logs_folder={tmp_path}"
    line = f"{program} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment())
    assert "Traceback" not in done.stderr and done.stdout.startswith("9 runs in")
