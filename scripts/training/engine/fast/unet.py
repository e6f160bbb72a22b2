"""SDXL's UNet with fast forwards: the arithmetic of diffusers' blocks with PEFT's layers, in fewer and larger kernels.

Queries, keys and values of a self-attention are one product; keys and values of all cross-attentions are two for the whole
UNet, since they read the same text; images are channels last, so that a transformer reads them without a copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from training.engine.fast import torch_ops
from training.engine.fast.lora_linear import FusedAdapter, FusedLoraLinear, frozen_conv, fused_lora_context, fused_lora_linear
from training.engine.step import recomputed
from training.method.adapters import CONTEXT, SELF_ATTENTION

KeysValues = Mapping[str, torch.Tensor]
"""Name of a cross-attention's `to_k` or `to_v` -> [B, tokens, D]."""
Linear = FusedLoraLinear | torch.nn.Module
"""A layer with a LoRA, or one without."""


def fast_ops(device: torch.device) -> ModuleType:
    """The module with the fastest norms and activations for `device`: triton_ops on a GPU, else torch_ops."""
    if device.type != "cuda":
        return torch_ops
    try:
        from training.engine.fast import triton_ops
    except ImportError as error:  # a PyTorch without Triton
        print(f"Triton kernels: off, training is slower ({error})", flush=True)
        return torch_ops
    return triton_ops


