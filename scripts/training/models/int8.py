"""Frozen layers that hold their weights in 8 bits, for GPUs with little memory.

Each row (output channel) has a scale of its own. A weight is multiplied out where a product reads it and is not kept, so that
every other part of the program sees ordinary layers.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

_QUANTIZED = re.compile(r"\.(attentions\.|resnets\.\d+\.conv)")
"""Layers of a UNet: the transformers' linear layers and the ResNets' convolutions, which hold almost all weights. Embeddings and
the first and last layers, where errors weigh most, are not in it."""
_LARGEST_CODE = 127


class Int8Linear(torch.nn.Linear):
    """A frozen linear layer with `codes` [out, in] int8 and `scales` [out, 1] in the dtype of the computation."""

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], a new tensor each time."""
        return self.codes * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenLinear.apply(x, lambda: self.weight, self.bias)


class Int8Conv2d(torch.nn.Conv2d):
    """A frozen convolution with `codes` [out, in, h, w] int8 and `scales` [out, 1, 1, 1]."""

    @property
    def weight(self) -> torch.Tensor:
        """[out, in, h, w], a new tensor each time."""
        return self.codes * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = frozen_conv(x, lambda: self.weight, self)
        return y if self.bias is None else y + self.bias[:, None, None]


def frozen_conv(x: torch.Tensor, weight: Callable[[], torch.Tensor], conv: torch.nn.Conv2d) -> torch.Tensor:
    """`conv` of `x` without its bias, with the weight that a function returns, which is called again in the backward: autograd
    keeps neither weight nor input."""
    return _FrozenConv.apply(x, weight, conv.stride, conv.padding)


def conv_input_gradient(
    dy: torch.Tensor, shape: torch.Size, weight: torch.Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> torch.Tensor:
    """The gradient of a convolution's input of this `shape`."""
    # PyTorch's gradient of a convolution wants an input of the right shape even where only dx is computed from dy.
    never_read = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    dx, _, _ = torch.ops.aten.convolution_backward(
        dy, never_read, weight, None, stride, padding, (1, 1), False, (0, 0), 1, (True, False, False)
    )
    return dx


class _FrozenLinear(torch.autograd.Function):
    """A linear layer that keeps nothing for the backward, where its weight is computed again."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return F.linear(x, weight(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy @ ctx.weight(), None, None


class _FrozenConv(torch.autograd.Function):
    """The same for a convolution without bias."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.shape, ctx.weight, ctx.stride, ctx.padding = x.shape, weight, stride, padding
        return F.conv2d(x, weight(), None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return conv_input_gradient(dy, ctx.shape, ctx.weight(), ctx.stride, ctx.padding), None, None, None


_CLASSES = {torch.nn.Linear: Int8Linear, torch.nn.Conv2d: Int8Conv2d}


def quantize(unet: torch.nn.Module, device: torch.device) -> None:
    """Move the frozen `unet` to `device`, in place, with most of its weights in 8 bits. Never holds more than one of them there
    in its own dtype."""
    for name, module in unet.named_modules():
        if type(module) in _CLASSES and _QUANTIZED.search(name):
            codes, scales = rowwise_int8(module.weight.detach().to(device))
            del module._parameters["weight"]
            module.__class__ = _CLASSES[type(module)]
            module.register_buffer("codes", codes, persistent=False)
            module.register_buffer("scales", scales, persistent=False)
    unet.to(device)


def rowwise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [out, ...] -> int8 codes of the same shape, and scales [out, 1, ...] in its dtype, so that codes * scales is the
    weight to within half a scale; where the scale was rounded down, a little more for the row's largest values."""
    dimensions = tuple(range(1, weight.dim()))
    exact = weight.float()
    scales = (exact.abs().amax(dimensions, keepdim=True) / _LARGEST_CODE).to(weight.dtype)
    steps = scales.float().clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros has the scale 0
    codes = (exact / steps).round().clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
    return codes, scales
