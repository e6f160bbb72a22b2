"""Which family of SDXL models a base belongs to, as far as its name or its metadata say so, and the tags that images of quality
have in that family. Imports no torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from training.models.sdxl import BaseModel

FAMILIES = {
    "NoobAI": (r"noob", "masterpiece, best quality"),
    "Illustrious": (r"illustrious|(?<![a-z])(?:il|ilxl|ill?ust)(?![a-z])|(?<![a-z])ilv\d", "masterpiece, best quality"),
    "Pony": (r"pony(?!tail)|pdxl", "score_9, score_8_up, score_7_up"),
    "SDXL 1.0": (r"sd_?xl_base|stable[- _]diffusion[- _]xl", ""),
}
"""Pattern of the names of their models, and the tags that their authors recommend at the beginning of a prompt."""
_METADATA = (
    *("modelspec.title", "modelspec.merged_from", "sd_merge_models", "sd_merge_recipe", "ss_sd_model_name", "ss_output_name"),
    *("modelspec.tags", "modelspec.description"),
)
"""What the ModelSpec, the mergers of A1111 and Forge, and kohya's trainer write about a checkpoint, the most telling first."""
_WORKFLOWS = ("prompt", "workflow")
"""The same of ComfyUI: the workflow that saved the checkpoint."""
_CHECKPOINT = re.compile(r"[^\"\\/]+(?=\.safetensors)")
"""A file's name in a workflow, without folders and suffix."""


@dataclass(frozen=True)
class Family:
    """Where a base model comes from."""

    names: tuple[str, ...]
    """Keys of FAMILIES; several for a merge, none if nothing says so."""
    evidence: str = ""
    """What says so."""

    @property
    def quality_tags(self) -> str:
        """Of a merge those that are no score tags: most models know the others."""
        tags = [FAMILIES[name][1] for name in self.names]
        return next((each for each in tags if each and "score" not in each), tags[0] if tags else "")

    def __str__(self) -> str:
        if not self.names:
            return "family not known"
        merged = " and ".join([", ".join(self.names[:-1]), self.names[-1]] if len(self.names) > 1 else self.names)
        return f"{'a merge of ' if len(self.names) > 1 else ''}{merged} ({self.evidence})"


def family_of(base: BaseModel) -> Family:
    """The family of `base`, from the first thing that tells it: its name, then its metadata."""
    for evidence, text in _texts(base):
        names = tuple(name for name, (pattern, _) in FAMILIES.items() if re.search(pattern, text, re.IGNORECASE))
        if len(names) > 1 and "SDXL 1.0" in names:  # all others were trained from it
            names = tuple(name for name in names if name != "SDXL 1.0")
        if names:
            return Family(names, evidence)
    return Family(())


def _texts(base: BaseModel) -> Iterator[tuple[str, str]]:
    """What a text is, and the text: everything that may name a family."""
    yield "by its name", base.name
    component = base.components["unet"]
    metadata = component.files[0].metadata if component.in_single_file else {}
    for key in _METADATA:
        yield f"by {key} in its metadata", metadata.get(key, "")
    for key in _WORKFLOWS:
        yield "by the workflow in its metadata", "\n".join(_CHECKPOINT.findall(metadata.get(key, "")))
    for name, part in base.components.items():
        yield f"by _name_or_path in {name}/config.json", str(part.config.get("_name_or_path", ""))
