"""Triton kernels for what a frozen UNet computes between its matrix products: norms, activations, residuals.

Only gradients of inputs are computed: the weights of norms are frozen. All arithmetic is fp32, all tensors are contiguous
in the dtype of the UNet; an image [B, C, h, w] is read as rows [B, h * w, C] (channels last). No atomics: the same inputs
give the same bits.
"""

import functools

import torch
import triton
import triton.language as tl

from training.engine.fast.gaps import empty_with_gap

_GROUP_ROWS, _GROUP_COLUMNS = 16, 128
"""Tile of the group norms: rows (pixels) and channels."""
_SUMMED_ROWS, _SUMMED_COLUMNS, _PROGRAMS = 64, 64, 4
"""The same where a program sums up many tiles, and how many such programs there are for each multiprocessor."""
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
def _silu_slope(z):
    # d/dz z sigmoid(z)
    sigmoid = tl.sigmoid(z)
    return sigmoid * (1.0 + z * (1.0 - sigmoid))


# A group norm is three kernels. A group is h * w pixels of a few channels, far more than one program can hold, so
# (1) `_group_sums` sums each channel over chunks of rows, (2) `_group_coefficients` turns the sums into a scale and a shift
# per channel, and (3) `_group_apply` applies them. Chunks are written to memory and added up in a fixed order in (2): atomics
# would be shorter and would give other bits each time. `plus` [B, C] is the time embedding, added to x before the norm: its
# effect on the sums is computed in (2), so that x + plus never exists in memory.


