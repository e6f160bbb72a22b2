"""When a server gets its next prompt, and how often it is polled, from how long its prompts take."""

import math
import time
from collections import deque
from statistics import median

MAX_WAITING = 6
"""Most prompts of this run that wait behind the running one; after a kill no more than these remain on the server."""
WORK_AHEAD_S = 4.0
"""So much work waits, in at most MAX_WAITING prompts: even when a poll is late, the server does not become idle."""
IDLE_SOON_S = 1.5
"""A server with less work than this waiting is about to become idle: COMFYUI_DELAY does not apply."""


def should_submit(waiting: int, typical_s: float | None, since_last_s: float, delay_s: float) -> bool:
    """Whether to submit the next prompt now: enough wait that the server never becomes idle, and no more.

    `waiting` prompts of this run wait behind the running one (-1: none is running), a prompt typically takes `typical_s`
    (None: not known yet), and the last was submitted `since_last_s` ago. `delay_s` spaces submissions only while enough wait.
    """
    if waiting < 1:
        return True
    if typical_s is None or waiting >= min(MAX_WAITING, math.ceil(WORK_AHEAD_S / max(typical_s, 0.001))):
        return False
    return waiting * typical_s < IDLE_SOON_S or since_last_s >= delay_s


def poll_interval_s(typical_s: float | None, running_s: float) -> float:
    """An eighth of what a prompt takes, between 0.05 and 2 s: often for short prompts, seldom for long ones.

    Before the first has ended, and for one that takes longer than the others, the time that it has been running counts.
    """
    longest_s = max(typical_s or 0.0, running_s)
    return min(2.0, max(0.05, longest_s / 8))


class Pacing:
    """Both decisions for one server, from the durations of its last prompts."""

    def __init__(self, delay_s: float):
        self._delay_s = delay_s
        self._durations_s: deque[float] = deque(maxlen=5)
        self._typical_s: float | None = None
        self._last_submission_s = float("-inf")
        self.running_since_s = time.monotonic()
        """When the oldest prompt in flight became the next to run (time.monotonic())."""

    def note_submission(self, is_only: bool) -> None:
        """A prompt is being submitted, `is_only` while no other of this run is on the server."""
        self._last_submission_s = time.monotonic()
        if is_only:
            self.running_since_s = self._last_submission_s

    def note_end(self, duration_s: float | None) -> None:
        """A prompt has ended; None if the server does not say how long it took."""
        self.running_since_s = time.monotonic()
        if duration_s is not None:
            self._durations_s.append(duration_s)
            self._typical_s = median(self._durations_s)

    def should_submit(self, in_flight: int) -> bool:
        since_last_s = time.monotonic() - self._last_submission_s
        return should_submit(in_flight - 1, self._typical_s, since_last_s, self._delay_s)

    def poll_interval_s(self) -> float:
        running_s = time.monotonic() - self.running_since_s
        return poll_interval_s(self._typical_s, running_s)
