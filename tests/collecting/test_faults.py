"""Everything that can go wrong on the way to ComfyUI and in it, by the names in demo/standin_comfyui/faults.py."""

import threading
import time
from pathlib import Path

import pytest
import requests
from comfyui_workspace import Workspace, workflow

from common.files import read_json_lines
from demo.standin_comfyui import faults
from demo.standin_comfyui.server import StandIn
from demo.standin_comfyui.wire import json_response

PROMPTS = [{"prompt": f"a woman in image {number}", "seed": number} for number in range(3)]


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    """No long delays between attempts."""
    monkeypatch.setattr("collecting.http.RETRY_DELAYS_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr("collecting.worker.RECONNECT_TIMEOUT_S", 3.0)
    monkeypatch.setattr("collecting.worker.UNCONFIRMED_S", 0.5)


@pytest.fixture
def batch(space):
    space.per_batch(PROMPTS)
    return space


@pytest.fixture
def full(space):
    space.full_workflow()
    return space


@pytest.fixture
def other(tmp_path):
    """A second server."""
    with StandIn(tmp_path / "other") as server:
        yield server


def assert_complete(space: Workspace, images: int = 3) -> None:
    """Every image is stored once and has its manifest line."""
    assert {f"images/{name}" for name in space.images()} == {line["file"] for line in space.manifest()}
    assert len(space.images()) == len(space.manifest()) == images


def prompts_sent(standin: StandIn) -> list[str]:
    return [body["prompt"]["6"]["inputs"]["text"] for body in standin.submitted]


def keep_busy(standin: StandIn) -> None:
    """Submit a prompt of another client, so that the next ones wait in the queue."""
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1}},
        "2": {"class_type": "SaveImage", "inputs": {"filename_prefix": "else", "images": ["1", 0]}},
    }
    requests.post(f"{standin.url}/prompt", json={"prompt": graph}, timeout=10)


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Temporary faults: the collector retries, and nothing is lost, submitted twice or stored twice.

TEMPORARY = [
    *[(name, "/history/") for name in ("reset", "server_error", "away_502", "away_503", "away_504", "busy_429", "cut_off")],
    *[(name, "/view") for name in ("reset", "server_error", "away_502", "cut_off", "wrong_length")],
    *[(name, "/view") for name in ("image_empty", "image_of_html", "image_cut_off", "image_corrupt")],
    *[(name, "/upload") for name in ("reset", "server_error", "away_503")],
    *[(name, "/queue") for name in ("reset", "away_502")],
    ("ends_between_two_requests", None),
]


@pytest.mark.parametrize(("name", "on"), TEMPORARY)
def test_temporary_fault_loses_nothing(batch, standin, collect, name, on):
    standin.fault(name, on, times=2)
    assert collect().code == 0
    assert_complete(batch)
    assert prompts_sent(standin) == [entry["prompt"] for entry in PROMPTS]


@pytest.mark.parametrize("name", ["answer_lost", "reset", "away_502", "away_504", "away_524", "busy_429", "prompt_lost", "own_ids"])
def test_failed_submission_is_looked_up_and_repeated_only_if_it_is_lost(batch, standin, collect, name):
    standin.fault(name, "/prompt", times=2)
    result = collect()
    assert result.code == 0
    assert_complete(batch)
    assert sorted(prompts_sent(standin)) == [entry["prompt"] for entry in PROMPTS]


def test_collector_waits_for_a_slow_answer(batch, standin, collect):
    standin.fault("slow", "/history/", times=1)
    assert collect().code == 0
    assert_complete(batch)


def test_request_that_times_out_is_repeated(batch, standin, collect, monkeypatch):
    monkeypatch.setattr("collecting.http.READ_TIMEOUT_S", 0.2)
    standin.fault("slow", "/view", times=1)
    assert collect().code == 0
    assert_complete(batch)


