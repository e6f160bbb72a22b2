"""The modules of an SDXL LoRA that ComfyUI loads."""

import csv
from collections.abc import Collection
from pathlib import Path

COMFYUI_MODULES = Path(__file__).with_name("comfyui_sdxl_modules.csv")
"""Their names, with the sizes of the layers; demo/comfyui_modules.py derives them."""


def comfyui_modules() -> set[str]:
    """The names of the modules that ComfyUI loads for SDXL."""
    with COMFYUI_MODULES.open(encoding="utf-8", newline="") as file:
        return {row["kohya_module"] for row in csv.DictReader(file)}


def module_problems(keys: Collection[str]) -> list[str]:
    """What is wrong with the names of a LoRA file's tensors: modules that ComfyUI does not load, and incomplete LoRAs."""
    modules = {key.split(".", 1)[0] for key in keys}
    problems = [f"{module}: not a module that ComfyUI loads" for module in sorted(modules - comfyui_modules())]
    for module in sorted(modules):
        is_lora = any(f"{module}.lora_{part}.weight" in keys for part in ("down", "up"))
        expected = {f"{module}.lora_down.weight", f"{module}.lora_up.weight", f"{module}.alpha"}
        problems += [f"{key}: missing" for key in sorted(expected.difference(keys)) if is_lora]
    return problems
