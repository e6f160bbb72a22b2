"""A finished prompt's history entry -> verified images in the data set, and the result of the job."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from collecting.client import ComfyUI, FileMissing, ImageGone
from collecting.graph import Graph, graph_hash, literal_seeds, node_label, upstream_seeds
from collecting.http import shown
from collecting.image_store import DownloadedImage, ImageStore
from collecting.jobs import InFlight, JobResult, Plan
from collecting.journal import Journal
from collecting.prompt_texts import prompt_texts
from common.errors import abbreviated
from common.files import as_object
from common.image_formats import FORMAT_NAMES, IMAGE_SUFFIXES
from common.images import BrokenImageError

DOWNLOAD_RETRY_DELAYS_S = (0.5, 1.0, 2.0)
"""Delays between the attempts for an image that arrives damaged."""
_OTHER_OUTPUTS = {"gifs": "animations", "latents": "latents", "text": "text", "audio": "audio", "video": "videos"}
"""Key in a node's output -> its name in the log."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the server names it; none of this is used as a local file name."""

    filename: str
    subfolder: str
    kind: str
    """output, temp or input"""


class HistoryEntry:
    """A parsed history entry. Nothing in it is trusted: parts of an unexpected type are treated as missing."""

    def __init__(self, entry: dict[str, Any]):
        status = as_object(entry.get("status"))
        listed = status["messages"] if isinstance(status.get("messages"), list) else []
        messages = [(each[0], each[1]) for each in listed if _is_message(each)]
        self.failures = _failures(messages) if status.get("status_str") == "error" else []
        """Why the prompt failed; [] when it succeeded."""
        cached = next((data.get("nodes") for kind, data in messages if kind == "execution_cached"), None)
        self.cached_nodes = frozenset(each for each in cached if isinstance(each, str)) if isinstance(cached, list) else frozenset()
        """The nodes that did not run: their files, if they name any, are older than this prompt."""
        times_ms = [time_ms for _, data in messages if (time_ms := _as_timestamp(data.get("timestamp"))) is not None]
        self.duration_s = max(0.0, (times_ms[-1] - times_ms[0]) / 1000) if len(times_ms) > 1 else None
        """How long the prompt ran by the server's clock, if the entry says so."""
        self._outputs = as_object(entry.get("outputs"))

    def output(self, node: str) -> tuple[list[RemoteFile], list[str]]:
        """The still images of a node, and descriptions of everything else in its output.

        Animations, videos, latents, text and the previews in temp/ are not images to train on.
        """
        output = as_object(self._outputs.get(node))
        animated = any(output["animated"]) if isinstance(output.get("animated"), list) else False
        images, skipped = [], []
        for record in output["images"] if isinstance(output.get("images"), list) else ():
            if not isinstance(record, dict) or not isinstance(record.get("filename"), str):
                continue
            # Nodes of custom packs may leave out the subfolder, the type or both.
            subfolder, kind = record.get("subfolder"), record.get("type")
            subfolder, kind = subfolder if isinstance(subfolder, str) else "", kind if isinstance(kind, str) else ""
            file = RemoteFile(record["filename"], subfolder, kind or "output")
            if animated:
                skipped.append(f"'{shown(file.filename, 100)}' (animated)")
            elif file.kind == "temp":
                skipped.append(f"'{shown(file.filename, 100)}' (preview)")
            elif not file.filename.lower().endswith(IMAGE_SUFFIXES):
                skipped.append(f"'{shown(file.filename, 100)}' (not a {FORMAT_NAMES} image)")
            else:
                images.append(file)
        others = [key for key, value in output.items() if key not in ("images", "animated") and value]
        return images, skipped + [_OTHER_OUTPUTS.get(key) or shown(key, 100) for key in others]


def _is_message(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict)


def _as_timestamp(value: Any) -> float | None:
    """Milliseconds since 1970; None for what is not a time, such as NaN or a number that no float can hold."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e15 and math.isfinite(value) else None


def _failures(messages: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Why a prompt ended with an error. Errors and interruptions differ in the last message only."""
    kind, data = messages[-1] if messages else ("", {})
    node = f"node {shown(data.get('node_id'), 100)} ({shown(data.get('node_type'), 100)})"
    if kind == "execution_interrupted":
        return [f"interrupted in ComfyUI at {node}"]
    if kind == "execution_error":
        return [f"{node} failed: {shown(data.get('exception_type'), 100)}: {shown(data.get('exception_message'), 1000)}"]
    return ["ComfyUI reports a failure without a reason"]


