"""What an ONNX file says about itself, read without its weights: inputs, metadata, and the files that hold its weights.

An ONNX file is one protobuf message (onnx.proto3 of the ONNX repository). Only the fields below are followed; everything else,
weights included, is skipped by its length.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from captioning.tag_selection import DOWNLOAD_AGAIN
from common.errors import ModelError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 50
_UINT8 = 2
_MAX_NAME_BYTES = 255
"""Of a file or folder, on every file system in use."""

_MESSAGES = {
    "model": {7: "graph", 14: "metadata", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 11: "input", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external data"},
}
"""Message -> number of a field -> the message in it, on the way to inputs, metadata and external data."""


class Input(NamedTuple):
    """An input of a model."""

    is_uint8: bool
    shape: list[int | None]
    """None is a size that the model leaves open."""


@dataclass
class OnnxFile:
    """The description in an ONNX file."""

    path: Path
    inputs: dict[str, Input] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    weights_files: set[str] = field(default_factory=set)
    """Files with weights, relative to the folder of the ONNX file; empty if it holds all of them itself."""

    def missing_files(self) -> list[str]:
        """The files with weights that are not beside the ONNX file."""
        return sorted(file for file in self.weights_files if not (self.path.parent / file).is_file())


def read_onnx(path: Path) -> OnnxFile:
    """Read the description in `path`. Raises ModelError for a file that is not a complete ONNX model."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; put the model there") from None
    return _read_once(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _read_once(path: Path, _size: int, _mtime_ns: int) -> OnnxFile:
    """The description in the file of this state; several parts of the stage ask for it, and reading it takes part of a second."""
    found, initializers = OnnxFile(path), set()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for kind, depth, start, end in _messages(content):
                if kind == "metadata":
                    key, value = _texts(content, start, end)
                    found.metadata[key] = value
                elif kind == "external data":
                    key, value = _texts(content, start, end)
                    found.weights_files |= {_inside_folder(value)} if key == "location" else set()
                elif kind == "input" and depth == 1:
                    name, found_input = _value_info(content, start, end)
                    found.inputs[name] = found_input
                elif kind == "tensor" and depth == 1:
                    initializers |= {content[begin:stop] for number, begin, stop in _fields(content, start, end) if number == 8}
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; make it readable for this user") from None
    except ValueError as error:
        raise ModelError(f"{path}: is cut off or not an ONNX model ({error}); {DOWNLOAD_AGAIN}") from None
    # Models of the first versions of the format list their weights among the inputs.
    found.inputs = {name: each for name, each in found.inputs.items() if name.encode() not in initializers}
    if not found.inputs:
        raise ModelError(f"{path}: is cut off or not an ONNX model (it has no input); {DOWNLOAD_AGAIN}")
    return found


def _messages(content: mmap.mmap) -> Iterator[tuple[str, int, int, int]]:
    """Kind, depth and extent of every message on the way; the messages in the graph of the model have depth 1."""
    waiting = [("model", 0, 0, len(content))]
    while waiting:
        kind, depth, start, end = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        yield kind, depth - 1, start, end
        if kind in _MESSAGES:
            for number, begin, stop in _fields(content, start, end):
                if number in _MESSAGES[kind]:
                    waiting.append((_MESSAGES[kind][number], depth + 1, begin, stop))


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number and extent of every field of a message. Raises ValueError if it is not one."""
    position = start
    while position < end:
        key, position = _varint(content, position, end)
        number, wire = key >> 3, key & 7
        if wire == _BYTES:
            length, position = _varint(content, position, end)
        elif wire == _VARINT:
            length = _varint(content, position, end)[1] - position
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError("it is not a protobuf message")
        if number == 0 or position + length > end:
            raise ValueError("a field is cut off")
        yield number, position, position + length
        position += length


def _varint(content: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """The variable-length integer at `position`, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise ValueError("a number is cut off")
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is too long")


def _texts(content: mmap.mmap, start: int, end: int) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto."""
    texts = {number: content[begin:stop].decode() for number, begin, stop in _fields(content, start, end)}
    return texts.get(1, ""), texts.get(2, "")


def _value_info(content: mmap.mmap, start: int, end: int) -> tuple[str, Input]:
    """Name, type and shape of a ValueInfoProto: its fields name, and type, tensor_type, and of that elem_type, shape and dim."""

    def inner(extents: list[tuple[int, int]], number: int) -> list[tuple[int, int]]:
        return [(begin, stop) for extent in extents for found, begin, stop in _fields(content, *extent) if found == number]

    name = b"".join(content[begin:stop] for begin, stop in inner([(start, end)], 1)).decode()
    tensor_type = inner(inner([(start, end)], 2), 1)
    is_uint8 = any(_varint(content, begin, stop)[0] == _UINT8 for begin, stop in inner(tensor_type, 1))
    return name, Input(is_uint8, [_dimension(content, *extent) for extent in inner(inner(tensor_type, 2), 1)])


def _dimension(content: mmap.mmap, start: int, end: int) -> int | None:
    for number, begin, stop in _fields(content, start, end):
        if number == 1:
            value = _varint(content, begin, stop)[0]
            return value if 0 < value < 1 << 31 else None
    return None


def _inside_folder(location: str) -> str:
    """A file of external data; ONNX allows only those in or below the folder of the model."""
    path = PurePosixPath(location.replace("\\", "/"))
    is_name = location.isprintable() and all(len(part.encode()) <= _MAX_NAME_BYTES for part in path.parts)
    if not location or path.is_absolute() or ".." in path.parts or not is_name:
        raise ValueError(f"its weights are in {location[:80]!r}, which is not in its folder")
    return str(path)
