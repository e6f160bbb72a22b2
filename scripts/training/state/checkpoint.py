"""Everything needed to continue exactly: LoRA weights, optimizer moments, position in the run. safetensors and JSON only.

A state is two files: the tensors, and then the record that points to them and holds the checksums of both. The newest
state whose record and tensors fit each other counts, by the number of its step; a damaged one is named and passed over.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common.errors import ModelError
from common.files import write_json
from training.loop import Progress
from training.method.optimizers import AdamW
from training.models.weights import digest, read_header, write_tensors

_RECORD = re.compile(r"step-(\d{9})\.json")


_OURS = re.compile(r"step-\d{9}\.(json|safetensors)|\..*\.part|\.tmp.*")
"""Names of our files in the folder; the last two are what a save leaves that was killed."""


@dataclass(frozen=True)
class Identity:
    """Which run a state belongs to."""

    fingerprint: dict[str, Any]
    """Everything that decides the result: settings, data, base."""
    circumstances: dict[str, Any]
    """What may be different when the run continues: saving, workers, processes."""
    common_steps: int
    """How many of its steps a run of more epochs begins with as well."""


@dataclass(frozen=True)
class Saved:
    """A saved state: what its record says, and the folder where it lies."""

    progress: Progress
    scaler: dict[str, Any]
    """State of fp16's loss scaling; {} when off."""
    identity: Identity
    tensors: str
    """Name of the tensors' file, beside the record."""
    sha256: str
    """Of the tensors in that file."""
    folder: Path


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state as it was at one moment; training goes on without changing it."""

    tensors: dict[str, torch.Tensor]
    progress: Progress
    scaler: dict[str, Any]


def snapshot(weights: torch.nn.Parameter, optimizer: AdamW, scaler: torch.amp.GradScaler, progress: Progress) -> Snapshot:
    """Copy the state to the CPU's memory, each tensor by a thread."""
    tensors = dict(_state_tensors(weights, optimizer))
    with ThreadPoolExecutor() as pool:
        copies = pool.map(lambda tensor: tensor.detach().to("cpu", copy=True), tensors.values())
        return Snapshot(dict(zip(tensors, copies, strict=True)), progress, scaler.state_dict())


def write(folder: Path, state: Snapshot, identity: Identity, keep: int) -> None:
    """Write `state` into `folder`: the tensors, then the record. After that, what is older than the last `keep` states is
    removed, except the one from which a run of more epochs can go on."""
    file = folder / f"step-{state.progress.next_step:09d}.safetensors"
    write_tensors(file, state.tensors)
    record = {
        "progress": asdict(state.progress),
        "scaler": state.scaler,
        "identity": asdict(identity),
        "tensors": file.name,
        "sha256": _digest(file),
    }
    write_json(file.with_suffix(".json"), {**record, "record_sha256": _checksum(record)})
    until = [path for path in _records(folder) if path.stem <= file.stem]  # what lies beyond was damaged, or is another's
    _remove_others(folder, [path.stem for path in until[:keep]] + [f"step-{identity.common_steps:09d}"])


class StateWriter:
    """Writes snapshots beside the training, one after the other. What the disk refuses comes up at the next call."""

    def __init__(self, folder: Path, identity: Identity, keep: int):
        self._arguments = (identity, keep)
        self._folder = folder
        self._pool = ThreadPoolExecutor(1, "state")
        self._writing: Future | None = None

    def begin(self, state: Snapshot) -> None:
        """Write `state`; returns at once, unless the one before is still being written."""
        self.wait()
        self._writing = self._pool.submit(write, self._folder, state, *self._arguments)

    def check(self) -> None:
        """Raise what the last save has met, if it is over."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what was begun is on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()


def newest(folder: Path, at_most: int | None = None) -> Saved | None:
    """The newest valid state in `folder`, None if there is none; with `at_most`, among those of no later step."""
    for path in _records(folder):
        if at_most is not None and int(_RECORD.fullmatch(path.name)[1]) > at_most:
            continue
        try:
            return _read(path)
        except (FileNotFoundError, ModelError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            print(f"the saved state {path} is damaged and passed over", flush=True)
    return None


def _read(path: Path) -> Saved:
    """The state whose record is `path`; raises one of six errors if it is damaged."""
    record = json.loads(path.read_text(encoding="utf-8"))
    checksum = record.pop("record_sha256")
    if checksum != _checksum(record) or record["sha256"] != _digest(path.with_name(record["tensors"])):
        raise ValueError("the checksum differs")
    progress, identity = Progress.from_json(record.pop("progress")), Identity(**record.pop("identity"))
    return Saved(progress=progress, identity=identity, folder=path.parent, **record)


def restore(saved: Saved, weights: torch.nn.Parameter, optimizer: AdamW, scaler: torch.amp.GradScaler) -> None:
    """Bring the LoRA weights, the optimizer and the loss scaling to where `saved` left them."""
    tensors = load_file(saved.folder / saved.tensors)
    with torch.no_grad():
        for name, tensor in _state_tensors(weights, optimizer):
            tensor.copy_(tensors[name])
    if saved.scaler:
        scaler.load_state_dict(saved.scaler)


def share(
    saved: Saved,
    copy: Callable[[Iterable[torch.Tensor]], None],
    weights: torch.nn.Parameter,
    optimizer: AdamW,
    scaler: torch.amp.GradScaler,
) -> None:
    """Bring every process to where the first one is, by `copy`: on another machine the files are not there."""
    copy(tensor.detach() for _, tensor in _state_tensors(weights, optimizer))
    if saved.scaler:
        scaler.load_state_dict(saved.scaler)


def keep_one(folder: Path, at_most: int) -> None:
    """After the LoRA is written: of all states only the newest of no later step than `at_most` is kept, from which the run
    can be lengthened."""
    kept = next((path.stem for path in _records(folder) if int(_RECORD.fullmatch(path.name)[1]) <= at_most), None)
    _remove_others(folder, [kept] if kept else [])


def remove(folder: Path) -> None:
    """Delete the states of a run whose LoRA is written, and which another one follows."""
    if folder.is_dir():
        shutil.rmtree(folder)


def archive_state(folder: Path) -> None:
    """Move the states in `folder`, if there are any, to the first free `<folder>-old-N`; half of a first one is removed."""
    if not _records(folder):
        remove(folder)
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}-old-{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"the saved state of an earlier run is laid aside in {aside}")


def _records(folder: Path) -> list[Path]:
    """The records in `folder`, newest first, by the number of their step."""
    found = [path for path in folder.iterdir() if _RECORD.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.name, reverse=True)


def _remove_others(folder: Path, kept_stems: Sequence[str]) -> None:
    """Remove every file of ours in `folder` but those of the kept states; a record goes before its tensors."""
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if _OURS.fullmatch(path.name) and path.stem not in kept_stems:
            path.unlink()


def _digest(tensors: Path) -> str:
    """SHA-256 of what the file holds, read back from it."""
    file = read_header(tensors)
    return digest([(file, file.tensors)])


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _state_tensors(weights: torch.nn.Parameter, optimizer: AdamW) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the state under its name: the flat LoRA weights and the optimizer's moments."""
    yield "weights", weights
    yield from optimizer.state.items()
