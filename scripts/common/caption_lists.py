"""Captions of many images in one file: `metadata.jsonl` or `metadata.csv` beside them, as in image folders of Hugging Face."""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from common.captions import MAX_CAPTION_BYTES, is_plain_text
from common.errors import DataError, bullet_list
from common.files import read_file

LIST_FILES = ("metadata.jsonl", "metadata.csv")
UNREAD_LIST_FILES = ("metadata.parquet",)
"""The third form that the library datasets documents."""
MAX_LIST_BYTES = 1 << 28
_MAX_TEXT_BYTES = MAX_CAPTION_BYTES - 4096
"""The caption stage adds the trigger word."""
_NAME, _TEXT = "file_name", "text"
_MAX_PROBLEMS = 10


def read_caption_list(folder: Path) -> dict[Path, str]:
    """Image -> caption, as the LIST_FILES file in `folder` lists them; {} if there is none.

    The names of images are relative to `folder`. An entry without a text is an image without a caption. Raises DataError with
    everything that is wrong with the file.
    """
    files = [folder / name for name in LIST_FILES if os.path.lexists(folder / name)]
    if not files:
        return {}
    file = files[0]
    if len(files) > 1:
        raise DataError(f"{folder}: has both {' and '.join(LIST_FILES)}; keep one of them")
    captions: dict[Path, str] = {}
    problems = []
    try:
        content = read_file(file, MAX_LIST_BYTES + 1)
        if len(content) > MAX_LIST_BYTES:
            raise DataError(f"{file}: is larger than {MAX_LIST_BYTES >> 20} MiB; split the images into several folders")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{file}: is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; make it readable, or remove it") from None
    for number, entry in _json_lines(text) if file.suffix == ".jsonl" else _rows(text):
        problem = _problem_of(entry)
        image = folder / _path_in(entry[_NAME]) if not problem else None
        if image in captions:
            problem = f"{entry[_NAME]} is listed a second time; keep one entry"
        if problem:
            problems.append(f"line {number}: {problem}")
        elif entry.get(_TEXT) is not None:
            captions[image] = entry[_TEXT]
    if problems:
        more = [f"and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
        raise DataError(bullet_list(f"{file}: fix these lines, or remove the file:", [*problems[:_MAX_PROBLEMS], *more]))
    return captions


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """The number and value of each line that is not empty; None for one that is not JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _rows(text: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The number of the last line and the values of each row, None for a row of another length; an empty text is None in it."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            is_whole = None not in row and None not in row.values()
            yield reader.line_num, {key: value or None for key, value in row.items()} if is_whole else None
    except csv.Error:
        yield reader.line_num, None


def _path_in(name: str) -> PurePosixPath:
    """The path that a list gives, which may have been written on Windows."""
    return PurePosixPath(name.replace("\\", "/"))


def _problem_of(entry: Any) -> str:
    """What is wrong with an entry; "" if nothing is."""
    if not isinstance(entry, dict):
        return f"must have a {_NAME} and a {_TEXT}, as a JSON object or as columns with a header"
    name, text = entry.get(_NAME), entry.get(_TEXT)
    for key, value in ((_NAME, name), (_TEXT, text)):
        if isinstance(value, str) and not _is_unicode(value):
            return f"{key} has half of a character that a program cut in two"
    if not isinstance(name, str) or not name.strip():
        return f"has no {_NAME}"
    path = _path_in(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        return f"{_NAME} {name!r} must be a path below the folder of the file"
    if _TEXT not in entry:
        others = ", ".join(map(str, (key for key in entry if key != _NAME)))
        return f"has no {_TEXT}; rename to {_TEXT} what holds the caption{f', one of {others}' if others else ''}"
    if text is not None and not (isinstance(text, str) and is_plain_text(text) and len(text.encode()) <= _MAX_TEXT_BYTES):
        return f"{_TEXT} must be a text without control characters, of at most {_MAX_TEXT_BYTES // 2**10} KiB"
    return ""


def _is_unicode(text: str) -> bool:
    """Whether the text can be written in UTF-8; half a surrogate pair, which JSON allows, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
