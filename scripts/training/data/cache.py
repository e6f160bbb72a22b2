"""Latents, masks and text embeddings, computed once: what the cache lacks is encoded, and the encoders are freed."""

import contextlib
import gc
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common.background import in_background, prefetch
from common.captions import has_trigger, replace_trigger
from common.clip_tokens import CHUNK_TOKENS
from common.errors import ModelError
from common.images import open_rgb, read_mask
from common.progress import ProgressBar
from common.triggers import contains, pieces_of
from training.config import DataSettings
from training.data.buckets import Placement
from training.data.cache_files import CachedExample, entry, is_valid_entry, write_entry
from training.data.captions import beginning, caption_variants, chunks_needed, encode_captions, text_beyond, tokens_of
from training.data.examples import Example
from training.models.base_model import base_digest, find_or_download_tokenizers, tokenizers_digest
from training.models.sdxl import TEXT_ENCODERS, BaseModel
from training.models.weights import load_text_encoders, load_tokenizers, load_vae, require_finite_weights
from training.system.process_group import ProcessGroup

_MAX_SHOWN = 60
"""Characters of a caption that a message repeats."""

LATENT_PX = 8
"""Pixels of an image's side for one of its latents."""

_WRITERS = 2
"""Threads that wait for the disk, and on a GPU for its results."""


class NotFiniteError(ModelError):
    """An encoder of the base model returns NaN or infinity."""


def _with_trigger(variants: Sequence[str], trigger: str) -> frozenset[int]:
    """The numbers of the variants that have the trigger word, if there is one."""
    return frozenset(number for number, text in enumerate(variants) if trigger and has_trigger(text, trigger))


def _side(example: Example) -> str:
    """The part of a key that tells an image and its mirror image apart."""
    return " mirrored" if example.is_mirrored else ""


def report_cut_text(examples: Iterable[Example], chunks: int, tokenizers: tuple) -> None:
    """Print what `chunks` do not hold of the captions, and whether the trigger word is part of it."""
    for example in examples:
        for caption in example.captions:
            if cut := text_beyond(chunks, caption, tokenizers):
                which = f"its caption is longer than {CHUNK_TOKENS * chunks} tokens"
                is_lost = not contains(pieces_of(beginning(chunks, caption, tokenizers)), pieces_of(example.trigger))
                lost = f" (the trigger word {example.trigger!r} is not in what it sees; put it first)" if is_lost else ""
                print(f"{example.name}: {which}; training does not see: {cut}{lost}")


