"""Which images do not show the person of the data set, and how close the person is in each image. Nothing is excluded.

The faces are found by a process of its own while images are tagged, and recorded in `dataset/.loracat/faces.jsonl`: an image
whose content is known is not searched again. The likeness of every image is recorded in `dataset/.loracat/likeness.json`.
"""

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioning.image_audit import IndexedImage
from common.dataset_layout import DatasetFolder
from common.errors import ModelError, abbreviated
from common.face_process import face_process
from common.faces import FACE_MODELS
from common.files import sha256_of
from common.likeness import FRAMINGS, FaceCache, Likeness, score_set
from common.progress import ProgressBar

OTHER_PERSON = "another person"
"""The kind of flaw, as it is recorded."""
MAX_FLAGGED = 0.5
"""If a larger share of the images would be flagged, there is not one person that the others differ from."""


@dataclass(frozen=True)
class SetLikeness:
    """The likeness of every image of a data set."""

    model: str
    images: dict[str, Likeness]
    """By name."""
    references: int
    """Number of face references."""
    usable_references: int
    """Number of those that show a face which the images can be compared with."""
    persons: Sequence[Collection[str]] = ()
    """The names of each person's images, which are compared with each other alone; empty: there is one person."""

    def flaws(self) -> dict[str, str]:
        """Image -> in words that it shows another person. Nothing is said of a person's images if it would be said of most."""
        limit = FACE_MODELS[self.model].other_below
        flaws = {}
        for person in self.persons or [self.images.keys()]:
            images = {name: image for name, image in self.images.items() if name in person}
            scores = {name: image.score for name, image in images.items() if image.score is not None}
            to_reference = {name: image.to_reference for name, image in images.items() if image.to_reference is not None}
            for values, what in ((to_reference, "unlike the face reference"), (scores, "unlike the other images")):
                unlike = [name for name, value in values.items() if value < limit]
                if len(unlike) <= MAX_FLAGGED * len(values):
                    flaws |= {name: f"the face is {what}: likeness {values[name]:.2f}, less than {limit}" for name in unlike}
        return {name: flaws[name] for name in self.images if name in flaws}

    def as_json(self, sha256: dict[str, str]) -> dict:
        """The content of `likeness.json`. `sha256` of every image, by name."""
        images = {}
        for name, image in self.images.items():
            images[name] = {
                "sha256": sha256[name],
                "likeness": _rounded(image.score),
                "to_reference": _rounded(image.to_reference),
                "framing": image.framing,
                "face_px": image.face.width_px if image.face else 0,
                "why": image.why,
            }
        scores = [image.score for image in self.images.values() if image.score is not None]
        ceiling = _rounded(statistics.mean(scores)) if scores else None
        return {
            "model": self.model,
            "references": self.usable_references,
            "ceiling": ceiling,
            "framing": self.framing(),
            "images": images,
        }

    def framing(self) -> dict[str, float]:
        """Share of the images by framing."""
        counts = {name: sum(image.framing == name for image in self.images.values()) for name in FRAMINGS}
        return {name: round(count / len(self.images), 4) for name, count in counts.items()}

    def table(self) -> str:
        """What is found, in a few lines."""
        scores = [image.score for image in self.images.values() if image.score is not None]
        unknown = [f"{name} ({image.why})" for name, image in self.images.items() if image.score is None]
        lines = [f"likeness ({self.model}): {len(scores)} of {len(self.images)} images compared"]
        if scores:
            lines[0] += f", {min(scores):.2f} to {max(scores):.2f}, mean {statistics.mean(scores):.2f}"
        framing = self.framing()
        shares = framing | {"no face": max(0.0, 1 - sum(framing.values()))}
        lines.append(f"  framing: {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}")
        if self.usable_references < self.references:
            useless = self.references - self.usable_references
            lines.append(f"  {useless} of {self.references} face references cannot be read, or show no face that can be compared")
        if unknown:
            lines.append(f"  cannot tell: {len(unknown)} images: {abbreviated(unknown, 3)}")
        if sum(score < FACE_MODELS[self.model].other_below for score in scores) > MAX_FLAGGED * len(scores):
            lines.append("  most faces are unlike the others, as in a data set of several persons; none is flagged for that")
        if flaws := self.flaws():
            lines.append(f"  flagged as {OTHER_PERSON}: {abbreviated([f'{name} ({flaw})' for name, flaw in flaws.items()])}")
            lines.append("  write the names of those that are to be left out into dataset/exclude.txt, or set SKIP_FLAGGED=1")
        return "\n".join(lines)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


@contextmanager
def likeness_in_background(
    folder: DatasetFolder,
    indexed: Mapping[Path, IndexedImage],
    references: Sequence[Path],
    model: str,
    models_dir: Path,
    persons: Sequence[Collection[str]],
    compared: Set[str],
) -> Iterator[Callable[[], SetLikeness | None]]:
    """Find the faces of the images from now on. Yields a function that waits for them and returns the likeness of every image; it
    prints one line and returns None if that is not possible.

    The images (names) of each of `persons` are compared with each other, and those in `compared` with the `references` too.
    """
    images = {path: image.sha256 for path, image in indexed.items() if image.stats}
    if model == "off" or not images:
        yield lambda: None
        return
    cache = FaceCache(folder.faces, model)
    digests = {}
    for path in references:
        with suppress(OSError):  # `SetLikeness.table` counts the references that were not used
            digests[path] = sha256_of(path)
    files = {sha256: path for path, sha256 in (images | digests).items() if cache.get(sha256) is None}
    pool = ThreadPoolExecutor(1)

    def likeness() -> SetLikeness | None:
        try:
            with ProgressBar(len(files), "finding faces", "images") as bar:
                for search in searches:
                    search.result()
                    bar.update()
        except ModelError as error:
            print(f"no likeness: {error}. Everything else works without it; FACE_MODEL=off silences this line", flush=True)
            return None
        faces = {indexed[path].name: cache.get(sha256) for path, sha256 in images.items()}
        found = [faces[0].vector for faces in map(cache.get, digests.values()) if faces and faces[0].vector is not None]
        nothing = np.empty((0, 1), dtype=np.float32)
        scored = {}
        for person in persons:
            of_person = {name: each for name, each in faces.items() if name in person}
            vectors = np.stack(found) if found and compared.intersection(of_person) else nothing
            scored |= score_set(of_person, vectors, FACE_MODELS[model])
        scored = {name: scored[name] for name in faces}
        return SetLikeness(model, scored, len(references), len(found), persons)

    with face_process(model, models_dir) if files else nullcontext() as process:
        searches = [pool.submit(lambda sha256, path: cache.add(sha256, process.find(path)), *item) for item in files.items()]
        try:
            yield likeness
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
