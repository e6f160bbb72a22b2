"""HTTP client of one ComfyUI server. Every failure is a ComfyUIError of one clear line.

ComfyUIError
|-- Unanswered      a submission was sent and no answer came: it may run or not
|-- PromptRefused   the server will not run this workflow
|-- CutOff          an answer ended before its end
`-- PictureGone     /view does not give the file that the history names
"""

import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import requests

from errors import ComfyUIError, SettingsError

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
PATIENCE_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Pauses between the tries of a request that may be repeated."""
_AWAY = (502, 503, 504)


@dataclass(frozen=True)
class Queued:
    """What POST /prompt answered."""

    prompt_id: str
    dropped: list[str]
    """Why some outputs will not run, although the others do."""


class Unanswered(ComfyUIError):
    """POST /prompt went out and no answer came back."""


class PromptRefused(ComfyUIError):
    """POST /prompt answered 400."""


class CutOff(ComfyUIError):
    """An answer was shorter than it said, each time it was asked for."""


class PictureGone(ComfyUIError):
    """GET /view will not give this one file; others it may give."""


class ComfyUI:
    """One server. Use as a context manager; `client_id` goes with every submission.

    Raises SettingsError when `url` cannot be the address of a server.
    """

    def __init__(self, url: str, client_id: str, patience_s: Sequence[float] | None = None):
        self.shown_url = without_secrets(url)
        self._base = url.rstrip("/")
        self._client_id = client_id
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._session = requests.Session()

    def __enter__(self) -> "ComfyUI":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._session.close()

    def version(self) -> str:
        """The server's version. Tried only once: raises ComfyUIError when there is no ComfyUI at this address."""
        try:
            stats = self._json_of(self._once("GET", "/system_stats"), "/system_stats")
        except requests.RequestException as error:
            raise self._broken(error) from None
        system = stats.get("system")
        if not isinstance(system, dict):
            raise self._error("is no ComfyUI: /system_stats says nothing about a system")
        return str(system.get("comfyui_version", "of unknown version"))

    def object_info(self) -> dict[str, Any]:
        """What the server knows about each of its node classes."""
        return self._get_json("/object_info")

    def upload(self, name: str, content: bytes) -> str:
        """Upload a picture; returns the name under which a LoadImage node finds it, which may be another one."""
        files = {"image": (name, content, "application/octet-stream")}
        answer = self._repeated("POST", "/upload/image", files=files, data={"type": "input"})
        stored = self._json_of(answer, "/upload/image")
        name, subfolder = stored.get("name"), stored.get("subfolder", "")
        if not isinstance(name, str) or not isinstance(subfolder, str) or not name:
            raise self._error(f"did not say under which name it keeps the face, but {stored}")
        return f"{subfolder}/{name}" if subfolder else name

    def submit(self, graph: dict[str, Any], prompt_id: str) -> Queued:
        """Queue a workflow under our own id.

        Raises PromptRefused when it will not run, Unanswered when it is not known whether it will.
        """
        body = {"prompt": graph, "client_id": self._client_id, "prompt_id": prompt_id}
        try:
            answer = self._once("POST", "/prompt", json=body)
        except requests.RequestException as error:
            raise Unanswered(str(self._broken(error))) from None
        if answer.status_code in _AWAY:
            raise Unanswered(str(self._refused(answer, "/prompt")))
        if answer.status_code == 400:
            raise PromptRefused("\n".join([f"ComfyUI at {self.shown_url} refuses the workflow:", *_reasons(answer)]))
        queued = self._json_of(answer, "/prompt")
        return Queued(str(queued.get("prompt_id", prompt_id)), complaints_of(queued.get("node_errors")))

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The history entry of a prompt that has ended; None while it waits or runs, and when it is not known."""
        entry = self._get_json(f"/history/{quote(prompt_id, safe='')}").get(prompt_id)
        return entry if isinstance(entry, dict) else None

    def queued_ids(self) -> set[str]:
        """The ids of all prompts that run or wait."""
        queue = self._get_json("/queue")
        return {str(item[1]) for part in ("queue_running", "queue_pending") for item in queue.get(part) or () if len(item) > 1}

    def view(self, filename: str, subfolder: str, kind: str) -> bytes:
        """The bytes of a file that the history names. Raises PictureGone when it cannot be had."""
        query = {"filename": filename, "subfolder": subfolder, "type": kind}
        try:
            answer = self._repeated("GET", "/view", params=query)
        except CutOff as error:
            raise PictureGone(f"{filename!r}: {error}") from None
        if answer.status_code == 404:
            raise PictureGone(f"ComfyUI at {self.shown_url} no longer has the file {filename!r}: restart it, or use another seed")
        if 400 <= answer.status_code < 500:
            raise PictureGone(f"{filename!r}: {self._refused(answer, '/view')}")
        if answer.status_code != 200:
            raise self._refused(answer, "/view")
        return answer.content

    def _get_json(self, path: str) -> dict[str, Any]:
        return self._json_of(self._repeated("GET", path), path)

    def _repeated(self, method: str, path: str, **content: Any) -> requests.Response:
        """A request that does no harm when it is sent twice: again while the server is away."""
        pauses_s = iter(self._patience_s)
        while True:
            pause_s = next(pauses_s, None)
            try:
                answer = self._once(method, path, **content)
                if answer.status_code < 500 or pause_s is None:
                    return answer
            except requests.RequestException as error:
                if pause_s is None:
                    raise self._broken(error) from None
            time.sleep(pause_s)

    def _once(self, method: str, path: str, **content: Any) -> requests.Response:
        timeout = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
        # A redirected POST would arrive as a GET, or hand the upload to a login page.
        return self._session.request(method, self._base + path, timeout=timeout, allow_redirects=method == "GET", **content)

    def _json_of(self, answer: requests.Response, path: str) -> dict[str, Any]:
        """The JSON object in an answer; anything else is not ComfyUI talking."""
        if answer.status_code != 200:
            raise self._refused(answer, path)
        content_type = answer.headers.get("Content-Type", "nothing")
        if "json" not in content_type:
            raise self._error(
                f"answers {path} with {content_type.partition(';')[0]} instead of JSON:"
                " is this ComfyUI's own address, or does a login page stand in front of it?"
            )
        try:
            content = answer.json()
        except requests.exceptions.JSONDecodeError as error:
            raise self._error(f"answers {path} with broken JSON ({error})") from None
        if not isinstance(content, dict):
            raise self._error(f"answers {path} with a {type(content).__name__} where ComfyUI gives an object")
        return content

    def _refused(self, answer: requests.Response, path: str) -> ComfyUIError:
        """An answer that is not 200, in words."""
        status = answer.status_code
        if 300 <= status < 400:
            place = without_secrets(urljoin(answer.url, answer.headers.get("Location", "")))
            return self._error(f"sends {path} on to {place}: put the final address into COMFYUI_ENDPOINT, or log in there")
        reasons = {
            401: "wants a login that it was not given",
            403: "forbids it: does a proxy or a login stand in front of it?",
            404: "does not know it: is this ComfyUI's own address?",
            413: "finds it too large: raise the body limit of the proxy, or --max-upload-size",
            500: "failed over it: the terminal in which ComfyUI runs says why",
            **dict.fromkeys(_AWAY, "is away behind its proxy: is ComfyUI running?"),
        }
        return self._error(f"answers {path} with {status}: it {reasons.get(status, 'did not expect it')}")

    def _broken(self, error: requests.RequestException) -> ComfyUIError:
        """A connection that failed, in words."""
        causes = list(_chain(error))
        if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
            return self._error(
                "refuses the connection: is ComfyUI running, and is COMFYUI_ENDPOINT its address?"
                " From inside a container ComfyUI must be started with --listen 0.0.0.0"
            )
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            return self._error(
                "cannot be found, the host name is not known here: set COMFYUI_ENDPOINT,"
                " outside of a container for example to http://127.0.0.1:8188"
            )
        if isinstance(error, requests.exceptions.SSLError):
            return self._error("does not speak TLS that can be trusted: http instead of https, or a self-signed certificate?")
        if isinstance(error, requests.exceptions.ChunkedEncodingError):
            return CutOff(f"ComfyUI at {self.shown_url} sends less than it announces")
        if isinstance(error, requests.exceptions.Timeout):
            return self._error(f"does not answer ({CONNECT_TIMEOUT_S} s to connect, {READ_TIMEOUT_S} s to answer)")
        return self._error(f"broke the connection ({type(causes[-1]).__name__}): did ComfyUI stop, or is this https?")

    def _error(self, what: str) -> ComfyUIError:
        return ComfyUIError(f"ComfyUI at {self.shown_url} {what}")


def complaints_of(node_errors: Any) -> list[str]:
    """The `node_errors` of an answer, one line per complaint: node, class, what is wrong."""
    lines = []
    for node_id, node in node_errors.items() if isinstance(node_errors, dict) else ():
        for error in node.get("errors") or ():
            details = f": {error['details']}" if error.get("details") else ""
            lines.append(f"node {node_id} ({node.get('class_type')}): {error.get('message')}{details}")
    return lines


def _reasons(answer: requests.Response) -> list[str]:
    """Why POST /prompt answered 400; the reason is in node_errors, or else in the error itself."""
    try:
        content = answer.json()
    except requests.exceptions.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        return [f"  - it does not say why: {answer.text[:200]!r}"]
    lines = complaints_of(content.get("node_errors"))
    if not lines:
        error = content.get("error") or {}
        lines = [
            " ".join(str(error[key]) for key in ("message", "details") if error.get(key)) if isinstance(error, dict) else str(error)
        ]
    return [f"  - {line}" for line in lines]


def without_secrets(url: str) -> str:
    """`url` as it may be shown: without user, password and query. Raises SettingsError when it is none."""
    try:
        parts = urlsplit(url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        host, port = None, ""
    if not host or " " in host:
        raise SettingsError(
            "comfyui_endpoint: not the address of a server; set COMFYUI_ENDPOINT to something like http://127.0.0.1:8188"
        )
    return urlunsplit((parts.scheme, f"{host}{port}", parts.path.rstrip("/"), "", ""))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
