"""kill -9 at any instant and run again: the same set of images, and nothing was generated twice.

`make test` tries a few instants, `make kill-test` forty in each mode.
"""

import random
import time
from pathlib import Path

import pytest
from comfyui_workspace import Workspace, png

from demo.standin_comfyui.server import StandIn

SECONDS_PER_JOB = 0.12
LONGEST_WAIT_S = 30.0
PROMPTS = [{"prompt": f"a woman in image {number}", "seed": number} for number in range(5)]
MODES = ("batch", "full")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Mode -> the images of a run that is not killed, and how long it talks to the server."""
    found = {}

    def of(mode: str) -> tuple[dict[str, bytes], float]:
        if mode not in found:
            folder = tmp_path_factory.mktemp(f"whole-{mode}")
            with StandIn(folder / "server", seconds_per_job=SECONDS_PER_JOB) as server:
                space = workspace(folder, mode, server)
                process = space.start()
                wait_for(lambda: server.requests)
                began = time.monotonic()
                assert process.wait(LONGEST_WAIT_S) == 0
                process.communicate()
                found[mode] = space.images(), time.monotonic() - began
        return found[mode]

    return of


def workspace(folder: Path, mode: str, server: StandIn) -> Workspace:
    space = Workspace(folder, {"COMFYUI_ENDPOINT": server.url, "DATASET_DIR": str(folder / "dataset"), "NEW_SEEDS": ""})
    space.write("FACE_REFERENCE", "face.png", png())
    if mode == "batch":
        space.per_batch(PROMPTS)
    else:
        space.full_workflow()
    return space


def wait_for(condition) -> None:
    deadline = time.monotonic() + LONGEST_WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def ends_with(space, images) -> None:
    """Run to the end without errors; then exactly these images are stored."""
    process = space.start()
    out, err = process.communicate(timeout=LONGEST_WAIT_S)
    assert (process.returncode, err) == (0, ""), out
    assert space.images() == images


def kill_once(folder: Path, mode: str, expected: tuple[dict[str, bytes], float], share: float) -> None:
    """Kill after `share` of the time that a whole run talks to the server, then run to the end."""
    images, whole_s = expected
    with StandIn(folder / "server", seconds_per_job=SECONDS_PER_JOB) as server:
        space = workspace(folder, mode, server)
        process = space.start()
        wait_for(lambda: server.requests or process.poll() is not None)
        time.sleep(share * whole_s)
        process.kill()
        process.communicate()
        ends_with(space, images)
        assert sorted(line["file"] for line in space.manifest()) == sorted(f"images/{name}" for name in images)
        assert server.worker.executed_jobs == (len(PROMPTS) if mode == "batch" else 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.05, 0.45, 0.8])
def test_killed_at_a_few_instants(tmp_path, undisturbed, mode, share):
    kill_once(tmp_path, mode, undisturbed(mode), share)


@pytest.mark.kill
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", range(40))
def test_killed_at_a_random_instant(tmp_path, undisturbed, mode, number):
    kill_once(tmp_path, mode, undisturbed(mode), random.Random(f"{mode} {number}").random())


@pytest.mark.kill
@pytest.mark.parametrize("number", range(5))
def test_killed_again_and_again(tmp_path, undisturbed, number):
    """Six kills before the work is done."""
    images, whole_s = undisturbed("batch")
    draws = random.Random(number)
    with StandIn(tmp_path / "server", seconds_per_job=SECONDS_PER_JOB) as server:
        space = workspace(tmp_path, "batch", server)
        for _ in range(6):
            process, before = space.start(), len(server.requests)
            wait_for(lambda before=before, process=process: len(server.requests) > before or process.poll() is not None)
            time.sleep(draws.random() * whole_s / 3)
            process.kill()
            process.communicate()
        ends_with(space, images)
        assert server.worker.executed_jobs == len(PROMPTS)
