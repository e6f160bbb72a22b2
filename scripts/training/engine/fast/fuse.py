"""The layers of the fast engine, built from the PEFT layers of an adapter, and the copy of the weights with which they compute."""

import math
from collections.abc import Callable, Sequence

import torch

from training.engine.fast.lora_conv import RANK_MULTIPLE, LoraConv
from training.engine.fast.lora_linear import FusedLoraLinear
from training.engine.fast.ops import copier
from training.engine.fast.row_scales import row_scales
from training.method.adapters import ADAPTER, CONTEXT, Adapter, shared_input_groups
from training.models.int8 import Int8Linear


def fuse(adapter: Adapter) -> tuple[dict[str, FusedLoraLinear], dict[str, LoraConv], Callable[..., None]]:
    """The fused linear layers of `adapter` by the name of the group, its convolutions by name, and a function that copies the fp32
    weights to those with which they compute, or with False makes them compute without a LoRA.

    The frozen weights of a group are joined, and its base layers become views of the joined one, so that none is held twice.
    """
    weights = adapter.weights.detach()
    anchor = torch.zeros((), device=weights.device, requires_grad=True)
    scales, update_scales = row_scales(adapter) if adapter.modules[0].magnitude is not None else (None, None)
    start, outputs, groups, convolutions = 0, 0, {}, {}
    downs, ups = [], {}
    """Where a part of the flat weights begins, and the tensor with which layers compute; those of `up` by scale."""
    for group, names in shared_input_groups(adapter.layers.items()).items():
        bases = [adapter.layers[name].base_layer for name in names]
        n, (out, *inputs) = len(names), bases[0].weight.shape
        rank, scale = adapter.layers[names[0]].r[ADAPTER], adapter.layers[names[0]].scaling[ADAPTER]
        # In the flat weights all `down` of a group come before all `up`, without a gap.
        middle = start + n * rank * math.prod(inputs)
        end = middle + n * rank * out
        down_grad, up_grad = adapter.sums[start:middle].view(n * rank, *inputs), adapter.sums[middle:end].view(n, out, rank)
        part = scales and scales.part(outputs, outputs + n * out)
        if isinstance(bases[0], torch.nn.Conv2d):
            down, up = _padded(bases[0].weight, rank)
            convolutions[group] = LoraConv(bases[0], down, up, down_grad, up_grad[0], scale, anchor, part)
            down, up = down.flatten(1)[:rank], up[None, :, :rank]
        else:
            is_wide = not group.startswith(CONTEXT) and not isinstance(bases[0], Int8Linear)
            matrices = _joined(bases, rank) if is_wide else _separate(bases, rank)
            _, _, _, down, up, _, _ = matrices
            groups[group] = FusedLoraLinear(tuple(names), *matrices, down_grad, up_grad, scale, anchor, part)
        downs.append((start, down))
        ups.setdefault(scale, []).extend((middle + number * rank * out, each) for number, each in enumerate(up))
        start, outputs = end, outputs + n * out
    copy_downs = copier(weights, downs, 1.0)
    copies_of_ups = [copier(weights, parts, scale) for scale, parts in ups.items()]
    copy_zeros = copier(weights, [part for parts in ups.values() for part in parts], 0.0)

    def sync_compute_weights(adapts: bool = True) -> None:
        if update_scales:
            update_scales(adapts)
        if not adapts:
            copy_zeros()
            return
        copy_downs()
        for copy in copies_of_ups:
            copy()

    return groups, convolutions, sync_compute_weights


def _padded(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros for `down` and `up` of a convolution with this `weight`."""
    columns = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
    return weight.new_zeros(columns, *weight.shape[1:]), weight.new_zeros(len(weight), columns)


def _joined(linears: Sequence[torch.nn.Linear], rank: int) -> tuple[torch.Tensor | None, ...]:
    """From `weight` to `weight_and_down` of a FusedLoraLinear, views of one matrix; so are the weights of `linears` then."""
    n, (out, width) = len(linears), linears[0].weight.shape
    rows, columns = n * out, width + n * rank
    matrix = linears[0].weight.new_zeros(rows + n * rank, columns)
    for number, linear in enumerate(linears):
        part = matrix[number * out : (number + 1) * out, :width]
        part.copy_(linear.weight.detach())
        linear.weight.data = part  # the parameter itself stays: others refer to it
    # The LoRA of each layer adds to its own rows only: the rest beside W stays zero.
    up = matrix.as_strided((n, out, rank), (out * columns + rank, columns, 1), width)
    return matrix[:rows, :width], None, _joined_bias(linears), matrix[rows:, :width], up, matrix[:rows], matrix[:, :width]


def _separate(linears: Sequence[torch.nn.Linear], rank: int) -> tuple[torch.Tensor | None, ...]:
    """The same, with a matrix of its own for `weight`, `down` and `up`."""
    n, like = len(linears), linears[0].weight
    out, width = like.shape
    if isinstance(linears[0], Int8Linear):
        weight, scales = (torch.cat([getattr(linear, part) for linear in linears]) for part in ("codes", "scales"))
        for number, linear in enumerate(linears):
            rows = slice(number * out, (number + 1) * out)
            linear.codes, linear.scales = weight[rows], scales[rows]
    else:
        weight, scales = torch.cat([linear.weight.detach() for linear in linears]), None
        for linear, part in zip(linears, weight.split(out), strict=True):
            linear.weight.data = part
    down, up = like.new_zeros(n * rank, width), like.new_zeros(n, out, rank)
    return weight, scales, _joined_bias(linears), down, up, None, None


def _joined_bias(linears: Sequence[torch.nn.Linear]) -> torch.Tensor | None:
    return None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
