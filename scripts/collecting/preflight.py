"""Checks before collecting: `--check` lists everything that would stop the collector, with a remedy for each problem."""

import dataclasses
import uuid

from collecting.client import ComfyUI
from collecting.config import CollectSettings
from collecting.graph import Graph, node_label
from collecting.http import Address, parse_addresses, shown
from collecting.jobs import Plan, read_plan
from collecting.object_info import GraphProblem, NodeClasses
from common.dataset_layout import DatasetFolder
from common.errors import ComfyUIError, SettingsError, bullet_list
from common.files import write_problem

SHIPPED_PERSON = "A realistic photograph of a person."
"""What `person_node` of the included workflow contains."""
MAX_PROBLEM_LENGTH = 1000
"""Of a line about a node, which may contain texts of the server."""


def load_plan(settings: CollectSettings, folder: DatasetFolder) -> Plan:
    """The plan of a run. Raises SettingsError with every problem of the settings, the files that they name and the folder."""
    problems: list[str] = []
    plan = read_plan(settings, problems)
    check_folder(folder, problems)
    if plan is None or problems:
        raise SettingsError(bullet_list("nothing was sent to ComfyUI, because:", problems))
    return plan


def check(settings: CollectSettings, folder: DatasetFolder) -> None:
    """`--check`: the same, and whether each server has the node classes and files of the workflow. Prints what is in order.

    Raises SettingsError with all problems at once, or ComfyUIError if only the servers have problems.
    """
    problems: list[str] = []
    plan = read_plan(settings, problems)
    if plan:
        outputs, nodes = len(plan.workflow.output_nodes), len(plan.workflow.graph)
        print(f"{settings.comfyui_workflow}: {nodes} nodes; images are collected from {outputs} of them", flush=True)
        if (person := plan.workflow.person) is not None:
            node = node_label(plan.workflow.graph, plan.workflow.person_input.node)
            hint = ": say what is special about yours (hair, age, skin, build), for small faces" if person == SHIPPED_PERSON else ""
            print(f"node {node} describes the person as '{shown(person, 300)}'; edit it there{hint}", flush=True)
    check_folder(folder, problems)
    local_problems = len(problems)
    try:
        for address in parse_addresses(settings.comfyui_endpoint, settings.comfyui_headers, settings.comfyui_ca_bundle):
            _check_server(address, plan, problems)
    except SettingsError:
        assert problems, "read_plan reports an invalid address"
    if problems:
        kind = SettingsError if local_problems else ComfyUIError
        raise kind(bullet_list("collecting cannot start, because:", problems))


def check_folder(folder: DatasetFolder, problems: list[str]) -> None:
    """Report that images could not be written. Creates nothing."""
    if problem := write_problem(folder.images):
        problems.append(f"dataset_dir: {problem}, or set DATASET_DIR")


def _check_server(address: Address, plan: Plan | None, problems: list[str]) -> None:
    """Report that there is no ComfyUI, or one that cannot run the workflow."""
    try:
        with ComfyUI(address, str(uuid.uuid4())) as server:
            version = server.version()
            found = _problems_on(server, plan) if plan else []
            if plan and not found:
                print(f"ComfyUI {version} at {address.url}: has every node class and file of the workflow", flush=True)
            problems += [problem.text for problem in found]
            for face in plan.faces if plan else ():
                server.check_upload_size(face.content)
    except ComfyUIError as error:
        problems.append(str(error))


def check_refusal(server: ComfyUI, plan: Plan) -> None:
    """Raises ComfyUIError if the server is sure to refuse every output of the workflow, before anything is sent to it.

    An answer that cannot be used proves nothing: then ComfyUI decides when the workflow is submitted.
    """
    try:
        problems = _problems_on(server, plan)
    except ComfyUIError:
        return
    if frozenset().union(*(problem.stops for problem in problems)).issuperset(plan.workflow.output_nodes):
        texts = [problem.text for problem in problems]
        raise ComfyUIError(bullet_list(f"ComfyUI at {server.url} cannot run the workflow, because:", texts))


def _problems_on(server: ComfyUI, plan: Plan) -> list[GraphProblem]:
    """What keeps a server from running the workflow with the face, the prompts and the seeds of the plan."""
    classes = NodeClasses(server.object_info(), server.node_replacements())
    try:
        problems = _problems_of(classes, plan)
    except RecursionError:
        raise ComfyUIError(f"ComfyUI at {server.url} answers /object_info with JSON that is nested too deeply") from None
    return [dataclasses.replace(problem, text=shown(problem.text, MAX_PROBLEM_LENGTH)) for problem in problems]


def leave_out_surplus(classes: NodeClasses, plan: Plan, graph: Graph) -> Graph:
    """The graph without the nodes for faces that get none. Raises ComfyUIError if a node needs one of them."""
    used = [ref.node for ref in plan.workflow.face_inputs[: len(plan.faces)]]
    return classes.leave_out(graph, plan.surplus_loaders, plan.workflow.output_nodes, used) if plan.surplus_loaders else graph


def _problems_of(classes: NodeClasses, plan: Plan) -> list[GraphProblem]:
    workflow = plan.workflow
    problems = []
    graph = workflow.graph
    try:
        graph = leave_out_surplus(classes, plan, graph)
    except ComfyUIError as error:
        problems.append(GraphProblem(f"face_reference: {error}", frozenset(workflow.output_nodes)))
    for problem in classes.problems(graph, workflow.output_nodes, workflow.face_inputs if plan.faces else ()):
        is_face = problem.ref is not None and problem.ref in workflow.face_inputs
        face_remedy = "; or provide face_reference.png, or set FACE_REFERENCE"
        problems.append(dataclasses.replace(problem, text=problem.text + face_remedy) if is_face else problem)
    refused: dict[str, list[str]] = {}
    for number, entry in enumerate(plan.entries or (None,), start=1):
        for ref, seed in plan.seeds(entry).items():
            if seed is not None and (what := classes.value_problem(workflow.graph, ref, seed)):
                label = f"node {node_label(workflow.graph, ref.node)}: {what}"
                refused.setdefault(label, []).append((entry and entry.name) or f"prompt {number}")
    for what, labels in refused.items():
        others = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        origin = "set by GLOBAL_SEED" if plan.global_seed is not None else f"the seed of {labels[0]}{others}"
        problems.append(GraphProblem(f"{what}, {origin}", frozenset(workflow.output_nodes)))
    return problems
