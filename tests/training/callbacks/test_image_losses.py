"""Which images stand out by their loss: planted ones are found, and a run that resumes records what the whole one does."""

import json

import numpy as np
import pytest

from training.callbacks.image_losses import MIN_SAMPLES, ImageLosses, outliers, relative_losses
from training.data.buckets import Bucket, OptimizerStep

ROOT_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000)
SHARES = np.cumprod(1 - ROOT_BETAS**2)
VALUES, IMAGES, EPOCHS = 64, 60, 20
SPECTRUM = 0.8 * VALUES / np.arange(1, VALUES + 1) / (1 / np.arange(1, VALUES + 1)).sum()
"""Variances of an image's values, from coarse to fine: natural images have such a spectrum."""


def trained(planted: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, timestep and loss of each sample of a run of 60 images of one person, the first of which is another thing.

    The network is the best one for a Gaussian with the mean and the variances of the data set, which is known in closed form; it
    predicts the noise. The images differ in detail, so that their losses differ by about 20 %.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((*shape, VALUES)) * np.sqrt(SPECTRUM)

    person, other = normal(), normal()
    images = person + normal(IMAGES) * rng.lognormal(0, 0.1, (IMAGES, 1))
    images[0] = rng.standard_normal(VALUES) if planted == "noise" else other + normal()
    mean, variance = images.mean(0), images.var(0)
    order = np.concatenate([rng.permutation(IMAGES) for _ in range(EPOCHS)])
    timesteps = rng.integers(0, 1000, len(order))
    share, noise = SHARES[timesteps][:, None], rng.standard_normal((len(order), VALUES))
    noisy = np.sqrt(share) * images[order] + np.sqrt(1 - share) * noise
    clean = mean + np.sqrt(share) * variance / (share * variance + 1 - share) * (noisy - np.sqrt(share) * mean)
    predicted = (noisy - np.sqrt(share) * clean) / np.sqrt(1 - share)
    return order, timesteps, ((predicted - noise) ** 2).mean(1)


@pytest.mark.parametrize("planted", ["noise", "another person"])
def test_planted_images_are_among_the_worst_five_percent(planted):
    """In 95 % of the runs; and where an image is said to stand out, it is nearly always the planted one."""
    found, named, wrongly_named = 0, 0, 0
    for seed in range(40):
        relative = relative_losses(*trained(planted, seed))
        found += (relative > relative[0]).sum() < 0.05 * IMAGES
        high, _ = outliers(relative)
        named += 0 in high
        wrongly_named += len(set(high) - {0})
    assert found >= 38
    assert named >= 20
    assert wrongly_named <= 10


def test_the_timestep_says_nothing_about_an_image():
    """Losses that depend on the timestep alone, over four orders of magnitude: no image stands out, although the first one saw only
    easy timesteps, and none has another relative loss than 1."""
    rng = np.random.default_rng(0)
    images, timesteps = np.tile(np.arange(20), 50), rng.integers(0, 1000, 1000)
    timesteps[images == 0] = rng.integers(900, 1000, 50)
    relative = relative_losses(images, timesteps, 10 ** (-4 * timesteps / 1000))
    assert np.abs(np.log(relative)).max() < 0.02
    assert outliers(relative) == ([], [])


def test_an_image_that_is_learned_at_once_is_named():
    rng = np.random.default_rng(0)
    images, timesteps = np.tile(np.arange(20), 20), rng.integers(0, 1000, 400)
    losses = rng.lognormal(-timesteps / 300, 0.2) * np.where(images == 7, 0.3, 1) * np.where(images == 9, 2.5, 1)
    relative = relative_losses(images, timesteps, losses)
    assert outliers(relative) == ([9], [7])
    assert relative[7] == pytest.approx(0.3, rel=0.15)
    assert relative[9] == pytest.approx(2.5, rel=0.15)


def test_images_with_few_samples_are_not_judged():
    images = np.array([0] * 20 + [1] * (MIN_SAMPLES - 1))
    relative = relative_losses(images, np.arange(len(images)), np.where(images == 1, 9.0, 1.0))
    assert relative[0] == pytest.approx(1)
    assert np.isnan(relative[1])
    assert outliers(relative) == ([], [])


NAMES = ["a.png", "b.png", "a.png", "b.png"]
"""Two images at two resolutions each."""


def recorded(folder, steps: range, fails: bool = False) -> None:
    """Record these steps of a run of 40, each with two examples and a regularization image."""
    folder.mkdir(exist_ok=True)
    losses = ImageLosses(folder / "s.jsonl", folder / "r.json", NAMES, lambda step: list(step.examples), never_due, steps.start)
    try:
        with losses:
            for number in steps:
                step = OptimizerStep(number, 0, Bucket(64, 64), (number % 4, (number + 1) % 4), (0, 1))
                losses.after_losses(step, [(number, 0.1 * number + 0.3), (number + 1, 0.7), (5, 100.0), (6, 100.0)])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


def never_due(before: int, after: int) -> bool:
    return False


def test_a_run_that_resumes_records_what_the_whole_one_does(tmp_path, capsys):
    recorded(tmp_path / "whole", range(40))
    recorded(tmp_path / "parts", range(30), fails=True)
    assert not (tmp_path / "parts" / "r.json").exists()
    with (tmp_path / "parts" / "s.jsonl").open("a") as file:
        for line in ('{"step": 3}', '{"step": "a", "samples": []}', '{"step": 4, "samples": [[0, 1, 0.5], [99, 1, 0.5]]}', "[]"):
            file.write(line + "\n")
        file.write('{"step": 30, "samples": [[0, 1')  # killed while it wrote
    recorded(tmp_path / "parts", range(25, 40))  # from the checkpoint
    for name in ("s.jsonl", "r.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "whole" / "s.jsonl").read_text().splitlines()]
    assert lines[1] == {"step": 1, "samples": [[1, 1, 0.4], [2, 2, 0.7]]}
    record = json.loads((tmp_path / "whole" / "r.json").read_text())
    assert record["relative_loss"].keys() == {"a.png", "b.png"}
    assert capsys.readouterr().out.splitlines()[0].startswith("loss per image: ")


def test_a_run_without_a_sample_has_a_record(tmp_path, capsys):
    recorded(tmp_path / "run", range(0))
    assert json.loads((tmp_path / "run" / "r.json").read_text()) == {"relative_loss": {}, "never_fit": [], "learned_at_once": []}
    assert capsys.readouterr().out == "loss per image: too few samples to compare them\n"
