"""One setting: its field in a section, its value from text or TOML, its value as TOML and as it may be shown."""

import dataclasses
import math
import operator
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

_IS_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""Bytes of a variable that are not UTF-8 arrive as surrogates."""
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    secret: bool = False,
) -> Any:
    """A field of a section: its default and the range of a number. A secret exists as an environment variable only."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most}
    metadata = {"limits": {name: limit for name, limit in limits.items() if limit is not None}, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def converted(raw: Any, hint: Any, base: Path, *, is_text: bool) -> Any:
    """`raw` as the type `hint`; raises ValueError. Text is parsed; a TOML value must have the type already. Relative paths
    begin at `base`."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if type(None) in options and raw == "":
        return None
    wanted = []
    for option in options:
        if option is type(None):
            continue
        convert, name = _converter(option, base)
        wanted.append(name)
        value = convert(raw, is_text)
        if value is not None:
            return value
    raise ValueError(f"must be {' or '.join(wanted)}")


def _converter(option: Any, base: Path) -> tuple[Callable[[Any, bool], Any], str]:
    """A function (raw, is text) -> value or None, and how a person would call what is wanted."""
    if typing.get_origin(option) is Literal:
        choices = typing.get_args(option)
        return lambda raw, _: next((choice for choice in choices if choice == raw), None), "one of " + ", ".join(choices)
    if typing.get_origin(option) is tuple:
        return _as_list, "a list of words"
    converters = {
        bool: (_as_bool, "true or false"),
        int: (_as_int, "a whole number"),
        float: (_as_float, "a number"),
        str: (lambda raw, _: raw if isinstance(raw, str) and not _IS_NO_TEXT.search(raw) else None, "text, in UTF-8"),
        Path: (lambda raw, _: absolute(Path(raw), base) if isinstance(raw, str) and raw and "\0" not in raw else None, "a path"),
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


def absolute(path: Path, base: Path) -> Path:
    """`path`, from `base` if it is relative; `~` is the user's home. Raises ValueError for the home of somebody unknown."""
    try:
        return base / path.expanduser()
    except RuntimeError:
        raise ValueError("begins with the home of a user whom this machine does not know") from None


def checked(value: Any, key: dataclasses.Field) -> Any:
    """`value` if it lies within the limits of its field; raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    tests = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}
    limits = key.metadata["limits"]
    if not all(tests[name](value, limit) for name, limit in limits.items()):
        bounds = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items())
        raise ValueError(f"must be {bounds}")
    return value


def as_toml(value: Any) -> Any:
    """A value as the settings file would hold it."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def without_logins(value: Any) -> Any:
    """A value as it may be shown: `user:password@` in an address becomes `***@`."""
    return re.sub(r"//[^/\s]*@", "//***@", value) if isinstance(value, str) else value
