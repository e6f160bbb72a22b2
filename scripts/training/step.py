"""One training step: nothing outside knows how it is carried out."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from peft.helpers import disable_input_dtype_casting

from training import objective
from training.batches import Batch
from training.device import Precision
from training.schedule import PredictionType

MAX_SKIPPED = 20
"""Steps in a row that fp16 may skip while its loss scale halves from 2^16 to below 1."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, with every "auto" decided."""

    prediction_type: PredictionType
    alphas_cumprod: torch.Tensor
    """[1000], fp32, on the device of the step."""
    min_snr_gamma: float
    """0: off."""
    noise_offset: float
    """0: off."""
    latent_scaling: float
    """The VAE's scaling factor."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports."""

    loss: float
    """Weighted mean over the real samples of the step."""
    gradient_norm: float
    """Of all LoRA weights together, before clipping."""
    diverged: bool
    """Loss or gradient is not finite; the weights are those of the step before."""


class TrainStep:
    """Noise, forward, loss, backward for each micro-batch; then clipping and the optimizer. The loss is fp32.

    The gradients of all LoRA weights lie in one flat fp32 buffer, the loss at its end: `all_reduce` adds it up over the
    processes, in place, before anybody looks at it. None: there is one process.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        optimizer: torch.optim.Optimizer,
        wanted: Objective,
        precision: Precision,
        max_grad_norm: float,
        all_reduce: Callable[[torch.Tensor], None] | None = None,
    ):
        self.unet = unet
        self.optimizer = optimizer
        self.wanted = wanted
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self.all_reduce = all_reduce
        self.sums = flat_gradients([weight for group in optimizer.param_groups for weight in group["params"]])
        self.skipped = 0
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.scales_loss)

    def __call__(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over its micro-batches. A loss or gradient that is not finite leaves the weights as they were."""
        self.sums.zero_()
        gradients, loss_sum = self.sums[:-1], self.sums[-1]
        for batch in batches:
            loss = self.weighted_loss(batch.to(self.precision.device))
            self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        if self.all_reduce:
            self.all_reduce(self.sums)
        self.scaler.unscale_(self.optimizer)
        norm = torch.linalg.vector_norm(gradients)
        if self.max_grad_norm:
            gradients *= (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        loss, gradient_norm = torch.stack([loss_sum, norm]).tolist()
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        self.skipped = 0 if finite else self.skipped + 1
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.scaler.step(self.optimizer)
        self.scaler.update()
        may_skip = self.precision.scales_loss and math.isfinite(loss) and self.skipped <= MAX_SKIPPED
        return StepResult(loss, gradient_norm, diverged=not (finite or may_skip))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """The loss of `batches` as the weights are; nothing of the training changes."""
        return sum(self.weighted_loss(batch.to(self.precision.device)).item() for batch in batches)

    def weighted_loss(self, batch: Batch) -> torch.Tensor:
        """Scalar: the batch's part of the loss of the optimizer step, differentiable in the LoRA weights."""
        wanted = self.wanted
        latents = objective.sampled_latents(batch.mean, batch.log_variance, batch.latent_noise, wanted.latent_scaling)
        noise = objective.offset_noise(batch.noise, batch.offset, wanted.noise_offset)
        alpha_bar = wanted.alphas_cumprod[batch.timesteps]
        prediction = self.predict(objective.noised(latents, noise, alpha_bar), batch)
        answer = objective.target(latents, noise, alpha_bar, wanted.prediction_type)
        losses = objective.loss_per_sample(prediction, answer)
        if wanted.min_snr_gamma:
            losses = losses * objective.min_snr_weight(alpha_bar, wanted.min_snr_gamma, wanted.prediction_type)
        return (losses * batch.weights).sum()

    def predict(self, noisy: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[B, C, h, w] fp32: the UNet's answer, computed in the precision of the run."""
        # PEFT would cast the input of a fp32 LoRA to fp32 before autocast casts it back.
        with self.precision.autocast(), disable_input_dtype_casting(self.unet):
            answer = self.unet(
                noisy.to(self.precision.dtype),
                batch.timesteps,
                encoder_hidden_states=batch.hidden,
                added_cond_kwargs={"text_embeds": batch.pooled, "time_ids": batch.add_time_ids},
                return_dict=False,
            )[0]
        return answer.float()


def flat_gradients(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """[gradients of all `parameters` + 1], zeros: from now on each `grad` is a view into it; the last element is free."""
    flat = torch.zeros(sum(weight.numel() for weight in parameters) + 1, dtype=torch.float32, device=parameters[0].device)
    parts = flat[:-1].split([weight.numel() for weight in parameters])
    for weight, part in zip(parameters, parts, strict=True):
        weight.grad = part.view_as(weight)
    return flat
