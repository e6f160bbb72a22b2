"""The stand-in server: its folder, its worker and its routes, with the exact shapes of ComfyUI's answers."""

import contextlib
import json
import mimetypes
import os
import re
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from demo.standin_comfyui import faults
from demo.standin_comfyui.catalogue import CHECKPOINTS, NODES, REPLACEMENTS, VERSIONS, node_class, object_info
from demo.standin_comfyui.faults import Fault
from demo.standin_comfyui.validation import Rejected, apply_replacements, validate
from demo.standin_comfyui.websockets import Websocket, WebsocketClients
from demo.standin_comfyui.wire import MOST_BODY_BYTES, HttpServer, Request, Response, is_foreign_page, json_response, multipart
from demo.standin_comfyui.worker import Interrupted, Worker, in_some_order

_KINDS = ("input", "output", "temp")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_GET_ONLY = ("/system_stats", "/features", "/view", "/object_info")
_POST_ONLY = ("/interrupt", "/free")
_SENSITIVE = ("auth_token_comfy_org", "api_key_comfy_org")
"""Keys of `extra_data` that are in no answer."""
_SERVER_FAILED = Response(
    500, b"500 Internal Server Error\n\nServer got itself in trouble", "text/plain; charset=utf-8", {"Connection": "close"}
)


