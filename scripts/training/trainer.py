"""Train a resolved job: encode the data, build the parts, take the remaining steps, write the LoRA."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from common.background import prefetch
from common.dataset_layout import DatasetFolder
from common.errors import Interruption, ResourceError, StopRequest, interruption_for
from common.files import write_bytes
from common.settings import resolved_toml
from training.callbacks.checkpoint import CheckpointWriter, keep_one, remove_incomplete, restore
from training.callbacks.history import recorded_history
from training.callbacks.image_losses import ImageLosses
from training.callbacks.metrics import open_metrics
from training.callbacks.renderer import Renderer
from training.callbacks.report_page import report_page
from training.callbacks.sample_likeness import SampleLikeness
from training.callbacks.sample_record import SampleRecord
from training.callbacks.samples import SampleImages
from training.callbacks.validation import Validator
from training.data.batches import BatchReader
from training.engine import prepare_unet, recompute_text_encoders
from training.engine.step import TrainStep
from training.first_step import checking_first_step
from training.initial_lora import load_initial
from training.job import TrainingJob
from training.loop import Callback, Progress, RunSchedule, run_steps
from training.measurement import predicts_as_planned
from training.memory_budget import suggest_settings, usable_bytes
from training.method.adapters import Adapter
from training.method.diffusion import LossConfig, alphas_cumprod, timestep_quantiles
from training.method.lora_l2 import l2_of_changes
from training.method.optimizer_wrappers import make_optimizer
from training.method.optimizers import learning_rate_at
from training.models.weights import TextEncoders, load_vae
from training.plan import short_hash
from training.preparation import encode, networks_in_background, prepare_device
from training.rehearsal import rehearsing
from training.results import LoraSaver, report_results, write_results
from training.system.device import MemoryGuard, memory_guard, release_memory
from training.system.process_group import ProcessGroup
from training.system.processes import WorkerProcess


def train(
    job: TrainingJob, group: ProcessGroup, encoder: WorkerProcess | None = None, rehearser: WorkerProcess | None = None
) -> bool:
    """Take every step that is left of `job`, and write the LoRA. `encoder` is a process that may encode the data, and `rehearser`
    one that may compile kernels meanwhile; both have ended before the first step.

    Returns False before the first step if the base model turns out to predict something else than the job assumes: it has to be
    resolved again.
    """
    if group.is_main_process:
        prepare_outputs(job)
    prepare_device(job)
    history = recorded(job, group) if group.is_main_process else contextlib.nullcontext()
    is_fresh = job.settings.saving.fresh
    with history, resumed_without_fresh(is_fresh), translate_cuda_oom(job), memory_guard(job.budget.thresholds) as guard:
        with rehearsing(job, rehearser):
            with networks_in_background(job) as load:
                examples, prompts = encode(job, group, encoder)
                unet, text_encoders, adapter = load()
            if not predicts_as_planned(job, group, unet, text_encoders, examples):
                return False
            if job.initial_layers:
                begin_from_file(job, group, adapter)
            step, schedule = build_step(job, group, unet, text_encoders, adapter), schedule_of(job)
        if job.saved:
            restore(job.saved, group, adapter.weights, step.optimizer, step.scaler)
        count, held_out_count = len(job.plan.examples), len(job.plan.held_out)
        reader = BatchReader(
            examples=examples[:count],
            seed=job.settings.run.train_seed,
            caption_dropout=job.settings.data.caption_dropout,
            micro_batch=job.settings.run.train_batch_size,
            global_batch=job.plan.global_batch,
            timesteps=job.plan.schedule.timesteps,
            pin=job.precision.device.type == "cuda",
            timestep_at=timestep_quantiles(job.settings.objective, job.plan.schedule.timesteps),
            prior_preservation=job.settings.objective.prior_preservation,
            masks=any(example.mask for example in examples),
            group=group,
            regularization=examples[count + held_out_count :],
            prior_weight=job.plan.prior_weight,
        )
        held_out = replace(
            reader,
            examples=examples[count : count + held_out_count],
            caption_dropout=0.0,
            prior_preservation=0.0,
            pin=False,
        )
        batches = prefetch(reader, schedule.remaining, job.settings.data.dataloader_num_workers)
        modules, remaining = adapter.modules, len(schedule.remaining)
        print(f"{len(modules)} modules of {job.settings.lora.describe()}; {remaining} steps to go", flush=True)
        with (
            writing_callbacks(job, adapter, step, schedule, reader, is_writer=group.is_main_process) as writers,
            likeness_of_samples(job) as likeness,
        ):
            callbacks = list(writers)
            if held_out.examples:
                callbacks.insert(0, Validator(held_out, step.evaluate, schedule.validates_between, writers))
            stop = stop_request(group, guard)
            samples = None
            if job.samples and job.samples.prompts:
                samples = sample_images(job, group, step, schedule, prompts, likeness, stop, writers)
                with step.averaged():
                    samples.start(schedule.start)
                if reason := stop():  # before a step changes the weights of a row that is incomplete
                    raise reason
                callbacks.append(samples)
            begin = step.begin if job.saved or job.initial_layers else checking_first_step(job, step.begin)
            progress = run_steps(schedule, begin, batches, reader.image_names, callbacks, stop, step.averaged)
            if group.is_main_process:  # while the last checkpoint is still on its way to the disk
                with step.averaged():
                    write_results(job, modules, schedule, progress, samples)
    if group.is_main_process:
        keep_one(job.outputs.state, job.plan.shared_prefix_steps)
        report_results(job, len(modules))
    return True


@contextlib.contextmanager
def resumed_without_fresh(is_fresh: bool) -> Iterator[None]:
    """With FRESH=1, the same command would begin again: what ends the block says which one resumes."""
    try:
        yield
    except (Interruption, ResourceError) as end:
        if is_fresh:
            end.args = (str(end).replace("the same command again", "the same command again (without FRESH=1)"),)
        raise


def begin_from_file(job: TrainingJob, group: ProcessGroup, adapter: Adapter) -> None:
    """Give the fresh `adapter` the weights of the file INIT_LORA, which the main process reads."""
    group.broadcast_object(lambda: load_initial(adapter, job.initial_layers))
    group.broadcast([adapter.weights.detach()])
    if group.is_main_process:
        print(f"beginning with {len(job.initial_layers)} layers of {job.settings.lora.init_lora}", flush=True)


def prepare_outputs(job: TrainingJob) -> None:
    """Archive what earlier runs left, unless this one continues them, and write the resolved settings."""
    outputs = job.outputs
    if job.saved is None:
        if job.follows_finished:
            shutil.rmtree(outputs.state)
        remove_incomplete(outputs.state)
    outputs.begin(resumes=job.saved is not None)
    clean_up(job)
    config = resolved_toml({"project": job.project, "train": job.settings}, job.origins)
    write_bytes(outputs.resolved_config, config.encode("utf-8"))


def clean_up(job: TrainingJob) -> None:
    """Remove the partial files of runs that were killed while they wrote; this process is the only one that writes there."""
    job.outputs.remove_leftovers()
    if job.is_finished:
        keep_one(job.outputs.state, job.plan.shared_prefix_steps)


def recorded(job: TrainingJob, group: ProcessGroup) -> contextlib.AbstractContextManager[None]:
    """Records this process in the history of the run."""
    fingerprint = job.identity.fingerprint
    about = {
        "step": job.saved.progress.next_step if job.saved else 0,
        "steps": len(job.plan.order),
        "base": job.base.name,
        "base_hash": fingerprint["base model"],
        "dataset_hash": fingerprint["data set"],
        "fingerprint": short_hash(fingerprint),
    }
    return recorded_history(job.outputs.history, job.precision, group.world_size, about)


@contextlib.contextmanager
def translate_cuda_oom(job: TrainingJob) -> Iterator[None]:
    """Raise CUDA's out-of-memory error as a ResourceError with the settings that would fit."""
    try:
        yield
    except torch.OutOfMemoryError:
        device = job.precision.device
        reserved = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        remedy = suggest_settings(job.settings, job.budget, usable_bytes(device) + reserved)
        raise ResourceError(
            f"the GPU's memory is full at batch size {job.settings.run.train_batch_size}: {remedy}, and run again"
        ) from None


