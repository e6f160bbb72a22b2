"""The feed-forward of a transformer block as one differentiable function, whose GEGLU computes products of the LoRAs around it."""

import torch
from torch.autograd.function import once_differentiable

from training.engine.fast.gaps import with_gap
from training.engine.fast.lora_linear import FusedLoraLinear, accumulate, gradient_of_h, gradient_of_input, product
from training.engine.fast.ops import geglu, geglu_backward_with_lora, geglu_backward_with_products, geglu_with_products


def fused_feed_forward(
    x: torch.Tensor, feed_in: FusedLoraLinear, feed_out: FusedLoraLinear, gap: int, gap_of_gradient: int, *, keeps: bool
) -> torch.Tensor:
    """[..., D] -> feed_out(geglu(feed_in(x))), with gaps around the GEGLU as in `ops.geglu`. `keeps` the activations between them
    for the backward; both gaps are needed then."""
    return _FeedForwardFunction.apply(x, feed_in.grad_anchor, feed_in, feed_out, gap, gap_of_gradient, keeps)


class _FeedForwardFunction(torch.autograd.Function):
    """Layer by layer, the activations [N, 4 D] are read once more for h of the second layer, and their gradient's [N, 8 D] for g of
    the first one. GEGLU and its gradient have these numbers in hand.

    Where activations are not kept, they do not have to be written for d_down of the second layer and read, nor the gradient read
    for d_up of the first one: both are sums over the rows, which GEGLU's gradient adds up instead of g.
    """

    @staticmethod
    def forward(ctx, x, anchor, feed_in, feed_out, gap, gap_of_gradient, keeps):
        rows = x.reshape(-1, x.shape[-1])
        projected, h_in = product(rows, feed_in)
        activated = geglu_with_products(projected, feed_out.down) if gap else geglu(projected)
        y, h_out = product(activated, feed_out, has_h=bool(gap))
        ctx.layers, ctx.gap = (feed_in, feed_out), gap_of_gradient
        # In the gap behind the activations, `h_out` would keep them in memory.
        ctx.save_for_backward(rows, h_in, projected, *((h_out, activated) if keeps else (h_out.contiguous(), None)))
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (feed_in, feed_out), (rows, h_in, projected, h_out, activated) = ctx.layers, ctx.saved_tensors
        dy_rows, g = gradient_of_h([dy.reshape(len(rows), -1)], feed_out)
        accumulate(feed_out.up_grad[0], dy_rows.T, h_out, feed_out.scale)
        d_activated = gradient_of_input(dy_rows, g, feed_out)
        if activated is None:
            gradients = feed_in.up_grad[0], feed_out.down_grad
            d_projected = geglu_backward_with_lora(projected, d_activated, h_in, g, *gradients, feed_in.scale, ctx.gap)
            del d_activated
            d_projected, g = gradient_of_h([d_projected], feed_in)
        else:
            accumulate(feed_out.down_grad, g.T, activated, 1.0)
            d_projected = geglu_backward_with_products(projected, d_activated, feed_in.up[0])
            del d_activated
            g = with_gap(d_projected, d_projected.shape[1] + ctx.gap)[:, d_projected.shape[1] :]
            accumulate(feed_in.up_grad[0], d_projected.T, h_in, feed_in.scale)
        accumulate(feed_in.down_grad, g.T, rows, 1.0)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None, None
        dx = gradient_of_input(d_projected, g, feed_in)
        return dx.view(*dy.shape[:-1], dx.shape[-1]), None, None, None, None, None, None
