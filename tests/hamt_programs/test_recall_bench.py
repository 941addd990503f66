"""What recall_bench.py and recall_tasks.py promise: right tasks, honest scores, statistics that can
fail.
"""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import recall_bench as program
import recall_knobs
import recall_tables
import recall_tasks as tasks
import recall_training
import slots as slots_of
import torch
import torch.nn.functional as F
from hamt_support import ONE

import plumbing
import train_gpu
from plumbing import UserError

A = tasks.Alphabet(keys=12, values=10, fillers=5)
TINY = dict(n_embd=16, hcm_dim=16, n_layer=1, num_slots=4, n_head=2, vocab_size=A.size)
TINY |= dict(
    data="embedded", precision="fp32", device="cpu", dropout=0.0, sequence_length=16, batch_size=4
)


def make(task: str, rng: np.random.Generator, **more: object) -> tasks.Sequences:
    return tasks.TASKS[task](rng, 40, 48, A, 4, **more)


def is_key(token: int) -> bool:
    return token < A.keys


def oracle(x_T: np.ndarray, task: str) -> np.ndarray:
    """Answers by reading the tokens from left to right, without knowing how they were made."""
    if task == "copy":
        return copy_oracle(x_T)
    leads_to, out = {}, np.full(len(x_T), -2)
    pairs_end = 4 * 4 if task in ("rewrite", "two_hops") else 0
    for t, token in enumerate(x_T):
        was_key = t > 0 and is_key(x_T[t - 1])
        if t < pairs_end:
            if t % 2:
                leads_to[x_T[t - 1]] = token  # a later pair of this key counts
        elif A.keys <= token < A.keys + A.values and was_key:
            leads_to[x_T[t - 1]] = token
        elif is_key(token) and token in leads_to:
            found = leads_to[token]
            out[t] = leads_to[found] if is_key(found) else found
    return out


def copy_oracle(x_T: np.ndarray) -> np.ndarray:
    out, text, at = np.full(len(x_T), -2), [], 0
    for t, token in enumerate(x_T):
        at = at + 1 if at else int(token == A.sign)
        if at:
            out[t] = text[at - 1] if at <= len(text) else -2
        elif A.keys <= token < A.keys + A.values:
            text.append(token)
    return out


@pytest.mark.parametrize("task", tasks.TASKS)
def test_an_oracle_that_reads_the_tokens_finds_every_answer(task):
    s = make(task, np.random.default_rng(0))
    read = np.stack([oracle(row, task) for row in s.x_BT])
    asked = s.y_BT >= 0
    assert (asked.sum(1) == 4).all() and (read[asked] == s.y_BT[asked]).all()
    assert (read[~asked] == -2).all(), "a question that is not scored"


def test_a_key_that_was_rewritten_has_another_value_and_the_last_one_is_the_answer():
    s = make("rewrite", np.random.default_rng(0), density=0.5)
    for x_T, y_T in zip(s.x_BT, s.y_BT, strict=True):
        written = [(key, value) for key, value in zip(x_T[0:16:2], x_T[1:16:2], strict=True)]
        first, last = dict(reversed(written)), dict(written)
        assert len(last) == 4 and all(first[key] != last[key] for key in last)
        places = np.nonzero(y_T >= 0)[0]
        assert len(places) > 4 and all(y_T[t] == last[x_T[t]] for t in places)


def test_two_hops_take_two_reads():
    s = make("two_hops", np.random.default_rng(0), density=0.5)
    for x_T, y_T in zip(s.x_BT, s.y_BT, strict=True):
        leads_to = dict(zip(x_T[0:16:2], x_T[1:16:2], strict=True))
        asked = {x_T[t] for t in np.nonzero(y_T >= 0)[0]}
        assert len(leads_to) == 8 and asked and all(is_key(leads_to[key]) for key in asked)
        places = np.nonzero(y_T >= 0)[0]
        assert all(y_T[t] == leads_to[leads_to[x_T[t]]] for t in places)


