"""Triton kernels for what a frozen UNet computes between its matrix products: layer norms, activations, residuals.

Only gradients of inputs are computed: the weights of norms are frozen. All arithmetic is fp32, all tensors are contiguous
in the dtype of the UNet; an image [B, C, h, w] is read as rows [B, h * w, C] (channels last). No atomics: the same inputs
give the same bits.
"""

import functools

import torch
import triton
import triton.language as tl

from training.engine.fast.gaps import empty_with_gap

_ROWS, _COLUMNS = 4, 1024
"""Tile of a weight in 8 bits."""
_SUM_ROWS, _SUM_COLUMNS, _ROWS_PER_SUM = 16, 128, 128
"""Tile of a matrix that is added to another or whose columns are summed up, and the rows of it that one program sums up before
the parts are added."""
_GEGLU = 512
"""Columns of a program of the GEGLU."""


@triton.jit
def _layer_norm_forward(y, x, weight, bias, total, normed, mean, rstd, width, stride, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    # One program per row, which fits into its registers as a whole: x is read once. Row numbers times width pass 2^31.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)  # a power of 2, which Triton requires; what is beyond the row is masked
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        # The residual is added here, where x is in registers anyway. The sum is rounded to the UNet's dtype before it is
        # normalised, as it is for everything that reads it from memory later.
        value += tl.load(y + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)
        tl.store(total + row * width + columns, value, mask=inside)
        value = value.to(tl.float32)
    # The variance from centred values: the difference of two large sums would lose its digits.
    average = tl.sum(value, 0) / width
    centred = tl.where(inside, value - average, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * stride + columns, centred * inverse * w + b, mask=inside)
    tl.store(mean + row, average)
    tl.store(rstd + row, inverse)


@triton.jit
def _layer_norm_backward(total, weight, mean, rstd, d_normed, d_total, dx, width, stride_of_d_total, stride, ADDS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):  # fmt: skip # noqa: E501
    # One warp per row, which needs no barriers. The width is seldom a power of 2, but SDXL's are the sum of two, 1280 = 1024 + 256:
    # `A` columns and then up to `B`, so that no register holds what is beyond the row.
    row = tl.program_id(0).to(tl.int64)
    first, second = tl.arange(0, A), A + tl.arange(0, B)
    inside = second < width
    total += row * width
    d_normed += row * width
    # With y = w hat + b and hat = (x - mean) rstd:  dx = rstd (w dy - mean(w dy) - hat mean(w dy hat)), means over the row.
    average, inverse = tl.load(mean + row), tl.load(rstd + row)
    hat_a = (tl.load(total + first).to(tl.float32) - average) * inverse
    hat_b = (tl.load(total + second, mask=inside, other=0.0).to(tl.float32) - average) * inverse
    wdy_a = tl.load(weight + first).to(tl.float32) * tl.load(d_normed + first).to(tl.float32)
    wdy_b = tl.load(weight + second, mask=inside, other=0.0).to(tl.float32)
    wdy_b *= tl.load(d_normed + second, mask=inside, other=0.0).to(tl.float32)
    of_dy = (tl.sum(wdy_a, 0) + tl.sum(wdy_b, 0)) / width
    of_dy_hat = (tl.sum(wdy_a * hat_a, 0) + tl.sum(wdy_b * hat_b, 0)) / width
    a, b = inverse * (wdy_a - of_dy - hat_a * of_dy_hat), inverse * (wdy_b - of_dy - hat_b * of_dy_hat)
    if ADDS:
        # `total` is also the residual stream: its own gradient is added without a kernel of its own.
        d_total += row * stride_of_d_total
        a += tl.load(d_total + first).to(tl.float32)
        b += tl.load(d_total + second, mask=inside, other=0.0).to(tl.float32)
    dx += row * stride
    tl.store(dx + first, a)
    tl.store(dx + second, b, mask=inside)


@triton.jit
def geglu_output(value, gate):
    # gelu(g) = g / 2 (1 + erf(g / sqrt 2)), the exact form.
    return value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))


