"""Pure functions on a workflow in ComfyUI's API format.

A graph is {node id: {"class_type": ..., "inputs": {name: literal or [node id, slot]}}}.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from common.image_formats import IMAGE_SUFFIXES

SEED_INPUTS = ("seed", "noise_seed")
SEED_HOLDERS = (*SEED_INPUTS, "value", "int", "integer", "number", "Number")
"""Names of the inputs that hold the number of a seed, in samplers and in the nodes for a number alone."""
TEXT_INPUTS = (("text",), ("prompt",), ("text_g", "text_l"), ("clip_l", "t5xxl"), ("value",))
"""Names of the inputs that hold a prompt; an encoder for two text models has one input for each."""
SEPARATORS = ("delimiter", "separator")
"""Names of the input with the text that a join puts between its parts."""
Graph = dict[str, dict[str, Any]]
_UNREADABLE_CLASSES = {
    "animated": "an animation",
    "webm": "video",
    "video": "video",
    "websocket": "nothing in a file",
    "latent": "latents",
    "dataset": "images that it does not report",
    "svg": "SVG",
    "exr": "EXR",
    "jxl": "JPEG XL",
    "psd": "PSD",
    "audio": "audio",
    "glb": "a 3D model",
    "3d": "a 3D model",
}
"""Parts of the class names of nodes that save something other than image files that LoRACat reads -> what they save."""
_FORMAT_INPUTS = {"format", "extension", "ext", "filetype", "type", "suffix"}
_OTHER_FORMATS = re.compile("(exr|hdr|tiff?|jxl|jp2|psd|svg|gif|bmp|ico|pdf|dds|tga|avif|hei[cf]|mp4|webm|mkv|mov|avi)")
"""Of images and videos; those of IMAGE_SUFFIXES are read all the same."""
_NUMBER_CLASSES = {"reroute", "math", "expression", "int", "integer", "number", "seed", "calculate", "operation", "convert"}
"""Words in the class names of nodes that pass on a number, or calculate with it."""

DISPLAYS = ("preview", "show", "display")
"""Parts of the class names of nodes that show a value, and may return it too."""


@dataclass(frozen=True)
class InputRef:
    """One input of one node."""

    node: str
    name: str

    def __str__(self) -> str:
        return f"{self.node}.{self.name}"


def is_link(value: Any) -> bool:
    """Whether an input is connected to another node, so that its value is [node id, slot]."""
    return isinstance(value, list)


def node_label(graph: Graph, node_id: str) -> str:
    """`16 (LoadImage)`: the node's name in messages."""
    return f"{node_id} ({graph[node_id]['class_type']})" if node_id in graph else node_id


def saves_images(node: dict[str, Any]) -> bool:
    """Whether this is a SaveImage node, or by its name or inputs a node of a custom pack that does the same."""
    return _is_saver(node) and unreadable_output(node) is None


def unreadable_output(node: dict[str, Any]) -> str | None:
    """What a node saves, such as "EXR" or "video", if LoRACat cannot read it; None for other nodes."""
    name = node["class_type"].lower()
    if not _is_saver(node) and "save" not in name:
        return None
    for word, what in _UNREADABLE_CLASSES.items():
        if word in name:
            return what
    for key, value in node["inputs"].items():
        # As in `format` = "exr", `extension` = ".tiff", `video_format` = "image/gif".
        if isinstance(value, str) and set(re.split(r"[._]", key.lower())) & _FORMAT_INPUTS:
            words = re.findall("[a-z0-9]+", value.lower())
            unreadable = [word for word in words if _OTHER_FORMATS.fullmatch(word)]
            if unreadable and not any(f".{word}" in IMAGE_SUFFIXES for word in words):
                return unreadable[0].upper()
    return None


def _is_saver(node: dict[str, Any]) -> bool:
    name = node["class_type"].lower()
    return ("save" in name and "image" in name) or {"filename_prefix", "images"} <= node["inputs"].keys()


def literal_seeds(graph: Graph) -> dict[InputRef, int]:
    """Every `seed` and `noise_seed` of a sampler or noise node whose value is a number in the graph, not a link.

    If all of them are links, these are the numbers behind the links.
    """
    samplers = set()
    for node_id, node in graph.items():
        name = node["class_type"].lower()
        # Detailers and upscalers sample too; they are recognised by their inputs.
        if "sampler" in name or "noise" in name or {"sampler_name", "steps", "denoise"} & node["inputs"].keys():
            samplers.add(node_id)
    return _seed_values(graph, samplers)


