"""run.sh with stages that only write down how they were called: order, flags, exit codes and signals."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.settings import REPOSITORY

SCRIPTS = ("collect_images", "caption_images", "train_lora")
PATIENCE_S = 60
"""How long a loaded machine may take for anything; an idle one takes a fraction of a second."""
# What a stage does is in the file <name>.does: an exit code, or "wait" for a signal, as `errors.stop_on_signals` has it,
# and then take its time to save, or (with "wait for ever") never end saving. What it does now is in the file `marks`.
STAGE = """
import os, signal, sys, time
from pathlib import Path

here, name = Path(__file__).parent, Path(__file__).stem
with (here / "calls").open("a") as calls:
    print(name, *sys.argv[1:], file=calls)
does = here / (name + ("".join(sys.argv[1:]) if "--settings" in sys.argv else "") + ".does")
does = does.read_text() if does.exists() else "0"
if "--settings" in sys.argv:
    print("a list of settings")
if not does.startswith("wait"):
    print(f"{name} on stderr", file=sys.stderr)
    sys.exit(int(does))

def mark(what):
    with (here / "marks").open("a") as marks:
        print(what, file=marks)

def stop(signum, frame):
    signal.signal(signum, signal.SIG_DFL)
    raise InterruptedError(signum)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
try:
    where = "a terminal" if sys.stderr.isatty() else "no terminal"
    print(f"waiting, stderr is {where}, read: {sys.stdin.read()!r}", file=sys.stderr)
    mark("waits")
    time.sleep(300)
except InterruptedError as stopped:
    mark("saves")
    time.sleep(300 if does == "wait for ever" else 0.3)
    print("saved")
    sys.exit(128 + stopped.args[0])
