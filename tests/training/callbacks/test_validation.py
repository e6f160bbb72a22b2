"""The validation loss is measured on all held-out images, at fixed timesteps of the base model's noise schedule."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from training.callbacks.validation import STRATA, Validator
from training.data.batches import BatchReader
from training.data.buckets import Bucket, OptimizerStep, assign_bucket
from training.data.cache_files import CachedExample
from training.loop import Progress
from training.system.process_group import ProcessGroup
from training.system.processes import RankInfo

SIZES = [(128, 128), (300, 150), (128, 128)]


@pytest.fixture
def validator_of(tmp_path):
    """`validator_of(evaluate, **changes)`: a validator of three cached images of two shapes."""
    examples = []
    for index, size in enumerate(SIZES):
        placement = assign_bucket(*size, resolution=128, step=64, max_side=256)
        latents, text = tmp_path / f"{index}.latents", tmp_path / f"{index}.text"
        shape = (4, placement.bucket.height // 8, placement.bucket.width // 8)
        save_file({"mean": torch.full(shape, float(index)), "log_variance": torch.zeros(shape)}, latents)
        save_file({"hidden": torch.full((2, 77, 6), float(index)), "pooled": torch.zeros(2, 3)}, text)
        examples.append(CachedExample(f"{index}.png", placement, latents, text, 2, tmp_path / "never read"))

    def make(evaluate, rank: int = 0, world_size: int = 1, **changes) -> Validator:
        how = {"seed": 3, "caption_dropout": 0.0, "micro_batch": 3, "global_batch": 4, "timesteps": 1000, "pin": False}
        group = ProcessGroup(RankInfo(rank=rank, world_size=world_size))
        return Validator(BatchReader(examples, **how | changes, group=group), evaluate)

    return make


def samples_of(validator_of, **changes) -> dict[int, list[tuple]]:
    """Image -> what the validator hands out of it: timestep, weight, noise."""
    found = defaultdict(list)
    for batch in validator_of(None, **changes).batches():
        for mean, hidden, timestep, weight, noise in zip(
            batch.mean, batch.hidden, batch.timesteps, batch.weights, batch.noise, strict=True
        ):
            assert (hidden == mean.flatten()[0]).all()  # the image's own caption, not the empty one
            if weight:
                found[int(mean.flatten()[0])].append((int(timestep), float(weight), noise.flatten().tolist()))
    return found


@pytest.mark.parametrize("timesteps", [500, 1000, 2000])
def test_each_image_is_seen_once_in_each_stratum_of_the_schedule(validator_of, timesteps):
    found = samples_of(validator_of, timesteps=timesteps)
    assert found.keys() == {0, 1, 2}
    for samples in found.values():
        strata = [timestep * STRATA // timesteps for timestep, _, _ in samples]
        assert sorted(strata) == list(range(STRATA))
    every = [timestep for samples in found.values() for timestep, _, _ in samples]
    assert len(set(every)) == len(every) == 3 * STRATA


def test_the_weights_make_the_mean_over_images_and_timesteps(validator_of):
    weights = [weight for samples in samples_of(validator_of).values() for _, weight, _ in samples]
    assert weights == pytest.approx([1 / (3 * STRATA)] * 3 * STRATA)


@pytest.mark.parametrize("changes", [{"micro_batch": 1}, {"micro_batch": 7}])
def test_noise_and_timesteps_depend_on_the_seed_alone(validator_of, changes):
    assert samples_of(validator_of, **changes) == samples_of(validator_of)
    assert samples_of(validator_of, seed=4) != samples_of(validator_of)


def test_processes_share_the_work_without_overlap(validator_of):
    shares = [samples_of(validator_of, rank=rank, world_size=2) for rank in range(2)]
    whole = samples_of(validator_of)
    for image, samples in whole.items():
        assert sorted(shares[0][image] + shares[1][image]) == sorted(samples)


def test_the_result_is_what_the_step_measures(validator_of):
    validator = validator_of(lambda batches: 0.25 * len(list(batches)))
    step = OptimizerStep(6, 1, Bucket(64, 64), (0,))
    before = Progress(7, validations={1: 3.0})
    progress, line = validator.after_epoch(step, 2, before)
    measured = 0.25 * len(list(validator.batches()))
    assert progress == replace(before, validations={1: 3.0, 2: measured})
    assert line == f"  validation {measured:.4f} (smoothed {(3 + measured) / 2:.4f})"
