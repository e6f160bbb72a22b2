"""Triton kernel for the gradients of a LoRA's two matrices, which are skinny products over the same rows.

The same inputs give the same bits: each number is summed up by one program, in a fixed order.
"""

import triton
import triton.language as tl

_COLUMNS, _ROWS = 64, 128
"""Tile: columns of the result that a program owns, and rows that it reads at a time."""
_WIDEST = 128
"""Columns of the skinny factor that a program can hold."""
_WARPS, _STAGES = 8, 3


@triton.jit
def _add_product(a, b, total, scale, rows, columns, narrow, stride_a, stride_b, step, step_of_b, first, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr):  # fmt: skip # noqa: E501
    """total[c, r] += scale * sum over rows of a[row, c] b[row, r], for C columns from `first` on."""
    column, r, k = first + tl.arange(0, C), tl.arange(0, R), tl.arange(0, K)
    # Within a tile 32 bits are enough for offsets; row numbers times the stride pass 2^31.
    offsets_a, offsets_b = k[:, None] * stride_a + column[None, :], k[:, None] * stride_b + r[None, :]
    sums = tl.zeros((C, R), tl.float32)
    for start in range(0, rows, K):
        here = (start + k < rows)[:, None]
        left = tl.load(a + offsets_a, mask=here & (column < columns)[None, :], other=0.0)
        right = tl.load(b + offsets_b, mask=here & (r < narrow)[None, :], other=0.0)
        sums = tl.dot(tl.trans(left), right, sums, input_precision="ieee")
        a += K * stride_a
        b += K * stride_b
    place = total + column[:, None] * step + r[None, :] * step_of_b
    inside = (column < columns)[:, None] & (r < narrow)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + scale * sums, mask=inside)


@triton.jit
def _lora_gradients(dy, h, x, g, up_grad, down_grad, scale, rows, out, width, rank, ranks, stride_dy, stride_h, stride_x, stride_g, tiles_of_layer, tiles_of_up, R: tl.constexpr, RANKS: tl.constexpr, C: tl.constexpr, K: tl.constexpr):  # fmt: skip # noqa: E501
    tile = tl.program_id(0)
    if tile < tiles_of_up:
        layer = tile // tiles_of_layer
        first = (tile % tiles_of_layer) * C
        up = up_grad + layer * out * rank
        _add_product(dy + layer * out, h + layer * rank, up, scale, rows, out, rank, stride_dy, stride_h, rank, 1, first, R, C, K)
    else:
        # The matrix is stored as [ranks, width].
        first = (tile - tiles_of_up) * C
        _add_product(x, g, down_grad, 1.0, rows, width, ranks, stride_x, stride_g, 1, width, first, RANKS, C, K)


def lora_gradients(dy, h, x, g, up_grad, down_grad, scale):
    """up_grad [n, out, rank] += scale * dy^T h for each of n layers, and down_grad [n * rank, width] += g^T x.

    `dy` [N, n * out], `h` and `g` [N, n * rank], `x` [N, width]; rows may have a stride. The gradients are fp32 and contiguous.
    Returns False, with nothing done, where the library's products are as fast.
    """
    n, out, rank = up_grad.shape
    rows, width = x.shape
    widest = triton.next_power_of_2(n * rank)
    tiles_of_layer = triton.cdiv(out, _COLUMNS)
    tiles = n * tiles_of_layer + triton.cdiv(width, _COLUMNS)
    if widest > _WIDEST:
        return False
    _lora_gradients[(tiles,)](
        dy, h, x, g, up_grad, down_grad, scale, rows, out, width, rank, n * rank,
        dy.stride(0), h.stride(0), x.stride(0), g.stride(0), tiles_of_layer, n * tiles_of_layer,
        max(16, triton.next_power_of_2(rank)), max(16, widest), _COLUMNS, _ROWS, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return True
