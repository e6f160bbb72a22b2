"""Rows with unused columns behind each, in which a layer that reads them computes its LoRA along with the frozen product."""

import math

import torch

_SIGNATURE = 8
"""Elements behind the last row. Strides alone do not tell: a part of a tensor has rows of any stride, and in the place of the gap
numbers that others need, such as the gradient of one of two tensors that were concatenated."""


def empty_with_gap(like: torch.Tensor, width: int, gap: int) -> torch.Tensor:
    """An empty tensor [..., width] with the dtype and the other dimensions of `like`, and `gap` unused columns behind each row."""
    *shape, _ = like.shape
    columns = width + gap
    count = math.prod(shape) * columns
    return like.new_empty(count + (_SIGNATURE if gap else 0))[:count].view(*shape, columns)[..., :width]


def with_gap(rows: torch.Tensor, columns: int) -> torch.Tensor | None:
    """`rows` [N, width] with the gap behind each row, [N, columns]; None if there is no gap of that width."""
    is_marked = rows.untyped_storage().nbytes() == (len(rows) * columns + _SIGNATURE) * rows.element_size()
    if rows.stride() != (columns, 1) or rows.storage_offset() or not is_marked:
        return None
    return rows.as_strided((len(rows), columns), (columns, 1))
