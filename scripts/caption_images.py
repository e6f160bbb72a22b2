"""Caption every image of DATASET_DIR/images with the tags of a WD14 tagger, the trigger word first.

With CAPTION_SOURCE=prompt, the captions of collected images are made of the prompts that the collect stage recorded; with
CAPTION_SOURCE=both, of tags and prompts. An image without a caption is captioned. A caption that this stage generated follows
the settings: when they change, it is written again, from cached probabilities if only the selection of tags changed. A caption
that you wrote keeps its text and only gains the trigger word if it lacks it (an empty one becomes the trigger word alone).
CAPTION_OVERWRITE=1 replaces your captions, too; --undo restores what the last run changed.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while libraries are imported ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from captioning import report
from captioning.captions import caption_text
from captioning.config import CaptionSettings
from captioning.cpu_affinity import decode_workers
from captioning.image_audit import Audit, IndexedImage, audit_images, index_images, with_flaws, write_audit
from captioning.journal import CaptionFiles
from captioning.likeness import OTHER_PERSON, SetLikeness, likeness_in_background
from captioning.preflight import check, describe_triggers, require_images
from captioning.prompt_captions import PromptRules, prompt_caption, read_prompts
from captioning.report import STAGE, CaptionCounts
from captioning.tag_cache import tag_images
from captioning.tag_selection import TagSelector, appended_tags, published_threshold
from captioning.traits import earlier_share, prune_common_traits
from common.captions import UnusableCaptionError, ordinary_trigger, tagger_vocabulary
from common.clip_tokens import find_clip_tokens, find_vocabulary
from common.dataset_layout import CAPTION_SUFFIX, DatasetFolder, ImageFile, caption_owners, name_in
from common.errors import DataError, SettingsError, abbreviated, run_main, stop_on_signals
from common.files import locked, parse_json, read_file, write_json
from common.project import FaceReferences, ProjectSettings, SharedTrainSettings, face_references
from common.settings import read_request
from common.triggers import foreign_triggers

FLAGS = {"undo": "restore the captions that the last run changed, and exit; repeat it for earlier runs"}


@dataclass(frozen=True)
class Tables:
    """What this stage reads of the settings."""

    project: ProjectSettings
    collect: FaceReferences
    caption: CaptionSettings
    train: SharedTrainSettings

    def validate(self) -> Iterator[str]:
        try:
            if self.caption.caption_threshold == "auto":
                published_threshold(self.caption.caption_model)
        except SettingsError as unknown:
            yield str(unknown)


def main(argv: list[str]) -> None:
    stop_on_signals()
    request = read_request(STAGE, __doc__, argv, Tables, FLAGS)
    project, train = request.settings.project, request.settings.train
    settings = resolve(request.settings.caption)
    folder = DatasetFolder(project.dataset_dir)
    if request.check:
        check(folder, settings, project, inputs_pending=request.inputs_pending)
        return
    lock = locked(folder.images, f"another run is captioning {folder.images}: wait for it to end")
    with lock if folder.images.is_dir() else nullcontext():
        folder.remove_leftovers()
        if "undo" in request.flags:
            undo(CaptionFiles(folder, project.trigger_word))
            return
        selection = require_images(folder)
        images, notes = selection.images, selection.notes()
        triggers = describe_triggers(images, project.trigger_word)
        print(f"{request.overridden()}\n{notes}{len(images)} images in {folder.images}{triggers}", flush=True)
        own = {image.folder.path: image.folder.trigger for image in images if image.folder.trigger}
        captions = CaptionFiles(folder, project.trigger_word, own, per_line=train.data.caption_per_line)
        references = face_references(request.settings.collect.face_reference)
        caption(images, selection.found, captions, folder, project, settings, train, references)


def resolve(settings: CaptionSettings) -> CaptionSettings:
    """The settings with a number in place of the threshold "auto", and without bfloat16 on CPUs that do not have it."""
    if settings.caption_threshold == "auto":
        threshold = published_threshold(settings.caption_model)
        print(f"caption_threshold: {threshold} (auto: published for {settings.caption_model})")
        settings = replace(settings, caption_threshold=threshold)
    if settings.caption_bf16 and platform.machine().lower() not in ("aarch64", "arm64"):
        print("caption_bf16: off (not an ARM CPU)")
        settings = replace(settings, caption_bf16=False)
    return settings


def undo(captions: CaptionFiles) -> None:
    try:
        result = captions.undo()
    except UnusableCaptionError as error:
        raise DataError(f"a caption {error}") from None
    if not result.run:
        print("nothing to undo: no run changed a caption, or all of them are undone")
        return
    print(f"run {result.run} is undone: {result.restored} captions restored; {result.earlier} earlier runs can be undone")
    if result.edited:
        print(f"not restored, because edited after that run: {abbreviated(result.edited)}")


def caption(
    images: list[ImageFile],
    found: list[ImageFile],
    captions: CaptionFiles,
    folder: DatasetFolder,
    project: ProjectSettings,
    settings: CaptionSettings,
    train: SharedTrainSettings,
    references: Sequence[Path],
) -> None:
    """Check every image, caption it or keep its caption, and print what the captions of the data set contain. `found`: the images
    and those that are excluded."""
    counts, concepts = CaptionCounts(), group_by_trigger(images, captions)
    indexed = index_images(folder, images, decode_workers())
    audit = audit_images(folder, images, indexed, train.data.resolutions[-1], found)
    write_audit(audit, folder)
    print(report.new_formats(images, folder) + report.audit_table(audit, folder.audit), flush=True)
    to_generate, to_copy, to_keep = classify_captions(images, captions, settings.caption_overwrite, counts)
    face_model = project.face_model, project.models_dir
    # The face references show the person of TRIGGER_WORD.
    persons = [{indexed[image.path].name for image in of_concept} for of_concept in concepts.values()]
    compared = {indexed[image.path].name for image in concepts.get(project.trigger_word, ())}
    with likeness_in_background(folder, indexed, references, *face_model, persons, compared) as measure_likeness:
        keep_captions(to_copy, to_keep, captions, counts)
        generate_captions(to_generate, indexed, settings, project.models_dir, folder, captions, counts)
        flag_other_persons(measure_likeness(), audit, indexed, folder)
    known = tagger_vocabulary(folder.tag_cache), find_vocabulary(project.models_dir, train.model.base_model)
    for trigger in concepts:
        if warning := ordinary_trigger(trigger, *known):
            print(warning)
    tokens = find_clip_tokens(project.models_dir, train.model.base_model)
    texts = report.read_captions(images, folder, per_line=train.data.caption_per_line)
    each = {name: text for name, (_, text) in texts.items()}
    print(report.caption_table(each, concepts.keys(), train.data.caption_chunks, tokens), flush=True)
    for line in foreign_triggers({name: (captions.trigger_of(image.path), text) for name, (image, text) in texts.items()}):
        print(line)
    counts.report(", ".join(concepts))


def group_by_trigger(images: Iterable[ImageFile], captions: CaptionFiles) -> dict[str, list[ImageFile]]:
    """Trigger word -> the images that it is for, in the order of the images."""
    groups: dict[str, list[ImageFile]] = {}
    for image in images:
        groups.setdefault(captions.trigger_of(image.path), []).append(image)
    return groups


def keep_captions(to_copy: list[ImageFile], to_keep: list[ImageFile], captions: CaptionFiles, counts: CaptionCounts) -> None:
    """Copy the user's captions that have another suffix, and add the trigger word to those that are kept."""
    for image in to_copy:
        listed = None if has_other_caption(image) else image.listed_caption
        source = image.captions[-1] if listed is None else image.path
        if apply_change(counts, captions.copy, source, image.caption_path, listed):
            counts.copied.append(source.name)
    for image in to_keep:
        counts.trigger_added += apply_change(counts, captions.ensure_trigger, image.caption_path)


