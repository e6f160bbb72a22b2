"""Batches of a run: read from caches and drawn from the seed, the same however the run is cut into pieces."""

from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import save_file

from training.data.batches import Batch, BatchReader, draw
from training.data.buckets import assign_bucket, run_order
from training.data.cache_files import CachedExample, read_latents, read_text
from training.system.process_group import ProcessGroup
from training.system.processes import RankInfo

SEED = 21
DROPOUT = 0.3
SIZES = [(300, 300), (300, 300), (300, 300), (500, 260), (500, 260)]


@pytest.fixture
def reader_of(tmp_path):
    """`reader_of(micro_batch, global_batch)`: a reader of five cached images of two shapes, two of them with two variants."""
    examples = []
    for index, size in enumerate(SIZES):
        placement = assign_bucket(*size, resolution=128, step=64, max_side=256)
        shape = (4, placement.bucket.height // 8, placement.bucket.width // 8)
        generator = torch.Generator().manual_seed(index)
        parts = {name: torch.randn(shape, generator=generator) for name in ("mean", "log_variance")}
        variants = 1 + index % 2
        save_file(parts, tmp_path / f"{index}.latents")
        text = {
            "hidden": torch.randn(variants, 77, 6, generator=generator),
            "pooled": torch.randn(variants, 3, generator=generator),
        }
        save_file(text, tmp_path / f"{index}.text")
        files = tmp_path / f"{index}.latents", tmp_path / f"{index}.text"
        save_file({name: -tensor for name, tensor in text.items()}, tmp_path / f"{index}.class")
        of_class = {"class_text": tmp_path / f"{index}.class", "class_variants": frozenset({0} if index < 2 else range(variants))}
        examples.append(CachedExample(f"{index}.png", placement, *files, variants, tmp_path / "empty.text", **of_class))
    save_file({"hidden": torch.full((1, 77, 6), 9.0), "pooled": torch.full((1, 3), 9.0)}, tmp_path / "empty.text")

    def make(micro_batch: int = 2, global_batch: int = 4, timesteps: int = 1000, prior: float = 0.0) -> BatchReader:
        return BatchReader(examples, SEED, DROPOUT, micro_batch, global_batch, timesteps, pin=False, prior_preservation=prior)

    return make


def order_of(reader: BatchReader, epochs: int = 6):
    buckets = [example.placement.bucket for example in reader.examples]
    return run_order(buckets, [1] * len(buckets), epochs, reader.global_batch, SEED)


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(getattr(first, part.name), getattr(second, part.name)) for part in fields(Batch))


def test_a_run_in_two_halves_is_the_whole_run(reader_of):
    reader = reader_of()
    order = order_of(reader)
    whole = [reader(step) for step in order]
    half = len(order) // 2
    first, second = reader_of(), reader_of()
    rest = [second(step) for step in order[half:]]  # in another process, which did not read the first half
    halves = [first(step) for step in order[:half]] + rest
    assert len(halves) == len(whole)
    assert all(same(*pair) for ours, theirs in zip(halves, whole, strict=True) for pair in zip(ours, theirs, strict=True))


def test_indices_name_the_samples_of_a_process_in_their_order(reader_of):
    whole = reader_of(micro_batch=1, global_batch=4)
    for step in order_of(whole):
        assert whole.indices(step) == list(step.examples)
        shares = [replace(whole, group=ProcessGroup(RankInfo(rank=rank, world_size=2))) for rank in range(2)]
        assert [share.indices(step) for share in shares] == [list(step.examples[rank::2]) for rank in range(2)]
        for reader in (whole, *shares):
            batches = [batch for batch in reader(step) if batch.weights[0]]
            means = [batch.mean[0] for batch in batches]
            assert all(
                torch.equal(mean, read_latents(reader.examples[index].latents)[0])
                for mean, index in zip(means, reader.indices(step), strict=True)
            )
        step = replace(step, regularization=step.examples)
        assert replace(whole, regularization=whole.examples).indices(step) == list(step.examples)


def test_a_sample_combines_cache_and_randomness(reader_of):
    reader = reader_of(micro_batch=4)
    dropped = 0
    for step in order_of(reader):
        (batch,) = reader(step)
        for slot, index in enumerate(step.examples):
            example = reader.examples[index]
            variant, drawn = draw(SEED, step.number * 4 + slot, tuple(batch.mean.shape[1:]), example.variants, DROPOUT, 1000)
            generator = torch.Generator().manual_seed(index)
            mean, log_variance = (torch.randn(batch.mean.shape[1:], generator=generator) for _ in range(2))
            hidden = torch.randn(example.variants, 77, 6, generator=generator)
            pooled = torch.randn(example.variants, 3, generator=generator)
            assert torch.equal(batch.mean[slot], mean)
            assert torch.equal(batch.log_variance[slot], log_variance)
            for name in ("latent_noise", "noise", "offset", "timesteps"):
                assert torch.equal(getattr(batch, name)[slot], drawn[name])
            if variant is None:
                assert (batch.hidden[slot] == 9).all()
                assert (batch.pooled[slot] == 9).all()
                dropped += 1
            else:
                assert torch.equal(batch.hidden[slot], hidden[variant])
                assert torch.equal(batch.pooled[slot], pooled[variant])
            assert batch.add_time_ids[slot].tolist() == list(example.placement.add_time_ids)
    assert dropped > 2
    assert batch.timesteps.dtype == torch.int64
    assert batch.add_time_ids.dtype == torch.float32


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_of_any_size_hold_the_same_samples(reader_of, micro_batch):
    reader, whole = reader_of(micro_batch), reader_of(4)
    for step in order_of(reader):
        batches, (expected,) = reader(step), whole(step)
        real = len(step.examples)
        for part in fields(Batch):
            joined = torch.cat([getattr(batch, part.name) for batch in batches])[:real]
            assert torch.equal(joined, getattr(expected, part.name)[:real])


