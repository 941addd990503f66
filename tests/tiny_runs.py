"""tiny_runs.py -- the smallest sensible run of each trainer, in this process or in one of its own."""

import importlib
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

CPU = dict(device="cpu", precision="fp32", compile=0)
TINY = {
    "train_gpt": dict(
        CPU, input_bin="embedded", input_val_bin="embedded", vocab_size=256, n_layer=1, n_head=2,
        n_embd=32, sequence_length=16, batch_size=8, device_batch_size=8, num_iterations=4,
        warmdown_iters=2, lr=0.01, val_tokens=512, val_every=2, save_every=2,
    ),
    "train_gpu": dict(
        CPU, data="embedded", tokenizer="bytes", n_layer=1, n_head=2, n_embd=32, hcm_dim=32,
        num_slots=4, chunk_length=8, sequence_length=32, batch_size=8, device_batch_size=8,
        num_iterations=4, warmup_iters=1, lr=0.01, max_val_samples=8, val_every=2, save_every=2,
        save_epochs=0, final_test=0,
    ),
    "train_scaled": dict(
        CPU, data="embedded", n_layer=1, n_head=2, n_embd=32, sliding_window=4, thinking_steps=1,
        ngram_rows=64, mem_rows=64, sequence_length=64, batch_size=4, device_batch_size=4,
        num_iterations=4, warmup_iters=1, lr=0.01, val_bytes=1000, val_every=2, save_every=2,
    ),
    "train_arith": dict(
        device="cpu", compile=0, train_path="generate", val_path="generate", test_path="", train_examples=64,
        val_examples=16, n_layer=1, n_head=2, n_embd=16, d_ff=24, batch_size=16, num_iterations=4,
        warmup_iters=1, lr=0.01, eval_interval=1,
    ),
}  # fmt: skip


def tiny_flags(trainer: str, folder: Path, **knobs) -> list[str]:
    """The command line of a tiny run that writes under `folder`."""
    values = TINY[trainer] | dict(
        run_id="tiny", logs_folder=folder / "logs", results_file=folder / "results.csv"
    )
    return [f"--{name}={value}" for name, value in (values | knobs).items()]


def run_tiny(monkeypatch, trainer: str, folder: Path, **knobs) -> tuple[int, str]:
    """The trainer's main() in this process: its exit code and what it prints."""
    argv = [f"{trainer}.py", *tiny_flags(trainer, folder, **knobs)]
    monkeypatch.setattr(sys, "argv", argv)
    with redirect_stdout(StringIO()) as out:
        code = importlib.import_module(trainer).main()
    return code or 0, out.getvalue()
