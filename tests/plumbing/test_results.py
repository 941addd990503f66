"""The results file that all runs share: whole rows, whatever happens."""

import csv
import multiprocessing
import os

import pytest
from support import ONE, rows, run_here

from plumbing import UserError, append_result
from train_gpt import RESULTS


def _append(args) -> None:
    path, worker = args
    for i in range(20):
        row = {"run_id": f"{worker}-{i}", "notes": "x" * 20_000, "status": "finished"}
        append_result(path, RESULTS, row, ONE)


def test_sixteen_processes_append_and_no_row_is_torn(tmp_path):
    path = tmp_path / "results.csv"
    with multiprocessing.get_context("fork").Pool(16) as pool:
        pool.map(_append, [(path, worker) for worker in range(16)])
    with open(path) as file:
        found = list(csv.DictReader(file))
    expected = {f"{worker}-{i}" for worker in range(16) for i in range(20)}
    assert {row["run_id"] for row in found} == expected and len(found) == 320
    assert all(row["notes"] == "x" * 20_000 and row["status"] == "finished" for row in found)
    assert path.read_text().count("run_id,date") == 1


def test_a_torn_results_line_is_closed_and_kept(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("run_id,status\nold,fin")
    append_result(path, ["run_id", "status"], {"run_id": "new", "status": "finished"}, ONE)
    assert path.read_text().splitlines() == ["run_id,status", "old,fin", "new,finished"]


def test_results_with_other_columns_are_refused_before_training(monkeypatch, tmp_path):
    (tmp_path / "results.csv").write_text("run_id,loss\n")
    with pytest.raises(UserError, match=r"results.csv: .*set RESULTS_FILE to another"):
        run_here(monkeypatch, tmp_path)
    assert not (tmp_path / "logs").exists()


def test_a_disk_that_fills_up_within_a_row_takes_the_row_back_and_fails_the_run(
    monkeypatch, tmp_path
):
    """os.write returns short before it fails, as on a full disk; then the run can be finished."""
    write, budget = os.write, [100]

    def full(descriptor: int, data) -> int:
        if budget[0] <= 0:
            raise OSError(28, "No space left on device")
        written = write(descriptor, bytes(data[: budget[0]]))
        budget[0] -= written
        return written

    monkeypatch.setattr("plumbing.results.os.write", full)
    with pytest.raises(UserError, match=r"row could not be written .*start the same run again"):
        run_here(monkeypatch, tmp_path, run_id="a")
    assert (tmp_path / "results.csv").read_text() == ""
    monkeypatch.setattr("plumbing.results.os.write", write)
    code, out = run_here(monkeypatch, tmp_path, run_id="a")
    assert code == 0 and "resumed step:12" in out
    assert [row["status"] for row in rows(tmp_path)] == ["finished"]


def test_a_row_says_where_tokens_are_bytes(monkeypatch, tmp_path):
    run_here(monkeypatch, tmp_path, vocab_size=320)
    run_here(monkeypatch, tmp_path, vocab_size=256)
    of_tokens, of_bytes = (row["notes"].split() for row in rows(tmp_path))
    assert "unit=bytes" in of_bytes and "unit=bytes" not in of_tokens
