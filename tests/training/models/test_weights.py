"""Networks with the weights of a base model: the same from both layouts, and the same that diffusers loads."""

import json
import os
from pathlib import Path

import pytest
import torch
from base_models import CPU, all_components, assert_same_weights, change_json
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from common.errors import ModelError
from training.models.base_model import find_base
from training.models.sdxl import WEIGHT_STEMS
from training.models.weights import load_text_encoders, load_tokenizers, load_unet, load_vae, require_matching_weights

UNET = "model.diffusion_model."


def test_folder_loads_as_diffusers_loads_it(tiny_sdxl):
    from diffusers import StableDiffusionXLPipeline  # imports all of diffusers

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32, local_files_only=True)
    for name, module in all_components(find_base(str(tiny_sdxl), tiny_sdxl)).items():
        assert_same_weights(module, getattr(pipeline, name))


def test_single_file_and_folder_give_the_same_modules(tiny_sdxl, tiny_single_file):
    from_folder = all_components(find_base(str(tiny_sdxl), tiny_sdxl))
    from_file = all_components(find_base(str(tiny_single_file), tiny_sdxl.parent))
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
    unet = load_unet(find_base(str(tiny_sdxl), tiny_sdxl), CPU, torch.float32)
    linears = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear) and "attentions" in name]
    assert len(linears) == 722
    assert len(unet.state_dict()) == 1680


def test_components_are_frozen_in_the_requested_type_and_not_initialised(tiny_sdxl):
    base = find_base(str(tiny_sdxl), tiny_sdxl)
    randomness = torch.get_rng_state()
    unet, vae = load_unet(base, CPU, torch.bfloat16), load_vae(base, CPU)
    encoders = load_text_encoders(base, CPU, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), randomness)
    for module, dtype in ((unet, torch.bfloat16), (vae, torch.float32), *((encoder, torch.bfloat16) for encoder in encoders)):
        assert not module.training
        assert all(not weight.requires_grad and weight.dtype == dtype and weight.device == CPU for weight in module.parameters())
        assert all(buffer.device == CPU for buffer in module.buffers())


def test_vae_with_the_old_names_of_attention(folder, tiny_sdxl):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, weight in load_file(file).items():
        new = next((new for new in old if f".{new}." in name), None)
        renamed[name.replace(new, old[new]) if new else name] = weight
    save_file(renamed, file)
    ours = load_vae(find_base(str(folder), folder), CPU)
    assert_same_weights(ours, load_vae(find_base(str(tiny_sdxl), tiny_sdxl), CPU))


def test_text_encoder_without_the_old_prefix(folder, tiny_sdxl):
    file = folder / "text_encoder" / "model.safetensors"
    save_file({name.removeprefix("text_model."): weight for name, weight in load_file(file).items()}, file)
    ours = load_text_encoders(find_base(str(folder), folder), CPU, torch.float32)[0]
    theirs = load_text_encoders(find_base(str(tiny_sdxl), folder), CPU, torch.float32)[0]
    assert_same_weights(ours, theirs)


def test_file_with_an_untransposed_text_projection(tiny_single_file, tmp_path, tiny_sdxl):
    weights = load_file(tiny_single_file)
    projection = weights.pop("conditioner.embedders.1.model.text_projection")
    weights["conditioner.embedders.1.model.text_projection.weight"] = projection.T.contiguous()
    save_file(weights, tmp_path / "a.safetensors")
    ours = load_text_encoders(find_base("a", tmp_path), CPU, torch.float32)[1]
    theirs = load_text_encoders(find_base(str(tiny_sdxl), tmp_path), CPU, torch.float32)[1]
    assert_same_weights(ours, theirs)


