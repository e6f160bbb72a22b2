"""A base model in diffusers' layout: a folder for each component, with its configuration. Reads headers and JSON only."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.clip_tokens import TOKENIZERS, read_vocabulary
from common.errors import ModelError, bullet_list
from common.files import parse_json
from common.weights import WeightsFile, read_header
from training.models.sdxl import OTHER_INPUT_CHANNELS, WEIGHT_STEMS, BaseModel, Component, Schedule

_SDXL_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "addition_embed_type": "text_time",
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "time_cond_proj_dim": None,
}

_OTHER_CONTEXTS = {768: "an SD 1.5 model", 1024: "an SD 2.x model", 1280: "the SDXL refiner"}
"""By cross_attention_dim; SDXL's is 2048."""

_MAX_TIMESTEPS = 100_000
_MAX_NUMBER = 1e9
"""NaN, infinity and integers that are not a float are not below it."""


def read_folder(folder: Path) -> BaseModel:
    """The base model in `folder`. Raises ModelError with everything that is wrong with it."""
    problems: list[str] = []
    if not (folder / "model_index.json").exists() and not (folder / "unet").exists():
        files = ", ".join(str(file) for file in sorted(folder.glob("*.safetensors")))
        hint = f"; set BASE_MODEL to a file in it: {files}" if files else ""
        raise ModelError(f"{folder}: is not a diffusers folder{hint}")
    index = _read_json(folder / "model_index.json", problems)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", problems)
    configs = {name: _read_json(folder / name / "config.json", problems) for name in WEIGHT_STEMS}
    other = _other_model(index, configs["unet"]) or _other_noise(scheduler, configs["vae"])
    if other:
        raise ModelError(f"{folder}: is {other}; LoRACat trains on SDXL base models")
    components = {}
    for name in WEIGHT_STEMS:
        files = _weights_files(folder / name, problems)
        components[name] = Component(name, configs[name], files, in_single_file=False)
        problems += [*components[name].problems(), *_impossible_sizes(components[name])] if files else []
    for name in TOKENIZERS:
        if not read_vocabulary(folder / name):
            problems.append(f"{name}/: a tokenizer's files are missing or damaged")
    schedule = _schedule(scheduler)
    if not problems:
        problems += [*_invalid_numbers(schedule, configs["vae"]), *_inconsistent_widths(configs)]
    if problems:
        raise ModelError(bullet_list(f"{folder}: this base model cannot be used:", problems))
    return BaseModel(folder, components, schedule)


def _read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in `file`; if there is none, an empty one, and a problem is added."""
    label = "/".join(file.parts[-2:]) if file.name != "model_index.json" else file.name
    try:
        if file.exists() and not file.is_file():  # reading a pipe may never end
            problems.append(f"{label} is not a file")
            return {}
        content = parse_json(file.read_bytes())
    except FileNotFoundError:
        problems.append(f"{label} is missing")
        return {}
    except OSError as error:
        problems.append(f"{label} cannot be read: {error.strerror}")
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        problems.append(f"{label} is damaged")
        return {}
    return content


def _other_model(index: dict[str, Any], unet: dict[str, Any]) -> str | None:
    """What the folder holds instead of SDXL."""
    pipeline = index.get("_class_name", "StableDiffusionXLPipeline")
    channels, context = unet.get("in_channels"), unet.get("cross_attention_dim")
    if isinstance(channels, int) and channels in OTHER_INPUT_CHANNELS:
        return f"{OTHER_INPUT_CHANNELS[channels]} ({channels} input channels)"
    if isinstance(context, int) and context in _OTHER_CONTEXTS:
        return f"{_OTHER_CONTEXTS[context]} (cross_attention_dim {context})"
    if not str(pipeline).startswith("StableDiffusionXL"):
        return f"a model of another family ({pipeline})"
    different = [f"{key} {unet.get(key)}" for key, value in _SDXL_UNET.items() if unet and unet.get(key) != value]
    return f"a model with other blocks than SDXL's, such as SSD-1B, Vega or LCM ({', '.join(different)})" if different else None


def _other_noise(scheduler: dict[str, Any], vae: dict[str, Any]) -> str | None:
    """What kind of model it is if it was trained with another noise process than SDXL's."""
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


