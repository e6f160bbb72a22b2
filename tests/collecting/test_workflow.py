"""How a mapping selects the mode, the inputs and the output nodes, and what is refused, all problems at once."""

import copy

import pytest
from comfyui_workspace import workflow

from collecting.graph import InputRef, graph_hash, literal_seeds, upstream_seeds
from collecting.jobs import MAX_SEED, Entry, parse_entries
from collecting.prompt_texts import prompt_texts
from collecting.workflow import parse_workflow


def problems_of(graph, config) -> str:
    problems = []
    assert parse_workflow(graph, config, problems) is None
    return "\n".join(problems)


@pytest.fixture
def batch():
    return workflow("per_batch_ksampler.json")


@pytest.fixture
def mapping():
    return workflow("per_batch_ksampler.config.json")


def test_both_prompt_and_seed_node_mean_per_batch(batch, mapping):
    parsed = parse_workflow(batch, mapping, [])
    assert parsed.per_batch
    assert parsed.face_inputs == (InputRef("12", "image"),)
    assert parsed.text_inputs == (InputRef("6", "text"),)
    assert parsed.seed_input == InputRef("3", "seed")
    assert parsed.output_nodes == ("9",)


def test_neither_means_full_workflow_and_the_prefix_selects_the_nodes():
    parsed = parse_workflow(workflow("full_workflow_no_model.json"), workflow("full_workflow_no_model.config.json"), [])
    assert not parsed.per_batch
    assert parsed.output_nodes == ("300", "301", "302")


def test_without_prefix_and_output_node_every_saving_node_is_used_but_no_preview():
    parsed = parse_workflow(workflow("full_workflow_no_model.json"), {}, [])
    assert parsed.output_nodes == ("60", "300", "301", "302")
    assert parsed.face_inputs == ()


@pytest.mark.parametrize("given", ["positive_prompt_node", "seed_node"])
def test_exactly_one_of_prompt_and_seed_node_is_refused(batch, mapping, given):
    message = problems_of(batch, {given: mapping[given]})
    assert "positive_prompt_node" in message
    assert "seed_node" in message
    assert "set both" in message


def test_only_mapped_inputs_change(batch, mapping):
    before = copy.deepcopy(batch)
    parsed = parse_workflow(batch, mapping, [])
    built = parsed.build_graph(["faces/me.png"], "a woman", {InputRef("3", "seed"): 5})
    changed = {
        (node_id, name)
        for node_id, node in built.items()
        for name, value in node["inputs"].items()
        if value != before[node_id]["inputs"][name]
    }
    assert changed == {("12", "image"), ("6", "text"), ("3", "seed")}
    assert (built["12"]["inputs"]["image"], built["6"]["inputs"]["text"], built["3"]["inputs"]["seed"]) == (
        "faces/me.png",
        "a woman",
        5,
    )
    assert built["7"] == before["7"]
    assert batch == before


@pytest.mark.parametrize(
    ("class_type", "inputs", "expected"),
    [
        ("CLIPTextEncode", {"text": "x", "clip": ["4", 1]}, ("text",)),
        ("TextEncodeQwenImageEditPlus", {"prompt": "x", "clip": ["4", 1], "image1": ["12", 0]}, ("prompt",)),
        ("CLIPTextEncodeSDXL", {"text_g": "x", "text_l": "y", "width": 1024, "clip": ["4", 1]}, ("text_g", "text_l")),
        ("PrimitiveStringMultiline", {"value": "x"}, ("value",)),
        ("CustomEncoder", {"positive_words": "x", "strength": 1.0, "clip": ["4", 1]}, ("positive_words",)),
    ],
)
def test_prompt_is_set_in_the_text_inputs_of_each_kind_of_encoder(batch, mapping, class_type, inputs, expected):
    batch["6"] = {"class_type": class_type, "inputs": inputs}
    assert tuple(ref.name for ref in parse_workflow(batch, mapping, []).text_inputs) == expected


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"text": ["7", 0]}, "is connected to node 7 (CLIPTextEncode)"),
        ({"text": "x", "prompt": "y"}, "several text inputs (text, prompt)"),
        ({"first": "x", "second": "y"}, "several text inputs (first, second)"),
        ({"text_g": "x", "text_l": ["7", 0]}, "text_l of node 6 (CLIPTextEncode) is connected to node 7"),
        ({"clip": ["4", 1]}, "no text input (its inputs: clip)"),
    ],
)
def test_linked_or_ambiguous_text_is_refused(batch, mapping, inputs, words):
    batch["6"]["inputs"] = inputs
    assert words in problems_of(batch, mapping)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"seed": ["21", 0]}, "seed of node 3 (KSampler) is connected to node 21"),
        ({"steps": 3}, "no input 'seed'"),
        ({"seed": 1, "noise_seed": 2}, "both seed and noise_seed"),
    ],
)
def test_seed_node_without_a_literal_seed_is_refused(batch, mapping, inputs, words):
    batch["3"]["inputs"] = inputs
    assert words in problems_of(batch, mapping)