def test_an_oracle_answers_all_queries_of_a_dense_mqar():
    s = make("mqar", np.random.default_rng(0), density=0.5)
    asked = s.y_BT >= 0
    assert 0.45 < asked[:, 8:].mean() < 0.55 and not asked[:, :8].any()
    assert all(
        (oracle(x, "mqar")[a] == y[a]).all() for x, y, a in zip(s.x_BT, s.y_BT, asked, strict=True)
    )


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_distance_is_the_number_of_tokens_from_the_answer_to_the_query(task):
    for more in [{}, dict(density=0.4)] if task in tasks.DENSE else [{}]:
        s = make(task, np.random.default_rng(1), **more)
        rows, places = np.nonzero(s.y_BT >= 0)
        assert (s.x_BT[rows, places - s.distance_BT[rows, places]] == s.y_BT[rows, places]).all()
        assert (s.distance_BT[s.y_BT < 0] == 0).all()
        assert len(np.unique(s.distance_BT[rows, places])) > 8, "distances hardly vary"


@pytest.mark.parametrize("distance", [1, 2, 3, 17, 45, 46])
def test_a_needle_stands_at_the_distance_asked_for_and_only_it_is_asked(distance):
    s = make("needle", np.random.default_rng(2), distance=distance)
    assert ((s.y_BT >= 0).sum(1) == 1).all() and (s.distance_BT[:, -1] == distance).all()
    assert (s.x_BT[:, -1 - distance] == s.y_BT[:, -1]).all() and (
        s.x_BT[:, -2 - distance] == s.x_BT[:, -1]
    ).all()


@pytest.mark.parametrize("distance", [4, 5, 20, 44])
def test_a_copy_stands_at_the_distance_asked_for(distance):
    s = make("copy", np.random.default_rng(3), distance=distance)
    assert (s.distance_BT[s.y_BT >= 0] == distance).all()


@pytest.mark.parametrize("task", tasks.TASKS)
def test_an_answer_is_shown_once_and_before_it_is_asked_for(task):
    s = make(task, np.random.default_rng(4))
    values = (s.x_BT >= A.keys) & (s.x_BT < A.keys + A.values)
    # a copy shows each symbol but the last again, after it has been asked for
    more = dict(copy=3, rewrite=4).get(task, 0)
    assert (values.sum(1) == 4 + more).all()
    if task == "copy":
        places = np.arange(44, 48)
        assert (s.x_BT[:, places[1:]] == s.y_BT[:, places[:-1]]).all() and (
            s.x_BT[:, 44] == A.sign
        ).all()


def test_keys_of_a_sequence_differ_and_values_are_drawn_evenly():
    keys, values = A.draw_pairs(np.random.default_rng(5), 4000, 4)
    assert all(len(set(row)) == 4 for row in keys)
    assert np.abs(np.bincount(values.ravel() - A.keys) / 1600 - 1).max() < 0.15


def test_every_step_is_fresh_and_measuring_sees_other_sequences():
    b = recall_knobs.Bench()
    first, again, other = b.training(0, 0), b.training(0, 0), b.training(0, 1)
    assert (first.x_BT == again.x_BT).all() and (first.x_BT != other.x_BT).any()
    heads = {bytes(x[:16]) for step in range(20) for x in b.training(0, step).x_BT}
    for stream in (recall_knobs.SELECT, recall_knobs.MEASURE):
        assert not heads & {bytes(x[:16]) for x in b.held_out(stream, 100, 128, 8).x_BT}
    assert (b.training(0, 0).x_BT != b.training(1, 0).x_BT).any()


@pytest.mark.parametrize(
    "task, T, pairs, more",
    [
        ("mqar", 23, 8, {}),
        ("mqar", 9, 8, {}),
        ("rewrite", 39, 8, {}),
        ("rewrite", 9, 8, {}),
        ("two_hops", 29, 6, {}),
        ("two_hops", 200, 7, {}),
        ("copy", 15, 8, {}),
        ("needle", 23, 8, {}),
        ("needle", 48, 4, dict(distance=47)),
        ("copy", 48, 4, dict(distance=3)),
        ("mqar", 200, 13, {}),
    ],
)
def test_a_task_that_does_not_fit_is_refused(task, T, pairs, more):
    with pytest.raises(ValueError, match=r"fit into|tokens|keys"):
        tasks.TASKS[task](np.random.default_rng(0), 2, T, A, pairs, **more)


# ----------------------------------------------------------------------------
# Scores


class Told:
    """In the place of a model: answers as `answer` says, by one-hot hidden states."""

    def __init__(self, answer):
        self.answer, self.wte = answer, torch.eye(A.size)

    def eval(self) -> None:
        pass

    def empty_state(self, B: int) -> None:
        return None

    def hidden(self, x_BT, state):
        told = np.stack([self.answer(row) for row in x_BT.numpy()])
        return F.one_hot(torch.from_numpy(told).clamp(min=0), A.size).float(), None, None


