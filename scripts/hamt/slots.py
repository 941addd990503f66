"""slots.py -- statistics of a memory's slots that can fail."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import numpy as np
import recall_tasks as tasks
import torch
import torch.nn.functional as F
from lib import runs as lib
from recall_knobs import Bench
from recall_training import asked_logits
from torch import Tensor

import train_gpu
from plumbing import UserError, World
from plumbing.text_runs import open_text


def effective_rank(address_NS: Tensor) -> tuple[float, float]:
    """How many different directions the addresses (N, S) have: exp of the entropy of the
    singular values' shares (Roy
    and Vetterli 2007), and the participation ratio of their squares, (sum s^2)^2 / sum s^4. Both
    are 1 where all
    tokens write to the same mixture of slots, and S where all slots are used alike and apart.
    Not centred, because a
    mean that dominates is just what must show."""
    s2 = torch.linalg.eigvalsh(address_NS.double().T @ address_NS.double()).clamp(min=0)
    s = s2.sqrt()
    share = s[s > 0] / s.sum()
    return float((-(share * share.log()).sum()).exp()), float(s2.sum() ** 2 / s2.square().sum())


def slot_cosine(M_BSE: Tensor) -> float:
    """Mean absolute cosine between two slots' contents, over all pairs of slots that hold
    something, (B, S, E): 1 where
    slots are copies of each other (up to sign and size), about sqrt(2 / (pi E)) where they are
    unrelated. nan where no
    two slots hold anything."""
    M = M_BSE.double()
    norm = M.norm(dim=-1)
    full = norm > 1e-6 * norm.amax(-1, keepdim=True).clamp(min=1e-30)
    unit = F.normalize(M, dim=-1)
    cosine = (unit @ unit.mT).abs()
    pairs = (full[:, :, None] & full[:, None]).triu(1)
    return float(cosine[pairs].mean()) if pairs.any() else math.nan


@contextlib.contextmanager
def watched(
    model: train_gpu.Model, keep: dict[int, Tensor] | None = None
) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
    """While inside, the list fills with (layer, write addresses (B, H, T, S), state behind
    (B, H, S, E)) of the memory layers. `keep` has by layer a (H, S) of ones and zeros: where it is
    0 nothing is written, so nothing is read.
    """
    seen, keep = [], keep or {}
    layers = {
        i: block.mixer for i, block in enumerate(model.blocks) if hasattr(block.mixer, "recall")
    }

    def wrap(layer: int, mixer: train_gpu.Memory) -> None:
        recall = mixer.recall

        def recorded(read, write, bound, log_decay, memory) -> tuple[Tensor, Tensor]:
            if layer in keep:
                write = write * keep[layer][:, None]
                memory = memory * keep[layer][..., None]
            found, memory = recall(read, write, bound, log_decay, memory)
            seen.append((layer, write, memory))
            return found, memory

        mixer.recall = recorded

    for layer, mixer in layers.items():
        wrap(layer, mixer)
    try:
        yield seen
    finally:
        for mixer in layers.values():
            del mixer.recall


@torch.inference_mode()
def sequence_losses(model: train_gpu.Model, x_BT: Tensor, y_BT: Tensor) -> np.ndarray:
    """Mean loss of each sequence over what is asked in it, (B,), nats."""
    asked = y_BT >= 0
    losses = F.cross_entropy(
        asked_logits(model, x_BT, asked), y_BT[asked], reduction="none"
    ).double()
    rows = asked.nonzero()[:, 0]
    total = torch.zeros(len(x_BT), dtype=torch.float64, device=x_BT.device).index_add_(
        0, rows, losses
    )
    return (total / asked.sum(1).clamp(min=1)).cpu().numpy()


def paired_change(losses: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Mean difference over sequences and half its 95% interval (normal; sequences are
    independent)."""
    d = losses - base
    return dict(
        loss_change=float(d.mean()), half=float(tasks.Z * d.std(ddof=1) / math.sqrt(len(d)))
    )


Losses = Callable[[dict[int, Tensor]], dict[str, float]]  # the change that masks of slots make


