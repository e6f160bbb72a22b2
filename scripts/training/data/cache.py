"""Images and captions encoded once: keyed by content, written whole, read back sample by sample.

The unit is one image, or one caption with its variants, so what is in the cache never depends on what else was
encoded that day. A key covers everything that the value depends on; a changed image, crop, caption or encoder is
another key. Files that cannot be read are encoded anew.

Fill the caches: what is missing is encoded, and the encoders are freed again.
"""

import contextlib
import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from common.background import in_background, prefetch
from common.clip_tokens import CHUNK_TOKENS
from common.errors import DataError
from common.images import open_rgb
from training.config import DataSettings
from training.data.buckets import Placement
from training.data.captions import caption_variants, chunks_needed, cut_off, encode
from training.data.dataset import Example
from training.models.base_model import base_digest, find_or_download_tokenizers, tokenizers_digest
from training.models.loading import load_text_encoders, load_tokenizers, load_vae
from training.models.sdxl import BaseModel
from training.models.weights import write_tensors
from training.system.process_group import ProcessGroup

FORMAT = 2
"""Part of every key: to be raised when the encoding changes."""


TENSORS = {"latents": {"mean", "log_variance"}, "text": {"hidden", "pooled"}}
"""What a file in each folder holds."""


_WRITERS = 2
"""Threads that wait for the disk, and on a GPU for the answer."""


@dataclass(frozen=True)
class Cache:
    """`OUTPUT_DIR/cache`: one file per image and one per caption."""

    folder: Path

    def image(self, example: Example, placement: Placement, vae_fingerprint: str) -> Path:
        """Where the latents of an image in its bucket lie."""
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


def encode_images(
    todo: Sequence[tuple[Path, Example, Placement]],
    encode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    workers: int,
) -> Iterator[Path]:
    """Encode each image of `todo` (cache file, example, placement) and yield the file when it is written.

    `encode` takes pixels [1, 3, H, W] in -1 .. 1 (fp32, CPU) and returns mean and log-variance [1, C, h, w] of the VAE's
    posterior. `workers` threads decode images ahead of it, and two write what it answers. Raises DataError naming an image
    whose latents are not finite.
    """
    pixels = prefetch(lambda item: image_pixels(item[1], item[2]), todo, workers)
    encoded = ((path, example, *encode(image[None])) for (path, example, _), image in zip(todo, pixels, strict=True))

    def write(item: tuple[Path, Example, torch.Tensor, torch.Tensor]) -> Path:
        path, example, *posterior = item
        mean, log_variance = (part[0].to("cpu", torch.float32).contiguous() for part in posterior)
        if not (mean.isfinite().all() and log_variance.isfinite().all()):
            raise DataError(f"{example.name}: the VAE answers with NaN or infinity for this image; remove it, or use another VAE")
        write_tensors(path, {"mean": mean, "log_variance": log_variance})
        return path

    return prefetch(write, encoded, min(workers, _WRITERS))


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

    return prefetch(write, encoded, min(workers, _WRITERS))


def image_pixels(example: Example, placement: Placement) -> torch.Tensor:
    """[3, H, W] fp32 in -1 .. 1: the image scaled with Lanczos and cropped to its bucket."""
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


@dataclass(frozen=True)
class CachedExample:
    """Where the parts of an example lie."""

    name: str
    placement: Placement
    latents: Path
    embeddings: Path
    variants: int
    """How many variants of the caption `embeddings` holds."""


@dataclass(frozen=True)
class EncodedData:
    """Where everything lies that training reads."""

    examples: list[CachedExample]
    held_out: list[CachedExample]
    empty_caption: Path


@dataclass(frozen=True)
class Wanted:
    """Files of the cache that training reads."""

    paths: list[Path]
    """Of each image or caption; equal ones share a file."""
    missing: list[tuple]
    """What has to be encoded: the file, and what goes into it."""

    @classmethod
    def of(cls, items: Sequence[tuple]) -> "Wanted":
        missing = {item[0]: item for item in items if not is_whole(item[0])}
        return cls([item[0] for item in items], list(missing.values()))

    def __str__(self) -> str:
        return f"{len(self.missing)} encoded, {len(set(self.paths)) - len(self.missing)} in the cache"


