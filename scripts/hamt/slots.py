"""slots.py -- statistics of a memory's slots that can fail."""

import contextlib
import math
from collections.abc import Iterator
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
from plumbing.text_batches import open_text


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
    """While inside, the list fills with (layer, write addresses (B, T, H, S), state behind (B,
    H, S, E)) of the memory
    layers. `keep` has by layer a (H, S) of ones and zeros: where it is 0 nothing is written, so
    nothing is read."""
    seen, keep = [], keep or {}
    layers = {
        i: block.mixer for i, block in enumerate(model.blocks) if hasattr(block.mixer, "recall")
    }

    def wrap(layer: int, mixer: train_gpu.Memory) -> None:
        recall = mixer.recall

        def recorded(read, write, bound, log_decay, M, *rest) -> tuple[Tensor, Tensor]:
            if layer in keep:
                write, M = write * keep[layer], M * keep[layer][..., None]
            found, M = recall(read, write, bound, log_decay, M, *rest)
            seen.append((layer, write, M))
            return found, M

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


def slot_statistics(
    model: train_gpu.Model, x_BT: Tensor, y_BT: Tensor
) -> tuple[list[dict], list[dict]]:
    """Of each layer and head: effective ranks of its write addresses over all tokens, the cosine
    between slots of the
    state behind the last, and its slots' use. Of each slot: the loss change when it is zeroed
    from the first token on.
    The first list also has a row for each layer, and one for all, zeroed as a whole (head and
    layer None)."""
    with torch.inference_mode(), watched(model) as seen:
        model.hidden(x_BT, model.empty_state(len(x_BT)))
    base = sequence_losses(model, x_BT, y_BT)

    def without(keep: dict[int, Tensor]) -> dict[str, float]:
        with watched(model, keep):
            return paired_change(sequence_losses(model, x_BT, y_BT), base)

    heads, slots = [], []
    for layer, write_BTHS, M_BHSE in seen:
        H, S, E = M_BHSE.shape[1:]
        for head in range(H):
            entropy, participation = effective_rank(write_BTHS[:, :, head].flatten(0, 1))
            own = []
            for slot in range(S):
                mask = write_BTHS.new_ones(H, S)
                mask[head, slot] = 0
                own.append(dict(layer=layer, head=head, slot=slot) | without({layer: mask}))
            slots += own
            row = dict(
                layer=layer,
                head=head,
                slots=S,
                rank_entropy=entropy,
                rank_participation=participation,
            )
            row |= dict(
                slot_cosine=slot_cosine(M_BHSE[:, head]),
                cosine_if_unrelated=math.sqrt(2 / (math.pi * E)),
            )
            largest = max(own, key=lambda r: r["loss_change"])
            used = sum(
                r["loss_change"] > r["half"] for r in own
            )  # that the loss rises is more than chance
            heads.append(
                row
                | dict(
                    slots_that_matter=used, loss_change=largest["loss_change"], half=largest["half"]
                )
            )
    none = {layer: torch.zeros_like(write[0, 0]) for layer, write, _ in seen}
    heads += [dict(layer=layer, head=None) | without({layer: mask}) for layer, mask in none.items()]
    heads.append(dict(layer=None, head=None, loss=float(base.mean())) | without(none))
    return heads, slots


def slots_of_run(b: Bench, w: World) -> tuple[list[dict], list[dict], dict]:
    """Slot statistics of a run's newest good checkpoint, on the front of its validation text;
    and what was measured."""
    path = lib.find_checkpoint(lib.find_run(Path(b.logs_folder), b.run))
    model, state = lib.load(path)
    if lib.trainer_of(model) != "train_gpu" or not any(
        hasattr(block.mixer, "recall") for block in model.blocks
    ):
        what = getattr(model.cfg, "mixer", lib.trainer_of(model))
        raise UserError(
            f"{path}: has no holographic memory ({what}); slot statistics are of train_gpu.py's MIXER=hamt"
        )
    if model.cfg.memory != "on":
        raise UserError(
            f"{path}: was trained with MEMORY={model.cfg.memory}, so its slots are never read"
        )
    shards, T, n = (
        open_text(model.cfg, w)[1]["val"].shards,
        model.cfg.sequence_length,
        b.slot_sequences or 32,
    )
    n = min(n, (shards.total - 1) // T)
    if n < 2:
        raise UserError(
            f"DATA={model.cfg.data}: its validation text has {shards.total} tokens, two sequences of {T} needed"
        )
    places = np.linspace(0, shards.total - 1 - T, n).astype(int)  # from all of the text
    tokens = torch.from_numpy(
        np.stack([shards.read(int(p), T + 1) for p in places]).astype(np.int64)
    ).to(w.device)
    heads, slots = slot_statistics(model.to(w.device), tokens[:, :-1], tokens[:, 1:])
    what = dict(
        run=b.run,
        checkpoint=str(path),
        val_loss=state["progress"]["val_loss"],
        sequences=n,
        tokens=n * T,
    )
    return heads, slots, what