def test_padding_has_weight_zero_and_the_real_samples_share_the_step(reader_of):
    reader = reader_of()
    short = 0
    for step in order_of(reader, epochs=5):
        batches = reader(step)
        weights = torch.cat([batch.weights for batch in batches])
        real = len(step.examples)
        assert {batch.mean.shape[0] for batch in batches} == {2}
        assert len(batches) == -(-real // 2)
        assert weights[:real].tolist() == pytest.approx([1 / real] * real)
        assert weights[real:].tolist() == [0.0] * (len(weights) - real)
        short += real % 2
    assert short


def test_image_names_of_a_step_are_listed_once_each(reader_of):
    reader = reader_of()
    for step in order_of(reader):
        assert reader.image_names(step) == ", ".join(sorted({f"{index}.png" for index in step.examples}))


def priors_of(reader: BatchReader) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, float]]:
    """What is to remain of the base model: (step, timestep, which is of one sample here) -> caption, and weight."""
    found = {}
    for step in order_of(reader):
        for batch in reader(step):
            for number, row in enumerate(batch.prior_rows.tolist()):
                caption = batch.prior_hidden[number], batch.prior_pooled[number]
                is_empty = batch.hidden[row][0, 0].item() == 9.0
                for prior, own in zip(caption, (batch.hidden[row], batch.pooled[row]), strict=True):
                    assert torch.equal(prior, own if is_empty else -own)  # of the same variant
                key = step.number, batch.timesteps[row].item()
                assert key not in found
                found[key] = *caption, batch.prior_weights[number].item()
    return found


@pytest.mark.parametrize("global_batch", [1, 4, 8])
def test_every_fifth_sample_of_a_run_is_a_prior_as_well_whatever_the_micro_batches_are(reader_of, global_batch):
    found = [priors_of(reader_of(micro, global_batch, prior=0.5)) for micro in {1, min(3, global_batch), global_batch}]
    order = order_of(reader_of(global_batch=global_batch))
    count = sum((step.number * global_batch + slot) % 5 == 0 for step in order for slot in range(len(step.examples)))
    assert len(found[0]) == count > 5
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(
            torch.equal(one, two) for key, each in other.items() for one, two in zip(each[:2], found[0][key][:2], strict=True)
        )
    weights = [(hidden[0, 0].item() == 9.0, weight) for hidden, _, weight in found[0].values()]
    assert {weight for is_empty, weight in weights if is_empty} == {0.0}  # the same caption with and without the LoRA
    assert {0.5 * 5 / global_batch} <= {weight for is_empty, weight in weights if not is_empty} <= {0.5 * 5 / global_batch, 0.0}


def test_a_variant_without_the_trigger_word_is_no_prior(reader_of):
    reader = reader_of(micro_batch=1, global_batch=1, prior=1.0)
    variants = [read_text(reader.examples[1].text, number)["hidden"] for number in range(2)]
    found = {number: set() for number in range(2)}
    for step in order_of(reader, epochs=60):
        for batch in reader(step):
            for row, weight in zip(batch.prior_rows.tolist(), batch.prior_weights.tolist(), strict=True):
                for number, hidden in enumerate(variants):
                    if torch.equal(batch.hidden[row], hidden):
                        found[number].add(weight)
    assert found == {0: {5.0}, 1: {0.0}}


def test_a_prior_changes_nothing_else_of_a_batch_and_there_is_none_by_default(reader_of):
    without, having = reader_of(), reader_of(prior=1.0)
    for step in order_of(without):
        for one, two in zip(without(step), having(step), strict=True):
            of_prior = {name for name in vars(one) if name.startswith("prior_")}
            assert all(getattr(one, name).numel() == 0 for name in of_prior)
            assert all(torch.equal(value, getattr(two, name)) for name, value in vars(one).items() if name not in of_prior)


def test_padding_is_no_prior(reader_of):
    reader = reader_of(micro_batch=8, global_batch=8, prior=1.0)
    for step in order_of(reader):
        (batch,) = reader(step)
        assert all(row < len(step.examples) for row in batch.prior_rows.tolist())
