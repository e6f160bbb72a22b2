"""One setting: its field in a section, its value from text or TOML, its value as TOML and as it may be shown.

Settings: TOML < environment < flags, as frozen typed values.

A section is a frozen dataclass whose fields are made with `setting(...)`; it is one table of
`config/training_config.toml`, and a field that is itself a section is a table inside it. Every key has one environment
variable, its name in capitals; an empty variable means "not set". Everything that is wrong is refused at once.
Relative paths in the file are relative to the repository, in variables and flags to the current directory.
"""

import argparse
import dataclasses
import math
import operator
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from common.errors import SettingsError, bullet_list

_IS_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""Bytes of a variable that are not UTF-8 arrive as surrogates."""


MISSING = dataclasses.MISSING
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def setting(
    default: Any,
    *,
    role: Literal["result", "runtime", "saving"] | None = None,
    before: Any = MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    secret: bool = False,
) -> Any:
    """A field of a section: its default and the range of a number. A secret exists as an environment variable only.

    `role` says what a setting of training changes: the `result` (two runs that differ in it are different runs), the
    `runtime` (speed and memory) or the `saving` (what is written and when). `before` is the value that versions without
    this setting used: a checkpoint or LoRA that does not record the setting is read as if it had recorded that value.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most}
    metadata = {"limits": {name: limit for name, limit in limits.items() if limit is not None}, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata | {"role": role, "before": before}, repr=not secret)


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


REPOSITORY = Path(__file__).resolve().parent.parent.parent


SETTINGS_FILE = REPOSITORY / "config" / "training_config.toml"


TABLES = ("project", "collect", "caption", "train")


class PartialSection:
    """Base of a section that has only a part of its table's keys: others belong to another stage and are not unknown keys."""


@dataclass(frozen=True)
class Request:
    """What a script was asked to do."""

    check: bool
    """Only verify what the stage needs."""
    inputs_pending: bool
    """Stages before this one are still to run: what they bring need not be there for `check`."""
    sections: dict[str, Any]
    """One filled section per table, by the table's name."""
    sources: dict[str, str]
    """Where each key's value came from: `default`, the file's name, `environment` or `--set`."""
    asked: frozenset[str] = frozenset()
    """The stage's own flags that were given."""

    def described(self) -> str:
        """One line per key: its value and where it came from; secrets are not shown."""
        lines = []
        for section in self.sections.values():
            for name, value, secret in _flat_values(section):
                shown = ("set" if value else "not set") if secret else without_logins(as_toml(value))
                lines.append(f"{name} = {shown!r}  ({self.sources[name]})")
        return "\n".join(lines)

    def overridden(self) -> str:
        """The values that did not come from the file, in one line."""
        shown = [line.rpartition("  (")[0] for line in self.described().splitlines() if line.endswith(("(environment)", "(--set)"))]
        return ", ".join(shown) or "nothing"


Contradictions = Callable[[dict[str, Any]], typing.Iterable[str]]
"""Filled sections, by the names of their tables -> what is wrong with them."""


def read_request(
    stage: str,
    description: str,
    argv: list[str],
    sections: dict[str, type],
    flags: typing.Mapping[str, str] | None = None,
    validate: Contradictions = lambda _: (),
) -> Request:
    """Parse the flags and fill `sections` (table name -> section class). `flags` are the stage's own: name -> help.
    `validate` says what is wrong with the filled sections together.

    Raises SettingsError with every problem at once. `--help` and `--settings` print and end the program.
    """
    parser = argparse.ArgumentParser(prog=f"{stage}.py", description=description)
    parser.add_argument(
        "--check",
        nargs="?",
        const="now",
        choices=("now", "ahead"),
        help="verify everything the stage needs, print one list, and exit; ahead: earlier stages still bring images and captions",
    )
    parser.add_argument("--settings", action="store_true", help="print every setting and where it came from, and exit")
    parser.add_argument("--config", type=Path, default=SETTINGS_FILE, metavar="FILE", help="another settings file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set one key; wins over everything")
    for name, text in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.error = _refuse_flags
    given = parser.parse_args(argv)
    request = resolve(given.config, os.environ, given.set, sections, validate, check=given.check)
    if given.settings:
        print(request.described())
        raise SystemExit(0)
    return dataclasses.replace(request, asked=frozenset(name for name in flags or {} if vars(given)[name]))


def _refuse_flags(message: str) -> None:
    raise SettingsError(f"{message}; --help shows the flags")


