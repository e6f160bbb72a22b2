"""The loop around the training step: which step comes next, and what happens after each step and each epoch."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from common.errors import Interruption, ResourceError, SettingsError
from common.progress import ProgressBar
from training.config import SavingSettings, ValidationSettings
from training.data.batches import Batch
from training.data.buckets import OptimizerStep
from training.engine.step import StepResult

BROKEN = 2.0
"""Of a model whose validation loss is more than so many times the lowest, training has destroyed what it could draw."""
SMOOTHED_OVER = 3
"""Validation losses that are averaged into one smoothed value: a single one moves by chance."""


@dataclass(frozen=True)
class Progress:
    """Everything that the loop knows besides the weights."""

    next_step: int = 0
    """The optimizer step that comes next."""
    loss_average: float | None = None
    """The running average of the loss; None before the first one."""
    validations: dict[int, float] = field(default_factory=dict)
    """The validation losses so far, in order, by the number of epochs before them."""

    def after(self, step: int, loss: float | None) -> "Progress":
        """The progress after optimizer step `step`; `loss` is None if it was skipped."""
        average = self.loss_average
        if loss is not None:
            average = loss if average is None else 0.98 * average + 0.02 * loss
        return replace(self, next_step=step + 1, loss_average=average)

    @property
    def shown_loss(self) -> str:
        """The running average as log lines show it."""
        return "-" if self.loss_average is None else f"{self.loss_average:.4f}"


def smoothed(validations: Mapping[int, float]) -> dict[int, float]:
    """Each loss averaged with those before it, over SMOOTHED_OVER of them; one that is no number counts as infinite."""
    losses = list(validations.values())
    windows = [losses[max(0, end - SMOOTHED_OVER) : end] for end in range(1, len(losses) + 1)]
    means = (sum(window) / len(window) for window in windows)
    return {epochs: mean if math.isfinite(mean) else math.inf for epochs, mean in zip(validations, means, strict=True)}


def breaks_down(losses: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` of these smoothed validation losses are more than BROKEN times the lowest; 0: never."""
    return 0 < patience < len(losses) and min(losses[-patience:]) > BROKEN * min(losses)


class Callback:
    """What happens besides the training. A callback overrides what it needs."""

    def after_step(self, step: OptimizerStep, values: dict[str, float]) -> None:
        """Called when the result of `step` is known; `values` are its numbers by name: epoch, lr, loss, gradient_norm ..."""

    def after_losses(self, step: OptimizerStep, samples: Sequence[tuple[int, float]]) -> None:
        """Called before `after_step`, unless the step was skipped, with what StepResult holds of this process's samples."""

    def after_epoch(self, step: OptimizerStep, epochs: int, progress: Progress) -> tuple[Progress, str]:
        """Called when `step` has completed `epochs` epochs, in every process. Returns the progress, changed where the callback
        measured something, and what it adds to the log line of the epoch."""
        return progress, ""

    def after_validation(self, step: OptimizerStep, values: dict[str, float]) -> None:
        """Called when a validation after `step` is complete, in the process that writes; `values` are its numbers by name."""

    def after_samples(self, step: int, images: dict[str, Path]) -> None:
        """Called when sample images with the weights after `step` are complete, in the process that writes: their files by name."""

    def after_likeness(self, step: int, likeness: float) -> None:
        """Called at the end of the run, in the process that writes, with the likeness of the sample images after `step`."""

    def save_state(self, progress: Progress, *, wait: bool) -> None:
        """Save what the run is continued from at `progress`. Training may go on while it is written, unless it has to `wait`."""


RunningStep = tuple[OptimizerStep, float, Callable[[], StepResult]]
"""A step that may still be running on the GPU, its learning rate, and a function that waits for its result."""


@dataclass(frozen=True)
class RunSchedule:
    """The steps of a run, where it begins, and when what is due."""

    order: list[OptimizerStep]
    start: Progress
    epochs: int
    shared_prefix_steps: int
    """A checkpoint is saved after so many steps: the last one that a run of more epochs has, too."""
    saving: SavingSettings
    validation: ValidationSettings
    learning_rate_at: Callable[[int], float]
    other_rates: Mapping[str, float] = field(default_factory=dict)
    """Of weights with a learning rate of their own: its name in the metrics, and what multiple of the first rate it is."""

    @property
    def remaining(self) -> list[OptimizerStep]:
        """The steps from `start` on."""
        return self.order[self.start.next_step :]

    def saves_lora_between(self, before: int, after: int) -> bool:
        """Whether a LoRA file is due when `after` epochs are complete and `before` were; the end of the run has its own."""
        every = self.saving.save_every_epochs
        return every > 0 and before // every < after // every and after < self.epochs

    def validates_between(self, before: int, after: int) -> bool:
        """Whether a validation is due when `after` epochs are complete and `before` were: always for a LoRA that is kept."""
        every = self.validation.validate_every_epochs
        return before // every < after // every or after == self.epochs or self.saves_lora_between(before, after)

    def ends_early(self, progress: Progress) -> bool:
        """Whether `early_stop_patience` ends the run here."""
        return breaks_down(list(smoothed(progress.validations).values()), self.validation.early_stop_patience)

    def epochs_complete(self, next_step: int) -> int:
        """How many epochs are complete before step `next_step`."""
        return self.epochs if next_step == len(self.order) else self.order[next_step].epoch


