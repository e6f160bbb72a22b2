"""Triton kernels for group norms, forward and backward, with the time embedding before them and SiLU behind them.

As in `triton_kernels`: only gradients of inputs, fp32 arithmetic, images as rows [B, h * w, C], and no atomics.
"""

import torch
import triton
import triton.language as tl

from training.engine.fast.gaps import empty_with_gap
from training.engine.fast.triton_kernels import processors

_ROWS, _COLUMNS = 16, 128
"""Tile: rows (pixels) and channels."""
_SUMMED_ROWS, _SUMMED_COLUMNS, _PROGRAMS = 64, 64, 4
"""The same where a program sums up many tiles, and how many such programs there are for each multiprocessor."""
_PIECES, _GROUP = 16, 128
"""Tile of the sums of a group: chunks and channels. Groups of SDXL have 10 to 80 channels: with a width for each, a first run
would compile 20 kernels instead of 4, each for a sixth of a second."""


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


@triton.jit(do_not_specialize=["chunks"])
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


@triton.jit(do_not_specialize=["rows", "chunks"])
def _group_coefficients(sums, weight, bias, plus, scale, shift, mean, rstd, linear, constant, rows, channels, chunks, groups, stride_of_plus, eps, BACKWARD: tl.constexpr, PLUS: tl.constexpr, P: tl.constexpr, G: tl.constexpr):  # fmt: skip # noqa: E501
    """Per image and group: forward the scale and shift of each channel, backward dx = dz * scale + x * linear + constant."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = channels // groups
    channel = group * size + tl.arange(0, G)
    inside = tl.arange(0, G) < size
    first, second = tl.zeros((P, G), tl.float32), tl.zeros((P, G), tl.float32)
    for start in range(0, chunks, P):
        piece = start + tl.arange(0, P)
        here = (piece < chunks)[:, None] & inside[None, :]
        offset = (image * chunks + piece[:, None]) * 2 * channels + channel[None, :]
        first += tl.load(sums + offset, mask=here, other=0.0)
        second += tl.load(sums + offset + channels, mask=here, other=0.0)
    first, second = tl.sum(first, 0), tl.sum(second, 0)
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


def group_norm_forward(x, plus, weight, bias, groups, eps, silu, gap=0):
    """`x` [B, rows, C], `plus` [B, C], which may be part of wider rows, or None -> silu(group_norm(x + plus)) (without silu if
    requested), with a gap behind its rows, and what backward needs."""
    images, rows, channels = x.shape
    scale, shift, mean, rstd = _per_channel(x, 2, channels) + _per_channel(x, 2, groups)
    sums, chunks = _sums(x, x, scale, shift, backward=False, silu=False)
    g = max(_GROUP, triton.next_power_of_2(channels // groups))
    _group_coefficients[(images, groups)](
        sums, weight, bias, plus, scale, shift, mean, rstd, scale, shift, rows, channels, chunks, groups,
        0 if plus is None else plus.stride(0), eps, False, plus is not None, _PIECES, g,
    )  # fmt: skip
    out = empty_with_gap(x, channels, gap)
    _group_apply[_tiles(x)](
        x, x, x, scale, shift, scale, shift, out, rows, channels, channels + gap, False, silu, False, _ROWS, _COLUMNS
    )
    return out, (scale, shift, mean, rstd)


def group_norm_backward(x, plus, weight, groups, silu, kept, dy, d_x):
    """The gradient of `x` through the norm, plus `d_x` (or None)."""
    images, rows, channels = x.shape
    scale, shift, mean, rstd = kept
    sums, chunks = _sums(x, dy, scale, shift, backward=True, silu=silu)
    linear, constant = _per_channel(x, 2, channels)
    g = max(_GROUP, triton.next_power_of_2(channels // groups))
    _group_coefficients[(images, groups)](
        sums, weight, weight, plus, scale, shift, mean, rstd, linear, constant, rows, channels, chunks, groups,
        0 if plus is None else plus.stride(0), 0.0, True, plus is not None, _PIECES, g,
    )  # fmt: skip
    out = torch.empty_like(x)
    _group_apply[_tiles(x)](
        x, dy, d_x, scale, shift, linear, constant, out, rows, channels, channels, True, silu, d_x is not None, _ROWS,
        _COLUMNS,
    )  # fmt: skip
    return out


def _per_channel(x, how_many, width):
    return tuple(torch.empty(x.shape[0], width, dtype=torch.float32, device=x.device) for _ in range(how_many))


def _sums(x, dy, scale, shift, *, backward, silu):
    images, rows, channels = x.shape
    columns = triton.cdiv(channels, _SUMMED_COLUMNS)
    # A few programs for each multiprocessor read all that its memory gives it, and leave few sums to be added.
    pieces = max(1, _PROGRAMS * processors(x.device) // (images * columns))
    chunk = triton.cdiv(triton.cdiv(rows, pieces), _SUMMED_ROWS) * _SUMMED_ROWS
    chunks = triton.cdiv(rows, chunk)
    sums = torch.empty(images, chunks, 2, channels, dtype=torch.float32, device=x.device)
    _group_sums[(images, chunks, columns)](
        x, dy, scale, shift, sums, rows, channels, chunk, chunks, backward, silu, _SUMMED_ROWS, _SUMMED_COLUMNS
    )
    return sums, chunks


def _tiles(x):
    images, rows, channels = x.shape
    return images, triton.cdiv(rows, _ROWS), triton.cdiv(channels, _COLUMNS)
