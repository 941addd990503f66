"""HAMT: the memory against a loop written out, its algebra, training, evaluation and what a user can get wrong."""

import ast
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys

import hamt_support as hamt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hamt_support import KILLED, knobs, lively, loop, plain_attention, run, run_here, tokens
from support import (
    ONE,
    ROOT,
    SHARED,
    command,
    environment,
    losses,
    metrics,
    newest_state,
    rows,
    same_tensors,
)

import plumbing
import train_gpu
from plumbing import Pulse, TokenShards, UserError, World, write_shard
from train_gpu import PRESETS, AdamW, Batches, Knobs, LossScale, Memory, MicroStep, Model, Split

MEMORIES = {
    "phasor": {},
    "untied": dict(tie_keys=False),
    "untied, all bins turn": dict(tie_keys=False, position_share=1.0),
    "no bin turns": dict(position_share=0.0),
    "bipolar": dict(binding="elementwise"),
    "circular": dict(binding="circular_conv"),
    "delta": dict(delta_rule=True),
    "delta without decay": dict(delta_rule=True, decay=False),
    "bipolar delta": dict(delta_rule=True, binding="elementwise", num_attention_heads=1),
    "no decay": dict(decay=False),
    "bare": dict(conv=False, use_gating=False),
    "one slot": dict(num_slots=1, num_attention_heads=3),
}
MODELS = MEMORIES | {
    "hybrid": dict(window_every=2, attention_window=6),
    "attention": dict(mixer="attention"),
    "memory off": dict(memory="off"),
    "memory local": dict(memory="local"),
}


def memory(seed: int = 1, **values) -> Memory:
    return lively(seed, **values).blocks[1].mixer


def vectors(B: int = 2, T: int = 29, C: int = 16) -> torch.Tensor:
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


# ---------------------------------------------------------------- the memory


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("chunk", [1, 4, 8, 29, 128])
def test_the_chunk_form_is_the_loop_for_every_chunk_length(name, chunk):
    mixer, x = memory(chunk_length=chunk, **MEMORIES[name]), vectors()
    state = mixer.empty_state(2)
    found, _, _ = mixer(x, state, torch.zeros((), dtype=torch.long))
    expected = loop(mixer, x)
    assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name", MEMORIES)
