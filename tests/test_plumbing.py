"""What keeps a run alive, tried by doing the bad thing to it."""

import ast
import csv
import errno
import math
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ONE, ROOT, environment, run_here, same_tensors, write_data

import plumbing
import train_arith
import train_gpt
import train_gpu
import train_scaled
from plumbing import Clock, RunLog, UserError, read_knobs, write_shard
from train_gpt import Knobs

# ---------------------------------------------------------------- knobs


TRAINERS = (train_gpt, train_scaled, train_gpu, train_arith)


def read(argv=(), env=None, trainer=train_gpt):
    return read_knobs(trainer.Knobs, trainer.PRESETS, list(argv), env or {})


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (
            {"WARMUP_ITERS": "150", "NUM_ITERATIONS": "800"},
            "WARMUP_ITERS=150 .* WARMDOWN_ITERS=1450 do not fit into",
        ),
        ({"N_HEAD": "5"}, "N_EMBD=768 must be N_HEAD=5 times"),
        ({"BATCH_SIZE": "12"}, "BATCH_SIZE=12 must divide by 8"),
        ({"VAL_TOKENS": "1000"}, "VAL_TOKENS=1000 must be a multiple of SEQUENCE_LENGTH=1024"),
        ({"INPUT_BIN": "embedded"}, "go together"),
    ],
)
def test_knobs_that_do_not_fit_together_are_refused(env, words):
    with pytest.raises(UserError, match=words):
        read(env=env)


def blocks(path: Path) -> dict[str, ast.AST]:
    """Functions and classes of a trainer by name, without their docstrings; those under the mark '# same as' only, or
    all of train_gpt.py's."""
    text = path.read_text()
    marked = {i + 2 for i, line in enumerate(text.splitlines()) if line == "# same as train_gpt.py"}
    found = {}
    for node in ast.parse(text).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (
            first in marked or path.stem == "train_gpt"
        ):
            for inner in ast.walk(node):
                if (
                    isinstance(inner, ast.FunctionDef | ast.ClassDef)
                    and ast.get_docstring(inner) is not None
                ):
                    inner.body = inner.body[1:]
            found[node.name] = node
            marked.discard(first)
    assert path.stem == "train_gpt" or not marked, (
        f"{path}: a mark that stands before no function or class: {marked}"
    )
    return found


@pytest.mark.parametrize("trainer", TRAINERS[1:], ids=lambda t: t.__name__)
def test_blocks_marked_same_are_the_same(trainer):
    original = blocks(ROOT / "train_gpt.py")
    for name, block in blocks(Path(trainer.__file__)).items():
        assert ast.dump(block) == ast.dump(original[name]), (
            f"{trainer.__name__}.{name} is not train_gpt's"
        )


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")],
        cwd=tmp_path,
        env=environment(ATTNGATE="headwize"),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("train_gpt.py: error: ATTNGATE='headwize'")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("trainer", [t.__name__ for t in TRAINERS])
def test_importing_a_trainer_starts_nothing(tmp_path, trainer):
    code = f"import torch.distributed as d, {trainer}, os; assert not d.is_initialized(); print(os.listdir('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(ATTNGATE="bogus"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "[]\n", done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_way_out_is_named(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="sees no CUDA GPU; set DEVICE=cpu; PRESET=demo"):
        run_here(monkeypatch, tmp_path, device="cuda")


# ---------------------------------------------------------------- shards


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "magic":
        data[0] ^= 1
    elif how == "version":
        data[4] = 2
    elif how == "count":
        data[8] ^= 1
    elif how == "truncated":
        data = data[:-2]
    elif how == "odd":
        data = data[:-1]
    else:
        data = data[:6]
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["magic", "version", "count", "truncated", "odd", "header cut"])
def test_a_bad_shard_is_refused_by_name_before_training(monkeypatch, tmp_path, how):
    write_data(tmp_path)
    damage(tmp_path / "t_000002.bin", how)
    with pytest.raises(UserError, match=r"t_000002.bin: .*delete it"):
        run_here(monkeypatch, tmp_path)
    assert not (tmp_path / "results.csv").exists()


def test_ids_beyond_the_vocabulary_are_refused_by_name(monkeypatch, tmp_path):
    write_data(tmp_path)
    write_shard(tmp_path / "t_000001.bin", np.array([*range(60), 64] * 50, np.uint16))
    with pytest.raises(UserError, match=r"t_000001.bin: holds token id 64, VOCAB_SIZE=64"):
        run_here(monkeypatch, tmp_path)


def test_gaps_in_the_numbering_are_reported(monkeypatch, tmp_path):
    write_data(tmp_path, train=(3000, 3000, 3000, 3000))
    for n in (2, 3):
        (tmp_path / f"t_{n:06d}.bin").unlink()
    _, out = run_here(monkeypatch, tmp_path, num_iterations=1, warmup_iters=0, warmdown_iters=0)
    assert "shard_gaps: missing from the numbering: [2, 3]" in out


