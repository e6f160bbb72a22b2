"""A base model in diffusers' layout: a folder per part, each with its configuration."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import ModelError, one_list
from training.parts import STEMS, BaseModel, Part
from training.schedule import Schedule
from training.weights import WeightsFile, read_header

TOKENIZERS = ("tokenizer", "tokenizer_2")
_WORDS_WITHOUT_MERGE = 2 * 256 + 2
"""Of CLIP's vocabulary: each byte, each byte that ends a word, and the two special tokens."""
_SDXL_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "addition_embed_type": "text_time",
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "time_cond_proj_dim": None,
}
_OTHER_INPUTS = {8: "an instruct-pix2pix model", 9: "an inpainting model"}
_OTHER_CONTEXTS = {768: "an SD 1.5 model", 1024: "an SD 2.x model", 1280: "the SDXL refiner"}


def read_folder(folder: Path) -> BaseModel:
    """The base model in `folder`. Raises ModelError with everything that is wrong with it."""
    complaints: list[str] = []
    if not (folder / "model_index.json").exists() and not (folder / "unet").exists():
        files = ", ".join(str(file) for file in sorted(folder.glob("*.safetensors")))
        raise ModelError(f"{folder}: is no diffusers folder{f'; set BASE_MODEL to a file in it: {files}' if files else ''}")
    index = _read_json(folder / "model_index.json", complaints)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", complaints)
    configs = {name: _read_json(folder / name / "config.json", complaints) for name in STEMS}
    another = _another_model(index, configs["unet"]) or _another_noise(scheduler, configs["vae"])
    if another:
        raise ModelError(f"{folder}: is {another}; LoRACat trains on SDXL base models")
    parts = {name: Part(name, configs[name], _weights(folder / name, complaints), is_sgm=False) for name in STEMS}
    for part in parts.values():
        complaints += part.complaints() if part.files else []
    complaints += [
        f"{name}/: a tokenizer's files are missing or damaged" for name in TOKENIZERS if not vocabulary_size(folder / name)
    ]
    if not complaints:
        complaints += [*_odd_numbers(_schedule(scheduler), configs["vae"]), *_disagreements(configs)]
    if complaints:
        raise ModelError(one_list(f"{folder}: this base model cannot be used:", complaints))
    return BaseModel(folder, parts, _schedule(scheduler))


