"""The pull on what a LoRA changes, against the changes that PEFT computes, by autograd in float64."""

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from training.config import LoraSettings
from training.method.adapters import ADAPTER, inject
from training.method.lora_l2 import l2_of_changes

SETTINGS = {
    "linear layers": {},
    "convolutions": {"lora_conv_rank": 2},
    "other ranks and scales": {"lora_rank_pattern": "attn2=2:8 ff=0", "lora_alpha": 2.0},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_gradient_is_that_of_the_squares_of_all_changes(changes):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 32), layers_per_block=1, attention_head_dim=2, cross_attention_dim=16, use_linear_projection=True,
    )  # fmt: skip
    lora = inject(unet.requires_grad_(False), LoraSettings(lora_rank=4, **changes), seed=7)
    with torch.no_grad():
        lora.weights.copy_(torch.randn(len(lora.weights)))
    lora.sums.fill_(1.0)  # the gradient of the loss
    l2_of_changes(lora, 0.3)()
    found = lora.sums[:-1].double() - 1
    lora.sums.zero_()

    assert len(lora.layers) > 20
    total = sum(layer.get_delta_weight(ADAPTER).double().square().sum() for layer in lora.layers.values())
    (0.3 * total).backward()
    expected = lora.sums[:-1].double()
    assert expected.norm() > 1
    assert (found - expected).norm() < 1e-5 * expected.norm()
