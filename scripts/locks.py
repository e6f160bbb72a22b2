"""One run at a time in a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import SettingsError


@contextmanager
def only_run_in(folder: Path, doing: str) -> Iterator[None]:
    """Keep other runs that do the same out of `folder`, which exists; the system lets go of it however the process ends.

    Raises SettingsError if another run is there. File systems that know no locks keep nobody out.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"another run is {doing} {folder}: wait for it to end") from None
        except OSError as error:
            print(f"{folder}: {error.strerror}: nothing keeps a second run out")
        yield
    finally:
        os.close(handle)
