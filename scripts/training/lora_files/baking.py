"""A checkpoint or diffusers folder with LoRA files applied to its weights, written tensor by tensor."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.errors import ModelError, SettingsError
from common.progress import ProgressBar
from common.weights import WeightsFile
from training.lora_files.changes import apply
from training.lora_files.reading import DTYPES, Layer, LoraFile, layer_name, read_tensor, usable_layers
from training.lora_files.writing import Written, described, require_space, write_verified
from training.models.diffusers_folder import read_folder
from training.models.sdxl import PREFIXES, BaseModel
from training.models.single_file import read_file

_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_OPEN_CLIP = re.compile(r"transformer\.resblocks\.(\d+)\.(attn\.in_proj|attn\.out_proj|mlp\.c_fc|mlp\.c_proj|ln_1|ln_2)[._](\w+)")
_OPEN_CLIP_NAMES = {
    "attn.in_proj": ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj"),
    "attn.out_proj": ("self_attn_out_proj",),
    "mlp.c_fc": ("mlp_fc1",),
    "mlp.c_proj": ("mlp_fc2",),
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
}
"""The layers that CLIP-G's tensors are in the original layout; one of three layers has a third of the rows each."""
_COPIED = ("model_index.json", "scheduler/*", "tokenizer/*", "tokenizer_2/*", *(f"{name}/config.json" for name in PREFIXES))
"""Files of a diffusers folder that stay as they are."""
_PIECE_BYTES = 1 << 24


@dataclass(frozen=True)
class Target:
    """Where a layer is in the model's files."""

    path: Path
    key: str
    """Name of the tensor."""
    part: int = 0
    parts: int = 1
    """The layer has this one of so many equal parts of the rows."""
    is_transposed: bool = False


Changes = dict[tuple[Path, str], list[tuple[Target, Layer, float]]]
"""File and name of a tensor -> what is added to it, in the order of the LoRA files."""


def bake(checkpoint: Path, files: Sequence[LoraFile], weights: Sequence[float], output: Path, force: bool) -> str:
    """Write a copy of `checkpoint` in which the layers have the changes of `files`, `weights` times each, as ComfyUI applies them.

    Every tensor keeps its name, type and shape. Returns what was changed, in words. Raises ModelError.
    """
    if not checkpoint.exists():
        raise SettingsError(f"{checkpoint}: no such file or folder")
    if checkpoint.is_dir() and not (checkpoint / "model_index.json").exists():
        raise ModelError(f"{checkpoint}: is not a diffusers folder: name the checkpoint file itself")
    base = read_folder(checkpoint) if checkpoint.is_dir() else read_file(checkpoint)
    changes = _changes(base, files, weights)
    names = [checkpoint.name, *(f"{file.path.name} x {weight:g}" for file, weight in zip(files, weights, strict=True))]
    sources = list({file.path: file for component in base.components.values() for file in component.files}.values())
    require_space(output, sum(file.path.stat().st_size for file in sources))
    with ProgressBar(sum(len(file.tensors) for file in sources), "bake", "tensors") as bar:
        if checkpoint.is_dir():
            _bake_folder(base, sources, changes, output, names, bar)
        else:
            _bake_file(sources[0], output, changes, names, force, bar)
    changed = {(target.path, target.key, target.part) for of_key in changes.values() for target, _, _ in of_key}
    return f"{len(changed)} weights and biases changed"


def _changes(base: BaseModel, files: Sequence[LoraFile], weights: Sequence[float]) -> Changes:
    """What is changed in which tensor. Raises ModelError if a LoRA does not fit."""
    targets = {kind: dict(_targets(base, kind)) for kind in ("weight", "bias")}
    changes: Changes = {}
    for file, weight in zip(files, weights, strict=True):
        for layer in usable_layers(file, targets["weight"]).values() if weight else ():
            for kind, of_kind in _by_kind(layer).items():
                if layer.name not in targets[kind]:
                    raise ModelError(f"{layer.path}: changes the {kind} of {layer.name}, and the checkpoint has none")
                target = targets[kind][layer.name]
                changes.setdefault((target.path, target.key), []).append((target, of_kind, weight))
    if not changes:
        raise SettingsError("every weight is 0: the checkpoint would not change")
    return changes


def _by_kind(layer: Layer) -> dict[str, Layer]:
    """What the layer changes of the weight, and of the bias."""
    bias = layer.parts.get("diff_b")
    of_weight = {part: stored for part, stored in layer.parts.items() if part != "diff_b"}
    kinds = {"weight": replace(layer, parts=of_weight)} if of_weight else {}
    return kinds | ({"bias": replace(layer, parts={"diff": bias}, keys={"diff": layer.keys["diff_b"]})} if bias else {})