@pytest.mark.parametrize("task", tasks.TASKS)
def test_an_oracle_scores_one_and_a_constant_scores_chance(task):
    s = tasks.TASKS[task](np.random.default_rng(6), 1000, 48, A, 4)
    right = recall_training.measure(Told(lambda x: oracle(x, task)), s, ONE)
    assert right["accuracy"] == 1 and right["queries"] == 4000 and 0.99 < right["low"] < 1
    constant = recall_training.measure(Told(lambda x: np.full(len(x), A.keys + 3)), s, ONE)
    assert (
        constant["low"] < tasks.chance(A) == 0.1 < constant["high"]
        and constant["high"] - constant["low"] < 0.03
    )


def test_answers_are_counted_where_the_distance_says():
    s = make("mqar", np.random.default_rng(7))
    near = np.where(s.distance_BT < 20, s.y_BT, -2)
    right, asked = tasks.score(s, near, 0, 20)
    assert (
        asked.sum() == ((s.distance_BT < 20) & (s.y_BT >= 0)).sum() > 0 and (right == asked).all()
    )
    right, asked = tasks.score(s, near, 20)
    assert asked.sum() > 0 and right.sum() == 0


@pytest.mark.parametrize("right, low, high", [(0, 0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1)])
def test_wilsons_interval_is_the_published_one(right, low, high):
    assert tasks.wilson(right, 10) == pytest.approx((low, high), abs=1e-4)


def test_answers_that_hang_together_widen_the_interval():
    rng = np.random.default_rng(8)
    whole = 8 * rng.integers(2, size=300)  # all right or all wrong
    apart = rng.binomial(8, 0.5, size=300)
    wide, narrow = (tasks.accuracy(right, np.full(300, 8)) for right in (whole, apart))
    assert wide["high"] - wide["low"] == pytest.approx(
        math.sqrt(8) * (narrow["high"] - narrow["low"]), rel=0.15
    )
    assert tasks.accuracy(np.zeros(3), np.zeros(3))["queries"] == 0


# ----------------------------------------------------------------------------
# Slots


def test_equal_addresses_have_rank_one_and_separate_ones_have_rank_S():
    equal = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(50, 4)
    assert slots_of.effective_rank(equal) == pytest.approx((1, 1), abs=1e-3)
    assert slots_of.effective_rank(torch.eye(4).repeat(10, 1)) == pytest.approx((4, 4))
    entropy, participation = slots_of.effective_rank(torch.diag(torch.tensor([2.0, 1, 0, 0])))
    assert entropy == pytest.approx(
        math.exp(math.log(3) - 2 / 3 * math.log(2))
    ) and participation == pytest.approx(25 / 17)


def test_copied_slots_have_cosine_one_and_orthogonal_ones_zero():
    copies = (
        torch.randn(3, 1, 8, generator=torch.manual_seed(0)) * torch.tensor([1.0, -2, 0.5])[:, None]
    )
    assert slots_of.slot_cosine(copies) == pytest.approx(1)
    assert slots_of.slot_cosine(torch.eye(4)[None]) == 0
    M = torch.cat([copies, torch.zeros(3, 2, 8)], dim=1)
    assert slots_of.slot_cosine(M) == pytest.approx(1), "empty slots are no slots"
    assert math.isnan(slots_of.slot_cosine(torch.zeros(2, 4, 8)))


