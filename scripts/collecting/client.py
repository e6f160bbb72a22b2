"""The routes of a ComfyUI server that LoRACat uses. Every failure is a ComfyUIError.

ComfyUIError
|-- SubmissionUnconfirmed   a prompt was sent but no answer came: it may be queued or not
|-- PromptRejected          the server refused a prompt: it is not queued
`-- ImageGone               /view does not return a file that the history names
    `-- FileMissing         because it was deleted
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from collecting.http import (
    RETRY_STATUSES,
    Address,
    ResponseTooLarge,
    ServerUnavailable,
    Transport,
    TruncatedResponse,
    parse_json,
    shown,
)
from common.errors import ComfyUIError

MAX_NAME_LENGTH = 1000
"""Of an id or a file name that the server chooses."""
UPLOAD_OVERHEAD_BYTES = 1024
"""Of the request body around an uploaded file."""
MAX_REASONS = 20
"""Number of validation errors that are listed."""


@dataclass(frozen=True)
class Queued:
    """The answer to POST /prompt."""

    prompt_id: str
    dropped: list[str]
    """Why some outputs will not run, although the others do."""


@dataclass(frozen=True)
class Queue:
    """Ids of the prompts on the server, those of other clients included."""

    running: frozenset[str]
    waiting: frozenset[str]


class SubmissionUnconfirmed(ComfyUIError):
    """POST /prompt was sent and no answer was received."""


class PromptRejected(ComfyUIError):
    """POST /prompt was answered with an error of the request (status 3xx or 4xx): nothing was queued."""


class ImageGone(ComfyUIError):
    """GET /view does not return this file; it may return others."""


class FileMissing(ImageGone):
    """GET /view answered 404."""


class ComfyUI(contextlib.AbstractContextManager):
    """A client of one server, for one thread. Use as a context manager; `client_id` is sent with every prompt.

    `api_key`, a key of the Comfy platform, is sent with every prompt, too: partner nodes need it. `retry_delays_s` are the
    delays between the attempts of one request, `sleep` waits for them.
    """

    def __init__(
        self,
        address: Address,
        client_id: str,
        retry_delays_s: Sequence[float] | None = None,
        sleep: Callable[[float], Any] = time.sleep,
        api_key: str = "",
    ):
        self.url = address.url
        self._client_id, self._api_key = client_id, api_key
        self._http = Transport(address, retry_delays_s, sleep)

    def __exit__(self, *_exception: object) -> None:
        self._http.session.close()

    def version(self) -> str:
        """The server's version, in one attempt. Raises ComfyUIError when there is no ComfyUI at this address."""
        stats = self._http.parse_json(self._http.request("GET", "/system_stats"), "/system_stats")
        system = stats.get("system")
        if not isinstance(system, dict):
            raise self._http.error("does not answer like ComfyUI: /system_stats has no entry 'system'")
        return shown(system.get("comfyui_version", "(unknown version)"), 40)

    def object_info(self) -> dict[str, Any]:
        """The description of every node class that the server has: {class: {"input": ..., "output": ...}}."""
        return self._get_json("/object_info")

    def check_upload_size(self, content: bytes) -> None:
        """Raises ComfyUIError if an image is larger than what the server says that it accepts. Old servers do not say it."""
        try:
            limit = self._http.parse_json(self._http.request("GET", "/features"), "/features").get("max_upload_size")
        except ComfyUIError:
            return
        size = len(content) + UPLOAD_OVERHEAD_BYTES
        if type(limit) in (int, float) and 0 < limit < size:
            limit_mib, needed_mib = limit / 2**20, math.ceil(size / 2**20)
            raise self._http.error(
                f"does not accept the face reference: it has {size / 2**20:.1f} MiB, and at most {limit_mib:.1f} MiB can be"
                f" uploaded; use a smaller image as FACE_REFERENCE, or start ComfyUI with --max-upload-size {needed_mib}"
            )

    def node_replacements(self) -> dict[str, Any]:
        """By which class ComfyUI replaces one that it no longer has; {} for versions that replace none."""
        reply = self._http.request("GET", "/node_replacements")
        return self._http.parse_json(reply, "/node_replacements") if reply.status == 200 else {}

    def upload(self, name: str, content: bytes) -> str:
        """Upload an image. Returns the name by which a LoadImage node finds it, which may differ from `name`."""
        self.check_upload_size(content)
        files = {"image": (name, content, "application/octet-stream")}
        reply = self._http.request_with_retry("POST", "/upload/image", files=files, data={"type": "input"})
        stored = self._http.parse_json(reply, "/upload/image")
        name, subfolder = stored.get("name"), stored.get("subfolder") or ""
        if not _is_name(name) or not (subfolder == "" or _is_name(subfolder)):
            raise self._http.error(f"did not return the name of the uploaded face reference, but {shown(stored)}")
        return f"{subfolder}/{name}" if subfolder else name

    def submit(self, graph: dict[str, Any], prompt_id: str, targets: Sequence[str] | None = None) -> Queued:
        """Queue a workflow under `prompt_id`; of its output nodes only `targets` run, if the server supports it.

        The workflow is embedded in the images by ComfyUI itself, as the chunk `prompt`. It is never sent as the `workflow` of
        `extra_pnginfo`, which is in the format of the web page.

        Raises PromptRejected when it will not run, SubmissionUnconfirmed when it is unknown whether it will.
        """
        body: dict[str, Any] = {"prompt": graph, "client_id": self._client_id, "prompt_id": prompt_id}
        if targets is not None:
            body["partial_execution_targets"] = list(targets)
        if self._api_key:
            body["extra_data"] = {"api_key_comfy_org": self._api_key}
        try:
            # Never repeated blindly: the prompt could be queued twice.
            reply = self._http.request("POST", "/prompt", json=body)
        except ServerUnavailable as error:
            raise SubmissionUnconfirmed(str(error)) from None
        if reply.status in RETRY_STATUSES:
            raise SubmissionUnconfirmed(str(self._http.status_error(reply, "/prompt")))
        if reply.status == 400:
            reasons = _rejection_reasons(reply.body)
            raise PromptRejected("\n".join([f"ComfyUI at {self.url} rejected the workflow:", *reasons]))
        if 300 <= reply.status < 500:
            raise PromptRejected(str(self._http.status_error(reply, "/prompt")))
        if reply.status >= 500:
            raise ComfyUIError(str(self._http.status_error(reply, "/prompt")))
        queued = self._http.parse_json(reply, "/prompt")
        own_id = queued.get("prompt_id")
        return Queued(own_id if _is_name(own_id) else prompt_id, describe_node_errors(queued.get("node_errors")))

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The history entry of a prompt that has ended; None while it waits or runs, or when it is unknown."""
        entry = self._get_json(f"/history/{quote(prompt_id, safe='')}").get(prompt_id)
        return entry if isinstance(entry, dict) else None

    def queue(self) -> Queue:
        """The prompts that run and wait. The answer contains every queued workflow, so it may be large."""
        queue = self._get_json("/queue")
        ids = []
        for part in (queue.get("queue_running"), queue.get("queue_pending")):
            items = part if isinstance(part, list) else []
            queued = (item[1] for item in items if isinstance(item, list) and len(item) > 1)
            ids.append(frozenset(each for each in queued if isinstance(each, str)))
        return Queue(*ids)

    def knows(self, prompt_id: str) -> bool:
        """Whether a prompt waits, runs or has ended on this server."""
        if self.history(prompt_id) is not None:
            return True
        queue = self.queue()
        # The prompt may have ended between the two requests.
        return prompt_id in queue.running | queue.waiting or self.history(prompt_id) is not None

    def dequeue(self, prompt_ids: list[str]) -> None:
        """Remove prompts from the queue; one that is running is not interrupted."""
        self._post("/queue", {"delete": prompt_ids})

    def free_memory(self) -> None:
        """Ask the server to unload its models."""
        self._post("/free", {"unload_models": True, "free_memory": True})

    def view(self, filename: str, subfolder: str, kind: str) -> bytes:
        """The bytes of a file that the history names. Raises ImageGone when the server does not return it."""
        query, name = {"filename": filename, "subfolder": subfolder, "type": kind}, shown(filename, 100)
        try:
            reply = self._http.request_with_retry("GET", "/view", params=query)
        except (TruncatedResponse, ResponseTooLarge) as error:
            raise ImageGone(f"'{name}': {error}") from None
        if reply.status == 404:
            raise FileMissing(f"ComfyUI at {self.url} no longer has the file '{name}'")
        if 400 <= reply.status < 500:
            raise ImageGone(f"'{name}': {self._http.status_error(reply, '/view')}")
        if reply.status != 200:
            raise self._http.status_error(reply, "/view")
        return reply.body

    def _get_json(self, path: str) -> dict[str, Any]:
        reply = self._http.request_with_retry("GET", path)
        return self._http.parse_json(reply, path)

    def _post(self, path: str, content: dict[str, Any]) -> None:
        """A request, sent once, that is answered with status 200 and an empty body."""
        reply = self._http.request("POST", path, json=content)
        if reply.status != 200:
            raise self._http.status_error(reply, path)


def _is_name(value: Any) -> bool:
    """Whether `value` can be an id or a file name of the server."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_LENGTH and value.isprintable()


