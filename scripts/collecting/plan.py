"""The files that the settings name -> the work: what is to be submitted, with which seeds, and by which hash it is known."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collecting.address import addresses
from collecting.download import BadPicture, Picture, verified
from collecting.graph import InputRef, graph_hash, literal_seeds
from collecting.prompts import Entry, read_entries
from collecting.workflow import Workflow, understand
from errors import SettingsError
from sections import CollectSettings
from settings import REPOSITORY

DEFAULT_FACE = REPOSITORY / "face_reference.png"


@dataclass(frozen=True)
class Job:
    """One submission."""

    key: str
    """Hash of what is submitted: equal for work that was done before, whatever its id or title."""
    label: str
    """How the log calls it."""
    prefix: str | None
    """With what the names of its pictures begin; None: the node id."""
    prompt: str | None
    seeds: dict[InputRef, int | None]
    """The seeds to set; None is drawn when the work is first sent."""


@dataclass(frozen=True)
class Plan:
    """All that the settings ask for."""

    workflow: Workflow
    entries: tuple[Entry, ...]
    """What prompts.json lists; empty in full-workflow mode."""
    face: Picture | None
    global_seed: int | None
    new_seeds: bool

    def jobs(self, round_number: int) -> list[Job]:
        """The submissions of one round: 0, or with `new_seeds` 1, 2 ... so that each round is work of its own."""
        entries: tuple[Entry | None, ...] = self.entries if self.workflow.per_batch else (None,)
        repeats: Counter[str] = Counter()
        jobs = []
        for number, entry in enumerate(entries, start=1):
            seeds = self._seeds(entry)
            content = self._content(entry, seeds)
            key = _hash([content, self.workflow.kept_nodes, repeats[content], round_number])
            repeats[content] += 1
            name = entry.name if entry else None
            jobs.append(Job(key, name or (f"prompt {number}" if entry else "the workflow"), name, entry and entry.prompt, seeds))
        return jobs

    def _seeds(self, entry: Entry | None) -> dict[InputRef, int | None]:
        """GLOBAL_SEED sets every literal seed; otherwise only what is mapped changes, or in full-workflow mode is asked for."""
        literal, mapped = literal_seeds(self.workflow.graph), self.workflow.seed_input
        if self.global_seed is not None:
            return dict.fromkeys([*literal, mapped] if mapped else literal, self.global_seed)
        if mapped:
            return {mapped: None if self.new_seeds or entry is None else entry.seed}
        return dict.fromkeys(literal) if self.new_seeds else {}

    def _content(self, entry: Entry | None, seeds: dict[InputRef, int | None]) -> str:
        """Hash of the graph as it will be sent, the face by its bytes."""
        face_name = self.face.sha256 if self.face else None
        return graph_hash(self.workflow.filled(face_name, entry.prompt if entry else None, seeds))


def read_plan(settings: CollectSettings, complaints: list[str]) -> Plan | None:
    """Read and check every file that the settings name; None after everything wrong was added to `complaints`."""
    before = len(complaints)
    _check_address(settings, complaints)
    graph = _read_json("comfyui_workflow", settings.comfyui_workflow, complaints)
    config = _read_json("workflow_config", settings.workflow_config, complaints)
    face = _read_face(settings.face_reference, complaints)
    workflow = understand(graph, config, complaints) if graph is not None and config is not None else None
    entries = _entries(settings, workflow, complaints)
    wants_seeds = settings.new_seeds or settings.global_seed is not None
    if workflow and wants_seeds and not workflow.seed_input and not literal_seeds(workflow.graph):
        complaints.append("workflow: it has no seed that GLOBAL_SEED or NEW_SEEDS could set; unset them")
    if workflow is None or len(complaints) > before:
        return None
    face = face if workflow.face_input else None
    return Plan(workflow, tuple(entries), face, settings.global_seed, settings.new_seeds)


def _check_address(settings: CollectSettings, complaints: list[str]) -> None:
    try:
        addresses(settings.comfyui_endpoint, settings.comfyui_headers)
    except SettingsError as error:
        complaints.append(str(error))
    if settings.comfyui_ca_bundle is not None:
        _read("comfyui_ca_bundle", settings.comfyui_ca_bundle, complaints)


def _entries(settings: CollectSettings, workflow: Workflow | None, complaints: list[str]) -> list[Entry]:
    if workflow is None or not workflow.per_batch:
        return []
    content = _read_json("prompts_file", settings.prompts_file, complaints)
    return [] if content is None else read_entries(content, complaints)


def _read_json(key: str, path: Path, complaints: list[str]) -> Any:
    """The content of a JSON file, None after a complaint."""
    content = _read(key, path, complaints)
    if content is None:
        return None
    try:
        parsed = json.loads(content.decode("utf-8-sig"))
        # NaN and halves of UTF-16 characters are read, but cannot be sent or written down.
        json.dumps(parsed, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        complaints.append(f"{key}: {path} is not valid JSON in UTF-8: {error}")
        return None
    if parsed is None:
        complaints.append(f"{key}: {path} holds nothing but null")
    return parsed


def _read_face(path: Path | None, complaints: list[str]) -> Picture | None:
    """The face reference that is set, else the one in the repository if it is there."""
    if path is None and not DEFAULT_FACE.is_file():
        return None
    path = path or DEFAULT_FACE
    content = _read("face_reference", path, complaints)
    if content is None:
        return None
    try:
        return verified(content)
    except BadPicture as error:
        complaints.append(f"face_reference: {path} cannot be used: {error}; save it as PNG or JPEG")
        return None


def _read(key: str, path: Path, complaints: list[str]) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        complaints.append(f"{key}: there is no file {path}; put it there, or set {key.upper()} to where it is")
    except OSError as error:
        complaints.append(f"{key}: {path} cannot be read: {error.strerror}")
    return None


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
