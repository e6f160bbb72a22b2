"""Start one training process per GPU of this machine, and read which of them the current process is.

torchrun and accelerate set the same variables and work as well, but turn every failure into exit code 1 and a traceback, and
do not wait after SIGTERM until the state is saved. This launcher forwards signals, gives rank 0 the time to save, and exits
with the exit code of the process that failed. Standard library only.
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

from common.errors import MemoryShort, ResourceError
from training.config import ProcessSettings

GRACE_S = 2.0
"""After a process has failed, the others have this long to fail as well and report why."""
SIGTERM_S = 10.0
"""Then they receive SIGTERM, and are killed after this time."""
STOPPED = (MemoryShort.exit_code, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a process that was asked to stop. Rank 0 exits last, because it saves the state."""
SAVING_S = 600.0
"""The grace period after one of these exit codes."""


@dataclass(frozen=True)
class RankInfo:
    """The rank of this process, and where to reach the others."""

    rank: int = 0
    """Rank 0 is the main process: it makes the decisions and writes the files."""
    world_size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine, and the index of its GPU."""
    local_world_size: int = 1
    address: str = ""
    port: int = 0
    launcher_pid: int | None = None
    """The process that started this one, if it is LoRACat's own launcher."""
    gpu: int | None = None
    """Index of this process's GPU; None for a single process, which uses the current one."""


def rank_info() -> RankInfo:
    """Read the variables that every launcher sets: this one, torchrun and accelerate."""
    environment = os.environ
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return RankInfo()
    world_size, local_rank = int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", 0))
    return RankInfo(
        rank=int(environment["RANK"]),
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE", world_size)),
        address=environment.get("MASTER_ADDR", "127.0.0.1"),
        port=int(environment.get("MASTER_PORT", 29500)),
        launcher_pid=int(environment["LORACAT_LAUNCHER_PID"]) if "LORACAT_LAUNCHER_PID" in environment else None,
        gpu=local_rank if world_size > 1 else None,
    )


def needs_launcher(settings: ProcessSettings) -> bool:
    """Whether this process has to start the training processes instead of training itself."""
    return settings.num_processes * settings.num_machines > 1 and "RANK" not in os.environ


def launch(command: Sequence[str], settings: ProcessSettings) -> int:
    """Run `command` once per process of this machine and wait for all of them.

    Returns the exit code of the first process that failed, or 0. Raises ResourceError if a process was ended by a signal that
    was not forwarded by the launcher.
    """
    count, cores = settings.num_processes, os.cpu_count() or 1
    port = settings.main_process_port
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": count * settings.num_machines,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": settings.main_process_ip,
        "MASTER_PORT": port,
        "LORACAT_LAUNCHER_PID": os.getpid(),
    }
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # when one process exits, the others would log the stack of every socket
    }
    children = []
    for local_rank in range(count):
        own = {"RANK": settings.machine_rank * count + local_rank, "LOCAL_RANK": local_rank}
        environment = defaults | os.environ | {name: str(value) for name, value in (shared | own).items()}
        children.append(_start(command, environment, is_main_process=local_rank == 0))

    def forward(signum, _frame):
        for child in children:
            child.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, forward)
    return _exit_code(children, _wait(children))


def _start(command: Sequence[str], environment: dict[str, str], is_main_process: bool) -> subprocess.Popen:
    """Start one process in a session of its own: Ctrl-C in a terminal then reaches only the launcher, which forwards it once.

    The standard error of all but the main process goes through a pipe, so that they draw no progress bars.
    """
    options = {"env": environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
    if is_main_process:
        return subprocess.Popen(command, **options)
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)

    def copy_stderr() -> None:
        with child.stderr:
            for line in child.stderr:
                print(line, end="", file=sys.stderr, flush=True)

    threading.Thread(target=copy_stderr).start()
    return child


def _wait(children: Sequence[subprocess.Popen]) -> list[int]:
    """Wait for all processes. Returns the local ranks of those that failed on their own, first failure first.

    When one has failed, the others get a grace period, then SIGTERM, then SIGKILL.
    """
    failed, failed_at, terminated, grace_s = [], None, False, SAVING_S
    while any(child.poll() is None for child in children):
        time.sleep(0.05)
        waited = time.monotonic() - failed_at if failed_at else 0.0
        if waited < grace_s:  # later failures are the launcher's own doing
            failed += [rank for rank, child in enumerate(children) if child.poll() and rank not in failed]
        if any(children[rank].returncode not in STOPPED for rank in failed):
            grace_s = GRACE_S
        failed_at = failed_at or (time.monotonic() if failed else None)
        if waited > grace_s:
            for child in children:
                if waited > grace_s + SIGTERM_S:
                    child.kill()
                elif not terminated:
                    child.terminate()
            terminated = True
    return failed or [rank for rank, child in enumerate(children) if child.returncode]


def _exit_code(children: Sequence[subprocess.Popen], failed: Sequence[int]) -> int:
    """The exit code of the cause: a process that a signal ended, else the first one that did more than lose its peers."""
    codes = {rank: children[rank].returncode for rank in failed}
    signalled = [rank for rank, code in codes.items() if code < 0]
    if signalled and codes[signalled[0]] in (-signal.SIGTERM, -signal.SIGINT):
        return 128 - codes[signalled[0]]
    if signalled:
        name = signal.Signals(-codes[signalled[0]]).name
        raise ResourceError(
            f"process {signalled[0] + 1} of {len(children)} on this machine was ended by {name}, as the kernel does when memory "
            "runs out; run the same command again to resume from the last checkpoint"
        )
    causes = [code for code in codes.values() if code != ResourceError.exit_code]  # 6 is also the code of a lost peer
    return next(iter(causes or codes.values()), 0)
