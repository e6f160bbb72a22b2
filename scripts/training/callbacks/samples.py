"""Sample images: the base model and every saved LoRA on the same prompts and noise, rendered with the networks in memory.

Training is not changed by them to the last bit: noise comes from a generator of its own, nothing that is captured is touched,
and a process that was killed renders the same pixels again.
"""

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.errors import Interruption
from common.files import atomic_write, parse_json, read_file, write_json
from common.output_layout import OutputLayout
from common.progress import ProgressBar
from common.settings import VERSION
from training.callbacks.renderer import Renderer
from training.callbacks.sample_plan import SamplePlan
from training.callbacks.sample_prompts import SamplePrompt
from training.data.buckets import OptimizerStep
from training.loop import Callback, Progress, RunSchedule
from training.method.adapters import at_strength
from training.plan import short_hash
from training.system.process_group import ProcessGroup

FORMAT = 1
"""Part of every image's key; to be raised when the same prompt gives another image."""
KEY = "loracat"
"""Name of the text in a PNG file that identifies what it was rendered from."""
BASE = "base model"
_IMAGE = re.compile(r"\d{6,}-\d{2}\.png")
_OUT_OF_MEMORY, _NOT_FINITE = 1, 2
_FAILURES = {
    _OUT_OF_MEMORY: "there is not enough GPU memory besides training; set SAMPLE_SIZE to a smaller number",
    _NOT_FINITE: "the UNet or the VAE returns NaN or infinity",
}


@dataclass(frozen=True)
class Row:
    """The images of the base model or of one LoRA, as samples.json lists them."""

    label: str
    file: str | None
    """Name of the LoRA file; None for the base model, and where none was saved."""
    step: int
    """Optimizer steps before it."""
    epochs: int

    def image(self, number: int) -> str:
        """File name of the image for prompt `number`."""
        return f"{self.epochs:06d}-{number + 1:02d}.png"


