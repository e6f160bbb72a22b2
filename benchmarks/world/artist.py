"""Renders many images at once with a base model and the LoRA files on it, from the same noise for each file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from training.callbacks.renderer import scheduler_of
from training.data.captions import encode_captions
from training.engine.step import CudaGraphs
from training.lora_files.changes import apply
from training.lora_files.reading import layer_name, read_lora, usable_layers
from training.models.base_model import find_base
from training.models.weights import load_text_encoders, load_tokenizers, load_unet, load_vae

STEPS, GUIDANCE = 20, 4.0
VAE_BATCH = 64


class Artist:
    """A base model in fp32 on `device`. Images are [N, 3, side, side], 0 .. 1, on the device."""

    def __init__(self, folder: Path, side: int, device: torch.device):
        base = find_base(str(folder), folder.parent)
        self.side, self.device = side, device
        self.unet, self.vae = load_unet(base, device, torch.float32), load_vae(base, device)
        self._encoders = load_text_encoders(base, device, torch.float32)
        self._tokenizers = load_tokenizers(base, folder.parent)
        self._schedule = base.schedule
        networks = {"unet": self.unet, "text_encoder": self._encoders[0], "text_encoder_2": self._encoders[1]}
        modules = {f"{part}.{name}": each for part, network in networks.items() for name, each in network.named_modules()}
        self._layers = {layer_name(name): each for name, each in modules.items() if hasattr(each, "weight")}
        self._weights = {name: module.weight.detach().to("cpu", copy=True) for name, module in self._layers.items()}
        self._predict = CudaGraphs(self._guided, "rendering is") if device.type == "cuda" else self._guided
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    @contextmanager
    def with_lora(self, path: Path) -> Iterator[None]:
        """Within this block UNet and text encoders have the weights of a LoRA file added to their own, as ComfyUI applies them."""
        layers = usable_layers(read_lora(path), self._layers)
        try:
            for name, layer in layers.items():
                self._layers[name].weight.copy_(apply(self._weights[name], layer, 1.0))
            yield
        finally:
            for name in layers:
                self._layers[name].weight.copy_(self._weights[name])

    @torch.no_grad()
    def render(self, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        """One image for each prompt and seed, by Euler's method with classifier-free guidance, as sample images are rendered."""
        scheduler = scheduler_of(self._schedule)
        scheduler.set_timesteps(STEPS)
        shape = 4, self.side // 8, self.side // 8
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        latents = torch.stack(noise).to(self.device) * float(scheduler.init_noise_sigma)
        unique = list(dict.fromkeys(["", *prompts]))
        encoded = [encode_captions([text], self._tokenizers, self._encoders, chunks=1) for text in unique]
        rows = [0] * len(prompts) + [unique.index(prompt) for prompt in prompts]
        hidden, pooled = (torch.cat(parts)[rows] for parts in zip(*encoded, strict=True))
        sizes = torch.tensor([self.side, self.side, 0, 0, self.side, self.side], dtype=torch.float32, device=self.device)
        sizes = sizes.repeat(len(rows), 1)
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(latents, timestep)
            times = torch.full((len(rows),), float(timestep), device=self.device)
            prediction = self._predict(noisy, times, hidden, pooled, sizes)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return self._decoded(latents / self.vae.config.scaling_factor)

    def _guided(self, noisy: torch.Tensor, times: torch.Tensor, hidden: torch.Tensor, pooled: torch.Tensor, sizes: torch.Tensor):
        added = {"text_embeds": pooled, "time_ids": sizes}
        doubled = noisy.repeat(2, 1, 1, 1)
        without, with_text = self.unet(doubled, times, hidden, added_cond_kwargs=added, return_dict=False)[0].chunk(2)
        return without + GUIDANCE * (with_text - without)

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        parts = [self.vae.decode(part, return_dict=False)[0] for part in latents.split(VAE_BATCH)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def through_vae(self, images: torch.Tensor) -> torch.Tensor:
        """What the VAE keeps of images: no LoRA draws better ones."""
        parts = images.to(self.device).split(VAE_BATCH)
        return self._decoded(torch.cat([self.vae.encode(part * 2 - 1).latent_dist.mean for part in parts]))
