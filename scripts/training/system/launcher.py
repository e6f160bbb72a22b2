"""Several processes, one per GPU: which of them this one is, and the launcher that starts them.

Other launchers turn every failure into exit code 1 and a traceback. This one passes signals on, lets messages through and
ends with the exit code of the process that failed. Standard library only.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from common.errors import MemoryShort, ResourceError
from training.config import ProcessSettings

GRACE_S = 2.0
"""After one process has failed, for the others to say what they have to say."""


SIGTERM_S = 10.0
"""For them to end when they were asked to; then they are killed."""


STOPPED = (MemoryShort.exit_code, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a process that was asked to end. The first one ends last, because it saves the state."""


SAVING_S = 600.0
"""The grace after such an exit."""


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands among those that train together."""

    index: int = 0
    """0: the one that decides and writes."""
    count: int = 1
    local_index: int = 0
    """Among the processes of this machine: the number of its GPU."""
    local_count: int = 1
    address: str = ""
    port: int = 0
    launcher: int | None = None
    """The process that started this one, if that is ours."""

    @property
    def gpu(self) -> int | None:
        """The number of this process's GPU; None for a single process, which takes the current one."""
        return self.local_index if self.count > 1 else None


def place() -> RankInfo:
    """As the launcher says: ours, torch's and accelerate's set the same variables."""
    found = os.environ
    if "RANK" not in found or "WORLD_SIZE" not in found:
        return RankInfo()
    count = int(found["WORLD_SIZE"])
    return RankInfo(
        index=int(found["RANK"]),
        count=count,
        local_index=int(found.get("LOCAL_RANK", 0)),
        local_count=int(found.get("LOCAL_WORLD_SIZE", count)),
        address=found.get("MASTER_ADDR", "127.0.0.1"),
        port=int(found.get("MASTER_PORT", 29500)),
        launcher=int(found["LORACAT_LAUNCHER_PID"]) if "LORACAT_LAUNCHER_PID" in found else None,
    )


def wants_launcher(settings: ProcessSettings) -> bool:
    """Whether this process has to start others instead of training itself."""
    return settings.num_processes * settings.num_machines > 1 and "RANK" not in os.environ


def launch(command: Sequence[str], settings: ProcessSettings) -> int:
    """Run `command` in every process of this machine, to the end of all; the exit code of the first that failed, else 0.

    Raises ResourceError when a process was ended by a signal that nobody sent through this one.
    """
    count, cores = settings.num_processes, os.cpu_count() or 1
    shared = {
        "WORLD_SIZE": count * settings.num_machines,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": settings.main_process_ip,
        "MASTER_PORT": settings.main_process_port or _free_port(),
        "LORACAT_LAUNCHER_PID": os.getpid(),
    }
    usual = {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # when one process ends, the stack of each other one's sockets is no news
    }
    children = []
    for local in range(count):
        own = {"RANK": settings.machine_rank * count + local, "LOCAL_RANK": local}
        environment = usual | os.environ | {name: str(value) for name, value in (shared | own).items()}
        children.append(_started(command, environment, is_main_process=local == 0))
    _pass_signals_on(children)
    return _outcome(children, _failures(children))


def _started(command: Sequence[str], environment: dict[str, str], is_main_process: bool) -> subprocess.Popen:
    """A process in a session of its own: Ctrl-C in a terminal reaches the launcher alone, which passes it on once. What
    others than the first say goes through a pipe, so that they draw no progress bars."""
    how = {"env": environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
    if is_main_process:
        return subprocess.Popen(command, **how)
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **how)
    threading.Thread(target=_copy, args=(child.stderr,)).start()
    return child


def _copy(lines: IO[str]) -> None:
    with lines:
        for line in lines:
            print(line, end="", file=sys.stderr, flush=True)


def _pass_signals_on(children: Sequence[subprocess.Popen]) -> None:
    def pass_on(signum, _frame):
        for child in children:
            child.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, pass_on)


def _failures(children: Sequence[subprocess.Popen]) -> list[int]:
    """Wait for all children; which of them failed by themselves, in that order. A failure ends the others."""
    failed, failed_at, killed, grace_s = [], None, False, SAVING_S
    while any(child.poll() is None for child in children):
        time.sleep(0.05)
        waited = time.monotonic() - failed_at if failed_at else 0.0
        if waited < grace_s:
            failed += [index for index, child in enumerate(children) if child.poll() and index not in failed]
        if any(children[index].returncode not in STOPPED for index in failed):
            grace_s = GRACE_S
        failed_at = failed_at or (time.monotonic() if failed else None)
        if waited > grace_s:
            for child in children:
                child.kill() if waited > grace_s + SIGTERM_S else None if killed else child.terminate()
            killed = True
    return failed or [index for index, child in enumerate(children) if child.returncode]


def _outcome(children: Sequence[subprocess.Popen], failed: Sequence[int]) -> int:
    """The exit code of the cause: a process that a signal ended, else one that did not only miss another, else the first."""
    codes = {index: children[index].returncode for index in failed}
    ended = [index for index, code in codes.items() if code < 0]
    if ended and codes[ended[0]] in (-signal.SIGTERM, -signal.SIGINT):
        return 128 - codes[ended[0]]
    if ended:
        name = signal.Signals(-codes[ended[0]]).name
        raise ResourceError(
            f"process {ended[0] + 1} of {len(children)} on this machine was ended by {name}, as the kernel does when memory runs "
            "out; the state saved last is whole: run the same command again"
        )
    others = [code for code in codes.values() if code != ResourceError.exit_code]
    return next(iter(others or codes.values()), 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
