"""What scripts/hamt/compare_baselines.py promises: one text, one convention for all models; nobody
else's memory counted.
"""

import csv
import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import compare_baselines as program
import comparison_flags
import meters
import numpy as np
import pytest
import quality
import speed
import subjects
import torch
from hamt_support import ONE, ROOT

import plumbing
import train_gpu
from plumbing import UserError
from plumbing.text_runs import open_text
from plumbing.text_scores import Score, evaluate, evaluate_stream

CPU = torch.device("cpu")
TINY = dict(n_embd=16, hcm_dim=16, n_layer=2, num_slots=4, n_head=2, tokenizer="bytes")
TINY |= dict(precision="fp32", device="cpu", dropout=0.0, sequence_length=32, batch_size=4)
TEXT = "\n\n".join(
    f"Paragraph {i} is about caf\u00e9s, and about {i * 7 % 11} other things." for i in range(400)
)
# A package called transformers: its one model and tokenizer are ours, in its clothes.
FAKE = """
import json, os
from types import SimpleNamespace
import torch, train_gpu
from lib import runs
from pathlib import Path

def here(name, local_files_only):
    if not Path(name).is_dir():
        raise OSError(f"{name} is not here\\nat all, local_files_only={local_files_only}")
    return Path(name)

class AutoTokenizer:
    @staticmethod
    def from_pretrained(name, local_files_only):
        here(name, local_files_only)
        return lambda text, **options: {"input_ids": list(text.encode())}

class Model(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        self.inner, _ = runs.load(path)
        self.config = SimpleNamespace(max_position_embeddings=64, vocab_size=256)

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        state = past_key_values or self.inner.empty_state(len(input_ids))
        hidden, state, _ = self.inner.hidden(input_ids, state)
        logits = self.inner.head(hidden[:, -logits_to_keep:])
        return SimpleNamespace(logits=logits, past_key_values=state)

class AutoModelForCausalLM:
    from_pretrained = staticmethod(lambda name, local_files_only: Model(here(name, local_files_only)))
"""


def save(folder: Path, run_id: str, **more: object) -> Path:
    """A checkpoint of random weights, as train_gpu.py would have left it."""
    k = train_gpu.Knobs(
        **TINY | dict(data=str(folder / "text.txt"), data_folder=str(folder / "data")) | more
    )
    model, generator = train_gpu.Model(k), torch.Generator().manual_seed(len(run_id))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 3)
    state = dict(
        model=model.state_dict(),
        knobs=json.loads(plumbing.knobs_json(k)),
        step=3,
        progress=dict(val_loss=math.nan),
    )
    state |= dict(trainer="train_gpu", world_size=1, code_sha256="")
    (folder / "logs" / run_id).mkdir(parents=True, exist_ok=True)
    plumbing.save_checkpoint(folder / "logs" / run_id, 3, state, ONE, keep=2)
    return folder / "logs" / run_id / "step_000003"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A text, runs of both mixers and a hybrid, and a folder with the package of FAKE."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "text.txt").write_text(TEXT)
    save(folder, "memory")
    save(folder, "attention", mixer="attention")
    save(folder, "convolved", mixer="attention", conv=True)
    (folder / "site").mkdir()
    (folder / "site/transformers.py").write_text(FAKE)
    return folder


@pytest.fixture
def fake(monkeypatch, home):
    monkeypatch.syspath_prepend(str(home / "site"))
    yield
    sys.modules.pop("transformers", None)


def path(home: Path, run_id: str) -> str:
    return str(home / "logs" / run_id / "step_000003")


def ours(home: Path, run_id: str) -> subjects.Ours:
    return subjects.Ours(dict(path=path(home, run_id)), CPU)


def run(monkeypatch, home: Path, *flags: object) -> list[str]:
    """The program in this process, its children too; the lines it shows."""
    lines = []
    for module in (program, speed, meters):
        monkeypatch.setattr(module, "show", lambda line="": lines.append(line))
    here = lambda what, spec, device: program.CHILDREN[what](
        json.loads(json.dumps(spec)), torch.device(device)
    )
    for module in (program, speed):
        monkeypatch.setattr(module, "measure_apart", here)
    program.main([*map(str, flags), "--logs_folder", str(home / "logs")])
    return "\n".join(lines).splitlines()