class Harvester:
    """Downloads the images of the prompts that one server has finished. For one thread."""

    def __init__(
        self,
        plan: Plan,
        journal: Journal,
        store: ImageStore,
        server: ComfyUI,
        sleep: Callable[[float], Any] = time.sleep,
    ):
        self._plan, self._journal, self._store, self._server, self._sleep = plan, journal, store, server, sleep
        self._workflow_hash = graph_hash(plan.workflow.graph)
        self.downloaded: dict[RemoteFile, dict[str, Any]] = {}
        """File on the server -> its manifest line. To be cleared when the server may have been restarted or replaced."""

    def harvest(self, flight: InFlight, entry: HistoryEntry) -> JobResult:
        """Store the images that are missing. Whether the job is done or failed is not recorded in the journal.

        Raises ServerUnavailable when the server goes away before everything is stored.
        """
        result = JobResult(flight.job)
        graph = self._plan.graph_for(flight.job, flight.submission.seeds)
        if flight.dropped:
            result.failures += ["ComfyUI accepted only a part of the workflow:", *flight.dropped]
        stale: dict[str, list[str]] = {}
        for node in self._plan.workflow.output_nodes:
            label = f"node {node_label(graph, node)}"
            failures = stale.setdefault(node, []) if node in entry.cached_nodes else result.failures
            hint = _cache_hint(graph) if node in entry.cached_nodes else ""
            images, skipped = entry.output(node)
            if skipped:
                result.notes.append(f"{label}: skipped {abbreviated(skipped)}")
            if not images and (stored := self._stored_images(flight.job.key, node)):
                # This prompt ran only nodes whose files were gone.
                result.known += stored
            elif not images and not entry.failures:
                (result.failures if skipped else failures).append(f"{label} returned no image{'' if skipped else hint}")
            for index, file in enumerate(images):
                try:
                    is_new = self._store_image(file, node, index, flight, entry, graph)
                except BrokenImageError as error:
                    result.failures.append(f"{label}, image {index + 1}: the file {error}")
                except FileMissing as error:
                    failures.append(f"{label}, image {index + 1}: {error}{hint}")
                except ImageGone as error:
                    result.failures.append(f"{label}, image {index + 1}: {error}")
                else:
                    result.new += is_new
                    result.known += not is_new
        result.failures += entry.failures
        if not result.failures:
            result.stale_nodes = [node for node, failures in stale.items() if failures]
        result.failures += [failure for failures in stale.values() for failure in failures]
        return result

    def _stored_images(self, key: str, node: str) -> int:
        """The number of images of a node that were stored for an earlier prompt of the job."""
        lines = [line for (job, of, _index), line in list(self._journal.images.items()) if (job, of) == (key, node)]
        with self._store.lock:
            return sum(self._store.contains(line) for line in lines)

    def _store_image(self, file: RemoteFile, node: str, index: int, flight: InFlight, entry: HistoryEntry, graph: Graph) -> bool:
        """Download and store one image, after its manifest line was recorded. Returns False if the data set has it already."""
        job, prompt_id = flight.job, flight.submission.prompt_id
        position = {"key": job.key, "node": node, "index": index}
        recorded = self._journal.images.get((job.key, node, index))
        earlier = recorded or self.downloaded.get(file)
        # A file name identifies an image only if the node did not run again, or if the file was downloaded for the same prompt.
        if earlier and (recorded or node in entry.cached_nodes or earlier["prompt_id"] == prompt_id):
            with self._store.lock:
                if self._store.contains(earlier):
                    if not recorded:
                        self._journal.record("picture", **position, line=earlier)
                    return False
        image = self._download(file)
        texts = prompt_texts(graph, node) or [text for text in (job.prompt,) if text]
        details = {
            "prompt_id": prompt_id,
            "node": node,
            "seeds": upstream_seeds(graph, node, job.seeds),
            "prompt": "\n".join(texts) if job.prompt is None else job.prompt,
            "texts": texts,
            "workflow_sha256": self._workflow_hash,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if (person := self._plan.workflow.person) is not None:
            details["person"] = person
        with self._store.lock:
            line = self._store.manifest_line(image, job.prefix or f"node{node}", details)
            self._journal.record("picture", **position, line=line)
            self.downloaded[file] = line
            return self._store.put(image, line)

    def _download(self, file: RemoteFile) -> DownloadedImage:
        """An image of the server; one that arrives damaged is downloaded again. Raises BrokenImageError or ImageGone."""
        delays_s = iter(DOWNLOAD_RETRY_DELAYS_S)
        while True:
            delay_s = next(delays_s, None)
            try:
                return DownloadedImage.from_bytes(self._server.view(file.filename, file.subfolder, file.kind))
            except BrokenImageError:
                if delay_s is None:
                    raise
            self._sleep(delay_s)


def _cache_hint(graph: Graph) -> str:
    """Why a cached node has no image, and what to do."""
    seeds = "set GLOBAL_SEED or NEW_SEEDS=1 to generate a different image, or " if literal_seeds(graph) else ""
    return f": ComfyUI answered from its cache and the file is gone; {seeds}restart ComfyUI to generate the image again"
