"""Write LoRA modules to the .safetensors file that ComfyUI and A1111 load: kohya's layout with the original (sgm) block names.

A file is read back, compared, and checked against the modules that ComfyUI loads before it gets its name.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from common.errors import ModelError, bullet_list
from common.files import atomic_write
from common.weights import read_header
from training.method.adapters import LoraModule, row_norms
from training.method.comfyui_modules import module_problems
from training.method.layers import kohya_name
from training.models.weights import write_into

_PARTS_AT_ONCE = 64
"""Factors that are copied from the GPU at a time."""


def write_lora(path: Path, modules: Sequence[LoraModule], metadata: dict[str, str]) -> None:
    """Write the LoRA to `path` with `metadata` in its header, and verify it. Raises ModelError, and leaves no file, if the
    verification fails.

    Model managers recognise a file by the SHA-256 of what follows its header, which is added to the metadata.
    """
    tensors = kohya_tensors(modules)
    content = save(tensors)
    header_bytes = int.from_bytes(content[:8], "little")
    data_hash = hashlib.sha256(memoryview(content)[8 + header_bytes :]).hexdigest()
    metadata = metadata | {"sshs_model_hash": data_hash, "modelspec.hash_sha256": f"0x{data_hash}"}
    with atomic_write(path) as temporary:
        write_into(temporary, tensors, metadata)
        verify(temporary, tensors, path.name)


def kohya_tensors(modules: Sequence[LoraModule]) -> dict[str, torch.Tensor]:
    """For each module its factors, such as `<module>.lora_down.weight` [r, in] and `<module>.lora_up.weight` [out, r], in fp16 on
    the CPU, and the 0-d `<module>.alpha`, in fp32 where fp16 would round it.

    A layer's change is alpha / r times the product of its factors. A DoRA also has `<module>.dora_scale` [out, 1], and all its
    tensors are fp32: fp16 would round the norm of a whole row. Raises ModelError if a value is not finite in that type.
    """
    dtype = torch.float16 if all(module.magnitude is None for module in modules) else torch.float32
    parts = [part.detach() for module in modules for part in module.factors.values()]
    weights = _on_cpu(parts, dtype)
    tensors = {}
    for module in modules:
        name = kohya_name(module.name)
        exported = {key: next(weights).view_as(factor).clone() for key, factor in module.factors.items()}
        alpha = torch.tensor(module.alpha, dtype=torch.float32)
        exported["alpha"] = alpha.to(dtype) if alpha.to(dtype).float() == alpha else alpha
        if module.magnitude is not None:
            exported["dora_scale"] = dora_scale(module, exported)
        tensors |= {f"{name}.{key}": tensor for key, tensor in exported.items()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        what = f"values that {str(dtype).removeprefix('torch.')} cannot represent"
        raise ModelError(f"the LoRA contains {what} (first in {broken[0]}): lower LEARNING_RATE, and start again with FRESH=1")
    return tensors


def _on_cpu(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The `parts`, flat and in `dtype`, some at a time: one by one would take seconds, and all at once half a gigabyte more of the
    GPU's memory than training takes."""
    for first in range(0, len(parts), _PARTS_AT_ONCE):
        portion = [part.flatten() for part in parts[first : first + _PARTS_AT_ONCE]]
        yield from torch.cat(portion).to(dtype).cpu().split([len(part) for part in portion])


def dora_scale(module: LoraModule, exported: dict[str, torch.Tensor]) -> torch.Tensor:
    """[out, 1, ...], fp32 on the CPU: m |W| / |W + D| by row, for magnitudes m and the change D of the factors `exported`.

    DoRA's weight is m (W + D) / |W + D| (Liu et al. 2024, arXiv 2402.09353, equation 5), but ComfyUI computes dora_scale (W + D) /
    |W|. Both are the same for the base model that was trained.
    """
    norms, adapted = _norms_without_and_with(module, exported)
    return (module.magnitude.flatten() * norms / adapted).cpu().view(-1, *[1] * (module.base.dim() - 1))


def _norms_without_and_with(module: LoraModule, factors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """[out] each, fp32: the norms of the rows of the base weight, alone and with the LoRA of `factors`, keys of a file."""
    base = module.base.detach().float().flatten(1)
    up, down = (factors[f"lora_{name}.weight"].to(base.device).float().flatten(1) for name in ("up", "down"))
    return row_norms(base), row_norms(base + factors["alpha"].item() / len(down) * (up @ down))


def verify(path: Path, written: dict[str, torch.Tensor], name: str | None = None) -> None:
    """Read the file at `path` and check that it contains the tensors `written`, bit for bit, in modules that ComfyUI loads.

    Raises ModelError with every problem. It calls the file `name`, which a temporary file does not have yet.
    """
    with safe_open(path, framework="pt") as file:
        read = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    problems = []
    problems += [f"{key}: missing" for key in sorted(written.keys() - read.keys())]
    for key in sorted(written.keys() & read.keys()):
        found, expected = read[key], written[key]
        is_same = (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if not is_same or found.numpy().tobytes() != expected.numpy().tobytes():  # faster than comparing fp16 values
            problems.append(f"{key}: differs after reading it back")
    problems += [f"{key}: unexpected tensor" for key in sorted(read.keys() - written.keys())]
    problems += module_problems(read)
    if problems:
        raise ModelError(bullet_list(f"{name or path.name}: verification of the exported LoRA failed:", problems[:20]))


def is_lora_of(path: Path, modules: Sequence[LoraModule]) -> bool:
    """Whether `path` is a complete file with the weights of exactly these modules, going by its header."""
    try:
        stored = read_header(path).tensors
    except (OSError, ModelError):
        return False
    expected: dict[str, tuple[int, ...]] = {}
    for module in modules:
        shapes = {key: tuple(factor.shape) for key, factor in module.factors.items()} | {"alpha": ()}
        if module.magnitude is not None:
            shapes["dora_scale"] = (len(module.base), *[1] * (module.base.dim() - 1))
        expected |= {f"{kohya_name(module.name)}.{key}": shape for key, shape in shapes.items()}
    return {name: tensor.shape for name, tensor in stored.items()} == expected


@torch.no_grad()
def load_lora(path: Path, modules: Sequence[LoraModule]) -> None:
    """Overwrite the weights of `modules` with those in the file at `path`, for which `is_lora_of` is true: the reverse of
    `kohya_tensors`, but for the rounding to fp16."""
    with safe_open(path, framework="pt") as file:
        for module in modules:
            keys = [*module.factors, "alpha", *(["dora_scale"] if module.magnitude is not None else [])]
            stored = {key: file.get_tensor(f"{kohya_name(module.name)}.{key}") for key in keys}
            for key, factor in module.factors.items():
                factor.copy_(stored[key])
            if module.magnitude is not None:
                norms, adapted = _norms_without_and_with(module, stored)
                relative = stored["dora_scale"].flatten().to(norms.device)
                module.magnitude.copy_((relative * adapted / norms).view_as(module.magnitude))
