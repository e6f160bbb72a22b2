"""What a `.safetensors` file holds according to its header, and hashes of its tensors. Imports no torch."""

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import ModelError
from common.files import atomic_write

FLOAT_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""Bytes per value of the types that weights may have."""
_OTHER_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}

_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 64
_MAX_SHOWN = 80
"""Characters of a name from a header that a message repeats."""
_READ_BYTES = 1 << 22
_MOST_BYTES_OF_ENTRY = 160
"""What the header has of a tensor of up to four dimensions, beside its name."""

_PICKLE = "is a pickle checkpoint, which can run code when it is opened: use the .safetensors of the same model"
_OTHER_FORMATS = (
    (b"PK\x03\x04", _PICKLE),
    (b"\x80", _PICKLE),
    (b"GGUF", "is a quantised GGUF file, which cannot be trained on: use the fp16 .safetensors of the same model"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights: run `git lfs pull`, or download the file again"),
    (b"<", "is a web page, not weights: the download required a login or failed; download it again"),
)

_JSON_TYPES = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
_JSON_TYPES |= {type(None): "null"}


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
    if path.exists() and not path.is_file():
        raise ModelError(f"{path}: is not a regular file: put the .safetensors file itself there")
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
        header = json.loads(raw.decode())
        metadata = _checked_metadata(path, header.pop("__metadata__", None))
        tensors = {name: _stored_tensor(name, entry, 8 + length) for name, entry in header.items()}
        expected = _end_of_data(tensors, 8 + length)
    except RecursionError:
        raise ModelError(f"{path}: its header is damaged (it is nested too deeply): download it again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ModelError(f"{path}: its header is damaged ({reason}): download it again") from None
    if size != expected:
        raise ModelError(f"{path}: is damaged, it has {size} bytes and its header describes {expected}: download it again")
    return WeightsFile(path, tensors, metadata)


def _checked_metadata(path: Path, metadata: Any) -> dict[str, str]:
    """The header's `__metadata__`: texts only, as safetensors reads it. Raises ModelError for a value of another type."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise TypeError(f"its __metadata__ is {_JSON_TYPES[type(metadata)]}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ModelError(
                f"{path}: its metadata holds {_JSON_TYPES[type(value)]} under {key[:_MAX_SHOWN]!r}, where only text is allowed: "
                "save it again with the program that edited its metadata, or download it again"
            )
        _require_unicode(key + value)
    return metadata


def _stored_tensor(name: str, entry: Any, data_start: int) -> StoredTensor:
    _require_unicode(name)
    label = repr(name[:_MAX_SHOWN])
    if not isinstance(entry, dict):
        raise TypeError(f"{label} is {_JSON_TYPES[type(entry)]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"the entry of {label} is not a dtype, a shape and two offsets")
    begin, end = offsets
    width = (FLOAT_BYTES | _OTHER_BYTES).get(dtype)
    if end < begin or len(shape) > _MAX_DIMENSIONS or (width and end - begin != width * math.prod(shape)):
        raise ValueError(f"the offsets of {label} do not match its shape")
    return StoredTensor(dtype, tuple(shape), data_start + begin, data_start + end)


def _require_unicode(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which JSON can spell and no file or terminal can."""
    if not text.isascii():
        text.encode()


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _end_of_data(tensors: dict[str, StoredTensor], data_start: int) -> int:
    """Where the last tensor ends. Raises ValueError unless the tensors follow each other without gaps, as safetensors requires."""
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise ValueError(f"{name[:_MAX_SHOWN]!r} does not begin where the tensor before it ends")
        end = tensor.end
    return end


def copy_with_metadata(source: Path, target: Path, added: dict[str, str]) -> None:
    """Write a copy of `source` with `added` in its metadata to `target`, atomically. What follows the header, of which LoRA files
    record the hash, is the same to the last byte."""
    header = {"__metadata__": read_header(source).metadata | added}
    with source.open("rb") as file, atomic_write(target) as temporary, temporary.open("wb") as copy:
        stored = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        encoded = json.dumps(stored | header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        encoded += b" " * (-len(encoded) % 8)  # safetensors aligns the data
        copy.write(len(encoded).to_bytes(8, "little") + encoded)
        shutil.copyfileobj(file, copy, _READ_BYTES)


def write_in_order(
    file: Path,
    names: Collection[str],
    tensors: Iterable[tuple[str, str, Sequence[int], Iterable[Any]]],
    metadata: Callable[[str], dict[str, str]],
) -> None:
    """Write `tensors` (name, type, shape, the bytes in pieces) into the existing `file`, one after the other as they come: only one
    piece at a time is in memory, and shapes are not known before.

    `names` are those of all tensors. `metadata` is called with the SHA-256 of what follows the header, and before that with zeros,
    because the header is at the beginning: its space is reserved, and filled up with spaces as the format allows.
    """
    reserved = _MOST_BYTES_OF_ENTRY * (len(names) + 10) + len(json.dumps([*names, metadata("0" * 64)]))
    reserved += -reserved % 8  # safetensors aligns the data
    entries, position, sha256 = {}, 0, hashlib.sha256()
    with file.open("r+b") as written:
        _write_header(written, {"__metadata__": metadata("0" * 64)}, reserved)
        for name, dtype, shape, pieces in tensors:
            begin = position
            for piece in pieces:
                view = memoryview(piece).cast("B")
                written.write(view)
                sha256.update(view)
                position += len(view)
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, position]}
        written.seek(0)
        _write_header(written, {"__metadata__": metadata(sha256.hexdigest())} | entries, reserved)


def _write_header(file: BinaryIO, header: dict[str, Any], size_bytes: int) -> None:
    encoded = json.dumps(header, separators=(",", ":")).encode("ascii").ljust(size_bytes)
    if len(encoded) > size_bytes:
        raise ModelError(f"the header would have {len(encoded)} bytes, and {size_bytes} are reserved: its shapes are too long")
    file.write(size_bytes.to_bytes(8, "little") + encoded)


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
