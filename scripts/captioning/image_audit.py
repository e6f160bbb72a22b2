"""Every image of the data set is measured once, and the flaws of all images are reported; nothing is changed or deleted.

The measurements are recorded in `dataset/.loracat/pictures.json`: an image whose file has the same size and times of change
is not measured again. The flaws are recorded in `dataset/.loracat/audit.json`: training skips flagged images if SKIP_FLAGGED=1.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioning.image_stats import HASH_SIDE, ImageStats, measure
from common.background import prefetch
from common.dataset_layout import CAPTION_SUFFIXES, DatasetFolder, ImageFile, name_in, own_resolutions
from common.files import read_cached_json, sha256_of, write_cached_json, write_json
from common.images import BrokenImageError
from common.progress import ProgressBar
from common.thumbnails import Thumbnails
from common.unused_entries import unused_entries

INDEX_FORMAT = 3
"""To be raised when ImageStats or the pixels of any image change: every image is then measured again."""
MIN_SHARE_OF_AREA = 0.9
"""Of resolution²: SDXL's own sizes go down to 0.91 of it, 640x1536; a smaller image is trained in less detail."""
MAX_BLUR = 0.45
"""Sharp photographs have 0.1 to 0.3; at 1024 px, a Gaussian blur of 4 px gives 0.45 to 0.65, one of 8 px 0.6 to 0.85."""
NEARLY_BLACK, NEARLY_WHITE = 24, 240
"""Grey levels: 99 % of the pixels are darker than the first, or brighter than the second."""
MAX_DUPLICATE_BITS = 32
"""Of 256: a copy in another size, format or brightness differs in 0 to 20 bits, other photographs in more than 90."""
_COMPARED_AT_ONCE = 512
"""Images that are compared with all others in one product of matrices; more would need more memory."""
MIN_TINT, MIN_TINT_SHARE = 6.0, 0.7
"""A cast: a tint of this strength towards the common direction, in this share of the images. Of random sets of 19 different
photographs none has it in more than 53 % of the images; under a planted light of (1.1, 1, 0.7), (0.6, 1, 1.3) or
(0.85, 1.1, 0.85) in linear RGB, 99 % of the sets are reported, and under (1.05, 1, 0.8) 84 %."""
SAME_EDGES, MIN_SAME_SHARE = 30, 0.5
"""Of 255: the edges of two images are the same if half of their cells differ by less. In sets of 12 different photographs at
most 17 % are the same as any one of them, with people in front of one background about 80 %."""
MIN_SET = 8
"""Fewer images are not judged as a set."""
_TINTS = ("red", "orange", "yellow", "yellowish green", "green", "cyan", "blue", "magenta")
"""Names of the directions in the plane of a* and b*, from a* on, every 45 degrees."""

UNREADABLE, TOO_SMALL, DUPLICATE = "unreadable", "too small", "near-duplicate"
BLURRED, BLACK, WHITE, ANIMATED = "blurred", "nearly black", "nearly white", "animated"
"""The kinds of flaws, as they are recorded."""


@dataclass(frozen=True)
class IndexedImage:
    """An image of the data set and its measurements."""

    name: str
    """Path relative to the folder of images."""
    stamp: tuple[int, ...]
    """See `file_stamp`."""
    sha256: str
    """Of the file's bytes; empty if it cannot be read."""
    stats: ImageStats | None
    broken: str = ""
    """Why there are no stats: what is wrong with the image."""

    @property
    def pixels_key(self) -> str:
        """Stands for the decoded pixels: the SHA-256, with a mark if version 1.0 decoded the file to other pixels."""
        return f"{self.sha256}-{self.stats.revision}" if self.stats and self.stats.revision else self.sha256


def index_images(folder: DatasetFolder, images: Sequence[ImageFile], workers: int) -> dict[Path, IndexedImage]:
    """Measure those of `images` that are new or changed, with `workers` threads; returns all of them by path."""
    index = _read_index(folder.image_index)
    names = {image.path: name_in(folder.images, image.path) for image in images}
    changed = []
    for path, name in names.items():
        known = index.get(name)
        if known is None or not known.sha256 or known.stamp != file_stamp(path):
            changed.append((path, name))
    thumbnails = Thumbnails(folder.thumbnails)
    with ProgressBar(len(changed), "checking images", "images") as bar:
        for image in prefetch(lambda item: _index_image(*item, thumbnails), changed, workers):
            index[image.name] = image
            bar.update()
    indexed = {path: index[name] for path, name in names.items()}
    entries = []
    for image in indexed.values():
        stats = dataclasses.asdict(image.stats) if image.stats else None
        entry = {"name": image.name, "stamp": image.stamp, "sha256": image.sha256, "look": stats, "broken": image.broken}
        entries.append(entry)
    write_cached_json(folder.image_index, {"format": INDEX_FORMAT, "pictures": entries})
    return indexed