def test_missing_shards_name_the_command_that_gets_some(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"no token shards match .*nope.*cached_fineweb10B.py"):
        run_here(monkeypatch, tmp_path, input_bin=str(tmp_path / "nope_*.bin"))


# ---------------------------------------------------------------- run log and results


def test_a_torn_row_is_cut_off_before_the_next_one(monkeypatch, tmp_path):
    run_here(monkeypatch, tmp_path, run_id="a", num_iterations=4, warmdown_iters=0)
    path = tmp_path / "logs/a/metrics.csv"
    whole = path.read_text()
    path.write_text(whole + "5,1.2")
    (tmp_path / "logs/a/status.json").unlink()
    log = RunLog(tmp_path / "logs", "a", ONE, 4)
    log.csv.write("next\n")
    log.csv.close()
    log.lock.release()
    assert path.read_text() == whole + "next\n"


def log_of(folder: Path, **options) -> RunLog:
    """An open log whose rates are known."""
    log = RunLog(folder, "r", ONE, 9, **options)
    log.header(Knobs(), (), {})
    log.rates(100, 1.0)
    return log


def test_a_trainers_own_columns_are_in_the_line_and_in_metrics(tmp_path, capsys):
    log = log_of(tmp_path, extra=("aux_loss", "val_bpc"))
    clock = Clock(ONE)
    clock.start()
    log.step(1, 2.0, 0.1, 0.5, clock, aux_loss=0.25)
    log.validation(1, 1.5, clock, " val_bpc:2.164", val_bpc=2.164)
    log.step(2, 2.0, 0.1, 0.5, clock, line="a line of its own", aux_loss=math.nan)
    log.step(3, 2.0, 0.1, 0.5, clock, line="")
    log.close("finished", 3)
    with open(tmp_path / "r/metrics.csv") as f:
        first, second, _ = csv.DictReader(f)
    assert (first["aux_loss"], first["val_bpc"], first["val_loss"]) == ("0.25", "2.164", "1.500000")
    assert (second["aux_loss"], second["val_bpc"]) == ("", "")
    out = capsys.readouterr().out
    assert "step:1/9 train_loss:2.0000 aux_loss:0.25 train_time" in out and "val_bpc:2.164\n" in out
    assert "a line of its own" in out and "step:3" not in out.replace("finished: step:3", "")


TRACKERS = {
    "works": "class Run:\n def log(self, v, step): sent.append((step, v))\n def finish(self): sent.append('end')\n"
    "sent = []\ndef init(**facts): sent.append(facts); return Run()\n",
    "raises": "def init(**facts): raise RuntimeError('no key')\n",
    "hangs": "import threading\ndef init(**facts): threading.Event().wait()\n",
    "exits": "def init(**facts): raise SystemExit(3)\n",
}


@pytest.mark.parametrize("kind", [*TRACKERS, "absent"])
def test_a_tracker_gets_every_value_and_never_stops_a_run(monkeypatch, tmp_path, capsys, kind):
    name = f"tracker_that_{kind}"
    if kind in TRACKERS:
        (tmp_path / f"{name}.py").write_text(TRACKERS[kind])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plumbing.Tracker.close, "__defaults__", (0.5,))
    log = log_of(tmp_path)
    log.track(name, "flatrun", "r", Knobs())
    clock = Clock(ONE)
    clock.start()
    log.step(1, 2.0, 0.1, 0.5, clock)
    log.validation(1, 1.5, clock)
    log.close("finished", 1)
    out = capsys.readouterr().out
    if kind == "works":
        facts, first, second, end = sys.modules[name].sent
        assert facts["project"] == "flatrun" and facts["config"]["n_layer"] == 12
        assert (
            first[0] == 1
            and first[1]["train_loss"] == 2.0
            and second == (1, dict(val_loss=1.5))
            and end == "end"
        )
        assert "tracker:" not in out
    words = dict(
        absent="is not installed", raises="no key", hangs="has not finished", exits="SystemExit"
    )
    assert words.get(kind, "") in out and "finished: step:1/9" in out


def test_a_finished_run_id_is_refused(monkeypatch, tmp_path):
    short = dict(run_id="a", num_iterations=2, warmup_iters=0, warmdown_iters=0)
    assert run_here(monkeypatch, tmp_path, **short)[0] == 0
    with pytest.raises(UserError, match=r"run a is complete .*choose another RUN_ID"):
        run_here(monkeypatch, tmp_path, **short)


