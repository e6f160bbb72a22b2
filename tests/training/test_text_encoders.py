"""Training of the text encoders: gradient, rates, names in the file, and runs as a user starts them."""

import contextlib
import copy
import csv
import io
import json
import math
import re
import signal
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import lora_tool
from common.errors import SettingsError
from demo import tiny_sdxl
from training.config import LoraSettings, OptimizerSettings
from training.data.batches import Batch
from training.data.captions import encode_captions, encode_tokens, tokens_of
from training.engine import prepare_unet, recompute_text_encoders
from training.engine.step import TrainStep
from training.method.adapters import inject
from training.method.comfyui_modules import COMFYUI_MODULES
from training.method.diffusion import LossConfig, alphas_cumprod
from training.method.export import write_lora
from training.method.layers import adapted_layers, kohya_name, weight_shapes
from training.method.lora_l2 import l2_of_changes
from training.method.optimizer_wrappers import make_optimizer
from training.models.base_model import find_base
from training.models.sdxl import Schedule
from training.models.weights import UNet2DConditionModel, load_text_encoders, load_tokenizers, load_unet
from training.system.device import Precision

CPU = torch.device("cpu")
WORDS, END = 64, 2
LORA = LoraSettings(lora_rank=4, lora_alpha=2.0, train_text_encoders=True)


@pytest.fixture(scope="module")
def networks() -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection]:
    """A small UNet, conditioned as SDXL's is, and two small text encoders of its widths."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=2, cross_attention_dim=96, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64 + 6 * 8,
    )  # fmt: skip
    shared = {"vocab_size": WORDS, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": END, "pad_token_id": 1}
    first = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, projection_dim=32, **shared)
    second = CLIPTextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, projection_dim=64, hidden_act="gelu", **shared
    )
    found = unet, CLIPTextModel(first), CLIPTextModelWithProjection(second)
    return tuple(network.requires_grad_(False).eval() for network in found)


def adapted(networks, settings=LORA):
    """Copies of the networks with an adapter that changes something in every layer."""
    unet, *encoders = copy.deepcopy(networks)
    adapter = inject(unet, settings, 7, encoders)
    generator = torch.Generator().manual_seed(1)
    for module in adapter.modules:
        module.zero.copy_(0.1 * torch.randn(module.zero.shape, generator=generator))
    return unet, tuple(encoders), adapter


def batch_of(chunks: int = 2, prior: bool = False) -> Batch:
    """Three samples; their captions have `chunks` chunks."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(3, *shape, generator=generator)

    tokens = torch.randint(3, WORDS, (5, 2, chunks, 77), generator=generator)
    for row, length in enumerate((5, 76, 20, 9, 30)):
        tokens[row, :, -1, length:] = END
    tokens[..., 0], tokens[..., -1] = 0, END
    of_prior = {"prior_rows": torch.tensor([0, 2]), "prior_tokens": tokens[3:], "prior_weights": torch.tensor([0.3, 0.4])}
    return Batch(
        mean=5 * normal(4, 8, 8), log_variance=0.3 * normal(4, 8, 8) - 2, latent_noise=normal(4, 8, 8), noise=normal(4, 8, 8),
        offset=normal(4, 1, 1), timesteps=torch.tensor([20, 500, 900]), weights=torch.full((3,), 1 / 3), tokens=tokens[:3],
        add_time_ids=torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 3), **(of_prior if prior else {}),
    )  # fmt: skip


def step_of(unet, encoders, adapter, **how) -> TrainStep:
    config = LossConfig("epsilon", alphas_cumprod(Schedule()).float(), 0.0, 0.0, 0.13025)
    how = {"sync_compute_weights": prepare_unet("plain", unet, adapter, CPU), "text_encoders": encoders} | how
    return TrainStep(unet, adapter, make_optimizer(adapter, OptimizerSettings()), config, Precision(CPU, torch.float32), 0.0, **how)


