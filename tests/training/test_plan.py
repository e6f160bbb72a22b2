"""What a run will do, what it says about that, and which changes make it another run."""

from dataclasses import replace
from pathlib import Path

import pytest

from training.config import TrainSettings
from training.data.dataset import Example
from training.models.sdxl import Schedule
from training.plan import fingerprint, fingerprint_hash, make_plan

PLAIN, V, ZERO = Schedule(), Schedule("v_prediction"), Schedule("epsilon", zero_terminal_snr=True)


def example(number: int = 0, **changes) -> Example:
    sha256 = f"{number:064x}"
    plain = Example(Path(f"{number}.png"), f"{number}.png", "sks, photo", 1024, 1024, 1, sha256)
    return replace(plain, **changes)


def with_changes(**tables) -> TrainSettings:
    """The default settings with changes: `with_changes(run={"num_train_epochs": 3})`."""
    plain = TrainSettings()
    return replace(plain, **{table: replace(getattr(plain, table), **changes) for table, changes in tables.items()})


def plan_of(images: int = 25, schedule: Schedule = PLAIN, **tables):
    return make_plan([example(number) for number in range(images)], with_changes(**tables), schedule)


def test_few_image_steps_are_said_with_what_to_set():
    said = plan_of(25).announcement()
    assert "25 images in 1 bucket(s): 1024x1024 (25)." in said
    assert "20 epochs, 125 optimizer steps of 4, 500 image-steps" in said
    assert said.splitlines()[-1].startswith("500 image-steps are few")
    assert "Set NUM_TRAIN_EPOCHS=80" in said  # 80 x 25 = 2000
    assert plan_of(25, run={"num_train_epochs": 80}).image_steps == 2000


def test_from_800_image_steps_on_nothing_is_to_be_set():
    assert "are few" in plan_of(39).announcement()
    plan = plan_of(40, validation={"validation_fraction": 0.0})
    assert "are few" not in plan.announcement()
    assert plan.image_steps == 800


@pytest.mark.parametrize(
    ("images", "fraction", "count"),
    [
        (39, "auto", 0),
        (40, "auto", 2),
        (41, "auto", 3),
        (150, "auto", 8),
        (10, 0.1, 1),
        (10, 0.11, 2),
        (3, 0.5, 2),
        (1, 0.5, 0),
        (9, 0.0, 0),
    ],
)
def test_images_are_held_out_and_not_trained_on(images, fraction, count):
    plan = plan_of(images, validation={"validation_fraction": fraction})
    assert len(plan.held_out) == len(plan.held_out_placements) == count
    assert len(plan.examples) == len(plan.placements) == images - count
    assert {e.name for e in plan.all_examples} == {f"{number}.png" for number in range(images)}
    again = plan_of(images, validation={"validation_fraction": plan.held_out_share})
    assert [e.name for e in again.held_out] == [e.name for e in plan.held_out]
    assert ("held out" in plan.announcement()) == (count > 0)


def test_repeats_count_as_image_steps():
    plan = make_plan([example(0, repeats=40)], with_changes(), PLAIN)
    assert plan.image_steps == 800


def test_accumulation_makes_the_steps_larger_and_fewer():
    plan = plan_of(24, run={"gradient_accumulation_steps": 3})
    assert plan.global_batch == 12
    assert len(plan.order) == 40


@pytest.mark.parametrize(
    ("schedule", "objective", "expected"),
    [
        (PLAIN, {}, (5.0, 0.0357)),
        (V, {}, (0.0, 0.0)),
        (ZERO, {}, (0.0, 0.0)),
        (PLAIN, {"min_snr_gamma": 0.0, "noise_offset": 0.0}, (0.0, 0.0)),
        (V, {"min_snr_gamma": 1.0, "noise_offset": 0.1}, (1.0, 0.1)),
    ],
)
def test_auto_objective(schedule, objective, expected):
    plan = plan_of(schedule=schedule, objective=objective)
    assert (plan.min_snr_gamma, plan.noise_offset) == expected


DIFFERENT = {
    "rank": {"lora": {"lora_rank": 8}},
    "alpha": {"lora": {"lora_alpha": 8.0}},
    "targets": {"lora": {"lora_targets": "attention"}},
    "rate": {"optimizer": {"learning_rate": 2e-4}},
    "clipping": {"optimizer": {"max_grad_norm": 0.5}},
    "epochs": {"run": {"num_train_epochs": 21}},
    "batch": {"run": {"train_batch_size": 2}},
    "seed": {"run": {"train_seed": 1}},
    "resolution": {"data": {"resolution": 512}},
    "dropout": {"data": {"caption_dropout": 0.1}},
    "variants": {"data": {"caption_variants": 4}},
    "offset": {"objective": {"noise_offset": 0.0}},
    "gamma": {"objective": {"min_snr_gamma": 1.0}},
    "precision": {"model": {"mixed_precision": "no"}},
}
SAME = {
    "workers": {"data": {"dataloader_num_workers": 9}},
    "saving": {"saving": {"save_every_epochs": 1, "save_state_every_minutes": 1.0, "fresh": True}},
    "logging": {"logging": {"tensorboard": True}},
    "auto said": {"objective": {"min_snr_gamma": 5.0, "noise_offset": 0.0357}},
}


def fingerprint_of(plan, trigger="sks", digests=("unet", "vae"), **tables) -> str:
    return fingerprint_hash(fingerprint(plan, with_changes(**tables), trigger, digests))


@pytest.mark.parametrize("tables", DIFFERENT.values(), ids=DIFFERENT)
def test_another_setting_is_another_run(tables):
    assert fingerprint_of(plan_of(**tables), **tables) != fingerprint_of(plan_of())


@pytest.mark.parametrize("tables", SAME.values(), ids=SAME)
def test_what_decides_nothing_may_change(tables):
    assert fingerprint_of(plan_of(**tables), **tables) == fingerprint_of(plan_of())


def test_other_images_captions_and_models_are_another_run():
    same = fingerprint_of(plan_of())
    assert fingerprint_of(plan_of(), trigger="person") != same
    assert fingerprint_of(plan_of(), digests=("other", "vae")) != same
    assert fingerprint_of(plan_of(24)) != same
    for changes in ({"caption": "sks"}, {"repeats": 2}, {"sha256": "0" * 63 + "f"}):
        examples = [example(number) for number in range(25)]
        examples[24] = replace(examples[24], **changes)
        assert fingerprint_of(make_plan(examples, with_changes(), PLAIN)) != same
    moved = [replace(example(number), path=Path(f"/elsewhere/{number}.png")) for number in range(25)]
    assert fingerprint_of(make_plan(moved, with_changes(), PLAIN)) == same
