"""`python -m benchmarks.world.pretrain FOLDER`: teaches a small SDXL of the true architecture to draw people from tags.

Writes a diffusers folder, which `scripts/train_lora.py` takes as a base model, and next to its networks `reader/` (the judge of
samples), `world.json` (figures) and `samples.png`. On an H100 it takes eight minutes. The stages are run one after the other and
each leaves its result in the folder, so that later ones can be run again: `--stages unet samples`.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from benchmarks.world.dataset import CaptionTokens, Drawn, drawn
from benchmarks.world.learning import Rates, encoded, initialised, train_unet, train_vae
from benchmarks.world.people import ALL_TAGS
from benchmarks.world.reader import train_reader
from benchmarks.world.verdict import judge_reader, judge_samples, judge_vae
from demo import tiny_sdxl
from demo.sgm_names import name_in_files
from training.models.base_model import find_base
from training.models.sdxl import WEIGHT_STEMS
from training.models.weights import load_text_encoders, load_tokenizers, load_unet, load_vae
from training.system.device import choose_precision

NETWORKS = ("vae", "unet", "text_encoder", "text_encoder_2")
STAGES = ("reader", "vae", "unet", "samples")
PART_BYTES = 15 * 2**20 - 2**16


@dataclass(frozen=True)
class World:
    """Dimensions of a world and its model."""

    size: tiny_sdxl.Size
    px: int = 128


SIZES = {
    "small": World(
        tiny_sdxl.Size(
            unet=(64, 64, 96), heads=(2, 2, 3), time_ids=16, vae=(32, 64, 96, 96), clip_l=(64, 3, 2, 64), clip_g=(96, 4, 3, 96)
        )
    ),
    "tiny": World(
        tiny_sdxl.Size(
            unet=(32, 32, 64), heads=(1, 1, 2), time_ids=8, vae=(32, 32, 32, 32), clip_l=(32, 2, 1, 32), clip_g=(64, 3, 1, 64)
        ),
        64,
    ),
    "wide": World(
        tiny_sdxl.Size(
            unet=(96, 96, 96), heads=(3, 3, 3), time_ids=16, vae=(32, 64, 64, 64), clip_l=(64, 3, 2, 64), clip_g=(96, 3, 3, 96)
        )
    ),
}


@dataclass(frozen=True)
class Length:
    """How much of everything. Times are in seconds."""

    images: int = 60_000
    reader_s: float = 50
    vae_s: float = 110
    unet_s: float = 230
    samples: int = 512
    steps: int = 25
    guidance: float = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.pretrain", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--stages", nargs="+", choices=("images", *STAGES), default=STAGES)
    parser.add_argument("--data", type=Path, help="folder of the drawn images, to draw them once for several runs")
    parser.add_argument("--from", dest="origin", type=Path, help="parts or another model of the same size, from which to go on")
    parser.add_argument("--parts", type=Path, help="folder for the result as a few files of 15 MiB")
    parser.add_argument("--join", type=Path, metavar="PARTS", help="only write the model that is in PARTS to the folder")
    for group in (Length(), Rates()):
        for name, value in asdict(group).items():
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args()
    if given.join:
        join(given.join, given.folder)
        return
    length, rates = (kind(**{name: getattr(given, name) for name in asdict(kind())}) for kind in (Length, Rates))
    if given.origin:
        continue_from(given.origin, given.folder)
    try:
        pretrain(given.folder, length, SIZES[given.size], rates=rates, stages=given.stages, data=given.data)
    finally:  # what was learned before a failure is not lost
        if given.parts and (given.folder / "world.json").is_file():
            write_parts(given.folder, given.parts)


def pretrain(
    folder: Path,
    length: Length,
    world: World = SIZES["small"],
    *,
    rates: Rates = Rates(),  # noqa: B008
    stages: tuple[str, ...] = STAGES,
    data: Path | None = None,
) -> dict:
    """Run the stages, and return the figures of world.json."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        data = data or Path(scratch)
        learned = drawn(length.images, world.px, data / f"images-{length.images}-{world.px}.npy")
        unseen = drawn(min(2048, length.images), world.px, data / f"unseen-{length.images}-{world.px}.npy", seed=21)
    say(f"{length.images} images", started)
    device = choose_precision("bf16").device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if not (folder / "model_index.json").is_file():
        tiny_sdxl.build(folder, size=world.size, merges=merges_of(ALL_TAGS))
    figures_file = folder / "world.json"
    figures = json.loads(figures_file.read_text("utf-8")) if figures_file.is_file() else {}
    figures |= {"px": world.px, "size": asdict(world.size), "length": asdict(length), "rates": asdict(rates)}
    for stage in STAGES:
        if stage in stages:
            begun = time.monotonic()
            figures[stage] = _RUN[stage](folder, learned, unseen, length, rates, device)
            figures[stage]["seconds"] = round(time.monotonic() - begun)
            figures_file.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
            say(f"{stage}: {json.dumps(figures[stage])}", started)
    return figures


def say(text: str, started: float) -> None:
    print(f"[{time.monotonic() - started:.0f} s] {text}", flush=True)


def _reader(folder: Path, learned: Drawn, unseen: Drawn, length: Length, rates: Rates, device: torch.device) -> dict:
    reader = train_reader(learned.images, learned.captions, learned.people, length.reader_s, device, rate=rates.reader_rate)
    reader.save(folder / "reader")
    return judge_reader(reader, unseen)


