"""The settings of `[collect]`, with their defaults and limits."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.masking import mask_address
from common.project import SharedCollectSettings
from common.settings import setting

_FRAMING_HEADERS = ("content-length", "transfer-encoding", "content-type", "host", "connection")
"""Headers that describe the request itself; with a wrong Content-Length the server would wait forever."""


@dataclass(frozen=True)
class CollectSettings(SharedCollectSettings):
    """`[collect]`: the ComfyUI servers and what is submitted to them."""

    comfyui_workflow: Path = setting(Path("workflow_api.json"))
    workflow_config: Path = setting(Path("config/workflow_config.json"))
    prompts_file: Path = setting(Path("prompts.json"))
    face_reference: tuple[Path, ...] = setting(())
    """One image for each node of `image_loader_node`. Empty: `face_reference.png` in the repository if it exists."""
    global_seed: int | None = setting(None, at_least=0, at_most=2**64 - 1)
    new_seeds: bool = setting(False)
    comfyui_delay: float = setting(2.0, at_least=0)
    """Seconds between submissions while enough prompts of this run are waiting."""
    comfyui_headers: str = setting("", secret=True)
    """A JSON object of HTTP headers."""
    comfyui_api_key: str = setting("", secret=True)
    """A key of the Comfy platform (platform.comfy.org), for workflows with partner nodes."""
    comfyui_ca_bundle: Path | None = setting(None)
    """None: the default certificate authorities."""
    comfyui_stall_timeout: float = setting(3600.0, above=0)
    """Seconds without progress after which a server is given up."""
    comfyui_free: bool = setting(True)

    def validate(self) -> Iterator[str]:
        endpoints = [each.strip() for each in self.comfyui_endpoint.split(",")]
        if not all(each.startswith(("http://", "https://")) for each in endpoints if each):
            yield f"comfyui_endpoint: {mask_address(self.comfyui_endpoint)!r} must begin with http:// or https://"
        headers = _parse_headers(self.comfyui_headers) if self.comfyui_headers else {}
        if headers is None:
            yield 'comfyui_headers: must be a JSON object of strings such as {"Authorization": "Bearer ..."}'
        for name in headers or ():
            if name.lower() in _FRAMING_HEADERS:
                yield f"comfyui_headers: {name} is set by the HTTP client for each request; remove it"
        if not (self.comfyui_api_key.isascii() and self.comfyui_api_key.isprintable()) or " " in self.comfyui_api_key:
            yield "comfyui_api_key: must consist of ASCII characters without spaces, as platform.comfy.org shows it"
        if self.new_seeds and self.global_seed is not None:
            yield "new_seeds and global_seed cannot be used together; unset one of them"


def _parse_headers(text: str) -> dict[str, str] | None:
    """The HTTP headers in `text`; None if it is not a JSON object of valid headers (RFC 9110, 5.1 and 5.5)."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    for name, value in content.items():
        valid_name = re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII)
        valid_value = isinstance(value, str) and value.isascii() and value.isprintable() and value == value.strip()
        if not (valid_name and valid_value):
            return None
    return content
