"""Serves the page of runs: one HTML file, its numbers as JSON, and the videos of samples."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mm_train.page.runs import Run, Runs, differences

LOCAL = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; media-src 'self'; "
    "img-src data:; frame-ancestors 'none'"
)
"""What the browser may load: nothing from elsewhere."""
AT_ONCE = 1.0
"""Seconds that an answer may take to read metrics; what is left is read for the next one."""
PAGE = Path(__file__).with_name("page.html")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], runs: Runs) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.runs, self.lock = runs, Lock()
        self.local = address[0] in LOCAL
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a tab that was closed
            super().handle_error(request, client_address)


def open_server(runs: Runs, host: str, port: int) -> Server:
    """Listens, and answers once `serve_forever` is called. ValueError for an address that it cannot have."""
    try:
        return Server((host, port), runs)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: {error.strerror}: give another --port (0: any free one)"
        ) from error


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        asked = {name: values[-1] for name, values in parse_qs(url.query).items()}
        answer = _ANSWERS.get(url.path)
        if self.server.local and not self._is_ours():  # somebody else's page that calls itself by another name
            return self._fail(HTTPStatus.FORBIDDEN)
        try:
            if url.path == "/":
                return self._send(PAGE.read_bytes(), "text/html; charset=utf-8")
            if url.path == "/video":
                return self._video(asked)
            if answer is None:
                return self._fail(HTTPStatus.NOT_FOUND)
            with self.server.lock:
                text = json.dumps(answer(self.server.runs, asked), allow_nan=False)
            return self._send(text.encode(), "application/json")
        except (KeyError, ValueError):  # a run that is gone, or an address that the page does not write
            return self._fail(HTTPStatus.NOT_FOUND)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _is_ours(self) -> bool:
        host = self.headers.get("Host", "")
        return re.sub(r":\d+$", "", host).strip("[]") in LOCAL

    def _fail(self, status: HTTPStatus) -> None:
        self._send(status.phrase.encode(), "text/plain", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._start(status, kind, len(body))
        self.wfile.write(body)

    def _start(self, status: HTTPStatus, kind: str, length: int, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(length), "Content-Security-Policy": POLICY}
        headers |= {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache", "Referrer-Policy": "no-referrer"}
        for name, value in (headers | dict(more or {})).items():
            self.send_header(name, value)
        self.end_headers()

    def _video(self, asked: Mapping[str, str]) -> None:
        file = _run(self.server.runs, asked).video(int(asked["step"]), asked["file"])
        if file is None:
            return self._fail(HTTPStatus.NOT_FOUND)
        with open(file, "rb") as opened:
            size = file.stat().st_size
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if part is None:
                self._start(HTTPStatus.OK, "video/mp4", size, {"Accept-Ranges": "bytes"})
                return shutil.copyfileobj(opened, self.wfile)
            first, last = int(part[1]), min(int(part[2] or size - 1), size - 1)
            if first > last:
                more = {"Content-Range": f"bytes */{size}"}
                return self._start(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "video/mp4", 0, more)
            more = {"Accept-Ranges": "bytes", "Content-Range": f"bytes {first}-{last}/{size}"}
            self._start(HTTPStatus.PARTIAL_CONTENT, "video/mp4", last - first + 1, more)
            opened.seek(first)
            self.wfile.write(opened.read(last - first + 1))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page that looks every two seconds would fill the terminal."""


def _run(runs: Runs, asked: Mapping[str, str]) -> Run:
    return runs.by_name[asked["run"]]


def _list(runs: Runs, asked: Mapping[str, str]) -> Any:
    until = time.monotonic() + AT_ONCE
    return [run.describe(until) for run in runs.look()]


def _curve(runs: Runs, asked: Mapping[str, str]) -> Any:
    smooth = float(asked.get("smooth", 0))
    if not 0 <= smooth < 1:
        raise ValueError("smooth")
    last = int(asked["last"]) if "last" in asked else None
    points = min(int(asked.get("points", 800)), 5000)
    return _run(runs, asked).curves.curve(asked["metric"], points, smooth, int(asked.get("first", 0)), last)._asdict()


def _configs(runs: Runs, asked: Mapping[str, str]) -> Any:
    named = [runs.by_name[name] for name in json.loads(asked["runs"])]
    found = [run.config() for run in named]
    rows = differences([config for config, _ in found])
    return {"rows": rows, "problems": [problem for _, problem in found]}


_ANSWERS: Mapping[str, Callable[[Runs, Mapping[str, str]], Any]] = {
    "/runs": _list,
    "/curve": _curve,
    "/configs": _configs,
    "/samples": lambda runs, asked: _run(runs, asked).samples(int(asked["step"])),
    "/estimate": lambda runs, asked: _run(runs, asked).estimate(),
}
