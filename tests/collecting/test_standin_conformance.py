"""The stand-in gives the answers recorded from ComfyUI: status, shape, and every value that is deterministic.

Each test runs in both modes. Of 0.33.0 only what differs from 0.3.64 was recorded.
"""

import base64
import io
import json
import re
import time
from typing import Any

import pytest
import requests
import websocket
from comfyui_workspace import png, recorded
from PIL import Image

from demo.standin_comfyui.catalogue import VERSIONS
from demo.standin_comfyui.server import StandIn

VOLATILE = {"number", "timestamp", "create_time", "traceback", "current_inputs", "current_outputs", "executed", "is_changed"}
SUBSETS = {"sampler_name", "scheduler"}
"""Choices of which the stand-in has fewer than ComfyUI."""
UNCOMPARED = (
    "tooltip",
    "description",
    "output_tooltips",
    "search_aliases",
    "essentials_category",
    "category",
    "python_module",
    "experimental",
    "output_matchtypes",
)
"""Parts of a description that only the web page uses."""


@pytest.fixture(params=VERSIONS)
def standin(request, tmp_path):
    with StandIn(tmp_path / "server", version=request.param) as server:
        yield server


def send(url: str, request: dict) -> requests.Response:
    """One recorded request, to another server."""
    content: dict[str, Any] = {"headers": dict(request.get("headers", {}))}
    if "json" in request:
        content["json"] = request["json"]
    elif "text" in request:
        content["data"] = request["text"].encode()
    elif "parts" in request:
        content["data"] = multipart(request["parts"])
        content["headers"]["Content-Type"] = "multipart/form-data; boundary=frontier"
    if "Host" in content["headers"] and "127.0.0.1" in content["headers"]["Host"]:
        del content["headers"]["Host"]
    if content["headers"].get("Origin", "").startswith("http://127.0.0.1"):
        content["headers"]["Origin"] = url
    return requests.request(request["method"], url + request["path"], timeout=10, **content)


def multipart(parts: list[dict]) -> bytes:
    body = b""
    for part in parts:
        kind = f"\r\nContent-Type: {part['type']}" if "type" in part else ""
        head = f"--frontier\r\nContent-Disposition: {part['disposition']}{kind}\r\n\r\n".encode()
        body += head + (part["value"].encode() if "value" in part else base64.b64decode(part["base64"])) + b"\r\n"
    return body + b"--frontier--\r\n"


def plain(value: Any, key: str = "") -> Any:
    """A value without what only the web page uses, and with the errors of a node sorted, because their order is not fixed."""
    if isinstance(value, dict):
        return {key: plain(each, key) for key, each in value.items() if key not in UNCOMPARED}
    if isinstance(value, list):
        return sorted(map(plain, value), key=lambda each: each["details"]) if key == "errors" else [plain(each) for each in value]
    return value


def differences(there: Any, here: Any, where: str, folder: str = "") -> list[str]:
    """What differs between a recorded value and the stand-in's, each with its path."""
    if isinstance(there, dict) and isinstance(here, dict):
        if there.keys() != here.keys():
            return [f"{where}: keys {sorted(there)} became {sorted(here)}"]
        return [
            line for key in there if key not in VOLATILE for line in differences(there[key], here[key], f"{where}.{key}", folder)
        ]
    if isinstance(there, list) and isinstance(here, list):
        if any(f".{name}[0]" in f"{where}[0]" and set(map(str, here)) <= set(map(str, there)) for name in SUBSETS):
            return []
        if len(there) != len(here):
            return [f"{where}: {len(there)} items became {len(here)}"]
        pairs = enumerate(zip(there, here, strict=True))
        return [line for number, (one, other) in pairs for line in differences(one, other, f"{where}[{number}]", folder)]
    if isinstance(here, str) and folder:
        here = here.replace(folder, "<base>")
    return [] if there == here and type(there) is type(here) else [f"{where}: {there!r} became {here!r}"]


