"""The files of a run's sample images: PNGs with what they were rendered from, and samples.json, which the report reads.

All of it belongs to the main process. What is complete on disk is recognized by a run that continues, and not rendered again.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from common.captions import asked_subject
from common.files import atomic_write, parse_json, read_file, write_json
from common.images import DECODER_ERRORS
from common.output_layout import OutputLayout
from common.settings import VERSION
from common.thumbnails import SAMPLE_PX, Thumbnails
from training.callbacks.checkpoint import EARLY_STOP, LENGTH
from training.callbacks.recommendation import Recommendation, Save, mean_likeness
from training.callbacks.sample_likeness import SampleLikeness
from training.callbacks.sample_plan import SamplePlan
from training.callbacks.sample_prompts import SamplePrompt
from training.models.weights import write_tensors
from training.plan import short_hash

FORMAT = 2
"""Part of every image's key; to be raised when the same prompt gives another image."""
KEY = "loracat"
"""Name of the text in a PNG file that identifies what it was rendered from."""
BASE = "base model"
FINAL = "final"
_OWN_FILES = re.compile(r"\d{6,}(-\d\.\d)?-\d{2}\.(png|safetensors)")


@dataclass(frozen=True)
class Row:
    """The images of the base model or of one LoRA, as samples.json lists them."""

    label: str
    file: str | None
    """Name of the LoRA file; None for the base model, and where none was saved."""
    step: int
    """Optimizer steps before it."""
    epochs: int
    strength: float = 1.0

    def image(self, number: int) -> str:
        """File name of the image for prompt `number`."""
        strength = "" if self.strength == 1 else f"-{self.strength}"
        return f"{self.epochs:06d}{strength}-{number + 1:02d}.png"


