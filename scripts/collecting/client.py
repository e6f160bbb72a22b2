"""The routes of one ComfyUI server that LoRACat uses. Every failure is a ComfyUIError of one clear line.

ComfyUIError
|-- Unanswered      a submission was sent and no answer came: it may run or not
|-- PromptRefused   the server will not run this workflow
`-- ImageGone     /view does not give the file that the history names
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from collecting.http import BEHIND_A_PROXY, Address, Away, CutOff, Reply, TooLarge, Transport
from common.errors import ComfyUIError

MOST_DETAILS = 300
"""Characters of a validation error that are shown: a list of choices may hold thousands of files."""


@dataclass(frozen=True)
class Queued:
    """What POST /prompt answered."""

    prompt_id: str
    dropped: list[str]
    """Why some outputs will not run, although the others do."""


@dataclass(frozen=True)
class Queue:
    """The ids of the prompts that run, and of those that wait, everybody's."""

    running: frozenset[str]
    waiting: frozenset[str]


class Unanswered(ComfyUIError):
    """POST /prompt went out and no answer came back."""


class PromptRefused(ComfyUIError):
    """POST /prompt answered 400."""


class ImageGone(ComfyUIError):
    """GET /view will not give this one file; others it may give."""


class ComfyUI:
    """One server. Use as a context manager; `client_id` goes with every submission. Not for two threads at once.

    `patience_s` are the pauses between the tries of one request, `pause` how they are waited for.
    """

    def __init__(
        self,
        address: Address,
        client_id: str,
        patience_s: Sequence[float] | None = None,
        pause: Callable[[float], Any] = time.sleep,
    ):
        self.url = address.url
        self._client_id = client_id
        self._http = Transport(address, patience_s, pause)

    def __enter__(self) -> "ComfyUI":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._http.close()

    def version(self) -> str:
        """The server's version. Tried only once: raises ComfyUIError when there is no ComfyUI at this address."""
        stats = self._http.json_of(self._http.once("GET", "/system_stats"), "/system_stats")
        system = stats.get("system")
        if not isinstance(system, dict):
            raise self._http.error("is no ComfyUI: /system_stats says nothing about a system")
        return str(system.get("comfyui_version", "of unknown version"))

    def object_info(self) -> dict[str, Any]:
        """What the server knows about each of its node classes."""
        return self._get_json("/object_info")

    def upload(self, name: str, content: bytes) -> str:
        """Upload an image; returns the name under which a LoadImage node finds it, which may be another one."""
        files = {"image": (name, content, "application/octet-stream")}
        reply = self._http.repeated("POST", "/upload/image", files=files, data={"type": "input"})
        stored = self._http.json_of(reply, "/upload/image")
        name, subfolder = stored.get("name"), stored.get("subfolder", "")
        if not isinstance(name, str) or not isinstance(subfolder, str) or not name:
            raise self._http.error(f"did not say under which name it keeps the face, but {stored}")
        return f"{subfolder}/{name}" if subfolder else name

    def submit(self, graph: dict[str, Any], prompt_id: str) -> Queued:
        """Queue a workflow under our own id.

        Raises PromptRefused when it will not run, Unanswered when it is not known whether it will.
        """
        body = {"prompt": graph, "client_id": self._client_id, "prompt_id": prompt_id}
        try:
            reply = self._http.once("POST", "/prompt", json=body)
        except Away as error:
            raise Unanswered(str(error)) from None
        if reply.status in BEHIND_A_PROXY:
            raise Unanswered(str(self._http.refused(reply, "/prompt")))
        if reply.status == 400:
            raise PromptRefused("\n".join([f"ComfyUI at {self.url} refuses the workflow:", *_reasons(reply)]))
        if reply.status >= 500:
            raise ComfyUIError(str(self._http.refused(reply, "/prompt")))
        queued = self._http.json_of(reply, "/prompt")
        return Queued(str(queued.get("prompt_id", prompt_id)), complaints_of(queued.get("node_errors")))

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The history entry of a prompt that has ended; None while it waits or runs, and when it is not known."""
        entry = self._get_json(f"/history/{quote(prompt_id, safe='')}").get(prompt_id)
        return entry if isinstance(entry, dict) else None

    def queue(self) -> Queue:
        """Who runs and who waits. Its answer holds every workflow in the queue whole, so ask it seldom."""
        queue = self._get_json("/queue")
        return Queue(_ids(queue.get("queue_running")), _ids(queue.get("queue_pending")))

    def knows(self, prompt_id: str) -> bool:
        """Whether a prompt waits, runs or has ended here."""
        return (
            self.history(prompt_id) is not None
            or prompt_id in (queue := self.queue()).running | queue.waiting
            # It may have ended between the two looks.
            or self.history(prompt_id) is not None
        )

    def withdraw(self, prompt_ids: list[str]) -> None:
        """Take prompts out of the queue; one that runs already is left alone."""
        self._did(self._http.once("POST", "/queue", json={"delete": prompt_ids}), "/queue")

    def free(self) -> None:
        """Let the server give its models' memory back."""
        self._did(self._http.once("POST", "/free", json={"unload_models": True, "free_memory": True}), "/free")

    def view(self, filename: str, subfolder: str, kind: str) -> bytes:
        """The bytes of a file that the history names. Raises ImageGone when it cannot be had."""
        query = {"filename": filename, "subfolder": subfolder, "type": kind}
        try:
            reply = self._http.repeated("GET", "/view", params=query)
        except (CutOff, TooLarge) as error:
            raise ImageGone(f"{filename!r}: {error}") from None
        if reply.status == 404:
            raise ImageGone(f"ComfyUI at {self.url} no longer has the file {filename!r}")
        if 400 <= reply.status < 500:
            raise ImageGone(f"{filename!r}: {self._http.refused(reply, '/view')}")
        if reply.status != 200:
            raise self._http.refused(reply, "/view")
        return reply.body

    def _get_json(self, path: str) -> dict[str, Any]:
        return self._http.json_of(self._http.repeated("GET", path), path)

    def _did(self, reply: Reply, path: str) -> None:
        """These routes answer 200 with nothing."""
        if reply.status != 200:
            raise self._http.refused(reply, path)


