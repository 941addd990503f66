"""report.py -- one page about a study: what came out, how sure it is, tables, curves, runs.

    python scripts/report.py                     -> experiments/report.html, opens from disk
    python scripts/report.py --stages experiments/stages_original.toml --out /tmp/r.html
    python scripts/report.py --watch             serve it on 127.0.0.1:8765, anew while runs go on

The page opens with one sentence per comparison, beside its curve and interval, the settled ones
first; then what is wrong with the files, and the stages with tables, curves and runs. It is one
file without references to anything else; curves are drawn by plotly.js, which is inside. Tables
are those of split_results.py, from the same functions. Curves have at most 200 points each; in a
large stage fewer, and single runs are listed up to a limit that the page names. The page itself is
always complete. --watch listens on 127.0.0.1 only.
Raises   UserError naming the file or option: a page that cannot be written, a port that is taken,
         no plotly
"""

import argparse
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from lib.charts import curves_of
from lib.curves import Curves
from lib.details import Pool, details_of
from lib.findings import NO_STAGE, Cache, Findings, going, read_findings, read_text_log
from lib.logs import MOST_POINTS
from lib.page import library, main_part, page
from lib.program import ROOT, UserError, add_data_options, count, launch, write_whole
from lib.sections import MOST_CLAIMS, anchor, claims_of, going_table, stage_section
from lib.stages import Stage
from lib.tables import Table, hardware_changes, make_table

POINTS_OF_RUNS = 60_000  # of all single runs of the page, validations and traces each


MOST_DETAILS = 5_000  # runs whose details are on the page


def stage_of_loose(findings: Findings, run_id: str, a: argparse.Namespace, cache: Cache) -> str:
    """Where a run without a row belongs: its knob says so."""
    name = cache.read(a.logs_folder / f"{run_id}.txt", read_text_log)[0].get("stage", "")
    return name if name in findings.stages else NO_STAGE


