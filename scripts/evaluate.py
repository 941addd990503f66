"""evaluate.py -- how well a run's model does on HellaSwag, LAMBADA and texts.

    python scripts/evaluate.py --run ID --task hellaswag lambada          data from the hub
    python scripts/evaluate.py --run ID --task hellaswag=items.jsonl      data from a file
    python scripts/evaluate.py --run ID --text book.txt                   bits per byte
    python scripts/evaluate.py --run ID --harness arc_easy,piqa           needs lm-eval

HellaSwag asks which of four endings continues a text. `acc` takes the ending of the highest
probability, `acc_norm` the one with the highest log-probability per character, because long endings
are improbable (Zellers et al., arXiv 1905.07830). LAMBADA asks for the last word of a paragraph:
`acc` counts the words whose every token is the likeliest one, `perplexity` is of the word (Paperno
et al., arXiv 1606.06031). Both count as lm-evaluation-harness does. Bits per byte compare models
with different tokenizers; of a task they are those of the right answers. `+-` is the standard error
over the items.

Files are JSON lines or parquet, with the fields of the hub's: activity_label, ctx_a, ctx_b, endings
and label for HellaSwag, text for LAMBADA. All products are fp32.
Raises   UserError: no such run, no way to the hub, a file that holds other items, no lm-eval
"""

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from lib import runs
from lib.harness import run_harness
from lib.program import ROOT, need, write_whole
from lib.scoring import Scorer

from plumbing import UserError, launch
from plumbing.hub import hub_fetch
from plumbing.plain_text import read_text
from plumbing.texts import tokenizer

FIELDS = {
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "lambada": ("text",),
}
HUB = {
    "hellaswag": ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet"),
    "lambada": ("EleutherAI/lambada_openai", "data/lambada_test_en.jsonl"),
}
ITEMS_AT_A_TIME = 64


# ----------------------------------------------------------------------------
# Items


def read_items(task: str, path: str, data_folder: Path, limit: int | None) -> list[dict]:
    """The items of a file, or of the hub's where no path is given, up to `limit`."""
    if path:
        file = Path(path)
    else:
        repo, name = HUB[task]
        file = data_folder / "evaluation" / f"{task}{Path(name).suffix}"
        if not file.is_file():
            hub_fetch(repo, name, file, otherwise=f"give a file: --task {task}=FILE")
    try:
        items = list(_rows(file))
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: cannot be read as items of {task} ({what})") from None
    for i, item in enumerate(items, 1):
        missing = [field for field in FIELDS[task] if field not in item]
        if missing:
            raise UserError(f"{file}: item {i} has no {', '.join(missing)}; is it {task}?")
    if not items:
        raise UserError(f"{file}: holds no item")
    return items[:limit]


def _rows(file: Path) -> Iterator[dict]:
    if file.suffix == ".parquet":
        parquet = need("pyarrow.parquet", "reading parquet", "pip install pyarrow")
        yield from parquet.read_table(file).to_pylist()
        return
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


# ----------------------------------------------------------------------------
# Tasks


