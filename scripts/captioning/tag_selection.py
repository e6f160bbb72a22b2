"""Probabilities -> the tags of an image -> the words of its caption, as the settings say. Pure.

From which probability on a tag counts: a number, the model's own known point, or a cut made for each image. Pure.

A tagger's list of tags, `selected_tags.csv`.
"""

import csv
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from captioning.captions import CHARACTER, GENERAL, RATING, Tag, comparable, spoken, words_of
from captioning.config import CaptionSettings
from common.errors import ModelError, SettingsError

LEAST_OF_A_CHARACTER = 0.15
"""A cut below this is no certainty about a character: most images show none that the model knows."""


class TagChoice:
    """Which of a model's tags become words of a caption: made once, asked for every image."""

    def __init__(self, tags: Sequence[Tag], settings: CaptionSettings):
        """`settings` with a number or "mcut" as thresholds; see thresholds.known_point for "auto"."""
        self.tags = tags
        names = [comparable(tag.name) for tag in tags]
        excluded = matching(names, settings.caption_exclude_tags)
        self._thresholds = {GENERAL: settings.caption_threshold}
        if settings.caption_character_tags:
            self._thresholds[CHARACTER] = settings.caption_character_threshold
        self._candidates = {
            category: np.array([i for i, tag in enumerate(tags) if tag.category == category], dtype=np.intp)
            for category in (*self._thresholds, RATING)
        }
        self._excluded = np.array([name in excluded for name in names], dtype=bool)
        replaced = {comparable(old): " ".join(new.split()) for old, new in map(split_replacement, settings.caption_replace_tags)}
        self._words = [replaced.get(name, spoken(tag.name)) for name, tag in zip(names, tags, strict=True)]
        first = [comparable(word) for word in _words_in(settings.caption_always_first)]
        self._rank = {word: first.index(comparable(word)) for word in self._words if comparable(word) in first}
        self._behind = len(first)
        self._appended = _words_in(settings.caption_append)
        self._settings = settings

    def chosen(self, probabilities: np.ndarray) -> list[int]:
        """`probabilities` [tags] of one image -> indices of its tags, the surest first, equals in the model's order."""
        kept = np.concatenate([self._above(category, probabilities) for category in self._thresholds])
        kept = np.sort(kept[~self._excluded[kept]])
        return kept[np.argsort(-probabilities[kept], kind="stable")].tolist()

    def words(self, probabilities: np.ndarray, pruned: Collection[int] = ()) -> list[str]:
        """The words of an image's caption: its tags without `pruned`, the always-first ones leading, at most
        `caption_max_tags` of them; then the rating and what is appended, if they are asked for."""
        words = list(dict.fromkeys(self._words[index] for index in self.chosen(probabilities) if index not in pruned))
        words.sort(key=lambda word: self._rank.get(word, self._behind))
        words = words[: self._settings.caption_max_tags or None]
        return list(dict.fromkeys([*words, *self._rating(probabilities), *self._appended]))

    def word(self, index: int) -> str:
        """How captions write the tag with this index."""
        return self._words[index]

    def without_effect(self) -> list[str]:
        """Tags that the settings exclude or replace and that the model does not know: most likely misspelt."""
        names = [comparable(tag.name) for tag in self.tags]
        replaced = [split_replacement(pair)[0] for pair in self._settings.caption_replace_tags]
        return [entry for entry in (*self._settings.caption_exclude_tags, *replaced) if not matching(names, [entry])]

    def _above(self, category: int, probabilities: np.ndarray) -> np.ndarray:
        """The tags of a category that reach its threshold; rounding to float32 keeps 0.35 at 0.35."""
        candidates = self._candidates[category]
        threshold = self._thresholds[category]
        if threshold == MCUT:
            threshold = max(mcut(probabilities[candidates]), LEAST_OF_A_CHARACTER if category == CHARACTER else 0.0)
        return candidates[probabilities[candidates] >= np.float32(threshold)]

    def _rating(self, probabilities: np.ndarray) -> list[str]:
        ratings = self._candidates[RATING]
        if not self._settings.caption_rating_tags or not len(ratings):
            return []
        return [self._words[ratings[np.argmax(probabilities[ratings])]]]


def _words_in(entries: Sequence[str]) -> list[str]:
    """The words of a setting, whose entries may hold commas where they come from a file."""
    return [word for entry in entries for word in words_of(entry)]


def matching(names: Collection[str], entries: Collection[str]) -> set[str]:
    """Those of the comparable `names` that one of `entries` means: in any spelling, `*` standing for anything.

    A tag that is called exactly like an entry is meant alone, `*` in it or not.
    """
    known, meant = set(names), set()
    for entry in map(comparable, entries):
        if entry in known or "*" not in entry:
            meant |= {entry} & known
        else:
            pattern = re.compile(".*".join(map(re.escape, entry.split("*"))))
            meant |= {name for name in known if pattern.fullmatch(name)}
    return meant


def split_replacement(pair: str) -> tuple[str, str]:
    """`a=b` -> (a, b). The last `=` that has something behind it parts them: a tag may be a face like `=_=`."""
    for at in range(len(pair) - 1, 0, -1):
        if pair[at] == "=" and pair[:at].strip() and pair[at + 1 :].strip():
            return pair[:at].strip(), pair[at + 1 :].strip()
    return "", ""


# Where precision equals recall on the model's validation set, as its author states it.
KNOWN_POINTS = {
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


MCUT = "mcut"


def known_point(model: str) -> float:
    """The threshold that "auto" stands for; `model` is CAPTION_MODEL. Raises SettingsError for a model that has none."""
    name = model.rstrip("/").rpartition("/")[2]
    if name not in KNOWN_POINTS:
        raise SettingsError(
            f"caption_threshold: auto knows no point for {model}, only for {', '.join(KNOWN_POINTS)}; set a number, or mcut"
        )
    return KNOWN_POINTS[name]


def mcut(probabilities: np.ndarray) -> float:
    """The middle of the largest gap between neighbours among the sorted `probabilities` (Largeron et al. 2012, MCut)."""
    falling = np.sort(probabilities)[::-1]
    if len(falling) < 2:
        return 0.0
    widest = int(np.argmax(falling[:-1] - falling[1:]))
    return float(falling[widest] + falling[widest + 1]) / 2


FETCH_AGAIN = "delete it and run again to fetch it anew, or put a whole copy there"


def read_tags(path: Path) -> list[Tag]:
    """The rows of a `selected_tags.csv`; raises ModelError when it is none."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            tags = [Tag(row["name"], int(row["category"])) for row in csv.DictReader(file)]
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; make it readable for this user") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ModelError(f"{path}: is not a table with the columns name and category; {FETCH_AGAIN}") from None
    if not tags:
        raise ModelError(f"{path}: lists no tags; {FETCH_AGAIN}")
    return tags
