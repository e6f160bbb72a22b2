"""FACE_MODEL=sface: OpenCV's classes for YuNet and SFace on tiny networks of the same interface, and the download of weights."""

import json
import os
import shutil
import signal
from pathlib import Path

import face_networks
import numpy as np
import pytest
from hub_server import hub

from common.dataset_layout import DatasetFolder
from common.errors import ModelError
from common.faces import MissingWeightsError, OpenCVFaces, load_face_model
from common.files import sha256_of
from common.likeness import find_faces

cv2 = pytest.importorskip("cv2")

REPOSITORIES = [file.repository for file in OpenCVFaces.weights]
OFFLINE = "no likeness: face model sface: its weights are not in {models} and cannot be downloaded: "


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    face_networks.build(folder)
    return folder


@pytest.fixture(scope="module")
def weights(models) -> tuple:
    return face_networks.build(models)


@pytest.fixture
def expected(weights, monkeypatch, tmp_path) -> dict[str, str]:
    """The tiny networks are the expected weights; variables with which they are that for another process, too."""
    monkeypatch.setattr(OpenCVFaces, "weights", weights)
    modules = tmp_path / "modules"
    modules.mkdir()
    program = f"from common.faces import HubFile, OpenCVFaces\nOpenCVFaces.weights = {weights!r}\n"
    (modules / "sitecustomize.py").write_text(program)
    scripts = Path(__file__).parents[2] / "scripts"
    return {"FACE_MODEL": "sface", "PYTHONPATH": f"{modules}{os.pathsep}{scripts}"}


@pytest.fixture
def folder(stage) -> DatasetFolder:
    return DatasetFolder(stage.images.parent)


@pytest.fixture
def served_from(models, weights, tmp_path) -> Path:
    """A folder with both networks, as a server has it."""
    folder = tmp_path / "served"
    folder.mkdir()
    for file in weights:
        shutil.copy(file.path(models), folder)
    return folder


def add(folder: DatasetFolder) -> None:
    """Five images of one person, and one of another."""
    for number, size in enumerate(((640, 480), (800, 600), (1600, 1200), (720, 540), (1000, 750))):
        face_networks.person(60, size).save(folder.images / f"{number}.png")
    face_networks.person(150).save(folder.images / "other.png")


@pytest.mark.parametrize("size", [(640, 480), (1600, 1200), (2400, 1800)])
@pytest.mark.usefixtures("expected")
def test_box_and_landmarks_are_where_they_are_in_the_image(models, size):
    (face,) = load_face_model("sface", models).detect(np.asarray(face_networks.person(60, size)))
    scale = size[0] / 640
    assert np.divide([face.left, face.top], scale) == pytest.approx([280, 192], abs=6)
    assert np.divide([face.width, face.height], scale) == pytest.approx(face_networks.BOX_PX, rel=0.05)
    points = np.divide(face.landmarks, scale)
    assert points == pytest.approx(np.add(face_networks.LANDMARKS_PX, (320, 240)), abs=6)
    assert points[0, 0] < points[2, 0] < points[1, 0]
    assert (face.score, face.turn_degrees) == (pytest.approx(1, abs=0.05), pytest.approx(0, abs=1))


@pytest.mark.usefixtures("expected")
def test_a_face_has_the_same_vector_at_every_size_and_another_person_another_one(models):
    model = load_face_model("sface", models)
    same = [face_networks.person(60, size) for size in ((640, 480), (800, 600), (2400, 1800))]
    vectors = [find_faces(np.asarray(image), model)[0].vector for image in (*same, face_networks.person(150))]
    similarity = model.similarity(np.stack(vectors), np.stack(vectors))
    assert similarity[:3, :3].min() > 0.9
    assert similarity[3, :3].max() < model.other_below
    assert np.diag(similarity) == pytest.approx(1)
    assert all(vector.dtype == np.float32 for vector in vectors)


@pytest.mark.usefixtures("expected")
def test_unclear_and_absent_faces(models):
    model = load_face_model("sface", models)
    pale = np.asarray(face_networks.person(60)).astype(int)
    pale[232:248, 312:328] = (100, 0, 0)
    (face,) = find_faces(pale.astype(np.uint8), model)
    assert "the face is not clear (detector score 0.6" in face.unusable
    for size in ((1, 1), (3, 2000), (2000, 3), (40, 30)):
        assert model.detect(np.full((*size, 3), 90, np.uint8)) == []


@pytest.mark.usefixtures("expected")
def test_weights_that_are_missing_damaged_or_other_ones(models, tmp_path, monkeypatch):
    with pytest.raises(MissingWeightsError):
        load_face_model("sface", tmp_path)
    mine = Path(shutil.copytree(models, tmp_path / "mine"))
    damaged = OpenCVFaces.weights[1].path(mine)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(
        ModelError, match=r"sface_2021dec\.onnx: is not the file of opencv/face_recognition_sface or is damaged; delete"
    ):
        load_face_model("sface", mine)
    detector = OpenCVFaces.weights[0].path(mine).read_bytes()
    for content in (damaged.read_bytes(), b"", detector):  # what this version of OpenCV cannot run as a recognizer
        damaged.write_bytes(content)
        only = type(OpenCVFaces.weights[1])(REPOSITORIES[1], damaged.name, sha256_of(damaged))
        monkeypatch.setattr(OpenCVFaces, "weights", (OpenCVFaces.weights[0], only))
        with pytest.raises(
            ModelError,
            match=rf"^face model sface: OpenCV {cv2.__version__} cannot run it \(.*needs OpenCV 4\.10 .*pip install opencv",
        ):
            load_face_model("sface", mine)


