"""The UNet with fast forwards is that of diffusers with PEFT's layers: the same predictions and the same gradients.

In float64, because the random weights of the tiny model multiply every rounding; LoRA gradients are fp32 always.
"""

import copy

import pytest
import torch
from peft.helpers import disable_input_dtype_casting

from demo import tiny_sdxl
from training.config import LoraSettings
from training.engine.fast import lora_linear
from training.engine.fast import unet as fast_unet
from training.engine.fast.fuse import fuse
from training.engine.fast.gaps import empty_with_gap, with_gap
from training.engine.fast.lora_conv import LoraConv, lora_conv
from training.engine.fast.lora_linear import FusedLoraLinear, fused_lora_linear, fused_lora_linears
from training.engine.fast.unet import install_fast_forwards
from training.engine.step import recomputed
from training.method.adapters import ADAPTER, Adapter, inject
from training.models.base_model import find_base
from training.models.weights import load_unet


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


def adapted(unet, targets: str = "all", pattern: str = "", rank: int = 3, **settings) -> tuple[torch.nn.Module, Adapter]:
    """A copy of the UNet with a LoRA that does something."""
    mine = copy.deepcopy(unet)
    chosen = {"lora_rank": rank, "lora_alpha": 6.0, "lora_targets": targets, "lora_rank_pattern": pattern} | settings
    lora = inject(mine, LoraSettings(**chosen), seed=1)
    changes = 0.15 / rank * torch.randn(lora.weights.shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        if chosen.get("lora_type") == "dora":
            lora.weights.add_(changes)
        else:
            lora.weights.copy_(changes)
    return mine, lora


def quick(unet, *choice: str, **settings) -> tuple[torch.nn.Module, Adapter, dict[str, FusedLoraLinear | LoraConv]]:
    """The same with fast forwards, and its layers."""
    network, lora = adapted(unet, *choice, **settings)
    groups, convolutions, sync_compute_weights = fuse(lora)
    sync_compute_weights()
    install_fast_forwards(network, groups, convolutions)
    return network, lora, groups | convolutions


def peft_gradients(unet, lora: Adapter) -> dict[str, torch.Tensor]:
    """Gradients that autograd left in PEFT's own layers."""
    gradients = {}
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            gradients[name.replace(".default.weight", "")] = parameter.grad
    assert len(gradients) == sum(2 + (module.magnitude is not None) for module in lora.modules)
    return gradients


def flat_gradients(groups: dict[str, FusedLoraLinear | LoraConv]) -> dict[str, torch.Tensor]:
    gradients = {}
    for name, group in groups.items():
        names = (name,) if isinstance(group, LoraConv) else group.names
        if group.scales:
            parts = group.scales.magnitude_grad.chunk(len(names))
            gradients |= {f"{each}.lora_magnitude_vector": part for each, part in zip(names, parts, strict=True)}
        if isinstance(group, LoraConv):
            gradients[f"{name}.lora_A"], gradients[f"{name}.lora_B"] = group.down_grad, group.up_grad[:, :, None, None]
            continue
        for i, (name, down) in enumerate(zip(group.names, group.down_grad.chunk(len(group.names)), strict=True)):
            gradients[f"{name}.lora_A"], gradients[f"{name}.lora_B"] = down, group.up_grad[i]
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
    plain.double()  # PEFT's parameters, too
    return request.param, answered(plain), peft_gradients(plain, lora)


@pytest.fixture(params=["little bandwidth", "much bandwidth", "layer by layer"])
def each_way(request, monkeypatch):
    """With the kernels that compute a LoRA's products along, here in PyTorch's operations, as on cards with HBM and on others; and
    without."""
    for module in (lora_linear, fast_unet):
        monkeypatch.setattr(module, "takes_products", lambda *_: request.param != "layer by layer")
    monkeypatch.setattr(fast_unet, "short_of_bandwidth", lambda _: request.param == "little bandwidth")


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("recomputes", [False, True])
def test_answer_and_every_gradient_are_those_of_diffusers_and_peft(unet, reference, recomputes):
    targets, answer, wanted = reference
    fast, _, groups = quick(unet, targets)
    if recomputes:
        fast.enable_gradient_checkpointing(recomputed)
    torch.testing.assert_close(answered(fast), answer, rtol=1e-6, atol=1e-6)
    found = flat_gradients(groups)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.usefixtures("each_way")
def test_a_rank_as_wide_as_a_part_of_a_concatenation_is_no_gap(unet):
    """The gradient of 32 channels that were concatenated with 32 others has rows of 64, as rows with a gap for rank 32 have: what
    stands in the place of the gap is the gradient of the others."""
    plain, lora = adapted(unet, rank=32)
    plain.double()
    answered(plain)
    wanted = peft_gradients(plain, lora)
    fast, _, groups = quick(unet, rank=32)
    answered(fast.to(memory_format=torch.channels_last))
    found = flat_gradients(groups)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_gradients_are_added_to_what_is_there(unet):
    fast, lora, _ = quick(unet)
    for times in (1, 2):
        fast(**inputs(), return_dict=False)[0].square().mean().backward()
        if times == 1:
            once = lora.weights.grad.clone()
    torch.testing.assert_close(lora.weights.grad, 2 * once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("kind", ["attn1.to_q,to_k,to_v", "attn2.to_q", "ff.net.0.proj"])
def test_with_gaps_behind_the_rows_the_product_is_the_same(unet, kind, rank):
    """One wide product, as on a GPU, instead of a product and a second one that is added (rank 3), or of rows that are copied
    (rank 8): the same output and gradients."""
    _, lora, groups = quick(unet, rank=rank)
    layer = next(layer for name, layer in groups.items() if name.endswith(kind))
    columns, (rows, width) = len(layer.down), layer.weight.shape
    generator = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(2, 5, size, generator=generator, dtype=torch.float64) for size in (width, rows))
    results = []
    for gap in (0, columns):
        given, d_out = (empty_with_gap(part, part.shape[-1], gap) for part in (x, dy))
        for part in (given, d_out) if gap else ():
            with_gap(part.flatten(0, 1), part.shape[-1] + gap).fill_(torch.nan)  # what is in the gap must not matter
        given.copy_(x)
        d_out.copy_(dy)
        given.requires_grad_()
        lora.sums.zero_()
        y = torch.cat(fused_lora_linears(given, layer), dim=-1)
        (dx,) = torch.autograd.grad(y, given, d_out)
        results.append((y, dx, layer.down_grad.clone(), layer.up_grad.clone()))
    assert results[1][0].isfinite().all()
    for without, beside_gap in zip(*results, strict=True):
        torch.testing.assert_close(beside_gap, without, rtol=1e-6, atol=1e-9)


def test_layers_of_a_group_are_in_memory_once(unet):
    """A DoRA's modules have the frozen weight, too, for the export."""
    _, dora, groups = quick(unet, lora_type="dora")
    bases = {module.name: module.base for module in dora.modules}
    for group in groups.values():
        for name in group.names:
            assert bases[name] is dora.layers[name].base_layer.weight
            assert bases[name].untyped_storage().data_ptr() == group.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "pattern",
    [
        r"(attn2.to_q|ff.net.2)$=3 .=0",
        r"(attn1.to_q|attn1.to_v|attn2.to_v|proj_in)$=3 .=0",
        r"attn1.to_q=2 attn1.to_k=5:1 attn2.to_v=7 up_blocks.0=8:2 ff=0",
        r"down_blocks.1.*attn1=2 attn1=16:4 attn2.to_k=8:2 attn2.to_v=8:2",
    ],
    ids=["none of a group", "some", "ranks and scales", "equal ones in a group"],
)
def test_any_choice_of_layers_ranks_and_scales_is_computed_as_diffusers_and_peft_do(unet, pattern):
    """Groups that are not adapted, or in part, too; those of different ranks fall apart."""
    plain, lora = adapted(unet, pattern=pattern)
    plain.double()
    expected = answered(plain)
    fast, _, groups = quick(unet, pattern=pattern)
    torch.testing.assert_close(answered(fast), expected, rtol=1e-6, atol=1e-6)
    found = flat_gradients(groups)
    for name, gradient in peft_gradients(plain, lora).items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize(
    ("recomputes", "settings"),
    [
        (False, {"lora_conv_rank": 5}),
        (False, {"lora_conv_rank": 16, "lora_rslora": True, "lora_alpha": 8.0, "pattern": "attentions=0"}),
        (True, {"lora_conv_rank": 2, "pattern": r"conv1=0 samplers=9:4 up_blocks.*conv2=16 mid_block=0"}),
        (True, {"lora_type": "dora", "lora_conv_rank": 4, "rank": 8, "pattern": r"down_blocks.*(to_q|2.to_v)=2:1 samplers=0"}),
    ],
    ids=str,
)
def test_convolutions_and_doras_are_computed_as_diffusers_and_peft_do(unet, settings, recomputes):
    """Convolutions of ResNets and samplers, some or all, alone or beside linear layers, also where a rank is not a multiple of 8.
    DoRA's scales are fp32 in either engine, and a norm behind a layer makes the gradient of its magnitudes a small difference."""
    of_output, of_gradients, of_all = (1e-5, 1e-4, 1e-7) if "lora_type" in settings else (1e-6, 1e-5, 0.0)
    plain, lora = adapted(unet, **settings)
    plain.double()
    expected, wanted = answered(plain), peft_gradients(plain, lora)
    fast, _, layers = quick(unet, **settings)
    if recomputes:
        fast.enable_gradient_checkpointing(recomputed)
    torch.testing.assert_close(answered(fast.to(memory_format=torch.channels_last)), expected, rtol=of_output, atol=of_output)
    found = flat_gradients(layers)
    assert wanted.keys() == found.keys()
    rest = of_all * torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for name, gradient in wanted.items():
        assert (found[name] - gradient.view_as(found[name])).norm() <= of_gradients * gradient.norm() + rest, name


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (3, 2, 0), (5, 1, 2), (2, 2, 0)])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_every_kind_of_convolution_has_the_gradients_of_autograd(kernel, stride, padding, needs_dx):
    conv = torch.nn.Conv2d(6, 10, kernel, stride, padding).requires_grad_(False).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 9, 12, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last)
    down = torch.zeros(8, 6, kernel, kernel, dtype=torch.float64)
    up = torch.zeros(10, 8, dtype=torch.float64)
    down[:3], up[:, :3] = torch.randn(3, 6, kernel, kernel, generator=generator), torch.randn(10, 3, generator=generator)
    gradients = torch.zeros(3, 6, kernel, kernel), torch.zeros(10, 3)
    anchor = torch.zeros((), requires_grad=True)
    y = lora_conv(x.requires_grad_(needs_dx), LoraConv(conv, down, up, *gradients, 0.5, anchor), conv.bias)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(dy)
    wanted_down, wanted_up = down[:3].clone().requires_grad_(), (up[:, :3, None, None] / 0.5).requires_grad_()
    again = x.detach().clone().requires_grad_()
    hidden = torch.nn.functional.conv2d(again, wanted_down, None, stride, padding)
    expected = conv(again) + 0.5 * torch.nn.functional.conv2d(hidden, wanted_up)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients[0], wanted_down.grad.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients[1], wanted_up.grad[:, :, 0, 0].float(), rtol=1e-5, atol=1e-4)
    assert (x.grad is not None) is needs_dx
    if needs_dx:
        torch.testing.assert_close(x.grad, again.grad)


