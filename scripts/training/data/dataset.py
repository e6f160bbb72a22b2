"""What a run starts from: the base model, and the images of the data set with their captions.

Imports no torch, which takes seconds: a worker process reads this while the main process imports torch.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.background import prefetch
from common.caption_lists import LIST_FILES
from common.captions import UnusableCaptionError, has_trigger, has_weights, in_lines, in_one_line, read_caption
from common.dataset_layout import (
    DatasetFolder,
    ImageFile,
    Selection,
    caption_owners,
    find_images,
    find_regularization_images,
    name_in,
    own_resolutions,
    select_images,
)
from common.errors import DataError, SomeItemsFailed, abbreviated, bullet_list
from common.files import parse_json, read_file, sha256_of
from common.image_folders import FOLDER_FILE
from common.images import BrokenImageError, DecodedImage, read_image, read_mask
from common.output_layout import OutputLayout
from common.progress import ProgressBar
from common.project import ProjectSettings
from common.settings import pipeline_command
from common.triggers import classes_of, contained_triggers, foreign_triggers
from common.unused_entries import describe_missing_images, unused_entries
from training.config import DataSettings, TrainSettings
from training.models.base_model import compute_digests, find_base
from training.models.sdxl import BaseModel

MIN_SIDE_PX = 256

LEAST_WHITE = 32
"""Of 255: a mask that is darker everywhere is a mistake."""

MANY_REPEATS = 100
"""More repeats of an image per epoch are probably a mistake, such as a year in a folder's name."""


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


Inputs = tuple[BaseModel, list[Example], int]
"""The base model, the examples, and how many images cannot be trained on."""


def read_inputs(project: ProjectSettings, settings: TrainSettings) -> Inputs:
    """Read headers and hash weights, decode images and read captions. The values of the weights are not verified. Raises
    ModelError, or DataError with everything that is wrong with the data."""
    base = find_base(settings.model.base_model, project.models_dir)
    compute_digests(base, OutputLayout(project.output_dir, project.trigger_word).cache)
    return base, *read_images(project, settings.data)


def read_images(
    project: ProjectSettings, settings: DataSettings, files: tuple[Selection, list[ImageFile]] | None = None
) -> tuple[list[Example], int]:
    """The examples of the data set, those of regularization images last, and how many of its images cannot be trained on. Prints
    what is left out or ignored, and what is probably a mistake. `files`: the images and the regularization images, where they are
    known already."""
    dataset = DatasetFolder(project.dataset_dir)
    selection, priors = files or (select_images(dataset), find_regularization_images(dataset))
    print(selection.notes(), end="")
    flagged = flagged_images(dataset, selection.found, settings.resolutions[-1]) if settings.skip_flagged else {}
    flagged = {name: flaws for name, flaws in flagged.items() if name not in selection.excluded}
    if flagged:
        print(f"skipping flagged images: {abbreviated([f'{name} ({flaws})' for name, flaws in flagged.items()])}")
    _require_resolutions([*selection.images, *priors], settings)
    workers, trigger = settings.dataloader_num_workers, project.trigger_word
    classes = classes_of(dict.fromkeys(image.folder for image in selection.images), trigger)
    how = {"per_line": settings.caption_per_line, "alpha_is_mask": settings.alpha == "mask"}
    examples, problems = read_examples(
        dataset.images, workers, {*flagged, *selection.excluded}, trigger, found=selection.found, **how
    )
    regularization, unusable = read_regularization(dataset, priors, workers, settings.prior_weight, **how)
    _require_other_class(regularization, classes)
    trained = {example.sha256: example.name for example in examples}
    unusable += [
        f"{example.name}: is the same image as {dataset.images.name}/{trained[example.sha256]}; remove one of the two"
        for example in regularization
        if example.sha256 in trained
    ]
    regularization = [example for example in regularization if example.sha256 not in trained]
    for folder, lines in ((dataset.images, problems), (dataset.root, unusable)):
        if lines:
            print(bullet_list(f"{folder}: {len(lines)} images cannot be trained on and are left out:", lines), flush=True)

    if masked := [example for example in examples if example.mask]:
        print(f"masks: {len(masked)} of {len(examples)} images; {_describe_mask_weights(masked, dataset, settings.mask_weight)}")
    folders = sorted({str(example.path.parent) for example in examples if example.repeats > MANY_REPEATS})
    if folders:
        print(f"the number before a folder's name is the repeats per epoch; rename it if it is a year: {', '.join(folders)}")

    for word in classes:
        captions = [caption for example in examples if example.trigger == word for caption in example.captions]
        if missing := sum(not has_trigger(caption, word) for caption in captions):
            finding = f"{missing} of {len(captions)} captions do not contain the trigger word {word!r}"
            print(f"{finding}: run the caption stage again, or ignore this if it is intentional")
    captions = {example.name: (example.trigger, example.caption) for example in [*examples, *regularization]}
    for line in [*contained_triggers(classes), *foreign_triggers(captions)]:
        print(line)
    if weighted := [name for name, (_, caption) in captions.items() if has_weights(caption)]:
        which = f"{len(weighted)} captions have weights such as (word:1.2): {abbreviated(weighted)}"
        print(f"{which}; training reads brackets and numbers as text, so write the words alone")
    unused = unused_entries(dataset.images, selection.found)
    ignored = [f"{name} ({unused[name]})" for name in unused] + other_entries(dataset.images, selection.found, unused)
    for folder in dataset.regularization:
        ignored += [f"{folder.name}/{name} ({what})" for name, what in unused_entries(folder, priors).items()]
    if ignored:
        print(f"ignored, because neither image, caption of an image, nor N_name folder: {abbreviated(ignored)}")
    return [*examples, *regularization], len(problems) + len(unusable)


