"""The validation loss is measured on all held-out images, at fixed timesteps of the base model's noise schedule."""

from collections import defaultdict

import pytest
import torch
from safetensors.torch import save_file

from training.data.buckets import assign_bucket
from training.data.cache import CachedExample
from training.monitor.validation import STRATA, Validator

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
        examples.append(CachedExample(f"{index}.png", placement, latents, text, variants=2))

    def make(evaluate, **changes) -> Validator:
        how = {"seed": 3, "micro_batch": 3, "timesteps": 1000}
        return Validator(examples, tmp_path / "never read", evaluate=evaluate, **how | changes)

    return make


def samples_of(validator_of, **changes) -> dict[int, list[tuple]]:
    """Image -> what the validator hands out of it: timestep, weight, noise."""
    found = defaultdict(list)

    def evaluate(batches) -> float:
        for batch in batches:
            for mean, hidden, timestep, weight, noise in zip(
                batch.mean, batch.hidden, batch.timesteps, batch.weights, batch.noise, strict=True
            ):
                assert (hidden == mean.flatten()[0]).all()  # the image's own caption, not the empty one
                if weight:
                    found[int(mean.flatten()[0])].append((int(timestep), float(weight), noise.flatten().tolist()))
        return 0.0

    validator_of(evaluate, **changes)()
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
    assert validator_of(lambda batches: 0.25)() == 0.25
