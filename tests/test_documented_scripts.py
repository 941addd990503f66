"""Every command of README and docs/ that runs a program of scripts/ is executed, and ends well.

The commands run in a copy of the checkout that holds what the documents speak of: tiny runs of each
trainer, rows of studies, data sets. NAMES says what the documents' names stand for there, SMALLER
which flags make a command small, and ENDS which of them end with another exit code than 0, and why.
"""

import csv
import re
import shutil
import subprocess
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import numpy as np
import pytest
import torch
from checkout import Checkout
from documents import COMMANDS, parts_of, program_of
from study_support import ORIGINAL
from support import ROOT, environment
from tiny_runs import TINY

from plumbing import write_shard

# What a name of a document stands for here. '...' that only says "and more" stands for nothing.
NAMES = {
    "README.md": {
        "logs/RUN_ID.txt": "logs/gpt.txt", "RUN_ID": "gpt", "DIR": "exported", "OUT": "replayed",
        "TEXT...": "book.txt", "LOG...": "speedrun.txt",
    },
    "arith.md": {"...": "runs/honest_s1"},
    "data.md": {"TEXT...": "book.txt"},
    "experiments.md": {"RUN_ID": "gpt", "DIR": ORIGINAL.parent, "/tmp/big/results.csv":
        "experiments/results.csv", "/tmp/big/logs": "logs", "/tmp/big/out": "out"},
    "hamt.md": {"RUN_ID": "hamt", "HAMT_ID": "hamt", "LOCAL_ID": "local", "ID": "hamt",
        "ATTENTION_ID": "attention", "...": ""},
    "report.md": {"RUN_ID": "gpt", "/tmp/b/results.csv": "experiments/results.csv",
        "/tmp/b/logs": "logs", "/tmp/b/report.html": "big.html"},
    "scaled.md": {
        "RUN_ID": "scaled", "ID,ID,ID": "scaled", "FOLDER/test.txt": "book.txt"},
    "studies.md": {"...": "experiments/studies/gating.toml"},
}  # fmt: skip
# Flags that make a command small. They stand behind its own, and the last one counts.
TINY_PAIRS = "--knobs n_embd=16 sliding_window=3 num_iterations=1 warmup_iters=0 batch_size=2"
TINY_BYTES = "--knobs n_embd=16 n_head=2 sliding_window=2 num_iterations=1 warmup_iters=0"
TINY_HAMT = "n_layer=1 n_head=2 n_embd=32 hcm_dim=32 num_slots=4 vocab_size=256"
SMALLER = {
    "scripts/run_study.py": "--dry_run",
    "scripts/sample.py": "--tokens 4",
    "scripts/evaluate.py": "--limit 2",
    "--sequential": "--studies 20",
    "scripts/fault_matrix.py": "--minutes 0",
    "scripts/scaled/compare_ppmd.py": "--mem_rows 64",
    "scripts/gpt/bench.py": "--only step --steps 1 --warmup 1 --n_layer 1 --n_head 2 --n_embd 32 "
    "--vocab_size 256 --sequence_length 16 --batch_size 2 --device_batch_size 2",
    "scripts/arith/generate_pilot_dataset.py": "--num-test 8 --minimal-pairs 8",
    "scripts/arith/generate_depth3_dataset.py": "--size 8",
    "scripts/arith/eval_ablation.py": "--limit 4",
    "scripts/arith/eval_ood_depth3.py": "--limit 4",
    "scripts/arith/exact_match.py": "--items 2",
    "scripts/arith/patch_heads.py": "--limit 4",
    "scripts/arith/probe_depth.py": "--limit 16 --untrained 1",
    "scripts/arith/bench_arith.py": "--parts data --examples 64",
    "scripts/hamt/count_kernels.py": "--preset demo --length 64",
    "scripts/hamt/count_layer.py": "--preset demo --lengths 64",
    "scripts/hamt/memory_worth.py": "--windows 4",
    "scripts/hamt/recall_bench.py": "--steps 1 --batch_size 2 --seeds 1 --rate_seeds 1 "
    "--sequences 2 --slot_sequences 0 --hidden_dim 16 --hcm_dim 16 --num_layers 1 "
    "--learning_rates 1e-3 --mixers hamt --eval_lengths 128 --eval_pairs 8",
    "ATTENTION_ID": "--quality_only --max_samples 2",
    "--speed_only": f"--parts training --repeats 1 --lengths 16 --tokens_per_step 16 "
    f"--knobs '{TINY_HAMT}'",
    "scripts/scaled/bench_scaled.py": "--repeats 1 --deadline_s 1",
    "scripts/scaled/mqar.py": f"--pairs 2 --n 2 --seeds 0 {TINY_PAIRS}",
    "scripts/scaled/recall_fixed.py": "--lengths 200 --depths 0 --n 2 --filler book.txt",
    "--train": f"--train_length 160 --batch_size 2 {TINY_BYTES}",
}
# One stage of the studies whose plan takes many seconds, where the command names none.
ONE_STAGE = {"arith": "arith_operators", "hamt": "hamt_rates", "scaled": "scaled_blocks"}
# Commands that go on until Ctrl-C.
ENDLESS = ("scripts/status.py --watch", "scripts/report.py --watch")
# Commands that cannot end with 0 here: a part of the command, its exit code, what it then says.
ENDS = [
    ("--task hellaswag lambada", 2, r"error: .*(the hub|127\.0\.0\.1)"),  # no network
    ("cached_fineweb10B.py", 2, r"error: .*127\.0\.0\.1"),  # no network
    ("--tokenizer gpt2", 2, r"error: .*gpt2"),  # no network
    ("gpt/bench.py --device cuda", 2, r"error: .*CUDA"),  # no GPU
    ("doctor.py --device cuda", 1, r"BAD +GPU"),  # no GPU
    # A model of four steps knows nothing, and of such a one no head is named.
    ("eval_ablation.py", 1, r"no model passes the gate on any set, so no head is named"),
    ("patch_heads.py", 1, r"no head is named"),
    ("fault_matrix.py", 1, r"cells 0, bad 0"),  # no fault in no time; test_fault_matrix.py has it
]
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
NO_NETWORK = dict(HF_ENDPOINT=NOWHERE, HTTP_PROXY=NOWHERE, HTTPS_PROXY=NOWHERE)
NO_NETWORK |= dict(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TIKTOKEN_CACHE_DIR="")


