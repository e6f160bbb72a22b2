"""The contract of the shared folders: which files are images, where a caption lies, what the manifest says.

Standard library only: every stage meets the others here and nowhere else. A file gets its name when it is whole,
so "exists" never has to mean "maybe complete".

One run at a time.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import SettingsError

_UMASK = os.umask(0o077)  # the mask can only be read by setting it


os.umask(_UMASK)


@contextlib.contextmanager
def naming_oserror(path: Path) -> Iterator[None]:
    """Within it, an OSError that names no file, as that of a write to a full disk does not, names `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, that file is flushed and takes the name `path`.

    When the block raises, the temporary file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    os.close(handle)
    beside = Path(name)
    try:
        with naming_oserror(path):
            os.chmod(beside, 0o666 & ~_UMASK)
            yield beside
            _flush(beside)
            os.replace(beside, path)
            _flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed runs were writing into `folder`; a file that is younger than a minute may be somebody's work."""
    for beside in folder.glob(".*.part"):
        if beside.stat().st_mtime < time.time() - 60:
            beside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`: whole, or not at all."""
    with atomic_write(path) as beside:
        beside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with `\\n` line ends to `path`: whole, or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: object) -> None:
    """Write `content` as readable JSON to `path`: whole, or not at all."""
    write_text(path, _as_json(content))


def write_json_if_changed(path: Path, content: object) -> None:
    """The same, but a file that says so already is left alone: a stage that is done changes nothing."""
    if not (path.is_file() and path.read_bytes() == _as_json(content).encode("utf-8")):
        write_json(path, content)


def _as_json(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_json_line(path: Path, record: dict) -> None:
    """Append `record` as one line, flushed to the disk; half a line that a killed run left is closed first."""
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
    """The records of a JSON-lines file, [] if it does not exist; half a line that a killed run left is passed over."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def _flush(path: Path) -> None:
    """fsync a file, or a folder so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a `.safetensors` file's header; {} if it has none. Raises ValueError if there is no such header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is not a .safetensors file")
        header = json.loads(file.read(length))
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return metadata if isinstance(metadata, dict) else {}
