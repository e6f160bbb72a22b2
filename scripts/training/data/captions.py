"""Captions -> variants -> chunks of tokens -> embeddings, as ComfyUI encodes a prompt without weights."""

import hashlib
import math
from collections import Counter
from typing import TYPE_CHECKING

import torch

from common.captions import is_prose, leads_with_trigger
from common.clip_tokens import CHUNK_TOKENS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from training.models.weights import TextEncoders


def caption_variants(caption: str, trigger: str, count: int, shuffle: bool, seed: int) -> list[str]:
    """Up to `count` different captions: the original one, then its tags in other orders.

    A tag at the beginning that leads with the trigger word, if there is one, stays there. The orders depend on `seed` and
    `caption` alone.
    Sentences are not shuffled: a caption that is prose has one variant. Several captions, one per line, share `count` and have as
    many variants each, the original ones first.
    """
    lines = caption.split("\n")
    if len(lines) > 1:
        of_lines = [caption_variants(line, trigger, max(1, count // len(lines)), shuffle, seed) for line in lines]
        most = max(map(len, of_lines))
        return [variants[number % len(variants)] for number in range(most) for variants in of_lines]
    if not shuffle or is_prose(caption):
        return [caption]
    tags = [tag for tag in (piece.strip() for piece in caption.split(",")) if tag]
    fixed = 1 if trigger and tags and leads_with_trigger(tags[0], trigger) else 0
    head, rest = tags[:fixed], tags[fixed:]
    count = _orders_of(rest, at_most=count)
    orders = [tuple(tags)]
    attempt = 0
    while len(orders) < count:
        attempt += 1
        order = (*head, *_shuffled(rest, f"{seed}\0{attempt}\0{caption}"))
        if order not in orders:
            orders.append(order)
    return [caption, *(", ".join(order) for order in orders[1:])]


def _orders_of(tags: list[str], at_most: int) -> int:
    """The number of different orders of `tags`, counted up to `at_most`: the factorial of thousands takes seconds."""
    orders, placed = 1, 0
    for times in Counter(tags).values():
        for number in range(1, times + 1):  # a multinomial coefficient, of which every partial product is whole
            placed += 1
            orders = orders * placed // number
            if orders >= at_most:
                return at_most
    return orders


def _shuffled(tags: list[str], key: str) -> list[str]:
    """The tags in an order that depends on `key` alone."""
    prefix, ranks = hashlib.sha256(f"{key}\0".encode()), []
    for position in range(len(tags)):
        rank = prefix.copy()  # hashes the key, which holds all tags, once and not for each of them
        rank.update(str(position).encode())
        ranks.append(rank.digest())
    return [tag for _, tag in sorted(zip(ranks, tags, strict=True))]


def chunks_needed(texts: list[str], tokenizers: "tuple[CLIPTokenizer, CLIPTokenizer]", at_most: int) -> int:
    """The number of chunks that the longest of `texts` fills, 1 to `at_most`."""
    longest = max((len(token_ids(text, tokenizer)) for text in texts for tokenizer in tokenizers), default=0)
    return min(max(1, math.ceil(longest / CHUNK_TOKENS)), at_most)


def text_beyond(chunks: int, text: str, tokenizers: "tuple[CLIPTokenizer, CLIPTokenizer]") -> str:
    """The end of `text` that does not fit into so many chunks, in the tokenizer's spelling; empty if all of it fits."""
    tokenizer = tokenizers[0]
    return tokenizer.decode(token_ids(text, tokenizer)[chunks * CHUNK_TOKENS :]).strip()


def beginning(chunks: int, text: str, tokenizers: "tuple[CLIPTokenizer, CLIPTokenizer]") -> str:
    """What `text_beyond` leaves."""
    return tokenizers[0].decode(token_ids(text, tokenizers[0])[: chunks * CHUNK_TOKENS])


def token_ids(text: str, tokenizer: "CLIPTokenizer") -> list[int]:
    """The tokens of `text` without start and end. Brackets are plain text, and so is `\\(`, ComfyUI's escaped bracket."""
    plain = text.replace("\\(", "(").replace("\\)", ")")
    return tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]


def split_into_chunks(tokens: list[int], tokenizer: "CLIPTokenizer", chunks: int) -> torch.Tensor:
    """int64 [chunks, 77]: each a start, the next 75 tokens, an end and padding. Tokens beyond the last chunk are dropped."""
    rows = []
    for begin in range(0, chunks * CHUNK_TOKENS, CHUNK_TOKENS):
        row = [tokenizer.bos_token_id, *tokens[begin : begin + CHUNK_TOKENS], tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (CHUNK_TOKENS + 2 - len(row)))
    return torch.tensor(rows)


def tokens_of(texts: list[str], tokenizers: "tuple[CLIPTokenizer, CLIPTokenizer]", chunks: int) -> torch.Tensor:
    """int64 [texts, 2, chunks, 77]: each text in the chunks of both tokenizers."""
    rows = [[split_into_chunks(token_ids(text, tokenizer), tokenizer, chunks) for tokenizer in tokenizers] for text in texts]
    return torch.stack([torch.stack(each) for each in rows])


def conditioning(encoders: "TextEncoders | None", *text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and pooled embeddings, which the UNet reads: `text` itself if it is these, else of the tokens `text`."""
    return text if len(text) == 2 else encode_tokens(*text, encoders)


def encode_tokens(tokens: torch.Tensor, encoders: "TextEncoders") -> tuple[torch.Tensor, torch.Tensor]:
    """Encode texts, given as [texts, 2, chunks, 77], as one batch.

    Returns the hidden states before the last layer of both encoders side by side, [texts, 77 * chunks, 2048], and the
    second encoder's projection of the first chunk, [texts, 1280]: in the encoders' dtype, and differentiable.
    """
    count, _, chunks, _ = tokens.shape
    hidden = []
    for number, encoder in enumerate(encoders):
        output = encoder(tokens[:, number].flatten(0, 1), output_hidden_states=True)
        hidden.append(output.hidden_states[-2].unflatten(0, (count, chunks)).flatten(1, 2))
    # `output` is now that of the second encoder, the only one with a projection.
    return torch.cat(hidden, dim=-1), output.text_embeds.unflatten(0, (count, chunks))[:, 0]


@torch.no_grad()
def encode_captions(
    texts: list[str], tokenizers: "tuple[CLIPTokenizer, CLIPTokenizer]", encoders: "TextEncoders", chunks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `encode_tokens` returns for the texts, float32, on the encoders' device."""
    hidden, pooled = encode_tokens(tokens_of(texts, tokenizers, chunks).to(encoders[0].device), encoders)
    return hidden.float(), pooled.float()
