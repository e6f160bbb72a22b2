"""The HTTP side of the stand-in: routes, uploads, /view and the exact shapes of the answers."""

import json
import mimetypes
import os
import re
import threading
import uuid
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from demo.standin_comfyui.nodes import NODES, object_info
from demo.standin_comfyui.validation import Refused, validate
from demo.standin_comfyui.worker import Worker, in_some_order

VERSION = "0.3.64"
MOST_BODY_BYTES = 100 * 1024 * 1024
_KINDS = ("input", "output", "temp")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_GET_ONLY = ("/system_stats", "/features", "/view", "/object_info")
_POST_ONLY = ("/interrupt", "/free")


@dataclass(frozen=True)
class Answer:
    """What goes back: an empty body has no content type."""

    status: int = 200
    body: bytes = b""
    content_type: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """One request: the path without `/api`, the query, the headers and the body."""

    method: str
    path: str
    query: dict[str, str]
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body.decode())


def _json(content: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode(), "application/json; charset=utf-8")


_SERVER_FAILED = Answer(
    500, b"500 Internal Server Error\n\nServer got itself in trouble", "text/plain; charset=utf-8", {"Connection": "close"}
)


class StandIn:
    """One server over `folder`, which gets input/, output/ and temp/. Use as a context manager, or `start` and `stop`.

    `seconds_per_job` is how long a prompt takes that is not wholly cached. `requests` lists what was asked, in order.
    A test that wants another answer to a request replaces `answer`.
    """

    def __init__(self, folder: Path, *, seconds_per_job: float = 0.0, port: int = 0):
        self.folder = folder.resolve()
        for kind in _KINDS:
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
        for left in (self.folder / "temp").iterdir():
            left.unlink()
        self.worker = Worker(self.folder, seconds_per_job)
        self.requests: list[tuple[str, str]] = []
        self.submitted: list[dict] = []
        """The body of every accepted POST /prompt."""
        self._numbers = 0
        self._numbers_lock = threading.Lock()
        self._http = _Listener(("127.0.0.1", port), self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="standin-http", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def start(self) -> "StandIn":
        self.worker.start()
        self._thread.start()
        return self

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self.worker.stop()

    def __enter__(self) -> "StandIn":
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def answer(self, asked: Asked) -> Answer:
        """The answer to one request; what ComfyUI crashes on is a 500 here too."""
        if _is_foreign_page(asked.headers):
            return Answer(403)
        try:
            return self._route(asked)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OSError):
            return _SERVER_FAILED

    def _route(self, asked: Asked) -> Answer:
        first = "/" + asked.path.split("/")[1]
        if (asked.method == "POST" and first in _GET_ONLY) or (asked.method == "GET" and first in _POST_ONLY):
            allowed = "GET,HEAD" if first in _GET_ONLY else "POST"
            return Answer(405, b"405: Method Not Allowed", "text/plain; charset=utf-8", {"Allow": allowed})
        routes = {
            ("GET", "/system_stats"): lambda: _json(_system_stats()),
            ("GET", "/features"): lambda: _json({"supports_preview_metadata": True, "max_upload_size": MOST_BODY_BYTES}),
            ("GET", "/object_info"): lambda: self._object_info(None),
            ("GET", "/prompt"): lambda: _json({"exec_info": {"queue_remaining": self._remaining()}}),
            ("GET", "/queue"): lambda: _json(self.worker.queue()),
            ("GET", "/history"): lambda: self._history(asked.query),
            ("GET", "/view"): lambda: self._view(asked.query),
            ("POST", "/prompt"): lambda: self._prompt(asked.json()),
            ("POST", "/upload/image"): lambda: self._upload(asked),
            ("POST", "/queue"): lambda: self._edit_queue(asked.json()),
            ("POST", "/history"): lambda: self._edit_history(asked.json()),
            ("POST", "/interrupt"): lambda: self._interrupt(asked.body),
            ("POST", "/free"): lambda: self._free(asked.json()),
        }
        if (asked.method, asked.path) in routes:
            return routes[asked.method, asked.path]()
        last = unquote(asked.path.rpartition("/")[2])
        if asked.method == "GET" and re.fullmatch("/history/[^/]+", asked.path):
            return _json({last: self.worker.history[last]} if last in self.worker.history else {})
        if asked.method == "GET" and re.fullmatch("/object_info/[^/]+", asked.path):
            return self._object_info(last)
        return Answer(404)

    def _object_info(self, name: str | None) -> Answer:
        names = list(NODES) if name is None else [name] if name in NODES else []
        return _json({each: object_info(each, self.folder) for each in names})

    def _remaining(self) -> int:
        queue = self.worker.queue()
        return len(queue["queue_running"]) + len(queue["queue_pending"])

    def _history(self, query: dict[str, str]) -> Answer:
        entries = list(self.worker.history.items())
        most = int(query["max_items"]) if "max_items" in query else None
        start = int(query.get("offset", -1))
        if start < 0:
            start = 0 if most is None else max(0, len(entries) - most)
        return _json(dict(entries[start:] if most is None else entries[start : start + max(0, most)]))

    def _edit_history(self, wish: dict) -> Answer:
        if wish.get("clear"):
            self.worker.history.clear()
        for prompt_id in wish.get("delete", ()):
            self.worker.history.pop(prompt_id, None)
        return Answer()

    def _edit_queue(self, wish: dict) -> Answer:
        if wish.get("clear"):
            self.worker.delete_pending(None)
        if "delete" in wish:
            self.worker.delete_pending(wish["delete"])
        return Answer()

    def _interrupt(self, body: bytes) -> Answer:
        self.worker.interrupt(json.loads(body).get("prompt_id") if body else None)
        return Answer()

    def _free(self, wish: dict) -> Answer:
        if wish.get("free_memory"):
            self.worker.drop_cache()
        return Answer()

    def _prompt(self, wish: Any) -> Answer:
        # A list or a text has no prompt in it; null is what the real server fails over.
        wish = wish if isinstance(wish, dict) else dict.fromkeys(wish)
        number = self._number(wish)
        if "prompt" not in wish:
            error = {"type": "no_prompt", "message": "No prompt provided", "details": "No prompt provided", "extra_info": {}}
            return _json({"error": error, "node_errors": {}}, 400)
        prompt = wish["prompt"]
        prompt_id = str(wish.get("prompt_id", uuid.uuid4()))
        try:
            outputs, node_errors = validate(prompt, self.folder, wish.get("partial_execution_targets"))
        except Refused as refused:
            return _json({"error": refused.error, "node_errors": refused.node_errors}, 400)
        extra_data = wish.get("extra_data", {})
        if "client_id" in wish:
            extra_data["client_id"] = wish["client_id"]
        self.submitted.append(json.loads(json.dumps(wish)))
        self.worker.put(number, prompt_id, prompt, extra_data, in_some_order(outputs, prompt_id))
        return _json({"prompt_id": prompt_id, "number": number, "node_errors": node_errors})

    def _number(self, wish: dict[str, Any]) -> float:
        """Counts every POST, refused ones too."""
        if "number" in wish:
            return float(wish["number"])
        with self._numbers_lock:
            number = self._numbers
            self._numbers += 1
        return -number if wish.get("front") else number

    def _upload(self, asked: Asked) -> Answer:
        parts = _multipart(asked)
        if "image" not in parts:
            return Answer(400)
        filename, content = parts["image"]
        if filename is None:
            return _SERVER_FAILED
        fields = {name: value.decode() for name, (file, value) in parts.items() if file is None}
        kind, subfolder = fields.get("type", "input"), fields.get("subfolder", "")
        if kind not in _KINDS:
            return _SERVER_FAILED
        base = self.folder / kind
        target = Path(os.path.abspath(os.path.join(base, os.path.normpath(subfolder), filename)))
        if not target.is_relative_to(base):
            return Answer(400)
        Path(os.path.abspath(base / subfolder)).mkdir(parents=True, exist_ok=True)
        if fields.get("overwrite") not in ("true", "1"):
            target, filename = _free_name(target, filename, content)
        target.write_bytes(content)
        return _json({"name": filename, "subfolder": subfolder, "type": kind})

    def _view(self, query: dict[str, str]) -> Answer:
        if "filename" not in query:
            return Answer(404)
        filename, kind = query["filename"], query.get("type", "output")
        annotated = re.fullmatch(r"(.*) \[(input|output|temp)\]", filename)
        if annotated:
            filename, kind = annotated[1], annotated[2]
        if not filename or filename.startswith("/") or ".." in filename or kind not in _KINDS:
            return Answer(400)
        base = self.folder / kind
        folder = Path(os.path.abspath(os.path.join(base, query.get("subfolder", ""))))
        if not folder.is_relative_to(base):
            return Answer(403)
        path = folder / os.path.basename(filename)
        if not path.is_file():
            return Answer(404)
        content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return Answer(200, path.read_bytes(), content_type, {"Content-Disposition": f'filename="{path.name}"'})


