"""A tiny WD14-shaped ONNX tagger: a few features of the image, one linear layer, a sigmoid. Built in milliseconds.

The tags depend on the image as far as a few averages can tell: a dark image is `night`, a green one has `grass`.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from captioning.captions import CHARACTER, GENERAL, RATING, Tag

SIDE_PX = 448
OPSET, IR_VERSION = 17, 8

RATINGS = ("general", "sensitive", "questionable", "explicit")
CHARACTERS = ("hatsune_miku", "hakurei_reimu", "artoria_pendragon_(fate)", "souryuu_asuka_langley", "link")
# General tags by the feature that makes them likely, with "-" in front where its absence does.
GENERAL_TAGS = {
    "bright": "day white_background simple_background looking_at_viewer smile light_smile",
    "-bright": "night dark black_background shadow closed_mouth serious",
    "warm": "brown_hair blonde_hair orange_background indoors sunset >_<",
    "-warm": "blue_eyes blue_background sky ocean cold ^_^",
    "green": "grass tree outdoors green_eyes nature",
    "-green": "pink_flower purple_hair lipstick red_lips",
    "contrast": "1girl solo upper_body portrait long_hair standing",
    "-contrast": "fog blurry_background sepia sleeping",
    "edges": "animal cat whiskers jewelry detailed_background freckles",
    "-edges": "minimalism still_life no_humans",
}
FEATURES = ("bright", "warm", "green", "contrast", "edges")


@dataclass(frozen=True)
class Shape:
    """What WD14 exports differ in, and two ways of not being one."""

    batch: int | str = "batch_size"
    """A number fixes the batch, as some v2 exports do."""
    channels_first: bool = False
    side_px: int = SIDE_PX
    extra_outputs: int = 0
    """Values per image beyond the rows of the tags file."""
    logits: bool = False
    """True leaves out the sigmoid: the values are not probabilities."""


def build(folder: Path, seed: int = 0, shape: Shape | None = None) -> Path:
    """Write `model.onnx` and `selected_tags.csv` into `folder` and return it; the same seed gives the same bytes."""
    shape = shape or Shape()
    tags, leanings = tags_and_leanings()
    noise = np.random.default_rng(seed)
    weights = 2.0 * leanings + noise.normal(0, 0.25, leanings.shape)
    bias = np.array([-1.6 if tag.category == GENERAL else 0.0 if tag.name == "general" else -3.0 for tag in tags])
    bias += noise.normal(0, 0.3, bias.shape)
    weights = np.pad(weights, [(0, 0), (0, shape.extra_outputs)])
    bias = np.pad(bias, (0, shape.extra_outputs))
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(_model(weights.astype(np.float32), bias.astype(np.float32), shape), folder / "model.onnx")
    _write_tags(folder / "selected_tags.csv", tags)
    return folder


def tags_and_leanings() -> tuple[list[Tag], np.ndarray]:
    """All tags in file order, and [features, tags]: +1 or -1 where a feature makes a tag likely or unlikely, else 0."""
    tags = [Tag(name, RATING) for name in RATINGS]
    leanings = [np.zeros(len(FEATURES)) for _ in tags]
    for feature, names in GENERAL_TAGS.items():
        lean = np.zeros(len(FEATURES))
        lean[FEATURES.index(feature.lstrip("-"))] = -1 if feature.startswith("-") else 1
        tags += [Tag(name, GENERAL) for name in names.split()]
        leanings += [lean] * len(names.split())
    tags += [Tag(name, CHARACTER) for name in CHARACTERS]
    leanings += [np.zeros(len(FEATURES)) for _ in CHARACTERS]
    return tags, np.stack(leanings, axis=1)


def _model(weights: np.ndarray, bias: np.ndarray, shape: Shape) -> onnx.ModelProto:
    """Pixels [N, side, side, 3] BGR 0..255 -> FEATURES, each about -1..1 -> [N, tags]."""
    size = [3, shape.side_px, shape.side_px] if shape.channels_first else [shape.side_px, shape.side_px, 3]
    nodes = [
        helper.make_node("Transpose", ["input"], ["pixels"], perm=[0, 2, 3, 1] if shape.channels_first else [0, 1, 2, 3]),
        *_average("pixels", "mean"),
        # How far pixels are from that mean.
        helper.make_node("Sub", ["pixels", "mean"], ["centred"]),
        helper.make_node("Abs", ["centred"], ["distances"]),
        *_average("distances", "spread"),
        # How far neighbouring columns are from each other.
        helper.make_node("Slice", ["pixels", "one", "end", "columns"], ["right"]),
        helper.make_node("Slice", ["pixels", "zero", "minus_one", "columns"], ["left"]),
        helper.make_node("Sub", ["right", "left"], ["steps"]),
        helper.make_node("Abs", ["steps"], ["step_sizes"]),
        *_average("step_sizes", "edges"),
        helper.make_node("Concat", ["mean", "spread", "edges"], ["all_statistics"], axis=3),
        helper.make_node("Flatten", ["all_statistics"], ["statistics"]),
        helper.make_node("Gemm", ["statistics", "to_features", "feature_bias"], ["open_features"]),
        helper.make_node("Tanh", ["open_features"], ["features"]),
        helper.make_node("Gemm", ["features", "weights", "bias"], ["logits"]),
        helper.make_node("Identity" if shape.logits else "Sigmoid", ["logits"], ["output"]),
    ]
    to_features, feature_bias = _features()
    constants = {"to_features": to_features, "feature_bias": feature_bias, "weights": weights, "bias": bias}
    constants |= {"zero": [0], "one": [1], "minus_one": [-1], "end": [shape.side_px], "columns": [2]}
    graph = helper.make_graph(
        nodes,
        "tiny_tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [shape.batch, *size])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [shape.batch, len(bias)])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    if shape.channels_first:  # not WD14's layout, so that the model has to say what it takes
        helper.set_model_props(model, {"Image.BitmapPixelFormat": "Bgr8", "Image.NominalPixelRange": "NominalRange_0_255"})
    onnx.checker.check_model(model, full_check=True)
    return model


def _average(name: str, result: str) -> list[onnx.NodeProto]:
    """[N, height, width, 3] -> [N, 1, 1, 3]. One axis at a time: a float sum over all pixels would lose digits."""
    return [
        helper.make_node("ReduceMean", [name], [f"{result}_of_rows"], axes=[2], keepdims=1),
        helper.make_node("ReduceMean", [f"{result}_of_rows"], [result], axes=[1], keepdims=1),
    ]


def _features() -> tuple[np.ndarray, np.ndarray]:
    """Statistics [mean BGR, spread BGR, edges BGR] @ matrix + bias = FEATURES; 0 is an average photograph."""
    rows = {  # blue, green, red of the mean, then of the spread, then of the edges; and the bias
        "bright": ([1 / 150] * 3 + [0] * 6, -2.2),
        "warm": ([-1 / 40, 0, 1 / 40] + [0] * 6, -0.6),
        "green": ([-1 / 40, 1 / 20, -1 / 40] + [0] * 6, 0.0),
        "contrast": ([0] * 3 + [1 / 75] * 3 + [0] * 3, -2.2),
        "edges": ([0] * 6 + [1 / 9] * 3, -1.6),
    }
    matrix = np.array([rows[name][0] for name in FEATURES], dtype=np.float32).T
    return matrix, np.array([rows[name][1] for name in FEATURES], dtype=np.float32)


def _write_tags(path: Path, tags: list[Tag]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["tag_id", "name", "category", "count"])
        table.writerows([9999999 - i, tag.name, tag.category, 100000 - i] for i, tag in enumerate(tags))
