"""The page that report.py writes: its frame, its tables, its forest of intervals.

Nothing from a file reaches the page as markup: text goes through html.escape, data through JSON in
a block that is not executed, and the page's program (page.js) sets textContent only. The content
security policy of the page allows no program but ours (by hash) and no address but, with --watch,
the server itself.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib.program import UserError

STYLE = Path(__file__).with_name("page.css")
PROGRAM = Path(__file__).with_name("page.js")


def esc(value: object) -> str:
    return html.escape(str(value), quote=True)


def to_json(data: object) -> str:
    """JSON that can stand in a <script> block: no tag can begin or end in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def html_table(
    rows: Sequence[Mapping[str, object]], columns: Sequence[str], of: str, words: Sequence[str] = ()
) -> str:
    """A table in a box of its own that scrolls; `of` names it for a reader who does not see."""
    number = lambda c: c not in words and all(str(r[c])[:1] in "-+[0123456789n" for r in rows)
    side = {c: ' class="num"' if number(c) else "" for c in columns}
    head = "".join(f"<th scope=col{side[c]}>{esc(c)}</th>" for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{side[c]}>{esc(r[c])}</td>" for c in columns) + "</tr>\n"
        for r in rows
    )
    box = f'<div class="box" tabindex="0" role="region" aria-label="{esc(of)}">'
    return f"{box}<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def forest(rows: Sequence[tuple[str, str, float, float, float, str]]) -> str:
    """Differences with intervals, drawn to one scale: (label, words, difference, lo, hi, class);
    nan: no interval."""
    ends = [v for _, _, *values, _ in rows for v in values if math.isfinite(v)] + [0.0]
    low, high = min(ends), max(ends)
    pad = 0.06 * (high - low) or 0.01
    low, high = low - pad, high + pad
    at = lambda v: f"{100 * (v - low) / (high - low):.2f}%"
    wide = lambda a, b: f"{100 * (b - a) / (high - low):.2f}%"
    out = []
    for label, words, diff, lo, hi, kind in rows:
        bar = (
            f'<i class="bar" style="left:{at(lo)};width:{wide(lo, hi)}"></i>'
            if math.isfinite(lo + hi)
            else ""
        )
        point = f'<i class="point" style="left:{at(diff)}"></i>' if math.isfinite(diff) else ""
        zero = f'<i class="zero" style="left:{at(0)}"></i>'
        strip = f'<span class="strip {esc(kind)}" aria-hidden="true">{zero}{bar}{point}</span>'
        out.append(
            f'<li><span class="who"><b>{esc(label)}</b> <small>{esc(words)}</small></span>{strip}</li>'
        )
    ticks = sorted({v for v in (min(ends), 0.0, max(ends))})
    marks = "".join(
        f'<i style="left:{at(v)}">{v:+.4f}</i>'
        for v in ticks
        if v == 0 or abs(v) > 0.15 * (high - low)
    )
    axis = f'<li class="axis"><span class="who"></span><span class="strip">{marks.replace("+0.0000", "0")}</span></li>'
    return f'<ul class="forest">{"".join(out)}{axis}</ul>'


def library() -> str:
    """plotly.js as text. Raises UserError without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError(
            "a report needs plotly: pip install plotly (or -r requirements-dev.txt)"
        ) from None
    return get_plotlyjs().replace("</script", "<\\/script")


def page(title: str, main: str, data: object, live: int = 0) -> str:
    """The whole page. `live`: seconds between two questions to the server, 0 for a file."""
    scripts = [library(), PROGRAM.read_text()]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
    )
    policy += f"connect-src {chr(39)}self{chr(39)}; " if live else ""
    policy += "base-uri 'none'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en" data-live="{live}">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{esc(title)}</title>
<style>{STYLE.read_text()}</style>
</head>
<body>
<main id="main">
{main}
</main>
<script type="application/json" id="data">{to_json(data)}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""
