"""scaled_support.py -- what the tests of train_scaled.py need: small models, small texts, small
runs."""

import signal
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch

import train_scaled
from plumbing import byte_runs
from plumbing.exchange import StepExchange
from train_scaled import ByteLM, Knobs

# A model and a run that take a second: every size is small, nothing is switched off.
SMALL = dict(
    device="cpu", precision="fp32", compile=0, n_embd=32, n_layer=2, n_head=2, sliding_window=4
)
SMALL |= dict(thinking_steps=1, ngram_rows=64, mem_rows=64)
SMALL |= dict(batch_size=4, device_batch_size=2, sequence_length=64, lr=0.01, log_every=2)
SMALL |= dict(num_iterations=12, warmup_iters=2, val_every=4, val_bytes=500, save_every=4)
ORIGINAL = dict(blocks="original", decoder="original", mem_rows=0, mem_range=0.5, mem_init=1.0)
VARIANTS = {
    "scaled": {},
    "delta": dict(delta_rule=True),
    "phase8": ORIGINAL | dict(carry_state=False),
    "original blocks": ORIGINAL | dict(decoder="scaled", mem_rows=64),
    "window only": dict(memory="off"),
}


def small(**values) -> Knobs:
    return Knobs(**(SMALL | dict(compile=False) | values))


def fresh(variant: str = "scaled", **values) -> ByteLM:
    """A model in which everything contributes: data-dependent decay and n-gram tables start at
    zero, and here they do not.
    """
    model = ByteLM(small(**(VARIANTS[variant] | values)))
    model.init_weights(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("grams.table", "retention_shift.weight")):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))
    return model.eval()


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def repeats(*shape: int, seed: int = 0) -> torch.Tensor:
    """Three bytes only: short histories come again all the time, and long ones at times."""
    return torch.randint(97, 100, shape, generator=torch.Generator().manual_seed(seed))


def write_text(folder: Path, train: int = 6000, val: int = 1500) -> Path:
    """Learnable text, Turkish letters included."""
    words = "bir göl kıyı çok ağaç düş üzüm şey var yok ve ile".split()
    rng = np.random.default_rng(5)
    for name, n in (("train.txt", train), ("val.txt", val)):
        content = " ".join(rng.choice(words, n)).encode()[:n]
        (folder / name).write_bytes(content.decode(errors="ignore").encode())
    return folder / "train.txt"


def flags(folder: Path, **knobs) -> list[str]:
    if not (folder / "train.txt").exists():
        write_text(folder)
    values = SMALL | dict(data=folder / "train.txt", logs_folder=folder / "logs")
    values |= dict(results_file=folder / "results.csv") | knobs
    return [f"--{n}={int(v) if isinstance(v, bool) else v}" for n, v in values.items()]


COUNTED: dict[tuple, float] = {}
count_flops_per_byte = byte_runs.flops_per_byte


def count_once(make_model: type[ByteLM], cfg: Knobs) -> float:
    """FLOPs per byte, once for each model: to count them takes as long as a small run trains."""
    shape = tuple(getattr(cfg, name) for name in (*train_scaled.MODEL_KNOBS, "sequence_length"))
    if shape not in COUNTED:
        COUNTED[shape] = count_flops_per_byte(make_model, cfg)
    return COUNTED[shape]


def run_here(monkeypatch, folder: Path, **knobs) -> tuple[int, str]:
    monkeypatch.setattr(byte_runs, "flops_per_byte", count_once)
    monkeypatch.setattr(sys, "argv", ["train_scaled.py", *flags(folder, **knobs)])
    with redirect_stdout(StringIO()) as out:
        code = train_scaled.main()
    return code, out.getvalue()


def tensors_equal(a: object, b: object, close: float = 0.0) -> bool:
    """Whether two nested states hold the same tensors, bitwise or within `close`."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) if close == 0 else torch.allclose(a.float(), b.float(), atol=close)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tensors_equal(a[n], b[n], close) for n in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(tensors_equal(*p, close) for p in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def spoil_steps(monkeypatch, spoil) -> None:
    """Before a step's figures are sent, spoil(exchange, step, loss) may change the loss."""
    send = StepExchange.send

    def sent(self, step, loss, *rest):
        return send(self, step, spoil(self, step, loss), *rest)

    monkeypatch.setattr(StepExchange, "send", sent)


def interrupt(monkeypatch, folder: Path, at: int = 6, **knobs) -> None:
    """A run that is asked to stop in step `at`."""

    def signalled(exchange, step, loss):
        if step == at:
            exchange.world.signals.append(signal.SIGTERM)
        return loss

    with monkeypatch.context() as m:
        spoil_steps(m, signalled)
        assert run_here(m, folder, **knobs)[0] == 128 + signal.SIGTERM
