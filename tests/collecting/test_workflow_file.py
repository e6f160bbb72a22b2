"""The workflow file as users have it: API format, an image made by ComfyUI, a request, or something else."""

import contextlib
import io
import json
import struct
import zlib

import pytest
from comfyui_workspace import workflow
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from collecting.workflow import parse_workflow
from collecting.workflow_file import find_graph, parse_workflow_file

GRAPH = workflow("per_batch_ksampler.json")
MAPPING = workflow("per_batch_ksampler.config.json")
UI_FORMAT = workflow("ui_format_not_api.json")


def png(**texts: str) -> bytes:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG", pnginfo=info)
    return content.getvalue()


def with_size(width: int, height: int) -> bytes:
    """A PNG with another size in its header."""
    header = b"IHDR" + struct.pack(">II", width, height) + png()[24:29]
    return png()[:12] + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]


def with_exif(image_format: str, text: str) -> bytes:
    """As ComfyUI's nodes for animations do it."""
    image, content = Image.new("RGB", (4, 4)), io.BytesIO()
    exif = image.getexif()
    exif[0x0110] = text
    image.save(content, image_format, exif=exif)
    return content.getvalue()


def problems_of(content: object) -> str:
    problems: list[str] = []
    assert find_graph(content, problems) is None
    return "\n".join(problems)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(GRAPH).encode(),
        b"\xef\xbb\xbf" + json.dumps(GRAPH).encode(),
        json.dumps(GRAPH).encode("utf-16"),
        png(prompt=json.dumps(GRAPH), workflow=json.dumps(UI_FORMAT)),
        with_exif("WEBP", "prompt:" + json.dumps(GRAPH)),
        with_exif("JPEG", "Prompt:" + json.dumps(GRAPH)),
        json.dumps({"prompt": GRAPH, "client_id": "x", "extra_data": {"extra_pnginfo": {"workflow": UI_FORMAT}}}).encode(),
        json.dumps({"prompt": json.dumps(GRAPH), "workflow": json.dumps(UI_FORMAT)}).encode(),
        json.dumps({"output": GRAPH, "workflow": UI_FORMAT}).encode(),
        json.dumps(GRAPH | {"version": 0.4, "extra": {"ds": {}}, "_meta": "x", "extra_data": {}, "last_node_id": 12}).encode(),
    ],
    ids=["json", "mark", "utf16", "png", "webp", "jpeg", "request", "texts", "graph_to_prompt", "other entries"],
)
def test_graph_is_found_however_it_came_out_of_comfyui(content):
    problems: list[str] = []
    assert find_graph(parse_workflow_file(content), problems) == GRAPH
    assert problems == []


def test_only_what_comfyui_runs_is_submitted():
    graph = json.loads(json.dumps(GRAPH))
    graph["12"] |= {"is_changed": [float("nan")], "widgets_values": [1]}
    del graph["3"]["_meta"]
    content = png(prompt=json.dumps(graph))
    parsed = parse_workflow(parse_workflow_file(content), MAPPING, [])
    built = parsed.build_graph((), None, {})
    assert built["12"] == GRAPH["12"]
    assert built["3"] == GRAPH["3"] | {"_meta": {}}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "workflow: node 3 (KSampler): input cfg is NaN or infinite"),
        ([float("-inf"), 1], "workflow: node 3 (KSampler): input cfg is NaN or infinite"),
        ("\ud800", "input cfg contains half of a surrogate pair"),
        (json.loads("[" * 150 + "]" * 150), "input cfg is nested more than 100 levels deep"),
    ],
)
def test_values_that_cannot_be_sent_are_named(value, words):
    graph = json.loads(json.dumps(GRAPH))
    graph["3"]["inputs"]["cfg"] = value
    assert words in problems_of(graph)


def test_deep_values_that_can_be_sent_are_copied():
    graph = json.loads(json.dumps(GRAPH))
    graph["3"]["inputs"]["curve"] = json.loads('{"a":' * 99 + "1" + "}" * 99)
    parsed = parse_workflow(graph, MAPPING, [])
    assert parsed.build_graph((), "x", {})["3"] == graph["3"]


@pytest.mark.parametrize(
    "content",
    [UI_FORMAT, {"workflow": UI_FORMAT}, {"nodes": [], "links": []}, {"prompt": UI_FORMAT}, {"workflow": UI_FORMAT, "version": 1}],
)
def test_web_page_format_is_named_wherever_it_is(content):
    assert 'format of ComfyUI\'s web page, which cannot be submitted; export it with "Save (API Format)"' in problems_of(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png(), "^is an image without a workflow of ComfyUI in it; export it with"),
        (png(parameters="a woman\nSteps: 20"), "without a workflow of ComfyUI"),
        (png(prompt="{"), "Expecting property name"),
        (png(prompt=json.dumps(GRAPH))[:60], "^is an image that cannot be read"),
        (with_size(2**16, 2**16), "^is an image that cannot be read .*exceeds limit"),
        (b"", "^is not valid JSON in UTF-8: Expecting value"),
        (b"GIF89a", "^is not valid JSON"),
        (b"\xff\xfe\x00", "^is not valid JSON in UTF-8: .*; export it with"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_file_without_a_workflow_is_refused_with_the_reason(content, words):
    with pytest.raises(ValueError, match=words):
        parse_workflow_file(content)


def test_image_is_a_workflow_file_for_the_collector(space, standin, collect):
    space.per_batch([{"prompt": "a woman", "seed": 1}])
    space.write("COMFYUI_WORKFLOW", "ComfyUI_00001_.png", png(prompt=json.dumps(GRAPH)))
    assert collect().code == 0
    assert standin.submitted[0]["prompt"]["6"]["inputs"]["text"] == "a woman"
    space.write("COMFYUI_WORKFLOW", "ComfyUI_00001_.png", png())
    result = collect()
    assert result.code == 2
    assert "ComfyUI_00001_.png is an image without a workflow" in result.err


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.sampled_from(["1", "7:2", "prompt", "nodes", "inputs"]), each),
    max_leaves=8,
)
nodes = json_values | st.fixed_dictionaries({"class_type": st.text(max_size=4) | st.just("SaveImage"), "inputs": json_values})


@pytest.mark.fuzz
@given(json_values | st.dictionaries(st.sampled_from(["1", "2", "12:3", "prompt", "version"]), nodes), json_values)
def test_whatever_the_files_contain_there_is_a_workflow_or_a_problem(content, config):
    problems: list[str] = []
    parsed = parse_workflow(content, config, problems)
    assert (parsed is None) == bool(problems)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "AVIF"])
@given(st.data())
def test_a_damaged_image_is_a_workflow_or_refused(image_format, data):
    image, file = Image.new("RGB", (8, 8)), io.BytesIO()
    image.getexif()[271] = f"prompt:{json.dumps(GRAPH)}"
    image.save(file, image_format, exif=image.getexif())
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        parse_workflow_file(bytes(content))


def test_an_avif_without_its_image_is_refused():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "AVIF")
    with pytest.raises(ValueError, match="is an image that cannot be read"):
        parse_workflow_file(file.getvalue().replace(b"av01", b"xxxx"))
