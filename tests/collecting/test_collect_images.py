"""The whole stage against the stand-in: both modes, resuming after kills and faults, and every exit code."""

import io
import itertools
import json
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from comfyui_workspace import png, workflow
from PIL import Image

from collecting.graph import InputRef, upstream_seeds
from collecting.jobs import parse_entries
from collecting.prompt_texts import prompt_texts
from collecting.workflow import parse_workflow
from common.files import locked, read_json_lines
from common.settings import REPOSITORY
from demo.standin_comfyui.catalogue import NODES
from demo.standin_comfyui.server import StandIn
from demo.standin_comfyui.wire import Response

PROMPTS = [
    {"prompt": "a woman in a garden", "seed": 11, "name": "garden"},
    {"prompt": "a woman at the beach, 猫", "seed": 12},
    {"prompt": "close-up, night", "seed": 13, "name": "night"},
]
FIELDS = ["file", "sha256", "size_px", "prompt_id", "node", "seeds", "prompt", "texts", "workflow_sha256", "time"]


@pytest.fixture
def batch(space):
    space.per_batch(PROMPTS)
    return space


@pytest.fixture
def full(space):
    space.full_workflow()
    return space


@pytest.fixture
def change(standin, monkeypatch):
    """Let `alter(request, response)` replace what the stand-in answers on `path`; None leaves it unchanged."""

    def install(path, alter):
        real = standin.answer

        def answer(request):
            response = real(request)
            return (alter(request, response) or response) if request.path == path else response

        monkeypatch.setattr(standin, "answer", answer)

    return install


@pytest.fixture
def before_submission(standin, monkeypatch):
    """Call `act(number, request)` before each submission, numbered from 1, reaches the stand-in."""

    def install(act):
        real, numbers = standin.answer, itertools.count(1)

        def answer(request):
            if (request.method, request.path) == ("POST", "/prompt"):
                request = act(next(numbers), request) or request
            return real(request)

        monkeypatch.setattr(standin, "answer", answer)

    return install


def submitted(standin: StandIn) -> list[dict]:
    return [body["prompt"] for body in standin.submitted]


def sent_events(space) -> list[dict]:
    return [line for line in read_json_lines(space.dataset / ".loracat" / "collect.jsonl") if line["event"] == "sent"]


def test_per_batch_sets_text_seed_and_face_and_stores_each_image_with_its_line(batch, standin, collect):
    result = collect()
    assert (result.code, result.err) == (0, "")
    graphs = submitted(standin)
    assert [(graph["6"]["inputs"]["text"], graph["3"]["inputs"]["seed"]) for graph in graphs] == [
        (entry["prompt"], entry["seed"]) for entry in PROMPTS
    ]
    (face,) = (path.name for path in (standin.folder / "input").iterdir())
    assert {graph["12"]["inputs"]["image"] for graph in graphs} == {face}
    assert all(graph["7"] == workflow("per_batch_ksampler.json")["7"] for graph in graphs)
    lines = batch.manifest()
    assert [list(line) for line in lines] == [FIELDS] * 3
    assert [(line["prompt"], line["seeds"], line["node"], line["size_px"]) for line in lines] == [
        (entry["prompt"], {"3.seed": entry["seed"]}, "9", [128, 128]) for entry in PROMPTS
    ]
    assert [line["prompt_id"] for line in lines] == [body["prompt_id"] for body in standin.submitted]
    assert {f"images/{name}" for name in batch.images()} == {line["file"] for line in lines}
    assert sorted(name.rpartition("_")[0] for name in batch.images()) == ["garden", "night", "node9"]
    assert {path.name for path in batch.dataset.iterdir()} == {"images", "manifest.jsonl", ".loracat"}
    assert {path.name for path in (batch.dataset / ".loracat").iterdir()} == {"collect.jsonl", "thumbnails"}