def flag_other_persons(
    likeness: SetLikeness | None, audit: Audit, indexed: dict[Path, IndexedImage], folder: DatasetFolder
) -> None:
    """Record how much every image looks like the others, and add those of another person to the audit."""
    if likeness is None:
        return
    write_json(folder.likeness, likeness.as_json({image.name: image.sha256 for image in indexed.values()}))
    write_audit(with_flaws(audit, OTHER_PERSON, likeness.flaws(), indexed), folder)
    print(likeness.table(), flush=True)


def has_other_caption(image: ImageFile) -> bool:
    """Whether the user wrote a caption in a file with another suffix than the one that this stage writes."""
    return any(path != image.caption_path for path in image.captions)


def classify_captions(
    images: list[ImageFile], captions: CaptionFiles, overwrite: bool, counts: CaptionCounts
) -> tuple[list[ImageFile], list[ImageFile], list[ImageFile]]:
    """The images whose captions are generated, those whose captions follow the user's file with another suffix or list of captions,
    and those whose captions are the user's and kept.

    Images with the same stem would share one caption: it belongs to the first of them, the others fail.
    """
    owners = caption_owners(images)
    to_generate, to_copy, to_keep, unused = [], [], [], []
    for image in images:
        caption = image.caption_path
        others = [path for path in image.captions if path != caption]
        if (owner := owners[caption]) is not image:
            counts.fail(image.path, f"would share {caption.name} with {owner.path.name}; rename one of the two images")
        elif overwrite:
            to_generate.append(image)
        elif (others or image.listed_caption is not None) and captions.is_derived(caption):
            to_copy.append(image)
        elif not image.captions or captions.is_generated(caption):
            to_generate.append(image)
        else:
            to_keep.append(image)
            unused += [path.name for path in others]
    if unused:
        print(f"not used, because there is a {CAPTION_SUFFIX} file for the same image: {abbreviated(unused)}")
    return to_generate, to_copy, to_keep


