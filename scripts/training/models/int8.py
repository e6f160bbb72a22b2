"""Frozen layers that hold their weights in 8 bits, for GPUs with little memory.

Each row (output channel) has a scale of its own. A weight is multiplied out where a product reads it and is not kept, so that
every other part of the program sees ordinary layers.
"""

import re

import torch

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


class Int8Conv2d(torch.nn.Conv2d):
    """A frozen convolution with `codes` [out, in, h, w] int8 and `scales` [out, 1, 1, 1]."""

    @property
    def weight(self) -> torch.Tensor:
        """[out, in, h, w], a new tensor each time."""
        return self.codes * self.scales


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
