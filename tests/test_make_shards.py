"""scripts/make_shards.py: shards hold exactly the text that was given, as documents, or nothing."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import make_shards

from plumbing import texts
from plumbing.data import HEADER_BYTES, read_shard
from plumbing.knobs import ROOT, UserError

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def gpt2_cache(tmp_path: Path, monkeypatch) -> Path:
    """A copy of tiktoken's cache, since tiktoken deletes what it does not like."""
    if not (SHARED / "gpt2_bpe" / "tiktoken_cache").is_dir():
        pytest.skip("needs shared/data/gpt2_bpe, which is no part of the project")
    shutil.copytree(SHARED / "gpt2_bpe" / "tiktoken_cache", tmp_path / "cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(*args: object) -> None:
    make_shards.main([str(a) for a in args])


def stream(folder: Path, side: str) -> np.ndarray:
    return np.concatenate([read_shard(p) for p in sorted(folder.glob(f"*_{side}_*.bin"))])


def parts(tokens: np.ndarray, separator: int) -> list[list[int]]:
    """The documents of a stream, which must begin with a separator."""
    assert tokens[0] == separator
    return [d[1:].tolist() for d in np.split(tokens, np.flatnonzero(tokens == separator))[1:]]


PARAGRAPHS = [f"Paragraph {k}, of the \u00e7ay kind.\nSecond line of {k}." for k in range(200)]


def test_gpt2_shards_hold_exactly_the_reference_ids(tmp_path: Path, gpt2_cache: Path) -> None:
    vectors = json.loads((SHARED / "gpt2_bpe" / "vectors.json").read_text())
    texts = tmp_path / "texts"
    texts.mkdir()
    for k, v in enumerate(vectors):
        (texts / f"{k:02d}.txt").write_text(v["text"], encoding="utf-8", newline="")
    out = tmp_path / "out"
    make(texts, "--tokenizer", "gpt2", "--out", out, "--split", "file", "--val-fraction", "0.3")
    found = sorted(parts(stream(out, "train"), 50256) + parts(stream(out, "val"), 50256))
    assert found == sorted(v["ids"] for v in vectors if v["text"].strip())


def test_gpt2_shards_decode_to_the_text(tmp_path: Path, gpt2_cache: Path) -> None:
    import tiktoken

    (tmp_path / "a.txt").write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    make(tmp_path / "a.txt", "--tokenizer", "gpt2", "--out", tmp_path / "out")
    both = parts(stream(tmp_path / "out", "train"), 50256) + parts(
        stream(tmp_path / "out", "val"), 50256
    )
    assert sorted(tiktoken.get_encoding("gpt2").decode(d) for d in both) == sorted(PARAGRAPHS)


def test_name_of_the_separator_in_a_text_is_plain_text(tmp_path: Path, gpt2_cache: Path) -> None:
    text = "An <|endoftext|> in the middle."
    (tmp_path / "a.txt").write_text("\n\n".join([text, *PARAGRAPHS]), encoding="utf-8")
    make(tmp_path / "a.txt", "--tokenizer", "gpt2", "--out", tmp_path / "out")
    both = parts(stream(tmp_path / "out", "train"), 50256) + parts(
        stream(tmp_path / "out", "val"), 50256
    )
    assert len(both) == 1 + len(PARAGRAPHS)


def test_missing_tokenizer_is_one_error_with_the_way_out(tmp_path: Path, monkeypatch) -> None:
    import tiktoken.registry

    texts.tokenizer.cache_clear()
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # forget what another test loaded
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(
        "https_proxy", "http://127.0.0.1:9"
    )  # nobody listens: no way out of this machine
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
        UserError, match=r"gpt2 tokenizer is not here.*TIKTOKEN_CACHE_DIR.*--tokenizer bytes"
    ):
        make(tmp_path / "a.txt", "--tokenizer", "gpt2", "--out", tmp_path / "out")


def test_byte_shards_hold_the_text_and_equal_documents_stay_on_one_side(tmp_path: Path) -> None:
    text = "\n\n".join(PARAGRAPHS + PARAGRAPHS[:50])
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    make(
        tmp_path / "a.txt",
        "--tokenizer",
        "bytes",
        "--out",
        tmp_path / "out",
        "--val-fraction",
        "0.2",
    )
    train, val = (parts(stream(tmp_path / "out", side), 0) for side in ("train", "val"))
    assert sorted(bytes(d).decode() for d in train + val) == sorted(PARAGRAPHS + PARAGRAPHS[:50])
    assert not {bytes(d) for d in train} & {bytes(d) for d in val}
    assert 25 <= len(val) <= 75


def test_same_text_gives_the_same_shards_cut_at_the_same_length(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    for out in ("one", "two"):
        make(
            tmp_path / "a.txt",
            "--tokenizer",
            "bytes",
            "--out",
            tmp_path / out,
            "--name",
            "x",
            "--shard-tokens",
            1000,
        )
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("one", "two")
    )
    assert one == two and {"x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin"} <= set(
        one
    )
    sizes = [len(one[n]) for n in sorted(one) if "train" in n]
    assert (
        sizes[:-1] == [HEADER_BYTES + 2000] * (len(sizes) - 1) and sizes[-1] < HEADER_BYTES + 2000
    )
    last = capsys.readouterr().out.splitlines()[-1]
    pattern = f"{tmp_path}/two/x"
    assert (
        last
        == f"INPUT_BIN='{pattern}_train_*.bin' INPUT_VAL_BIN='{pattern}_val_*.bin' VOCAB_SIZE=256"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good line\n\nbad \xff line\n", r"a.txt: line 3 is not UTF-8 \(byte 0xff"),
        (b"\x7fELF\x00\x01", "a.txt: line 1 has a zero byte"),
        (b"\n \n", "0 documents in 1 files"),
        (b"only one document", "1 documents in 1 files, none for"),
    ],
)
def test_bad_text_is_one_error_and_leaves_no_shards(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        make(tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_existing_shards_are_never_mixed_with_new_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out_train_000007.bin").touch()
    with pytest.raises(UserError, match=r"already has out_train_000007\.bin"):
        make(tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "out")


def test_lines_that_hold_the_marker_separate_documents(tmp_path: Path, capsys) -> None:
    text = "\n<|endoftext|>\n".join(PARAGRAPHS)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    make(tmp_path / "a.txt", "--tokenizer", "bytes", "--out", out, "--split", "<|endoftext|>")
    both = parts(stream(out, "train"), 0) + parts(stream(out, "val"), 0)
    assert sorted(bytes(d).decode() for d in both) == sorted(PARAGRAPHS)
    assert "stands in" not in capsys.readouterr().out


def test_special_tokens_in_a_text_are_named(tmp_path: Path, capsys) -> None:
    text = "\n\n<|endoftext|>\n\n".join(PARAGRAPHS)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    make(tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "<|endoftext|> stands in 199 documents and was taken as plain text" in said
    assert "--split '<|endoftext|>'" in said


def test_a_byte_order_mark_and_crlf_change_no_shard(tmp_path: Path) -> None:
    text = "\n\n".join(PARAGRAPHS)
    (tmp_path / "unix.txt").write_bytes(text.encode())
    (tmp_path / "windows.txt").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    for kind in ("unix", "windows"):
        out = tmp_path / kind
        make(tmp_path / f"{kind}.txt", "--tokenizer", "bytes", "--out", out, "--name", "x")
    for side in ("train", "val"):
        assert np.array_equal(stream(tmp_path / "unix", side), stream(tmp_path / "windows", side))
