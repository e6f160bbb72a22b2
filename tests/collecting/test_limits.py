"""A server that never finishes, floods or lies about sizes: every request and every message has a limit."""

import contextlib
import gzip
import json
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import trustme
from comfyui_workspace import png

from collecting.client import ComfyUI
from collecting.http import Address
from collecting.monitor import WebsocketMonitor
from common.errors import ComfyUIError
from demo.standin_comfyui.websockets import accepted_key
from demo.standin_comfyui.wire import Response, json_response

HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
DRIPS = {
    "with a length": (HEADERS + b"Content-Length: 100000\r\n\r\n", b" "),
    "without a length": (HEADERS + b"\r\n", b" "),
    "in chunks": (HEADERS + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "in the size of a chunk": (HEADERS + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "in the trailer": (HEADERS + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"x"),
    "in the status": (b"HTTP/1.1 200 ", b"O"),
    "in a header": (b"HTTP/1.1 200 OK\r\nX-A: ", b"b"),
    "in many headers": (b"HTTP/1.1 100 Continue\r\n", b"X-A: b\r\n"),
    "in 1xx responses": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "in a redirect": (b"HTTP/1.1 302 Found\r\nLocation: /other\r\n\r\n", b" "),
    "in an error": (b"HTTP/1.1 500 Error\r\n\r\n", b" "),
    "compressed": (HEADERS + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"")[:10], b"\x00"),
}


class Talker(socketserver.ThreadingTCPServer):
    """Calls `talk(send, key)` for each connection, after its request."""

    daemon_threads = True
    talk: Callable[[Callable[[bytes], None], str], None]

    @property
    def address(self) -> Address:
        return Address(f"http://127.0.0.1:{self.server_address[1]}")


class _Handler(socketserver.StreamRequestHandler):
    server: Talker

    def handle(self) -> None:
        head = b""
        while line := self.rfile.readline().strip():
            head += line + b"\n"
        key = head.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\n")[0]
        with contextlib.suppress(OSError):  # the client has given up
            self.server.talk(self.request.sendall, key.decode())


@pytest.fixture
def talker() -> Iterator[Talker]:
    with Talker(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def dripping(head: bytes, drop: bytes) -> Callable[[Callable[[bytes], None], str], None]:
    def talk(send: Callable[[bytes], None], key: str) -> None:
        send(head.replace(b"<ACCEPT>", accepted_key(key).encode()))
        for _ in range(1000):
            send(drop)
            time.sleep(0.02)

    return talk


@pytest.mark.parametrize("drip", DRIPS)
def test_a_response_that_drips_ends_in_time(talker, monkeypatch, drip):
    monkeypatch.setattr("collecting.http.BODY_TIMEOUT_S", 0.3)
    talker.talk = dripping(*DRIPS[drip])
    began_s = time.monotonic()
    with ComfyUI(talker.address, "client", retry_delays_s=(0.0, 0.0)) as client, pytest.raises(ComfyUIError, match="in time"):
        client.queue()
    assert time.monotonic() - began_s < 5


def test_a_response_over_tls_that_drips_ends_in_time(talker, monkeypatch, tmp_path):
    monkeypatch.setattr("collecting.http.BODY_TIMEOUT_S", 0.5)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "")
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    talker.socket = context.wrap_socket(talker.socket, server_side=True)
    talker.talk = dripping(*DRIPS["without a length"])
    address = Address(f"https://127.0.0.1:{talker.server_address[1]}", ca_bundle=tmp_path / "ca.pem")
    began_s = time.monotonic()
    with ComfyUI(address, "client", retry_delays_s=()) as client, pytest.raises(ComfyUIError, match="in time"):
        client.queue()
    assert time.monotonic() - began_s < 5


def test_the_connection_is_usable_after_a_response_that_was_cut(talker, monkeypatch):
    monkeypatch.setattr("collecting.http.BODY_TIMEOUT_S", 0.3)
    with ComfyUI(talker.address, "client", retry_delays_s=()) as client:
        talker.talk = dripping(*DRIPS["with a length"])
        with pytest.raises(ComfyUIError):
            client.queue()
        talker.talk = lambda send, _: send(HEADERS + b"Content-Length: 2\r\n\r\n{}")
        assert client.queue().running == frozenset()


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b" " * 2**26),
        b"Content-Encoding: gzip, gzip\r\n\r\n" + gzip.compress(gzip.compress(b" " * 2**26)),
        b"Content-Length: 99999999999999\r\n\r\n" + b" " * 2**22,
    ],
)
def test_a_body_that_is_too_large_is_not_read_to_its_end(talker, monkeypatch, head):
    monkeypatch.setattr("collecting.http.MAX_BODY_BYTES", 2**21)
    talker.talk = lambda send, _: send(HEADERS + head)
    with ComfyUI(talker.address, "client", retry_delays_s=()) as client, pytest.raises(ComfyUIError, match="more than 2 MiB"):
        client.queue()


