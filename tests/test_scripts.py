"""sample.py, export.py, replay.py and run_baseline.sh: what they promise about a run, on small ones made here."""

import argparse
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import (
    ONE,
    ROOT,
    SHARED,
    SMALL,
    knobs,
    losses,
    rows,
    run_here,
    same_tensors,
    write_data,
)

sys.path.insert(0, str(ROOT / "scripts"))
import export
import replay
import sample
from lib import runs as lib
from safetensors.torch import load_file, save_file

import plumbing
import train_gpt
from plumbing import UserError

ID = "trained"  # the module's run; "made" are folders that look like runs, of models that never trained
BASELINE = ROOT / "scripts/run_baseline.sh"
WORDS = dict(tokens=20, temperature=0.8, top_k=50, top_p=1.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with one run of bytes, preempted after 7 steps and resumed, so that its log holds two starts."""
    folder = tmp_path_factory.mktemp("scripts")
    with pytest.MonkeyPatch.context() as patch:
        hear = train_gpt.Run.hear
        patch.setattr(sys, "orig_argv", ["python", "-u", str(ROOT / "train_gpt.py"), "--lr=0.01"])
        patch.setattr(
            train_gpt.Run,
            "hear",
            lambda run, beat: hear(run, beat) or "preempted" * (beat.step == 6),
        )
        assert run_here(patch, folder, run_id=ID, vocab_size=256, lr=0.011)[0] != 0
        patch.setattr(train_gpt.Run, "hear", hear)
        assert run_here(patch, folder, run_id=ID, vocab_size=256, lr=0.011, keep=3)[0] == 0
    return folder


def make_run(folder: Path, **values) -> train_gpt.GPT:
    """A folder of a run called 'made' with one checkpoint; returns its model, whose weights are all random."""
    k = knobs(**values)
    model = train_gpt.GPT(k).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 4)
    state = dict(
        model=model.state_dict(),
        knobs=json.loads(plumbing.knobs_json(k)),
        step=3,
        val_loss=math.nan,
    )
    plumbing.save_checkpoint(folder / "logs/made", 3, state | dict(code_sha256="0" * 64), ONE)
    return model


def spoil(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ----------------------------------------------------------------------------
# sample.py


def sampled(capfd, folder: Path, *flags: str, run: str = "made") -> tuple[str, str]:
    sample.main([f"--run={run}", f"--logs_folder={folder / 'logs'}", *flags])
    return capfd.readouterr()


def fake_model(logits_of_step) -> SimpleNamespace:
    """Something that Window takes for a model: its logits are a function of the number of calls."""
    calls = []

    def logits(x_BT, cache):
        calls.append(x_BT)
        return logits_of_step(len(calls) - 1)[None, None]

    return SimpleNamespace(
        k=SimpleNamespace(sequence_length=16), wte=torch.zeros(1), blocks=[], logits=logits
    )


@pytest.mark.parametrize("prompt", [1, 3, 16, 17, 40])
def test_the_cached_text_is_what_the_whole_forward_makes_through_every_restart_of_the_window(
    tmp_path, capfd, prompt
):
    model = make_run(tmp_path, vocab_size=256, attngate="headwise")
    T, ids, start = 16, [(7 * i) % 255 + 1 for i in range(prompt)], 0
    expected = list(ids)
    for _ in range(30):  # written out: no cache, and one rule for the window
        if len(expected) - start > T:
            start = len(expected) - T // 2
        expected.append(int(model.logits(torch.tensor([expected[start:]]))[0, -1].argmax()))
    a = argparse.Namespace(**WORDS | dict(tokens=30, temperature=0))
    assert ids + list(sample.generate(model, ids, -1, 256, a, 0)) == expected
    said = capfd.readouterr().err
    assert said.count("\n") == 1, "said once"
    words = f"the prompt has {prompt} tokens, SEQUENCE_LENGTH is 16: only its last 8 are read"
    assert (
        words if prompt > T else "SEQUENCE_LENGTH is full at 16 tokens: going on from the last 8"
    ) in said


def test_a_seed_makes_the_same_text_again_and_sample_i_is_seed_plus_i(home, capfd):
    first = sampled(capfd, home, "--prompt=ab", "--tokens=12", "--temperature=3", run=ID)[0]
    assert first == sampled(capfd, home, "--prompt=ab", "--tokens=12", "--temperature=3", run=ID)[0]
    both = sampled(
        capfd, home, "--prompt=ab", "--tokens=12", "--temperature=3", "--num_samples=2", run=ID
    )[0]
    other = sampled(
        capfd, home, "--prompt=ab", "--tokens=12", "--temperature=3", "--seed=1", run=ID
    )[0]
    assert first != other
    assert both == f"--- sample 1 of 2, seed 0\n{first}--- sample 2 of 2, seed 1\n{other}"


def test_draws_follow_temperature_top_k_and_top_p():
    logits, generator = torch.tensor([0.5, 3.0, 2.0, -1.0, 2.5]), torch.Generator().manual_seed(0)

    def share(temperature: float, top_k: int, top_p: float) -> torch.Tensor:
        draws = [sample.pick(logits, temperature, top_k, top_p, generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(draws), minlength=5) / 4000

    def expected(temperature: float, kept: list[int]) -> torch.Tensor:
        p = torch.tensor(
            [math.exp(float(x) / temperature) if i in kept else 0.0 for i, x in enumerate(logits)]
        )
        return p / p.sum()

    everything = [0, 1, 2, 3, 4]
    for settings, kept in (
        ((1.0, 0, 1.0), everything),
        ((2.0, 0, 1.0), everything),
        ((1.0, 2, 1.0), [1, 4]),
        ((1.0, 9, 1.0), everything),
        ((1.0, 0, 0.6), [1, 4]),  # 0.48 is too little, 0.77 is enough
        ((1.0, 0, 0.3), [1]),
        ((1.0, 3, 0.9), [1, 2, 4]),  # of what top_k left
    ):
        found = share(*settings)
        assert set(found.nonzero().flatten().tolist()) == set(kept), settings
        assert torch.allclose(found, expected(settings[0], kept), atol=0.03), settings
    assert {sample.pick(logits, 0, 0, 1.0, generator) for _ in range(20)} == {1}


def test_ids_beyond_the_tokenizer_are_never_drawn():
    likely_padding = torch.zeros(300)
    likely_padding[256:] = 1e4
    for temperature in (0, 1.0):
        a = argparse.Namespace(**WORDS | dict(tokens=50, temperature=temperature))
        tokens = list(sample.generate(fake_model(lambda _: likely_padding), [1], -1, 256, a, 0))
        assert len(tokens) == 50 and max(tokens) < 256


def test_a_document_separator_ends_the_sample():
    text = [97, 98, 0, 99]
    model = fake_model(
        lambda step: torch.nn.functional.one_hot(torch.tensor(text[step]), 256) * 1e4
    )
    a = argparse.Namespace(**WORDS)
    assert list(sample.generate(model, [1], 0, 256, a, 0)) == [97, 98]


def test_an_empty_prompt_starts_from_a_document_separator(monkeypatch, tmp_path, capfd):
    make_run(tmp_path, vocab_size=256)
    prompts = []
    monkeypatch.setattr(
        sample, "generate", lambda model, ids, *_: prompts.append(ids) or iter(b"ab")
    )
    assert sampled(capfd, tmp_path)[0] == "ab\n"
    assert prompts == [[0]]


def test_characters_of_several_bytes_come_out_whole_and_a_cut_one_as_a_mark(
    monkeypatch, tmp_path, capfd
):
    make_run(tmp_path, vocab_size=256)
    text = "x\u00e9\u20ac\U0001f600"
    monkeypatch.setattr(sample, "generate", lambda *_: iter([*text.encode(), 0xE2, 0x82]))
    assert sampled(capfd, tmp_path, "--prompt=\u00e4")[0] == f"\u00e4{text}\ufffd\n"


def test_text_is_printed_as_it_is_made(monkeypatch, tmp_path):
    make_run(tmp_path, vocab_size=256)
    out, so_far = io.BytesIO(), []
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))  # buffered, as in a pipe

    def tokens(*_):
        for token in b"abc":
            yield token
            so_far.append(out.getvalue())

    monkeypatch.setattr(sample, "generate", tokens)
    sample.main(["--run=made", f"--logs_folder={tmp_path / 'logs'}", "--prompt=>"])
    assert so_far == [b">a", b">ab", b">abc"]


def test_gpt2_text_goes_through_tiktoken_offline(monkeypatch, tmp_path, capfd):
    cache = SHARED / "data/gpt2_bpe/tiktoken_cache"
    if not cache.exists():
        pytest.skip(f"no tokenizer files in {cache}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    make_run(tmp_path, vocab_size=50304, n_embd=8)
    prompts = []
    made = [15496, 11, 995, 220, 47249, 224]  # "Hello, world " and half of a character
    monkeypatch.setattr(
        sample, "generate", lambda model, ids, *rest: prompts.append((ids, *rest[:2])) or iter(made)
    )
    assert sampled(capfd, tmp_path, "--prompt=Hello, world")[0].startswith(
        "Hello, worldHello, world "
    )
    assert prompts == [([15496, 11, 995], 50256, 50257)], (
        "separator 50256; the padding ids from 50257 on are cut off"
    )


def test_a_missing_tokenizer_is_one_clear_error(monkeypatch, tmp_path, capfd):
    import tiktoken

    def no_network(name):
        raise ConnectionError("Max retries exceeded\n with url ...")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    make_run(tmp_path, vocab_size=50304, n_embd=8)
    with pytest.raises(
        UserError, match=r"the gpt2 tokenizer is not here .*TIKTOKEN_CACHE_DIR"
    ) as caught:
        sampled(capfd, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocab", "name"),
    [(64, "bytes"), (256, "bytes"), (257, "bytes"), (50257, "gpt2"), (50304, "gpt2")],
)
def test_the_tokenizer_follows_from_the_vocabulary(vocab, name):
    assert lib.tokenizer_name("auto", vocab) == name
    assert lib.tokenizer_name("bytes", vocab) == "bytes"


def test_a_vocabulary_of_no_known_tokenizer_asks_for_one():
    with pytest.raises(UserError, match=r"VOCAB_SIZE=1000 .* --tokenizer"):
        lib.tokenizer_name("auto", 1000)


def test_a_prompt_outside_the_vocabulary_is_refused(tmp_path, capfd):
    make_run(tmp_path, vocab_size=64)
    with pytest.raises(
        UserError, match="holds token 104 of the bytes tokenizer, this run's VOCAB_SIZE ends at 63"
    ):
        sampled(capfd, tmp_path, "--prompt=h")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--tokens=-1", "--tokens -1: expected 0 or more"),
        ("--temperature=-0.1", "--temperature -0.1: expected 0"),
        ("--temperature=nan", "--temperature nan: expected 0"),
        ("--top_k=-1", "--top_k -1: expected 0"),
        ("--top_p=0", "--top_p 0.0: expected above 0 and up to 1"),
        ("--top_p=1.1", "--top_p 1.1: expected"),
        ("--num_samples=0", "--num_samples 0: expected 1 or more"),
        ("--seed=-1", "--seed -1: expected 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(tmp_path, capfd, flag, words):
    with pytest.raises(UserError, match=words):
        sampled(capfd, tmp_path, flag)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_not_replaced_by_the_cpu_in_silence(tmp_path, capfd):
    with pytest.raises(UserError, match=r"--device cuda, but torch .* sees no CUDA GPU"):
        sampled(capfd, tmp_path, "--device=cuda")


# ----------------------------------------------------------------------------
# Finding a checkpoint


def test_an_unknown_run_is_answered_with_those_there_are(home):
    with pytest.raises(UserError, match=rf"no run 'nope' in .*; it has {ID}"):
        lib.find_run(home / "logs", "nope")
    with pytest.raises(UserError, match=r"it has none; --logs_folder"):
        lib.find_run(home / "nowhere", "nope")


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / "logs/young").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint yet"):
        lib.find_checkpoint(lib.find_run(tmp_path / "logs", "young"))


def test_the_newest_good_checkpoint_is_taken_and_bad_ones_are_named(home, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(home / "logs" / ID, folder)
    newest = ["step_000012", "step_000008", "step_000007"]
    assert lib.find_checkpoint(folder).name == newest[0] and not capfd.readouterr().err
    spoil(folder / newest[0] / "state.pt")
    assert lib.find_checkpoint(folder).name == newest[1]
    assert "step_000012 is skipped: state.pt does not have the SHA-256" in capfd.readouterr().err
    assert lib.find_checkpoint(folder, "step_000007").name == "step_000007"
    with pytest.raises(UserError, match="step_000012 is bad"):
        lib.find_checkpoint(folder, "step_000012")
    with pytest.raises(
        UserError, match="no checkpoint 'step_000009'; it has step_000007, step_000008, step_000012"
    ):
        lib.find_checkpoint(folder, "step_000009")
    (folder / newest[1] / "manifest.json").unlink()
    spoil(folder / newest[2] / "state.pt")
    with pytest.raises(UserError, match="no good checkpoint, 3 bad"):
        lib.find_checkpoint(folder)


def test_a_checkpoint_of_another_program_is_refused_with_the_way_to_its_own(tmp_path):
    state = dict(model={}, knobs=json.loads(plumbing.knobs_json(knobs())) | dict(num_slots=4))
    plumbing.save_checkpoint(tmp_path / "logs/made", 3, state, ONE)
    with pytest.raises(
        UserError, match=r"another program than this train_gpt.py .*num_slots.*replay.py"
    ):
        lib.load(tmp_path / "logs/made/step_000003")


# ----------------------------------------------------------------------------
# export.py


def exported(folder: Path, out: Path, *flags: str, run: str = "made") -> Path:
    export.main([f"--run={run}", f"--logs_folder={folder / 'logs'}", f"--out={out}", *flags])
    return out


SHAPES = [
    dict(),
    dict(attngate="elementwise", gateopt="adam", mlp_match=True),
    dict(attngate="const", gatepos="key"),
]


@pytest.mark.parametrize("values", SHAPES)
def test_an_export_is_bitwise_the_checkpoints_model(tmp_path, capfd, values):
    model = make_run(tmp_path, **values)
    out = exported(tmp_path, tmp_path / "new/out")
    assert (
        f"proved: {len(list(model.parameters()))} tensors and 2,048 logits"
        in capfd.readouterr().out
    )
    other, _ = export.read_export(out)
    assert same_tensors(dict(model.state_dict()), dict(other.state_dict()))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"], "nothing is left beside it"


def test_the_tied_matrix_is_stored_once_in_fp32_under_the_trainers_names(home, tmp_path):
    out = exported(home, tmp_path / "out", run=ID)
    tensors = load_file(out / "model.safetensors")
    state = torch.load(home / "logs" / ID / "step_000012/state.pt", weights_only=True)
    assert same_tensors(tensors, state["model"])
    assert [name for name, t in tensors.items() if 256 in t.shape] == ["wte"]
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_config_json_says_what_the_weights_are(home, tmp_path):
    out = exported(home, tmp_path / "out", run=ID)
    config = json.loads((out / "config.json").read_text())
    row = rows(home)[-1]
    assert config["model"] == {
        name: getattr(knobs(vocab_size=256), name) for name in lib.MODELS["train_gpt"][1].split()
    }
    assert config["parameters"] == int(row["n_params"])
    assert (config["run_id"], config["checkpoint"], config["step"]) == (ID, "step_000012", 12)
    assert config["val_loss"] == pytest.approx(float(row["final_val_loss"]))
    assert config["code_sha256"] == row["code_sha256"]
    assert (config["exported_with_torch"], config["tokenizer"]) == (torch.__version__, "bytes")


def test_a_folder_that_exists_is_not_touched_without_force(home, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists; choose another, or --force"):
        exported(home, out, run=ID)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    exported(home, out, "--force", run=ID)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "mine.txt", "model.safetensors"]


def test_a_flipped_bit_in_an_export_is_caught(tmp_path):
    model = make_run(tmp_path)
    out = exported(tmp_path, tmp_path / "out")
    spoil(out / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors: its SHA-256 is"):
        export.prove(out, model)


def test_an_export_of_other_weights_is_caught_and_gets_no_name(monkeypatch, tmp_path):
    make_run(tmp_path)

    def rounded(tensors, path, metadata):
        save_file({name: t.bfloat16().float() for name, t in tensors.items()}, path, metadata)

    monkeypatch.setattr(export, "save_file", rounded)
    with pytest.raises(
        UserError, match=r"9 tensor\(s\) are not the checkpoint's, the first is wte"
    ):
        exported(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_computes_other_logits_is_caught(monkeypatch, tmp_path):
    model = make_run(tmp_path, attngate="headwise")
    out = exported(tmp_path, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["model"]["gateact"] = "ns_sigmoid"  # the same tensors, another function of them
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="logits differ from the checkpoint's, by up to"):
        export.prove(out, model)


# ----------------------------------------------------------------------------
# replay.py


def test_the_program_comes_out_of_the_log_byte_for_byte_and_runs_again_to_the_same_losses(
    monkeypatch, home, tmp_path, capfd
):
    assert replay.main([str(home / f"logs/{ID}.txt"), str(tmp_path / "out")]) == 0
    command, said = capfd.readouterr()
    for name in ("train_gpt.py", "plumbing.py"):
        assert (tmp_path / "out" / name).read_bytes() == (ROOT / name).read_bytes()
    assert "start 1 of 2" in said and "code_sha256: matches" in said and "warning" not in said
    assert f"torch: {torch.__version__}" in said
    state = torch.load(home / "logs" / ID / "step_000007/state.pt", weights_only=True)
    assert json.loads((tmp_path / "out/knobs.json").read_text()) == state["knobs"]
    assert "--lr=0.011" in command and "--early_stop_patience" not in command, (
        "what is usual is left out"
    )

    done = subprocess.run(
        ["sh", "-c", command], cwd="/", capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out", f"replay-{ID}") == losses(home, ID)
    assert [row["status"] for row in rows(tmp_path / "out")] == ["finished"]
    log = (tmp_path / f"out/logs/replay-{ID}.txt").read_text()
    assert f"command: {shlex.quote(sys.executable)} {tmp_path}/out/train_gpt.py" in log, (
        "the program taken out ran"
    )


def test_every_start_of_a_resumed_run_can_be_taken_out(home, tmp_path):
    first, second = replay.read_starts(home / f"logs/{ID}.txt")
    assert (first.knobs["keep"], second.knobs["keep"]) == (2, 3)
    assert first.matches and second.matches
    with pytest.raises(
        UserError, match=r"--start 3: .* holds 2 start\(s\) of the run; choose 1 to 2"
    ):
        replay.main([str(home / f"logs/{ID}.txt"), str(tmp_path), "--start=3"])


def test_ranks_settings_of_this_environment_and_another_torch_are_minded(
    monkeypatch, home, tmp_path, capfd
):
    text = (home / f"logs/{ID}.txt").read_text()
    text = text.replace("device: 1 x ", "device: 2 x ").replace(
        "Running pytorch ", "Running pytorch 0."
    )
    (tmp_path / "log.txt").write_text(text)
    monkeypatch.setenv("NUM_ITER", "999")
    monkeypatch.setenv("SEED", "5")
    replay.main([str(tmp_path / "log.txt"), str(tmp_path / "out"), "--start=2"])
    command, said = capfd.readouterr()
    words = shlex.split(command)
    assert words[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert {"--num_iterations=12", "--seed=1337", "--keep=3", f"--run_id=replay-{ID}"} <= set(words)
    assert f"warning: {torch.__version__} is installed" in said


def test_a_log_that_was_edited_does_not_match_and_is_exit_code_1(
    monkeypatch, home, tmp_path, capfd
):
    text = (home / f"logs/{ID}.txt").read_text().replace("relu().square()", "relu()", 1)
    (tmp_path / "log.txt").write_text(text)
    monkeypatch.setattr(replay, "rerun_command", lambda *_: ["true"])
    assert replay.main([str(tmp_path / "log.txt"), str(tmp_path / "out")]) == 1
    assert "the text is NOT what the log's code_sha256 was made of" in capfd.readouterr().err


@pytest.mark.parametrize("ends", [("", "\n"), ("\n\n", ""), ("\n", "\n\n")])
def test_line_ends_that_the_log_leaves_out_are_put_back(ends):
    whole = [text + end for text, end in zip(("a\nb", "c"), ends, strict=True)]
    assert (
        replay.with_ends(["a\nb", "c"], hashlib.sha256("".join(whole).encode()).hexdigest())
        == whole
    )


@pytest.mark.parametrize(
    "last_words", ["git_commit: ", "hyperparameters:\n{", "Running pytorch ", "device: "]
)
def test_a_start_that_a_crash_cut_short_is_left_out(home, tmp_path, last_words):
    text = (home / f"logs/{ID}.txt").read_text()
    (tmp_path / "log.txt").write_text(text[: text.rindex(last_words) + 3])
    assert len(replay.read_starts(tmp_path / "log.txt")) == 1


def test_what_is_no_log_and_what_is_in_the_way_is_refused(home, tmp_path):
    with pytest.raises(UserError, match="holds no program between lines of 100 '='"):
        replay.main(
            [
                str(ROOT / "README.md" if (ROOT / "README.md").exists() else ROOT / "LICENSE"),
                str(tmp_path),
            ]
        )
    with pytest.raises(UserError, match="No such file"):
        replay.main([str(tmp_path / "none.txt"), str(tmp_path)])
    (tmp_path / "plumbing.py").write_text("mine")
    with pytest.raises(UserError, match=r"already has plumbing.py; choose another folder"):
        replay.main([str(home / f"logs/{ID}.txt"), str(tmp_path)])
    assert (tmp_path / "plumbing.py").read_text() == "mine"


def test_a_trainer_is_called_as_in_the_command_or_as_its_docstring_says():
    start = replay.Start(['"""train_x.py -- words."""\n', ""], True, "", {}, "", 1)
    named = lambda command: replay.trainer_name(
        replay.Start(start.sources, True, command, {}, "", 1)
    )
    assert named("/usr/bin/python -u '/a b/train_mine.py' --lr=1") == "train_mine.py"
    assert named("/usr/bin/python -c 'import train_x'") == "train_x.py"
    with pytest.raises(UserError, match="cannot be a trainer's file name"):
        named("python plumbing.py")


# ----------------------------------------------------------------------------
# run_baseline.sh


def baseline(folder: Path, *flags: str, **env: str | int) -> subprocess.CompletedProcess:
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("INPUT_BIN", "DEVICE", "PRESET")
    }
    clean |= dict(OMP_NUM_THREADS="1", PYTHON=sys.executable) | {
        key: str(value) for key, value in env.items()
    }
    return subprocess.run(
        ["bash", BASELINE, *flags],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        timeout=200,
    )


def pretend(folder: Path, gpus: int, code: int = 0, **plan) -> dict[str, str]:
    """An interpreter that has a plan and GPUs and writes down how it was called; the settings to use it."""
    plan = (
        dict(
            device="cuda",
            lr=0.0036,
            input_bin=f"{folder}/t_*.bin",
            input_val_bin=f"{folder}/v_*.bin",
        )
        | plan
    )
    (folder / "plan.json").write_text(
        json.dumps(plan | dict(logs_folder=f"{folder}/logs"), indent=2) + "\nparameters: 1\n"
    )
    stub = f"""#!/bin/sh
    case "$*" in
        *device_count*) echo {gpus} ;;
        *"--dry_run 1"*) cat "{folder}/plan.json" ;;
        *) echo "$@" >> "{folder}/calls"; exit {code} ;;
    esac"""
    (folder / "python").write_text(stub)
    (folder / "python").chmod(0o755)
    return dict(PYTHON=str(folder / "python"))


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def test_baselines_on_a_cpu_train_without_a_gate_and_skip_what_is_complete(monkeypatch, tmp_path):
    run_here(monkeypatch, tmp_path, run_id="baseline-1337", stage="stage0")
    env = {name.upper(): value for name, value in SMALL.items()} | dict(
        SCRIPT="train_gpt.py", ATTNGATE="headwise"
    )
    env |= {name.upper(): value for name, value in write_data(tmp_path).items()}
    env |= dict(
        LOGS_FOLDER=tmp_path / "logs",
        RESULTS_FILE=tmp_path / "results.csv",
        STAGE="stage0",
        COUNT=2,
    )
    done = baseline(tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert "baseline-1337 is complete (finished, val_loss " in done.stdout
    assert "all 2 run(s) are complete" in done.stdout
    found = [
        (r["run_id"], r["seed"], r["attn_gate"], r["stage"], r["learning_rate"])
        for r in rows(tmp_path)
    ]
    assert found == [
        (f"baseline-{seed}", str(seed), "none", "stage0", "0.01") for seed in (1337, 1338)
    ]


@pytest.mark.parametrize(("gpus", "asked", "launched"), [(8, None, 8), (8, 2, 2), (1, None, 1)])
def test_baselines_use_every_gpu_unless_nproc_says_otherwise(tmp_path, gpus, asked, launched):
    write_data(tmp_path)
    env = pretend(tmp_path, gpus) | (dict(NPROC=asked) if asked else {})
    done = baseline(tmp_path, "--lr", "0.1", **env, BASE_SEED=7)
    assert done.returncode == 0, done.stderr
    torchrun = (
        f"-m torch.distributed.run --standalone --nproc_per_node={launched} "
        if launched > 1
        else ""
    )
    own = "--attngate none --seed {0} --run_id baseline-{0} --dry_run 0"
    assert calls(tmp_path) == [
        f"{torchrun}{ROOT}/train_gpt.py --lr 0.1 {own.format(seed)}" for seed in (7, 8, 9)
    ]


@pytest.mark.parametrize(
    ("gpus", "env", "words"),
    [
        (0, dict(), "PyTorch sees no CUDA GPU; DEVICE=cpu trains without"),
        (2, dict(NPROC=3), r"NPROC=3, but this machine has 2 GPU\(s\)"),
        (2, dict(NPROC=0), "NPROC='0': expected a whole number >= 1"),
        (2, dict(NPROC=""), "NPROC='': expected a whole number >= 1"),
        (2, dict(COUNT="three"), "COUNT='three': expected a whole number >= 1"),
        (2, dict(BASE_SEED="-1"), "BASE_SEED='-1': expected a whole number >= 0"),
        (2, dict(SCRIPT="none.py"), "none.py: no such file"),
        (
            2,
            dict(),
            "no token shards match .*t_.*bin; python cached_fineweb10B.py 9 downloads them, or set INPUT_BIN",
        ),
    ],
)
def test_baselines_are_refused_in_one_line_before_anything_starts(tmp_path, gpus, env, words):
    done = baseline(tmp_path, **pretend(tmp_path, gpus), **env)
    assert done.returncode == 2
    assert re.fullmatch(f"run_baseline.sh: error: .*{words}.*\n", done.stderr), done.stderr
    assert not calls(tmp_path)


def test_baselines_stop_at_the_first_run_that_fails(tmp_path):
    write_data(tmp_path)
    done = baseline(tmp_path, **pretend(tmp_path, 2, code=3))
    assert done.returncode == 3 and len(calls(tmp_path)) == 1
    assert "baseline-1337 ended with exit code 3 (status none)" in done.stderr


def test_a_complete_baseline_of_other_knobs_is_not_taken_for_the_one_asked_for(tmp_path):
    write_data(tmp_path)
    env = pretend(tmp_path, 2)
    (tmp_path / "logs/baseline-1337").mkdir(parents=True)
    (tmp_path / "logs/baseline-1337/status.json").write_text(
        json.dumps(dict(status="finished", val_loss=3.5), indent=1)
    )
    plan = (tmp_path / "plan.json").read_text().split("\nparam")[0]
    log = tmp_path / "logs/baseline-1337.txt"
    log.write_text(f"hyperparameters:\n{plan}\n" * 2)
    assert (
        "baseline-1337 is complete (finished, val_loss 3.5), skipped"
        in baseline(tmp_path, **env).stdout
    )
    assert len(calls(tmp_path)) == 2
    log.write_text(log.read_text().replace("0.0036", "0.005"))
    done = baseline(tmp_path, **env)
    assert done.returncode == 2 and len(calls(tmp_path)) == 2
    assert 'it had   "lr": 0.005' in done.stderr and 'now      "lr": 0.0036' in done.stderr
    assert "run baseline-1337 is complete, with other knobs; set RUN_PREFIX" in done.stderr


# ----------------------------------------------------------------------------
# The house


def test_programs_in_scripts_never_import_each_other():
    programs = [p for p in (ROOT / "scripts").glob("*.py") if not p.name.startswith("lib_")]
    names = "|".join(p.stem for p in programs)
    for path in programs:
        assert not re.search(rf"^\s*(import|from) ({names})\b", path.read_text(), re.M), path.name
