"""Several face references, and the node that describes the person."""

import json

import pytest
from comfyui_workspace import png, workflow

from collecting.preflight import SHIPPED_PERSON
from common.settings import REPOSITORY

SCENE = "walks in a park"


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def edit_workflow() -> dict:
    """The per-batch workflow with an encoder that takes up to three images: the second one is scaled on its way there."""
    graph = workflow("per_batch_ksampler.json")
    graph["6"] = node("TextEncodeQwenImageEditPlus", clip=["4", 1], prompt=["23", 0], vae=["4", 2])
    graph["6"]["inputs"] |= {"image1": ["13", 0], "image2": ["21", 0]}
    graph["20"] = node("LoadImage", image="absent.png")
    graph["21"] = node("ImageScale", image=["20", 0], upscale_method="lanczos", width=64, height=64, crop="center")
    graph["22"] = node("PrimitiveStringMultiline", value="A photo of a person.")
    graph["23"] = node("StringConcatenate", string_a=["22", 0], string_b=["24", 0], delimiter=" ")
    graph["24"] = node("PrimitiveStringMultiline", value="placeholder")
    return graph


@pytest.fixture
def edit(space):
    space.per_batch([{"prompt": SCENE, "seed": 7}])
    space.write("COMFYUI_WORKFLOW", "workflow.json", edit_workflow())
    config = workflow("per_batch_ksampler.config.json")
    space.config = config | {"image_loader_node": ["12", 20], "positive_prompt_node": "24", "person_node": "22"}
    space.write("WORKFLOW_CONFIG", "config.json", space.config)
    (space.root / "b, c.png").write_bytes(png((0, 0, 255)))
    return space


def submitted(standin) -> dict:
    (body,) = standin.submitted
    return body["prompt"]


def both(space) -> str:
    return f"{space.environment['FACE_REFERENCE']},{space.root / 'second.png'}"


def test_each_node_gets_its_face_and_the_manifest_has_the_composed_prompt(edit, standin, collect):
    (edit.root / "second.png").write_bytes(png((0, 255, 0)))
    result = collect(FACE_REFERENCE=both(edit))
    assert (result.code, result.err) == (0, "")
    assert "Face reference: used in nodes 12 (LoadImage), 20 (LoadImage)" in result.out
    graph = submitted(standin)
    assert graph["6"]["inputs"]["image2"] == ["21", 0]
    names = [graph[node_id]["inputs"]["image"] for node_id in ("12", "20")]
    uploaded = {(standin.folder / "input" / name).read_bytes() for name in names}
    assert uploaded == {png(), png((0, 255, 0))}
    (line,) = edit.manifest()
    assert (line["prompt"], line["texts"], line["person"]) == (SCENE, [f"A photo of a person. {SCENE}"], "A photo of a person.")
    again = collect(FACE_REFERENCE=both(edit))
    assert "nothing was sent" in again.out


def test_surplus_node_is_left_out_with_the_links_and_nodes_that_need_it(edit, standin, collect):
    assert collect("--check").code == 0
    result = collect()
    assert (result.code, result.err) == (0, "")
    assert "used in node 12 (LoadImage); left out for lack of an image: 20 (LoadImage)" in result.out
    graph = submitted(standin)
    assert graph.keys() == edit_workflow().keys() - {"20", "21"}
    assert graph["6"]["inputs"].keys() == {"clip", "prompt", "vae", "image1"}
    assert len(edit.images()) == 1
    assert "nothing was sent" in collect().out


def test_one_face_gives_the_same_jobs_whether_its_node_is_named_or_listed(edit, standin, collect):
    for loaders in ("12", ["12"], 12):
        edit.write("WORKFLOW_CONFIG", "config.json", edit.config | {"image_loader_node": loaders})
        (standin.folder / "input" / "absent.png").write_bytes(png())
        assert collect().code == 0
    assert len(standin.submitted) == 1


def test_name_with_a_comma_is_one_file(edit, standin, collect):
    assert collect(FACE_REFERENCE=str(edit.root / "b, c.png")).code == 0
    assert (standin.folder / "input" / submitted(standin)["12"]["inputs"]["image"]).read_bytes() == png((0, 0, 255))


