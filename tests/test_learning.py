"""The proof on a CPU, in minutes: a tiny model of the drawn world learns a person whom it has never seen, with the default recipe.

`make learn-test` runs it. The model is pre-trained first: people of the tiny world differ in seven traits, of which samples show
skin, and length, volume, fringe, lightness and warmth of the hair. Then the product's own stages caption 20 images of a new person
and train a LoRA. All steps are counted and seeded, so that another run has nearly the same figures.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.world.artist import Artist
from benchmarks.world.drawing import draw
from benchmarks.world.measures import COUNTS, Judge, render
from benchmarks.world.people import tags
from benchmarks.world.recipes import Arm
from benchmarks.world.runs import Run, World
from benchmarks.world.subjects import FILE_PX
from common.settings import REPOSITORY
from training.data.captions import encode_captions
from training.method.diffusion import alphas_cumprod, noised
from training.models.sdxl import Schedule

pytestmark = [pytest.mark.learn, pytest.mark.timeout(3600)]

IMAGES, HELD_OUT = 20, 8
ARM = Arm("learn-test", {"LEARNING_RATE": 1e-3}, images=IMAGES, samples=1600, saves=1)
"""The model is a thousandth of SDXL and its layers are narrow, so that a step has to be larger."""
PERSON = 10
"""One who is far from the average: dark skin and long black hair."""
LOSS_FALLS, LIKENESS_MOVES = 0.2, 0.5
"""At least: the share of the loss on held-out images, and of the way from the base model's people to the drawn person."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny world, pre-trained in minutes on two cores."""
    folder = tmp_path_factory.mktemp("learning") / "world"
    command = [sys.executable, "-m", "benchmarks.world.pretrain", folder, "--size", "tiny", "--processes", "2"]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return folder


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> tuple[Run, Artist]:
    """A run of the product on a data set that the product has captioned, and what renders its LoRA."""
    run = Run(ARM, PERSON, 0, World(world, tmp_path_factory.mktemp("learning-work")))
    run.world.write_models()
    run.prepare()
    command = [sys.executable, REPOSITORY / "scripts" / "train_lora.py"]
    subprocess.run(command, env=run.variables(), check=True)
    return run, Artist(run.world.model, run.world.side, torch.device("cpu"))


def held_out_loss(run: Run, artist: Artist) -> float:
    """The error of the predicted noise on images of the person that training has not seen, the same noise each time."""
    shots = list(run.subject.shots(IMAGES + HELD_OUT))[IMAGES:]
    side = artist.side
    images = [draw(run.subject.identity, shot, FILE_PX).resize((side, side), Image.Resampling.LANCZOS) for shot in shots]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1
    texts = [", ".join([run.subject.trigger, *tags(run.subject.identity, shot)]) for shot in shots]
    alphas, losses = alphas_cumprod(Schedule()).float(), []
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[side, side, 0, 0, side, side]] * len(shots), dtype=torch.float32)
    with torch.no_grad():
        latents = artist.vae.encode(pixels).latent_dist.mean * artist.vae.config.scaling_factor
        hidden, pooled = encode_captions(texts, artist._tokenizers, artist._encoders, chunks=1)
        for timestep in range(50, 1000, 100):
            noise = torch.randn(latents.shape, generator=generator)
            timesteps = torch.full((len(shots),), timestep)
            added = {"text_embeds": pooled, "time_ids": sizes}
            noisy = noised(latents, noise, alphas[timesteps])
            answer = artist.unet(noisy, timesteps, hidden, added_cond_kwargs=added, return_dict=False)[0]
            losses.append(F.mse_loss(answer, noise).item())
    return float(np.mean(losses))


def test_the_loss_on_images_that_training_has_not_seen_falls(trained):
    run, artist = trained
    before = held_out_loss(run, artist)
    with artist.with_lora(run.layout.lora):
        after = held_out_loss(run, artist)
    print(f"held-out loss {before:.4f} -> {after:.4f}, {1 - after / before:.1%} less")
    assert after < (1 - LOSS_FALLS) * before


def test_samples_show_the_person(trained):
    run, artist = trained
    judge = Judge(run.subject, artist, run.world.reader(), dict(zip(COUNTS, (16, 16, 4), strict=True)))
    with artist.with_lora(run.layout.lora):
        measured = judge.measure(render(artist, judge.prompts, run.subject.trigger))
    print({name: round(value, 3) for name, value in measured.items()})
    assert measured["likeness"] > LIKENESS_MOVES
