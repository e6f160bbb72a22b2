"""The loop around the training step; nothing else."""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from errors import SettingsError, Stopped, StopRequest
from training.batches import Batch
from training.buckets import OptimizerStep
from training.metrics import Tracker
from training.step import StepResult


class Saver(Protocol):
    """Who writes what the loop asks for."""

    def state(self, next_step: int, loss_average: float) -> None:
        """Everything needed to continue at `next_step`."""

    def lora(self, epochs: int) -> None:
        """The LoRA as it is after `epochs` epochs."""


@dataclass(frozen=True)
class Run:
    """The steps of a run and where it begins."""

    order: list[OptimizerStep]
    first_step: int
    loss_average: float | None
    epochs: int
    save_every_epochs: int
    save_state_every_s: float
    learning_rate_at: Callable[[int], float]

    def saves_lora_between(self, before: int, after: int) -> bool:
        """Whether a LoRA file is due when `after` epochs are done and `before` were; the end of the run has its own."""
        every = self.save_every_epochs
        return every > 0 and before // every < after // every and after < self.epochs


def run_steps(
    run: Run,
    take_step: Callable[[list[Batch], float], StepResult],
    batches: Iterable[list[Batch]],
    names: Callable[[OptimizerStep], str],
    saver: Saver,
    metrics: Tracker,
    stop: StopRequest,
) -> None:
    """Take the steps of `run` from its first one on; `batches` yields their micro-batches in the same order.

    Raises Stopped, after the state is saved, when a signal came; SettingsError when loss or gradient is no longer finite.
    """
    todo = run.order[run.first_step :]
    average, saved_at = run.loss_average, time.monotonic()
    images = sum(len(step.examples) for step in run.order)
    done = images - sum(len(step.examples) for step in todo)
    with tqdm(total=images, initial=done, unit="img", desc="train", disable=None, dynamic_ncols=True) as bar:
        for step, micro_batches in zip(todo, batches, strict=True):
            rate = run.learning_rate_at(step.number)
            result = take_step(micro_batches, rate)
            if result.diverged:
                raise _divergence(step, result, names)
            average = result.loss if average is None else 0.98 * average + 0.02 * result.loss
            report = {"epoch": step.epoch, "loss": result.loss, "loss_average": average, "lr": rate}
            metrics.log({**report, "gradient_norm": result.gradient_norm}, step.number)
            bar.set_postfix_str(f"epoch {step.epoch + 1}/{run.epochs} loss {average:.4f} lr {rate:.2e}", refresh=False)
            bar.update(len(step.examples))
            epochs_done = _epochs_done(run, step)
            if epochs_done > step.epoch:
                bar.write(_epoch_line(run, step, epochs_done, average, rate), file=sys.stdout)
                if run.saves_lora_between(step.epoch, epochs_done):
                    saver.lora(epochs_done)
            due = time.monotonic() - saved_at > run.save_state_every_s or step is run.order[-1]
            if due or stop.signum is not None:
                saver.state(step.number + 1, average)
                saved_at = time.monotonic()
            if stop.signum is not None:
                raise Stopped(stop.signum)


def _divergence(step: OptimizerStep, result: StepResult, names: Callable[[OptimizerStep], str]) -> SettingsError:
    return SettingsError(
        f"step {step.number}: the loss is {result.loss}, the gradient {result.gradient_norm} (pictures: {names(step)}). "
        "No weight was changed by it. Lower LEARNING_RATE, or set MIXED_PRECISION=bf16, and start again with FRESH=1"
    )


def _epochs_done(run: Run, step: OptimizerStep) -> int:
    """How many epochs are over after `step`."""
    following = step.number + 1
    return run.epochs if following == len(run.order) else run.order[following].epoch


def _epoch_line(run: Run, step: OptimizerStep, epochs_done: int, average: float, rate: float) -> str:
    steps = f"step {step.number + 1:>6}/{len(run.order)}"
    return f"epoch {epochs_done:>4}/{run.epochs}  {steps}  loss {average:.4f}  lr {rate:.2e}"
