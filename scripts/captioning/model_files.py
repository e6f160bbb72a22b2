"""Find the tagger's files on the disk, or download them once."""

import os
from pathlib import Path

from captioning.onnx_file import read_onnx
from captioning.preprocessing import DESCRIPTIONS
from common.errors import ModelError, SettingsError
from common.hub import HubError, MissingFileError, download, download_command, file_size_bytes, repository_id
from common.settings import places_of_path

MODEL_FILE = "model.onnx"
TAGS_FILE = "selected_tags.csv"
FILES = (TAGS_FILE, MODEL_FILE)
USABLE = f"set CAPTION_MODEL to a tagger with {MODEL_FILE} and {TAGS_FILE}, such as SmilingWolf/wd-swinv2-tagger-v3"


def find_model(name: str, models_dir: Path) -> Path | None:
    """The folder that holds both files of the tagger `name`, and those with its weights; the network is not used.

    `name` is a path to a folder, a folder in `models_dir`, or `owner/repository`, looked for as `repository` and as
    `owner/repository` in `models_dir`. A relative path is one from the current folder or from the repository.
    """
    path = Path(repository_id(name) or name)
    own = _as_path(name)
    candidates = places_of_path(own) if own else (models_dir / path.name, models_dir / path, *places_of_path(path))
    return next((folder for folder in candidates if not _missing_files(folder)), None)


def download_model(name: str, models_dir: Path) -> Path:
    """Download the missing files of the tagger `name` and return their folder in `models_dir`.

    Raises ModelError, with the command that downloads them, if that is not possible.
    """
    size_bytes = model_size_on_hub(name, models_dir)
    repository = repository_id(name)
    folder = _download_folder(repository, models_dir)
    print(f"downloading {repository} ({size_bytes / 1e6:.0f} MB) to {folder}", flush=True)
    try:
        download(repository, [file for file in FILES if not (folder / file).is_file()], folder, optional=DESCRIPTIONS)
        download(repository, _missing_files(folder), folder)  # the model names the files that hold its weights
    except MissingFileError:
        raise _other_kind(repository) from None
    except HubError as error:
        raise _cannot_download(repository, models_dir, error) from None
    return folder


def model_size_on_hub(name: str, models_dir: Path) -> int:
    """Bytes of the model on the hub, asked for with one request. Raises like `download_model` if it cannot be downloaded."""
    if own := _as_path(name):
        folder = next((place for place in places_of_path(own) if place.is_dir()), None)
        if folder is None:
            raise SettingsError(f"caption_model: {name} is not a folder")
        lists = [path.name for path in sorted(folder.glob("*.json")) if path.name not in DESCRIPTIONS]
        if TAGS_FILE in _missing_files(folder) and lists:
            raise ModelError(f"{folder}: has no {TAGS_FILE}, and tags in another format ({lists[0][:80]}) are not read; {USABLE}")
        raise ModelError(f"{folder}: has no {' and no '.join(_missing_files(folder))}; put it there, or set another CAPTION_MODEL")
    repository = repository_id(name)
    if not repository:
        missing = " and ".join(sorted(_missing_files(models_dir / name)))
        raise ModelError(
            f"caption_model: {models_dir / name} does not hold {missing}; "
            "put what is missing there, or name a repository on huggingface.co as owner/name"
        )
    try:
        return file_size_bytes(repository, MODEL_FILE)
    except MissingFileError:
        raise _other_kind(repository) from None
    except HubError as error:
        raise _cannot_download(repository, models_dir, error) from None


def _cannot_download(repository: str, models_dir: Path, error: HubError) -> ModelError:
    folder = _download_folder(repository, models_dir)
    weights = [file for file in _missing_files(folder) if file not in FILES]
    command = download_command(repository, folder, (MODEL_FILE, TAGS_FILE, *weights))
    lacks = f"{folder} lacks {', '.join(weights)[:200]}, which" if weights else f"{repository} is not in {models_dir} and"
    return ModelError(f"{lacks} cannot be downloaded: {error}. With a network, run:\n  {command}")


def _other_kind(repository: str) -> ModelError:
    """Some taggers have their files in folders or under other names, or list their tags as JSON."""
    return ModelError(f"{repository}: does not have {MODEL_FILE} and {TAGS_FILE}, so it cannot be used; {USABLE}")


def _download_folder(repository: str, models_dir: Path) -> Path:
    return models_dir / repository.split("/")[1]


def _missing_files(folder: Path) -> list[str]:
    """The files of a tagger that `folder` lacks; which ones hold its weights is known when its model is there."""
    missing = [file for file in FILES if not (folder / file).is_file()]
    return missing if MODEL_FILE in missing else [*missing, *read_onnx(folder / MODEL_FILE).missing_files()]


def _as_path(name: str) -> Path | None:
    """The path that `name` is, None if it is a name in MODELS_DIR or on the hub."""
    path = Path(os.path.expanduser(name))
    return path if name.startswith((".", "~")) or path.is_absolute() else None
