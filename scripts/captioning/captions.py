"""Tags, words and the text of a caption; a trigger word -> into a caption that exists. Pure."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

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


def spoken(tag: str) -> str:
    """A tag as captions write it: with spaces, unless it is a face."""
    return tag if tag in KAOMOJI else tag.replace("_", " ")


def comparable(tag: str) -> str:
    """The same for every spelling of a tag: with underscores or spaces, in any case."""
    return tag.replace("_", " ").strip().casefold()


def caption_text(trigger: str, words: Sequence[str]) -> str:
    """The trigger first, then the words; a word that equals the trigger is not repeated."""
    return ", ".join([trigger, *(word for word in words if comparable(word) != comparable(trigger))])


def words_of(text: str) -> list[str]:
    """The pieces between the commas of a caption, the trigger among them."""
    return [word for word in (" ".join(piece.split()) for piece in text.split(",")) if word]


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
