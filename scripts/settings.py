"""Settings: TOML < environment < flags, as frozen typed values.

A section is a frozen dataclass whose fields are made with `setting(...)`; it is one table of
`config/training_config.toml`, and a field that is itself a section is a table inside it. Every key has one environment
variable, its name in capitals; an empty variable means "not set". Everything that is wrong is refused at once.
Relative paths in the file are relative to the repository, in variables and flags to the current directory.
"""

import argparse
import dataclasses
import os
import tomllib
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from errors import SettingsError, one_list
from setting_values import absolute, as_toml, checked, converted, without_logins

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS_FILE = REPOSITORY / "config" / "training_config.toml"
TABLES = ("project", "collect", "caption", "train")


@dataclass(frozen=True)
class Request:
    """What a script was asked to do."""

    check: bool
    """Only verify what the stage needs."""
    is_ahead: bool
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
    contradictions: Contradictions = lambda _: (),
) -> Request:
    """Parse the flags and fill `sections` (table name -> section class). `flags` are the stage's own: name -> help.
    `contradictions` says what is wrong with the filled sections together.

    Raises SettingsError with every complaint at once. `--help` and `--settings` print and end the program.
    """
    parser = argparse.ArgumentParser(prog=f"{stage}.py", description=description)
    parser.add_argument(
        "--check",
        nargs="?",
        const="now",
        choices=("now", "ahead"),
        help="verify everything the stage needs, print one list, and exit; ahead: earlier stages still bring pictures and captions",
    )
    parser.add_argument("--settings", action="store_true", help="print every setting and where it came from, and exit")
    parser.add_argument("--config", type=Path, default=SETTINGS_FILE, metavar="FILE", help="another settings file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set one key; wins over everything")
    for name, text in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.error = _refuse_flags
    given = parser.parse_args(argv)
    request = resolve(given.config, os.environ, given.set, sections, contradictions, check=given.check)
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
    contradictions: Contradictions = lambda _: (),
    *,
    check: str | None = None,
) -> Request:
    """Fill `sections` from the TOML `file`, then `environment`, then `flags` (`KEY=VALUE`).

    Raises SettingsError with every complaint at once: unknown keys, wrong types, values out of range, contradictions.
    """
    complaints: list[str] = []
    tables = _read_toml(file)
    complaints += [f"[{name}]: unknown table in {file.name}; known: {', '.join(TABLES)}" for name in tables if name not in TABLES]
    from_flags = _split_flags(flags, complaints)
    sources: dict[str, str] = {}
    filled = {
        name: _fill(section, name, tables.get(name, {}), file, environment, from_flags, sources, complaints)
        for name, section in sections.items()
    }
    complaints += [f"--set {key}: unknown key" for key in from_flags]
    if None not in filled.values():
        complaints += contradictions(filled)
    if complaints:
        raise SettingsError(one_list("these settings cannot be used:", complaints))
    return Request(check=check is not None, is_ahead=check == "ahead", sections=filled, sources=sources)


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


def _split_flags(flags: list[str], complaints: list[str]) -> dict[str, str]:
    split = {}
    for flag in flags:
        key, equals, value = flag.partition("=")
        if equals:
            split[key.strip().lower()] = value
        else:
            complaints.append(f"--set {flag}: must be KEY=VALUE")
    return split


def _fill(section, table, given, file, environment, flags, sources, complaints) -> Any:
    """One section from its TOML table and the two sources above it; what is wrong is added to `complaints`."""
    if not isinstance(given, dict):
        complaints.append(f"{table}: must be a table, [{table}]")
        given = {}
    before = len(complaints)
    hints = typing.get_type_hints(section)
    values = {}
    for key in dataclasses.fields(section):
        hint = hints[key.name]
        if dataclasses.is_dataclass(hint):
            inner = given.get(key.name, {})
            values[key.name] = _fill(hint, f"{table}.{key.name}", inner, file, environment, flags, sources, complaints)
            continue
        raw, source = _pick(key, given, file, environment, flags)
        if source == "--set" and key.metadata["secret"]:
            complaints.append(f"{key.name}: a secret stands in no command; set {key.name.upper()}")
            continue
        sources[key.name] = source
        try:
            values[key.name] = checked(_value(raw, hint, source), key)
        except ValueError as error:
            shown = "" if key.metadata["secret"] else f" {raw!r}"
            complaints.append(f"{key.name} ({source}):{shown} {error}")
    secret = {key.name: key.metadata.get("secret", False) for key in dataclasses.fields(section)}
    complaints += [f"[{table}] {name}: unknown key in {file.name}" for name in given if name not in secret]
    complaints += [f"{name}: a secret stands in no file; set {name.upper()}" for name in given if secret.get(name)]
    if len(complaints) > before:
        return None
    made = section(**values)
    if hasattr(section, "contradictions"):
        complaints += made.contradictions()
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