def vocabulary_size(folder: Path) -> int:
    """Words of the tokenizer in `folder`; 0 if a file that CLIPTokenizer reads is missing or damaged.

    Its configuration is needed too: it says how to pad.
    """
    try:
        json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            words = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
            merges = sum(bool(line.strip()) for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:])
            return words if merges >= words - _WORDS_WITHOUT_MERGE else 0
        return len(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return 0


def _read_json(file: Path, complaints: list[str]) -> dict[str, Any]:
    """The JSON object in `file`; empty, with a complaint, if there is none."""
    shown = "/".join(file.parts[-2:]) if file.name != "model_index.json" else file.name
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        complaints.append(f"{shown} is missing")
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        complaints.append(f"{shown} is damaged")
        return {}
    return content


def _another_model(index: dict[str, Any], unet: dict[str, Any]) -> str | None:
    """What the folder holds instead of SDXL."""
    pipeline = index.get("_class_name", "StableDiffusionXLPipeline")
    channels, context = unet.get("in_channels"), unet.get("cross_attention_dim")
    if isinstance(channels, int) and channels in _OTHER_INPUTS:
        return f"{_OTHER_INPUTS[channels]} ({channels} input channels)"
    if isinstance(context, int) and context in _OTHER_CONTEXTS:
        return f"{_OTHER_CONTEXTS[context]} (cross_attention_dim {context})"
    if not str(pipeline).startswith("StableDiffusionXL"):
        return f"a model of another family ({pipeline})"
    odd = [f"{key} {unet.get(key)}" for key, value in _SDXL_UNET.items() if unet and unet.get(key) != value]
    return f"a model with other blocks than SDXL's, such as SSD-1B, Vega or LCM ({', '.join(odd)})" if odd else None


def _another_noise(scheduler: dict[str, Any], vae: dict[str, Any]) -> str | None:
    """How the model was noised, if it was not SDXL's way."""
    sampler = str(scheduler.get("_class_name", ""))
    if sampler.startswith("EDM") or vae.get("latents_mean") is not None:
        return "an EDM model, such as Playground v2.5"
    if sampler.startswith("FlowMatch"):
        return "a flow-matching model"
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        return f"a model with prediction_type {prediction}"
    if scheduler.get("beta_schedule", "scaled_linear") != "scaled_linear" or scheduler.get("trained_betas") is not None:
        return "a model with another noise schedule than scaled_linear"
    return None


def _odd_numbers(schedule: Schedule, vae: dict[str, Any]) -> Iterator[str]:
    """Numbers that training computes with and that are none."""
    if not (_is_number(vae.get("scaling_factor")) and vae["scaling_factor"] > 0):
        yield "vae/config.json: scaling_factor must be a number above 0; SDXL's is 0.13025"
    if type(schedule.timesteps) is not int or schedule.timesteps < 1:
        yield "scheduler/scheduler_config.json: num_train_timesteps must be a whole number above 0; SDXL's is 1000"
    for name, beta in (("beta_start", schedule.beta_start), ("beta_end", schedule.beta_end)):
        if not (_is_number(beta) and 0 < beta < 1):
            yield f"scheduler/scheduler_config.json: {name} must be a number between 0 and 1"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _schedule(scheduler: dict[str, Any]) -> Schedule:
    usual = Schedule()
    return Schedule(
        prediction_type=scheduler.get("prediction_type", usual.prediction_type),
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
        beta_start=scheduler.get("beta_start", usual.beta_start),
        beta_end=scheduler.get("beta_end", usual.beta_end),
        timesteps=scheduler.get("num_train_timesteps", usual.timesteps),
    )


def _weights(folder: Path, complaints: list[str]) -> tuple[WeightsFile, ...]:
    """The files with the part's weights."""
    files = []
    for path in _weight_paths(folder, complaints):
        try:
            files.append(read_header(path))
        except FileNotFoundError:
            complaints.append(f"{folder.name}/{path.name} is missing")
        except ModelError as error:
            complaints.append(str(error))
    return tuple(files)


def _weight_paths(folder: Path, complaints: list[str]) -> list[Path]:
    """One file, or the shards that an index names; full precision before fp16 before other variants, one file before shards."""
    stem = STEMS[folder.name]
    pattern = rf"{stem}(\.\w+)?\.safetensors(\.index(\.\w+)?\.json)?"
    found = [path for path in folder.glob(f"{stem}.*") if re.fullmatch(pattern, path.name)]
    if not found:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".ckpt", ".pt", ".pth"))
        only = f" (there is only {pickles[0]}, a pickle, which can run code when it is opened)" if pickles else ""
        complaints.append(f"{folder.name}/{stem}.safetensors is missing{only}")
        return []
    first = min(found, key=_preference)
    if first.suffix == ".safetensors":
        return [first]
    weight_map = _read_json(first, complaints).get("weight_map")
    shards = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else set()
    if not shards:
        complaints.append(f"{folder.name}/{first.name} names no files")
    return [folder / Path(shard).name for shard in sorted(shards)]


def _preference(path: Path) -> tuple:
    variant = "".join(word for word in path.name.split(".")[1:] if word not in ("safetensors", "index", "json"))
    return variant != "", variant != "fp16", variant, path.suffix == ".json"


def _disagreements(configs: dict[str, dict[str, Any]]) -> list[str]:
    widths = [configs[name].get("hidden_size") for name in ("text_encoder", "text_encoder_2")]
    context = configs["unet"].get("cross_attention_dim")
    if all(map(_is_number, widths)) and context == sum(widths):
        return []
    return [f"the UNet wants text embeddings of {context} channels, the encoders give {widths}"]
