"""Records of the other stages, as they are at this moment: complete, half written, or not there yet."""

import contextlib
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from common.files import as_object, parse_json, read_file


class Records:
    """Reads records below `root`, and remembers the names of those that cannot be read."""

    def __init__(self, root: Path):
        self._root = root
        self.unreadable: list[str] = []

    def json(self, path: Path) -> dict[str, Any]:
        """The object in a JSON file; {} if there is no such file, or it cannot be read."""
        content: Any = {}
        with self.reading(path):
            content = parse_json(read_file(path))
            if not isinstance(content, dict):
                raise ValueError
        return content if isinstance(content, dict) else {}

    @contextlib.contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """What is raised in the block because the file `path` is damaged ends the block. A file that is missing is no damage."""
        try:
            yield
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            self.unreadable.append(path.relative_to(self._root).as_posix())


def as_number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) else None


def as_numbers(value: Any) -> dict[str, float]:
    """The finite numbers in a JSON object, by their keys."""
    return {str(key): number for key, each in as_object(value).items() if (number := as_number(each)) is not None}
