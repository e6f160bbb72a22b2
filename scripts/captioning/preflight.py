"""`--check`: everything that would stop captioning, in one list."""

from collections.abc import Callable
from pathlib import Path

from captioning.config import CaptionSettings
from captioning.model_files import found_folder, size_on_hub
from captioning.tag_cache import load_tagger
from common.dataset_layout import IMAGE_SUFFIXES, DatasetFolder, ImageFile, find_images
from common.errors import DataError, ResourceError, run_checks
from common.files import write_problem


def check(folder: DatasetFolder, settings: CaptionSettings, models_dir: Path, *, inputs_pending: bool) -> None:
    """Print what is there; raise one list of what is not, with the exit code of the first entry. `inputs_pending`: the images
    may be yet to come."""
    questions: list[Callable[[], str]] = [
        lambda: f"{len(find_images(folder.images) if inputs_pending else images_in(folder))} images in {folder.images}",
        lambda: _writable(folder),
        lambda: _usable_model(settings, models_dir),
    ]
    run_checks("captioning cannot run:", [_accessible(question) for question in questions])


def images_in(folder: DatasetFolder) -> list[ImageFile]:
    """The images of the data set. Raises DataError if there are none."""
    images = find_images(folder.images)
    if not images:
        raise DataError(
            f"{folder.images}: no images ({', '.join(IMAGE_SUFFIXES)}); put yours there, or run the collect stage first"
        )
    return images


def _accessible(question: Callable[[], str]) -> Callable[[], str]:
    """The question, with a file that may not be read as one more thing that is wrong."""

    def ask() -> str:
        try:
            return question()
        except OSError as error:
            raise ResourceError(f"{error.filename}: {error.strerror}; make it accessible for this user") from None

    return ask


def _writable(folder: DatasetFolder) -> str:
    folders = {image.path.parent for image in find_images(folder.images)} | {folder.records}
    problems = sorted({problem for each in folders if (problem := write_problem(each))})
    if problems:
        raise ResourceError(f"captions cannot be written: {'; '.join(problems)}")
    return f"captions can be written to {folder.images}"


def _usable_model(settings: CaptionSettings, models_dir: Path) -> str:
    name = settings.caption_model
    there = found_folder(name, models_dir)
    if there:
        tagger = load_tagger(there, settings, settings.caption_batch_size)
        return f"the tagger in {there} loads on the {tagger.runs_on}, with {len(tagger.tags)} tags"
    size_bytes = size_on_hub(name, models_dir)
    if problem := write_problem(models_dir):
        raise ResourceError(f"{name} cannot be downloaded: {problem}")
    return f"{name} will be fetched into {models_dir} ({size_bytes / 1e6:.0f} MB)"
