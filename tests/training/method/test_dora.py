"""DoRA: what PEFT trains is what ComfyUI makes of the file."""

import pytest
import torch
from safetensors.torch import load_file

from common.errors import ModelError
from demo import tiny_sdxl
from training.config import LoraSettings
from training.method.adapters import ADAPTER, inject, row_norms
from training.method.export import kohya_tensors, verify
from training.method.layers import kohya_name
from training.models.base_model import find_base
from training.models.weights import load_unet, write_tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_sdxl.build(tmp_path_factory.mktemp("models") / "tiny")
    return find_base(str(folder), folder.parent)


def injected(base, alpha: float = 3.0, **settings):
    unet = load_unet(base, torch.device("cpu"), torch.float32)
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
