"""The proof programs of train_scaled.py as a user starts them. Tiny models; nothing is learned."""

import json

import byte_models as lib
import curriculum_intelligence as intelligence
import mqar
import position_curve
import pytest
import recall_fixed as recall
import torch
from programs_support import TEXT, read_csv, tiny

from plumbing import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    """A tiny model, one without memory and one of full attention, as files."""
    folder, out = tmp_path_factory.mktemp("weights"), {}
    own = dict(
        full={},
        window=dict(memory="off"),
        attention=dict(memory="off", sliding_window=None, sequence_length=256),
    )
    for name, changes in own.items():
        out[name] = str(folder / f"{name}.pth")
        recall.save(tiny(**changes), folder / f"{name}.pth")
    (folder / "text.txt").write_bytes(TEXT[:5001])
    return out | dict(text=str(folder / "text.txt"))


def test_recall_writes_its_grid_its_sums_and_what_made_them(weights, tmp_path, capsys):
    out = tmp_path / "new/recall"
    options = "--lengths 256,300 --depths 0,50,100 --n 2".split()
    models = ["--weights", weights["full"], "--window_weights", weights["window"]]
    recall.main([*models, "--out", str(out), "--filler", weights["text"], *options])
    rows = read_csv(out.with_suffix(".csv"))
    about = json.loads(out.with_suffix(".json").read_text())
    assert len(rows) == 2 * 3 * 3
    assert {r["model"] for r in rows} == {"full", "memory zeroed", "window only"}
    sizes = {(r["model"], r["state_bytes"]) for r in rows}
    assert len(sizes) == 3, "the state does not grow with the text"
    assert about["options"]["n"] == 2 and about["git_commit"]
    assert about["sums"] and about["reach_patches"] == 4
    assert "1.00*" not in capsys.readouterr().out


def test_recall_trains_its_models_and_saves_them(tmp_path, weights):
    out, filler = tmp_path / "recall", ["--filler", weights["text"]]
    knobs = "--knobs n_embd=16 n_head=2 sliding_window=2 num_iterations=2 warmup_iters=0".split()
    sizes = "--train_length 160 --batch_size 2 --lengths 200 --depths 0 --n 2".split()
    recall.main(["--train", "--out", str(out), *filler, *sizes, *knobs])
    about = json.loads(out.with_suffix(".json").read_text())
    assert set(about["seconds_training"]) == {"full", "window only"}
    assert about["trained_length"] == 160
    again = lib.load(tmp_path / "recall_window.pth", torch.device("cpu"))
    assert again.cfg.memory == "off" and again.cfg.num_iterations == 2
    tuned = [*sizes, "--knobs", "num_iterations=1", "warmup_iters=0"]
    files = ["--weights", str(tmp_path / "recall_full.pth"), "--out", str(tmp_path / "b")]
    recall.main(["--train", *files, *filler, *tuned])
    assert lib.load(tmp_path / "b_full.pth", torch.device("cpu")).cfg.n_embd == 16


def test_mqar_writes_a_line_per_model_seed_pairs_and_distance(tmp_path, capsys):
    out = tmp_path / "mqar"
    options = "--pairs 2 --test_pairs 2,4 --distances 4,8 --n 3 --seeds 0,1".split()
    knobs = ["n_embd=16", "sliding_window=3", "num_iterations=1", "warmup_iters=0", "batch_size=2"]
    mqar.main([*options, "--out", str(out), "--knobs", *knobs])
    rows = read_csv(out.with_suffix(".csv"))
    assert len(rows) == 3 * 2 * 2 * 2 and {r["beyond_window"] for r in rows} == {"1"}
    assert {r["n"] for r in rows} == {"6", "12"} and "chance" in capsys.readouterr().out


