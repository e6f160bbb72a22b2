"""The settings of the caption stage, with their defaults and limits."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from common.settings import setting


@dataclass(frozen=True)
class CaptionSettings:
    """`[caption]`: the WD14 tagger, and how captions are made of its tags."""

    caption_source: Literal["tags", "prompt", "both"] = setting("tags")
    """What captions are made of: the tagger's tags, or the prompts that the collect stage recorded."""
    caption_prompt_person: tuple[str, ...] = setting(
        (
            "a realistic photograph of a person",
            "a photograph of a person",
            "a photo of a person",
            "the person in Picture 1",
            "a person",
            "the person",
        )
    )
    """Phrases that the trigger word replaces in prompts, besides the text of `person_node`."""
    caption_prompt_remove: tuple[str, ...] = setting(
        (
            *("Create a new *", "Keep the identity *", "Do not copy *", "Natural skin texture with fine pores*"),
            *("masterpiece", "best quality", "high quality", "highly detailed", "photorealistic", "sharp focus", "8k", "4k"),
        )
    )
    """Phrases to leave out of prompts where they stand between punctuation marks; `*` matches any text within a sentence."""
    caption_model: str = setting("SmilingWolf/wd-swinv2-tagger-v3")
    """`owner/repository` on Hugging Face, the name of a folder in MODELS_DIR, or a path."""
    caption_provider: Literal["auto", "cpu", "cuda"] = setting("auto")
    caption_bf16: bool = setting(False)
    """Matrix products in bfloat16, on ARM CPUs."""
    caption_batch_size: int = setting(8, at_least=1, at_most=1024)
    """Images that the tagger processes at once."""
    caption_threshold: float | Literal["auto", "mcut"] = setting(0.35, above=0, at_most=1)
    """Probability from which a general tag is used; "auto": as published for the model; "mcut": for each image, see `mcut`."""
    caption_character_tags: bool = setting(False)
    caption_character_threshold: float | Literal["mcut"] = setting(0.85, above=0, at_most=1)
    caption_rating_tags: bool = setting(False)
    caption_exclude_tags: tuple[str, ...] = setting(())
    """In any spelling; `*` matches any text."""
    caption_replace_tags: tuple[str, ...] = setting(())
    """Pairs `old=new`."""
    caption_always_first: tuple[str, ...] = setting(())
    """Tags that follow the trigger word in captions that have them."""
    caption_append: tuple[str, ...] = setting(())
    """Tags at the end of every caption."""
    caption_max_tags: int = setting(0, at_least=0)
    """0: no limit."""
    caption_prune_traits: float | Literal["auto"] = setting("auto", at_least=0, at_most=1)
    """Share of the images from which a trait of the person is left out of all captions; 0: off; "auto": see `traits`."""
    caption_overwrite: bool = setting(False)
    """Replace captions that the user wrote, too."""

    def validate(self) -> Iterator[str]:
        for pair in self.caption_replace_tags:
            if not re.fullmatch(r"\s*\S.*=\s*\S.*", pair):
                yield f"caption_replace_tags: {pair!r} must be old=new"
