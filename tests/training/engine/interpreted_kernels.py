"""Run as a script: kernels of `triton_products` against PyTorch's products, on the CPU by Triton's interpreter.

The interpreter has to be chosen before Triton is imported. It does not multiply bf16, so that the numbers are fp16.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from training.engine.fast import triton_kernels, triton_products
from training.engine.fast.gaps import with_gap


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() <= 1e-6 * expected.norm()


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


if __name__ == "__main__":
    triton_products._processors = lambda device: 2  # rows are divided among several programs
    for shape in ((130, 96, 8, 8, 0), (64, 64, 32, 16, 32), (200, 160, 3, 40, 0), (5, 64, 64, 64, 64)):
        check_geglu_backward(*shape)
    for shape in ((130, 96, 8), (64, 320, 32), (7, 160, 40), (33, 64, 64)):
        check_geglu_with_products(*shape)
    for shape in ((130, 96, 8, 3, 0), (16, 256, 32, 1, 24), (7, 160, 40, 2, 8), (33, 64, 64, 1, 0)):
        for keeps in (False, True):
            check_append_products(*shape, keeps)
