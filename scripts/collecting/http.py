"""Pure: COMFYUI_ENDPOINT and what lets us in -> the address of each server.

Requests to one server and whole answers back, with patience while it is away. Every failure is one clear line.

ComfyUIError          it will not get better by asking again
|-- Away              the server is away or ails: it may come back
|   `-- CutOff        an answer ended before its end
`-- TooLarge          an answer has no end in sight
"""

import base64
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit, urlunsplit

import requests

from common.errors import ComfyUIError, SettingsError

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


CONNECT_TIMEOUT_S = 10


READ_TIMEOUT_S = 60


BODY_TIMEOUT_S = 600
"""A body that drips in without ever ending is given up."""


MOST_BODY_BYTES = 256 * 2**20


PATIENCE_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Pauses between the tries of a request that may be repeated."""


BEHIND_A_PROXY = (408, 429, 502, 503, 504, *range(520, 528))
"""What a proxy answers when ComfyUI behind it does not, or when it asks for patience; above 520 it is Cloudflare."""


class Away(ComfyUIError):
    """No answer, or one that says that the server is not well, each time it was asked."""


class CutOff(Away):
    """An answer was shorter than it said, each time it was asked for."""


class TooLarge(ComfyUIError):
    """An answer was larger than MOST_BODY_BYTES."""


@dataclass(frozen=True)
class Reply:
    """One answer, read to its end."""

    url: str
    status: int
    headers: Any
    body: bytes


class Transport:
    """One server over HTTP. Redirects are never followed: what lets us in there must not reach another host."""

    def __init__(self, address: Address, patience_s: Sequence[float] | None = None, pause: Callable[[float], Any] = time.sleep):
        self.address = address
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._pause = pause
        self._session = requests.Session()
        self._session.headers.update(address.headers)
        # Without it a ~/.netrc would replace the Authorization header.
        self._session.auth = lambda request: request

    def close(self) -> None:
        self._session.close()

    def once(self, method: str, path: str, **content: Any) -> Reply:
        """One try. Raises Away, TooLarge, or ComfyUIError for TLS that cannot be trusted."""
        try:
            return self._once(method, path, **content)
        except requests.RequestException as error:
            raise self._broken(error) from None

    def repeated(self, method: str, path: str, **content: Any) -> Reply:
        """A request that does no harm when it is sent twice: again while the server is away."""
        pauses_s = iter(self._patience_s)
        while True:
            pause_s = next(pauses_s, None)
            try:
                reply = self.once(method, path, **content)
                if not _ails(reply) or pause_s is None:
                    return reply
            except Away:
                if pause_s is None:
                    raise
            self._pause(pause_s)

    def _once(self, method: str, path: str, **content: Any) -> Reply:
        timeout_s = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
        # Set here, because REQUESTS_CA_BUNDLE wins over a session's.
        verify = str(self.address.ca_bundle) if self.address.ca_bundle else None
        url = self.address.url + path
        with self._session.request(
            method, url, timeout=timeout_s, allow_redirects=False, stream=True, verify=verify, **content
        ) as answer:
            return Reply(url, answer.status_code, answer.headers, self._body(answer, path))

    def _body(self, answer: requests.Response, path: str) -> bytes:
        deadline_s = time.monotonic() + BODY_TIMEOUT_S
        body = bytearray()
        for piece in answer.iter_content(2**16):
            body += piece
            if len(body) > MOST_BODY_BYTES:
                raise TooLarge(f"{self._named} answers {path} with more than {MOST_BODY_BYTES / 2**20:.0f} MiB")
            if time.monotonic() > deadline_s:
                raise requests.Timeout
        return bytes(body)

    def json_of(self, reply: Reply, path: str) -> dict[str, Any]:
        """The JSON object in an answer; anything else is not ComfyUI talking."""
        if reply.status != 200:
            raise self.refused(reply, path)
        content_type = reply.headers.get("Content-Type", "nothing")
        if "json" not in content_type:
            raise self.error(
                f"answers {path} with {content_type.partition(';')[0]} instead of JSON:"
                " is this ComfyUI's own address, or does a login page stand in front of it?"
            )
        try:
            content = json.loads(reply.body)
        except (ValueError, RecursionError) as error:
            raise self.error(f"answers {path} with broken JSON ({error})") from None
        if not isinstance(content, dict):
            raise self.error(f"answers {path} with a {type(content).__name__} where ComfyUI gives an object")
        return content

    def refused(self, reply: Reply, path: str) -> ComfyUIError:
        """An answer that is not 200, in words."""
        status = reply.status
        if 300 <= status < 400:
            place = without_secrets(urljoin(reply.url, reply.headers.get("Location", "")))
            return self.error(f"sends {path} on to {place}: put the final address into COMFYUI_ENDPOINT, or log in there")
        reasons = {
            401: "wants a login: put it into COMFYUI_HEADERS, or user:password into COMFYUI_ENDPOINT",
            403: "forbids it: does a proxy or a login stand in front of it?",
            404: "does not know it: is this ComfyUI's own address?",
            413: "finds it too large: raise the body limit of the proxy, or --max-upload-size",
            500: "failed over it: the terminal in which ComfyUI runs says why",
            **dict.fromkeys(BEHIND_A_PROXY, "is away behind its proxy, or the proxy asks for patience: is ComfyUI running?"),
        }
        kind = Away if _ails(reply) else ComfyUIError
        return kind(f"{self._named} answers {path} with {status}: it {reasons.get(status, 'did not expect it')}")

    def _broken(self, error: requests.RequestException) -> ComfyUIError:
        """A connection that failed, in words."""
        causes = list(_chain(error))
        if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
            return Away(
                f"{self._named} refuses the connection: is ComfyUI running, and is COMFYUI_ENDPOINT its address?"
                " From inside a container ComfyUI must be started with --listen 0.0.0.0"
            )
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            return Away(
                f"{self._named} cannot be found, the host name is not known here: set COMFYUI_ENDPOINT,"
                " outside of a container for example to http://127.0.0.1:8188"
            )
        if isinstance(error, requests.exceptions.SSLError):
            return self.error(
                "does not speak TLS that can be trusted: http instead of https, or a self-signed certificate,"
                " which COMFYUI_CA_BUNDLE must name?"
            )
        if isinstance(error, requests.exceptions.ChunkedEncodingError | requests.exceptions.ContentDecodingError):
            return CutOff(f"{self._named} sends less than it announces")
        if isinstance(error, requests.exceptions.Timeout):
            return Away(f"{self._named} does not answer ({CONNECT_TIMEOUT_S} s to connect, {READ_TIMEOUT_S} s to answer)")
        return Away(f"{self._named} broke the connection ({type(causes[-1]).__name__}): did ComfyUI stop, or is this https?")

    def error(self, what: str) -> ComfyUIError:
        return ComfyUIError(f"{self._named} {what}")

    @property
    def _named(self) -> str:
        return f"ComfyUI at {self.address.url}"


def _ails(reply: Reply) -> bool:
    """Whether the same request may be answered better later."""
    return reply.status >= 500 or reply.status in BEHIND_A_PROXY


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
