"""A peer on the same images and model: diffusers' text_to_image LoRA script for SDXL, whose path is given; it is not part of this
repository. Only figures come of it."""

import json
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

from common.dataset_layout import DatasetFolder

BATCH = 4
_DEFAULTS = {
    "train_batch_size": BATCH,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "mixed_precision": "bf16",
    "dataloader_num_workers": 0,
    "report_to": "tensorboard",
}


def train(script: Path, model: Path, dataset: DatasetFolder, output: Path, options: Mapping[str, object]) -> int:
    """Run the script in this process with these options on a data set with captions; returns an exit code."""
    texts = {
        path.name: path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in sorted(dataset.images.glob("*.png"))
    }
    folder = output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name in texts:
        (folder / name).unlink(missing_ok=True)
        (folder / name).hardlink_to(dataset.images / name)
    lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in texts.items()]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    paths = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": folder,
        "output_dir": output / "lora",
        "cache_dir": output / "cache",
    }
    arguments = [f"--{name}={value}" for name, value in (paths | _DEFAULTS | options).items()]
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
    return 0


def saves(output: Path, steps: int, epochs: int) -> dict[int, Path]:
    """Epochs -> LoRA file of each checkpoint; there is one after every `steps` steps, which are `epochs` epochs."""
    folders = {int(path.name.split("-")[1]) // steps * epochs: path for path in (output / "lora").glob("checkpoint-*")}
    return {number: folders[number] / "pytorch_lora_weights.safetensors" for number in sorted(folders)}
