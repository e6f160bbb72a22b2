"""One LoRA file from one or several: another rank, or a weighted sum."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.errors import ModelError, SettingsError
from common.progress import ProgressBar
from training.lora_files.changes import Factors, factors
from training.lora_files.reading import DTYPES, Layer, LoraFile, usable_layers
from training.lora_files.writing import described, require_space, write_verified
from training.method.comfyui_modules import comfyui_modules, module_problems
from training.method.low_rank import balanced_factors, rank_of_energy, svd_of_product

_OF_ALL_LORAS = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_v2": "False",
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
}

_OF_BASE = {"ss_sd_model_name": "base models", "modelspec.prediction_type": "prediction types"}
"""Metadata about the base model, and what it is called."""


@dataclass(frozen=True)
class Reduction:
    """How far the rank of each layer is reduced; not at all if both are None."""

    rank: int | None = None
    energy: float | None = None
    """Share of the sum of the squared singular values that is kept."""

    def __bool__(self) -> bool:
        return self.rank is not None or self.energy is not None


@dataclass
class Result:
    """What was written."""

    ranks: dict[str, int] = field(default_factory=dict)
    """By layer."""
    energy: float = 0.0
    """Sum of the squared singular values of the inputs' weighted sum."""
    kept: float = 0.0
    """How much of it is kept."""

    def describe(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high} (mean {sum(self.ranks.values()) / len(self.ranks):.1f})"
        kept = f", {self.kept / self.energy:.2%} of the energy kept" if self.energy else ""
        return f"{len(self.ranks)} layers, {ranks}{kept}"


def combine(
    files: Sequence[LoraFile],
    weights: Sequence[float],
    output: Path,
    command: str,
    reduction: Reduction,
    dtype: torch.dtype | None,
    force: bool,
) -> Result:
    """Write the sum of the changes of `files`, `weights` times each, as one LoRA file with alpha = rank in every layer.

    Without a `reduction` the sum is exact: the ranks of the files add up. With one, each layer is the nearest of that rank.
    Raises ModelError and SettingsError for files that cannot be added.
    """
    summands = _summands(files, weights)
    sizes = {name: _checked_sizes(of_layer, reduction) for name, of_layer in summands.items()}
    dtype = dtype or _widest(files)
    require_space(output, sum(sizes.values()) * dtype.itemsize)
    result = Result()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        with ProgressBar(len(summands), command.partition(" ")[0], "layers") as bar:
            for name, of_layer in summands.items():
                down, up = _combined(name, of_layer, reduction, result)
                alpha = torch.tensor(float(len(down)))
                for part, tensor in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", alpha)):
                    stored = tensor.to(dtype)
                    if not stored.isfinite().all() or (tensor.any() and not stored.any()):
                        raise ModelError(f"{output}: {name} has values that {str(dtype)[6:]} cannot represent: set --dtype fp32")
                    yield f"{name}.{part}", stored
                bar.update()

    names = [f"{name}.{part}" for name in summands for part in ("lora_down.weight", "lora_up.weight", "alpha")]
    write_verified(output, names, tensors(), lambda: _metadata(files, weights, output, command, result), force, module_problems)
    return result


def _summands(files: Sequence[LoraFile], weights: Sequence[float]) -> dict[str, list[tuple[float, Layer]]]:
    """Layer -> the weights and layers that add up to it; files of weight 0 have no part in it."""
    summands: dict[str, list[tuple[float, Layer]]] = {}
    for file, weight in zip(files, weights, strict=True):
        layers = usable_layers(file, comfyui_modules())
        for name, layer in layers.items() if weight else ():
            summands.setdefault(name, []).append((weight, layer))
    if not summands:
        raise SettingsError("every weight is 0: the result would change nothing")
    for key, what in _OF_BASE.items():
        trained = {file.path.name: file.header.metadata[key] for file in files if key in file.header.metadata}
        if len(set(trained.values())) > 1:
            found = ", ".join(f"{value!r} ({name})" for name, value in trained.items())
            print(
                f"note: the files were trained with different {what}: {found}; look at images before you use the result", flush=True
            )
    return summands


def _checked_sizes(of_layer: list[tuple[float, Layer]], reduction: Reduction) -> int:
    """How many weights the layer has in the result at most, by the shapes alone. Raises ModelError and SettingsError."""
    shapes = [factors(layer, layer.shapes()) for _, layer in of_layer]
    rows, columns = len(shapes[0].up), shapes[0].down.shape[1]
    for (_, layer), other in zip(of_layer, shapes, strict=True):
        if layer.kind != "LoRA" and not reduction:
            raise SettingsError(
                f"{layer.path}: is a {layer.kind}, which has no rank of its own: set that of the result with --rank"
            )
        found = len(other.up), other.down.shape[1]
        if found != (rows, columns):
            first = of_layer[0][1].path.name
            raise ModelError(
                f"{layer.path}: {layer.name} changes a weight of {found[0]} x {found[1]}, in {first} it has {rows} x {columns}: "
                "the files are for different base models"
            )
    rank = min(sum(len(shape.down) for shape in shapes), reduction.rank or rows + columns)
    return (rows + columns) * rank


def _combined(
    name: str, of_layer: list[tuple[float, Layer]], reduction: Reduction, result: Result
) -> tuple[torch.Tensor, torch.Tensor]:
    """`down` and `up` of one layer of the result, fp32."""
    parts: list[Factors] = [factors(layer, layer.read()) for _, layer in of_layer]
    up = torch.cat([weight * part.scale * part.up for (weight, _), part in zip(of_layer, parts, strict=True)], dim=1)
    down = torch.cat([part.down for part in parts])
    if not (up.isfinite().all() and down.isfinite().all()):
        files = ", ".join(layer.path.name for _, layer in of_layer)
        raise ModelError(f"{files}: the values of {name} are too large to compute with: the file is damaged, or training failed")
    if reduction:
        u, values, vh = svd_of_product(up, down)
        of_energy = len(values) if reduction.energy is None else rank_of_energy(values, reduction.energy)
        rank = min(reduction.rank or len(values), of_energy)
        squares = values**2
        result.energy += squares.sum().item()
        result.kept += squares[:rank].sum().item()
        up, down = balanced_factors(u, values, vh, rank)
    result.ranks[name] = len(down)
    like = next((part for part in parts if part.kernel), parts[0])
    up, down = like.as_tensors(up, down)
    return down, up


def _widest(files: Sequence[LoraFile]) -> torch.dtype:
    """The type that holds the weights of all files."""
    found = {DTYPES[dtype] for file in files for dtype in file.dtypes}
    found = {torch.float16 if dtype.itemsize == 1 else dtype for dtype in found}
    return found.pop() if len(found) == 1 and torch.float64 not in found else torch.float32


def _metadata(files: Sequence[LoraFile], weights: Sequence[float], output: Path, command: str, result: Result) -> dict[str, str]:
    names = [f"{file.path.name} x {weight:g}" for file, weight in zip(files, weights, strict=True) if weight]
    sources = [file.header.metadata for file, weight in zip(files, weights, strict=True) if weight]
    ranks = set(result.ranks.values())
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"  # as kohya's tools call it
    phrases = dict.fromkeys(source[key] for source in sources if (key := "modelspec.trigger_phrase") in source)
    said = described(command, sources, output.stem, names) | {
        "ss_output_name": output.stem,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_network_args": json.dumps({}),
    }
    if phrases:
        said["modelspec.trigger_phrase"] = ", ".join(phrases)
    return said | {key: text for key, text in _OF_ALL_LORAS.items() if key not in said}
