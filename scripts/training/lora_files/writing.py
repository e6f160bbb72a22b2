"""New files: never in the place of an input, complete or absent, read back and compared with what was written."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from common.errors import ModelError, ResourceError, SettingsError, bullet_list
from common.files import atomic_write, locked, nearest_existing, read_file, write_problem
from common.settings import VERSION
from common.weights import data_sha256, read_header, write_in_order

WRITTEN_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
MADE_BY = "loracat_tool"
"""The key of the metadata that says how the file was made."""
_BEGINNING = json.dumps({"__metadata__": {MADE_BY: ""}}, separators=(",", ":"))[:-3].encode()
"""How the header of every file from here begins, also of one that was not finished."""
_NOT_INHERITED = {
    "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "loracat_fingerprint", "lora_adapter_metadata",
    "modelspec.date", "modelspec.merged_from",
}  # fmt: skip
"""Metadata that is true of the source only."""

Written = tuple[str, torch.Tensor | tuple[str, Sequence[int], Iterable[bytes]]]
"""A tensor and its name; or the name, type, shape and bytes of one."""


def require_output(output: Path, inputs: Sequence[Path], force: bool) -> None:
    """Raises SettingsError if `output` is an input, or must not be replaced, ResourceError if it cannot be written.

    If an input is a folder, so is the output, and nothing is replaced by it.
    """
    if any(path.is_dir() for path in inputs):
        if os.path.lexists(output):
            raise SettingsError(f"--output {output}: exists: choose the name of a new folder")
    elif output.suffix != ".safetensors":
        raise SettingsError(f"--output {output}: the name must end in .safetensors")
    elif output.is_symlink() or (output.exists() and not output.is_file()):
        raise SettingsError(f"--output {output}: is a folder, a link or a device: choose the name of a file")
    elif output.exists():
        if any(path.exists() and output.samefile(path) for path in inputs):
            raise SettingsError(f"--output {output}: is an input; files are never changed in place: choose another name")
        if not force:
            raise SettingsError(f"--output {output}: exists: choose another name, or replace it with --force")
    if problem := write_problem(output.parent):
        raise ResourceError(f"--output {output}: {problem}")


def require_space(output: Path, size_bytes: int) -> None:
    """Raises ResourceError if a file of that size does not fit."""
    free = shutil.disk_usage(nearest_existing(output.parent)).free
    if size_bytes > free:
        needed, left = (f"{size / 2**30:.1f} GiB" for size in (size_bytes, free))
        raise ResourceError(f"{output}: needs {needed}, and {left} are free: free disk space, or choose another folder")


def write_verified(
    output: Path,
    names: Collection[str],
    tensors: Iterable[Written],
    metadata: Callable[[], dict[str, str]],
    force: bool,
    problems_of: Callable[[Collection[str]], list[str]] = lambda names: [],
) -> None:
    """Write the `tensors`, which have these `names`, as they come, and read the file back before it is called `output`.

    `metadata` is complete when it is called a second time, after the last tensor; the hash is added to it. Raises ModelError, and
    leaves no file, if what was read back is not what was written, or if `problems_of` its names finds problems.
    """
    written: dict[str, tuple[str, tuple[int, ...]]] = {}
    hashes = []

    def in_bytes() -> Iterator[tuple[str, str, Sequence[int], Iterable[bytes]]]:
        for name, tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                tensor = _NAMES[tensor.dtype], tuple(tensor.shape), [content] if content.size else []
            written[name] = tensor[0], tuple(tensor[1])
            yield (name, *tensor)

    def with_hashes(data_hash: str) -> dict[str, str]:
        hashes.append(data_hash)
        said = {key: text.encode(errors="replace").decode() for key, text in metadata().items()}  # names of files are any bytes
        of_lora = {"sshs_model_hash": data_hash} if "ss_network_module" in said else {}
        return said | of_lora | {"modelspec.hash_sha256": f"0x{data_hash}"}

    _remove_leftovers(output.parent)
    with atomic_write(output) as temporary, locked(temporary, ""):
        write_in_order(temporary, names, in_bytes(), with_hashes)
        read = {name: (stored.dtype, stored.shape) for name, stored in read_header(temporary).tensors.items()}
        if read != written or data_sha256(temporary) != hashes[-1]:
            raise ModelError(f"{output}: differs after reading it back: check the disk, and run the command again")
        if problems := problems_of(read):
            raise ModelError(bullet_list(f"{output.name}: verification of the file failed:", problems[:20]))
        if not force and os.path.lexists(output):
            raise SettingsError(f"--output {output}: another program has created it meanwhile: choose another name")


def described(command: str, sources: Sequence[dict[str, str]], title: str, inputs: Sequence[str]) -> dict[str, str]:
    """Metadata of a file that `command` made: what all `sources` have in common, and where it comes from. `inputs`: their names,
    without folders, and weights."""
    common = {key: text for key, text in sources[0].items() if all(source.get(key) == text for source in sources)}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        MADE_BY: command,
        **{key: text for key, text in common.items() if key not in {*_NOT_INHERITED, MADE_BY}},
        "modelspec.title": title,
        "modelspec.date": now,
        "modelspec.merged_from": ", ".join(inputs),
        "loracat_version": VERSION,
    }


def _remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files in `folder` that a killed run of this program left; those of another one at work are locked."""
    for path in folder.glob(".????????.part"):
        with contextlib.suppress(SettingsError, OSError):
            if read_file(path, 8 + len(_BEGINNING))[8:] == _BEGINNING:
                with locked(path, "at work"):
                    path.unlink()
