"""The settings that several stages read. The other sections are defined by their stage: `<stage>/config.py`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

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
            yield f"trigger_word: {word!r} must be a single tag, without commas, control characters or extra spaces"


@dataclass(frozen=True)
class ComfyUIAddress:
    """The one key of `[collect]` that training reads as well: it appears in advice when memory is short."""

    partial: ClassVar[bool] = True

    comfyui_endpoint: str = setting("http://host.docker.internal:8188")
