"""On a GPU: captured steps are the eager ones bit for bit, and take no more memory than they must.

These tests are skipped where there is no GPU. benchmarks/README.md says when and on which card they ran last.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_steps import FAST_ADAPTERS, RATE, STEPS, batch_of, fresh, loss_config, step_of, stepper, trained
from safetensors.torch import save_file

from training.callbacks.renderer import Renderer
from training.callbacks.sample_prompts import SamplePrompt
from training.config import LoraSettings, OptimizerSettings
from training.data.batches import Batch
from training.engine import prepare_unet, recompute_text_encoders
from training.engine import step as step_module
from training.engine.step import TrainStep
from training.method.adapters import inject
from training.method.lora_l2 import l2_of_changes
from training.method.optimizer_wrappers import make_optimizer
from training.method.optimizers import AdamW
from training.models.base_model import find_base
from training.models.sdxl import Schedule
from training.models.weights import load_text_encoders, load_unet, load_vae
from training.system.device import Precision, make_deterministic

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


WAYS = {
    "prodigy": ({"optimizer": "prodigy", "learning_rate": 1.0}, {}),
    "LoRA+ and an average": ({"loraplus_ratio": 16.0, "ema_decay": 0.9}, {}),
    "prior": ({}, {"prior": True}),
    "pull": ({}, {"pull": 0.01}),
    "huber_snr, debiased": ({}, {"loss": "huber_snr", "weighting": "debiased"}),
}
"""Settings of the optimizer, and what else differs from the usual step."""


def trained_in_a_way(
    base: Path, way: str, name: str, *, captures: bool
) -> tuple[list[float], torch.Tensor, torch.Tensor, TrainStep]:
    """Losses, weights, and what would be saved of 12 steps, and the step itself."""
    settings, others = OptimizerSettings(**WAYS[way][0]), dict(WAYS[way][1])
    has_prior, pull = others.pop("prior", False), others.pop("pull", 0.0)
    unet, lora = fresh(base, torch.bfloat16)
    step = step_of(name, unet, lora, make_optimizer(lora, settings), captures=captures)
    step.config = replace(step.config, **others)
    step.add_gradient = l2_of_changes(lora, pull) if pull else None
    rate = settings.learning_rate if settings.optimizer == "prodigy" else RATE
    losses = []
    for number in range(12):
        batch = batch_of(number % 3)
        if has_prior:
            other = batch_of(100 + number)
            rows = torch.tensor([0])
            prior = {"prior_rows": rows, "prior_hidden": other.hidden[rows], "prior_pooled": other.pooled[rows]}
            batch = replace(batch, **prior, prior_weights=torch.ones(1)).pinned()
        losses.append(step([batch], rate).loss)
    saved = step.optimizer.averaged_weights()
    return losses, lora.weights.detach().clone(), lora.weights.detach() if saved is None else saved, step


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_training_is_captured_and_the_captured_steps_are_the_eager_ones(base, capsys, way):
    losses, weights, saved, _ = trained_in_a_way(base, way, "fast", captures=False)
    captured_losses, captured, captured_saved, step = trained_in_a_way(base, way, "fast", captures=True)
    assert "CUDA graphs: off" not in capsys.readouterr().out
    assert step.graphs is not None
    assert losses == captured_losses
    assert torch.equal(weights, captured)
    assert torch.equal(saved, captured_saved)
    assert torch.equal(saved, weights) is (way != "LoRA+ and an average")


def test_the_base_model_is_asked_in_a_captured_step_of_either_engine(base, capsys):
    losses = [trained_in_a_way(base, "prior", name, captures=True)[0] for name in ("fast", "plain")]
    assert "CUDA graphs: off" not in capsys.readouterr().out
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("is_short", [False, True])
def test_captured_steps_are_the_eager_ones_bit_for_bit(base, is_short):
    losses, learned = trained(base, captures=False, is_short=is_short)
    captured_losses, captured = trained(base, captures=True, is_short=is_short)
    assert losses == captured_losses
    assert all(torch.equal(learned[name], captured[name]) for name in learned)


def test_captured_steps_in_fp16_are_the_eager_ones_bit_for_bit(base):
    """Scaled losses are in the graph; the update, which the scaler may skip, is not."""
    runs = []
    for captures in (True, False):
        unet, lora = fresh(base, torch.float16)
        sync = prepare_unet("fast", unet, lora, torch.device("cuda"))
        precision = Precision(torch.device("cuda"), torch.float16)
        optimizer = AdamW(lora.weights, OptimizerSettings())
        step = TrainStep(unet, lora, optimizer, loss_config(), precision, 1.0, sync_compute_weights=sync, captures=captures)
        results = [step([in_fp16(batch_of(number % 10))], RATE) for number in range(STEPS)]
        assert bool(step.graphs) == captures
        assert not all(result.skipped for result in results)
        runs.append(([result.loss for result in results], lora.weights.detach().cpu()))
    (losses, weights), (expected_losses, expected) = runs
    assert losses == expected_losses
    assert torch.equal(weights, expected)


def with_tokens(batch: Batch, prior: bool) -> Batch:
    """The batch with captions of two chunks that are still to be encoded."""
    generator = torch.Generator().manual_seed(int(batch.timesteps.sum()))
    tokens = torch.randint(3, 20, (len(batch.weights) + 1, 2, 2, 77), generator=generator)
    tokens[..., 30:] = 2
    of_prior = {"prior_rows": torch.tensor([1]), "prior_tokens": tokens[-1:], "prior_weights": torch.ones(1)} if prior else {}
    empty = {"hidden": torch.empty(0), "pooled": torch.empty(0)}
    return replace(batch, tokens=tokens[:-1], **empty, **of_prior).pinned()


@pytest.mark.parametrize(
    "how",
    [{}, {"recomputes": True}, {"prior": True}, {"dtype": torch.float16}, {"optimizer": "prodigy"}],
    ids=lambda how: " ".join(how) or "plain",
)
def test_captured_steps_that_train_the_text_encoders_are_the_eager_ones_bit_for_bit(base, capsys, how):
    """Attention under a causal mask, the choice of the pooled token and both rates are in the graph. The loss falls."""
    dtype, device, runs = how.get("dtype", torch.bfloat16), torch.device("cuda"), []
    name = how.get("optimizer", "adamw")
    rates = {"learning_rate": RATE, "text_encoder_lr": RATE / 10} if name == "adamw" else {"learning_rate": 1, "text_encoder_lr": 1}
    settings = OptimizerSettings(optimizer=name, **rates)
    for captures in (True, False):
        encoders = load_text_encoders(find_base(str(base), base.parent), device, dtype)
        unet = load_unet(find_base(str(base), base.parent), device, dtype)
        lora = inject(unet, LoraSettings(lora_rank=8, lora_alpha=8.0, train_text_encoders=True), 3, encoders)
        sync = prepare_unet("plain", unet, lora, device, gradient_checkpointing="recomputes" in how)
        if "recomputes" in how:
            recompute_text_encoders(encoders, lora)
        others = {"text_encoders": encoders, "sync_compute_weights": sync, "captures": captures}
        step = TrainStep(unet, lora, make_optimizer(lora, settings), loss_config(), Precision(device, dtype), 1.0, **others)
        batches = [with_tokens(batch_of(number % 3), "prior" in how) for number in range(12)]
        results = [step([batch], settings.learning_rate) for batch in batches]
        assert "CUDA graphs: off" not in capsys.readouterr().out
        assert bool(step.graphs) == captures
        runs.append(([result.loss for result in results], lora.weights.detach().cpu()))
        assert lora.modules[-1].zero.any()
    (losses, weights), (expected_losses, expected) = runs
    assert losses == expected_losses
    assert torch.equal(weights, expected)


def masked(batch: Batch, weight: float) -> Batch:
    """The batch with masks of which the right half has that weight."""
    mask = torch.ones(len(batch.weights), 1, *batch.mean.shape[2:])
    mask[..., mask.shape[-1] // 2 :] = weight
    return replace(batch, mask=mask).pinned()


@pytest.mark.parametrize("name", ["fast", "plain"])
def test_captured_steps_with_masks_are_the_eager_ones_bit_for_bit(base, name):
    """Steps with and without masks are different graphs. A mask that is 1 everywhere changes nothing; another one does."""
    order = [(number, weight) for number in range(3) for weight in (None, 0.1, 1.0)]
    runs = []
    for captures in (True, False):
        step, lora = stepper(base, name, captures=captures)
        batches = [batch_of(number) if weight is None else masked(batch_of(number), weight) for number, weight in order]
        runs.append(([step([batch], RATE).loss for batch in batches], lora.weights.detach().cpu()))
        assert bool(step.graphs) == captures
    (losses, weights), (expected_losses, expected) = runs
    assert losses == expected_losses
    assert torch.equal(weights, expected)
    step, _ = stepper(base, name)
    plain, masked_loss, same = (
        step([batch], 0.0).loss for batch in (batch_of(0), masked(batch_of(0), 0.1), masked(batch_of(0), 1.0))
    )
    assert same == plain
    assert masked_loss < 0.8 * plain


@pytest.mark.parametrize("name", ["fast", "plain"])
def test_losses_of_samples_are_the_same_in_a_graph(base, name):
    """They arrive with the numbers of their own step, also where the next one has begun."""
    runs = []
    for captures in (True, False):
        step, _ = stepper(base, name, captures=captures)
        samples, running = [], None
        for number in range(6):
            begun = step.begin([masked(batch_of(number), 0.1), masked(batch_of(number + 10), 1.0)], RATE)
            if running:
                samples.append(running().samples)
            running = begun
        runs.append(samples)
    captured, eager = runs
    assert captured == eager
    assert all(len(samples) == 8 for samples in captured)
    for number, samples in enumerate(captured):
        expected = [*batch_of(number).timesteps.tolist(), *batch_of(number + 10).timesteps.tolist()]
        assert [timestep for timestep, _ in samples] == expected


@pytest.mark.parametrize("name", ["fast", "plain"])
def test_captured_steps_with_regularization_images_of_another_shape_are_the_eager_ones_bit_for_bit(base, name):
    runs = []
    for captures in (True, False):
        step, lora = stepper(base, name, captures=captures)
        losses = []
        for number in range(6):
            prior = batch_of(number + 10, height=16, width=48)
            losses.append(step([batch_of(number), replace(prior, weights=0.5 * prior.weights).pinned()], RATE).loss)
        runs.append((losses, lora.weights.detach().clone()))
    (captured_losses, captured), (losses, weights) = runs
    assert captured_losses == losses
    assert torch.equal(captured, weights)


def test_each_shape_of_micro_batches_is_one_graph_however_they_are_combined(base):
    """Nine pairs of three shapes, each of which occurs once: after the first three steps nothing runs eagerly."""
    shapes = [(32, 32), (24, 40), (16, 48)]
    pairs = [(number, (number + shift) % 3) for shift in range(3) for number in range(3)]
    runs = []
    for captures in (True, False):
        step, lora = stepper(base, captures=captures)
        losses = []
        for number, pair in enumerate(pairs):
            batches = [batch_of(10 * number + place, 2, *shapes[shape]) for place, shape in enumerate(pair)]
            losses.append(step(batches, RATE).loss)
            if captures and number == 2:
                assert step.graphs.captured == 3
        runs.append((losses, lora.weights.detach().clone()))
        if captures:
            assert step.graphs.captured == 3
    (captured_losses, captured), (losses, weights) = runs
    assert captured_losses == losses
    assert torch.equal(captured, weights)


@pytest.fixture
def deterministic():
    """cuDNN's attention adds up gradients of keys in any order."""
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("in_turn", [False, True])
def test_training_goes_on_as_without_sample_images_bit_for_bit(base, tmp_path, in_turn):
    """The images are those of eager networks. In turn, they are rendered in the memory that the captured steps held."""
    found, one = find_base(str(base), base.parent), batch_of(0, 1)
    save_file({"hidden": one.hidden, "pooled": one.pooled}, tmp_path / "text.safetensors")
    prompt, texts = SamplePrompt("", "trigger", "", 256, 256, seed=1, guidance=4.0, steps=2), {"": tmp_path / "text.safetensors"}
    runs = {}
    for captures, renders in ((True, True), (True, False), (False, True)):
        step, lora = stepper(base, captures=captures)
        losses, images = [], []
        for number in range(10):
            losses.append(step([batch_of(number, 16, 64, 64)], RATE).loss)
            if not renders or number % 3 < 2:
                continue
            vae = load_vae(found, torch.device("cpu"))
            renderer = Renderer(step, Schedule(), texts, vae, tiled=in_turn, in_turn=in_turn)
            held = torch.cuda.memory_reserved()
            renderer.begin()
            if captures and in_turn:
                assert torch.cuda.memory_reserved() < 0.3 * held
            images += [np.asarray(renderer.decoded(renderer.latents(prompt))) for _ in range(3)]
            renderer.release()
        assert bool(step.graphs and step.graphs.captured) is captures
        runs[captures, renders] = losses, images, lora.weights.detach().clone()
    losses, images, weights = runs[False, True]
    assert all(np.array_equal(mine, eager) for mine, eager in zip(runs[True, True][1], images, strict=True))
    assert all(run[0] == losses and torch.equal(run[2], weights) for run in runs.values())


