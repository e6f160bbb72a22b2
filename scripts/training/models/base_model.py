"""The base model of a run: found by name or path, with its tokenizers and the remembered digests of its components."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.clip_tokens import TOKENIZERS, base_model_places, find_tokenizers_in
from common.errors import ModelError
from common.files import read_cached_json, sha256_of, write_cached_json
from common.hub import HubError, download, download_command, file_size_bytes, repository_id
from training.models.diffusers_folder import read_folder
from training.models.sdxl import BaseModel, Component, Schedule
from training.models.single_file import read_file

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"

DIGESTS = "digests.json"
PREDICTIONS = "predictions.json"
"""What UNets were measured to predict, in the same folder."""

_SDXL_FILES = (
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

_ANY_FILES = ("model_index.json", "scheduler/*", "tokenizer*/*", "text_encoder*/*", "unet/*", "vae/*")
"""The same for a repository whose formats are not known."""

_TOKENIZER_FOLDER = "sdxl-tokenizers"
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")


def find_base(base_model: str, models_dir: Path) -> BaseModel:
    """The base model of that name in `models_dir`, or at that path: a diffusers folder or a `.safetensors` file. A relative path
    is one from the current folder or from the repository.

    `owner/name`, a repository on huggingface.co, is looked for as `owner/name` and as `name` in `models_dir`.
    Raises ModelError with everything that is wrong with it.
    """
    name = base_model.strip()
    in_models_dir, *elsewhere = base_model_places(name, models_dir)
    candidates = [in_models_dir, models_dir / f"{name}.safetensors", *elsewhere] if name else []
    repository = None if name.endswith(".safetensors") else repository_id(name)
    if repository:  # where the command below downloads it to, and below its owner's name
        candidates += [models_dir / repository, models_dir / repository.split("/")[1]]
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        patterns = _SDXL_FILES if repository in (None, SDXL) else _ANY_FILES
        command = download_command(repository or SDXL, models_dir / (repository or SDXL).split("/")[1], patterns=patterns)
        raise ModelError(
            f"base model {name!r} is neither in {models_dir} nor a path. Set BASE_MODEL to a diffusers folder or a .safetensors "
            f"file, or download one and run again:\n  {command}"
        )
    try:
        return read_folder(path) if path.is_dir() else read_file(path)
    except ModelError as error:
        command = download_command(SDXL, models_dir / SDXL.split("/")[1], patterns=_SDXL_FILES)
        raise ModelError(f"{error}\nTo download SDXL itself:\n  {command}") from None


def find_tokenizers(base: BaseModel, models_dir: Path) -> Path | None:
    """The folder that holds `tokenizer/` and `tokenizer_2/` for `base`: its own, or for a single file one in `models_dir`."""
    if base.path.is_dir():
        return base.path
    return find_tokenizers_in(models_dir, base.components["text_encoder"].config["vocab_size"])


def find_or_download_tokenizers(base: BaseModel, models_dir: Path) -> Path:
    """The same folder. If a single file has none, SDXL's tokenizers, 4 MB, are downloaded into `models_dir` once.

    Raises ModelError with the command that downloads them.
    """
    found = find_tokenizers(base, models_dir)
    if found:
        return found
    require_tokenizers_on_hub(models_dir)
    folder = models_dir / _TOKENIZER_FOLDER
    print(f"downloading the tokenizers of {SDXL} to {folder}", flush=True)
    try:
        download(SDXL, [f"{name}/{file}" for name in TOKENIZERS for file in _TOKENIZER_FILES], folder)
    except HubError as error:
        raise _tokenizers_missing(models_dir, error) from None
    return folder


def require_tokenizers_on_hub(models_dir: Path) -> None:
    """Check with one request that the tokenizers can be downloaded; raises ModelError if not."""
    try:
        file_size_bytes(SDXL, f"{TOKENIZERS[0]}/{_TOKENIZER_FILES[0]}")
    except HubError as error:
        raise _tokenizers_missing(models_dir, error) from None


def _tokenizers_missing(models_dir: Path, error: HubError) -> ModelError:
    command = download_command(SDXL, models_dir / _TOKENIZER_FOLDER, patterns=("tokenizer*/*",))
    return ModelError(
        f"a single file needs CLIP's tokenizer files; no folder in {models_dir} has them, and they cannot be downloaded: {error}. "
        f"With a network, run:\n  {command}"
    )


def tokenizers_digest(folder: Path) -> str:
    """SHA-256 of the files that decide which tokens a caption becomes."""
    files = [folder / name / file for name in TOKENIZERS for file in (*_TOKENIZER_FILES, "tokenizer.json")]
    return hashlib.sha256("".join(sha256_of(file) if file.is_file() else "-" for file in files).encode()).hexdigest()


def base_digest(base: BaseModel, folder: Path, name: str) -> str:
    """SHA-256 of one component of the base model, remembered in `folder`: gigabytes are not hashed at every start."""
    component, known = base.components[name], _remembered_digests(folder)
    key = _digest_key(component)
    if key not in known:
        known[key] = component.digest
        write_cached_json(folder / DIGESTS, known)
    return known[key]


def compute_digests(base: BaseModel, folder: Path) -> None:
    """Compute the digests that are not remembered in `folder` yet. Writes nothing, so that it can run beside anything else."""
    known = _remembered_digests(folder)
    for component in base.components.values():
        if _digest_key(component) not in known:
            _ = component.digest  # is kept by the component


def _remembered_digests(folder: Path) -> dict[str, str]:
    """`_digest_key` -> digest; what cannot be read is ignored."""
    return {key: digest for key, digest in read_cached_json(folder / DIGESTS).items() if isinstance(digest, str)}


def _digest_key(component: Component) -> str:
    """The same as long as path, size and modification time of the component's files are the same."""
    stats = [(str(file.resolve()), file.stat()) for file in sorted({file.path for file in component.files})]
    return json.dumps([component.name, *((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)])


def known_digest(base: BaseModel, folder: Path, name: str) -> str | None:
    """The digest of a component if it is remembered in `folder`."""
    return _remembered_digests(folder).get(_digest_key(base.components[name]))


def remember_prediction(folder: Path, unet_digest: str, prediction_type: str, *, zero_terminal_snr: bool) -> None:
    """Keep in `folder` what a UNet was measured to predict: a PredictionType, "flow" or "unclear"."""
    found = {"prediction_type": prediction_type, "zero_terminal_snr": zero_terminal_snr}
    write_cached_json(folder / PREDICTIONS, read_cached_json(folder / PREDICTIONS) | {unet_digest: found})


def remembered_prediction(folder: Path, unet_digest: str | None) -> dict[str, Any] | None:
    """What `remember_prediction` was given for the UNet, None if nothing."""
    return read_cached_json(folder / PREDICTIONS).get(unet_digest or "")


def choose_schedule(
    base: BaseModel, prediction_type: str, zero_terminal_snr: bool | str, *found: Mapping[str, Any] | None
) -> tuple[Schedule, bool]:
    """The schedule of a run on `base`, and whether it is only assumed.

    What the settings say counts most, "auto" being nothing; then that the base declares v prediction. That it declares epsilon
    says little, because converters write it whatever a model predicts: then the first of `found` counts, records of what was
    decided or measured before. Raises ModelError for a base that was found to be a rectified flow.
    """
    declared = base.schedule.with_settings(prediction_type, zero_terminal_snr)
    if prediction_type != "auto" or base.schedule.prediction_type != "epsilon":
        return declared, False
    known = next((each for each in found if each), None)
    if known is None or known["prediction_type"] == "unclear":
        return declared, known is None
    refuse_flow(base, known["prediction_type"])
    if known["prediction_type"] == declared.prediction_type:
        return declared, False
    zero = known["zero_terminal_snr"] if zero_terminal_snr == "auto" else zero_terminal_snr
    return declared.with_settings(known["prediction_type"], zero), False


def refuse_flow(base: BaseModel, prediction_type: str) -> None:
    """Raise ModelError if that is what a rectified flow was measured to predict."""
    if prediction_type == "flow":
        raise ModelError(
            f"{base.path}: is a rectified-flow model, as its predictions show, although its files do not say so; LoRACat trains on "
            "epsilon and v-prediction models: set BASE_MODEL to one of these"
        )
