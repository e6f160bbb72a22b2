"""What is still to be sent, shared by the stations of all servers, and who is there to send it."""

import threading
from collections import Counter, deque
from collections.abc import Hashable, Iterable

from collecting.plan import Job


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