def test_full_workflow_is_submitted_once_and_only_images_with_the_prefix_are_downloaded(full, standin, collect):
    assert collect().code == 0
    assert len(standin.submitted) == 1
    assert [line["node"] for line in full.manifest()] == ["300", "301", "302"]
    assert len(full.images()) == 3
    assert sum(path == "/view" for _, path in standin.requests) == 3
    for line in full.manifest():
        with Image.open(full.dataset / line["file"]) as image:
            assert json.loads(image.text["prompt"])[line["node"]]["inputs"]["filename_prefix"].endswith("Z_IMG_FINAL")


def test_a_file_of_prompts_that_the_workflow_has_no_place_for_is_named(full, standin, collect):
    assert "Prompts: " not in collect().out
    result = collect(PROMPTS_FILE="/absent/mine.json")
    assert result.code == 0
    assert "Prompts: /absent/mine.json is not used (workflow_config.json does not set positive_prompt_node)\n" in result.out


def test_name_that_the_server_returns_is_set_in_the_workflow(batch, standin, collect, change):
    (standin.folder / "input" / "elsewhere").mkdir()
    (standin.folder / "input" / "elsewhere" / "mine.png").write_bytes(png())
    renamed = Response(200, b'{"name": "mine.png", "subfolder": "elsewhere", "type": "input"}', "application/json")
    change("/upload/image", lambda request, response: renamed)
    assert collect().code == 0
    assert {graph["12"]["inputs"]["image"] for graph in submitted(standin)} == {"elsewhere/mine.png"}


def test_without_a_face_the_image_of_the_workflow_is_used_and_this_is_logged_once(full, standin, collect, monkeypatch):
    monkeypatch.setattr("common.project.DEFAULT_FACE", full.root / "none.png")
    (standin.folder / "input" / "example.png").write_bytes(png())
    result = collect(FACE_REFERENCE="")
    assert result.code == 0
    assert result.out.count("the workflow's own image is used\n") == 1
    assert submitted(standin)[0]["16"] == workflow("full_workflow_no_model.json")["16"]
    assert ("POST", "/upload/image") not in standin.requests


def test_face_in_the_repository_is_used_when_none_is_set(full, standin, collect, monkeypatch):
    monkeypatch.setattr("common.project.DEFAULT_FACE", Path(full.environment["FACE_REFERENCE"]))
    assert collect(FACE_REFERENCE="").code == 0
    assert ("POST", "/upload/image") in standin.requests


@pytest.mark.parametrize("mode", ["batch", "full"])
def test_finished_stage_run_again_sends_nothing_even_without_a_server(request, standin, collect, mode):
    space = request.getfixturevalue(mode)
    collect()
    before, requests_before = space.images(), len(standin.requests)
    result = collect(COMFYUI_ENDPOINT="http://127.0.0.1:9")
    assert result.code == 0
    assert "nothing was sent" in result.out
    assert (space.images(), len(standin.requests)) == (before, requests_before)


def test_only_a_new_prompt_in_the_list_is_sent(batch, standin, collect):
    collect()
    batch.per_batch([{"prompt": "new"}, *PROMPTS])
    result = collect()
    assert "1/1 prompt 1" in result.out
    assert [graph["6"]["inputs"]["text"] for graph in submitted(standin)[3:]] == ["new"]


def test_another_face_or_workflow_makes_new_jobs(batch, standin, collect):
    collect()
    batch.write("FACE_REFERENCE", "face.png", png((0, 80, 160)))
    collect()
    graph = workflow("per_batch_ksampler.json")
    graph["7"]["inputs"]["text"] = "another negative"
    batch.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    collect()
    graph["7"]["_meta"]["title"] = "only a title"
    batch.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    assert "nothing was sent" in collect().out
    assert len(standin.submitted) == 9


def test_drawn_seeds_are_recorded_and_differ(batch, standin, collect):
    batch.per_batch([{"prompt": "a woman"}, {"prompt": "a woman"}])
    assert collect().code == 0
    seeds = [line["seeds"]["3.seed"] for line in batch.manifest()]
    assert seeds == [graph["3"]["inputs"]["seed"] for graph in submitted(standin)]
    assert len(set(seeds)) == len(batch.images()) == 2