def rows(file: Path) -> list[dict[str, str]]:
    with open(file) as f:
        return list(csv.DictReader(f))


# ----------------------------------------------------------------------------
# Perplexity


@pytest.mark.parametrize("window, stride, micro", [(32, 32, 1), (32, 16, 3), (24, 1, 4)])
@pytest.mark.parametrize("run_id", ["memory", "attention"])
def test_windows_score_what_the_trainer_scores(home, run_id, window, stride, micro):
    model = ours(home, run_id)
    split = open_text(model.cfg, ONE)[1]["test"]
    shard = dataclasses.replace(split, shards=Front(split.shards, 150))
    if window == stride == model.cfg.sequence_length:
        theirs = evaluate(model.model, shard, 32, 2, ONE)
    else:
        text = torch.from_numpy(split.shards.read(0, 150).astype(np.int64))
        theirs = Score.of(shard, by_hand(model, text, window, stride), 149)
    tokens = split.shards.read(0, 150)
    nats = quality.window_nats(model, tokens, window, stride, micro)
    assert nats == pytest.approx(theirs.nats, rel=1e-5) and theirs.tokens == 149
    found = quality.scored(nats, 150, split.words, split.bytes)
    assert found.word_ppl == pytest.approx(theirs.word_ppl, rel=1e-4)
    assert found.bits_per_byte == pytest.approx(theirs.bits_per_byte, rel=1e-5)


def by_hand(model: subjects.Ours, text: torch.Tensor, window: int, stride: int) -> float:
    """The loss of each token but the first, from its window and nothing else."""
    nats = 0.0
    for start, inputs, scored in quality.windows(len(text), window, stride):
        logits = model.logits(text[None, start : start + inputs])[0, inputs - scored :]
        targets = text[start + inputs - scored + 1 : start + inputs + 1]
        nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    return nats


@pytest.mark.parametrize("window, stride", [(4, 4), (5, 2), (7, 1), (50, 50)])
def test_windows_score_every_target_once_with_the_context_they_promise(window, stride):
    plan = quality.windows(23, window, stride)
    scored = [start + n - i for start, n, s in plan for i in range(s, 0, -1)]
    assert scored == list(range(22))
    assert all(n == window for _, n, _ in plan[:-1])


class Front:
    """The first n tokens of a split."""

    def __init__(self, shards: plumbing.TokenShards, n: int):
        self.total, self.read = n, shards.read


def test_streaming_scores_what_the_trainer_scores(monkeypatch, home):
    monkeypatch.setattr(quality, "FEED", 64)
    model = ours(home, "memory")
    split = open_text(model.cfg, ONE)[1]["test"]
    short = dataclasses.replace(split, shards=Front(split.shards, 333))
    theirs = evaluate_stream(model.model, short, 32, ONE)
    assert quality.stream_nats(model, split.shards.read(0, 333)) == pytest.approx(
        theirs.nats, rel=1e-5
    )


def test_a_published_model_is_scored_by_the_same_conventions_as_ours(
    monkeypatch, home, fake, tmp_path
):
    flags = [
        "--run",
        "attention",
        "--baselines",
        path(home, "attention"),
        "--quality_only",
        "--max_samples",
        4,
    ]
    run(monkeypatch, home, *flags, "--window", 24, "--stride", 10, "--output_dir", tmp_path)
    a, b = rows(tmp_path / "quality.csv")
    same = (
        "tokens nats words bytes loss ppl word_ppl bits_per_byte window stride parameters".split()
    )
    assert {name: a[name] for name in same} == {name: b[name] for name in same} and float(
        a["nats"]
    ) > 100
    assert a["model"] == "attention (attention)" and b["model"].endswith("(zero-shot)")


def test_ppl_is_per_token_per_word_and_per_byte_of_the_same_sum(home):
    found = quality.scored(700.0, 101, 40, 505)
    assert found.tokens == 100 and found.ppl == pytest.approx(math.exp(7))
    assert found.word_ppl == pytest.approx(math.exp(700 / (40 * 100 / 101)))
    assert found.bits_per_byte == pytest.approx(700 / math.log(2) / 500)


