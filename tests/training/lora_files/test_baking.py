"""`bake` against weights that are changed by hand, in a single file and in a diffusers folder."""

import pytest
import torch
from base_models import all_components
from lora_kinds import CONVOLUTION, LINEAR, Drawn
from safetensors.torch import load_file, save_file

from training.models.base_model import find_base

UNET = "model.diffusion_model."
FIRST = "conditioner.embedders.0.transformer.text_model.encoder.layers.1."
SECOND = "conditioner.embedders.1.model."
WEIGHTS = {
    LINEAR: f"{UNET}input_blocks.4.1.proj_in.weight",
    CONVOLUTION: f"{UNET}input_blocks.2.0.in_layers.2.weight",
    "lora_te1_text_model_encoder_layers_1_mlp_fc1": f"{FIRST}mlp.fc1.weight",
    "lora_te2_text_model_encoder_layers_2_mlp_fc2": f"{SECOND}transformer.resblocks.2.mlp.c_proj.weight",
}
"""Layer -> its tensor in a single file."""


@pytest.fixture(scope="module")
def weights(tiny_single_file):
    return load_file(tiny_single_file)


def norms(weight: torch.Tensor, dimensions: tuple[int, ...]) -> torch.Tensor:
    return (weight**2).sum(dimensions, keepdim=True).sqrt()


def assert_baked(output, weights, expected: dict[str, torch.Tensor], tolerance: float = 2e-3) -> None:
    """All tensors of the file `output` are those of the base, but for the `expected` ones, up to the rounding to fp16."""
    baked = load_file(output)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in baked.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()
    }
    for name, tensor in baked.items():
        if name in expected:
            assert not torch.equal(tensor, weights[name])
            assert (tensor.double() - expected[name].double()).abs().max() <= tolerance * expected[name].abs().max()
        else:
            assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize(
    ("kind", "layer"),
    [(kind, layer) for kind in ("lora", "loha", "lokr", "lokr_of_low_rank") for layer in WEIGHTS if layer != CONVOLUTION]
    + [(kind, CONVOLUTION) for kind in ("locon", "tucker", "loha_of_convolution")],
)
def test_every_kind_changes_the_weights_as_defined(kind, layer, drawn, save, tool, weights, tiny_single_file, tmp_path):
    key = WEIGHTS[layer]
    out, inputs = weights[key].shape[:2]
    parts, delta = getattr(drawn, kind)(out, inputs)
    output = tmp_path / "baked.safetensors"
    done = tool("bake", tiny_single_file, save("a.safetensors", {layer: parts}), "--weights", 0.7, "--output", output)
    assert (done.returncode, done.stderr) == (0, "")
    assert_baked(output, weights, {key: weights[key].float() + 0.7 * delta})


def test_queries_keys_and_values_of_clip_g_are_thirds_of_one_tensor(drawn, save, tool, weights, tiny_single_file, tmp_path):
    key = f"{SECOND}transformer.resblocks.1.attn.in_proj_weight"
    (query, of_query), (value, of_value) = drawn.lora(64, 64), drawn.lora(64, 64)
    name = "lora_te2_text_model_encoder_layers_1_self_attn_{}_proj"
    source = save("a.safetensors", {name.format("q"): query, name.format("v"): value})
    assert tool("bake", tiny_single_file, source, "--output", tmp_path / "b.safetensors").returncode == 0
    expected = weights[key].float() + torch.cat([of_query, torch.zeros(64, 64), of_value])
    assert_baked(tmp_path / "b.safetensors", weights, {key: expected})


def test_text_projection_is_stored_transposed(drawn, save, tool, weights, tiny_single_file, tmp_path):
    parts, delta = drawn.lora(64, 64)
    source = save("a.safetensors", {"lora_te2_text_projection": parts})
    assert tool("bake", tiny_single_file, source, "--output", tmp_path / "b.safetensors").returncode == 0
    key = f"{SECOND}text_projection"
    assert_baked(tmp_path / "b.safetensors", weights, {key: weights[key].float() + delta.T})


@pytest.mark.parametrize("strength", [1, 0.5])
def test_dora_scales_rows_relative_to_the_frozen_weight_as_comfyui_does(
    strength, drawn, save, tool, weights, tiny_single_file, tmp_path
):
    weight = weights[WEIGHTS[CONVOLUTION]].float()
    parts, delta = drawn.locon(*weight.shape[:2])
    scale = 1 + drawn.random(len(weight), 1, 1, 1).abs()
    source = save("a.safetensors", {CONVOLUTION: parts | {"dora_scale": scale}})
    assert tool("bake", tiny_single_file, source, "--weights", strength, "--output", tmp_path / "b.safetensors").returncode == 0
    dora = (weight + delta) * scale / norms(weight, (1, 2, 3))
    expected = (1 - strength) * weight + strength * dora
    assert_baked(tmp_path / "b.safetensors", weights, {WEIGHTS[CONVOLUTION]: expected})