def test_position_curve_writes_its_table_its_figure_and_the_compressors(weights, tmp_path, capsys):
    out = tmp_path / "curve"
    models = ["--weights", weights["full"], "--window_weights", weights["window"]]
    models += ["--full_attention_weights", weights["attention"]]
    position_curve.main([*models, "--text", weights["text"], "--length", "1024", "--out", str(out)])
    rows = read_csv(out.with_suffix(".csv"))
    about = json.loads(out.with_suffix(".json").read_text())
    assert len(rows) == 5 * 5 and sum(int(r["bytes"]) for r in rows if r["model"] == "full") == 5001
    totals = {r["name"]: r for r in about["totals"]}
    share = about["characters"] / about["bytes"]
    assert totals["full"]["bits_per_char"] * share == pytest.approx(totals["full"]["bits_per_byte"])
    mean = (
        sum(float(r["bits_per_byte"]) * int(r["bytes"]) for r in rows if r["model"] == "full")
        / 5001
    )
    assert mean == pytest.approx(totals["full"]["bits_per_byte"])
    assert out.with_suffix(".png").stat().st_size > 10_000 and "xz -9e" in capsys.readouterr().out


def test_intelligence_writes_its_table_and_every_continuation(weights, tmp_path, capsys):
    out = tmp_path / "ci"
    options = ["--samples", "2", "--bytes", "20", "--heldout", weights["text"], "--out", str(out)]
    intelligence.main(["--weights", weights["full"], *options])
    rows = read_csv(out.with_suffix(".csv"))
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert [r["n"] for r in rows[:3]] == ["54", "37", "91"] and rows[0]["chance"] == "0.5"
    assert {
        r["value"] for r in rows if r["source"] == "held-out text" and r["measure"] == "valid utf8"
    } == {"1.0"}
    assert page.count("\n- ") == 8 and page.startswith("| measure")
    again = tmp_path / "again"
    intelligence.main(["--weights", weights["full"], *options[:-1], str(again)])
    assert again.with_suffix(".md").read_text(encoding="utf-8") == page


NO = "no-such-thing"
WRONG = [
    (recall, [], "no model"),
    (recall, ["--run", NO], "no run"),
    (recall, ["--weights", NO], "no such file"),
    (recall, ["--weights", NO, "--run", NO], "both name a model"),
    (recall, ["--train", "--filler", NO], "no text there"),
    (recall, ["--train", "--lengths", "40"], "does not hold key and question"),
    (recall, ["--train", "--depths", "0,101"], "--depths 0,101"),
    (recall, ["--train", "--train_length", "100"], "too short for a key beyond"),
    (recall, ["--train", "--knobs", "n_embd"], "expected name=value"),
    (recall, ["--train", "--knobs", "d_modle=3"], "d_model"),
    (recall, ["--train", "--knobs", "sliding_window=off"], "SLIDING_WINDOW=off sees everything"),
    (recall, ["--train", "--n", "0"], "--n 0"),
    (mqar, ["--pairs", "100"], "more letters"),
    (mqar, ["--letters", "27"], "--letters 27"),
    (mqar, ["--knobs", "n_head=3"], "N_HEAD=3"),
    (mqar, ["--seeds", "a"], "--seeds a"),
    (position_curve, [], "no model"),
    (position_curve, ["--weights", NO, "--length", "30"], "--length 30"),
    (intelligence, [], "no model"),
    (intelligence, ["--weights", NO, "--temperature", "-1"], "--temperature"),
]


@pytest.mark.parametrize("program, words, message", WRONG)
def test_wrong_input_is_one_clear_error(program, words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        program.main([*words, "--out", str(tmp_path / "x")])


def test_a_model_with_memory_is_no_window_only_control(weights, tmp_path):
    models = ["--weights", weights["full"], "--window_weights", weights["full"]]
    for program in (recall, position_curve):
        with pytest.raises(UserError, match="no window-only control"):
            program.main([*models, "--out", str(tmp_path / "x")])


def test_a_gpu_that_is_not_there_is_an_error(weights, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for program in (recall, position_curve, intelligence):
        with pytest.raises(UserError, match="no CUDA GPU"):
            program.main(
                ["--weights", weights["full"], "--device", "cuda", "--out", str(tmp_path / "x")]
            )
