"""The queue, the history and the one worker thread that takes prompts from one to the other."""

import copy
import hashlib
import heapq
import json
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from demo.standin_comfyui import faults
from demo.standin_comfyui.catalogue import NODES, inputs_of
from demo.standin_comfyui.nodes import Context, file_hash, input_file

MOST_HISTORY_ENTRIES = 10_000


class Interrupted(Exception):
    """POST /interrupt stopped the running prompt."""


class Worker:
    """Runs queued prompts, the smallest number first. All state is in memory, as ComfyUI's is.

    `notify` (client id, kind, data) receives the websocket messages; `at_node` is called before a node runs, and the node
    fails with what it raises; `at_end` may change a history entry before it is stored.
    """

    def __init__(
        self,
        folder: Path,
        seconds_per_job: float,
        notify: Callable[[str | None, str, dict], None] = lambda *_: None,
        at_node: Callable[[str], None] = lambda _: None,
        at_end: Callable[[dict], None] = lambda _: None,
    ):
        self.folder = folder
        self._notify, self._at_node, self._at_end = notify, at_node, at_end
        self.seconds_per_job = seconds_per_job
        """How long a prompt takes unless all of it is cached."""
        self.history: dict[str, dict] = {}
        self.running: list | None = None
        self.executed_jobs = 0
        """How many prompts ran that were not completely cached."""
        self._pending: list[list] = []
        self._changed = threading.Condition()
        self._interrupt = threading.Event()
        self._stopping = self._dead = False
        self.node: str | None = None
        """The node that is running."""
        self._cache: dict[str, tuple[tuple, dict]] = {}
        self._thread = threading.Thread(target=self._work, name="standin-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a running prompt is interrupted."""
        with self._changed:
            self._stopping = True
            self._pending.clear()
            self._changed.notify()
        self._interrupt.set()
        self._thread.join()

    def put(self, number: float, prompt_id: str, prompt: dict, extra_data: dict, outputs: list[str]) -> None:
        with self._changed:
            heapq.heappush(self._pending, [number, prompt_id, prompt, extra_data, outputs])
        for _ in range(2):
            self.notify_status()
        with self._changed:
            self._changed.notify()

    def queue(self) -> dict[str, list]:
        """As `GET /queue` shows it."""
        with self._changed:
            return {"queue_running": [self.running] if self.running else [], "queue_pending": list(self._pending)}

    def delete_pending(self, prompt_ids: list[str] | None) -> None:
        """Forget these waiting prompts; None means all."""
        with self._changed:
            self._pending = [item for item in self._pending if prompt_ids is not None and item[1] not in prompt_ids]
            heapq.heapify(self._pending)

    def interrupt(self, prompt_id: str | None) -> None:
        """Stop the running prompt, if it is this one or none is named."""
        with self._changed:
            if self.running and prompt_id in (None, self.running[1]):
                self._interrupt.set()

    def drop_cache(self) -> None:
        self._cache.clear()

    def die(self) -> None:
        """End the thread as a crash would: no message is sent, and waiting prompts stay in the queue."""
        with self._changed:
            self._dead = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._stopping or self._dead)
                if self._stopping or self._dead:
                    return
                self.running = heapq.heappop(self._pending)
                self._interrupt.clear()
            try:
                entry = self._run(*self.running)
            except SystemExit:
                return  # the thread is gone, and its prompt stays "running" forever
            with self._changed:
                if len(self.history) > MOST_HISTORY_ENTRIES:
                    del self.history[next(iter(self.history))]
                self.history[self.running[1]] = entry
                client_id, prompt_id, self.running, self.node = self.running[3].get("client_id"), self.running[1], None, None
            self.notify_status()
            self._notify(client_id, "executing", {"node": None, "prompt_id": prompt_id})

    def notify_status(self) -> None:
        with self._changed:
            remaining = len(self._pending) + (self.running is not None)
        self._notify(None, "status", {"status": {"exec_info": {"queue_remaining": remaining}}})

    def _run(self, number: float, prompt_id: str, prompt: dict, extra_data: dict, outputs: list[str]) -> dict:
        """Execute one prompt; returns its history entry."""
        events = _ExecutionEvents(self, prompt_id, extra_data.get("client_id"), self._notify)
        events.event("execution_start")
        run = _Run(self.folder, prompt, extra_data.get("extra_pnginfo"), self._cache, events)
        cached = run.cached_nodes(outputs)
        events.event("execution_cached", nodes=cached)
        status = "success"
        to_run = len(set(run.reachable(outputs)) - set(cached))
        events.seconds_per_node = self.seconds_per_job / max(1, to_run)
        self.executed_jobs += bool(to_run)
        try:
            for output in outputs:
                run.execute(output)
            events.event("execution_success")
        except Interrupted:
            status = "error"
            events.event("execution_interrupted", **run.where())
        except Exception as error:
            status = "error"
            events.event("execution_error", **run.where(), **_described(error, run))
        self._cache = run.results
        entry = {
            "prompt": [number, prompt_id, prompt, extra_data, outputs],
            "outputs": run.shown(),
            "status": {"status_str": status, "completed": status == "success", "messages": events.messages},
            "meta": {node_id: _meta(node_id) for node_id in run.shown()},
        }
        self._at_end(entry)
        return entry

    def take_time(self, seconds: float) -> None:
        """Let time pass in a node; raises Interrupted."""
        if self._interrupt.wait(seconds):
            raise Interrupted

    def before(self, node_id: str) -> None:
        """A node is about to run: raises the error that it shall fail with."""
        self._at_node(node_id)
        self.take_time(0)


