"""A training run from settings to file: what `train_lora.py` calls, in the order in which it calls it."""

import contextlib
import gc
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel

from dataset_folder import DatasetFolder, whole_file, write_text
from errors import DataError, LoracatError, ResourceError, SettingsError, StopRequest, reason_for
from prefetch import prefetched
from settings import ProjectSettings, resolved_toml
from training import checkpoint
from training.base_model import find_base
from training.batches import BatchReader
from training.cache import Cache
from training.checkpoint import Identity, Saved, StateWriter
from training.config import TrainSettings
from training.continuation import continued, kept_warmup, shared_by
from training.dataset import Example, flagged_pictures, read_examples, unused_entries
from training.device import (
    Precision,
    StepMemory,
    available_bytes,
    choose_precision,
    describe,
    limit_gpu_memory,
    make_deterministic,
    shares_memory,
    step_memory,
)
from training.encode import EncodedData, Encoding, base_digest, encode_data
from training.export import Description, write_lora
from training.fast_unet import checkpoint_everything, fast_ops, quicken
from training.fitting import fitted, what_fits
from training.loop import Run, run_steps
from training.lora import LoraModule, LoraWeights, inject
from training.memory import KERNEL, Floors, Watch, comfyui_hint, floors
from training.metrics import Everybody, Tracker, open_metrics
from training.models import load_unet
from training.optimizer import build_optimizer, learning_rate_at
from training.parts import BaseModel
from training.plan import Plan, circumstances, fingerprint, fingerprint_hash, make_plan
from training.processes import Processes
from training.progress import Progress, smoothed
from training.results import Results
from training.schedule import alphas_cumprod
from training.step import Objective, TrainStep
from training.tensor_files import remove_all_leftovers
from training.validation import Validator


@dataclass(frozen=True)
class Task:
    """What was asked for, and what was found and decided before anything heavy is loaded."""

    processes: Processes
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
    size: StepMemory
    floors: Floors | None
    """Of the memory; None: nobody guards it."""


def decide_together(processes: Processes, project: ProjectSettings, settings: TrainSettings, comfyui: str) -> Task:
    """What the first process decides, in every process; raises DataError on another machine that has other pictures."""
    run = processes.from_first(lambda: decide(processes, project, settings, comfyui))
    if processes.is_first:
        return run
    if processes.place.local_index == 0:
        wanted = sorted(example.sha256 for example in run.plan.all_examples)
        if sorted(example.sha256 for example in read_pictures(project, settings)) != wanted:
            raise DataError(f"{project.dataset_dir}: the pictures are not those of the first machine; copy its folder here")
    precision = choose_precision(run.settings.model.mixed_precision, processes.gpu)
    return replace(run, processes=processes, precision=precision)


def decide(processes: Processes, project: ProjectSettings, settings: TrainSettings, comfyui: str) -> Task:
    """Read and verify everything, replace every "auto" by what it means here, and say what the run will do."""
    base = find_base(settings.model.base_model, project.models_dir)
    examples = read_pictures(project, settings)
    results = Results(project.output_dir, settings.saving.output_name or project.trigger_word)
    saved = None if settings.saving.fresh else checkpoint.newest(results.state)
    count = processes.place.count
    was_finished = saved is not None and results.is_finished(fingerprint_hash(saved.identity.fingerprint))
    settings = replace(settings, run=shared_by(settings.run, count, None if was_finished else saved))
    schedule = base.schedule.with_settings(settings.model.prediction_type, settings.model.zero_terminal_snr)
    plan = make_plan(examples, settings, schedule, count)
    precision = choose_precision(settings.model.mixed_precision, processes.gpu)
    limits = floors(settings.run.memory_floor_gib, KERNEL.read().total, shares_memory(precision.device))
    size = step_memory(base.parts["unet"], settings.lora.lora_rank, precision)
    available = available_bytes(precision.device)
    if shares_memory(precision.device):
        available //= processes.place.local_count
    settings = resolved(settings, plan, precision, results.name)
    settings = fitted(settings, size, plan.largest_picture_px, available, limits, lambda: comfyui_hint(comfyui))
    switch = "on" if settings.model.gradient_checkpointing else "off"
    print(f"training on {describe(precision)}, gradient checkpointing {switch}", flush=True)
    cache = Cache(results.cache)
    digests = [base_digest(base, cache, part) for part in base.parts]
    print(plan.announcement(), flush=True)
    values = fingerprint(plan, settings, project.trigger_word, digests)
    if saved:
        plan = replace(plan, warmup_steps=kept_warmup(saved, values))
        values = fingerprint(plan, settings, project.trigger_word, digests)
    identity = Identity(values, circumstances(settings, count), plan.common_steps)
    is_finished = not settings.saving.fresh and results.is_finished(fingerprint_hash(values))
    if saved and not is_finished:
        saved = continuing(results, saved, identity, was_finished)
    return Task(processes, project, settings, base, plan, precision, results, cache, identity, saved, is_finished, size, limits)


