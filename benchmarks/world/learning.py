"""Trains the networks of a small SDXL from scratch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi

import torch
from diffusers import AutoencoderKL

from benchmarks.world.dataset import CaptionTokens, Drawn
from benchmarks.world.drawing import HEADS
from benchmarks.world.people import FRAMINGS
from benchmarks.world.reader import Reader, progress
from training.engine.step import CudaGraphs
from training.method.diffusion import alphas_cumprod, noised
from training.models.sdxl import Schedule
from training.system.process_group import ProcessGroup

HEAD_WEIGHT = 6.0
"""Of the pixels of a head in the VAE's loss; others have 1. People differ there, in few pixels."""
ORIGINAL_SIDES = (128, 256, 384, 512)
"""What the size conditioning may say of the files."""


@dataclass(frozen=True)
class Rates:
    """How it is trained."""

    reader_rate: float = 2e-3
    reader_batch: int = 256
    vae_rate: float = 1.5e-3
    vae_batch: int = 16
    reader_weight: float = 1.5
    """Of the difference that the reader sees in the VAE's reconstructions, a share, next to errors of pixels (-1 .. 1)."""
    unet_rate: float = 2e-3
    batch: int = 256
    gamma: float = 5.0
    """Of the min-SNR weighting; 0: none."""
    seed: int = 0


def train_vae(
    vae: AutoencoderKL,
    learned: Drawn,
    reader: Reader | None,
    seconds: float,
    rates: Rates,
    device: torch.device,
    group: ProcessGroup,
    steps: int = 0,
) -> dict:
    """Errors of pixels, of their differences and of what a reader sees; a slight pull of the latents to a normal distribution.

    Pixels alone ask too little for what is small, such as eyes.
    """
    images = learned.images.to(device)
    latent = (4, images.shape[-2] // 8, images.shape[-1] // 8)
    framings = torch.tensor(
        [[framing in caption for framing in FRAMINGS].index(True) for caption in learned.captions], device=device
    )
    weights = torch.stack([_head_weights(framing, images.shape[-1]) for framing in FRAMINGS]).to(device)

    def loss_of(pixels: torch.Tensor, noise: torch.Tensor, framing: torch.Tensor) -> torch.Tensor:
        wanted, weight = pixels.float() / 127.5 - 1, weights[framing][:, None]
        posterior = vae.encode(wanted).latent_dist
        answer = vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0].float()
        wrong = answer - wanted
        error = (weight * (wrong.abs() + 4 * wrong.square())).mean()
        for dim, inner in ((2, weight[..., 1:, :]), (3, weight[..., 1:])):
            error = error + 2 * (inner * wrong.diff(dim=dim).abs()).mean()
        if reader and rates.reader_weight:
            error = error + rates.reader_weight * _perceived_difference(reader, wanted, answer)
        return error + 3e-7 * posterior.kl().float().mean()

    def batch() -> list[torch.Tensor]:
        chosen = torch.randint(len(images), (rates.vae_batch,), device=device)
        return [images[chosen], torch.randn(rates.vae_batch, *latent, device=device), framings[chosen]]

    return optimize("VAE", [vae], loss_of, batch, progress(seconds, steps), rates.vae_rate, rates.seed, device, group)