def test_gradients_of_the_chunk_form_are_the_loops(name):
    mixer, x = memory(**MEMORIES[name]), vectors().requires_grad_()
    weight = torch.randn(2, 29, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = mixer(x, mixer.empty_state(2), torch.zeros((), dtype=torch.long))[0]
    inputs = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    theirs = torch.autograd.grad((loop(mixer, x) * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-6 and torch.allclose(a, b, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_streaming_in_any_pieces_equals_the_whole(name):
    model, x = lively(**MODELS[name]), tokens(2, 41)
    whole, state, parts = model.logits(x), model.empty_state(2), []
    for part in x.split([1, 1, 9, 16, 1, 13], dim=1):
        logits, state = model.stream(part, state)
        parts.append(logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10
    assert int(state[0]) == 41


def test_a_states_size_does_not_grow_with_the_text():
    model, sizes = lively(), set()
    state = model.empty_state(1)
    for part in tokens(1, 300).split(60, dim=1):
        _, state = model.stream(part, state)
        sizes.add(train_gpu.state_bytes(state))
    per_layer = 2 * 5 * (24 // 2) + 3 * (
        2 * 24 + 2 * 2 * 5
    )  # H * S * E numbers of memory, 3 tokens of convolution
    assert sizes == {2 * 8 * per_layer}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_before_a_changed_token_moves(name):
    model, x = lively(**MODELS[name]), tokens(1, 21)
    before = model.logits(x)
    for t in (0, 5, 7, 8, 13, 20):
        y = x.clone()
        y[0, t] = (y[0, t] + 1) % 256
        after = model.logits(y)
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(
            before[:, t], after[:, t]
        )


@pytest.mark.parametrize("name", ["phasor", "delta", "hybrid", "bipolar"])
def test_nothing_before_a_changed_token_moves_in_the_streaming_form(name):
    model, x = lively(**MODELS[name]), tokens(1, 24)
    y = x.clone()
    y[0, 14] += 1
    outs = []
    for text in (x, y):
        state, parts = model.empty_state(1), []
        for part in text.split(5, dim=1):
            logits, state = model.stream(part, state)
            parts.append(logits)
        outs.append(torch.cat(parts, 1))
    assert torch.equal(outs[0][:, :14], outs[1][:, :14]) and not torch.equal(
        outs[0][:, 14:], outs[1][:, 14:]
    )


def test_binding_is_circular_convolution():
    rng = torch.Generator().manual_seed(0)
    n = 12
    key, item = (
        torch.rand(n, generator=rng).double() * 6,
        torch.randn(2 * n, generator=rng).double(),
    )
    spectrum = torch.exp(1j * key)
    a, b = torch.fft.ifft(spectrum), torch.fft.ifft(torch.complex(item[:n], item[n:]))
    direct = torch.stack([sum(a[i] * b[(t - i) % n] for i in range(n)) for t in range(n)])
    found = train_gpu.turn(item, train_gpu.phasor(key))
    expected = torch.fft.fft(direct)
    assert torch.allclose(found, torch.cat([expected.real, expected.imag]), atol=1e-12)


@pytest.mark.parametrize("binding", train_gpu.BINDINGS)
def test_the_conjugate_key_undoes_a_key_exactly(binding):
    mixer, phase = memory(binding=binding), torch.randn(7, 2, 6, dtype=torch.float64)
    at = torch.arange(7)
    key = mixer.key(phase, at + 100, at, read=False)
    item = torch.randn(7, 2, 12, dtype=torch.float64)
    assert torch.allclose(
        train_gpu.turn(train_gpu.turn(item, key), train_gpu.conj(key)), item, atol=1e-6
    )
    assert (train_gpu.turn(item, key) - item).abs().max() > 0.5
    # a fixed key belongs to its position: head h reads with the one of h + 1 tokens before
    if binding != "phasor":
        read = mixer.key(None, at + 100, at, read=True)
        for h in range(2):
            earlier = mixer.key(None, at + 100 - h - 1, at, read=False)
            assert all(torch.equal(a[:, h], b[:, h]) for a, b in zip(read, earlier, strict=True))


def test_an_item_stored_alone_is_read_back_unharmed_at_any_distance():
    """What the write key bound, a query of the same content phase at the item's distance unbinds: addressing is
    relative, and only the phase of the distance is left."""
    mixer = memory(num_attention_heads=1, hcm_dim=24, decay=False)
    item = torch.zeros(1, 20, 1, 24, dtype=torch.float64)
    item[:, 3] = torch.randn(24, dtype=torch.float64)
    phase, address = torch.randn(12, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    address[2] = 1
    same = lambda t: t.expand(1, 20, 1, -1)
    parts = dict(
        item=item, key=same(phase), query=same(phase), write=same(address), read=same(address)
    )
    mixer.k = dataclasses.replace(mixer.k, chunk_length=4)
    r, _, _ = mixer.recall(parts, mixer.empty_state(1)[0], torch.zeros((), dtype=torch.long))
    for t in range(20):
        turned = train_gpu.turn(item[0, 3, 0], train_gpu.phasor(mixer.omega * (3 - t)))
        assert torch.allclose(
            r[0, t, 0], turned if t >= 3 else torch.zeros_like(turned), atol=1e-10
        )


def test_the_strongest_decay_over_the_longest_chunk_stays_finite_and_exact():
    model = lively(chunk_length=128)
    for block in model.blocks:
        block.mixer.decay.data.fill_(40.0)  # MAX_DECAY in every token
    x = tokens(1, 256)
    exact = model.logits(x)
    found = model.float().logits(x)
    assert found.isfinite().all()
    assert (
        found - exact
    ).abs().max() < 1e-2  # sums of decay reach 128, where fp32 has steps of 1e-5
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    factors = train_gpu.decay_factors(torch.full((128, 3), -train_gpu.MAX_DECAY))
    assert max(f.log().abs().max() for f in factors[:3]) <= 64


def test_phases_do_not_drift_over_a_long_stream():
    model, x = lively(num_layers=1, chunk_length=64, decay=False), tokens(1, 6000)
    exact = model.logits(x)[:, -50:]
    assert (model.float().logits(x)[:, -50:] - exact).abs().max() < 2e-3 * exact.abs().max()


def test_without_its_memory_the_model_sees_one_token():
    model, x = lively(memory="off"), tokens(1, 20)
    shuffled = x[:, torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    shuffled[0, -1] = x[0, -1]
    assert torch.equal(model.logits(x)[:, -1], model.logits(shuffled)[:, -1])
    assert not torch.allclose(lively().logits(x)[:, -1], lively().logits(shuffled)[:, -1])


@pytest.mark.parametrize("window", [None, 6])
def test_attention_is_the_formula_written_out(window):
    values = (
        dict(mixer="attention") if window is None else dict(window_every=1, attention_window=window)
    )
    mixer, x = lively(**values).blocks[0].mixer, vectors()
    found = mixer(x, mixer.empty_state(2), torch.zeros((), dtype=torch.long))[0]
    assert (found - plain_attention(mixer, x)).abs().max() < 1e-6


# ---------------------------------------------------------------- sizes and knobs


def count(**values) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Model(Knobs(**values)).parameters())


@pytest.mark.parametrize("preset", [p for p in PRESETS if p[0].isdigit()])
def test_a_preset_has_the_size_it_names_and_so_has_its_transformer(preset):
    named = 1e6 * float(preset.rstrip("m"))
    ours, theirs = count(**PRESETS[preset]), count(**PRESETS[preset], mixer="attention")
    assert (
        abs(ours / named - 1) < 0.03
        and abs(theirs / named - 1) < 0.03
        and abs(theirs / ours - 1) < 0.03
    )


SEED = (
    "--hidden_dim 512 --hcm_dim 2048 --num_layers 8 --num_slots 16 --dataset wikitext-103 --max_seq_length 1024 "
    "--batch_size 128 --num_epochs 10 --learning_rate 3e-4 --mixed_precision bf16 --compile_model --use_wandb "
    "--output_dir outputs/hamt_100m --run_name hamt-100m"
).split()
REST = (  # of the original's flags
    "--dropout 0.1 --use_gating --use_auxiliary_loss --aux_loss_weight 0.1 --use_scheduler --weight_decay 0.01 "
    "--grad_clip 1.0 --gradient_checkpointing --num_workers 4 --save_steps 1000 --save_epochs --wandb_project p "
    "--max_train_samples 5 --max_val_samples 5"
).split()


def test_the_seeds_command_and_every_original_flag_are_accepted_without_a_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpu.py"), *SEED, *REST, "--data_folder", str(tmp_path), "--dry_run"],
        env=environment(CUDA_VISIBLE_DEVICES=""), cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        re.search(r"^parameters: +73,106,944$", done.stdout, re.M)
        and "tokens per step: 131,072" in done.stdout
    )
    assert "wikitext-103-raw-v1 is not there yet" in done.stdout and not list(tmp_path.iterdir())


def test_flags_do_what_they_say(monkeypatch):
    k = plumbing.read_knobs(Knobs, PRESETS, [*SEED, *REST], {})
    assert (k.compile, k.run_id, k.save_every, k.use_wandb, k.gradient_checkpointing) == (
        True,
        "hamt-100m",
        1000,
        1,
        1,
    )
    assert (
        k.logs_folder == "outputs/hamt_100m" and k.learning_rate == 3e-4 and k.vocabulary == 50304
    )
    off = "--no_use_gating --no-decay --no-conv --no-use-scheduler --no-save-epochs --lr 1 --sequence_length 9".split()
    k = plumbing.read_knobs(Knobs, PRESETS, [*off, "--max_steps", "7"], {})
    assert not any((k.use_gating, k.decay, k.conv, k.use_scheduler, k.save_epochs))
    assert (k.learning_rate, k.max_seq_length, k.num_iterations) == (1.0, 9, 7)


def test_no_knob_is_a_prefix_of_torchruns_flags():
    from torch.distributed.run import get_args_parser

    theirs = [
        o.lstrip("-").replace("-", "_")
        for a in get_args_parser()._actions
        for o in a.option_strings
    ]
    ours = [s for f in dataclasses.fields(Knobs) for s in (f.name, *f.metadata["alias"])]
    assert [(a, b) for a in ours for b in theirs if len(b) > 1 and b.startswith(a)] == []


def test_plan_of_a_run_with_data_names_steps_and_epochs(monkeypatch, tmp_path):
    code, out = run_here(monkeypatch, tmp_path, dry_run=1, num_iterations="auto", num_epochs=2)
    steps = int(re.search(r"training tokens: ([\d,]+) in (\d+) steps", out)[2])
    assert (
        code == 0
        and "epochs:          2.00" in out
        and steps > 10
        and "wikitext" not in out.split("}")[1]
    )


# ---------------------------------------------------------------- loss, gradients, optimizer


def step_of(model: Model, **values) -> MicroStep:
    model.k = dataclasses.replace(model.k, **values)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return MicroStep(model, model.k, ONE)


def autograd(model: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model.logits(x).flatten(0, 1), y.flatten())


@pytest.mark.parametrize("rows_at_once", [16, 33, 1000])
@pytest.mark.parametrize("name", ["phasor", "attention"])
def test_the_chunked_head_gives_autograds_loss_and_gradients(monkeypatch, rows_at_once, name):
    monkeypatch.setitem(train_gpu.LOSS_ROWS, "cpu", rows_at_once)
    model, x, y = lively(double=False, **MODELS[name]), tokens(3, 20), tokens(3, 20, seed=1)
    loss = autograd(model, x, y)
    loss.mul(0.25).backward()
    theirs = {n: p.grad.clone() for n, p in model.named_parameters()}
    step = step_of(model)
    for scale in (1.0, 1024.0):
        for p in model.parameters():
            p.grad.fill_(1.0)  # it adds to what is there
        found, aux, _ = step.backward(x, y, 0.25, torch.tensor(scale))
        assert torch.allclose(found, loss, rtol=1e-6) and aux == 0
        for n, p in model.named_parameters():
            error = ((p.grad - 1) / scale - theirs[n]).abs().max()
            assert error < 3e-6 + 1e-4 * theirs[n].abs().max(), n
    assert torch.allclose(step.loss_sum(x, y)[0], 60 * loss.double(), rtol=1e-6)


@pytest.mark.parametrize("name", ["phasor", "delta", "hybrid", "attention"])
def test_gradient_checkpointing_changes_no_gradient(name):
    grads, x = [], tokens(2, 24)
    for on in (False, True):
        model = lively(double=False, dropout=0.2, **MODELS[name])
        step = step_of(model, gradient_checkpointing=on)
        torch.manual_seed(5)
        step.backward(x[:, :-1], x[:, 1:], 1.0, torch.ones(()))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*grads, atol=1e-7, rtol=1e-5) and grads[0].abs().max() > 0.01


def test_gradient_checkpointing_keeps_less(monkeypatch):
    kept, x = [], tokens(2, 64)
    for on in (False, True):
        model, sizes = lively(double=False, gradient_checkpointing=on), []
        keep = lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model.logits(x)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


def test_the_auxiliary_loss_is_blind_to_scale_and_falls_with_recall():
    mixer, x = memory(use_auxiliary_loss=True), vectors(T=40)
    zero = torch.zeros((), dtype=torch.long)

    def aux() -> float:
        torch.manual_seed(0)
        return mixer(x, mixer.empty_state(2), zero)[2].item()

    before = aux()
    rows = slice(0, mixer.D)  # of the items
    mixer.inp.data[rows] *= 1e-3
    assert 0.2 < before < 2 and abs(aux() - before) < 1e-9
    mixer.eval()
    assert aux() == 0, "only in training"
    # one item in the whole text: it is found again whatever was written since
    mixer = memory(num_attention_heads=1, decay=False, use_auxiliary_loss=True)
    item = torch.zeros(1, 16, 1, 24, dtype=torch.float64)
    item[:, :8] = torch.randn(24, dtype=torch.float64) * (torch.arange(8) == 2)[:, None, None]
    one = torch.ones(1, 16, 1, 5, dtype=torch.float64) / 5
    phase = torch.randn(1, 16, 1, 12, dtype=torch.float64)
    state = torch.stack([torch.zeros(1, 1, 5, 24).double(), mixer.empty_state(1)[0]], 2)
    parts = dict(item=item, key=phase, query=phase, write=one, read=one)
    _, state, _ = mixer.recall(
        {n: p[:, :8] for n, p in parts.items()}, mixer.empty_state(1)[0], zero
    )
    before = torch.stack([torch.zeros_like(state), state], dim=2)
    for seed in range(30):
        torch.manual_seed(seed)
        at = int((torch.rand(1, 1) * 8).long())
        torch.manual_seed(seed)
        found = mixer.delayed_recall(parts, before, zero, 8).item()
        assert abs(found - (0.0 if at == 2 else 1.0)) < 1e-6


def test_the_auxiliary_loss_is_never_in_a_reported_loss_but_trains(monkeypatch, tmp_path):
    for name, on in (("with", 1), ("without", 0)):
        run_here(
            monkeypatch,
            tmp_path,
            run_id=name,
            use_auxiliary_loss=on,
            aux_loss_weight=5.0,
            num_iterations=2,
        )
    first = [metrics(tmp_path, name) for name in ("with", "without")]
    assert (
        first[0][1]["train_loss"] == first[1][1]["train_loss"]
        and first[0][0]["val_loss"] == first[1][0]["val_loss"]
    )
    assert first[0][2]["train_loss"] != first[1][2]["train_loss"]
    assert 0.1 < float(first[0][1]["aux_loss"]) < 2 and first[1][1]["aux_loss"] == ""


def flat(nested) -> list[torch.Tensor]:
    """The tensors and numbers of nested dicts and lists."""
    if isinstance(nested, dict | list):
        return [
            t
            for part in (nested.values() if isinstance(nested, dict) else nested)
            for t in flat(part)
        ]
    return [nested]


def same(a, b) -> bool:
    return all(same_tensors(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def small_adam(**values) -> tuple[Model, AdamW]:
    model = lively(double=False, **values)
    return model, AdamW(model, model.k, ONE)


def test_adamw_is_torchs_with_decay_of_matrices_only_and_clipping():
    model, adam = small_adam(weight_decay=0.1, grad_clip=0.5)
    plain = lively(double=False)
    decayed = {
        n for n, p in plain.named_parameters() if p.dim() == 2 and not n.endswith(("taps", "decay"))
    }
    assert any(n.endswith("wte") for n in decayed) and not any("norm" in n for n in decayed)
    params = dict(plain.named_parameters())
    groups = [
        dict(params=[p for n, p in params.items() if (n in decayed) == on], weight_decay=0.1 * on)
        for on in (True, False)
    ]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    for step, scale in enumerate((1.0, 256.0, 1.0, 64.0)):
        adam.grads.zero_()
        for name, p in model.named_parameters():
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) * (
                0.02 if step == 2 else 1.0
            )
            p.grad.copy_(g * scale)
            params[name].grad = g
        norms = adam.reduce(torch.tensor(scale))
        norm = norms.square().sum().sqrt()
        assert torch.allclose(
            norm, torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5), rtol=1e-4
        )
        adam.step(0.01, norm, torch.tensor(scale), torch.tensor(True))
        theirs.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, params[name], atol=2e-5), name


def test_a_step_that_is_not_ok_moves_neither_weights_nor_moments_nor_adams_count():
    model, adam = small_adam()
    adam.grads.fill_(0.1)
    adam.step(0.01, torch.tensor(1.0), torch.tensor(1.0), torch.tensor(True))
    before = [p.detach().clone() for p in model.parameters()], adam.state_dict()
    adam.grads.fill_(float("inf"))
    adam.step(0.01, torch.tensor(float("inf")), torch.tensor(1.0), torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
    assert same(before[1], adam.state_dict()) and before[1]["step"][0] == 1


def test_the_loss_scale_halves_on_overflow_and_doubles_after_2000_good_steps():
    scale = LossScale(dataclasses.replace(knobs(), device="cuda", mixed_precision="fp16"), ONE)
    scale.update(torch.tensor(False))
    assert scale.scale == 32768
    for _ in range(1999):
        scale.update(torch.tensor(True))
    assert scale.scale == 32768
    saved = scale.state_dict()
    scale.update(torch.tensor(True))
    assert scale.scale == 65536
    scale.load_state_dict(saved)
    scale.update(torch.tensor(True))
    assert scale.scale == 65536, "the count of good steps is part of the state"
    off = LossScale(knobs(), ONE)
    off.update(torch.tensor(False))
    assert off.scale == 1


def test_the_rate_warms_up_and_falls_to_a_tenth_along_a_cosine():
    k = knobs(warmup_iters=10)
    rates = [train_gpu.lr_scale(s, k, 110) for s in (0, 4, 9, 10, 60, 110, 500)]
    assert np.allclose(rates, [0.1, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
    assert train_gpu.lr_scale(90, knobs(warmup_iters=10, use_scheduler=False), 110) == 1
    assert train_gpu.lr_scale(0, knobs(), 1000) == 1 / 20, "2% of the steps"


# ---------------------------------------------------------------- data


def stream(folder, n: int = 1000) -> TokenShards:
    write_shard(folder / "s_000000.bin", (np.arange(n) % 256).astype(np.uint16))
    return TokenShards(str(folder / "s_*.bin"))


def test_an_epoch_uses_every_sequence_once_in_an_order_of_its_own(tmp_path):
    k = knobs(max_seq_length=10, batch_size=9)
    batches = Batches(stream(tmp_path), k, ONE)
    assert batches.sequences == 99 and batches.epoch_steps == 11
    epochs = [
        [s for step in range(e * 11, e * 11 + 11) for s in batches.starts(step)] for e in (0, 1)
    ]
    assert (
        sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 990, 10)) and epochs[0] != epochs[1]
    )
    x, y = batches.make(3)
    assert (
        x.shape == (9, 10)
        and torch.equal(x[:, 1:], y[:, :-1])
        and int(x[0, 0]) == batches.starts(3)[0] % 256
    )
    assert (
        Batches(stream(tmp_path), dataclasses.replace(k, max_train_samples=18), ONE).epoch_steps
        == 2
    )


@pytest.mark.parametrize("carry", [False, True])
def test_any_number_of_ranks_reads_the_same_sequences(tmp_path, carry):
    k = knobs(max_seq_length=10, batch_size=12, carry_state=carry)
    one = Batches(stream(tmp_path), k, ONE)
    for step in (0, 5, 13):
        parts = [
            Batches(stream(tmp_path), k, World(r, 3, torch.device("cpu"))).starts(step)
            for r in range(3)
        ]
        assert [s for part in parts for s in part] == one.starts(step)


def test_with_a_carried_state_each_row_goes_on_where_it_stopped(tmp_path):
    batches = Batches(
        stream(tmp_path), knobs(max_seq_length=10, batch_size=4, carry_state=True), ONE
    )
    assert batches.epoch_steps == 24
    for step in range(23):
        assert [a + 10 for a in batches.starts(step)] == batches.starts(step + 1)
    assert batches.starts(24) == batches.starts(0) == [0, 240, 480, 720]


def test_a_text_is_split_by_paragraph_and_nothing_is_lost(tmp_path):
    text = hamt.write_text(tmp_path).read_text()
    parts = train_gpu.by_paragraph([text])
    sizes = {name: part.count(".") for name, part in parts.items()}
    assert (
        sum(sizes.values()) == text.count(".") and 5 < sizes["val"] < 60 and 5 < sizes["test"] < 60
    )
    assert not set(parts["val"].split("\n\n")) & set(parts["train"].split("\n\n"))


def test_a_folder_of_wikitext_files_keeps_its_splits_and_counts_words_and_bytes(tmp_path):
    for name, words in (("train", 50), ("valid", 7), ("test", 9)):
        (tmp_path / f"wiki.{name}.raw").write_text(" \n = É = \n" + "word " * words + "\n")
    k = knobs(dataset=str(tmp_path), tokenizer="bytes", data_folder=str(tmp_path / "data"))
    splits = train_gpu.open_text(k)
    assert {n: (s.words, s.bytes) for n, s in splits.items()} == {
        "train": (50 + 3 + 3, 11 + 5 * 50 + 1), "val": (7 + 3 + 3, 11 + 5 * 7 + 1), "test": (9 + 3 + 3, 11 + 5 * 9 + 1)
    }  # fmt: skip
    assert bytes(splits["val"].shards.read(0, 8).astype(np.uint8)) == " \n = É".encode() + b" "
    made = list((tmp_path / "data").glob("text-*"))
    assert train_gpu.open_text(k)["val"].shards.paths == splits["val"].shards.paths
    (tmp_path / "wiki.test.raw").write_text("changed text\n")
    assert (
        train_gpu.open_text(k)["test"].bytes == 13
        and len(list((tmp_path / "data").glob("text-*"))) == len(made) + 1
    )


WIKI = SHARED / "data/wikitext2/wiki.train.raw"
BPE = SHARED / "data/gpt2_bpe/tiktoken_cache"


@pytest.mark.skipif(
    not (WIKI.exists() and BPE.exists()), reason="needs ../shared/data/wikitext2 and gpt2_bpe"
)
def test_gpt2_tokens_made_in_pieces_are_those_of_the_whole_text(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(BPE))
    import tiktoken

    text = WIKI.read_text()
    whole = tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert train_gpu.encoder("gpt2")(text).tolist() == whole and len(text) > 2 * 2**20


# ---------------------------------------------------------------- evaluation


def test_windows_score_every_target_once_with_the_context_they_promise():
    assert train_gpu.windows(11, 4, 4) == [(0, 4, 4), (4, 4, 4), (8, 2, 2)]
    assert train_gpu.windows(11, 4, 2) == [(0, 4, 4), (2, 4, 2), (4, 4, 2), (6, 4, 2)]
    assert train_gpu.windows(10, 4, 2) == [(0, 4, 4), (2, 4, 2), (4, 4, 2), (6, 3, 1)]
    for window, stride in ((4, 4), (5, 2), (7, 1), (50, 50)):
        scored = [
            start + n - i
            for start, n, s in train_gpu.windows(23, window, stride)
            for i in range(s, 0, -1)
        ]
        assert scored == list(range(22))


def split_of(folder, n: int = 101, words: int = 20, byte_count: int = 120) -> Split:
    write_shard(folder / "v_000000.bin", tokens(1, n)[0].numpy().astype(np.uint16))
    return Split(TokenShards(str(folder / "v_*.bin")), words, byte_count)


def test_perplexities_by_hand(tmp_path):
    model, split = lively(double=False), split_of(tmp_path, 101, 20, 120)
    model.wte.data.zero_()  # every token has probability 1/256
    found = train_gpu.perplexity(step_of(model), split, 3, ONE, 16, 16)
    assert found.tokens == 100 and math.isclose(found.nats, 100 * math.log(256), rel_tol=1e-6)
    assert math.isclose(found.ppl, 256, rel_tol=1e-5) and math.isclose(
        found.loss, math.log(256), rel_tol=1e-6
    )
    # 101 tokens stand for 20 words and 120 bytes; 100 of them are scored
    assert math.isclose(found.word_ppl, 256 ** (101 / 20), rel_tol=1e-5)
    assert math.isclose(found.bits_per_byte, 8 * 101 / 120, rel_tol=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (200, 200)])
def test_a_token_is_scored_from_its_window_and_nothing_else(tmp_path, window, stride):
    model, split = lively(double=False), split_of(tmp_path)
    text, nats = torch.from_numpy(split.shards.read(0, 101).astype(np.int64)), 0.0
    for start, n, scored in train_gpu.windows(101, window, stride):
        logp = model.logits(text[None, start : start + n])[0].log_softmax(-1)
        nats -= sum(logp[i, text[start + i + 1]].item() for i in range(n - scored, n))
    for micro in (1, 4):
        found = train_gpu.perplexity(step_of(model), split, micro, ONE, window, stride)
        assert math.isclose(found.nats, nats, rel_tol=1e-5) and found.tokens == 100


def test_streaming_scores_every_token_from_all_before_it(tmp_path):
    model, split = lively(double=False), split_of(tmp_path)
    text = torch.from_numpy(split.shards.read(0, 101).astype(np.int64))
    whole = F.cross_entropy(model.logits(text[None, :-1])[0], text[1:], reduction="sum").item()
    for chunk in (7, 32, 300):
        found = train_gpu.streaming(step_of(model), split, ONE, chunk)
        assert math.isclose(found.nats, whole, rel_tol=1e-5) and found.tokens == 100


def test_evaluation_has_no_dropout(tmp_path):
    model, split = lively(double=False, dropout=0.5), split_of(tmp_path)
    model.train()
    a, b = (train_gpu.perplexity(step_of(model), split, 2, ONE, 16, 16).nats for _ in range(2))
    assert a == b and model.training


# ---------------------------------------------------------------- runs


def test_a_run_learns_and_its_record_holds_the_conventions(monkeypatch, tmp_path):
    code, out = run_here(
        monkeypatch, tmp_path, run_id="a", num_iterations=40, val_every=20, final_test=1
    )
    row, m = rows(tmp_path)[0], metrics(tmp_path, "a")
    assert code == 0 and float(m[40]["val_loss"]) < float(m[0]["val_loss"]) - 1.5
    assert re.search(
        r"step:40/40 val_loss:\S+ .* ppl:\S+ bits_per_byte:\S+ window:32 stride:32", out
    )
    assert re.search(
        r"test_loss:\S+ nats:\S+ tokens:\d+ ppl:\S+ word_ppl:\S+ bits_per_byte:\S+ window:32 stride:32",
        out,
    )
    assert (
        "val_stream_loss" in out
        and "tokens_per_s:" in out
        and "memory:" in out
        and "parameters: " in out
    )
    assert list(row) == train_gpu.RESULTS and row["mixer"] == "hamt" and row["status"] == "finished"
    assert float(row["val_ppl"]) == pytest.approx(math.exp(float(row["final_val_loss"])))
    bits = float(row["val_bits_per_byte"]) * math.log(2)
    assert bits == pytest.approx(float(row["final_val_loss"]), rel=1e-3), "a token is a byte"
    assert abs(float(row["test_stream_loss"]) - float(row["test_loss"])) < 0.5


def test_a_hybrid_is_called_one_and_an_attention_run_attention(monkeypatch, tmp_path):
    for i, extra in enumerate((dict(window_every=2), dict(mixer="attention"))):
        _, out = run_here(monkeypatch, tmp_path, run_id=f"r{i}", num_iterations=1, **extra)
        assert f"mixer: {'hybrid' if i == 0 else 'attention'}, FFN width" in out
    assert [r["mixer"] for r in rows(tmp_path)] == ["hybrid", "attention"]


@pytest.mark.parametrize("extra", [dict(dropout=0.2, use_auxiliary_loss=1), dict(carry_state=1)])
def test_a_killed_run_resumes_and_ends_bitwise_as_the_straight_one(monkeypatch, tmp_path, extra):
    run_here(monkeypatch, tmp_path, run_id="straight", **extra)
    done = run([sys.executable, "-c", KILLED.format(step=7)], tmp_path, run_id="killed", **extra)
    assert done.returncode == -signal.SIGKILL, done.stderr
    _, out = run_here(monkeypatch, tmp_path, run_id="killed", **extra)
    assert "resumed step:4" in out
    a, b = newest_state(tmp_path, "straight"), newest_state(tmp_path, "killed")
    assert losses(tmp_path, "straight") == losses(tmp_path, "killed")
    assert all(
        same(a[key], b[key]) for key in ("model", "adam", "scale", "rows", "step", "best_loss")
    )
    assert bool(a["rows"]) == bool(extra.get("carry_state"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A run on two ranks that carries its state, and stops after 8 of 12 steps."""
    folder = tmp_path_factory.mktemp("two")
    done = run(command(2, "train_gpu.py"), folder, run_id="two", carry_state=1)
    assert done.returncode == 0, done.stderr
    return folder


def test_one_and_two_ranks_agree_within_rounding(monkeypatch, two_ranks):
    run_here(monkeypatch, two_ranks, run_id="one", carry_state=1)
    a, b = (
        np.array([[float(v) for v in pair if v] for pair in losses(two_ranks, r)[1::4]])
        for r in ("one", "two")
    )
    assert a.shape == b.shape and np.abs(a - b).max() < 1e-4
    one, two = (newest_state(two_ranks, r)["rows"] for r in ("one", "two"))
    for x, y in zip(flat(one), flat(two), strict=True):
        assert x.shape == y.shape and torch.allclose(x.float(), y.float(), atol=1e-3)


def test_one_rank_goes_on_where_two_stopped(monkeypatch, two_ranks):
    """The carried rows of two ranks' checkpoint are dealt out to one."""
    folder = two_ranks / "logs/two"
    state = sorted(folder.glob("step_??????"))
    assert len(state) == 3
    other = two_ranks / "logs/again"
    other.mkdir(exist_ok=True)
    os.rename(state[1], other / "step_000008")
    _, out = run_here(monkeypatch, two_ranks, run_id="again", carry_state=1)
    assert "resumed step:8 from a checkpoint written by 2 rank(s)" in out
    again, two = metrics(two_ranks, "again"), metrics(two_ranks, "two")
    for step in (9, 10, 11, 12):
        assert abs(float(again[step]["train_loss"]) - float(two[step]["train_loss"])) < 1e-4


def test_a_micro_batch_changes_memory_not_training(monkeypatch, tmp_path):
    for name, micro in (("a", 8), ("b", 2)):
        run_here(monkeypatch, tmp_path, run_id=name, device_batch_size=micro, carry_state=1)
    a, b = ([float(t) for t, _ in losses(tmp_path, name)[1:]] for name in "ab")
    assert np.abs(np.subtract(a, b)).max() < 1e-4


def test_a_carried_state_is_used_and_no_gradient_flows_into_it(monkeypatch, tmp_path):
    model, x = lively(double=False), tokens(2, 33)
    step = step_of(model)
    _, _, state = step.backward(x[:, :16], x[:, 1:17], 1.0, torch.ones(()))
    assert all(not t.requires_grad for layer in state[1:] for t in layer)
    cold, _, _ = step.backward(x[:, 16:32], x[:, 17:33], 1.0, torch.ones(()))
    warm, _, _ = step.backward(x[:, 16:32], x[:, 17:33], 1.0, torch.ones(()), state)
    whole = F.cross_entropy(model.logits(x[:, :32])[:, 16:].flatten(0, 1), x[:, 17:33].flatten())
    assert torch.allclose(warm, whole, atol=1e-5) and not torch.allclose(cold, whole, atol=1e-3)


def test_early_stop_time_budget_and_preemption_leave_their_status(monkeypatch, tmp_path):
    code, _ = run_here(
        monkeypatch, tmp_path, run_id="a", early_stop_patience=1, learning_rate=0, val_every=1
    )
    assert (
        code == 0
        and rows(tmp_path)[-1]["status"] == "early_stop"
        and rows(tmp_path)[-1]["steps_done"] == "1"
    )
    code, _ = run_here(
        monkeypatch, tmp_path, run_id="b", max_seconds=0.4, num_iterations=9999, val_every=0
    )
    assert (
        code == 0
        and rows(tmp_path)[-1]["status"] == "finished"
        and int(rows(tmp_path)[-1]["steps_done"]) < 900
    )
    send = Pulse.send

    def stopped(self, step, values_n, clock):
        if step == 3:
            self.w.signals.append(signal.SIGTERM)
        return send(self, step, values_n, clock)

    monkeypatch.setattr(Pulse, "send", stopped)
    code, _ = run_here(monkeypatch, tmp_path, run_id="c")
    assert code == 128 + signal.SIGTERM and rows(tmp_path)[-1]["status"] == "preempted"


def test_a_loss_that_is_not_finite_stops_before_its_update(monkeypatch, tmp_path):
    backward, seen = MicroStep.backward, []

    def bad(self, *args):
        loss, *rest = backward(self, *args)
        seen.append(self.model.wte.detach().clone())
        return loss * (float("nan") if len(seen) == 9 else 1.0), *rest

    monkeypatch.setattr(MicroStep, "backward", bad)
    code, out = run_here(monkeypatch, tmp_path)
    assert code == 1 and "step:5 not finite" in out and rows(tmp_path)[0]["status"] == "nan"
    assert torch.equal(seen[8], seen[-1]) and not torch.equal(seen[6], seen[8])


# ---------------------------------------------------------------- what a user can get wrong


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(dataset="wikitext-3"), "DATASET=wikitext-3: neither wikitext-2"),
        (dict(dataset="/no/such/file.txt"), "no text there"),
        (
            dict(num_attention_heads=5),
            "HCM_DIM=32 must be NUM_ATTENTION_HEADS=5 times an even number",
        ),
        (
            dict(mixer="attention", num_attention_heads=8, hidden_dim=40),
            "HIDDEN_DIM=40 must be NUM_ATTENTION_HEADS=8",
        ),
        (dict(mixer="attention", memory="off"), "MIXER=attention has no memory"),
        (dict(mixer="attention", carry_state=1), "CARRY_STATE"),
        (dict(mixed_precision="fp16"), "fp16 needs a GPU"),
        (dict(binding="xor"), "expected one of phasor, elementwise, circular_conv"),
        (dict(batch_size=100000, device_batch_size=1), "lower one of the two"),
        (dict(device_batch_size=3), "DEVICE_BATCH_SIZE=3 does not divide"),
        (dict(vocab_size=20), "holds token id"),
        (dict(use_wandb=1, tracker="trackio"), "choose one tracker"),
    ],
)
def test_a_mistake_is_named_before_training(monkeypatch, tmp_path, values, words):
    with pytest.raises(UserError, match=re.escape(words)):
        run_here(monkeypatch, tmp_path, **values)
    assert not (tmp_path / "results.csv").exists() or not rows(tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(mixer="attention"), "started with MIXER=hamt, not attention"),
        (dict(vocab_size=300), "VOCAB_SIZE=auto, not 300"),
        (dict(num_slots=8), "NUM_SLOTS=4, not 8"),
    ],
)
def test_a_run_is_not_resumed_as_another_model(monkeypatch, tmp_path, values, words):
    monkeypatch.setattr(plumbing, "DONE", ())
    run_here(monkeypatch, tmp_path, run_id="a", num_iterations=4)
    with pytest.raises(UserError, match=words):
        run_here(monkeypatch, tmp_path, run_id="a", num_iterations=4, **values)


