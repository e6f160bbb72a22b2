"""Begin from an existing LoRA file: the weights of a fresh adapter become those of the file, whatever trainer wrote it."""

import math
from collections.abc import Mapping

import torch

from common.errors import ModelError, SettingsError, abbreviated
from common.files import sha256_of
from common.output_layout import OutputLayout
from training.config import LoraSettings
from training.lora_files.reading import Layer, read_lora, usable_layers
from training.method.adapters import Adapter, LoraModule, row_norms
from training.method.comfyui_modules import comfyui_modules
from training.method.layers import adapted_layers, factor_shapes, kohya_name
from training.method.low_rank import truncate

_KINDS = {"lora": "LoRA", "dora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}
_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up"}
"""What the reader calls the factors of a LoRA; others keep their names."""


def initial_digest(settings: LoraSettings, outputs: OutputLayout, recorded: str | None) -> str | None:
    """SHA-256 of the file `init_lora`; None without one. `recorded` is that of the checkpoint to continue, which needs the file no
    more. Raises SettingsError if there is no file, or one that the run would replace."""
    path = settings.init_lora
    if path is None or (recorded and not path.exists()):
        return recorded if path else None
    own = path.parent.resolve() == outputs.lora_dir.resolve() and (path == outputs.lora or path.stem.startswith(f"{outputs.name}-"))
    if own or path.resolve() == outputs.lora.resolve():
        raise SettingsError(f"INIT_LORA: this run would replace {path}: copy it to another folder, or set OUTPUT_NAME")
    if not path.is_file():
        raise SettingsError(f"INIT_LORA: {path}: no such file")
    return sha256_of(path)


def matching_layers(settings: LoraSettings, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layer]:
    """The layers of the file `init_lora`, going by its header, by the names of the adapted layers of a UNet with these `shapes`.

    Raises SettingsError for a file that needs other settings, ModelError for one that is damaged, or not of SDXL.
    """
    path, ranks = settings.init_lora, adapted_layers(shapes, settings)
    if not path.is_file():  # of an earlier run, whose digest is recorded, it may be gone
        raise SettingsError(f"INIT_LORA: {path}: no such file")
    layers = usable_layers(read_lora(path), comfyui_modules())
    of_text = [] if settings.train_text_encoders else [name for name in layers if name.startswith("lora_te")]
    if of_text:
        what = "text encoders are left out: these are not trained; see TRAIN_TEXT_ENCODERS"
        print(f"INIT_LORA: {len(of_text)} layers of {what}", flush=True)
    found = {name: layers[kohya_name(name)] for name in ranks if kohya_name(name) in layers}
    used = {layer.name for layer in found.values()}
    if surplus := [name for name in layers if name not in used and name not in of_text]:
        raise SettingsError(
            f"INIT_LORA: {path} changes {len(surplus)} layers that these settings do not adapt ({abbreviated(surplus, 2)}): set "
            "LORA_TARGETS=all, LORA_CONV_RANK for convolutions, and no rank 0 in LORA_RANK_PATTERN"
        )
    if not found:
        raise ModelError(f"{path}: changes no layer of this UNet")
    others: dict[str, list[str]] = {}
    for name, layer in found.items():
        if (problem := _difference(layer, factor_shapes(shapes[name], ranks[name].rank, settings), settings)) is not None:
            others.setdefault(problem, []).append(name)
    if others:
        problem, names = next(iter(others.items()))
        raise SettingsError(f"INIT_LORA: {path} {problem} in {len(names)} layers ({abbreviated(names, 1)})")
    return found


def _difference(layer: Layer, shapes: Mapping[str, tuple[int, ...]], settings: LoraSettings) -> str | None:
    """Why `layer` cannot become a layer whose factors have these `shapes`, and what to set; None if it can."""
    kind = "DoRA" if layer.is_dora else layer.kind
    if layer.kind != _KINDS[settings.lora_type] or layer.is_dora != (settings.lora_type == "dora"):
        return f"has a {kind}: set LORA_TYPE={kind.lower()}" if layer.kind in _KINDS.values() else "has whole weights"
    stored = {key: layer.parts.get(_PARTS.get(key, key)) for key in shapes}
    if None in stored.values() or layer.parts.keys() & {"mid", "hada_t1", "lokr_t2", "lokr_w1_a"}:
        return "has factors that other settings make: set LORA_RANK and LOKR_FACTOR as for it, without a decomposed kernel"
    sizes = {key: (tensor.shape[0], math.prod(tensor.shape[1:])) for key, tensor in stored.items()}
    expected = {key: (shape[0], math.prod(shape[1:])) for key, shape in shapes.items()}
    if sizes == expected:
        return None
    if layer.kind != "LoRA":
        return f"has factors of {sizes} where {expected} is needed: set LORA_RANK and LOKR_FACTOR as for it"
    (rank, inputs), (outputs, _) = sizes["lora_down.weight"], sizes["lora_up.weight"]
    if inputs != expected["lora_down.weight"][1] or outputs != expected["lora_up.weight"][0]:
        return "has matrices of another size: it is of another model"
    needed = expected["lora_down.weight"][0]
    return None if settings.init_lora_resize else f"has rank {rank} instead of {needed}: set its rank, or INIT_LORA_RESIZE=true"


@torch.no_grad()
def load_initial(adapter: Adapter, layers: Mapping[str, Layer]) -> None:
    """Give the modules of `adapter` the changes of `layers`, by name. Modules without one stay as they are."""
    for module in adapter.modules:
        if module.name in layers:
            _load(module, layers[module.name].read(), layers[module.name].configured_scale)


def _load(module: LoraModule, parts: dict[str, torch.Tensor], configured_scale: float | None) -> None:
    rank = len(parts["down"]) if "down" in parts else len(parts.get("hada_w1_b", parts.get("lokr_w2_b", ())))
    file_scale = parts["alpha"].item() / rank if "alpha" in parts and rank else configured_scale or 1.0
    relative = file_scale / module.scale if rank else 1.0  # a LoKr of whole matrices has no scale
    if "down" in parts:
        _load_product(module, parts["up"].flatten(1) * relative, parts["down"].flatten(1))
    else:
        for key, factor in module.factors.items():
            factor.copy_(parts[key].view_as(factor))
        module.zero.mul_(relative)
    if module.magnitude is not None:
        base = module.base.detach().float().flatten(1)
        down, up = (module.factors[f"lora_{name}.weight"].flatten(1) for name in ("down", "up"))
        magnitude = parts.get("magnitude")
        if magnitude is None:  # ComfyUI's weight is dora_scale (W + D) / |W|
            scale = parts["dora_scale"].flatten().to(base.device)
            magnitude = scale * row_norms(base + module.scale * (up @ down)) / row_norms(base)
        module.magnitude.copy_(magnitude.view_as(module.magnitude))


def _load_product(module: LoraModule, up: torch.Tensor, down: torch.Tensor) -> None:
    """Make `up @ down` the product of the module's factors: the nearest one if they have a lower rank. If they have a higher one,
    further rows of `down` keep their first values, and the columns of `up` for them are zero, so that they can learn."""
    own_down, own_up = (module.factors[f"lora_{name}.weight"].flatten(1) for name in ("down", "up"))  # views
    if len(down) > len(own_down):
        up, down = truncate(up, down, len(own_down))
    own_up.zero_()
    own_up[:, : len(down)].copy_(up)
    own_down[: len(down)].copy_(down)
