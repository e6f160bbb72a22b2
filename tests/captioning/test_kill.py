"""SIGKILL at any instant, also inside a write: the runs that follow end as if nothing had been.

`make test` kills a few times, `make kill-test` a hundred times.
"""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hub_server import NAME, hub
from PIL import Image, ImageEnhance

from common.files import read_json_lines
from common.settings import REPOSITORY

PARTIAL = re.compile(r"\..+\.part|\.tmp.*|.+\.incomplete")
KINDS = ("any", "download", "records", "tags", "captions", "log", "faces")
"""When a run is killed: after a random time; while a file of the tagger, a record, an entry of the tag cache or a caption is being
written; when a change of a caption, or the faces of an image, have been recorded."""
USERS = {
    "coffee.txt": b"\xef\xbb\xbfnyafyi_woman, my own words\r\n",
    "chelsea.caption": b"a cat of mine",
    "5_night/rocket.txt": b"a rocket, night",
}
PATIENCE_S = 60


class Victim:
    """A data set whose runs are killed."""

    def __init__(self, stage, endpoint: str):
        self.stage, self.images, self.records = stage, stage.images, stage.record.parent
        online = {"CAPTION_MODEL": NAME, "FACE_MODEL": "dlib", "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
        self.stage.variables |= online | {"CAPTION_BATCH_SIZE": "1", "CAPTION_PRUNE_TRAITS": "0.9"}
        self.log = stage.models.with_name("log")
        self.whole_run_s = 0.0
        self.expected: dict[str, object] = {}
        self.originals = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in self._files() if path.suffix != ".txt"}

    def start(self) -> subprocess.Popen:
        environment = self.stage._environment({})
        command = [sys.executable, str(REPOSITORY / "scripts" / "caption_images.py")]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def run_undisturbed(self) -> None:
        """Remember what a run leaves that is not killed."""
        begin = time.monotonic()
        assert self.start().wait(PATIENCE_S) == 0, self.log.read_text()
        self.whole_run_s = time.monotonic() - begin
        self.expected = self.left()
        assert {"audit.json", "likeness.json", "pictures.json", "traits.json"} <= self.expected.keys()
        assert len(self.expected["changes"]) == 4

    def left(self) -> dict[str, object]:
        """Captions and records. Of the logs what they say in the end: a run that was killed may have begun a line twice."""
        found: dict[str, object] = dict(self.stage.captions_as_bytes())
        for path in self.records.rglob("*"):
            if path.is_file() and path.suffix != ".jsonl" and not PARTIAL.fullmatch(path.name):
                found[path.relative_to(self.records).as_posix()] = path.read_bytes()
            if path.name == "model.json":  # a model that was downloaded again has other times of change
                found[path.relative_to(self.records).as_posix()] = json.loads(path.read_bytes()) | {"stamps": None}
        found["changes"] = {line["caption"]: line["after"] for line in read_json_lines(self.stage.record)}
        found["faces"] = {line["sha256"]: line["faces"] for line in read_json_lines(self.records / "faces.jsonl")}
        return found

    def require_expected(self) -> None:
        """A run has ended: nothing differs from an undisturbed one, also after another run, which removes what is left over."""
        assert self.left() == self.expected
        for path in self.partial_files():
            os.utime(path, (0, 0))  # younger ones may belong to a run at work
        again = self.stage.run()
        assert (again.returncode, again.stderr) == (0, "")
        assert self.left() == self.expected
        assert self.partial_files() == []
        assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in self.originals} == self.originals
        assert "Traceback" not in self.log.read_text()

    def reset(self) -> None:
        """Undo all runs, which leaves the captions of the user, and remove records and tagger."""
        while "nothing to undo" not in (undone := self.stage.run("--undo")).stdout:
            assert (undone.returncode, undone.stderr) == (0, "")
            assert "not restored" not in undone.stdout
        assert {name: content for name, content in USERS.items() if name.endswith(".txt")} == self.stage.captions_as_bytes()
        for folder in (self.records, self.stage.models):
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()

    def partial_files(self) -> list[Path]:
        return [path for path in self._files() if PARTIAL.fullmatch(path.name)]

    def _files(self) -> list[Path]:
        folders = (self.images.parent, self.stage.models)
        return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def victim(stage, photographs, tiny):
    """See `Victim`: five small images, two with a face, and captions of the user for three of them."""
    pytest.importorskip("dlib")
    face = photographs["astronaut"].crop((110, 20, 330, 240))
    small = {name: photographs[name].resize((160, 120)) for name in ("coffee", "chelsea", "rocket")}
    files: dict[str, Image.Image] = {"face.png": face, "dark.png": ImageEnhance.Brightness(face).enhance(0.6)}
    files |= {"coffee.jpg": small["coffee"], "chelsea.webp": small["chelsea"], "5_night/rocket.bmp": small["rocket"]}
    (stage.images / "5_night").mkdir()
    for name, image in files.items():
        image.save(stage.images / name)
    for name, content in USERS.items():
        (stage.images / name).write_bytes(content)
    with hub(tiny) as served:
        yield Victim(stage, served.endpoint)