@dataclass(frozen=True)
class CacheBuilder:
    """Encodes what is missing in the cache. The values depend on images, captions and these fields."""

    base: BaseModel
    models_dir: Path
    """Where the tokenizers of a single-file base model are."""
    folder: Path
    """The cache."""
    device: torch.device
    dtype: torch.dtype
    """Of the embeddings as they are stored; they are computed in fp32."""
    group: ProcessGroup = field(default_factory=ProcessGroup)
    """The processes of each machine share the work."""
    concurrent: bool = False
    """Whether there is memory for all encoders together: captions are then encoded beside the images."""
    only_tokens: bool = False
    """Captions and prompts are not encoded, because the text encoders change."""

    def build(
        self,
        images: Sequence[tuple[Example, Placement]],
        settings: DataSettings,
        seed: int,
        prompts: Sequence[str] = (),
        subject_class: str = "",
    ) -> tuple[list[CachedExample], dict[str, Path]]:
        """Encode every image, caption and prompt that the cache lacks, and free the encoders. Captions are encoded the same way
        whatever the prompts are. With `subject_class`, they are encoded with the class of their folder, or else this one,
        for the trigger word, too.

        Returns the examples, and the file of each prompt. Prints which text is cut from captions.
        """
        captions = [line for example, _ in images for line in example.captions]
        count, shuffle, workers = settings.caption_variants, settings.caption_shuffle, settings.dataloader_num_workers
        variants = [caption_variants(example.caption, example.trigger, count, shuffle, seed) for example, _ in images]
        tokenizers = load_tokenizers(self.base, self.models_dir)
        chunks = chunks_needed(captions, tokenizers, settings.caption_chunks)
        report_cut_text({example.path: example for example, _ in images}.values(), chunks, tokenizers)
        prompt_chunks = chunks_needed(list(prompts), tokenizers, settings.caption_chunks)

        mirrored = [(replace(example, is_mirrored=True), place) for example, place in images] if settings.flip else []
        latents, masks = self.latents_entries([*images, *mirrored]), self.masks_entries([*images, *mirrored])
        texts = self.text_entries([*variants, [""]], chunks)
        of_prompts = self.text_entries([[prompt] for prompt in prompts], prompt_chunks)
        with_class = [
            [replace_trigger(text, example.trigger, example.class_word or subject_class) for text in of_caption]
            if example.trigger
            else of_caption
            for (example, _), of_caption in zip(images, variants, strict=True)
        ]
        of_class = self.text_entries(with_class if subject_class else [], chunks)
        new_latents, images_found = self._missing(latents, workers)
        new_masks, _ = self._missing([entry for entry in masks if entry], workers)
        new_texts, captions_found = self._missing([*texts, *of_prompts, *of_class], workers)
        self.group.barrier()  # all processes know what is missing before one writes
        shares = self.group.shard(new_latents), self.group.shard(new_texts), self.group.shard(new_masks)
        self._encode(*shares, tokenizers, workers)
        self.group.barrier()
        print(f"images: {images_found}; captions: {captions_found}, {chunks} x {CHUNK_TOKENS} tokens", flush=True)

        *caption_paths, empty_caption = (path for path, _, _ in texts)
        class_paths = [path for path, _, _ in of_class] or [None] * len(caption_paths)
        copies = 2 if mirrored else 1
        examples = [
            CachedExample(
                name=example.name,
                placement=placement,
                latents=path,
                text=caption_path,
                variants=len(of_caption),
                empty_caption=empty_caption,
                mask=mask and mask[0],
                mask_weight=settings.mask_weight if example.mask_weight is None else example.mask_weight,
                class_variants=_with_trigger(of_caption, example.trigger),
                class_text=class_path,
            )
            for (path, example, placement), mask, caption_path, class_path, of_caption in zip(
                latents, masks, caption_paths * copies, class_paths * copies, variants * copies, strict=True
            )
        ]
        if mirrored:
            pairs = zip(examples[: len(images)], examples[len(images) :], strict=True)
            examples = [replace(example, mirrored=other) for example, other in pairs]
        return examples, {prompt: path for path, (prompt,), _ in of_prompts}

    def _encode(self, latents: list[tuple], texts: list[tuple], masks: list[tuple], tokenizers: tuple, workers: int) -> None:
        """Encode these entries and write their files, and free the encoders."""
        with (
            ProgressBar(len(latents) + len(texts) + len(masks), "encode", "images and captions") as bar,
            _tensor_cores(enabled=self.uses_tensor_cores),
        ):
            encode_texts = partial(self._encode_captions, texts, tokenizers, workers, bar)
            with in_background(encode_texts, start=self.concurrent) as texts_encoded:
                self._encode_images(latents, workers, bar)
                self._free_memory()
                for _ in prefetch(lambda item: write_mask(*item), masks, workers):
                    bar.update()
                texts_encoded.result()
            self._free_memory()

    def _missing(self, entries: Sequence[tuple], workers: int) -> tuple[list[tuple], str]:
        """Those of the entries (file, what is encoded into it ...) that have to be encoded, one for each file; and how many those
        are, for the log.

        The processes of a machine share the verification, each with `workers` threads; a damaged file is removed.
        """
        by_path = {entry[0]: entry for entry in entries}
        share = self.group.shard(list(by_path))
        for path, is_valid in zip(share, prefetch(is_valid_entry, share, workers), strict=True):
            if not is_valid and path.exists():
                print(f"{path} is damaged; it is encoded again", flush=True)
                path.unlink()
        self.group.barrier()
        missing = [entry for path, entry in by_path.items() if not path.is_file()]
        return missing, f"{len(missing)} encoded, {len(by_path) - len(missing)} in the cache"

    def latents_entries(self, images: Sequence[tuple[Example, Placement]]) -> list[tuple[Path, Example, Placement]]:
        """The file of each image, with the image."""
        digest = base_digest(self.base, self.folder, "vae") + (" by tensor cores" if self.uses_tensor_cores else "")
        return [
            (entry(self.folder, "latents", example.sha256 + example.revision, repr(place), digest + _side(example)), example, place)
            for example, place in images
        ]

    def masks_entries(self, images: Sequence[tuple[Example, Placement]]) -> list[tuple[Path, Example, Placement] | None]:
        """The file of the mask of each image, with the image; None for an image without a mask."""
        return [
            (entry(self.folder, "masks", example.mask_key, repr(place) + _side(example)), example, place) if example.mask else None
            for example, place in images
        ]

    def text_entries(self, captions: Sequence[list[str]], chunks: int) -> list[tuple[Path, list[str], int]]:
        """The file of each caption, a list of variants, with the caption and its number of chunks."""
        of_tokenizers = tokenizers_digest(find_or_download_tokenizers(self.base, self.models_dir))
        if self.only_tokens:
            rest = str(chunks), of_tokenizers
            return [(entry(self.folder, "tokens", json.dumps(texts), *rest), texts, chunks) for texts in captions]
        digest = "".join(base_digest(self.base, self.folder, name) for name in TEXT_ENCODERS) + of_tokenizers
        rest = str(chunks), str(self.dtype), digest
        return [(entry(self.folder, "text", json.dumps(texts), *rest), texts, chunks) for texts in captions]

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether a GPU's fp32 products may round their factors to 11 bits (TF32), as torch's convolutions do by default: if
        embeddings are stored with 8 (bf16) or 11 bits (fp16) anyway. Latents are stored in fp32; their key records it."""
        return self.dtype != torch.float32

    def _encode_images(self, share: Sequence[tuple[Path, Example, Placement]], workers: int, bar: tqdm) -> None:
        """Write this process's share of the missing latents."""
        if not share:
            return
        vae = load_vae(self.base, self.device)

        def posterior(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                distribution = vae.encode(pixels.to(self.device)).latent_dist
            return distribution.mean, distribution.logvar

        with self._blaming_weights("vae"):
            for _ in write_latents(share, posterior, workers):
                bar.update()

    def _encode_captions(self, share: Sequence[tuple[Path, list[str], int]], tokenizers: tuple, workers: int, bar: tqdm) -> None:
        """Write this process's share of the missing captions."""
        if self.only_tokens:
            for path, texts, chunks in share:
                write_entry(path, {"tokens": tokens_of(texts, tokenizers, chunks)})
                bar.update()
            return
        if not share:
            return
        encoders = load_text_encoders(self.base, self.device, torch.float32)
        with self._blaming_weights(*TEXT_ENCODERS):
            for chunks in sorted({chunks for _, _, chunks in share}):
                encode = partial(encode_captions, tokenizers=tokenizers, encoders=encoders, chunks=chunks)
                missing = [(path, texts) for path, texts, count in share if count == chunks]
                for _ in write_embeddings(missing, encode, self.dtype, workers):
                    bar.update()

    @contextlib.contextmanager
    def _blaming_weights(self, *names: str) -> Iterator[None]:
        """If an encoder returns NaN or infinity, name the weight that holds it; the encoder's own error stays if all are finite."""
        try:
            yield
        except NotFiniteError:
            require_finite_weights(self.base, names, torch.float32)  # they compute in fp32
            raise

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
    posterior. `workers` threads decode images ahead of it; up to two write its results. Raises NotFiniteError naming an image
    whose latents are not finite; nothing is written for it.
    """
    pixels = prefetch(lambda item: image_pixels(item[1], item[2]), missing, workers)
    encoded = ((path, example, *encode(image[None])) for (path, example, _), image in zip(missing, pixels, strict=True))

    def write(item: tuple[Path, Example, torch.Tensor, torch.Tensor]) -> Path:
        path, example, *posterior = item
        mean, log_variance = (tensor[0].to("cpu", torch.float32).contiguous() for tensor in posterior)
        if not (mean.isfinite().all() and log_variance.isfinite().all()):
            raise NotFiniteError(f"{example.name}: the VAE returns NaN or infinity for this image; use another base model")
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
    two of `workers` threads write them. Raises NotFiniteError naming a caption whose embeddings are not finite, or not in
    `dtype`; nothing is written for it.
    """
    encoded = ((path, variants, *encode(variants)) for path, variants in missing)

    def write(item: tuple[Path, Sequence[str], torch.Tensor, torch.Tensor]) -> Path:
        path, variants, hidden, pooled = item
        tensors = {"hidden": hidden.to("cpu", dtype).contiguous(), "pooled": pooled.to("cpu", dtype).contiguous()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            caption = repr(variants[0][:_MAX_SHOWN])
            if hidden.isfinite().all() and pooled.isfinite().all():
                raise NotFiniteError(f"the embeddings of the caption {caption} are too large for fp16: set MIXED_PRECISION=bf16")
            raise NotFiniteError(f"the text encoders return NaN or infinity for the caption {caption}; use another base model")
        write_entry(path, tensors)
        return path

    return prefetch(write, encoded, min(workers, _WRITERS))


def write_mask(path: Path, example: Example, placement: Placement) -> None:
    """Write the share of the mask in each latent of an image into its file."""
    alpha = _fitted(read_mask(example.mask, example.path).alpha, example, placement)
    pixels = torch.from_numpy(np.asarray(alpha, dtype=np.float32))[None] / 255
    write_entry(path, {"mask": torch.nn.functional.avg_pool2d(pixels, LATENT_PX)})


def image_pixels(example: Example, placement: Placement) -> torch.Tensor:
    """[3, H, W] fp32 in -1 .. 1: the image scaled with Lanczos and cropped to its bucket."""
    cropped = np.asarray(_fitted(open_rgb(example.path), example, placement), dtype=np.float32)
    return torch.from_numpy(cropped).permute(2, 0, 1) / 127.5 - 1.0


def _fitted(image: Image.Image, example: Example, placement: Placement) -> Image.Image:
    """The image of an example, or its mask, of which the bucket holds the same part."""
    size = (placement.resized_width, placement.resized_height)
    if example.is_mirrored:
        image = ImageOps.mirror(image)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    right, bottom = placement.left + placement.bucket.width, placement.top + placement.bucket.height
    return image.crop((placement.left, placement.top, right, bottom))


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
