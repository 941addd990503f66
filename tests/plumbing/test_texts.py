"""Texts, their parts, and where they come from: the hub against a loopback server with faults."""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hub_server import Hub, serving

from plumbing import splits, texts
from plumbing.data import TokenShards, read_bytes
from plumbing.hub import hub_fetch, hub_list
from plumbing.knobs import ROOT, UserError
from plumbing.plain_text import read_text
from plumbing.splits import open_byte_files, open_splits, split_files
from plumbing.texts import build_once, embedded_corpus, encoder, text_files

SHARED = ROOT.parent / "shared" / "data"
TURKISH = "Öğle güneşi ışıl ışıl; çay içtik.\nŞimdi İzmir'e gidiyoruz, ağır ağır.\n"

# ----------------------------------------------------------------------------
# One reader


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff")))
def test_utf8_text_is_read_as_it_is_with_or_without_a_byte_order_mark(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "a.txt"
    for content in (text.encode(), text.encode("utf-8-sig")):
        path.write_bytes(content)
        assert read_text(path) == text
    path.write_bytes(text.replace("\n", "\r\n").encode())
    assert read_text(path) == text
    path.write_bytes(text.replace("\n", "\r").encode())
    assert read_text(path) == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            TURKISH.encode("iso-8859-9"),
            r"line 1 is not UTF-8 \(byte 0xd6.*offset 0.*Latin-5.*ISO-8",
        ),
        ("bon été à Liège ".encode("latin-1"), r"offset 4.*Latin-1.*iconv -f ISO-8859-1"),
        ("“quoted” text".encode("cp1252"), r"offset 0.*Windows code page"),
        (TURKISH.encode("utf-16"), r"offset 0\).*looks like UTF-16: .*iconv -f UTF-16 "),
        (TURKISH.encode("utf-16-le"), "UTF-16 without a byte order mark.*UTF-16LE"),
        (TURKISH.encode("utf-16-be"), "UTF-16 without a byte order mark.*UTF-16BE"),
        (b"good\n\nbad \0 line\n", r"line 3 has a zero byte \(at offset 10\).*binary file"),
        (b"\x7fELF\x00\x01\x02" * 50, "a binary file, not text: leave it out"),
        ("çay".encode()[:1], "cut in the middle of a character"),
        (b"a\n" * 2**20 + b"\xff", r"line 1048577 is not UTF-8 \(byte 0xff.*offset 2,097,152"),
    ],
)
def test_what_is_no_utf8_text_is_refused_with_its_place_and_what_it_looks_like(
    tmp_path, content, words
):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt: .*{words}") as error:
        read_text(tmp_path / "a.txt")
    assert "\n" not in str(error.value)


