"""subjects.py -- models to compare, with one interface: encode, logits, prefill, decode.

A spec (JSON) says which one, so that a process of its own can open it again.
"""

import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import beside  # noqa: F401  (finds scripts/lib and the trainers)
import numpy as np
import torch
from lib import runs as lib
from torch import Tensor

import train_gpu
from plumbing import UserError
from plumbing.texts import encoder


class Ours:
    """A model of train_gpu.py, from a checkpoint or with its initial weights."""

    def __init__(self, spec: Mapping[str, object], device: torch.device):
        if "path" in spec:
            self.model, _ = lib.load(Path(spec["path"]))
            if lib.trainer_of(self.model) != "train_gpu":
                raise UserError(
                    f"{spec['path']}: a run of {lib.trainer_of(self.model)}.py; expected one of "
                    f"train_gpu.py"
                )
        else:
            self.model = train_gpu.Model(train_gpu.Knobs(**spec["knobs"])).eval()
            train_gpu.init_weights(self.model, self.model.cfg)
        self.cfg, self.device, self.limit = self.model.cfg, device, None
        self.model.to(device)
        self.mixer, self.context = self.cfg.mixer, self.cfg.sequence_length
        self.streams = self.cfg.mixer == "hamt"
        self.vocabulary = self.cfg.vocabulary

    def encode(self, text: str) -> np.ndarray:
        return encoder(self.cfg.encoding)(text)

    def logits(self, x_BT: Tensor) -> Tensor:
        return self.model.logits(x_BT)

    def prefill(self, x_BT: Tensor) -> tuple[Tensor, train_gpu.State]:
        """Logits behind the last token (B, V), and the state; the head is not applied to the
        others."""
        return self.decode(x_BT, self.model.empty_state(len(x_BT)))

    def decode(self, x_BT: Tensor, state: train_gpu.State) -> tuple[Tensor, train_gpu.State]:
        h_BTC, state, _ = self.model.hidden(x_BT, state)
        return self.model.head(h_BTC[:, -1]), state

    def state_bytes(self, state: train_gpu.State) -> int:
        return state.num_bytes


def hub_name(name: str) -> str:
    """Where a short name lives on the hub; a folder is itself."""
    return f"EleutherAI/{name}" if "pythia" in name and "/" not in name else name


def tensors_of(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors inside a cache, whatever form this version of transformers gives it."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        yield from (t for part in thing.values() for t in tensors_of(part, seen))
    elif isinstance(thing, (list, tuple)):
        yield from (t for part in thing for t in tensors_of(part, seen))
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        yield from tensors_of(vars(thing), seen)


class Published:
    """A causal model of transformers, in fp32, with its own tokenizer. Raises UserError where it
    cannot be had."""

    def __init__(self, spec: Mapping[str, object], device: torch.device):
        try:
            import transformers
        except ImportError:
            raise UserError(
                "the package transformers is not installed; pip install transformers"
            ) from None
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        name, self.device = hub_name(spec["name"]), device
        for local in (True,) if spec["offline"] else (True, False):
            try:
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                    name, local_files_only=local
                )
                self.model = transformers.AutoModelForCausalLM.from_pretrained(
                    name, local_files_only=local
                )
                break
            except (
                Exception
            ) as error:  # many kinds in many versions: no network, no such name, a broken file
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        else:
            where = (
                "on this machine" if spec["offline"] else "neither on this machine nor from the hub"
            )
            raise UserError(f"no weights of {name} {where} ({why})") from None
        self.model = self.model.float().eval().to(device)
        self.mixer, self.streams = "attention", False
        self.limit = getattr(self.model.config, "max_position_embeddings", None)
        self.context, self.vocabulary = self.limit or 1024, self.model.config.vocab_size
        known = inspect.signature(self.model.forward).parameters
        self.last_only = dict(logits_to_keep=1) if "logits_to_keep" in known else {}

    def encode(self, text: str) -> np.ndarray:
        return np.array(
            self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64
        )

    def logits(self, x_BT: Tensor) -> Tensor:
        return self.model(input_ids=x_BT, use_cache=False).logits

    def prefill(self, x_BT: Tensor) -> tuple[Tensor, object]:
        return self.decode(x_BT, None)

    def decode(self, x_BT: Tensor, state: object) -> tuple[Tensor, object]:
        found = self.model(input_ids=x_BT, past_key_values=state, use_cache=True, **self.last_only)
        return found.logits[:, -1], found.past_key_values

    def state_bytes(self, state: object) -> int:
        return sum(t.numel() * t.element_size() for t in tensors_of(state, set()))


Subject = Ours | Published


def open_subject(spec: Mapping[str, object], device: torch.device) -> Subject:
    return (Published if "name" in spec else Ours)(spec, device)


def n_params(subject: Subject) -> int:
    return sum(p.numel() for p in subject.model.parameters())  # tied weights are one parameter
