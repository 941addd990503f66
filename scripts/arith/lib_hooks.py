"""lib_hooks.py -- a trained model whose activations can be read and replaced, by TransformerLens'
names.

    model = hooked(trained)
    logits, cache = model.run_with_cache(ids_BT)          cache["z", 2] is (B, T, H, D), cloned
    with model.hooks([("blocks.2.attn.hook_z", fn)]):     fn(x, point) returns a replacement, or
    None
        model(ids_BT)

The subclasses here compute what the trainer's classes compute without dropout, through one named
point per activation. A point is a module that passes on what it gets, and a hook is an ordinary
forward hook of torch on it. What a hook function gets is a clone: it may write into it.

Shapes   B sequences, T tokens, H heads, D head width, C model width
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_arith import MLP, Attention, Block, CompactTransformer, Knobs, SharedDropout, rotate

Hook = tuple[
    str | Callable[[str], bool], Callable
]  # a point's name or a test of names; fn(x, point)


class Point(nn.Module):
    """A named place in the forward pass; `layer` is None outside of the blocks."""

    name = ""
    layer: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x


class HookedAttention(Attention):
    def __init__(self, cfg: Knobs, drop: SharedDropout):
        super().__init__(cfg, drop)
        self.hook_q, self.hook_k, self.hook_v = Point(), Point(), Point()
        self.hook_attn_scores, self.hook_pattern, self.hook_z = Point(), Point(), Point()

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        parts = self.qkv(x_BTC).view(B, T, 3, self.cfg.n_head, -1)
        q_BTHD, k_BTHD, v_BTHD = parts.unbind(2)
        q = self.hook_q(q_BTHD).transpose(1, 2)
        k = self.hook_k(k_BTHD).transpose(1, 2)
        v = self.hook_v(v_BTHD).transpose(1, 2)
        if self.cfg.use_rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores = (q * q.size(-1) ** -0.5) @ k.mT
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = self.hook_attn_scores(scores.masked_fill(future, -torch.inf))
        pattern = self.hook_pattern(scores.softmax(dim=-1).type_as(v))
        z_BTHD = self.hook_z((pattern @ v).transpose(1, 2))
        return self.out(z_BTHD.reshape(B, T, C))


class HookedMLP(MLP):
    def __init__(self, cfg: Knobs, drop: SharedDropout):
        super().__init__(cfg, drop)
        self.hook_pre, self.hook_post = Point(), Point()

    def forward(self, x_BTC: Tensor) -> Tensor:
        pre = self.hook_pre(self.fc1(x_BTC))
        post = F.silu(pre) if self.cfg.ffn_type == "swiglu" else F.gelu(pre)
        post = self.hook_post(post)
        if self.cfg.ffn_type != "gelu":
            post = post * self.value(x_BTC)
        return self.fc2(post)


class HookedBlock(Block):
    def __init__(self, cfg: Knobs, drop: SharedDropout):
        super().__init__(cfg, drop)
        self.attn, self.mlp = HookedAttention(cfg, drop), HookedMLP(cfg, drop)
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = Point(), Point(), Point()
        self.hook_attn_out, self.hook_mlp_out = Point(), Point()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.hook_resid_pre(x)
        x = x + self.hook_attn_out(self.attn(self.ln1(x), cos, sin))
        x = self.hook_resid_mid(x)
        x = x + self.hook_mlp_out(self.mlp(self.ln2(x)))
        return self.hook_resid_post(x)


class HookedTransformer(CompactTransformer):
    """CompactTransformer with a point for every activation; always in eval mode."""

    def __init__(self, cfg: Knobs):
        super().__init__(cfg)
        self.blocks = nn.ModuleList(HookedBlock(cfg, self.drop) for _ in range(cfg.n_layer))
        self.hook_embed = Point()
        self.ln_final = HookedNorm(cfg.n_embd)
        self.points = {}
        for name, module in self.named_modules():
            if isinstance(module, Point):
                module.name = name
                module.layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
                self.points[name] = module
        self.eval()

    def forward(self, ids_BT: Tensor) -> Tensor:
        T = ids_BT.size(1)
        x = self.embed(ids_BT)
        if not self.cfg.use_rope:
            x = x + self.position.weight[:T]
        x = self.hook_embed(x)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        head = self.embed if self.cfg.tie_weights else self.head
        return F.linear(self.ln_final(x), head.weight)

    def hook_names(self) -> list[str]:
        return list(self.points)

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[Hook]) -> Iterator["HookedTransformer"]:
        """Within, each fn(x, point) runs at its points, in order, after those of an outer `with`.
        All is as before on leaving, whatever happened. Raises ValueError for an unknown name."""
        handles = []
        try:
            for wanted, fn in fwd_hooks:
                for name in self._chosen(wanted):
                    handles.append(self.points[name].register_forward_hook(_on_a_clone(fn)))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _chosen(self, wanted: str | Callable[[str], bool]) -> list[str]:
        is_wanted = wanted if callable(wanted) else wanted.__eq__
        chosen = [name for name in self.points if is_wanted(name)]
        if not chosen:
            near = difflib.get_close_matches(str(wanted), self.points, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{wanted} is not a hook{hint}")
        return chosen

    def run_with_hooks(self, ids_BT: Tensor, fwd_hooks: Sequence[Hook]) -> Tensor:
        with self.hooks(fwd_hooks):
            return self(ids_BT)

    def run_with_cache(
        self, ids_BT: Tensor, names: Callable[[str], bool] = lambda name: True
    ) -> tuple[Tensor, "Cache"]:
        """Logits, and clones of the activations whose names pass."""
        cache = Cache()
        keep = lambda x, point: cache.update({point.name: x})
        with self.hooks([(names, keep)]):
            return self(ids_BT), cache


class HookedNorm(nn.LayerNorm):
    def __init__(self, width: int):
        super().__init__(width)
        self.hook_normalized = Point()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_normalized(super().forward(x))


def _on_a_clone(fn: Callable) -> Callable:
    """fn as a forward hook. It gets a clone, so that what it was made from, a cache or a view,
    stays as it was when fn writes into it."""

    def hook(point: Point, _: tuple, output: Tensor) -> Tensor:
        x = output.clone()
        found = fn(x, point)
        return x if found is None else found

    return hook


class Cache(dict):
    """Activations by name; cache["z", 2] is short for cache["blocks.2.attn.hook_z"], and
    cache["embed"] likewise."""

    def __missing__(self, key: str | tuple[str, int]) -> Tensor:
        name, layer = key if isinstance(key, tuple) else (key, None)
        prefix = "" if layer is None else f"blocks.{layer}."
        found = [n for n in self if n.startswith(prefix) and n.rsplit(".", 1)[-1] == f"hook_{name}"]
        if len(found) != 1:
            what = f"{len(found)} of the cached activations fit; they are {', '.join(self)}"
            raise KeyError(f"{key}: {what}")
        return self[found[0]]


def hooked(model: CompactTransformer) -> HookedTransformer:
    """The same weights in a model with hooks."""
    other = HookedTransformer(model.cfg).to(model.cos.device)
    other.load_state_dict(model.state_dict())
    return other
