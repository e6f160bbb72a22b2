"""Regularization images: their order, their batches, and the loss that they add, against its formula."""

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import DataError
from common.project import ProjectSettings
from training.config import TrainSettings
from training.data.batches import Batch, BatchReader, draw
from training.data.buckets import Bucket, add_regularization, assign_bucket, run_order
from training.data.cache_files import CachedExample
from training.data.dataset import read_images
from training.data.examples import Example
from training.models.sdxl import Schedule
from training.plan import make_plan, result_fingerprint
from training.system.process_group import ProcessGroup
from training.system.processes import RankInfo

SQUARE, WIDE = Bucket(64, 64), Bucket(128, 64)


def steps_of(epochs: int, batch: int = 4, seed: int = 0):
    order = run_order([SQUARE] * 10, [1] * 10, epochs, batch, seed)
    buckets, repeats = [SQUARE, WIDE, SQUARE, WIDE, WIDE, SQUARE], [1, 2, 1, 1, 1, 1]
    return order, add_regularization(order, buckets, repeats, batch, seed), buckets


def test_each_step_has_one_regularization_image_for_each_example_and_is_otherwise_unchanged():
    order, paired, buckets = steps_of(epochs=7)
    assert [replace(step, regularization=()) for step in paired] == order
    for step in paired:
        assert len(step.regularization) == len(step.examples)
        assert len({buckets[index] for index in step.regularization}) == 1


def test_the_order_depends_on_the_seed_alone_and_a_longer_run_begins_with_it():
    first, again, other = (steps_of(epochs=7, seed=seed)[1] for seed in (0, 0, 1))
    assert first == again
    assert [step.regularization for step in first] != [step.regularization for step in other]
    longer = steps_of(epochs=40)[1]
    full = [step.regularization for step in first if len(step.examples) == 4]
    assert [step.regularization for step in longer][: len(full)] == full


def test_all_images_come_as_often_as_their_repeats_say():
    counts = Counter(index for step in steps_of(epochs=210)[1] for index in step.regularization)
    assert sum(counts.values()) == 2100
    for index, repeats in enumerate([1, 2, 1, 1, 1, 1]):
        assert counts[index] == pytest.approx(300 * repeats, abs=12)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_fewer_images_than_a_batch_are_enough(batch):
    order = run_order([SQUARE] * 5, [1] * 5, 3, batch, 0)
    paired = add_regularization(order, [WIDE], [1], batch, 0)
    assert [step.regularization for step in paired] == [(0,) * len(step.examples) for step in order]


