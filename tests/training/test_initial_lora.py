"""Runs that begin from a LoRA file: the first prediction is that of the file, whatever wrote it."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from common.errors import ModelError, SettingsError
from common.output_layout import OutputLayout
from demo import tiny_sdxl
from training.config import LoraSettings
from training.data.captions import encode_tokens
from training.initial_lora import initial_digest, load_initial, matching_layers
from training.method.adapters import inject
from training.method.export import write_lora
from training.method.layers import shapes_of_base
from training.models.base_model import find_base
from training.models.weights import load_text_encoders, load_unet

CPU = torch.device("cpu")
FEW = r"transformer_blocks.[1-9]=0"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_sdxl.build(tmp_path_factory.mktemp("models") / "tiny")
    return find_base(str(folder), folder.parent)


def written(base, path, **settings):
    """A LoRA file of a trained adapter, and the UNet with it."""
    unet = load_unet(base, CPU, torch.float32)
    settings = {"lora_rank": 4, "lora_alpha": 3.0, "lora_rank_pattern": FEW} | settings
    adapter = inject(unet, LoraSettings(**settings), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        adapter.weights.add_(0.05 * torch.randn(adapter.weights.shape, generator=generator))
    write_lora(path, adapter.modules, {})
    return unet


def begun(base, path, **settings):
    """A UNet with a fresh adapter that begins from the file."""
    settings = LoraSettings(**({"lora_rank": 4, "lora_rank_pattern": FEW, "init_lora": path} | settings))
    layers = matching_layers(settings, shapes_of_base(base, settings))
    unet = load_unet(base, CPU, torch.float32)
    adapter = inject(unet, settings, seed=8)
    load_initial(adapter, layers)
    return unet, adapter


def prediction(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    conditions = {"text_embeds": torch.randn(1, 64, generator=generator), "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]])}
    hidden, noisy = torch.randn(1, 77, 96, generator=generator), torch.randn(1, 4, 16, 16, generator=generator)
    with torch.no_grad():
        return unet(noisy, torch.tensor([500]), hidden, added_cond_kwargs=conditions).sample


def assert_begins_as(base, unet, expected) -> None:
    without = prediction(load_unet(base, CPU, torch.float32))
    change, of_file = prediction(unet) - without, prediction(expected) - without
    assert of_file.norm() > 0.02 * without.norm()
    assert (change - of_file).norm() < 0.01 * of_file.norm()


@pytest.mark.parametrize(
    ("of_file", "own"),
    [
        ({}, {}),
        ({"lora_rslora": True}, {"lora_alpha": 1.0}),  # another scale
        ({"lora_conv_rank": 2}, {"lora_conv_rank": 2, "lora_alpha": 8.0}),
        ({"lora_type": "dora"}, {"lora_type": "dora"}),
        ({"lora_type": "loha"}, {"lora_type": "loha", "lora_alpha": 1.0}),
        ({"lora_type": "lokr", "lokr_factor": 2}, {"lora_type": "lokr", "lokr_factor": 2, "lora_alpha": 1.0}),
        ({"lora_targets": "attention"}, {}),  # the other layers begin at nothing
        ({}, {"lora_rank": 7, "init_lora_resize": True, "lora_alpha": 2.0}),
        ({"lora_rank": 2}, {"lora_rank": 4, "lora_type": "lora", "init_lora_resize": True}),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "-",
)
def test_the_first_prediction_is_that_of_the_file(base, tmp_path, of_file, own):
    expected = written(base, tmp_path / "old.safetensors", **of_file)
    unet, _ = begun(base, tmp_path / "old.safetensors", **own)
    assert_begins_as(base, unet, expected)


def test_a_lower_rank_is_the_nearest_change_and_a_higher_one_can_learn(base, tmp_path):
    file = tmp_path / "old.safetensors"
    written(base, file, lora_rank=6)
    tensors = load_file(file)
    _, adapter = begun(base, file, lora_rank=2, init_lora_resize=True)
    name, module = (
        "lora_unet_middle_block_1_proj_in",
        next(m for m in adapter.modules if m.name == "mid_block.attentions.0.proj_in"),
    )
    change = 0.5 * tensors[f"{name}.lora_up.weight"].float() @ tensors[f"{name}.lora_down.weight"].float()  # alpha 3 of rank 6
    u, s, vh = torch.linalg.svd(change)
    ours = module.scale * module.zero @ module.factors["lora_down.weight"]
    torch.testing.assert_close(ours, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-4, atol=1e-5)
    _, higher = begun(base, file, lora_rank=9, init_lora_resize=True)
    module = next(m for m in higher.modules if m.name == "mid_block.attentions.0.proj_in")
    assert not module.zero[:, 6:].any()
    assert module.factors["lora_down.weight"][6:].abs().min(1).values.min() >= 0
    assert (module.factors["lora_down.weight"][6:].abs().max(1).values > 0).all()  # a gradient for each of the new columns


@pytest.mark.parametrize("spelling", ["peft", "diffusers"])
def test_names_of_diffusers_and_peft_are_read(base, tmp_path, spelling):
    """As PEFT's adapter_model.safetensors with its configuration, and as diffusers' save_lora_weights writes them: neither has
    alpha as a tensor."""
    expected = written(base, tmp_path / "old.safetensors")
    layers = {name: module for name, module in expected.named_modules() if hasattr(module, "lora_A")}
    prefix = {"peft": "base_model.model.", "diffusers": "unet."}[spelling]
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = layer.lora_A["default"].weight.detach().clone()
        tensors[f"{prefix}{name}.lora_B.weight"] = layer.lora_B["default"].weight.detach().clone()
    if spelling == "peft":
        file = tmp_path / "adapter_model.safetensors"
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 3.0}), encoding="utf-8")
        save_file(tensors, file)
    else:
        down = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        config = {"r": 4, "lora_alpha": 3.0, "target_modules": ["to_q"]}
        StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=down, unet_lora_adapter_metadata=config)
        file = tmp_path / "pytorch_lora_weights.safetensors"
    assert_begins_as(base, begun(base, file)[0], expected)


@pytest.mark.parametrize(
    ("of_file", "own", "problem"),
    [
        ({"lora_rank": 2}, {}, "has rank 2 instead of 4 in .* layers .*: set its rank, or INIT_LORA_RESIZE=true|INIT_LORA_RESIZE"),
        ({"lora_type": "loha"}, {}, "has a LoHa: set LORA_TYPE=loha"),
        ({}, {"lora_type": "dora"}, "has a LoRA: set LORA_TYPE=lora"),
        ({"lora_type": "dora"}, {}, "has a DoRA: set LORA_TYPE=dora"),
        ({"lora_conv_rank": 2}, {}, r"changes \d+ layers that these settings do not adapt .*LORA_CONV_RANK"),
        ({"lora_type": "loha", "lora_rank": 2}, {"lora_type": "loha"}, "set LORA_RANK and LOKR_FACTOR as for it"),
        ({"lora_type": "lokr"}, {"lora_type": "lokr", "lokr_factor": 2}, "set LORA_RANK and LOKR_FACTOR as for it"),
    ],
)
def test_a_file_that_needs_other_settings_is_refused_in_one_line(base, tmp_path, of_file, own, problem):
    written(base, tmp_path / "old.safetensors", **of_file)
    with pytest.raises(SettingsError, match=problem) as refused:
        begun(base, tmp_path / "old.safetensors", **own)
    assert str(refused.value).startswith("INIT_LORA: ")
    assert "\n" not in str(refused.value)


def test_text_encoders_of_a_file_are_left_out_and_other_models_refused(base, tmp_path, capsys):
    expected = written(base, tmp_path / "old.safetensors")
    tensors = load_file(tmp_path / "old.safetensors")
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    text = {f"{name}.lora_down.weight": torch.zeros(4, 768), f"{name}.lora_up.weight": torch.zeros(3072, 4)}
    save_file(tensors | text, tmp_path / "both.safetensors")
    assert_begins_as(base, begun(base, tmp_path / "both.safetensors")[0], expected)
    assert "INIT_LORA: 1 layers of text encoders are left out: these are not trained" in capsys.readouterr().out
    save_file(
        {"double_blocks_0_x.lora_down.weight": torch.zeros(4, 8), "double_blocks_0_x.lora_up.weight": torch.zeros(8, 4)},
        tmp_path / "flux.safetensors",
    )
    with pytest.raises(ModelError, match="is a LoRA of Flux, not of SDXL"):
        begun(base, tmp_path / "flux.safetensors")


def test_the_file_is_known_by_its_content_and_is_not_one_that_the_run_replaces(tmp_path):
    outputs = OutputLayout(tmp_path, "mia")
    outputs.lora_dir.mkdir()
    assert initial_digest(LoraSettings(), outputs, None) is None
    path = tmp_path / "old.safetensors"
    with pytest.raises(SettingsError, match="no such file"):
        initial_digest(LoraSettings(init_lora=path), outputs, None)
    assert initial_digest(LoraSettings(init_lora=path), outputs, "recorded") == "recorded"  # a run that is continued
    path.write_bytes(b"one")
    one = initial_digest(LoraSettings(init_lora=path), outputs, None)
    assert one == initial_digest(LoraSettings(init_lora=path), outputs, "recorded")
    path.write_bytes(b"another")
    assert initial_digest(LoraSettings(init_lora=path), outputs, one) != one
    for own in (outputs.lora, outputs.recommended, outputs.lora_after(5)):
        own.write_bytes(b"one")
        with pytest.raises(SettingsError, match="this run would replace"):
            initial_digest(LoraSettings(init_lora=own), outputs, None)
    other = outputs.lora_dir / "mia2.safetensors"
    other.write_bytes(b"one")
    assert initial_digest(LoraSettings(init_lora=other), outputs, None) == one


def test_a_run_begins_from_the_text_encoders_of_a_file_if_it_trains_them(base, tmp_path, capsys):
    path, alone = tmp_path / "texts.safetensors", tmp_path / "unet.safetensors"
    settings = LoraSettings(lora_rank=4, lora_alpha=3.0, lora_rank_pattern=FEW, train_text_encoders=True)
    of_file = load_text_encoders(base, CPU, torch.float32)
    adapter = inject(load_unet(base, CPU, torch.float32), settings, 3, of_file)
    adapter.weights.detach().add_(0.05 * torch.randn(adapter.weights.shape, generator=torch.Generator().manual_seed(4)))
    write_lora(path, adapter.modules, {})
    write_lora(alone, [module for module in adapter.modules if not module.name.startswith("text")], {})
    tokens = torch.randint(3, 20, (2, 2, 2, 77), generator=torch.Generator().manual_seed(5))
    plain = load_text_encoders(base, CPU, torch.float32)
    without, expected = encode_tokens(tokens, plain), encode_tokens(tokens, of_file)
    for file, result in ((path, expected), (alone, without)):
        own = replace(settings, init_lora=file, lora_alpha=1.0)
        encoders = load_text_encoders(base, CPU, torch.float32)
        begun = inject(load_unet(base, CPU, torch.float32), own, 8, encoders)
        load_initial(begun, matching_layers(own, shapes_of_base(base, own)))
        for ours, theirs in zip(encode_tokens(tokens, encoders), result, strict=True):
            assert (ours - theirs).norm() < 2e-3 * theirs.norm()
    assert (without[0] - expected[0]).norm() > 0.02 * expected[0].norm()
    capsys.readouterr()
    own = replace(settings, init_lora=path, train_text_encoders=False)
    layers = matching_layers(own, shapes_of_base(base, own))
    assert not [name for name in layers if name.startswith("text")]
    what = "text encoders are left out: these are not trained; see TRAIN_TEXT_ENCODERS"
    assert capsys.readouterr().out == f"INIT_LORA: 30 layers of {what}\n"
