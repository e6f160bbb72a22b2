"""The memory budget: the batch size and gradient checkpointing that fit the available memory."""

import tomllib
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import ResourceError
from common.settings import PRESETS
from demo import tiny_sdxl
from training.config import LoraSettings, TrainSettings
from training.data.examples import Example
from training.memory_budget import (
    MemoryBudget,
    fit_to_memory,
    fitting_batch,
    measure_budget,
    resolve_batch_size,
    resolve_quantization,
    suggest_settings,
)
from training.plan import runtime_settings
from training.system.device import GIB, Precision, Thresholds

SPARK = Thresholds(reserve=16 * GIB, warn=12 * GIB, stop=8 * GIB, emergency=2 * GIB)


def with_run(batch: int, accumulation: int = 1, checkpointing="auto") -> TrainSettings:
    plain = TrainSettings()
    run = replace(plain.run, train_batch_size=batch, gradient_accumulation_steps=accumulation)
    return replace(plain, run=run, model=replace(plain.model, gradient_checkpointing=checkpointing))


def budget_of(available_gib: int) -> MemoryBudget:
    """10 GiB fixed, 4 GiB per image, 1 GiB with gradient checkpointing."""
    return MemoryBudget(10 * GIB, 0, 4 * GIB, GIB, available_gib * GIB, SPARK.reserve, SPARK, True)


def decided(settings: TrainSettings, available_gib: int) -> tuple[int, int, bool]:
    settings = fit_to_memory(settings, budget_of(available_gib), "ADVICE")
    return settings.run.train_batch_size, settings.run.gradient_accumulation_steps, settings.model.gradient_checkpointing


def test_batch_becomes_what_fits_and_accumulation_makes_up_for_it(capsys):
    assert decided(with_run(4), 42) == (4, 1, False)
    assert capsys.readouterr().out.splitlines() == [
        "gradient checkpointing: off (26.0 GiB needed without it, 26.0 GiB free)",
        "memory: about 26.0 GiB for batch size 4",
    ]
    assert decided(with_run(4), 41) == (4, 1, True)
    capsys.readouterr()
    assert decided(with_run(6), 31) == (3, 2, True)
    assert capsys.readouterr().out == (
        "gradient checkpointing: on (34.0 GiB needed without it, 15.0 GiB free)\n"
        "batch size 6 -> 3, gradient accumulation 1 -> 2 "
        "(batch size 6 needs about 16.0 GiB; 31.0 GiB are available, of which 16.0 are reserved)\n"
        "memory: about 13.0 GiB for batch size 3\n"
    )
    assert decided(with_run(5, 3), 30) == (3, 5, True)
    assert decided(with_run(4, checkpointing=False), 31) == (1, 4, False)


def test_what_does_not_fit_at_all_is_refused_with_every_figure():
    with pytest.raises(ResourceError) as refused:
        decided(with_run(4), 26)
    for words in ("batch size 1 needs about 11.0 GiB", "26.0 GiB are available", "16.0 are reserved", "ADVICE", "(process "):
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("available", "most", "checkpointing", "batch"),
    [
        (42, 100, "auto", 4),  # 16 GiB in reserve, 10 for what is always there
        (50, 100, "auto", 6),
        (50, 5, "auto", 5),
        (41, 100, "auto", 15),  # 3 would fit with activations kept
        (35, 2, "auto", 2),
        (41, 100, False, 3),
        (50, 100, True, 24),
        (20, 100, "auto", 1),
    ],
)
def test_auto_is_the_largest_batch_that_fits(available, most, checkpointing, batch):
    settings, (line,) = resolve_batch_size(with_run("auto", 3, checkpointing), budget_of(available), most)
    assert (settings.run.train_batch_size, settings.run.gradient_accumulation_steps) == (batch, 3)
    assert line.startswith(f"batch size: {batch} (auto: the largest for {max(0, available - 16)}.0 GiB, {most} images")


def test_auto_keeps_the_samples_per_step_of_the_checkpoint():
    for available, (batch, accumulation) in {50: (6, 2), 45: (4, 3), 41: (12, 1), 28: (2, 6)}.items():
        run = resolve_batch_size(with_run("auto"), budget_of(available), 100, saved_samples=12)[0].run
        assert (run.train_batch_size, run.gradient_accumulation_steps) == (batch, accumulation)
    assert resolve_batch_size(with_run(7), budget_of(50), 100, saved_samples=12) == (with_run(7), [])


