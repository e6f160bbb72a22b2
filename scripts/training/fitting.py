"""The batch and gradient checkpointing that fit into the memory. Pure, but for what it prints."""

from collections.abc import Callable
from dataclasses import replace

from errors import ResourceError
from training.config import TrainSettings
from training.device import GIB, GPU_RESERVE_BYTES, StepMemory
from training.memory import Floors, largest_other_process


def fitted(
    settings: TrainSettings, size: StepMemory, picture_px: int, available: int, limits: Floors | None, hint: Callable[[], str]
) -> TrainSettings:
    """The settings with gradient checkpointing decided by the `available` bytes and, where memory is guarded, with a batch
    of pictures of `picture_px` pixels that fits; accumulation makes up for it.

    Raises ResourceError, ending in `hint()`, if not even one picture fits.
    """
    wanted, samples = settings.run.train_batch_size, samples_per_step(settings)
    reserve = limits.reserve if limits else GPU_RESERVE_BYTES
    checkpointing = settings.model.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = size.needed(wanted * picture_px, checkpointing=False) > available - reserve

    def needed(batch: int) -> int:
        return size.needed(batch * picture_px, checkpointing=checkpointing)

    batch = fitting_batch(wanted, samples, needed, available - reserve) if limits else wanted
    figures = f"{available / GIB:.1f} GiB are available, of which {reserve / GIB:.1f} stay in reserve"
    if batch == 0:
        name, largest = largest_other_process()
        raise ResourceError(
            f"training needs about {needed(1) / GIB:.1f} GiB of memory at batch size 1; {figures}. The largest other program is "
            f"{name} with {largest / GIB:.1f} GiB{hint()}. Close programs, or lower RESOLUTION or LORA_RANK, and run again"
        )
    if batch < wanted:
        print(f"batch size {wanted} needs about {needed(wanted) / GIB:.1f} GiB of memory; {figures}: it is {batch} now", flush=True)
    run = replace(settings.run, train_batch_size=batch, gradient_accumulation_steps=samples // batch)
    return replace(settings, run=run, model=replace(settings.model, gradient_checkpointing=checkpointing))


def what_fits(settings: TrainSettings, size: StepMemory, picture_px: int, available: int) -> str:
    """What to set after the memory was full although `available` bytes could be had, so that the run goes on from its state."""
    batch, samples = settings.run.train_batch_size, samples_per_step(settings)

    def needed(batch: int) -> int:
        return size.needed(batch * picture_px, checkpointing=True)

    if not settings.model.gradient_checkpointing and needed(batch) <= available:
        return "set GRADIENT_CHECKPOINTING=true"
    fits = fitting_batch(batch - 1, samples, needed, available)
    if fits:
        return f"set GRADIENT_CHECKPOINTING=true TRAIN_BATCH_SIZE={fits} GRADIENT_ACCUMULATION_STEPS={samples // fits}, which fits"
    return "close other programs on the GPU, or lower RESOLUTION or LORA_RANK"


def fitting_batch(wanted: int, samples: int, needed: Callable[[int], int], available: int) -> int:
    """The largest batch of at most `wanted` samples that divides `samples`, so that accumulation makes up for it, and
    whose `needed` bytes are `available`; 0 if not even one sample fits."""
    fitting = [batch for batch in range(1, wanted + 1) if samples % batch == 0 and needed(batch) <= available]
    return max(fitting, default=0)


def samples_per_step(settings: TrainSettings) -> int:
    """Of one process."""
    return settings.run.train_batch_size * settings.run.gradient_accumulation_steps