def run_steps(
    schedule: RunSchedule,
    begin: Callable[[list[Batch], float], Callable[[], StepResult]],
    batches: Iterable[list[Batch]],
    image_names: Callable[[OptimizerStep], str],
    callbacks: Sequence[Callback],
    stop_requested: Callable[[], Interruption | None],
    averaged: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Progress:
    """Take the remaining steps of `schedule`; `batches` yields their micro-batches in the same order. Returns the progress.

    The result of a step is read while the next one is running, except where something is saved or measured after it: callbacks of
    an epoch's end are called within `averaged`. At the end the last checkpoint may still be on its way to the disk. Raises what
    `stop_requested` returns, after the checkpoint is saved; SettingsError when loss or gradient is no longer finite; ResourceError,
    after the checkpoint is saved, when a batch cannot be read.
    """
    progress, saved_at = schedule.start, time.monotonic()
    running: RunningStep | None = None
    state_every_s = schedule.saving.save_state_every_minutes * 60
    total, remaining = (sum(len(step.examples) for step in steps) for steps in (schedule.order, schedule.remaining))
    with ProgressBar(total, "train", "img", total - remaining, dynamic_ncols=True) as bar:
        for step, micro_batches in zip(schedule.remaining, _with_error_as_last(batches), strict=True):
            if schedule.ends_early(progress):
                break
            if isinstance(micro_batches, ResourceError):
                if running:
                    progress = _finish_step(running, schedule, progress, image_names, callbacks, bar)
                for callback in callbacks:
                    callback.save_state(progress, wait=True)
                raise micro_batches
            rate = schedule.learning_rate_at(step.number)
            begun = step, rate, begin(micro_batches, rate)
            if running:
                progress = _finish_step(running, schedule, progress, image_names, callbacks, bar)
            running = begun
            reason = stop_requested()
            is_due = time.monotonic() - saved_at > state_every_s or step.number + 1 == schedule.shared_prefix_steps
            ends_epoch = schedule.epochs_complete(step.number + 1) > step.epoch
            if not (reason or is_due or ends_epoch):
                continue
            progress, running = _finish_step(begun, schedule, progress, image_names, callbacks, bar), None
            if ends_epoch:
                with averaged():
                    progress, line = _end_epoch(step, schedule, progress, callbacks)
                bar.write(f"{line}  lr {rate:.2e}", file=sys.stdout)
                reason = reason or stop_requested()  # callbacks may take minutes, and end early when a stop is requested
            if reason or is_due or schedule.ends_early(progress):
                for callback in callbacks:
                    callback.save_state(progress, wait=reason is not None)
                saved_at = time.monotonic()
            if reason:
                raise reason
    return progress


def _with_error_as_last(batches: Iterable[list[Batch]]) -> Iterator[list[Batch] | ResourceError]:
    """The batches; if one cannot be read, the error instead of it, so that the state can be saved before it is raised."""
    try:
        yield from batches
    except ResourceError as error:
        yield error


def _finish_step(
    running: RunningStep,
    schedule: RunSchedule,
    progress: Progress,
    image_names: Callable[[OptimizerStep], str],
    callbacks: Sequence[Callback],
    bar: tqdm,
) -> Progress:
    """Wait for the end of a step and report it; returns the progress after it."""
    step, rate, read = running
    result = read()
    if result.diverged:
        for callback in callbacks:
            callback.save_state(progress, wait=True)
        raise SettingsError(
            f"step {step.number}: the loss is {result.loss}, the gradient norm {result.gradient_norm} (images: "
            f"{image_names(step)}). This step changed no weight, and the checkpoint before it is saved. Lower LEARNING_RATE, or "
            "set MIXED_PRECISION=bf16, and start again with FRESH=1"
        )
    progress = progress.after(step.number, None if result.skipped else result.loss)
    values = {"epoch": step.epoch, "lr": rate} | {name: factor * rate for name, factor in schedule.other_rates.items()}
    if not result.skipped:
        values |= {"loss": result.loss, "loss_average": progress.loss_average, "gradient_norm": result.gradient_norm}
    for callback in callbacks:
        if not result.skipped:
            callback.after_losses(step, result.samples)
        callback.after_step(step, values)
    described = f"epoch {step.epoch + 1}/{schedule.epochs} loss {progress.shown_loss} lr {rate:.2e}"
    bar.set_postfix_str(described, refresh=False)
    bar.update(len(step.examples))
    return progress


def _end_epoch(
    step: OptimizerStep, schedule: RunSchedule, progress: Progress, callbacks: Sequence[Callback]
) -> tuple[Progress, str]:
    """Run the callbacks of an epoch's end; returns the progress after them, and the epoch's log line."""
    epochs = schedule.epochs_complete(progress.next_step)
    line = f"epoch {epochs:>4}/{schedule.epochs}  step {step.number + 1:>6}/{len(schedule.order)}  loss {progress.shown_loss}"
    for callback in callbacks:
        progress, added = callback.after_epoch(step, epochs, progress)
        line += added
    return progress, line