def seed_source(graph: Graph, ref: InputRef) -> InputRef | None:
    """The input that holds the number behind a seed: `ref` itself, or one that is connected to it. None if that is unclear.

    Between them may be reroutes and nodes that calculate with whole numbers, as long as all but one of their inputs are values.
    """
    seen: set[InputRef] = set()
    while ref not in seen:
        seen.add(ref)
        value = graph[ref.node]["inputs"].get(ref.name)
        if type(value) is int:  # True is not a seed
            return ref
        source = value[0] if is_link(value) and value else None
        if not isinstance(source, str) or source not in graph:
            return None
        inputs = graph[source]["inputs"]
        held = [name for name in SEED_HOLDERS if name in inputs and (type(inputs[name]) is int or is_link(inputs[name]))]
        links = [name for name, each in inputs.items() if is_link(each)]
        words = set(re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", graph[source]["class_type"]))
        if held:
            ref = InputRef(source, held[0])
        elif len(links) == 1 and {word.lower() for word in words} & _NUMBER_CLASSES:
            ref = InputRef(source, links[0])
        else:
            return None
    return None


def upstream_seeds(graph: Graph, node_id: str, mapped: Iterable[InputRef] = ()) -> dict[str, int]:
    """The seeds of all nodes that the images of a node depend on, as {"node.input": seed}, with the seeds of `mapped`."""
    upstream = set(_upstream(graph, node_id))
    values = {ref: graph[ref.node]["inputs"][ref.name] for ref in mapped if ref.node in upstream}
    return {str(ref): seed for ref, seed in (_seed_values(graph, upstream) | values).items()}


def graph_hash(graph: Graph) -> str:
    """SHA-256 of what a graph computes: classes and inputs, without the titles in `_meta`."""
    essence = {node_id: [node["class_type"], node["inputs"]] for node_id, node in graph.items()}
    return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()


def execution_targets(graph: Graph, outputs: Collection[str]) -> list[str] | None:
    """`partial_execution_targets` for POST /prompt: with it ComfyUI runs only these nodes and what they depend on.

    These are `outputs` and the nodes that only display what they depend on, such as PreviewAny. Such a node costs nothing, and
    it fixes the order of work: ComfyUI runs first what is displayed, for example all text encoders before the first sampler,
    so that each model is loaded once. None if no node is left out.
    """
    needed: set[str] = set()
    waiting = list(outputs)
    while waiting:
        if (node_id := waiting.pop()) not in needed:
            needed.add(node_id)
            waiting += _sources(graph, node_id)
    used = {source for node_id in graph for source in _sources(graph, node_id)}
    displays = []
    for node_id, node in graph.items():
        name, sources = node["class_type"].lower(), _sources(graph, node_id)
        writes_files = "filename_prefix" in node["inputs"] or "save" in name
        is_display = node_id not in used or any(word in name for word in DISPLAYS)
        if node_id not in needed and sources and needed.issuperset(sources) and is_display and not writes_files:
            displays.append(node_id)
    return [*outputs, *displays] if graph.keys() - needed - set(displays) else None


def _sources(graph: Graph, node_id: str) -> list[str]:
    """The nodes to which the inputs of a node are connected."""
    links = (value for value in graph[node_id]["inputs"].values() if is_link(value) and len(value) == 2)
    return [value[0] for value in links if isinstance(value[0], str) and value[0] in graph]


def _seed_values(graph: Graph, nodes: Collection[str]) -> dict[InputRef, int]:
    """The seeds of `nodes` that are numbers, in the order of the graph; if there are none, the numbers behind their links."""
    refs = [InputRef(node_id, name) for node_id in graph if node_id in nodes for name in SEED_INPUTS]
    present = [ref for ref in refs if ref.name in graph[ref.node]["inputs"]]
    sources = dict.fromkeys(source for ref in present if (source := seed_source(graph, ref)))
    return {ref: graph[ref.node]["inputs"][ref.name] for ref in present if ref in sources} or {
        ref: graph[ref.node]["inputs"][ref.name] for ref in sources
    }


def _upstream(graph: Graph, node_id: str) -> Iterator[str]:
    """The node and everything that it depends on, breadth first; inputs named `negative` are not followed."""
    seen, waiting = {node_id}, [node_id]
    while waiting:
        current = waiting.pop(0)
        yield current
        for name, value in graph[current]["inputs"].items():
            source = value[0] if is_link(value) and value else None
            if isinstance(source, str) and name != "negative" and source in graph and source not in seen:
                seen.add(source)
                waiting.append(source)
