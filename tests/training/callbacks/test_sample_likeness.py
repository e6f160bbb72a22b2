"""Images are scored by a process of its own, with a stand-in for dlib whose likeness is that of the mean colors of two images."""

import shutil
import time
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.files import read_json_lines, sha256_of
from common.likeness import FaceCache, FoundFace
from training.callbacks.sample_likeness import GONE, SampleLikeness
from training.data.examples import Example

STANDIN = Path(__file__).parents[1] / "standin_dlib"
SAMPLES = {"same": (110, 100, 100), "other": (200, 100, 100), "dark": (0, 0, 9)}


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(STANDIN))


def image(path: Path, *color: int) -> Path:
    Image.new("RGB", (64, 64), color).save(path)
    return path


def example(path: Path) -> Example:
    return Example(path, path.name, "", 64, 64, 1, sha256_of(path))


@pytest.fixture
def data(tmp_path) -> list[Example]:
    """Four images in shades of red."""
    return [example(image(tmp_path / f"{red}.png", red, 100, 100)) for red in (100, 110, 120, 130)]


@pytest.fixture
def likeness_of(tmp_path, data):
    """`likeness_of(...)`: the likeness of images to `data`."""
    return lambda **how: SampleLikeness(
        **{
            "model": "dlib",
            "models_dir": tmp_path,
            "examples": data,
            "known": tmp_path / "known.jsonl",
            "found": tmp_path / "found.jsonl",
        }
        | how
    )


def test_each_image_is_compared_with_the_images_of_its_trigger_word(likeness_of, tmp_path, standin):
    shades = {"alice": (100, 110, 120), "bob": (200, 210, 220), "carol": (50,)}
    examples = [
        replace(example(image(tmp_path / f"{name}{red}.png", red, 100, 100)), trigger=name)
        for name, reds in shades.items()
        for red in reds
    ]
    sample = image(tmp_path / "sample.bmp", 110, 100, 100)
    copies = [shutil.copy(sample, tmp_path / f"{name}.bmp") for name in shades]
    with likeness_of(examples=examples) as likeness:
        likeness.submit(copies, list(shades))
        wait(likeness.pending(), timeout=60)
        assert [likeness.score_of(path.name) for path in copies] == [
            (pytest.approx(1 - 20 / 3 / 255, abs=1e-4), ""),
            (pytest.approx(1 - 100 / 255, abs=1e-4), ""),
            (None, "fewer than 3 images of carol show a face to compare with"),
        ]


def scored(likeness: SampleLikeness, *images: Path) -> list[tuple[float | None, str]]:
    likeness.submit(images, [""] * len(images))
    wait(likeness.pending(), timeout=60)
    return [likeness.score_of(path.name) for path in images]


def test_score_is_the_mean_similarity_to_the_faces_of_the_data_set(likeness_of, tmp_path, standin):
    """A distance of 10 / 255 is a similarity of 0.9608."""
    with likeness_of() as likeness:
        assert likeness.ceiling is None
        same, other, dark = (image(tmp_path / f"{name}.bmp", *color) for name, color in SAMPLES.items())
        assert scored(likeness, same, other, dark) == [
            (pytest.approx(1 - 10 / 255, abs=1e-4), ""),  # distances 10, 0, 10 and 20
            (pytest.approx(1 - 85 / 255, abs=1e-4), ""),
            (None, "no face was found"),
        ]
        # leave-one-out: mean distances 20, 40 / 3, 40 / 3 and 20
        assert likeness.ceiling == pytest.approx(1 - 50 / 3 / 255, abs=1e-4)
        assert likeness.problem == ""


def test_faces_are_searched_once(likeness_of, tmp_path, standin, monkeypatch, data):
    sample = image(tmp_path / "sample.bmp", 110, 100, 100)
    with likeness_of() as likeness:
        before = scored(likeness, sample)
    assert len(read_json_lines(tmp_path / "found.jsonl")) == 5
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "dlib.py").write_text("raise ModuleNotFoundError('No module named dlib', name='dlib')")
    with likeness_of() as likeness:
        assert scored(likeness, sample) == before
    # Those of the data set that the caption stage has found are not searched.
    known = FaceCache(tmp_path / "known.jsonl", "dlib")
    for each in data:
        known.add(each.sha256, [FoundFace(90, 0.2, "", np.full(128, 0.05, dtype=np.float32))])
    with likeness_of() as likeness:
        assert scored(likeness, sample)[0] != before[0]
        assert likeness.ceiling == 1.0


def test_an_image_with_other_content_is_scored_again(likeness_of, tmp_path, standin):
    sample = image(tmp_path / "sample.bmp", 110, 100, 100)
    with likeness_of() as likeness:
        first = scored(likeness, sample)
        assert likeness.has_news()
        assert not likeness.has_news()
        assert scored(likeness, image(sample, 200, 100, 100)) != first
        assert likeness.has_news()
        sample.unlink()
        assert scored(likeness, sample) == [(None, GONE)]


def test_without_dlib_one_line_says_what_is_missing(likeness_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "dlib.py").write_text("raise ModuleNotFoundError('No module named dlib', name='dlib')")
    samples = [image(tmp_path / f"{number}.bmp", 100, 100, 100) for number in range(2)]
    with likeness_of() as likeness:
        assert scored(likeness, *samples) == [(None, ""), (None, "")]
        assert likeness.problem.startswith("face model dlib: dlib is not installed; install it with: pip install ")
        assert scored(likeness, samples[0]) == [(None, "")]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"no likeness of sample images: {likeness.problem}. Everything else works without it; FACE_MODEL=off silences this line"
    )


def test_a_data_set_without_faces_is_one_line(likeness_of, data, tmp_path, standin, capsys):
    with likeness_of(examples=data[:2]) as likeness:
        assert scored(likeness, image(tmp_path / "sample.bmp", 110, 100, 100)) == [(None, "")]
    assert likeness.problem == "only 2 images of the data set show a face to compare with, 3 are needed"
    assert capsys.readouterr().out.count("\n") == 1


def test_off_starts_no_process_and_prints_nothing(likeness_of, tmp_path, capsys):
    with likeness_of(model="off") as likeness:
        assert scored(likeness, image(tmp_path / "sample.bmp", 110, 100, 100)) == [(None, "")]
        assert likeness.problem == "FACE_MODEL=off"
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "found.jsonl").exists()


def test_leaving_does_not_wait(likeness_of, tmp_path, standin):
    """With a model that takes long to load."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "dlib.py").write_text("import time\ntime.sleep(60)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(slow))
        begin = time.monotonic()
        with likeness_of() as likeness:
            likeness.submit([image(tmp_path / "sample.bmp", 110, 100, 100)], [""])
            assert likeness.pending()
            assert likeness.score_of("sample.bmp") == (None, "")
    assert time.monotonic() - begin < 30
