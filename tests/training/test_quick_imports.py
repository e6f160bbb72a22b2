"""What a run does without, and that everybody else still gets it."""

import subprocess
import sys
from pathlib import Path

from settings import REPOSITORY

RUN = """
import sys
import train_lora
train_lora.main([])
unused = {"torch._dynamo", "sympy", "scipy", "torchvision", "diffusers.models.transformers", "diffusers.models.unets"}
assert not unused & sys.modules.keys(), unused & sys.modules.keys()
assert "transformers" not in sys.modules, "whose list of all models was read for nothing"

import diffusers.models.unets, scipy, torch
from training import networks
from diffusers import AutoencoderKL, UNet2DConditionModel, UNetMotionModel
from transformers import CLIPTextModel, LlamaConfig
from transformers.models import llama
assert CLIPTextModel is networks.CLIPTextModel
assert UNet2DConditionModel is networks.UNet2DConditionModel
assert AutoencoderKL is networks.AutoencoderKL
assert torch.distributed.is_available()
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
"""

WANTS_MORE = """
import sys
from training.quick_imports import import_quickly
assert import_quickly("demanding").linalg.inv
"""


def run(code: str, environment: dict[str, str], *paths: Path) -> str:
    environment = environment | {"PYTHONPATH": ":".join(map(str, (REPOSITORY / "scripts", *paths)))}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_run_neither_imports_the_compiler_nor_other_networks_and_leaves_them_whole(stage):
    stage.add("astronaut")
    assert "copy it to ComfyUI" in run(RUN, stage._environment({"NUM_TRAIN_EPOCHS": 1, "LORA_TARGETS": "attention"}))


def test_a_module_that_wants_more_gets_it(tmp_path):
    (tmp_path / "demanding.py").write_text("from scipy import linalg\n")
    run(WANTS_MORE, {}, tmp_path)
