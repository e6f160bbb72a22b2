"""Captions -> variants -> chunks of tokens -> embeddings."""

from dataclasses import dataclass

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CHUNK = 75
"""Tokens of text in a chunk; with its start and end there are 77."""


@dataclass(frozen=True)
class TextEncoders:
    """SDXL's two CLIP text encoders with their tokenizers."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]


def token_ids(text: str, tokenizer: CLIPTokenizer) -> list[int]:
    """The tokens of `text` alone. Brackets are brackets; `\\(` is one too, as ComfyUI reads it."""
    plain = text.replace("\\(", "(").replace("\\)", ")")
    return tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]


def in_chunks(tokens: list[int], tokenizer: CLIPTokenizer, chunks: int) -> torch.Tensor:
    """int64 [chunks, 77]: start, up to 75 tokens, end, padding; what does not fit is left out."""
    rows = []
    for begin in range(0, chunks * CHUNK, CHUNK):
        row = [tokenizer.bos_token_id, *tokens[begin : begin + CHUNK], tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (CHUNK + 2 - len(row)))
    return torch.tensor(rows)


@torch.no_grad()
def encode(texts: list[str], text_encoders: TextEncoders, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode each text alone, so that its embedding does not depend on the others.

    Returns the hidden states before the last layer of both encoders side by side, [texts, 77 * chunks, 2048], and the
    second encoder's projection of the first chunk, [texts, 1280]; both float32.
    """
    encoded = [_encode_one(text, text_encoders, chunks) for text in texts]
    return torch.stack([hidden for hidden, _ in encoded]), torch.stack([pooled for _, pooled in encoded])


def _encode_one(text: str, text_encoders: TextEncoders, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = []
    for tokenizer, encoder in zip(text_encoders.tokenizers, text_encoders.encoders, strict=True):
        tokens = in_chunks(token_ids(text, tokenizer), tokenizer, chunks).to(encoder.device)
        output = encoder(tokens, output_hidden_states=True)
        hidden.append(output.hidden_states[-2].flatten(0, 1).float())
    return torch.cat(hidden, dim=-1), output.text_embeds[0].float()
