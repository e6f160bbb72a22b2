"""Command line and settings: default < preset < TOML file < environment < `--set`, as frozen typed values, with all problems
reported at once.

A section is a frozen dataclass whose fields are made with `setting(...)`: the settings of a stage, which has one table in
`config/training_config.toml`, or a group of them. A stage declares the tables that it reads as a dataclass with a section for
each; what their methods `validate` yield is a problem. A value in the file that is equal to the default counts as not set.
Every key has one environment variable, its name in capitals; an empty variable means "not set". Relative paths in files are
relative to the repository, those in variables and flags to the current directory.
"""

import argparse
import dataclasses
import difflib
import os
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import tomli_w

from common.errors import SettingsError, bullet_list
from common.masking import learn_secrets, mask_address, mask_secrets
from common.setting_values import convert, within_limits
from common.settings_file import SettingsFile, read_preset, read_settings_file
from common.variables import find_address_problems, find_unknown_variables, known_variables

VERSION = "2.0.0"
REPOSITORY = Path(__file__).resolve().parent.parent.parent
IN_CONTAINER = bool(os.environ.get("LORACAT_IN_CONTAINER"))
"""The Dockerfile sets it: commands in messages are typed on the host."""
SETTINGS_FILE = REPOSITORY / "config" / "training_config.toml"
ENV_FILE = REPOSITORY / ".env"
"""Variables for Docker Compose, which passes on only those whose names it knows."""
PRESETS = REPOSITORY / "config" / "presets"
PRESET = "preset"
"""The setting that names one of them."""
MISSING = dataclasses.MISSING


Tables = TypeVar("Tables")


def pipeline_command(*flags: str, **variables: object) -> str:
    """The command with which a user runs stages, for a message."""
    command = ["docker", "compose", "run", "--rm", "loracat"] if IN_CONTAINER else ["scripts/run.sh"]
    return " ".join([*(f"{name}={value}" for name, value in variables.items()), *command, *flags])


def address_problem(*names: str) -> str:
    """What is wrong with the addresses in variables that libraries read themselves; "" if nothing is."""
    return "; ".join(find_address_problems(os.environ, names))


def setting(
    default: Any,
    *,
    role: Literal["result", "runtime", "saving"] | None = None,
    before: Any = MISSING,
    recorded_as: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    secret: bool = False,
    address: bool = False,
) -> Any:
    """A field of a section: its default and the range of a number. A secret exists as an environment variable only; the login in
    an address is never shown.

    `role` says what a setting of training changes: the `result` (two runs that differ in it are different runs), the
    `runtime` (speed and memory) or the `saving` (what is written and when). `before` is the value that versions without
    this setting used: a checkpoint or LoRA that does not record the setting is read as if it had recorded that value.
    `recorded_as` is the name in these records of a setting that was renamed.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most}
    metadata = {"limits": {name: limit for name, limit in limits.items() if limit is not None}}
    metadata |= {"secret": secret, "address": address, "role": role, "before": before, "recorded_as": recorded_as}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


class PartialSection:
    """Base of a section with only some of its table's keys; the others belong to another stage and are not unknown keys."""


@dataclass(frozen=True)
class Request(Generic[Tables]):
    """What the command line, the environment and the settings file ask for."""

    check: bool
    """Check the requirements of the stage and exit."""
    inputs_pending: bool
    """Earlier stages still have to run: a check accepts that their outputs are missing."""
    settings: Tables
    """The filled sections."""
    sources: dict[str, str]
    """Where the value of each key comes from: `default`, the preset's or the file's name, `environment` or `--set`."""
    overrides: frozenset[str] = frozenset()
    """The keys that the environment or a flag sets, or that a file sets to another value than the default."""
    unknown_variables: tuple[str, ...] = ()
    """One line for each variable whose name is probably a misspelt one of LoRACat."""
    flags: frozenset[str] = frozenset()
    """Those of the stage's own flags that are given."""

    def described(self, names: Collection[str] | None = None) -> list[str]:
        """One `key = value  (source)` for each key, or for each of `names`. Secrets are masked."""
        lines = []
        for key, value in _flat_values(self.settings):
            if names is None or key.name in names:
                if key.metadata["secret"]:
                    value = "set" if value else "not set"
                shown = mask_address(value) if key.metadata["address"] else as_toml(value)
                lines.append(f"{key.name} = {mask_secrets(repr(shown))}  ({self.sources[key.name]})")
        return lines

    def overridden(self) -> str:
        """The settings that are not the defaults, one a line, and variables that are probably misspelt."""
        lines = ["overridden settings:", *(f"  {line}" for line in self.described(self.overrides))]
        return "\n".join([*(lines if self.overrides else ["overridden settings: none"]), *self.unknown_variables])


