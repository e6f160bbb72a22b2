"""The content of the workflow file -> a graph in API format, whichever way the user got the file out of ComfyUI.

"Save (API Format)" writes the graph itself. Images made by ComfyUI contain it too, and scripts keep it inside of a request.
"""

import io
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

from PIL import Image

from collecting.graph import Graph
from common.files import parse_json
from common.images import DECODER_ERRORS

EXPORT_HINT = 'export it with "Save (API Format)" ("Export (API)" in newer versions of ComfyUI)'
MAX_NODES_SHOWN = 8
MAX_DEPTH = 100
"""Of lists and objects inside of an input."""
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF")
_NODE_KEYS = ("class_type", "inputs", "_meta")
_WRAPPERS = ("prompt", "output")
"""Where a request to ComfyUI, and its web page's `graphToPrompt`, have the graph."""


def parse_workflow_file(content: bytes) -> Any:
    """The JSON value in the file, or in the image that it is. Raises ValueError with a predicate that says why there is none."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            text = next(_texts(image), None)
    except Image.UnidentifiedImageError:
        return _parse(content)
    except (*DECODER_ERRORS, Image.DecompressionBombError) as error:
        raise ValueError(f"is an image that cannot be read ({error}); {EXPORT_HINT}") from None
    if text is None:
        raise ValueError(f"is an image without a workflow of ComfyUI in it; {EXPORT_HINT}")
    return _parse(text.encode("utf-8", "surrogatepass"))


def _parse(content: bytes) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        remedy = f"; {EXPORT_HINT}" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"is not valid JSON in UTF-8: {error}{remedy}") from None


def _texts(image: Image.Image) -> Iterator[str]:
    """The graphs that ComfyUI stored in an image: in a PNG as the text `prompt`, in others as EXIF texts `prompt:...`."""
    if isinstance(text := image.info.get("prompt"), str):
        yield text
    for value in image.getexif().values():
        if isinstance(value, str) and value[:7].lower() == "prompt:":
            yield value[7:]


def find_graph(content: Any, problems: list[str]) -> Graph | None:
    """The nodes in the content of a workflow file, with nothing but what ComfyUI runs; None after problems were added."""
    content = _unwrapped(content)
    if isinstance(content, dict) and isinstance(content.get("nodes"), list):
        problems.append(f"workflow: the file is in the format of ComfyUI's web page, which cannot be submitted; {EXPORT_HINT}")
        return None
    entries = content if isinstance(content, dict) else {}
    # Entries with other names, such as "version" and "extra_data", are not about a node.
    graph = {key: node for key, node in entries.items() if _is_node(node) or re.fullmatch(r"\d+(:\d+)*", key)}
    invalid = [key for key, node in graph.items() if not _is_node(node)]
    if invalid:
        shown = ", ".join(invalid[:MAX_NODES_SHOWN]) + (" ..." if len(invalid) > MAX_NODES_SHOWN else "")
        problems.append(f"workflow: these entries have no class_type and inputs, so they are not nodes: {shown}; {EXPORT_HINT}")
    elif not graph:
        problems.append(f"workflow: the file does not contain a workflow; {EXPORT_HINT}")
    unusable = [problem for key, node in graph.items() if _is_node(node) for problem in _unusable_values(key, node)]
    problems += unusable
    if invalid or unusable or not graph:
        return None
    # A PNG has `is_changed` too, which may be NaN. Without `_meta` ComfyUI fails on a class that it has replaced by another.
    return {key: {"_meta": {}} | {name: node[name] for name in node if name in _NODE_KEYS} for key, node in graph.items()}


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _unwrapped(content: Any) -> Any:
    """The graph inside of {"prompt": graph, "workflow": ...}, where it may be a text; any other content unchanged."""
    if not isinstance(content, dict) or any(map(_is_node, content.values())):
        return content
    for key in _WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, str):
            try:
                inner = parse_json(inner.encode("utf-8", "surrogatepass"))
            except ValueError:
                continue
        if isinstance(inner, dict) and inner:
            return inner
    return content.get("workflow", content)


def _unusable_values(node_id: str, node: dict[str, Any]) -> Iterator[str]:
    """Problems about what Python reads from JSON, and what can be neither sent nor written."""
    label = f"workflow: node {json.dumps(node_id)[1:-1]} ({json.dumps(node['class_type'])[1:-1]})"
    for name, value in node["inputs"].items():
        if _is_deep(value):
            yield f"{label}: input {json.dumps(name)[1:-1]} is nested more than {MAX_DEPTH} levels deep"
            continue
        try:
            json.dumps([node_id, node["class_type"], name, value], allow_nan=False, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            yield f"{label}: input {json.dumps(name)[1:-1]} contains half of a surrogate pair, which is not valid text"
        except ValueError:
            yield f"{label}: input {json.dumps(name)[1:-1]} is NaN or infinite, which cannot be sent; set a number in ComfyUI"


def _is_deep(value: Any) -> bool:
    waiting = [(value, 0)]
    while waiting:
        current, depth = waiting.pop()
        if isinstance(current, dict | list):
            if depth == MAX_DEPTH:
                return True
            waiting += [(each, depth + 1) for each in (current.values() if isinstance(current, dict) else current)]
    return False
