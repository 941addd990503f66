"""Token shards as one stream, and batches made ahead: what is read is what the files hold."""

import contextlib
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plumbing.data import (
    HEADER_BYTES,
    MAGIC,
    Prefetch,
    TokenShards,
    read_bytes,
    read_shard,
    write_shard,
)
from plumbing.knobs import UserError
from plumbing.leaks import check_disjoint
from plumbing.world import World

CPU = torch.device("cpu")
ONE = World(0, 1, CPU)


def write_some(folder: Path, *lengths: int, name: str = "s") -> TokenShards:
    """Shards whose tokens say where they stand: 1000 times the shard's number, and on."""
    for i, n in enumerate(lengths):
        write_shard(folder / f"{name}_{i:06d}.bin", np.arange(n, dtype=np.uint16) + 1000 * i)
    return TokenShards(str(folder / f"{name}_*.bin"))


# ----------------------------------------------------------------------------
# Shards


@given(arrays(np.uint16, st.integers(1, 300)))
def test_a_shard_is_read_back_as_it_was_written(tmp_path_factory, tokens_N):
    path = tmp_path_factory.getbasetemp() / "shard.bin"
    write_shard(path, tokens_N)
    assert np.array_equal(read_shard(path), tokens_N)
    assert path.stat().st_size == HEADER_BYTES + 2 * len(tokens_N)


