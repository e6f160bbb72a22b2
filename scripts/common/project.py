"""`[project]`, `[collect]` and `[caption]` as types: every setting with its default and limits; `[train]`: training/config.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.settings import setting


@dataclass(frozen=True)
class ProjectSettings:
    """`[project]`: what all stages share."""

    trigger_word: str = setting("nyafyi_woman")
    dataset_dir: Path = setting(Path("dataset"))
    output_dir: Path = setting(Path("output"))
    models_dir: Path = setting(Path("models"))

    def validate(self) -> Iterator[str]:
        word = self.trigger_word
        if not word or "," in word or word != " ".join(word.split()) or not word.isprintable():
            yield f"trigger_word: {word!r} must be one tag: not empty, without commas, control characters or stray spaces"
