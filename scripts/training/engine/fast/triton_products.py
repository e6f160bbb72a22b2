"""Triton kernels that compute a LoRA's skinny products of what they read or write anyway, which saves reading it again.

Tensors are in a 16-bit dtype; products are summed up in fp32. No atomics: each sum is added up by one program, in a fixed order, so
that the same inputs give the same bits.
"""

import functools

import torch
import triton
import triton.language as tl

from training.engine.fast.gaps import empty_with_gap, with_gap
from training.engine.fast.triton_kernels import add_up, geglu_gradients, geglu_output, processors

_ROWS, _COLUMNS = 16, 64
"""Tile of `_geglu_backward_with_lora`: rows that a program reads at a time, and columns that it owns."""
_PROGRAMS = 4
"""Of `_geglu_backward_with_lora` for each multiprocessor, which holds about so many: rows are divided among them."""
_WARPS, _STAGES = {16: 4, 32: 4, 64: 8}, 3
"""Of a program, by the columns of its wider skinny factor."""
_APPEND_ROWS, _APPEND_COLUMNS, _APPEND_STAGES = {"ampere": 64, "turing": 16}, {"ampere": 64, "turing": 32}, 4
"""Tile of `_append_products`, by the first generation of cards that has the registers for it: rows of a program, and columns that
it reads at a time. With 16 rows, it took up to 2.3 times as long on an H200."""
_GEGLU_ROWS, _GEGLU_COLUMNS, _GEGLU_STAGES = {"ampere": 64, "turing": 32}, 32, 3
"""The same for `_geglu_forward_with_products`."""


@triton.jit
def _geglu_backward_with_lora(projected, d_out, h, g, d_projected, parts, width, stride, stride_of_h, stride_of_g, rows, chunk, rank_in, rank_out, R_IN: tl.constexpr, R_OUT: tl.constexpr, K: tl.constexpr, C: tl.constexpr):  # fmt: skip # noqa: E501
    """One program per C columns and chunk of rows. Its parts of d_projected^T h [2 * width, rank_in] and of g^T out
    [rank_out, width] are added up over its rows, K at a time."""
    piece = tl.program_id(1)
    first = piece.to(tl.int64) * chunk
    row, column = tl.arange(0, K), tl.program_id(0) * C + tl.arange(0, C)
    r_in, r_out = tl.arange(0, R_IN), tl.arange(0, R_OUT)
    inside = (column < width)[None, :]
    # Row numbers times width pass 2^31, but not within a tile: pointers to its first row move on.
    projected += first * 2 * width
    d_out += first * width
    d_projected += first * stride
    h += first * stride_of_h
    g += first * stride_of_g
    of_values, of_gates = tl.zeros((C, R_IN), tl.float32), tl.zeros((C, R_IN), tl.float32)
    of_outputs = tl.zeros((C, R_OUT), tl.float32)
    left = (rows - first).to(tl.int32)
    for start in range(0, chunk, K):
        exists = (row + start < left)[:, None]
        here = exists & inside
        place = row[:, None] * 2 * width + column[None, :]
        value = tl.load(projected + place, mask=here, other=0.0).to(tl.float32)
        gate = tl.load(projected + place + width, mask=here, other=0.0).to(tl.float32)
        dy = tl.load(d_out + row[:, None] * width + column[None, :], mask=here, other=0.0).to(tl.float32)
        out, d_value, d_gate = geglu_gradients(value, gate, dy)
        # What later kernels would read is what counts here as well: the rounded numbers.
        dtype = d_projected.dtype.element_ty
        out, d_value, d_gate = out.to(dtype), d_value.to(dtype), d_gate.to(dtype)
        place = row[:, None] * stride + column[None, :]
        tl.store(d_projected + place, d_value, mask=here)
        tl.store(d_projected + place + width, d_gate, mask=here)
        factor = tl.load(h + row[:, None] * stride_of_h + r_in[None, :], mask=exists & (r_in < rank_in)[None, :], other=0.0)
        of_values = tl.dot(tl.trans(d_value), factor, of_values)
        of_gates = tl.dot(tl.trans(d_gate), factor, of_gates)
        factor = tl.load(g + row[:, None] * stride_of_g + r_out[None, :], mask=exists & (r_out < rank_out)[None, :], other=0.0)
        of_outputs = tl.dot(tl.trans(out), factor, of_outputs)
        projected += K * 2 * width
        d_out += K * width
        d_projected += K * stride
        h += K * stride_of_h
        g += K * stride_of_g
    count = 2 * width * rank_in
    parts += piece.to(tl.int64) * (count + width * rank_out)
    inside = (column < width)[:, None]
    place, held = column[:, None] * rank_in + r_in[None, :], inside & (r_in < rank_in)[None, :]
    tl.store(parts + place, of_values, mask=held)
    tl.store(parts + place + width * rank_in, of_gates, mask=held)
    place, held = column[:, None] + r_out[None, :] * width, inside & (r_out < rank_out)[None, :]
    tl.store(parts + count + place, of_outputs, mask=held)