def test_all_problems_of_a_mapping_are_reported_at_once(batch):
    config = {"image_loader_node": "6", "positive_prompt_node": "99", "seed_node": "5x", "output_node": "3", "positiv_node": "1"}
    message = problems_of(batch, config)
    for words in (
        "image_loader_node: node 6 (CLIPTextEncode) has no input 'image' (its inputs: text, clip)",
        "the workflow has no node 99; nodes with such an input: 6 (CLIPTextEncode), 7 (CLIPTextEncode)",
        "the workflow has no node 5x; nodes with such an input: 3 (KSampler)",
        "output_node: node 3 (KSampler) does not save images; nodes that save images: 9 (SaveImage)",
        "unknown key 'positiv_node'",
    ):
        assert words in message


def test_prefix_without_a_match_lists_the_prefixes_of_the_workflow():
    message = problems_of(workflow("full_workflow_no_model.json"), {"output_prefix": "Z_IMG"})
    assert "'Qwen_Consistent_Char/CC', 'Qwen_Consistent_Char/Z_IMG_FINAL'" in message


def test_linked_prefix_matches_nothing():
    graph = workflow("full_workflow_no_model.json")
    for node_id in ("60", "300", "301", "302"):
        graph[node_id]["inputs"]["filename_prefix"] = ["60", 0]
    assert "one that comes from another node" in problems_of(graph, {"output_prefix": "Qwen"})


@pytest.mark.parametrize(
    "content",
    [
        workflow("ui_format_not_api.json"),
        [],
        {},
        "text",
        7,
        {"1": {"inputs": {}}},
        {"1": ["SaveImage"]},
        {"prompt": {}, "client_id": "x"},
    ],
)
def test_other_formats_are_refused_with_a_hint_how_to_export(content):
    assert '"Save (API Format)"' in problems_of(content, {})


def test_link_to_a_missing_node_is_refused_where_an_image_depends_on_it(batch, mapping):
    batch["70"] = {"class_type": "VAEDecode", "inputs": {"samples": ["99", 0], "vae": ["4", 2]}}
    assert parse_workflow(batch, mapping, [])
    batch["8"]["inputs"]["samples"] = ["99", 0]
    assert "node 8 (VAEDecode): input samples is connected to node 99, which does not exist" in problems_of(batch, mapping)


@pytest.mark.parametrize(
    "value", [[3, 0], [512, 512], [], ["a", "b"], [0.5, 1], [True, False], [99, True], [512, 512, 3], {"99": 0}, "99"]
)
def test_values_that_are_lists_are_not_links(batch, mapping, value):
    batch["8"]["inputs"]["samples"] = value
    assert parse_workflow(batch, mapping, [])


@pytest.mark.parametrize("config", [[], "16", {"seed_node": 3.5, "positive_prompt_node": "6"}, {"output_prefix": 5}])
def test_mapping_of_another_type_is_refused(batch, config):
    assert "workflow_config" in problems_of(batch, config)


def test_node_id_may_be_a_number_and_null_means_not_set(batch):
    parsed = parse_workflow(batch, {"image_loader_node": 12, "output_node": None}, [])
    assert parsed.face_inputs == (InputRef("12", "image"),)


@pytest.mark.parametrize(
    ("class_type", "saves"),
    [
        ("SaveImage", True),
        ("Image Save", True),
        ("SaveImageWithMetaData", True),
        ("SaveAnimatedWEBP", False),
        ("SaveLatent", False),
    ],
)
def test_which_nodes_save_images(batch, class_type, saves):
    batch["9"]["class_type"] = class_type
    problems = []
    parse_workflow(batch, {"output_node": "9"}, problems)
    assert (problems == []) is saves