def test_global_seed_wins_over_entries_and_sets_every_literal_seed(batch, standin, collect):
    batch.write("COMFYUI_WORKFLOW", "workflow.json", workflow("every_seed_form.json"))
    batch.write("WORKFLOW_CONFIG", "config.json", {"positive_prompt_node": "6", "seed_node": "3"})
    assert collect(GLOBAL_SEED="77").code == 0
    for graph in submitted(standin):
        values = [graph["3"]["inputs"]["seed"], graph["31"]["inputs"]["noise_seed"], graph["32"]["inputs"]["noise_seed"]]
        assert values == [77, 77, 77]
        assert graph["37"]["inputs"]["seed"] == ["21", 0]
        assert graph["21"]["inputs"]["value"] == 4
    assert batch.manifest()[0]["seeds"] == {"3.seed": 77, "31.noise_seed": 77, "32.noise_seed": 77}


def test_without_global_seed_only_the_mapped_seed_changes(batch, standin, collect):
    batch.write("COMFYUI_WORKFLOW", "workflow.json", workflow("every_seed_form.json"))
    batch.write("WORKFLOW_CONFIG", "config.json", {"positive_prompt_node": "6", "seed_node": "31"})
    assert collect().code == 0
    graph = submitted(standin)[0]
    assert [graph["3"]["inputs"]["seed"], graph["31"]["inputs"]["noise_seed"], graph["32"]["inputs"]["noise_seed"]] == [1, 11, 3]


def test_full_workflow_keeps_its_seeds_until_new_ones_are_requested(space, standin, collect):
    space.write("COMFYUI_WORKFLOW", "workflow.json", workflow("every_seed_form.json"))
    space.write("WORKFLOW_CONFIG", "config.json", {})
    for variables in ({}, {}, {"NEW_SEEDS": "1"}, {"NEW_SEEDS": "1"}, {"GLOBAL_SEED": "5"}):
        assert collect(**variables).code == 0
    seeds = [
        (graph["3"]["inputs"]["seed"], graph["31"]["inputs"]["noise_seed"], graph["32"]["inputs"]["noise_seed"])
        for graph in submitted(standin)
    ]
    assert seeds[0] == (1, 2, 3)
    assert seeds[3] == (5, 5, 5)
    assert len(set(seeds[1] + seeds[2])) == 6
    assert all(graph["37"]["inputs"]["seed"] == ["21", 0] for graph in submitted(standin))
    assert len(space.images()) == 4


def test_new_seeds_replaces_the_seeds_of_the_entries(batch, standin, collect):
    assert [collect(NEW_SEEDS="1").code, collect(NEW_SEEDS="1").code] == [0, 0]
    seeds = [graph["3"]["inputs"]["seed"] for graph in submitted(standin)]
    assert len(set(seeds) - {11, 12, 13}) == 6
    assert len(batch.images()) == 6


def test_new_seeds_continues_the_set_that_was_stopped(batch, standin, collect, change):
    refuse = iter([None, Response(500, b"", None)])
    change("/prompt", lambda request, response: next(refuse, None) if request.method == "POST" else None)
    assert collect(NEW_SEEDS="1").code == 4
    first = [event["seeds"] for event in sent_events(batch)]
    assert collect(NEW_SEEDS="1").code == 0
    assert len(batch.images()) == 3
    assert [line["seeds"] for line in batch.manifest()][:2] == first


def test_same_image_twice_is_stored_once(batch, standin, collect):
    batch.per_batch([{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1, "name": "again"}])
    result = collect()
    assert result.code == 0
    assert "again: 0 new images, 1 already collected" in result.out
    assert (len(batch.images()), len(batch.manifest())) == (1, 1)


