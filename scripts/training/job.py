"""Resolve what a run will do before anything heavy is loaded: every "auto", the plan, the engine, and where it continues."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from common.captions import has_trigger
from common.errors import DataError, SettingsError
from common.output_layout import OutputLayout
from common.project import ProjectSettings
from training.callbacks.checkpoint import (
    EARLY_STOP,
    LENGTH,
    Checkpoint,
    Identity,
    find_resume_point,
    match_global_batch,
    newest,
    warmup_to_keep,
)
from training.callbacks.sample_plan import SamplePlan, plan_samples
from training.callbacks.sample_prompts import CLASS_WORDS, class_word
from training.config import TrainSettings
from training.data.dataset import Inputs, read_images
from training.engine import EngineName, choose_engine
from training.initial_lora import initial_digest, matching_layers
from training.lora_files.reading import Layer
from training.memory_budget import MemoryBudget, fit_to_memory, measure_budget, resolve_batch_size, resolve_quantization
from training.method.layers import shapes_of_base
from training.method.optimizers import require_usable
from training.models.base_model import (
    base_digest,
    choose_schedule,
    find_or_download_tokenizers,
    remembered_prediction,
    tokenizers_digest,
)
from training.models.family import family_of
from training.models.sdxl import BaseModel, Schedule
from training.plan import (
    GLOBAL_BATCH,
    INITIAL_LORA,
    Plan,
    changes,
    decoder_record,
    make_plan,
    result_fingerprint,
    runtime_settings,
    short_hash,
)
from training.system.device import Precision, choose_precision, comfyui_advice, describe
from training.system.process_group import ProcessGroup


@dataclass(frozen=True)
class TrainingJob:
    """A run in every detail: what the trainer builds its parts from."""

    project: ProjectSettings
    settings: TrainSettings
    """With every "auto" resolved."""
    base: BaseModel
    plan: Plan
    precision: Precision
    engine: EngineName
    outputs: OutputLayout
    identity: Identity
    saved: Checkpoint | None
    """The checkpoint from which the run is continued."""
    is_finished: bool
    """The LoRA of exactly this run exists already."""
    follows_finished: bool
    """The checkpoints that exist are of a run whose LoRA is complete."""
    budget: MemoryBudget
    samples: SamplePlan | None
    """The sample images; None if they are off."""
    assumes_prediction: bool
    """What the base model predicts is only assumed, because nothing says it and it was not measured yet."""
    initial_layers: Mapping[str, Layer] = field(default_factory=dict)
    """What a new run begins with, of the file INIT_LORA."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Where each setting that is not the default was set."""


def resolve_on_all_ranks(
    group: ProcessGroup, project: ProjectSettings, settings: TrainSettings, inputs: Callable[[], Inputs], comfyui: str
) -> TrainingJob:
    """The job that the main process resolves, in every process; raises DataError on another machine whose images differ."""
    job = group.broadcast_object(lambda: resolve_job(group, project, settings, inputs(), comfyui))
    if group.is_main_process:
        return job
    if group.local_rank == 0:
        expected = {(example.sha256, example.mask_key) for example in job.plan.all_examples}
        examples, _ = read_images(project, settings.data)
        if {(example.sha256, example.mask_key) for example in examples} != expected:
            what = "the images or their masks differ from those of the main machine"
            raise DataError(f"{project.dataset_dir}: {what}; copy its folder here")
    return replace(job, precision=choose_precision(job.settings.model.mixed_precision, group.gpu))


