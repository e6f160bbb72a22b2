"""Captions -> variants -> chunks of tokens -> embeddings, as ComfyUI encodes a prompt without weights."""

import hashlib
import math
import re
from collections import Counter
from typing import TYPE_CHECKING

import torch

from common.clip_tokens import CHUNK_TOKENS

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_TAG_WORDS = 6
"""A piece between commas with more words is part of a sentence, not a tag."""

_SENTENCE_END = re.compile(r"[^\W\d_][.!?](\s|$)")


def caption_variants(caption: str, trigger: str, count: int, shuffle: bool, seed: int) -> list[str]:
    """Up to `count` different captions: the original one, then its tags in other orders.

    A trigger word at the beginning stays there. The orders depend on `seed` and `caption` alone. Sentences are not shuffled: a
    caption with a piece of more than six words between commas, or with a word that ends in `.`, `!` or `?`, has one variant.
    """
    tags = [tag for tag in (piece.strip() for piece in caption.split(",")) if tag]
    has_sentences = bool(_SENTENCE_END.search(caption)) or any(len(tag.split()) > _TAG_WORDS for tag in tags)
    if not shuffle or has_sentences:
        return [caption]
    fixed = 1 if tags and (tags[0] == trigger or tags[0].startswith(f"{trigger} ")) else 0
    head, rest = tags[:fixed], tags[fixed:]
    repetitions = math.prod(math.factorial(times) for times in Counter(rest).values())
    distinct_orders = math.factorial(len(rest)) // repetitions
    orders = [tuple(tags)]
    attempt = 0
    while len(orders) < min(count, distinct_orders):
        attempt += 1
        order = (*head, *_shuffled(rest, f"{seed}\0{attempt}\0{caption}"))
        if order not in orders:
            orders.append(order)
    return [caption, *(", ".join(order) for order in orders[1:])]


def _shuffled(tags: list[str], key: str) -> list[str]:
    """The tags in an order that depends on `key` alone."""
    ranks = [hashlib.sha256(f"{key}\0{position}".encode()).digest() for position in range(len(tags))]
    return [tag for _, tag in sorted(zip(ranks, tags, strict=True))]


def chunks_needed(texts: list[str], tokenizers: "tuple[CLIPTokenizer, CLIPTokenizer]", at_most: int) -> int:
    """The number of chunks that the longest of `texts` fills, 1 to `at_most`."""
    longest = max((len(token_ids(text, tokenizer)) for text in texts for tokenizer in tokenizers), default=0)
    return min(max(1, math.ceil(longest / CHUNK_TOKENS)), at_most)


def text_beyond(chunks: int, text: str, tokenizers: "tuple[CLIPTokenizer, CLIPTokenizer]") -> str:
    """The end of `text` that does not fit into so many chunks, in the tokenizer's spelling; empty if all of it fits."""
    tokenizer = tokenizers[0]
    return tokenizer.decode(token_ids(text, tokenizer)[chunks * CHUNK_TOKENS :]).strip()


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


@torch.no_grad()
def encode_captions(
    texts: list[str],
    tokenizers: "tuple[CLIPTokenizer, CLIPTokenizer]",
    encoders: "tuple[CLIPTextModel, CLIPTextModelWithProjection]",
    chunks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode the texts as one batch.

    Returns the hidden states before the last layer of both encoders side by side, [texts, 77 * chunks, 2048], and the
    second encoder's projection of the first chunk, [texts, 1280]: float32, on the encoders' device.
    """
    hidden = []
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        tokens = torch.cat([split_into_chunks(token_ids(text, tokenizer), tokenizer, chunks) for text in texts])
        output = encoder(tokens.to(encoder.device), output_hidden_states=True)
        hidden.append(output.hidden_states[-2].unflatten(0, (len(texts), chunks)).flatten(1, 2).float())
    # `output` is now that of the second encoder, the only one with a projection.
    return torch.cat(hidden, dim=-1), output.text_embeds.unflatten(0, (len(texts), chunks))[:, 0].float()
