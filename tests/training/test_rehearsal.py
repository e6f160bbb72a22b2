"""The rehearsed step: every kind of layer that the run has, and what is said where it fails."""

from dataclasses import replace
from pathlib import Path

import pytest

import train_lora
import training.rehearsal as rehearsal_module
from tests.training.test_job import job_of
from training.config import LoraSettings
from training.method.layers import adapted_layers, shapes_of_base
from training.rehearsal import rehearse, take_small_step


@pytest.mark.parametrize("lora", [LoraSettings(lora_rank=4, lora_rank_pattern="attn2=8"), LoraSettings(lora_conv_rank=2)])
def test_a_small_step_has_every_kind_of_layer_that_a_run_has(stage, monkeypatch, lora):
    job = job_of(stage)
    job = replace(job, settings=replace(job.settings, lora=lora))
    adapters, prepare = [], rehearsal_module.prepare_unet

    def spy(engine, unet, adapter, device):
        adapters.append(adapter)
        return prepare(engine, unet, adapter, device)

    monkeypatch.setattr(rehearsal_module, "prepare_unet", spy)
    gradient = take_small_step(job)
    assert gradient.isfinite().all()
    (adapter,) = adapters
    assert gradient.shape == adapter.weights.shape
    shapes = shapes_of_base(job.base, lora)
    expected = {tuple(shapes[name]) for name in adapted_layers(shapes, lora)}
    assert {tuple(layer.base_layer.weight.shape) for layer in adapter.layers.values()} == expected
    assert {layer.r["default"] for layer in adapter.layers.values()} >= {lora.lora_rank}


def test_a_rehearsal_that_fails_is_said_and_is_no_error(stage, monkeypatch, capsys):
    job = job_of(stage)
    monkeypatch.setattr(rehearsal_module, "has_memory_for_everything", lambda job: True)
    broken = replace(job.settings, lora=replace(job.settings.lora, lora_rank=0))
    capsys.readouterr()
    rehearse(replace(job, settings=broken))
    assert capsys.readouterr().out.startswith("compiling ahead: failed, the first step takes longer (")


def test_kernels_are_lacking_until_triton_has_compiled_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert train_lora.lacks_kernels()
    (tmp_path / ".triton" / "cache" / "ABC").mkdir(parents=True)
    assert not train_lora.lacks_kernels()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    assert train_lora.lacks_kernels()