def test_an_opencv_that_has_no_faces(models, expected, monkeypatch):
    monkeypatch.delattr(cv2, "FaceDetectorYN")
    with pytest.raises(ModelError, match=r"cannot run it .*FaceDetectorYN.*; install it with: pip install opencv-python-headless"):
        load_face_model("sface", models)


def test_weights_are_downloaded_once_and_faces_compared(stage, folder, expected, served_from):
    add(folder)
    with hub(served_from, repositories=REPOSITORIES) as served:
        online = expected | {"HF_HUB_OFFLINE": 0, "HF_ENDPOINT": served.endpoint}
        checked = stage.run_process("--check", **online)
        assert f"face model sface: will be downloaded to {stage.models} (0 MB)" in checked.stdout
        assert not stage.models.exists()
        done = stage.run_process(**online)
    assert done.returncode == 0, done.stderr
    assert f"downloading the face model sface (0 MB) to {stage.models}" in done.stderr
    assert sorted(path.name for path in stage.models.rglob("*.onnx")) == sorted(file.name for file in OpenCVFaces.weights)
    assert "likeness (sface): 6 of 6 images compared" in done.stdout
    record = json.loads(folder.likeness.read_bytes())
    assert record["model"] == "sface"
    assert "flagged as another person: other.png" in done.stdout
    folder.faces.unlink()
    assert "face model sface: loads" in stage.run_process("--check", **expected).stdout
    again = stage.run_process(**expected)  # without a network
    assert json.loads(folder.likeness.read_bytes()) == record
    assert again.stderr == ""


def test_without_weights_and_network_everything_else_works(stage, folder, expected):
    add(folder)
    offline = expected | {"HF_HUB_OFFLINE": 0, "HF_ENDPOINT": "http://127.0.0.1:9"}
    for flags in ((), ("--check",)):
        done = stage.run_process(*flags, **offline)
        assert (done.returncode, done.stderr) == (0, "")
        (line,) = [line for line in done.stdout.splitlines() if "likeness" in line]
        assert line.startswith(OFFLINE.format(models=stage.models))
        for file in OpenCVFaces.weights:
            assert f"hf download {file.repository} {file.name} --local-dir {file.path(stage.models).parent}" in line
    assert (folder.images / "0.txt").exists()


def test_other_weights_under_the_same_name_are_refused_after_the_download(stage, folder, expected, served_from):
    add(folder)
    for file in OpenCVFaces.weights:
        (served_from / file.name).write_bytes(b"a newer version")
    with hub(served_from, repositories=REPOSITORIES) as served:
        done = stage.run_process(**expected | {"HF_HUB_OFFLINE": 0, "HF_ENDPOINT": served.endpoint})
    assert done.returncode == 0
    assert "2023mar.onnx: is not the file of opencv/face_detection_yunet or is damaged; delete it and run again" in done.stdout


def test_interrupted_download_starts_again(stage, folder, expected, served_from):
    add(folder)
    with hub(served_from, stall=True, repositories=REPOSITORIES) as served:
        process = stage.start(**expected | {"HF_HUB_OFFLINE": 0, "HF_ENDPOINT": served.endpoint})
        assert served.stalled.wait(timeout=30)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 130, output + errors
    assert "Traceback" not in errors
    assert not list(stage.models.rglob("*.onnx"))
    with hub(served_from, repositories=REPOSITORIES) as served:
        done = stage.run_process(**expected | {"HF_HUB_OFFLINE": 0, "HF_ENDPOINT": served.endpoint})
    assert "likeness (sface): 6 of 6 images compared" in done.stdout


def test_without_opencv_one_line_says_so(stage, folder, tmp_path):
    add(folder)
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "cv2.py").write_text("raise ModuleNotFoundError('No module named cv2', name='cv2')")
    done = stage.run(FACE_MODEL="sface", PYTHONPATH=modules)
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if "likeness" in line]
    assert line.startswith(
        "no likeness: face model sface: cv2 is not installed; install it with: pip install opencv-python-headless"
    )


def test_a_folder_for_the_weights_that_cannot_be_written_is_one_line(stage, folder, expected, served_from):
    add(folder)
    stage.models.write_text("a file")
    with hub(served_from, repositories=REPOSITORIES) as served:
        done = stage.run_process(**expected | {"HF_HUB_OFFLINE": 0, "HF_ENDPOINT": served.endpoint})
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if "likeness" in line]
    assert line.startswith("no likeness: ")
    assert str(stage.models) in line
