"""Vision transformers with random weights and the shape of WD14 taggers: the cost of inference does not depend on the weights."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE_PX = 448
TAGS = 10_861
OPSET, IR_VERSION = 17, 8


@dataclass(frozen=True)
class Size:
    """The dimensions that determine the cost of a vision transformer."""

    patch_px: int
    width: int
    depth: int
    heads: int


LARGE = Size(patch_px=16, width=768, depth=12, heads=12)
"""ViT-B/16: wd-vit-tagger-v3."""
SMALL = Size(patch_px=32, width=192, depth=12, heads=3)
"""ViT-Ti/32."""


def build(folder: Path, size: Size) -> Path:
    """Write `model.onnx` and `selected_tags.csv` into `folder`, unless they exist, and return it."""
    if not (folder / "model.onnx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "selected_tags.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("tag_id", "name", "category", "count"), *((i, f"tag_{i}", 0, 1) for i in range(TAGS))])
        onnx.save(_Graph(size).model(), folder / "model.onnx")
    return folder


class _Graph:
    """An ONNX graph, built node by node; every method returns the name of its result."""

    def __init__(self, size: Size):
        self.size = size
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.noise = np.random.default_rng(0)

    def model(self) -> onnx.ModelProto:
        """Pixels [N, 448, 448, 3] -> probabilities [N, TAGS]."""
        size, tokens = self.size, (SIDE_PX // self.size.patch_px) ** 2
        pixels = self.node("Transpose", "input", perm=[0, 3, 1, 2])
        scaled = self.node("Mul", pixels, self.constant(np.float32(1 / 255)))
        patches = self.node("Conv", scaled, self.random(size.width, 3, size.patch_px, size.patch_px), strides=[size.patch_px] * 2)
        rows = self.node("Reshape", patches, self.constant(np.array([0, size.width, tokens])))
        hidden = self.node("Add", self.node("Transpose", rows, perm=[0, 2, 1]), self.random(1, tokens, size.width))
        for _ in range(size.depth):
            hidden = self.node("Add", hidden, self.attention(self.layer_norm(hidden), tokens))
            hidden = self.node("Add", hidden, self.mlp(self.layer_norm(hidden)))
        mean = self.node("ReduceMean", self.layer_norm(hidden), axes=[1], keepdims=0)
        # about 50 tags reach 0.35, as with real taggers
        tag_bias = self.constant(self.noise.normal(-4.5, 1.5, TAGS).astype(np.float32))
        self.node("Sigmoid", self.node("Add", self.linear(mean, size.width, TAGS), tag_bias), result="output")
        graph = helper.make_graph(
            self.nodes,
            "random_vit",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", SIDE_PX, SIDE_PX, 3])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", TAGS])],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def attention(self, hidden: str, tokens: int) -> str:
        size = self.size
        head_width = size.width // size.heads
        shape = self.constant(np.array([0, tokens, size.heads, head_width]))
        queries, keys, values = (
            self.node(
                "Transpose",
                self.node("Reshape", self.linear(hidden, size.width, size.width), shape),
                perm=[0, 2, 3, 1] if part == "keys" else [0, 2, 1, 3],
            )
            for part in ("queries", "keys", "values")
        )
        scores = self.node("Mul", self.node("MatMul", queries, keys), self.constant(np.float32(head_width**-0.5)))
        mixed = self.node("Transpose", self.node("MatMul", self.node("Softmax", scores, axis=-1), values), perm=[0, 2, 1, 3])
        merged_heads = self.node("Reshape", mixed, self.constant(np.array([0, tokens, size.width])))
        return self.linear(merged_heads, size.width, size.width)

    def mlp(self, hidden: str) -> str:
        wide = self.linear(hidden, self.size.width, 4 * self.size.width)
        erf = self.node("Erf", self.node("Mul", wide, self.constant(np.float32(0.5**0.5))))
        half = self.node("Mul", wide, self.constant(np.float32(0.5)))
        gelu = self.node("Mul", half, self.node("Add", erf, self.constant(np.float32(1))))
        return self.linear(gelu, 4 * self.size.width, self.size.width)

    def layer_norm(self, hidden: str) -> str:
        ones, zeros = np.ones(self.size.width, np.float32), np.zeros(self.size.width, np.float32)
        return self.node("LayerNormalization", hidden, self.constant(ones), self.constant(zeros), axis=-1, epsilon=1e-6)

    def linear(self, hidden: str, inputs: int, outputs: int) -> str:
        return self.node("Add", self.node("MatMul", hidden, self.random(inputs, outputs)), self.random(outputs))

    def random(self, *shape: int) -> str:
        return self.constant(self.noise.normal(0, 0.02, shape).astype(np.float32))

    def constant(self, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), f"constant_{len(self.constants)}"))
        return self.constants[-1].name

    def node(self, kind: str, *inputs: str, result: str = "", **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [result or f"value_{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]