@dataclass
class SampleImages(Callback):
    """Renders a row of images at the start, when a LoRA is saved, and at the end. All processes share the prompts."""

    plan: SamplePlan
    renderer: Renderer
    outputs: OutputLayout
    schedule: RunSchedule
    fingerprint: Mapping[str, Any]
    """Of the run."""
    base: str
    """Name of the base model."""
    group: ProcessGroup
    stop_requested: Callable[[], Interruption | None]
    trackers: Sequence[Callback] = ()
    """These record the images."""
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The rows of samples.json, by their epochs."""
    is_off: bool = False
    """Something failed; the run goes on without images."""

    def start(self, progress: Progress) -> None:
        """Before the first step that is left: render the base model, and the row that a stop has interrupted."""
        if self.group.is_main_process:
            self.rows = self._recorded_rows(progress)
        with at_strength(self.renderer.step.adapter, 0):
            self._render(Row(BASE, None, 0, 0))
        if progress.next_step:
            last = self.schedule.order[progress.next_step - 1]
            epochs = self.schedule.epochs_complete(progress.next_step)
            if epochs > last.epoch:
                self.after_epoch(last, epochs, progress)

    def after_epoch(self, step: OptimizerStep, epochs: int, progress: Progress) -> tuple[Progress, str]:
        if epochs == self.schedule.epochs or self.schedule.ends_early(progress):
            self._render(Row("final", self.outputs.lora.name, step.number + 1, epochs))
        elif self.plan.is_due(step.epoch, epochs):
            file = self.outputs.lora_after(epochs)
            self._render(Row(f"after epoch {epochs}", file.name if file.exists() else None, step.number + 1, epochs))
        return progress, ""

    def _render(self, row: Row) -> None:
        """Render what is missing of a row, list it in samples.json when it is complete, and pass it to the trackers. Ends early
        if a stop is requested."""
        if self.is_off:
            return
        missing = self.group.broadcast_object(lambda: self._missing(row))
        if not missing and row.epochs in self.rows:
            return
        world_size = self.group.world_size
        with ProgressBar(len(missing), f"samples, {row.label}", "img", leave=False) as bar:
            for first in range(0, len(missing), world_size):
                numbers = missing[first : first + world_size]
                mine = numbers[self.group.rank : self.group.rank + 1]
                image, failure = self._image(self.plan.prompts[mine[0]]) if mine else (None, 0)
                if failure := self.group.all_reduce_max(failure):
                    self.is_off = True
                    print(f"sample images: none from here on ({_FAILURES[failure]})", flush=True)
                    break
                for number, rendered in zip(numbers, self.group.gather_objects(image), strict=False):
                    if rendered is not None:
                        self._write(row, number, rendered)
                if self.stop_requested():
                    return
                bar.update(len(numbers))
        if self.renderer.step.precision.device.type == "cuda":
            torch.cuda.empty_cache()  # training has other shapes
        if self.group.is_main_process and not self.is_off:
            self._complete(row)

    def _image(self, prompt: SamplePrompt) -> tuple[Image.Image | None, int]:
        """An image, None if a stop was requested; and what failed, else 0."""
        # Several processes ask for stops together, after each image.
        stops = (lambda: self.stop_requested() is not None) if self.group.world_size == 1 else (lambda: False)
        try:
            return self.renderer(prompt, stops), 0
        except torch.OutOfMemoryError:
            return None, _OUT_OF_MEMORY
        except FloatingPointError:
            return None, _NOT_FINITE

    def _missing(self, row: Row) -> list[int]:
        """Numbers of the prompts whose image does not exist, or was rendered from something else."""
        return [number for number in range(len(self.plan.prompts)) if self._key_in_file(row, number) != self._key(row, number)]

    def _key_in_file(self, row: Row, number: int) -> str | None:
        try:
            with Image.open(self.outputs.samples / row.image(number)) as image:
                image.load()
                return image.info.get(KEY)
        except (OSError, ValueError, SyntaxError):
            return None

    def _key(self, row: Row, number: int) -> str:
        """Identifies what the pixels of an image depend on."""
        base_only = {"base model", "prediction_type", "zero_terminal_snr", "mixed_precision"}
        run = {name: value for name, value in self.fingerprint.items() if row.label != BASE or name in base_only}
        return short_hash([FORMAT, run, row.epochs, asdict(self.plan.prompts[number]), self.plan.tiled])

    def _write(self, row: Row, number: int, image: Image.Image) -> None:
        """Write an image with A1111's description of how it was made."""
        texts = PngInfo()
        texts.add_text("parameters", generation_parameters(self.plan.prompts[number], self.base, row.file))
        texts.add_text(KEY, self._key(row, number))
        with atomic_write(self.outputs.samples / row.image(number)) as temporary:
            image.save(temporary, "png", pnginfo=texts)

    def _complete(self, row: Row) -> None:
        """Add the complete row to samples.json, which the report reads, and pass its images to the trackers."""
        numbers = range(len(self.plan.prompts))
        images = [row.image(number) for number in numbers]
        self.rows[row.epochs] = asdict(row) | {"images": images, "likeness": [None] * len(images)}
        self._write_record({})
        files = {f"samples/{number + 1:02d}": self.outputs.samples / images[number] for number in numbers}
        for tracker in self.trackers:
            tracker.after_samples(max(0, row.step - 1), files)

    def recommend(self, file: str, reason: str) -> None:
        """Record which LoRA file to use. Images of no row, such as the last ones of a run that is extended, are removed."""
        listed = {image for row in self.rows.values() for image in row["images"]}
        for path in self.outputs.samples.glob("*.png"):
            if _IMAGE.fullmatch(path.name) and path.name not in listed and not self.is_off:
                path.unlink()
        if self.rows:
            self._write_record({"recommended": {"file": file, "strength": 1.0, "reason": reason}})

    def _write_record(self, more: dict[str, Any]) -> None:
        rows = [self.rows[epochs] for epochs in sorted(self.rows)]
        write_json(self.outputs.samples_record, {"prompts": self._prompts(), "rows": rows, **more})

    def _recorded_rows(self, progress: Progress) -> dict[int, dict[str, Any]]:
        """The rows in samples.json that are part of this run: of the same prompts, from steps that are not repeated. The end of a
        run that is extended is not."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = parse_json(read_file(self.outputs.samples_record))
            rows = {row["epochs"]: row for row in record["rows"] if row["label"] != "final" and row["step"] <= progress.next_step}
            return rows if record["prompts"] == self._prompts() else {}
        return {}

    def _prompts(self) -> list[dict[str, Any]]:
        """The prompts as samples.json has them."""
        names = ("text", "seed", "width", "height", "kind")
        return [{name: getattr(prompt, name) for name in names} for prompt in self.plan.prompts]


def generation_parameters(prompt: SamplePrompt, base: str, lora: str | None) -> str:
    """How an image was made, in the notation of A1111, which ComfyUI and model sites read as well."""
    text = f"{prompt.text} <lora:{lora.removesuffix('.safetensors')}:1>" if lora else prompt.text
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


def texts_of(plan: SamplePlan) -> list[str]:
    """Every prompt and negative prompt, once."""
    return list(dict.fromkeys(text for prompt in plan.prompts for text in (prompt.text, prompt.negative)))
