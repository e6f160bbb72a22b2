"""Which sample images a run renders, how, and what they cost: decided before the run, from its length and the memory. Pure."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from training.callbacks.recommendation import STRENGTHS
from training.callbacks.sample_prompts import SIDE_STEP_PX, SamplePrompt, sample_prompts
from training.config import SampleSettings, TrainSettings
from training.memory_budget import MemoryBudget
from training.models.family import family_of
from training.models.sdxl import BaseModel
from training.plan import Plan
from training.system.device import GIB

MAX_SHARE = 0.2
"""Of the training time: what sample images may add to it, as long as an "auto" is left to lower."""
STEPS, LEAST_STEPS = 20, 12
SIZE_PX, LEAST_SIZE_PX = 1024, 768
_TRAIN_COST = 2.2
"""Time of a training sample, in forward passes of the UNet at the same size: forward, backward and update."""
_CHECKPOINTING_COST = 1.36
_DECODE_COST = 6.5
"""Time in which the VAE decodes an image in fp32, in the same unit."""
_VAE_BYTES_PER_PIXEL, _VAE_BYTES_IF_SEGMENTS_GROW = 8704, 5888
"""What an H100 reserved for activations of SDXL's decoder in fp32, per pixel; 4900 of them were in use."""
_VAE_WIDTH = 128
_DECODER_BYTES = 198 * 10**6
"""Its weights."""
TILE_PX = 512
"""Side of the tiles in which an image is decoded where memory is short."""


@dataclass(frozen=True)
class SamplePlan:
    """The sample images of a run: one row of `prompts` from the base model, one for each save that is due, one at the end."""

    prompts: tuple[SamplePrompt, ...]
    """With every field filled in."""
    every_epochs: int
    """0: only at the end."""
    tiled: bool
    """Memory is short: the VAE decodes tiles of TILE_PX, and the UNet predicts one image at once."""
    announcement: str
    """One line: what is rendered, and what it costs."""
    lower_strengths: tuple[float, ...] = STRENGTHS[:-1]
    """At which the recommended LoRA is rendered, too."""
    in_turn: bool = False
    """Memory is short: captured training steps give theirs back for each row, and are captured again."""

    def is_due(self, before: int, after: int) -> bool:
        """Whether a row is due when `after` epochs are complete and `before` were; the end of the run has its own."""
        return self.every_epochs > 0 and before // self.every_epochs < after // self.every_epochs


@dataclass(frozen=True)
class _Choice:
    """Values for the three "auto", and what follows from them."""

    steps: int
    size: int
    every: int
    lower_strengths: tuple[float, ...] = STRENGTHS[:-1]
    tiled: bool = False
    in_turn: bool = False


