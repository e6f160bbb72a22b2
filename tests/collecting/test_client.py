"""The client: what it sends, which answers it accepts, and an error of one line for everything else."""

import socket

import pytest
from comfyui_workspace import png, recorded

from collecting.client import ComfyUI, ImageGone, PromptRejected, SubmissionUnconfirmed
from collecting.http import Address, parse_addresses
from common.errors import ComfyUIError, SettingsError
from demo.standin_comfyui.wire import Response

PROMPT_ID = "0b5c0000-0000-4000-8000-000000000000"
HTML = Response(200, b"<html>please log in</html>", "text/html")


@pytest.fixture
def client(standin):
    with ComfyUI(Address(standin.url), "client", (0.0, 0.0)) as client:
        yield client


@pytest.fixture
def answers(standin, monkeypatch):
    """Let the stand-in give these answers one after the other, the last one repeatedly; returns the requests."""

    def give(*responses):
        left, received = list(responses), []

        def answer(request):
            received.append(request)
            following = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(following, Exception):
                raise following
            return following

        monkeypatch.setattr(standin, "answer", answer)
        return received

    return give


def graph_of(name: str) -> dict:
    return next(each["request"]["json"]["prompt"] for each in recorded("prompt.json") if each["name"] == name)


def test_submission_carries_our_ids_and_no_origin(client, answers):
    received = answers(Response(200, b'{"prompt_id": "own", "number": 1, "node_errors": {}}', "application/json"))
    queued = client.submit({"1": {}}, "own")
    assert (queued.prompt_id, queued.dropped) == ("own", [])
    assert received[0].json() == {"prompt": {"1": {}}, "client_id": "client", "prompt_id": "own"}
    assert "Origin" not in received[0].headers


def test_address_may_contain_a_path(standin, answers):
    received = answers(Response(200, b'{"system": {"comfyui_version": "1"}}', "application/json"))
    with ComfyUI(*parse_addresses(f"{standin.url}/some/path/"), "client") as client:
        assert client.version() == "1"
    assert received[0].path == "/some/path/system_stats"


def test_upload_returns_the_name_that_the_server_chose(standin, client, answers):
    assert client.upload("face.png", png()) == "face.png"
    assert client.upload("face.png", png()) == "face.png"
    assert client.upload("face.png", png((1, 2, 3))) == "face (1).png"
    answers(Response(200, b'{"name": "f.png", "subfolder": "a b/c", "type": "input"}', "application/json"))
    assert client.upload("face.png", png()) == "a b/c/f.png"


def test_history_is_none_until_there_is_an_entry(standin, client):
    graph = graph_of("ok_minimal")
    assert client.history(PROMPT_ID) is None
    standin.worker.seconds_per_job = 0.2
    client.submit(graph, PROMPT_ID)

    def queued() -> set[str]:
        queue = client.queue()  # requested once: between two requests a prompt may start
        return queue.running | queue.waiting

    assert queued() == {PROMPT_ID}
    assert client.history(PROMPT_ID) is None
    while queued():
        pass
    assert client.history(PROMPT_ID)["status"]["status_str"] == "success"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "loadimage_missing_file",
            "node 16 (LoadImage): Custom validation failed for node: image - Invalid image file: not_there.png",
        ),
        ("sampler_seed_minus_1", "node 3 (KSampler): Value -1 smaller than min of 0: seed"),
        ("bad_unknown_class", "Node 'IPAdapterUnifiedLoader' not found. The custom node may not be installed. Node ID '#1'"),
        ("bad_no_outputs", "Prompt has no outputs"),
    ],
)
def test_rejected_workflow_names_node_class_input_and_expected_value(client, name, words):
    with pytest.raises(PromptRejected, match="rejected the workflow") as rejected:
        client.submit(graph_of(name), PROMPT_ID)
    assert words in str(rejected.value)


def test_outputs_that_the_server_drops_are_named(client):
    queued = client.submit(graph_of("partial_one_output_invalid"), PROMPT_ID)
    assert queued.dropped == [
        "node 99 (LoadImage): Custom validation failed for node: image - Invalid image file: does_not_exist.png"
    ]