@dataclass(frozen=True)
class Encoding:
    """What the values in the cache depend on, beside images and captions."""

    base: BaseModel
    models_dir: Path
    """Where the tokenizers of a single-file base lie."""
    cache: Cache
    device: torch.device
    dtype: torch.dtype
    """Of the embeddings as they are kept; they are computed in fp32."""
    processes: ProcessGroup = field(default_factory=ProcessGroup)
    """Share the work: each process of a machine encodes a part of what this machine lacks."""
    at_once: bool = False
    """Whether there is memory for all encoders together; captions are then encoded beside the images."""

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether a GPU's fp32 products round their factors to 11 bits (TF32), as its convolutions do by torch's default: where
        embeddings are kept with 8 bits (bf16) or 11 (fp16) anyway. Latents are kept in fp32; their place tells how they
        were made."""
        return self.dtype != torch.float32

    def wanted_images(self, images: Sequence[tuple[Example, Placement]]) -> Wanted:
        """Where the latents of each of `images` lie."""
        digest = base_digest(self.base, self.cache.folder, "vae") + (" by tensor cores" if self.uses_tensor_cores else "")
        return Wanted.of([(self.cache.image(example, placement, digest), example, placement) for example, placement in images])

    def wanted_captions(self, captions: Sequence[list[str]], chunks: int) -> Wanted:
        """Where the embeddings of each caption lie; a caption is a list of variants."""
        digest = "".join(base_digest(self.base, self.cache.folder, part) for part in ("text_encoder", "text_encoder_2"))
        digest += tokenizers_digest(find_or_download_tokenizers(self.base, self.models_dir))
        return Wanted.of([(self.cache.caption(variants, chunks, self.dtype, digest), variants) for variants in captions])

    def encode_images(self, wanted: Wanted, workers: int, bar: tqdm) -> None:
        """Encode this process's share of the images that are missing."""
        if not (own := self.processes.shard(wanted.missing)):
            return
        vae = load_vae(self.base, self.device)

        def posterior(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                distribution = vae.encode(pixels.to(self.device)).latent_dist
            return distribution.mean, distribution.logvar

        for _ in encode_images(own, posterior, workers):
            bar.update()

    def encode_captions(self, wanted: Wanted, chunks: int, workers: int, bar: tqdm) -> None:
        """Encode this process's share of the captions that are missing."""
        if not (own := self.processes.shard(wanted.missing)):
            return
        encoders = load_text_encoders(self.base, self.models_dir, self.device, torch.float32)
        for _ in encode_captions(own, lambda texts: encode(texts, encoders, chunks), self.dtype, workers):
            bar.update()

    def free(self) -> None:
        """Give back the memory of encoders that are done."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def encode_data(
    encoding: Encoding,
    trained: Sequence[tuple[Example, Placement]],
    held_out: Sequence[tuple[Example, Placement]],
    settings: DataSettings,
    trigger_word: str,
    seed: int,
) -> EncodedData:
    """Encode every image and every caption that is not in the cache yet. Text that a caption loses is printed."""
    placed = [*trained, *held_out]
    examples, workers = [example for example, _ in placed], settings.dataloader_num_workers
    count, shuffle = settings.caption_variants, settings.caption_shuffle
    variants = [caption_variants(example.caption, trigger_word, count, shuffle, seed) for example in examples]
    tokenizers = load_tokenizers(encoding.base, encoding.models_dir)
    chunks = chunks_needed([example.caption for example in examples], tokenizers, settings.caption_chunks)
    for example in examples:
        if cut := cut_off(example.caption, tokenizers, chunks):
            print(f"{example.name}: its caption is longer than {CHUNK_TOKENS * chunks} tokens; training does not see: {cut}")
    images, captions = encoding.wanted_images(placed), encoding.wanted_captions([*variants, [""]], chunks)
    encoding.processes.barrier()  # nobody writes before all know what is missing
    share = encoding.processes.shard
    total = len(share(images.missing)) + len(share(captions.missing))
    with tqdm(total=total, desc="encode", disable=None) as bar, _tensor_cores(encoding.uses_tensor_cores):
        encode_all = partial(encoding.encode_captions, captions, chunks, workers, bar)
        with in_background(encode_all, start=encoding.at_once) as captions_done:
            encoding.encode_images(images, workers, bar)
            encoding.free()
            captions_done.result()
        encoding.free()
    encoding.processes.barrier()
    print(f"images: {images}; captions: {captions}, {chunks} x {CHUNK_TOKENS} tokens", flush=True)
    *embeddings, empty = captions.paths
    cached = [
        CachedExample(example.name, placement, latents, embedding, len(texts))
        for (example, placement), latents, embedding, texts in zip(placed, images.paths, embeddings, variants, strict=True)
    ]
    return EncodedData(cached[: len(trained)], cached[len(trained) :], empty)


@contextlib.contextmanager
def _tensor_cores(wanted: bool) -> Iterator[None]:
    """Within this block a GPU's fp32 products use them if that is `wanted`; sums stay fp32."""
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
