"""HAMT's layers: the definition, streaming, causality, sizes, initial weights, dropout."""

import pytest
import torch
from hamt_support import MEMORIES, MODELS, knobs, lively, loop, plain_attention, stream, tokens

import train_gpu
from plumbing.text_batches import dropout_mask
from train_gpu import PRESETS, Knobs, Memory, Model, bind, key_of, unbind

NOWHERE = torch.zeros(2, dtype=torch.long)  # seeds of two rows, where nothing is drawn


def memory(seed: int = 1, **values: object) -> Memory:
    return lively(seed, **values).blocks[1].mixer


def vectors(B: int = 2, T: int = 29, C: int = 16) -> torch.Tensor:
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def output(mixer: torch.nn.Module, x_BTC: torch.Tensor) -> torch.Tensor:
    """Of a mixer that starts with an empty state at position 0."""
    angles = train_gpu.angles_at(mixer.cfg, torch.tensor(0), x_BTC.size(1), x_BTC.dtype)
    return mixer(x_BTC, mixer.empty_state(len(x_BTC)), angles, NOWHERE)[0]


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("chunk", [1, 8, 29, 128])
def test_the_layer_is_its_definition_for_every_chunk_length(name, chunk):
    mixer, x = memory(chunk_length=chunk, **MEMORIES[name]), vectors()
    expected = loop(mixer, x)
    assert expected.std() > 0.1 and (output(mixer, x) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name", MEMORIES)
def test_gradients_of_the_layer_are_its_definitions(name):
    mixer, x = memory(**MEMORIES[name]), vectors().requires_grad_()
    rng = torch.Generator().manual_seed(2)
    weight = torch.randn(2, 29, 16, generator=rng, dtype=torch.float64)
    inputs = [x, *mixer.parameters()]
    ours = torch.autograd.grad((output(mixer, x) * weight).sum(), inputs)
    theirs = torch.autograd.grad((loop(mixer, x) * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-6 and torch.allclose(a, b, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("conv", [False, True])
def test_attention_is_the_formula_written_out(conv):
    mixer, x = lively(mixer="attention", conv=conv).blocks[0].mixer, vectors()
    assert (output(mixer, x) - plain_attention(mixer, x)).abs().max() < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_streaming_in_any_pieces_equals_the_whole(name):
    model, x = lively(**MODELS[name]), tokens(2, 41)
    whole, state, parts = model.logits(x), model.empty_state(2), []
    for part in x.split([1, 1, 9, 16, 1, 13], dim=1):
        logits, state = stream(model, part, state)
        parts.append(logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10
    assert int(state.position) == 41


@pytest.mark.parametrize("name", MODELS)
def test_nothing_before_a_changed_token_moves(name):
    model, x = lively(**MODELS[name]), tokens(1, 21)
    before = model.logits(x)
    for t in (0, 5, 7, 8, 13, 20):
        y = x.clone()
        y[0, t] = (y[0, t] + 1) % 256
        after = model.logits(y)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("name", ["plain", "attention with convolution"])
def test_nothing_before_a_changed_token_moves_in_the_streaming_form(name):
    model, x = lively(**MODELS[name]), tokens(1, 24)
    y = x.clone()
    y[0, 14] = (y[0, 14] + 1) % 256
    outs = []
    for text in (x, y):
        state, parts = model.empty_state(1), []
        for part in text.split(5, dim=1):
            logits, state = stream(model, part, state)
            parts.append(logits)
        outs.append(torch.cat(parts, 1))
    assert torch.equal(outs[0][:, :14], outs[1][:, :14])
    assert not torch.equal(outs[0][:, 14:], outs[1][:, 14:])


def test_a_states_size_does_not_grow_with_the_text():
    model, sizes = lively(), set()
    state = model.empty_state(1)
    for part in tokens(1, 300).split(60, dim=1):
        _, state = stream(model, part, state)
        sizes.add(state.num_bytes)
    per_layer = 2 * 5 * (24 // 2) + 3 * model.cfg.n_embd  # H * S * E, 3 inputs of the convolution
    assert sizes == {2 * 8 * per_layer}


def test_binding_is_circular_convolution():
    rng, n = torch.Generator().manual_seed(0), 12
    key, item = (
        torch.rand(n, generator=rng).double() * 6,
        torch.randn(2 * n, generator=rng).double(),
    )
    a = torch.fft.ifft(torch.exp(1j * key))
    b = torch.fft.ifft(torch.complex(item[:n], item[n:]))
    direct = torch.stack([sum(a[i] * b[(t - i) % n] for i in range(n)) for t in range(n)])
    expected = torch.fft.fft(direct)
    found = torch.cat(bind(item, *key_of(key, torch.float64)))
    assert torch.allclose(found, torch.cat([expected.real, expected.imag]), atol=1e-12)


def test_the_conjugate_key_undoes_a_key_exactly():
    phase, item = torch.randn(7, 6).double(), torch.randn(7, 12).double()
    key = key_of(phase, torch.float64)
    bound = torch.cat(bind(item, *key), dim=-1)
    assert torch.allclose(torch.cat(unbind(bound, *key), dim=-1), item, atol=1e-12)
    assert (bound - item).abs().max() > 0.5


def test_without_its_memory_the_model_sees_one_token():
    model, x = lively(memory="off"), tokens(1, 20)
    shuffled = x[:, torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    shuffled[0, -1] = x[0, -1]
    assert torch.equal(model.logits(x)[:, -1], model.logits(shuffled)[:, -1])
    assert not torch.allclose(lively().logits(x)[:, -1], lively().logits(shuffled)[:, -1])


def test_the_auxiliary_loss_is_blind_to_scale_and_trains_only():
    model, x = lively(use_auxiliary_loss=True), tokens(2, 40)
    aux = lambda: float(model(x, x)[1].detach())
    model.float()
    before = aux()
    for block in model.blocks:
        block.mixer.in_proj.data[: block.mixer.cfg.hcm_dim] *= 1e-3  # the rows that make items
    assert 0.2 < before < 2
    mixer = memory(use_auxiliary_loss=True)
    item = torch.randn(2, 40, 2, 12).double()
    phase = torch.randn(2, 40, 2, 6).double()
    key = key_of(phase, torch.float64)
    write = torch.rand(2, 2, 40, 5).double().softmax(-1)
    decay = -torch.rand(2, 2, 40, 5).double() * 0.01
    found = []
    for scale in (1.0, 1e-3):
        empty = mixer.empty_state(2)[0]
        bound = torch.cat(bind(item * scale, *key), dim=-1).transpose(1, 2)
        written = write, bound, decay, empty
        found.append(float(mixer.delayed_recall(item * scale, key, written, NOWHERE + 5)))
    assert abs(found[0] - found[1]) < 1e-6
    model.eval()
    assert aux() == 0


def test_an_item_alone_in_its_slot_is_recalled_without_loss():
    """Item t is written to the slot t by an address of its own, so nothing overlays it."""
    T = 5
    mixer = memory(use_auxiliary_loss=True)
    item = torch.randn(2, T, 2, 12).double()
    phase = torch.randn(2, T, 2, 6).double()
    key = key_of(phase, torch.float64)
    write = torch.eye(T).double().expand(2, 2, T, T)
    no_decay = torch.zeros_like(write)
    bound = torch.cat(bind(item, *key), dim=-1).transpose(1, 2)
    rest = bound, no_decay, mixer.empty_state(2)[0]
    written = write, *rest
    assert abs(float(mixer.delayed_recall(item, key, written, NOWHERE))) < 1e-12
    written = torch.ones_like(write) / T, *rest  # all slots alike
    assert float(mixer.delayed_recall(item, key, written, NOWHERE)) > 0.05


# ---------------------------------------------------------------- sizes and initial weights


def count(**values: object) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Model(Knobs(**values)).parameters())


@pytest.mark.parametrize(
    ("preset", "hamt", "attention"),
    [
        ("33m", 33_215_232, 33_214_848),
        ("50m", 50_182_912, 50_184_704),
        ("100m", 100_345_600, 100_342_400),
        ("124m", 121_317_888, 121_320_192),
        ("200m", 200_839_808, 200_848_256),
    ],
)
def test_parameter_counts_of_the_presets_are_those_that_were_published(preset, hamt, attention):
    assert count(**PRESETS[preset]) == hamt
    assert count(**PRESETS[preset], mixer="attention") == attention
    with_conv = count(**PRESETS[preset], mixer="attention", conv=True)
    assert abs(with_conv / hamt - 1) < 0.001
    assert abs(hamt / (1e6 * float(preset.rstrip("m"))) - 1) < 0.03


def test_initial_weights_have_the_stated_spread_and_no_switch_moves_another_tensor():
    plain = Model(knobs(n_embd=64, hcm_dim=64))
    train_gpu.init_weights(plain, plain.cfg)
    bare = Model(knobs(n_embd=64, hcm_dim=64, conv=False))
    train_gpu.init_weights(bare, bare.cfg)
    ours, others = dict(plain.named_parameters()), dict(bare.named_parameters())
    assert set(ours) - set(others) == {f"blocks.{i}.mixer.conv_kernel" for i in (0, 1)}
    assert all(torch.equal(p, ours[name]) for name, p in others.items())
    assert abs(ours["wte"].std() / 0.02 - 1) < 0.02
    assert abs(ours["blocks.0.down_proj"].std() / (0.02 / 2) - 1) < 0.05  # 2 layers
    rates = train_gpu.MAX_DECAY * ours["blocks.0.mixer.decay_bias"].sigmoid()
    assert torch.allclose(rates.exp()[0, 0], torch.tensor(4 / 3), rtol=1e-4)
    assert torch.allclose(rates.neg().exp()[0, -1], torch.tensor(1 - 2**-7), rtol=1e-4)


@pytest.mark.parametrize(("mixer", "lags"), [("hamt", "01010"), ("attention", "010")])
def test_both_mixers_convolutions_start_with_keys_that_come_one_token_late(mixer, lags):
    """The same prior for both: a convolution near zero would cripple the baseline."""
    model = Model(knobs(mixer=mixer, conv=True))
    train_gpu.init_weights(model, model.cfg)
    layer = model.blocks[1].mixer
    parts = layer.conv_kernel.split(layer.conv_widths, dim=1)
    for part, lag in zip(parts, lags, strict=True):
        expected = torch.zeros(4, 1)
        expected[3 - int(lag)] = 1
        assert (part - expected).abs().max() < 0.1


# ---------------------------------------------------------------- dropout


def gradients(rows: int, seeds: torch.Tensor, **values: object) -> torch.Tensor:
    """Of a batch of 6 rows, so many at a time."""
    model, x, y = lively(double=False, dropout=0.3, **values), tokens(6, 24), tokens(6, 24, seed=1)
    for first in range(0, 6, rows):
        part = slice(first, first + rows)
        model(x[part], y[part], None, seeds[part])[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["plain", "attention"])
def test_dropout_of_a_row_does_not_depend_on_the_micro_batch(name):
    seeds = torch.arange(6) * 1_000_003
    whole = gradients(6, seeds, **MODELS[name])
    for rows in (1, 2, 4):
        found = gradients(rows, seeds, **MODELS[name])
        assert torch.allclose(found, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    assert not torch.allclose(gradients(6, seeds + 1, **MODELS[name]), whole, rtol=1e-2)


def test_dropout_keeps_the_stated_share_and_its_masks_are_unrelated():
    seeds = torch.tensor([0, 1, 2, 3**30])
    kept = dropout_mask(seeds, (100, 200), 0.1).double()
    assert (kept.mean((1, 2)) - 0.9).abs().max() < 0.01
    centred = (kept - kept.mean()).flatten(1)
    assert (torch.corrcoef(centred) - torch.eye(4)).abs().max() < 0.03
    shifted = (centred[:, :-1] * centred[:, 1:]).mean(1) / centred.square().mean(1)
    assert shifted.abs().max() < 0.03
    x = torch.ones(4, 100, 200)
    assert abs(float(train_gpu.dropout(x, kept.bool(), 0.1).mean()) - 1) < 0.01


@pytest.mark.parametrize("name", ["plain", "attention"])
def test_gradient_checkpointing_changes_no_gradient(name):
    seeds = torch.arange(6)
    plain = gradients(6, seeds, **MODELS[name])
    found = gradients(6, seeds, gradient_checkpointing=True, **MODELS[name])
    assert torch.allclose(found, plain, atol=1e-6, rtol=1e-5) and plain.abs().max() > 0.01


def test_gradient_checkpointing_keeps_less():
    kept, x = [], tokens(2, 64)
    for on in (False, True):
        model, sizes = lively(double=False, gradient_checkpointing=on), []
        keep = lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model.logits(x)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4
