"""scaled_support.py -- plain references for train_scaled.py: the memory step by step, the
original's cumulative-sum
form of it, dense window attention, and the whole phase-8 model. Slow and short, written from the
fact sheet's formulas.

Shapes   B rows, N patches, D width, H heads, E = D / H, F value width; all in the dtype of the
inputs
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def step_recurrence(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, S: Tensor, delta: bool = False
) -> tuple[Tensor, Tensor]:
    """S_t = e^a_t S_{t-1} + k_t u_t^T, o_t = S_t^T q_t; one patch after another. Arguments as
    train_scaled.memory.
    """
    out = []
    for t in range(q.size(2)):
        decay = a.exp()[:, None, None] if a.dim() == 1 else a[:, :, t].exp()[..., None, None]
        S, k_t = S * decay, k[:, :, t, :, None]
        u = v[:, :, t, None] - k_t.mT @ S if delta else v[:, :, t, None]
        S = S + k_t * u
        out.append(q[:, :, t, None] @ S)
    return torch.cat(out, 2), S


def cumsum_memory(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    """The original's form, clamp included: every write scaled by lambda^-t, a cumulative sum over
    all outer products (B, H, N, E, E), scaled back by lambda^t, divided by the summed weights. q, k
    are features; static a (H,).
    """
    t = torch.arange(q.size(2), device=q.device, dtype=q.dtype)
    exponent = (t * a[:, None]).clamp(-50, 50)
    down, up = exponent.exp()[None, :, :, None], (-exponent).exp()[None, :, :, None]
    S = torch.einsum("bhne,bhnf->bhnef", k * up, v).cumsum(2) * down[..., None]
    z = (k * up).cumsum(2) * down
    return torch.einsum("bhne,bhnef->bhnf", q, S) / ((q * z).sum(-1, keepdim=True) + 1e-6)


def dense_window(q: Tensor, k: Tensor, v: Tensor, w: int | None) -> Tensor:
    """Softmax attention over all pairs, those outside the window masked. k, v begin with the
    patches before q's.
    """
    N, P = q.size(2), k.size(2) - q.size(2)
    far = torch.arange(N, device=q.device)[:, None] + P - torch.arange(P + N, device=q.device)
    scores = (q @ k.mT) * q.size(-1) ** -0.5
    return scores.masked_fill(~((far >= 0) & (far < (w or P + N))), -1e4).softmax(-1) @ v


def byte_memory(memory: nn.Module, s: list[int], logits: Tensor, hidden: Tensor) -> Tensor:
    """log p (T, 256) of the bytes 24 .. of s, from the decoder's logits and states (T, 256): a
    ByteMemory byte by byte, a dict for each table, from row to what is in it.
    """
    lengths, rows = memory.tables.hash.lengths, memory.tables.rows
    G = len(lengths)
    by_count = memory.escape_by_count.view(G, 9, 9)
    by_age, rank_weight = memory.escape_by_age.view(G, -1), memory.log_rank_weight.view(G, 8).exp()
    tables, out = [{} for _ in lengths], []
    for t in range(24, len(s)):
        keys = memory.tables.hash(torch.tensor(s[t - 24 : t])).tolist()
        p, by_state = logits[t - 24].softmax(-1), memory.escape_by_state(hidden[t - 24])
        for g, (table, key) in enumerate(zip(tables, keys, strict=True)):
            history, behind = table.get(key % rows, (None, []))
            behind = behind if history == key else []
            table[key % rows] = key, [(s[t], t), *behind][:8]
            if not behind:
                continue
            age = t - behind[0][1]
            escape = by_count[g, len(behind), len({byte for byte, _ in behind})] + by_state[g]
            escape = torch.sigmoid(escape + by_age[g, min(age.bit_length() - 1, 19)])
            weights = rank_weight[g, : len(behind)] / rank_weight[g, : len(behind)].sum()
            followers = sum(
                weight * F.one_hot(torch.tensor(byte), 256)
                for weight, (byte, _) in zip(weights, behind, strict=True)
            )
            p = (1 - escape) * followers + escape * p
        out.append(p.log())
    return torch.stack(out)


class PlainBlock(nn.Module):
    def __init__(self, D: int, H: int):
        super().__init__()
        self.H = H
        self.ln1, self.ln2, self.mem_ln = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.att_qkv, self.mem_qkv = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D)
        self.att_proj, self.mem_proj, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.decay_logits = nn.Parameter(torch.zeros(H))

    def heads(self, x: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (self.H, -1)).transpose(1, 2) for t in x.chunk(3, -1)]

    def forward(self, x: Tensor, w: int, low: float, form: str) -> Tensor:
        h = self.ln1(x)
        att = self.att_proj(
            dense_window(*self.heads(self.att_qkv(h)), w).transpose(1, 2).flatten(2)
        )
        q, k, v = self.heads(self.mem_qkv(h))
        q, k = (F.elu(q) + 1) / q.size(-1) ** 0.5, F.elu(k) + 1
        a = (low + (1 - low) * torch.sigmoid(self.decay_logits)).log()
        if form == "cumsum":
            o = cumsum_memory(q, k, v, a)
        else:
            ones = torch.ones_like(v[..., :1])
            o, _ = step_recurrence(
                q,
                k,
                torch.cat([v, ones], -1),
                a,
                q.new_zeros(len(q), self.H, q.size(-1), q.size(-1) + 1),
            )
            o = o[..., :-1] / (o[..., -1:] + 1e-6)
        mem = self.mem_ln(self.mem_proj(o.transpose(1, 2).flatten(2)))
        x = x + self.out(att + mem)
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class PlainPhase8(nn.Module):
    """The seed's model (commit a393cb5 of the original) without dropout, part by part as the fact
    sheet lists it.
    """

    def __init__(
        self, D: int, L: int, H: int, w: int, low: float, thinking: int = 3, form: str = "steps"
    ):
        super().__init__()
        self.w, self.low, self.thinking, self.form = w, low, thinking, form
        self.embed, self.conv, self.ln_in = (
            nn.Embedding(256, D),
            nn.Conv1d(D, D, 4, stride=4),
            nn.LayerNorm(D),
        )
        self.blocks = nn.ModuleList(PlainBlock(D, H) for _ in range(L))
        self.norm_f, self.ln_t, self.gate = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, D)
        self.t_up, self.t_down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.latent, self.byte = nn.Linear(D, 256), nn.Embedding(256, 256)
        self.gru, self.head = nn.GRU(512, 256, batch_first=True), nn.Linear(256, 256)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits (B, T, 256) of the targets y."""
        z = self.conv(self.embed(x).transpose(1, 2)).transpose(1, 2)
        B, N, D = z.shape
        rate = 1.0 / 10000 ** (torch.arange(0, D, 2, device=x.device).float() / D)
        angle = torch.outer(torch.arange(N, device=x.device).float(), rate)
        cos, sin = torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()
        turned = torch.cat([-z[..., D // 2 :], z[..., : D // 2]], -1)
        z = self.ln_in(z * cos + turned * sin)
        for block in self.blocks:
            z = block(z, self.w, self.low, self.form)
        z = self.norm_f(z)
        for _ in range(self.thinking):
            n = self.ln_t(z)
            z = z + torch.sigmoid(self.gate(n)) * self.t_down(F.gelu(self.t_up(n)))
        latent = self.latent(z).reshape(B * N, 1, 256).expand(-1, 4, -1)
        targets = y.reshape(B * N, 4)
        before = torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1]], 1)
        hidden, _ = self.gru(torch.cat([self.byte(before), latent], -1))
        return self.head(hidden).view(B, N * 4, 256)


