"""The shipped default workflow, its node ids and the example prompts.

`data/object_info_default_workflow.json` is the answer of a ComfyUI 0.3.64 server at /object_info, reduced to the
node classes of the workflow and to the types of their inputs and outputs.
"""

import json
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLASSES = json.loads((ROOT / "tests/data/object_info_default_workflow.json").read_text(encoding="utf-8"))
WORKFLOW = json.loads((ROOT / "workflow_api.json").read_text(encoding="utf-8"))
NODE_IDS = json.loads((ROOT / "config/workflow_config.json").read_text(encoding="utf-8"))
PROMPTS = json.loads((ROOT / "prompts_example.json").read_text(encoding="utf-8"))

FINAL = "Qwen_Consistent_Char/Z_IMG_FINAL"
INTERMEDIATE = "Qwen_Consistent_Char/CC"
WIDGET_TYPES = {"STRING": (str,), "INT": (int,), "FLOAT": (int, float), "COMBO": (str,)}


def nodes_of(class_type: str) -> dict[str, dict]:
    return {node_id: node for node_id, node in WORKFLOW.items() if node["class_type"] == class_type}


def savers_under(prefix: str) -> dict[str, dict]:
    return {i: node for i, node in nodes_of("SaveImage").items() if node["inputs"]["filename_prefix"].startswith(prefix)}


def links(node: dict) -> dict[str, list]:
    return {name: value for name, value in node["inputs"].items() if isinstance(value, list)}


def ancestors(node_id: str) -> set[str]:
    """Ids of all nodes that the node depends on, itself included. Terminates on cycles too."""
    found, waiting = set(), [node_id]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += [source for source, _ in links(WORKFLOW[current]).values()]
    return found


def only(class_type: str, node_ids: set[str]) -> list[dict]:
    return [WORKFLOW[i] for i in sorted(node_ids) if WORKFLOW[i]["class_type"] == class_type]


def prompt_texts(class_type: str, key: str) -> list[str]:
    return [node["inputs"][key] for node in nodes_of(class_type).values() if node["inputs"][key]]


def test_workflow_is_in_api_format():
    for node_id, node in WORKFLOW.items():
        assert node_id.isdecimal()
        assert set(node) == {"class_type", "inputs", "_meta"}
        assert node["_meta"]["title"].strip()


@pytest.mark.parametrize("class_type", sorted({node["class_type"] for node in WORKFLOW.values()}))
def test_inputs_are_those_the_class_has(class_type):
    required, optional = CLASSES[class_type]["required"], CLASSES[class_type]["optional"]
    for node_id, node in nodes_of(class_type).items():
        assert set(required) <= set(node["inputs"]) <= set(required) | set(optional), node_id
        for name, value in node["inputs"].items():
            expected = (required | optional)[name]
            if expected in WIDGET_TYPES:
                assert type(value) in WIDGET_TYPES[expected], (node_id, name)
            else:
                assert isinstance(value, list), (node_id, name)


def test_links_point_to_outputs_of_the_right_type():
    for node_id, node in WORKFLOW.items():
        inputs = CLASSES[node["class_type"]]["required"] | CLASSES[node["class_type"]]["optional"]
        for name, (source, slot) in links(node).items():
            outputs = CLASSES[WORKFLOW[source]["class_type"]]["output"]
            assert 0 <= slot < len(outputs), (node_id, name)
            assert inputs[name] in ("*", outputs[slot]), (node_id, name)


def test_workflow_has_no_cycle():
    TopologicalSorter({i: [source for source, _ in links(node).values()] for i, node in WORKFLOW.items()}).prepare()


def test_every_node_is_needed_by_an_output():
    outputs = [i for i, node in WORKFLOW.items() if CLASSES[node["class_type"]]["output_node"]]
    assert set().union(*map(ancestors, outputs)) == set(WORKFLOW)


def test_node_ids_exist_in_the_workflow():
    assert NODE_IDS == {"image_loader_node": "16", "output_prefix": FINAL}
    assert WORKFLOW["16"]["class_type"] == "LoadImage"


def test_there_are_forty_shots_or_more_and_as_many_intermediates():
    assert len(savers_under(FINAL)) >= 40
    assert len(savers_under(INTERMEDIATE)) == len(savers_under(FINAL))
    assert len(nodes_of("SaveImage")) == 2 * len(savers_under(FINAL))


def test_every_final_image_is_its_own_shot_refined_from_the_face_reference():
    for node_id in savers_under(FINAL):
        behind = ancestors(node_id)
        qwen, z_image = sorted(only("KSampler", behind), key=lambda node: node["inputs"]["denoise"], reverse=True)
        assert "16" in behind
        assert qwen["inputs"]["denoise"] == 1.0
        assert 0 < z_image["inputs"]["denoise"] < 0.5


def test_shot_k_uses_the_ids_of_hundred_k_and_shares_only_those_below():
    shots = {int(node_id) // 100 for node_id in savers_under(FINAL)}
    assert shots == {int(node_id) // 100 for node_id in savers_under(INTERMEDIATE)} == set(range(1, len(shots) + 1))
    for node_id in nodes_of("SaveImage"):
        assert {int(i) // 100 for i in ancestors(node_id)} == {0, int(node_id) // 100}


def test_each_shot_has_its_own_prompts_and_seeds():
    shots = len(savers_under(FINAL))
    for texts in (prompt_texts("TextEncodeQwenImageEditPlus", "prompt"), prompt_texts("CLIPTextEncode", "text")):
        assert len(texts) == len(set(texts)) == shots
    seeds = [node["inputs"]["seed"] for node in nodes_of("KSampler").values()]
    assert len(seeds) == len(set(seeds)) == 2 * shots


def test_prompts_leave_the_identity_to_the_face_reference():
    gendered = re.compile(
        r"\b(he|she|his|her|him|man|woman|boy|girl|male|female|beard|blonde?|brunette|young|old)\b", re.IGNORECASE
    )
    texts = prompt_texts("TextEncodeQwenImageEditPlus", "prompt") + prompt_texts("CLIPTextEncode", "text")
    texts += [entry["prompt"] for entry in PROMPTS]
    assert [text for text in texts if gendered.search(text)] == []


def test_sizes_are_sdxl_buckets_of_about_one_megapixel():
    sizes = {(node["inputs"]["width"], node["inputs"]["height"]) for node in nodes_of("EmptySD3LatentImage").values()}
    assert {(w > h) - (w < h) for w, h in sizes} == {-1, 0, 1}
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert 0.95 <= width * height / 1024**2 <= 1.0


def test_every_prompt_is_encoded_before_sampling_begins():
    """ComfyUI runs the nodes before an output first; without the previews the large models would be swapped for every shot."""
    previewed = {node["inputs"]["source"][0] for node in nodes_of("PreviewAny").values()}
    for sampler in nodes_of("KSampler").values():
        assert sampler["inputs"]["positive"][0] in previewed


def test_there_are_forty_different_example_prompts():
    assert len(PROMPTS) == 40
    for entry in PROMPTS:
        assert {"prompt", "name"} <= set(entry) <= {"prompt", "name", "seed"}
        assert entry["prompt"].strip() == entry["prompt"] != ""
        assert re.fullmatch(r"[a-z0-9_]{1,40}", entry["name"])
        assert "nyafyi_woman" not in entry["prompt"]
    assert len({entry["prompt"] for entry in PROMPTS}) == len({entry["name"] for entry in PROMPTS}) == 40
    seeds = [entry["seed"] for entry in PROMPTS if "seed" in entry]
    assert seeds
    assert all(type(seed) is int and seed >= 0 for seed in seeds)
