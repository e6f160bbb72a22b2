"""What a layer of a LoRA file changes: the formulas of LoRA, LoHa, LoKr and DoRA, as ComfyUI computes them (comfy/weight_adapter).

LoHa: Hyeon-Woo et al. 2021, arXiv 2108.06098; LoKr: Yeh et al. 2023, arXiv 2309.14859; DoRA: Liu et al. 2024, arXiv 2402.09353.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.errors import ModelError
from training.lora_files.reading import Layer

Tensors = dict[str, torch.Tensor]

_CONVOLUTION = re.compile(r"lora_unet_(input_blocks_0_0|out_2|.+_(in_layers_2|out_layers_3|op|conv))")
"""SDXL's layers with a kernel of 3 x 3; a LoHa's tensors do not show it."""


@dataclass(frozen=True)
class Factors:
    """A change that is the product of two matrices: scale * up @ down."""

    up: torch.Tensor
    """[out, r]"""
    down: torch.Tensor
    """[r, in * height * width of the kernel]"""
    scale: float
    kernel: tuple[int, ...]
    """Height and width; () for a linear layer."""

    def as_tensors(self, up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two factors of this layer in the shapes of a LoRA file: of a convolution [out, r, 1, 1] and [r, in, height, width]."""
        if not self.kernel:
            return up, down
        return up[:, :, None, None], down.reshape(len(down), -1, *self.kernel)


def factors(layer: Layer, tensors: Tensors) -> Factors:
    """The change of a layer as one product, exactly. `tensors` are those of `layer.read()`, or of `layer.shapes()`.

    A LoHa of rank r becomes a product of rank r^2, but at most of full rank, a LoKr one of up to full rank. Raises ModelError if
    the shapes do not match, and for what is no such product: a DoRA, whose change depends on the weight of the model, and full
    differences.
    """
    if layer.is_dora:
        raise ModelError(f"{layer.path}: is a DoRA, whose change depends on the base model: only `bake` can apply it")
    if layer.parts.keys() & {"diff", "diff_b"}:
        raise ModelError(f"{layer.path}: holds full differences ({layer.name}), which have no rank: only `bake` can apply them")
    with _checked_shapes(layer):
        pairs, kernel = _pairs(layer, tensors)
        up, down = pairs[-1]
        first_up, first_down = pairs[0]
        if layer.kind == "LoHa" and first_up.shape[1] * up.shape[1] > min(len(up), down.shape[1]):
            up, down = _as_pair((first_up @ first_down) * (up @ down))
        elif layer.kind == "LoHa":
            up = (first_up[:, :, None] * up[:, None, :]).flatten(1)
            down = (first_down[:, None, :] * down[None, :, :]).flatten(0, 1)
        elif layer.kind == "LoKr":
            first = first_up @ first_down
            up, down = torch.kron(first, up), torch.kron(torch.eye(first.shape[1], device=first.device), down)
        if up.shape[1] != len(down) or not len(down):
            raise RuntimeError
        if not kernel and _CONVOLUTION.fullmatch(layer.name):
            kernel = (3, 3)
        if down.shape[1] % math.prod(kernel):
            raise RuntimeError
    return Factors(up, down, scale_of(layer, tensors), kernel)


def apply(weight: torch.Tensor, layer: Layer, strength: float) -> torch.Tensor:
    """`weight` with the change of the layer, `strength` times; in fp32."""
    tensors, weight = layer.read(), weight.float()
    with _checked_shapes(layer, f"the checkpoint's is {list(weight.shape)}: this LoRA is for another base model"):
        delta = delta_of(layer, tensors)
        if len(delta) != len(weight):
            raise RuntimeError
        delta = delta.reshape(weight.shape)
    scale = scale_of(layer, tensors)
    if "dora_scale" in tensors:
        changed = _with_norms(weight, weight + scale * delta, tensors["dora_scale"])
    elif "magnitude" in tensors:
        changed = weight + scale * delta
        changed *= tensors["magnitude"].reshape(-1, *[1] * (weight.ndim - 1)) / _norms(changed, 0)
    else:
        return weight + (strength * scale) * delta
    return changed if strength == 1 else weight + strength * (changed - weight)


