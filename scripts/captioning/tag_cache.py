"""Every image's probabilities, kept: `dataset/.loracat/tags/<model>/<SHA-256 of the image>.npy`.

Thresholds, pruning and replacing are applied to what is stored, so changing them costs no inference. A model is known by
the content of its two files; its folder here holds its list of tags, so that the model itself need not even be there.

Every image's probabilities: from the store, or by inference and into the store.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np
from tqdm import tqdm

from captioning.captions import Tag
from captioning.config import CaptionSettings
from captioning.cpu_affinity import is_arm, preparing_workers
from captioning.image_audit import KnownImage, stamp_of
from captioning.journal import Tally
from captioning.model_files import MODEL_FILE, TAGS_FILE, fetched_folder, found_folder
from captioning.tag_selection import TagChoice, read_tags
from captioning.wd14 import Tagger, effect_on_tags, first_batch, inferred
from common.background import prefetch
from common.files import atomic_write, sha256_of, write_json
from common.images import BrokenImageError

_ABOUT = "model.json"


_DIGEST = "tags_sha256"


class TagStore:
    """The stored probabilities of one model."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.tags: list[Tag] = read_tags(folder / TAGS_FILE)

    def read(self, sha256: str) -> np.ndarray | None:
        """The probabilities of an image, float32 [tags]; None if they are not there, or damaged."""
        try:
            with self._file(sha256).open("rb") as file:
                probabilities = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, SyntaxError, TokenError):  # the header is a line of Python
            return None
        fits = probabilities.dtype == np.float32 and probabilities.shape == (len(self.tags),)
        return probabilities if fits else None

    def put(self, sha256: str, probabilities: np.ndarray) -> None:
        """Keep the `probabilities` [tags] of an image."""
        with atomic_write(self._file(sha256)) as beside, beside.open("wb") as file:
            np.save(file, probabilities)

    def _file(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.npy"


def store_of_model(root: Path, name: str, model_folder: Path, bf16: bool) -> TagStore:
    """The store in `root` for the model `name`, whose files lie in `model_folder`; made if there is none.

    The content of both files decides; the model is read through only if sizes and times are not remembered. A store whose
    list of tags was changed, or of which nobody wrote down what it was, is made anew; what it has of images stays.
    """
    files = (model_folder / MODEL_FILE, model_folder / TAGS_FILE)
    read_tags(files[1])  # a file that is none is refused where it lies
    stamps = [list(stamp_of(file)) for file in files]
    about = {"name": name, "bf16": bf16, "stamps": stamps, _DIGEST: sha256_of(files[1])}
    folder = next((folder for folder, said in _stores(root) if said == about), None)
    if folder is None:
        digests = "\n".join([*map(sha256_of, files), str(bf16)])
        folder = root / hashlib.sha256(digests.encode()).hexdigest()[:16]
        with atomic_write(folder / TAGS_FILE) as beside:
            shutil.copyfile(files[1], beside)
        write_json(folder / _ABOUT, about)
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


def tagged(
    images: dict[Path, KnownImage], settings: CaptionSettings, models_dir: Path, records: Path, tally: Tally
) -> tuple[TagStore, dict[Path, np.ndarray]]:
    """The model's store, and the probabilities, float32 [tags], of every image that can be tagged, in the order given.

    The model is looked for, fetched and loaded only as far as something is missing in the store under `records`.
    """
    store, model_folder = _store(list(images.values()), settings, models_dir, records / "tags")
    stored = {path: store.read(image.sha256) for path, image in images.items()}
    missing = [path for path, probabilities in stored.items() if probabilities is None]
    if missing:
        tagger = load_tagger(model_folder, settings, batch_size=min(settings.caption_batch_size, len(images)))
        if _uses_bf16(settings):
            _say_effect_of_bf16(model_folder, tagger, missing, settings)
        print(f"{len(missing)} images to tag on the {tagger.runs_on}, {tagger.batch_size} at a time", flush=True)
        stored |= infer({path: images[path] for path in missing}, tagger, store, tally, preparing_workers())
    return store, {path: probabilities for path, probabilities in stored.items() if probabilities is not None}


def load_tagger(folder: Path, settings: CaptionSettings, batch_size: int) -> Tagger:
    """The tagger in `folder`. `batch_size` is the same however much of the work is left."""
    return Tagger(folder / MODEL_FILE, folder / TAGS_FILE, batch_size, settings.caption_provider, _uses_bf16(settings))


def _store(images: Sequence[KnownImage], settings: CaptionSettings, models_dir: Path, root: Path) -> tuple[TagStore, Path | None]:
    """The store of the model, and the model's folder; None if the model is not there and everything is stored."""
    name, bf16 = settings.caption_model, _uses_bf16(settings)
    folder = found_folder(name, models_dir)
    if folder is None:
        store = store_by_name(root, name, bf16)
        if store and all(store.read(image.sha256) is not None for image in images):
            return store, None
        folder = fetched_folder(name, models_dir)
    return store_of_model(root, name, folder, bf16), folder


def infer(images: dict[Path, KnownImage], tagger: Tagger, store: TagStore, tally: Tally, workers: int) -> dict[Path, np.ndarray]:
    """The probabilities of every image that decodes. `workers` threads prepare the next batches, and each result goes to
    the disk, while the model works."""
    found = {}

    def kept(result: tuple[Path, np.ndarray | BrokenImageError]) -> tuple[Path, np.ndarray | BrokenImageError]:
        path, probabilities = result
        if isinstance(probabilities, np.ndarray):
            store.put(images[path].sha256, probabilities)
        return result

    with tqdm(total=len(images), desc="tagging", unit="image", disable=None) as bar:
        for path, probabilities in prefetch(kept, inferred(list(images), tagger, workers), workers=1):
            if isinstance(probabilities, BrokenImageError):
                tally.fail(path, f"{probabilities}; replace or remove it")
            else:
                found[path] = probabilities
            bar.update()
    return found


def _uses_bf16(settings: CaptionSettings) -> bool:
    return settings.caption_bf16 and is_arm()


def _say_effect_of_bf16(model_folder: Path, tagger: Tagger, missing: Sequence[Path], settings: CaptionSettings) -> None:
    exact = Tagger(model_folder / MODEL_FILE, model_folder / TAGS_FILE, tagger.batch_size, settings.caption_provider)
    if prepared := first_batch(missing, tagger):
        choice = TagChoice(tagger.tags, settings)
        print(effect_on_tags(exact.probabilities(prepared), tagger.probabilities(prepared), choice), flush=True)
