"""Frozen layers with a LoRA, as one differentiable product each.

Autograd would keep the input of every frozen layer and return each LoRA gradient as a tensor of its own, 1444 of them.
Here frozen layers keep nothing, layers that read the same input are one product, and LoRA gradients are added in place
to the flat fp32 buffer of `LoraWeights`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class FusedLoraLinear:
    """n linear layers of one input and one output width side by side, with their LoRAs: y = W x + b + scale * up(down(x))."""

    weight: torch.Tensor
    """[n * out, in], frozen."""
    bias: torch.Tensor | None
    """[n * out], frozen."""
    down: torch.Tensor
    """[n * rank, in], in the UNet's dtype, as are the following."""
    up: torch.Tensor
    """[n, out, rank]"""
    down_grad: torch.Tensor
    """Like `down`, fp32: gradients are added to it."""
    up_grad: torch.Tensor
    """Like `up`, fp32."""
    scale: float
    """alpha / rank"""
    anchor: torch.Tensor
    """A scalar that requires a gradient, so that the backward runs whatever the input is."""


class _FusedLoraLinearFunction(torch.autograd.Function):
    """FusedLoraLinear, as one product; its parts are not autograd's."""

    @staticmethod
    def forward(ctx, x, anchor, layer):
        rows = x.reshape(-1, x.shape[-1])
        n, out, _ = layer.up.shape
        y, h = F.linear(rows, layer.weight, layer.bias), rows @ layer.down.T
        if n == 1:
            y.addmm_(h, layer.up[0].T, alpha=layer.scale)
        else:
            _side_by_side(y, n).baddbmm_(_side_by_side(h, n), layer.up.mT, alpha=layer.scale)
        ctx.layer = layer
        ctx.save_for_backward(rows, h)
        return y.view(*x.shape[:-1], n * out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        layer, (rows, h) = ctx.layer, ctx.saved_tensors
        n, out, _ = layer.up.shape
        dy_rows = dy.reshape(-1, n * out)
        if n == 1:
            g = dy_rows @ layer.up[0]
            _accumulate(layer.up_grad[0], dy_rows.T, h, layer.scale)
        else:
            g = h.new_empty(h.shape)
            torch.bmm(_side_by_side(dy_rows, n), layer.up, out=_side_by_side(g, n))
            _accumulate(layer.up_grad, _side_by_side(dy_rows, n).mT, _side_by_side(h, n), layer.scale)
        _accumulate(layer.down_grad, g.T, rows, layer.scale)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        dx = dy_rows @ layer.weight
        dx.addmm_(g, layer.down, alpha=layer.scale)
        return dx.view(*dy.shape[:-1], dx.shape[-1]), None, None


class _FusedContextFunction(torch.autograd.Function):
    """Many adapted layers on one small input that needs no gradient: the keys and values of all cross-attentions."""

    @staticmethod
    def forward(ctx, x, anchor, layer):
        rows = x.reshape(-1, x.shape[-1])
        n, out, rank = layer.up.shape
        h = (rows @ layer.down.T).view(-1, n, rank).transpose(0, 1).contiguous()
        y = torch.matmul(rows, layer.weight.view(n, out, -1).mT)
        y.baddbmm_(h, layer.up.mT, alpha=layer.scale)
        ctx.layer = layer
        ctx.save_for_backward(rows, h)
        return tuple(part.view(*x.shape[:-1], out) for part in y)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        layer, (rows, h) = ctx.layer, ctx.saved_tensors
        n, out, rank = layer.up.shape
        dy = torch.stack([part.reshape(-1, out) for part in dys])
        g = torch.bmm(dy, layer.up).transpose(0, 1).reshape(-1, n * rank)
        _accumulate(layer.up_grad, dy.mT, h, layer.scale)
        _accumulate(layer.down_grad, g.T, rows, layer.scale)
        return None, None, None


def fused_lora_linear(x: torch.Tensor, layer: FusedLoraLinear) -> torch.Tensor:
    """[..., in] -> [..., n * out]."""
    return _FusedLoraLinearFunction.apply(x, layer.anchor, layer)


def fused_lora_context(x: torch.Tensor, layer: FusedLoraLinear) -> tuple[torch.Tensor, ...]:
    """[..., in] -> n tensors [..., out]; `x` gets no gradient."""
    return _FusedContextFunction.apply(x, layer.anchor, layer)


def _side_by_side(rows: torch.Tensor, n: int) -> torch.Tensor:
    """[N, n * width] as [n, N, width], without a copy."""
    return rows.view(rows.shape[0], n, -1).transpose(0, 1)


def _accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """total += scale * a @ b, in fp32 whatever the dtype of `a` and `b`."""
    add = torch.addmm if a.dim() == 2 else torch.baddbmm
    if a.dtype == total.dtype:
        add(total, a, b, alpha=scale, out=total)
    elif a.device.type == "cuda":
        add(total, a, b, out_dtype=total.dtype, alpha=scale, out=total)
    else:
        total.add_(torch.matmul(a.to(total.dtype), b.to(total.dtype)), alpha=scale)


class _FrozenConv(torch.autograd.Function):
    """A convolution whose weights are frozen: the backward needs no input."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.shape, ctx.weight, ctx.stride, ctx.padding = x.shape, weight, stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        never_read = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
        dx, _, _ = torch.ops.aten.convolution_backward(
            dy, never_read, ctx.weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, (True, False, False)
        )
        return dx, None, None, None


def frozen_conv(x: torch.Tensor, conv: torch.nn.Conv2d) -> torch.Tensor:
    """`conv` without its bias."""
    return _FrozenConv.apply(x, conv.weight, conv.stride, conv.padding)
