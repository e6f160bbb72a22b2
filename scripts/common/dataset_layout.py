"""Names and meaning of the files in DATASET_DIR: which of them are images, where their captions and the records are.

Stages share the data set only through these files. A file gets its name when it is complete, so that a file that exists
can be trusted. Standard library only.
"""

import codecs
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from common.caption_lists import read_caption_list
from common.errors import abbreviated
from common.files import read_file, remove_partial_files
from common.image_folders import ImageFolder, class_in_name, find_folders
from common.image_formats import IMAGE_SUFFIXES

FIRST_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Those of version 1.0: where an image of another suffix has the same stem, these files are still the data set."""
CAPTION_SUFFIX = ".txt"
CAPTION_SUFFIXES = (CAPTION_SUFFIX, ".caption")
"""In any case. The caption stage writes the first; if an image has captions of both kinds, training reads the first."""
MASK_ENDING = "-masklabel"
"""OneTrainer's: `NAME-masklabel.png` is the mask of the image NAME, and never an image of the data set itself. In any case."""
MASK_FOLDER = "masks"
"""Beside the folder of images, for masks that have the names of their images, as in kohya's `conditioning_data_dir`."""
CONDITIONING_ENDING = "-condlabel"
"""OneTrainer's as well: an image that conditions another kind of model."""

REGULARIZATION_FOLDERS = ("regularization", "reg")
"""Ours and kohya's, beside the folder of images."""


class DatasetFolder:
    """The path of every file and folder in `DATASET_DIR`."""

    def __init__(self, root: Path):
        self.root = root
        # For the user: images with their captions, one JSON line for each collected image, and, written by the user, the names
        # of images that are not used.
        self.images = root / "images"
        self.regularization = tuple(root / name for name in REGULARIZATION_FOLDERS)
        self.manifest = root / "manifest.jsonl"
        self.exclusions = root / "exclude.txt"
        # Records of the stages: what the collect stage sent and received, ...
        self.records = root / ".loracat"
        self.collect_log = self.records / "collect.jsonl"
        # ... every change that the caption stage made to a caption, measurements of the images, the flaws that were found
        # (training skips such images on request), the share of images with each trait, and what it was before a run, the tagger's
        # probabilities, the faces that were found in each image, and how much each looks like the others.
        self.caption_log = self.records / "captions.jsonl"
        self.image_index = self.records / "pictures.json"
        self.audit = self.records / "audit.json"
        self.traits = self.records / "traits.json"
        self.traits_log = self.records / "traits.jsonl"
        self.tag_cache = self.records / "tags"
        self.faces = self.records / "faces.jsonl"
        self.likeness = self.records / "likeness.json"
        # For the report page: small copies of the images.
        self.thumbnails = self.records / "thumbnails"

    def remove_leftovers(self) -> None:
        """Remove the temporary files that killed runs left anywhere in the data set, except those of the last minute."""
        for folder in (self.root, self.images, *self.images.glob("*/"), self.records, *self.tag_cache.glob("*/")):
            remove_partial_files(folder)


@dataclass(frozen=True)
class ImageFile:
    """An image of the data set, in `folder`."""

    path: Path
    folder: ImageFolder
    captions: tuple[Path, ...] = ()
    """The files of the same stem with one of CAPTION_SUFFIXES, the first choice first."""
    listed_caption: str | None = None
    """Its caption in one of LIST_FILES, which counts if there is no other."""
    is_regularization: bool = False
    """It shows the class of the subject, which the LoRA must not change, and not the subject."""
    masks: tuple[Path, ...] = ()
    """The files that say which areas of the image count; more than one is a mistake."""

    @property
    def caption_path(self) -> Path:
        """The caption that the caption stage writes: the file of the same stem with CAPTION_SUFFIX, in any case if it exists."""
        written = (path for path in self.captions if path.suffix.lower() == CAPTION_SUFFIX)
        return next(written, self.path.with_suffix(CAPTION_SUFFIX))

    @property
    def has_caption(self) -> bool:
        """Whether there is a text that training could read. The class of a regularization image is one."""
        is_named = self.is_regularization and self.folder.class_word != ""
        return bool(self.captions) or self.listed_caption is not None or is_named

    @property
    def caption_to_read(self) -> Path:
        """The caption that training reads."""
        return self.captions[0] if self.captions else self.caption_path


