"""OUTPUT_DIR: the name of every file and folder in it, whether a LoRA is finished, and how an earlier one is archived."""

import functools
import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from common.errors import ModelError, ResourceError
from common.files import atomic_write, locked, nearest_existing, read_file, remove_partial_files, write_problem
from common.weights import data_sha256, read_header

MIN_FREE_BYTES = 4 * 2**30
"""Enough for the caches of some hundred images, two checkpoints of 1 GB, and the LoRA files."""
_LONGEST_ADDITION = ".training_config_resolved.toml-99"
"""The longest that a run adds to its name for a name of a file or folder: `begin` and 1.0 give files such names."""


def name_problem(name: str, output_dir: Path) -> str | None:
    """Why the file system of `output_dir` cannot hold the files of a run called `name`; None if it can."""
    try:
        most = os.pathconf(nearest_existing(output_dir), "PC_NAME_MAX") - len(_LONGEST_ADDITION)
    except OSError:
        return None  # `check_disk_space` reports what is wrong with the folder
    size = len(os.fsencode(name))
    return f"'{name[:20]}...' has {size} bytes; choose a name of at most {most} bytes" if size > most else None


class OutputLayout:
    """The files and folders of the run called `name`.

    `metrics` and `resolved_config` belong to the run that trained last, whose name the resolved config holds. Those of a run with
    another name are `NAME.metrics.jsonl` and `NAME.training_config_resolved.toml`; when it is resumed, they are renamed back.
    """

    def __init__(self, output_dir: Path, name: str):
        self._output_dir = output_dir
        self.name = name
        self.lora_dir = output_dir / "lora"
        self.lora = self.lora_dir / f"{name}.safetensors"
        self.best = self.lora_dir / f"{name}-best.safetensors"
        """The saved LoRA with the lowest validation loss."""
        self.recommended = self.lora_dir / f"{name}-recommended.safetensors"
        """A copy of the saved LoRA to use."""
        self.workflow = self.lora_dir / f"{name}.workflow.json"
        """A workflow for ComfyUI with that LoRA."""
        self.resolved_config = self.lora_dir / "training_config_resolved.toml"
        self.metrics = self.lora_dir / "metrics.jsonl"
        self.archive = self.lora_dir / "archive"
        self.state = output_dir / "state" / name
        """Checkpoints; training/callbacks/checkpoint.py names the files in it."""
        self.history = self.state / "history.jsonl"
        """When, on what and for how long each process worked on the run."""
        self.sample_losses = self.state / "sample_losses.jsonl"
        """The loss of every sample, by optimizer step."""
        self.image_losses = self.state / "image_losses.json"
        """How the losses of the images compare."""
        self.cache = output_dir / "cache"
        """Latents and embeddings, which all runs share."""
        self.logs = output_dir / "logs"
        """TensorBoard's files, in a folder for each run."""
        self.samples = output_dir / "samples" / name
        """Sample images of the saved LoRAs."""
        self.samples_record = self.samples / "samples.json"
        """What they show."""
        self.sample_latents = self.samples / ".latents"
        """Latents of the images without the trigger word, which are compared with the base model's."""
        self.sample_faces = self.cache / "faces.jsonl"
        """The faces that were found in sample images."""
        self.thumbnails = self.cache / "thumbnails"
        """Small copies of sample images, for the page."""
        self.report = output_dir / "report.html"
        """The page of the whole project."""

    def lora_after(self, epoch: int) -> Path:
        """The LoRA as it was after `epoch` epochs."""
        return self.lora_dir / f"{self.name}-{epoch:06d}.safetensors"

    def saved_loras(self) -> list[Path]:
        """The files of `lora_after` that exist, the earliest first."""
        saved = re.compile(re.escape(self.name) + r"-\d{6}\.safetensors")
        present = sorted(self.lora_dir.iterdir()) if self.lora_dir.is_dir() else []
        return [path for path in present if saved.fullmatch(path.name)]

    def is_finished(self, fingerprint: str) -> bool:
        """Whether there is a LoRA of exactly the run with this fingerprint. One that is corrupt or from another program is not."""
        if not self.lora.is_file():
            return False
        try:
            metadata = read_header(self.lora).metadata
            return metadata.get("loracat_fingerprint") == fingerprint and self._is_intact(metadata.get("sshs_model_hash"))
        except (ModelError, AttributeError):  # metadata can be any JSON
            return False

    def _is_intact(self, expected: str | None) -> bool:
        """Whether the LoRA's tensors have the hash that its header holds, if it holds one."""
        stat = self.lora.stat()
        is_intact = expected in (None, _hash_of_tensors(self.lora, stat.st_size, stat.st_mtime_ns))
        if not is_intact:
            print(f"{self.lora} is damaged: its tensors do not match the hash in its header; it is written again", flush=True)
        return is_intact

    def begin(self, *, resumes: bool) -> None:
        """Before training: archive what this run does not continue, and make the shared file names those of this run.

        A run that resumes keeps its files; if it is a finished one that is extended, its LoRA, the best and the recommended one,
        and the workflow with that move to the archive, with copies of its settings and metrics. A new run moves everything of an
        earlier one with the same name to the archive: LoRA files, checkpoints, settings, metrics, logs and sample images.
        """
        self._rename_files_of_another_run()
        for path in (self.lora, self.best, self.recommended):  # `one-best` may be a run of its own
            if path.exists() and (owner := self._owner_of_lora(path)) != self.name:
                OutputLayout(self._output_dir, owner)._move_to_archive([path])
        own = {shared: shared.with_name(f"{self.name}.{shared.name}") for shared in (self.resolved_config, self.metrics)}
        if resumes:
            for shared, under_own_name in own.items():
                if under_own_name.exists() and not shared.exists():
                    under_own_name.rename(shared)
            results = (self.best, self.recommended, self.workflow, self.lora) if self.lora.exists() else ()
            finished = [path for path in (*results, *own.values()) if path.exists()]
            if finished:
                self._move_to_archive(finished, copied=[path for path in own if path.exists()])
            return
        present = sorted(self.lora_dir.iterdir()) if self.lora_dir.is_dir() else []
        loras = [path for path in (self.lora, self.best, self.recommended, *self.saved_loras()) if path.exists()]
        loras = [path for path in loras if self._owner_of_lora(path) == self.name]
        described = re.compile(
            "|".join(f"{re.escape(path.name)}(-\\d+)?" for path in own.values())
        )  # 1.0 wrote NAME.metrics.jsonl-2
        others = [path for path in present if path in (*own, self.workflow) or described.fullmatch(path.name)]
        if loras or self.state.exists():  # otherwise it ended before its first checkpoint, and its files are overwritten
            folders = [path for path in (self.state, self.logs / self.name, self.samples) if path.exists()]
            self._move_to_archive([*others, *loras, *folders])

    def remove_leftovers(self) -> None:
        """Remove the temporary files that killed runs left anywhere in the output folder. No other run may be training there."""
        parents = (self._output_dir, self.lora_dir, self.state.parent, self.samples.parent, self.samples, self.cache)
        for parent in parents:
            for folder in (parent, *parent.glob("*/")):
                remove_partial_files(folder, min_age_s=0)

    def _rename_files_of_another_run(self) -> None:
        """Give the shared files, if they are those of a run with another name, that name."""
        owner = self._owner_of_shared_files()
        if owner == self.name:
            return
        for path in (self.metrics, self.resolved_config):  # the one that names the owner last
            named = path.with_name(f"{owner}.{path.name}")
            if path.exists():
                if named.exists():  # of a LoRA that 1.0 archived without it
                    OutputLayout(self._output_dir, owner)._move_to_archive([named])
                path.rename(named)

    def _owner_of_shared_files(self) -> str:
        """The run that wrote the resolved config, by its content; this run if it cannot be read."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            name = tomllib.loads(read_file(self.resolved_config).decode())["train"]["saving"]["output_name"]
            return name if Path(name).name == name else self.name
        return self.name

    def _owner_of_lora(self, path: Path) -> str:
        """The run that wrote the LoRA `path`, by its header; this run if that does not say."""
        with suppress(ModelError, AttributeError, TypeError):
            metadata = read_header(path).metadata
            name = metadata.get("ss_output_name") if "loracat_fingerprint" in metadata else None
            return name if name and Path(name).name == name else self.name
        return self.name

    def _move_to_archive(self, paths: list[Path], copied: Sequence[Path] = ()) -> None:
        """Move files and folders into a new folder of the archive. A folder is called there by its purpose, such as `state`."""
        first = folder = self.archive / f"{self.name}-{datetime.now():%Y%m%d-%H%M%S}"
        number = 1
        while folder.exists():
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
        folder.mkdir(parents=True)
        for path in copied:
            with atomic_write(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
        for path in paths:
            path.rename(folder / (path.parent.name if path.is_dir() else path.name))
        what = "LoRA" if any(path.suffix == ".safetensors" for path in paths) else "run"
        print(f"moved the earlier {what} {self.name} to {folder}")


@functools.cache
def _hash_of_tensors(path: Path, _size: int, _mtime_ns: int) -> str:
    """The file's data_sha256, computed once as long as size and time of change are the same."""
    return data_sha256(path)


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
