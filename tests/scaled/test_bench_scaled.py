"""scripts/scaled/bench_scaled.py at a tiny size: what it writes, and when it stops."""

import json

import bench_scaled
import forked
import pytest
import torch
from support import environment

from plumbing import UserError

TINY = dict(n_embd=16, n_layer=1, n_head=2, sliding_window=4)


@pytest.fixture
def tiny_sizes(monkeypatch) -> None:
    monkeypatch.setattr(bench_scaled, "STEP", bench_scaled.STEP | TINY | dict(sequence_length=64))
    monkeypatch.setattr(bench_scaled, "STUDY", bench_scaled.STUDY | dict(n_embd=16, n_head=2))
    smaller = bench_scaled.SMALLER | TINY | dict(mem_rows=64, ngram_rows=64)
    monkeypatch.setattr(bench_scaled, "SMALLER", smaller)
    monkeypatch.setattr(bench_scaled, "LENGTHS", [64, 128])


def test_the_bench_writes_both_sides_and_their_ratio_with_what_they_came_from(
    tiny_sizes, tmp_path, capsys
):
    parts = ["--parts", "step,blocks,length", "--repeats", "2", "--out", str(tmp_path)]
    assert bench_scaled.main(parts) == 0
    found = json.loads((tmp_path / "scaled_step_cpu.json").read_text())
    (step,) = found["rows"]
    assert step["ratio"] == pytest.approx(step["plain_ms"] / step["ours_ms"])
    assert step["bytes"] == 128 and step["n"] == 2
    assert found["torch"] == torch.__version__ and "git_commit" in found and found["threads"] == 1
    rows = json.loads((tmp_path / "scaled_blocks_cpu.json").read_text())["rows"]
    assert [row["model"] for row in rows] == list(bench_scaled.BLOCKS) and rows[-1]["ratio"] == 1
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ms"] / rows[-1]["ms"]) and row["n"] == 2
    rows = json.loads((tmp_path / "scaled_length_cpu.json").read_text())["rows"]
    assert [row["bytes"] for row in rows] == [64, 128] and rows[0]["of_the_shortest"] == 1
    assert all(row["us_per_byte"] > 0 and row["peak_mib"] > 100 for row in rows)
    assert capsys.readouterr().out.count("length: bytes") == 2


def test_the_part_train_counts_what_a_step_starts(tiny_sizes, tmp_path):
    assert bench_scaled.main(["--parts", "train", "--repeats", "1", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "scaled_train_cpu.json").read_text())["rows"]
    assert row["bytes"] == 2 * 4096 and row["cold_start_s"] > 0 and row["ms"] > 0
    by_kind = [value for name, value in row.items() if name.startswith("calls of ")]
    assert row["calls"] == sum(by_kind) > 100 and row["peak_mib"] > 100


def test_with_glibcs_memory_it_does_not_join_which_would_keep_what_is_freed(
    tiny_sizes, monkeypatch, tmp_path
):
    joined = lambda *given: pytest.fail("it keeps freed memory")
    monkeypatch.setattr(bench_scaled, "join_world", joined)
    options = ["--parts", "step", "--repeats", "1", "--malloc", "glibc", "--out", str(tmp_path)]
    assert bench_scaled.main(options) == 0
    assert (tmp_path / "scaled_step_cpu_glibc.json").exists()
    with pytest.raises(UserError, match="about CPU memory"):
        bench_scaled.main(["--malloc", "glibc", "--device", "cuda"])


# The deadline comes while the second part is measured.
PROGRAM = """
import signal
import time
import bench_scaled
def part_step(a, world):
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 3600
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    time.sleep(600)
bench_scaled.part_length = lambda a, world: [dict(bytes=1)]
bench_scaled.part_step = part_step
bench_scaled.main()
"""


def test_at_the_deadline_it_stops_at_once_and_leaves_the_parts_that_are_done(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    options = ["--parts", "length,step", "--out", str(tmp_path / "out"), "--deadline_s", "3600"]
    done = forked.run([tmp_path / "program.py", *options], tmp_path, environment())
    assert done.returncode == 0 and "stopped by the deadline; done: length" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scaled_length_cpu.json"]


def test_the_benchs_median_ratio_is_of_the_sides_it_timed():
    found = bench_scaled.compared(dict(ours=[1.0, 2.0, 3.0], plain=[6.0, 6.0, 6.0]))
    assert (found["ours_ms"], found["plain_ms"], found["ratio"], found["n"]) == (2, 6, 3, 3)
    assert found["low"] <= 3 <= found["high"]


WRONG = [
    (["--parts", "memory,nothing"], "no part 'nothing'"),
    (["--repeats", "0"], "--repeats and --threads"),
    (["--deadline_s", "0"], "--deadline_s"),
]


@pytest.mark.parametrize("words, message", WRONG)
def test_wrong_options_are_one_clear_error(words, message):
    with pytest.raises(UserError, match=message):
        bench_scaled.main(words)
