"""What the compiler gets of train_gpt.py, and on a GPU what comes out of it."""

import pytest
import torch
from support import ONE, knobs

import train_gpt
from plumbing import World, flat_gradients
from plumbing.exchange import StepExchange

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = World(0, 1, torch.device("cuda"))


def draw_batch(cfg: train_gpt.Knobs, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (cfg.device_batch_size, cfg.sequence_length + 1)
    tokens = torch.randint(cfg.vocab_size, shape, generator=generator).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def make_model(cfg: train_gpt.Knobs, dtype: torch.dtype, device: torch.device) -> train_gpt.GPT:
    """A model whose every weight counts: none is zero."""
    model = train_gpt.GPT(cfg, dtype)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return model.to(device)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs_compiled(n_layer: int) -> int:
    """Graphs that the compiler is given for one training step of a model."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    cfg = knobs(n_layer=n_layer, attngate="headwise")
    model = make_model(cfg, torch.float32, torch.device("cpu"))
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False)
    model(*draw_batch(cfg, torch.device("cpu"))).backward()
    return len(graphs)


def test_one_compiled_block_serves_a_model_of_any_depth(fresh_compiler):
    assert graphs_compiled(n_layer=1) == 1
    assert graphs_compiled(n_layer=3) == 1


def test_what_is_compiled_is_each_block_the_loss_of_a_chunk_and_muons_two_functions():
    cfg = knobs(n_layer=3)
    model = make_model(cfg, torch.float32, torch.device("cpu"))
    flat_gradients(model)
    _, muon = train_gpt.make_optimizers(model, cfg, ONE)
    train_gpt.compile_model(model, muon)
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    assert model._compiled_call_impl is None, "the whole model is not one graph"
    for function, plain in (
        (model.chunk_loss, train_gpt.chunk_loss_and_gradient),
        (muon.orthogonalize, train_gpt.orthogonalize),
        (muon.nesterov, train_gpt.nesterov),
    ):
        assert function._torchdynamo_orig_callable is plain


# ----------------------------------------------------------------------------
# On a GPU


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("gate", ["none", "headwise", "elementwise"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_compiled_step_equals_an_eager_one(fresh_compiler, gate, dtype, most):
    cfg = knobs(device="cuda", attngate=gate, n_embd=128, sequence_length=128)
    all_finite = torch.tensor(True, device=GPU.device)
    losses, gradients, models = [], [], []
    for is_compiled in (False, True):
        model = make_model(cfg, dtype, GPU.device)
        gradient = flat_gradients(model)
        _, muon = train_gpt.make_optimizers(model, cfg, GPU)
        if is_compiled:
            train_gpt.compile_model(model, muon)
        loss = model(*draw_batch(cfg, GPU.device)) / 512
        loss.backward()
        losses.append(loss.item())
        gradients.append(dict((name, p.grad.clone()) for name, p in model.named_parameters()))
        for name, p in model.named_parameters():
            p.grad.copy_(gradients[0][name])  # Muon's two functions, from the same gradients
        muon.step(0.1, all_finite)
        models.append(model)
        assert gradient.norm() > 0
    assert losses[1] == pytest.approx(losses[0], rel=most)
    for name, expected in gradients[0].items():
        assert difference(gradients[1][name], expected) < most, name
    for (name, eager), p in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert difference(p.detach(), eager.detach()) < most, name


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_step_that_is_not_finite_leaves_everything_in_place():
    cfg = knobs(device="cuda")
    model = make_model(cfg, torch.bfloat16, GPU.device)
    gradients = flat_gradients(model)
    adam, muon = train_gpt.make_optimizers(model, cfg, GPU)
    yes = torch.tensor(True, device=GPU.device)
    (model(*draw_batch(cfg, GPU.device)) / 64).backward()
    adam.step(0.01, yes)
    muon.step(0.001, yes)

    def everything() -> list[torch.Tensor]:
        moments = [t for state in adam.state.values() for t in state.values()]
        return [t.clone() for t in (*model.parameters(), *moments, *muon.momentum.values())]

    before = everything()
    gradients.fill_(float("nan"))
    adam.step(0.01, ~yes)
    muon.step(0.001, ~yes)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_an_fp16_overflow_is_skipped_and_lowers_the_loss_scale():
    cfg = knobs(device="cuda", precision="fp16")
    model = make_model(cfg, torch.float16, GPU.device)
    gradients = flat_gradients(model)
    adam, muon = train_gpt.make_optimizers(model, cfg, GPU)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30)  # too much for fp16
    exchange = StepExchange(GPU)
    before = [p.detach().clone() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    moved = []
    for step in range(1, 31):
        loss = model(*draw_batch(cfg, GPU.device)) / 64
        scaler.scale(loss).backward()
        scaler.unscale_(adam)
        scaler.unscale_(muon)
        norms = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()]))
        overflow = ~norms.isfinite().all()
        all_finite = exchange.send(step, loss.detach(), 0.01, norms, overflow, {}, 0.0)
        adam.step(0.01, all_finite)
        muon.step(0.001, all_finite)
        scaler.update()
        gradients.zero_()
        is_same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        moved.append(not is_same)
    stats = exchange.read(names, keep=0)
    assert stats[0].skipped and not moved[0], "the first step overflows and changes nothing"
    assert not stats[-1].skipped and moved[-1], "the scale falls until a step fits"
    assert not any(one.problem for one in stats), "an overflow is no fault"
    assert scaler.get_scale() < 2.0**30
