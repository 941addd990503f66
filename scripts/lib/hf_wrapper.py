"""modeling_flatrun.py -- a model of flatrun for the library transformers.

Made by scripts/export.py --format hf. flatrun_model.py beside it holds the model's own code, taken
from the trainer that made it; this file gives that model the library's interface. Every call reads
the whole text again: there is no cache of keys and values.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .flatrun_model import MODEL

PATCH = 4  # bytes of a patch of train_scaled.py


class FlatrunConfig(PretrainedConfig):
    """`trainer` is the trainer's name, `model` its model's settings."""

    model_type = "flatrun"

    def __init__(self, trainer: str = "", model: dict | None = None, **others):
        self.trainer = trainer
        self.model = model or {}
        super().__init__(**{"tie_word_embeddings": False, **others})


class FlatrunForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FlatrunConfig
    base_model_prefix = "model"

    def __init__(self, config: FlatrunConfig):
        super().__init__(config)
        cfg = SimpleNamespace(**config.model)
        # from_pretrained makes models on "meta", where there are no numbers. The weights come from
        # the file, but the tables of positions are computed, here and now.
        with torch.device("cpu"):
            if config.trainer == "train_gpt":
                self.model = MODEL(cfg, torch.float32)
            else:
                self.model = MODEL(cfg)
        self.tables = {
            module: {name: getattr(module, name).clone() for name in names}
            for module in self.model.modules()
            if (names := module._non_persistent_buffers_set)
        }
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module) -> None:
        """Give a module its tables back: from_pretrained has made room for them, no more."""
        for name, table in self.tables.get(module, {}).items():
            getattr(module, name).copy_(table)

    def get_input_embeddings(self) -> None:
        """The embedding is a plain matrix, which is also the head."""
        return None

    def next_logits(self, x_BT: torch.Tensor) -> torch.Tensor:
        """(B, T, V): row t is for the token behind token t."""
        if self.config.trainer != "train_scaled":
            return self.model.logits(x_BT)
        # It predicts from its first whole patch on: 4 line ends stand in front of the text.
        T = x_BT.size(1)
        text = F.pad(x_BT, (PATCH, 0), value=ord("\n"))
        text = F.pad(text, (0, PATCH - text.size(1) % PATCH))
        logits = self.model.logits(text[:, :-PATCH], text[:, PATCH:])[0]
        return logits[:, 1 : T + 1]

    def forward(self, input_ids, labels=None, attention_mask=None, **others) -> CausalLMOutput:
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("texts of different lengths: give them one at a time, unpadded")
        logits = self.next_logits(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, **others) -> dict:
        longest = self.config.model["sequence_length"]
        if self.config.trainer == "train_scaled":
            longest -= PATCH
        return {"input_ids": input_ids[:, -longest:]}
