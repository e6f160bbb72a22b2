"""Pure: a history entry -> what each node left behind, and how the prompt ended. Nothing in an entry is trusted."""

from dataclasses import dataclass
from statistics import median
from typing import Any

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_CALLED = {"gifs": "animations", "latents": "latents", "text": "text", "audio": "audio", "video": "videos"}


@dataclass(frozen=True)
class RemoteFile:
    """A file on the server, in its words; never a name of ours."""

    filename: str
    subfolder: str
    kind: str


@dataclass(frozen=True)
class Shown:
    """What one node handed to the history."""

    pictures: tuple[RemoteFile, ...]
    skipped: tuple[str, ...]
    """What it shows besides, in words: nothing of that is a picture to train on."""


def shown_by(entry: dict[str, Any], node: str) -> Shown:
    """The still pictures of a node. Animations, videos, latents, text and the previews in temp/ are none."""
    shown = _dict(_dict(entry.get("outputs")).get(node))
    animated = any(shown.get("animated") or ()) if isinstance(shown.get("animated"), list) else False
    pictures, skipped = [], []
    for record in shown.get("images") if isinstance(shown.get("images"), list) else ():
        file = _file(record)
        if file is None:
            continue
        if animated:
            skipped.append(f"{file.filename!r} (animated)")
        elif file.kind == "temp":
            skipped.append(f"{file.filename!r} (a preview)")
        elif not file.filename.lower().endswith(PICTURE_SUFFIXES):
            skipped.append(f"{file.filename!r} (no PNG, JPEG or WebP)")
        else:
            pictures.append(file)
    skipped += [_CALLED.get(key, key) for key, value in shown.items() if key not in ("images", "animated") and value]
    return Shown(tuple(pictures), tuple(skipped))


def _file(record: Any) -> RemoteFile | None:
    """Nodes of custom packs leave out the subfolder, the type or both."""
    if not isinstance(record, dict) or not isinstance(record.get("filename"), str):
        return None
    return RemoteFile(record["filename"], str(record.get("subfolder") or ""), str(record.get("type") or "output"))


def cached_nodes(entry: dict[str, Any]) -> frozenset[str]:
    """The nodes that did not run: their files, if they name any, are older than this prompt."""
    nodes = _message(entry, "execution_cached").get("nodes")
    return frozenset(map(str, nodes)) if isinstance(nodes, list) else frozenset()


def failures(entry: dict[str, Any]) -> list[str]:
    """Why a prompt did not come to a good end; [] when it did. An error and an interruption differ in the last message."""
    if _dict(entry.get("status")).get("status_str") != "error":
        return []
    kind, data = next(reversed(_messages(entry)), ("", {}))
    where = f"node {data.get('node_id')} ({data.get('node_type')})"
    if kind == "execution_interrupted":
        return [f"it was interrupted in ComfyUI at {where}"]
    if kind == "execution_error":
        return [f"{where} failed: {data.get('exception_type')}: {' '.join(str(data.get('exception_message')).split())}"]
    return ["ComfyUI says that it failed, but not why"]


def seconds_of(entry: dict[str, Any]) -> float | None:
    """How long a prompt ran, by the server's clock, if it says so."""
    times_ms = [data["timestamp"] for _, data in _messages(entry) if isinstance(data.get("timestamp"), int | float)]
    return (times_ms[-1] - times_ms[0]) / 1000 if len(times_ms) > 1 else None


def typical_s(durations_s: list[float]) -> float | None:
    """What the next prompt will probably take; None before the first."""
    return median(durations_s[-5:]) if durations_s else None


def _messages(entry: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    messages = _dict(entry.get("status")).get("messages")
    listed = messages if isinstance(messages, list) else []
    return [(str(each[0]), each[1]) for each in listed if isinstance(each, list) and len(each) == 2 and isinstance(each[1], dict)]


def _message(entry: dict[str, Any], wanted: str) -> dict[str, Any]:
    return next((data for kind, data in _messages(entry) if kind == wanted), {})


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
