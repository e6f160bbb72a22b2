"""The probabilities of every image, from the cache or by inference: `dataset/.loracat/tags/<model>/<SHA-256 of the image>.npy`.

The name of an image that version 1.0 decoded to other pixels has a mark after the hash; see `IndexedImage.pixels_key`.

Thresholds, replacements and pruning are applied to cached probabilities, so that changing them costs no inference. A model
is identified by the content of its files, and by how its images are prepared if that is not WD14's way. Its cache folder
holds a copy of its list of tags, so that the model itself is not needed when every image is cached.
"""

import hashlib
import io
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np

from captioning.captions import Tag
from captioning.config import CaptionSettings
from captioning.cpu_affinity import decode_workers
from captioning.image_audit import IndexedImage, file_stamp
from captioning.model_files import MODEL_FILE, TAGS_FILE, download_model, find_model
from captioning.onnx_file import read_onnx
from captioning.preprocessing import find_preprocessing, wd14
from captioning.report import CaptionCounts
from captioning.tag_selection import TagSelector, read_tags
from captioning.wd14 import Tagger, first_batch, predict
from common.background import prefetch
from common.files import atomic_write, parse_json, read_file, sha256_of, write_bytes, write_json
from common.images import BrokenImageError
from common.progress import ProgressBar

_ABOUT_FILE = "model.json"
_TAGS_SHA256 = "tags_sha256"


def tag_images(
    images: dict[Path, IndexedImage], settings: CaptionSettings, models_dir: Path, root: Path, counts: CaptionCounts
) -> tuple[list[Tag], dict[Path, np.ndarray]]:
    """The model's tags, and the probabilities, float32 [tags], of every image that can be tagged, in the order of `images`.

    The model is searched for, downloaded and loaded only if a probability is missing in the caches in `root`.
    """
    cache, model_folder = _open_cache(list(images.values()), settings, models_dir, root)
    cached = {path: cache.read(image.pixels_key) for path, image in images.items()}
    missing = [path for path, probabilities in cached.items() if probabilities is None]
    if missing:
        tagger = load_tagger(model_folder, settings, batch_size=min(settings.caption_batch_size, len(images)))
        if settings.caption_bf16:
            _report_bf16_effect(model_folder, tagger, missing, settings)
        known = f", {len(images) - len(missing)} more are in the cache" if len(missing) < len(images) else ""
        print(f"tagging {len(missing)} images on the {tagger.device}, {tagger.batch_size} at a time{known}", flush=True)
        cached |= infer({path: images[path] for path in missing}, tagger, cache, counts, decode_workers())
    return cache.tags, {path: probabilities for path, probabilities in cached.items() if probabilities is not None}


def load_tagger(folder: Path, settings: CaptionSettings, batch_size: int) -> Tagger:
    """The tagger in `folder`."""
    return Tagger(folder / MODEL_FILE, folder / TAGS_FILE, batch_size, settings.caption_provider, settings.caption_bf16)


def infer(
    images: dict[Path, IndexedImage], tagger: Tagger, cache: "TagCache", counts: CaptionCounts, workers: int
) -> dict[Path, np.ndarray]:
    """The probabilities of every image that can be decoded. While the model runs, `workers` threads preprocess the next
    batches and another thread writes results to the cache."""
    found = {}

    def write(result: tuple[Path, np.ndarray | BrokenImageError]) -> tuple[Path, np.ndarray | BrokenImageError]:
        path, probabilities = result
        if isinstance(probabilities, np.ndarray):
            cache.write(images[path].pixels_key, probabilities)
        return result

    with ProgressBar(len(images), "tagging", "images") as bar:
        for path, probabilities in prefetch(write, predict(list(images), tagger, workers), workers=1):
            if isinstance(probabilities, BrokenImageError):
                counts.fail(path, f"{probabilities}; replace or remove it")
            else:
                found[path] = probabilities
            bar.update()
    return found


