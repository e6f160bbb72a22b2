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
from training.data.examples import Example

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
        self._model, self._caches = model, (known, found)
        self._examples = {example.sha256: example for example in examples}
        self.problem = "" if model != "off" else "FACE_MODEL=off"
        """Why no image can be scored; "" if it can, or it is not known yet."""
        self.ceiling: float | None = None
        """The mean likeness of the data set's images, each to the others; None as long as it is not known."""
        self._scores: dict[str, Future[Score]] = {}
        self._has_news = False
        self._opened, self._pool = ExitStack(), ThreadPoolExecutor(1, "likeness")
        self._process: FaceProcess | None = None
        self._faces_of_set: Future[dict[str, np.ndarray]] | None = None

    def submit(self, images: Sequence[Path], triggers: Sequence[str]) -> None:
        """Score these images when those submitted before are done, each against the examples with one of `triggers`. What was known
        of files with the same name is forgotten."""
        if self.problem:
            return
        if self._process is None:
            try:
                self._process = self._opened.enter_context(face_process(self._model, self._models_dir))
            except OSError as error:  # such as too many processes
                self._give_up(error)
                return
            self._faces_of_set = self._pool.submit(self._read_set)
        for image, trigger in zip(images, triggers, strict=True):
            self._scores[image.name] = self._pool.submit(self._score, image, trigger)
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

    def _read_set(self) -> dict[str, np.ndarray]:
        """The faces of the data set by trigger word: [n, values]. Raises ModelError if they are too few of every one."""
        known, self._found = (FaceCache(path, self._model) for path in self._caches)
        faces: dict[str, dict[str, list[FoundFace]]] = {}
        for sha256, example in self._examples.items():
            found = known.get(sha256)
            found = self._found.get(sha256) if found is None else found
            if found is not None or example.path.exists():
                of_person = faces.setdefault(example.trigger, {})
                of_person[sha256] = self._search(example.path, sha256) if found is None else found
        scores, vectors = [], {}
        for trigger, of_person in faces.items():
            scored = score_set(of_person, NO_REFERENCES, FACE_MODELS[self._model]).values()
            scores += [image.score for image in scored if image.score is not None]
            vectors[trigger] = [image.face.vector for image in scored if image.face and image.face.vector is not None]
        most = max(map(len, vectors.values()), default=0)
        if most < MIN_FACES:
            raise ModelError(f"only {most} images of the data set show a face to compare with, {MIN_FACES} are needed")
        ceiling = mean_likeness(scores)
        self.ceiling = None if ceiling is None else round(ceiling, 4)
        return {trigger: np.stack(each) for trigger, each in vectors.items() if len(each) >= MIN_FACES}

    def _score(self, image: Path, trigger: str) -> Score:
        try:
            sha256 = sha256_of(image)
        except FileNotFoundError:
            return None, GONE
        faces_of_set = self._faces_of_set.result().get(trigger)
        if faces_of_set is None:
            return None, f"fewer than {MIN_FACES} images of {trigger} show a face to compare with"
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