def test_the_suggestion_for_a_full_gpu_fits():
    assert suggest_settings(with_run(4, checkpointing=False), budget_of(0), 14 * GIB) == "set GRADIENT_CHECKPOINTING=true"
    answer = suggest_settings(with_run(8, checkpointing=True), budget_of(0), 14 * GIB)
    assert answer == "set GRADIENT_CHECKPOINTING=true TRAIN_BATCH_SIZE=4 GRADIENT_ACCUMULATION_STEPS=2, which fits"
    assert "lower RESOLUTION" in suggest_settings(with_run(8, checkpointing=True), budget_of(0), 9 * GIB)
    assert fitting_batch(7, 8, lambda batch: batch, 100) == 4


def test_another_batch_in_the_same_step_may_change_between_stop_and_resume():
    assert {"train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"} <= runtime_settings(
        TrainSettings(), 1
    ).keys()


def full_size_budget(monkeypatch, settings: TrainSettings, available_gib: float) -> MemoryBudget:
    """The budget of SDXL's own networks for 1024 x 1024 on a GPU of its own with so much free memory."""
    networks = tiny_sdxl.networks(tiny_sdxl.FULL)
    configs = {name: network.config if name in ("unet", "vae") else network.config.to_dict() for name, network in networks.items()}
    components = {name: SimpleNamespace(tensors=network.state_dict(), config=configs[name]) for name, network in networks.items()}

    def without_weights(base, *, text_encoders: bool) -> list[torch.nn.Module]:
        return [networks[name] for name in ("unet", *(("text_encoder", "text_encoder_2") if text_encoders else ()))]

    monkeypatch.setattr("training.memory_budget.available_bytes", lambda device: int(available_gib * GIB))
    monkeypatch.setattr("training.memory_budget.shares_memory", lambda device: False)
    monkeypatch.setattr("training.method.layers.networks_without_weights", without_weights)
    example = Example(Path("a.png"), "a.png", "sks", 1024, 1024, 1, "0" * 64)
    precision = Precision(torch.device("cuda"), torch.bfloat16)
    engine = "plain" if settings.lora.train_text_encoders else "fast"
    return measure_budget(SimpleNamespace(components=components), [example], settings, precision, engine, 1)


def test_a_floor_for_the_machines_memory_takes_nothing_of_a_gpu_with_its_own(monkeypatch):
    """A guard of main memory, whatever the machine has of it, does not reserve GPU memory or make an estimate a refusal."""
    settings = TrainSettings()
    floor = replace(settings, run=replace(settings.run, memory_floor_gib=64.0))
    guarded, plain = (full_size_budget(monkeypatch, each, 12) for each in (floor, settings))
    assert guarded.thresholds
    assert not plain.thresholds
    assert replace(guarded, thresholds=None) == plain


def test_automatic_quantization_leaves_a_dora_as_it_is(monkeypatch):
    """A LoRA of rank 512 on a card of 10 GB gets an 8-bit base; a DoRA reads the weights and cannot."""
    for kind, choice in (("lora", "int8"), ("dora", "none")):
        settings = TrainSettings(model=replace(TrainSettings().model, base_quantization="auto"))
        settings = replace(settings, lora=LoraSettings(lora_type=kind))
        budget = full_size_budget(monkeypatch, settings, 9)
        resolved, after, (line,) = resolve_quantization(settings, budget)
        assert resolved.model.base_quantization == choice
        assert line.startswith(f"base quantization: {choice} (one image needs ")
        assert (after.fixed < budget.fixed) is (choice == "int8")
        kept, _, lines = resolve_quantization(settings, budget, "none")
        assert kept.model.base_quantization == "none"
        assert lines == ["base quantization: none (as in the checkpoint)"]


