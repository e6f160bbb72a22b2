"""What the display shows of a run: the node, its step, the images so far and the time left."""

import threading
import time

import pytest
import requests
from comfyui_workspace import png, recorded, workflow

from collecting.harvest import JobResult
from collecting.http import Address
from collecting.jobs import Job, Plan
from collecting.monitor import Display, ExecutionStatus, WebsocketMonitor
from collecting.workflow import parse_workflow

JOB = Job("key", "the workflow", None, None, {})


class RecordingMonitor(WebsocketMonitor):
    """Keeps every status, however short."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.statuses: list[ExecutionStatus | None] = []

    def _dispatch(self, kind, data):
        super()._dispatch(kind, data)
        if kind != "status":
            self.statuses.append(self.status)


@pytest.fixture
def monitor(standin, monkeypatch):
    """A monitor of the stand-in, listening in a thread."""
    monkeypatch.setattr("collecting.monitor.MIN_RECONNECT_DELAY_S", 0.3)
    stopping = threading.Event()
    monitor = RecordingMonitor(Address(standin.url), "client", stopping)
    thread = threading.Thread(target=monitor.listen, daemon=True)
    thread.start()
    yield monitor
    stopping.set()
    standin.websockets.all() and standin.websockets.all()[0].cut()
    thread.join(5)


def statuses_of_a_run(monitor: RecordingMonitor, standin) -> list[ExecutionStatus]:
    """Run one prompt; returns every status while it runs."""
    wait_for(standin.websockets.all)
    graph = recorded("golden.json")[-2]["request"]["json"]["prompt"]
    graph["3"]["inputs"]["steps"] = 5
    (standin.folder / "input" / "face_reference.png").write_bytes(png())
    requests.post(f"{standin.url}/prompt", json={"prompt": graph, "client_id": "client"}, timeout=10)
    wait_for(lambda: monitor.statuses and monitor.statuses[-1] is None)
    return [status for status in monitor.statuses if status is not None]


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_node_step_and_saved_images_are_followed(standin, monitor):
    statuses = statuses_of_a_run(monitor, standin)
    steps = [(status.step, status.steps) for status in statuses if status.node == "3" and status.steps]
    assert list(dict.fromkeys(steps)) == [(step, 5) for step in range(1, 6)]
    assert {number for node, number in statuses[-1].images if node == "9"} == {1}
    assert {"4", "6", "7"} <= statuses[-1].nodes_done


def test_broken_websocket_is_opened_again(standin, monitor):
    wait_for(standin.websockets.all)
    standin.websockets.all()[0].cut()
    wait_for(lambda: standin.requests.count(("GET", "/ws")) >= 2)
    assert [status for status in statuses_of_a_run(monitor, standin) if status.node == "3"]


def test_silent_websocket_is_opened_again(standin, monkeypatch):
    monkeypatch.setattr("collecting.monitor.SILENCE_TIMEOUT_S", 0.1)
    stopping = threading.Event()
    thread = threading.Thread(target=WebsocketMonitor(Address(standin.url), "client", stopping).listen, daemon=True)
    thread.start()
    wait_for(lambda: standin.requests.count(("GET", "/ws")) >= 3)
    stopping.set()
    thread.join(5)


@pytest.fixture
def plan():
    graph, config = workflow("full_workflow_no_model.json"), workflow("full_workflow_no_model.config.json")
    return Plan(parse_workflow(graph, config, []), (), (), None, False)


def test_without_a_terminal_progress_is_logged_once_a_minute(plan, capsys, monkeypatch):
    monitor = WebsocketMonitor(Address("http://host"), "client", threading.Event())
    now_s = [1000.0]
    monkeypatch.setattr("collecting.monitor.time.monotonic", lambda: now_s[0])
    with Display(plan, 1) as display:
        display.update([monitor])
        now_s[0] += 61
        monitor.status = ExecutionStatus("id", "301", 3, 12, frozenset({"16", "20"}), frozenset({("300", 1), ("60", 5)}))
        display.update([monitor])
        display.update([monitor])
        display.report(JobResult(JOB, new=3, notes=["a note"], failures=["a reason"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("1/3 images, node 301 (SaveImage) step 3/12, ")
    assert lines[0].endswith(" left")
    assert lines[1:] == ["1/1 the workflow: 3 new images; FAILED:", "    a note", "    a reason"]


def test_number_of_images_does_not_fall_between_the_end_of_a_prompt_and_its_result(plan, capsys, monkeypatch):
    monkeypatch.setattr("collecting.monitor.LINE_INTERVAL_S", 0.0)
    monitor, other = (WebsocketMonitor(Address("http://host"), "client", threading.Event()) for _ in range(2))
    other.status = ExecutionStatus("another", "16")
    with Display(plan, 1) as display:
        monitor.status = ExecutionStatus("id", "301", images=frozenset({("300", 1), ("301", 1)}))
        display.update([monitor, other])
        monitor.status = None
        display.update([monitor, other])
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["2/3 images", "2/3 images"]


def test_time_left_is_estimated_from_the_share_that_is_done(plan, capsys, monkeypatch):
    monitor = WebsocketMonitor(Address("http://host"), "client", threading.Event())
    now_s = [0.0]
    monkeypatch.setattr("collecting.monitor.time.monotonic", lambda: now_s[0])
    nodes = list(plan.workflow.graph)
    with Display(plan, 1) as display:
        now_s[0] = 600.0
        half = frozenset(nodes[: len(nodes) // 2])
        monitor.status = ExecutionStatus("id", nodes[-1], len(nodes) % 2, 2, half)
        display.update([monitor])
    assert capsys.readouterr().out.rstrip().endswith("10:00 left")
