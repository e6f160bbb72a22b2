"""Finding, refusing and loading base models, in both layouts and without a network."""

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from common.errors import ModelError
from demo import tiny_sdxl as miniature
from demo.sgm_names import name_in_files, sgm_source
from training.models import base_model, loading
from training.models.base_model import find_base
from training.models.sdxl import WEIGHT_STEMS, Schedule
from training.models.single_file import infer_configs
from training.models.weights import StoredTensor, WeightsFile

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tiny_sdxl, tmp_path) -> Path:
    """A copy of the tiny SDXL that a test may change."""
    return shutil.copytree(tiny_sdxl, tmp_path / "sdxl")


def refusal(path: Path, models_dir: Path) -> str:
    """The error message for the base model at `path`."""
    with pytest.raises(ModelError) as caught:
        find_base(str(path), models_dir)
    assert caught.value.exit_code == 5
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir" in str(caught.value)
    return str(caught.value)


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def all_components(base, models_dir) -> dict[str, torch.nn.Module]:
    text_encoders = loading.load_text_encoders(base, models_dir, CPU, torch.float32)
    return {
        "unet": loading.load_unet(base, CPU, torch.float32),
        "vae": loading.load_vae(base, CPU),
        "text_encoder": text_encoders.encoders[0],
        "text_encoder_2": text_encoders.encoders[1],
    }


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_folder_loads_as_diffusers_loads_it(tiny_sdxl):
    from diffusers import StableDiffusionXLPipeline  # imports all of diffusers

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32, local_files_only=True)
    for name, module in all_components(find_base(str(tiny_sdxl), tiny_sdxl), tiny_sdxl).items():
        assert_same_weights(module, getattr(pipeline, name))


def test_single_file_and_folder_give_the_same_modules(tiny_sdxl, tiny_single_file):
    from_folder = all_components(find_base(str(tiny_sdxl), tiny_sdxl), tiny_sdxl)
    from_file = all_components(find_base(str(tiny_single_file), tiny_sdxl.parent), tiny_sdxl.parent)
    for name in WEIGHT_STEMS:
        assert_same_weights(from_folder[name], from_file[name])
    tokens = torch.tensor([[525, 70, 12, 526] + [0] * 73])
    for name in ("text_encoder", "text_encoder_2"):
        ours, theirs = (modules[name](tokens, output_hidden_states=True) for modules in (from_folder, from_file))
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours.hidden_states[-2], theirs.hidden_states[-2])
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    assert torch.equal(from_folder["vae"].encode(pixels).latent_dist.mean, from_file["vae"].encode(pixels).latent_dist.mean)
    assert from_folder["vae"].config.scaling_factor == from_file["vae"].config.scaling_factor == 0.13025
    assert torch.equal(_denoised(from_folder["unet"]), _denoised(from_file["unet"]))


def _denoised(unet: UNet2DConditionModel) -> torch.Tensor:
    context, pooled = torch.linspace(-1, 1, 77 * 96).reshape(1, 77, 96), torch.linspace(-1, 1, 64)[None]
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    return unet(torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), torch.tensor([500]), context, added_cond_kwargs=added).sample


def test_original_layout_is_what_diffusers_converts(tiny_sdxl, tiny_single_file):
    """The miniature's file, written with a map of its own, against diffusers' conversion."""
    from diffusers.loaders import single_file_utils

    checkpoint = load_file(tiny_single_file)
    unet, vae, clip_l, clip_g = (load_file(tiny_sdxl / part / f"{stem}.safetensors") for part, stem in WEIGHT_STEMS.items())
    configs = {part: json.loads((tiny_sdxl / part / "config.json").read_text()) for part in WEIGHT_STEMS}
    open_clip = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(configs["text_encoder_2"]))
    converted = (
        (unet, single_file_utils.convert_ldm_unet_checkpoint(dict(checkpoint), configs["unet"])),
        (vae, single_file_utils.convert_ldm_vae_checkpoint(dict(checkpoint), configs["vae"])),
        (clip_l, single_file_utils.convert_ldm_clip_checkpoint(dict(checkpoint))),
        (clip_g, single_file_utils.convert_open_clip_checkpoint(open_clip, dict(checkpoint), "conditioner.embedders.1.model.")),
    )
    for ours, theirs in converted:
        theirs.pop("text_model.embeddings.position_ids", None)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_lora_has_the_722_linear_layers_of_sdxl(tiny_sdxl):
    unet = loading.load_unet(find_base(str(tiny_sdxl), tiny_sdxl), CPU, torch.float32)
    linears = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear) and "attentions" in name]
    assert len(linears) == 722
    assert len(unet.state_dict()) == 1680


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
    for part, wanted in (("unet", SDXL_UNET), ("vae", SDXL_VAE), ("text_encoder", SDXL_CLIP_L), ("text_encoder_2", SDXL_CLIP_G)):
        assert {key: inferred[part][key] for key in wanted} == wanted


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


