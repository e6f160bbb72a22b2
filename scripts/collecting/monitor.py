"""What is running now: listens to ComfyUI's websocket, and shows progress in the terminal.

The websocket serves the display and as a sign that the server is working. Nothing is decided by it: collecting works
without one, and whatever is sent over it.
"""

import contextlib
import math
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import websocket
from tqdm import tqdm

from collecting.graph import literal_seeds, node_label
from collecting.harvest import JobResult
from collecting.http import Address, parse_json, shown
from collecting.jobs import Plan
from common.progress import LINE_INTERVAL_S

SILENCE_TIMEOUT_S = 30.0
"""A socket without a complete message for this long is opened again: a proxy may have cut it, or another client took over its
id. Opening it must not take longer either."""
MAX_MESSAGE_BYTES = 16 * 2**20
"""Of all frames from one message to the next, pings included."""
MAX_NODES = 10_000
"""Of one prompt that are remembered."""
MIN_RECONNECT_DELAY_S, MAX_RECONNECT_DELAY_S = 1.0, 60.0


@dataclass(frozen=True)
class ExecutionStatus:
    """The prompt that is running."""

    prompt_id: str
    node: str | None = None
    """The node that is running; None before the first."""
    step: int = 0
    steps: int = 0
    """Of the node; at most 1 for nodes without steps."""
    nodes_done: frozenset[str] = frozenset()
    images: frozenset[tuple[str, int]] = frozenset()
    """(node, number of images) of the nodes that have saved."""


