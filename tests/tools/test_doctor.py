"""doctor.py: what would stop a run is BAD with a way out, and the exit code says so."""

import shutil
import subprocess
import sys

import doctor
import pytest
import torch
from support import ROOT, environment, write_data


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """An environment without knobs, in which runs write to a folder of the test's."""
    for name in (*doctor.LAUNCHER, "OMP_NUM_THREADS", "INPUT_BIN", "INPUT_VAL_BIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGS_FOLDER", str(tmp_path / "logs"))
    return monkeypatch


def visit(capsys, *flags: str) -> tuple[int, dict[str, str], str]:
    """Exit code, the line of each subject, and the whole text."""
    code = doctor.main(list(flags))
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line[:4].strip()]
    return code, {line[6:].split(":")[0]: line for line in lines}, text


def test_a_machine_that_can_train_is_called_so(clean, capsys):
    code, lines, text = visit(capsys)
    assert code == 0, text
    assert text.splitlines()[-1] == "nothing stands in the way"
    assert lines["torch"].startswith("ok") and torch.__version__ in lines["torch"]


def test_torch_of_another_version_is_told(clean, capsys):
    clean.setattr(torch, "__version__", "2.8.0+cu128")
    code, lines, _ = visit(capsys)
    assert code == 1 and lines["torch"].startswith("BAD")


def test_half_of_the_launchers_variables_are_bad(clean, capsys):
    clean.setenv("RANK", "0")
    clean.setenv("WORLD_SIZE", "8")
    code, lines, text = visit(capsys)
    assert code == 1 and lines["launcher variables"].startswith("BAD")
    assert "LOCAL_RANK MASTER_ADDR MASTER_PORT missing" in text


def test_shards_are_counted_and_a_cut_one_is_bad(clean, capsys, tmp_path):
    for name, pattern in write_data(tmp_path).items():
        clean.setenv(name.upper(), pattern)
    assert "2 with 9,000 tokens" in visit(capsys)[1]["shards train"]
    shard = tmp_path / "t_000002.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    code, lines, text = visit(capsys)
    assert code == 1 and lines["shards train"].startswith("BAD") and "t_000002.bin" in text


def test_missing_packages_are_bad_and_missing_extras_are_not(clean, capsys):
    find = doctor.util.find_spec
    clean.setattr(doctor.util, "find_spec", lambda name: None if name == "scipy" else find(name))
    code, lines, _ = visit(capsys)
    assert code == 0 and "scipy (confidence intervals" in lines["more packages"]
    clean.setattr(doctor.util, "find_spec", lambda name: None if name == "tqdm" else find(name))
    code, lines, text = visit(capsys)
    assert code == 1 and "missing: tqdm" in lines["packages"]
    assert "pip install -r requirements.txt" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_bad_only_for_those_who_need_one(clean, capsys):
    assert visit(capsys)[0] == 0
    code, lines, _ = visit(capsys, "--device=cuda")
    assert code == 1 and lines["GPU"].startswith("BAD") and lines["driver"].startswith("BAD")


def test_a_check_that_fails_is_told_and_the_others_are_made(clean, capsys):
    def broken(args):
        yield doctor.Finding("half", doctor.OK, "done")
        raise OSError("gone")

    clean.setattr(doctor, "CHECKS", (broken, *doctor.CHECKS))
    code, lines, _ = visit(capsys)
    assert code == 1 and "gone" in lines["broken"] and {"half", "python"} <= lines.keys()


def test_knobs_that_the_environment_sets_are_named(clean, capsys):
    clean.setenv("N_LAYER", "3")
    assert "N_LAYER=3" in visit(capsys)[1]["knobs in the environment"]


def test_it_says_where_torch_is_missing_instead_of_failing(tmp_path):
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    command = [python, "-S", str(ROOT / "scripts/doctor.py")]  # without site-packages
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "BAD   torch:" in done.stdout and "source .venv/bin/activate" in done.stdout