class TagCache:
    """The cached probabilities of one model, with the model's `tags`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.tags: list[Tag] = read_tags(folder / TAGS_FILE)

    def read(self, pixels_key: str) -> np.ndarray | None:
        """The probabilities of the image with this key, float32 [tags]; None if they are missing or damaged."""
        try:
            content = read_file(self._folder / f"{pixels_key}.npy")
            with io.BytesIO(content) as file:
                probabilities = np.lib.format.read_array(file, allow_pickle=False)
                checksum, end = file.read(), file.tell()
        except (OSError, ValueError, SyntaxError, TokenError):  # the header is a line of Python
            return None
        is_intact = not checksum or checksum == _checksum(content[: end - len(checksum)])  # 1.0 wrote none
        fits = probabilities.dtype == np.float32 and probabilities.shape == (len(self.tags),)
        return probabilities if fits and is_intact else None

    def write(self, pixels_key: str, probabilities: np.ndarray) -> None:
        """Store the `probabilities`, float32 [tags], of the image with this key. A checksum follows the array."""
        with io.BytesIO() as file:
            np.save(file, probabilities)
            content = file.getvalue()
        write_bytes(self._folder / f"{pixels_key}.npy", content + _checksum(content))


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def open_cache(root: Path, name: str, model_folder: Path, bf16: bool) -> TagCache:
    """The cache in `root` for the model `name` in `model_folder`; created if there is none.

    The content of the model's files decides; it is hashed only if no cache records these sizes and times of change. A cache
    whose list of tags was changed, or whose description is damaged, is written again and keeps its probabilities.
    """
    onnx = read_onnx(model_folder / MODEL_FILE)
    files = (onnx.path, model_folder / TAGS_FILE, *(model_folder / file for file in sorted(onnx.weights_files)))
    preprocessing = find_preprocessing(onnx, len(read_tags(files[1])))  # both refuse unusable files under their own paths
    described = [] if preprocessing == wd14(preprocessing.side_px) else [repr(preprocessing)]
    stamps = [list(file_stamp(file)) for file in files]
    about = {"name": name, "bf16": bf16, "stamps": stamps, _TAGS_SHA256: sha256_of(files[1])}
    if described:
        about["preprocessing"] = described[0]
    for folder, recorded in _complete_caches(root):
        if recorded == about:
            return TagCache(folder)
    digests = "\n".join([*map(sha256_of, files), str(bf16), *described])
    folder = root / hashlib.sha256(digests.encode()).hexdigest()[:16]
    with atomic_write(folder / TAGS_FILE) as temporary:
        shutil.copyfile(files[1], temporary)
    write_json(folder / _ABOUT_FILE, about)
    return TagCache(folder)


def find_cache(root: Path, name: str, bf16: bool) -> TagCache | None:
    """The newest cache in `root` for a model of that name, whose files may be gone; None if there is none."""
    folders = [folder for folder, about in _complete_caches(root) if about["name"] == name and about["bf16"] == bf16]
    newest = max(folders, key=lambda folder: (folder / _ABOUT_FILE).stat().st_mtime_ns, default=None)
    return None if newest is None else TagCache(newest)


def _complete_caches(root: Path) -> Iterator[tuple[Path, dict]]:
    """Every cache with a valid description of its model and the list of tags that it was created with.

    Caches of earlier versions do not record the digest of that list and are trusted.
    """
    for about_file in sorted(root.glob(f"*/{_ABOUT_FILE}")):
        try:
            about, digest = parse_json(read_file(about_file)), sha256_of(about_file.with_name(TAGS_FILE))
        except (OSError, ValueError):
            continue
        if isinstance(about, dict) and {"name", "bf16", "stamps"} <= about.keys() and about.get(_TAGS_SHA256, digest) == digest:
            yield about_file.parent, about


def _open_cache(
    images: Sequence[IndexedImage], settings: CaptionSettings, models_dir: Path, root: Path
) -> tuple[TagCache, Path | None]:
    """The cache of the model, and the model's folder; None if the model is missing and every image is cached."""
    name, bf16 = settings.caption_model, settings.caption_bf16
    model_folder = find_model(name, models_dir)
    if model_folder is None:
        cache = find_cache(root, name, bf16)
        if cache and all(cache.read(image.pixels_key) is not None for image in images):
            return cache, None
        model_folder = download_model(name, models_dir)
    return open_cache(root, name, model_folder, bf16), model_folder


def _report_bf16_effect(model_folder: Path, tagger: Tagger, paths: Sequence[Path], settings: CaptionSettings) -> None:
    images = first_batch(paths, tagger)
    if images:
        exact = Tagger(model_folder / MODEL_FILE, model_folder / TAGS_FILE, tagger.batch_size, settings.caption_provider)
        selector = TagSelector(tagger.tags, settings)
        print(bf16_effect(exact.probabilities(images), tagger.probabilities(images), selector), flush=True)


def bf16_effect(exact: np.ndarray, rounded: np.ndarray, selector: TagSelector) -> str:
    """What bfloat16 changes in the tags of a few images; both arrays are their probabilities, [images, tags]."""
    selected = [(set(selector.select(one)), set(selector.select(other))) for one, other in zip(exact, rounded, strict=True)]
    changed = sum(len(one ^ other) for one, other in selected)
    total = sum(len(one) for one, _ in selected)
    largest = float(np.abs(exact - rounded).max(initial=0.0))
    return (
        f"bfloat16 changes {changed} of {total} tags in the first {len(exact)} images "
        f"(probabilities change by at most {largest:.4f})"
    )