def _schedule(scheduler: dict[str, Any]) -> Schedule:
    default = Schedule()
    return Schedule(
        prediction_type=scheduler.get("prediction_type", default.prediction_type),
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
        beta_start=scheduler.get("beta_start", default.beta_start),
        beta_end=scheduler.get("beta_end", default.beta_end),
        timesteps=scheduler.get("num_train_timesteps", default.timesteps),
    )


def _invalid_numbers(schedule: Schedule, vae: dict[str, Any]) -> Iterator[str]:
    """Problems with the numbers that training computes with."""
    if not (_is_number(vae.get("scaling_factor")) and vae["scaling_factor"] > 0):
        yield "vae/config.json: scaling_factor must be a number above 0; SDXL's is 0.13025"
    if type(schedule.timesteps) is not int or not 1 <= schedule.timesteps <= _MAX_TIMESTEPS:
        allowed = f"must be a whole number from 1 to {_MAX_TIMESTEPS:,}"
        yield f"scheduler/scheduler_config.json: num_train_timesteps {allowed}; SDXL's is 1000"
    for name, beta in (("beta_start", schedule.beta_start), ("beta_end", schedule.beta_end)):
        if not (_is_number(beta) and 0 < beta < 1):
            yield f"scheduler/scheduler_config.json: {name} must be a number between 0 and 1"


def _impossible_sizes(component: Component) -> Iterator[str]:
    """Numbers of layers and positions that do not fit the files: building such a network could take hours, or all memory."""
    limits = {key: len(component.tensors) for key in component.config if "layers" in key}
    positions = component.required_tensor("text_model.embeddings.position_embedding.weight", "")
    if positions is not None and positions.shape:
        limits["max_position_embeddings"] = positions.shape[0]
    for key, limit in limits.items():
        waiting = [component.config.get(key)]
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting += value
            elif isinstance(value, int) and not 1 <= value <= limit:
                yield f"{component.name}/config.json: {key} does not fit the weights"
                break


def _inconsistent_widths(configs: dict[str, dict[str, Any]]) -> Iterator[str]:
    widths = [configs[name].get("hidden_size") for name in ("text_encoder", "text_encoder_2")]
    context = configs["unet"].get("cross_attention_dim")
    if not all(map(_is_number, widths)) or context != sum(widths):
        yield f"the UNet expects text embeddings of {context} channels, the text encoders produce {widths}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER


def _weights_files(folder: Path, problems: list[str]) -> tuple[WeightsFile, ...]:
    """The headers of the files with the component's weights."""
    files = []
    for path in _weight_paths(folder, problems):
        try:
            files.append(read_header(path))
        except FileNotFoundError:
            problems.append(f"{folder.name}/{path.name} is missing")
        except ModelError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{folder.name}/{path.name[:80]} cannot be read: {error.strerror}")
    return tuple(files)


def _weight_paths(folder: Path, problems: list[str]) -> list[Path]:
    """One file, or the shards that an index lists; full precision before fp16 before other variants, one file before shards."""
    stem = WEIGHT_STEMS[folder.name]
    pattern = rf"{stem}(\.\w+)?\.safetensors(\.index(\.\w+)?\.json)?"
    found = [path for path in folder.glob(f"{stem}.*") if re.fullmatch(pattern, path.name)]
    if not found:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".ckpt", ".pt", ".pth"))
        only = f" (there is only {pickles[0]}, a pickle, which can run code when it is opened)" if pickles else ""
        problems.append(f"{folder.name}/{stem}.safetensors is missing{only}")
        return []

    def preference(path: Path) -> tuple:
        variant = "".join(word for word in path.name.split(".")[1:] if word not in ("safetensors", "index", "json"))
        return variant != "", variant != "fp16", variant, path.suffix == ".json"

    first = min(found, key=preference)
    if first.suffix == ".safetensors":
        return [first]
    weight_map = _read_json(first, problems).get("weight_map")
    shards = {shard for shard in weight_map.values() if _is_name(shard)} if isinstance(weight_map, dict) else set()
    if not shards:
        problems.append(f"{folder.name}/{first.name} lists no files")
    return [folder / Path(shard).name for shard in sorted(shards)]


def _is_name(value: Any) -> bool:
    """Whether it can be the name of a file."""
    return isinstance(value, str) and Path(value).name not in ("", "..") and value.isprintable()
