"""Small copies of images as data URIs. They are cached, so that a report of an unchanged data set is written at once."""

import base64
import contextlib
import hashlib
import os
from pathlib import Path

from common.files import write_bytes
from common.images import BrokenImageError, open_rgb

SIZE_PX = 192
_QUALITY = 62


class Thumbnails:
    """The thumbnails in `folder`. Those that were not asked for are removed at the end: their images are gone or changed."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._used: set[str] = set()

    def of(self, path: Path, size_px: int = SIZE_PX) -> str:
        """A data URI of the image at `path`, at most `size_px` wide and high; "" if it cannot be read."""
        try:
            status = path.stat()
            key = f"{path.name}|{status.st_size}|{status.st_mtime_ns}|{size_px}"
            cached = self._folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.webp"
            if not cached.exists():
                _make(path, cached, size_px)
            self._used.add(cached.name)
            return "data:image/webp;base64," + base64.b64encode(cached.read_bytes()).decode("ascii")
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


def _make(source: Path, target: Path, size_px: int) -> None:
    import io

    image = open_rgb(source)
    image.thumbnail((size_px, size_px))
    content = io.BytesIO()
    image.save(content, "webp", quality=_QUALITY, method=4)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, content.getvalue())
