"""Checks before collecting: `--check` lists everything that would stop the collector, with a remedy for each problem."""

import uuid
from typing import Any

from collecting.client import ComfyUI
from collecting.config import CollectSettings
from collecting.graph import InputRef, is_link, node_label
from collecting.http import Address, parse_addresses
from collecting.jobs import Plan, read_plan
from common.dataset_layout import DatasetFolder
from common.errors import ComfyUIError, SettingsError, bullet_list
from common.files import write_problem


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
            missing = _missing_on_server(plan, server.object_info()) if plan else []
            if plan and not missing:
                print(f"ComfyUI {version} at {address.url}: has every node class and file of the workflow", flush=True)
            problems += missing
            if plan and plan.face:
                server.check_upload_size(plan.face.content)
    except ComfyUIError as error:
        problems.append(str(error))


def _missing_on_server(plan: Plan, classes: dict[str, Any]) -> list[str]:
    """Node classes that are not installed, and values (such as model files and images) that the server does not offer."""
    graph = plan.workflow.graph
    missing = sorted({node["class_type"] for node in graph.values()} - classes.keys())
    problems = [
        f"ComfyUI has no node class {name}: install the custom nodes that provide it, or update ComfyUI" for name in missing
    ]
    for node_id, node in graph.items():
        if node["class_type"] not in classes:
            continue
        for name, value in node["inputs"].items():
            choices, are_images = _choices(classes[node["class_type"]], name)
            is_face = InputRef(node_id, name) == plan.workflow.face_input
            if choices is None or is_link(value) or value in choices or (is_face and plan.face):
                continue
            # ComfyUI finds `folder/a.png` and `a.png [output]` too, but lists only the files directly in input/.
            if are_images and isinstance(value, str) and ("/" in value or value.endswith("]")):
                continue
            remedy = "provide face_reference.png, or set FACE_REFERENCE" if is_face else "add the file there, or choose another"
            problems.append(f"node {node_label(graph, node_id)}: ComfyUI has no {name} {value!r}: {remedy}")
    return problems


def _choices(node_class: dict[str, Any], name: str) -> tuple[list | None, bool]:
    """The values that ComfyUI offers for an input (None: any value), and whether they are uploaded images."""
    inputs = node_class.get("input") or {}
    specification = {**(inputs.get("required") or {}), **(inputs.get("optional") or {})}.get(name)
    if not isinstance(specification, list) or not specification:
        return None, False
    options = specification[1] if len(specification) > 1 and isinstance(specification[1], dict) else {}
    offered = specification[0] if isinstance(specification[0], list) else options.get("options")
    return offered if isinstance(offered, list) else None, bool(options.get("image_upload"))
