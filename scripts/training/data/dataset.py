"""Folder -> examples, or ONE list of everything that is wrong with it.

What a run starts from: the base model, and the images with their captions. Nothing here needs torch, whose import takes
seconds, so that it can be read meanwhile.
"""

import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.dataset_layout import IMAGE_SUFFIXES, DatasetFolder, ImageFile, caption_owners, find_images, name_in
from common.errors import DataError, bullet_list
from common.files import sha256_of
from common.images import BrokenImageError, open_rgb
from common.output_layout import OutputLayout
from common.project import ProjectSettings
from training.config import DataSettings, TrainSettings
from training.models.base_model import compute_digests, find_base
from training.models.sdxl import BaseModel

MIN_SIDE_PX = 256


@dataclass(frozen=True)
class Example:
    """An image with its caption."""

    path: Path
    name: str
    """Path relative to the folder of images, for messages."""
    caption: str
    width: int
    """Pixels, after EXIF orientation."""
    height: int
    repeats: int
    sha256: str
    """Of the file's bytes."""


def flagged_images(dataset: DatasetFolder, resolution: int) -> dict[str, str]:
    """Name -> flaws of the images that the caption stage's audit flagged, unless another image took the name since.

    Raises DataError if there is no audit for a training at `resolution` px.
    """
    try:
        audit = json.loads(dataset.audit.read_bytes())
        made_for, flagged = audit["resolution"], audit["flagged"]
        flaws = {name: ", ".join(found["flaws"]) for name, found in flagged.items()}
        digests = {name: found["sha256"] for name, found in flagged.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"SKIP_FLAGGED: {dataset.audit} is missing or damaged; run the caption stage first") from None
    if made_for != resolution:
        again = f"run the caption stage again with RESOLUTION={resolution}"
        raise DataError(f"SKIP_FLAGGED: {dataset.audit} was made for {made_for} px; {again}")
    names = {name_in(dataset.images, image.path): image.path for image in find_images(dataset.images)}
    return {name: flaws[name] for name in names if name in flaws and digests[name] in ("", sha256_of(names[name]))}


def read_examples(folder: Path, workers: int, left_out: Collection[str] = ()) -> list[Example]:
    """All images of `folder` (and its `N_name` folders) but those named in `left_out`, with their captions, decoded once
    to be sure, by `workers` threads.

    Raises DataError with everything that is wrong with any of them.
    """
    found = find_images(folder)
    images = [image for image in found if name_in(folder, image.path) not in left_out]
    if found and not images:
        raise DataError(f"{folder}: all {len(found)} images are flagged; replace some, or set SKIP_FLAGGED=0")
    if not images:
        raise DataError(
            f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}); put them there or run the collect stage, then the caption stage"
        )
    with ThreadPoolExecutor(max(1, workers)) as pool:
        read = list(pool.map(lambda image: _read(image, folder), images))
    problems = [problem for example, problems in read for problem in problems] + _shared_captions(images, folder)
    if problems:
        bad = sum(example is None for example, _ in read)
        title = f"{folder}: {bad} of the {len(images)} images cannot be trained on:"
        raise DataError(bullet_list(title, problems))
    return [example for example, _ in read]


def _shared_captions(images: list[ImageFile], folder: Path) -> list[str]:
    """Complaints about images that would share the caption of another."""
    owners = caption_owners(images)
    names = {image.path: image.path.relative_to(folder).as_posix() for image in images}
    shared = [(names[image.path], names[owners[image.caption_path].path]) for image in images]
    return [f"{name}: would share its caption with {owner}; rename one of the two" for name, owner in shared if owner != name]


def unused_entries(folder: Path) -> list[str]:
    """Names of entries in `folder` that are neither images, captions of images, nor `N_name` folders with images."""
    images = [image.path for image in find_images(folder)]
    used = {image.relative_to(folder).parts[0] for image in images} | {image.with_suffix(".txt").name for image in images}
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in used and not entry.name.startswith("."))


def _read(image: ImageFile, folder: Path) -> tuple[Example | None, list[str]]:
    name = image.path.relative_to(folder).as_posix()
    problems = []
    caption = _caption(image, name, problems)
    width, height = _size(image.path, name, problems)
    if problems:
        return None, problems
    return Example(image.path, name, caption, width, height, image.repeats, sha256_of(image.path)), []


def _caption(image: ImageFile, name: str, problems: list[str]) -> str:
    try:
        return " ".join(image.caption_path.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        problems.append(f"{name}: has no caption {image.caption_path.name}; run the caption stage")
    except UnicodeDecodeError:
        problems.append(f"{name}: its caption {image.caption_path.name} is not UTF-8; save it as UTF-8")
    except OSError as error:
        problems.append(f"{name}: its caption {image.caption_path.name}: {error.strerror}")
    return ""


def _size(path: Path, name: str, problems: list[str]) -> tuple[int, int]:
    try:
        width, height = open_rgb(path).size
    except BrokenImageError as error:
        problems.append(f"{name}: {error}; replace or remove it")
        return 0, 0
    if min(width, height) < MIN_SIDE_PX:
        problems.append(f"{name}: {width}x{height} is too small; the shorter side must have at least {MIN_SIDE_PX} px")
    return width, height


MANY_REPEATS = 100
"""Of an image in an epoch; nobody means more."""


@dataclass(frozen=True)
class Inputs:
    """Verified, except for the values of the weights."""

    base: BaseModel
    examples: list[Example]


def read_inputs(project: ProjectSettings, settings: TrainSettings) -> Inputs:
    """Read headers and hash weights, decode images and read captions. Raises ModelError, or DataError with everything that
    is wrong with the data."""
    base = find_base(settings.model.base_model, project.models_dir)
    compute_digests(base, OutputLayout(project.output_dir, project.trigger_word).cache)
    return Inputs(base, read_images(project, settings.data))


def read_images(project: ProjectSettings, settings: DataSettings) -> list[Example]:
    """The examples of the data set; what lies among them and is none is named."""
    dataset = DatasetFolder(project.dataset_dir)
    folder = dataset.images
    flagged = flagged_images(dataset, settings.resolution) if settings.skip_flagged else {}
    if flagged:
        print(f"left out, because flagged: {', '.join(f'{name} ({flaws})' for name, flaws in flagged.items())}")
    examples = read_examples(folder, settings.dataloader_num_workers, flagged)
    often = sorted({str(example.path.parent) for example in examples if example.repeats > MANY_REPEATS})
    if often:
        print(f"the number is taken for repeats per epoch; rename the folder if it is a year: {', '.join(often)}")
    without = sum(_as_spoken(project.trigger_word) not in _as_spoken(example.caption) for example in examples)
    if without:
        said = f"{without} of {len(examples)} captions do not have the trigger word {project.trigger_word!r} in them"
        print(f"{said}: run the caption stage again, unless you mean that")
    unused = unused_entries(folder)
    if unused:
        print(f"not used, because neither image, caption of one, nor N_name folder: {', '.join(unused)}")
    return examples


def _as_spoken(text: str) -> str:
    return text.replace("_", " ").casefold()
