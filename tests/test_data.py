"""Where tokens come from: the download against a loopback hub with faults, own text, the embedded corpus."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import make_shards
from hub_server import Hub

import cached_fineweb10B
import plumbing
import train_gpu
import train_scaled
from plumbing import HEADER_BYTES, MAGIC, UserError, read_shard

ROOT = Path(__file__).resolve().parents[1]

SHARED = ROOT.parent / "shared" / "data"
VAL, TRAIN_1, TRAIN_2 = (
    "fineweb_val_000000.bin",
    "fineweb_train_000001.bin",
    "fineweb_train_000002.bin",
)


def shard_bytes(num_tokens: int, seed: int) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, 1, num_tokens
    tokens = np.random.default_rng(seed).integers(0, 50257, num_tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


FILES = {
    VAL: shard_bytes(30_000, 0),
    TRAIN_1: shard_bytes(50_000, 1),
    TRAIN_2: shard_bytes(7_000, 2),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with FILES that this process's huggingface_hub talks to, and no waits between attempts."""
    with Hub(dict(FILES)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(
            huggingface_hub.file_download.time, "sleep", lambda s: None
        )  # the whole module's
        yield server


def download(folder: Path, *args: str) -> None:
    cached_fineweb10B.main([*args, "--dir", str(folder)])


def on_hub(folder: Path, *names: str) -> bool:
    """Exactly these shards are in the folder, byte for byte the hub's, and nothing half done beside them."""
    found = sorted(p.name for p in folder.iterdir() if p.name not in (".lock", "checked.json"))
    return found == sorted(names) and all((folder / n).read_bytes() == FILES[n] for n in names)


# ----------------------------------------------------------------------------
# The download


def test_full_download_through_the_command_line_is_the_hubs_bytes_and_rerun_fetches_nothing(
    hub: Hub, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        str(ROOT / "cached_fineweb10B.py"),
        "2",
        "--dir",
        str(tmp_path / "fw"),
    ]
    env = dict(os.environ, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert on_hub(tmp_path / "fw", VAL, TRAIN_1, TRAIN_2)
    assert sorted(hub.gets) == sorted([VAL, TRAIN_1, TRAIN_2])
    assert "57,000 training and 30,000 validation tokens" in done.stdout

    hub.files.clear()  # a hub that knows nothing: the rerun must not need it
    download(tmp_path / "fw", "2")
    assert len(hub.gets) == 3


def test_two_downloads_at_once_fetch_every_shard_once(hub: Hub, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "cached_fineweb10B.py"),
        "2",
        "--dir",
        str(tmp_path / "fw"),
    ]
    env = dict(os.environ, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    both = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert on_hub(tmp_path / "fw", VAL, TRAIN_1, TRAIN_2) and len(hub.gets) == 3


def test_dropped_connection_is_survived(hub: Hub, tmp_path: Path) -> None:
    hub.faults[TRAIN_1] = ["cut"]
    download(tmp_path, "1")
    assert on_hub(tmp_path, VAL, TRAIN_1) and hub.gets.count(TRAIN_1) == 2


def test_connection_that_always_drops_leaves_no_shard_and_the_next_run_goes_on(
    hub: Hub, tmp_path: Path
) -> None:
    hub.faults[TRAIN_1 + "!"] = "cut"
    with pytest.raises(UserError, match=f"{TRAIN_1}.*no answer, or a broken one"):
        download(tmp_path, "1")
    assert on_hub(tmp_path, VAL)
    hub.faults.clear()
    download(tmp_path, "1")
    assert on_hub(tmp_path, VAL, TRAIN_1) and hub.gets.count(VAL) == 1


def test_interrupted_download_leaves_no_shard_behind(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    def ctrl_c(*args: object, **kwargs: object) -> None:
        Path(kwargs["local_dir"]).mkdir()
        (Path(kwargs["local_dir"]) / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(huggingface_hub, "hf_hub_download", ctrl_c)
        download(tmp_path, "1")
    assert on_hub(tmp_path)
    download(tmp_path, "1")
    assert on_hub(tmp_path, VAL, TRAIN_1)


def test_truncated_shard_is_named_and_fetched_again(hub: Hub, tmp_path: Path, capsys) -> None:
    download(tmp_path, "1")
    os.truncate(tmp_path / TRAIN_1, 60_000)
    download(tmp_path, "1")
    out = capsys.readouterr().out
    assert f"{TRAIN_1}: will be fetched again" in out and "60,000" in out
    assert (
        on_hub(tmp_path, VAL, TRAIN_1) and hub.gets.count(TRAIN_1) == 2 and hub.gets.count(VAL) == 1
    )


def test_damaged_header_is_found_without_verify_though_name_and_length_are_right(
    hub: Hub, tmp_path: Path
) -> None:
    download(tmp_path, "1")
    with open(tmp_path / TRAIN_1, "rb+") as f:
        f.write(b"\0\0\0\0")
    download(tmp_path, "1")
    assert on_hub(tmp_path, VAL, TRAIN_1) and hub.gets.count(TRAIN_1) == 2


def test_file_of_another_format_is_not_trusted_by_its_name(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / TRAIN_1).write_bytes(b"<html>please log in</html>")
    download(tmp_path, "1")
    assert on_hub(tmp_path, VAL, TRAIN_1)


def test_wrong_byte_of_right_size_is_caught_by_its_hash_and_fetched_again(
    hub: Hub, tmp_path: Path, capsys
) -> None:
    hub.faults[TRAIN_1] = ["flip"]
    download(tmp_path, "1")
    assert on_hub(tmp_path, VAL, TRAIN_1) and hub.gets.count(TRAIN_1) == 2
    assert "right length, wrong bytes" in capsys.readouterr().out


def test_bytes_that_stay_wrong_are_one_error_after_three_downloads(
    hub: Hub, tmp_path: Path
) -> None:
    hub.faults[TRAIN_1 + "!"] = "flip"
    with pytest.raises(UserError, match=f"{TRAIN_1}: 3 downloads were all bad.*SHA-256"):
        download(tmp_path, "1")
    assert on_hub(tmp_path, VAL) and hub.gets.count(TRAIN_1) == 3


def test_verify_finds_a_byte_that_changed_on_disk(hub: Hub, tmp_path: Path) -> None:
    download(tmp_path, "1")
    with open(tmp_path / TRAIN_1, "rb+") as f:
        f.seek(5000)
        f.write(b"\xff\xff")
    download(tmp_path, "1", "--verify")
    assert on_hub(tmp_path, VAL, TRAIN_1) and hub.gets.count(TRAIN_1) == 2


def test_shards_copied_by_hand_are_hashed_once_and_not_fetched(hub: Hub, tmp_path: Path) -> None:
    for name in (VAL, TRAIN_1):
        (tmp_path / name).write_bytes(FILES[name])
    (tmp_path / TRAIN_2).write_bytes(FILES[TRAIN_2][:-1] + b"\xee")
    download(tmp_path, "2")
    assert on_hub(tmp_path, VAL, TRAIN_1, TRAIN_2) and hub.gets == [TRAIN_2]


def test_shard_missing_on_the_hub_is_one_error_naming_it(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"fineweb_train_000003\.bin: the hub has no such file.*HTTP 404"
    ):
        download(tmp_path, "3")
    assert not hub.gets  # known before the first byte is fetched


def test_no_hub_is_one_line_naming_it_and_the_ways_out(tmp_path: Path) -> None:
    with Hub({}) as closed:
        url = closed.url
    command = [
        sys.executable,
        str(ROOT / "cached_fineweb10B.py"),
        "1",
        "--dir",
        str(tmp_path / "fw"),
    ]
    env = dict(os.environ, HF_ENDPOINT=url, HF_HOME=str(tmp_path / "hf"))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cached_fineweb10B.py: error: ") and url in last and VAL in last
    assert all(way in last for way in ("HF_ENDPOINT", "by hand", "PRESET=demo"))


def test_no_hub_deletes_no_shard(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    download(tmp_path, "1")
    os.truncate(tmp_path / TRAIN_1, 60_000)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="OfflineModeIsEnabled"):
        download(tmp_path, "1")
    assert (tmp_path / TRAIN_1).stat().st_size == 60_000


def test_full_disk_is_refused_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch
) -> None:
    need = sum(len(FILES[n]) for n in (VAL, TRAIN_1))
    usage = lambda path: shutil._ntuple_diskusage(10**12, 10**12, need - 1)
    monkeypatch.setattr(cached_fineweb10B.shutil, "disk_usage", usage)
    with pytest.raises(
        UserError, match=f"2 shards to fetch take {need:,} bytes, {need - 1:,} are free"
    ):
        download(tmp_path, "1")
    assert not hub.gets


def test_disk_full_half_way_is_one_error_without_a_second_attempt(
    hub: Hub, tmp_path: Path, monkeypatch
) -> None:
    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_space)
    monkeypatch.setattr(plumbing, "ATTEMPTS", 10**9)
    with pytest.raises(UserError, match=r"cannot be written.*No space left"):
        download(tmp_path, "1")


@pytest.mark.parametrize("n", ["0", "104", "-1"])
def test_number_of_shards_out_of_range_is_refused(hub: Hub, tmp_path: Path, n: str) -> None:
    with pytest.raises(UserError, match=f"N={n}: the dataset has 1 to 103"):
        download(tmp_path / "fw", n)
    assert not (tmp_path / "fw").exists()


# ----------------------------------------------------------------------------
# --small

SMALL = ("--small", "--small-train-tokens", "4000", "--small-val-tokens", "2001")
SMALL_BYTES = 2 * HEADER_BYTES + 2 * (4000 + 2001)


def test_small_fetches_the_start_of_two_shards_and_no_more(hub: Hub, tmp_path: Path) -> None:
    download(tmp_path, *SMALL)
    for name, num_tokens in ((TRAIN_1, 4000), (VAL, 2001)):
        whole = np.frombuffer(FILES[name], "<u2", offset=HEADER_BYTES)
        assert np.array_equal(read_shard(tmp_path / name), whole[:num_tokens])
    assert hub.sent == SMALL_BYTES
    download(tmp_path, *SMALL)
    assert hub.sent == SMALL_BYTES  # nothing fetched twice


def test_full_download_replaces_small_shards(hub: Hub, tmp_path: Path, capsys) -> None:
    download(tmp_path, *SMALL)
    download(tmp_path, "2")
    assert on_hub(tmp_path, VAL, TRAIN_1, TRAIN_2)
    assert f"{TRAIN_1}: will be fetched again" in capsys.readouterr().out
    hub.gets.clear()
    download(tmp_path, *SMALL)
    assert (
        on_hub(tmp_path, VAL, TRAIN_1, TRAIN_2) and not hub.gets
    )  # and small never cuts a whole one


def test_small_shards_stay_usable_until_the_full_ones_are_there(hub: Hub, tmp_path: Path) -> None:
    download(tmp_path, *SMALL)
    hub.faults[TRAIN_1 + "!"] = "flip"
    with pytest.raises(UserError):
        download(tmp_path, "1")
    assert len(read_shard(tmp_path / TRAIN_1)) == 4000


def test_small_survives_a_cut_and_a_server_that_ignores_ranges(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {VAL: ["cut"], TRAIN_1: ["no_range"]}
    download(tmp_path, *SMALL)
    assert len(read_shard(tmp_path / VAL)) == 2001 and len(read_shard(tmp_path / TRAIN_1)) == 4000


def test_small_asking_for_more_than_a_shard_has_gets_all_of_it_once(
    hub: Hub, tmp_path: Path
) -> None:
    for _ in range(2):
        download(tmp_path, "--small", "--small-train-tokens", "999999")
    assert on_hub(tmp_path, VAL, TRAIN_1) and len(hub.gets) == 2


# ----------------------------------------------------------------------------
# Files of any dataset

PAGES = {
    "20231101.tr/train-00000.parquet": b"a" * 50_000,
    "20231101.tr/train-00001.parquet": b"b" * 9000,
}
PAGES |= {"20231101.en/train-00000.parquet": b"c" * 100}


@pytest.fixture
def pages(hub: Hub) -> Hub:
    hub.files, hub.repo = dict(PAGES), "wiki/pedia"
    return hub


def test_files_of_a_dataset_are_listed_by_their_beginning(pages: Hub) -> None:
    assert plumbing.hub_list("wiki/pedia", "20231101.tr/") == sorted(PAGES)[1:]
    with pytest.raises(UserError, match=r"none of its 3 files starts with '20231101.xx/'"):
        plumbing.hub_list("wiki/pedia", "20231101.xx/")


def test_a_fetched_file_is_the_hubs_after_a_cut_and_a_wrong_byte(
    pages: Hub, tmp_path: Path
) -> None:
    name = sorted(PAGES)[1]
    pages.faults[name] = ["cut", "flip"]
    plumbing.hub_fetch("wiki/pedia", name, tmp_path / "tr" / "0.parquet")
    assert (tmp_path / "tr/0.parquet").read_bytes() == PAGES[name]


def test_what_the_hub_has_not_is_one_error(pages: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.parquet: the hub has no such file \(HTTP 404\)"):
        plumbing.hub_fetch("wiki/pedia", "nothing.parquet", tmp_path / "x")
    with pytest.raises(
        UserError, match=r"dataset wiki/other: the hub has no such file \(HTTP 404\)"
    ):
        plumbing.hub_list("wiki/other")
    assert not (tmp_path / "x").exists()


def parquet_of(rows: list[str]) -> bytes:
    """The bytes of a parquet file with a column of text, as the hub's datasets are stored."""
    table = pyarrow.table(dict(id=list(map(str, range(len(rows)))), text=rows))
    pyarrow.parquet.write_table(table, sink := pyarrow.BufferOutputStream(), row_group_size=100)
    return sink.getvalue().to_pybytes()


def test_a_wikipedia_is_downloaded_cleaned_and_split_by_article_once(
    hub: Hub, tmp_path: Path, monkeypatch
) -> None:
    articles = [
        f"Madde {i} [{i}]\n\n" + f"Gu\u0308neş {i} <b>doğar</b>.  " * 80 for i in range(600)
    ]
    files = {"00000": articles[:350], "00001": [*articles[350:], "short"]}
    hub.repo, names = (
        "wikimedia/wikipedia",
        {n: f"20231101.tr/train-{n}-of-00002.parquet" for n in files},
    )
    hub.files = {names[n]: parquet_of(rows) for n, rows in files.items()}
    hub.files["20231101.en/train-00000-of-00001.parquet"] = b"another language"
    hub.faults[names["00001"]] = ["cut"]
    monkeypatch.setattr(train_scaled, "HERE", tmp_path)
    k = train_scaled.Knobs(data="wikipedia:tr")
    train, val, _ = train_scaled.open_data(k)
    texts = {
        part: (tmp_path / f"data/wikipedia-20231101.tr/{part}.txt").read_text()
        for part in ("train", "val", "test")
    }
    found = [a for text in texts.values() for a in text.split("\n\n") if a]
    assert sorted(found) == sorted(
        f"Madde {i}\n" + " ".join([f"Güneş {i} doğar."] * 80) for i in range(600)
    )
    assert train.total == len(texts["train"].encode()) > 90 * val.total > 0
    asked = len(hub.gets)
    assert train_scaled.open_data(k)[0].total == train.total and len(hub.gets) == asked == 3, (
        "two files, one of them twice"
    )


def test_wikitext_is_downloaded_and_its_three_splits_are_the_hubs_rows(
    hub: Hub, tmp_path: Path
) -> None:
    rows = dict(
        train=["", " = Valkyria = \n", "", " The game @-@ was <unk> . \n"],
        validation=["", " = B = \n"],
    )
    rows["test"] = [" = C = \n", " c . \n"]
    hub.repo = "Salesforce/wikitext"
    hub.files = {
        f"wikitext-2-raw-v1/{part}-00000-of-00001.parquet": parquet_of(text)
        for part, text in rows.items()
    }
    k = train_gpu.Knobs(dataset="wikitext-2", tokenizer="bytes", data_folder=str(tmp_path / "data"))
    splits = train_gpu.open_text(k)
    text = {
        part: bytes(s.shards.read(0, s.shards.total).astype(np.uint8)).decode()
        for part, s in splits.items()
    }
    assert text["train"] == " \n = Valkyria = \n \n The game @-@ was <unk> . \n"
    assert (text["val"], text["test"]) == (" \n = B = \n", " = C = \n c . \n")
    assert (splits["train"].words, splits["train"].bytes) == (9 + 4, len(text["train"])), (
        "words, and a word per line end"
    )
    asked = len(hub.gets)
    assert train_gpu.open_text(k).keys() == splits.keys() and len(hub.gets) == asked == 3


# ----------------------------------------------------------------------------
# Text files as bytes


def test_a_folder_of_text_is_one_stream_of_its_bytes_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.txt").write_bytes("ğ\n".encode())
    (tmp_path / "a.md").write_bytes(b"\xff\x00a")
    (tmp_path / "picture.png").write_bytes(b"no")
    files = plumbing.text_files(tmp_path)
    stream = plumbing.TokenShards(files, open_file=plumbing.read_bytes)
    assert bytes(stream.read(0, stream.total)) == b"\xff\x00a" + "ğ\n".encode()
    assert bytes(stream.read(2, 2)) == b"a\xc4"
    assert (
        plumbing.text_files(tmp_path / "sub/b.txt")
        == plumbing.text_files(str(tmp_path / "s*/*.txt"))
        == files[1:]
    )


def test_no_text_and_empty_text_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no text there.*none of its files ends in"):
        plumbing.text_files(tmp_path)
    with pytest.raises(UserError, match=r"nowhere: no text there .there is no such file"):
        plumbing.text_files(tmp_path / "nowhere")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty.txt: is empty"):
        plumbing.TokenShards([str(tmp_path / "empty.txt")], open_file=plumbing.read_bytes)


def test_a_folder_is_built_once_by_many_and_whole_or_not_at_all(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; sys.path.insert(0, sys.argv[2]); import plumbing\n"
        "def make(aside):\n"
        "    (aside / 'half').write_text('x'); time.sleep(0.3); (aside / 'rest').write_text(aside.name)\n"
        "    print('built', flush=True)\n"
        "folder = plumbing.build_once(pathlib.Path(sys.argv[1]) / 'made', make)\n"
        "assert (folder / 'rest').exists()"
    )
    stale = tmp_path / ".made.part"  # of a run that was killed
    stale.mkdir()
    (stale / "old").touch()
    command = [sys.executable, "-c", code, str(tmp_path), str(ROOT)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(p.communicate()[0] for p in both) == ["", "", "built\n"] and not any(
        p.returncode for p in both
    )
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["half", "rest"]

    def fails(aside: Path) -> None:
        (aside / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plumbing.build_once(tmp_path / "other", fails)
    assert not (tmp_path / "other").exists()


# ----------------------------------------------------------------------------
# Own text


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


# ----------------------------------------------------------------------------
# The embedded corpus


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, str, str]]:
    """A data folder with the corpus in it, and what building it returned."""
    folder = tmp_path_factory.mktemp("data")
    return folder, plumbing.embedded_corpus(folder)


def embedded_sha(folder: Path, hash_seed: str) -> str:
    code = "import pathlib, plumbing, sys; print(plumbing.embedded_corpus(pathlib.Path(sys.argv[1]))[2])"
    env = dict(os.environ, PYTHONHASHSEED=hash_seed, PYTHONPATH=str(ROOT))
    return subprocess.check_output(
        [sys.executable, "-c", code, str(folder)], env=env, text=True
    ).strip()


def test_embedded_corpus_is_the_same_text_in_every_process(tmp_path: Path, embedded) -> None:
    folder, (train, val, sha) = embedded
    assert embedded_sha(tmp_path, "7") == sha
    home = folder / f"embedded-{sha[:12]}"
    assert (train, val) == (f"{home}/embedded_train_*.bin", f"{home}/embedded_val_*.bin")
    twin = tmp_path / home.name
    for name in ("embedded_train_000000.bin", "embedded_val_000000.bin"):
        assert (home / name).read_bytes() == (twin / name).read_bytes()


def test_embedded_corpus_has_no_document_on_both_sides_and_the_hash_it_names(embedded) -> None:
    folder, (_, _, sha) = embedded
    home = folder / f"embedded-{sha[:12]}"
    docs = {side: {bytes(d) for d in parts(stream(home, side), 0)} for side in ("train", "val")}
    assert not docs["train"] & docs["val"]
    total = sum(len(stream(home, side)) for side in docs)
    assert total > 1_000_000 and 0.03 < len(stream(home, "val")) / total < 0.12
    rebuilt = b"".join(
        b"\0" + d
        for d in sorted(docs["train"] | docs["val"], key=lambda d: hashlib.sha256(d).digest())
    )
    assert hashlib.sha256(rebuilt).hexdigest() == sha


def test_embedded_corpus_is_built_once(embedded, monkeypatch) -> None:
    folder, first = embedded
    monkeypatch.setattr(plumbing, "_python_text", None)  # a second build would fail
    assert plumbing.embedded_corpus(folder) == first


def test_python_without_its_sources_is_one_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        plumbing.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")}
    )
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="without its sources"):
        plumbing.embedded_corpus(tmp_path)
