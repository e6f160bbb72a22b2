"""How a stage ends: one line and an exit code, also when nothing reads its output any more."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from common.errors import abbreviated, as_loracat_error
from common.settings import REPOSITORY

STAGE = """
import sys
sys.path.insert(0, {scripts!r})
from common.errors import DataError, run_main

def main():
    {body}

sys.exit(run_main("a_stage", main))
"""


def stage(body: str, *, closed: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """A process with `body` as the main of a stage; `closed`: the reader of its output has gone."""
    program = STAGE.format(scripts=str(REPOSITORY / "scripts"), body=body)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, env=environment
    ) as process:
        if closed:
            process.stdout.close()
            process.stdout = None
        out, err = process.communicate(b"go\n", timeout=60)
    return subprocess.CompletedProcess([], process.returncode, out, err.decode())


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("body", ["input(); print('a line')", "input(); print('line\\n' * 10_000); print('more')"])
def test_closed_output_ends_with_the_code_of_sigpipe(body, unbuffered):
    done = stage(body, closed=True, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 141
    assert done.stderr == "a_stage: stopped by SIGPIPE; run the same command again to resume\n"


def test_closed_output_does_not_change_the_code_of_an_error():
    done = stage("input(); print('a line'); raise DataError('no images')", closed=True)
    assert (done.returncode, done.stderr) == (3, "a_stage: no images\n")


def test_text_that_cannot_be_encoded_is_escaped():
    done = stage("print('\\udcff.png'); raise DataError('\\ud800 \\u732b')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"\\udcff.png\n", "a_stage: \\ud800 \\u732b\n")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "give this user the permission to read it, or make the folder writable for this user"),
        (errno.ENOSPC, "free disk space, or make the folder writable for this user"),
    ],
)
def test_a_missing_permission_is_no_matter_of_disk_space(number, remedy):
    error = as_loracat_error(OSError(number, os.strerror(number), "a.png"))
    assert (error.exit_code, str(error)) == (6, f"a.png: {os.strerror(number)}: {remedy}")


def test_long_lists_are_abbreviated():
    assert abbreviated(["a", "b"]) == "a, b"
    assert abbreviated([1, 2, 3], 2) == "1, 2 and 1 more"


IMPORTS = """
import time
from common.errors import exit_on_signals, stop_on_signals

stop_on_signals()
with exit_on_signals("stage"):
    while True:
        try:
            print("importing", flush=True)
            time.sleep(60)
        except BaseException:  # as libraries do here and there
            continue
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_imports_ends_the_process_whatever_they_catch(signum, code):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "scripts")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", IMPORTS], env=environment, **pipes)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signum)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, "")
    assert errors == f"stage: stopped by {signal.Signals(signum).name}; run the same command again to resume\n"
