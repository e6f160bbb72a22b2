"""Resolve what a run will do before anything heavy is loaded: every "auto", the plan, the engine, and where it continues."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from common.errors import DataError, SettingsError
from common.output_layout import OutputLayout
from common.project import ProjectSettings
from common.settings import VERSION
from training.callbacks.checkpoint import (
    EARLY_STOP,
    EPOCHS,
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
from training.memory_budget import MemoryBudget, fit_to_memory, measure_budget, resolve_batch_size, resolve_quantization
from training.method.diffusion import LOSS_METADATA
from training.method.optimizers import OPTIMIZERS, require_usable
from training.models.base_model import base_digest, find_or_download_tokenizers, tokenizers_digest
from training.models.sdxl import BaseModel
from training.plan import GLOBAL_BATCH, Plan, changes, decoder_record, make_plan, result_fingerprint, runtime_settings, short_hash
from training.system.device import Precision, choose_precision, comfyui_advice, describe
from training.system.process_group import ProcessGroup

_MAX_TAGS_BYTES = 10_000_000
"""Of the tags of all captions in the header of a LoRA. safetensors reads headers of up to 100 MB."""


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
    budget = measure_budget(base, examples, settings, precision, engine_name, group.local_world_size)
    # A run that an older version saved has no record: its base was not quantized.
    recorded_choice = saved.identity.fingerprint.get("base_quantization", "none") if saved and not was_finished else None
    settings, budget = resolve_quantization(settings, budget, recorded_choice)

    samples = saved.identity.fingerprint[GLOBAL_BATCH] // world_size if saved else None
    trained = sum(not example.is_regularization for example in examples)
    settings = resolve_batch_size(settings, budget, max(1, trained // world_size), samples)
    settings = replace(settings, run=match_global_batch(settings.run, world_size, None if was_finished else saved))
    schedule = base.schedule.with_settings(settings.model.prediction_type, settings.model.zero_terminal_snr)
    plan = make_plan(examples, settings, schedule, world_size)
    settings = _resolved(settings, plan, precision, engine_name, outputs.name)
    settings, prior = with_class_of_prior(settings, plan, project.trigger_word)
    settings = fit_to_memory(settings, budget, comfyui_advice(comfyui))

    print(f"training on {describe(precision)}; engine: {engine_name} ({reason})", flush=True)
    digests = [base_digest(base, outputs.cache, part) for part in base.components]
    digests.append(tokenizers_digest(find_or_download_tokenizers(base, project.models_dir)))
    print("\n".join([plan.announcement(), *prior]), flush=True)

    fingerprint = result_fingerprint(plan, settings, project.trigger_word, digests)
    if saved:
        plan = replace(plan, warmup_steps=warmup_to_keep(saved, fingerprint))
        fingerprint = result_fingerprint(plan, settings, project.trigger_word, digests)
    continues = saved is not None and changes(saved.identity.fingerprint, fingerprint).keys() <= {EPOCHS, EARLY_STOP}
    recorded = saved.identity.runtime if continues else {}
    images, resolved = plan_samples(settings, project.trigger_word, plan, budget, base, recorded)
    settings = replace(settings, samples=resolved)
    runtime = runtime_settings(settings, world_size) | decoder_record(plan.all_examples)
    identity = Identity(fingerprint, runtime, plan.shared_prefix_steps)
    is_finished = not settings.saving.fresh and outputs.is_finished(short_hash(fingerprint))
    if images and not is_finished:
        print(images.announcement, flush=True)
    if saved and not is_finished:
        saved = _resume_point(outputs, saved, identity, was_finished)
    return TrainingJob(
        project, settings, base, plan, precision, engine_name, outputs, identity, saved, is_finished, was_finished, budget, images
    )  # fmt: skip


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
        data=replace(settings.data, resolution=sizes if len(sizes) > 1 else sizes[0], prior_weight=plan.prior_weight),
        lora=replace(settings.lora, lora_alpha=settings.lora.alpha),
        run=replace(settings.run, engine=engine),
        objective=replace(settings.objective, min_snr_gamma=plan.min_snr_gamma, noise_offset=plan.noise_offset),
        validation=replace(settings.validation, validation_fraction=plan.validation_fraction),
        saving=replace(settings.saving, output_name=name),
    )


def with_class_of_prior(settings: TrainSettings, plan: Plan, trigger: str) -> tuple[TrainSettings, list[str]]:
    """The settings with the word that replaces the trigger word in what is to remain of the base model, if there is any, and a line
    about it. Raises SettingsError if the word is not set and the captions do not have it."""
    samples, weight = settings.samples, settings.objective.prior_preservation
    if not weight:
        return settings, []
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
    return settings, [f"prior preservation: weight {weight:g}, {words} ({origin})"]


def lora_metadata(job: TrainingJob, epochs: int) -> dict[str, str]:
    """What A1111, Forge, ComfyUI and model managers read in the header of the LoRA after `epochs` epochs; no paths."""
    settings, plan, name = job.settings, job.plan, job.outputs.name
    now, resolution = datetime.now(UTC), settings.data.resolutions[0]
    pieces = [piece for example in plan.images for caption in example.captions for piece in caption.split(",")]
    tags = Counter(tag for tag in map(str.strip, pieces) if tag)
    is_v = plan.schedule.prediction_type == "v_prediction"
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings.lora.lora_rank),
        "ss_network_alpha": str(settings.lora.alpha),
        "ss_network_args": "{}",
        "ss_output_name": name,
        "ss_sd_model_name": job.base.name,
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_num_train_images": str(len(plan.images)),
        "ss_num_epochs": str(epochs),
        "ss_steps": str(sum(step.epoch < epochs for step in plan.order)),
        "ss_batch_size_per_device": str(settings.run.train_batch_size),
        "ss_learning_rate": str(settings.optimizer.learning_rate),
        "ss_unet_lr": str(settings.optimizer.learning_rate),
        **_method_metadata(settings, plan),
        "ss_epoch": str(epochs),
        "ss_seed": str(settings.run.train_seed),
        "ss_tag_frequency": json.dumps({"dataset": _most_frequent(tags)}, ensure_ascii=False),
        "ss_training_finished_at": str(now.timestamp()),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.date": now.isoformat(timespec="seconds"),
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "modelspec.trigger_phrase": ", ".join(plan.triggers),
        "loracat_version": VERSION,
        "loracat_fingerprint": short_hash(job.identity.fingerprint),
        **({"ss_v_parameterization": "True"} if is_v else {}),
        **(
            {
                "ss_num_reg_images": str(len({each.path for each in plan.regularization})),
                "ss_prior_loss_weight": str(plan.prior_weight),
            }
            if plan.regularization
            else {}
        ),
    }


def _method_metadata(settings: TrainSettings, plan: Plan) -> dict[str, str]:
    """Optimizer and objective in the words of kohya's scripts, where these have one."""
    optimizer = settings.optimizer
    return {
        "ss_optimizer": OPTIMIZERS[optimizer.optimizer].label,
        "ss_lr_scheduler": optimizer.lr_scheduler,
        "ss_lr_warmup_steps": str(plan.warmup_steps),
        "ss_max_grad_norm": str(optimizer.max_grad_norm),
        **LOSS_METADATA[settings.objective.loss],
        "ss_min_snr_gamma": str(plan.min_snr_gamma or None),
        "ss_debiased_estimation": str(settings.objective.loss_weighting == "debiased"),
        "ss_noise_offset": str(plan.noise_offset or None),
    }


def _most_frequent(tags: Counter[str]) -> dict[str, int]:
    """The tags and their counts, the most frequent first, up to _MAX_TAGS_BYTES: safetensors limits the size of a header."""
    kept, size_bytes = {}, 0
    for tag, count in tags.most_common():
        size_bytes += len(json.dumps(tag)) + 10
        if size_bytes > _MAX_TAGS_BYTES:
            break
        kept[tag] = count
    return kept
