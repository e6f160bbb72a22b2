"""The data set as a table for `--check`: what each folder has, what is excluded or flagged, and what is not used and why."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.dataset_layout import (
    DatasetFolder,
    ImageFile,
    Selection,
    name_in,
)
from common.files import parse_json, read_file
from common.image_folders import find_folders
from common.image_formats import IMAGE_SUFFIXES
from common.unused_entries import unused_entries

_UNUSED_SHOWN = 20
_HEADER = ("folder", "images", "captions", "masks", "repeats", "trigger or class", "flagged", "excluded")


def dataset_table(dataset: DatasetFolder, selection: Selection, regularization: Sequence[ImageFile], trigger: str) -> str:
    """One line for each folder of images, and for each file or folder that is not used. `trigger` is that of folders without one.

    Images are counted and not opened. Raises DataError for a folder.toml or a list of captions that cannot be used.
    """
    images, used = [*selection.found, *regularization], {image.path for image in selection.images}
    flagged = _flagged(dataset)
    by_folder: dict[Path, list[ImageFile]] = {}
    for image in images:
        by_folder.setdefault(image.folder.path, []).append(image)
    rows = [_HEADER]
    for root in (dataset.images, *dataset.regularization):
        for folder in find_folders(root):
            found = by_folder.get(folder.path, [])
            if not found and folder.repeats and folder.path == root:
                continue
            is_prior = root in dataset.regularization
            meaning = (found[0].folder.class_word if found else folder.class_word) if is_prior else folder.trigger or trigger
            counts = Counter()
            for image in found:
                counts["captions"] += image.has_caption
                counts["masks"] += bool(image.masks)
                counts["flagged"] += not is_prior and name_in(dataset.images, image.path) in flagged
                counts["excluded"] += not is_prior and image.path not in used
            if not folder.repeats:
                counts["excluded"] = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.path.iterdir())
            numbers = len(found) or counts["excluded"], counts["captions"], counts["masks"], folder.repeats
            rows.append(
                (
                    name_in(dataset.root, folder.path),
                    *map(str, numbers),
                    meaning or "-",
                    *(str(counts[each] or "-") for each in ("flagged", "excluded")),
                )
            )
    lines = _aligned(rows)
    unused = [(root, unused_entries(root, images)) for root in (dataset.images, *dataset.regularization)]
    entries = [f"{name_in(dataset.root, root)}/{name} ({what})" for root, found in unused for name, what in found.items()]
    lines += [f"not used: {entry}" for entry in entries[:_UNUSED_SHOWN]]
    if len(entries) > _UNUSED_SHOWN:
        lines.append(f"not used: {len(entries) - _UNUSED_SHOWN} more, see {dataset.audit} after the caption stage")
    return "\n".join(lines)


def _flagged(dataset: DatasetFolder) -> set[str]:
    """Names of the images that the caption stage flagged, as far as its record can be read."""
    try:
        return set(parse_json(read_file(dataset.audit))["flagged"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
