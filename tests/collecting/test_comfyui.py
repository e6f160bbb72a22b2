"""The client: what it sends, what it takes for an answer, and one clear line for everything else."""

import socket

import pytest
from comfyui_workspace import png, recorded

from collecting.client import ComfyUI, ImageGone, PromptRefused, Unanswered
from collecting.http import Address, addresses
from common.errors import ComfyUIError, SettingsError
from demo.standin_comfyui.wire import Answer

HTML = Answer(200, b"<html>please log in</html>", "text/html")


@pytest.fixture
def client(standin):
    with ComfyUI(Address(standin.url), "client", (0.0, 0.0)) as client:
        yield client


@pytest.fixture
def answers(standin, monkeypatch):
    """Let the stand-in give these answers, one after the other; returns what was asked."""

    def give(*given):
        left, asked = list(given), []

        def answer(request):
            asked.append(request)
            following = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(following, Exception):
                raise following
            return following

        monkeypatch.setattr(standin, "answer", answer)
        return asked

    return give


def graph_of(name: str) -> dict:
    return next(each["request"]["json"]["prompt"] for each in recorded("prompt.json") if each["name"] == name)


def test_submission_carries_our_ids_and_no_origin(client, answers):
    asked = answers(Answer(200, b'{"prompt_id": "own", "number": 1, "node_errors": {}}', "application/json"))
    queued = client.submit({"1": {}}, "own")
    assert (queued.prompt_id, queued.dropped) == ("own", [])
    assert asked[0].json() == {"prompt": {"1": {}}, "client_id": "client", "prompt_id": "own"}
    assert "Origin" not in asked[0].headers


def test_address_may_have_a_path(standin, answers):
    asked = answers(Answer(200, b'{"system": {"comfyui_version": "1"}}', "application/json"))
    with ComfyUI(*addresses(f"{standin.url}/some/path/"), "client") as client:
        assert client.version() == "1"
    assert asked[0].path == "/some/path/system_stats"


def test_name_that_the_server_returns_is_the_one_to_use(standin, client, answers):
    assert client.upload("face.png", png()) == "face.png"
    assert client.upload("face.png", png()) == "face.png"
    assert client.upload("face.png", png((1, 2, 3))) == "face (1).png"
    answers(Answer(200, b'{"name": "f.png", "subfolder": "a b/c", "type": "input"}', "application/json"))
    assert client.upload("face.png", png()) == "a b/c/f.png"


def test_history_is_none_until_there_is_an_entry(standin, client):
    graph = graph_of("ok_minimal")
    assert client.history("0b5c") is None
    standin.worker.seconds_per_job = 0.2
    client.submit(graph, "0b5c")

    def queued() -> set[str]:
        queue = client.queue()  # asked once: between two answers a prompt may begin
        return queue.running | queue.waiting

    assert queued() == {"0b5c"}
    assert client.history("0b5c") is None
    while queued():
        pass
    assert client.history("0b5c")["status"]["status_str"] == "success"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "loadimage_missing_file",
            "node 16 (LoadImage): Custom validation failed for node: image - Invalid image file: not_there.png",
        ),
        ("sampler_seed_minus_1", "node 3 (KSampler): Value -1 smaller than min of 0: seed"),
        ("bad_unknown_class", "node IPAdapterUnifiedLoader does not exist. Node ID '#1'"),
        ("bad_no_outputs", "Prompt has no outputs"),
    ],
)
def test_refused_workflow_says_node_class_input_and_wish(client, name, words):
    with pytest.raises(PromptRefused, match="refuses the workflow") as refused:
        client.submit(graph_of(name), "id")
    assert words in str(refused.value)


def test_outputs_that_the_server_drops_are_named(client):
    queued = client.submit(graph_of("partial_one_output_invalid"), "id")
    assert queued.dropped == [
        "node 99 (LoadImage): Custom validation failed for node: image - Invalid image file: does_not_exist.png"
    ]


