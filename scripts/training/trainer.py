"""Train a resolved job: encode the data, build the parts, take the remaining steps, write the LoRA."""

import contextlib
import gc
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tqdm import tqdm

from common.background import in_background, prefetch
from common.errors import Interruption, ResourceError, StopRequest, interruption_for
from common.files import atomic_write, write_bytes
from common.settings import resolved_toml
from training.data.batches import BatchReader
from training.data.buckets import OptimizerStep
from training.data.cache import CacheBuilder, EncodedData
from training.engine import build_engine, warm_up
from training.engine.step import TrainStep
from training.job import TrainingJob
from training.loop import RunSchedule, run_steps
from training.memory_budget import suggest_settings
from training.method.adapters import Adapter, LoraModule, inject
from training.method.diffusion import LossConfig, alphas_cumprod
from training.method.export import Description, write_lora
from training.method.optimizers import OPTIMIZERS, learning_rate_at
from training.models.loading import load_unet
from training.monitor.callbacks import Callback, Progress, smoothed
from training.monitor.metrics import open_metrics
from training.monitor.validation import Validator
from training.plan import short_hash
from training.state.checkpoint import CheckpointWriter, Snapshot, keep_one, newest, remove_incomplete, restore, snapshot
from training.system.device import available_bytes, limit_gpu_memory, make_deterministic
from training.system.memory_guard import MemoryGuard, memory_guard
from training.system.process_group import ProcessGroup
from training.system.worker_process import WorkerProcess


def train(job: TrainingJob, group: ProcessGroup, encoder: WorkerProcess | None) -> None:
    """Take every step that is left of `job`, and write the LoRA. `encoder` is a process that may encode the data."""
    if group.is_main_process:
        prepare_outputs(job)
    prepare_device(job)
    settings, outputs = job.settings, job.outputs
    with translate_cuda_oom(job), memory_guard(job.budget.thresholds) as guard:
        with unet_in_background(job) as load:
            data = encode(job, group, encoder)
            unet, adapter = load()
        step = build_step(job, group, unet, adapter)
        if job.saved:
            restore(job.saved, group, adapter.weights, step.optimizer, step.scaler)
        schedule, reader = schedule_of(job), batch_reader(job, group, data)
        batches = prefetch(reader, schedule.remaining, settings.data.dataloader_num_workers)
        remaining = len(schedule.remaining)
        print(f"{len(adapter.modules)} modules of {settings.lora.describe()}; {remaining} steps to go", flush=True)
        with writing_callbacks(job, adapter, step, schedule, is_writer=group.is_main_process) as writers:
            callbacks = [*validation(job, group, data, step, schedule, writers), *writers]
            stop = stop_request(group, guard)
            progress = run_steps(schedule, step.begin, batches, reader.image_names, callbacks, stop)
            if group.is_main_process:  # while the last checkpoint is still on its way to the disk
                write_results(job, adapter.modules, schedule, progress)
    if group.is_main_process:
        keep_one(outputs.state, job.plan.shared_prefix_steps)
        report_results(job, len(adapter.modules))


def prepare_outputs(job: TrainingJob) -> None:
    """Archive what earlier runs left, unless this one continues them, and write the resolved settings."""
    outputs = job.outputs
    if job.saved is None:
        earlier = newest(outputs.state)
        if earlier and outputs.is_finished(short_hash(earlier.identity.fingerprint)):
            shutil.rmtree(outputs.state)  # its LoRA is complete, and another run follows
        remove_incomplete(outputs.state)
    outputs.begin(resumes=job.saved is not None)
    clean_up(job)
    write_bytes(outputs.resolved_config, resolved_toml({"project": job.project, "train": job.settings}).encode("utf-8"))


def clean_up(job: TrainingJob) -> None:
    """Remove the partial files of runs that were killed while they wrote; this process is the only one that writes there."""
    job.outputs.remove_leftovers()
    if job.is_finished:
        keep_one(job.outputs.state, job.plan.shared_prefix_steps)


