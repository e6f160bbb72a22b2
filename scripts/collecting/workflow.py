"""Pure: a workflow and the node ids of workflow_config.json -> what LoRACat may touch in it and whose images it keeps."""

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from collecting.graph import SEED_INPUTS, TEXT_INPUTS, Graph, InputRef, described, is_link, put, saves_images

CONFIG_KEYS = ("image_loader_node", "positive_prompt_node", "seed_node", "output_node", "output_prefix")


API_FORMAT = 'export it with "Save (API Format)" ("Export (API)" in newer versions of ComfyUI)'


MOST_NODES_SHOWN = 8


@dataclass(frozen=True)
class Workflow:
    """A workflow that was found fit, and its mapping. Nothing else in it is ever changed."""

    graph: Graph
    face_input: InputRef | None
    text_inputs: tuple[InputRef, ...]
    """The inputs that an entry's prompt goes into; none in full-workflow mode."""
    seed_input: InputRef | None
    kept_nodes: tuple[str, ...]
    """Ids of the nodes whose images are kept."""

    @property
    def per_batch(self) -> bool:
        """Submitted once per entry of prompts.json; otherwise once."""
        return self.seed_input is not None

    def filled(self, face_name: str | None, prompt: str | None, seeds: dict[InputRef, int | None]) -> Graph:
        """A copy of the graph with the face, the prompt and the seeds in it; without face or prompt its own stay."""
        graph = copy.deepcopy(self.graph)
        if face_name is not None and self.face_input is not None:
            put(graph, self.face_input, face_name)
        for text_input in self.text_inputs if prompt is not None else ():
            put(graph, text_input, prompt)
        for seed_input, seed in seeds.items():
            put(graph, seed_input, seed)
        return graph


def understand(graph: Any, config: Any, problems: list[str]) -> Workflow | None:
    """The workflow with its mapping, or None after everything that is wrong was added to `problems`.

    Both `positive_prompt_node` and `seed_node` mean per-batch mode, neither means full-workflow mode. The face goes
    into the input `image` of `image_loader_node`, the seed into the literal `seed` or `noise_seed` of `seed_node`, the
    prompt into `text`, `prompt`, `value` or the only text of `positive_prompt_node`; an encoder with a text for each of
    its two text models (`text_g` and `text_l`, `clip_l` and `t5xxl`) gets the prompt in both. Kept are the images of
    `output_node`, or of every node that saves images; `output_prefix` leaves of these the ones whose
    `filename_prefix` begins with it.
    """
    before = len(problems)
    ids = _node_ids(config, problems)
    if not _is_graph(graph, problems):
        return None
    mapping = _Mapping(graph, ids, problems)
    workflow = Workflow(graph, mapping.face_input(), mapping.text_inputs(), mapping.seed_input(), mapping.kept_nodes())
    problems += _dangling_links(graph, workflow.kept_nodes)
    return workflow if len(problems) == before else None


def _node_ids(config: Any, problems: list[str]) -> dict[str, str]:
    """The keys of workflow_config.json that are set."""
    if not isinstance(config, dict):
        problems.append(f'workflow_config: must be an object such as {{"{CONFIG_KEYS[0]}": "16"}}')
        return {}
    unknown = [key for key in config if key not in CONFIG_KEYS]
    problems += [f"workflow_config: unknown key {key!r}; known: {', '.join(CONFIG_KEYS)}" for key in unknown]
    ids = {}
    for key in CONFIG_KEYS:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and key != "output_prefix":
            value = str(value)
        if isinstance(value, str) and value:
            ids[key] = value
        elif value not in (None, ""):
            problems.append(f"workflow_config: {key} must be text, not {json.dumps(value)}")
    pair = ("positive_prompt_node", "seed_node")
    missing = [key for key in pair if key not in ids]
    if len(missing) == 1 and config.get(missing[0]) in (None, ""):
        both = "set both to submit once per prompt, or neither to submit the workflow once"
        problems.append(f"workflow_config: {missing[0]} is missing beside {' or '.join(set(pair) - set(missing))}; {both}")
    return ids


def _is_graph(graph: Any, problems: list[str]) -> bool:
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        problems.append(f"workflow: the file holds the format of the web page, which cannot be submitted; {API_FORMAT}")
        return False
    if not isinstance(graph, dict) or not graph:
        problems.append(f"workflow: the file holds no workflow; {API_FORMAT}")
        return False
    strange = [node_id for node_id, node in graph.items() if not _is_node(node)]
    if strange:
        shown = ", ".join(strange[:MOST_NODES_SHOWN]) + (" ..." if len(strange) > MOST_NODES_SHOWN else "")
        problems.append(f"workflow: without class_type and inputs these are no nodes: {shown}; {API_FORMAT}")
    return not strange


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _dangling_links(graph: Graph, kept: Iterable[str]) -> Iterator[str]:
    """Complaints about links to nodes that are not there, in whatever the nodes `kept` need. A list that is no pair of a
    node id and a slot may be a value."""
    seen, waiting = set(), list(kept)
    while waiting:
        if (node_id := waiting.pop()) in seen:
            continue
        seen.add(node_id)
        for name, value in graph[node_id]["inputs"].items():
            if not (is_link(value) and len(value) == 2 and type(value[0]) is str and type(value[1]) is int):
                continue
            if value[0] in graph:
                waiting.append(value[0])
            else:
                what = f"input {name} comes from node {value[0]}, which is not there; export the workflow again"
                yield f"workflow: node {described(graph, node_id)}: {what}"


