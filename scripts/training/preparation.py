"""What training needs before its first step: the device, the encoded data, and the networks with their adapter. Data is encoded
while the networks are loaded, where there is memory for both."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from common.background import in_background
from training.callbacks.samples import texts_of
from training.data.cache import CacheBuilder
from training.data.cache_files import CachedExample
from training.engine import warm_up
from training.job import TrainingJob
from training.method.adapters import Adapter, inject
from training.models.weights import TextEncoders, load_text_encoders, load_unet
from training.system.device import available_bytes, limit_gpu_memory, make_deterministic
from training.system.process_group import ProcessGroup
from training.system.processes import WorkerProcess

Networks = tuple[UNet2DConditionModel, TextEncoders | None, Adapter]
"""The UNet, the text encoders if they are trained, and what is trained in both."""


def prepare_device(job: TrainingJob) -> None:
    """Set what must be set before the device computes or holds anything."""
    if job.settings.run.deterministic:
        make_deterministic()
    if job.budget.thresholds:
        limit_gpu_memory(job.precision.device, available_bytes(job.precision.device) - job.budget.thresholds.stop)


def has_memory_for_everything(job: TrainingJob, besides: int = 0) -> bool:
    """Whether the GPU's memory holds encoders and UNet together, which is so where a step leaves the reserve free, and `besides`
    so many bytes."""
    batch, checkpointing = job.settings.run.train_batch_size, job.settings.model.gradient_checkpointing
    fits = job.budget.needed(batch, checkpointing=False) + besides <= job.budget.free
    return job.precision.device.type != "cpu" and not checkpointing and fits


@contextlib.contextmanager
def networks_in_background(job: TrainingJob) -> Iterator[Callable[[], Networks]]:
    """A function that returns the networks and their adapter. They are loaded while data is encoded if there is memory for both."""
    starts_now = has_memory_for_everything(job)
    device, dtype = job.precision.device, job.precision.dtype

    def load() -> Networks:
        lora = job.settings.lora
        unet = load_unet(job.base, device, dtype, in_int8=job.settings.model.base_quantization == "int8")
        text_encoders = load_text_encoders(job.base, device, dtype) if lora.train_text_encoders else None
        return unet, text_encoders, inject(unet, lora, job.settings.run.train_seed, text_encoders or ())

    with (
        in_background(lambda: warm_up(job.engine, device, dtype), start=starts_now) as warmed_up,
        in_background(load, start=starts_now) as loaded,
    ):

        def wait() -> Networks:
            warmed_up.result()
            return loaded.result()

        yield wait


def encode(
    job: TrainingJob, group: ProcessGroup, encoder: WorkerProcess | None = None
) -> tuple[list[CachedExample], dict[str, Path]]:
    """Compute once what does not change during training, of all images of the plan and of the prompts of sample images.

    It is done in the process `encoder`, if there is one and memory for the UNet beside it, so that encoding and loading do not
    wait for each other's interpreter lock.
    """
    concurrent = has_memory_for_everything(job)
    if encoder and concurrent:
        return encoder.call_and_close(_encode_in_worker, job)
    if encoder:
        encoder.end()
    precision = job.precision
    folders = job.project.models_dir, job.outputs.cache
    how = precision.device, precision.dtype, group, concurrent, job.settings.lora.train_text_encoders
    builder = CacheBuilder(job.base, *folders, *how)
    images = zip(job.plan.all_examples, job.plan.all_placements, strict=True)
    prompts = texts_of(job.samples) if job.samples else []
    subject_class = job.settings.samples.subject_class if job.settings.objective.prior_preservation else ""
    return builder.build(list(images), job.settings.data, job.settings.run.train_seed, prompts, subject_class)


def _encode_in_worker(job: TrainingJob) -> tuple[list[CachedExample], dict[str, Path]]:
    prepare_device(job)
    return encode(job, ProcessGroup())
