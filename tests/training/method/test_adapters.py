"""Where the LoRA goes in a full-size SDXL, and what it starts from."""

import csv

import pytest
import torch
from accelerate import init_empty_weights

from common.errors import ModelError
from training.config import LoraSettings
from training.method.adapters import _uniform, inject
from training.method.comfyui_modules import COMFYUI_MODULES
from training.method.layers import adapted_layers, kohya_name, weight_shapes
from training.models.weights import UNet2DConditionModel


@pytest.fixture(scope="module")
def sdxl_unet() -> UNet2DConditionModel:
    """The UNet of SDXL base 1.0 at full size, without weights."""
    with init_empty_weights():
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def target_modules(unet: UNet2DConditionModel, targets: str) -> list[str]:
    return list(adapted_layers(weight_shapes(unet), LoraSettings(lora_targets=targets)))


@pytest.fixture(scope="module")
def comfyui_rows() -> list[dict[str, str]]:
    """What ComfyUI's SDXL loader takes for the attention modules of the UNet."""
    with COMFYUI_MODULES.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if ".attentions." in row["diffusers_module"]]


def test_all_are_the_722_linears_that_comfyui_knows_with_their_sizes(sdxl_unet, comfyui_rows):
    targets = target_modules(sdxl_unet, "all")
    assert len(targets) == len(set(targets)) == len(comfyui_rows) == 722
    known = {row["diffusers_module"]: (int(row["in_features"]), int(row["out_features"])) for row in comfyui_rows}
    ours = {name: sdxl_unet.get_submodule(name) for name in targets}
    assert {name: (linear.in_features, linear.out_features) for name, linear in ours.items()} == known


def test_kohya_names_of_all_are_exactly_those_that_comfyui_takes(sdxl_unet, comfyui_rows):
    ours = {name: kohya_name(name) for name in target_modules(sdxl_unet, "all")}
    assert ours == {row["diffusers_module"]: row["kohya_module"] for row in comfyui_rows}


def test_attention_are_the_560_of_them_in_attention_layers(sdxl_unet):
    targets = target_modules(sdxl_unet, "attention")
    assert len(targets) == 560
    ends = {name.split(".attn", 1)[1] for name in targets}
    assert ends == {f"{number}.{part}" for number in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")}
    assert set(targets) < set(target_modules(sdxl_unet, "all"))
    others = set(target_modules(sdxl_unet, "all")) - set(targets)
    assert sum(".ff.net." in name for name in others) == 140
    assert sum(name.endswith((".proj_in", ".proj_out")) for name in others) == 22


def test_rank_32_has_85_million_weights(sdxl_unet):
    linears = [sdxl_unet.get_submodule(name) for name in target_modules(sdxl_unet, "all")]
    assert sum(32 * (linear.in_features + linear.out_features) for linear in linears) == pytest.approx(85.1e6, rel=1e-3)


def small_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        use_linear_projection=True,
    ).requires_grad_(False)


def test_a_fresh_lora_changes_nothing_and_starts_from_the_seed_alone():
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 16)
    plain, unet = small_unet(), small_unet()
    modules = inject(unet, LoraSettings(lora_rank=3, lora_alpha=6.0), seed=5).modules
    torch.testing.assert_close(unet(*inputs).sample, plain(*inputs).sample)
    assert [module.name for module in modules] == target_modules(plain, "all")
    for module in modules:
        linear = plain.get_submodule(module.name)
        down = module.factors["lora_down.weight"]
        assert down.shape == (3, linear.in_features)
        assert module.zero.shape == (linear.out_features, 3)
        bound = linear.in_features**-0.5
        assert 0.5 * bound < down.abs().max() <= bound
        assert not module.zero.any()
    torch.manual_seed(99)
    again = inject(small_unet(), LoraSettings(lora_rank=3, lora_alpha=6.0, lora_targets="attention"), seed=5).modules
    same = {module.name: module.factors["lora_down.weight"] for module in modules}
    assert all(torch.equal(module.factors["lora_down.weight"], same[module.name]) for module in again)
    other = inject(small_unet(), LoraSettings(lora_rank=3, lora_alpha=6.0), seed=6).modules
    assert not any(torch.equal(module.factors["lora_down.weight"], same[module.name]) for module in other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_trained_is_fp32_whatever_the_unet_is(dtype):
    unet = small_unet().to(dtype)
    lora = inject(unet, LoraSettings(lora_rank=3), seed=0)
    assert lora.weights.dtype == lora.weights.grad.dtype == torch.float32
    assert lora.weights.numel() == sum(each.numel() for module in lora.modules for each in module.factors.values())
    lora.weights.data.fill_(0.123456789)
    for module in lora.modules:  # they are views
        assert all(each.dtype == torch.float32 and each.eq(lora.weights[0]).all() for each in module.factors.values())
    assert {weight.dtype for name, weight in unet.named_parameters() if ".lora_" not in name} == {dtype}


def test_a_unet_without_transformers_is_refused():
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(32,), mid_block_type=None
    )
    with pytest.raises(ModelError, match="no transformer blocks"):
        inject(unet, LoraSettings(), seed=0)


def test_first_lora_weights_are_uniform_and_belong_to_their_module():
    numbers = _uniform(0, "down_blocks.1.attentions.0.proj_in", (32, 640), 0.25)
    assert (numbers.dtype, numbers.shape) == (torch.float32, (32, 640))
    assert -0.25 <= numbers.min() < -0.249
    assert 0.249 < numbers.max() <= 0.25
    assert numbers.var().item() == pytest.approx(0.25**2 / 3, rel=0.02)
    assert torch.equal(_uniform(0, "down_blocks.1.attentions.0.proj_in", (32, 640), 0.25), numbers)
    assert not torch.equal(_uniform(0, "down_blocks.1.attentions.0.proj_out", (32, 640), 0.25), numbers)
    assert not torch.equal(_uniform(1, "down_blocks.1.attentions.0.proj_in", (32, 640), 0.25), numbers)
    assert _uniform(3, "a.b", (3,), 0.5).tolist() == pytest.approx([0.1040714, -0.3309504, -0.3686371], abs=1e-6)
