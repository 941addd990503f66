"""export.py: an export is bitwise the checkpoint's model, or has no name."""

import json
from pathlib import Path

import export
import pytest
import sample
import torch
from lib import runs
from run_support import ID, make_run, spoil
from safetensors.torch import load_file, save_file
from support import knobs, random_sibling, rows, same_tensors, save_sibling

from plumbing import UserError


def exported(folder: Path, out: Path, *flags: str, run: str = "made") -> Path:
    export.main([f"--run={run}", f"--logs_folder={folder / 'logs'}", f"--out={out}", *flags])
    return out


SHAPES = [
    dict(),
    dict(attngate="elementwise", gateopt="adam", mlp_match=True),
    dict(attngate="const", gatepos="key"),
]


@pytest.mark.parametrize("values", SHAPES)
def test_an_export_is_bitwise_the_checkpoints_model(tmp_path, capfd, values):
    model = make_run(tmp_path, **values)
    out = exported(tmp_path, tmp_path / "new/out")
    assert (
        f"proved: {len(list(model.parameters()))} tensors and 2,048 logits"
        in capfd.readouterr().out
    )
    other, _ = export.read_export(out)
    assert same_tensors(dict(model.state_dict()), dict(other.state_dict()))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"], "nothing is left beside it"


def test_the_tied_matrix_is_stored_once_in_fp32_under_the_trainers_names(home, tmp_path):
    out = exported(home, tmp_path / "out", run=ID)
    tensors = load_file(out / "model.safetensors")
    state = torch.load(home / "logs" / ID / "step_000012/state.pt", weights_only=True)
    assert same_tensors(tensors, state["model"])
    assert [name for name, t in tensors.items() if 256 in t.shape] == ["wte"]
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_config_json_says_what_the_weights_are(home, tmp_path):
    out = exported(home, tmp_path / "out", run=ID)
    config = json.loads((out / "config.json").read_text())
    row = rows(home)[-1]
    assert config["model"] == {
        name: getattr(knobs(vocab_size=256), name) for name in runs.SHAPE_KNOBS["train_gpt"]
    }
    assert config["parameters"] == int(row["n_params"])
    assert (config["run_id"], config["checkpoint"], config["step"]) == (ID, "step_000012", 12)
    assert config["val_loss"] == pytest.approx(float(row["final_val_loss"]))
    assert config["code_sha256"] == row["code_sha256"]
    assert (config["exported_with_torch"], config["tokenizer"]) == (torch.__version__, "bytes")


def test_a_folder_that_exists_is_not_touched_without_force(home, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists; choose another, or --force"):
        exported(home, out, run=ID)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    exported(home, out, "--force", run=ID)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "mine.txt", "model.safetensors"]


def test_a_flipped_bit_in_an_export_is_caught(tmp_path):
    model = make_run(tmp_path)
    out = exported(tmp_path, tmp_path / "out")
    spoil(out / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors: its SHA-256 is"):
        export.prove(out, model)


def test_an_export_of_other_weights_is_caught_and_gets_no_name(monkeypatch, tmp_path):
    make_run(tmp_path)

    def rounded(tensors, path, metadata):
        save_file({name: t.bfloat16().float() for name, t in tensors.items()}, path, metadata)

    monkeypatch.setattr(export, "save_file", rounded)
    with pytest.raises(
        UserError, match=r"9 tensor\(s\) are not the checkpoint's, the first is wte"
    ):
        exported(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_computes_other_logits_is_caught(monkeypatch, tmp_path):
    model = make_run(tmp_path, attngate="headwise")
    out = exported(tmp_path, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["model"]["gateact"] = "ns_sigmoid"  # the same tensors, another function of them
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="logits differ from the checkpoint's, by up to"):
        export.prove(out, model)


@pytest.mark.parametrize("trainer", ["train_gpu", "train_scaled"])
def test_models_of_the_sibling_trainers_are_exported_and_sampled_too(tmp_path, capfd, trainer):
    model = random_sibling(trainer)
    save_sibling(model, tmp_path)
    found, _ = export.read_export(exported(tmp_path, tmp_path / "out"))
    assert same_tensors(dict(found.state_dict()), dict(model.state_dict()))
    sample.main(["--run=made", f"--logs_folder={tmp_path / 'logs'}", "--prompt=abcd", "--tokens=5"])
    assert "abcd" in capfd.readouterr().out
