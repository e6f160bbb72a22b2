"""CLIP's tokenizers in model folders: find them, and count a caption's tokens. Needs neither torch nor transformers."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.files import read_file
from common.settings import places_of_path

CHUNK_TOKENS = 75
"""Tokens of text that CLIP's text encoders read at once; with start and end they are 77."""
TOKENIZERS = ("tokenizer", "tokenizer_2")
"""Folders of SDXL's two tokenizers in a diffusers model."""

COMMON_TOKENS = 40_000
"""Of CLIP's 49,408 tokens, in order of frequency: the words among them are in use, while the later ones include sks and ohwx."""

_START, _END = "<|startoftext|>", "<|endoftext|>"
_UNMERGED_WORDS = 2 * 256 + 2
"""Of CLIP's vocabulary: each byte, each byte that ends a word, and the two special tokens."""
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class ClipTokens:
    """CLIP's tokenizer, from a folder `tokenizer` of a base model. Raises ValueError if its files are damaged."""

    def __init__(self, folder: Path):
        words, merges = _read_model(folder)
        with raising_value_error():
            self._tokenizer = self._built(words, merges)

    @staticmethod
    def _built(words: dict[str, int], merges: list[tuple[str, str]]) -> Any:
        """CLIP's byte pair encoding: lower case, words that end in `</w>`, digits one by one. That is not read from tokenizer.json:
        the package panics at some damaged ones."""
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        tokenizer = Tokenizer(models.BPE(words, merges, end_of_word_suffix="</w>", unk_token=_END))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.add_special_tokens([_START, _END])
        return tokenizer

    def count(self, text: str) -> int:
        """The number of tokens of `text`, without start and end."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


@contextmanager
def raising_value_error() -> Iterator[None]:
    """Raise ValueError for the errors of the package tokenizers, which are of the class Exception itself."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ValueError(str(error)) from None


def base_model_places(base_model: str, models_dir: Path) -> list[Path]:
    """Where a base model of that name or path may be, `models_dir` first."""
    return [models_dir / base_model, *places_of_path(base_model)]


def find_clip_tokens(models_dir: Path, base_model: str) -> ClipTokens | None:
    """The tokenizer of `base_model`, or of any other model in `models_dir`: all SDXL models share one. None if there is none."""
    for model in (*base_model_places(base_model, models_dir), *sorted(models_dir.glob("*"))):
        with suppress(OSError, ValueError):
            if {_START, _END} <= read_vocabulary(model / TOKENIZERS[0]).keys():
                return ClipTokens(model / TOKENIZERS[0])
    return None


def find_vocabulary(models_dir: Path, base_model: str) -> dict[str, int]:
    """The vocabulary of the same tokenizer; {} if there is none."""
    for model in (*base_model_places(base_model, models_dir), *sorted(models_dir.glob("*"))):
        with suppress(OSError):
            if vocabulary := read_vocabulary(model / TOKENIZERS[0]):
                return vocabulary
    return {}


def is_common_word(text: str, vocabulary: Mapping[str, int]) -> bool:
    """Whether `text` consists of one or several words that are among the COMMON_TOKENS of CLIP's `vocabulary`."""
    words = re.split(r"[\s_-]+", text.lower())
    is_complete = len(vocabulary) > COMMON_TOKENS
    return is_complete and all(len(word) > 2 and vocabulary.get(f"{word}</w>", COMMON_TOKENS) < COMMON_TOKENS for word in words)


def find_tokenizers_in(models_dir: Path, vocabulary_size: int) -> Path | None:
    """The first folder in `models_dir` that has both TOKENIZERS, with vocabularies of this size; None if there is none."""
    for folder in sorted(models_dir.glob("*")):
        if all(len(read_vocabulary(folder / name)) == vocabulary_size for name in TOKENIZERS):
            return folder
    return None


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Word -> id of the tokenizer in `folder`; {} if a file that transformers' CLIPTokenizer reads is missing or damaged.

    Its configuration is one of them: it says how to pad. Raises OSError for a file that may not be read.
    """
    try:
        return _read_model(folder)[0] if isinstance(_read_json(folder / "tokenizer_config.json"), dict) else {}
    except PermissionError:
        raise
    except (OSError, ValueError):
        return {}


def _read_model(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Word -> id, and the pairs that are merged, of the tokenizer in `folder`: from two files, or from tokenizer.json. Raises
    OSError, and ValueError if they are damaged."""
    try:
        if _has_merges(folder):
            words = dict(_read_json(folder / "vocab.json"))
            pairs = [line for line in read_file(folder / "merges.txt").decode().split("\n")[1:] if line.strip()]
        else:
            model = _read_json(folder / "tokenizer.json")["model"]
            words, pairs = dict(model["vocab"]), model["merges"]
        merges = [(first, second) for first, second in (pair.split(" ") if isinstance(pair, str) else pair for pair in pairs)]
        are_numbers = all(type(number) is int and 0 <= number < 1 << 32 for number in words.values())
        fit = all(first in words and second in words and first + second in words for first, second in merges)
    except (KeyError, TypeError) as error:
        raise ValueError(f"is damaged: {error}") from None
    if not (are_numbers and fit) or len(merges) < len(words) - _UNMERGED_WORDS:  # merges.txt is cut off
        raise ValueError("is damaged")
    return words, merges


def _read_json(file: Path) -> Any:
    """The JSON value in `file`, read as transformers does: as UTF-8 without a byte order mark."""
    try:
        return json.loads(read_file(file).decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _has_merges(folder: Path) -> bool:
    """Whether the tokenizer is stored as two files, a vocabulary and merges, which are read in preference to tokenizer.json."""
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
