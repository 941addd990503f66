"""hf_export.py -- a run's model as a folder that the library transformers loads.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The folder carries the model's own code (model_source.py) and a class around it (hf_wrapper.py), so
that it needs nothing of this repository. Text becomes tokens outside: config.json names the
tokenizer.
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lib import runs
from lib.model_source import model_source
from lib.program import need
from plumbing.checkpoints import sha256_of
from plumbing.knobs import UserError

WRAPPER = Path(__file__).with_name("hf_wrapper.py")
FILES = (
    "model.safetensors",
    "config.json",
    "modeling_flatrun.py",
    "flatrun_model.py",
    "generation_config.json",
)
PREFIX = "model."


def settings_of(cfg: object) -> dict[str, object]:
    """All knobs of a model and what its class derives from them, which the model's code reads."""
    found = dict(dataclasses.asdict(cfg))
    for name, _ in inspect.getmembers(type(cfg), lambda member: isinstance(member, property)):
        derived = getattr(cfg, name)
        if isinstance(derived, bool | int | float | str):
            found[name] = derived
    return found


def write_hf(folder: Path, model: nn.Module, facts: Mapping[str, object]) -> None:
    trainer = runs.trainer_of(model)
    tensors = {
        PREFIX + name: tensor.detach().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    weights, config, modeling, source, generation = (folder / name for name in FILES)
    save_file(tensors, weights, metadata={"format": "pt"})
    content = {
        "model_type": "flatrun",
        "architectures": ["FlatrunForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_flatrun.FlatrunConfig",
            "AutoModelForCausalLM": "modeling_flatrun.FlatrunForCausalLM",
        },
        "dtype": "float32",
        "num_hidden_layers": model.cfg.n_layer,
        "vocab_size": runs.vocabulary(model),
        "trainer": trainer,
        "model": settings_of(model.cfg),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": sha256_of(weights),
    }
    config.write_text(json.dumps(content | dict(facts), indent=2) + "\n")
    modeling.write_text(WRAPPER.read_text())
    generation.write_text('{"use_cache": false}\n')  # the wrapper keeps no keys and values
    source.write_text(model_source(trainer, runs.MODELS[trainer]))


@torch.inference_mode()
def prove_hf(folder: Path, model: nn.Module) -> str:
    """Raise UserError unless transformers makes `model` of the folder, bit by bit; else say what
    was compared.
    """
    transformers = need("transformers", "--format hf", "pip install transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = load(folder, trust_remote_code=True).eval()
    ours = model.state_dict()
    theirs = loaded.model.state_dict()
    wrong = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} tensor(s) are not the checkpoint's: {wrong[0]}")
    expected, found = runs.fixed_logits(model), runs.fixed_logits(model, inner=loaded.model)
    if not torch.equal(expected, found):
        most = (expected - found).abs().max().item()
        raise UserError(f"{folder}: logits differ from the checkpoint's, by up to {most:.3g}")
    return (
        f"{len(ours)} tensors and {expected.numel():,} logits of a fixed batch, as transformers "
        f"{transformers.__version__} loads them, are bitwise the checkpoint's"
    )
