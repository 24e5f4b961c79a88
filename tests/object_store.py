"""An S3 server of this process, and a proxy before it that answers badly: what tests of object stores share."""

from __future__ import annotations

import http.client
import logging
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

CODES = {403: "AccessDenied", 409: "ConditionalRequestConflict", 412: "PreconditionFailed", 500: "InternalError"}

FAULTS = ("refuse", "lose", "lose and fail", "duplicate", "delay", "403", "409", "412", "500", "503")
"""What a request may meet: never reaching the server; being done while its answer is lost, or told as 500; being done twice,
with the second answer told; a delay; an answer of the server that has done nothing."""

Choose = Callable[[str, str], str | None]
"""From method and path of a request, the fault that it meets (None: none)."""


@contextmanager
def s3_server() -> Iterator[str]:
    """Gives the URL of an S3 server with an empty bucket ``bucket``."""
    from moto.moto_server.threaded_moto_server import MotoRequestHandler
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = _OneWriteAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
        yield url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _OneWriteAtATime:
    """Makes moto's conditional writes atomic, as S3's are: moto looks and then writes, and another thread may come between."""

    def __init__(self, app: Any) -> None:
        self._app, self._lock = app, threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        with self._lock if environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE") else nullcontext():
            return self._app(environ, start)


class Proxy:
    """Stands before an S3 server. ``faults`` chooses what a request meets; ``met`` counts what was met.

    ``hidden`` names a header that the server does not get to see.
    """

    def __init__(self, server: str) -> None:
        self.server = server.removeprefix("http://")
        self.faults: Choose = lambda method, path: None
        self.met: dict[str, int] = {}
        self.hidden = ""
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner: ClassVar[Proxy] = proxy

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def choose(self, method: str, path: str) -> str | None:
        with self._lock:
            fault = self.faults(method, path)
            if fault is not None:
                self.met[fault] = self.met.get(fault, 0) + 1
            return fault

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: ClassVar[Proxy]
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.owner.choose(self.command, self.path)
        if fault == "refuse":
            return self._hang_up()
        if fault is not None and fault.isdigit():
            return self._fail(int(fault))
        if fault == "delay":
            time.sleep(0.05)
        status, headers, content = self._forward(body)
        if fault == "duplicate":
            status, headers, content = self._forward(body)
        if fault == "lose":
            return self._hang_up()
        if fault == "lose and fail":
            return self._fail(500)
        return self._answer(status, headers, content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve  # noqa: N815 - the base class wants these names

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() != self.owner.hidden}
        connection = http.client.HTTPConnection(self.owner.server, timeout=30)
        try:
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        skipped = {"transfer-encoding", "connection", *([] if self.command == "HEAD" else ["content-length"])}
        for name, value in headers:
            if name.lower() not in skipped:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _fail(self, status: int) -> None:
        code = CODES.get(status, "SlowDown")
        text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"  # of a 412, S3 itself names no condition
        self._answer(status, [("Content-Type", "application/xml")], text.encode())

    def _hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> str:
    """Makes this process use the S3 server at ``url`` and returns a storage URL nobody has used."""
    for name, value in account(url).items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}"


def account(url: str) -> dict[str, str]:
    """Returns the environment of a user of the S3 server at ``url``."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "for tests",
        "AWS_REGION": "us-east-1",
    }
