"""A web server and a proxy that do as a test likes."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Web:
    """What is served at every path but those redirected, and how."""

    content: bytes = b""
    validator: tuple[str, str] | None = ("ETag", '"one"')
    resumes: bool = True
    tells_length: bool = True
    cuts: list[int] = field(default_factory=list)
    """After how many bytes of its body each of the next answers breaks off."""
    hangs: bool = False
    """Whether it is silent there instead of closing."""
    statuses: list[int] = field(default_factory=list)
    """What the next requests are answered with, instead."""
    redirects: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """What was asked for, as (path, headers in small letters)."""
    port: int = 0
    scheme: str = "http"
    over: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str = "/image.zip", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def asked(self, header: str) -> list[str | None]:
        """That header of every request so far."""
        return [headers.get(header) for _, headers in self.requests]


class _Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        web, asked = self.web, {name.lower(): value for name, value in self.headers.items()}
        web.requests.append((self.path, asked))
        if web.statuses:
            self._empty(web.statuses.pop(0))
        elif location := web.redirects.get(self.path):
            self._empty(302, location)
        elif web.validator and web.validator[1] in {asked.get("if-none-match"), asked.get("if-modified-since")}:
            self._empty(304)
        else:
            self._body(self._start(asked))

    def _start(self, asked: dict[str, str]) -> int:
        """Where the answer begins: further on only if that is asked for, by somebody who has the same content."""
        web = self.web
        found = re.fullmatch(r"bytes=(\d+)-", asked.get("range", ""))
        same = asked.get("if-range") in {None, web.validator[1] if web.validator else ""}
        return int(found[1]) if found and same and web.resumes else 0

    def _empty(self, status: int, location: str = "") -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _body(self, start: int) -> None:
        web = self.web
        body = web.content[start:]
        if start and not body:
            return self._empty(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(web.content) - 1}/{len(web.content)}")
        if web.validator:
            self.send_header(*web.validator)
        if web.tells_length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        cut = web.cuts.pop(0) if web.cuts else len(body)
        with contextlib.suppress(OSError):
            self.wfile.write(body[:cut])
            if web.hangs and cut < len(body):
                web.over.wait()
        self.close_connection = True
        return None


@contextlib.contextmanager
def serving(web: Web, tls: ssl.SSLContext | None = None) -> Iterator[Web]:
    """``web`` on a port of the loopback."""
    handler: Callable[..., BaseHTTPRequestHandler] = type("Handler", (_Handler,), {"web": web})
    server = _Server(("127.0.0.1", 0), handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        web.scheme = "https"
    web.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield web
    finally:
        web.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def handle_error(self, request: socket.socket, client_address: object) -> None:
        """A client that goes away is what half of the tests are about."""
