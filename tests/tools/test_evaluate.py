"""evaluate.py: the figures are those that one computes by hand, with every trainer's model."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import evaluate
import pytest
import torch
from lib import harness, runs
from lib.scoring import Scorer
from run_support import ID, make_run
from support import ONE, random_sibling

from plumbing import UserError
from plumbing.checkpoints import save_checkpoint
from plumbing.texts import tokenizer

TEXT = "The gate opens, and the horse goes through the gate again. "
WIDE = dict(vocab_size=256, sequence_length=64, val_tokens=512)


def model_of(trainer: str, folder: Path) -> torch.nn.Module:
    return make_run(folder, **WIDE) if trainer == "train_gpt" else random_sibling(trainer)


def byte_log_probs(model: torch.nn.Module, text: bytes) -> list[float]:
    """By hand: log p of each byte of a text, one forward pass per byte and nothing shared."""
    ids = list(text)
    found = []
    for i, byte in enumerate(ids):
        if runs.trainer_of(model) == "train_scaled":
            before = [ord("\n")] * 4 + ids[:i]
            whole = [*before, 0, 0, 0, 0][: (len(before) + 4) // 4 * 4]
            x_BT = torch.tensor([whole])
            logits_BTV = model.logits(x_BT[:, :-4], x_BT[:, 4:])[0]
            logits_V = logits_BTV[0, i]
        else:
            logits_V = model.logits(torch.tensor([[0, *ids[:i]]]))[0, -1]
        found.append(logits_V.log_softmax(-1)[byte].item())
    return found


TRAINERS = ["train_gpt", "train_gpu", "train_scaled"]


@pytest.mark.parametrize("trainer", TRAINERS)
@torch.no_grad()
def test_a_log_probability_is_that_of_byte_after_byte(trainer, tmp_path):
    model = model_of(trainer, tmp_path)
    scorer = Scorer(model, tokenizer("bytes"), rows=3)
    pairs = [("The gate", " opens"), ("", "Then"), ("A horse and", " a half"), ("x", " y")]
    for (context, ending), (log_prob, _) in zip(pairs, scorer.score(pairs), strict=True):
        by_hand = byte_log_probs(model, (context + ending).encode())[len(context) :]
        assert log_prob == pytest.approx(sum(by_hand), abs=1e-3)


@pytest.mark.parametrize("trainer", TRAINERS)
@torch.no_grad()
def test_what_the_model_itself_goes_on_with_is_greedy_and_nothing_else_is(trainer, tmp_path):
    scorer = Scorer(model_of(trainer, tmp_path), tokenizer("bytes"))
    ids = scorer.encode("The gate ")
    made = []
    for _ in range(3):
        scores = scorer.score_ids([(ids + made, [byte]) for byte in range(256)])
        greedy = [byte for byte, (_, is_greedy) in enumerate(scores) if is_greedy]
        assert greedy == [max(range(256), key=lambda byte: scores[byte][0])]
        made += greedy
    text = bytes(made).decode(errors="replace")
    assert scorer.continue_text("The gate ", [], 3) == text
    assert scorer.continue_text("The gate ", [text[1]], 3) == text[: text.index(text[1])]


@pytest.mark.parametrize("trainer", TRAINERS)
@torch.no_grad()
def test_bits_per_byte_of_a_short_text_are_those_of_byte_after_byte(trainer, tmp_path):
    model = model_of(trainer, tmp_path)
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    found = evaluate.text_bits(Scorer(model, tokenizer("bytes")), str(file), None)
    by_hand = -sum(byte_log_probs(model, TEXT.encode())) / math.log(2) / len(TEXT)
    assert found == {"bytes": len(TEXT), "bits_per_byte": pytest.approx(by_hand, abs=1e-4)}


@torch.no_grad()
def test_a_long_text_is_scored_whole_and_every_token_sees_half_a_window(tmp_path):
    model = make_run(tmp_path, **WIDE)
    text = TEXT * 5
    ids = list(text.encode())
    nats = 0.0
    for i, byte in enumerate(ids):
        before = [0, *ids[:i]]  # the first 63 see all that is before them
        if i >= 63:  # the others come in pieces of 32, whose window of 64 ends with them
            end = min(len(ids), 63 + (i - 63) // 32 * 32 + 32)
            before = ids[end - 64 : i]
        nats -= model.logits(torch.tensor([before]))[0, -1].log_softmax(-1)[byte].item()
    found = Scorer(model, tokenizer("bytes")).text_nats(text)
    assert found == pytest.approx(nats, rel=1e-4)


# Made-up items, and what they must come to when a model likes an ending by the table LIKES.
ITEMS = [
    dict(activity_label="Riding", ctx_a="She [header] sits  up.", ctx_b="the horse", label="1"),
    dict(activity_label="Baking", ctx_a="He takes flour.", ctx_b="", label="0"),
    dict(activity_label="Rowing", ctx_a="They row.", ctx_b="then", label="2"),
]
ENDINGS = [
    ["stops.", "goes on [title] Trot.", "sings it.", "is blue."],
    ["bakes bread.", "flies.", "swims far.", "is red."],
    ["fall.", "rest now.", "row on and on.", "sleep."],
]
LIKES = {
    " stops.": -9.0, " goes on. Trot.": -12.0, " sings it.": -20.0, " is blue.": -30.0,
    " bakes bread.": -8.0, " flies.": -9.0, " swims far.": -20.0, " is red.": -30.0,
    " fall.": -4.0, " rest now.": -6.3, " row on and on.": -11.2, " sleep.": -20.0,
}  # fmt: skip


def test_hellaswag_is_counted_as_by_hand():
    asked = []

    def score(pairs):
        asked.extend(pairs)
        return [(LIKES[ending], False) for _, ending in pairs]

    items = [{**item, "endings": e} for item, e in zip(ITEMS, ENDINGS, strict=True)]
    found = evaluate.hellaswag(SimpleNamespace(score=score), items)
    assert asked[0] == ("Riding: She sits up. The horse", " stops.")
    # By the highest sum: "stops." (wrong), "bakes bread." (right), "fall." (wrong).
    assert found["acc"] == pytest.approx(1 / 3)
    # By character: -9/6 against -12/14 (right), -8/12 against -9/6 (right), and -4/5, -6.3/9 and
    # -11.2/14, of which "rest now." is the highest (wrong).
    assert found["acc_norm"] == pytest.approx(2 / 3)
    assert found["acc_norm_se"] == pytest.approx(math.sqrt(2 / 9 / 2))
    assert found["bits_per_byte"] == pytest.approx(31.2 / math.log(2) / (15 + 13 + 15))


def test_lambada_is_counted_as_by_hand():
    said = {" gate": (-1.0, True), " horse": (-3.0, False)}
    items = [{"text": "It went through the gate"}, {"text": "and there stood\nthe horse"}]
    asked = []

    def score(pairs):
        asked.extend(pairs)
        return [said[word] for _, word in pairs]

    found = evaluate.lambada(SimpleNamespace(score=score), items)
    assert asked == [("It went through the", " gate"), ("and there stood\nthe", " horse")]
    assert (found["acc"], found["perplexity"]) == (0.5, pytest.approx(math.exp(2.0)))
    assert found["bits_per_byte"] == pytest.approx(4.0 / math.log(2) / 11)


def items_file(folder: Path) -> Path:
    path = folder / "items.jsonl"
    items = [{**item, "endings": e} for item, e in zip(ITEMS, ENDINGS, strict=True)]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_the_program_evaluates_a_run_and_writes_what_it_prints(home, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = tmp_path / "figures.json"
    flags = [f"--run={ID}", f"--logs_folder={home / 'logs'}", f"--out={out}", f"--text={text}"]
    make_run(tmp_path, **WIDE)
    flags[:2] = ["--run=made", f"--logs_folder={tmp_path / 'logs'}"]
    evaluate.main([*flags, "--task", f"hellaswag={items_file(tmp_path)}", "--limit=2"])
    said = capsys.readouterr().out
    figures = json.loads(out.read_text())["figures"]
    assert figures["hellaswag"]["items"] == 2 and figures[str(text)]["bytes"] == 2
    assert f"acc_norm {figures['hellaswag']['acc_norm']:.4f}" in said


def test_items_come_from_the_hub_where_no_file_is_given(tmp_path, monkeypatch):
    asked = []

    def fetch(repo, name, path, otherwise):
        asked.append((repo, name))
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"text": "a b"}) + "\n")

    monkeypatch.setattr(evaluate, "hub_fetch", fetch)
    for _ in range(2):  # the second time it is there
        assert evaluate.read_items("lambada", "", tmp_path, None) == [{"text": "a b"}]
    assert asked == [evaluate.HUB["lambada"]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no item"),
        ('{"text": "a b"}', "item 1 has no activity_label, ctx_a, ctx_b, endings, label"),
        ("{", "cannot be read as items of hellaswag"),
    ],
)
def test_a_file_of_other_items_is_refused(tmp_path, content, words):
    file = tmp_path / "items.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=words):
        evaluate.read_items("hellaswag", str(file), tmp_path, None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to do"),
        (["--task", "piqa"], "expected one of hellaswag, lambada"),
        (["--text", "x", "--limit", "0"], "--limit 0: expected 1 or more"),
        (["--harness", "piqa"], "--harness needs lm_eval: pip install lm-eval"),
    ],
)
def test_what_cannot_be_done_is_refused(home, monkeypatch, flags, words):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=words):
        evaluate.main([f"--run={ID}", f"--logs_folder={home / 'logs'}", *flags])


@torch.no_grad()
def test_the_harness_gets_the_same_numbers_and_not_our_program_as_a_package(tmp_path, monkeypatch):
    scorer = Scorer(make_run(tmp_path, **WIDE), tokenizer("bytes"))
    lm_eval, api = ModuleType("lm_eval"), ModuleType("lm_eval.api.model")
    api.LM = object

    def simple_evaluate(model, tasks, limit):
        assert not any(Path(folder).name == "scripts" for folder in sys.path)
        pair = SimpleNamespace(args=("The gate", " opens"))
        assert model.loglikelihood([pair]) == scorer.score([pair.args])
        text = SimpleNamespace(args=(TEXT,))
        assert model.loglikelihood_rolling([text]) == [-scorer.text_nats(TEXT)]
        question = SimpleNamespace(args=("The ", {"until": [], "max_gen_toks": 2}))
        assert model.generate_until([question]) == [scorer.continue_text("The ", [], 2)]
        return {"results": {tasks[0]: {"acc": 0.25, "limit": limit}}}

    lm_eval.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", lm_eval)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", api)
    assert harness.run_harness(scorer, ["piqa"], 7) == {"piqa": {"acc": 0.25, "limit": 7}}


def test_a_checkpoint_of_train_scaled_is_evaluated_from_its_folder(tmp_path, capsys):
    model = random_sibling("train_scaled")
    state = dict(model=model.state_dict(), knobs=dataclasses.asdict(model.cfg))
    state |= dict(trainer="train_scaled", step=3, progress=dict(val_loss=1.0), code_sha256="0")
    save_checkpoint(tmp_path / "logs/made", 3, state, ONE, keep=2)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 9)
    logs = f"--logs_folder={tmp_path / 'logs'}"
    evaluate.main(["--run=made", logs, f"--text={text}"])
    assert f"bytes {len(TEXT) * 9}, bits_per_byte" in capsys.readouterr().out