def test_all_models_read_the_same_lines(home):
    k = ours(home, "memory").cfg
    whole, words = quality.raw_text(k, "test", None)
    assert (
        open_text(k, ONE)[1]["test"].words == words
        and len(whole.encode()) == open_text(k, ONE)[1]["test"].bytes
    )
    text, words = quality.raw_text(k, "test", 3)
    assert whole.startswith(text) and len([line for line in text.splitlines() if line.strip()]) == 3
    assert words == len(text.split()) + text.count("\n") and "caf\u00e9s" in text


# ----------------------------------------------------------------------------
# What cannot be had


def test_without_transformers_the_published_models_are_one_line_each(monkeypatch, home, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    flags = [
        "--run",
        "memory",
        "--baselines",
        "gpt2",
        "pythia-70m",
        "--quality_only",
        "--max_samples",
        2,
    ]
    lines = run(monkeypatch, home, *flags, "--output_dir", tmp_path)
    told = [
        line for line in lines if "transformers is not installed; pip install transformers" in line
    ]
    assert [line.split(":")[0] for line in told] == ["gpt2", "pythia-70m"]
    assert [r["model"] for r in rows(tmp_path / "quality.csv") if r["nats"]] == ["memory (hamt)"]


def test_missing_weights_are_one_line_and_the_hub_is_asked_second(
    monkeypatch, home, fake, tmp_path
):
    flags = ["--run", "memory", "--baselines", "pythia-70m", "--quality_only", "--max_samples", 2]
    lines = run(monkeypatch, home, *flags, "--output_dir", tmp_path)
    (told,) = [line for line in lines if line.startswith("pythia-70m: left out")]
    assert "no weights of EleutherAI/pythia-70m neither on this machine nor from the hub" in told
    assert "local_files_only=False" in told
    lines = run(monkeypatch, home, *flags, "--offline", "--output_dir", tmp_path)
    (told,) = [line for line in lines if line.startswith("pythia-70m: left out")]
    assert "on this machine (" in told and "local_files_only=True" in told


def test_a_measurement_that_dies_is_one_line(monkeypatch, home):
    lines = []
    for module in (program, speed, meters):
        monkeypatch.setattr(module, "show", lambda line="": lines.append(line))
    spec = dict(
        subject=dict(path=str(home / "nowhere")), context=8, decode=1, repeats=1, precision="fp32"
    )
    assert meters.measure_apart("inference", spec, "cpu") is None
    assert len(lines) == 1 and "'context': 8" in lines[0] and "nowhere" in lines[0]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--run memory --window 8 --stride 9", "--stride 9 is more than --window 8"),
        ("--run nowhere", "no run 'nowhere'"),
        ("--baselines none", "no model to compare"),
        ("--run memory --contexts 16 --decode 16", "must be longer than --decode"),
        ("--speed_only --knobs num_slots", "name=value"),
        ("--speed_only --knobs num_slot=3", "num_slots"),
        ("--run memory --dataset nothing-here", "nothing-here"),
    ],
)
def test_a_bad_flag_is_one_line_that_says_what_is_wrong(monkeypatch, home, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        run(
            monkeypatch,
            home,
            *flags.split(),
            *["--baselines", "none"] * ("--run" in flags),
            "--output_dir",
            tmp_path,
        )


def test_a_window_beyond_a_models_context_is_refused(monkeypatch, home, fake, tmp_path):
    flags = [
        "--run",
        "memory",
        "--baselines",
        path(home, "attention"),
        "--window",
        65,
        "--output_dir",
        tmp_path,
    ]
    with pytest.raises(UserError, match="takes 64 tokens at most"):
        run(monkeypatch, home, *flags)


# ----------------------------------------------------------------------------
# Speed, memory, state


def test_a_comparison_has_quality_speed_memory_and_state_of_every_model(
    monkeypatch, home, fake, tmp_path
):
    flags = ["--run", "memory", "--baselines", path(home, "attention"), "--max_samples", 2]
    flags += ["--contexts", "24,48,96", "--decode", 4, "--repeats", 1, "--output_dir", tmp_path]
    run(monkeypatch, home, *flags)
    quality, speed = rows(tmp_path / "quality.csv"), rows(tmp_path / "inference.csv")
    names = [r["model"] for r in quality]
    assert names[0] == "memory (hamt)"
    assert "untrained" in names[1] and "zero-shot" in names[2]
    assert [bool(r["nats"]) for r in quality] == [True, False, True]
    assert [bool(r["stream_ppl"]) for r in quality] == [True, False, False]
    all_pairs = {(name, context) for name in names for context in ("24", "48", "96")}
    beyond_its_positions = {(names[2], "96")}
    found = {(r["model"], r["context"]) for r in speed}
    assert found == all_pairs - beyond_its_positions
    state = lambda i: [int(r["state_bytes"]) for r in speed if r["model"] == names[i]]
    assert len(set(state(0))) == 1
    assert state(1) == [24 * 256, 48 * 256, 96 * 256]
    assert state(2) == [n + 8 for n in state(1)[:2]]
    assert all(
        float(r["prefill_tokens_per_s"]) > 0 and float(r["decode_ms"]) > 0 and r["n"] == "4"
        for r in speed
    )
    assert all(float(r["peak_mib"]) > 100 for r in speed)
    page = (tmp_path / "comparison.md").read_text()
    assert "29.41 is WikiText-2 and 37.50 is WikiText-103" in page
    assert "Window 32 tokens, stride 32" in page
    assert {p.name for p in tmp_path.iterdir()} >= {
        "quality.png",
        "quality.svg",
        "inference.png",
        "inference.svg",
    }
    assert json.loads((tmp_path / "comparison.json").read_text())["torch"] == torch.__version__


def test_a_child_counts_its_own_memory_only(home):
    ballast = torch.ones(2**26)  # 256 MiB that are resident here
    spec = dict(
        subject=dict(path=path(home, "memory")), context=40, decode=4, repeats=1, precision="fp32"
    )
    found = meters.measure_apart("inference", spec, "cpu")
    assert meters.status_mib("VmRSS") > found["peak_mib"] + 128 and ballast.sum() == 2**26
    assert 0 <= found["above_mib"] < 100 and found["context"] == 40


def test_peak_memory_is_that_of_what_comes_after():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import torch, meters\n"
        "big = torch.ones(2**25); del big\n"  # 128 MiB, gone before
        "peak = meters.Peak(torch.device('cpu'))\n"
        "small = torch.ones(2**24); del small\n"  # 64 MiB
        "print(peak.row()['above_mib'])\n"
    )  # in a process of its own: plumbing.world, which other tests enter, makes one keep what it frees
    line = [sys.executable, "-c", code, str(ROOT / "scripts/hamt"), str(ROOT)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=True)
    assert 60 < float(done.stdout) < 80