def test_a_run_id_in_use_is_refused(monkeypatch, tmp_path):
    log = RunLog(tmp_path / "logs", "a", ONE, 1)
    with pytest.raises(UserError, match="run a is being trained by another process"):
        run_here(monkeypatch, tmp_path, run_id="a")
    log.lock.release()


def test_a_log_folder_that_cannot_be_used_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"cannot be used .*; set LOGS_FOLDER or RUN_ID to another"):
        run_here(monkeypatch, tmp_path, logs_folder="/dev/null/x")
    (tmp_path / "logs/a").mkdir(parents=True)
    (tmp_path / "logs/a/status.json").write_text('{"stat')
    with pytest.raises(UserError, match="cannot be used"):
        run_here(monkeypatch, tmp_path, run_id="a")


def test_a_run_id_that_is_a_path_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"RUN_ID='\.\./x'"):
        RunLog(tmp_path, "../x", ONE, 1)


def test_results_with_other_columns_are_refused_before_training(monkeypatch, tmp_path):
    (tmp_path / "results.csv").write_text("run_id,loss\n")
    with pytest.raises(UserError, match=r"results.csv: .*set RESULTS_FILE to another"):
        run_here(monkeypatch, tmp_path)
    assert not (tmp_path / "logs").exists()


def _append(args) -> None:
    path, worker = args
    for i in range(20):
        row = dict(run_id=f"{worker}-{i}", notes="x" * 20_000, status="finished")
        plumbing.append_result(path, train_gpt.RESULTS, row, ONE)


def test_sixteen_processes_append_and_no_row_is_torn(tmp_path):
    path = tmp_path / "results.csv"
    with multiprocessing.get_context("fork").Pool(16) as pool:
        pool.map(_append, [(path, w) for w in range(16)])
    with open(path) as f:
        found = list(csv.DictReader(f))
    assert {r["run_id"] for r in found} == {
        f"{w}-{i}" for w in range(16) for i in range(20)
    } and len(found) == 320
    assert all(r["notes"] == "x" * 20_000 and r["status"] == "finished" for r in found)
    assert path.read_text().count("run_id,date") == 1


