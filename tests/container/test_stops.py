"""A container that is stopped or killed in each stage, and its output on a terminal and in a file."""

import os
import pty
import subprocess
import termios
import threading
import time
import uuid

import pytest
from container_clone import ONE_THREAD, OWNER, docker
from PIL import Image

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]

GRACE_S = 120
"""As in docker-compose.yml."""


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.05)


class Running:
    """A run in the background whose output is read continuously."""

    def __init__(self, clone, *flags: str, **variables: str):
        self.name = f"loracat-test-{uuid.uuid4().hex[:8]}"
        self.process = clone.start(*flags, name=self.name, **variables)
        self.output = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.output += line

    def ended(self) -> int:
        code = self.process.wait(timeout=GRACE_S)
        self._reader.join()
        self.process.stdout.close()
        return code


def many_images(clone, count: int) -> None:
    """Images that keep the tagger busy for some seconds."""
    folder = clone.folder / "dataset" / "images"
    for number in range(count):
        Image.effect_noise((1600, 1600), 40 + number).convert("RGB").save(folder / f"{number:03}.png", compress_level=1)
    clone.give_to(OWNER, "dataset")


# stage -> (variables that make it long, the files that it writes one by one)
STAGES = {
    "collect": ({}, "dataset/images/*.png"),
    "caption": ({"CAPTION_BATCH_SIZE": "1"}, "dataset/.loracat/tags/*/*.npy"),
    "train": ({"NUM_TRAIN_EPOCHS": "60", "SAVE_EVERY_EPOCHS": "5"}, "output/lora/*-0*.safetensors"),
}


@pytest.fixture
def start_stage(clone, comfyui):
    """`start_stage(stage)` starts it and waits until it is in the middle of its work; it is removed after the test."""
    started = []

    def start(stage: str) -> Running:
        variables, pattern = STAGES[stage]
        if stage == "collect":
            comfyui.worker.seconds_per_job = 1.0
        if stage == "caption":
            many_images(clone, 60)
        if stage == "train":
            prepared = clone.run("--collect", "--caption")
            assert prepared.returncode == 0, prepared.stdout
        running = Running(clone, f"--{stage}", **variables)
        started.append(running.name)
        wait_for(lambda: len(list(clone.folder.glob(pattern))) >= 2 or running.process.poll() is not None, pattern)
        assert running.process.poll() is None, running.output
        return running

    yield start
    docker("rm", "--force", *started, check=False)


def finish(clone, stage: str) -> str:
    """Run the same command again, to its end, and return its output."""
    done = clone.run(f"--{stage}", **STAGES[stage][0])
    assert done.returncode == 0, done.stdout
    assert clone.owners() == {OWNER}
    return done.stdout


def is_complete(clone, stage: str) -> bool:
    images = clone.folder / "dataset" / "images"
    files, captions = list(images.glob("*.png")), list(images.glob("*.txt"))
    lines = (clone.folder / "dataset" / "manifest.jsonl").read_text().splitlines() if stage != "caption" else []
    return {
        "collect": len(files) == len(lines) == 10,
        "caption": len(captions) == len(files) == 60,
        "train": clone.lora.exists(),
    }[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_docker_stop_ends_a_stage_with_143_and_it_continues(clone, start_stage, stage):
    running = start_stage(stage)
    processes = docker("top", running.name, "-eo", "pid,uid,args").splitlines()
    users = {line.split()[1] for line in processes if "/app/scripts" in line}
    assert users == {str(OWNER)}
    stopped_at = time.monotonic()
    docker("stop", running.name)
    assert running.ended() == 143
    assert time.monotonic() - stopped_at < GRACE_S
    assert "stopped by SIGTERM" in running.output
    assert "Traceback" not in running.output
    assert not is_complete(clone, stage)
    if stage == "train":
        assert list((clone.folder / "output" / "state").glob("*/*"))
    output = finish(clone, stage)
    assert is_complete(clone, stage)
    assert stage != "train" or "continuing at step" in output


@pytest.mark.parametrize("stage", STAGES)
def test_killed_stage_continues(clone, start_stage, stage):
    running = start_stage(stage)
    docker("kill", running.name)
    assert running.ended() == 137
    finish(clone, stage)
    assert is_complete(clone, stage)


def test_piped_log_has_complete_lines_only(clone):
    log = clone.run("--collect", "--caption").stdout
    assert "\r" not in log
    assert "\x1b" not in log
    assert "caption_images: started" in log.splitlines()


def test_terminal_shows_progress(clone):
    assert clone.run("--collect").returncode == 0
    how = clone.compose("run", "--rm", *ONE_THREAD, "loracat-cpu", "--caption")
    screen, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 120))
    process = subprocess.Popen(**{**how, "stdin": end, "stdout": end, "stderr": end})
    os.close(end)
    seen = b""
    while True:
        try:
            seen += os.read(screen, 65536)
        except OSError:  # the other end of the terminal is closed
            break
    os.close(screen)
    assert process.wait() == 0
    assert b"tagging" in seen
    assert b"10/10" in seen
    assert b"10 captioned" in seen
