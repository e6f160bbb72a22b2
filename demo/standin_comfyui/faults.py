"""Everything that ComfyUI, or a proxy in front of it, was seen doing wrong, by name.

`standin.fault("image_cut_off", times=2)` affects the next two requests to which the fault applies; without `times` it affects
all, and `after` skips that many first. `on` restricts it to requests whose path begins with it, or to the node with that id.
"""

import functools
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from demo.standin_comfyui.wire import Request, Response, json_response

Handler = Callable[[Request], Response]
"""The server's response without the fault."""


@dataclass
class Fault:
    """A requested fault: its name says whether it affects requests, history entries, nodes or websockets."""

    name: str
    on: str | None = None
    left: int | None = None
    """How often it still happens; None: always."""
    after: int = 0
    """How often it is skipped first."""

    def happens(self) -> bool:
        """Whether it happens this time."""
        self.after -= 1
        if self.after >= 0:
            return False
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


class NodeFails(Exception):
    """Raised in a node; the history names the class of the exception."""


class OutOfMemoryError(NodeFails):
    """Named like the exception of torch."""


def _answer(status: int, body: bytes = b"", content_type: str | None = "text/html", **headers: str) -> Callable:
    return lambda request, handle: Response(status, body, content_type, headers)


def _altered(change: Callable[[Response], Response]) -> Callable:
    return lambda request, handle: change(handle(request))


def _with_body(change: Callable[[bytes], bytes]) -> Callable:
    return _altered(lambda answer: replace(answer, body=change(answer.body)))


def _reset(request: Request, handle: Handler) -> Response:
    raise ConnectionAbortedError


def _answer_lost(request: Request, handle: Handler) -> Response:
    handle(request)
    raise ConnectionAbortedError


def _slow(request: Request, handle: Handler) -> Response:
    time.sleep(0.5)
    return handle(request)


def _without(name: str) -> Callable:
    """The server does not know a key of the request."""

    def answer(request: Request, handle: Handler) -> Response:
        body = {key: value for key, value in request.json().items() if key != name}
        return handle(replace(request, body=json.dumps(body).encode()))

    return answer


def _prompt_lost(request: Request, handle: Handler) -> Response:
    return json_response({"prompt_id": request.json()["prompt_id"], "number": 0, "node_errors": {}})


