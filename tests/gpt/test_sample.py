"""sample.py: the text it makes, its settings, its tokenizers, and the pipe behind it."""

import argparse
import io
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sample
import torch
from lib import runs
from run_support import ID, make_run
from support import ROOT, SHARED, environment

from plumbing import UserError
from plumbing.texts import tokenizer

WORDS = dict(tokens=20, temperature=0.8, top_k=50, top_p=1.0)


def sampled(capfd, folder: Path, *flags: str, run: str = "made") -> tuple[str, str]:
    sample.main([f"--run={run}", f"--logs_folder={folder / 'logs'}", *flags])
    return capfd.readouterr()


class FakeModel:
    """Something that Window takes for a model: its logits are a function of the number of calls."""

    __module__ = "train_gpt"

    def __init__(self, logits_of_call):
        self.logits_of_call = logits_of_call
        self.num_calls = 0
        self.cfg = SimpleNamespace(sequence_length=16)
        self.wte = torch.zeros(1)
        self.blocks = []

    def logits(self, x_BT: torch.Tensor, start: int) -> torch.Tensor:
        self.num_calls += 1
        return self.logits_of_call(self.num_calls - 1)[None, None]


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
        tokens = list(sample.generate(FakeModel(lambda _: likely_padding), [1], -1, 256, a, 0))
        assert len(tokens) == 50 and max(tokens) < 256


def test_a_document_separator_ends_the_sample():
    text = [97, 98, 0, 99]
    model = FakeModel(lambda step: torch.nn.functional.one_hot(torch.tensor(text[step]), 256) * 1e4)
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
    tokenizer.cache_clear()
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

    tokenizer.cache_clear()
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
    assert runs.tokenizer_name("auto", vocab) == name
    assert runs.tokenizer_name("bytes", vocab) == "bytes"


def test_a_vocabulary_of_no_known_tokenizer_asks_for_one():
    with pytest.raises(UserError, match=r"VOCAB_SIZE=1000 .* --tokenizer"):
        runs.tokenizer_name("auto", 1000)


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
# What was a traceback


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
def test_the_smallest_temperature_draws_the_likeliest_token(temperature):
    logits = torch.tensor([0.5, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    assert {runs.pick(logits, temperature, 0, 1.0, generator) for _ in range(20)} == {1}


def program(folder: Path, *flags: str | bytes) -> list[str | bytes]:
    command = [sys.executable, str(ROOT / "scripts/sample.py"), "--run=made"]
    return [*command, f"--logs_folder={folder / 'logs'}", *flags]


def test_a_prompt_that_is_not_utf8_is_refused_in_one_line(tmp_path):
    make_run(tmp_path, vocab_size=256)
    command = program(tmp_path, b"--prompt=ab\xff")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr == (
        "sample.py: error: --prompt is not UTF-8 text (at character 2); give it in UTF-8\n"
    )


def test_a_reader_that_leaves_early_ends_the_program_without_a_traceback(tmp_path):
    make_run(tmp_path, vocab_size=256)
    flags = ["--prompt=abcdefghij", "--tokens=100000", "--top_k=0", "--temperature=9"]
    with subprocess.Popen(
        program(tmp_path, *flags), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert os.read(process.stdout.fileno(), 10) == b"abcdefghij"
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == -signal.SIGPIPE
    assert "Traceback" not in said and "Error" not in said, said
