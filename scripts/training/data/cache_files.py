"""The files of the cache: keyed by content, written atomically, verified by a checksum, read back sample by sample.

A file holds one image, or one caption with its variants, so that it never depends on what else was encoded in the same run. Its
key covers everything that the value depends on: a changed image, crop, caption or encoder is another key.
"""

import contextlib
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from common.errors import ResourceError
from training.data.buckets import Placement
from training.models.weights import write_tensors

FORMAT = 2
"""Part of every key; to be raised when the encoding changes."""

TENSORS = {
    "latents": {"mean", "log_variance"},
    "masks": {"mask"},
    "text": {"hidden", "pooled"},
    "tokens": {"tokens"},
}
"""Names of the tensors in a file, by its folder."""

CHECKSUM = "crc32"
"""Name of the checksum in a file's metadata."""


@dataclass(frozen=True)
class CachedExample:
    """The files of an example in the cache."""

    name: str
    placement: Placement
    latents: Path
    text: Path
    """The embeddings of its caption, or the tokens if captions are encoded in each step."""
    variants: int
    """How many variants of the caption `text` holds."""
    empty_caption: Path
    """What replaces the caption where it is dropped."""
    mask: Path | None = None
    """The mask in the size of the latents; None: all of the image counts."""
    mask_weight: float = 1.0
    """Weight of what is outside the mask."""
    mirrored: "CachedExample | None" = None
    """Its mirror image, if that is trained on as well."""
    class_variants: frozenset[int] = frozenset()
    """The variants that have the trigger word."""
    class_text: Path | None = None
    """The same variants with the word for the kind of subject instead of the trigger word, if the run needs them."""


def read_latents(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance [C, h, w] of the VAE's posterior, fp32."""
    with _open_entry(path) as file:
        return file.get_tensor("mean"), file.get_tensor("log_variance")


def read_cached_mask(path: Path) -> torch.Tensor:
    """[1, h, w] fp32 in 0 .. 1: which share of each latent the mask holds."""
    with _open_entry(path) as file:
        return file.get_tensor("mask")


def read_text(path: Path, variant: int) -> dict[str, torch.Tensor]:
    """One variant of a caption: `hidden` states [tokens, D] and `pooled` embedding [P], or, if it is still to be encoded, `tokens`
    [2, chunks, 77]."""
    with _open_entry(path) as file:
        return {name: file.get_slice(name)[variant] for name in sorted(file.keys())}


@contextlib.contextmanager
def _open_entry(path: Path) -> Iterator[safe_open]:
    """Open a file of the cache. Raises ResourceError if it was removed or overwritten since the start of the run."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{path} cannot be read any more ({error}): run the same command again; what is missing in the cache is encoded again, "
            "and training resumes from the last checkpoint"
        ) from None


def entry(folder: Path, kind: Literal["latents", "masks", "text", "tokens"], *parts: str) -> Path:
    """The file in the cache `folder` for what depends on these `parts` alone."""
    key = hashlib.sha256("\0".join((str(FORMAT), *parts)).encode()).hexdigest()
    return folder / kind / f"{key}.safetensors"


def is_valid_entry(path: Path) -> bool:
    """Whether the file exists, holds the tensors that belong in its folder, and has the checksum that is written in it.

    Files of 1.0 have no checksum and are trusted if they have the size that their header describes.
    """
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != TENSORS[path.parent.name]:
                return False
            expected = (file.metadata() or {}).get(CHECKSUM)
            return expected is None or expected == _checksum({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except SafetensorError:
        return False


def write_entry(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write contiguous `tensors` on the CPU, with their checksum in the file's metadata."""
    write_tensors(path, tensors, {CHECKSUM: _checksum(tensors)})


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of the bytes of all tensors in the order of their names: fast, and it finds what a disk or a copy does to a file."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].view(torch.uint8).numpy(), total)
    return f"{total:08x}"