def scripts_of(line: str) -> bool:
    return program_of(parts_of(line)[1])[0].startswith(("scripts/", "cached_fineweb10B"))


SCRIPTS = [(document, line) for document, line in COMMANDS if scripts_of(line)]


def tiny_run(checkout: Checkout, trainer: str, run_id: str, **knobs: object) -> None:
    values = TINY[trainer] | dict(run_id=run_id) | knobs
    flags = [f"--{name}={value}" for name, value in values.items()]
    code, output = checkout.run([f"{trainer}.py", *flags])
    assert code == 0, output


def add_rows(path: Path, changes: list[dict[str, object]]) -> None:
    """More rows like the first one of a results file."""
    with open(path, newline="") as f:
        first = next(csv.DictReader(f))
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, first.keys(), lineterminator="\n")
        for i, changed in enumerate(changes):
            writer.writerow(first | dict(run_id=f"row{i}") | changed)


def make_data(checkout: Checkout) -> None:
    """Shards, texts, and the sets of arithmetic problems, by the documented programs."""
    folder = checkout.folder
    for known in (ROOT / "data").glob("embedded-*"):  # saves making it
        shutil.copytree(known, folder / "data" / known.name)
    for seed, part in enumerate(("train_000001", "val_000000")):
        tokens = np.cumsum(np.random.default_rng(seed).choice([1, 3, 5], size=5000)) % 256
        path = folder / f"data/fineweb10B/fineweb_{part}.bin"
        path.parent.mkdir(exist_ok=True)
        write_shard(path, tokens.astype(np.uint16))
    text = "".join(f"Line {i} is about {i * 7 % 11} horses and a gate.\n\n" for i in range(800))
    for place in ("book.txt", "corpus/a.txt", "FOLDER/a.txt", "my_texts/a.txt"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(text)
    program = "print('a program')\n"
    lines = [f"step:{s}/9 val_loss:{9 - s / 9:.4f} train_time:{s}ms" for s in range(10)]
    ruler = "=" * 100
    (folder / "speedrun.txt").write_text("\n".join([ruler, program, ruler, *lines, ""]))
    for prefix in ("--prefix pilot", "--prefix study --operators +-"):
        for program, flags in (
            ("pilot", "--num-train 64 --num-val 16 --num-test 16 --minimal-pairs 16"),
            ("depth3", "--depths 3 4 5 --size 16 --controls"),
        ):
            words = [f"scripts/arith/generate_{program}_dataset.py", *prefix.split()]
            code, output = checkout.run([*words, *flags.split()])
            assert code == 0, output


def make_runs(checkout: Checkout) -> None:
    """A run of every kind that the documents name."""
    folder = checkout.folder
    fineweb = "data/fineweb10B/fineweb"
    shards = dict(input_bin=f"{fineweb}_train_*.bin", input_val_bin=f"{fineweb}_val_*.bin")
    tiny_run(checkout, "train_gpt", "gpt", **shards, stage="stage1")
    hamt = dict(data="book.txt", stage="hamt_mixers")
    tiny_run(checkout, "train_gpu", "hamt", **hamt)
    tiny_run(checkout, "train_gpu", "attention", **hamt, mixer="attention")
    tiny_run(checkout, "train_gpu", "local", **hamt, memory="local")
    tiny_run(checkout, "train_scaled", "scaled", data="book.txt", stage="scaled_blocks")
    (folder / "experiments/scaled").mkdir()
    (weights,) = (folder / "logs/scaled").glob("best_model*.pth")
    shutil.copy(weights, folder / "experiments/scaled/recall_full.pth")
    sizes = dict(n_layer=3, n_head=4, logs_folder="runs", stage="arith_answers")
    tiny_run(checkout, "train_arith", "pilot", **sizes)
    tiny_run(checkout, "train_arith", "honest_s1", **sizes, grammar="redundant", operators="+-")
    for i in range(2, 6):
        shutil.copytree(folder / "runs/honest_s1", folder / f"runs/short_s{i}")
    shutil.copytree(folder / "runs/pilot", folder / "logs/pilot")
    shutil.copytree(folder / "runs/honest_s1", folder / "logs/honest_s1")


def make_rows(folder: Path) -> None:
    """Rows of the studies, and the files of stages that run_study.py would have written."""
    rows = [
        dict(stage=stage, seed=seed, attn_gate=gate, final_val_loss=3 + seed / 9 + len(gate) / 99)
        for stage in ("stage1", "stage3") for seed in (1, 2) for gate in ("none", "elementwise")
    ]  # fmt: skip
    rows += [
        dict(stage=stage, seed=seed, learning_rate=lr, final_val_loss=3 + seed**2 * lr)
        for stage in ("whole", "forked") for seed in (1, 2, 3, 4) for lr in (0.01, 0.012)
    ]  # fmt: skip
    add_rows(folder / "experiments/results.csv", rows)
    rows = [
        dict(stage="hamt_rates", mixer=mixer, seed=seed, learning_rate=lr, test_loss=2 + lr * seed,
             final_val_loss=2 + lr * seed)
        for mixer in ("hamt", "attention") for lr in (0.001, 0.003, 0.01) for seed in (1, 2)
    ]  # fmt: skip
    add_rows(folder / "experiments/results_hamt.csv", rows)
    rows = [
        dict(stage="arith_examples", run_id="pilot"),
        dict(stage="arith_operators", run_id="honest_s1"),
    ]
    add_rows(folder / "experiments/results_arith.csv", rows)
    baselines = dict(
        forks=dict(whole="learning_rate = 0.01", forked="learning_rate = 0.01"),
        hamt=dict(hamt_mixers='mixer = "attention"', hamt_rates='mixer = "attention"'),
        scaled=dict(scaled_blocks="seed = 1"),
    )
    (folder / "experiments/tables").mkdir()
    for study, stages in baselines.items():
        lines = [f"[stage.{name}]\nbaseline = {{ {own} }}\n" for name, own in stages.items()]
        (folder / f"experiments/tables/{study}.toml").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    env = environment(**NO_NETWORK, PYTHONPATH="")
    made = Checkout(ROOT, tmp_path_factory.mktemp("checkout"), env)
    make_data(made)
    make_runs(made)
    make_rows(made.folder)
    yield made
    made.close()


def words_here(document: str, line: str) -> tuple[dict[str, str], list[str]]:
    """A documented command by the names that things have here, and small."""
    env, words = parts_of(re.sub(r"\[(--[^\]]*)\]", r"\1", line))  # [--flag]: may be left out
    program, arguments = program_of(words)
    more = [flags for part, flags in SMALLER.items() if part in (program, *arguments)]
    for name, here in NAMES.get(document, {}).items():
        arguments = [re.sub(rf"^{re.escape(name)}(?=/|$)", str(here), word) for word in arguments]
    arguments = [word for word in arguments if word]
    for study, stage in ONE_STAGE.items():
        if arguments[:1] == [f"experiments/studies/{study}.toml"] and "--stage" not in arguments:
            arguments[1:1] = ["--stage", stage]
    if "--help" not in arguments:
        arguments += [word for flags in more for word in parts_of(flags)[1]]
    if "--slurm" in arguments:
        arguments.remove("--dry_run")
    return env, [program, *arguments]


def with_files(words: list[str], folder: Path) -> list[str]:
    """As a shell would: a pattern becomes the files that it matches."""
    found = [sorted(glob(word, root_dir=folder)) if "*" in word else [] for word in words]
    quoted = ("--input_bin",)  # the documents quote it
    return [
        name
        for i, (word, names) in enumerate(zip(words, found, strict=True))
        for name in (names if names and words[i - 1] not in quoted else [word])
    ]


@pytest.mark.parametrize(("document", "line"), SCRIPTS, ids=lambda value: value[:70])
def test_a_documented_script_does_what_it_is_shown_for(document, line, checkout):
    env, words = words_here(document, line)
    command = " ".join(words)
    code, says = next((end for part, *end in ENDS if part in command), (0, ""))
    if "--help" in words:
        code, says = 0, "usage"
    if str(ORIGINAL.parent) in command and not ORIGINAL.exists():
        pytest.skip(f"the original study's files are not in {ORIGINAL}")
    if "--device cuda" in command and torch.cuda.is_available():
        pytest.skip("it measures the GPU for minutes, and the test is of a machine without one")
    is_endless = any(part in command for part in ENDLESS)
    found, output = checkout.run(with_files(words, checkout.folder), env, is_endless)
    assert found == code, f"{command}\n{output}"
    assert "Traceback" not in output, output
    assert re.search(says, output), output


def test_every_line_of_the_tables_is_of_a_command():
    shown = {line: " ".join(words_here(document, line)[1]) for document, line in SCRIPTS}
    small = "\n".join([*shown, *shown.values()])
    parts = [*SMALLER, *ENDLESS, *(part for part, *_ in ENDS)]
    assert [part for part in parts if part not in small] == []
    for document, names in NAMES.items():
        text = (
            ROOT / document if document == "README.md" else ROOT / "docs" / document
        ).read_text()
        assert [name for name in names if name not in text] == []


def test_launch_starts_a_command(checkout):
    words = ["scripts/launch.sh", "true"]
    done = subprocess.run(words, cwd=checkout.folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