def test_delay_spaces_submissions_only_while_others_wait(batch, standin, collect, before_submission):
    """The second may wait behind the first; the third is sent when none waits any more, whatever the delay is."""
    standin.worker.seconds_per_job = 0.4
    waiting = []
    before_submission(lambda number, request: waiting.append(len(standin.worker.queue()["queue_pending"])))
    began = time.monotonic()
    assert collect(COMFYUI_DELAY="60").code == 0
    assert time.monotonic() - began < 30
    assert len(waiting) == 3
    assert waiting[2] == 0


def test_all_invalid_files_are_in_one_list(batch, standin, collect):
    batch.write("WORKFLOW_CONFIG", "config.json", {"positive_prompt_node": "6", "seed_node": "99"})
    batch.write("FACE_REFERENCE", "face.png", b"not an image")
    result = collect()
    assert result.code == 2
    for words in (
        "the workflow has no node 99",
        "face_reference",
        "face.png is not a PNG, JPEG, WebP, BMP, TIFF,",
    ):
        assert words in result.err
    assert standin.requests == []


@pytest.mark.parametrize("key", ["COMFYUI_WORKFLOW", "WORKFLOW_CONFIG", "PROMPTS_FILE", "FACE_REFERENCE"])
def test_path_to_a_missing_file_or_a_folder_is_a_wrong_setting(batch, standin, collect, key):
    absent = collect(**{key: str(batch.root / "absent.json")})
    folder = collect(**{key: str(batch.root)})
    assert (absent.code, folder.code) == (2, 2)
    assert f"{key.lower()}: there is no file" in absent.err
    assert "cannot be read: Is a directory" in folder.err
    assert standin.requests == []


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe\x00", b"9" * 5000, b"[" * 100000, b"[NaN]", b'["\\ud83d"]'])
@pytest.mark.parametrize("key", ["COMFYUI_WORKFLOW", "WORKFLOW_CONFIG", "PROMPTS_FILE"])
def test_invalid_json_is_a_wrong_setting(batch, collect, key, content):
    batch.write(key, "broken.json", content)
    result = collect()
    assert result.code == 2
    assert key.lower().removesuffix("_file").removeprefix("comfyui_") in result.err


def test_byte_order_mark_is_accepted(batch, collect):
    for key in ("COMFYUI_WORKFLOW", "WORKFLOW_CONFIG", "PROMPTS_FILE"):
        path = Path(batch.environment[key])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert collect().code == 0


def test_format_of_the_web_page_is_refused_with_a_hint_how_to_export(batch, collect):
    batch.write("COMFYUI_WORKFLOW", "workflow.json", workflow("ui_format_not_api.json"))
    result = collect()
    assert result.code == 2
    assert '"Save (API Format)"' in result.err


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:99999", "http://two words"])
def test_invalid_endpoint_is_in_the_list_of_wrong_settings(batch, collect, url):
    result = collect(COMFYUI_ENDPOINT=url, PROMPTS_FILE=str(batch.root / "absent.json"))
    assert result.code == 2
    assert "comfyui_endpoint: not a valid URL of a server" in result.err
    assert "prompts_file: there is no file" in result.err


@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_file_where_the_images_should_go_is_a_wrong_setting(batch, standin, collect, flags):
    batch.dataset.mkdir()
    (batch.dataset / "images").touch()
    result = collect(*flags)
    assert result.code == 2
    assert "images is in the way: it is not a folder" in result.err
    assert standin.submitted == []


def test_damaged_journal_is_accepted(batch, collect):
    record = batch.dataset / ".loracat" / "collect.jsonl"
    record.parent.mkdir(parents=True)
    record.write_text('nonsense\n[1]\n{"a": 1}\n{"event": "sent", "ke')
    assert collect().code == 0
    assert "nothing was sent" in collect().out


def damage(path, name):
    """Remove `name` from every line that has it, and add the line once more for each value of another type."""
    lines = [line for line in read_json_lines(path) if name in line]
    damaged = [{key: value for key, value in line.items() if key != name} for line in lines]
    damaged += [{**line, name: value} for line in lines for value in (None, [1], {"a": []})]
    path.write_text("".join(json.dumps(line) + "\n" for line in damaged))


@pytest.mark.parametrize("name", ["event", "key", "client_id", "prompt_id", "seeds", "node", "index", "line"])
def test_journal_lines_of_another_shape_are_ignored(batch, collect, name):
    collect()
    images = batch.images()
    damage(batch.dataset / ".loracat" / "collect.jsonl", name)
    assert collect().code == 0
    assert batch.images() == images
    assert "nothing was sent" in collect().out


@pytest.mark.parametrize("name", ["file", "sha256"])
def test_manifest_lines_of_another_shape_are_ignored(batch, collect, name):
    collect()
    images, lines = batch.images(), batch.manifest()
    damage(batch.dataset / "manifest.jsonl", name)
    assert "nothing was sent" in collect().out
    (batch.dataset / ".loracat" / "collect.jsonl").unlink()
    assert collect().code == 0
    assert batch.images() == images
    assert [line["file"] for line in batch.manifest()[-len(lines) :]] == [line["file"] for line in lines]


def test_seeds_for_a_workflow_without_any_are_refused(full, collect):
    assert "no seed that GLOBAL_SEED or NEW_SEEDS could set" in collect(GLOBAL_SEED="5").err


def test_unreachable_server_is_exit_4_at_once(batch, collect):
    began = time.monotonic()
    result = collect(COMFYUI_ENDPOINT="http://127.0.0.1:9")
    assert result.code == 4
    assert "is ComfyUI running" in result.err
    assert time.monotonic() - began < 5


def test_login_page_is_exit_4(batch, collect, change):
    change("/system_stats", lambda request, response: Response(200, b"<html>", "text/html"))
    assert collect().code == 4


def test_workflow_that_the_server_rejects_is_exit_4_with_the_reason_once(batch, standin, collect):
    graph = workflow("per_batch_ksampler.json")
    graph["4"]["inputs"]["ckpt_name"] = "absent.safetensors"
    batch.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    result = collect()
    assert result.code == 4
    assert result.err.count("node 4 (CheckpointLoaderSimple): Value not in list: ckpt_name: 'absent.safetensors'") == 1
    assert standin.submitted == []


def test_output_that_the_server_drops_is_an_error_that_names_the_node(full, collect):
    graph = workflow("full_workflow_no_model.json")
    graph["301"]["inputs"]["images"] = ["500", 0]
    graph["500"] = {"class_type": "LoadImage", "inputs": {"image": "absent.png"}}
    full.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    result = collect()
    assert result.code == 1
    assert "node 500 (LoadImage)" in result.out
    assert "node 301 (SaveImage) returned no image" in result.out
    assert [line["node"] for line in full.manifest()] == ["300", "302"]


def test_failed_entry_is_named_the_others_are_done_and_only_it_is_retried(batch, standin, collect):
    standin.fault("node_fails", on="3", times=1)
    first = collect()
    assert first.code == 1
    assert "1/3 garden: 0 new images; FAILED:\n    node 3 (KSampler) failed: NodeFails" in first.out
    assert "1 of 3 submissions failed" in first.err
    assert [line["prompt"] for line in batch.manifest()] == [PROMPTS[1]["prompt"], PROMPTS[2]["prompt"]]
    assert collect().code == 0
    assert submitted(standin)[3]["6"]["inputs"]["text"] == PROMPTS[0]["prompt"]
    assert len(standin.submitted) == 4
    assert len(batch.images()) == 3


def test_run_without_any_image_is_exit_4(full, standin, collect, change):
    def damage_uploads(request, response):
        for path in (standin.folder / "input").iterdir():
            path.write_text("damaged")

    change("/upload/image", damage_uploads)
    result = collect()
    assert result.code == 4
    assert "node 16 (LoadImage) failed" in result.out
    assert full.images() == {}


def test_interruption_in_comfyui_is_named(full, standin, collect):
    standin.worker.seconds_per_job = 5.0

    def interrupt():
        wait_for(lambda: standin.worker.queue()["queue_running"])
        standin.worker.interrupt(None)

    threading.Thread(target=interrupt).start()
    result = collect()
    assert result.code == 4
    assert "interrupted in ComfyUI at node" in result.out


@pytest.mark.parametrize("damaged", [b"", b"<html>", png()[:50], png()[:-6]])
def test_damaged_image_is_downloaded_again(full, collect, change, damaged):
    answers = iter([Response(200, damaged, "image/png")] * 2)
    change("/view", lambda request, response: next(answers, None))
    assert collect().code == 0
    assert len(full.images()) == 3


def test_image_that_stays_damaged_is_reported_and_never_stored(full, collect, change):
    truncated = Response(200, png()[:50], "image/png")
    change("/view", lambda request, response: truncated if request.query["filename"].endswith("00002_.png") else None)
    result = collect()
    assert result.code == 1
    assert "image 1: the file is cut off" in result.out
    assert len(full.images()) == len(full.manifest()) == 2


@pytest.mark.parametrize(
    "answer", [Response(400), Response(200, png()[:50], "image/png", {"Content-Length": "500", "Connection": "close"})]
)
def test_image_that_cannot_be_downloaded_does_not_stop_the_others(full, collect, change, monkeypatch, answer):
    monkeypatch.setattr("collecting.http.RETRY_DELAYS_S", (0.0,))
    change("/view", lambda request, response: answer if request.query["filename"].endswith("00001_.png") else None)
    result = collect()
    assert result.code == 1
    assert "Z_IMG_FINAL_00001_.png" in result.out
    assert len(full.images()) == len(full.manifest()) == 2


def test_file_deleted_on_the_server_is_reported(full, standin, collect, change):
    change("/view", lambda request, response: Response(404))
    result = collect()
    assert result.code == 4
    assert "no longer has the file" in result.out


def test_names_from_the_server_never_reach_the_file_system(full, standin, collect, change):
    image = png((9, 9, 9))

    def rename(request, response):
        content = json.loads(response.body)
        for entry in content.values():
            for shown in entry["outputs"].values():
                shown["images"] = [{"filename": "../../escape.png", "subfolder": "/etc", "type": "output"}]
        return Response(200, json.dumps(content).encode(), response.content_type)

    real = standin.answer
    standin.answer = lambda request: (
        Response(200, image, "image/png")
        if request.path == "/view"
        else rename(request, real(request))
        if request.path.startswith("/history/")
        else real(request)
    )
    assert collect().code == 0
    (name,) = full.images()
    assert name.startswith("node300_")
    assert not list(full.root.rglob("escape*"))


def test_image_in_the_temp_folder_of_the_server_is_not_collected(full, standin, collect, monkeypatch):
    real = standin.answer

    def answer(request):
        response = real(request)
        return (
            replace(response, body=response.body.replace(b'"output"', b'"temp"'))
            if request.path.startswith("/history/")
            else response
        )

    monkeypatch.setattr(standin, "answer", answer)
    result = collect()
    assert result.code == 4
    assert "node 300 (SaveImage) returned no image" in result.out


def test_submission_without_an_answer_is_looked_up_and_not_sent_again(batch, standin, collect, change):
    lose = iter([True, False, True])

    def cut(request, response):
        if request.method == "POST" and next(lose, False):
            raise ConnectionAbortedError
        return None

    change("/prompt", cut)
    result = collect()
    assert result.code == 0
    assert "checking whether it was queued" in result.out
    assert len(standin.submitted) == 3
    assert len(batch.images()) == 3


def test_prompt_that_the_server_forgot_is_sent_again_with_the_same_seed(batch, standin, collect, change):
    batch.per_batch([{"prompt": "a woman"}])
    standin.worker.seconds_per_job = 0.1
    keep_busy(standin)
    forget = iter([lambda: standin.worker.delete_pending(None)])
    change("/prompt", lambda request, response: next(forget, lambda: None)())
    result = collect()
    assert result.code == 0
    assert "submitting it again" in result.out
    first, second = standin.submitted[1:]
    assert first["prompt_id"] != second["prompt_id"]
    assert first["prompt"] == second["prompt"]


def keep_busy(standin: StandIn) -> None:
    """Submit a prompt of another client, so that the next one waits in the queue."""
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1}},
        "2": {"class_type": "SaveImage", "inputs": {"filename_prefix": "else", "images": ["1", 0]}},
    }
    requests.post(f"{standin.url}/prompt", json={"prompt": graph}, timeout=10)