def find_images(folder: Path) -> list[ImageFile]:
    """All images in `folder` and in those of its folders that `find_folders` finds, sorted by relative path.

    Other folders, hidden files, masks and files with another suffix do not belong to the data set; see `unused_entries`. A folder
    with 0 repeats holds images that are excluded from it. A HEIC, AVIF or TIFF image whose stem is also that of a PNG, JPEG, WebP
    or BMP image is taken for the original of it, and not used.
    """
    folders = [each for each in find_folders(folder) if each.repeats]
    found = [entry for each in folders for entry in _entries_of(each)]
    captions = _captions_by_stem([path for path, _, _ in found])
    listed: dict[Path, str] = {}
    for each in folders:  # that of the image's own folder comes last, and so counts
        listed |= read_caption_list(each.path)
    masks = _masks_by_stem(folder, [path for path, _, _ in found])
    images = [
        ImageFile(path, each, captions.get(stem, ()), listed_caption=listed.get(path), masks=masks.get(stem, ()))
        for path, stem, each in ((path, path.with_suffix(""), each) for path, each, is_file in found if is_file)
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and not path.stem.lower().endswith((MASK_ENDING, CONDITIONING_ENDING))
    ]
    first = {image.path.with_suffix("") for image in images if image.path.suffix.lower() in FIRST_SUFFIXES}
    images = [image for image in images if image.path.suffix.lower() in FIRST_SUFFIXES or image.path.with_suffix("") not in first]
    return sorted(images, key=lambda image: image.path.relative_to(folder).as_posix())


def find_regularization_images(dataset: DatasetFolder) -> list[ImageFile]:
    """The regularization images, sorted by path. The class of a folder without one is that in its name, `N_class`."""
    found = []
    for image in (image for folder in dataset.regularization for image in find_images(folder)):
        folder = image.folder
        if not folder.class_word and folder.path not in dataset.regularization:
            folder = replace(folder, class_word=class_in_name(folder.path))
        found.append(replace(image, folder=folder, is_regularization=True))
    return found


@dataclass(frozen=True)
class Selection:
    """The images of a data set, as `exclude.txt` divides them."""

    images: list[ImageFile]
    """Those that are captioned and trained on."""
    excluded: list[str]
    """Names of the images that are left out."""
    unknown: list[str]
    """Lines of `exclude.txt` that name no image."""
    found: list[ImageFile]
    """All of them, with those that are left out."""

    def notes(self) -> str:
        """What `exclude.txt` does, in one line or two; "" without it."""
        lines = [f"excluded by exclude.txt: {len(self.excluded)} images ({abbreviated(self.excluded)})\n"] if self.excluded else []
        if self.unknown:
            lines.append(f"exclude.txt names images that are not in the data set: {abbreviated(self.unknown)}\n")
        return "".join(lines)


def select_images(folder: DatasetFolder) -> Selection:
    """The images that are captioned and trained on.

    A line of `exclude.txt` is the name of an image or of an `N_name` folder, relative to the folder of images; an image in
    such a folder may also be named without it. Text after # is a comment, unless the name itself contains it.
    """
    everything = find_images(folder.images)
    images = {name_in(folder.images, image.path): image for image in everything}
    exact = {_comparable(name): [name] for name in images}
    other: dict[str, list[str]] = {}
    for name in images:
        parent, _, last = name.rpartition("/")
        for key in (parent, last) if parent else ():
            other.setdefault(_comparable(key), []).append(name)
    excluded: set[str] = set()
    unknown = []
    for line in _lines_of(folder.exclusions):
        comments = [comment.start() for comment in re.finditer(r"(?:^|\s)#", line)]
        candidates = [_comparable(line[:end]) for end in (len(line), *reversed(comments))]
        if found := next((names[key] for key in candidates for names in (exact, other) if key in names), None):
            excluded.update(found)
        elif candidates[-1]:
            unknown.append(line[: comments[0] if comments else None].strip())
    return Selection([image for name, image in images.items() if name not in excluded], sorted(excluded), unknown, everything)


