"""What was asked for, and what is decided about it before anything heavy is loaded."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from common.errors import DataError, ResourceError, SettingsError
from common.files import write_text
from common.output_layout import Results
from common.project import ProjectSettings
from common.settings import resolved_toml
from training.config import TrainSettings
from training.data.cache import Cache
from training.data.dataset import Inputs, read_images
from training.memory_budget import MemoryBudget, fit_to_memory, measure_budget, resolve_batch_size, suggest_settings
from training.models.base_model import base_digest, cache_folder, find_or_download_tokenizers, tokenizers_digest
from training.models.sdxl import BaseModel
from training.models.weights import remove_partial_weights
from training.plan import GLOBAL_BATCH, Plan, circumstances, fingerprint, fingerprint_hash, make_plan
from training.state import checkpoint
from training.state.checkpoint import Identity, Saved
from training.state.resume import find_resume_point, match_global_batch, warmup_to_keep
from training.system.device import Precision, available_bytes, choose_precision, describe, limit_gpu_memory, make_deterministic
from training.system.memory_guard import comfyui_hint
from training.system.process_group import ProcessGroup


@dataclass(frozen=True)
class Task:
    """What was asked for, and what was found and decided before anything heavy is loaded."""

    processes: ProcessGroup
    project: ProjectSettings
    settings: TrainSettings
    """With every "auto" decided."""
    base: BaseModel
    plan: Plan
    precision: Precision
    results: Results
    cache: Cache
    identity: Identity
    saved: Saved | None
    """The state from which the run goes on."""
    is_finished: bool
    """The LoRA of exactly this run is there already."""
    room: MemoryBudget


def decide_together(
    processes: ProcessGroup, project: ProjectSettings, settings: TrainSettings, inputs: Callable[[], Inputs], comfyui: str
) -> Task:
    """What the first process decides, in every process; raises DataError on another machine that has other images."""
    run = processes.broadcast_object(lambda: decide(processes, project, settings, inputs(), comfyui))
    if processes.is_main_process:
        return run
    if processes.place.local_index == 0:
        wanted = sorted(example.sha256 for example in run.plan.all_examples)
        if sorted(example.sha256 for example in read_images(project, settings.data)) != wanted:
            raise DataError(f"{project.dataset_dir}: the images are not those of the first machine; copy its folder here")
    precision = choose_precision(run.settings.model.mixed_precision, processes.gpu)
    return replace(run, processes=processes, precision=precision)


def decide(processes: ProcessGroup, project: ProjectSettings, settings: TrainSettings, inputs: Inputs, comfyui: str) -> Task:
    """Replace every "auto" by what it means here, and say what the run will do."""
    base, examples = inputs.base, inputs.examples
    results = Results(project.output_dir, settings.saving.output_name or project.trigger_word)
    saved = None if settings.saving.fresh else checkpoint.newest(results.state)
    count = processes.place.count
    was_finished = saved is not None and results.is_finished(fingerprint_hash(saved.identity.fingerprint))
    precision = choose_precision(settings.model.mixed_precision, processes.gpu)
    room = measure_budget(base, examples, settings, precision, processes.place.local_count)
    samples = saved.identity.fingerprint[GLOBAL_BATCH] // count if saved else None
    settings = resolve_batch_size(settings, room, max(1, len(examples) // count), samples)
    settings = replace(settings, run=match_global_batch(settings.run, count, None if was_finished else saved))
    schedule = base.schedule.with_settings(settings.model.prediction_type, settings.model.zero_terminal_snr)
    plan = make_plan(examples, settings, schedule, count)
    settings = resolved(settings, plan, precision, results.name)
    settings = fit_to_memory(settings, room, lambda: comfyui_hint(comfyui))
    switch = "on" if settings.model.gradient_checkpointing else "off"
    print(f"training on {describe(precision)}, gradient checkpointing {switch}", flush=True)
    cache = Cache(cache_folder(project.output_dir))
    digests = [base_digest(base, cache.folder, part) for part in base.components]
    digests.append(tokenizers_digest(find_or_download_tokenizers(base, project.models_dir)))
    print(plan.announcement(), flush=True)
    values = fingerprint(plan, settings, project.trigger_word, digests)
    if saved:
        plan = replace(plan, warmup_steps=warmup_to_keep(saved, values))
        values = fingerprint(plan, settings, project.trigger_word, digests)
    identity = Identity(values, circumstances(settings, count), plan.common_steps)
    is_finished = not settings.saving.fresh and results.is_finished(fingerprint_hash(values))
    if saved and not is_finished:
        saved = continuing(results, saved, identity, was_finished)
    return Task(processes, project, settings, base, plan, precision, results, cache, identity, saved, is_finished, room)


def continuing(results: Results, saved: Saved, identity: Identity, was_finished: bool) -> Saved | None:
    """The state from which the run goes on; None if it is a new one. Raises SettingsError if an unfinished run lies there
    that began differently."""
    try:
        saved = find_resume_point(results.state, saved, identity)
    except SettingsError:
        if was_finished:
            return None
        raise
    print(f"continuing at step {saved.progress.next_step}", flush=True)
    return saved


def resolved(settings: TrainSettings, plan: Plan, precision: Precision, name: str) -> TrainSettings:
    """The settings with every "auto" decided, as training_config_resolved.toml shows them."""
    model = replace(
        settings.model,
        prediction_type=plan.schedule.prediction_type,
        zero_terminal_snr=plan.schedule.zero_terminal_snr,
        mixed_precision=precision.name,
    )
    if precision.name != settings.model.mixed_precision:
        print(f"no NVIDIA GPU: mixed_precision {settings.model.mixed_precision} becomes {precision.name}")
    objective = replace(settings.objective, min_snr_gamma=plan.min_snr_gamma, noise_offset=plan.noise_offset)
    validation = replace(settings.validation, validation_fraction=plan.held_out_share)
    saving = replace(settings.saving, output_name=name)
    return replace(settings, model=model, objective=objective, validation=validation, saving=saving)


def remove_partial_outputs(task: Task) -> None:
    """Remove what runs have left that were killed while they wrote; nobody else writes there."""
    if task.processes.is_main_process:
        for folder in (task.results.folder, task.results.state, task.cache.folder / "latents", task.cache.folder / "text"):
            remove_partial_weights(folder)
        if task.is_finished:
            checkpoint.keep_one(task.results.state, task.plan.common_steps)


def archive_previous_outputs(task: Task) -> None:
    """Lay aside what earlier runs left, unless this one continues, and write down the settings in force."""
    if task.saved is None:
        earlier = checkpoint.newest(task.results.state)
        if earlier and task.results.is_finished(fingerprint_hash(earlier.identity.fingerprint)):
            checkpoint.remove(task.results.state)
        checkpoint.archive_state(task.results.state)
        task.results.archive_previous_outputs()
    else:
        task.results.archive_lora()
    remove_partial_outputs(task)
    write_text(task.results.resolved, resolved_toml({"project": task.project, "train": task.settings}))


def prepare_device(task: Task) -> None:
    """What has to be said before the device computes or holds anything."""
    if task.settings.run.deterministic:
        make_deterministic()
    if task.room.floors:
        limit_gpu_memory(task.precision.device, available_bytes(task.precision.device) - task.room.floors.stop)


@contextlib.contextmanager
def translate_cuda_oom(task: Task) -> Iterator[None]:
    """CUDA's out-of-memory as a ResourceError that says what to set."""
    try:
        yield
    except torch.OutOfMemoryError:
        device = task.precision.device
        ours = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        remedy = suggest_settings(task.settings, task.room, available_bytes(device) + ours)
        raise ResourceError(
            f"the GPU's memory is full at batch size {task.settings.run.train_batch_size}: {remedy}, and run again"
        ) from None
