"""Caption files: how their text is read, and what "the trigger word is in it" means, for every stage alike.

A caption is a regular file of UTF-8 text, with or without a byte order mark, of at most MAX_CAPTION_BYTES. Other encodings are
refused and never guessed: a caption is too short for a guess, and a wrong guess would be trained on. A caption may be a
symbolic link only within the data set, because the tags of all captions are published in the metadata of the LoRA.
"""

import csv
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from common.clip_tokens import is_common_word

MAX_CAPTION_BYTES = 64 * 2**10
MAX_TAG_WORDS = 6
"""A piece between commas with more words is part of a sentence, not a tag."""

_SPACE = r"[\s_]+"
_SENTENCE_END = re.compile(r"[^\W\d_][.!?](\s|$)")
_WEIGHT = re.compile(r"(?<![\\_])\(([^()]*):\s*([-+]?\d*\.?\d+)\s*\)")
_DOUBLE_BRACKETS = re.compile(r"(?<![\\_])\(\([^()]*[^\W\d_][^()]*(\([^()]*\)[^()]*)*\)\)")
_MOST_WEIGHT = 10
_BINARY = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
"""Control characters other than white space: no text has them, but text in UTF-16, ISO-2022 and other files do."""


class UnusableCaptionError(ValueError):
    """A caption file that cannot be used. The message is a predicate that says why and what to do."""


def read_caption(caption: Path, dataset: Path) -> str:
    """The text of a caption file of the data set in the folder `dataset`, without byte order marks, otherwise as it was written.

    Raises UnusableCaptionError, and FileNotFoundError if there is no such file.
    """
    content = read_caption_bytes(caption, dataset)
    try:
        text = content.decode("utf-8").replace("\ufeff", "")
    except UnicodeDecodeError:
        text = None
    wide = _utf16_or_utf32(content)
    if text is None or wide:
        raise UnusableCaptionError(f"is not UTF-8; save it as UTF-8{f' (it is {wide})' if wide else ''}")
    if not is_plain_text(text):
        raise UnusableCaptionError("is not plain text; save it as plain text in UTF-8")
    return text


def is_plain_text(text: str) -> bool:
    """Whether the text has no control characters but white space, and no other format begins like it."""
    return not _BINARY.search(text) and not text.startswith("{\\rtf")


def read_caption_bytes(caption: Path, dataset: Path) -> bytes:
    """The content of a caption file, in any encoding. Raises UnusableCaptionError, and FileNotFoundError if there is no such file.

    Its kind and size are checked before it is read: a pipe would block, and a device may have no end.
    """
    try:
        target = caption.resolve(strict=True)
        folders = (caption.parent.resolve(), dataset.resolve())
        if caption.is_symlink() and not any(target.is_relative_to(folder) for folder in folders):
            raise UnusableCaptionError("is a link to a file outside the data set; replace it by a copy of that file")
        if not stat.S_ISREG(target.stat().st_mode):
            raise UnusableCaptionError("is not a file; rename it")
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            content = file.read(MAX_CAPTION_BYTES + 1)
    except PermissionError:
        raise UnusableCaptionError("may not be read by this user; change its permissions") from None
    except FileNotFoundError:
        if caption.is_symlink():
            raise UnusableCaptionError("is a link to a file that does not exist; restore that file or remove the link") from None
        raise
    except (OSError, RuntimeError) as error:  # the latter for a link to itself
        reason = getattr(error, "strerror", None) or "it is a link to itself"
        raise UnusableCaptionError(f"cannot be read: {reason}; replace it") from None
    if len(content) > MAX_CAPTION_BYTES:
        raise UnusableCaptionError(f"is larger than the {MAX_CAPTION_BYTES // 2**10} KiB of a caption; shorten or remove it")
    return content


def _utf16_or_utf32(content: bytes) -> str:
    """The name of the encoding if `content` begins with its byte order mark, or a sixth of its bytes are zero as in Latin text."""
    marks = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
    marked = next((name for mark, name in marks.items() if content.startswith(mark)), "")
    if marked or 6 * content.count(0) < len(content) or not content:
        return marked
    return "UTF-32" if b"\0\0" in content else "UTF-16"


