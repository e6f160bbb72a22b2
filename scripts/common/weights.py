"""What a `.safetensors` file holds according to its header, and hashes of its tensors. Imports no torch."""

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.errors import ModelError

FLOAT_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""Bytes per value of the types that weights may have."""

_MAX_HEADER_BYTES = 100_000_000
_READ_BYTES = 1 << 22

_PICKLE = "is a pickle checkpoint, which can run code when it is opened: use the .safetensors of the same model"
_OTHER_FORMATS = (
    (b"PK\x03\x04", _PICKLE),
    (b"\x80", _PICKLE),
    (b"GGUF", "is a quantised GGUF file, which cannot be trained on: use the fp16 .safetensors of the same model"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights: run `git lfs pull`, or download the file again"),
    (b"<", "is a web page, not weights: the download required a login or failed; download it again"),
)


@dataclass(frozen=True)
class StoredTensor:
    """One entry of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, from the start of the file."""
    end: int


@dataclass(frozen=True)
class WeightsFile:
    """A complete `.safetensors` file."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(path: Path) -> WeightsFile:
    """Read the header of `path` and compare it with the file's size. Raises ModelError if the file is not complete weights."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        for magic, description in _OTHER_FORMATS:
            # A header's length may begin with the same bytes as a short magic; its JSON then follows after 8 bytes.
            if start.startswith(magic) and start[8:9] != b"{":
                raise ModelError(f"{path}: {description}")
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8) or start[8:9] != b"{":
            raise ModelError(f"{path}: is damaged or not a .safetensors file ({size} bytes): download it again")
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        tensors = {name: _stored_tensor(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{path}: its header is damaged: download it again") from None
    expected = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if size != expected:
        raise ModelError(f"{path}: is damaged, it has {size} bytes and its header describes {expected}: download it again")
    return WeightsFile(path, tensors, metadata)


def _stored_tensor(entry: dict, data_start: int) -> StoredTensor:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    width = FLOAT_BYTES.get(entry["dtype"])
    if end < begin or (width and end - begin != width * math.prod(shape)):
        raise ValueError("offsets do not match the shape")
    return StoredTensor(entry["dtype"], shape, data_start + begin, data_start + end)


def data_sha256(path: Path) -> str:
    """SHA-256 of everything after the header, as LoRA files record it in `sshs_model_hash`."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(files: Iterable[tuple[WeightsFile, Iterable[str]]]) -> str:
    """SHA-256 over the names, types, shapes and SHA-256s of these tensors of these files, hashed in as many threads as cores."""
    tensors = [(name, file.path, file.tensors[name]) for file, names in files for name in sorted(names)]
    total = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda item: _hash(item[1], item[2]), tensors)
        for (name, _, tensor), tensor_hash in zip(tensors, hashes, strict=True):
            total.update(f"{name} {tensor.dtype} {tensor.shape} {tensor_hash}\n".encode())
    return total.hexdigest()


def _hash(path: Path, tensor: StoredTensor) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(tensor.begin)
        for begin in range(tensor.begin, tensor.end, _READ_BYTES):
            sha256.update(file.read(min(_READ_BYTES, tensor.end - begin)))
    return sha256.hexdigest()
