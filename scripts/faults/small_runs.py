"""small_runs.py -- runs of the four trainers that take a second on a CPU, in which everything that
a run does happens: validations, checkpoints, weights files, a final evaluation, a results row.
"""

import json
from pathlib import Path

import numpy as np

from plumbing import write_shard

TRAINERS = ("train_gpt", "train_gpu", "train_scaled", "train_arith")
STEPS, SAVE_EVERY = 8, 2  # a checkpoint at steps 2, 4, 6 and 8; a validation at 4 and 8

RUN = dict(run_id="run", device="cpu", compile=0, val_every=4, save_every=SAVE_EVERY, keep=2)
KNOBS = {
    "train_gpt": dict(
        n_layer=1, n_head=2, n_embd=16, vocab_size=256, sequence_length=16, batch_size=8,
        device_batch_size=2, num_iterations=STEPS, warmup_iters=2, warmdown_iters=2,
        val_tokens=256, attngate="headwise", precision="fp32", lr=0.01,
    ),
    "train_gpu": dict(
        n_layer=1, n_head=2, n_embd=16, hcm_dim=16, num_slots=2, chunk_length=8, tokenizer="bytes",
        sequence_length=16, batch_size=4, device_batch_size=2, num_iterations=STEPS,
        warmup_iters=2, precision="fp32", carry_state=1, dropout=0.1, lr=0.01, max_val_samples=8,
    ),
    "train_scaled": dict(
        n_layer=1, n_head=2, n_embd=16, sliding_window=4, thinking_steps=1, ngram_rows=64,
        mem_rows=64,
        sequence_length=32, batch_size=4, device_batch_size=2, num_iterations=STEPS,
        warmup_iters=2, val_bytes=256, dropout=0.1, log_every=1, precision="fp32", lr=0.01,
    ),
    "train_arith": dict(
        n_layer=1, n_head=2, n_embd=16, d_ff=16, batch_size=4, num_iterations=STEPS,
        warmup_iters=2, log_interval=1, dropout=0.1, lr=0.01,
    ),
}  # fmt: skip


def write_data(folder: Path) -> None:
    """A text of few words, the same as shards, and arithmetic records."""
    rng = np.random.default_rng(3)
    words = "the a red old cat dog saw met fed one two big".split()
    paragraphs = [" ".join(rng.choice(words, size=12)) + ".\n\n" for _ in range(300)]
    for part, texts in (("train", paragraphs[:200]), ("val", paragraphs[200:])):
        text = "".join(texts)
        (folder / f"{part}.txt").write_text(text)
        write_shard(folder / f"{part}_000000.bin", np.frombuffer(text.encode(), np.uint8))
    (folder / "all").mkdir()
    (folder / "all/text.txt").write_text("".join(paragraphs))
    for part, sums in (("train", range(10, 50)), ("val", range(50, 60)), ("test", range(60, 70))):
        records = [json.dumps({"expr": f"{n}+{n % 7}", "result": n + n % 7}) for n in sums]
        (folder / f"{part}.jsonl").write_text("\n".join(records) + "\n")


def data_knobs(trainer: str, data: Path) -> dict[str, Path]:
    """The knobs that name the data, which lie in the folder `data`."""
    if trainer == "train_gpt":
        return dict(input_bin=data / "train_*.bin", input_val_bin=data / "val_*.bin")
    if trainer == "train_gpu":
        return dict(data=data / "all/text.txt", data_folder=data / "made")
    if trainer == "train_scaled":
        return dict(data=data / "train.txt")
    return {f"{part}_path": data / f"{part}.jsonl" for part in ("train", "val", "test")}


def flags(trainer: str, data: Path, folder: Path) -> list[str]:
    """The command line of the trainer's small run, which writes into `folder`."""
    places = dict(logs_folder=folder / "logs", results_file=folder / "results.csv")
    knobs = RUN | KNOBS[trainer] | data_knobs(trainer, data) | places
    return [f"--{name}={value}" for name, value in knobs.items()]