def in_one_line(text: str) -> str:
    """The caption as training reads it: lines joined, and each run of white space as one space.

    A line of tags is separated from the next line by a comma, as if the comma had been forgotten: some programs write one tag
    per line. A line of prose continues on the next line.
    """
    lines = [line for line in (" ".join(line.split()) for line in text.splitlines()) if line]
    pieces = lines[:1]
    for line, following in pairwise(lines):
        continues = line.endswith(",") or following.startswith(",") or is_prose(line)
        pieces += [" " if continues else ", ", following]
    return "".join(pieces)


def in_lines(text: str) -> str:
    """The captions of a text with one caption per line, separated by line feeds, with each run of white space as one space."""
    return "\n".join(line for line in (" ".join(line.split()) for line in text.splitlines()) if line)


def has_weights(text: str) -> bool:
    """Whether the text has brackets with weights, such as (smile:1.2), or double ones, as prompts for ComfyUI have. Names of works
    in a tag, such as saber_(fate), times, ratios and faces of marks are none."""
    for words, weight in _WEIGHT.findall(text):
        is_ratio = words[-1:].isdigit() and "." not in weight
        if re.search(r"[^\W\d_]", words) and not is_ratio and abs(float(weight)) <= _MOST_WEIGHT:
            return True
    return bool(_DOUBLE_BRACKETS.search(text))


def is_prose(text: str) -> bool:
    """Whether the text has a piece of more than MAX_TAG_WORDS words between commas, or a word that ends in `.`, `!` or `?`."""
    return bool(_SENTENCE_END.search(text)) or any(len(piece.split()) > MAX_TAG_WORDS for piece in text.split(","))


def has_trigger(text: str, trigger: str) -> bool:
    """Whether the trigger word occurs anywhere in the text, as a tag or in a sentence.

    It must be a word of its own. Case does not count, because SDXL's text encoders ignore it, nor whether the words of the
    trigger are separated by spaces or underscores, nor how Unicode composes its letters.
    """
    return bool(_pattern(trigger).search(unicodedata.normalize("NFC", text)))


def replace_trigger(text: str, trigger: str, word: str) -> str:
    """The text with `word` for every trigger word, in the sense of `has_trigger`."""
    return _pattern(trigger).sub(lambda _: word, unicodedata.normalize("NFC", text))


def asked_subject(kind: str, text: str, triggers: Sequence[str]) -> str:
    """The trigger word of the subject that a sample prompt of this kind (SamplePrompt.kind) asks for, the longest of several; ""
    if it asks for none. One of the user's asks for a subject if it contains the trigger word."""
    if kind == "class":
        return ""
    found = [trigger for trigger in triggers if has_trigger(text, trigger)]
    return max(found, key=len, default="" if kind == "user" else triggers[0])


def leads_with_trigger(text: str, trigger: str) -> bool:
    """Whether the trigger word, in the sense of `has_trigger`, is the first word of the text; brackets may precede it."""
    found = _pattern(trigger).search(unicodedata.normalize("NFC", text))
    return found is not None and not re.search(r"\w", found.string[: found.start()])


def ordinary_trigger(trigger: str, tags: Collection[str], vocabulary: Mapping[str, int]) -> str | None:
    """A warning if the trigger word is one of the tagger's `tags`, or consists of words that CLIP's `vocabulary` has; else None."""
    spelled = trigger.replace("_", " ").casefold()
    if any(tag.replace("_", " ").casefold() == spelled for tag in tags):
        kind = "is an ordinary tag"
    elif is_common_word(trigger, vocabulary):
        kind = "consists of ordinary words"
    else:
        return None
    return f"trigger_word: {trigger!r} {kind}, of which the base model has an idea already; choose one that means nothing"


def tagger_vocabulary(tag_cache: Path) -> set[str]:
    """The tags that the taggers know that have captioned the data set: the caption stage keeps their lists in `tag_cache`."""
    names = set()
    for file in tag_cache.glob("*/selected_tags.csv"):
        with suppress(OSError, ValueError, KeyError, TypeError, csv.Error), file.open(encoding="utf-8", newline="") as rows:
            names |= {row["name"] for row in csv.DictReader(rows)}
    return names


def _pattern(trigger: str) -> re.Pattern[str]:
    words = map(re.escape, re.split(_SPACE, unicodedata.normalize("NFC", trigger)))
    return re.compile(rf"(?<![\w-]){_SPACE.join(words)}(?![\w-])", re.IGNORECASE)