def file_stamp(path: Path) -> tuple[int, ...]:
    """Size in bytes, and times of change of content and of entry in ns: at least one changes when a file is written or moved."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _index_image(path: Path, name: str, thumbnails: Thumbnails) -> IndexedImage:
    stamp, sha256 = (), ""
    try:
        stamp, sha256 = file_stamp(path), sha256_of(path)
        return IndexedImage(name, stamp, sha256, measure(path, thumbnails))
    except OSError as error:
        return IndexedImage(name, stamp, "", None, f"cannot be read: {error.strerror}")
    except BrokenImageError as error:
        return IndexedImage(name, stamp, sha256, None, str(error))


def _read_index(record: Path) -> dict[str, IndexedImage]:
    """The recorded images by name; {} if there is no record, or one that is damaged or of another format."""
    index = {}
    try:
        content = read_cached_json(record)
        for entry in content["pictures"] if content["format"] == INDEX_FORMAT else ():
            stats = ImageStats(**entry["look"] | {"tint": tuple(entry["look"]["tint"])}) if entry["look"] else None
            image = IndexedImage(entry["name"], tuple(entry["stamp"]), entry["sha256"], stats, entry["broken"])
            index[image.name] = image
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return index


@dataclass(frozen=True)
class Audit:
    """The flaws of a data set; all names are relative to the folder of images."""

    images: int
    resolution: int
    """Of the training, in pixels."""
    flagged: dict[str, dict[str, str]]
    """Image -> kind of flaw -> the flaw in words."""
    sha256: dict[str, str]
    """Of every flagged image: another image that takes its name later is not flagged."""
    captions_without_image: tuple[str, ...]
    ignored: dict[str, str]
    """Entries that look like images of the data set but do not belong to it -> what they are."""
    common: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    """What most images have in common, and the LoRA would learn -> in how many, and a description."""
    folders: dict[str, int] = dataclasses.field(default_factory=dict)
    """See `own_resolutions`."""


def audit_images(
    folder: DatasetFolder,
    images: Sequence[ImageFile],
    indexed: dict[Path, IndexedImage],
    resolution: int,
    found: Sequence[ImageFile] | None = None,
) -> Audit:
    """The flaws of all `images`, with their measurements in `indexed`, for a training at `resolution` px, or at the smallest of
    their folder's own. `found`: these and those that are excluded."""
    found = images if found is None else found
    entries = [indexed[image.path] for image in images]
    duplicates = find_near_duplicates(entries)
    flagged = {}
    for image, entry in zip(images, entries, strict=True):
        flaws = dict(_flaws_of(entry, min(image.folder.resolutions, default=resolution)))
        if entry.name in duplicates:
            flaws[DUPLICATE] = f"looks like {duplicates[entry.name]}"
        if flaws:
            flagged[entry.name] = flaws
    ignored = unused_entries(folder.images, found)
    orphans = _orphaned_captions(folder.images, found, ignored)  # an excluded image may have a caption
    digests = {entry.name: entry.sha256 for entry in entries if entry.name in flagged}
    common = dict(_common_flaws([entry.stats for entry in entries if entry.stats]))
    own = own_resolutions(folder, found)
    return Audit(len(entries), resolution, flagged, digests, tuple(orphans), ignored, common, own)


def with_flaws(audit: Audit, kind: str, flaws: Mapping[str, str], indexed: Mapping[Path, IndexedImage]) -> Audit:
    """The audit with another kind of flaw: image -> the flaw in words."""
    digests = {image.name: image.sha256 for image in indexed.values()}
    flagged = audit.flagged | {name: audit.flagged.get(name, {}) | {kind: flaw} for name, flaw in flaws.items()}
    return dataclasses.replace(audit, flagged=flagged, sha256=audit.sha256 | {name: digests[name] for name in flaws})


def write_audit(audit: Audit, folder: DatasetFolder) -> None:
    """Write `audit.json`."""
    content = {
        "resolution": audit.resolution,
        **({"folders": audit.folders} if audit.folders else {}),
        "pictures": audit.images,
        "flagged": {name: {"sha256": audit.sha256[name], "flaws": flaws} for name, flaws in audit.flagged.items()},
        "captions_without_picture": list(audit.captions_without_image),
        "not_looked_at": audit.ignored,
    }
    write_json(folder.audit, content)