@pytest.mark.usefixtures("deterministic")
def test_a_new_shape_takes_the_memory_of_graphs_where_it_is_short(base, monkeypatch):
    """Its first step runs eagerly: beside the memory of graphs, it would need as much again."""
    peaks, runs = [], []
    for available in (2**60, 0):
        monkeypatch.setattr(step_module, "available_bytes", lambda _, available=available: available)
        step, lora = stepper(base)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        sizes = [(64, 64), (64, 64), (64, 64), (56, 72), (64, 64), (56, 72), (72, 56), (64, 64), (72, 56)]
        losses = [step([batch_of(number, 16, *size)], RATE).loss for number, size in enumerate(sizes)]
        assert step.graphs.captured >= 2
        peaks.append(torch.cuda.max_memory_reserved() - before)
        runs.append((losses, lora.weights.detach().clone()))
        del step, lora
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert peaks[1] < 0.7 * peaks[0]


def in_fp16(batch: Batch) -> Batch:
    return Batch(**{name: each.half() if each.dtype == torch.bfloat16 else each for name, each in vars(batch).items()}).pinned()


def test_shapes_may_come_in_any_order(base):
    """Graphs of several buckets share one memory pool."""
    captured, _ = stepper(base)
    shapes = [(32, 32), (24, 40), (40, 24)]
    order = [0, 0, 1, 1, 2, 2, 0, 2, 1, 0, 1, 2, 2, 0, 1]
    losses = [captured([batch_of(i, 4, *shapes[shape])], RATE).loss for i, shape in enumerate(order)]
    eager, _ = stepper(base, captures=False)
    assert losses == [eager([batch_of(i, 4, *shapes[shape])], RATE).loss for i, shape in enumerate(order)]


