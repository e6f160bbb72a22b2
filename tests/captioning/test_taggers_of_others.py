"""Taggers of other groups give the tags that they were trained to give, or are refused in one line: never nonsense."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from other_taggers import MEAN, SIDE, STAGES, STD, change, move_weights, set_outputs, take_rgb
from PIL import Image

from captioning.onnx_file import read_onnx
from captioning.preprocessing import find_preprocessing
from captioning.tag_cache import open_cache
from captioning.wd14 import Tagger, preprocess
from common.errors import ModelError
from demo import tiny_tagger

TRANSFORMERS = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 3,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
}
TIMM = {"input_size": [3, SIDE, SIDE], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center", "mean": MEAN, "std": STD}


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of the tiny tagger that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "tagger"))


@pytest.fixture(scope="session")
def square(photographs) -> Image.Image:
    """A photograph that needs neither padding nor scaling."""
    return photographs["astronaut"].resize((SIDE, SIDE))


@pytest.fixture(scope="session")
def expected(tiny, square) -> np.ndarray:
    """The tags of `square`, by the tiny tagger as it is."""
    return tagger_of(tiny).probabilities([preprocess(square, SIDE)])


def tagger_of(folder: Path) -> Tagger:
    return Tagger(folder / "model.onnx", folder / "selected_tags.csv", batch_size=2)


def assert_same_tags(folder: Path, square: Image.Image, expected: np.ndarray) -> None:
    tagger = tagger_of(folder)
    np.testing.assert_allclose(tagger.probabilities([tagger.preprocessing(square)]), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("preprocess.json", {"test": STAGES, "val": []}),
        ("preprocess.json", {"stages": STAGES}),
        ("preprocess.json", STAGES),
        ("preprocessor_config.json", TRANSFORMERS),
        ("preprocessor_config.json", TRANSFORMERS | {"size": SIDE, "do_center_crop": True, "crop_size": SIDE}),
        ("config.json", {"architecture": "caformer_b36", "pretrained_cfg": TIMM}),
    ],
)
def test_the_description_of_the_repository_is_followed(folder, square, expected, file, content):
    take_rgb(folder)
    with pytest.raises(ModelError, match=r"another form than WD14's models.*put that file of its repository there"):
        tagger_of(folder)
    (folder / file).write_text(json.dumps(content))
    assert_same_tags(folder, square, expected)


@pytest.mark.parametrize(
    ("metadata", "mean", "std"),
    [
        ({"Image.BitmapPixelFormat": "Rgb8", "Image.NominalPixelRange": "Normalized_0_1"}, 0.0, 1.0),
        ({"Image.BitmapPixelFormat": "Rgb8", "Image.NominalPixelRange": "Normalized_1_1"}, 0.5, 0.5),
        ({"mean": str(list(MEAN)), "std": "0.229, 0.224, 0.225", "channel_order": "RGB", "layout": "NCHW"}, MEAN, STD),
        ({"mean": "[123.675, 116.28, 103.53]", "std": "[58.395, 57.12, 57.375]", "color_format": "rgb"}, MEAN, STD),
        ({"preprocess": json.dumps({"stages": STAGES})}, MEAN, STD),
    ],
)
@pytest.mark.parametrize("channels_first", [True, False])
def test_the_metadata_of_the_model_is_followed(folder, square, expected, metadata, mean, std, channels_first):
    take_rgb(folder, np.broadcast_to(mean, 3), np.broadcast_to(std, 3), channels_first=channels_first)
    if not channels_first:
        metadata = {key: value for key, value in metadata.items() if key != "layout"}
    change(folder, lambda model: helper.set_model_props(model, metadata))
    assert_same_tags(folder, square, expected)


def test_types_and_open_sizes_of_the_input_are_followed_if_described(folder, square, expected):
    (folder / "preprocess.json").write_text(json.dumps(STAGES))
    take_rgb(folder, side="side")
    assert_same_tags(folder, square, expected)
    half = tiny_tagger.build(folder.parent / "half")
    take_rgb(half, kind=TensorProto.FLOAT16)
    shutil.copy(folder / "preprocess.json", half)
    tagger = tagger_of(half)
    np.testing.assert_allclose(tagger.probabilities([tagger.preprocessing(square)]), expected, atol=0.02)
    whole = tiny_tagger.build(folder.parent / "whole")
    take_rgb(whole, [0.0] * 3, [1 / 255] * 3, channels_first=False, kind=TensorProto.UINT8)
    with pytest.raises(ModelError, match="another form than WD14's models"):
        tagger_of(whole)  # 8-bit models take red or blue first
    (whole / "preprocess.json").write_text(json.dumps([{"type": "resize", "size": [SIDE, SIDE], "interpolation": "bicubic"}]))
    assert_same_tags(whole, square, expected)


def test_timm_models_of_wd14_take_blue_first_on_a_white_square(folder, photographs):
    """Their config.json cannot say so; see the model cards of wd-vit-tagger-v3 and the others."""
    take_rgb(folder)
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": TIMM | {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    image = photographs["coffee"]
    prepared = find_preprocessing(read_onnx(folder / "model.onnx"), tags=10_861)(image)
    np.testing.assert_allclose(prepared, preprocess(image, SIDE) / 127.5 - 1, atol=1e-5)


def test_configuration_of_another_export_is_not_taken_for_that_of_a_wd14_model(folder, square, expected):
    """WD14's repositories describe their timm model in config.json; their ONNX file takes 0..255."""
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": TIMM}))
    assert_same_tags(folder, square, expected)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("preprocess.json", "{", "preprocess.json describes"),
        ("preprocess.json", '{"a":' * 100_000, "nested too deeply"),
        ("preprocess.json", "5", "lists no steps"),
        ("preprocess.json", [*STAGES[:-2], {"type": "five_crop", "size": 5}], "the step 'five_crop' is not known"),
        ("preprocess.json", [*STAGES, {"type": "resize", "size": 5}], "resize comes after the conversion to numbers"),
        (
            "preprocess.json",
            [{"type": "resize", "size": [384, 384]}, *STAGES[4:]],
            "makes images of 384 px",
        ),
        ("preprocess.json", [{"type": "resize", "size": SIDE}, *STAGES[4:]], "not squares of one size"),
        (
            "preprocess.json",
            [*STAGES[:-1], {"type": "normalize", "mean": [1, 2], "std": [1, 2]}],
            "not one number for each",
        ),
        ("preprocess.json", [*STAGES[:-1], {"type": "normalize", "mean": 0.5, "std": 0}], "standard deviation is not above 0"),
        ("preprocess.json", [{"type": "resize", "size": 10**9}], "is not a size"),
        ("preprocess.json", [{"size": 5}], "not in a known format: KeyError 'type'"),
        ("preprocess.json", [STAGES[0] | {"force_background": "black"}], "put on white"),
        ("preprocessor_config.json", TRANSFORMERS | {"image_processor_type": "WDTaggerProcessor"}, "is not known"),
        ("preprocessor_config.json", TRANSFORMERS | {"resample": 77}, "the filter '77' is not known"),
        ("config.json", {"pretrained_cfg": TIMM | {"crop_mode": "border"}}, "crop_mode border is not known"),
        ("config.json", {"model_type": "bert"}, "another form than WD14's models"),
    ],
)
def test_what_cannot_be_followed_is_refused(folder, file, content, reason):
    take_rgb(folder)
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ModelError, match=reason) as refused:
        tagger_of(folder)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"mean": "[0.5]"}, "does not say RGB or BGR"),
        ({"channel_order": "rgb"}, "in which range"),
        ({"channel_order": "rgb", "layout": "NHWC", "mean": "0.5"}, "it says NHWC"),
        ({"channel_order": "rgb", "range": "16-235"}, "the range '16-235' is not known"),
        ({"channel_order": "rgb", "mean": "a, b, c"}, "not in a known format"),
        ({"Image.BitmapPixelFormat": "Gray8", "Image.NominalPixelRange": "Normalized_0_1"}, "does not say RGB or BGR"),
        ({"Image.BitmapPixelFormat": "Rgb8", "Image.ColorSpaceGamma": "Linear"}, "not sRGB"),
        ({"preprocess": "{"}, "its metadata describes"),
        ({"preprocess": "[" * 100_000}, "nested too deeply"),
        ({"channel_order": "bgr", "scale": "nan"}, "'nan' is not one number"),
    ],
)
def test_metadata_that_is_not_clear_is_refused(folder, metadata, reason):
    take_rgb(folder)
    change(folder, lambda model: helper.set_model_props(model, metadata))
    with pytest.raises(ModelError, match=reason):
        tagger_of(folder)


