"""sample.py -- text from a run's newest good checkpoint.

    python scripts/sample.py --run ID --prompt "The meaning of"
    python scripts/sample.py --run ID --prompt "import " --temperature 0 --tokens 500
    python scripts/sample.py --run ID --num_samples 3 --seed 7 --device cuda

The text goes to stdout as it is made, everything else to stderr. An empty prompt starts a new document, and a
sample ends with its document. Sample i draws with seed SEED + i, on the CPU, so that a device changes rounding
only. train_gpt.py's model sees SEQUENCE_LENGTH tokens at most: when they are full, it goes on from the last half of
them, and of a longer prompt it reads the last half of SEQUENCE_LENGTH; stderr says so. The models of train_gpu.py and
train_scaled.py go on from a carried state, token by token, over any length.
Shapes   V vocabulary, T tokens, K most likely tokens
Raises   UserError: no such run, no good checkpoint, no tokenizer, a prompt outside the vocabulary, no GPU
"""

import argparse
import codecs
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from lib import runs as lib
from lib.runs import pick
from torch import Tensor, nn

import plumbing
from plumbing import UserError


class Window:
    """The model's view of a growing text: logits of the next token, keys and values kept between calls. A full window
    starts over from its last half, because a position has one meaning and cannot be shifted."""

    def __init__(self, model: nn.Module):
        self.model, self.size, self.told = model, model.k.sequence_length, False
        self.device = model.wte.device
        self.restart()

    def restart(self) -> None:
        self.cache: list[list] = [[] for _ in self.model.blocks]
        self.held = 0

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(V,) on the CPU; `ids` is the whole text so far, of which the model may have seen a part."""
        if len(ids) > self.size and (self.held == 0 or self.held == self.size):
            half = max(1, self.size // 2)
            if not self.told:
                what = f"the prompt has {len(ids)} tokens, SEQUENCE_LENGTH is {self.size}: only its last {half} are read"
                if self.held:
                    what = f"SEQUENCE_LENGTH is full at {self.size} tokens: going on from the last {half}"
                print(f"[{what}]", file=sys.stderr, flush=True)
            self.told = True
            self.restart()
            new = ids[-half:]
        else:
            new = ids if self.held == 0 else ids[-1:]
        x_BT = torch.tensor([list(new)], device=self.device)
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        ):
            logits_V = self.model.logits(x_BT, self.cache)[0, -1]
        self.held += len(new)
        return logits_V.float().cpu()


class Carried:
    """The same for train_gpu.py's model: every token goes in once, into a state that it carries."""

    def __init__(self, model: nn.Module):
        self.model, self.device, self.state, self.held = (
            model,
            model.wte.device,
            model.empty_state(1),
            0,
        )

    def logits(self, ids: Sequence[int]) -> Tensor:
        new, self.held = ids[self.held :], len(ids)
        for at in range(0, len(new), 1024):
            x_BT = torch.tensor([list(new[at : at + 1024])], device=self.device)
            logits_BTV, self.state = self.model.stream(x_BT, self.state)
        return logits_BTV[0, -1].float().cpu()


class Patches:
    """The same for train_scaled.py's model. It predicts from the first whole patch of 4 bytes on; a shorter text gets
    line ends in front. Its memory by bytes hears the prompt alone: a text that remembers itself repeats itself."""

    def __init__(self, model: nn.Module):
        from lib.byte_stream import Stream  # it imports the trainer

        self.stream, self.held = Stream(model), 0

    def logits(self, ids: Sequence[int]) -> Tensor:
        missing = max(0, 4 - len(ids)) if self.held == 0 else 0
        if missing:
            print(
                f"[the text is shorter than a patch: {missing} line end(s) in front]",
                file=sys.stderr,
                flush=True,
            )
        prompt, new, self.held = self.held == 0, [10] * missing + list(ids[self.held :]), len(ids)
        self.stream.feed(torch.tensor([new]), remember=prompt)
        return self.stream.logits()[0].cpu()