def read_request(
    stage: str,
    description: str,
    argv: list[str],
    tables: type[Tables],
    flags: Mapping[str, str] | None = None,
) -> Request[Tables]:
    """Parse the command line and fill the sections of `tables`. `flags` are the stage's own: name -> help.

    Raises SettingsError with every problem at once. `--help`, `--version` and `--settings` print and exit.
    """
    parser = argparse.ArgumentParser(prog=f"{stage}.py", description=description)
    parser.add_argument(
        "--check",
        nargs="?",
        const="now",
        choices=("now", "ahead"),
        help="check the requirements of this stage and exit; with =ahead, images and captions may still be missing",
    )
    parser.add_argument("--settings", action="store_true", help="print all settings and where each comes from, and exit")
    parser.add_argument(
        "--config", type=Path, default=SETTINGS_FILE, metavar="FILE", help="settings file (default: config/training_config.toml)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting; can be given several times"
    )
    parser.add_argument("--version", action="version", version=f"LoRACat {VERSION}", help="print the version and exit")
    for name, text in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)

    def refuse(message: str) -> None:
        raise SettingsError(f"{mask_secrets(message)}; see --help")

    parser.error = refuse
    for argument in argv:
        learn_secrets({"URL": argument})
    arguments = parser.parse_args(argv)
    request = resolve(arguments.config, os.environ, arguments.set, tables, check=arguments.check)
    if arguments.settings:
        print("\n".join(request.described()))
        raise SystemExit(0)
    if request.check:
        print(f"{stage} of LoRACat {VERSION}\n{request.overridden()}", flush=True)
    return dataclasses.replace(request, flags=frozenset(name for name in flags or {} if vars(arguments)[name]))


def resolve(
    file: Path, environment: Mapping[str, str], overrides: list[str], tables: type[Tables], *, check: str | None = None
) -> Request[Tables]:
    """Fill the sections of `tables` from the preset, then the TOML `file`, then `environment`, then `overrides` (`KEY=VALUE`).

    Raises SettingsError with every problem at once: unknown keys, wrong types, values out of range, and contradictions.
    """
    keys = list(all_keys(tables))
    learn_secrets(environment, tuple(key.name.upper() for key in keys if key.metadata["secret"]))
    sections = typing.get_type_hints(tables)
    stages = {key.name: stage for stage, section in sections.items() for key in all_keys(section)}
    resolver = _Resolver(read_settings_file(file), environment, overrides, stages)
    filled = {stage: resolver.fill(section, stage) for stage, section in sections.items()}
    problems = [*resolver.problems, *(f"--set {mask_secrets(key)}: {resolver.unknown(key)}" for key in resolver.overrides)]
    settings = None if None in filled.values() else tables(**filled)
    if settings and hasattr(settings, "validate"):
        problems += settings.validate()
    known = known_variables(SETTINGS_FILE, (key.name for key in keys))
    unknown = find_unknown_variables(known, environment, ENV_FILE)
    if problems:
        raise SettingsError(bullet_list("invalid settings:", [*problems, *unknown]))
    return Request(
        check=check is not None,
        inputs_pending=check == "ahead",
        settings=settings,
        sources=resolver.sources,
        overrides=frozenset(resolver.overridden),
        unknown_variables=tuple(unknown),
    )


def resolved_toml(sections: dict[str, Any], origins: Mapping[str, str] | None = None) -> str:
    """The filled sections as TOML that gives the same values again: a table for each stage, and in it one for each group of
    settings. Secrets are left out, and the preset, whose values are among the others.

    `origins`: key -> where its value comes from, which becomes a comment after the value.
    """

    def as_table(section: Any) -> dict[str, Any]:
        table = {}
        for key in dataclasses.fields(section):
            value = getattr(section, key.name)
            if dataclasses.is_dataclass(value):
                table[key.name] = as_table(value)
            elif not key.metadata["secret"] and key.name != PRESET:
                shown = mask_address(value) if key.metadata["address"] else as_toml(value)
                table[key.name] = mask_secrets(shown) if isinstance(shown, str) else shown
        return table

    lines = tomli_w.dumps({name: as_table(section) for name, section in sections.items()}).splitlines()
    for number, line in enumerate(lines):
        origin = (origins or {}).get(line.partition(" = ")[0])
        if origin:
            lines[number] = f"{line}  # set by {origin}"
    return "\n".join(lines) + "\n"


def all_keys(section: type) -> Iterator[dataclasses.Field]:
    """Every key of a section, including those of the tables inside it."""
    hints = typing.get_type_hints(section)
    for key in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[key.name]):
            yield from all_keys(hints[key.name])
        else:
            yield key


def places_of_path(path: str | Path) -> tuple[Path, Path]:
    """Where a setting that can also be a name is looked for as a path: from the current folder, then from the repository."""
    own = Path(os.path.expanduser(path))
    return own, REPOSITORY / own


