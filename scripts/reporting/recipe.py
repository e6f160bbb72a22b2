"""The recipe of a run: every setting and where it was set, the command that repeats it, and what each of its processes did.

Nothing of it names a login or a folder outside the project: the page may be passed on.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from common.masking import mask_address, mask_secrets
from reporting.records import as_number

_ORIGIN = re.compile(r"^([A-Za-z0-9_]+) = .*  # set by ([^\"']+)$")
"""A line of the resolved settings whose value is not the default."""
_PATH = re.compile(r"[/~\\]|\.\.[/\\]|[A-Za-z]:[\\/]|file:")
"""How a path begins that may lead out of the project."""
_IMAGES_PER_STEP = ".train_batch_size", ".gradient_accumulation_steps", ".num_processes"
"""The settings whose product this is. The run may have changed one of them for another that was set."""


@dataclass(frozen=True)
class Setting:
    """A setting as the run used it."""

    key: str
    value: str
    origin: str
    """Where it was set; "" for a default."""

    @property
    def assignment(self) -> str:
        """The environment variable that sets it, for a shell."""
        return f"{self.key.rpartition('.')[2].upper()}={shlex.quote(self.value)}"


def read_settings(text: str) -> tuple[Setting, ...]:
    """Every setting in the resolved settings, in the order of the file. Raises ValueError if `text` is not TOML."""
    tables = tomllib.loads(text)
    origins, table = {}, ""
    for line in text.splitlines():
        if line.startswith("["):
            table = line.strip("[]") + "."
        elif match := _ORIGIN.match(line):
            origins[table + match[1]] = match[2]
    return tuple(Setting(key, shown(value), origins.get(key, "")) for key, value in _flat(tables))


def repeat_command(settings: Sequence[Setting]) -> str:
    """The command that trains with these settings again: those that are not the defaults, as environment variables.

    Of those that say how many images a step has, all or none: a run that splits a batch accumulates more of them.
    """
    of_step = [setting for setting in settings if setting.key.endswith(_IMAGES_PER_STEP)]
    is_step_set = any(setting.origin or (setting.key.endswith("_steps") and setting.value != "1") for setting in of_step)
    chosen = [setting.assignment for setting in settings if setting.origin or (is_step_set and setting in of_step)]
    return " ".join([*chosen, "docker compose run --rm loracat --train"])


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    entries = []
    for key, value in table.items():
        entries += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return entries


def shown(value: Any) -> str:
    """A value as the page shows it and as a variable has it. Of a path only the last part."""
    if isinstance(value, list):
        return ",".join(map(shown, value))
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    value = mask_address(value) if "@" in value or "://" in value else mask_secrets(value)
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if _PATH.match(value) else value


@dataclass(frozen=True)
class Fact:
    """Something that the training stage recorded."""

    name: str
    value: str


def facts_of(history: Sequence[dict[str, Any]]) -> tuple[Fact, ...]:
    """What the lines of a run's history say: on what it ran, how long, and how much memory it took."""
    starts = [line for line in history if line.get("event") == "start"]
    ends = [line for line in history if line.get("event") == "end"]
    if not starts:
        return ()
    last = starts[-1]
    facts = [Fact(name, ", ".join(shown(each) for each in _entries(last.get(key)))) for name, key in _STARTS.items()]
    facts.append(Fact("Started", _date(starts[0].get("time"))))
    facts.append(Fact("Ended", _date(ends[-1].get("time")) if history[-1] in ends else "not yet, or it was killed"))
    seconds = sum(as_number(line.get("seconds")) or 0.0 for line in ends)
    if seconds:
        facts.append(Fact("Time", f"{timedelta(seconds=round(seconds))} in {_count(len(starts), 'process', 'processes')}"))
    for name, key in _PEAKS.items():
        peak = max((as_number(line.get(key)) or 0.0 for line in ends), default=0.0)
        facts.append(Fact(name, f"{peak / 2**30:.1f} GiB" if peak else ""))
    return tuple(fact for fact in facts if fact.value)


_STARTS = {
    "Device": "device",
    "Versions": "versions",
    "Base model": "base",
    "Hash of the base model": "base_hash",
    "Hash of images and captions": "dataset_hash",
    "Hash of the run": "fingerprint",
}
"""Name of a fact -> its key in a line of the history."""
_PEAKS = {"Peak GPU memory": "peak_gpu_bytes", "Peak main memory": "peak_bytes"}


def _entries(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{name} {each}" for name, each in value.items()]
    return [str(value)] if value else []


def _date(value: Any) -> str:
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    except ValueError:
        return ""


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
