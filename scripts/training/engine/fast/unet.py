"""SDXL's UNet, quickened: the same arithmetic as diffusers' blocks with PEFT's layers in them, in fewer and larger kernels.

`install_fast_forwards` gives the blocks of a UNet new forwards in place. Queries, keys and values of a self-attention are one
product; keys and values of all cross-attentions are two for the whole UNet, since they read the same text; images lie channels
last, so that a transformer reads them without a copy.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F

from training.engine.fast import torch_ops as plain_ops
from training.engine.fast.lora_linear import FusedLoraLinear, frozen_conv, fused_lora_context, fused_lora_linear
from training.method.adapters import CONTEXT, SELF_ATTENTION
from training.models.loading import BasicTransformerBlock, ResnetBlock2D, Transformer2DModel, UNet2DConditionModel

KeysValues = Mapping[str, torch.Tensor]
"""Name of a cross-attention's `to_k` or `to_v` -> [B, tokens, D]."""


Linear = FusedLoraLinear | torch.nn.Linear


def fast_ops(device: torch.device) -> ModuleType:
    """The fastest norms and activations that there are for `device`."""
    if device.type != "cuda":
        return plain_ops
    try:
        from training.engine.fast import triton_ops
    except ImportError as error:  # a PyTorch without Triton
        print(f"training without its Triton kernels, slower: {error}", flush=True)
        return plain_ops
    return triton_ops


def load_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Make cuDNN, cuBLAS and Triton load what they need for the first time, with a norm, a convolution and a product of no use.
    It takes a second, in which a network can be read."""
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


def install_fast_forwards(
    unet: UNet2DConditionModel, stacks: Mapping[str, tuple[tuple[str, ...], FusedLoraLinear]], ops: ModuleType
) -> None:
    """Give `unet` fast forwards, in place. `stacks` are its adapted layers by name, `ops` is plain_ops or triton_ops."""
    unet.to(memory_format=torch.channels_last)
    contexts = [stack for name, stack in stacks.items() if name.startswith(CONTEXT)]
    unet.process_encoder_hidden_states = lambda encoder_hidden_states, added_cond_kwargs: _keys_values(
        contexts, encoder_hidden_states
    )
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D):
            module.forward = partial(_resnet, module, ops)
        elif isinstance(module, Transformer2DModel):
            blocks = [
                Block.of(block, f"{name}.transformer_blocks.{i}", stacks, ops) for i, block in enumerate(module.transformer_blocks)
            ]
            proj_in, proj_out = (_linear_of(f"{name}.{end}", getattr(module, end), stacks) for end in ("proj_in", "proj_out"))
            module.forward = partial(_transformer, module, ops, proj_in, blocks, proj_out)


def _keys_values(contexts: list[tuple[tuple[str, ...], FusedLoraLinear]], hidden: torch.Tensor) -> KeysValues:
    """The keys and values of all cross-attentions from the text [B, tokens, D]."""
    return {name: part for names, layer in contexts for name, part in zip(names, fused_lora_context(hidden, layer), strict=True)}


def _linear_of(name: str, module: torch.nn.Module, stacks: Mapping[str, tuple[tuple[str, ...], FusedLoraLinear]]) -> Linear:
    return stacks[name][1] if name in stacks else module


def _apply(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    return fused_lora_linear(x, layer) if isinstance(layer, FusedLoraLinear) else layer(x)


@dataclass(frozen=True)
class Block:
    """One transformer block: self-attention, cross-attention, feed-forward, each behind a layer norm."""

    norms: tuple[torch.nn.LayerNorm, torch.nn.LayerNorm, torch.nn.LayerNorm]
    heads: int
    qkv: FusedLoraLinear
    out: FusedLoraLinear
    cross_q: FusedLoraLinear
    cross_out: FusedLoraLinear
    key_name: str
    value_name: str
    feed_in: Linear
    feed_out: Linear
    ops: ModuleType

    @classmethod
    def of(cls, block: BasicTransformerBlock, name: str, stacks: Mapping, ops: ModuleType) -> "Block":
        return cls(
            norms=(block.norm1, block.norm2, block.norm3),
            heads=block.attn1.heads,
            qkv=stacks[f"{name}.{SELF_ATTENTION}"][1],
            out=stacks[f"{name}.attn1.to_out.0"][1],
            cross_q=stacks[f"{name}.attn2.to_q"][1],
            cross_out=stacks[f"{name}.attn2.to_out.0"][1],
            key_name=f"{name}.attn2.to_k",
            value_name=f"{name}.attn2.to_v",
            feed_in=_linear_of(f"{name}.ff.net.0.proj", block.ff.net[0].proj, stacks),
            feed_out=_linear_of(f"{name}.ff.net.2", block.ff.net[2], stacks),
            ops=ops,
        )

    def __call__(
        self, x: torch.Tensor, pending: torch.Tensor | None, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` [B, pixels, D] and what is still to be added to it -> the same two after this block."""
        x, normed = self.ops.add_layer_norm(x, pending, self.norms[0])
        queries, own_keys, own_values = _apply(self.qkv, normed).chunk(3, dim=-1)
        x, normed = self.ops.add_layer_norm(x, _apply(self.out, self._attend(queries, own_keys, own_values)), self.norms[1])
        attended = self._attend(_apply(self.cross_q, normed), keys, values)
        x, normed = self.ops.add_layer_norm(x, _apply(self.cross_out, attended), self.norms[2])
        return x, _apply(self.feed_out, self.ops.geglu(_apply(self.feed_in, normed)))

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
    run: Callable = _recomputed if module.gradient_checkpointing and torch.is_grad_enabled() else _kept
    for block in blocks:
        x, pending = run(block, x, pending, encoder_hidden_states[block.key_name], encoder_hidden_states[block.value_name])
    rows = _apply(proj_out, x + pending)
    return (residual + rows.unflatten(1, hidden_states.shape[2:]).permute(0, 3, 1, 2),)


def _kept(block: Block, *args: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return block(*args)


def _recomputed(block: Callable, *args: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The block's activations are computed again in the backward. Nothing in it is random, and asking for the generator's
    state would break the capture of a CUDA graph."""
    return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)


def checkpoint_everything(unet: UNet2DConditionModel) -> None:
    """Recompute the activations of every ResNet and transformer block in the backward."""
    unet.enable_gradient_checkpointing(_recomputed)


def _resnet(module: ResnetBlock2D, ops: ModuleType, input_tensor: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    """ResnetBlock2D of SDXL: [B, C, h, w] and the time embedding [B, T] -> [B, C', h, w]. Biases ride on other sums."""
    x, normed = ops.group_norm(input_tensor, None, module.norm1, silu=True)
    plus = F.linear(F.silu(temb), module.time_emb_proj.weight, module.time_emb_proj.bias) + module.conv1.bias
    _, normed = ops.group_norm(frozen_conv(normed, module.conv1), plus, module.norm2, silu=True)
    change = frozen_conv(normed, module.conv2)
    if module.conv_shortcut is None:
        return ops.add_with_bias(x, change, module.conv2.bias)
    shortcut = module.conv_shortcut
    rows = F.linear(x.permute(0, 2, 3, 1), shortcut.weight.flatten(1), shortcut.bias + module.conv2.bias)
    return rows.permute(0, 3, 1, 2) + change
