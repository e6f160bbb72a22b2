"""Generated answers of a server: whatever it sends, the collector ends with success or a documented exit code.

`make test` runs the same few examples each time, `make fuzz` new ones for minutes.
"""

import contextlib
import gzip
import itertools
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from comfyui_workspace import png, workflow
from hypothesis import example, given, settings
from hypothesis import strategies as st

from collecting.client import ComfyUI
from collecting.http import Address
from collecting.jobs import Plan
from collecting.monitor import Display, WebsocketMonitor
from collecting.workflow import parse_workflow
from common.errors import ComfyUIError
from demo.standin_comfyui.websockets import accepted_key
from demo.standin_comfyui.wire import Request, Response

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]


def times(factor: int) -> settings:
    """More examples than the profile has, for tests whose examples take milliseconds."""
    return settings(max_examples=factor * settings.default.max_examples)


DOCUMENTED_CODES = (0, 1, 2, 3, 4, 5, 6)
TOO_LONG_S = 30.0
"""For one example, with the timeouts below; on a loaded machine, too."""

# JSON that Python's parser accepts, or that only looks like it.
NUMBERS = [0, -1, 0.5, 1e308, 10**400, -(10**400), 2**63, float("nan"), float("inf"), float("-inf"), True]
TEXTS = ["", "3", "a\x1b[31m\nb", "\ud800", "\udfff.png", "\u202e", "x" * 5000, "../../etc/passwd", "\0", "a.png", "a b/\u732b.png"]
scalars = st.none() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4), max_leaves=8
)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


deep_values = values | st.integers(1, 900).map(nested)


@dataclass(frozen=True)
class Tamper:
    """A change of some answers: those on `route`, from number `after` on, `times` of them (None: all)."""

    route: str
    after: int
    times: int | None
    change: Callable[[Response], Response]


def replaced(path: tuple[int, ...], value: Any) -> Callable[[Response], Response]:
    """A change that replaces the part of a JSON answer to which `path` leads by `value`."""

    def change(response: Response) -> Response:
        try:
            content = json.loads(response.body)
        except ValueError:
            return replace(response, body=json.dumps(value).encode())
        holder: Any = [content]
        key: Any = 0
        for number in path:
            if not isinstance(holder[key], dict | list) or not holder[key]:
                break
            holder = holder[key]
            key = list(holder)[number % len(holder)] if isinstance(holder, dict) else number % len(holder)
        root = [value] if key == 0 and not path else [content]
        holder[key] = value
        return replace(response, body=json.dumps(root[0]).encode())

    return change


def refused() -> Callable[[Response], Response]:
    def change(_response: Response) -> Response:
        raise ConnectionAbortedError

    return change


header_values = st.sampled_from(
    ["", "gzip", "0", "-1", "99999999999999999999", "chunked", "file:///etc/passwd", "//h\u00e4:x@[::1"]
)
changes = st.one_of(
    st.builds(replaced, st.lists(st.integers(0, 9), max_size=8).map(tuple), deep_values),
    st.builds(
        lambda status, body, kind, headers: lambda _: Response(status, body, kind, headers),
        st.sampled_from([200, 204, 206, 301, 302, 304, 307, 400, 401, 404, 413, 429, 500, 502, 503, 599, 999]),
        st.sampled_from([b"", b"{}", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"9" * 5000, png()[:50], png()])
        | deep_values.map(lambda value: json.dumps(value).encode()),
        st.sampled_from([None, "application/json", "APPLICATION/JSON;charset=x", "text/html\x1b[31m", "image/png"]),
        st.dictionaries(
            st.sampled_from(["Location", "Content-Encoding", "Content-Length", "Transfer-Encoding", "Set-Cookie", "Retry-After"]),
            header_values,
            max_size=2,
        ),
    ),
    st.builds(refused),
)
ROUTES = [
    "/system_stats",
    "/upload/image",
    "/prompt",
    "/history/",
    "/queue",
    "/view",
    "/object_info",
    "/node_replacements",
    "/free",
    "/",
]
tampers = st.lists(
    st.builds(Tamper, st.sampled_from(ROUTES), st.integers(0, 2), st.none() | st.integers(1, 3), changes), min_size=1, max_size=3
)


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch):
    for name, value in {
        "collecting.http.RETRY_DELAYS_S": (0.01,),
        "collecting.http.READ_TIMEOUT_S": 0.5,
        "collecting.http.BODY_TIMEOUT_S": 1.0,
        "collecting.worker.RECONNECT_TIMEOUT_S": 0.2,
        "collecting.worker.UNCONFIRMED_S": 0.05,
        "collecting.monitor.SILENCE_TIMEOUT_S": 0.5,
        "collecting.monitor.MIN_RECONNECT_DELAY_S": 0.05,
    }.items():
        monkeypatch.setattr(name, value)


NUMBER_OF_RUN = itertools.count()


