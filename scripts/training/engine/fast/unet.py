"""SDXL's UNet with fast forwards: the arithmetic of diffusers' blocks with PEFT's layers, in fewer and larger kernels.

Queries, keys and values of a self-attention are one product; keys and values of all cross-attentions are two for the whole
UNet, since they read the same text; images are channels last, so that a transformer reads them without a copy.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D

from training.engine.fast.feed_forward import fused_feed_forward
from training.engine.fast.lora_conv import LoraConv, frozen_weight, lora_conv
from training.engine.fast.lora_linear import (
    FusedLoraLinear,
    columns_beside,
    fused_lora_context,
    fused_lora_linear,
    fused_lora_linears,
)
from training.engine.fast.ops import (
    add,
    add_layer_norm,
    add_with_bias,
    attend,
    geglu,
    group_norm,
    short_of_bandwidth,
    takes_products,
    upsample,
)
from training.engine.step import recomputed
from training.method.adapters import CONTEXT, SELF_ATTENTION
from training.models.int8 import frozen_conv

KeysValues = Mapping[str, torch.Tensor]
"""Name of a cross-attention's `to_k` or `to_v` -> [B, tokens, D]."""
Layer = Callable[[torch.Tensor], torch.Tensor]
"""A layer with a LoRA, or one without."""


def warm_up_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Make cuDNN, cuBLAS and Triton load their kernels by one small norm, convolution and product.

    This takes about a second, during which a network can be read from disk.
    """
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        norm = torch.nn.GroupNorm(32, 320, device=device, dtype=dtype).requires_grad_(False)
        kernel = torch.zeros(320, 320, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        image = torch.zeros(1, 320, 16, 16, device=device, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        normed = group_norm(image, None, norm, silu=True)[1]
        rows = torch.nn.functional.conv2d(normed, kernel, padding=1).permute(0, 2, 3, 1).reshape(-1, 320)
        (rows @ kernel[:, :, 0, 0]).sum().backward()
        torch.cuda.synchronize()


def install_fast_forwards(
    unet: UNet2DConditionModel, groups: Mapping[str, FusedLoraLinear], convolutions: Mapping[str, LoraConv]
) -> None:
    """Give the blocks of `unet` fast forwards, in place. `groups` and `convolutions` are its adapted layers."""
    modules = dict(unet.named_modules())
    layers = {name: partial(fused_lora_linear, layer=groups[name]) if name in groups else each for name, each in modules.items()}
    contexts = {name: layer for name, layer in modules.items() if name.endswith((".attn2.to_k", ".attn2.to_v"))}
    # diffusers calls this method once per forward, before the blocks, and hands what it returns to each of them.
    unet.process_encoder_hidden_states = lambda encoder_hidden_states, added_cond_kwargs: _keys_values(
        contexts, groups, encoder_hidden_states
    )
    unet.conv_norm_out.forward = lambda x, norm=unet.conv_norm_out: group_norm(x, None, norm, silu=True)[1]
    unet.conv_act.forward = lambda normed: normed  # SiLU, which the norm's kernel computes
    resnets = {name: module for name, module in modules.items() if isinstance(module, ResnetBlock2D)}
    # What diffusers hands to the ResNets is what this returns, here all their time embeddings.
    unet.time_embed_act, columns = _time_embeddings(list(resnets.values()))
    columns = dict(zip(resnets, columns, strict=True))
    for name, module in modules.items():
        if name in resnets:
            convs = (_convolution(modules, f"{name}.conv{i}", convolutions) for i in (1, 2))
            module.forward = partial(_resnet, module, columns[name], *convs)
        elif isinstance(module, Transformer2DModel):
            names = [f"{name}.transformer_blocks.{number}" for number in range(len(module.transformer_blocks))]
            blocks = {each: _block(modules[each], each, layers, groups) for each in names}
            around = [(layers[f"{name}.{path}"], columns_beside(groups.get(f"{name}.{path}"))) for path in ("proj_in", "proj_out")]
            module.forward = partial(_transformer, module, blocks, *around)
        elif isinstance(module, Downsample2D | Upsample2D):
            if f"{name}.conv" in convolutions:
                module.conv.forward = partial(lora_conv, layer=convolutions[f"{name}.conv"], bias=module.conv.bias)
            if isinstance(module, Upsample2D):
                module.forward = partial(_upsample, module)


def _keys_values(layers: Mapping[str, torch.nn.Module], groups: Mapping[str, FusedLoraLinear], hidden: torch.Tensor) -> KeysValues:
    """Keys and values of all cross-attentions from the text [B, tokens, D]: adapted ones by group, the others one by one."""
    fused = [group for name, group in groups.items() if name.startswith(CONTEXT)]
    outputs = {name: part for group in fused for name, part in zip(group.names, fused_lora_context(hidden, group), strict=True)}
    return {name: outputs[name] if name in outputs else layer(hidden) for name, layer in layers.items()}


def _block(block: BasicTransformerBlock, name: str, layers: Mapping[str, Layer], groups: Mapping[str, FusedLoraLinear]) -> Callable:
    """The forward of one transformer block: self-attention, cross-attention, feed-forward, each behind a layer norm."""
    paths = ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
    self_out, cross_q, cross_out, feed_in, feed_out = (layers[f"{name}.{path}"] for path in paths)
    heads = block.attn1.heads
    # Those of queries, keys and values that are adapted are one product; the others are computed by themselves.
    qkv = groups.get(f"{name}.{SELF_ATTENTION}")
    qkv_layers = {path: layers[path] for path in (f"{name}.attn1.{part}" for part in ("to_q", "to_k", "to_v"))}

    adapted = [groups.get(f"{name}.ff.net.{path}") for path in ("0.proj", "2")]
    # Behind the rows that these layers read, and behind their gradients, is a gap for the LoRA's columns.
    gaps = {path: columns_beside(groups.get(f"{name}.{path}")) for path in (SELF_ATTENTION, *paths)}
    fuses = (
        all(adapted)
        and not any(layer.scales for layer in adapted)
        and takes_products(adapted[0].down, *(len(layer.down) for layer in adapted))
        and short_of_bandwidth(adapted[0].down.device)
    )

    def forward(
        x: torch.Tensor, pending: torch.Tensor | None, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` [B, pixels, D] and the residual that is still to be added to it -> the same two after this block.

        Each residual is added by the kernel of the layer norm that follows it, which saves a pass over `x`.
        """
        x, normed = add_layer_norm(x, pending, block.norm1, gaps[SELF_ATTENTION], gaps["ff.net.2"])
        parts = {}
        if qkv:
            parts = dict(zip(qkv.names, fused_lora_linears(normed, qkv), strict=True))
        of_self = [parts[path] if path in parts else layer(normed) for path, layer in qkv_layers.items()]
        attended = attend(*of_self, heads)
        x, normed = add_layer_norm(x, self_out(attended), block.norm2, gaps["attn2.to_q"], gaps["attn1.to_out.0"])
        attended = attend(cross_q(normed), keys, values, heads, gaps["attn2.to_out.0"], gaps["attn2.to_q"])
        x, normed = add_layer_norm(x, cross_out(attended), block.norm3, gaps["ff.net.0.proj"], gaps["attn2.to_out.0"])
        if fuses:
            return x, fused_feed_forward(normed, *adapted, gaps["ff.net.2"], gaps["ff.net.0.proj"])
        return x, feed_out(geglu(feed_in(normed), gaps["ff.net.2"], gaps["ff.net.0.proj"]))

    return forward


