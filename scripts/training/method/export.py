"""LoRA modules -> the .safetensors file that ComfyUI and A1111 load: kohya's layout, sgm names, read back and compared."""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from common.errors import ModelError, bullet_list
from common.files import atomic_write
from training.method.adapters import LoraModule, row_norms
from training.models.tensor_files import write_into

COMFYUI_MODULES = Path(__file__).with_name("comfyui_sdxl_modules.csv")
"""Every module name that ComfyUI's SDXL loader takes, with the layer's sizes in full-size SDXL."""


_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d)\.attentions\.([0-2])\.(.+)")
"""A fourth attention module would get the name of the next block's first one."""


_MID_BLOCK = "mid_block.attentions.0."


@dataclass(frozen=True)
class Description:
    """What the file says about itself."""

    name: str
    trigger_word: str
    rank: int
    alpha: float
    base_name: str
    prediction_type: str
    resolution: int
    captions: Sequence[str]
    images: int
    epochs: int
    steps: int
    batch_size: int
    learning_rate: float
    optimizer: str
    seed: int
    fingerprint: str
    """Of everything that decided the result: the same fingerprint, the same LoRA."""


def write_lora(path: Path, modules: Sequence[LoraModule], about: Description) -> None:
    """Write the LoRA in fp16 to `path`; it gets that name only after it was read back, compared, and every module name
    was found among those that ComfyUI takes. Raises ModelError otherwise."""
    tensors = kohya_tensors(modules, about.alpha)
    metadata = _metadata(about, _sha256_of_data(save(tensors)))
    if any(name.endswith(".dora_scale") for name in tensors):
        metadata["ss_network_args"] = json.dumps({"dora_wd": "True"})
    with atomic_write(path) as beside:
        write_into(beside, tensors, metadata)
        verify(beside, tensors)


def kohya_tensors(modules: Sequence[LoraModule], alpha: float) -> dict[str, torch.Tensor]:
    """`<module>.lora_down.weight` [r, in], `<module>.lora_up.weight` [out, r] and the 0-d `<module>.alpha`, in fp16 on the CPU.

    A layer's change is alpha / r * up @ down. A DoRA also has `<module>.dora_scale` [out, 1], and all its tensors but alpha are
    fp32: fp16 would round the norm of a whole row. Raises ModelError if a weight is not finite in fp16.
    """
    parts = [part.detach() for module in modules for part in (module.down, module.up)]
    flat = torch.cat([part.flatten() for part in parts]).to(torch.float16)
    is_finite = bool(flat.isfinite().all())
    if any(module.magnitude is not None for module in modules):
        flat = torch.cat([part.flatten() for part in parts])
    weights = iter(flat.cpu().split([part.numel() for part in parts]))
    tensors = {}
    for module in modules:
        name = kohya_name(module.name)
        tensors[f"{name}.lora_down.weight"] = next(weights).view_as(module.down).clone()
        tensors[f"{name}.lora_up.weight"] = next(weights).view_as(module.up).clone()
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
        if module.magnitude is not None:
            down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
            tensors[f"{name}.dora_scale"] = dora_scale(module, down, up, tensors[f"{name}.alpha"].item() / down.shape[0])
    if not is_finite:
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        raise ModelError(f"the LoRA holds values that fp16 cannot (first in {broken[0]}): lower LEARNING_RATE and train again")
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
    """A layer's name in diffusers' UNet -> its kohya name by SDXL's original (sgm) numbering of blocks."""
    if module.startswith(_MID_BLOCK):
        block, rest = "middle_block_1", module.removeprefix(_MID_BLOCK)
    elif match := _BLOCK.fullmatch(module):
        side, i, j, rest = match[1], int(match[2]), int(match[3]), match[4]
        block = f"input_blocks_{3 * i + j + 1}_1" if side == "down_blocks" else f"output_blocks_{3 * i + j}_1"
    else:
        raise ModelError(f"{module}: no layer of SDXL's transformer blocks; ComfyUI would ignore it")
    return f"lora_unet_{block}_{rest.replace('.', '_')}"


def verify(path: Path, written: dict[str, torch.Tensor]) -> None:
    """Read the LoRA at `path` back and compare it with what was `written`; check every module against ComfyUI's names.

    Raises ModelError naming what would be wrong in ComfyUI.
    """
    with safe_open(path, framework="pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    differing = [name for name in written if name not in read or not _same(read[name], written[name])]
    modules = {name.split(".", 1)[0] for name in read}
    problems = [f"{name}: read back differently" for name in differing]
    problems += [f"{name}: nobody wrote it" for name in sorted(read.keys() - written.keys())]
    problems += [f"{name}: ComfyUI has no such module and would ignore it" for name in sorted(modules - comfyui_modules())]
    for module in modules:
        parts = {f"{module}.lora_down.weight", f"{module}.lora_up.weight", f"{module}.alpha"}
        if f"{module}.dora_scale" in written:
            parts.add(f"{module}.dora_scale")
        problems += [f"{name}: is missing" for name in sorted(parts - read.keys())]
    if problems:
        raise ModelError(bullet_list(f"{path.name}: the LoRA is not what it should be:", problems[:20]))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the last bit; a CPU compares bytes faster than halves."""
    return (one.shape, one.dtype) == (other.shape, other.dtype) and one.numpy().tobytes() == other.numpy().tobytes()


def comfyui_modules() -> set[str]:
    """The module names in kohya's layout that ComfyUI's SDXL loader takes."""
    with COMFYUI_MODULES.open(encoding="utf-8", newline="") as file:
        return {row["kohya_module"] for row in csv.DictReader(file)}


def _sha256_of_data(content: bytes) -> str:
    """SHA-256 of a safetensors file's bytes behind its header: the hash that model managers know it by."""
    header_bytes = int.from_bytes(content[:8], "little")
    return hashlib.sha256(memoryview(content)[8 + header_bytes :]).hexdigest()


def _metadata(about: Description, data_hash: str) -> dict[str, str]:
    """Header entries that A1111, Forge, ComfyUI and model managers read. Every value is a string; no path is among them."""
    now = datetime.now(UTC)
    tags = Counter(tag for caption in about.captions for tag in (part.strip() for part in caption.split(",")) if tag)
    size = f"{about.resolution}x{about.resolution}"
    is_v = about.prediction_type == "v_prediction"
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(about.rank),
        "ss_network_alpha": str(about.alpha),
        "ss_network_args": "{}",
        "ss_output_name": about.name,
        "ss_sd_model_name": about.base_name,
        "ss_resolution": f"({about.resolution}, {about.resolution})",
        "ss_num_train_images": str(about.images),
        "ss_num_epochs": str(about.epochs),
        "ss_steps": str(about.steps),
        "ss_batch_size_per_device": str(about.batch_size),
        "ss_learning_rate": str(about.learning_rate),
        "ss_unet_lr": str(about.learning_rate),
        "ss_optimizer": about.optimizer,
        "ss_seed": str(about.seed),
        "ss_tag_frequency": json.dumps({"dataset": dict(tags.most_common())}, ensure_ascii=False),
        "ss_training_finished_at": str(now.timestamp()),
        "sshs_model_hash": data_hash,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": about.name,
        "modelspec.resolution": size,
        "modelspec.date": now.isoformat(timespec="seconds"),
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "modelspec.trigger_phrase": about.trigger_word,
        "modelspec.hash_sha256": f"0x{data_hash}",
        "loracat_fingerprint": about.fingerprint,
        **({"ss_v_parameterization": "True"} if is_v else {}),
    }
