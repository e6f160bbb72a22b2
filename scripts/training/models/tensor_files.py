"""Writing `.safetensors` files, with the mode and the errors that all other files have."""

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common.files import atomic_write


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous `tensors` on the CPU to `path`, atomically. Raises OSError if the disk refuses."""
    with atomic_write(path) as temporary:
        write_into(temporary, tensors, metadata)


def write_into(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` into the existing `file`, whose mode is kept. Raises OSError if the disk refuses.

    safetensors writes a temporary file that only this user may read and renames it; its own error hides the errno.
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
