"""Find the tagger's two files on the disk, or download them once."""

import os
import re
from pathlib import Path

from common.errors import ModelError, SettingsError
from common.hub import HubError, download, download_command, file_size_bytes

MODEL_FILE = "model.onnx"
TAGS_FILE = "selected_tags.csv"
FILES = (TAGS_FILE, MODEL_FILE)
_REPOSITORY_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def find_model(name: str, models_dir: Path) -> Path | None:
    """The folder that holds both files of the tagger `name`; the network is not used.

    `name` is a path to a folder, a folder in `models_dir`, or `owner/repository`, looked for as `repository` and as
    `owner/repository` in `models_dir`.
    """
    path = Path(name)
    candidates = [_as_path(name)] if _as_path(name) else [models_dir / path.name, models_dir / path, path]
    return next((folder for folder in candidates if not _missing_files(folder)), None)


def download_model(name: str, models_dir: Path) -> Path:
    """Download the missing files of the tagger `name` and return their folder in `models_dir`.

    Raises ModelError, with the command that downloads them, if that is not possible.
    """
    size_bytes = model_size_on_hub(name, models_dir)
    folder = models_dir / name.split("/")[1]
    print(f"downloading {name} ({size_bytes / 1e6:.0f} MB) to {folder}", flush=True)
    try:
        download(name, _missing_files(folder), folder)
    except HubError as error:
        raise _cannot_download(name, models_dir, error) from None
    return folder


def model_size_on_hub(name: str, models_dir: Path) -> int:
    """Bytes of the model on the hub, asked for with one request. Raises like `download_model` if it cannot be downloaded."""
    if folder := _as_path(name):
        if not folder.is_dir():
            raise SettingsError(f"caption_model: {name} is not a folder")
        raise ModelError(f"{folder}: has no {' and no '.join(_missing_files(folder))}; put it there, or set another CAPTION_MODEL")
    if not _REPOSITORY_ID.fullmatch(name):
        raise ModelError(
            f"caption_model: {models_dir / name} does not hold {MODEL_FILE} and {TAGS_FILE}; "
            "put them there, or name a repository on huggingface.co as owner/name"
        )
    try:
        return file_size_bytes(name, MODEL_FILE)
    except HubError as error:
        raise _cannot_download(name, models_dir, error) from None


def _cannot_download(name: str, models_dir: Path, error: HubError) -> ModelError:
    command = download_command(name, models_dir / name.split("/")[1], (MODEL_FILE, TAGS_FILE))
    return ModelError(f"{name} is not in {models_dir} and cannot be downloaded: {error}. With a network, run:\n  {command}")


def _missing_files(folder: Path) -> list[str]:
    return [file for file in FILES if not (folder / file).is_file()]


def _as_path(name: str) -> Path | None:
    """The path that `name` is, None if it is a name in MODELS_DIR or on the hub."""
    path = Path(os.path.expanduser(name))
    return path if name.startswith((".", "~")) or path.is_absolute() else None