def describe_node_errors(node_errors: Any) -> list[str]:
    """The `node_errors` of an answer, one line for each problem: node, class, message, input."""
    lines = []
    for node_id, node in node_errors.items() if isinstance(node_errors, dict) else ():
        node = node if isinstance(node, dict) else {}
        errors = node.get("errors") if isinstance(node.get("errors"), list) else []
        label = f"node {shown(node_id, 100)} ({shown(node.get('class_type'), 100)})"
        lines += [f"{label}: {_describe_error(error)}" for error in errors] or [f"{label}: ComfyUI gives no reason"]
    return lines if len(lines) <= MAX_REASONS else [*lines[:MAX_REASONS], f"and {len(lines) - MAX_REASONS} more problems"]


def _describe_error(error: Any) -> str:
    """One validation error; where its details are empty, the input's name takes their place."""
    if not isinstance(error, dict):
        return shown(error)
    extra = error.get("extra_info") if isinstance(error.get("extra_info"), dict) else {}
    # Details may list thousands of files as choices.
    details = shown(error.get("details") or extra.get("input_name") or "")
    message = shown(error.get("message"))
    return f"{message}: {details}" if details else message


def _rejection_reasons(body: bytes) -> list[str]:
    """Why POST /prompt answered 400; the reason is in `node_errors`, or else in `error`."""
    try:
        content = parse_json(body)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return [f"  - ComfyUI gives no reason, but answers '{shown(body[:200].decode(errors='replace'))}'"]
    lines = describe_node_errors(content.get("node_errors"))
    if not lines:
        error = content.get("error") or {}
        parts = [error[key] for key in ("message", "details") if error.get(key)] if isinstance(error, dict) else [error]
        lines = [" ".join(map(shown, parts))]
    return [f"  - {line}" for line in lines]
