"""Pure: how often a server is asked, and when it gets its next entry."""

import math

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