@pytest.mark.parametrize("run_id", ["memory", "attention", "convolved"])
def test_a_drawn_state_has_the_size_of_one_that_was_read(home, run_id):
    model = ours(home, run_id)
    with torch.inference_mode():
        _, read = model.prefill(torch.randint(256, (1, 40)))
        _, short = model.prefill(torch.randint(256, (1, 20)))
    drawn = meters.grown(model, short, 40)
    shapes = lambda state: [[(t.shape, t.dtype) for t in layer] for layer in state.layers]
    assert shapes(drawn) == shapes(read)
    assert drawn.position == read.position == 40


def test_speed_only_measures_training_memory_and_decoding(monkeypatch, home, tmp_path):
    knobs = (
        "hidden_dim=16 hcm_dim=16 num_slots=2 num_attention_heads=2 tokenizer=bytes dataset=bytes"
    )
    flags = [
        "--speed_only",
        "--preset",
        "demo",
        "--knobs",
        knobs,
        "--lengths",
        "16,64",
        "--tokens_per_step",
        64,
    ]
    flags += [
        "--repeats",
        2,
        "--decode_contexts",
        "16,64",
        "--fed",
        32,
        "--decode",
        3,
        "--output_dir",
        tmp_path,
    ]
    monkeypatch.setattr(speed.benching, "stop_at_once", lambda *args: None)
    lines = run(monkeypatch, home, *flags)
    training, memory, decoding = (rows(tmp_path / f"{part}.csv") for part in comparison_flags.PARTS)
    assert [(r["model"], r["length"], r["batch"]) for r in training] == [
        (m, t, b) for t, b in (("16", "4"), ("64", "1")) for m in ("hamt", "attention")
    ]
    assert all(float(r["tokens_per_s"]) > 0 for r in training)
    assert all(
        float(r["ratio_low"]) <= float(r["ratio"]) <= float(r["ratio_high"]) for r in training[::2]
    )
    assert float(training[0]["time_per_token"]) == 1
    assert {(r["mixer"], r["checkpointing"], r["context"]) for r in memory} == {
        (m, c, t) for m in ("hamt", "attention") for c in "01" for t in ("16", "64")
    }
    state = {(r["model"], r["context"]): (r["read"], int(r["state_bytes"])) for r in decoding}
    assert state["hamt", "16"] == state["hamt", "64"] and state["hamt", "64"][0] == "fed"
    assert state["attention", "64"] == ("drawn", 4 * state["attention", "16"][1])
    assert any("untrained" in line and "parameters" in line for line in lines)
    assert {f"{part}.{kind}" for part in comparison_flags.PARTS for kind in ("png", "svg")} < {
        p.name for p in tmp_path.iterdir()
    }


