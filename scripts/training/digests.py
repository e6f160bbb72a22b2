"""Digests of a base model's parts, remembered in a folder: gigabytes of weights are hashed once and not at every start."""

import json
from contextlib import suppress
from pathlib import Path

from dataset_folder import write_json
from training.parts import BaseModel, Part

DIGESTS = "digests.json"


def cache_folder(output_dir: Path) -> Path:
    """Where everything lies that a run computes once."""
    return output_dir / "cache"


def base_digest(base: BaseModel, folder: Path, part: str) -> str:
    """SHA-256 of one part of the base model, remembered from run to run."""
    key, known = _key_of(base.parts[part]), _remembered(folder)
    if key not in known:
        known[key] = base.parts[part].digest
        write_json(folder / DIGESTS, known)
    return known[key]


def compute_digests(base: BaseModel, folder: Path) -> None:
    """Compute those that are not remembered yet; nothing is written, so that it can be done beside anything else."""
    known = _remembered(folder)
    for part in base.parts.values():
        if _key_of(part) not in known:
            _ = part.digest


def _remembered(folder: Path) -> dict[str, str]:
    """Key of a part -> its digest; what cannot be read is forgotten."""
    with suppress(FileNotFoundError, ValueError, AttributeError):
        known = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        return {key: digest for key, digest in known.items() if isinstance(digest, str)}
    return {}


def _key_of(part: Part) -> str:
    """The same for as long as path, size and time of change of the part's files stay the same."""
    stats = [(str(file.resolve()), file.stat()) for file in sorted({file.path for file in part.files})]
    return json.dumps([part.name, *((path, about.st_size, about.st_mtime_ns) for path, about in stats)])
