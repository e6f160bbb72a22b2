"""The included workflows, their shots and node ids, and the example prompts.

`data/object_info/VERSION.json` is what ComfyUI 0.3.64 and 0.33.0 without models answered at /object_info, reduced to the
node classes of these workflows.
"""

import json
import re
import sys
import tomllib
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflows"))
import make_workflows  # noqa: E402

VERSIONS = ("0.3.64", "0.33.0")
CLASSES = {
    version: json.loads((ROOT / f"tests/data/object_info/{version}.json").read_text(encoding="utf-8"))["classes"]
    for version in VERSIONS
}
NAMES = ("workflow_api.json", "workflows/qwen_image_edit_2511/workflow_api.json")
WORKFLOWS = {name: json.loads((ROOT / name).read_text(encoding="utf-8")) for name in NAMES}
DEFAULT = WORKFLOWS["workflow_api.json"]
SHOTS = tomllib.loads((ROOT / "workflows/shots.toml").read_text(encoding="utf-8"))["shots"]
PROMPTS = json.loads((ROOT / "prompts_example.json").read_text(encoding="utf-8"))
MODEL_INPUTS = {"unet_name", "clip_name", "vae_name", "lora_name", "image"}
WIDGET_TYPES = {"STRING": (str,), "INT": (int,), "FLOAT": (int, float), "COMBO": (str,), "BOOLEAN": (bool,)}

every_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def mapping(name: str) -> dict[str, str]:
    path = ROOT / "config/workflow_config.json" if name == "workflow_api.json" else (ROOT / name).parent / "workflow_config.json"
    return json.loads(path.read_text(encoding="utf-8"))


def nodes_of(workflow: dict, class_type: str) -> dict[str, dict]:
    return {node_id: node for node_id, node in workflow.items() if node["class_type"] == class_type}


def savers(name: str) -> dict[str, dict]:
    """The SaveImage nodes whose images are collected."""
    prefix = mapping(name)["output_prefix"]
    return {
        i: node
        for i, node in nodes_of(WORKFLOWS[name], "SaveImage").items()
        if node["inputs"]["filename_prefix"].startswith(prefix)
    }


def links(node: dict) -> dict[str, list]:
    return {name: value for name, value in node["inputs"].items() if isinstance(value, list)}


def ancestors(workflow: dict, *node_ids: str) -> set[str]:
    """Ids of all nodes that these depend on, themselves included."""
    found, waiting = set(), list(node_ids)
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += [source for source, _ in links(workflow[current]).values()]
    return found


def text_of(workflow: dict, value: str | list) -> str:
    """The text that reaches an input, through concatenations."""
    if isinstance(value, str):
        return value
    inputs = workflow[value[0]]["inputs"]
    if "value" in inputs:
        return inputs["value"]
    return inputs["delimiter"].join(text_of(workflow, inputs[name]) for name in ("string_a", "string_b"))


def prompts(workflow: dict) -> list[str]:
    texts = [node["inputs"]["prompt"] for node in nodes_of(workflow, "TextEncodeQwenImageEditPlus").values()]
    texts += [text_of(workflow, node["inputs"]["text"]) for node in nodes_of(workflow, "CLIPTextEncode").values()]
    return [text for text in texts if text]


def test_the_files_are_what_the_shots_make(tmp_path):
    assert make_workflows.qwen_2509_and_z_image(SHOTS) == DEFAULT
    assert make_workflows.qwen_2511(SHOTS) == WORKFLOWS["workflows/qwen_image_edit_2511/workflow_api.json"]


@every_workflow
def test_workflow_is_in_api_format(name):
    for node_id, node in WORKFLOWS[name].items():
        assert node_id.isdecimal()
        assert set(node) == {"class_type", "inputs", "_meta"}
        assert node["_meta"]["title"].strip()


@every_workflow
@pytest.mark.parametrize("version", VERSIONS)
def test_every_input_is_one_that_the_server_accepts_and_only_models_and_the_face_are_missing(name, version):
    missing = set()
    for node_id, node in WORKFLOWS[name].items():
        inputs = CLASSES[version][node["class_type"]]["input"]
        required, optional = inputs.get("required", {}), inputs.get("optional", {})
        assert set(required) <= set(node["inputs"]) <= set(required) | set(optional), node_id
        for key, value in node["inputs"].items():
            kind, *options = (required | optional)[key]
            if isinstance(kind, list) and value not in kind:
                missing.add(key)
                assert kind in ([], ["pixel_space"]), (node_id, key, value)
            elif kind in ("INT", "FLOAT") and not isinstance(value, list):
                assert options[0]["min"] <= value <= options[0]["max"], (node_id, key)
            if isinstance(kind, str) and kind in WIDGET_TYPES and not isinstance(value, list):
                assert type(value) in WIDGET_TYPES[kind], (node_id, key)
    assert missing <= MODEL_INPUTS


@every_workflow
@pytest.mark.parametrize("version", VERSIONS)
def test_links_point_to_outputs_of_the_right_type(name, version):
    for node_id, node in WORKFLOWS[name].items():
        inputs = CLASSES[version][node["class_type"]]["input"]
        kinds = inputs.get("required", {}) | inputs.get("optional", {})
        for key, (source, slot) in links(node).items():
            outputs = CLASSES[version][WORKFLOWS[name][source]["class_type"]]["output"]
            assert 0 <= slot < len(outputs), (node_id, key)
            assert kinds[key][0] in ("*", outputs[slot]), (node_id, key)


