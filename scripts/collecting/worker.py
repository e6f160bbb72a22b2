"""What a station keeps of a submission, and what it tells the thread that watches it.

Pure: how often a server is asked, and when it gets its next entry.

What is still to be sent, shared by the stations of all servers, and who is there to send it.

One server at work: it is fed before it can fall idle, what ends is seen soon, and a second thread fetches the images.
"""

import contextlib
import math
import queue
import secrets
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from collecting.client import ComfyUI, Queue, Unanswered
from collecting.harvest import Ended, Fetched, Fetcher, Outcome, graph_of, seconds_of, typical_s
from collecting.http import Away
from collecting.jobs import Job, Plan
from collecting.journal import Progress, Submission
from common.errors import ComfyUIError


@dataclass
class Flight:
    """A submission whose end was not seen yet."""

    job: Job
    submission: Submission
    dropped: tuple[str, ...] = ()
    doubtful_until_s: float = 0.0
    """Until then, by time.monotonic(), it may still arrive although nobody knows it: its answer was lost."""
    fetches: int = 0
    """How often its images could not be fetched because the server went away."""


@dataclass(frozen=True)
class Said:
    """A line for the log."""

    line: str


@dataclass(frozen=True)
class Finished:
    """A piece of work that is done or failed."""

    job: Job
    outcome: Outcome


@dataclass(frozen=True)
class GaveUp:
    """A station whose server will not do any more work."""

    error: ComfyUIError


MOST_WAITING = 6
"""Entries of ours that wait behind the running one; a stop leaves no more than these."""


WORK_AHEAD_S = 4.0
"""So much work waits, in at most MOST_WAITING entries: a poll that comes late does not let the worker fall idle."""


FEED_AT_ONCE_S = 1.5
"""A worker with less than this waiting is about to fall idle: COMFYUI_DELAY does not hold it up."""


def wants_more(waiting: int, typical_s: float | None, since_last_s: float, delay_s: float) -> bool:
    """Whether the next entry is sent now: enough waits that the worker never falls idle, and no more than that.

    `waiting` entries of ours wait behind the one that runs (-1: none runs), one typically takes `typical_s` (None: not
    known yet), and the last was sent `since_last_s` ago. `delay_s` spaces submissions only while enough waits.
    """
    if waiting < 1:
        return True
    if typical_s is None or waiting >= min(MOST_WAITING, math.ceil(WORK_AHEAD_S / max(typical_s, 0.001))):
        return False
    return waiting * typical_s < FEED_AT_ONCE_S or since_last_s >= delay_s


def poll_interval_s(typical_s: float | None, waited_s: float) -> float:
    """Fast for short prompts, slow for long ones: an eighth of what one takes, between 0.05 and 2 s.

    Before the first has ended, and for one that takes longer than the others, what it took so far counts.
    """
    return min(2.0, max(0.05, max(typical_s or 0.0, waited_s) / 8))


class Board:
    """A list from which every station takes its next piece of work, and to which it gives back what it cannot finish."""

    def __init__(self, jobs: Iterable[Job]):
        self._waiting = deque(jobs)
        self._at_work: set[Hashable] = set()
        self._losses: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self) -> Job | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def give_back(self, jobs: Iterable[Job]) -> None:
        """To the front and in their order: they were sent first."""
        with self._lock:
            self._waiting.extendleft(reversed(list(jobs)))

    def lost(self, job: Job) -> int:
        """Count that a server lost this work while it was its turn; returns how often that happened."""
        with self._lock:
            self._losses[job.key] += 1
            return self._losses[job.key]

    def join(self, station: Hashable) -> None:
        with self._lock:
            self._at_work.add(station)

    def leave(self, station: Hashable) -> bool:
        """Whether somebody else is at work, who can take over."""
        with self._lock:
            self._at_work.discard(station)
            return bool(self._at_work)


AWAY_S = 300.0
"""How long a server that was there before may be away; a restart with many custom nodes takes minutes."""


LOOK_AT_ALL_EVERY_S = 1.0
"""At least so long passes between two looks at the whole queue, whose answer may be large."""


DOUBT_S = 5.0
"""A submission without an answer, unknown for so long, has not arrived; sooner it may be on its way through a proxy."""


IDLE_WORKER_S = 60.0
"""A queue in which things wait and nothing runs for so long has lost its worker."""


MOST_LOSSES = 3
"""How often the same work is sent again when servers lose it while it is its turn."""


SEED_BELOW = 2**53
"""Drawn seeds stay below this: the numbers that ComfyUI's web page shows exactly."""


