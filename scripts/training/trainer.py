"""A decided task carried out: data encoded, UNet loaded, every step taken that is left, LoRA written.

What a run writes on its way, and what its LoRA files say about themselves.
"""

import contextlib
import gc
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from common.background import coming, prefetch
from common.errors import Interruption, StopRequest, reason_for
from common.files import atomic_write
from common.output_layout import Results
from training.data.batches import BatchReader
from training.data.cache import EncodedData, Encoding, encode_data
from training.engine.fast.unet import checkpoint_everything, fast_ops, install_fast_forwards, load_libraries
from training.engine.step import Objective, TrainStep
from training.job import Task, prepare_device
from training.loop import Progress, Run, run_steps, smoothed
from training.method.adapters import LoraModule, LoraWeights, inject
from training.method.diffusion import alphas_cumprod
from training.method.export import Description, write_lora
from training.method.optimizers import AdamW, learning_rate_at
from training.models.loading import UNet2DConditionModel, load_unet
from training.monitor.metrics import Tracker, TrackerGroup, open_metrics
from training.monitor.validation import Validator
from training.plan import fingerprint_hash
from training.state import checkpoint
from training.state.checkpoint import StateWriter
from training.system.memory_guard import MemoryGuard
from training.system.worker_process import WorkerProcess

AdaptedUnet = tuple[UNet2DConditionModel, LoraWeights]


def has_room(task: Task) -> bool:
    """Whether the GPU's memory holds encoders and UNet together, which is so where a step leaves the reserve free."""
    batch, checkpointing = task.settings.run.train_batch_size, task.settings.model.gradient_checkpointing
    is_roomy = task.room.needed(batch, checkpointing=False) <= task.room.free
    return task.precision.device.type != "cpu" and not checkpointing and is_roomy


def encode(task: Task, aside: WorkerProcess | None = None) -> EncodedData:
    """Everything that does not change during training, computed once: in the process `aside` if there is memory for the UNet
    beside it, so that neither waits for the other's interpreter."""
    if aside and has_room(task):
        return aside.call_and_close(_encode_aside, task)
    if aside:
        aside.end()
    device, dtype = task.precision.device, task.precision.dtype
    models_dir, at_once = task.project.models_dir, has_room(task)
    encoding = Encoding(task.base, models_dir, task.cache, device, dtype, task.processes, at_once)
    plan, settings = task.plan, task.settings
    trained = list(zip(plan.examples, plan.placements, strict=True))
    held_out = list(zip(plan.held_out, plan.held_out_placements, strict=True))
    return encode_data(encoding, trained, held_out, settings.data, task.project.trigger_word, settings.run.train_seed)


def _encode_aside(task: Task) -> EncodedData:
    tqdm.set_lock(threading.RLock())  # its own, for several processes, would outlive this one when it is ended
    prepare_device(task)
    return encode(task)


@contextlib.contextmanager
def coming_unet(task: Task) -> Iterator[Callable[[], AdaptedUnet]]:
    """A function that returns the UNet and its LoRA. It is made beside the encoding if there is memory for both."""
    libraries, unet = partial(load_libraries, task.precision.device, task.precision.dtype), partial(adapted_unet, task)
    has_room_now = has_room(task)
    with coming(libraries, begins_now=has_room_now) as loaded, coming(unet, begins_now=has_room_now) as made:

        def ready() -> AdaptedUnet:
            loaded()
            return made()

        yield ready


def adapted_unet(task: Task) -> AdaptedUnet:
    """The UNet with a fresh LoRA, as fast as it can be."""
    settings = task.settings
    unet = load_unet(task.base, task.precision.device, task.precision.dtype)
    lora = inject(unet, settings.lora, settings.run.train_seed)
    install_fast_forwards(unet, lora.stacks, fast_ops(task.precision.device))
    if settings.model.gradient_checkpointing:
        checkpoint_everything(unet)
    return unet, lora


