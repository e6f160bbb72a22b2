"""How the networks of the tiny world begin: each does a little of its work before it is trained, so that minutes are enough."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

IMAGE_RMS = 0.6
"""Of colours (-1 .. 1), about."""
NO_NOISE = -6.0
"""Of the VAE's logarithm of the variance."""
Connection = tuple[int, int, float]
"""A channel that a convolution writes, the one that it reads for it, and a factor."""


def initialise(network: nn.Module) -> None:
    """Give `network` the weights with which such networks begin."""
    torch.manual_seed(0)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "embedding" in name and weight.dim() == 2 and "time" not in name and "add_embedding" not in name:
                weight.normal_(0, 0.02)
            elif name.endswith(("conv_out.weight", "conv2.weight", "to_out.0.weight", "ff.net.2.weight", "proj_out.weight")):
                weight.mul_(0.2)  # residual branches begin small


def _taps(*line: float) -> torch.Tensor:
    return torch.tensor(line).outer(torch.tensor(line))


CENTRE, MEAN_OF_FOUR, SMOOTH = _taps(0.0, 1.0, 0.0), _taps(0.5, 0.5, 0.0), _taps(0.25, 0.5, 0.25)


def _spread(count: int) -> list[Connection]:
    """`count` channels become pairs of themselves and their negatives: their mean is 0, so that a norm only scales them, and
    silu(x) - silu(-x) is x."""
    return [(2 * channel + sign, channel, 1.0 - 2 * sign) for channel in range(count) for sign in range(2)]


def _gathered(count: int, factor: float = 1.0) -> list[Connection]:
    """The channels of which there are pairs."""
    return [(channel, pair, factor * sign) for pair, channel, sign in _spread(count)]


def _same(count: int, after: int = 0) -> list[Connection]:
    return [(channel, after + channel, 1.0) for channel in range(count)]


def _connect(conv: nn.Module, connections: Iterable[Connection], taps: torch.Tensor = CENTRE) -> None:
    """Let `conv` hand on channels, by `taps` unless it is of one pixel; its other outputs stay as they are."""
    connections = list(connections)
    for target in {target for target, *_ in connections}:
        conv.weight[target], conv.bias[target] = 0, 0
    for target, source, factor in connections:
        conv.weight[target, source] = factor * (taps if conv.kernel_size == (3, 3) else 1)


@torch.no_grad()
def pass_colours(vae: AutoencoderKL) -> None:
    """The mean red, green and blue of every patch are three of its latents, and become an image again."""
    _connect(vae.encoder.conv_in, _spread(3))
    _connect(vae.encoder.conv_out, _gathered(3))
    _connect(vae.decoder.conv_in, _spread(3))
    _connect(vae.decoder.conv_out, _gathered(3, IMAGE_RMS))
    for name, module in vae.named_modules():
        if name.endswith("conv_shortcut"):
            _connect(module, _same(6))
        elif name.endswith("downsamplers.0.conv"):
            _connect(module, _same(6), MEAN_OF_FOUR)
        elif name.endswith("upsamplers.0.conv"):
            _connect(module, _same(6), SMOOTH)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        _connect(conv, _same(4))
    vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, NO_NOISE


@torch.no_grad()
def pass_noise(unet: UNet2DConditionModel) -> None:
    """What comes in is the predicted noise, which it nearly is at large timesteps."""
    last = unet.up_blocks[-1].resnets[-1].conv_shortcut  # reads what conv_in wrote, behind what comes from below
    _connect(unet.conv_in, _spread(4))
    _connect(last, _same(8, after=last.in_channels - unet.conv_in.out_channels))
    _connect(unet.conv_out, _gathered(4))


@torch.no_grad()
def average_words(encoders: Sequence[nn.Module]) -> None:
    """In the first layer, every token sees the mean of those before it, so that the last one knows which there are."""
    for encoder in encoders:
        for name, weight in encoder.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "position_embedding.weight")):
                weight.mul_(0.1)
            elif name.endswith(("v_proj.weight", "out_proj.weight")):
                weight.copy_(torch.eye(len(weight)))
                if name.endswith("out_proj.weight") and ".layers.0." not in name:
                    weight.zero_()
            elif name.endswith("fc2.weight"):
                weight.mul_(0.2)
            elif name.endswith("token_embedding.weight"):
                weight.mul_(5)
            elif name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "out_proj.bias", "fc2.bias")):
                weight.zero_()


@contextmanager
def shallow(unet: UNet2DConditionModel, blocks: int = 1) -> Iterator[None]:
    """Within this block, each transformer has its first `blocks` alone. The others, which add nothing to what passes through them,
    are there again afterwards. Most of them are for the smallest scale: there is little to see in 2 x 2 latents."""
    transformers = [(module, module.transformer_blocks) for module in unet.modules() if isinstance(module, Transformer2DModel)]
    for transformer, everything in transformers:
        for block in everything[blocks:]:
            for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        transformer.transformer_blocks = everything[:blocks]
    try:
        yield
    finally:
        for transformer, everything in transformers:
            transformer.transformer_blocks = everything
