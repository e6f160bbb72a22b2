"""Norms, activations and residuals of a frozen UNet in PyTorch's own operations, for the CPU; `triton_ops` is for CUDA."""

import torch
import torch.nn.functional as F


def add_layer_norm(x: torch.Tensor, y: torch.Tensor | None, norm: torch.nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` [..., D] and `y` alike (or None) -> their sum, and its layer norm."""
    total = x if y is None else x + y
    return total, norm(total)


def geglu(projected: torch.Tensor) -> torch.Tensor:
    """[..., 2 D] -> first half * gelu(second half) (Shazeer 2020, arXiv 2002.05202, equation 6)."""
    value, gate = projected.chunk(2, dim=-1)
    return value * F.gelu(gate)


def group_norm(
    x: torch.Tensor, plus: torch.Tensor | None, norm: torch.nn.GroupNorm, *, silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` [B, C, h, w], `plus` [B, C] (or None) -> `x` itself, and the group norm of x + plus, with SiLU if requested.

    A caller that also needs `x` itself takes it from here, so that its gradient can be added on the way.
    """
    normed = norm(x if plus is None else x + plus[:, :, None, None])
    return x, F.silu(normed) if silu else normed


def add_with_bias(x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x` + `y` + `bias`: [B, C, h, w] both, and [C]."""
    return x + y + bias[:, None, None]
