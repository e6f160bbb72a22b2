"""What is submitted, and what happens to it when users edit the queue, delete files, or a server refuses it."""

import json
import threading

import pytest
from comfyui_workspace import Workspace, workflow
from test_faults import PROMPTS, assert_complete, keep_busy, wait_for

from collecting.graph import execution_targets
from common.files import read_json_lines
from demo.standin_comfyui.catalogue import VERSIONS
from demo.standin_comfyui.server import StandIn

KEY = "comfyui-made-up-0123456789abcdef"
AGAIN = "submitting it again"


@pytest.fixture
def batch(space):
    space.per_batch(PROMPTS)
    return space


@pytest.fixture
def while_collecting():
    """Run `act` in a thread during the test; an error in it fails the test."""
    errors, threads = [], []

    def start(act):
        def run():
            try:
                act()
            except BaseException as error:
                errors.append(error)

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(20)
    assert errors == []


def in_queue(standin: StandIn, part: str) -> list[str]:
    return [item[1] for item in standin.worker.queue()[f"queue_{part}"]]


def events(space: Workspace) -> list[dict]:
    return read_json_lines(space.dataset / ".loracat" / "collect.jsonl")


# Refused, or dequeued by the collector itself: the next run submits it without a remark.


@pytest.mark.parametrize("status", ["a wrong value", "too_large", "forbidden"])
def test_refused_prompt_is_not_reported_as_unknown_by_the_next_run(batch, standin, collect, status):
    if status == "a wrong value":
        graph = workflow("per_batch_ksampler.json")
        graph["3"]["inputs"]["steps"] = 0
        batch.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    else:
        standin.fault(status, "/prompt")
    for _ in range(2):
        result = collect()
        assert result.code == 4
        assert AGAIN not in result.out + result.err
        assert "Removed this run's" not in result.out
    standin.faults.clear()
    batch.per_batch(PROMPTS)
    assert AGAIN not in (fine := collect()).out
    assert fine.code == 0
    assert_complete(batch)


def test_prompts_that_a_stop_dequeued_are_not_reported_as_unknown(batch, standin, collect):
    standin.worker.seconds_per_job = 20.0
    keep_busy(standin)
    process = batch.start()
    wait_for(lambda: in_queue(standin, "pending"))
    wait_for(lambda: any(event["event"] == "sent" for event in events(batch)))
    process.terminate()
    out, _err = process.communicate(timeout=10)
    assert process.returncode == 143
    assert "Removed this run's waiting prompts from the queue" in out
    assert in_queue(standin, "pending") == []
    sent = [event["prompt_id"] for event in events(batch) if event["event"] == "sent"]
    assert [event["prompt_ids"] for event in events(batch) if event["event"] == "dequeued"] == [sent]
    standin.worker.seconds_per_job = 0.0
    standin.worker.interrupt(None)
    result = collect()
    assert result.code == 0
    assert AGAIN not in result.out
    assert_complete(batch)


# Removed by a user.


@pytest.mark.parametrize("how", ["delete", "clear"])
def test_prompt_that_a_user_removes_from_the_queue_stays_removed(batch, standin, collect, while_collecting, how):
    standin.worker.seconds_per_job = 0.6
    removed = []

    def remove():
        wait_for(lambda: in_queue(standin, "running") and in_queue(standin, "pending"))
        removed.extend(in_queue(standin, "pending"))
        standin.worker.delete_pending(removed if how == "delete" else None)

    while_collecting(remove)
    result = collect()
    assert result.code == 1
    assert "its prompt was removed from ComfyUI's queue" in result.out
    assert AGAIN not in result.out
    assert len(removed) == 1
    assert len(standin.submitted) == 3
    assert_complete(batch, 2)
    assert collect().code == 0  # a new run is a new request
    assert_complete(batch, 3)


