"""Drawn images with their tags and people, and their captions as tokens."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTokenizer

from benchmarks.world.drawing import draw
from benchmarks.world.people import ALL_TAGS, Identity, random_identity, random_shot, simple_identity, simple_shot, tags

TAG_DROPOUT, HEAVY_SHARE, CAPTION_DROPOUT, NAME_SHARE = 0.05, 0.4, 0.1, 0.3
"""Shares: of the tags that a caption leaves out, of captions that leave out many more, of captions that are empty, and of captions
that begin with a meaningless name, so that the trigger word of a LoRA is nothing unheard of."""
NAMES = 4096
CONTEXT = 77
_CHUNK = 250


@dataclass(frozen=True)
class Drawn:
    """Images with what they show."""

    images: torch.Tensor
    """[N, 3, px, px], uint8, on the CPU."""
    people: list[Identity]
    captions: list[list[str]]


def drawn(count: int, px: int, file: Path, seed: int, is_simple: bool = False) -> Drawn:
    """`count` images of as many people, other ones for each seed; drawn by all CPU cores into `file` unless it exists.

    The people and tags are in a file next to it.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        np.lib.format.open_memmap(unfinished, "w+", np.uint8, (count, 3, px, px))
        chunks = [range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
        workers = min(os.cpu_count() or 1, len(chunks))
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            subjects = chain.from_iterable(pool.map(partial(_draw_into, unfinished, seed, px, is_simple), chunks))
            people, captions = zip(*subjects, strict=True)
        file.with_suffix(".json").write_text(json.dumps([people, captions]), "utf-8")
        unfinished.replace(file)
    people, captions = json.loads(file.with_suffix(".json").read_text("utf-8"))
    return Drawn(torch.from_numpy(np.load(file, mmap_mode="c")), [Identity(tuple(traits)) for traits in people], captions)


def _draw_into(file: Path, seed: int, px: int, is_simple: bool, numbers: range) -> list[tuple]:
    images = np.lib.format.open_memmap(file, "r+")
    identity_of, shot_of = (simple_identity, simple_shot) if is_simple else (random_identity, random_shot)
    found = []
    for number in numbers:
        generator = np.random.default_rng((seed, number))
        person, shot = identity_of(generator), shot_of(generator)
        images[number] = np.asarray(draw(person, shot, px)).transpose(2, 0, 1)
        found.append((person.traits, tags(person, shot)))
    return found


class CaptionTokens:
    """Captions of many images as tokens on a device, assembled there from those of single tags."""

    def __init__(self, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], captions: list[list[str]], device: torch.device):
        first = tokenizers[0]
        letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (NAMES, 5))
        names = ["".join(map(chr, row)) for row in letters]
        pieces = [first(f"{text},").input_ids[1:-1] for text in (*ALL_TAGS, *names)]
        table = torch.full((len(pieces), max(map(len, pieces))), -1)
        for row, piece in enumerate(pieces):
            table[row, : len(piece)] = torch.tensor(piece)
        index = {tag: position for position, tag in enumerate(ALL_TAGS)}
        found = torch.full((len(captions), max(map(len, captions))), -1)
        for row, caption in enumerate(captions):
            found[row, : len(caption)] = torch.tensor([index[tag] for tag in caption])
        self._table, self._tags = table.to(device), found.to(device)
        self._start, self._end = first.bos_token_id, first.eos_token_id
        self._pads = [each.pad_token_id for each in tokenizers]

    def draw(self, chosen: torch.Tensor) -> list[torch.Tensor]:
        """For both encoders, [n, 77]: the tags of the `chosen` images, shuffled, some left out, some captions named, some empty."""
        device, count = chosen.device, len(chosen)
        found = self._tags[chosen]
        rate = torch.where(torch.rand(count, device=device) < HEAVY_SHARE, torch.rand(count, device=device), TAG_DROPOUT)
        kept = (found >= 0) & (torch.rand(found.shape, device=device) >= rate[:, None])
        key = torch.where(kept, torch.rand(found.shape, device=device), 2.0)
        names = len(ALL_TAGS) + torch.randint(NAMES, (count, 1), device=device)
        key = torch.cat([torch.where(torch.rand(count, 1, device=device) < NAME_SHARE, -1.0, 2.0), key], 1)
        key[torch.rand(count, device=device) < CAPTION_DROPOUT] = 2.0
        order = key.argsort(1)
        return self.assembled(torch.cat([names, found], 1).gather(1, order), key.gather(1, order) < 1.5)

    def assembled(self, rows: torch.Tensor, present: torch.Tensor) -> list[torch.Tensor]:
        """The tokens of captions whose parts are `rows` of the table, [n, parts], where they are `present`."""
        tokens = torch.where(present[..., None], self._table[rows.clamp(min=0)], -1).flatten(1)
        order = torch.argsort((tokens < 0).int(), dim=1, stable=True)
        tokens = tokens.gather(1, order)[:, : CONTEXT - 2]
        length = ((tokens >= 0).sum(1, keepdim=True) - 1).clamp(min=0)  # without the last comma
        place = torch.arange(tokens.shape[1], device=tokens.device)
        result = []
        for pad in self._pads:
            padded = torch.full((len(rows), CONTEXT), pad, device=tokens.device)
            padded[:, 0] = self._start
            padded[:, 1 : 1 + tokens.shape[1]] = torch.where(place < length, tokens, pad)
            result.append(padded.scatter_(1, length + 1, self._end))
        return result
