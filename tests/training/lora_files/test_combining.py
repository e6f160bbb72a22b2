"""`resize` and `merge` against sums of whole matrices and their singular value decompositions."""

import json
import os

import pytest
import torch
from lora_kinds import CONVOLUTION, LINEAR, OTHER, Drawn, change_of
from safetensors import safe_open
from safetensors.torch import load_file

from common.weights import data_sha256, read_header
from training.method.comfyui_modules import module_problems

KINDS = {
    "lora": LINEAR,
    "locon": CONVOLUTION,
    "tucker": CONVOLUTION,
    "loha": LINEAR,
    "loha_of_high_rank": LINEAR,
    "loha_of_convolution": CONVOLUTION,
    "lokr": LINEAR,
    "lokr_of_low_rank": LINEAR,
}


def nearest(delta: torch.Tensor, rank: int) -> torch.Tensor:
    u, values, vh = torch.linalg.svd(delta.double().flatten(1), full_matrices=False)
    return (u[:, :rank] * values[:rank] @ vh[:rank]).view(delta.shape)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_resize_gives_the_nearest_matrix_of_that_rank(kind, drawn, save, tool, tmp_path):
    parts, delta = getattr(drawn, kind)()
    source = save("a.safetensors", {KINDS[kind]: parts})
    assert tool("resize", source, "--rank", 2, "--output", tmp_path / "b.safetensors").returncode == 0
    tensors = load_file(tmp_path / "b.safetensors")
    assert_close(change_of(tensors, KINDS[kind]), nearest(delta, 2))
    assert tensors[f"{KINDS[kind]}.lora_down.weight"].shape[0] == 2
    assert tensors[f"{KINDS[kind]}.alpha"].item() == 2
    assert module_problems(tensors) == []


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_changes_nothing(kind, drawn, save, tool, tmp_path):
    parts, delta = getattr(drawn, kind)()
    source = save("a.safetensors", {KINDS[kind]: parts})
    assert tool("resize", source, "--energy", 1, "--output", tmp_path / "b.safetensors").returncode == 0
    assert_close(change_of(load_file(tmp_path / "b.safetensors"), KINDS[kind]), delta)


def test_resize_by_energy_gives_each_layer_the_rank_that_it_needs(drawn, save, tool, tmp_path):
    up, down = drawn.random(12, 3), drawn.random(3, 8)
    flat = torch.tensor([1.0, 0.01, 0.01])
    source = save("a.safetensors", {LINEAR: drawn.lora(rank=6)[0], OTHER: {"lora_up.weight": up * flat, "lora_down.weight": down}})
    done = tool("resize", source, "--energy", 0.99, "--rank", 4, "--output", tmp_path / "b.safetensors")
    tensors = load_file(tmp_path / "b.safetensors")
    assert [len(tensors[f"{name}.lora_down.weight"]) for name in (LINEAR, OTHER)] == [4, 1]
    assert "ranks 1 to 4" in done.stdout
    assert read_header(tmp_path / "b.safetensors").metadata["ss_network_dim"] == "Dynamic"


def test_merge_is_the_weighted_sum(save, tool, tmp_path):
    first, second = Drawn(1), Drawn(2)
    (a, of_a), (b, of_b), (other, of_other) = first.lora(rank=4, alpha=2), second.lora(rank=6, alpha=None), second.lora(rank=3)
    (conv_a, of_conv_a), (conv_b, of_conv_b) = first.locon(), second.tucker()
    one = save("a.safetensors", {LINEAR: a, CONVOLUTION: conv_a})
    two = save("b.safetensors", {LINEAR: b, OTHER: other, CONVOLUTION: conv_b})
    done = tool("merge", one, two, "--weights", 0.8, -0.3, "--output", tmp_path / "c.safetensors")
    tensors = load_file(tmp_path / "c.safetensors")
    assert_close(change_of(tensors, LINEAR), 0.8 * of_a - 0.3 * of_b)
    assert_close(change_of(tensors, OTHER), -0.3 * of_other)
    assert_close(change_of(tensors, CONVOLUTION), 0.8 * of_conv_a - 0.3 * of_conv_b)
    assert {name: len(tensors[f"{name}.lora_down.weight"]) for name in (LINEAR, OTHER)} == {LINEAR: 10, OTHER: 3}
    assert done.stdout.strip().endswith("3 layers, ranks 3 to 10 (mean 7.0)")


def test_a_merge_with_a_rank_is_the_nearest_to_the_sum(save, tool, tmp_path):
    (a, of_a), (b, of_b), (c, of_c) = Drawn(1).lora(), Drawn(2).loha(), Drawn(3).lokr()
    files = [save(f"{name}.safetensors", {LINEAR: parts}) for name, parts in (("a", a), ("b", b), ("c", c))]
    assert tool("merge", *files, "--rank", 3, "--output", tmp_path / "d.safetensors").returncode == 0
    assert_close(change_of(load_file(tmp_path / "d.safetensors"), LINEAR), nearest(of_a + of_b + of_c, 3))


