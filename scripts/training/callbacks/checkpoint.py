"""Checkpoints: everything needed to continue a run exactly, and which one it is continued from given what changed since.

They are safetensors and JSON only, the same for every engine.
A checkpoint is two files: the tensors, then the record that points to them and holds the checksums of both. The newest one
whose record and tensors match is used; a corrupt one is reported and skipped.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common.errors import ModelError, SettingsError, bullet_list
from common.files import parse_json, read_file, write_json
from common.settings import pipeline_command
from common.weights import digest, read_header
from training.config import RunSettings
from training.data.buckets import OptimizerStep
from training.loop import Callback, Progress
from training.method.optimizers import Optimizer
from training.models.weights import write_tensors
from training.plan import GLOBAL_BATCH, WARMUP_STEPS, WORLD_SIZE, changes
from training.system.process_group import ProcessGroup

WEIGHTS = "weights"
"""Name of the adapter's flat weights among the tensors; the others are the optimizer's."""
LENGTH, EARLY_STOP = ("num_train_epochs", "num_train_steps"), "early_stop_patience"
"""Settings that a run may be continued with other values of."""
_RECORD = re.compile(r"step-(\d{9})\.json")
_OWN_FILES = re.compile(r"step-\d{9}\.(json|safetensors)|\..*\.part|\.tmp.*")
"""Names of files in the folder that this module wrote; the last two are left by a save that was killed."""


@dataclass(frozen=True)
class Identity:
    """Which run a checkpoint belongs to."""

    fingerprint: dict[str, Any]
    """Everything that decides the result: settings, data, base model."""
    runtime: dict[str, Any]
    """What may differ when the run is continued: saving, workers, processes."""
    shared_prefix_steps: int
    """How many of its steps a run of more epochs begins with as well."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, without its tensors."""

    progress: Progress
    scaler: dict[str, Any]
    """State of fp16's loss scaling; {} when off."""
    identity: Identity
    tensors: str
    """Name of the tensors' file, beside the record."""
    sha256: str
    """Of the tensors in that file."""
    folder: Path


