"""Folders of images: which of them belong to the data set, and what `folder.toml` or the name of each says of its images.

Standard library only.
"""

import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError, bullet_list
from common.files import read_file

FOLDER_FILE = "folder.toml"
MAX_REPEATS = 99_999
_MAX_FILE_BYTES = 1 << 16
_MOST_SHOWN = 60
"""Characters of a key or value that a message repeats."""
_NAME = re.compile(r"(\d{1,5})_(.+)", re.DOTALL)
"""kohya's: the repeats, and the class or what else the user calls it."""


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images of the data set. An empty value: as the settings say."""

    path: Path
    repeats: int = 1
    """How often one epoch uses each image; 0: the folder is excluded."""
    trigger: str = ""
    class_word: str = ""
    caption_source: str = ""
    mask_weight: float | None = None
    resolutions: tuple[int, ...] = ()


def find_folders(root: Path) -> list[ImageFolder]:
    """The folder `root` of images, and those in it that are called `N_name` or contain FOLDER_FILE, sorted by name.

    Raises DataError with everything that is wrong with their files.
    """
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:  # tells files and folders apart without a look at each of them
        others = [root / each.name for each in entries if each.name[0] != "." and not each.is_file(follow_symlinks=False)]
    paths = sorted(path for path in others if path.is_dir())
    paths = [path for path in paths if _NAME.fullmatch(path.name) or os.path.lexists(path / FOLDER_FILE)]
    folders, problems = [], []
    for path in (root, *paths):
        name = _NAME.fullmatch(path.name) if path != root else None
        values = {"repeats": int(name[1])} if name else {}
        read, wrong = _read(path / FOLDER_FILE)
        folders.append(ImageFolder(path, **values | read))
        problems += wrong
    if problems:
        raise DataError(bullet_list(f"{root}: fix the files {FOLDER_FILE}:", problems))
    return folders


def class_in_name(folder: Path) -> str:
    """The words after N in a folder `N_class`, as kohya's scripts name folders of regularization images; else empty."""
    match = _NAME.fullmatch(folder.name)
    return " ".join(match[2].replace("_", " ").split()) if match else ""


def trigger_problem(word: str) -> str:
    """What is wrong with a trigger word; "" if nothing is."""
    is_one_tag = word and "," not in word and word == " ".join(word.split()) and word.isprintable()
    return "" if is_one_tag else f"{_shown(word)} must be one tag, without commas, control characters or extra spaces"


def _read(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The values in a FOLDER_FILE as fields of ImageFolder, and one line for each thing that is wrong with it."""
    if not os.path.lexists(file):
        return {}, []
    shown = os.path.join(file.parent.name, file.name)
    try:
        content = read_file(file, _MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            return {}, [f"{shown}: is larger than {_MAX_FILE_BYTES >> 10} KiB"]
        table = tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return {}, [f"{shown}: not valid TOML: {error}"]
    except OSError as error:
        return {}, [f"{shown}: cannot be read: {error.strerror}"]
    values, problems = {}, []
    for key, value in table.items():
        if key not in _KEYS:
            problems.append(f"{shown}: unknown key {_shown(key)}; known: {', '.join(_KEYS)}")
            continue
        name, problem_of = _KEYS[key]
        if problem := problem_of(value):
            problems.append(f"{shown}: {key}: {problem}")
        else:
            values[name] = _as_sizes(value) if key == "resolution" else value
    return values, problems


def _shown(value: Any) -> str:
    """A key or value as a message repeats it: in one line, and not more than its beginning."""
    try:
        shown = repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."


def _repeats_problem(value: Any) -> str:
    is_valid = type(value) is int and 0 <= value <= MAX_REPEATS
    return "" if is_valid else f"must be a whole number from 0 to {MAX_REPEATS} (is {_shown(value)})"


def _word_problem(value: Any) -> str:
    return trigger_problem(value) if isinstance(value, str) else f"must be a text in quotation marks (is {_shown(value)})"


def _weight_problem(value: Any) -> str:
    is_valid = type(value) in (int, float) and 0 <= value <= 1
    return "" if is_valid else f"must be a number from 0 to 1 (is {_shown(value)})"


def _resolution_problem(value: Any) -> str:
    is_valid = bool(_as_sizes(value)) and all(type(size) is int and 64 <= size <= 4096 for size in _as_sizes(value))
    return "" if is_valid else f"must be a whole number from 64 to 4096, or a list of them (is {_shown(value)})"


def _as_sizes(value: Any) -> tuple[Any, ...]:
    """The sizes of a single value or of a list, each once, the largest first if they can be compared."""
    sizes = value if isinstance(value, list) else [value]
    return tuple(sorted(set(sizes), reverse=True)) if all(type(size) is int for size in sizes) else tuple(sizes)


def _source_problem(value: Any) -> str:
    return "" if value in ("tags", "prompt", "both") else f'must be "tags", "prompt" or "both" (is {_shown(value)})'


_KEYS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "repeats": ("repeats", _repeats_problem),
    "trigger": ("trigger", _word_problem),
    "class": ("class_word", _word_problem),
    "caption_source": ("caption_source", _source_problem),
    "mask_weight": ("mask_weight", _weight_problem),
    "resolution": ("resolutions", _resolution_problem),
}
"""Key of a FOLDER_FILE -> field of ImageFolder, and a function that says what is wrong with a value, "" if nothing is."""