def _vae(folder: Path, learned: Drawn, unseen: Drawn, length: Length, rates: Rates, device: torch.device) -> dict:
    base = find_base(str(folder), folder.parent)
    figures = json.loads((folder / "world.json").read_text("utf-8")) if (folder / "world.json").is_file() else {}
    vae = load_vae(base, device)
    if "vae" in figures:
        vae.requires_grad_(True).train()
    else:
        initialised(vae)
    steps = train_vae(vae, learned.images, length.vae_s, rates, device)
    _, scaling = encoded(vae, learned.images[:4096], device)
    vae.register_to_config(scaling_factor=scaling)
    write_network(folder / "vae", "vae", vae)
    return {"steps": steps, "scaling": scaling} | judge_vae(vae, unseen, folder / "reader", device)


def _unet(folder: Path, learned: Drawn, unseen: Drawn, length: Length, rates: Rates, device: torch.device) -> dict:
    base = find_base(str(folder), folder.parent)
    figures = json.loads((folder / "world.json").read_text("utf-8"))
    vae = load_vae(base, device)
    latents, _ = encoded(vae, learned.images, device)
    networks = [load_unet(base, device, torch.float32), *load_text_encoders(base, device, torch.float32)]
    for network in networks:
        if "unet" in figures:
            network.requires_grad_(True).train()
        else:
            initialised(network)
    captions = CaptionTokens(load_tokenizers(base, folder.parent), learned.captions, device)
    result = train_unet(networks, latents.to(device) * vae.config.scaling_factor, captions, learned.images.shape[-1], length.unet_s, rates)  # fmt: skip # noqa: E501
    for name, network in zip(NETWORKS[1:], networks, strict=True):
        write_network(folder / name, name, network)
    return result


def _samples(folder: Path, learned: Drawn, unseen: Drawn, length: Length, rates: Rates, device: torch.device) -> dict:
    return judge_samples(folder, unseen, length.samples, length.steps, length.guidance, device)


_RUN = {"reader": _reader, "vae": _vae, "unet": _unet, "samples": _samples}


def merges_of(texts: tuple[str, ...]) -> list[str]:
    """Merges of a tokenizer for which every word of `texts` is one token."""
    found = {}
    for word in dict.fromkeys(word for text in texts for word in text.split()):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            found[f"{parts[0]} {parts[1]}"] = None
            parts = [parts[0] + parts[1], *parts[2:]]
    return list(found)


def write_network(folder: Path, name: str, network: torch.nn.Module) -> None:
    """Replace the random weights in a diffusers folder, in fp16."""
    weights = {name_in_files(name, key): value.cpu().half().contiguous() for key, value in network.state_dict().items()}
    save_file(weights, folder / f"{WEIGHT_STEMS[name]}.safetensors", metadata={"format": "pt"})
    if isinstance(network, AutoencoderKL):
        network.save_config(folder)


def write_parts(folder: Path, parts: Path) -> None:
    """The model in bf16, in files of 15 MiB that `join` puts together, with its figures and samples."""
    parts.mkdir(parents=True, exist_ok=True)
    files = {name: folder / name / f"{WEIGHT_STEMS[name]}.safetensors" for name in NETWORKS}
    tensors = {f"{name}/{key}": value for name, file in files.items() for key, value in load_file(file).items()}
    part: dict[str, torch.Tensor] = {}
    number = 0
    for key, value in tensors.items():
        value = value.bfloat16()
        if sum(each.nbytes for each in part.values()) + value.nbytes > PART_BYTES:
            save_file(part, parts / f"part{number}.safetensors")
            part, number = {}, number + 1
        part[key] = value
    save_file(part, parts / f"part{number}.safetensors")
    for source in (folder / "world.json", folder / "samples.png", folder / "reader" / "reader.safetensors"):
        if source.is_file():
            (parts / source.name).write_bytes(source.read_bytes())


def join(parts: Path, folder: Path) -> None:
    """Write the diffusers folder whose `write_parts` are in `parts`."""
    figures = json.loads((parts / "world.json").read_text("utf-8"))
    size = tiny_sdxl.Size(**{name: tuple(value) if isinstance(value, list) else value for name, value in figures["size"].items()})
    tiny_sdxl.build(folder, size=size, merges=merges_of(ALL_TAGS))
    tensors = {key: value for file in sorted(parts.glob("part*.safetensors")) for key, value in load_file(file).items()}
    for name in NETWORKS:
        weights = {key.partition("/")[2]: value.half() for key, value in tensors.items() if key.partition("/")[0] == name}
        save_file(weights, folder / name / f"{WEIGHT_STEMS[name]}.safetensors", metadata={"format": "pt"})
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"scaling_factor": figures["vae"]["scaling"]}, indent=2))
    (folder / "reader").mkdir(exist_ok=True)
    for name, target in (("world.json", folder), ("samples.png", folder), ("reader.safetensors", folder / "reader")):
        if (parts / name).is_file():
            (target / name).write_bytes((parts / name).read_bytes())


def continue_from(origin: Path, folder: Path) -> None:
    """Begin `folder` with what is in `origin`, parts or a model."""
    if (origin / "part0.safetensors").is_file():
        join(origin, folder)
    elif origin.resolve() != folder.resolve():
        shutil.copytree(origin, folder, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
