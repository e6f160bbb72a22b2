"""How many of CLIP's tokens a caption has: what training can use is limited. Needs no torch, only a vocabulary."""

import json
import os
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

FOLDER = "tokenizer"


START, END = "<|startoftext|>", "<|endoftext|>"


_PIECES = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


class ClipTokens:
    """CLIP's tokenizer, from a folder `tokenizer` of the base model."""

    def __init__(self, folder: Path):
        whole = folder / "tokenizer.json"
        self._tokenizer = Tokenizer.from_file(str(whole)) if whole.is_file() else _of_vocabulary(folder)

    def count(self, text: str) -> int:
        """The tokens of `text`, start and end not counted."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def find_tokens(models_dir: Path, base_model: str) -> ClipTokens | None:
    """The tokenizer of `base_model`, or of any other model in `models_dir`: all SDXL models share one. None if there is none."""
    others = sorted(models_dir.iterdir()) if models_dir.is_dir() else []
    for model in (models_dir / base_model, Path(os.path.expanduser(base_model)), *others):
        folder = model / FOLDER
        if _is_clip(folder):
            return ClipTokens(folder)
    return None


def _is_clip(folder: Path) -> bool:
    """Whether a whole tokenizer of CLIP lies in `folder`, and none of another kind of model."""
    whole = folder / "tokenizer.json"
    try:
        if whole.is_file():
            return START in json.loads(whole.read_text(encoding="utf-8"))["model"]["vocab"]
        return START in json.loads((folder / "vocab.json").read_text(encoding="utf-8")) and (folder / "merges.txt").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _of_vocabulary(folder: Path) -> Tokenizer:
    """CLIP's byte pair encoding: lower case, words that end in `</w>`, digits one by one."""
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>", unk_token=END)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pieces = pre_tokenizers.Split(_PIECES, behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([START, END])
    return tokenizer