def gradient_of(step: TrainStep, batch: Batch) -> tuple[float, torch.Tensor]:
    step.adapter.sums.zero_()
    step.sync_compute_weights()
    with step.adapter.dropping():
        loss, _ = step.weighted_loss(batch)
        loss.backward()
    return loss.item(), step.adapter.sums[:-1].clone()


def reference(networks, adapter, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient in float64 with ordinary networks, whose weights are W + scale up @ down: no PEFT, and each chunk alone."""
    plain = [copy.deepcopy(network).double() for network in networks]
    factors = {module.name: [each.double().requires_grad_() for each in module.factors.values()] for module in adapter.modules}
    changed: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for module in adapter.modules:
        number = 2 if module.name.startswith("text_encoder_2.") else 1 if module.name.startswith("text_encoder.") else 0
        inner = module.name if number == 0 else module.name.partition(".")[2]
        path = next(path for path, _ in plain[number].named_modules() if path and inner.endswith(path) and path.count(".") > 2)
        down, up = factors[module.name]
        changed[number][f"{path}.weight"] = plain[number].get_submodule(path).weight + module.scale * up @ down

    def encoded(tokens: torch.Tensor, weights) -> tuple[torch.Tensor, torch.Tensor]:
        sides = []
        for number in (1, 2):
            chunks = [
                functional_call(plain[number], weights[number], (chunk[None],), {"output_hidden_states": True})
                for chunk in tokens[number - 1]
            ]
            sides.append(torch.cat([chunk.hidden_states[-2] for chunk in chunks], dim=1))
        pooled = functional_call(plain[2], weights[2], (tokens[1][:1],)).text_embeds
        return torch.cat(sides, dim=2), pooled

    def predicted(noisy: torch.Tensor, row: int, tokens: torch.Tensor, weights) -> torch.Tensor:
        hidden, pooled = encoded(tokens, weights)
        conditions = {"text_embeds": pooled, "time_ids": batch.add_time_ids[row][None].double()}
        inputs = (noisy[None], batch.timesteps[row], hidden)
        return functional_call(plain[0], weights[0], inputs, {"added_cond_kwargs": conditions}).sample[0]

    roots = [math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / 999 for t in range(1000)]
    shares = torch.tensor([1 - root * root for root in roots], dtype=torch.float64).cumprod(0)
    total = torch.zeros((), dtype=torch.float64)
    for row, timestep in enumerate(batch.timesteps.tolist()):
        mean, log_variance, sampled, noise = (
            each[row].double() for each in (batch.mean, batch.log_variance, batch.latent_noise, batch.noise)
        )
        latents = (mean + (log_variance / 2).exp() * sampled) * 0.13025
        noisy = shares[timestep].sqrt() * latents + (1 - shares[timestep]).sqrt() * noise
        total = total + ((predicted(noisy, row, batch.tokens[row], changed) - noise) ** 2).mean() / 3
        for number in (number for number, each in enumerate(batch.prior_rows.tolist()) if each == row):
            with torch.no_grad():
                expected = predicted(noisy, row, batch.prior_tokens[number], ({}, {}, {}))
            error = predicted(noisy, row, batch.prior_tokens[number], changed) - expected
            total = total + batch.prior_weights[number] * (error**2).mean()
    return total.item(), torch.autograd.grad(total, [each for pair in factors.values() for each in pair], allow_unused=True)


@pytest.mark.parametrize("prior", [False, True], ids=["captions", "prior"])
def test_loss_and_gradient_are_those_of_ordinary_networks_in_float64(networks, prior):
    batch = batch_of(chunks=2, prior=prior)
    unet, encoders, adapter = adapted(networks)
    loss, _ = gradient_of(step_of(unet, encoders, adapter), batch)
    expected_loss, expected = reference(networks, adapter, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    ours = [view.grad for layer in adapter.modules for view in parameters_of(adapter, layer)]
    of_text = 0
    for module, (gradient, correct) in zip(
        [module for module in adapter.modules for _ in range(2)], zip(ours, expected, strict=True), strict=True
    ):
        if correct is None:  # the last layer of the first encoder, whose output SDXL does not read
            assert not gradient.any()
            assert module.name.startswith("text_encoder.text_model.encoder.layers.1.")
            continue
        assert (gradient - correct).norm() < 1e-4 * correct.norm(), module.name
        of_text += module.name.startswith("text_encoder")
    assert of_text == 2 * (6 * 1 + 6 * 3)


def parameters_of(adapter, module):
    """PEFT's parameters of a layer, first `down`."""
    layer = adapter.layers[module.name]
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_each_kind_begins_at_nothing_and_recomputing_gives_the_same_gradient(networks, kind):
    settings = replace(LORA, lora_type=kind)
    tokens = batch_of().tokens
    unet, *encoders = copy.deepcopy(networks)
    before = encode_tokens(tokens, networks[1:])
    inject(unet, settings, 7, encoders)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(before, encode_tokens(tokens, encoders), strict=True))
    unet, encoders, adapter = adapted(networks, settings)
    assert not torch.allclose(before[0], encode_tokens(tokens, encoders)[0], atol=1e-3)
    loss, gradient = gradient_of(step_of(unet, encoders, adapter), batch_of())
    assert gradient[adapter.unet_weights :].any()
    recompute_text_encoders(encoders, adapter)
    again, same = gradient_of(step_of(unet, encoders, adapter), batch_of())
    assert (again, gradient.tolist()) == (loss, same.tolist())


