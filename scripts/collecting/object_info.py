"""What a server says of its node classes, and what it would refuse in a graph.

The rules are those of ComfyUI's own validation (`validate_inputs` in its execution.py). What the answers of the server do
not decide is left to it: a graph that it accepts is not refused.
"""

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from collecting.graph import Graph, InputRef, is_link, node_label
from collecting.http import shown
from collecting.node_inputs import InputProblem, NodeInput, declared_inputs
from common.errors import ComfyUIError
from common.files import as_object

MAX_CHOICES_SHOWN = 8
MAX_COMPARED, MAX_COMPARED_LENGTH = 20_000, 300
"""Number and length of the names that are compared to find the one that was meant."""
_CONVERSIONS = {"INT": (int, "a whole number"), "FLOAT": (float, "a number")}
_MEDIA = ("image_upload", "audio_upload", "video_upload")
"""What marks the inputs that take the name of a file in input/."""
_UNCHECKED_VALUES = {
    "CustomCombo": None,
    "LoadLatent": ("latent",),
    "ModelAttentionBackend": ("attention",),
    "SelectCLIPDevice": ("device",),
    "SelectModelDevice": ("device",),
    "SelectVAEDevice": ("device",),
}
"""ComfyUI's own classes that check the values of these inputs (None: of all) themselves, so that others are accepted too."""


@dataclass(frozen=True)
class GraphProblem:
    """What is wrong with a graph on one server."""

    text: str
    stops: frozenset[str]
    """The output nodes that ComfyUI is sure to refuse for it. Empty if they may run all the same."""
    ref: InputRef | None = None
    """The input with the problem."""