class _Mapping:
    """The places in a graph that the keys of workflow_config.json name; what does not fit becomes a problem."""

    def __init__(self, graph: Graph, ids: dict[str, str], problems: list[str]):
        self._graph, self._ids, self._complaints = graph, ids, problems

    def face_input(self) -> InputRef | None:
        inputs = self._inputs_of("image_loader_node", ("image",))
        return None if inputs is None else self._literal("image_loader_node", "image")

    def seed_input(self) -> InputRef | None:
        inputs = self._inputs_of("seed_node", SEED_INPUTS)
        if inputs is None:
            return None
        there = [name for name in SEED_INPUTS if name in inputs]
        if len(there) > 1:
            self._complain("seed_node", f"node {self._shown('seed_node')} has both seed and noise_seed; map a node with one")
            return None
        return self._literal("seed_node", there[0] if there else SEED_INPUTS[0])

    def text_inputs(self) -> tuple[InputRef, ...]:
        key = "positive_prompt_node"
        inputs = self._inputs_of(key, tuple(group[0] for group in TEXT_INPUTS))
        if inputs is None:
            return ()
        groups = [group for group in TEXT_INPUTS if all(name in inputs for name in group)]
        groups = groups or [(name,) for name, value in inputs.items() if isinstance(value, str)]
        if len(groups) != 1:
            names = ", ".join(name for group in groups for name in group)
            what = f"several texts ({names}); map a node with one" if groups else f"no text; its inputs: {_names(inputs)}"
            self._complain(key, f"node {self._shown(key)} has {what}")
            return ()
        places = [self._literal(key, name) for name in groups[0]]
        return tuple(place for place in places if place is not None)

    def kept_nodes(self) -> tuple[str, ...]:
        saving = [node_id for node_id, node in self._graph.items() if saves_images(node)]
        if not saving:
            self._complaints.append("workflow: no node saves images; add a SaveImage node and export it again")
            return ()
        output_node = self._ids.get("output_node")
        if output_node is not None and output_node not in saving:
            what = (
                f"{self._shown('output_node')} saves no images" if output_node in self._graph else f"there is no node {output_node}"
            )
            self._complain("output_node", f"{what}; these do: {self._list(saving)}")
            return ()
        saving = saving if output_node is None else [output_node]
        if "output_prefix" not in self._ids:
            return tuple(saving)
        return self._with_prefix(saving, self._ids["output_prefix"])

    def _with_prefix(self, saving: list[str], wanted: str) -> tuple[str, ...]:
        prefixes = {node_id: self._graph[node_id]["inputs"].get("filename_prefix") for node_id in saving}
        kept = [node_id for node_id, prefix in prefixes.items() if isinstance(prefix, str) and prefix.startswith(wanted)]
        if not kept:
            there = {repr(prefix) if isinstance(prefix, str) else "one that is not written out" for prefix in prefixes.values()}
            self._complain("output_prefix", f"no filename_prefix begins with {wanted!r}; there are: {', '.join(sorted(there))}")
        return tuple(kept)

    def _inputs_of(self, key: str, wanted: tuple[str, ...]) -> dict[str, Any] | None:
        """The inputs of the node that `key` names, or None: the key is not set, or there is no such node."""
        node_id = self._ids.get(key)
        if node_id is None or node_id in self._graph:
            return None if node_id is None else self._graph[node_id]["inputs"]
        fitting = [each for each, node in self._graph.items() if set(wanted) & node["inputs"].keys()]
        self._complain(key, f"the workflow has no node {node_id}; nodes with such an input: {self._list(fitting)}")
        return None

    def _literal(self, key: str, name: str) -> InputRef | None:
        """The input of the mapped node, if it is there and is a value."""
        node_id = self._ids[key]
        inputs = self._graph[node_id]["inputs"]
        if name not in inputs:
            self._complain(key, f"node {self._shown(key)} has no input {name!r}; its inputs: {_names(inputs)}")
            return None
        if is_link(inputs[name]):
            source = described(self._graph, str(inputs[name][0])) if inputs[name] else "nowhere"
            self._complain(key, f"{name} of node {self._shown(key)} is a link to {source}; map the node that holds the value")
            return None
        return InputRef(node_id, name)

    def _complain(self, key: str, what: str) -> None:
        self._complaints.append(f"workflow_config: {key}: {what}")

    def _shown(self, key: str) -> str:
        return described(self._graph, self._ids[key])

    def _list(self, node_ids: list[str]) -> str:
        shown = ", ".join(described(self._graph, node_id) for node_id in node_ids[:MOST_NODES_SHOWN])
        return (shown or "none") + (" ..." if len(node_ids) > MOST_NODES_SHOWN else "")


def _names(inputs: dict[str, Any]) -> str:
    return ", ".join(inputs) or "none"