@pytest.mark.parametrize("flags", [(), ("--check",)])
def test_surplus_node_that_another_node_needs_is_refused_in_one_line(edit, standin, collect, flags):
    graph = edit_workflow()
    graph["14"]["inputs"]["pixels"] = ["21", 0]
    edit.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    result = collect(*flags)
    assert result.code == 4
    (line,) = [line for line in result.err.splitlines() if "face_reference" in line]
    assert (
        "node 20 (LoadImage) has no face reference and cannot be left out, because node 3 (KSampler) needs its input latent_image"
        in line
    )
    assert standin.submitted == []


def test_node_that_joins_a_used_face_with_a_surplus_one_is_not_left_out(edit, standin, collect):
    graph = edit_workflow()
    graph["25"] = node("ImageBlend", image1=["13", 0], image2=["21", 0], blend_factor=0.5, blend_mode="normal")
    graph["6"]["inputs"] |= {"image1": ["25", 0]}
    edit.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    result = collect()
    assert (result.code, standin.submitted) == (4, [])
    assert "because node 25 (ImageBlend) needs its input image2" in result.err


@pytest.mark.parametrize(
    ("config", "faces", "message"),
    [
        ({}, 3, "face_reference: 3 images, but image_loader_node in workflow_config names 2 nodes"),
        ({"image_loader_node": "12"}, 2, "face_reference: 2 images, but image_loader_node in workflow_config names 1 node "),
        ({"image_loader_node": []}, 2, "face_reference: 2 images, but image_loader_node in workflow_config names no nodes"),
        ({"image_loader_node": ["12", "12"]}, 1, "image_loader_node must be a node id or a list of different node ids"),
        ({"image_loader_node": ["12", None]}, 1, "image_loader_node must be a node id or a list of different node ids"),
        ({"image_loader_node": ["12", "99"]}, 1, "image_loader_node: the workflow has no node 99"),
        ({"image_loader_node": ["12", "6"]}, 1, "image_loader_node: node 6 (TextEncodeQwenImageEditPlus) has no input 'image'"),
        ({"person_node": "99"}, 1, "person_node: the workflow has no node 99"),
        ({"person_node": "8"}, 1, "person_node: node 8 (VAEDecode) has no text input"),
        ({"person_node": "24"}, 1, "person_node: is also positive_prompt_node"),
        ({"person_node": "23"}, 1, "person_node: node 23 (StringConcatenate) has several text inputs"),
        ({"person_node": "6"}, 1, "person_node: input prompt of node 6 (TextEncodeQwenImageEditPlus) is connected to node 23"),
        ({"person_node": ["22"]}, 1, "person_node must be a string"),
    ],
)
def test_mappings_that_do_not_fit_are_refused_in_one_line(edit, standin, collect, config, faces, message):
    edit.write("WORKFLOW_CONFIG", "config.json", edit.config | config)
    result = collect(FACE_REFERENCE=",".join([edit.environment["FACE_REFERENCE"]] * faces))
    assert result.code == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 2  # a title and one line
    assert standin.requests == []


def test_check_shows_the_description_of_the_person_with_a_hint_while_it_is_the_shipped_one(edit, collect):
    (edit.root / "second.png").write_bytes(png())
    out = collect("--check", FACE_REFERENCE=both(edit)).out
    assert "node 22 (PrimitiveStringMultiline) describes the person as 'A photo of a person.'; edit it there\n" in out
    graph = edit_workflow()
    graph["22"]["inputs"]["value"] = SHIPPED_PERSON
    edit.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    assert "edit it there: say what is special about yours" in collect("--check", FACE_REFERENCE=both(edit)).out


def test_hint_is_about_the_text_that_is_shipped():
    config = json.loads((REPOSITORY / "config" / "workflow_config.json").read_text(encoding="utf-8"))
    graph = json.loads((REPOSITORY / "workflow_api.json").read_text(encoding="utf-8"))
    assert graph[config["person_node"]]["inputs"]["value"] == SHIPPED_PERSON
