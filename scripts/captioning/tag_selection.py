"""Which of a tagger's tags become part of a caption: its list of tags, thresholds, and the settings of the selection."""

import csv
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from captioning.captions import CHARACTER, GENERAL, RATING, Tag, normalized, split_tags, tag_to_text
from captioning.config import CaptionSettings
from common.errors import ModelError, SettingsError

PUBLISHED_THRESHOLDS = {
    "wd-vit-tagger-v3": 0.2614,
    "wd-swinv2-tagger-v3": 0.2653,
    "wd-convnext-tagger-v3": 0.2682,
    "wd-eva02-large-tagger-v3": 0.5296,
    "wd-v1-4-vit-tagger-v2": 0.3537,
    "wd-v1-4-convnext-tagger-v2": 0.3685,
    "wd-v1-4-convnextv2-tagger-v2": 0.3710,
    "wd-v1-4-swinv2-tagger-v2": 0.3771,
    "wd-v1-4-moat-tagger-v2": 0.3771,
    "idolsankaku-eva02-large-tagger-v1": 0.4985,
}
"""Where precision equals recall on the model's validation set, as its author states it."""
_CATEGORIES = {"general": GENERAL, "character": CHARACTER, "rating": RATING, "artist": 1, "copyright": 3, "meta": 5}
"""Danbooru's categories by their names, which some lists have in place of numbers."""
MIN_CHARACTER_MCUT = 0.15
"""Most images show none of the characters that the model knows: a gap below this does not separate one from the others."""
DOWNLOAD_AGAIN = "delete it and run again to download it, or put a complete copy there"


class TagSelector:
    """Selects the tags of each image for its caption, by settings that are the same for all images.

    `texts` are the model's tags as captions spell them, replacements included.
    """

    def __init__(self, tags: Sequence[Tag], settings: CaptionSettings):
        """`settings` must have a number or "mcut" as caption_threshold; for "auto" see `published_threshold`."""
        self._settings = settings
        names = [normalized(tag.name) for tag in tags]
        excluded = match_tags(names, settings.caption_exclude_tags)
        self._excluded = np.array([name in excluded for name in names], dtype=bool)
        self._thresholds = {GENERAL: settings.caption_threshold}
        if settings.caption_character_tags:
            self._thresholds[CHARACTER] = settings.caption_character_threshold
        self._candidates = {
            category: np.array([index for index, tag in enumerate(tags) if tag.category == category], dtype=np.intp)
            for category in (*self._thresholds, RATING)
        }
        pairs = [split_replacement(pair) for pair in settings.caption_replace_tags]
        replaced = {normalized(old): " ".join(new.split()) for old, new in pairs}
        self.texts = [replaced.get(name, tag_to_text(tag.name)) for name, tag in zip(names, tags, strict=True)]
        # The entries of these settings may hold commas where they come from a file.
        self._first = [normalized(tag) for entry in settings.caption_always_first for tag in split_tags(entry)]
        self._appended = appended_tags(settings)
        entries = [*settings.caption_exclude_tags, *(old for old, _ in pairs)]
        self.unknown_entries = [entry for entry in entries if not match_tags(names, [entry])]
        """Tags that the settings exclude or replace and that the model does not have: most likely misspelt."""

    def select(self, probabilities: np.ndarray) -> list[int]:
        """`probabilities` [tags] of one image -> indices of its tags, the most probable first, equal ones in the model's order."""
        selected = np.concatenate([self._above_threshold(category, probabilities) for category in self._thresholds])
        selected = np.sort(selected[~self._excluded[selected]])
        return selected[np.argsort(-probabilities[selected], kind="stable")].tolist()

    def caption_tags(self, probabilities: np.ndarray, pruned: Collection[int] = ()) -> list[str]:
        """The tags of an image's caption, as text.

        First the selected ones without `pruned` (indices), those of caption_always_first leading, at most caption_max_tags;
        then the rating and the appended tags, if the settings ask for them.
        """
        texts = list(dict.fromkeys(self.texts[index] for index in self.select(probabilities) if index not in pruned))
        first = {text: self._first.index(normalized(text)) for text in texts if normalized(text) in self._first}
        texts.sort(key=lambda text: first.get(text, len(self._first)))
        texts = texts[: self._settings.caption_max_tags or None]
        ratings = self._candidates[RATING]
        if self._settings.caption_rating_tags and len(ratings):
            texts.append(self.texts[ratings[np.argmax(probabilities[ratings])]])
        return list(dict.fromkeys([*texts, *self._appended]))

    def _above_threshold(self, category: int, probabilities: np.ndarray) -> np.ndarray:
        candidates = self._candidates[category]
        threshold = self._thresholds[category]
        if threshold == "mcut":
            threshold = max(mcut(probabilities[candidates]), MIN_CHARACTER_MCUT if category == CHARACTER else 0.0)
        # In float32 like the probabilities: otherwise a tag with exactly 0.35 would be below a threshold of 0.35.
        return candidates[probabilities[candidates] >= np.float32(threshold)]


