"""Derive the modules of an SDXL LoRA that ComfyUI loads, and write them to scripts/training/method/comfyui_sdxl_modules.csv.

    python -m demo.comfyui_modules            compare the file with the rule
    python -m demo.comfyui_modules --write    write the file

The rule (ComfyUI, comfy/lora.py): a LoRA module is applied to the weight `<name>.weight` of the UNet in its original layout
if it is called `lora_unet_<name>`, with underscores for dots. The text encoders' names are listed there layer by layer.
The original layout is that of Stability AI's SDXL: numbered input, middle and output blocks.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "scripts" / "training" / "method" / "comfyui_sdxl_modules.csv"
COLUMNS = ("part", "kohya_module", "diffusers_module", "in_features", "out_features")

WIDTHS = (320, 640, 1280)
"""Channels of SDXL's levels, from high to low resolution."""
DEPTHS = (0, 2, 10)
"""Transformer blocks in each attention module of a level; the middle block has as many as the last level."""
RESNETS = 2
"""In each level of the input blocks; the output blocks have one more."""
CONTEXT, TIME, SIZES = 2048, 1280, 2816
"""Width of the text embeddings, of the time embedding, and of pooled embedding and size conditioning together."""
TEXT_ENCODERS = {"te1": (12, 768), "te2": (32, 1280)}
"""Layers and width of CLIP-L and OpenCLIP bigG."""


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution of the UNet."""

    original: str
    """Its name in the original layout, as ComfyUI has it."""
    diffusers: str
    """Its name in diffusers' UNet2DConditionModel."""
    inputs: int
    outputs: int

    @property
    def kohya(self) -> str:
        """The name of the LoRA module that ComfyUI applies to it."""
        return "lora_unet_" + self.original.replace(".", "_")


def unet_layers() -> Iterator[Layer]:
    """Every linear layer and convolution of SDXL's UNet: down, up, middle, and what is around the blocks."""
    yield from _chain("time_embed.{}", "time_embedding.linear_{}", WIDTHS[0])
    yield from _chain("label_emb.0.{}", "add_embedding.linear_{}", SIZES)
    yield Layer("input_blocks.0.0", "conv_in", 4, WIDTHS[0])
    skipped, width = [WIDTHS[0]], WIDTHS[0]
    number = 1
    for level, (level_width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        block = f"down_blocks.{level}"
        for index in range(RESNETS):
            yield from _resnet(f"input_blocks.{number}.0", f"{block}.resnets.{index}", width, level_width)
            yield from _attention(f"input_blocks.{number}.1", f"{block}.attentions.{index}", level_width, depth)
            skipped, width, number = [*skipped, level_width], level_width, number + 1
        if level < len(WIDTHS) - 1:
            yield Layer(f"input_blocks.{number}.0.op", f"{block}.downsamplers.0.conv", width, width)
            skipped, number = [*skipped, width], number + 1

    middle = width
    number = 0
    for level, (level_width, depth) in enumerate(zip(reversed(WIDTHS), reversed(DEPTHS), strict=True)):
        block = f"up_blocks.{level}"
        for index in range(RESNETS + 1):
            yield from _resnet(f"output_blocks.{number}.0", f"{block}.resnets.{index}", width + skipped.pop(), level_width)
            yield from _attention(f"output_blocks.{number}.1", f"{block}.attentions.{index}", level_width, depth)
            width, number = level_width, number + 1
        if level < len(WIDTHS) - 1:  # it comes last in the block, after the attention module if there is one
            yield Layer(f"output_blocks.{number - 1}.{2 if depth else 1}.conv", f"{block}.upsamplers.0.conv", width, width)

    yield from _resnet("middle_block.0", "mid_block.resnets.0", middle, middle)
    yield from _attention("middle_block.1", "mid_block.attentions.0", middle, DEPTHS[-1])
    yield from _resnet("middle_block.2", "mid_block.resnets.1", middle, middle)
    yield Layer("out.2", "conv_out", WIDTHS[0], 4)


def _chain(original: str, diffusers: str, inputs: int) -> Iterator[Layer]:
    """Two linear layers with an activation between them."""
    yield Layer(original.format(0), diffusers.format(1), inputs, TIME)
    yield Layer(original.format(2), diffusers.format(2), TIME, TIME)


def _resnet(original: str, diffusers: str, inputs: int, outputs: int) -> Iterator[Layer]:
    yield Layer(f"{original}.in_layers.2", f"{diffusers}.conv1", inputs, outputs)
    yield Layer(f"{original}.emb_layers.1", f"{diffusers}.time_emb_proj", TIME, outputs)
    yield Layer(f"{original}.out_layers.3", f"{diffusers}.conv2", outputs, outputs)
    if inputs != outputs:
        yield Layer(f"{original}.skip_connection", f"{diffusers}.conv_shortcut", inputs, outputs)


def _attention(original: str, diffusers: str, width: int, depth: int) -> Iterator[Layer]:
    """An attention module, whose layers have the same names in both layouts; nothing if `depth` is 0."""

    def layer(name: str, inputs: int, outputs: int) -> Layer:
        return Layer(f"{original}.{name}", f"{diffusers}.{name}", inputs, outputs)

    if depth:
        yield layer("proj_in", width, width)
        for index in range(depth):
            block = f"transformer_blocks.{index}"
            for attention, context in (("attn1", width), ("attn2", CONTEXT)):
                yield layer(f"{block}.{attention}.to_q", width, width)
                yield layer(f"{block}.{attention}.to_k", context, width)
                yield layer(f"{block}.{attention}.to_v", context, width)
                yield layer(f"{block}.{attention}.to_out.0", width, width)
            yield layer(f"{block}.ff.net.0.proj", width, 2 * 4 * width)  # GEGLU: a value and a gate
            yield layer(f"{block}.ff.net.2", 4 * width, width)
        yield layer("proj_out", width, width)


def table() -> str:
    """The content of the file: the linear layers and convolutions of the UNet, and the linear layers of both text encoders."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for layer in unet_layers():
        writer.writerow(("unet", layer.kohya, layer.diffusers, layer.inputs, layer.outputs))
    for part, (layers, width) in TEXT_ENCODERS.items():
        for index in range(layers):
            prefix = f"lora_{part}_text_model_encoder_layers_{index}"
            for name in ("q", "k", "v", "out"):
                writer.writerow((part, f"{prefix}_self_attn_{name}_proj", "", width, width))
            writer.writerow((part, f"{prefix}_mlp_fc1", "", width, 4 * width))
            writer.writerow((part, f"{prefix}_mlp_fc2", "", 4 * width, width))
    width = TEXT_ENCODERS["te2"][1]
    writer.writerow(("te2", "lora_te2_text_projection", "", width, width))
    return text.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.comfyui_modules", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the file instead of comparing it")
    if parser.parse_args().write:
        FILE.write_text(table(), encoding="utf-8", newline="\n")
        print(f"wrote {FILE}")
    elif FILE.read_text(encoding="utf-8") != table():
        print(f"{FILE} differs from ComfyUI's rule: write it with --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
