"""Pure: the content of prompts.json -> its entries, or everything that is wrong with it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_SEED = 2**64 - 1
KEYS = ("prompt", "seed", "name")


@dataclass(frozen=True)
class Entry:
    """One prompt; without a seed one is drawn, without a name its pictures are named after their node."""

    prompt: str
    seed: int | None = None
    name: str | None = None


def read_entries(content: Any, complaints: list[str]) -> list[Entry]:
    """The entries, or [] after every complaint was added to `complaints`."""
    if not isinstance(content, list) or not content:
        complaints.append('prompts: must be a list such as [{"prompt": "a photo of a woman", "seed": 1, "name": "first"}]')
        return []
    before = len(complaints)
    names: dict[str, int] = {}
    for number, entry in enumerate(content, start=1):
        complaints += [f"prompts: entry {number}: {complaint}" for complaint in _complaints(entry)]
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str) and names.setdefault(name, number) != number:
            complaints.append(f"prompts: entry {number}: the name {name!r} is entry {names[name]}'s already")
    return [] if len(complaints) > before else [Entry(**entry) for entry in content]


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
