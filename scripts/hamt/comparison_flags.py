"""comparison_flags.py -- the command line of compare_baselines.py."""

import argparse
from collections.abc import Sequence

import beside  # noqa: F401  (finds scripts/lib and the trainers)
from lib import program
from quality import PRECISIONS

import train_gpu

PARTS = ("training", "training_memory", "decoding")


def numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers above 0, with commas")
    return found


def one_number(text: str) -> int:
    found = numbers(text)
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one whole number above 0")
    return found[0]


def seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if found <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seconds above 0")
    return found


def some_parts(text: str) -> list[str]:
    for part in text.split(","):
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"no part {part!r}; there are {', '.join(PARTS)}")
    return text.split(",")


class Flags:
    """A group of flags; each may be written with underscores or with hyphens."""

    def __init__(self, parser: argparse.ArgumentParser, title: str):
        self.group = parser.add_argument_group(title)

    def add(self, name: str, help: str, **more: object) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        self.group.add_argument(*spellings, help=help, **more)

    def count(self, name: str, default: int | None, help: str, metavar: str = "N") -> None:
        self.add(name, help, type=one_number, default=default, metavar=metavar)

    def counts(self, name: str, default: list[int], help: str) -> None:
        self.add(name, help, type=numbers, default=default, metavar="T,...")

    def switch(self, name: str, help: str) -> None:
        self.add(name, help, action="store_true")


def add_models(flags: Flags) -> None:
    flags.add("run", "runs of train_gpu.py, HAMT and attention alike", nargs="+", metavar="ID")
    flags.add(
        "hamt_checkpoint",
        "the same by the folder of a run or of a checkpoint",
        nargs="+",
        metavar="PATH",
    )
    flags.add(
        "baselines",
        "gpt2, gpt2-medium, distilgpt2, pythia-160m, ..., a folder with weights, or none",
        nargs="+",
        default=["distilgpt2", "gpt2"],
        metavar="NAME",
    )
    flags.switch("offline", "published models from this machine only")
    flags.add("logs_folder", "where the runs are", default=str(program.default_logs()))


def add_text(flags: Flags) -> None:
    flags.add("dataset", "as of train_gpu.py; default: that of the first run, else wikitext-2")
    flags.add("data_folder", "texts and token shards; default: that of the first run")
    flags.add("split", "which part of the text", choices=("val", "test"), default="test")
    flags.count("max_samples", None, "lines of text at most that are not empty (all)")
    flags.count("window", None, "tokens of a window; default: the shortest context", "T")
    flags.count("stride", None, "tokens that a later window scores; default: the window", "T")
    flags.count("batch_size", 1, "windows at a time (1)")


def add_speed(flags: Flags) -> None:
    flags.add("precision", "of matrix products", choices=tuple(PRECISIONS), default="fp32")
    flags.add("device", "where", choices=("cpu", "cuda"), default="cpu")
    flags.counts("contexts", [256, 512, 1024], "for speed and memory (256,512,1024)")
    flags.count("decode", 16, "tokens decoded at each context (16)")
    flags.count("repeats", 5, "measurements of each time (5)")
    flags.switch("quality_only", "no speed, no memory")
    flags.add("output_dir", "default: experiments/comparison/<date and time>")


def add_speed_only(flags: Flags) -> None:
    presets = tuple(train_gpu.PRESETS)
    flags.switch("speed_only", "measure untrained models of a preset instead")
    flags.add("preset", "of train_gpu.py (33m)", choices=presets, default="33m")
    flags.add("mixer", "of them", choices=("both", "hamt", "attention"), default="both")
    flags.add("knobs", "more of train_gpu.py's knobs", default="", metavar='"NAME=VALUE ..."')
    all_parts = ", ".join(PARTS)
    flags.add("parts", f"some of {all_parts}", type=some_parts, default=list(PARTS))
    flags.counts("lengths", [128, 256, 512, 1024, 2048, 4096], "of training")
    flags.count("tokens_per_step", 4096, "the same at every length (4096)")
    flags.count("memory_batch", 1, "sequences where memory is measured (1)")
    flags.counts("decode_contexts", [2**i * 1024 for i in range(7)], "1k to 64k")
    flags.count("fed", 4096, "longer caches of full attention are drawn (4096)", "T")
    flags.add("deadline_s", "stop after this time; parts that are done stay", type=seconds)


def arguments(argv: Sequence[str] | None, doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_models(Flags(parser, "models"))
    add_text(Flags(parser, "text"))
    add_speed(Flags(parser, "speed"))
    add_speed_only(Flags(parser, "speed of untrained models"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)