class NodeClasses:
    """The node classes of one server, as its answers to /object_info and /node_replacements describe them."""

    def __init__(self, object_info: dict[str, Any], replacements: dict[str, Any] | None = None):
        self._classes = object_info
        self._replacements = replacements or {}

    def problems(self, graph: Graph, outputs: tuple[str, ...], ignored: Collection[InputRef] = ()) -> list[GraphProblem]:
        """What ComfyUI would refuse in everything that `outputs` depend on, and values that it offers nowhere in the graph.

        The values of the inputs `ignored` are not checked, because others are submitted.
        """
        original, (graph, problems) = graph, self._replace_classes(graph, frozenset(outputs))
        problems += self._missing_classes(graph, frozenset(outputs))
        declared = {node_id: declared_inputs(self._class(node), node["inputs"]) for node_id, node in graph.items()}
        sources = {node_id: list(_sources(graph, node_id, inputs)) for node_id, (inputs, _) in declared.items()}
        needed = {output: _upstream(sources, output) for output in outputs}
        for node_id, (inputs, dynamic_problems) in declared.items():
            stops = frozenset(output for output in outputs if node_id in needed[output])
            found = [(None, problem) for problem in dynamic_problems] if stops else []
            for name, each in inputs.items():
                ref = InputRef(node_id, name)
                if ref not in ignored and (stops or each.choices() is not None):
                    found += [(ref, problem) for problem in self._input_problems(graph, ref, each, is_needed=bool(stops))]
            for ref, each in found:
                text = f"node {node_label(original, node_id)}: {each.what}{self._title(original[node_id])}"
                problems.append(GraphProblem(text, stops if each.is_certain else frozenset(), ref))
        try:
            all_needed = set().union(*needed.values())
            TopologicalSorter({node_id: sources[node_id] for node_id in graph if node_id in all_needed}).prepare()
        except CycleError as error:
            path = " -> ".join(node_label(graph, node_id) for node_id in error.args[1])
            stops = frozenset(output for output in outputs if error.args[1][0] in needed[output])
            problems.append(GraphProblem(f"nodes depend on each other in a circle ({path}): remove one of these links", stops))
        if all(self._class(node).get("output_node") is False for node in graph.values()):
            what = "ComfyUI has no output node in this workflow: add a SaveImage node"
            problems.append(GraphProblem(what, frozenset(outputs)))
        return problems

    def leave_out(self, graph: Graph, unused: Collection[str], outputs: Collection[str], used: Collection[str]) -> Graph:
        """The graph without the nodes `unused`, the links to them, and the nodes that cannot run without them.

        A link goes where the class of the node does not need the input. Raises ComfyUIError if one of `outputs` would go, or a
        node that also uses the result of one of the nodes `used`.
        """
        sources = {node_id: _linked_nodes(node) for node_id, node in graph.items()}
        left = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in graph.items()}
        waiting = [(node_id, node_id) for node_id in unused]
        while waiting:
            gone, loader = waiting.pop()
            if left.pop(gone, None) is None:
                continue
            for node_id, node in list(left.items()):
                linked = [name for name, value in node["inputs"].items() if is_link(value) and value and value[0] == gone]
                declared, _ = declared_inputs(self._class(node), node["inputs"])
                if not any(name in declared and declared[name].is_required for name in linked):
                    node["inputs"] = {name: value for name, value in node["inputs"].items() if name not in linked}
                elif node_id in outputs or not _upstream(sources, node_id).isdisjoint(used):
                    raise ComfyUIError(
                        f"node {node_label(graph, loader)} has no face reference and cannot be left out, because node "
                        f"{node_label(graph, node_id)} needs its input {linked[0]}; add an image to FACE_REFERENCE, or remove "
                        f"{loader} from image_loader_node"
                    )
                else:
                    waiting.append((node_id, loader))
        return left

    def value_problem(self, graph: Graph, ref: InputRef, value: Any) -> str | None:
        """Why ComfyUI is sure to refuse `value` as the value of one input, as a sentence; None if it would not."""
        node = graph[ref.node]
        each = declared_inputs(self._class(node), node["inputs"])[0].get(ref.name)
        problems = () if each is None else self._value_problems(node, ref.name, each, value)
        return next((problem.what for problem in problems if problem.is_certain), None)

    def _class(self, node: dict[str, Any]) -> dict[str, Any]:
        return as_object(self._classes.get(node["class_type"]))

    def _may_check_itself(self, node: dict[str, Any]) -> bool:
        """Whether the class may switch off ComfyUI's checks of values and types: those of custom and partner nodes do."""
        module = self._class(node).get("python_module", "nodes")
        return not (module == "nodes" or str(module).startswith("comfy_extras"))

    def _title(self, node: dict[str, Any]) -> str:
        """The end of a message that names the title of a node, if the user gave it one."""
        title = as_object(node.get("_meta")).get("title")
        default_titles = (node["class_type"], self._class(node).get("display_name"))
        is_own = isinstance(title, str) and title.strip() and title not in default_titles
        return f' (its title is "{shown(title, 60)}")' if is_own else ""

    def _missing_classes(self, graph: Graph, outputs: frozenset[str]) -> Iterator[GraphProblem]:
        missing: dict[str, list[str]] = {}
        for node_id, node in graph.items():
            if node["class_type"] not in self._classes:
                missing.setdefault(node["class_type"], []).append(node_id)
        for name, node_ids in sorted(missing.items()):
            where = f"node {node_ids[0]}" if len(node_ids) == 1 else f"nodes {_enumerated(node_ids)}"
            remedy = f"install the custom nodes that provide it, or update ComfyUI{_nearest(name, list(self._classes))}"
            yield GraphProblem(f"{where}: ComfyUI has no node class {name}: {remedy}", outputs)

    def _replace_classes(self, graph: Graph, outputs: frozenset[str]) -> tuple[Graph, list[GraphProblem]]:
        """The graph as ComfyUI validates it: classes that it no longer has are replaced by their successors."""
        replaced = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in graph.items()}
        problems = []
        for node_id, node in graph.items():
            successors = self._replacements.get(node["class_type"])
            successor = as_object(successors[0]) if isinstance(successors, list) and successors else {}
            name = successor.get("new_node_id")
            if node["class_type"] in self._classes or not isinstance(name, str) or name not in self._classes:
                continue
            inputs = {}
            for each in _mappings(successor.get("input_mapping")):
                if "set_value" in each:
                    inputs[str(each.get("new_id"))] = each["set_value"]
                elif str(each.get("old_id")) in node["inputs"]:
                    inputs[str(each.get("new_id"))] = node["inputs"][str(each["old_id"])]
                elif "old_id" in each:
                    what = f"its input {each['old_id']} is missing, which {name} needs (ComfyUI replaces the class by it)"
                    problems.append(GraphProblem(f"node {node_label(graph, node_id)}: {what}", outputs))
            replaced[node_id] = {**node, "class_type": name, "inputs": inputs}
            slots = [(each.get("old_idx"), each.get("new_idx")) for each in _mappings(successor.get("output_mapping"))]
            for other in replaced.values():
                for input_name, value in other["inputs"].items():
                    if is_link(value) and len(value) == 2 and value[0] == node_id:
                        new_slot = next((new for old, new in slots if old == value[1]), value[1])
                        other["inputs"][input_name] = [node_id, new_slot]
        return replaced, problems

    def _input_problems(self, graph: Graph, ref: InputRef, each: NodeInput, is_needed: bool) -> Iterator[InputProblem]:
        """What is wrong with one input; where no output needs it, only values that ComfyUI does not offer."""
        node, name = graph[ref.node], ref.name
        value = node["inputs"].get(name)
        if name not in node["inputs"]:
            if each.is_required and is_needed:
                declared = as_object(as_object(self._class(node).get("input")).get("required"))
                near = _nearest(name, [other for other in node["inputs"] if other not in declared])
                yield InputProblem(f"the required input {name} is missing: set it in ComfyUI and export it again{near}")
        elif is_link(value):
            if is_needed:
                yield from self._link_problems(graph, node, name, value, each)
        else:
            yield from self._value_problems(node, name, each, value)

    def _link_problems(self, graph: Graph, node: dict[str, Any], name: str, value: list, each: NodeInput) -> Iterator[InputProblem]:
        if len(value) != 2:
            yield InputProblem(f"input {name} must be a value or a link [node id, output number] (is {_quoted(value)})")
            return
        source, slot = value
        if not isinstance(source, str) or source not in graph:
            which = source if isinstance(source, str) else _quoted(source)
            yield InputProblem(f"input {name} is connected to node {which}, which does not exist; export the workflow again")
            return
        offered = self._class(graph[source]).get("output")
        if not isinstance(offered, list):
            return
        label = node_label(graph, source)
        try:
            received = offered[slot]
        except (IndexError, TypeError):
            which = f"output {_quoted(slot)} of node {label}"
            yield InputProblem(f"input {name} is connected to {which}, which has only {len(offered)}; export the workflow again")
            return
        if not _types_match(received, each.kind):
            is_certain = not (self._may_check_itself(node) or self._may_check_itself(graph[source]))
            what = f"input {name} takes {_kind_name(each.kind)}, but output {slot} of node {label} is {_kind_name(received)}"
            yield InputProblem(f"{what}: connect another output", is_certain)
        elif (each.kind == "COMBO" or isinstance(each.kind, list)) and any(each.options.get(key) for key in _MEDIA):
            what = f"input {name} must be the name of a file, but is connected to node {label}"
            yield InputProblem(f"{what}: ComfyUI does not take a file name from another node", is_certain=False)

    def _value_problems(self, node: dict[str, Any], name: str, each: NodeInput, value: Any) -> Iterator[InputProblem]:
        """As ComfyUI does it: the value is converted to the type of the input, then compared with its limits and its list."""
        if isinstance(value, dict) and "__value__" in value:
            value = value["__value__"]
        if isinstance(each.kind, str) and each.kind in _CONVERSIONS:
            convert, meaning = _CONVERSIONS[each.kind]
            try:
                value = convert(value)
            except (ValueError, TypeError, OverflowError):
                yield InputProblem(f"{name} must be {meaning} (is {_quoted(value)})")
                return
        unchecked = _UNCHECKED_VALUES.get(node["class_type"], ())
        if unchecked is None or name in unchecked:
            return
        if outside := _outside_limits(value, each.options.get("min"), each.options.get("max")):
            yield InputProblem(f"{name} must be {outside} (is {_quoted(value)})", is_certain=not self._may_check_itself(node))
            return
        if (choices := each.choices()) is None:
            return
        uploaded = any(each.options.get(key) for key in (*_MEDIA, "file_upload"))
        for one in value if each.options.get("multiselect") and isinstance(value, list) else [value]:
            # ComfyUI finds `folder/a.png` and `a.png [output]` too, but lists only the files directly in input/.
            is_elsewhere = uploaded and isinstance(one, str) and ("/" in one or "\\" in one or one.endswith("]"))
            if one not in choices and not is_elsewhere:
                # Not certain: classes may check their files themselves, and files may be added at any time.
                yield InputProblem(_not_offered(name, one, choices), is_certain=False)