def _ids(items: Any) -> frozenset[str]:
    """The ids in one part of /queue, whose items are lists of five or more."""
    listed = items if isinstance(items, list) else []
    return frozenset(str(item[1]) for item in listed if isinstance(item, list) and len(item) > 1)


def complaints_of(node_errors: Any) -> list[str]:
    """The `node_errors` of an answer, one line per problem: node, class, input, what the server wanted."""
    lines = []
    for node_id, node in node_errors.items() if isinstance(node_errors, dict) else ():
        node = node if isinstance(node, dict) else {}
        errors = node.get("errors") if isinstance(node.get("errors"), list) else []
        named = f"node {node_id} ({node.get('class_type')})"
        lines += [f"{named}: {_complaint(error)}" for error in errors] or [f"{named}: the server does not say what is wrong"]
    return lines


def _complaint(error: Any) -> str:
    """One validation error; where the details are empty, the input is named by what comes with it."""
    if not isinstance(error, dict):
        return str(error)
    extra = error.get("extra_info") if isinstance(error.get("extra_info"), dict) else {}
    details = str(error.get("details") or extra.get("input_name") or "")
    details = details if len(details) <= MOST_DETAILS else f"{details[:MOST_DETAILS]} ..."
    return f"{error.get('message')}: {details}" if details else str(error.get("message"))


def _reasons(reply: Reply) -> list[str]:
    """Why POST /prompt answered 400; the reason is in node_errors, or else in the error itself."""
    try:
        content = json.loads(reply.body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        return [f"  - it does not say why: {reply.body[:200].decode(errors='replace')!r}"]
    lines = complaints_of(content.get("node_errors"))
    if not lines:
        error = content.get("error") or {}
        lines = [
            " ".join(str(error[key]) for key in ("message", "details") if error.get(key)) if isinstance(error, dict) else str(error)
        ]
    return [f"  - {line}" for line in lines]