def test_prompt_that_ends_between_two_requests_is_not_lost(full, standin, collect, change):
    standin.worker.seconds_per_job = 0.1

    def answer_late(request, response):
        if request.method == "GET":
            wait_for(lambda: standin.worker.history)
            return Response(200, b'{"queue_running": [], "queue_pending": []}', "application/json")

    change("/queue", answer_late)
    assert collect().code == 0
    assert len(standin.submitted) == 1


def test_second_collector_on_the_same_data_set_is_refused(batch, standin, collect):
    batch.dataset.mkdir(exist_ok=True)
    with locked(batch.dataset, ""):
        result = collect()
    assert result.code == 2
    assert f"another run is collecting into {batch.dataset}: wait until it has finished" in result.err
    assert standin.submitted == []
    assert collect().code == 0


def test_job_that_is_lost_repeatedly_fails(full, standin, collect, change):
    change("/prompt", lambda request, response: Response(200, b'{"prompt_id": "nowhere", "number": 1}', "application/json"))
    standin.worker.stop()
    result = collect()
    assert result.code == 4
    assert "lost this prompt 4 times" in result.out


def test_server_that_assigns_its_own_ids_is_supported(batch, standin, collect, before_submission):
    def without_id(number, request):
        body = {key: value for key, value in request.json().items() if key != "prompt_id"}
        return replace(request, body=json.dumps(body).encode())

    before_submission(without_id)
    assert collect().code == 0
    assert len(standin.submitted) == len(batch.images()) == 3