def _is_foreign_page(headers: Message) -> bool:
    """An Origin that is not the loopback host it talks to: a web page of somebody else."""
    host, origin = headers.get("Host", ""), headers.get("Origin")
    if origin is None or host.rpartition(":")[0].strip("[]") not in _LOOPBACK:
        return False
    return urlsplit(origin).netloc != host


def _system_stats() -> dict[str, Any]:
    memory = {"vram_total": 2**34, "vram_free": 2**33, "torch_vram_total": 2**34, "torch_vram_free": 2**33}
    return {
        "system": {
            "os": "posix",
            "ram_total": 2**34,
            "ram_free": 2**33,
            "comfyui_version": VERSION,
            "required_frontend_version": "",
            "installed_templates_version": "",
            "required_templates_version": "",
            "python_version": "",
            "pytorch_version": "",
            "embedded_python": False,
            "argv": ["standin_comfyui"],
        },
        "devices": [{"name": "cpu", "type": "cpu", "index": None, **memory}],
    }


def _free_name(target: Path, filename: str, content: bytes) -> tuple[Path, str]:
    """`name`, or `name (1)`, `name (2)` ... when other bytes lie there; equal bytes keep their name."""
    stem, suffix = os.path.splitext(filename)
    number = 0
    while target.exists() and target.read_bytes() != content:
        number += 1
        filename = f"{stem} ({number}){suffix}"
        target = target.with_name(os.path.basename(filename))
    return target, filename


