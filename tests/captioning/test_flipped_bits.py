"""Whatever bits are flipped in a file that captioning or the report page reads: success, or a documented exit code.

`make test` runs the same few examples each time, `make fuzz` new ones for minutes.
"""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pillow_heif
import pytest
from bit_flips import Snapshot, flip, flips
from hypothesis import given, settings
from hypothesis import strategies as st
from other_taggers import STAGES, move_weights, take_rgb

import report
from common.clip_tokens import ClipTokens
from common.errors import run_main
from demo import tiny_tagger

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]

DOCUMENTED = {0, 1, 2, 3, 4, 5, 6}
FORMATS = {"a.png": {}, "b.jpg": {}, "c.webp": {}, "d.avif": {"quality": 50}, "e.heic": {"quality": 50}, "f.tif": {}, "g.bmp": {}}


@pytest.fixture
def ready(stage, photographs, tiny_sdxl, tmp_path):
    """A captioned data set with a file of every kind, and its report."""
    pillow_heif.register_heif_opener()
    for name, options in FORMATS.items():
        image = photographs[("coffee", "chelsea", "rocket")[len(name + name[0]) % 3]].resize((64 + ord(name[0]), 48))
        image.save(stage.images / name, **options)
    (stage.images / "a.txt").write_text("nyafyi_woman, mine")
    (stage.images / "b.caption").write_text("mine as well")
    root, records = stage.images.parent, stage.record.parent
    lines = [{"file": f"images/{name}", "sha256": "", "prompt": "a photo of a woman", "seed": 1} for name in FORMATS]
    (root / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "exclude.txt").write_text("g.bmp  # dark\n")
    folder = tiny_tagger.build(stage.models / "tagger")
    take_rgb(folder)
    move_weights(folder, "model.onnx.data")
    (folder / "preprocess.json").write_text(json.dumps(STAGES))
    shutil.copytree(tiny_sdxl / "tokenizer", stage.models / "two" / "tokenizer")
    one = Path(shutil.copytree(tiny_sdxl / "tokenizer", stage.models / "one" / "tokenizer"))
    ClipTokens(one)._tokenizer.save(str(one / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (one / name).unlink()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "settings.toml").write_text('[caption]\ncaption_batch_size = 2\ncaption_replace_tags = ["a=b"]\n')
    stage.variables |= {"CAPTION_MODEL": "tagger", "BASE_MODEL": "one", "CAPTION_SOURCE": "both"}
    stage.variables |= {"OUTPUT_DIR": str(tmp_path / "output")}
    for _ in range(2):
        done = stage.run("--config", str(tmp_path / "config" / "settings.toml"))
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert report_code(stage) == 0
    (records / "faces.jsonl").write_text(json.dumps({"model": "dlib", "sha256": "0", "faces": []}) + "\n")
    return stage


def report_code(stage) -> int:
    output, environment = io.StringIO(), mock.patch.dict(os.environ, stage._environment({}), clear=True)
    with environment, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = run_main("report", lambda: report.main([]))
    assert "Traceback" not in output.getvalue()
    return code


@pytest.mark.filterwarnings("ignore")
def test_one_damaged_file_is_read_or_refused(ready, tmp_path):
    snapshot = Snapshot([ready.images.parent, ready.models, tmp_path / "config"])
    paths = list(snapshot.files)
    captions = ready.captions_as_bytes()

    @given(path=st.sampled_from(paths), bits=flips, model=st.sampled_from(["one", "two"]))
    @settings(max_examples=2 * settings.default.max_examples)
    def damage(path, bits, model):
        snapshot.restore()
        flip(path, bits)
        done = ready.run("--config", str(tmp_path / "config" / "settings.toml"), BASE_MODEL=model)
        assert done.returncode in DOCUMENTED, (path, done.stderr)
        assert (done.returncode == 0) == (done.stderr == "")
        assert report_code(ready) == 0
        name = path.relative_to(tmp_path).as_posix()
        if done.returncode == 0 and (path.suffix == ".npy" or path.name in ("pictures.json", "audit.json", "traits.json")):
            assert ready.captions_as_bytes() == captions, name

    damage()
