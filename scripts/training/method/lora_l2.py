"""The gradient of weight x the sum of all |dW|^2, where dW = scale up @ down is what a LoRA adds to a layer."""

import math
from collections import defaultdict
from collections.abc import Callable

import torch

from training.method.adapters import ADAPTER, Adapter


def l2_of_changes(adapter: Adapter, weight: float) -> Callable[[], None]:
    """A function that adds that gradient to the gradient of the LoRA `adapter`, in place.

    dW itself is never computed: d |dW|^2 / d down = 2 scale^2 (up^T up) down, and d / d up = 2 scale^2 up (down down^T), with
    matrices of rank x rank in brackets. Layers of one shape are one product.
    """
    groups = defaultdict(list)
    for layer in adapter.layers.values():
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        groups[down.shape, up.shape, layer.scaling[ADAPTER]].append((down, up))
    parts = [([down for down, _ in pairs], [up for _, up in pairs], scale) for (*_, scale), pairs in groups.items()]

    @torch.no_grad()
    def add_gradient() -> None:
        for downs, ups, scale in parts:
            down, up = (torch.stack(each).flatten(2) for each in (downs, ups))  # [n, rank, in], [n, out, rank]
            factor = 2 * weight * scale**2
            of_down, of_up = _gram_matrices(up) @ down, up @ _gram_matrices(down.mT)
            for parameters, gradient in ((downs, of_down), (ups, of_up)):
                added = [each.view_as(parameter) for each, parameter in zip(gradient, parameters, strict=True)]
                torch._foreach_add_([parameter.grad for parameter in parameters], added, alpha=factor)

    return add_gradient


def _gram_matrices(matrices: torch.Tensor) -> torch.Tensor:
    """[n, size, rank] -> matrix^T matrix, [n, rank, rank]. A sum over many rows is too few programs for a GPU: it is added up from
    parts, which are no larger than the matrices."""
    n, size, rank = matrices.shape
    parts = matrices.unflatten(1, (-1, math.gcd(size, 128) if rank <= 128 else size)).flatten(0, 1)
    return (parts.mT @ parts).unflatten(0, (n, -1)).sum(1)