def test_submission_that_times_out_is_not_repeated(batch, standin, collect, monkeypatch):
    monkeypatch.setattr("collecting.http.READ_TIMEOUT_S", 0.2)
    standin.fault("slow", "/prompt", times=1)
    assert collect().code == 0
    assert_complete(batch)
    time.sleep(0.5)
    assert sorted(prompts_sent(standin)) == [entry["prompt"] for entry in PROMPTS]


@pytest.mark.parametrize("name", ["evicted", "forgotten"])
def test_prompt_that_the_server_forgot_is_submitted_again_once(batch, standin, collect, name):
    standin.fault(name, times=1)
    result = collect()
    assert result.code == 0
    assert "submitting it again" in result.out
    assert_complete(batch)


@pytest.mark.parametrize("mode", ["batch", "full"])
def test_collector_waits_for_a_server_that_restarts(request, standin, collect, mode):
    space = request.getfixturevalue(mode)
    standin.worker.seconds_per_job = 0.3

    def restart_it():
        wait_for(lambda: standin.submitted)
        standin.stop()
        time.sleep(0.7)
        standin.restart()

    restart = threading.Thread(target=restart_it)
    restart.start()
    result = collect()
    restart.join()
    assert result.code == 0
    assert "Reconnected to ComfyUI at" in result.out
    assert_complete(space)
    if mode == "batch":
        assert [line["prompt"] for line in space.manifest()] == [entry["prompt"] for entry in PROMPTS]


# Lasting faults: an error of one line, the other jobs continue, and the exit code says so.


@pytest.mark.parametrize(
    ("name", "on", "words"),
    [
        ("login_page", "/history/", "text/html instead of JSON"),
        ("login_redirect", "/prompt", "/login: set COMFYUI_ENDPOINT to the final address"),
        ("login_redirect", "/history/", "/login: set COMFYUI_ENDPOINT to the final address"),
        ("unauthorized", "/system_stats", "login required; set COMFYUI_HEADERS"),
        ("forbidden", "/system_stats", "forbidden"),
        ("too_large", "/upload", "request too large"),
        ("too_large", "/prompt", "request too large"),
        ("server_error", "/prompt", "internal error; check ComfyUI's console"),
        ("broken_json", None, "invalid JSON"),
        ("json_list", None, "a JSON list instead of an object"),
        ("away_503", "/history/", "is ComfyUI running"),
        ("reset", "/history/", "closed the connection"),
        ("cut_off", "/history/", "sent a truncated response"),
        ("endless", "/history/", "more than 2 MiB"),
    ],
)
def test_server_that_cannot_be_used_is_one_line_and_exit_4(batch, standin, collect, monkeypatch, name, on, words):
    monkeypatch.setattr("collecting.http.MAX_BODY_BYTES", 2 * 2**20)
    monkeypatch.setattr("collecting.worker.RECONNECT_TIMEOUT_S", 0.2)
    standin.fault(name, on)
    result = collect()
    assert result.code == 4
    assert words in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert batch.images() == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("image_empty", "the file is empty"),
        ("image_of_html", "the file is not a PNG, JPEG, WebP, BMP, TIFF, HEIC or AVIF image"),
        ("image_cut_off", "the file is cut off"),
        ("image_corrupt", "the file cannot be decoded"),
        ("image_bomb", "the file has more than"),
        ("image_gone", "no longer has the file"),
        ("unauthorized", "login required"),
        ("cut_off", "sent a truncated response"),
        ("endless", "more than 2 MiB"),
    ],
)
def test_image_that_cannot_be_downloaded_is_named_and_the_others_are_stored(full, standin, collect, monkeypatch, name, words):
    monkeypatch.setattr("collecting.http.MAX_BODY_BYTES", 2 * 2**20)
    standin.fault(name, "/view", times=4 if name == "cut_off" else 3 if name.startswith("image_") and "gone" not in name else 1)
    result = collect()
    assert result.code == 1
    assert words in result.out
    assert result.out.count("image 1:") == 1
    assert_complete(full, 2)
    assert collect().code == 0
    assert_complete(full, 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("node_fails", "node 3 (KSampler) failed: NodeFails: this node fails on purpose"),
        ("out_of_memory", "node 3 (KSampler) failed: OutOfMemoryError: this node fails on purpose"),
        ("interrupted", "interrupted in ComfyUI at node 3 (KSampler)"),
    ],
)
def test_failed_entry_names_the_node_and_the_others_continue(batch, standin, collect, name, words):
    standin.fault(name, on="3", times=1)
    result = collect()
    assert result.code == 1
    assert words in result.out
    assert_complete(batch, 2)
    assert collect().code == 0
    assert_complete(batch, 3)


