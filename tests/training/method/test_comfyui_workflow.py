"""The workflow with the recommended LoRA, against what ComfyUI 0.33.0 says of its nodes; see also test_real_comfyui.py."""

import copy
import json
from pathlib import Path

import pytest

from collecting.object_info import NodeClasses
from training.method.comfyui_workflow import comfyui_workflow
from training.models.sdxl import Schedule

DATA = Path(__file__).parents[2] / "data"
SERVER = json.loads((DATA / "comfyui" / "0.33.0" / "object_info.json").read_text(encoding="utf-8"))["object_info"]
MODEL_SAMPLING = {
    "input": {
        "required": {
            "model": ["MODEL"],
            "sampling": [["eps", "v_prediction", "lcm", "x0", "img_to_img", "img_to_img_flow"]],
            "zsnr": ["BOOLEAN", {"default": False, "advanced": True}],
        }
    },
    "output": ["MODEL"],
    "output_node": False,
    "python_module": "comfy_extras.nodes_model_advanced",
}
"""What that server says of ModelSamplingDiscrete."""
EPSILON, V_PREDICTION = Schedule(), Schedule(prediction_type="v_prediction", zero_terminal_snr=True)


def workflow(schedule: Schedule = EPSILON, base: str = "my-sdxl") -> dict:
    return comfyui_workflow("mia-recommended.safetensors", 0.8, base, schedule, "mia", "mia", 1024, 6.0, 7)


def server_with(checkpoint: str, lora: str) -> NodeClasses:
    """The node classes of a server that has these models."""
    classes = copy.deepcopy(SERVER) | {"ModelSamplingDiscrete": MODEL_SAMPLING}
    classes["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] = [checkpoint]
    classes["LoraLoader"]["input"]["required"]["lora_name"][0] = [lora]
    return NodeClasses(classes)


@pytest.mark.parametrize("schedule", [EPSILON, V_PREDICTION], ids=["epsilon", "v-prediction"])
def test_comfyui_accepts_it(schedule):
    graph = workflow(schedule)
    assert server_with("my-sdxl.safetensors", "mia-recommended.safetensors").problems(graph, ("8",)) == []
    assert server_with("other.safetensors", "b.safetensors").problems(graph, ("8",)) != []


def test_it_has_the_lora_with_its_strength_the_trigger_word_and_the_base_model():
    graph = workflow()
    assert {node["class_type"] for node in graph.values()} == {
        "CheckpointLoaderSimple",
        "LoraLoader",
        "CLIPTextEncode",
        "EmptyLatentImage",
        "KSampler",
        "VAEDecode",
        "SaveImage",
    }
    assert graph["1"]["inputs"] == {"ckpt_name": "my-sdxl.safetensors"}
    lora = {"lora_name": "mia-recommended.safetensors", "strength_model": 0.8, "strength_clip": 0.8}
    assert graph["2"]["inputs"] == {"model": ["1", 0], "clip": ["1", 1], **lora}
    assert graph["3"]["inputs"]["text"] == "mia"
    assert graph["5"]["inputs"] == {"width": 1024, "height": 1024, "batch_size": 1}
    sampler = graph["6"]["inputs"]
    assert (sampler["model"], sampler["positive"], sampler["negative"]) == (["2", 0], ["3", 0], ["4", 0])
    assert (sampler["seed"], sampler["cfg"]) == (7, 6.0)
    assert graph["8"]["inputs"]["filename_prefix"] == "mia"


def test_a_folder_of_sdxl_is_the_checkpoint_that_stability_ai_published():
    assert workflow(base="stable-diffusion-xl-base-1.0")["1"]["inputs"]["ckpt_name"] == "sd_xl_base_1.0.safetensors"


@pytest.mark.parametrize(
    ("schedule", "sampling", "zsnr"),
    [
        (V_PREDICTION, "v_prediction", True),
        (Schedule(prediction_type="v_prediction"), "v_prediction", False),
        (Schedule(zero_terminal_snr=True), "eps", True),
    ],
)
def test_another_schedule_has_its_node(schedule, sampling, zsnr):
    graph = workflow(schedule)
    (node,) = [node_id for node_id, node in graph.items() if node["class_type"] == "ModelSamplingDiscrete"]
    assert graph[node]["inputs"] == {"model": ["2", 0], "sampling": sampling, "zsnr": zsnr}
    assert graph["6"]["inputs"]["model"] == [node, 0]
