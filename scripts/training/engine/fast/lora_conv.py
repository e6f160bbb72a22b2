"""Frozen convolutions with their LoRA: a convolution to `rank` channels, and from there a product for each pixel.

Of the frozen convolution only the input is kept for the backward, for the gradient of `down`. This gradient and the LoRA's part of
that of the input are matrix products: they give the same bits each time, unlike cuDNN's gradient of a convolution's weight, and
convolutions to so few channels would leave most of a matrix unit idle.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from training.engine.fast.gradients import add_product
from training.engine.fast.ops import as_image, as_rows, dequantized, scale_columns
from training.engine.fast.row_scales import RowScales
from training.models.int8 import Int8Conv2d, conv_input_gradient

RANK_MULTIPLE = 8
"""Layers compute with a rank that is a multiple of this, the rest zeros: matrix units read rows at multiples of 16 bytes."""


@dataclass(frozen=True)
class LoraConv:
    """A convolution with its LoRA: y = conv(x) + up(h) with h = down(x), without the bias, in the UNet's dtype."""

    conv: torch.nn.Conv2d
    """The frozen one, in the UNet's dtype or in int8."""
    down: torch.Tensor
    """[rank', in, k, k], rank' being a multiple of RANK_MULTIPLE."""
    up: torch.Tensor
    """[out, rank'], times `scale`."""
    down_grad: torch.Tensor
    """[rank, in, k, k], fp32; gradients are added to it."""
    up_grad: torch.Tensor
    """[out, rank], fp32: the gradient of `up` without `scale`."""
    scale: float
    """Of the LoRA's change."""
    grad_anchor: torch.Tensor
    """A scalar that requires a gradient: autograd calls the backward even where the input requires none."""
    scales: RowScales | None = None
    """DoRA's, which multiply y; None for a LoRA."""


def lora_conv(x: torch.Tensor, layer: LoraConv, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[B, in, h, w] -> [B, out, h', w'], with a frozen `bias` or without one."""
    y = _LoraConvFunction.apply(x, layer.grad_anchor, layer)
    return y if bias is None else y + bias[:, None, None]


def frozen_weight(conv: torch.nn.Conv2d) -> torch.Tensor:
    """[out, in, h, w] in the UNet's dtype, multiplied out for the caller if it is in int8."""
    return dequantized(conv.codes, conv.scales) if isinstance(conv, Int8Conv2d) else conv.weight


class _LoraConvFunction(torch.autograd.Function):
    """With g = dy up for each pixel, d_up = scale dy^T h. A pixel q of the input is read by an output through each of the k x k
    taps t of the kernel; with those outputs' g side by side, [g_t], as a row of a matrix G, [d_down_t] = G^T x, and the LoRA's part
    of dx is G [down_t]."""

    @staticmethod
    def forward(ctx, x, anchor, layer):
        conv = layer.conv
        y, h = (F.conv2d(x, weight, None, conv.stride, conv.padding) for weight in (frozen_weight(conv), layer.down))
        rows, h = as_rows(y).flatten(0, 1), as_rows(h).flatten(0, 1)
        rows.addmm_(h, layer.up.T)
        if layer.scales:
            scale_columns(rows, layer.scales.g, None)
        ctx.layer = layer
        ctx.save_for_backward(x, h, rows if layer.scales else None)
        return as_image(rows.unflatten(0, (len(x), -1)), y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        layer, (x, h, y_rows) = ctx.layer, ctx.saved_tensors
        conv, (_, rank), (_, inputs, k, _) = layer.conv, layer.up_grad.shape, layer.down.shape
        dy_rows = as_rows(dy).flatten(0, 1)
        if layer.scales:
            dy_rows = layer.scales.backward(dy_rows, y_rows, None)
        add_product(layer.up_grad, dy_rows.T, h[:, :rank], layer.scale)
        g = (dy_rows @ layer.up).view(len(dy), *dy.shape[2:], -1)
        neighbours = _neighbours(g, conv, x.shape[2:])
        by_tap = torch.zeros(neighbours.shape[1], inputs, dtype=layer.down_grad.dtype, device=x.device)
        add_product(by_tap, neighbours.T, as_rows(x).flatten(0, 1), 1.0)
        layer.down_grad.add_(by_tap.view(k, k, -1, inputs)[:, :, :rank].flip(0, 1).permute(2, 3, 0, 1))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        dy = as_image(dy_rows.unflatten(0, (len(dy), -1)), dy)
        dx = conv_input_gradient(dy, x.shape, frozen_weight(conv), conv.stride, conv.padding)
        rows = as_rows(dx).flatten(0, 1)
        rows.addmm_(neighbours, layer.down.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, inputs))
        return as_image(rows.unflatten(0, (len(dy), -1)), x), None, None


def _neighbours(g: torch.Tensor, conv: torch.nn.Conv2d, size: torch.Size) -> torch.Tensor:
    """[B, h', w', rank] of outputs -> [B * h * w, k * k * rank] for the pixels of the input, whose height and width is `size`: the
    rows of the outputs that read the pixel, those of the last tap first, and zeros where there is none."""
    (height, width), k, stride, first = size, conv.kernel_size[0], conv.stride[0], conv.kernel_size[0] - 1 - conv.padding[0]
    # Outputs lie `stride` pixels apart in the input. A window of k x k around a pixel contains those that read it.
    spread = g.new_zeros(len(g), height + k - 1, width + k - 1, g.shape[-1])
    spread[:, first::stride, first::stride][:, : g.shape[1], : g.shape[2]] = g
    windows = spread.unfold(1, k, 1).unfold(2, k, 1)  # [B, h, w, rank, k, k]
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, k * k * g.shape[-1])
