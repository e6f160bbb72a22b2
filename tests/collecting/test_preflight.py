"""`--check` on images that a workflow names: they must be on the server, unless the face reference replaces them."""

import pytest
from comfyui_workspace import png, workflow


@pytest.fixture
def full(space):
    space.full_workflow()
    return space


@pytest.fixture
def without_face(full, monkeypatch, tmp_path):
    monkeypatch.setattr("collecting.jobs.DEFAULT_FACE", tmp_path / "missing.png")
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
