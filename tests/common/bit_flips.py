"""Files with flipped bits, as a failing disk or memory leaves them."""

from collections.abc import Iterable
from pathlib import Path

from hypothesis import strategies as st

flips = st.lists(st.tuples(st.integers(0, 300) | st.integers(0, 1 << 22), st.integers(0, 7)), min_size=1, max_size=4)
"""Position, modulo the size of the file, and bit."""


def flip(path: Path, bits: list[tuple[int, int]]) -> None:
    """Flip bits in the file, which keeps its name."""
    content = bytearray(path.read_bytes())
    for position, bit in bits:
        if content:
            content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)


class Snapshot:
    """The content of every file in some folders, to which they can be reset."""

    def __init__(self, folders: Iterable[Path]):
        self.folders = list(folders)
        self.files = {path: path.read_bytes() for path in self._present()}

    def restore(self) -> None:
        for path in self._present():
            if path not in self.files:
                path.unlink()
        for path, content in self.files.items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def _present(self) -> list[Path]:
        return [path for folder in self.folders for path in sorted(folder.rglob("*")) if path.is_file()]