def continuing(results: Results, saved: Saved, identity: Identity, was_finished: bool) -> Saved | None:
    """The state from which the run goes on; None if it is a new one. Raises SettingsError if an unfinished run lies there
    that began differently."""
    try:
        saved = continued(results.state, saved, identity)
    except SettingsError:
        if was_finished:
            return None
        raise
    print(f"continuing at step {saved.progress.next_step}", flush=True)
    return saved


def read_pictures(project: ProjectSettings, settings: TrainSettings) -> list[Example]:
    """The examples of the data set; what lies among them and is none is named."""
    dataset = DatasetFolder(project.dataset_dir)
    folder = dataset.images
    flagged = flagged_pictures(dataset, settings.data.resolution) if settings.data.skip_flagged else {}
    if flagged:
        print(f"left out, because flagged: {', '.join(f'{name} ({flaws})' for name, flaws in flagged.items())}")
    examples = read_examples(folder, settings.data.dataloader_num_workers, flagged)
    unused = unused_entries(folder)
    if unused:
        print(f"not used, because neither picture, caption of one, nor N_name folder: {', '.join(unused)}")
    return examples


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
    for complaint in saving.contradictions():
        raise SettingsError(f"{complaint}; set OUTPUT_NAME")
    return replace(settings, model=model, objective=objective, validation=validation, saving=saving)


def tidy(task: Task) -> None:
    """Remove what runs have left that were killed while they wrote; nobody else writes there."""
    if task.processes.is_first:
        for folder in (task.results.folder, task.results.state, task.results.cache / "latents", task.results.cache / "text"):
            remove_all_leftovers(folder)
        if task.is_finished:
            checkpoint.keep_one(task.results.state, task.plan.common_steps)


def make_room(task: Task) -> None:
    """Lay aside what earlier runs left, unless this one continues, and write down the settings in force."""
    if task.saved is None:
        earlier = checkpoint.newest(task.results.state)
        if earlier and task.results.is_finished(fingerprint_hash(earlier.identity.fingerprint)):
            checkpoint.remove(task.results.state)
        checkpoint.lay_aside(task.results.state)
        task.results.make_room()
    else:
        task.results.archive_lora()
    tidy(task)
    write_text(task.results.resolved, resolved_toml({"project": task.project, "train": task.settings}))


def prepare_device(task: Task) -> None:
    """What has to be said before the device computes or holds anything."""
    if task.settings.run.deterministic:
        make_deterministic()
    if task.floors:
        limit_gpu_memory(task.precision.device, available_bytes(task.precision.device) - task.floors.stop)


def encode(task: Task) -> EncodedData:
    """Everything that does not change during training, computed once."""
    device, dtype = task.precision.device, task.precision.dtype
    encoding = Encoding(task.base, task.project.models_dir, task.cache, device, dtype, task.processes)
    return encode_data(encoding, task.plan, task.settings.data, task.project.trigger_word, task.settings.run.train_seed)


@contextlib.contextmanager
def coming_unet(task: Task) -> Iterator[Callable[[], UNet2DConditionModel]]:
    """A function that returns the UNet. It is read beside the encoding if there is memory for both, which is so where
    activations need not be recomputed."""

    def load() -> UNet2DConditionModel:
        return load_unet(task.base, task.precision.device, task.precision.dtype)

    if task.precision.device.type == "cpu" or task.settings.model.gradient_checkpointing:
        yield load
    else:
        with ThreadPoolExecutor(1) as pool:
            yield pool.submit(load).result


