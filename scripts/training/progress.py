"""How far a run has come. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
