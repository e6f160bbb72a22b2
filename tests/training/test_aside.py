"""The process beside training: it answers, says what went wrong there, ends with its parent, and changes no result."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.errors import DataError, ResourceError
from common.settings import REPOSITORY
from training.system.worker_process import worker_process

WAITS = """
import os, signal, time
from training.system.worker_process import worker_process

if __name__ == "__main__":
    with worker_process(wanted=True) as aside:
        print(aside.call(signal.pthread_sigmask, signal.SIG_BLOCK, ()) >= {signal.SIGINT, signal.SIGTERM})
        print(aside.call(os.getpid), flush=True)
        time.sleep(60)
"""
ENCODES_ASIDE = """
import sys
from pathlib import Path
import train_lora
from common.errors import run_main

if __name__ == "__main__":
    from training import trainer as carry_out
    train_lora.NVIDIA = Path("/")  # as on a machine with a GPU
    carry_out.has_room = lambda task: True
    sys.exit(run_main("train_lora", lambda: train_lora.main([])))
"""


def refuse(name: str) -> None:
    raise DataError(f"{name}: cannot be used")


def fail() -> None:
    {}["absent"]


class Stubborn(Exception):
    """Cannot be made of what it shows."""

    def __init__(self, first: str, second: str):
        super().__init__(first + second)


def fail_stubbornly() -> None:
    raise Stubborn("one", "two")


def kill_yourself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_in_the_middle() -> None:
    os._exit(3)


@pytest.fixture
def aside():
    with worker_process(wanted=True) as aside:
        yield aside


def run(folder: Path, code: str, environment: dict[str, str]) -> subprocess.Popen:
    """A program with `code`; it is a file, because a process beside it imports the same file."""
    script = folder / "run.py"
    script.write_text(code)
    environment = os.environ | environment | {"PYTHONPATH": str(REPOSITORY / "scripts")}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, script], env=environment, text=True, **pipes)


def test_it_answers_one_call_after_another_in_another_process(aside):
    assert aside.call(pow, 2, 5) == 32
    first, second = aside.call(os.getpid), aside.call(os.getpid)
    assert first == second != os.getpid()


def test_what_is_raised_there_is_raised_here_with_its_traceback(aside):
    with pytest.raises(DataError, match="cup: cannot be used"):
        aside.call(refuse, "cup")
    with pytest.raises(KeyError) as caught:
        aside.call(fail)
    assert 'in fail\n    {}["absent"]' in caught.value.__notes__[0]


def test_what_cannot_be_pickled_is_told(aside):
    with pytest.raises(RuntimeError, match="Stubborn: onetwo"):
        aside.call(fail_stubbornly)


@pytest.mark.parametrize(
    ("how", "said"), [(kill_yourself, "was killed, as the kernel does"), (exit_in_the_middle, "has ended with exit code 3")]
)
def test_its_death_is_one_line(aside, how, said):
    with pytest.raises(ResourceError, match=said):
        aside.call(how)


def test_it_is_not_started_where_it_is_not_wanted():
    with worker_process(wanted=False) as aside:
        assert aside is None


def test_it_is_deaf_to_signals_and_gone_after_the_block():
    with worker_process(wanted=True) as aside:
        pid = aside.call(os.getpid)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        assert aside.call(os.getpid) == pid
        process = psutil.Process(pid)
    process.wait(timeout=10)


def test_a_run_that_encodes_aside_leaves_what_another_leaves(stage, tmp_path):
    stage.add("astronaut")
    here = stage.trained(NUM_TRAIN_EPOCHS=1)
    before = stage.files()
    stage.output.rename(tmp_path / "first")
    output, errors = run(tmp_path, ENCODES_ASIDE, stage._environment({"NUM_TRAIN_EPOCHS": 1})).communicate()
    assert errors == ""
    assert "images: 1 encoded, 0 in the cache; captions: 2 encoded" in output
    assert "images: 1 encoded, 0 in the cache; captions: 2 encoded" in here
    after = stage.files()
    assert before.keys() == after.keys()
    cached = [name for name in before if name.startswith(("cache/latents", "cache/text")) or name == "lora/metrics.jsonl"]
    assert len(cached) == 4
    assert all(before[name] == after[name] for name in cached)


def test_it_ends_with_a_parent_that_is_killed(tmp_path):
    process = run(tmp_path, WAITS, {})
    assert process.stdout.readline() == "True\n", "the first process beside another hears of signals"
    pid = int(process.stdout.readline())
    child = psutil.Process(pid)
    process.kill()
    process.communicate()
    child.wait(timeout=10)
