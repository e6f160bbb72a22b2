"""The first step of a run is checked: there, a loss that is not finite has another cause than later."""

import math
from collections.abc import Callable, Sequence

import torch

from common.errors import ModelError
from training.data.batches import Batch
from training.engine.step import StepResult
from training.job import TrainingJob
from training.models.sdxl import TEXT_ENCODERS
from training.models.weights import require_finite_weights


def checking_first_step(
    job: TrainingJob, begin: Callable[[list[Batch], float], Callable[[], StepResult]]
) -> Callable[[list[Batch], float], Callable[[], StepResult]]:
    """`begin` of a run's steps, of which the first raises ModelError if loss or gradient is not finite: the LoRA adds nothing yet,
    so that the cause is the base model or its embeddings, and never the learning rate."""
    is_first = True

    def begin_step(batches: list[Batch], learning_rate: float) -> Callable[[], StepResult]:
        nonlocal is_first
        read = begin(batches, learning_rate)
        if not is_first:
            return read
        is_first = False

        def read_first() -> StepResult:
            result = read()
            if result.diverged or not math.isfinite(result.loss):
                raise explain_first_step(job, batches)
            return result

        return read_first

    return begin_step


def explain_first_step(job: TrainingJob, batches: Sequence[Batch]) -> ModelError:
    """Why the first step's loss or gradient is not finite. Reads every weight of the networks if the data is not the cause."""
    values = [tensor for batch in batches for tensor in (batch.mean, batch.log_variance, batch.hidden, batch.pooled)]
    if not all(tensor.isfinite().all() for tensor in values):
        return ModelError(
            f"{job.outputs.cache}: holds NaN or infinity, which an earlier version stored; delete its folders text and latents, "
            "and run again"
        )
    try:
        require_finite_weights(job.base, ["unet"], job.precision.dtype)
        if batches[0].tokens.numel():
            require_finite_weights(job.base, TEXT_ENCODERS, job.precision.dtype)
    except ModelError as found:
        return found
    remedy = "set MIXED_PRECISION=bf16, or use" if job.precision.dtype == torch.float16 else "use"
    return ModelError(
        f"{job.base.path}: the UNet's first prediction is NaN or infinity, with a LoRA that adds nothing yet and weights that are "
        f"all finite; {remedy} another base model"
    )
