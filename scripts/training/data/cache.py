"""Latents and text embeddings, computed once: keyed by content, written atomically, read back sample by sample.

A file holds one image, or one caption with its variants, so that it never depends on what else was encoded in the same run. Its
key covers everything that the value depends on: a changed image, crop, caption or encoder is another key.
"""

import contextlib
import gc
import hashlib
import json
import zlib
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
from common.errors import DataError, ResourceError
from common.images import open_rgb
from common.progress import ProgressBar
from training.config import DataSettings
from training.data.buckets import Placement
from training.data.captions import caption_variants, chunks_needed, encode_captions, text_beyond
from training.data.dataset import Example
from training.models.base_model import base_digest, find_or_download_tokenizers, tokenizers_digest
from training.models.loading import load_text_encoders, load_tokenizers, load_vae
from training.models.sdxl import BaseModel
from training.models.tensor_files import write_tensors
from training.system.process_group import ProcessGroup

FORMAT = 2
"""Part of every key; to be raised when the encoding changes."""

TENSORS = {"latents": {"mean", "log_variance"}, "text": {"hidden", "pooled"}}
"""Names of the tensors in a file, by its folder."""

CHECKSUM = "crc32"
"""Name of the checksum in a file's metadata."""

_WRITERS = 2
"""Threads that wait for the disk, and on a GPU for its results."""


@dataclass(frozen=True)
class CachedExample:
    """The files of an example in the cache."""

    name: str
    placement: Placement
    latents: Path
    embeddings: Path
    variants: int
    """How many variants of the caption `embeddings` holds."""


@dataclass(frozen=True)
class EncodedData:
    """Everything that training reads."""

    examples: list[CachedExample]
    held_out: list[CachedExample]
    empty_caption: Path
    """Embeddings of the empty caption."""


