"""What is hidden lies beyond the windows' reach, and texts hold what they should. Tiny models."""

import byte_models as lib
import mqar
import numpy as np
import pytest
import recall_fixed as recall
import torch
from programs_support import TEXT, tiny

from plumbing import UserError
from train_scaled import PATCH


@pytest.mark.parametrize("n_layer, window", [(1, 2), (2, 3), (3, 5), (1, 3)])
def test_no_byte_beyond_reach_moves_a_window_only_model_and_the_nearest_within_does(
    n_layer, window
):
    model, T = tiny(memory="off", n_layer=n_layer, sliding_window=window), 96
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
    k = tiny(sliding_window=None, memory="off").cfg
    assert lib.reach(k) is None and not lib.beyond(0, 10**6, k)
    with pytest.raises(UserError, match="SLIDING_WINDOW=off"):
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
    model, checked = tiny(memory="off", sliding_window=8), set()
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
        lib.read_model_knobs([], lib.BASE | mqar.MQAR | dict(batch_size=2)),
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
    k = lib.read_model_knobs([], lib.BASE | dict(batch_size=4, sequence_length=512))
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
