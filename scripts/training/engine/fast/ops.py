"""Norms, activations and residuals of a frozen UNet: on a GPU by Triton kernels, elsewhere in PyTorch's own operations.

In the kernels, residual gradients are added on the way, and only gradients of inputs are computed.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from training.engine.fast.gaps import empty_with_gap, with_gap


@functools.cache
def _kernels() -> ModuleType | None:
    """The Triton kernels; None, with a log line, if this PyTorch has no Triton."""
    try:
        import training.engine.fast.triton_kernels as kernels
    except ImportError as error:
        print(f"Triton kernels: off, training is slower ({error})", flush=True)
        return None
    return kernels


@functools.cache
def _triton(name: str) -> ModuleType:
    """Another module of Triton kernels, which is imported when it is first needed."""
    return importlib.import_module(f"training.engine.fast.triton_{name}")


def _products() -> ModuleType | None:
    """The Triton kernels that compute a LoRA's products as well, if there are Triton kernels."""
    return _triton("products") if _kernels() else None


def copier(flat: torch.Tensor, targets: Sequence[tuple[int, torch.Tensor]], scale: float) -> Callable[[], None]:
    """A function that copies parts of `flat`, times `scale`, to `targets`: where a part begins, and a matrix, whose rows
    need not be contiguous."""
    if flat.is_cuda and _kernels():
        return _kernels().block_copier(flat, targets, scale)

    @torch.no_grad()
    def copy() -> None:
        for start, target in targets:
            target.copy_(flat[start : start + target.numel()].view(target.shape) * scale)

    return copy


def dequantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`codes` [rows, ...] int8 times `scales` [rows, 1, ...], in the dtype of `scales`."""
    return _kernels().dequantize(codes, scales) if codes.is_cuda and _kernels() else codes * scales


def add_layer_norm(
    x: torch.Tensor, y: torch.Tensor | None, norm: torch.nn.LayerNorm, gap: int = 0, gap_of_gradient: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` [..., D] and `y` alike (or None) -> their sum, and its layer norm.

    On a GPU, `gap` columns are left free behind each row of the norm, and `gap_of_gradient` behind those of the sum's gradient.
    """
    if x.is_cuda and _kernels():
        return _AddLayerNorm.apply(x, y, norm.weight, norm.bias, norm.eps, gap, gap_of_gradient)
    total = x if y is None else x + y
    return total, norm(total)


def geglu(projected: torch.Tensor, gap: int = 0, gap_of_gradient: int = 0) -> torch.Tensor:
    """[..., 2 D] -> first half * gelu(second half) (Shazeer 2020, arXiv 2002.05202, equation 6), gaps as in `add_layer_norm`."""
    if projected.is_cuda and _kernels():
        return _Geglu.apply(projected, gap, gap_of_gradient)
    value, gate = projected.chunk(2, dim=-1)
    return value * F.gelu(gate)


def takes_products(like: torch.Tensor, *ranks: int) -> bool:
    """Whether the functions below, which compute a LoRA's products of what they read or write, take the dtype of `like` and LoRAs
    of these ranks."""
    return not like.is_cuda or (bool(_products()) and _products().supports(like.dtype, *ranks))


CARDS_WITH_HBM = {(8, 0), (9, 0), (10, 0), (10, 3)}
"""Compute capabilities of A100, H100 and H200, B200 and B300."""


def short_of_bandwidth(device: torch.device) -> bool:
    """Whether a feed-forward gains there from `geglu_with_products` and `geglu_backward_with_lora`: fewer bytes in slower kernels.

    On an H200 each multiprocessor moves 13 and 15 GB/s in them, less than the card's memory gives it (36). A GB10 has 5.7 GB/s for
    each, an RTX 4090 7.9, an RTX 3090 11, so that memory should be the limit there: computed, not measured.
    """
    return device.type == "cpu" or torch.cuda.get_device_capability(device) not in CARDS_WITH_HBM