def test_ids_are_lower_case_uuids_and_the_client_id_stays(batch, standin, collect):
    collect()
    collect(NEW_SEEDS="1")
    ids = [body["prompt_id"] for body in standin.submitted]
    assert all(len(each) == 36 and each == each.lower() and each.count("-") == 4 for each in ids)
    assert len(set(ids)) == 6
    assert len({body["client_id"] for body in standin.submitted}) == 1


def test_submission_is_on_disk_before_it_is_sent(batch, collect, before_submission):
    known = []
    before_submission(
        lambda number, request: known.append(request.json()["prompt_id"] in {event["prompt_id"] for event in sent_events(batch)})
    )
    collect()
    assert known == [True, True, True]


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_the_state_and_the_next_run_reattaches(batch, standin, collect, number, code):
    standin.worker.seconds_per_job = 0.4
    process = batch.start()
    wait_for(lambda: standin.submitted)
    process.send_signal(number)
    out, err = process.communicate(timeout=5)
    assert process.returncode == code
    assert "run the same command again" in err
    assert "Traceback" not in out + err
    assert not standin.worker.queue()["queue_pending"]
    assert ("POST", "/interrupt") not in standin.requests
    standin.worker.seconds_per_job = 0.0
    assert collect().code == 0
    assert len({body["prompt"]["6"]["inputs"]["text"] for body in standin.submitted}) == len(batch.images()) == 3
    assert standin.worker.executed_jobs == 3