@triton.jit
def _geglu_forward(projected, out, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    # A row of `projected` holds the values and then the gates.
    value = tl.load(projected + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(projected + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * stride + columns, geglu_output(value, gate), mask=inside)


@triton.jit
def geglu_gradients(value, gate, dy):
    """The output of a GEGLU, and the gradients of value and gate."""
    # gelu(g) = g Phi(g), so its slope is Phi(g) + g phi(g); 0.3989... is 1 / sqrt(2 pi), the peak of phi.
    share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return value * gate * share, dy * gate * share, dy * value * slope


@triton.jit
def _geglu_backward(projected, d_out, d_projected, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(projected + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(projected + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(d_out + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    _, d_value, d_gate = geglu_gradients(value, gate, dy)
    tl.store(d_projected + row * stride + columns, d_value, mask=inside)
    tl.store(d_projected + row * stride + width + columns, d_gate, mask=inside)


@triton.jit
def _add(x, y, bias, out, rows, width, stride, BIAS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    # Tiles, so that no element has to find its column by a division.
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < width
    here = (row < rows) & inside[None, :]
    offset = row * width + column[None, :]
    total = tl.load(x + offset, mask=here, other=0.0).to(tl.float32) + tl.load(y + offset, mask=here, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row * stride + column[None, :], total, mask=here)


@triton.jit
def _upsample(x, out, rows, width, channels, BACKWARD: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """R pixels of a small image [rows / width, width], each of which is four of `out`; backward their sum."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    here = (row < rows)[:, None] & (column < channels)[None, :]
    small = x + row[:, None] * channels + column[None, :]
    # Rows of pixels are twice as wide and twice as many in the large image.
    large = out + (row // width * 4 * width + row % width * 2)[:, None] * channels + column[None, :]
    below = large + 2 * width * channels
    if BACKWARD:
        total = tl.load(large, mask=here, other=0.0).to(tl.float32) + tl.load(large + channels, mask=here, other=0.0).to(tl.float32)
        total += tl.load(below, mask=here, other=0.0).to(tl.float32)
        tl.store(small, total + tl.load(below + channels, mask=here, other=0.0).to(tl.float32), mask=here)
    else:
        value = tl.load(small, mask=here, other=0.0)
        tl.store(large, value, mask=here)
        tl.store(large + channels, value, mask=here)
        tl.store(below, value, mask=here)
        tl.store(below + channels, value, mask=here)


@triton.jit
def _scale_columns(y, multipliers, bias, rows, width, BIAS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < width
    here = (row < rows) & inside[None, :]
    offset = row * width + column[None, :]
    factor = tl.load(multipliers + column, mask=inside, other=0.0)[None, :]
    value = tl.load(y + offset, mask=here, other=0.0).to(tl.float32) * factor
    if BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offset, value, mask=here)


@triton.jit
def _scale_columns_backward(dy, y, multipliers, bias, dx, sums, rows, width, stride_of_dy, stride, chunk: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip # noqa: E501
    """Per chunk of rows: dx = dy times the multipliers, and for each column the sum of dy (y - bias)."""
    piece = tl.program_id(0)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < width
    factor = tl.load(multipliers + column, mask=inside, other=0.0)[None, :]
    total = tl.zeros((C,), tl.float32)
    constant = tl.zeros((C,), tl.float32)
    if BIAS:
        constant = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, chunk, R):
        row = (piece * chunk + start + tl.arange(0, R)).to(tl.int64)
        here = (row < rows)[:, None] & inside[None, :]
        gradient = tl.load(dy + row[:, None] * stride_of_dy + column[None, :], mask=here, other=0.0).to(tl.float32)
        value = tl.load(y + row[:, None] * width + column[None, :], mask=here, other=0.0).to(tl.float32)
        total += tl.sum(gradient * (value - constant[None, :]), 0)
        tl.store(dx + row[:, None] * stride + column[None, :], gradient * factor, mask=here)
    tl.store(sums + piece.to(tl.int64) * width + column, total, mask=inside)


@triton.jit
def _copy_blocks(flat, table, scale, ELEMENT: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """One tile of a matrix per program; `table` has its place in `flat`, the matrix's address, rows, columns and stride, and the
    tile's first row and column."""
    entry = table + tl.program_id(0).to(tl.int64) * 7
    start, address, rows, columns = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    row = tl.load(entry + 5) + tl.arange(0, R)[:, None]
    column = tl.load(entry + 6) + tl.arange(0, C)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(flat + start + row * columns + column, mask=inside, other=0.0) * scale
    tl.store(address.to(tl.pointer_type(ELEMENT)) + row * tl.load(entry + 4) + column, value.to(ELEMENT), mask=inside)


@triton.jit(do_not_specialize=["pieces"])
def _add_up(parts, out, count, width, stride, pieces, BLOCK: tl.constexpr):
    """The sum of `pieces` matrices of `count` elements, `width` in a row, into the rows of `out`."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, pieces):
        total += tl.load(parts + offset, mask=inside, other=0.0)
        parts += count
    tl.store(out + (offset // width).to(tl.int64) * stride + offset % width, total, mask=inside)


@triton.jit
def _dequantize(codes, scales, out, rows, width, R: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    inside = (row < rows) & (column < width)
    scale = tl.load(scales + row, mask=row < rows, other=0.0).to(tl.float32)
    code = tl.load(codes + row * width + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * width + column, code * scale, mask=inside)


def layer_norm_forward(y, x, weight, bias, eps, gap=0):
    """`x` [..., D], `y` alike or None -> total = x + y (x itself without y), its layer norm, mean and 1 / std of each row. Behind
    the rows of the norm is a gap."""
    width = x.shape[-1]
    x, y = x.contiguous(), y if y is None else y.contiguous()
    normed, total = empty_with_gap(x, width, gap), x if y is None else torch.empty_like(x)
    mean, rstd = (torch.empty(x.numel() // width, dtype=torch.float32, device=x.device) for _ in range(2))
    grid, block, adds = (mean.numel(),), triton.next_power_of_2(width), y is not None
    _layer_norm_forward[grid](y, x, weight, bias, total, normed, mean, rstd, width, width + gap, eps, adds, block, num_warps=4)
    return total, normed, mean, rstd


def layer_norm_backward(total, weight, mean, rstd, d_normed, d_total, gap=0):
    """The gradient of total, with a gap behind its rows: through the norm, plus `d_total` (or None), which may have one too."""
    width, dx = total.shape[-1], empty_with_gap(total, total.shape[-1], gap)
    adds, first = d_total is not None, triton.next_power_of_2(width) // 2
    rows = d_total.reshape(-1, width) if adds else d_normed.reshape(-1, width)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    _layer_norm_backward[(mean.numel(),)](
        total, weight, mean, rstd, d_normed, rows, dx, width, rows.stride(0), width + gap, adds, first,
        triton.next_power_of_2(width - first), num_warps=1,
    )  # fmt: skip
    return dx


def geglu_forward(projected, gap=0):
    """`projected` [N, 2 D] -> first half * gelu(second half) [N, D], with a gap behind its rows."""
    rows, width = projected.shape[0], projected.shape[1] // 2
    out = empty_with_gap(projected, width, gap)
    _geglu_forward[(rows, triton.cdiv(width, _GEGLU))](projected, out, width, width + gap, _GEGLU, num_warps=2)
    return out


def geglu_backward(projected, d_out, gap=0):
    """The gradient of `projected`, with a gap behind its rows."""
    rows, width = d_out.shape
    d_projected = empty_with_gap(projected, 2 * width, gap)
    grid = rows, triton.cdiv(width, _GEGLU)
    _geglu_backward[grid](projected, d_out, d_projected, width, 2 * width + gap, _GEGLU, num_warps=2)
    return d_projected


def block_copier(flat, targets, scale):
    """A function that copies parts of `flat`, times `scale`, to matrices by one kernel; see `ops.copier`."""
    rank = min(min(target.shape) for _, target in targets)
    narrow = triton.next_power_of_2(rank)
    is_tall = targets[0][1].shape[1] == rank
    tile = (128, narrow) if is_tall else (narrow, 128)
    entries = []
    for start, target in targets:
        rows, columns = target.shape
        for row in range(0, rows, tile[0]):
            for column in range(0, columns, tile[1]):
                entries.append((start, target.data_ptr(), rows, columns, target.stride(0), row, column))
    table = torch.tensor(entries, dtype=torch.int64, device=flat.device)
    element = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[targets[0][1].dtype]

    def copy():
        _copy_blocks[(len(entries),)](flat, table, scale, element, *tile)

    return copy


def dequantize(codes, scales):
    """`codes` [rows, ...] int8, dense and with rows outermost in memory, times `scales` [rows, 1, ...] -> the same layout in the
    dtype of `scales`."""
    out, rows = torch.empty_like(codes, dtype=scales.dtype), codes.shape[0]
    width = codes.numel() // rows
    _dequantize[(triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))](codes, scales, out, rows, width, _ROWS, _COLUMNS)
    return out


def add(x, y, bias=None, gap=0):
    """`x` + `y`, contiguous and [..., D] both, plus `bias` [D] or None; with a gap behind the rows of the sum."""
    width = x.shape[-1]
    rows, out = x.numel() // width, empty_with_gap(x, width, gap)
    _add[_sum_tiles(x)](x, y, bias, out, rows, width, width + gap, bias is not None, _SUM_ROWS, _SUM_COLUMNS)
    return out


def add_up(parts, out):
    """The sum of `parts` [n, rows, width], fp32, into `out` [rows, width], which may be part of wider rows."""
    rows, width = out.shape
    _add_up[(triton.cdiv(rows * width, 1024),)](parts, out, rows * width, width, out.stride(0), len(parts), 1024)


def upsample(x):
    """[B, h, w, C] -> [B, 2 h, 2 w, C]: each pixel four times."""
    images, height, width, channels = x.shape
    out = x.new_empty(images, 2 * height, 2 * width, channels)
    _upsample[_sum_tiles(x)](x, out, x.numel() // channels, width, channels, False, _SUM_ROWS, _SUM_COLUMNS)
    return out


def upsample_backward(d_out):
    """The reverse: the sum of each four pixels."""
    images, height, width, channels = d_out.shape
    dx = d_out.new_empty(images, height // 2, width // 2, channels)
    _upsample[_sum_tiles(dx)](dx, d_out, dx.numel() // channels, width // 2, channels, True, _SUM_ROWS, _SUM_COLUMNS)
    return dx


def scale_columns(y, g, bias):
    """`y` [N, D] times `g` [D], plus `bias` [D] or None, in place."""
    rows, width = y.shape
    _scale_columns[_sum_tiles(y)](y, g, g if bias is None else bias, rows, width, bias is not None, _SUM_ROWS, _SUM_COLUMNS)


def scale_columns_backward(dy, y, g, bias, gap):
    """The gradient of what was scaled to `y`, with a gap behind its rows, and [D] fp32: the sums of dy (y - bias)."""
    rows, width = y.shape
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    dx, chunks = empty_with_gap(y, width, gap), triton.cdiv(rows, _ROWS_PER_SUM)
    sums = torch.empty(chunks, width, dtype=torch.float32, device=y.device)
    _scale_columns_backward[(chunks, triton.cdiv(width, _SUM_COLUMNS))](
        dy, y, g, g if bias is None else bias, dx, sums, rows, width, dy.stride(0), width + gap, _ROWS_PER_SUM, bias is not None,
        _SUM_ROWS, _SUM_COLUMNS,
    )  # fmt: skip
    return dx, sums.sum(0)


def _sum_tiles(x):
    return triton.cdiv(x.numel() // x.shape[-1], _SUM_ROWS), triton.cdiv(x.shape[-1], _SUM_COLUMNS)


@functools.cache
def processors(device):
    """How many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
