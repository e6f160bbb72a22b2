"""What was sent and what came of it: dataset/.loracat/collect.jsonl.

Every line is on the disk before what it announces happens, so that after a kill at any instant the next run knows the
prompt ids that may be waiting on the server and the seeds that were drawn. Lines, by `event`:
`client` (our client_id, once) · `sent` (a submission is about to go out) · `image` (an image is about to be stored,
with its manifest line) · `done` and `failed` (nothing more will come of this work).
"""

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from common.files import append_json_line, read_json_lines

@dataclass(frozen=True)
class Submission:
    """One prompt as it was, or is about to be, sent."""

    prompt_id: str
    seeds: dict[str, int]
    """{"node.input": seed} for the seeds that were set."""


class Progress:
    """The record of one data set folder; `key` is the hash that identifies a piece of work. Threads may share it."""

    def __init__(self, path: Path):
        self._path = path
        self._in_flight: dict[str, Submission] = {}
        self._seeds: dict[str, dict[str, int]] = {}
        self._done: set[str] = set()
        self._images: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._client_id: str | None = None
        self._lock = threading.Lock()
        for line in read_json_lines(self._path):
            self._take_in(line)

    def client_id(self) -> str:
        """The same for every run on this data set."""
        if self._client_id is None:
            self._write({"event": "client", "client_id": str(uuid.uuid4())})
        return self._client_id

    def is_done(self, key: str) -> bool:
        return key in self._done

    def in_flight(self, key: str) -> Submission | None:
        """The last submission of this work, if nothing was heard of its end."""
        return self._in_flight.get(key)

    def seeds(self, key: str) -> dict[str, int] | None:
        """The seeds with which this work was first sent; the same are used when it is sent again."""
        return self._seeds.get(key)

    def image(self, key: str, node: str, index: int) -> dict[str, Any] | None:
        """The manifest line of the node's image number `index`, if it was fetched before."""
        return self._images.get((key, node, index))

    def has_images(self, keys: list[str]) -> bool:
        wanted = set(keys)
        return any(key in wanted for key, _, _ in self._images)

    def first_open_round(self, keys_of: Callable[[int], list[str]]) -> int:
        """The first round, from 1, of which not all work is done: NEW_SEEDS goes on where it was stopped."""
        return next(number for number in count(1) if not all(self.is_done(key) for key in keys_of(number)))

    def sent(self, key: str, submission: Submission) -> None:
        self._write({"event": "sent", "key": key, "prompt_id": submission.prompt_id, "seeds": submission.seeds})

    def storing(self, key: str, node: str, index: int, line: dict[str, Any]) -> None:
        self._write({"event": "picture", "key": key, "node": node, "index": index, "line": line})

    def done(self, key: str) -> None:
        self._write({"event": "done", "key": key})

    def failed(self, key: str) -> None:
        self._write({"event": "failed", "key": key})

    def _write(self, line: dict[str, Any]) -> None:
        with self._lock:
            append_json_line(self._path, line)
            self._take_in(line)

    def _take_in(self, line: dict[str, Any]) -> None:
        """Remember what a line says; a damaged one of another shape says nothing."""
        match line:
            case {"event": "client", "client_id": str(client_id)}:
                self._client_id = client_id
            case {"event": "sent", "key": str(key), "prompt_id": str(prompt_id), "seeds": dict(seeds)} if _are_seeds(seeds):
                self._in_flight[key] = Submission(prompt_id, seeds)
                self._seeds.setdefault(key, seeds)
            case {
                "event": "picture",
                "key": str(key),
                "node": str(node),
                "index": int(index),
                "line": {"file": str(), "sha256": str()} as about,
            }:
                self._images[key, node, index] = about
            case {"event": "done", "key": str(key)}:
                self._done.add(key)
                self._in_flight.pop(key, None)
            case {"event": "failed", "key": str(key)}:
                self._in_flight.pop(key, None)


def _are_seeds(seeds: dict[str, Any]) -> bool:
    return all(type(seed) is int for seed in seeds.values())