def test_connection_refused_asks_the_two_right_questions():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ComfyUI(Address(f"http://127.0.0.1:{port}"), "client") as client, pytest.raises(ComfyUIError) as failed:
        client.version()
    assert "is ComfyUI running" in str(failed.value)
    assert "--listen 0.0.0.0" in str(failed.value)


def test_unknown_host_is_said(monkeypatch):
    def unknown(*_arguments, **_more):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with (
        ComfyUI(Address("http://host.docker.internal:8188"), "client") as client,
        pytest.raises(ComfyUIError, match="host name is not known"),
    ):
        client.version()


@pytest.mark.parametrize("answer", [HTML, Answer(200, b"", None)])
def test_login_page_is_not_taken_for_json(client, answers, answer):
    answers(answer)
    with pytest.raises(ComfyUIError, match="instead of JSON"):
        client.history("id")


@pytest.mark.parametrize("body", [b"{", b"[]", b'"text"', b"null"])
def test_json_that_is_no_object_is_an_error_of_one_line(client, answers, body):
    answers(Answer(200, body, "application/json"))
    with pytest.raises(ComfyUIError) as failed:
        client.queue()
    assert "\n" not in str(failed.value)


def test_get_is_repeated_while_the_server_is_away(client, answers):
    away = Answer(502, b"bad gateway", "text/html")
    asked = answers(away, ConnectionAbortedError(), Answer(200, b"{}", "application/json"))
    assert client.history("id") is None
    assert len(asked) == 3


def test_get_is_given_up_in_the_end(client, answers):
    asked = answers(Answer(503, b"", None))
    with pytest.raises(ComfyUIError, match="503: it is away behind its proxy"):
        client.history("id")
    assert len(asked) == 3


@pytest.mark.parametrize("answer", [Answer(502, b"", None), Answer(504, b"", None), ConnectionAbortedError()])
def test_submission_is_never_repeated_blindly(client, answers, answer):
    asked = answers(answer)
    with pytest.raises(Unanswered):
        client.submit({}, "id")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(302, b"", None, {"Location": "https://name:pass@login.example/in?token=1"}), "on to https://login.example/in: put"),
        (Answer(302, b"", None, {"Location": "/login?next=1"}), "/login: put"),
        (Answer(401, b"", None), "wants a login"),
        (Answer(403, b"", None), "forbids it"),
        (Answer(404, b"", None), "is this ComfyUI's own address"),
        (Answer(413, b"<html>", "text/html"), "too large"),
        (Answer(500, b"", None), "the terminal in which ComfyUI runs says why"),
        (Answer(400, b"<html>", "text/html"), "does not say why"),
        (Answer(418, b"", None), "418"),
    ],
)
def test_submission_that_is_not_taken_is_explained_and_no_redirect_followed(client, answers, answer, words):
    asked = answers(answer)
    with pytest.raises(ComfyUIError) as failed:
        client.submit({}, "id")
    assert words in str(failed.value)
    assert len(asked) == 1


def test_answer_that_is_cut_off_is_not_taken_for_whole(client, answers):
    cut = Answer(200, png()[:40], "image/png", {"Content-Length": str(len(png())), "Connection": "close"})
    answers(cut, cut, Answer(200, png(), "image/png"))
    assert client.view("a.png", "", "output") == png()
    answers(cut)
    with pytest.raises(ImageGone, match="less than it announces"):
        client.view("a.png", "", "output")


def test_file_that_is_gone_is_told_from_a_server_that_is(client):
    with pytest.raises(ImageGone, match=r"'a\.png'"):
        client.view("a.png", "", "output")


def test_password_in_the_address_is_in_no_message():
    with ComfyUI(*addresses("http://me:hush@127.0.0.1:9/deep"), "client") as client, pytest.raises(ComfyUIError) as failed:
        client.version()
    assert "hush" not in str(failed.value)
    assert "http://127.0.0.1:9/deep" in str(failed.value)


@pytest.mark.parametrize("url", ["http://", "http://:8188", "http://[::1", "http://host:port", "http://host:99999"])
def test_what_is_no_address_is_a_wrong_setting(url):
    with pytest.raises(SettingsError, match="COMFYUI_ENDPOINT"):
        addresses(url)