def compare(exchange: dict, answer: requests.Response, folder: str = "") -> list[str]:
    name, expected = exchange["name"], exchange["answer"]
    if answer.status_code != expected["status"]:
        return [f"{name}: {expected['status']} became {answer.status_code} {answer.text[:200]}"]
    if expected["content_type"] is not None and answer.headers.get("Content-Type") != expected["content_type"]:
        return [f"{name}: content type {expected['content_type']} became {answer.headers.get('Content-Type')}"]
    if "json" in expected:
        return differences(plain(expected["json"]), plain(answer.json()), name, folder)
    if "text" in expected:
        return [] if answer.text == expected["text"] else [f"{name}: {expected['text']!r} became {answer.text!r}"]
    return [] if len(answer.content) == expected["length"] else [f"{name}: {expected['length']} bytes became {len(answer.content)}"]


def wait_until_idle(url: str) -> None:
    deadline = time.monotonic() + 20
    while requests.get(f"{url}/prompt", timeout=10).json()["exec_info"]["queue_remaining"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def history(url: str, prompt_id: str) -> dict:
    wait_until_idle(url)
    return requests.get(f"{url}/history/{prompt_id}", timeout=10).json()


def test_reading(standin):
    found = []
    for exchange in recorded("get.json", standin.version):
        answer = send(standin.url, exchange["request"])
        if exchange["name"] == "system_stats":
            assert answer.json().keys() == exchange["answer"]["json"].keys()
            assert answer.json()["system"].keys() == exchange["answer"]["json"]["system"].keys()
        else:
            found += compare(exchange, answer)
    assert not found, "\n".join(found)


def test_uploading(standin):
    found = [
        line
        for exchange in recorded("upload.json", standin.version)
        for line in compare(exchange, send(standin.url, exchange["request"]))
    ]
    assert not found, "\n".join(found)
    assert {"face.png", "face (1).png", "face (2).png", "face (3).png"} <= {
        path.name for path in (standin.folder / "input").iterdir()
    }


def test_submitting(standin):
    found = []
    for exchange in recorded("prompt.json", standin.version):
        answer = send(standin.url, exchange["request"])
        expected = exchange["answer"].get("json", {})
        request = exchange["request"].get("json")
        chosen = request.get("prompt_id", "") if isinstance(request, dict) else ""
        if expected.get("prompt_id", "None") != "None" and not chosen:
            expected["prompt_id"] = answer.json().get("prompt_id")
        found += compare(exchange, answer)
    assert not found, "\n".join(found)
    wait_until_idle(standin.url)


def test_nodes_of_the_new_schema(tmp_path):
    found = []
    (tmp_path / "server" / "models" / "controlnet").mkdir(parents=True)
    with StandIn(tmp_path / "server") as standin:
        for exchange in recorded("v3.json", VERSIONS[0]):
            if "history" in exchange["name"]:
                prompt_id = exchange["request"]["path"].rpartition("/")[2]
                expected, got = exchange["answer"]["json"][prompt_id], history(standin.url, prompt_id)[prompt_id]
                assert got["prompt"][3].keys() == {"client_id", "create_time"}
                found += differences(comparable(expected), comparable(got), exchange["name"])
                continue
            answer = send(standin.url, exchange["request"])
            if (sent := answer.headers.get("Content-Type", "")).startswith("application/json") and "prompt_id" in answer.json():
                exchange["answer"]["json"]["prompt_id"] = answer.json()["prompt_id"]
            assert sent
            found += compare(exchange, answer)
            if exchange["request"]["method"] == "POST":
                wait_until_idle(standin.url)
    assert not found, "\n".join(found)


def test_old_server_has_no_nodes_of_the_new_schema(tmp_path):
    with StandIn(tmp_path / "server", version=VERSIONS[1]) as standin:
        assert "SaveImageAdvanced" not in requests.get(f"{standin.url}/object_info", timeout=10).json()
        assert requests.get(f"{standin.url}/node_replacements", timeout=10).status_code == 404


@pytest.mark.parametrize("waits", [True, False])
def test_cancelled_jobs(tmp_path, waits):
    graph = {
        "1": {"inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 7}, "class_type": "EmptyImage"},
        "9": {"inputs": {"filename_prefix": "q", "images": ["1", 0]}, "class_type": "SaveImage"},
    }
    with StandIn(tmp_path / "server", seconds_per_job=5.0) as standin:
        ids = [requests.post(f"{standin.url}/prompt", json={"prompt": graph}, timeout=10).json()["prompt_id"] for _ in range(2)]
        wait_for_running(standin.url)
        cancelled = requests.post(f"{standin.url}/api/jobs/{ids[waits]}/cancel", json={}, timeout=10).json()
        assert cancelled == {"cancelled": True}
        if waits:
            assert requests.get(f"{standin.url}/queue", timeout=10).json()["queue_pending"] == []
        else:
            while not (entry := history_now(standin.url, ids[0])):
                time.sleep(0.01)
            assert entry[ids[0]]["status"]["messages"][-1][0] == "execution_interrupted"


def test_numbers_count_rejected_submissions_and_are_negative_for_the_front(standin):
    exchanges = recorded("prompt.json", standin.version)
    prompts = {exchange["name"]: exchange["request"]["json"] for exchange in exchanges if "json" in exchange["request"]}
    sent = [prompts[name] for name in ("ok_minimal", "bad_unknown_class", "ok_minimal", "ok_front")]
    answers = [requests.post(f"{standin.url}/prompt", json=each, timeout=10).json() for each in sent]
    assert [answer.get("number") for answer in answers] == [0, None, 2, -3]


def test_viewing(standin):
    for folder in ("output/v", "temp", "input"):
        (standin.folder / folder).mkdir(exist_ok=True)
    image = Image.new("RGB", (32, 24), (10, 20, 30))
    for name in ("rgb.png", "a [output].png", "50% #1 & a+b?x=y.png", "prénom 猫.png", "photo.jpg", "pic.webp"):
        image.save(standin.folder / "output" / "v" / name)
    for name in ("output/root.png", "temp/t.png", "input/i.png"):
        image.save(standin.folder / name)
    (standin.folder / "output" / "v" / "empty.png").touch()
    (standin.folder / "output" / "v" / "corrupt.png").write_text("not an image")
    (standin.folder / "secret.txt").write_text("secret")
    found = []
    for exchange in recorded("view.json", standin.version):
        answer = send(standin.url, exchange["request"])
        if answer.status_code == 200 and exchange["answer"]["length"] > 12:
            exchange["answer"]["length"] = len(answer.content)
        found += compare(exchange, answer)
    assert not found, "\n".join(found)
    head = requests.get(f"{standin.url}/view?filename=rgb.png&subfolder=v", timeout=10).headers
    assert head["Content-Disposition"] == 'filename="rgb.png"'


def test_face_and_both_modes_from_upload_to_images(standin):
    exchanges = {exchange["name"]: exchange for exchange in recorded("golden.json", standin.version)}
    found = []
    for name, exchange in exchanges.items():
        answer = send(standin.url, exchange["request"])
        if "history" in name:
            prompt_id = exchange["request"]["path"].rpartition("/")[2]
            expected, got = exchange["answer"]["json"][prompt_id], history(standin.url, prompt_id)[prompt_id]
            found += differences(comparable(expected), comparable(got), name)
            assert_images_are_there(standin.url, got)
        else:
            found += compare(exchange, answer)
    assert not found, "\n".join(found)


def comparable(entry: dict) -> dict:
    """A history entry without what differs between servers: numbers, order of the outputs, file numbers."""
    text = re.sub(r"[\w.]+\(\) missing", "execute() missing", json.dumps(entry))
    text = re.sub(r"_temp_[a-z]{5}_", "_temp_xxxxx_", re.sub(r"_\d{5}_\.png", "_00000_.png", text))
    same = json.loads(text)
    same["prompt"][0], same["prompt"][4] = 0, sorted(same["prompt"][4])
    same["prompt"][3].pop("create_time", None)
    for key in ("outputs", "meta"):
        same[key] = dict(sorted(same[key].items()))
    for kind, data in same["status"]["messages"]:
        if kind == "execution_cached":
            data["nodes"] = []
    return same


def assert_images_are_there(url: str, entry: dict) -> None:
    for shown in entry["outputs"].values():
        for record in shown["images"]:
            with Image.open(io.BytesIO(requests.get(f"{url}/view", params=record, timeout=10).content)) as image:
                assert image.format == "PNG"
                assert json.loads(image.text["prompt"]).keys() == entry["prompt"][2].keys()


def test_repeated_prompts_come_from_the_cache_and_name_old_files(standin):
    for step in recorded("cache.json"):
        if step["name"] == "seed_changed":
            (standin.folder / "output" / "rec" / "cache_classic_00001_.png").unlink()
        prompt_id = requests.post(f"{standin.url}/prompt", json={"prompt": step["prompt"]}, timeout=10).json()["prompt_id"]
        entry = history(standin.url, prompt_id)[prompt_id]
        cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
        assert (set(cached), entry["outputs"]) == (set(step["cached"]), step["outputs"]), step["name"]


def test_free_memory_empties_the_cache(standin):
    step = recorded("cache.json")[0]
    for body in ({"unload_models": True}, {"free_memory": True}):
        requests.post(f"{standin.url}/prompt", json={"prompt": step["prompt"]}, timeout=10)
        wait_until_idle(standin.url)
        requests.post(f"{standin.url}/free", json=body, timeout=10)
    prompt_id = requests.post(f"{standin.url}/prompt", json={"prompt": step["prompt"]}, timeout=10).json()["prompt_id"]
    assert history(standin.url, prompt_id)[prompt_id]["outputs"]["9"]["images"][0]["filename"] == "cache_classic_00002_.png"


def test_websocket_sends_the_same_messages_in_the_same_order(standin):
    (standin.folder / "input" / "broken.png").write_text("not an image")
    exchanges = recorded("websocket.json")
    before = json.loads(json.dumps(exchanges[0]["prompt"]))
    before["6"]["inputs"]["text"], before["3"]["inputs"]["seed"] = "another", 1
    requests.post(f"{standin.url}/prompt", json={"prompt": before}, timeout=10)
    wait_until_idle(standin.url)
    for exchange in exchanges:
        # An id of its own for each: the server may forget the id of a closed websocket only after the next one has opened.
        owner = exchange["name"]
        listener = websocket.create_connection(f"ws{standin.url[4:]}/ws?clientId={owner}", timeout=60, suppress_origin=True)
        messages = [json.loads(listener.recv())]
        body = {"prompt": exchange["prompt"], "client_id": owner}
        assert requests.post(f"{standin.url}/prompt", json=body, timeout=10).status_code == 200
        while messages[-1]["type"] != "executing" or messages[-1]["data"]["node"] is not None:
            messages.append(json.loads(listener.recv()))
        listener.close()
        assert list(map(trimmed, messages)) == [without_comments(message) for message in exchange["messages"]], exchange["name"]


def trimmed(message: dict) -> dict:
    """A message in the format of websocket.json."""
    kind, data = message["type"], message["data"]
    about: dict[str, Any] = {"type": kind, "keys": sorted(key for key in data if key != "timestamp")}
    if kind == "progress_state":
        about["about"] = {node: [state["state"], state["value"], state["max"]] for node, state in data["nodes"].items()}
    elif kind in ("executing", "executed", "progress"):
        about["about"] = [data.get("node"), data.get("value"), data.get("max")]
    elif kind == "execution_cached":
        about["about"] = sorted(data["nodes"])
    return about


def without_comments(message: dict) -> dict:
    return {key: message[key] for key in ("type", "keys", "about") if key in message}


@pytest.fixture
def errors():
    return {exchange["name"]: exchange["answer"]["json"] for exchange in recorded("errors.json")}


def test_failed_node_in_the_history(standin, errors):
    (standin.folder / "input" / "broken.png").write_text("not an image")
    (prompt_id, expected), *_ = errors["error_loadimage"].items()
    body = {"prompt": expected["prompt"][2], "prompt_id": prompt_id}
    assert requests.post(f"{standin.url}/prompt", json=body, timeout=10).status_code == 200
    got = history(standin.url, prompt_id)[prompt_id]
    expected["prompt"][0], expected["prompt"][3] = got["prompt"][0], got["prompt"][3]
    assert not differences(expected, got, "entry", str(standin.folder))


def test_queue_and_interruption(standin, errors):
    standin.worker.seconds_per_job = 5.0
    image = {"1": {"inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 7}, "class_type": "EmptyImage"}}
    save = {"9": {"inputs": {"filename_prefix": "q", "images": ["1", 0]}, "class_type": "SaveImage"}}
    ids = [requests.post(f"{standin.url}/prompt", json={"prompt": image | save}, timeout=10).json()["prompt_id"] for _ in range(3)]
    queue = wait_for_running(standin.url)
    assert queue.keys() == errors["queue_with_pending"].keys()
    assert [type(part) for part in queue["queue_running"][0]] == [
        type(part) for part in errors["queue_with_pending"]["queue_running"][0]
    ]
    assert [item[1] for item in queue["queue_running"] + sorted(queue["queue_pending"])] == ids
    requests.post(f"{standin.url}/queue", json={"delete": ids[1:2]}, timeout=10)
    requests.post(f"{standin.url}/interrupt", json={"prompt_id": ids[2]}, timeout=10)
    assert history_now(standin.url, ids[0]) == {}
    requests.post(f"{standin.url}/queue", json={"clear": True}, timeout=10)
    requests.post(f"{standin.url}/interrupt", json={"prompt_id": ids[0]}, timeout=10)
    got = history(standin.url, ids[0])[ids[0]]["status"]
    (expected,) = (entry["status"] for entry in errors["history_interrupted"].values())
    assert [message[0] for message in got["messages"]] == [message[0] for message in expected["messages"]]
    assert got["messages"][-1][1].keys() == expected["messages"][-1][1].keys()
    assert (got["status_str"], got["completed"]) == (expected["status_str"], expected["completed"])
    assert history_now(standin.url, ids[1]) == history_now(standin.url, ids[2]) == {}


def history_now(url: str, prompt_id: str) -> dict:
    return requests.get(f"{url}/history/{prompt_id}", timeout=10).json()


def wait_for_running(url: str) -> dict:
    while not (queue := requests.get(f"{url}/queue", timeout=10).json())["queue_running"]:
        time.sleep(0.01)
    return queue


def test_same_seed_and_text_give_the_same_image_and_others_another(standin):
    batch = recorded("golden.json", standin.version)[-2]["request"]["json"]["prompt"]
    (standin.folder / "input" / "face_reference.png").write_bytes(png())
    pixels = []
    for seed, text in ((1, "a woman"), (2, "a woman"), (1, "a woman on a beach"), (1, "a woman")):
        batch["3"]["inputs"]["seed"], batch["6"]["inputs"]["text"] = seed, text
        prompt_id = requests.post(f"{standin.url}/prompt", json={"prompt": batch}, timeout=10).json()["prompt_id"]
        record = history(standin.url, prompt_id)[prompt_id]["outputs"]["9"]["images"][0]
        with Image.open(io.BytesIO(requests.get(f"{standin.url}/view", params=record, timeout=10).content)) as image:
            pixels.append(image.tobytes())
    assert pixels[0] == pixels[3]
    assert len(set(pixels)) == 3