class Station:
    """Feeds and watches one server. `tell` takes Said, Finished and GaveUp, from any thread.

    `life_sign_s` says when the server was last seen working, by other means than asking it.
    """

    def __init__(
        self,
        servers: tuple[ComfyUI, ComfyUI],
        board: Board,
        plan: Plan,
        progress: Progress,
        fetcher: Fetcher,
        tell: Callable[[Any], None],
        stopping: threading.Event,
        *,
        delay_s: float,
        stall_timeout_s: float,
        life_sign_s: Callable[[], float] = lambda: 0.0,
    ):
        self._server, self._image_server = servers
        self._board, self._plan, self._progress, self._fetcher = board, plan, progress, fetcher
        self._tell, self._stopping = tell, stopping
        self._delay_s, self._stall_timeout_s, self._life_sign_s = delay_s, stall_timeout_s, life_sign_s
        self.is_away = False
        """Whether the server went away and is waited for."""
        self.is_over = False
        """Whether it was given up."""
        self._flights: list[Flight] = []
        self._given_away: list[str] = []
        self._durations_s: list[float] = []
        self._face_name: str | None = None
        self._fetched: Fetched = {}
        self._ended: queue.SimpleQueue[tuple[Flight, dict[str, Any]] | None] = queue.SimpleQueue()
        self._returned: queue.SimpleQueue[Flight] = queue.SimpleQueue()
        self._last_sent_s = float("-inf")
        self._turn_since_s = self._last_sign_s = time.monotonic()
        self._next_look_s = 0.0
        self._seen: Queue | None = None

    @property
    def url(self) -> str:
        return self._server.url

    def adopt(self, job: Job, submission: Submission) -> bool:
        """Take over what an earlier run sent, if this server knows of it; before the threads run."""
        if not self._server.knows(submission.prompt_id):
            return False
        self._flights.append(Flight(job, submission))
        return True

    def unfinished(self) -> list[str]:
        """The prompt ids whose end was not seen here, those that others took over included."""
        return self._given_away + [flight.submission.prompt_id for flight in self._flights]

    def wake(self) -> None:
        """Let the second thread see that everything is stopped."""
        self._ended.put(None)

    def work(self) -> None:
        """The first thread: until everything is stopped, or this server is given up."""
        self._board.join(self)
        while not self._stopping.is_set():
            try:
                self._look()
                self._feed()
            except Away as error:
                if not self._came_back(error):
                    return self._give_up(error)
            except ComfyUIError as error:
                return self._give_up(error)
            self._stopping.wait(self._pause_s())

    def fetch(self) -> None:
        """The second thread: the images of what has ended."""
        while (item := self._ended.get()) is not None and not self._stopping.is_set():
            flight, entry = item
            ended = Ended(flight.job, flight.submission, entry, flight.dropped)
            try:
                outcome = self._fetcher.outcome_of(ended, self._image_server, self._fetched)
            except Away as error:
                self._fetch_later(flight, error)
            except ComfyUIError as error:
                self._fail(flight.job, str(error))
            else:
                self._tell(Finished(flight.job, outcome))

    def _fetch_later(self, flight: Flight, error: Away) -> None:
        """The first thread will see the server come back, or give the work to others."""
        flight.fetches += 1
        if flight.fetches > MOST_LOSSES:
            self._fail(flight.job, str(error))
            return
        self._returned.put(flight)
        if self.is_over:
            self._give_all_back()

    def _fail(self, job: Job, why: str) -> None:
        self._progress.failed(job.key)
        self._tell(Finished(job, Outcome(failures=[why])))

    def _look(self) -> None:
        """See what has ended: the oldest first, and now and then all of it."""
        self._take_back()
        while self._flights and (entry := self._server.history(self._flights[0].submission.prompt_id)) is not None:
            self._note_end(self._flights[0], entry)
        if self._flights and time.monotonic() >= self._next_look_s:
            self._look_at_all()

    def _note_end(self, flight: Flight, entry: dict[str, Any]) -> None:
        self._flights.remove(flight)
        if (duration_s := seconds_of(entry)) is not None:
            self._durations_s.append(duration_s)
        self._turn_since_s = self._last_sign_s = time.monotonic()
        self._ended.put((flight, entry))

    def _look_at_all(self) -> None:
        """Find what ended out of its turn, what the server lost, and a worker that is dead."""
        seen = self._server.queue()
        lost = []
        for flight in [each for each in self._flights if each.submission.prompt_id not in seen.running | seen.waiting]:
            # It may have ended between the two looks.
            entry = self._server.history(flight.submission.prompt_id)
            if entry is not None:
                self._note_end(flight, entry)
            elif time.monotonic() >= flight.doubtful_until_s:
                lost.append(flight)
        self._send_again(lost)
        self._watch_the_worker(seen)
        self._next_look_s = time.monotonic() + max(LOOK_AT_ALL_EVERY_S, 5 * self._pause_s())

    def _send_again(self, lost: list[Flight]) -> None:
        """What the server forgot goes back to the board; only for the one whose turn it was it may have been its own fault."""
        if not lost:
            return
        self._fetched.clear()
        self._face_name = None
        if lost[0] is self._flights[0] and self._board.lost(lost[0].job) > MOST_LOSSES:
            culprit = lost.pop(0)
            self._flights.remove(culprit)
            self._fail(culprit.job, f"ComfyUI lost it {MOST_LOSSES + 1} times; does it restart over it? Its terminal says why")
        for flight in lost:
            self._flights.remove(flight)
            self._tell(Said(f"{flight.job.label}: {forgotten(self.url, flight.submission)}"))
        self._board.give_back([flight.job for flight in lost])

    def _watch_the_worker(self, seen: Queue) -> None:
        """Raises ComfyUIError when nothing has moved for too long: HTTP goes on answering when the worker is dead."""
        now_s = time.monotonic()
        if self._seen is None or seen.running != self._seen.running:
            self._last_sign_s = now_s
        self._seen = seen
        still_s = now_s - max(self._last_sign_s, self._life_sign_s())
        idle = seen.waiting and not seen.running
        if self._flights and still_s >= min(self._stall_timeout_s, IDLE_WORKER_S if idle else float("inf")):
            raise ComfyUIError(
                f"ComfyUI at {self.url} answers, but has done nothing for {still_s:.0f} s while our prompts are in its queue:"
                " its worker is dead, or a prompt takes longer than COMFYUI_STALL_TIMEOUT; restart ComfyUI and run this again"
            )

    def _feed(self) -> None:
        while self._wants_more() and (job := self._board.take()) is not None:
            self._send(job)

    def _wants_more(self) -> bool:
        since_last_s = time.monotonic() - self._last_sent_s
        return wants_more(len(self._flights) - 1, typical_s(self._durations_s), since_last_s, self._delay_s)

    def _send(self, job: Job) -> None:
        """Write down what is about to be sent, then send it."""
        seeds = self._progress.seeds(job.key) or {
            str(place): secrets.randbelow(SEED_BELOW) if seed is None else seed for place, seed in job.seeds.items()
        }
        flight = Flight(job, Submission(str(uuid.uuid4()), seeds))
        try:
            graph = graph_of(self._plan, job, seeds, self._uploaded_face())
        except ComfyUIError:
            self._board.give_back([job])
            raise
        self._progress.sent(job.key, flight.submission)
        if not self._flights:
            self._turn_since_s = self._last_sign_s = time.monotonic()
        self._flights.append(flight)
        self._last_sent_s = time.monotonic()
        try:
            queued = self._server.submit(graph, flight.submission.prompt_id)
        except Unanswered as error:
            self._tell(Said(f"{job.label}: {error}; looking whether it arrived"))
            self._next_look_s, flight.doubtful_until_s = 0.0, time.monotonic() + DOUBT_S
            return
        flight.dropped = tuple(queued.dropped)
        if queued.prompt_id != flight.submission.prompt_id:
            # Old servers give ids of their own.
            flight.submission = Submission(queued.prompt_id, seeds)
            self._progress.sent(job.key, flight.submission)

    def _uploaded_face(self) -> str | None:
        """The face's name on the server; uploaded once, under a name that only these bytes have."""
        face = self._plan.face
        if face is not None and self._face_name is None:
            self._face_name = self._server.upload(f"loracat_face_{face.sha256[:16]}{face.suffix}", face.content)
        return self._face_name

    def _pause_s(self) -> float:
        if not self._flights:
            return 0.1
        return poll_interval_s(typical_s(self._durations_s), time.monotonic() - self._turn_since_s)

    def _came_back(self, error: Away) -> bool:
        """Wait for a server that went away; who is at work elsewhere gets its entries at once."""
        self.is_away = True
        gives_away = self._board.leave(self)
        if gives_away:
            self._give_all_back()
        patience_s = min(AWAY_S, self._stall_timeout_s)
        self._tell(Said(f"{error}. {'Its work goes to the others. ' if gives_away else ''}Trying again for {patience_s:.0f} s."))
        self._fetched.clear()
        self._face_name = None
        deadline_s, pause_s = time.monotonic() + patience_s, 0.5
        while not self._stopping.wait(pause_s) and time.monotonic() < deadline_s:
            if gives_away:
                self._give_all_back()
            pause_s = min(10.0, 1.5 * pause_s)
            if self._answers():
                self._tell(Said(f"ComfyUI at {self.url} is back."))
                self._board.join(self)
                self._next_look_s, self._turn_since_s = 0.0, time.monotonic()
                self._last_sign_s = time.monotonic()
                self.is_away = False
                return True
        return False

    def _answers(self) -> bool:
        """Whether the server is back; what was given away is not to run here as well."""
        try:
            self._server.version()
        except ComfyUIError:
            return False
        if self._given_away:
            with contextlib.suppress(ComfyUIError):
                self._server.withdraw(self._given_away)
        self._given_away.clear()
        return True

    def _give_all_back(self) -> None:
        self._take_back()
        given, self._flights = self._flights, []
        self._given_away += [flight.submission.prompt_id for flight in given]
        self._board.give_back([flight.job for flight in given])

    def _take_back(self) -> None:
        """What could not be fetched is in flight again."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._flights.insert(0, self._returned.get_nowait())

    def _give_up(self, error: ComfyUIError) -> None:
        if self._stopping.is_set():
            return
        self.is_over = True
        self._board.leave(self)
        self._give_all_back()
        self._tell(GaveUp(error))


def forgotten(url: str, submission: Submission) -> str:
    """What the log says of a submission that nobody knows any more."""
    return f"ComfyUI at {url} knows nothing of prompt {submission.prompt_id}; sending it again"
