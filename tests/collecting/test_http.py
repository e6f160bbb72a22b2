"""Paths, logins, tokens and certificates on the way to ComfyUI; secrets are shown nowhere."""

import json
import time

import pytest
import trustme

from collecting.http import parse_addresses
from common.errors import SettingsError
from demo.standin_comfyui.server import StandIn

TOKEN = "hush-hush-token"
PASSWORD = "nine lives@home"


@pytest.fixture
def batch(space):
    space.per_batch([{"prompt": "a woman", "seed": 1}])
    return space


@pytest.fixture
def certificates(tmp_path):
    """A certificate with key for 127.0.0.1, and the authority that signed it, as PEM files."""
    authority = trustme.CA()
    server, ca = tmp_path / "server.pem", tmp_path / "ca.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(server)
    authority.cert_pem.write_to_path(ca)
    return server, ca


def socket_requests(standin: StandIn) -> list[dict[str, str]]:
    """The headers of the requests that opened a websocket, once there are some."""
    deadline = time.monotonic() + 5
    while not (found := [headers for headers in standin.request_headers if headers.get("Upgrade") == "websocket"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_headers_are_sent_with_every_request_and_the_websocket(batch, standin, collect):
    standin.worker.seconds_per_job = 0.2
    standin.required_headers = {"Authorization": f"Bearer {TOKEN}", "CF-Access-Client-Id": "me"}
    assert collect(COMFYUI_HEADERS=json.dumps(standin.required_headers)).code == 0
    assert len(batch.images()) == 1
    assert socket_requests(standin)[0]["Authorization"] == f"Bearer {TOKEN}"


def test_user_and_password_in_the_endpoint_are_sent_as_basic_auth(batch, standin, collect):
    standin.required_headers = {"Authorization": "Basic Y2F0Om5pbmUgbGl2ZXNAaG9tZQ=="}
    url = standin.url.replace("//", "//cat:nine%20lives%40home@")
    assert collect(COMFYUI_ENDPOINT=url).code == 0
    assert len(batch.images()) == 1


def test_netrc_does_not_replace_the_token(batch, standin, collect, tmp_path):
    standin.required_headers = {"Authorization": f"Bearer {TOKEN}"}
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password else\n")
    assert collect(NETRC=str(tmp_path / "netrc"), COMFYUI_HEADERS=json.dumps(standin.required_headers)).code == 0


def test_endpoint_with_a_path(batch, standin, collect):
    standin.worker.seconds_per_job = 0.2
    standin.base_path = "/deep/comfy"
    assert collect(COMFYUI_ENDPOINT=f"{standin.url}/deep/comfy/").code == 0
    assert ("GET", "/ws") in standin.requests
    wrong = collect(COMFYUI_ENDPOINT=standin.url, NEW_SEEDS="1")
    assert wrong.code == 4
    assert "/login: set COMFYUI_ENDPOINT to the final address" in wrong.err


def test_requests_have_no_origin(batch, standin, collect):
    standin.worker.seconds_per_job = 0.2
    assert collect().code == 0
    assert socket_requests(standin)
    assert not [headers for headers in standin.request_headers if "Origin" in headers]


def test_self_signed_certificate(batch, collect, certificates, tmp_path, monkeypatch):
    certificate, authority = certificates
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "")
    with StandIn(tmp_path / "tls", certificate=certificate, seconds_per_job=0.2) as server:
        refused = collect(COMFYUI_ENDPOINT=server.url)
        assert refused.code == 4
        assert "COMFYUI_CA_BUNDLE" in refused.err
        assert collect(COMFYUI_ENDPOINT=server.url, COMFYUI_CA_BUNDLE=str(authority)).code == 0
        assert ("GET", "/ws") in server.requests
        assert len(batch.images()) == 1


def test_missing_certificate_file_is_a_wrong_setting(batch, collect):
    result = collect(COMFYUI_CA_BUNDLE=str(batch.root / "absent.pem"))
    assert result.code == 2
    assert "comfyui_ca_bundle: there is no file" in result.err


@pytest.mark.parametrize(
    "headers",
    [
        "Bearer hush",
        "[]",
        '{"a": 1}',
        '{"a": "b\\nc"}',
        '{"a": "\\u732b"}',
        '{"a b": "c"}',
        '{"": "c"}',
        '{"a": " b"}',
        "[" * 100000,
    ],
)
def test_invalid_headers_are_a_wrong_setting_and_not_shown(batch, collect, headers):
    result = collect(COMFYUI_HEADERS=headers)
    assert result.code == 2
    assert "comfyui_headers: must be a JSON object" in result.err
    assert "hush" not in result.err


@pytest.mark.parametrize("name", ["Content-Length", "transfer-encoding", "CONTENT-TYPE", "Host", "Connection"])
def test_framing_headers_are_refused(batch, standin, collect, name):
    result = collect(COMFYUI_HEADERS=json.dumps({"X-Token": TOKEN, name: "5"}))
    assert result.code == 2
    assert f"comfyui_headers: {name} is set by the HTTP client for each request; remove it" in result.err
    assert TOKEN not in result.err
    assert standin.requests == []


@pytest.mark.parametrize(
    ("flags", "variables", "code"),
    [
        ((), {}, 0),
        (("--check",), {}, 0),
        ((), {"COMFYUI_WORKFLOW": "absent.json"}, 2),
        ((), {"COMFYUI_ENDPOINT": "http://cat:nine%20lives%40home@127.0.0.1:9"}, 4),
        ((), {"COMFYUI_ENDPOINT": "http://cat:nine%20lives%40home@127.0.0.1:99999"}, 2),
        ((), {"COMFYUI_ENDPOINT": "ftp://cat:nine%20lives%40home@127.0.0.1"}, 2),
        ((), {"COMFYUI_ENDPOINT": "http://cat:nine%20lives%40home@127.0.0.1:9/?token=hush-hush-token"}, 2),
    ],
)
def test_secrets_are_neither_logged_nor_stored(batch, standin, collect, flags, variables, code):
    url = standin.url.replace("//", "//cat:nine%20lives%40home@")
    standin.fault("image_empty", times=1)
    headers = json.dumps({"X-Token": TOKEN})
    result = collect(*flags, **{"COMFYUI_ENDPOINT": url, "COMFYUI_HEADERS": headers} | variables)
    assert result.code == code
    files = [path.read_bytes() for path in batch.dataset.rglob("*") if path.is_file()]
    for secret in (TOKEN, PASSWORD, "nine%20lives", "Y2F0Om5pbmUgbGl2ZXNAaG9tZQ"):
        assert secret not in result.out + result.err
        assert not [content for content in files if secret.encode() in content]


def test_settings_are_listed_without_the_secrets(batch, standin, collect, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        collect("--settings", COMFYUI_ENDPOINT="http://cat:pass@host,http://two:word@other", COMFYUI_HEADERS='{"X-Token": "hush"}')
    shown = capsys.readouterr().out
    assert "comfyui_endpoint = 'http://***@host,http://***@other'" in shown
    assert "comfyui_headers = 'set'" in shown
    assert "hush" not in shown


def test_endpoint_may_list_several_addresses():
    found = parse_addresses(" http://one:8188/, https://me:too@two/path,http://one:8188", '{"X-A": "b"}')
    assert [each.url for each in found] == ["http://one:8188", "https://two/path"]
    assert [each.websocket_url for each in found] == ["ws://one:8188/ws", "wss://two/path/ws"]
    assert [each.headers for each in found] == [{"X-A": "b"}, {"Authorization": "Basic bWU6dG9v", "X-A": "b"}]
    assert "bWU6dG9v" not in repr(found)


@pytest.mark.parametrize("endpoint", ["", " , ", "http://host?token=x", "http://host/#x", "http://host,http://"])
def test_invalid_endpoint_is_refused(endpoint):
    with pytest.raises(SettingsError, match="comfyui_endpoint"):
        parse_addresses(endpoint)


@pytest.mark.parametrize("flags", [(), ("--check",)])
@pytest.mark.parametrize("host", ["192.168..1", "my..host", ".", ".host", f"{'a' * 80}.local", "\u732b..host"])
def test_invalid_host_name_is_a_wrong_setting(batch, collect, flags, host):
    result = collect(*flags, COMFYUI_ENDPOINT=f"http://me:hush@{host}:8188")
    assert result.code == 2
    assert f"comfyui_endpoint: http://{host}:8188: invalid host name" in result.err
    assert "hush" not in result.err


@pytest.mark.parametrize("host", ["host", "host.local.", "my_host", "b\u00fccher.example", "[::1]", f"{'a' * 63}.local"])
def test_unusual_host_names_are_valid(host):
    assert [each.url for each in parse_addresses(f"http://{host}:8188")] == [f"http://{host}:8188"]
