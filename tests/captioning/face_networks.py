"""Tiny networks with the inputs and outputs of YuNet and SFace: a red mark is a face, what is around it tells persons apart."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from common.faces import HubFile, OpenCVFaces
from common.files import sha256_of

STRIDES = (8, 16, 32)
BOX_PX = (80, 96)
"""Width and height of every detected face, at the size of the search."""
LANDMARKS_PX = ((-18, -12), (18, -12), (0, 6), (-14, 24), (14, 24))
"""Of both eyes, the nose and both corners of the mouth, from the centre of the box."""


def detector(file: Path) -> Path:
    """The score of a cell of 8 x 8 px is how red it is; coarser cells find nothing."""
    nodes, weights = [], []
    for stride in STRIDES:
        red = np.zeros((1, 3, stride, stride), np.float32)
        red[0, 2] = 1 / (255 * stride**2) if stride == 8 else 0  # the input is BGR
        red[0, :2] = -red[0, 2]
        box = [0.5, 0.5, *(math.log(length / stride) for length in BOX_PX)]
        landmarks = [0.5 + offset / stride for point in LANDMARKS_PX for offset in point]
        for name, values, bias in (("cls", red, [0]), ("obj", 0 * red, [1]), ("bbox", 0 * red, box), ("kps", 0 * red, landmarks)):
            kernel = np.repeat(values, len(bias), axis=0)
            weights += [numpy_helper.from_array(kernel, f"{name}_{stride}_w")]
            weights += [numpy_helper.from_array(np.array(bias, np.float32), f"{name}_{stride}_b")]
            weights += [numpy_helper.from_array(np.array([1, -1, len(bias)]), f"{name}_{stride}_s")]
            inputs = ["input", f"{name}_{stride}_w", f"{name}_{stride}_b"]
            nodes += [helper.make_node("Conv", inputs, [f"{name}_{stride}_c"], kernel_shape=[stride] * 2, strides=[stride] * 2)]
            nodes += [helper.make_node("Transpose", [f"{name}_{stride}_c"], [f"{name}_{stride}_t"], perm=[0, 2, 3, 1])]
            nodes += [helper.make_node("Reshape", [f"{name}_{stride}_t", f"{name}_{stride}_s"], [f"{name}_{stride}"])]
    channels = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
    outputs = [(f"{name}_{stride}", [1, (640 // stride) ** 2, count]) for name, count in channels.items() for stride in STRIDES]
    return _save(file, nodes, weights, ("input", [1, 3, 640, 640]), outputs)


def recognizer(file: Path) -> Path:
    """The vector is a fixed projection of the image at 8 x 8 px."""
    projection = np.random.default_rng(0).normal(size=(192, 128)).astype(np.float32)
    nodes = [
        helper.make_node("Sub", ["data", "middle"], ["centred"]),
        helper.make_node("AveragePool", ["centred"], ["small"], kernel_shape=[14, 14], strides=[14, 14]),
        helper.make_node("Flatten", ["small"], ["flat"]),
        helper.make_node("MatMul", ["flat", "projection"], ["fc1"]),
    ]
    weights = [numpy_helper.from_array(projection, "projection"), numpy_helper.from_array(np.float32([110]), "middle")]
    return _save(file, nodes, weights, ("data", [1, 3, 112, 112]), [("fc1", [1, 128])])


def _save(file: Path, nodes: list, weights: list, network_input: tuple, outputs: list[tuple]) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (network_input, *outputs)]
    graph = helper.make_graph(nodes, "tiny", values[:1], values[1:], weights)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), file)
    return file


def build(models_dir: Path) -> tuple[HubFile, ...]:
    """Both networks in `models_dir`, where the weights belong. Returns what `OpenCVFaces.weights` is with them."""
    files = [build(file.path(models_dir)) for build, file in zip((detector, recognizer), OpenCVFaces.weights, strict=True)]
    return tuple(replace(file, sha256=sha256_of(path)) for file, path in zip(OpenCVFaces.weights, files, strict=True))


def person(hue: int, size: tuple[int, int] = (640, 480)) -> Image.Image:
    """A red mark in the middle of an image; `hue`, of 255, is that of what is around it."""
    image = Image.new("HSV", (640, 480), (hue, 255, 220)).convert("RGB")
    image.paste((110, 110, 110), (280, 200, 320, 280))
    image.paste((255, 0, 0), (312, 232, 328, 248))
    return image.resize(size, Image.Resampling.BILINEAR)
