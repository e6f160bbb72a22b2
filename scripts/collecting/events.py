"""What a station keeps of a submission, and what it tells the thread that watches it."""

from dataclasses import dataclass

from collecting.fetch import Outcome
from collecting.plan import Job
from collecting.progress import Submission
from errors import ComfyUIError


@dataclass
class Flight:
    """A submission whose end was not seen yet."""

    job: Job
    submission: Submission
    dropped: tuple[str, ...] = ()
    doubtful_until_s: float = 0.0
    """Until then, by time.monotonic(), it may still arrive although nobody knows it: its answer was lost."""
    fetches: int = 0
    """How often its pictures could not be fetched because the server went away."""


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
