"""How tags and the trigger word become the text of a caption, and how an existing caption gains the trigger word. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from common.captions import has_trigger

GENERAL, CHARACTER, RATING = 0, 4, 9
"""Categories of tags in WD14's `selected_tags.csv`."""
KAOMOJI = frozenset(
    "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||".split()  # noqa: SIM905
)
"""Tags in which the underscore is part of a face; in all others it stands for a space."""


@dataclass(frozen=True)
class Tag:
    """A row of `selected_tags.csv`."""

    name: str
    """With underscores, as in the file."""
    category: int
    """GENERAL, CHARACTER or RATING; tags of other categories are never used in captions."""


def tag_to_text(name: str) -> str:
    """A tag's name as captions spell it: with spaces, except in KAOMOJI."""
    return name if name in KAOMOJI else name.replace("_", " ")


def normalized(tag: str) -> str:
    """The same text for every spelling of a tag: with underscores or spaces, in any case."""
    return tag.replace("_", " ").strip().casefold()


def split_tags(text: str) -> list[str]:
    """The tags between the commas of `text`, each on one line."""
    return [tag for tag in (" ".join(piece.split()) for piece in text.split(",")) if tag]


def caption_text(trigger: str, tags: Sequence[str]) -> str:
    """The caption of an image with these `tags`: the trigger word first; a tag that equals it is not repeated."""
    return ", ".join([trigger, *(tag for tag in tags if normalized(tag) != normalized(trigger))])


def add_trigger(text: str, trigger: str, earlier: Collection[str] = ()) -> str:
    """A caption that the user wrote, with the trigger word in it.

    `earlier` are the trigger words that former runs put in front of this caption: if one of them still leads it, it is
    removed. If the trigger word then occurs anywhere in the text (see `has_trigger`), the text is not changed; otherwise the
    trigger word is put in front. An empty text becomes the trigger word alone.
    """
    first, _, rest = text.partition(",")
    if first.strip() == trigger:
        return text
    if first.strip() in earlier:
        text = rest.lstrip()
    if has_trigger(text, trigger):
        return text
    return f"{trigger}, {text.lstrip()}" if text.strip() else f"{trigger}\n"