def _flaws_of(image: IndexedImage, resolution: int) -> Iterator[tuple[str, str]]:
    stats = image.stats
    if stats is None:
        yield UNREADABLE, image.broken
        return
    if stats.width * stats.height < MIN_SHARE_OF_AREA * resolution**2:
        yield TOO_SMALL, f"{stats.width}x{stats.height} px, less than a bucket of {resolution}x{resolution} px holds"
    if stats.bright < NEARLY_BLACK:
        yield BLACK, "is nearly black"
    if stats.dark > NEARLY_WHITE:
        yield WHITE, "is nearly white"
    if stats.blur > MAX_BLUR:
        yield BLURRED, f"is blurred everywhere ({stats.blur:.2f} of 1)"
    if stats.animated:
        yield ANIMATED, "is an animation, of which only the first frame counts"


def _common_flaws(stats: Sequence[ImageStats]) -> Iterator[tuple[str, tuple[int, str]]]:
    """A color cast and a background that most images have in common."""
    if len(stats) < MIN_SET:
        return
    tints = np.array([each.tint for each in stats])
    direction = np.median(tints, axis=0)
    strengths = tints @ direction / max(np.hypot(*direction), 1e-9)
    if (tinted := int((strengths >= MIN_TINT).sum())) >= MIN_TINT_SHARE * len(stats):
        name = _TINTS[round(np.arctan2(direction[1], direction[0]) / (np.pi / 4)) % 8]
        yield "color cast", (tinted, f"tinted {name}, by {np.median(strengths):.0f} in CIELAB (reported from {MIN_TINT:.0f})")
    edges = np.array([np.frombuffer(bytes.fromhex(each.edges), np.uint8) for each in stats], dtype=np.int16)
    edges = edges.reshape(len(stats), -1, 3)
    same = 0
    for candidate in edges[:: max(1, len(edges) // 100)]:  # a sample meets a group of half the images for certain
        differences = np.median(np.abs(edges - candidate).max(axis=2), axis=1)
        same = max(same, int((differences < SAME_EDGES).sum()))
    if same >= MIN_SAME_SHARE * len(stats):
        yield "same background", (same, "alike along the top and the sides")


def find_near_duplicates(images: Sequence[IndexedImage]) -> dict[str, str]:
    """Name -> name of the better image that it looks like: the largest one of a group is kept, the first among equals."""
    readable = sorted((image for image in images if image.stats), key=lambda image: -image.stats.width * image.stats.height)
    bits = HASH_SIDE * HASH_SIDE
    hashes = [bytes.fromhex(image.stats.hash.zfill(bits // 4)) for image in readable]
    unpacked = np.unpackbits(np.frombuffer(b"".join(hashes), np.uint8)).reshape(len(readable), bits)
    signs = unpacked.astype(np.float32) * 2 - 1  # the product of two is the number of equal bits less that of different ones
    originals: dict[str, str] = {}
    with ProgressBar(len(readable), "comparing images", "images") as bar:
        for start in range(0, len(readable), _COMPARED_AT_ONCE):
            rows = slice(start, start + _COMPARED_AT_ONCE)
            with np.errstate(all="ignore"):  # on ARM64, products of finite numbers can signal errors (numpy issue 28687)
                agreement = signs[rows] @ signs[start:].T
            is_similar = np.triu(agreement >= bits - 2 * MAX_DUPLICATE_BITS, k=1)
            for row in np.flatnonzero(is_similar.any(axis=1)):
                if (name := readable[start + row].name) not in originals:
                    for other in np.flatnonzero(is_similar[row]):
                        originals.setdefault(readable[start + other].name, name)
            bar.update(len(is_similar))
    return originals


def _orphaned_captions(folder: Path, images: Sequence[ImageFile], ignored: Collection[str]) -> list[str]:
    """The captions without an image, even an ignored one."""
    stems = {image.path.with_suffix("") for image in images} | {(folder / name).with_suffix("") for name in ignored}
    parents = sorted({folder, *(image.path.parent for image in images)})
    paths = [path for parent in parents for path in sorted(parent.iterdir())]
    captions = [path for path in paths if path.suffix.lower() in CAPTION_SUFFIXES and not path.name.startswith(".")]
    return [name_in(folder, path) for path in captions if path.with_suffix("") not in stems]