def test_images_saved_before_an_error_are_collected(full, standin, collect):
    standin.fault("node_fails", on="301")
    result = collect()
    assert "node 301 (SaveImage) failed" in result.out
    assert result.code == (1 if full.images() else 4)
    entry = next(iter(standin.worker.history.values()))
    assert {line["node"] for line in full.manifest()} == entry["outputs"].keys() & {"300", "301", "302"}


def test_only_failures_is_exit_4(batch, standin, collect):
    standin.fault("node_fails", on="3")
    result = collect()
    assert result.code == 4
    assert result.out.count("FAILED") == 3


@pytest.mark.parametrize("name", ["worker_exits", "worker_dies"])
def test_server_whose_worker_thread_died_is_given_up(batch, standin, collect, name):
    if name == "worker_dies":
        standin.worker.die()
    else:
        standin.fault(name, on="3")
    began = time.monotonic()
    result = collect(COMFYUI_STALL_TIMEOUT="0.5")
    assert result.code == 4
    assert "its worker thread has died" in result.err
    assert "COMFYUI_STALL_TIMEOUT" in result.err
    assert time.monotonic() - began < 10
    standin.stop()
    standin.faults.clear()
    standin.restart()
    assert collect().code == 0
    assert_complete(batch)


def test_long_prompt_that_reports_steps_on_the_websocket_is_not_stalled(batch, standin, collect):
    standin.worker.seconds_per_job = 1.0
    batch.per_batch(PROMPTS[:1])
    assert collect(COMFYUI_STALL_TIMEOUT="0.5").code == 0


@pytest.mark.parametrize(
    ("path", "status"),
    [("/system_stats", 200), ("/prompt", 200), ("/prompt", 400), ("/queue", 200), ("/history/", 200), ("/upload/image", 200)],
)
@pytest.mark.parametrize(
    "body",
    [
        {"error": 5, "node_errors": [1]},
        {"error": None, "node_errors": {"3": 7, "4": {"errors": 5}, "5": {"errors": [5, None, {"extra_info": 1}]}}},
        {"system": [], "name": {}, "prompt_id": [], "queue_running": {"a": 1}, "queue_pending": [5, [], [1], [1, {}]]},
    ],
)
def test_unexpected_json_is_never_a_crash(full, standin, collect, monkeypatch, path, status, body):
    monkeypatch.setattr("collecting.worker.RECONNECT_TIMEOUT_S", 0.1)
    real = standin.answer
    monkeypatch.setattr(
        standin, "answer", lambda request: json_response(body, status) if request.path.startswith(path) else real(request)
    )
    result = collect(COMFYUI_STALL_TIMEOUT="0.3")
    assert result.code in (0, 1, 4)
    assert "Traceback" not in result.err


# Anything but images in a node's output is skipped with a message.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("outputs_animated", "(animated)"),
        ("outputs_webm", "'clip_00001_.webm' (not a PNG, JPEG, WebP, BMP, TIFF, HEIC or AVIF image)"),
        ("outputs_temp", "(preview)"),
        ("outputs_latents", "skipped latents"),
        ("outputs_nonsense", "returned no image"),
        ("outputs_empty", "returned no image"),
    ],
)
def test_output_other_than_still_images_is_skipped_with_a_message(full, standin, collect, name, words):
    standin.fault(name)
    result = collect()
    assert result.code == 4
    assert words in result.out
    assert full.images() == {}


