"""HTTP to one ComfyUI server: addresses, retries, complete responses. Every failure is an error of one line.

ComfyUIError              trying again does not help
|-- ServerUnavailable     the server does not respond or reports a temporary failure: it may come back
|   `-- TruncatedResponse a response ended too early
`-- ResponseTooLarge      a response exceeds MAX_BODY_BYTES
"""

import base64
import contextlib
import json
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit, urlunsplit

import requests
import requests.adapters
import urllib3

from common.errors import ComfyUIError, SettingsError
from common.settings import address_problem
from common.variables import PROXY_VARIABLES

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
BODY_TIMEOUT_S = 600
"""Limit for a whole request with its response: READ_TIMEOUT_S alone does not end one that arrives a few bytes at a time."""
MAX_BODY_BYTES = 256 * 2**20
MAX_JSON_BYTES = 64 * 2**20
"""Parsed, JSON can take thirty times its size in memory."""
MAX_COOKIES = 50
RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Delays between the attempts of a request that may be repeated."""
RETRY_STATUSES = (408, 429, 502, 503, 504, *range(520, 528))
"""Sent by a proxy when ComfyUI behind it does not respond, or to limit the rate; those from 520 on by Cloudflare."""
_ENDPOINT_HINT = "set COMFYUI_ENDPOINT to something like http://127.0.0.1:8188"


class ServerUnavailable(ComfyUIError):
    """No response, or one that reports a temporary failure, at every attempt."""


class TruncatedResponse(ServerUnavailable):
    """A response was shorter than its Content-Length, at every attempt."""


class ResponseTooLarge(ComfyUIError):
    """A response was larger than MAX_BODY_BYTES."""


@dataclass(frozen=True)
class Address:
    """One server. User name, password and headers are in `headers` only, so `url` may be logged."""

    url: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    ca_bundle: Path | None = None
    """Certificates to trust instead of the default ones."""

    @property
    def websocket_url(self) -> str:
        return f"ws{self.url.removeprefix('http')}/ws"


def parse_addresses(endpoint: str, headers: str | None = None, ca_bundle: Path | None = None) -> list[Address]:
    """The servers in `endpoint`, separated by commas; `headers` is a JSON object. Raises SettingsError."""
    extra_headers = json.loads(headers) if headers else {}
    urls = dict.fromkeys(each.strip().rstrip("/") for each in endpoint.split(",") if each.strip())
    if not urls:
        raise SettingsError(f"comfyui_endpoint: does not name a server; {_ENDPOINT_HINT}")
    return [_parse_address(url, extra_headers, ca_bundle) for url in urls]


def _parse_address(url: str, headers: dict[str, str], ca_bundle: Path | None) -> Address:
    parts = _split(url)
    try:
        # Empty or too long labels (RFC 1035, 2.3.4) make urllib3 raise an error that requests does not wrap.
        valid_host = bool(parts.hostname.encode("idna"))
    except UnicodeError:
        valid_host = False
    if not valid_host:
        raise SettingsError(f"comfyui_endpoint: {without_secrets(url)}: invalid host name; {_ENDPOINT_HINT}")
    if parts.query or parts.fragment:
        raise SettingsError(
            f"comfyui_endpoint: {without_secrets(url)} must not contain ? or #; to send a token, set COMFYUI_HEADERS"
        )
    login = {}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        login["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return Address(without_secrets(url), login | headers, ca_bundle)


def without_secrets(url: str) -> str:
    """`url` without user name, password, query and fragment. Raises SettingsError when it is not a valid URL."""
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
    # The URL is not shown: where its login ends cannot be known.
    raise SettingsError(f"comfyui_endpoint: not a valid URL of a server; {_ENDPOINT_HINT}")


def _redirect_target(reply: "Reply") -> str:
    """Where a redirect leads, for the log."""
    try:
        target = urljoin(reply.url, reply.headers.get("Location", ""))
        is_server = urlsplit(target).scheme in ("http", "https")
        return shown(without_secrets(target)) if is_server else "an address that is not a server's"
    except (SettingsError, ValueError):
        return "an invalid address"


@dataclass(frozen=True)
class Reply:
    """A response with its complete body."""

    url: str
    status: int
    headers: Any
    body: bytes

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status >= 500 or self.status in RETRY_STATUSES


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text of a server. Raises ValueError if it is not valid.

    Unpaired surrogates, which JSON can express and UTF-8 cannot, become U+FFFD: the value can be sent, stored and logged.
    """
    text = content if isinstance(content, str) else content.decode("utf-8-sig", "replace")
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            text = json.dumps(value, ensure_ascii=False)
            value = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def shown(value: Any, limit: int = 300) -> str:
    """What a server sent, as text for the log: on one line, at most `limit` characters, those that do not print escaped."""
    try:
        text = str(value)
    except (RecursionError, ValueError):  # nested too deeply; a number of too many digits
        return f"({type(value).__name__})"
    line = " ".join(text[:limit].split()) + (" ..." if len(text) > limit else "")
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)


