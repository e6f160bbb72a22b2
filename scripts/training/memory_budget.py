"""The memory of the machine, and the batch and gradient checkpointing that fit into it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from common.errors import ResourceError
from training.config import TrainSettings
from training.data.dataset import Example
from training.models.sdxl import BaseModel, Component
from training.plan import largest_image_px, placed
from training.system.device import (
    GIB,
    Precision,
    available_bytes,
    shares_memory,
)
from training.system.memory_guard import KERNEL, Thresholds, floors, largest_other_process


@dataclass(frozen=True)
class StepMemory:
    """About what a step takes, in bytes: a part that is always there, and one per pixel of the micro-batch."""

    fixed: int
    per_pixel: int
    per_pixel_checkpointed: int

    def needed(self, batch_pixels: int, *, checkpointing: bool) -> int:
        """For a micro-batch of so many pixels, with activations recomputed or kept."""
        return self.fixed + batch_pixels * (self.per_pixel_checkpointed if checkpointing else self.per_pixel)


def step_memory(unet: Component, rank: int, precision: Precision) -> StepMemory:
    """From the sizes of the UNet's weights: they themselves; LoRA weights, gradients and two moments in fp32 and a working
    copy; workspaces; and activations, which grow with the UNet's width."""
    shapes = {name: tensor.shape for name, tensor in unet.tensors.items()}
    itemsize = precision.dtype.itemsize
    linears = [shape for name, shape in shapes.items() if "transformer_blocks" in name and len(shape) == 2]
    lora = rank * sum(sum(shape) for shape in linears) * (16 + itemsize)
    weights = itemsize * sum(math.prod(shape) for shape in shapes.values())
    workspaces = _GPU_WORKSPACE_BYTES if precision.device.type == "cuda" else _CPU_WORKSPACE_BYTES
    scale = itemsize / 2 * unet.config["block_out_channels"][0] / _SDXL_WIDTH
    kept, recomputed = (int(scale * per_pixel) for per_pixel in (_ACTIVATION_BYTES_PER_PIXEL, _CHECKPOINTED_BYTES_PER_PIXEL))
    return StepMemory(weights + lora + workspaces, kept, recomputed)


_SDXL_WIDTH = 320


_ACTIVATION_BYTES_PER_PIXEL = 5632
"""Of SDXL in bf16, per pixel of the micro-batch: a step of batch 4 at 1024 x 1024 reserved 28.7 GiB on an H100."""


_CHECKPOINTED_BYTES_PER_PIXEL = 1024
"""The same with checkpointing: 10.9 GiB."""


_GPU_WORKSPACE_BYTES = GIB * 3 // 2


_CPU_WORKSPACE_BYTES = GIB // 4


GPU_RESERVE_BYTES = 8 * GIB
"""Of a GPU's own memory, when "auto" decides whether activations are kept."""


ENOUGH_AT_ONCE = 4
"""Images; more of them are hardly faster, and checkpointing costs a third."""


@dataclass(frozen=True)
class MemoryBudget:
    """The memory that a run has, and what it needs of it."""

    size: StepMemory
    image_px: int
    """Pixels of an image of the largest bucket."""
    available: int
    """Bytes for this process."""
    floors: Thresholds | None
    """Of the memory; None: nobody guards it."""

    @property
    def reserve(self) -> int:
        """Bytes that are to be left over."""
        return self.floors.reserve if self.floors else GPU_RESERVE_BYTES

    @property
    def free(self) -> int:
        return max(0, self.available - self.reserve)

    def needed(self, batch: int, *, checkpointing: bool) -> int:
        return self.size.needed(batch * self.image_px, checkpointing=checkpointing)


def measure_budget(
    base: BaseModel, examples: list[Example], settings: TrainSettings, precision: Precision, processes: int
) -> MemoryBudget:
    """The memory of this machine as it is now, for each of so many `processes` on it."""
    shared = shares_memory(precision.device)
    limits = floors(settings.run.memory_floor_gib, KERNEL.read().total, shared)
    size = step_memory(base.components["unet"], settings.lora.lora_rank, precision)
    available = available_bytes(precision.device) // (processes if shared else 1)
    return MemoryBudget(size, largest_image_px(placed(examples, settings.data)), available, limits)


def fit_to_memory(settings: TrainSettings, room: MemoryBudget, hint: Callable[[], str]) -> TrainSettings:
    """The settings with gradient checkpointing decided and, where memory is guarded, with a batch that fits; accumulation
    makes up for it.

    Raises ResourceError, ending in `hint()`, if not even one image fits.
    """
    wanted, samples = settings.run.train_batch_size, samples_per_step(settings)
    checkpointing = settings.model.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = room.needed(wanted, checkpointing=False) > room.free

    needed = partial(room.needed, checkpointing=checkpointing)
    batch = fitting_batch(wanted, samples, needed, room.free) if room.floors else wanted
    figures = f"{room.available / GIB:.1f} GiB are available, of which {room.reserve / GIB:.1f} stay in reserve"
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


def resolve_batch_size(settings: TrainSettings, room: MemoryBudget, most: int, samples: int | None = None) -> TrainSettings:
    """The settings with `train_batch_size = "auto"` decided: the largest batch, of at most `most` images, that leaves the
    reserve; with gradient checkpointing where fewer than 4 fit without it.

    `samples`: of one process in each step of the saved run, which the batch has to divide.
    """
    if settings.run.train_batch_size != "auto":
        return settings

    def largest(checkpointing: bool) -> int:
        limit = min(samples or most, most)
        return fitting_batch(limit, samples or 0, partial(room.needed, checkpointing=checkpointing), room.free)

    switch = settings.model.gradient_checkpointing
    batch = largest(checkpointing=switch is True)
    if switch == "auto" and batch < min(ENOUGH_AT_ONCE, most):
        batch = largest(checkpointing=True)
    batch = max(1, batch)
    of_saved = f", for the saved run's steps of {samples}" if samples else ""
    print(f"batch size {batch}: the largest for {room.free / GIB:.1f} GiB and {most} images{of_saved}", flush=True)
    accumulation = samples // batch if samples else settings.run.gradient_accumulation_steps
    return replace(settings, run=replace(settings.run, train_batch_size=batch, gradient_accumulation_steps=accumulation))


def suggest_settings(settings: TrainSettings, room: MemoryBudget, available: int) -> str:
    """What to set after the memory was full although `available` bytes could be had, so that the run goes on from its state."""
    batch, samples = settings.run.train_batch_size, samples_per_step(settings)

    needed = partial(room.needed, checkpointing=True)
    if not settings.model.gradient_checkpointing and needed(batch) <= available:
        return "set GRADIENT_CHECKPOINTING=true"
    fits = fitting_batch(batch - 1, samples, needed, available)
    if fits:
        return f"set GRADIENT_CHECKPOINTING=true TRAIN_BATCH_SIZE={fits} GRADIENT_ACCUMULATION_STEPS={samples // fits}, which fits"
    return "close other programs on the GPU, or lower RESOLUTION or LORA_RANK"


def fitting_batch(wanted: int, samples: int, needed: Callable[[int], int], available: int) -> int:
    """The largest batch of at most `wanted` samples that divides `samples`, so that accumulation makes up for it, and
    whose `needed` bytes are `available`; 0 if not even one sample fits. Everything divides 0."""
    fitting = [batch for batch in range(1, wanted + 1) if samples % batch == 0 and needed(batch) <= available]
    return max(fitting, default=0)


def samples_per_step(settings: TrainSettings) -> int:
    """Of one process."""
    return settings.run.train_batch_size * settings.run.gradient_accumulation_steps
