"""The processes that a run starts: one per GPU for the training itself, and workers that run functions. Standard library only.

torchrun and accelerate set the same variables as `launch` and work as well, but turn every failure into exit code 1 and a
traceback, and do not wait after SIGTERM until the state is saved. This launcher forwards signals, gives rank 0 the time to save,
and exits with the exit code of the process that failed.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import TypeVar

from common.errors import MemoryShort, ResourceError
from training.config import ProcessSettings

Result = TypeVar("Result")

GRACE_S = 2.0
"""After a process has failed, the others have this long to fail as well and report why."""
SIGTERM_S = 10.0
"""Then they receive SIGTERM, and are killed after this time."""
STOPPED = (MemoryShort.exit_code, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a process that was asked to stop. Rank 0 exits last, because it saves the state."""
SAVING_S = 600.0
"""The grace period after one of these exit codes."""
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


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
    if not _is_launched():
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


def _is_launched() -> bool:
    """Whether a launcher started this process: some programs set one of these variables for themselves."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def needs_launcher(settings: ProcessSettings) -> bool:
    """Whether this process has to start the training processes instead of training itself."""
    return settings.num_processes * settings.num_machines > 1 and not _is_launched()


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
            "runs out; run the same command again (without FRESH=1) to resume from the last checkpoint"
        )
    causes = [code for code in codes.values() if code != ResourceError.exit_code]  # 6 is also the code of a lost peer
    return next(iter(causes or codes.values()), 0)


@contextlib.contextmanager
def worker_process(initializer: Callable[[], None] | None = None, *, enabled: bool) -> "Iterator[WorkerProcess | None]":
    """A worker process that exists while the block runs and calls `initializer` first; None if not `enabled`."""
    if not enabled:
        yield None
        return
    worker = WorkerProcess(initializer)
    try:
        yield worker
    finally:
        worker.end()


class WorkerProcess:
    """A process that waits for functions to call. SIGINT and SIGTERM are blocked in it; it dies with its parent."""

    def __init__(self, initializer: Callable[[], None] | None):
        self._connection, child_end = multiprocessing.Pipe()
        self._ending = threading.Lock()
        context = multiprocessing.get_context("spawn")  # a fork would copy half of a CUDA context
        self._process = context.Process(target=_serve, args=(child_end, os.getpid(), initializer), daemon=True)
        # The child inherits the signal mask. Starting the resource tracker resets it, so that has to happen before.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        self._process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        child_end.close()

    def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return what `function` returns in the worker, or raise what it raises; everything is pickled.

        Raises ResourceError if the worker has died.
        """
        try:
            self._connection.send((function, arguments))
            result, error = pickle.loads(self._connection.recv_bytes())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            ending = _describe_exit(self._process.exitcode)
            raise ResourceError(f"a worker process {ending}; run the same command again") from None
        if error:
            raise error
        return result

    def call_and_close(self, function: Callable[..., Result], *arguments: object) -> Result:
        """`call`, then end the worker."""
        try:
            return self.call(function, *arguments)
        finally:
            self.end()

    def end(self) -> None:
        """Kill the worker without waiting: a thread waits until the kernel has freed its memory. Any thread may call this."""
        with self._ending:
            if self._connection.closed:
                return
            self._process.kill()
            self._connection.close()
        threading.Thread(target=self._process.join, daemon=True).start()


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies, for whatever reason.

    `parent` is the process that started this one: if it is dead already, this process kills itself now.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent not in (None, os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)


def _serve(connection: Connection, parent: int, initializer: Callable[[], None] | None) -> None:
    """The worker's main loop: answer calls until the parent kills this process."""
    die_with_parent(parent)
    if initializer:
        initializer()
    while True:
        function, arguments = connection.recv()
        result, error = None, None
        try:
            result = function(*arguments)
        except Exception as raised:
            error = _picklable(raised)
        if sys.stdout:  # it may have been closed before the start
            sys.stdout.flush()
        connection.send_bytes(pickle.dumps((result, error)))


def _picklable(error: Exception) -> Exception:
    """`error` with its traceback as a note; if it cannot be pickled, a RuntimeError with the same text."""
    text = "".join(traceback.format_exception(error))
    error.add_note(text)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception as problem:
        return RuntimeError(f"{text}which cannot be pickled ({problem})")
    return error


def _describe_exit(code: int | None) -> str:
    if code is None:  # another thread has waited for its end
        return "was ended"
    if code == -signal.SIGKILL:
        return "was killed, as the kernel does when memory runs out"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