UNREADABLE = [
    ("SaveEXR", {}, "EXR"),
    ("SaveImageAdvanced", {"format": "exr", "format.bit_depth": "32-bit float"}, "EXR"),
    ("Image Save", {"extension": "PSD"}, "PSD"),
    ("SaveImageExtended", {"output_ext": ".jxl"}, "JXL"),
    ("VHS_VideoCombine", {"format": "image/gif"}, "video"),
    ("SaveAnimatedPNG", {}, "an animation"),
    ("SaveVideo", {"format": "auto"}, "video"),
    ("SaveWEBM", {}, "video"),
    ("SaveSVGNode", {}, "SVG"),
    ("SaveAudioMP3", {}, "audio"),
    ("SaveGLB", {}, "a 3D model"),
    ("SaveImageWebsocket", {}, "nothing in a file"),
    ("SaveImageDataSetToFolder", {}, "images that it does not report"),
]


@pytest.mark.parametrize(("class_type", "inputs", "what"), UNREADABLE, ids=[each[0] for each in UNREADABLE])
def test_saver_whose_files_cannot_be_read_is_named_with_what_it_saves(batch, mapping, class_type, inputs, what):
    batch["9"] = {"class_type": class_type, "inputs": batch["9"]["inputs"] | inputs}
    message = f"node 9 ({class_type}) does not save images that LoRACat can read, but {what}; save PNG images instead"
    assert message in problems_of(batch, mapping)
    assert f"no node saves images that LoRACat can read (node 9 ({class_type}) saves {what})" in problems_of(batch, {})


@pytest.mark.parametrize(
    ("class_type", "inputs"),
    [
        ("SaveImageAdvanced", {"format": "png", "format.bit_depth": "16-bit"}),
        ("SaveImageAdvanced", {"format": ["4", 0]}),
        ("Image Save", {"extension": "jpg", "quality": 90}),
        ("SaveImageWithMetaData", {"file_format": "WEBP (lossy)"}),
        ("Image Saver", {"extension": ".jpeg", "type": "output"}),
        ("SaveImage", {"format": "%date:yyyy%"}),
    ],
)
def test_saver_of_readable_images_is_used(batch, mapping, class_type, inputs):
    batch["9"] = {"class_type": class_type, "inputs": batch["9"]["inputs"] | inputs}
    assert parse_workflow(batch, mapping, []).output_nodes == ("9",)


def test_workflow_that_saves_nothing_is_refused(batch, mapping):
    batch["9"]["class_type"] = "PreviewImage"
    del batch["9"]["inputs"]["filename_prefix"]
    assert "no node saves images" in problems_of(batch, mapping)


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ({"value": 42}, "value"),
        ({"value": "42"}, "value"),
        ({"seed": 42}, "seed"),
        ({"noise_seed": 42, "value": 1}, "noise_seed"),
        ({"int": 42}, "int"),
        ({"number": 42, "number_type": "integer"}, "number"),
    ],
)
def test_seed_node_may_hold_a_number_alone(batch, mapping, inputs, name):
    batch["50"] = {"class_type": "PrimitiveInt", "inputs": inputs}
    assert parse_workflow(batch, mapping | {"seed_node": "50"}, []).seed_input == InputRef("50", name)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"value": "a word"}, 'seed_node: value of node 50 (PrimitiveString) must be a whole number to be the seed (is "a word")'),
        ({"value": 1.5}, "must be a whole number"),
        ({"value": True}, "must be a whole number"),
        ({"value": ["3", 0]}, "value of node 50 (PrimitiveString) is connected to node 3 (KSampler)"),
        ({"text": "1"}, "no input 'seed'"),
    ],
)
def test_number_that_cannot_be_a_seed_is_refused(batch, mapping, inputs, words):
    batch["50"] = {"class_type": "PrimitiveString", "inputs": inputs}
    assert words in problems_of(batch, mapping | {"seed_node": "50"})


CHAINS = {
    "primitive": ({"10": ("PrimitiveInt", {"value": 4})}, "10.value"),
    "seed node": ({"10": ("Seed (rgthree)", {"seed": 4})}, "10.seed"),
    "reroute": ({"10": ("Reroute", {"": ["11", 0]}), "11": ("PrimitiveInt", {"value": 4})}, "11.value"),
    "calculation": (
        {"10": ("ComfyMathExpression", {"expression": "a+1", "values.a": ["11", 0]}), "11": ("easy int", {"value": 4})},
        "11.value",
    ),
    "two numbers": ({"10": ("SimpleMath+", {"value": "a*b", "a": ["11", 0], "b": ["11", 0]}), "11": ("Int", {"value": 4})}, None),
    "not a number": ({"10": ("GetImageSize", {"image": ["11", 0]}), "11": ("PrimitiveInt", {"value": 4})}, None),
    "a text": ({"10": ("PrimitiveString", {"value": "4"})}, None),
    "a circle": ({"10": ("Reroute", {"": ["11", 0]}), "11": ("Reroute", {"": ["10", 0]})}, None),
    "missing": ({}, None),
}


