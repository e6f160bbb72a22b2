"""Triton kernels for attention to the few keys of a text, all of which a program holds.

A general attention reads keys block by block, so that gradients of queries are added up in fp32 in memory and converted: cuDNN's
backward is four kernels. Where all keys are at hand, each of these gradients is complete at once. Tensors are in a 16-bit dtype,
products are summed up in fp32. No atomics: the same inputs give the same bits.

Keys are `A` and then up to `B`, both powers of 2: 77 are 64 and 13, so that few of those computed do not exist.
"""

import functools

import torch
import triton
import triton.language as tl

from training.engine.fast.gaps import empty_with_gap
from training.engine.fast.triton_kernels import add_up, processors

FEWEST_KEYS, MOST_KEYS = 16, 160
"""Keys of which a tile can be multiplied, and whose tiles fit in a program's registers: two chunks of a caption are 154."""
_KEYS_OF_FOUR_WARPS = 80
"""Up to this many padded keys, the backward runs with 4 warps and two programs per multiprocessor; one chunk is padded to 80."""
_ROWS, _BACKWARD_ROWS = 64, 32
"""Queries of a tile, in the forward and the backward."""
_KEYS_OF_TWO_KERNELS = 128
"""With so many keys or more, one kernel for all gradients is short of registers. Two, with tiles of _ROWS queries, took 67 us
instead of 83 on an H100 (4 x 1024 queries, 20 heads, 154 keys), but 40 instead of 36 with 77 keys. Other chips lack registers or
shared memory for these tiles."""
_PROGRAMS = 3
"""Of the forward, and of the gradients of queries alone, for each multiprocessor: a Hopper holds about so many."""
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(rows, heads, chunk, D: tl.constexpr, K: tl.constexpr):
    """A program's image, the numbers of its first K queries in it, the columns of its head, and the numbers in all images."""
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    row, column = tl.program_id(0) * chunk + tl.arange(0, K), head * D + tl.arange(0, D)[None, :]
    return image, row, column, (image.to(tl.int64) * rows + row)[:, None]


@triton.jit
def _keys_and_values(k, v, image, keys, stride_of_k, stride_of_v, column, A: tl.constexpr, B: tl.constexpr):
    """The first `A` keys and values of an image and head, and then up to `B`: those that do not exist are 0."""
    first, second = image * keys + tl.arange(0, A)[:, None], image * keys + A + tl.arange(0, B)[:, None]
    is_key = A + tl.arange(0, B)[:, None] < keys
    k_a, v_a = tl.load(k + first * stride_of_k + column), tl.load(v + first * stride_of_v + column)
    k_b = tl.load(k + second * stride_of_k + column, mask=is_key, other=0.0)
    v_b = tl.load(v + second * stride_of_v + column, mask=is_key, other=0.0)
    return k_a, v_a, k_b, v_b


@triton.jit
def _store_gradients(partial_sums, image, keys, width, size_of_part, column, dk_a, dv_a, dk_b, dv_b, A: tl.constexpr, B: tl.constexpr):  # fmt: skip # noqa: E501
    """A program's parts of the gradients of keys and, `size_of_part` behind them, values."""
    first, second = image * keys + tl.arange(0, A)[:, None], image * keys + A + tl.arange(0, B)[:, None]
    is_key = A + tl.arange(0, B)[:, None] < keys
    partial_sums += column
    tl.store(partial_sums + first * width, dk_a)
    tl.store(partial_sums + size_of_part + first * width, dv_a)
    tl.store(partial_sums + second * width, dk_b, mask=is_key)
    tl.store(partial_sums + size_of_part + second * width, dv_b, mask=is_key)


