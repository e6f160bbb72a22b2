"""`python -m benchmarks.world.pretrain FOLDER`: teaches a small SDXL of the true architecture to draw people from tags.

Writes a diffusers folder, which `scripts/train_lora.py` takes as a base model, and next to its networks `reader/` (the judge of
samples), `world.json` (figures) and `samples.png`. With `--processes 4` on four H100 it takes eight minutes. The stages are run one
after the other and each leaves its result in the folder, from which it can go on: `--stages unet samples`.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.world.beginnings import average_words, initialise, pass_colours, pass_noise, shallow
from benchmarks.world.dataset import CaptionTokens, Drawn, drawn
from benchmarks.world.learning import Rates, encoded, train_unet, train_vae
from benchmarks.world.people import ALL_TAGS, SIMPLE_TRAITS, TRAITS
from benchmarks.world.reader import WIDTHS, Reader, train_reader
from benchmarks.world.verdict import judge_reader, judge_samples, judge_vae
from demo import tiny_sdxl
from demo.sgm_names import name_in_files
from training.config import ProcessSettings
from training.models.base_model import find_base
from training.models.sdxl import WEIGHT_STEMS
from training.models.weights import load_text_encoders, load_tokenizers, load_unet, load_vae
from training.system.device import choose_precision
from training.system.process_group import ProcessGroup, process_group
from training.system.processes import launch, needs_launcher, rank_info

NETWORKS = ("vae", "unet", "text_encoder", "text_encoder_2")
STAGES = ("reader", "vae", "unet", "samples")
READABLE_FROM = 0.5
"""Traits of which the reader sees more than this share of the variance in reconstructions count in samples."""
PART_BYTES = 15 * 2**20 - 2**16


@dataclass(frozen=True)
class Length:
    """How much of everything. Times are in seconds; a number of steps takes the place of a time, if it is not 0: then the result
    does not depend on the speed of the machine."""

    images: int = 80_000
    reader_s: float = 50
    vae_s: float = 190
    unet_s: float = 200
    reader_steps: int = 0
    vae_steps: int = 0
    unet_steps: int = 0
    samples: int = 512
    steps: int = 25
    guidance: float = 4.0


@dataclass(frozen=True)
class World:
    """Dimensions of a world and its model, and how long it is trained unless something else is asked for."""

    size: tiny_sdxl.Size
    px: int = 128
    is_simple: bool = False
    """Whether people differ in few traits, and shots in few parts."""
    reader_widths: tuple[int, ...] = WIDTHS
    length: Length = Length()
    rates: Rates = Rates()  # noqa: RUF009


SMALL_WORLD = World(
    tiny_sdxl.Size(
        unet=(64, 64, 96), heads=(2, 2, 3), time_ids=16, vae=(32, 64, 96, 96), clip_l=(64, 3, 2, 64), clip_g=(96, 4, 3, 96)
    )
)
TINY_WORLD = World(
    tiny_sdxl.Size(unet=(32, 32, 32), groups=2, time_ids=8, vae=(8, 16, 32, 32), clip_g=(32, 3, 1, 32)),
    px=64,
    is_simple=True,
    reader_widths=(16, 32, 64, 64),
    length=Length(images=4000, reader_steps=300, vae_steps=300, unet_steps=800, samples=48, steps=15),
    rates=Rates(reader_batch=64, reader_rate=3e-3, vae_batch=4, vae_rate=4e-3, reader_weight=0, batch=16, unet_rate=2e-3),
)
"""Learns on two CPU cores in minutes, with a process on each."""
WORLDS = {"small": SMALL_WORLD, "tiny": TINY_WORLD}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.pretrain", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=WORLDS, default="small")
    parser.add_argument("--stages", nargs="+", choices=("images", *STAGES), default=STAGES)
    parser.add_argument("--data", type=Path, help="folder of the drawn images, to draw them once for several runs")
    parser.add_argument("--from", dest="origin", type=Path, help="parts or another model of the same size, from which to go on")
    parser.add_argument("--parts", type=Path, help="folder for the result as a few files of 15 MiB")
    parser.add_argument("--join", type=Path, metavar="PARTS", help="only write the model that is in PARTS to the folder")
    parser.add_argument("--processes", type=int, default=1, help="one for each GPU; each has batches of its own")
    for name, value in (asdict(Length()) | asdict(Rates())).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value))
    given = parser.parse_args()
    for parts in filter(None, (given.join, given.origin)):
        if not (parts / "world.json").exists():
            parser.error(f"{parts} holds no world.json, which the pre-training writes")
    if given.join:
        join(given.join, given.folder)
        return
    settings = ProcessSettings(num_processes=given.processes)
    if needs_launcher(settings):
        sys.exit(launch([sys.executable, "-m", "benchmarks.world.pretrain", *sys.argv[1:]], settings))
    world, ranks = WORLDS[given.size], rank_info()
    asked = {name: value for name, value in vars(given).items() if value is not None}
    length, rates = (
        replace(usual, **{name: asked[name] for name in asdict(usual) if name in asked}) for usual in (world.length, world.rates)
    )
    if given.origin and ranks.rank == 0:
        continue_from(given.origin, given.folder)
    with process_group(ranks) as group:
        pretrain(given.folder, length, world, rates=rates, stages=given.stages, data=given.data, parts=given.parts, group=group)


def pretrain(
    folder: Path,
    length: Length,
    world: World = SMALL_WORLD,
    *,
    rates: Rates | None = None,
    stages: tuple[str, ...] = STAGES,
    data: Path | None = None,
    parts: Path | None = None,
    group: ProcessGroup | None = None,
) -> dict:
    """Run the stages, and return the figures of world.json."""
    started, group, rates, count = time.monotonic(), group or ProcessGroup(), rates or world.rates, min(2048, length.images // 8)
    with tempfile.TemporaryDirectory() as scratch:
        data = data or Path(group.broadcast_object(lambda: scratch))
        for is_my_turn in (group.is_main_process, not group.is_main_process):  # the main process draws, the others read
            if is_my_turn:
                learned = drawn(length.images, world.px, data / f"learned-{length.images}-{world.px}.npy", 20, world.is_simple)
                unseen = drawn(count, world.px, data / f"unseen-{count}-{world.px}.npy", 21, world.is_simple)
            group.barrier()
    say(f"{length.images} images", started)
    device = choose_precision("bf16", group.gpu).device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if group.is_main_process and not (folder / "model_index.json").is_file():
        tiny_sdxl.build(folder, size=world.size, merges=merges_of(ALL_TAGS))
    file = folder / "world.json"
    figures = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    figures |= asdict(world) | {"length": asdict(length), "rates": asdict(rates)}
    task = _Task(folder, world, length, rates, learned, unseen, figures, device, group)
    for stage in (stage for stage in STAGES if stage in stages):
        group.barrier()
        begun = time.monotonic()
        figures[stage] = _RUN[stage](task)
        if group.is_main_process:
            figures[stage]["seconds"] = round(time.monotonic() - begun)
            file.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
            say(f"{stage}: {json.dumps(figures[stage])}", started)
            if parts:  # what is learned is not lost if a later stage fails
                write_parts(folder, parts)
    group.barrier()
    return figures


def say(text: str, started: float) -> None:
    print(f"[{time.monotonic() - started:.0f} s] {text}", flush=True)


@dataclass(frozen=True)
class _Task:
    """What a stage works with."""

    folder: Path
    world: World
    length: Length
    rates: Rates
    learned: Drawn
    unseen: Drawn
    figures: dict
    """Of the stages that have been run; one of them goes on from the weights in the folder."""
    device: torch.device
    group: ProcessGroup

    def prepared(self, stage: str, networks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Networks of the stage, trainable."""
        for network in networks:
            if stage not in self.figures:
                initialise(network)
            network.requires_grad_(True).train()
        return networks


