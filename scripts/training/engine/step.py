"""One training step: nothing outside knows how it is carried out.

On a GPU the first step of each shape runs eagerly; the second is captured as a CUDA graph, which later steps replay with
one launch. All three run the same kernels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from training.data.batches import Batch
from training.engine.cuda_graphs import CudaGraphRunner
from training.method import diffusion as objective
from training.method.adapters import LoraWeights
from training.method.optimizers import AdamW
from training.models.loading import UNet2DConditionModel
from training.models.sdxl import PredictionType
from training.system.device import Precision

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
    diverged: bool = False
    """Loss or gradient is not finite; the weights are those of the step before, and no later step moves them."""
    skipped: bool = False
    """They are not finite because the scale of fp16's loss was too large; no weight was moved, and the scale is lower now."""


class TrainStep:
    """Noise, forward, loss, backward for each micro-batch; then clipping and the optimizer. The loss is fp32.

    `all_reduce` adds the gradients and the loss, one flat buffer, up over the processes, in place, before anybody looks
    at them. None: there is one process.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        weights: LoraWeights,
        optimizer: AdamW,
        wanted: Objective,
        precision: Precision,
        max_grad_norm: float,
        all_reduce: Callable[[torch.Tensor], None] | None = None,
        *,
        captures: bool = True,
    ):
        self.unet = unet
        self.weights = weights
        self.optimizer = optimizer
        self.wanted = wanted
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self.all_reduce = all_reduce
        self.skipped = 0
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.scales_loss)
        self.learning_rate = torch.zeros((), device=precision.device)
        self.halted = torch.zeros((), device=precision.device)
        """1 from the first loss or gradient on that is not finite."""
        can_capture = captures and precision.device.type == "cuda" and not precision.scales_loss
        self.capturer = CudaGraphRunner(self._step, precision.device) if can_capture else None

    def __call__(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over its micro-batches, to its end."""
        return self.begin(batches, learning_rate)()

    def begin(self, batches: Sequence[Batch], learning_rate: float) -> Callable[[], StepResult]:
        """Begin one optimizer step over its micro-batches; the call of what is returned waits for its end.

        A loss or gradient that is not finite leaves the weights as they were, and so do all steps after it.
        """
        self.learning_rate.fill_(learning_rate)
        run = self.capturer or self._eager
        return self._reader(run(batches))

    def _eager(self, batches: Sequence[Batch]) -> torch.Tensor:
        return self._step([batch.to(self.precision.device) for batch in batches])

    def _step(self, batches: Sequence[Batch]) -> torch.Tensor:
        """The whole step; [3] fp32: loss, gradient norm, whether it diverged."""
        sums, gradient, loss_sum = self.weights.sums, self.weights.sums[:-1], self.weights.sums[-1]
        self.weights.refresh()
        sums.zero_()
        for batch in batches:
            loss = self.weighted_loss(batch)
            self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        if self.all_reduce:
            self.all_reduce(sums)
        self.scaler.unscale_(self.optimizer)
        norm = torch.linalg.vector_norm(gradient)
        is_broken = (~(norm.isfinite() & loss_sum.isfinite())).float()
        if self.max_grad_norm:
            gradient *= (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if not self.precision.scales_loss:
            self.halted.copy_(torch.maximum(self.halted, is_broken))
        self.scaler.step(self.optimizer, self.learning_rate, None if self.precision.scales_loss else self.halted)
        self.scaler.update()
        return torch.stack([loss_sum, norm, is_broken])

    def _reader(self, numbers: torch.Tensor) -> Callable[[], StepResult]:
        """Send `numbers` to the CPU behind the step, and wait for them when they are asked for."""
        is_cuda = numbers.device.type == "cuda"
        host = torch.empty(3, pin_memory=True).copy_(numbers, non_blocking=True) if is_cuda else numbers
        arrived = torch.cuda.current_stream().record_event() if is_cuda else None

        def read() -> StepResult:
            if arrived:
                arrived.synchronize()
            loss, norm, is_broken = host.tolist()
            self.skipped = self.skipped + 1 if is_broken else 0
            may_skip = self.precision.scales_loss and self.skipped <= MAX_SKIPPED
            return StepResult(loss, norm, diverged=bool(is_broken) and not may_skip, skipped=bool(is_broken) and may_skip)

        return read

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """The loss of `batches` as the weights are; nothing of the training changes."""
        self.weights.refresh()
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
        """[B, C, h, w] fp32: the UNet's answer, computed in its own dtype."""
        return self.unet(
            noisy.to(self.precision.dtype).contiguous(memory_format=torch.channels_last),
            batch.timesteps,
            encoder_hidden_states=batch.hidden,
            added_cond_kwargs={"text_embeds": batch.pooled, "time_ids": batch.add_time_ids},
            return_dict=False,
        )[0].float()
