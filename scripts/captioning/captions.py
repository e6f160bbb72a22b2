"""Probabilities and a tagger's tags -> caption text; a trigger word -> into a caption that exists. Pure."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

GENERAL, CHARACTER, RATING = 0, 4, 9

# In these tags the underscore is part of a face; in all others it stands for a space.
KAOMOJI = frozenset(
    "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Tag:
    """A row of `selected_tags.csv`."""

    name: str
    """With underscores, as in the file."""
    category: int
    """GENERAL, CHARACTER or RATING; other categories never become words of a caption."""


class TagChoice:
    """Which of a tagger's tags become words of a caption: made once, asked for every picture."""

    def __init__(self, tags: Sequence[Tag], threshold: float, character_threshold: float, exclude: Collection[str]):
        """`exclude` may be written with underscores or spaces and in any case. Ratings are always left out."""
        excluded = {_comparable(tag) for tag in exclude}
        least = {GENERAL: threshold, CHARACTER: character_threshold}
        self._words = [spoken(tag.name) for tag in tags]
        self._least = np.array(
            [np.inf if _comparable(tag.name) in excluded else least.get(tag.category, np.inf) for tag in tags],
            dtype=np.float32,
        )

    def words(self, probabilities: np.ndarray) -> list[str]:
        """`probabilities` [tags] of one picture -> the words of its caption, the surest first, equals in the tagger's order."""
        kept = np.flatnonzero(probabilities >= self._least)
        surest_first = kept[np.argsort(-probabilities[kept], kind="stable")]
        return list(dict.fromkeys(self._words[index] for index in surest_first))


def spoken(tag: str) -> str:
    """A tag as captions write it: with spaces, unless it is a face."""
    return tag if tag in KAOMOJI else tag.replace("_", " ")


def caption_text(trigger: str, words: Sequence[str]) -> str:
    """The trigger first, then the words; a word that equals the trigger is not repeated."""
    return ", ".join([trigger, *(word for word in words if _comparable(word) != _comparable(trigger))])


def with_trigger(text: str, trigger: str, earlier: Collection[str] = ()) -> str:
    """A caption of the user's with the trigger in it.

    `earlier` are triggers that we put in front of this caption before: one that still leads it goes. If the trigger then
    stands anywhere in the text, as a tag or as a word of a sentence, the text stays as it is; else it gains the trigger
    in front. An empty text becomes the trigger alone.
    """
    first, _, rest = text.partition(",")
    if first.strip() == trigger:
        return text
    if first.strip() in earlier:
        text = rest.lstrip()
    if _stands_in(trigger, text):
        return text
    return f"{trigger}, {text.lstrip()}" if text.strip() else f"{trigger}\n"


def _stands_in(trigger: str, text: str) -> bool:
    """Whether the trigger stands in the text as a whole word. In any case: SDXL's text encoders do not tell A from a."""
    words = r"\s+".join(re.escape(word) for word in trigger.split())
    return re.search(rf"(?<![\w-]){words}(?![\w-])", text, re.IGNORECASE) is not None


def _comparable(tag: str) -> str:
    return tag.replace("_", " ").strip().casefold()