class _ExecutionEvents:
    """The messages about one prompt while it runs, for its history entry and for the websocket of its client."""

    def __init__(self, worker: Worker, prompt_id: str, client_id: str | None, notify: Callable[[str | None, str, dict], None]):
        self._worker, self._prompt_id, self._client_id, self._notify = worker, prompt_id, client_id, notify
        self.messages: list[list] = []
        self.seconds_per_node = 0.0
        self._states: dict[str, dict[str, Any]] = {}

    def event(self, kind: str, **data: Any) -> None:
        """A message that the history entry contains too."""
        self.messages.append([kind, {"prompt_id": self._prompt_id, **data, "timestamp": int(time.time() * 1000)}])
        self._notify(self._client_id, *self.messages[-1])

    def runs(self, node_id: str, steps: int) -> None:
        """A node runs; its time passes in equal steps."""
        self._worker.node = node_id
        self._state(node_id, 0.0, 1.0, "running")
        self._notify(self._client_id, "executing", {"node": node_id, "display_node": node_id, "prompt_id": self._prompt_id})
        self._worker.before(node_id)
        for step in range(1, steps + 1):
            self._worker.take_time(self.seconds_per_node / steps)
            if steps > 1:
                self._state(node_id, step, steps, "running")
                progress = {"value": step, "max": steps, "prompt_id": self._prompt_id, "node": node_id}
                self._notify(self._client_id, "progress", progress)

    def ends(self, node_id: str, shown: dict[str, Any]) -> None:
        if shown:
            about = {"node": node_id, "display_node": node_id, "output": shown, "prompt_id": self._prompt_id}
            self._notify(self._client_id, "executed", about)
        most = self._states.get(node_id, {"max": 1})["max"]
        self._state(node_id, most, most, "finished")

    def _state(self, node_id: str, value: float, most: float, state: str) -> None:
        about = {"value": value, "max": most, "state": state, "node_id": node_id, "prompt_id": self._prompt_id}
        self._states[node_id] = about | {"display_node_id": node_id, "parent_node_id": None, "real_node_id": node_id}
        self._notify(self._client_id, "progress_state", {"prompt_id": self._prompt_id, "nodes": dict(self._states)})


