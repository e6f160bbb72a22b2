"""What the caption stage prints: failures and counts, flaws of the images, the selection of tags, the finished captions."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from captioning.captions import normalized, split_tags
from captioning.image_audit import DUPLICATE, UNREADABLE, Audit
from captioning.tag_selection import TagSelector
from captioning.traits import SUGGESTED_MIN_SHARE, TraitPruning
from common.captions import UnusableCaptionError, has_weights, in_lines, in_one_line, is_prose, read_caption
from common.clip_tokens import CHUNK_TOKENS, ClipTokens
from common.dataset_layout import CAPTION_SUFFIX, FIRST_SUFFIXES, DatasetFolder, ImageFile, name_in
from common.errors import SomeItemsFailed, abbreviated

STAGE = "caption_images"
FEW_TAGS = 3
"""An image that is described with fewer tags teaches the trigger word everything in it."""
_TAGS_SHOWN = 20


@dataclass
class CaptionCounts:
    """What became of the captions; each failure is logged when it happens."""

    captioned: int = 0
    """Captions made of tags or prompts."""
    copied: list[str] = field(default_factory=list)
    """Captions written by the user in a file with another suffix, which a `.txt` file now has."""
    trigger_added: int = 0
    """Captions written by the user that gained the trigger word."""
    unchanged: int = 0
    failed: int = 0

    def fail(self, path: Path, reason: object) -> None:
        """Log one failure on standard error."""
        self.failed += 1
        tqdm.write(f"{STAGE}: {path}: {reason}", file=sys.stderr)

    def report(self, trigger: str) -> None:
        """Print the counts. Raises SomeItemsFailed if there were failures."""
        if self.copied:
            print(f"{len(self.copied)} captions copied to {CAPTION_SUFFIX} files, which training reads: {abbreviated(self.copied)}")
        if not (self.captioned or self.copied or self.trigger_added or self.failed):
            print(f"nothing to do: all {self.unchanged} captions are up to date, with the trigger word {trigger}")
            return
        counts = f"{self.captioned} captioned, trigger word {trigger} added to {self.trigger_added}, {self.unchanged} unchanged"
        if self.failed:
            raise SomeItemsFailed(f"{counts}, {self.failed} failed (see above); fix them and run again")
        print(counts)


def new_formats(images: Sequence[ImageFile], folder: DatasetFolder) -> str:
    """A line that names the images which belong to the data set as of version 2.0; "" if there are none."""
    names = [name_in(folder.images, image.path) for image in images if image.path.suffix.lower() not in FIRST_SUFFIXES]
    return f"{len(names)} images in formats that version 1.0 ignored: {abbreviated(names)}\n" if names else ""


def audit_table(audit: Audit, record: Path) -> str:
    """The flaws in a few lines, one for each kind; the file `record` has all of them."""
    by_kind: dict[str, list[str]] = {}
    for name, flaws in audit.flagged.items():
        for kind, flaw in flaws.items():
            by_kind.setdefault(kind, []).append(f"{name} ({flaw})" if kind in (UNREADABLE, DUPLICATE) else name)
    if audit.captions_without_image:
        by_kind["caption without an image"] = list(audit.captions_without_image)
    if audit.ignored:
        by_kind["ignored"] = [f"{name} ({what})" for name, what in audit.ignored.items()]
    common = [f"  {kind:25} {count:5}  of {audit.images} images are {what}" for kind, (count, what) in audit.common.items()]
    if common:
        common.append("  the LoRA would learn this as part of the person: correct the images, or collect others")
    if not by_kind:
        return "\n".join([f"image check: no flaws found in {audit.images} images", *common])
    lines = [f"image check: {len(audit.flagged)} of {audit.images} images are flagged for training at {audit.resolution} px"]
    lines += [f"  {kind:25} {len(names):5}  {abbreviated(names)}" for kind, names in by_kind.items()]
    lines.append(f"  full list: {record}")
    if audit.flagged:
        lines.append("  set SKIP_FLAGGED=1 to train without the flagged images")
    return "\n".join([*lines, *common])


def prompt_notes(found: int, missing: Sequence[str], folder: DatasetFolder) -> str:
    """How many images have prompts, and which get tags instead."""
    notes = f"prompts in {folder.manifest}: of {found} of {found + len(missing)} images"
    what = "images without a prompt, or changed since they were collected, are captioned with tags"
    return f"{notes}\n{len(missing)} {what}: {abbreviated(missing)}" if missing else notes


def selection_notes(selector: TagSelector, prunings: Mapping[str, TraitPruning]) -> str:
    """Settings that match no tag, and the traits of each trigger word's person: which are left out, kept, or to be left out."""
    lines = []
    if selector.unknown_entries:
        lines.append(f"tags in the settings that this model does not have: {', '.join(selector.unknown_entries)}")
    for trigger, pruning in prunings.items():
        of_whom = f" of {trigger}" if len(prunings) > 1 else ""
        if pruning.min_share:
            left_out, kept = _shares(selector, pruning.pruned), _shares(selector, pruning.kept)
            lines.append(
                f"traits{of_whom} left out of the captions (in at least {pruning.min_share:.0%} of the images): {left_out}"
            )
            lines.append(f"traits{of_whom} kept in the captions: {kept}")
        elif pruning.suggested:
            suggested = _shares(selector, pruning.suggested)
            lines.append(f"traits{of_whom} in at least {SUGGESTED_MIN_SHARE:.0%} of the images: {suggested}")
    if any(pruning.suggested for pruning in prunings.values()):
        lines.append(
            f"  set CAPTION_PRUNE_TRAITS={SUGGESTED_MIN_SHARE} to leave them out of the captions, "
            "so that the trigger word learns them"
        )
    return "".join(f"{line}\n" for line in lines)