def test_checkpointing_reaches_the_model_that_is_measured(monkeypatch, home):
    seen = []
    monkeypatch.setattr(
        speed, "measure_apart", lambda what, spec, device: seen.append(spec["knobs"])
    )
    a = comparison_flags.arguments(["--speed_only", "--preset", "demo", "--lengths", "64,128"], "")
    speed.training_memory(a, ("hamt",))
    assert [(k["gradient_checkpointing"], k["sequence_length"]) for k in seen] == [
        (kept, T) for kept in (False, True) for T in (64, 128)
    ]


def test_a_ratio_is_that_of_paired_turns():
    noise = np.exp(
        np.random.default_rng(0).normal(size=30)
    )  # a machine whose speed changes from turn to turn
    found = speed.ratio_of(list(1.25 * noise * np.tile([0.999, 1.001], 15)), list(noise))
    assert [found[name] for name in ("ratio", "ratio_low", "ratio_high")] == pytest.approx(
        [1.25] * 3, rel=1e-3
    )
    assert speed.ratio_of([1, 8, 1], [1, 1, 1])["ratio"] == pytest.approx(2), (
        "of the middle, not of the sums"
    )
    loose = speed.ratio_of(list(1.25 * noise), list(noise[::-1]))
    assert loose["ratio_low"] < 1.25 < loose["ratio_high"] and loose["ratio"] == pytest.approx(1.25)


def test_a_deadline_leaves_the_parts_that_are_done_and_no_process(tmp_path):
    """Decoding of this many tokens would take hours. The deadline is told to be now as soon as
    training is done.
    """
    knobs = "hidden_dim=16 hcm_dim=16 num_slots=2 num_attention_heads=2"
    flags = ["--speed_only", "--preset=demo", f"--knobs={knobs}", "--mixer=hamt"]
    flags += ["--parts=training,decoding", "--lengths=16", "--tokens_per_step=16", "--repeats=1"]
    flags += ["--decode_contexts=100000000", "--deadline_s=900", f"--output_dir={tmp_path}"]
    command = [sys.executable, str(ROOT / "scripts/hamt/compare_baselines.py"), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (tmp_path / "speed.md").exists():
            time.sleep(0.05)
        time.sleep(1)  # its child for decoding has started
        process.send_signal(signal.SIGALRM)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped by the deadline; done: training" in stderr
    found = json.loads((tmp_path / "speed_training.json").read_text())
    assert found["rows"][0]["tokens_per_s"] > 0 and found["torch"] and found["git_commit"]
    assert not (tmp_path / "speed_decoding.json").exists()
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in processes and "100000000" not in processes
