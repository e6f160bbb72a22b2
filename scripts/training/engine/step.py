"""One optimizer step: noise, forward, loss, backward, clipping, update.

This is the plain step: PEFT's own layers, autograd, any optimizer, any loss, any adapter. A faster engine replaces the
UNet's forwards and keeps everything here. On a GPU, each shape of micro-batches is a CUDA graph, which is replayed with one
launch, and so is the update: the shapes of one step may be combined in any way.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from training.data.batches import Batch
from training.data.captions import conditioning
from training.method.adapters import Adapter
from training.method.diffusion import (
    LossConfig,
    huber_threshold,
    loss_per_sample,
    noised,
    offset_noise,
    sampled_latents,
    target_of,
    weight_per_sample,
)
from training.method.optimizers import Optimizer
from training.models.weights import TextEncoders
from training.system.device import Precision, available_bytes

MAX_SKIPPED = 20
"""Steps in a row that fp16 may skip while its loss scale halves from 2^16 to below 1."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports."""

    loss: float
    """Weighted mean over the real samples of the step."""
    gradient_norm: float
    """Of all trained weights together, before clipping."""
    diverged: bool = False
    """Loss or gradient is not finite; the weights are those of the step before, and no later step changes them."""
    skipped: bool = False
    """They are not finite because the scale of fp16's loss was too large; no weight was changed, and the scale is lower now."""
    samples: tuple[tuple[int, float], ...] = ()
    """Timestep and unweighted loss of each of this process's samples, in the order of its batches, without padding. Of a masked
    sample, the loss is the mean over its mask."""


