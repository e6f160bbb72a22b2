"""A value of a setting: text or TOML -> the type of its field, within the field's limits."""

import dataclasses
import math
import operator
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
"""Bytes of a variable that are not UTF-8 appear as surrogates."""


def within_limits(value: Any, key: dataclasses.Field) -> Any:
    """`value` if it, or each number of a list, is within the limits of its field; raises ValueError."""
    if isinstance(value, tuple):
        return tuple(within_limits(each, key) for each in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    tests = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}
    limits = key.metadata["limits"]
    if not all(tests[name](value, limit) for name, limit in limits.items()):
        bounds = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items())
        raise ValueError(f"must be {bounds}")
    return value


def convert(raw: Any, hint: Any, base: Path, *, is_text: bool) -> Any:
    """`raw` as the type `hint`; raises ValueError. Text is parsed; a TOML value must have the type already. Relative paths start
    at `base`."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if type(None) in options and raw == "":
        return None
    expected = []
    for option in options:
        if option is type(None):
            continue
        parse, name = _converter(option, base)
        expected.append(name)
        value = parse(raw, is_text)
        if value is not None:
            return value
    raise ValueError(f"must be {' or '.join(expected)}")


def _converter(option: Any, base: Path) -> tuple[Callable[[Any, bool], Any], str]:
    """A function (raw, is text) -> value or None, and the name of the expected type for a user."""
    if typing.get_origin(option) is Literal:
        choices = typing.get_args(option)
        return lambda raw, _: next((choice for choice in choices if choice == raw), None), "one of " + ", ".join(choices)
    if option == tuple[Path, ...]:
        return lambda raw, is_text: _as_paths(raw, base, is_text), "a path, or a list of paths"
    if option == tuple[int, ...]:
        return _as_ints, "a list of them"
    if typing.get_origin(option) is tuple:
        return _as_list, "a list of words"
    converters = {
        bool: (_as_bool, "true or false"),
        int: (_as_int, "a whole number"),
        float: (_as_float, "a number"),
        str: (lambda raw, _: raw if isinstance(raw, str) and not _NOT_TEXT.search(raw) else None, "text, in UTF-8"),
        Path: (lambda raw, _: _as_path(raw, base), "a path"),
    }
    return converters[option]


def _as_bool(raw: Any, is_text: bool) -> bool | None:
    if not is_text:
        return raw if isinstance(raw, bool) else None
    return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}.get(raw.strip().lower())


def _as_int(raw: Any, is_text: bool) -> int | None:
    if is_text:
        try:
            return int(raw.strip())
        except ValueError:
            return None
    return raw if isinstance(raw, int) and not isinstance(raw, bool) else None


def _as_ints(raw: Any, is_text: bool) -> tuple[int, ...] | None:
    pieces = [piece for piece in raw.split(",") if piece.strip()] if is_text else raw
    numbers = [_as_int(piece, is_text) for piece in pieces] if isinstance(pieces, list) else []
    return None if None in numbers or not numbers else tuple(numbers)


def _as_float(raw: Any, is_text: bool) -> float | None:
    if not is_text and (isinstance(raw, bool) or not isinstance(raw, (int, float))):
        return None
    try:
        number = float(raw)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _as_list(raw: Any, is_text: bool) -> tuple[str, ...] | None:
    words = [word.strip() for word in raw.split(",") if word.strip()] if is_text else raw
    are_words = isinstance(words, list) and all(isinstance(word, str) and word.strip() and word.isprintable() for word in words)
    return tuple(words) if are_words else None


def _as_paths(raw: Any, base: Path, is_text: bool) -> tuple[Path, ...] | None:
    """A string is one path if there is such a file, else a list separated by commas; empty for none."""
    if isinstance(raw, str):
        path = _as_path(raw, base)
        pieces = [raw] if path is not None and path.is_file() else [piece.strip() for piece in raw.split(",") if piece.strip()]
    else:
        pieces = raw if isinstance(raw, list) and not is_text else [None]
    paths = [_as_path(piece, base) for piece in pieces]
    return None if None in paths else tuple(paths)


def _as_path(raw: Any, base: Path) -> Path | None:
    """`~` is a user's home. Raises ValueError if that user does not exist."""
    if not isinstance(raw, str) or not raw or "\0" in raw:
        return None
    try:
        return base / Path(raw).expanduser()
    except RuntimeError:
        raise ValueError("cannot be expanded: no such user") from None
