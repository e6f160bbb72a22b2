"""Which images are held out of the training. Pure.

Settings, data and base model -> what a run will do, and the fingerprint that says which run it is.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from training.config import DataSettings, TrainSettings
from training.data.buckets import OptimizerStep, Placement, place, run_order
from training.data.dataset import Example
from training.method.optimizers import steps_of_warmup
from training.models.sdxl import Schedule

AUTO_FROM = 40
"""Images from which "auto" holds some out: of fewer, training needs each."""


AUTO_SHARE = 0.05


AUTO_LEAST = 2


def held_out(examples: Sequence[Example], fraction: float | Literal["auto"]) -> set[int]:
    """Indices of the examples that are held out: those whose files have the lowest hashes, so that the choice depends on
    nothing but the images, and an image more or less changes it by one at most."""
    names = sorted(range(len(examples)), key=lambda index: examples[index].sha256)
    return set(names[: _count(len(examples), fraction)])


def _count(images: int, fraction: float | Literal["auto"]) -> int:
    if fraction == "auto":
        return max(AUTO_LEAST, math.ceil(AUTO_SHARE * images)) if images >= AUTO_FROM else 0
    return min(math.ceil(fraction * images), images - 1)


FEW_IMAGE_STEPS = 800


ENOUGH_IMAGE_STEPS = 2000


AUTO_MIN_SNR_GAMMA = 5.0


AUTO_NOISE_OFFSET = 0.0357


WARMUP_STEPS, GLOBAL_BATCH = "steps of warm-up", "global batch"


@dataclass(frozen=True)
class Plan:
    """Everything about a run that is decided before anything heavy is loaded."""

    examples: list[Example]
    """What is trained on."""
    placements: list[Placement]
    held_out: list[Example]
    """What only the held-out loss sees."""
    held_out_placements: list[Placement]
    order: list[OptimizerStep]
    global_batch: int
    """Samples per optimizer step."""
    epochs: int
    schedule: Schedule
    min_snr_gamma: float
    noise_offset: float
    warmup_steps: int
    """Optimizer steps over which the learning rate rises. A run that is lengthened keeps those it began with."""

    @property
    def held_out_share(self) -> float:
        """The fraction that holds out as many, rounded down so that it does not hold out one more."""
        return math.floor(1e6 * len(self.held_out) / len(self.all_examples)) / 1e6

    @property
    def all_examples(self) -> list[Example]:
        """What is trained on, then what is held out."""
        return [*self.examples, *self.held_out]

    @property
    def all_placements(self) -> list[Placement]:
        return [*self.placements, *self.held_out_placements]

    @property
    def common_steps(self) -> int:
        """How many steps a run of more epochs begins with as well: those before the short batches that end this one."""
        return next((step.number for step in self.order if len(step.examples) < self.global_batch), len(self.order))

    @property
    def image_steps(self) -> int:
        """How many images the whole run shows to the model, repetitions counted."""
        return sum(len(step.examples) for step in self.order)

    def announcement(self) -> str:
        """What the run will do, in a few lines."""
        buckets = Counter(placement.bucket for placement in self.placements)
        shapes = ", ".join(f"{bucket} ({count})" for bucket, count in buckets.most_common(8))
        more = f" and {len(buckets) - 8} more" if len(buckets) > 8 else ""
        lines = [
            f"{len(self.examples)} images in {len(buckets)} bucket(s): {shapes}{more}.",
            f"{self.epochs} epochs, {len(self.order)} optimizer steps of {self.global_batch}, {self.image_steps} image-steps; "
            f"{self.schedule.prediction_type}, min-SNR {self.min_snr_gamma or 'off'}, noise offset {self.noise_offset or 'off'}.",
        ]
        if self.held_out:
            lines.append(f"held out, to see when the LoRA is best: {', '.join(example.name for example in self.held_out)}.")
        if self.image_steps < FEW_IMAGE_STEPS:
            wanted = -(-ENOUGH_IMAGE_STEPS * self.epochs // self.image_steps)
            few = f"{self.image_steps} image-steps are few: a likeness needs 2000 to 3000."
            lines.append(f"{few} Set NUM_TRAIN_EPOCHS={wanted}, or add images.")
        return "\n".join(lines)


def make_plan(examples: list[Example], train: TrainSettings, schedule: Schedule, processes: int = 1) -> Plan:
    """Choose buckets and the order of the run, whose steps `processes` share. `schedule` is the base's, with the settings
    already applied."""
    data, run = train.data, train.run
    out = held_out(examples, train.validation.validation_fraction)
    kept, apart = ([e for index, e in enumerate(examples) if (index in out) is wanted] for wanted in (False, True))
    placements, placed_apart = placed(kept, data), placed(apart, data)
    global_batch = run.train_batch_size * run.gradient_accumulation_steps * processes
    buckets = [placement.bucket for placement in placements]
    order = run_order(buckets, [example.repeats for example in kept], run.num_train_epochs, global_batch, run.train_seed)
    is_plain = schedule.prediction_type == "epsilon" and not schedule.zero_terminal_snr
    gamma, offset = train.objective.min_snr_gamma, train.objective.noise_offset
    return Plan(
        examples=kept,
        placements=placements,
        held_out=apart,
        held_out_placements=placed_apart,
        order=order,
        global_batch=global_batch,
        epochs=run.num_train_epochs,
        schedule=schedule,
        min_snr_gamma=(AUTO_MIN_SNR_GAMMA if is_plain else 0.0) if gamma == "auto" else gamma,
        noise_offset=(AUTO_NOISE_OFFSET if is_plain else 0.0) if offset == "auto" else offset,
        warmup_steps=steps_of_warmup(train.optimizer.lr_warmup, len(order)),
    )


def placed(examples: list[Example], data: DataSettings) -> list[Placement]:
    """Where each image lies in which bucket."""
    return [place(e.width, e.height, data.resolution, data.bucket_step, data.bucket_max_side) for e in examples]


def largest_image_px(placements: list[Placement]) -> int:
    """Pixels of the largest bucket."""
    return max(placement.bucket.width * placement.bucket.height for placement in placements)


def fingerprint(plan: Plan, train: TrainSettings, trigger_word: str, base_digests: Sequence[str]) -> dict[str, Any]:
    """Everything that decides the result of a run, by name, as JSON values: two runs with equal fingerprints are the same run."""
    data = asdict(train.data)
    del data["dataloader_num_workers"], data["skip_flagged"]
    shown = [[example.sha256, example.caption, example.repeats] for example in plan.examples]
    apart = [[example.sha256, example.caption] for example in plan.held_out]
    return {
        "base model": _short_hash(list(base_digests)),
        "data set": _short_hash(shown),
        "pictures": len(plan.examples),
        "held-out pictures": _short_hash(apart),
        "early_stop_patience": train.validation.early_stop_patience,
        "trigger_word": trigger_word,
        **data,
        **asdict(train.lora),
        **asdict(train.optimizer),
        "min_snr_gamma": plan.min_snr_gamma,
        "noise_offset": plan.noise_offset,
        **asdict(plan.schedule),
        GLOBAL_BATCH: plan.global_batch,
        "num_train_epochs": plan.epochs,
        WARMUP_STEPS: plan.warmup_steps,
        "train_seed": train.run.train_seed,
        "mixed_precision": train.model.mixed_precision,
    }


def circumstances(train: TrainSettings, processes: int = 1) -> dict[str, Any]:
    """What may be different each time a run goes on: it changes how fast, and what is written, but no weight."""
    run, saving = asdict(train.run), asdict(train.saving)
    return {
        **{key: run[key] for key in ("train_batch_size", "gradient_accumulation_steps", "deterministic", "memory_floor_gib")},
        **{key: saving[key] for key in ("save_every_epochs", "save_state_every_minutes", "keep_last_states")},
        "processes": processes,
        "gradient_checkpointing": train.model.gradient_checkpointing,
        "validate_every_epochs": train.validation.validate_every_epochs,
        "dataloader_num_workers": train.data.dataloader_num_workers,
        "tensorboard": train.logging.tensorboard,
        "wandb_project": train.logging.wandb_project,
    }


def fingerprint_hash(values: dict[str, Any]) -> str:
    """The fingerprint as one word, for the LoRA's metadata."""
    return _short_hash(values)


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
