"""`python -m benchmarks.world.pretrain FOLDER`: teaches a small SDXL of the true architecture to draw people from tags.

Writes a diffusers folder, which `scripts/train_lora.py` takes as a base model. The VAE is trained first, then UNet and both text
encoders together, on images of people who are never used again. On an H100 it fits into eight minutes.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from benchmarks.world.drawing import draw
from benchmarks.world.people import ALL_TAGS, random_identity, random_shot, tags
from demo import tiny_sdxl
from demo.sgm_names import name_in_files
from training.data.captions import encode_captions
from training.engine.step import CudaGraphs
from training.method.diffusion import alphas_cumprod, noised
from training.models.base_model import find_base
from training.models.sdxl import WEIGHT_STEMS, Schedule
from training.models.weights import load_text_encoders, load_tokenizers, load_unet, load_vae
from training.system.device import choose_precision

IMAGE_PX = 128
SMALL = tiny_sdxl.Size(
    unet=(64, 64, 96), heads=(2, 2, 3), time_ids=16, vae=(32, 64, 96, 96), clip_l=(64, 4, 2, 64), clip_g=(96, 4, 3, 96)
)  # fmt: skip
TAG_DROPOUT, CAPTION_DROPOUT, NAME_SHARE = 0.1, 0.1, 0.3
"""Shares: of the tags that a caption leaves out, of captions that are empty, and of captions that begin with a meaningless name, so
that the trigger word of a LoRA is nothing unheard of."""
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Length:
    """How long each part is trained."""

    images: int = 60_000
    vae_s: float = 100
    unet_s: float = 270
    vae_batch: int = 64
    unet_batch: int = 256


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.pretrain", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=Length.images)
    parser.add_argument("--vae-seconds", type=float, default=Length.vae_s)
    parser.add_argument("--unet-seconds", type=float, default=Length.unet_s)
    parser.add_argument("--batch", type=int, default=Length.unet_batch)
    given = parser.parse_args()
    pretrain(given.folder, Length(given.images, given.vae_seconds, given.unet_seconds, min(64, given.batch), given.batch))


def pretrain(folder: Path, length: Length, size: tiny_sdxl.Size = SMALL) -> None:
    """Write the trained model to `folder`."""
    precision = choose_precision("bf16")
    device = precision.device
    images, captions = generated(length.images)
    tiny_sdxl.build(folder, size=size, merges=merges_of(ALL_TAGS))
    base = find_base(str(folder), folder.parent)
    vae = initialised(load_vae(base, device))
    train_vae(vae, images, length, device)
    latents, scaling = encoded(vae, images, device)
    vae.register_to_config(scaling_factor=scaling)
    unet = initialised(load_unet(base, device, torch.float32))
    encoders = [initialised(encoder) for encoder in load_text_encoders(base, device, torch.float32)]
    tokenizers = load_tokenizers(base, folder.parent)
    train_unet(unet, encoders, tokenizers, latents * scaling, captions, length, device)
    for name, network in zip(("vae", "unet", "text_encoder", "text_encoder_2"), (vae, unet, *encoders), strict=True):
        write_network(folder / name, name, network)


def merges_of(texts: Sequence[str]) -> list[str]:
    """Merges of a tokenizer for which every word of `texts` is one token."""
    found = {}
    for word in dict.fromkeys(word for text in texts for word in text.split()):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            found[f"{parts[0]} {parts[1]}"] = None
            parts = [parts[0] + parts[1], *parts[2:]]
    return list(found)


def generated(count: int) -> tuple[torch.Tensor, list[list[str]]]:
    """[count, 3, px, px] uint8, and the tags of each image."""
    chunks = [range(first, min(first + 500, count)) for first in range(0, count, 500)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = list(pool.map(_drawn, chunks))
    images = torch.from_numpy(np.concatenate([pixels for pixels, _ in drawn])).permute(0, 3, 1, 2)
    return images, [each for _, found in drawn for each in found]


def _drawn(numbers: range) -> tuple[np.ndarray, list[list[str]]]:
    pixels, found = [], []
    for number in numbers:
        generator = np.random.default_rng((20, number))
        identity, shot = random_identity(generator), random_shot(generator)
        pixels.append(np.asarray(draw(identity, shot, IMAGE_PX)))
        found.append(tags(identity, shot))
    return np.stack(pixels), found


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


def train_vae(vae: AutoencoderKL, images: torch.Tensor, length: Length, device: torch.device) -> None:
    """Absolute error of pixels and of their differences, and a slight pull of the latents to a normal distribution."""

    def loss_of(pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        wanted = pixels.float() / 127.5 - 1
        posterior = vae.encode(wanted).latent_dist
        answer = vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
        error = (answer - wanted).abs().mean()
        for dim in (2, 3):
            error = error + 2 * (answer.diff(dim=dim) - wanted.diff(dim=dim)).abs().mean()
        return error + 1e-6 * posterior.kl().mean()

    def batches(generator: torch.Generator) -> Iterator[list[torch.Tensor]]:
        while True:
            pixels = images[torch.randint(len(images), (length.vae_batch,), generator=generator)]
            yield [pixels, torch.randn(length.vae_batch, 4, IMAGE_PX // 8, IMAGE_PX // 8, generator=generator)]

    optimize("VAE", [vae], loss_of, batches, length.vae_s, 1e-3, device)


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, float]:
    """Means of the latents, [N, 4, h, w] on the CPU, and the factor that gives them a standard deviation of 1."""
    parts = [vae.encode(part.to(device).float() / 127.5 - 1).latent_dist.mean.cpu() for part in images.split(128)]
    latents = torch.cat(parts)
    return latents, round(1 / latents.std().item(), 5)


def train_unet(unet, encoders, tokenizers, latents, captions, length: Length, device: torch.device) -> None:
    """The usual objective: the mean squared error of the predicted noise, at uniform timesteps."""
    alphas = alphas_cumprod(Schedule()).to(device, torch.float32)
    size = [float(IMAGE_PX), float(IMAGE_PX), 0.0, 0.0, float(IMAGE_PX), float(IMAGE_PX)]
    tokenize = partial(_tokens, tokenizers)

    def loss_of(clean, noise, timesteps, first, second) -> torch.Tensor:
        hidden, pooled = [], None
        for encoder, tokens in zip(encoders, (first, second), strict=True):
            output = encoder(tokens, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = getattr(output, "text_embeds", pooled)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([size] * len(clean), device=clean.device)}
        noisy = noised(clean, noise, alphas[timesteps])
        answer = unet(noisy, timesteps, torch.cat(hidden, -1), added_cond_kwargs=added, return_dict=False)[0]
        return F.mse_loss(answer.float(), noise)

    def batches(generator: torch.Generator) -> Iterator[list[torch.Tensor]]:
        while True:
            chosen = torch.randint(len(latents), (length.unet_batch,), generator=generator)
            clean = latents[chosen]
            texts = [caption(captions[index], generator) for index in chosen.tolist()]
            timesteps = torch.randint(1000, (length.unet_batch,), generator=generator)
            yield [clean, torch.randn(clean.shape, generator=generator), timesteps, *tokenize(texts)]

    optimize("UNet and text encoders", [unet, *encoders], loss_of, batches, length.unet_s, 1e-3, device)


def _tokens(tokenizers: tuple, texts: list[str]) -> list[torch.Tensor]:
    return [each(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids for each in tokenizers]


def caption(found: list[str], generator: torch.Generator) -> str:
    """The tags of an image as a caption: shuffled, some left out, often with a name in front, sometimes empty."""
    share, named, *draws = torch.rand(2 + 2 * len(found), generator=generator).tolist()
    if share < CAPTION_DROPOUT:
        return ""
    kept = [tag for tag, draw_ in zip(found, draws, strict=False) if draw_ >= TAG_DROPOUT]
    order = sorted(range(len(kept)), key=lambda index: draws[len(found) + index])
    letters = torch.randint(97, 123, (5,), generator=generator).tolist()
    name = ["".join(map(chr, letters))] if named < NAME_SHARE else []
    return ", ".join([*name, *(kept[index] for index in order)])


def optimize(
    label: str,
    networks: Sequence[torch.nn.Module],
    loss_of: Callable[..., torch.Tensor],
    batches: Callable[[torch.Generator], Iterator[list[torch.Tensor]]],
    seconds: float,
    rate: float,
    device: torch.device,
) -> None:
    """Train for `seconds` with AdamW, a rate that rises and falls, and leave the average of the weights in the networks."""
    weights = [weight for network in networks for weight in network.parameters()]
    averages = [weight.detach().clone() for weight in weights]
    now = torch.zeros((), device=device)
    is_cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(weights, lr=now, weight_decay=0.01, fused=is_cuda, capturable=is_cuda)

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
    started, count, losses = time.monotonic(), 0, []
    with torch.enable_grad():
        for batch in batches(torch.Generator().manual_seed(0)):
            share = (time.monotonic() - started) / seconds
            if share >= 1:
                break
            now.fill_(rate * min(1.0, count / 200) * (0.02 + 0.98 * (1 - share)))
            loss = run(*(tensor.to(device, non_blocking=True) for tensor in batch))
            count += 1
            if count % 100 == 0:
                losses.append(loss.item())
                print(f"{label}: step {count}, loss {sum(losses[-5:]) / len(losses[-5:]):.4f}", flush=True)
    with torch.no_grad():
        if count > 3 / (1 - EMA_DECAY):
            torch._foreach_copy_(weights, averages)
    for network in networks:
        network.requires_grad_(False).eval()
    print(f"{label}: {count} steps in {time.monotonic() - started:.0f} s", flush=True)


def write_network(folder: Path, name: str, network: torch.nn.Module) -> None:
    """Replace the random weights in a diffusers folder, in fp16."""
    weights = {name_in_files(name, key): value.cpu().half().contiguous() for key, value in network.state_dict().items()}
    save_file(weights, folder / f"{WEIGHT_STEMS[name]}.safetensors", metadata={"format": "pt"})
    if isinstance(network, AutoencoderKL):
        network.save_config(folder)


if __name__ == "__main__":
    main()