@pytest.mark.parametrize(
    "outputs",
    [
        {"embedding": "features", "logits": "logits", "prediction": "output"},
        {"output": "output", "logits": "logits", "embedding": "features"},
        {"initial__output": "logits", "initial__logits": "logits", "logits": "logits", "output": "output"},
        {"embedding": "features", "tags": "output"},
        {"first": "logits", "second": "output"},
        {"embedding": "features", "logits": "logits"},
    ],
)
def test_the_output_with_the_probabilities_counts(folder, square, expected, outputs):
    set_outputs(folder, **outputs)
    assert_same_tags(folder, square, expected)


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ({"first": "logits", "second": "logits"}, "gives first, second, and which of them"),
        ({"embedding": "features", "hidden": "features"}, r"no output of model.onnx has that many values .*embedding"),
        ({"scores": "logits"}, "gives values that are not probabilities"),
        ({"logits": "output"}, "gives values that are not probabilities"),
    ],
)
def test_outputs_that_are_not_clear_are_refused(folder, square, outputs, reason):
    set_outputs(folder, **outputs)
    with pytest.raises(ModelError, match=reason):
        tagger_of(folder).probabilities([preprocess(square, SIDE)])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda model: setattr(model, "ir_version", 99), "Unsupported model IR version: 99"),
        (lambda model: setattr(model.opset_import[0], "version", 99), "Opset 99 is under development"),
        (lambda model: setattr(model.graph.node[-1], "op_type", "FutureSigmoid"), "No Op registered for FutureSigmoid"),
    ],
)
def test_a_model_of_a_newer_version_says_what_to_update(folder, edit, reason):
    change(folder, edit)
    with pytest.raises(ModelError, match=f"needs a newer ONNX Runtime than .*{reason}.*update the package onnxruntime"):
        tagger_of(folder)