def build_step(
    job: TrainingJob, group: ProcessGroup, unet: UNet2DConditionModel, text_encoders: TextEncoders | None, adapter: Adapter
) -> TrainStep:
    """The training step of the job's engine, with its optimizer and loss."""
    settings = job.settings
    optimizer = make_optimizer(adapter, settings.optimizer)
    config = LossConfig(
        prediction_type=job.plan.schedule.prediction_type,
        alphas_cumprod=alphas_cumprod(job.plan.schedule).to(job.precision.device, torch.float32),
        min_snr_gamma=job.plan.min_snr_gamma,
        noise_offset=job.plan.noise_offset,
        latent_scaling=job.base.components["vae"].config["scaling_factor"],
        loss=settings.objective.loss,
        weighting=settings.objective.loss_weighting,
    )
    checkpointing = settings.model.gradient_checkpointing
    sync = prepare_unet(job.engine, unet, adapter, job.precision.device, gradient_checkpointing=checkpointing)
    if text_encoders and checkpointing:
        recompute_text_encoders(text_encoders, adapter)
    norm = settings.optimizer.max_grad_norm
    pull = l2_of_changes(adapter, settings.objective.lora_l2) if settings.objective.lora_l2 else None
    how = {"text_encoders": text_encoders, "add_gradient": pull, "sync_compute_weights": sync}
    return TrainStep(unet, adapter, optimizer, config, job.precision, norm, group.all_reduce, **how)


