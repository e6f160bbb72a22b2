"""What is seen of a run that takes long: the node, its step, the images so far and the time left."""

import threading
import time

import pytest
import requests
from comfyui_workspace import png, recorded, workflow

from collecting.harvest import Outcome
from collecting.http import Address
from collecting.jobs import Plan
from collecting.monitor import Display, Live, Moment
from collecting.workflow import understand


class Remembering(Live):
    """Keeps every moment, however short."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.moments: list[Moment | None] = []

    def _understand(self, kind, data):
        super()._understand(kind, data)
        if kind != "status":
            self.moments.append(self.moment)


@pytest.fixture
def live(standin, monkeypatch):
    """A listener at the stand-in, in a thread of its own."""
    monkeypatch.setattr("collecting.monitor.FIRST_PAUSE_S", 0.3)
    stopping = threading.Event()
    listener = Remembering(Address(standin.url), "client", stopping)
    thread = threading.Thread(target=listener.listen, daemon=True)
    thread.start()
    yield listener
    stopping.set()
    standin.listeners.all() and standin.listeners.all()[0].cut()
    thread.join(5)


def seen(live: Remembering, standin) -> list[Moment]:
    """Every moment of one run."""
    wait_for(standin.listeners.all)
    graph = recorded("golden.json")[-2]["request"]["json"]["prompt"]
    graph["3"]["inputs"]["steps"] = 5
    (standin.folder / "input" / "face_reference.png").write_bytes(png())
    requests.post(f"{standin.url}/prompt", json={"prompt": graph, "client_id": "client"}, timeout=10)
    wait_for(lambda: live.moments and live.moments[-1] is None)
    return [moment for moment in live.moments if moment is not None]


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_node_step_and_saved_images_are_seen(standin, live):
    moments = seen(live, standin)
    steps = [(moment.step, moment.steps) for moment in moments if moment.node == "3" and moment.steps]
    assert list(dict.fromkeys(steps)) == [(step, 5) for step in range(1, 6)]
    assert moments[-1].saved_by(("9",)) == 1
    assert {"4", "6", "7"} <= moments[-1].nodes_done


def test_socket_that_breaks_is_opened_again(standin, live):
    wait_for(standin.listeners.all)
    standin.listeners.all()[0].cut()
    wait_for(lambda: standin.requests.count(("GET", "/ws")) >= 2)
    assert [moment for moment in seen(live, standin) if moment.node == "3"]


def test_silent_socket_is_opened_again(standin, monkeypatch):
    monkeypatch.setattr("collecting.monitor.SILENCE_S", 0.1)
    stopping = threading.Event()
    thread = threading.Thread(target=Live(Address(standin.url), "client", stopping).listen, daemon=True)
    thread.start()
    wait_for(lambda: standin.requests.count(("GET", "/ws")) >= 3)
    stopping.set()
    thread.join(5)


@pytest.fixture
def plan():
    graph, config = workflow("full_workflow_no_model.json"), workflow("full_workflow_no_model.config.json")
    return Plan(understand(graph, config, []), (), None, None, False)


def test_without_a_terminal_what_runs_is_a_line_now_and_then(plan, capsys, monkeypatch):
    listener = Live(Address("http://host"), "client", threading.Event())
    now_s = [1000.0]
    monkeypatch.setattr("collecting.monitor.time.monotonic", lambda: now_s[0])
    with Display(plan, 1) as display:
        display.show([listener])
        now_s[0] += 61
        listener.moment = Moment("id", "301", 3, 12, frozenset({"16", "20"}), frozenset({("300", 1), ("60", 5)}))
        display.show([listener])
        display.show([listener])
        display.tell("the workflow", Outcome(new=3, notes=["a word"], failures=["a reason"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("1/3 images, node 301 (SaveImage) step 3/12, ")
    assert lines[0].endswith(" left")
    assert lines[1:] == ["1/1 the workflow: 3 new images; FAILED:", "    a word", "    a reason"]


def test_images_that_were_seen_are_not_taken_back_before_the_outcome_is_known(plan, capsys, monkeypatch):
    monkeypatch.setattr("collecting.monitor.LINE_EVERY_S", 0.0)
    listener, other = (Live(Address("http://host"), "client", threading.Event()) for _ in range(2))
    other.moment = Moment("another", "16")
    with Display(plan, 1) as display:
        listener.moment = Moment("id", "301", images=frozenset({("300", 1), ("301", 1)}))
        display.show([listener, other])
        listener.moment = None
        display.show([listener, other])
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["2/3 images", "2/3 images"]


def test_time_left_comes_from_the_share_that_is_done(plan, capsys, monkeypatch):
    listener = Live(Address("http://host"), "client", threading.Event())
    now_s = [0.0]
    monkeypatch.setattr("collecting.monitor.time.monotonic", lambda: now_s[0])
    nodes = list(plan.workflow.graph)
    with Display(plan, 1) as display:
        now_s[0] = 600.0
        half = frozenset(nodes[: len(nodes) // 2])
        listener.moment = Moment("id", nodes[-1], len(nodes) % 2, 2, half)
        display.show([listener])
    assert capsys.readouterr().out.rstrip().endswith("10:00 left")
