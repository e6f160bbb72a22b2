"""Fill the caches: what is missing is encoded, and the encoders are freed again."""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from training.batches import CachedExample
from training.cache import Cache, encode_captions, encode_pictures, is_whole, remembered
from training.config import DataSettings
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

    def pictures(self, plan: Plan, workers: int) -> list[Path]:
        """Encode the pictures that the cache does not hold; where the latents of each lie."""
        digest = base_digest(self.base, self.cache, "vae")
        items = list(zip(plan.all_examples, plan.all_placements, strict=True))
        paths = [self.cache.picture(example, placement, digest) for example, placement in items]
        missing = {path: (path, *item) for path, item in zip(paths, items, strict=True) if not is_whole(path)}
        if own := self._share_of(missing):
            vae = load_vae(self.base, self.device)

            def posterior(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                with torch.no_grad():
                    distribution = vae.encode(pixels.to(self.device)).latent_dist
                return distribution.mean, distribution.logvar

            _exhaust(encode_pictures(own, posterior, workers), "encode pictures", len(own))
            del vae, posterior
            self._free()
        self.processes.wait_for_all()
        print(f"pictures: {len(missing)} encoded, {len(set(paths)) - len(missing)} in the cache", flush=True)
        return paths

    def captions(self, captions: Sequence[list[str]], chunks: int) -> list[Path]:
        """Encode the captions, each a list of variants, that the cache does not hold; where the embeddings of each lie."""
        digest = "".join(base_digest(self.base, self.cache, part) for part in ("text_encoder", "text_encoder_2"))
        paths = [self.cache.caption(variants, chunks, self.dtype, digest) for variants in captions]
        missing = {path: (path, variants) for path, variants in zip(paths, captions, strict=True) if not is_whole(path)}
        if own := self._share_of(missing):
            encoders = load_text_encoders(self.base, self.models_dir, self.device, torch.float32)
            encoded = encode_captions(own, lambda texts: encode(texts, encoders, chunks), self.dtype)
            _exhaust(encoded, "encode captions", len(own))
            del encoders, encoded
            self._free()
        self.processes.wait_for_all()
        print(f"captions: {len(missing)} encoded, {len(set(paths)) - len(missing)} in the cache, {chunks} x 75 tokens", flush=True)
        return paths

    def _share_of(self, missing: dict[Path, tuple]) -> list[tuple]:
        """What this process encodes; nobody begins before all know what is missing."""
        self.processes.wait_for_all()
        return list(self.processes.share(list(missing.values())))

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def encode_data(encoding: Encoding, plan: Plan, settings: DataSettings, trigger_word: str, seed: int) -> EncodedData:
    """Encode every picture and every caption of `plan` that is not in the cache yet. What a caption loses is said."""
    latents = encoding.pictures(plan, settings.dataloader_num_workers)
    count, shuffle = settings.caption_variants, settings.caption_shuffle
    examples = plan.all_examples
    variants = [caption_variants(example.caption, trigger_word, count, shuffle, seed) for example in examples]
    tokenizers = load_tokenizers(encoding.base, encoding.models_dir)
    chunks = chunks_needed([example.caption for example in examples], tokenizers, settings.caption_chunks)
    for example in examples:
        if cut := cut_off(example.caption, tokenizers, chunks):
            print(f"{example.name}: its caption is longer than {75 * chunks} tokens; training does not see: {cut}")
    *captions, empty = encoding.captions([*variants, [""]], chunks)
    cached = [
        CachedExample(example.name, placement, latent, caption, len(texts))
        for example, placement, latent, caption, texts in zip(
            examples, plan.all_placements, latents, captions, variants, strict=True
        )
    ]
    trained = len(plan.examples)
    return EncodedData(cached[:trained], cached[trained:], empty)


def base_digest(base: BaseModel, cache: Cache, part: str) -> str:
    """SHA-256 of one part of the base model, remembered from run to run."""
    network = base.parts[part]
    files = sorted({file.path for file in network.files})
    return remembered(cache.folder / "digests.json", part, files, network.digest)


def _exhaust(work: Iterable, what: str, total: int) -> None:
    """Do all of `work`, with a progress bar."""
    for _ in tqdm(work, what, total, disable=None):
        pass
