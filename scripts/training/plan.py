"""What a run will do, from settings, data and base model, and the fingerprint that identifies it. Pure."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Literal

from common.errors import SettingsError, abbreviated
from common.settings import all_keys
from training.config import DataSettings, ObjectiveSettings, TrainSettings
from training.data.buckets import OptimizerStep, Placement, add_regularization, assign_bucket, epochs_of, run_order
from training.data.examples import Example
from training.models.sdxl import Schedule

HELD_OUT_FROM = 40
"""Images from which "auto" holds some out: a smaller data set needs each of them for training."""
HELD_OUT_SHARE = 0.05
HELD_OUT_LEAST = 2
ENOUGH_SAMPLES = 2000
"""Training samples of a whole run with which a likeness may be good."""
AUTO_MIN_SNR_GAMMA = 5.0
AUTO_NOISE_OFFSET = 0.0357
WARMUP_STEPS, GLOBAL_BATCH, WORLD_SIZE, INITIAL_LORA = "steps of warm-up", "global batch", "processes", "initial LoRA"
"""Keys of records that other modules read. Records are kept from version to version, so keys keep their names."""
TRIGGERS, REGULARIZATION, BASE_MODEL = "trigger words", "regularization images", "base model"
PRIOR_CLASS = "class of the prior"
"""Key of the word for the kind of subject, which decides the result where the prior is preserved, and only there."""
DECODER, _FIRST_DECODER = "decoder", "version 1.0's"
"""Key of the record of how pixels were decoded, and the value of a record without it."""
NOT_RECORDED = ("fresh", "output_name", "init_lora")
"""Settings that choose which run is meant, and say nothing about how it goes, or whose content is in the fingerprint."""
_SHOWN = {
    "pictures": "number of images",
    "data set": "images, captions or repeats",
    "held-out pictures": "images held out for validation",
    BASE_MODEL: "weights of the base model",
    INITIAL_LORA: "LoRA to begin from (INIT_LORA)",
    WARMUP_STEPS: "warm-up steps",
    DECODER: "image decoder, and latents with it",
    GLOBAL_BATCH: "images per step",
}
"""What a user reads instead of some keys of records."""


@dataclass(frozen=True)
class Plan:
    """Everything about a run that is decided before anything heavy is loaded."""

    examples: list[Example]
    """What is trained on: each image at each of its resolutions."""
    placements: list[Placement]
    """Of each of them."""
    held_out: list[Example]
    """What only the validation loss sees, in the same way."""
    held_out_placements: list[Placement]
    regularization: list[Example]
    regularization_placements: list[Placement]
    order: list[OptimizerStep]
    global_batch: int
    """Samples per optimizer step."""
    epochs: int
    """Of a run whose steps are set: those that it begins."""
    has_set_steps: bool
    """Its length is a number of steps, and not of epochs."""
    prior_weight: float
    """Of the loss of regularization images."""
    schedule: Schedule
    min_snr_gamma: float
    noise_offset: float
    warmup_steps: int
    """Optimizer steps over which the learning rate rises. A run that is extended keeps those it began with."""
    loss_weighting: str = "min_snr"

    @property
    def samples(self) -> int:
        """Training samples of the whole run."""
        return sum(len(step.examples) for step in self.order)

    @property
    def images(self) -> list[Example]:
        """Each image that is trained on, once."""
        return list({example.path: example for example in self.examples}.values())

    @property
    def validation_fraction(self) -> float:
        """The fraction that holds out as many images, rounded down so that it does not hold out one more."""
        held_out = len({example.path for example in self.held_out})
        return math.floor(1e6 * held_out / (len(self.images) + held_out)) / 1e6

    @property
    def shared_prefix_steps(self) -> int:
        """How many steps a run of more epochs begins with as well: those before the short batches that end this one."""
        return next((step.number for step in self.order if len(step.examples) < self.global_batch), len(self.order))

    def announcement(self) -> str:
        """What the run will do, in a few lines."""
        buckets = Counter(placement.bucket for placement in self.placements)
        shapes = ", ".join(f"{bucket} ({count})" for bucket, count in buckets.most_common(8))
        more = f" and {len(buckets) - 8} more" if len(buckets) > 8 else ""
        weighting = (
            f"min-SNR {self.min_snr_gamma or 'off'}" if self.loss_weighting == "min_snr" else f"weighting {self.loss_weighting}"
        )
        each = f" ({len(self.examples)} with each resolution)" if len(self.examples) > len(self.images) else ""
        length = f"{self.epochs} epochs, {len(self.order)} optimizer steps of {self.global_batch}"
        if self.has_set_steps:
            length = f"{len(self.order)} optimizer steps of {self.global_batch}, up to epoch {self.epochs}"
        lines = [
            f"{len(self.images)} images{each} in {len(buckets)} bucket(s): {shapes}{more}",
            f"{length}, {self.samples} training samples; "
            f"{self.schedule.prediction_type}, {weighting}, noise offset {self.noise_offset or 'off'}",
        ]
        lines += self._concepts() if len(self.triggers) > 1 else []
        if self.regularization:
            classes = sorted({example.class_word or "captions of their own" for example in self.regularization})
            count = len({example.path for example in self.regularization})
            images = f"regularization: {count} images ({abbreviated(classes)}) of weight {self.prior_weight:g}"
            lines.append(f"{images}, one with each training sample, so that a step takes twice as long")
        if names := [example.name for example in self.held_out]:
            lines.append(f"held out for validation: {abbreviated(list(dict.fromkeys(names)))}")
        return "\n".join([*lines, *self.warnings()])

    @property
    def all_examples(self) -> list[Example]:
        """Everything that is encoded: what is trained on, what is held out, regularization images."""
        return [*self.examples, *self.held_out, *self.regularization]

    @property
    def all_placements(self) -> list[Placement]:
        """Of each of `all_examples`."""
        return [*self.placements, *self.held_out_placements, *self.regularization_placements]

    @property
    def triggers(self) -> list[str]:
        """The trigger words of the examples, in their order."""
        return list(dict.fromkeys(example.trigger for example in self.examples if example.trigger))

    @property
    def captions(self) -> dict[str, list[str]]:
        """The captions of the examples by trigger word."""
        found: dict[str, list[str]] = {word: [] for word in self.triggers}
        for example in self.images:
            found.setdefault(example.trigger, []).extend(example.captions)
        return found

    @property
    def classes(self) -> dict[str, str]:
        """Trigger word -> class word, of those that have one."""
        return {example.trigger: example.class_word for example in self.examples if example.trigger and example.class_word}

    def _concepts(self) -> list[str]:
        """For each trigger word, its images and their samples in the whole run."""
        samples = Counter(self.examples[index].trigger for step in self.order for index in step.examples)
        images = Counter(example.trigger for example in self.images)
        return [f"trigger word {word}: {images[word]} images, {samples[word]} training samples" for word in self.triggers]

    def warnings(self) -> list[str]:
        """What the user should know of this run before it begins, and again when it has ended."""
        if self.samples >= ENOUGH_SAMPLES:
            return []
        length = f"NUM_TRAIN_EPOCHS={_enough_epochs(self.examples)}"
        if self.has_set_steps:
            length = f"NUM_TRAIN_STEPS={-(-ENOUGH_SAMPLES // self.global_batch)}"
        return [f"{self.samples} training samples are few: a likeness needs 2000 to 3000. Set {length}, or add images."]


def make_plan(examples: list[Example], train: TrainSettings, schedule: Schedule, world_size: int = 1) -> Plan:
    """Choose buckets and the order of the run, whose steps `world_size` processes share. `schedule` is the base model's, with
    the settings already applied. Raises SettingsError if that schedule contradicts the objective."""
    require_possible_objective(train.objective, schedule)
    data, run = train.data, train.run
    regularization = [example for example in examples if example.is_regularization]
    regularization = at_each_resolution(regularization, data)
    examples = [example for example in examples if not example.is_regularization]
    out = _held_out(examples, train.validation.validation_fraction)
    parts = ([e for index, e in enumerate(examples) if (index in out) is chosen] for chosen in (False, True))
    trained, held_out = (at_each_resolution(part, data) for part in parts)
    placements = placements_of(trained, data)
    global_batch = run.train_batch_size * run.gradient_accumulation_steps * world_size
    buckets, repeats = [placement.bucket for placement in placements], [example.repeats for example in trained]
    epochs = _enough_epochs(trained) if run.num_train_epochs == "auto" else run.num_train_epochs
    if run.num_train_steps:
        epochs = epochs_of(buckets, repeats, run.num_train_steps, global_batch)
    order = run_order(buckets, repeats, epochs, global_batch, run.train_seed)[: run.num_train_steps or None]
    prior_placements = placements_of(regularization, data)
    if regularization:
        shapes, of_prior = [placement.bucket for placement in prior_placements], [example.repeats for example in regularization]
        order = add_regularization(order, shapes, of_prior, global_batch, run.train_seed)
    is_plain = schedule.prediction_type == "epsilon" and not schedule.zero_terminal_snr
    gamma, offset = train.objective.min_snr_gamma, train.objective.noise_offset
    has_gamma = is_plain and train.objective.loss_weighting == "min_snr"
    return Plan(
        examples=trained,
        placements=placements,
        held_out=held_out,
        held_out_placements=placements_of(held_out, data),
        regularization=regularization,
        regularization_placements=prior_placements,
        prior_weight=data.prior_weight if regularization else DataSettings.prior_weight,
        order=order,
        global_batch=global_batch,
        epochs=epochs,
        has_set_steps=run.num_train_steps > 0,
        schedule=schedule,
        min_snr_gamma=(AUTO_MIN_SNR_GAMMA if has_gamma else 0.0) if gamma == "auto" else gamma,
        noise_offset=(AUTO_NOISE_OFFSET if is_plain else 0.0) if offset == "auto" else offset,
        warmup_steps=math.ceil(train.optimizer.lr_warmup * len(order)),
        loss_weighting=train.objective.loss_weighting,
    )


def _enough_epochs(examples: Sequence[Example]) -> int:
    """The fewest epochs that give ENOUGH_SAMPLES."""
    return -(-ENOUGH_SAMPLES // sum(example.repeats for example in examples))


def require_possible_objective(objective: ObjectiveSettings, schedule: Schedule) -> None:
    """Raises SettingsError with what `objective` asks of a noise schedule that does not have it."""
    problems, last = [], max(objective.timestep_min, objective.timestep_max - 1)
    if last >= schedule.timesteps:
        name = "timestep_min" if last == objective.timestep_min else "timestep_max"
        problems.append(f"{name}: {getattr(objective, name)} is beyond the {schedule.timesteps} timesteps of the base model")
    if objective.loss_weighting == "debiased" and schedule.zero_terminal_snr and schedule.prediction_type == "epsilon":
        problems.append(
            "loss_weighting: debiased would weigh the last timestep, pure noise, without limit, because the base model has a "
            "zero-terminal-SNR schedule and predicts epsilon; set LOSS_WEIGHTING=min_snr"
        )
    if problems:
        raise SettingsError("; ".join(problems))


def _held_out(examples: Sequence[Example], fraction: float | Literal["auto"]) -> set[int]:
    """Indices of the examples that are held out: those whose files have the lowest hashes, so that the choice depends on
    nothing but the images, and one image more or less changes it by one at most. Each of several trigger words has its share, at
    least one image if there are enough, and never its last one."""
    # Rounded first: 0.07 * 100 is 7.000000000000001.
    count = min(math.ceil(round(fraction * len(examples), 6)), len(examples) - 1) if fraction != "auto" else 0
    if fraction == "auto" and len(examples) >= HELD_OUT_FROM:
        count = max(HELD_OUT_LEAST, math.ceil(HELD_OUT_SHARE * len(examples)))
    concepts: dict[str, list[int]] = {}
    for index in sorted(range(len(examples)), key=lambda index: examples[index].sha256):
        concepts.setdefault(examples[index].trigger, []).append(index)
    shares = dict.fromkeys(concepts, 0)
    for _ in range(count):
        due = {word: count * len(of_word) / len(examples) - shares[word] for word, of_word in concepts.items()}
        open_to_more = [word for word, of_word in concepts.items() if shares[word] < len(of_word) - 1]
        if not open_to_more:
            break
        shares[max(open_to_more, key=lambda word: (not shares[word], due[word], word))] += 1
    return {index for word, of_word in concepts.items() for index in of_word[: shares[word]]}


def at_each_resolution(examples: Sequence[Example], data: DataSettings) -> list[Example]:
    """Each example once for each of its resolutions, which are those of the settings unless it has its own."""
    return [replace(e, resolutions=(each,)) for e in examples for each in e.resolutions or data.resolutions]


def placements_of(examples: Sequence[Example], data: DataSettings) -> list[Placement]:
    """The bucket and crop of each example at its one resolution."""
    return [assign_bucket(e.width, e.height, *e.resolutions, data.bucket_step, data.bucket_max_side) for e in examples]


def result_fingerprint(
    plan: Plan, train: TrainSettings, trigger_word: str, base_model: str, initial_lora: str | None = None
) -> dict[str, Any]:
    """Everything that decides the result of a run, by name, as JSON values: runs with equal fingerprints are the same run.

    `train` has every "auto" resolved. A setting that is newer than the first version is left out where it has the value that
    older versions used (`before`), so that a new setting changes no fingerprint. `base_model` is a digest of its components and
    tokenizers, `initial_lora` that of the LoRA to begin from.
    """
    only = {train.data.resolution}
    if plan.triggers and trigger_word not in plan.triggers:
        trigger_word = plan.triggers[0]  # every folder has its own: the setting decides nothing
    classes = [f"{word} for {trigger}" for trigger, word in plan.classes.items()]
    trained = [
        [example.sha256, example.caption, example.repeats, *_newer(example, only, trigger_word)] for example in plan.examples
    ]
    held_out = [[example.sha256, example.caption, *_newer(example, only, trigger_word)] for example in plan.held_out]
    settings = {recorded_name(key): value for key, value in settings_of(train, "result") if value != key.metadata["before"]}
    if not any(example.mask for example in plan.all_examples):
        settings = {name: value for name, value in settings.items() if name not in ("mask_weight", "alpha")}
    if not plan.regularization:
        settings.pop("prior_weight", None)
    if not any("\n" in example.caption for example in plan.all_examples):
        settings.pop("caption_per_line", None)
    if plan.triggers and plan.triggers != [trigger_word]:
        settings[TRIGGERS] = ", ".join(plan.triggers)
    if plan.regularization:
        settings[REGULARIZATION] = short_hash(
            [[each.sha256, each.caption, each.repeats, *_newer(each, only, trigger_word)] for each in plan.regularization]
        )
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return {
        **settings,
        **asdict(plan.schedule),
        BASE_MODEL: base_model,
        "data set": short_hash(trained),
        "pictures": len(plan.images),  # the keys are part of every fingerprint: never rename one
        "held-out pictures": short_hash(held_out),
        "trigger_word": trigger_word,
        GLOBAL_BATCH: plan.global_batch,
        WARMUP_STEPS: plan.warmup_steps,
        **({INITIAL_LORA: initial_lora} if initial_lora else {}),
        **({PRIOR_CLASS: ", ".join([train.samples.subject_class, *classes])} if train.objective.prior_preservation else {}),
    }


def _newer(example: Example, only: set[int], trigger_word: str) -> list[Any]:
    """What the first versions did not know of an example and the result depends on: its mask, its resolution unless it is the
    `only` one, and a trigger word of its own; [] where it has none of them."""
    known = [[example.mask_key, example.mask_weight]] if example.mask else []
    known += [] if {*example.resolutions} == only else example.resolutions
    return known if example.trigger in ("", trigger_word) else [*known, example.trigger]


def runtime_settings(train: TrainSettings, world_size: int = 1) -> dict[str, Any]:
    """What may differ each time a run is continued: it changes the speed or what is written, but no weight."""
    tables = replace(train, processes=None)  # their number counts, not the settings that lead to it
    keys = [*settings_of(tables, "runtime"), *settings_of(tables, "saving")]
    kept = {recorded_name(key): value for key, value in keys if not key.metadata["secret"] and key.name not in NOT_RECORDED}
    return kept | {WORLD_SIZE: world_size}


def decoder_record(examples: Sequence[Example]) -> dict[str, str]:
    """A part of the runtime settings: a run that is continued goes on with the pixels that images have now, and says so."""
    revisions = [example.revision for example in examples if example.revision]
    return {DECODER: f"revision {max(revisions)} for {len(revisions)} images"} if revisions else {}


def changes(recorded: Mapping[str, Any], now: Mapping[str, Any], train: type = TrainSettings) -> dict[str, str]:
    """What differs between two fingerprints, or two sets of runtime settings, by name, as lines for a user.

    A setting that one of them does not have is read as the value that versions without it used; if no such value is
    declared and its role is `runtime` or `saving`, it is not compared.
    """
    keys = {recorded_name(key): key.metadata for key in all_keys(train)}
    keys[DECODER] = {"before": _FIRST_DECODER, "role": "runtime"}
    found = {}
    for name in sorted({*recorded, *now}):
        metadata = keys.get(name, {"before": MISSING, "role": "result"})
        if not (name in recorded and name in now) and metadata["before"] is MISSING and metadata["role"] != "result":
            continue
        old, new = (values.get(name, metadata["before"]) for values in (recorded, now))
        if old == new:
            continue
        if name in ("data set", "held-out pictures", BASE_MODEL, REGULARIZATION, INITIAL_LORA):  # hashes
            found[name] = f"{_SHOWN.get(name, name)}: changed"
        else:
            shown = ["not recorded" if value is MISSING else value for value in (old, new)]
            found[name] = f"{_SHOWN.get(name, name)}: {shown[0]} -> {shown[1]}"
    return found


def settings_of(section: Any, role: str) -> Iterator[tuple[Field, Any]]:
    """Every setting of a filled section that has this role, with its value, tables inside the section included."""
    for key in fields(section):
        value = getattr(section, key.name)
        if is_dataclass(value):
            yield from settings_of(value, role)
        elif key.metadata.get("role") == role:
            yield key, value


def recorded_name(key: Field) -> str:
    """The name of a setting in fingerprints and checkpoints, which it keeps when it is renamed."""
    return key.metadata["recorded_as"] or key.name


def short_hash(value: Any) -> str:
    """A JSON value as one word; that of a fingerprint is in the LoRA's metadata."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