def test_kill_between_the_file_and_its_line_only_adds_the_line(full, standin, collect):
    collect()
    manifest = full.dataset / "manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:-1]))
    record = full.dataset / ".loracat" / "collect.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))
    views = standin.requests.count(("GET", "/view"))
    assert collect().code == 0
    assert manifest.read_text() == "".join(lines)
    assert standin.requests.count(("GET", "/view")) == views
    assert len(standin.submitted) == 1


def test_run_as_a_program_prints_plain_lines_and_no_traceback(batch):
    process = batch.start()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert "3/3 night: 1 new image" in out
    wrong = batch.start(GLOBAL_SEED="letters", COMFYUI_DELAY="-1")
    out, err = wrong.communicate(timeout=30)
    assert (wrong.returncode, out) == (2, "")
    assert "global_seed" in err
    assert "comfyui_delay" in err
    assert "Traceback" not in err


def test_check_lists_all_problems_with_remedies(batch, standin, collect):
    graph = workflow("per_batch_ksampler.json")
    graph["50"] = {"class_type": "IPAdapterUnifiedLoader", "inputs": {}}
    graph["4"]["inputs"]["ckpt_name"] = "absent.safetensors"
    batch.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    result = collect("--check")
    assert result.code == 4
    assert "no node class IPAdapterUnifiedLoader: install the custom nodes" in result.err
    assert "node 4 (CheckpointLoaderSimple): ComfyUI has no ckpt_name 'absent.safetensors'" in result.err
    batch.write("PROMPTS_FILE", "prompts.json", [{"prompt": ""}])
    result = collect("--check", COMFYUI_ENDPOINT="http://127.0.0.1:9", FACE_REFERENCE=str(batch.root / "absent.png"))
    assert result.code == 2
    for words in ("prompts: entry 1", "face_reference: there is no file", "is ComfyUI running"):
        assert words in result.err
    assert standin.submitted == []
    assert not batch.dataset.exists()


