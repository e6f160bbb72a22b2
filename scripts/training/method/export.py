"""Write LoRA modules to the .safetensors file that ComfyUI and A1111 load: kohya's layout with the original (sgm) block names.

A file is read back, compared, and checked against the modules that ComfyUI loads before it gets its name.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from common.errors import ModelError, bullet_list
from common.files import atomic_write
from common.weights import read_header
from training.method.adapters import LoraModule, row_norms
from training.method.comfyui_modules import module_problems
from training.models.weights import write_into

_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d)\.attentions\.([0-2])\.(.+)")
"""A fourth attention module would get the name of the first one of the next block."""
_MID_BLOCK = "mid_block.attentions.0."


def write_lora(path: Path, modules: Sequence[LoraModule], alpha: float, metadata: dict[str, str]) -> None:
    """Write the LoRA to `path` with `metadata` in its header, and verify it. Raises ModelError, and leaves no file, if the
    verification fails.

    Model managers recognise a file by the SHA-256 of what follows its header, which is added to the metadata.
    """
    tensors = kohya_tensors(modules, alpha)
    content = save(tensors)
    header_bytes = int.from_bytes(content[:8], "little")
    data_hash = hashlib.sha256(memoryview(content)[8 + header_bytes :]).hexdigest()
    metadata = metadata | {"sshs_model_hash": data_hash, "modelspec.hash_sha256": f"0x{data_hash}"}
    if any(name.endswith(".dora_scale") for name in tensors):
        metadata["ss_network_args"] = json.dumps({"dora_wd": "True"})
    with atomic_write(path) as temporary:
        write_into(temporary, tensors, metadata)
        verify(temporary, tensors, path.name)


def kohya_tensors(modules: Sequence[LoraModule], alpha: float) -> dict[str, torch.Tensor]:
    """`<module>.lora_down.weight` [r, in], `<module>.lora_up.weight` [out, r] and the 0-d `<module>.alpha`, in fp16 on the CPU.

    A layer's change is alpha / r * up @ down. A DoRA also has `<module>.dora_scale` [out, 1], and all its tensors are fp32: fp16
    would round the norm of a whole row. Raises ModelError if a value is not finite in that type.
    """
    dtype = torch.float16 if all(module.magnitude is None for module in modules) else torch.float32
    parts = [part.detach() for module in modules for part in (module.down, module.up)]
    flat = torch.cat([part.flatten() for part in parts]).to(dtype)  # one conversion and one copy for all of them
    weights = iter(flat.cpu().split([part.numel() for part in parts]))
    tensors = {}
    for module in modules:
        name = kohya_name(module.name)
        tensors[f"{name}.lora_down.weight"] = next(weights).view_as(module.down).clone()
        tensors[f"{name}.lora_up.weight"] = next(weights).view_as(module.up).clone()
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
        if module.magnitude is not None:
            down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
            tensors[f"{name}.dora_scale"] = dora_scale(module, down, up, tensors[f"{name}.alpha"].item() / down.shape[0])
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        what = f"values that {str(dtype).removeprefix('torch.')} cannot represent"
        raise ModelError(f"the LoRA contains {what} (first in {broken[0]}): lower LEARNING_RATE and train again")
    return tensors


def dora_scale(module: LoraModule, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """[out, 1], fp32 on the CPU: m |W| / |W + scale up down| by row, for magnitudes m, with `down` and `up` as they are exported.

    DoRA's weight is m (W + scale up down) / |W + scale up down| (Liu et al. 2024, arXiv 2402.09353, equation 5), but ComfyUI
    computes dora_scale (W + scale up down) / |W|. Both are the same for the base model that was trained.
    """
    base = module.base.detach().float()
    adapted = base + scale * (up.to(base.device).float() @ down.to(base.device).float())
    return (module.magnitude * row_norms(base) / row_norms(adapted)).cpu()[:, None]


def kohya_name(module: str) -> str:
    """The kohya name of a layer of diffusers' UNet, with the original (sgm) block numbers. Raises ModelError if it has none."""
    if module.startswith(_MID_BLOCK):
        block, rest = "middle_block_1", module.removeprefix(_MID_BLOCK)
    elif match := _BLOCK.fullmatch(module):
        side, i, j, rest = match[1], int(match[2]), int(match[3]), match[4]
        block = f"input_blocks_{3 * i + j + 1}_1" if side == "down_blocks" else f"output_blocks_{3 * i + j}_1"
    else:
        raise ModelError(f"{module} is not a layer of SDXL's attention modules; ComfyUI would ignore it")
    return f"lora_unet_{block}_{rest.replace('.', '_')}"


def verify(path: Path, written: dict[str, torch.Tensor], name: str | None = None) -> None:
    """Read the file at `path` and check that it contains the tensors `written`, bit for bit, in modules that ComfyUI loads.

    Raises ModelError with every problem. It calls the file `name`, which a temporary file does not have yet.
    """
    with safe_open(path, framework="pt") as file:
        read = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    problems = []
    for key, expected in written.items():
        found = read.get(key)
        is_same = found is not None and (found.shape, found.dtype) == (expected.shape, expected.dtype)
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
        name = kohya_name(module.name)
        expected |= {f"{name}.lora_down.weight": tuple(module.down.shape), f"{name}.lora_up.weight": tuple(module.up.shape)}
        expected[f"{name}.alpha"] = ()
        if module.magnitude is not None:
            expected[f"{name}.dora_scale"] = (len(module.up), 1)
    return {name: tensor.shape for name, tensor in stored.items()} == expected


@torch.no_grad()
def load_lora(path: Path, modules: Sequence[LoraModule]) -> None:
    """Overwrite the weights of `modules` with those in the file at `path`, for which `is_lora_of` is true: the reverse of
    `kohya_tensors`, but for the rounding to fp16."""
    with safe_open(path, framework="pt") as file:
        for module in modules:
            name = kohya_name(module.name)
            module.down.copy_(file.get_tensor(f"{name}.lora_down.weight"))
            module.up.copy_(file.get_tensor(f"{name}.lora_up.weight"))
            if module.magnitude is not None:
                base, scale = module.base.float(), file.get_tensor(f"{name}.alpha").item() / len(module.down)
                adapted = base + scale * (module.up @ module.down)
                relative = file.get_tensor(f"{name}.dora_scale")[:, 0].to(base.device)
                module.magnitude.copy_(relative * row_norms(adapted) / row_norms(base))
