"""Photographs of two persons, fetched for the test, in the place of sample images: who is in the data set has the likeness."""

import subprocess
import sys
import tarfile
from concurrent.futures import wait
from pathlib import Path

import pytest
from PIL import Image, ImageEnhance, ImageOps

from common.faces import DlibFaces
from common.files import sha256_of
from training.callbacks.recommendation import Save, choose
from training.callbacks.sample_likeness import SampleLikeness
from training.data.examples import Example

pytestmark = [pytest.mark.photographs, pytest.mark.timeout(600)]

PACKAGE = "face_recognition==1.3.0"


@pytest.fixture(scope="module")
def persons(tmp_path_factory) -> dict[str, Image.Image]:
    folder = tmp_path_factory.mktemp("photographs")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder, PACKAGE]
    subprocess.run(pip, check=True)
    (archive,) = folder.glob("*.tar.gz")
    found = {}
    with tarfile.open(archive) as files:
        for member in files:
            name = Path(member.name).name
            if member.isfile() and name in ("obama.jpg", "obama2.jpg", "biden.jpg"):
                found[name] = Image.open(files.extractfile(member)).convert("RGB")
    return found


def test_the_likeness_is_that_of_the_person_in_the_data_set(persons, tmp_path, photographs):
    obama, other, biden = persons["obama.jpg"], persons["obama2.jpg"], persons["biden.jpg"]
    data = [obama, ImageOps.mirror(obama), ImageEnhance.Brightness(obama).enhance(0.6), other]
    samples = {
        "same": ImageOps.mirror(other),
        "darker": ImageEnhance.Brightness(other).enhance(0.7),
        "gray": ImageOps.grayscale(obama).convert("RGB"),
        "smaller": obama.resize((obama.width // 2, obama.height // 2)),
        "stranger": biden,
        "strange": ImageOps.mirror(biden),
        "tiny": obama.resize((obama.width // 8, obama.height // 8)),
        "coffee": photographs["coffee"],
    }
    examples = []
    for number, image in enumerate(data):
        path = tmp_path / f"{number}.png"
        image.save(path)
        examples.append(Example(path, path.name, "", *image.size, 1, sha256_of(path)))
    paths = {name: tmp_path / f"{name}.png" for name in samples}
    for name, image in samples.items():
        image.save(paths[name])
    with SampleLikeness("dlib", tmp_path, examples, tmp_path / "known.jsonl", tmp_path / "found.jsonl") as likeness:
        likeness.submit(list(paths.values()), [""] * len(paths))
        wait(likeness.pending(), timeout=300)
        scores = {name: likeness.score_of(path.name) for name, path in paths.items()}
    print(f"\nceiling {likeness.ceiling}", scores)
    for name in ("same", "darker", "gray", "smaller"):
        assert scores[name][0] >= DlibFaces.same_from
    for name in ("stranger", "strange"):
        assert scores[name][0] < DlibFaces.other_below
    for name in ("tiny", "coffee"):
        assert scores[name][0] is None
        assert scores[name][1] != ""
    alike = Save("alike", 10, tuple(scores[name][0] for name in ("same", "darker", "gray", "smaller")), 0.9)
    unlike = Save("unlike", 5, (scores["stranger"][0], scores["strange"][0]) * 2, 0.1)
    assert choose([unlike, alike])[0] == alike