class _Connection(websocket.WebSocket):
    """A websocket with limits for the size of a message and for the time until it is complete."""

    _received_bytes = 0
    _deadline_s = math.inf

    def start_message(self) -> None:
        """The limits apply to what is received from now on."""
        self._received_bytes, self._deadline_s = 0, time.monotonic() + SILENCE_TIMEOUT_S

    @contextlib.contextmanager
    def limit(self) -> Iterator[None]:
        """Cut the connection if the block, which opens it, takes longer than SILENCE_TIMEOUT_S."""

        def cut() -> None:
            with contextlib.suppress(OSError, AttributeError):  # closed meanwhile, or not connected yet
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

        timer = threading.Timer(SILENCE_TIMEOUT_S, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _recv(self, bufsize: int) -> bytes:
        """Part of the library's interface between frames and socket: everything after the handshake is read here."""
        if time.monotonic() > self._deadline_s:
            raise websocket.WebSocketTimeoutException("the message is not complete in time")
        content = super()._recv(bufsize)
        self._received_bytes += len(content)
        if self._received_bytes > MAX_MESSAGE_BYTES:
            raise websocket.WebSocketPayloadException("the message is too large")
        return content


class WebsocketMonitor:
    """Follows one server over its websocket. `status` is None while no prompt of this run is running, or nothing is known."""

    def __init__(self, address: Address, client_id: str, stopping: threading.Event):
        self.status: ExecutionStatus | None = None
        self.last_activity_s = 0.0
        """When the server was last seen working (time.monotonic())."""
        self._address, self._stopping = address, stopping
        self._last_message = ""
        self._url = f"{address.websocket_url}?clientId={quote(client_id, safe='')}"

    def listen(self) -> None:
        """Listen until `stopping` is set; a connection that fails is retried with growing delays."""
        delay_s = MIN_RECONNECT_DELAY_S
        while not self._stopping.is_set():
            try:
                self._listen_once()
                delay_s = MIN_RECONNECT_DELAY_S
            except (websocket.WebSocketException, OSError, ValueError):
                self._stopping.wait(delay_s)
                delay_s = min(MAX_RECONNECT_DELAY_S, 2 * delay_s)

    def _listen_once(self) -> None:
        """One connection, until it breaks or falls silent."""
        tls = {"ca_certs": str(self._address.ca_bundle)} if self._address.ca_bundle else {}
        connection = _Connection(sslopt=tls)
        try:
            with connection.limit():
                # By default the library sends an Origin, which ComfyUI compares with the host and may refuse with 403.
                connection.connect(
                    self._url, timeout=SILENCE_TIMEOUT_S, header=self._address.headers, suppress_origin=True, redirect_limit=0
                )
            while not self._stopping.is_set():
                connection.start_message()
                self._on_message(connection.recv())
        except websocket.WebSocketTimeoutException:
            pass
        finally:
            connection.close(timeout=1)
            connection.shutdown()  # after a closing frame of the server, `close` leaves the socket open

    def _on_message(self, message: str | bytes) -> None:
        if not message:
            raise websocket.WebSocketConnectionClosedException
        if not isinstance(message, str) or message == self._last_message:
            return  # a preview image, or something that is no sign of work
        self._last_message = message
        try:
            content = parse_json(message)
        except ValueError:
            return
        if isinstance(content, dict) and isinstance(content.get("data"), dict):
            self._dispatch(shown(content.get("type")), content["data"])

    def _dispatch(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "status":  # about the queue, which may move without any work of the server
            return
        self.last_activity_s = time.monotonic()
        current = self.status
        prompt_id = shown(data.get("prompt_id") or (current.prompt_id if current else ""))
        if current is None or current.prompt_id != prompt_id:
            current = ExecutionStatus(prompt_id)
        self.status = _next_status(current, kind, data)


def _next_status(status: ExecutionStatus, kind: str, data: dict[str, Any]) -> ExecutionStatus | None:
    """Pure: the status after a message."""
    node = None if data.get("node") is None else shown(data["node"], 100)
    match kind:
        case "executing" if node is None:
            return None
        case "execution_success" | "execution_error" | "execution_interrupted":
            return None
        case "executing":
            # The node that ran until now is done.
            return replace(status, node=node, step=0, steps=0, nodes_done=_with(status.nodes_done, status.node))
        case "progress":
            step, steps = _as_count(data.get("value")), _as_count(data.get("max"))
            return replace(status, node=node or status.node, step=step, steps=steps)
        case "execution_cached" if isinstance(data.get("nodes"), list):
            cached = [shown(each, 100) for each in data["nodes"][:MAX_NODES]]
            return replace(status, nodes_done=_with(status.nodes_done, *cached))
        case "executed" if node is not None:
            output = data.get("output")
            images = output.get("images") if isinstance(output, dict) else None
            number = len(images) if isinstance(images, list) else 0
            return replace(status, nodes_done=_with(status.nodes_done, node), images=_with(status.images, (node, number)))
    return status


def _with(known: frozenset, *more: Any) -> frozenset:
    """`known` and `more` without None, as long as they are not more than any workflow can have."""
    return known | set(more) - {None} if len(known) + len(more) <= 2 * MAX_NODES else known


def _as_count(value: Any) -> int:
    """A number of steps; 0 for what cannot be one."""
    return int(value) if isinstance(value, int | float) and 0 < value < 1e9 else 0


def describe_plan(plan: Plan, jobs: int, todo: int, missing: int, unused_prompts: Path | None) -> str:
    """What a run is about to do: the lines that it begins with.

    `todo` of its `jobs` are not done, and `missing` of the images collected so far are no longer in the folder. `unused_prompts` is
    a file of prompts that the workflow has no place for, if there is one.
    """
    workflow = plan.workflow
    nodes, shown = len(workflow.graph), 12
    outputs = ", ".join(workflow.output_nodes[:shown]) + (" ..." if len(workflow.output_nodes) > shown else "")
    per_batch = f"Per-batch mode: one submission for each prompt, {jobs} in total"
    lines = [
        per_batch if workflow.per_batch else "Full-workflow mode: one submission",
        f"Collecting images from {len(workflow.output_nodes)} of {nodes} nodes: {outputs}",
    ]
    if unused_prompts:
        lines.append(f"Prompts: {unused_prompts} is not used (workflow_config.json does not set positive_prompt_node)")
    loaders = [node_label(workflow.graph, ref.node) for ref in workflow.face_inputs]
    if plan.faces:
        used, left_out = loaders[: len(plan.faces)], loaders[len(plan.faces) :]
        omitted = f"; left out for lack of an image: {', '.join(left_out)}" if left_out else ""
        lines.append(f"Face reference: used in node{'s' if len(used) > 1 else ''} {', '.join(used)}{omitted}")
    elif not workflow.face_inputs:
        lines.append("Face reference: not used (workflow_config.json does not set image_loader_node)")
    else:
        lines.append("Face reference: none (no FACE_REFERENCE, no face_reference.png); the workflow's own image is used")
    if not todo:
        deleted = f" {missing} of the collected images were deleted from the folder and are not collected again." if missing else ""
        more = " Set NEW_SEEDS=1 to collect another set." if literal_seeds(workflow.graph) else ""
        lines.append(f"All images were collected before, so nothing was sent to ComfyUI.{deleted}{more}")
    return "\n".join(lines)


class Display(contextlib.AbstractContextManager):
    """Log lines and, in a terminal, a progress bar below them. Use as a context manager; `total` is the number of jobs."""

    def __init__(self, plan: Plan, total: int):
        self._graph, self._output_nodes, self._total = plan.workflow.graph, plan.workflow.output_nodes, total
        self._jobs_done = self._collected = self._generated = 0
        self._started_s = self._last_line_s = time.monotonic()
        bar_format = "{percentage:3.0f}%|{bar}| {desc}"
        self._bar = tqdm(total=total * len(self._output_nodes), unit="image", disable=None, bar_format=bar_format)

    def __exit__(self, *_exception: object) -> None:
        self._bar.close()

    def log(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        tqdm.write(line)
        sys.stdout.flush()

    def report(self, result: JobResult) -> None:
        """Log how a job ended."""
        self._jobs_done += 1
        self._collected += result.new + result.known
        self._generated = self._collected
        known = f", {result.known} already collected" if result.known else ""
        failed = "; FAILED:" if result.failures else ""
        images = "image" if result.new == 1 else "images"
        self.log(f"{self._jobs_done}/{self._total} {result.job.label}: {result.new} new {images}{known}{failed}")
        for line in result.notes + result.failures:
            self.log(f"    {line}")

    def update(self, monitors: list[WebsocketMonitor]) -> None:
        """Show what is running: the number of images, node and step of each server, and the time left."""
        running = [status for monitor in monitors if (status := monitor.status) is not None]
        saved = sum(number for status in running for node, number in status.images if node in self._output_nodes)
        # Between the end of a prompt and its result, its images are in no status: the number must not go down.
        self._generated = max(self._generated, self._collected + saved)
        total = max(self._bar.total or 0, self._generated)
        parts = [f"{self._generated}/{total} images"]
        share = self._jobs_done
        for status in running:
            step = f" step {status.step}/{status.steps}" if status.steps > 1 else ""
            parts.append("starting" if status.node is None else f"node {node_label(self._graph, status.node)}{step}")
            # The share of this prompt that is done: finished nodes, and the steps of the running one.
            node_share = min(1.0, status.step / status.steps) if status.steps else 0.0
            share += min(1.0, (len(status.nodes_done) + node_share) / len(self._graph))
        share /= self._total
        now_s = time.monotonic()
        if 0 < share < 1:
            left_s = (now_s - self._started_s) * (1 - share) / share
            parts.append(f"{tqdm.format_interval(left_s)} left")
        if not self._bar.disable:
            self._bar.total, self._bar.n = total, self._generated
            self._bar.set_description_str(", ".join(parts))
        elif now_s >= self._last_line_s + LINE_INTERVAL_S:
            self._last_line_s = now_s
            self.log(", ".join(parts))