def traits_record(selector: TagSelector, prunings: Mapping[str, TraitPruning], setting: float | str | None) -> dict:
    """The content of `traits.json`: share of the images by trait; of several trigger words, by each of them. `setting` is what was
    set; None if an earlier record was followed, and is to be followed again."""
    records = {}
    for trigger, pruning in prunings.items():
        pruned, kept = (
            {selector.texts[index]: round(share, 4) for index, share in shares.items()} for shares in (pruning.pruned, pruning.kept)
        )
        how = {"caption_prune_traits": pruning.min_share} | ({} if setting is None else {"setting": setting})
        records[trigger] = {"pictures": pruning.images, **how, "pruned": pruned, "kept": kept}
    return {"concepts": records} if len(records) > 1 else next(iter(records.values()), {})


def read_captions(images: Sequence[ImageFile], folder: DatasetFolder, *, per_line: bool) -> dict[str, tuple[ImageFile, str]]:
    """Name -> image and text, as training reads it, of every caption that exists and can be read."""
    texts = {}
    for image in images:
        with contextlib.suppress(UnusableCaptionError, FileNotFoundError):
            name, text = name_in(folder.images, image.caption_to_read), read_caption(image.caption_to_read, folder.root)
            lines = in_lines(text).split("\n") if per_line else [in_one_line(text)]
            for number, line in enumerate(lines, 1):
                texts[name if len(lines) == 1 else f"{name} line {number}"] = image, line
    return texts


def caption_table(captions: Mapping[str, str], triggers: Iterable[str], chunks: int, tokens: ClipTokens | None) -> str:
    """`captions` (name -> text) in a few lines: the most frequent tags, captions of few tags, captions that training cuts off.

    Training reads at most `chunks` chunks of CLIP's tokens; without `tokens`, lengths are not checked.
    """
    words = set(map(normalized, triggers))
    tags_of = {name: [tag for tag in split_tags(text) if normalized(tag) not in words] for name, text in captions.items()}
    frequency = Counter(tag for tags in tags_of.values() for tag in dict.fromkeys(tags))
    lines = [f"most frequent of the {len(frequency)} tags in {len(captions)} captions:"]
    lines += [f"  {tag:30} {count:5}  {count / len(captions):4.0%}" for tag, count in frequency.most_common(_TAGS_SHOWN)]
    if len(frequency) > _TAGS_SHOWN:
        lines.append(f"  and {len(frequency) - _TAGS_SHOWN} more")
    if few := [name for name, tags in tags_of.items() if len(tags) < FEW_TAGS and not is_prose(captions[name])]:
        lines.append(f"captions with fewer than {FEW_TAGS} tags: {len(few)} ({abbreviated(few)})")
    if weighted := [name for name, text in captions.items() if has_weights(text)]:
        lines.append(f"captions with weights such as (word:1.2): {len(weighted)} ({abbreviated(weighted)})")
        lines.append("  training reads brackets and numbers as text; write the words alone")
    max_tokens = chunks * CHUNK_TOKENS
    if tokens is None:
        lines.append("caption lengths are not checked (no model in MODELS_DIR has CLIP's tokenizer)")
    elif long := [name for name, text in captions.items() if tokens.count(text) > max_tokens]:
        lines.append(f"captions longer than the {max_tokens} tokens that training reads: {len(long)} ({abbreviated(long)})")
        lines.append("  training cuts off their ends; set CAPTION_MAX_TAGS, or raise CAPTION_CHUNKS")
    return "\n".join(lines)


def _shares(selector: TagSelector, shares: Mapping[int, float]) -> str:
    return ", ".join(f"{selector.texts[index]} {share:.0%}" for index, share in shares.items()) or "none"
