"""The progress of what takes long: a bar in a terminal, and a line now and then in a log."""

import threading
import time
from typing import Any

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # tqdm's own lock, for several processes, would stay behind when one of them is killed

LINE_INTERVAL_S = 60.0
"""Without a terminal, progress and the time left are logged as a line this often."""


class ProgressBar(tqdm):
    """A tqdm bar for `total` units. Without a terminal it counts silently and prints lines with the time left."""

    def __init__(self, total: int, desc: str, unit: str, initial: int = 0, **options: Any):
        super().__init__(total=total, desc=desc, unit=unit, initial=initial, disable=None, **options)
        self._logs = self.disable
        self._description, self._first, self._postfix = f"{desc}: {{done}}/{total} {unit}", initial, ""
        self._started_s = self._last_line_s = time.monotonic()

    def update(self, n: float = 1) -> bool | None:
        if not self._logs:
            return super().update(n)
        self.n += n  # a disabled bar of tqdm does not count
        now_s = time.monotonic()
        if now_s >= self._last_line_s + LINE_INTERVAL_S and self._first < self.n < self.total:
            self._last_line_s = now_s
            left_s = (now_s - self._started_s) * (self.total - self.n) / (self.n - self._first)
            progress = self._description.format(done=self.n)
            print(f"{progress}, {tqdm.format_interval(left_s)} left{self._postfix}", flush=True)
        return None

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        self._postfix = f", {s}"
        super().set_postfix_str(s, refresh)
