"""The files of a run in OUTPUT_DIR: what they are called, whether a LoRA is finished, and how an older one is kept."""

import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from common.errors import ResourceError
from common.files import locked, read_safetensors_metadata

LEAST_FREE_BYTES = 4 * 2**30
"""Caches of some hundred images, two saved states of 1 GB, and the LoRA files."""


def require_room(output_dir: Path) -> str:
    """Say how much disk is free for results; raises ResourceError if that is too little or nothing can be written."""
    place = next(parent for parent in (output_dir, *output_dir.parents) if parent.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise ResourceError(f"{place}: nothing can be written there; make it writable for this user")
    free = shutil.disk_usage(place).free
    if free < LEAST_FREE_BYTES:
        raise ResourceError(
            f"{place}: only {free / 2**30:.1f} GiB are free; caches and saved states want {LEAST_FREE_BYTES / 2**30:.0f}"
        )
    return f"{free / 2**30:.0f} GiB are free in {place}"


@contextmanager
def only_run_in(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of `output_dir`; the system lets go of it however the process ends. Raises SettingsError if
    another run is there, ResourceError if nothing can be written."""
    require_room(output_dir)
    folder = output_dir / "state"
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    lock.open("a", encoding="utf-8").close()  # unlike touch it leaves the time of a file that is there
    with locked(lock, f"another run is training into {output_dir}: wait for it, or set OUTPUT_DIR"):
        yield


@dataclass(frozen=True)
class Results:
    """Where the files of the run called `name` lie."""

    output_dir: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.output_dir / "lora"

    @property
    def lora(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def best(self) -> Path:
        """The saved LoRA with the lowest held-out loss."""
        return self.folder / f"{self.name}-best.safetensors"

    @property
    def resolved(self) -> Path:
        return self.folder / "training_config_resolved.toml"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def state(self) -> Path:
        return self.output_dir / "state" / self.name

    @property
    def logs(self) -> Path:
        return self.output_dir / "logs"

    def lora_after(self, epoch: int) -> Path:
        """The LoRA as it was after `epoch` epochs."""
        return self.folder / f"{self.name}-{epoch:06d}.safetensors"

    def is_finished(self, fingerprint: str) -> bool:
        """Whether the LoRA of exactly this run is there."""
        return self.lora.is_file() and read_fingerprint(self.lora) == fingerprint

    def archive_lora(self) -> None:
        """Before a finished run is lengthened: the LoRA it ended with, and its best one, go to `archive/`."""
        ends = [path for path in (self.best, self.lora) if path.exists()]
        if ends:
            self._to_archive(ends)

    def archive_previous_outputs(self) -> None:
        """Before a new run: files of an earlier run of the same name go to `archive/`, and the two files that have no name
        of their own are named after the LoRA they belong to."""
        epochs = re.compile(re.escape(self.name) + r"-\d{6}\.safetensors")
        earlier = [path for path in self._present() if path in (self.lora, self.best) or epochs.fullmatch(path.name)]
        owner = self._owner_of_shared_files()
        shared = [path for path in (self.resolved, self.metrics) if path.exists()]
        if earlier:
            self._to_archive([*earlier, *(shared if owner == self.name else ())])
        if owner != self.name:
            for path in shared:
                path.rename(self._free_name(path.with_name(f"{owner}.{path.name}")))

    def _to_archive(self, paths: list[Path]) -> None:
        archive = self._free_name(self.folder / "archive" / f"{self.name}-{datetime.now():%Y%m%d-%H%M%S}")
        archive.mkdir(parents=True)
        for path in paths:
            path.rename(archive / path.name)
        print(f"the earlier LoRA of this name was moved to {archive}")

    def _present(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []

    def _owner_of_shared_files(self) -> str:
        """The name in them; this run's if they are damaged."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            name = tomllib.loads(self.resolved.read_text(encoding="utf-8"))["train"]["saving"]["output_name"]
            return name if Path(name).name == name else self.name
        return self.name

    @staticmethod
    def _free_name(path: Path) -> Path:
        number, free = 1, path
        while free.exists():
            number += 1
            free = path.with_name(f"{path.name}-{number}")
        return free


def read_fingerprint(lora: Path) -> str | None:
    """The fingerprint of the run that wrote the LoRA file `lora`; None if another program wrote it, or it is damaged."""
    try:
        return read_safetensors_metadata(lora).get("loracat_fingerprint")
    except ValueError:
        return None
