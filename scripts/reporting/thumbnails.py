"""Small copies of images as data URIs. They are cached, so that a report of an unchanged data set is written at once."""

import base64
import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from common.background import prefetch
from common.images import BrokenImageError, open_rgb

SIZE_PX = 192
_QUALITY, _METHOD = 62, 2
"""Of WebP: a slower method saves a tenth of the page and doubles the time."""
_MAX_WORKERS = 8


class Thumbnails:
    """The thumbnails in `folder`. Those that were not asked for are removed at the end: their images are gone or changed."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._used: set[str] = set()

    def of_all(self, paths: Iterable[Path], size_px: int = SIZE_PX) -> Iterator[str]:
        """The same of many images, in the order of `paths`, on every core."""
        cores = len(os.sched_getaffinity(0))
        return prefetch(partial(self.of, size_px=size_px), paths, workers=0 if cores == 1 else min(cores, _MAX_WORKERS))

    def of(self, path: Path, size_px: int = SIZE_PX) -> str:
        """A data URI of the image at `path`, at most `size_px` wide and high; "" if it cannot be read."""
        try:
            status = path.stat()
            key = f"{path.name}|{status.st_size}|{status.st_mtime_ns}|{size_px}"
            cached = self._folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.webp"
            self._used.add(cached.name)
            content = _read(cached)
            if not content:
                content = _make(path, size_px)
                _write(cached, content)
            return "data:image/webp;base64," + base64.b64encode(content).decode("ascii")
        except (OSError, BrokenImageError):
            return ""

    def __enter__(self) -> "Thumbnails":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None and self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.name not in self._used:
                    with contextlib.suppress(OSError):
                        path.unlink()


def _read(cached: Path) -> bytes:
    """A cached thumbnail; empty if it is missing or cut off."""
    with contextlib.suppress(OSError):
        content = cached.read_bytes()
        if content[:4] == b"RIFF" and int.from_bytes(content[4:8], "little") + 8 == len(content):
            return content
    return b""


def _write(cached: Path, content: bytes) -> None:
    """Cache a thumbnail, without waiting for the disk as `write_bytes` does; where that fails, the page is only slower."""
    temporary = cached.with_suffix(".part")
    with contextlib.suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(cached)


def _make(source: Path, size_px: int) -> bytes:
    image = open_rgb(source)
    image.thumbnail((size_px, size_px), reducing_gap=1.5)
    content = io.BytesIO()
    image.save(content, "webp", quality=_QUALITY, method=_METHOD)
    return content.getvalue()
