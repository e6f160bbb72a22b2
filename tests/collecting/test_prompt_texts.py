"""The prompts that lead to a node: those of the included workflows, and graphs with every kind of text node."""

import json
import random

import pytest

from collecting.prompt_texts import prompt_texts
from collecting.workflow import parse_workflow
from common.settings import REPOSITORY

INCLUDED = {
    "workflow_api.json": "config/workflow_config.json",
    "workflows/qwen_image_edit_2511/workflow_api.json": "workflows/qwen_image_edit_2511/workflow_config.json",
}


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph_of(text: object, **nodes: dict) -> dict:
    """A workflow whose positive prompt is `text`, a value or a link to one of `nodes`."""
    return {
        "9": node("SaveImage", images=["8", 0], filename_prefix="x"),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "3": node("KSampler", model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0], sampler_name="euler"),
        "4": node("CheckpointLoaderSimple", ckpt_name="a model.safetensors"),
        "5": node("EmptyLatentImage", width=64, height=64),
        "6": node("CLIPTextEncode", text=text, clip=["4", 1]),
        "7": node("CLIPTextEncode", text="blurred, bad hands", clip=["4", 1]),
    } | nodes


def primitive(text: object) -> dict:
    return node("PrimitiveStringMultiline", value=text)


SCENE, PERSON = "a walk in the park", "a woman with red hair"


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ({"t": primitive(SCENE)}, SCENE),
        ({"t": node("Reroute", **{"": ["57:27", 0]}), "57:27": primitive(SCENE)}, SCENE),
        ({"t": node("PreviewAny", source=["a", 0]), "a": primitive(SCENE)}, SCENE),
        ({"t": node("ShowText|pysssss", text=["a", 0], text_0="shown earlier"), "a": primitive(SCENE)}, SCENE),
        ({"t": node("Text Multiline", text=SCENE)}, SCENE),
        # Widgets come before connections in the export, so that the order of the inputs is not that of the parts.
        (
            {"t": node("StringConcatenate", string_b=SCENE, delimiter=", ", string_a=["a", 0]), "a": primitive(PERSON)},
            f"{PERSON}, {SCENE}",
        ),
        (
            {
                "t": node("StringConcatenate", string_a=["s", 0], string_b=["57:27", 0], delimiter=""),
                "s": node("StringConcatenate", string_a=["57:27", 0], string_b="!", delimiter=" "),
                "57:27": primitive("hey you"),
            },
            "hey you !hey you",
        ),
        (
            {
                "t": node("Text Concatenate", delimiter=", ", clean_whitespace="true", text_b=["b", 0], text_a=["a", 0], text_c=""),
                "a": primitive(PERSON),
                "b": primitive(SCENE),
            },
            f"{PERSON}, {SCENE}",
        ),
        (
            {
                "t": node("JoinStringMulti", inputcount=10, delimiter="\\n", return_list=False, string_10="end", string_2=["a", 0]),
                "a": primitive(SCENE),
            },
            f"{SCENE}\nend",
        ),
        ({"t": node("easy promptConcat", separator=" ", prompt2=SCENE, prompt1=PERSON)}, f"{PERSON} {SCENE}"),
        (
            {"t": node("StringFormat", f_string="{a}, aged {b}", **{"values.a": ["a", 0], "values.b": 30}), "a": primitive(PERSON)},
            f"{PERSON}, aged 30",
        ),
        (
            {"t": node("StringReplace", string=["a", 0], find="PERSON", replace=PERSON), "a": primitive("PERSON runs")},
            f"{PERSON} runs",
        ),
        ({"t": node("CaseConverter", string=["a", 0], mode="lowercase"), "a": primitive("A Walk")}, "a walk"),
        ({"t": node("StringTrim", string="  a walk ", mode="Left")}, "a walk "),
        ({"t": node("StringSubstring", string=["a", 0], start=2, end=6), "a": primitive("a walk outside")}, "walk"),
        (
            {
                "t": node("ComfySwitchNode", switch=["s", 0], on_false="a dog", on_true=["a", 0]),
                "s": node("PrimitiveBoolean", value=True),
                "a": primitive(SCENE),
            },
            SCENE,
        ),
        (
            {"t": node("ImpactSwitch", select=2, input1=["a", 0], input2=["b", 0]), "a": primitive("no"), "b": primitive(SCENE)},
            SCENE,
        ),
        ({"t": node("CR Text Input Switch", Input=1, text1=SCENE, text2="a dog")}, SCENE),
        (
            {"t": node("Any Switch (rgthree)", any_02=["a", 0], any_01=["b", 0]), "a": primitive("a dog"), "b": primitive(SCENE)},
            SCENE,
        ),
    ],
    ids=lambda value: value["t"]["class_type"] if isinstance(value, dict) else "",
)
def test_text_nodes_are_composed(nodes, expected):
    assert prompt_texts(graph_of(["t", 0], **nodes), "9") == [expected]


def test_conditioning_is_followed_through_the_nodes_that_change_it_and_joined():
    graph = graph_of(PERSON)
    graph["3"]["inputs"]["positive"] = ["20", 0]
    graph["20"] = node("ControlNetApplyAdvanced", positive=["21", 0], negative=["7", 0], strength=1)
    graph["21"] = node("ReferenceLatent", conditioning=["22", 0], latent=["5", 0])
    graph["22"] = node("ConditioningConcat", conditioning_from=["23", 0], conditioning_to=["6", 0])
    graph["23"] = node("FluxGuidance", conditioning=["24", 0], guidance=3.5)
    graph["24"] = node("CLIPTextEncode", text=SCENE, clip=["4", 1])
    assert prompt_texts(graph, "9") == [f"{PERSON}, {SCENE}"]