def test_linear_layers_may_be_stored_as_1x1_convolutions(tiny_single_file, tmp_path, tiny_sdxl):
    weights = load_file(tiny_single_file)
    key = f"{UNET}input_blocks.4.1.proj_in.weight"
    save_file(weights | {key: weights[key][..., None, None].contiguous()}, tmp_path / "a.safetensors")
    ours = load_unet(find_base("a", tmp_path), CPU, torch.float32)
    assert_same_weights(ours, load_unet(find_base(str(tiny_sdxl), tmp_path), CPU, torch.float32))


@pytest.mark.parametrize("use", [require_matching_weights, lambda base: load_unet(base, CPU, torch.float32)])
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
        require_matching_weights(find_base("odd", tmp_path))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"attention_head_dim": 7}),
        ("unet", {"addition_time_embed_dim": None}),
        ("vae", {"block_out_channels": [1]}),
        ("text_encoder", {"num_attention_heads": 7}),
    ],
)
def test_an_invalid_configuration_is_named_before_any_weight_is_read(folder, part, changes):
    change_json(folder / part / "config.json", **changes)
    with pytest.raises(ModelError, match=part):
        require_matching_weights(find_base(str(folder), folder.parent))


@pytest.mark.parametrize("content", ["[1]", '{"bos_token": 7}'])
def test_a_tokenizer_that_transformers_refuses_is_named(folder, content):
    (folder / "tokenizer_2" / "special_tokens_map.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer_2: this tokenizer is damaged \(.*download it again"):
        load_tokenizers(find_base(str(folder), folder.parent), folder.parent)


def rewrite(tokenizer: Path, **changes: object) -> None:
    """Change the keys of a tokenizer.json; those of its model are `model__key`."""
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        (content[parents[0]] if parents else content)[last] = value
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 3},
        {"normalizer": [3]},
        {"pre_tokenizer": {"type": "x"}},
        {"model__fuse_unk": []},
    ],
)
def test_a_tokenizer_in_one_file_that_the_package_refuses_is_named(folder, changes):
    """The package raises Exception itself."""
    tokenizer = folder / "tokenizer"
    CLIPTokenizer.from_pretrained(tokenizer).save_pretrained(tokenizer)
    for name in ("vocab.json", "merges.txt"):
        (tokenizer / name).unlink()
    load_tokenizers(find_base(str(folder), folder.parent), folder.parent)
    rewrite(tokenizer, **changes)
    with pytest.raises(ModelError, match=r"tokenizer: this tokenizer is damaged \(.*download it again"):
        load_tokenizers(find_base(str(folder), folder.parent), folder.parent)


def test_a_tokenizer_in_one_file_without_the_words_of_clip_is_damaged(folder):
    tokenizer = folder / "tokenizer"
    CLIPTokenizer.from_pretrained(tokenizer).save_pretrained(tokenizer)
    for name in ("vocab.json", "merges.txt"):
        (tokenizer / name).unlink()
    rewrite(tokenizer, model__vocab={"a": 1 << 20})
    with pytest.raises(ModelError, match="tokenizer/: a tokenizer's files are missing or damaged"):
        find_base(str(folder), folder.parent)


def test_a_tokenizer_with_tokens_that_the_text_encoder_does_not_know_is_named(folder):
    vocabulary = folder / "tokenizer" / "vocab.json"
    content = json.loads(vocabulary.read_text())
    vocabulary.write_text(json.dumps(content | {"a": 1 << 20}))
    with pytest.raises(ModelError, match=r"tokenizer: .*it has tokens that the text encoder CLIP-L does not know"):
        load_tokenizers(find_base(str(folder), folder.parent), folder.parent)


def test_a_pipe_among_the_files_of_a_tokenizer_is_not_waited_for(folder):
    (folder / "tokenizer" / "special_tokens_map.json").unlink()
    os.mkfifo(folder / "tokenizer" / "special_tokens_map.json")
    with pytest.raises(ModelError, match=r"special_tokens_map\.json is not a regular file"):
        load_tokenizers(find_base(str(folder), folder.parent), folder.parent)