def test_components_are_frozen_in_the_requested_type_and_not_initialised(tiny_sdxl):
    base = find_base(str(tiny_sdxl), tiny_sdxl)
    randomness = torch.get_rng_state()
    unet, vae = loading.load_unet(base, CPU, torch.bfloat16), loading.load_vae(base, CPU)
    encoders = loading.load_text_encoders(base, tiny_sdxl, CPU, torch.bfloat16).encoders
    assert torch.equal(torch.get_rng_state(), randomness)
    for module, dtype in ((unet, torch.bfloat16), (vae, torch.float32), *((encoder, torch.bfloat16) for encoder in encoders)):
        assert not module.training
        assert all(not weight.requires_grad and weight.dtype == dtype and weight.device == CPU for weight in module.parameters())
        assert all(buffer.device == CPU for buffer in module.buffers())


def test_a_name_in_models_dir_finds_folder_and_file(tiny_sdxl, tiny_single_file):
    assert find_base(tiny_sdxl.name, tiny_sdxl.parent).path == tiny_sdxl
    assert find_base("tiny-sdxl", tiny_single_file.parent).path == tiny_single_file
    assert find_base(tiny_single_file.name, tiny_single_file.parent).name == "tiny-sdxl"


def test_fp16_files_and_shards_are_weights_too(folder, tiny_sdxl):
    whole = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    names = sorted(whole)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shards = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
    for shard, part in zip(shards, (names[:900], names[900:]), strict=True):
        save_file({name: whole[name] for name in part}, folder / "unet" / shard)
    index = {"weight_map": {name: shards[position >= 900] for position, name in enumerate(names)}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        (folder / part / f"{WEIGHT_STEMS[part]}.safetensors").rename(folder / part / f"{WEIGHT_STEMS[part]}.fp16.safetensors")
    ours = all_components(find_base(str(folder), folder), folder)
    for name, module in all_components(find_base(str(tiny_sdxl), tiny_sdxl), tiny_sdxl).items():
        assert_same_weights(module, ours[name])
    (folder / "unet" / shards[1]).unlink()
    assert f"unet/{shards[1]} is missing" in refusal(folder, folder)
    change_json(folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", weight_map={})
    assert "unet/diffusion_pytorch_model.safetensors.index.json lists no files" in refusal(folder, folder)


def test_full_precision_is_preferred_to_fp16(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: weight.float() for name, weight in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
    (base_file,) = find_base(str(folder), folder).components["vae"].files
    assert base_file.path == file


def test_vae_with_the_old_names_of_attention(folder, tiny_sdxl):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, weight in load_file(file).items():
        new = next((new for new in old if f".{new}." in name), None)
        renamed[name.replace(new, old[new]) if new else name] = weight
    save_file(renamed, file)
    ours = loading.load_vae(find_base(str(folder), folder), CPU)
    assert_same_weights(ours, loading.load_vae(find_base(str(tiny_sdxl), tiny_sdxl), CPU))


def test_digest_follows_the_weights(folder, tiny_sdxl, tiny_single_file):
    def digests(path):
        return {name: component.digest for name, component in find_base(str(path), folder).components.items()}

    before = digests(tiny_sdxl)
    assert digests(folder) == before
    assert len(set(digests(tiny_single_file).values())) == 4
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.bias"][0] += 1
    save_file(weights, file)
    after = digests(folder)
    assert after.pop("vae") != before.pop("vae")
    assert after == before


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


def test_schedule_of_a_folder(folder):
    change_json(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert find_base(str(folder), folder).schedule == Schedule("v_prediction", zero_terminal_snr=True)


def test_missing_base_model_names_the_download_command(tmp_path):
    message = refusal(Path("stable-diffusion-xl-base-1.0"), tmp_path)
    assert f"neither in {tmp_path} nor a path" in message
    assert f"--local-dir {tmp_path}/stable-diffusion-xl-base-1.0 " in message
    with pytest.raises(ModelError, match=f"hf download Laxhar/noobai-XL-1.1 --local-dir {tmp_path}/noobai-XL-1.1 .*'unet/\\*'"):
        find_base("Laxhar/noobai-XL-1.1", tmp_path)


def test_everything_wrong_with_a_folder_is_reported_at_once(folder):
    (folder / "model_index.json").unlink()
    shutil.rmtree(folder / "text_encoder_2")
    (folder / "tokenizer" / "merges.txt").unlink()
    (folder / "tokenizer_2" / "vocab.json").write_text("{")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with (folder / "text_encoder" / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)
    message = refusal(folder, folder)
    for problem in (
        "model_index.json is missing",
        "text_encoder_2/config.json is missing",
        "text_encoder_2/model.safetensors is missing",
        "tokenizer/: a tokenizer's files are missing or damaged",
        "tokenizer_2/: a tokenizer's files are missing or damaged",
        "there is only diffusion_pytorch_model.bin, a pickle",
        "is a Git LFS pointer",
        "is damaged, it has 10000 bytes",
    ):
        assert problem in message


@pytest.mark.parametrize(
    ("file", "changes", "problem"),
    [
        ("unet/config.json", {"cross_attention_dim": 768}, "is an SD 1.5 model"),
        ("unet/config.json", {"cross_attention_dim": 1024}, "is an SD 2.x model"),
        ("unet/config.json", {"cross_attention_dim": 1280}, "is the SDXL refiner"),
        ("unet/config.json", {"in_channels": 9}, "is an inpainting model (9 input channels)"),
        ("unet/config.json", {"transformer_layers_per_block": [0, 2, 4]}, "other blocks than SDXL's"),
        ("unet/config.json", {"cross_attention_dim": 100}, "expects text embeddings of 100 channels"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "another family (FluxPipeline)"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMDPMSolverMultistepScheduler"}, "is an EDM model"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is a flow-matching model"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type sample"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}, "another noise schedule"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "is an EDM model"),
    ],
)
def test_folders_of_other_models(folder, file, changes, problem):
    change_json(folder / file, **changes)
    assert problem in refusal(folder, folder)


def test_sd_1_5_folder_is_named_instead_of_what_it_lacks(folder):
    change_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    change_json(folder / "unet" / "config.json", cross_attention_dim=768)
    shutil.rmtree(folder / "text_encoder_2")
    message = refusal(folder, folder)
    assert "is an SD 1.5 model" in message
    assert "missing" not in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"PK\x03\x04" + bytes(100), "is a pickle checkpoint"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00" + bytes(100), "is a pickle checkpoint"),
        (b"GGUF" + bytes(100), "is a quantised GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!doctype html><html></html>", "is a web page"),
        (b"", "is damaged"),
        (b"\x10", "is damaged"),
        (bytes(100), "is damaged"),
        (b"\x08" + bytes(7) + b'{"a": 1 ', "its header is damaged"),
        (b"\x08" + bytes(7) + b'{"a": 1}', "its header is damaged"),
    ],
)
def test_files_of_other_formats(tmp_path, content, problem):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert problem in refusal(file, tmp_path)


def test_folder_with_a_single_file_in_it(tmp_path):
    assert "is not a diffusers folder" in refusal(tmp_path, tmp_path)
    (tmp_path / "sdxl").mkdir()
    (tmp_path / "sdxl" / "model.safetensors").touch()
    assert f"set BASE_MODEL to a file in it: {tmp_path}/sdxl/model.safetensors" in refusal(Path("sdxl"), tmp_path)


def test_the_content_of_a_file_counts_and_not_its_suffix(tiny_single_file, tmp_path):
    file = shutil.copy(tiny_single_file, tmp_path / "model.ckpt")
    assert find_base(str(file), tmp_path).schedule == Schedule()


@pytest.mark.parametrize("change", [lambda size: size - 1, lambda size: size // 2, lambda size: size + 1])
def test_file_of_another_size_than_its_header_describes(tiny_single_file, tmp_path, change):
    file = shutil.copy(tiny_single_file, tmp_path / "cut.safetensors")
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(change(size))
    assert f"it has {change(size)} bytes and its header describes {size}" in refusal(file, tmp_path)


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


UNET = "model.diffusion_model."


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


@pytest.mark.parametrize("use", [loading.require_matching_weights, lambda base: loading.load_unet(base, CPU, torch.float32)])
def test_mismatched_weights_are_named_before_any_is_read(tiny_single_file, tmp_path, use):
    weights = load_file(tiny_single_file)
    del weights[f"{UNET}input_blocks.8.0.out_layers.0.bias"]
    weights[f"{UNET}output_blocks.3.0.out_layers.0.bias"] = torch.zeros(7)
    save_file(weights, tmp_path / "odd.safetensors")
    base = find_base("odd", tmp_path)
    with pytest.raises(ModelError) as caught:
        use(base)
    assert "down_blocks.2.resnets.1.norm2.bias is missing" in str(caught.value)
    assert "up_blocks.1.resnets.0.norm2.bias has the shape (7,) instead of (64,)" in str(caught.value)


def test_a_missing_weight_that_the_conversion_needs_is_named(tiny_single_file, tmp_path):
    weights = load_file(tiny_single_file)
    del weights[f"{UNET}label_emb.0.2.bias"]
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=r"odd\.safetensors: unet: label_emb\.0\.2\.bias is missing"):
        loading.require_matching_weights(find_base("odd", tmp_path))


def test_linear_layers_may_be_stored_as_1x1_convolutions(tiny_single_file, tmp_path, tiny_sdxl):
    weights = load_file(tiny_single_file)
    key = f"{UNET}input_blocks.4.1.proj_in.weight"
    save_file(weights | {key: weights[key][..., None, None].contiguous()}, tmp_path / "a.safetensors")
    ours = loading.load_unet(find_base("a", tmp_path), CPU, torch.float32)
    assert_same_weights(ours, loading.load_unet(find_base(str(tiny_sdxl), tmp_path), CPU, torch.float32))


def test_text_encoder_without_the_old_prefix(folder, tiny_sdxl):
    file = folder / "text_encoder" / "model.safetensors"
    save_file({name.removeprefix("text_model."): weight for name, weight in load_file(file).items()}, file)
    ours = loading.load_text_encoders(find_base(str(folder), folder), folder, CPU, torch.float32).encoders[0]
    theirs = loading.load_text_encoders(find_base(str(tiny_sdxl), folder), folder, CPU, torch.float32).encoders[0]
    assert_same_weights(ours, theirs)


def test_file_with_an_untransposed_text_projection(tiny_single_file, tmp_path, tiny_sdxl):
    weights = load_file(tiny_single_file)
    projection = weights.pop("conditioner.embedders.1.model.text_projection")
    weights["conditioner.embedders.1.model.text_projection.weight"] = projection.T.contiguous()
    save_file(weights, tmp_path / "a.safetensors")
    ours = loading.load_text_encoders(find_base("a", tmp_path), tiny_sdxl.parent, CPU, torch.float32).encoders[1]
    theirs = loading.load_text_encoders(find_base(str(tiny_sdxl), tmp_path), tmp_path, CPU, torch.float32).encoders[1]
    assert_same_weights(ours, theirs)


def test_tokenizers_of_a_file_are_downloaded_once_into_models_dir(tiny_single_file, tiny_sdxl, tmp_path, monkeypatch, capsys):
    downloaded = []

    def fake_download(repository, file, local_dir):
        assert repository == "stabilityai/stable-diffusion-xl-base-1.0"
        downloaded.append(file)
        (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_sdxl / file, local_dir / file)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: SimpleNamespace(size=1))  # the file exists
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake_download)
    base = find_base(str(tiny_single_file), tmp_path)
    assert base_model.find_tokenizers(base, tmp_path) is None
    for _ in range(2):
        first, second = loading.load_tokenizers(base, tmp_path)
        assert (first.pad_token_id, second.pad_token_id) == (526, 0)
    assert len(downloaded) == 8
    assert "downloading the tokenizers" in capsys.readouterr().out


@pytest.mark.parametrize("unreachable_call", ["get_hf_file_metadata", "hf_hub_download"])
def test_tokenizers_of_a_file_without_a_network(tiny_single_file, tmp_path, monkeypatch, unreachable_call):
    """From the start, or from the first download on."""

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: SimpleNamespace(size=1))
    monkeypatch.setattr(f"huggingface_hub.{unreachable_call}", unreachable)
    with pytest.raises(ModelError) as caught:
        loading.load_tokenizers(find_base(str(tiny_single_file), tmp_path), tmp_path)
    assert caught.value.exit_code == 5
    command = (
        f"hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir {tmp_path}/sdxl-tokenizers --include 'tokenizer*/*'"
    )
    assert command in str(caught.value)


def test_tokenizers_with_another_vocabulary_are_skipped(tiny_single_file, folder):
    change_json(folder / "tokenizer" / "vocab.json", another=527)
    assert base_model.find_tokenizers(find_base(str(tiny_single_file), folder), folder.parent) is None


def test_demo_is_reproducible_and_small(tmp_path, tiny_sdxl):
    again = miniature.build(tmp_path / "again")
    files = sorted(path.relative_to(tiny_sdxl) for path in tiny_sdxl.rglob("*") if path.is_file())
    assert all((again / file).read_bytes() == (tiny_sdxl / file).read_bytes() for file in files)
    assert sum((again / file).stat().st_size for file in files) < 30e6
    other = load_file(miniature.build(tmp_path / "other", seed=1) / "vae" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(
        other["quant_conv.weight"], load_file(again / "vae" / "diffusion_pytorch_model.safetensors")["quant_conv.weight"]
    )


@pytest.mark.parametrize(
    ("file", "changes", "problem"),
    [
        ("vae/config.json", {"scaling_factor": None}, "scaling_factor must be a number above 0; SDXL's is 0.13025"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor must be a number"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": None}, "num_train_timesteps must be a whole number"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps must be a whole number"),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, "beta_start must be a number between 0 and 1"),
        ("scheduler/scheduler_config.json", {"beta_end": -1.0}, "beta_end must be a number between 0 and 1"),
        (
            "text_encoder/config.json",
            {"hidden_size": "32"},
            "96 channels, the text encoders produce ['32', 64]",
        ),
    ],
)
def test_invalid_numbers_are_named(folder, file, changes, problem):
    change_json(folder / file, **changes)
    assert problem in refusal(folder, folder.parent)


def test_an_index_that_is_a_list_lists_no_files(folder):
    stem = WEIGHT_STEMS["unet"]
    (folder / "unet" / f"{stem}.safetensors").unlink()
    (folder / "unet" / f"{stem}.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert f"unet/{stem}.safetensors.index.json lists no files" in refusal(folder, folder.parent)


@pytest.mark.parametrize(
    ("part", "changes"),
    [("unet", {"attention_head_dim": 7}), ("vae", {"block_out_channels": [1]}), ("text_encoder", {"num_attention_heads": 7})],
)
def test_an_invalid_configuration_is_named_before_any_weight_is_read(folder, part, changes):
    change_json(folder / part / "config.json", **changes)
    with pytest.raises(ModelError, match=part):
        loading.require_matching_weights(find_base(str(folder), folder.parent))


def test_a_tokenizer_without_its_merges_is_damaged(folder):
    merges = folder / "tokenizer" / "merges.txt"
    merges.write_text("".join(line + "\n" for line in merges.read_text().splitlines()[:-1]))
    assert "tokenizer/: a tokenizer's files are missing or damaged" in refusal(folder, folder.parent)


def test_digest_of_tokenizers_follows_what_decides_the_tokens(folder):
    before = base_model.tokenizers_digest(folder)
    assert base_model.tokenizers_digest(folder) == before
    merges = folder / "tokenizer_2" / "merges.txt"
    merges.write_text(merges.read_text().replace("s m\n", "m s\n"))
    assert base_model.tokenizers_digest(folder) != before
