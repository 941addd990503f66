"""scripts/scaled/curriculum_intelligence.py: minimal pairs, likelihoods, generated text."""

import curriculum_intelligence as intelligence
import pytest
import recall_fixed as recall
import sample
import torch
from programs_support import tiny

from histories import HistoryTables
from train_scaled import PATCH


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
    model, given, written, write = tiny(mem_rows=512), "abcdefgh" * 2, [], HistoryTables.write

    def counted(rules, tables, writes):
        written.append(writes[0].size(2))
        write(rules, tables, writes)

    monkeypatch.setattr(HistoryTables, "write", counted)
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