def test_dropout_is_drawn_for_the_encoders_and_drawn_again_when_they_are_recomputed(networks):
    settings = replace(LORA, lora_dropout=0.3)
    results = []
    for recomputes in (False, True):
        unet, encoders, adapter = adapted(networks, settings)
        if recomputes:
            recompute_text_encoders(encoders, adapter)
        step = step_of(unet, encoders, adapter)
        torch.manual_seed(3)
        results.append(gradient_of(step, batch_of())[1])
    without = gradient_of(step_of(*adapted(networks)), batch_of())[1]
    assert torch.equal(*results)
    first = adapter.unet_weights
    assert (results[0][first:] - without[first:]).norm() > 0.1 * without[first:].norm()


def test_the_pull_to_the_base_model_is_of_the_encoders_too(networks):
    adapter = adapted(networks)[2]
    adapter.sums.zero_()
    l2_of_changes(adapter, 0.5)()
    for module in (module for module in adapter.modules if module.name.startswith("text_encoder")):
        down, up = (factor.detach().double().requires_grad_() for factor in module.factors.values())
        (0.5 * (module.scale * up @ down).square().sum()).backward()
        ours = parameters_of(adapter, module)
        assert torch.allclose(ours[0].grad.double(), down.grad, rtol=1e-4, atol=1e-9)
        assert torch.allclose(ours[1].grad.double(), up.grad, rtol=1e-4, atol=1e-9)


def test_nothing_of_an_encoder_needs_values_on_the_cpu(networks):
    """A meta tensor raises an error where a number is read from it, as a CUDA graph's capture does."""
    encoders = tuple(encoder.to("meta") for encoder in adapted(networks)[1])
    hidden, pooled = encode_tokens(batch_of().tokens.to("meta"), encoders)
    assert (hidden.shape, pooled.shape) == ((3, 154, 96), (3, 64))


OPTIMIZERS = {
    "adamw": {},
    "adamw, LoRA+, average": {"loraplus_ratio": 4.0, "ema_decay": 0.9},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_lr": 0.5},
    "schedulefree": {"optimizer": "schedulefree"},
    "adafactor": {"optimizer": "adafactor"},
}


def drawn_gradients(adapter, optimizer, steps, settings):
    """Take steps with gradients that depend on the step alone."""
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        adapter.sums.copy_(0.01 * torch.randn(adapter.sums.shape, generator=generator))
        optimizer.step(torch.tensor(settings.learning_rate * (0.5 if number > 2 else 1)), torch.tensor(0.0))


