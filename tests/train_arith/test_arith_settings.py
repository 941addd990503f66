"""Where knobs come from, what is refused, and the programs about configurations."""

import dataclasses
import importlib
import re
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from arith_support import ROOT
from arith_support import settings as read
from check_gpu_enforcement import CASES, MISSING

from plumbing import UserError
from plumbing.knobs import spellings
from plumbing.problem_config import yaml_keys
from train_arith import Knobs


def assignments(items: list[str]) -> list[str]:
    return [f"--set={item}" for item in items]


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("model:\n  dmodel: 3", "model.dmodel is not a key; did you mean model.d_model?"),
        ("training:\n  lr: 0.1", "training.lr is not a key; did you mean training.optimizer.lr?"),
        ("model:\n  vocab_size: 40", "model.vocab_size: 40 is refused"),
        ("data:\n  use_steps: true", "data.use_steps: True is refused"),
        ("data:\n  step_masking_mode: mask_steps", "step_masking_mode: mask_steps is refused"),
        ("model:\n  d_model: wide", "D_MODEL='wide': expected a whole number >= 2"),
        ("model:\n  num_heads: 5", "N_EMBD=128 must be N_HEAD=5"),
        ("training:\n  optimizer:\n    betas: [0.9, 2]", "BETAS='0.9,2'"),
        ("model:\n  max_seq_len: 32\ndata:\n  max_seq_len: 64", "one knob"),
        ("model: [1]", "model is not a key"),
        ("just words", "expected sections"),
        ("a: [", "not YAML"),
    ],
)
def test_a_yaml_key_is_honoured_or_refused_in_one_line(tmp_path, yaml, words):
    (tmp_path / "c.yaml").write_text(yaml)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        read("--config", tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ("operators=+/", "OPERATORS='+/': expected some of + - *"),
        ("operand_min=50 operand_max=9", "OPERAND_MIN=50 is above OPERAND_MAX=9"),
        ("depth_min=2 depth_max=1", "DEPTH_MIN=2 is above DEPTH_MAX=1"),
        ("operands_max=6", "GRAMMAR=pilot ends at 4 operands"),
        ("grammar=redundant operands_max=9 operand_max=99999", "values beyond 1e17"),
        (
            "operands_weights=1,2",
            "OPERANDS_WEIGHTS='1,2': expected one number >= 0 per operand count, 3 with commas",
        ),
        ("operands_weights=1,2,-1", "OPERANDS_WEIGHTS='1,2,-1'"),
        ("operands_weights=1,2,x", "OPERANDS_WEIGHTS='1,2,x'"),
        ("train_path=generate", "set NUM_ITERATIONS"),
        (
            "train_path=generate train_examples=9 answer_only_loss=1 curriculum_exact=0.5",
            "set NUM_ITERATIONS",
        ),
        ("curriculum_exact=0.5", "CURRICULUM_EXACT limits the operands of generated examples"),
        ("train_path=generate num_iterations=9 curriculum_exact=0.5", "set ANSWER_ONLY_LOSS=1"),
        ("output_dir=runs/a run_id=b", "OUTPUT_DIR=runs/a names the run, RUN_ID=b differs"),
    ],
)
def test_knobs_that_do_not_fit_together_are_refused_in_one_line(sets, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        read(*assignments(sets.split()))
    assert "\n" not in str(error.value)


def test_two_half_precisions_are_refused():
    with pytest.raises(ValueError, match="FP16=1 and BF16=1 exclude each other"):
        Knobs(fp16=True, bf16=True)


def test_gpu_only_is_kept_wherever_it_is_written():
    for place in (["--set", "gpu_only=1"], ["--gpu-only"], []):
        env = {} if place else {"GPU_ONLY": "1"}
        with pytest.raises(RuntimeError, match="GPU-only mode requires --device cuda"):
            read(*place, env=env)


def test_every_key_of_the_originals_files_reaches_its_knob():
    k = read("--config", ROOT / "configs/scale_10m.yaml")
    assert (k.n_embd, k.n_layer, k.n_head, k.d_ff) == (384, 6, 6, 1536)
    assert (k.batch_size, k.num_epochs, k.lr, k.warmup_iters) == (8, 50, 1e-4, 500)
    assert (k.eval_interval, k.save_interval, k.log_interval) == (2, 5, 50)
    pilot = read("--config", ROOT / "configs/pilot.yaml")
    assert dataclasses.replace(pilot, config="") == Knobs()
    assert {name.upper() for name in yaml_keys(Knobs).values()} <= set(spellings(Knobs))
    more = ["logging.use_wandb=true", "logging.wandb_project=x", "training.optimizer.betas=0.8,0.9"]
    k = read(*assignments(more))
    assert (k.tracker, k.tracker_project, k.betas) == ("wandb", "x", "0.8,0.9")


def test_flag_beats_environment_beats_set_beats_yaml_beats_default(tmp_path):
    text = "training:\n  batch_size: 2\n  num_epochs: 2\n  optimizer:\n    lr: 0.2\n"
    text += "model:\n  dropout: 0.2"
    (tmp_path / "c.yaml").write_text(text)
    sets = ["training.batch_size=3", "num_epochs=3", "lr=0.3"]
    env = dict(BATCH_SIZE="4", LEARNING_RATE="0.4")
    k = read("--batch_size=5", "--config", tmp_path / "c.yaml", *assignments(sets), env=env)
    assert (k.batch_size, k.lr, k.num_epochs, k.dropout, k.seed) == (5, 0.4, 3, 0.2, 42)
    with pytest.raises(UserError, match="expected key=value"):
        read("--set", "lr")
    with pytest.raises(UserError, match="did you mean lr"):
        read("--set", "lrr=3")


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_what_cannot_be_kept_is_refused_in_the_documented_words(monkeypatch, capsys, case):
    flags, code, said, unsaid = case
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((RuntimeError, UserError)) as error:
        read("--config", MISSING, "--output-dir", "no-such-folder/run", *flags.split())
    text = f"{capsys.readouterr().out}{error.type.__name__}: {error.value}"
    assert all(words in text for words in said) and not any(words in text for words in unsaid)
    assert code == (1 if error.type is RuntimeError else 2)


def test_enforcement_ends_the_real_trainer_with_the_documented_exit_codes(monkeypatch):
    program = importlib.import_module("check_gpu_enforcement")
    wanted = ("--device cuda --fp16", "--device cuda")  # a traceback, exit code 1; one line, 2
    monkeypatch.setattr(program, "CASES", [case for case in CASES if case[0] in wanted])
    with redirect_stdout(StringIO()) as out:
        assert program.main() == 0, out.getvalue()
    assert out.getvalue().count("[OK]") == 2


def test_the_verifier_tells_by_its_exit_code(monkeypatch, tmp_path):
    program = importlib.import_module("verify_10m_config")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    codes = {}
    for name, *extra in (
        ("good", "--no-gpu"),
        ("no gpu",),
        ("small", "--no-gpu", "--config", str(ROOT / "configs/pilot.yaml")),
    ):
        monkeypatch.setattr(sys, "argv", ["verify", *extra])
        with redirect_stdout(StringIO()) as out:
            codes[name] = program.main()
        if name == "good":
            assert (
                "Total parameters: 10,651,776" in out.getvalue()
                and "Difference: 6.5%" in out.getvalue()
            )
    assert codes == {"good": 0, "no gpu": 3, "small": 1}


def test_no_knob_is_a_prefix_of_a_flag_of_torchruns():
    from torch.distributed.run import get_args_parser

    theirs = [option for action in get_args_parser()._actions for option in action.option_strings]
    ours = [f"--{f.name}" for f in dataclasses.fields(Knobs)] + [
        "--set",
        "--config",
        "--output-dir",
    ]
    spellings = {name.replace("_", sign) for name in ours for sign in "_-"}
    assert not [(a, b) for a in spellings for b in theirs if b.startswith(a)]
