"""Judges a model of the drawn world by the reader."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from benchmarks.world.dataset import Drawn
from benchmarks.world.people import TRAITS, identity_vector, visible_traits
from benchmarks.world.reader import Reader, attribute_accuracy, identity_error
from training.models.base_model import find_base
from training.models.weights import load_text_encoders, load_tokenizers, load_unet, load_vae

BATCH = 128
SHEET = (8, 6)
"""Samples in a row, and rows."""


def judge_reader(reader: Reader, unseen: Drawn) -> dict:
    """How well it reads drawings of people that it has not seen."""
    return {"drawings": _figures(reader, unseen.images, unseen)}


def judge_vae(vae: AutoencoderKL, unseen: Drawn, reader: Reader | None, device: torch.device) -> dict:
    """What survives in reconstructions, and the error of pixels (0 .. 1)."""
    wanted = unseen.images.float() / 255
    with torch.no_grad():
        answers = [vae.decode(vae.encode(part.to(device) * 2 - 1).latent_dist.mean)[0].cpu() for part in wanted.split(BATCH)]
    restored = (torch.cat(answers) / 2 + 0.5).clamp(0, 1)
    figures = {"error": round((restored - wanted).abs().mean().item(), 5)}
    if reader:
        figures["reconstructions"] = _figures(reader, restored, unseen)
    return figures


def judge_samples(folder: Path, unseen: Drawn, count: int, steps: int, guidance: float, device: torch.device) -> dict:
    """Whether samples show what their captions say; writes some to samples.png."""
    count = min(count, len(unseen.captions))
    images = sampled(
        folder, [", ".join(each) for each in unseen.captions[:count]], unseen.images.shape[-1], steps, guidance, device
    )
    columns, rows = SHEET
    shown = (images[: columns * rows] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    px = shown.shape[1]
    sheet = np.zeros((rows * px, columns * px, 3), np.uint8)
    for number, image in enumerate(shown):
        row, column = divmod(number, columns)
        sheet[row * px : (row + 1) * px, column * px : (column + 1) * px] = image
    Image.fromarray(sheet).quantize(128).save(folder / "samples.png", optimize=True)
    reader = Reader.load(folder / "reader", device)
    return {"samples": _figures(reader, images, Drawn(images, unseen.people[:count], unseen.captions[:count]))}


def sampled(
    folder: Path, prompts: list[str], px: int, steps: int, guidance: float, device: torch.device, seed: int = 0
) -> torch.Tensor:
    """[N, 3, px, px], 0 .. 1, on the CPU: one image for each prompt, by diffusers' pipeline."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline  # slow to import

    base = find_base(str(folder), folder.parent)
    first, second = load_text_encoders(base, device, torch.float32)
    tokenizers = load_tokenizers(base, folder.parent)
    pipeline = StableDiffusionXLPipeline(
        vae=load_vae(base, device),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=load_unet(base, device, torch.float32),
        scheduler=EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for begin in range(0, len(prompts), BATCH):
        part = prompts[begin : begin + BATCH]
        generator = torch.Generator().manual_seed(seed * 100_003 + begin)
        answer = pipeline(
            part,
            negative_prompt=[""] * len(part),
            height=px,
            width=px,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="pt",
        )
        images.append(answer.images.float().cpu())
    return torch.cat(images)


def _figures(reader: Reader, images: torch.Tensor, shown: Drawn) -> dict:
    """Accuracy of attributes, absent tags included, and the share of each trait's variance that is read where it can be seen."""
    probabilities, read = reader.tags(images), reader.identity(images)
    accuracy = attribute_accuracy(shown.captions, probabilities, complete=True)
    people = torch.from_numpy(np.stack([identity_vector(each) for each in shown.people]))
    seen = torch.from_numpy(np.stack([visible_traits(each) for each in shown.captions]))
    errors = (people - read).square()
    errors = (people - read).square()
    explained = {}
    for column, trait in enumerate(TRAITS):
        if seen[:, column].any():
            explained[trait] = round(1 - errors[seen[:, column], column].mean().item(), 3)
    return {
        "accuracy": {group: round(share, 4) for group, share in accuracy.items()},
        "identity_rms": round(identity_error(people, read, shown.captions, reader.readable).mean().item(), 4),
        "explained": explained,
    }
