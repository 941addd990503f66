"""The model: sizes, the plain reference, causality at every byte, carried state, streams."""

import pytest
import torch
import torch.nn.functional as F
from lib.byte_stream import Stream
from plain_scaled import PlainPhase8, copy_phase8, step_recurrence
from scaled_support import VARIANTS, fresh, repeats, small, tensors_equal, text

import train_scaled
from plumbing.byte_records import half_lives
from train_scaled import ByteLM, Knobs


@pytest.mark.parametrize(("preset", "count"), [("phase8", 129_302_416), ("phase7", 31_199_792)])
def test_the_seeds_parameter_counts_are_exact(preset, count):
    with torch.device("meta"):
        model = ByteLM(Knobs(preset=preset, **train_scaled.PRESETS[preset]))
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_default_predicts_with_as_many_parameters_as_the_seed_within_3_percent():
    with torch.device("meta"):
        model = ByteLM(Knobs())
    every = sum(p.numel() for p in model.parameters())
    of_training_alone = sum(p.numel() for p in model.decoder.ahead.parameters())
    assert every == 133_505_646
    assert abs((every - of_training_alone) / 129_302_416 - 1) < 0.03


@pytest.mark.parametrize(("low", "logit", "half_life"), [(0.995, 8.0, 413_338), (0.99, 0.0, 138.3)])
def test_retention_starts_as_the_seed_has_it(low, logit, half_life):
    found = half_lives(fresh("phase8", mem_range=low, mem_init=logit))
    assert found.shape == (2, 2) and (found / half_life - 1).abs().max() < 0.002


def test_half_lives_are_those_of_the_retention_that_the_model_applies():
    model = fresh(mem_range=0.3, mem_init=2.0)
    model.plasticity.fill_(0.5)
    for block in model.blocks:
        torch.nn.init.normal_(block.memory.retention)
    logits = torch.stack([block.memory.retention.detach() for block in model.blocks])
    kept = train_scaled.log_retention(logits, 0.3, model.plasticity).exp()
    assert torch.allclose(0.5 ** (1 / half_lives(model).float()), kept, rtol=1e-5)


def test_log_spaced_half_lives_run_from_32_to_65536_patches():
    found = half_lives(fresh(n_embd=64, n_head=4))[0]
    assert torch.allclose(found, torch.logspace(5, 16, 4, base=2, dtype=torch.float64), rtol=1e-3)


@pytest.mark.parametrize("form", ["steps", "cumsum"])
def test_the_phase_8_model_is_the_plain_reference(form):
    model = fresh(
        "phase8", n_embd=64, n_head=4, sliding_window=8, mem_range=0.995, thinking_steps=3
    )
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.memory.retention.copy_(torch.linspace(-4, 8 - i, 4))
    plain = PlainPhase8(64, 2, 4, 8, 0.995, form=form)
    copy_phase8(model, plain)
    x, y = text(2, 128), text(2, 128, seed=1)
    mine, theirs = model.logits(x, y)[0], plain(x, y)
    assert torch.allclose(mine, theirs, atol=2e-5)
    nll = model(x, y)[0]
    assert torch.allclose(nll, F.cross_entropy(theirs.mT, y, reduction="none"), atol=2e-5)
    nll.mean().backward()
    F.cross_entropy(theirs.mT, y).backward()
    for a, b in ((model.embed, plain.embed), (model.blocks[0].memory.qkv, plain.blocks[0].mem_qkv)):
        assert torch.allclose(a.weight.grad, b.weight.grad, atol=1e-6, rtol=1e-3)
    assert torch.allclose(
        model.blocks[0].memory.retention.grad,
        plain.blocks[0].decay_logits.grad,
        atol=1e-8,
        rtol=1e-2,
    )


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_byte_moves_no_prediction_of_itself_or_before(variant):
    """Every byte of a window, and every logit: byte p of the text is target p - 4, and stands in x
    from p on.
    """
    model, s = fresh(variant), repeats(1, 68)
    before = model.logits(s[:, :64], s[:, 4:])[0]
    with torch.no_grad():
        for p in range(68):
            t = s.clone()
            t[0, p] = 97 + (t[0, p] - 96) % 3
            after = model.logits(t[:, :64], t[:, 4:])[0]
            first = max(
                p - 3, 0
            )  # target index of byte p + 1, the first prediction that may have seen byte p
            assert torch.equal(before[:, :first], after[:, :first]), p
            assert p == 67 or not torch.equal(before[:, first:], after[:, first:]), p