def test_only_prompt_that_a_user_removes_while_another_clients_runs_stays_removed(batch, standin, collect, while_collecting):
    batch.per_batch(PROMPTS[:1])
    standin.worker.seconds_per_job = 20.0
    keep_busy(standin)

    def remove():
        # After the collector has seen it waiting.
        wait_for(lambda: len(in_queue(standin, "pending")) == 1 and standin.requests.count(("GET", "/queue")) > 1)
        standin.worker.delete_pending(None)

    while_collecting(remove)
    result = collect()
    assert result.code == 4
    assert "its prompt was removed from ComfyUI's queue" in result.out
    assert len(standin.submitted) == 2


def test_prompt_that_is_removed_before_the_queue_was_read_stays_removed(batch, standin, collect, while_collecting, monkeypatch):
    monkeypatch.setattr("collecting.worker.QUEUE_CHECK_INTERVAL_S", 1.0)
    batch.per_batch(PROMPTS[:2])
    standin.worker.seconds_per_job = 0.3

    def remove():
        wait_for(lambda: in_queue(standin, "running") and in_queue(standin, "pending"))
        standin.worker.delete_pending(None)

    while_collecting(remove)
    result = collect()
    assert result.code == 1
    assert "its prompt was removed from ComfyUI's queue" in result.out
    assert AGAIN not in result.out
    assert len(standin.submitted) == 2


def test_history_that_a_user_clears_loses_nothing(batch, standin, collect, while_collecting):
    standin.worker.seconds_per_job = 0.2
    over = threading.Event()

    def clear():
        while not over.wait(0.001):
            standin.worker.history.clear()

    while_collecting(clear)
    threading.Timer(0.5, over.set).start()
    result = collect()
    assert result.code == 0
    assert_complete(batch)


# A cached answer without its file.


def test_cached_prompt_whose_file_was_deleted_is_run_again_by_itself(batch, standin, collect):
    batch.per_batch(PROMPTS[:1])
    collect(COMFYUI_FREE="0")
    for path in standin.folder.glob("output/**/*.png"):
        path.unlink()
    again = Workspace(batch.root / "again", batch.environment | {"DATASET_DIR": str(batch.root / "again" / "dataset")})
    result = collect(**again.environment, COMFYUI_FREE="0")
    assert result.code == 0
    assert "prompt 1: ComfyUI answered from its cache, but the files are gone; submitting it again" in result.out
    assert standin.requests.count(("POST", "/free")) == 1
    assert_complete(again, 1)
    assert again.manifest()[0]["seeds"] == {"3.seed": 0}


def test_only_nodes_whose_files_are_gone_are_run_again(space, standin, collect):
    space.full_workflow()
    collect(COMFYUI_FREE="0")
    nodes = [line["node"] for line in space.manifest()]
    entry = next(iter(standin.worker.history.values()))
    (record,) = entry["outputs"][nodes[1]]["images"]
    (standin.folder / "output" / record["subfolder"] / record["filename"]).unlink()
    again = Workspace(space.root / "again", space.environment | {"DATASET_DIR": str(space.root / "again" / "dataset")})
    result = collect(**again.environment)
    assert result.code == 0
    targets = standin.submitted[-1]["partial_execution_targets"]
    assert nodes[1] in targets
    assert not {nodes[0], nodes[2]} & set(targets)
    assert_complete(again, 3)
    assert AGAIN not in (finished := collect(**again.environment)).out
    assert finished.code == 0


def test_file_that_is_gone_after_the_second_time_is_reported(batch, standin, collect):
    batch.per_batch([{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1, "name": "again"}])
    standin.fault("image_gone")
    result = collect()
    assert result.code == 4
    assert result.out.count(AGAIN) <= 1
    assert "no longer has the file" in result.out


# Which nodes run.


