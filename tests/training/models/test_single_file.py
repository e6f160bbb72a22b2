"""Base models in one file with the original layout: their configuration, and which files are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from base_models import all_components, assert_same_weights, refusal
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from common.weights import StoredTensor, WeightsFile
from demo import tiny_sdxl as miniature
from demo.sgm_names import name_in_files, sgm_source
from training.models.base_model import find_base
from training.models.sdxl import PREFIXES, Schedule
from training.models.single_file import infer_configs

UNET = "model.diffusion_model."

SDXL_UNET = {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


SDXL_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}


SDXL_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
}


SDXL_CLIP_G = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "eos_token_id": 49407,
}


def test_configuration_of_a_file_of_true_size_is_sdxls():
    with init_empty_weights():
        true_size = {
            "unet": UNet2DConditionModel(**SDXL_UNET),
            "vae": AutoencoderKL(**SDXL_VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**SDXL_CLIP_L)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**SDXL_CLIP_G)),
        }
    tensors = {}
    for part, module in true_size.items():
        for name, empty in module.state_dict().items():
            source = sgm_source(part, name_in_files(part, name))
            rows, *rest = empty.shape
            shape = (rows, *rest) if source.third is None else (3 * rows, *rest)
            tensors[source.key] = StoredTensor("F16", shape[::-1] if source.transposed else shape, 0, 0)
    assert len(tensors) == 2513
    inferred = infer_configs(WeightsFile(Path("sdxl.safetensors"), tensors, {}))
    for name, expected in (("unet", SDXL_UNET), ("vae", SDXL_VAE), ("text_encoder", SDXL_CLIP_L), ("text_encoder_2", SDXL_CLIP_G)):
        assert {key: inferred[name][key] for key in expected} == expected


@pytest.mark.parametrize(
    ("v_pred", "ztsnr", "expected"),
    [
        (False, False, Schedule()),
        (True, False, Schedule("v_prediction")),
        (True, True, Schedule("v_prediction", zero_terminal_snr=True)),
        (False, True, Schedule()),
    ],
)
def test_marker_keys_of_a_file(tiny_sdxl, tmp_path, v_pred, ztsnr, expected):
    file = miniature.write_single_file(tiny_sdxl, tmp_path / "marked.safetensors", v_pred=v_pred, ztsnr=ztsnr)
    assert find_base(str(file), tmp_path).schedule == expected


def test_modelspec_metadata_declares_v_prediction(tiny_single_file, tmp_path):
    save_file(load_file(tiny_single_file), tmp_path / "a.safetensors", metadata={"modelspec.prediction_type": "v"})
    assert find_base("a", tmp_path).schedule == Schedule("v_prediction")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"], "is a LoRA"),
        (["unet.down_blocks.1.attentions.0.proj_in.lora_A.weight"], "is a LoRA"),
        (["control_model.input_blocks.0.0.weight"], "is a ControlNet"),
        (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.a"], "is an SD 1.x model"),
        (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.model.ln_final.weight"], "is an SD 2.x model"),
        (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"], "is the SDXL refiner"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "is a Flux or SD 3 model"),
        (
            ["model.diffusion_model.input_blocks.0.0.weight"],
            "holds only UNet, and no VAE, text encoder CLIP-L, text encoder CLIP-G",
        ),
        (["down_blocks.0.resnets.0.conv1.weight"], "holds only a UNet"),
        (["encoder.down.0.block.0.conv1.weight"], "holds only a VAE"),
        (["text_model.embeddings.token_embedding.weight"], "holds only a text encoder"),
        (["something.else"], "holds no component of an SDXL model"),
    ],
)
def test_files_that_hold_something_else(tmp_path, keys, problem):
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "other.safetensors")
    assert problem in refusal(Path("other"), tmp_path)


def test_a_vae_and_text_encoders_may_have_the_names_of_diffusers(tiny_sdxl, tiny_single_file, tmp_path):
    weights = load_file(tiny_single_file)
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model"), ("text_encoder_2", "model")):
        weights = {key: weight for key, weight in weights.items() if not key.startswith(PREFIXES[part])}
        own = load_file(tiny_sdxl / part / f"{stem}.safetensors")
        weights |= {PREFIXES[part] + name: weight.contiguous() for name, weight in own.items()}
    save_file(weights, tmp_path / "baked.safetensors")
    shutil.copytree(tiny_sdxl, tmp_path / "sdxl")  # for its tokenizers
    baked, whole = (all_components(find_base(path, tmp_path)) for path in ("baked", str(tiny_single_file)))
    for name, network in whole.items():
        assert_same_weights(baked[name], network)


@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 3, 4, 5), (0, 4, 3, 3)])
@pytest.mark.parametrize(
    "key", [f"{UNET}input_blocks.0.0.weight", "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"]
)
def test_shapes_that_are_not_those_of_sdxl_are_named(tiny_single_file, tmp_path, key, shape):
    save_file(load_file(tiny_single_file) | {key: torch.zeros(shape)}, tmp_path / "odd.safetensors")
    assert f"has the shape {list(shape)}, which is not that of an SDXL model" in refusal(Path("odd"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "is an inpainting model (9 input channels)"),
        ({f"{UNET}middle_block.1.transformer_blocks.10.norm1.weight": torch.zeros(32)}, "other blocks than SDXL's"),
        ({f"{UNET}label_emb.0.0.weight": None}, "unet: its weights lack add_embedding.linear_1.weight"),
        ({f"{UNET}out.2.weight": torch.zeros(4, 32, 3, 3, dtype=torch.float8_e4m3fn)}, "its weights are quantised (F8_E4M3)"),
        ({"conditioner.embedders.1.model.text_projection": None}, "text_encoder_2: its weights lack text_projection.weight"),
        ({"first_stage_model.quant_conv.weight": None}, "vae: its weights lack quant_conv.weight"),
        ({"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, "is an EDM model"),
        ({"edm_vpred.sigma_max": torch.tensor(120.0)}, "is an EDM model"),
    ],
)
def test_files_of_other_sdxl_models(tiny_single_file, tmp_path, changes, problem):
    weights = load_file(tiny_single_file) | changes
    save_file({key: weight for key, weight in weights.items() if weight is not None}, tmp_path / "other.safetensors")
    assert problem in refusal(Path("other"), tmp_path)
