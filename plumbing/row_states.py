"""row_states.py -- what each row of a batch carries from one step to the next.

Promises: a rank keeps the states of its own rows; a checkpoint holds those of all rows, so that any
number of ranks can go on with them; and no gradient flows from one step into the one before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from plumbing.knobs import UserError
from plumbing.world import World


@dataclass
class State:
    """What a model carries from token to token, for some rows."""

    position: Tensor  # tokens so far, the same for all rows, int64
    layers: list[tuple[Tensor, ...]]  # the rows are the first dimension

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)


class CarryKnobs(Protocol):
    batch_size: int  # rows of a step, over all ranks
    carry_state: bool


class CarryingModel(Protocol):
    cfg: CarryKnobs

    def empty_state(self, rows: int) -> State: ...


class RowStates:
    """The states from which this rank's rows of the batch go on; empty_state(rows) makes them.
    With None nothing is carried, and every row always starts from an empty state.
    """

    def __init__(self, empty_state: Callable[[int], State] | None, batch_size: int, world: World):
        self.batch_size, self.world = batch_size, world
        self.state = None
        if empty_state is not None:
            share = world.share(batch_size)
            self.state = empty_state(share.stop - share.start)
            self.position = self.state.position.clone()  # where this step begins

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for layer in self.state.layers for tensor in layer]

    @property
    def num_bytes(self) -> int:
        """Of the states of all rows of the batch, as a checkpoint has them."""
        if self.state is None:
            return 0
        return sum(t[:1].numel() * t.element_size() for t in self.tensors) * self.batch_size

    def start_step(self, is_new_epoch: bool) -> None:
        """In a new epoch the rows start over, at the front of their parts of the text."""
        if self.state is None:
            return
        if is_new_epoch:
            self.state.position.zero_()
            for tensor in self.tensors:
                tensor.zero_()
        # put() moves the other one on before all rows are taken. In place, for a recorded step.
        self.position.copy_(self.state.position)

    def take(self, rows: slice) -> State | None:
        if self.state is None:
            return None
        layers = [tuple(tensor[rows] for tensor in layer) for layer in self.state.layers]
        return State(self.position, layers)

    def put(self, rows: slice, state: State) -> None:
        if self.state is None:
            return
        self.state.position.copy_(state.position)
        for own_layer, new_layer in zip(self.state.layers, state.layers, strict=True):
            for own, new in zip(own_layer, new_layer, strict=True):
                own[rows] = new.detach()

    def state_dict(self) -> dict[str, object]:
        """The states of all rows of the batch, on every rank."""
        if self.state is None:
            return {}
        whole = []
        for tensor in self.tensors:
            rows = tensor.new_zeros(self.batch_size, *tensor.shape[1:])
            rows[self.world.share(self.batch_size)] = tensor
            if rows.dtype == torch.int16:  # which no backend sums
                rows = rows.int()
            whole.append(self.world.all_reduce(rows).to(tensor.dtype))
        return {"position": self.state.position, "rows": whole}

    def load_state_dict(self, saved: dict[str, object]) -> None:
        """Raises UserError where they are those of another model, such as one of another commit."""
        if self.state is None:
            return
        own = [tuple(tensor.shape[1:]) for tensor in self.tensors]
        given = [tuple(rows.shape[1:]) for rows in saved["rows"]]
        if own != given:
            raise UserError(
                "states of another model: what the rows carry has other shapes than it has here; "
                "use the commit that wrote them (the log of that run has it), or start a new run"
            )
        self.state.position.copy_(saved["position"])
        for tensor, rows in zip(self.tensors, saved["rows"], strict=True):
            tensor.copy_(rows[self.world.share(self.batch_size)])


def row_states(model: CarryingModel, world: World) -> RowStates:
    """What this rank's rows carry from step to step: nothing with CARRY_STATE=0."""
    cfg = model.cfg
    return RowStates(model.empty_state if cfg.carry_state else None, cfg.batch_size, world)