def prepare_device(job: TrainingJob) -> None:
    """Set what must be set before the device computes or holds anything."""
    if job.settings.run.deterministic:
        make_deterministic()
    if job.budget.thresholds:
        limit_gpu_memory(job.precision.device, available_bytes(job.precision.device) - job.budget.thresholds.stop)


@contextlib.contextmanager
def translate_cuda_oom(job: TrainingJob) -> Iterator[None]:
    """Raise CUDA's out-of-memory error as a ResourceError with the settings that would fit."""
    try:
        yield
    except torch.OutOfMemoryError:
        device = job.precision.device
        reserved = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        remedy = suggest_settings(job.settings, job.budget, available_bytes(device) + reserved)
        raise ResourceError(
            f"the GPU's memory is full at batch size {job.settings.run.train_batch_size}: {remedy}, and run again"
        ) from None


def has_memory_for_everything(job: TrainingJob) -> bool:
    """Whether the GPU's memory holds encoders and UNet together, which is so where a step leaves the reserve free."""
    batch, checkpointing = job.settings.run.train_batch_size, job.settings.model.gradient_checkpointing
    fits = job.budget.needed(batch, checkpointing=False) <= job.budget.free
    return job.precision.device.type != "cpu" and not checkpointing and fits


@contextlib.contextmanager
def unet_in_background(job: TrainingJob) -> Iterator[Callable[[], tuple[UNet2DConditionModel, Adapter]]]:
    """A function that returns the UNet and its adapter. They are loaded while data is encoded if there is memory for both."""
    starts_now = has_memory_for_everything(job)
    device, dtype = job.precision.device, job.precision.dtype

    def load() -> tuple[UNet2DConditionModel, Adapter]:
        unet = load_unet(job.base, device, dtype)
        return unet, inject(unet, job.settings.lora, job.settings.run.train_seed)

    with (
        in_background(lambda: warm_up(job.engine, device, dtype), start=starts_now) as warmed_up,
        in_background(load, start=starts_now) as loaded,
    ):

        def wait() -> tuple[UNet2DConditionModel, Adapter]:
            warmed_up.result()
            return loaded.result()

        yield wait


def encode(job: TrainingJob, group: ProcessGroup, encoder: WorkerProcess | None = None) -> EncodedData:
    """Compute once what does not change during training; in the process `encoder`, if there is one and memory for the UNet
    beside it, so that encoding and loading do not wait for each other's interpreter lock."""
    if encoder and has_memory_for_everything(job):
        return encoder.call_and_close(_encode_in_worker, job)
    if encoder:
        encoder.end()
    device, dtype = job.precision.device, job.precision.dtype
    concurrent = has_memory_for_everything(job)
    builder = CacheBuilder(job.base, job.project.models_dir, job.cache, device, dtype, group, concurrent)
    trained = list(zip(job.plan.examples, job.plan.placements, strict=True))
    held_out = list(zip(job.plan.held_out, job.plan.held_out_placements, strict=True))
    seed = job.settings.run.train_seed
    return builder.build(trained, held_out, job.settings.data, job.project.trigger_word, seed)


def _encode_in_worker(job: TrainingJob) -> EncodedData:
    tqdm.set_lock(threading.RLock())  # tqdm's own lock, for several processes, would stay behind when this one is killed
    prepare_device(job)
    return encode(job, ProcessGroup())