@pytest.mark.parametrize("changes", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_of_two_rates_continues_exactly(networks, changes):
    if changes.get("optimizer") == "schedulefree":
        pytest.importorskip("schedulefree")
    settings = OptimizerSettings(**changes)
    whole, first, second = (adapted(networks)[2] for _ in range(3))
    optimizer, stopped, resumed = (make_optimizer(each, settings) for each in (whole, first, second))
    drawn_gradients(whole, optimizer, range(9), settings)
    drawn_gradients(first, stopped, range(4), settings)
    resumed.load_state_dict(safetensors.torch.load(safetensors.torch.save(stopped.state_dict())))
    second.weights.detach().copy_(first.weights)
    drawn_gradients(second, resumed, range(4, 9), settings)
    assert torch.equal(second.weights, whole.weights)
    average = resumed.averaged_weights()
    assert average is None or torch.equal(average, optimizer.averaged_weights())
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    whole.sums.fill_(float("nan"))
    optimizer.step(torch.tensor(1e-3), torch.tensor(1.0))
    assert torch.equal(second.weights, whole.weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state_dict().items())


def test_each_part_has_the_steps_of_torchs_adamw_at_its_rate(networks):
    settings = OptimizerSettings(learning_rate=1e-3, text_encoder_lr=2e-5, weight_decay=0.1)
    adapter = adapted(networks)[2]
    split = adapter.unet_weights
    parts = [torch.nn.Parameter(part.detach().clone()) for part in (adapter.weights[:split], adapter.weights[split:])]
    groups = [{"params": [part], "lr": rate} for part, rate in zip(parts, (1e-3, 2e-5), strict=True)]
    theirs = torch.optim.AdamW(groups, weight_decay=0.1)
    optimizer = make_optimizer(adapter, settings)
    for number in range(6):
        drawn_gradients(adapter, optimizer, [number], settings)
        for part, group in zip(parts, theirs.param_groups, strict=True):
            group["lr"] = (1e-3 if part is parts[0] else 2e-5) * (0.5 if number > 2 else 1)
        parts[0].grad, parts[1].grad = adapter.sums[:split].clone(), adapter.sums[split:-1].clone()
        theirs.step()
    assert torch.allclose(adapter.weights, torch.cat(parts), rtol=0, atol=1e-7)
    assert (adapter.weights[split:] - adapted(networks)[2].weights[split:]).abs().max() > 1e-5


def test_the_layers_are_the_722_and_264_that_comfyui_takes_with_their_sizes():
    networks = tiny_sdxl.networks(tiny_sdxl.FULL)
    shapes = weight_shapes(networks["unet"], [networks["text_encoder"], networks["text_encoder_2"]])
    layers = adapted_layers(shapes, LORA)
    with COMFYUI_MODULES.open(encoding="utf-8", newline="") as file:
        known = {row["kohya_module"]: (int(row["out_features"]), int(row["in_features"])) for row in csv.DictReader(file)}
    ours = {kohya_name(name): shapes[name] for name in layers}
    assert len(ours) == len(layers) == 722 + 264
    assert ours.items() <= known.items()
    of_text = {name for name in ours if name.startswith("lora_te")}
    assert {name for name in known if name.startswith("lora_te") and "_layers_" in name} == of_text
    assert sum(name.startswith("lora_te1_") for name in of_text) == 72
    attention = adapted_layers(shapes, replace(LORA, lora_targets="attention"))
    assert len(attention) == 560 + 4 * 44
    few = adapted_layers(shapes, replace(LORA, lora_rank_pattern="lora_te2=8:4 text_encoder.text_model=0 lora_unet=0"))
    assert {(kohya_name(name)[:9], layer.rank, layer.alpha) for name, layer in few.items()} == {("lora_te2_", 8, 4.0)}
    assert len(few) == 192
    with pytest.raises(SettingsError, match="leaves out every layer of the text encoders"):
        adapted_layers(shapes, replace(LORA, lora_rank_pattern="attn2=4 .=0"))
    assert list(adapted_layers(weight_shapes(networks["unet"]), LoraSettings())) == [
        name for name in layers if not name.startswith("text")
    ]


def test_tokens_of_a_caption_become_the_embeddings_that_are_cached_otherwise(tiny_sdxl):
    base = find_base(str(tiny_sdxl), tiny_sdxl.parent)
    tokenizers, encoders = load_tokenizers(base, tiny_sdxl.parent), load_text_encoders(base, CPU, torch.float32)
    texts = ["sks, smile, red hair", "smile " * 90, ""]
    tokens = tokens_of(texts, tokenizers, 3)
    assert (tokens.shape, tokens.dtype) == ((3, 2, 3, 77), torch.int64)
    for live, cached in zip(encode_tokens(tokens, encoders), encode_captions(texts, tokenizers, encoders, 3), strict=True):
        assert torch.equal(live, cached)


QUICK = {"NUM_TRAIN_EPOCHS": 3, "LEARNING_RATE": 0.01, "SAVE_EVERY_EPOCHS": 0}
TEXT = {"TRAIN_TEXT_ENCODERS": "true", "TEXT_ENCODER_LR": 0.005}


def losses(output) -> list[float]:
    lines = (output / "lora" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture
def images(stage):
    """The stage with two photographs, one with a caption of several chunks."""
    stage.add("astronaut", caption="sks, woman, " + ", ".join(f"smile {number}" for number in range(40)))
    stage.add("coffee", caption="sks, woman, red cup")
    return stage


@pytest.mark.long
def test_a_stopped_run_ends_with_the_same_lora_of_all_networks(images):
    """With everything that touches the captions: shuffles, dropout, several chunks, the prior, sample images with prompts."""
    how = (
        QUICK
        | TEXT
        | {"NUM_TRAIN_EPOCHS": 8, "CAPTION_DROPOUT": 0.3, "PRIOR_PRESERVATION": 1, "EMA_DECAY": 0.9, "LORA_DROPOUT": 0.1}
    )
    how |= {"SAMPLES": "true", "SAMPLE_PROMPTS": "sks, woman --s 2", "SAMPLE_SIZE": 64, "SAMPLE_EVERY_EPOCHS": 0}
    other = images.output.with_name("whole")
    output = images.trained(**how, OUTPUT_DIR=other)
    assert "engine: plain (the fast engine does not support LORA_DROPOUT=0.1)" in output
    assert "752 modules of rank 2, alpha 2 (scale 1), in the text encoders too" in output
    assert re.search(r"captions: \d+ encoded, \d+ in the cache, 3 x 75 tokens", output)
    assert not (other / "cache" / "text").exists()
    assert images.stopped(3, signal.SIGTERM, **how).returncode == 143
    assert 3 <= len(losses(images.output)) < len(losses(other))
    assert "continuing at step" in images.trained(**how)
    assert losses(images.output) == losses(other)
    lines = [json.loads(line) for line in (other / "lora" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[-1]["lr"] == 0.01
    assert all(line["text_encoder_lr"] == pytest.approx(line["lr"] / 2) for line in lines)
    whole, resumed = (load_file(root / "lora" / images.lora.name) for root in (other, images.output))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    ups = {name: tensor for name, tensor in whole.items() if name.startswith("lora_te") and name.endswith("lora_up.weight")}
    assert len(ups) == 30
    untrained = {name for name, tensor in ups.items() if not tensor.any()}
    assert {name.split("_self")[0].split("_mlp")[0] for name in untrained} == {"lora_te1_text_model_encoder_layers_1"}
    assert "nothing to do" in images.trained(**how)


@pytest.mark.long
def test_the_text_encoders_alone_are_trained_shown_and_described(images):
    """The sample images are made with the encoders as they are at each save; the loss is another one from the second step on."""
    alone = QUICK | TEXT | {"LORA_RANK_PATTERN": "lora_unet=0", "TEXT_ENCODER_LR": 0.05}
    alone |= {"SAMPLES": "true", "SAMPLE_PROMPTS": "sks, woman --s 3", "SAMPLE_SIZE": 64}
    alone |= {"SAMPLE_EVERY_EPOCHS": 1, "SAVE_EVERY_EPOCHS": 1}
    checked = images.run("--check", **alone)
    assert checked.returncode == 0
    assert "LoRA: 30 layers" in checked.stdout
    refused = images.run("--check", **alone | {"ENGINE": "fast"})
    assert "ENGINE=fast: the fast engine does not support TRAIN_TEXT_ENCODERS=true; set ENGINE=auto" in refused.stderr
    output = images.trained(**alone)
    assert "engine: plain (the fast engine does not support TRAIN_TEXT_ENCODERS=true)" in output
    rows = [Image.open(path).tobytes() for path in sorted((images.output / "samples").rglob("*.png"))]
    assert len(rows) >= 4  # the base model, two epochs and the end
    assert len(set(rows)) == len(rows)
    assert {name.split("_")[1] for name in load_file(images.lora)} == {"te1", "te2"}
    with safetensors.safe_open(images.lora, "pt") as file:
        about = file.metadata()
    assert (about["ss_unet_lr"], about["ss_text_encoder_lr"]) == ("0.01", "0.05")
    taken = losses(images.output)
    frozen = images.output.with_name("frozen")
    images.trained(**QUICK, ENGINE="plain", OUTPUT_DIR=frozen)
    assert losses(frozen)[0] == taken[0]  # the encoders change nothing yet
    assert losses(frozen)[2] != taken[2]


def test_a_file_of_all_networks_is_shown_resized_merged_and_baked(tiny_sdxl, tmp_path):
    """The baked checkpoint encodes as the adapted encoders do, so that every layer has the right name in the file."""
    base = find_base(str(tiny_sdxl), tiny_sdxl.parent)
    settings = replace(LORA, lora_rank_pattern=r"transformer_blocks.[1-9]=0")
    encoders = load_text_encoders(base, CPU, torch.float32)
    adapter = inject(load_unet(base, CPU, torch.float32), settings, 3, encoders)
    adapter.weights.detach().add_(0.05 * torch.randn(adapter.weights.shape, generator=torch.Generator().manual_seed(4)))
    write_lora(tmp_path / "mia.safetensors", adapter.modules, {})
    tool = ["--output", str(tmp_path / "out.safetensors"), "--force"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        lora_tool.main(["show", str(tmp_path / "mia.safetensors")])
    assert re.search(r"text encoder CLIP-L +12 ", output.getvalue())
    assert re.search(r"text encoder CLIP-G +18 ", output.getvalue())
    for command in (["resize", "--rank", "2"], ["merge", "--weights", "0.5"]):
        lora_tool.main([command[0], str(tmp_path / "mia.safetensors"), *command[1:], *tool])
        assert load_file(tmp_path / "out.safetensors").keys() == load_file(tmp_path / "mia.safetensors").keys()
    lora_tool.main(["bake", str(tiny_sdxl), str(tmp_path / "mia.safetensors"), "--output", str(tmp_path / "baked")])
    baked = load_text_encoders(find_base(str(tmp_path / "baked"), tmp_path), CPU, torch.float32)
    tokens = torch.randint(3, 20, (2, 2, 2, 77), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        of_base = encode_tokens(tokens, load_text_encoders(base, CPU, torch.float32))
        for ours, theirs, before in zip(encode_tokens(tokens, encoders), encode_tokens(tokens, baked), of_base, strict=True):
            assert (ours - theirs).norm() < 0.02 * (ours - before).norm()
