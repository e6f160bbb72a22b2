"""Other processes, as /proc shows them."""

import subprocess
import time
from pathlib import Path


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def pair_of(launcher: subprocess.Popen) -> list[int]:
    """Wait for the two processes that `launcher` starts."""
    while len(pair := children_of(launcher.pid)) < 2:
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.005)
    return pair


def has_ended(process: int) -> bool:
    """Whether the process has exited, including one whose exit code has not been read yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "XZ"
    except (FileNotFoundError, ProcessLookupError):
        return True
