"""Caption every picture of DATASET_DIR/images: a WD14 tagger's tags, the trigger word first.

A picture without a caption is tagged. A caption that exists keeps its text and only gains a missing trigger word (an empty
one becomes the trigger word alone); a trigger that this stage wrote is replaced when TRIGGER_WORD changes.
CAPTION_OVERWRITE=1 tags every picture anew.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from captioning.caption_files import CaptionFiles, UnusableCaptionError
from captioning.captions import TagChoice
from captioning.model_files import MODEL_FILE, TAGS_FILE, fetched_folder, found_folder, size_on_hub
from captioning.tagger import Tagger, prepare
from dataset_folder import IMAGE_SUFFIXES, DatasetFolder, ImageFile, find_images
from errors import DataError, LoracatError, ResourceError, SomeItemsFailed, exit_code_of, one_list, stop_on_signals
from pictures import BrokenPictureError, open_rgb
from settings import CaptionSettings, ProjectSettings, read_request

STAGE = "caption_images"


@dataclass
class Tally:
    """What became of the pictures; each failure is reported when it happens."""

    captioned: int = 0
    kept: int = 0
    given: int = 0
    """Captions that existed and now have the trigger."""
    failed: int = 0

    def fail(self, path: Path, reason: object) -> None:
        self.failed += 1
        tqdm.write(f"{STAGE}: {path}: {reason}", file=sys.stderr)


def main(argv: list[str]) -> None:
    stop_on_signals()
    request = read_request(STAGE, __doc__, argv, {"project": ProjectSettings, "caption": CaptionSettings})
    project, settings = request.sections["project"], request.sections["caption"]
    folder = DatasetFolder(project.dataset_dir)
    if request.check:
        check(folder, settings, project.models_dir)
        return
    images, tally = pictures_in(folder), Tally()
    to_tag, to_keep = sorted_out(images, settings.caption_overwrite, tally)
    print(f"{len(images)} pictures in {folder.images}, {len(to_tag)} to tag; set by you: {request.overridden()}", flush=True)
    captions = CaptionFiles(folder, project.trigger_word)
    keep(to_keep, captions, tally)
    if to_tag:
        tagger = load_tagger(settings, project.models_dir, batch_size=min(settings.caption_batch_size, len(images)))
        tag(to_tag, tagger, settings, captions, tally)
    report(tally, project.trigger_word)


def pictures_in(folder: DatasetFolder) -> list[ImageFile]:
    images = find_images(folder.images)
    if not images:
        raise DataError(
            f"{folder.images}: no pictures ({', '.join(IMAGE_SUFFIXES)}); put yours there, or run the collect stage first"
        )
    return images


def sorted_out(images: list[ImageFile], overwrite: bool, tally: Tally) -> tuple[list[ImageFile], list[ImageFile]]:
    """The pictures to tag, and those whose caption is kept.

    Pictures with the same stem would share one caption: it belongs to the first of them, the others fail.
    """
    owners: dict[Path, ImageFile] = {}
    to_tag, to_keep = [], []
    for image in images:
        caption = image.caption_path
        owner = owners.setdefault(caption, image)
        if owner is not image:
            tally.fail(image.path, f"would share {caption.name} with {owner.path.name}; rename one of the two pictures")
        elif caption.exists() and not caption.is_file():
            tally.fail(caption, "is not a file; rename it")
        else:
            (to_keep if caption.exists() and not overwrite else to_tag).append(image)
    return to_tag, to_keep


def keep(images: list[ImageFile], captions: CaptionFiles, tally: Tally) -> None:
    """Captions that exist gain a missing trigger and are else left as they are."""
    for image in tqdm(images, desc="captions that exist", unit="file", disable=None):
        try:
            changed = captions.keep(image.caption_path)
        except UnusableCaptionError as error:
            tally.fail(image.caption_path, error)
            continue
        tally.given += changed
        tally.kept += not changed


def load_tagger(settings: CaptionSettings, models_dir: Path, batch_size: int) -> Tagger:
    """The tagger from its folder, fetched first if need be. `batch_size` is the same however much of the work is left."""
    name = settings.caption_model
    folder = found_folder(name, models_dir) or fetched_folder(name, models_dir)
    return Tagger(folder / MODEL_FILE, folder / TAGS_FILE, batch_size)


def tag(images: list[ImageFile], tagger: Tagger, settings: CaptionSettings, captions: CaptionFiles, tally: Tally) -> None:
    """Tag in batches, decoded as they go; each caption is written as soon as its batch is done."""
    choice = TagChoice(tagger.tags, settings.caption_threshold, settings.caption_character_threshold, settings.caption_exclude_tags)
    with tqdm(total=len(images), desc="tagging", unit="picture", disable=None) as bar:
        decoded = prepared(images, tagger.side_px, tally, bar)
        while batch := list(islice(decoded, tagger.batch_size)):
            probabilities = tagger.probabilities([picture for _, picture in batch])
            for (image, _), of_image in zip(batch, probabilities, strict=True):
                captions.write(image.caption_path, choice.words(of_image))
                tally.captioned += 1
                bar.update()


def prepared(images: Iterable[ImageFile], side_px: int, tally: Tally, bar: tqdm) -> Iterator[tuple[ImageFile, np.ndarray]]:
    """The pictures that decode, ready for the tagger; the others are reported and passed over."""
    for image in images:
        try:
            yield image, prepare(open_rgb(image.path), side_px)
        except BrokenPictureError as error:
            tally.fail(image.path, f"{error}; replace or remove it")
            bar.update()


def report(tally: Tally, trigger: str) -> None:
    if not (tally.captioned or tally.given or tally.failed):
        print(f"nothing to do: all {tally.kept} captions are there, with the trigger {trigger}")
        return
    counts = f"{tally.captioned} captioned, {tally.given} given the trigger {trigger}, {tally.kept} kept as they were"
    if tally.failed:
        raise SomeItemsFailed(f"{counts}, {tally.failed} failed as said above; mend them and run again")
    print(counts)


def check(folder: DatasetFolder, settings: CaptionSettings, models_dir: Path) -> None:
    """Print what is there; raise one list of what is not, with the exit code of the first entry."""
    complaints: list[LoracatError] = []
    for question in (
        lambda: f"{len(pictures_in(folder))} pictures in {folder.images}",
        lambda: writable(folder),
        lambda: usable_model(settings, models_dir),
    ):
        try:
            print(question())
        except LoracatError as complaint:
            complaints.append(complaint)
        except OSError as error:
            complaints.append(ResourceError(f"{error.filename}: {error.strerror}; make it accessible for this user"))
    if complaints:
        raise type(complaints[0])(one_list("captioning cannot run:", [str(complaint) for complaint in complaints]))


def writable(folder: DatasetFolder) -> str:
    places = {image.path.parent for image in find_images(folder.images)} | {nearest_existing(folder.records)}
    locked = sorted(str(place) for place in places if not os.access(place, os.W_OK | os.X_OK))
    if locked:
        raise ResourceError(f"{', '.join(locked)}: captions cannot be written there; make it writable for this user")
    return f"captions can be written to {folder.images}"


def usable_model(settings: CaptionSettings, models_dir: Path) -> str:
    name = settings.caption_model
    there = found_folder(name, models_dir)
    if there:
        tagger = load_tagger(settings, models_dir, settings.caption_batch_size)
        return f"the tagger in {there} loads, with {len(tagger.tags)} tags"
    size_bytes = size_on_hub(name, models_dir)
    place = nearest_existing(models_dir)
    if not os.access(place, os.W_OK | os.X_OK):
        raise ResourceError(f"{place}: {name} cannot be fetched into it; make it writable for this user")
    return f"{name} will be fetched into {models_dir} ({size_bytes / 1e6:.0f} MB)"


def nearest_existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


if __name__ == "__main__":
    sys.exit(exit_code_of(STAGE, lambda: main(sys.argv[1:])))
