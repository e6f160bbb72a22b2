"""The files that the settings name -> the jobs: what is submitted, with which seeds, and the key of each job."""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from collecting.config import CollectSettings
from collecting.graph import Graph, InputRef, graph_hash, literal_seeds
from collecting.http import parse_addresses
from collecting.image_store import DownloadedImage
from collecting.journal import Submission
from collecting.workflow import Workflow, parse_workflow
from collecting.workflow_file import parse_workflow_file
from common.errors import SettingsError
from common.files import parse_json, read_file
from common.images import BrokenImageError
from common.project import face_references

MAX_SEED = 2**64 - 1
ENTRY_KEYS = ("prompt", "seed", "name")
ENTRIES_EXAMPLE = 'a list such as [{"prompt": "a photo of a woman", "seed": 1, "name": "first"}]'


@dataclass(frozen=True)
class Entry:
    """One entry of prompts.json. Without a seed one is drawn; without a name its images are named after their node."""

    prompt: str
    seed: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class Job:
    """One workflow to run."""

    key: str
    """Hash of what is submitted: equal for a job of an earlier run, whatever the ids and titles."""
    label: str
    """The job's name in the log."""
    prefix: str | None
    """The beginning of its images' file names; None: the node id."""
    prompt: str | None
    seeds: dict[InputRef, int | None]
    """The seeds to set; None is drawn when the job is first submitted."""


@dataclass
class InFlight:
    """A job that was submitted and whose result is not known yet."""

    job: Job
    submission: Submission
    dropped: tuple[str, ...] = ()
    """Why ComfyUI will not run some of the workflow's outputs."""
    unconfirmed_until_s: float = 0.0
    """While ComfyUI's answer is missing, the prompt may still arrive until this time (time.monotonic())."""
    failed_downloads: int = 0
    """How often the server became unavailable while the images were downloaded."""
    behind: frozenset[str] = frozenset()
    """Ids of prompts that the server runs before this one, as far as they are known; none when it runs itself."""
    submitted_s: float = 0.0
    """time.monotonic(); 0 for a prompt of an earlier run."""


@dataclass
class JobResult:
    """How a job ended."""

    job: Job
    new: int = 0
    """Number of images that were added to the data set."""
    known: int = 0
    """Number of images whose bytes the data set had already."""
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Messages about things that are not failures."""
    stale_nodes: list[str] = field(default_factory=list)
    """Output nodes that ComfyUI answered from its cache although their files are gone, if nothing else failed."""


class JobQueue:
    """The jobs that are on no server, shared by the threads of all servers. Its operations are atomic without a lock."""

    def __init__(self, jobs: Iterable[Job] = ()):
        self._waiting = deque(jobs)
        self.active_workers: set[object] = set()
        """The server workers that take jobs."""
        self.losses: Counter[str] = Counter()
        """Job key -> how often a server lost the job while it was the next to run."""
        self.remade: dict[str, list[str]] = {}
        """Job key -> the output nodes that are run again because their cached files were gone."""

    def get(self) -> Job | None:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None

    def requeue(self, jobs: Iterable[Job]) -> None:
        """Put jobs at the front, in their order: they were submitted before those that wait."""
        self._waiting.extendleft(reversed(list(jobs)))


@dataclass(frozen=True)
class Plan:
    """Everything that the settings request."""

    workflow: Workflow
    entries: tuple[Entry, ...]
    """The entries of prompts.json; empty in full-workflow mode."""
    faces: tuple[DownloadedImage, ...]
    global_seed: int | None
    new_seeds: bool

    def current_jobs(self, done: set[str]) -> list[Job]:
        """The jobs of this run, given the keys of those that are done.

        With `new_seeds` these are the jobs of the first round, from 1, that is not complete: a run that was stopped is continued.
        """
        if not self.new_seeds:
            return self.jobs(0)
        rounds = (self.jobs(number) for number in count(1))
        return next(jobs for jobs in rounds if not all(job.key in done for job in jobs))

    def jobs(self, round_number: int) -> list[Job]:
        """The jobs of one round: 0, or with `new_seeds` 1, 2, ..., so that each round has keys of its own."""
        entries: tuple[Entry | None, ...] = self.entries if self.workflow.per_batch else (None,)
        repeats: Counter[str] = Counter()
        jobs = []
        for number, entry in enumerate(entries, start=1):
            seeds = self.seeds(entry)
            prompt, name = (entry.prompt, entry.name) if entry else (None, None)
            # The faces go by their bytes into the hash: the server may store them under any name.
            content = graph_hash(self.workflow.build_graph([face.sha256 for face in self.faces], prompt, seeds))
            parts = [content, self.workflow.output_nodes, repeats[content], round_number]
            key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            repeats[content] += 1
            jobs.append(Job(key, name or (f"prompt {number}" if entry else "the workflow"), name, prompt, seeds))
        return jobs

    def seeds(self, entry: Entry | None) -> dict[InputRef, int | None]:
        """The seeds to set for one entry; None is drawn.

        GLOBAL_SEED sets every literal seed. Otherwise only the mapped seed changes, in full-workflow mode with NEW_SEEDS all.
        """
        literal, mapped = literal_seeds(self.workflow.graph), self.workflow.seed_input
        if self.global_seed is not None:
            return dict.fromkeys([*literal, mapped] if mapped else literal, self.global_seed)
        if mapped:
            return {mapped: None if self.new_seeds or entry is None else entry.seed}
        return dict.fromkeys(literal) if self.new_seeds else {}

    @property
    def surplus_loaders(self) -> tuple[str, ...]:
        """The nodes for faces that get none because there are fewer faces: they are left out of what is submitted."""
        return tuple(ref.node for ref in self.workflow.face_inputs[len(self.faces) :]) if self.faces else ()

    def graph_for(self, job: Job, seeds: dict[str, int], faces: Sequence[str] = ()) -> Graph:
        """The graph of a job with these names of the faces; without any, the workflow's own images stay in it."""
        return self.workflow.build_graph(faces, job.prompt, {ref: seeds[str(ref)] for ref in job.seeds})


