"""SIGKILL at any instant, also inside a save and while the caches fill: the run that follows ends as if nothing had been.

`make test` kills a few times, `make kill-test` a hundred times, and six times one of a pair of processes.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_python import fork, read_number
from process_table import has_ended, pair_of
from safetensors import safe_open

from common.files import read_json_lines
from common.settings import REPOSITORY

TIMES = ("ss_training_finished_at", "modelspec.date")
VARIABLES = {
    "LEARNING_RATE": 0.01,
    "NUM_TRAIN_EPOCHS": 3,
    "SAVE_EVERY_EPOCHS": 2,
    "SAVE_STATE_EVERY_MINUTES": 1e-6,
    "VALIDATION_FRACTION": 0.3,
    "LORA_TARGETS": "attention",
}
FIRST_CACHED = "first cache file"
PAIR = VARIABLES | {"NUM_PROCESSES": 2, "TRAIN_BATCH_SIZE": 1, "NUM_TRAIN_EPOCHS": 40, "SAVE_EVERY_EPOCHS": 10}

SAMPLED = VARIABLES | {
    "SAMPLES": "true",
    "SAMPLE_STEPS": 2,
    "SAVE_EVERY_EPOCHS": 1,
    "FACE_MODEL": "dlib",
    "PYTHONPATH": Path(__file__).with_name("standin_dlib"),
}


class Forks:
    """Runs of the stage, forked one after the other."""

    def __init__(self, python: Path, log: Path):
        self.log = log
        self._python = python

    def start(self, variables: dict[str, str]) -> int:
        """Start a run; its process id."""
        with open(os.devnull) as nothing, self.log.open("a") as log:
            streams = (nothing.fileno(), log.fileno(), log.fileno())
            environment = os.environ | variables
            process, self._connection = fork(self._python, [str(REPOSITORY / "scripts" / "train_lora.py")], environment, streams)
        return process

    def ended(self) -> int:
        """Wait for the run that was started; its exit code, negative for a signal."""
        with self._connection as connection:
            return os.waitstatus_to_exitcode(read_number(connection))


@pytest.fixture
def forks(forked_python, tmp_path):
    return Forks(forked_python, tmp_path / "log")


@pytest.fixture
def victim(stage):
    """A data set whose runs are killed."""
    stage.add("astronaut", caption="sks, woman, smile, orange suit")
    stage.add("coffee", "coffee.jpg", caption="sks, cup, table")
    stage.add("chelsea", "chelsea.webp", caption="sks, cat, close-up")
    stage.add("rocket", "3_rockets/rocket.bmp", caption="sks, rocket, night")
    return stage


def left_by(stage) -> dict[str, object]:
    """What counts of the files of a finished run: LoRA files and metrics, the dates in them aside."""
    found = {}
    for path in sorted((stage.output / "lora").glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            header = {name: value for name, value in file.metadata().items() if name not in TIMES}
            found[path.name] = header, {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    found["metrics"] = (stage.output / "lora" / "metrics.jsonl").read_bytes()
    return found


def being_written(folder: Path) -> bool:
    """Whether a file in `folder` is half written at this moment."""
    return any(path.name.startswith(".") and path.name != ".lock" for path in folder.rglob("*")) if folder.is_dir() else False


def moment(stage, kind: str, chance: random.Random, whole_run_s: float):
    """A function that says whether the moment has come at which a run is to be killed."""
    begin, after = time.monotonic(), chance.uniform(0, whole_run_s)
    folder = {"save": stage.output / "state", "cache": stage.output / "cache", "lora": stage.output / "lora"}.get(kind)
    skipped = chance.randrange(4)
    seen = False

    def has_come() -> bool:
        nonlocal skipped, seen
        if kind == FIRST_CACHED:
            return any(True for _ in (stage.output / "cache").glob("*/*.safetensors"))
        if folder is None:
            return time.monotonic() - begin > after
        now = being_written(folder)
        skipped -= seen and not now
        seen = now
        return now and skipped <= 0

    return has_come


def was_killed(stage, forks, has_come: Callable[[], bool]) -> bool:
    """Start a run and kill it when the moment has come; False if it ended before, with exit code 0."""
    process = forks.start({name: str(value) for name, value in (stage.variables | VARIABLES).items()})
    while not has_ended(process):
        if has_come():
            os.kill(process, signal.SIGKILL)
            break
        time.sleep(0.0005)
    code = forks.ended()
    assert code in (0, -signal.SIGKILL), forks.log.read_text()
    return code != 0


def killed_until_done(stage, forks, kills: int, chance: random.Random, expected: dict, whole_run_s: float) -> Counter:
    """Start runs and kill them until `kills` of them were killed, a tenth of them, but at least one, when the first file of the
    cache has appeared. Whatever ends is compared with `expected`. Returns how often each kind of moment was hit, and how many
    runs came to their end."""
    hits: Counter = Counter()
    while (killed := hits.total() - hits["ended"]) < kills or hits["ended"] == 0:
        kind = chance.choice(("any", "any", "save", "save", "cache", "lora"))
        if hits[FIRST_CACHED] < max(1, kills // 10):
            kind = FIRST_CACHED
            shutil.rmtree(stage.output, ignore_errors=True)
        if was_killed(stage, forks, moment(stage, kind, chance, whole_run_s) if killed < kills else lambda: False):
            hits[kind] += 1
            continue
        assert left_by(stage) == expected
        assert not being_written(stage.output / "state")
        hits["ended"] += 1
        for folder in chance.choice(([""], ["lora", "state"])):
            shutil.rmtree(stage.output / folder)
    return hits


def uninterrupted(stage, forks) -> tuple[dict, float]:
    """What a run leaves that nobody kills, and how long it takes; its output folder is emptied again."""
    begin = time.monotonic()
    forks.start({name: str(value) for name, value in (stage.variables | VARIABLES).items()})
    assert forks.ended() == 0, forks.log.read_text()
    took = time.monotonic() - begin
    expected = left_by(stage)
    assert {"sks.safetensors", "sks-best.safetensors", "sks-000002.safetensors"} <= expected.keys()
    shutil.rmtree(stage.output)
    return expected, took


def test_a_few_kills(victim, forks):
    expected, took = uninterrupted(victim, forks)
    killed_until_done(victim, forks, 2, random.Random(), expected, took)


@pytest.mark.kill
@pytest.mark.timeout(7200)
def test_a_hundred_kills(victim, forks, capsys):
    seed, begin = int(time.time()), time.monotonic()
    expected, took = uninterrupted(victim, forks)
    hits = killed_until_done(victim, forks, 100, random.Random(seed), expected, took)
    with capsys.disabled():
        print(f"\nseed {seed}: killed {dict(hits)} in {time.monotonic() - begin:.0f} s; a whole run takes {took:.1f} s")
    assert hits["save"] >= 5


def images_of(stage) -> dict[str, object]:
    """The files of sample images, and the faces that were found in images."""
    folder = stage.output / "samples"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files | {"faces": {line["sha256"]: line for line in read_json_lines(stage.output / "cache" / "faces.jsonl")}}


@pytest.mark.kill
@pytest.mark.timeout(3600)
def test_twenty_kills_while_images_are_rendered_and_scored(victim, forks, capsys):
    """Also between an image and the record of its row, and while the last images are scored or the recommended file is written."""
    seed = int(time.time())
    chance, killed, ended = random.Random(seed), 0, 0
    variables = {name: str(value) for name, value in (victim.variables | SAMPLED).items()}
    forks.start(variables)
    assert forks.ended() == 0, forks.log.read_text()
    expected = left_by(victim), images_of(victim)
    count = sum(name.endswith(".png") for name in expected[1])
    shutil.rmtree(victim.output)
    folder = victim.output / "samples" / "sks"
    while killed < 20 or not ended:
        present = len(list(folder.glob("*.png")))
        images, delay_s = chance.randint(min(present + 1, count), count), chance.choice((0, 0.002, 0.01, 0.05, 0.3))
        is_spared = killed >= 20
        if present == count:  # only the scores are missing, or the results
            delay_s, is_spared = chance.uniform(0, 2), is_spared or chance.random() < 0.5
        process = forks.start(variables)
        while not has_ended(process):
            if not is_spared and len(list(folder.glob("*.png"))) >= images:
                time.sleep(delay_s)
                os.kill(process, signal.SIGKILL)
                break
            time.sleep(0.0005)
        code = forks.ended()
        if code == -signal.SIGKILL:
            killed += 1
            continue
        assert code == 0, (seed, forks.log.read_text())
        assert (left_by(victim), images_of(victim)) == expected, seed
        ended += 1
        shutil.rmtree(victim.output)
    with capsys.disabled():
        print(f"\nseed {seed}: killed {killed} times, {ended} runs ended")


def uninterrupted_pair(stage) -> tuple[dict, float]:
    """What a pair leaves that nobody kills, and after how long it takes its first step; the output folder is emptied again."""
    begin = time.monotonic()
    run = stage.start(**PAIR)
    stage.wait_for_steps(run, 1)
    first_step_s = time.monotonic() - begin
    _, said = run.communicate()
    assert (run.returncode, said) == (0, "")
    expected = left_by(stage)
    shutil.rmtree(stage.output)
    return expected, first_step_s


@pytest.mark.kill
@pytest.mark.timeout(1800)
def test_six_kills_of_a_pair(victim, capsys):
    """The launcher, the first and the second process are killed twice each, once before the first step and once between
    steps; nobody is left over, and the run that follows goes on."""
    seed = int(time.time())
    chance = random.Random(seed)
    expected, first_step_s = uninterrupted_pair(victim)
    kills = [(who, trains) for who in ("launcher", "first", "second") for trains in (False, True)]
    chance.shuffle(kills)
    slowest_s = 0.0
    for who, trains in kills:
        run = victim.start(**PAIR)
        processes = [run.pid, *pair_of(run)]
        if trains:
            victim.wait_for_steps(run, victim.steps_taken() + chance.randint(1, 8))
        time.sleep(chance.uniform(0, 0.1 if trains else first_step_s))
        assert run.poll() is None, run.communicate()
        os.kill(processes[("launcher", "first", "second").index(who)], signal.SIGKILL)
        begin = time.monotonic()
        _, said = run.communicate(timeout=60)
        while not all(map(has_ended, processes)):
            assert time.monotonic() - begin < 60, (seed, who, trains)
            time.sleep(0.005)
        slowest_s = max(slowest_s, time.monotonic() - begin)
        assert run.returncode == (-signal.SIGKILL if who == "launcher" else 6), (seed, who, said)
        assert "Traceback" not in said
    last = victim.start(**PAIR)
    output, said = last.communicate()
    assert (last.returncode, said) == (0, "")
    assert "continuing at step" in output
    assert left_by(victim) == expected
    with capsys.disabled():
        print(f"\nseed {seed}: the last process was gone {slowest_s:.1f} s after a kill")
