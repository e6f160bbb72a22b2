"""How much memory a step needs and this machine has; the batch size and gradient checkpointing that follow from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from common.errors import ResourceError
from training.config import TrainSettings
from training.data.batches import PRIOR_EVERY
from training.data.examples import Example
from training.engine import EngineName
from training.method.adapters import KEPT_BYTES_PER_WEIGHT
from training.method.layers import adapted_layers, count_weights, network_of, shapes_of_base
from training.method.optimizer_wrappers import floats_per_weight
from training.models.sdxl import TEXT_ENCODERS, BaseModel
from training.plan import at_each_resolution, placements_of
from training.system.device import (
    GIB,
    Precision,
    Thresholds,
    available_bytes,
    largest_other_process,
    read_memory,
    shares_memory,
    thresholds,
)
from training.system.environment import segments_grow

_FAST_BYTES_PER_PIXEL = 5632, 1024
"""Activations of SDXL in bf16 per pixel of the micro-batch, kept or with gradient checkpointing. Measured: a step of batch 4 at
1024 x 1024 reserved 28.7 and 10.9 GiB on an H100."""
_PLAIN_BYTES_PER_PIXEL = 9728, 1024
"""The same with PEFT's layers, which keep their inputs in fp32: batch 1 and 2 reserved 16.9 and 26.6 GiB, batch 4 with gradient
checkpointing 10.7 GiB."""
_CONV_BYTES_PER_PIXEL, _DORA_BYTES_PER_PIXEL = {"plain": 640, "fast": 320}, {"plain": 6240, "fast": 820}
_MASK_BYTES_PER_PIXEL = 1024
"""What is kept besides. Of adapted convolutions, their inputs, 37 feature maps of SDXL, in fp32 or bf16; of a DoRA, the outputs of
its layers, in fp32 or those in bf16 that are not kept anyway; of dropout, a byte for each number of the layers' inputs. Counted,
but for a DoRA in the fast engine: a step of batch 4 reserved 3.2 GiB more on an H200."""
_TEXT_BYTES = 68, 2
"""Activations of a text encoder with PEFT's layers in bf16, for each number of a layer's output: kept, or with gradient
checkpointing: 0.3 GiB for each chunk of SDXL's tokens. A step of batch 4 with 3 chunks reserved 51.1 and 12.5 GiB on an H200."""
_CHUNK = 77
"""Tokens, with start and end."""
_SDXL_WIDTH = 320
"""Channels of SDXL's first block. Activations grow with the width."""
_GPU_WORKSPACE_BYTES = 2 * GIB
"""CUDA's context, workspaces of its libraries, and what the allocator cannot use. With it, the estimates are within a tenth of what
nvidia-smi showed on an H200: 15.2 GiB at batch 1, 9.5 with gradient checkpointing, 5.6 also with an 8-bit base and rank 16."""
_GPU_CONTEXT_BYTES = GIB // 2
"""Of them, CUDA's context, as measured on an H100. This process has one when the free memory is read."""
_UNUSED_BYTES = GIB // 2
"""Of them, what the allocator cannot use unless its segments can grow. Where they can, an H100 showed 8.7 GiB with checkpointing at
batch 1 (8.7 predicted), 4.9 also with an 8-bit base, rank 8 and moments in 8 bits (5.1)."""
_CPU_WORKSPACE_BYTES = GIB // 4
GPU_RESERVE_BYTES, GPU_RESERVE_SHARE = 8 * GIB, 1 / 8
"""What remains free of a GPU's own memory, the smaller of both, when "auto" decides: estimates are right to about a tenth."""
EFFICIENT_BATCH = 4
"""A larger batch is hardly faster, while gradient checkpointing costs a third of the speed."""


