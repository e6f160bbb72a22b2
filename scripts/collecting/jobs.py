"""Pure: the content of prompts.json -> its entries, or everything that is wrong with it.

The files that the settings name -> the work: what is to be submitted, with which seeds, and by which hash it is known.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collecting.config import CollectSettings
from collecting.graph import InputRef, graph_hash, literal_seeds
from collecting.http import addresses
from collecting.image_store import BadImage, DownloadedImage, verified
from collecting.workflow import Workflow, understand
from common.errors import SettingsError
from common.settings import REPOSITORY

MAX_SEED = 2**64 - 1


KEYS = ("prompt", "seed", "name")


@dataclass(frozen=True)
class Entry:
    """One prompt; without a seed one is drawn, without a name its images are named after their node."""

    prompt: str
    seed: int | None = None
    name: str | None = None


def read_entries(content: Any, problems: list[str]) -> list[Entry]:
    """The entries, or [] after every problem was added to `problems`."""
    if not isinstance(content, list) or not content:
        problems.append('prompts: must be a list such as [{"prompt": "a photo of a woman", "seed": 1, "name": "first"}]')
        return []
    before = len(problems)
    names: dict[str, int] = {}
    for number, entry in enumerate(content, start=1):
        problems += [f"prompts: entry {number}: {problem}" for problem in _complaints(entry)]
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str) and names.setdefault(name, number) != number:
            problems.append(f"prompts: entry {number}: the name {name!r} is entry {names[name]}'s already")
    return [] if len(problems) > before else [Entry(**entry) for entry in content]


def _complaints(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"must be an object with {', '.join(KEYS)}, not {_shown(entry)}"
        return
    for key in entry:
        if key not in KEYS:
            yield f"unknown key {key!r}; known: {', '.join(KEYS)}"
    prompt = entry.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        yield f"prompt must be text that is not empty, not {_shown(prompt)}" if "prompt" in entry else "has no prompt"
    if "seed" in entry and not _is_seed(entry["seed"]):
        yield f"seed must be a whole number from 0 to {MAX_SEED}, not {_shown(entry['seed'])}; leave it out for a random one"
    name = entry.get("name")
    if "name" in entry and (not isinstance(name, str) or not name.strip()):
        yield f"name must be text that is not empty, not {_shown(name)}"


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SEED


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


DEFAULT_FACE = REPOSITORY / "face_reference.png"


@dataclass(frozen=True)
class Job:
    """One submission."""

    key: str
    """Hash of what is submitted: equal for work that was done before, whatever its id or title."""
    label: str
    """How the log calls it."""
    prefix: str | None
    """With what the names of its images begin; None: the node id."""
    prompt: str | None
    seeds: dict[InputRef, int | None]
    """The seeds to set; None is drawn when the work is first sent."""


@dataclass(frozen=True)
class Plan:
    """All that the settings ask for."""

    workflow: Workflow
    entries: tuple[Entry, ...]
    """What prompts.json lists; empty in full-workflow mode."""
    face: DownloadedImage | None
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


def read_plan(settings: CollectSettings, problems: list[str]) -> Plan | None:
    """Read and check every file that the settings name; None after everything wrong was added to `problems`."""
    before = len(problems)
    _check_address(settings, problems)
    graph = _read_json("comfyui_workflow", settings.comfyui_workflow, problems)
    config = _read_json("workflow_config", settings.workflow_config, problems)
    face = _read_face(settings.face_reference, problems)
    workflow = understand(graph, config, problems) if graph is not None and config is not None else None
    entries = _entries(settings, workflow, problems)
    wants_seeds = settings.new_seeds or settings.global_seed is not None
    if workflow and wants_seeds and not workflow.seed_input and not literal_seeds(workflow.graph):
        problems.append("workflow: it has no seed that GLOBAL_SEED or NEW_SEEDS could set; unset them")
    if workflow is None or len(problems) > before:
        return None
    face = face if workflow.face_input else None
    return Plan(workflow, tuple(entries), face, settings.global_seed, settings.new_seeds)


def _check_address(settings: CollectSettings, problems: list[str]) -> None:
    try:
        addresses(settings.comfyui_endpoint, settings.comfyui_headers)
    except SettingsError as error:
        problems.append(str(error))
    if settings.comfyui_ca_bundle is not None:
        _read("comfyui_ca_bundle", settings.comfyui_ca_bundle, problems)


def _entries(settings: CollectSettings, workflow: Workflow | None, problems: list[str]) -> list[Entry]:
    if workflow is None or not workflow.per_batch:
        return []
    content = _read_json("prompts_file", settings.prompts_file, problems)
    return [] if content is None else read_entries(content, problems)


def _read_json(key: str, path: Path, problems: list[str]) -> Any:
    """The content of a JSON file, None after a problem."""
    content = _read(key, path, problems)
    if content is None:
        return None
    try:
        parsed = json.loads(content.decode("utf-8-sig"))
        # NaN and halves of UTF-16 characters are read, but cannot be sent or written down.
        json.dumps(parsed, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        problems.append(f"{key}: {path} is not valid JSON in UTF-8: {error}")
        return None
    if parsed is None:
        problems.append(f"{key}: {path} holds nothing but null")
    return parsed


def _read_face(path: Path | None, problems: list[str]) -> DownloadedImage | None:
    """The face reference that is set, else the one in the repository if it is there."""
    if path is None and not DEFAULT_FACE.is_file():
        return None
    path = path or DEFAULT_FACE
    content = _read("face_reference", path, problems)
    if content is None:
        return None
    try:
        return verified(content)
    except BadImage as error:
        problems.append(f"face_reference: {path} cannot be used: {error}; save it as PNG or JPEG")
        return None


def _read(key: str, path: Path, problems: list[str]) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        problems.append(f"{key}: there is no file {path}; put it there, or set {key.upper()} to where it is")
    except OSError as error:
        problems.append(f"{key}: {path} cannot be read: {error.strerror}")
    return None


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