def geglu_with_products(projected: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`projected` [N, 2 D] and `factor` [r, D] -> out = geglu(projected), with a gap that holds out factor^T."""
    if projected.is_cuda:
        return _products().geglu_forward_with_products(projected, factor)
    return append_products([geglu(projected)], factor.T[None])[0]


def takes_gradients(dy: torch.Tensor, x: torch.Tensor, rank: int) -> bool:
    """Whether `add_gradients_by_kernel` takes a layer of this rank with the output's gradient `dy` and the input `x`; not on Turing
    (compute capability 7.5), which has too few registers."""
    if not dy.is_cuda or not takes_products(dy, rank) or torch.cuda.get_device_capability(dy.device) < (8, 0):
        return False
    return dy.stride(1) == x.stride(1) == 1


def add_gradients_by_kernel(layers: Sequence[tuple]) -> None:
    """Add both LoRA gradients of each of `layers`, the arguments of `gradients.add_gradients`, on a GPU."""
    _triton("gradients").add_gradients(layers)


def geglu_backward_with_lora(
    projected: torch.Tensor,
    d_out: torch.Tensor,
    h: torch.Tensor,
    g: torch.Tensor,
    up_grad: torch.Tensor,
    down_grad: torch.Tensor,
    scale: float,
    gap: int,
) -> torch.Tensor:
    """The gradient of `projected` [N, 2 D] from that of out = geglu(projected), `d_out` [N, D]; on a GPU with a gap behind it.

    Adds scale * d_projected^T h to `up_grad` [2 D, r] and g^T out to `down_grad` [s, D], in fp32, with `h` [N, r] and `g` [N, s].
    """
    if projected.is_cuda:
        return _products().geglu_backward_with_lora(projected, d_out, h, g, up_grad, down_grad, scale, gap)
    with torch.enable_grad():
        leaf = projected.detach().requires_grad_()
        out = geglu(leaf)
    (d_projected,) = torch.autograd.grad(out, leaf, d_out)
    up_grad += scale * d_projected.to(up_grad.dtype).T @ h.to(up_grad.dtype)
    down_grad += g.to(up_grad.dtype).T @ out.detach().to(up_grad.dtype)
    return d_projected


def append_products(
    parts: Sequence[torch.Tensor], factors: torch.Tensor, *, keeps: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """n `parts` [N, w] and `factors` [n, w, r] -> the parts side by side, [N, n * w], with a gap that holds the product of each
    part and its factor; and with `keeps` the products [N, n * r] once more, or they would keep the rows in memory."""
    if factors.is_cuda:
        return _products().append_products(parts, factors, keeps)
    n, width, rank = factors.shape
    out = empty_with_gap(parts[0], n * width, n * rank)
    products = torch.cat([part @ factor for part, factor in zip(parts, factors, strict=True)], dim=1)
    with_gap(out, n * (width + rank)).copy_(torch.cat([*parts, products], dim=1))
    return out, products if keeps else None


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: int, gap: int = 0, gap_of_gradient: int = 0
) -> torch.Tensor:
    """Queries [B, N, D] attend to keys and values [B, T, D] -> [B, N, D].

    Where a kernel takes them, with 16 to 160 keys (those of a text, and of the self-attention of a small image), `gap` columns are
    left free behind the rows of the result and `gap_of_gradient` behind those of the queries' gradient; elsewhere none are.
    """
    if _attends_by_kernel(queries, keys, heads):
        return _Attention.apply(queries, keys, values, heads, gap, gap_of_gradient)
    per_head = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys, values)]
    return F.scaled_dot_product_attention(*per_head).transpose(1, 2).flatten(2)


def _attends_by_kernel(queries: torch.Tensor, keys: torch.Tensor, heads: int) -> bool:
    if not queries.is_cuda or not _kernels() or torch.cuda.get_device_capability(queries.device) < (8, 0):
        return False
    return _triton("attention").supports(queries.dtype, keys.shape[1], queries.shape[2] // heads)


def group_norm(
    x: torch.Tensor, plus: torch.Tensor | None, norm: torch.nn.GroupNorm, *, silu: bool, gap: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` [B, C, h, w], `plus` [B, C] (or None) -> `x` itself, and the group norm of x + plus, with SiLU if requested.

    A caller that also needs `x` itself takes it from here, so that its gradient can be added on the way. On a GPU, `plus` gets
    no gradient, and `gap` columns are left free behind the channels of each pixel of the norm.
    """
    if x.is_cuda and _kernels():
        return _GroupNorm.apply(x, plus, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, gap)
    total = x if plus is None else x + plus[:, :, None, None]
    normed = F.group_norm(total, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return x, F.silu(normed) if silu else normed


def add(x: torch.Tensor, y: torch.Tensor, gap: int = 0) -> torch.Tensor:
    """`x` + `y`, [..., D] both; on a GPU with a gap behind the rows of the sum."""
    return _Add.apply(x.contiguous(), y.contiguous(), None, gap) if x.is_cuda and _kernels() else x + y


def add_with_bias(x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x` + `y` + `bias`: [B, C, h, w] both, and [C]."""
    if x.is_cuda and _kernels():
        return as_image(_Add.apply(as_rows(x), as_rows(y), bias, 0), x)
    return x + y + bias[:, None, None]


def upsample(x: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, C, 2 h, 2 w], each pixel four times."""
    if x.is_cuda and _kernels():
        return _Upsample.apply(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    return F.interpolate(x, scale_factor=2.0)


def scale_columns(y: torch.Tensor, g: torch.Tensor, bias: torch.Tensor | None) -> None:
    """`y` [N, D], contiguous, times `g` [D] fp32, plus `bias` [D], in place and without autograd."""
    if y.is_cuda and _kernels():
        _kernels().scale_columns(y, g, bias)
    else:
        y.copy_(y * g if bias is None else y * g + bias)


def scale_columns_backward(
    dy: torch.Tensor, y: torch.Tensor, g: torch.Tensor, bias: torch.Tensor | None, gap: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """From `dy` and `y` [N, D]: the gradient of what was scaled to `y`, with a gap behind its rows, and the sum of
    dy (y - bias) over the rows, [D] fp32: the gradient of `g`, times `g`."""
    if y.is_cuda and _kernels():
        return _kernels().scale_columns_backward(dy, y, g, bias, gap)
    dx = empty_with_gap(dy, y.shape[1], gap).copy_(dy * g)
    return dx, (dy * (y if bias is None else y - bias)).sum(0, dtype=g.dtype)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, bias, eps, gap, gap_of_gradient):
        total, normed, mean, rstd = _kernels().layer_norm_forward(y, x, weight, bias, eps, gap)
        ctx.adds, ctx.gap = y is not None, gap_of_gradient
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.set_materialize_grads(False)  # an output that nothing uses has the gradient None instead of a tensor of zeros
        return total.view_as(total), normed  # without y, `total` is x itself, which autograd does not allow as an output

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, d_normed):
        dx = _kernels().layer_norm_backward(*ctx.saved_tensors, d_normed.contiguous(), d_total, ctx.gap)
        return dx, dx if ctx.adds else None, None, None, None, None, None


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, gap, gap_of_gradient):
        rows = projected.view(-1, projected.shape[-1])
        ctx.save_for_backward(rows)
        ctx.gap = gap_of_gradient
        return _kernels().geglu_forward(rows, gap).unflatten(0, projected.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (rows,) = ctx.saved_tensors
        d_projected = _kernels().geglu_backward(rows, d_out.reshape(rows.shape[0], -1).contiguous(), ctx.gap)
        return d_projected.unflatten(0, d_out.shape[:-1]), None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, values, heads, gap, gap_of_gradient):
        out, logs = _triton("attention").attend(queries, keys, values, heads, gap)
        ctx.heads, ctx.gap = heads, gap_of_gradient
        ctx.save_for_backward(queries, keys, values, logs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return *_triton("attention").attend_backward(*ctx.saved_tensors, d_out, ctx.heads, ctx.gap), None, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plus, weight, bias, groups, eps, silu, gap):
        rows = as_rows(x)
        out, kept = _triton("group_norms").group_norm_forward(rows, plus, weight, bias, groups, eps, silu, gap)
        ctx.groups, ctx.silu = groups, silu
        ctx.save_for_backward(rows, plus, weight, *kept)
        ctx.set_materialize_grads(False)
        # x is returned as well: code that needs it besides the norm takes it from here. Its gradient comes back as d_x, which
        # the kernel of the norm's gradient adds.
        return x.view_as(x), as_image(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_x, d_normed):
        rows, plus, weight, *kept = ctx.saved_tensors
        d_rows = None if d_x is None else as_rows(d_x)
        dx = _triton("group_norms").group_norm_backward(rows, plus, weight, ctx.groups, ctx.silu, kept, as_rows(d_normed), d_rows)
        return as_image(dx, d_normed), None, None, None, None, None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, bias, gap):
        return _kernels().add(x, y, bias, gap)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return d_out, d_out, None, None


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return _kernels().upsample(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return _kernels().upsample_backward(d_out.contiguous())


def as_rows(image: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] as contiguous [B, h * w, C]; a copy only if it is not channels last."""
    return image.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def as_image(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The reverse, with height and width of `like`."""
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