def as_toml(value: Any) -> Any:
    """A value as it is written in the settings file."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return [as_toml(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _flat_values(*sections: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Every key and its value."""
    for section in sections:
        for key in dataclasses.fields(section):
            value = getattr(section, key.name)
            if dataclasses.is_dataclass(value):
                yield from _flat_values(value)
            else:
                yield key, value


class _Resolver:
    """The sources of values, and what was found wrong with them."""

    def __init__(self, file: SettingsFile, environment: Mapping[str, str], overrides: list[str], stages: Mapping[str, str]):
        self._environment, self._stages = environment, stages
        self.sources: dict[str, str] = {}
        """Key -> the source that its value comes from."""
        self.overridden: set[str] = set()
        """Keys with another value than the default, or with a value from the environment or a flag."""
        self.problems = [f"--set {mask_address(each)}: must be KEY=VALUE" for each in overrides if "=" not in each]
        pairs = (each.partition("=") for each in overrides if "=" in each)
        self.overrides = {key.strip().lower(): value for key, _, value in pairs}
        """Those that no section has used yet."""
        self._files = [file, *self._preset(file)]
        """The stronger one first."""
        self.problems += [problem for each in self._files for problem in each.problems()]

    def _preset(self, file: SettingsFile) -> list[SettingsFile]:
        """The preset that the strongest source names, if any does."""
        in_file, _ = file.values_of("project", (PRESET,), (), None)
        name = self.overrides.get(PRESET, self._environment.get(PRESET.upper()) or in_file.get(PRESET))
        if not isinstance(name, str) or not name:
            return []
        try:
            return [read_preset(PRESETS, name)]
        except SettingsError as error:
            self.problems.append(str(error))
            return []

    def fill(self, section: type, stage: str) -> Any:
        """An instance of the section `stage` from its tables in the files and the stronger sources; None if there are problems."""
        names = {key.name for key in all_keys(section)}
        inner = [name for name, hint in typing.get_type_hints(section).items() if dataclasses.is_dataclass(hint)]
        unknown = None if issubclass(section, PartialSection) else self.unknown
        before, given = len(self.problems), []
        for file in self._files:
            values, problems = file.values_of(stage, names, inner, unknown)
            given.append((file.name, values))
            self.problems += problems
        filled = self._filled(section, given)
        return filled if len(self.problems) == before else None

    def _filled(self, section: type, given: list[tuple[str, dict[str, Any]]]) -> Any:
        """The same from the values that each file has for the stage."""
        before = len(self.problems)
        hints, values = typing.get_type_hints(section), {}
        for key in dataclasses.fields(section):
            hint = hints[key.name]
            values[key.name] = self._filled(hint, given) if dataclasses.is_dataclass(hint) else self._value(key, hint, given)
        if len(self.problems) > before:
            return None
        filled = section(**values)
        if hasattr(section, "validate"):
            self.problems += filled.validate()
        return filled

    def unknown(self, name: str) -> str:
        """What is wrong with a key that does not exist."""
        if name in self._stages:
            return f"unknown key here (it belongs in [{self._stages[name]}])"
        similar = difflib.get_close_matches(name.lower(), self._stages, n=1)
        return f"unknown key (did you mean {similar[0]}?)" if similar else "unknown key"

    def _value(self, key: dataclasses.Field, hint: Any, given: list[tuple[str, dict[str, Any]]]) -> Any:
        """The value of one key from the strongest source that has it."""
        name, variable, is_secret = key.name, key.name.upper(), key.metadata["secret"]
        if is_secret and (name in self.overrides or any(name in values for _, values in given)):
            self.overrides.pop(name, None)
            self.problems.append(f"{name}: a secret is read from the environment only; set {variable}")
            return None
        default = REPOSITORY / key.default if isinstance(key.default, Path) else key.default
        found = [("--set", self.overrides.pop(name), True)] if name in self.overrides else []
        if self._environment.get(variable, "") != "":
            found.append(("environment", self._environment[variable], True))
        found += [(source, values[name], False) for source, values in given if name in values]
        for source, raw, is_text in found:
            try:
                value = within_limits(convert(raw, hint, Path.cwd() if is_text else REPOSITORY, is_text=is_text), key)
            except FileNotFoundError:
                raise SettingsError("the current directory no longer exists: change to another one") from None
            except ValueError as error:
                if raw == "":  # not set, where a setting cannot be empty
                    continue
                shown = mask_address(raw) if key.metadata["address"] and isinstance(raw, str) else raw
                self.problems.append(f"{name} ({source}):{'' if is_secret else f' {mask_secrets(repr(shown))}'} {error}")
                return None
            if is_text or value != default:
                self.sources[name] = source
                self.overridden.add(name)
                if key.metadata["address"]:
                    learn_secrets({"URL": value})
                return value
        self.sources[name] = "default"
        return default
