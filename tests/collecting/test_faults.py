"""The list of what goes wrong on the way to ComfyUI, in front of it and in it, by the names in demo/standin_comfyui/faults.py."""

import threading
import time

import pytest
import requests
from comfyui_workspace import Workspace, workflow

from common.files import read_json_lines
from demo.standin_comfyui import faults
from demo.standin_comfyui.server import StandIn
from demo.standin_comfyui.wire import json_answer

PROMPTS = [{"prompt": f"a woman in image {number}", "seed": number} for number in range(3)]


@pytest.fixture(autouse=True)
def haste(monkeypatch):
    """No long pauses between tries."""
    monkeypatch.setattr("collecting.http.PATIENCE_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr("collecting.worker.AWAY_S", 3.0)
    monkeypatch.setattr("collecting.worker.DOUBT_S", 0.5)


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
    """Every image is there once, under its line."""
    assert {f"images/{name}" for name in space.images()} == {line["file"] for line in space.manifest()}
    assert len(space.images()) == len(space.manifest()) == images


def prompts_sent(standin: StandIn) -> list[str]:
    return [body["prompt"]["6"]["inputs"]["text"] for body in standin.submitted]


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# What passes: the collector asks again and nothing is lost, sent twice or stored twice.

PASSING = [
    *[(name, "/history/") for name in ("reset", "server_error", "away_502", "away_503", "away_504", "busy_429", "cut_off")],
    *[(name, "/view") for name in ("reset", "server_error", "away_502", "cut_off", "wrong_length")],
    *[(name, "/view") for name in ("image_empty", "image_of_html", "image_cut_off", "image_corrupt")],
    *[(name, "/upload") for name in ("reset", "server_error", "away_503")],
    *[(name, "/queue") for name in ("reset", "away_502")],
    ("ends_between_two_looks", None),
]


@pytest.mark.parametrize(("name", "on"), PASSING)
def test_fault_that_passes_costs_nothing(batch, standin, collect, name, on):
    standin.fault(name, on, times=2)
    assert collect().code == 0
    assert_complete(batch)
    assert prompts_sent(standin) == [entry["prompt"] for entry in PROMPTS]


@pytest.mark.parametrize("name", ["answer_lost", "reset", "away_502", "away_504", "away_524", "busy_429", "prompt_lost", "own_ids"])
def test_submission_that_went_wrong_is_looked_up_and_sent_again_only_if_it_is_lost(batch, standin, collect, name):
    standin.fault(name, "/prompt", times=2)
    result = collect()
    assert result.code == 0
    assert_complete(batch)
    assert sorted(prompts_sent(standin)) == [entry["prompt"] for entry in PROMPTS]


def test_slow_answer_is_waited_for(batch, standin, collect):
    standin.fault("slow", "/history/", times=1)
    assert collect().code == 0
    assert_complete(batch)


def test_answer_that_takes_too_long_is_asked_for_again(batch, standin, collect, monkeypatch):
    monkeypatch.setattr("collecting.http.READ_TIMEOUT_S", 0.2)
    standin.fault("slow", "/view", times=1)
    assert collect().code == 0
    assert_complete(batch)


def test_submission_that_takes_too_long_is_not_sent_twice(batch, standin, collect, monkeypatch):
    monkeypatch.setattr("collecting.http.READ_TIMEOUT_S", 0.2)
    standin.fault("slow", "/prompt", times=1)
    assert collect().code == 0
    assert_complete(batch)
    time.sleep(0.5)
    assert sorted(prompts_sent(standin)) == [entry["prompt"] for entry in PROMPTS]


@pytest.mark.parametrize("name", ["evicted", "forgotten"])
def test_prompt_that_the_server_forgot_is_made_again_once(batch, standin, collect, name):
    standin.fault(name, times=1)
    result = collect()
    assert result.code == 0
    assert "sending it again" in result.out
    assert_complete(batch)


@pytest.mark.parametrize("mode", ["batch", "full"])
def test_server_that_restarts_in_the_middle_is_waited_for(request, standin, collect, mode):
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
    assert "is back" in result.out
    assert_complete(space)
    if mode == "batch":
        assert [line["prompt"] for line in space.manifest()] == [entry["prompt"] for entry in PROMPTS]


# What does not pass: one clear line, the others go on, and the exit code says so.


@pytest.mark.parametrize(
    ("name", "on", "words"),
    [
        ("login_page", "/history/", "text/html instead of JSON"),
        ("login_redirect", "/prompt", "/login: put the final address into COMFYUI_ENDPOINT"),
        ("login_redirect", "/history/", "/login: put the final address into COMFYUI_ENDPOINT"),
        ("unauthorized", "/system_stats", "wants a login: put it into COMFYUI_HEADERS"),
        ("forbidden", "/system_stats", "forbids it"),
        ("too_large", "/upload", "finds it too large"),
        ("too_large", "/prompt", "finds it too large"),
        ("server_error", "/prompt", "the terminal in which ComfyUI runs says why"),
        ("broken_json", None, "broken JSON"),
        ("json_list", None, "a list where ComfyUI gives an object"),
        ("away_503", "/history/", "is ComfyUI running"),
        ("reset", "/history/", "broke the connection"),
        ("cut_off", "/history/", "less than it announces"),
        ("endless", "/history/", "more than 2 MiB"),
    ],
)
def test_server_that_cannot_be_used_is_one_line_and_exit_4(batch, standin, collect, monkeypatch, name, on, words):
    monkeypatch.setattr("collecting.http.MOST_BODY_BYTES", 2 * 2**20)
    monkeypatch.setattr("collecting.worker.AWAY_S", 0.2)
    standin.fault(name, on)
    result = collect()
    assert result.code == 4
    assert words in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert batch.images() == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("image_empty", "it is empty"),
        ("image_of_html", "it is not a PNG, JPEG or WebP image"),
        ("image_cut_off", "it is cut off"),
        ("image_corrupt", "it cannot be decoded"),
        ("image_bomb", "pixels"),
        ("image_gone", "no longer has the file"),
        ("unauthorized", "wants a login"),
        ("cut_off", "less than it announces"),
        ("endless", "more than 2 MiB"),
    ],
)
def test_image_that_cannot_be_had_is_named_and_never_stored_and_the_others_come(full, standin, collect, monkeypatch, name, words):
    monkeypatch.setattr("collecting.http.MOST_BODY_BYTES", 2 * 2**20)
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
        ("interrupted", "it was interrupted in ComfyUI at node 3 (KSampler)"),
    ],
)
def test_failed_entry_names_the_node_and_the_others_go_on(batch, standin, collect, name, words):
    standin.fault(name, on="3", times=1)
    result = collect()
    assert result.code == 1
    assert words in result.out
    assert_complete(batch, 2)
    assert collect().code == 0
    assert_complete(batch, 3)