def snapshot(weights: torch.nn.Parameter, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """A copy of the state's tensors in the CPU's memory, made by a thread for each; training goes on without changing it."""
    tensors = {WEIGHTS: weights, **optimizer.state_dict()}
    with ThreadPoolExecutor() as pool:
        copies = pool.map(lambda tensor: tensor.detach().to("cpu", copy=True), tensors.values())
        return dict(zip(tensors, copies, strict=True))


def write(
    folder: Path, tensors: dict[str, torch.Tensor], progress: Progress, scaler: dict[str, Any], identity: Identity, keep: int
) -> None:
    """Write a checkpoint into `folder`: the tensors, then the record. After that, checkpoints older than the last `keep` are
    removed, except the one from which a run of more epochs can be continued."""
    file = folder / f"step-{progress.next_step:09d}.safetensors"
    write_tensors(file, tensors)
    validations = [{"epochs": epochs, "loss": loss} for epochs, loss in progress.validations.items()]
    record = {  # by the names of the first version
        "progress": {**asdict(progress), "validations": validations},
        "scaler": scaler,
        "identity": {
            "fingerprint": identity.fingerprint,
            "circumstances": identity.runtime,
            "common_steps": identity.shared_prefix_steps,
        },
        "tensors": file.name,
        "sha256": _digest(file),
    }
    write_json(file.with_suffix(".json"), {**record, "record_sha256": _checksum(record)})
    until = [path for path in _records(folder) if path.stem <= file.stem]  # later ones are corrupt, or of another run
    _remove_others(folder, [path.stem for path in until[:keep]] + [f"step-{identity.shared_prefix_steps:09d}"])


class CheckpointWriter(Callback, AbstractContextManager):
    """Writes checkpoints in a thread, one after the other. What the disk refuses is raised after the next step."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        keep: int,
        weights: torch.nn.Parameter,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
    ):
        self._folder, self._identity, self._keep = folder, identity, keep
        self._weights, self._optimizer, self._scaler = weights, optimizer, scaler
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None

    def save_state(self, progress: Progress, *, wait: bool) -> None:
        self.wait()
        tensors, scaler = snapshot(self._weights, self._optimizer), self._scaler.state_dict()
        self._writing = self._pool.submit(write, self._folder, tensors, progress, scaler, self._identity, self._keep)
        if wait:
            self.wait()

    def after_step(self, step: OptimizerStep, values: dict[str, float]) -> None:
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; raises the error of writing it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __exit__(self, kind, *_) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()


def newest(folder: Path, at_most: int | None = None) -> Checkpoint | None:
    """The newest valid checkpoint in `folder`, None if there is none; with `at_most`, of no later step than that."""
    for path in _records(folder):
        if at_most is not None and int(_RECORD.fullmatch(path.name)[1]) > at_most:
            continue
        try:
            return _read(path)
        except (FileNotFoundError, ModelError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            print(f"skipping corrupt checkpoint {path}", flush=True)
    return None


def _read(path: Path) -> Checkpoint:
    """The checkpoint whose record is `path`; raises one of the errors that `newest` catches if it is corrupt."""
    record = parse_json(read_file(path))
    checksum = record.pop("record_sha256")
    if checksum != _checksum(record) or record["sha256"] != _digest(path.with_name(record["tensors"])):
        raise ValueError("the checksum differs")
    progress, identity = record.pop("progress"), record.pop("identity")
    progress["validations"] = {each["epochs"]: each["loss"] for each in progress["validations"]}
    run = Identity(identity["fingerprint"], identity["circumstances"], identity["common_steps"])
    return Checkpoint(progress=Progress(**progress), identity=run, folder=path.parent, **record)


def restore(
    saved: Checkpoint, group: ProcessGroup, weights: torch.nn.Parameter, optimizer: Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Bring weights, optimizer and loss scaling of every process to where `saved` left them.

    The main process reads the file and broadcasts it: on other machines it may not exist.
    """
    tensors = load_file(saved.folder / saved.tensors) if group.is_main_process else {}
    described = group.broadcast_object(lambda: {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    tensors = tensors or {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in described.items()}
    group.broadcast(tensors.values())
    with torch.no_grad():
        weights.copy_(tensors.pop(WEIGHTS))
    optimizer.load_state_dict(tensors)
    if saved.scaler:
        scaler.load_state_dict(saved.scaler)


def warmup_to_keep(saved: Checkpoint, fingerprint: Mapping[str, Any]) -> int:
    """The warm-up steps of a run that may be extended: those it began with, whatever its number of epochs is now."""
    before = saved.identity.fingerprint
    same = all(before.get(key) == fingerprint[key] for key in ("lr_scheduler", "lr_warmup"))
    return before[WARMUP_STEPS] if same and before["lr_scheduler"] == "constant" else fingerprint[WARMUP_STEPS]


def find_resume_point(folder: Path, saved: Checkpoint, fingerprint: Mapping[str, Any], shared_prefix_steps: int) -> Checkpoint:
    """The checkpoint in `folder` from which the run with this fingerprint, of which a run of more epochs has so many steps, is
    continued: `saved`, or an older one that is part of both runs.

    Raises SettingsError if `saved` belongs to another run.
    """
    before = saved.identity
    found = changes(before.fingerprint, fingerprint)
    allowed = {*LENGTH, EARLY_STOP} if fingerprint["lr_scheduler"] == "constant" else {EARLY_STOP}
    point = saved
    if not found.keys().isdisjoint(LENGTH):  # the steps of the two runs differ from where the shorter one ends
        point = newest(folder, at_most=min(before.shared_prefix_steps, shared_prefix_steps))
    if not found.keys() <= allowed or point is None:
        title = f"{folder} holds a run, stopped at step {saved.progress.next_step}, with other settings or data:"
        remedy = f"Restore these values to continue that run, or archive it and start again: {pipeline_command('--train', FRESH=1)}"
        raise SettingsError(f"{bullet_list(title, list(found.values()))}\n{remedy}")
    return point


def changes_since(saved: Checkpoint, now: Identity) -> list[str]:
    """What differs from the run that `saved` is of, as lines for a user."""
    before = saved.identity
    return list((changes(before.fingerprint, now.fingerprint) | changes(before.runtime, now.runtime)).values())


def match_global_batch(run: RunSettings, world_size: int, saved: Checkpoint | None) -> RunSettings:
    """`run` with the gradient accumulation by which `world_size` processes take steps of the size that the saved run has, if
    their number has changed since. Raises SettingsError if that does not divide, with what would."""
    if saved is None or world_size == saved.identity.runtime[WORLD_SIZE]:
        return run
    samples = saved.identity.fingerprint[GLOBAL_BATCH]
    accumulation, rest = divmod(samples, run.train_batch_size * world_size)
    if rest == 0 and accumulation:
        return replace(run, gradient_accumulation_steps=accumulation)
    fitting = [str(batch) for batch in range(1, samples + 1) if samples % (batch * world_size) == 0]
    remedy = f"set TRAIN_BATCH_SIZE to {' or '.join(fitting)}" if fitting else "set NUM_PROCESSES to a divisor of it"
    raise SettingsError(
        f"the saved run has {samples} images per step, which {world_size} processes with batch size {run.train_batch_size} cannot "
        f"share: {remedy}, or set FRESH=1 to archive it and start again"
    )


def keep_one(folder: Path, at_most: int) -> None:
    """After the LoRA is written: remove all checkpoints but the newest of no later step than `at_most`, from which the run can
    be extended."""
    kept = next((path.stem for path in _records(folder) if int(_RECORD.fullmatch(path.name)[1]) <= at_most), None)
    _remove_others(folder, [kept] if kept else [])


def remove_incomplete(folder: Path) -> None:
    """Remove `folder` if it exists and holds no checkpoint, not even a corrupt one."""
    if folder.is_dir() and not _records(folder):
        shutil.rmtree(folder)


def _records(folder: Path) -> list[Path]:
    """The records in `folder`, newest first, by the number of their step."""
    found = [path for path in folder.iterdir() if _RECORD.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.name, reverse=True)


def _remove_others(folder: Path, kept_stems: Sequence[str]) -> None:
    """Remove every file that this module wrote but those of the kept checkpoints; a record goes before its tensors."""
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if _OWN_FILES.fullmatch(path.name) and path.stem not in kept_stems:
            path.unlink()


def _digest(tensors: Path) -> str:
    """SHA-256 of the tensors in the file, read back from it."""
    file = read_header(tensors)
    return digest([(file, file.tensors)])


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
