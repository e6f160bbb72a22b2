"""Trains the networks of a small SDXL from scratch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi

import torch
from diffusers import AutoencoderKL

from benchmarks.world.dataset import CaptionTokens
from training.engine.step import CudaGraphs
from training.method.diffusion import alphas_cumprod, noised
from training.models.sdxl import Schedule

EMA_DECAY = 0.999


@dataclass(frozen=True)
class Rates:
    """How it is trained."""

    reader_rate: float = 2e-3
    vae_rate: float = 1e-3
    vae_batch: int = 32
    unet_rate: float = 1e-3
    batch: int = 512
    gamma: float = 5.0
    """Of the min-SNR weighting; 0: none."""
    seed: int = 0


def initialised(network: torch.nn.Module) -> torch.nn.Module:
    """`network` with the weights with which such networks begin, trainable."""
    torch.manual_seed(0)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "embedding" in name and weight.dim() == 2 and "time" not in name and "add_embedding" not in name:
                weight.normal_(0, 0.02)
            elif name.endswith(("conv_out.weight", "conv2.weight", "to_out.0.weight", "ff.net.2.weight", "proj_out.weight")):
                weight.mul_(0.2)  # residual branches begin small
    return network.requires_grad_(True).train()


def train_vae(vae: AutoencoderKL, images: torch.Tensor, seconds: float, rates: Rates, device: torch.device) -> int:
    """Absolute error of pixels and of their differences, and a slight pull of the latents to a normal distribution."""
    images = images.to(device)
    latent = (4, images.shape[-2] // 8, images.shape[-1] // 8)

    def loss_of(pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        wanted = pixels.float() / 127.5 - 1
        posterior = vae.encode(wanted).latent_dist
        answer = vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0].float()
        error = (answer - wanted).abs().mean()
        for dim in (2, 3):
            error = error + 2 * (answer.diff(dim=dim) - wanted.diff(dim=dim)).abs().mean()
        return error + 1e-6 * posterior.kl().float().mean()

    def batch() -> list[torch.Tensor]:
        chosen = torch.randint(len(images), (rates.vae_batch,), device=device)
        return [images[chosen], torch.randn(rates.vae_batch, *latent, device=device)]

    return optimize("VAE", [vae], loss_of, batch, seconds, rates.vae_rate, rates.seed, device)["steps"]


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, float]:
    """Means of the latents, [N, 4, h, w] on the CPU, and the factor that gives them a standard deviation of 1."""
    parts = [vae.encode(part.to(device).float() / 127.5 - 1).latent_dist.mean.cpu() for part in images.split(128)]
    latents = torch.cat(parts)
    return latents, round(1 / latents.std().item(), 5)


def train_unet(
    networks: Sequence[torch.nn.Module], latents: torch.Tensor, captions: CaptionTokens, px: int, seconds: float, rates: Rates
) -> dict:
    """The usual objective, the squared error of the predicted noise at uniform timesteps, of a UNet and two text encoders."""
    unet, *encoders = networks
    device = latents.device
    alphas = alphas_cumprod(Schedule()).to(device, torch.float32)
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=rates.gamma) / snr if rates.gamma else torch.ones_like(snr)
    size = torch.tensor([px, px, 0, 0, px, px], device=device, dtype=torch.float32).repeat(rates.batch, 1)

    def loss_of(clean, noise, timesteps, first, second) -> torch.Tensor:
        hidden, pooled = [], None
        for encoder, tokens in zip(encoders, (first, second), strict=True):
            output = encoder(tokens, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = getattr(output, "text_embeds", None)
        added = {"text_embeds": pooled, "time_ids": size}
        noisy = noised(clean, noise, alphas[timesteps])
        answer = unet(noisy, timesteps, torch.cat(hidden, -1), added_cond_kwargs=added, return_dict=False)[0]
        return (((answer.float() - noise) ** 2).mean((1, 2, 3)) * weights[timesteps]).mean()

    def batch() -> list[torch.Tensor]:
        chosen = torch.randint(len(latents), (rates.batch,), device=device)
        timesteps = torch.randint(1000, (rates.batch,), device=device)
        return [latents[chosen], torch.randn(rates.batch, *latents.shape[1:], device=device), timesteps, *captions.draw(chosen)]

    return optimize("UNet and text encoders", networks, loss_of, batch, seconds, rates.unet_rate, rates.seed, device)


def optimize(
    label: str,
    networks: Sequence[torch.nn.Module],
    loss_of: Callable[..., torch.Tensor],
    batch: Callable[[], list[torch.Tensor]],
    seconds: float,
    rate: float,
    seed: int,
    device: torch.device,
) -> dict:
    """Train for `seconds` with AdamW, a rate that rises and falls, and leave the average of the weights in the networks."""
    torch.manual_seed(seed)
    weights = [weight for network in networks for weight in network.parameters()]
    averages = [weight.detach().clone() for weight in weights]
    is_cuda = device.type == "cuda"
    now = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        [
            {"params": [each for each in weights if each.dim() > 1], "weight_decay": 0.01},
            {"params": [each for each in weights if each.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=now,
        betas=(0.9, 0.98),
        fused=is_cuda,
        capturable=is_cuda,
    )
    for group in optimizer.param_groups:
        group["lr"] = now

    def step(*tensors: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_cuda, cache_enabled=False):
            loss = loss_of(*tensors)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - EMA_DECAY)
        return loss.detach()

    run = CudaGraphs(step, f"pre-training of the {label} is") if is_cuda else step
    started = reported = time.monotonic()
    count, total, losses = 0, torch.zeros((), device=device), []
    with torch.enable_grad():
        while (share := (time.monotonic() - started) / seconds) < 1:
            now.fill_(rate * min(1.0, max((count + 1) / 200, share / 0.04)) * (0.01 + 0.99 * (1 + cos(pi * share)) / 2))
            total += run(*batch())
            count += 1
            if count % 50 == 0 or not is_cuda:
                losses.append(total.item() / (50 if is_cuda else 1))  # waits for the GPU, so that the schedule goes by its time
                total.zero_()
            if len(losses) > 4 and time.monotonic() - reported > 15:
                reported = time.monotonic()
                print(
                    f"{label}: {reported - started:.0f} s, step {count}, loss {sum(losses[-5:]) / len(losses[-5:]):.4f}", flush=True
                )
    with torch.no_grad():
        if count > 3 / (1 - EMA_DECAY):
            torch._foreach_copy_(weights, averages)
    for network in networks:
        network.requires_grad_(False).eval()
    last = losses[-20:] or [float("nan")]
    print(f"{label}: {count} steps in {time.monotonic() - started:.0f} s", flush=True)
    return {"steps": count, "loss": round(sum(last) / len(last), 5)}