@given(st.binary(max_size=3000))
def test_any_file_is_read_as_a_shard_or_refused_by_name(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        read_shard(path)
    head = np.array([MAGIC, 1, len(content) // 2], "<i4").tobytes()
    path.write_bytes(head + content)
    with pytest.raises(UserError, match=r"any\.bin: "):
        read_shard(path)


def test_ids_that_do_not_fit_into_a_shard_are_refused_when_it_is_written(tmp_path):
    with pytest.raises(UserError, match="token ids from 5 to 70000"):
        write_shard(tmp_path / "s.bin", np.array([5, 70000]))
    assert not list(tmp_path.iterdir())


def test_tokens_run_over_the_edges_of_shards(tmp_path):
    shards = write_some(tmp_path, 5, 3, 7)
    whole = [0, 1, 2, 3, 4, 1000, 1001, 1002, *range(2000, 2007)]
    assert shards.total == 15
    for start in range(15):
        for n in range(1, 16 - start):
            assert shards.read(start, n).tolist() == whole[start : start + n]


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "magic":
        data[0] ^= 1
    elif how == "version":
        data[4] = 2
    elif how == "count":
        data[8] ^= 1
    elif how == "truncated":
        data = data[:-2]
    elif how == "odd":
        data = data[:-1]
    elif how == "header cut":
        data = data[:6]
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["magic", "version", "count", "truncated", "odd", "header cut"])
def test_a_damaged_shard_is_refused_by_name_with_what_to_do(tmp_path, how):
    write_some(tmp_path, 3000, 3000)
    damage(tmp_path / "s_000001.bin", how)
    with pytest.raises(UserError, match=r"s_000001\.bin: .*delete it"):
        TokenShards(str(tmp_path / "s_*.bin"))


def header(*ints: int, order: str = "<") -> bytes:
    return np.array([*ints, *[0] * (256 - len(ints))], order + "i4").tobytes()


TOKENS = np.random.default_rng(0).integers(0, 50257, 4000)
FOREIGN = {
    "nanoGPT": (TOKENS.astype("<u2").tobytes(), "uint16 tokens without a header", "<u2"),
    "llm.c 7": (
        header(20240801, 7, 4000) + TOKENS.astype("<u4").tobytes(),
        "uint32",
        "make_shards",
    ),
    "version 3": (
        header(MAGIC, 3, 4000) + TOKENS.astype("<u2").tobytes(),
        "version 3",
        "version 1",
    ),
    "big-endian": (
        header(MAGIC, 1, 4000, order=">") + TOKENS.astype(">u2").tobytes(),
        "big-endian",
        ">u2",
    ),
    "text": ("Çay, süt. ".encode() * 300, "text, not tokens", "scripts/make_shards.py"),
    "gzip": (b"\x1f\x8b\x08" + bytes(300), "gzip", "gunzip"),
    "parquet": (b"PAR1" + bytes(300), "parquet", "make_shards"),
    "zip": (b"PK\x03\x04" + bytes(300), "zip archive", "write_shard"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_shard_is_named_as_what_it_is_with_how_to_convert_it(tmp_path, kind):
    content, what, way = FOREIGN[kind]
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_shard(tmp_path / "x.bin")
    words = str(error.value)
    assert "x.bin: " in words and what in words and way in words and "\n" not in words


@pytest.mark.parametrize("kind", ["nanoGPT", "big-endian", "npy"])
def test_the_conversion_that_is_named_makes_a_shard_of_the_same_tokens(tmp_path, kind):
    path = tmp_path / "x.bin"
    if kind == "npy":
        with open(path, "wb") as file:
            np.save(file, TOKENS)
    else:
        path.write_bytes(FOREIGN[kind][0])
    with pytest.raises(UserError) as error:
        read_shard(path)
    command = str(error.value).split("Convert it: ")[-1].split(" convert it: ")[-1]
    assert command.startswith('python -c "')
    program = command.removeprefix('python -c "').removesuffix('"')
    (tmp_path / "convert.py").write_text(program)
    done = forked.run([tmp_path / "convert.py"], tmp_path, dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(read_shard(tmp_path / "NEW.bin"), TOKENS)


# ----------------------------------------------------------------------------
# Patterns, contents


def test_brackets_in_folders_are_taken_literally_and_in_names_as_patterns(tmp_path):
    folder = tmp_path / "a b [v2]"
    folder.mkdir()
    shards = write_some(folder, 5, 5, 5)
    assert [Path(p).name for p in shards.paths] == [f"s_{i:06d}.bin" for i in range(3)]
    some = TokenShards(str(folder / "s_00000[12].bin"))
    assert [Path(p).name for p in some.paths] == ["s_000001.bin", "s_000002.bin"]
    write_shard(folder / "data [1]_000000.bin", np.arange(3, dtype=np.uint16))
    assert TokenShards(str(folder / "data [1]_*.bin")).total == 3


def test_a_pattern_without_files_says_how_to_get_some(tmp_path):
    with pytest.raises(UserError, match=r"no token shards match .*nope.*cached_fineweb10B\.py"):
        TokenShards(str(tmp_path / "nope_*.bin"))


def test_a_pattern_relative_to_the_working_folder_is_found(tmp_path, monkeypatch):
    write_some(tmp_path, 5, 5)
    monkeypatch.chdir(tmp_path)
    assert TokenShards("s_*.bin").total == TokenShards("./s_00000?.bin").total == 10


def test_content_is_the_same_wherever_the_files_are_and_another_for_other_tokens(tmp_path):
    (tmp_path / "one").mkdir()
    shards = write_some(tmp_path / "one", 300_000, 40)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    moved = TokenShards(str(tmp_path / "moved" / "s_*.bin"))
    assert moved.content == shards.content
    assert [[name, n] for name, n, _ in shards.content] == [
        ["s_000000.bin", 300_000],
        ["s_000001.bin", 40],
    ]
    for position in (0, 150_000, 299_999):
        tokens_N = np.array(shards.read(0, 300_000))
        tokens_N[position] += 1
        write_shard(tmp_path / "moved/s_000000.bin", tokens_N)
        assert TokenShards(moved.pattern).content != shards.content


def test_gaps_in_the_numbering_are_found(tmp_path):
    write_some(tmp_path, 5, 5, 5, 5)
    for i in (1, 2):
        (tmp_path / f"s_{i:06d}.bin").unlink()
    assert TokenShards(str(tmp_path / "s_*.bin")).gaps() == [1, 2]


def test_ids_beyond_the_vocabulary_are_refused_by_name(tmp_path):
    shards = write_some(tmp_path, 50, 60)
    shards.check_ids(1060, ONE)
    with pytest.raises(UserError, match=r"s_000001\.bin: holds token id 1059, VOCAB_SIZE=1059"):
        shards.check_ids(1059, ONE)
    shards.check_ids(1059, ONE, last=50)


def test_an_empty_text_file_is_refused_by_name(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt: is empty"):
        TokenShards([str(tmp_path / "empty.txt")], open_file=read_bytes)
    with pytest.raises(UserError, match=r"nowhere\.txt: cannot be read"):
        TokenShards([str(tmp_path / "nowhere.txt")], open_file=read_bytes)


def test_a_file_that_is_in_training_and_validation_is_refused_by_name(tmp_path):
    train = write_some(tmp_path, 500, 600)
    check_disjoint(train, write_some(tmp_path, 700, name="v"))
    with pytest.raises(UserError, match=r"s_000001\.bin: is training data too"):
        check_disjoint(train, TokenShards(str(tmp_path / "s_000001.bin")))
    (tmp_path / "link.bin").symlink_to(tmp_path / "s_000001.bin")
    with pytest.raises(UserError, match=r"link\.bin: is training data too"):
        check_disjoint(train, TokenShards([str(tmp_path / "link.bin")]))
    shutil.copy(tmp_path / "s_000000.bin", tmp_path / "copy.bin")
    with pytest.raises(UserError, match=r"copy\.bin: is a copy of .*s_000000\.bin"):
        check_disjoint(train, TokenShards([str(tmp_path / "copy.bin")]))


# ----------------------------------------------------------------------------
# Prefetch


def step_tensor(step: int) -> tuple[torch.Tensor]:
    return (torch.tensor([step]),)


def test_batches_come_in_order_and_an_error_reaches_the_trainer():
    def make(step: int) -> tuple[torch.Tensor]:
        if step == 5:
            raise OSError("the disk is gone")
        return step_tensor(step)

    with Prefetch(make, 2, CPU) as batches:
        assert [batches.get(step)[0].item() for step in (2, 3, 4)] == [2, 3, 4]
        with pytest.raises(OSError, match="the disk is gone"):
            batches.get(5)
        with pytest.raises(RuntimeError, match="closed"):
            batches.get(6)


def test_even_an_exit_in_the_thread_reaches_the_trainer():
    with Prefetch(lambda step: sys.exit(3), 0, CPU) as batches, pytest.raises(SystemExit):
        batches.get(0)


def test_get_never_waits_for_a_thread_that_has_gone():
    batches = Prefetch(step_tensor, 0, CPU, depth=1)
    batches.get(0)
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        for step in (1, 2, 3):
            batches.get(step)


def test_close_may_be_called_twice_and_while_a_batch_is_being_made():
    started = threading.Event()

    def slow(step: int) -> tuple[torch.Tensor]:
        started.set()
        time.sleep(0.3)
        return step_tensor(step)

    batches = Prefetch(slow, 0, CPU)
    started.wait()
    batches.close()
    batches.close()
    assert not batches.thread.is_alive()


INTERRUPTED = """
import os, signal, sys, threading, time, torch
from plumbing.data import Prefetch
def stuck(step):
    time.sleep(1000)
batches = Prefetch(stuck, 0, torch.device("cpu"))
try:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    batches.get(0)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_is_heard_while_get_waits(tmp_path):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    done = forked.run([tmp_path / "interrupted.py"], tmp_path, dict(os.environ))
    assert done.stdout == "interrupted\n", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_on_the_gpu_when_they_are_asked_for():
    with Prefetch(step_tensor, 0, torch.device("cuda")) as batches:
        assert batches.get(0)[0].is_cuda and batches.get(1)[0].item() == 1