@triton.jit
def _attend(q, k, v, out, logs, rows, keys, heads, chunk, stride, stride_of_k, stride_of_v, stride_of_out, scale, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, K: tl.constexpr):  # fmt: skip # noqa: E501
    """One program per chunk of queries of an image and head, K of them at a time: softmax(scale q k^T) v, and for each query the
    log2 of the sum of 2^x, x = scale q k^T log2(e): the backward computes the attention weights again as 2^(x - log)."""
    image, row, column, row_number = _place(rows, heads, chunk, D, K)
    k_a, v_a, k_b, v_b = _keys_and_values(k, v, image, keys, stride_of_k, stride_of_v, column, A, B)
    is_key = (A + tl.arange(0, B) < keys)[None, :]
    q += row_number * stride + column
    out += row_number * stride_of_out + column
    logs += tl.program_id(1).to(tl.int64) * rows
    factor = scale * _LOG2_E
    for _ in range(0, chunk, K):
        exists = row < rows
        queries = tl.load(q, mask=exists[:, None], other=0.0)
        a, b = tl.dot(queries, tl.trans(k_a)) * factor, tl.dot(queries, tl.trans(k_b)) * factor
        b = tl.where(is_key, b, float("-inf"))
        highest = tl.maximum(tl.max(a, 1), tl.max(b, 1))
        a, b = tl.exp2(a - highest[:, None]), tl.exp2(b - highest[:, None])
        total = tl.sum(a, 1) + tl.sum(b, 1)
        dtype = queries.dtype
        result = tl.dot(b.to(dtype), v_b, tl.dot(a.to(dtype), v_a))
        tl.store(out, result / total[:, None], mask=exists[:, None])
        tl.store(logs + row, highest + tl.log2(total), mask=exists)
        row += K
        q += K * stride
        out += K * stride_of_out


@triton.jit
def _attend_backward(q, k, v, logs, d_out, dq, partial_sums, rows, keys, heads, chunk, stride, stride_of_k, stride_of_v, stride_of_d_out, stride_of_dq, size_of_part, scale, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, K: tl.constexpr):  # fmt: skip # noqa: E501
    """One program per chunk of queries of an image and head, K of them at a time: dq, and its parts of the sums dk and dv."""
    image, row, column, row_number = _place(rows, heads, chunk, D, K)
    k_a, v_a, k_b, v_b = _keys_and_values(k, v, image, keys, stride_of_k, stride_of_v, column, A, B)
    is_key = (A + tl.arange(0, B) < keys)[:, None]
    q += row_number * stride + column
    d_out += row_number * stride_of_d_out + column
    dq += row_number * stride_of_dq + column
    logs += tl.program_id(1).to(tl.int64) * rows
    dk_a, dv_a = tl.zeros((A, D), tl.float32), tl.zeros((A, D), tl.float32)
    dk_b, dv_b = tl.zeros((B, D), tl.float32), tl.zeros((B, D), tl.float32)
    factor = scale * _LOG2_E
    for _ in range(0, chunk, K):
        # The output's gradient of rows that do not exist is zero, and adds to no sum.
        exists = row < rows
        queries, dy = tl.load(q, mask=exists[:, None], other=0.0), tl.load(d_out, mask=exists[:, None], other=0.0)
        log = tl.load(logs + row, mask=exists, other=0.0)[None, :]
        dtype = dy.dtype
        # With the attention weights p and dp = v dy^T:  dv = p dy, and the gradient of the logits is ds = p (dp - sum(p dp)), which
        # needs no output (Dao et al. 2022, arXiv 2205.14135, appendix B, which takes the sum from the output).
        p_a = tl.exp2(tl.dot(k_a, tl.trans(queries)) * factor - log)
        # A key that does not exist has the logit 0, which can be far above all others.
        p_b = tl.where(is_key, tl.exp2(tl.dot(k_b, tl.trans(queries)) * factor - log), 0.0)
        dv_a = tl.dot(p_a.to(dtype), dy, dv_a)
        dv_b = tl.dot(p_b.to(dtype), dy, dv_b)
        dp_a, dp_b = tl.dot(v_a, tl.trans(dy)), tl.dot(v_b, tl.trans(dy))
        sum_of_both = (tl.sum(p_a * dp_a, 0) + tl.sum(p_b * dp_b, 0))[None, :]
        ds_a, ds_b = (p_a * (dp_a - sum_of_both)).to(dtype), (p_b * (dp_b - sum_of_both)).to(dtype)
        dk_a = tl.dot(ds_a, queries, dk_a)
        dk_b = tl.dot(ds_b, queries, dk_b)
        result = tl.dot(tl.trans(ds_b), k_b, tl.dot(tl.trans(ds_a), k_a))
        tl.store(dq, result * scale, mask=exists[:, None])
        row += K
        q += K * stride
        d_out += K * stride_of_d_out
        dq += K * stride_of_dq
    partial_sums += tl.program_id(0).to(tl.int64) * 2 * size_of_part
    _store_gradients(
        partial_sums, image, keys, heads * D, size_of_part, column, dk_a * scale, dv_a, dk_b * scale, dv_b, A, B
    )  # fmt: skip


