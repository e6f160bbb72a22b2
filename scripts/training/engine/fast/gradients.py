"""Gradients of LoRAs, added to their fp32 buffers: on a GPU by one kernel for several layers.

Both gradients of a layer are sums over all rows with few columns. One layer has too few of them to occupy a GPU, and to divide the
rows among more programs costs as many bytes as it reads.
"""

from functools import partial

import torch
from torch.autograd.variable import Variable

from training.engine.fast.ops import add_gradients_by_kernel, takes_gradients

_LAYERS_AT_ONCE = 4
_Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor, torch.Tensor, torch.Tensor]
"""The arguments of `add_gradients`."""
_waiting: dict[int, list[_Layer]] = {}
"""Layers whose gradients are still to be added, by the number of the backward pass."""


def add_gradients(
    dy: torch.Tensor,
    h: torch.Tensor,
    up_grad: torch.Tensor,
    scale: float,
    x: torch.Tensor,
    g: torch.Tensor,
    down_grad: torch.Tensor,
) -> None:
    """Add the gradients of n layers that read the same input: up_grad [n, out, r] += scale * dy^T h for each, and down_grad
    [n * r, in] += g^T x, with `dy` [N, n * out], `h` and `g` [N, n * r] and `x` [N, in].

    Called in a backward pass, at whose end they are added at the latest. Until then, no argument may be changed.
    """
    layer = dy, h, up_grad, scale, x, g, down_grad
    if not takes_gradients(dy, x, up_grad.shape[2]):
        _add_by_products(layer)
        return
    backward = torch._C._current_graph_task_id()  # as torch.utils.checkpoint asks for it; the public API has no number
    if backward not in _waiting:
        _waiting.clear()  # a backward pass that failed left its layers here
        _waiting[backward] = []
        Variable._execution_engine.queue_callback(partial(_add_the_rest, backward))
    if any(other[2] is up_grad for other in _waiting[backward]):
        _add_now(_waiting[backward])  # one kernel must not add to the same numbers twice
    _waiting[backward].append(layer)
    if len(_waiting[backward]) == _LAYERS_AT_ONCE:
        add_gradients_by_kernel(_waiting[backward])
        _waiting[backward].clear()


def _add_the_rest(backward: int) -> None:
    _add_now(_waiting.pop(backward))


def _add_now(layers: list[_Layer]) -> None:
    # Fewer layers leave most of a GPU idle, and would be another kernel to compile.
    for layer in layers:
        _add_by_products(layer)
    layers.clear()


def _add_by_products(layer: _Layer) -> None:
    dy, h, up_grad, scale, x, g, down_grad = layer
    n = len(up_grad)
    if n == 1:
        add_product(up_grad[0], dy.T, h, scale)
    else:
        add_product(up_grad, as_groups(dy, n).mT, as_groups(h, n), scale)
    add_product(down_grad, g.T, x, 1.0)


def as_groups(rows: torch.Tensor, n: int) -> torch.Tensor:
    """[N, n * width] as [n, N, width], without a copy."""
    return rows.view(rows.shape[0], n, -1).transpose(0, 1)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """total += scale * a @ b, in fp32 whatever the dtype of `a` and `b`."""
    add = torch.addmm if a.dim() == 2 else torch.baddbmm
    if a.dtype == total.dtype:
        add(total, a, b, alpha=scale, out=total)
    elif a.device.type == "cuda":
        # cuBLAS multiplies bf16 and accumulates in fp32 anyway; `out_dtype` keeps that sum instead of rounding it.
        add(total, a, b, out_dtype=total.dtype, alpha=scale, out=total)
    else:
        total.add_(torch.matmul(a.to(total.dtype), b.to(total.dtype)), alpha=scale)