def _sources(graph: Graph, node_id: str, declared: dict[str, NodeInput]) -> Iterator[str]:
    """The nodes on which a node depends: ComfyUI ignores links in inputs that the class does not declare."""
    for name, value in graph[node_id]["inputs"].items():
        if name in declared and is_link(value) and len(value) == 2 and isinstance(value[0], str) and value[0] in graph:
            yield value[0]


def _linked_nodes(node: dict[str, Any]) -> list[str]:
    links = (value for value in node["inputs"].values() if is_link(value) and len(value) == 2)
    return [value[0] for value in links if isinstance(value[0], str)]


def _upstream(sources: dict[str, list[str]], node_id: str) -> set[str]:
    seen, waiting = set(), [node_id]
    while waiting:
        if (current := waiting.pop()) not in seen:
            seen.add(current)
            waiting += sources.get(current, ())
    return seen


def _types_match(received: Any, taken: Any) -> bool:
    """ComfyUI's `validate_node_input`; types are names separated by commas."""
    if received == taken or any(kind in ("*", "COMFY_MATCHTYPE_V3") for kind in (received, taken)):
        return True
    if isinstance(received, list) and taken == "COMBO":
        return True
    if not isinstance(received, str) or not isinstance(taken, str):
        return False
    offered, accepted = ({each.strip() for each in kind.split(",")} for kind in (received, taken))
    return bool(offered & accepted) or "*" in offered | accepted