def train(task: Task, encoded: EncodedData, unet: UNet2DConditionModel, guard: Watch | None) -> tuple[list[LoraModule], Progress]:
    """Put the LoRA into the UNet, and take every step that is left. Returns the modules and how far it came."""
    settings, precision, processes = task.settings, task.precision, task.processes
    lora = inject(unet, settings.lora, settings.run.train_seed)
    quicken(unet, lora.stacks, fast_ops(precision.device))
    if settings.model.gradient_checkpointing:
        checkpoint_everything(unet)
    optimizer = build_optimizer(lora.weights, settings.optimizer)
    take_step = TrainStep(
        unet, lora, optimizer, objective_of(task), precision, settings.optimizer.max_grad_norm, processes.all_reduce
    )
    if task.saved and processes.is_first:
        checkpoint.restore(task.saved, lora.weights, optimizer, take_step.scaler)
    if task.saved:
        checkpoint.share(task.saved, processes.copy_from_first, lora.weights, optimizer, take_step.scaler)
    run, reader = run_of(task), reader_of(task, encoded)
    batches = prefetched(reader, run.todo, settings.data.dataloader_num_workers)
    stop = StopRequest()
    print(f"{len(lora.modules)} modules of rank {settings.lora.lora_rank}; {len(run.todo)} steps to go", flush=True)
    with recorded(task, lora, take_step, run) as (metrics, saver):
        validator = validator_of(task, encoded, take_step)

        def stop_asked() -> LoracatError | None:
            if guard and guard.wants_empty_caches:
                guard.wants_empty_caches = False
                gc.collect()
                torch.cuda.empty_cache()
            signum = processes.largest(stop.signum)
            return reason_for(signum) if signum else None

        progress = run_steps(run, take_step.begin, batches, reader.names, validator, saver, metrics, stop_asked)
    return lora.modules, progress


@contextlib.contextmanager
def recorded(task: Task, lora: LoraWeights, take_step: TrainStep, run: Run) -> Iterator[tuple[Tracker, "Saver | Onlooker"]]:
    """Who is told about the steps, and who writes: nobody but in the first process."""
    if not task.processes.is_first:
        yield Everybody([]), Onlooker()
        return
    results, settings = task.results, task.settings
    with (
        open_metrics(settings.logging, results.name, results.metrics, results.logs, run.begins.next_step) as metrics,
        StateWriter(results.state, task.identity, settings.saving.keep_last_states) as states,
    ):
        yield metrics, Saver(task, lora, take_step, states)


def objective_of(task: Task) -> Objective:
    return Objective(
        prediction_type=task.plan.schedule.prediction_type,
        alphas_cumprod=alphas_cumprod(task.plan.schedule).to(task.precision.device, torch.float32),
        min_snr_gamma=task.plan.min_snr_gamma,
        noise_offset=task.plan.noise_offset,
        latent_scaling=task.base.parts["vae"].config["scaling_factor"],
    )


def run_of(task: Task) -> Run:
    """The steps that are left, and when to write what."""
    optimizer, saving, plan = task.settings.optimizer, task.settings.saving, task.plan
    return Run(
        order=plan.order,
        begins=task.saved.progress if task.saved else Progress(),
        epochs=plan.epochs,
        common_steps=plan.common_steps,
        validate_every_epochs=task.settings.validation.validate_every_epochs,
        early_stop_patience=task.settings.validation.early_stop_patience,
        save_every_epochs=saving.save_every_epochs,
        save_state_every_s=saving.save_state_every_minutes * 60,
        learning_rate_at=lambda step: learning_rate_at(
            step, len(plan.order), optimizer.learning_rate, optimizer.lr_scheduler, plan.warmup_steps
        ),
    )


def reader_of(task: Task, encoded: EncodedData) -> BatchReader:
    return BatchReader(
        examples=encoded.examples,
        empty_caption=encoded.empty_caption,
        seed=task.settings.run.train_seed,
        caption_dropout=task.settings.data.caption_dropout,
        micro_batch=task.settings.run.train_batch_size,
        global_batch=task.plan.global_batch,
        pin=task.precision.device.type == "cuda",
        process=task.processes.place.index,
        processes=task.processes.place.count,
    )