def moment(victim: Victim, kind: str, chance: random.Random) -> Callable[[], bool]:
    """A function that says whether the moment has come at which a run is to be killed."""
    begin, after_s, skipped = time.monotonic(), chance.uniform(0, victim.whole_run_s), chance.randrange(3)
    records = victim.records
    folder = {"download": victim.stage.models, "records": records, "tags": records / "tags", "captions": victim.images}.get(kind)
    log = {"log": victim.stage.record, "faces": records / "faces.jsonl"}.get(kind)

    def being_written() -> set[str]:
        walked = os.walk(folder) if folder else ()  # unlike glob, it goes on when a folder is removed meanwhile
        listed = itertools.islice(walked, 1) if kind == "records" else walked
        return {name for _, _, names in listed for name in names if PARTIAL.fullmatch(name)}

    before = being_written()  # left by runs that were killed
    size, was_writing = log.stat().st_size if log and log.exists() else 0, False

    def has_come() -> bool:
        nonlocal skipped, size, was_writing
        if log:
            grown = log.exists() and log.stat().st_size > size
            size = log.stat().st_size if grown else size
            skipped -= grown
            return grown and skipped < 0
        if kind == "any":
            return time.monotonic() - begin > after_s
        is_writing = not being_written() <= before
        skipped -= is_writing and not was_writing
        was_writing = is_writing
        return is_writing and skipped < 0

    return has_come


def kill_at(victim: Victim, kind: str, chance: random.Random) -> int:
    """Run until a run was killed at a moment of this kind; how many ended before. Each of those is compared, and begun again."""
    ended = 0
    while True:
        has_come, process = moment(victim, kind, chance), victim.start()
        while process.poll() is None:
            if has_come():
                process.kill()
                break
            time.sleep(0.0002)
        if process.wait(PATIENCE_S) == -signal.SIGKILL:
            return ended
        assert process.returncode == 0, victim.log.read_text()
        ended += 1
        assert ended < 20, f"no run came to the moment {kind}"
        victim.require_expected()
        victim.reset()


def killed(victim: Victim, kinds: Sequence[str], chance: random.Random) -> Counter:
    """Kill a run at each of these kinds of moments, one after the other, then run to the end."""
    victim.run_undisturbed()
    victim.reset()
    hits: Counter = Counter()
    for kind in kinds:
        hits["ended"] += kill_at(victim, kind, chance)
        hits[kind] += 1
    assert victim.start().wait(PATIENCE_S) == 0, victim.log.read_text()
    victim.require_expected()
    victim.reset()
    return hits


def test_a_few_kills(victim):
    killed(victim, ("download", "tags", "log"), random.Random(1))


@pytest.mark.kill
@pytest.mark.timeout(3600)
def test_killed_a_hundred_times(victim, capsys):
    seed = int(time.time())
    begin = time.monotonic()
    hits = killed(victim, [KINDS[number % len(KINDS)] for number in range(100)], random.Random(seed))
    took = f"{time.monotonic() - begin:.0f} s; a whole run takes {victim.whole_run_s:.1f} s"
    with capsys.disabled():
        print(f"\nseed {seed}: killed {dict(hits)} in {took}")