def _outside_limits(value: Any, low: Any, high: Any) -> str | None:
    """What the value must be, if it is outside the limits that are numbers."""
    low, high = (limit if isinstance(limit, int | float) else None for limit in (low, high))
    if low is None and high is None:
        return None
    if isinstance(value, int | float) and (low is None or not value < low) and (high is None or not value > high):
        return None
    lowest, highest = shown(low, 40), shown(high, 40)
    if low is None or high is None:
        return f"a number of at least {lowest}" if high is None else f"a number of at most {highest}"
    return f"between {lowest} and {highest}"


def _not_offered(name: str, value: Any, choices: list) -> str:
    """The message about a value that is not in a list, of files on the server or of words."""
    is_file = not choices or any(isinstance(each, str) and re.search(r"\.\w{2,11}$", each) for each in choices)
    remedy = "add the file there, or choose another" if is_file else f"choose one of {_enumerated(choices)}"
    return f"ComfyUI has no {name} {_quoted(value)}: {remedy}{_nearest(value, choices)}"


def _nearest(value: Any, choices: list) -> str:
    words = [each for each in choices[:MAX_COMPARED] if isinstance(each, str) and len(each) <= MAX_COMPARED_LENGTH]
    close = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) and len(value) < 200 else []
    return f" (did you mean '{shown(close[0])}'?)" if close else ""


def _enumerated(values: list) -> str:
    return ", ".join(shown(each, 100) for each in values[:MAX_CHOICES_SHOWN]) + (", ..." if len(values) > MAX_CHOICES_SHOWN else "")


def _quoted(value: Any) -> str:
    return f"'{shown(value, 100)}'" if isinstance(value, str) else shown(value, 100)


def _kind_name(kind: Any) -> str:
    return shown(kind, 100) if isinstance(kind, str) else "a choice from a list"


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
