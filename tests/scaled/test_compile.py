"""What is compiled, how much of it there is, and what happens when that fails."""

import logging
import shutil

import pytest
import torch
from scaled_support import fresh, repeats, run_here, small
from support import ONE

import train_scaled
from train_scaled import ByteMemory, compile_model, map_state

NO_CAST = torch.autocast("cpu", enabled=False)


def captured(monkeypatch, world, n_layer: int, validations: int = 0, **knobs) -> list[int]:
    """Operations in each graph that the compiler is given: the first micro-batch and two windows of
    training. Of some validations behind them only the first may add graphs."""
    graphs, compiler = [], torch.compile

    def counting(graph, inputs):
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    logging.getLogger("torch").setLevel(logging.ERROR)
    with monkeypatch.context() as m:
        m.setattr(torch, "compile", lambda f, **rest: compiler(f, backend=counting, **rest))
        cfg = small(n_layer=n_layer, batch_size=2, **knobs)
        model = fresh(n_layer=n_layer, batch_size=2, **knobs).train()
        assert compile_model(model, cfg, world, NO_CAST) == ""
    x, past = repeats(2, cfg.sequence_length), None
    for _ in range(2):
        nll, past = model(x, x, past)
        nll.mean().backward()
        past = map_state(torch.Tensor.detach, past)
    trained, totals = len(graphs), [len(graphs)]
    for _ in range(validations):
        past = None
        with torch.no_grad():
            for _ in range(2):
                past = model.eval()(x, x, past)[1]
        totals.append(len(graphs))
        nll, _ = model.train()(x, x, map_state(torch.clone, past))
        nll.mean().backward()
    assert len({*totals[1:], len(graphs)}) == 1, "nothing is compiled after the first validation"
    assert trained <= 4, "a block, the decoder, the MLP behind the blocks, the memory by bytes"
    return graphs[:trained]


@pytest.mark.parametrize("delta_rule", [False, True])
def test_what_is_compiled_grows_neither_with_the_row_nor_with_the_layers(monkeypatch, delta_rule):
    knobs = dict(delta_rule=delta_rule)
    short = captured(monkeypatch, ONE, 1, validations=2, sequence_length=512, **knobs)
    long = captured(monkeypatch, ONE, 1, sequence_length=4096, **knobs)
    deep = captured(monkeypatch, ONE, 3, sequence_length=512, **knobs)
    assert short == deep
    # The delta rule joins chunks in rounds of twice the length, a handful of operations each.
    assert sum(long) - sum(short) <= (30 if delta_rule else 0)
    assert max(long) < 260


def test_a_compiler_that_fails_is_one_line_and_training_goes_on(monkeypatch, tmp_path):
    def broken(*args, **rest):
        raise RuntimeError("no such backend")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(train_scaled, "check_compiler", lambda *args: None)
    code, out = run_here(monkeypatch, tmp_path, run_id="a", compile=1, num_iterations=2)
    line = "compile: failed, training goes on without it (RuntimeError: no such backend)"
    assert code == 0 and line in out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_memory_by_bytes_is_the_plain_one():
    memory, text = ByteMemory(7), repeats(2, 64)
    logits, hidden = torch.randn(2, 2, 40, 256)
    state, first = memory.empty_state(2), torch.zeros(2, dtype=torch.long)
    compiled = torch.compile(memory.forward, dynamic=False)
    for _ in range(2):
        ours, kept = compiled(logits, hidden, text, first, state)
        theirs, state = memory(logits, hidden, text, first, state)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(kept[name], state[name]) for name in kept)
        first = first + 40