def _perceived_difference(reader: Reader, wanted: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """The mean difference of the reader's features and answers, as a share of what they are."""
    shares = []
    with torch.no_grad():
        features = reader.features(wanted)
    for feature, found in zip(features, reader.features(answer), strict=True):
        shares.append((found - feature).float().abs().mean() / feature.float().abs().mean())
    return torch.stack(shares).mean()


def _head_weights(framing: str, px: int) -> torch.Tensor:
    """[px, px], of mean 1."""
    height, centre = HEADS[framing]
    y, x = torch.meshgrid(torch.arange(px) / px - centre, torch.arange(px) / px - 0.5, indexing="ij")
    weights = 1 + (HEAD_WEIGHT - 1) * ((x**2 + y**2).sqrt() < 0.65 * height)
    return weights / weights.mean()


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Means of the latents, [N, 4, h, w], on the CPU."""
    return torch.cat([vae.encode(part.to(device).float() / 127.5 - 1).latent_dist.mean.cpu() for part in images.split(128)])


def train_unet(
    networks: Sequence[torch.nn.Module],
    latents: torch.Tensor,
    captions: CaptionTokens,
    px: int,
    seconds: float,
    rates: Rates,
    group: ProcessGroup,
    steps: int = 0,
) -> dict:
    """The usual objective, the squared error of the predicted noise at uniform timesteps, of a UNet and two text encoders."""
    unet, *encoders = networks
    device = latents.device
    alphas = alphas_cumprod(Schedule()).to(device, torch.float32)
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=rates.gamma) / snr if rates.gamma else torch.ones_like(snr)
    sides = torch.tensor(ORIGINAL_SIDES, device=device, dtype=torch.float32)
    rest = torch.tensor([0, 0, px, px], device=device, dtype=torch.float32).repeat(rates.batch, 1)

    def loss_of(clean, noise, timesteps, first, second, size) -> torch.Tensor:
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
        original = sides[torch.randint(len(sides), (rates.batch, 1), device=device)]
        size = torch.cat([original, original, rest], 1)
        noise = torch.randn(rates.batch, *latents.shape[1:], device=device)
        return [latents[chosen], noise, timesteps, *captions.draw(chosen), size]

    done = progress(seconds, steps)
    return optimize("UNet and text encoders", networks, loss_of, batch, done, rates.unet_rate, rates.seed, device, group)


def optimize(
    label: str,
    networks: Sequence[torch.nn.Module],
    loss_of: Callable[..., torch.Tensor],
    batch: Callable[[], list[torch.Tensor]],
    done: Callable[[int], float],
    rate: float,
    seed: int,
    device: torch.device,
    group: ProcessGroup,
) -> dict:
    """Train until all is `done` with AdamW and a rate that rises and falls; every process has a batch of its own in each step."""
    torch.manual_seed(seed * 1000 + group.rank)
    weights = [weight for network in networks for weight in network.parameters()]
    group.broadcast(weight.data for weight in weights)
    gradient = torch.zeros(sum(weight.numel() for weight in weights), device=device)
    for weight, part in zip(weights, gradient.split([weight.numel() for weight in weights]), strict=True):
        weight.grad = part.view_as(weight)
    is_cuda = device.type == "cuda"
    now = torch.zeros((), device=device)
    groups = [[each for each in weights if each.dim() > 1], [each for each in weights if each.dim() <= 1]]
    decayed = [{"params": each, "weight_decay": decay} for each, decay in zip(groups, (0.01, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(decayed, lr=now, betas=(0.9, 0.98), fused=True, capturable=is_cuda)
    for each in optimizer.param_groups:
        each["lr"] = now

    def step(*tensors: torch.Tensor) -> torch.Tensor:
        gradient.zero_()
        with torch.autocast(device.type, torch.bfloat16, enabled=is_cuda, cache_enabled=False):
            loss = loss_of(*tensors)
        loss.backward()
        if group.all_reduce:
            group.all_reduce(gradient)
            gradient.div_(group.world_size)
        gradient.mul_((1.0 / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0))
        optimizer.step()
        return loss.detach()

    run = CudaGraphs(step, f"pre-training of the {label} is") if is_cuda else step
    every = 50 if is_cuda else 1
    started = reported = time.monotonic()
    count, total, losses = 0, torch.zeros((), device=device), []
    with torch.enable_grad():
        while (share := group.all_reduce_max(int(1e6 * done(count))) / 1e6) < 1:
            now.fill_(rate * min(1.0, max((count + 1) / 200, share / 0.04)) * (0.01 + 0.99 * (1 + cos(pi * share)) / 2))
            total += run(*batch())
            count += 1
            if count % every == 0:
                losses.append(total.item() / every)  # waits for the GPU, so that the schedule goes by its time
                total.zero_()
            if len(losses) > 4 and time.monotonic() - reported > 15:
                reported = time.monotonic()
                print(f"{label}: {reported - started:.0f} s, step {count}, loss {sum(losses[-5:]) / 5:.4f}", flush=True)
    for network in networks:
        network.zero_grad()
        network.requires_grad_(False).eval()
    last = losses[-20:] or [float("nan")]
    print(f"{label}: {count} steps in {time.monotonic() - started:.0f} s", flush=True)
    return {"steps": count, "processes": group.world_size, "loss": round(sum(last) / len(last), 5)}
