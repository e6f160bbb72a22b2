"""Every picture's probabilities, kept: `dataset/.loracat/tags/<model>/<SHA-256 of the picture>.npy`.

Thresholds, pruning and replacing are applied to what is stored, so changing them costs no inference. A model is known by
the content of its two files; its folder here holds its list of tags, so that the model itself need not even be there.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError

import numpy as np

from captioning.captions import Tag
from captioning.known_pictures import stamp_of
from captioning.model_files import MODEL_FILE, TAGS_FILE
from captioning.tags_file import read_tags
from dataset_folder import sha256_of, update_json, whole_file

_ABOUT = "model.json"
_DIGEST = "tags_sha256"


class TagStore:
    """The stored probabilities of one model."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.tags: list[Tag] = read_tags(folder / TAGS_FILE)

    def read(self, sha256: str) -> np.ndarray | None:
        """The probabilities of a picture, float32 [tags]; None if they are not there, or damaged."""
        try:
            with self._file(sha256).open("rb") as file:
                probabilities = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, SyntaxError, TokenError):  # the header is a line of Python
            return None
        fits = probabilities.dtype == np.float32 and probabilities.shape == (len(self.tags),)
        return probabilities if fits else None

    def put(self, sha256: str, probabilities: np.ndarray) -> None:
        """Keep the `probabilities` [tags] of a picture."""
        with whole_file(self._file(sha256)) as beside, beside.open("wb") as file:
            np.save(file, probabilities)

    def _file(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.npy"


def store_of_model(root: Path, name: str, model_folder: Path, bf16: bool) -> TagStore:
    """The store in `root` for the model `name`, whose files lie in `model_folder`; made if there is none.

    The content of both files decides; the model is read through only if sizes and times are not remembered. A store whose
    list of tags was changed, or of which nobody wrote down what it was, is made anew; what it has of pictures stays.
    """
    files = (model_folder / MODEL_FILE, model_folder / TAGS_FILE)
    read_tags(files[1])  # a file that is none is refused where it lies
    stamps = [list(stamp_of(file)) for file in files]
    about = {"name": name, "bf16": bf16, "stamps": stamps, _DIGEST: sha256_of(files[1])}
    folder = next((folder for folder, said in _stores(root) if said == about), None)
    if folder is None:
        digests = "\n".join([*map(sha256_of, files), str(bf16)])
        folder = root / hashlib.sha256(digests.encode()).hexdigest()[:16]
        with whole_file(folder / TAGS_FILE) as beside:
            shutil.copyfile(files[1], beside)
        update_json(folder / _ABOUT, about)
    return TagStore(folder)


def store_by_name(root: Path, name: str, bf16: bool) -> TagStore | None:
    """The newest store in `root` for a model of that name, whose files may be gone; None if there is none."""
    folders = [folder for folder, said in _stores(root) if said["name"] == name and said["bf16"] == bf16]
    newest = max(folders, key=lambda folder: (folder / _ABOUT).stat().st_mtime_ns, default=None)
    return None if newest is None else TagStore(newest)


def _stores(root: Path) -> Iterator[tuple[Path, dict]]:
    """Every complete store and what it says about its model.

    Its list of tags must be there and be the one that it was made with; stores of earlier versions do not say which that is
    and are believed.
    """
    for about in sorted(root.glob(f"*/{_ABOUT}")):
        try:
            said, digest = json.loads(about.read_bytes()), sha256_of(about.with_name(TAGS_FILE))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(said, dict) and {"name", "bf16", "stamps"} <= said.keys() and said.get(_DIGEST, digest) == digest:
            yield about.parent, said