def test_what_finished_before_the_error_is_kept(full, standin, collect):
    standin.fault("node_fails", on="301")
    result = collect()
    assert "node 301 (SaveImage) failed" in result.out
    assert result.code == (1 if full.images() else 4)
    entry = next(iter(standin.worker.history.values()))
    assert {line["node"] for line in full.manifest()} == entry["outputs"].keys() & {"300", "301", "302"}


def test_nothing_but_failures_is_exit_4(batch, standin, collect):
    standin.fault("node_fails", on="3")
    result = collect()
    assert result.code == 4
    assert result.out.count("FAILED") == 3


@pytest.mark.parametrize("name", ["worker_exits", "worker_dies"])
def test_worker_that_is_dead_while_http_lives_is_given_up(batch, standin, collect, name):
    if name == "worker_dies":
        standin.worker.die()
    else:
        standin.fault(name, on="3")
    began = time.monotonic()
    result = collect(COMFYUI_STALL_TIMEOUT="0.5")
    assert result.code == 4
    assert "its worker is dead" in result.err
    assert "COMFYUI_STALL_TIMEOUT" in result.err
    assert time.monotonic() - began < 10
    standin.stop()
    standin.faults.clear()
    standin.restart()
    assert collect().code == 0
    assert_complete(batch)


def test_long_prompt_that_shows_steps_on_the_websocket_is_no_stall(batch, standin, collect):
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
def test_json_that_makes_no_sense_is_no_bug_of_ours(full, standin, collect, monkeypatch, path, status, body):
    monkeypatch.setattr("collecting.worker.AWAY_S", 0.1)
    real = standin.answer
    monkeypatch.setattr(standin, "answer", lambda asked: json_answer(body, status) if asked.path.startswith(path) else real(asked))
    result = collect(COMFYUI_STALL_TIMEOUT="0.3")
    assert result.code in (0, 1, 4)
    assert "Traceback" not in result.err