def chart_data(
    findings: Findings,
    tables: Mapping[str, Table],
    loose: Mapping[str, list[str]],
    a: argparse.Namespace,
    cache: Cache,
) -> dict[str, object]:
    """What the page's program draws and lists: curves, and the details of runs."""
    most = min(MOST_POINTS, POINTS_OF_RUNS // max(1, len(findings.logs)))
    most = most if most >= 4 else 0
    pool, stages = Pool(), []
    num_rows = sum(len(rows) for _, rows in findings.stages.values()) + len(findings.loose)
    for name, (_, rows) in findings.stages.items():
        own = loose.get(name, [])
        share = num_rows
        if num_rows > MOST_DETAILS:
            share = max(20, MOST_DETAILS * (len(rows) + len(own)) // num_rows)
        curves = curves_of(name, tables[name], rows, own, findings, most)
        details = details_of(rows, own, findings, a, cache, pool, share)
        stages.append(dict(id=anchor(name), name=name) | curves | details)
    return dict(stages=stages, pool=list(pool.texts))


def tiles_of(findings: Findings) -> list[tuple[str, int]]:
    """How many runs there are, and how they ended."""
    tally = Counter({row["run_id"]: row.status for row in findings.rows}.values())
    tiles = [("runs", tally.total() + len(findings.loose)), ("stages", len(findings.stages))]
    tiles += sorted(tally.items())
    if findings.loose:
        tiles.append(("without a row yet", len(findings.loose)))
    if num_going := sum(going(findings, r) for r in findings.status):
        tiles.append(("running", num_going))
    return tiles


def build(a: argparse.Namespace, cache: Cache) -> tuple[str, dict[str, object]]:
    """The page's main part and its data."""
    findings = read_findings(a, cache)
    loose: dict[str, list[str]] = {}
    for run_id in findings.loose:
        loose.setdefault(stage_of_loose(findings, run_id, a, cache), []).append(run_id)
    if NO_STAGE in loose:
        findings.stages.setdefault(NO_STAGE, (Stage(NO_STAGE), []))
    curves = Curves(a.logs_folder)
    curves.known |= {run_id: log.val for run_id, log in findings.logs.items() if log.val.step}
    made = [make_table(rows, stage, curves, a.target) for stage, rows in findings.stages.values()]
    tables = {table.stage.name: table for table in hardware_changes(made)}
    data = chart_data(findings, tables, loose, a, cache)

    problems = [*findings.problems]
    for name, table in tables.items():
        problems += [f"{name}: {remark}" for remark in table.remarks]
    claims = claims_of(tables, findings)
    num_settled = sum(claim["is_settled"] for claim in claims)
    content = dict(
        title=a.title,
        sources=f"{', '.join(map(str, a.results_file))} and {a.logs_folder}",
        claims=claims[:MOST_CLAIMS],
        num_more=max(0, len(claims) - MOST_CLAIMS),
        settled=f"{num_settled} of {count(len(claims), 'comparison')} settled",
        problems=problems,
        problem_title=f"{count(len(problems), 'problem')} flagged",
        tiles=tiles_of(findings),
        stages=[stage_section(name, t, len(loose.get(name, []))) for name, t in tables.items()],
    )
    live = [str(s.get("updated")) for r, s in findings.status.items() if going(findings, r)]
    marks = [main_part(content | dict(made="", going=None)), json.dumps(data), *live]
    data["version"] = hashlib.sha256("".join(marks).encode()).hexdigest()[:16]
    now = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}"
    return main_part(content | dict(made=now, going=going_table(findings))), data


class Site:
    """The page, made anew when asked, at most every `every` seconds."""

    def __init__(self, a: argparse.Namespace):
        self.a, self.cache, self.lock = a, Cache(), Lock()
        self.made, self.main, self.data = -math.inf, "", {}

    def fresh(self) -> tuple[str, dict[str, object]]:
        with self.lock:
            if time.monotonic() - self.made > 0.8 * self.a.every:
                self.main, self.data = build(self.a, self.cache)
                self.made = time.monotonic()
            return self.main, self.data


def server(a: argparse.Namespace) -> ThreadingHTTPServer:
    """The page on 127.0.0.1; other machines cannot reach it, nor can a foreign page through a
    name of its own."""
    site = Site(a)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
                return self.answer(403, "text/plain", "this page is served to 127.0.0.1 only\n")
            path, _, query = self.path.partition("?")
            if path not in ("/", "/live"):
                return self.answer(404, "text/plain", "no such page; / is the report\n")
            try:
                main, data = site.fresh()
            except UserError as error:
                return self.answer(500, "text/plain", f"{error}\n")
            if path == "/":
                return self.answer(200, "text/html", page(a.title, main, data, live=a.every))
            if query == f"have={data['version']}":
                return self.answer(204, "text/plain", "")
            self.answer(200, "application/json", json.dumps(dict(main=main, data=data)))

        def answer(self, code: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(code)
            headers = {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": len(body),
                "Cache-Control": "no-store",
            }
            headers |= {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}
            for name, value in headers.items():
                if code != 204 or name != "Content-Length":
                    self.send_header(name, str(value))
            self.end_headers()
            try:
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):  # the reader left
                pass

        def log_message(self, *_) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", a.port), Handler)
    except OSError as error:
        raise UserError(
            f"--port {a.port}: {error.strerror}; choose another, 0 takes a free one"
        ) from None


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_data_options(p, many=True)
    p.add_argument(
        "--curves", nargs="+", type=Path, default=[], metavar="CSV", help="as of split_results.py"
    )
    p.add_argument("--target", type=float, metavar="NATS", help="as of split_results.py")
    p.add_argument("--stages", type=Path, metavar="TOML", help="as of split_results.py")
    p.add_argument("--out", type=Path, default=ROOT / "experiments/report.html", metavar="HTML")
    p.add_argument("--title", default="flatrun: report")
    p.add_argument(
        "--watch", action="store_true", help="serve the page on 127.0.0.1 and keep it up to date"
    )
    p.add_argument(
        "--port", type=int, default=8765, help="of --watch (default 8765; 0: any free one)"
    )
    p.add_argument(
        "--every", type=int, default=5, metavar="S", help="of --watch: seconds between two looks"
    )
    a = p.parse_args(argv)
    if a.target is not None and not a.target > 0:
        raise UserError(f"--target {a.target}: expected a loss above 0, in nats per token")
    if a.every < 1 or not 0 <= a.port < 65536:
        raise UserError(
            f"--every {a.every} --port {a.port}: expected at least 1 second, and a port below 65536"
        )
    if a.watch:
        library()  # fails before a browser asks
        with server(a) as site:
            print(f"http://127.0.0.1:{site.server_address[1]}/  (Ctrl-C ends it)", flush=True)
            try:
                site.serve_forever()
            except KeyboardInterrupt:
                print()
        return
    body, data = build(a, Cache())
    text = page(a.title, body, data)
    write_whole(a.out, text)
    print(f"{a.out} ({len(text) / 1e6:.1f} MB)")


if __name__ == "__main__":
    launch(main)
