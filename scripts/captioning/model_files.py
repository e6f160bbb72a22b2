"""Where the tagger's two files are: in MODELS_DIR, in a folder that the user names, or fetched once."""

import os
import re
import shutil
from pathlib import Path

import httpx2
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import RepositoryNotFoundError

from common.errors import DISK_ERRNOS, ModelError, SettingsError
from common.settings import REPOSITORY

MODEL_FILE = "model.onnx"


TAGS_FILE = "selected_tags.csv"


FILES = (TAGS_FILE, MODEL_FILE)


_REPOSITORY_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


# What huggingface_hub, and httpx2 under it, raise for a hub that is away, refuses, or breaks off.
_FETCH_ERRORS = (OSError, httpx2.HTTPError, RuntimeError, ValueError)


def found_folder(name: str, models_dir: Path) -> Path | None:
    """The folder that holds both files of the tagger `name`, without touching the network.

    `name` is a path to a folder, a folder in `models_dir`, or `owner/repository`, looked for as `repository` and as
    `owner/repository` in `models_dir`.
    """
    path = Path(os.path.expanduser(name))
    candidates = [path] if _is_path(name) else [models_dir / path.name, models_dir / path, path]
    return next((folder for folder in candidates if not _missing_from(folder)), None)


def fetched_folder(name: str, models_dir: Path) -> Path:
    """Fetch the files of the tagger `name` that are missing and return their folder in `models_dir`.

    huggingface_hub downloads beside the final name and checks the size, so a file that has its name is whole.
    Raises ModelError with the command that fetches them when that fails.
    """
    size_bytes = size_on_hub(name, models_dir)
    folder = _folder_to_fetch_into(name, models_dir)
    print(f"fetching {name} ({size_bytes / 1e6:.0f} MB) into {folder}", flush=True)
    try:
        for file in _missing_from(folder):
            hf_hub_download(name, file, local_dir=folder)
    except _FETCH_ERRORS as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
            raise
        raise _cannot_fetch(name, models_dir, error) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # half files of runs that were killed
    return folder


def size_on_hub(name: str, models_dir: Path) -> int:
    """Bytes of the model on the hub: one question, no retries. Raises like `fetched_folder` when it could not be fetched."""
    _refuse_unless_on_hub(name, models_dir)
    try:
        return get_hf_file_metadata(hf_hub_url(name, MODEL_FILE)).size or 0
    except _FETCH_ERRORS as error:
        raise _cannot_fetch(name, models_dir, error) from None


def _refuse_unless_on_hub(name: str, models_dir: Path) -> None:
    """Whatever is not `owner/repository` has to be on the disk already."""
    if _is_path(name):
        folder = Path(os.path.expanduser(name))
        if not folder.is_dir():
            raise SettingsError(f"caption_model: {name} is not a folder")
        raise ModelError(f"{folder}: has no {' and no '.join(_missing_from(folder))}; put it there, or set another CAPTION_MODEL")
    if not _REPOSITORY_ID.fullmatch(name):
        raise ModelError(
            f"caption_model: {models_dir / name} does not hold {MODEL_FILE} and {TAGS_FILE}; "
            "put them there, or name a repository on huggingface.co as owner/name"
        )


def _cannot_fetch(name: str, models_dir: Path, error: Exception) -> ModelError:
    folder = _folder_to_fetch_into(name, models_dir)
    if folder.is_relative_to(REPOSITORY):  # in a container, the same folder on the host has another path
        folder = folder.relative_to(REPOSITORY)
    command = f"hf download {name} {MODEL_FILE} {TAGS_FILE} --local-dir {folder}"
    return ModelError(f"{name} is not in {models_dir} and cannot be fetched: {_reason(error)}. With a network, run:\n  {command}")


def _reason(error: Exception) -> str:
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or it is private"
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _folder_to_fetch_into(name: str, models_dir: Path) -> Path:
    return models_dir / name.split("/")[1]


def _missing_from(folder: Path) -> list[str]:
    return [file for file in FILES if not (folder / file).is_file()]


def _is_path(name: str) -> bool:
    return name.startswith((".", "~")) or os.path.isabs(name)