# What a node shows besides images is skipped with a word.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("outputs_animated", "(animated)"),
        ("outputs_webm", "'clip_00001_.webm' (no PNG, JPEG or WebP)"),
        ("outputs_temp", "(a preview)"),
        ("outputs_latents", "skipped latents"),
        ("outputs_nonsense", "gave no image"),
        ("outputs_empty", "gave no image"),
    ],
)
def test_output_that_is_no_still_image_is_skipped_with_a_word(full, standin, collect, name, words):
    standin.fault(name)
    result = collect()
    assert result.code == 4
    assert words in result.out
    assert full.images() == {}


@pytest.mark.parametrize("name", ["outputs_text", "outputs_bare", "status_missing"])
def test_output_with_more_or_less_than_usual_is_understood(full, standin, collect, name):
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


def test_same_prompt_twice_is_fetched_and_counted_once(batch, standin, collect):
    batch.per_batch([{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1, "name": "again"}])
    result = collect()
    assert result.code == 0
    assert "again: 0 new images, 1 there already" in result.out
    assert standin.requests.count(("GET", "/view")) == 1
    assert_complete(batch, 1)


def test_file_that_was_deleted_on_the_server_is_explained_with_what_to_change(batch, standin, collect):
    batch.per_batch(PROMPTS[:1])
    collect(COMFYUI_FREE="0")
    for path in standin.folder.glob("output/**/*.png"):
        path.unlink()
    again = Workspace(batch.root / "again", batch.environment | {"DATASET_DIR": str(batch.root / "again" / "dataset")})
    result = collect(**again.environment)
    assert result.code == 4
    assert "answered from its cache" in result.out
    assert "set GLOBAL_SEED, or NEW_SEEDS=1" in result.out
    assert collect(**again.environment | {"NEW_SEEDS": "1"}).code == 0
    assert_complete(again, 1)


def test_cached_prompt_without_outputs_is_explained(batch, standin, collect):
    batch.per_batch([{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1, "name": "again"}])
    standin.fault("cached_outputs_missing")
    result = collect()
    assert result.code == 1
    assert "gave no image: ComfyUI answered from its cache" in result.out
    assert "NEW_SEEDS=1" in result.out
    assert_complete(batch, 1)


# Several servers.


@pytest.fixture
def both(batch, standin, other):
    batch.per_batch([{"prompt": f"number {number}", "seed": number, "name": f"n{number}"} for number in range(8)])
    batch.environment["COMFYUI_ENDPOINT"] = f"{standin.url}, {other.url}"
    for server in (standin, other):
        server.worker.seconds_per_job = 0.1
    return batch


def test_work_goes_to_whoever_is_free(both, standin, other, collect):
    other.worker.seconds_per_job = 0.35
    assert collect().code == 0
    assert_complete(both, 8)
    assert len(standin.submitted) + len(other.submitted) == 8
    assert len(standin.submitted) > len(other.submitted) > 0


def test_server_that_dies_gives_its_entries_to_the_others(both, standin, other, collect):
    death = threading.Thread(target=lambda: (wait_for(lambda: len(other.submitted) >= 2), other.stop()))
    death.start()
    result = collect()
    death.join()
    other.restart()
    assert result.code == 0
    assert "Its work goes to the others" in result.out
    assert "could not be freed" not in result.out
    assert "stays in the queue" not in result.out
    assert_complete(both, 8)


