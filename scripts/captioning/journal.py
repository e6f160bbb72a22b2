"""Change captions on the disk so that every change can be undone: `dataset/.loracat/captions.jsonl` records each of them.

A line is written to the record before its caption is changed, and holds the earlier and the new text. A run that is killed
between the two loses nothing. What `traits.json` said before is in `traits.jsonl`, likewise.
"""

import base64
import contextlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.captions import add_trigger
from common.captions import MAX_CAPTION_BYTES, UnusableCaptionError, read_caption, read_caption_bytes
from common.dataset_layout import DatasetFolder, name_in
from common.files import append_json_line, read_json_lines, write_bytes, write_json


@dataclass(frozen=True)
class Change:
    """A line of the record: what one run did to one caption."""

    run: int
    caption: str
    """Path relative to the folder of images."""
    trigger: str
    made: bool
    """True for a caption that was generated, of tags or of a prompt; False for a user's caption that was copied from a file with
    another suffix, or gained the trigger word."""
    before: bytes | None
    """The file's content; None if it did not exist."""
    after: bytes


@dataclass(frozen=True)
class UndoResult:
    """What `CaptionFiles.undo` did."""

    run: int
    """The run that was undone; 0 if there was none."""
    restored: int
    edited: list[str]
    """Captions that were changed after that run; they are not restored."""
    earlier: int
    """Number of runs that can still be undone."""


