"""A second Python process that runs functions for this one, without sharing its interpreter lock. Standard library only."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import TypeVar

from common.errors import ResourceError

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


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
        """Kill the worker without waiting: a thread waits until the kernel has freed its memory."""
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


def _describe_exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed, as the kernel does when memory runs out"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