def graph_with_displays() -> dict:
    return {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["9", 0], "text": "a"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "kept"}},
        "4": {"class_type": "KSampler", "inputs": {"positive": ["1", 0], "negative": ["1", 0]}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "else"}},
        "6": {"class_type": "Upscale", "inputs": {"image": ["4", 0]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
        "8": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["9", 0], "text": "b"}},
        "9": {"class_type": "CLIPLoader", "inputs": {}},
        "10": {"class_type": "PreviewAny", "inputs": {"source": ["8", 0]}},
        "11": {"class_type": "Note", "inputs": {}},
    }


def test_kept_nodes_and_displays_of_what_they_need_are_targets():
    assert execution_targets(graph_with_displays(), ["3"]) == ["3", "2"]


def test_without_anything_to_leave_out_there_are_no_targets():
    graph = {node_id: node for node_id, node in graph_with_displays().items() if node_id in ("1", "2", "3", "4", "9")}
    assert execution_targets(graph, ["3"]) is None


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("fault", [None, "targets_ignored"])
def test_nodes_without_the_prefix_do_not_run_unless_the_server_ignores_the_key(space, tmp_path, collect, version, fault):
    space.full_workflow()
    with StandIn(tmp_path / "second", version=version) as standin:
        if fault:
            standin.fault(fault)
        assert collect(COMFYUI_ENDPOINT=standin.url).code == 0
        ran = set(next(iter(standin.worker.history.values()))["outputs"])
    graph = workflow("full_workflow_no_model.json")
    saved = {node_id for node_id, node in graph.items() if node["class_type"] == "SaveImage"}
    kept = {line["node"] for line in space.manifest()}
    assert kept < saved
    assert ran & saved == (saved if fault else kept)
    assert_complete(space, len(kept))


# What is sent with it.


def test_key_for_partner_nodes_is_sent_and_written_nowhere(batch, standin, collect, capsys):
    result = collect(COMFYUI_API_KEY=KEY)
    assert result.code == 0
    assert [body["extra_data"] for body in standin.submitted] == [{"api_key_comfy_org": KEY}] * 3
    written = [path.read_bytes() for path in batch.dataset.rglob("*") if path.is_file()]
    assert KEY not in result.out + result.err
    assert len(written) > 4
    assert not any(KEY.encode() in content for content in written)
    with pytest.raises(SystemExit):
        collect("--settings", COMFYUI_API_KEY=KEY)
    assert KEY not in capsys.readouterr().out


def test_without_a_key_no_extra_data_is_sent(batch, standin, collect):
    collect()
    assert [body for body in standin.submitted if "extra_data" in body] == []


@pytest.mark.parametrize("key", ["two words", "line\n", "schlüssel"])
def test_malformed_key_is_a_wrong_setting_and_not_shown(batch, standin, collect, key):
    result = collect(COMFYUI_API_KEY=key)
    assert result.code == 2
    assert "comfyui_api_key: must consist of ASCII characters" in result.err
    assert key not in result.err
    assert standin.requests == []


def test_face_that_is_too_large_is_named_before_it_is_sent(batch, tmp_path, collect):
    with StandIn(tmp_path / "small", max_upload_bytes=1100) as standin:
        (batch.root / "face.png").write_bytes((batch.root / "face.png").read_bytes() + bytes(200))
        for flags in ([], ["--check"]):
            result = collect(*flags, COMFYUI_ENDPOINT=standin.url)
            assert result.code == 4
            assert "does not accept the face reference: it has 0.0 MiB, and at most 0.0 MiB can be uploaded" in result.err
            assert "start ComfyUI with --max-upload-size 1" in result.err
        assert ("POST", "/upload/image") not in standin.requests


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"max_upload_size": "large"}', b'{"max_upload_size": -1}', b'{"max_upload_size": true}', b"{}"]
)
def test_server_that_names_no_upload_limit_is_supported(batch, standin, collect, monkeypatch, body):
    real = standin._features
    monkeypatch.setattr(standin, "_features", lambda: json.loads(body or b"null"))
    assert collect().code == 0
    assert real()["max_upload_size"] == 100 * 2**20
