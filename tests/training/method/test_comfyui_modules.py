"""The shipped list of LoRA modules against ComfyUI's rule, and the layout behind the rule against diffusers."""

import csv

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file

from demo.comfyui_modules import FILE, table, unet_layers
from training.method.comfyui_modules import COMFYUI_MODULES
from training.method.layers import kohya_name

SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The published configuration of SDXL's UNet."""


@pytest.fixture(scope="module")
def layers():
    return list(unet_layers())


@pytest.fixture(scope="module")
def unet():
    """SDXL's UNet in full size, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


def test_layers_are_those_of_sdxls_unet_with_their_sizes(layers, unet):
    sizes = {name: tuple(weight.shape[:2]) for name, weight in unet.state_dict().items() if weight.ndim >= 2}
    assert sizes == {f"{layer.diffusers}.weight": (layer.outputs, layer.inputs) for layer in layers}
    assert len(sizes) == len(layers) > 722


def test_diffusers_reads_the_original_names_as_the_same_layers(layers, unet):
    names = {f"{layer.original}.{kind}": layer.original for layer in layers for kind in ("weight", "bias")}
    read = convert_ldm_unet_checkpoint({f"model.diffusion_model.{name}": value for name, value in names.items()}, unet.config)
    expected = {f"{layer.diffusers}.weight": layer.original for layer in layers}
    assert {name: original for name, original in read.items() if name.endswith(".weight")} == expected


def test_the_shipped_file_is_what_the_rule_gives():
    assert FILE == COMFYUI_MODULES
    assert FILE.read_text(encoding="utf-8") == table(), "run python -m demo.comfyui_modules --write"


def test_the_exporter_names_every_layer_as_the_rule_does(layers):
    with COMFYUI_MODULES.open(encoding="utf-8", newline="") as file:
        listed = {row["diffusers_module"] for row in csv.DictReader(file) if row["part"] == "unet"}
    assert listed == {layer.diffusers for layer in layers}
    attention = {layer.diffusers: layer.kohya for layer in layers if ".attentions." in layer.diffusers}
    assert len(attention) == 722
    assert {name: kohya_name(name) for name in attention} == attention


def test_every_module_of_an_exported_lora_is_a_layer_that_comfyui_patches(layers, finished):
    modules = {name.partition(".")[0] for name in load_file(finished.stage.lora)}
    assert modules == {layer.kohya for layer in layers if ".attentions." in layer.diffusers}