def appended_tags(settings: CaptionSettings) -> list[str]:
    """The tags at the end of every caption. An entry may hold commas where it comes from a file."""
    return [tag for entry in settings.caption_append for tag in split_tags(entry)]


def match_tags(names: Collection[str], entries: Collection[str]) -> set[str]:
    """Those of the normalized `names` that any of `entries` matches: in any spelling, `*` matching any text.

    An entry that is the exact name of a tag matches only that tag, even if it contains `*`.
    """
    known, matched = set(names), set()
    for entry in map(normalized, entries):
        if entry in known or "*" not in entry:
            matched |= {entry} & known
        else:
            pattern = re.compile(".*".join(map(re.escape, entry.split("*"))))
            matched |= {name for name in known if pattern.fullmatch(name)}
    return matched


def split_replacement(pair: str) -> tuple[str, str]:
    """`old=new` -> (old, new), split at the last `=` that has text after it: a tag may be a face like `=_=`."""
    for position in range(len(pair) - 1, 0, -1):
        if pair[position] == "=" and pair[:position].strip() and pair[position + 1 :].strip():
            return pair[:position].strip(), pair[position + 1 :].strip()
    return "", ""


def published_threshold(model: str) -> float:
    """The threshold that "auto" stands for; `model` is CAPTION_MODEL. Raises SettingsError for a model without one."""
    name = model.rstrip("/").rpartition("/")[2]
    if name not in PUBLISHED_THRESHOLDS:
        raise SettingsError(
            f'caption_threshold: "auto" needs a published threshold, and none is known for {model}, only for '
            f'{", ".join(PUBLISHED_THRESHOLDS)}; set a number, or "mcut"'
        )
    return PUBLISHED_THRESHOLDS[name]


def mcut(probabilities: np.ndarray) -> float:
    """The middle of the largest gap between neighbours among the sorted `probabilities` (Largeron et al. 2012, MCut)."""
    falling = np.sort(probabilities)[::-1]
    if len(falling) < 2:
        return 0.0
    widest = int(np.argmax(falling[:-1] - falling[1:]))
    return float(falling[widest] + falling[widest + 1]) / 2


def read_tags(path: Path) -> list[Tag]:
    """The rows of a `selected_tags.csv`, with categories as numbers or as their names. Raises ModelError for any other file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            tags = [_tag_of(row) for row in csv.DictReader(file)]
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; make it readable for this user") from None
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error):
        raise ModelError(f"{path}: is not a table with the columns name and category; {DOWNLOAD_AGAIN}") from None
    if not tags:
        raise ModelError(f"{path}: lists no tags; {DOWNLOAD_AGAIN}")
    return tags


def _tag_of(row: dict[str, str]) -> Tag:
    name, category = row["name"] if "name" in row else row["tag"], row["category"].strip().lower()
    if not name.strip() or min(name) < " ":
        raise ValueError("a tag without a name, or with a control character")
    return Tag(name, _CATEGORIES[category] if category in _CATEGORIES else int(category))
