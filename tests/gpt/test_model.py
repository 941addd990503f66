"""The model, its gates and its loss, each against something written out independently."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from plain_gpt import PlainGPT
from support import copy_to_plain, knobs

import train_gpt
from train_gpt import GPT, Knobs, LinearCrossEntropy

OPTIMIZERS = ("muon", "adam")


def loss(model: GPT, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy by autograd through all logits."""
    logits = model.logits(tokens_BT[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())


def fresh(seed: int = 1, **values) -> GPT:
    model = GPT(knobs(**values), torch.float32)
    model.init_weights(seed)
    return model


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """No zero-initialised weights: everything contributes."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.2)
    return model


def draw_tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("gate", "count"),
    [
        ("none", 123_568_128),
        ("headwise", 123_623_424),
        ("elementwise", 130_646_016),
        ("const", 123_577_344),
    ],
)
@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_parameter_counts_at_the_default_size_are_exact(gate, count, opt):
    with torch.device("meta"):
        model = GPT(Knobs(attngate=gate, gateopt=opt))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("gate", ["headwise", "elementwise"])
def test_mlp_match_gives_a_gated_model_the_ungated_parameter_count(gate):
    with torch.device("meta"):
        model = GPT(Knobs(attngate=gate, mlp_match=True))
    assert sum(p.numel() for p in model.parameters()) == 123_568_128


def test_loss_at_step_0_is_about_16_at_the_record_width():
    model = GPT(Knobs(n_layer=2, sequence_length=128), torch.float32)
    model.init_weights(1337)
    x = torch.randint(50257, (2, 129), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = loss(model, x)
        summed = model(x[:, :-1], x[:, 1:])
    assert found.dtype == torch.float32 and 15.8 < found < 16.3
    assert abs(summed / 256 - found) < 1e-3


@pytest.mark.parametrize("opt", OPTIMIZERS)
@pytest.mark.parametrize("gate", train_gpt.GATES[1:])
def test_a_seed_gives_the_same_weights_to_everything_but_the_gate(gate, opt):
    plain = fresh()
    theirs = dict(fresh(attngate=gate, gateopt=opt).named_parameters())
    for name, p in plain.named_parameters():
        assert torch.equal(p, theirs[name]), name
    other = dict(fresh(seed=2).named_parameters())
    assert not torch.equal(plain.wte, other["wte"])


def test_weights_start_within_their_bounds_and_output_projections_at_zero():
    for name, p in fresh(attngate="elementwise").named_parameters():
        bound = 0 if name.endswith(("out_proj", "down_proj")) else p.size(1) ** -0.5
        assert p.abs().max() <= bound and p.abs().max() >= 0.99 * bound, name


CASES = itertools.product(train_gpt.GATES[1:], train_gpt.POSITIONS, train_gpt.ACTIVATIONS)


@pytest.mark.parametrize(("gate", "position", "activation"), [("none", "sdpa", "sigmoid"), *CASES])
def test_model_and_gates_match_the_formulas_written_out(gate, position, activation):
    ours = lively(fresh(attngate=gate, gatepos=position, gateact=activation))
    plain = PlainGPT(64, 2, 2, 32, gate, position, activation)
    copy_to_plain(ours, plain)
    x = draw_tokens(3, 17)
    mine, theirs = loss(ours, x), plain(x[:, :-1], x[:, 1:])
    assert abs(mine - theirs) < 1e-5 * theirs
    assert torch.allclose(ours.logits(x[:, :-1]), plain.logits(x[:, :-1]), atol=2e-5, rtol=1e-4)
    mine.backward()
    theirs.backward()
    pairs = [(ours.wte, plain.wte), (ours.blocks[0].up_proj, plain.blocks[0].up)]
    if gate != "none":
        pairs.append((ours.blocks[0].attn.gate, plain.blocks[0].gate))
    for a, b in pairs:
        assert torch.allclose(a.grad, b.grad, atol=1e-6, rtol=1e-3) and a.grad.abs().max() > 1e-6
    q_grad = ours.blocks[0].attn.in_proj.grad[:32]
    assert torch.allclose(q_grad, plain.blocks[0].q.grad, atol=1e-6, rtol=1e-3)


def test_a_gate_position_that_is_registered_but_applied_nowhere_is_no_silent_model(monkeypatch):
    model = fresh(attngate="headwise")
    object.__setattr__(model.blocks[0].attn.cfg, "gatepos", "mlp")
    with pytest.raises(AssertionError, match="GATEPOS=mlp is nowhere applied"):
        model.logits(draw_tokens(1, 4))


@pytest.mark.parametrize("position", train_gpt.POSITIONS)
def test_the_model_is_causal(position):
    model = lively(fresh(attngate="elementwise", gatepos=position))
    x = draw_tokens(1, 16)
    before = model.logits(x)
    for t in range(16):
        changed = x.clone()
        changed[0, t] = (changed[0, t] + 1) % 64
        after = model.logits(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("rows", [7, 33, 64, 1000])
@pytest.mark.parametrize("confident", [False, True])
def test_the_chunked_loss_gives_autograds_loss_and_gradients(monkeypatch, rows, confident):
    monkeypatch.setattr(LinearCrossEntropy, "CHUNK_ROWS", rows)
    model = lively(fresh(attngate="elementwise"))
    if confident:  # a target with almost all probability: its gradient is a small difference
        with torch.no_grad():
            model.wte.mul_(6)
    x = draw_tokens(5, 17)
    (80 * loss(model, x)).backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad.fill_(1.0)  # backward adds to what is there
    found = model(x[:, :-1], x[:, 1:])
    found.backward()
    assert found.dtype == torch.float32 and torch.allclose(found, 80 * loss(model, x), rtol=1e-6)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad - 1, theirs[name], atol=2e-4, rtol=1e-4), name
    with torch.no_grad():
        assert torch.equal(model(x[:, :-1], x[:, 1:]), found), "evaluation sees the same loss"


def test_targets_of_minus_one_do_not_count():
    model = lively(fresh())
    x, y = draw_tokens(2, 16), draw_tokens(2, 16, seed=4)
    y[1] = -1
    both = model(x, y)
    both.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    one = model(x[:1], y[:1])
    one.backward()
    assert torch.allclose(both, one)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-5)


def test_the_chunked_loss_adds_up_in_fp32():
    """In bf16 a sum over thousands of rows would stall; the reference is fp64, on bf16 inputs."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2048, 64, generator=generator).bfloat16()
    weight = torch.randn(4096, 64, generator=generator).mul(0.1).requires_grad_()
    target = torch.randint(4096, (2048,), generator=generator)
    chunk_loss = train_gpt.chunk_loss_and_gradient
    found = LinearCrossEntropy.apply(hidden, weight, target, chunk_loss, True)
    found.backward()
    logits = (hidden @ weight.detach().bfloat16().T).double()
    exact = F.cross_entropy(logits, target, reduction="sum")
    assert abs(found - exact) < 1e-6 * exact
    probabilities = logits.softmax(1)
    probabilities[torch.arange(2048), target] -= 1
    exact_gradient = probabilities.T @ hidden.double()
    assert (weight.grad - exact_gradient).norm() < 5e-3 * exact_gradient.norm()
