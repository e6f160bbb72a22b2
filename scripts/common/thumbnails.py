"""Small copies of images as data URIs. They are cached, so that a report of an unchanged data set is written at once.

Decoding an image takes ten times as long as making the copy: stages that have decoded it leave one for the report.
"""

import base64
import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from PIL import Image, ImageChops, ImageFilter

from common.background import prefetch
from common.images import BrokenImageError, read_image, read_mask

SIZE_PX, SAMPLE_PX = 192, 320
"""Longest sides: of images of the data set, and of sample images."""
_QUALITY, _METHOD = 62, 2
"""Of WebP: a slower method saves a tenth of the page and doubles the time."""
OUTLINE = "magenta"
_OUTLINE_PX = 2
_MAX_WORKERS = 8


class Thumbnails:
    """The thumbnails in `folder`. Those that were not asked for are removed at the end: their images are gone or changed."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._used: set[str] = set()
        self.outlined: set[Path] = set()
        """The images whose thumbnails show the outline of a mask."""

    def of_all(self, paths: Iterable[Path], size_px: int = SIZE_PX, masks: Mapping[Path, Path] | None = None) -> Iterator[str]:
        """The same of many images, in the order of `paths`, on every core; `masks`: image -> its mask, or itself for its
        transparency."""
        cores, found = len(os.sched_getaffinity(0)), masks or {}
        workers = 0 if cores == 1 else min(cores, _MAX_WORKERS)
        return prefetch(lambda path: self.of(path, size_px, found.get(path)), paths, workers)

    def of(self, path: Path, size_px: int = SIZE_PX, mask: Path | None = None) -> str:
        """A data URI of the image at `path`, at most `size_px` wide and high, with the outline of its mask; "" if it cannot be
        read."""
        try:
            plain = self._file(path, size_px, mask)
            outlined = plain.with_stem(f"{plain.stem}-mask")
            content = _read(outlined) if mask else b""
            cached = outlined if content else plain
            content = content or _read(plain)
            if not content:
                content, has_outline = _make(path, size_px, mask)
                cached = outlined if has_outline else plain
                _write(cached, content)
            self._used.add(cached.name)
            if cached == outlined:
                self.outlined.add(path)
            return "data:image/webp;base64," + base64.b64encode(content).decode("ascii")
        except (OSError, BrokenImageError):
            return ""

    def add(self, path: Path, image: Image.Image, size_px: int = SIZE_PX) -> None:
        """Keep the thumbnail of the file at `path`, which has been decoded to `image`."""
        with contextlib.suppress(OSError):
            _write(self._file(path, size_px), _encoded(_small(image.copy(), size_px)))

    def _file(self, path: Path, size_px: int, mask: Path | None = None) -> Path:
        key = f"{_stamp(path)}|{size_px}" + (f"|{_stamp(mask)}" if mask else "")
        return self._folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.webp"

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


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path.name}|{status.st_size}|{status.st_mtime_ns}"


def _make(source: Path, size_px: int, mask: Path | None) -> tuple[bytes, bool]:
    """The thumbnail, and whether it shows the outline of the mask; an opaque image has none."""
    image, has_outline = _small(read_image(source, least_px=size_px).rgb, size_px), False
    if mask:
        with contextlib.suppress(BrokenImageError):  # training reports it
            if alpha := read_mask(mask, source).alpha:
                inside = alpha.resize(image.size).point(lambda level: 255 if level > 127 else 0)
                wider = inside.filter(ImageFilter.MaxFilter(2 * _OUTLINE_PX + 1))
                image.paste(Image.new("RGB", image.size, OUTLINE), mask=ImageChops.subtract(wider, inside))
                has_outline = True
    return _encoded(image), has_outline


def _small(image: Image.Image, size_px: int) -> Image.Image:
    """`image`, scaled down in place."""
    image.thumbnail((size_px, size_px), reducing_gap=1.5)
    return image


def _encoded(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "webp", quality=_QUALITY, method=_METHOD)
    return content.getvalue()