def _multipart(asked: Asked) -> dict[str, tuple[str | None, bytes]]:
    """field -> (file name or None, content), the first of each name; {} when the body is not multipart."""
    content_type = asked.headers.get("Content-Type", "")
    if content_type.startswith("application/x-www-form-urlencoded"):
        return {name: (None, values[0].encode()) for name, values in parse_qs(asked.body.decode()).items()}
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    if not content_type.startswith("multipart/form-data") or not boundary:
        return {}
    parts: dict[str, tuple[str | None, bytes]] = {}
    for piece in asked.body.split(b"--" + boundary[1].encode())[1:-1]:
        head, _, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        disposition = head.decode("utf-8", "surrogateescape")
        name = re.search(r'[; ]name="((?:[^"\\]|\\.)*)"', disposition)
        if name:
            parts.setdefault(name[1], (_filename(disposition), content.removesuffix(b"\r\n")))
    return parts


def _filename(disposition: str) -> str | None:
    """The file name in a Content-Disposition; an empty one counts as none, backslashes are escapes."""
    encoded = re.search(r"filename\*=utf-8''([^;\r\n]+)", disposition)
    if encoded:
        return unquote(encoded[1])
    plain = re.search(r'filename="((?:[^"\\]|\\.)*)"', disposition)
    return re.sub(r"\\(.)", r"\1", plain[1]).lstrip("/") or None if plain else None


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], standin: StandIn):
        super().__init__(address, _Handler)
        self.standin = standin

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = f"standin-comfyui/{VERSION}"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Listener

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("GET", with_body=False)

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str, with_body: bool = True) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > MOST_BODY_BYTES:
            text = f"Maximum request body size {MOST_BODY_BYTES} exceeded.".encode()
            self._send(Answer(413, text, "text/plain; charset=utf-8", {"Connection": "close"}), True)
            return
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        path = url.path.removeprefix("/api") if url.path.startswith("/api/") else url.path
        asked = Asked(method, path, query, self.headers, self.rfile.read(length))
        self.server.standin.requests.append((method, path))
        self._send(self.server.standin.answer(asked), with_body)

    def _send(self, answer: Answer, with_body: bool) -> None:
        self.send_response(answer.status)
        if answer.content_type:
            self.send_header("Content-Type", answer.content_type)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(name, value.encode().decode("latin-1"))
        self.end_headers()
        if with_body:
            self.wfile.write(answer.body)

    def log_message(self, *_words: Any) -> None:
        """Silent: `requests` holds what was asked."""
