"""Which run the settings and the data describe: a new one, one that is continued from a checkpoint, or a finished one.

It prints nothing and loads no weights; training and `--check` use it alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from common.captions import has_trigger
from common.errors import SettingsError
from common.output_layout import OutputLayout
from common.project import ProjectSettings
from training.callbacks.checkpoint import (
    EARLY_STOP,
    LENGTH,
    Checkpoint,
    find_resume_point,
    match_global_batch,
    newest,
    warmup_to_keep,
)
from training.callbacks.sample_prompts import CLASS_WORDS, class_word
from training.config import TrainSettings
from training.data.examples import Example
from training.engine import EngineName, choose_engine
from training.initial_lora import initial_digest
from training.memory_budget import MemoryBudget, measure_budget, resolve_batch_size, resolve_quantization
from training.models.base_model import choose_schedule, remembered_prediction
from training.models.sdxl import BaseModel, Schedule
from training.plan import BASE_MODEL, GLOBAL_BATCH, INITIAL_LORA, Plan, changes, make_plan, result_fingerprint, short_hash
from training.system.device import Precision


@dataclass(frozen=True)
class Machines:
    """What a run computes on."""

    precision: Precision
    world_size: int = 1
    """Processes on all machines."""
    local_world_size: int = 1
    """Processes on this machine."""


@dataclass(frozen=True)
class Run:
    """What decides the result of a run, and where it begins."""

    settings: TrainSettings
    """With every "auto" resolved, except those of gradient checkpointing and sample images."""
    budget: MemoryBudget
    plan: Plan
    fingerprint: dict[str, Any]
    lines: list[str]
    """What was decided about it, for the log."""
    is_finished: bool
    """The LoRA of exactly this run exists already."""
    saved: Checkpoint | None = None
    """The checkpoint from which it is continued."""
    follows_finished: bool = False
    """The checkpoints that exist are of a run whose LoRA is complete."""
    assumes_prediction: bool = False
    """What the base model predicts is only assumed, because nothing says it and it was not measured yet."""

    @property
    def begins_from_file(self) -> bool:
        """Whether its first weights are those of INIT_LORA."""
        return INITIAL_LORA in self.fingerprint and self.saved is None and not self.is_finished

    @property
    def recorded(self) -> Mapping[str, Any]:
        """The runtime settings of the run that is continued, or is finished; {} if there is none."""
        is_same = self.saved and changes(self.saved.identity.fingerprint, self.fingerprint).keys() <= {*LENGTH, EARLY_STOP}
        return self.saved.identity.runtime if is_same else {}


def outputs_of(project: ProjectSettings, settings: TrainSettings) -> OutputLayout:
    """The files of the run, which has the name of the trigger word unless it is set."""
    return OutputLayout(project.output_dir, settings.saving.output_name or project.trigger_word)


def find_run(
    project: ProjectSettings,
    settings: TrainSettings,
    base: BaseModel,
    examples: list[Example],
    machines: Machines,
    digests: Mapping[str, str | None],
) -> Run:
    """The run that these settings and examples describe.

    `digests` are those of the components of `base` and of the tokenizers; if one of them is None, not known yet, they are taken to
    be those of the checkpoint. A run that is continued, extended or finished keeps the automatic choices of its checkpoint; one
    that follows a finished run with other settings or data keeps only the samples per step. Raises SettingsError if a run that is
    not finished was stopped with other settings or data.
    """
    outputs = outputs_of(project, settings)
    saved = newest(outputs.state)
    follows_finished = saved is not None and outputs.is_finished(short_hash(saved.identity.fingerprint))
    saved = None if settings.saving.fresh else saved
    recorded = saved.identity.fingerprint if saved else {}
    known = [digest for digest in digests.values() if digest]
    base_model = short_hash(known) if len(known) == len(digests) else recorded.get(BASE_MODEL, "")
    measured = remembered_prediction(outputs.cache, digests["unet"])
    if recorded.get(BASE_MODEL) != base_model or (follows_finished and recorded["prediction_type"] == "epsilon"):
        recorded = {}
    found = (measured, recorded) if follows_finished else (recorded, measured)
    schedule, is_assumed = choose_schedule(base, settings.model.prediction_type, settings.model.zero_terminal_snr, *found)
    samples = saved.identity.fingerprint[GLOBAL_BATCH] // machines.world_size if saved else None
    given = project, settings, base, examples, machines, schedule, base_model, samples

    run = _as_continued(*given, saved, follows_finished=follows_finished)
    if saved and not run.is_finished:
        try:
            saved = find_resume_point(outputs.state, saved, run.fingerprint, run.plan.shared_prefix_steps)
        except SettingsError:
            if not follows_finished:
                raise
            saved, run = None, _as_continued(*given, None, follows_finished=False)
    return replace(run, saved=saved, follows_finished=follows_finished, assumes_prediction=is_assumed)


def _as_continued(
    project: ProjectSettings,
    settings: TrainSettings,
    base: BaseModel,
    examples: list[Example],
    machines: Machines,
    schedule: Schedule,
    base_model: str,
    samples: int | None,
    saved: Checkpoint | None,
    *,
    follows_finished: bool,
) -> Run:
    """The run with the automatic choices of `saved`, which may turn out to be another one; None: with its own. `samples`: what a
    step of this process takes, if the batch size is automatic; None: what fits."""
    world_size, engine = machines.world_size, choose_engine(settings.run.engine, settings.lora)[0]
    outputs = outputs_of(project, settings)
    recorded = saved.identity.fingerprint if saved else {}
    initial = initial_digest(settings.lora, outputs, recorded.get(INITIAL_LORA))
    budget = measure_budget(base, examples, settings, machines.precision, engine, machines.local_world_size)
    # A run that an older version saved has no record: its base was not quantized. A finished run keeps its choice as well, so that
    # it stays finished when there is less memory.
    choice = recorded.get("base_quantization", "none") if saved else None
    settings, budget, lines = resolve_quantization(settings, budget, choice)
    trained = sum(not example.is_regularization for example in examples)
    settings, of_batch = resolve_batch_size(settings, budget, max(1, trained // world_size), samples)
    settings = replace(settings, run=match_global_batch(settings.run, world_size, None if follows_finished else saved))
    plan = make_plan(examples, settings, schedule, world_size)
    settings = _resolved(settings, plan, machines.precision, engine, outputs.name)
    settings, of_prior = with_class_of_prior(settings, plan, project.trigger_word)
    fingerprint = result_fingerprint(plan, settings, project.trigger_word, base_model, initial)
    if saved:
        plan = replace(plan, warmup_steps=warmup_to_keep(saved, fingerprint))
        fingerprint = result_fingerprint(plan, settings, project.trigger_word, base_model, initial)
    is_finished = not settings.saving.fresh and outputs.is_finished(short_hash(fingerprint))
    return Run(settings, budget, plan, fingerprint, [*lines, *of_batch, *of_prior], is_finished)


def _resolved(settings: TrainSettings, plan: Plan, precision: Precision, engine: EngineName, name: str) -> TrainSettings:
    """The settings with the values that the plan and the device give every "auto", as training_config_resolved.toml has them."""
    schedule, sizes = plan.schedule, settings.data.resolutions
    return replace(
        settings,
        model=replace(
            settings.model,
            prediction_type=schedule.prediction_type,
            zero_terminal_snr=schedule.zero_terminal_snr,
            mixed_precision=precision.name,
        ),
        data=replace(settings.data, resolution=sizes if len(sizes) > 1 else sizes[0]),
        lora=replace(settings.lora, lora_alpha=settings.lora.alpha),
        run=replace(settings.run, engine=engine, num_train_epochs=plan.epochs),
        objective=replace(settings.objective, min_snr_gamma=plan.min_snr_gamma, noise_offset=plan.noise_offset),
        validation=replace(settings.validation, validation_fraction=plan.validation_fraction),
        saving=replace(settings.saving, output_name=name),
    )


def with_class_of_prior(settings: TrainSettings, plan: Plan, trigger: str) -> tuple[TrainSettings, list[str]]:
    """The settings with the word that replaces the trigger word in what is to remain of the base model, if there is any, and a line
    about it. Raises SettingsError if the word is not set and the captions do not have it, or if there is no trigger word."""
    samples, weight = settings.samples, settings.objective.prior_preservation
    if not weight:
        return settings, []
    lacking = sum(not (example.trigger and has_trigger(example.caption, example.trigger)) for example in plan.images)
    if lacking == len(plan.images):
        problem = "no caption has the trigger word, for which the class would stand"
        raise SettingsError(f"PRIOR_PRESERVATION: {problem}; write {trigger} into the captions, or set PRIOR_PRESERVATION=0")
    word, origin = samples.subject_class.strip(), "as set"
    captions = plan.captions or {trigger: [example.caption for example in plan.images]}
    nameless = [name for name in captions if name not in plan.classes]
    if not nameless:
        word, origin = next(iter(plan.classes.values())), "as in the folders"
    elif not word:
        word, origin = class_word(nameless[0], [text for name in nameless for text in captions[name]]), "from the captions"
        if word not in CLASS_WORDS:
            problem = "needs the word for the kind of subject, which the captions do not have"
            raise SettingsError(f"PRIOR_PRESERVATION {problem}: set SUBJECT_CLASS, for example SUBJECT_CLASS=woman")
    settings = replace(settings, samples=replace(samples, subject_class=word))
    words = ", ".join(f"{plan.classes.get(name, word)!r} for {name!r}" for name in captions)
    left_out = f"; not for {lacking} of {len(plan.images)} images, whose captions lack the trigger word" if lacking else ""
    return settings, [f"prior preservation: weight {weight:g}, {words} ({origin}){left_out}"]
