"""Pure: what /object_info says of the inputs of a node class -> the inputs of one node, by their names in the graph.

A dynamic input consists of parts with dotted names, and which parts these are depends on the values of the node
(`comfy_api/latest/_io.py` of ComfyUI). A description that cannot be understood declares nothing.
"""

import re
from dataclasses import dataclass
from typing import Any

from collecting.http import shown
from common.files import as_object

MAX_ROWS = 100
"""Of an input that grows; ComfyUI's own limit."""


@dataclass(frozen=True)
class NodeInput:
    """One input of a node."""

    is_required: bool
    kind: Any
    """A type such as "INT" or "IMAGE,MASK", or the list of the values that the input takes."""
    options: dict[str, Any]

    def choices(self) -> list | None:
        """The values that the input takes; None if it takes any, or if only ComfyUI's web page knows them."""
        offered = self.options.get("options") if self.kind == "COMBO" else self.kind
        is_remote = self.options.get("remote") or self.options.get("remote_combo")
        return offered if isinstance(offered, list) and (offered or not is_remote) else None


@dataclass(frozen=True)
class InputProblem:
    """What is wrong with one input of a node."""

    what: str
    is_certain: bool = True
    """Whether ComfyUI is sure to refuse the node for it."""


def declared_inputs(node_class: dict[str, Any], values: dict[str, Any]) -> tuple[dict[str, NodeInput], list[InputProblem]]:
    """The inputs that a node with these values has, and what is wrong with the dynamic ones."""
    found: dict[str, NodeInput] = {}
    problems: list[InputProblem] = []
    _declare(as_object(node_class.get("input")), values, "", found, problems)
    return found, problems


def _declare(
    specification: dict[str, Any], values: dict[str, Any], prefix: str, found: dict[str, NodeInput], problems: list[InputProblem]
) -> None:
    """Add the inputs of {"required": {name: [kind, options]}, "optional": ...}. Hidden inputs are never in a graph."""
    for category in ("optional", "required"):
        for name, entry in as_object(specification.get(category)).items():
            if not isinstance(entry, list) or not entry:
                continue
            path, each = f"{prefix}{name}", _node_input(category == "required", entry)
            match each.kind:
                case "COMFY_AUTOGROW_V3":
                    found |= _growing(path, as_object(each.options.get("template")))
                case "COMFY_DYNAMICCOMBO_V3":
                    _declare_chosen(path, each, values, found, problems)
                case "COMFY_DYNAMICSLOT_V3":
                    if path in values:
                        _declare(as_object(each.options.get("inputs")), values, f"{path}.", found, problems)
                case "COMFY_DYNAMICGROUP_V3":
                    _declare_rows(path, each.options, values, found, problems)
                case _:
                    found[path] = each


def _node_input(is_required: bool, entry: list) -> NodeInput:
    return NodeInput(is_required, entry[0], as_object(entry[1] if len(entry) > 1 else None))


def _growing(path: str, template: dict[str, Any]) -> dict[str, NodeInput]:
    """Inputs such as `images.image0`, `images.image1`, ..., of which the first `min` are required."""
    names = template.get("names")
    if not isinstance(names, list):
        names = [f"{template.get('prefix')}{number}" for number in range(_limit(template.get("max")))]
    for category, entries in as_object(template.get("input")).items():
        for entry in as_object(entries).values():
            least = _limit(template.get("min")) if category == "required" else 0
            entry = entry if isinstance(entry, list) and entry else ["*"]
            return {f"{path}.{name}": _node_input(number < least, entry) for number, name in enumerate(names[:MAX_ROWS])}
    return {}


def _declare_chosen(
    path: str, each: NodeInput, values: dict[str, Any], found: dict[str, NodeInput], problems: list[InputProblem]
) -> None:
    """A list of keys, each of which brings inputs of its own.

    Another key, or none, is accepted by ComfyUI; then the node fails when it runs.
    """
    options = each.options.get("options")
    offered = [option for option in map(as_object, options if isinstance(options, list) else ()) if "key" in option]
    if path not in values:
        if each.is_required and "." not in path and offered:
            problems.append(InputProblem(f"the required input {path} is missing: set it in ComfyUI and export it again", False))
        return
    chosen = next((option for option in offered if option["key"] == values[path]), None)
    if chosen is not None:
        _declare(as_object(chosen.get("inputs")), values, f"{path}.", found, problems)
    elif offered and not isinstance(values[path], list):
        keys = ", ".join(shown(option["key"], 100) for option in offered[:MAX_ROWS])
        problems.append(InputProblem(f"ComfyUI has no {path} '{shown(values[path], 100)}': choose one of {keys}", False))


def _declare_rows(
    path: str, options: dict[str, Any], values: dict[str, Any], found: dict[str, NodeInput], problems: list[InputProblem]
) -> None:
    """Rows of inputs such as `loras.0.name`, `loras.0.strength`, `loras.1.name`."""
    template = as_object(options.get("template"))
    fields = [name for category in ("required", "optional") for name in as_object(template.get(category))]
    least, most = _limit(options.get("min")), _limit(options.get("max", MAX_ROWS))
    rows = set()
    for name in (name for name in values if name.startswith(f"{path}.")):
        row, _, field = name.removeprefix(f"{path}.").partition(".")
        if not re.fullmatch("0|[1-9][0-9]{0,3}", row) or field not in fields or int(row) >= most:
            what = f"input {name} must be {path}.ROW.NAME with ROW from 0 to {most - 1} and NAME one of {shown(', '.join(fields))}"
            problems.append(InputProblem(what))
        else:
            rows.add(row)
    if not least <= len(rows) <= most:
        problems.append(InputProblem(f"{path} must have from {least} to {most} rows (has {len(rows)})"))
    for row in rows:
        _declare(template, values, f"{path}.{row}.", found, problems)


def _limit(value: Any) -> int:
    return min(value, MAX_ROWS) if type(value) is int and value >= 0 else 0