def generate_captions(
    images: list[ImageFile],
    indexed: dict[Path, IndexedImage],
    settings: CaptionSettings,
    models_dir: Path,
    folder: DatasetFolder,
    captions: CaptionFiles,
    counts: CaptionCounts,
) -> None:
    """Write captions of tags, prompts or both: all images are tagged first, because the traits to prune depend on all of them."""
    readable = {}
    for image in images:
        if indexed[image.path].stats:
            readable[image.path] = indexed[image.path]
        else:
            counts.fail(image.path, f"{indexed[image.path].broken}; replace or remove it")
    if not readable:
        return
    sources = {image.path: image.folder.caption_source or settings.caption_source for image in images}
    with_prompt = {path: image for path, image in readable.items() if sources[path] != "tags"}
    sentences = prompt_sentences(with_prompt, settings, captions, folder) if with_prompt else {}
    to_tag = {path: image for path, image in readable.items() if sources[path] != "prompt" or path not in sentences}
    of_tags = caption_tags(to_tag, settings, models_dir, folder, captions, counts) if to_tag else {}
    for image in images:
        if image.path not in readable or (image.path in to_tag and image.path not in of_tags):
            continue
        trigger = captions.trigger_of(image.path)
        texts = of_tags.get(image.path, appended_tags(settings))
        sentence = sentences.get(image.path)
        text = prompt_caption(trigger, texts, sentence) if sentence else caption_text(trigger, texts)
        counts.captioned += apply_change(counts, captions.write, image.caption_path, text)


def prompt_sentences(
    images: dict[Path, IndexedImage], settings: CaptionSettings, captions: CaptionFiles, folder: DatasetFolder
) -> dict[Path, str]:
    """The sentences that the prompts of the images make, as far as the manifest has them."""
    phrases = settings.caption_prompt_person, settings.caption_prompt_remove
    rules = {trigger: PromptRules(trigger, *phrases) for trigger in map(captions.trigger_of, images)}
    prompts = read_prompts(folder, images).items()
    sentences = {path: text for path, prompt in prompts if (text := rules[captions.trigger_of(path)].sentence(prompt))}
    missing = [name_in(folder.images, path) for path in images if path not in sentences]
    print(report.prompt_notes(len(sentences), missing, folder), flush=True)
    return sentences


def caption_tags(
    images: dict[Path, IndexedImage],
    settings: CaptionSettings,
    models_dir: Path,
    folder: DatasetFolder,
    captions: CaptionFiles,
    counts: CaptionCounts,
) -> dict[Path, list[str]]:
    """The tags of each image's caption, for those that can be tagged. The images of each trigger word have traits of their own."""
    tags, probabilities = tag_images(images, settings, models_dir, folder.tag_cache, counts)
    selector = TagSelector(tags, settings)
    concepts: dict[str, dict[Path, np.ndarray]] = {}
    for path, of_image in probabilities.items():
        concepts.setdefault(captions.trigger_of(path), {})[path] = of_image
    prunings, setting, recorded = {}, settings.caption_prune_traits, None
    if folder.traits.exists():
        try:
            recorded = parse_json(read_file(folder.traits))
        except (OSError, ValueError) as error:
            print(f"{folder.traits} is damaged ({error}): it is written again, and CAPTION_PRUNE_TRAITS is followed", flush=True)
    earlier = earlier_share(recorded)
    follows_earlier = earlier is not None and setting in ("auto", earlier)
    if follows_earlier and setting == "auto":
        print(f"traits in the captions: as an earlier version wrote them (CAPTION_PRUNE_TRAITS={earlier:g})", flush=True)
    for trigger, of_concept in concepts.items():
        selected = [selector.select(of_image) for of_image in of_concept.values()]
        prunings[trigger] = prune_common_traits(tags, selected, earlier if follows_earlier else setting)
    captions.write_traits(recorded, report.traits_record(selector, prunings, None if follows_earlier else setting))
    print(report.selection_notes(selector, prunings), end="", flush=True)
    pruned = {path: prunings[trigger].pruned for trigger, of_concept in concepts.items() for path in of_concept}
    return {path: selector.caption_tags(of_image, pruned[path]) for path, of_image in probabilities.items()}


def apply_change(counts: CaptionCounts, change: Callable[..., bool], caption: Path, *arguments: Any) -> bool:
    """Call `change` on `caption` and return whether the file changed; unchanged captions and failures are counted."""
    try:
        is_changed = change(caption, *arguments)
    except UnusableCaptionError as error:
        counts.fail(caption, error)
        return False
    counts.unchanged += not is_changed
    return is_changed


if __name__ == "__main__":
    sys.exit(run_main(STAGE, lambda: main(sys.argv[1:])))
