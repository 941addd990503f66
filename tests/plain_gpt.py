"""plain_gpt.py -- the plain implementation that train_gpt.py's faster one is compared with.

The same training step the straightforward way: one weight per projection, logits in full, one
Newton-Schulz per matrix. Nothing here is tuned and nothing is shared with train_gpt.py, so that
agreement between the two means something. Dtypes follow the autocast, bf16 unless told otherwise,
that train_step() puts around the forward.

Shapes   B sequences, T tokens, C model width, H heads, D = C / H head width, V vocabulary, M width
         of the MLP; x_BT is (B, T)
Weights  wte (V, C), also the head; blocks.N.{q,k,v,o} (C, C), up (M, C), down (C, M);
         blocks.N.gate: headwise (H, C), elementwise (C, C) with channel = head * D + dim,
         const (H, D)
Source   modded-nanogpt, the record of 2024-10-14 by Keller Jordan and others, from its description;
         gates after Qiu et al., arXiv 2505.06708
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATE_ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "ns_sigmoid": lambda z: 0.5 + 0.5 * torch.sigmoid(z),
    "silu": F.silu,
    "identity": lambda z: z,
}


def linear_init(rows: int, cols: int) -> nn.Parameter:
    """What nn.Linear(cols, rows) starts from: U(-1/sqrt(cols), 1/sqrt(cols))."""
    return nn.Parameter(torch.empty(rows, cols).uniform_(-(cols**-0.5), cols**-0.5))


def zero_init(rows: int, cols: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, cols))


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(num_tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, (T, 1, D/2), rounded to bf16."""
    inverse_frequency = 1.0 / 10000 ** (
        torch.arange(0, head_dim, 2, device=device).float() / head_dim
    )
    angle = torch.outer(torch.arange(num_tokens, device=device).float(), inverse_frequency)
    return angle.cos().bfloat16()[:, None, :], angle.sin().bfloat16()[:, None, :]


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, -x1 * sin + x2 * cos), dim=-1).type_as(x_BTHD)


class Block(nn.Module):
    def __init__(
        self, n_head: int, n_embd: int, mlp_hidden: int, attngate: str, gatepos: str, gateact: str
    ) -> None:
        super().__init__()
        self.n_head, self.head_dim = n_head, n_embd // n_head
        self.attngate, self.gatepos, self.activation = attngate, gatepos, GATE_ACTIVATIONS[gateact]
        self.q = linear_init(n_embd, n_embd)
        self.k = linear_init(n_embd, n_embd)
        self.v = linear_init(n_embd, n_embd)
        self.o = zero_init(n_embd, n_embd)
        self.up = linear_init(mlp_hidden, n_embd)
        self.down = zero_init(n_embd, mlp_hidden)
        if attngate == "headwise":
            self.gate = linear_init(n_head, n_embd)
        elif attngate == "elementwise":
            self.gate = linear_init(n_embd, n_embd)
        elif attngate == "const":
            self.gate = zero_init(n_head, self.head_dim)
        elif attngate != "none":
            raise ValueError(
                f"attngate={attngate!r}: expected none, headwise, elementwise or const"
            )
        if gatepos not in ("sdpa", "value", "key", "query", "output"):
            raise ValueError(f"gatepos={gatepos!r}: expected sdpa, value, key, query or output")

    def gated(self, y_BTHD: Tensor, h_BTC: Tensor, position: str) -> Tensor:
        """y times the gate made of the normed block input h, if this is where the gate sits."""
        if self.attngate == "none" or self.gatepos != position:
            return y_BTHD
        if self.attngate == "const":
            return y_BTHD * self.activation(self.gate)
        z = F.linear(h_BTC, self.gate)
        width = 1 if self.attngate == "headwise" else self.head_dim
        return y_BTHD * self.activation(z).view(*z.shape[:2], self.n_head, width)

    def attention(self, h_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = h_BTC.shape
        heads = (B, T, self.n_head, self.head_dim)
        q = rms_norm(rotate(F.linear(h_BTC, self.q).view(heads), cos, sin))
        k = rms_norm(rotate(F.linear(h_BTC, self.k).view(heads), cos, sin))
        v = F.linear(h_BTC, self.v).view(heads)
        # Gates on q and k come after their norm, which would undo a headwise one.
        q, k, v = (
            self.gated(q, h_BTC, "query"),
            self.gated(k, h_BTC, "key"),
            self.gated(v, h_BTC, "value"),
        )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.gated(y.transpose(1, 2), h_BTC, "sdpa").reshape(B, T, C)
        return self.gated(F.linear(y, self.o).view(heads), h_BTC, "output").reshape(B, T, C)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(rms_norm(x_BTC), cos, sin)
        hidden = F.linear(rms_norm(x_BTC), self.up).relu().square()
        return x_BTC + F.linear(hidden, self.down)


class PlainGPT(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        n_layer: int,
        n_head: int,
        n_embd: int,
        attngate: str = "none",
        gatepos: str = "sdpa",
        gateact: str = "sigmoid",
        mlp_hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = n_embd // n_head
        self.wte = linear_init(vocab_size, n_embd)
        self.blocks = nn.ModuleList(
            Block(n_head, n_embd, mlp_hidden or 4 * n_embd, attngate, gatepos, gateact)
            for _ in range(n_layer)
        )

    def logits(self, x_BT: Tensor) -> Tensor:
        cos, sin = rotary_tables(x_BT.size(1), self.head_dim, x_BT.device)
        x = F.embedding(x_BT, self.wte)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(rms_norm(x), self.wte).float()

    def forward(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x_BT).flatten(0, 1), y_BT.flatten())


def newton_schulz(G: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearly the orthogonal factor of G: five steps of Keller Jordan's quintic."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(dtype) / (G.norm() + 1e-7)
    if G.size(0) > G.size(1):
        X = X.T
    for _ in range(5):
        A = X @ X.T
        B = A @ X
        X = a * X + b * B + c * A @ B
    return X.T if G.size(0) > G.size(1) else X


class PlainMuon(torch.optim.Optimizer):
    """Nesterov momentum, each matrix orthogonalized by itself; the root makes the update's RMS
    about lr.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        compiled: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.orthogonalize = torch.compile(newton_schulz) if compiled else newton_schulz

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["buf"] = torch.zeros_like(p)
                state["buf"].mul_(group["momentum"]).add_(p.grad)
                X = self.orthogonalize(p.grad + group["momentum"] * state["buf"], self.dtype)
                p.add_(X, alpha=-group["lr"] * max(p.shape) ** 0.5)


def plain_optimizers(
    model: PlainGPT, lr: float, compiled: bool = False, dtype: torch.dtype = torch.bfloat16
) -> list[torch.optim.Optimizer]:
    """AdamW for the tied embedding, Muon at a tenth of its rate for the blocks, gates included."""
    return [
        torch.optim.AdamW(
            [model.wte], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0, fused=True
        ),
        PlainMuon(list(model.blocks.parameters()), 0.1 * lr, compiled=compiled, dtype=dtype),
    ]


def train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    x_BT: Tensor,
    y_BT: Tensor,
    micro_batch_seqs: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """One optimizer step of a PlainGPT or a compiled one. Returns the batch's mean loss."""
    num_micro = len(x_BT) // micro_batch_seqs
    losses = []
    for x, y in zip(x_BT.split(micro_batch_seqs), y_BT.split(micro_batch_seqs), strict=True):
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(x, y)
        loss.backward()
        losses.append(loss.detach())
    for p in model.parameters():
        p.grad /= num_micro
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).mean()