def resolve(
    file: Path,
    environment: typing.Mapping[str, str],
    flags: list[str],
    sections: dict[str, type],
    validate: Contradictions = lambda _: (),
    *,
    check: str | None = None,
) -> Request:
    """Fill `sections` from the TOML `file`, then `environment`, then `flags` (`KEY=VALUE`).

    Raises SettingsError with every problem at once: unknown keys, wrong types, values out of range, validate.
    """
    problems: list[str] = []
    tables = _read_toml(file)
    problems += [f"[{name}]: unknown table in {file.name}; known: {', '.join(TABLES)}" for name in tables if name not in TABLES]
    from_flags = _split_flags(flags, problems)
    sources: dict[str, str] = {}
    filled = {
        name: _fill(section, name, tables.get(name, {}), file, environment, from_flags, sources, problems)
        for name, section in sections.items()
    }
    problems += [f"--set {key}: unknown key" for key in from_flags]
    if None not in filled.values():
        problems += validate(filled)
    if problems:
        raise SettingsError(bullet_list("these settings cannot be used:", problems))
    return Request(check=check is not None, inputs_pending=check == "ahead", sections=filled, sources=sources)


def all_keys(section: type) -> Iterator[dataclasses.Field]:
    """Every field of a section that is a key, tables inside it included."""
    hints = typing.get_type_hints(section)
    for key in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[key.name]):
            yield from all_keys(hints[key.name])
        else:
            yield key


def resolved_toml(sections: dict[str, Any]) -> str:
    """The filled sections as TOML in the layout of the settings file, secrets left out."""
    return tomli_w.dumps({name: _section_as_toml(section) for name, section in sections.items()})


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SettingsError(f"{file}: there is no such settings file; name another with --config") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{file}: not valid TOML: {error}") from None
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read as a settings file: {error.strerror}") from None


def _split_flags(flags: list[str], problems: list[str]) -> dict[str, str]:
    split = {}
    for flag in flags:
        key, equals, value = flag.partition("=")
        if equals:
            split[key.strip().lower()] = value
        else:
            problems.append(f"--set {flag}: must be KEY=VALUE")
    return split


def _fill(section, table, given, file, environment, flags, sources, problems, is_partial=False) -> Any:
    """One section from its TOML table and the two sources above it; what is wrong is added to `problems`."""
    is_partial = is_partial or issubclass(section, PartialSection)
    if not isinstance(given, dict):
        problems.append(f"{table}: must be a table, [{table}]")
        given = {}
    before = len(problems)
    hints = typing.get_type_hints(section)
    values = {}
    for key in dataclasses.fields(section):
        hint = hints[key.name]
        if dataclasses.is_dataclass(hint):
            inner = given.get(key.name, {})
            values[key.name] = _fill(hint, f"{table}.{key.name}", inner, file, environment, flags, sources, problems, is_partial)
            continue
        raw, source = _pick(key, given, file, environment, flags)
        if source == "--set" and key.metadata["secret"]:
            problems.append(f"{key.name}: a secret stands in no command; set {key.name.upper()}")
            continue
        sources[key.name] = source
        try:
            values[key.name] = checked(_value(raw, hint, source), key)
        except ValueError as error:
            shown = "" if key.metadata["secret"] else f" {raw!r}"
            problems.append(f"{key.name} ({source}):{shown} {error}")
    secret = {key.name: key.metadata.get("secret", False) for key in dataclasses.fields(section)}
    if not is_partial:
        problems += [f"[{table}] {name}: unknown key in {file.name}" for name in given if name not in secret]
    problems += [f"{name}: a secret stands in no file; set {name.upper()}" for name in given if secret.get(name)]
    if len(problems) > before:
        return None
    made = section(**values)
    if hasattr(section, "validate"):
        problems += made.validate()
    return made


def _pick(key, given, file, environment, flags) -> tuple[Any, str]:
    """The raw value of a key and its source; the strongest source that has one wins."""
    if key.name in flags:
        return flags.pop(key.name), "--set"
    if environment.get(key.name.upper(), "") != "":
        return environment[key.name.upper()], "environment"
    if key.name in given and not key.metadata["secret"]:
        return given[key.name], file.name
    return key.default, "default"


def _value(raw: Any, hint: Any, source: str) -> Any:
    """`raw` as the type `hint`; raises ValueError. Paths are relative to the place where `source` was written."""
    if source == "default":
        return absolute(raw, REPOSITORY) if isinstance(raw, Path) else raw
    is_text = source in ("environment", "--set")
    try:
        return converted(raw, hint, Path.cwd() if is_text else REPOSITORY, is_text=is_text)
    except FileNotFoundError:
        raise SettingsError("the current folder is gone: cd into one that is there") from None


def _flat_values(section: Any) -> Iterator[tuple[str, Any, bool]]:
    for key in dataclasses.fields(section):
        value = getattr(section, key.name)
        if dataclasses.is_dataclass(value):
            yield from _flat_values(value)
        else:
            yield key.name, value, key.metadata["secret"]


def _section_as_toml(section: Any) -> dict[str, Any]:
    table = {}
    for key in dataclasses.fields(section):
        value = getattr(section, key.name)
        if dataclasses.is_dataclass(value):
            table[key.name] = _section_as_toml(value)
        elif not key.metadata["secret"]:
            table[key.name] = as_toml(value)
    return table