@dataclass(frozen=True)
class MemoryBudget:
    """The memory that this process can use, and an estimate of what a step needs; everything in bytes."""

    fixed: int
    """Weights, LoRA with gradients and moments, workspaces."""
    fixed_kept: int
    """What is there besides without gradient checkpointing, whatever the batch."""
    per_image: int
    """Activations of one image of the largest bucket."""
    per_image_checkpointed: int
    """The same with gradient checkpointing."""
    available: int
    reserve: int
    """What must remain free of it."""
    thresholds: Thresholds | None
    """Of the machine's memory; None: it is not guarded."""
    is_guarded: bool
    """These thresholds are of the memory that a step takes: CPU and GPU share it."""
    saved_by_int8: int = 0
    """How much less the frozen weights take in 8 bits; 0 if they are counted like that already, or cannot be."""
    has_prior: bool = False
    """A step predicts some images again for another caption."""
    grows_segments: bool = False
    """The allocator's segments can grow, so that it reserves little more than what is used."""

    @property
    def free(self) -> int:
        """What a step may use."""
        return max(0, self.available - self.reserve)

    def needed(self, batch: int, *, checkpointing: bool) -> int:
        """What a step with a micro-batch of `batch` images needs."""
        images = batch + (-(-batch // PRIOR_EVERY) if self.has_prior else 0)
        if checkpointing:
            return self.fixed + images * self.per_image_checkpointed
        return self.fixed + self.fixed_kept + images * self.per_image


def usable_bytes(device: torch.device) -> int:
    """The memory that is free on `device`, with what this process's context takes of a GPU's own, which all estimates contain."""
    return available_bytes(device) + (0 if shares_memory(device) else _GPU_CONTEXT_BYTES)


def measure_budget(
    base: BaseModel, examples: list[Example], settings: TrainSettings, precision: Precision, engine: EngineName, processes: int
) -> MemoryBudget:
    """The budget of each of `processes` on this machine, as it is now.

    The need is estimated from the shapes of the networks' weights: in the computation's dtype; with LoRA weights, gradients and
    the optimizer's state in fp32 and a copy of the weights; and activations, which grow with the pixels of the micro-batch.
    """
    unet, itemsize = base.components["unet"], precision.dtype.itemsize
    text_encoders = [base.components[name] for name in TEXT_ENCODERS] if settings.lora.train_text_encoders else []
    shapes = shapes_of_base(base, settings.lora)
    ranks = adapted_layers(shapes, settings.lora)
    floats = 2 + floats_per_weight(settings.optimizer)  # weight, gradient and the optimizer's state
    trained = sum(count_weights(shapes[name], layer.rank, settings.lora) for name, layer in ranks.items())
    networks = unet, *text_encoders
    weights = itemsize * sum(math.prod(tensor.shape) for network in networks for tensor in network.tensors.values())
    workspaces = _GPU_WORKSPACE_BYTES if precision.device.type == "cuda" else _CPU_WORKSPACE_BYTES
    grows_segments = precision.device.type == "cuda" and segments_grow()
    workspaces -= _UNUSED_BYTES if grows_segments else 0
    scale = itemsize / 2 * unet.config["block_out_channels"][0] / _SDXL_WIDTH
    kept_px, checkpointed_px = _PLAIN_BYTES_PER_PIXEL if engine == "plain" else _FAST_BYTES_PER_PIXEL
    kept_px += _CONV_BYTES_PER_PIXEL[engine] if settings.lora.lora_conv_rank else 0
    kept_px += _DORA_BYTES_PER_PIXEL[engine] if settings.lora.lora_type == "dora" else 0
    kept_px += _MASK_BYTES_PER_PIXEL if settings.lora.lora_dropout else 0
    placements = placements_of(at_each_resolution(examples, settings.data), settings.data)
    numbers = sum(each.config["hidden_size"] * each.config["num_hidden_layers"] for each in text_encoders)
    numbers *= _CHUNK * settings.data.caption_chunks
    of_unet = sum(math.prod(shape) for name, shape in shapes.items() if not network_of(name))
    kept_text, checkpointed_text = (int(itemsize / 2 * each) * numbers for each in _TEXT_BYTES)
    image_px = max(place.bucket.width * place.bucket.height for place in placements)
    is_shared = shares_memory(precision.device)
    limits = thresholds(settings.run.memory_floor_gib, read_memory().total, is_shared)
    kept_per_weight = KEPT_BYTES_PER_WEIGHT[settings.lora.lora_type]
    available = usable_bytes(precision.device) // (processes if is_shared else 1)
    return MemoryBudget(
        fixed=weights + int(trained * (4 * floats + itemsize)) + workspaces,
        fixed_kept=kept_per_weight * sum(math.prod(shapes[name]) for name in ranks),
        per_image=image_px * int(scale * kept_px) + kept_text,
        per_image_checkpointed=image_px * int(scale * checkpointed_px) + checkpointed_text,
        available=available,
        reserve=limits.reserve if limits and is_shared else int(min(GPU_RESERVE_BYTES, GPU_RESERVE_SHARE * available)),
        thresholds=limits,
        is_guarded=bool(limits and is_shared),
        has_prior=settings.objective.prior_preservation > 0,
        grows_segments=grows_segments,
        saved_by_int8=0 if settings.lora.lora_type == "dora" else (itemsize - 1) * of_unet,
    )


def resolve_quantization(
    settings: TrainSettings, budget: MemoryBudget, recorded: str | None = None
) -> tuple[TrainSettings, MemoryBudget, list[str]]:
    """Replace `base_quantization = "auto"`: 8 bits if not even one image fits without them. `recorded` is the choice of the run
    that is continued, which is kept. The budget that is returned is that of the choice; the line is about it, if there was one."""
    choice, lines = settings.model.base_quantization, []
    if choice == "auto":
        needed = budget.needed(1, checkpointing=True)
        is_needed = budget.saved_by_int8 > 0 and needed > budget.free
        choice, reason = recorded or ("int8" if is_needed else "none"), "as in the checkpoint"
        if not recorded:
            reason = f"one image needs {needed / GIB:.1f} GiB without it, {budget.free / GIB:.1f} GiB free"
        lines = [f"base quantization: {choice} ({reason})"]
    if choice == "int8":
        budget = replace(budget, fixed=budget.fixed - budget.saved_by_int8, saved_by_int8=0)
    return replace(settings, model=replace(settings.model, base_quantization=choice)), budget, lines


def resolve_batch_size(
    settings: TrainSettings, budget: MemoryBudget, images: int, saved_samples: int | None = None
) -> tuple[TrainSettings, list[str]]:
    """Replace `train_batch_size = "auto"` with the largest batch, of at most `images`, that fits the budget. The line is about it,
    if it was replaced.

    Gradient checkpointing is assumed where fewer than 4 images fit without it. `saved_samples`: how many samples per step this
    process has in the checkpoint to resume from; the batch must divide them.
    """
    if settings.run.train_batch_size != "auto":
        return settings, []

    def largest(checkpointing: bool) -> int:
        limit = min(saved_samples or images, images)
        return fitting_batch(limit, saved_samples or 0, partial(budget.needed, checkpointing=checkpointing), budget.free)

    switch = settings.model.gradient_checkpointing
    batch = largest(checkpointing=switch is True)
    if switch == "auto" and batch < min(EFFICIENT_BATCH, images):
        batch = largest(checkpointing=True)
    batch = max(1, batch)
    saved = f" and {saved_samples} samples per step of the checkpoint" if saved_samples else ""
    line = f"batch size: {batch} (auto: the largest for {budget.free / GIB:.1f} GiB, {images} images{saved})"
    accumulation = saved_samples // batch if saved_samples else settings.run.gradient_accumulation_steps
    return replace(settings, run=replace(settings.run, train_batch_size=batch, gradient_accumulation_steps=accumulation)), [line]


def fit_to_memory(settings: TrainSettings, budget: MemoryBudget, advice: str) -> TrainSettings:
    """Decide on gradient checkpointing, and reduce the batch to what fits and increase the accumulation.

    Raises ResourceError, ending in `advice`, if not even one image fits.
    """
    requested = settings.run.train_batch_size
    samples = requested * settings.run.gradient_accumulation_steps
    checkpointing = settings.model.gradient_checkpointing
    reason = "as set"
    if checkpointing == "auto":
        kept = budget.needed(requested, checkpointing=False)
        checkpointing, reason = kept > budget.free, f"{kept / GIB:.1f} GiB needed without it, {budget.free / GIB:.1f} GiB free"
    print(f"gradient checkpointing: {'on' if checkpointing else 'off'} ({reason})", flush=True)

    needed = partial(budget.needed, checkpointing=checkpointing)
    batch = fitting_batch(requested, samples, needed, budget.free)
    figures = f"{budget.available / GIB:.1f} GiB are available, of which {budget.reserve / GIB:.1f} are reserved"
    if batch == 0 and not budget.is_guarded and needed(1) <= budget.available:
        batch = 1  # an estimate alone is not a reason to refuse what may fit
    if batch == 0:
        name, size = largest_other_process()
        raise ResourceError(
            f"not enough memory: batch size 1 needs about {needed(1) / GIB:.1f} GiB, but {figures}. The largest other program is "
            f"{name} with {size / GIB:.1f} GiB. Close programs, or {_smaller(settings, budget)}, and run again. {advice}".rstrip()
        )
    if batch < requested:
        changes = f"batch size {requested} -> {batch}, gradient accumulation {samples // requested} -> {samples // batch}"
        print(f"{changes} (batch size {requested} needs about {needed(requested) / GIB:.1f} GiB; {figures})", flush=True)
    print(f"memory: about {needed(batch) / GIB:.1f} GiB for batch size {batch}", flush=True)
    run = replace(settings.run, train_batch_size=batch, gradient_accumulation_steps=samples // batch)
    return replace(settings, run=run, model=replace(settings.model, gradient_checkpointing=checkpointing))


def suggest_settings(settings: TrainSettings, budget: MemoryBudget, available: int) -> str:
    """What to set after the GPU ran out of memory with `available` bytes usable, so that the run can resume from its checkpoint."""
    batch = settings.run.train_batch_size
    samples = batch * settings.run.gradient_accumulation_steps

    needed = partial(budget.needed, checkpointing=True)
    if not settings.model.gradient_checkpointing and needed(batch) <= available:
        return "set GRADIENT_CHECKPOINTING=true"
    fits = fitting_batch(batch - 1, samples, needed, available)
    if fits:
        return f"set GRADIENT_CHECKPOINTING=true TRAIN_BATCH_SIZE={fits} GRADIENT_ACCUMULATION_STEPS={samples // fits}, which fits"
    return f"close other programs on the GPU, or {_smaller(settings, budget)}"


def _smaller(settings: TrainSettings, budget: MemoryBudget) -> str:
    """What makes one image take less memory. What changes the result needs a new run."""
    # Where "auto" has chosen it, segments do not grow.
    is_set = settings.model.gradient_checkpointing is True and budget.grows_segments
    switches = [] if is_set else ["GRADIENT_CHECKPOINTING=true"]
    switches += ["BASE_QUANTIZATION=int8 FRESH=1"] if budget.saved_by_int8 else []
    lower = "lower RESOLUTION or LORA_RANK with FRESH=1"
    return f"set {' '.join(switches)}, or {lower}" if switches else lower


def fitting_batch(limit: int, samples: int, needed: Callable[[int], int], available: int) -> int:
    """The largest batch of at most `limit` images that divides `samples` (0: any does) and needs at most `available` bytes; 0 if
    not even one image fits."""
    fitting = [batch for batch in range(1, limit + 1) if samples % batch == 0 and needed(batch) <= available]
    return max(fitting, default=0)