def validator_of(task: Task, encoded: EncodedData, take_step: TrainStep) -> Callable[[], float] | None:
    """Measures the held-out loss; None if no picture is held out."""
    if not encoded.held_out:
        return None
    own_part = Validator(
        examples=encoded.held_out,
        empty_caption=encoded.empty_caption,
        seed=task.settings.run.train_seed,
        micro_batch=task.settings.run.train_batch_size,
        evaluate=take_step.evaluate,
        process=task.processes.place.index,
        processes=task.processes.place.count,
    )
    return lambda: task.processes.total(own_part())


@dataclass(frozen=True)
class Saver:
    """Writes what the loop asks for."""

    task: Task
    trained: LoraWeights
    step: TrainStep
    states: StateWriter

    def state(self, progress: Progress) -> None:
        """Begin to write everything needed to continue from `progress`."""
        self.states.begin(checkpoint.snapshot(self.trained.weights, self.step.optimizer, self.step.scaler, progress))

    def check(self) -> None:
        """Raise what the last save has met, if it is over."""
        self.states.check()

    def wait(self) -> None:
        """Wait until what was begun is on the disk."""
        self.states.wait()

    def lora(self, epochs: int) -> None:
        """The LoRA as it is after `epochs` epochs."""
        write_lora(self.task.results.lora_after(epochs), self.trained.modules, description_of(self.task, epochs))


class Onlooker:
    """Saver of the processes that do not write."""

    def state(self, progress: Progress) -> None:
        pass

    def check(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def lora(self, epochs: int) -> None:
        pass


def description_of(task: Task, epochs: int) -> Description:
    settings = task.settings
    return Description(
        name=task.results.name,
        trigger_word=task.project.trigger_word,
        rank=settings.lora.lora_rank,
        alpha=settings.lora.lora_alpha,
        base_name=task.base.name,
        prediction_type=task.plan.schedule.prediction_type,
        resolution=settings.data.resolution,
        captions=[example.caption for example in task.plan.examples],
        images=len(task.plan.examples),
        epochs=epochs,
        steps=sum(step.epoch < epochs for step in task.plan.order),
        batch_size=settings.run.train_batch_size,
        learning_rate=settings.optimizer.learning_rate,
        seed=settings.run.train_seed,
        fingerprint=fingerprint_hash(task.identity.fingerprint),
    )


def finish(task: Task, modules: list[LoraModule], progress: Progress) -> None:
    """Write the LoRA; when it is there, read back and proved, of the saved states only the one stays from which the run
    can be lengthened."""
    path, run = task.results.lora, run_of(task)
    epochs = run.epochs_done(progress.next_step)
    if progress.next_step < len(run.order):
        patience = run.early_stop_patience
        print(f"ended early after {epochs} epochs: {patience} validations in a row did not lower the held-out loss")
    description = description_of(task, epochs)
    if progress.validations:
        write_best(task.results, modules, progress, description)
    write_lora(path, modules, description)
    checkpoint.keep_one(task.results.state, task.plan.common_steps)
    if task.precision.device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")
    size = path.stat().st_size / 2**20
    print(f"{path}: {size:.1f} MiB, {len(modules)} modules, all known to ComfyUI; copy it to ComfyUI's models/loras")


def write_best(results: Results, modules: list[LoraModule], progress: Progress, last: Description) -> None:
    """Name the LoRA with the lowest smoothed held-out loss among those that were saved, and write it once more."""
    scored = [one for one in smoothed(progress.validations) if results.lora_after(one.epochs).exists() or one.epochs == last.epochs]
    best = min(scored, key=lambda one: one.loss)
    if best.epochs == last.epochs:
        write_lora(results.best, modules, last)
    else:
        with whole_file(results.best) as beside:
            shutil.copyfile(results.lora_after(best.epochs), beside)
    print(f"the lowest held-out loss (smoothed {best.loss:.4f}) is that after {best.epochs} epochs: {results.best}")


@contextlib.contextmanager
def memory_in_our_words(task: Task) -> Iterator[None]:
    """CUDA's out-of-memory as a ResourceError that says what to set."""
    try:
        yield
    except torch.OutOfMemoryError:
        device = task.precision.device
        ours = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        remedy = what_fits(task.settings, task.size, task.plan.largest_picture_px, available_bytes(device) + ours)
        raise ResourceError(
            f"the GPU's memory is full at batch size {task.settings.run.train_batch_size}: {remedy}, and run again"
        ) from None
