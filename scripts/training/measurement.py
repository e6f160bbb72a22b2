"""What a base model predicts is measured once, with the first images of the data set, where nothing in its files says so."""

from collections.abc import Sequence

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from training.data.cache import CachedExample, read_embedding, read_latents
from training.job import TrainingJob
from training.method.prediction_type import measure_prediction_type, measure_zero_terminal_snr
from training.models.base_model import base_digest, refuse_flow, remember_prediction
from training.system.process_group import ProcessGroup

_IMAGES = 3
"""A measurement takes 8 forward passes of each, and 2 more for a model that predicts v."""


def predicts_as_planned(
    job: TrainingJob, group: ProcessGroup, unet: UNet2DConditionModel, examples: Sequence[CachedExample]
) -> bool:
    """Whether the base model predicts what `job` assumes. What is measured is remembered: a job that is resolved again has the
    right plan. Raises ModelError for a rectified flow. The adapter in `unet` must not be trained yet."""
    if not job.assumes_prediction:
        return True
    return group.broadcast_object(lambda: _measure(job, unet, examples[:_IMAGES]))


def _measure(job: TrainingJob, unet: UNet2DConditionModel, examples: Sequence[CachedExample]) -> bool:
    device, dtype = job.precision.device, job.precision.dtype
    latents = [job.base.components["vae"].config["scaling_factor"] * read_latents(example.latents)[0] for example in examples]

    @torch.no_grad()
    def network(number: int, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        hidden, pooled = read_embedding(examples[number].embeddings, 0)
        time_ids = torch.tensor([examples[number].placement.add_time_ids], dtype=torch.float32)
        return (
            unet(
                noisy.to(device, dtype),
                timesteps.to(device),
                encoder_hidden_states=hidden[None].to(device),
                added_cond_kwargs={"text_embeds": pooled[None].to(device), "time_ids": time_ids.to(device)},
                return_dict=False,
            )[0]
            .float()
            .cpu()
        )

    kind = measure_prediction_type(network, latents, job.base.schedule)
    zero = kind == "v_prediction" and measure_zero_terminal_snr(network, latents, job.base.schedule)
    cache, images = job.outputs.cache, f"{len(latents)} image{'s' if len(latents) > 1 else ''}"
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