@triton.jit
def _add_parts(parts, first, second, scale, count, count_of_second, pieces, BLOCK: tl.constexpr):
    """first += scale * the sum of its parts, second += the sum of its own, which lie behind them in each piece."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_first, inside = offset < count, offset < count + count_of_second
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, pieces):
        total += tl.load(parts + offset, mask=inside, other=0.0)
        parts += count + count_of_second
    is_second = inside & (offset >= count)
    tl.store(first + offset, tl.load(first + offset, mask=is_first, other=0.0) + scale * total, mask=is_first)
    place = second + offset - count
    tl.store(place, tl.load(place, mask=is_second, other=0.0) + total, mask=is_second)


@triton.jit
def _geglu_forward_with_products(projected, factor, out, parts, rows, width, rank, stride, row_of_factor, chunk, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr):  # fmt: skip # noqa: E501
    """One program per K rows and chunk of columns; its part of the products is added up over its columns, C at a time."""
    piece = tl.program_id(1)
    first = piece * chunk
    row, column, r = tl.program_id(0) * K + tl.arange(0, K), first + tl.arange(0, C), tl.arange(0, R)
    exists, is_rank = (row < rows)[:, None], (r < rank)[None, :]
    row = row[:, None].to(tl.int64)
    source, target = projected + row * 2 * width + column[None, :], out + row * stride + column[None, :]
    factor += column[:, None] + r[None, :] * row_of_factor
    sums = tl.zeros((K, R), tl.float32)
    for start in range(0, chunk, C):
        inside = start + column < width
        here = exists & inside[None, :]
        value = tl.load(source, mask=here, other=0.0).to(tl.float32)
        gate = tl.load(source + width, mask=here, other=0.0).to(tl.float32)
        result = geglu_output(value, gate).to(out.dtype.element_ty)
        tl.store(target, result, mask=here)
        sums = tl.dot(result, tl.load(factor, mask=inside[:, None] & is_rank, other=0.0), sums)
        source += C
        target += C
        factor += C
    tl.store(parts + (piece.to(tl.int64) * rows + row) * rank + r[None, :], sums, mask=exists & is_rank)


@triton.jit
def _append_products(first, second, third, factors, out, kept, rows, width, rank, stride, stride_of_out, stride_of_kept, part_of_factors, row_of_factors, column_of_factors, KEEPS: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr):  # fmt: skip # noqa: E501
    """One program per K rows of a part: copied to its place in `out`, and times its own factor behind all parts."""
    part, parts = tl.program_id(1), tl.num_programs(1)
    source = first
    if part == 1:
        source = second
    if part == 2:
        source = third
    row, column, r = tl.program_id(0) * K + tl.arange(0, K), tl.arange(0, C), tl.arange(0, R)
    exists, is_rank = (row < rows)[:, None], (r < rank)[None, :]
    row = row[:, None].to(tl.int64)
    source += row * stride + column[None, :]
    target = out + row * stride_of_out + part * width + column[None, :]
    factor = factors + part * part_of_factors + column[:, None] * row_of_factors + r[None, :] * column_of_factors
    sums = tl.zeros((K, R), tl.float32)
    for start in range(0, width, C):
        inside = start + column < width
        value = tl.load(source, mask=exists & inside[None, :], other=0.0)
        tl.store(target, value, mask=exists & inside[None, :])
        sums = tl.dot(value, tl.load(factor, mask=inside[:, None] & is_rank, other=0.0), sums)
        source += C
        target += C
        factor += C * row_of_factors
    result = sums.to(out.dtype.element_ty)
    tl.store(out + row * stride_of_out + parts * width + part * rank + r[None, :], result, mask=exists & is_rank)
    if KEEPS:
        tl.store(kept + row * stride_of_kept + part * rank + r[None, :], result, mask=exists & is_rank)


def supports(dtype, *ranks):
    """Whether the kernels below take that dtype and these numbers of columns of a skinny factor."""
    return dtype.itemsize == 2 and max(ranks) <= max(_WARPS)


def geglu_backward_with_lora(projected, d_out, h, g, up_grad, down_grad, scale, gap):
    """The gradient of `projected` [N, 2 D], with a gap behind its rows, and the LoRA gradients of what lies around a GEGLU whose
    output has the gradient `d_out` [N, D]: up_grad [2 D, r] += scale * d_projected^T h, and down_grad [s, D] += g^T output.

    `h` [N, r] and `g` [N, s] may be parts of wider rows. The gradients are fp32 and contiguous.
    """
    rows, width = d_out.shape
    r_in, r_out = h.shape[1], g.shape[1]
    d_projected = empty_with_gap(projected, 2 * width, gap)
    columns = triton.cdiv(width, _COLUMNS)
    pieces, chunk = _in_pieces(rows, _ROWS, _PROGRAMS * processors(projected.device) // columns)
    parts = torch.empty(pieces, up_grad.numel() + down_grad.numel(), dtype=torch.float32, device=projected.device)
    padded = _padded(r_in), _padded(r_out)
    _geglu_backward_with_lora[(columns, pieces)](
        projected, d_out, h, g, d_projected, parts, width, 2 * width + gap, h.stride(0), g.stride(0), rows, chunk, r_in, r_out,
        *padded, _ROWS, _COLUMNS, num_warps=_WARPS[max(padded)], num_stages=_STAGES,
    )  # fmt: skip
    _add_parts[(triton.cdiv(parts.shape[1], 1024),)](
        parts, up_grad, down_grad, scale, up_grad.numel(), down_grad.numel(), pieces, 1024
    )
    return d_projected


def geglu_forward_with_products(projected, factor):
    """`projected` [N, 2 D], `factor` [r, D] -> geglu(projected) [N, D], with its products with rows of `factor` in a gap."""
    rows, width, rank = len(projected), projected.shape[1] // 2, len(factor)
    out = empty_with_gap(projected, width, rank)
    tile_rows = _GEGLU_ROWS[_generation(projected.device)]
    # Few rows are not enough programs: columns are divided among them as well.
    blocks = triton.cdiv(rows, tile_rows)
    pieces, chunk = _in_pieces(width, _GEGLU_COLUMNS, _PROGRAMS * processors(projected.device) // blocks)
    parts = torch.empty(pieces, rows, rank, dtype=torch.float32, device=projected.device)
    _geglu_forward_with_products[(blocks, pieces)](
        projected, factor, out, parts, rows, width, rank, width + rank, factor.stride(0), chunk,
        _padded(rank), tile_rows, _GEGLU_COLUMNS, num_warps=4, num_stages=_GEGLU_STAGES,
    )  # fmt: skip
    gap = with_gap(out, width + rank)[:, width:]
    add_up(parts, gap)
    return out


def append_products(parts, factors, keeps):
    """1 to 3 `parts` [N, w] side by side, with a gap behind them that holds each part times its factor ([n, w, r], any strides);
    and the products [N, n * r] once more where a caller `keeps` them without the rows, else None."""
    n, width, rank = factors.shape
    if any(part.stride() != (parts[0].stride(0), 1) for part in parts):
        parts = [part.contiguous() for part in parts]
    rows, first, last = len(parts[0]), parts[0], parts[-1]
    generation = _generation(first.device)
    tile_rows, tile_columns = _APPEND_ROWS[generation], _APPEND_COLUMNS[generation]
    out = empty_with_gap(first, n * width, n * rank)
    kept = first.new_empty(rows, n * rank) if keeps else None
    _append_products[(triton.cdiv(rows, tile_rows), n)](
        first, parts[n // 2], last, factors, out, kept, rows, width, rank, first.stride(0), out.stride(0), n * rank,
        *factors.stride(), keeps, _padded(rank), tile_rows, tile_columns, num_warps=4, num_stages=_APPEND_STAGES,
    )  # fmt: skip
    return out, kept


def _in_pieces(count, tile, pieces):
    """`count` in about so many pieces of whole tiles: their number, and how many are in each but the last."""
    chunk = triton.cdiv(triton.cdiv(count, max(1, pieces)), tile) * tile
    return triton.cdiv(count, chunk), chunk


def _padded(rank):
    return max(16, triton.next_power_of_2(rank))  # the least that a product of tiles takes


@functools.cache
def _generation(device):
    return "turing" if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0) else "ampere"
