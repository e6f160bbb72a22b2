"""A process beside this one, with an interpreter lock of its own. Standard library only, so that it can begin at once."""

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

Made = TypeVar("Made")


_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


class WorkerProcess:
    """A process that waits for a function to call."""

    def __init__(self, initializer: Callable[[], None] | None):
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")  # a fork would take half of a CUDA context along
        self._process = context.Process(target=_serve, args=(theirs, os.getpid(), initializer), daemon=True)
        resource_tracker.ensure_running()  # its start would let signals through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        self._process.start()  # it never hears of signals: they are this process's to answer
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._connection = ours

    def call(self, function: Callable[..., Made], *arguments: object) -> Made:
        """What `function` returns or raises there; both and the arguments are pickled. Raises ResourceError if the process is
        gone."""
        try:
            self._connection.send((function, arguments))
            made, error = pickle.loads(self._connection.recv_bytes())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            ended = _ending(self._process.exitcode)
            raise ResourceError(f"a process that worked for this one {ended}; run the same command again") from None
        if error:
            raise error
        return made

    def call_and_close(self, function: Callable[..., Made], *arguments: object) -> Made:
        """The same, and the process is ended."""
        try:
            return self.call(function, *arguments)
        finally:
            self.end()

    def end(self) -> None:
        """At once, whatever it is doing; a thread waits until the kernel has taken its memory back."""
        if self._connection.closed:
            return
        self._process.kill()
        self._connection.close()
        threading.Thread(target=self._process.join, daemon=True).start()


@contextlib.contextmanager
def worker_process(initializer: Callable[[], None] | None = None, *, wanted: bool) -> Iterator[WorkerProcess | None]:
    """A process that calls `initializer` first, for as long as this block lasts; None if it is not wanted."""
    if not wanted:
        yield None
        return
    aside = WorkerProcess(initializer)
    try:
        yield aside
    finally:
        aside.end()


def die_with_parent(parent: int | None = None) -> None:
    """From now on the kernel kills this process when the one that started it is gone, however that happens. If `parent`
    started it and is gone already, it dies here."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if parent not in (None, os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)


def _serve(connection: Connection, parent: int, initializer: Callable[[], None] | None) -> None:
    """Answer one call after another, until the parent ends this process."""
    die_with_parent(parent)
    if initializer:
        initializer()
    while True:
        function, arguments = connection.recv()
        made, error = None, None
        try:
            made = function(*arguments)
        except Exception as raised:
            error = _picklable(raised)
        sys.stdout.flush()
        connection.send_bytes(pickle.dumps((made, error)))


def _picklable(error: Exception) -> Exception:
    """The exception with its traceback as a note; one that cannot be pickled becomes a RuntimeError that says the same."""
    story = "".join(traceback.format_exception(error))
    error.add_note(story)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception as unfit:
        return RuntimeError(f"{story}which cannot be pickled ({unfit})")
    return error


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed, as the kernel does when memory runs out"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