class TrainStep:
    """Trains `adapter` in `unet`; the loss is fp32.

    `all_reduce` adds up the gradients and the loss, one flat buffer, over the processes, in place; None for one process.
    `text_encoders` encode captions that batches hold as tokens.
    `add_gradient` adds the gradient of what depends on the adapter's weights alone; the reported loss does not include it.
    `sync_compute_weights` is called before the first forward of a step, where the layers compute with a copy of the weights;
    with False, the layers compute without the adapter until it is called again.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        adapter: Adapter,
        optimizer: Optimizer,
        config: LossConfig,
        precision: Precision,
        max_grad_norm: float,
        all_reduce: Callable[[torch.Tensor], None] | None = None,
        *,
        text_encoders: TextEncoders | None = None,
        add_gradient: Callable[[], None] | None = None,
        sync_compute_weights: Callable[..., None] = lambda adapts=True: None,
        captures: bool = True,
    ):
        self.unet = unet
        self.adapter = adapter
        self.optimizer = optimizer
        self.config = config
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self.all_reduce = all_reduce
        self.text_encoders = text_encoders
        self.add_gradient = add_gradient
        self.sync_compute_weights = sync_compute_weights
        self.skipped = 0
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.scales_loss)
        self.learning_rate = torch.zeros((), device=precision.device)
        self.diverged = torch.zeros((), device=precision.device)
        """1 from the first loss or gradient on that is not finite."""
        draws_again = bool(adapter.dropout) and unet.is_gradient_checkpointing
        if draws_again and precision.device.type == "cuda":
            print("CUDA graphs: off, training is slower (dropout with gradient checkpointing cannot be captured)", flush=True)
        can_capture = captures and precision.device.type == "cuda" and not draws_again
        # The scaler decides on the CPU whether an fp16 step is skipped, and some optimizers read numbers back.
        self._captures_update = not precision.scales_loss and optimizer.capturable
        self.graphs = CudaGraphs(self._add_gradient, "training is") if can_capture else None
        # Its memory is its own, and is never released: all processes would have to capture their communication again together.
        captured_update = CudaGraphs(self._update, "training is") if can_capture and self._captures_update else None
        self._run_gradient, self._run_update = self.graphs or self._add_gradient, captured_update or self._update
        self._copying = torch.cuda.Stream(precision.device) if can_capture else None

    def __call__(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Take one optimizer step over its micro-batches and wait for its end."""
        return self.begin(batches, learning_rate)()

    def begin(self, batches: Sequence[Batch], learning_rate: float) -> Callable[[], StepResult]:
        """Begin one optimizer step over its micro-batches; calling what is returned waits for its end.

        A loss or gradient that is not finite leaves the weights as they were, and so do all steps after it.
        """
        self.learning_rate.fill_(learning_rate)
        if self.adapter.dropout:
            # Masks follow from the noise, which is a function of seed and position in the run, and change no other random number.
            torch.manual_seed(batches[0].latent_noise.contiguous().view(torch.int32).flatten()[0].item())
        tensors = self._on_device([tensor for batch in batches for tensor in vars(batch).values()])
        width = len(fields(Batch))
        self.sync_compute_weights()
        self.adapter.sums.zero_()
        # The results of a graph are overwritten by its next replay.
        losses = [self._run_gradient(*tensors[first : first + width]).clone() for first in range(0, len(tensors), width)]
        return self._reader(torch.cat([self._run_update(), *losses]), batches)

    def _on_device(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`tensors` on the device. Where steps are captured, they are copied while the previous step is still running, on a stream
        of their own, for which the current one waits."""
        with torch.cuda.stream(self._copying):  # None: the current stream
            uploaded = [tensor.to(self.precision.device, non_blocking=True) for tensor in tensors]
        if self._copying:
            current = torch.cuda.current_stream(self.precision.device)
            current.wait_stream(self._copying)
            for tensor in uploaded:
                # Without this the allocator could give the memory away once the copying stream is done with it.
                tensor.record_stream(current)
        return uploaded

    def _add_gradient(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Add gradient and loss of a micro-batch, whose fields `tensors` are, to the adapter's flat buffer; returns [B]: the
        unweighted losses.

        Nothing in here reads from the GPU or branches on its numbers, or it could not be captured.
        """
        with self.adapter.dropping():
            loss, losses = self.weighted_loss(Batch(*tensors))
            self.scaler.scale(loss).backward()
            self.adapter.sums[-1] += loss.detach()
        return losses

    def _update(self) -> torch.Tensor:
        """Add up the gradients of all processes, clip them and change the weights; returns [3] fp32: loss, gradient norm, and
        whether it diverged. It can be captured if scaler and optimizer can."""
        if self.all_reduce:
            self.all_reduce(self.adapter.sums)
        gradient, loss_sum = self.adapter.sums[:-1], self.adapter.sums[-1]
        self.scaler.unscale_(self.optimizer)
        if self.add_gradient:
            self.add_gradient()
        norm = torch.linalg.vector_norm(gradient)
        not_finite = (~(norm.isfinite() & loss_sum.isfinite())).float()
        if self.max_grad_norm:
            gradient *= (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if not self.precision.scales_loss:
            self.diverged.copy_(torch.maximum(self.diverged, not_finite))
        self.scaler.step(self.optimizer, self.learning_rate, None if self.precision.scales_loss else self.diverged)
        self.scaler.update()
        return torch.stack([loss_sum, norm, not_finite])

    def _reader(self, numbers: torch.Tensor, batches: Sequence[Batch]) -> Callable[[], StepResult]:
        """Copy `numbers` to the CPU behind the step; the returned function waits for them."""
        is_cuda = numbers.device.type == "cuda"
        host = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True) if is_cuda else numbers
        arrived = torch.cuda.current_stream().record_event() if is_cuda else None

        def read() -> StepResult:
            if arrived:
                arrived.synchronize()
            loss, norm, not_finite, *losses = host.tolist()
            self.skipped = self.skipped + 1 if not_finite else 0
            may_skip = self.precision.scales_loss and self.skipped <= MAX_SKIPPED
            failed = {"diverged": bool(not_finite) and not may_skip, "skipped": bool(not_finite) and may_skip}
            return StepResult(loss, norm, **failed, samples=_samples_of(batches, losses))

        return read

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this block the adapter has the weights that are validated, sampled and saved as a LoRA file; then those of the
        training again, to the last bit."""
        average, weights = self.optimizer.averaged_weights(), self.adapter.weights.detach()
        if average is None:
            yield
            return
        trained = weights.clone()
        weights.copy_(average)
        try:
            yield
        finally:
            weights.copy_(trained)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """The loss of `batches` with the weights as they are; nothing of the training changes."""
        self.sync_compute_weights()
        return sum(self.weighted_loss(batch.to(self.precision.device))[0].item() for batch in batches)

    def weighted_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Scalar: the batch's part of the loss of the optimizer step, differentiable in the adapter's weights; and [B]: the
        unweighted losses of its samples.

        What is to remain of the base model is predicted in the same forward, behind the samples of the batch, and compared with
        what the base model predicts (ai-toolkit's differential output preservation).
        """
        config, rows = self.config, batch.prior_rows
        latents = sampled_latents(batch.mean, batch.log_variance, batch.latent_noise, config.latent_scaling)
        noise = offset_noise(batch.noise, batch.offset, config.noise_offset)
        alpha_bar = config.alphas_cumprod[batch.timesteps]
        noisy = noised(latents, noise, alpha_bar)
        inputs = noisy, batch.timesteps, batch.add_time_ids, *batch.text
        if len(rows):
            of_prior = noisy[rows], batch.timesteps[rows], batch.add_time_ids[rows], *batch.prior_text
            expected = self.predict_without_adapter(*of_prior)
            inputs = tuple(torch.cat(pair) for pair in zip(inputs, of_prior, strict=True))
        prediction, of_class = self.predict(*inputs).split([len(noisy), len(rows)])
        target = target_of(latents, noise, alpha_bar, config.prediction_type)
        mask, huber_c = batch.mask if batch.mask.numel() else None, huber_threshold(alpha_bar, config.loss)
        losses = loss_per_sample(prediction, target, config.loss, mask, huber_c=huber_c)
        total = (losses * weight_per_sample(alpha_bar, config) * batch.weights).sum()
        if len(rows):
            total = total + (loss_per_sample(of_class, expected) * batch.prior_weights).sum()
        return total, losses.detach()

    @torch.no_grad()
    def predict_without_adapter(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What `predict` would return if there were no adapter."""
        self.sync_compute_weights(False)
        prediction = self.predict(*inputs)
        self.sync_compute_weights()
        return prediction

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, add_time_ids: torch.Tensor, *text: torch.Tensor
    ) -> torch.Tensor:
        """[B, C, h, w] fp32: the UNet's prediction, computed in its own dtype. The arguments are as in Batch."""
        hidden, pooled = conditioning(self.text_encoders, *text)
        return self.unet(
            noisy.to(self.precision.dtype).contiguous(memory_format=torch.channels_last),
            timesteps,
            encoder_hidden_states=hidden,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": add_time_ids},
            return_dict=False,
        )[0].float()


def _samples_of(batches: Sequence[Batch], losses: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """What StepResult holds of the samples of `batches`, which are on the CPU."""
    timesteps = [timestep for batch in batches for timestep in batch.timesteps.tolist()]
    weights = [weight for batch in batches for weight in batch.weights.tolist()]
    masks = [batch.mask.mean((1, 2, 3)).tolist() if batch.mask.numel() else [1.0] * len(batch.weights) for batch in batches]
    shares = [share for mask in masks for share in mask]
    rows = zip(timesteps, losses, shares, weights, strict=True)
    return tuple((timestep, loss / share if share else loss) for timestep, loss, share, weight in rows if weight)


class GraphMemory:
    """The memory that captured graphs share, which must not run at the same time. They hold it while they do not run, too."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[CudaGraphs] = []

    def release(self) -> None:
        """Give the memory back. Each function is captured again when it is next called."""
        torch.cuda.synchronize()
        for graphs in self.graphs:
            graphs.forget()
        self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


class CudaGraphs:
    """Runs `function` on tensors of a GPU: eagerly the first time for inputs of certain shapes, as a CUDA graph from then on.

    `function` may change only tensors that exist before it is called, and must not read from the GPU. Its result is overwritten
    by the next call.
    """

    def __init__(self, function: Callable[..., torch.Tensor], slower: str, memory: GraphMemory | None = None):
        self._function = function
        self._slower = slower
        """What is slower where nothing can be captured, for the log."""
        self.memory = memory or GraphMemory()
        self.memory.graphs.append(self)
        self._graphs: dict[tuple, Callable[..., torch.Tensor] | None] = {}
        self._disabled = False

    @property
    def captured(self) -> int:
        """How many shapes are captured."""
        return sum(graph is not None for graph in self._graphs.values())

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        shapes = tuple(tensor.shape for tensor in inputs)
        if self._disabled or shapes not in self._graphs:
            # The first call for a shape runs eagerly: it makes cuDNN, cuBLAS and Triton choose and load their kernels, which a
            # capture could not. It takes about the memory that graphs of other shapes hold, which is reserved and not allocated.
            held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            if self.captured and available_bytes(inputs[0].device) < held:
                self.memory.release()
            self._graphs[shapes] = None
            return self._function(*inputs)
        if self._graphs[shapes] is None:
            self._graphs[shapes] = self._capture(inputs)
        return (self._graphs[shapes] or self._function)(*inputs)

    def forget(self) -> None:
        """Delete all graphs."""
        self._graphs = dict.fromkeys(self._graphs)

    def _capture(self, inputs: Sequence[torch.Tensor]) -> Callable[..., torch.Tensor] | None:
        """`function` for inputs of these shapes as a graph with input buffers of its own; None, with a log line, if it cannot be
        captured: it then stays eager."""
        graph = torch.cuda.CUDAGraph()
        try:
            buffers = [tensor.clone() for tensor in inputs]
            # Other threads go on reading batches into pinned memory, which a capture in the usual mode would not survive.
            with torch.cuda.graph(graph, pool=self.memory.pool, capture_error_mode="thread_local"):
                output = self._function(*buffers)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) and self.captured:
                self.memory.release()  # that of other shapes
                return self._capture(inputs)
            self._disabled = True
            self.forget()
            print(f"CUDA graphs: off, {self._slower} slower ({str(error).splitlines()[0]})", flush=True)
            return None

        def replay(*given: torch.Tensor) -> torch.Tensor:
            for buffer, tensor in zip(buffers, given, strict=True):
                buffer.copy_(tensor)
            graph.replay()
            return output

        return replay


def recomputed(block: Callable, *args: object, is_random: bool = False, **named: object) -> object:
    """Call `block` and compute its activations again in the backward, with the same random numbers if it `is_random`.

    Saving the generator's state for these would break the capture of a CUDA graph.
    """
    return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, preserve_rng_state=is_random, **named)
