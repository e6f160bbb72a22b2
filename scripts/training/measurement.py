"""What a base model predicts is measured once, with the first images of the data set, where nothing in its files says so."""

from collections.abc import Sequence

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from training.data.buckets import Bucket
from training.data.cache_files import CachedExample, read_latents, read_text
from training.data.captions import conditioning
from training.job import TrainingJob
from training.method.prediction_type import measure_prediction_type, measure_zero_terminal_snr
from training.models.base_model import base_digest, refuse_flow, remember_prediction
from training.models.weights import TextEncoders
from training.system.device import release_memory
from training.system.process_group import ProcessGroup

_IMAGES = 3
"""A measurement takes 10 forward passes of all, and 2 more for a model that predicts v."""


def predicts_as_planned(
    job: TrainingJob,
    group: ProcessGroup,
    unet: UNet2DConditionModel,
    text_encoders: TextEncoders | None,
    examples: Sequence[CachedExample],
) -> bool:
    """Whether the base model predicts what `job` assumes. What is measured is remembered: a job that is resolved again has the
    right plan. Raises ModelError for a rectified flow. The adapter in the networks must not be trained yet."""
    if not job.assumes_prediction:
        return True
    return group.broadcast_object(lambda: _measure(job, unet, text_encoders, examples[:_IMAGES]))


def _measure(
    job: TrainingJob, unet: UNet2DConditionModel, text_encoders: TextEncoders | None, examples: Sequence[CachedExample]
) -> bool:
    device, dtype = job.precision.device, job.precision.dtype
    batches = _batches(examples, job.settings.run.train_batch_size)
    scaling = job.base.components["vae"].config["scaling_factor"]
    latents = [scaling * torch.stack([read_latents(example.latents)[0] for example in batch]) for batch in batches]

    @torch.no_grad()
    def network(number: int, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        batch = batches[number]
        texts = zip(*(read_text(example.text, 0).values() for example in batch), strict=True)
        hidden, pooled = conditioning(text_encoders, *(torch.stack(parts).to(device) for parts in texts))
        time_ids = torch.tensor([example.placement.add_time_ids for example in batch], dtype=torch.float32)
        conditions = {"text_embeds": pooled, "time_ids": time_ids.to(device)}
        return unet(noisy.to(device, dtype), timesteps.to(device), hidden, added_cond_kwargs=conditions)[0].float().cpu()

    kind = measure_prediction_type(network, latents, job.base.schedule)
    zero = kind == "v_prediction" and measure_zero_terminal_snr(network, latents, job.base.schedule)
    release_memory()  # a training step has tensors of other sizes
    cache, images = job.outputs.cache, f"{len(examples)} image{'s' if len(examples) > 1 else ''}"
    remember_prediction(cache, base_digest(job.base, cache, "unet"), kind, zero_terminal_snr=zero)
    refuse_flow(job.base, kind)
    if kind == "unclear":
        print(
            f"prediction type: epsilon, assumed (measured with {images}, unclear); set PREDICTION_TYPE if it is another", flush=True
        )
    else:
        snr = ", zero terminal SNR" if zero else ""
        again = "; the base model's files do not say so, and the run is planned again" if kind == "v_prediction" else ""
        print(f"prediction type: {kind}{snr} (measured with {images}){again}", flush=True)
    return kind != "v_prediction"


def _batches(examples: Sequence[CachedExample], size: int) -> list[Sequence[CachedExample]]:
    """The examples in batches of one shape and at most `size`."""
    by_shape: dict[Bucket, list[CachedExample]] = {}
    for example in examples:
        by_shape.setdefault(example.placement.bucket, []).append(example)
    return [group[start : start + size] for group in by_shape.values() for start in range(0, len(group), size)]
