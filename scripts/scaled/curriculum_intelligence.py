"""curriculum_intelligence.py -- how much Turkish a byte model of train_scaled.py knows, in numbers.

    python scripts/scaled/curriculum_intelligence.py --run ID
    python scripts/scaled/curriculum_intelligence.py --weights best_model_scaled.pth --samples 20
    --heldout val.txt

Minimal pairs   two words in one sentence, alike but for what a rule of Turkish decides; a hit is a
        higher likelihood of
                the right one, in all bytes from the word on. Vowel harmony: the suffix's vowels
                follow the stem's last
                one. Suffix order: plural, possessive, case; negation before tense. Chance is 50%
Generated text  the original report's prompts, continued: share of its words (3 letters and more)
          that occur in held-out
                text, share of its 8-byte pieces that it had already written, share of its bytes
                that are valid UTF-8.
                Beside them the same numbers of held-out text itself, and of that with its words'
                       letters shuffled
Files           OUT.csv, OUT.json, OUT.md: the table, and every continuation in full
Raises          UserError: a bad flag, no weights, no held-out text, no GPU
Source          the rules: Goeksel and Kerslake, Turkish: A Comprehensive Grammar (2005), chapters 3
                (vowel harmony) and
                8 (order of nominal and of verbal suffixes). The words are ours, without exceptions
                to harmony (saat,
                kalp) and without stems that change before a vowel (kitap, kitabim)
"""

import argparse
import random
import re
from collections.abc import Sequence

import byte_models as lib
import numpy as np
import torch
from byte_models import ByteLM, UserError
from lib.byte_stream import Stream
from lib.runs import pick

from plumbing import launch
from train_scaled import PATCH

PROMPTS = (
    "Elma kelimesinin anlamı: ",
    "Küçük kedi bahçede koşarken ",
    "Türkiye'nin başkenti Ankara ",
    "1923 yılında Cumhuriyet ",
)
CARRIER = "\nBu metinde ", " sözcüğü geçer.\n"  # any form of a word may stand there

# stem, right suffix, wrong suffix
HARMONY = """
araba lar ler|kapı lar ler|çocuk lar ler|okul lar ler|yol lar ler|kuş lar ler|dağ lar ler
kız lar ler|orman lar ler|masa lar ler|ev ler lar|çiçek ler lar|deniz ler lar|gün ler lar
göz ler lar|şehir ler lar|köy ler lar|kedi ler lar|öğretmen ler lar|ülke ler lar|okul da de
araba da de|masa da de|orman da de|yol da de|ev de da|deniz de da|köy de da|şehir de da
gün de da|okul dan den|dağ dan den|kapı dan den|orman dan den|ev den dan|köy den dan
deniz den dan|şehir den dan|oku mak mek|yaz mak mek|al mak mek|bul mak mek|gel mek mak
git mek mak|gör mek mak|bil mek mak|baş ım im|kız ım im|ev im ım|diş im ım|yol um üm|kuş um üm
göz üm um|gün üm um
"""
# stem and suffixes in the right order; wrong: the first two suffixes change places
ORDER = """
ev ler im de|deniz ler im de|iş ler im de|ders ler im de|el ler im de|diş ler im de
kalem ler im de|kardeş ler im de|öğretmen ler im de|kız lar ım da|baş lar ım da|dal lar ım da
anlam lar ım da|akşam lar ım da|alan lar ım da|zaman lar ım da|roman lar ım da|sınav lar ım da
hayvan lar ım da|adam lar ım da|taş lar ım da|arkadaş lar ım da|ev ler im den|iş ler im den
el ler im den|kardeş ler im den|kız lar ım dan|arkadaş lar ım dan|hayvan lar ım dan|gel me di
bil me di|ver me di|gir me di|yaz ma dı|al ma dı|kal ma dı|kır ma dı
"""
PIECE = 8  # bytes of a piece that counts as repeated


# ----------------------------------------------------------------------------
# Minimal pairs


def entries(table: str) -> list[list[str]]:
    return [entry.split() for entry in table.strip().replace("\n", "|").split("|")]


def minimal_pairs() -> list[tuple[str, str, str]]:
    """Rule, right word, wrong word."""
    found = [
        ("vowel harmony", stem + right, stem + wrong) for stem, right, wrong in entries(HARMONY)
    ]
    for stem, first, second, *rest in entries(ORDER):
        right, wrong = "".join([stem, first, second, *rest]), "".join([stem, second, first, *rest])
        found.append(("suffix order", right, wrong))
    return found


