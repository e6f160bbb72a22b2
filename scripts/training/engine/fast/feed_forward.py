"""The feed-forward of a transformer block as one differentiable function that does not keep the activations between its layers."""

import torch
from torch.autograd.function import once_differentiable

from training.engine.fast.gradients import add_product
from training.engine.fast.lora_linear import FusedLoraLinear, gradient_of_h, gradient_of_input, product
from training.engine.fast.ops import geglu, geglu_backward_with_lora, geglu_with_products


def fused_feed_forward(
    x: torch.Tensor, feed_in: FusedLoraLinear, feed_out: FusedLoraLinear, gap: int, gap_of_gradient: int
) -> torch.Tensor:
    """[..., D] -> feed_out(geglu(feed_in(x))), with gaps around the GEGLU as in `ops.geglu`."""
    return _FeedForwardFunction.apply(x, feed_in.grad_anchor, feed_in, feed_out, gap, gap_of_gradient)


class _FeedForwardFunction(torch.autograd.Function):
    """Layer by layer, the forward would read the activations [N, 4 D] for h of the second layer, and the backward read them for its
    d_down, and the gradient [N, 8 D] for d_up of the first one. GEGLU and its gradient have these numbers in hand.
    """

    @staticmethod
    def forward(ctx, x, anchor, feed_in, feed_out, gap, gap_of_gradient):
        rows = x.reshape(-1, x.shape[-1])
        projected, h_in = product(rows, feed_in)
        activated = geglu_with_products(projected, feed_out.down) if gap else geglu(projected)
        y, h_out = product(activated, feed_out, has_h=gap > 0)
        ctx.layers, ctx.gap = (feed_in, feed_out), gap_of_gradient
        # In the gap behind the activations, `h_out` would keep them in memory.
        ctx.save_for_backward(rows, h_in, projected, h_out.contiguous())
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (feed_in, feed_out), (rows, h_in, projected, h_out) = ctx.layers, ctx.saved_tensors
        dy_rows, g = gradient_of_h([dy.reshape(len(rows), -1)], feed_out)
        add_product(feed_out.up_grad[0], dy_rows.T, h_out, feed_out.scale)
        d_activated = gradient_of_input(dy_rows, g, feed_out)
        gradients = feed_in.up_grad[0], feed_out.down_grad
        d_projected = geglu_backward_with_lora(projected, d_activated, h_in, g, *gradients, feed_in.scale, ctx.gap)
        del d_activated
        d_projected, g = gradient_of_h([d_projected], feed_in)
        add_product(feed_in.down_grad, g.T, rows, 1.0)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        dx = gradient_of_input(d_projected, g, feed_in)
        return dx.view(*dy.shape[:-1], dx.shape[-1]), None, None, None, None, None
