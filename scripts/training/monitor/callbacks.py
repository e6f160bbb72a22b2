"""How far a run has come, and what can be done after its steps and epochs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from training.data.buckets import OptimizerStep

SMOOTHED_OVER = 3
"""Validation losses that are averaged into one smoothed value: a single one moves by chance."""


@dataclass(frozen=True)
class Validation:
    """The validation loss after some epochs."""

    epochs: int
    loss: float


@dataclass(frozen=True)
class Progress:
    """Everything that the loop knows besides the weights."""

    next_step: int = 0
    """The optimizer step that comes next."""
    loss_average: float | None = None
    """The running average of the loss; None before the first one."""
    validations: tuple[Validation, ...] = ()
    """All so far, in order."""

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

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """The progress whose `dataclasses.asdict` is `values`."""
        validations = tuple(Validation(**one) for one in values["validations"])
        return cls(**{**values, "validations": validations})


def smoothed(validations: Sequence[Validation]) -> list[Validation]:
    """Each loss averaged with those before it, over SMOOTHED_OVER of them."""
    windows = [validations[max(0, end - SMOOTHED_OVER) : end] for end in range(1, len(validations) + 1)]
    return [Validation(window[-1].epochs, sum(one.loss for one in window) / len(window)) for window in windows]


class Callback:
    """What happens besides the training. A callback overrides what it needs."""

    def after_step(self, step: OptimizerStep, values: dict[str, float]) -> None:
        """Called when the result of `step` is known; `values` are its numbers by name: epoch, lr, loss, gradient_norm ..."""

    def after_epoch(self, step: OptimizerStep, epochs: int, progress: Progress) -> tuple[Progress, str]:
        """Called when `step` has completed `epochs` epochs, in every process. Returns the progress, changed where the callback
        measured something, and what it adds to the log line of the epoch."""
        return progress, ""

    def after_validation(self, step: OptimizerStep, values: dict[str, float]) -> None:
        """Called when a validation after `step` is complete, in the process that writes; `values` are its numbers by name."""

    def save_state(self, progress: Progress, *, wait: bool) -> None:
        """Save what the run is continued from at `progress`. Training may go on while it is written, unless it has to `wait`."""
