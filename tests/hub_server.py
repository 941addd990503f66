"""A loopback stand-in for the hub: the endpoints huggingface_hub's downloads and listings use, and
faults on demand.

    with Hub({"fineweb_val_000000.bin": data}) as hub:
        hub.faults["fineweb_val_000000.bin"] = ["cut"]     # the first GET breaks off half way
        ...                                                # HF_ENDPOINT=hub.url
        hub.gets, hub.sent                                 # what was asked for, bytes of bodies
        sent

It shows how the client behaves against these answers, not that the live hub gives them.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest

REPO = "kjj0/fineweb10B-gpt2"
COMMIT = "c0ffee" * 6 + "beef"


class Hub:
    """Serves `files` (name -> bytes) as dataset `repo` on 127.0.0.1 until the `with` block ends.

    faults: name -> what goes wrong with its next GETs, one word per GET, used up from the front:
        "cut"        half of the body, then the connection closes
        "flip"       the last byte is another one; the length is right
        "no_range"   the Range header is ignored: 200 and the whole file
    A key ending in "!" gives one word for every GET.
    """

    def __init__(self, files: dict[str, bytes], repo: str = REPO):
        self.files, self.repo = files, repo
        self.faults: dict[str, list[str] | str] = {}
        self.refusals: dict[str, int] = {}  # name -> HTTP status that it is refused with
        self.gets: list[str] = []  # names, in order
        self.sent = 0  # bytes of bodies
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _list(self, r: BaseHTTPRequestHandler) -> None:
        tree = [
            dict(type="file", path=name, size=len(data), oid="0" * 40)
            for name, data in self.files.items()
        ]
        body = json.dumps(tree).encode()
        r.send_response(200)
        r.send_header("Content-Type", "application/json")
        r.send_header("Content-Length", str(len(body)))
        r.end_headers()
        r.wfile.write(body)

    def _answer(self, r: BaseHTTPRequestHandler, body: bool) -> None:
        if r.path.startswith(f"/api/datasets/{self.repo}/tree/"):
            return self._list(r)
        folder, _, rest = r.path.partition("/resolve/")
        name = rest.partition("/")[2]
        if folder != f"/datasets/{self.repo}":
            return self._refuse(r, 404)
        if name not in self.files:
            return self._refuse(r, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        if status := self.refusals.get(name):
            return self._refuse(r, status)
        fault = self._next_fault(name) if body else ""
        self._send(r, self.files[name], body, fault)

    def _refuse(
        self, r: BaseHTTPRequestHandler, status: int, headers: dict[str, str] | None = None
    ) -> None:
        r.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": "0"}).items():
            r.send_header(name, value)
        r.end_headers()

    def _next_fault(self, name: str) -> str:
        """What goes wrong with this request for a file; it is counted."""
        self.gets.append(name)
        if every := self.faults.get(name + "!"):
            return every
        words = self.faults.get(name)
        return words.pop(0) if words else ""

    def _send(self, r: BaseHTTPRequestHandler, data: bytes, body: bool, fault: str) -> None:
        """The file, or the part of it that is asked for, as far as the fault lets it."""
        digest = hashlib.sha256(data).hexdigest()
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, stop, asked = 0, len(data), r.headers.get("Range", "")
        partial = asked.startswith("bytes=") and fault != "no_range"
        if partial:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        r.send_response(206 if partial else 200)
        if partial:
            r.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        r.send_header("Content-Length", str(stop - start))
        r.send_header("ETag", f'"{digest}"')
        r.send_header("X-Linked-Etag", f'"{digest}"')
        r.send_header("X-Linked-Size", str(len(data)))
        r.send_header("X-Repo-Commit", COMMIT)
        r.end_headers()
        if not body:
            return
        part = data[start : start + (stop - start) // 2] if fault == "cut" else data[start:stop]
        try:
            r.wfile.write(part)
            self.sent += len(part)
        except ConnectionError:  # the client had enough
            pass
        if fault == "cut":
            r.close_connection = True
            r.connection.shutdown(2)


@contextmanager
def serving(files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with these files that this process's huggingface_hub talks to, and no waits between
    attempts."""
    with Hub(dict(files)) as server:
        constants = huggingface_hub.constants
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        # This is the module `time` itself, so it holds for everybody.
        monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda s: None)
        yield server
