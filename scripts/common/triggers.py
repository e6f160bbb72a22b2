"""Several trigger words in one data set: which folders have which, and where one could be taken for another. Pure."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from itertools import combinations

from common.captions import has_trigger
from common.errors import DataError, abbreviated, bullet_list
from common.image_folders import FOLDER_FILE, ImageFolder

_PIECES = re.compile(r"[^\W\d_]+|\d|[^\w\s]+")
"""Letters, single digits and marks, as CLIP's tokenizer splits a text before it looks at words. Underscores count as spaces."""


def classes_of(folders: Iterable[ImageFolder], trigger: str) -> dict[str, str]:
    """Trigger word -> class word, "" if none is given, of the concepts in these folders, in their order. `trigger` is that of
    folders without one.

    Raises DataError for trigger words that SDXL's text encoders cannot distinguish, and for one with two classes or in its class.
    """
    classes: dict[str, str] = {}
    named: dict[str, str] = {}
    problems = []
    for folder in folders:
        word = folder.trigger or trigger
        named.setdefault(word, folder.path.name)
        known = classes.setdefault(word, folder.class_word)
        if known and folder.class_word and known != folder.class_word:
            problems.append(f"{word!r} is the trigger word of the classes {known!r} and {folder.class_word!r}; give each its own")
        if has_trigger(folder.class_word, word):
            problems.append(
                f"{folder.path.name}: the class {folder.class_word!r} contains the trigger word {word!r}; name it alone"
            )
        classes[word] = known or folder.class_word
    for first, second in combinations(classes, 2):
        if pieces_of(first) == pieces_of(second):
            where = f"{first!r} ({named[first]}) and {second!r} ({named[second]})"
            problems.append(f"{where} are the same to the text encoders; spell them alike for one concept, or change one")
    if problems:
        raise DataError(bullet_list(f"trigger words in the files {FOLDER_FILE}:", problems))
    return classes


def contained_triggers(triggers: Iterable[str]) -> list[str]:
    """One line for each trigger word that is a part of another one."""
    lines = []
    for first, second in combinations(triggers, 2):
        short, long = sorted((first, second), key=lambda word: len(pieces_of(word)))
        if contains(pieces_of(long), pieces_of(short)):
            lines.append(f"trigger words: {short!r} is a part of {long!r}, so that prompts for the second ask for both; change one")
    return lines


def foreign_triggers(captions: Mapping[str, tuple[str, str]]) -> list[str]:
    """One line for each trigger word that captions of other concepts contain. `captions`: name -> its own trigger word ("" for
    a regularization image), its text."""
    triggers = dict.fromkeys(trigger for trigger, _ in captions.values() if trigger)
    lines = []
    for word in triggers:
        others = {own for own in triggers if own != word and not contains(pieces_of(own), pieces_of(word))} | {""}
        names = [name for name, (own, text) in captions.items() if own in others and has_trigger(text, word)]
        if names:
            which = f"{len(names)} captions of other concepts contain it: {abbreviated(names)}"
            lines.append(f"trigger word {word!r}: {which}; remove it where the image does not show what it stands for")
    return lines


def pieces_of(text: str) -> tuple[str, ...]:
    """The text as the text encoders see it: in lower case, split where CLIP's tokenizer always splits."""
    return tuple(_PIECES.findall(unicodedata.normalize("NFC", text).lower()))


def contains(pieces: tuple[str, ...], part: tuple[str, ...]) -> bool:
    """Whether `part` is a part of `pieces`, both from `pieces_of`."""
    return any(pieces[start : start + len(part)] == part for start in range(len(pieces) - len(part) + 1))
