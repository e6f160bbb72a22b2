"""The loop over the steps, with steps that only report: what is recorded of them, and how far the run has come."""

import pytest

from common.errors import SettingsError
from training.config import SavingSettings, ValidationSettings
from training.data.buckets import Bucket, OptimizerStep
from training.engine.step import StepResult
from training.loop import Callback, Progress, RunSchedule, run_steps

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