def build_step(job: TrainingJob, group: ProcessGroup, unet: UNet2DConditionModel, adapter: Adapter) -> TrainStep:
    """The training step of the job's engine, with its optimizer and loss."""
    settings = job.settings
    optimizer = OPTIMIZERS[settings.optimizer.optimizer](adapter.weights, settings.optimizer)
    config = LossConfig(
        prediction_type=job.plan.schedule.prediction_type,
        alphas_cumprod=alphas_cumprod(job.plan.schedule).to(job.precision.device, torch.float32),
        min_snr_gamma=job.plan.min_snr_gamma,
        noise_offset=job.plan.noise_offset,
        latent_scaling=job.base.components["vae"].config["scaling_factor"],
        loss=settings.objective.loss,
    )
    return build_engine(
        job.engine,
        unet,
        adapter,
        optimizer,
        config,
        job.precision,
        settings.optimizer.max_grad_norm,
        group.all_reduce,
        gradient_checkpointing=settings.model.gradient_checkpointing,
    )


def schedule_of(job: TrainingJob) -> RunSchedule:
    """The steps that are left, and when to write what."""
    optimizer, saving, plan = job.settings.optimizer, job.settings.saving, job.plan
    return RunSchedule(
        order=plan.order,
        start=job.saved.progress if job.saved else Progress(),
        epochs=plan.epochs,
        shared_prefix_steps=plan.shared_prefix_steps,
        validate_every_epochs=job.settings.validation.validate_every_epochs,
        early_stop_patience=job.settings.validation.early_stop_patience,
        save_every_epochs=saving.save_every_epochs,
        save_state_every_s=saving.save_state_every_minutes * 60,
        learning_rate_at=lambda step: learning_rate_at(
            step, len(plan.order), optimizer.learning_rate, optimizer.lr_scheduler, plan.warmup_steps
        ),
    )


def batch_reader(job: TrainingJob, group: ProcessGroup, data: EncodedData) -> BatchReader:
    return BatchReader(
        examples=data.examples,
        empty_caption=data.empty_caption,
        seed=job.settings.run.train_seed,
        caption_dropout=job.settings.data.caption_dropout,
        micro_batch=job.settings.run.train_batch_size,
        global_batch=job.plan.global_batch,
        timesteps=job.plan.schedule.timesteps,
        pin=job.precision.device.type == "cuda",
        rank=group.rank,
        world_size=group.world_size,
    )


def validation(
    job: TrainingJob, group: ProcessGroup, data: EncodedData, step: TrainStep, schedule: RunSchedule, trackers: Sequence[Callback]
) -> list[Callback]:
    """The callback that measures the validation loss in every process, if images are held out."""
    if not data.held_out:
        return []
    validator = Validator(
        examples=data.held_out,
        empty_caption=data.empty_caption,
        seed=job.settings.run.train_seed,
        micro_batch=job.settings.run.train_batch_size,
        timesteps=job.plan.schedule.timesteps,
        evaluate=step.evaluate,
        rank=group.rank,
        world_size=group.world_size,
        all_reduce_sum=group.all_reduce_sum,
        is_due=schedule.validates_between,
        trackers=trackers,
    )
    return [validator]


def stop_request(group: ProcessGroup, guard: MemoryGuard | None) -> Callable[[], Interruption | None]:
    """A function that returns why the run has to stop, if any process was asked to. It also empties caches for the guard."""
    request = StopRequest()

    def reason() -> Interruption | None:
        if guard and guard.cache_clear_requested:
            guard.cache_clear_requested = False
            gc.collect()
            torch.cuda.empty_cache()
        signum = group.all_reduce_max(request.signum)
        return interruption_for(signum) if signum else None

    return reason


@contextlib.contextmanager
def writing_callbacks(
    job: TrainingJob, adapter: Adapter, step: TrainStep, schedule: RunSchedule, *, is_writer: bool
) -> Iterator[list[Callback]]:
    """What records the steps and saves LoRAs and checkpoints. Only one process writes; in the others there is none of it."""
    if not is_writer:
        yield []
        return
    outputs, settings = job.outputs, job.settings

    def capture(progress: Progress) -> Snapshot:
        return snapshot(adapter.weights, step.optimizer, step.scaler, progress)

    def write_lora_after(epochs: int) -> None:
        write_lora(outputs.lora_after(epochs), adapter.modules, description(job, epochs))

    with (
        open_metrics(settings.logging, outputs.name, outputs.metrics, outputs.logs, schedule.start.next_step) as metrics,
        CheckpointWriter(outputs.state, job.identity, settings.saving.keep_last_states, capture) as checkpoints,
    ):
        yield [metrics, LoraSaver(write_lora_after, schedule.saves_lora_between), checkpoints]


