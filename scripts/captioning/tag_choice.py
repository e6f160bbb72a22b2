"""Probabilities -> the tags of a picture -> the words of its caption, as the settings say. Pure."""

import re
from collections.abc import Collection, Sequence

import numpy as np

from captioning.captions import CHARACTER, GENERAL, RATING, Tag, comparable, spoken, words_of
from captioning.thresholds import MCUT, mcut
from sections import CaptionSettings

LEAST_OF_A_CHARACTER = 0.15
"""A cut below this is no certainty about a character: most pictures show none that the model knows."""


class TagChoice:
    """Which of a model's tags become words of a caption: made once, asked for every picture."""

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
        """`probabilities` [tags] of one picture -> indices of its tags, the surest first, equals in the model's order."""
        kept = np.concatenate([self._above(category, probabilities) for category in self._thresholds])
        kept = np.sort(kept[~self._excluded[kept]])
        return kept[np.argsort(-probabilities[kept], kind="stable")].tolist()

    def words(self, probabilities: np.ndarray, pruned: Collection[int] = ()) -> list[str]:
        """The words of a picture's caption: its tags without `pruned`, the always-first ones leading, at most
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