class SampleRecord:
    """Reads and writes the files of the rows. `fingerprint` is that of the run, `base` the name of the base model."""

    def __init__(
        self,
        plan: SamplePlan,
        outputs: OutputLayout,
        fingerprint: Mapping[str, Any],
        base: str,
        triggers: Sequence[str],
        likeness: SampleLikeness,
    ):
        self._plan, self._outputs, self._base, self._likeness = plan, outputs, base, likeness
        self._subjects = [asked_subject(prompt.kind, prompt.text, triggers) for prompt in plan.prompts]
        self._with_trigger = [number for number, subject in enumerate(self._subjects) if subject]
        self._without_trigger = [number for number, subject in enumerate(self._subjects) if not subject]
        self._compared_with = [subject or triggers[0] for subject in self._subjects]
        # A run that is extended has the same weights as long as its length does not change the learning rate.
        own = {EARLY_STOP, *LENGTH} if fingerprint.get("lr_scheduler") == "constant" else {EARLY_STOP}
        self._run = {name: value for name, value in fingerprint.items() if name not in own}
        self._rows: dict[tuple[int, float], Row] = {}

    def read(self, next_step: int) -> None:
        """Adopt the rows of samples.json that are part of this run, from steps that are not repeated, and whose images are what
        would be rendered now. The end of a run that is extended is not one of them."""
        try:
            rows = parse_json(read_file(self._outputs.samples_record))["rows"]
            files = [None if row["file"] is None else str(row["file"]) for row in rows]
            found = [
                Row(str(row["label"]), file, int(row["step"]), int(row["epochs"])) for row, file in zip(rows, files, strict=True)
            ]
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return
        for row in found:
            if row.label != FINAL and row.step <= next_step and not self.missing(row):
                has_file = row.file is not None and (self._outputs.lora_dir / row.file).exists()
                self._add(replace(row, file=row.file if has_file else None))
        self.write()

    def __contains__(self, row: Row) -> bool:
        return self._rows.get((row.epochs, row.strength)) == row

    def missing(self, row: Row) -> list[int]:
        """Numbers of the prompts whose image does not exist, or was rendered from something else."""
        numbers = range(len(self._plan.prompts))
        return [number for number in numbers if not self._keys_on_disk(row, number) <= {self._key(row, number)}]

    def _keys_on_disk(self, row: Row, number: int) -> set[str | None]:
        """What the files of an image were rendered from; None for one that does not exist or is damaged."""
        keys: set[str | None] = set()
        try:
            with Image.open(self._outputs.samples / row.image(number)) as image:
                image.load()
                keys.add(image.info.get(KEY))
        except (*DECODER_ERRORS, Image.DecompressionBombError):
            return {None}
        if number in self._without_trigger and row.strength == 1:
            try:
                with safe_open(self._latents(row, number), "pt") as file:
                    keys.add((file.metadata() or {}).get(KEY))
            except (OSError, SafetensorError):
                keys.add(None)
        return keys

    def _key(self, row: Row, number: int) -> str:
        """Identifies what the pixels of an image depend on."""
        base_only = {"base model", "prediction_type", "zero_terminal_snr", "mixed_precision"}
        run = {name: value for name, value in self._run.items() if row.label != BASE or name in base_only}
        return short_hash([FORMAT, run, row.epochs, row.step, row.strength, asdict(self._plan.prompts[number]), self._plan.tiled])

    def _latents(self, row: Row, number: int) -> Path:
        return self._outputs.sample_latents / Path(row.image(number)).with_suffix(".safetensors").name

    def write_image(self, row: Row, number: int, image: Image.Image, latents: torch.Tensor) -> None:
        """Write an image with A1111's description of how it was made; without the trigger word, also its latents [1, 4, h, w]."""
        if number in self._without_trigger and row.strength == 1:
            write_tensors(self._latents(row, number), {"latents": latents}, {KEY: self._key(row, number)})
        texts = PngInfo()
        texts.add_text("parameters", generation_parameters(self._plan.prompts[number], self._base, row.file, row.strength))
        texts.add_text(KEY, self._key(row, number))
        with atomic_write(self._outputs.samples / row.image(number)) as temporary:
            image.save(temporary, "png", pnginfo=texts, compress_level=1)  # a quarter of the time for a tenth more bytes
        Thumbnails(self._outputs.thumbnails).add(self._outputs.samples / row.image(number), image, SAMPLE_PX)

    def complete(self, row: Row) -> dict[str, Path]:
        """List a row whose images are all there, and have them scored. Returns the images by the name of their prompt."""
        self._add(row)
        self.write()
        return {f"samples/{number + 1:02d}": path for number, path in enumerate(self._paths(row))}

    def _add(self, row: Row) -> None:
        self._rows[row.epochs, row.strength] = row
        self._likeness.submit(self._paths(row), self._compared_with)

    def _paths(self, row: Row) -> list[Path]:
        return [self._outputs.samples / row.image(number) for number in range(len(self._plan.prompts))]

    def example(self, epochs: int) -> Path | None:
        """The first image with the trigger word of the LoRA after `epochs` epochs; None if it was not sampled."""
        row = self._rows.get((epochs, 1.0))
        return self._outputs.samples / row.image(self._with_trigger[0]) if row and self._with_trigger else None

    def scores(self, row: Row) -> tuple[float | None, ...]:
        """The likeness of the images with the trigger word; None where it is not known or cannot be told."""
        return self._scores(row, self._with_trigger)

    def _scores(self, row: Row, numbers: Sequence[int]) -> tuple[float | None, ...]:
        return tuple(self._likeness.score_of(row.image(number))[0] for number in numbers)

    def likeness_by_step(self) -> dict[int, float]:
        """The mean likeness of the images with the trigger word by the number of the step before which they were rendered."""
        rows = [row for row in self._sorted_rows() if row.label != BASE]
        means = {row.step - 1: mean_likeness(self.scores(row)) for row in rows}
        return {step: mean for step, mean in means.items() if mean is not None}

    def measured(self, save: Save) -> Save:
        """`save` with the likeness of its images, and how far those without the trigger word are from the base model's: the root
        mean square difference of their latents. Unchanged if it was not sampled."""
        row, base = self._rows.get((save.epochs, 1.0)), self._rows.get((0, 1.0))
        if row is None:
            return save
        distances = []
        with contextlib.suppress(OSError, SafetensorError):  # the user has deleted them
            for number in self._without_trigger if base else ():
                before, after = (load_file(self._latents(each, number))["latents"].double() for each in (base, row))
                distances.append((after - before).square().mean().sqrt().item())
        distance = round(sum(distances) / len(distances), 4) if distances else None
        return replace(save, scores=self.scores(row), distance=distance)

    def scores_by_strength(self, epochs: int) -> dict[float, tuple[float | None, ...]]:
        """The `scores` of a LoRA at every strength at which it was rendered."""
        return {row.strength: self.scores(row) for row in self._strength_rows(epochs)}

    def _strength_rows(self, epochs: int) -> list[Row]:
        return [row for (of, _), row in sorted(self._rows.items()) if of == epochs]

    def finish(self, recommendation: Recommendation) -> None:
        """Record which LoRA to use. Files of no row, such as those of the end of a run that is extended, are removed."""
        listed = {row.image(number) for row in self._rows.values() for number in range(len(self._plan.prompts))}
        for folder in (self._outputs.samples, self._outputs.sample_latents):
            for path in folder.iterdir() if folder.is_dir() else ():
                if _OWN_FILES.fullmatch(path.name) and path.with_suffix(".png").name not in listed:
                    path.unlink()
        self.write(recommendation)

    def write(self, recommendation: Recommendation | None = None) -> None:
        """Write samples.json, with the scores that are known by now."""
        if not self._rows:
            return
        names = ("text", "seed", "width", "height", "kind")
        base = self._rows.get((0, 1.0))
        floor = mean_likeness(self._scores(base, self._without_trigger)) if base else None
        prompts = [{name: getattr(prompt, name) for name in names} for prompt in self._plan.prompts]
        content = {
            "prompts": [prompt | {"subject": subject} for prompt, subject in zip(prompts, self._subjects, strict=True)],
            "rows": [self._described(row) for row in self._sorted_rows()],
            "floor": None if floor is None else round(floor, 4),
            "ceiling": self._likeness.ceiling,
        }
        if recommendation:
            content["strengths"] = [self._described(row) for row in self._strength_rows(recommendation.epochs)]
            content["recommended"] = {
                "file": recommendation.file,
                "strength": recommendation.strength,
                "reason": recommendation.reason,
            }
        write_json(self._outputs.samples_record, content)

    def _sorted_rows(self) -> list[Row]:
        return [row for key, row in sorted(self._rows.items()) if row.strength == 1]

    def _described(self, row: Row) -> dict[str, Any]:
        images = [row.image(number) for number in range(len(self._plan.prompts))]
        scores = [self._likeness.score_of(image) for image in images]
        return asdict(row) | {
            "images": images,
            "likeness": [score for score, _ in scores],
            "unscored": [why for _, why in scores],
        }


def generation_parameters(prompt: SamplePrompt, base: str, lora: str | None, strength: float = 1.0) -> str:
    """How an image was made, in the notation of A1111, which ComfyUI and model sites read as well."""
    text = f"{prompt.text} <lora:{lora.removesuffix('.safetensors')}:{strength:g}>" if lora else prompt.text
    values = {
        "Steps": prompt.steps,
        "Sampler": "Euler",
        "CFG scale": f"{prompt.guidance:g}",
        "Seed": prompt.seed,
        "Size": f"{prompt.width}x{prompt.height}",
        "Model": json.dumps(base, ensure_ascii=False) if "," in base else base,
        "Version": f"LoRACat {VERSION}",
    }
    lines = [text, *([f"Negative prompt: {prompt.negative}"] if prompt.negative else [])]
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in values.items())])