def test_json_has_a_smaller_limit_than_an_image(talker, monkeypatch):
    monkeypatch.setattr("collecting.http.MAX_JSON_BYTES", 2**20)
    body = b"{" + b" " * 2**20 + b"}"
    talker.talk = lambda send, _: send(HEADERS + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    with ComfyUI(talker.address, "client", retry_delays_s=()) as client:
        assert client.view("a.png", "", "output") == body
        with pytest.raises(ComfyUIError, match="more than 1 MiB"):
            client.queue()


def test_cookies_do_not_pile_up(talker):
    cookies = b"".join(b"Set-Cookie: c%d=1\r\n" % number for number in range(40))
    asked = []

    def talk(send: Callable[[bytes], None], _key: str) -> None:
        asked.append(1)
        send(HEADERS + cookies.replace(b"c", b"c%d_" % len(asked)) + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}")

    talker.talk = talk
    with ComfyUI(talker.address, "client", retry_delays_s=()) as client:
        for _ in range(5):
            client.queue()
        assert len(client._http.session.cookies) <= 90


# The websocket.

SWITCH = b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: <ACCEPT>\r\n\r\n"


@pytest.fixture
def listen(talker, monkeypatch):
    """Listen to what the server says until the connection has failed once or twice; returns how long that took."""
    monkeypatch.setattr("collecting.monitor.SILENCE_TIMEOUT_S", 0.3)
    monkeypatch.setattr("collecting.monitor.MAX_MESSAGE_BYTES", 2**20)

    def run(talk: Callable[[Callable[[bytes], None], str], None]) -> float:
        connections, stopping = [], threading.Event()

        def count(send: Callable[[bytes], None], key: str) -> None:
            connections.append(1)
            if len(connections) > 1:
                stopping.set()
                return
            talk(send, key)

        talker.talk = count
        monkeypatch.setattr("collecting.monitor.MIN_RECONNECT_DELAY_S", 0.01)
        began_s = time.monotonic()
        WebsocketMonitor(talker.address, "client", stopping).listen()
        return time.monotonic() - began_s

    return run


ENDLESS = {
    "handshake": (b"HTTP/1.1 101 S\r\nX: ", b"x"),
    "frame": (SWITCH + b"\x81\x7f" + (2**40).to_bytes(8), b" "),
    "fragments": (SWITCH + b"\x01\x01 ", b"\x00\x01 "),
    "pings": (SWITCH, b"\x89\x01 "),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_message_that_drips_ends_in_time(listen, kind):
    assert listen(dripping(*ENDLESS[kind])) < 5


FLOODS = {
    "frame": (b"\x81\x7f" + (2**63 - 1).to_bytes(8), b" " * 2**16),
    "fragments": (b"\x01\x00", b"\x00\x7e\xff\xff" + b" " * 0xFFFF),
    "pings": (b"", (b"\x89\x7d" + b" " * 125) * 500),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_message_that_is_too_large_is_not_read_to_its_end(listen, monkeypatch, kind):
    monkeypatch.setattr("collecting.monitor.SILENCE_TIMEOUT_S", 60.0)
    head, more = FLOODS[kind]
    sent = []

    def talk(send: Callable[[bytes], None], key: str) -> None:
        send(SWITCH.replace(b"<ACCEPT>", accepted_key(key).encode()) + head)
        while len(sent) < 2000:
            send(more)
            sent.append(1)

    assert listen(talk) < 30
    assert len(sent) < 2000


def test_the_same_message_again_is_no_sign_of_work(talker):
    monitor = WebsocketMonitor(talker.address, "client", threading.Event())
    message = json.dumps({"type": "progress", "data": {"value": 1, "max": 20, "prompt_id": "p", "node": "3"}})
    monitor._on_message(message)
    first_s = monitor.last_activity_s
    monitor._on_message(message)
    assert monitor.last_activity_s == first_s > 0
    monitor._on_message(message.replace("1", "2", 1))
    assert monitor.last_activity_s > first_s


# Whole runs.


@pytest.mark.parametrize("flags", [(), ("--check",)])
@pytest.mark.parametrize("choice", ["nested", "\x1b[31m" + "euler" * 1000, 10**400, float("nan"), "\ud800"])
def test_odd_choices_of_an_input_are_shown_in_one_line(batch, standin, collect, flags, choice):
    for _ in range(800 if choice == "nested" else 0):
        choice = [choice]

    def change(response: Response) -> Response:
        classes = json.loads(response.body)
        classes["KSampler"]["input"]["required"]["sampler_name"] = [[choice] * 200, {}]
        return json_response(classes)

    tampered(standin, "/object_info", change)
    began_s = time.monotonic()
    result = collect(*flags)
    assert result.code == (4 if flags else 0)
    assert all(character.isprintable() or character == "\n" for character in result.out + result.err)
    assert len(result.err) < 3000
    assert time.monotonic() - began_s < 10


@pytest.fixture
def batch(space, monkeypatch):
    space.per_batch([{"prompt": f"number {number}", "seed": number} for number in range(3)])
    monkeypatch.setattr("collecting.http.RETRY_DELAYS_S", (0.01,))
    monkeypatch.setattr("collecting.worker.RECONNECT_TIMEOUT_S", 1.0)
    monkeypatch.setattr("collecting.worker.UNCONFIRMED_S", 0.05)
    return space


def tampered(standin, route: str, change: Callable[[Response], Response]) -> None:
    real = type(standin).answer

    def answer(request):
        response = real(standin, request)
        return change(response) if request.path.startswith(route) else response

    standin.answer = answer


@pytest.mark.parametrize("route", ["/upload/image", "/history/", "/queue"])
@pytest.mark.parametrize("status", [500, 504])
def test_a_route_that_fails_for_ever_ends_the_run_with_its_name(batch, standin, collect, route, status):
    standin.worker.seconds_per_job = 0.2
    tampered(standin, route, lambda _: Response(status, b"", None))
    began_s = time.monotonic()
    result = collect()
    assert time.monotonic() - began_s < 10
    assert result.code == 4
    assert f"answers {route}" in result.err
    assert f"with status {status}" in result.err
    assert "(trying for 1 s)" in result.err
    assert "Reconnected" not in result.out
    assert result.out.count("Trying to reconnect") == 1


def test_images_that_cannot_be_downloaded_for_ever_end_the_run(batch, standin, collect, monkeypatch):
    monkeypatch.setattr("collecting.worker.MAX_LOSSES", 10_000)
    tampered(standin, "/view", lambda _: Response(503, b"", None))
    result = collect()
    assert result.code == 4
    assert "/view has failed for 1 s without a success" in result.err


def test_prompts_that_cannot_be_submitted_for_ever_end_the_run(batch, standin, collect, monkeypatch):
    monkeypatch.setattr("collecting.worker.MAX_LOSSES", 10_000)
    standin.fault("away_503", "/prompt")
    result = collect()
    assert result.code == 4
    assert "/prompt has failed for 1 s without a success" in result.err


def test_file_name_that_cannot_be_encoded_fails_alone(batch, standin, collect):
    def change(response: Response) -> Response:
        history = json.loads(response.body)
        for entry in history.values():
            if entry["prompt"][2]["6"]["inputs"]["text"] == "number 1":
                for output in entry["outputs"].values():
                    output["images"] = [{"filename": "\ud800\x1b[31m.png", "subfolder": "", "type": "output"}]
        return json_response(history)

    tampered(standin, "/history/", change)
    result = collect()
    assert result.code == 1
    assert "no longer has the file '\ufffd\\x1b[31m.png'" in result.out
    assert len(batch.images()) == 2


@pytest.mark.parametrize(
    ("first", "last"), [(10**400, -(10**400)), (float("nan"), float("inf")), (0, float("inf")), (9, 1), (True, "x")]
)
def test_times_that_cannot_be_are_no_times(batch, standin, collect, first, last):
    def change(response: Response) -> Response:
        history = json.loads(response.body)
        for entry in history.values():
            times = [["execution_start", {"timestamp": first}], ["execution_success", {"timestamp": last}]]
            entry["status"]["messages"] = times
        return json_response(history)

    tampered(standin, "/history/", change)
    assert collect().code == 0
    assert len(batch.images()) == 3


def test_a_bug_in_the_display_does_not_end_the_run(batch, standin, collect, monkeypatch):
    standin.worker.seconds_per_job = 0.1

    def fail(*_arguments: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("collecting.monitor._next_status", fail)
    result = collect()
    assert result.code == 0
    assert "is not shown any more, because of a bug in LoRACat (TypeError('a bug'))" in result.out
    assert len(batch.images()) == 3


def test_image_is_not_stored_under_a_name_of_the_server(batch, standin, collect):
    tampered(standin, "/view", lambda response: Response(200, png((1, 2, 3)), "image/png", {"Content-Disposition": "a/../b"}))
    assert collect().code == 0
    assert [name for name in batch.images() if not name.startswith("node")] == []
