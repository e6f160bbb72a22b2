"""Sample images: the base model and every saved LoRA on the same prompts and noise, rendered with the networks in memory; and
which LoRA they recommend.

Training is not changed by them to the last bit: noise comes from a generator of its own, captured steps that are deleted for their
memory are captured again, and a process that was killed renders the same pixels again.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from PIL import Image

from common.errors import Interruption
from common.output_layout import OutputLayout
from common.progress import ProgressBar
from training.callbacks.recommendation import Recommendation, Save, choose, lowest_strength
from training.callbacks.renderer import Renderer
from training.callbacks.sample_likeness import SampleLikeness
from training.callbacks.sample_plan import SamplePlan
from training.callbacks.sample_prompts import SamplePrompt
from training.callbacks.sample_record import BASE, FINAL, Row, SampleRecord
from training.data.buckets import OptimizerStep
from training.loop import Callback, Progress, RunSchedule, smoothed
from training.method.adapters import LoraModule, at_strength
from training.method.export import is_lora_of, load_lora
from training.system.process_group import ProcessGroup

POLL_S = 0.5
"""While scores are waited for, stops are asked for this often."""
_OUT_OF_MEMORY, _NOT_FINITE = 1, 2
_FAILURES = {
    _OUT_OF_MEMORY: "there is not enough GPU memory besides training; set SAMPLE_SIZE to a smaller number",
    _NOT_FINITE: "the UNet or the VAE returns NaN or infinity",
}
Rendered = tuple[Image.Image, torch.Tensor]
"""An image, and its latents [1, 4, h, w] on the CPU."""


@dataclass
class SampleImages(Callback):
    """Renders a row of images at the start, when a LoRA is saved, and at the end. All processes share the prompts."""

    plan: SamplePlan
    renderer: Renderer
    outputs: OutputLayout
    schedule: RunSchedule
    record: SampleRecord
    likeness: SampleLikeness
    group: ProcessGroup
    stop_requested: Callable[[], Interruption | None]
    trackers: Sequence[Callback] = ()
    """These record the images."""
    is_off: bool = False
    """Something failed; the run goes on without images."""
    recommendation: Recommendation | None = None
    """Known in the main process when the last row is complete."""

    def start(self, progress: Progress) -> None:
        """Before the first step that is left: render the base model; the LoRA files whose rows are due and missing, as after a
        change of a setting of sample images; and the row that a stop has interrupted."""
        if self.group.is_main_process:
            self.record.read(progress.next_step)
        with at_strength(self.renderer.step.adapter, 0):
            self._render(Row(BASE, None, 0, 0))
        ends = [(step, self.schedule.epochs_complete(step.number + 1)) for step in self.schedule.order[: progress.next_step]]
        ends = [(step, epochs) for step, epochs in ends if epochs > step.epoch]
        for step, epochs in ends:
            if self.stop_requested():
                return
            if step.number + 1 == progress.next_step:
                self.after_epoch(step, epochs, progress)
            elif self.plan.is_due(step.epoch, epochs):
                self._render_again(self._row_after(step, epochs))

    def after_step(self, step: OptimizerStep, values: dict[str, float]) -> None:
        if self.group.is_main_process and self.likeness.has_news():
            self.record.write()

    def after_epoch(self, step: OptimizerStep, epochs: int, progress: Progress) -> tuple[Progress, str]:
        if epochs == self.schedule.epochs or self.schedule.ends_early(progress):
            self._render(Row(FINAL, self.outputs.lora.name, step.number + 1, epochs))
            self._recommend(epochs, progress)
        elif self.plan.is_due(step.epoch, epochs):
            self._render(self._row_after(step, epochs))
        return progress, ""

    def _row_after(self, step: OptimizerStep, epochs: int) -> Row:
        file = self.outputs.lora_after(epochs)
        return Row(f"after epoch {epochs}", file.name if file.exists() else None, step.number + 1, epochs)

    def _render_again(self, row: Row) -> None:
        """Render what is missing of the row of a LoRA whose weights are no longer in memory, if its file is there."""
        file, modules = self.outputs.lora_dir / (row.file or ""), self.renderer.step.adapter.modules
        is_missing, has_file = self.group.broadcast_object(lambda: (bool(self._missing(row)), is_lora_of(file, modules)))
        if has_file or not is_missing:
            with self._weights_of(row.file) if is_missing else contextlib.nullcontext():
                self._render(row)

    def _missing(self, row: Row) -> list[int]:
        """Numbers of the prompts that are still to be rendered; the images of a row that is listed were looked at before."""
        return [] if row in self.record else self.record.missing(row)

    @contextlib.contextmanager
    def _weights_of(self, file: str | None) -> Iterator[None]:
        """Within this block the adapter has the weights of a LoRA file, which the main process reads."""
        adapter = self.renderer.step.adapter
        trained = adapter.weights.detach().to("cpu", copy=True)
        try:
            if self.group.is_main_process:
                load_lora(self.outputs.lora_dir / file, adapter.modules)
            self.group.broadcast([adapter.weights.detach()])
            yield
        finally:
            with torch.no_grad():
                adapter.weights.copy_(trained)

    def _render(self, row: Row) -> None:
        """Render what is missing of a row, list it in samples.json when it is complete, and pass it to the trackers. Ends early
        if a stop is requested."""
        if self.is_off:
            return
        is_listed, missing = self.group.broadcast_object(lambda: (row in self.record, self._missing(row)))
        if is_listed:
            return
        world_size, writes, is_stopped = self.group.world_size, [], False
        if missing:
            self.renderer.begin()
        # PNG is compressed in a thread, while the next image is rendered.
        with ThreadPoolExecutor(1) as writer, ProgressBar(len(missing), f"samples, {row.label}", "img", leave=False) as bar:
            for first in range(0, len(missing), world_size):
                numbers = missing[first : first + world_size]
                mine = numbers[self.group.rank : self.group.rank + 1]
                rendered, failure = self._image(self.plan.prompts[mine[0]]) if mine else (None, 0)
                if failure := self.group.all_reduce_max(failure):
                    self.is_off = True
                    print(f"sample images: none from here on ({_FAILURES[failure]})", flush=True)
                    break
                for number, each in zip(numbers, self.group.gather_objects(rendered), strict=False):
                    if each is not None:
                        writes.append(writer.submit(self.record.write_image, row, number, *each))
                if is_stopped := self.stop_requested():
                    break
                bar.update(len(numbers))
        for write in writes:
            write.result()
        if is_stopped:
            return
        self.renderer.release()
        if self.group.is_main_process and not self.is_off:
            files = self.record.complete(row)
            for tracker in self.trackers if row.strength == 1 else ():
                tracker.after_samples(max(0, row.step - 1), files)

    def _image(self, prompt: SamplePrompt) -> tuple[Rendered | None, int]:
        """An image, None if a stop was requested; and what failed, else 0."""
        # Several processes ask for stops together, after each image.
        stops = (lambda: self.stop_requested() is not None) if self.group.world_size == 1 else (lambda: False)
        try:
            latents = self.renderer.latents(prompt, stops)
            return None if latents is None else (self.renderer.decoded(latents), latents.cpu()), 0
        except torch.OutOfMemoryError:
            return None, _OUT_OF_MEMORY
        except FloatingPointError:
            return None, _NOT_FINITE

    def _recommend(self, last: int, progress: Progress) -> None:
        """When the last row is there: choose a LoRA and its strength, for which it is rendered at the lower strengths too."""
        if not self._is_scored():
            return
        save, reason = self.group.broadcast_object(lambda: self._choose(last, progress))
        steps = sum(step.epoch < save.epochs for step in self.schedule.order)
        with contextlib.nullcontext() if save.epochs == last else self._weights_of(save.file):
            if save.epochs != last:
                self._render(Row(f"after epoch {save.epochs}", save.file, steps, save.epochs))  # usually it is there
            for strength in self.plan.lower_strengths:
                with at_strength(self.renderer.step.adapter, strength):
                    self._render(Row(f"strength {strength}", save.file, steps, save.epochs, strength))
        if (self._is_scored() or self.is_off) and self.group.is_main_process:
            strength, verdict = lowest_strength(self.record.scores_by_strength(save.epochs))
            self.recommendation = Recommendation(save.file, save.epochs, strength, f"{reason} {verdict}".strip())
            for step, likeness in self.record.likeness_by_step().items():
                for tracker in self.trackers:
                    tracker.after_likeness(step, likeness)
            self.record.finish(self.recommendation)

    def _choose(self, last: int, progress: Progress) -> tuple[Save, str]:
        saves = saves_of(self.outputs, self.renderer.step.adapter.modules, last)
        measured = [self.record.measured(save) for save in saves]  # which finds out whether likeness can be measured
        return choose(measured, self.likeness.problem, smoothed(progress.validations))

    def _is_scored(self) -> bool:
        """Wait until all images are scored; False if a stop was requested meanwhile, or images failed."""
        total = len(self.likeness.pending())
        with ProgressBar(total, "likeness of sample images", "img", leave=False) as bar:
            while not self.is_off:
                if self.stop_requested():
                    return False
                pending = self.group.broadcast_object(lambda: len(self.likeness.pending()))
                bar.update(total - pending - bar.n)
                if not pending:
                    return True
                wait(self.likeness.pending()[:1], POLL_S)
        return False


def saves_of(outputs: OutputLayout, modules: Sequence[LoraModule], last: int) -> list[Save]:
    """The LoRAs of a run that ends after `last` epochs, that one included, which is saved last. Files that are damaged or of
    another run are left out."""
    files = {epochs: outputs.lora_after(epochs) for epochs in range(1, last)}
    saved = [(path.name, epochs) for epochs, path in files.items() if path.exists() and is_lora_of(path, modules)]
    return [Save(name, epochs) for name, epochs in [*saved, (outputs.lora.name, last)]]


def texts_of(plan: SamplePlan) -> list[str]:
    """Every prompt and negative prompt, once."""
    return list(dict.fromkeys(text for prompt in plan.prompts for text in (prompt.text, prompt.negative)))
