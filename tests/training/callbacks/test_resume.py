"""What may change while a run is stopped, and what may not."""

import json
from dataclasses import replace

import pytest
import torch

from common.errors import SettingsError
from training.callbacks import checkpoint
from training.callbacks.checkpoint import Identity, changes_since, find_resume_point, warmup_to_keep
from training.config import TrainSettings
from training.data.buckets import Bucket, run_order
from training.data.examples import Example
from training.loop import Progress
from training.plan import WARMUP_STEPS, decoder_record, runtime_settings

BEGAN = {
    "lr_scheduler": "constant",
    "lr_warmup": 0.05,
    WARMUP_STEPS: 5,
    "num_train_epochs": 10,
    "lora_rank": 32,
    "early_stop_patience": 0,
}


def saved(folder, step: int = 60, shared_prefix_steps: int = 95, **fingerprint: object) -> checkpoint.Checkpoint:
    identity = Identity({**BEGAN, **fingerprint}, {"dataloader_num_workers": 4}, shared_prefix_steps)
    checkpoint.write(folder, {"weight": torch.zeros(1)}, Progress(step, 0.5), {}, identity, keep=2)
    return checkpoint.newest(folder)


def now(shared_prefix_steps: int = 95, workers: int = 4, **fingerprint: object) -> Identity:
    return Identity({**BEGAN, **fingerprint}, {"dataloader_num_workers": workers}, shared_prefix_steps)


def resume_point(folder, before: checkpoint.Checkpoint, today: Identity) -> checkpoint.Checkpoint:
    return find_resume_point(folder, before, today.fingerprint, today.shared_prefix_steps)


def test_the_same_run_goes_on_without_a_word(tmp_path):
    before = saved(tmp_path)
    assert resume_point(tmp_path, before, now()) == before
    assert changes_since(before, now()) == []


def test_workers_and_more_epochs_are_taken_with_a_line(tmp_path):
    before, today = saved(tmp_path), now(shared_prefix_steps=190, workers=2, num_train_epochs=20)
    assert resume_point(tmp_path, before, today) == before
    assert set(changes_since(before, today)) == {"num_train_epochs: 10 -> 20", "dataloader_num_workers: 4 -> 2"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 16}, ["lora_rank: 32 -> 16"]),
        ({"lora_rank": 16, "num_train_epochs": 20}, ["lora_rank: 32 -> 16", "num_train_epochs: 10 -> 20"]),
        ({"lr_scheduler": "cosine"}, ["lr_scheduler: constant -> cosine"]),
        ({"num_train_epochs": 3, "common": 29}, ["num_train_epochs: 10 -> 3"]),
    ],
)
def test_what_changes_the_result_is_refused_with_both_ways_on(tmp_path, changes, words):
    before = saved(tmp_path)
    common = changes.pop("common", 95)
    with pytest.raises(SettingsError) as refused:
        resume_point(tmp_path, before, now(common, **changes))
    for word in [*words, "Restore these values", "FRESH=1", "stopped at step 60"]:
        assert word in str(refused.value)


def test_other_pixels_than_those_of_version_1_0_are_taken_with_a_line(tmp_path):
    """Its checkpoints do not record how images were decoded."""
    before, today = saved(tmp_path), now()
    same = replace(today, runtime=today.runtime | decoder_record([]))
    assert changes_since(before, same) == []
    examples = [Example(tmp_path, "a.png", "", 64, 64, 1, "", revision) for revision in ("", "2", "2")]
    other = replace(today, runtime=today.runtime | decoder_record(examples))
    assert resume_point(tmp_path, before, same) == resume_point(tmp_path, before, other) == before
    assert changes_since(before, other) == ["image decoder, and latents with it: version 1.0's -> revision 2 for 2 images"]


def test_a_falling_rate_cannot_be_lengthened(tmp_path):
    before = saved(tmp_path, lr_scheduler="cosine")
    with pytest.raises(SettingsError, match="num_train_epochs: 10 -> 20"):
        resume_point(tmp_path, before, now(shared_prefix_steps=190, lr_scheduler="cosine", num_train_epochs=20))


def test_a_longer_run_goes_on_from_before_the_short_batches_that_ended_the_shorter_one(tmp_path):
    saved(tmp_path, step=95)
    before = saved(tmp_path, step=97)
    assert resume_point(tmp_path, before, now(shared_prefix_steps=190, num_train_epochs=20)).progress.next_step == 95


def test_a_longer_run_keeps_its_warm_up_and_one_that_falls_does_not(tmp_path):
    assert warmup_to_keep(saved(tmp_path), {**BEGAN, "num_train_epochs": 20, WARMUP_STEPS: 10}) == 5
    assert warmup_to_keep(saved(tmp_path), {**BEGAN, "lr_warmup": 0.1, WARMUP_STEPS: 10}) == 10
    falling = saved(tmp_path, lr_scheduler="cosine")
    assert warmup_to_keep(falling, {**BEGAN, "lr_scheduler": "cosine", WARMUP_STEPS: 10}) == 10


def test_a_longer_run_begins_with_the_full_batches_of_a_shorter_one():
    shapes = [Bucket(64, 64)] * 5 + [Bucket(64, 128)] * 3 + [Bucket(128, 64)]
    repeats = [1, 1, 2, 1, 1, 1, 1, 1, 1]
    longest = run_order(shapes, repeats, 12, 4, seed=3)
    for epochs in range(1, 12):
        order = run_order(shapes, repeats, epochs, 4, seed=3)
        full = [step for step in order if len(step.examples) == 4]
        assert order[: len(full)] == full == longest[: len(full)]
        assert sum(len(step.examples) for step in order) == 10 * epochs
        assert [step.epoch for step in order] == sorted(step.epoch for step in order)


def test_only_these_settings_may_change():
    """A setting that decides the result must not slip in here."""
    assert set(runtime_settings(TrainSettings())) == {
        "base_model",
        "dataloader_num_workers",
        "deterministic",
        "engine",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "init_lora_resize",
        "keep_last_states",
        "lora_author",
        "lora_description",
        "memory_floor_gib",
        "processes",
        "sample_every_epochs",
        "sample_guidance",
        "sample_prompts",
        "sample_seed",
        "sample_size",
        "sample_steps",
        "samples",
        "save_every_epochs",
        "save_state_every_minutes",
        "skip_flagged",
        "subject_class",
        "tensorboard",
        "train_batch_size",
        "validate_every_epochs",
        "validation_fraction",
        "wandb_project",
    }


def test_progress_survives_its_checkpoint_in_the_names_of_the_first_version(tmp_path):
    progress = replace(Progress().after(0, 0.5).after(1, 0.25), validations={1: 0.75, 2: 0.125})
    assert progress.loss_average == 0.98 * 0.5 + 0.02 * 0.25
    checkpoint.write(tmp_path, {"weight": torch.zeros(1)}, progress, {}, now(), keep=2)
    assert checkpoint.newest(tmp_path).progress == progress
    record = json.loads((tmp_path / "step-000000002.json").read_text())
    assert record["progress"] == {
        "next_step": 2,
        "loss_average": progress.loss_average,
        "validations": [{"epochs": 1, "loss": 0.75}, {"epochs": 2, "loss": 0.125}],
    }
