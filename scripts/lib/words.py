"""words.py -- durations, rates and names in the few columns that a table has for them."""

import math


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    s = max(0, round(seconds))
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"
    return (
        f"{s // 3600}h{s % 3600 // 60:02d}m"
        if s < 86400
        else f"{s // 86400}d{s % 86400 // 3600:02d}h"
    )


def rate(tokens_per_s: float) -> str:
    if not math.isfinite(tokens_per_s):
        return ""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if tokens_per_s >= unit:
            return f"{tokens_per_s / unit:.{1 if tokens_per_s < 100 * unit else 0}f}{name}"
    return f"{tokens_per_s:.0f}"


def fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 2)] + ".."