def random_model(**more: object) -> train_gpu.Model:
    model = train_gpu.Model(train_gpu.Knobs(**TINY | more)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model


def test_zeroing_all_slots_is_the_model_without_its_memory_and_leaves_no_trace():
    model, off = random_model(n_layer=2), random_model(n_layer=2, memory="off")
    s = tasks.mqar(np.random.default_rng(9), 6, 48, A, 4)
    x_BT, y_BT = recall_training.tensors(s, ONE)
    before = slots_of.sequence_losses(model, x_BT, y_BT)
    heads, slots = slots_of.slot_statistics(model, x_BT, y_BT)
    without = slots_of.sequence_losses(off, x_BT, y_BT)
    assert (
        heads[-1]["loss_change"] == pytest.approx((without - before).mean(), abs=1e-6)
        and heads[-1]["layer"] is None
    )
    assert abs(heads[-1]["loss_change"]) > 1e-3, (
        "the memory does nothing here, so nothing was tested"
    )
    assert (slots_of.sequence_losses(model, x_BT, y_BT) == before).all()
    assert len(slots) == 2 * 2 * 4 and len(
        {(r["layer"], r["head"], r["slot"]) for r in slots}
    ) == len(slots)
    assert len({r["loss_change"] for r in slots}) > 8
    assert [r["head"] for r in heads] == [0, 1, 0, 1, None, None, None]


def test_zeroing_the_only_slot_of_all_heads_is_zeroing_the_layer():
    model = random_model(num_slots=1, n_head=1)
    x_BT, y_BT = recall_training.tensors(tasks.mqar(np.random.default_rng(9), 6, 48, A, 4), ONE)
    heads, slots = slots_of.slot_statistics(model, x_BT, y_BT)
    assert slots[0]["loss_change"] == heads[-1]["loss_change"] != 0


# ----------------------------------------------------------------------------
# The program


def run(monkeypatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["recall_bench.py", *flags])
    return program.main()


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> tuple[Path, str]:
    """One pair, four values, so that seconds are enough; and what was printed."""
    out = tmp_path_factory.mktemp("recall")
    flags = "--pairs=1 --length=12 --keys=4 --values=4 --fillers=2 --steps=60 --warmup=5 --learning_rates=1e-2,1e-5"
    flags += " --hidden_dim=32 --hcm_dim=32 --num_layers=2 --num_slots=4 --sequences=100 --slot_sequences=8 --seeds=1"
    flags += f" --curve_every=60 --out={out}"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        for module in (program, recall_tables):
            patch.setattr(module, "show", lambda line="": lines.append(line))
        assert run(patch, *flags.split()) == 0
    return out, "\n".join(lines)


def test_the_memory_learns_to_recall_and_without_it_there_is_chance(learned):
    means = json.loads((learned[0] / "result.json").read_text())["over_seeds"]
    found = {r["mixer"]: r for r in means if r["against"] == "length" and r["eval_length"] == 12}
    assert found["hamt"]["low"] > 0.5 and found["hamt"]["queries"] == 100
    assert found["zero"]["low"] < 0.25 < found["zero"]["high"]


def test_the_best_rate_of_each_mixer_is_shown_and_all_are_kept(learned):
    with open(learned[0] / "results.csv") as file:
        rows = list(csv.DictReader(file))
    result = json.loads((learned[0] / "result.json").read_text())
    assert {(r["mixer"], float(r["learning_rate"])) for r in rows} == {
        (m, rate) for m in ("hamt", "zero", "attention") for rate in (1e-2, 1e-5)
    }
    assert result["chosen"]["hamt"] == 1e-2
    shown = {(r["mixer"], float(r["learning_rate"])) for r in rows if r["chosen"] == "1"}
    assert shown == set(result["chosen"].items())
    assert {r["against"] for r in rows} == {"pairs", "length", "distance"}
    assert {r["eval_length"] for r in rows if r["against"] == "length"} == {"12", "24", "48"}
    assert all(0 <= float(r["low"]) <= float(r["accuracy"]) <= float(r["high"]) <= 1 for r in rows)


def test_rates_are_tried_on_few_seeds_and_the_best_has_all(monkeypatch):
    """A model's accuracy here is its rate."""

    def trained(b, mixer, rate, seed, w):
        return recall_training.Trained(mixer, rate, seed, None, 1, 0.0, 0.0, [(1, rate)])

    monkeypatch.setattr(program, "train", trained)
    b = recall_knobs.Bench(learning_rates="0.1,0.3,0.2", rate_seeds=1, mixers="hamt,attention")
    found = [(m.mixer, m.seed, m.rate) for m in program.train_all(b, ONE)]
    for mixer in ("hamt", "attention"):
        own = [(seed, rate) for name, seed, rate in found if name == mixer]
        assert own == [(0, 0.1), (0, 0.3), (0, 0.2), (1, 0.3), (2, 0.3)]


def test_what_was_run_is_stated_with_its_budget(learned):
    out, text = learned
    result = json.loads((out / "result.json").read_text())
    assert (
        result["flags"]["steps"] == 60 and result["torch"] == torch.__version__ and result["device"]
    )
    assert all(m["cpu_s"] > 0 and m["n_params"] > 0 for m in result["models"])
    assert (
        "60 steps, 1,920 sequences" in text
        and "chance 0.2500" in text
        and "parameters differ by" in text
    )
    names = {"pairs", "length", "distance_12", "distance_24", "distance_48", "learning"}
    pictures = {f"mqar_{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {p.name for p in out.iterdir()} == pictures | {"results.csv", "slots.csv", "result.json"}


def test_all_mixers_have_the_same_size_within_3_percent():
    sizes = []
    for mixer in recall_knobs.MIXERS:
        k = recall_knobs.model_knobs(recall_knobs.Bench(), mixer, 1e-3, 0)
        sizes.append(sum(p.numel() for p in train_gpu.Model(k).parameters()))
        expected = dict(zero="off", local="local").get(mixer, "on")
        assert k.memory == expected and (k.mixer == "attention") == mixer.startswith("attention")
        assert k.has_conv == (mixer != "attention")
    assert sizes[0] == sizes[1] == sizes[2] and max(sizes) / min(sizes) < 1.03


def test_more_knobs_of_the_trainer_reach_it():
    k = recall_knobs.model_knobs(
        recall_knobs.Bench(model="use_gating=0 num_slots=7"), "hamt", 1e-3, 0
    )
    assert k.use_gating is False and k.num_slots == 7 and k.n_embd == 64


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--mixers=hamt,gru", "no mixer 'gru'"),
        ("--pairs=50 --length=128", "tokens"),
        ("--pairs=65 --length=999", "keys"),
        ("--learning_rates=fast", "expected numbers"),
        ("--learning_rates=-1", "above 0"),
        ("--eval_pairs=0", "1 or more"),
        ("--task=mqr", "did you mean mqar"),
        ("--model=use_gating", "name=value"),
        ("--model=num_slot=3", "num_slots"),
        ("--run=nowhere", "no run 'nowhere'"),
    ],
)
def test_a_bad_flag_is_one_line_that_says_what_is_wrong(monkeypatch, tmp_path, flags, words):
    with pytest.raises(UserError, match=words) as error:
        run(monkeypatch, *flags.split(), f"--logs_folder={tmp_path}", f"--out={tmp_path}")
    assert "\n" not in str(error.value)


