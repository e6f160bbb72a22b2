"""Pictures and captions encoded once: keyed by content, written whole, read back sample by sample.

The unit is one picture, or one caption with its variants, so what is in the cache never depends on what else was
encoded that day. A key covers everything that the value depends on; a changed picture, crop, caption or encoder is
another key. Files that cannot be read are encoded anew.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from errors import DataError
from pictures import open_rgb
from prefetch import prefetched
from training.buckets import Placement
from training.dataset import Example
from training.tensor_files import write_tensors

FORMAT = 2
"""Part of every key: to be raised when the encoding changes."""
TENSORS = {"latents": {"mean", "log_variance"}, "text": {"hidden", "pooled"}}
"""What a file in each folder holds."""
_WRITERS = 2
"""Threads that wait for the disk, and on a GPU for the answer."""


@dataclass(frozen=True)
class Cache:
    """`OUTPUT_DIR/cache`: one file per picture and one per caption."""

    folder: Path

    def picture(self, example: Example, placement: Placement, vae_fingerprint: str) -> Path:
        """Where the latents of a picture in its bucket lie."""
        return self._path("latents", example.sha256, repr(placement), vae_fingerprint)

    def caption(self, variants: Sequence[str], chunks: int, dtype: torch.dtype, encoders_fingerprint: str) -> Path:
        """Where the embeddings of a caption's variants lie."""
        return self._path("text", json.dumps(list(variants)), str(chunks), str(dtype), encoders_fingerprint)

    def _path(self, kind: str, *parts: str) -> Path:
        key = hashlib.sha256("\0".join((str(FORMAT), *parts)).encode()).hexdigest()
        return self.folder / kind / f"{key}.safetensors"


def is_whole(path: Path) -> bool:
    """Whether a cache file is there, its header fits its size, and it holds what is kept in its folder."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()) == TENSORS[path.parent.name]
    except SafetensorError:
        return False


def encode_pictures(
    todo: Sequence[tuple[Path, Example, Placement]],
    encode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    workers: int,
) -> Iterator[Path]:
    """Encode each picture of `todo` (cache file, example, placement) and yield the file when it is written.

    `encode` takes pixels [1, 3, H, W] in -1 .. 1 (fp32, CPU) and returns mean and log-variance [1, C, h, w] of the VAE's
    posterior. `workers` threads decode pictures ahead of it, and two write what it answers. Raises DataError naming a picture
    whose latents are not finite.
    """
    pixels = prefetched(lambda item: picture_pixels(item[1], item[2]), todo, workers)
    encoded = ((path, example, *encode(picture[None])) for (path, example, _), picture in zip(todo, pixels, strict=True))

    def write(item: tuple[Path, Example, torch.Tensor, torch.Tensor]) -> Path:
        path, example, *posterior = item
        mean, log_variance = (part[0].to("cpu", torch.float32).contiguous() for part in posterior)
        if not (mean.isfinite().all() and log_variance.isfinite().all()):
            raise DataError(f"{example.name}: the VAE answers with NaN or infinity for this picture; remove it, or use another VAE")
        write_tensors(path, {"mean": mean, "log_variance": log_variance})
        return path

    return prefetched(write, encoded, min(workers, _WRITERS))


def encode_captions(
    todo: Sequence[tuple[Path, Sequence[str]]],
    encode: Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]],
    dtype: torch.dtype,
    workers: int,
) -> Iterator[Path]:
    """Encode the variants of each caption of `todo` (cache file, variants) and yield the file when it is written.

    `encode` returns hidden states [variants, tokens, D] and pooled embeddings [variants, P]; they are kept as `dtype`.
    Threads write them if there are `workers`.
    """
    encoded = ((path, *encode(variants)) for path, variants in todo)

    def write(item: tuple[Path, torch.Tensor, torch.Tensor]) -> Path:
        path, hidden, pooled = item
        tensors = {"hidden": hidden.to("cpu", dtype).contiguous(), "pooled": pooled.to("cpu", dtype).contiguous()}
        write_tensors(path, tensors)
        return path

    return prefetched(write, encoded, min(workers, _WRITERS))


def picture_pixels(example: Example, placement: Placement) -> torch.Tensor:
    """[3, H, W] fp32 in -1 .. 1: the picture scaled with Lanczos and cropped to its bucket."""
    size = (placement.resized_width, placement.resized_height)
    image = open_rgb(example.path)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    right, bottom = placement.left + placement.bucket.width, placement.top + placement.bucket.height
    cropped = np.asarray(image.crop((placement.left, placement.top, right, bottom)), dtype=np.float32)
    return torch.from_numpy(cropped).permute(2, 0, 1) / 127.5 - 1.0


def read_latents(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance [C, h, w], fp32."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("mean"), file.get_tensor("log_variance")


def read_embedding(path: Path, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [tokens, D] and pooled embedding [P] of one variant."""
    with safe_open(path, framework="pt") as file:
        return file.get_slice("hidden")[variant], file.get_slice("pooled")[variant]