@pytest.mark.parametrize("name", ["outputs_text", "outputs_bare", "status_missing"])
def test_output_with_more_or_fewer_keys_than_usual_is_accepted(full, standin, collect, name):
    standin.fault(name)
    result = collect()
    assert result.code == 0
    assert ("skipped text" in result.out) == (name == "outputs_text")
    assert_complete(full)


def test_names_subfolders_and_types_of_the_server_never_reach_the_file_system(full, standin, collect):
    standin.fault("outputs_hostile")
    before = set(full.root.parent.rglob("*"))
    assert collect().code == 4
    assert not [path for path in set(full.root.parent.rglob("*")) - before if "escape" in path.name]
    assert full.images() == {}


# Repeats.


def test_same_prompt_twice_is_downloaded_and_counted_once(batch, standin, collect):
    batch.per_batch([{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1, "name": "again"}])
    result = collect()
    assert result.code == 0
    assert "again: 0 new images, 1 already collected" in result.out
    assert standin.requests.count(("GET", "/view")) == 1
    assert_complete(batch, 1)


def test_cached_prompt_whose_file_stays_gone_is_explained_with_a_remedy(batch, standin, collect):
    batch.per_batch(PROMPTS[:1])
    collect(COMFYUI_FREE="0")
    for path in standin.folder.glob("output/**/*.png"):
        path.unlink()
    again = Workspace(batch.root / "again", batch.environment | {"DATASET_DIR": str(batch.root / "again" / "dataset")})
    standin.fault("forbidden", "/free")
    result = collect(**again.environment)
    assert result.code == 4
    assert "answered from its cache" in result.out
    assert "set GLOBAL_SEED or NEW_SEEDS=1" in result.out
    assert collect(**again.environment | {"NEW_SEEDS": "1"}).code == 0
    assert_complete(again, 1)


def test_cached_prompt_without_outputs_is_run_again(batch, standin, collect):
    batch.per_batch([{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1, "name": "again"}])
    standin.fault("cached_outputs_missing")
    result = collect()
    assert result.code == 0
    assert "again: ComfyUI answered from its cache, but the files are gone; submitting it again" in result.out
    assert "again: 0 new images, 1 already collected" in result.out
    assert standin.worker.executed_jobs == 2
    assert_complete(batch, 1)


# Several servers.


@pytest.fixture
def both(batch, standin, other):
    batch.per_batch([{"prompt": f"number {number}", "seed": number, "name": f"n{number}"} for number in range(8)])
    batch.environment["COMFYUI_ENDPOINT"] = f"{standin.url}, {other.url}"
    for server in (standin, other):
        server.worker.seconds_per_job = 0.1
    return batch


def test_jobs_go_to_the_server_that_is_free(both, standin, other, collect):
    other.worker.seconds_per_job = 0.35
    assert collect().code == 0
    assert_complete(both, 8)
    assert len(standin.submitted) + len(other.submitted) == 8
    assert len(standin.submitted) > len(other.submitted) > 0


def test_jobs_of_a_server_that_dies_go_to_the_others(both, standin, other, collect):
    death = threading.Thread(target=lambda: (wait_for(lambda: len(other.submitted) >= 2), other.stop()))
    death.start()
    result = collect()
    death.join()
    other.restart()
    assert result.code == 0
    assert "Its prompts are given to the other servers" in result.out
    assert "Could not free" not in result.out
    assert "Could not remove" not in result.out
    assert_complete(both, 8)


def test_prompts_that_a_server_accepted_before_it_failed_are_dequeued(batch, standin, collect):
    standin.worker.seconds_per_job = 0.5
    keep_busy(standin)
    standin.fault("too_large", "/prompt", after=1)
    result = collect()
    assert result.code == 4
    assert "Removed this run's waiting prompts from the queue" in result.out
    assert standin.worker.queue()["queue_pending"] == []