VIEWS = dict(train_gpu=Carried, train_scaled=Patches)


@torch.inference_mode()
def generate(
    model: nn.Module,
    ids: Sequence[int],
    separator: int,
    limit: int,
    a: argparse.Namespace,
    seed: int,
) -> Iterator[int]:
    """Up to a.tokens tokens that follow `ids`, all below `limit`; stops before a separator."""
    ids, generator = list(ids), torch.Generator().manual_seed(seed)
    window = VIEWS.get(lib.trainer_of(model), Window)(model)
    for _ in range(a.tokens):
        token = pick(window.logits(ids)[:limit], a.temperature, a.top_k, a.top_p, generator)
        if token == separator:
            return
        yield token
        ids.append(token)


def check(a: argparse.Namespace) -> None:
    for name, good, expected in (
        ("tokens", a.tokens >= 0, "0 or more"),
        (
            "temperature",
            0 <= a.temperature < float("inf"),
            "0 (the likeliest token) or more, such as 0.8",
        ),
        ("top_k", a.top_k >= 0, "0 (off) or more, such as 50"),
        ("top_p", 0 < a.top_p <= 1, "above 0 and up to 1 (off)"),
        ("seed", a.seed >= 0, "0 or more"),
        ("num_samples", a.num_samples >= 1, "1 or more"),
    ):
        if not good:
            raise UserError(f"--{name} {getattr(a, name)}: expected {expected}")
    if a.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device cuda, but torch {torch.__version__} sees no CUDA GPU; leave it out to use the CPU"
        )


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lib.add_run_options(p)
    p.add_argument("--prompt", default="", help="text to go on from; empty: a new document")
    p.add_argument(
        "--tokens", type=int, default=200, metavar="N", help="tokens to make at most (200)"
    )
    p.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest (0.8)"
    )
    p.add_argument(
        "--top_k",
        "--top-k",
        type=int,
        default=50,
        metavar="K",
        help="likeliest tokens, 0: all (50)",
    )
    p.add_argument(
        "--top_p",
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="share of probability (1.0)",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument("--num_samples", "--num-samples", type=int, default=1, metavar="N")
    p.add_argument("--tokenizer", choices=("auto", *lib.TOKENIZERS), default="auto")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    a = p.parse_args(argv)
    check(a)
    path = lib.find_checkpoint(lib.find_run(a.logs_folder, a.run), a.checkpoint)
    model, state = lib.load(path)
    tokenizer = lib.TOKENIZERS[lib.tokenizer_name(a.tokenizer, lib.vocabulary(model))]()
    limit = min(lib.vocabulary(model), tokenizer.size)  # ids above it are padding
    ids = tokenizer.encode(a.prompt) or [tokenizer.separator]
    if (top := max(ids)) >= limit:
        raise UserError(
            f"the prompt holds token {top} of the {tokenizer.name} tokenizer, this run's VOCAB_SIZE ends at "
            f"{limit - 1}; choose another --prompt or --tokenizer"
        )
    model.to(a.device)
    print(
        f"[{path}, val_loss {state['val_loss']:.4f}, {tokenizer.name}]", file=sys.stderr, flush=True
    )
    made, t0 = 0, time.perf_counter()
    for i in range(a.num_samples):
        if a.num_samples > 1:
            print(f"--- sample {i + 1} of {a.num_samples}, seed {a.seed + i}")
        print(a.prompt, end="", flush=True)
        text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be several tokens
        for token in generate(model, ids, tokenizer.separator, limit, a, a.seed + i):
            print(text.decode(tokenizer.piece(token)), end="", flush=True)
            made += 1
        print(text.decode(b"", final=True), flush=True)
    spent = time.perf_counter() - t0
    print(f"[{made} tokens, {made / spent:.0f} a second]", file=sys.stderr)


if __name__ == "__main__":
    sys.stdout.reconfigure(
        errors="replace"
    )  # a terminal that is not UTF-8 gets ? instead of a traceback
    try:
        plumbing.launch(main)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