class _Run:
    """One execution of one prompt, with the results that the last one left in the cache."""

    def __init__(self, folder: Path, prompt: dict, extra_pnginfo: dict | None, cache: dict, events: _ExecutionEvents):
        self._folder, self._extra, self._cache, self._events = folder, extra_pnginfo, cache, events
        self._prompt = copy.deepcopy(prompt)
        self.results: dict[str, tuple[tuple, dict]] = {}
        """Signature of a node -> its values and its output for the history."""
        self.executed: list[str] = []
        self._done: dict[str, tuple[tuple, dict]] = {}
        self._signatures: dict[str, str] = {}
        self._node = next(iter(prompt))
        self._mark_loaded_files()

    def reachable(self, outputs: list[str]) -> list[str]:
        """The outputs and everything that they depend on, each once."""
        found: dict[str, None] = {}
        waiting = list(outputs)
        while waiting:
            node_id = waiting.pop()
            if node_id not in found:
                found[node_id] = None
                waiting += [source for source, _ in self._links(node_id)]
        return list(found)

    def cached_nodes(self, outputs: list[str]) -> list[str]:
        """The nodes that need not run; their results stay in the cache for the next prompt."""
        cached = [node_id for node_id in self.reachable(outputs) if self._signature(node_id) in self._cache]
        self.results |= {self._signature(node_id): self._cache[self._signature(node_id)] for node_id in cached}
        return cached

    def execute(self, node_id: str) -> tuple:
        """The values of a node, computed at most once."""
        if node_id in self._done:
            return self._done[node_id][0]
        signature = self._signature(node_id)
        known = self.results.get(signature)
        if known is None:
            known = self._compute(node_id)
            self.executed.append(node_id)
        if signature not in self._cache or known[1]:
            self._events.ends(node_id, known[1])
        self._done[node_id] = self.results[signature] = known
        return known[0]

    def shown(self) -> dict[str, dict]:
        """Node id -> output for the history, of the nodes that have finished."""
        return {node_id: shown for node_id, (_, shown) in self._done.items() if shown}

    def where(self) -> dict[str, Any]:
        """The node that was running, for a message."""
        return {"node_id": self._node, "node_type": self._prompt[self._node]["class_type"], "executed": list(self.executed)}

    def _compute(self, node_id: str) -> tuple[tuple, dict]:
        node = NODES[self._prompt[node_id]["class_type"]]
        given = self._prompt[node_id]["inputs"]
        inputs = {}
        for name, (specification, _required) in inputs_of(self._prompt[node_id]["class_type"], self._folder, given).items():
            if name not in given:
                continue
            value = self.execute(given[name][0])[given[name][1]] if isinstance(given[name], list) else given[name]
            # A dynamic input arrives as a dict of its parts: `format` and `format.bit_depth` as {"format": ..., "bit_depth": ...}.
            group, _, part = name.partition(".")
            if part or specification[0] == "COMFY_DYNAMICCOMBO_V3":
                inputs.setdefault(group, {})[part or name] = value
            else:
                inputs[name] = value
        self._node = node_id
        self._events.runs(node_id, given["steps"] if isinstance(given.get("steps"), int) else 1)
        context = Context(self._folder, self._prompt, self._extra)
        return node.run(context, **inputs), context.shown

    def _links(self, node_id: str) -> Iterator[list]:
        given = self._prompt[node_id]["inputs"]
        known = inputs_of(self._prompt[node_id]["class_type"], self._folder, given)
        yield from (value for name, value in given.items() if isinstance(value, list) and name in known)

    def _signature(self, node_id: str) -> str:
        """Equal for nodes that compute the same: it covers class and inputs, unknown ones too, but not ids and titles."""
        if node_id not in self._signatures:
            node = self._prompt[node_id]
            inputs = {}
            for name, value in node["inputs"].items():
                linked = isinstance(value, list) and value[0] in self._prompt
                inputs[name] = ["link", self._signature(value[0]), value[1]] if linked else value
            parts = [node["class_type"], inputs, node.get("is_changed")]
            self._signatures[node_id] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return self._signatures[node_id]

    def _mark_loaded_files(self) -> None:
        """Like ComfyUI, write the hash of a loaded file into the prompt that is embedded in the PNG files."""
        for node in self._prompt.values():
            if node["class_type"] == "LoadImage" and isinstance(node["inputs"].get("image"), str):
                path = input_file(self._folder, node["inputs"]["image"])
                node["is_changed"] = [file_hash(path)] if path.is_file() else [""]


def in_some_order(outputs: list[str], prompt_id: str) -> list[str]:
    """The outputs in an order other than the workflow's, the same for the same id."""
    return random.Random(prompt_id).sample(outputs, len(outputs))


def _described(error: Exception, run: _Run) -> dict[str, Any]:
    kind = type(error)
    is_plain = kind.__module__ in ("builtins", faults.__name__)
    return {
        "exception_message": f"{error}\n",
        "exception_type": kind.__name__ if is_plain else f"{kind.__module__}.{kind.__name__}",
        "traceback": traceback.format_tb(error.__traceback__),
        "current_inputs": {},
        "current_outputs": list(run.executed),
    }


def _meta(node_id: str) -> dict[str, Any]:
    return {"node_id": node_id, "display_node": node_id, "parent_node": None, "real_node_id": node_id}
