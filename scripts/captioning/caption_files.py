"""The captions on the disk, and the record of what we wrote into them: `dataset/.loracat/captions.jsonl`.

A line goes into the record before its caption is written, so a run that is killed between the two knows both texts.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from captioning.captions import caption_text, with_trigger
from dataset_folder import DatasetFolder, append_json_line, read_json_lines, write_text


class UnusableCaptionError(ValueError):
    """A caption file that cannot be read as text; the message says why."""


@dataclass(frozen=True)
class Written:
    """What we wrote into one caption so far."""

    triggers: tuple[str, ...] = ()
    """Every trigger that we put in front of it."""
    words: tuple[str, ...] | None = None
    """The words of a caption that we made; None for a caption of the user's that only gained a trigger."""

    def is_ours(self, text: str) -> bool:
        """Whether `text` is word for word what we wrote. A caption that the user edited since is the user's."""
        return self.words is not None and text.strip() in {caption_text(trigger, self.words) for trigger in self.triggers}


class CaptionFiles:
    """The captions of a data set under one trigger word."""

    def __init__(self, folder: DatasetFolder, trigger: str):
        self._folder = folder.images
        self._record = folder.records / "captions.jsonl"
        self._trigger = trigger
        self._written: dict[str, Written] = {}
        for line in read_json_lines(self._record):
            if "caption" in line and "trigger" in line:
                self._remember(line)

    def write(self, caption: Path, words: list[str]) -> None:
        """Make `caption` of the trigger and `words`, whatever it was before."""
        self._note(caption, words)
        write_text(caption, caption_text(self._trigger, words) + "\n")

    def keep(self, caption: Path) -> bool:
        """See to it that the existing `caption` has the trigger; returns whether it had to change.

        Raises UnusableCaptionError, and leaves the file as it is, when it is not UTF-8 text.
        """
        text = _text_of(caption)
        written = self._written.get(self._name(caption), Written())
        if written.is_ours(text):
            words, renewed = list(written.words), caption_text(self._trigger, written.words) + "\n"
        else:
            words, renewed = None, with_trigger(text, self._trigger, written.triggers)
        changed = renewed.strip() != text.strip()
        if changed:
            self._note(caption, words)
            write_text(caption, renewed)
        return changed

    def _note(self, caption: Path, words: list[str] | None) -> None:
        line = {"caption": self._name(caption), "trigger": self._trigger} | ({} if words is None else {"words": words})
        append_json_line(self._record, line)
        self._remember(line)

    def _remember(self, line: dict) -> None:
        name, words = line["caption"], line.get("words")
        triggers = dict.fromkeys((*self._written.get(name, Written()).triggers, line["trigger"]))
        self._written[name] = Written(tuple(triggers), None if words is None else tuple(words))

    def _name(self, caption: Path) -> str:
        """The caption's key in the record; a name that is not UTF-8 gets escapes."""
        return os.fsencode(caption.relative_to(self._folder)).decode("utf-8", "backslashreplace")


def _text_of(caption: Path) -> str:
    """The caption without the byte order mark that some editors put in front."""
    try:
        return caption.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnusableCaptionError("is not UTF-8; save it as UTF-8") from None
    except PermissionError:
        raise UnusableCaptionError("may not be read by this user; change its permissions") from None