def read_plan(settings: CollectSettings, problems: list[str]) -> Plan | None:
    """Read and check every file that the settings name. Returns None after every problem was added to `problems`."""
    before = len(problems)
    try:
        parse_addresses(settings.comfyui_endpoint, settings.comfyui_headers)
    except SettingsError as error:
        problems.append(str(error))
    if settings.comfyui_ca_bundle is not None:
        _read("comfyui_ca_bundle", settings.comfyui_ca_bundle, problems)
    graph = _read_workflow(settings.comfyui_workflow, problems)
    config = _read_json("workflow_config", settings.workflow_config, problems)
    faces = _read_faces(face_references(settings.face_reference), problems)
    workflow = parse_workflow(graph, config, problems) if graph is not None and config is not None else None
    entries: list[Entry] = []
    if workflow and workflow.per_batch:
        content = _read_json("prompts_file", settings.prompts_file, problems)
        entries = [] if content is None else parse_entries(content, problems)
    nodes = len(workflow.face_inputs) if workflow else 0
    if workflow and len(faces) > max(nodes, 1):
        named = f"image_loader_node in workflow_config names {nodes or 'no'} node{'' if nodes == 1 else 's'}"
        problems.append(f"face_reference: {len(faces)} images, but {named} for them; add nodes there, or name fewer images")
    sets_seeds = settings.new_seeds or settings.global_seed is not None
    if workflow and sets_seeds and not workflow.seed_input and not literal_seeds(workflow.graph):
        problems.append("workflow: has no seed that GLOBAL_SEED or NEW_SEEDS could set; unset them")
    if workflow is None or len(problems) > before:
        return None
    return Plan(workflow, tuple(entries), faces if nodes else (), settings.global_seed, settings.new_seeds)


def parse_entries(content: Any, problems: list[str]) -> list[Entry]:
    """The entries of prompts.json, or [] after every problem was added to `problems`."""
    if not isinstance(content, list) or not content:
        problems.append(f"prompts: must be {ENTRIES_EXAMPLE}")
        return []
    before = len(problems)
    names: dict[str, int] = {}
    for number, entry in enumerate(content, start=1):
        problems += [f"prompts: entry {number}: {problem}" for problem in _entry_problems(entry)]
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str) and names.setdefault(name, number) != number:
            problems.append(f"prompts: entry {number}: the name {name!r} is already used by entry {names[name]}")
    return [] if len(problems) > before else [Entry(**entry) for entry in content]


def _entry_problems(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"must be an object with {', '.join(ENTRY_KEYS)} (is {_shortened(entry)})"
        return
    for key in entry:
        if key not in ENTRY_KEYS:
            yield f"unknown key {key!r} (known keys: {', '.join(ENTRY_KEYS)})"
    prompt = entry.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        yield f"prompt must be a non-empty string (is {_shortened(prompt)})" if "prompt" in entry else "has no prompt"
    if "seed" in entry:
        seed = entry["seed"]
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
            yield f"seed must be an integer from 0 to {MAX_SEED} (is {_shortened(seed)}); leave it out for a random one"
    name = entry.get("name")
    if "name" in entry and (not isinstance(name, str) or not name.strip()):
        yield f"name must be a non-empty string (is {_shortened(name)})"


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_faces(paths: Sequence[Path], problems: list[str]) -> tuple[DownloadedImage, ...]:
    faces = []
    for path in paths:
        content = _read("face_reference", path, problems)
        try:
            if content is not None:
                faces.append(DownloadedImage.for_upload(content))
        except BrokenImageError as error:
            problems.append(f"face_reference: {path} {error}; save it as a PNG or JPEG image")
    return tuple(faces)


def _read_workflow(path: Path, problems: list[str]) -> Any:
    """The content of the workflow file; None after a problem."""
    content = _read("comfyui_workflow", path, problems)
    if content is None:
        return None
    try:
        parsed = parse_workflow_file(content)
    except ValueError as error:
        problems.append(f"comfyui_workflow: {path} {error}")
        return None
    if parsed is None:
        problems.append(f"comfyui_workflow: {path} contains only null")
    return parsed


def _read_json(key: str, path: Path, problems: list[str]) -> Any:
    """The content of a JSON file; None after a problem."""
    content = _read(key, path, problems)
    if content is None:
        return None
    try:
        parsed = parse_json(content)
        # Python accepts NaN and unpaired surrogates, which can be neither sent nor written.
        json.dumps(parsed, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        example = f"; it must be {ENTRIES_EXAMPLE}" if key == "prompts_file" else ""
        problems.append(f"{key}: {path} is not valid JSON in UTF-8: {error}{example}")
        return None
    if parsed is None:
        problems.append(f"{key}: {path} contains only null")
    return parsed


def _read(key: str, path: Path, problems: list[str]) -> bytes | None:
    try:
        return read_file(path)
    except FileNotFoundError:
        problems.append(f"{key}: there is no file {path}; create it, or set {key.upper()} to its path")
    except OSError as error:
        problems.append(f"{key}: {path} cannot be read: {error.strerror}")
    return None