@given(st.binary(max_size=300))
def test_any_bytes_are_text_or_refused_at_the_first_bad_byte(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "b.txt"
    path.write_bytes(content)
    try:
        read_text(path)
        content.decode()
        assert 0 not in content
    except UserError as error:
        bad = content.find(0)
        with contextlib.suppress(UnicodeDecodeError):
            content.decode()
            assert f"offset {bad})" in str(error)


def test_a_parquet_file_without_text_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a\.parquet: expected parquet with a column"):
        read_text(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table(dict(other=["x"])), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: expected parquet with a column"):
        read_text(tmp_path / "b.parquet")


def test_a_folder_of_text_is_its_text_files_in_name_order(tmp_path):
    folder = tmp_path / "books [v2]"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/b.txt").write_text("ğ\n")
    (folder / "a.md").write_text("a")
    (folder / "picture.png").write_bytes(b"no")
    files = text_files(folder)
    assert [Path(p).name for p in files] == ["a.md", "b.txt"]
    stream = TokenShards(files, open_file=read_bytes)
    assert bytes(stream.read(0, stream.total)) == b"a" + "ğ\n".encode()
    assert text_files(folder / "sub/b.txt") == text_files(str(folder / "s*/*.txt")) == files[1:]


def test_no_text_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"no text there.*none of its files ends in"):
        text_files(tmp_path)
    with pytest.raises(UserError, match=r"nowhere: no text there .there is no such file"):
        text_files(tmp_path / "nowhere")


BUILDER = """
import pathlib, sys, time
from plumbing.texts import build_once
def make(aside):
    (aside / "half").write_text("x")
    time.sleep(0.3)
    (aside / "rest").write_text(aside.name)
    print("built", flush=True)
folder = build_once(pathlib.Path(sys.argv[1]) / "made", make)
assert (folder / "rest").exists()
"""


def test_a_folder_is_built_once_by_many_and_whole_or_not_at_all(tmp_path):
    stale = tmp_path / ".made.part"  # of a run that was killed
    stale.mkdir()
    (stale / "old").touch()
    (tmp_path / "builder.py").write_text(BUILDER)
    words = [tmp_path / "builder.py", tmp_path]
    three = [forked.Program(words, tmp_path, dict(os.environ)) for _ in range(3)]
    assert [program.wait() for program in three] == [0, 0, 0]
    assert sorted(program.stdout for program in three) == ["", "", "built\n"]
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["half", "rest"]

    def fails(aside: Path) -> None:
        (aside / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "other", fails)
    assert not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        build_once(tmp_path / "file" / "made", lambda aside: None)


# ----------------------------------------------------------------------------
# The embedded corpus


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> tuple[Path, tuple[str, str, str]]:
    """A data folder with the corpus in it, and where it is. To build it takes seconds, so it is a
    copy of the one that other tests and the demo train on.
    """
    folder = tmp_path_factory.mktemp("data")
    train, _, _ = embedded_corpus(ROOT / "data")
    home = Path(train).parent
    shutil.copytree(home, folder / home.name)
    return folder, embedded_corpus(folder)


def documents(pattern: str) -> list[bytes]:
    """The documents of a byte stream, which must begin with a separator."""
    shards = TokenShards(pattern)
    stream = bytes(shards.read(0, shards.total).astype(np.uint8))
    assert stream[0] == 0
    return stream.split(b"\0")[1:]


def test_the_embedded_corpus_is_the_same_text_in_every_process(tmp_path, embedded):
    folder, (train, val, sha) = embedded
    code = (
        "import pathlib, sys\n"
        "from plumbing.texts import embedded_corpus\n"
        "print(embedded_corpus(pathlib.Path(sys.argv[1]))[2])"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.check_output(line, env=env, text=True).strip() == sha
    home = folder / f"embedded-{sha[:12]}"
    assert (train, val) == (f"{home}/embedded_train_*.bin", f"{home}/embedded_val_*.bin")
    for name in ("embedded_train_000000.bin", "embedded_val_000000.bin"):
        assert (home / name).read_bytes() == (tmp_path / home.name / name).read_bytes()


def test_the_embedded_corpus_has_no_document_on_both_sides_and_the_hash_it_names(embedded):
    _, (train, val, sha) = embedded
    on_train, on_val = set(documents(train)), set(documents(val))
    assert not on_train & on_val
    share = TokenShards(val).total / (TokenShards(val).total + TokenShards(train).total)
    assert TokenShards(train).total > 1_000_000 and 0.03 < share < 0.12
    ordered = sorted(on_train | on_val, key=lambda text: hashlib.sha256(text).digest())
    assert hashlib.sha256(b"".join(b"\0" + text for text in ordered)).hexdigest() == sha


def test_the_embedded_corpus_is_built_once_even_beside_a_torn_note(embedded, monkeypatch):
    folder, first = embedded
    (folder / "embedded-000000000000").mkdir()
    (folder / "embedded-000000000000/made_from.json").write_text('{"sha')
    monkeypatch.setattr(texts, "_python_text", None)  # a second build would fail
    assert embedded_corpus(folder) == first


def test_where_the_checkout_cannot_be_written_the_cache_folder_is_used(
    tmp_path, embedded, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copytree(embedded[0], tmp_path / "flatrun")
    (tmp_path / "in_the_way").touch()
    train, _, sha = embedded_corpus(tmp_path / "in_the_way" / "data")
    assert train.startswith(str(tmp_path / "flatrun")) and sha == embedded[1][2]
    said = capsys.readouterr().err
    assert "cannot be written" in said and said.count("\n") == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "in_the_way"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder that can be written"):
        embedded_corpus(tmp_path / "in_the_way" / "data")


def test_python_without_its_sources_is_one_error(tmp_path, monkeypatch):
    paths = {"stdlib": str(tmp_path / "python311.zip")}
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: paths)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="without its sources"):
        embedded_corpus(tmp_path)


# ----------------------------------------------------------------------------
# Tokenizers


@pytest.fixture
def gpt2_cache(tmp_path, monkeypatch) -> None:
    """A copy of tiktoken's cache, since tiktoken deletes what it does not like."""
    if not (SHARED / "gpt2_bpe" / "tiktoken_cache").is_dir():
        pytest.skip("needs shared/data/gpt2_bpe, which is no part of the project")
    shutil.copytree(SHARED / "gpt2_bpe" / "tiktoken_cache", tmp_path / "cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))


def test_gpt2_gives_the_reference_ids_and_pieces_of_a_long_text_change_none(gpt2_cache):
    import tiktoken

    for vector in json.loads((SHARED / "gpt2_bpe" / "vectors.json").read_text()):
        assert encoder("gpt2")(vector["text"]).tolist() == vector["ids"]
    text = TURKISH * 40_000
    assert len(text) > 2 * 2**20
    whole = tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert encoder("gpt2")(text).tolist() == whole


def test_bytes_are_the_texts_bytes():
    assert bytes(encoder("bytes")(TURKISH).astype(np.uint8)) == TURKISH.encode()


# ----------------------------------------------------------------------------
# Parts


def text_of(split: splits.Split) -> str:
    return bytes(split.shards.read(0, split.shards.total).astype(np.uint8)).decode()


def some_paragraphs(n: int) -> list[str]:
    return [f"Paragraph {i}, of the çay kind.\nSecond line of {i}." for i in range(n)]


def test_text_without_names_is_parted_by_the_hash_of_its_paragraphs(tmp_path):
    whole = some_paragraphs(2000)
    (tmp_path / "book.md").write_text("\n\n".join(whole))
    parts = open_splits(str(tmp_path / "book.md"), "bytes", tmp_path / "data")
    found = {name: text_of(split).strip("\n").split("\n\n") for name, split in parts.items()}
    assert sorted(p for part in found.values() for p in part) == sorted(whole)
    for part, low, high in (("val", 60, 150), ("test", 60, 150)):
        assert low < len(found[part]) < high, "about 5%"
    digests = {hashlib.sha256(p.encode()).digest()[0] for p in found["val"]}
    assert max(digests) < 13, "the rule that the published figures were made with"
    split = parts["val"]
    assert split.bytes == len(text_of(split).encode())
    assert split.words == len(text_of(split).split()) + text_of(split).count("\n")


def test_a_byte_order_mark_and_crlf_change_no_part(tmp_path):
    text = "\n\n".join(some_paragraphs(600))
    (tmp_path / "unix.txt").write_bytes(text.encode())
    (tmp_path / "dos.txt").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    unix, dos = (
        open_splits(str(tmp_path / name), "bytes", tmp_path / "data")
        for name in ("unix.txt", "dos.txt")
    )
    assert {n: text_of(s) for n, s in unix.items()} == {n: text_of(s) for n, s in dos.items()}
    unix, dos = (
        open_byte_files(str(tmp_path / name), tmp_path / "data") for name in ("unix.txt", "dos.txt")
    )
    for a, b in zip(unix[:2], dos[:2], strict=True):
        assert bytes(a.read(0, a.total)) == bytes(b.read(0, b.total))


def write_named(folder: Path) -> None:
    folder.mkdir()
    for name in ("train", "val", "test"):
        (folder / f"{name}.txt").write_text(f"{name} text, which is long enough\n" * 9)


def test_files_that_say_what_they_are_for_are_taken_at_their_word(tmp_path):
    write_named(tmp_path / "set")
    parts = open_splits(str(tmp_path / "set"), "bytes", tmp_path / "data")
    for name, split in parts.items():
        assert text_of(split) == f"{name} text, which is long enough\n" * 9
    for data in (tmp_path / "set", tmp_path / "set/train.txt", tmp_path / "set/*.txt"):
        train, val = split_files(str(data), tmp_path / "data")
        assert [Path(p).name for p in (*train, *val)] == ["train.txt", "val.txt"]


def test_validation_text_that_is_the_training_text_is_refused(tmp_path):
    write_named(tmp_path / "set")
    shutil.copy(tmp_path / "set/train.txt", tmp_path / "set/val.txt")
    with pytest.raises(UserError, match=r"val\.txt: is a copy of .*train\.txt"):
        open_byte_files(str(tmp_path / "set"), tmp_path / "data")
    with pytest.raises(
        UserError, match=r"set/val\.txt: its text is training data too .*set/train\.txt"
    ):
        open_splits(str(tmp_path / "set"), "bytes", tmp_path / "data")


def test_of_one_file_5_percent_of_the_pieces_are_validation_and_nothing_is_lost(tmp_path):
    text = "\n\n".join(some_paragraphs(4000)).encode()
    (tmp_path / "book.md").write_bytes(text)
    train, val, _ = open_byte_files(str(tmp_path / "book.md"), tmp_path / "data")
    both = [bytes(shards.read(0, shards.total)) for shards in (train, val)]
    assert 0.04 < len(both[1]) / len(text) < 0.06
    pieces = sorted(p for part in both for p in part.split(b"\n\n") if p)
    assert pieces == sorted(p for p in text.split(b"\n\n"))


@pytest.mark.parametrize("encoding", ["utf-16", "iso-8859-9"])
def test_text_in_another_encoding_is_trained_on_by_nobody(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes((TURKISH * 500).encode(encoding))
    with pytest.raises(UserError, match=r"a\.txt: line 1 is not UTF-8"):
        open_splits(str(tmp_path / "a.txt"), "bytes", tmp_path / "data")
    with pytest.raises(UserError, match=r"a\.txt: line 1 is not UTF-8"):
        open_byte_files(str(tmp_path / "a.txt"), tmp_path / "data")
    write_named(tmp_path / "set")
    (tmp_path / "set/val.txt").write_bytes(TURKISH.encode(encoding))
    with pytest.raises(UserError, match=r"val\.txt: line 1 is not UTF-8"):
        open_byte_files(str(tmp_path / "set"), tmp_path / "data")


def test_text_that_is_too_short_or_unknown_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("one paragraph")
    with pytest.raises(UserError, match="nothing is left for"):
        open_splits(str(tmp_path / "a.txt"), "bytes", tmp_path / "data")
    with pytest.raises(UserError, match="its validation part has"):
        open_byte_files(str(tmp_path / "a.txt"), tmp_path / "data", least=4000)
    with pytest.raises(UserError, match="DATA=wikitext-3: neither wikitext-2"):
        open_splits("wikitext-3", "bytes", tmp_path / "data")
    (tmp_path / "b.txt").touch()
    with pytest.raises(UserError, match=r"b\.txt: an empty file"):
        open_byte_files(str(tmp_path / "b.txt"), tmp_path / "data")


def test_the_embedded_corpus_is_train_and_two_halves_of_val(tmp_path, embedded):
    folder, (train, val, sha) = embedded
    parts = open_splits("embedded", "bytes", folder)
    halves = text_of(parts["val"]) + text_of(parts["test"])
    assert halves.encode() == b"".join(b"\0" + text for text in documents(val))
    assert abs(len(text_of(parts["val"])) / len(halves) - 0.5) < 0.1
    assert parts["train"].shards.total == TokenShards(train).total
    assert open_byte_files("embedded", folder)[2] == sha


# ----------------------------------------------------------------------------
# The hub

PAGES = {
    "20231101.tr/train-00000.parquet": b"a" * 50_000,
    "20231101.tr/train-00001.parquet": b"b" * 9000,
    "20231101.en/train-00000.parquet": b"c" * 100,
}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    with serving(PAGES, tmp_path / "hf", monkeypatch) as server:
        server.repo = "wiki/pedia"
        yield server


def test_files_of_a_dataset_are_listed_by_their_beginning(hub):
    assert hub_list("wiki/pedia", "20231101.tr/") == sorted(PAGES)[1:]
    with pytest.raises(UserError, match=r"none of its 3 files starts with '20231101.xx/'"):
        hub_list("wiki/pedia", "20231101.xx/")


def test_a_fetched_file_is_the_hubs_after_a_cut_and_a_wrong_byte(hub, tmp_path):
    name = sorted(PAGES)[1]
    hub.faults[name] = ["cut", "flip"]
    hub_fetch("wiki/pedia", name, tmp_path / "tr" / "0.parquet")
    assert (tmp_path / "tr/0.parquet").read_bytes() == PAGES[name]


def test_what_the_hub_has_not_is_one_error(hub, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.parquet: the hub has no such file \(HTTP 404\)"):
        hub_fetch("wiki/pedia", "nothing.parquet", tmp_path / "x")
    with pytest.raises(UserError, match=r"dataset wiki/other: the hub has no such file .HTTP 404"):
        hub_list("wiki/other")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_access_says_so_and_names_the_token(hub, tmp_path, status):
    name = sorted(PAGES)[1]
    hub.refusals[name] = status
    with pytest.raises(UserError, match=rf"access was refused \(HTTP {status}\); set HF_TOKEN"):
        hub_fetch("wiki/pedia", name, tmp_path / "x")
    assert not (tmp_path / "x").exists()


LISTING = """
import sys
from plumbing import hub
from plumbing.knobs import UserError
hub.time.sleep = lambda s: None
try:
    hub.hub_list("wiki/pedia")
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "value"), [("ALL_PROXY", "socks5://127.0.0.1:9"), ("http_proxy", "nonsense://x")]
)
def test_a_proxy_that_cannot_be_used_is_one_line_that_names_it(hub, name, value, tmp_path):
    if name == "ALL_PROXY" and importlib.util.find_spec("socksio"):
        pytest.skip("socksio is installed, so this proxy can be used")
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": hub.url, name: value}
    (tmp_path / "listing.py").write_text(LISTING)
    done = forked.run([tmp_path / "listing.py"], tmp_path, env)
    assert done.stdout.count("\n") == 1 and f"{name}={value}" in done.stdout, done.stderr
    assert "the proxy of the environment cannot be used" in done.stdout


def parquet_of(rows: list[str]) -> bytes:
    """The bytes of a parquet file with a column of text, as the hub's datasets are stored."""
    table = pyarrow.table(dict(id=list(map(str, range(len(rows)))), text=rows))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, row_group_size=100)
    return sink.getvalue().to_pybytes()


def test_a_wikipedia_is_downloaded_cleaned_and_parted_by_article_once(hub, tmp_path):
    articles = [
        f"Madde {i} [{i}]\n\n" + f"Gu\u0308neş {i} <b>doğar</b>.  " * 80 for i in range(600)
    ]
    names = [f"20231101.tr/train-0000{i}-of-00002.parquet" for i in range(2)]
    hub.repo = "wikimedia/wikipedia"
    hub.files = {
        names[0]: parquet_of(articles[:350]),
        names[1]: parquet_of([*articles[350:], "short"]),
        "20231101.en/train-00000-of-00001.parquet": b"another language",
    }
    hub.faults[names[1]] = ["cut"]
    train, val, _ = open_byte_files("wikipedia:tr", tmp_path)
    home = tmp_path / "wikipedia-20231101.tr"
    whole = {part: (home / f"{part}.txt").read_text() for part in ("train", "val", "test")}
    found = sorted(a for text in whole.values() for a in text.split("\n\n") if a)
    assert found == sorted(
        f"Madde {i}\n" + " ".join([f"Güneş {i} doğar."] * 80) for i in range(600)
    )
    assert train.total == len(whole["train"].encode()) > 90 * val.total > 0
    assert len(hub.gets) == 3, "two files, one of them twice"
    open_byte_files("wikipedia:tr", tmp_path)
    assert len(hub.gets) == 3
    with pytest.raises(UserError, match="expected a language code"):
        open_byte_files("wikipedia:../tr", tmp_path)


def test_wikitext_is_downloaded_and_its_three_parts_are_the_hubs_rows(hub, tmp_path):
    rows = dict(
        train=["", " = Valkyria = \n", "", " The game @-@ was <unk> . \n"],
        validation=["", " = B = \n"],
        test=[" = C = \n", " c . \n"],
    )
    hub.repo = "Salesforce/wikitext"
    hub.files = {
        f"wikitext-2-raw-v1/{part}-00000-of-00001.parquet": parquet_of(lines)
        for part, lines in rows.items()
    }
    with pytest.raises(splits.NotFetched, match="a run downloads it"):
        open_splits("wikitext-2", "bytes", tmp_path / "data", download=False)
    parts = open_splits("wikitext-2", "bytes", tmp_path / "data")
    assert text_of(parts["train"]) == " \n = Valkyria = \n \n The game @-@ was <unk> . \n"
    assert text_of(parts["val"]) == " \n = B = \n"
    assert text_of(parts["test"]) == " = C = \n c . \n"
    assert parts["train"].words == 9 + 4, "words, and a word per line end"
    assert len(hub.gets) == 3
    open_splits("wikitext-2", "bytes", tmp_path / "data")
    assert len(hub.gets) == 3


def write_parts_of(folder: Path, **texts: str) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name.replace('_', '.')}.txt").write_text(text)
    return folder


def sentences(word: str) -> str:
    return "\n\n".join(f"the {word} dog saw cat number {i}" for i in range(300)) + "\n"


LEAKS = {
    "validation is test": dict(valid="red", test="red"),
    "training is validation": dict(valid="blue", test="red"),
    "training is test": dict(valid="red", test="blue"),
    "validation is a further training file": dict(valid="red", test="old", b_train="red"),
    "test is a further training file": dict(valid="red", test="old", b_train="old"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_text_in_two_parts_is_refused_by_name(tmp_path, name):
    texts = {part: sentences(word) for part, word in LEAKS[name].items()}
    folder = write_parts_of(tmp_path / "text", train=sentences("blue"), **texts)
    with pytest.raises(UserError, match=r"text/.*txt: its text is \w+ data too \(in .*text/"):
        open_splits(str(folder), "bytes", tmp_path / "data")
    assert not list((tmp_path / "data").glob("text-*"))


def test_a_test_text_that_is_a_piece_of_the_training_text_is_refused(tmp_path):
    train = sentences("blue") + sentences("red").replace("\n", "\r\n")
    parts = dict(train=train, valid=sentences("old"), test=sentences("red"))
    folder = write_parts_of(tmp_path / "text", **parts)
    with pytest.raises(UserError, match=r"test.txt: its text is training data too"):
        open_splits(str(folder), "bytes", tmp_path / "data")


def test_different_texts_in_three_parts_are_taken(tmp_path):
    parts = dict(train=sentences("blue"), valid=sentences("old"), test=sentences("red"))
    folder = write_parts_of(tmp_path / "text", **parts)
    splits = open_splits(str(folder), "bytes", tmp_path / "data")
    assert {part: split.bytes for part, split in splits.items()} == {
        "train": len(parts["train"]),
        "val": len(parts["valid"]),
        "test": len(parts["test"]),
    }