def train(task: Task, encoded: EncodedData, adapted: AdaptedUnet, guard: MemoryGuard | None) -> int:
    """Take every step that is left, and write the LoRA. Returns how many modules it has."""
    settings, precision, processes = task.settings, task.precision, task.processes
    unet, lora = adapted
    optimizer = AdamW(lora.weights, settings.optimizer)
    take_step = TrainStep(
        unet, lora, optimizer, objective_of(task), precision, settings.optimizer.max_grad_norm, processes.all_reduce
    )
    if task.saved and processes.is_main_process:
        checkpoint.restore(task.saved, lora.weights, optimizer, take_step.scaler)
    if task.saved:
        checkpoint.share(task.saved, processes.broadcast, lora.weights, optimizer, take_step.scaler)
    run, reader = run_of(task), reader_of(task, encoded)
    batches = prefetch(reader, run.todo, settings.data.dataloader_num_workers)
    stop = StopRequest()
    print(f"{len(lora.modules)} modules of rank {settings.lora.lora_rank}; {len(run.todo)} steps to go", flush=True)
    with recorded(task, lora, take_step, run) as (metrics, saver):
        validator = validator_of(task, encoded, take_step)

        def stop_asked() -> Interruption | None:
            if guard and guard.wants_empty_caches:
                guard.wants_empty_caches = False
                gc.collect()
                torch.cuda.empty_cache()
            signum = processes.largest(stop.signum)
            return reason_for(signum) if signum else None

        progress = run_steps(run, take_step.begin, batches, reader.image_names, validator, saver, metrics, stop_asked)
        if processes.is_main_process:
            write_results(task, lora.modules, progress)  # while the last state is still on its way to the disk
    return len(lora.modules)


@contextlib.contextmanager
def recorded(task: Task, lora: LoraWeights, take_step: TrainStep, run: Run) -> Iterator[tuple[Tracker, "Saver | NullSaver"]]:
    """Who is told about the steps, and who writes: nobody but in the first process."""
    if not task.processes.is_main_process:
        yield TrackerGroup([]), NullSaver()
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
        latent_scaling=task.base.components["vae"].config["scaling_factor"],
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
        timesteps=task.plan.schedule.timesteps,
        pin=task.precision.device.type == "cuda",
        rank=task.processes.place.index,
        world_size=task.processes.place.count,
    )


def validator_of(task: Task, encoded: EncodedData, take_step: TrainStep) -> Callable[[], float] | None:
    """Measures the held-out loss; None if no image is held out."""
    if not encoded.held_out:
        return None
    own_part = Validator(
        examples=encoded.held_out,
        empty_caption=encoded.empty_caption,
        seed=task.settings.run.train_seed,
        micro_batch=task.settings.run.train_batch_size,
        timesteps=task.plan.schedule.timesteps,
        evaluate=take_step.evaluate,
        rank=task.processes.place.index,
        world_size=task.processes.place.count,
    )
    return lambda: task.processes.total(own_part())


def write_results(task: Task, modules: list[LoraModule], progress: Progress) -> None:
    """Write the LoRA, and the one with the lowest held-out loss beside it; both are read back and proved."""
    run = run_of(task)
    epochs = run.epochs_done(progress.next_step)
    if progress.next_step < len(run.order):
        patience = run.early_stop_patience
        print(f"ended early after {epochs} epochs: {patience} validations in a row did not lower the held-out loss")
    description = description_of(task, epochs)
    if progress.validations:
        write_best(task.results, modules, progress, description)
    write_lora(task.results.lora, modules, description)


def finish(task: Task, modules: int) -> None:
    """When LoRA and states are on the disk: only the state stays from which the run can be lengthened."""
    checkpoint.keep_one(task.results.state, task.plan.common_steps)
    if task.precision.device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")
    path = task.results.lora
    size = path.stat().st_size / 2**20
    print(f"{path}: {size:.1f} MiB, {modules} modules, all known to ComfyUI; copy it to ComfyUI's models/loras")


def write_best(results: Results, modules: list[LoraModule], progress: Progress, last: Description) -> None:
    """Name the LoRA with the lowest smoothed held-out loss among those that were saved, and write it once more."""
    scored = [one for one in smoothed(progress.validations) if results.lora_after(one.epochs).exists() or one.epochs == last.epochs]
    best = min(scored, key=lambda one: one.loss)
    if best.epochs == last.epochs:
        write_lora(results.best, modules, last)
    else:
        with atomic_write(results.best) as beside:
            shutil.copyfile(results.lora_after(best.epochs), beside)
    print(f"the lowest held-out loss (smoothed {best.loss:.4f}) is that after {best.epochs} epochs: {results.best}")


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


class NullSaver:
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
