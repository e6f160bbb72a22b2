"""What is in the folders of images and not used, with a remedy for each: images of other formats, folders, masks, lists."""

import contextlib
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from common.caption_lists import LIST_FILES, UNREAD_LIST_FILES, read_caption_list
from common.dataset_layout import (
    CAPTION_SUFFIXES,
    CONDITIONING_ENDING,
    MASK_ENDING,
    MASK_FOLDER,
    REGULARIZATION_FOLDERS,
    ImageFile,
    images_in,
    is_mask,
    mask_folder,
    name_in,
)
from common.errors import abbreviated
from common.image_folders import FOLDER_FILE, MAX_REPEATS, ImageFolder, find_folders
from common.image_formats import (
    FORMAT_NAMES,
    HEAD_BYTES,
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    sniff_image_format,
)


def unused_entries(folder: Path, images: Collection[ImageFile]) -> dict[str, str]:
    """Name -> what it is, of every entry in `folder` that looks like a part of the data set and is not used. `images`: all that
    were found in it, and perhaps others.

    These are images in folders that `find_folders` does not find, images of formats that are not read or without a suffix, and
    what may be meant as the caption of an image.
    """
    if not folder.is_dir():
        return {}
    used = {path for image in images for path in (image.path, *image.masks)}
    stems = {image.path.with_suffix("") for image in images}
    folders = find_folders(folder)
    unused = _unused_folders(folder, folders)
    masks = mask_folder(folder)
    for path in (path for parent in (masks, *masks.glob("*/")) for path in images_in(parent)):
        if path not in used:
            unused[name_in(folder.parent, path)] = f"a mask without an image; give it the name of an image in {folder.name}/"
    if folder.name in REGULARIZATION_FOLDERS:
        without_effect = {each: [key for key in ("trigger", "caption_source") if getattr(each, key)] for each in folders}
        for each, keys in without_effect.items():
            if keys:
                what = f"{' and '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect on regularization images"
                unused[name_in(folder, each.path / FOLDER_FILE)] = what
    for parent in (each.path for each in folders if each.repeats):
        for path in parent.iterdir():
            is_known = path in used or path.name in (FOLDER_FILE, *LIST_FILES) or path.name.startswith(".")
            if not is_known and (what := _describe_unused(path, stems)):
                unused[name_in(folder, path)] = what
        if missing := [path for path in read_caption_list(parent) if path not in used]:
            names = abbreviated([name_in(parent, path) for path in missing])
            listing = next(parent / name for name in LIST_FILES if (parent / name).exists())
            unused[name_in(folder, listing)] = f"lists images that are not in the data set: {len(missing)} ({names})"
    return dict(sorted(unused.items()))


def describe_missing_images(folder: Path, remedy: str) -> str:
    """What is wrong with a `folder` that has no images, and which of its files and folders are not used."""
    unused = [f"{name} ({what})" for name, what in unused_entries(folder, ()).items()]
    not_used = f"; not used: {abbreviated(unused)}" if unused else ""
    return f"{folder}: no images ({FORMAT_NAMES}); {remedy}{not_used}"


def _describe_unused(path: Path, stems: Collection[Path]) -> str | None:
    """What a file or folder that is not used is, with a remedy; None if it does not look like a part of the data set.

    `stems`: paths of the images that are used, without their suffixes.
    """
    suffix = path.suffix.lower()
    if path.name in UNREAD_LIST_FILES:
        return f"captions in Parquet; save them as {LIST_FILES[0]} to use them"
    if suffix in IMAGE_SUFFIXES:
        if is_mask(path):
            return f"a mask without an image; rename it to NAME{MASK_ENDING}{path.suffix} for the image NAME"
        if path.stem.lower().endswith(CONDITIONING_ENDING):
            return "OneTrainer's image for conditioning, which is not used"
        if not path.exists():
            return "a link to nothing"
        if path.is_file():
            return "has the stem of another image, which is used"
        return "a folder" if path.is_dir() else "not a file"
    if not path.is_file() or suffix in CAPTION_SUFFIXES:
        return None
    if suffix in UNREAD_SUFFIXES:
        return f"{UNREAD_SUFFIXES[suffix]}; save it as PNG or JPEG to use it"
    with contextlib.suppress(OSError), path.open("rb") as file:
        if image_format := sniff_image_format(file.read(HEAD_BYTES)):
            return f"contains a {image_format.upper()} image; give it the suffix {IMAGE_FORMATS[image_format][0]} to use it"
    if path.with_suffix("") in stems:
        return f"not a caption, which has the suffix {' or '.join(CAPTION_SUFFIXES)}"
    return None


def _unused_folders(folder: Path, folders: Iterable[ImageFolder]) -> dict[str, str]:
    """The folders below `folder` with images that are not used -> what to do. Those with 0 repeats are excluded."""
    found = {}
    masks = mask_folder(folder)
    known = {masks, *(each.path for each in folders)}
    excluded = {masks, *(each.path for each in folders if not each.repeats)}
    for root, names, _ in os.walk(folder):
        parent = Path(root)
        names[:] = [name for name in names if not re.match(r"\.|0+_.", name) and parent / name not in excluded]
        for path in (parent / name for name in names if parent / name not in known):
            try:
                suffixes = {child.suffix.lower() for child in path.iterdir() if not child.name.startswith(".")}
            except OSError as error:
                found[name_in(folder, path)] = f"a folder that cannot be read: {error.strerror}"
                continue
            if suffixes & {*IMAGE_SUFFIXES, *UNREAD_SUFFIXES}:
                move = "" if parent == folder else f"move it into {folder.name}/ and "
                most = f", at most {MAX_REPEATS}," if re.match(r"\d+_.", path.name) else ""
                use = f"{move}call it N_name for N repeats{most} to use it"
                if "mask" in path.name.lower() or path.name.lower().startswith("conditioning"):
                    use = f"if these are masks, move its files to {folder.parent.name}/{MASK_FOLDER}/"
                found[name_in(folder, path)] = f"a folder with images; {use}"
    return found
