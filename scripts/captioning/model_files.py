"""Where the tagger's two files are: in MODELS_DIR, in a folder that the user names, or fetched once."""

import os
import re
from pathlib import Path

from common.errors import ModelError, SettingsError
from common.hub import HubError, download, download_command, file_size_bytes

MODEL_FILE = "model.onnx"
TAGS_FILE = "selected_tags.csv"
FILES = (TAGS_FILE, MODEL_FILE)
_REPOSITORY_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


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

    Raises ModelError with the command that fetches them when that fails.
    """
    size_bytes = size_on_hub(name, models_dir)
    folder = models_dir / name.split("/")[1]
    print(f"downloading {name} ({size_bytes / 1e6:.0f} MB) into {folder}", flush=True)
    try:
        download(name, _missing_from(folder), folder)
    except HubError as error:
        raise _cannot_fetch(name, models_dir, error) from None
    return folder


def size_on_hub(name: str, models_dir: Path) -> int:
    """Size of the model on the hub in bytes: one request, no retries. Raises like `fetched_folder` if it cannot be fetched."""
    _refuse_unless_on_hub(name, models_dir)
    try:
        return file_size_bytes(name, MODEL_FILE)
    except HubError as error:
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


def _cannot_fetch(name: str, models_dir: Path, error: HubError) -> ModelError:
    command = download_command(name, models_dir / name.split("/")[1], (MODEL_FILE, TAGS_FILE))
    return ModelError(f"{name} is not in {models_dir} and cannot be downloaded: {error}. With a network, run:\n  {command}")


def _missing_from(folder: Path) -> list[str]:
    return [file for file in FILES if not (folder / file).is_file()]


def _is_path(name: str) -> bool:
    return name.startswith((".", "~")) or os.path.isabs(name)