def test_refused_connection_names_both_likely_causes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ComfyUI(Address(f"http://127.0.0.1:{port}"), "client") as client, pytest.raises(ComfyUIError) as failed:
        client.version()
    assert "is ComfyUI running" in str(failed.value)
    assert "--listen 0.0.0.0" in str(failed.value)


def test_unknown_host_is_named(monkeypatch):
    def unknown(*_arguments, **_more):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with (
        ComfyUI(Address("http://host.docker.internal:8188"), "client") as client,
        pytest.raises(ComfyUIError, match="unknown host name"),
    ):
        client.version()


@pytest.mark.parametrize("answer", [HTML, Response(200, b"", None)])
def test_login_page_is_not_read_as_json(client, answers, answer):
    answers(answer)
    with pytest.raises(ComfyUIError, match="instead of JSON"):
        client.history("id")


@pytest.mark.parametrize("body", [b"{", b"[]", b'"text"', b"null"])
def test_json_that_is_not_an_object_is_an_error_of_one_line(client, answers, body):
    answers(Response(200, body, "application/json"))
    with pytest.raises(ComfyUIError) as failed:
        client.queue()
    assert "\n" not in str(failed.value)


def test_get_is_repeated_while_the_server_is_unavailable(client, answers):
    away = Response(502, b"bad gateway", "text/html")
    received = answers(away, ConnectionAbortedError(), Response(200, b"{}", "application/json"))
    assert client.history("id") is None
    assert len(received) == 3


def test_get_fails_after_the_last_attempt(client, answers):
    received = answers(Response(503, b"", None))
    with pytest.raises(ComfyUIError, match="503: a proxy reports that ComfyUI is unavailable"):
        client.history("id")
    assert len(received) == 3


@pytest.mark.parametrize("answer", [Response(502, b"", None), Response(504, b"", None), ConnectionAbortedError()])
def test_submission_is_never_repeated_blindly(client, answers, answer):
    received = answers(answer)
    with pytest.raises(SubmissionUnconfirmed):
        client.submit({}, "id")
    assert len(received) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            Response(302, b"", None, {"Location": "https://name:pass@login.example/in?token=1"}),
            "/prompt to https://login.example/in: set COMFYUI_ENDPOINT",
        ),
        (Response(302, b"", None, {"Location": "/login?next=1"}), "/login: set"),
        (Response(401, b"", None), "login required"),
        (Response(403, b"", None), "forbidden"),
        (Response(404, b"", None), "check that COMFYUI_ENDPOINT is ComfyUI's own address"),
        (Response(413, b"<html>", "text/html"), "too large"),
        (Response(500, b"", None), "internal error; check ComfyUI's console"),
        (Response(400, b"<html>", "text/html"), "gives no reason"),
        (Response(418, b"", None), "418"),
    ],
)
def test_refused_submission_is_explained_and_redirects_are_not_followed(client, answers, answer, words):
    received = answers(answer)
    with pytest.raises(ComfyUIError) as failed:
        client.submit({}, "id")
    assert words in str(failed.value)
    assert len(received) == 1


def test_truncated_response_is_not_accepted(client, answers):
    cut = Response(200, png()[:40], "image/png", {"Content-Length": str(len(png())), "Connection": "close"})
    answers(cut, cut, Response(200, png(), "image/png"))
    assert client.view("a.png", "", "output") == png()
    answers(cut)
    with pytest.raises(ImageGone, match="truncated response"):
        client.view("a.png", "", "output")


def test_missing_file_is_an_error_of_its_own(client):
    with pytest.raises(ImageGone, match=r"'a\.png'"):
        client.view("a.png", "", "output")


def test_password_in_the_address_is_not_in_messages():
    with ComfyUI(*parse_addresses("http://me:hush@127.0.0.1:9/deep"), "client") as client, pytest.raises(ComfyUIError) as failed:
        client.version()
    assert "hush" not in str(failed.value)
    assert "http://127.0.0.1:9/deep" in str(failed.value)


@pytest.mark.parametrize("url", ["http://", "http://:8188", "http://[::1", "http://host:port", "http://host:99999"])
def test_invalid_address_is_a_wrong_setting(url):
    with pytest.raises(SettingsError, match="COMFYUI_ENDPOINT"):
        parse_addresses(url)