@given(tampered=tampers, flags=st.sampled_from([(), (), (), ("--check",)]))
def test_a_run_ends_with_success_or_a_documented_exit_code(space, standin, collect, tampered, flags):
    number = next(NUMBER_OF_RUN)
    space.per_batch([{"prompt": f"run {number}", "seed": each} for each in range(2)])
    seen = [0] * len(tampered)
    real = type(standin).answer

    def answer(request: Request) -> Response:
        response = real(standin, request)
        for index, tamper in enumerate(tampered):
            if request.path.startswith(tamper.route) and request.path != "/ws":
                seen[index] += 1
                if tamper.after < seen[index] <= tamper.after + (tamper.times or 10**9):
                    response = tamper.change(response)
        return response

    standin.answer = answer
    began_s = time.monotonic()
    result = collect(*flags, DATASET_DIR=str(space.root / f"run{number}"), COMFYUI_STALL_TIMEOUT="1")
    assert result.code in DOCUMENTED_CODES, result.err
    assert "Traceback" not in result.out + result.err
    assert "because of a bug" not in result.out
    assert time.monotonic() - began_s < TOO_LONG_S
    assert all(character.isprintable() or character in "\n\r" for character in result.out + result.err)


class RawServer(socketserver.ThreadingTCPServer):
    """Sends `content` in answer to whatever is sent, and closes the connection."""

    allow_reuse_address = daemon_threads = True
    content = b""

    def handle_error(self, *_about: object) -> None:
        """A client that does not read to the end is not an error."""


class _RawHandler(socketserver.StreamRequestHandler):
    server: RawServer

    def handle(self) -> None:
        key = ""
        length = 0
        while (line := self.rfile.readline().strip()) != b"":
            name, _, value = line.decode("latin-1").partition(":")
            key = value.strip() if name.lower() == "sec-websocket-key" else key
            length = int(value) if name.lower() == "content-length" else length
        self.rfile.read(length)
        with contextlib.suppress(OSError):
            self.wfile.write(self.server.content.replace(b"<ACCEPT>", accepted_key(key).encode()))


