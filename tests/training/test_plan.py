"""What a run will do, what it announces, and which changes make it another run."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

import pytest

from common.errors import SettingsError
from common.settings import all_keys, setting
from training.config import ProcessSettings, TrainSettings
from training.data.examples import Example
from training.models.sdxl import Schedule
from training.plan import (
    NOT_RECORDED,
    changes,
    make_plan,
    recorded_name,
    result_fingerprint,
    runtime_settings,
    settings_of,
    short_hash,
)

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


def samples_of(plan) -> int:
    return sum(len(step.examples) for step in plan.order)


def test_few_training_samples_are_reported_with_what_to_set():
    said = plan_of(25).announcement()
    assert "25 images in 1 bucket(s): 1024x1024 (25)\n" in said
    assert "20 epochs, 125 optimizer steps of 4, 500 training samples" in said
    assert said.splitlines()[-1].startswith("500 training samples are few")
    assert "Set NUM_TRAIN_EPOCHS=80" in said  # 80 x 25 = 2000
    assert samples_of(plan_of(25, run={"num_train_epochs": 80})) == 2000


def test_from_2000_training_samples_on_there_is_no_warning():
    all_trained = {"validation": {"validation_fraction": 0.0}}
    assert plan_of(99, **all_trained).warnings() == [
        "1980 training samples are few: a likeness needs 2000 to 3000. Set NUM_TRAIN_EPOCHS=21, or add images."
    ]
    assert plan_of(100, **all_trained).warnings() == []


@pytest.mark.parametrize(("images", "repeats", "epochs"), [(25, 1, 80), (1, 1, 2000), (3, 40, 17), (150, 1, 15), (3000, 1, 1)])
def test_auto_epochs_are_those_that_are_recommended(images, repeats, epochs):
    examples = [example(number, repeats=repeats) for number in range(images)]
    plan = make_plan(examples, with_changes(run={"num_train_epochs": "auto"}), PLAIN)
    assert (plan.epochs, plan.warnings()) == (epochs, [])
    assert samples_of(plan) == epochs * repeats * len(plan.examples) >= 2000
    assert epochs == 1 or (epochs - 1) * repeats * len(plan.examples) < 2000
    assert fingerprint_of(plan, run={"num_train_epochs": "auto"}) == fingerprint_of(plan, run={"num_train_epochs": epochs})


@pytest.mark.parametrize("images", [1, 3, 25, 90])
@pytest.mark.parametrize("steps", [1, 7, 100, 501])
def test_a_run_of_a_number_of_steps_begins_like_a_longer_one(images, steps):
    plan = plan_of(images, run={"num_train_steps": steps})
    assert (len(plan.order), samples_of(plan), plan.shared_prefix_steps) == (steps, 4 * steps, steps)
    assert plan.order[-1].epoch == plan.epochs - 1
    assert plan_of(images, run={"num_train_steps": steps + 50}).order[:steps] == plan.order
    assert plan_of(images, run={"num_train_epochs": plan.epochs + 9}).order[:steps] == plan.order
    assert plan.warmup_steps == -(-steps // 20)
    few = [f"{4 * steps} training samples are few: a likeness needs 2000 to 3000. Set NUM_TRAIN_STEPS=500, or add images."]
    assert plan.warnings() == ([] if steps > 500 else few)
    assert f"\n{steps} optimizer steps of 4, up to epoch {plan.epochs}, {4 * steps} training samples" in plan.announcement()


def test_epochs_mean_nothing_where_the_steps_are_set():
    by_steps = {epochs: {"run": {"num_train_steps": 100, "num_train_epochs": epochs}} for epochs in (1, 20, "auto")}
    assert len({fingerprint_of(plan_of(**tables), **tables) for tables in by_steps.values()}) == 1
    assert fingerprint_of(plan_of(**by_steps[20]), **by_steps[20]) != fingerprint_of(plan_of(run={"num_train_epochs": 16}))


@pytest.mark.parametrize(
    ("images", "fraction", "count"),
    [
        (39, "auto", 0),
        (40, "auto", 2),
        (41, "auto", 3),
        (150, "auto", 8),
        (10, 0.1, 1),
        (10, 0.11, 2),
        (100, 0.07, 7),
        (100, 0.28, 28),
        (100, 0.065, 7),
        (3, 0.5, 2),
        (1, 0.5, 0),
        (9, 0.0, 0),
    ],
)
def test_images_are_held_out_and_not_trained_on(images, fraction, count):
    plan = plan_of(images, validation={"validation_fraction": fraction})
    assert len(plan.held_out) == len(plan.held_out_placements) == count
    assert len(plan.examples) == len(plan.placements) == images - count
    assert {e.name for e in [*plan.examples, *plan.held_out]} == {f"{number}.png" for number in range(images)}
    again = plan_of(images, validation={"validation_fraction": plan.validation_fraction})
    assert [e.name for e in again.held_out] == [e.name for e in plan.held_out]
    assert ("held out" in plan.announcement()) == (count > 0)


def test_repeats_count_as_training_samples():
    plan = make_plan([example(0, repeats=40)], with_changes(), PLAIN)
    assert samples_of(plan) == 800


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
        (PLAIN, {"loss_weighting": "debiased"}, (0.0, 0.0357)),
        (PLAIN, {"loss_weighting": "none"}, (0.0, 0.0357)),
    ],
)
def test_auto_objective(schedule, objective, expected):
    plan = plan_of(schedule=schedule, objective=objective)
    assert (plan.min_snr_gamma, plan.noise_offset) == expected


@pytest.mark.parametrize(
    ("schedule", "objective", "problem"),
    [
        (PLAIN, {"timestep_min": 1000}, "timestep_min: 1000 is beyond the 1000 timesteps of the base model"),
        (Schedule(timesteps=500), {"timestep_max": 501}, "timestep_max: 501 is beyond the 500 timesteps of the base model"),
        (ZERO, {"loss_weighting": "debiased"}, "set LOSS_WEIGHTING=min_snr"),
    ],
)
def test_objectives_that_a_schedule_does_not_have_are_refused(schedule, objective, problem):
    with pytest.raises(SettingsError) as refused:
        plan_of(schedule=schedule, objective=objective)
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)
    plan_of(schedule=replace(PLAIN, timesteps=schedule.timesteps), objective={"timestep_min": schedule.timesteps - 1})


def test_weighting_is_announced():
    assert "epsilon, weighting debiased, noise offset 0.0357" in plan_of(objective={"loss_weighting": "debiased"}).announcement()


DIFFERENT = {
    "rank": {"lora": {"lora_rank": 8}},
    "alpha": {"lora": {"lora_alpha": 8.0}},
    "targets": {"lora": {"lora_targets": "attention"}},
    "rate": {"optimizer": {"learning_rate": 2e-4}},
    "clipping": {"optimizer": {"max_grad_norm": 0.5}},
    "epochs": {"run": {"num_train_epochs": 21}},
    "steps": {"run": {"num_train_steps": 100}},
    "batch": {"run": {"train_batch_size": 2}},
    "seed": {"run": {"train_seed": 1}},
    "resolution": {"data": {"resolution": 512}},
    "dropout": {"data": {"caption_dropout": 0.1}},
    "variants": {"data": {"caption_variants": 4}},
    "offset": {"objective": {"noise_offset": 0.0}},
    "gamma": {"objective": {"min_snr_gamma": 1.0}},
    "precision": {"model": {"mixed_precision": "no"}},
    "loss": {"objective": {"loss": "huber"}},
    "weighting": {"objective": {"loss_weighting": "debiased"}},
    "timesteps": {"objective": {"timestep_max": 500}},
    "sampling": {"objective": {"timestep_sampling": "logit_normal"}},
    "prior": {"objective": {"prior_preservation": 0.5}},
    "pull": {"objective": {"lora_l2": 1e-4}},
    "optimizer": {"optimizer": {"optimizer": "adamw8bit"}},
    "average": {"optimizer": {"ema_decay": 0.9}},
    "lora+": {"optimizer": {"loraplus_ratio": 16.0}},
    "cycles": {"optimizer": {"lr_cycles": 4}},
    "adapter": {"lora": {"lora_type": "dora"}},
    "mirror images": {"data": {"flip": True}},
}
SAME = {
    "workers": {"data": {"dataloader_num_workers": 9}},
    "masks without an image that has one": {"data": {"mask_weight": 0.0, "alpha": "mask"}},
    "saving": {"saving": {"save_every_epochs": 1, "save_state_every_minutes": 1.0, "fresh": True}},
    "logging": {"logging": {"tensorboard": True}},
    "engine": {"run": {"engine": "plain"}},
    "auto said": {"objective": {"min_snr_gamma": 5.0, "noise_offset": 0.0357}},
}


def fingerprint_of(plan, trigger="sks", digests=("unet", "vae"), **tables) -> str:
    return short_hash(result_fingerprint(plan, resolved(plan, **tables), trigger, short_hash(list(digests))))


def resolved(plan, **tables) -> TrainSettings:
    """The settings with every "auto" that a fingerprint holds resolved, as a job has them."""
    settings = with_changes(**tables)
    objective = replace(settings.objective, min_snr_gamma=plan.min_snr_gamma, noise_offset=plan.noise_offset)
    schedule = {"prediction_type": plan.schedule.prediction_type, "zero_terminal_snr": plan.schedule.zero_terminal_snr}
    run = replace(settings.run, num_train_epochs=plan.epochs)
    return replace(settings, objective=objective, model=replace(settings.model, **schedule), run=run)


@pytest.mark.parametrize("tables", DIFFERENT.values(), ids=DIFFERENT)
def test_another_setting_is_another_run(tables):
    assert fingerprint_of(plan_of(**tables), **tables) != fingerprint_of(plan_of())


@pytest.mark.parametrize("tables", SAME.values(), ids=SAME)
def test_what_decides_nothing_may_change(tables):
    assert fingerprint_of(plan_of(**tables), **tables) == fingerprint_of(plan_of())


def test_settings_of_masks_are_of_the_run_where_there_is_a_mask():
    plan = plan_of()
    masked = replace(plan, examples=[replace(plan.examples[0], mask=Path("mask.png"), mask_key="1"), *plan.examples[1:]])
    prints = [fingerprint_of(masked), *(fingerprint_of(masked, data={"mask_weight": weight}) for weight in (0.0, 0.5))]
    assert len(set(prints)) == 3
    held_out = replace(plan, held_out=[replace(example(99), mask=Path("mask.png"), mask_key="1")])
    prints = [fingerprint_of(held_out, data={"mask_weight": weight}) for weight in (0.0, 0.5)]
    assert len(set(prints)) == 2  # the best file is chosen, and training ended early, by the loss of these


def test_captions_per_line_are_of_the_run_where_an_image_has_several():
    several = [example(number, caption="sks, photo\nsks, cat" if number == 3 else "sks, photo") for number in range(25)]
    plan, per_line = make_plan(several, with_changes(), PLAIN), {"data": {"caption_per_line": True}}
    assert fingerprint_of(plan, **per_line) != fingerprint_of(plan)
    assert fingerprint_of(plan_of(), **per_line) == fingerprint_of(plan_of())


def test_the_one_trigger_word_of_all_folders_counts_as_that_of_the_settings():
    def fingerprint(own: str, setting: str) -> str:
        plan = make_plan([example(number, trigger=own or setting) for number in range(25)], with_changes(), PLAIN)
        return fingerprint_of(plan, trigger=setting)

    assert fingerprint("alice", "nyafyi_woman") == fingerprint("alice", "other") == fingerprint("", "alice")
    assert fingerprint("alice", "nyafyi_woman") != fingerprint("bob", "nyafyi_woman")


@pytest.mark.parametrize(
    ("fraction", "concepts", "held_out"),
    [
        (0.1, {"alice": 80, "bob": 20}, {"alice": 8, "bob": 2}),
        (0.1, {"alice": 96, "bob": 4}, {"alice": 9, "bob": 1}),
        (0.05, {"alice": 98, "bob": 2}, {"alice": 4, "bob": 1}),
        (0.05, {"alice": 99, "bob": 1}, {"alice": 5}),
        (0.5, {"alice": 5, "bob": 5, "carol": 2}, {"alice": 2, "bob": 3, "carol": 1}),
        (0.01, {"alice": 60, "bob": 40}, {"alice": 1}),
        (0.2, {"alice": 1, "bob": 1, "carol": 1, "dora": 2}, {"dora": 1}),
        ("auto", {"alice": 30, "bob": 30}, {"alice": 1, "bob": 2}),
    ],
)
def test_each_concept_has_its_share_of_the_images_held_out(fraction, concepts, held_out):
    for first in (0, 1000):  # whatever the hashes of its images are
        numbers = iter(range(1000)) if first else iter(range(1000, 0, -1))
        examples = [example(next(numbers), trigger=word) for word, count in concepts.items() for _ in range(count)]
        plan = make_plan(examples, with_changes(validation={"validation_fraction": fraction}), PLAIN)
        counts = Counter(each.trigger for each in plan.held_out)
        assert counts == held_out


def test_an_image_of_another_trigger_word_makes_another_run_and_some_of_each_are_trained():
    plan = plan_of()
    moved = replace(plan, examples=[replace(plan.examples[0], trigger="bob"), *plan.examples[1:]])
    assert fingerprint_of(moved) != fingerprint_of(plan)
    for alone in range(60):
        examples = [example(number, trigger="bob" if number == alone else "sks") for number in range(60)]
        plan = make_plan(examples, with_changes(), PLAIN)
        assert len(plan.held_out) == 3
        assert "bob" in {each.trigger for each in plan.examples}


def test_the_class_of_the_subject_decides_the_result_where_the_prior_is_preserved():
    prints = {
        (weight, word): fingerprint_of(plan, **tables)
        for weight in (0.0, 1.0)
        for word in ("woman", "man")
        for tables in [{"objective": {"prior_preservation": weight}, "samples": {"subject_class": word}}]
        for plan in [plan_of(**tables)]
    }
    assert prints[0.0, "woman"] == prints[0.0, "man"] == fingerprint_of(plan_of())
    assert len({*prints.values()}) == 3


def test_other_images_captions_and_models_are_another_run():
    same = fingerprint_of(plan_of())
    assert fingerprint_of(plan_of(), trigger="person") != same
    assert fingerprint_of(plan_of(), digests=("other", "vae")) != same
    assert fingerprint_of(plan_of(24)) != same
    masked = {"mask": Path("mask.png"), "mask_key": "a"}
    for changed in ({"caption": "sks"}, {"repeats": 2}, {"sha256": "0" * 63 + "f"}, masked, masked | {"mask_weight": 0.3}):
        examples = [example(number) for number in range(25)]
        examples[24] = replace(examples[24], **changed)
        assert fingerprint_of(make_plan(examples, with_changes(), PLAIN)) != same
    moved = [replace(example(number), path=Path(f"/elsewhere/{number}.png")) for number in range(25)]
    assert fingerprint_of(make_plan(moved, with_changes(), PLAIN)) == same


def test_resolutions_and_mirror_images_are_part_of_the_fingerprint():
    """As JSON has them, so that a checkpoint compares equal; with one resolution the fingerprint is that of older versions."""
    several = {"data": {"resolution": (1024, 768)}}
    plan = plan_of(**several)
    fingerprint = result_fingerprint(plan, resolved(plan, **several), "sks", "unet")
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert (fingerprint["resolution"], fingerprint["pictures"]) == ([1024, 768], 25)
    assert fingerprint_of(plan, **several) != fingerprint_of(plan_of())
    own = [replace(example(number), resolutions=(768,)) for number in range(25)]
    assert fingerprint_of(make_plan(own, with_changes(), PLAIN)) != fingerprint_of(plan_of())
    same = [replace(example(number), resolutions=(1024,)) for number in range(25)]
    assert fingerprint_of(make_plan(same, with_changes(), PLAIN)) == fingerprint_of(plan_of())


def test_every_setting_has_exactly_one_role():
    keys = list(all_keys(TrainSettings))
    assert keys
    assert {key.name for key in keys if key.metadata["role"] not in ("result", "runtime", "saving")} == set()


def test_fingerprint_and_runtime_settings_hold_every_setting_once():
    """A setting that is in neither would continue another run without a word; base_model and validation_fraction count by
    what they name: the weights, and the images that are held out. Those of masks, of regularization images and of several
    captions count where there are such."""
    plan = plan_of()
    first = replace(plan.examples[0], mask=Path("mask.png"), mask_key="1", caption="one\nanother")
    plan = replace(plan, examples=[first, *plan.examples[1:]], regularization=[first])
    train = resolved(plan)
    for table in fields(train):
        section = getattr(train, table.name)
        newer = [key.name for key in fields(section) if key.metadata["role"] == "result" and key.metadata["before"] is not MISSING]
        train = replace(train, **{table.name: replace(section, **dict.fromkeys(newer, "another value"))})
    in_result = result_fingerprint(plan, train, "sks", "unet").keys()
    in_runtime = runtime_settings(with_changes()).keys()
    settings = {key.name for key in all_keys(TrainSettings) if not key.metadata["secret"]}
    assert in_result & in_runtime == set()
    of_processes = {key.name for key in all_keys(ProcessSettings)}  # their number is recorded
    assert settings - in_result - in_runtime == {*of_processes, *NOT_RECORDED}


@dataclass(frozen=True)
class Newer:
    """Settings of a later version: one more of each kind."""

    lora_rank: int = setting(32, role="result")
    sharpness: float = setting(0.5, role="result", before=0.0)
    speed: str = setting("fast", role="runtime")
    gamma: float = setting(5.0, role="result", recorded_as="min_snr_gamma")


@dataclass(frozen=True)
class NewerSettings:
    table: Newer = field(default_factory=Newer)


def test_a_setting_that_a_record_does_not_have_is_read_as_what_older_versions_did():
    record = {"lora_rank": 32, "min_snr_gamma": 5.0}
    assert changes(record, record, NewerSettings) == {}
    assert changes(record, record | {"speed": "fast"}, NewerSettings) == {}
    assert changes(record, record | {"sharpness": 0.0}, NewerSettings) == {}
    assert changes(record, record | {"sharpness": 0.5}, NewerSettings) == {"sharpness": "sharpness: 0.0 -> 0.5"}
    assert changes(record | {"sharpness": 0.5}, record, NewerSettings) == {"sharpness": "sharpness: 0.5 -> 0.0"}
    assert changes(record, {"min_snr_gamma": 5.0}, NewerSettings) == {"lora_rank": "lora_rank: 32 -> not recorded"}


def test_a_renamed_setting_keeps_its_name_in_records():
    runs = [dict(settings_in(NewerSettings(Newer(gamma=gamma)), "result")) for gamma in (5.0, 1.0)]
    assert runs[0] == {"lora_rank": 32, "sharpness": 0.5, "min_snr_gamma": 5.0}
    assert changes(runs[0], runs[1], NewerSettings) == {"min_snr_gamma": "min_snr_gamma: 5.0 -> 1.0"}


def settings_in(section: NewerSettings, role: str) -> Iterator[tuple[str, object]]:
    return ((recorded_name(key), value) for key, value in settings_of(section, role))


def test_settings_that_are_newer_than_the_first_version_declare_what_it_did():
    """Those of the first version are named here; any other one needs `before`, or old LoRAs would not be recognised."""
    first = {
        *("resolution", "bucket_step", "bucket_max_side", "caption_dropout", "caption_shuffle", "caption_variants"),
        *("caption_chunks", "lora_rank", "lora_alpha", "lora_targets", "min_snr_gamma", "noise_offset", "learning_rate"),
        *("lr_scheduler", "lr_warmup", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
        *("num_train_epochs", "train_seed", "mixed_precision", "prediction_type", "zero_terminal_snr", "early_stop_patience"),
    }
    result = {key.name: key.metadata["before"] for key in all_keys(TrainSettings) if key.metadata["role"] == "result"}
    assert {name for name, before in result.items() if before is MISSING} == first
