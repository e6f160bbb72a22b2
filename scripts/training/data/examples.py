"""Images with their captions and masks -> examples, or a line for each that says why it cannot be trained on. Imports no torch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.background import prefetch
from common.captions import UnusableCaptionError, in_lines, in_one_line, read_caption
from common.dataset_layout import DatasetFolder, ImageFile, caption_owners, find_images, name_in
from common.errors import DataError, abbreviated, bullet_list
from common.files import sha256_of
from common.images import BrokenImageError, DecodedImage, read_image, read_mask
from common.progress import ProgressBar
from common.settings import pipeline_command
from common.unused_entries import describe_missing_images
from training.config import DataSettings

MIN_SIDE_PX = 256

LEAST_WHITE = 32
"""Of 255: a mask that is darker everywhere is a mistake."""


@dataclass(frozen=True)
class Example:
    """An image with its caption."""

    path: Path
    name: str
    """Path relative to the folder of images, or of a regularization image to DATASET_DIR; for messages."""
    caption: str
    """Several captions are separated by line feeds."""
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
    trigger: str = ""
    """The trigger word that the image is for; empty for a regularization image."""
    class_word: str = ""
    """The kind of subject, as its folder names it; empty if it does not."""
    is_regularization: bool = False

    @property
    def captions(self) -> list[str]:
        return self.caption.split("\n")


def read_examples(
    folder: Path,
    workers: int,
    skipped: Collection[str] = (),
    trigger: str = "",
    *,
    found: Sequence[ImageFile] | None = None,
    per_line: bool = False,
    alpha_is_mask: bool = False,
) -> tuple[list[Example], list[str]]:
    """All images of `folder` and its folders, except those whose names are in `skipped`, with their captions; and for each that
    cannot be trained on a line that says why. `trigger` is the trigger word of folders without one of their own.

    `found`: all images, where they are known already. Each is decoded once, by `workers` threads.
    `alpha_is_mask`: the transparency of an image without a mask is its mask.
    Raises DataError if captions cannot be used, images have no caption yet, or none can be trained on.
    """
    found = find_images(folder) if found is None else found
    images = [image for image in found if name_in(folder, image.path) not in skipped]
    if found and not images:
        raise DataError(f"{folder}: all {len(found)} images are flagged or excluded; set SKIP_FLAGGED=0, or shorten exclude.txt")
    if not images:
        remedy = "put them there or run the collect stage, then the caption stage"
        raise DataError(describe_missing_images(folder, remedy))
    how = {"per_line": per_line, "alpha_is_mask": alpha_is_mask}
    results = _read_all(images, workers, folder=folder, dataset=folder.parent, trigger=trigger, **how)
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


def read_regularization(
    dataset: DatasetFolder, images: Sequence[ImageFile], workers: int, weight: float, *, per_line: bool, alpha_is_mask: bool
) -> tuple[list[Example], list[str]]:
    """The regularization `images` with their captions, and for each that cannot be trained on a line that says why.

    The caption of an image without one is its class: that of `folder.toml`, or in the folder's name. With `weight` 0 there are
    none. Raises DataError if captions cannot be used, or an image has neither caption nor class.
    """
    if not images:
        if weight != DataSettings.prior_weight:
            print(f"prior_weight: has no effect, because there are no images in {dataset.regularization[0]}")
        return [], []
    if not weight:
        print(f"regularization: off (PRIOR_WEIGHT=0); {len(images)} images in {dataset.root} are not used")
        return [], []
    how = {"per_line": per_line, "alpha_is_mask": alpha_is_mask}
    results = _read_all(images, workers, folder=dataset.root, dataset=dataset.root, trigger="", **how)
    if wrong := [str(result) for result in results if isinstance(result, UnusableCaptionError)]:
        raise DataError(bullet_list(f"{dataset.root}: {len(wrong)} captions of regularization images cannot be used:", wrong))
    if nameless := [name_in(dataset.root, image.path) for image, result in zip(images, results, strict=True) if result is None]:
        which = f"{len(nameless)} regularization images have neither a caption nor a class ({abbreviated(nameless)})"
        remedy = f"write a caption, or move them into a folder N_class, such as {dataset.regularization[0].name}/1_woman"
        raise DataError(f"{dataset.root}: {which}; {remedy}")
    return [each for each in results if isinstance(each, Example)], [each for each in results if isinstance(each, str)]


def _read_all(
    images: Sequence[ImageFile], workers: int, **how: Path | str | bool
) -> list[Example | str | UnusableCaptionError | None]:
    """What `_read` returns for each image; `how` are its other arguments."""
    owners, results = caption_owners(images), []
    with ProgressBar(len(images), "reading images", "images", leave=False) as bar:
        for result in prefetch(lambda image: _read(image, owners[image.caption_path], **how), images, workers):
            results.append(result)
            bar.update()
    return results


def _read(
    image: ImageFile, owner: ImageFile, *, folder: Path, dataset: Path, trigger: str, per_line: bool, alpha_is_mask: bool
) -> Example | str | UnusableCaptionError | None:
    """The example, or a line with everything that is wrong with the image; for an image without fault, what is wrong with its
    caption, or None if it has none yet. Names are relative to `folder`, and `owner` is the image to which its caption belongs."""
    name = name_in(folder, image.path)
    problems, caption, unusable = [], None, None
    normalized = in_lines if per_line else in_one_line
    if owner != image:
        problems.append(f"would share its caption with {name_in(folder, owner.path)}; rename one of the two")
    if len(image.masks) > 1:
        names = " and ".join(name_in(folder.parent, mask) for mask in image.masks)
        problems.append(f"has several masks, {names}; remove all but one")
    try:
        caption = normalized(read_caption(image.caption_to_read, dataset))
    except FileNotFoundError:
        if image.listed_caption is not None:
            caption = normalized(image.listed_caption)
        elif image.is_regularization:
            caption = image.folder.class_word or None
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
    own = image.folder
    return Example(
        image.path,
        name,
        caption,
        width,
        height,
        own.repeats,
        sha256,
        decoded.revision,
        resolutions=own.resolutions,
        mask=mask,
        mask_key=mask_key,
        mask_weight=own.mask_weight,
        trigger="" if image.is_regularization else own.trigger or trigger,
        class_word=own.class_word,
        is_regularization=image.is_regularization,
    )


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
        remedy = "; any size with the image's aspect ratio will do" if "pixels" in str(error) else ""
        raise BrokenImageError(f"{name} {error}{remedy}") from None
    (width, height), (image_width, image_height) = mask.rgb.size, decoded.rgb.size
    # Rounding gives the smaller one of both a pixel more or less.
    if abs(width * image_height - height * image_width) > max(*mask.rgb.size, *decoded.rgb.size):
        raise BrokenImageError(
            f"{name} has {width}x{height} px, another aspect ratio than the image's {image_width}x{image_height}"
        )
    if (brightest := mask.alpha.getextrema()[1]) < LEAST_WHITE:  # labels of 0 and 1, for example
        raise BrokenImageError(f"{name} leaves nothing of the image: its brightest level is {brightest}, and white is 255")
    return path, sha256_of(path) + mask.revision + (" alpha" if path == image.path else "")
