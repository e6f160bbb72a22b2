"""What a server says of itself over the websocket: which node runs, which step, how much of the prompt is done.

For the display, and as a sign that the server is alive. Nothing is decided by it: with no websocket everything works.
"""

import json
import math
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import websocket

from collecting.address import Address

SILENCE_S = 30.0
"""A socket that is silent for so long is opened anew: a proxy may have cut it, or another one with our id has closed."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(frozen=True)
class Moment:
    """What runs now."""

    prompt_id: str
    node: str | None = None
    step: int = 0
    steps: int = 0
    """Of the node; 1 or less for nodes that have no steps."""
    nodes_done: frozenset[str] = frozenset()
    pictures: frozenset[tuple[str, int]] = frozenset()
    """(node, number of pictures) of the nodes that have saved."""

    def saved_by(self, nodes: tuple[str, ...]) -> int:
        return sum(number for node, number in self.pictures if node in nodes)


class Live:
    """The websocket of one server; `moment` is None while nothing of ours runs, or nothing is known."""

    def __init__(self, address: Address, client_id: str, stopping: threading.Event):
        self.address = address
        self.moment: Moment | None = None
        self.last_sign_s = 0.0
        """When the server was last seen working, by time.monotonic()."""
        self._url = f"{address.websocket_url}?clientId={quote(client_id, safe='')}"
        self._stopping = stopping

    def listen(self) -> None:
        """Until everything is stopped; a socket that cannot be had is tried again, ever less often."""
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            try:
                self._listen_once()
                pause_s = FIRST_PAUSE_S
            except (websocket.WebSocketException, OSError, ValueError, RecursionError):
                self._stopping.wait(pause_s)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    def _listen_once(self) -> None:
        """One connection, until it breaks or falls silent."""
        options = {"ca_certs": str(self.address.ca_bundle)} if self.address.ca_bundle else None
        # The library would send an Origin, which ComfyUI compares with the host, and 403.
        connection = websocket.create_connection(
            self._url, timeout=SILENCE_S, header=self.address.headers, suppress_origin=True, sslopt=options, redirect_limit=0
        )
        try:
            while not self._stopping.is_set():
                self._take_in(connection.recv())
        except websocket.WebSocketTimeoutException:
            pass
        finally:
            connection.close(timeout=1)

    def _take_in(self, message: str | bytes) -> None:
        """One message; binary ones are previews."""
        if not isinstance(message, str) or not message:
            if not message:
                raise websocket.WebSocketConnectionClosedException
            return
        content = json.loads(message)
        if isinstance(content, dict) and isinstance(content.get("data"), dict):
            self._understand(str(content.get("type")), content["data"])

    def _understand(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "status":
            return
        self.last_sign_s = time.monotonic()
        before = self.moment
        prompt_id = str(data.get("prompt_id") or (before.prompt_id if before else ""))
        if before is None or before.prompt_id != prompt_id:
            before = Moment(prompt_id)
        self.moment = _after(before, kind, data)


def _after(now: Moment, kind: str, data: dict[str, Any]) -> Moment | None:
    """Pure: what runs after a message."""
    node = None if data.get("node") is None else str(data["node"])
    match kind:
        case "executing" if node is None:
            return None
        case "execution_success" | "execution_error" | "execution_interrupted":
            return None
        case "executing":
            return _changed(now, node=node, step=0, steps=0, nodes_done=_with(now.nodes_done, now.node))
        case "progress":
            return _changed(now, node=node or now.node, step=_number(data.get("value")), steps=_number(data.get("max")))
        case "execution_cached" if isinstance(data.get("nodes"), list):
            return _changed(now, nodes_done=now.nodes_done | set(map(str, data["nodes"])))
        case "executed" if node is not None:
            output = data.get("output")
            images = output.get("images") if isinstance(output, dict) else None
            number = len(images) if isinstance(images, list) else 0
            return _changed(now, nodes_done=_with(now.nodes_done, node), pictures=now.pictures | {(node, number)})
    return now


def _changed(now: Moment, **changes: Any) -> Moment:
    return Moment(**{**vars(now), **changes})


def _with(nodes: frozenset[str], node: str | None) -> frozenset[str]:
    return nodes if node is None else nodes | {node}


def _number(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else 0
