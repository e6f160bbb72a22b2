"""One server at work: prompts are submitted before it becomes idle, their ends are noticed, their images are downloaded.

A worker has three threads: `run` submits and watches, `download` stores the images of finished prompts, and
`monitor.listen` follows the websocket.
"""

import contextlib
import queue
import secrets
import threading
import time
import uuid
from collections.abc import Callable

from collecting.client import ComfyUI, PromptRejected, Queue, SubmissionUnconfirmed
from collecting.graph import Graph, execution_targets
from collecting.harvest import Harvester, HistoryEntry
from collecting.http import Address, ServerUnavailable
from collecting.image_store import ImageStore
from collecting.jobs import InFlight, Job, JobQueue, JobResult, Plan
from collecting.journal import Journal, Submission
from collecting.monitor import WebsocketMonitor
from collecting.object_info import NodeClasses
from collecting.pacing import Pacing
from collecting.preflight import leave_out_surplus
from common.errors import ComfyUIError

RECONNECT_TIMEOUT_S = 300.0
"""How long to wait for a server, or one of its routes, that became unavailable; a restart with many custom nodes takes minutes."""
QUEUE_CHECK_INTERVAL_S = 1.0
"""Least time between two requests for the whole queue, whose answer may be large."""
UNCONFIRMED_S = 5.0
"""A submission without an answer that is still unknown after this time did not arrive; a proxy may delay it until then."""
IDLE_WORKER_S = 60.0
"""When prompts wait and none runs for this long, ComfyUI's own worker thread has died."""
MAX_LOSSES = 3
"""How often a job is submitted again after a server lost it while it was the next to run."""
SEED_LIMIT = 2**31
"""Drawn seeds are smaller: some nodes take no larger ones."""


