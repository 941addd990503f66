"""run_support.py -- small runs of train_gpt.py, trained and made up, for the tests of the programs
that read runs.
"""

import json
import math
import signal
import sys
from pathlib import Path

import pytest
import torch
from support import ONE, ROOT, knobs, run_here

import plumbing
import train_gpt

ID = "trained"  # the run that trains; "made" are folders that look like runs


def train_run(folder: Path) -> Path:
    """A run of bytes, preempted after 7 steps and resumed, so that its log holds two starts."""
    values = dict(run_id=ID, vocab_size=256, lr=0.011)
    start_clock = plumbing.Session.start_clock

    def ask_to_stop(session: plumbing.Session) -> None:
        start_clock(session)
        if session.step_now == 5:  # heard of between steps 7 and 8
            session.world.signals.append(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "orig_argv", ["python", "-u", str(ROOT / "train_gpt.py"), "--lr=0.01"])
        patch.setattr(plumbing.Session, "start_clock", ask_to_stop)
        assert run_here(patch, folder, **values)[0] == 128 + signal.SIGTERM
        patch.setattr(plumbing.Session, "start_clock", start_clock)
        assert run_here(patch, folder, **values, keep=3)[0] == 0
    return folder


def make_run(folder: Path, step: int = 3, **values) -> train_gpt.GPT:
    """A folder of a run called "made" with one checkpoint; returns its model, whose weights are all
    random.
    """
    cfg = knobs(**values)
    model = train_gpt.GPT(cfg, torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 4)
    state = dict(
        model=model.state_dict(),
        knobs=json.loads(plumbing.knobs_json(cfg)),
        step=step,
        progress=dict(val_loss=math.nan),
        trainer="train_gpt",
        code_sha256="0" * 64,
    )
    plumbing.save_checkpoint(folder / "logs/made", step, state, ONE, keep=2)
    return model


def spoil(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