@pytest.mark.parametrize("name", ["worker_exits", "login_page"])
def test_jobs_of_a_server_that_fails_go_to_the_others(both, standin, other, collect, name):
    other.fault(name, on="3" if name == "worker_exits" else "/history/")
    result = collect(COMFYUI_STALL_TIMEOUT="0.8")
    assert result.code == 0
    assert "Continuing with the other servers" in result.out
    assert_complete(both, 8)


def test_server_that_is_unreachable_at_the_start_is_logged_and_not_used(both, standin, collect):
    result = collect(COMFYUI_ENDPOINT=f"http://127.0.0.1:9,{standin.url}")
    assert result.code == 0
    assert "Continuing with the other servers" in result.out
    assert_complete(both, 8)


def test_no_server_at_all_is_exit_4_with_all_reasons(both, collect):
    result = collect(COMFYUI_ENDPOINT="http://127.0.0.1:9,http://localhost:9")
    assert result.code == 4
    assert "http://127.0.0.1:9 refuses" in result.err
    assert "http://localhost:9 refuses" in result.err


def test_prompts_of_an_earlier_run_are_found_on_several_servers(both, standin, other, collect):
    for server in (standin, other):
        server.worker.seconds_per_job = 0.4
    process = both.start()
    wait_for(lambda: len(standin.submitted) >= 2 and len(other.submitted) >= 2)
    process.kill()
    process.communicate()
    assert collect().code == 0
    assert_complete(both, 8)
    assert len(standin.submitted) + len(other.submitted) == 8


# Without a websocket, or with one that sends nonsense, everything works by polling.


@pytest.mark.parametrize("name", ["no_websocket", "websocket_cut", "websocket_noise", "websocket_silent"])
def test_websocket_is_for_the_display_only(batch, standin, collect, name):
    standin.fault(name)
    standin.worker.seconds_per_job = 0.2
    assert collect().code == 0
    assert_complete(batch)


# Afterwards.


def test_memory_is_freed_after_the_last_image(batch, standin, collect):
    result = collect()
    assert "requested to unload its models" in result.out
    assert standin.requests[-1] == ("POST", "/free")
    assert standin.requests.count(("POST", "/free")) == 1


def test_memory_is_not_freed_when_the_setting_is_off(batch, standin, collect):
    assert collect(COMFYUI_FREE="0").code == 0
    assert ("POST", "/free") not in standin.requests


def test_memory_is_not_freed_while_other_clients_have_prompts(batch, standin, collect):
    graph = workflow("full_workflow_no_model.json")
    graph.pop("16", None)
    image = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1}}
    save = {"class_type": "SaveImage", "inputs": {"filename_prefix": "else", "images": ["1", 0]}}

    def keep_busy():
        wait_for(lambda: len(standin.submitted) == 3)
        standin.worker.seconds_per_job = 0.8
        requests.post(f"{standin.url}/prompt", json={"prompt": {"1": image, "2": save}}, timeout=10)

    standin.worker.seconds_per_job = 0.1
    other_client = threading.Thread(target=keep_busy)
    other_client.start()
    result = collect()
    other_client.join()
    assert result.code == 0
    assert "prompts of other clients are in its queue" in result.out
    assert ("POST", "/free") not in standin.requests


def test_failure_to_free_memory_is_only_logged(batch, standin, collect):
    standin.fault("server_error", "/free")
    result = collect()
    assert result.code == 0
    assert "Could not free" in result.out


def test_every_fault_has_a_test():
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in sorted(faults.KINDS) if f'"{name}"' not in text] == []


def test_journal_has_these_events_only(batch, standin, collect):
    collect()
    events = read_json_lines(batch.dataset / ".loracat" / "collect.jsonl")
    assert {event["event"] for event in events} == {"client", "sent", "picture", "done"}