def _lines_of(file: Path) -> Iterator[str]:
    """The lines of a text file in UTF-8 or UTF-16, with any line ends; none if it does not exist."""
    try:
        content = read_file(file)
    except FileNotFoundError:
        return
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf16 else "utf-8", "backslashreplace").replace("\ufeff", "")
    yield from re.split(r"\r\n|\r|\n", text)


def _comparable(name: str) -> str:
    """A name in one Unicode form, with / between its parts, without quotation marks, spaces around it, and `images/` before it."""
    name = unicodedata.normalize("NFC", name.strip().strip("\"'").replace("\\", "/"))
    return re.sub(r"^(\./)*(dataset/)?(images/)?", "", name).rstrip("/")


def _entries_of(folder: ImageFolder) -> list[tuple[Path, ImageFolder, bool]]:
    """What is in a folder, with the folder, and whether it is a file."""
    with os.scandir(folder.path) as entries:  # tells files and folders apart without a look at each of them
        paths = [(folder.path / entry.name, entry.is_file(follow_symlinks=False), entry.is_symlink()) for entry in entries]
    return [(path, folder, is_file or (is_link and path.is_file())) for path, is_file, is_link in paths]


def _captions_by_stem(paths: list[Path]) -> dict[Path, tuple[Path, ...]]:
    """Path without suffix -> its captions: `x.txt` comes before `x.TXT`, and that before `x.caption`."""
    captions: dict[Path, tuple[Path, ...]] = {}
    for suffix in CAPTION_SUFFIXES:
        of_suffix = [path for path in paths if path.suffix.lower() == suffix]
        for path in sorted(of_suffix, key=lambda path: (path.suffix != suffix, path.name)):
            captions[path.with_suffix("")] = (*captions.get(path.with_suffix(""), ()), path)
    return captions


def _masks_by_stem(folder: Path, paths: list[Path]) -> dict[Path, tuple[Path, ...]]:
    """Path of an image without suffix -> its masks, of the images among `paths`, which are in `folder`.

    The mask of `images/x.jpg` is `images/x-masklabel.png` or `masks/x.png`, with any of IMAGE_SUFFIXES.
    """
    masks: dict[Path, tuple[Path, ...]] = {}
    for path in (path for path in paths if is_mask(path)):
        stem = path.with_name(path.stem[: -len(MASK_ENDING)] or path.stem)  # a name that is nothing but the ending has no image
        masks[stem] = (*masks.get(stem, ()), path)
    for parent in {path.parent for path in paths}:
        for path in images_in(mask_folder(folder) / parent.relative_to(folder)):
            stem = parent / (path.stem[: -len(MASK_ENDING)] if is_mask(path) else path.stem)
            masks[stem] = (*masks.get(stem, ()), path)
    return {stem: tuple(sorted(found)) for stem, found in masks.items()}


def mask_folder(folder: Path) -> Path:
    """Where the masks of the images in `folder` are, besides beside them: each folder of regularization images has its own."""
    return folder / MASK_FOLDER if folder.name in REGULARIZATION_FOLDERS else folder.parent / MASK_FOLDER


def is_mask(path: Path) -> bool:
    """Whether the name of a file says that it is the mask of the image beside it."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.stem.lower().endswith(MASK_ENDING) and not path.name.startswith(".")


def images_in(folder: Path) -> list[Path]:
    """The files in `folder` with a suffix of images; none if it does not exist."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))


def own_resolutions(dataset: DatasetFolder, images: Iterable[ImageFile]) -> dict[str, int]:
    """Folder of images -> the smallest resolution that it is trained at, of those that have their own."""
    folders = {image.folder.path: image.folder.resolutions for image in images if image.folder.resolutions}
    return {name_in(dataset.root, path): min(resolutions) for path, resolutions in sorted(folders.items())}


def caption_owners(images: Iterable[ImageFile]) -> dict[Path, ImageFile]:
    """Caption file -> the image that it belongs to: the first one, where several images have the same stem."""
    owners: dict[Path, ImageFile] = {}
    for image in images:
        owners.setdefault(image.caption_path, image)
    return owners


def name_in(folder: Path, path: Path) -> str:
    """The name of a file in `folder` in the records: its relative path, with bytes that are not UTF-8 as escapes."""
    return os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")
