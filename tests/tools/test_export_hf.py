"""export.py --format hf: transformers loads the folder without this repository, and gets the same
numbers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import export
import pytest
import torch
from lib import runs
from run_support import make_run
from support import random_sibling, save_sibling

from plumbing import UserError

# What a user does with the folder, in a process that knows nothing of this repository.
USE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
x = torch.tensor([json.loads(sys.argv[2])])
with torch.no_grad():
    out = model(input_ids=x, labels=x)
made = model.generate(x, max_new_tokens=7, do_sample=False)
beyond = model.generate(x, max_new_tokens=40, do_sample=False)
torch.save(dict(logits=out.logits, loss=out.loss, made=made, beyond=beyond), sys.argv[3])
"""


def sibling(trainer: str, folder: Path) -> torch.nn.Module:
    model = random_sibling(trainer, sequence_length=32)
    save_sibling(model, folder)
    return model


def next_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """(T, V): row t is for the token behind token t, by the trainer's own model."""
    if runs.trainer_of(model) != "train_scaled":
        return model.logits(torch.tensor([ids]))[0]
    rows = []
    for t in range(1, len(ids) + 1):
        text = [10] * 4 + ids[:t]
        text = torch.tensor([text + [0] * (4 - len(text) % 4)])
        rows.append(model.logits(text[:, :-4], text[:, 4:])[0][0, t])
    return torch.stack(rows)


@pytest.mark.parametrize("trainer", ["train_gpt", "train_gpu", "train_scaled"])
@torch.no_grad()
def test_transformers_loads_the_folder_with_our_logits_and_generates(trainer, tmp_path, capsys):
    values = dict(vocab_size=256, sequence_length=32, val_tokens=512, attngate="elementwise")
    model = make_run(tmp_path, **values) if trainer == "train_gpt" else sibling(trainer, tmp_path)
    out = tmp_path / "out"
    logs = f"--logs_folder={tmp_path / 'logs'}"
    export.main(["--run=made", logs, f"--out={out}", "--format=hf"])
    assert "as transformers" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "flatrun_model.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_flatrun.py",
    ]

    ids = list(b"The gate opens")
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    answer = tmp_path / "answer.pt"
    command = [sys.executable, "-c", USE, str(out), json.dumps(ids), str(answer)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(answer)
    expected = next_logits(model, ids)
    torch.testing.assert_close(found["logits"][0], expected, rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(expected[:-1], torch.tensor(ids[1:]))
    assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-4)
    text = list(ids)
    for _ in range(7):
        text.append(int(next_logits(model, text)[-1].argmax()))
    assert found["made"][0].tolist() == text
    assert found["beyond"].size(1) == len(ids) + 40, "longer than the model's sequence"


def test_an_export_whose_code_computes_other_logits_gets_no_name(monkeypatch, tmp_path):
    make_run(tmp_path, attngate="headwise", gateact="sigmoid")
    source = export.hf_export.model_source
    spoilt = lambda *names: source(*names).replace("torch.sigmoid,", "torch.tanh,")
    monkeypatch.setattr(export.hf_export, "model_source", spoilt)
    with pytest.raises(UserError, match="logits differ from the checkpoint's"):
        logs = f"--logs_folder={tmp_path / 'logs'}"
        export.main(["--run=made", logs, f"--out={tmp_path / 'out'}", "--format=hf"])
    assert not (tmp_path / "out").exists()


def test_without_transformers_nothing_is_written(monkeypatch, tmp_path):
    make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="--format hf needs transformers: pip install"):
        logs = f"--logs_folder={tmp_path / 'logs'}"
        export.main(["--run=made", logs, f"--out={tmp_path / 'out'}", "--format=hf"])
    assert not (tmp_path / "out").exists()