@torch.no_grad()
def log_likelihoods(model: ByteLM, texts: Sequence[tuple[bytes, bytes]]) -> list[float]:
    """log p of each text's second part after its first, in nats: a sum, as texts of other lengths
    compete.
    """
    out, device = [], model.plasticity.device
    for before, rest in texts:
        before = (
            b"\n" * (-len(before) % PATCH) + before
        )  # whole patches: the first of them is never scored
        whole = np.frombuffer(before + rest, np.uint8).astype(np.int64)
        y = np.full(-(-len(whole) // PATCH) * PATCH, -1)
        y[len(before) : len(whole)] = whole[len(before) :]
        x = np.pad(whole, (0, len(y) - len(whole)))
        x_BT, y_BT = (torch.from_numpy(t)[None].to(device) for t in (x[:-PATCH], y[PATCH:]))
        out.append(-float(model(x_BT, y_BT)[0].double().sum()))
    return out


def judge_pairs(model: ByteLM) -> list[dict[str, object]]:
    """A row per pair; a tie is no hit."""
    pairs, (before, behind) = minimal_pairs(), CARRIER
    texts = [(before.encode(), (word + behind).encode()) for _, *words in pairs for word in words]
    scores = log_likelihoods(model, texts)
    rows = []
    for (rule, right, wrong), ours, theirs in zip(pairs, scores[::2], scores[1::2], strict=True):
        rows.append(
            dict(
                rule=rule, right=right, wrong=wrong, lead_nats=ours - theirs, hit=int(ours > theirs)
            )
        )
    return rows


# ----------------------------------------------------------------------------
# Generated text


def lower(text: str) -> str:
    """Turkish: I is the capital of the dotless one."""
    return text.replace("İ", "i").replace("I", "ı").lower()


def words_of(text: str) -> list[str]:
    """Of 3 letters and more: nearly any letter alone is somewhere a word."""
    return re.findall(r"[^\W\d_]{3,}", lower(text))


def valid_share(text: bytes) -> float:
    """Share of the bytes that are part of a UTF-8 character; a character cut off by the end counts
    as valid.
    """
    for n in range(1, min(3, len(text)) + 1):
        lead = text[-n]
        if 0xC2 <= lead <= 0xF4:
            needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            text = (
                text[:-n]
                if n < needed and all(b & 0xC0 == 0x80 for b in text[len(text) - n + 1 :])
                else text
            )
            break
    if not text:
        return 1.0
    bad = sum("\udc80" <= c <= "\udcff" for c in text.decode("utf-8", errors="surrogateescape"))
    return 1 - bad / len(text)


def repetition(text: bytes) -> float:
    """Share of the pieces of 8 bytes that occur earlier in the same text."""
    pieces = [text[i : i + PIECE] for i in range(len(text) - PIECE + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


def inner_words(text: bytes) -> list[str]:
    """Words of a continuation without its first and last, which its edges may have cut."""
    return words_of(
        re.sub(r"\S*$", "", re.sub(r"^\S*", "", text.decode("utf-8", errors="replace")))
    )


def measure(texts: Sequence[bytes], known: set[str]) -> dict[str, object]:
    """Numbers of several continuations."""
    words = [w for text in texts for w in inner_words(text)]
    found, pieces = sum(w in known for w in words), [repetition(t) for t in texts]
    low, high = lib.wilson(found, len(words))
    row = dict(
        texts=len(texts),
        words=len(words),
        known_words=found / max(len(words), 1),
        low=low,
        high=high,
    )
    size = sum(map(len, texts))
    valid = sum(valid_share(t) * len(t) for t in texts) / max(size, 1)
    return row | dict(repetition=sum(pieces) / max(len(pieces), 1), valid_utf8=valid)


def shuffled(text: bytes, seed: int) -> bytes:
    """The text with the letters of each word in another order."""
    draw = random.Random(seed)
    mix = lambda match: "".join(draw.sample(match[0], len(match[0])))
    return re.sub(r"[^\W\d_]+", mix, text.decode("utf-8", errors="replace")).encode()


@torch.no_grad()
def continue_prompt(model: ByteLM, prompt: str, seed: int, a: argparse.Namespace) -> bytes:
    """a.bytes bytes behind the prompt, as it stands: no spaces to fill a patch."""
    stream, generator, out = Stream(model), torch.Generator().manual_seed(seed), []
    stream.feed(torch.tensor([list(("\n" + prompt).encode())]))
    for _ in range(a.bytes):
        out.append(pick(stream.logits()[0].cpu(), a.temperature, 0, a.top_p, generator))
        stream.feed(torch.tensor([[out[-1]]]), remember=a.remember == "all")
    return bytes(out)


# ----------------------------------------------------------------------------
# Program


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--run", metavar="ID", help="a run of train_scaled.py: its best_model_scaled.pth")
    add("--weights", metavar="FILE", help="or a .pth itself")
    lib.add_logs_option(p)
    add("--heldout", metavar="PATH", help="text not trained on; default: Turkish, or embedded")
    add("--samples", type=int, default=10, metavar="N", help="texts of each prompt (10)")
    add("--bytes", type=int, default=100, metavar="N", help="of a continuation (100)")
    add("--temperature", type=float, default=0.5, metavar="X", help="as the original has it (0.5)")
    add("--top_p", type=float, default=1.0, metavar="X", help="probability kept (1.0)")
    add("--memory", choices=("on", "zero"), default="on", help="zero: with the memory silent")
    words = "what the memory by bytes hears"
    add("--remember", choices=("prompt", "all"), default="prompt", help=words)
    a = lib.finish_options(p, argv, "curriculum_intelligence")
    check(a)
    return a


def check(a: argparse.Namespace) -> None:
    temperatures = "0 (the likeliest byte) or more, such as 0.5"
    for name, is_good, expected in (
        ("samples", a.samples >= 1, "1 or more"),
        ("bytes", a.bytes >= 1, "1 or more"),
        ("temperature", 0 <= a.temperature < float("inf"), temperatures),
        ("top_p", 0 < a.top_p <= 1, "above 0 and up to 1 (off)"),
    ):
        if not is_good:
            raise UserError(f"--{name} {getattr(a, name)}: expected {expected}")
    if not (a.run or a.weights):
        raise UserError("no model: name one with --run ID or --weights FILE")


def table(
    pairs: list[dict], samples: dict[str, list[bytes]], heldout: bytes, a: argparse.Namespace
) -> list[dict]:
    """Rows of measure, value, interval, n."""
    rows = []
    for rule in ("vowel harmony", "suffix order", "all pairs"):
        own = [p for p in pairs if rule in (p["rule"], "all pairs")]
        hits = sum(p["hit"] for p in own)
        low, high = lib.wilson(hits, len(own))
        rows.append(
            dict(
                measure=f"minimal pairs: {rule}",
                source="model",
                value=hits / len(own),
                low=low,
                high=high,
            )
        )
        rows[-1] |= dict(n=len(own), chance=0.5)
    half = len(heldout) // 2
    known, other = set(words_of(heldout[:half].decode("utf-8", errors="replace"))), heldout[half:]
    draw = random.Random(a.seed)
    starts = [
        draw.randrange(max(len(other) - a.bytes, 1))
        for _ in range(max(100, a.samples * len(PROMPTS)))
    ]
    real = [lib.whole_characters(other[at : at + a.bytes]) for at in starts]
    sources = {"model, all prompts": [t for texts in samples.values() for t in texts]}
    sources |= samples | {
        "held-out text": real,
        "its letters shuffled": [shuffled(t, a.seed) for t in real],
    }
    for source, texts in sources.items():
        found = measure(texts, known)
        words = dict(low=found["low"], high=found["high"], n=found["words"])
        rows.append(dict(measure="words known", source=source, value=found["known_words"]) | words)
        for name in ("repetition", "valid_utf8"):
            rows.append(
                dict(
                    measure=name.replace("_", " "),
                    source=source,
                    value=found[name],
                    n=found["texts"],
                )
            )
    return rows


def markdown(rows: list[dict], samples: dict[str, list[bytes]]) -> str:
    """The table, and the continuations."""
    show = lambda row, key: f"{row[key]:.3f}" if key in row else ""
    lines = [
        "| measure | source | value | 95% interval | n | chance |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        interval = f"{r['low']:.3f} to {r['high']:.3f}" if "low" in r else ""
        cells = (
            r["measure"],
            r["source"],
            f"{r['value']:.3f}",
            interval,
            str(r["n"]),
            show(r, "chance"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    for prompt, texts in samples.items():
        lines += ["", f"`{prompt}`", ""]
        lines += ["- " + " ".join(t.decode("utf-8", errors="replace").split()) for t in texts]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    a = read_options(argv)
    device = lib.check_device(a.device)
    heldout, source = lib.read_text(a.heldout)
    model = lib.load(lib.weights_path(a.logs_folder, a.run, a.weights), device)
    model = lib.other_memory(model, a.memory) if a.memory == "zero" else model
    t0, pairs = lib.clock(device), judge_pairs(model)
    seed = lambda i, j: a.seed + 1000 * i + j
    samples = {
        p: [continue_prompt(model, p, seed(i, j), a) for j in range(a.samples)]
        for i, p in enumerate(PROMPTS)
    }
    rows = table(pairs, samples, heldout, a)
    lib.write_results(
        a.out, rows, lib.facts(a, heldout=source, seconds=lib.clock(device) - t0, pairs=pairs)
    )
    text = markdown(rows, samples)
    a.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    launch(main)
