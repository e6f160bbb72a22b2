"""On a GPU: kernels against PyTorch's operations.

These tests are skipped where there is no GPU. benchmarks/README.md says when and on which card they ran last.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from training.config import LoraSettings
from training.engine.fast.feed_forward import fused_feed_forward
from training.engine.fast.fuse import fuse
from training.engine.fast.gaps import empty_with_gap, with_gap
from training.engine.fast.gradients import add_gradients
from training.engine.fast.lora_linear import fused_lora_linear
from training.engine.fast.ops import (
    add_layer_norm,
    append_products,
    attend,
    dequantized,
    geglu,
    group_norm,
    scale_columns,
    scale_columns_backward,
    takes_gradients,
    takes_products,
    upsample,
)
from training.method.adapters import inject
from training.models.base_model import find_base
from training.models.int8 import rowwise_int8
from training.models.weights import load_unet

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    # PyTorch warns where a backward begins with a product and nothing else has used the GPU in its thread.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("with_plus", [True, False])
def test_group_norm_kernels(silu, with_plus):
    norm = randomised(torch.nn.GroupNorm(32, 320, eps=1e-5))
    results = []
    for device in ("cpu", "cuda"):
        norm, generator = norm.to(device), torch.Generator().manual_seed(1)
        x = (torch.randn(2, 320, 40, 24, generator=generator) + 1).to(device)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(True)
        plus = torch.randn(2, 320, generator=generator).to(device) if with_plus else None
        same, normed = group_norm(x, plus, norm, silu=silu)
        upstream = torch.randn(2, 2, 320, 40, 24, generator=generator).to(device)
        (same * upstream[0] + normed * upstream[1]).sum().backward()
        results.append((normed.detach().cpu(), x.grad.cpu()))
    for plain, ours in zip(*results, strict=True):
        assert (ours - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("adds", [True, False])
def test_layer_norm_and_geglu_kernels(adds):
    norm = randomised(torch.nn.LayerNorm(640))
    results = []
    for device in ("cpu", "cuda"):
        norm, generator = norm.to(device), torch.Generator().manual_seed(1)
        x, y = (torch.randn(2, 37, 640, generator=generator).to(device).requires_grad_(True) for _ in range(2))
        total, normed = add_layer_norm(x, y if adds else None, norm)
        activated = geglu(total + normed)
        (activated * torch.randn(2, 37, 320, generator=generator).to(device)).sum().backward()
        found = (total, normed, activated, x.grad, *([y.grad] if adds else []))
        results.append([tensor.detach().cpu() for tensor in found])
    for plain, ours in zip(*results, strict=True):
        assert (ours - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("gap", [0, 16])
def test_kernels_of_scaled_columns(has_bias, gap):
    generator = torch.Generator().manual_seed(1)
    y, dy = (torch.randn(333, 320, generator=generator) for _ in range(2))
    g, bias = torch.rand(320, generator=generator) + 0.5, torch.randn(320, generator=generator) if has_bias else None
    results = []
    for device in ("cpu", "cuda"):
        mine, factors, constant = y.clone().to(device), g.to(device), bias.to(device) if has_bias else None
        scale_columns(mine, factors, constant)
        given = empty_with_gap(mine, 320, gap).copy_(dy)
        dx, sums = scale_columns_backward(given, mine, factors, constant, gap)
        assert dx.stride() == (320 + gap, 1)
        results.append([mine.cpu(), dx.cpu(), sums.cpu()])
    for plain, ours in zip(*results, strict=True):
        assert (ours - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [3, 8, 32, 40, 64])
def test_the_feed_forward_of_a_block_is_that_of_its_layers_one_by_one(base, rank, dtype):
    """The products along are added up in another order. What GEGLU itself returns is the same bit for bit."""
    unet = load_unet(find_base(str(base), base.parent), torch.device("cuda"), dtype)
    lora = inject(unet, LoraSettings(lora_rank=rank, lora_alpha=rank), seed=3)
    with torch.no_grad():
        lora.weights.add_(0.05 * torch.randn_like(lora.weights))
    groups, _, sync_compute_weights = fuse(lora)
    sync_compute_weights()
    name = next(name for name in groups if name.endswith("ff.net.2"))
    layers = groups[name.replace("net.2", "net.0.proj")], groups[name]
    assert takes_products(layers[0].down, rank, rank)
    gap = 0 if rank % 8 else rank
    generator = torch.Generator("cuda").manual_seed(1)
    given = torch.randn(2, 333, layers[0].down.shape[1], generator=generator, device="cuda", dtype=dtype)
    results = []
    for fuses in (False, True):
        lora.sums.zero_()
        x, dy = (empty_with_gap(given, given.shape[-1], gap).copy_(given).requires_grad_() for _ in range(2))
        if fuses:
            y = fused_feed_forward(x, *layers, gap, gap)
        else:
            y = fused_lora_linear(geglu(fused_lora_linear(x, layers[0]), gap, gap), layers[1])
        (dx,) = torch.autograd.grad(y, x, dy.detach())
        results.append((y, dx, *(part.clone() for layer in layers for part in (layer.down_grad, layer.up_grad))))
    # Of a few numbers of h and g, the rounding differs.
    for expected, found in zip(*results, strict=True):
        assert (found - expected).float().norm() < 1e-3 * expected.float().norm()


@pytest.mark.parametrize("rank", [8, 32, 40, 64])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_products_are_appended_to_rows(n, rank):
    """What the gap behind them holds is the product of the rows, once rounded."""
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(n, 333, 320, generator=generator).bfloat16()
    factors = torch.randn(n, 320, rank, generator=generator).bfloat16()
    (expected, products), (found, kept) = (
        append_products([part.to(device) for part in given], factors.to(device), keeps=True) for device in ("cpu", "cuda")
    )
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(with_gap(found, n * (320 + rank))[:, n * 320 :], kept)
    assert (kept.cpu() - products).float().norm() < 2e-3 * products.float().norm()


@pytest.mark.parametrize("rank", [3, 8, 32, 64])
def test_gradients_of_several_layers_are_added_by_one_kernel(rank):
    """In one backward, with other numbers of rows and parts; those that are more than the kernel takes at a time, by products."""
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    layers = []
    shapes = (333, 320, 640, 3), (1000, 640, 320, 1), (77, 96, 160, 2), (512, 1280, 200, 1), (333, 64, 64, 1), (80, 96, 64, 3)
    for rows, out, width, n in shapes:
        dy, x = normal(rows, n * (out + rank)).bfloat16()[:, : n * out], normal(rows, width + 8).bfloat16()[:, :width]
        h, g = (normal(rows, n * rank).bfloat16() for _ in range(2))
        layers.append((dy, h, normal(n, out, rank), 0.5, x, g, normal(n * rank, width)))
    expected = []
    for dy, h, up_grad, scale, x, g, down_grad in layers:
        parts = [torch.stack(each.float().chunk(len(up_grad), dim=1)) for each in (dy, h)]
        expected += [up_grad + scale * parts[0].mT @ parts[1], down_grad + g.float().T @ x.float()]
    anchor = torch.zeros((), device="cuda", requires_grad=True)

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, anchor):
            return anchor.clone()

        @staticmethod
        def backward(ctx, d_anchor):
            for layer in layers:
                assert takes_gradients(layer[0], layer[4], rank)
                add_gradients(*layer)
            return d_anchor

    Backward.apply(anchor).backward()
    found = [each for layer in layers for each in (layer[2], layer[6])]
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).norm() < 1e-5 * exact.norm()


def attention_of_pytorch(queries, keys, values, heads, *gaps) -> torch.Tensor:
    per_head = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys, values)]
    return scaled_dot_product_attention(*per_head).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("shift", [0.0, -100.0])
@pytest.mark.parametrize("keys", [7, 77, 128, 144, 154, 160, 161, 231])
def test_attention_to_a_text_is_nearly_that_in_fp32(keys, shift):
    """As near as PyTorch's own in bf16; with fewer or more keys than the kernels take, it is PyTorch's. `shift` is added to all
    logits, which changes no result, but numbers so large lose digits in bf16 with any kernel."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    q, d_out = torch.randn(2, 3, 500, 320, generator=generator, device="cuda")
    k, v = torch.randn(2, 3, keys, 320, generator=generator, device="cuda")
    if shift:
        q[..., ::64], k[..., ::64] = 8.0, shift
    results = []
    for dtype, function in ((torch.bfloat16, attend), (torch.float32, attend), (torch.bfloat16, attention_of_pytorch)):
        leaves = [each.bfloat16().to(dtype).requires_grad_() for each in (q, k, v)]
        out = function(*leaves, 5, 32, 16)
        results.append([out, *torch.autograd.grad(out, leaves, d_out.bfloat16().to(dtype))])
    for ours, exact, other in zip(*results, strict=True):
        allowed = max(4e-3 * exact.norm(), 1.2 * (other - exact).norm() if shift else 0.0)
        assert (ours - exact).norm() < allowed
    out, dq, *_ = results[0]
    gaps = [with_gap(rows.flatten(0, 1), 320 + gap) is not None for rows, gap in ((out, 32), (dq, 16))]
    assert gaps == [16 <= keys <= 160] * 2


def test_upsampling_kernels():
    results = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(1)
        x, dy = torch.randn(2, 96, 7, 5, generator=generator), torch.randn(2, 96, 14, 10, generator=generator)
        x = x.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = upsample(x)
        y.backward(dy.to(device))
        results.append((y.detach().cpu(), x.grad.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


@pytest.mark.parametrize("shape", [(640, 1280), (33, 2049), (64, 32, 3, 3)])
def test_weights_in_8_bits_are_multiplied_out(shape):
    weight = torch.randn(shape, device="cuda").bfloat16()
    weight = weight.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else weight
    codes, scales = rowwise_int8(weight)
    assert torch.equal(dequantized(codes, scales), codes * scales)
    assert dequantized(codes, scales).stride() == weight.stride()


def randomised(norm: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(norm.weight.shape, generator=generator))
        norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
    return norm.requires_grad_(False)