def test_a_torn_results_line_is_closed_and_kept(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("run_id,status\nold,fin")
    plumbing.append_result(path, ["run_id", "status"], dict(run_id="new", status="finished"), ONE)
    assert path.read_text().splitlines() == ["run_id,status", "old,fin", "new,finished"]


def test_the_log_holds_the_program_and_the_speedrun_lines(monkeypatch, tmp_path):
    run_here(monkeypatch, tmp_path, run_id="a")
    text = (tmp_path / "logs/a.txt").read_text()
    first, trainer, plumb, facts, lines = text.split(plumbing.RULE + "\n")
    assert (
        first == ""
        and trainer == (ROOT / "train_gpt.py").read_text()
        and plumb == (ROOT / "plumbing.py").read_text()
    )
    assert '"num_iterations": 12' in facts and "git_commit: " in facts and "nvidia-smi:" in facts
    step = r"step:\d+/12 {}_loss:\d+\.\d{{4}} train_time:\d+ms step_avg:(nan|\d+\.\d\d)ms"
    assert (
        len(re.findall(step.format("train"), lines)) == 12
        and len(re.findall(step.format("val"), lines)) == 4
    )


# ---------------------------------------------------------------- checkpoints

STATE = dict(step=1, w=torch.arange(1000.0), nested=dict(list=[torch.ones(3), 2, "x"], none=None))


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    plumbing.save_checkpoint(tmp_path, 1, STATE, ONE)
    found = plumbing.load_checkpoint(tmp_path, ONE)
    assert found["nested"]["list"][1:] == [2, "x"] and torch.equal(found["w"], STATE["w"])


def test_a_checkpoint_appears_by_one_rename_when_all_of_it_is_there(monkeypatch, tmp_path):
    rename, seen = Path.rename, []

    def watched(self, target):
        seen.append((plumbing.checkpoint_problem(self), Path(target).name, Path(target).exists()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    plumbing.save_checkpoint(tmp_path, 1, STATE, ONE)
    assert seen == [(None, "step_000001", False)]


@pytest.mark.parametrize("how", ["truncated", "flipped byte", "empty", "no manifest", "no state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, how):
    for step in (1, 2):
        plumbing.save_checkpoint(tmp_path, step, STATE | dict(step=step), ONE)
    path = tmp_path / "step_000002" / ("manifest.json" if how == "no manifest" else "state.pt")
    data = bytearray(path.read_bytes())
    if how.startswith("no"):
        path.unlink()
    elif how == "flipped byte":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(b"" if how == "empty" else data[:-100])
    said = []
    assert plumbing.load_checkpoint(tmp_path, ONE, said.append)["step"] == 1
    assert len(said) == 1 and "step_000002 is skipped" in said[0]


def test_only_the_newest_are_kept_and_leftovers_of_a_crash_go(tmp_path):
    (tmp_path / "step_000001.part").mkdir()
    for step in range(1, 6):
        plumbing.save_checkpoint(tmp_path, step, STATE, ONE, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000004", "step_000005"]


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(monkeypatch, tmp_path):
    plumbing.save_checkpoint(tmp_path, 1, STATE, ONE)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"No space left on device.*earlier ones are whole"):
        plumbing.save_checkpoint(tmp_path, 2, STATE, ONE)
    assert plumbing.load_checkpoint(tmp_path, ONE)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_checkpoint_cannot_run_code(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plumbing.save_checkpoint(tmp_path, 1, dict(step=1, bomb=Bomb()), ONE)
    with pytest.raises(pickle.UnpicklingError):
        plumbing.load_checkpoint(tmp_path, ONE)
    assert not Path("exploded").exists()


SAVER = """
import sys, torch
from pathlib import Path
from plumbing import World, save_checkpoint
w = World(0, 1, torch.device("cpu"))
state = torch.full((2_000_000,), 0.0)
print("ready", flush=True)
for step in range(int(sys.argv[2]), 10**6):
    save_checkpoint(Path(sys.argv[1]), step, dict(step=step, w=state.fill_(step)), w)
    print(step, flush=True)
"""


def test_sigkill_during_a_save_never_loses_the_last_good_checkpoint(tmp_path):
    rng, step = np.random.default_rng(0), 0
    for _ in range(12):
        p = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), str(step + 1)],
            env=environment(),
            stdout=subprocess.PIPE,
        )
        assert p.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.05, 0.25))
        p.kill()
        told = p.stdout.read().split()
        p.wait()
        state = plumbing.load_checkpoint(tmp_path, ONE, lambda line: pytest.fail(line))
        assert state is not None or not told, (
            "the first save was interrupted, or there is a checkpoint"
        )
        step = state["step"] if state else 0
        assert step >= int(told[-1] if told else 0), "a checkpoint that was reported is gone"
        assert state is None or torch.equal(state["w"], torch.full((2_000_000,), float(step)))
    assert step > 0


def test_resuming_with_other_knobs_or_shards_is_refused(monkeypatch, tmp_path):
    base = dict(run_id="a", num_iterations=8)
    run_here(monkeypatch, tmp_path, **base)
    shutil.rmtree(tmp_path / "logs/a/step_000008")
    status = tmp_path / "logs/a/status.json"
    status.write_text(status.read_text().replace("finished", "running"))
    with pytest.raises(
        UserError, match=r"run a was started with LR=0.01, not 0.02; resume it with the same"
    ):
        run_here(monkeypatch, tmp_path, **base, lr=0.02)
    write_data(tmp_path, train=(6000, 4000))
    with pytest.raises(UserError, match="run a was trained on other data"):
        run_here(monkeypatch, tmp_path, **base)
    write_data(tmp_path)
    code, out = run_here(monkeypatch, tmp_path, **base, val_every=2, device_batch_size=8)
    assert code == 0 and "resumed step:4 from a checkpoint written by 1 rank(s)" in out


# ---------------------------------------------------------------- clock and pulse


def test_the_clock_leaves_out_pauses_and_the_first_ten_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(plumbing.time, "perf_counter", lambda: now[0])
    clock = Clock(ONE)
    clock.start()
    for step in range(1, 31):
        now[0] += 100 if step <= 10 else 2
        clock.tick()
        if step % 5 == 0:
            clock.stop()
            now[0] += 1000
            clock.start()
    assert clock.step_avg_s == 2 and clock.train_s(30) == 40 and clock.train_s(5) == 0
    resumed = Clock(ONE, clock.timed_s, clock.timed_steps)
    resumed.start()
    for _ in range(20):
        now[0] += 2
        resumed.tick()
    assert resumed.step_avg_s == 2 and resumed.train_s(50) == 80, (
        "as if the run had not been interrupted"
    )


def test_same_tensors_sees_one_flipped_bit():
    a = dict(w=torch.zeros(3))
    b = dict(w=torch.tensor([0.0, 0.0, 1e-45]))
    assert same_tensors(a, a) and not same_tensors(a, b)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_that_a_cpu_step_frees_is_kept_for_the_next():
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, plumbing\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(2**25)\n"  # 128 MiB, 32,768 pages
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first = faults(), faults()\n"
        "with plumbing.world('cpu'):\n"
        "    print(*first, *[faults() for _ in range(40)])\n"
    )
    line = [sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=True)
    usual, again, *inside = map(int, done.stdout.split())
    if min(usual, again) < 10_000:
        pytest.skip("this system does not give freed memory back in the first place")
    assert max(inside[-10:]) < 1000, (
        "the heap settles within some calls; then nothing is cleared again"
    )
