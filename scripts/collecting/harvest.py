"""Pure: a history entry -> what each node left behind, and how the prompt ended. Nothing in an entry is trusted.

What the history names -> verified images in the data set, and the outcome of one piece of work.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

from collecting.client import ComfyUI, ImageGone
from collecting.graph import Graph, described, graph_hash, literal_seeds, seeds_behind, text_behind
from collecting.image_store import BadImage, DownloadedImage, ImageStore, verified
from collecting.jobs import Job, Plan
from collecting.journal import Progress, Submission
from common.images import DOWNLOAD_SUFFIXES

_CALLED = {"gifs": "animations", "latents": "latents", "text": "text", "audio": "audio", "video": "videos"}


@dataclass(frozen=True)
class RemoteFile:
    """A file on the server, in its words; never a name of ours."""

    filename: str
    subfolder: str
    kind: str


@dataclass(frozen=True)
class Shown:
    """What one node handed to the history."""

    images: tuple[RemoteFile, ...]
    skipped: tuple[str, ...]
    """What it shows besides, in words: nothing of that is an image to train on."""


def shown_by(entry: dict[str, Any], node: str) -> Shown:
    """The still images of a node. Animations, videos, latents, text and the previews in temp/ are none."""
    shown = _dict(_dict(entry.get("outputs")).get(node))
    animated = any(shown.get("animated") or ()) if isinstance(shown.get("animated"), list) else False
    images, skipped = [], []
    for record in shown.get("images") if isinstance(shown.get("images"), list) else ():
        file = _file(record)
        if file is None:
            continue
        if animated:
            skipped.append(f"{file.filename!r} (animated)")
        elif file.kind == "temp":
            skipped.append(f"{file.filename!r} (a preview)")
        elif not file.filename.lower().endswith(DOWNLOAD_SUFFIXES):
            skipped.append(f"{file.filename!r} (no PNG, JPEG or WebP)")
        else:
            images.append(file)
    skipped += [_CALLED.get(key, key) for key, value in shown.items() if key not in ("images", "animated") and value]
    return Shown(tuple(images), tuple(skipped))


def _file(record: Any) -> RemoteFile | None:
    """Nodes of custom packs leave out the subfolder, the type or both."""
    if not isinstance(record, dict) or not isinstance(record.get("filename"), str):
        return None
    return RemoteFile(record["filename"], str(record.get("subfolder") or ""), str(record.get("type") or "output"))


def cached_nodes(entry: dict[str, Any]) -> frozenset[str]:
    """The nodes that did not run: their files, if they name any, are older than this prompt."""
    nodes = _message(entry, "execution_cached").get("nodes")
    return frozenset(map(str, nodes)) if isinstance(nodes, list) else frozenset()


def failures(entry: dict[str, Any]) -> list[str]:
    """Why a prompt did not come to a good end; [] when it did. An error and an interruption differ in the last message."""
    if _dict(entry.get("status")).get("status_str") != "error":
        return []
    kind, data = next(reversed(_messages(entry)), ("", {}))
    where = f"node {data.get('node_id')} ({data.get('node_type')})"
    if kind == "execution_interrupted":
        return [f"it was interrupted in ComfyUI at {where}"]
    if kind == "execution_error":
        return [f"{where} failed: {data.get('exception_type')}: {' '.join(str(data.get('exception_message')).split())}"]
    return ["ComfyUI says that it failed, but not why"]


def seconds_of(entry: dict[str, Any]) -> float | None:
    """How long a prompt ran, by the server's clock, if it says so."""
    times_ms = [data["timestamp"] for _, data in _messages(entry) if isinstance(data.get("timestamp"), int | float)]
    return (times_ms[-1] - times_ms[0]) / 1000 if len(times_ms) > 1 else None


def typical_s(durations_s: list[float]) -> float | None:
    """What the next prompt will probably take; None before the first."""
    return median(durations_s[-5:]) if durations_s else None


