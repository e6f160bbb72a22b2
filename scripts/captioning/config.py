"""`[project]`, `[collect]` and `[caption]` as types: every setting with its default and limits; `[train]`: training/config.py."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from common.settings import setting


@dataclass(frozen=True)
class CaptionSettings:
    """`[caption]`: the WD14 tagger and what becomes of its tags."""

    caption_model: str = setting("SmilingWolf/wd-swinv2-tagger-v3")
    caption_provider: Literal["auto", "cpu", "cuda"] = setting("auto")
    caption_bf16: bool = setting(False)
    caption_batch_size: int = setting(8, at_least=1, at_most=1024)
    caption_threshold: float | Literal["auto", "mcut"] = setting(0.35, above=0, at_most=1)
    caption_character_tags: bool = setting(False)
    caption_character_threshold: float | Literal["mcut"] = setting(0.85, above=0, at_most=1)
    caption_rating_tags: bool = setting(False)
    caption_exclude_tags: tuple[str, ...] = setting(())
    """In any spelling; `*` stands for anything."""
    caption_replace_tags: tuple[str, ...] = setting(())
    """Pairs `a=b`."""
    caption_always_first: tuple[str, ...] = setting(())
    caption_append: tuple[str, ...] = setting(())
    caption_max_tags: int = setting(0, at_least=0)
    """0 is no limit."""
    caption_prune_traits: float = setting(0.0, at_least=0, at_most=1)
    """Share of the images; 0 is off."""
    caption_overwrite: bool = setting(False)

    def validate(self) -> Iterator[str]:
        for pair in self.caption_replace_tags:
            if not re.fullmatch(r"\s*\S.*=\s*\S.*", pair):
                yield f"caption_replace_tags: {pair!r} must be old=new"
