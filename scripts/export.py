"""export.py -- a run's weights as safetensors, proved equal to the checkpoint's.

    python scripts/export.py --run ID --out exports/ID
    python scripts/export.py --run ID --checkpoint step_002500 --out exports/ID --force

Writes model.safetensors (fp32, the trainer's own tensor names, a tied matrix once) and config.json (the
model's knobs, sizes, and where the weights come from). Before the two get their names, they are read back into a
fresh model, whose weights and whose logits on a fixed batch must be bitwise those of the checkpoint's model.
read_export(folder) below is how to load them; it needs the trainer and nothing of the run.
Raises   UserError: no such run, no good checkpoint, the folder exists, an export that is not what was saved
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from lib import runs as lib
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import plumbing
from plumbing import UserError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_export(folder: Path, model: nn.Module, facts: dict[str, object]) -> None:
    """Both files; `facts` are what config.json says beside the model's own knobs."""
    tensors = {
        name: p.detach().float().contiguous().clone() for name, p in model.named_parameters()
    }
    save_file(tensors, folder / WEIGHTS, metadata=dict(format="pt"))
    trainer = lib.trainer_of(model)
    config = dict(trainer=trainer, model=lib.shape_of(trainer, dataclasses.asdict(model.k)))
    config |= dict(mlp_width=model.k.mlp_width) if trainer == "train_gpt" else {}
    config |= dict(
        parameters=sum(t.numel() for t in tensors.values()),
        dtype="float32",
        sha256=sha256(folder / WEIGHTS),
    )
    (folder / CONFIG).write_text(json.dumps(config | facts, indent=2) + "\n")


def read_export(folder: Path) -> tuple[nn.Module, dict]:
    """The exported model, fp32 on the CPU, and config.json. Raises UserError when a file is not as it was written."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        if (found := sha256(folder / WEIGHTS)) != config["sha256"]:
            raise UserError(
                f"{folder / WEIGHTS}: its SHA-256 is {found[:12]}..., {CONFIG} says {config['sha256'][:12]}..."
            )
        model = lib.build(config["trainer"], config["model"])
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (
        OSError,
        KeyError,
        TypeError,
        json.JSONDecodeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise UserError(
            f"{folder}: cannot be read back ({' '.join(str(error).split())[:300]})"
        ) from None
    return model, config


@torch.inference_mode()
def prove(folder: Path, model: nn.Module) -> str:
    """Raise UserError unless the export in `folder` is bitwise `model`; else says what was compared."""
    other, _ = read_export(folder)
    ours, theirs = model.state_dict(), other.state_dict()
    if wrong := [name for name in ours if not torch.equal(ours[name], theirs[name])]:
        raise UserError(
            f"{folder}: {len(wrong)} tensor(s) are not the checkpoint's, the first is {wrong[0]}"
        )
    a, b = lib.fixed_logits(model), lib.fixed_logits(other)
    if not torch.equal(a, b):
        raise UserError(
            f"{folder}: logits differ from the checkpoint's, by up to {(a - b).abs().max().item():.3g}"
        )
    return f"{len(ours)} tensors and {a.numel():,} logits of a fixed batch are bitwise the checkpoint's"


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lib.add_run_options(p)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    p.add_argument(
        "--tokenizer",
        choices=("auto", *lib.TOKENIZERS),
        default="auto",
        help="named in config.json",
    )
    p.add_argument(
        "--force", action="store_true", help="replace the two files in a folder that exists"
    )
    a = p.parse_args(argv)
    if a.out.exists() and not (a.force and a.out.is_dir()):
        raise UserError(
            f"--out {a.out} exists; choose another, or --force to replace {WEIGHTS} and {CONFIG} in it"
        )
    path = lib.find_checkpoint(lib.find_run(a.logs_folder, a.run), a.checkpoint)
    model, state = lib.load(path)
    facts = dict(
        tokenizer=lib.tokenizer_name(a.tokenizer, lib.vocabulary(model)),
        run_id=a.run,
        checkpoint=path.name,
    )
    val_loss = state["val_loss"]
    facts |= dict(step=state["step"], val_loss=None if math.isnan(val_loss) else val_loss)
    facts |= dict(code_sha256=state["code_sha256"], exported_with_torch=torch.__version__)
    try:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=a.out.parent, prefix=f".{a.out.name}-") as aside:
            write_export(Path(aside), model, facts)
            proof = prove(Path(aside), model)
            a.out.mkdir(exist_ok=a.force)
            for name in (WEIGHTS, CONFIG):
                os.replace(Path(aside) / name, a.out / name)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--out {a.out}: cannot be written ({error}); choose another folder"
        ) from None
    print(f"{a.out / WEIGHTS}: {(a.out / WEIGHTS).stat().st_size:,} bytes, from {path}")
    print(f"proved: {proof}")


if __name__ == "__main__":
    plumbing.launch(main)
