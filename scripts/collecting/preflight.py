"""`--check`: ONE list of everything that would stop the collector, with the remedy for each."""

import uuid
from typing import Any

from collecting.client import ComfyUI
from collecting.config import CollectSettings
from collecting.graph import InputRef, described, is_link
from collecting.http import Address, addresses
from collecting.jobs import Plan, read_plan
from common.dataset_layout import DatasetFolder
from common.errors import ComfyUIError, SettingsError, bullet_list
from common.files import write_problem


def check(settings: CollectSettings, folder: DatasetFolder) -> None:
    """Verify files, mapping, prompts, face, folder, server and the workflow's node classes and model files; say what is there.

    Raises SettingsError with all problems at once, ComfyUIError when the server alone is at fault.
    """
    problems: list[str] = []
    plan = read_plan(settings, problems)
    if plan:
        kept, nodes = len(plan.workflow.kept_nodes), len(plan.workflow.graph)
        print(f"{settings.comfyui_workflow}: {nodes} nodes, images are kept of {kept} of them", flush=True)
    check_folder(folder, problems)
    of_the_files = len(problems)
    try:
        for address in addresses(settings.comfyui_endpoint, settings.comfyui_headers, settings.comfyui_ca_bundle):
            _check_server(address, plan, problems)
    except SettingsError:
        assert problems, "read_plan complains about such an address"
    if problems:
        kind = SettingsError if of_the_files else ComfyUIError
        raise kind(bullet_list("collecting cannot begin:", problems))


def _check_server(address: Address, plan: Plan | None, problems: list[str]) -> None:
    """Complain when there is no ComfyUI, or one that cannot run the workflow."""
    try:
        with ComfyUI(address, str(uuid.uuid4())) as server:
            version = server.version()
            unknown = _unknown_to_the_server(plan, server.object_info()) if plan else []
            if plan and not unknown:
                print(f"ComfyUI {version} at {address.url} has every node and file that the workflow names", flush=True)
            problems += unknown
    except ComfyUIError as error:
        problems.append(str(error))


def check_folder(folder: DatasetFolder, problems: list[str]) -> None:
    """Complain when images could not be written; makes nothing."""
    if problem := write_problem(folder.images):
        problems.append(f"dataset_dir: {problem}, or set DATASET_DIR")


def _unknown_to_the_server(plan: Plan, known: dict[str, Any]) -> list[str]:
    """Node classes that are not installed, and choices (such as model files and images) that the server does not offer."""
    problems = []
    graph = plan.workflow.graph
    missing = sorted({node["class_type"] for node in graph.values()} - known.keys())
    problems += [f"ComfyUI has no node class {name}: install the custom nodes it comes from, or update ComfyUI" for name in missing]
    for node_id, node in graph.items():
        if node["class_type"] not in known:
            continue
        for name, value in node["inputs"].items():
            choices, are_images = _choices(known[node["class_type"]], name)
            is_face = InputRef(node_id, name) == plan.workflow.face_input
            if choices is None or is_link(value) or value in choices or (is_face and plan.face):
                continue
            if are_images and _lies_in_a_folder(value):  # ComfyUI finds it there, but lists only what lies at the top
                continue
            remedy = "give a face: face_reference.png, or FACE_REFERENCE" if is_face else "put the file there, or choose another"
            problems.append(f"node {described(graph, node_id)}: ComfyUI offers no {name} {value!r}: {remedy}")
    return problems


def _choices(node_class: dict[str, Any], name: str) -> tuple[list | None, bool]:
    """The values that ComfyUI offers for an input, None when it is free; and whether they are uploaded images."""
    inputs = node_class.get("input") or {}
    specification = {**(inputs.get("required") or {}), **(inputs.get("optional") or {})}.get(name)
    if not isinstance(specification, list) or not specification:
        return None, False
    options = specification[1] if len(specification) > 1 and isinstance(specification[1], dict) else {}
    offered = specification[0] if isinstance(specification[0], list) else options.get("options")
    return offered if isinstance(offered, list) else None, bool(options.get("image_upload"))


def _lies_in_a_folder(image: Any) -> bool:
    """`folder/a.png`, or `a.png [output]`."""
    return isinstance(image, str) and ("/" in image or image.endswith("]"))
