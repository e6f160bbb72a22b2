"""DoRA: what PEFT trains is what ComfyUI makes of the file."""

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file

from common.errors import ModelError
from demo import tiny_sdxl
from training.config import LoraSettings
from training.method.adapters import ADAPTER, Adapter, inject, row_norms
from training.method.export import kohya_tensors, verify
from training.method.layers import kohya_name
from training.method.low_rank import changed_row_squares
from training.models.base_model import find_base
from training.models.weights import load_unet, write_tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_sdxl.build(tmp_path_factory.mktemp("models") / "tiny")
    return find_base(str(folder), folder.parent)


def injected(base, alpha: float = 3.0, dtype: torch.dtype = torch.float32, **settings) -> tuple[torch.nn.Module, Adapter]:
    unet = load_unet(base, torch.device("cpu"), dtype)
    return unet, inject(unet, LoraSettings(lora_rank=4, lora_alpha=alpha, lora_type="dora", **settings), seed=5)


def as_comfyui_patches(weight: torch.Tensor, lora: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """ComfyUI's rule for a weight with dora_scale at strength 1, in its own dtype for LoRA arithmetic, fp32."""
    up, down = lora[f"{name}.lora_up.weight"].float(), lora[f"{name}.lora_down.weight"].float()
    patched = weight + up @ down * (lora[f"{name}.alpha"].item() / down.shape[0])
    return patched * (lora[f"{name}.dora_scale"] / (weight.norm(dim=1, keepdim=True) + torch.finfo(weight.dtype).eps))


def test_a_fresh_dora_changes_nothing(base):
    plain = load_unet(base, torch.device("cpu"), torch.float32)
    unet, dora = injected(base)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500])
    given = {
        "encoder_hidden_states": torch.randn(1, 77, 96),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 64), "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]])},
    }
    torch.testing.assert_close(unet(*inputs, **given).sample, plain(*inputs, **given).sample, rtol=1e-3, atol=1e-4)
    rows = sum(len(module.base) for module in dora.modules)
    assert dora.weights.numel() == sum(each.numel() for module in dora.modules for each in module.factors.values()) + rows
    assert all(torch.equal(module.magnitude, row_norms(module.base)) for module in dora.modules)


@pytest.mark.parametrize("alpha", [3.0, 0.7], ids=["exact in fp16", "not exact in fp16"])
def test_comfyui_patches_the_weights_that_peft_trained(base, tmp_path, alpha):
    """Weights are compared with those that PEFT itself would merge, for a DoRA that does something."""
    unet, dora = injected(base, alpha)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in dora.modules:
            module.zero.copy_(0.02 * torch.randn(module.zero.shape, generator=generator))
            module.magnitude.mul_(1 + 0.1 * torch.rand(module.magnitude.shape, generator=generator))
    tensors = kohya_tensors(dora.modules)
    write_tensors(tmp_path / "dora.safetensors", tensors)
    verify(tmp_path / "dora.safetensors", tensors)
    read = load_file(tmp_path / "dora.safetensors")
    apart, changed = 0.0, 0.0
    for module in dora.modules:
        layer = unet.get_submodule(module.name)
        weight = layer.base_layer.weight.detach().clone()
        patched = as_comfyui_patches(weight, read, kohya_name(module.name))
        layer.merge(adapter_names=[ADAPTER])
        apart = max(apart, (patched - layer.base_layer.weight).abs().max().item())
        changed = max(changed, (weight - patched).abs().max().item())
    assert apart < 1e-6
    assert changed > 1e-2


def test_a_dora_without_its_scales_is_refused(base, tmp_path):
    _, dora = injected(base, lora_targets="attention")
    tensors = kohya_tensors(dora.modules)
    missing = next(name for name in tensors if name.endswith(".dora_scale"))
    write_tensors(tmp_path / "dora.safetensors", {name: tensor for name, tensor in tensors.items() if name != missing})
    with pytest.raises(ModelError, match=f"{missing}: "):
        verify(tmp_path / "dora.safetensors", tensors)


LAYERS = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
LAYERS += ("mid_block.resnets.0.conv1",)
"""Linear with a bias and without one, and a convolution."""


def computed(module: torch.nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Output, and the gradients of input, down, up and magnitude, of random numbers that bf16 can hold."""
    width, size = module.base_layer.weight.shape[1], (5, 6) if module.base_layer.weight.dim() == 4 else ()
    x = torch.randn(8, width, *size, generator=torch.Generator().manual_seed(2)).bfloat16().to(dtype).requires_grad_()
    torch.manual_seed(7)  # of dropout
    y = module(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(y.dtype)
    trained = [part[ADAPTER].weight for part in (module.lora_A, module.lora_B, module.lora_magnitude_vector)]
    return y, *torch.autograd.grad(y, [x, *trained], upstream)


def changed(dora: Adapter) -> None:
    with torch.no_grad():
        dora.weights.add_(0.1 * torch.randn(dora.weights.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers_compute_what_pefts_do(base, dropout):
    """Output and every gradient in float64, with the norms of whole weights and without them."""
    unet, dora = injected(base, lora_conv_rank=2, lora_dropout=dropout)
    changed(dora)
    for module in (unet.get_submodule(layer).double().train(dropout > 0) for layer in LAYERS):
        ours = computed(module, torch.float64)
        del module.lora_variant[ADAPTER].forward  # what inject has set
        for mine, peft in zip(ours, computed(module, torch.float64), strict=True):
            assert (mine - peft).norm() < 1e-6 * peft.norm()


def test_in_bf16_layers_are_as_near_to_exact_as_pefts_under_autocast(base):
    unet, dora = injected(base, lora_conv_rank=2, dtype=torch.bfloat16)
    changed(dora)
    for module in map(unet.get_submodule, LAYERS):
        ours = computed(module, torch.bfloat16)
        del module.lora_variant[ADAPTER].forward
        with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(module):
            peft = computed(module, torch.bfloat16)
        for mine, other, exact in zip(ours, peft, computed(module.double(), torch.float64), strict=True):
            assert (mine - exact).norm() <= 1.05 * (other - exact).norm()


def test_norms_of_changed_rows_need_no_product_and_are_never_negative():
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(2, *shape, generator=generator) for shape in ((7, 50), (3, 50), (7, 3)))
    weight[0, 0] = -up[0, 0] @ down[0]  # a row of which nothing remains
    squares = weight.square().sum(-1)
    found = changed_row_squares(squares, weight @ down.mT, down, up)
    exact = (weight.double() + up.double() @ down.double()).square().sum(-1)
    assert found[0, 0] == pytest.approx(1e-6 * squares[0, 0].item(), rel=10)
    exact[0, 0] = found[0, 0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