@pytest.mark.parametrize(("nodes", "holder"), CHAINS.values(), ids=CHAINS)
def test_number_behind_a_seed_is_found_through_links(batch, mapping, nodes, holder):
    batch["3"]["inputs"]["seed"] = ["10", 0]
    batch |= {node_id: {"class_type": name, "inputs": inputs} for node_id, (name, inputs) in nodes.items()}
    assert {str(ref): seed for ref, seed in literal_seeds(batch).items()} == ({holder: 4} if holder else {})
    assert upstream_seeds(batch, "9") == ({holder: 4} if holder else {})
    if "10" in nodes:
        message = problems_of(batch, mapping)
        assert "input seed of node 3 (KSampler) is connected to node 10" in message
        assert ("choose the node that holds the value: " in message) is (holder is not None)


def test_literal_seeds_of_every_form_without_links_texts_and_seeds_of_other_nodes():
    graph = workflow("every_seed_form.json")
    graph["60"] = {"class_type": "FaceDetailer", "inputs": {"seed": 4, "steps": 20, "sampler_name": "euler", "image": ["9", 0]}}
    graph["61"] = {"class_type": "WildcardEncode", "inputs": {"seed": 5, "text": "{a|b}"}}
    graph["62"] = {"class_type": "KSampler", "inputs": {"seed": "%seed%", "steps": 2}}
    graph["63"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": True}}
    seeds = literal_seeds(graph)
    assert seeds.pop(InputRef("60", "seed")) == 4
    assert {str(ref): seed for ref, seed in seeds.items()} == {"3.seed": 1, "31.noise_seed": 2, "32.noise_seed": 3}


def test_upstream_seeds_and_text_are_those_an_image_depends_on():
    graph = workflow("every_seed_form.json")
    graph["50"] = {"class_type": "SaveImage", "inputs": {"images": ["51", 0], "filename_prefix": "x"}}
    graph["51"] = {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}}
    assert upstream_seeds(graph, "50") == {"3.seed": 1}
    assert upstream_seeds(graph, "9") == {"3.seed": 1, "31.noise_seed": 2, "32.noise_seed": 3}
    assert prompt_texts(graph, "50") == ["placeholder"]


def test_hash_depends_on_what_is_computed_not_on_titles(batch):
    before = graph_hash(batch)
    batch["3"]["_meta"]["title"] = "another title"
    assert graph_hash(dict(reversed(batch.items()))) == before
    batch["3"]["inputs"]["steps"] += 1
    assert graph_hash(batch) != before


def test_entries_are_read():
    problems = []
    entries = parse_entries([{"prompt": "a", "seed": MAX_SEED, "name": "one"}, {"prompt": "b"}], problems)
    assert entries == [Entry("a", MAX_SEED, "one"), Entry("b", None, None)]
    assert problems == []


def test_all_problems_of_the_entries_are_reported_at_once():
    content = [
        "text",
        {"seed": 1},
        {"prompt": " "},
        {"prompt": "a", "seed": -1, "name": "twin"},
        {"prompt": "a", "seed": MAX_SEED + 1, "name": "twin"},
        {"prompt": "a", "seed": "5", "steps": 3},
        {"prompt": "a", "seed": True, "name": ""},
        {"prompt": 5, "seed": 1.0},
    ]
    problems = []
    assert parse_entries(content, problems) == []
    message = "\n".join(problems)
    for words in (
        "entry 1: must be an object",
        "entry 2: has no prompt",
        'entry 3: prompt must be a non-empty string (is " ")',
        "entry 4: seed must be an integer from 0 to 18446744073709551615 (is -1)",
        "entry 5: seed must be an integer",
        "entry 5: the name 'twin' is already used by entry 4",
        "entry 6: unknown key 'steps'",
        'entry 6: seed must be an integer from 0 to 18446744073709551615 (is "5")',
        "entry 7: seed must be",
        "entry 7: name must be",
        "entry 8: prompt must be a non-empty string",
        "entry 8: seed must be",
    ):
        assert words in message, words


@pytest.mark.parametrize("content", [[], {}, {"prompt": "a"}, "a", 3])
def test_content_that_is_not_a_list_of_entries_is_refused(content):
    problems = []
    assert parse_entries(content, problems) == []
    assert "must be a list" in problems[0]
