"""What one image looks like, in the few numbers that tell whether it is fit for training.

Every image of the data set is looked at once: `dataset/.loracat/pictures.json` remembers its hash and its look.

An image is known by the size and times of its file; if one of them changes, it is looked at anew.

What is wrong with the data set: a check that only reports. `dataset/.loracat/audit.json` and a short table.

Training leaves flagged images out if SKIP_FLAGGED=1; nothing is deleted.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.background import prefetch
from common.dataset_layout import (
    CAPTION_SUFFIX,
    IMAGE_SUFFIXES,
    DatasetFolder,
    ImageFile,
    find_images,
    name_in,
    repeats_of,
)
from common.files import sha256_of, write_json
from common.images import BrokenImageError, open_rgb

GREY_SIDE_PX = 512
"""Sharpness and brightness are judged at this size, whatever the image's own."""


HASH_SIDE = 16
"""The perceptual hash has HASH_SIDE² bits. 64 bits cannot tell two expressions in front of the same background apart."""


_WINDOW_PX = 9


_TILES = 4


_FLAT = 0.5
"""A tile whose neighbouring pixels differ by less than this, of 255, is an even surface: neither sharp nor blurred."""


@dataclass(frozen=True)
class Look:
    """One decoded image."""

    width: int
    """Pixels, after EXIF orientation."""
    height: int
    animated: bool
    blur: float
    """0 sharp .. 1 blurred, of the sharpest part: a blurred background is no fault."""
    dark: int
    """Grey level, 0..255, that one pixel of a hundred lies below."""
    bright: int
    """Grey level that one pixel of a hundred lies above."""
    hash: str
    """Perceptual hash, hexadecimal, HASH_SIDE² bits."""


def look_at(path: Path) -> Look:
    """Decode the image at `path` and measure it. Raises BrokenImageError if the stages cannot use it."""
    image = open_rgb(path)
    grey = image.convert("L")
    grey.thumbnail((GREY_SIDE_PX, GREY_SIDE_PX), Image.Resampling.BOX)
    levels = np.asarray(grey, dtype=np.float32)
    dark, bright = np.percentile(levels, (1, 99))
    return Look(
        width=image.width,
        height=image.height,
        animated=_is_animated(path),
        blur=round(blur(levels), 3),
        dark=int(dark),
        bright=int(bright),
        hash=perceptual_hash(grey),
    )


def perceptual_hash(grey: Image.Image) -> str:
    """HASH_SIDE² bits, hexadecimal: which of the lowest frequencies of the image are stronger than their median.

    The bits are those of ImageHash's `phash`: a Lanczos resize to a square of 4 x HASH_SIDE pixels, then a DCT of type II
    without normalisation along both axes. http://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html
    """
    side = 4 * HASH_SIDE
    levels = np.asarray(grey.resize((side, side), Image.Resampling.LANCZOS), dtype=np.float64)
    low = _dct(_dct(levels, axis=0), axis=1)[:HASH_SIDE, :HASH_SIDE]
    return np.packbits(low > np.median(low)).tobytes().hex()


def _dct(values: np.ndarray, axis: int) -> np.ndarray:
    """The discrete cosine transform of type II along `axis`: the FFT of the values followed by their mirror image.

    A product with a matrix of cosines is not as exact: where coefficients are 0, as in even surfaces, it leaves rounding
    errors, and the bits of the hash would depend on them.
    """
    values = np.moveaxis(values, axis, -1)
    count = values.shape[-1]
    spectrum = np.fft.rfft(np.concatenate([values, values[..., ::-1]], axis=-1))[..., :count]
    return np.moveaxis((spectrum * np.exp(-0.5j * np.pi * np.arange(count) / count)).real, -1, axis)


def blur(levels: np.ndarray) -> float:
    """Grey `levels` float32 [height, width], 0..255 -> 0 sharp .. 1 blurred, of the sharpest of 4 x 4 tiles.

    Crété et al. 2007, "The blur effect": how much of the variation between neighbours survives a blur along that axis.
    In a sharp image little does. The greater value of both axes counts, so motion blur is blur. 0 for an even surface.
    """
    if min(levels.shape) < 2 * _WINDOW_PX:
        return 0.0
    return max(_sharpest_tile(axis_last) for axis_last in (levels, levels.T))


