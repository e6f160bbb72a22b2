"""Frozen linear layers with their LoRA as one differentiable product.

Autograd would keep the input of every frozen layer and return each LoRA gradient as a tensor of its own, 1444 of them.
Here frozen layers keep nothing, layers that read the same input are one product, and LoRA gradients are accumulated in
place in the adapter's flat fp32 buffer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from training.engine.fast.gaps import with_gap
from training.engine.fast.gradients import add_gradients, add_product, as_groups
from training.engine.fast.ops import append_products, dequantized, scale_columns, takes_products
from training.engine.fast.row_scales import RowScales

_LAYERS_AT_ONCE = 8
"""Of the cross-attentions' keys and values: how many weights in int8 are multiplied out at a time. SDXL's 128 are 630 MB."""


@dataclass(frozen=True)
class FusedLoraLinear:
    """n linear layers of equal input and output width as one, with their LoRAs: y = W x + b + scale * up(down(x)).

    Where rows have a gap behind them for the n * rank columns of the LoRAs, the frozen product computes these along:
    y = [x | x down^T] [W | scale up]^T, and in the backward dx = [dy | g] [W; down] with g = scale dy up. Both matrices are
    views of one that holds W, `down` below it and `up` beside it. The dtype is that of the UNet, except for the gradients.
    """

    names: tuple[str, ...]
    """The n layers in the diffusers UNet."""
    weight: torch.Tensor
    """[n * out, in], frozen: in the UNet's dtype, or in int8."""
    weight_scales: torch.Tensor | None
    """[n * out, 1], what the rows of int8 are multiplied by; None where they are not in int8."""
    bias: torch.Tensor | None
    """[n * out], frozen."""
    down: torch.Tensor
    """[n * rank, in]"""
    up: torch.Tensor
    """[n, out, rank], times `scale`."""
    weight_and_up: torch.Tensor | None
    """[n * out, in + n * rank]; None if the layers have no common matrix."""
    weight_and_down: torch.Tensor | None
    """[n * out + n * rank, in]"""
    down_grad: torch.Tensor
    """Shape of `down`, fp32; gradients are added to it."""
    up_grad: torch.Tensor
    """Shape of `up`, fp32: the gradient of `up` without `scale`."""
    scale: float
    """Of the LoRAs' changes."""
    grad_anchor: torch.Tensor
    """A scalar that requires a gradient: autograd calls the backward even where the input requires none."""
    scales: RowScales | None = None
    """DoRA's, which multiply y without the bias; None for a LoRA."""

    def frozen(self, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of the weight in the UNet's dtype, multiplied out for the caller if they are in int8."""
        return self.weight[rows] if self.weight_scales is None else dequantized(self.weight[rows], self.weight_scales[rows])


def fused_lora_linear(x: torch.Tensor, layer: FusedLoraLinear) -> torch.Tensor:
    """[..., in] -> [..., out], of a single layer."""
    (y,) = fused_lora_linears(x, layer)
    return y


def fused_lora_linears(x: torch.Tensor, layer: FusedLoraLinear) -> tuple[torch.Tensor, ...]:
    """[..., in] -> n tensors [..., out]."""
    return _FusedLoraLinearFunction.apply(x, layer.grad_anchor, layer)


def columns_beside(layer: FusedLoraLinear | None) -> int:
    """How many columns the LoRAs of a layer add to a product; 0 without a wide matrix, or where rows would not begin at multiples
    of 16 bytes."""
    columns = len(layer.down) if layer and layer.weight_and_up is not None else 0
    return columns if columns % 8 == 0 else 0


def fused_lora_context(x: torch.Tensor, layer: FusedLoraLinear) -> tuple[torch.Tensor, ...]:
    """[..., in] -> n tensors [..., out]; `x` gets no gradient."""
    return _FusedContextFunction.apply(x, layer.grad_anchor, layer)


class _FusedLoraLinearFunction(torch.autograd.Function):
    """The product of a FusedLoraLinear, with N rows of input.

    With h = x down^T and g = scale dy up (both [N, n * rank], skinny), the gradients are
    d_up = scale dy^T h, d_down = g^T x and dx = dy W + g down.
    """

    @staticmethod
    def forward(ctx, x, anchor, layer):
        rows = x.reshape(-1, x.shape[-1])
        y, h = product(rows, layer)
        if layer.scales:
            scale_columns(y, layer.scales.g, layer.bias)
        ctx.layer = layer
        # The frozen product keeps nothing; x is needed for d_down, and the skinny h is cheaper to keep than to compute again.
        ctx.save_for_backward(rows, h, y if layer.scales else None)
        return y.view(*x.shape[:-1], y.shape[-1]).chunk(len(layer.names), dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        layer, (rows, h, y) = ctx.layer, ctx.saved_tensors
        dy, g = gradient_of_h([each.reshape(len(rows), -1) for each in dys], layer, y)
        add_gradients(dy, h, layer.up_grad, layer.scale, rows, g, layer.down_grad)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        dx = gradient_of_input(dy, g, layer)
        return dx.view(*dys[0].shape[:-1], dx.shape[-1]), None, None


def product(rows: torch.Tensor, layer: FusedLoraLinear, *, has_h: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, in] -> [N, n * out], with the bias unless it is to be scaled first, and h, which is in the gap behind `rows` if there is
    one; with `has_h` it is there already."""
    n, _, rank = layer.up.shape
    bias = None if layer.scales else layer.bias
    wide = with_gap(rows, rows.shape[1] + n * rank)
    if wide is not None:
        h = wide[:, rows.shape[1] :]
        if not has_h:
            torch.mm(rows, layer.down.T, out=h)
        return F.linear(wide, layer.weight_and_up, bias), h
    if columns_beside(layer) and takes_products(rows, n * rank):
        # Rows that are read once more and copied cost less than an output that is read and written once more.
        copied, h = append_products([rows], layer.down.T[None], keeps=True)
        return F.linear(with_gap(copied, rows.shape[1] + n * rank), layer.weight_and_up, bias), h
    y, h = F.linear(rows, layer.frozen(), bias), rows @ layer.down.T
    if n == 1:
        y.addmm_(h, layer.up[0].T)
    else:
        # One batched product adds the n LoRA outputs to their columns of y.
        as_groups(y, n).baddbmm_(as_groups(h, n), layer.up.mT)
    return y, h


def gradient_of_h(
    dys: Sequence[torch.Tensor], layer: FusedLoraLinear, y: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """n tensors [N, out] -> them side by side, and g [N, n * rank], in the gap behind them if the layer has a wide matrix.

    Those of a layer with scales, whose output is `y` [N, n * out], are the gradients before it was scaled."""
    n, out, rank = layer.up.shape
    if layer.scales:
        dys = [layer.scales.backward(dys[0] if n == 1 else torch.cat(dys, dim=1), y, layer.bias, columns_beside(layer))]
    wide = with_gap(dys[0], n * (out + rank)) if len(dys) == 1 else None
    if wide is None and not layer.scales and columns_beside(layer) and takes_products(dys[0], rank):
        dy, _ = append_products(dys, layer.up)
        return dy, with_gap(dy, n * (out + rank))[:, n * out :]
    dy = dys[0] if len(dys) == 1 else torch.cat(dys, dim=1)
    g = dy.new_empty(len(dy), n * rank) if wide is None else wide[:, n * out :]
    if n == 1:
        torch.mm(dy, layer.up[0], out=g)
    else:
        # The batched product writes straight into the [N, n * rank] layout that the product with `down` reads.
        torch.bmm(as_groups(dy, n), layer.up, out=as_groups(g, n))
    return dy, g


def gradient_of_input(dy: torch.Tensor, g: torch.Tensor, layer: FusedLoraLinear) -> torch.Tensor:
    """[N, in] from `dy` [N, n * out] and what `gradient_of_h` returned for it."""
    wide = with_gap(dy, dy.shape[1] + g.shape[1])
    return (dy @ layer.frozen()).addmm_(g, layer.down) if wide is None else wide @ layer.weight_and_down


class _FusedContextFunction(torch.autograd.Function):
    """The same for many layers on one small input that requires no gradient: keys and values of all cross-attentions.

    Each layer's output is a tensor of its own here, because each is used in another block.
    """

    @staticmethod
    def forward(ctx, x, anchor, layer):
        rows = x.reshape(-1, x.shape[-1])
        n, out, rank = layer.up.shape
        h = (rows @ layer.down.T).view(-1, n, rank).transpose(0, 1).contiguous()  # [n, N, rank]
        y = rows.new_empty(n, len(rows), out)
        at_once = n if layer.weight_scales is None else _LAYERS_AT_ONCE
        for first in range(0, n, at_once):
            part = slice(first, min(first + at_once, n))
            weight = layer.frozen(slice(part.start * out, part.stop * out)).view(-1, out, rows.shape[1])
            torch.matmul(rows, weight.mT, out=y[part])
        y.baddbmm_(h, layer.up.mT)
        if layer.scales:
            y.mul_(layer.scales.g.view(n, 1, out))
        ctx.layer = layer
        ctx.save_for_backward(rows, h, y if layer.scales else None)
        return tuple(part.view(*x.shape[:-1], out) for part in y)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        layer, (rows, h, y) = ctx.layer, ctx.saved_tensors
        n, out, rank = layer.up.shape
        dy = torch.stack([part.reshape(-1, out) for part in dys])  # [n, N, out]
        if layer.scales:
            in_rows = (part.transpose(0, 1).reshape(-1, n * out) for part in (dy, y))
            dy = as_groups(layer.scales.backward(*in_rows, None), n)
        g = torch.bmm(dy, layer.up).transpose(0, 1).reshape(-1, n * rank)
        add_product(layer.up_grad, dy.mT, h, layer.scale)
        add_product(layer.down_grad, g.T, rows, 1.0)
        return None, None, None
