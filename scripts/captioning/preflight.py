"""`--check`: everything that would stop captioning, in one list."""

import os
from collections.abc import Callable
from pathlib import Path

from captioning.config import CaptionSettings
from captioning.model_files import find_model, model_size_on_hub
from captioning.tag_cache import load_tagger
from common.dataset_layout import IMAGE_SUFFIXES, DatasetFolder, ImageFile, find_images
from common.errors import DataError, ResourceError, run_checks


def check(folder: DatasetFolder, settings: CaptionSettings, models_dir: Path, *, is_ahead: bool) -> None:
    """Print what the stage has; raise one list of what is missing, with the exit code of the first entry.

    `is_ahead`: an earlier stage is still to run, so that images may be missing.
    """
    checks: list[Callable[[], str]] = [
        lambda: f"{len(find_images(folder.images) if is_ahead else require_images(folder))} images in {folder.images}",
        lambda: _check_folders(folder),
        lambda: _check_model(settings, models_dir),
    ]
    run_checks("captioning cannot run:", [_naming_unreadable_file(check) for check in checks])


def require_images(folder: DatasetFolder) -> list[ImageFile]:
    """The images of the data set. Raises DataError if there are none."""
    images = find_images(folder.images)
    if not images:
        raise DataError(f"{folder.images}: no images ({', '.join(IMAGE_SUFFIXES)}); put some there, or run the collect stage first")
    return images


def _naming_unreadable_file(check: Callable[[], str]) -> Callable[[], str]:
    """The check, with a file that may not be read as one more problem of the list."""

    def run() -> str:
        try:
            return check()
        except OSError as error:
            raise ResourceError(f"{error.filename}: {error.strerror}; make it accessible to this user") from None

    return run


def _check_folders(folder: DatasetFolder) -> str:
    folders = {image.path.parent for image in find_images(folder.images)} | {_nearest_existing(folder.records)}
    read_only = sorted(str(path) for path in folders if not os.access(path, os.W_OK | os.X_OK))
    if read_only:
        raise ResourceError(f"{', '.join(read_only)}: captions cannot be written there; make it writable for this user")
    return f"captions can be written to {folder.images}"


def _check_model(settings: CaptionSettings, models_dir: Path) -> str:
    name = settings.caption_model
    model_folder = find_model(name, models_dir)
    if model_folder:
        tagger = load_tagger(model_folder, settings, settings.caption_batch_size)
        return f"tagger {model_folder}: loads on the {tagger.device}, {len(tagger.tags)} tags"
    size_bytes = model_size_on_hub(name, models_dir)
    parent = _nearest_existing(models_dir)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(f"{parent}: {name} cannot be downloaded to it; make it writable for this user")
    return f"tagger {name}: will be downloaded to {models_dir} ({size_bytes / 1e6:.0f} MB)"


def _nearest_existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
