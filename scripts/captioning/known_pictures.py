"""Every picture of the data set is looked at once: `dataset/.loracat/pictures.json` remembers its hash and its look.

A picture is known by the size and times of its file; if one of them changes, it is looked at anew.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from captioning.look import Look, look_at
from dataset_folder import DatasetFolder, ImageFile, name_in, sha256_of, update_json
from pictures import BrokenPictureError
from prefetch import prefetched

_FORMAT = 1
"""Another number, and every picture is looked at anew: to be raised when `Look` changes."""


@dataclass(frozen=True)
class KnownPicture:
    """A picture that was looked at."""

    name: str
    """Path relative to the folder of pictures."""
    stamp: tuple[int, ...]
    """Size in bytes, times of change of content and of entry in ns."""
    sha256: str
    """Of the file's bytes; empty if it cannot be read."""
    look: Look | None
    broken: str = ""
    """Why there is no look: what is wrong with the picture."""


def stamp_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is written, replaced or moved."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def look_at_all(folder: DatasetFolder, images: Sequence[ImageFile], workers: int) -> dict[Path, KnownPicture]:
    """Every picture of `images`, by its path; only those that are new or changed are decoded, by `workers` threads."""
    record = folder.records / "pictures.json"
    remembered = _read(record)
    named = {image.path: name_in(folder.images, image.path) for image in images}
    new = [(path, name) for path, name in named.items() if not _is_current(remembered.get(name), path)]
    with tqdm(total=len(new), desc="looking at the pictures", unit="picture", disable=None) as bar:
        for picture in prefetched(lambda item: _looked_at(*item), new, workers):
            remembered[picture.name] = picture
            bar.update()
    known = {path: remembered[name] for path, name in named.items()}
    update_json(record, {"format": _FORMAT, "pictures": [dataclasses.asdict(picture) for picture in known.values()]})
    return known


def _is_current(picture: KnownPicture | None, path: Path) -> bool:
    return picture is not None and bool(picture.sha256) and picture.stamp == stamp_of(path)


def _looked_at(path: Path, name: str) -> KnownPicture:
    stamp, sha256 = (), ""
    try:
        stamp, sha256 = stamp_of(path), sha256_of(path)
        return KnownPicture(name, stamp, sha256, look_at(path))
    except OSError as error:
        return KnownPicture(name, stamp, "", None, f"cannot be read: {error.strerror}")
    except BrokenPictureError as error:
        return KnownPicture(name, stamp, sha256, None, str(error))


def _read(record: Path) -> dict[str, KnownPicture]:
    """What is remembered, by name; nothing if the record is damaged or of another format."""
    try:
        content = json.loads(record.read_bytes())
        entries = content["pictures"] if content["format"] == _FORMAT else []
        return {entry["name"]: _picture(entry) for entry in entries}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _picture(entry: dict) -> KnownPicture:
    look = Look(**entry["look"]) if entry["look"] else None
    return KnownPicture(**entry | {"stamp": tuple(entry["stamp"]), "look": look})
