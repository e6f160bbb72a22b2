"""LoRA files against ComfyUI's own loader: the weights that it patches are those that PEFT trained.

LORACAT_COMFYUI is a folder with ComfyUI's sources. The formulas are tested without it, too (test_adapter_kinds.py).
"""

import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from demo import tiny_sdxl
from demo.comfyui_modules import unet_layers
from training.config import LoraSettings
from training.method.adapters import ADAPTER, inject
from training.method.export import write_lora
from training.method.layers import adapted_layers, kohya_name, weight_shapes
from training.models.weights import UNet2DConditionModel, shapes_only

SOURCES = os.environ.get("LORACAT_COMFYUI")
pytestmark = pytest.mark.skipif(not SOURCES, reason="LORACAT_COMFYUI is not set to a folder with ComfyUI")
SDXL = {
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


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI's `comfy.lora`, and the keys that it knows for its own UNet of SDXL in full size."""
    sys.path.insert(0, SOURCES)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
    import comfy.lora
    import comfy.model_base
    import comfy.ops
    import comfy.supported_models

    config = comfy.supported_models.SDXL.unet_config | {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
        "channel_mult": (1, 2, 4), "num_head_channels": 64, "use_spatial_transformer": True, "legacy": False,
        "num_classes": "sequential", "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    }  # fmt: skip
    network = openaimodel.UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    shapes = {f"diffusion_model.{name}": weight.shape for name, weight in network.state_dict().items()}

    class Model:
        model_config = type("Config", (), {"unet_config": config})

        def state_dict(self):
            return shapes

    yield comfy.lora, comfy.lora.model_lora_keys_unet(Model(), {}), shapes
    sys.path.remove(SOURCES)


FEW = r"transformer_blocks\.[1-9]=0"


@pytest.mark.parametrize(
    "settings",
    [
        {},  # every layer
        {"lora_rslora": True, "lora_rank_pattern": f"{FEW} attn2=16:3"},
        {"lora_type": "dora", "lora_rank_pattern": FEW},
        {"lora_type": "loha", "lora_rank_pattern": FEW},
        {"lora_type": "lokr", "lora_rank_pattern": FEW},
        {"lora_type": "lokr", "lokr_factor": 8, "lora_rank_pattern": FEW},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "lora",
)
def test_comfyui_patches_what_peft_merges(comfy, tmp_path, settings):
    """Every module of a full-size file is loaded; of each kind of layer, one is compared number by number."""
    loader, key_map, shapes = comfy
    with shapes_only():
        unet = UNet2DConditionModel(**SDXL).requires_grad_(False)
    unet = unet.to_empty(device="cpu")  # takes no memory where nothing is written
    settings = LoraSettings(**({"lora_rank": 8, "lora_alpha": 4.0, "lora_conv_rank": 4} | settings))
    adapted, weights = adapted_layers(weight_shapes(unet), settings), dict(unet.named_parameters())
    compared = {}
    for name in adapted:  # the first layer of each shape, and of each part of a block
        weight = weights[f"{name}.weight"]
        compared.setdefault((weight.shape, name.rpartition(".")[2], name.partition(".")[0]), name)
        if settings.lora_type == "dora" or name in compared.values():
            weight.normal_(0, 0.02)
    adapter = inject(unet, settings, seed=0)
    with torch.no_grad():
        adapter.weights.add_(0.05 * torch.randn(adapter.weights.shape, generator=torch.Generator().manual_seed(1)))
    write_lora(tmp_path / "mia.safetensors", adapter.modules, {})
    lora = load_file(tmp_path / "mia.safetensors")
    patches = loader.load_lora(lora, key_map)
    originals = {layer.diffusers: f"diffusion_model.{layer.original}.weight" for layer in unet_layers()}
    assert patches.keys() == {originals[name] for name in adapted}
    loaded = set().union(*(patch.loaded_keys for patch in patches.values()))
    assert loaded | {key for key in lora if key.endswith((".alpha", ".dora_scale"))} == set(lora)
    assert len(compared) > 30
    for name in compared.values():
        layer = unet.get_submodule(name)
        before = layer.get_base_layer().weight.detach().clone()
        assert before.shape == shapes[originals[name]]
        patch = [(1.0, patches[originals[name]], 1.0, None, lambda value: value)]
        patched = loader.calculate_weight(patch, before.clone(), originals[name], intermediate_dtype=torch.float32)
        layer.merge(adapter_names=[ADAPTER])
        change = layer.get_base_layer().weight.detach() - before
        assert (patched - before - change).norm() <= 2e-3 * change.norm(), name
        assert change.norm() > 0


def test_comfyui_takes_every_layer_of_unet_and_text_encoders_and_patches_what_peft_merges(comfy, tmp_path):
    """The names are those of ComfyUI's own networks in full size; of each kind of layer, one is compared number by number."""
    from comfy.sdxl_clip import SDXLClipModel

    loader, key_map, _ = comfy
    with torch.device("meta"):
        clip = SDXLClipModel(device="meta", dtype=torch.float32)
    key_map = loader.model_lora_keys_clip(clip, dict(key_map))
    networks = tiny_sdxl.networks(tiny_sdxl.FULL)
    del networks["vae"]
    unet, *encoders = (network.to_empty(device="cpu").requires_grad_(False) for network in networks.values())
    adapter = inject(unet, LoraSettings(lora_rank=2, lora_alpha=1.0, train_text_encoders=True), 0, encoders)
    compared = {}
    for name in (module.name for module in adapter.modules if module.name.startswith("text_encoder")):
        compared.setdefault((name.partition(".")[0], name.rpartition(".")[2]), name)
    with torch.no_grad():
        adapter.weights.add_(0.05 * torch.randn(adapter.weights.shape, generator=torch.Generator().manual_seed(1)))
        for name in compared.values():
            adapter.layers[name].get_base_layer().weight.normal_(0, 0.02)
    write_lora(tmp_path / "mia.safetensors", adapter.modules, {})
    lora = load_file(tmp_path / "mia.safetensors")
    patches = loader.load_lora(lora, key_map)
    assert len(patches) == 722 + 264
    assert sum(key.startswith("clip_l.") for key in patches) == 72
    assert sum(key.startswith("clip_g.") for key in patches) == 192
    loaded = set().union(*(patch.loaded_keys for patch in patches.values()))
    assert loaded | {key for key in lora if key.endswith(".alpha")} == set(lora)
    assert len(compared) == 12
    shapes = {name: weight.shape for name, weight in clip.state_dict().items()}
    for name in compared.values():
        layer, key = adapter.layers[name], key_map[kohya_name(name)]
        before = layer.get_base_layer().weight.detach().clone()
        assert before.shape == shapes[key]
        patch = [(1.0, patches[key], 1.0, None, lambda value: value)]
        patched = loader.calculate_weight(patch, before.clone(), key, intermediate_dtype=torch.float32)
        layer.merge(adapter_names=[ADAPTER])
        change = layer.get_base_layer().weight.detach() - before
        assert (patched - before - change).norm() <= 2e-3 * change.norm(), name
        assert change.norm() > 0