def tidy(text: str) -> str:
    """HellaSwag's WikiHow texts without their mark-up, as lm-evaluation-harness has them."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag(scorer: Scorer, items: Sequence[dict]) -> dict[str, float]:
    pairs = []
    for item in items:
        context = f"{item['ctx_a']} {item['ctx_b'].capitalize()}"
        context = tidy(f"{item['activity_label']}: {context}")
        pairs += [(context, f" {tidy(ending)}") for ending in item["endings"]]
    log_probs = [log_prob for log_prob, _ in score_with_progress(scorer, pairs, "hellaswag")]

    num_right = num_right_norm = 0
    nats = num_bytes = 0.0
    first = 0
    for item in items:
        endings = [tidy(ending) for ending in item["endings"]]
        scores = log_probs[first : first + len(endings)]
        per_character = [s / len(e) for s, e in zip(scores, endings, strict=True)]
        right = int(item["label"])
        num_right += scores.index(max(scores)) == right
        num_right_norm += per_character.index(max(per_character)) == right
        nats -= scores[right]
        num_bytes += len(f" {endings[right]}".encode())
        first += len(endings)
    n = len(items)
    found = {"items": n, "acc": num_right / n, "acc_se": standard_error(num_right / n, n)}
    found |= {"acc_norm": num_right_norm / n, "acc_norm_se": standard_error(num_right_norm / n, n)}
    return found | {"bits_per_byte": nats / math.log(2) / num_bytes}


def lambada(scorer: Scorer, items: Sequence[dict]) -> dict[str, float]:
    pairs = []
    for item in items:
        context, _, word = item["text"].rpartition(" ")
        pairs.append((context, f" {word}"))
    scores = score_with_progress(scorer, pairs, "lambada")
    n = len(items)
    accuracy = sum(is_greedy for _, is_greedy in scores) / n
    nats = -sum(log_prob for log_prob, _ in scores)
    num_bytes = sum(len(word.encode()) for _, word in pairs)
    found = {"items": n, "acc": accuracy, "acc_se": standard_error(accuracy, n)}
    found["perplexity"] = math.exp(min(nats / n, 700))
    return found | {"bits_per_byte": nats / math.log(2) / num_bytes}


def text_bits(scorer: Scorer, path: str, limit: int | None) -> dict[str, float]:
    """Bits per byte of a text file, of its first `limit` characters."""
    text = read_text(path)[:limit]
    if not text:
        raise UserError(f"{path}: holds no text")
    num_bytes = len(text.encode())
    return {"bytes": num_bytes, "bits_per_byte": scorer.text_nats(text) / math.log(2) / num_bytes}


TASKS = {"hellaswag": hellaswag, "lambada": lambada}


def standard_error(share: float, n: int) -> float:
    """Of a share of n items; nan for a single one."""
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan


def score_with_progress(
    scorer: Scorer, pairs: Sequence[tuple[str, str]], task: str
) -> list[tuple[float, bool]]:
    """Log-probabilities of all pairs, with a bar on a terminal."""
    from tqdm import tqdm

    scores = []
    starts = range(0, len(pairs), ITEMS_AT_A_TIME)
    for start in tqdm(starts, desc=task, disable=None):
        scores += scorer.score(pairs[start : start + ITEMS_AT_A_TIME])
    return scores


# ----------------------------------------------------------------------------
# Program


def line_of(name: str, found: dict[str, float]) -> str:
    """One result for eyes: a figure with its standard error, where it has one."""
    words = []
    for key, value in found.items():
        if key.endswith("_se") or not isinstance(value, int | float):
            continue
        error = found.get(f"{key}_se", math.nan)
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        words.append(f"{key} {text}" + ("" if math.isnan(error) else f" +- {error:.4f}"))
    return f"{name}: {', '.join(words)}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    runs.add_run_options(parser)
    add = parser.add_argument
    add("--task", nargs="+", default=[], metavar="TASK[=FILE]", help="hellaswag or lambada")
    add("--text", nargs="+", default=[], metavar="FILE", help="texts, for their bits per byte")
    add("--harness", default="", metavar="TASK,TASK", help="tasks of lm-evaluation-harness")
    add("--limit", type=int, metavar="N", help="first N items of a task, characters of a text")
    add("--rows", type=int, default=8, metavar="N", help="texts at a time; moves speed only (8)")
    add("--tokenizer", choices=("auto", *runs.TOKENIZERS), default="auto")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--data_folder", type=Path, default=ROOT / "data", metavar="DIR", help="for downloads")
    add("--out", type=Path, metavar="JSON", help="also write the figures there")
    args = parser.parse_args(argv)
    if not (args.task or args.text or args.harness):
        raise UserError("nothing to do: give --task hellaswag, --text FILE or --harness TASK")
    for name in ("limit", "rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: expected 1 or more")
    for task in args.task:
        if task.partition("=")[0] not in TASKS:
            raise UserError(
                f"--task {task}: expected one of {', '.join(TASKS)}, or that with =FILE; others "
                f"go through --harness"
            )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda, but torch {torch.__version__} sees no CUDA GPU")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    path = runs.find_checkpoint(runs.find_run(args.logs_folder, args.run), args.checkpoint)
    model, state = runs.load(path)
    name = runs.tokenizer_name(args.tokenizer, runs.vocabulary(model))
    scorer = Scorer(model.to(args.device), tokenizer(name), args.rows)
    print(f"{path}, step {state['step']}, {name} tokens", flush=True)

    figures: dict[str, dict] = {}
    for item in args.task:
        task, _, file = item.partition("=")
        items = read_items(task, file, args.data_folder, args.limit)
        figures[task] = TASKS[task](scorer, items)
        print(line_of(task, figures[task]), flush=True)
    for file in args.text:
        figures[file] = text_bits(scorer, file, args.limit)
        print(line_of(file, figures[file]), flush=True)
    if args.harness:
        for task, found in run_harness(scorer, args.harness.split(","), args.limit).items():
            figures[task] = found
            print(line_of(task, found), flush=True)
    if args.out:
        content = {"run_id": args.run, "checkpoint": path.name, "step": state["step"]}
        write_whole(args.out, json.dumps(content | {"figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    launch(main)
