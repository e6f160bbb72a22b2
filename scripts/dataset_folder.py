"""The contract of the shared folders: which files are pictures, where a caption lies, what the manifest says.

Standard library only: every stage meets the others here and nowhere else. A file gets its name when it is whole,
so "exists" never has to mean "maybe complete".
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_SUFFIX = ".txt"
RECORD_FOLDER = ".loracat"

_MAGIC_BYTES = (("png", b"\x89PNG\r\n\x1a\n"), ("jpeg", b"\xff\xd8\xff"), ("bmp", b"BM"))
_UMASK = os.umask(0o077)  # the mask can only be read by setting it
os.umask(_UMASK)
_REPEATS_FOLDER = re.compile(r"(\d{1,5})_.+")


@dataclass(frozen=True)
class DatasetFolder:
    """`DATASET_DIR` and what lies where in it."""

    root: Path

    @property
    def images(self) -> Path:
        """Pictures and their captions."""
        return self.root / "images"

    @property
    def manifest(self) -> Path:
        """One JSON line per collected picture."""
        return self.root / "manifest.jsonl"

    @property
    def records(self) -> Path:
        """What the stages write down for themselves."""
        return self.root / RECORD_FOLDER

    @property
    def audit(self) -> Path:
        """What the caption stage found to be wrong with pictures; training leaves those out if it is told to."""
        return self.records / "audit.json"


@dataclass(frozen=True)
class ImageFile:
    """A picture of the data set; `repeats` is how often one epoch shows it (`N_name` folders, else 1)."""

    path: Path
    repeats: int

    @property
    def caption_path(self) -> Path:
        """The same stem with `.txt`."""
        return caption_path(self.path)


def caption_path(image: Path) -> Path:
    """Where the caption of `image` lies."""
    return image.with_suffix(CAPTION_SUFFIX)


def caption_owners(images: Iterable[ImageFile]) -> dict[Path, ImageFile]:
    """Where captions lie -> the picture that each belongs to: of pictures with the same stem the first."""
    owners: dict[Path, ImageFile] = {}
    for image in images:
        owners.setdefault(image.caption_path, image)
    return owners


def name_in(folder: Path, path: Path) -> str:
    """What the records call a file in `folder`: its relative path; bytes of a name that are not UTF-8 become escapes."""
    return os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")


def find_images(folder: Path) -> list[ImageFile]:
    """All pictures in `folder` and in its `N_name` folders, sorted by relative path.

    Other folders, hidden files and files with another suffix are not pictures of the data set. A folder `0_name`
    holds pictures that are laid aside.
    """
    found = [ImageFile(path, 1) for path in _image_files(folder)]
    for child in folder.iterdir() if folder.is_dir() else ():
        if repeats := repeats_of(child):
            found += [ImageFile(path, repeats) for path in _image_files(child)]
    return sorted(found, key=lambda image: image.path.relative_to(folder).as_posix())


def repeats_of(folder: Path) -> int | None:
    """N of a folder `N_name`, None for every other entry."""
    match = _REPEATS_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match and folder.is_dir() else None


def _image_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file():
            yield path


def sniff_image_format(head: bytes) -> str | None:
    """`png`, `jpeg`, `webp` or `bmp` by the magic bytes in the first 12 bytes of a file, else None."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return next((name for name, magic in _MAGIC_BYTES if head.startswith(magic)), None)


@contextlib.contextmanager
def refusals_of(path: Path) -> Iterator[None]:
    """Within it, an OSError that names no file, as that of a write to a full disk does not, names `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, that file is flushed and takes the name `path`.

    When the block raises, the temporary file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    os.close(handle)
    beside = Path(name)
    try:
        with refusals_of(path):
            os.chmod(beside, 0o666 & ~_UMASK)
            yield beside
            _flush(beside)
            os.replace(beside, path)
            _flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs were writing into `folder`; a file that is younger than a minute may be somebody's work."""
    for beside in folder.glob(".*.part"):
        if beside.stat().st_mtime < time.time() - 60:
            beside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`: whole, or not at all."""
    with whole_file(path) as beside:
        beside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with `\\n` line ends to `path`: whole, or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: object) -> None:
    """Write `content` as readable JSON to `path`: whole, or not at all."""
    write_text(path, _as_json(content))


def update_json(path: Path, content: object) -> None:
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
    with refusals_of(path), path.open("ab+") as file:
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