def test_check_without_problems(batch, full, standin, collect):
    assert collect("--check").code == 0
    assert standin.submitted == []


def test_default_workflow_mapping_and_example_prompts_are_valid(space, standin, collect):
    graph = json.loads((REPOSITORY / "workflow_api.json").read_text(encoding="utf-8"))
    for node in graph.values():
        for name, folder in NODES[node["class_type"]].listed.items():
            models = standin.folder / folder
            models.mkdir(parents=True, exist_ok=True)
            (models / node["inputs"][name]).touch()
    space.environment |= {"COMFYUI_WORKFLOW": "", "WORKFLOW_CONFIG": ""}
    assert collect("--check").code == 0
    config = json.loads((REPOSITORY / "config" / "workflow_config.json").read_text(encoding="utf-8"))
    parsed = parse_workflow(graph, config, [])
    assert not parsed.per_batch
    assert parsed.face_inputs == (InputRef("16", "image"),)
    assert len(parsed.output_nodes) >= 40
    assert all(len(upstream_seeds(graph, node)) == 2 and len(prompt_texts(graph, node)) == 2 for node in parsed.output_nodes)
    problems = []
    assert len(parse_entries(json.loads((REPOSITORY / "prompts_example.json").read_text(encoding="utf-8")), problems)) == 40
    assert problems == []


def test_progress_bar_is_shown_in_terminals_only(batch, collect, monkeypatch):
    assert "%|" not in collect().err
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert collect(NEW_SEEDS="1").code == 0
    assert "3/3" in terminal.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_not_a_file_is_named_and_not_waited_for(collect, batch, tmp_path, make):
    make(tmp_path / "odd")
    for key in ("COMFYUI_WORKFLOW", "WORKFLOW_CONFIG", "PROMPTS_FILE", "FACE_REFERENCE", "COMFYUI_CA_BUNDLE"):
        result = collect(**{key: str(tmp_path / "odd")})
        assert result.code == 2
        assert re.search(rf"{key.lower()}: .*odd cannot be read: (Is a directory|Not a regular file)", result.err)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"http_proxy": "http://me:hunter2@127.0.0.1:99999"}, "http_proxy is not a valid address: its port"),
        ({"HTTP_PROXY": "foo://me:hunter2@127.0.0.1:9"}, "HTTP_PROXY is not a valid address"),
        ({"ALL_PROXY": "socks5://me:hunter2@127.0.0.1:9"}, "through the proxy: Missing dependencies for SOCKS"),
    ],
)
def test_a_malformed_proxy_is_named_without_its_login(collect, batch, monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = collect("--check", COMFYUI_ENDPOINT="http://comfyui.example:8188")
    assert result.code == 4
    assert words in result.err
    assert "hunter2" not in result.err
