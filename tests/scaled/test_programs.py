"""What the proof programs of train_scaled.py promise: the hidden thing is out of the windows'
reach, the controls are
what they say, the numbers add up. Tiny models; nothing is learned here."""

import csv
import dataclasses
import json
import lzma
import math

import bench_scaled
import byte_models as lib
import curriculum_intelligence as intelligence
import mqar
import numpy as np
import position_curve
import pytest
import recall_fixed as recall
import sample
import torch

from plumbing import UserError
from train_scaled import PATCH, ByteLM, ByteMemory

TEXT = ("Bir varmış bir yokmuş, evvel zaman içinde kalbur saman içinde. " * 300).encode()


def tiny(seed: int = 1, **changes: object) -> ByteLM:
    k = dataclasses.replace(lib.rean_embd_knobs(["n_embd=16", "window=3"]), **changes)
    model = ByteLM(k)
    model.init_weights(seed)
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    """A tiny model, one without memory and one of full attention, as files."""
    folder, out = tmp_path_factory.mktemp("weights"), {}
    own = dict(
        full={},
        window=dict(memory="off"),
        attention=dict(memory="off", window=None, sequence_length=256),
    )
    for name, changes in own.items():
        out[name] = str(folder / f"{name}.pth")
        recall.save(tiny(**changes), folder / f"{name}.pth")
    (folder / "text.txt").write_bytes(TEXT[:5001])
    return out | dict(text=str(folder / "text.txt"))


