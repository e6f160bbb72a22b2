"""The quickened UNet is the UNet of diffusers with PEFT's layers in it: the same answers and the same gradients.

In float64, because the random weights of the tiny model multiply every rounding; LoRA gradients are fp32 always.
"""

import copy

import pytest
import torch

from demo import tiny_sdxl
from training.config import LoraSettings
from training.engine.fast import torch_ops as plain_ops
from training.engine.fast.unet import checkpoint_everything, install_fast_forwards
from training.method.adapters import LoraWeights, inject
from training.models.base_model import find_base
from training.models.loading import load_unet


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    folder = tiny_sdxl.build(tmp_path_factory.mktemp("models") / "tiny")
    return load_unet(find_base(str(folder), folder.parent), torch.device("cpu"), torch.float64)


def inputs(size: tuple[int, int] = (16, 24), batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(5)
    return {
        "sample": torch.randn(batch, 4, *size, generator=generator, dtype=torch.float64),
        "timestep": torch.tensor([3, 700][:batch]),
        "encoder_hidden_states": torch.randn(batch, 154, 96, generator=generator, dtype=torch.float64),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, 64, generator=generator, dtype=torch.float64),
            "time_ids": torch.tensor([[128.0, 192, 0, 0, 128, 192]] * batch),
        },
    }


def adapted(unet, targets: str = "all", alpha: float = 6.0) -> tuple[torch.nn.Module, LoraWeights]:
    """A copy of the UNet with a LoRA that does something."""
    mine = copy.deepcopy(unet)
    lora = inject(mine, LoraSettings(lora_rank=3, lora_alpha=alpha, lora_targets=targets), seed=1)
    with torch.no_grad():
        lora.weights.copy_(0.05 * torch.randn(lora.weights.shape, generator=torch.Generator().manual_seed(7)))
        lora.refresh()
    return mine, lora


def peft_gradients(unet, lora: LoraWeights) -> dict[str, torch.Tensor]:
    """Gradients that autograd left in PEFT's own layers."""
    gradients = {}
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            gradients[name.replace(".default.weight", "")] = parameter.grad
    assert len(gradients) == 2 * len(lora.modules)
    return gradients


def flat_gradients(lora: LoraWeights) -> dict[str, torch.Tensor]:
    gradients = {}
    for names, stack in lora.stacks.values():
        for i, (name, down) in enumerate(zip(names, stack.down_grad.chunk(len(names)), strict=True)):
            gradients[f"{name}.lora_A"], gradients[f"{name}.lora_B"] = down, stack.up_grad[i]
    return gradients


def answered(network: torch.nn.Module) -> torch.Tensor:
    """The answer to `inputs`, once some gradient went back through the network."""
    upstream = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(9))
    answer = network(**inputs(), return_dict=False)[0]
    (answer * upstream).sum().backward()
    return answer.detach()


@pytest.fixture(scope="module", params=["all", "attention"])
def reference(unet, request) -> tuple[str, torch.Tensor, dict[str, torch.Tensor]]:
    """What is adapted; answer and gradients of diffusers and PEFT."""
    plain, lora = adapted(unet, request.param)
    return request.param, answered(plain), peft_gradients(plain, lora)


@pytest.mark.parametrize("recomputes", [False, True])
def test_answer_and_every_gradient_are_those_of_diffusers_and_peft(unet, reference, recomputes):
    targets, answer, wanted = reference
    fast, lora = adapted(unet, targets)
    install_fast_forwards(fast, lora.stacks, plain_ops)
    if recomputes:
        checkpoint_everything(fast)
    torch.testing.assert_close(answered(fast), answer, rtol=1e-6, atol=1e-6)
    found = flat_gradients(lora)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_gradients_are_added_to_what_is_there(unet):
    fast, lora = adapted(unet)
    install_fast_forwards(fast, lora.stacks, plain_ops)
    for times in (1, 2):
        fast(**inputs(), return_dict=False)[0].square().mean().backward()
        if times == 1:
            once = lora.weights.grad.clone()
    torch.testing.assert_close(lora.weights.grad, 2 * once, rtol=1e-4, atol=1e-6)


def test_layers_in_a_stack_lie_in_memory_once(unet):
    fast, lora = adapted(unet)
    install_fast_forwards(fast, lora.stacks, plain_ops)
    for names, stack in lora.stacks.values():
        base = fast.get_submodule(names[0]).base_layer.weight
        assert base.untyped_storage().data_ptr() == stack.weight.untyped_storage().data_ptr()
