"""Validation of `POST /prompt`, with the errors of each version of ComfyUI."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from demo.standin_comfyui.catalogue import ANY_TYPE, REPLACEMENTS, VERSIONS, inputs_of, node_class, output_types
from demo.standin_comfyui.nodes import input_file

_CONVERTERS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


class Rejected(Exception):
    """The prompt is rejected, with `error` and `node_errors` of the answer."""

    def __init__(self, kind: str, message: str, details: str = "", node_errors: dict | None = None, **extra: Any):
        super().__init__(message)
        self.error = {"type": kind, "message": message, "details": details, "extra_info": extra}
        self.node_errors = node_errors or {}


def apply_replacements(prompt: dict) -> None:
    """Replace nodes of classes that 0.33.0 no longer has. As there, a node without `_meta` raises KeyError."""
    for node_id, node in prompt.items():
        if "class_type" not in node or "inputs" not in node:
            continue
        for replacement in REPLACEMENTS.get(node["class_type"], ())[:1]:
            inputs = {each["new_id"]: node["inputs"][each["old_id"]] for each in replacement["input_mapping"]}
            prompt[node_id] = node | {"class_type": replacement["new_node_id"], "inputs": inputs, "_meta": node["_meta"].copy()}


def validate(prompt: Any, folder: Path, version: str, targets: Iterable[str] | None = None) -> tuple[list[str], dict[str, Any]]:
    """The ids of the output nodes that can run, and the errors of those that are dropped; `prompt`'s values are coerced.

    Raises Rejected when no output is left, AttributeError or TypeError when `prompt` is not a workflow.
    """
    for node_id in prompt:
        _check_class(node_id, prompt[node_id], version)
    outputs = [node_id for node_id in prompt if node_class(prompt[node_id]["class_type"], version).is_output]
    outputs = [node_id for node_id in outputs if targets is None or node_id in targets]
    if not outputs:
        raise Rejected("prompt_no_outputs", "Prompt has no outputs")
    good, node_errors, details = [], {}, []
    for output in outputs:
        found = _OutputValidation(prompt, folder, version, output)
        if found.is_valid(output, ()):
            good.append(output)
            continue
        for node_id, errors in found.errors.items():
            entry = node_errors.setdefault(
                node_id, {"errors": errors, "dependent_outputs": [], "class_type": prompt[node_id]["class_type"]}
            )
            entry["dependent_outputs"].append(output)
        details += [f"{error['message']}: {error['details']}" for error in found.errors.get(output, ())]
    if not good:
        raise Rejected("prompt_outputs_failed_validation", "Prompt outputs failed validation", "\n".join(details), node_errors)
    return good, node_errors


def _check_class(node_id: str, node: Any, version: str) -> None:
    if version != VERSIONS[1]:
        title = node.get("_meta", {}).get("title", node.get("class_type"))
        extra = {"node_id": node_id, "class_type": node.get("class_type"), "node_title": title}
        if "class_type" not in node:
            message = (
                f"Node '{title or f'ID #{node_id}'}' has no class_type. The workflow may be corrupted or a custom node is missing."
            )
            raise Rejected("missing_node_type", message, f"Node ID '#{node_id}'", **extra)
        if node_class(node["class_type"], version) is None:
            message = f"Node '{title}' not found. The custom node may not be installed."
            raise Rejected("missing_node_type", message, f"Node ID '#{node_id}'", **extra)
    if "class_type" not in node:
        message = "Cannot execute because a node is missing the class_type property."
        raise Rejected("invalid_prompt", message, f"Node ID '#{node_id}'")
    if node_class(node["class_type"], version) is None:
        message = f"Cannot execute because node {node['class_type']} does not exist."
        raise Rejected("invalid_prompt", message, f"Node ID '#{node_id}'")


class _OutputValidation:
    """Collects the errors of one output and everything that it depends on."""

    def __init__(self, prompt: dict, folder: Path, version: str, output: str):
        self.prompt, self.folder, self.version, self.output = prompt, folder, version, output
        self.errors: dict[str, list] = {}
        self._seen: dict[str, bool] = {}

    def is_valid(self, node_id: str, below: tuple[str, ...]) -> bool:
        """Whether the node and its ancestors can run; `below` are the nodes between it and the output."""
        if node_id in below:
            if self.version != VERSIONS[1]:
                self._add_cycle([*below[below.index(node_id) :], node_id])
            return False
        if node_id not in self._seen:
            try:
                self._seen[node_id] = self._inputs_fit(node_id, below)
            except (KeyError, IndexError) as error:
                extra = {"exception_type": type(error).__name__, "traceback": []}
                self._add(self.output, "exception_during_validation", "Exception when validating node", str(error), extra)
                self._seen[node_id] = False
        return self._seen[node_id]

    def _inputs_fit(self, node_id: str, below: tuple[str, ...]) -> bool:
        given = self.prompt[node_id]["inputs"]
        before = sum(map(len, self.errors.values()))
        fits = True
        for name, (specification, required) in inputs_of(self.prompt[node_id]["class_type"], self.folder, given).items():
            if name in given:
                fits &= self._input_fits(node_id, name, specification, below)
            elif required:
                short = name.rpartition(".")[2]
                self._add(node_id, "required_input_missing", "Required input is missing", short, {"input_name": name})
        return fits and sum(map(len, self.errors.values())) == before

    def _input_fits(self, node_id: str, name: str, specification: list, below: tuple[str, ...]) -> bool:
        value = self.prompt[node_id]["inputs"][name]
        if isinstance(value, list):
            return self._link_fits(node_id, name, specification, value, below)
        if isinstance(value, dict) and "__value__" in value:
            value = self.prompt[node_id]["inputs"][name] = value["__value__"]
        kind, options = specification[0], (specification[1] if len(specification) > 1 else {})
        extra = {"input_name": name, "input_config": specification, "received_value": value}
        if options.get("image_upload"):
            self._check_file_exists(node_id, name, value)
        elif isinstance(kind, list) or kind == "COMBO":
            choices = kind if isinstance(kind, list) else options["options"]
            if value not in choices:
                self._add(node_id, "value_not_in_list", "Value not in list", f"{name}: {value!r} not in {choices}", extra)
        elif kind in _CONVERTERS:
            self._convert(node_id, name, kind, value, extra)
            self._keep_in_range(node_id, name, options, extra)
        return True

    def _link_fits(self, node_id: str, name: str, specification: list, value: list, below: tuple[str, ...]) -> bool:
        if len(value) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            extra = {"input_name": name, "input_config": specification, "received_value": value}
            self._add(node_id, "bad_linked_input", message, name, extra)
            return False
        source, slot = value
        received, expected = output_types(self.prompt[source]["class_type"], self.version)[slot], specification[0]
        if not {received, expected} & set(ANY_TYPE) and not set(received.split(",")) <= set(expected.split(",")):
            details = f"{name}, received_type({received}) mismatch input_type({expected})"
            extra = {"input_name": name, "input_config": specification, "received_type": received, "linked_node": value}
            self._add(node_id, "return_type_mismatch", "Return type mismatch between linked nodes", details, extra)
            return False
        return self.is_valid(source, (*below, node_id))

    def _convert(self, node_id: str, name: str, kind: str, value: Any, extra: dict) -> None:
        try:
            self.prompt[node_id]["inputs"][name] = _CONVERTERS[kind](value)
        except (ValueError, TypeError, OverflowError) as error:
            message = f"Failed to convert an input value to a {kind} value"
            details = f"{name}, {value}, {error}"
            self._add(node_id, "invalid_input_type", message, details, {**extra, "exception_message": str(error)})

    def _keep_in_range(self, node_id: str, name: str, options: dict, extra: dict) -> None:
        value = self.prompt[node_id]["inputs"][name]
        if not isinstance(value, int | float):
            return
        extra = {**extra, "received_value": value}
        if value < options.get("min", value):
            message = f"Value {value} smaller than min of {options['min']}"
            self._add(node_id, "value_smaller_than_min", message, name, extra)
        elif value > options.get("max", value):
            message = f"Value {value} bigger than max of {options['max']}"
            self._add(node_id, "value_bigger_than_max", message, name, extra)

    def _check_file_exists(self, node_id: str, name: str, value: str) -> None:
        if not input_file(self.folder, value).exists():
            details = f"{name} - Invalid image file: {value}"
            self._add(node_id, "custom_validation_failed", "Custom validation failed for node", details, {"input_name": name})

    def _add_cycle(self, path: list[str]) -> None:
        details = " -> ".join(f"{each} ({self.prompt[each]['class_type']})" for each in path)
        for node_id in path[:-1]:
            extra = {"node_id": node_id, "cycle_nodes": path[:-1]}
            self._add(node_id, "dependency_cycle", "Dependency cycle detected", details, extra)

    def _add(self, node_id: str, kind: str, message: str, details: str, extra: dict) -> None:
        problem = {"type": kind, "message": message, "details": details, "extra_info": extra}
        self.errors.setdefault(node_id, []).append(problem)