def plan_samples(
    settings: TrainSettings, trigger: str, plan: Plan, budget: MemoryBudget, base: BaseModel, recorded: Mapping[str, Any]
) -> tuple[SamplePlan | None, SampleSettings]:
    """The sample images of a run, None if there are none, and the settings with every "auto" resolved. Raises SettingsError for
    prompts that cannot be used.

    `recorded` are the settings of the run that is continued: if it has samples, its choices are kept, so that all rows are alike.
    """
    samples = settings.samples
    captions, tags = plan.captions or {trigger: []}, family_of(base).quality_tags
    prompts = sample_prompts(samples, captions, plan.classes, tags) if samples.samples else []
    first = _Choice(STEPS, largest_size(settings.data.resolutions[0]), settings.saving.save_every_epochs)
    fixed = {}
    for name, key in (("steps", "sample_steps"), ("size", "sample_size"), ("every", "sample_every_epochs")):
        value = getattr(samples, key)
        value = recorded.get(key, "auto") if value == "auto" and recorded.get("samples") else value
        if value != "auto":
            fixed[name] = max(SIDE_STEP_PX, value // SIDE_STEP_PX * SIDE_STEP_PX) if name == "size" else value
    choice = replace(first, **fixed)
    if samples.samples:
        choice = _within_share(choice, set(fixed), prompts, settings, plan)
        # Not by `fixed`: a run that is continued decides as it did when it began.
        if samples.sample_every_epochs == "auto" and share_of(choice, prompts, settings, plan) > MAX_SHARE:
            choice = replace(choice, lower_strengths=())
        choice, memory, problem = _within_memory(choice, "size" in fixed, prompts, settings, plan, budget, base)
    resolved = replace(samples, sample_steps=choice.steps, sample_size=choice.size, sample_every_epochs=choice.every)
    if not samples.samples:
        return None, resolved
    if problem:
        return SamplePlan((), 0, False, f"sample images: none ({problem})"), resolved
    filled = tuple(_filled(prompt, number, choice, samples) for number, prompt in enumerate(prompts))
    announcement = _announcement(choice, replace(first, **fixed), filled, settings, plan)
    announcement += ", in the memory of training" if choice.in_turn else f", and {memory / GIB:.1f} GiB of memory besides it"
    announcement += f" and {memory / GIB:.1f} GiB more" if choice.in_turn and memory else ""
    return SamplePlan(filled, choice.every, choice.tiled, announcement, choice.lower_strengths, choice.in_turn), resolved


def largest_size(resolution: int) -> int:
    """Pixels of a side: SIZE_PX, or less where training has a lower resolution."""
    return min(SIZE_PX, resolution) // SIDE_STEP_PX * SIDE_STEP_PX or SIDE_STEP_PX


def _filled(prompt: SamplePrompt, number: int, choice: _Choice, samples: SampleSettings) -> SamplePrompt:
    values = {
        "width": choice.size,
        "height": choice.size,
        "steps": choice.steps,
        "seed": samples.sample_seed + number,
        "guidance": samples.sample_guidance,
    }
    return replace(prompt, **{name: value for name, value in values.items() if getattr(prompt, name) is None})


def saves_on_the_way(every: int, epochs: int) -> int:
    """How many LoRAs are rendered before the last one."""
    return (epochs - 1) // every if every else 0


def share_of(choice: _Choice, prompts: Sequence[SamplePrompt], settings: TrainSettings, plan: Plan) -> float:
    """The time of the sample images, as a share of the training time."""
    per_row = 0.0
    for prompt in prompts:
        pixels = (prompt.width or choice.size) * (prompt.height or choice.size)
        per_row += pixels * (2 * (prompt.steps or choice.steps) + _DECODE_COST)
    pixels, prior_pixels = (
        [placement.bucket.width * placement.bucket.height for placement in placements]
        for placements in (plan.placements, plan.regularization_placements)
    )
    trained = sum(pixels[index] for step in plan.order for index in step.examples)
    trained += sum(prior_pixels[index] for step in plan.order for index in step.regularization)
    cost = _TRAIN_COST * (_CHECKPOINTING_COST if settings.model.gradient_checkpointing is True else 1)
    rows = 2 + saves_on_the_way(choice.every, plan.epochs) + len(choice.lower_strengths)
    return rows * per_row / (cost * trained)


def _within_share(
    choice: _Choice, fixed: set[str], prompts: Sequence[SamplePrompt], settings: TrainSettings, plan: Plan
) -> _Choice:
    """`choice` with what is not fixed lowered until the images cost at most MAX_SHARE: first steps, then size, then rows."""
    steps = range(choice.steps - 1, LEAST_STEPS - 1, -1)
    sizes = range(choice.size - SIDE_STEP_PX, LEAST_SIZE_PX - 1, -SIDE_STEP_PX)
    on_the_way = saves_on_the_way(choice.every, plan.epochs)
    strides = [choice.every * factor for factor in range(2, on_the_way // 2 + 2)] if on_the_way > 1 else []
    candidates = {"steps": steps, "size": sizes, "every": strides}
    for name, values in candidates.items():
        for value in values if name not in fixed else ():
            if share_of(choice, prompts, settings, plan) <= MAX_SHARE:
                return choice
            choice = replace(choice, **{name: value})
    return choice


def _within_memory(
    choice: _Choice,
    is_size_fixed: bool,
    prompts: Sequence[SamplePrompt],
    settings: TrainSettings,
    plan: Plan,
    budget: MemoryBudget,
    base: BaseModel,
) -> tuple[_Choice, int, str]:
    """`choice` with a size whose images can be rendered, and how: beside what training holds or in turn with it, decoded as a whole
    or in tiles. How many bytes that takes besides; and why there can be no images, else empty."""
    held = budget.needed(settings.run.train_batch_size, checkpointing=settings.model.gradient_checkpointing is True)
    # In turn, what training holds is given back first. Beside it, the reserve must remain free: estimates can be wrong.
    free_beside, free_in_turn = budget.free - held, (budget.free if budget.is_guarded else budget.available) - held
    of_training = held - budget.fixed
    largest = max(place.bucket.width * place.bucket.height for place in plan.all_placements)
    per_pixel = _VAE_BYTES_IF_SEGMENTS_GROW if budget.grows_segments else _VAE_BYTES_PER_PIXEL
    vae_width = base.components["vae"].config["block_out_channels"][0] / _VAE_WIDTH

    def needed(size: int, tiled: bool, in_turn: bool) -> int:
        pixels = max((prompt.width or size) * (prompt.height or size) for prompt in prompts)
        # With gradient checkpointing, a training step keeps what one block needs, as a forward pass without gradients does.
        unet = (1 if tiled else 2) * budget.per_image_checkpointed * pixels // largest
        decoded = int(vae_width * per_pixel) * (min(pixels, TILE_PX**2) if tiled else pixels)
        largest_part = max(unet, decoded + int(vae_width**2 * _DECODER_BYTES))
        return max(0, largest_part - of_training) if in_turn else largest_part

    for size in [choice.size] if is_size_fixed else range(choice.size, min(choice.size, LEAST_SIZE_PX) - 1, -SIDE_STEP_PX):
        for tiled, in_turn in itertools.product((False, True), repeat=2):
            if (memory := needed(size, tiled, in_turn)) <= (free_in_turn if in_turn else free_beside):
                return replace(choice, size=size, tiled=tiled, in_turn=in_turn), memory, ""
    least = needed(min(choice.size, LEAST_SIZE_PX), True, True)
    return choice, least, f"they need {least / GIB:.1f} GiB more than training, {max(0, free_in_turn) / GIB:.1f} GiB are free"


def _announcement(choice: _Choice, requested: _Choice, prompts: Sequence[SamplePrompt], settings: TrainSettings, plan: Plan) -> str:
    """One line with the number of images and their cost, and what was lowered."""
    loras, strengths = 1 + saves_on_the_way(choice.every, plan.epochs), len(choice.lower_strengths)
    share = share_of(choice, prompts, settings, plan)
    lowered = [
        f"{text} {before} -> {after}"
        for text, before, after in (
            ("steps", requested.steps, choice.steps),
            ("size", requested.size, choice.size),
            ("epochs between images", requested.every, choice.every),
            ("lower strengths", len(requested.lower_strengths), strengths),
        )
        if before != after
    ]
    notes = [f"lowered: {', '.join(lowered)}"] if lowered else []
    if share > MAX_SHARE and not strengths:
        notes.append("a short run has no fewer; SAMPLES=false: none")
    sizes = sorted({f"{prompt.width}x{prompt.height}" for prompt in prompts})
    steps = sorted({prompt.steps for prompt in prompts})
    of = f"base model, {loras} LoRA{'s' if loras > 1 else ''}"
    of += f", and one of them at {strengths} lower strengths" if strengths else ""
    how = f"{'/'.join(sizes)}, {'/'.join(map(str, steps))} steps"
    cost = f"about {max(1, round(100 * share))} % of the training time"
    line = f"sample images: {len(prompts)} prompts x {1 + loras + strengths} ({of}), {how}: {cost}"
    return line + (f" ({'; '.join(notes)})" if notes else "")