def delta_of(layer: Layer, tensors: Tensors) -> torch.Tensor:
    """The change of the weight before it is scaled."""
    if layer.kind == "full":
        return tensors["diff"]
    pairs, _ = _pairs(layer, tensors)
    products = [up @ down for up, down in pairs]
    if layer.kind == "LoKr":
        return torch.kron(*products)
    return math.prod(products[1:], start=products[0])


def _pairs(layer: Layer, tensors: Tensors) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], tuple[int, ...]]:
    """The products of two matrices that the change consists of, and the kernel, as far as the tensors show it.

    LoRA: one product. LoHa: two, multiplied element by element. LoKr: the two factors of a Kronecker product.
    """
    if layer.kind == "LoRA":
        up, down, mid = tensors["up"].flatten(1), tensors["down"], tensors.get("mid")
        if mid is None:
            return [(up, down.flatten(1))], tuple(down.shape[2:])
        return [(up, torch.einsum("mn...,ni->mi...", mid, down.flatten(1)).flatten(1))], tuple(mid.shape[2:])
    prefix = "hada" if layer.kind == "LoHa" else "lokr"
    pairs, kernel = [], ()
    for number in (1, 2):
        whole, core = tensors.get(f"{prefix}_w{number}"), tensors.get(f"{prefix}_t{number}")
        if whole is not None:
            kernel = kernel or tuple(whole.shape[2:])
            pairs.append(_as_pair(whole.flatten(1)))
            continue
        left, right = tensors[f"{prefix}_w{number}_a"], tensors[f"{prefix}_w{number}_b"]
        if core is not None:  # a Tucker decomposition, whose left factor is stored transposed
            kernel = tuple(core.shape[2:])
            left, right = left.T, torch.einsum("ij...,jn->in...", core, right)
        pairs.append((left, right.flatten(1)))
    return pairs, kernel


def _as_pair(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors of a matrix of any rank: itself and the smaller identity."""
    identity = torch.eye(min(matrix.shape), device=matrix.device)
    return (identity, matrix) if matrix.shape[0] < matrix.shape[1] else (matrix, identity)


def scale_of(layer: Layer, tensors: Tensors) -> float:
    """alpha / rank; 1 without an alpha."""
    if layer.configured_scale is not None:
        return layer.configured_scale
    of_rank = {"LoRA": ["down"], "LoHa": ["hada_w1_b"], "LoKr": ["lokr_w2_b", "lokr_w1_b"]}.get(layer.kind, [])
    rank = next((len(tensors[part]) for part in of_rank if part in tensors), None)
    return tensors["alpha"].item() / rank if rank and "alpha" in tensors else 1.0


def _with_norms(weight: torch.Tensor, changed: torch.Tensor, dora_scale: torch.Tensor) -> torch.Tensor:
    """`changed` with the norms of DoRA as ComfyUI sets them: relative to those of the rows of the frozen `weight`, or, if there is
    one for each column, to those of the columns of `changed`."""
    norms = _norms(weight, 0) if len(dora_scale) == len(weight) else _norms(changed, 1)
    return changed * (dora_scale.reshape(norms.shape) / (norms + torch.finfo(torch.float32).eps))


def _norms(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """The norms of the slices of `weight` along `axis`, in a shape that `weight` can be divided by."""
    others = [dimension for dimension in range(weight.ndim) if dimension != axis]
    return torch.linalg.vector_norm(weight, dim=others, keepdim=True)


@contextlib.contextmanager
def _checked_shapes(layer: Layer, expectation: str = "which do not match: download it again") -> Iterator[None]:
    """Computations with tensors whose shapes do not match raise a ModelError."""
    try:
        yield
    except (RuntimeError, IndexError, TypeError):
        shapes = ", ".join(f"{part} {list(stored.shape)}" for part, stored in layer.parts.items() if part != "alpha")
        raise ModelError(f"{layer.path}: the layer {layer.name} has {shapes}; {expectation}") from None
