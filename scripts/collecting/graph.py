"""Pure: a workflow in ComfyUI's API format, {node id: {"class_type": ..., "inputs": {name: literal or [node id, slot]}}}."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SEED_INPUTS = ("seed", "noise_seed")


TEXT_INPUTS = (("text",), ("prompt",), ("text_g", "text_l"), ("clip_l", "t5xxl"), ("value",))
"""How nodes call a prompt; an encoder of two text models has one input for each."""


Graph = dict[str, dict[str, Any]]


_NO_IMAGES = ("animated", "webm", "video", "websocket", "latent")


@dataclass(frozen=True)
class InputRef:
    """One input of one node."""

    node: str
    name: str

    def __str__(self) -> str:
        return f"{self.node}.{self.name}"


def is_link(value: Any) -> bool:
    """Whether an input comes from another node."""
    return isinstance(value, list)


def put(graph: Graph, place: InputRef, value: Any) -> None:
    """Give one input a value."""
    graph[place.node]["inputs"][place.name] = value


def described(graph: Graph, node_id: str) -> str:
    """`16 (LoadImage)`: a node as the log calls it."""
    return f"{node_id} ({graph[node_id]['class_type']})" if node_id in graph else node_id


def saves_images(node: dict[str, Any]) -> bool:
    """SaveImage, or a node of a custom pack that by its name or its inputs does the same."""
    name = node["class_type"].lower()
    if any(word in name for word in _NO_IMAGES):
        return False
    return ("save" in name and "image" in name) or {"filename_prefix", "images"} <= node["inputs"].keys()


def literal_seeds(graph: Graph) -> dict[InputRef, int]:
    """Every `seed` and `noise_seed` of a sampler or noise node that stands in the graph as a number."""
    return {place: seed for place, seed in _numbers_called_seed(graph).items() if _draws_noise(graph[place.node])}


def _numbers_called_seed(graph: Graph) -> dict[InputRef, int]:
    return {
        InputRef(node_id, name): node["inputs"][name]
        for node_id, node in graph.items()
        for name in SEED_INPUTS
        if type(node["inputs"].get(name)) is int
    }


def _draws_noise(node: dict[str, Any]) -> bool:
    """A sampler or noise node by its name, or by its inputs: detailers and upscalers sample, too."""
    name = node["class_type"].lower()
    return "sampler" in name or "noise" in name or bool({"sampler_name", "steps", "denoise"} & node["inputs"].keys())


def seeds_behind(graph: Graph, node_id: str) -> dict[str, int]:
    """The literal seeds of any node that the images of a node depend on, as {"node.input": seed}."""
    behind = set(_upstream(graph, node_id))
    return {str(place): seed for place, seed in _numbers_called_seed(graph).items() if place.node in behind}


def text_behind(graph: Graph, node_id: str) -> str:
    """The positive texts that the images of a node depend on, the nearest first, one per line."""
    names = {name for group in TEXT_INPUTS for name in group}
    texts: dict[str, None] = {}
    for each in _upstream(graph, node_id):
        for name, value in graph[each]["inputs"].items():
            if name in names and isinstance(value, str) and value.strip():
                texts[value] = None
    return "\n".join(texts)


def graph_hash(graph: Graph) -> str:
    """SHA-256 of what a graph computes: classes and inputs, not the titles in `_meta`."""
    essence = {node_id: [node["class_type"], node["inputs"]] for node_id, node in graph.items()}
    return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()


def _upstream(graph: Graph, node_id: str) -> Iterator[str]:
    """The node and all that it needs, the nearest first; what is linked as `negative` is left out."""
    seen, waiting = {node_id}, [node_id]
    while waiting:
        current = waiting.pop(0)
        yield current
        for name, value in graph[current]["inputs"].items():
            source = value[0] if is_link(value) and value else None
            if isinstance(source, str) and name != "negative" and source in graph and source not in seen:
                seen.add(source)
                waiting.append(source)
