"""The worker process: calls, errors and signals, its end, and the same results as without it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.errors import DataError, ResourceError
from common.settings import REPOSITORY
from training.system.processes import worker_process

WAITS = """
import os, signal, time
from training.system.processes import worker_process

if __name__ == "__main__":
    with worker_process(enabled=True) as worker:
        print(worker.call(signal.pthread_sigmask, signal.SIG_BLOCK, ()) >= {signal.SIGINT, signal.SIGTERM})
        print(worker.call(os.getpid), flush=True)
        time.sleep(60)
"""
ENCODES_IN_WORKER = """
import os
import sys
from pathlib import Path
import train_lora
from common.errors import run_main
from training.system.processes import WorkerProcess

if __name__ == "__main__":
    from training import preparation, rehearsal
    train_lora.NVIDIA = Path("/")  # as on a machine with a GPU, in its first run
    train_lora.REHEARSAL_CORES = 1
    train_lora.lacks_kernels = lambda: True
    assert callable(preparation.has_memory_for_everything)
    preparation.has_memory_for_everything = rehearsal.has_memory_for_everything = lambda job, besides=0: True
    call_and_close = WorkerProcess.call_and_close

    def reported(worker, function, *arguments):
        print("worker process:", function.__name__)
        return call_and_close(worker, function, *arguments)

    WorkerProcess.call_and_close = reported
    code = run_main("train_lora", lambda: train_lora.main([]))
    print("PYTORCH_CUDA_ALLOC_CONF:", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    sys.exit(code)
"""


def refuse(name: str) -> None:
    raise DataError(f"{name}: cannot be used")


def fail() -> None:
    {}["absent"]


class Stubborn(Exception):
    """Cannot be unpickled: its constructor takes two arguments, and its args hold one."""

    def __init__(self, first: str, second: str):
        super().__init__(first + second)


def fail_stubbornly() -> None:
    raise Stubborn("one", "two")


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_during_the_call() -> None:
    os._exit(3)


@pytest.fixture
def worker():
    with worker_process(enabled=True) as worker:
        yield worker


def run(folder: Path, code: str, environment: dict[str, str], python: str | Path = sys.executable) -> subprocess.Popen:
    """A program with `code`; it is a file, because its worker process imports the same file."""
    script = folder / "run.py"
    script.write_text(code)
    environment = os.environ | environment | {"PYTHONPATH": str(REPOSITORY / "scripts")}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([python, script], env=environment, text=True, **pipes)


def test_calls_run_one_after_another_in_another_process(worker):
    assert worker.call(pow, 2, 5) == 32
    first, second = worker.call(os.getpid), worker.call(os.getpid)
    assert first == second != os.getpid()


def test_an_exception_is_raised_here_with_its_traceback(worker):
    with pytest.raises(DataError, match="cup: cannot be used"):
        worker.call(refuse, "cup")
    with pytest.raises(KeyError) as caught:
        worker.call(fail)
    assert 'in fail\n    {}["absent"]' in caught.value.__notes__[0]


def test_an_exception_that_cannot_be_pickled_becomes_a_runtime_error(worker):
    with pytest.raises(RuntimeError, match="Stubborn: onetwo"):
        worker.call(fail_stubbornly)


@pytest.mark.parametrize(
    ("end", "message"), [(kill_itself, "was killed, as the kernel does"), (exit_during_the_call, "exited with code 3")]
)
def test_its_death_is_a_resource_error(worker, end, message):
    with pytest.raises(ResourceError, match=message):
        worker.call(end)


def test_it_is_not_started_if_it_is_not_enabled():
    with worker_process(enabled=False) as worker:
        assert worker is None


def test_it_ignores_signals_and_is_gone_after_the_block():
    with worker_process(enabled=True) as worker:
        pid = worker.call(os.getpid)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        assert worker.call(os.getpid) == pid
        process = psutil.Process(pid)
    process.wait(timeout=10)


@pytest.mark.long
def test_encoding_in_a_worker_gives_the_same_files(stage, tmp_path, forked_python):
    stage.add("astronaut")
    here = stage.trained(NUM_TRAIN_EPOCHS=1)
    before = stage.files()
    stage.output.rename(tmp_path / "first")
    environment = stage._environment({"NUM_TRAIN_EPOCHS": 1})
    output, errors = run(tmp_path, ENCODES_IN_WORKER, environment, forked_python).communicate()
    assert errors == ""
    assert "worker process: read_inputs\n" in output
    assert "worker process: _encode_in_worker\n" in output
    assert "worker process: rehearse\n" in output
    assert "compiling ahead" not in output
    assert "PYTORCH_CUDA_ALLOC_CONF: None\n" in output
    assert "images: 1 encoded, 0 in the cache; captions: 2 encoded" in output
    assert "images: 1 encoded, 0 in the cache; captions: 2 encoded" in here
    after = stage.files()
    assert before.keys() == after.keys()
    cached = [name for name in before if name.startswith(("cache/latents", "cache/text")) or name == "lora/metrics.jsonl"]
    assert len(cached) == 4
    assert all(before[name] == after[name] for name in cached)


@pytest.mark.long
def test_where_memory_is_to_be_saved_one_process_does_everything(stage, tmp_path, forked_python):
    stage.add("astronaut")
    environment = stage._environment({"NUM_TRAIN_EPOCHS": 1, "GRADIENT_CHECKPOINTING": "true"})
    output, errors = run(tmp_path, ENCODES_IN_WORKER, environment, forked_python).communicate()
    assert errors == ""
    assert re.findall("worker process: (.*)", output) == ["read_inputs"]
    assert "PYTORCH_CUDA_ALLOC_CONF: expandable_segments:True\n" in output
    assert "images: 1 encoded, 0 in the cache; captions: 2 encoded" in output


def test_it_ends_with_a_parent_that_is_killed(tmp_path):
    process = run(tmp_path, WAITS, {})
    assert process.stdout.readline() == "True\n", "signals are not blocked in the first worker of a process"
    pid = int(process.stdout.readline())
    child = psutil.Process(pid)
    process.kill()
    process.communicate()
    child.wait(timeout=10)
