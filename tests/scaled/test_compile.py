"""What is compiled, how much of it there is, and what happens when that fails."""

import logging
import shutil

import pytest
import torch
import torch._inductor.config
from scaled_support import fresh, repeats, run_here
from support import ONE

import train_scaled
from plumbing import byte_runs
from plumbing.byte_scores import probe_backward
from plumbing.device import compile_parts
from plumbing.row_states import State
from train_scaled import ByteMemory


def detached(state: State) -> State:
    return State(state.position, [tuple(t.detach() for t in layer) for layer in state.layers])


def captured(monkeypatch, n_layer: int, validations: int = 0, **knobs) -> list[int]:
    """Operations in each graph that the compiler is given: the first micro-batch and two windows of
    training. Of some validations behind them only the first may add graphs.
    """
    graphs, compiler = [], torch.compile

    def counting(graph, inputs):
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    logging.getLogger("torch").setLevel(logging.ERROR)
    model = fresh(n_layer=n_layer, batch_size=2, **knobs).train()
    with monkeypatch.context() as m:
        m.setattr(torch, "compile", lambda f, **rest: compiler(f, backend=counting, **rest))
        probe = lambda: probe_backward(model, 2)
        assert compile_parts(byte_runs.parts_to_compile(model), probe, ONE) == ""
    x, past = repeats(2, model.cfg.sequence_length), model.empty_state(2)
    for _ in range(2):
        nll, past = model(x, x, past)
        nll.mean().backward()
        past = detached(past)
    trained, totals = len(graphs), [len(graphs)]
    for _ in range(validations):
        past = None
        with torch.no_grad():
            for _ in range(2):
                past = model.eval()(x, x, past)[1]
        totals.append(len(graphs))
        nll, _ = model.train()(x, x, detached(past))
        nll.mean().backward()
    assert len({*totals[1:], len(graphs)}) == 1, "nothing is compiled after the first validation"
    assert trained <= 4, "a block, the decoder, the MLP behind the blocks, the memory by bytes"
    return graphs[:trained]


def test_what_is_compiled_grows_neither_with_the_row_nor_with_the_layers(monkeypatch):
    small = captured(monkeypatch, 1, validations=2, sequence_length=256)
    large = captured(monkeypatch, 3, sequence_length=2048)
    assert large == small
    assert max(large) < 260


def test_the_delta_rule_adds_a_handful_of_operations_for_a_row_of_twice_the_length(monkeypatch):
    """It joins chunks in rounds of twice the length."""
    short = captured(monkeypatch, 1, sequence_length=256, delta_rule=True)
    long = captured(monkeypatch, 1, sequence_length=2048, delta_rule=True)
    assert 0 < sum(long) - sum(short) <= 30
    assert max(long) < 260


def test_a_compiler_that_fails_is_one_line_and_training_goes_on(monkeypatch, tmp_path):
    def broken(*args, **rest):
        raise RuntimeError("no such backend")

    monkeypatch.setattr(torch, "compile", broken)
    for module in (train_scaled, byte_runs):
        monkeypatch.setattr(module, "check_machine", lambda *args: None)
    code, out = run_here(monkeypatch, tmp_path, run_id="a", compile=1, num_iterations=2)
    line = "compile: failed, training goes on without it (RuntimeError: no such backend)"
    assert code == 0 and line in out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_the_compiled_memory_by_bytes_is_the_plain_one(monkeypatch):
    # Workers that compile beside this process would import torch first.
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    memory, text = ByteMemory(7), repeats(2, 64)
    logits, hidden = torch.randn(2, 2, 40, 256)
    state, first = memory.tables.empty(2), torch.ones((), dtype=torch.long)
    compiled = torch.compile(memory.forward, dynamic=False)
    for _ in range(2):
        ours, kept = compiled(logits, hidden, text, first, state)
        theirs, state = memory(logits, hidden, text, first, state)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(kept, state, strict=True))
        first = first + 40