def warm_up_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Make cuDNN, cuBLAS and Triton load their kernels by one small norm, convolution and product.

    This takes about a second, during which a network can be read from disk.
    """
    if device.type != "cuda":
        return
    ops = fast_ops(device)
    with torch.cuda.device(device):
        norm = torch.nn.GroupNorm(32, 320, device=device, dtype=dtype).requires_grad_(False)
        kernel = torch.zeros(320, 320, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        image = torch.zeros(1, 320, 16, 16, device=device, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        normed = ops.group_norm(image, None, norm, silu=True)[1]
        rows = torch.nn.functional.conv2d(normed, kernel, padding=1).permute(0, 2, 3, 1).reshape(-1, 320)
        (rows @ kernel[:, :, 0, 0]).sum().backward()
        torch.cuda.synchronize()


def install_fast_forwards(unet: UNet2DConditionModel, fused: FusedAdapter, ops: ModuleType) -> None:
    """Give the blocks of `unet` fast forwards, in place. `fused` are its adapted layers; `ops` is torch_ops or triton_ops."""
    unet.to(memory_format=torch.channels_last)
    modules, groups = dict(unet.named_modules()), fused.groups
    contexts = [name for name in modules if name.endswith((".attn2.to_k", ".attn2.to_v"))]
    # diffusers calls this method once per forward, before the blocks, and hands what it returns to each of them.
    unet.process_encoder_hidden_states = lambda encoder_hidden_states, added_cond_kwargs: _keys_values(
        {name: modules[name] for name in contexts}, groups, encoder_hidden_states
    )
    for name, module in modules.items():
        if isinstance(module, ResnetBlock2D):
            module.forward = partial(_resnet, module, ops)
        elif isinstance(module, Transformer2DModel):
            blocks = [
                Block.of(block, f"{name}.transformer_blocks.{i}", groups, ops) for i, block in enumerate(module.transformer_blocks)
            ]
            proj_in, proj_out = (groups.get(f"{name}.{end}", getattr(module, end)) for end in ("proj_in", "proj_out"))
            module.forward = partial(_transformer, module, ops, proj_in, blocks, proj_out)


def _keys_values(layers: Mapping[str, torch.nn.Module], groups: Mapping[str, FusedLoraLinear], hidden: torch.Tensor) -> KeysValues:
    """Keys and values of all cross-attentions from the text [B, tokens, D]: adapted ones by group, the others one by one."""
    fused = [group for name, group in groups.items() if name.startswith(CONTEXT)]
    outputs = {name: part for group in fused for name, part in zip(group.names, fused_lora_context(hidden, group), strict=True)}
    return {name: outputs[name] if name in outputs else layer(hidden) for name, layer in layers.items()}


def _apply(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    return fused_lora_linear(x, layer) if isinstance(layer, FusedLoraLinear) else layer(x)


@dataclass(frozen=True)
class Block:
    """One transformer block: self-attention, cross-attention, feed-forward, each behind a layer norm."""

    norms: tuple[torch.nn.LayerNorm, torch.nn.LayerNorm, torch.nn.LayerNorm]
    heads: int
    qkv: FusedLoraLinear | None
    """Those of the self-attention's queries, keys and values that are adapted, in this order; None: none is."""
    qkv_layers: Mapping[str, torch.nn.Module]
    """All three by name; those that are not adapted are computed by themselves."""
    out: Linear
    cross_q: Linear
    cross_out: Linear
    key_name: str
    value_name: str
    feed_in: Linear
    feed_out: Linear
    ops: ModuleType

    @classmethod
    def of(cls, block: BasicTransformerBlock, name: str, groups: Mapping[str, FusedLoraLinear], ops: ModuleType) -> "Block":
        def linear(path: str) -> Linear:
            return groups.get(f"{name}.{path}", block.get_submodule(path))

        return cls(
            norms=(block.norm1, block.norm2, block.norm3),
            heads=block.attn1.heads,
            qkv=groups.get(f"{name}.{SELF_ATTENTION}"),
            qkv_layers={f"{name}.attn1.{part}": getattr(block.attn1, part) for part in ("to_q", "to_k", "to_v")},
            out=linear("attn1.to_out.0"),
            cross_q=linear("attn2.to_q"),
            cross_out=linear("attn2.to_out.0"),
            key_name=f"{name}.attn2.to_k",
            value_name=f"{name}.attn2.to_v",
            feed_in=linear("ff.net.0.proj"),
            feed_out=linear("ff.net.2"),
            ops=ops,
        )

    def __call__(
        self, x: torch.Tensor, pending: torch.Tensor | None, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` [B, pixels, D] and the residual that is still to be added to it -> the same two after this block.

        Each residual is added by the kernel of the layer norm that follows it, which saves a pass over `x`.
        """
        x, normed = self.ops.add_layer_norm(x, pending, self.norms[0])
        x, normed = self.ops.add_layer_norm(x, _apply(self.out, self._attend(*self._queries_keys_values(normed))), self.norms[1])
        attended = self._attend(_apply(self.cross_q, normed), keys, values)
        x, normed = self.ops.add_layer_norm(x, _apply(self.cross_out, attended), self.norms[2])
        return x, _apply(self.feed_out, self.ops.geglu(_apply(self.feed_in, normed)))

    def _queries_keys_values(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """[B, pixels, D] -> three of the same shape."""
        parts = {}
        if self.qkv:
            parts = dict(zip(self.qkv.names, fused_lora_linear(x, self.qkv).chunk(len(self.qkv.names), dim=-1), strict=True))
        return [parts[name] if name in parts else layer(x) for name, layer in self.qkv_layers.items()]

    def _attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[B, pixels, D], [B, tokens, D] twice -> [B, pixels, D]."""
        per_head = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (queries, keys, values)]
        return F.scaled_dot_product_attention(*per_head).transpose(1, 2).flatten(2)


def _transformer(
    module: Transformer2DModel,
    ops: ModuleType,
    proj_in: Linear,
    blocks: list[Block],
    proj_out: Linear,
    hidden_states: torch.Tensor,
    encoder_hidden_states: KeysValues,
    **_: object,
) -> tuple[torch.Tensor]:
    """Transformer2DModel: images [B, C, h, w] through the blocks as rows [B, h * w, C], and added to themselves."""
    residual, normed = ops.group_norm(hidden_states, None, module.norm, silu=False)
    x, pending = _apply(proj_in, normed.permute(0, 2, 3, 1).flatten(1, 2)), None
    recomputes = module.gradient_checkpointing and torch.is_grad_enabled()
    for block in blocks:
        run = partial(recomputed, block) if recomputes else block
        x, pending = run(x, pending, encoder_hidden_states[block.key_name], encoder_hidden_states[block.value_name])
    rows = _apply(proj_out, x + pending)
    return (residual + rows.unflatten(1, hidden_states.shape[2:]).permute(0, 3, 1, 2),)


def _resnet(module: ResnetBlock2D, ops: ModuleType, input_tensor: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    """ResnetBlock2D of SDXL: [B, C, h, w] and the time embedding [B, T] -> [B, C', h, w].

    No bias has a kernel of its own: that of the first convolution is added to the time embedding, which is added to its
    output anyway, and that of the second one in the kernel of the residual.
    """
    x, normed = ops.group_norm(input_tensor, None, module.norm1, silu=True)
    plus = F.linear(F.silu(temb), module.time_emb_proj.weight, module.time_emb_proj.bias) + module.conv1.bias
    _, normed = ops.group_norm(frozen_conv(normed, module.conv1), plus, module.norm2, silu=True)
    change = frozen_conv(normed, module.conv2)
    if module.conv_shortcut is None:
        return ops.add_with_bias(x, change, module.conv2.bias)
    # The shortcut is a 1x1 convolution: on channels-last rows a linear layer, whose bias takes that of conv2 along.
    shortcut = module.conv_shortcut
    rows = F.linear(x.permute(0, 2, 3, 1), shortcut.weight.flatten(1), shortcut.bias + module.conv2.bias)
    return rows.permute(0, 3, 1, 2) + change
