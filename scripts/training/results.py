"""What a run leaves: LoRA files on its way and at its end, the recommended one, and a workflow for ComfyUI with it."""

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import ModelError
from common.files import atomic_write, write_json
from common.weights import copy_with_metadata, read_header
from training.callbacks.recommendation import Recommendation, choose
from training.callbacks.sample_plan import largest_size
from training.callbacks.samples import SampleImages, saves_of
from training.data.buckets import OptimizerStep
from training.job import TrainingJob
from training.loop import BROKEN, Callback, Progress, RunSchedule, smoothed
from training.lora_metadata import lora_metadata, thumbnail
from training.method.adapters import LoraModule
from training.method.comfyui_workflow import comfyui_workflow
from training.method.export import write_lora
from training.models.family import family_of


@dataclass(frozen=True)
class LoraSaver(Callback):
    """Writes the LoRA files of a run on its way."""

    job: TrainingJob
    modules: list[LoraModule]
    schedule: RunSchedule

    def after_epoch(self, step: OptimizerStep, epochs: int, progress: Progress) -> tuple[Progress, str]:
        if self.schedule.saves_lora_between(step.epoch, epochs):
            save_lora(self.job, self.modules, self.job.outputs.lora_after(epochs), epochs)
        return progress, ""


def save_lora(job: TrainingJob, modules: list[LoraModule], path: Path, epochs: int, **more_metadata: str) -> None:
    """Write the LoRA as it is after `epochs` epochs."""
    write_lora(path, modules, lora_metadata(job, epochs) | more_metadata)


def write_results(
    job: TrainingJob, modules: list[LoraModule], schedule: RunSchedule, progress: Progress, samples: SampleImages | None
) -> None:
    """Write the LoRA, and before it the one with the lowest validation loss, the recommended one, and a workflow with that. LoRA
    files are read back and verified."""
    outputs, epochs = job.outputs, schedule.epochs_complete(progress.next_step)
    if progress.next_step < len(schedule.order):
        patience = schedule.validation.early_stop_patience
        print(
            f"stopping early after {epochs} epochs: {patience} validation losses in a row are more than {BROKEN:g} times the lowest"
        )
    if progress.validations:
        write_best(job, modules, progress, epochs)
    recommended = samples.recommendation if samples else None
    if recommended is None:
        no_likeness = "there are no sample images of all LoRAs" if job.settings.samples.samples else "SAMPLES=false"
        save, reason = choose(saves_of(outputs, modules, epochs), no_likeness, smoothed(progress.validations))
        recommended = Recommendation(save.file, save.epochs, 1.0, reason)
        if samples:
            samples.record.write(recommended)
    shown = recommended.metadata | thumbnail(samples and samples.record.example(recommended.epochs))
    if recommended.epochs == epochs:
        save_lora(job, modules, outputs.recommended, epochs, **shown)
    else:
        copy_with_metadata(outputs.lora_after(recommended.epochs), outputs.recommended, shown)
    write_json(outputs.workflow, workflow_of(job, recommended.strength))
    print(f"recommended: {recommended.file} at strength {recommended.strength:g}. {recommended.reason}")
    save_lora(job, modules, outputs.lora, epochs, **thumbnail(samples and samples.record.example(epochs)))


def workflow_of(job: TrainingJob, strength: float) -> dict[str, dict]:
    """A workflow for ComfyUI with the recommended LoRA."""
    samples, trigger = job.settings.samples, job.plan.triggers[0]
    how = largest_size(job.settings.data.resolutions[0]), samples.sample_guidance, samples.sample_seed
    names = job.outputs.recommended.name, strength, job.base.name, job.plan.schedule
    prompt = ", ".join(filter(None, [family_of(job.base).quality_tags, trigger]))
    return comfyui_workflow(*names, prompt, job.outputs.name, *how)


def write_best(job: TrainingJob, modules: list[LoraModule], progress: Progress, last: int) -> None:
    """Report the LoRA with the lowest smoothed validation loss among those that were saved, and write it once more. `last` is
    the number of epochs of the one that is in memory."""
    outputs, losses = job.outputs, smoothed(progress.validations)
    best = min((epochs for epochs in losses if epochs == last or outputs.lora_after(epochs).exists()), key=losses.get)
    if best == last:
        save_lora(job, modules, outputs.best, last)
    else:
        with atomic_write(outputs.best) as temporary:
            shutil.copyfile(outputs.lora_after(best), temporary)
    print(f"best validation loss {losses[best]:.4f} (smoothed) at epoch {best}: {outputs.best}")


def report_results(job: TrainingJob, modules: int) -> None:
    if job.precision.device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")
    path = job.outputs.lora
    size = path.stat().st_size / 2**20
    print(f"{path}: {size:.1f} MiB, {modules} modules, all known to ComfyUI")
    print_next_steps(job)


def print_next_steps(job: TrainingJob) -> None:
    """What to do with the LoRA, and last what keeps it from being good."""
    outputs, triggers = job.outputs, " or ".join(map(repr, job.plan.triggers))
    load = f"load {outputs.lora.name} in ComfyUI beside an SDXL checkpoint, with {triggers} in the prompt"
    with contextlib.suppress(ModelError, OSError, KeyError):  # earlier versions recommended none
        strength = read_header(outputs.recommended).metadata["loracat_recommended_strength"]
        load = (
            f"copy {outputs.recommended} to ComfyUI's models/loras and drag {outputs.workflow.name} into its window, or load it "
            f"beside an SDXL checkpoint at strength {strength}, with {triggers} in the prompt"
        )
    print(f"next: {load}; the whole run is on one page, {outputs.report}")
    for warning in job.plan.warnings():
        print(warning)
