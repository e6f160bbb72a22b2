"""`--check`: everything that would stop captioning, in one list."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from captioning.config import CaptionSettings
from captioning.model_files import find_model, model_size_on_hub
from captioning.tag_cache import load_tagger
from common.captions import ordinary_trigger
from common.dataset_layout import DatasetFolder, ImageFile, Selection, find_regularization_images, select_images
from common.dataset_table import dataset_table
from common.errors import DataError, ModelError, ResourceError, run_checks
from common.faces import MissingWeightsError, load_face_model, size_of_missing_weights
from common.files import write_problem
from common.image_folders import find_folders
from common.project import ProjectSettings
from common.triggers import classes_of, contained_triggers
from common.unused_entries import describe_missing_images


def check(folder: DatasetFolder, settings: CaptionSettings, project: ProjectSettings, *, inputs_pending: bool) -> None:
    """Print what the stage has; raise one list of what is missing, with the exit code of the first entry.

    `inputs_pending`: the collect stage is still to run, so that images may be missing.
    """
    checks = [
        lambda: _describe_images(folder, project.trigger_word, inputs_pending),
        lambda: _check_folders(folder),
        lambda: _check_model(settings, project),
        lambda: _describe_face_model(project.face_model, project.models_dir),
    ]
    run_checks("captioning cannot run:", [partial(_naming_unreadable_file, check) for check in checks])


def require_images(folder: DatasetFolder) -> Selection:
    """The images of the data set. Raises DataError if there are none."""
    selection = select_images(folder)
    if selection.excluded and not selection.images:
        raise DataError(f"{folder.exclusions}: excludes all {len(selection.excluded)} images; remove lines from it")
    if not selection.images:
        raise DataError(describe_missing_images(folder.images, "put some there, or run the collect stage first"))
    return selection


def _describe_images(folder: DatasetFolder, trigger: str, inputs_pending: bool) -> str:
    selection = select_images(folder) if inputs_pending else require_images(folder)
    triggers = describe_triggers(selection.images, trigger)
    found = f"{selection.notes()}{len(selection.images)} images in {folder.images}{triggers}"
    if not selection.images:
        return found
    return f"{found}\n{dataset_table(folder, selection, find_regularization_images(folder), trigger)}"


def describe_triggers(images: Iterable[ImageFile], trigger: str) -> str:
    """The trigger words of the folders, and what is wrong with them: "" for one. Raises DataError as `classes_of` does."""
    classes = classes_of(dict.fromkeys(image.folder for image in images), trigger)
    if len(classes) < 2:
        return ""
    shown = [f"{word} ({of_class})" if of_class else word for word, of_class in classes.items()]
    return "\n".join([f", of {len(classes)} concepts: {', '.join(shown)}", *contained_triggers(classes)])


def _naming_unreadable_file(check: Callable[[], str]) -> str:
    """The result of `check`; a file that may not be read becomes one more problem of the list."""
    try:
        return check()
    except OSError as error:
        raise ResourceError(f"{error.filename}: {error.strerror}; make it accessible to this user") from None


def _check_folders(folder: DatasetFolder) -> str:
    folders = {each.path for each in find_folders(folder.images) if each.repeats} | {folder.records}
    problems = sorted({problem for path in folders if (problem := write_problem(path))})
    if problems:
        raise ResourceError(f"captions cannot be written: {'; '.join(problems)}")
    return f"captions can be written to {folder.images}"


def _describe_face_model(name: str, models_dir: Path) -> str:
    """Captions do not depend on it: a missing model is not a problem."""
    if name == "off":
        return "face model: off"
    try:
        try:
            load_face_model(name, models_dir)
        except MissingWeightsError:
            size_bytes = size_of_missing_weights(name, models_dir)
            return f"face model {name}: will be downloaded to {models_dir} ({size_bytes / 1e6:.0f} MB)"
    except (ModelError, OSError) as error:
        return f"no likeness: {error}"
    return f"face model {name}: loads"


def _check_model(settings: CaptionSettings, project: ProjectSettings) -> str:
    name, models_dir = settings.caption_model, project.models_dir
    model_folder = find_model(name, models_dir)
    if model_folder:
        tagger = load_tagger(model_folder, settings, settings.caption_batch_size)
        warning = ordinary_trigger(project.trigger_word, [tag.name for tag in tagger.tags], {})
        loads = f"tagger {model_folder}: loads on the {tagger.device}, {len(tagger.tags)} tags"
        return f"{loads}\n{warning}" if warning else loads
    size_bytes = model_size_on_hub(name, models_dir)
    if problem := write_problem(models_dir):
        raise ResourceError(f"{name} cannot be downloaded: {problem}")
    return f"tagger {name}: will be downloaded to {models_dir} ({size_bytes / 1e6:.0f} MB)"
