"""Frozen weights in 8 bits: their error, what they take, and that every engine computes with the same ones."""

import copy
from dataclasses import replace

import pytest
import torch

from demo import tiny_sdxl
from training.config import LoraSettings, TrainSettings
from training.engine import prepare_unet
from training.method.adapters import inject
from training.models.base_model import find_base
from training.models.int8 import Int8Conv2d, Int8Linear, quantize, rowwise_int8
from training.models.weights import load_unet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_sdxl.build(tmp_path_factory.mktemp("models") / "tiny")
    return find_base(str(folder), folder.parent)


@pytest.mark.parametrize("shape", [(320, 640), (64, 32, 3, 3)])
def test_each_weight_is_right_to_half_a_step_of_its_row(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, shape[0]).view(
        -1, *[1] * (len(shape) - 1)
    )
    codes, scales = rowwise_int8(weight)
    assert codes.dtype == torch.int8
    assert (codes * scales - weight).abs().le(0.501 * scales).all()
    assert codes.flatten(1).abs().amax(1).eq(127).all()


def test_rows_of_zeros_and_nan_stay_what_they_are():
    weight = torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [2.0, -1.0]])
    codes, scales = rowwise_int8(weight)
    restored = codes * scales
    assert torch.equal(restored[0], weight[0])
    assert restored[1].isnan().any()
    assert torch.allclose(restored[2], weight[2], atol=0.01)


def test_channels_last_weights_stay_channels_last():
    weight = torch.randn(8, 16, 3, 3).to(memory_format=torch.channels_last)
    codes, scales = rowwise_int8(weight)
    assert (codes * scales).is_contiguous(memory_format=torch.channels_last)


def held_bytes(network: torch.nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in [*network.parameters(), *network.buffers()])


def test_transformers_and_resnets_are_in_int8_and_the_rest_is_as_loaded(base):
    plain, small = load_unet(base, CPU, torch.bfloat16), load_unet(base, CPU, torch.bfloat16, in_int8=True)
    kinds = {name: type(module) for name, module in small.named_modules()}
    assert kinds["down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"] is Int8Linear
    assert kinds["down_blocks.1.attentions.0.proj_in"] is Int8Linear
    assert kinds["mid_block.resnets.0.conv1"] is Int8Conv2d
    assert kinds["up_blocks.0.resnets.0.conv_shortcut"] is Int8Conv2d
    for name in ("conv_in", "conv_out", "time_embedding.linear_1", "mid_block.resnets.0.time_emb_proj"):
        assert torch.equal(small.get_submodule(name).weight, plain.get_submodule(name).weight)
    codes = [module.codes for module in small.modules() if isinstance(module, (Int8Linear, Int8Conv2d))]
    saved = sum(each.numel() - 2 * len(each) for each in codes)  # one byte per weight, less the scales
    assert held_bytes(small) == held_bytes(plain) - saved


def inputs(dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "sample": normal(2, 4, 16, 24),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": normal(2, 77, 96),
        "added_cond_kwargs": {"text_embeds": normal(2, 64), "time_ids": torch.tensor([[128.0, 192, 0, 0, 128, 192]] * 2).to(dtype)},
    }


def gradient(unet: torch.nn.Module, engine: str, dtype: torch.dtype, *, recomputes: bool = False) -> torch.Tensor:
    """[P]: of all LoRA weights, of a LoRA with some effect."""
    unet = copy.deepcopy(unet)
    lora = inject(unet, LoraSettings(lora_rank=4, lora_conv_rank=4), seed=1)
    with torch.no_grad():
        lora.weights.copy_(0.05 * torch.randn(lora.weights.shape, generator=torch.Generator().manual_seed(7)))
    prepare_unet(engine, unet, lora, CPU, gradient_checkpointing=recomputes)()
    upstream = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(9))
    (unet(**inputs(dtype), return_dict=False)[0].float() * upstream).sum().backward()
    return lora.weights.grad


@pytest.mark.parametrize("recomputes", [False, True])
def test_both_engines_compute_with_the_same_weights(base, recomputes):
    small = load_unet(base, CPU, torch.float64, in_int8=True)
    plain, fast = (gradient(small, engine, torch.float64, recomputes=recomputes) for engine in ("plain", "fast"))
    assert (fast - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("kernels", [{}, {"lora_conv_rank": 4}], ids=["linear", "convolutions"])
def test_plain_layers_keep_no_weights_for_the_backward(base, kernels):
    kept = {}
    for in_int8 in (False, True):
        unet = load_unet(base, CPU, torch.float32, in_int8=in_int8)
        prepare_unet("plain", unet, inject(unet, LoraSettings(lora_rank=4, **kernels), seed=1), CPU)
        lasting = {each.data_ptr() for each in [*unet.parameters(), *unet.buffers()]}
        sizes = {}

        def pack(tensor, lasting=lasting, sizes=sizes):
            if tensor.data_ptr() not in lasting:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            answer = unet(**inputs(torch.float32), return_dict=False)[0]
        kept[in_int8] = sum(sizes.values())
        assert answer.requires_grad
    assert kept[True] <= kept[False]


def test_gradient_points_where_that_of_the_exact_weights_does(base):
    """With weights as PyTorch initialises them: those of the tiny model multiply every rounding, that of bf16 alike."""
    exact = load_unet(base, CPU, torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in exact.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    small = copy.deepcopy(exact)
    quantize(small, CPU)
    of_exact, of_small = (gradient(unet, "fast", torch.float32) for unet in (exact, small))
    assert torch.nn.functional.cosine_similarity(of_exact, of_small, 0) >= 0.999


def test_dora_needs_exact_weights():
    dora = replace(TrainSettings(), lora=LoraSettings(lora_type="dora"))
    refused = replace(dora, model=replace(dora.model, base_quantization="int8"))
    assert any("BASE_QUANTIZATION=none" in line for line in refused.validate())
    assert not list(dora.validate())