"""


class House:
    """A repository with the real run.sh and false stages."""

    def __init__(self, root: Path):
        self.root = root
        self.scripts = root / "scripts"
        self.scripts.mkdir(parents=True)
        shutil.copy2(REPOSITORY / "scripts" / "run.sh", self.scripts)
        for name in SCRIPTS:
            (self.scripts / f"{name}.py").write_text(STAGE, encoding="utf-8")

    def let(self, name: str, does: object) -> None:
        (self.scripts / f"{name}.does").write_text(str(does), encoding="utf-8")

    def calls(self) -> list[str]:
        calls = self.scripts / "calls"
        return calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []

    def wait_for_mark(self, mark: str) -> None:
        """Until a stage says that it does `mark`."""
        marks = self.scripts / "marks"
        wait_until(lambda: marks.exists() and mark in marks.read_text(encoding="utf-8").splitlines())

    def stages_run(self) -> list[str]:
        return [call for call in self.calls() if not call.endswith("--settings")]

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **more}

    def run(self, *flags: str, **environment: str) -> subprocess.CompletedProcess:
        how = {"capture_output": True, "text": True, "cwd": "/", "timeout": PATIENCE_S}
        return subprocess.run([self.scripts / "run.sh", *flags], env=self.environment(**environment), **how)


@pytest.fixture(autouse=True)
def signals_that_arrive():
    """A shell that starts the tests in the background has SIGINT and SIGHUP ignored, and bash cannot trap what its parent
    ignored: what this process handles, its children have at its default again."""
    before = {signum: signal.signal(signum, signal.default_int_handler) for signum in (signal.SIGINT, signal.SIGHUP)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def house(tmp_path):
    return House(tmp_path / "a house")


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        ((), SCRIPTS),
        (("--collect",), SCRIPTS[:1]),
        (("--train", "--caption"), SCRIPTS[1:]),
        (("--train", "--collect", "--train"), ("collect_images", "train_lora")),
        (("--caption", "--train", "--collect"), SCRIPTS),
    ],
)
def test_stages_run_in_their_order_after_all_settings_were_looked_at(house, flags, stages):
    done = house.run(*flags)
    assert done.returncode == 0
    assert house.calls() == [*(f"{stage} --settings" for stage in stages), *stages]
    assert "a list of settings" not in done.stdout


@pytest.mark.parametrize("code", [2, 4, 75])
def test_first_stage_that_fails_ends_the_run(house, code):
    house.let("caption_images", code)
    assert house.run().returncode == code
    assert house.stages_run() == ["collect_images", "caption_images"]


def test_failed_items_are_passed_over_and_returned_at_the_end(house):
    house.let("collect_images", 1)
    assert house.run().returncode == 1
    assert house.stages_run() == list(SCRIPTS)
    house.let("train_lora", 5)
    assert house.run().returncode == 5


@pytest.mark.parametrize("strict", ["1", "true"])
def test_strict_stops_at_failed_items(house, strict):
    house.let("collect_images", 1)
    assert house.run(STRICT=strict).returncode == 1
    assert house.stages_run() == ["collect_images"]


@pytest.mark.parametrize("strict", ["", "0", "false"])
def test_strict_can_be_off(house, strict):
    house.let("collect_images", 1)
    assert house.run(STRICT=strict).returncode == 1
    assert house.stages_run() == list(SCRIPTS)


def test_wrong_setting_of_a_later_stage_stops_the_run_before_anything_begins(house):
    house.let("train_lora--settings", 2)
    done = house.run()
    assert done.returncode == 2
    assert "train_lora on stderr" in done.stderr
    assert house.stages_run() == []


@pytest.mark.parametrize(("flags", "stages"), [((), SCRIPTS), (("--train",), SCRIPTS[2:]), (("--train", "--caption"), SCRIPTS[1:])])
def test_check_asks_every_stage_and_returns_the_first_failure(house, flags, stages):
    house.let("caption_images", 5)
    house.let("train_lora", 3)
    assert house.run("--check", *flags).returncode == (3 if len(stages) == 1 else 5)
    assert house.calls() == [f"{stages[0]} --check", *(f"{stage} --check=ahead" for stage in stages[1:])]


def test_check_that_finds_nothing_wrong_returns_0(house):
    assert house.run("--check").returncode == 0


@pytest.mark.parametrize(
    ("flags", "environment"),
    [(["--colect"], {}), (["train"], {}), ([""], {}), (["--train", "-x"], {}), (["--train=1"], {}), ([], {"STRICT": "maybe"})],
)
def test_wrong_usage_is_refused_with_the_usage(house, flags, environment):
    done = house.run(*flags, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("run.sh: ")
    assert "Usage: run.sh" in done.stderr
    assert done.stdout == ""
    assert house.calls() == []


def test_help_shows_the_usage_and_runs_nothing(house):
    done = house.run("--train", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: run.sh")
    assert house.calls() == []


def test_runs_through_a_symbolic_link_and_by_its_name_alone(house, tmp_path):
    link = tmp_path / "elsewhere" / "loracat"
    link.parent.mkdir()
    link.symlink_to(os.path.relpath(house.scripts / "run.sh", link.parent))
    subprocess.run([link, "--train"], env=house.environment(), check=True, cwd=tmp_path)
    subprocess.run(["bash", "run.sh", "--train"], env=house.environment(), check=True, cwd=house.scripts)
    assert house.stages_run() == ["train_lora", "train_lora"]


def test_python_is_that_of_the_repository_unless_named(house):
    own = house.root / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text(f'#!/bin/sh\necho own python\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    own.chmod(0o755)
    assert "own python" in house.run("--train", PYTHON="").stdout
    assert "own python" not in house.run("--train").stdout


@pytest.mark.parametrize("python", ["/nowhere/python", "/tmp", "/bin/false"])
def test_a_python_that_is_not_there_or_lacks_packages_is_one_line(house, python):
    done = house.run("--train", PYTHON=python)
    assert (done.returncode, house.stages_run()) == (2, [])
    assert done.stderr.startswith(f"run.sh: '{python}' is no Python that has torch")
    assert len(done.stderr.splitlines()) == 1


def test_python_is_asked_for_every_package_that_requirements_name():
    asked = re.search(r"^packages=\(([^)]*)\)", (REPOSITORY / "scripts" / "run.sh").read_text(), re.MULTILINE)[1].split()
    module_of = {"pillow": "PIL", "websocket-client": "websocket"}
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    names = [line.partition("==")[0].lower() for line in lines if not line.startswith("#")]
    assert asked == sorted({module_of.get(name, name.replace("-", "_")) for name in names} | {"numpy", "torch"})


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
@pytest.mark.parametrize("to_the_group", [False, True])
def test_signal_is_passed_on_once_and_waited_for(house, signum, code, to_the_group):
    house.let("caption_images", "wait")
    with started(house, stdout=subprocess.PIPE, start_new_session=True) as run:
        house.wait_for_mark("waits")
        (os.killpg if to_the_group else os.kill)(run.pid, signum)
        output = run.communicate(timeout=PATIENCE_S)[0].decode()
    assert run.returncode == code
    assert "saved\n" in output
    assert house.stages_run() == ["collect_images", "caption_images"]


def test_ctrl_c_while_the_settings_are_looked_at_ends_without_a_traceback(house):
    """A Python that still imports its libraries has no handler of ours."""
    importing = "import time; from pathlib import Path; Path(__file__).with_name('marks').write_text('imports'); time.sleep(300)"
    (house.scripts / "caption_images.py").write_text(importing, encoding="utf-8")
    command = [house.scripts / "run.sh", "--caption", "--train"]
    with subprocess.Popen(command, env=house.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        house.wait_for_mark("imports")
        run.send_signal(signal.SIGINT)
        output = run.communicate(timeout=PATIENCE_S)[0]
    assert (run.returncode, output) == (130, b"")


def test_second_signal_ends_the_stage_at_once(house):
    house.let("train_lora", "wait for ever")
    with started(house, "--train", stdout=subprocess.PIPE) as run:
        house.wait_for_mark("waits")
        run.send_signal(signal.SIGTERM)
        house.wait_for_mark("saves")
        run.send_signal(signal.SIGTERM)
        assert b"saved" not in run.communicate(timeout=PATIENCE_S)[0]
    assert run.returncode == 143


def test_stage_that_ends_well_under_a_signal_is_the_last(house):
    script = house.scripts / "collect_images.py"
    script.write_text(STAGE.replace("sys.exit(128 + stopped.args[0])", "sys.exit(0)"), encoding="utf-8")
    house.let("collect_images", "wait")
    with started(house) as run:
        house.wait_for_mark("waits")
        run.send_signal(signal.SIGTERM)
        assert run.wait(PATIENCE_S) == 143
    assert house.stages_run() == ["collect_images"]


def test_ctrl_c_in_a_terminal_reaches_the_stage_once(house):
    house.let("train_lora", "wait")
    code, screen = on_terminal(house, house.scripts / "run.sh", "--train", keys=b"\x03")
    assert code == 130
    assert "stderr is a terminal, read: ''" in screen
    assert "saved" in screen


def test_terminal_that_suspends_background_writers_does_not_suspend_a_stage(house):
    house.let("train_lora", "wait")
    in_such_a_terminal = ("bash", "-c", 'stty tostop; exec "$0" "$@"')
    code, screen = on_terminal(house, *in_such_a_terminal, house.scripts / "run.sh", "--train", keys=b"\x03")
    assert code == 130
    assert "saved" in screen


def test_ctrl_z_suspends_the_stage_too(house):
    house.let("train_lora", "wait")
    with started(house, "--train") as run:
        house.wait_for_mark("waits")
        stage = int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text(encoding="utf-8"))
        run.send_signal(signal.SIGTSTP)
        wait_until(lambda: (state_of(run.pid), state_of(stage)) == ("T", "T"))
        run.send_signal(signal.SIGCONT)
        wait_until(lambda: (state_of(run.pid), state_of(stage)) == ("S", "S"))
        run.send_signal(signal.SIGTERM)
        assert run.wait(PATIENCE_S) == 143


@contextlib.contextmanager
def started(house: House, *flags: str, **how: object) -> Iterator[subprocess.Popen]:
    """run.sh at work. However the test ends, nothing of it is left."""
    command = [house.scripts / "run.sh", *flags]
    with subprocess.Popen(command, env=house.environment(), stderr=subprocess.DEVNULL, **how) as run:
        try:
            yield run
        finally:
            while run.poll() is None:  # the first signal asks the stage to end, the next ones insist
                run.terminate()
                time.sleep(0.2)


def on_terminal(house: House, *command: str | Path, keys: bytes) -> tuple[int, str]:
    """`command` on a terminal of its own, `keys` pressed once its stage waits: its exit code and the screen."""
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    how = {"env": house.environment(), "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", spawn, *command], **how) as terminal:
        house.wait_for_mark("waits")
        terminal.stdin.write(keys)
        terminal.stdin.flush()
        screen = terminal.stdout.read().decode()
    return terminal.returncode, screen


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state_of(pid: int) -> str:
    """The letter that ps shows: S sleeps, T is suspended."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
