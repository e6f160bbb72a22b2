"""What can go wrong, and the exit code each kind of failure ends with.

LoracatError
|-- SomeItemsFailed        1   done, but some items failed; each was named
|-- SettingsError          2   wrong usage or settings, a path that is set and absent included
|-- DataError              3   unusable input data, an empty data set included
|-- ComfyUIError           4   ComfyUI unreachable, or nothing came of it
|-- ModelError             5   model files missing or unusable
`-- ResourceError          6   no memory or no disk
Interruption
|-- MemoryShort           75   stopped by the memory guard; the state is saved
`-- Stopped          130/143   stopped by a signal; the state is saved

Rooms raise these; each script's main runs under `run_main`, which catches them once and prints one line.
An exception that is not in the tree is a bug: it ends with its traceback and exit code 70.
"""

import errno
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

EXIT_DONE = 0


EXIT_BUG = 70


MEMORY_SIGNAL = signal.SIGUSR1
"""What the memory guard sends to its own process."""


DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)


IN_THE_WAY_ERRNOS = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENODEV)


class LoracatError(Exception):
    """Base of all failures that are not bugs: the message says what, to what, and what to do next."""

    exit_code: int


class SomeItemsFailed(LoracatError):
    """The stage is done, but some items failed; each was reported when it happened."""

    exit_code = 1


class SettingsError(LoracatError):
    """A setting, a flag or a path named by a setting is wrong."""

    exit_code = 2


class DataError(LoracatError):
    """The images, captions or prompts cannot be used."""

    exit_code = 3


class ComfyUIError(LoracatError):
    """ComfyUI cannot be reached, refused the workflow, or nothing came of it."""

    exit_code = 4


class ModelError(LoracatError):
    """Model files are missing or cannot be used."""

    exit_code = 5


class ResourceError(LoracatError):
    """Memory or disk is exhausted, or a folder cannot be written to."""

    exit_code = 6


class Interruption(BaseException):
    """Base of what comes from outside at any instant; no library that catches `Exception` can swallow it."""

    exit_code: int


class MemoryShort(Interruption):
    """The machine's memory ran short while training; the state is saved."""

    exit_code = 75

    def __init__(self):
        super().__init__("stopped by the memory guard; close other programs, then run the same command again to continue")


class Stopped(Interruption):
    """A signal asked the stage to stop."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command again to continue")
        self.exit_code = 128 + signum


def bullet_list(title: str, problems: Sequence[str]) -> str:
    """`title` and every problem below it, so that a user mends all of them in one go."""
    return "\n".join([title, *(f"  - {problem}" for problem in problems)])


def run_checks(title: str, questions: Sequence[Callable[[], str]]) -> None:
    """`--check`: print the answer of every question; what the others raise becomes one list with the first one's exit code."""
    problems: list[LoracatError] = []
    for question in questions:
        try:
            print(question(), flush=True)
        except LoracatError as problem:
            problems.append(problem)
    if problems:
        raise type(problems[0])(bullet_list(title, [str(problem) for problem in problems]))


def reason_for(signum: int) -> Interruption:
    """Why a stage stops that this signal asked to."""
    return MemoryShort() if signum == MEMORY_SIGNAL else Stopped(signum)


def stop_on_signals() -> None:
    """From here on SIGTERM and SIGINT raise `Stopped` in the main thread, and MEMORY_SIGNAL `MemoryShort`; a second one
    ends the process at once."""

    def stop(signum):
        raise reason_for(signum)

    _on_first_signal(stop)


def _on_first_signal(act: Callable[[int], None]) -> None:
    signals = (signal.SIGTERM, signal.SIGINT, MEMORY_SIGNAL)

    def handle(signum, _frame):
        for each in signals:
            signal.signal(each, signal.SIG_IGN if each == MEMORY_SIGNAL else signal.SIG_DFL)
        act(signum)

    for each in signals:
        signal.signal(each, handle)


class StopRequest:
    """From its making on these signals only set `signum`, for a loop that ends between two items; a second one ends the
    process at once."""

    signum: int = 0
    """0: nobody asked."""

    def __init__(self):
        def note(signum):
            self.signum = signum

        _on_first_signal(note)


def run_main(stage: str, main: Callable[[], None]) -> int:
    """Run `main` and return the stage's exit code; a failure becomes one message on standard error."""
    try:
        main()
        return EXIT_DONE
    except (Exception, KeyboardInterrupt, Interruption) as error:
        known = as_loracat_error(error)
        if known is None:
            traceback.print_exc()
            print(f"{stage}: this is a bug in LoRACat; please report it with the lines above", file=sys.stderr)
            return EXIT_BUG
        print(f"{stage}: {known}", file=sys.stderr)
        return known.exit_code


def as_loracat_error(error: BaseException) -> LoracatError | Interruption | None:
    """The failure as a class of our tree, or None for a bug."""
    if isinstance(error, (LoracatError, Interruption)):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Stopped(signal.SIGINT)
    if isinstance(error, BrokenPipeError):
        return Stopped(signal.SIGPIPE)
    if isinstance(error, MemoryError):
        return ResourceError("out of memory: close other programs or lower the batch size")
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        place = f"{error.filename}: " if error.filename else ""
        return ResourceError(f"{place}{error.strerror}: free disk space, or make the folder writable for this user")
    if isinstance(error, OSError) and error.errno in IN_THE_WAY_ERRNOS and error.filename:
        return SettingsError(f"{error.filename}: {error.strerror}: move what lies there, or set another path or name")
    return None
