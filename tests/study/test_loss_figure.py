"""plot.py's default figure: validation loss against steps and time, side by side."""

import sys
from collections.abc import Sequence

import plot
import pytest
from lib.curves import Points, make_curve, read_metrics
from lib.plots import side_by_side_figure
from lib.program import UserError
from study_support import METRICS, arms, log_run, metrics_line, row, write


def drawn(monkeypatch, argv: Sequence[str]):
    """The figure that plot.py makes with these arguments."""
    figures = []
    make = side_by_side_figure
    monkeypatch.setattr(
        plot, "side_by_side_figure", lambda *a: figures.append(make(*a)) or figures[-1]
    )
    plot.main(argv)
    return figures[0]


@pytest.fixture
def study(tmp_path) -> list[str]:
    """Options for plot.py on two cells of two finished seeds, and one run that was preempted."""
    rows = [*arms([3.2, 3.3], [3.4, 3.5]), row(3, 9.0, status="preempted", run_id="cut")]
    for r in rows:
        log_run(tmp_path / "logs", r["run_id"], float(r["final_val_loss"]))
    options = [
        "--logs_folder",
        str(tmp_path / "logs"),
        "--results_file",
        str(write(tmp_path, rows)),
    ]
    return [*options, "--out", str(tmp_path / "figures")]


def test_plot_writes_png_and_svg_and_prints_their_paths(tmp_path, study, capsys):
    plot.main(["--stage", "stage1", *study])
    png, svg = (tmp_path / "figures" / f"val_loss_stage1.{kind}" for kind in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG") and b"<svg" in svg.read_bytes()
    assert capsys.readouterr().out.split() == [str(png), str(svg)]


def test_plot_draws_one_mean_line_and_one_band_per_cell(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", *study])
    assert [(len(axes.lines), len(axes.collections)) for axes in figure.axes] == [(2, 2), (2, 2)]
    by_label = {line.get_label(): line.get_ydata()[-1] for line in figure.axes[0].lines}
    assert by_label == pytest.approx({"none (n=2)": 3.45, "elementwise (n=2)": 3.25})
    assert "n=2" in figure.get_supxlabel()


def test_plot_with_each_draws_one_line_per_run(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", "--each", *study])
    assert [len(axes.lines) for axes in figure.axes] == [4, 4]
    assert figure.get_supxlabel().startswith("n=1")


def test_plot_leaves_step_0_out_of_view(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", *study])
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert axes.lines[0].get_ydata()[0] == 16.0  # it is drawn, and outside
    assert low < 3.2 and 3.5 < high < 12


def test_plot_names_units_on_every_axis(monkeypatch, study):
    steps, time = drawn(monkeypatch, ["--stage", "stage1", *study]).axes
    assert (
        "nats per token" in steps.get_ylabel()
        and "steps" in steps.get_xlabel()
        and "(s;" in time.get_xlabel()
    )


def test_plot_takes_runs_that_results_does_not_know_and_names_missing_ones(
    monkeypatch, tmp_path, study, capsys
):
    log_run(tmp_path / "logs", "running", 3.9)
    figure = drawn(monkeypatch, ["running", "cut", "nobody", *study])
    assert sorted(line.get_label() for line in figure.axes[0].lines) == [
        "none (n=1)",
        "running (n=1)",
    ]
    assert "nobody is left out" in capsys.readouterr().err


def test_a_mean_curve_uses_only_steps_that_all_its_runs_have():
    curve = make_curve(
        "x", [Points([0, 5, 10], [0, 1, 2], [9, 4, 2]), Points([0, 10], [0, 4], [9, 4])]
    )
    assert (curve.step, curve.seconds, curve.loss) == ([0, 10], [0, 3], [9, 3])
    assert (curve.low, curve.high) == ([9, 2], [9, 4])


def test_more_cells_than_colours_stay_distinguishable():
    curves = [make_curve(str(i), [Points([0, 10], [0, 1], [9, i])]) for i in range(20)]
    lines = side_by_side_figure(curves, "many", "nats per byte").axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20


def test_metrics_skip_torn_rows_and_the_last_of_a_repeated_step_wins(tmp_path):
    path = tmp_path / "metrics.csv"
    lines = [
        metrics_line(0, 9.0, 0),
        metrics_line(10, 5.0, 1),
        metrics_line(20, 4.0, 2),
        metrics_line(10, 6.0, 7),
    ]
    path.write_text("\n".join([METRICS, *lines[:3], "30,3.5,3.0,0.0", *lines[3:], "4"]))
    points, torn = read_metrics(path)
    assert (points.step, points.seconds, points.loss) == ([0, 10, 20], [0, 7, 2], [9, 6, 4])
    assert torn == 2


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="needs matplotlib: pip install scipy matplotlib"):
        side_by_side_figure([], "x", "nats per token")
