"""DoRA in the fast engine: the outputs of a layer with a LoRA are multiplied by g = magnitude / |W + scale up @ down|.

The norms are computed once for each optimizer step and are, as in PEFT, constants for the gradient (Liu et al. 2024, arXiv
2402.09353, section 4.3). With y = g (W x + scale up(down(x))) + bias, d magnitude is the sum over the rows of dy (y - bias),
divided by magnitude.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from training.engine.fast.ops import scale_columns_backward
from training.method.adapters import ADAPTER, Adapter, row_norms
from training.method.low_rank import changed_row_squares


@dataclass(frozen=True)
class RowScales:
    """What multiplies the outputs of one layer, or of n layers as one: [n * out] each, fp32."""

    g: torch.Tensor
    """1 without the adapter."""
    magnitude: torch.Tensor
    """A part of the adapter's flat weights."""
    magnitude_grad: torch.Tensor
    """The same part of its gradients; gradients are added to it."""

    def part(self, start: int, end: int) -> "RowScales":
        return RowScales(self.g[start:end], self.magnitude[start:end], self.magnitude_grad[start:end])

    def backward(self, dy: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, gap: int = 0) -> torch.Tensor:
        """Add the gradient of the magnitudes, and return that of what was scaled to `y`, with a gap behind its rows; all
        [N, n * out]."""
        scaled, sums = scale_columns_backward(dy, y, self.g, bias, gap)
        self.magnitude_grad.addcdiv_(sums, self.magnitude)
        return scaled


def row_scales(adapter: Adapter) -> tuple[RowScales, Callable[[bool], None]]:
    """The scales of all layers of a DoRA, in their order, and a function that computes them from its weights, or with False makes
    them 1. Layers of one shape and scale are computed as one, except for their products with W."""
    alike, count = defaultdict(list), 0
    for layer in adapter.layers.values():
        base, down, up = layer.get_base_layer(), layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        alike[down.shape, len(up), layer.scaling[ADAPTER]].append((slice(count, count + len(up)), base, down, up))
        count += len(up)
    # The magnitudes are the last ones of the flat weights.
    every = RowScales(torch.ones_like(adapter.sums[:count]), adapter.weights.detach()[-count:], adapter.sums[-1 - count : -1])
    norms = torch.empty_like(every.g)
    kinds = []
    for (*_, scale), members in alike.items():
        rows, bases, downs, ups = zip(*members, strict=True)
        squares = torch.stack([row_norms(base.weight) ** 2 for base in bases])
        kinds.append(([norms[each] for each in rows], squares, bases, downs, ups, scale))

    @torch.no_grad()
    def update(adapts: bool) -> None:
        if not adapts:
            every.g.fill_(1)
            return
        for found, squares, bases, downs, ups, scale in kinds:
            down, up = torch.stack(downs).flatten(2), scale * torch.stack(ups).flatten(2)
            across = bases[0].weight.new_empty(up.shape)
            for base, small, product in zip(bases, down.to(across.dtype), across, strict=True):
                torch.mm(base.weight.flatten(1), small.T, out=product)
            torch._foreach_copy_(found, list(changed_row_squares(squares, across, down, up).sqrt()))
        torch.div(every.magnitude, norms, out=every.g)

    return every, update
