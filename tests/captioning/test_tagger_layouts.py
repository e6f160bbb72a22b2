"""The families of taggers in their own layouts, from the two files to the captions, by each model's known point."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from captioning.captions import CHARACTER, GENERAL, RATING

WD_RATINGS = ("general", "sensitive", "questionable", "explicit")
SANKAKU_RATINGS = ("safe", "questionable", "explicit")


@dataclass(frozen=True)
class Layout:
    """What the families of taggers differ in."""

    repository: str
    point: float
    """Where its precision equals its recall."""
    rows: int
    batch: int | str = "batch_size"
    names: tuple[str, str] = ("input", "output")
    """Of the input and the output."""
    ratings: tuple[str, ...] = WD_RATINGS
    side_px: int = 448


V2_NAMES = ("input_1:0", "predictions_sigmoid")
LAYOUTS = [
    Layout("SmilingWolf/wd-swinv2-tagger-v3", 0.2653, 10_861),
    Layout("SmilingWolf/wd-v1-4-swinv2-tagger-v2", 0.3771, 9_083, names=V2_NAMES),
    Layout("SmilingWolf/wd-v1-4-convnext-tagger-v2", 0.3685, 9_083, batch=1, names=V2_NAMES),
    Layout("deepghs/idolsankaku-eva02-large-tagger-v1", 0.4985, 500, ratings=SANKAKU_RATINGS),
    Layout("deepghs/idolsankaku-eva02-large-tagger-v1", 0.4985, 500, ratings=SANKAKU_RATINGS, side_px=480),
]


def rows_of(layout: Layout) -> list[tuple[str, int, float, tuple[float, float, float]]]:
    """Each tag's name, category, probability in a black image, and how far full blue, green and red move its logit."""
    flat, surest = (0.0, 0.0, 0.0), layout.ratings.index("questionable")
    ratings = [(name, RATING, 0.6 if place == surest else 0.5, flat) for place, name in enumerate(layout.ratings)]
    general = [
        ("blue_theme", GENERAL, 0.01, (9.0, 0.0, 0.0)),
        ("green_theme", GENERAL, 0.01, (0.0, 9.0, 0.0)),
        ("red_theme", GENERAL, 0.01, (0.0, 0.0, 9.0)),
        ("just_above", GENERAL, layout.point + 0.002, flat),
        ("just_below", GENERAL, layout.point - 0.002, flat),
        (">_<", GENERAL, 0.8, flat),
    ]
    characters = [("hatsune_miku", CHARACTER, 0.87, flat), ("link", CHARACTER, 0.83, flat)]
    fillers = layout.rows - len(ratings) - len(general) - len(characters)
    return [*ratings, *general, *((f"tag_{place}", GENERAL, 0.001, flat) for place in range(fillers)), *characters]


def build(folder: Path, layout: Layout) -> None:
    """`model.onnx`: the mean of blue, green and red, 0..255 -> one logit per row -> a sigmoid; and its `selected_tags.csv`."""
    rows = rows_of(layout)
    known = np.array([probability for _, _, probability, _ in rows])
    constants = {
        "weights": np.array([moved_by for *_, moved_by in rows], np.float32).T / np.float32(255),
        "bias": np.log(known / (1 - known)).astype(np.float32),
    }
    into, out = layout.names
    nodes = [
        helper.make_node("ReduceMean", [into], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("Gemm", ["means", "weights", "bias"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], [out]),
    ]
    image = [layout.batch, layout.side_px, layout.side_px, 3]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info(into, TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, [layout.batch, len(rows)])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    folder.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx")
    with (folder / "selected_tags.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["tag_id", "name", "category", "count"])
        table.writerows([place, name, category, 1000] for place, (name, category, *_) in enumerate(rows))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.repository.partition('/')[2]}-{layout.side_px}")
def test_captions_of_every_family_of_taggers(stage, layout):
    build(stage.models / layout.repository.partition("/")[2], layout)
    for name, colour in {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}.items():
        Image.new("RGB", (600, 600), colour).save(stage.images / f"{name}.png")
    choice = {"CAPTION_THRESHOLD": "auto", "CAPTION_CHARACTER_TAGS": 1, "CAPTION_RATING_TAGS": 1, "CAPTION_BATCH_SIZE": 2}
    ended = stage.run(CAPTION_MODEL=layout.repository, TRIGGER_WORD="sks", **choice)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"tagging 3 images on the CPU, {1 if layout.batch == 1 else 2} at a time" in ended.stdout
    assert [np.load(path).shape for path in stage.stored()] == [(layout.rows,)] * 3
    assert stage.captions() == {
        f"{name}.txt": f"sks, {name} theme, hatsune miku, >_<, just above, questionable\n" for name in ("blue", "green", "red")
    }
