"""sample.py -- text from a run's newest good checkpoint.

    python scripts/sample.py --run ID --prompt "The meaning of"
    python scripts/sample.py --run ID --prompt "import " --temperature 0 --tokens 500
    python scripts/sample.py --run ID --num_samples 3 --seed 7 --device cuda

The text goes to stdout as it is made, everything else to stderr. An empty prompt starts a new
document, and a sample ends with its document. Sample i draws with seed SEED + i, on the CPU, so
that a device changes rounding only. train_gpt.py's model sees SEQUENCE_LENGTH tokens at most: when
they are full, it goes on from the last half of them, and of a longer prompt it reads the last half
of SEQUENCE_LENGTH; stderr says so. The models of train_gpu.py and train_scaled.py go on from a
carried state, token by token, over any length.
Shapes   B rows, T tokens, H heads, D head width, V vocabulary
Raises   UserError: no such run, no good checkpoint, no tokenizer, a prompt that is not UTF-8 or is
         outside the vocabulary, no GPU
"""

import argparse
import codecs
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from lib import runs
from lib.runs import pick
from torch import Tensor, nn

from plumbing import UserError, launch
from plumbing.texts import Tokenizer, tokenizer


class KeyValueCache:
    """Takes the place of one Attention.attend, and keeps the keys and values of a growing text."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.k_BHTD: Tensor | None = None
        self.v_BHTD: Tensor | None = None

    def __call__(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        """Many tokens at the beginning of a text, or the one token that comes next."""
        is_first = self.k_BHTD is None
        assert is_first or q_BHTD.size(2) == 1
        if not is_first:
            k_BHTD = torch.cat([self.k_BHTD, k_BHTD], dim=2)
            v_BHTD = torch.cat([self.v_BHTD, v_BHTD], dim=2)
        self.k_BHTD = k_BHTD
        self.v_BHTD = v_BHTD
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=is_first)


class Window:
    """A growing text before train_gpt.py's model, which keeps keys and values between calls.

    A full window starts over from its last half: a token's position is in its key, so that nothing
    can be shifted.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.size = model.cfg.sequence_length
        self.num_held = 0  # tokens in the caches
        self.has_warned = False
        self.caches = [KeyValueCache() for _ in model.blocks]
        for block, cache in zip(model.blocks, self.caches, strict=True):
            block.attn.attend = cache

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(V,) on the CPU; `ids` is the whole text so far, of which the model may have seen a
        part.
        """
        new = ids if self.num_held == 0 else ids[-1:]
        if self.num_held + len(new) > self.size:
            new = ids[-max(1, self.size // 2) :]
            self._warn(len(ids), len(new))
            self.num_held = 0
            for cache in self.caches:
                cache.clear()
        device = self.model.wte.device
        x_BT = torch.tensor([list(new)], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits_BTV = self.model.logits(x_BT, start=self.num_held)
        self.num_held += len(new)
        return logits_BTV[0, -1].float().cpu()

    def _warn(self, num_tokens: int, num_kept: int) -> None:
        if self.has_warned:
            return
        self.has_warned = True
        if self.num_held:
            note(
                f"SEQUENCE_LENGTH is full at {self.size} tokens: going on from the last {num_kept}"
            )
        else:
            note(
                f"the prompt has {num_tokens} tokens, SEQUENCE_LENGTH is {self.size}: only its "
                f"last {num_kept} are read"
            )


class Carried:
    """A growing text before train_gpu.py's model: every token goes in once, into a state."""

    CHUNK = 1024  # tokens of a prompt at a time

    def __init__(self, model: nn.Module):
        self.model = model
        self.state = model.empty_state(1)
        self.num_held = 0

    def logits(self, ids: Sequence[int]) -> Tensor:
        new_T = torch.tensor(list(ids[self.num_held :]), device=self.model.wte.device)
        self.num_held = len(ids)
        for chunk_T in new_T.split(self.CHUNK):
            h_BTC, self.state, _ = self.model.hidden(chunk_T[None], self.state)
        return self.model.head(h_BTC[0, -1]).float().cpu()


class Patches:
    """A growing text before train_scaled.py's model, which predicts from the first whole patch of 4
    bytes on; a shorter text gets line ends in front.

    Its memory by bytes hears the prompt alone: a text that remembers itself repeats itself.
    """

    def __init__(self, model: nn.Module):
        from lib.byte_stream import Stream  # imports train_scaled.py

        self.stream = Stream(model)
        self.num_held = 0

    def logits(self, ids: Sequence[int]) -> Tensor:
        is_prompt = self.num_held == 0
        new = list(ids[self.num_held :])
        missing = max(0, 4 - len(ids))
        if is_prompt and missing:
            note(f"the text is shorter than a patch: {missing} line end(s) in front")
            new = [ord("\n")] * missing + new
        self.num_held = len(ids)
        self.stream.feed(torch.tensor([new]), remember=is_prompt)
        return self.stream.logits()[0].cpu()