def copy_phase8(model: nn.Module, plain: PlainPhase8) -> None:
    """Give the plain model the weights of a train_scaled.ByteLM of the phase-8 form."""
    pairs = [(plain.embed, model.embed), (plain.conv, model.patch), (plain.ln_in, model.norm_in)]
    pairs += [
        (plain.norm_f, model.norm_out),
        (plain.ln_t, model.thinking.norm),
        (plain.gate, model.thinking.gate),
    ]
    pairs += [(plain.t_up, model.thinking.mlp[0]), (plain.t_down, model.thinking.mlp[2])]
    pairs += [(plain.latent, model.decoder.latent), (plain.byte, model.decoder.embed)]
    pairs += [(plain.gru, model.decoder.gru), (plain.head, model.decoder.out)]
    for theirs, ours in zip(plain.blocks, model.blocks, strict=True):
        pairs += [
            (theirs.ln1, ours.norm1),
            (theirs.ln2, ours.norm2),
            (theirs.mem_ln, ours.memory.norm),
        ]
        pairs += [
            (theirs.att_qkv, ours.qkv),
            (theirs.mem_qkv, ours.memory.qkv),
            (theirs.att_proj, ours.proj),
        ]
        pairs += [(theirs.mem_proj, ours.memory.proj), (theirs.out, ours.out)]
        pairs += [(theirs.up, ours.mlp[0]), (theirs.down, ours.mlp[2])]
        theirs.decay_logits.data.copy_(ours.memory.retention.data)
    for theirs, ours in pairs:
        weights = ours.state_dict()
        if theirs is plain.gru:  # ours is a cell
            weights = {f"{name}_l0": t for name, t in weights.items()}
        theirs.load_state_dict(weights)


def half_life(retention: float) -> float:
    return math.log(0.5) / math.log(retention)
