"""Whatever bits are flipped in a file that training reads: success, or a documented exit code.

`make test` runs the same few examples each time, `make fuzz` new ones for minutes.
"""

import json

import pytest
from bit_flips import Snapshot, flip, flips
from hypothesis import given, settings
from hypothesis import strategies as st

from common.settings import SETTINGS_FILE
from demo import tiny_sdxl as miniature

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(7200), pytest.mark.filterwarnings("ignore")]

DOCUMENTED = {0, 1, 2, 3, 4, 5, 6}
RUN = {"LORA_TARGETS": "attention", "SAMPLES": "true", "SAMPLE_STEPS": 1, "SAMPLE_SIZE": 64, "SAVE_EVERY_EPOCHS": 1}


@pytest.fixture
def ready(stage, tmp_path):
    """A run that was stopped, with a file of every kind beside it: settings, an audit, a base model of its own."""
    stage.add("astronaut", caption="sks, woman")
    stage.add("coffee", "coffee.jpg", caption="sks, cup")
    (stage.dataset / "exclude.txt").write_text("# none\n")
    audit = {"resolution": 64, "pictures": 2, "flagged": {"x.png": {"sha256": "", "flaws": {"blurred": "is"}}}}
    (stage.dataset / ".loracat").mkdir()
    (stage.dataset / ".loracat" / "audit.json").write_text(json.dumps(audit))
    (tmp_path / "settings.toml").write_bytes(SETTINGS_FILE.read_bytes())
    miniature.build(stage.models / "base")
    (tmp_path / "prompts.txt").write_text("sks in a park --w 64 --h 64 --d 5 --s 1\n")
    stage.variables |= RUN | {"BASE_MODEL": "base", "SKIP_FLAGGED": "true", "SAMPLE_PROMPTS": tmp_path / "prompts.txt"}
    return stage


def damage_one(stage, tmp_path, more: int) -> None:
    """Flip bits in one file at a time, and run again."""
    config = tmp_path / "settings.toml"
    snapshot = Snapshot([stage.dataset, stage.output, stage.models])
    snapshot.files |= {path: path.read_bytes() for path in (config, tmp_path / "prompts.txt")}
    paths = [path for path in snapshot.files if path.stat().st_size]
    by_kind = {(path.parent.name, path.suffix): path for path in paths}

    @given(path=st.sampled_from(list(by_kind.values())), bits=flips, check=st.sampled_from([False, False, True]))
    @settings(max_examples=more * settings.default.max_examples // 5)
    def damage(path, bits, check):
        snapshot.restore()
        flip(path, bits)
        done = stage.run("--config", str(config), *(["--check"] if check else []))
        assert done.returncode in DOCUMENTED, (path, done.stderr)
        assert (done.returncode == 0) == (done.stderr == ""), (path, done.stderr)

    damage()


@pytest.mark.long
def test_one_damaged_file_of_a_stopped_run_is_read_or_refused(ready, tmp_path):
    flags = ("--config", str(tmp_path / "settings.toml"))
    stopped = ready.run(*flags, NUM_TRAIN_EPOCHS=1)
    assert (stopped.returncode, stopped.stderr) == (0, ""), stopped.stdout
    damage_one(ready, tmp_path, 2)
