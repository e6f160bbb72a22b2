"""The reader as a tagger."""

import csv
import warnings
from pathlib import Path

import torch
from torch import nn

from benchmarks.world.people import ALL_TAGS
from benchmarks.world.reader import Reader
from captioning.captions import GENERAL, RATING

RATINGS = ("general", "sensitive", "questionable", "explicit")


class _Tagger(nn.Module):
    def __init__(self, reader: Reader):
        super().__init__()
        self.network = reader.network
        self.ratings = nn.Buffer(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        images = pixels[..., [2, 1, 0]].permute(0, 3, 1, 2) / 127.5 - 1
        tags = self.network(images)[:, : len(ALL_TAGS)].sigmoid()
        return torch.cat([0 * tags[:, : len(RATINGS)] + self.ratings, tags], 1)  # an `expand` would fix the batch


def write_tagger(reader: Reader, folder: Path) -> None:
    """Write `model.onnx` and `selected_tags.csv` in WD14's interface: [N, side, side, 3], blue first, 0 .. 255."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"input_names": ["input"], "output_names": ["output"], "dynamic_axes": {"input": {0: "batch"}, "output": {0: "batch"}}}
    tagger = _Tagger(Reader(reader.network, reader.side, torch.device("cpu"))).eval()
    example = torch.zeros(2, reader.side, reader.side, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no onnxscript is on its way out
        torch.onnx.export(tagger, (example,), str(folder / "model.onnx"), dynamo=False, opset_version=17, **names)
    rows = [(name, RATING) for name in RATINGS] + [(tag.replace(" ", "_"), GENERAL) for tag in ALL_TAGS]
    with (folder / "selected_tags.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["tag_id", "name", "category", "count"])
        table.writerows([9999999 - number, name, category, 1000] for number, (name, category) in enumerate(rows))