def text_run(folder: Path, **knobs: object) -> None:
    """A run called 'made' with one checkpoint of random weights, on a text of its own."""
    (folder / "text.txt").write_text(
        "\n\n".join(f"paragraph {i} of a text about nothing" for i in range(400))
    )
    values = TINY | dict(vocab_size=None, tokenizer="bytes", data=str(folder / "text.txt"))
    model = random_model(**values | dict(data_folder=str(folder / "data")) | knobs)
    state = dict(
        model=model.state_dict(),
        knobs=json.loads(plumbing.knobs_json(model.cfg)),
        step=3,
        progress=dict(val_loss=5.5),
    )
    (folder / "logs/made").mkdir(parents=True)
    state |= dict(trainer="train_gpu", world_size=1, code_sha256="")
    plumbing.save_checkpoint(folder / "logs/made", 3, state, ONE, keep=2)


def test_slots_of_a_text_checkpoint_are_measured_on_its_own_text(monkeypatch, tmp_path, capsys):
    text_run(tmp_path)
    flags = [
        "--run=made",
        f"--logs_folder={tmp_path / 'logs'}",
        "--slot_sequences=4",
        f"--out={tmp_path / 'out'}",
    ]
    assert run(monkeypatch, *flags) == 0
    found = json.loads((tmp_path / "out/result.json").read_text())
    assert found["sequences"] == 4 and found["tokens"] == 64 and found["val_loss"] == 5.5
    assert len(found["slots"]) == 2 + 2 and 1 <= found["slots"][0]["rank_entropy"] <= 4
    assert "all layers all slots zeroed" in capsys.readouterr().out
    assert (tmp_path / "out/slots.csv").read_text().count("\n") == 1 + 2 * 4


@pytest.mark.parametrize(
    "knobs, words",
    [(dict(mixer="attention"), "no holographic"), (dict(memory="off"), "never read")],
)
def test_a_run_without_a_memory_has_no_slots_to_measure(monkeypatch, tmp_path, knobs, words):
    text_run(tmp_path, **knobs)
    with pytest.raises(UserError, match=words):
        run(
            monkeypatch,
            "--run=made",
            f"--logs_folder={tmp_path / 'logs'}",
            f"--out={tmp_path / 'out'}",
        )