class CaptionFiles:
    """The captions of a data set in one run of the stage."""

    def __init__(self, folder: DatasetFolder, trigger: str, triggers: Mapping[Path, str] | None = None, *, per_line: bool = False):
        """`trigger` is the trigger word, except in the folders that `triggers` lists with one of their own. `per_line`: each line
        of a user's caption is a caption."""
        self._dataset, self._folder = folder.root, folder.images
        self._record, self._traits, self._traits_log = folder.caption_log, folder.traits, folder.traits_log
        self._trigger, self._triggers, self._per_line = trigger, triggers or {}, per_line
        self._changes: dict[str, list[Change]] = {}
        self._runs: set[int] = set()
        self._undone: set[int] = set()
        for line in read_json_lines(self._record):
            self._remember(line)
        self._run = max(self._runs, default=0) + 1

    def trigger_of(self, caption: Path) -> str:
        """The trigger word of a caption: that of its folder."""
        return self._triggers.get(caption.parent, self._trigger)

    def is_generated(self, caption: Path) -> bool:
        """Whether `caption` is word for word a text that this stage generated. One that the user edited is the user's."""
        changes = self._changes.get(name_in(self._folder, caption), ())
        return self._is_one_of(caption, {change.after.strip() for change in changes if change.made})

    def is_derived(self, caption: Path) -> bool:
        """Whether `caption` does not exist, or is word for word what this stage generated or copied from another file."""
        if not os.path.lexists(caption):
            return True
        derived: set[bytes | None] = {None}
        for change in self._changes.get(name_in(self._folder, caption), ()):
            if change.made or change.before in derived:
                derived.add(change.after)
        return self._is_one_of(caption, {text.strip() for text in derived if text is not None})

    def _is_one_of(self, caption: Path, texts: set[bytes]) -> bool:
        with contextlib.suppress(UnusableCaptionError, FileNotFoundError):
            return bool(texts) and read_caption_bytes(caption, self._dataset).strip() in texts
        return False

    def write(self, caption: Path, text: str) -> bool:
        """Write a text that was generated to `caption`, whatever it was before; returns whether the file changed.

        Raises UnusableCaptionError for a caption that cannot be read, because it could not be restored.
        """
        return self._change(caption, (text + "\n").encode("utf-8"), made=True)

    def ensure_trigger(self, caption: Path) -> bool:
        """Add the trigger word to the user's existing `caption` unless it has it; returns whether the file changed.

        Raises UnusableCaptionError, and leaves the file as it is, if it cannot be used.
        """
        text = read_caption(caption, self._dataset)
        earlier = {change.trigger for change in self._changes.get(name_in(self._folder, caption), ())}
        changed = self._with_trigger(text, caption, earlier)
        return changed.strip() != text.strip() and self._change(caption, changed.encode("utf-8"), made=False)

    def copy(self, source: Path, caption: Path, listed: str | None = None) -> bool:
        """Write the text of the user's caption `source`, or that which is `listed` for the image `source`, with the trigger word in
        it, to `caption`; returns whether it changed.

        Raises UnusableCaptionError if `source` cannot be used. Without `source`, the copy is the user's caption.
        """
        text = read_caption(source, self._dataset) if listed is None else listed
        return self._change(caption, self._with_trigger(text, caption).encode("utf-8"), made=False)

    def write_traits(self, before: Any, after: dict) -> None:
        """Write the record of traits, which holds `before`; None if there is none, or it cannot be read."""
        if before != after and self._runs:  # without an earlier run, there is nothing to go back to
            append_json_line(self._traits_log, {"run": self._run, "before": before})
        write_json(self._traits, after)

    def _with_trigger(self, text: str, caption: Path, earlier: Collection[str] = ()) -> str:
        """The user's text with the trigger word of `caption`, in each line if each is a caption."""
        parts = text.splitlines(keepends=True) if self._per_line and text.strip() else [text]
        trigger = self.trigger_of(caption)
        return "".join(add_trigger(part, trigger, earlier) if part.strip() or len(parts) == 1 else part for part in parts)

    def undo(self) -> UndoResult:
        """Restore the captions, and the record of traits, as they were before the last run that changed any caption and is not
        undone yet.

        Raises UnusableCaptionError if a caption cannot be read; the undo can then be repeated.
        """
        runs = sorted(self._runs - self._undone)
        if not runs:
            return UndoResult(0, 0, [], 0)
        edited, restored = [], 0
        files = {name_in(self._folder, path): path for path in self._folder.rglob("*") if path.is_file()}
        changes = [change for of_caption in self._changes.values() for change in of_caption if change.run == runs[-1]]
        for change in reversed(changes):
            caption = files.get(change.caption, self._folder / change.caption)
            try:
                content = read_caption_bytes(caption, self._dataset) if change.caption in files else None
            except UnusableCaptionError as error:
                raise UnusableCaptionError(f"{error}, then undo again ({change.caption})") from None
            if content == change.after:
                if change.before is None:
                    caption.unlink()
                else:
                    write_bytes(caption, change.before)
                restored += 1
            elif content != change.before:
                edited.append(change.caption)
        # A run that changed no caption has the number of the next one that does. Version 1.0 wrote no log of traits.
        lines: list[dict] = []
        for line in read_json_lines(self._traits_log):
            if isinstance(line.get("undone"), int):
                lines = [each for each in lines if each["run"] < line["undone"]]
            elif isinstance(line.get("run"), int):
                lines.append(line)
        lines = [line for line in lines if line["run"] >= runs[-1]]
        before = lines[0].get("before") if lines and len(runs) > 1 else None
        if before is not None:
            write_json(self._traits, before)
        elif lines or len(runs) == 1:
            self._traits.unlink(missing_ok=True)
        if lines:
            append_json_line(self._traits_log, {"undone": runs[-1]})
        append_json_line(self._record, {"undone": runs[-1]})
        self._undone.add(runs[-1])
        return UndoResult(runs[-1], restored, sorted(edited), len(runs) - 1)

    def _change(self, caption: Path, after: bytes, made: bool) -> bool:
        before = read_caption_bytes(caption, self._dataset) if os.path.lexists(caption) else None
        if before == after:
            return False
        if len(after) > MAX_CAPTION_BYTES:
            kib = MAX_CAPTION_BYTES // 2**10
            raise UnusableCaptionError(
                f"would be larger than the {kib} KiB of a caption with the trigger word in it; shorten the text"
            )
        name, trigger = name_in(self._folder, caption), self.trigger_of(caption)
        line = {"run": self._run, "caption": name, "trigger": trigger, "made": made}
        line |= _to_json("before", before) | _to_json("after", after)
        append_json_line(self._record, line)
        self._remember(line)
        write_bytes(caption, after)
        return True

    def _remember(self, line: dict) -> None:
        """Add a line of the record to what is known; an unknown or damaged one is ignored."""
        if isinstance(line.get("undone"), int):
            self._undone.add(line["undone"])
        if change := _parse_change(line):
            self._changes.setdefault(change.caption, []).append(change)
            self._runs.add(change.run)


def _parse_change(line: dict) -> Change | None:
    """The change that a line of the record describes; None if it describes none or a value has another type."""
    types = {"run": int, "caption": str, "trigger": str, "made": bool}
    if not all(isinstance(line.get(key), expected) for key, expected in types.items()):
        return None
    contents = {}
    for key in ("before", "after"):
        try:
            if f"{key}_base64" in line:
                contents[key] = base64.b64decode(line[f"{key}_base64"], validate=True)
            else:
                contents[key] = None if line.get(key) is None else line[key].encode("utf-8")
        except (AttributeError, TypeError, ValueError):  # not text, or not base64
            return None
    return Change(**{key: line[key] for key in types}, before=contents["before"], after=contents["after"] or b"")


def _to_json(key: str, content: bytes | None) -> dict[str, str | None]:
    """A file's content as an entry of a line: as text if it is UTF-8, so that a person can read the record."""
    try:
        return {key: None if content is None else content.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{key}_base64": base64.b64encode(content).decode("ascii")}
