"""Failures, signals, and the exit code of each.

LoracatError
|-- SomeItemsFailed        1   done, but some items failed; each was named
|-- SettingsError          2   wrong usage or settings, including a path that does not exist
|-- DataError              3   unusable input data, including an empty data set
|-- ComfyUIError           4   ComfyUI unreachable, or it returned nothing
|-- ModelError             5   model files missing or unusable
`-- ResourceError          6   no memory or no disk
Interruption
|-- MemoryShort           75   stopped by the memory guard; the state is saved
`-- Stopped      130/141/143   stopped by a signal; the state is saved

Modules raise these; each script's main runs under `run_main`, which catches them once and prints one line.
Any other exception is a bug: it is printed with its traceback, and the exit code is 70.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from common.masking import mask_secrets

EXIT_DONE = 0
EXIT_BUG = 70
MEMORY_SIGNAL = signal.SIGUSR1
"""What the memory guard sends to its own process."""
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
PATH_ERRNOS = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENODEV)


class LoracatError(Exception):
    """Base of all failures that are not bugs. The message says what is wrong, with what, and what to do."""

    exit_code: int


class SomeItemsFailed(LoracatError):
    """The stage is done, but some items failed; each has been reported."""

    exit_code = 1


class SettingsError(LoracatError):
    """A setting, a flag or a path named by a setting is wrong."""

    exit_code = 2


class DataError(LoracatError):
    """The images, captions or prompts cannot be used."""

    exit_code = 3


class ComfyUIError(LoracatError):
    """ComfyUI cannot be reached, refuses the workflow, or returns nothing."""

    exit_code = 4


class ModelError(LoracatError):
    """Model files are missing or cannot be used."""

    exit_code = 5


class ResourceError(LoracatError):
    """Memory or disk is exhausted, or a folder cannot be written to."""

    exit_code = 6


class Interruption(BaseException):
    """Base of the requests to stop. A BaseException, so that a library that catches `Exception` cannot swallow it."""

    exit_code: int


class MemoryShort(Interruption):
    """The memory guard asked the stage to stop."""

    exit_code = 75


class Stopped(Interruption):
    """A signal asked the stage to stop."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command again to resume")
        self.exit_code = 128 + signum


def run_main(stage: str, main: Callable[[], None]) -> int:
    """Run `main` and return the exit code of the stage; a failure becomes one message on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may contain what cannot be encoded
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()  # a reader that has closed the pipe is noticed now, while it can still set the exit code
        return EXIT_DONE
    except (Exception, KeyboardInterrupt, Interruption) as error:
        known = as_loracat_error(error)
        with contextlib.suppress(BrokenPipeError):
            if known is not None:
                print(f"{stage}: {mask_secrets(str(known))}", file=sys.stderr)
            else:
                print(mask_secrets(traceback.format_exc()), end="", file=sys.stderr)
                print(f"{stage}: this is a bug in LoRACat; please report it with the lines above", file=sys.stderr)
        return EXIT_BUG if known is None else known.exit_code
    finally:
        _flush_or_discard()


def _flush_or_discard() -> None:
    """Empty the streams: Python does so when it exits, where a closed pipe changes the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def as_loracat_error(error: BaseException) -> LoracatError | Interruption | None:
    """The failure as one of the classes above, or None for a bug."""
    if isinstance(error, (LoracatError, Interruption)):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Stopped(signal.SIGINT)
    if isinstance(error, BrokenPipeError):
        return Stopped(signal.SIGPIPE)
    if isinstance(error, MemoryError):
        return ResourceError("out of memory: close other programs or lower the batch size")
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        path = f"{error.filename}: " if error.filename else ""
        remedy = "free disk space, or make the folder writable for this user"
        if error.errno in (errno.EACCES, errno.EPERM):
            remedy = "give this user the permission to read it, or make the folder writable for this user"
        return ResourceError(f"{path}{error.strerror}: {remedy}")
    if isinstance(error, OSError) and error.errno in PATH_ERRNOS and error.filename:
        return SettingsError(f"{error.filename}: {error.strerror}: move what is there, or set another path or name")
    return None


def bullet_list(title: str, problems: Sequence[str]) -> str:
    """`title` with every problem on a line below it, so that the user can fix all of them at once."""
    return "\n".join([title, *(f"  - {problem}" for problem in problems)])


def abbreviated(names: Sequence[object], most: int = 5) -> str:
    """The names, separated by commas; of a long list the first ones and the number of the others."""
    listed = ", ".join(str(name) for name in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def run_checks(title: str, checks: Sequence[Callable[[], str]]) -> None:
    """Run every check of `--check` and print the result of each.

    What they raise becomes one list, raised as the class of the first problem.
    """
    problems: list[LoracatError] = []
    for check in checks:
        try:
            print(check(), flush=True)
        except LoracatError as problem:
            problems.append(problem)
    if problems:
        raise type(problems[0])(bullet_list(title, list(dict.fromkeys(map(str, problems)))))


def interruption_for(signum: int) -> Interruption:
    """The exception for a signal that asks the stage to stop."""
    if signum == MEMORY_SIGNAL:
        return MemoryShort("stopped by the memory guard; close other programs, then run the same command again to resume")
    return Stopped(signum)


def stop_on_signals() -> None:
    """From now on SIGTERM, SIGINT and MEMORY_SIGNAL raise an Interruption in the main thread. A second SIGTERM or SIGINT ends the
    process at once."""

    def stop(signum):
        raise interruption_for(signum)

    _on_first_signal(stop)


@contextlib.contextmanager
def exit_on_signals(stage: str) -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT end the process at once with their message and exit code.

    For imports, before there is anything to save: an exception that a signal raises inside a library's import may be replaced by
    another one, and inside torch's it aborts the process.
    """

    def end(signum: int, _frame: object) -> None:
        stopped = Stopped(signum)
        print(f"{stage}: {stopped}", file=sys.stderr, flush=True)
        os._exit(stopped.exit_code)

    before = {signum: signal.signal(signum, end) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class StopRequest:
    """From its creation on, the same signals only set `signum`, for a loop that stops between two items."""

    def __init__(self):
        self.signum = 0
        """0: no signal has arrived."""

        def note(signum):
            self.signum = signum

        _on_first_signal(note)


def _on_first_signal(act: Callable[[int], None]) -> None:
    signals = (signal.SIGTERM, signal.SIGINT, MEMORY_SIGNAL)

    def handle(signum, _frame):
        for each in signals:
            signal.signal(each, signal.SIG_IGN if each == MEMORY_SIGNAL else signal.SIG_DFL)
        act(signum)

    for each in signals:
        signal.signal(each, handle)
