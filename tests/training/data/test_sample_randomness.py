"""What is random about a sample: a pure function of seed and position, with the statistics it should have."""

import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from training.data.batches import draw as draw_sample

SHAPE = (4, 16, 24)
draw = partial(draw_sample, timesteps=1000)


def parts(drawn) -> tuple:
    variant, sample = drawn
    return variant, {name: tensor.flatten().tolist() for name, tensor in sample.items()}


@pytest.fixture(scope="module")
def many():
    """The draws of a run's first 4000 samples."""
    return [draw(0, position, SHAPE, 8, 0.05) for position in range(4000)]


def test_a_draw_depends_on_seed_and_position_alone():
    positions = [0, 1, 2, 77, 2**40]
    alone = {position: parts(draw(5, position, SHAPE, 8, 0.05)) for position in positions}
    random.Random(0).shuffle(positions)
    torch.manual_seed(1)
    with ThreadPoolExecutor(3) as pool:
        elsewhere = dict(
            zip(positions, pool.map(lambda position: parts(draw(5, position, SHAPE, 8, 0.05)), positions), strict=True)
        )
    assert elsewhere == alone
    assert len({repr(value) for value in alone.values()}) == len(positions)
    assert parts(draw(6, 0, SHAPE, 8, 0.05)) != alone[0]


def test_draws_are_the_same_on_every_machine():
    variant, drawn = draw(3, 12, (4, 2, 2), 8, 0.05)
    assert (drawn["timesteps"].item(), variant) == (538, 2)
    assert drawn["noise"].flatten()[:3].tolist() == pytest.approx([-0.9141335, -0.1537180, 0.0402285], abs=1e-6)


def test_shapes_and_types():
    _, drawn = draw(0, 0, SHAPE, 8, 0.05)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in drawn.items()} == {
        "timesteps": ((), torch.int64),
        "offset": ((4, 1, 1), torch.float32),
        "latent_noise": (SHAPE, torch.float32),
        "noise": (SHAPE, torch.float32),
    }


def test_timesteps_are_uniform_and_all_occur(many):
    drawn = torch.tensor([draw(1, position, (1, 1, 1), 1, 0)[1]["timesteps"] for position in range(20000)])
    assert drawn.unique().tolist() == list(range(1000))
    counts = drawn.bincount(minlength=1000).float()
    chi_square = ((counts - 20) ** 2 / 20).sum().item()
    assert 999 - 5 * 2 * 999**0.5 < chi_square < 999 + 5 * 2 * 999**0.5  # variance 2 x 999: wider than five deviations


def test_another_distribution_of_timesteps_changes_nothing_else():
    quantiles = []

    def timestep_at(quantile: float) -> int:
        quantiles.append(quantile)
        return int(1000 * quantile)

    timesteps = []
    for position in range(2000):
        (variant, sample), (other_variant, other) = (
            draw(0, position, (1, 2, 2), 8, 0.05),
            draw(0, position, (1, 2, 2), 8, 0.05, timestep_at=timestep_at),
        )
        timesteps.append(other.pop("timesteps").item())
        assert variant == other_variant
        assert all(torch.equal(tensor, sample[name]) for name, tensor in other.items())
        assert (
            draw(0, position, (1, 2, 2), 8, 0.05, timestep_at=lambda quantile: int(1000 * quantile))[1]["timesteps"]
            == timesteps[-1]
        )
    drawn = torch.tensor(quantiles, dtype=torch.float64).sort().values
    expected = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert (drawn - expected).abs().max().item() < 1.63 / 2000**0.5  # Kolmogorov and Smirnov: 1 in 100 would be further away


def test_timesteps_span_the_schedule_of_the_base_model():
    for length in (1, 500, 2000):
        drawn = [draw_sample(0, position, (1, 1, 1), 8, 0.05, length)[1]["timesteps"].item() for position in range(300)]
        assert 0 <= min(drawn) <= max(drawn) < length
        assert max(drawn) >= 0.95 * (length - 1)


def test_captions_are_dropped_and_varied_in_the_requested_shares(many):
    variants = [variant for variant, _ in many]
    assert variants.count(None) / len(many) == pytest.approx(0.05, abs=0.015)
    assert [variants.count(variant) / len(many) for variant in range(8)] == pytest.approx([0.95 / 8] * 8, abs=0.02)
    assert all(draw(0, position, (1, 1, 1), 8, 0)[0] is not None for position in range(500))
    assert all(draw(0, position, (1, 1, 1), 8, 1)[0] is None for position in range(500))


def test_changed_dropout_changes_nothing_else():
    for position in range(20):
        (_, kept), (_, dropped) = draw(0, position, SHAPE, 8, 0), draw(0, position, SHAPE, 8, 1)
        assert all(torch.equal(tensor, dropped[name]) for name, tensor in kept.items())


def test_noises_are_standard_normal_and_independent(many):
    noise, latent_noise = (torch.stack([drawn[name] for _, drawn in many[:400]]) for name in ("noise", "latent_noise"))
    offset = torch.stack([drawn["offset"] for _, drawn in many])
    for numbers, tolerance in ((noise, 0.008), (latent_noise, 0.008), (offset, 0.04)):
        assert numbers.mean().item() == pytest.approx(0, abs=tolerance)
        assert numbers.var().item() == pytest.approx(1, abs=2 * tolerance)
        assert numbers.pow(4).mean().item() == pytest.approx(3, abs=10 * tolerance)
    assert (noise * latent_noise).mean().item() == pytest.approx(0, abs=0.008)
    assert (noise[1:] * noise[:-1]).mean().item() == pytest.approx(0, abs=0.008)
    assert (noise[:, 1:] * noise[:, :-1]).mean().item() == pytest.approx(0, abs=0.008)
    timesteps = torch.tensor([drawn["timesteps"] for _, drawn in many], dtype=torch.float32)
    assert torch.corrcoef(torch.stack([timesteps, offset[:, 0, 0, 0]]))[0, 1].item() == pytest.approx(0, abs=0.08)


def test_positions_and_seeds_share_no_numbers():
    """No three consecutive numbers of one occur anywhere in another: their streams do not overlap."""
    seen = set()
    for seed, position in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2**63 - 1, 0)):
        _, drawn = draw(seed, position, (4, 128, 128), 8, 0.05)
        bits = torch.cat([drawn["latent_noise"].flatten(), drawn["noise"].flatten()]).view(torch.int32).tolist()
        windows = set(zip(bits, bits[1:], bits[2:], strict=False))
        assert len(windows) == len(bits) - 2
        assert not windows & seen
        seen |= windows