def test_dora_of_columns_and_pefts_dora_are_relative_to_the_changed_weight(drawn, save, tool, weights, tiny_single_file, tmp_path):
    weight = weights[WEIGHTS[LINEAR]].float()
    parts, delta = drawn.lora(*weight.shape)
    changed = weight + delta
    columns, rows = 1 + drawn.random(1, weight.shape[1]).abs(), 1 + drawn.random(len(weight)).abs()
    for name, part, expected in (
        ("dora_scale", columns, changed * columns / norms(changed, (0,))),
        ("lora_magnitude_vector", rows, changed * rows[:, None] / norms(changed, (1,))),
    ):
        source = save("a.safetensors", {LINEAR: parts | {name: part}})
        assert tool("bake", tiny_single_file, source, "--output", tmp_path / "b.safetensors", "--force").returncode == 0
        assert_baked(tmp_path / "b.safetensors", weights, {WEIGHTS[LINEAR]: expected})


def test_full_differences_of_weights_biases_and_norms(drawn, save, tool, weights, tiny_single_file, tmp_path):
    norm = f"{UNET}input_blocks.4.1.norm"
    keys = {WEIGHTS[LINEAR]: f"{LINEAR}.diff", f"{UNET}input_blocks.4.1.proj_in.bias": f"{LINEAR}.diff_b"}
    keys |= {f"{norm}.weight": "lora_unet_input_blocks_4_1_norm.w_norm", f"{norm}.bias": "lora_unet_input_blocks_4_1_norm.b_norm"}
    changes = {key: drawn.random(*weights[key].shape) for key in keys}
    save_file({keys[key]: change for key, change in changes.items()}, tmp_path / "a.safetensors")
    output = tmp_path / "b.safetensors"
    assert tool("bake", tiny_single_file, tmp_path / "a.safetensors", "--output", output).returncode == 0
    assert_baked(output, weights, {key: weights[key].float() + change for key, change in changes.items()})


def test_several_files_are_added_with_their_weights(save, tool, weights, tiny_single_file, tmp_path):
    key = WEIGHTS[LINEAR]
    (a, of_a), (b, of_b) = (Drawn(seed).lora(*weights[key].shape) for seed in (1, 2))
    files = save("a.safetensors", {LINEAR: a}), save("b.safetensors", {LINEAR: b})
    output = tmp_path / "c.safetensors"
    assert tool("bake", tiny_single_file, *files, "--weights", 1, -0.5, "--output", output).returncode == 0
    assert_baked(output, weights, {key: weights[key].float() + of_a - 0.5 * of_b})


def test_a_folder_gets_the_same_weights_as_a_single_file(save, tool, weights, tiny_sdxl, tiny_single_file, tmp_path):
    layers = {layer: Drawn(seed).lora(*weights[key].shape[:2])[0] for seed, (layer, key) in enumerate(WEIGHTS.items())}
    layers[CONVOLUTION] = Drawn(9).locon(*weights[WEIGHTS[CONVOLUTION]].shape[:2])[0]
    source = save("a.safetensors", layers)
    (tmp_path / "base").symlink_to(tiny_sdxl)
    for base, output in ((tiny_single_file, "file.safetensors"), (tmp_path / "base", "folder")):
        assert tool("bake", base, source, "--output", tmp_path / output).returncode == 0
    one, other = (all_components(find_base(str(tmp_path / name), tmp_path)) for name in ("file.safetensors", "folder"))
    for name, network in one.items():
        expected = network.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in other[name].state_dict().items())
    files = {path.relative_to(tiny_sdxl) for path in tiny_sdxl.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "folder") for path in (tmp_path / "folder").rglob("*") if path.is_file()} == files
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    again = tool("bake", tiny_sdxl, source, "--output", tmp_path / "folder", "--force")
    assert (again.returncode, "exists: choose the name of a new folder" in again.stderr) == (2, True)


def test_a_value_that_the_checkpoint_cannot_represent_is_refused(drawn, save, tool, weights, tiny_single_file, tmp_path):
    parts = drawn.lora(*weights[WEIGHTS[LINEAR]].shape)[0]
    source = save("a.safetensors", {LINEAR: parts})
    refused = tool("bake", tiny_single_file, source, "--weights", 1000, "--output", tmp_path / "b.safetensors")
    assert refused.returncode == 0
    source = save("a.safetensors", {LINEAR: parts | {"alpha": torch.tensor(1e6)}})
    refused = tool("bake", tiny_single_file, source, "--output", tmp_path / "c.safetensors")
    assert (refused.returncode, "has values that F16 cannot represent" in refused.stderr) == (5, True)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("a.safetensors", "b.safetensors")]


def test_a_folder_that_is_no_model_is_refused(drawn, save, tool, tmp_path):
    source = save("a.safetensors", {LINEAR: drawn.lora()[0]})
    refused = tool("bake", tmp_path, source, "--output", tmp_path / "b")
    assert (refused.returncode, "name the checkpoint file itself" in refused.stderr) == (5, True)


def test_a_lora_of_another_shape_is_refused(drawn, save, tool, tiny_single_file, tmp_path):
    source = save("a.safetensors", {LINEAR: drawn.lora(640, 640)[0]})
    refused = tool("bake", tiny_single_file, source, "--output", tmp_path / "b.safetensors")
    assert (refused.returncode, "this LoRA is for another base model" in refused.stderr) == (5, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
