"""One run at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import SettingsError


@contextmanager
def locked(place: Path, refusal: str) -> Iterator[None]:
    """Hold the file or folder `place`, which exists; the system lets go of it however the process ends.

    Raises SettingsError with `refusal` if another run holds it. File systems that know no locks keep nobody out.
    """
    handle = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(refusal) from None
        except OSError as error:
            print(f"{place}: {error.strerror}: nothing keeps a second run out")
        yield
    finally:
        os.close(handle)