def _reader(task: _Task) -> dict:
    if not task.group.is_main_process:
        return {}
    learned, rates, length = task.learned, task.rates, task.length
    options = {"rate": rates.reader_rate, "batch": rates.reader_batch, "widths": task.world.reader_widths}
    reader = train_reader(
        learned.images, learned.captions, learned.people, length.reader_s, task.device, steps=length.reader_steps, **options
    )
    reader.save(task.folder / "reader")
    return judge_reader(reader, task.unseen)


def _vae(task: _Task) -> dict:
    base = find_base(str(task.folder), task.folder.parent)
    [vae] = task.prepared("vae", [load_vae(base, task.device)])
    if task.world.is_simple and "vae" not in task.figures:
        pass_colours(vae)
    reader = Reader.load(task.folder / "reader", task.device) if (task.folder / "reader").is_dir() else None
    result = train_vae(vae, task.learned, reader, task.length.vae_s, task.rates, task.device, task.group, task.length.vae_steps)
    if not task.group.is_main_process:
        return result
    result["scaling"] = round(1 / encoded(vae, task.learned.images[: len(task.unseen.images)], task.device).std().item(), 5)
    write_network(task.folder / "vae", "vae", vae)
    write_scaling(task.folder, result["scaling"])
    result |= judge_vae(vae, task.unseen, reader, task.device)
    if reader:
        explained, differing = result["reconstructions"]["explained"], SIMPLE_TRAITS if task.world.is_simple else TRAITS
        kept = [trait for trait in differing if explained[trait] > READABLE_FROM]
        Reader(reader.network, reader.side, task.device, kept or TRAITS).save(task.folder / "reader")
    return result


def _unet(task: _Task) -> dict:
    base = find_base(str(task.folder), task.folder.parent)
    vae = load_vae(base, task.device)
    mine = slice(task.group.rank, None, task.group.world_size)
    latents = encoded(vae, task.learned.images[mine], task.device) * vae.config.scaling_factor
    networks = [load_unet(base, task.device, torch.float32), *load_text_encoders(base, task.device, torch.float32)]
    task.prepared("unet", networks)
    if task.world.is_simple and "unet" not in task.figures:
        pass_noise(networks[0])
        average_words(networks[1:])
    captions = CaptionTokens(load_tokenizers(base, task.folder.parent), task.learned.captions[mine], task.device)
    px, length = task.world.px, task.length
    with shallow(networks[0]) if task.world.is_simple else nullcontext():
        result = train_unet(
            networks, latents.to(task.device), captions, px, length.unet_s, task.rates, task.group, length.unet_steps
        )
    if not task.group.is_main_process:
        return result
    for name, network in zip(NETWORKS[1:], networks, strict=True):
        write_network(task.folder / name, name, network)
    return result


def _samples(task: _Task) -> dict:
    if not task.group.is_main_process:
        return {}
    length = task.length
    return judge_samples(task.folder, task.unseen, length.samples, length.steps, length.guidance, task.device)


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


def write_scaling(folder: Path, scaling: float) -> None:
    """The factor that gives latents a standard deviation of 1."""
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"scaling_factor": scaling}, indent=2) + "\n", "utf-8")


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
    write_scaling(folder, figures["vae"]["scaling"])
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
