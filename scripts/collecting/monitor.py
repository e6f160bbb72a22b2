"""What a server says of itself over the websocket: which node runs, which step, how much of the prompt is done.

For the display, and as a sign that the server is alive. Nothing is decided by it: with no websocket everything works.

What a person sees while images are collected: lines, and below them what runs now and how long it will take.
"""

import json
import math
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import websocket
from tqdm import tqdm

from collecting.graph import described
from collecting.harvest import Outcome
from collecting.http import Address
from collecting.jobs import Plan

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
    images: frozenset[tuple[str, int]] = frozenset()
    """(node, number of images) of the nodes that have saved."""

    def saved_by(self, nodes: tuple[str, ...]) -> int:
        return sum(number for node, number in self.images if node in nodes)


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
            return _changed(now, nodes_done=_with(now.nodes_done, node), images=now.images | {(node, number)})
    return now


def _changed(now: Moment, **changes: Any) -> Moment:
    return Moment(**{**vars(now), **changes})


def _with(nodes: frozenset[str], node: str | None) -> frozenset[str]:
    return nodes if node is None else nodes | {node}


def _number(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else 0


LINE_EVERY_S = 60.0
"""Where there is no terminal, what runs now is a line now and then."""


class Display:
    """Use as a context manager. `total` is the number of pieces of work."""

    def __init__(self, plan: Plan, total: int):
        self._plan, self._total = plan, total
        self._nodes = plan.workflow.kept_nodes
        self._done = self._kept = self._made = 0
        self._started_s = self._last_line_s = time.monotonic()
        self._bar = tqdm(total=total * len(self._nodes), unit="image", disable=None, bar_format="{percentage:3.0f}%|{bar}| {desc}")

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        """One line, above the bar if there is one."""
        tqdm.write(line)
        sys.stdout.flush()

    def tell(self, label: str, outcome: Outcome) -> None:
        """What came of one piece of work."""
        self._done += 1
        self._kept += outcome.new + outcome.known
        self._made = self._kept
        self.say(f"{self._done}/{self._total} {label}: {_told(outcome)}")
        for note in outcome.notes + outcome.failures:
            self.say(f"    {note}")

    def show(self, lives: list[Live]) -> None:
        """What runs now."""
        moments = [moment for live in lives if (moment := live.moment) is not None]
        # Between the end of a prompt and its outcome nobody speaks of its images.
        made = self._made = max(self._made, self._kept + sum(moment.saved_by(self._nodes) for moment in moments))
        share = (self._done + sum(map(self._share, moments))) / self._total
        words = [f"{made}/{max(self._bar.total or 0, made)} images", *map(self._running, moments)]
        words += [self._time_left(share)] if 0 < share < 1 else []
        now_s = time.monotonic()
        if not self._bar.disable:
            self._bar.total = max(self._bar.total, made)
            self._bar.n = made
            self._bar.set_description_str(", ".join(words))
        elif moments and now_s >= self._last_line_s + LINE_EVERY_S:
            self._last_line_s = now_s
            self.say(", ".join(words))

    def _share(self, moment: Moment) -> float:
        """How much of its prompt is done, by nodes and by the steps of the running one."""
        step = min(1.0, moment.step / moment.steps) if moment.steps else 0.0
        return min(1.0, (len(moment.nodes_done) + step) / len(self._plan.workflow.graph))

    def _running(self, moment: Moment) -> str:
        where = "starting" if moment.node is None else f"node {described(self._plan.workflow.graph, moment.node)}"
        return where + (f" step {moment.step}/{moment.steps}" if moment.steps > 1 else "")

    def _time_left(self, share: float) -> str:
        left_s = (time.monotonic() - self._started_s) * (1 - share) / share
        return f"{tqdm.format_interval(left_s)} left"


def _told(outcome: Outcome) -> str:
    known = f", {outcome.known} there already" if outcome.known else ""
    return f"{outcome.new} new {'image' if outcome.new == 1 else 'images'}{known}" + ("; FAILED:" if outcome.failures else "")
