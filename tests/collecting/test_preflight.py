"""`--check` on images that a workflow names: they must be on the server, unless the face reference replaces them."""

import pytest
from comfyui_workspace import png, workflow


@pytest.fixture
def full(space):
    space.full_workflow()
    return space


@pytest.fixture
def without_face(full, monkeypatch, tmp_path):
    monkeypatch.setattr("common.project.DEFAULT_FACE", tmp_path / "missing.png")
    full.environment["FACE_REFERENCE"] = ""
    return full


def test_image_of_the_mapped_node_must_exist_without_a_face_reference(without_face, standin, collect):
    result = collect("--check")
    assert result.code == 4
    assert "ComfyUI has no image" in result.err
    assert "FACE_REFERENCE" in result.err
    (standin.folder / "input" / workflow_image()).write_bytes(png())
    assert collect("--check").code == 0


@pytest.mark.parametrize(("image", "code"), [("pose.png", 4), ("poses/pose.png", 0), ("pose.png [output]", 0)])
def test_other_images_must_exist_unless_the_server_does_not_list_them(full, standin, collect, image, code):
    graph = workflow("full_workflow_no_model.json")
    graph["500"] = {"class_type": "LoadImage", "inputs": {"image": image}}
    full.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    result = collect("--check")
    assert result.code == code
    assert ("node 500 (LoadImage): ComfyUI has no image 'pose.png': add the file there" in result.err) == (code == 4)


@pytest.mark.parametrize("flags", [(), ("--check",)])
def test_link_to_a_missing_node_is_a_wrong_setting(space, standin, collect, flags):
    space.per_batch([{"prompt": "a woman", "seed": 1}])
    graph = workflow("per_batch_ksampler.json")
    graph["8"]["inputs"]["samples"] = ["99", 0]
    space.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    result = collect(*flags)
    assert result.code == 2
    assert "node 8 (VAEDecode): input samples is connected to node 99, which does not exist" in result.err
    assert standin.submitted == []


def workflow_image() -> str:
    node = workflow("full_workflow_no_model.config.json")["image_loader_node"]
    return workflow("full_workflow_no_model.json")[node]["inputs"]["image"]


def with_inputs(**inputs: object) -> dict:
    """The recorded per-batch workflow with other inputs of its KSampler; `...` removes one."""
    graph = workflow("per_batch_ksampler.json")
    values = graph["3"]["inputs"] | inputs
    graph["3"]["inputs"] = {name: value for name, value in values.items() if value is not ...}
    return graph


@pytest.fixture
def batch(space):
    space.per_batch([{"prompt": "a woman", "seed": 1}])
    return space


@pytest.mark.parametrize("flags", [(), ("--check",)])
@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (with_inputs(cfg=...), "node 3 (KSampler): the required input cfg is missing"),
        (with_inputs(denoise=1.5), "node 3 (KSampler): denoise must be between 0.0 and 1.0 (is 1.5)"),
        (with_inputs(steps="many"), "node 3 (KSampler): steps must be a whole number (is 'many')"),
        (with_inputs(model=["4", 1]), "node 3 (KSampler): input model takes MODEL, but output 1 of node 4"),
        (with_inputs(positive=["4", 9]), "node 3 (KSampler): input positive is connected to output 9 of node 4"),
        (with_inputs(latent_image=["3", 0]), "depend on each other in a circle (3 (KSampler) -> 3 (KSampler))"),
    ],
)
def test_what_comfyui_would_refuse_is_found_before_anything_is_sent(batch, standin, collect, flags, graph, words):
    batch.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    result = collect(*flags)
    assert result.code == 4
    assert words in result.err
    assert standin.submitted == []


def test_workflow_of_which_comfyui_runs_a_part_is_sent(full, standin, collect):
    graph = workflow("full_workflow_no_model.json")
    broken = next(node_id for node_id, node in graph.items() if node["class_type"] == "SaveImage")
    del graph[broken]["inputs"]["images"]
    full.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    full.write("WORKFLOW_CONFIG", "config.json", {"image_loader_node": "16"})
    assert f"node {broken} (SaveImage): the required input images is missing" in collect("--check").err
    result = collect()
    assert result.code == 1
    assert len(standin.submitted) == 1


@pytest.mark.parametrize("fault", ["server_error", "login_page", "cut_off", "forbidden"])
@pytest.mark.parametrize("path", ["/object_info", "/node_replacements"])
def test_run_does_not_depend_on_what_the_server_says_of_its_classes(batch, standin, collect, fault, path):
    standin.fault(fault, on=path)
    assert collect().code == 0
    assert len(standin.submitted) == 1


@pytest.mark.parametrize(("seeds", "labels"), [([2**63], "prompt 1"), ([1, 2**63, 2**63, 2], "prompt 2 and 1 more")])
def test_seeds_that_the_node_does_not_take_are_named(batch, standin, collect, seeds, labels):
    graph = with_inputs(seed=["50", 0])
    graph["50"] = {"class_type": "PrimitiveInt", "inputs": {"value": 1}}
    batch.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    config = workflow("per_batch_ksampler.config.json") | {"seed_node": "50"}
    batch.write("WORKFLOW_CONFIG", "config.json", config)
    batch.write("PROMPTS_FILE", "prompts.json", [{"prompt": "a woman", "seed": seed} for seed in seeds])
    result = collect("--check")
    assert result.code == 4
    limits = f"between {-(2**63)} and {2**63 - 1} (is {2**63})"
    assert f"node 50 (PrimitiveInt): value must be {limits}, the seed of {labels}" in result.err
    assert collect().code == 4
    assert standin.submitted == []
    assert "set by GLOBAL_SEED" in collect("--check", GLOBAL_SEED=str(2**63)).err


def test_seed_of_a_primitive_node_is_in_the_manifest(batch, standin, collect):
    graph = with_inputs(seed=["50", 0])
    graph["50"] = {"class_type": "PrimitiveInt", "inputs": {"value": 42}}
    batch.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    batch.write("WORKFLOW_CONFIG", "config.json", workflow("per_batch_ksampler.config.json") | {"seed_node": "50"})
    batch.write("PROMPTS_FILE", "prompts.json", [{"prompt": "a woman", "seed": 7}, {"prompt": "a man"}])
    assert collect().code == 0
    assert standin.submitted[0]["prompt"]["50"]["inputs"]["value"] == 7
    first, second = sorted((line["seeds"] for line in batch.manifest()), key=lambda seeds: seeds["50.value"])
    assert first == {"50.value": 7}
    assert 0 <= second["50.value"] < 2**31


@pytest.mark.parametrize(("variables", "value"), [({"GLOBAL_SEED": "77"}, 77), ({}, 42)])
def test_seeds_behind_links_are_those_of_a_full_workflow(full, standin, collect, variables, value):
    graph = workflow("per_batch_ksampler.json")
    graph["3"]["inputs"]["seed"] = ["50", 0]
    graph["50"] = {"class_type": "PrimitiveInt", "inputs": {"value": 42}}
    full.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    full.write("WORKFLOW_CONFIG", "config.json", {"image_loader_node": "12"})
    assert collect(**variables).code == 0
    assert standin.submitted[0]["prompt"]["50"]["inputs"]["value"] == value
    assert full.manifest()[0]["seeds"] == {"50.value": value}
