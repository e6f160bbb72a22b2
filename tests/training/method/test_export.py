"""The LoRA file: its keys, header and verification, and the image that a pipeline makes with it."""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from training.method import comfyui_modules
from training.method.adapters import LoraModule
from training.method.export import verify, write_lora
from training.method.layers import kohya_name
from training.models.base_model import find_base
from training.models.weights import UNet2DConditionModel, load_unet

ABOUT = {"about": "a test"}
NAMES = (
    "down_blocks.1.attentions.0.proj_in",
    "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0",
    "up_blocks.0.attentions.2.transformer_blocks.3.ff.net.0.proj",
)


def module(name: str, seed: int = 0, rank: int = 2) -> LoraModule:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)
    return LoraModule(name, {"lora_down.weight": down, "lora_up.weight": up}, 1 / rank, rank)


@pytest.fixture
def written(tmp_path):
    """A LoRA file of three modules."""
    modules = [module(name, seed) for seed, name in enumerate(NAMES)]
    write_lora(tmp_path / "mia.safetensors", modules, ABOUT)
    return tmp_path / "mia.safetensors", modules


def metadata(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_keys_shapes_and_types_are_kohyas(written):
    path, modules = written
    tensors = load_file(path)
    names = (
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0",
        "lora_unet_output_blocks_2_1_transformer_blocks_3_ff_net_0_proj",
    )
    assert set(tensors) == {f"{name}.{part}" for name in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    for name, lora in zip(names, modules, strict=True):
        assert torch.equal(tensors[f"{name}.lora_down.weight"], lora.factors["lora_down.weight"].half())
        assert torch.equal(tensors[f"{name}.lora_up.weight"], lora.zero.half())
        assert tensors[f"{name}.alpha"].shape == ()
        assert tensors[f"{name}.alpha"].item() == 1.0
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_hash_is_of_the_bytes_behind_the_header(written):
    content = written[0].read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    digest = hashlib.sha256(content[8 + length :]).hexdigest()
    about = metadata(written[0])
    assert about["about"] == "a test"
    assert about["sshs_model_hash"] == digest
    assert about["modelspec.hash_sha256"] == f"0x{digest}"


def test_header_contains_no_paths_of_the_user(finished):
    said = metadata(finished.stage.lora)
    assert not [value for value in said.values() if str(finished.stage.dataset.parent) in value or "rockets" in value]


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.attentions.0.proj_in",  # SDXL's first block has no attention
        "up_blocks.0.attentions.3.proj_in",
        "down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_q",  # two blocks there
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_qkv",
        "mid_block.attentions.1.proj_in",
        "down_blocks.1.resnets.0.time_emb_proj",
        "time_embedding.linear_1",
    ],
)
def test_a_module_that_comfyui_would_ignore_fails_the_run(tmp_path, name):
    with pytest.raises(ModelError, match="ComfyUI") as refused:
        write_lora(tmp_path / "lora.safetensors", [module(NAMES[0]), module(name)], ABOUT)
    assert refused.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_comfyui_does_not_load_fails_the_stage(stage, monkeypatch):
    """From main to exit code: no LoRA file, one problem for each module."""
    known = comfyui_modules.comfyui_modules() - {"lora_unet_middle_block_1_proj_in"}
    monkeypatch.setattr(comfyui_modules, "comfyui_modules", lambda: known)
    stage.add("astronaut")
    ended = stage.run(NUM_TRAIN_EPOCHS=1)
    assert ended.returncode == 5
    assert "lora_unet_middle_block_1_proj_in: not a module that ComfyUI loads" in ended.stderr
    assert not stage.lora.exists()


def test_values_that_fp16_cannot_represent_are_refused(tmp_path):
    broken = module(NAMES[0])
    broken.zero[0, 0] = 1e6
    with pytest.raises(ModelError, match="values that float16 cannot represent"):
        write_lora(tmp_path / "lora.safetensors", [broken], ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_a_dora_with_a_value_that_is_not_finite_is_refused(tmp_path):
    """Its tensors are fp32, where fp16's range does not matter."""
    lora = module(NAMES[0])
    lora.zero[0, 0] = 1e6
    dora = replace(lora, magnitude=torch.ones(5), base=torch.ones(5, 6))
    write_lora(tmp_path / "lora.safetensors", [dora], ABOUT)
    with pytest.raises(ModelError, match="values that float32 cannot represent"):
        write_lora(tmp_path / "broken.safetensors", [replace(dora, magnitude=torch.full((5,), torch.nan))], ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_a_file_that_differs_after_reading_it_back_is_refused(written, tmp_path):
    tensors = load_file(written[0])
    name = f"{kohya_name(NAMES[0])}.lora_up.weight"
    changed, lacking = dict(tensors), dict(tensors)
    changed[name] = tensors[name] + 1
    del lacking[f"{kohya_name(NAMES[1])}.alpha"]
    for number, (other, words) in enumerate(((changed, f"{name}: differs after reading it back"), (lacking, "alpha: missing"))):
        save_file(other, tmp_path / f"{number}.safetensors")
        with pytest.raises(ModelError, match=words):
            verify(tmp_path / f"{number}.safetensors", tensors)
    verify(written[0], tensors)


def merged_by_hand(unet: UNet2DConditionModel, lora) -> UNet2DConditionModel:
    """W + alpha / rank x up @ down in each of the UNet's linear layers that the file names."""
    tensors = {name: tensor.float() for name, tensor in load_file(lora).items()}
    by_name = {
        kohya_name(name): name
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".attentions." in name
    }
    weights = unet.state_dict()
    for name in {key.split(".")[0] for key in tensors}:
        up, down, alpha = (tensors[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        weights[f"{by_name[name]}.weight"] += alpha / down.shape[0] * up @ down
    return unet


def image(pipeline: Callable) -> torch.Tensor:
    """The latents of an image that always begins with the same noise."""
    generator = torch.Generator().manual_seed(0)
    how = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent", "generator": generator}
    return pipeline("sks, woman", **how).images


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler and NumPy 2
def test_lora_changes_the_image_of_a_pipeline_like_one_merged_by_hand(finished, tiny_sdxl, tmp_path):
    """The file was trained with alpha 1 and rank 2: half of up @ down."""
    unet = load_unet(find_base(str(tiny_sdxl), tmp_path), torch.device("cpu"), torch.float32)
    from diffusers import StableDiffusionXLPipeline  # brings all of diffusers, which no other test here needs

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    lora = finished.stage.lora
    plain = image(pipeline)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    loaded = image(pipeline)
    pipeline.unet = merged_by_hand(unet, lora)
    merged = image(pipeline)
    assert (loaded - plain).norm() > 0.02 * plain.norm()
    assert (loaded - merged).norm() < 0.01 * (loaded - plain).norm()
