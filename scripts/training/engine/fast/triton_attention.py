"""Triton kernels for attention to the few keys of a text, all of which a program holds.

A general attention reads keys block by block, so that gradients of queries are added up in fp32 in memory and converted: cuDNN's
backward is four kernels. Where all keys are at hand, each of these gradients is complete at once. Tensors are in a 16-bit dtype,
products are summed up in fp32. No atomics: the same inputs give the same bits.
"""

import functools

import torch
import triton
import triton.language as tl

from training.engine.fast.gaps import empty_with_gap
from training.engine.fast.triton_kernels import processors
from training.engine.fast.triton_products import add_up

MOST_KEYS = 160
"""A program has registers for so many: two chunks of a caption are 154."""
_MOST_OF_FOUR_WARPS = 80
"""So many where its backward has 4 warps instead of 8, and two programs run at a time on a multiprocessor: one chunk is 77."""
_ROWS, _BACKWARD_ROWS = 64, 32
"""Of a program of the forward, and that a program of the backward reads at a time."""


@triton.jit
def _attend(q, k, v, out, logs, rows, keys, heads, stride, stride_of_k, stride_of_v, stride_of_out, scale, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, K: tl.constexpr):  # fmt: skip # noqa: E501
    """One program per K rows of an image and head: softmax(scale q k^T) v, and the log2 of each row's sum of powers of 2. `A` keys
    and then up to `B`: 77 are 64 and 13, so that few of those computed do not exist."""
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    row, d = tl.program_id(0) * K + tl.arange(0, K), tl.arange(0, D)
    exists = (row < rows)[:, None]
    first, second = tl.arange(0, A), A + tl.arange(0, B)
    k += image * keys * stride_of_k + head * D + d[None, :]
    v += image * keys * stride_of_v + head * D + d[None, :]
    is_key = (second < keys)[:, None]
    place = (image.to(tl.int64) * rows + row)[:, None]
    queries = tl.load(q + place * stride + head * D + d[None, :], mask=exists, other=0.0)
    factor = scale * 1.4426950408889634
    a = tl.dot(queries, tl.trans(tl.load(k + first[:, None] * stride_of_k))) * factor
    b = tl.dot(queries, tl.trans(tl.load(k + second[:, None] * stride_of_k, mask=is_key, other=0.0))) * factor
    b = tl.where((second < keys)[None, :], b, float("-inf"))
    highest = tl.maximum(tl.max(a, 1), tl.max(b, 1))
    a, b = tl.exp2(a - highest[:, None]), tl.exp2(b - highest[:, None])
    total = tl.sum(a, 1) + tl.sum(b, 1)
    dtype = queries.dtype
    result = tl.dot(a.to(dtype), tl.load(v + first[:, None] * stride_of_v))
    result = tl.dot(b.to(dtype), tl.load(v + second[:, None] * stride_of_v, mask=is_key, other=0.0), result)
    tl.store(out + place * stride_of_out + head * D + d[None, :], result / total[:, None], mask=exists)
    tl.store(logs + tl.program_id(1).to(tl.int64) * rows + row, highest + tl.log2(total), mask=row < rows)


@triton.jit
def _attend_backward(q, k, v, logs, d_out, dq, parts, rows, keys, heads, chunk, stride, stride_of_k, stride_of_v, stride_of_d_out, stride_of_dq, size_of_part, scale, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, K: tl.constexpr):  # fmt: skip # noqa: E501
    """One program per chunk of rows of an image and head, K rows at a time: dq, and its parts of the gradients of k and v."""
    image, head, piece = tl.program_id(1) // heads, tl.program_id(1) % heads, tl.program_id(0)
    row, d = piece * chunk + tl.arange(0, K), tl.arange(0, D)
    first, second = tl.arange(0, A), A + tl.arange(0, B)
    # Keys and values beyond the last are zero, and so are gradients of rows that do not exist: neither adds to a sum.
    is_key = (second < keys)[:, None]
    column = head * D + d[None, :]
    of_first, of_second = (image * keys + first)[:, None], (image * keys + second)[:, None]
    k_a, v_a = tl.load(k + of_first * stride_of_k + column), tl.load(v + of_first * stride_of_v + column)
    k_b = tl.load(k + of_second * stride_of_k + column, mask=is_key, other=0.0)
    v_b = tl.load(v + of_second * stride_of_v + column, mask=is_key, other=0.0)
    place = (image.to(tl.int64) * rows + row)[:, None]
    q += place * stride + column
    d_out += place * stride_of_d_out + column
    dq += place * stride_of_dq + column
    logs += tl.program_id(1).to(tl.int64) * rows
    dk_a, dv_a = tl.zeros((A, D), tl.float32), tl.zeros((A, D), tl.float32)
    dk_b, dv_b = tl.zeros((B, D), tl.float32), tl.zeros((B, D), tl.float32)
    factor = scale * 1.4426950408889634
    for _ in range(0, chunk, K):
        exists = row < rows
        queries, dy = tl.load(q, mask=exists[:, None], other=0.0), tl.load(d_out, mask=exists[:, None], other=0.0)
        log = tl.load(logs + row, mask=exists, other=0.0)[None, :]
        dtype = dy.dtype
        # With the shares s = softmax(q k^T) and ds = dy v^T:  dv = s^T dy, and the gradient of q k^T is s (ds - sum(s ds)).
        s_a = tl.exp2(tl.dot(k_a, tl.trans(queries)) * factor - log)
        s_b = tl.exp2(tl.dot(k_b, tl.trans(queries)) * factor - log)
        dv_a = tl.dot(s_a.to(dtype), dy, dv_a)
        dv_b = tl.dot(s_b.to(dtype), dy, dv_b)
        ds_a, ds_b = tl.dot(v_a, tl.trans(dy)), tl.dot(v_b, tl.trans(dy))
        inner = (tl.sum(s_a * ds_a, 0) + tl.sum(s_b * ds_b, 0))[None, :]
        ds_a, ds_b = (s_a * (ds_a - inner)).to(dtype), (s_b * (ds_b - inner)).to(dtype)
        dk_a = tl.dot(ds_a, queries, dk_a)
        dk_b = tl.dot(ds_b, queries, dk_b)
        result = tl.dot(tl.trans(ds_b), k_b, tl.dot(tl.trans(ds_a), k_a))
        tl.store(dq, result * scale, mask=exists[:, None])
        row += K
        q += K * stride
        d_out += K * stride_of_d_out
        dq += K * stride_of_dq
    parts += piece.to(tl.int64) * 2 * size_of_part + column
    width = heads * D
    tl.store(parts + of_first * width, dk_a * scale)
    tl.store(parts + size_of_part + of_first * width, dv_a)
    tl.store(parts + of_second * width, dk_b * scale, mask=is_key)
    tl.store(parts + size_of_part + of_second * width, dv_b, mask=is_key)