@pytest.fixture
def reader(tmp_path) -> BatchReader:
    """Six images of one shape, and two regularization images of another."""
    examples = []
    for index in range(8):
        side = 300 if index < 6 else 500
        placement = assign_bucket(side, 300, resolution=128, step=64, max_side=256)
        generator = torch.Generator().manual_seed(index)
        shape = (4, placement.bucket.height // 8, placement.bucket.width // 8)
        save_file(
            {name: torch.randn(shape, generator=generator) for name in ("mean", "log_variance")}, tmp_path / f"{index}.latents"
        )
        text = {"hidden": torch.full((1, 77, 6), float(index)), "pooled": torch.full((1, 3), float(index))}
        save_file(text, tmp_path / f"{index}.text")
        files = tmp_path / f"{index}.latents", tmp_path / f"{index}.text"
        examples.append(CachedExample(f"{index}.png", placement, *files, 1, tmp_path / "empty"))
    how = {"seed": 5, "caption_dropout": 0.0, "micro_batch": 2, "global_batch": 4, "timesteps": 1000, "pin": False}
    return BatchReader(examples[:6], **how, regularization=examples[6:], prior_weight=0.25)


def order_of(reader: BatchReader):
    buckets = [example.placement.bucket for example in reader.examples]
    order = run_order(buckets, [1] * 6, 3, 4, reader.seed)
    priors = [example.placement.bucket for example in reader.regularization]
    return add_regularization(order, priors, [1, 1], 4, reader.seed)


def test_a_step_has_micro_batches_of_its_examples_and_then_of_regularization_images(reader):
    for step in order_of(reader):
        batches = reader(step)
        count = len(batches) // 2
        n = len(step.examples)
        for part, indices, examples, weight, is_prior in (
            (batches[:count], step.examples, reader.examples, 1.0, False),
            (batches[count:], step.regularization, reader.regularization, 0.25, True),
        ):
            assert sum(batch.weights.sum() for batch in part) == pytest.approx(weight)
            weights = [value for batch in part for value in batch.weights.tolist()]
            assert weights[:n] == [pytest.approx(weight / n)] * n
            for slot, index in enumerate(indices):
                batch, position = part[slot // 2], slot % 2
                assert batch.hidden[position, 0, 0] == float(examples[index].name.removesuffix(".png"))
                shape = tuple(batch.mean.shape[1:])
                _, drawn = draw(5, step.number * 4 + slot, shape, 1, 0.0, 1000, is_prior=is_prior)
                assert torch.equal(batch.noise[position], drawn["noise"])
    _, first = draw(5, 0, (4, 8, 8), 1, 0.0, 1000)
    _, second = draw(5, 0, (4, 8, 8), 1, 0.0, 1000, is_prior=True)
    assert not torch.equal(first["noise"], second["noise"])


def test_examples_are_drawn_as_without_regularization_images(reader):
    plain = replace(reader, regularization=(), prior_weight=1.0)
    for step in order_of(reader):
        with_priors, without = reader(step), plain(replace(step, regularization=()))
        for ours, theirs in zip(with_priors, without, strict=False):
            assert all(torch.equal(getattr(ours, part.name), getattr(theirs, part.name)) for part in fields(Batch))


def test_processes_share_all_micro_batches(reader):
    step = order_of(reader)[0]
    parts = [replace(reader, group=ProcessGroup(RankInfo(rank=rank, world_size=2)))(step) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    total = sum(batch.weights.sum() for part in parts for batch in part)
    assert total == pytest.approx(1.25)


def example(number: int, **changes) -> Example:
    plain = Example(Path(f"{number}.png"), f"{number}.png", "sks, photo", 1024, 1024, 1, f"{number:064x}", trigger="sks")
    return replace(plain, **changes)


def test_the_plan_keeps_regularization_images_out_of_everything_but_the_steps():
    images = [example(number) for number in range(50)]
    priors = [example(1000 + n, trigger="", is_regularization=True, class_word="woman", caption="woman") for n in range(7)]
    train = TrainSettings()
    plain, plan = make_plan(images, train, Schedule()), make_plan([*images, *priors], train, Schedule())
    assert (plan.examples, plan.held_out, len(plan.order)) == (plain.examples, plain.held_out, len(plain.order))
    assert [replace(each, resolutions=()) for each in plan.regularization] == priors
    assert plan.all_examples == [*plan.examples, *plan.held_out, *plan.regularization]
    assert len(plan.all_placements) == 57
    assert "regularization: 7 images (woman) of weight 1, one with each training sample" in plan.announcement()
    before, after = (result_fingerprint(each, train, "sks", "unet") for each in (plain, plan))
    assert after.keys() - before.keys() == {"regularization images"}
    assert {name: after[name] for name in before} == before


def test_the_arithmetic_of_several_concepts():
    images = [example(n, trigger="alice", repeats=2) for n in range(10)]
    images += [example(100 + n, trigger="bob", repeats=3, caption="bob, photo") for n in range(5)]
    plan = make_plan(images, TrainSettings(), Schedule())
    assert sum(len(step.examples) for step in plan.order) == 20 * (10 * 2 + 5 * 3)
    assert "trigger word alice: 10 images, 400 training samples" in plan.announcement()
    assert "trigger word bob: 5 images, 300 training samples" in plan.announcement()
    assert result_fingerprint(plan, TrainSettings(), "sks", "")["trigger words"] == "alice, bob"


def test_an_image_without_caption_and_class_is_refused_with_the_remedy(stage):
    stage.add("coffee")
    (stage.dataset / "reg").mkdir()
    stage.photographs["chelsea"].save(stage.dataset / "reg" / "a.png")
    project = ProjectSettings(trigger_word="sks", dataset_dir=stage.dataset)
    with pytest.raises(
        DataError, match=r"1 regularization images have neither a caption nor a class \(reg/a\.png\); write a caption"
    ):
        read_images(project, TrainSettings().data)
    (stage.dataset / "reg" / "a.txt").write_text("a cat")
    examples, left_out = read_images(project, TrainSettings().data)
    assert [(each.name, each.caption, each.is_regularization) for each in examples] == [
        ("coffee.png", "sks, photo, outdoors", False),
        ("reg/a.png", "a cat", True),
    ]
    assert left_out == 0
    (stage.images / "folder.toml").write_text("resolution = [1024, 1000]")
    with pytest.raises(DataError, match=r"images/folder\.toml: resolution must be a multiple of 64, at most 2048"):
        read_images(project, TrainSettings().data)
    (stage.images / "folder.toml").write_text("resolution = [1024, 512]\nmask_weight = 0.5")
    examples, _ = read_images(project, TrainSettings().data)
    assert [(each.resolutions, each.mask_weight) for each in examples] == [((1024, 512), 0.5), ((), None)]
    off = replace(TrainSettings().data, prior_weight=0.0)
    assert len(read_images(project, off)[0]) == 1


def test_an_image_of_the_data_set_is_not_used_for_regularization(stage):
    stage.add("coffee", "a.png")
    (stage.dataset / "regularization" / "1_cup").mkdir(parents=True)
    for name in ("same.png", "other.png"):
        stage.add("chelsea" if name == "other.png" else "coffee", f"../regularization/1_cup/{name}", None)
    result = stage.run("--check")
    assert "regularization/1_cup/same.png: is the same image as images/a.png; remove one of the two" in result.stdout
    assert "regularization: 1 images (cup)" in result.stdout
    assert result.returncode == 1
    assert "1 images cannot be trained on and are left out" in result.stderr


@pytest.mark.parametrize("own_captions", [False, True])
def test_a_class_of_regularization_images_with_the_trigger_word_is_refused(stage, own_captions):
    stage.add("coffee", "a.png")
    (stage.dataset / "reg" / "1_Sks_cup").mkdir(parents=True)
    stage.add("chelsea", "../reg/1_Sks_cup/b.png", "a cup" if own_captions else None)
    project = ProjectSettings(trigger_word="sks", dataset_dir=stage.dataset)
    if own_captions:
        assert len(read_images(project, TrainSettings().data)[0]) == 2
        return
    with pytest.raises(DataError, match="reg/1_Sks_cup: its class 'Sks cup' contains the trigger word 'sks'"):
        read_images(project, TrainSettings().data)
