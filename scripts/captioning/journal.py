"""The captions on the disk, and the record of what we wrote into them: `dataset/.loracat/captions.jsonl`.

A line goes into the record before its caption is written and holds both texts, the earlier and the new one. So a run that
is killed between the two loses nothing, and every run can be undone.

What became of the images.
"""

import base64
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from captioning.captions import caption_text, with_trigger
from common.dataset_layout import DatasetFolder, name_in
from common.errors import SomeItemsFailed
from common.files import append_json_line, read_json_lines, write_bytes


class UnusableCaptionError(ValueError):
    """A caption file that cannot be read as text; the message says why."""


@dataclass(frozen=True)
class Change:
    """A line of the record: what one run did to one caption."""

    run: int
    caption: str
    """Path relative to the folder of images."""
    trigger: str
    made: bool
    """True for a caption of the trigger and tags; False for a caption of the user's that gained the trigger."""
    before: bytes | None
    """The file's content; None if there was none."""
    after: bytes


@dataclass(frozen=True)
class Undone:
    """What `undo` did."""

    run: int
    """The run that was undone; 0 if there was none."""
    put_back: int
    edited: list[str]
    """Captions that somebody changed since: they stay."""
    earlier: int
    """How many runs can be undone after this one."""


class CaptionFiles:
    """The captions of a data set under one trigger word, in one run of the stage."""

    def __init__(self, folder: DatasetFolder, trigger: str):
        self._folder = folder.images
        self._record = folder.records / "captions.jsonl"
        self._trigger = trigger
        self._changes: dict[str, list[Change]] = {}
        self._runs: set[int] = set()
        self._undone: set[int] = set()
        for line in read_json_lines(self._record):
            self._remember(line)
        self._run = max(self._runs, default=0) + 1

    def is_ours(self, caption: Path) -> bool:
        """Whether `caption` holds word for word what we made once. One that the user edited since is the user's."""
        made = {change.after.strip() for change in self._changes.get(self._name(caption), ()) if change.made}
        with contextlib.suppress(UnusableCaptionError):
            return bool(made) and _content_of(caption).strip() in made
        return False

    def write(self, caption: Path, words: list[str]) -> bool:
        """Make `caption` of the trigger and `words`, whatever it was before; returns whether it had to change.

        Raises UnusableCaptionError for a caption that may not be read: what it was could not be put back.
        """
        return self._change(caption, (caption_text(self._trigger, words) + "\n").encode("utf-8"), made=True)

    def keep(self, caption: Path) -> bool:
        """See to it that the existing `caption` of the user's has the trigger; returns whether it had to change.

        Raises UnusableCaptionError, and leaves the file as it is, when it is not UTF-8 text.
        """
        text = text_of(caption)
        earlier = {change.trigger for change in self._changes.get(self._name(caption), ())}
        renewed = with_trigger(text, self._trigger, earlier)
        return renewed.strip() != text.strip() and self._change(caption, renewed.encode("utf-8"), made=False)

    def undo(self) -> Undone:
        """Put back what the captions were before the last run that changed any, and is not undone yet.

        Raises UnusableCaptionError if a caption may not be read; undoing can be repeated then.
        """
        runs = sorted(self._runs - self._undone)
        if not runs:
            return Undone(0, 0, [], 0)
        edited, put_back = [], 0
        there = {self._name(path): path for path in self._folder.rglob("*") if path.is_file()}
        changes = [change for of_caption in self._changes.values() for change in of_caption if change.run == runs[-1]]
        for change in reversed(changes):
            caption = there.get(change.caption, self._folder / change.caption)
            content = _content_of(caption) if change.caption in there else None
            if content == change.after:
                _restore(caption, change.before)
                put_back += 1
            elif content != change.before:
                edited.append(change.caption)
        append_json_line(self._record, {"undone": runs[-1]})
        self._undone.add(runs[-1])
        return Undone(runs[-1], put_back, sorted(edited), len(runs) - 1)

    def _change(self, caption: Path, after: bytes, made: bool) -> bool:
        before = _content_of(caption) if caption.is_file() else None
        if before == after:
            return False
        line = {"run": self._run, "caption": self._name(caption), "trigger": self._trigger, "made": made}
        line |= _as_json("before", before) | _as_json("after", after)
        append_json_line(self._record, line)
        self._remember(line)
        write_bytes(caption, after)
        return True

    def _remember(self, line: dict) -> None:
        """Take in a line of the record; what is none of ours, or damaged, is passed over."""
        if isinstance(line.get("undone"), int):
            self._undone.add(line["undone"])
        if change := _change_of(line):
            self._changes.setdefault(change.caption, []).append(change)
            self._runs.add(change.run)

    def _name(self, caption: Path) -> str:
        return name_in(self._folder, caption)


def text_of(caption: Path) -> str:
    """The caption without the byte order mark that some editors put in front. Raises UnusableCaptionError."""
    try:
        return _content_of(caption).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnusableCaptionError("is not UTF-8; save it as UTF-8") from None


def _content_of(caption: Path) -> bytes:
    try:
        return caption.read_bytes()
    except PermissionError:
        raise UnusableCaptionError("may not be read by this user; change its permissions") from None


def _restore(caption: Path, content: bytes | None) -> None:
    if content is None:
        caption.unlink()
    else:
        write_bytes(caption, content)


def _change_of(line: dict) -> Change | None:
    """The change that a line of the record tells of, None if it tells of none or a value in it is of another type."""
    kinds = {"run": int, "caption": str, "trigger": str, "made": bool}
    if not all(isinstance(line.get(key), kind) for key, kind in kinds.items()):
        return None
    try:
        before, after = _from_json("before", line), _from_json("after", line)
    except (AttributeError, TypeError, ValueError):  # no text, or no base64
        return None
    return Change(**{key: line[key] for key in kinds}, before=before, after=after or b"")


def _as_json(key: str, content: bytes | None) -> dict[str, str | None]:
    """A file's content as an entry of a line: as text if it is UTF-8, so that a person can read the record."""
    try:
        return {key: None if content is None else content.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{key}_base64": base64.b64encode(content).decode("ascii")}


def _from_json(key: str, line: dict) -> bytes | None:
    if f"{key}_base64" in line:
        return base64.b64decode(line[f"{key}_base64"], validate=True)
    return None if line.get(key) is None else line[key].encode("utf-8")


STAGE = "caption_images"


@dataclass
class Tally:
    """Counts; each failure is reported when it happens."""

    captioned: int = 0
    kept: int = 0
    """Captions that were as they should be."""
    given: int = 0
    """Captions of the user's that now have the trigger."""
    failed: int = 0

    def fail(self, place: object, reason: object) -> None:
        """Report one failure: a line on standard error."""
        self.failed += 1
        tqdm.write(f"{STAGE}: {place}: {reason}", file=sys.stderr)

    def report(self, trigger: str) -> None:
        """Print the counts. Raises SomeItemsFailed if there were failures."""
        if not (self.captioned or self.given or self.failed):
            print(f"nothing to do: all {self.kept} captions are there, with the trigger {trigger}")
            return
        counts = f"{self.captioned} captioned, {self.given} given the trigger {trigger}, {self.kept} kept as they were"
        if self.failed:
            raise SomeItemsFailed(f"{counts}, {self.failed} failed as said above; mend them and run again")
        print(counts)