def read_csv(path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as f:
        return list(csv.DictReader(f))


# ---- reach


@pytest.mark.parametrize("n_layer, window", [(1, 2), (2, 3), (3, 5), (1, 3)])
def test_no_byte_beyond_reach_moves_a_window_only_model_and_the_nearest_within_does(
    n_layer, window
):
    model, T = tiny(memory="off", n_layer=n_layer, window=window), 96
    x = torch.randint(256, (1, T), generator=torch.Generator().manual_seed(0))
    moved = set()
    with torch.no_grad():
        whole = model.logits(x[:, :-PATCH], x[:, PATCH:])[0][
            0, -PATCH:
        ]  # of the last patch's four bytes
        for at in range(T - PATCH):
            other = x.clone()
            other[0, at] = (other[0, at] + 101) % 256
            if not torch.equal(
                model.logits(other[:, :-PATCH], other[:, PATCH:])[0][0, -PATCH:], whole
            ):
                moved.add(at)
    answer = T - PATCH
    for at in range(T - PATCH):
        assert lib.beyond(at, answer, model.cfg) == (at not in moved), at


def test_a_gap_is_safe_wherever_the_patches_edges_lie_and_one_byte_less_is_not():
    k = tiny().cfg
    gap = lib.safe_gap(k)
    assert all(lib.beyond(at, at + gap, k) for at in range(8))
    assert not all(lib.beyond(at, at + gap - 1, k) for at in range(8))


def test_full_attention_has_no_beyond():
    k = tiny(window=None, memory="off").cfg
    assert lib.reach(k) is None and not lib.beyond(0, 10**6, k)
    with pytest.raises(UserError, match="WINDOW=off"):
        lib.safe_gap(k)


@pytest.mark.parametrize("layout", ["full", "half"])
def test_mqar_pairs_cannot_move_the_window_only_model_but_a_gap_of_one_patch_less_lets_them(layout):
    model = tiny(memory="off")

    def moved(gap: int) -> bool:
        x, at, y = mqar.make_texts(np.random.default_rng(0), 4, 3, gap, 8, layout)
        other = x.clone()
        other[:, : (6 if layout == "full" else 3) * PATCH] = 7
        with torch.no_grad():
            return not torch.equal(
                *(lib.answer_nll(model, text, at[:, :1], y[:, :1]) for text in (x, other))
            )

    least = mqar.least_gap(model.cfg)
    assert not moved(least) and moved(least - 1)


@pytest.mark.parametrize("align", [1, 2, 4])
@pytest.mark.parametrize("length", [256, 1023])
def test_a_passkey_that_counts_cannot_move_the_window_only_model_but_one_that_does_not_can(
    align, length
):
    model, checked = tiny(memory="off", window=8), set()
    for depth in (0.0, 0.3, 0.9, 1.0):
        rows, _, needle, end = recall.make_cell(
            TEXT, length, depth, 2, align, np.random.default_rng(3)
        )
        other = rows.copy()
        other[:, needle : needle + recall.DIGITS] = (
            ord("0") + (other[:, needle : needle + recall.DIGITS] - 40) % 10
        )
        counts = lib.beyond(needle + recall.DIGITS - 1, end, model.cfg)
        first = []
        for text in (rows, other):
            stream = recall.Stream(model, 2)
            stream.feed(torch.from_numpy(text.astype(np.int64)))
            first.append(stream.logits())
        assert counts == torch.equal(*first), (depth, needle, end)
        checked.add(counts)
    assert checked == {True, False}


# ---- texts


def test_mqar_asks_each_pair_once_with_its_own_value():
    x, at, y = mqar.make_texts(np.random.default_rng(0), 5, 6, 9, 26, "full")
    for row, places, targets in zip(x.tolist(), at.tolist(), y.tolist(), strict=True):
        patches = [bytes(row[i : i + 4]) for i in range(0, len(row), 4)]
        pairs = dict(zip(patches[0:12:2], patches[1:12:2], strict=True))
        assert len(pairs) == 6 and all(p.isdigit() for p in patches[12:21])
        asked = dict(zip(patches[21::2], patches[22::2], strict=True))
        assert asked == pairs and list(asked) != list(pairs)
        for place, target in zip(places, targets, strict=True):
            assert bytes(target[:2]) == pairs[patches[place - 1]][:2] and target[2:] == [-1, -1]


def test_mqar_layout_half_puts_a_pair_into_one_patch():
    x, _, _ = mqar.make_texts(np.random.default_rng(0), 1, 4, 3, 26, "half")
    patches = [bytes(x[0, i : i + 4].tolist()) for i in range(0, x.size(1), 4)]
    pairs = {p[:2]: p[2:] for p in patches[:4]}
    assert {q[:2]: v[:2] for q, v in zip(patches[7::2], patches[8::2], strict=True)} == pairs


def test_training_texts_never_put_a_pair_within_reach():
    k, a = (
        lib.rean_embd_knobs([], lib.BASE | mqar.MQAR | dict(batch_size=2)),
        mqar.read_options([]),
    )
    for stage in range(len(mqar.stages(k, a.pairs))):
        for step in range(5):
            x, at, _ = mqar.training_texts(step, stage, k, a)
            gap = int(at[0, 0]) - 1 - 2 * at.size(1)
            assert gap >= lib.reach(k) and x.size(1) == PATCH * (4 * at.size(1) + gap)
            assert lib.beyond((2 * at.size(1)) * PATCH - 1, int(at[0, 0]) * PATCH, k)


@pytest.mark.parametrize("align", [1, 2, 4])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_passkey_text_has_its_length_one_key_at_its_depth_and_the_question_at_its_end(
    align, depth
):
    text, at = recall.make_text(TEXT, 1001, depth, "48151", align)
    assert 1001 - align < len(text) + recall.DIGITS <= 1001
    assert (
        text[at : at + 5] == b"48151"
        and text.count(b"48151") == 1
        and text.count("GİZLİ KOD: ".encode()) == 1
    )
    assert text.endswith(recall.QUESTION.encode()) and at % align == 0 and len(text) % align == 0
    room = len(text) - recall.QUESTION_BYTES - recall.NEEDLE_BYTES
    assert abs(at - recall.BEFORE - depth * room) <= align
    assert text[:20] == TEXT[:20] or depth == 0


def test_passkeys_are_random_and_the_same_for_every_model():
    draw = lambda: recall.make_cell(TEXT, 512, 0.5, 40, 4, np.random.default_rng(5))
    assert len(set(draw()[1])) == 40 and (draw()[0] == draw()[0]).all()


def test_training_rows_ask_for_the_key_that_they_hold_beyond_reach_in_the_first_stages():
    k = lib.rean_embd_knobs([], lib.BASE | dict(batch_size=4, sequence_length=512))
    plan = recall.stages(k)
    assert plan[-1] == (512, 0.0) and plan[0][1] == 1.0
    for stage in range(len(plan)):
        x, at, y = recall.training_batch(0, stage, TEXT, k, 4)
        assert x.numel() <= 4 * 512
        for row, places, target in zip(x, at, y, strict=True):
            key = bytes(target[target >= 0].tolist())
            assert bytes(row.tolist()).count(key) == 2 and len(key) == 5
            needle = bytes(row.tolist()).index(key)
            if x.size(1) == plan[0][0]:
                assert lib.beyond(needle + 4, int(places[0]) * PATCH, k)


@pytest.mark.parametrize("turkish", [True, False])
def test_without_a_file_training_and_test_prose_are_two_texts(turkish, tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "TURKISH", tmp_path / "turkish")
    if turkish:
        (tmp_path / "turkish").mkdir()
        for part in ("train", "test"):
            (tmp_path / f"turkish/{part}.txt").write_bytes(part.encode() * 100)
    train, test = (lib.read_text(None, part)[0] for part in ("train", "test"))
    assert (
        len(train) > 400 and len(test) > 300 and train[:300] not in test and test[:300] not in train
    )


# ---- scores


class Fixed(torch.nn.Module):
    """Stands for a model whose latents are the byte that follows, or always the same."""

    byte_memory = None

    def __init__(self, knows: bool):
        super().__init__()
        self.knows = knows
        self.register_buffer("plasticity", torch.ones(()))

    def empty_state(self, B: int) -> dict:
        return {}

    def trunk(
        self, x_BT: torch.Tensor, state: dict, fresh: bool = False
    ) -> tuple[torch.Tensor, dict]:
        return torch.zeros(len(x_BT), x_BT.size(1) // PATCH, 1), state

    def decoder(
        self, z_BND: torch.Tensor, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        right = y if self.knows else torch.full_like(y, ord("a"))
        return torch.nn.functional.one_hot(right, 256).float() * 50, None


def test_an_oracle_scores_one_and_a_constant_scores_chance():
    a = mqar.read_options(["--letters", "2", "--pairs", "4", "--test_pairs", "4"])
    n = 500
    assert mqar.hits(Fixed(True), [0], n, 4, 10, a) == n * 4
    low, high = lib.wilson(mqar.hits(Fixed(False), [0], n, 4, 10, a), n * 4)
    assert low < 0.25 < high  # one of 2 x 2 values


@pytest.mark.parametrize("mem_rows", [0, 512])
def test_answer_losses_are_those_of_the_whole_models_forward(mem_rows):
    model, rng = tiny(ngram_rows=64, mem_rows=mem_rows), np.random.default_rng(0)
    torch.nn.init.normal_(model.decoder.grams.table)  # tables begin at zero, and say nothing
    x, at, y = mqar.make_texts(rng, 3, 4, 12, 8, "full")
    with torch.no_grad():
        ours = lib.answer_nll(model, x, at, y)[..., :2]
        whole = model(x[:, :-PATCH], x[:, PATCH:])[0].unflatten(1, (-1, PATCH))
    theirs = whole.gather(1, (at - 1)[..., None].expand(-1, -1, PATCH))[..., :2]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mem_rows", [0, 512])
def test_hits_are_what_greedy_decoding_writes(mem_rows):
    model = tiny(seed=4, mem_rows=mem_rows)
    rows, *_ = recall.make_cell(TEXT, 256, 0.5, 3, 4, np.random.default_rng(0))
    said, _ = recall.answer(model, rows, num_bytes=4)
    x = torch.from_numpy(np.concatenate([rows, [list(s) for s in said]], 1).astype(np.int64))
    at, y = torch.full((3, 1), rows.shape[1] // PATCH), x[:, -4:][:, None]
    assert lib.answer_hits(model, x, at, y).all()
    assert not lib.answer_hits(model, x, at, (y + 1) % 256).any(-1).all()


def test_recall_of_an_oracle_is_one_and_sums_take_only_cells_beyond_reach(monkeypatch):
    keys = []
    cell = recall.make_cell

    def remember(*given):
        made = cell(*given)
        keys.append(made[1])
        return made

    monkeypatch.setattr(recall, "make_cell", remember)
    monkeypatch.setattr(recall, "answer", lambda model, rows: ([k.encode() for k in keys[-1]], 1))
    a = recall.read_options(["--lengths", "256,512", "--depths", "0,100", "--n", "3"])
    found = recall.grid(dict(full=tiny(window=8)), TEXT, a, 256)
    assert all(r["exact"] == 1 and r["digit_accuracy"] == 1 for r in found)
    assert [r["beyond_window"] for r in found] == [1, 0, 1, 0]
    counted = [(r["lengths"], r["n"]) for r in recall.sums(found, 64)]
    assert counted == [("256", 3), ("512", 3), ("up to 256", 3), ("all", 6)]


def test_memory_zeroed_hears_nothing_from_its_memory_and_shares_all_weights():
    model = tiny()
    silent = lib.other_memory(model, "zero")
    x = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[0, :8] = 5
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), silent.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        ours, theirs = ([m(t, x)[0][0, -4:] for t in (x, other)] for m in (model, silent))
    assert not torch.equal(*ours) and torch.equal(*theirs)


def test_training_learns_an_answer_and_moves_on_only_when_it_has(capsys):
    k, seen = (
        lib.rean_embd_knobs(["n_embd=16", "num_iterations=60", "lr=0.01", "warmup_iters=1"]),
        [],
    )

    def make(step: int, stage: int) -> lib.Batch:
        seen.append(stage)
        rng = np.random.default_rng(step)
        x = torch.from_numpy(rng.integers(97, 99, (8, 16)))
        y = (
            torch.full((8, 1, 4), ord("z"))
            if stage == 0
            else x[:, :4].flip(1)[:, None] * 0 + rng.integers(256)
        )
        return x, torch.full((8, 1), 3), y

    model, seconds = lib.train_on_answers(k, make, 2, torch.device("cpu"), lambda line: None)
    assert seen[0] == 0 and seen[-1] == 1 and seen == sorted(seen) and seen.index(1) >= 20
    assert not model.training and seconds > 0


def test_training_stays_in_the_stage_that_it_cannot_learn():
    k, seen = lib.rean_embd_knobs(["n_embd=16", "num_iterations=45", "warmup_iters=1"]), []

    def make(step: int, stage: int) -> lib.Batch:
        seen.append(stage)
        rng = np.random.default_rng(step)
        x, y = (torch.from_numpy(rng.integers(0, 256, shape)) for shape in ((4, 16), (4, 1, 4)))
        return x, torch.full((4, 1), 3), y

    lib.train_on_answers(k, make, 2, torch.device("cpu"), lambda line: None)
    assert seen == [0] * 45


# ---- position curve


def test_bits_by_position_add_up_to_the_whole_texts_and_count_each_byte_once(weights):
    model, text = tiny(), TEXT[:3001]
    docs = position_curve.documents(text, 1024, None)
    assert b"".join(docs) == text and len(docs) == 3
    bits = position_curve.read_bits(model, docs, 2, None)
    at = position_curve.edges(1024)
    sums, counts = position_curve.by_bin(bits, at)
    assert counts.sum() == len(text) and counts[:, 0].sum() == 3 * 64
    expected = 0.0
    for doc in docs:
        whole = torch.tensor([list(doc)])
        size = whole.size(1) - PATCH
        pad = torch.nn.functional.pad(whole, (0, -size % PATCH))
        y = torch.nn.functional.pad(whole[:, PATCH:], (0, -size % PATCH), value=-1)
        with torch.no_grad():
            expected += 8 * PATCH + model(pad[:, : y.size(1)], y)[
                0
            ].double().sum().item() / math.log(2)
    assert sums.sum() == pytest.approx(expected, rel=1e-5)
    total = position_curve.totals(dict(full=bits), text, 1, 0)[0]
    assert total["bits_per_byte"] == pytest.approx(expected / len(text), rel=1e-5)


def test_bits_do_not_depend_on_who_is_read_beside_whom_or_in_what_pieces(monkeypatch):
    model, docs = tiny(), position_curve.documents(TEXT[:2500], 1000, None)
    one = position_curve.read_bits(model, docs, 1, None)
    monkeypatch.setattr(position_curve, "PIECE", 64)
    for a, b in zip(one, position_curve.read_bits(model, docs, 3, None), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_full_attention_is_read_in_pieces_of_its_own_length():
    model = tiny(memory="off", window=None)
    (bits,) = position_curve.read_bits(model, [TEXT[:200]], 1, 64)
    (piece,) = position_curve.read_bits(model, [TEXT[64:128]], 1, None)
    np.testing.assert_allclose(bits[64:128], piece, atol=1e-4)
    assert (bits[[0, 64, 128, 192]] == 8).all() and len(bits) == 200


def test_documents_cut_at_a_separator_hold_every_byte():
    text = b"a\n\nbb\n\n\n\nccc"
    docs = position_curve.documents(text, 4, b"\n\n")
    assert b"".join(docs) == text and docs[0] == b"a\n\n" and docs[-1] == b"ccc"


def test_the_xz_line_is_lzma_of_the_file_and_a_missing_compressor_says_so(monkeypatch):
    monkeypatch.setattr(position_curve.shutil, "which", lambda name: None)
    rng = np.random.default_rng(0)  # words: repeated text would come out the same at every level
    text = b" ".join(b"%d" % n for n in rng.zipf(1.2, 60_000))
    found, size = (
        position_curve.compressed(text),
        len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    )
    assert found["xz -9e"][0] == size != len(lzma.compress(text, preset=6))
    assert found["zstd -22"] == (None, "no program zstd here")


def test_the_bootstrap_covers_the_mean_and_one_document_has_no_interval():
    rng = np.random.default_rng(0)
    sums, counts = rng.normal(2, 0.1, (30, 1)) * 10, np.full((30, 1), 10.0)
    mean, low, high = position_curve.bootstrap(sums, counts, 0)
    half = 1.96 * sums.std() / 10 / 30**0.5
    assert low < mean < high and (high - low) / 2 == pytest.approx(half, rel=0.2)
    assert np.isnan(position_curve.bootstrap(sums[:1], counts[:1], 0)[1]).all()


# ---- Turkish


def test_there_are_pairs_enough_and_none_twice():
    pairs = intelligence.minimal_pairs()
    assert len(pairs) >= 60 and len({(r, w) for _, r, w in pairs}) == len(pairs)
    assert all(right != wrong for _, right, wrong in pairs)


def test_harmony_pairs_differ_in_the_suffixs_vowels_alone_and_the_right_one_harmonises():
    back, rounded = set("aıou"), set("oöuü")
    vowels = lambda word: [c for c in word if c in "aeıioöuü"]
    consonants = lambda word: "".join("_" if c in "aeıioöuü" else c for c in word)
    for stem, right, wrong in intelligence.entries(intelligence.HARMONY):
        assert consonants(right) == consonants(wrong) and right != wrong
        last, ours, theirs = vowels(stem)[-1], vowels(right)[0], vowels(wrong)[0]
        assert (last in back) == (ours in back) != (theirs in back), (stem, right)
        if ours not in "ae":
            assert (last in rounded) == (ours in rounded), (stem, right)


def test_order_pairs_hold_the_same_suffixes_in_another_order_and_harmonise_both_ways():
    for (_, right, wrong), (stem, *parts) in zip(
        [p for p in intelligence.minimal_pairs() if p[0] == "suffix order"],
        intelligence.entries(intelligence.ORDER),
        strict=True,
    ):
        assert sorted(right) == sorted(wrong) and right.startswith(stem) and wrong.startswith(stem)
        vowels = [c for c in right if c in "aeıioöuü"]
        last = [c for c in stem if c in "aeıioöuü"][-1]
        assert last in "aıei" and {v in "aı" for v in vowels[len(vowels) - len(parts) :]} == {
            last in "aı"
        }


@pytest.mark.parametrize("mem_rows", [0, 512])
def test_the_likelihood_of_a_word_is_that_of_the_model_whatever_its_place_in_a_patch(mem_rows):
    model = tiny(mem_rows=mem_rows)
    for before, rest in (
        (b"abcd", b"efg"),
        (b"abcde", b"fg"),
        (b"abcdefg", b"h"),
        (b"abcabcabcab", b"cabc"),
    ):
        (ours,) = intelligence.log_likelihoods(model, [(before, rest)])
        stream, theirs = recall.Stream(model), 0.0
        stream.feed(torch.tensor([list(b"\n" * (-len(before) % PATCH) + before)]))
        for byte in rest:
            theirs += float(stream.logits()[0].log_softmax(-1)[byte])
            stream.feed(torch.tensor([[byte]]))
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("remember", ["prompt", "all"])
def test_a_text_that_is_written_remembers_its_prompt_and_itself_only_if_asked_to(
    monkeypatch, remember
):
    model, given, written, write = tiny(mem_rows=512), "abcdefgh" * 2, [], ByteMemory.write
    count = lambda memory, state, writes: (
        written.append(writes[0].size(2)) or write(memory, state, writes)
    )
    monkeypatch.setattr(ByteMemory, "write", count)
    a = intelligence.read_options(
        ["--weights", "x", "--bytes", "5", "--temperature", "0", "--remember", remember]
    )
    assert intelligence.continue_prompt(model, given, 0, a) == b"abcde", "what the prompt taught it"
    assert written == [17] + [1] * (5 if remember == "all" else 0)
    written.clear()
    view = sample.Patches(model)
    for text in (given, given + "a", given + "ab"):
        view.logits(list(text.encode()))
    assert written == [16], "sample.py: the prompt alone"


def test_a_model_that_prefers_right_words_scores_one_and_one_that_ties_scores_none(monkeypatch):
    right = {r for _, r, _ in intelligence.minimal_pairs()}
    know = lambda model, texts: [float(rest.decode().split()[0] in right) for _, rest in texts]
    monkeypatch.setattr(intelligence, "log_likelihoods", know)
    assert all(p["hit"] for p in intelligence.judge_pairs(None))
    monkeypatch.setattr(intelligence, "log_likelihoods", lambda model, texts: [0.0] * len(texts))
    assert not any(p["hit"] for p in intelligence.judge_pairs(None))


@pytest.mark.parametrize(
    "text, share",
    [
        ("iğne".encode(), 1.0),
        ("iğ".encode()[:-1], 1.0),  # cut off by the end
        ("€".encode()[:2], 1.0),
        (b"a\xffb\xff", 0.5),
        (b"\x80abc", 0.75),
        (b"\xc4abc", 0.75),  # a lead without its second byte
        (b"ab\xff", 2 / 3),
        (b"", 1.0),
    ],
)
def test_the_valid_share_counts_bytes_outside_of_characters(text, share):
    assert intelligence.valid_share(text) == pytest.approx(share)


def test_repetition_is_none_of_distinct_pieces_and_nearly_all_of_a_loop():
    assert intelligence.repetition(bytes(range(100))) == 0
    assert intelligence.repetition(b"abcdefgh" * 20) == pytest.approx(1 - 8 / 153)
    assert intelligence.repetition(b"short") == 0


def test_known_words_leave_out_short_and_cut_ones_and_know_turkish_capitals():
    assert intelligence.words_of("IŞIK İğne at 7") == ["ışık", "iğne"]
    found = intelligence.measure(
        ["kesik ışık xyzzy iğne yarı".encode()], {"ışık", "iğne", "kesik", "yarı"}
    )
    assert found["words"] == 3 and found["known_words"] == pytest.approx(2 / 3)


# ---- programs


def test_recall_writes_its_grid_its_sums_and_what_made_them(weights, tmp_path, capsys):
    out = tmp_path / "new/recall"
    options = [
        "--lengths",
        "256,300",
        "--depths",
        "0,50,100",
        "--n",
        "2",
        "--filler",
        weights["text"],
    ]
    recall.main(
        [
            "--weights",
            weights["full"],
            "--window_weights",
            weights["window"],
            "--out",
            str(out),
            *options,
        ]
    )
    rows, about = (
        read_csv(out.with_suffix(".csv")),
        json.loads(out.with_suffix(".json").read_text()),
    )
    assert len(rows) == 2 * 3 * 3 and {r["model"] for r in rows} == {
        "full",
        "memory zeroed",
        "window only",
    }
    assert (
        len({(r["model"], r["state_bytes"]) for r in rows}) == 3
    )  # the state does not grow with the text
    assert (
        about["options"]["n"] == 2
        and about["git_commit"]
        and about["sums"]
        and about["reach_patches"] == 4
    )
    assert "1.00*" not in capsys.readouterr().out


def test_recall_trains_its_models_and_saves_them(tmp_path, weights):
    out = tmp_path / "recall"
    knobs = ["--knobs", "n_embd=16", "n_head=2", "window=2", "num_iterations=2", "warmup_iters=0"]
    sizes = [
        "--train_length",
        "160",
        "--batch_size",
        "2",
        "--lengths",
        "200",
        "--depths",
        "0",
        "--n",
        "2",
    ]
    recall.main(["--train", "--out", str(out), "--filler", weights["text"], *sizes, *knobs])
    about = json.loads(out.with_suffix(".json").read_text())
    assert (
        set(about["seconds_training"]) == {"full", "window only"} and about["trained_length"] == 160
    )
    again = lib.load(tmp_path / "recall_window.pth", torch.device("cpu"))
    assert again.cfg.memory == "off" and again.cfg.num_iterations == 2
    tuned = [*sizes, "--knobs", "num_iterations=1", "warmup_iters=0"]
    files = [
        "--weights",
        str(tmp_path / "recall_full.pth"),
        "--filler",
        weights["text"],
        "--out",
        str(tmp_path / "b"),
    ]
    recall.main(["--train", *files, *tuned])
    assert lib.load(tmp_path / "b_full.pth", torch.device("cpu")).cfg.n_embd == 16


def test_mqar_writes_a_line_per_model_seed_pairs_and_distance(tmp_path, capsys):
    out = tmp_path / "mqar"
    options = [
        "--pairs",
        "2",
        "--test_pairs",
        "2,4",
        "--distances",
        "4,8",
        "--n",
        "3",
        "--seeds",
        "0,1",
    ]
    knobs = ["n_embd=16", "window=3", "num_iterations=1", "warmup_iters=0", "batch_size=2"]
    mqar.main([*options, "--out", str(out), "--knobs", *knobs])
    rows = read_csv(out.with_suffix(".csv"))
    assert len(rows) == 3 * 2 * 2 * 2 and {r["beyond_window"] for r in rows} == {"1"}
    assert {r["n"] for r in rows} == {"6", "12"} and "chance" in capsys.readouterr().out


def test_position_curve_writes_its_table_its_figure_and_the_compressors(weights, tmp_path, capsys):
    out = tmp_path / "curve"
    models = ["--weights", weights["full"], "--window_weights", weights["window"]]
    models += ["--full_attention_weights", weights["attention"]]
    position_curve.main([*models, "--text", weights["text"], "--length", "1024", "--out", str(out)])
    rows, about = (
        read_csv(out.with_suffix(".csv")),
        json.loads(out.with_suffix(".json").read_text()),
    )
    assert len(rows) == 4 * 5 and sum(int(r["bytes"]) for r in rows if r["model"] == "full") == 5001
    totals = {r["name"]: r for r in about["totals"]}
    share = about["characters"] / about["bytes"]
    assert totals["full"]["bits_per_char"] * share == pytest.approx(totals["full"]["bits_per_byte"])
    mean = (
        sum(float(r["bits_per_byte"]) * int(r["bytes"]) for r in rows if r["model"] == "full")
        / 5001
    )
    assert mean == pytest.approx(totals["full"]["bits_per_byte"])
    assert out.with_suffix(".png").stat().st_size > 10_000 and "xz -9e" in capsys.readouterr().out


def test_intelligence_writes_its_table_and_every_continuation(weights, tmp_path, capsys):
    out = tmp_path / "ci"
    options = ["--samples", "2", "--bytes", "20", "--heldout", weights["text"], "--out", str(out)]
    intelligence.main(["--weights", weights["full"], *options])
    rows, page = (
        read_csv(out.with_suffix(".csv")),
        out.with_suffix(".md").read_text(encoding="utf-8"),
    )
    assert [r["n"] for r in rows[:3]] == ["54", "37", "91"] and rows[0]["chance"] == "0.5"
    assert {
        r["value"] for r in rows if r["source"] == "held-out text" and r["measure"] == "valid utf8"
    } == {"1.0"}
    assert page.count("\n- ") == 8 and page.startswith("| measure")
    again = tmp_path / "again"
    intelligence.main(["--weights", weights["full"], *options[:-1], str(again)])
    assert again.with_suffix(".md").read_text(encoding="utf-8") == page


NO = "no-such-thing"
WRONG = [
    (recall, [], "no model"),
    (recall, ["--run", NO], "no run"),
    (recall, ["--weights", NO], "no such file"),
    (recall, ["--weights", NO, "--run", NO], "both name a model"),
    (recall, ["--train", "--filler", NO], "no text there"),
    (recall, ["--train", "--lengths", "40"], "does not hold key and question"),
    (recall, ["--train", "--depths", "0,101"], "--depths 0,101"),
    (recall, ["--train", "--train_length", "100"], "too short for a key beyond"),
    (recall, ["--train", "--knobs", "n_embd"], "expected name=value"),
    (recall, ["--train", "--knobs", "d_modle=3"], "d_model"),
    (recall, ["--train", "--knobs", "window=off"], "WINDOW=off sees everything"),
    (recall, ["--train", "--n", "0"], "--n 0"),
    (mqar, ["--pairs", "100"], "more letters"),
    (mqar, ["--letters", "27"], "--letters 27"),
    (mqar, ["--knobs", "n_head=3"], "N_HEAD=3"),
    (mqar, ["--seeds", "a"], "--seeds a"),
    (bench_scaled, ["--parts", "memory,nothing"], "no part 'nothing'"),
    (bench_scaled, ["--repeats", "0"], "--repeats and --threads"),
    (position_curve, [], "no model"),
    (position_curve, ["--weights", NO, "--length", "30"], "--length 30"),
    (intelligence, [], "no model"),
    (intelligence, ["--weights", NO, "--temperature", "-1"], "--temperature"),
]


@pytest.mark.parametrize("program, words, message", WRONG)
def test_wrong_input_is_one_clear_error(program, words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        program.main([*words, "--out", str(tmp_path / "x")])


def test_a_model_with_memory_is_no_window_only_control(weights, tmp_path):
    for program in (recall, position_curve):
        with pytest.raises(UserError, match="no window-only control"):
            program.main(
                [
                    "--weights",
                    weights["full"],
                    "--window_weights",
                    weights["full"],
                    "--out",
                    str(tmp_path / "x"),
                ]
            )


def test_a_gpu_that_is_not_there_is_an_error(weights, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for program in (recall, position_curve, intelligence):
        with pytest.raises(UserError, match="no CUDA GPU"):
            program.main(
                ["--weights", weights["full"], "--device", "cuda", "--out", str(tmp_path / "x")]
            )


def test_the_bench_writes_both_sides_and_their_ratio_with_what_they_came_from(
    monkeypatch, tmp_path, capsys
):
    small = dict(n_embd=16, n_layer=1, n_head=2, window=4)
    monkeypatch.setattr(bench_scaled, "STEP", bench_scaled.STEP | small | dict(sequence_length=64))
    monkeypatch.setattr(bench_scaled, "STUDY", bench_scaled.STUDY | dict(n_embd=16, n_head=2))
    monkeypatch.setattr(bench_scaled, "LENGTH", bench_scaled.LENGTH | small)
    monkeypatch.setattr(bench_scaled, "LENGTHS", [64, 128])
    assert (
        bench_scaled.main(
            ["--parts", "step,blocks,length", "--repeats", "2", "--out", str(tmp_path)]
        )
        == 0
    )
    found = json.loads((tmp_path / "scaled_step_cpu.json").read_text())
    (step,) = found["rows"]
    assert (
        step["ratio"] == pytest.approx(step["plain_ms"] / step["ours_ms"])
        and step["bytes"] == 128
        and step["n"] == 2
    )
    assert found["torch"] == torch.__version__ and "git_commit" in found and found["threads"] == 1
    rows = json.loads((tmp_path / "scaled_blocks_cpu.json").read_text())["rows"]
    assert [row["model"] for row in rows] == list(bench_scaled.BLOCKS) and rows[-1]["ratio"] == 1
    assert all(
        row["ratio"] == pytest.approx(row["ms"] / rows[-1]["ms"]) and row["n"] == 2 for row in rows
    )
    rows = json.loads((tmp_path / "scaled_length_cpu.json").read_text())["rows"]
    assert [row["bytes"] for row in rows] == [64, 128] and rows[0]["of_the_shortest"] == 1
    assert all(row["us_per_byte"] > 0 and row["peak_mib"] > 100 for row in rows)
    assert capsys.readouterr().out.count("length: bytes") == 2
    monkeypatch.setattr(
        bench_scaled, "join_world", lambda *given: pytest.fail("it keeps freed memory")
    )
    assert (
        bench_scaled.main(
            ["--parts", "step", "--repeats", "1", "--malloc", "glibc", "--out", str(tmp_path)]
        )
        == 0
    )
    assert (tmp_path / "scaled_step_cpu_glibc.json").exists()
    with pytest.raises(UserError, match="about CPU memory"):
        bench_scaled.main(["--malloc", "glibc", "--device", "cuda"])


def test_the_benchs_median_ratio_is_of_the_sides_it_timed():
    found = bench_scaled.compared(dict(ours=[1.0, 2.0, 3.0], plain=[6.0, 6.0, 6.0]))
    assert (found["ours_ms"], found["plain_ms"], found["ratio"], found["n"]) == (2000, 6000, 3, 3)
    assert found["low"] <= 3 <= found["high"]
