"""How far a run has come. Pure.

The loop around the training step; nothing else.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tqdm import tqdm

from common.errors import Interruption, SettingsError
from training.data.batches import Batch
from training.data.buckets import OptimizerStep
from training.engine.step import StepResult
from training.monitor.metrics import Tracker

SMOOTHED_OVER = 3
"""Held-out losses that one smoothed value averages: a single one moves by chance."""


@dataclass(frozen=True)
class Validation:
    """The held-out loss after some epochs."""

    epochs: int
    loss: float


@dataclass(frozen=True)
class Progress:
    """Everything the loop knows beside the weights."""

    next_step: int = 0
    """The optimizer step that comes next."""
    loss_average: float | None = None
    """The running average of the loss; None before the first one."""
    validations: tuple[Validation, ...] = ()
    """Every one so far, in order."""

    def after(self, step: int, loss: float | None) -> "Progress":
        """What it is when optimizer step `step` is over; `loss` is None if it was skipped."""
        average = self.loss_average
        if loss is not None:
            average = loss if average is None else 0.98 * average + 0.02 * loss
        return replace(self, next_step=step + 1, loss_average=average)

    def shown_loss(self) -> str:
        """The running average as a person reads it."""
        return "-" if self.loss_average is None else f"{self.loss_average:.4f}"

    def validated(self, epochs: int, loss: float) -> "Progress":
        """What it is when the held-out loss after `epochs` epochs is known."""
        return replace(self, validations=(*self.validations, Validation(epochs, loss)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """The progress of which `values` is the `asdict`."""
        validations = tuple(Validation(**one) for one in values["validations"])
        return cls(**{**values, "validations": validations})


def smoothed(validations: Sequence[Validation]) -> list[Validation]:
    """Each loss averaged with those before it, SMOOTHED_OVER together."""
    windows = [validations[max(0, end - SMOOTHED_OVER) : end] for end in range(1, len(validations) + 1)]
    return [Validation(window[-1].epochs, sum(one.loss for one in window) / len(window)) for window in windows]


def since_best(validations: Sequence[Validation]) -> int:
    """How many validations in a row, up to the last one, did not lower the smoothed loss."""
    losses = [one.loss for one in smoothed(validations)]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class Saver(Protocol):
    """Who writes what the loop asks for."""

    def state(self, progress: Progress) -> None:
        """Begin to write everything needed to continue from `progress`; training may go on."""

    def check(self) -> None:
        """Raise what the last save has met, if it is over."""

    def wait(self) -> None:
        """Wait until what was begun is on the disk."""

    def lora(self, epochs: int) -> None:
        """The LoRA as it is after `epochs` epochs."""


@dataclass(frozen=True)
class Run:
    """The steps of a run, where it begins, and when what is due."""

    order: list[OptimizerStep]
    begins: Progress
    epochs: int
    common_steps: int
    """A state is saved here: the last one that a run of more epochs has, too."""
    save_every_epochs: int
    save_state_every_s: float
    validate_every_epochs: int
    early_stop_patience: int
    """Validations without a lower smoothed loss after which the run ends; 0: never."""
    learning_rate_at: Callable[[int], float]

    @property
    def todo(self) -> list[OptimizerStep]:
        """The steps that are left."""
        return self.order[self.begins.next_step :]

    def saves_lora_between(self, before: int, after: int) -> bool:
        """Whether a LoRA file is due when `after` epochs are done and `before` were; the end of the run has its own."""
        every = self.save_every_epochs
        return every > 0 and before // every < after // every and after < self.epochs

    def validates_between(self, before: int, after: int) -> bool:
        """Whether the held-out loss is due when `after` epochs are done and `before` were: always for a LoRA that is kept."""
        every = self.validate_every_epochs
        return before // every < after // every or after == self.epochs or self.saves_lora_between(before, after)

    def ends_early(self, progress: Progress) -> bool:
        """Whether the held-out loss says that more steps would not make the LoRA better."""
        return 0 < self.early_stop_patience <= since_best(progress.validations)

    def epochs_done(self, next_step: int) -> int:
        """How many epochs are over before `next_step`."""
        return self.epochs if next_step == len(self.order) else self.order[next_step].epoch


@dataclass(frozen=True)
class Begun:
    """A step that may still be going on."""

    step: OptimizerStep
    rate: float
    read: Callable[[], StepResult]
    """Waits for its end."""


def run_steps(
    run: Run,
    begin: Callable[[list[Batch], float], Callable[[], StepResult]],
    batches: Iterable[list[Batch]],
    names: Callable[[OptimizerStep], str],
    held_out_loss: Callable[[], float] | None,
    saver: Saver,
    metrics: Tracker,
    stop_asked: Callable[[], Interruption | None],
) -> Progress:
    """Take the steps of `run` that are left; `batches` yields their micro-batches in the same order. Returns how far it came.

    A step's result is read while the next one is going on, except where something is saved or measured after it. At the end
    the last state may still be on its way to the disk. Raises what `stop_asked` answers, after the state is saved;
    SettingsError when loss or gradient is no longer finite.
    """
    progress, saved_at, before = run.begins, time.monotonic(), None
    images = sum(len(step.examples) for step in run.order)
    done = images - sum(len(step.examples) for step in run.todo)
    with tqdm(total=images, initial=done, unit="img", desc="train", disable=None, dynamic_ncols=True) as bar:
        for step, micro_batches in zip(run.todo, batches, strict=True):
            if run.ends_early(progress):
                break
            rate = run.learning_rate_at(step.number)
            begun = Begun(step, rate, begin(micro_batches, rate))
            if before:
                progress = _settled(run, before, progress, names, saver, metrics, bar)
            before = begun
            saver.check()
            reason = stop_asked()
            due = time.monotonic() - saved_at > run.save_state_every_s or step.number + 1 == run.common_steps
            ends_epoch = run.epochs_done(step.number + 1) > step.epoch
            if not (reason or due or ends_epoch):
                continue
            progress, before = _settled(run, begun, progress, names, saver, metrics, bar), None
            if ends_epoch:
                progress, line = _end_of_epoch(run, step, progress, held_out_loss, saver, metrics)
                bar.write(f"{line}  lr {rate:.2e}", file=sys.stdout)
            if reason or due or run.ends_early(progress):
                saver.state(progress)
                saved_at = time.monotonic()
            if reason:
                saver.wait()
                raise reason
    return progress


def _settled(
    run: Run,
    begun: Begun,
    progress: Progress,
    names: Callable[[OptimizerStep], str],
    saver: Saver,
    metrics: Tracker,
    bar: tqdm,
) -> Progress:
    """Wait for the end of a step and report it; what `progress` becomes with it."""
    step, result = begun.step, begun.read()
    if result.diverged:
        raise _divergence(step, result, names, progress, saver)
    progress = progress.after(step.number, None if result.skipped else result.loss)
    report = {"epoch": step.epoch, "lr": begun.rate}
    if not result.skipped:
        report |= {"loss": result.loss, "loss_average": progress.loss_average, "gradient_norm": result.gradient_norm}
    metrics.log(report, step.number)
    described = f"epoch {step.epoch + 1}/{run.epochs} loss {progress.shown_loss()} lr {begun.rate:.2e}"
    bar.set_postfix_str(described, refresh=False)
    bar.update(len(step.examples))
    return progress


def _end_of_epoch(
    run: Run, step: OptimizerStep, progress: Progress, held_out_loss: Callable[[], float] | None, saver: Saver, metrics: Tracker
) -> tuple[Progress, str]:
    """Validate and save the LoRA if it is time; the progress after it, and the line that says how the epoch went."""
    epochs_done = run.epochs_done(progress.next_step)
    line = f"epoch {epochs_done:>4}/{run.epochs}  step {step.number + 1:>6}/{len(run.order)}  loss {progress.shown_loss()}"
    if held_out_loss and run.validates_between(step.epoch, epochs_done):
        loss = held_out_loss()
        progress = progress.validated(epochs_done, loss)
        average = smoothed(progress.validations)[-1].loss
        metrics.log({"epoch": step.epoch, "validation_loss": loss, "validation_loss_smoothed": average}, step.number)
        line += f"  held-out {loss:.4f} (smoothed {average:.4f})"
    if run.saves_lora_between(step.epoch, epochs_done):
        saver.lora(epochs_done)
    return progress, line


def _divergence(
    step: OptimizerStep, result: StepResult, names: Callable[[OptimizerStep], str], progress: Progress, saver: Saver
) -> SettingsError:
    """Save the state as it was before the step, and say what happened in it."""
    saver.state(progress)
    saver.wait()
    return SettingsError(
        f"step {step.number}: the loss is {result.loss}, the gradient {result.gradient_norm} (images: {names(step)}). "
        f"No weight was changed by it; the state before it is saved. Lower LEARNING_RATE, or set MIXED_PRECISION=bf16, "
        "and start again with FRESH=1"
    )
