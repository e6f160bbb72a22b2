"""`[project]`, `[collect]` and `[caption]` as types: every setting with its default and limits; `[train]`: training/config.py."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.settings import setting, without_logins

_FRAMING_HEADERS = ("content-length", "transfer-encoding", "content-type", "host", "connection")
"""Say how a request is sent; a wrong Content-Length lets the server wait for ever."""


@dataclass(frozen=True)
class CollectSettings:
    """`[collect]`: ComfyUI and what is sent to it."""

    comfyui_endpoint: str = setting("http://host.docker.internal:8188")
    comfyui_workflow: Path = setting(Path("workflow_api.json"))
    workflow_config: Path = setting(Path("config/workflow_config.json"))
    prompts_file: Path = setting(Path("prompts.json"))
    face_reference: Path | None = setting(None)
    """None: `face_reference.png` in the repository if it is there."""
    global_seed: int | None = setting(None, at_least=0, at_most=2**64 - 1)
    new_seeds: bool = setting(False)
    comfyui_delay: float = setting(2.0, at_least=0)
    """Seconds between submissions while others of ours wait."""
    comfyui_headers: str = setting("", secret=True)
    """A JSON object of HTTP headers."""
    comfyui_ca_bundle: Path | None = setting(None)
    """None: the certificate authorities that are usually trusted."""
    comfyui_stall_timeout: float = setting(3600.0, above=0)
    """Seconds without a sign of work."""
    comfyui_free: bool = setting(True)

    def validate(self) -> Iterator[str]:
        endpoints = [each.strip() for each in self.comfyui_endpoint.split(",")]
        if not all(each.startswith(("http://", "https://")) for each in endpoints if each):
            yield f"comfyui_endpoint: {without_logins(self.comfyui_endpoint)!r} must begin with http:// or https://"
        headers = _headers(self.comfyui_headers) if self.comfyui_headers else {}
        if headers is None:
            yield 'comfyui_headers: must be a JSON object of texts such as {"Authorization": "Bearer ..."}'
        for name in headers or ():
            if name.lower() in _FRAMING_HEADERS:
                yield f"comfyui_headers: {name} is set by each request itself; leave it out"
        if self.new_seeds and self.global_seed is not None:
            yield "new_seeds and global_seed contradict each other: unset one of them"


def _headers(text: str) -> dict[str, str] | None:
    """The JSON object of HTTP headers in `text`; None if it is none that can be sent (RFC 9110, 5.1 and 5.5)."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    pairs = content.items() if isinstance(content, dict) else [("", None)]
    can_be_sent = all(re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII) and _is_header_value(value) for name, value in pairs)
    return content if can_be_sent else None


def _is_header_value(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isprintable() and value == value.strip()