@pytest.mark.parametrize("variant", VARIANTS)
def test_windows_with_carried_state_equal_one_long_forward(variant):
    model, s = fresh(variant), repeats(2, 196)
    x, y = s[:, :-4], s[:, 4:]
    whole, last = model(x, y)
    for sizes in ([64, 64, 64], [4, 12, 176], [160, 4, 28]):
        state, parts = model.empty_state(2), []
        for part_x, part_y in zip(x.split(sizes, 1), y.split(sizes, 1), strict=True):
            nll, state = model(part_x, part_y, state)
            parts.append(nll)
        assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5)
        assert tensors_equal(vars(state), vars(last), 2e-5)
    state = model(x[:, :64], y[:, :64])[1]
    once, again = (model(x[:, 64:], y[:, 64:], state)[0] for _ in range(2))
    assert torch.equal(once, again), "a forward leaves the state that it is given as it is"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_fed_in_any_pieces_equals_the_full_forward(variant):
    model, s = fresh(variant), repeats(2, 60)
    s[1, :12] = 97  # what follows the first bytes is met again at once
    wanted = model.logits(s[:, :56], s[:, 4:])[0]
    for sizes in ([1] * 60, [3, 10, 1, 46], [59, 1]):
        stream, at = Stream(model, 2, prefill=16), 0
        assert torch.equal(stream.logits(), torch.zeros(2, 256))
        for part in s.split(sizes, 1):
            stream.feed(part)
            at += part.size(1)
            if 4 <= at < 60:
                assert torch.allclose(stream.logits(), wanted[:, at - 4], atol=2e-5), at


def test_what_a_stream_is_not_to_remember_is_read_but_not_repeated():
    model, once = fresh(), torch.tensor([list(b"abcdefghijkl")])
    streams = [Stream(model) for _ in range(3)]
    streams[0].feed(once)
    streams[1].feed(once, remember=False)
    streams[2].feed(once.flip(1))
    for stream in streams:
        stream.feed(once[:, :8])
    knows, heard, other = (stream.logits().softmax(-1)[0, ord("i")] for stream in streams)
    assert knows > 0.5 > heard and torch.equal(streams[1].past, streams[0].past) and heard != other


def test_a_streams_memory_does_not_grow_with_the_text():
    stream = Stream(fresh())
    sizes = []
    for n in (64, 512, 2048):
        stream.feed(text(1, n))
        sizes.append(stream.state_bytes())
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_a_zeroed_memory_has_the_same_weights_and_leaves_the_window_alone():
    full, zero = fresh(), fresh(memory="zero")
    zero.load_state_dict(full.state_dict())
    x, y = text(1, 128), text(1, 128, seed=1)
    other = x.clone()
    other[:, :4] = (other[:, :4] + 1) % 256
    moved = lambda m: (m(x, y)[0] - m(other, y)[0]).abs()[:, 4 * (1 + 2 * 3) :].max()
    assert moved(zero) == 0 and moved(full) > 0, (
        "beyond 2 blocks x (window - 1) only memory carries"
    )
    none, s = fresh(memory="zero", mem_rows=0), repeats(1, 132)
    none.load_state_dict(
        {name: t for name, t in full.state_dict().items() if not name.startswith("byte_memory.")}
    )
    silent, without, heard = (m.logits(s[:, :-4], s[:, 4:])[0] for m in (zero, none, full))
    assert torch.equal(silent, without) and not torch.allclose(silent, heard), (
        "nor does the memory by bytes"
    )


def test_plasticity_multiplies_every_retention_and_is_saved():
    model = fresh("phase8", n_layer=1)
    model.plasticity.fill_(0.25)
    assert model.state_dict()["plasticity"] == 0.25
    block, h = (
        model.blocks[0].memory,
        torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)),
    )
    (S,) = block(h, (torch.zeros(1, 2, 16, 17),), model.plasticity)[1]
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in block.qkv(h).chunk(3, -1))
    a = (0.25 * (0.5 + 0.5 * torch.sigmoid(block.retention))).log()
    _, wanted = step_recurrence(
        q, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0), a, torch.zeros(1, 2, 16, 17)
    )
    assert torch.allclose(S, wanted, atol=1e-5)


def test_another_part_moves_no_other_parts_initial_weights():
    plain, more = fresh().state_dict(), fresh(delta_rule=True).state_dict()
    assert plain.keys() < more.keys() and all(torch.equal(t, more[n]) for n, t in plain.items())


def test_recomputing_blocks_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        model = fresh(recompute=recompute).train()
        model(text(2, 64), text(2, 64, seed=1))[0].mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_first_step_of_a_text_overflows_nothing_in_fp16(variant):
    # Nothing has been read before the first patch, so its key in the memory is zero at first.
    model = ByteLM(small(**VARIANTS[variant]), torch.float16)
    model.init_weights(1)
    loss, _ = model(text(2, 64), text(2, 64, seed=1))
    # A byte's share of a default step, at the scale that GradScaler begins with.
    (65536 * loss.sum() / (2 * 4096)).backward()
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    assert norms.isfinite().all()