def _describe_mask_weights(examples: Sequence[Example], dataset: DatasetFolder, usual: float) -> str:
    """The weight of what is outside the masks, and which folders have one of their own."""
    weights: dict[float, set[str]] = {}
    for example in examples:
        own = example.mask_weight
        weights.setdefault(usual if own is None else own, set()).add(name_in(dataset.root, example.path.parent))
    shown = [f"{weight:g}" if len(weights) == 1 else f"{weight:g} ({abbreviated(sorted(weights[weight]))})" for weight in weights]
    return f"what is outside a mask has weight {', '.join(shown)} in the loss"


def _require_other_class(regularization: Sequence[Example], triggers: Iterable[str]) -> None:
    """Raises DataError if the class that is the caption of regularization images contains a trigger word."""
    folders = {each.path.parent: each.class_word for each in regularization if each.caption == each.class_word}
    problems = [
        f"{folder}: its class {class_word!r} contains the trigger word {trigger!r}"
        for folder, class_word in folders.items()
        for trigger in triggers
        if has_trigger(class_word, trigger)
    ]
    if problems:
        remedy = "regularization images show the class without the subject; name it alone, such as 1_woman:"
        raise DataError(bullet_list(remedy, problems))


def _require_resolutions(images: Sequence[ImageFile], settings: DataSettings) -> None:
    """Raises DataError for folders whose resolution does not fit the settings of buckets."""
    step, most = settings.bucket_step, settings.bucket_max_side
    folders = dict.fromkeys(image.folder for image in images)
    wrong = [folder for folder in folders if any(size % step or size > most for size in folder.resolutions)]
    problems = [f"{folder.path / FOLDER_FILE}: resolution must be a multiple of {step}, at most {most}" for folder in wrong]
    if problems:
        raise DataError(bullet_list("folders cannot be trained at their resolutions (BUCKET_STEP, BUCKET_MAX_SIDE):", problems))


def require_all_images(left_out: int) -> None:
    """At the end of a run or check: raises SomeItemsFailed if images could not be trained on."""
    if left_out:
        raise SomeItemsFailed(f"{left_out} images cannot be trained on and are left out; they are listed above")


def flagged_images(dataset: DatasetFolder, images: Sequence[ImageFile], resolution: int) -> dict[str, str]:
    """Name -> flaws of those `images` that the caption stage's audit flagged, unless the file has changed since.

    Raises DataError if there is no audit for training at `resolution` px.
    """
    try:
        audit = parse_json(read_file(dataset.audit))
        audited, flagged = (audit["resolution"], audit.get("folders", {})), audit["flagged"]
        flaws = {name: ", ".join(found["flaws"]) for name, found in flagged.items()}
        digests = {name: found["sha256"] for name, found in flagged.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"SKIP_FLAGGED: {dataset.audit} is missing or damaged; run the caption stage first") from None
    if audited[0] != resolution:
        remedy = f"run the caption stage again with RESOLUTION={resolution}"
        raise DataError(f"SKIP_FLAGGED: {dataset.audit} was made for {audited[0]} px; {remedy}")
    if audited[1] != own_resolutions(dataset, images):
        changed = f"the resolutions in the files {FOLDER_FILE} have changed since {dataset.audit} was made"
        raise DataError(f"SKIP_FLAGGED: {changed}; run the caption stage again")
    names = {name_in(dataset.images, image.path): image.path for image in images}
    return {name: flaws[name] for name in names if name in flaws and digests[name] in ("", sha256_of(names[name]))}


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


def other_entries(folder: Path, images: Sequence[ImageFile], unused: Collection[str]) -> list[str]:
    """Names of the other entries in `folder` that are neither `images`, captions of images, nor `N_name` folders with images."""
    paths = [path for image in images for path in (image.path, image.caption_to_read, *image.masks)]
    used = {path.relative_to(folder).parts[0] for path in paths if folder in path.parents}
    used |= {FOLDER_FILE, *LIST_FILES, *(Path(name).parts[0] for name in unused)}
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in used and not entry.name.startswith("."))
