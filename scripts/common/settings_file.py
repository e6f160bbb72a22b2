"""The settings file and the presets: TOML files with a table for each stage, and in it values by the names of the settings.

A setting stands in the table of its stage (`[train]`) or in any table inside it (`[train.more]`, `[train.lora]`): each has a
name of its own, so that nothing depends on which.
"""

import tomllib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import SettingsError
from common.files import read_file

TABLES = ("project", "collect", "caption", "train")
MORE = "more"
"""The table of a stage's rarely needed settings, inside the stage's table."""
_MAX_BYTES = 1 << 20
"""What is longer is not a settings file."""


@dataclass(frozen=True)
class SettingsFile:
    """What a settings file or a preset contains."""

    name: str
    """What messages and the records of a run call it."""
    content: dict[str, Any]

    def problems(self) -> Iterator[str]:
        """A line for each table that belongs to no stage."""
        for name in self.content:
            if name not in TABLES:
                yield f"[{name}]: unknown table in {self.name}; known: {', '.join(TABLES)}"

    def values_of(
        self, stage: str, settings: Collection[str], inner: Collection[str], unknown: Callable[[str], str] | None
    ) -> tuple[dict[str, Any], list[str]]:
        """The values of a stage's `settings`, and what is wrong with the tables that they are in.

        `inner` are the names of the tables inside the stage's own, besides MORE. `unknown` says what is wrong with another key;
        None: other keys are ignored.
        """
        table = self.content.get(stage, {})
        if not isinstance(table, dict):
            return {}, [f"{stage}: must be a table, [{stage}]"]
        values, places, problems = {}, {}, []
        for place, key, value in _entries(stage, table):
            if place == stage and isinstance(value, dict):
                if unknown and key not in (MORE, *inner):
                    problems.append(f"[{stage}.{key}]: unknown table in {self.name}; known: {', '.join([MORE, *inner])}")
            elif key in settings:
                values[key] = value
                places.setdefault(key, []).append(f"[{place}]")
            elif place == stage and key in inner:
                problems.append(f"{stage}.{key}: must be a table, [{stage}.{key}]")
            elif unknown:
                problems.append(f"[{place}] {key}: {unknown(key)} in {self.name}")
        repeated = [(key, found) for key, found in places.items() if len(found) > 1]
        problems += [f"{key}: is in {' and in '.join(found)} of {self.name}; keep one of them" for key, found in repeated]
        return values, problems


def _entries(stage: str, table: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Table, key and value of everything in a stage's table and the tables inside it."""
    for key, value in table.items():
        yield stage, key, value
        if isinstance(value, dict):
            yield from ((f"{stage}.{key}", name, each) for name, each in value.items())


def read_settings_file(file: Path) -> SettingsFile:
    """Raises SettingsError if there is no such file, or if it is not TOML."""
    try:
        return SettingsFile(file.name, tomllib.loads(read_file(file, _MAX_BYTES).decode("utf-8-sig")))
    except FileNotFoundError:
        raise SettingsError(f"{file}: settings file not found; choose another one with --config") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{file}: not valid TOML: {error}") from None
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read as a settings file: {error.strerror}") from None


def read_preset(folder: Path, name: str) -> SettingsFile:
    """The preset of that name in `folder`. Raises SettingsError with the names that exist if there is none."""
    names = sorted(path.stem for path in folder.glob("*.toml"))
    if name not in names:
        raise SettingsError(f"preset: there is none called {name!r}; choose one of {', '.join(names)}, or leave it empty")
    return SettingsFile(f"preset {name}", read_settings_file(folder / f"{name}.toml").content)
