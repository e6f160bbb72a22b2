"""Other processes, as /proc shows them."""

import subprocess
import time
from contextlib import suppress
from pathlib import Path


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def pair_of(launcher: subprocess.Popen) -> list[int]:
    """Wait for the two processes that `launcher` starts."""
    while len(pair := children_of(launcher.pid)) < 2:
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.005)
    return pair


def process_that_writes(file: Path) -> int:
    """The one process that has the file open."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # the process has ended, or closed the file
            if descriptor.samefile(file):
                found.add(int(descriptor.parts[2]))
    (process,) = found
    return process


def handles(process: int, signum: int) -> bool:
    """Whether the process has a handler for the signal."""
    (line,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(line.split()[1], 16) >> (signum - 1) & 1)


def has_ended(process: int) -> bool:
    """Whether the process has exited, including one whose exit code has not been read yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "XZ"
    except (FileNotFoundError, ProcessLookupError):
        return True