@triton.jit
def _group_sums(x, dy, scale, shift, sums, rows, channels, chunk, chunks, BACKWARD: tl.constexpr, SILU: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip # noqa: E501
    """Per image, chunk of rows and channel: sum of x and x^2; backward: sum of dz and dz * x, z = scale * x + shift."""
    image, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.program_id(2) * C + tl.arange(0, C)
    inside = columns < channels
    # Each element of the tile has sums of its own: adding up its rows takes barriers, here once.
    first, second = tl.zeros((R, C), tl.float32), tl.zeros((R, C), tl.float32)
    if BACKWARD:
        # SiLU's slope needs z, which is computed again from x: cheaper than to keep it.
        a = tl.load(scale + image * channels + columns, mask=inside, other=0.0)
        b = tl.load(shift + image * channels + columns, mask=inside, other=0.0)
    for start in range(0, chunk, R):
        row = piece * chunk + start + tl.arange(0, R)
        here = (row < rows)[:, None] & inside[None, :]
        offset = image * rows * channels + row[:, None].to(tl.int64) * channels + columns[None, :]
        value = tl.load(x + offset, mask=here, other=0.0).to(tl.float32)
        if BACKWARD:
            dz = tl.load(dy + offset, mask=here, other=0.0).to(tl.float32)
            if SILU:
                dz *= _silu_slope(value * a[None, :] + b[None, :])
            first += dz
            second += dz * value
        else:
            first += value
            second += value * value
    offset = ((image * chunks + piece) * 2) * channels + columns
    tl.store(sums + offset, tl.sum(first, 0), mask=inside)
    tl.store(sums + offset + channels, tl.sum(second, 0), mask=inside)


@triton.jit
def _group_coefficients(sums, weight, bias, plus, scale, shift, mean, rstd, linear, constant, rows, channels, chunks, groups, stride_of_plus, eps, BACKWARD: tl.constexpr, PLUS: tl.constexpr, P: tl.constexpr, G: tl.constexpr):  # fmt: skip # noqa: E501
    """Per image and group: forward the scale and shift of each channel, backward dx = dz * scale + x * linear + constant."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = channels // groups
    channel = group * size + tl.arange(0, G)
    inside = tl.arange(0, G) < size
    piece = tl.arange(0, P)
    here = (piece < chunks)[:, None] & inside[None, :]
    offset = (image * chunks + piece[:, None]) * 2 * channels + channel[None, :]
    first = tl.sum(tl.load(sums + offset, mask=here, other=0.0), 0)
    second = tl.sum(tl.load(sums + offset + channels, mask=here, other=0.0), 0)
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    p = tl.zeros((G,), tl.float32)
    if PLUS:
        p = tl.load(plus + image * stride_of_plus + channel, mask=inside, other=0.0).to(tl.float32)
    count = rows * size  # values in the group
    if BACKWARD:
        # hat = (x + p - mean) rstd, z = w hat + b. `first` and `second` are the sums of dz and dz x over the rows, so that
        # sum(dz hat) = rstd (second + (p - mean) first). From dx = rstd (w dz - mean(w dz) - hat mean(w dz hat)) follow the
        # coefficients of dx = dz scale + x linear + constant, with scale = w rstd from the forward.
        average, inverse = tl.load(mean + image * groups + group), tl.load(rstd + image * groups + group)
        of_dz = tl.sum(w * first, 0) / count
        of_dz_hat = tl.sum(w * inverse * (second + (p - average) * first), 0) / count
        k = -inverse * inverse * of_dz_hat
        tl.store(linear + image * channels + channel, k + tl.zeros((G,), tl.float32), mask=inside)
        tl.store(constant + image * channels + channel, (p - average) * k - inverse * of_dz, mask=inside)
    else:
        # `first` and `second` are the sums of x and x^2 over the rows. The variance is that of x + p about the mean:
        # sum((x + off)^2) = sum(x^2) + 2 off sum(x) + rows off^2 with off = p - mean. One pass over x; digits are lost where
        # the mean is far larger than the deviation, which a UNet's activations do not show.
        average = tl.sum(first + rows * p, 0) / count
        off = tl.where(inside, p - average, 0.0)
        # Rounding can make the variance of a constant group slightly negative.
        variance = tl.sum(second + 2.0 * off * first + rows * off * off, 0) / count
        inverse = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
        b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(mean + image * groups + group, average)
        tl.store(rstd + image * groups + group, inverse)
        tl.store(scale + image * channels + channel, w * inverse, mask=inside)
        tl.store(shift + image * channels + channel, off * w * inverse + b, mask=inside)


@triton.jit
def _group_apply(x, dy, d_x, scale, shift, linear, constant, out, rows, channels, stride, BACKWARD: tl.constexpr, SILU: tl.constexpr, ADDS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip # noqa: E501
    """Forward silu(scale * x + shift); backward dz * scale + x * linear + constant, plus d_x."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * R + tl.arange(0, R)
    columns = tl.program_id(2) * C + tl.arange(0, C)
    inside = columns < channels
    here = (row < rows)[:, None] & inside[None, :]
    offset = image * rows * channels + row[:, None].to(tl.int64) * channels + columns[None, :]
    of_channel = image * channels + columns
    # z = x scale + shift holds the norm, its weights and `plus` in one multiplication and one addition per value.
    value = tl.load(x + offset, mask=here, other=0.0).to(tl.float32)
    a = tl.load(scale + of_channel, mask=inside, other=0.0)[None, :]
    z = value * a + tl.load(shift + of_channel, mask=inside, other=0.0)[None, :]
    if BACKWARD:
        dz = tl.load(dy + offset, mask=here, other=0.0).to(tl.float32)
        if SILU:
            dz *= _silu_slope(z)
        k = tl.load(linear + of_channel, mask=inside, other=0.0)[None, :]
        result = dz * a + value * k + tl.load(constant + of_channel, mask=inside, other=0.0)[None, :]
        if ADDS:
            result += tl.load(d_x + offset, mask=here, other=0.0).to(tl.float32)
    else:
        result = z * tl.sigmoid(z) if SILU else z
    tl.store(out + (image * rows + row[:, None]) * stride + columns[None, :], result, mask=here)


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


def group_norm_forward(x, plus, weight, bias, groups, eps, silu, gap=0):
    """`x` [B, rows, C], `plus` [B, C], which may be part of wider rows, or None -> silu(group_norm(x + plus)) (without silu if
    requested), with a gap behind its rows, and what backward needs."""
    images, rows, channels = x.shape
    scale, shift, mean, rstd = _per_channel(x, 2, channels) + _per_channel(x, 2, groups)
    sums, chunks = _sums(x, x, scale, shift, backward=False, silu=silu)
    p, g = triton.next_power_of_2(chunks), triton.next_power_of_2(channels // groups)
    _group_coefficients[(images, groups)](
        sums, weight, bias, plus, scale, shift, mean, rstd, scale, shift, rows, channels, chunks, groups,
        0 if plus is None else plus.stride(0), eps, False, plus is not None, p, g,
    )  # fmt: skip
    out = empty_with_gap(x, channels, gap)
    _group_apply[_tiles(x)](
        x, x, x, scale, shift, scale, shift, out, rows, channels, channels + gap, False, silu, False, _GROUP_ROWS, _GROUP_COLUMNS
    )
    return out, (scale, shift, mean, rstd)


def group_norm_backward(x, plus, weight, groups, silu, kept, dy, d_x):
    """The gradient of `x` through the norm, plus `d_x` (or None)."""
    images, rows, channels = x.shape
    scale, shift, mean, rstd = kept
    sums, chunks = _sums(x, dy, scale, shift, backward=True, silu=silu)
    linear, constant = _per_channel(x, 2, channels)
    p, g = triton.next_power_of_2(chunks), triton.next_power_of_2(channels // groups)
    _group_coefficients[(images, groups)](
        sums, weight, weight, plus, scale, shift, mean, rstd, linear, constant, rows, channels, chunks, groups,
        0 if plus is None else plus.stride(0), 0.0, True, plus is not None, p, g,
    )  # fmt: skip
    out = torch.empty_like(x)
    _group_apply[_tiles(x)](
        x, dy, d_x, scale, shift, linear, constant, out, rows, channels, channels, True, silu, d_x is not None, _GROUP_ROWS,
        _GROUP_COLUMNS,
    )  # fmt: skip
    return out


def add(x, y, bias=None, gap=0):
    """`x` + `y`, contiguous and [..., D] both, plus `bias` [D] or None; with a gap behind the rows of the sum."""
    width = x.shape[-1]
    rows, out = x.numel() // width, empty_with_gap(x, width, gap)
    _add[_sum_tiles(x)](x, y, bias, out, rows, width, width + gap, bias is not None, _SUM_ROWS, _SUM_COLUMNS)
    return out


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


def _per_channel(x, how_many, width):
    return tuple(torch.empty(x.shape[0], width, dtype=torch.float32, device=x.device) for _ in range(how_many))


def _sums(x, dy, scale, shift, *, backward, silu):
    images, rows, channels = x.shape
    columns = triton.cdiv(channels, _SUMMED_COLUMNS)
    # A few programs for each multiprocessor read all that its memory gives it, and leave few sums to be added.
    pieces = max(1, _PROGRAMS * _processors(x.device) // (images * columns))
    chunk = triton.cdiv(triton.cdiv(rows, pieces), _SUMMED_ROWS) * _SUMMED_ROWS
    chunks = triton.cdiv(rows, chunk)
    sums = torch.empty(images, chunks, 2, channels, dtype=torch.float32, device=x.device)
    _group_sums[(images, chunks, columns)](
        x, dy, scale, shift, sums, rows, channels, chunk, chunks, backward, silu, _SUMMED_ROWS, _SUMMED_COLUMNS
    )
    return sums, chunks


def _tiles(x):
    images, rows, channels = x.shape
    return images, triton.cdiv(rows, _GROUP_ROWS), triton.cdiv(channels, _GROUP_COLUMNS)


@functools.cache
def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
