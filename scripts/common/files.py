"""Files that are complete or absent: atomic writes, JSON lines, hashes and locks. Standard library only.

A file gets its name only when it is complete, so every stage can take "exists" for "complete".
"""

import codecs
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import SettingsError

_PARTIAL = re.compile(r"\..+\.part|\.tmp[A-Za-z0-9]{6}")
_UMASK = os.umask(0o077)  # the mask can only be read by setting it
os.umask(_UMASK)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; when the block ends, that file is flushed to disk and renamed to `path`.

    If the block raises, the temporary file is removed and `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        with naming_oserror(path):
            os.chmod(temporary, 0o666 & ~_UMASK)
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)  # so that the new name survives a power cut
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial_files(folder: Path, min_age_s: float = 60) -> None:
    """Remove temporary files of killed writers in `folder`: those of `atomic_write` and of safetensors. Younger ones stay, because
    they may belong to a run at work; 0 removes all, for a folder that this process has locked."""
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            if _PARTIAL.fullmatch(path.name) and path.is_file() and path.stat().st_mtime <= time.time() - min_age_s:
                path.unlink()


def open_file(path: Path) -> BinaryIO:
    """Open a regular file, or /dev/null, for reading. Raises OSError for anything else: a pipe may wait for ever, and a device has
    no end."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode) and not os.path.samestat(status, os.stat(os.devnull)):
        raise OSError(errno.ENODEV, "Not a regular file", str(path))
    return path.open("rb")


def read_file(path: Path, most_bytes: int = -1) -> bytes:
    """The content of a regular file, or its first `most_bytes`. Raises OSError like `open_file`."""
    with open_file(path) as file:
        return file.read(most_bytes)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: object) -> None:
    """Write `content` to `path` atomically, as indented JSON. A file that holds exactly that already is not touched."""
    encoded = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
    if not (path.is_file() and path.read_bytes() == encoded):
        write_bytes(path, encoded)


def write_cached_json(path: Path, content: dict[str, Any]) -> None:
    """`write_json` with a checksum of `content` as one more key, `checksum`: for what is only computed again if it is damaged."""
    write_json(path, content | {"checksum": _checksum(content)})


def read_cached_json(path: Path) -> dict[str, Any]:
    """What `write_cached_json` wrote, without the checksum; {} if it is missing or damaged. One without a checksum is trusted."""
    try:
        content = parse_json(read_file(path))
        checksum = content.pop("checksum", None)
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return content if checksum in (None, _checksum(content)) else {}


def _checksum(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def append_json_line(path: Path, record: dict) -> None:
    """Append `record` as one line and flush it to disk. An incomplete line that a killed run left is terminated first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
    with naming_oserror(path), path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict]:
    """The records of a JSON-lines file, [] if it does not exist. Lines that are not a JSON object are skipped."""
    if not path.exists():
        return []
    records = []
    for line in read_file(path).split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8, or in UTF-16 with a byte order mark. Raises ValueError with the reason if it is none."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return json.loads(content.decode("utf-16" if is_utf16 else "utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def as_object(value: Any) -> dict[str, Any]:
    """`value` if it is a JSON object, else {}."""
    return value if isinstance(value, dict) else {}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock on the existing file or folder `path`. The kernel releases it however the process ends.

    Raises SettingsError with `refusal` if another process holds it. Prints a warning on file systems without locks.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(refusal) from None
        except OSError as error:
            print(f"{path}: cannot be locked ({error.strerror}); do not start a second run at the same time")
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming_oserror(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file, such as that of a write to a full disk; one of a renaming names the new name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename2 or error.filename or str(path)
        raise


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest of its parents that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def write_problem(folder: Path) -> str | None:
    """Why this user cannot create files in `folder`, which need not exist yet, and the remedy; None if they can."""
    nearest = nearest_existing(folder)
    if not nearest.is_dir():
        return f"{nearest} is in the way: it is not a folder; move it"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"{nearest} cannot be written to; make it writable for this user"
    return None
