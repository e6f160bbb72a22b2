"""Everything needed to continue exactly: LoRA weights, optimizer moments, position in the run. safetensors and JSON only.

A state is two files: the tensors, and then the record that points to them and holds their checksum. The newest state
whose record and tensors fit each other counts; a damaged one is passed over with a line.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dataset_folder import sha256_of, whole_file, write_json
from errors import SettingsError, one_list

KEPT_STATES = 2
_RECORD = re.compile(r"step-(\d{9})\.json")


@dataclass(frozen=True)
class Saved:
    """A saved state: what its record says."""

    next_step: int
    """The optimizer step that comes next."""
    loss_average: float | None
    """The running average of the loss that the progress bar shows."""
    scaler: dict[str, Any]
    """State of fp16's loss scaling; {} when off."""
    fingerprint: dict[str, Any]
    """Everything that decides the result: settings, data, base."""
    tensors: str
    """Name of the tensors' file, beside the record."""
    sha256: str
    """Of that file."""
    folder: Path
    """Where both lie; not part of the record."""


def save(
    folder: Path,
    weights: torch.nn.Parameter,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    next_step: int,
    loss_average: float | None,
    fingerprint: dict[str, Any],
) -> None:
    """Write the state into `folder`: the tensors, then the record; older states than the last KEPT_STATES are removed after."""
    file = folder / f"step-{next_step:09d}.safetensors"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _state_tensors(weights, optimizer)}
    with whole_file(file) as beside:
        save_file(tensors, beside)
    record = {
        "next_step": next_step,
        "loss_average": loss_average,
        "scaler": scaler.state_dict(),
        "fingerprint": fingerprint,
        "tensors": file.name,
        "sha256": sha256_of(file),
    }
    write_json(file.with_suffix(".json"), record)
    for old in _records(folder)[KEPT_STATES:]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def newest(folder: Path) -> Saved | None:
    """The newest valid state in `folder`; None if there is none."""
    for path in _records(folder):
        try:
            saved = Saved(**json.loads(path.read_text(encoding="utf-8")), folder=folder)
            if sha256_of(folder / saved.tensors) == saved.sha256:
                return saved
        except (FileNotFoundError, ValueError, TypeError):
            pass  # said below
        print(f"the saved state {path} is damaged and passed over")
    return None


def refuse_changes(saved: Saved, fingerprint: dict[str, Any], folder: Path) -> None:
    """Raise SettingsError if the run that `saved` belongs to is another one than `fingerprint` describes."""
    before, now = saved.fingerprint, json.loads(json.dumps(fingerprint))
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if keys:
        changes = [f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in keys]
        title = f"{folder} holds a run, unfinished at step {saved.next_step}, that began differently:"
        remedy = "set it back to continue that run, or set FRESH=1 to lay it aside and begin anew"
        raise SettingsError(one_list(title, [*changes, remedy]))


def restore(saved: Saved, weights: torch.nn.Parameter, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Bring the LoRA weights, the optimizer and the loss scaling to where `saved` left them."""
    tensors = load_file(saved.folder / saved.tensors)
    with torch.no_grad():
        for name, tensor in _state_tensors(weights, optimizer):
            tensor.copy_(tensors[name])
    if saved.scaler:
        scaler.load_state_dict(saved.scaler)


def remove(folder: Path) -> None:
    """Delete the states of a run whose LoRA is written."""
    if folder.is_dir():
        shutil.rmtree(folder)


def lay_aside(folder: Path) -> None:
    """Move the states in `folder`, if there are any, to the first free `<folder>-old-N`."""
    if not folder.exists():
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


def _state_tensors(weights: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the state under its name: the flat LoRA weights and the optimizer's moments."""
    yield "weights", weights
    yield from optimizer.state[weights].items()
