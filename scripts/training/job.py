"""Resolve what a run will do before anything heavy is loaded: every "auto", the plan, the engine, and where it continues."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from common.errors import DataError
from common.output_layout import OutputLayout
from common.project import ProjectSettings
from training.callbacks.checkpoint import Checkpoint, Identity, changes_since
from training.callbacks.sample_plan import SamplePlan, plan_samples
from training.config import TrainSettings
from training.data.dataset import Inputs, read_images
from training.engine import EngineName, choose_engine
from training.initial_lora import matching_layers
from training.lora_files.reading import Layer
from training.memory_budget import MemoryBudget, fit_to_memory
from training.method.layers import shapes_of_base
from training.method.optimizers import require_usable
from training.models.base_model import base_digest, find_or_download_tokenizers, tokenizers_digest
from training.models.family import family_of
from training.models.sdxl import BaseModel
from training.plan import Plan, decoder_record, runtime_settings
from training.run import Machines, find_run, outputs_of
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
    """Find out whether the run is new, unfinished or finished, log what it will do, and resolve every "auto"."""
    base, examples, _ = inputs
    outputs = outputs_of(project, settings)
    precision = choose_precision(settings.model.mixed_precision, group.gpu)
    require_usable(settings.optimizer.optimizer, precision.device)
    engine, reason = choose_engine(settings.run.engine, settings.lora)
    digests = {part: base_digest(base, outputs.cache, part) for part in base.components}
    digests["tokenizers"] = tokenizers_digest(find_or_download_tokenizers(base, project.models_dir))
    machines = Machines(precision, group.world_size, group.local_world_size)
    run = find_run(project, settings, base, examples, machines, digests)

    if precision.name != settings.model.mixed_precision:
        print(f"mixed precision: {precision.name} instead of {settings.model.mixed_precision} (no NVIDIA GPU)")
    print(*run.lines, sep="\n", end="\n" if run.lines else "", flush=True)
    settings, plan, saved = run.settings, run.plan, run.saved
    if not run.is_finished:  # a finished run needs no memory
        settings = fit_to_memory(settings, run.budget, comfyui_advice(comfyui))
    print(f"training on {describe(precision)}; engine: {engine} ({reason})", flush=True)
    print(f"base model: {base.name}, {family_of(base)}", flush=True)
    print(plan.announcement(), flush=True)
    images, resolved = plan_samples(settings, project.trigger_word, plan, run.budget, base, run.recorded)
    settings = replace(settings, samples=resolved)
    runtime = runtime_settings(settings, group.world_size) | decoder_record(plan.all_examples)
    identity = Identity(run.fingerprint, runtime, plan.shared_prefix_steps)
    if images and not run.is_finished:
        print(images.announcement, flush=True)
    if saved and not run.is_finished:
        lines = [f"setting changed since the checkpoint: {change}" for change in changes_since(saved, identity)]
        print(*lines, f"continuing at step {saved.progress.next_step}", sep="\n", flush=True)
    layers = matching_layers(settings.lora, shapes_of_base(base, settings.lora)) if run.begins_from_file else {}
    return TrainingJob(
        project, settings, base, plan, precision, engine, outputs, identity, saved, run.is_finished, run.follows_finished,
        run.budget, images, run.assumes_prediction, layers,
    )  # fmt: skip
