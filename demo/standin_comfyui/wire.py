"""The stand-in's HTTP layer: requests and responses as values, multipart bodies, and a threaded server."""

import contextlib
import json
import re
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from demo.standin_comfyui.websockets import Websocket, accepted_key

MOST_BODY_BYTES = 100 * 1024 * 1024
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Response:
    """One response; without a body it has no content type."""

    status: int = 200
    body: bytes = b""
    content_type: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One request: the path without `/api`, the query, the headers and the body."""

    method: str
    path: str
    query: dict[str, str]
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body.decode())


def json_response(content: Any, status: int = 200) -> Response:
    return Response(status, json.dumps(content).encode(), "application/json; charset=utf-8")


def is_foreign_page(headers: Message) -> bool:
    """Whether a web page of another site sent the request: its Origin is not the loopback host that it talks to."""
    host, origin = headers.get("Host", ""), headers.get("Origin")
    if origin is None or host.rpartition(":")[0].strip("[]") not in _LOOPBACK:
        return False
    return urlsplit(origin).netloc != host


def multipart(request: Request) -> dict[str, tuple[str | None, bytes]]:
    """{field: (file name or None, content)}, the first of each name; {} when the body is not multipart."""
    content_type = request.headers.get("Content-Type", "")
    if content_type.startswith("application/x-www-form-urlencoded"):
        return {name: (None, values[0].encode()) for name, values in parse_qs(request.body.decode()).items()}
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    if not content_type.startswith("multipart/form-data") or not boundary:
        return {}
    parts: dict[str, tuple[str | None, bytes]] = {}
    for piece in request.body.split(b"--" + boundary[1].encode())[1:-1]:
        head, _, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        disposition = head.decode("utf-8", "surrogateescape")
        name = re.search(r'[; ]name="((?:[^"\\]|\\.)*)"', disposition)
        if name:
            parts.setdefault(name[1], (_filename(disposition), content.removesuffix(b"\r\n")))
    return parts


def _filename(disposition: str) -> str | None:
    """The file name in a Content-Disposition; None if it is empty. Backslashes are escapes."""
    encoded = re.search(r"filename\*=utf-8''([^;\r\n]+)", disposition)
    if encoded:
        return unquote(encoded[1])
    plain = re.search(r'filename="((?:[^"\\]|\\.)*)"', disposition)
    return re.sub(r"\\(.)", r"\1", plain[1]).lstrip("/") or None if plain else None


class HttpServer(ThreadingHTTPServer):
    """Serves at `host` and `port` (0: a free one), with a thread for each connection.

    `answer` is called for each request, `listen` for each websocket. When `answer` raises ConnectionAbortedError, the connection
    is reset.
    """

    daemon_threads = True

    def __init__(
        self,
        host: str,
        port: int,
        answer: Callable[[Request], Response],
        listen: Callable[[Request, Websocket], None],
        certificate: Path | None = None,
        most_body_bytes: int = MOST_BODY_BYTES,
    ):
        super().__init__((host, port), _Handler)
        self.most_body_bytes = most_body_bytes
        self.answer, self.listen = answer, listen
        self._connections: set[socket.socket] = set()
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        """Close all connections, as the end of a process would."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that disconnected is not an error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "standin-comfyui"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: HttpServer

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("GET", with_body=False)

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str, with_body: bool = True) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > self.server.most_body_bytes:
            text = f"Maximum request body size {self.server.most_body_bytes} exceeded.".encode()
            self._send(Response(413, text, "text/plain; charset=utf-8", {"Connection": "close"}), True)
            return
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        path = url.path.removeprefix("/api") if url.path.startswith("/api/") else url.path
        request = Request(method, path, query, self.headers, self.rfile.read(length))
        try:
            answer = self.server.answer(request)
        except ConnectionAbortedError:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise
        if answer.status == 101:
            self._open_websocket(request)
        else:
            self._send(answer, with_body)

    def _open_websocket(self, request: Request) -> None:
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accepted_key(request.headers["Sec-WebSocket-Key"]))
        self.end_headers()
        self.wfile.flush()
        self.close_connection = True
        self.server.listen(request, Websocket(self.connection, self.rfile))

    def _send(self, answer: Response, with_body: bool) -> None:
        self.send_response(answer.status)
        if answer.content_type:
            self.send_header("Content-Type", answer.content_type)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(name, value.encode().decode("latin-1"))
        self.end_headers()
        if with_body:
            self.wfile.write(answer.body)

    def log_message(self, *_words: Any) -> None:
        """Logs nothing: `StandIn.requests` lists the requests."""