def _sharpest_tile(levels: np.ndarray) -> float:
    """The same along the last axis."""
    padded = np.pad(levels, [(0, 0), (_WINDOW_PX // 2 + 1, _WINDOW_PX // 2)], mode="edge")
    sums = np.cumsum(padded, axis=1, dtype=np.float64)
    softened = (sums[:, _WINDOW_PX:] - sums[:, :-_WINDOW_PX]) / _WINDOW_PX
    steps = np.abs(np.diff(levels, axis=1))
    lost = np.maximum(steps - np.abs(np.diff(softened, axis=1)), 0)
    values = [
        1 - float(lost_in.sum() / steps_in.sum())
        for steps_in, lost_in in zip(_tiles(steps), _tiles(lost), strict=True)
        if steps_in.mean() > _FLAT
    ]
    return min(values, default=0.0)


def _tiles(values: np.ndarray) -> list[np.ndarray]:
    return [tile for rows in np.array_split(values, _TILES) for tile in np.array_split(rows, _TILES, axis=1)]


def _is_animated(path: Path) -> bool:
    with Image.open(path) as image:
        return getattr(image, "is_animated", False)


_FORMAT = 1
"""Another number, and every image is looked at anew: to be raised when `Look` changes."""


@dataclass(frozen=True)
class KnownImage:
    """An image that was looked at."""

    name: str
    """Path relative to the folder of images."""
    stamp: tuple[int, ...]
    """Size in bytes, times of change of content and of entry in ns."""
    sha256: str
    """Of the file's bytes; empty if it cannot be read."""
    look: Look | None
    broken: str = ""
    """Why there is no look: what is wrong with the image."""


def stamp_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is written, replaced or moved."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def look_at_all(folder: DatasetFolder, images: Sequence[ImageFile], workers: int) -> dict[Path, KnownImage]:
    """Every image of `images`, by its path; only those that are new or changed are decoded, by `workers` threads."""
    record = folder.records / "pictures.json"
    remembered = _read(record)
    named = {image.path: name_in(folder.images, image.path) for image in images}
    new = [(path, name) for path, name in named.items() if not _is_current(remembered.get(name), path)]
    with tqdm(total=len(new), desc="looking at the images", unit="image", disable=None) as bar:
        for entry in prefetch(lambda item: _looked_at(*item), new, workers):
            remembered[entry.name] = entry
            bar.update()
    known = {path: remembered[name] for path, name in named.items()}
    write_json(record, {"format": _FORMAT, "pictures": [dataclasses.asdict(entry) for entry in known.values()]})
    return known


def _is_current(image: KnownImage | None, path: Path) -> bool:
    return image is not None and bool(image.sha256) and image.stamp == stamp_of(path)


def _looked_at(path: Path, name: str) -> KnownImage:
    stamp, sha256 = (), ""
    try:
        stamp, sha256 = stamp_of(path), sha256_of(path)
        return KnownImage(name, stamp, sha256, look_at(path))
    except OSError as error:
        return KnownImage(name, stamp, "", None, f"cannot be read: {error.strerror}")
    except BrokenImageError as error:
        return KnownImage(name, stamp, sha256, None, str(error))


def _read(record: Path) -> dict[str, KnownImage]:
    """What is remembered, by name; nothing if the record is damaged or of another format."""
    try:
        content = json.loads(record.read_bytes())
        entries = content["pictures"] if content["format"] == _FORMAT else []
        return {entry["name"]: _image(entry) for entry in entries}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _image(entry: dict) -> KnownImage:
    look = Look(**entry["look"]) if entry["look"] else None
    return KnownImage(**entry | {"stamp": tuple(entry["stamp"]), "look": look})


LEAST_SHARE_OF_AREA = 0.9
"""Of resolution²: SDXL's own sizes go down to 0.91 of it, 640x1536; a smaller image is trained in less detail."""


MOST_BLUR = 0.45
"""Sharp photographs have 0.1 to 0.3; at 1024 px, a Gaussian blur of 4 px gives 0.45 to 0.65, one of 8 px 0.6 to 0.85."""


NEARLY_BLACK, NEARLY_WHITE = 24, 240
"""Grey levels: 99 of 100 pixels lie below the first, or above the second."""


MOST_DIFFERENT_BITS = 32
"""Of 256: a copy in another size, format or brightness differs in 0 to 20, other photographs in more than 90."""


_NAMES_SHOWN = 4


UNREADABLE, TOO_SMALL, DUPLICATE = "unreadable", "too small", "near-duplicate"


BLURRED, BLACK, WHITE, ANIMATED = "blurred", "nearly black", "nearly white", "animated"


@dataclass(frozen=True)
class Audit:
    """What was found; all names are relative to the folder of images."""

    images: int
    resolution: int
    """Pixels, of the training."""
    flagged: dict[str, dict[str, str]] = field(default_factory=dict)
    """Image -> what kind of flaw it has -> the flaw in words."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Of every flagged image: an image that took its name later is another one."""
    captions_without_image: tuple[str, ...] = ()
    not_looked_at: dict[str, str] = field(default_factory=dict)
    """Entries that a person may take for images of the data set -> what they are."""


def audit_of(folder: DatasetFolder, images: Sequence[ImageFile], known: dict[Path, KnownImage], resolution: int) -> Audit:
    """The flaws of all `images`, whose looks are `known`, for a training at `resolution` px."""
    entries = [known[image.path] for image in images]
    duplicates = near_duplicates(entries)
    flagged = {}
    for entry in entries:
        flaws = dict(_flaws(entry, resolution))
        if entry.name in duplicates:
            flaws[DUPLICATE] = f"looks like {duplicates[entry.name]}"
        if flaws:
            flagged[entry.name] = flaws
    return Audit(
        images=len(entries),
        resolution=resolution,
        flagged=flagged,
        sha256={entry.name: entry.sha256 for entry in entries if entry.name in flagged},
        captions_without_image=tuple(_orphans(folder.images, images)),
        not_looked_at=dict(_others(folder.images, images)),
    )


def _flaws(image: KnownImage, resolution: int) -> Iterator[tuple[str, str]]:
    look = image.look
    if look is None:
        yield UNREADABLE, image.broken
        return
    if look.width * look.height < LEAST_SHARE_OF_AREA * resolution**2:
        yield TOO_SMALL, f"{look.width}x{look.height} px, less than a bucket of {resolution}x{resolution} px holds"
    if look.bright < NEARLY_BLACK:
        yield BLACK, "is nearly black"
    if look.dark > NEARLY_WHITE:
        yield WHITE, "is nearly white"
    if look.blur > MOST_BLUR:
        yield BLURRED, f"is blurred everywhere ({look.blur:.2f} of 1)"
    if look.animated:
        yield ANIMATED, "is an animation, of which only the first frame counts"


def near_duplicates(images: Sequence[KnownImage]) -> dict[str, str]:
    """Name -> name of the better image that it looks like: the largest of a group stays, the first among equals."""
    seen = sorted((image for image in images if image.look), key=lambda image: -_area(image.look))
    hashes = np.array([_bits(image.look) for image in seen], dtype=np.uint64).reshape(len(seen), HASH_SIDE * HASH_SIDE // 64)
    like: dict[str, str] = {}
    for index, image in enumerate(seen):
        if image.name in like:
            continue
        differing = np.bitwise_count(hashes[index + 1 :] ^ hashes[index]).sum(axis=1)
        for other in np.flatnonzero(differing <= MOST_DIFFERENT_BITS):
            like.setdefault(seen[index + 1 + other].name, image.name)
    return like


def write(audit: Audit, folder: DatasetFolder) -> None:
    """Write `audit.json`."""
    content = {
        "resolution": audit.resolution,
        "pictures": audit.images,
        "flagged": {name: {"sha256": audit.sha256[name], "flaws": flaws} for name, flaws in audit.flagged.items()},
        "captions_without_picture": list(audit.captions_without_image),
        "not_looked_at": audit.not_looked_at,
    }
    write_json(folder.audit, content)


def table(audit: Audit) -> str:
    """The findings in a few lines, one for each kind; `audit.json` has all of them."""
    by_kind: dict[str, list[str]] = {}
    for name, flaws in audit.flagged.items():
        for kind, words in flaws.items():
            by_kind.setdefault(kind, []).append(f"{name} ({words})" if kind in (UNREADABLE, DUPLICATE) else name)
    if audit.captions_without_image:
        by_kind["caption without an image"] = list(audit.captions_without_image)
    if audit.not_looked_at:
        by_kind["not looked at"] = [f"{name} ({what})" for name, what in audit.not_looked_at.items()]
    if not by_kind:
        return f"the images: nothing found wrong with any of the {audit.images}"
    title = f"the images: {len(audit.flagged)} of {audit.images} are flagged, at {audit.resolution} px (all in .loracat/audit.json)"
    advice = ["SKIP_FLAGGED=1 leaves flagged images out of training"] if audit.flagged else []
    return "\n".join([title, *(f"  {kind:25} {len(names):5}  {_some(names)}" for kind, names in by_kind.items()), *advice])


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _orphans(folder: Path, images: Sequence[ImageFile]) -> Iterator[str]:
    """Captions whose image is missing."""
    captions = {image.caption_path for image in images}
    for path in _entries(folder, images):
        if path.suffix.lower() == CAPTION_SUFFIX and path not in captions:
            yield name_in(folder, path)


def _others(folder: Path, images: Sequence[ImageFile]) -> Iterator[tuple[str, str]]:
    """Folders and links that are no images although their names say so, and folders of images that are not walked."""
    walked = {image.path.parent for image in images}
    for path in _entries(folder, images):
        is_named_so = path.suffix.lower() in IMAGE_SUFFIXES
        if is_named_so and not path.exists():
            yield name_in(folder, path), "a link to nothing"
        elif is_named_so and path.is_dir():
            yield name_in(folder, path), "a folder"
        elif path.is_dir() and path not in walked and repeats_of(path) != 0 and find_images(path):
            yield name_in(folder, path), "a folder with images; call it N_name for N repeats to use it"


def _entries(folder: Path, images: Sequence[ImageFile]) -> Iterator[Path]:
    """Everything that lies where images lie, hidden files left out."""
    for place in sorted({folder, *(image.path.parent for image in images)}):
        yield from sorted(path for path in place.iterdir() if not path.name.startswith("."))


def _area(look: Look) -> int:
    return look.width * look.height


def _bits(look: Look) -> list[int]:
    """The hash in words of 64 bits."""
    digits = look.hash.zfill(HASH_SIDE * HASH_SIDE // 4)
    return [int(digits[start : start + 16], 16) for start in range(0, len(digits), 16)]
