"""The rehearsed step: every kind of layer that the run has, in a process of its own, and what is logged where it fails."""

from dataclasses import replace

import psutil
import pytest

import training.rehearsal as rehearsal_module
from tests.training.test_job import job_of
from training.job import TrainingJob
from training.method.layers import adapted_layers, shapes_of_base
from training.rehearsal import rehearsing, take_small_step
from training.system.processes import worker_process


def with_lora(job: TrainingJob, **lora: object) -> TrainingJob:
    return replace(job, settings=replace(job.settings, lora=replace(job.settings.lora, **lora)))


@pytest.mark.parametrize("lora", [{"lora_rank_pattern": "attn2=8"}, {"lora_conv_rank": 2}, {"lora_type": "dora"}])
def test_a_small_step_has_every_kind_of_layer_that_a_run_has(stage, monkeypatch, lora):
    job = with_lora(job_of(stage), lora_rank=4, lora_alpha=4.0, **lora)
    adapters, prepare = [], rehearsal_module.prepare_unet

    def spy(engine, unet, adapter, device):
        adapters.append(adapter)
        return prepare(engine, unet, adapter, device)

    monkeypatch.setattr(rehearsal_module, "prepare_unet", spy)
    gradient = take_small_step(job)
    assert gradient.isfinite().all()
    (adapter,) = adapters
    assert gradient.shape == adapter.weights.shape
    shapes = shapes_of_base(job.base, job.settings.lora)
    expected = {tuple(shapes[name]) for name in adapted_layers(shapes, job.settings.lora)}
    assert {tuple(layer.base_layer.weight.shape) for layer in adapter.layers.values()} == expected


@pytest.mark.parametrize(
    ("lora", "end", "reason"),
    [
        pytest.param({}, None, "", marks=pytest.mark.long),
        pytest.param({"lora_rank": 0}, None, "SettingsError: LORA_RANK_PATTERN leaves out", marks=pytest.mark.long),
        ({}, psutil.Process.kill, "ResourceError: a worker process was killed"),
    ],
)
def test_it_has_ended_when_the_block_is_left_and_its_error_is_logged(stage, monkeypatch, capfd, lora, end, reason):
    job = with_lora(job_of(stage), **lora)
    capfd.readouterr()
    monkeypatch.setattr(rehearsal_module, "has_memory_for_everything", lambda job, besides: True)
    with worker_process(enabled=True) as worker:
        process = psutil.Process(worker._process.pid)
        with rehearsing(job, worker):
            if end:
                end(process)
        process.wait(10)
    output, errors = capfd.readouterr()
    waits = "compiling kernels for this GPU, once on this machine ..."
    assert end or output.startswith(waits)  # loading torch takes the process longer than this block
    failures = [line for line in output.splitlines() if line != waits]
    assert len(failures) == bool(reason)
    assert all(line.startswith(f"compiling ahead: failed, the first step takes longer ({reason}") for line in failures)
    assert "Traceback" not in errors


def test_an_error_in_the_block_is_not_kept_waiting(stage, monkeypatch):
    monkeypatch.setattr(rehearsal_module, "has_memory_for_everything", lambda job, besides: True)
    with worker_process(enabled=True) as worker:
        process = psutil.Process(worker._process.pid)
        process.suspend()
        with pytest.raises(KeyError), rehearsing(job_of(stage), worker):
            raise KeyError
    process.wait(10)


def test_without_memory_for_it_the_process_ends_at_once(stage):
    asked = []
    with worker_process(enabled=True) as worker:
        process = psutil.Process(worker._process.pid)
        with rehearsing(job_of(stage), worker):  # on a CPU there is none
            asked.append(process.wait(10))
    assert asked