class ServerWorker:
    """Submits jobs to one server and watches them. `emit` receives log lines and results, from any thread."""

    def __init__(
        self,
        address: Address,
        plan: Plan,
        journal: Journal,
        store: ImageStore,
        jobs: JobQueue,
        emit: Callable[[str | JobResult], None],
        stopping: threading.Event,
        *,
        delay_s: float,
        stall_timeout_s: float,
        api_key: str = "",
    ):
        self.address = address
        self.monitor = WebsocketMonitor(address, journal.client_id(), stopping)
        self.is_unavailable = False
        """Whether the server does not respond and the worker is waiting for it."""
        self.has_failed = False
        """Whether the server was given up."""
        self._plan, self._journal, self._jobs = plan, journal, jobs
        self._emit, self._stopping = emit, stopping
        # Two clients, because a client is for one thread; the third repeats nothing.
        self._server, self._image_server = (
            ComfyUI(address, journal.client_id(), sleep=stopping.wait, api_key=api_key) for _ in range(2)
        )
        self._probe = ComfyUI(address, journal.client_id(), retry_delays_s=())
        self._harvester = Harvester(plan, journal, store, self._image_server, stopping.wait)
        self._pacing = Pacing(delay_s)
        self._stall_timeout_s = stall_timeout_s
        self._in_flight: list[InFlight] = []
        """The oldest first; ComfyUI runs prompts in the order of submission."""
        self._requeued_ids: list[str] = []
        """Ids of prompts that may still be on the server although their jobs are in the job queue again."""
        self._finished: queue.SimpleQueue[tuple[InFlight, HistoryEntry] | None] = queue.SimpleQueue()
        """What `run` hands to `download`; None ends it."""
        self._not_downloaded: queue.SimpleQueue[InFlight] = queue.SimpleQueue()
        """What `download` hands back to `run`."""
        self._face_names: list[str] = []
        self._classes: NodeClasses | None = None
        """Read when nodes for faces have to be left out."""
        self._next_queue_check_s = 0.0
        self._last_queue: Queue | None = None
        self._freed_s = float("-inf")
        """When the server was last asked to forget its cache."""
        self._last_progress_s = self._waiting_since_s = time.monotonic()
        """When the server last did something, and since when something is expected of it."""
        self._outage_began_s = float("-inf")
        self._failing_since_s: dict[str, float] = {}
        """Route -> when it failed first, without a success since then."""
        self._given_up: ComfyUIError | None = None
        """Why `run` has to end, found by `download`."""

    def reattach(self, job: Job, submission: Submission) -> bool:
        """Watch a prompt that an earlier run submitted, if this server knows it. To be called before the threads start."""
        if not self._server.knows(submission.prompt_id):
            return False
        self._in_flight.append(InFlight(job, submission))
        return True

    def unfinished_prompts(self) -> list[str]:
        """Ids of the prompts that may be on the server, those included whose jobs were given to other servers."""
        return self._requeued_ids + [flight.submission.prompt_id for flight in self._in_flight]

    def stop_download(self) -> None:
        self._finished.put(None)

    def run(self) -> None:
        """First thread: submit and watch until `stopping` is set.

        Raises ComfyUIError when the server cannot be used any more; its jobs are back in the job queue then.
        """
        self._jobs.active_workers.add(self)
        try:
            while not self._stopping.is_set():
                try:
                    self._check_prompts()
                    if self._given_up is not None:
                        raise self._given_up
                    while self._pacing.should_submit(len(self._in_flight)) and (job := self._jobs.get()) is not None:
                        self._submit(job)
                except ServerUnavailable as error:
                    self._wait_until_available(error)
                self._stopping.wait(self._poll_delay_s())
        except ComfyUIError:
            if self._stopping.is_set():
                return
            self.has_failed = True
            self._jobs.active_workers.discard(self)
            self._requeue_all()
            raise

    def _submit(self, job: Job) -> None:
        """Record in the journal what is about to be submitted, then submit it."""
        seeds = self._journal.seeds.get(job.key) or {
            str(ref): secrets.randbelow(SEED_LIMIT) if seed is None else seed for ref, seed in job.seeds.items()
        }
        before = frozenset(each.submission.prompt_id for each in self._in_flight)
        flight = InFlight(job, Submission(str(uuid.uuid4()), seeds), behind=before, submitted_s=time.monotonic())
        try:
            graph = self._leave_out_surplus(self._plan.graph_for(job, seeds, self._uploaded_faces(self._server)))
        except ComfyUIError:
            self._jobs.requeue([job])
            raise
        self._journal.record("sent", key=job.key, prompt_id=flight.submission.prompt_id, seeds=seeds)
        self._pacing.note_submission(is_only=not self._in_flight)
        if not self._in_flight:
            self._waiting_since_s = time.monotonic()
        self._in_flight.append(flight)
        try:
            targets = execution_targets(graph, self._jobs.remade.get(job.key, self._plan.workflow.output_nodes))
            queued = self._server.submit(graph, flight.submission.prompt_id, targets)
        except PromptRejected:
            self._in_flight.remove(flight)
            self._journal.record("failed", key=job.key)
            self._jobs.requeue([job])
            raise
        except SubmissionUnconfirmed as error:
            self._emit(f"{job.label}: checking whether it was queued ({error})")
            self._next_queue_check_s, flight.unconfirmed_until_s = 0.0, time.monotonic() + UNCONFIRMED_S
            if reason := self._reason_to_give_up("/prompt", error):
                raise reason from None
            return
        self._failing_since_s.pop("/prompt", None)
        flight.dropped = tuple(queued.dropped)
        if queued.prompt_id != flight.submission.prompt_id:
            # Old versions of ComfyUI ignore the id in the request.
            flight.submission = Submission(queued.prompt_id, seeds)
            self._journal.record("sent", key=job.key, prompt_id=queued.prompt_id, seeds=seeds)

    def _uploaded_faces(self, server: ComfyUI) -> list[str]:
        """The names of the face references on the server; each is uploaded once, under a name that is unique to its bytes."""
        for face in self._plan.faces[len(self._face_names) :]:
            self._face_names.append(server.upload(f"loracat_face_{face.sha256[:16]}{face.suffix}", face.content))
        return self._face_names

    def _leave_out_surplus(self, graph: Graph) -> Graph:
        if not self._plan.surplus_loaders:
            return graph
        if self._classes is None:
            self._classes = NodeClasses(self._server.object_info(), self._server.node_replacements())
        return leave_out_surplus(self._classes, self._plan, graph)

    def _check_prompts(self) -> None:
        """Notice which prompts have ended: the oldest at each poll, all of them now and then."""
        self._take_back()
        while self._in_flight and (entry := self._server.history(self._in_flight[0].submission.prompt_id)) is not None:
            self._finish(self._in_flight[0], entry)
        if self._in_flight and time.monotonic() >= self._next_queue_check_s:
            self._check_queue()

    def _finish(self, flight: InFlight, raw_entry: dict) -> None:
        entry = HistoryEntry(raw_entry)
        self._in_flight.remove(flight)
        self._confirm(flight)
        self._pacing.note_end(entry.duration_s)
        self._last_progress_s = time.monotonic()
        self._finished.put((flight, entry))

    def _confirm(self, flight: InFlight) -> None:
        """A submission without an answer did arrive."""
        if flight.unconfirmed_until_s:
            flight.unconfirmed_until_s = 0.0
            self._failing_since_s.pop("/prompt", None)

    def _check_queue(self) -> None:
        """Find prompts that ended out of order, that were removed or lost, and a server that makes no progress."""
        current = self._server.queue()
        lost, queued = [], current.running | current.waiting
        before = current.running
        for flight in list(self._in_flight):
            if flight.submission.prompt_id in queued:
                self._confirm(flight)
                flight.behind = before if flight.submission.prompt_id in current.waiting else frozenset()
                before |= {flight.submission.prompt_id}
                continue
            # It may have ended between the two requests.
            entry = self._server.history(flight.submission.prompt_id)
            if entry is not None:
                self._finish(flight, entry)
            elif time.monotonic() >= flight.unconfirmed_until_s:
                if self._was_removed(flight, queued):
                    self._in_flight.remove(flight)
                    self._fail(flight.job, "its prompt was removed from ComfyUI's queue, and is not submitted again by this run")
                else:
                    lost.append(flight)
        if lost:
            self._requeue_lost(lost)
        self._check_progress(current)
        self._next_queue_check_s = time.monotonic() + max(QUEUE_CHECK_INTERVAL_S, 5 * self._poll_delay_s())

    def _was_removed(self, flight: InFlight, queued: frozenset[str]) -> bool:
        """Whether a user removed a prompt from the queue: it is gone, although a prompt before it is still queued or known.

        Otherwise the server was restarted, or the prompt ran and the history was cleared.
        """
        if flight.unconfirmed_until_s:
            return False
        return bool(flight.behind & queued) or any(self._server.history(each) is not None for each in flight.behind)

    def _requeue_lost(self, lost: list[InFlight]) -> None:
        """Put the jobs of lost prompts back into the job queue; one that may have crashed the server fails in the end."""
        self._forget_server_state()
        # Only the oldest prompt was running or about to run, so only this one can be the cause.
        if lost[0] is self._in_flight[0]:
            suspect = lost[0].job
            self._jobs.losses[suspect.key] += 1
            if self._jobs.losses[suspect.key] > MAX_LOSSES:
                self._in_flight.remove(lost.pop(0))
                self._fail(
                    suspect, f"ComfyUI lost this prompt {MAX_LOSSES + 1} times (it may be crashing): check ComfyUI's console"
                )
        for flight in lost:
            self._in_flight.remove(flight)
            self._emit(f"{flight.job.label}: {unknown_prompt_message(self.address.url, flight.submission)}")
        self._jobs.requeue([flight.job for flight in lost])

    def _check_progress(self, current: Queue) -> None:
        """Raises ComfyUIError when nothing has moved for too long: HTTP still answers when ComfyUI's worker thread has died."""
        now_s = time.monotonic()
        if self._last_queue is None or current.running != self._last_queue.running:
            self._last_progress_s = now_s
        self._last_queue = current
        stalled_s = now_s - max(self._last_progress_s, self._waiting_since_s, self.monitor.last_activity_s)
        no_prompt_runs = current.waiting and not current.running
        limit_s = min(self._stall_timeout_s, IDLE_WORKER_S if no_prompt_runs else float("inf"))
        if self._in_flight and stalled_s >= limit_s:
            raise ComfyUIError(
                f"ComfyUI at {self.address.url} answers, but has made no progress for {stalled_s:.0f} s with prompts of this run"
                " in its queue: its worker thread has died, or a prompt takes longer than COMFYUI_STALL_TIMEOUT;"
                " restart ComfyUI, or raise COMFYUI_STALL_TIMEOUT, and run the same command again"
            )

    def _poll_delay_s(self) -> float:
        return self._pacing.poll_interval_s() if self._in_flight else 0.1

    def _reason_to_give_up(self, route: str, error: ComfyUIError) -> ComfyUIError | None:
        """Note that `route` failed; the error that ends this server when it has failed for too long."""
        failing_s = time.monotonic() - self._failing_since_s.setdefault(route, time.monotonic())
        if failing_s < min(RECONNECT_TIMEOUT_S, self._stall_timeout_s):
            return None
        return ComfyUIError(f"{error}. {route} has failed for {failing_s:.0f} s without a success")

    def _wait_until_available(self, error: ComfyUIError) -> None:
        """Wait until the server answers on every route that `run` uses. Other active servers get its jobs at once.

        Raises ComfyUIError in the end; an outage that begins before the server has made progress continues the last one.
        """
        self.is_unavailable = True
        self._jobs.active_workers.discard(self)
        others_take_over = bool(self._jobs.active_workers)
        if self._last_progress_s >= self._outage_began_s:
            self._outage_began_s = time.monotonic()
        deadline_s, delay_s = self._outage_began_s + min(RECONNECT_TIMEOUT_S, self._stall_timeout_s), 0.5
        moved = "Its prompts are given to the other servers. " if others_take_over else ""
        self._emit(f"{error}. {moved}Trying to reconnect for {max(0.0, deadline_s - time.monotonic()):.0f} s.")
        self._forget_server_state()
        while True:
            if others_take_over:
                self._requeue_all()
            if self._stopping.wait(delay_s) or time.monotonic() >= deadline_s:
                raise ComfyUIError(f"{error} (trying for {time.monotonic() - self._outage_began_s:.0f} s)")
            delay_s = min(10.0, 1.5 * delay_s)
            try:
                self._try_routes()
            except ComfyUIError as latest:
                error = latest
            else:
                self._resume()
                return

    def _try_routes(self) -> None:
        """Use every route that `run` uses, once. Raises ComfyUIError if one of them fails."""
        self._probe.version()
        self._probe.queue()
        if self._in_flight:
            self._probe.history(self._in_flight[0].submission.prompt_id)
        self._uploaded_faces(self._probe)

    def _resume(self) -> None:
        if self._requeued_ids:
            # Other servers run these jobs now.
            with contextlib.suppress(ComfyUIError):
                self._server.dequeue(self._requeued_ids)
        self._requeued_ids.clear()
        self._emit(f"Reconnected to ComfyUI at {self.address.url}.")
        self._jobs.active_workers.add(self)
        self._next_queue_check_s, self._pacing.running_since_s = 0.0, time.monotonic()
        self._waiting_since_s = time.monotonic()
        self.is_unavailable = False

    def _forget_server_state(self) -> None:
        """The server may have been restarted: file names may be used again, and the face may be gone."""
        self._harvester.downloaded.clear()
        self._face_names = []

    def _requeue_all(self) -> None:
        """Put every job of this server back into the job queue."""
        self._take_back()
        flights, self._in_flight = self._in_flight, []
        self._requeued_ids += [flight.submission.prompt_id for flight in flights]
        self._jobs.requeue([flight.job for flight in flights])

    def _take_back(self) -> None:
        """Prompts whose images could not be downloaded are in flight again."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._in_flight.insert(0, self._not_downloaded.get_nowait())

    def download(self) -> None:
        """Second thread: store the images of finished prompts until `stop_download` is called."""
        while (finished := self._finished.get()) is not None and not self._stopping.is_set():
            flight, entry = finished
            try:
                result = self._harvester.harvest(flight, entry)
                if result.new or not result.failures:
                    self._failing_since_s.pop("/view", None)
                if self._remake(flight, result):
                    continue
                self._journal.record("failed" if result.failures else "done", key=flight.job.key)
                self._emit(result)
            except ServerUnavailable as error:
                self._given_up = self._reason_to_give_up("/view", error)
                flight.failed_downloads += 1
                if flight.failed_downloads > MAX_LOSSES:
                    self._fail(flight.job, str(error))
                    continue
                # `run` notices when the server is back, or gives the job to another one.
                self._not_downloaded.put(flight)
                if self.has_failed:
                    self._requeue_all()
            except ComfyUIError as error:
                self._fail(flight.job, str(error))

    def _remake(self, flight: InFlight, result: JobResult) -> bool:
        """Let the server run the nodes whose cached files are gone, once. Returns False when that is not possible."""
        if not result.stale_nodes or flight.job.key in self._jobs.remade:
            return False
        # A prompt that was submitted before the cache was last emptied is only submitted again.
        if flight.submitted_s >= self._freed_s:
            try:
                self._image_server.free_memory()
            except ServerUnavailable:
                raise
            except ComfyUIError:
                return False
            self._freed_s = time.monotonic()
        self._jobs.remade[flight.job.key] = result.stale_nodes
        self._emit(f"{flight.job.label}: ComfyUI answered from its cache, but the files are gone; submitting it again")
        self._jobs.requeue([flight.job])
        return True

    def _fail(self, job: Job, reason: str) -> None:
        self._journal.record("failed", key=job.key)
        self._emit(JobResult(job, failures=[reason]))


def unknown_prompt_message(url: str, submission: Submission) -> str:
    """The log line for a prompt that was submitted and that no server knows any more."""
    return f"ComfyUI at {url} does not know prompt {submission.prompt_id}; submitting it again"
