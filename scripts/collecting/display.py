"""What a person sees while pictures are collected: lines, and below them what runs now and how long it will take."""

import sys
import time

from tqdm import tqdm

from collecting.fetch import Outcome
from collecting.graph import described
from collecting.live import Live, Moment
from collecting.plan import Plan

LINE_EVERY_S = 60.0
"""Where there is no terminal, what runs now is a line now and then."""


class Display:
    """Use as a context manager. `total` is the number of pieces of work."""

    def __init__(self, plan: Plan, total: int):
        self._plan, self._total = plan, total
        self._nodes = plan.workflow.kept_nodes
        self._done = self._kept = self._made = 0
        self._started_s = self._last_line_s = time.monotonic()
        self._bar = tqdm(
            total=total * len(self._nodes), unit="picture", disable=None, bar_format="{percentage:3.0f}%|{bar}| {desc}"
        )

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        """One line, above the bar if there is one."""
        tqdm.write(line)
        sys.stdout.flush()

    def tell(self, label: str, outcome: Outcome) -> None:
        """What came of one piece of work."""
        self._done += 1
        self._kept += outcome.new + outcome.known
        self._made = self._kept
        self.say(f"{self._done}/{self._total} {label}: {_told(outcome)}")
        for note in outcome.notes + outcome.failures:
            self.say(f"    {note}")

    def show(self, lives: list[Live]) -> None:
        """What runs now."""
        moments = [moment for live in lives if (moment := live.moment) is not None]
        # Between the end of a prompt and its outcome nobody speaks of its pictures.
        made = self._made = max(self._made, self._kept + sum(moment.saved_by(self._nodes) for moment in moments))
        share = (self._done + sum(map(self._share, moments))) / self._total
        words = [f"{made}/{max(self._bar.total or 0, made)} pictures", *map(self._running, moments)]
        words += [self._time_left(share)] if 0 < share < 1 else []
        now_s = time.monotonic()
        if not self._bar.disable:
            self._bar.total = max(self._bar.total, made)
            self._bar.n = made
            self._bar.set_description_str(", ".join(words))
        elif moments and now_s >= self._last_line_s + LINE_EVERY_S:
            self._last_line_s = now_s
            self.say(", ".join(words))

    def _share(self, moment: Moment) -> float:
        """How much of its prompt is done, by nodes and by the steps of the running one."""
        step = min(1.0, moment.step / moment.steps) if moment.steps else 0.0
        return min(1.0, (len(moment.nodes_done) + step) / len(self._plan.workflow.graph))

    def _running(self, moment: Moment) -> str:
        where = "starting" if moment.node is None else f"node {described(self._plan.workflow.graph, moment.node)}"
        return where + (f" step {moment.step}/{moment.steps}" if moment.steps > 1 else "")

    def _time_left(self, share: float) -> str:
        left_s = (time.monotonic() - self._started_s) * (1 - share) / share
        return f"{tqdm.format_interval(left_s)} left"


def _told(outcome: Outcome) -> str:
    known = f", {outcome.known} there already" if outcome.known else ""
    return f"{outcome.new} new {'picture' if outcome.new == 1 else 'pictures'}{known}" + ("; FAILED:" if outcome.failures else "")
