"""What the tests of the page share: a reader of HTML, a study, a server, a Chromium."""

import argparse
import http.client
import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import report

ATTACKS = (
    "</script><script>pwned=1</script>",
    "<img src=x onerror=pwned=2>",
    '"><svg/onload=pwned=3>',
    "<!--<script>",
)


class Page(HTMLParser):
    """The elements of a page, its tables and its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        self.inside = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag in ("td", "th", "script", "style") else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.inside == "script":
            self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])

    def under(self, id_: str) -> bool:
        return any(a.get("id") == id_ for _, a in self.elements)


def written(tmp_path: Path, options: Sequence[str]) -> str:
    """The page that report.py writes with these options."""
    out = tmp_path / "report.html"
    report.main([*options, "--out", str(out)])
    return out.read_text()


def options_of(argv: Sequence[str], **given: object) -> argparse.Namespace:
    """Options as main() has them."""
    at = dict(zip(argv[::2], argv[1::2], strict=True))
    values = dict(
        results_file=[Path(at["--results_file"])],
        logs_folder=Path(at["--logs_folder"]),
        stages=None,
        curves=[],
        target=None,
    )
    return argparse.Namespace(**(values | dict(title="t", port=0, every=1) | given))


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body
