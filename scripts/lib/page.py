"""The page that report.py writes: templates filled with text, and a policy that lets nothing in.

Nothing from a file reaches the page as markup: the templates escape all text, data goes through
JSON in a block that is not executed, and the page's program (page.js) sets textContent only. The
content security policy of the page allows no program but ours (by hash) and no address but, with
--watch, the server itself.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from lib.program import UserError, need

FOLDER = Path(__file__).parent
STYLE = FOLDER / "page.css"
PROGRAM = FOLDER / "page.js"


@lru_cache(maxsize=1)
def templates():  # -> jinja2.Environment, which may not be installed
    """The templates beside this file, with automatic escaping."""
    jinja2 = need("jinja2", "a report")
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def to_json(data: object) -> str:
    """JSON that can stand in a <script> block: no tag can begin or end in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def library() -> str:
    """plotly.js as text. Raises UserError without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError(
            "a report needs plotly: pip install plotly (or -r requirements-dev.txt)"
        ) from None
    return get_plotlyjs().replace("</script", "<\\/script")


def main_part(content: Mapping[str, object]) -> str:
    """All that stands in the page's <main>."""
    return templates().get_template("main.html").render(content)


def page(title: str, main: str, data: object, live: int = 0) -> str:
    """The whole page. `live`: seconds between two questions to the server, 0 for a file."""
    scripts = [library(), PROGRAM.read_text()]
    hashes = []
    for script in scripts:
        digest = hashlib.sha256(script.encode()).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
    policy = f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; "
    policy += "img-src data: blob:; "
    if live:
        policy += "connect-src 'self'; "
    policy += "base-uri 'none'; form-action 'none'"
    safe = need("markupsafe", "a report").Markup  # what we made ourselves, above
    return (
        templates()
        .get_template("page.html")
        .render(
            title=title,
            live=live,
            policy=safe(policy),
            style=safe(STYLE.read_text()),
            main=safe(main),
            data=safe(to_json(data)),
            scripts=[safe(script) for script in scripts],
        )
    )
