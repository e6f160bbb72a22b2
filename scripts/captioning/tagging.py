"""Every picture's probabilities: from the store, or by inference and into the store."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from captioning.cores import is_arm, preparing_workers
from captioning.inference import effect_on_tags, first_batch, inferred
from captioning.known_pictures import KnownPicture
from captioning.model_files import MODEL_FILE, TAGS_FILE, fetched_folder, found_folder
from captioning.tag_choice import TagChoice
from captioning.tag_store import TagStore, store_by_name, store_of_model
from captioning.tagger import Tagger
from captioning.tally import Tally
from pictures import BrokenPictureError
from prefetch import prefetched
from sections import CaptionSettings


def tagged(
    pictures: dict[Path, KnownPicture], settings: CaptionSettings, models_dir: Path, records: Path, tally: Tally
) -> tuple[TagStore, dict[Path, np.ndarray]]:
    """The model's store, and the probabilities, float32 [tags], of every picture that can be tagged, in the order given.

    The model is looked for, fetched and loaded only as far as something is missing in the store under `records`.
    """
    store, model_folder = _store(list(pictures.values()), settings, models_dir, records / "tags")
    stored = {path: store.read(picture.sha256) for path, picture in pictures.items()}
    missing = [path for path, probabilities in stored.items() if probabilities is None]
    if missing:
        tagger = load_tagger(model_folder, settings, batch_size=min(settings.caption_batch_size, len(pictures)))
        if _uses_bf16(settings):
            _say_effect_of_bf16(model_folder, tagger, missing, settings)
        print(f"{len(missing)} pictures to tag on the {tagger.runs_on}, {tagger.batch_size} at a time", flush=True)
        stored |= infer({path: pictures[path] for path in missing}, tagger, store, tally, preparing_workers())
    return store, {path: probabilities for path, probabilities in stored.items() if probabilities is not None}


def load_tagger(folder: Path, settings: CaptionSettings, batch_size: int) -> Tagger:
    """The tagger in `folder`. `batch_size` is the same however much of the work is left."""
    return Tagger(folder / MODEL_FILE, folder / TAGS_FILE, batch_size, settings.caption_provider, _uses_bf16(settings))


def _store(
    pictures: Sequence[KnownPicture], settings: CaptionSettings, models_dir: Path, root: Path
) -> tuple[TagStore, Path | None]:
    """The store of the model, and the model's folder; None if the model is not there and everything is stored."""
    name, bf16 = settings.caption_model, _uses_bf16(settings)
    folder = found_folder(name, models_dir)
    if folder is None:
        store = store_by_name(root, name, bf16)
        if store and all(store.read(picture.sha256) is not None for picture in pictures):
            return store, None
        folder = fetched_folder(name, models_dir)
    return store_of_model(root, name, folder, bf16), folder


def infer(
    pictures: dict[Path, KnownPicture], tagger: Tagger, store: TagStore, tally: Tally, workers: int
) -> dict[Path, np.ndarray]:
    """The probabilities of every picture that decodes. `workers` threads prepare the next batches, and each result goes to
    the disk, while the model works."""
    found = {}

    def kept(result: tuple[Path, np.ndarray | BrokenPictureError]) -> tuple[Path, np.ndarray | BrokenPictureError]:
        path, probabilities = result
        if isinstance(probabilities, np.ndarray):
            store.put(pictures[path].sha256, probabilities)
        return result

    with tqdm(total=len(pictures), desc="tagging", unit="picture", disable=None) as bar:
        for path, probabilities in prefetched(kept, inferred(list(pictures), tagger, workers), workers=1):
            if isinstance(probabilities, BrokenPictureError):
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