@triton.jit
def _gradient_of_queries(q, k, v, logs, d_out, dq, sums, rows, keys, heads, chunk, stride, stride_of_k, stride_of_v, stride_of_d_out, stride_of_dq, scale, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, K: tl.constexpr):  # fmt: skip # noqa: E501
    """The first half of `_attend_backward`: dq, and for each query the sum of p dp."""
    image, row, column, row_number = _place(rows, heads, chunk, D, K)
    k_a, v_a, k_b, v_b = _keys_and_values(k, v, image, keys, stride_of_k, stride_of_v, column, A, B)
    is_key = (A + tl.arange(0, B) < keys)[None, :]
    q += row_number * stride + column
    d_out += row_number * stride_of_d_out + column
    dq += row_number * stride_of_dq + column
    logs += tl.program_id(1).to(tl.int64) * rows
    sums += tl.program_id(1).to(tl.int64) * rows
    factor = scale * _LOG2_E
    for _ in range(0, chunk, K):
        exists = row < rows
        queries, dy = tl.load(q, mask=exists[:, None], other=0.0), tl.load(d_out, mask=exists[:, None], other=0.0)
        log = tl.load(logs + row, mask=exists, other=0.0)[:, None]
        dtype = dy.dtype
        p_a = tl.exp2(tl.dot(queries, tl.trans(k_a)) * factor - log)
        p_b = tl.where(is_key, tl.exp2(tl.dot(queries, tl.trans(k_b)) * factor - log), 0.0)
        dp_a, dp_b = tl.dot(dy, tl.trans(v_a)), tl.dot(dy, tl.trans(v_b))
        sum_of_both = tl.sum(p_a * dp_a, 1) + tl.sum(p_b * dp_b, 1)
        ds_a = (p_a * (dp_a - sum_of_both[:, None])).to(dtype)
        ds_b = (p_b * (dp_b - sum_of_both[:, None])).to(dtype)
        tl.store(dq, tl.dot(ds_b, k_b, tl.dot(ds_a, k_a)) * scale, mask=exists[:, None])
        tl.store(sums + row, sum_of_both, mask=exists)
        row += K
        q += K * stride
        d_out += K * stride_of_d_out
        dq += K * stride_of_dq


@triton.jit
def _gradients_of_keys(q, k, v, logs, sums, d_out, partial_sums, rows, keys, heads, chunk, stride, stride_of_k, stride_of_v, stride_of_d_out, size_of_part, scale, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, K: tl.constexpr):  # fmt: skip # noqa: E501
    """The second half: a program's parts of the sums dk and dv, from the sums of p dp."""
    image, row, column, row_number = _place(rows, heads, chunk, D, K)
    k_a, v_a, k_b, v_b = _keys_and_values(k, v, image, keys, stride_of_k, stride_of_v, column, A, B)
    is_key = (A + tl.arange(0, B) < keys)[:, None]
    q += row_number * stride + column
    d_out += row_number * stride_of_d_out + column
    logs += tl.program_id(1).to(tl.int64) * rows
    sums += tl.program_id(1).to(tl.int64) * rows
    dk_a, dv_a = tl.zeros((A, D), tl.float32), tl.zeros((A, D), tl.float32)
    dk_b, dv_b = tl.zeros((B, D), tl.float32), tl.zeros((B, D), tl.float32)
    factor = scale * _LOG2_E
    for _ in range(0, chunk, K):
        exists = row < rows
        queries, dy = tl.load(q, mask=exists[:, None], other=0.0), tl.load(d_out, mask=exists[:, None], other=0.0)
        log = tl.load(logs + row, mask=exists, other=0.0)[None, :]
        sum_of_both = tl.load(sums + row, mask=exists, other=0.0)[None, :]
        dtype = dy.dtype
        # One part of the keys after the other: fewer registers.
        p_a = tl.exp2(tl.dot(k_a, tl.trans(queries)) * factor - log)
        dv_a = tl.dot(p_a.to(dtype), dy, dv_a)
        dk_a = tl.dot((p_a * (tl.dot(v_a, tl.trans(dy)) - sum_of_both)).to(dtype), queries, dk_a)
        p_b = tl.where(is_key, tl.exp2(tl.dot(k_b, tl.trans(queries)) * factor - log), 0.0)
        dv_b = tl.dot(p_b.to(dtype), dy, dv_b)
        dk_b = tl.dot((p_b * (tl.dot(v_b, tl.trans(dy)) - sum_of_both)).to(dtype), queries, dk_b)
        row += K
        q += K * stride
        d_out += K * stride_of_d_out
    partial_sums += tl.program_id(0).to(tl.int64) * 2 * size_of_part
    _store_gradients(
        partial_sums, image, keys, heads * D, size_of_part, column, dk_a * scale, dv_a, dk_b * scale, dv_b, A, B
    )  # fmt: skip


