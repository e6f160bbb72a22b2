"""What a LoRA file holds, as text: its metadata, how much it changes in each block, and how many ranks that takes."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from common.errors import abbreviated
from common.progress import ProgressBar
from training.lora_files.changes import delta_of, factors, scale_of
from training.lora_files.reading import Layer, LoraFile
from training.method.comfyui_modules import comfyui_modules
from training.method.low_rank import rank_of_energy, svd_of_product

_BLOCK = re.compile(r"lora_(?:unet_)?(input_blocks_\d+|middle_block|output_blocks_\d+|te\d|time_embed|label_emb|out)_")
_BLOCK_NAMES = {"te1": "text encoder CLIP-L", "te2": "text encoder CLIP-G"}
_MOST_CHARACTERS = 160
"""Of a value of the metadata; kohya's lists of tags have thousands."""
_MOST_RANKS = 256
"""The singular values of a LoHa or LoKr whose exact rank is greater would take minutes."""
_ENERGY = 0.95


@dataclass
class Block:
    """The sums over the layers of a block."""

    layers: int = 0
    squared_norm: float = 0.0
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """[r]: the sum of the layers' squared singular values, the greatest first."""
    ranks: list[int] = field(default_factory=list)
    """How many ranks of each layer hold _ENERGY."""

    def add(self, squared_norm: float, values: torch.Tensor | None) -> None:
        self.layers += 1
        self.squared_norm += squared_norm
        if values is not None:
            longer = torch.zeros(max(len(self.squares), len(values)), dtype=torch.float64)
            longer[: len(self.squares)] += self.squares
            longer[: len(values)] += values**2
            self.squares = longer
            self.ranks.append(rank_of_energy(values, _ENERGY))


def summarize(file: LoraFile) -> str:
    """The report of `lora_tool.py show`. Reads every weight."""
    return "\n".join([*_metadata(file), *_contents(file), *_blocks(file)])


def _metadata(file: LoraFile) -> Iterator[str]:
    yield f"{file.path.name}: {file.path.stat().st_size / 2**20:.1f} MiB"
    yield "metadata:" if file.header.metadata else "metadata: none"
    for key, text in sorted(file.header.metadata.items()):
        more = f"... ({len(text)} characters)" if len(text) > _MOST_CHARACTERS else ""
        yield f"  {repr(key)[1:-1]} = {repr(text[:_MOST_CHARACTERS])[1:-1]}{more}"  # control characters must not reach a terminal


def _contents(file: LoraFile) -> Iterator[str]:
    """Kinds, types, ranks and alphas."""
    layers = file.layers.values()
    kinds = Counter(f"{layer.kind}{' with DoRA' if layer.is_dora else ''}" for layer in layers)
    yield f"layers: {len(layers)} ({_counted(kinds)}), {', '.join(dtype.lower() for dtype in file.dtypes)}"
    ranks, scales = Counter(), Counter()
    for layer in layers:
        shapes = layer.shapes()
        rank = next((len(shapes[part]) for part in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if part in shapes), None)
        ranks["full" if rank is None else rank] += 1
        scales[f"{scale_of(layer, shapes):.6g}" + ("" if "alpha" in shapes or layer.configured_scale else " (no alpha)")] += 1
    yield f"rank: {_counted(ranks)}"
    yield f"scale (alpha / rank): {_counted(scales)}"
    if unknown := [name for name in file.layers if name not in comfyui_modules()]:
        yield f"not layers of SDXL: {len(unknown)} ({abbreviated(unknown, 3)})"
    if file.others:
        yield f"other tensors: {len(file.others)} ({abbreviated(file.others, 3)})"


def _counted(counts: Counter) -> str:
    """Each value and how often it occurs, if there are several; the most frequent first."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    most = counts.most_common(8)
    more = f" and {len(counts) - len(most)} more" if len(counts) > len(most) else ""
    return ", ".join(f"{value} ({count}x)" for value, count in most) + more


def _blocks(file: LoraFile) -> Iterator[str]:
    """A table: for each block the norm of the change, and how much of its energy the first ranks hold."""
    blocks: dict[str, Block] = {}
    total = Block()
    with ProgressBar(len(file.layers), "show", "layers") as bar:
        for name, layer in file.layers.items():
            match = _BLOCK.match(name)
            block = blocks.setdefault(_BLOCK_NAMES.get(match[1], match[1]) if match else "other layers", Block())
            measured = _measure(layer)
            block.add(*measured)
            total.add(*measured)
            bar.update()
    columns = [2**power for power in range(12) if 2**power < len(total.squares)]
    yield ""
    yield "norm: of the change of the weights (Frobenius), at strength 1. Energy: the share of the squared norm that the first"
    yield f"ranks hold, as `resize --rank` keeps them; mean rank: what `resize --energy {_ENERGY}` gives."
    shares = "".join(f"{f'rank {rank}':>9}" for rank in columns)
    yield f"{'block':<20}{'layers':>7}{'norm':>10}{shares}{'mean rank':>11}"
    for name, block in [*sorted(blocks.items(), key=lambda item: _order(item[0])), ("all", total)]:
        energy = block.squares.sum().item()
        cells = [f"{block.squares[:rank].sum().item() / energy:.1%}" if energy else "-" for rank in columns]
        mean = f"{sum(block.ranks) / len(block.ranks):.1f}" if block.ranks else "-"
        numbers = "".join(f"{cell:>9}" for cell in cells)
        yield f"{name:<20}{block.layers:>7}{block.squared_norm**0.5:>10.4g}{numbers}{mean:>11}"


def _order(block: str) -> tuple[int, int]:
    """Text encoders first, then the UNet from input to output."""
    starts = ("text", "time", "label", "input", "middle", "output", "out", "other")
    number = re.search(r"\d+$", block)
    return next(index for index, start in enumerate(starts) if block.startswith(start)), int(number[0]) if number else 0


def _measure(layer: Layer) -> tuple[float, torch.Tensor | None]:
    """The squared norm of the layer's change, and its singular values where they are few. Of a DoRA, the part beside the norms."""
    plain = replace(layer, parts={part: stored for part, stored in layer.parts.items() if part not in ("dora_scale", "magnitude")})
    if plain.kind == "full":
        return sum((tensor**2).sum().item() for tensor in plain.read().values()), None
    if len(factors(plain, plain.shapes()).down) > _MOST_RANKS:
        tensors = plain.read()
        return (scale_of(plain, tensors) * delta_of(plain, tensors)).double().square().sum().item(), None
    product = factors(plain, plain.read())
    values = abs(product.scale) * svd_of_product(product.up, product.down)[1]
    return values.square().sum().item(), values
