"""The networks of the world as the product takes them: a base model for files of any size, and the reader as a tagger."""

import csv
import shutil
import warnings
from pathlib import Path

import torch
from diffusers.models.embeddings import Timesteps
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.world.people import ALL_TAGS
from benchmarks.world.reader import Reader
from captioning.captions import GENERAL, RATING
from common.files import parse_json, read_file

_UNET = "unet/diffusion_pytorch_model.safetensors"
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


def image_side(world: Path) -> int:
    """Pixels of a side of the images that the world's model draws."""
    return parse_json(read_file(world / "world.json"))["px"]


def write_base_model(world: Path, folder: Path) -> None:
    """Copy the world's base model to `folder`, made independent of the sizes in its conditioning.

    It has only ever seen one size, that of its images, and would not know what to make of others; but the files of a data set are
    larger, and training tells the model so. What that one size adds to the first layer becomes a part of the layer's bias.
    """
    shutil.copytree(world, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("reader", "*.png", "world.json"))
    config = parse_json(read_file(world / "unet" / "config.json"))
    weights = load_file(world / _UNET)
    side, channels = image_side(world), config["addition_time_embed_dim"]
    sizes = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32)
    embedded = Timesteps(channels, config["flip_sin_to_cos"], config["freq_shift"])(sizes).flatten()
    first, bias = (weights[f"add_embedding.linear_1.{part}"].float() for part in ("weight", "bias"))
    of_sizes = first[:, -len(embedded) :]
    weights["add_embedding.linear_1.bias"] = bias + of_sizes @ embedded
    of_sizes.zero_()
    weights["add_embedding.linear_1.weight"] = first
    save_file(weights, folder / _UNET, metadata={"format": "pt"})


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