VIEWS = {"train_gpt": Window, "train_gpu": Carried, "train_scaled": Patches}


def note(line: str) -> None:
    print(f"[{line}]", file=sys.stderr, flush=True)


@torch.inference_mode()
def generate(
    model: nn.Module,
    ids: Sequence[int],
    separator: int,
    num_ids: int,
    args: argparse.Namespace,
    seed: int,
) -> Iterator[int]:
    """Up to args.tokens tokens that follow `ids`, all below `num_ids`; stops before a separator."""
    ids = list(ids)
    generator = torch.Generator().manual_seed(seed)
    view = VIEWS[runs.trainer_of(model)](model)
    for _ in range(args.tokens):
        logits_V = view.logits(ids)[:num_ids]
        token = pick(logits_V, args.temperature, args.top_k, args.top_p, generator)
        if token == separator:
            return
        yield token
        ids.append(token)


# ----------------------------------------------------------------------------
# Program


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    runs.add_run_options(parser)
    add = parser.add_argument
    add("--prompt", default="", help="text to go on from; empty: a new document")
    add("--tokens", type=int, default=200, metavar="N", help="tokens to make at most (200)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest (0.8)")
    add("--top_k", "--top-k", type=int, default=50, metavar="K", help="likeliest, 0: all (50)")
    add("--top_p", "--top-p", type=float, default=1.0, metavar="X", help="probability kept (1.0)")
    add("--seed", type=int, default=0, metavar="N", help="of the first sample (0)")
    add("--num_samples", "--num-samples", type=int, default=1, metavar="N", help="(1)")
    add("--tokenizer", choices=("auto", *runs.TOKENIZERS), default="auto")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    temperatures = "0 (the likeliest token) or more, such as 0.8"
    for name, is_good, expected in (
        ("tokens", args.tokens >= 0, "0 or more"),
        ("temperature", 0 <= args.temperature < float("inf"), temperatures),
        ("top_k", args.top_k >= 0, "0 (off) or more, such as 50"),
        ("top_p", 0 < args.top_p <= 1, "above 0 and up to 1 (off)"),
        ("seed", args.seed >= 0, "0 or more"),
        ("num_samples", args.num_samples >= 1, "1 or more"),
    ):
        if not is_good:
            raise UserError(f"--{name} {getattr(args, name)}: expected {expected}")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--prompt is not UTF-8 text (at character {error.start}); give it in UTF-8"
        ) from None
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device cuda, but torch {torch.__version__} sees no CUDA GPU; leave it out to use "
            f"the CPU"
        )


def encode_prompt(prompt: str, tokens: Tokenizer, num_ids: int) -> list[int]:
    """The prompt's token ids; of an empty one, the separator before a document."""
    ids = tokens.encode(prompt).tolist() or [tokens.separator]
    if max(ids) >= num_ids:
        raise UserError(
            f"the prompt holds token {max(ids)} of the {tokens.name} tokenizer, this run's "
            f"VOCAB_SIZE ends at {num_ids - 1}; choose another --prompt or --tokenizer"
        )
    return ids


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    path = runs.find_checkpoint(runs.find_run(args.logs_folder, args.run), args.checkpoint)
    model, state = runs.load(path)
    vocab_size = runs.vocabulary(model)
    tokens = tokenizer(runs.tokenizer_name(args.tokenizer, vocab_size))
    num_ids = min(vocab_size, tokens.size)  # ids above the tokenizer's are padding
    ids = encode_prompt(args.prompt, tokens, num_ids)
    model.to(args.device)
    val_loss = state["progress"]["val_loss"]
    note(f"{path}, val_loss {val_loss:.4f}, {tokens.name}")

    num_made = 0
    started = time.perf_counter()
    for i in range(args.num_samples):
        seed = args.seed + i
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples}, seed {seed}")
        print(args.prompt, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may cut a character
        for token in generate(model, ids, tokens.separator, num_ids, args, seed):
            print(decoder.decode(tokens.piece(token)), end="", flush=True)
            num_made += 1
        print(decoder.decode(b"", final=True), flush=True)
    spent_s = time.perf_counter() - started
    note(f"{num_made} tokens, {num_made / spent_s:.0f} a second")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `| head` ends this program as it ends others, silently
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets ? instead
    try:
        launch(main)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
