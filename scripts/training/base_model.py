"""Find the base model, say everything that is wrong with it, and know where each of its weights lies.

Reads headers and JSON only, so that it takes milliseconds.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import ModelError, one_list
from training import single_file
from training.schedule import Schedule
from training.single_file import Source, official_clip_name, sgm_source
from training.weights import FLOATS, WeightsFile, digest, read_header

SDXL_REPOSITORY = "stabilityai/stable-diffusion-xl-base-1.0"
DOWNLOADED = (
    "model_index.json",
    "scheduler/*.json",
    "tokenizer*/*",
    "text_encoder*/config.json",
    "text_encoder*/model.fp16.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
"""What training reads of SDXL_REPOSITORY: 7 GB instead of 77."""
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
ESSENTIAL = {
    "unet": ("conv_in.weight", "add_embedding.linear_1.weight", "mid_block.attentions.0.proj_in.weight", "conv_out.weight"),
    "vae": ("encoder.conv_in.weight", "quant_conv.weight", "decoder.conv_out.weight"),
    "text_encoder": ("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"),
    "text_encoder_2": ("text_model.embeddings.token_embedding.weight", "text_projection.weight"),
}
"""A few weights of each part: a file without them does not hold the part. All of them are compared when it is loaded."""
_SDXL_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "addition_embed_type": "text_time",
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "time_cond_proj_dim": None,
}
_OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@dataclass(frozen=True)
class Part:
    """One network of the base: its configuration, and the files that hold its weights."""

    name: str
    config: dict[str, Any]
    files: tuple[WeightsFile, ...]
    is_sgm: bool
    """The weights lie in one file in the original layout."""

    def find(self, weight: str) -> tuple[WeightsFile, Source] | None:
        """Where the weight that the module calls `weight` lies."""
        for source in self._sources(weight):
            for file in self.files:
                if source.key in file.tensors:
                    return file, source
        return None

    def misfits(self, shapes: dict[str, tuple[int, ...]]) -> list[str]:
        """What is missing or has another shape among the weights that the module expects."""
        complaints = []
        for weight, shape in shapes.items():
            found = self.find(weight)
            if found is None:
                complaints.append(f"{weight} is missing")
            elif (there := found[1].shape_of_weight(found[0].tensors[found[1].key].shape, len(shape))) != shape:
                complaints.append(f"{weight} has the shape {list(there)}, not {list(shape)}")
        return complaints

    def digest(self) -> str:
        """SHA-256 of the part's weights, for what is derived from them. Reads them all."""
        names = {file.path: [key for key in file.tensors if self._owns(key)] for file in self.files}
        return "-".join(digest(file, names[file.path]) for file in self.files)

    def _owns(self, key: str) -> bool:
        return not self.is_sgm or key.startswith(single_file.PREFIXES[self.name])

    def _sources(self, weight: str) -> Iterator[Source]:
        name = official_clip_name(self.name, weight)
        if self.is_sgm:
            yield sgm_source(self.name, name)
            return
        yield Source(name)
        if self.name == "text_encoder":
            yield Source(name.removeprefix("text_model."))
        if self.name == "vae":
            for new, old in _OLD_VAE_NAMES.items():
                if f".{new}." in name:
                    yield Source(name.replace(new, old))


@dataclass(frozen=True)
class BaseModel:
    """A base model that can be trained on."""

    path: Path
    """The diffusers folder, or the single file."""
    parts: dict[str, Part]
    schedule: Schedule
    """What the model predicts, as it says itself."""

    @property
    def name(self) -> str:
        return self.path.stem if self.path.is_file() else self.path.name


def find_base(base_model: str, models_dir: Path) -> BaseModel:
    """The base model of that name in `models_dir`, or at that path.

    Raises ModelError with everything that is wrong with it.
    """
    path = _locate(base_model, models_dir)
    return _from_folder(path) if path.is_dir() else _from_file(path)


def download_command(repository: str, target: Path, patterns: tuple[str, ...]) -> str:
    """The command that fetches the files that match `patterns`."""
    return " ".join([f"hf download {repository} --local-dir {target}", *(f"--include '{pattern}'" for pattern in patterns)])


