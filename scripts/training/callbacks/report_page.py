"""The report page of a run: scripts/report.py writes it after each LoRA file, at the lowest priority, and at the end."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from common.project import ProjectSettings, SharedDataSettings
from common.settings import REPOSITORY
from training.data.buckets import OptimizerStep
from training.loop import Callback, Progress

NICENESS = 19
END_S = 10.0
"""How long the end of a run waits for the page; a stop does not wait."""
TERMINATE_S = 2.0
REPORT = REPOSITORY / "scripts" / "report.py"


class ReportPage(Callback):
    """Starts report.py, one process at a time. What goes wrong with it is one warning."""

    def __init__(self, project: ProjectSettings, data: SharedDataSettings, is_due: Callable[[int, int], bool]):
        self._settings = [f"{name}={getattr(project, name)}" for name in ("trigger_word", "dataset_dir", "output_dir")]
        self._settings += [f"{name}={getattr(data, name)}" for name in ("caption_per_line", "alpha")]
        self._saves_between = is_due
        self._is_due = False
        self._has_warned = False
        self.process: subprocess.Popen | None = None

    def after_epoch(self, step: OptimizerStep, epochs: int, progress: Progress) -> tuple[Progress, str]:
        self._is_due |= self._saves_between(step.epoch, epochs)
        return progress, ""

    def after_step(self, step: OptimizerStep, values: dict[str, float]) -> None:
        """Start what became due at the end of an epoch: by now the other callbacks have written their files."""
        if self.process and self.process.poll() is not None:
            self._collect()
        if self._is_due and not self.process:
            self._is_due = False
            self._start()

    def write(self) -> None:
        """Write the page now, and wait for it."""
        self._start(niceness=0)
        try:
            if self.process:
                self._collect()
        finally:
            self.close(0)

    def close(self, timeout_s: float) -> None:
        """Wait so long for a process that is running, then end it."""
        if not self.process:
            return
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        if self.process.poll() is not None:
            self._collect()
            return
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(TERMINATE_S)
        self.process.kill()
        self.process.communicate()

    def _start(self, niceness: int = NICENESS) -> None:
        # The settings are those of this run, whichever file or flags they came from.
        command = [sys.executable, str(REPORT), "--config", os.devnull]
        for each in self._settings:
            command += ["--set", each]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for the parent alone
            )
            if niceness:
                os.setpriority(os.PRIO_PROCESS, self.process.pid, niceness)
        except OSError as error:
            self._warn(error.strerror)

    def _collect(self) -> None:
        """Read what the process says until it ends."""
        _, errors = self.process.communicate()
        if self.process.returncode:
            self._warn((errors.splitlines() or [f"exit code {self.process.returncode}"])[-1])
        self.process = None

    def _warn(self, problem: str) -> None:
        if not self._has_warned:
            print(f"warning: the report page was not written: {problem}", flush=True)
        self._has_warned = True


def write_report_page(project: ProjectSettings, data: SharedDataSettings) -> None:
    """Write the page and wait for it. What goes wrong is one warning."""
    ReportPage(project, data, lambda before, after: False).write()


@contextmanager
def report_page(project: ProjectSettings, data: SharedDataSettings, is_due: Callable[[int, int], bool]) -> Iterator[ReportPage]:
    """The callback for the block of a run. `is_due`: whether a LoRA file is saved between two numbers of complete epochs."""
    page = ReportPage(project, data, is_due)
    wait_s = 0.0
    try:
        yield page
        wait_s = END_S
    finally:
        page.close(wait_s)
