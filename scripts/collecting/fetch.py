"""What the history names -> verified pictures in the data set, and the outcome of one piece of work."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from collecting.comfyui import ComfyUI, PictureGone
from collecting.download import BadPicture, Picture, PictureStore, verified
from collecting.graph import Graph, described, graph_hash, literal_seeds, seeds_behind, text_behind
from collecting.history import RemoteFile, cached_nodes, failures, shown_by
from collecting.plan import Job, Plan
from collecting.progress import Progress, Submission

FETCH_PAUSES_S = (0.5, 1.0, 2.0)
"""Pauses between the tries of a picture that arrives broken."""


@dataclass
class Outcome:
    """What came of one piece of work."""

    new: int = 0
    known: int = 0
    """Pictures whose bytes were in the data set already."""
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
    """Keeps the pictures of finished work. Several threads may use it, each with a server of its own."""

    def __init__(self, plan: Plan, progress: Progress, store: PictureStore, pause: Callable[[float], Any] = time.sleep):
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
            self._keep_pictures_of(node, run, outcome)
        outcome.failures += failures(ended.entry)
        if outcome.failures:
            self._progress.failed(ended.job.key)
        else:
            self._progress.done(ended.job.key)
        return outcome

    def _keep_pictures_of(self, node: str, run: "_Run", outcome: Outcome) -> None:
        """Fetch and store what the node saved; what was stored before is not fetched again."""
        shown, named = shown_by(run.ended.entry, node), f"node {described(run.graph, node)}"
        if shown.skipped:
            outcome.notes.append(f"{named}: skipped {', '.join(shown.skipped)}")
        if not shown.pictures and not failures(run.ended.entry):
            why = run.nothing_new() if node in run.cached else ""
            outcome.failures.append(f"{named} gave no picture{why}")
        for index, file in enumerate(shown.pictures):
            earlier = self._progress.picture(run.ended.job.key, node, index) or run.earlier(file, node)
            if earlier is not None and self._already_there(earlier, node, index, run):
                outcome.known += 1
                continue
            try:
                is_new = self._keep(self._verified(file, run.server), file, node, index, run)
            except (BadPicture, PictureGone) as error:
                why = run.nothing_new() if isinstance(error, PictureGone) and node in run.cached else ""
                outcome.failures.append(f"{named}, picture {index + 1}: {error}{why}")
                continue
            outcome.new += is_new
            outcome.known += not is_new

    def _already_there(self, line: dict[str, Any], node: str, index: int, run: "_Run") -> bool:
        with self._lock:
            if not self._store.holds(line):
                return False
            if self._progress.picture(run.ended.job.key, node, index) is None:
                self._progress.storing(run.ended.job.key, node, index, line)
            return True

    def _keep(self, picture: Picture, file: RemoteFile, node: str, index: int, run: "_Run") -> bool:
        """Store a picture, its manifest line in the record first; False if its bytes were there already."""
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
            line = self._store.line_for(picture, job.prefix or f"node{node}", about)
            self._progress.storing(job.key, node, index, line)
            run.remember(file, line)
            return self._store.put(picture, line)

    def _verified(self, file: RemoteFile, server: ComfyUI) -> Picture:
        """A picture of the server; one that arrives broken is fetched again."""
        pauses_s = iter(FETCH_PAUSES_S)
        while True:
            pause_s = next(pauses_s, None)
            try:
                return verified(server.view(file.filename, file.subfolder, file.kind))
            except BadPicture:
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
        """Why a cached node cannot give its picture, and what helps."""
        seeds = "set GLOBAL_SEED, or NEW_SEEDS=1, for another picture, or " if literal_seeds(self.graph) else ""
        return f": ComfyUI answered from its cache, and what it made before is gone; {seeds}restart ComfyUI to have it made again"


def graph_of(plan: Plan, job: Job, seeds: dict[str, int], face_name: str | None = None) -> Graph:
    """What is submitted for a piece of work; without `face_name` the workflow's own picture stays in it."""
    return plan.workflow.filled(face_name, job.prompt, {place: seeds[str(place)] for place in job.seeds})
