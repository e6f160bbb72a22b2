"""What is wrong with the data set: a check that only reports. `dataset/.loracat/audit.json` and a short table.

Training leaves flagged pictures out if SKIP_FLAGGED=1; nothing is deleted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from captioning.known_pictures import KnownPicture
from captioning.look import HASH_SIDE, Look
from dataset_folder import CAPTION_SUFFIX, IMAGE_SUFFIXES, DatasetFolder, ImageFile, find_images, name_in, repeats_of, update_json

LEAST_SHARE_OF_AREA = 0.9
"""Of resolution²: SDXL's own sizes go down to 0.91 of it, 640x1536; a smaller picture is trained in less detail."""
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
    """What was found; all names are relative to the folder of pictures."""

    pictures: int
    resolution: int
    """Pixels, of the training."""
    flagged: dict[str, dict[str, str]] = field(default_factory=dict)
    """Picture -> what kind of flaw it has -> the flaw in words."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Of every flagged picture: a picture that took its name later is another one."""
    captions_without_picture: tuple[str, ...] = ()
    not_looked_at: dict[str, str] = field(default_factory=dict)
    """Entries that a person may take for pictures of the data set -> what they are."""


def audit_of(folder: DatasetFolder, images: Sequence[ImageFile], known: dict[Path, KnownPicture], resolution: int) -> Audit:
    """The flaws of all `images`, whose looks are `known`, for a training at `resolution` px."""
    pictures = [known[image.path] for image in images]
    duplicates = near_duplicates(pictures)
    flagged = {}
    for picture in pictures:
        flaws = dict(_flaws(picture, resolution))
        if picture.name in duplicates:
            flaws[DUPLICATE] = f"looks like {duplicates[picture.name]}"
        if flaws:
            flagged[picture.name] = flaws
    return Audit(
        pictures=len(pictures),
        resolution=resolution,
        flagged=flagged,
        sha256={picture.name: picture.sha256 for picture in pictures if picture.name in flagged},
        captions_without_picture=tuple(_orphans(folder.images, images)),
        not_looked_at=dict(_others(folder.images, images)),
    )


def _flaws(picture: KnownPicture, resolution: int) -> Iterator[tuple[str, str]]:
    look = picture.look
    if look is None:
        yield UNREADABLE, picture.broken
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


def near_duplicates(pictures: Sequence[KnownPicture]) -> dict[str, str]:
    """Name -> name of the better picture that it looks like: the largest of a group stays, the first among equals."""
    seen = sorted((picture for picture in pictures if picture.look), key=lambda picture: -_area(picture.look))
    hashes = np.array([_bits(picture.look) for picture in seen], dtype=np.uint64).reshape(len(seen), HASH_SIDE * HASH_SIDE // 64)
    like: dict[str, str] = {}
    for index, picture in enumerate(seen):
        if picture.name in like:
            continue
        differing = np.bitwise_count(hashes[index + 1 :] ^ hashes[index]).sum(axis=1)
        for other in np.flatnonzero(differing <= MOST_DIFFERENT_BITS):
            like.setdefault(seen[index + 1 + other].name, picture.name)
    return like


def write(audit: Audit, folder: DatasetFolder) -> None:
    """Write `audit.json`."""
    content = {
        "resolution": audit.resolution,
        "pictures": audit.pictures,
        "flagged": {name: {"sha256": audit.sha256[name], "flaws": flaws} for name, flaws in audit.flagged.items()},
        "captions_without_picture": list(audit.captions_without_picture),
        "not_looked_at": audit.not_looked_at,
    }
    update_json(folder.audit, content)


def table(audit: Audit) -> str:
    """The findings in a few lines, one for each kind; `audit.json` has all of them."""
    by_kind: dict[str, list[str]] = {}
    for name, flaws in audit.flagged.items():
        for kind, words in flaws.items():
            by_kind.setdefault(kind, []).append(f"{name} ({words})" if kind in (UNREADABLE, DUPLICATE) else name)
    if audit.captions_without_picture:
        by_kind["caption without a picture"] = list(audit.captions_without_picture)
    if audit.not_looked_at:
        by_kind["not looked at"] = [f"{name} ({what})" for name, what in audit.not_looked_at.items()]
    if not by_kind:
        return f"the pictures: nothing found wrong with any of the {audit.pictures}"
    title = (
        f"the pictures: {len(audit.flagged)} of {audit.pictures} are flagged, at {audit.resolution} px (all in .loracat/audit.json)"
    )
    advice = ["SKIP_FLAGGED=1 leaves flagged pictures out of training"] if audit.flagged else []
    return "\n".join([title, *(f"  {kind:25} {len(names):5}  {_some(names)}" for kind, names in by_kind.items()), *advice])


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _orphans(folder: Path, images: Sequence[ImageFile]) -> Iterator[str]:
    """Captions whose picture is missing."""
    captions = {image.caption_path for image in images}
    for path in _entries(folder, images):
        if path.suffix.lower() == CAPTION_SUFFIX and path not in captions:
            yield name_in(folder, path)


def _others(folder: Path, images: Sequence[ImageFile]) -> Iterator[tuple[str, str]]:
    """Folders and links that are no pictures although their names say so, and folders of pictures that are not walked."""
    walked = {image.path.parent for image in images}
    for path in _entries(folder, images):
        is_named_so = path.suffix.lower() in IMAGE_SUFFIXES
        if is_named_so and not path.exists():
            yield name_in(folder, path), "a link to nothing"
        elif is_named_so and path.is_dir():
            yield name_in(folder, path), "a folder"
        elif path.is_dir() and path not in walked and repeats_of(path) != 0 and find_images(path):
            yield name_in(folder, path), "a folder with pictures; call it N_name for N repeats to use it"


def _entries(folder: Path, images: Sequence[ImageFile]) -> Iterator[Path]:
    """Everything that lies where pictures lie, hidden files left out."""
    for place in sorted({folder, *(image.path.parent for image in images)}):
        yield from sorted(path for path in place.iterdir() if not path.name.startswith("."))


def _area(look: Look) -> int:
    return look.width * look.height


def _bits(look: Look) -> list[int]:
    """The hash in words of 64 bits."""
    digits = look.hash.zfill(HASH_SIDE * HASH_SIDE // 4)
    return [int(digits[start : start + 16], 16) for start in range(0, len(digits), 16)]
