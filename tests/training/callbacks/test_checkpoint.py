"""Checkpoints: exact, found by number, skipped when corrupt, removed when two newer ones are complete."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch

from common.errors import DISK_ERRNOS
from training.callbacks import checkpoint
from training.callbacks.checkpoint import CheckpointWriter, Identity
from training.config import OptimizerSettings
from training.data.buckets import Bucket, OptimizerStep
from training.loop import Progress
from training.method.optimizers import AdamW
from training.system.process_group import ProcessGroup

STEP = OptimizerStep(0, 0, Bucket(64, 64), (0,))
IDENTITY = Identity(fingerprint={"rank": 2}, runtime={"workers": 4}, shared_prefix_steps=7)


class Training:
    """Flat weights with their optimizer; `step` changes every number of them."""

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        self.weights = torch.nn.Parameter(torch.randn(3000))
        self.optimizer = AdamW(self.weights, OptimizerSettings())
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.taken = 0

    def step(self) -> None:
        self.weights.grad = torch.randn_like(self.weights)
        self.optimizer.step(torch.tensor(1e-4))
        self.taken += 1

    @property
    def progress(self) -> Progress:
        return Progress(self.taken, 1 / 3)

    def save(self, folder: Path, keep: int = 2) -> None:
        checkpoint.write(folder, checkpoint.snapshot(self.weights, self.optimizer), self.progress, {}, IDENTITY, keep)

    def writer(self, folder: Path) -> CheckpointWriter:
        return CheckpointWriter(folder, IDENTITY, 2, self.weights, self.optimizer, self.scaler)

    def numbers(self) -> dict[str, bytes]:
        return {name: tensor.numpy().tobytes() for name, tensor in checkpoint.snapshot(self.weights, self.optimizer).items()}

    def restored(self, saved: checkpoint.Checkpoint) -> "Training":
        checkpoint.restore(saved, ProcessGroup(), self.weights, self.optimizer, self.scaler)
        return self


@pytest.fixture
def training():
    return Training()


@pytest.fixture
def two_states(tmp_path, training):
    """The folder of a run with the states after 1 and 2 steps, and the numbers of both."""
    numbers = {}
    for step in (1, 2):
        training.step()
        training.save(tmp_path)
        numbers[step] = training.numbers()
    return tmp_path, numbers


def test_state_is_restored_to_the_last_bit(two_states):
    folder, numbers = two_states
    saved = checkpoint.newest(folder)
    assert (saved.progress, saved.identity) == (Progress(2, 1 / 3), IDENTITY)
    assert Training(seed=1).restored(saved).numbers() == numbers[2]


def test_training_that_goes_on_does_not_change_what_is_being_written(tmp_path, training):
    training.step()
    numbers = training.numbers()
    with training.writer(tmp_path) as writer:
        writer.save_state(training.progress, wait=False)
        training.step()
    assert Training(seed=1).restored(checkpoint.newest(tmp_path)).numbers() == numbers


def flip(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "tensors cut off": lambda record, tensors: os.truncate(tensors, tensors.stat().st_size - 1),
    "tensors empty": lambda record, tensors: os.truncate(tensors, 0),
    "one bit of the tensors": lambda record, tensors: flip(tensors, -5),
    "tensors missing": lambda record, tensors: tensors.unlink(),
    "record cut off": lambda record, tensors: os.truncate(record, record.stat().st_size // 2),
    "record empty": lambda record, tensors: os.truncate(record, 0),
    "one digit of the record": lambda record, tensors: record.write_text(record.read_text().replace('"rank": 2', '"rank": 3')),
    "record of zeros": lambda record, tensors: record.write_bytes(bytes(record.stat().st_size)),
    "record is JSON of something else": lambda record, tensors: record.write_text("[1, 2]"),
    "record is a number": lambda record, tensors: record.write_text("5"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_is_named_and_the_one_before_it_counts(two_states, capsys, damage):
    folder, numbers = two_states
    record = folder / "step-000000002.json"
    DAMAGES[damage](record, record.with_suffix(".safetensors"))
    saved = checkpoint.newest(folder)
    assert saved.progress.next_step == 1
    assert capsys.readouterr().out == f"skipping corrupt checkpoint {record}\n"
    resumed = Training(seed=1).restored(saved)
    assert resumed.numbers() == numbers[1]
    resumed.taken = 1
    resumed.step()
    resumed.save(folder)
    assert checkpoint.newest(folder).progress.next_step == 2
    assert sorted(path.name for path in folder.glob("*.json")) == ["step-000000001.json", "step-000000002.json"]


def test_half_a_save_is_no_state_and_goes_with_the_next_one(two_states, training):
    """Killed before the record was renamed, and before the tensors were."""
    folder, _ = two_states
    (folder / "step-000000003.safetensors").write_bytes(b"whole, but without its record")
    (folder / ".abc.part").write_bytes(b"half")
    (folder / ".tmpabc").write_bytes(b"half")
    assert checkpoint.newest(folder).progress.next_step == 2
    for _ in range(2):
        training.step()
    training.save(folder, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000004.json", "step-000000004.safetensors"]


def test_a_folder_with_an_incomplete_first_checkpoint_is_removed(tmp_path, training):
    folder = tmp_path / "state"
    checkpoint.remove_incomplete(folder)
    folder.mkdir()
    (folder / ".tmpabc123").write_bytes(b"half")
    checkpoint.remove_incomplete(folder)
    assert list(tmp_path.iterdir()) == []
    training.step()
    training.save(folder)
    checkpoint.remove_incomplete(folder)
    assert checkpoint.newest(folder).progress.next_step == 1


def test_newest_goes_by_number_and_not_by_time(two_states):
    folder, _ = two_states
    for path in folder.glob("step-000000001.*"):
        os.utime(path, (2e9, 2e9))
    assert checkpoint.newest(folder).progress.next_step == 2
    assert checkpoint.newest(folder, at_most=1).progress.next_step == 1
    assert checkpoint.newest(folder, at_most=0) is None
    assert checkpoint.newest(folder / "nowhere") is None


def test_the_last_states_are_kept_and_the_one_that_a_longer_run_shares(tmp_path, training):
    for _ in range(10):
        training.step()
        training.save(tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["step-000000007", "step-000000009", "step-000000010"]
    checkpoint.keep_one(tmp_path, at_most=IDENTITY.shared_prefix_steps)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000007.json", "step-000000007.safetensors"]


def test_damaged_states_of_later_steps_do_not_push_out_valid_ones(two_states):
    """Two valid states are kept, although damaged ones have higher numbers."""
    folder, _ = two_states
    for step in (8, 9):
        (folder / f"step-{step:09d}.json").write_text("{}")
    training = Training()
    training.taken = 3
    training.save(folder)
    assert sorted(path.stem for path in folder.glob("*.json")) == ["step-000000002", "step-000000003"]


@pytest.fixture
def small_disk(tmp_path, mount_tmpfs):
    """A file system of 64 KiB."""
    mount_tmpfs(tmp_path / "small", "size=64k")
    return tmp_path / "small"


def test_full_disk_keeps_the_last_valid_state(small_disk, training):
    training.step()
    numbers = training.numbers()
    with training.writer(small_disk) as writer:
        writer.save_state(training.progress, wait=False)
        writer.wait()
        training.step()
        writer.save_state(training.progress, wait=False)
        with pytest.raises(OSError, match="No space left") as full:
            writer.wait()
    assert full.value.errno in DISK_ERRNOS
    assert Training(seed=1).restored(checkpoint.newest(small_disk)).numbers() == numbers
    assert sorted(path.name for path in small_disk.iterdir()) == ["step-000000001.json", "step-000000001.safetensors"]


def test_writer_raises_what_the_disk_refused_after_the_next_step(tmp_path, training):
    (tmp_path / "file").touch()
    with training.writer(tmp_path / "file" / "state") as writer:
        writer.save_state(training.progress, wait=False)
        (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
        while thread.is_alive() and not writer._writing.done():
            thread.join(0.01)
        with pytest.raises(NotADirectoryError):
            writer.after_step(STEP, {})
        writer.after_step(STEP, {})


def test_record_is_readable_json(two_states):
    folder, _ = two_states
    record = json.loads((folder / "step-000000002.json").read_text())
    assert record["progress"]["next_step"] == 2
    assert record["identity"]["fingerprint"] == {"rank": 2}
