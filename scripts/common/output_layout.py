"""OUTPUT_DIR: the name of every file and folder in it, whether a LoRA is finished, and how an earlier one is archived."""

import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from common.errors import ModelError, ResourceError
from common.files import locked, nearest_existing, write_problem
from common.weights import read_header

MIN_FREE_BYTES = 4 * 2**30
"""Enough for the caches of some hundred images, two checkpoints of 1 GB, and the LoRA files."""
_LONGEST_ADDITION = ".training_config_resolved.toml-99"
"""The longest that a run adds to its name for a name of a file or folder, where `archive_previous_outputs` renames files."""


def name_problem(name: str, output_dir: Path) -> str | None:
    """Why the file system of `output_dir` cannot hold the files of a run called `name`; None if it can."""
    try:
        most = os.pathconf(nearest_existing(output_dir), "PC_NAME_MAX") - len(_LONGEST_ADDITION)
    except OSError:
        return None  # `check_disk_space` reports what is wrong with the folder
    size = len(os.fsencode(name))
    return f"'{name[:20]}...' has {size} bytes; choose a name of at most {most} bytes" if size > most else None


class OutputLayout:
    """The files and folders of the run called `name`."""

    def __init__(self, output_dir: Path, name: str):
        self.name = name
        self.lora_dir = output_dir / "lora"
        self.lora = self.lora_dir / f"{name}.safetensors"
        self.best = self.lora_dir / f"{name}-best.safetensors"
        """The saved LoRA with the lowest validation loss."""
        self.resolved_config = self.lora_dir / "training_config_resolved.toml"
        self.metrics = self.lora_dir / "metrics.jsonl"
        self.archive = self.lora_dir / "archive"
        self.state = output_dir / "state" / name
        """Checkpoints; state/checkpoint.py names the files in it."""
        self.cache = output_dir / "cache"
        """Latents and embeddings, which all runs share."""
        self.logs = output_dir / "logs"

    def lora_after(self, epoch: int) -> Path:
        """The LoRA as it was after `epoch` epochs."""
        return self.lora_dir / f"{self.name}-{epoch:06d}.safetensors"

    def is_finished(self, fingerprint: str) -> bool:
        """Whether there is a LoRA of exactly the run with this fingerprint. One that is corrupt or from another program is not."""
        if not self.lora.is_file():
            return False
        try:
            return read_header(self.lora).metadata.get("loracat_fingerprint") == fingerprint
        except (ModelError, AttributeError):  # metadata can be any JSON
            return False

    def archive_lora(self) -> None:
        """Before a finished run is extended: move its LoRA and the best one to the archive."""
        paths = [path for path in (self.best, self.lora) if path.exists()]
        if paths:
            self._move_to_archive(paths)

    def archive_previous_outputs(self) -> None:
        """Before a new run: move the files of an earlier run with the same name to the archive.

        The resolved config and the metrics have fixed names: those of a run with another name are renamed after it.
        """
        saved = re.compile(re.escape(self.name) + r"-\d{6}\.safetensors")
        present = sorted(self.lora_dir.iterdir()) if self.lora_dir.is_dir() else []
        earlier = [path for path in present if path in (self.lora, self.best) or saved.fullmatch(path.name)]
        shared = [path for path in (self.resolved_config, self.metrics) if path.exists()]
        owner = self._owner_of_shared_files()
        if earlier:
            self._move_to_archive([*earlier, *(shared if owner == self.name else ())])
        if owner != self.name:
            for path in shared:
                path.rename(_unused(path.with_name(f"{owner}.{path.name}")))

    def _owner_of_shared_files(self) -> str:
        """The run that wrote the resolved config, by its content; this run if it cannot be read."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            name = tomllib.loads(self.resolved_config.read_text(encoding="utf-8"))["train"]["saving"]["output_name"]
            return name if Path(name).name == name else self.name
        return self.name

    def _move_to_archive(self, paths: list[Path]) -> None:
        folder = _unused(self.archive / f"{self.name}-{datetime.now():%Y%m%d-%H%M%S}")
        folder.mkdir(parents=True)
        for path in paths:
            path.rename(folder / path.name)
        print(f"moved the earlier LoRA {self.name} to {folder}")


@contextmanager
def only_run_in(output_dir: Path) -> Iterator[None]:
    """Lock `output_dir` for this run.

    Raises SettingsError if another run trains into it, ResourceError if it cannot be written to or the disk is full.
    """
    check_disk_space(output_dir)
    lock = output_dir / "state" / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.open("a", encoding="utf-8").close()  # unlike touch, this keeps the modification time
    with locked(lock, f"another run is training into {output_dir}: wait for it, or set OUTPUT_DIR"):
        yield


def check_disk_space(output_dir: Path) -> str:
    """Report the free disk space. Raises ResourceError if it is too little, or `output_dir` cannot be written to."""
    if problem := write_problem(output_dir):
        raise ResourceError(f"output_dir: {problem}, or set OUTPUT_DIR")
    folder = nearest_existing(output_dir)
    free, needed = shutil.disk_usage(folder).free / 2**30, MIN_FREE_BYTES / 2**30
    if free < needed:
        raise ResourceError(f"{folder}: {free:.1f} GiB free, but caches and checkpoints need {needed:.0f} GiB; free disk space")
    return f"disk: {free:.0f} GiB free in {folder}"


def _unused(path: Path) -> Path:
    """`path`, or with the first suffix -2, -3, ... that does not exist."""
    number, unused = 1, path
    while unused.exists():
        number += 1
        unused = path.with_name(f"{path.name}-{number}")
    return unused