def test_running_out_of_memory_says_what_to_lower(monkeypatch, tmp_path):
    def full(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MicroStep, "backward", full)
    with pytest.raises(
        UserError, match="DEVICE_BATCH_SIZE=4; lower it, set GRADIENT_CHECKPOINTING=1"
    ):
        run_here(monkeypatch, tmp_path)
    assert rows(tmp_path)[0]["status"] == "failed"


def test_without_a_network_wikitext_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpu.py"), *hamt.flags(tmp_path, dataset="wikitext-2")],
        env=environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (
        done.returncode == 2
        and done.stderr.startswith("train_gpu.py: error: ")
        and done.stderr.count("\n") == 1
    )
    assert (
        "Salesforce/wikitext" in done.stderr and "a text file or folder of your own" in done.stderr
    )


def test_parquet_without_pyarrow_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        train_gpu.read_text("wiki/train-00000-of-00001.parquet")


# ---------------------------------------------------------------- the file itself


def test_the_trainer_can_be_read_in_one_sitting():
    text = (ROOT / "train_gpu.py").read_text()
    found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    longest = max(found, key=lambda n: n.end_lineno - n.lineno)
    assert longest.end_lineno - longest.lineno < 60, longest.name
    assert len(text.splitlines()) <= 1410  # docs/design.md says what takes them
