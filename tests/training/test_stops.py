"""Runs that stop before their end, or go on after it: signals, a disk that fills up, early stopping, more epochs."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import suppress

import pytest
from process_table import handles, process_that_writes
from safetensors import safe_open

from common import output_layout as results
from common.weights import read_header
from training.callbacks import checkpoint

SHORT = {"LORA_TARGETS": "attention", "SAVE_EVERY_EPOCHS": 0, "SAVE_STATE_EVERY_MINUTES": 1e-6}
LONG_STEPS = {"GRADIENT_ACCUMULATION_STEPS": 6, "NUM_TRAIN_EPOCHS": 1000}
"""Each of them takes a third of a second or more."""


@pytest.fixture
def images(stage):
    stage.add("astronaut")
    stage.add("coffee")
    return stage


def weights(stage) -> dict[str, bytes]:
    with safe_open(stage.lora, framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


@pytest.mark.long
def test_a_second_signal_does_not_wait_for_the_step(images, forked_python):
    for _ in range(5):  # on a busy machine the step may end, and the run with it, between the two signals
        run, before = images.start(python=forked_python, **SHORT | LONG_STEPS), images.steps_taken()
        images.wait_for_steps(run, before + 3)  # the checkpoint after the first one is on disk when that after the second begins
        process = process_that_writes(images.output / "lora" / "metrics.jsonl")
        os.kill(process, signal.SIGTERM)
        with suppress(FileNotFoundError, ProcessLookupError):
            while handles(process, signal.SIGTERM):
                time.sleep(0.001)
            taken = images.steps_taken()
            os.kill(process, signal.SIGTERM)
        _, said = run.communicate()
        assert "Traceback" not in said
        if run.returncode == -signal.SIGTERM and images.steps_taken() == taken:
            break
    else:
        pytest.fail(f"the step ended before the run did, each time; exit code {run.returncode}")
    again = images.stopped(images.steps_taken() + 1, signal.SIGINT, **SHORT | LONG_STEPS)
    (taken,) = (line for line in again.stdout.splitlines() if line.startswith("continuing at step "))
    assert int(taken.split()[-1]) >= 1
    assert (again.returncode, again.stderr) == (130, "train_lora: stopped by SIGINT; run the same command again to resume\n")


@pytest.mark.long
def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(images, mount_tmpfs, monkeypatch):
    monkeypatch.setattr(results, "MIN_FREE_BYTES", 0)
    mount_tmpfs(images.output, "size=8m")
    filler = images.output / "filler"

    def fill(is_over: threading.Event) -> None:
        """Until the run is over: it removes old states, and might go on in their place."""
        with filler.open("wb", buffering=0) as file:
            while not is_over.is_set():
                try:
                    file.write(bytes(4096))
                except OSError:
                    time.sleep(0.001)

    full = images.disturbed(3, fill, **SHORT | {"NUM_TRAIN_EPOCHS": 1000})
    assert full.returncode == 6
    (said,) = full.stderr.splitlines()
    assert said.startswith(f"train_lora: {images.output}/")
    assert said.endswith(": No space left on device: free disk space, or make the folder writable for this user")
    left = checkpoint.newest(images.output / "state" / "sks")
    assert left.progress.next_step >= 1
    filler.unlink()
    again = images.stopped(images.steps_taken() + 2, signal.SIGTERM, **SHORT | {"NUM_TRAIN_EPOCHS": 1000})
    assert again.returncode == 143
    assert f"continuing at step {left.progress.next_step}\n" in again.stdout
    assert "damaged" not in again.stdout


@pytest.mark.long
def test_a_stopped_run_that_began_anew_says_how_to_continue_it(images):
    """The same command would begin anew again."""
    stopped = images.stopped(1, signal.SIGINT, FRESH=1, **SHORT | LONG_STEPS)
    message = "train_lora: stopped by SIGINT; run the same command again (without FRESH=1) to resume\n"
    assert (stopped.returncode, stopped.stderr) == (130, message)
    taken = images.steps_taken()
    again = images.stopped(taken + 1, signal.SIGTERM, **SHORT | LONG_STEPS)
    assert f"continuing at step {taken}\n" in again.stdout


@pytest.mark.long
def test_a_cache_that_is_removed_ends_the_run_with_the_state_saved(images):
    long = SHORT | {"NUM_TRAIN_EPOCHS": 1000, "SAVE_STATE_EVERY_MINUTES": 60}
    removed = images.disturbed(2, lambda is_over: shutil.rmtree(images.output / "cache" / "latents"), **long)
    assert removed.returncode == 6
    (line,) = removed.stderr.splitlines()
    assert line.startswith(f"train_lora: {images.output}/cache/latents/")
    assert "run the same command again" in line
    taken = images.steps_taken()
    assert checkpoint.newest(images.output / "state" / "sks").progress.next_step == taken >= 2
    again = images.stopped(taken + 1, signal.SIGTERM, **long)
    assert f"continuing at step {taken}\n" in again.stdout
    assert "images: 2 encoded, 0 in the cache; captions: 0 encoded, 2 in the cache" in again.stdout


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_libraries_are_imported_is_not_lost(images, signum, code):
    """They catch every Exception here and there."""
    run = images.start(NUM_TRAIN_EPOCHS=1000)
    assert run.stdout.readline().startswith("overridden settings:")
    time.sleep(1.2)
    run.send_signal(signum)
    _, said = run.communicate(timeout=30)
    assert run.returncode == code
    assert said.splitlines()[-1].startswith("train_lora: stopped by SIG")
    assert "Traceback" not in said


@pytest.mark.long
def test_the_lora_with_the_lowest_held_out_loss_is_named_but_not_recommended_and_a_loss_that_rises_ends_no_run(images):
    images.add("chelsea")
    images.add("rocket")
    variables = {"VALIDATION_FRACTION": 0.5, "VALIDATE_EVERY_EPOCHS": 1, "EARLY_STOP_PATIENCE": 1, "LEARNING_RATE": 0.2}
    said = images.trained(**SHORT | variables | {"NUM_TRAIN_EPOCHS": 4, "SAVE_EVERY_EPOCHS": 1})
    lines = [json.loads(line) for line in (images.output / "lora" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss_smoothed"] for line in lines if "validation_loss" in line]
    assert len(losses) == 4
    assert min(losses) < losses[-1] < 2 * min(losses)
    assert "best validation loss" in said
    best, recommended = (read_header(images.output / "lora" / f"sks-{what}.safetensors") for what in ("best", "recommended"))
    assert best.metadata["ss_epoch"] == str(losses.index(min(losses)) + 1)
    reason = "It is the last one; likeness was not compared: SAMPLES=false."
    assert recommended.metadata["loracat_recommended_reason"] == reason
    assert f"recommended: sks.safetensors at strength 1. {reason}" in said


@pytest.mark.long
def test_a_run_by_steps_is_lengthened_and_ends_as_if_it_had_always_been_longer(images):
    """Its end is in the middle of an epoch; then it is continued by epochs."""
    how = SHORT | {"TRAIN_BATCH_SIZE": 1}
    said = images.trained(**how, NUM_TRAIN_STEPS=3)
    assert "\n3 optimizer steps of 1, up to epoch 2, 3 training samples" in said
    few = "3 training samples are few: a likeness needs 2000 to 3000. Set NUM_TRAIN_STEPS=2000, or add images."
    assert said.splitlines()[-1] == few
    assert "nothing to do" in images.trained(**how, NUM_TRAIN_STEPS=3, NUM_TRAIN_EPOCHS=7)
    said = images.trained(**how, NUM_TRAIN_STEPS=5)
    assert "setting changed since the checkpoint: num_train_steps: 3 -> 5" in said
    assert "continuing at step 3" in said
    said = images.trained(**how, NUM_TRAIN_EPOCHS=4)
    assert "setting changed since the checkpoint: num_train_steps: 5 -> 0" in said
    assert "continuing at step 5" in said
    lengthened, first_output = weights(images), images.output
    images.output = first_output.with_name("straight")
    images.lora = images.output / "lora" / "sks.safetensors"
    images.trained(**how, NUM_TRAIN_EPOCHS=4, OUTPUT_DIR=images.output)
    assert weights(images) == lengthened


@pytest.mark.long
def test_a_finished_run_that_is_lengthened_ends_as_if_it_had_always_been_longer(images):
    images.trained(**SHORT, NUM_TRAIN_EPOCHS=2)
    said = images.trained(**SHORT, NUM_TRAIN_EPOCHS=5)
    assert "continuing at step 2" in said
    assert "setting changed since the checkpoint: num_train_epochs: 2 -> 5" in said
    lengthened, first_output = weights(images), images.output
    images.output = first_output.with_name("straight")
    images.lora = images.output / "lora" / "sks.safetensors"
    images.trained(**SHORT, NUM_TRAIN_EPOCHS=5, OUTPUT_DIR=images.output)
    assert weights(images) == lengthened
    assert len(list((first_output / "lora" / "archive").rglob("sks.safetensors"))) == 1
    assert os.listdir(first_output / "state" / "sks")
