"""Tensors to a `.safetensors` file, with the modes and the errors that every other file of ours has."""

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dataset_folder import whole_file


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous `tensors` on the CPU to `path`: whole, or not at all. Raises OSError for what the disk refuses."""
    with whole_file(path) as beside:
        fill(beside, tensors, metadata)


def remove_all_leftovers(folder: Path) -> None:
    """Remove the half files in `folder`, ours and safetensors' own; nobody may be writing there."""
    for path in [*folder.glob(".*.part"), *folder.glob(".tmp*")]:
        path.unlink(missing_ok=True)


def fill(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` into the `file` that exists.

    safetensors writes a file of its own, which only this user may read, and renames it; its error hides the disk's.
    """
    mode = file.stat().st_mode
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        cause = re.search(r"os error (\d+)", str(error))
        if cause is None:
            raise
        raise OSError(int(cause[1]), os.strerror(int(cause[1])), str(file.parent)) from None
    file.chmod(mode)
