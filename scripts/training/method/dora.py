"""DoRA's layers: rows of W + scale up @ down that are scaled to trained magnitudes (Liu et al. 2024, arXiv 2402.09353, equation 5).

PEFT computes the same with the whole product up @ down of each layer in each step, and with the activations in six passes.
"""

import torch
from peft.tuners.lora.layer import LoraLayer

from training.method.low_rank import changed_row_squares


def dora_forward(
    layer: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, *, squares: torch.Tensor, **_: object
) -> torch.Tensor:
    """What PEFT's variant of a linear layer or convolution returns for `x` and the `result` of the frozen layer.

    With g = magnitude / |W + scale up @ down| for each output, y = g (W x + scale up(down(x))) + bias. As in PEFT, the norm is
    a constant for the gradient (section 4.3), and dropout is not applied to what the frozen layer adds. `squares` [out] are the
    squared norms of the rows of W.
    """
    base, scale = layer.get_base_layer(), layer.scaling[active_adapter]
    down, up, magnitude = (part[active_adapter] for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    with torch.no_grad():
        weight, flat_down, flat_up = (part.flatten(1) for part in (base.weight, down.weight, scale * up.weight))
        norms = changed_row_squares(squares, weight @ flat_down.to(weight.dtype).T, flat_down, flat_up).sqrt()
    g = magnitude.weight / norms.view_as(magnitude.weight)
    inner = result
    if layer.training:  # dropout
        x = layer.lora_dropout[active_adapter](x)
        inner = base(x.to(result.dtype))
    changed = torch.add(inner, up(down(x)), alpha=scale)
    y = g * changed
    if base.bias is not None:  # `changed` contains it, and y must contain it once
        bias = base.bias.view_as(magnitude.weight)
        y = torch.addcmul(bias - g * bias, g, changed)
    return y + (result - inner) if layer.training else y