def supports(dtype, keys, width_of_head):
    """Whether the kernels below take so many keys and columns of a head in that dtype, on any card but Turing's."""
    return dtype.itemsize == 2 and 16 <= keys <= MOST_KEYS and width_of_head == 64


def attend(q, k, v, heads, gap=0):
    """Queries [B, N, heads * D], keys and values [B, T, heads * D] -> [B, N, heads * D] with a gap behind its rows, and what the
    backward needs, [B * heads, N] fp32."""
    (images, rows, width), keys = q.shape, k.shape[1]
    out = empty_with_gap(q, width, gap)
    logs = torch.empty(images * heads, rows, dtype=torch.float32, device=q.device)
    q, k, v = _in_rows(q, k, v)
    _attend[(triton.cdiv(rows, _ROWS), images * heads)](
        q, k, v, out, logs, rows, keys, heads, q.stride(0), k.stride(0), v.stride(0), width + gap, (width // heads) ** -0.5,
        width // heads, *_parts(keys), _ROWS, num_warps=4,
    )  # fmt: skip
    return out, logs


def attend_backward(q, k, v, logs, d_out, heads, gap=0):
    """The gradients of queries, with a gap behind their rows, keys and values."""
    (images, rows, width), shape = q.shape, k.shape
    dq, of_both = empty_with_gap(q, width, gap), k.new_empty(2, *shape)
    q, k, v, d_out = _in_rows(q, k, v, d_out)
    few = sum(_parts(shape[1])) <= _MOST_OF_FOUR_WARPS
    chunk = _chunk(rows, images * heads, processors(q.device) * (2 if few else 1))
    pieces = triton.cdiv(rows, chunk)
    parts = torch.empty(pieces, 2 * len(k), width, dtype=torch.float32, device=k.device)
    _attend_backward[(pieces, images * heads)](
        q, k, v, logs, d_out, dq, parts, rows, shape[1], heads, chunk, q.stride(0), k.stride(0), v.stride(0), d_out.stride(0),
        width + gap, len(k) * width, (width // heads) ** -0.5, width // heads, *_parts(shape[1]), _BACKWARD_ROWS,
        num_warps=4 if few else 8, num_stages=3,
    )  # fmt: skip
    add_up(parts, of_both.view(-1, width))
    return dq, *of_both


def _in_rows(*tensors):
    """[B, N, D] -> [B * N, D], whose rows may be parts of wider ones."""
    return [each.flatten(0, 1) if each.stride(-1) == 1 else each.contiguous().flatten(0, 1) for each in tensors]


def _parts(keys):
    """Two powers of 2, the first at most and both together at least `keys`."""
    first = min(128, 1 << keys.bit_length() - 1)
    return first, max(16, triton.next_power_of_2(keys - first))


@functools.cache
def _chunk(rows, heads, at_once):
    """How many rows a program of the backward takes, so that those of all `heads` end soonest where so many run `at_once`."""
    tiles = triton.cdiv(rows, _BACKWARD_ROWS)
    # To load keys and values and to store its parts of their gradients takes a program about as long as two tiles.
    pieces = min(range(1, tiles + 1), key=lambda n: triton.cdiv(n * heads, at_once) * (triton.cdiv(tiles, n) + 2))
    return triton.cdiv(tiles, pieces) * _BACKWARD_ROWS
