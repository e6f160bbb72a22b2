"""Find the base model and its tokenizers, and say everything that is wrong with them; headers and JSON only."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import httpx2
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

from dataset_folder import sha256_of
from errors import DISK_ERRNOS, ModelError
from settings import REPOSITORY
from training.diffusers_folder import TOKENIZERS, read_folder, vocabulary_size
from training.parts import BaseModel
from training.single_file import read_file

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
_FETCH_ERRORS = (OSError, httpx2.HTTPError, RuntimeError, ValueError)
"""What huggingface_hub raises for a hub that is away, refuses, or breaks off."""


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
        command = _download(SDXL, models_dir / SDXL.split("/")[1], _NEEDED)
        raise ModelError(f"{error}\nThis fetches SDXL itself:\n  {command}") from None


def find_tokenizers(base: BaseModel, models_dir: Path) -> Path | None:
    """The folder that holds `tokenizer/` and `tokenizer_2/` for `base`: its own, or for a single file one in `models_dir`."""
    if base.path.is_dir():
        return base.path
    words = base.parts["text_encoder"].config["vocab_size"]
    folders = sorted(child for child in models_dir.iterdir() if child.is_dir()) if models_dir.is_dir() else []
    return next((folder for folder in folders if all(vocabulary_size(folder / name) == words for name in TOKENIZERS)), None)


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
        get_hf_file_metadata(hf_hub_url(SDXL, f"{TOKENIZERS[0]}/{_TOKENIZER_FILES[0]}"))
    except _FETCH_ERRORS:
        raise ModelError(_tokenizers_missing(models_dir)) from None


def fetch_tokenizers(models_dir: Path) -> Path:
    """Fetch SDXL's tokenizers, 4 MB, into `models_dir`. Raises ModelError with the command that does the same."""
    require_tokenizers_on_hub(models_dir)  # asks once; the downloads would ask for a minute
    folder = models_dir / _TOKENIZER_FOLDER
    print(f"fetching the tokenizers of {SDXL} into {folder}", flush=True)
    try:
        for name in TOKENIZERS:
            for file in _TOKENIZER_FILES:
                hf_hub_download(SDXL, f"{name}/{file}", local_dir=folder)
    except _FETCH_ERRORS as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
            raise
        raise ModelError(_tokenizers_missing(models_dir)) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # half files of runs that were killed
    return folder


def _tokenizers_missing(models_dir: Path) -> str:
    """What to do when a single file has no tokenizers beside it and they cannot be fetched."""
    command = _download(SDXL, models_dir / _TOKENIZER_FOLDER, ("tokenizer*/*",))
    return (
        f"a single file needs CLIP's tokenizer files; no folder in {models_dir} has them, and they cannot be fetched. "
        f"With a network, run:\n  {command}"
    )


def _not_there(wanted: str, models_dir: Path) -> str:
    is_repository = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", wanted, re.ASCII) and not wanted.endswith(".safetensors")
    repository, patterns = (wanted, _ANY_NEEDED) if is_repository and wanted != SDXL else (SDXL, _NEEDED)
    command = _download(repository, models_dir / repository.split("/")[1], patterns)
    return (
        f"base model {wanted!r} is neither in {models_dir} nor a path. Set BASE_MODEL to a diffusers folder or a .safetensors "
        f"file, or fetch one:\n  {command}"
    )


def _download(repository: str, folder: Path, patterns: tuple[str, ...]) -> str:
    """The command that fetches the files of `repository` that match `patterns`."""
    if folder.is_relative_to(REPOSITORY):  # in a container, the same folder on the host has another path
        folder = folder.relative_to(REPOSITORY)
    return " ".join([f"hf download {repository} --local-dir {folder}", *(f"--include '{pattern}'" for pattern in patterns)])
