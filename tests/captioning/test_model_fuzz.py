"""Whatever the files of a tagger hold: they are read, or one ModelError in one line says what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from other_taggers import STAGES
from PIL import Image

from captioning.onnx_file import Input, OnnxFile, read_onnx
from captioning.preprocessing import find_preprocessing
from captioning.tag_selection import read_tags
from common.errors import ModelError

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 500) | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
sizes = st.integers(1, 40) | st.lists(st.integers(1, 40), min_size=1, max_size=2) | values
stages = st.lists(
    st.sampled_from(STAGES)
    | st.fixed_dictionaries({"type": st.sampled_from(["resize", "center_crop", "pad_to_size"]), "size": sizes})
    | st.fixed_dictionaries({"type": st.just("normalize"), "mean": values, "std": st.just(0.5) | values})
    | values,
    max_size=4,
)
timm = st.fixed_dictionaries(
    {"input_size": st.just([3, 448, 448]) | values, "mean": values, "std": values, "crop_pct": st.just(1.0) | values},
    optional={"interpolation": st.just("bicubic") | values, "crop_mode": values},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tagger")


def refusal(read) -> str:
    """The message with which `read` refuses its file; "" if it reads it."""
    try:
        read()
    except ModelError as error:
        return str(error)
    return ""


def assert_one_line(message: str, path: Path) -> None:
    assert message == "" or message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 600


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: f"name,category\n{text}".encode()))
@example(content=b"category,name\n0\n")
@example(content=b"name,category\n,0\n")
@example(content=b"name,category\n" + b"a" * 200_000 + b",0\n")
@example(content=b"name,category\na," + b"9" * 5000)
def test_a_list_of_tags_is_read_or_refused(folder, content):
    file = folder / "selected_tags.csv"
    file.write_bytes(content)
    found = []
    message = refusal(lambda: found.extend(read_tags(file)))
    assert_one_line(message, file)
    assert message or all(tag.name.strip() and isinstance(tag.category, int) for tag in found)


@given(data=st.data())
def test_a_damaged_model_is_read_or_refused(folder, tiny, data):
    content = bytearray((tiny / "model.onnx").read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    file = folder / "model.onnx"
    file.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    assert_one_line(refusal(lambda: read_onnx(file)), file)


@given(content=st.binary(max_size=300))
@example(content=b"")
@example(content=b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
def test_any_bytes_are_refused_as_a_model(folder, content):
    file = folder / "other.onnx"
    file.write_bytes(content)
    message = refusal(lambda: read_onnx(file))
    assert_one_line(message, file)
    assert "not an ONNX model" in message


transformers = st.fixed_dictionaries({"size": sizes, "image_mean": values, "image_std": values})


@given(
    description=st.tuples(st.just("preprocess.json"), stages | st.fixed_dictionaries({"test": stages}) | values)
    | st.tuples(st.just("preprocessor_config.json"), transformers)
    | st.tuples(st.just("config.json"), st.fixed_dictionaries({"pretrained_cfg": timm | values}) | values)
    | st.tuples(st.just("metadata"), st.dictionaries(st.sampled_from(["mean", "std", "range", "scale"]), st.text(max_size=9))),
    side=st.sampled_from([None, 20, 448]),
)
@example(description=("preprocess.json", [{"type": "resize", "size": "\n"}]), side=448)
def test_a_description_is_followed_or_refused(folder, description, side):
    name, content = description
    onnx = OnnxFile(folder / "described.onnx", {"input": Input(False, [None, 3, side, side])})
    for other in ("preprocess.json", "preprocessor_config.json", "config.json"):
        (folder / other).unlink(missing_ok=True)
    if name == "metadata":
        onnx.metadata = content | {"channel_order": "rgb"}
    else:
        (folder / name).write_text(json.dumps(content))
    found = []
    message = refusal(lambda: found.append(find_preprocessing(onnx, 61)))
    assert_one_line(message, onnx.path)
    if not message:
        array = found[0](Image.new("RGB", (30, 50), (255, 0, 9)))
        assert array.shape == (found[0].side_px, found[0].side_px, 3)
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
