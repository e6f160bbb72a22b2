"""Renders images with the UNet and the adapter of a training step, as diffusers' SDXL pipeline would."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from training.callbacks.sample_plan import TILE_PX
from training.callbacks.sample_prompts import SamplePrompt
from training.data.cache_files import read_text
from training.data.captions import conditioning
from training.engine.step import CudaGraphs, TrainStep
from training.models.sdxl import Schedule


def scheduler_of(schedule: Schedule) -> EulerDiscreteScheduler:
    """diffusers' Euler sampler for the noise that the model was trained with. A schedule with zero terminal SNR begins at its last
    timestep, pure noise (Lin et al. 2023, arXiv 2305.08891, section 3.3); others have SDXL's spacing."""
    return EulerDiscreteScheduler(
        num_train_timesteps=schedule.timesteps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule="scaled_linear",
        prediction_type=schedule.prediction_type,
        rescale_betas_zero_snr=schedule.zero_terminal_snr,
        timestep_spacing="trailing" if schedule.zero_terminal_snr else "leading",
        steps_offset=0 if schedule.zero_terminal_snr else 1,
    )


def initial_noise(prompt: SamplePrompt) -> torch.Tensor:
    """[1, 4, h, w] fp32 on the CPU, standard normal: that of ComfyUI for the same seed and size."""
    generator = torch.Generator("cpu").manual_seed(prompt.seed)
    return torch.randn((1, 4, prompt.height // 8, prompt.width // 8), generator=generator)


class Renderer:
    """Renders images with the UNet of a training step, and the adapter in it.

    `texts` are the files in the cache of every prompt and negative prompt; they and the VAE, which loses its encoder, are kept in
    the CPU's memory, so that nothing has to be read during training. Text encoders that are trained encode them for each image.
    `tiled`: the VAE decodes tiles, and the predictions of guidance are computed one by one, which takes less memory. `in_turn`:
    images are rendered in the memory that captured steps give back for it, and without graphs, which would hold some of it.
    """

    def __init__(
        self, step: TrainStep, schedule: Schedule, texts: Mapping[str, Path], vae: AutoencoderKL, *, tiled: bool, in_turn: bool
    ):
        self.step, self._schedule, self._vae, self._tiled, self._in_turn = step, schedule, vae, tiled, in_turn
        vae.encoder = vae.quant_conv = None
        # Training does not run while images are rendered, so that the captured graphs of both share their memory.
        captures, memory = step.precision.device.type == "cuda" and not in_turn, step.graphs and step.graphs.memory
        self._predict = CudaGraphs(step.predict, "sample images are", memory) if captures else step.predict
        self._texts = {text: read_text(path, 0) for text, path in texts.items()}
        self._decoder: AutoencoderKL | None = None
        if tiled:
            vae.enable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size = TILE_PX, TILE_PX // 8

    def begin(self) -> None:
        """To be called before images are rendered; `release` after it."""
        if self._in_turn and self.step.graphs:
            self.step.graphs.memory.release()

    @torch.no_grad()
    def latents(self, prompt: SamplePrompt, stops: Callable[[], bool] = lambda: False) -> torch.Tensor | None:
        """[1, 4, h, w] fp32: the latents of an image; None if `stops` returns true before they are complete.

        Both predictions of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) are one batch, unless memory is short.
        """
        device = self.step.precision.device
        scheduler = scheduler_of(self._schedule)
        scheduler.set_timesteps(prompt.steps)  # on the CPU: the GPU is not waited for
        latents = initial_noise(prompt).to(device) * float(scheduler.init_noise_sigma)
        texts = zip(*(self._texts[text].values() for text in (prompt.negative, prompt.text)), strict=True)
        size = (prompt.height, prompt.width)
        add_time_ids = torch.tensor([[*size, 0, 0, *size]] * 2, dtype=torch.float32, device=device)
        self.step.sync_compute_weights()
        hidden, pooled = conditioning(self.step.text_encoders, *(torch.stack(parts).to(device) for parts in texts))
        for timestep in scheduler.timesteps:
            if stops():
                return None
            noisy = scheduler.scale_model_input(latents, timestep).expand(2, -1, -1, -1)
            timesteps = torch.full((2,), float(timestep), device=device)
            inputs = noisy, timesteps, add_time_ids, hidden, pooled
            parts = zip(*(each.split(1) for each in inputs), strict=True) if self._tiled else [inputs]
            # A graph overwrites its result the next time.
            without, with_text = torch.cat([self._predict(*part).clone() for part in parts]).chunk(2)
            prediction = without + prompt.guidance * (with_text - without)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return latents

    @torch.no_grad()
    def decoded(self, latents: torch.Tensor) -> Image.Image:
        """The image of latents [1, 4, h, w]. The VAE computes in fp32: SDXL's overflows in fp16. A copy of it stays on the GPU
        until `release`. Raises FloatingPointError for NaN and infinity."""
        if self._decoder is None:
            is_cuda = latents.device.type == "cuda"
            self._decoder = copy.deepcopy(self._vae).to(latents.device) if is_cuda else self._vae
        vae = self._decoder
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0][0]
        if not pixels.isfinite().all():
            raise FloatingPointError
        pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())

    def release(self) -> None:
        """Give back the GPU memory that training does not need."""
        self._decoder = None
        if self.step.precision.device.type == "cuda":
            torch.cuda.empty_cache()