def schedule_of(job: TrainingJob) -> RunSchedule:
    """The steps that are left, and when to write what."""
    settings, plan = job.settings, job.plan
    rates = settings.optimizer
    of_text = {"text_encoder_lr": rates.text_encoder_lr / rates.learning_rate} if settings.lora.train_text_encoders else {}
    return RunSchedule(
        order=plan.order,
        start=job.saved.progress if job.saved else Progress(),
        epochs=plan.epochs,
        shared_prefix_steps=plan.shared_prefix_steps,
        saving=settings.saving,
        validation=settings.validation,
        learning_rate_at=partial(
            learning_rate_at,
            total_steps=len(plan.order),
            peak=settings.optimizer.learning_rate,
            scheduler=settings.optimizer.lr_scheduler,
            warmup_steps=plan.warmup_steps,
            cycles=settings.optimizer.lr_cycles,
            power=settings.optimizer.lr_power,
            decay=settings.optimizer.lr_decay,
        ),
        other_rates=of_text,
    )


def stop_request(group: ProcessGroup, guard: MemoryGuard | None) -> Callable[[], Interruption | None]:
    """A function that returns why the run has to stop, if any process was asked to. It also empties caches for the guard."""
    request = StopRequest()

    def reason() -> Interruption | None:
        if guard and guard.cache_clear_requested:
            guard.cache_clear_requested = False
            release_memory()
        signum = group.all_reduce_max(request.signum)
        return interruption_for(signum) if signum else None

    return reason


@contextlib.contextmanager
def writing_callbacks(
    job: TrainingJob, adapter: Adapter, step: TrainStep, schedule: RunSchedule, reader: BatchReader, *, is_writer: bool
) -> Iterator[list[Callback]]:
    """What records the steps and saves LoRAs and checkpoints. Only one process writes; in the others there is none of it."""
    if not is_writer:
        yield []
        return
    outputs, settings = job.outputs, job.settings
    files, names = (outputs.sample_losses, outputs.image_losses), [example.name for example in reader.examples]
    state = adapter.weights, step.optimizer, step.scaler
    with (
        open_metrics(settings.logging, outputs.name, outputs.metrics, outputs.logs, schedule.start.next_step) as metrics,
        ImageLosses(*files, names, reader.indices, schedule.saves_lora_between, schedule.start.next_step) as losses,
        CheckpointWriter(outputs.state, job.identity, settings.saving.keep_last_states, *state) as checkpoints,
        report_page(job.project, settings.data, schedule.saves_lora_between) as page,
    ):
        yield [metrics, losses, LoraSaver(job, adapter.modules, schedule), checkpoints, page]


def likeness_of_samples(job: TrainingJob) -> SampleLikeness:
    """What measures how much sample images look like the data set."""
    examples = [*job.plan.examples, *job.plan.held_out]
    project = job.project
    cached = DatasetFolder(project.dataset_dir).faces
    return SampleLikeness(project.face_model, project.models_dir, examples, cached, job.outputs.sample_faces)


def sample_images(
    job: TrainingJob,
    group: ProcessGroup,
    step: TrainStep,
    schedule: RunSchedule,
    prompts: dict[str, Path],
    likeness: SampleLikeness,
    stop: Callable[[], Interruption | None],
    trackers: Sequence[Callback],
) -> SampleImages:
    """The callback that renders the sample images; `prompts` are the files of their embeddings."""
    vae = load_vae(job.base, torch.device("cpu"))
    renderer = Renderer(step, job.plan.schedule, prompts, vae, tiled=job.samples.tiled, in_turn=job.samples.in_turn)
    names = job.base.name, job.plan.triggers
    record = SampleRecord(job.samples, job.outputs, job.identity.fingerprint, *names, likeness)
    return SampleImages(job.samples, renderer, job.outputs, schedule, record, likeness, group, stop, trackers)
