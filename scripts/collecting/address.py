"""Pure: COMFYUI_ENDPOINT and what lets us in -> the address of each server."""

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from errors import SettingsError

_REMEDY = "set COMFYUI_ENDPOINT to something like http://127.0.0.1:8188"


@dataclass(frozen=True)
class Address:
    """One server; user, password and headers are in `headers` alone, so `url` may be shown."""

    url: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    ca_bundle: Path | None = None
    """Certificates to trust instead of the usual ones."""

    @property
    def websocket_url(self) -> str:
        return f"ws{self.url.removeprefix('http')}/ws"


def addresses(endpoint: str, headers: str | None = None, ca_bundle: Path | None = None) -> list[Address]:
    """The servers in `endpoint`, which commas separate; `headers` is a JSON object. Raises SettingsError."""
    ours = json.loads(headers) if headers else {}
    urls = dict.fromkeys(each.strip().rstrip("/") for each in endpoint.split(",") if each.strip())
    if not urls:
        raise SettingsError(f"comfyui_endpoint: names no server; {_REMEDY}")
    return [_address(url, ours, ca_bundle) for url in urls]


def _address(url: str, headers: dict[str, str], ca_bundle: Path | None) -> Address:
    parts = _split(url)
    if not _can_be_looked_up(parts.hostname):
        raise SettingsError(
            f"comfyui_endpoint: {without_secrets(url)}: between the dots of a host name stand 1 to 63 characters; {_REMEDY}"
        )
    if parts.query or parts.fragment:
        raise SettingsError(
            f"comfyui_endpoint: {without_secrets(url)} must end with the path, without ? and #; a token goes into COMFYUI_HEADERS"
        )
    login = {}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        login["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return Address(without_secrets(url), login | headers, ca_bundle)


def _can_be_looked_up(host: str) -> bool:
    """Whether no label of `host` is empty or too long (RFC 1035, 2.3.4): urllib3 raises over others what requests does not wrap."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def without_secrets(url: str) -> str:
    """`url` as it may be shown: without user, password and query. Raises SettingsError when it is none."""
    parts = _split(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = "" if parts.port is None else f":{parts.port}"
    return urlunsplit((parts.scheme, f"{host}{port}", parts.path.rstrip("/"), "", ""))


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.hostname and " " not in parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass
    raise SettingsError(f"comfyui_endpoint: not the address of a server; {_REMEDY}")
