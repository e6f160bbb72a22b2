"""The tiny tagger as other groups export theirs: other layouts and numbers, more outputs, weights in more files."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data, write_external_data_tensors

SIDE = 448
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = [
    {"type": "convert_rgb", "force_background": "white"},
    {"type": "pad_to_size", "size": [SIDE, SIDE], "background_color": "white", "interpolation": "bicubic"},
    {"type": "resize", "size": SIDE, "interpolation": "bicubic", "max_size": None, "antialias": True},
    {"type": "center_crop", "size": [SIDE, SIDE]},
    {"type": "maybe_to_tensor"},
    {"type": "normalize", "mean": list(MEAN), "std": list(STD)},
]
"""As animetimm's repositories describe it."""


def change(folder: Path, edit) -> None:
    """Rewrite the model in `folder` as `edit` changes it."""
    model = onnx.load(folder / "model.onnx")
    edit(model)
    onnx.save(model, folder / "model.onnx")


def take_rgb(folder: Path, mean=MEAN, std=STD, channels_first=True, kind=TensorProto.FLOAT, side: int | str = SIDE) -> None:
    """Let the tiny tagger take red first and normalised values, by default as [N, 3, side, side]."""

    def edit(model: onnx.ModelProto) -> None:
        graph = model.graph
        constants = {"std_255": np.float32(std) * 255, "mean_255": np.float32(mean) * 255, "reverse": np.array([2, 1, 0])}
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
        into = [
            helper.make_node("Cast", ["pixel_values"], ["as_float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["as_float"], ["rows"], perm=[0, 2, 3, 1] if channels_first else [0, 1, 2, 3]),
            helper.make_node("Mul", ["rows", "std_255"], ["scaled"]),
            helper.make_node("Add", ["scaled", "mean_255"], ["red_first"]),
            helper.make_node("Gather", ["red_first", "reverse"], ["input"], axis=3),
        ]
        nodes = [*into, *graph.node]
        del graph.node[:], graph.input[:]
        graph.node.extend(nodes)
        shape = ["batch", 3, side, side] if channels_first else ["batch", side, side, 3]
        graph.input.append(helper.make_tensor_value_info("pixel_values", kind, shape))

    change(folder, edit)


def set_outputs(folder: Path, **sources: str) -> None:
    """Give the model these outputs, in this order: name -> the tensor of the tiny tagger that it is: features, logits or output."""

    def edit(model: onnx.ModelProto) -> None:
        graph = model.graph
        gemm, sigmoid = graph.node[-2:]
        gemm.output[0] = sigmoid.input[0] = "tiny_logits"
        sigmoid.output[0] = "tiny_output"
        tensors = {"features": ("features", 5), "logits": ("tiny_logits", 61), "output": ("tiny_output", 61)}
        del graph.output[:]
        for name, source in sources.items():
            name, (tensor, width) = name.replace("__", "/"), tensors[source]
            graph.node.append(helper.make_node("Identity", [tensor], [name]))
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]))

    change(folder, edit)


def move_weights(folder: Path, *files: str) -> None:
    """Move the weights of the tiny tagger into `files`, in turn."""
    model = onnx.load(folder / "model.onnx")
    for number, tensor in enumerate(tensor for tensor in model.graph.initializer if tensor.name in ("weights", "bias")):
        file = files[number % len(files)]
        (folder / file).parent.mkdir(exist_ok=True)
        set_external_data(tensor, location=file)
    (folder / "model.onnx").write_bytes(write_external_data_tensors(model, str(folder)).SerializeToString())