def test_broken_step_changes_nothing_in_a_graph(base):
    step, lora = stepper(base)
    for number in range(3):
        step([batch_of(number)], RATE)
    before = lora.weights.detach().clone()
    bad = copy.deepcopy(batch_of(4))
    bad.mean[0, 0, 0, 0] = float("nan")
    first, second = step.begin([bad], RATE), step.begin([batch_of(5)], RATE)
    assert first().diverged
    assert second().loss > 0
    assert torch.equal(lora.weights, before)


@pytest.mark.parametrize("name", ["fast", "plain"])
def test_dora_trains_in_a_graph(base, name):
    unet = load_unet(find_base(str(base), base.parent), torch.device("cuda"), torch.bfloat16)
    lora = inject(unet, LoraSettings(lora_rank=8, lora_alpha=8.0, lora_type="dora"), seed=3)
    step = step_of(name, unet, lora, AdamW(lora.weights, OptimizerSettings()))
    before = [module.magnitude.clone() for module in lora.modules]
    losses = [step([batch_of(0)], RATE).loss for _ in range(STEPS)]
    assert losses[-1] < losses[0]
    assert not any(torch.equal(module.magnitude, start) for module, start in zip(lora.modules, before, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_type": "loha", "lora_conv_rank": 4},
        {"lora_type": "lokr", "lora_conv_rank": 4},
        {"lora_type": "lokr", "lokr_factor": 4},
        {"lora_conv_rank": 4},
        {"lora_type": "dora", "lora_conv_rank": 4},
        {"lora_dropout": 0.2},
        {"lora_type": "dora", "lora_dropout": 0.2},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_captured_steps_of_every_adapter_are_the_eager_ones(base, settings):
    """With dropout, too: both draw the same masks, and other ones in each step."""
    runs = []
    for captures in (True, False):
        unet = load_unet(find_base(str(base), base.parent), torch.device("cuda"), torch.bfloat16)
        lora = inject(unet, LoraSettings(lora_rank=8, **settings), seed=3)
        step = step_of("plain", unet, lora, AdamW(lora.weights, OptimizerSettings()), captures=captures)
        runs.append([step([batch_of(number % 2)], RATE).loss for number in range(12)])
        assert bool(step.graphs) == captures
    assert runs[0] == pytest.approx(runs[1], rel=5e-3)
    assert runs[0][10] < runs[0][0]


@pytest.mark.parametrize("how", [{}, {"recomputes": True}, {"in_int8": True}], ids=str)
@pytest.mark.parametrize("settings", FAST_ADAPTERS, ids=str)
def test_captured_steps_of_adapters_of_the_fast_engine_are_the_eager_ones_bit_for_bit(base, settings, how):
    if how.get("in_int8") and settings.get("lora_type") == "dora":
        pytest.skip("a DoRA has exact frozen weights")
    runs = []
    for captures in (True, False):
        found = find_base(str(base), base.parent)
        unet = load_unet(found, torch.device("cuda"), torch.bfloat16, in_int8=how.get("in_int8", False))
        lora = inject(unet, LoraSettings(lora_rank=8, **settings), seed=3)
        optimizer = AdamW(lora.weights, OptimizerSettings())
        step = step_of("fast", unet, lora, optimizer, how.get("recomputes", False), captures)
        losses = [step([batch_of(number % 2)], RATE).loss for number in range(12)]
        assert bool(step.graphs) == captures
        runs.append((losses, lora.weights.detach().clone()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0][10] < runs[0][0][0]