class _Session(requests.Session):
    """Follows no redirect, so that headers with secrets do not reach another host."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None, even with `allow_redirects=False`: requests would still read the body of a redirect, without a limit, and
        prepare the next request."""


class _Adapter(requests.adapters.HTTPAdapter):
    """An adapter whose connections can be cut while another thread waits for them."""

    def __init__(self) -> None:
        self._connections: weakref.WeakSet[urllib3.connection.HTTPConnection] = weakref.WeakSet()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self._note_connections_of(self.poolmanager)

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> urllib3.PoolManager:
        manager = super().proxy_manager_for(*arguments, **options)
        self._note_connections_of(manager)
        return manager

    def _note_connections_of(self, manager: urllib3.PoolManager) -> None:
        def noting(pool: type[urllib3.HTTPConnectionPool]) -> type[urllib3.HTTPConnectionPool]:
            def connect(connection: urllib3.connection.HTTPConnection) -> None:
                self._connections.add(connection)
                pool.ConnectionCls.connect(connection)
                # A connection forgets its socket when the response has no length, but not yet a body.
                self._sockets.add(connection.sock)

            connection_class = type("NotedConnection", (pool.ConnectionCls,), {"connect": connect})
            return type("NotingPool", (pool,), {"ConnectionCls": connection_class})

        pools = urllib3.poolmanager.pool_classes_by_scheme
        manager.pool_classes_by_scheme = {scheme: noting(pool) for scheme, pool in pools.items()}

    @contextlib.contextmanager
    def cut_after(self, limit_s: float) -> Iterator[None]:
        """End every connection when the block takes longer. Raises requests.Timeout then, whatever else was raised."""
        was_cut = threading.Event()

        def cut() -> None:
            was_cut.set()
            connecting = (connection.sock for connection in list(self._connections) if connection.sock is not None)
            for each in [*self._sockets, *connecting]:
                with contextlib.suppress(OSError):  # closed meanwhile
                    # Not the method of an SSL socket, which would take the state away that the other thread is using.
                    socket.socket.shutdown(each, socket.SHUT_RDWR)

        timer = threading.Timer(limit_s, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (requests.RequestException, urllib3.exceptions.HTTPError):
            if not was_cut.is_set():
                raise
        finally:
            timer.cancel()
        if was_cut.is_set():  # a response without a length seems to be complete
            raise requests.Timeout


class Transport:
    """One server over HTTP, for one thread."""

    def __init__(self, address: Address, retry_delays_s: Sequence[float] | None = None, sleep: Callable[[float], Any] = time.sleep):
        self._address = address
        self._name = f"ComfyUI at {address.url}"
        self._retry_delays_s = RETRY_DELAYS_S if retry_delays_s is None else retry_delays_s
        self._sleep = sleep
        self.session = _Session()
        self._adapter = _Adapter()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, self._adapter)
        self.session.headers.update(address.headers)
        # Without an auth of its own, requests would replace the Authorization header by an entry of ~/.netrc.
        self.session.auth = lambda request: request

    def request(self, method: str, path: str, **content: Any) -> Reply:
        """One attempt, for at most BODY_TIMEOUT_S. Raises ServerUnavailable, ResponseTooLarge, or ComfyUIError when TLS fails."""
        # Passed with each request, because REQUESTS_CA_BUNDLE takes precedence over the session's setting.
        verify = str(self._address.ca_bundle) if self._address.ca_bundle else None
        options = {"timeout": (CONNECT_TIMEOUT_S, READ_TIMEOUT_S), "allow_redirects": False, "stream": True, "verify": verify}
        url = self._address.url + path
        if len(self.session.cookies) > MAX_COOKIES:
            self.session.cookies.clear()
        try:
            with self._adapter.cut_after(BODY_TIMEOUT_S), self.session.request(method, url, **options, **content) as response:
                return Reply(url, response.status_code, response.headers, self._read_body(response, path))
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise self._connection_error(error, path) from None

    def request_with_retry(self, method: str, path: str, **content: Any) -> Reply:
        """The same for a request that is safe to repeat: it is sent again while the server is unavailable.

        No attempt begins later than BODY_TIMEOUT_S after the first.
        """
        delays_s = iter(self._retry_delays_s)
        deadline_s = time.monotonic() + BODY_TIMEOUT_S
        while True:
            delay_s = next(delays_s, None) if time.monotonic() < deadline_s else None
            try:
                reply = self.request(method, path, **content)
                if not reply.is_transient or delay_s is None:
                    return reply
            except ServerUnavailable:
                if delay_s is None:
                    raise
            self._sleep(delay_s)

    def _read_body(self, response: requests.Response, path: str) -> bytes:
        body = bytearray()
        try:
            for chunk in response.iter_content(2**16):
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise self._too_large(path, MAX_BODY_BYTES)
        except ValueError as error:  # http.client does not refuse a negative size of a chunk
            raise requests.exceptions.ChunkedEncodingError(error) from None
        return bytes(body)

    def _too_large(self, path: str, limit_bytes: int) -> ResponseTooLarge:
        return ResponseTooLarge(f"{self._name} answers {path} with more than {limit_bytes / 2**20:.0f} MiB")

    def parse_json(self, reply: Reply, path: str) -> dict[str, Any]:
        """The JSON object in a reply. Raises ComfyUIError for anything else, which ComfyUI would not send."""
        if reply.status != 200:
            raise self.status_error(reply, path)
        content_type = reply.headers.get("Content-Type", "no content type")
        if "json" not in content_type.lower():
            raise self.error(
                f"answers {path} with {shown(content_type.partition(';')[0])} instead of JSON: check that COMFYUI_ENDPOINT is"
                " ComfyUI's own address and that there is no login page in front of it"
            )
        if len(reply.body) > MAX_JSON_BYTES:
            raise self._too_large(path, MAX_JSON_BYTES)
        try:
            content = parse_json(reply.body)
        except ValueError as error:
            raise self.error(f"answers {path} with invalid JSON ({shown(error)})") from None
        if not isinstance(content, dict):
            raise self.error(f"answers {path} with a JSON {type(content).__name__} instead of an object")
        return content

    def status_error(self, reply: Reply, path: str) -> ComfyUIError:
        """The error for a reply whose status is not 200."""
        status = reply.status
        if 300 <= status < 400:
            target = _redirect_target(reply)
            return self.error(f"redirects {path} to {target}: set COMFYUI_ENDPOINT to the final address, or log in there")
        reasons = {
            401: "login required; set COMFYUI_HEADERS, or put user:password@ into COMFYUI_ENDPOINT",
            403: "forbidden; check whether a proxy or a login is in front of ComfyUI",
            404: "not found; check that COMFYUI_ENDPOINT is ComfyUI's own address",
            413: "request too large; raise the body limit of the proxy, or ComfyUI's --max-upload-size",
            500: "internal error; check ComfyUI's console",
            **dict.fromkeys(
                RETRY_STATUSES, "a proxy reports that ComfyUI is unavailable, or limits the request rate: is ComfyUI running?"
            ),
        }
        kind = ServerUnavailable if reply.is_transient else ComfyUIError
        return kind(f"{self._name} answers {path} with status {status}: {reasons.get(status, 'unexpected status')}")

    def error(self, what: str) -> ComfyUIError:
        """A ComfyUIError about this server."""
        return ComfyUIError(f"{self._name} {what}")

    def _connection_error(self, error: Exception, path: str) -> ComfyUIError:
        """The error for a request without a complete response."""
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
            return ServerUnavailable(
                f"{self._name} refuses the connection: is ComfyUI running, and is COMFYUI_ENDPOINT its address?"
                " To be reachable from a container, ComfyUI must be started with --listen 0.0.0.0"
            )
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            return ServerUnavailable(
                f"{self._name} cannot be found: unknown host name; set COMFYUI_ENDPOINT"
                " (outside a container for example to http://127.0.0.1:8188)"
            )
        if isinstance(error, requests.exceptions.SSLError):
            return self.error(
                "cannot be reached over trusted TLS: use http:// if it does not use TLS,"
                " or set COMFYUI_CA_BUNDLE if its certificate is self-signed"
            )
        if isinstance(error, requests.exceptions.ChunkedEncodingError | requests.exceptions.ContentDecodingError):
            return TruncatedResponse(f"{self._name} sent a truncated response to {path}")
        if isinstance(error, requests.exceptions.Timeout):
            limits = f"{CONNECT_TIMEOUT_S} s to connect, {READ_TIMEOUT_S} s to answer, {BODY_TIMEOUT_S} s in total"
            return ServerUnavailable(f"{self._name} did not answer {path} in time ({limits})")
        if problem := address_problem(*PROXY_VARIABLES):
            return self.error(f"cannot be reached through the proxy: {problem}")
        if isinstance(error, requests.exceptions.InvalidSchema):  # a SOCKS proxy needs a package
            return self.error(f"cannot be reached through the proxy: {shown(error)}")
        reason = type(causes[-1]).__name__
        return ServerUnavailable(
            f"{self._name} closed the connection during {path} ({reason}): did ComfyUI stop, or does it expect https?"
        )