@every_workflow
def test_workflow_has_no_cycle(name):
    TopologicalSorter({i: [source for source, _ in links(node).values()] for i, node in WORKFLOWS[name].items()}).prepare()


@every_workflow
def test_every_node_is_needed_by_an_output(name):
    outputs = [i for i, node in WORKFLOWS[name].items() if CLASSES["0.33.0"][node["class_type"]]["output_node"]]
    assert ancestors(WORKFLOWS[name], *outputs) == set(WORKFLOWS[name])


def test_node_ids_of_the_default_workflow():
    ids = mapping("workflow_api.json")
    assert (ids["image_loader_node"], ids["output_prefix"]) == ("16", "Qwen_Consistent_Char/Z_IMG_FINAL")
    assert DEFAULT["16"]["class_type"] == "LoadImage"


@every_workflow
def test_every_shot_is_collected_and_made_from_the_scaled_face(name):
    """A face under a megapixel would be enlarged blockwise by the encoders."""
    workflow = WORKFLOWS[name]
    assert len(savers(name)) == len(SHOTS)
    for node_id in savers(name):
        encoders = [workflow[i] for i in ancestors(workflow, node_id) if workflow[i]["class_type"] == "TextEncodeQwenImageEditPlus"]
        assert encoders
        for encoder in encoders:
            scale = workflow[encoder["inputs"]["image1"][0]]
            assert scale["class_type"] == "FluxKontextImageScale"
            assert scale["inputs"]["image"] == ["16", 0]


def test_small_faces_are_redrawn_less():
    for number, shot in enumerate(SHOTS, 1):
        qwen, z_image = DEFAULT[f"{number}12"], DEFAULT[f"{number}23"]
        assert qwen["inputs"]["denoise"] == 1.0
        assert z_image["inputs"]["denoise"] == {"close": 0.25, "half": 0.2, "full": 0.15}[shot["framing"]]


@every_workflow
def test_shot_k_uses_the_ids_of_hundred_k_and_shares_only_those_below(name):
    workflow = WORKFLOWS[name]
    assert {int(i) // 100 for i in workflow} == set(range(len(SHOTS) + 1))
    for node_id in nodes_of(workflow, "SaveImage"):
        assert {int(i) // 100 for i in ancestors(workflow, node_id)} == {0, int(node_id) // 100}


@every_workflow
def test_each_shot_has_its_own_prompts_and_seeds(name):
    stages = 2 if name == "workflow_api.json" else 1
    texts = prompts(WORKFLOWS[name])
    assert len(texts) == len(set(texts)) == stages * len(SHOTS)
    seeds = [node["inputs"]["seed"] for node in nodes_of(WORKFLOWS[name], "KSampler").values()]
    assert len(seeds) == len(set(seeds)) == stages * len(SHOTS)


def test_one_node_describes_the_person_in_every_z_image_prompt():
    person = nodes_of(DEFAULT, "PrimitiveStringMultiline")
    assert list(person) == ["25"]
    for encoder in nodes_of(DEFAULT, "CLIPTextEncode").values():
        assert text_of(DEFAULT, encoder["inputs"]["text"]).startswith(person["25"]["inputs"]["value"] + " ")


@every_workflow
def test_prompts_leave_the_identity_to_the_face_reference(name):
    gendered = re.compile(
        r"\b(he|she|his|her|him|man|woman|boy|girl|male|female|beard|blonde?|brunette|young|old)\b", re.IGNORECASE
    )
    people = re.sub(r"\bold buildings\b", "", " | ".join(prompts(WORKFLOWS[name]) + [entry["prompt"] for entry in PROMPTS]))
    assert gendered.findall(people) == []


def test_a_third_of_the_shots_is_close_a_third_half_a_third_full():
    assert len(SHOTS) >= 48
    assert set(Counter(shot["framing"] for shot in SHOTS).values()) == {len(SHOTS) // 3}


def test_shots_vary_in_view_expression_background_clothes_and_place():
    assert {"sad", "angry", "surprise", "laugh", "smile", "neutral"} <= {shot["expression"] for shot in SHOTS}
    views = Counter(shot["view"] for shot in SHOTS)
    assert views["profile"] >= 4
    assert views["back"] >= 3
    assert min(Counter(shot["background"] for shot in SHOTS)[kind] for kind in ("plain", "busy")) >= len(SHOTS) // 3
    for key in ("name", "scene", "clothes", "place"):
        assert len({shot[key] for shot in SHOTS}) == len(SHOTS), key


def test_sizes_are_sdxl_buckets_of_about_one_megapixel():
    sizes = {(node["inputs"]["width"], node["inputs"]["height"]) for node in nodes_of(DEFAULT, "EmptySD3LatentImage").values()}
    assert {(w > h) - (w < h) for w, h in sizes} == {-1, 0, 1}
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert 0.95 <= width * height / 1024**2 <= 1.0


@every_workflow
def test_what_a_sampler_needs_is_previewed_so_that_each_large_model_is_loaded_once(name):
    """ComfyUI runs nodes just before an output node first. Without the previews it would alternate between the two models."""
    workflow = WORKFLOWS[name]
    previewed = {node["inputs"]["source"][0] for node in nodes_of(workflow, "PreviewAny").values()}
    for node in nodes_of(workflow, "KSampler").values():
        assert node["inputs"]["positive"][0] in previewed
        if node["inputs"]["denoise"] == 1.0:
            assert {node["inputs"]["negative"][0], node["inputs"]["latent_image"][0]} <= previewed
        else:
            encoded = workflow[node["inputs"]["latent_image"][0]]
            assert encoded["inputs"]["pixels"][0] in previewed


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
