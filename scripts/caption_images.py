"""Caption every image of DATASET_DIR/images: a WD14 tagger's tags, the trigger word first.

An image without a caption is tagged. A caption that this stage made follows the settings: it is made anew when they
change, from stored probabilities if only the choice of tags has changed. A caption of yours keeps its text and only gains
a missing trigger word (an empty one becomes the trigger word alone). CAPTION_OVERWRITE=1 replaces yours, too; --undo puts
back what the last run changed.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while libraries are imported ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from captioning import image_audit as audit
from captioning import report
from captioning.config import CaptionSettings
from captioning.cpu_affinity import preparing_workers
from captioning.image_audit import KnownImage, look_at_all
from captioning.journal import STAGE, CaptionFiles, Tally, UnusableCaptionError
from captioning.preflight import check, images_in
from captioning.tag_cache import tagged
from captioning.tag_selection import TagChoice, known_point
from captioning.traits import pruning_of
from common.clip_tokens import find_clip_tokens
from common.dataset_layout import DatasetFolder, ImageFile, caption_owners, caption_path
from common.errors import DataError, SettingsError, run_main, stop_on_signals
from common.files import locked, write_json
from common.project import ProjectSettings, SharedTrainSettings
from common.settings import read_request

SECTIONS = {"project": ProjectSettings, "caption": CaptionSettings, "train": SharedTrainSettings}
FLAGS = {"undo": "put back the captions that the last run changed, and exit; once more for the run before it"}


def main(argv: list[str]) -> None:
    stop_on_signals()
    request = read_request(STAGE, __doc__, argv, SECTIONS, FLAGS, validate)
    project, settings, train = request.sections["project"], without_auto(request.sections["caption"]), request.sections["train"]
    folder = DatasetFolder(project.dataset_dir)
    if request.check:
        check(folder, settings, project.models_dir, inputs_pending=request.inputs_pending)
        return
    alone = locked(folder.images, f"another run is captioning {folder.images}: wait for it to end")
    with alone if folder.images.is_dir() else nullcontext():
        captions = CaptionFiles(folder, project.trigger_word)
        if "undo" in request.flags:
            undo(captions)
            return
        images = images_in(folder)
        print(f"{len(images)} images in {folder.images}; set by you: {request.overridden()}", flush=True)
        caption(images, captions, folder, project, settings, train)


def caption(
    images: list[ImageFile],
    captions: CaptionFiles,
    folder: DatasetFolder,
    project: ProjectSettings,
    settings: CaptionSettings,
    train: SharedTrainSettings,
) -> None:
    """Look at every image, see to its caption, and say what came of it."""
    tally = Tally()
    known = look_at_all(folder, images, preparing_workers())
    report_flaws(folder, images, known, train.data.resolution)
    to_make, to_keep = sorted_out(images, captions, settings.caption_overwrite, tally)
    keep(to_keep, captions, tally)
    make(to_make, known, settings, project, captions, tally)
    tokens = find_clip_tokens(project.models_dir, train.model.base_model)
    print(report.table(report.texts(images, folder), project.trigger_word, train.data.caption_chunks, tokens), flush=True)
    tally.report(project.trigger_word)


def validate(sections: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the settings, once each of them is right."""
    try:
        if sections["caption"].caption_threshold == "auto":
            known_point(sections["caption"].caption_model)
    except SettingsError as unknown:
        yield str(unknown)


def without_auto(settings: CaptionSettings) -> CaptionSettings:
    """The settings with the threshold "auto" as the number that it stands for."""
    if settings.caption_threshold != "auto":
        return settings
    threshold = known_point(settings.caption_model)
    print(f"caption_threshold auto is {threshold} for {settings.caption_model}")
    return replace(settings, caption_threshold=threshold)


def undo(captions: CaptionFiles) -> None:
    try:
        undone = captions.undo()
    except UnusableCaptionError as error:
        raise DataError(f"a caption {error}, then undo again") from None
    if not undone.run:
        print("nothing to undo: no run has changed a caption, or all of them are undone")
        return
    print(f"{undone.put_back} captions are what they were before run {undone.run}; {undone.earlier} earlier runs can be undone")
    if undone.edited:
        print(f"edited since and left alone: {', '.join(undone.edited)}")


def report_flaws(folder: DatasetFolder, images: list[ImageFile], known: dict[Path, KnownImage], resolution: int) -> None:
    """What is wrong with the images, before anything long begins."""
    found = audit.audit_of(folder, images, known, resolution)
    audit.write(found, folder)
    print(audit.table(found), flush=True)


def sorted_out(
    images: list[ImageFile], captions: CaptionFiles, overwrite: bool, tally: Tally
) -> tuple[list[ImageFile], list[ImageFile]]:
    """The images whose captions this stage makes, and those whose caption is the user's and kept.

    Images with the same stem would share one caption: it belongs to the first of them, the others fail.
    """
    owners = caption_owners(images)
    to_make, to_keep = [], []
    for image in images:
        caption = image.caption_path
        if (owner := owners[caption]) is not image:
            tally.fail(image.path, f"would share {caption.name} with {owner.path.name}; rename one of the two images")
        elif caption.is_symlink() and not caption.exists():
            tally.fail(caption, "is a link to nothing; restore its target or remove it")
        elif caption.exists() and not caption.is_file():
            tally.fail(caption, "is not a file; rename it")
        else:
            (to_make if overwrite or not caption.exists() or captions.is_ours(caption) else to_keep).append(image)
    return to_make, to_keep


def keep(images: list[ImageFile], captions: CaptionFiles, tally: Tally) -> None:
    """Captions of the user's gain a missing trigger and are else left as they are."""
    for image in images:
        try:
            changed = captions.keep(image.caption_path)
        except UnusableCaptionError as error:
            tally.fail(image.caption_path, error)
            continue
        tally.given += changed
        tally.kept += not changed


def make(
    images: list[ImageFile],
    known: dict[Path, KnownImage],
    settings: CaptionSettings,
    project: ProjectSettings,
    captions: CaptionFiles,
    tally: Tally,
) -> None:
    """Captions of tags: probabilities first, for what is left out of one caption depends on all of them."""
    whole = {image.path: known[image.path] for image in images if known[image.path].look}
    for image in images:
        if image.path not in whole:
            tally.fail(image.path, f"{known[image.path].broken}; replace or remove it")
    if not whole:
        return
    folder = DatasetFolder(project.dataset_dir)
    store, probabilities = tagged(whole, settings, project.models_dir, folder.records, tally)
    choice = TagChoice(store.tags, settings)
    chosen = [choice.chosen(of_image) for of_image in probabilities.values()]
    pruning = pruning_of(store.tags, chosen, settings.caption_prune_traits)
    write_json(folder.records / "traits.json", report.traits(choice, pruning))
    print(report.choice(choice, pruning), end="", flush=True)
    for path, of_image in probabilities.items():
        try:
            changed = captions.write(caption_path(path), choice.words(of_image, pruning.pruned))
        except UnusableCaptionError as error:
            tally.fail(caption_path(path), error)
            continue
        tally.captioned += changed
        tally.kept += not changed


if __name__ == "__main__":
    sys.exit(run_main(STAGE, lambda: main(sys.argv[1:])))
