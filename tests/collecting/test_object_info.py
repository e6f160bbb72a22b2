"""What is found before a workflow is sent, against the verdicts of a real ComfyUI 0.33.0.

`validation.jsonl` contains generated graphs and which of their outputs that server refused; `object_info.json` what it says
of their classes. The server had two files of each kind of model.
"""

import copy
import json

import pytest
from comfyui_workspace import DATA
from hypothesis import given
from hypothesis import strategies as st

from collecting.object_info import NodeClasses
from common.files import read_json_lines

SERVER = json.loads((DATA / "0.33.0" / "object_info.json").read_text(encoding="utf-8"))
VERDICTS = read_json_lines(DATA / "0.33.0" / "validation.jsonl")
CLASSES = NodeClasses(SERVER["object_info"], SERVER["node_replacements"])


def preview(node: str, slot: int = 0) -> dict:
    return {"class_type": "PreviewAny", "inputs": {"source": [node, slot]}}


def problems(graph: dict, classes: NodeClasses = CLASSES, outputs: tuple[str, ...] = ("9",)) -> list:
    return classes.problems(graph, outputs)


def texts(graph: dict, classes: NodeClasses = CLASSES) -> str:
    return "\n".join(problem.text for problem in problems(graph, classes))


def latent(**inputs: object) -> dict:
    values = {"width": 512, "height": 512, "batch_size": 1} | inputs
    return {"1": {"class_type": "EmptyLatentImage", "inputs": {k: v for k, v in values.items() if v is not ...}}, "9": preview("1")}


def custom(specification: dict, module: object = "custom_nodes.pack", **inputs: object) -> tuple[dict, NodeClasses]:
    """A graph of one node of a class that a custom node provides, and a server that has the class."""
    node_class = {"input": specification, "output": ["INT"], "output_node": False, "python_module": module}
    image = {"class_type": "LoadImage", "inputs": {"image": "a.png"}}
    graph = {"1": {"class_type": "Custom", "inputs": inputs}, "8": image, "9": preview("1")}
    return graph, NodeClasses(SERVER["object_info"] | {"Custom": node_class})


@pytest.mark.parametrize("verdict", VERDICTS, ids=[f"{n}-{each['errors'][-1:] or 'sound'}" for n, each in enumerate(VERDICTS)])
def test_outputs_that_comfyui_refuses_are_found_and_no_others(verdict):
    before = copy.deepcopy(verdict["graph"])
    found = problems(verdict["graph"], outputs=tuple(verdict["outputs"]))
    assert verdict["graph"] == before
    assert frozenset().union(*(problem.stops for problem in found)) <= set(verdict["refused"])
    assert bool(found) == bool(verdict["refused"])


def test_verdicts_are_of_every_kind():
    errors = {error for verdict in VERDICTS for error in verdict["errors"]}
    kinds = {"required_input_missing", "value_not_in_list", "value_bigger_than_max", "value_smaller_than_min", "bad_linked_input"}
    kinds |= {"return_type_mismatch", "dependency_cycle", "missing_node_type", "exception_during_validation"}
    assert kinds <= errors
    assert sum(not verdict["refused"] for verdict in VERDICTS) > len(VERDICTS) / 3


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (latent(width=...), "node 1 (EmptyLatentImage): the required input width is missing: set it in ComfyUI"),
        (latent(width=..., widht=5), "(did you mean 'widht'?)"),
        (latent(width=0), "node 1 (EmptyLatentImage): width must be between 16 and 16384 (is 0)"),
        (latent(width="wide"), "node 1 (EmptyLatentImage): width must be a whole number (is 'wide')"),
        (latent(width=None), "width must be a whole number (is None)"),
        (latent(width=[1, 2, 3]), "input width must be a value or a link [node id, output number] (is [1, 2, 3])"),
        (latent(width=["77", 0]), "input width is connected to node 77, which does not exist"),
        (latent(width=["9", 5]), "input width is connected to output 5 of node 9 (PreviewAny), which has only 1; export"),
        (latent(width=["1", 0]), "input width takes INT, but output 0 of node 1 (EmptyLatentImage) is LATENT"),
        (
            {
                "1": {"class_type": "LoadImageOutput", "inputs": {"image": ["2", 0]}},
                "2": {"class_type": "ComfySwitchNode", "inputs": {"switch": True, "on_false": ["3", 0], "on_true": ["3", 0]}},
                "3": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
                "9": preview("1"),
            },
            "node 1 (LoadImageOutput): input image must be the name of a file, but is connected to node 2 (ComfySwitchNode)",
        ),
        ({"1": {"class_type": "PrimitveInt", "inputs": {}}, "9": preview("1")}, "node 1: ComfyUI has no node class PrimitveInt"),
        ({"1": {"class_type": "PrimitveInt", "inputs": {}}, "9": preview("1")}, "(did you mean 'PrimitiveInt'?)"),
        ({"1": preview("9"), "9": preview("1")}, "in a circle (1 (PreviewAny) -> 9 (PreviewAny) -> 1 (PreviewAny))"),
        ({"9": {"class_type": "PrimitiveInt", "inputs": {"value": 1}}}, "has no output node in this workflow: add a SaveImage"),
    ],
)
def test_problem_names_node_input_and_what_is_allowed(graph, words):
    assert words in texts(graph)


