"""The names that layers and tensors have in the files of other trainers, and the scale that their files say."""

import json

import pytest
import torch
from lora_kinds import LINEAR, change_of
from safetensors.torch import load_file, save_file

from training.lora_files.reading import layer_name

ATTENTION = "lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_out_0"
TEXT = "lora_te2_text_model_encoder_layers_31_self_attn_q_proj"


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        (ATTENTION, ATTENTION),
        ("lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0", ATTENTION),
        ("lycoris_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0", ATTENTION),
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", ATTENTION),
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out", ATTENTION),
        ("base_model.model.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", ATTENTION),
        ("diffusion_model.output_blocks.3.1.transformer_blocks.0.attn1.to_out.0", ATTENTION),
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", ATTENTION),
        ("unet.conv_in", "lora_unet_input_blocks_0_0"),
        ("unet.down_blocks.0.downsamplers.0.conv", "lora_unet_input_blocks_3_0_op"),
        (TEXT, TEXT),
        ("text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj", TEXT),
        ("text_encoder_2.encoder.layers.31.self_attn.q_proj", TEXT),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        ("lora_te1_text_model_encoder_layers_12_mlp_fc1", "lora_te1_text_model_encoder_layers_12_mlp_fc1"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_qkv"),
    ],
)
def test_names_of_layers(spelled, name):
    """The last two are not layers of SDXL, and keep their names."""
    assert layer_name(spelled) == name


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (".lora_up.weight", ".lora_down.weight"),
        (".lora_B.weight", ".lora_A.weight"),
        (".lora_B.default.weight", ".lora_A.default.weight"),
        (".lora.up.weight", ".lora.down.weight"),
        (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
        ("_lora.up.weight", "_lora.down.weight"),
    ],
)
def test_names_of_tensors(up, down, drawn, tool, tmp_path):
    parts, delta = drawn.lora(alpha=None)
    layer = "unet.down_blocks.1.attentions.0.proj_in"
    save_file({layer + up: parts["lora_up.weight"], layer + down: parts["lora_down.weight"]}, tmp_path / "a.safetensors")
    assert tool("merge", tmp_path / "a.safetensors", "--output", tmp_path / "b.safetensors").returncode == 0
    torch.testing.assert_close(change_of(load_file(tmp_path / "b.safetensors"), LINEAR).float(), delta)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attentions.0.proj_in": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"proj_out": 2}}, 2),
    ],
)
def test_scale_of_a_peft_adapter(config, scale, drawn, tool, tmp_path):
    """diffusers has the configuration in the metadata, PEFT in adapter_config.json."""
    parts, delta = drawn.lora(alpha=None)
    name = "down_blocks.1.attentions.0.proj_in"
    pair = (("lora_B.weight", parts["lora_up.weight"]), ("lora_A.weight", parts["lora_down.weight"]))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{name}.{part}": tensor for part, tensor in pair}, tmp_path / "adapter_model.safetensors")
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    save_file({f"unet.{name}.{part}": tensor for part, tensor in pair}, tmp_path / "diffusers.safetensors", metadata)
    for source in ("adapter_model.safetensors", "diffusers.safetensors"):
        assert tool("merge", tmp_path / source, "--output", tmp_path / "b.safetensors", "--force").returncode == 0
        torch.testing.assert_close(change_of(load_file(tmp_path / "b.safetensors"), LINEAR).float(), scale * delta)


def test_show_names_kinds_ranks_blocks_and_metadata(drawn, save, tool):
    parts, delta = drawn.lora(rank=4, alpha=2)
    layers = {LINEAR: parts, ATTENTION: drawn.lora(rank=2, alpha=None)[0], TEXT: drawn.loha()[0]}
    source = save("a.safetensors", layers, {"a": "b\x1b[2J"})
    done = tool("show", source)
    assert done.returncode == 0
    assert "layers: 3 (LoRA (2x), LoHa (1x)), f32" in done.stdout
    scales = next(line for line in done.stdout.splitlines() if line.startswith("scale"))
    assert all(scale in scales for scale in ("0.5 (1x)", "1 (no alpha) (1x)", "1.5 (1x)"))
    assert r"a = b\x1b[2J" in done.stdout
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("input_blocks_4"))
    values = torch.linalg.svdvals(delta) ** 2
    assert float(row[2]) == pytest.approx(values.sum().item() ** 0.5, rel=1e-3)
    assert [float(cell.rstrip("%")) for cell in row[3:5]] == [
        pytest.approx(100 * (values[:rank].sum() / values.sum()).item(), abs=0.06) for rank in (1, 2)
    ]
    assert "text encoder CLIP-G" in done.stdout


def test_show_of_a_dora_measures_the_part_beside_the_norms(drawn, save, tool):
    parts, delta = drawn.lora()
    done = tool("show", save("a.safetensors", {LINEAR: parts | {"dora_scale": torch.ones(12, 1)}}))
    assert "layers: 1 (LoRA with DoRA)" in done.stdout
    assert f"{delta.norm().item():.4g}" in done.stdout
