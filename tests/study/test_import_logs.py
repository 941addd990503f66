"""Logs of other people's runs: every format and oddity becomes a run, or is named."""

import compare
import import_logs
import pytest
import split_results
from lib.program import UserError
from lib.speedrun_logs import read_log
from study_support import lines_of

PROGRAM = "import torch\nlr = {lr}\nprint('step:1/9 is no line of a step')\n"
RULER = "=" * 100


def log_text(
    final: float, lr: float = 0.1, line: str = "", steps: int = 500, end: str = "\n"
) -> str:
    """A log in the speedrun's format, validated every 125 steps."""
    lines = [RULER, PROGRAM.format(lr=lr), RULER, "Running pytorch 2.5", "Wed Nov 27", RULER]
    line = line or "step:{s}/{n} val_loss:{loss:.4f} train_time:{ms}ms step_avg:{avg}ms"
    for s in range(0, steps + 1, 125):
        loss = final + (10.8 - final) * (1 - s / steps) ** 2
        avg = f"{100.5:.2f}" if s else "nan"
        lines.append(line.format(s=s, n=steps, loss=loss, ms=s * 100, avg=avg))
    return end.join(lines) + end


def imported(tmp_path, *texts: str, options: tuple = ()) -> list[dict[str, str]]:
    """The rows after an import of these logs."""
    paths = []
    for i, text in enumerate(texts):
        paths.append(tmp_path / f"log{i}.txt")
        paths[-1].write_bytes(text.encode())
    import_logs.main([*map(str, paths), *places(tmp_path), *options])
    return lines_of(tmp_path / "results.csv")


def places(tmp_path) -> list[str]:
    return [
        "--results_file",
        str(tmp_path / "results.csv"),
        "--logs_folder",
        str(tmp_path / "logs"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "step:{s}/{n} val_loss:{loss:.4f} train_time:{ms}ms",
        "step:{s}/{n} val_loss:{loss:.6f}",
        "s:{s} tel:{loss:.4f}",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_each_format_becomes_a_run_with_its_curve_and_source(tmp_path, line, end):
    (row,) = imported(tmp_path, log_text(3.27, line=line, end=end))
    assert (row["status"], row["steps_done"], row["num_iterations"]) == ("imported", "500", "500")
    assert float(row["final_val_loss"]) == pytest.approx(3.27) and "imported" in row["notes"]
    metrics = lines_of(tmp_path / "logs" / row["run_id"] / "metrics.csv")
    assert [m["step"] for m in metrics] == ["0", "125", "250", "375", "500"]
    source = (tmp_path / "logs" / row["run_id"] / "source.py").read_text()
    assert "lr = 0.1" in source and RULER not in source and "val_loss" not in source


def test_line_ends_do_not_change_the_source_and_a_changed_line_does(tmp_path):
    rows = imported(tmp_path, log_text(3.2), log_text(3.3, end="\r\n"), log_text(3.2, lr=0.2))
    assert rows[0]["code_sha256"] == rows[1]["code_sha256"] != rows[2]["code_sha256"]
    assert [row["seed"] for row in rows] == ["1", "2", "1"]


def test_two_runs_in_one_file_are_two_runs(tmp_path):
    both = imported(tmp_path, log_text(3.2) + log_text(3.3, lr=0.2))
    assert [float(row["final_val_loss"]) for row in both] == [3.2, 3.3]
    steps = "".join(log_text(3.4).partition("step:0/")[1:])  # steps that start over, one source
    (tmp_path / "again").mkdir()
    again = imported(tmp_path / "again", log_text(3.2) + steps)
    assert len(again) == 2 and again[0]["code_sha256"] == again[1]["code_sha256"]


def test_a_cut_last_line_is_left_out_and_named_and_the_run_is_not_complete(tmp_path, capsys):
    text = log_text(3.27)
    (row,) = imported(tmp_path, text[: text.rindex(" train_time")])
    assert (row["status"], row["steps_done"]) == ("failed", "375")
    assert "the last line, of step 500, is cut" in capsys.readouterr().out


def test_nan_is_a_run_that_came_to_nothing(tmp_path):
    text = log_text(3.27).replace("step:500/500 val_loss:3.2700", "step:500/500 val_loss:nan")
    (row,) = imported(tmp_path, text)
    assert row["status"] == "nan" and row["final_val_loss"] == ""


def test_what_is_no_log_is_named(tmp_path):
    (tmp_path / "x.txt").write_text("nothing of a run\n")
    with pytest.raises(UserError, match=r"x\.txt: no line such as"):
        read_log(tmp_path / "x.txt")


def test_importing_twice_adds_nothing(tmp_path, capsys):
    imported(tmp_path, log_text(3.2))
    assert len(imported(tmp_path, log_text(3.2))) == 1
    assert "imported before" in capsys.readouterr().out


def test_the_sources_of_two_logs_are_compared(tmp_path, capsys):
    for name, lr in (("a.txt", 0.1), ("b.txt", 0.2)):
        (tmp_path / name).write_text(log_text(3.2, lr=lr))
    import_logs.main([str(tmp_path / "a.txt"), "--diff", str(tmp_path / "b.txt")])
    shown = capsys.readouterr().out
    assert "-lr = 0.2" in shown and "+lr = 0.1" in shown


def test_imported_runs_are_tabled_and_compared_with_the_boards_rule(tmp_path, capsys):
    old = [log_text(loss) for loss in (3.2790, 3.2795, 3.2785)]
    new = [log_text(loss, lr=0.2) for loss in (3.2700, 3.2705, 3.2710)]
    rows = imported(tmp_path, *old, *new, options=("--stage", "records"))
    a, b = (f"SOURCE={row['code_sha256'][:12]}" for row in (rows[0], rows[-1]))
    split_results.main([*places(tmp_path), "--out-dir", str(tmp_path / "out")])
    assert len(lines_of(tmp_path / "out/tables/records.csv")) == 2
    capsys.readouterr()
    compare.main([a, b, "--rule", "track3", *places(tmp_path)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(3.28 - 3.2790) * sqrt(3) = 0.0017, does not pass" in shown
    assert "(3.28 - 3.2705) * sqrt(3) = 0.0165, passes" in shown
    assert "pairwise: (A - B) / sqrt(1/3 + 1/3) = 0.0104, passes" in shown
