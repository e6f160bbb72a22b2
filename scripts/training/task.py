"""A training run from settings to file: what `train_lora.py` calls, in the order in which it calls it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from dataset_folder import DatasetFolder, write_text
from errors import ResourceError, SettingsError, StopRequest
from prefetch import prefetched
from settings import ProjectSettings, resolved_toml
from training import checkpoint
from training.base_model import find_base
from training.batches import BatchReader
from training.cache import Cache
from training.config import TrainSettings
from training.dataset import Example, flagged_pictures, read_examples, unused_entries
from training.device import Precision, choose_precision, describe, wants_checkpointing
from training.encode import EncodedData, Encoding, base_digest, encode_data
from training.export import Description, write_lora
from training.fast_unet import checkpoint_everything, fast_ops, quicken
from training.loop import Run, run_steps
from training.lora import LoraModule, LoraWeights, inject
from training.metrics import open_metrics
from training.models import load_unet
from training.optimizer import build_optimizer, learning_rate_at
from training.parts import BaseModel
from training.plan import Plan, fingerprint, fingerprint_hash, make_plan
from training.results import Results, require_room
from training.schedule import alphas_cumprod
from training.step import Objective, TrainStep


@dataclass(frozen=True)
class Task:
    """What was asked for, and what was found and decided before anything heavy is loaded."""

    project: ProjectSettings
    settings: TrainSettings
    """With every "auto" decided."""
    base: BaseModel
    plan: Plan
    precision: Precision
    results: Results
    cache: Cache
    fingerprint: dict[str, Any]


def decide(project: ProjectSettings, settings: TrainSettings) -> Task:
    """Read and verify everything, replace every "auto" by what it means here, and say what the run will do."""
    base = find_base(settings.model.base_model, project.models_dir)
    examples = read_pictures(project, settings)
    plan = make_plan(
        examples, settings, base.schedule.with_settings(settings.model.prediction_type, settings.model.zero_terminal_snr)
    )
    precision = choose_precision(settings.model.mixed_precision)
    results = Results(project.output_dir, settings.saving.output_name or project.trigger_word)
    require_room(project.output_dir)
    settings = resolved(settings, plan, precision, results.name)
    cache = Cache(results.cache)
    digests = [base_digest(base, cache, part) for part in base.parts]
    print(plan.announcement(), flush=True)
    values = fingerprint(plan, settings, project.trigger_word, digests)
    return Task(project, settings, base, plan, precision, results, cache, values)


def read_pictures(project: ProjectSettings, settings: TrainSettings) -> list[Example]:
    """The examples of the data set; what lies among them and is none is named."""
    dataset = DatasetFolder(project.dataset_dir)
    folder = dataset.images
    flagged = flagged_pictures(dataset) if settings.data.skip_flagged else {}
    if flagged:
        print(f"left out, because flagged: {', '.join(f'{name} ({flaws})' for name, flaws in flagged.items())}")
    examples = read_examples(folder, settings.data.dataloader_num_workers, flagged)
    unused = unused_entries(folder)
    if unused:
        print(f"not used, because neither picture, caption of one, nor N_name folder: {', '.join(unused)}")
    return examples


def resolved(settings: TrainSettings, plan: Plan, precision: Precision, name: str) -> TrainSettings:
    """The settings with every "auto" decided, as training_config_resolved.toml shows them."""
    pixels = max(placement.bucket.width * placement.bucket.height for placement in plan.placements)
    batch_pixels = pixels * settings.run.train_batch_size
    checkpointing = wants_checkpointing(settings.model.gradient_checkpointing, batch_pixels, precision)
    model = replace(
        settings.model,
        prediction_type=plan.schedule.prediction_type,
        zero_terminal_snr=plan.schedule.zero_terminal_snr,
        mixed_precision=precision.name,
        gradient_checkpointing=checkpointing,
    )
    if precision.name != settings.model.mixed_precision:
        print(f"no NVIDIA GPU: mixed_precision {settings.model.mixed_precision} becomes {precision.name}")
    print(f"training on {describe(precision)}, gradient checkpointing {'on' if checkpointing else 'off'}", flush=True)
    objective = replace(settings.objective, min_snr_gamma=plan.min_snr_gamma, noise_offset=plan.noise_offset)
    saving = replace(settings.saving, output_name=name)
    for complaint in saving.contradictions():
        raise SettingsError(f"{complaint}; set OUTPUT_NAME")
    return replace(settings, model=model, objective=objective, saving=saving)


def saved_state(task: Task) -> checkpoint.Saved | None:
    """The unfinished run of this name, if there is one; raises SettingsError if it is another run than this."""
    folder = task.results.state
    saved = None if task.settings.saving.fresh else checkpoint.newest(folder)
    if saved is not None:
        checkpoint.refuse_changes(saved, task.fingerprint, folder)
        print(f"continuing at step {saved.next_step} of {len(task.plan.order)}", flush=True)
    return saved


def is_finished(task: Task) -> bool:
    """Whether the LoRA of exactly this run is there already, and nobody asks for a fresh one."""
    return not task.settings.saving.fresh and task.results.is_finished(fingerprint_hash(task.fingerprint))


def make_room(task: Task, saved: checkpoint.Saved | None) -> None:
    """Lay aside what earlier runs left, unless this one continues, and write down the settings in force."""
    if saved is None:
        checkpoint.lay_aside(task.results.state)
        task.results.make_room()
    write_text(task.results.resolved, resolved_toml({"project": task.project, "train": task.settings}))


def encode(task: Task) -> EncodedData:
    """Everything that does not change during training, computed once."""
    encoding = Encoding(task.base, task.project.models_dir, task.cache, task.precision.device, task.precision.dtype)
    return encode_data(encoding, task.plan, task.settings.data, task.project.trigger_word, task.settings.run.train_seed)


def train(task: Task, encoded: EncodedData, saved: checkpoint.Saved | None) -> list[LoraModule]:
    """Load the UNet, put the LoRA into it, and take every step that is left."""
    settings, plan, results, precision = task.settings, task.plan, task.results, task.precision
    unet = load_unet(task.base, precision.device, precision.dtype)
    lora = inject(unet, settings.lora, settings.run.train_seed)
    quicken(unet, lora.stacks, fast_ops(precision.device))
    if settings.model.gradient_checkpointing:
        checkpoint_everything(unet)
    optimizer = build_optimizer(lora.weights, settings.optimizer)
    take_step = TrainStep(unet, lora, optimizer, objective_of(task), precision, settings.optimizer.max_grad_norm)
    if saved:
        checkpoint.restore(saved, lora.weights, optimizer, take_step.scaler)
    run, reader = run_of(task, saved), reader_of(task, encoded)
    batches = prefetched(reader, plan.order[run.first_step :], settings.data.dataloader_num_workers)
    stop, saver = StopRequest(), Saver(task, lora, take_step)
    print(
        f"{len(lora.modules)} modules of rank {settings.lora.lora_rank}; {len(plan.order) - run.first_step} steps to go", flush=True
    )
    with open_metrics(settings.logging, results.name, results.metrics, results.logs, run.first_step) as metrics:
        run_steps(run, take_step, batches, reader.names, saver, metrics, stop)
    return lora.modules


def objective_of(task: Task) -> Objective:
    return Objective(
        prediction_type=task.plan.schedule.prediction_type,
        alphas_cumprod=alphas_cumprod(task.plan.schedule).to(task.precision.device, torch.float32),
        min_snr_gamma=task.plan.min_snr_gamma,
        noise_offset=task.plan.noise_offset,
        latent_scaling=task.base.parts["vae"].config["scaling_factor"],
    )


def run_of(task: Task, saved: checkpoint.Saved | None) -> Run:
    """The steps that are left, and when to write what."""
    optimizer, saving, steps = task.settings.optimizer, task.settings.saving, len(task.plan.order)
    return Run(
        order=task.plan.order,
        first_step=saved.next_step if saved else 0,
        loss_average=saved.loss_average if saved else None,
        epochs=task.plan.epochs,
        save_every_epochs=saving.save_every_epochs,
        save_state_every_s=saving.save_state_every_minutes * 60,
        learning_rate_at=lambda step: learning_rate_at(
            step, steps, optimizer.learning_rate, optimizer.lr_scheduler, optimizer.lr_warmup
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
    )


@dataclass(frozen=True)
class Saver:
    """Writes what the loop asks for."""

    task: Task
    weights: LoraWeights
    step: TrainStep

    def state(self, next_step: int, loss_average: float) -> None:
        """Everything needed to continue at `next_step`."""
        folder, values = self.task.results.state, self.task.fingerprint
        checkpoint.save(folder, self.weights.weights, self.step.optimizer, self.step.scaler, next_step, loss_average, values)

    def lora(self, epochs: int) -> None:
        """The LoRA as it is after `epochs` epochs."""
        write_lora(self.task.results.lora_after(epochs), self.weights.modules, description_of(self.task, epochs))


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
        fingerprint=fingerprint_hash(task.fingerprint),
    )


def finish(task: Task, modules: list[LoraModule]) -> None:
    """Write the LoRA; when it is there, read back and proved, the saved state has done its duty."""
    path = task.results.lora
    write_lora(path, modules, description_of(task, task.plan.epochs))
    checkpoint.remove(task.results.state)
    if task.precision.device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")
    size = path.stat().st_size / 2**20
    print(f"{path}: {size:.1f} MiB, {len(modules)} modules, all known to ComfyUI; copy it to ComfyUI's models/loras")


@contextlib.contextmanager
def memory_in_our_words(task: Task) -> Iterator[None]:
    """CUDA's out-of-memory as a ResourceError that says what to set."""
    try:
        yield
    except torch.OutOfMemoryError:
        batch = task.settings.run.train_batch_size
        if not task.settings.model.gradient_checkpointing:
            remedy = "set GRADIENT_CHECKPOINTING=true"
        elif batch > 1:
            remedy = f"set TRAIN_BATCH_SIZE={batch // 2}, and GRADIENT_ACCUMULATION_STEPS to make up for it"
        else:
            remedy = "close other programs on the GPU, or lower RESOLUTION or LORA_RANK"
        raise ResourceError(f"the GPU's memory is full at batch size {batch}: {remedy}, and run again") from None
