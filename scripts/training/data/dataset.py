"""What a run starts from: the base model, and the images of the data set with their captions.

Imports no torch, which takes seconds: a worker process reads this while the main process imports torch.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from common.caption_lists import LIST_FILES
from common.captions import has_trigger, has_weights
from common.dataset_layout import (
    DatasetFolder,
    ImageFile,
    Selection,
    find_regularization_images,
    name_in,
    own_resolutions,
    select_images,
)
from common.errors import DataError, SomeItemsFailed, abbreviated, bullet_list
from common.files import parse_json, read_file, sha256_of
from common.image_folders import FOLDER_FILE
from common.output_layout import OutputLayout
from common.project import ProjectSettings
from common.triggers import classes_of, contained_triggers, foreign_triggers
from common.unused_entries import unused_entries
from training.config import DataSettings, TrainSettings
from training.data.examples import Example, read_examples, read_regularization
from training.models.base_model import compute_digests, find_base
from training.models.sdxl import BaseModel

MANY_REPEATS = 100
"""More repeats of an image per epoch are probably a mistake, such as a year in a folder's name."""


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


def other_entries(folder: Path, images: Sequence[ImageFile], unused: Collection[str]) -> list[str]:
    """Names of the other entries in `folder` that are neither `images`, captions of images, nor `N_name` folders with images."""
    paths = [path for image in images for path in (image.path, image.caption_to_read, *image.masks)]
    used = {path.relative_to(folder).parts[0] for path in paths if folder in path.parents}
    used |= {FOLDER_FILE, *LIST_FILES, *(Path(name).parts[0] for name in unused)}
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in used and not entry.name.startswith("."))