class StandIn:
    """One server with the files in `folder`. Use as a context manager, or call `start` and `stop`.

    `folder` gets input/, output/, temp/ and models/. Loaders offer the files in models/, whatever is in them; checkpoints/
    contains two from the beginning. The server listens on `host` only. `seconds_per_job` is how long a prompt takes unless
    all of it is cached. `version` is the version of ComfyUI whose answers are given. `requests` lists the requests in order.
    `fault` simulates a fault by its name in `faults`; for any other answer a test replaces `answer`.
    `required_headers` and `base_path` simulate a proxy; `certificate` is a PEM file with certificate and key for https.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seconds_per_job: float = 0.0,
        host: str = "127.0.0.1",
        port: int = 0,
        certificate: Path | None = None,
        version: str = VERSIONS[0],
        max_upload_bytes: int = MOST_BODY_BYTES,
    ):
        self.version = version
        self.max_upload_bytes = max_upload_bytes
        """The largest body of a request, as `/features` names it."""
        self.folder = folder.resolve()
        for kind in _KINDS:
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
        for left in (self.folder / "temp").iterdir():
            left.unlink()
        for name in CHECKPOINTS:
            checkpoint = self.folder / "models" / "checkpoints" / name
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.touch()
        self.seconds_per_job = seconds_per_job
        self.required_headers: dict[str, str] = {}
        self.base_path = ""
        self.request_headers: list[dict[str, str]] = []
        """The headers of every request, in order."""
        self.faults: list[Fault] = []
        self.websockets = WebsocketClients()
        self.worker = self._new_worker()
        self.requests: list[tuple[str, str]] = []
        self.submitted: list[dict] = []
        """The body of every accepted POST /prompt."""
        self._numbers = 0
        self._numbers_lock = threading.Lock()
        self._host, self._port, self._certificate = host, port, certificate

    @property
    def url(self) -> str:
        return f"http{'s' if self._certificate else ''}://{self._host}:{self._port}"

    def start(self) -> "StandIn":
        self._http = HttpServer(
            self._host, self._port, self._record_and_answer, self._listen, self._certificate, self.max_upload_bytes
        )
        self._port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), name="standin-http", daemon=True)
        self.worker.start()
        self._thread.start()
        return self

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._http.drop_connections()
        self.worker.stop()

    def restart(self) -> None:
        """Start again at the same address after `stop`: queue, history, cache and numbers are lost, input/ and output/ stay."""
        self._numbers = 0
        self.worker = self._new_worker()
        self.start()

    def fault(self, name: str, on: str | None = None, times: int | None = None, after: int = 0) -> None:
        """Simulate a fault; `faults` describes the names and the arguments."""
        if name not in faults.KINDS:
            raise KeyError(f"no such fault: {name}")
        self.faults.append(Fault(name, on, times, after))

    @property
    def _is_old(self) -> bool:
        return self.version == VERSIONS[1]

    def _new_worker(self) -> Worker:
        return Worker(self.folder, self.seconds_per_job, self.websockets.notify, self._at_node, self._at_end)

    def __enter__(self) -> "StandIn":
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _record_and_answer(self, request: Request) -> Response:
        self.request_headers.append(dict(request.headers))
        if any(request.headers.get(name) != value for name, value in self.required_headers.items()):
            return Response(401, b"<html>401 Authorization Required</html>", "text/html")
        if not request.path.startswith(f"{self.base_path}/"):
            return Response(302, b"", None, {"Location": "/login"})
        request = replace(request, path=request.path.removeprefix(self.base_path))
        self.requests.append((request.method, request.path))
        for fault in self.faults:
            method, path, answer = faults.REQUESTS.get(fault.name, ("none", "", None))
            if method in ("", request.method) and request.path.startswith(fault.on or path) and fault.happens():
                return answer(request, self.answer)
        return self.answer(request)

    def _at_node(self, node_id: str) -> None:
        for fault in self.faults:
            if fault.name in faults.NODES and fault.on in (None, node_id) and fault.happens():
                raise (faults.NODES[fault.name] or Interrupted)("this node fails on purpose")

    def _at_end(self, entry: dict) -> None:
        for fault in self.faults:
            if fault.name in faults.ENTRIES and fault.happens():
                faults.ENTRIES[fault.name](entry)

    def _has_fault(self, name: str) -> bool:
        return any(fault.name == name and fault.happens() for fault in self.faults)

    def _listen(self, request: Request, opened: Websocket) -> None:
        """One websocket, until it is closed."""
        client_id = request.query.get("clientId") or uuid.uuid4().hex
        self.websockets.add(client_id, opened, self._remaining(), self.worker.node)
        if self._has_fault("websocket_cut"):
            opened.cut()
        if self._has_fault("websocket_noise"):
            for noise in (b"\x00\x00\x00\x01\xff\xd8", b"\xff\xd8"):
                opened.send_raw(noise, binary=True)
            for noise in (b"{", b"[1]", b'{"type": 5, "data": null}', b'{"type": "progress", "data": {"value": "x", "max": []}}'):
                opened.send_raw(noise, binary=False)
        if self._has_fault("websocket_silent"):
            self.websockets.remove(client_id)
        opened.read_until_closed()
        self.websockets.remove(client_id)

    def answer(self, request: Request) -> Response:
        """The answer to one request; what ComfyUI crashes on is a 500 here too."""
        if is_foreign_page(request.headers):
            return Response(403)
        try:
            return self._route(request)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OSError):
            return _SERVER_FAILED

    def _route(self, request: Request) -> Response:
        first = "/" + request.path.split("/")[1]
        if (request.method == "POST" and first in _GET_ONLY) or (request.method == "GET" and first in _POST_ONLY):
            allowed = "GET,HEAD" if first in _GET_ONLY else "POST"
            return Response(405, b"405: Method Not Allowed", "text/plain; charset=utf-8", {"Allow": allowed})
        routes = {
            ("GET", "/system_stats"): lambda: json_response(_system_stats(self.version)),
            ("GET", "/features"): lambda: json_response(self._features()),
            ("GET", "/object_info"): lambda: self._object_info(None),
            ("GET", "/prompt"): lambda: json_response({"exec_info": {"queue_remaining": self._remaining()}}),
            ("GET", "/queue"): self._queue,
            ("GET", "/ws"): lambda: Response(101 if "Sec-WebSocket-Key" in request.headers else 400),
            ("GET", "/history"): lambda: self._history(request.query),
            ("GET", "/view"): lambda: self._view(request.query),
            ("POST", "/prompt"): lambda: self._prompt(request.json()),
            ("POST", "/upload/image"): lambda: self._upload(request),
            ("POST", "/queue"): lambda: self._edit_queue(request.json()),
            ("POST", "/history"): lambda: self._edit_history(request.json()),
            ("POST", "/interrupt"): lambda: self._interrupt(request.body),
            ("POST", "/free"): lambda: self._free(request.json()),
        }
        if (request.method, request.path) in routes:
            return routes[request.method, request.path]()
        if request.path == "/node_replacements" and request.method == "GET" and not self._is_old:
            return json_response(REPLACEMENTS)
        if (cancelled := re.fullmatch("/jobs/([^/]+)/cancel", request.path)) and request.method == "POST" and not self._is_old:
            return self._cancel(cancelled[1])
        last = unquote(request.path.rpartition("/")[2])
        if request.method == "GET" and re.fullmatch("/history/[^/]+", request.path):
            return self._history_of(last)
        if request.method == "GET" and re.fullmatch("/object_info/[^/]+", request.path):
            return self._object_info(last)
        return Response(404)

    def _object_info(self, name: str | None) -> Response:
        names = [each for each in (NODES if name is None else [name]) if node_class(each, self.version)]
        return json_response({each: object_info(each, self.folder, self.version) for each in names})

    def _features(self) -> dict[str, Any]:
        old = {"supports_preview_metadata": True, "max_upload_size": self.max_upload_bytes}
        new = {"supports_model_type_tags": True, "extension": {"manager": {"supports_v4": True}}, "node_replacements": True}
        return old if self._is_old else {**old, **new, "assets": False}

    def _remaining(self) -> int:
        queue = self.worker.queue()
        return len(queue["queue_running"]) + len(queue["queue_pending"])

    def _history(self, query: dict[str, str]) -> Response:
        entries = list(self.worker.history.items())
        most = int(query["max_items"]) if "max_items" in query else None
        start = int(query.get("offset", -1))
        if start < 0:
            start = 0 if most is None else max(0, len(entries) - most)
        return json_response(dict(entries[start:] if most is None else entries[start : start + max(0, most)]))

    def _history_of(self, prompt_id: str) -> Response:
        if prompt_id in self.worker.history and self._has_fault("evicted"):
            del self.worker.history[prompt_id]
        if self._has_fault("forgotten"):
            self.worker.stop()
            self.worker = self._new_worker()
            self.worker.start()
        return json_response({prompt_id: self.worker.history[prompt_id]} if prompt_id in self.worker.history else {})

    def _queue(self) -> Response:
        if self._has_fault("ends_between_two_requests"):
            while self._remaining():
                time.sleep(0.005)
        return json_response(self.worker.queue())

    def _edit_history(self, body: dict) -> Response:
        if body.get("clear"):
            self.worker.history.clear()
        for prompt_id in body.get("delete", ()):
            self.worker.history.pop(prompt_id, None)
        return Response()

    def _edit_queue(self, body: dict) -> Response:
        if body.get("clear"):
            self.worker.delete_pending(None)
        if "delete" in body:
            self.worker.delete_pending(body["delete"])
        return Response()

    def _interrupt(self, body: bytes) -> Response:
        self.worker.interrupt(json.loads(body).get("prompt_id") if body else None)
        return Response()

    def _cancel(self, prompt_id: str) -> Response:
        """How the web page of 0.33.0 removes a prompt: one that waits is forgotten, one that runs is interrupted."""
        queue = self.worker.queue()
        found = any(item[1] == prompt_id for part in queue.values() for item in part)
        self.worker.delete_pending([prompt_id])
        self.worker.interrupt(prompt_id)
        return json_response({"cancelled": found})

    def _free(self, body: dict) -> Response:
        if body.get("free_memory"):
            self.worker.drop_cache()
        return Response()

    def _prompt(self, body: Any) -> Response:
        # A list or a string contains no prompt; on null ComfyUI fails.
        body = body if isinstance(body, dict) else dict.fromkeys(body)
        number = self._number(body)
        if "prompt" not in body:
            error = {"type": "no_prompt", "message": "No prompt provided", "details": "No prompt provided", "extra_info": {}}
            return json_response({"error": error, "node_errors": {}}, 400)
        prompt = body["prompt"]
        submitted = json.loads(json.dumps(body))
        try:
            prompt_id = str(body.get("prompt_id", uuid.uuid4())) if self._is_old else _checked_id(body.get("prompt_id"))
            if not self._is_old:
                apply_replacements(prompt)
            outputs, node_errors = validate(prompt, self.folder, self.version, body.get("partial_execution_targets"))
        except Rejected as rejected:
            return json_response({"error": rejected.error, "node_errors": rejected.node_errors}, 400)
        extra_data = body.get("extra_data", {})
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        extra_data = {key: value for key, value in extra_data.items() if key not in _SENSITIVE}
        if not self._is_old:
            extra_data["create_time"] = int(time.time() * 1000)
        self.submitted.append(submitted)
        self.worker.put(number, prompt_id, prompt, extra_data, in_some_order(outputs, prompt_id))
        return json_response({"prompt_id": prompt_id, "number": number, "node_errors": node_errors})

    def _number(self, body: dict[str, Any]) -> float:
        """Counts every POST, refused ones too."""
        if "number" in body:
            return float(body["number"])
        with self._numbers_lock:
            number = self._numbers
            self._numbers += 1
        return -number if body.get("front") else number

    def _upload(self, request: Request) -> Response:
        parts = multipart(request)
        if "image" not in parts:
            return Response(400)
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
            return Response(400)
        Path(os.path.abspath(base / subfolder)).mkdir(parents=True, exist_ok=True)
        if fields.get("overwrite") not in ("true", "1"):
            target, filename = _free_name(target, filename, content)
        target.write_bytes(content)
        return json_response({"name": filename, "subfolder": subfolder, "type": kind})

    def _view(self, query: dict[str, str]) -> Response:
        if "filename" not in query:
            return Response(404)
        filename, kind = query["filename"], query.get("type", "output")
        annotated = re.fullmatch(r"(.*) \[(input|output|temp)\]", filename)
        if annotated:
            filename, kind = annotated[1], annotated[2]
        if not filename or filename.startswith("/") or ".." in filename or kind not in _KINDS:
            return Response(400)
        base = self.folder / kind
        folder = Path(os.path.abspath(os.path.join(base, query.get("subfolder", ""))))
        if not folder.is_relative_to(base):
            return Response(403)
        path = folder / os.path.basename(filename)
        if not path.is_file():
            return Response(404)
        content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return Response(200, path.read_bytes(), content_type, {"Content-Disposition": f'filename="{path.name}"'})


def _checked_id(prompt_id: Any) -> str:
    """The id of a prompt in 0.33.0; raises Rejected unless it is a UUID as Python writes it."""
    if prompt_id is None:
        return str(uuid.uuid4())
    with contextlib.suppress(ValueError, AttributeError):
        if str(uuid.UUID(prompt_id)) == prompt_id:
            return prompt_id
    details = "prompt_id must be a UUID string in canonical lowercase hyphenated form; omit it to let the server generate one"
    raise Rejected("invalid_prompt_id", "prompt_id must be a valid UUID", details)


def _system_stats(version: str) -> dict[str, Any]:
    new = {} if version == VERSIONS[1] else {"comfy_package_versions": [], "deploy_environment": "local-git"}
    memory = {"vram_total": 2**34, "vram_free": 2**33, "torch_vram_total": 2**34, "torch_vram_free": 2**33}
    return {
        "system": {
            **new,
            "os": "linux" if new else "posix",
            "ram_total": 2**34,
            "ram_free": 2**33,
            "comfyui_version": version,
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
    """`name`, or `name (1)`, `name (2)` ... when the file exists with other bytes; equal bytes keep their name."""
    stem, suffix = os.path.splitext(filename)
    number = 0
    while target.exists() and target.read_bytes() != content:
        number += 1
        filename = f"{stem} ({number}){suffix}"
        target = target.with_name(os.path.basename(filename))
    return target, filename
