"""scoring.py -- how probable a model holds a text, whichever trainer wrote it.

    scorer = Scorer(model, tokenizer("bytes"))
    scorer.score([("The capital of Turkey is", " Ankara")])     # [(log-probability, is_greedy)]

A text begins where a document of the training data begins: behind the tokenizer's separator, and
with train_scaled.py's models, which predict nothing before their first whole patch of 4 bytes,
behind 4 line ends. A text that is longer than SEQUENCE_LENGTH loses its beginning.
Shapes   B rows, T tokens, V vocabulary; fp32
Raises   UserError: a text with a character that the model's vocabulary lacks
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lib import runs
from plumbing.knobs import UserError
from plumbing.texts import Tokenizer

PATCH = 4  # bytes of a patch of train_scaled.py


class Scorer:
    """A model with its tokenizer. `rows` texts go through the model at a time."""

    def __init__(self, model: nn.Module, tokens: Tokenizer, rows: int = 8):
        self.model, self.tokens, self.rows = model, tokens, rows
        self.trainer = runs.trainer_of(model)
        self.device = next(model.parameters()).device
        self.size = model.cfg.sequence_length
        self.num_ids = min(runs.vocabulary(model), tokens.size)  # the rest is padding
        self.prefix = [tokens.separator]
        if self.trainer == "train_scaled":
            self.prefix = [ord("\n")] * PATCH

    # ------------------------------------------------------------------
    # Texts and tokens

    def encode(self, text: str) -> list[int]:
        ids = self.tokens.encode(text).tolist()
        if ids and max(ids) >= self.num_ids:
            raise UserError(
                f"a text holds token {max(ids)} of the {self.tokens.name} tokenizer, this run's "
                f"vocabulary ends at {self.num_ids - 1}; name another --tokenizer"
            )
        return ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, cut where lm-evaluation-harness cuts: spaces at the end of the
        context belong to the continuation, and the two are encoded as one text.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            continuation = context[-spaces:] + continuation
            context = context[:-spaces]
        before = self.encode(context)
        return before, self.encode(context + continuation)[len(before) :]

    # ------------------------------------------------------------------
    # Log-probabilities

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the log-probability of the continuation in nats, and
        whether each of its tokens is the likeliest one.
        """
        return self.score_ids([self.encode_pair(*pair) for pair in pairs])

    def text_nats(self, text: str) -> float:
        """Minus the log-probability of a whole text. Every token sees at least half of
        SEQUENCE_LENGTH of what is before it, where there is as much.
        """
        ids = self.encode(text)
        first = self.size - len(self.prefix)
        pieces = [([], ids[:first])]
        for start in range(first, len(ids), self.size // 2):
            before = ids[max(0, start - self.size) : start]
            pieces.append((before, ids[start : start + self.size // 2]))
        return -sum(log_prob for log_prob, _ in self.score_ids(pieces))

    @torch.inference_mode()
    def score_ids(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """As score(), of token ids. Texts of like length share a batch."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
        for start in range(0, len(order), self.rows):
            some = order[start : start + self.rows]
            texts = [self._text(*pairs[i]) for i in some]
            for i, text, logits_TV in zip(some, texts, self._logits(texts), strict=True):
                num_scored = len(pairs[i][1])
                if num_scored == 0:
                    continue
                target_N = torch.tensor(text[-num_scored:], device=self.device)
                logits_NV = logits_TV[len(text) - num_scored : len(text)]
                log_probs_NV = logits_NV.float().log_softmax(dim=-1)
                log_probs_N = log_probs_NV.gather(1, target_N[:, None])[:, 0]
                is_greedy = bool((logits_NV.argmax(dim=-1) == target_N).all())
                found[i] = log_probs_N.double().sum().item(), is_greedy
        return found

    def _text(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        if len(continuation) > self.size - len(self.prefix):
            raise UserError(
                f"a continuation has {len(continuation)} tokens, this run's SEQUENCE_LENGTH is "
                f"{self.size}; give its text with --text instead"
            )
        return [*self.prefix, *context, *continuation][-self.size :]

    def _logits(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each text logits (T, V), of which row t is for its token t. Rows that nothing
        predicts, the first of a text, are zero.
        """
        unit = PATCH if self.trainer == "train_scaled" else 1
        longest = math.ceil(max(map(len, texts)) / unit) * unit
        x_BT = torch.zeros(len(texts), longest, dtype=torch.long, device=self.device)
        for row, text in zip(x_BT, texts, strict=True):
            row[: len(text)] = torch.tensor(text, device=self.device)
        shift = len(self.prefix)
        if self.trainer == "train_scaled":
            logits_BTV = self.model.logits(x_BT[:, :-shift], x_BT[:, shift:])[0]
        else:
            logits_BTV = self.model.logits(x_BT[:, :-shift])
        nothing = logits_BTV.new_zeros(len(texts), shift, logits_BTV.size(-1))
        return list(torch.cat([nothing, logits_BTV], dim=1))

    @torch.inference_mode()
    def continue_text(self, context: str, until: Sequence[str], most: int) -> str:
        """The likeliest next tokens one after another, up to `most` of them or one of `until`."""
        before = self.encode(context)
        made: list[int] = []
        text = ""
        for _ in range(most):
            ids = self._text([*before, *made], [0])  # a place for the token that comes next
            made.append(int(self._logits([ids])[0][len(ids) - 1, : self.num_ids].argmax()))
            text = b"".join(map(self.tokens.piece, made)).decode(errors="replace")
            ends = [text.index(word) for word in until if word in text]
            if ends:
                return text[: min(ends)]
        return text
