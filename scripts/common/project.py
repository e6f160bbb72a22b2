"""The settings that several stages read: `[project]`, and the keys of `[train]` that captioning and the report need.

The other settings are in each stage's own config.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.image_folders import trigger_problem
from common.settings import REPOSITORY, PartialSection, setting

DEFAULT_FACE = REPOSITORY / "face_reference.png"


@dataclass(frozen=True)
class ProjectSettings:
    """`[project]`: what all stages share."""

    trigger_word: str = setting("nyafyi_woman")
    dataset_dir: Path = setting(Path("dataset"))
    output_dir: Path = setting(Path("output"))
    models_dir: Path = setting(Path("models"))
    face_model: Literal["dlib", "sface", "off"] = setting("dlib")
    """Recognises the person, to measure how much each image looks like her; see common/faces.py."""
    preset: str = setting("")
    """Name of a file in config/presets, without suffix, whose values are used where nothing else is set."""

    def validate(self) -> Iterator[str]:
        if problem := trigger_problem(self.trigger_word):
            yield f"trigger_word: {problem}"


@dataclass(frozen=True)
class SharedCollectSettings:
    """The part of `[collect]` that training reads: the address appears in advice when memory is short."""

    comfyui_endpoint: str = setting("http://host.docker.internal:8188", address=True)
    """URLs of one or several servers, separated by commas."""


@dataclass(frozen=True)
class ComfyUIAddress(SharedCollectSettings, PartialSection):
    """The same as a section; collecting/config.py has all of it."""


@dataclass(frozen=True)
class FaceReferences(PartialSection):
    """The part of `[collect]` that captioning reads: images are compared with the person whose images are collected."""

    face_reference: tuple[Path, ...] = setting(())
    """Empty: `face_reference.png` in the repository if it exists."""


def face_references(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """The images of the person's face that the setting `face_reference` stands for."""
    return paths or ((DEFAULT_FACE,) if DEFAULT_FACE.is_file() else ())


@dataclass(frozen=True)
class SharedModelSettings:
    """The part of `[train.model]` that captioning reads: the base model's tokenizer counts the tokens of captions."""

    base_model: str = setting("stable-diffusion-xl-base-1.0", role="runtime")
    """A diffusers folder or a `.safetensors` file: its name in MODELS_DIR, or a path."""


@dataclass(frozen=True)
class SharedDataSettings:
    """The part of `[train.data]` that captioning and the report read: what training makes of an image and of a caption."""

    resolution: int | tuple[int, ...] = setting(1024, at_least=64, at_most=4096, role="result")
    """Pixels: a bucket's area is at most `resolution` squared. Of several, each image is trained at each."""
    caption_chunks: int = setting(3, at_least=1, at_most=8, role="result")
    """Chunks of 75 tokens that a caption may fill at most."""
    caption_per_line: bool = setting(False, role="result", before=False)
    """Each line of a caption file is a caption of its own, one of which is drawn for each sample."""
    alpha: Literal["white", "mask"] = setting("white", role="result", before="white")
    """"mask": the transparency of an image without a mask is its mask."""

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Each value of `resolution` once, the largest first."""
        return tuple(sorted({self.resolution} if isinstance(self.resolution, int) else {*self.resolution}, reverse=True))


@dataclass(frozen=True)
class SharedTrainSettings(PartialSection):
    """The part of `[train]` that captioning and the report read; training/config.py has all of it."""

    model: SharedModelSettings = field(default_factory=SharedModelSettings)
    data: SharedDataSettings = field(default_factory=SharedDataSettings)