def _locate(base_model: str, models_dir: Path) -> Path:
    wanted = base_model.strip()
    if wanted:
        for path in (models_dir / wanted, models_dir / f"{wanted}.safetensors", Path(wanted).expanduser()):
            if path.exists():
                return path
    repository = wanted if re.fullmatch(r"[\w.-]+/[\w.-]+", wanted) and not wanted.endswith(".safetensors") else SDXL_REPOSITORY
    command = download_command(repository, models_dir / repository.split("/")[1], DOWNLOADED)
    raise ModelError(
        f"base model {wanted!r}: neither in {models_dir} nor a path. Set base_model (BASE_MODEL) to a diffusers folder or a "
        f".safetensors file, or fetch one (7 GB):\n  {command}"
    )


def _from_folder(folder: Path) -> BaseModel:
    complaints: list[str] = []
    index = _read_json(folder / "model_index.json", complaints)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", complaints)
    parts = {name: _folder_part(folder / name, complaints) for name in STEMS}
    for name in ("tokenizer", "tokenizer_2"):
        if not has_tokenizer(folder / name):
            complaints.append(f"{name}/vocab.json and merges.txt are missing")
    schedule = _schedule_of(scheduler, parts["vae"].config, complaints)
    another = _another_model(index, parts["unet"].config)
    if another:
        raise ModelError(f"{folder}: {another}; LoRACat trains on SDXL base models")
    if complaints:
        raise ModelError(one_list(f"{folder}: this base model cannot be used:", [*complaints, _folder_remedy(folder)]))
    return BaseModel(folder, parts, schedule)


def has_tokenizer(folder: Path) -> bool:
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


def _from_file(file: Path) -> BaseModel:
    raise NotImplementedError


def _folder_remedy(folder: Path) -> str:
    return f"for SDXL itself: {download_command(SDXL_REPOSITORY, folder, DOWNLOADED)}"


def _read_json(file: Path, complaints: list[str]) -> dict[str, Any]:
    shown = "/".join(file.parts[-2:])
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        complaints.append(f"{shown}: is no JSON object")
    except FileNotFoundError:
        complaints.append(f"{shown} is missing")
    except ValueError:
        complaints.append(f"{shown}: is not valid JSON")
    return {}


def _folder_part(folder: Path, complaints: list[str]) -> Part:
    config = _read_json(folder / "config.json", complaints)
    files = []
    for path in _weight_files(folder, complaints):
        try:
            files.append(read_header(path))
        except ModelError as error:
            complaints.append(str(error))
        except FileNotFoundError:
            complaints.append(f"{folder.name}/{path.name} is missing")
    part = Part(folder.name, config, tuple(files), is_sgm=False)
    if files:
        complaints += _incomplete(part)
    return part


def _weight_files(folder: Path, complaints: list[str]) -> list[Path]:
    """The files of the part's weights: one, or the shards of an index; full precision before fp16 before other variants."""
    stem = STEMS[folder.name]
    found = {path.name: path for path in sorted(folder.glob(f"{stem}*.safetensors*"))}
    singles = [name for name in found if re.fullmatch(rf"{stem}(\.[^.]+)?\.safetensors", name) and "-of-" not in name]
    indices = [name for name in found if name.endswith(".json")]
    for name in sorted([*singles, *indices], key=lambda name: (name.count(".") > name.endswith(".json") + 1, "fp16" not in name)):
        if name in singles:
            return [found[name]]
        shards = _read_json(found[name], complaints).get("weight_map", {})
        return [folder / shard for shard in sorted(set(shards.values()))]
    pickles = [path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.ckpt"))]
    instead = f"; {pickles[0]} is a pickle, which can run code when it is opened" if pickles else ""
    complaints.append(f"{folder.name}/{stem}.safetensors is missing{instead}")
    return []


def _incomplete(part: Part) -> list[str]:
    complaints = [
        f"{part.name}: {weight} is missing in its weights" for weight in ESSENTIAL[part.name] if part.find(weight) is None
    ]
    odd = {tensor.dtype for file in part.files for key, tensor in file.tensors.items() if part._owns(key)} - {*FLOATS, "I64", "I32"}
    if odd:
        complaints.append(f"{part.name}: its weights are quantised ({', '.join(sorted(odd))}): use those in fp16, bf16 or fp32")
    return complaints


def _another_model(index: dict[str, Any], unet: dict[str, Any]) -> str | None:
    return None


def _schedule_of(scheduler: dict[str, Any], vae: dict[str, Any], complaints: list[str]) -> Schedule:
    return Schedule(scheduler.get("prediction_type", "epsilon"), bool(scheduler.get("rescale_betas_zero_snr", False)))