def test_a_merge_of_one_file_with_the_scale_1_keeps_every_bit(drawn, save, tool, tmp_path):
    parts = drawn.lora(rank=4, alpha=4)[0]
    source = save("a.safetensors", {LINEAR: parts}, dtype=torch.float16)
    assert tool("merge", source, "--output", tmp_path / "b.safetensors").returncode == 0
    before, after = load_file(source), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_weight_0_leaves_a_file_out(drawn, save, tool, tmp_path):
    (a, of_a), (b, _) = drawn.lora(), drawn.lora()
    files = save("a.safetensors", {LINEAR: a}), save("b.safetensors", {LINEAR: b, OTHER: drawn.lora()[0]})
    assert tool("merge", *files, "--weights", 1, 0, "--output", tmp_path / "c.safetensors").returncode == 0
    tensors = load_file(tmp_path / "c.safetensors")
    assert_close(change_of(tensors, LINEAR), of_a)
    assert len(tensors) == 3
    refused = tool("merge", *files, "--weights", 0, 0, "--output", tmp_path / "d.safetensors")
    assert (refused.returncode, "every weight is 0" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("types", "flag", "expected"),
    [
        ((torch.float16, torch.float16), (), torch.float16),
        ((torch.bfloat16, torch.bfloat16), (), torch.bfloat16),
        ((torch.float16, torch.bfloat16), (), torch.float32),
        ((torch.float16, torch.float32), (), torch.float32),
        ((torch.float32, torch.float32), ("--dtype", "bf16"), torch.bfloat16),
        ((torch.float8_e4m3fn, torch.float8_e4m3fn), (), torch.float16),
    ],
)
def test_types(types, flag, expected, save, tool, tmp_path):
    files = [save(f"{seed}.safetensors", {LINEAR: Drawn(seed).lora()[0]}, dtype=dtype) for seed, dtype in enumerate(types)]
    assert tool("merge", *files, *flag, "--output", tmp_path / "c.safetensors").returncode == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "c.safetensors").values()} == {expected}


@pytest.mark.parametrize("weight", [1000, 1e-15])
def test_values_that_fp16_cannot_represent(weight, drawn, save, tool, tmp_path):
    """They would become infinity, or all of them zero."""
    parts = drawn.lora()[0]
    source = save("a.safetensors", {LINEAR: parts | {"alpha": torch.tensor(4e3)}})
    refused = tool("merge", source, "--weights", weight, "--dtype", "fp16", "--output", tmp_path / "b.safetensors")
    assert (refused.returncode, "set --dtype fp32" in refused.stderr) == (5, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_metadata_is_what_the_files_have_in_common_and_where_the_result_comes_from(save, tool, tmp_path):
    common = {"ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_name": "pony.safetensors"}
    own = {"loracat_fingerprint": "1234", "sshs_model_hash": "old", "modelspec.hash_sha256": "0xold", "ss_network_dim": "4"}
    files = [
        save(f"{name}.safetensors", {LINEAR: Drawn(seed).lora()[0]}, common | own | {"modelspec.trigger_phrase": name})
        for seed, name in enumerate(("ada", "bea"))
    ]
    output = tmp_path / "both.safetensors"
    assert tool("merge", *files, "--weights", 1, 0.5, "--output", output).returncode == 0
    with safe_open(output, "pt") as file:  # the library's own reading of the header
        said = file.metadata()
    assert said.items() >= common.items()
    assert said["modelspec.merged_from"] == "ada.safetensors x 1, bea.safetensors x 0.5"
    assert said["modelspec.trigger_phrase"] == "ada, bea"
    assert said["modelspec.title"] == said["ss_output_name"] == "both"
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_network_module"]) == ("8", "8", "networks.lora")
    assert json.loads(said["ss_network_args"]) == {}
    assert said["sshs_model_hash"] == data_sha256(output)
    assert said["modelspec.hash_sha256"] == f"0x{data_sha256(output)}"
    assert "loracat_fingerprint" not in said
    assert str(tmp_path) not in json.dumps(said)


def test_files_for_different_base_models_are_refused(save, tool, tmp_path):
    files = save("a.safetensors", {LINEAR: Drawn(1).lora()[0]}), save("b.safetensors", {LINEAR: Drawn(2).lora(inputs=6)[0]})
    refused = tool("merge", *files, "--output", tmp_path / "c.safetensors")
    assert refused.returncode == 5
    assert (
        "b.safetensors: lora_unet_input_blocks_4_1_proj_in changes a weight of 12 x 6, in a.safetensors it has 12 x 8"
        in refused.stderr
    )


def test_files_of_different_base_models_are_named(save, tool, tmp_path):
    about = ({"ss_sd_model_name": "pony", "modelspec.prediction_type": "epsilon"}, {"ss_sd_model_name": "noob"})
    files = [save(f"{seed}.safetensors", {LINEAR: Drawn(seed).lora()[0]}, said) for seed, said in enumerate(about)]
    done = tool("merge", *files, "--output", tmp_path / "c.safetensors")
    assert "trained with different base models: 'pony' (0.safetensors), 'noob' (1.safetensors)" in done.stdout
    assert "prediction types" not in done.stdout


def test_a_name_that_is_not_utf8(drawn, save, tool, tmp_path):
    source = save("a.safetensors", {LINEAR: drawn.lora()[0]})
    output = tmp_path / os.fsdecode(b"\xff.safetensors")
    assert tool("merge", source, "--output", output).returncode == 0
    assert read_header(output).metadata["modelspec.title"] == "?"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"dora_scale": torch.ones(12, 1)}, "is a DoRA, whose change depends on the base model: only `bake` can apply it"),
        ({"lora_magnitude_vector": torch.ones(12)}, "is a DoRA"),
        ({"diff_b": torch.ones(12)}, "full differences"),
    ],
)
def test_what_is_no_product_of_two_matrices_is_refused(parts, words, drawn, save, tool, tmp_path):
    source = save("a.safetensors", {LINEAR: drawn.lora()[0] | parts})
    refused = tool("resize", source, "--rank", 2, "--output", tmp_path / "b.safetensors")
    assert (refused.returncode, words in refused.stderr) == (5, True)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_sum_without_a_rank_needs_files_that_have_one(kind, drawn, save, tool, tmp_path):
    source = save("a.safetensors", {LINEAR: getattr(drawn, kind)()[0]})
    refused = tool("merge", source, "--output", tmp_path / "b.safetensors")
    assert (refused.returncode, "set that of the result with --rank" in refused.stderr) == (2, True)