def test_nearest_value_and_a_few_choices_are_named():
    graph = {"1": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "eulr"}}, "9": preview("1")}
    assert "ComfyUI has no sampler_name 'eulr': choose one of euler, " in texts(graph)
    assert texts(graph).endswith("... (did you mean 'euler'?)")
    graph["1"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "A.safetensors"}}
    assert "add the file there, or choose another (did you mean 'a.safetensors'?)" in texts(graph)


def test_title_of_the_users_own_is_named():
    graph = latent(width=0)
    graph["1"]["_meta"] = {"title": "Portrait size"}
    assert texts(graph).endswith('(its title is "Portrait size")')
    graph["1"]["_meta"] = {"title": SERVER["object_info"]["EmptyLatentImage"]["display_name"]}
    assert texts(graph).endswith("(is 0)")


def test_only_what_the_collected_images_depend_on_can_be_refused():
    graph = latent() | {"5": latent(width=0)["1"], "6": preview("5")}
    assert problems(graph) == []
    assert problems(graph, outputs=("6", "9"))[0].stops == {"6"}
    assert problems(graph, outputs=("9", "1")) == []


@pytest.mark.parametrize("module", ["custom_nodes.pack", "comfy_api_nodes.nodes_kling", "custom_nodes", 5])
def test_values_that_custom_and_partner_nodes_may_accept_are_reported_and_never_certain(module):
    specification = {"required": {"mode": [["a", "b"]], "size": ["INT", {"min": 1}], "any": ["PIPE"]}}
    graph, classes = custom(specification, module, mode="c", size=0, any=["8", 0])
    found = problems(graph, classes)
    assert len(found) == 3
    assert not any(problem.stops for problem in found)
    graph["1"]["inputs"] = {"mode": "a", "size": "x"}
    assert [problem.stops for problem in problems(graph, classes)] == [{"9"}, {"9"}]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "the required input mode is missing"),
        ({"mode": "nope"}, "ComfyUI has no mode 'nope': choose one of small, wide"),
        ({"mode": "wide"}, "the required input mode.w is missing"),
        ({"mode": "wide", "mode.w": 500, "mode.kind": "x"}, "mode.w must be between 1 and 100 (is 500)"),
        ({"mode": "wide", "mode.w": 5, "mode.kind": "z"}, "ComfyUI has no mode.kind 'z': choose one of x, y"),
        ({"mode": "wide", "mode.w": 5, "mode.kind": "x"}, None),
        ({"mode": "small", "mode.w": 500}, None),
    ],
)
def test_inputs_of_a_dynamic_combo_depend_on_the_chosen_key(inputs, words):
    wide = {"required": {"w": ["INT", {"min": 1, "max": 100}], "kind": ["COMBO", {"options": ["x", "y"]}]}}
    options = {"options": [{"key": "small", "inputs": {"required": {}}}, {"key": "wide", "inputs": wide}]}
    graph, classes = custom({"required": {"mode": ["COMFY_DYNAMICCOMBO_V3", options]}}, **inputs)
    assert (words in texts(graph, classes)) if words else problems(graph, classes) == []


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"loras.0.name": "a"}, None),
        ({"loras.0.name": "a", "loras.1.name": "b", "loras.1.strength": 2}, None),
        ({}, "loras must have from 1 to 2 rows (has 0)"),
        ({"loras.0.strength": 1}, "the required input loras.0.name is missing"),
        ({"loras.0.name": "c"}, "ComfyUI has no loras.0.name 'c'"),
        ({"loras.0.name": "a", "loras.2.name": "a"}, "input loras.2.name must be loras.ROW.NAME with ROW from 0 to 1"),
        ({"loras.0.name": "a", "loras.00.name": "a"}, "input loras.00.name must be"),
        ({"loras.0.name": "a", "loras.0.size": 1}, "NAME one of name, strength"),
    ],
)
def test_rows_of_a_dynamic_group(inputs, words):
    template = {"required": {"name": ["COMBO", {"options": ["a", "b"]}]}, "optional": {"strength": ["FLOAT", {"max": 2}]}}
    group = ["COMFY_DYNAMICGROUP_V3", {"template": template, "min": 1, "max": 2}]
    graph, classes = custom({"required": {"loras": group}}, **inputs)
    assert (words in texts(graph, classes)) if words else problems(graph, classes) == []


