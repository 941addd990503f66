"""problem_config.py -- the YAML files that describe a run on problems, and where it writes.

Promises: the keys are those of the files of github.com/Nishal14/Step-free-arithmetic-transformers,
whose sections are the knobs' headings in --help; a key of theirs that can have only one value here
is refused with any other. The device is settled before a file is opened, with the original's words.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from plumbing.config import read_configured, section_keys
from plumbing.device import settle_device
from plumbing.knobs import Knobs

SECTIONS = ("model", "data", "training", "training.optimizer", "logging")
FIXED = {
    "model.vocab_size": (35, "the tokenizer has 35 ids"),
    "data.use_steps": (False, "there are no steps in the text"),
    "data.step_masking_mode": ("none", "there are no steps in the text; see ANSWER_ONLY_LOSS"),
}


def yaml_keys(cls: type) -> dict[str, str]:
    """The spelling of a knob that each key of a file sets: the knobs under their headings, and what
    the original's files have in other sections or by other names. Their max_seq_len, of model and
    data, is SEQUENCE_LENGTH."""
    keys = section_keys(cls, SECTIONS)
    keys |= {"model.name": "model_name", "training.optimizer.name": "optimizer"}
    keys |= {"model.max_seq_len": "max_seq_len", "data.curriculum_exact": "curriculum_exact"}
    keys |= {f"logging.{key}": key for key in ("tracker", "use_wandb")}
    keys |= {f"training.{key}": key for key in ("val_every", "save_every")}
    return keys


def read_problem_knobs(
    cls: type[Knobs],
    presets: Mapping[str, Mapping],
    doc: str,
    argv: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
) -> Knobs:
    """Knobs from flags over environment over --set over the file of --config over defaults; flags
    and environment are the process's own unless others are given. OUTPUT_DIR stands for LOGS_FOLDER
    and RUN_ID. Raises UserError, as config.py does, and RuntimeError where GPU_ONLY=1 or FP16=1
    cannot be kept."""
    argv = sys.argv[1:] if argv is None else argv
    env = os.environ if env is None else env
    say = print if env.get("RANK", "0") == "0" else lambda line: None

    def settle(given: Mapping[str, object]) -> dict[str, str]:
        fp16, gpu_only = given.get("fp16", False), given.get("gpu_only", False)
        return {"device": settle_device(given.get("device", "cpu"), fp16, gpu_only, say)}

    cfg = read_configured(cls, presets, argv, env, doc, yaml_keys(cls), FIXED, settle)
    if not cfg.output_dir:
        return cfg
    folder = Path(cfg.output_dir).resolve()
    return replace(cfg, logs_folder=str(folder.parent), run_id=folder.name)
