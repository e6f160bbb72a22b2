"""A base model in diffusers' layout: a folder per part, each with its configuration.

Find the base model and its tokenizers, and say everything that is wrong with them; headers and JSON only.

Digests of a base model's parts, remembered in a folder: gigabytes of weights are hashed once and not at every start.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import clip_tokens
from common.clip_tokens import TOKENIZERS
from common.errors import ModelError, bullet_list
from common.files import sha256_of, write_json
from common.hub import HubError, download, download_command, file_size_bytes
from training.models.sdxl import STEMS, BaseModel, Part, Schedule
from training.models.single_file import read_file
from training.models.weights import WeightsFile, read_header

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
    problems: list[str] = []
    if not (folder / "model_index.json").exists() and not (folder / "unet").exists():
        files = ", ".join(str(file) for file in sorted(folder.glob("*.safetensors")))
        raise ModelError(f"{folder}: is no diffusers folder{f'; set BASE_MODEL to a file in it: {files}' if files else ''}")
    index = _read_json(folder / "model_index.json", problems)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", problems)
    configs = {name: _read_json(folder / name / "config.json", problems) for name in STEMS}
    another = _another_model(index, configs["unet"]) or _another_noise(scheduler, configs["vae"])
    if another:
        raise ModelError(f"{folder}: is {another}; LoRACat trains on SDXL base models")
    parts = {name: Part(name, configs[name], _weights(folder / name, problems), is_sgm=False) for name in STEMS}
    for part in parts.values():
        problems += part.problems() if part.files else []
    problems += [
        f"{name}/: a tokenizer's files are missing or damaged"
        for name in TOKENIZERS
        if not clip_tokens.read_vocabulary(folder / name)
    ]
    if not problems:
        problems += [*_odd_numbers(_schedule(scheduler), configs["vae"]), *_disagreements(configs)]
    if problems:
        raise ModelError(bullet_list(f"{folder}: this base model cannot be used:", problems))
    return BaseModel(folder, parts, _schedule(scheduler))


def _read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in `file`; empty, with a problem, if there is none."""
    shown = "/".join(file.parts[-2:]) if file.name != "model_index.json" else file.name
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{shown} is missing")
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        problems.append(f"{shown} is damaged")
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


def _weights(folder: Path, problems: list[str]) -> tuple[WeightsFile, ...]:
    """The files with the part's weights."""
    files = []
    for path in _weight_paths(folder, problems):
        try:
            files.append(read_header(path))
        except FileNotFoundError:
            problems.append(f"{folder.name}/{path.name} is missing")
        except ModelError as error:
            problems.append(str(error))
    return tuple(files)


def _weight_paths(folder: Path, problems: list[str]) -> list[Path]:
    """One file, or the shards that an index names; full precision before fp16 before other variants, one file before shards."""
    stem = STEMS[folder.name]
    pattern = rf"{stem}(\.\w+)?\.safetensors(\.index(\.\w+)?\.json)?"
    found = [path for path in folder.glob(f"{stem}.*") if re.fullmatch(pattern, path.name)]
    if not found:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".ckpt", ".pt", ".pth"))
        only = f" (there is only {pickles[0]}, a pickle, which can run code when it is opened)" if pickles else ""
        problems.append(f"{folder.name}/{stem}.safetensors is missing{only}")
        return []
    first = min(found, key=_preference)
    if first.suffix == ".safetensors":
        return [first]
    weight_map = _read_json(first, problems).get("weight_map")
    shards = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else set()
    if not shards:
        problems.append(f"{folder.name}/{first.name} names no files")
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


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


