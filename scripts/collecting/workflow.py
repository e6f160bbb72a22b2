"""Pure: a workflow and the node ids of workflow_config.json -> which inputs are set and which nodes' images are collected."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from collecting.graph import (
    SEED_HOLDERS,
    SEED_INPUTS,
    SEPARATORS,
    TEXT_INPUTS,
    Graph,
    InputRef,
    is_link,
    node_label,
    saves_images,
    seed_source,
    unreadable_output,
)
from collecting.workflow_file import MAX_NODES_SHOWN, find_graph

CONFIG_KEYS = ("image_loader_node", "positive_prompt_node", "seed_node", "output_node", "output_prefix", "person_node")
LOADER_KEY = CONFIG_KEYS[0]


@dataclass(frozen=True)
class Workflow:
    """A valid workflow and its mapping. Nothing else in the graph is ever changed."""

    graph: Graph
    face_inputs: tuple[InputRef, ...]
    """The inputs that get the face references, in their order."""
    text_inputs: tuple[InputRef, ...]
    """The inputs that get the prompt of an entry; empty in full-workflow mode."""
    seed_input: InputRef | None
    output_nodes: tuple[str, ...]
    """Ids of the nodes whose images are collected."""
    person_input: InputRef | None = None
    """The input with the text that describes the person in every prompt."""

    @property
    def per_batch(self) -> bool:
        """Whether the workflow is submitted once for each entry of prompts.json; otherwise it is submitted once."""
        return self.seed_input is not None

    @property
    def person(self) -> str | None:
        """How the workflow describes the person; None without `person_node`."""
        ref = self.person_input
        return None if ref is None else self.graph[ref.node]["inputs"][ref.name]

    def build_graph(self, faces: Sequence[str], prompt: str | None, seeds: dict[InputRef, int | None]) -> Graph:
        """A copy of the graph with the faces, the prompt and the seeds set; without any faces or prompt its own values stay.

        With fewer faces than nodes for them, the other nodes get None: see `Plan.surplus_loaders`.
        """
        values: dict[InputRef, Any] = {}
        if faces:
            values |= dict(zip_longest(self.face_inputs, faces[: len(self.face_inputs)]))
        if prompt is not None:
            values |= dict.fromkeys(self.text_inputs, prompt)
        graph = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in self.graph.items()}
        for ref, value in (values | seeds).items():
            graph[ref.node]["inputs"][ref.name] = value
        return graph


def parse_workflow(content: Any, config: Any, problems: list[str]) -> Workflow | None:
    """The workflow in the content of a workflow file with its mapping, or None after every problem was added to `problems`.

    With both `positive_prompt_node` and `seed_node` the workflow runs in per-batch mode, with neither in full-workflow
    mode. The face is set as the input `image` of `image_loader_node`, several faces in those of a list of nodes, the seed as
    the literal `seed` or `noise_seed` of `seed_node` or as the number of a node for a number alone (`value`), the prompt as
    `text`, `prompt`, `value` or the only text of `positive_prompt_node`; an encoder with a text for each of its two text
    models (`text_g` and `text_l`, `clip_l` and `t5xxl`) gets the prompt in both. `person_node` has one such text, which is
    only read. Images are collected from `output_node`, or from every node that saves images; `output_prefix` selects from
    these the nodes whose `filename_prefix` begins with it.
    """
    before = len(problems)
    ids, loaders = _node_ids(config, problems)
    graph = find_graph(content, problems)
    if graph is None:
        return None
    mapping = _Mapping(graph, ids, loaders, problems)
    face_inputs, text_inputs, seed_input = mapping.face_inputs(), mapping.text_inputs(), mapping.seed_input()
    workflow = Workflow(graph, face_inputs, text_inputs, seed_input, mapping.output_nodes(), mapping.person_input())
    problems += _dangling_links(graph, workflow.output_nodes)
    return workflow if len(problems) == before else None


def _node_ids(config: Any, problems: list[str]) -> tuple[dict[str, str], list[str]]:
    """The keys of workflow_config.json that are set, and the nodes of `image_loader_node`, which may be a list."""
    if not isinstance(config, dict):
        problems.append(f'workflow_config: must be a JSON object such as {{"{CONFIG_KEYS[0]}": "16"}}')
        return {}, []
    unknown = [key for key in config if key not in CONFIG_KEYS]
    problems += [f"workflow_config: unknown key {key!r} (known keys: {', '.join(CONFIG_KEYS)})" for key in unknown]
    ids = {}
    loaders = None
    if isinstance(listed := config.get(LOADER_KEY), list):
        config = config | {LOADER_KEY: None}
        loaders = [str(each) for each in listed if (isinstance(each, str) and each) or type(each) is int]
        if len(set(loaders)) < len(listed):
            what = f"must be a node id or a list of different node ids (is {json.dumps(listed)[:100]})"
            problems.append(f"workflow_config: {LOADER_KEY} {what}")
    for key in CONFIG_KEYS:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and key != "output_prefix":
            value = str(value)
        if isinstance(value, str) and value:
            ids[key] = value
        elif value not in (None, ""):
            problems.append(f"workflow_config: {key} must be a string (is {json.dumps(value)})")
    pair = ("positive_prompt_node", "seed_node")
    missing = [key for key in pair if key not in ids]
    if len(missing) == 1 and config.get(missing[0]) in (None, ""):
        (given,) = set(pair) - set(missing)
        remedy = "set both to submit the workflow once per prompt, or neither to submit it once"
        problems.append(f"workflow_config: {given} is set but {missing[0]} is not; {remedy}")
    return ids, loaders or [ids[key] for key in (LOADER_KEY,) if key in ids]


def _dangling_links(graph: Graph, output_nodes: Iterable[str]) -> Iterator[str]:
    """Problems about links to missing nodes, in everything that `output_nodes` depend on."""
    seen, waiting = set(), list(output_nodes)
    while waiting:
        if (node_id := waiting.pop()) in seen:
            continue
        seen.add(node_id)
        for name, value in graph[node_id]["inputs"].items():
            # A list that is not a pair of a node id and a slot number may be a value.
            if not (is_link(value) and len(value) == 2 and type(value[0]) is str and type(value[1]) is int):
                continue
            if value[0] in graph:
                waiting.append(value[0])
            else:
                what = f"input {name} is connected to node {value[0]}, which does not exist; export the workflow again"
                yield f"workflow: node {node_label(graph, node_id)}: {what}"


def _is_whole_number(value: Any) -> bool:
    return type(value) is int or (isinstance(value, str) and value.strip().isdecimal())


class _Mapping:
    """Resolves the keys of workflow_config.json in a graph; what does not fit is added to `problems`."""

    def __init__(self, graph: Graph, ids: dict[str, str], loaders: list[str], problems: list[str]):
        self._graph, self._ids, self._loaders, self._problems = graph, ids, loaders, problems
        self._labels = {key: node_label(graph, node_id) for key, node_id in ids.items()}

    def face_inputs(self) -> tuple[InputRef, ...]:
        found = [self._inputs_of(LOADER_KEY, ("image",), node_id) for node_id in self._loaders]
        refs = [
            self._literal(LOADER_KEY, "image", node_id)
            for node_id, inputs in zip(self._loaders, found, strict=True)
            if inputs is not None
        ]
        return tuple(ref for ref in refs if ref is not None)

    def person_input(self) -> InputRef | None:
        key = "person_node"
        inputs = self._inputs_of(key, tuple(group[0] for group in TEXT_INPUTS))
        if inputs is None:
            return None
        if self._ids[key] == self._ids.get("positive_prompt_node"):
            self._add_problem(key, "is also positive_prompt_node, whose text is replaced by each prompt; choose another node")
            return None
        names = [name for group in TEXT_INPUTS for name in group if isinstance(inputs.get(name), str)]
        names = names or [name for name, value in inputs.items() if isinstance(value, str)]
        is_join = any(name in inputs for name in SEPARATORS)
        if len(names) > 1 or is_join:
            several = ", ".join(inputs if is_join else names)
            self._add_problem(key, f"node {self._labels[key]} has several text inputs ({several}); choose a node with one")
            return None
        if not names:
            linked = [name for group in TEXT_INPUTS for name in group if is_link(inputs.get(name))]
            return self._literal(key, linked[0]) if linked else self._without_text(key, inputs)
        return self._literal(key, names[0])

    def _without_text(self, key: str, inputs: dict[str, Any]) -> None:
        what = f"node {self._labels[key]} has no text input (its inputs: {', '.join(inputs) or 'none'})"
        self._add_problem(key, what)

    def seed_input(self) -> InputRef | None:
        key = "seed_node"
        inputs = self._inputs_of(key, SEED_INPUTS)
        if inputs is None:
            return None
        names = [name for name in SEED_INPUTS if name in inputs]
        if len(names) > 1:
            self._add_problem(key, f"node {self._labels[key]} has both seed and noise_seed; choose a node with one of them")
            return None
        # A node for a number alone, which is connected to the seeds of others.
        holders = [name for name in SEED_HOLDERS if name in inputs]
        name = next(iter(names or holders), SEED_INPUTS[0])
        value = inputs.get(name)
        if name in SEED_HOLDERS[len(SEED_INPUTS) :] and not is_link(value) and not _is_whole_number(value):
            what = f"{name} of node {self._labels[key]} must be a whole number to be the seed (is {json.dumps(value)[:60]})"
            self._add_problem(key, what)
            return None
        return self._literal(key, name)

    def text_inputs(self) -> tuple[InputRef, ...]:
        key = "positive_prompt_node"
        inputs = self._inputs_of(key, tuple(group[0] for group in TEXT_INPUTS))
        if inputs is None:
            return ()
        groups = [group for group in TEXT_INPUTS if all(name in inputs for name in group)]
        groups = groups or [(name,) for name, value in inputs.items() if isinstance(value, str)]
        if len(groups) != 1:
            names = ", ".join(name for group in groups for name in group)
            if groups:
                self._add_problem(key, f"node {self._labels[key]} has several text inputs ({names}); choose a node with one")
            else:
                self._without_text(key, inputs)
            return ()
        refs = [self._literal(key, name) for name in groups[0]]
        return tuple(ref for ref in refs if ref is not None)

    def output_nodes(self) -> tuple[str, ...]:
        saving = [node_id for node_id, node in self._graph.items() if saves_images(node)]
        unreadable = {node_id: what for node_id, node in self._graph.items() if (what := unreadable_output(node))}
        output_node = self._ids.get("output_node")
        if output_node in unreadable:
            what = f"node {self._labels['output_node']} does not save images that LoRACat can read, but {unreadable[output_node]}"
            remedy = f"save PNG images instead, or choose another of the nodes that save images: {self._list(saving)}"
            self._add_problem("output_node", f"{what}; {remedy}")
            return ()
        if not saving:
            others = [f"node {node_label(self._graph, node_id)} saves {what}" for node_id, what in unreadable.items()]
            shown = f" ({'; '.join(others[:MAX_NODES_SHOWN])})" if others else ""
            what = "no node saves images" + (" that LoRACat can read" if others else "")
            self._problems.append(f"workflow: {what}{shown}; add a SaveImage node and export it again")
            return ()
        if output_node is not None and output_node not in saving:
            in_graph = output_node in self._graph
            what = f"node {self._labels['output_node']} does not save images" if in_graph else f"there is no node {output_node}"
            self._add_problem("output_node", f"{what}; nodes that save images: {self._list(saving)}")
            return ()
        saving = saving if output_node is None else [output_node]
        if "output_prefix" not in self._ids:
            return tuple(saving)
        return self._with_prefix(saving, self._ids["output_prefix"])

    def _with_prefix(self, saving: list[str], prefix: str) -> tuple[str, ...]:
        prefixes = {node_id: self._graph[node_id]["inputs"].get("filename_prefix") for node_id in saving}
        selected = [node_id for node_id, each in prefixes.items() if isinstance(each, str) and each.startswith(prefix)]
        if not selected:
            found = {repr(each) if isinstance(each, str) else "one that comes from another node" for each in prefixes.values()}
            what = f"no filename_prefix begins with {prefix!r} (the workflow has: {', '.join(sorted(found))})"
            self._add_problem("output_prefix", what)
        return tuple(selected)

    def _inputs_of(self, key: str, names: tuple[str, ...], node_id: str | None = None) -> dict[str, Any] | None:
        """The inputs of the node that `key` names, or of `node_id`, one of several; None without the key or the node.

        `names` are the inputs that the key needs, for a list of candidates.
        """
        node_id = node_id or self._ids.get(key)
        if node_id is None or node_id in self._graph:
            return None if node_id is None else self._graph[node_id]["inputs"]
        candidates = [each for each, node in self._graph.items() if set(names) & node["inputs"].keys()]
        self._add_problem(key, f"the workflow has no node {node_id}; nodes with such an input: {self._list(candidates)}")
        return None

    def _literal(self, key: str, name: str, node_id: str | None = None) -> InputRef | None:
        """The input `name` of the node that `key` names, or of `node_id`, if it exists and is a value rather than a link."""
        node_id = node_id or self._ids[key]
        label, inputs = node_label(self._graph, node_id), self._graph[node_id]["inputs"]
        if name not in inputs:
            what = f"node {label} has no input {name!r} (its inputs: {', '.join(inputs) or 'none'})"
            self._add_problem(key, what)
            return None
        if is_link(inputs[name]):
            source = f"node {node_label(self._graph, str(inputs[name][0]))}" if inputs[name] else "nothing"
            holder = seed_source(self._graph, InputRef(node_id, name)) if key == "seed_node" else None
            shown = f": {node_label(self._graph, holder.node)}" if holder else ""
            what = f"input {name} of node {label} is connected to {source}"
            self._add_problem(key, f"{what}; choose the node that holds the value{shown}")
            return None
        return InputRef(node_id, name)

    def _add_problem(self, key: str, what: str) -> None:
        self._problems.append(f"workflow_config: {key}: {what}")

    def _list(self, node_ids: list[str]) -> str:
        shown = ", ".join(node_label(self._graph, node_id) for node_id in node_ids[:MAX_NODES_SHOWN])
        return (shown or "none") + (" ..." if len(node_ids) > MAX_NODES_SHOWN else "")