class LoraSaver(Callback):
    """Writes the LoRA files of a run on its way."""

    def __init__(self, write: Callable[[int], None], is_due: Callable[[int, int], bool]):
        """`write` writes the LoRA after so many epochs; `is_due` says whether to, by the numbers of epochs before and after."""
        self._write = write
        self._is_due = is_due

    def after_epoch(self, step: OptimizerStep, epochs: int, progress: Progress) -> tuple[Progress, str]:
        if self._is_due(step.epoch, epochs):
            self._write(epochs)
        return progress, ""


def description(job: TrainingJob, epochs: int) -> Description:
    """What the LoRA file after `epochs` epochs says about itself."""
    settings, plan = job.settings, job.plan
    return Description(
        name=job.outputs.name,
        trigger_word=job.project.trigger_word,
        rank=settings.lora.lora_rank,
        alpha=settings.lora.alpha,
        base_name=job.base.name,
        prediction_type=plan.schedule.prediction_type,
        resolution=settings.data.resolution,
        captions=[example.caption for example in plan.examples],
        images=len(plan.examples),
        epochs=epochs,
        steps=sum(step.epoch < epochs for step in plan.order),
        batch_size=settings.run.train_batch_size,
        learning_rate=settings.optimizer.learning_rate,
        optimizer=OPTIMIZERS[settings.optimizer.optimizer].label,
        seed=settings.run.train_seed,
        fingerprint=short_hash(job.identity.fingerprint),
    )


def write_results(job: TrainingJob, modules: list[LoraModule], schedule: RunSchedule, progress: Progress) -> None:
    """Write the LoRA, and beside it the one with the lowest validation loss; both are read back and verified."""
    epochs = schedule.epochs_complete(progress.next_step)
    if progress.next_step < len(schedule.order):
        patience = schedule.early_stop_patience
        print(f"stopping early after {epochs} epochs: {patience} validations in a row did not lower the validation loss")
    about = description(job, epochs)
    if progress.validations:
        write_best(job, modules, progress, about)
    write_lora(job.outputs.lora, modules, about)


def write_best(job: TrainingJob, modules: list[LoraModule], progress: Progress, last: Description) -> None:
    """Report the LoRA with the lowest smoothed validation loss among those that were saved, and write it once more."""
    outputs = job.outputs
    saved = [one for one in smoothed(progress.validations) if outputs.lora_after(one.epochs).exists() or one.epochs == last.epochs]
    best = min(saved, key=lambda one: one.loss)
    if best.epochs == last.epochs:
        write_lora(outputs.best, modules, last)
    else:
        with atomic_write(outputs.best) as temporary:
            shutil.copyfile(outputs.lora_after(best.epochs), temporary)
    print(f"best validation loss {best.loss:.4f} (smoothed) at epoch {best.epochs}: {outputs.best}")


def report_results(job: TrainingJob, modules: int) -> None:
    if job.precision.device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")
    path = job.outputs.lora
    size = path.stat().st_size / 2**20
    print(f"{path}: {size:.1f} MiB, {modules} modules, all known to ComfyUI; copy it to ComfyUI's models/loras")
    print_next_steps(job)


def print_next_steps(job: TrainingJob) -> None:
    """What to do with the LoRA, and last what keeps it from being good."""
    lora, trigger = job.outputs.lora.name, job.project.trigger_word
    print(f"next: load {lora} in ComfyUI beside an SDXL checkpoint, with {trigger!r} in the prompt")
    for warning in job.plan.warnings():
        print(warning)