def test_weights_in_several_files_are_named_when_missing_and_part_of_the_cache_key(folder, stage, square, expected):
    before = open_cache(folder / "cache", "tagger", folder, bf16=False)
    move_weights(folder, "model.onnx.data", "weights/more.bin")
    assert read_onnx(folder / "model.onnx").weights_files == {"model.onnx.data", "weights/more.bin"}
    assert_same_tags(folder, square, expected)
    keys = {before._folder, open_cache(folder / "cache", "tagger", folder, bf16=False)._folder}
    content = bytearray((folder / "weights/more.bin").read_bytes())
    content[5] ^= 1
    (folder / "weights/more.bin").write_bytes(content)
    keys.add(open_cache(folder / "cache", "tagger", folder, bf16=False)._folder)
    assert len(keys) == 3
    (folder / "model.onnx.data").write_bytes(b"cut off")
    with pytest.raises(ModelError, match=r"does not fit its weights in model.onnx.data, weights/more.bin, or one .* is cut off"):
        tagger_of(folder)
    (folder / "model.onnx.data").unlink()
    square.save(stage.images / "a.png")
    for flags in ((), ("--check",)):
        ended = stage.run(*flags, CAPTION_MODEL=folder)
        assert ended.returncode == 5
        assert f"{folder}: has no model.onnx.data; put it there" in ended.stderr


@pytest.mark.parametrize("location", ["../model.bin", "/etc/passwd", "a/../../b", "", "n" * 300, "a\nb"])
def test_weights_outside_the_folder_are_refused(folder, location):
    move_weights(folder, "model.onnx.data")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="which is not in its folder"):
        read_onnx(folder / "model.onnx")


def test_how_images_are_prepared_is_part_of_the_cache_key(folder):
    take_rgb(folder)
    (folder / "preprocess.json").write_text(json.dumps(STAGES))
    first = open_cache(folder / "cache", "tagger", folder, bf16=False)
    assert open_cache(folder / "cache", "tagger", folder, bf16=False)._folder == first._folder
    (folder / "preprocess.json").write_text(json.dumps([*STAGES[:-1], STAGES[-1] | {"mean": 0.5}]))
    assert open_cache(folder / "cache", "tagger", folder, bf16=False)._folder != first._folder


def test_names_of_categories_and_the_column_tag_are_understood(folder, square, expected):
    names = {"0": "general", "4": "character", "9": "rating"}
    rows = [line.split(",") for line in (folder / "selected_tags.csv").read_text().splitlines()]
    text = "\n".join(f"{number},{name},{names.get(category, category)},{count}" for number, name, category, count in rows)
    (folder / "selected_tags.csv").write_text(text.replace("tag_id,name,", "id,tag,", 1))
    assert_same_tags(folder, square, expected)