def _targets(base: BaseModel, kind: str) -> Iterator[tuple[str, Target]]:
    """kohya's name of each layer whose `kind` ("weight" or "bias") the model's files have, and where."""
    for component in (base.components[name] for name in _KOHYA):
        prefix = PREFIXES[component.name] if component.in_single_file else ""
        for key in component.tensors:
            inner = key.removeprefix(prefix)
            if component.name == "text_encoder_2" and component.has_original_names:
                yield from _open_clip_targets(component.file_of(key), key, inner, kind)
            elif inner.endswith(f".{kind}"):
                spelled = f"{component.name}.{inner.removesuffix(f'.{kind}')}"
                name = layer_name(spelled)
                if name == spelled:  # norms and the like: by ComfyUI's rule, underscores for dots
                    name = _KOHYA[component.name] + spelled.removeprefix(f"{component.name}.").replace(".", "_")
                yield name, Target(component.file_of(key), key)


def _open_clip_targets(path: Path, key: str, inner: str, kind: str) -> Iterator[tuple[str, Target]]:
    if inner.startswith("text_projection") and kind == "weight":
        yield "lora_te2_text_projection", Target(path, key, is_transposed=inner == "text_projection")
    elif (match := _OPEN_CLIP.fullmatch(inner)) and match[3] == kind:
        names = _OPEN_CLIP_NAMES[match[2]]
        for part, name in enumerate(names):
            yield f"lora_te2_text_model_encoder_layers_{match[1]}_{name}", Target(path, key, part, len(names))


def _bake_file(source: WeightsFile, output: Path, changes: Changes, inputs: Sequence[str], force: bool, bar: ProgressBar) -> None:
    """Write `source` with its `changes` to `output`."""

    def tensors() -> Iterator[Written]:
        for key in sorted(source.tensors, key=lambda key: source.tensors[key].begin):
            stored = source.tensors[key]
            if of_key := changes.get((source.path, key)):
                yield key, _changed(source, key, of_key)
            else:
                yield key, (stored.dtype, stored.shape, _pieces(source.path, stored.begin, stored.end))
            bar.update()

    def problems_of(read: Mapping[str, object]) -> list[str]:
        return [f"{key}: missing" for key in sorted(source.tensors.keys() - read)]

    def metadata() -> dict[str, str]:
        return described("bake", [source.metadata], output.stem, inputs)

    write_verified(output, source.tensors, tensors(), metadata, force, problems_of)


def _bake_folder(
    base: BaseModel, sources: Sequence[WeightsFile], changes: Changes, output: Path, inputs: Sequence[str], bar: ProgressBar
) -> None:
    """Write the diffusers folder with the changes to `output`, which gets its name when it is complete."""
    unfinished = output.with_name(f".{output.name}.part")
    if unfinished.exists():
        raise SettingsError(f"{unfinished}: is left from a run that was killed, or belongs to one at work: remove it")
    try:
        for file in sources:
            _bake_file(file, unfinished / file.path.relative_to(base.path), changes, inputs, False, bar)
        indices = [path for name in _KOHYA for path in (base.path / name).glob("*.index*.json")]
        for path in [*(path for pattern in _COPIED for path in base.path.glob(pattern)), *indices]:
            if path.is_file():
                target = unfinished / path.relative_to(base.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _changed(source: WeightsFile, key: str, changes: Sequence[tuple[Target, Layer, float]]) -> torch.Tensor:
    """One tensor with its changes, in its own type. Raises ModelError if that cannot represent it."""
    stored = source.tensors[key]
    weight = read_tensor(source.path, stored).float()
    for target, layer, strength in changes:
        rows = len(weight) // target.parts
        part = weight.T if target.is_transposed else weight[target.part * rows : (target.part + 1) * rows]
        part.copy_(apply(part, layer, strength))
    result = weight.to(DTYPES[stored.dtype])
    if not result.isfinite().all():
        raise ModelError(f"{key} with the LoRA has values that {stored.dtype} cannot represent: use smaller --weights")
    return result


def _pieces(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `begin` to `end`."""
    with path.open("rb") as file:
        file.seek(begin)
        for position in range(begin, end, _PIECE_BYTES):
            piece = file.read(min(_PIECE_BYTES, end - position))
            if not piece:
                raise ModelError(f"{path}: became shorter while it was read: run the command again when it is complete")
            yield piece
