"""The Triton kernel that adds up the gradients of LoRAs, for several layers at once.

Tensors are in a 16-bit dtype; products are summed up in fp32. No atomics: each sum is added up by one program, in a fixed order, so
that the same inputs give the same bits.
"""

import triton
import triton.language as tl

_COLUMNS, _ROWS, _WARPS, _STAGES = 128, 64, 4, 4
"""Columns that a program owns, rows that it reads at a time, its warps, and the tiles that it loads in advance."""


@triton.jit
def _add_gradients(jobs, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """One program per C columns of a matrix [rows, width] and per part of a skinny one [rows, n * rank]: the product of their
    transposes, added to a gradient. Jobs are in turn for an `up` [n, width, rank], where each part of the skinny matrix has its own
    columns of the wide one, n * width in all, and for a `down` [n * rank, width], where all parts have the same."""
    tile = tl.program_id(0)
    wide, skinny, total, rows, width, ranks, rank, stride, stride_of_skinny, scale = jobs[0]
    mine, is_up = tile, 1
    first = tl.cdiv(width, C) * (ranks // rank)
    # One loop for the tiles of all jobs: the arguments of the one that this tile is of are selected.
    for number in tl.static_range(1, len(jobs)):
        wide_, skinny_, total_, rows_, width_, ranks_, rank_, stride_, stride_of_skinny_, scale_ = jobs[number]
        tiles = tl.cdiv(width_, C) * (ranks_ // rank_)
        here = (tile >= first) & (tile < first + tiles)
        wide, skinny, total = tl.where(here, wide_, wide), tl.where(here, skinny_, skinny), tl.where(here, total_, total)
        rows, width, rank = tl.where(here, rows_, rows), tl.where(here, width_, width), tl.where(here, rank_, rank)
        stride, stride_of_skinny = tl.where(here, stride_, stride), tl.where(here, stride_of_skinny_, stride_of_skinny)
        scale, mine, is_up = (
            tl.where(here, scale_, scale),
            tl.where(here, tile - first, mine),
            tl.where(here, 1 - number % 2, is_up),
        )
        first += tiles
    tiles_of_part = tl.cdiv(width, C)
    part, column = mine // tiles_of_part, (mine % tiles_of_part) * C + tl.arange(0, C)
    row, r = tl.arange(0, K), tl.arange(0, R)
    inside, is_rank = column < width, r < rank
    wide += part * width * is_up + row[:, None].to(tl.int64) * stride + column[None, :]
    skinny += part * rank + row[:, None] * stride_of_skinny + r[None, :]
    sums = tl.zeros((C, R), tl.float32)
    for start in range(0, rows, K):
        exists = (start + row < rows)[:, None]
        value = tl.load(wide, mask=exists & inside[None, :], other=0.0)
        sums = tl.dot(tl.trans(value), tl.load(skinny, mask=exists & is_rank[None, :], other=0.0), sums)
        wide += K * stride
        skinny += K * stride_of_skinny
    held = inside[:, None] & is_rank[None, :]
    if is_up == 1:
        place = total + (part * width + column[:, None]) * rank + r[None, :]
        tl.store(place, tl.load(place, mask=held, other=0.0) + scale * sums, mask=held)
    else:
        place = total + (part * rank + r[None, :]) * width + column[:, None]
        tl.store(place, tl.load(place, mask=held, other=0.0) + scale * sums, mask=held)


def add_gradients(layers):
    """Adds the gradients of some `layers` by one kernel: of each (dy [N, n * out], h [N, n * r], up_grad [n, out, r], scale,
    x [N, in], g [N, n * r], down_grad [n * r, in]), up_grad += scale * dy^T h by part, and down_grad += g^T x."""
    jobs, tiles = [], 0
    for dy, h, up_grad, scale, x, g, down_grad in layers:
        n, out, rank = up_grad.shape
        jobs.append((dy, h, up_grad, len(dy), out, n * rank, rank, dy.stride(0), h.stride(0), scale))
        jobs.append((x, g, down_grad, len(x), x.shape[1], n * rank, rank, x.stride(0), g.stride(0), 1.0))
        tiles += n * (triton.cdiv(out, _COLUMNS) + triton.cdiv(x.shape[1], _COLUMNS))
    ranks = max(16, *(triton.next_power_of_2(each[2].shape[2]) for each in layers))
    _add_gradients[(tiles,)](tuple(jobs), ranks, _ROWS, _COLUMNS, num_warps=_WARPS, num_stages=_STAGES)
