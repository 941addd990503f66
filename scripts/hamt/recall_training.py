"""recall_training.py -- train_gpu.py's model trained and measured on recall tasks."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import numpy as np
import recall_tasks as tasks
import torch
import torch.nn.functional as F
from recall_knobs import ENOUGH, MEASURE, SELECT, Bench, model_knobs
from recall_tasks import Sequences
from torch import Tensor

import train_gpu
from plumbing import World
from plumbing.world import flat_gradients


def tensors(s: Sequences, w: World) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(s.x_BT).to(w.device), torch.from_numpy(s.y_BT).to(w.device)


def asked_logits(model: train_gpu.Model, x_BT: Tensor, asked_BT: Tensor) -> Tensor:
    """(N, V) at the N tokens where something is asked."""
    h_BTC, _, _ = model.hidden(x_BT, model.empty_state(len(x_BT)))
    return F.linear(h_BTC[asked_BT], model.wte).float()


@dataclass
class Trained:
    """A model and how it got there. The curve is (step, accuracy) on the sequences for
    selection."""

    mixer: str
    rate: float
    seed: int
    model: train_gpu.Model
    n_params: int
    cpu_s: float
    final_loss: float
    curve: list[tuple[int, float]]

    @property
    def reached(self) -> int | None:
        return next((step for step, accuracy in self.curve if accuracy >= ENOUGH), None)


def train(b: Bench, mixer: str, rate: float, seed: int, w: World) -> Trained:
    """train_gpu.py's model, AdamW and schedule; the loss is that of the questions. Measuring is
    not timed."""
    k = model_knobs(b, mixer, rate, seed)
    model = train_gpu.Model(k)
    train_gpu.init_weights(model, k)
    gradients = flat_gradients(model.to(w.device))
    adam = train_gpu.AdamW(model, k)
    spent, curve, losses = 0.0, [], []
    for step in range(b.steps):
        model.train()
        t0 = time.process_time()
        x_BT, y_BT = tensors(b.training(seed, step), w)
        asked = y_BT >= 0
        loss = F.cross_entropy(asked_logits(model, x_BT, asked), y_BT[asked])
        loss.backward()
        norms = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()]))
        lr = rate * train_gpu.lr_scale(step, b.steps, k)
        adam.step(lr, norms, norms.isfinite().all())
        gradients.zero_()
        losses = [*losses[-19:], float(loss.detach())]
        spent += time.process_time() - t0
        if (step + 1) % b.curve_every == 0 or step + 1 == b.steps:
            found = measure(model, b.held_out(SELECT, min(b.sequences, 100), b.length, b.pairs), w)
            curve.append((step + 1, found["accuracy"]))
    n_params = sum(p.numel() for p in model.parameters())
    return Trained(mixer, rate, seed, model.eval(), n_params, spent, float(np.mean(losses)), curve)


@torch.inference_mode()
def answers(model: train_gpu.Model, s: Sequences, w: World, rows: int = 50) -> np.ndarray:
    """(B, T) the likeliest token of the whole vocabulary where something is asked, -2 elsewhere."""
    model.eval()
    found = np.full(s.x_BT.shape, -2)
    for at in range(0, len(found), rows):
        part = slice(at, at + rows)
        x_BT, y_BT = tensors(Sequences(s.x_BT[part], s.y_BT[part], s.distance_BT[part]), w)
        asked = y_BT >= 0
        found[part][asked.cpu().numpy()] = asked_logits(model, x_BT, asked).argmax(-1).cpu().numpy()
    return found


def measure(model: train_gpu.Model, s: Sequences, w: World) -> dict[str, float]:
    return tasks.accuracy(*tasks.score(s, answers(model, s, w)))


def fits(b: Bench, T: int, pairs: int, **more: object) -> bool:
    try:
        b.sequences_of(np.random.default_rng(0), 1, T, pairs, **more)
    except ValueError:
        return False
    return True


def measurements(b: Bench, model: train_gpu.Model, w: World) -> Iterator[dict[str, object]]:
    """Accuracy against pairs, length and, at each length, distance; rows of results.csv."""
    for pairs in b.numbers("eval_pairs"):
        if fits(b, b.length, pairs):
            found = measure(model, b.held_out(MEASURE, b.sequences, b.length, pairs), w)
            yield dict(against="pairs", eval_pairs=pairs, eval_length=b.length) | found
    for T in b.lengths:
        if not fits(b, T, b.pairs):
            continue
        s = b.held_out(MEASURE, b.sequences, T, b.pairs)
        found = answers(model, s, w)
        at = dict(eval_pairs=b.pairs, eval_length=T)
        yield dict(against="length") | at | tasks.accuracy(*tasks.score(s, found))
        edges = np.unique(np.linspace(0, T, 9).astype(int))
        for low, high in pairwise(edges):
            if (
                b.task in tasks.DENSE
            ):  # where its queries fall; the others are asked for at a distance
                row = dict(distance_low=int(low), distance_high=int(high) - 1)
                row |= tasks.accuracy(*tasks.score(s, found, low, high))
            else:
                distance = int(min(high, T - (b.pairs if b.task == "copy" else 2)))
                if not fits(b, T, b.pairs, distance=distance):
                    continue
                row = dict(distance_low=distance, distance_high=distance)
                row |= measure(
                    model, b.held_out(MEASURE, b.sequences // 2, T, b.pairs, distance), w
                )
            if row["queries"]:
                yield dict(against="distance") | at | row