def test_slot_with_inputs_of_its_own():
    slot = ["COMFY_DYNAMICSLOT_V3", {"slotType": "IMAGE", "inputs": {"required": {"size": ["INT", {}]}}}]
    assert problems(*custom({"optional": {"image": slot}})) == []
    assert "image.size is missing" in texts(*custom({"optional": {"image": slot}}, image=["8", 0]))


@pytest.mark.parametrize(
    ("kind", "options", "value"),
    [
        ("COMBO", {"remote": {"route": "/x"}}, "anything"),
        ("COMBO", {"remote_combo": {"route": "/x"}, "options": []}, "anything"),
        ("COMBO", {}, "filled in by the web page"),
        ("COMBO", {"options": ["a", "b"], "multiselect": True}, {"__value__": ["a", "b"]}),
        ("COMBO", {"options": [1, 2]}, {"__value__": 2}),
        ("INT", {"min": 0}, "12"),
        ("INT", {"min": 0, "step": 8}, 1.7),
        ("INT", {"forceInput": True}, 4),
        ("FLOAT", {"max": 1}, "nan"),
        ("FLOAT,INT", {"min": 1.0}, 2),
        ("STRING", {}, None),
        ("BOOLEAN", {}, "yes"),
        ("IMAGE", {}, {"__value__": []}),
        ("SOMETHING_NEW_V9", {"template": 5}, {}),
        ([["a"], "b"], {}, ["8", 0]),
        ("STRING,IMAGE", {"image_upload": True}, ["8", 0]),
        ("*", {"lazy": True, "rawLink": True}, ["8", 0]),
        ("MASK,*", {}, ["8", 0]),
        ("STRING , IMAGE", {}, ["8", 0]),
    ],
)
def test_values_that_comfyui_takes(kind, options, value):
    graph, classes = custom({"required": {"x": [kind, options]}, "hidden": {"prompt": "PROMPT"}}, x=value, undeclared=["77", 0])
    assert not any(problem.stops for problem in problems(graph, classes))
    if not isinstance(kind, list):
        assert problems(graph, classes) == []


def test_values_of_a_multiple_choice_are_checked_one_by_one():
    graph, classes = custom({"required": {"x": ["COMBO", {"options": ["a"], "multiselect": True}]}}, x={"__value__": ["a", "c"]})
    assert texts(graph, classes) == "node 1 (Custom): ComfyUI has no x 'c': choose one of a"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["1", "x", "INT", "COMBO"]),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.sampled_from(["1", "x", "key", "options", "min", "max"]), each),
    max_leaves=6,
)
entries = st.one_of(
    json_values,
    st.tuples(
        st.sampled_from(["INT", "FLOAT", "COMBO", "STRING", "IMAGE", "COMFY_AUTOGROW_V3", "COMFY_DYNAMICGROUP_V3"])
        | st.sampled_from(["COMFY_DYNAMICCOMBO_V3", "COMFY_DYNAMICSLOT_V3"]),
        st.dictionaries(st.sampled_from(["min", "max", "options", "template", "inputs", "multiselect", "remote"]), json_values),
    ).map(list),
)
specifications = json_values | st.fixed_dictionaries({"required": json_values | st.dictionaries(st.just("x"), entries)})
node_classes = json_values | st.fixed_dictionaries({"input": specifications, "output": json_values, "output_node": json_values})


@pytest.mark.fuzz
@given(node_classes, st.dictionaries(st.sampled_from(["x", "x.key", "x.0.x", "1"]), json_values), json_values)
def test_whatever_a_server_says_of_its_classes_and_a_graph_has_in_its_inputs(node_class, inputs, replacement):
    graph = {"1": {"class_type": "Odd", "inputs": inputs}, "2": {"class_type": "Old", "inputs": inputs}, "9": preview("1")}
    replacements = {"Old": [{"new_node_id": "Odd", "input_mapping": replacement, "output_mapping": replacement}]}
    classes = NodeClasses(SERVER["object_info"] | {"Odd": node_class}, replacements)
    assert all(isinstance(problem.text, str) for problem in problems(graph, classes))