def resolve_job(
    group: ProcessGroup, project: ProjectSettings, settings: TrainSettings, inputs: Inputs, comfyui: str
) -> TrainingJob:
    """Resolve every "auto", log what the run will do, and find out whether it is new, unfinished or finished."""
    (base, examples, _), world_size = inputs, group.world_size
    outputs = OutputLayout(project.output_dir, settings.saving.output_name or project.trigger_word)
    saved = newest(outputs.state)
    was_finished = saved is not None and outputs.is_finished(short_hash(saved.identity.fingerprint))
    if settings.saving.fresh:
        saved = None
    precision = choose_precision(settings.model.mixed_precision, group.gpu)
    require_usable(settings.optimizer.optimizer, precision.device)
    engine_name, reason = choose_engine(settings.run.engine, settings.lora)
    initial = initial_digest(settings.lora, outputs, saved.identity.fingerprint.get(INITIAL_LORA) if saved else None)
    budget = measure_budget(base, examples, settings, precision, engine_name, group.local_world_size)
    # A run that an older version saved has no record: its base was not quantized. A finished run keeps its choice as well, so that
    # it stays finished when there is less memory.
    requested, recorded_choice = settings, saved.identity.fingerprint.get("base_quantization", "none") if saved else None
    settings, budget = resolve_quantization(settings, budget, recorded_choice)

    samples = saved.identity.fingerprint[GLOBAL_BATCH] // world_size if saved else None
    trained = sum(not example.is_regularization for example in examples)
    settings = resolve_batch_size(settings, budget, max(1, trained // world_size), samples)
    settings = replace(settings, run=match_global_batch(settings.run, world_size, None if was_finished else saved))
    digests = [base_digest(base, outputs.cache, part) for part in base.components]
    digests.append(tokenizers_digest(find_or_download_tokenizers(base, project.models_dir)))
    schedule, is_assumed = _schedule(base, settings, outputs, saved, was_finished, digests)
    plan = make_plan(examples, settings, schedule, world_size)
    settings = _resolved(settings, plan, precision, engine_name, outputs.name)
    settings, prior = with_class_of_prior(settings, plan, project.trigger_word)
    fingerprint = result_fingerprint(plan, settings, project.trigger_word, digests, initial)
    if saved:
        plan = replace(plan, warmup_steps=warmup_to_keep(saved, fingerprint))
        fingerprint = result_fingerprint(plan, settings, project.trigger_word, digests, initial)
    is_finished = not settings.saving.fresh and outputs.is_finished(short_hash(fingerprint))
    continues = saved is not None and changes(saved.identity.fingerprint, fingerprint).keys() <= {*LENGTH, EARLY_STOP}
    if was_finished and saved and not continues and requested.model.base_quantization == "auto":
        print("the finished run had other settings or data; for this one, the base quantization is chosen again", flush=True)
        fresh = replace(requested, saving=replace(requested.saving, fresh=True))
        job = resolve_job(group, project, fresh, inputs, comfyui)
        return replace(job, settings=replace(job.settings, saving=replace(job.settings.saving, fresh=False)))
    if not is_finished:  # a finished run needs no memory
        settings = fit_to_memory(settings, budget, comfyui_advice(comfyui))

    print(f"training on {describe(precision)}; engine: {engine_name} ({reason})", flush=True)
    print(f"base model: {base.name}, {family_of(base)}", flush=True)
    print("\n".join([plan.announcement(), *prior]), flush=True)

    recorded = saved.identity.runtime if continues else {}
    images, resolved = plan_samples(settings, project.trigger_word, plan, budget, base, recorded)
    settings = replace(settings, samples=resolved)
    runtime = runtime_settings(settings, world_size) | decoder_record(plan.all_examples)
    identity = Identity(fingerprint, runtime, plan.shared_prefix_steps)
    if images and not is_finished:
        print(images.announcement, flush=True)
    if saved and not is_finished:
        saved = _resume_point(outputs, saved, identity, was_finished)
    begins = initial and not saved and not is_finished
    layers = matching_layers(settings.lora, shapes_of_base(base, settings.lora)) if begins else {}
    return TrainingJob(
        project, settings, base, plan, precision, engine_name, outputs, identity, saved, is_finished, was_finished, budget, images,
        is_assumed, layers,
    )  # fmt: skip


def _schedule(
    base: BaseModel,
    settings: TrainSettings,
    outputs: OutputLayout,
    saved: Checkpoint | None,
    was_finished: bool,
    digests: Sequence[str],
) -> tuple[Schedule, bool]:
    """The schedule of the run, and whether what the base model predicts is only assumed. A run that is continued keeps its own."""
    measured = remembered_prediction(outputs.cache, base_digest(base, outputs.cache, "unet"))
    recorded = saved.identity.fingerprint if saved else {}
    if recorded.get("base model") != short_hash(list(digests)) or (was_finished and recorded["prediction_type"] == "epsilon"):
        recorded = {}
    found = (measured, recorded) if was_finished else (recorded, measured)
    return choose_schedule(base, settings.model.prediction_type, settings.model.zero_terminal_snr, *found)


def _resume_point(outputs: OutputLayout, saved: Checkpoint, identity: Identity, was_finished: bool) -> Checkpoint | None:
    """The checkpoint from which the run is continued; None if it is a new one. Raises SettingsError if `saved` belongs to
    another run that is not finished."""
    try:
        saved = find_resume_point(outputs.state, saved, identity)
    except SettingsError:
        if was_finished:
            return None
        raise
    print(f"continuing at step {saved.progress.next_step}", flush=True)
    return saved


def _resolved(settings: TrainSettings, plan: Plan, precision: Precision, engine: EngineName, name: str) -> TrainSettings:
    """The settings with the values that the plan and the device give every "auto", as training_config_resolved.toml has them."""
    if precision.name != settings.model.mixed_precision:
        print(f"mixed precision: {precision.name} instead of {settings.model.mixed_precision} (no NVIDIA GPU)")
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