@pytest.fixture(scope="module")
def raw() -> Iterator[RawServer]:
    with RawServer(("127.0.0.1", 0), _RawHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


CALLS: dict[str, Callable[[ComfyUI], Any]] = {
    "version": lambda client: client.version(),
    "object_info": lambda client: client.object_info(),
    "upload": lambda client: client.upload("face.png", b"face"),
    "submit": lambda client: client.submit({"1": {}}, "id"),
    "history": lambda client: client.history("id"),
    "queue": lambda client: client.queue(),
    "dequeue": lambda client: client.dequeue(["id"]),
    "free_memory": lambda client: client.free_memory(),
    "view": lambda client: client.view("a.png", "", "output"),
}
header_lines = st.sampled_from(
    [
        b"Content-Type: application/json",
        b"Content-Type: \xff\x1b[31m",
        b"Content-Length: -5",
        b"Content-Length: 2",
        b"Content-Length: 2, 3",
        b"Content-Length: 99999999999999999999999",
        b"Content-Length: \xb2",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Content-Encoding: gzip",
        b"Content-Encoding: deflate, br, zstd, x",
        b"Content-Encoding: gzip, gzip, gzip, gzip, gzip, gzip, gzip",
        b"Connection: close",
        b"Connection: keep-alive, upgrade",
        b"Location: file:///etc/passwd",
        b"Location: http://user:secret@[::1/%ff",
        b"Location: \xff\xfe",
        b"Location: //other.example/\x1b[31m",
        b"Set-Cookie: a=\xff; Expires=Thu, 99 Foo 99999999999 99:99:99 GMT; Max-Age=9e999",
        b"Set-Cookie: =; Domain=.; Path=\x00",
        b" folded",
        b"no colon",
        b": no name",
        b"X-Long: " + b"x" * 70_000,
        b"\r",
    ]
) | st.binary(max_size=12)
raw_bodies = st.one_of(
    st.sampled_from(
        [b"", b"{}", b'{"system": {"comfyui_version": "\\ud800"}}', b"[" * 5000, b'{"prompt_id": 1e999}', b"{" * 70_000]
    ),
    st.sampled_from([b"0\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"-2\r\n{}", b"ffffffffffffffffffff\r\n{}", b"2;" + b"x" * 70_000]),
    st.sampled_from([gzip.compress(b"{}"), gzip.compress(b"{}")[:-5], gzip.compress(gzip.compress(b" " * 10**6))]),
    st.binary(max_size=40),
)
STATUSES = (200, 200, 200, 200, 100, 101, 102, 204, 301, 302, 400, 401, 404, 500, 503, 999)
status_lines = st.sampled_from([b"HTTP/1.1 %d x" % status for status in STATUSES]) | st.sampled_from(
    [
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK",
        b"HTTP/9.9 200 OK",
        b"HTTP/1.1 \xb2\xb2\xb2 OK",
        b"HTTP/1.1",
        b"ICY 200 OK",
        b"",
    ]
)


@times(20)
@example(status=b"HTTP/1.1 302 Found", headers=[b"Location: file:///etc/passwd"], body=b"", call="queue")
@example(status=b"HTTP/1.1 302 Found", headers=[b"Location: \xff\xfe"], body=b"", call="queue")
@example(status=b"HTTP/1.1 200 OK", headers=[b"Transfer-Encoding: chunked"], body=b"-2\r\n{}", call="queue")
@example(status=b"HTTP/1.1 200 OK", headers=[b"x: y"] * 200, body=b"{}", call="queue")
@given(status=status_lines, headers=st.lists(header_lines, max_size=5), body=raw_bodies, call=st.sampled_from(sorted(CALLS)))
def test_every_response_is_a_value_or_an_error_of_comfyui(raw, status, headers, body, call):
    raw.content = b"\r\n".join([status, *headers, b"", body])
    began_s, message = time.monotonic(), ""
    with ComfyUI(Address(f"http://127.0.0.1:{raw.server_address[1]}"), "client", retry_delays_s=()) as client:
        try:
            CALLS[call](client)
        except ComfyUIError as error:
            message = str(error)
    assert all(character.isprintable() or character == "\n" for character in message)
    assert len(message) < 5000
    assert "secret" not in message
    assert time.monotonic() - began_s < TOO_LONG_S


KINDS = [
    "status",
    "executing",
    "progress",
    "progress_state",
    "executed",
    "execution_cached",
    "execution_success",
    "execution_start",
]
messages = st.builds(
    lambda kind, data: json.dumps({"type": kind, "data": data}),
    st.sampled_from(KINDS) | scalars,
    st.dictionaries(
        st.sampled_from(["node", "value", "max", "nodes", "output", "prompt_id"]),
        deep_values | st.dictionaries(st.just("images"), deep_values, max_size=1) | st.sampled_from(["3", "9"]),
        max_size=4,
    )
    | values,
) | st.sampled_from(["{", "9" * 5000, "[" * 100_000, "null"])


@pytest.fixture(scope="module")
def plan() -> Plan:
    graph, config = workflow("full_workflow_no_model.json"), workflow("full_workflow_no_model.config.json")
    return Plan(parse_workflow(graph, config, []), (), (), None, False)


@times(20)
@example(sent=[json.dumps({"type": "progress", "data": {"value": 10**400, "max": 1}})])
@example(sent=[json.dumps({"type": "progress", "data": {"value": float("nan"), "max": float("inf")}})])
@given(sent=st.lists(messages, min_size=1, max_size=6))
def test_every_message_can_be_displayed(plan, capsys, monkeypatch, sent):
    monkeypatch.setattr("collecting.monitor.LINE_INTERVAL_S", 0.0)
    monitor = WebsocketMonitor(Address("http://host"), "client", threading.Event())
    with Display(plan, 1) as display:
        for message in sent:
            monitor._on_message(message)
            display.update([monitor])
    shown = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in shown)


def frame(code: int, content: bytes, final: bool, bits: int, length: int | None) -> bytes:
    """A websocket frame of the server; `length` differs from that of the content if the frame lies about it."""
    stated = len(content) if length is None else length
    size = bytes([stated]) if stated < 126 else b"\x7e" + stated.to_bytes(2) if stated < 2**16 else b"\x7f" + stated.to_bytes(8)
    return bytes([0x80 * final | bits << 4 | code]) + size + content


frames = st.builds(
    frame,
    st.sampled_from([0, 1, 1, 1, 2, 8, 9, 10, 11]),
    messages.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=130),
    st.booleans(),
    st.sampled_from([0, 0, 0, 0, 1, 4]),
    st.none() | st.sampled_from([0, 5, 127, 2**16, 2**40, 2**64 - 1]),
)
handshakes = st.just(b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: <ACCEPT>") | st.lists(
    header_lines, max_size=4
).map(b"\r\n".join)


class Once(threading.Event):
    """Set when it is waited for: `listen` ends after its first connection."""

    def wait(self, _timeout: float | None = None) -> bool:
        self.set()
        return True


@times(10)
@given(
    status=st.just(b"HTTP/1.1 101 Switching Protocols") | status_lines,
    headers=handshakes,
    sent=st.lists(frames, max_size=4),
)
def test_every_websocket_ends_without_an_error(plan, raw, status, headers, sent):
    raw.content = b"\r\n".join([status, headers, b"", b"".join(sent)])
    stopping = Once()
    monitor = WebsocketMonitor(Address(f"http://127.0.0.1:{raw.server_address[1]}"), "client", stopping)
    began_s = time.monotonic()
    monitor.listen()
    with Display(plan, 1) as display:
        display.update([monitor])
    assert time.monotonic() - began_s < TOO_LONG_S