def _messages(entry: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    messages = _dict(entry.get("status")).get("messages")
    listed = messages if isinstance(messages, list) else []
    return [(str(each[0]), each[1]) for each in listed if isinstance(each, list) and len(each) == 2 and isinstance(each[1], dict)]


def _message(entry: dict[str, Any], wanted: str) -> dict[str, Any]:
    return next((data for kind, data in _messages(entry) if kind == wanted), {})


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


FETCH_PAUSES_S = (0.5, 1.0, 2.0)
"""Pauses between the tries of an image that arrives broken."""


@dataclass
class Outcome:
    """What came of one piece of work."""

    new: int = 0
    known: int = 0
    """Images whose bytes were in the data set already."""
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is worth a word and no failure."""


@dataclass(frozen=True)
class Ended:
    """A piece of work that came to an end on the server."""

    job: Job
    submission: Submission
    entry: dict[str, Any]
    """Its history entry."""
    dropped: tuple[str, ...] = ()
    """What the server said when it took only a part of the workflow."""


Fetched = dict[RemoteFile, dict[str, Any]]
"""The manifest lines of the files that were fetched from one server, as long as it is surely the same."""


class Fetcher:
    """Keeps the images of finished work. Several threads may use it, each with a server of its own."""

    def __init__(self, plan: Plan, progress: Progress, store: ImageStore, pause: Callable[[float], Any] = time.sleep):
        self._plan, self._progress, self._store, self._pause = plan, progress, store, pause
        self._workflow_hash = graph_hash(plan.workflow.graph)
        self._lock = threading.Lock()

    def outcome_of(self, ended: Ended, server: ComfyUI, fetched: Fetched) -> Outcome:
        """Fetch what is not there yet and write down that the work is done, or that it failed.

        Raises Away when the server is gone before everything is here.
        """
        run = _Run(ended, self._plan, server, fetched)
        outcome = Outcome()
        if ended.dropped:
            outcome.failures += ["ComfyUI runs only a part of the workflow:", *ended.dropped]
        for node in self._plan.workflow.kept_nodes:
            self._keep_images_of(node, run, outcome)
        outcome.failures += failures(ended.entry)
        if outcome.failures:
            self._progress.failed(ended.job.key)
        else:
            self._progress.done(ended.job.key)
        return outcome

    def _keep_images_of(self, node: str, run: "_Run", outcome: Outcome) -> None:
        """Fetch and store what the node saved; what was stored before is not fetched again."""
        shown, named = shown_by(run.ended.entry, node), f"node {described(run.graph, node)}"
        if shown.skipped:
            outcome.notes.append(f"{named}: skipped {', '.join(shown.skipped)}")
        if not shown.images and not failures(run.ended.entry):
            why = run.nothing_new() if node in run.cached else ""
            outcome.failures.append(f"{named} gave no image{why}")
        for index, file in enumerate(shown.images):
            earlier = self._progress.image(run.ended.job.key, node, index) or run.earlier(file, node)
            if earlier is not None and self._already_there(earlier, node, index, run):
                outcome.known += 1
                continue
            try:
                is_new = self._keep(self._verified(file, run.server), file, node, index, run)
            except (BadImage, ImageGone) as error:
                why = run.nothing_new() if isinstance(error, ImageGone) and node in run.cached else ""
                outcome.failures.append(f"{named}, image {index + 1}: {error}{why}")
                continue
            outcome.new += is_new
            outcome.known += not is_new

    def _already_there(self, line: dict[str, Any], node: str, index: int, run: "_Run") -> bool:
        with self._lock:
            if not self._store.holds(line):
                return False
            if self._progress.image(run.ended.job.key, node, index) is None:
                self._progress.storing(run.ended.job.key, node, index, line)
            return True

    def _keep(self, image: DownloadedImage, file: RemoteFile, node: str, index: int, run: "_Run") -> bool:
        """Store an image, its manifest line in the record first; False if its bytes were there already."""
        job = run.ended.job
        about = {
            "prompt_id": run.ended.submission.prompt_id,
            "node": node,
            "seeds": seeds_behind(run.graph, node),
            "prompt": text_behind(run.graph, node) if job.prompt is None else job.prompt,
            "workflow_sha256": self._workflow_hash,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self._lock:
            line = self._store.line_for(image, job.prefix or f"node{node}", about)
            self._progress.storing(job.key, node, index, line)
            run.remember(file, line)
            return self._store.put(image, line)

    def _verified(self, file: RemoteFile, server: ComfyUI) -> DownloadedImage:
        """An image of the server; one that arrives broken is fetched again."""
        pauses_s = iter(FETCH_PAUSES_S)
        while True:
            pause_s = next(pauses_s, None)
            try:
                return verified(server.view(file.filename, file.subfolder, file.kind))
            except BadImage:
                if pause_s is None:
                    raise
            self._pause(pause_s)


class _Run:
    """One finished submission: what was submitted, what is cached, and which of its files were fetched before."""

    def __init__(self, ended: Ended, plan: Plan, server: ComfyUI, fetched: Fetched):
        self.ended, self.server = ended, server
        self.graph: Graph = graph_of(plan, ended.job, ended.submission.seeds)
        self.cached = cached_nodes(ended.entry)
        self._fetched, self._now = fetched, set()

    def earlier(self, file: RemoteFile, node: str) -> dict[str, Any] | None:
        """The manifest line of a file that is surely the one fetched before: named twice, or named by a node that did not run."""
        return self._fetched.get(file) if node in self.cached or file in self._now else None

    def remember(self, file: RemoteFile, line: dict[str, Any]) -> None:
        self._fetched[file] = line
        self._now.add(file)

    def nothing_new(self) -> str:
        """Why a cached node cannot give its image, and what helps."""
        seeds = "set GLOBAL_SEED, or NEW_SEEDS=1, for another image, or " if literal_seeds(self.graph) else ""
        return f": ComfyUI answered from its cache, and what it made before is gone; {seeds}restart ComfyUI to have it made again"


def graph_of(plan: Plan, job: Job, seeds: dict[str, int], face_name: str | None = None) -> Graph:
    """What is submitted for a piece of work; without `face_name` the workflow's own image stays in it."""
    return plan.workflow.filled(face_name, job.prompt, {place: seeds[str(place)] for place in job.seeds})
