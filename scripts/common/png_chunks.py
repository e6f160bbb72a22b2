"""The chunks of a PNG file, without those that nothing here reads and for whose size Pillow would refuse the image."""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

MAX_METADATA_BYTES = 1 << 24
"""Of a color profile or a text that is read, when it is decompressed."""
_MAGIC_BYTES = b"\x89PNG\r\n\x1a\n"
_TEXT, _PROFILE = (b"tEXt", b"zTXt", b"iTXt"), b"iCCP"
_TEXT_WITH_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif")


class Chunk(NamedTuple):
    """Where a chunk is in its file."""

    name: bytes
    start: int
    end: int
    """Beyond the end of the file if the chunk is cut off."""

    def data(self, content: bytes) -> bytes:
        """What it holds."""
        return content[self.start + 8 : self.end - 4]

    def is_intact(self, content: bytes) -> bool:
        """Whether it has its checksum."""
        return zlib.crc32(content[self.start + 4 : self.end - 4]) == int.from_bytes(content[self.end - 4 : self.end], "big")


def png_chunks(content: bytes) -> Iterator[Chunk]:
    """Every chunk up to IEND, or up to where the file is cut off."""
    start, name = len(_MAGIC_BYTES), b""
    while start + 12 <= len(content) and name != b"IEND":
        name, end = content[start + 4 : start + 8], start + 12 + int.from_bytes(content[start : start + 4], "big")
        yield Chunk(name, start, end)
        start = end


def without_unread_chunks(content: bytes) -> bytes:
    """The file without text, such as ComfyUI's workflows of megabytes, and without a profile of more than MAX_METADATA_BYTES.

    XMP and EXIF data in text chunks stay, because they may hold an orientation.
    """
    kept, position = [], 0
    for chunk in png_chunks(content):
        if chunk.name in (*_TEXT, _PROFILE) and chunk.end <= len(content) and not _is_read(chunk.name, chunk.data(content)):
            kept.append(content[position : chunk.start])
            position = chunk.end
    return b"".join([*kept, content[position:]]) if kept else content


def _is_read(name: bytes, data: bytes) -> bool:
    keyword, _, rest = data.partition(b"\0")
    if name != _PROFILE and keyword not in _TEXT_WITH_ORIENTATION:
        return False
    if name == b"tEXt" or (name == b"iTXt" and rest[:1] != b"\1"):
        return len(data) <= MAX_METADATA_BYTES
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(rest[2:].split(b"\0", 2)[-1] if name == b"iTXt" else rest[1:], MAX_METADATA_BYTES)
    except zlib.error:
        return False
    return not decompressor.unconsumed_tail