def test_what_a_server_took_before_it_refused_is_taken_out_of_its_queue(batch, standin, collect):
    standin.worker.seconds_per_job = 0.5
    standin.fault("too_large", "/prompt", after=2)
    result = collect()
    assert result.code == 4
    assert "taken out of its queue" in result.out
    assert standin.worker.queue()["queue_pending"] == []


@pytest.mark.parametrize("name", ["worker_exits", "login_page"])
def test_server_that_cannot_go_on_gives_its_entries_to_the_others(both, standin, other, collect, name):
    other.fault(name, on="3" if name == "worker_exits" else "/history/")
    result = collect(COMFYUI_STALL_TIMEOUT="0.8")
    assert result.code == 0
    assert "The other servers go on" in result.out
    assert_complete(both, 8)


def test_server_that_is_not_there_at_the_start_is_said_and_done_without(both, standin, collect):
    result = collect(COMFYUI_ENDPOINT=f"http://127.0.0.1:9,{standin.url}")
    assert result.code == 0
    assert "The other servers go on without it" in result.out
    assert_complete(both, 8)


def test_no_server_at_all_is_exit_4_with_all_reasons(both, collect):
    result = collect(COMFYUI_ENDPOINT="http://127.0.0.1:9,http://localhost:9")
    assert result.code == 4
    assert "http://127.0.0.1:9 refuses" in result.err
    assert "http://localhost:9 refuses" in result.err


def test_what_was_sent_to_one_of_several_is_found_there_again(both, standin, other, collect):
    for server in (standin, other):
        server.worker.seconds_per_job = 0.4
    process = both.start()
    wait_for(lambda: len(standin.submitted) >= 2 and len(other.submitted) >= 2)
    process.kill()
    process.communicate()
    assert collect().code == 0
    assert_complete(both, 8)
    assert len(standin.submitted) + len(other.submitted) == 8


# Without a websocket, or with one that talks nonsense, everything works by polling.


@pytest.mark.parametrize("name", ["no_websocket", "websocket_cut", "websocket_noise", "websocket_silent"])
def test_websocket_is_for_the_display_only(batch, standin, collect, name):
    standin.fault(name)
    standin.worker.seconds_per_job = 0.2
    assert collect().code == 0
    assert_complete(batch)


# Afterwards.


def test_memory_is_freed_when_the_last_image_is_in(batch, standin, collect):
    result = collect()
    assert "told to free its memory" in result.out
    assert standin.requests[-1] == ("POST", "/free")
    assert standin.requests.count(("POST", "/free")) == 1


def test_memory_is_not_freed_when_it_is_not_wanted(batch, standin, collect):
    assert collect(COMFYUI_FREE="0").code == 0
    assert ("POST", "/free") not in standin.requests


def test_memory_is_not_freed_under_somebody_elses_prompts(batch, standin, collect):
    graph = workflow("full_workflow_no_model.json")
    graph.pop("16", None)
    image = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1}}
    save = {"class_type": "SaveImage", "inputs": {"filename_prefix": "else", "images": ["1", 0]}}

    def keep_busy():
        wait_for(lambda: len(standin.submitted) == 3)
        standin.worker.seconds_per_job = 0.8
        requests.post(f"{standin.url}/prompt", json={"prompt": {"1": image, "2": save}}, timeout=10)

    standin.worker.seconds_per_job = 0.1
    somebody = threading.Thread(target=keep_busy)
    somebody.start()
    result = collect()
    somebody.join()
    assert result.code == 0
    assert "prompts of somebody else are in its queue" in result.out
    assert ("POST", "/free") not in standin.requests


def test_freeing_that_fails_is_a_word_and_no_failure(batch, standin, collect):
    standin.fault("server_error", "/free")
    result = collect()
    assert result.code == 0
    assert "could not be freed" in result.out


def test_every_fault_is_on_this_list():
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    assert [name for name in sorted(faults.KINDS) if f'"{name}"' not in text] == []


def test_record_holds_no_more_than_what_was_sent(batch, standin, collect):
    collect()
    events = read_json_lines(batch.dataset / ".loracat" / "collect.jsonl")
    assert {event["event"] for event in events} == {"client", "sent", "picture", "done"}
