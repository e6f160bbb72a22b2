"""Run as a script: norms, sums, attention and products against PyTorch's operations, on the CPU by Triton's interpreter.

The interpreter has to be chosen before Triton is imported. It does not multiply bf16, so that the numbers are fp16.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from training.engine.fast import triton_attention, triton_gradients, triton_group_norms, triton_kernels, triton_products
from training.engine.fast.gaps import with_gap


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert (found.float() - expected).norm() <= tolerance * expected.norm()


def check_geglu_backward(rows: int, width: int, rank: int, next_rank: int, gap: int) -> None:
    torch.manual_seed(0)
    projected, d_out = torch.randn(rows, 2 * width).half(), torch.randn(rows, width).half()
    # Parts of wider rows, as in a gap.
    h, g = torch.randn(rows, rank + 8).half()[:, 8:], torch.randn(rows, next_rank + 8).half()[:, :next_rank]
    up_grad, down_grad = torch.randn(2 * width, rank), torch.randn(next_rank, width)
    d_projected, out = triton_kernels.geglu_backward(projected, d_out), triton_kernels.geglu_forward(projected)
    expected = up_grad + 0.5 * d_projected.float().T @ h.float(), down_grad + g.float().T @ out.float()
    found = triton_products.geglu_backward_with_lora(projected, d_out, h, g, up_grad, down_grad, 0.5, gap)
    assert torch.equal(found, d_projected)
    assert found.stride() == (2 * width + gap, 1)
    assert_close(up_grad, expected[0])
    assert_close(down_grad, expected[1])


def check_geglu_with_products(rows: int, width: int, rank: int) -> None:
    torch.manual_seed(0)
    projected, factor = torch.randn(rows, 2 * width).half(), torch.randn(rank, width + 5).half()[:, :width]
    expected, found = triton_kernels.geglu_forward(projected), triton_products.geglu_forward_with_products(projected, factor)
    assert torch.equal(found, expected)
    products = expected.float() @ factor.T.float()
    assert (with_gap(found, width + rank)[:, width:].float() - products).norm() < 1e-3 * products.norm()


def check_append_products(rows: int, width: int, rank: int, n: int, gap: int, keeps: bool) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(rows, width + gap).half()[:, :width] for _ in range(n)]
    factors = torch.randn(n, width, rank + 5).half()[..., :rank] if n > 1 else torch.randn(rank, width).half().T[None]
    products = torch.cat([part.float() @ factor.float() for part, factor in zip(parts, factors, strict=True)], dim=1)
    out, kept = triton_products.append_products(parts, factors, keeps)
    wide = with_gap(out, n * (width + rank))
    assert torch.equal(out, torch.cat(parts, dim=1))
    assert (wide[:, n * width :].float() - products).norm() < 1e-3 * products.norm()
    assert torch.equal(kept, wide[:, n * width :]) if keeps else kept is None


def check_layer_norm(rows: int, width: int, adds: bool, gap: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(2, width).half()
    x, y, d_normed, d_total = torch.randn(4, rows, width).half()
    d_total = torch.cat([d_total, d_total], dim=1)[:, width:]  # part of wider rows
    leaf = (x + y if adds else x).float().requires_grad_()
    expected = torch.nn.functional.layer_norm(leaf, (width,), weight.float(), bias.float(), 1e-5)
    (d_leaf,) = torch.autograd.grad(expected, leaf, d_normed.float())
    total, normed, mean, rstd = triton_kernels.layer_norm_forward(y if adds else None, x, weight, bias, 1e-5, gap)
    assert torch.equal(total, x + y if adds else x)
    assert with_gap(normed, width + gap) is not None if gap else normed.is_contiguous()
    assert_close(normed, expected, 1e-3)
    for residual in (None, d_total):
        dx = triton_kernels.layer_norm_backward(total, weight, mean, rstd, d_normed, residual, gap)
        assert dx.stride() == (width + gap, 1)
        assert_close(dx, d_leaf if residual is None else d_leaf + residual.float(), 1e-3)


def check_group_norm(images: int, rows: int, channels: int, groups: int, silu: bool, has_plus: bool, gap: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(2, channels).half()
    x, dy, d_x = torch.randn(3, images, rows, channels).half()
    plus = torch.randn(images, 2 * channels).half()[:, channels:] if has_plus else None  # part of wider rows
    leaf = x.float().requires_grad_()
    total = leaf + plus.float()[:, None] if has_plus else leaf
    expected = torch.nn.functional.group_norm(total.mT, groups, weight.float(), bias.float(), 1e-5).mT
    expected = torch.nn.functional.silu(expected) if silu else expected
    (d_leaf,) = torch.autograd.grad(expected, leaf, dy.float())
    normed, kept = triton_group_norms.group_norm_forward(x, plus, weight, bias, groups, 1e-5, silu, gap)
    assert normed.stride() == (rows * (channels + gap), channels + gap, 1)
    assert_close(normed, expected, 1e-3)
    for residual in (None, d_x):
        dx = triton_group_norms.group_norm_backward(x, plus, weight, groups, silu, kept, dy, residual)
        assert_close(dx, d_leaf if residual is None else d_leaf + residual.float(), 1e-3)


def check_sum(rows: int, width: int, gap: int) -> None:
    x, y, bias = torch.randn(rows, width).half(), torch.randn(rows, width).half(), torch.randn(width).half()
    for constant in (None, bias):
        out = triton_kernels.add(x, y, constant, gap)
        assert out.stride() == (width + gap, 1)
        assert_close(out, x.float() + y.float() + (0 if constant is None else constant.float()), 1e-3)


def check_upsampling(images: int, height: int, width: int, channels: int) -> None:
    x, d_out = torch.randn(images, height, width, channels).half(), torch.randn(images, 2 * height, 2 * width, channels).half()
    leaf = x.permute(0, 3, 1, 2).float().requires_grad_()
    expected = torch.nn.functional.interpolate(leaf, scale_factor=2.0)
    (d_leaf,) = torch.autograd.grad(expected, leaf, d_out.permute(0, 3, 1, 2).float())
    assert torch.equal(triton_kernels.upsample(x).float(), expected.permute(0, 2, 3, 1))
    assert_close(triton_kernels.upsample_backward(d_out), d_leaf.permute(0, 2, 3, 1), 1e-3)


def check_attention(images: int, rows: int, keys: int, heads: int, gap: int, shift: float = 0.0) -> None:
    """`shift` is added to all logits, which changes no result."""
    torch.manual_seed(0)
    width = heads * 64
    q = torch.randn(images, rows, 3 * width).half()[..., :width]  # parts of wider rows, as those of a self-attention are
    k, v = torch.randn(images, keys, 2 * width).half().chunk(2, dim=-1)
    d_out = torch.randn(images, rows, width + 8).half()[..., :width]
    if shift:
        q[..., ::64], k[..., ::64] = 8.0, shift
    leaves = [each.float().requires_grad_() for each in (q, k, v)]
    per_head = [each.unflatten(-1, (heads, 64)).transpose(1, 2) for each in leaves]
    expected = torch.nn.functional.scaled_dot_product_attention(*per_head).transpose(1, 2).flatten(2)
    out, logs = triton_attention.attend(q, k, v, heads, gap)
    found = out, *triton_attention.attend_backward(q, k, v, logs, d_out, heads, gap)
    for ours, theirs in zip(found, (expected, *torch.autograd.grad(expected, leaves, d_out.float())), strict=True):
        assert_close(ours, theirs.detach(), 5e-3 if shift else 1e-3)
    assert out.stride() == found[1].stride() == (rows * (width + gap), width + gap, 1)


def check_gradients() -> None:
    """Of layers of other shapes, ranks and numbers of parts by one kernel."""
    torch.manual_seed(0)
    layers, expected = [], []
    for rows, out, width, n, rank, scale in ((100, 96, 160, 3, 8, 0.5), (70, 200, 64, 1, 16, 1.0), (130, 64, 300, 2, 3, 2.0)):
        # Parts of wider rows, as in a gap.
        dy, h = torch.randn(rows, n * out + 8).half()[:, : n * out], torch.randn(rows, n * rank + 8).half()[:, 8:]
        x, g = torch.randn(rows, width + 8).half()[:, 8:], torch.randn(rows, n * rank).half()
        up_grad, down_grad = torch.randn(n, out, rank), torch.randn(n * rank, width)
        by_part = [torch.stack(each.float().chunk(n, dim=1)) for each in (dy, h)]
        expected.append((up_grad + scale * by_part[0].mT @ by_part[1], down_grad + g.float().T @ x.float()))
        layers.append((dy, h, up_grad, scale, x, g, down_grad))
    triton_gradients.add_gradients(layers)
    for (up_grad, down_grad), layer in zip(expected, layers, strict=True):
        assert_close(layer[2], up_grad)
        assert_close(layer[6], down_grad)


if __name__ == "__main__":
    check_gradients()
    check_upsampling(2, 3, 5, 160)
    check_sum(33, 320, 32)
    check_sum(5, 77, 0)
    for rows, width, gap in ((5, 1280, 32), (2, 64, 8), (2, 77, 0)):
        for adds in (False, True):
            check_layer_norm(rows, width, adds, gap)
    for images, rows, channels, groups, gap in ((2, 200, 96, 4, 32), (1, 9, 99, 3, 0)):
        for silu, has_plus in ((True, True), (False, False)):
            check_group_norm(images, rows, channels, groups, silu, has_plus, gap)
    triton_group_norms.processors = lambda device: 132  # sums of more chunks than are added at a time
    check_group_norm(1, 1100, 96, 4, True, True, 0)
    triton_attention.processors = lambda device: 3
    for shape in (
        (2, 100, 77, 2, 0),
        (1, 70, 154, 3, 32),
        (2, 300, 128, 1, 8),
        (2, 40, 64, 1, 16),
        (1, 33, 160, 1, 0),
        (1, 5, 16, 2, 8),
    ):
        for is_hopper in (False, True) if shape[2] >= triton_attention._KEYS_OF_TWO_KERNELS else (False,):
            triton_attention._is_hopper = lambda device, answer=is_hopper: answer
            for shift in (0.0, -20.0, -100.0):
                check_attention(*shape, shift=shift)
    triton_products.processors = lambda device: 2  # rows are divided among several programs
    for shape in ((130, 96, 8, 8, 0), (64, 64, 32, 16, 32), (200, 160, 3, 40, 0), (5, 64, 64, 64, 64)):
        check_geglu_backward(*shape)
    for shape in ((130, 96, 8), (64, 320, 32), (7, 160, 40), (33, 64, 64)):
        check_geglu_with_products(*shape)
    for shape in ((130, 96, 8, 3, 0), (16, 256, 32, 1, 24), (7, 160, 40, 2, 8), (33, 64, 64, 1, 0)):
        for keeps in (False, True):
            check_append_products(*shape, keeps)
