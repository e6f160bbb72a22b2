"""Fill the caches: what is missing is encoded, and the encoders are freed again."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from prefetch import coming
from training.base_model import tokenizers_digest, tokenizers_of
from training.batches import CachedExample
from training.cache import Cache, encode_captions, encode_pictures, is_whole
from training.config import DataSettings
from training.digests import base_digest
from training.models import load_text_encoders, load_tokenizers, load_vae
from training.parts import BaseModel
from training.plan import Plan
from training.processes import Processes
from training.text import caption_variants, chunks_needed, cut_off, encode


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
    """Of each picture or caption; equal ones share a file."""
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
    """What the values in the cache depend on, beside pictures and captions."""

    base: BaseModel
    models_dir: Path
    """Where the tokenizers of a single-file base lie."""
    cache: Cache
    device: torch.device
    dtype: torch.dtype
    """Of the embeddings as they are kept; they are computed in fp32."""
    processes: Processes = field(default_factory=Processes)
    """Share the work: each process of a machine encodes a part of what this machine lacks."""
    at_once: bool = False
    """Whether there is memory for all encoders together; captions are then encoded beside the pictures."""

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether a GPU's fp32 products round their factors to 11 bits (TF32), as its convolutions do by torch's default: where
        embeddings are kept with 8 bits (bf16) or 11 (fp16) anyway. Latents are kept in fp32; their place tells how they
        were made."""
        return self.dtype != torch.float32

    def wanted_pictures(self, plan: Plan) -> Wanted:
        """Where the latents of each picture of `plan` lie."""
        digest = base_digest(self.base, self.cache.folder, "vae") + (" by tensor cores" if self.uses_tensor_cores else "")
        items = list(zip(plan.all_examples, plan.all_placements, strict=True))
        return Wanted.of([(self.cache.picture(example, placement, digest), example, placement) for example, placement in items])

    def wanted_captions(self, captions: Sequence[list[str]], chunks: int) -> Wanted:
        """Where the embeddings of each caption lie; a caption is a list of variants."""
        digest = "".join(base_digest(self.base, self.cache.folder, part) for part in ("text_encoder", "text_encoder_2"))
        digest += tokenizers_digest(tokenizers_of(self.base, self.models_dir))
        return Wanted.of([(self.cache.caption(variants, chunks, self.dtype, digest), variants) for variants in captions])

    def encode_pictures(self, wanted: Wanted, workers: int, bar: tqdm) -> None:
        """Encode this process's share of the pictures that are missing."""
        if not (own := self.processes.share(wanted.missing)):
            return
        vae = load_vae(self.base, self.device)

        def posterior(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                distribution = vae.encode(pixels.to(self.device)).latent_dist
            return distribution.mean, distribution.logvar

        for _ in encode_pictures(own, posterior, workers):
            bar.update()

    def encode_captions(self, wanted: Wanted, chunks: int, workers: int, bar: tqdm) -> None:
        """Encode this process's share of the captions that are missing."""
        if not (own := self.processes.share(wanted.missing)):
            return
        encoders = load_text_encoders(self.base, self.models_dir, self.device, torch.float32)
        for _ in encode_captions(own, lambda texts: encode(texts, encoders, chunks), self.dtype, workers):
            bar.update()

    def free(self) -> None:
        """Give back the memory of encoders that are done."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def encode_data(encoding: Encoding, plan: Plan, settings: DataSettings, trigger_word: str, seed: int) -> EncodedData:
    """Encode every picture and every caption of `plan` that is not in the cache yet. What a caption loses is said."""
    examples, workers = plan.all_examples, settings.dataloader_num_workers
    count, shuffle = settings.caption_variants, settings.caption_shuffle
    variants = [caption_variants(example.caption, trigger_word, count, shuffle, seed) for example in examples]
    tokenizers = load_tokenizers(encoding.base, encoding.models_dir)
    chunks = chunks_needed([example.caption for example in examples], tokenizers, settings.caption_chunks)
    for example in examples:
        if cut := cut_off(example.caption, tokenizers, chunks):
            print(f"{example.name}: its caption is longer than {75 * chunks} tokens; training does not see: {cut}")
    pictures, captions = encoding.wanted_pictures(plan), encoding.wanted_captions([*variants, [""]], chunks)
    encoding.processes.wait_for_all()  # nobody writes before all know what is missing
    share = encoding.processes.share
    total = len(share(pictures.missing)) + len(share(captions.missing))
    with tqdm(total=total, desc="encode", disable=None) as bar, _tensor_cores(encoding.uses_tensor_cores):
        encode_all = partial(encoding.encode_captions, captions, chunks, workers, bar)
        with coming(encode_all, begins_now=encoding.at_once) as captions_done:
            encoding.encode_pictures(pictures, workers, bar)
            encoding.free()
            captions_done()
        encoding.free()
    encoding.processes.wait_for_all()
    print(f"pictures: {pictures}; captions: {captions}, {chunks} x 75 tokens", flush=True)
    *embeddings, empty = captions.paths
    cached = [
        CachedExample(example.name, placement, latents, embedding, len(texts))
        for example, placement, latents, embedding, texts in zip(
            examples, plan.all_placements, pictures.paths, embeddings, variants, strict=True
        )
    ]
    trained = len(plan.examples)
    return EncodedData(cached[:trained], cached[trained:], empty)


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