def each_slot(layer: int, head: int, ones_HS: Tensor, without: Losses) -> list[dict]:
    """Of each slot of a head: the loss change when it is zeroed from the first token on."""
    found = []
    for slot in range(ones_HS.size(1)):
        mask = ones_HS.clone()
        mask[head, slot] = 0
        found.append(dict(layer=layer, head=head, slot=slot) | without({layer: mask}))
    return found


def head_row(layer: int, head: int, write_NS: Tensor, M_BSE: Tensor, own: list[dict]) -> dict:
    """Of a head: effective ranks of its write addresses over all tokens, the cosine between slots
    of the state behind the last, and how many of its slots matter.
    """
    entropy, participation = effective_rank(write_NS)
    largest = max(own, key=lambda r: r["loss_change"])
    return {
        "layer": layer,
        "head": head,
        "slots": len(own),
        "rank_entropy": entropy,
        "rank_participation": participation,
        "slot_cosine": slot_cosine(M_BSE),
        "cosine_if_unrelated": math.sqrt(2 / (math.pi * M_BSE.size(-1))),
        # of which the loss rises by more than chance
        "slots_that_matter": sum(r["loss_change"] > r["half"] for r in own),
        "loss_change": largest["loss_change"],
        "half": largest["half"],
    }


def slot_statistics(
    model: train_gpu.Model, x_BT: Tensor, y_BT: Tensor
) -> tuple[list[dict], list[dict]]:
    """A row for each head of each layer, and a row for each slot. The first list also has a row for
    each layer, and one for all, zeroed as a whole (head and layer None).
    """
    with torch.inference_mode(), watched(model) as seen:
        model.hidden(x_BT, model.empty_state(len(x_BT)))
    base = sequence_losses(model, x_BT, y_BT)

    def without(keep: dict[int, Tensor]) -> dict[str, float]:
        with watched(model, keep):
            return paired_change(sequence_losses(model, x_BT, y_BT), base)

    heads, slots = [], []
    for layer, write_BHTS, M_BHSE in seen:
        ones_HS = torch.ones_like(write_BHTS[0, :, 0])
        for head in range(M_BHSE.size(1)):
            own = each_slot(layer, head, ones_HS, without)
            slots += own
            addresses = write_BHTS[:, head].flatten(0, 1)
            heads.append(head_row(layer, head, addresses, M_BHSE[:, head], own))
    none = {layer: torch.zeros_like(write[0, :, 0]) for layer, write, _ in seen}
    heads += [dict(layer=layer, head=None) | without({layer: mask}) for layer, mask in none.items()]
    heads.append(dict(layer=None, head=None, loss=float(base.mean())) | without(none))
    return heads, slots


def slots_of_run(b: Bench, w: World) -> tuple[list[dict], list[dict], dict]:
    """Slot statistics of a run's newest good checkpoint, on sequences from all of its validation
    text; and what was measured.
    """
    path = lib.find_checkpoint(lib.find_run(Path(b.logs_folder), b.run))
    model, state = lib.load(path)
    trainer = lib.trainer_of(model)
    if trainer != "train_gpu" or model.cfg.mixer != "hamt":
        raise UserError(
            f"{path}: has no holographic memory ({getattr(model.cfg, 'mixer', trainer)}); slot "
            f"statistics are of train_gpu.py's MIXER=hamt"
        )
    if model.cfg.memory != "on":
        raise UserError(
            f"{path}: was trained with MEMORY={model.cfg.memory}, so its slots are never read"
        )
    shards, T = open_text(model.cfg, w)[1]["val"].shards, model.cfg.sequence_length
    n = min(b.slot_sequences or 32, (shards.total - 1) // T)
    if n < 2:
        raise UserError(
            f"DATA={model.cfg.data}: its validation text has {shards.total} tokens, two sequences "
            f"of {T} needed"
        )
    places = np.linspace(0, shards.total - 1 - T, n).astype(int)
    texts = np.stack([shards.read(int(place), T + 1) for place in places])
    tokens = torch.from_numpy(texts.astype(np.int64)).to(w.device)
    heads, slots = slot_statistics(model.to(w.device), tokens[:, :-1], tokens[:, 1:])
    what = {
        "run": b.run,
        "checkpoint": str(path),
        "val_loss": state["progress"]["val_loss"],
        "sequences": n,
        "tokens": n * T,
    }
    return heads, slots, what