def read_latents(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance [C, h, w] of the VAE's posterior, fp32."""
    with _open_entry(path) as file:
        return file.get_tensor("mean"), file.get_tensor("log_variance")


def read_embedding(path: Path, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [tokens, D] and pooled embedding [P] of one variant of a caption."""
    with _open_entry(path) as file:
        return file.get_slice("hidden")[variant], file.get_slice("pooled")[variant]


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


@dataclass(frozen=True)
class Cache:
    """The paths in OUTPUT_DIR/cache."""

    folder: Path

    def latents_path(self, example: Example, placement: Placement, vae_digest: str) -> Path:
        """The file for the latents of an image in its bucket."""
        return self._path("latents", example.sha256 + example.revision, repr(placement), vae_digest)

    def embeddings_path(self, variants: Sequence[str], chunks: int, dtype: torch.dtype, encoders_digest: str) -> Path:
        """The file for the embeddings of a caption's variants."""
        return self._path("text", json.dumps(list(variants)), str(chunks), str(dtype), encoders_digest)

    def _path(self, kind: str, *parts: str) -> Path:
        key = hashlib.sha256("\0".join((str(FORMAT), *parts)).encode()).hexdigest()
        return self.folder / kind / f"{key}.safetensors"


class CacheEntries:
    """The files that a run needs."""

    def __init__(self, items: Sequence[tuple], group: ProcessGroup, workers: int):
        """`items`: (file, what is encoded into it ...) for each image or caption; equal ones share a file.

        The processes of a machine share the verification, each with `workers` threads; a damaged file is removed.
        """
        by_path = {item[0]: item for item in items}
        share = group.shard(list(by_path))
        for path, is_valid in zip(share, prefetch(is_valid_entry, share, workers), strict=True):
            if not is_valid and path.exists():
                print(f"{path} is damaged; it is encoded again", flush=True)
                path.unlink()
        group.barrier()
        self.paths: list[Path] = [item[0] for item in items]
        self.missing = [item for path, item in by_path.items() if not path.is_file()]
        self.summary = f"{len(self.missing)} encoded, {len(by_path) - len(self.missing)} in the cache"


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


@dataclass(frozen=True)
class CacheBuilder:
    """Encodes what is missing in the cache. The values depend on images, captions and these fields."""

    base: BaseModel
    models_dir: Path
    """Where the tokenizers of a single-file base model are."""
    cache: Cache
    device: torch.device
    dtype: torch.dtype
    """Of the embeddings as they are stored; they are computed in fp32."""
    group: ProcessGroup = field(default_factory=ProcessGroup)
    """The processes of each machine share the work."""
    concurrent: bool = False
    """Whether there is memory for all encoders together: captions are then encoded beside the images."""

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether a GPU's fp32 products may round their factors to 11 bits (TF32), as torch's convolutions do by default: if
        embeddings are stored with 8 (bf16) or 11 bits (fp16) anyway. Latents are stored in fp32; their key records it."""
        return self.dtype != torch.float32

    def build(
        self,
        trained: Sequence[tuple[Example, Placement]],
        held_out: Sequence[tuple[Example, Placement]],
        settings: DataSettings,
        trigger_word: str,
        seed: int,
    ) -> EncodedData:
        """Encode every image and caption that the cache lacks, and free the encoders. Prints which text is cut from captions."""
        images = [*trained, *held_out]
        captions = [example.caption for example, _ in images]
        count, shuffle, workers = settings.caption_variants, settings.caption_shuffle, settings.dataloader_num_workers
        variants = [caption_variants(caption, trigger_word, count, shuffle, seed) for caption in captions]
        tokenizers = load_tokenizers(self.base, self.models_dir)
        chunks = chunks_needed(captions, tokenizers, settings.caption_chunks)
        for example, _ in images:
            if cut := text_beyond(chunks, example.caption, tokenizers):
                print(f"{example.name}: its caption is longer than {CHUNK_TOKENS * chunks} tokens; training does not see: {cut}")

        latents, embeddings = self.find_latents(images, workers), self.find_embeddings([*variants, [""]], chunks, workers)
        self.group.barrier()  # all processes know what is missing before one writes
        total = len(self.group.shard(latents.missing)) + len(self.group.shard(embeddings.missing))
        with ProgressBar(total, "encode", "images and captions") as bar, _tensor_cores(enabled=self.uses_tensor_cores):
            encode_texts = partial(self._encode_captions, embeddings.missing, chunks, workers, bar)
            with in_background(encode_texts, start=self.concurrent) as texts_encoded:
                self._encode_images(latents.missing, workers, bar)
                self._free_memory()
                texts_encoded.result()
            self._free_memory()
        self.group.barrier()
        print(f"images: {latents.summary}; captions: {embeddings.summary}, {chunks} x {CHUNK_TOKENS} tokens", flush=True)

        *embedding_paths, empty_caption = embeddings.paths
        cached = [
            CachedExample(example.name, placement, latents_path, embedding_path, len(texts))
            for (example, placement), latents_path, embedding_path, texts in zip(
                images, latents.paths, embedding_paths, variants, strict=True
            )
        ]
        return EncodedData(cached[: len(trained)], cached[len(trained) :], empty_caption)

    def find_latents(self, images: Sequence[tuple[Example, Placement]], workers: int) -> CacheEntries:
        """The entry of each image."""
        digest = base_digest(self.base, self.cache.folder, "vae") + (" by tensor cores" if self.uses_tensor_cores else "")
        return CacheEntries([(self.cache.latents_path(*image, digest), *image) for image in images], self.group, workers)

    def find_embeddings(self, captions: Sequence[list[str]], chunks: int, workers: int) -> CacheEntries:
        """The entry of each caption; a caption is a list of variants."""
        digest = "".join(base_digest(self.base, self.cache.folder, name) for name in ("text_encoder", "text_encoder_2"))
        digest += tokenizers_digest(find_or_download_tokenizers(self.base, self.models_dir))
        items = [(self.cache.embeddings_path(texts, chunks, self.dtype, digest), texts) for texts in captions]
        return CacheEntries(items, self.group, workers)

    def _encode_images(self, missing: Sequence[tuple], workers: int, bar: tqdm) -> None:
        """Write this process's share of the missing latents."""
        if not (share := self.group.shard(missing)):
            return
        vae = load_vae(self.base, self.device)

        def posterior(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                distribution = vae.encode(pixels.to(self.device)).latent_dist
            return distribution.mean, distribution.logvar

        for _ in write_latents(share, posterior, workers):
            bar.update()

    def _encode_captions(self, missing: Sequence[tuple], chunks: int, workers: int, bar: tqdm) -> None:
        """Write this process's share of the missing embeddings."""
        if not (share := self.group.shard(missing)):
            return
        encoders = load_text_encoders(self.base, self.models_dir, self.device, torch.float32)
        for _ in write_embeddings(share, lambda texts: encode_captions(texts, encoders, chunks), self.dtype, workers):
            bar.update()

    def _free_memory(self) -> None:
        """Return the memory of encoders that are not referenced any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def write_latents(
    missing: Sequence[tuple[Path, Example, Placement]],
    encode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    workers: int,
) -> Iterator[Path]:
    """Encode each of the `missing` images (file, example, placement) and yield its file when it is written.

    `encode` takes pixels [1, 3, H, W] in -1 .. 1 (fp32, CPU) and returns mean and log-variance [1, C, h, w] of the VAE's
    posterior. `workers` threads decode images ahead of it; up to two write its results. Raises DataError naming an image whose
    latents are not finite.
    """
    pixels = prefetch(lambda item: image_pixels(item[1], item[2]), missing, workers)
    encoded = ((path, example, *encode(image[None])) for (path, example, _), image in zip(missing, pixels, strict=True))

    def write(item: tuple[Path, Example, torch.Tensor, torch.Tensor]) -> Path:
        path, example, *posterior = item
        mean, log_variance = (tensor[0].to("cpu", torch.float32).contiguous() for tensor in posterior)
        if not (mean.isfinite().all() and log_variance.isfinite().all()):
            raise DataError(f"{example.name}: the VAE returns NaN or infinity for this image; remove it, or use another VAE")
        write_entry(path, {"mean": mean, "log_variance": log_variance})
        return path

    return prefetch(write, encoded, min(workers, _WRITERS))


def write_embeddings(
    missing: Sequence[tuple[Path, Sequence[str]]],
    encode: Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]],
    dtype: torch.dtype,
    workers: int,
) -> Iterator[Path]:
    """Encode the variants of each of the `missing` captions (file, variants) and yield its file when it is written.

    `encode` returns hidden states [variants, tokens, D] and pooled embeddings [variants, P]; they are stored as `dtype`. Up to
    two of `workers` threads write them.
    """
    encoded = ((path, *encode(variants)) for path, variants in missing)

    def write(item: tuple[Path, torch.Tensor, torch.Tensor]) -> Path:
        path, hidden, pooled = item
        tensors = {"hidden": hidden.to("cpu", dtype).contiguous(), "pooled": pooled.to("cpu", dtype).contiguous()}
        write_entry(path, tensors)
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


@contextlib.contextmanager
def _tensor_cores(*, enabled: bool) -> Iterator[None]:
    """Let a GPU's fp32 products use its tensor cores within this block, if `enabled`; sums stay fp32."""
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