def supports(dtype, keys, width_of_head):
    """Whether the functions below take so many keys and columns of a head in that dtype, where the compute capability is 8.0 or
    newer."""
    return dtype.itemsize == 2 and FEWEST_KEYS <= keys <= MOST_KEYS and width_of_head == 64


def attend(q, k, v, heads, gap=0):
    """Queries [B, N, heads * 64], keys and values [B, T, heads * 64], which may be parts of wider rows, all in one 16-bit dtype ->
    [B, N, heads * 64] alike, with a gap behind its rows, and what the backward needs, [B * heads, N] fp32."""
    (images, rows, width), keys = q.shape, k.shape[1]
    out = empty_with_gap(q, width, gap)
    logs = torch.empty(images * heads, rows, dtype=torch.float32, device=q.device)
    q, k, v = _in_rows(q, k, v)
    chunk = _chunk(rows, images * heads, processors(q.device) * _PROGRAMS, _ROWS)
    _attend[(triton.cdiv(rows, chunk), images * heads)](
        q, k, v, out, logs, rows, keys, heads, chunk, q.stride(0), k.stride(0), v.stride(0), width + gap,
        (width // heads) ** -0.5, width // heads, *_split(keys), _ROWS, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out, logs


def attend_backward(q, k, v, logs, d_out, heads, gap=0):
    """The gradients of queries [B, N, heads * 64], with a gap behind their rows, and of keys and values [B, T, heads * 64]."""
    (images, rows, width), keys = q.shape, k.shape[1]
    dq, of_both = empty_with_gap(q, width, gap), k.new_empty(2, *k.shape)
    q, k, v, d_out = _in_rows(q, k, v, d_out)
    split, scale = _split(keys), (width // heads) ** -0.5
    in_two = keys >= _KEYS_OF_TWO_KERNELS and _is_hopper(q.device)
    few = sum(split) <= _KEYS_OF_FOUR_WARPS
    tile = _ROWS if in_two else _BACKWARD_ROWS
    chunk = _chunk(rows, images * heads, processors(q.device) * (2 if few else 1), tile)
    pieces = triton.cdiv(rows, chunk)
    partial_sums = torch.empty(pieces, 2 * len(k), width, dtype=torch.float32, device=k.device)
    strides = q.stride(0), k.stride(0), v.stride(0), d_out.stride(0)
    if in_two:
        sums, of_queries = torch.empty_like(logs), _chunk(rows, images * heads, processors(q.device) * _PROGRAMS, tile)
        _gradient_of_queries[(triton.cdiv(rows, of_queries), images * heads)](
            q, k, v, logs, d_out, dq, sums, rows, keys, heads, of_queries, *strides, width + gap, scale, width // heads, *split,
            tile, num_warps=4, num_stages=3,
        )  # fmt: skip
        _gradients_of_keys[(pieces, images * heads)](
            q, k, v, logs, sums, d_out, partial_sums, rows, keys, heads, chunk, *strides, len(k) * width, scale, width // heads,
            *split, tile, num_warps=8, num_stages=3,
        )  # fmt: skip
    else:
        _attend_backward[(pieces, images * heads)](
            q, k, v, logs, d_out, dq, partial_sums, rows, keys, heads, chunk, *strides, width + gap, len(k) * width, scale,
            width // heads, *split, tile, num_warps=4 if few else 8, num_stages=3,
        )  # fmt: skip
    add_up(partial_sums, of_both.view(-1, width))
    return dq, *of_both


def _in_rows(*tensors):
    """[B, N, D] -> [B * N, D], whose rows may be parts of wider ones."""
    return [each.flatten(0, 1) if each.stride(-1) == 1 else each.contiguous().flatten(0, 1) for each in tensors]


def _split(keys):
    """Two powers of 2, the first at most and both together at least `keys`."""
    first = min(128, 1 << keys.bit_length() - 1)
    return first, max(16, triton.next_power_of_2(keys - first))


@functools.cache
def _chunk(rows, heads, at_once, tile):
    """How many queries a program takes, `tile` at a time, so that those of all images' `heads` end soonest where so many programs
    run `at_once`."""
    tiles = triton.cdiv(rows, tile)
    # To load keys and values, and to store its parts of their gradients, takes a program about as long as two tiles.
    pieces = min(range(1, tiles + 1), key=lambda n: triton.cdiv(n * heads, at_once) * (triton.cdiv(tiles, n) + 2))
    return triton.cdiv(tiles, pieces) * tile


@functools.cache
def _is_hopper(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
