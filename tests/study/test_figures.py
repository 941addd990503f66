"""Figures, read from the figure objects.

Two cells of two seeds, 100 steps, validated every 10; times, rates and losses are formulas, so
that what a figure must show is known.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import plot
import pytest
from lib.groups import MOST_LINES, interpolate
from lib.logs import read_log
from lib.plots import style_of
from lib.program import UserError
from lib.stats import paired
from study_support import COLUMNS, TWO_BY_TWO, make_study, result, write_log, write_results


@pytest.fixture
def study(tmp_path) -> list[str]:
    return [*make_study(tmp_path), "--out", str(tmp_path / "figures")]


def drawn(monkeypatch, argv: Sequence[str]) -> dict:
    """The figures that plot.py makes with these arguments, by file name without folder and
    suffix."""
    figures = {}
    monkeypatch.setattr(
        plot, "figure_bytes", lambda figure, kind: figures.setdefault(len(figures), figure) and b""
    )
    names = []
    monkeypatch.setattr(plot, "write_whole", lambda path, data: names.append(path.stem))
    plot.main(argv)
    return dict(zip(names, figures.values(), strict=True))


def caption_of(figure) -> str:
    return figure.get_supxlabel().replace("\n", " ")


def test_every_kind_is_written_as_png_and_svg(tmp_path, study, capsys):
    plot.main(["--stage", "stage1", "--only", "all", *study])
    names = capsys.readouterr().out.split()
    assert len(names) == 16 and all(
        Path(name).exists() for name in names
    )  # all but the sweep: one rate
    png, svg = (tmp_path / "figures" / f"difference_stage1.{kind}" for kind in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG") and b"<svg" in svg.read_bytes()


def test_the_same_data_give_the_same_bytes(tmp_path, study):
    files = [tmp_path / "figures" / f"final_loss_stage1.{kind}" for kind in ("png", "svg")]
    seen = []
    for _ in range(2):
        plot.main(["--stage", "stage1", "--only", "final", *study])
        seen.append([path.read_bytes() for path in files])
    assert seen[0] == seen[1]


def test_only_draws_the_kinds_named_and_says_which_have_no_data(monkeypatch, study, capsys):
    figures = drawn(monkeypatch, ["--stage", "stage1", "--only", "forest,lr", *study])
    assert list(figures) == ["difference_stage1"]
    assert "lr: nothing to draw" in capsys.readouterr().err


@pytest.mark.parametrize(
    "only, message",
    [
        ("pie", "--only pie: no such kind; there are all, loss"),
        (",", "--only: give all"),
        ("lr", "nothing to draw for lr"),
    ],
)
def test_a_wrong_kind_is_one_line(study, only, message):
    with pytest.raises(UserError, match=message):
        plot.main(["--stage", "stage1", "--only", only, *study])


def test_curves_from_one_file_stand_for_logs_elsewhere(monkeypatch, tmp_path, study):
    curves = "".join(
        f"{run},{s},{4 - s / 100},{400 * s}\n" for run, *_ in TWO_BY_TWO for s in range(0, 101, 50)
    )
    (tmp_path / "curves.csv").write_text("run_id,step,val_loss,train_time_ms\n" + curves)
    argv = ["--stage", "stage1", "--only", "tokens", *study, "--logs_folder", "nowhere"]
    figure = drawn(monkeypatch, [*argv, "--curves", str(tmp_path / "curves.csv")])[
        "loss_by_tokens_stage1"
    ]
    assert list(figure.axes[0].lines[0].get_xdata()) == pytest.approx(
        [0, 50 * 0.524288, 100 * 0.524288]
    )


@pytest.mark.parametrize(
    "axis, words, last",
    [
        ("steps", "optimizer steps", 100),
        ("time", "(s;", 40.0),
        ("tokens", "(millions, all ranks)", 52.4288),
    ],
)
def test_loss_is_drawn_against_each_axis_with_its_unit(monkeypatch, study, axis, words, last):
    figure = drawn(monkeypatch, ["--stage", "stage1", "--only", axis, *study])[
        f"loss_by_{axis}_stage1"
    ]
    loss, difference = figure.axes
    assert words in difference.get_xlabel()
    assert "nats per token" in loss.get_ylabel() and "nats" in difference.get_ylabel()
    assert loss.lines[0].get_xdata()[-1] == pytest.approx(last)


def test_a_cell_is_a_mean_line_with_a_band_from_smallest_to_largest(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", "--only", "steps", *study])[
        "loss_by_steps_stage1"
    ]
    axes = figure.axes[0]
    assert {line.get_label(): line.get_ydata()[-1] for line in axes.lines} == pytest.approx(
        {"none (n=2)": 3.31, "elementwise (n=2)": 3.265}
    )
    band = axes.collections[0].get_paths()[0].vertices
    last = band[band[:, 0] == 100, 1]
    assert (last.min(), last.max(), len(axes.collections)) == (
        pytest.approx(3.30),
        pytest.approx(3.32),
        2,
    )
    assert "n=2 seeds" in caption_of(figure)


@pytest.mark.parametrize("axis", ["steps", "time", "tokens"])
def test_step_0_is_out_of_view(monkeypatch, study, axis):
    axes = drawn(monkeypatch, ["--stage", "stage1", "--only", axis, *study])[
        f"loss_by_{axis}_stage1"
    ].axes[0]
    low, high = axes.get_ylim()
    assert axes.lines[0].get_ydata()[0] == 16.0  # it is drawn, and outside
    assert 3.0 < low < 3.25 and 3.32 < high < 6


def test_the_lower_panel_shows_the_difference_to_the_baseline_at_equal_steps(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", "--only", "steps", *study])[
        "loss_by_steps_stage1"
    ]
    line = figure.axes[1].lines[0]
    assert list(line.get_ydata()) == pytest.approx([-0.045] * 10)
    assert figure.axes[1].collections[0].get_paths()[0].vertices[:, 1].min() == pytest.approx(
        -0.05
    )  # of seed 1


def test_the_difference_at_equal_time_interpolates_the_baseline_and_says_so(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", "--only", "time", *study])[
        "loss_by_time_stage1"
    ]
    x, y = figure.axes[1].lines[0].get_data()
    # step 50 of the slower arm is 22 s, where the baseline is at step 55, 0.1 nats further down
    assert y[list(x).index(22.0)] == pytest.approx(-0.045 + 0.1)
    assert max(x) <= 40.0  # where the baseline ends
    assert "interpolated to equal time" in caption_of(figure)


def test_a_single_run_has_no_band_and_the_caption_says_n_1(monkeypatch, study):
    figure = drawn(monkeypatch, ["a1", "--only", "steps", *study])["loss_by_steps_a1"]
    assert len(figure.axes) == 1 and not figure.axes[0].collections
    assert caption_of(figure).startswith("n=1: ") and "no spread is known" in caption_of(figure)


def test_lines_differ_in_dash_and_marker_not_only_in_colour():
    styles = [style_of(i) for i in range(12)]
    assert len({(s["linestyle"], s["marker"]) for s in styles}) == 12
    assert len({s["color"] for s in styles}) == 7


def test_more_cells_than_can_be_told_apart_are_left_out_and_counted(monkeypatch, tmp_path):
    runs = [(f"r{i}", 1, 3.0 + i / 100, "none" if i == 29 else f"gate{i}") for i in range(30)]
    argv = ["--stage", "stage1", "--only", "steps", *make_study(tmp_path, runs)]
    figure = drawn(monkeypatch, argv)["loss_by_steps_stage1"]
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert len(labels) == MOST_LINES and "none (n=1)" in labels and "gate0 (n=1)" in labels
    assert "18 more cells not drawn" in caption_of(figure)


def test_traces_show_rate_and_throughput_with_units(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", "--only", "traces", *study])["traces_stage1"]
    rate, speed = figure.axes
    assert "learning rate" in rate.get_ylabel() and "1000 tokens/s" in speed.get_ylabel()
    assert rate.lines[0].get_ydata()[0] == pytest.approx(0.0036 * 0.99)
    assert speed.lines[0].get_ydata()[0] == pytest.approx(524.288 / 0.4)
    assert "n=2" in caption_of(figure)


def test_final_loss_shows_each_seed_and_the_95_percent_interval_of_the_mean(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", "--only", "final", *study])[
        "final_loss_stage1"
    ]
    axes = figure.axes[0]
    seeds = [list(c.get_offsets()[:, 0]) for c in axes.collections if len(c.get_offsets()) == 2]
    assert seeds == [pytest.approx([3.30, 3.32]), pytest.approx([3.25, 3.28])]
    bars = [c.get_segments()[0][:, 0] for c in axes.collections if hasattr(c, "get_segments")]
    assert list(bars[0]) == pytest.approx(
        [3.31 - 12.7062 * 0.01, 3.31 + 12.7062 * 0.01], abs=1e-4
    )  # t(0.975, 1)
    assert axes.get_xlim()[0] > 2 and "nats per token" in axes.get_xlabel()
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "none\nn=2, baseline",
        "elementwise\nn=2",
    ]


def test_the_forest_has_the_difference_and_interval_of_the_table(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", "--only", "forest", *study])[
        "difference_stage1"
    ]
    axes = figure.axes[0]
    test = paired([3.25, 3.28], [3.30, 3.32])
    assert list(axes.lines[0].get_xdata()) == pytest.approx([test.lo, test.hi])
    assert axes.collections[0].get_offsets()[0, 0] == pytest.approx(-0.045)
    assert "n=2, paired, Holm p=" in axes.get_yticklabels()[0].get_text()
    assert axes.get_xlim()[0] < 0 < axes.get_xlim()[1] and "nats per token" in axes.get_xlabel()


@pytest.mark.parametrize(
    "kind, name", [("final", "final_loss"), ("forest", "difference"), ("overhead", "overhead")]
)
def test_one_seed_has_no_interval_and_the_figure_says_so(monkeypatch, tmp_path, kind, name):
    argv = ["--stage", "stage1", "--only", kind, *make_study(tmp_path, TWO_BY_TWO[::2])]
    figure = drawn(monkeypatch, argv)[f"{name}_stage1"]
    axes = figure.axes[0]
    assert not [c for c in axes.collections if hasattr(c, "get_segments")]
    assert not [
        line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() in "|_"
    ]
    words = " ".join([caption_of(figure), *(t.get_text() for t in axes.get_yticklabels())])
    assert "n=1" in words and "no interval" in words


def test_a_sweep_is_drawn_where_the_rate_varies(monkeypatch, tmp_path):
    rows = []
    for i, rate in enumerate((0.002, 0.004, 0.016)):
        for gate, gain in (("none", 0.0), ("elementwise", 0.1)):
            for seed in (1, 2):
                loss = 3.5 + 0.1 * abs(i - 1) - gain + seed / 100
                rows.append(result(f"{gate}{i}{seed}", seed, loss, gate, learning_rate=rate))
    path = write_results(tmp_path / "results.csv", rows)
    argv = [
        "--stage",
        "stage1",
        "--only",
        "lr",
        "--results_file",
        str(path),
        "--logs_folder",
        str(tmp_path),
    ]
    figure = drawn(monkeypatch, argv)["learning_rate_stage1"]
    axes = figure.axes[0]
    means = {
        line.get_label(): list(line.get_ydata())
        for line in axes.lines
        if "per rate" in str(line.get_label())
    }
    assert means == {
        "none (n=2 per rate)": pytest.approx([3.615, 3.515, 3.615]),
        "elementwise (n=2 per rate)": pytest.approx([3.515, 3.415, 3.515]),
    }
    assert axes.get_xscale() == "log" and "peak learning rate" in axes.get_xlabel()


def test_overhead_sets_step_time_against_loss(monkeypatch, study):
    figure = drawn(monkeypatch, ["--stage", "stage1", "--only", "overhead", *study])[
        "overhead_stage1"
    ]
    axes = figure.axes[0]
    assert axes.lines[0].get_xydata().tolist() == [pytest.approx([10.0, -0.045])]
    assert "(%)" in axes.get_xlabel() and "nats per token" in axes.get_ylabel()
    assert "(n=2)" in axes.lines[0].get_label()


def test_a_dollar_in_a_name_is_text_not_a_formula(tmp_path):
    runs = [("a", 1, 3.3, "none"), ("b", 1, 3.2, "x$\\frac$y")]
    options = make_study(tmp_path, runs)
    plot.main(["--stage", "stage1", "--only", "loss,overhead", *options, "--out", str(tmp_path)])
    assert (tmp_path / "val_loss_stage1.png").exists() and (
        tmp_path / "overhead_stage1.png"
    ).exists()


def test_a_log_with_everything_wrong_gives_what_is_right_and_names_the_rest(tmp_path):
    path = tmp_path / "metrics.csv"
    write_log(tmp_path, "x", 3.0)
    lines = (tmp_path / "x/metrics.csv").read_text().split("\n")
    bad = ["101,nan,nan,0.1,40.5,1,1,0.4,1.0,5", "50,3.0,2.5,0.1,21.0,1,1,0.4,1.0,5", "7,1", "torn"]
    path.write_text("\r\n".join([*lines[:-1], *bad]))
    log = read_log(path, "x")
    assert (
        log.val.step == list(range(0, 101, 10))
        and log.val.loss[5] == 2.5
        and log.val.seconds[0] == 0
    )
    assert log.problems == (
        "2 torn rows skipped",
        "1 validation without a finite loss and time, left out",
        "train_loss is not finite at 1 step, first at 101",
    )


def test_a_trace_is_thinned_by_means_and_medians(tmp_path):
    rows = "".join(f"{s},{s},,{s},{s},{s},{1 if s % 4 else 1000},,,\n" for s in range(1, 1001))
    (tmp_path / "metrics.csv").write_text(f"{COLUMNS}\n{rows}")
    trace = read_log(tmp_path / "metrics.csv", "x", most=100).trace
    assert len(trace["step"]) == 100 and trace["step"][:2] == [10, 20] and trace["lr"][0] == 10
    assert trace["train_loss"][0] == 5.5 and set(trace["tokens_per_s"]) == {1.0}
    assert math.isnan(trace["grad_norm"][0])


@pytest.mark.parametrize(
    "text, message", [("", "is empty"), ("step,loss\n", "has no column val_loss, train_time_s")]
)
def test_what_is_no_log_is_named(tmp_path, text, message):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_log(tmp_path / "metrics.csv", "x")


@pytest.mark.parametrize(
    "x, y", [(0, 5.0), (1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0), (-1, math.nan), (4.1, math.nan)]
)
def test_interpolation_is_linear_inside_and_nothing_outside(x, y):
    assert interpolate(x, [0, 2, 4], [5.0, 3.0, 2.0]) == pytest.approx(y, nan_ok=True)