_NEEDED = (
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
"""What training reads of the SDXL repository, 7 GB; the repository holds every format there is."""


_ANY_NEEDED = ("model_index.json", "scheduler/*", "tokenizer*/*", "text_encoder*/*", "unet/*", "vae/*")


_TOKENIZER_FOLDER = "sdxl-tokenizers"


_TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")


def find_base(base_model: str, models_dir: Path) -> BaseModel:
    """The base model of that name in `models_dir`, or at that path: a diffusers folder or a `.safetensors` file.

    Raises ModelError with everything that is wrong with it.
    """
    wanted = base_model.strip()
    candidates = [models_dir / wanted, models_dir / f"{wanted}.safetensors", Path(os.path.expanduser(wanted))] if wanted else []
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        raise ModelError(_not_there(wanted, models_dir))
    try:
        return read_folder(path) if path.is_dir() else read_file(path)
    except ModelError as error:
        command = download_command(SDXL, models_dir / SDXL.split("/")[1], patterns=_NEEDED)
        raise ModelError(f"{error}\nThis fetches SDXL itself:\n  {command}") from None


def find_tokenizers(base: BaseModel, models_dir: Path) -> Path | None:
    """The folder that holds `tokenizer/` and `tokenizer_2/` for `base`: its own, or for a single file one in `models_dir`."""
    if base.path.is_dir():
        return base.path
    return clip_tokens.find_tokenizers(models_dir, base.parts["text_encoder"].config["vocab_size"])


def tokenizers_of(base: BaseModel, models_dir: Path) -> Path:
    """The same folder; for a single file they are fetched once if none is there."""
    return find_tokenizers(base, models_dir) or fetch_tokenizers(models_dir)


def tokenizers_digest(folder: Path) -> str:
    """SHA-256 of the files that decide which tokens a caption becomes."""
    files = [folder / name / file for name in TOKENIZERS for file in (*_TOKENIZER_FILES, "tokenizer.json")]
    return hashlib.sha256("".join(sha256_of(file) if file.is_file() else "-" for file in files).encode()).hexdigest()


def require_tokenizers_on_hub(models_dir: Path) -> None:
    """One question to the hub; nothing is fetched. Raises ModelError like `fetch_tokenizers` when it could not be."""
    try:
        file_size_bytes(SDXL, f"{TOKENIZERS[0]}/{_TOKENIZER_FILES[0]}")
    except HubError:
        raise ModelError(_tokenizers_missing(models_dir)) from None


def fetch_tokenizers(models_dir: Path) -> Path:
    """Fetch SDXL's tokenizers, 4 MB, into `models_dir`. Raises ModelError with the command that does the same."""
    require_tokenizers_on_hub(models_dir)  # asks once; the downloads would ask for a minute
    folder = models_dir / _TOKENIZER_FOLDER
    print(f"fetching the tokenizers of {SDXL} into {folder}", flush=True)
    try:
        download(SDXL, [f"{name}/{file}" for name in TOKENIZERS for file in _TOKENIZER_FILES], folder)
    except HubError:
        raise ModelError(_tokenizers_missing(models_dir)) from None
    return folder


def _tokenizers_missing(models_dir: Path) -> str:
    """What to do when a single file has no tokenizers beside it and they cannot be fetched."""
    command = download_command(SDXL, models_dir / _TOKENIZER_FOLDER, patterns=("tokenizer*/*",))
    return (
        f"a single file needs CLIP's tokenizer files; no folder in {models_dir} has them, and they cannot be fetched. "
        f"With a network, run:\n  {command}"
    )


def _not_there(wanted: str, models_dir: Path) -> str:
    is_repository = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", wanted, re.ASCII) and not wanted.endswith(".safetensors")
    repository, patterns = (wanted, _ANY_NEEDED) if is_repository and wanted != SDXL else (SDXL, _NEEDED)
    command = download_command(repository, models_dir / repository.split("/")[1], patterns=patterns)
    return (
        f"base model {wanted!r} is neither in {models_dir} nor a path. Set BASE_MODEL to a diffusers folder or a .safetensors "
        f"file, or fetch one:\n  {command}"
    )


DIGESTS = "digests.json"


def base_digest(base: BaseModel, folder: Path, part: str) -> str:
    """SHA-256 of one part of the base model, remembered from run to run."""
    key, known = _key_of(base.parts[part]), _remembered(folder)
    if key not in known:
        known[key] = base.parts[part].digest
        write_json(folder / DIGESTS, known)
    return known[key]


def compute_digests(base: BaseModel, folder: Path) -> None:
    """Compute those that are not remembered yet; nothing is written, so that it can be done beside anything else."""
    known = _remembered(folder)
    for part in base.parts.values():
        if _key_of(part) not in known:
            _ = part.digest


def _remembered(folder: Path) -> dict[str, str]:
    """Key of a part -> its digest; what cannot be read is forgotten."""
    with suppress(FileNotFoundError, ValueError, AttributeError):
        known = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        return {key: digest for key, digest in known.items() if isinstance(digest, str)}
    return {}


def _key_of(part: Part) -> str:
    """The same for as long as path, size and time of change of the part's files stay the same."""
    stats = [(str(file.resolve()), file.stat()) for file in sorted({file.path for file in part.files})]
    return json.dumps([part.name, *((path, about.st_size, about.st_mtime_ns) for path, about in stats)])
