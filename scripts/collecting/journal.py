"""The collector's journal, dataset/.loracat/collect.jsonl: what was submitted and what came of it.

Every line is flushed to disk before the event that it announces, so that after a kill at any instant the next run knows
the prompt ids that may be waiting on the server and the seeds that were drawn.
"""

import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.files import append_json_line, read_json_lines

Event = Literal["client", "sent", "dequeued", "picture", "done", "failed"]
"""client: our client_id, written once; sent: a prompt is about to be submitted; dequeued: prompts were removed from the
server's queue by this run; picture: an image is about to be stored, with its manifest line; done, failed: the job has ended
and nothing more will come of it."""


@dataclass(frozen=True)
class Submission:
    """A prompt as it was, or is about to be, submitted."""

    prompt_id: str
    seeds: dict[str, int]
    """{"node.input": seed} for the seeds that were set."""


class Journal:
    """The journal in the file `path`. Jobs are identified by `Job.key`. Threads may share it.

    The attributes are built from the lines, those of earlier runs included; only `record` changes them.
    """

    def __init__(self, path: Path):
        self.done: set[str] = set()
        """Keys of the jobs that are done."""
        self.in_flight: dict[str, Submission] = {}
        """Job key -> its last submission, while its end is not recorded."""
        self.seeds: dict[str, dict[str, int]] = {}
        """Job key -> the seeds of its first submission; the same are used when it is submitted again."""
        self.images: dict[tuple[str, str, int], dict[str, Any]] = {}
        """(job key, node, index of the image in the node's output) -> manifest line of the image."""
        self._client_id: str | None = None
        self._path = path
        self._lock = threading.Lock()
        for line in read_json_lines(self._path):
            self._apply(line)

    def client_id(self) -> str:
        """The id under which every run on this data set talks to ComfyUI."""
        if self._client_id is None:
            self.record("client", client_id=str(uuid.uuid4()))
        return self._client_id

    def record(self, event: Event, **details: Any) -> None:
        """Append one line to the file; returns when it is on disk."""
        line = {"event": event, **details}
        with self._lock:
            append_json_line(self._path, line)
            self._apply(line)

    def _apply(self, line: dict[str, Any]) -> None:
        """Update the attributes. A damaged line, or one of another shape, is ignored."""
        match line:
            case {"event": "client", "client_id": str(client_id)}:
                self._client_id = client_id
            case {"event": "sent", "key": str(key), "prompt_id": str(prompt_id), "seeds": dict(seeds)}:
                if all(type(seed) is int for seed in seeds.values()):
                    self.in_flight[key] = Submission(prompt_id, seeds)
                    self.seeds.setdefault(key, seeds)
            case {"event": "dequeued", "prompt_ids": list(prompt_ids)}:
                self.in_flight = {key: each for key, each in self.in_flight.items() if each.prompt_id not in prompt_ids}
            case {
                "event": "picture",
                "key": str(key),
                "node": str(node),
                "index": int(index),
                "line": {"file": str(), "sha256": str()} as manifest_line,
            }:
                self.images[key, node, index] = manifest_line
            case {"event": "done", "key": str(key)}:
                self.done.add(key)
                self.in_flight.pop(key, None)
            case {"event": "failed", "key": str(key)}:
                self.in_flight.pop(key, None)