def test_what_needs_a_new_run_says_so():
    budget = replace(budget_of(0), saved_by_int8=2 * GIB)
    setting = "GRADIENT_CHECKPOINTING=true "
    for checkpointing, grows, switch in ((False, False, setting), (True, False, setting), (True, True, "")):
        budget = replace(budget, grows_segments=grows)
        suggested = suggest_settings(with_run(1, checkpointing=checkpointing), budget, 9 * GIB)
        remedy = f"set {switch}BASE_QUANTIZATION=int8 FRESH=1, or lower RESOLUTION or LORA_RANK with FRESH=1"
        assert suggested == f"close other programs on the GPU, or {remedy}"


def test_text_encoders_that_are_trained_are_in_the_estimate(monkeypatch):
    plain = TrainSettings()
    texts = replace(plain, lora=LoraSettings(train_text_encoders=True))
    one = replace(texts, data=replace(texts.data, caption_chunks=1))
    monkeypatch.setattr("training.memory_budget._PLAIN_BYTES_PER_PIXEL", (5632, 1024))  # of the fast engine
    before, after, shorter = (full_size_budget(monkeypatch, settings, 79) for settings in (plain, texts, one))
    weights = 2 * (123_060_480 + 694_659_840)
    trained = 32 * sum(4 * 2 * width + 2 * 5 * width for width in (768,) * 12 + (1280,) * 32)
    assert after.fixed - before.fixed == pytest.approx(weights + 18 * trained, rel=1e-3)
    assert after.per_image - before.per_image == 3 * (shorter.per_image - before.per_image)
    assert 0.7 * GIB < after.per_image - before.per_image < 0.9 * GIB
    assert 0 < after.per_image_checkpointed - before.per_image_checkpointed < 0.05 * GIB
    assert after.saved_by_int8 == before.saved_by_int8


def test_the_preset_for_8_gb_fits_and_the_defaults_do_not(monkeypatch):
    for values, fits in ((tomllib.loads((PRESETS / "8gb.toml").read_text(encoding="utf-8"))["train"], True), ({}, False)):
        settings = TrainSettings()
        for table in fields(settings):
            section = getattr(settings, table.name)
            own = {key.name: values[key.name] for key in fields(section) if key.name in values}
            settings = replace(settings, **{table.name: replace(section, **own)})
        settings, budget, _ = resolve_quantization(settings, full_size_budget(monkeypatch, settings, 7.6))
        if fits:
            assert fit_to_memory(settings, budget, "").run.train_batch_size == 1
            assert budget.needed(1, checkpointing=True) < budget.free
        else:
            with pytest.raises(ResourceError, match="BASE_QUANTIZATION=int8"):
                fit_to_memory(settings, budget, "")


def test_the_context_of_this_process_is_counted_once(monkeypatch):
    """It is in what a run needs, and is taken already when the free memory is read."""
    budget = full_size_budget(monkeypatch, TrainSettings(), 9)
    assert budget.available == 9.5 * GIB


def test_where_segments_can_grow_less_is_lost(monkeypatch):
    plain = TrainSettings()
    usual = full_size_budget(monkeypatch, plain, 9)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    saving = full_size_budget(monkeypatch, plain, 9)
    assert usual.needed(1, checkpointing=True) - saving.needed(1, checkpointing=True) == GIB // 2
    assert (usual.grows_segments, saving.grows_segments) == (False, True)


def test_estimates_are_within_a_tenth_of_what_nvidia_smi_showed(monkeypatch):
    """On an H200, at 1024 x 1024, batch 1: with activations kept, with checkpointing, and also in 8 bits at rank 16. On an H100,
    where segments can grow: with checkpointing, and also in 8 bits at rank 8 with adamw8bit."""
    plain = TrainSettings()
    small = replace(plain, lora=LoraSettings(lora_rank=16), model=replace(plain.model, base_quantization="int8"))
    smallest = replace(small, lora=LoraSettings(lora_rank=8), optimizer=replace(plain.optimizer, optimizer="adamw8bit"))
    fixed = (plain, False, 15583), (plain, True, 9768), (small, True, 6012)
    growing = (plain, True, 8899), (smallest, True, 4987)
    for number, (settings, checkpointing, measured_mib) in enumerate((*fixed, *growing)):
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True" if number >= len(fixed) else "")
        _, budget, _ = resolve_quantization(settings, full_size_budget(monkeypatch, settings, 80))
        assert budget.needed(1, checkpointing=checkpointing) == pytest.approx(measured_mib * 2**20, rel=0.1)
