"""export.py -- a run's weights as safetensors, proved equal to the checkpoint's.

    python scripts/export.py --run ID --out exports/ID
    python scripts/export.py --run ID --checkpoint step_002500 --out exports/ID --force
    python scripts/export.py --run ID --out exports/ID --format hf

Writes model.safetensors (fp32, the trainer's own tensor names, a tied matrix once) and config.json
(the model's knobs, sizes, and where the weights come from). Before the two get their names, they
are read back into a fresh model, whose weights and whose logits on a fixed batch must be bitwise
those of the checkpoint's model. read_export(folder) below is how to load them; it needs the trainer
and nothing of the run. With --format hf the folder also carries the model's code, and is proved
through the library transformers, which loads it by
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).
Raises   UserError: no such run, no good checkpoint, the folder exists, an export that is not what
         was saved
"""

import argparse
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from lib import hf_export, runs
from lib.program import need
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from plumbing import UserError, launch
from plumbing.checkpoints import sha256_of

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def write_export(folder: Path, model: nn.Module, facts: dict[str, object]) -> None:
    """Both files; `facts` are what config.json says beside the model's own knobs."""
    # Parameters, of which a tied one is named once, and buffers that are saved with them.
    tensors = {
        name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    trainer = runs.trainer_of(model)
    config = {"trainer": trainer, "model": runs.shape_of(trainer, dataclasses.asdict(model.cfg))}
    if trainer == "train_gpt":
        config["mlp_width"] = model.cfg.mlp_width
    config["parameters"] = sum(p.numel() for p in model.parameters())
    config["dtype"] = "float32"
    config["sha256"] = sha256_of(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**config, **facts}, indent=2) + "\n")


def read_export(folder: Path) -> tuple[nn.Module, dict]:
    """The exported model, fp32 on the CPU, and config.json. Raises UserError when a file is not as
    it was written.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        found = sha256_of(folder / WEIGHTS)
        if found != config["sha256"]:
            raise UserError(
                f"{folder / WEIGHTS}: its SHA-256 is {found[:12]}..., {CONFIG} says "
                f"{config['sha256'][:12]}..."
            )
        model = runs.build(config["trainer"], config["model"])
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
        what = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: cannot be read back ({what})") from None
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS}: is not safetensors ({error})") from None
    return model, config


@torch.inference_mode()
def prove(folder: Path, model: nn.Module) -> str:
    """Raise UserError unless the export in `folder` is bitwise `model`; else say what was
    compared.
    """
    exported, _ = read_export(folder)
    ours = model.state_dict()
    theirs = exported.state_dict()
    wrong = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} tensor(s) are not the checkpoint's, the first is {wrong[0]}"
        )
    expected = runs.fixed_logits(model)
    found = runs.fixed_logits(exported)
    if not torch.equal(expected, found):
        most = (expected - found).abs().max().item()
        raise UserError(f"{folder}: logits differ from the checkpoint's, by up to {most:.3g}")
    return (
        f"{len(ours)} tensors and {expected.numel():,} logits of a fixed batch are bitwise the "
        f"checkpoint's"
    )


def export(out: Path, model: nn.Module, facts: dict[str, object], form: str = "plain") -> str:
    """Write and prove the files aside, then give them their names in `out`."""
    if form == "hf":
        names, write, check = hf_export.FILES, hf_export.write_hf, hf_export.prove_hf
    else:
        names, write, check = (WEIGHTS, CONFIG), write_export, prove
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
            write(Path(aside), model, facts)
            proof = check(Path(aside), model)
            out.mkdir(exist_ok=True)
            for name in names:
                os.replace(Path(aside) / name, out / name)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--out {out}: cannot be written ({error}); choose another folder"
        ) from None
    return proof


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    runs.add_run_options(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    choices = ("auto", *runs.TOKENIZERS)
    add("--tokenizer", choices=choices, default="auto", help="named in config.json")
    add(
        "--format", choices=("plain", "hf"), default="plain", help="hf: with code, for transformers"
    )
    add("--force", action="store_true", help="replace these files in a folder that exists")
    args = parser.parse_args(argv)
    if args.format == "hf":
        need("transformers", "--format hf", "pip install transformers")
    if args.out.exists() and not (args.force and args.out.is_dir()):
        raise UserError(
            f"--out {args.out} exists; choose another, or --force to replace {WEIGHTS} and "
            f"{CONFIG} in it"
        )
    path = runs.find_checkpoint(runs.find_run(args.logs_folder, args.run), args.checkpoint)
    model, state = runs.load(path)
    val_loss = state["progress"]["val_loss"]
    facts = {
        "tokenizer": runs.tokenizer_name(args.tokenizer, runs.vocabulary(model)),
        "run_id": args.run,
        "checkpoint": path.name,
        "step": state["step"],
        "val_loss": None if math.isnan(val_loss) else val_loss,
        "code_sha256": state["code_sha256"],
        "exported_with_torch": torch.__version__,
    }
    proof = export(args.out, model, facts, args.format)
    weights = args.out / WEIGHTS
    print(f"{weights}: {weights.stat().st_size:,} bytes, from {path}")
    print(f"proved: {proof}")


if __name__ == "__main__":
    launch(main)
