"""What a run starts from: the base model, and the images of the data set with their captions.

Imports no torch, which takes seconds: a worker process reads this while the main process imports torch.
"""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.captions import UnusableCaptionError, has_trigger, in_one_line, read_caption
from common.dataset_layout import (
    DatasetFolder,
    ImageFile,
    caption_owners,
    describe_missing_images,
    find_images,
    name_in,
    select_images,
    unused_entries,
)
from common.errors import DataError, SomeItemsFailed, abbreviated, bullet_list
from common.files import parse_json, read_file, sha256_of
from common.images import BrokenImageError, DecodedImage, read_image, read_mask
from common.output_layout import OutputLayout
from common.project import ProjectSettings
from common.settings import pipeline_command
from training.config import DataSettings, TrainSettings
from training.models.base_model import compute_digests, find_base
from training.models.sdxl import BaseModel

MIN_SIDE_PX = 256

MANY_REPEATS = 100
"""More repeats of an image per epoch are probably a mistake, such as a year in a folder's name."""


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
    """Per epoch."""
    sha256: str
    """Of the file's bytes."""
    revision: str = ""
    """See `DecodedImage.revision`."""
    resolutions: tuple[int, ...] = ()
    """Those that it is trained at, in pixels; empty: as the settings say. In a plan, an example has one."""
    is_mirrored: bool = False
    """It is the mirror image of what the file holds."""
    mask: Path | None = None
    """The file that says which areas count; the image itself: its transparency says it."""
    mask_key: str = ""
    """Stands for the pixels of the mask; empty without one."""
    mask_weight: float | None = None
    """Weight of the areas outside the mask; None: as the settings say."""


Inputs = tuple[BaseModel, list[Example], int]
"""The base model, the examples, and how many images cannot be trained on."""


def read_inputs(project: ProjectSettings, settings: TrainSettings) -> Inputs:
    """Read headers and hash weights, decode images and read captions. The values of the weights are not verified. Raises
    ModelError, or DataError with everything that is wrong with the data."""
    base = find_base(settings.model.base_model, project.models_dir)
    compute_digests(base, OutputLayout(project.output_dir, project.trigger_word).cache)
    return base, *read_images(project, settings.data)


def read_images(project: ProjectSettings, settings: DataSettings) -> tuple[list[Example], int]:
    """The examples of the data set, and how many of its images cannot be trained on. Prints what is left out or ignored, and
    what is probably a mistake."""
    dataset = DatasetFolder(project.dataset_dir)
    selection = select_images(dataset)
    print(selection.notes(), end="")
    flagged = flagged_images(dataset, settings.resolutions[-1]) if settings.skip_flagged else {}
    flagged = {name: flaws for name, flaws in flagged.items() if name not in selection.excluded}
    if flagged:
        print(f"skipping flagged images: {abbreviated([f'{name} ({flaws})' for name, flaws in flagged.items()])}")
    skipped, is_mask = {*flagged, *selection.excluded}, settings.alpha == "mask"
    examples, problems = read_examples(dataset.images, settings.dataloader_num_workers, skipped, alpha_is_mask=is_mask)
    if problems:
        print(bullet_list(f"{dataset.images}: {len(problems)} images cannot be trained on and are left out:", problems), flush=True)

    if masked := sum(example.mask is not None for example in examples):
        print(f"masks: {masked} of {len(examples)} images; what is outside a mask has weight {settings.mask_weight:g} in the loss")
    folders = sorted({str(example.path.parent) for example in examples if example.repeats > MANY_REPEATS})
    if folders:
        print(f"the number before a folder's name is the repeats per epoch; rename it if it is a year: {', '.join(folders)}")

    missing = sum(not has_trigger(example.caption, project.trigger_word) for example in examples)
    if missing:
        finding = f"{missing} of {len(examples)} captions do not contain the trigger word {project.trigger_word!r}"
        print(f"{finding}: run the caption stage again, or ignore this if it is intentional")
    unused = unused_entries(dataset.images)
    if ignored := [f"{name} ({unused[name]})" for name in unused] + other_entries(dataset.images, unused):
        print(f"ignored, because neither image, caption of an image, nor N_name folder: {abbreviated(ignored)}")
    return examples, len(problems)


def require_all_images(left_out: int) -> None:
    """At the end of a run or check: raises SomeItemsFailed if images could not be trained on."""
    if left_out:
        raise SomeItemsFailed(f"{left_out} images cannot be trained on and are left out; they are listed above")


def flagged_images(dataset: DatasetFolder, resolution: int) -> dict[str, str]:
    """Name -> flaws of the images that the caption stage's audit flagged, unless the file has changed since.

    Raises DataError if there is no audit for training at `resolution` px.
    """
    try:
        audit = parse_json(read_file(dataset.audit))
        audited_resolution, flagged = audit["resolution"], audit["flagged"]
        flaws = {name: ", ".join(found["flaws"]) for name, found in flagged.items()}
        digests = {name: found["sha256"] for name, found in flagged.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"SKIP_FLAGGED: {dataset.audit} is missing or damaged; run the caption stage first") from None
    if audited_resolution != resolution:
        remedy = f"run the caption stage again with RESOLUTION={resolution}"
        raise DataError(f"SKIP_FLAGGED: {dataset.audit} was made for {audited_resolution} px; {remedy}")
    names = {name_in(dataset.images, image.path): image.path for image in find_images(dataset.images)}
    return {name: flaws[name] for name in names if name in flaws and digests[name] in ("", sha256_of(names[name]))}