def test_without_its_adapter_a_dora_is_the_base_model_and_then_itself_again(unet):
    network, lora = adapted(unet, lora_type="dora", lora_conv_rank=4)
    groups, convolutions, sync_compute_weights = fuse(lora)
    install_fast_forwards(network, groups, convolutions)
    answers = []
    for adapts in (True, False, True):
        sync_compute_weights(adapts)
        with torch.no_grad():
            answers.append(network(**inputs(), return_dict=False)[0])
    torch.testing.assert_close(answers[1], unet(**inputs(), return_dict=False)[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(answers[0], answers[2])
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)


def test_in_bf16_a_dora_is_as_near_to_exact_as_pefts_under_autocast(tmp_path):
    """Output, the gradient of the input, and those of down, up and magnitude; linear with and without a bias, and a convolution."""
    folder = tiny_sdxl.build(tmp_path / "tiny")
    network = load_unet(find_base(str(folder), tmp_path), torch.device("cpu"), torch.bfloat16)
    lora = inject(network, LoraSettings(lora_rank=8, lora_conv_rank=8, lora_type="dora"), seed=1)
    with torch.no_grad():
        lora.weights.add_(0.1 * torch.randn(lora.weights.shape, generator=torch.Generator().manual_seed(7)))
    groups, convolutions, sync_compute_weights = fuse(lora)
    sync_compute_weights()
    lora.sums.zero_()
    block = "mid_block.attentions.0.transformer_blocks.0"
    ratios = []
    for name in (f"{block}.ff.net.2", f"{block}.attn2.to_q", "mid_block.resnets.0.conv2"):
        module, generator = network.get_submodule(name), torch.Generator().manual_seed(3)
        layer, size = (convolutions[name], (6, 5)) if name in convolutions else (groups[name], ())
        x = torch.randn(16, module.base_layer.weight.shape[1], *size, generator=generator).bfloat16().requires_grad_()
        dy = torch.randn(16, module.out_features, *size, generator=generator).bfloat16()
        y = lora_conv(x, layer, module.bias) if size else fused_lora_linear(x, layer)
        ours = y, torch.autograd.grad(y, x, dy)[0], layer.down_grad, layer.up_grad, layer.scales.magnitude_grad
        ours = [part.clone() for part in ours]  # PEFT's gradients go to the same place
        del module.lora_variant[ADAPTER].forward
        with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(module):
            peft = with_gradients(module, x, dy)
        exact = with_gradients(module.double(), x.detach().double().requires_grad_(), dy)
        for mine, other, true in zip(ours, peft, exact, strict=True):
            ratios.append(((mine.view_as(true) - true).norm() / (other - true).norm()).item())
    assert sum(ratios) <= 0.95 * len(ratios)
    assert max(ratios) <= 1.5  # of magnitudes: the output, which their gradient follows from, is rounded before and after scaling


def with_gradients(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output of a PEFT layer, and the gradients of its input, down, up and magnitude."""
    y = module(x)
    trained = [part[ADAPTER].weight for part in (module.lora_A, module.lora_B, module.lora_magnitude_vector)]
    return y, *torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))
