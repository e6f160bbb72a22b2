"""How much the faces in sample images look like those of the data set: measured by a process of its own while training goes on."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np

from common.errors import ModelError, as_loracat_error
from common.face_process import FaceProcess, face_process
from common.faces import FACE_MODELS
from common.files import sha256_of
from common.likeness import MIN_FACES, FaceCache, FoundFace, score_image, score_set
from training.callbacks.recommendation import mean_likeness
from training.data.dataset import Example

NO_REFERENCES = np.empty((0, 1), dtype=np.float32)
GONE = "the image is gone"
Score = tuple[float | None, str]
"""Likeness, rounded as it is recorded; None if it cannot be told, and then why."""


class SampleLikeness(AbstractContextManager):
    """Scores images one after the other, in the order in which they are submitted.

    Faces are remembered by the content of the image: those of the data set are read from `known`, which the caption stage has
    written, and all others are added to `found`. Leaving the context ends the process, and forgets what is still to be scored.
    """

    def __init__(self, model: str, models_dir: Path, examples: Iterable[Example], known: Path, found: Path):
        self._models_dir = models_dir
        self._model, self._examples, self._caches = model, {example.sha256: example.path for example in examples}, (known, found)
        self.problem = "" if model != "off" else "FACE_MODEL=off"
        """Why no image can be scored; "" if it can, or it is not known yet."""
        self.ceiling: float | None = None
        """The mean likeness of the data set's images, each to the others; None as long as it is not known."""
        self._scores: dict[str, Future[Score]] = {}
        self._has_news = False
        self._opened, self._pool = ExitStack(), ThreadPoolExecutor(1, "likeness")
        self._process: FaceProcess | None = None
        self._faces_of_set: Future[np.ndarray] | None = None

    def submit(self, images: Sequence[Path]) -> None:
        """Score these images when those submitted before are done. What was known of files with the same name is forgotten."""
        if self.problem:
            return
        if self._process is None:
            try:
                self._process = self._opened.enter_context(face_process(self._model, self._models_dir))
            except OSError as error:  # such as too many processes
                self._give_up(error)
                return
            self._faces_of_set = self._pool.submit(self._read_set)
        for image in images:
            self._scores[image.name] = self._pool.submit(self._score, image)
        self._has_news = bool(images)

    def pending(self) -> list[Future]:
        """What is still to be scored."""
        return [score for score in self._scores.values() if not score.done()]

    def has_news(self) -> bool:
        """Whether everything has been scored since this was last true."""
        if not self._has_news or self.pending():
            return False
        self._has_news = False
        return True

    def score_of(self, image: str) -> Score:
        """Of the image with this file name; (None, "") if it is not scored yet, or none can be."""
        score = self._scores.get(image)
        if score is None or not score.done() or self.problem:
            return None, ""
        try:
            return score.result()
        except (ModelError, OSError) as error:  # the latter for a full disk, of which training itself has more to say
            self._give_up(error)
            return None, ""

    def _give_up(self, error: Exception) -> None:
        self.problem = str(as_loracat_error(error) or error)
        without = "Everything else works without it; FACE_MODEL=off silences this line"
        print(f"no likeness of sample images: {self.problem}. {without}", flush=True)

    def _read_set(self) -> np.ndarray:
        """The faces of the data set: [n, values]. Raises ModelError if they are too few."""
        known, self._found = (FaceCache(path, self._model) for path in self._caches)
        faces = {}
        for sha256, path in self._examples.items():
            found = known.get(sha256)
            found = self._found.get(sha256) if found is None else found
            if found is not None or path.exists():
                faces[sha256] = self._search(path, sha256) if found is None else found
        model = FACE_MODELS[self._model]
        scored = score_set(faces, NO_REFERENCES, model)
        scores = [image.score for image in scored.values() if image.score is not None]
        vectors = [image.face.vector for image in scored.values() if image.face and image.face.vector is not None]
        if len(vectors) < MIN_FACES:
            raise ModelError(f"only {len(vectors)} images of the data set show a face to compare with, {MIN_FACES} are needed")
        ceiling = mean_likeness(scores)
        self.ceiling = None if ceiling is None else round(ceiling, 4)
        return np.stack(vectors)

    def _score(self, image: Path) -> Score:
        try:
            sha256 = sha256_of(image)
        except FileNotFoundError:
            return None, GONE
        faces_of_set = self._faces_of_set.result()
        found = self._found.get(sha256)
        faces = self._search(image, sha256) if found is None else found
        likeness = score_image(faces, faces_of_set, NO_REFERENCES, FACE_MODELS[self._model])
        return None if likeness.score is None else round(likeness.score, 4), likeness.why

    def _search(self, image: Path, sha256: str) -> list[FoundFace]:
        faces = self._process.find(image)
        self._found.add(sha256, faces)
        return faces

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._opened.close()
