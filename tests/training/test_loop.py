"""The loop over the steps, with steps that only report: what is recorded of them, and how far the run has come."""

import contextlib
import math
from dataclasses import replace

import pytest

from common.errors import SettingsError
from training.config import SavingSettings, ValidationSettings
from training.data.buckets import Bucket, OptimizerStep
from training.engine.step import StepResult
from training.loop import Callback, Progress, RunSchedule, run_steps, smoothed

SAVING = SavingSettings(save_every_epochs=0)
VALIDATION = ValidationSettings(validate_every_epochs=1)


class Lines(Callback, list):
    """Keeps the numbers of each step."""

    def after_step(self, step: OptimizerStep, values: dict) -> None:
        self.append(values | {"step": step.number})


def test_a_step_that_fp16_skipped_has_no_loss_and_leaves_the_average_alone(capsys):
    order = [OptimizerStep(number, number, Bucket(64, 64), (0,)) for number in range(4)]
    schedule = RunSchedule(order, Progress(), 4, 4, SAVING, VALIDATION, lambda number: 1e-4)
    skipped, taken = StepResult(float("nan"), float("inf"), skipped=True), StepResult(0.5, 1.0)
    steps, lines = iter([skipped, taken, skipped, taken]), Lines()
    progress = run_steps(schedule, lambda *_: lambda: next(steps), [[]] * 4, lambda step: "", [lines], lambda: None)
    assert progress == Progress(next_step=4, loss_average=0.5)
    assert ["loss" in line for line in lines] == [False, True, False, True]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    shown = [line.partition("  loss ")[2].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["-", "0.5000", "0.5000", "0.5000"]


def test_a_loss_that_is_not_finite_ends_the_run():
    order = [OptimizerStep(0, 0, Bucket(64, 64), (0,))]
    schedule = RunSchedule(order, Progress(), 1, 1, SAVING, VALIDATION, lambda number: 1e-4)
    result = StepResult(float("nan"), 1.0, diverged=True)
    with pytest.raises(SettingsError, match="step 0: the loss is nan"):
        run_steps(schedule, lambda *_: lambda: result, [[]], lambda step: "a.png", [Lines()], lambda: None)


def test_what_an_epoch_ends_with_sees_averaged_weights_and_a_checkpoint_does_not():
    order = [OptimizerStep(number, number // 2, Bucket(64, 64), (0,)) for number in range(4)]
    saving = SavingSettings(save_every_epochs=0, save_state_every_minutes=1e-9)
    schedule = RunSchedule(order, Progress(), 2, 4, saving, VALIDATION, lambda number: 1e-4)
    is_averaged, seen = [False], []

    @contextlib.contextmanager
    def averaged():
        is_averaged[0] = True
        yield
        is_averaged[0] = False

    class Watcher(Callback):
        def after_step(self, step, values):
            seen.append(("step", is_averaged[0]))

        def after_epoch(self, step, epochs, progress):
            seen.append(("epoch", is_averaged[0]))
            return progress, ""

        def save_state(self, progress, *, wait):
            seen.append(("checkpoint", is_averaged[0]))

    result = StepResult(0.5, 1.0)
    run_steps(schedule, lambda *_: lambda: result, [[]] * 4, lambda step: "", [Watcher()], lambda: None, averaged)
    assert {name for name, _ in seen} == {"step", "epoch", "checkpoint"}
    assert all(averaged is (name == "epoch") for name, averaged in seen)


def test_a_loss_that_is_no_number_is_higher_than_all_others():
    assert smoothed({1: float("nan"), 2: 0.1, 3: 0.2, 4: 0.3, 5: 0.4}) == pytest.approx(
        {1: math.inf, 2: math.inf, 3: math.inf, 4: 0.2, 5: 0.3}
    )


@pytest.mark.parametrize(("patience", "ends_after"), [(0, None), (1, 4), (2, 5), (3, None)])
def test_a_run_ends_early_when_the_validation_loss_has_doubled_again_and_again(patience, ends_after):
    """Smoothed over three, the losses are 1, 1, 1, 2.07, 2.1 and 1.97: not more than twice the lowest at the end."""
    losses = {1: 1.0, 2: 1.0, 3: 1.0, 4: 4.2, 5: 1.1, 6: 0.6}
    schedule = RunSchedule([], Progress(), 6, 6, SAVING, replace(VALIDATION, early_stop_patience=patience), lambda number: 1e-4)
    found = [epochs for epochs in losses if schedule.ends_early(Progress(validations=dict(list(losses.items())[:epochs])))]
    assert (found or [None])[0] == ends_after
