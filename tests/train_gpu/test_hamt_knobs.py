"""The command line of train_gpu.py: every original flag, aliases, mistakes, the plan."""

import dataclasses
import re
import sys

import pytest
from hamt_support import ROOT, knobs, run_here, run_process, write_text

from plumbing import UserError, read_knobs
from train_gpu import PRESETS, Knobs

SEED = (
    "--hidden_dim 512 --hcm_dim 2048 --num_layers 8 --num_slots 16 --dataset wikitext-103 "
    "--max_seq_length 1024 --batch_size 128 --num_epochs 10 --learning_rate 3e-4 "
    "--mixed_precision bf16 --compile_model --use_wandb --output_dir outputs/hamt_100m "
    "--run_name hamt-100m"
).split()
REST = (  # of the original's flags
    "--dropout 0.1 --use_gating --use_auxiliary_loss --aux_loss_weight 0.1 --use_scheduler "
    "--weight_decay 0.01 --grad_clip 1.0 --gradient_checkpointing --num_workers 4 "
    "--save_steps 1000 --save_epochs --wandb_project p --max_train_samples 5 --max_val_samples 5"
).split()


def test_the_seeds_command_and_every_original_flag_are_accepted_without_a_gpu(tmp_path):
    command = [sys.executable, str(ROOT / "train_gpu.py"), *SEED, *REST]
    command += ["--data_folder", str(tmp_path), "--dry_run"]
    done = run_process(command, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr + done.stdout
    assert re.search(r"^parameters: +73,106,944$", done.stdout, re.M)
    assert "wikitext-103-raw-v1 is not there yet" in done.stdout and not list(tmp_path.iterdir())


def test_flags_do_what_they_say():
    cfg = read_knobs(Knobs, PRESETS, [*SEED, *REST], {})
    assert (cfg.compile, cfg.run_id, cfg.save_every, cfg.tracker) == (1, "hamt-100m", 1000, "wandb")
    assert (cfg.logs_folder, cfg.lr, cfg.vocabulary) == ("outputs/hamt_100m", 3e-4, 50304)
    assert (cfg.n_embd, cfg.n_layer, cfg.sequence_length) == (512, 8, 1024)
    off = "--no_use_gating --no-conv --no-use-scheduler --no-save-epochs --lr 1".split()
    cfg = read_knobs(Knobs, PRESETS, [*off, "--max_steps", "7", "--num_attention_heads", "4"], {})
    assert not any((cfg.use_gating, cfg.has_conv, cfg.use_scheduler, cfg.save_epochs))
    assert (cfg.lr, cfg.num_iterations, cfg.n_head) == (1.0, 7, 4)


def test_the_convolution_is_hamts_by_default_and_attentions_when_asked_for():
    assert knobs().has_conv and not knobs(conv=False).has_conv
    assert not knobs(mixer="attention").has_conv
    assert knobs(mixer="attention", conv=True).has_conv


def test_no_knob_is_a_prefix_of_torchruns_flags():
    from torch.distributed.run import get_args_parser

    options = [o for action in get_args_parser()._actions for o in action.option_strings]
    theirs = [option.lstrip("-").replace("-", "_") for option in options]
    ours = [s for f in dataclasses.fields(Knobs) for s in (f.name, *f.metadata["alias"])]
    assert [(a, b) for a in ours for b in theirs if len(b) > 1 and b.startswith(a)] == []


def test_plan_of_a_run_with_data_names_steps_and_epochs(monkeypatch, tmp_path):
    code, out = run_here(monkeypatch, tmp_path, dry_run=1, num_iterations="auto", num_epochs=2)
    steps = int(re.search(r"FLOPs in (\d+) steps", out)[1])
    assert code == 0 and f"2.00 epochs of {steps // 2} steps" in out and steps > 10


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(data="wikitext-3"), "DATA=wikitext-3: neither wikitext-2"),
        (dict(data="/no/such/file.txt"), "no text there"),
        (dict(n_head=5), "HCM_DIM=32 must be N_HEAD=5 times an even number"),
        (dict(mixer="attention", n_head=8, n_embd=40), "N_EMBD=40 must be N_HEAD=8"),
        (dict(mixer="attention", memory="off"), "are for MIXER=hamt only"),
        (dict(mixer="attention", carry_state=1), "CARRY_STATE"),
        (dict(sequence_length=1), "SEQUENCE_LENGTH"),
        (dict(precision="fp16"), "fp16 needs a GPU"),
        (dict(memory="some"), "expected one of on, local, off"),
        (dict(batch_size=100000, device_batch_size=1), "lower one of the two"),
        (dict(vocab_size=20), "holds token id"),
    ],
)
def test_a_mistake_is_named_before_training(monkeypatch, tmp_path, values, words):
    with pytest.raises(UserError, match=re.escape(words)):
        run_here(monkeypatch, tmp_path, **values)
    assert not (tmp_path / "results.csv").exists()


def test_without_a_network_wikitext_says_so(tmp_path):
    write_text(tmp_path)
    command = [sys.executable, str(ROOT / "train_gpu.py"), "--device=cpu", "--precision=fp32"]
    command += [f"--data_folder={tmp_path}", f"--logs_folder={tmp_path}"]
    done = run_process(command, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train_gpu.py: error: ")
    assert "Salesforce/wikitext" in done.stderr and "text file or folder" in done.stderr