def _transformer(
    module: Transformer2DModel,
    blocks: Mapping[str, Callable],
    first: tuple[Layer, int],
    last: tuple[Layer, int],
    hidden_states: torch.Tensor,
    encoder_hidden_states: KeysValues,
    **_: object,
) -> tuple[torch.Tensor]:
    """Transformer2DModel: images [B, C, h, w] through the blocks as rows [B, h * w, C], and added to themselves. `first` and `last`
    are the projections before and behind the blocks, and the columns of their LoRAs."""
    (proj_in, gap), (proj_out, last_gap) = first, last
    residual, normed = group_norm(hidden_states, None, module.norm, silu=False, gap=gap)
    x, pending = proj_in(normed.permute(0, 2, 3, 1).flatten(1, 2)), None
    recomputes = module.gradient_checkpointing and torch.is_grad_enabled()
    for name, block in blocks.items():
        keys, values = (encoder_hidden_states[f"{name}.attn2.{part}"] for part in ("to_k", "to_v"))
        x, pending = recomputed(block, x, pending, keys, values) if recomputes else block(x, pending, keys, values)
    rows = proj_out(add(x, pending, last_gap)).unflatten(1, hidden_states.shape[2:])
    return (add(residual.permute(0, 2, 3, 1), rows).permute(0, 3, 1, 2),)


def _convolution(modules: Mapping[str, torch.nn.Module], name: str, convolutions: Mapping[str, LoraConv]) -> Layer:
    """The convolution of that name without its bias."""
    if name in convolutions:
        return partial(lora_conv, layer=convolutions[name])
    return partial(frozen_conv, weight=partial(frozen_weight, modules[name]), conv=modules[name])


def _time_embeddings(resnets: Sequence[ResnetBlock2D]) -> tuple[Layer, list[slice]]:
    """A function from the time embedding [B, T] to what each of `resnets` adds to the output of its first convolution, including
    that one's bias, side by side; and the columns of each.

    Their layers become views of the joined one, so that none is held twice."""
    layers = [resnet.time_emb_proj for resnet in resnets]
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = torch.cat([layer.bias.detach() + resnet.conv1.bias.detach() for layer, resnet in zip(layers, resnets, strict=True)])
    ends = list(accumulate(layer.out_features for layer in layers))
    columns = [slice(end - layer.out_features, end) for end, layer in zip(ends, layers, strict=True)]
    for layer, part in zip(layers, columns, strict=True):
        layer.weight.data = weight[part]
    return lambda embedding: F.linear(F.silu(embedding), weight, bias), columns


def _resnet(
    module: ResnetBlock2D, part: slice, conv1: Layer, conv2: Layer, input_tensor: torch.Tensor, embeddings: torch.Tensor
) -> torch.Tensor:
    """ResnetBlock2D of SDXL: [B, C, h, w] and the time embeddings of all of them -> [B, C', h, w].

    No bias has a kernel of its own: that of the first convolution is in the time embedding, which is added to its output
    anyway, and that of the second one in the kernel of the residual.
    """
    x, normed = group_norm(input_tensor, None, module.norm1, silu=True)
    _, normed = group_norm(conv1(normed), embeddings[:, part], module.norm2, silu=True)
    change = conv2(normed)
    if module.conv_shortcut is None:
        return add_with_bias(x, change, module.conv2.bias)
    # The shortcut is a 1x1 convolution: on channels-last rows a linear layer, whose bias takes that of conv2 along.
    shortcut = module.conv_shortcut
    rows = F.linear(x.permute(0, 2, 3, 1), frozen_weight(shortcut).flatten(1), shortcut.bias + module.conv2.bias)
    return add(rows, change.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _upsample(module: Upsample2D, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
    """Upsample2D of SDXL; `output_size` is given where the size of the latents is not a multiple of 4, and may be odd."""
    if output_size is not None:
        return module.conv(F.interpolate(hidden_states, size=output_size))
    return module.conv(upsample(hidden_states))
