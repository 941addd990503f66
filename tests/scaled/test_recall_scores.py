"""Scores of the recall programs, and their training on answers. Tiny models."""

import byte_models as lib
import mqar
import numpy as np
import pytest
import recall_fixed as recall
import torch
from programs_support import TEXT, tiny

from train_scaled import PATCH


class Fixed(torch.nn.Module):
    """Stands for a model whose latents are the byte that follows, or always the same."""

    byte_memory = None

    def __init__(self, knows: bool):
        super().__init__()
        self.knows = knows
        self.register_buffer("plasticity", torch.ones(()))

    def empty_state(self, B: int) -> None:
        return None

    def trunk(
        self, x_BT: torch.Tensor, state: None, at_start: bool = False
    ) -> tuple[torch.Tensor, None]:
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
    found = recall.grid(dict(full=tiny(sliding_window=8)), TEXT, a, 256)
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
        lib.read_model_knobs(["n_embd=16", "num_iterations=60", "lr=0.01", "warmup_iters=1"]),
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
    k, seen = lib.read_model_knobs(["n_embd=16", "num_iterations=45", "warmup_iters=1"]), []

    def make(step: int, stage: int) -> lib.Batch:
        seen.append(stage)
        rng = np.random.default_rng(step)
        x, y = (torch.from_numpy(rng.integers(0, 256, shape)) for shape in ((4, 16), (4, 1, 4)))
        return x, torch.full((4, 1), 3), y

    lib.train_on_answers(k, make, 2, torch.device("cpu"), lambda line: None)
    assert seen == [0] * 45