def read_examples(
    folder: Path, workers: int, skipped: Collection[str] = (), *, alpha_is_mask: bool = False
) -> tuple[list[Example], list[str]]:
    """All images of `folder` and its `N_name` folders, except those whose names are in `skipped`, with their captions; and for
    each that cannot be trained on a line that says why.

    Each image is decoded once, by `workers` threads. `alpha_is_mask`: the transparency of an image without a mask is its mask.
    Raises DataError if captions cannot be used, images have no caption yet, or none can be trained on.
    """
    found = find_images(folder)
    images = [image for image in found if name_in(folder, image.path) not in skipped]
    if found and not images:
        raise DataError(f"{folder}: all {len(found)} images are flagged or excluded; set SKIP_FLAGGED=0, or shorten exclude.txt")
    if not images:
        remedy = "put them there or run the collect stage, then the caption stage"
        raise DataError(describe_missing_images(folder, remedy))
    owners = caption_owners(images)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = list(pool.map(lambda image: _read(image, folder, owners[image.caption_path], alpha_is_mask), images))
    if unusable := [str(result) for result in results if isinstance(result, UnusableCaptionError)]:
        raise DataError(bullet_list(f"{folder}: {len(unusable)} of {len(images)} captions cannot be used:", unusable))
    if uncaptioned := [name_in(folder, image.path) for image, result in zip(images, results, strict=True) if result is None]:
        command = pipeline_command("--caption", "--train")
        which = f"{len(uncaptioned)} of the {len(images)} images have no caption ({abbreviated(uncaptioned)})"
        raise DataError(f"{folder}: {which}; caption them and train with: {command}")
    examples, problems = ([each for each in results if isinstance(each, kind)] for kind in (Example, str))
    if not examples:
        raise DataError(bullet_list(f"{folder}: none of the {len(images)} images can be trained on:", problems))
    return examples, problems


def _read(image: ImageFile, folder: Path, owner: ImageFile, alpha_is_mask: bool) -> Example | str | UnusableCaptionError | None:
    """The example, or a line with everything that is wrong with the image; for an image without fault, what is wrong with its
    caption, or None if it has none yet. `owner` is the image to which its caption belongs."""
    name = name_in(folder, image.path)
    problems, caption, unusable = [], None, None
    if owner != image:
        problems.append(f"would share its caption with {name_in(folder, owner.path)}; rename one of the two")
    if len(image.masks) > 1:
        names = " and ".join(name_in(folder.parent, mask) for mask in image.masks)
        problems.append(f"has several masks, {names}; remove all but one")
    try:
        caption = in_one_line(read_caption(image.caption_to_read, dataset=folder.parent))
    except FileNotFoundError:
        pass
    except UnusableCaptionError as error:
        unusable = UnusableCaptionError(f"{name_in(folder, image.caption_to_read)} {error}")
    try:
        decoded = read_image(image.path)
        width, height = decoded.rgb.size
        if min(width, height) < MIN_SIDE_PX:
            problems.append(f"{width}x{height} is too small; the shorter side must have at least {MIN_SIDE_PX} px")
        mask, mask_key = _find_mask(image, decoded, folder, alpha_is_mask=alpha_is_mask)
    except BrokenImageError as error:
        problems.append(f"{error}; replace or remove it")
    if problems:
        return f"{name}: {'; '.join(problems)}"
    if caption is None:
        return unusable
    sha256 = sha256_of(image.path)
    how = {"mask": mask, "mask_key": mask_key}
    return Example(image.path, name, caption, width, height, image.repeats, sha256, decoded.revision, **how)


def _find_mask(image: ImageFile, decoded: DecodedImage, folder: Path, *, alpha_is_mask: bool) -> tuple[Path | None, str]:
    """The file that holds the mask of an image, and what stands for its pixels: its SHA-256 and its revision. None without a mask.

    Raises BrokenImageError if the mask cannot be used.
    """
    if image.masks:
        path, name = image.masks[0], f"its mask {name_in(folder.parent, image.masks[0])}"
    elif alpha_is_mask and decoded.alpha:
        path, name = image.path, "its transparency"
    else:
        return None, ""
    try:
        mask = decoded if path == image.path else read_mask(path, image.path)
    except BrokenImageError as error:
        raise BrokenImageError(f"{name} {error}") from None
    (width, height), (image_width, image_height) = mask.rgb.size, decoded.rgb.size
    if abs(width * image_height - height * image_width) > max(decoded.rgb.size):  # more than a pixel, which rounding gives
        raise BrokenImageError(
            f"{name} has {width}x{height} px, another aspect ratio than the image's {image_width}x{image_height}"
        )
    if mask.alpha.getextrema()[1] == 0:
        raise BrokenImageError(f"{name} leaves nothing of the image, which has to be white in it")
    return path, sha256_of(path) + mask.revision + (" alpha" if path == image.path else "")


def other_entries(folder: Path, unused: Collection[str]) -> list[str]:
    """Names of the other entries in `folder` that are neither images, captions of images, nor `N_name` folders with images."""
    paths = [path for image in find_images(folder) for path in (image.path, image.caption_to_read, *image.masks)]
    used = {path.relative_to(folder).parts[0] for path in paths if folder in path.parents}
    used |= {Path(name).parts[0] for name in unused}
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in used and not entry.name.startswith("."))
