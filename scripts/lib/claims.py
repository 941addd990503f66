"""What a table allows one to say of a comparison, in one plain sentence."""

import math

from lib.program import count
from lib.results import loss_unit
from lib.sequential import BETTER, NOT_BETTER, WORSE
from lib.stats import ALPHA
from lib.tables import Line


def verdict(line: Line) -> tuple[str, str]:
    """What the table says about a comparison, and how it is coloured: better, worse or open."""
    c = line.comparison
    if not c.chosen:
        return f"{c.test}: not tested", "open"
    if c.decision:
        kinds = {BETTER: "better", WORSE: "worse"}
        return c.decision, kinds.get(c.decision, "open")
    if not c.p_holm < ALPHA:
        return "not settled", "open"
    return ("better", "better") if c.diff < 0 else ("worse", "worse")


def is_settled(line: Line) -> bool:
    """Whether the comparison came to a decision, of whichever kind."""
    return verdict(line)[1] != "open" or line.comparison.decision == NOT_BETTER


def seeds_of(line: Line) -> str:
    """How many seeds the two cells have: 'n=3' or 'n=3 against 2'."""
    ours, theirs = (len(cell.values("final_val_loss")) for cell in (line.cell, line.baseline))
    return f"n={ours}" if ours == theirs else f"n={ours} against {theirs}"


def certainty(line: Line) -> str:
    """How sure the difference is, as the rest of a sentence."""
    c = line.comparison
    if not c.chosen:
        reason = {"n=1": "with a single seed nothing says how sure that is"}
        return reason.get(c.test, "the runs are repeats without spread, so that nothing is tested")
    if not math.isfinite(c.chosen.lo):
        span = "the seeds are too few for an interval"
    else:
        kind = "always-valid interval" if c.anytime else "95% interval"
        span = f"the {kind} goes from {c.chosen.lo:+.4f} to {c.chosen.hi:+.4f}"
    if c.anytime:
        return f"{span}; {c.test.replace('sequential, ', '')} seeds: {c.decision}"
    settled = "settled" if c.p_holm < ALPHA else "not settled"
    return f"{span} ({seeds_of(line)}); at 5% this is {settled}, Holm p {c.p_holm:.2g}"


def cost(line: Line) -> str:
    """What it costs, as a sentence; '' where neither time nor memory is known."""
    c = line.comparison
    words = []
    if math.isfinite(c.overhead_pct):
        way = "longer" if c.overhead_pct >= 0 else "less"
        text = f"a step takes {abs(c.overhead_pct):.1f}% {way}"
        if c.step_time.lo <= 0 <= c.step_time.hi:
            text += " (not distinguishable from nothing)"
        words.append(text)
    if math.isfinite(c.memory_pct) and abs(c.memory_pct) >= 0.05:
        words.append(f"memory changes by {c.memory_pct:+.1f}%")
    timed = c.equal_time.judged.diff
    if math.isfinite(timed):
        how = " (interpolated)" if c.equal_time.how.startswith("interpolated") else ""
        words.append(f"after equal time the difference is {timed:+.4f}{how}")
    text = ", ".join(words)
    return f" {text[0].upper()}{text[1:]}." if text else ""


def sentence(line: Line, label: str, baseline: str) -> str:
    """What changed, by how much, how sure, at what cost."""
    c = line.comparison
    if not math.isfinite(c.diff):
        seeds = count(len(line.cell.rows), "run")
        return f"{label} and {baseline} cannot be compared yet ({seeds})."
    way = "lowers" if c.diff < 0 else "raises"
    rel = f" ({abs(c.rel_pct):.2f}%)" if math.isfinite(c.rel_pct) else ""
    amount = f"{abs(c.diff):.4f} {loss_unit(line.cell.rows)}{rel}"
    head = f"{label} {way} the final loss by {amount} against {baseline}"
    return f"{head}; {certainty(line)}.{cost(line)}"
