"""One piece of work at a time: send it, wait for it, keep its pictures; re-attach to what an earlier run sent."""

import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from collecting.comfyui import ComfyUI, PictureGone, Unanswered
from collecting.download import BadPicture, Picture, PictureStore, verified
from collecting.graph import Graph, described, graph_hash, seeds_behind, text_behind
from collecting.plan import Job, Plan
from collecting.progress import Progress, Submission
from errors import ComfyUIError

MOST_LOSSES = 3
"""How often one run sends the same work again when the server loses it."""
FETCH_PAUSES_S = (0.5, 1.0, 2.0)
"""Pauses between the tries of a picture that arrives broken."""
SEED_BELOW = 2**53
"""Drawn seeds stay below this: the numbers that ComfyUI's web page shows exactly."""


@dataclass
class Outcome:
    """What came of one piece of work."""

    new: int = 0
    known: int = 0
    """Pictures whose bytes were in the data set already."""
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Run:
    """A piece of work that came to an end on the server."""

    job: Job
    submission: Submission
    entry: dict[str, Any]
    """Its history entry."""
    graph: Graph
    """What was submitted, but for the face."""


class Session:
    """The collector's side of the conversation with one server."""

    def __init__(
        self, server: ComfyUI, progress: Progress, store: PictureStore, plan: Plan, delay_s: float, say: Callable[[str], None]
    ):
        self._server, self._progress, self._store, self._plan = server, progress, store, plan
        self._delay_s, self._say = delay_s, say
        self._last_sent_s = float("-inf")
        self._workflow_hash = graph_hash(plan.workflow.graph)
        self._face_name: str | None = None

    def collect(self, job: Job) -> Outcome:
        """Do one piece of work and write down that it is done, or that it failed.

        Raises PromptRefused when the server will not run the workflow at all, ComfyUIError when it is gone.
        """
        outcome = Outcome()
        submission, entry = self._end_of(job, outcome)
        run = _Run(job, submission, entry, self._graph(job, submission.seeds))
        for node in self._plan.workflow.kept_nodes:
            self._keep_pictures_of(node, run, outcome)
        outcome.failures += _failures(entry)
        if outcome.failures:
            self._progress.failed(job.key)
        else:
            self._progress.done(job.key)
        return outcome

    def _end_of(self, job: Job, outcome: Outcome) -> tuple[Submission, dict[str, Any]]:
        """The submission that came to an end, and its history entry. What an earlier run sent is looked up first."""
        submission = self._progress.in_flight(job.key) or self._submitted(job, outcome)
        losses = 0
        while (entry := self._waited_for(submission)) is None:
            losses += 1
            if losses > MOST_LOSSES:
                raise ComfyUIError(f"{job.label}: ComfyUI lost it {losses} times; does it restart over it? Its terminal says why")
            self._say(f"{job.label}: ComfyUI knows nothing of prompt {submission.prompt_id}; sending it again")
            submission = self._submitted(job, outcome)
        return submission, entry

    def _submitted(self, job: Job, outcome: Outcome) -> Submission:
        """Write down what is about to be sent, then send it."""
        time.sleep(max(0.0, self._last_sent_s + self._delay_s - time.monotonic()))
        seeds = self._progress.seeds(job.key) or {
            str(place): secrets.randbelow(SEED_BELOW) if seed is None else seed for place, seed in job.seeds.items()
        }
        graph = self._graph(job, seeds, self._uploaded_face())
        submission = Submission(str(uuid.uuid4()), seeds)
        self._progress.sent(job.key, submission)
        self._last_sent_s = time.monotonic()
        try:
            queued = self._server.submit(graph, submission.prompt_id)
        except Unanswered as error:
            self._say(f"{job.label}: {error}; looking whether it arrived")
            return submission
        if queued.dropped:
            outcome.failures += ["ComfyUI runs only a part of the workflow:", *queued.dropped]
        if queued.prompt_id != submission.prompt_id:
            # Old servers give ids of their own.
            submission = Submission(queued.prompt_id, seeds)
            self._progress.sent(job.key, submission)
        return submission

    def _uploaded_face(self) -> str | None:
        """The face's name on the server; uploaded once per run, under a name that only these bytes have."""
        face = self._plan.face
        if face is not None and self._face_name is None:
            self._face_name = self._server.upload(f"loracat_face_{face.sha256[:16]}{face.suffix}", face.content)
        return self._face_name

    def _graph(self, job: Job, seeds: dict[str, int], face_name: str | None = None) -> Graph:
        return self._plan.workflow.filled(face_name, job.prompt, {place: seeds[str(place)] for place in job.seeds})

    def _waited_for(self, submission: Submission) -> dict[str, Any] | None:
        """The history entry, as soon as there is one; None when the server knows nothing of the prompt."""
        started_s = time.monotonic()
        while True:
            entry = self._server.history(submission.prompt_id)
            if entry is not None:
                return entry
            if submission.prompt_id not in self._server.queued_ids():
                # It may have ended between the two looks.
                return self._server.history(submission.prompt_id)
            time.sleep(poll_interval_s(time.monotonic() - started_s))

    def _keep_pictures_of(self, node: str, run: _Run, outcome: Outcome) -> None:
        """Fetch and store what the node saved; what was stored before is not fetched again."""
        records = _pictures_in(run.entry, node)
        if not records and not _failures(run.entry):
            outcome.failures.append(f"node {described(run.graph, node)} gave no picture")
        for index, record in enumerate(records):
            earlier = self._progress.picture(run.job.key, node, index)
            if earlier is not None and self._store.holds(earlier):
                outcome.known += 1
                continue
            try:
                is_new = self._keep(self._fetched(record), node, index, run)
            except (BadPicture, PictureGone) as error:
                outcome.failures.append(f"node {described(run.graph, node)}, picture {index + 1}: {error}")
                continue
            outcome.new += is_new
            outcome.known += not is_new

    def _keep(self, picture: Picture, node: str, index: int, run: _Run) -> bool:
        """Store a picture, its manifest line in the record first; False if its bytes were there already."""
        about = {
            "prompt_id": run.submission.prompt_id,
            "node": node,
            "seeds": seeds_behind(run.graph, node),
            "prompt": text_behind(run.graph, node) if run.job.prompt is None else run.job.prompt,
            "workflow_sha256": self._workflow_hash,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        line = self._store.line_for(picture, run.job.prefix or f"node{node}", about)
        self._progress.storing(run.job.key, node, index, line)
        return self._store.put(picture, line)

    def _fetched(self, record: dict[str, Any]) -> Picture:
        """A picture of the server, verified; one that arrives broken is fetched again."""
        pauses_s = iter(FETCH_PAUSES_S)
        while True:
            pause_s = next(pauses_s, None)
            try:
                return verified(self._view(record))
            except BadPicture:
                if pause_s is None:
                    raise
            time.sleep(pause_s)

    def _view(self, record: dict[str, Any]) -> bytes:
        return self._server.view(record["filename"], str(record.get("subfolder") or ""), str(record.get("type") or "output"))


def poll_interval_s(waited_s: float) -> float:
    """Fast for short prompts, slow for long ones: a tenth of the time waited, between 0.02 and 2 s."""
    return min(2.0, max(0.02, waited_s / 10))


def _pictures_in(entry: dict[str, Any], node: str) -> list[dict[str, Any]]:
    """What the history says the node saved; previews in the server's temp folder are none."""
    shown = (entry.get("outputs") or {}).get(node) or {}
    images = shown.get("images") if isinstance(shown, dict) else None
    records = images if isinstance(images, list) else []
    return [
        record
        for record in records
        if isinstance(record, dict) and isinstance(record.get("filename"), str) and record.get("type") != "temp"
    ]


def _failures(entry: dict[str, Any]) -> list[str]:
    """Why a prompt did not come to a good end; [] when it did."""
    status = entry.get("status") or {}
    if status.get("status_str") != "error":
        return []
    kind, data = next(reversed(status.get("messages") or [("", {})]))
    where = f"node {data.get('node_id')} ({data.get('node_type')})"
    if kind == "execution_interrupted":
        return [f"it was interrupted in ComfyUI at {where}"]
    if kind == "execution_error":
        return [f"{where} failed: {data.get('exception_type')}: {' '.join(str(data.get('exception_message')).split())}"]
    return ["ComfyUI says that it failed, but not why"]
