"""byte_stream.py -- a growing text before a model of train_scaled.py, in constant memory.

stream = Stream(model)
stream.feed(torch.tensor([list(b"Ankara ")]))
stream.logits()                                    # (1, 256), of the byte that comes next
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from histories import BYTES, LONGEST
from train_scaled import PAST, PATCH, ByteLM


class Stream:
    """A text of B rows that grows by one byte or by many at a time, and what may come next: exactly
    the numbers of the whole text's forward pass, whatever the cuts.
    """

    def __init__(self, model: ByteLM, B: int = 1, prefill: int = 4096):
        self.model = model
        self.state = model.empty_state(B)
        self.prefill = prefill  # bytes of a forward pass at the most
        device = model.plasticity.device
        self.held = torch.zeros(B, 0, dtype=torch.long, device=device)  # of the unfinished patch
        self.past = torch.zeros(B, LONGEST, dtype=torch.long, device=device)  # the last bytes
        self.z_BND = None  # the latent of the last whole patch
        with torch.no_grad():
            self.of_byte = model.decoder.byte_inputs()  # the same for every byte that comes

    def next_byte(self) -> Tensor:
        """Time of the next byte; the first that is predicted comes at time 1."""
        return PATCH * (self.state.position - 1) + 1 + self.held.size(1)

    @torch.no_grad()
    def feed(self, x_BT: Tensor, remember: bool = True) -> None:
        """Bytes (B, T), any T. Those that are not remembered are no part of the memory by bytes: a
        sampled text that remembers itself soon repeats itself.
        """
        model = self.model
        x_BT = x_BT.to(self.held)
        seen = torch.cat([self.past, x_BT], 1)
        if model.byte_memory is not None and remember:
            # Bytes of the first patch come before time 1, which makes them none: nothing predicts
            # them.
            tables = model.byte_memory.tables
            *_, writes = tables.read(seen, self.next_byte(), self.state.layers[-1])
            tables.write(self.state.layers[-1], writes)
        x_BT = torch.cat([self.held, x_BT], 1)
        while x_BT.size(1) >= PATCH:
            n = min(x_BT.size(1), self.prefill) // PATCH * PATCH
            z_BND, self.state = model.trunk(x_BT[:, :n], self.state)
            self.z_BND = z_BND[:, -1:]
            x_BT = x_BT[:, n:]
        self.held = x_BT
        self.past = seen[:, -LONGEST:]

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(B, 256), fp32, of the next byte. All equal before the first patch is whole."""
        model, done = self.model, self.held.size(1)
        if self.z_BND is None:
            return torch.zeros(len(self.held), BYTES, device=self.held.device)
        before = self.past[:, : LONGEST - done][:, -PAST:]  # of the patch that is predicted
        own = F.pad(self.held, (0, PATCH - done))
        logits, hidden = model.decoder(self.z_BND, before[:, None], own[:, None], self.of_byte)
        logits, hidden = logits[:, 0, done], hidden[:, 0, done]
        if model.byte_memory is None or model.cfg.memory == "zero":
            return logits
        text = F.pad(self.past, (0, 1))  # a place for the byte that is not there yet
        tables = self.state.layers[-1]
        followers, age, _ = model.byte_memory.tables.read(text, self.next_byte(), tables)
        return model.byte_memory.mix(logits, hidden, followers[:, 0], age[:, 0])

    def state_bytes(self) -> int:
        """Memory that the text so far takes, whatever its length."""
        tensors = [tensor for layer in self.state.layers for tensor in layer]
        return sum(t.numel() * t.element_size() for t in (*tensors, self.past))
