"""Validation of `POST /prompt`, with the errors of ComfyUI 0.3.64."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from demo.standin_comfyui.catalogue import NODES, specifications
from demo.standin_comfyui.nodes import input_file

_CONVERTERS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


class Rejected(Exception):
    """The prompt is rejected, with `error` and `node_errors` of the answer."""

    def __init__(self, kind: str, message: str, details: str = "", node_errors: dict | None = None):
        super().__init__(message)
        self.error = {"type": kind, "message": message, "details": details, "extra_info": {}}
        self.node_errors = node_errors or {}


def validate(prompt: Any, folder: Path, targets: Iterable[str] | None = None) -> tuple[list[str], dict[str, Any]]:
    """The ids of the output nodes that can run, and the errors of those that are dropped; `prompt`'s values are coerced.

    Raises Rejected when no output is left, AttributeError or TypeError when `prompt` is not a workflow.
    """
    for node_id in prompt:
        _check_class(node_id, prompt[node_id])
    outputs = [node_id for node_id in prompt if NODES[prompt[node_id]["class_type"]].is_output]
    outputs = [node_id for node_id in outputs if targets is None or node_id in targets]
    if not outputs:
        raise Rejected("prompt_no_outputs", "Prompt has no outputs")
    good, node_errors, details = [], {}, []
    for output in outputs:
        found = _OutputValidation(prompt, folder, output)
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


def _check_class(node_id: str, node: Any) -> None:
    if "class_type" not in node:
        message = "Cannot execute because a node is missing the class_type property."
        raise Rejected("invalid_prompt", message, f"Node ID '#{node_id}'")
    if node["class_type"] not in NODES:
        message = f"Cannot execute because node {node['class_type']} does not exist."
        raise Rejected("invalid_prompt", message, f"Node ID '#{node_id}'")


class _OutputValidation:
    """Collects the errors of one output and everything that it depends on."""

    def __init__(self, prompt: dict, folder: Path, output: str):
        self.prompt, self.folder, self.output = prompt, folder, output
        self.errors: dict[str, list] = {}
        self._seen: dict[str, bool] = {}

    def is_valid(self, node_id: str, below: tuple[str, ...]) -> bool:
        """Whether the node and its ancestors can run; `below` are the nodes between it and the output."""
        if node_id in below:
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
        node = NODES[self.prompt[node_id]["class_type"]]
        before = sum(map(len, self.errors.values()))
        fits = True
        for name, specification in specifications(self.prompt[node_id]["class_type"], self.folder).items():
            if name in given:
                fits &= self._input_fits(node_id, name, specification, below)
            elif name in node.inputs:
                self._add(node_id, "required_input_missing", "Required input is missing", name, {"input_name": name})
        return fits and sum(map(len, self.errors.values())) == before

    def _input_fits(self, node_id: str, name: str, specification: list, below: tuple[str, ...]) -> bool:
        value = self.prompt[node_id]["inputs"][name]
        if isinstance(value, list):
            return self._link_fits(node_id, name, specification, value, below)
        kind, options = specification[0], (specification[1] if len(specification) > 1 else {})
        extra = {"input_name": name, "input_config": specification, "received_value": value}
        if options.get("image_upload"):
            self._check_file_exists(node_id, name, value)
        elif isinstance(kind, list):
            if value not in kind:
                self._add(node_id, "value_not_in_list", "Value not in list", f"{name}: {value!r} not in {kind}", extra)
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
        received, expected = NODES[self.prompt[source]["class_type"]].output[slot], specification[0]
        if expected not in (received, "*"):
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

    def _add(self, node_id: str, kind: str, message: str, details: str, extra: dict) -> None:
        problem = {"type": kind, "message": message, "details": details, "extra_info": extra}
        self.errors.setdefault(node_id, []).append(problem)