def _half(answer: Response) -> Response:
    """Half of the body with a Content-Length for all of it."""
    length = str(len(answer.body))
    return replace(answer, body=answer.body[: len(answer.body) // 2], headers={"Content-Length": length, "Connection": "close"})


def _short(answer: Response) -> Response:
    """All of the body with a Content-Length for half of it."""
    return replace(answer, headers={"Content-Length": str(len(answer.body) // 2), "Connection": "close"})


@functools.cache
def _png(size: tuple[int, int]) -> bytes:
    content = io.BytesIO()
    Image.new("1", size).save(content, "PNG")
    return content.getvalue()


_LOGIN = b"<html><form>Please log in</form></html>"
_BAD_GATEWAY = b"<html><center><h1>502 Bad Gateway</h1></center></html>"

REQUESTS: dict[str, tuple[str, str, Callable[[Request, Handler], Response]]] = {
    # A proxy or ComfyUI's HTTP layer; with a method and a path only where the fault cannot happen elsewhere.
    "reset": ("", "/", _reset),
    "slow": ("", "/", _slow),
    "server_error": ("", "/", _answer(500, b"500 Internal Server Error", "text/plain")),
    "away_502": ("", "/", _answer(502, _BAD_GATEWAY)),
    "away_503": ("", "/", _answer(503)),
    "away_504": ("", "/", _answer(504)),
    "away_524": ("", "/", _answer(524, b"error code: 524")),
    "busy_429": ("", "/", _answer(429, b"Too Many Requests")),
    "login_page": ("", "/", _answer(200, _LOGIN)),
    "login_redirect": ("", "/", _answer(302, b"", None, Location="/login?next=%2F")),
    "unauthorized": ("", "/", _answer(401, _LOGIN)),
    "forbidden": ("", "/", _answer(403, b"", None)),
    "too_large": ("", "/", _answer(413, b"<html>413 Request Entity Too Large</html>")),
    "broken_json": ("GET", "/history/", _answer(200, b'{"outputs": {', "application/json")),
    "json_list": ("GET", "/history/", _answer(200, b"[]", "application/json")),
    "cut_off": ("GET", "/", _altered(_half)),
    "wrong_length": ("GET", "/", _altered(_short)),
    "endless": ("GET", "/", _with_body(lambda body: bytes(3_000_000))),
    # POST /prompt
    "answer_lost": ("POST", "/prompt", _answer_lost),
    "prompt_lost": ("POST", "/prompt", _prompt_lost),
    "own_ids": ("POST", "/prompt", _without("prompt_id")),
    "targets_ignored": ("POST", "/prompt", _without("partial_execution_targets")),
    # GET /view
    "image_empty": ("GET", "/view", _altered(lambda answer: replace(answer, body=b""))),
    "image_of_html": ("GET", "/view", _altered(lambda answer: replace(answer, body=_LOGIN))),
    "image_cut_off": ("GET", "/view", _altered(lambda answer: replace(answer, body=answer.body[:-9]))),
    "image_corrupt": (
        "GET",
        "/view",
        _altered(lambda answer: replace(answer, body=answer.body[:60] + bytes(40) + answer.body[100:])),
    ),
    "image_bomb": ("GET", "/view", _altered(lambda answer: replace(answer, body=_png((9500, 9500))))),
    "image_gone": ("GET", "/view", _answer(404, b"", None)),
    # /ws
    "no_websocket": ("GET", "/ws", _answer(404, b"", None)),
}
"""Name -> method ("": any), beginning of the path, and the response."""


def _renamed(record: dict[str, Any]) -> dict[str, Any]:
    return {"filename": "../../escape.png", "subfolder": "/etc/../..", "type": "output", "secret": "../x"}


def _shown(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    """Changes the output of each node in a history entry."""

    def alter(entry: dict[str, Any]) -> None:
        entry["outputs"] = {node: change(shown) for node, shown in entry["outputs"].items()}

    return alter


def _each_record(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    return _shown(lambda shown: shown | {"images": [change(record) for record in shown.get("images", ())]})


def _no_output_when_cached(entry: dict[str, Any]) -> None:
    cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    entry["outputs"] = {node: shown for node, shown in entry["outputs"].items() if node not in cached}


ENTRIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "outputs_animated": _shown(lambda shown: shown | {"animated": [True]}),
    "outputs_webm": _each_record(lambda record: record | {"filename": "clip_00001_.webm"}),
    "outputs_temp": _each_record(lambda record: record | {"type": "temp"}),
    "outputs_latents": _shown(lambda shown: {"latents": [{"filename": "a.latent", "subfolder": "", "type": "output"}]}),
    "outputs_text": _shown(lambda shown: shown | {"text": ["hello"]}),
    "outputs_bare": _each_record(lambda record: {key: value for key, value in record.items() if value and key != "type"}),
    "outputs_hostile": _each_record(_renamed),
    "outputs_nonsense": _shown(lambda shown: {"images": [None, 7, {"filename": 5}, {}], "text": None}),
    "outputs_empty": _shown(lambda shown: {"images": []}),
    "cached_outputs_missing": _no_output_when_cached,
    "status_missing": lambda entry: entry.pop("status"),
}
"""Name -> how it changes a history entry before it is stored."""

NODES: dict[str, type[Exception] | None] = {
    "node_fails": NodeFails,
    "out_of_memory": OutOfMemoryError,
    "interrupted": None,
    "worker_exits": SystemExit,
}
"""Name -> what is raised in the node `on`; None interrupts the prompt. SystemExit ends the worker thread, but not HTTP."""

HISTORY = ("evicted", "forgotten", "ends_between_two_requests")
"""The history loses an entry before it is read; the server forgets everything, as after a restart; a prompt ends after
GET /history and before GET /queue."""

SOCKETS = ("websocket_cut", "websocket_noise", "websocket_silent")
"""The websocket is closed after its first message; sends nonsense; sends nothing about prompts."""

KINDS = {*REQUESTS, *ENTRIES, *NODES, *HISTORY, *SOCKETS}