def test_guiders_and_earlier_samplers_are_found_the_nearest_first():
    graph = graph_of(SCENE)
    graph["3"] = node("SamplerCustomAdvanced", noise=["5", 0], guider=["30", 0], latent_image=["31", 0])
    graph["30"] = node("CFGGuider", positive=["6", 0], negative=["7", 0], cfg=1)
    graph["31"] = node("KSampler", positive=["32", 0], negative=["33", 0], latent_image=["5", 0])
    graph["32"] = node("TextEncodeQwenImageEditPlus", prompt="draw the person", image1=["5", 0], clip=["4", 1])
    graph["33"] = node("ConditioningZeroOut", conditioning=["32", 0])
    assert prompt_texts(graph, "9") == [SCENE, "draw the person"]


def test_encoder_for_several_text_models_has_several_texts_the_longest_first():
    graph = graph_of("")
    graph["6"] = node("CLIPTextEncodeFlux", clip=["4", 1], clip_l="park, red hair", t5xxl="A woman walks in a park.", guidance=3.5)
    assert prompt_texts(graph, "9") == ["A woman walks in a park.", "park, red hair"]
    graph["6"] = node("CLIPTextEncodeSDXL", clip=["4", 1], text_g=SCENE, text_l=SCENE, width=1024)
    assert prompt_texts(graph, "9") == [SCENE]


def test_what_is_not_a_positive_prompt_is_not_found():
    graph = graph_of(SCENE)
    graph["3"]["inputs"]["sampler_name"] = ["40", 0]
    graph["40"] = primitive("euler")
    graph["9"]["inputs"]["filename_prefix"] = ["41", 0]
    graph["41"] = primitive("a file name of words")
    graph["4"] = node("Efficient Loader", positive="a cat on a mat", negative="ugly and bad", ckpt_name="a b.safetensors")
    graph["5"] = node("ComfySwitchNode", switch=False, on_false=["42", 0], on_true=["43", 0])
    graph["42"] = node("EmptyLatentImage", width=64)
    graph["43"] = node("OtherSampler", positive=["44", 0])
    graph["44"] = node("CLIPTextEncode", text="of the other branch")
    assert prompt_texts(graph, "9") == [SCENE, "a cat on a mat"]


def test_text_of_an_unknown_node_is_what_its_prompts_say():
    assert prompt_texts(graph_of(["t", 0], t=node("SomeLLM", instruction="be brief", prompt="describe a walk")), "9") == [
        "describe a walk"
    ]
    graph = graph_of(["t", 0], t=node("StringConcatenate", string_a=["u", 0], string_b=SCENE, delimiter=" "), u=node("LoadText"))
    assert prompt_texts(graph, "9") == [SCENE]


def test_circles_and_texts_without_bound_end():
    graph = graph_of(["t", 0], t=node("StringConcatenate", string_a=["t", 0], string_b="words of a circle", delimiter=""))
    assert prompt_texts(graph, "9") == ["words of a circle"]
    doubling = {f"d{n}": node("StringConcatenate", string_a=[f"d{n + 1}", 0], string_b=[f"d{n + 1}", 0]) for n in range(60)}
    chain = {f"r{n}": node("Reroute", **{"": [f"r{n + 1}", 0]}) for n in range(5000)}
    graph = graph_of(["d0", 0], **doubling, d60=primitive("two words"))
    assert all(len(text) < 20_000 for text in prompt_texts(graph, "9"))
    assert prompt_texts(graph_of(["r0", 0], **chain, r5000=primitive("far away")), "9") in ([], ["far away"])


@pytest.mark.parametrize("name", INCLUDED)
def test_every_kept_node_of_the_included_workflows_has_its_own_composed_prompt(name):
    graph = json.loads((REPOSITORY / name).read_text(encoding="utf-8"))
    config = json.loads((REPOSITORY / INCLUDED[name]).read_text(encoding="utf-8"))
    workflow = parse_workflow(graph, config, [])
    nearest = [prompt_texts(graph, node_id)[0] for node_id in workflow.output_nodes]
    assert len(nearest) == len(set(nearest)) == 48
    start = f"{workflow.person} " if workflow.person else "Create a new realistic photograph of the person in Picture 1. "
    assert all(text.startswith(start) for text in nearest)


def test_no_graph_is_too_odd():
    draw = random.Random(0)
    kinds = ["StringConcatenate", "StringFormat", "StringReplace", "CaseConverter", "StringSubstring", "StringTrim", "KSampler"]
    kinds += ["ComfySwitchNode", "ImpactSwitch", "Any Switch", "Reroute", "ShowText", "CLIPTextEncode", "ConditioningCombine"]
    names = ["text", "prompt", "string", "string_a", "string_b", "delimiter", "f_string", "values.a", "find", "replace", "mode"]
    names += [
        "switch",
        "on_true",
        "select",
        "input1",
        "any_01",
        "",
        "value",
        "positive",
        "conditioning",
        "negative",
        "start",
        "end",
    ]
    odd = ["a", "b c", "{a}", "", "x" * 9_000, [], [None, 1], ["zz", 0], True, -5, 10**400, float("nan"), None, {"a": 1}, [[1]]]
    for _ in range(1_000):
        ids = [str(number) for number in range(draw.randint(1, 12))]
        values = [*odd, *([node_id, 0] for node_id in ids)]
        graph = {i: node(draw.choice(kinds), **{draw.choice(names): draw.choice(values) for _ in range(5)}) for i in ids}
        assert all(isinstance(text, str) for text in prompt_texts(graph, "0"))
